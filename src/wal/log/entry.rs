//! Sizes of a log, and the entries of a completed one: plain values.

use crate::units::{BLOCK, Lba, Seq};
use crate::wal::codec::{RecordEntry, RecordKind, SLOTS_START};

/// Sizes of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes in a slot.
    pub segment_bytes: u32,
    /// The most slots.
    pub max_segments: u32,
}

impl Geometry {
    /// Where a slot begins in the file.
    #[must_use]
    pub const fn slot_offset(&self, slot: u32) -> u64 {
        SLOTS_START + slot as u64 * self.segment_bytes as u64
    }
    /// The slot that holds a 4096-byte block of the file.
    #[must_use]
    pub const fn slot_of(&self, file_block: u32) -> u32 {
        ((file_block as u64 * BLOCK as u64 - SLOTS_START) / self.segment_bytes as u64) as u32
    }
    /// Bytes of all slots together.
    #[must_use]
    pub const fn capacity(&self) -> u64 {
        self.segment_bytes as u64 * self.max_segments as u64
    }
    /// The largest record: any segment has room for it.
    #[must_use]
    pub const fn max_record(&self) -> u32 {
        self.segment_bytes - BLOCK as u32
    }
}

/// An entry of the completed log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogEntry {
    /// Its number.
    pub seq: Seq,
    /// First sector.
    pub lba: Lba,
    /// Sectors.
    pub sectors: u64,
    /// For data: the 4096-byte block of the log file that holds the first stored block.
    pub file_block: u32,
    /// What it does.
    pub kind: RecordKind,
}

impl LogEntry {
    /// The entry without its place.
    #[must_use]
    pub const fn record(&self) -> RecordEntry {
        RecordEntry { lba: self.lba, sectors: self.sectors, kind: self.kind }
    }
    /// Sizes this entry adds to the log's data.
    #[must_use]
    pub const fn stored_bytes(&self) -> u64 {
        self.record().stored_blocks() * BLOCK as u64
    }
}

/// Numbers the entries of a record and places its data: `first_block` is the file block after its header.
pub fn number_entries(
    entries: &[RecordEntry],
    first_seq: Seq,
    first_block: u32,
) -> impl Iterator<Item = LogEntry> + use<'_> {
    let mut block = first_block;
    entries.iter().enumerate().map(move |(i, e)| {
        let file_block = block;
        block += e.stored_blocks() as u32;
        LogEntry { seq: Seq(first_seq.0 + i as u64), lba: e.lba, sectors: e.sectors, file_block, kind: e.kind }
    })
}
