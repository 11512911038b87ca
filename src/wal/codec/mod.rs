//! The log's bytes. All integers little-endian. Byte tables: `docs/FORMAT.md`.
//!
//! ```text
//! 0            superblock A      (one 4096-byte block; the newer valid copy counts)
//! 64 KiB       superblock B
//! 1 MiB        slot 0: segment header (4096), record, record, …
//! 1 MiB + S    slot 1 …          (S = segment_bytes)
//! ```
//!
//! A record is a header (entries, then a checksum per stored block; padded to 4096) and its stored
//! blocks. A record's header checksum covers the slot's salt, so bytes that a guest once wrote, or a
//! record of the slot's earlier life, cannot imitate one. It covers nothing of the predecessor's
//! content, so a header verifies even past a gap.

mod record;
mod segment;
mod superblock;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub use record::{
    ENTRY_BYTES, MAX_HEADER_BYTES, Placement, RECORD_FIXED, RecordEntry, RecordHeader, RecordKind, claimed_generation,
    decode_record, header_bytes, peek_record, place_record, prepare_record,
};
pub use segment::SegmentHeader;
pub use superblock::{MAX_DRAWN, Superblock};

use crate::checksum::crc_around;
use crate::units::BLOCK;

/// Where the slots begin.
pub const SLOTS_START: u64 = 1 << 20;
/// Where the superblock's two copies are.
pub const SUPERBLOCK_AT: [u64; 2] = [0, 64 << 10];
/// Format version of all three structures.
pub const VERSION: u16 = 1;

/// A position in the log, in the order in which it is written: generation of the segment, then offset in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash)]
pub struct LogPos(pub u64);

impl LogPos {
    /// Offset `offset` (bytes from the slot's start) in the segment of `generation`.
    #[must_use]
    pub const fn new(generation: u32, offset: u32) -> Self {
        Self((generation as u64) << 32 | offset as u64)
    }
    /// The segment's generation.
    #[must_use]
    pub const fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
    /// Bytes from the slot's start.
    #[must_use]
    pub const fn offset(self) -> u32 {
        self.0 as u32
    }
}

impl std::fmt::Display for LogPos {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "generation {} offset {}", self.generation(), self.offset())
    }
}

/// Why bytes are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// Not this kind of structure at all.
    #[error("no {0} here (wrong magic)")]
    Magic(&'static str),
    /// Made by another version of the program.
    #[error("the {0} has format version {1}; this program reads version {VERSION}: use the version that wrote it")]
    Version(&'static str, u16),
    /// The checksum does not match.
    #[error("the {0}'s checksum does not match")]
    Checksum(&'static str),
    /// A field makes no sense.
    #[error("the {0} is malformed: {1}")]
    Field(&'static str, &'static str),
}

/// What all three structures begin with.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    magic: [u8; 4],
    version: U16,
    flags: U16,
    crc: U32,
}

const CRC_AT: usize = std::mem::offset_of!(Head, crc);

/// CRC over a structure with its `crc` field taken as zero.
fn crc_of(seed: &[u8], bytes: &[u8]) -> u32 {
    crc_around(seed, bytes, CRC_AT)
}

/// Writes the checksum over all of a structure that is otherwise complete.
fn seal(seed: &[u8], bytes: &mut [u8]) {
    let crc = crc_of(seed, bytes);
    bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
}

/// One of the three structures.
struct Kind {
    magic: [u8; 4],
    /// What messages call it.
    what: &'static str,
}

impl Kind {
    /// A head whose checksum is still to come.
    fn head(&self) -> Head {
        Head { magic: self.magic, version: VERSION.into(), flags: 0.into(), crc: 0.into() }
    }

    const fn field(&self, why: &'static str) -> CodecError {
        CodecError::Field(self.what, why)
    }

    /// What counts up: nothing comes near its end by counting, so that who adds to it need not look.
    fn counted(&self, raw: u64) -> Result<u64, CodecError> {
        if raw < 1 << 62 { Ok(raw) } else { Err(self.field("counter")) }
    }

    /// The structure at the start of `bytes`, by its magic number alone, and what follows it. `T` begins with a [`Head`].
    fn peek<'a, T>(&self, bytes: &'a [u8]) -> Result<(&'a T, &'a [u8]), CodecError>
    where
        T: FromBytes + KnownLayout + Immutable + Unaligned,
    {
        let (raw, rest) = T::ref_from_prefix(bytes).map_err(|_| self.field("too short"))?;
        if bytes.starts_with(&self.magic) { Ok((raw, rest)) } else { Err(CodecError::Magic(self.what)) }
    }

    /// Whether `bytes`, all that the checksum covers, are intact and of this version. The checksum comes first: a
    /// version in damaged bytes says nothing.
    fn verify(&self, seed: &[u8], bytes: &[u8]) -> Result<(), CodecError> {
        let (head, _) = self.peek::<Head>(bytes)?;
        if crc_of(seed, bytes) != head.crc.get() {
            return Err(CodecError::Checksum(self.what));
        }
        if head.version.get() != VERSION || head.flags.get() != 0 {
            return Err(CodecError::Version(self.what, head.version.get()));
        }
        Ok(())
    }

    /// A verified structure that has a whole block for itself.
    fn open_block<'a, T>(&self, block: &'a [u8]) -> Result<&'a T, CodecError>
    where
        T: FromBytes + KnownLayout + Immutable + Unaligned,
    {
        let (raw, _) = self.peek(block)?;
        if block.len() != BLOCK {
            return Err(CodecError::Checksum(self.what));
        }
        self.verify(&[], block)?;
        Ok(raw)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::units::{Lba, Nonce, Seq};

    fn segment() -> SegmentHeader {
        SegmentHeader {
            volume: Uuid::from_u128(7),
            log_id: 0x0a0b_0c0d,
            generation: 3,
            salt: 0x1122_3344_5566_7788,
            predecessor_end: LogPos::new(2, 8192),
            packed_through: Seq(40),
            first_seq: Seq(41),
        }
    }

    fn superblock() -> Superblock {
        Superblock {
            update: 9,
            volume: Uuid::from_u128(7),
            log_id: 0x0a0b_0c0d,
            segment_bytes: 16 << 20,
            max_segments: 64,
            volume_sectors: 1 << 21,
            logical_block: 512,
            packed_through: Seq(12),
            confirmed: Nonce(0xabcd),
            drawn: vec![Nonce(1), Nonce(2)],
        }
    }

    fn record(entries: &[RecordEntry]) -> Vec<u8> {
        let blocks: u64 = entries.iter().map(RecordEntry::stored_blocks).sum();
        let crcs: Vec<u32> = (0..blocks as u32).collect();
        let mut h = vec![0; header_bytes(entries.len(), crcs.len())];
        prepare_record(&mut h, Uuid::from_u128(7), entries, &crcs);
        let place = Placement {
            generation: 3,
            salt: segment().salt,
            offset: 4096,
            predecessor: 0,
            first_seq: Seq(41),
            durable: LogPos::new(2, 4096),
        };
        place_record(&mut h, &place);
        h
    }

    fn data(lba: u64, sectors: u64) -> RecordEntry {
        RecordEntry { lba: Lba(lba), sectors, kind: RecordKind::Data }
    }

    #[test]
    fn golden_bytes() {
        assert_eq!(RECORD_FIXED, 72);
        assert_eq!(ENTRY_BYTES, 24);
        let s = superblock().encode();
        assert_eq!(&s[..8], b"VBWS\x01\x00\x00\x00");
        assert_eq!(u32::from_le_bytes(s[12..16].try_into().unwrap()), 16 << 20);
        let mut g = vec![0; BLOCK];
        segment().encode_into(&mut g);
        assert_eq!(
            &g[..80],
            &[
                b'V', b'B', b'W', b'G', 1, 0, 0, 0, g[8], g[9], g[10], g[11], 3, 0, 0, 0, // head
                0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, // volume
                0x0d, 0x0c, 0x0b, 0x0a, 0, 0, 0, 0, // log
                0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, // salt
                0, 32, 0, 0, 2, 0, 0, 0, // predecessor's end
                40, 0, 0, 0, 0, 0, 0, 0, 41, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
            ][..80]
        );
        let r = record(&[data(1, 8), RecordEntry { lba: Lba(64), sectors: 16, kind: RecordKind::Discard }]);
        // Header checksums pinned: a change of layout shows here.
        let crcs = [&s, &g, &r].map(|b| u32::from_le_bytes(b[8..12].try_into().unwrap()));
        assert_eq!(crcs, GOLDEN_CRCS, "{crcs:#x?}");
        assert_eq!(&r[RECORD_FIXED..RECORD_FIXED + 17], &[1, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 1]);
    }

    const GOLDEN_CRCS: [u32; 3] = [0xa5d6_082b, 0x96b2_53f0, 0x11fb_2428];

    #[test]
    fn a_record_of_another_place_or_life_is_refused() {
        let r = record(&[data(0, 8)]);
        assert!(decode_record(&r, &segment(), 4096).is_ok());
        assert!(decode_record(&r, &segment(), 8192).is_err());
        assert!(decode_record(&r, &SegmentHeader { salt: 1, ..segment() }, 4096).is_err());
        assert!(decode_record(&r, &SegmentHeader { generation: 4, ..segment() }, 4096).is_err());
        assert!(decode_record(&r, &SegmentHeader { volume: Uuid::from_u128(8), ..segment() }, 4096).is_err());
    }

    #[test]
    fn every_flipped_byte_is_found() {
        let mut g = vec![0; BLOCK];
        segment().encode_into(&mut g);
        let s = superblock().encode();
        let r = record(&[data(3, 20)]);
        for i in 0..BLOCK {
            let flip = |b: &[u8]| {
                let mut b = b.to_vec();
                b[i] ^= 0x40;
                b
            };
            assert!(Superblock::decode(&flip(&s)).is_err(), "superblock byte {i}");
            assert!(SegmentHeader::decode(&flip(&g)).is_err(), "segment byte {i}");
            assert!(decode_record(&flip(&r), &segment(), 4096).is_err(), "record byte {i}");
        }
    }

    proptest! {
        #[test]
        fn decode_undoes_encode(list in proptest::collection::vec((0u64..1 << 40, 1u64..300, 1u8..4), 0..60)) {
            let entries: Vec<_> = list.iter().map(|&(lba, sectors, k)| RecordEntry {
                lba: Lba(lba), sectors,
                kind: [RecordKind::Data, RecordKind::Discard, RecordKind::Zeroes][usize::from(k) - 1],
            }).collect();
            let bytes = record(&entries);
            let back = decode_record(&bytes, &segment(), 4096).unwrap();
            prop_assert_eq!(back.entries, entries);
            prop_assert_eq!(back.crcs.len() * BLOCK + back.header_bytes as usize, back.record_bytes as usize);
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
            let _ = Superblock::decode(&bytes);
            let _ = SegmentHeader::decode(&bytes);
            let _ = decode_record(&bytes, &segment(), 4096);
        }
    }

    /// Found by fuzzing: a sealed header whose next entry, or next segment, would have no number.
    #[test]
    fn counters_at_their_end_are_refused() {
        let last = Seq(u64::MAX);
        for s in [
            SegmentHeader { first_seq: last, ..segment() },
            SegmentHeader { packed_through: last, ..segment() },
            SegmentHeader { generation: u32::MAX, ..segment() },
        ] {
            let mut block = vec![0; BLOCK];
            s.encode_into(&mut block);
            assert!(matches!(SegmentHeader::decode(&block), Err(CodecError::Field(_, "counter"))), "{s:?}");
        }
        for s in [Superblock { packed_through: last, ..superblock() }, Superblock { update: u64::MAX, ..superblock() }]
        {
            assert!(matches!(Superblock::decode(&s.encode()), Err(CodecError::Field(_, "counter"))), "{s:?}");
        }
        let mut r = record(&[data(0, 8)]);
        let s = segment();
        let durable = LogPos::new(1, 0);
        let (generation, salt) = (s.generation, s.salt);
        place_record(&mut r, &Placement { generation, salt, offset: 4096, predecessor: 0, first_seq: last, durable });
        assert!(matches!(decode_record(&r, &s, 4096), Err(CodecError::Field(_, "counter"))));
    }

    #[test]
    fn a_superblock_comes_back() {
        assert_eq!(Superblock::decode(&superblock().encode()).unwrap(), superblock());
    }
}
