//! The header of a segment: which life of its slot this is, and where the log came from.

use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{CodecError, Head, Kind, LogPos, seal};
use crate::units::Seq;

const KIND: Kind = Kind { magic: *b"VBWG", what: "log segment header" };

/// The head of a segment: written together with its first record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The volume.
    pub volume: Uuid,
    /// The log's random number, as in the superblock.
    pub log_id: u64,
    /// Counts segments; later ones are newer.
    pub generation: u32,
    /// Random; all record checksums of this life of the slot cover it.
    pub salt: u64,
    /// The exact end of the log before this segment (generation 0: there was none).
    pub predecessor_end: LogPos,
    /// Everything up to here was in the store when the segment was opened.
    pub packed_through: Seq,
    /// The number of the first entry that may be in here.
    pub first_seq: Seq,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSegment {
    head: Head,
    generation: U32,
    volume: [u8; 16],
    log_id: U64,
    salt: U64,
    predecessor_end: U64,
    packed_through: U64,
    first_seq: U64,
}

impl SegmentHeader {
    /// Writes the header into a zeroed block.
    pub fn encode_into(&self, block: &mut [u8]) {
        let raw = RawSegment {
            head: KIND.head(),
            generation: self.generation.into(),
            volume: *self.volume.as_bytes(),
            log_id: self.log_id.into(),
            salt: self.salt.into(),
            predecessor_end: self.predecessor_end.0.into(),
            packed_through: self.packed_through.0.into(),
            first_seq: self.first_seq.0.into(),
        };
        block[..size_of::<RawSegment>()].copy_from_slice(raw.as_bytes());
        seal(&[], block);
    }

    /// Whether a slot's first block was once a segment header, damaged or not. A header's fields are within one sector,
    /// so a torn write leaves the old block or the new one, never this and an error of [`Self::decode`].
    #[must_use]
    pub fn was_here(block: &[u8]) -> bool {
        block.starts_with(&KIND.magic)
    }

    /// Reads a slot's first block.
    ///
    /// # Errors
    /// When the slot holds no segment of this version, or its header is damaged.
    pub fn decode(block: &[u8]) -> Result<Self, CodecError> {
        let raw: &RawSegment = KIND.open_block(block)?;
        if raw.generation.get() == u32::MAX {
            return Err(KIND.field("counter"));
        }
        Ok(Self {
            volume: Uuid::from_bytes(raw.volume),
            log_id: raw.log_id.get(),
            generation: raw.generation.get(),
            salt: raw.salt.get(),
            predecessor_end: LogPos(raw.predecessor_end.get()),
            packed_through: Seq(KIND.counted(raw.packed_through.get())?),
            first_seq: Seq(KIND.counted(raw.first_seq.get())?),
        })
    }
}
