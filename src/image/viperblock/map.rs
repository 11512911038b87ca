//! Where each block of the image is: layers laid over one another, then runs to be read at one go.
//!
//! Invariants:
//! - Entries are in the order of their blocks, one for each.
//! - A run lies whole in its object: what a map says is held against the objects' sizes before anything is read.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::chain::chunk_key;
use super::codec::{CHUNK_HEAD, LOG_RECORD, MapRecord};
use crate::error::{Error, ErrorKind, Result};
use crate::units::BLOCK;

/// The longest run, in blocks: 4 MiB, a chunk of Viperblock's.
const RUN_BLOCKS: u32 = 1024;

/// What blocks are read from.
#[derive(Debug)]
pub(super) enum Origin {
    /// A volume's chunks: number and size in bytes of each that there is.
    Chunks { volume: String, sizes: BTreeMap<u64, u64> },
    /// A local log.
    Log(PathBuf),
}

/// Where one block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) block: u64,
    /// The chunk's number; 0 in a log.
    pub(super) object: u64,
    /// In a chunk as the map counts it, with a header; in a log the record's first byte.
    pub(super) offset: u64,
    /// Index among the origins.
    pub(super) origin: usize,
}

/// Consecutive blocks that lie one behind the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) block: u64,
    pub(super) blocks: u32,
    pub(super) object: u64,
    /// Where the first block (in a log: its record) begins in the object, in bytes.
    pub(super) at: u64,
    /// Whether the object begins with a header that can be checked.
    pub(super) header: bool,
    pub(super) origin: usize,
}

impl Run {
    /// The block after the last one.
    pub(super) const fn end(&self) -> u64 {
        self.block + self.blocks as u64
    }
}

/// One record for each block, in order: that of the highest seq, of equal ones (there is none in old maps) the last.
pub(super) fn newest(mut records: Vec<MapRecord>) -> Vec<MapRecord> {
    records.reverse();
    // Stable: of equal ones, what was last in the file is now first.
    records.sort_by_key(|r| (r.block, std::cmp::Reverse(r.seq)));
    records.dedup_by_key(|r| r.block);
    records
}

/// What `upper` has, and of `lower` what it has not.
pub(super) fn lay_over(upper: &[Entry], lower: &[Entry]) -> Vec<Entry> {
    let mut out = Vec::with_capacity(upper.len().max(lower.len()));
    let mut below = lower.iter().peekable();
    for e in upper {
        while let Some(l) = below.next_if(|l| l.block < e.block) {
            out.push(*l);
        }
        let _ = below.next_if(|l| l.block == e.block);
        out.push(*e);
    }
    out.extend(below);
    out
}

/// The size of a chunk that is neither whole blocks nor whole blocks behind a header, if one of `entries` is in such.
pub(super) fn first_odd(entries: &[Entry], origins: &[Origin]) -> Option<(String, u64)> {
    entries.iter().find_map(|e| match origins.get(e.origin)? {
        Origin::Chunks { volume, sizes } => {
            let size = *sizes.get(&e.object)?;
            head_bytes(size).is_none().then(|| (chunk_key(volume, e.object), size))
        }
        Origin::Log(_) => None,
    })
}

/// The runs of `entries`, each held against its chunk's size.
///
/// # Errors
/// `Corrupt` for a chunk that is not there or of an impossible size, and for a place outside of it.
pub(super) fn runs(entries: &[Entry], origins: &[Origin]) -> Result<Vec<Run>> {
    let mut out: Vec<Run> = Vec::new();
    for e in entries {
        let (at, header, stride) = match origins.get(e.origin) {
            Some(Origin::Chunks { volume, sizes }) => {
                let (at, header) = place(e, volume, sizes)?;
                (at, header, BLOCK)
            }
            _ => (e.offset, false, LOG_RECORD),
        };
        match out.last_mut() {
            Some(r)
                if r.end() == e.block
                    && (r.origin, r.object) == (e.origin, e.object)
                    && r.at + u64::from(r.blocks) * stride as u64 == at
                    && r.blocks < RUN_BLOCKS =>
            {
                r.blocks += 1;
            }
            _ => out.push(Run { block: e.block, blocks: 1, object: e.object, at, header, origin: e.origin }),
        }
    }
    out.shrink_to_fit();
    Ok(out)
}

/// The bytes before the first block of a chunk of this size. Offsets in maps count a header always; objects that were
/// written to S3 before 2026-01-25 have none.
const fn head_bytes(size: u64) -> Option<u64> {
    const HEAD: u64 = CHUNK_HEAD as u64;
    match size % BLOCK as u64 {
        HEAD => Some(HEAD),
        0 => Some(0),
        _ => None,
    }
}

/// Where an entry's block begins in its chunk, and whether the chunk has a header.
fn place(e: &Entry, volume: &str, sizes: &BTreeMap<u64, u64>) -> Result<(u64, bool)> {
    let corrupt = |why: String| {
        let key = chunk_key(volume, e.object);
        Error::new(ErrorKind::Corrupt, format!("block {} should be at byte {} of {key}: {why}", e.block, e.offset))
    };
    let size = *sizes.get(&e.object).ok_or_else(|| {
        corrupt("there is no such chunk; restore it, or import a snapshot that does not need it".into())
    })?;
    let head = head_bytes(size).ok_or_else(|| {
        corrupt(format!("the chunk has {size} bytes, which is not whole blocks, with a header of 10 bytes or without: it is cut short"))
    })?;
    let data = e.offset.checked_sub(CHUNK_HEAD as u64).filter(|d| d.is_multiple_of(BLOCK as u64));
    let at = data.ok_or_else(|| corrupt("no block begins there; the map is damaged".into()))? + head;
    if at + BLOCK as u64 > size {
        return Err(corrupt(format!("the chunk has only {size} bytes; it is cut short, or the map is damaged")));
    }
    Ok((at, head > 0))
}

#[cfg(test)]
mod tests {
    use super::{Entry, MapRecord, Origin, lay_over, newest, runs};
    use crate::error::ErrorKind;

    fn entry(block: u64, offset: u64) -> Entry {
        Entry { block, object: 7, offset, origin: 0 }
    }

    fn chunks(size: u64) -> [Origin; 1] {
        [Origin::Chunks { volume: "v".into(), sizes: [(7, size)].into() }]
    }

    #[test]
    fn the_highest_seq_counts_and_of_equal_ones_the_last() {
        let of = |block, chunk, seq| MapRecord { block, chunk, offset: 10, seq };
        let got = newest(vec![of(5, 1, 0), of(2, 2, 9), of(2, 3, 8), of(5, 4, 0), of(2, 5, 9)]);
        assert_eq!(got, [of(2, 5, 9), of(5, 4, 0)]);
    }

    #[test]
    fn the_upper_layer_hides_the_lower_one() {
        let upper = [entry(2, 10), entry(5, 10)];
        let lower = [entry(1, 0), entry(2, 0), entry(3, 0), entry(5, 0), entry(9, 0)];
        let got: Vec<_> = lay_over(&upper, &lower).iter().map(|e| (e.block, e.offset)).collect();
        assert_eq!(got, [(1, 0), (2, 10), (3, 0), (5, 10), (9, 0)]);
    }

    #[test]
    fn runs_are_what_lies_together_with_and_without_a_header() {
        let entries = [entry(1, 10), entry(2, 4106), entry(3, 12298), entry(5, 16394), entry(6, 8202)];
        for (size, head) in [(5 * 4096 + 10, 10), (5 * 4096, 0)] {
            let got = runs(&entries, &chunks(size)).expect("sound");
            let got: Vec<_> = got.iter().map(|r| (r.block, r.blocks, r.at, r.header)).collect();
            let h = head > 0;
            assert_eq!(
                got,
                [(1, 2, head, h), (3, 1, 12288 + head, h), (5, 1, 16384 + head, h), (6, 1, 8192 + head, h)]
            );
        }
        let many: Vec<_> = (0..3000).map(|n| entry(n, 10 + n * 4096)).collect();
        let got = runs(&many, &chunks(3000 * 4096)).expect("sound");
        assert_eq!(got.iter().map(|r| r.blocks).collect::<Vec<_>>(), [1024, 1024, 952]);
    }

    #[test]
    fn places_outside_of_chunks_are_damage() {
        for (offset, size) in [
            (0, 8192),
            (9, 8192),
            (11, 8192),
            (4096, 8202),
            (8202, 8192),
            (8202, 8202),
            (10, 0),
            (10, 10),
            (10, 4095),
            (10, 4097),
            (u64::from(u32::MAX), 8192),
        ] {
            let e = runs(&[entry(1, offset)], &chunks(size)).expect_err("outside");
            assert_eq!(e.kind(), ErrorKind::Corrupt);
            assert!(e.to_string().contains("chunk.00000007.bin"), "{e}");
        }
        assert!(runs(&[Entry { object: 8, ..entry(1, 10) }], &chunks(8192)).is_err());
    }
}
