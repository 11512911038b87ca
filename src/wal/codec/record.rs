//! A record's header: entries, a checksum per stored block, and the place that makes it this record and no other.

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{CodecError, Head, Kind, LogPos, SegmentHeader, seal};
use crate::units::{BLOCK, Lba, SECTORS_PER_BLOCK, Seq};

const KIND: Kind = Kind { magic: *b"VBWR", what: "log record header" };

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
    head: Head,
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
        head: KIND.head(),
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
    seal(&p.salt.to_le_bytes(), header);
}

/// How many bytes the header at the start of `block` says it has: what to read before [`decode_record`].
///
/// # Errors
/// When there is no record header, or it makes no sense.
pub fn peek_record(block: &[u8]) -> Result<usize, CodecError> {
    let (raw, _) = KIND.peek::<RawRecord>(block)?;
    let n = raw.header_bytes.get() as usize;
    if n == 0 || !n.is_multiple_of(BLOCK) || n > MAX_HEADER_BYTES {
        return Err(KIND.field("header size"));
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
    if peek_record(header)? != header.len() {
        return Err(KIND.field("header size"));
    }
    KIND.verify(&segment.salt.to_le_bytes(), header)?;
    let (raw, rest) = KIND.peek::<RawRecord>(header)?;
    if raw.volume != *segment.volume.as_bytes()
        || raw.generation.get() != segment.generation
        || raw.offset.get() != offset
    {
        return Err(KIND.field("it belongs elsewhere"));
    }
    let (n_entries, n_blocks) = (raw.entries.get() as usize, raw.blocks.get() as usize);
    if n_entries > MAX_HEADER_BYTES / ENTRY_BYTES
        || n_blocks > MAX_HEADER_BYTES / 4
        || header_bytes(n_entries, n_blocks) != header.len()
        || raw.record_bytes.get() as usize != header.len() + n_blocks * BLOCK
    {
        return Err(KIND.field("counts"));
    }
    let mut entries = Vec::with_capacity(n_entries);
    let mut stored = 0;
    for e in rest[..n_entries * ENTRY_BYTES].chunks_exact(ENTRY_BYTES) {
        let e = RawEntry::ref_from_bytes(e).map_err(|_| KIND.field("entry"))?;
        let kind = match e.kind {
            1 => RecordKind::Data,
            2 => RecordKind::Discard,
            3 => RecordKind::Zeroes,
            _ => return Err(KIND.field("unknown entry kind")),
        };
        if e.codec != 0 || e.key.get() != 0 {
            return Err(KIND.field("unknown codec or key"));
        }
        if e.sectors.get() == 0 || e.lba.get().checked_add(e.sectors.get()).is_none_or(|end| end > 1 << 54) {
            return Err(KIND.field("entry range"));
        }
        let e = RecordEntry { lba: Lba(e.lba.get()), sectors: e.sectors.get(), kind };
        // Bounded by the sum of the counts just checked, or refused below.
        stored = e.stored_blocks().saturating_add(stored);
        entries.push(e);
    }
    if stored != n_blocks as u64 {
        return Err(KIND.field("stored blocks"));
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
            first_seq: Seq(KIND.counted(raw.first_seq.get())?),
            durable: LogPos(raw.durable.get()),
        },
        header_bytes: header.len() as u32,
        record_bytes: raw.record_bytes.get(),
        entries,
        crcs,
    })
}
