//! Making a log, its superblock, and its growth.

use std::io;

use uuid::Uuid;

use super::codec::{MAX_DRAWN, SUPERBLOCK_AT, Superblock};
use super::legible::read_legible;
use super::log::Geometry;
use crate::disk::{Disk, IoBuf};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::units::{BLOCK, Nonce, SECTOR, Seq};

/// The smallest log.
pub const MIN_LOG_BYTES: u64 = 64 << 20;
/// The largest log: its checksums stay in memory, 1 MiB per GiB.
pub const MAX_LOG_BYTES: u64 = 256 << 30;
const ZERO_CHUNK: usize = 1 << 20;

/// Slots for a log of `bytes`: 4 MiB to 64 MiB each, 64 of them where that fits.
///
/// # Errors
/// `Usage` when the size is out of range.
pub fn geometry_for(bytes: u64) -> Result<Geometry> {
    if !(MIN_LOG_BYTES..=MAX_LOG_BYTES).contains(&bytes) {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("a write-ahead log of {bytes} bytes: the size must be between 64M and 256G"),
        ));
    }
    let segment = (bytes / 64).next_power_of_two().clamp(4 << 20, 64 << 20);
    Ok(Geometry { segment_bytes: segment as u32, max_segments: (bytes / segment) as u32 })
}

/// The superblock on disk, and the means to change it: both copies are written in turn, each followed by a sync.
#[derive(Debug, Clone)]
pub struct SuperblockFile {
    /// What the newest copy says.
    pub current: Superblock,
}

impl SuperblockFile {
    /// Writes a first superblock (both copies).
    ///
    /// # Errors
    /// The I/O error.
    pub async fn create<D: Disk>(disk: &D, sb: Superblock) -> Result<Self> {
        let mut this = Self { current: sb };
        this.store(disk).await?;
        this.store(disk).await?;
        Ok(this)
    }

    /// Reads the newer valid copy; `None` when neither place holds anything (all zeros, or the file is shorter).
    ///
    /// # Errors
    /// `Corrupt` when there is something and no copy is valid.
    pub async fn load<D: Disk>(disk: &D, size: u64) -> Result<Option<Self>> {
        let mut best: Option<Superblock> = None;
        let mut problem = None;
        for at in SUPERBLOCK_AT {
            if size < at + BLOCK as u64 {
                continue;
            }
            let buf = IoBuf::zeroed(BLOCK);
            let bad = read_legible(disk, at, &buf).await;
            bad.context(|| format!("reading the log's superblock at byte {at}"))?;
            match Superblock::decode(buf.bytes()) {
                Ok(sb) => {
                    if best.as_ref().is_none_or(|b| b.update < sb.update) {
                        best = Some(sb);
                    }
                }
                Err(_) if buf.bytes().iter().all(|b| *b == 0) => {}
                Err(e) => problem = Some(e),
            }
        }
        match (best, problem) {
            (Some(current), _) => Ok(Some(Self { current })),
            (None, Some(e)) => {
                Err(Error::new(ErrorKind::Corrupt, "no copy of the log's superblock is valid").with_source(e))
            }
            (None, None) => Ok(None),
        }
    }

    /// Changes the superblock durably.
    ///
    /// # Errors
    /// The I/O error; the change may then be on disk or not, and is not in `current`: it counts only when it is known to be there.
    pub async fn update<D: Disk>(&mut self, disk: &D, change: impl FnOnce(&mut Superblock)) -> Result<()> {
        let mut next = Self { current: self.current.clone() };
        change(&mut next.current);
        next.store(disk).await?;
        *self = next;
        Ok(())
    }

    /// Adds a fresh nonce, durably, before it is shown to the store.
    ///
    /// # Errors
    /// `Full` when too many attachments in a row were never confirmed, else the I/O error.
    pub async fn draw<D: Disk>(&mut self, disk: &D, nonce: Nonce) -> Result<()> {
        if self.current.drawn.len() >= MAX_DRAWN {
            return Err(Error::new(
                ErrorKind::Full,
                format!(
                    "the log's superblock holds {MAX_DRAWN} attachments that never reached the store: attach once with the store in reach"
                ),
            ));
        }
        self.update(disk, |s| s.drawn.push(nonce)).await
    }

    /// Notes the volume's size, durably.
    ///
    /// # Errors
    /// The I/O error.
    pub async fn set_size<D: Disk>(&mut self, disk: &D, size_bytes: u64) -> Result<()> {
        let sectors = size_bytes / SECTOR as u64;
        if self.current.volume_sectors == sectors {
            return Ok(());
        }
        self.update(disk, |s| s.volume_sectors = sectors).await
    }

    /// Advances the packed mark, durably.
    ///
    /// # Errors
    /// The I/O error.
    pub async fn packed<D: Disk>(&mut self, disk: &D, through: Seq) -> Result<()> {
        self.update(disk, |s| s.packed_through = s.packed_through.max(through)).await
    }

    async fn store<D: Disk>(&mut self, disk: &D) -> Result<()> {
        self.current.update += 1;
        let at = SUPERBLOCK_AT[(self.current.update % 2) as usize];
        let block = IoBuf::zeroed(BLOCK);
        block.copy_in(0, &self.current.encode());
        disk.writev_at(at, vec![block], false)
            .await
            .context(|| format!("writing the log's superblock at byte {at}"))?;
        disk.sync().await.context(|| "syncing the log's superblock".to_owned())
    }
}

/// A superblock for a new log.
#[must_use]
pub fn new_superblock(
    volume: Uuid,
    log_id: u64,
    geometry: Geometry,
    volume_sectors: u64,
    logical_block: u32,
) -> Superblock {
    Superblock {
        update: 0,
        volume,
        log_id,
        segment_bytes: geometry.segment_bytes,
        max_segments: geometry.max_segments,
        volume_sectors,
        logical_block,
        packed_through: Seq(0),
        confirmed: Nonce(0),
        drawn: Vec::new(),
    }
}

/// Writes zeros over a slot. Once that is synced, a later sync of records in it carries no metadata.
///
/// # Errors
/// The I/O error; `Full` when the disk has no room.
pub async fn zero_slot<D: Disk>(disk: &D, geometry: &Geometry, slot: u32) -> Result<()> {
    let (start, bytes) = (geometry.slot_offset(slot), u64::from(geometry.segment_bytes));
    write_zeros(disk, start, bytes).await.context(|| format!("growing the log to {} bytes", start + bytes))
}

/// Writes `bytes` zeros from byte `from` on, both multiples of 4096.
///
/// # Errors
/// The I/O error.
pub async fn write_zeros<D: Disk>(disk: &D, from: u64, bytes: u64) -> io::Result<()> {
    let zeros = IoBuf::zeroed(bytes.min(ZERO_CHUNK as u64) as usize);
    let mut at = from;
    while at < from + bytes {
        let n = (from + bytes - at).min(ZERO_CHUNK as u64);
        disk.writev_at(at, vec![zeros.slice(0..n as usize)], false).await?;
        at += n;
    }
    Ok(())
}
