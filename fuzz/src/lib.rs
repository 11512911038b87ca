//! What the fuzz targets of the program's own formats share: the identities that a reader expects, and seals.
//!
//! Nearly all bytes end at a checksum. So each target reads its input twice: as it is, and with its checksums put right, which is
//! what a bug of the writer's, or a stranger's file, would have.

use uuid::Uuid;
use vb_ublk::map::checkpoint::Ident;
use vb_ublk::units::{Nonce, Seq};
use vb_ublk::wal::codec::{LogPos, SegmentHeader, Superblock};

/// The volume whose all of it is.
pub const VOLUME: Uuid = Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);
/// The checkpoint that parts are of.
pub const CHECKPOINT: Ident = Ident { volume: VOLUME, number: 3 };
/// The volume's size.
pub const BLOCKS: u64 = 1 << 16;
/// Where records begin, as the target places them.
pub const RECORD_AT: u32 = 4096;

/// The segment in which records are.
#[must_use]
pub const fn segment() -> SegmentHeader {
    SegmentHeader {
        volume: VOLUME,
        log_id: 9,
        generation: 5,
        salt: 0x5a17,
        predecessor_end: LogPos::new(4, 8192),
        packed_through: Seq(6),
        first_seq: Seq(7),
    }
}

/// How many bytes of each 4096 the target of whole logs is given.
pub const GIVEN: usize = 256;

/// …and how many of each segment.
pub const SLOT_GIVEN: usize = 16 * GIVEN;

/// The log in which segments are.
#[must_use]
pub fn superblock() -> Superblock {
    Superblock {
        update: 2,
        volume: VOLUME,
        log_id: 9,
        segment_bytes: 1 << 20,
        max_segments: 4,
        volume_sectors: BLOCKS * 8,
        logical_block: 512,
        packed_through: Seq(6),
        confirmed: Nonce(1),
        drawn: vec![Nonce(2), Nonce(3)],
    }
}

/// Puts a CRC-32 of `seed` and `bytes` at `at`, where it counts as zero itself.
pub fn seal(bytes: &mut [u8], at: usize, seed: &[u8]) {
    let Some(place) = bytes.get_mut(at..at + 4) else { return };
    place.fill(0);
    let mut h = crc32fast::Hasher::new();
    h.update(seed);
    h.update(bytes);
    bytes[at..at + 4].copy_from_slice(&h.finalize().to_le_bytes());
}
