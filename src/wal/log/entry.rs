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

/// The slots that a log's file has room for.
#[derive(Debug, Clone, Copy)]
pub(in crate::wal) struct FileSlots {
    /// How many are there whole.
    pub(in crate::wal) whole: u32,
    /// Bytes of the one after them, in which the file ends; 0: not to be looked at.
    cut_bytes: u32,
}

impl FileSlots {
    /// The whole ones of a file of `size` bytes: a log that was growing may end in the middle of a slot.
    pub(in crate::wal) fn whole(geometry: &Geometry, size: u64) -> Self {
        let room = size.saturating_sub(SLOTS_START) / u64::from(geometry.segment_bytes);
        Self { whole: room.min(u64::from(geometry.max_segments)) as u32, cut_bytes: 0 }
    }

    /// Also what is left of the one in which the file ends, if that is enough to hold a segment.
    pub(in crate::wal) fn with_cut(geometry: &Geometry, size: u64) -> Self {
        let slots = Self::whole(geometry, size);
        let left = size.saturating_sub(geometry.slot_offset(slots.whole)) / BLOCK as u64 * BLOCK as u64;
        let holds_a_segment = slots.whole < geometry.max_segments && left >= 2 * BLOCK as u64;
        Self { cut_bytes: if holds_a_segment { left as u32 } else { 0 }, ..slots }
    }

    /// Slots to look at.
    pub(in crate::wal) fn count(&self) -> u32 {
        self.whole + u32::from(self.cut_bytes > 0)
    }

    /// `limit`, or the file's end if that comes before it.
    pub(in crate::wal) fn clip(&self, slot: u32, limit: u32) -> u32 {
        if slot < self.whole { limit } else { limit.min(self.cut_bytes) }
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
    /// For data: the byte of the log file at which it begins.
    #[must_use]
    pub const fn data_byte(&self) -> u64 {
        self.file_block as u64 * BLOCK as u64
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_may_end_in_a_slot() {
        let g = Geometry { segment_bytes: 1 << 20, max_segments: 3 };
        let of = |size: u64| {
            let s = FileSlots::with_cut(&g, size);
            (s.whole, s.cut_bytes, s.count(), s.clip(s.whole, 1 << 20))
        };
        assert_eq!((of(0), of(SLOTS_START)), ((0, 0, 0, 0), (0, 0, 0, 0)));
        assert_eq!(of(SLOTS_START + 8191), (0, 0, 0, 0));
        assert_eq!(of(SLOTS_START + (1 << 20) + 12345), (1, 12288, 2, 12288));
        assert_eq!(of(SLOTS_START + (9 << 20) + 12345), (3, 0, 3, 0));
        assert_eq!(FileSlots::whole(&g, SLOTS_START + (1 << 20) + 12345).count(), 1);
        assert_eq!(FileSlots::with_cut(&g, SLOTS_START + (1 << 20) + 12345).clip(0, 1 << 20), 1 << 20);
    }
}
