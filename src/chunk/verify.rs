//! Checks all that a map names of one chunk, as a read would: the header, and each block's checksum and address.
//!
//! Invariants:
//! - Nothing counts as bad that was read badly only once.
//! - Damage is a result. An error means that the store did not answer, so nothing is known of the chunk.

use bytes::Bytes;

use super::header::{ChunkHeader, HEADER_ROOM};
use super::reader::{WHOLE, good_sectors, parse_header, sectors_good};
use crate::error::{Error, ErrorKind, Result};
use crate::map::Location;
use crate::store::Store;
use crate::units::{BLOCK, BlockNo, Lba, SECTORS_PER_BLOCK};

/// Blocks that nobody names are read along in gaps of up to this many: 256 KiB cost less than one more request.
const JOIN_GAP: usize = 64;

/// Blocks that lie side by side in the volume and in a chunk.
#[derive(Debug, Clone, Copy)]
pub struct Mapped {
    /// Where the first one is.
    pub at: Location,
    /// The volume's block that it is.
    pub block: BlockNo,
    /// How many.
    pub blocks: u16,
}

impl Mapped {
    fn first(&self) -> usize {
        usize::from(self.at.index())
    }

    fn end(&self) -> usize {
        self.first() + usize::from(self.blocks)
    }

    /// What lies before the chunk's stored block `at`, and the rest.
    fn split(self, at: usize) -> (Option<Self>, Option<Self>) {
        let n = at.clamp(self.first(), self.end()) - self.first();
        let head = (n > 0).then_some(Self { blocks: n as u16, ..self });
        let tail = (n < usize::from(self.blocks)).then(|| Self {
            at: self.at.plus(n as u16),
            block: BlockNo(self.block.0 + n as u64),
            blocks: self.blocks - n as u16,
        });
        (head, tail)
    }
}

/// Why sectors cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The block is not what was packed, or sits at another address.
    Checksum,
    /// The sectors had been lost when the chunk was packed.
    Lost,
    /// The object is not there.
    Missing,
    /// The object ends before the block does.
    Cut(String),
    /// The header fails its check, or is another chunk's.
    Header(String),
    /// A newer program wrote the object.
    Newer(String),
    /// The store has the object and cannot read it.
    Unreadable(String),
}

/// Sectors that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bad {
    /// The first one.
    pub lba: Lba,
    /// How many.
    pub sectors: u64,
    /// Why.
    pub fault: Fault,
}

/// What is known of a chunk.
#[derive(Debug, Default)]
pub struct Checked {
    /// Blocks that were read and held against their checksums.
    pub blocks: u64,
    /// Bytes read for that.
    pub bytes: u64,
    /// What cannot be read, in the order of the chunk.
    pub bad: Vec<Bad>,
}

/// Checks what a map names of the chunk `key`: at least one piece, in the order of the chunk.
///
/// # Errors
/// The store's, but for an object that is missing or damaged.
pub async fn check(store: &dyn Store, key: &str, mapped: &[Mapped]) -> Result<Checked> {
    let first = check_once(store, key, mapped).await?;
    if first.bad.iter().all(|b| b.fault == Fault::Lost) {
        return Ok(first);
    }
    // A bit may have flipped on the way.
    check_once(store, key, mapped).await
}

async fn check_once(store: &dyn Store, key: &str, mapped: &[Mapped]) -> Result<Checked> {
    let mut out = Checked::default();
    let header = match read_header(store, key).await? {
        Ok(header) => header,
        Err(fault) => {
            out.all_bad(mapped, &fault);
            return Ok(out);
        }
    };
    out.bytes += HEADER_ROOM as u64;
    for part in mapped.chunk_by(|a, b| b.first() <= a.end() + JOIN_GAP) {
        check_part(store, key, &header, part, &mut out).await?;
    }
    Ok(out)
}

async fn read_header(store: &dyn Store, key: &str) -> Result<Result<ChunkHeader, Fault>> {
    let bytes = match store.get_range(key, 0..HEADER_ROOM as u64).await {
        Ok(bytes) => bytes,
        Err(e) => return fault_of(e).map(Err),
    };
    match parse_header(key, &bytes) {
        Ok(header) => Ok(Ok(header)),
        Err(e) if e.kind() == ErrorKind::Unsupported => Ok(Err(Fault::Newer(e.to_string()))),
        Err(e) => Ok(Err(Fault::Header(e.to_string()))),
    }
}

/// Reads and checks pieces that lie close together.
async fn check_part(
    store: &dyn Store,
    key: &str,
    header: &ChunkHeader,
    part: &[Mapped],
    out: &mut Checked,
) -> Result<()> {
    match read_blocks(store, key, part).await? {
        Ok(data) => out.hold(header, part, &data),
        Err(fault @ Fault::Cut(_)) => {
            // What the object still has is good for reads.
            let whole = whole_blocks(store, key).await?;
            let (have, lost): (Vec<_>, Vec<_>) = part.iter().map(|m| m.split(whole)).unzip();
            let (have, lost): (Vec<_>, Vec<_>) =
                (have.into_iter().flatten().collect(), lost.into_iter().flatten().collect());
            out.all_bad(&lost, &fault);
            if have.is_empty() {
                return Ok(());
            }
            match read_blocks(store, key, &have).await? {
                Ok(data) => out.hold(header, &have, &data),
                Err(fault) => out.all_bad(&have, &fault),
            }
        }
        Err(fault) => out.all_bad(part, &fault),
    }
    Ok(())
}

/// The stretch of the chunk that pieces span.
fn span(part: &[Mapped]) -> (usize, usize) {
    (part.first().map_or(0, Mapped::first), part.iter().map(Mapped::end).max().unwrap_or(0))
}

async fn read_blocks(store: &dyn Store, key: &str, part: &[Mapped]) -> Result<Result<Bytes, Fault>> {
    let (from, to) = span(part);
    let byte = |block: usize| (HEADER_ROOM + block * BLOCK) as u64;
    match store.get_range(key, byte(from)..byte(to)).await {
        Ok(data) => Ok(Ok(data)),
        Err(e) => fault_of(e).map(Err),
    }
}

/// How many data blocks the object has in full.
async fn whole_blocks(store: &dyn Store, key: &str) -> Result<usize> {
    let found = store.list(key, None).await.map_err(|e| e.context(format!("looking at the size of {key}")))?;
    let size = found.iter().find(|o| o.key == key).map_or(0, |o| o.size);
    Ok((size.saturating_sub(HEADER_ROOM as u64) / BLOCK as u64) as usize)
}

/// Of an object's fault and of a store's failure, only the first is damage.
fn fault_of(e: Error) -> Result<Fault> {
    match e.kind() {
        ErrorKind::NotFound => Ok(Fault::Missing),
        ErrorKind::Corrupt => Ok(Fault::Cut(e.to_string())),
        ErrorKind::Io => Ok(Fault::Unreadable(e.to_string())),
        _ => Err(e),
    }
}

impl Checked {
    /// Holds pieces against the header; `data` is what they span.
    fn hold(&mut self, header: &ChunkHeader, part: &[Mapped], data: &[u8]) {
        let (from, _) = span(part);
        self.bytes += data.len() as u64;
        for m in part {
            self.blocks += u64::from(m.blocks);
            for i in 0..usize::from(m.blocks) {
                let (n, block) = (m.first() + i, BlockNo(m.block.0 + i as u64));
                let bytes = data.get((n - from) * BLOCK..(n - from + 1) * BLOCK);
                match bytes.and_then(|bytes| good_sectors(header, n, block, bytes)) {
                    Some(WHOLE) => {}
                    Some(good) => self.lost_sectors(block, good),
                    None => self.push(block.lba(), SECTORS_PER_BLOCK, &Fault::Checksum),
                }
            }
        }
    }

    fn lost_sectors(&mut self, block: BlockNo, good: u8) {
        for s in (0..SECTORS_PER_BLOCK).filter(|s| !sectors_good(good, *s, s + 1)) {
            self.push(Lba(block.lba().0 + s), 1, &Fault::Lost);
        }
    }

    fn all_bad(&mut self, part: &[Mapped], fault: &Fault) {
        for m in part {
            self.push(m.block.lba(), u64::from(m.blocks) * SECTORS_PER_BLOCK, fault);
        }
    }

    fn push(&mut self, lba: Lba, sectors: u64, fault: &Fault) {
        match self.bad.last_mut() {
            Some(last) if last.lba.0 + last.sectors == lba.0 && last.fault == *fault => last.sectors += sectors,
            _ => self.bad.push(Bad { lba, sectors, fault: fault.clone() }),
        }
    }
}
