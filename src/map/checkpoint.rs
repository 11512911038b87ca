//! Checkpoint parts: the base map in the store.
//!
//! A checkpoint is one full image, and at most one delta of runs that is laid over it. Either is cut into
//! parts, each an object with a header of its own, so that parts are written one at a time and read side by side.
//! All integers are little-endian.
//!
//! ```text
//! offset size  header, 72 bytes
//!      0    4  magic "VBMP"
//!      4    2  format version, 1
//!      6    1  kind: 1 full, 2 delta
//!      7    1  flags, 0
//!      8   16  volume uuid
//!     24    8  checkpoint number
//!     32    4  index of this part, from 0
//!     36    4  number of parts
//!     40    8  size of the volume in blocks
//!     48    8  number of records in this part
//!     56    8  length of the payload that follows
//!     64    4  CRC-32 of the payload
//!     68    4  CRC-32 of bytes 0..68
//!
//! full: a record for each leaf (512 blocks) that maps something, in order of leaf
//!      0    4  leaf number
//!      4    1  form: 1 breaks, 2 table
//!      5    1  0
//!      6    2  number of words, 1 to 512
//!      8   8n  words: block in the leaf << 55 | location, by block; breaks: from that block on,
//!              consecutive locations up to the next break, location 0 for unmapped (never first, never
//!              twice in a row); table: one word per mapped block
//!
//! delta: a record for each run, sorted by block, disjoint
//!      0    8  first block
//!      8    8  location of the first block, consecutive indices from there; 0: unmapped
//!     16    4  number of blocks, at least 1
//!     20    4  0
//! ```
//! A location is 55 bits, see [`Location`]. Words are whole here, and packed in memory (`words.rs`): decoding
//! allocates hardly more than it reads.

use bytes::Bytes;
use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::image::BaseImage;
use super::leaf::{BLOCKS, Leaf};
use super::location::{Location, MAX_SOURCE};
use super::runs::Run;
use crate::codec::CodecError;
use crate::units::{BlockNo, LEAF_BLOCKS, MAX_VOLUME_BYTES};

/// Bytes of the largest part that is written.
pub const MAX_PART_BYTES: usize = 32 << 20;
/// Bytes of a part while the map is small: few of them are in memory at a time, when a volume is attached and when it is written.
const PART_BYTES: usize = 4 << 20;
/// A larger map has larger parts, so that a manifest names few.
const MANY_PARTS: u64 = 64;
/// The largest part that is read: more than any setting writes.
const MAX_READ_BYTES: usize = 256 << 20;
/// The format's version.
pub const VERSION: u16 = 1;
/// Length of a part's header.
pub const HEADER_BYTES: usize = 72;
/// The smallest part that has room for any record.
pub const MIN_PART_BYTES: usize = HEADER_BYTES + LEAF_RECORD + 8 * BLOCKS;

const MAGIC: [u8; 4] = *b"VBMP";
const CRC_AT: usize = 68;
const LEAF_RECORD: usize = 8;
const RUN_RECORD: usize = 24;
const FORM_BREAKS: u8 = 1;
const FORM_TABLE: u8 = 2;
const MAX_VOLUME_BLOCKS: u64 = MAX_VOLUME_BYTES / crate::units::BLOCK as u64;
const WHAT: &str = "checkpoint part";

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    version: U16,
    kind: u8,
    flags: u8,
    volume: [u8; 16],
    number: U64,
    part: U32,
    parts: U32,
    volume_blocks: U64,
    records: U64,
    payload: U64,
    payload_crc: U32,
    header_crc: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawLeaf {
    leaf: U32,
    form: u8,
    zero: u8,
    words: U16,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawRun {
    block: U64,
    at: U64,
    blocks: U32,
    zero: U32,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);
const _: () = assert!(size_of::<RawLeaf>() == LEAF_RECORD);
const _: () = assert!(size_of::<RawRun>() == RUN_RECORD);

/// What a part holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PartKind {
    /// Leaves of the full image.
    Full,
    /// Runs to lay over it.
    Delta,
}

impl PartKind {
    pub(super) const fn code(self) -> u8 {
        match self {
            Self::Full => 1,
            Self::Delta => 2,
        }
    }
}

/// Whose checkpoint it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ident {
    /// The volume.
    pub volume: Uuid,
    /// The checkpoint's number.
    pub number: u64,
}

/// What the manifest says of a part.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Expect {
    /// Whose it is.
    pub ident: Ident,
    /// Full or delta.
    pub kind: PartKind,
    /// Its index.
    pub part: u32,
    /// How many there are.
    pub parts: u32,
    /// Size of the volume in blocks. A part may be of a smaller one: the volume has grown since.
    pub volume_blocks: u64,
}

/// A part, decoded and checked in itself.
pub struct Part {
    pub(super) kind: PartKind,
    pub(super) part: u32,
    pub(super) parts: u32,
    pub(super) volume_blocks: u64,
    pub(super) leaves: Vec<(u32, Leaf)>,
    pub(super) runs: Vec<Run>,
}

impl Part {
    /// Size of the volume in blocks when the part was written.
    #[must_use]
    pub const fn volume_blocks(&self) -> u64 {
        self.volume_blocks
    }

    /// The same as another volume sees it, to which the writer's source 0 is source `by`.
    ///
    /// # Errors
    /// When a location's source would be larger than any can be.
    pub fn lifted(mut self, by: u8) -> Result<Self, CodecError> {
        if by == 0 {
            return Ok(self);
        }
        let too_many = || bad(format!("a source of its map is beyond {MAX_SOURCE} when seen from source {by}"));
        for (_, leaf) in &mut self.leaves {
            *leaf = leaf.lifted(by).ok_or_else(too_many)?;
        }
        for run in &mut self.runs {
            run.to = match run.to {
                Some(to) => Some(to.lifted(by).ok_or_else(too_many)?),
                None => None,
            };
        }
        Ok(self)
    }
}

impl std::fmt::Debug for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (l, r) = (self.leaves.len(), self.runs.len());
        write!(f, "Part({:?} {}/{}, {l} leaves, {r} runs)", self.kind, self.part, self.parts)
    }
}

/// The parts of an encoded checkpoint, in order; only one is in memory at a time.
pub struct Parts<'a> {
    ident: Ident,
    volume_blocks: u64,
    source: PartSource<'a>,
    /// For each part: where it starts (leaf, or index of a run), how many records, how many bytes of payload.
    cuts: Vec<(u64, u64, usize)>,
    next: usize,
}

enum PartSource<'a> {
    Full(&'a BaseImage),
    Delta(&'a [Run]),
}

impl Parts<'_> {
    /// How many there are in all, at least one.
    #[must_use]
    pub const fn total_parts(&self) -> usize {
        self.cuts.len()
    }

    /// Length of all parts together, in bytes.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.cuts.iter().map(|c| (HEADER_BYTES + c.2) as u64).sum()
    }
}

impl Iterator for Parts<'_> {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        let &(start, records, bytes) = self.cuts.get(self.next)?;
        let mut out = Vec::with_capacity(HEADER_BYTES + bytes);
        out.resize(HEADER_BYTES, 0);
        let kind = match self.source {
            PartSource::Full(img) => {
                for (l, leaf) in img.leaves(start..u64::MAX).take(records as usize) {
                    put_leaf(&mut out, l, leaf);
                }
                PartKind::Full
            }
            PartSource::Delta(runs) => {
                runs[start as usize..][..records as usize].iter().for_each(|r| put_run(&mut out, r));
                PartKind::Delta
            }
        };
        debug_assert_eq!(out.len(), HEADER_BYTES + bytes);
        let payload = &out[HEADER_BYTES..];
        let mut h = RawHeader {
            magic: MAGIC,
            version: VERSION.into(),
            kind: kind.code(),
            flags: 0,
            volume: self.ident.volume.into_bytes(),
            number: self.ident.number.into(),
            part: (self.next as u32).into(),
            parts: (self.cuts.len() as u32).into(),
            volume_blocks: self.volume_blocks.into(),
            records: records.into(),
            payload: (payload.len() as u64).into(),
            payload_crc: crc32fast::hash(payload).into(),
            header_crc: 0.into(),
        };
        h.header_crc = crc32fast::hash(&h.as_bytes()[..CRC_AT]).into();
        out[..HEADER_BYTES].copy_from_slice(h.as_bytes());
        self.next += 1;
        Some(out.into())
    }
}

/// Cuts records of known sizes into parts; an empty checkpoint is one part without records.
fn cut(sizes: impl Iterator<Item = (u64, usize)>, max_part_bytes: usize) -> Vec<(u64, u64, usize)> {
    let room = max_part_bytes.clamp(MIN_PART_BYTES, MAX_READ_BYTES) - HEADER_BYTES;
    let mut cuts = vec![(0, 0, 0)];
    for (at, size) in sizes {
        match cuts.last_mut() {
            Some(c) if c.1 == 0 || c.2 + size <= room => {
                if c.1 == 0 {
                    c.0 = at;
                }
                c.1 += 1;
                c.2 += size;
            }
            _ => cuts.push((at, 1, size)),
        }
    }
    cuts
}

/// Bytes of a leaf's record.
fn leaf_bytes(leaf: &Leaf) -> usize {
    LEAF_RECORD + 8 * leaf.word_count()
}

/// The size of parts, in bytes, that a map is best written in, be it whole or as a delta.
#[must_use]
pub fn part_bytes(img: &BaseImage) -> usize {
    let whole: u64 = img.leaves(0..u64::MAX).map(|(_, leaf)| leaf_bytes(leaf) as u64).sum();
    ((whole / MANY_PARTS) as usize).clamp(PART_BYTES, MAX_PART_BYTES)
}

/// Encodes a full image in parts of at most `max_part_bytes` (at least [`MIN_PART_BYTES`] is taken).
#[must_use]
pub fn encode_full(img: &BaseImage, ident: Ident, max_part_bytes: usize) -> Parts<'_> {
    let cuts = cut(img.leaves(0..u64::MAX).map(|(l, leaf)| (l, leaf_bytes(leaf))), max_part_bytes);
    Parts { ident, volume_blocks: img.volume_blocks(), source: PartSource::Full(img), cuts, next: 0 }
}

/// Encodes runs (sorted by block, disjoint, as [`BaseImage::diff`] gives them) of a volume of `volume_blocks`.
#[must_use]
pub fn encode_delta(runs: &[Run], volume_blocks: u64, ident: Ident, max_part_bytes: usize) -> Parts<'_> {
    let cuts = cut((0..runs.len() as u64).map(|i| (i, RUN_RECORD)), max_part_bytes);
    Parts { ident, volume_blocks, source: PartSource::Delta(runs), cuts, next: 0 }
}

fn put_leaf(out: &mut Vec<u8>, l: u64, leaf: &Leaf) {
    let form = if leaf.is_table() { FORM_TABLE } else { FORM_BREAKS };
    let raw = RawLeaf { leaf: (l as u32).into(), form, zero: 0, words: (leaf.word_count() as u16).into() };
    out.extend_from_slice(raw.as_bytes());
    leaf.each_word(|w| out.extend_from_slice(&w.to_le_bytes()));
}

fn put_run(out: &mut Vec<u8>, r: &Run) {
    let at = r.to.map_or(0, Location::raw);
    let raw = RawRun { block: r.block.0.into(), at: at.into(), blocks: r.blocks.into(), zero: 0.into() };
    out.extend_from_slice(raw.as_bytes());
}

pub(super) fn bad(why: impl Into<String>) -> CodecError {
    CodecError::invalid(WHAT, why)
}

pub(super) fn same<T: PartialEq + ToString>(field: &'static str, got: T, want: T) -> Result<(), CodecError> {
    if got == want {
        return Ok(());
    }
    Err(CodecError::Mismatch { what: WHAT, field, got: got.to_string(), want: want.to_string() })
}

/// Decodes and checks a part. It must be the one expected; allocations are bounded by its length.
///
/// # Errors
/// Anything that is not a whole, intact part of this version that fits the volume.
pub fn decode_part(bytes: &[u8], expect: &Expect) -> Result<Part, CodecError> {
    let length = |need: u64| CodecError::Length { what: WHAT, got: bytes.len() as u64, need };
    let (h, payload) = RawHeader::read_from_prefix(bytes).map_err(|_| length(HEADER_BYTES as u64))?;
    if h.magic != MAGIC {
        return Err(CodecError::Magic(WHAT));
    }
    // The version comes before the checksum: another version may keep it elsewhere.
    CodecError::known(WHAT, "version", h.version.get().into(), VERSION.into())?;
    let check = |stored: u32, data: &[u8]| match crc32fast::hash(data) {
        computed if computed == stored => Ok(()),
        computed => Err(CodecError::Checksum { what: WHAT, stored, computed }),
    };
    check(h.header_crc.get(), &bytes[..CRC_AT])?;
    CodecError::known(WHAT, "flags", h.flags.into(), 0)?;
    let kind = match h.kind {
        1 => PartKind::Full,
        2 => PartKind::Delta,
        k => return Err(CodecError::Unknown { what: WHAT, field: "kind", value: k.into() }),
    };
    same("kind", kind.code(), expect.kind.code())?;
    same("volume", Uuid::from_bytes(h.volume), expect.ident.volume)?;
    same("checkpoint number", h.number.get(), expect.ident.number)?;
    same("part", h.part.get(), expect.part)?;
    same("number of parts", h.parts.get(), expect.parts)?;
    if h.part.get() >= h.parts.get() {
        return Err(bad(format!("part {} of {}", h.part, h.parts)));
    }
    let volume_blocks = h.volume_blocks.get();
    if volume_blocks > expect.volume_blocks.min(MAX_VOLUME_BLOCKS) {
        return Err(bad(format!("it maps {volume_blocks} blocks, the volume has {}", expect.volume_blocks)));
    }
    if h.payload.get() != payload.len() as u64 || payload.len() > MAX_READ_BYTES {
        return Err(length(h.payload.get().saturating_add(HEADER_BYTES as u64)));
    }
    check(h.payload_crc.get(), payload)?;
    let mut out =
        Part { kind, part: h.part.get(), parts: h.parts.get(), volume_blocks, leaves: Vec::new(), runs: Vec::new() };
    match kind {
        PartKind::Full => out.leaves = read_leaves(payload, h.records.get(), volume_blocks)?,
        PartKind::Delta => out.runs = read_runs(payload, h.records.get(), volume_blocks)?,
    }
    Ok(out)
}

fn read_leaves(mut rest: &[u8], records: u64, volume_blocks: u64) -> Result<Vec<(u32, Leaf)>, CodecError> {
    if records > (rest.len() / LEAF_RECORD) as u64 {
        return Err(bad(format!("{records} leaves do not fit {} bytes", rest.len())));
    }
    let mut leaves: Vec<(u32, Leaf)> = Vec::with_capacity(records as usize);
    let mut words = Vec::with_capacity(BLOCKS);
    for i in 0..records {
        let (raw, tail) = RawLeaf::read_from_prefix(rest).map_err(|_| bad(format!("leaf record {i} is cut short")))?;
        let (l, n) = (raw.leaf.get(), usize::from(raw.words.get()));
        if raw.zero != 0 || !(raw.form == FORM_BREAKS || raw.form == FORM_TABLE) {
            return Err(CodecError::Unknown { what: WHAT, field: "form of a leaf", value: raw.form.into() });
        }
        let Some((body, tail)) = tail.split_at_checked(8 * n) else {
            return Err(bad(format!("leaf {l} is cut short")));
        };
        if leaves.last().is_some_and(|(last, _)| *last >= l) {
            return Err(bad(format!("leaf {l} is out of order")));
        }
        words.clear();
        words.extend(body.as_chunks().0.iter().map(|w| u64::from_le_bytes(*w)));
        let leaf = Leaf::from_words(raw.form == FORM_TABLE, &words).map_err(|why| bad(format!("leaf {l}: {why}")))?;
        if u64::from(l) * LEAF_BLOCKS + leaf.end() as u64 > volume_blocks {
            return Err(bad(format!("leaf {l} passes the volume's end")));
        }
        leaves.push((l, leaf));
        rest = tail;
    }
    if rest.is_empty() { Ok(leaves) } else { Err(bad(format!("{} bytes follow the last leaf", rest.len()))) }
}

fn read_runs(payload: &[u8], records: u64, volume_blocks: u64) -> Result<Vec<Run>, CodecError> {
    if records.checked_mul(RUN_RECORD as u64) != Some(payload.len() as u64) {
        return Err(bad(format!("{records} runs do not make {} bytes", payload.len())));
    }
    let mut runs: Vec<Run> = Vec::with_capacity(records as usize);
    for (i, raw) in payload.chunks_exact(RUN_RECORD).enumerate() {
        let raw = RawRun::read_from_bytes(raw).map_err(|_| bad(format!("run {i} is cut short")))?;
        let to = Location::from_raw(raw.at.get());
        let r = Run { block: BlockNo(raw.block.get()), blocks: raw.blocks.get(), to };
        let n = u64::from(r.blocks);
        let sound = raw.zero.get() == 0
            && (to.is_some() || raw.at.get() == 0)
            && n > 0
            && to.is_none_or(|t| n <= t.room())
            && r.block.0.checked_add(n).is_some_and(|end| end <= volume_blocks);
        if !sound {
            return Err(bad(format!("run {i} at block {} makes no sense", r.block)));
        }
        if runs.last().is_some_and(|last| last.end() > r.block.0) {
            return Err(bad(format!("run {i} at block {} is out of order", r.block)));
        }
        runs.push(r);
    }
    Ok(runs)
}
