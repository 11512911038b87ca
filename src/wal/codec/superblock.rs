//! The superblock: what must survive every segment.

use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{CodecError, Head, Kind, seal};
use crate::units::{BLOCK, Nonce, Seq};

/// Most nonces a superblock can hold as drawn and not yet confirmed.
pub const MAX_DRAWN: usize = 400;

const KIND: Kind = Kind { magic: *b"VBWS", what: "log superblock" };

/// The log's own identity and what must survive every segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Counts the updates; the copy with the higher one counts.
    pub update: u64,
    /// The volume.
    pub volume: Uuid,
    /// This log's own random number: segments of an earlier log in the same place bear another.
    pub log_id: u64,
    /// Bytes in a slot.
    pub segment_bytes: u32,
    /// The most slots this log may grow to.
    pub max_segments: u32,
    /// Size of the volume, for a recovery without the store.
    pub volume_sectors: u64,
    /// Logical block size of the volume.
    pub logical_block: u32,
    /// Everything up to here is in the store and in the map: the log's room below is free.
    pub packed_through: Seq,
    /// The nonce of the last attachment that the manifest was seen to carry.
    pub confirmed: Nonce,
    /// The nonces drawn since; one of them may be in the manifest.
    pub drawn: Vec<Nonce>,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSuper {
    head: Head,
    segment_bytes: U32,
    max_segments: U32,
    logical_block: U32,
    update: U64,
    volume: [u8; 16],
    log_id: U64,
    volume_sectors: U64,
    packed_through: U64,
    confirmed: U64,
    drawn_count: U32,
    reserved: U32,
    drawn: [U64; MAX_DRAWN],
}

impl Superblock {
    /// One block.
    ///
    /// # Panics
    /// When more than [`MAX_DRAWN`] nonces are held: the caller refuses to draw before that.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.drawn.len() <= MAX_DRAWN, "too many unconfirmed nonces for a superblock");
        let mut drawn = [U64::ZERO; MAX_DRAWN];
        for (slot, n) in drawn.iter_mut().zip(&self.drawn) {
            *slot = n.0.into();
        }
        let raw = RawSuper {
            head: KIND.head(),
            segment_bytes: self.segment_bytes.into(),
            max_segments: self.max_segments.into(),
            logical_block: self.logical_block.into(),
            update: self.update.into(),
            volume: *self.volume.as_bytes(),
            log_id: self.log_id.into(),
            volume_sectors: self.volume_sectors.into(),
            packed_through: self.packed_through.0.into(),
            confirmed: self.confirmed.0.into(),
            drawn_count: (self.drawn.len() as u32).into(),
            reserved: 0.into(),
            drawn,
        };
        let mut out = raw.as_bytes().to_vec();
        out.resize(BLOCK, 0);
        seal(&[], &mut out);
        out
    }

    /// Reads one copy.
    ///
    /// # Errors
    /// When it is not a superblock of this version, or damaged.
    pub fn decode(block: &[u8]) -> Result<Self, CodecError> {
        let raw: &RawSuper = KIND.open_block(block)?;
        let drawn = raw.drawn.get(..raw.drawn_count.get() as usize).ok_or(KIND.field("nonce count"))?;
        let segment_bytes = raw.segment_bytes.get();
        if !segment_bytes.is_power_of_two() || !(1 << 20..=1 << 30).contains(&segment_bytes) {
            return Err(KIND.field("segment size"));
        }
        Ok(Self {
            update: KIND.counted(raw.update.get())?,
            volume: Uuid::from_bytes(raw.volume),
            log_id: raw.log_id.get(),
            segment_bytes,
            max_segments: raw.max_segments.get(),
            volume_sectors: raw.volume_sectors.get(),
            logical_block: raw.logical_block.get(),
            packed_through: Seq(KIND.counted(raw.packed_through.get())?),
            confirmed: Nonce(raw.confirmed.get()),
            drawn: drawn.iter().map(|n| Nonce(n.get())).collect(),
        })
    }
}
