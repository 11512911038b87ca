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

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::units::{BLOCK, Lba, Nonce, SECTORS_PER_BLOCK, Seq};

/// Where the slots begin.
pub const SLOTS_START: u64 = 1 << 20;
/// Where the superblock's two copies are.
pub const SUPERBLOCK_AT: [u64; 2] = [0, 64 << 10];
/// Format version of all three structures.
pub const VERSION: u16 = 1;
/// Most nonces a superblock can hold as drawn and not yet confirmed.
pub const MAX_DRAWN: usize = 400;

const SUPER_MAGIC: [u8; 4] = *b"VBWS";
const SEGMENT_MAGIC: [u8; 4] = *b"VBWG";
const RECORD_MAGIC: [u8; 4] = *b"VBWR";

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
    magic: [u8; 4],
    version: U16,
    flags: U16,
    crc: U32,
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

fn crc_of(seed: &[u8], parts: &[&[u8]]) -> u32 {
    let mut h = crc32fast::Hasher::new();
    h.update(seed);
    for p in parts {
        h.update(p);
    }
    h.finalize()
}

/// CRC over a structure whose `crc` field sits at `at`, with that field taken as zero.
fn crc_without(seed: &[u8], bytes: &[u8], at: usize) -> u32 {
    crc_of(seed, &[&bytes[..at], &[0; 4], &bytes[at + 4..]])
}

const SUPER_CRC_AT: usize = 8;

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
            magic: SUPER_MAGIC,
            version: VERSION.into(),
            flags: 0.into(),
            crc: 0.into(),
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
        let crc = crc_without(&[], &out, SUPER_CRC_AT);
        out[SUPER_CRC_AT..SUPER_CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads one copy.
    ///
    /// # Errors
    /// When it is not a superblock of this version, or damaged.
    pub fn decode(block: &[u8]) -> Result<Self, CodecError> {
        const WHAT: &str = "log superblock";
        let (raw, _) = RawSuper::ref_from_prefix(block).map_err(|_| CodecError::Field(WHAT, "too short"))?;
        if raw.magic != SUPER_MAGIC {
            return Err(CodecError::Magic(WHAT));
        }
        if block.len() != BLOCK || crc_without(&[], block, SUPER_CRC_AT) != raw.crc.get() {
            return Err(CodecError::Checksum(WHAT));
        }
        if raw.version.get() != VERSION || raw.flags.get() != 0 {
            return Err(CodecError::Version(WHAT, raw.version.get()));
        }
        let drawn = raw.drawn.get(..raw.drawn_count.get() as usize).ok_or(CodecError::Field(WHAT, "nonce count"))?;
        let segment_bytes = raw.segment_bytes.get();
        if !segment_bytes.is_power_of_two() || !(1 << 20..=1 << 30).contains(&segment_bytes) {
            return Err(CodecError::Field(WHAT, "segment size"));
        }
        Ok(Self {
            update: raw.update.get(),
            volume: Uuid::from_bytes(raw.volume),
            log_id: raw.log_id.get(),
            segment_bytes,
            max_segments: raw.max_segments.get(),
            volume_sectors: raw.volume_sectors.get(),
            logical_block: raw.logical_block.get(),
            packed_through: Seq(raw.packed_through.get()),
            confirmed: Nonce(raw.confirmed.get()),
            drawn: drawn.iter().map(|n| Nonce(n.get())).collect(),
        })
    }
}

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
    magic: [u8; 4],
    version: U16,
    flags: U16,
    crc: U32,
    generation: U32,
    volume: [u8; 16],
    log_id: U64,
    salt: U64,
    predecessor_end: U64,
    packed_through: U64,
    first_seq: U64,
}

const SEGMENT_CRC_AT: usize = 8;

impl SegmentHeader {
    /// Writes the header into a zeroed block.
    pub fn encode_into(&self, block: &mut [u8]) {
        let raw = RawSegment {
            magic: SEGMENT_MAGIC,
            version: VERSION.into(),
            flags: 0.into(),
            crc: 0.into(),
            generation: self.generation.into(),
            volume: *self.volume.as_bytes(),
            log_id: self.log_id.into(),
            salt: self.salt.into(),
            predecessor_end: self.predecessor_end.0.into(),
            packed_through: self.packed_through.0.into(),
            first_seq: self.first_seq.0.into(),
        };
        block[..size_of::<RawSegment>()].copy_from_slice(raw.as_bytes());
        let crc = crc_without(&[], block, SEGMENT_CRC_AT);
        block[SEGMENT_CRC_AT..SEGMENT_CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    }

    /// Whether a slot's first block was once a segment header, damaged or not. A header's fields are within one sector,
    /// so a torn write leaves the old block or the new one, never this and an error of [`Self::decode`].
    #[must_use]
    pub fn was_here(block: &[u8]) -> bool {
        block.starts_with(&SEGMENT_MAGIC)
    }

    /// Reads a slot's first block.
    ///
    /// # Errors
    /// When the slot holds no segment of this version, or its header is damaged.
    pub fn decode(block: &[u8]) -> Result<Self, CodecError> {
        const WHAT: &str = "log segment header";
        let (raw, _) = RawSegment::ref_from_prefix(block).map_err(|_| CodecError::Field(WHAT, "too short"))?;
        if raw.magic != SEGMENT_MAGIC {
            return Err(CodecError::Magic(WHAT));
        }
        if block.len() != BLOCK || crc_without(&[], block, SEGMENT_CRC_AT) != raw.crc.get() {
            return Err(CodecError::Checksum(WHAT));
        }
        if raw.version.get() != VERSION || raw.flags.get() != 0 {
            return Err(CodecError::Version(WHAT, raw.version.get()));
        }
        Ok(Self {
            volume: Uuid::from_bytes(raw.volume),
            log_id: raw.log_id.get(),
            generation: raw.generation.get(),
            salt: raw.salt.get(),
            predecessor_end: LogPos(raw.predecessor_end.get()),
            packed_through: Seq(raw.packed_through.get()),
            first_seq: Seq(raw.first_seq.get()),
        })
    }
}

/// What an entry does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum RecordKind {
    /// Data follows.
    Data = 1,
    /// The sectors read as zeros; their room may go.
    Discard = 2,
    /// The sectors read as zeros.
    Zeroes = 3,
}

/// One write, discard or zeroing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordEntry {
    /// First sector.
    pub lba: Lba,
    /// Sectors, at least one.
    pub sectors: u64,
    /// What it does.
    pub kind: RecordKind,
}

impl RecordEntry {
    /// Stored blocks: the 4096-aligned extension of a data entry's sectors.
    #[must_use]
    pub const fn stored_blocks(&self) -> u64 {
        match self.kind {
            RecordKind::Data => {
                (self.lba.0 + self.sectors).div_ceil(SECTORS_PER_BLOCK) - self.lba.0 / SECTORS_PER_BLOCK
            }
            RecordKind::Discard | RecordKind::Zeroes => 0,
        }
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawEntry {
    lba: U64,
    sectors: U64,
    kind: u8,
    codec: u8,
    key: U16,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRecord {
    magic: [u8; 4],
    version: U16,
    flags: U16,
    crc: U32,
    generation: U32,
    volume: [u8; 16],
    offset: U32,
    predecessor: U32,
    header_bytes: U32,
    record_bytes: U32,
    first_seq: U64,
    durable: U64,
    entries: U32,
    blocks: U32,
}

const RECORD_CRC_AT: usize = 8;
/// Bytes of a record header before its entries.
pub const RECORD_FIXED: usize = size_of::<RawRecord>();
/// Bytes of an entry in a record header.
pub const ENTRY_BYTES: usize = size_of::<RawEntry>();
/// No record header is larger: a decoder never allocates more.
pub const MAX_HEADER_BYTES: usize = 1 << 20;

/// Bytes of the header of a record with that many entries and stored blocks, a multiple of 4096.
#[must_use]
pub const fn header_bytes(entries: usize, blocks: usize) -> usize {
    (RECORD_FIXED + entries * ENTRY_BYTES + blocks * 4).next_multiple_of(BLOCK)
}

/// The fields of a record header that are known only when its place is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// The segment's generation.
    pub generation: u32,
    /// The segment's salt.
    pub salt: u64,
    /// Where the record begins, in bytes from the slot's start.
    pub offset: u32,
    /// Where the record before it in the segment begins; 0 for the first.
    pub predecessor: u32,
    /// The number of its first entry (of the next entry, if it has none).
    pub first_seq: Seq,
    /// Everything below was on stable storage when the record was placed.
    pub durable: LogPos,
}

/// A decoded record header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordHeader {
    /// Where it is and what it knew.
    pub placement: Placement,
    /// Bytes of the header.
    pub header_bytes: u32,
    /// Bytes of header and data.
    pub record_bytes: u32,
    /// The entries; the first has number `placement.first_seq`.
    pub entries: Vec<RecordEntry>,
    /// A checksum per stored block, in order.
    pub crcs: Vec<u32>,
}

/// Lays out entries and checksums in `header` (zeroed, of [`header_bytes`] length): all that is known before placing.
pub fn prepare_record(header: &mut [u8], volume: Uuid, entries: &[RecordEntry], crcs: &[u32]) {
    let record_bytes = header.len() + crcs.len() * BLOCK;
    let raw = RawRecord {
        magic: RECORD_MAGIC,
        version: VERSION.into(),
        flags: 0.into(),
        crc: 0.into(),
        generation: 0.into(),
        volume: *volume.as_bytes(),
        offset: 0.into(),
        predecessor: 0.into(),
        header_bytes: (header.len() as u32).into(),
        record_bytes: (record_bytes as u32).into(),
        first_seq: 0.into(),
        durable: 0.into(),
        entries: (entries.len() as u32).into(),
        blocks: (crcs.len() as u32).into(),
    };
    header[..RECORD_FIXED].copy_from_slice(raw.as_bytes());
    let mut at = RECORD_FIXED;
    for e in entries {
        let raw = RawEntry {
            lba: e.lba.0.into(),
            sectors: e.sectors.into(),
            kind: e.kind as u8,
            codec: 0,
            key: 0.into(),
            reserved: 0.into(),
        };
        header[at..at + ENTRY_BYTES].copy_from_slice(raw.as_bytes());
        at += ENTRY_BYTES;
    }
    for c in crcs {
        header[at..at + 4].copy_from_slice(&c.to_le_bytes());
        at += 4;
    }
}

/// Fills in the place and seals the header with its checksum.
///
/// # Panics
/// When `header` was not prepared.
pub fn place_record(header: &mut [u8], p: &Placement) {
    let (raw, _) = RawRecord::mut_from_prefix(header).expect("a prepared header");
    raw.generation = p.generation.into();
    raw.offset = p.offset.into();
    raw.predecessor = p.predecessor.into();
    raw.first_seq = p.first_seq.0.into();
    raw.durable = p.durable.0.into();
    let crc = crc_without(&p.salt.to_le_bytes(), header, RECORD_CRC_AT);
    header[RECORD_CRC_AT..RECORD_CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
}

/// How many bytes the header at the start of `block` says it has: what to read before [`decode_record`].
///
/// # Errors
/// When there is no record header, or it makes no sense.
pub fn peek_record(block: &[u8]) -> Result<usize, CodecError> {
    const WHAT: &str = "log record header";
    let (raw, _) = RawRecord::ref_from_prefix(block).map_err(|_| CodecError::Field(WHAT, "too short"))?;
    if raw.magic != RECORD_MAGIC {
        return Err(CodecError::Magic(WHAT));
    }
    let n = raw.header_bytes.get() as usize;
    if n == 0 || !n.is_multiple_of(BLOCK) || n > MAX_HEADER_BYTES {
        return Err(CodecError::Field(WHAT, "header size"));
    }
    Ok(n)
}

/// The generation that an unchecked record header claims, if it is one of `volume`'s: for a segment whose own header,
/// and with it the salt, is lost.
#[must_use]
pub fn claimed_generation(block: &[u8], volume: Uuid) -> Option<u32> {
    peek_record(block).ok()?;
    let (raw, _) = RawRecord::ref_from_prefix(block).ok()?;
    (raw.volume == *volume.as_bytes()).then_some(raw.generation.get())
}

/// Reads a whole record header that should sit at `offset` of the segment `segment`.
///
/// # Errors
/// When it is not a valid header of exactly that place.
pub fn decode_record(header: &[u8], segment: &SegmentHeader, offset: u32) -> Result<RecordHeader, CodecError> {
    const WHAT: &str = "log record header";
    if peek_record(header)? != header.len() {
        return Err(CodecError::Field(WHAT, "header size"));
    }
    let (raw, rest) = RawRecord::ref_from_prefix(header).map_err(|_| CodecError::Field(WHAT, "too short"))?;
    if crc_without(&segment.salt.to_le_bytes(), header, RECORD_CRC_AT) != raw.crc.get() {
        return Err(CodecError::Checksum(WHAT));
    }
    if raw.version.get() != VERSION || raw.flags.get() != 0 {
        return Err(CodecError::Version(WHAT, raw.version.get()));
    }
    if raw.volume != *segment.volume.as_bytes()
        || raw.generation.get() != segment.generation
        || raw.offset.get() != offset
    {
        return Err(CodecError::Field(WHAT, "it belongs elsewhere"));
    }
    let (n_entries, n_blocks) = (raw.entries.get() as usize, raw.blocks.get() as usize);
    if n_entries > MAX_HEADER_BYTES / ENTRY_BYTES
        || n_blocks > MAX_HEADER_BYTES / 4
        || header_bytes(n_entries, n_blocks) != header.len()
        || raw.record_bytes.get() as usize != header.len() + n_blocks * BLOCK
    {
        return Err(CodecError::Field(WHAT, "counts"));
    }
    let mut entries = Vec::with_capacity(n_entries);
    let mut stored = 0;
    for e in rest[..n_entries * ENTRY_BYTES].chunks_exact(ENTRY_BYTES) {
        let e = RawEntry::ref_from_bytes(e).map_err(|_| CodecError::Field(WHAT, "entry"))?;
        let kind = match e.kind {
            1 => RecordKind::Data,
            2 => RecordKind::Discard,
            3 => RecordKind::Zeroes,
            _ => return Err(CodecError::Field(WHAT, "unknown entry kind")),
        };
        if e.codec != 0 || e.key.get() != 0 {
            return Err(CodecError::Field(WHAT, "unknown codec or key"));
        }
        if e.sectors.get() == 0 || e.lba.get().checked_add(e.sectors.get()).is_none_or(|end| end > 1 << 54) {
            return Err(CodecError::Field(WHAT, "entry range"));
        }
        let e = RecordEntry { lba: Lba(e.lba.get()), sectors: e.sectors.get(), kind };
        // Bounded by the sum of the counts just checked, or refused below.
        stored = e.stored_blocks().saturating_add(stored);
        entries.push(e);
    }
    if stored != n_blocks as u64 {
        return Err(CodecError::Field(WHAT, "stored blocks"));
    }
    let crcs = rest[n_entries * ENTRY_BYTES..][..n_blocks * 4]
        .chunks_exact(4)
        .map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]]))
        .collect();
    Ok(RecordHeader {
        placement: Placement {
            generation: raw.generation.get(),
            salt: segment.salt,
            offset,
            predecessor: raw.predecessor.get(),
            first_seq: Seq(raw.first_seq.get()),
            durable: LogPos(raw.durable.get()),
        },
        header_bytes: header.len() as u32,
        record_bytes: raw.record_bytes.get(),
        entries,
        crcs,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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

    #[test]
    fn a_superblock_comes_back() {
        assert_eq!(Superblock::decode(&superblock().encode()).unwrap(), superblock());
    }
}
