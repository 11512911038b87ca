//! The logs that Viperblock left on the host that had the volume last: what it had acknowledged and not yet uploaded.
//!
//! Invariants:
//! - Only records that pass their checksums count. Bad ones at the end of a file are a torn tail; bad ones with good ones
//!   after them are damage.
//! - Records are read twice, when they are found and when they are wanted, and are checked both times.
//!
//! Everything here blocks: it is called on tokio's threads for that.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use serde_json::{Value, json};

use super::chain::number_in;
use super::codec::{self, Cipher, LOG_HEAD, LOG_RECORD};
use super::config::encrypted;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::units::BLOCK;

/// Records looked at in one read: 1 MiB.
const SCAN_RECORDS: usize = 256;

/// The newest record of a block in all logs.
#[derive(Debug, Clone, Copy)]
pub(super) struct LogEntry {
    pub(super) block: u64,
    pub(super) seq: u64,
    /// Index of the file.
    pub(super) file: usize,
    /// Where the record begins, in bytes.
    pub(super) at: u64,
}

/// What all logs hold.
#[derive(Debug, Default)]
pub(super) struct Logs {
    /// In the order of their names, which is that of their age.
    pub(super) files: Vec<PathBuf>,
    /// One for each block, in order.
    pub(super) entries: Vec<LogEntry>,
    /// All records that counted.
    pub(super) records: u64,
    /// Bad records that were passed over.
    pub(super) lost: u64,
    /// Files with a torn tail.
    pub(super) torn: Vec<Value>,
}

/// Finds and reads all logs of `volume`, which has `blocks` blocks.
///
/// `dir` is Viperblock's base folder on that host, the volume's folder in it, or the folder with the logs.
///
/// # Errors
/// `NotFound` where there are no logs' folders; `Corrupt` for damage, which `accept_loss` passes over; `Unsupported` for encrypted ones.
pub(super) fn scan(dir: &Path, volume: &str, blocks: u64, accept_loss: bool) -> Result<Logs> {
    let mut logs = Logs { files: find(dir, volume)?, ..Logs::default() };
    for n in 0..logs.files.len() {
        let path = logs.files[n].clone();
        scan_file(&mut logs, n, &path, blocks, accept_loss)
            .context(|| format!("reading the log {}", path.display()))?;
    }
    // Stable: of equal seqs, which are one and the same write, the first.
    logs.entries.sort_by_key(|e| (e.block, std::cmp::Reverse(e.seq)));
    logs.entries.dedup_by_key(|e| e.block);
    Ok(logs)
}

fn find(dir: &Path, volume: &str) -> Result<Vec<PathBuf>> {
    // A folder of this name is Viperblock's own, and may well be empty. Any other one without a log is a mistake.
    let own = [dir.join(volume).join("wal/chunks"), dir.join("wal/chunks")].into_iter().find(|d| d.is_dir());
    let named = own.is_some();
    let folder = own.unwrap_or_else(|| dir.to_owned());
    let reading = || format!("looking for Viperblock's logs in {}", folder.display());
    let mut files = Vec::new();
    for entry in fs::read_dir(&folder).context(reading)? {
        let entry = entry.context(reading)?;
        let name = entry.file_name();
        if name.to_str().is_some_and(is_log) {
            files.push(entry.path());
        }
    }
    files.sort();
    if files.is_empty() && !named && !folder.ends_with("wal/chunks") {
        let what = format!(
            "{} has no logs, neither {volume}/wal/chunks nor wal.*.bin: name Viperblock's base folder on the host that had the volume last",
            folder.display()
        );
        return Err(Error::new(ErrorKind::NotFound, what));
    }
    Ok(files)
}

/// `wal.00000017.bin`, `wal.00000017.shard_03.bin`.
fn is_log(name: &str) -> bool {
    let whole = |n: &str| number_in(n, "wal.").is_some();
    whole(name)
        || name.split_once(".shard_").is_some_and(|(stem, shard)| {
            let digits = shard.strip_suffix(".bin");
            whole(&format!("{stem}.bin"))
                && digits.is_some_and(|d| d.len() >= 2 && d.bytes().all(|b| b.is_ascii_digit()))
        })
}

fn scan_file(logs: &mut Logs, number: usize, path: &Path, blocks: u64, accept_loss: bool) -> Result<()> {
    let open = || "opening it".to_owned();
    let file = File::open(path).context(open)?;
    let len = file.metadata().context(open)?.len();
    let tell = |records: u64, at: u64| json!({ "file": path.file_name().map(|n| n.to_string_lossy()), "records": records, "bytes_after": len - at });
    if len < LOG_HEAD as u64 {
        // The host went down while it made the file: nothing was written to it yet.
        logs.torn.push(tell(0, 0));
        return Ok(());
    }
    let mut head = [0; LOG_HEAD];
    file.read_exact_at(&mut head, 0).context(|| "reading its header")?;
    if codec::log_head(&head)? == Cipher::Encrypted {
        return Err(encrypted());
    }
    let (mut at, mut end, mut good) = (LOG_HEAD as u64, LOG_HEAD as u64, 0);
    let mut bad: Option<(u64, u64)> = None;
    let mut buf = vec![0; SCAN_RECORDS * LOG_RECORD];
    while at + LOG_RECORD as u64 <= len {
        let whole = ((len - at) / LOG_RECORD as u64).min(SCAN_RECORDS as u64) as usize * LOG_RECORD;
        let part = &mut buf[..whole];
        file.read_exact_at(part, at).context(|| format!("reading at byte {at}"))?;
        for raw in part.chunks_exact(LOG_RECORD) {
            match codec::log_record(raw) {
                Ok(r) => {
                    if let Some((first, count)) = bad.take() {
                        damaged(first, at, accept_loss)?;
                        logs.lost += count;
                    }
                    if r.block >= blocks {
                        let why = format!(
                            "the record at byte {at} is of block {}, past the volume's end: it is another volume's log, or damaged",
                            r.block
                        );
                        return Err(Error::new(ErrorKind::Corrupt, why));
                    }
                    logs.entries.push(LogEntry { block: r.block, seq: r.seq, file: number, at });
                    good += 1;
                    end = at + LOG_RECORD as u64;
                }
                Err(_) => bad = Some(bad.map_or((at, 1), |(first, n)| (first, n + 1))),
            }
            at += LOG_RECORD as u64;
        }
    }
    logs.records += good;
    if end < len {
        logs.torn.push(tell(good, end));
    }
    Ok(())
}

/// A bad record at `first` with a good one at `then`.
fn damaged(first: u64, then: u64, accept_loss: bool) -> Result<()> {
    if accept_loss {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Corrupt,
        format!(
            "the record at byte {first} fails its checksum, and the one at byte {then} does not, so it is no torn tail: \
             take a sound copy of the log, or --accept-loss to go without the bad ones"
        ),
    ))
}

/// Reads `blocks` records that lie one behind the other from byte `at`: the data of as many blocks from `block` on.
///
/// # Errors
/// `Corrupt` if they are not what they were when they were found.
pub(super) fn read(path: &Path, at: u64, block: u64, blocks: u32) -> Result<Bytes> {
    let reading = || format!("reading the log {} at byte {at}", path.display());
    let mut raw = vec![0; blocks as usize * LOG_RECORD];
    File::open(path).and_then(|f| f.read_exact_at(&mut raw, at)).context(reading)?;
    let mut out = BytesMut::with_capacity(blocks as usize * BLOCK);
    for (raw, block) in raw.chunks_exact(LOG_RECORD).zip(block..) {
        let r = codec::log_record(raw).map_err(Error::from).context(reading)?;
        if r.block != block {
            let why = format!("block {} is there now, where block {block} was: is the volume still attached?", r.block);
            return Err(Error::new(ErrorKind::Corrupt, why).context(reading()));
        }
        out.extend_from_slice(r.data);
    }
    Ok(out.freeze())
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_of_logs() {
        for good in ["wal.00000000.bin", "wal.00000017.shard_03.bin", "wal.123456789.bin", "wal.00000001.shard_100.bin"]
        {
            assert!(super::is_log(good), "{good}");
        }
        for bad in [
            "wal.0.bin",
            "wal.00000000.bin.bak",
            "blocks.00000000.bin",
            "wal.00000000.shard_.bin",
            "wal.00000000.shard_3.bin",
            "wal.+0000001.bin",
        ] {
            assert!(!super::is_log(bad), "{bad}");
        }
    }
}
