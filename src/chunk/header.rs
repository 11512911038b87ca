//! The header of a chunk: what its data blocks are, and where they belong.
//!
//! A chunk is one object: 32768 bytes of header room, then up to 1016 data blocks of 4096 bytes (a whole one is
//! 4 MiB). The tables have fixed places, each with room for the worst case, so the data's place does not depend
//! on the header's content: header and data can be fetched side by side. All integers are little-endian; what
//! is not used is zero, and is checked to be.
//!
//! ```text
//! offset  size  field
//!      0     4  magic "VBCK"
//!      4     2  format version, 1
//!      6     2  flags, 0
//!      8    16  volume uuid
//!     24     8  chunk number, 1 to 2^37 - 1
//!     32     8  epoch, at most 2^32 - 1 (its key has 8 digits)
//!     40     8  nonce of the attachment
//!     48     8  a: the group holds the log's entries after this one
//!     56     8  b: and up to this one
//!     64     8  group number, 0 for a chunk written by garbage collection
//!     72     4  index of this chunk in its group, from 0
//!     76     4  number of chunks in the group
//!     80     8  applied_through: all groups up to this one are whole in the store
//!     88     1  checksum kind: 1 = CRC-32 of the block number (u64) and the 4096 bytes
//!     89     1  codec, 0: stored as is
//!     90     1  cipher, 0: none
//!     91     1  0
//!     92     4  key id, 0: none
//!     96     4  number of frames, 1
//!    100     4  E: number of extents, at most 1016
//!    104     4  N: number of stored blocks, at most 1016
//!    108     4  M: number of masks, at most N
//!    112    32  the frame: offset in the object (8), stored size (8), tag (16, zero)
//!    144   108  0 (room for three more frames)
//!    252     4  CRC-32 of the 32768 bytes, with this field as zero
//!    256  24 E  extents, sorted by block, disjoint:
//!                  0  8  first block
//!                  8  8  birth seq: the entry that brought the newest of the content; 0: it was copied from what the volume was cloned from
//!                 16  6  number of blocks, at least 1
//!                 22  1  kind: 1 data, 2 discard, 3 damaged
//!                 23  1  0
//!  24640   4 N  checksum of each stored block; stored blocks are those of the data and damaged
//!               extents, in order
//!  28704   4 M  masks, one for each stored block of a damaged extent, in order:
//!                  0  2  index of the stored block
//!                  2  1  bit i set: sector i of the block is good
//!                  3  1  0
//! ```

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub use crate::checksum::block_crc;
use crate::checksum::crc_around;
use crate::codec::CodecError;
use crate::units::{BLOCK, BlockNo, ChunkNo, Epoch, GroupNo, MAX_VOLUME_BYTES, Nonce, Seq};

/// Bytes before the first data block.
pub const HEADER_ROOM: usize = 32768;
/// The most data blocks in a chunk.
pub const MAX_BLOCKS: usize = 1016;
/// The most extents in a chunk.
pub const MAX_EXTENTS: usize = 1016;
/// The format's version.
pub const VERSION: u16 = 1;

const MAGIC: [u8; 4] = *b"VBCK";
const CRC_AT: usize = 252;
const EXTENTS_AT: usize = 256;
const CRCS_AT: usize = EXTENTS_AT + MAX_EXTENTS * size_of::<RawExtent>();
const MASKS_AT: usize = CRCS_AT + MAX_BLOCKS * 4;
const CHECKSUM_CRC32: u8 = 1;
const MAX_CHUNK: u64 = (1 << 37) - 1;
const MAX_VOLUME_BLOCKS: u64 = MAX_VOLUME_BYTES / BLOCK as u64;
const WHAT: &str = "chunk header";

// The worst case of every table at once fits the room, and a whole chunk is 4 MiB.
const _: () = assert!(MASKS_AT + MAX_BLOCKS * size_of::<RawMask>() <= HEADER_ROOM);
const _: () = assert!(HEADER_ROOM + MAX_BLOCKS * BLOCK == 4 << 20);
const _: () = assert!(size_of::<RawHead>() == EXTENTS_AT);
const _: () = assert!(std::mem::offset_of!(RawHead, crc) == CRC_AT);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHead {
    magic: [u8; 4],
    version: U16,
    flags: U16,
    volume: [u8; 16],
    chunk: U64,
    epoch: U64,
    nonce: U64,
    after: U64,
    through: U64,
    group: U64,
    index: U32,
    count: U32,
    applied_through: U64,
    checksum: u8,
    codec: u8,
    cipher: u8,
    zero: u8,
    key_id: U32,
    frames: U32,
    extents: U32,
    blocks: U32,
    masks: U32,
    frame_offset: U64,
    frame_size: U64,
    frame_tag: [u8; 16],
    room: [u8; 108],
    crc: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawExtent {
    block: U64,
    birth: U64,
    blocks: [u8; 6],
    kind: u8,
    zero: u8,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawMask {
    index: U16,
    good: u8,
    zero: u8,
}

/// What an extent is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExtentKind {
    /// Stored blocks, in order.
    Data,
    /// Reads as zeros; nothing is stored.
    Discard,
    /// Stored blocks that have lost sectors: a mask for each says which are good.
    Damaged,
}

impl ExtentKind {
    const fn code(self) -> u8 {
        match self {
            Self::Data => 1,
            Self::Discard => 2,
            Self::Damaged => 3,
        }
    }

    const fn stores(self) -> bool {
        !matches!(self, Self::Discard)
    }
}

/// A stretch of the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChunkExtent {
    /// The first block.
    pub block: BlockNo,
    /// Number of blocks, at least 1.
    pub blocks: u64,
    /// What it is.
    pub kind: ExtentKind,
    /// The entry that brought the newest of the content.
    pub birth: Seq,
}

/// See the module's page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChunkHeader {
    /// The volume.
    pub volume: Uuid,
    /// The chunk's number.
    pub chunk: ChunkNo,
    /// The attachment that wrote it.
    pub epoch: Epoch,
    /// That attachment's nonce.
    pub nonce: Nonce,
    /// `a` of the group's range (a, b] of the log.
    pub after: Seq,
    /// `b` of that range.
    pub through: Seq,
    /// The group; 0 for a chunk written by garbage collection.
    pub group: GroupNo,
    /// Index of this chunk in its group.
    pub index: u32,
    /// Number of chunks in the group.
    pub count: u32,
    /// All groups up to this one are whole in the store.
    pub applied_through: GroupNo,
    /// Sorted by block, disjoint; at most 1016.
    pub extents: Vec<ChunkExtent>,
    /// The checksum ([`block_crc`]) of each stored block.
    pub crcs: Vec<u32>,
    /// For each stored block of a damaged extent, in order: its index among the stored blocks, and its good
    /// sectors (bit `i`: sector `i`).
    pub masks: Vec<(u16, u8)>,
}

fn bad(why: impl Into<String>) -> CodecError {
    CodecError::invalid(WHAT, why)
}

impl ChunkHeader {
    /// Whether a chunk of so many extents, stored blocks and masks has room for all.
    #[must_use]
    pub const fn fits(extents: usize, blocks: usize, masks: usize) -> bool {
        extents <= MAX_EXTENTS && blocks <= MAX_BLOCKS && masks <= blocks
    }

    /// Number of data blocks behind the header.
    #[must_use]
    pub const fn stored_blocks(&self) -> usize {
        self.crcs.len()
    }

    /// The volume's blocks that the stored blocks are, in order.
    pub fn stored_at(&self) -> impl Iterator<Item = BlockNo> {
        let of = |e: &ChunkExtent| (e.block.0..e.block.0 + e.blocks).map(BlockNo);
        self.extents.iter().filter(|e| e.kind.stores()).flat_map(of)
    }

    /// The header as it is stored: exactly [`HEADER_ROOM`] bytes.
    ///
    /// # Errors
    /// When it breaks a rule of the format: the same ones that [`Self::decode`] checks.
    pub fn encode(&self) -> Result<Vec<u8>, CodecError> {
        self.check()?;
        let mut out = vec![0; HEADER_ROOM];
        let head = RawHead {
            magic: MAGIC,
            version: VERSION.into(),
            flags: 0.into(),
            volume: self.volume.into_bytes(),
            chunk: self.chunk.0.into(),
            epoch: self.epoch.0.into(),
            nonce: self.nonce.0.into(),
            after: self.after.0.into(),
            through: self.through.0.into(),
            group: self.group.0.into(),
            index: self.index.into(),
            count: self.count.into(),
            applied_through: self.applied_through.0.into(),
            checksum: CHECKSUM_CRC32,
            codec: 0,
            cipher: 0,
            zero: 0,
            key_id: 0.into(),
            frames: 1.into(),
            extents: (self.extents.len() as u32).into(),
            blocks: (self.crcs.len() as u32).into(),
            masks: (self.masks.len() as u32).into(),
            frame_offset: (HEADER_ROOM as u64).into(),
            frame_size: ((self.crcs.len() * BLOCK) as u64).into(),
            frame_tag: [0; 16],
            room: [0; 108],
            crc: 0.into(),
        };
        out[..EXTENTS_AT].copy_from_slice(head.as_bytes());
        for (slot, e) in out[EXTENTS_AT..CRCS_AT].chunks_exact_mut(size_of::<RawExtent>()).zip(&self.extents) {
            let mut blocks = [0; 6];
            blocks.copy_from_slice(&e.blocks.to_le_bytes()[..6]);
            let raw =
                RawExtent { block: e.block.0.into(), birth: e.birth.0.into(), blocks, kind: e.kind.code(), zero: 0 };
            slot.copy_from_slice(raw.as_bytes());
        }
        for (slot, crc) in out[CRCS_AT..MASKS_AT].as_chunks_mut().0.iter_mut().zip(&self.crcs) {
            *slot = crc.to_le_bytes();
        }
        for (slot, &(index, good)) in out[MASKS_AT..].chunks_exact_mut(size_of::<RawMask>()).zip(&self.masks) {
            slot.copy_from_slice(RawMask { index: index.into(), good, zero: 0 }.as_bytes());
        }
        let crc = header_crc(&out);
        out[CRC_AT..EXTENTS_AT].copy_from_slice(&crc.to_le_bytes());
        Ok(out)
    }

    /// Decodes and checks a header: the object's first [`HEADER_ROOM`] bytes (what follows is not looked at).
    ///
    /// # Errors
    /// Anything that is not a whole, intact header of this version.
    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        let short = || CodecError::Length { what: WHAT, got: bytes.len() as u64, need: HEADER_ROOM as u64 };
        let bytes = bytes.get(..HEADER_ROOM).ok_or_else(short)?;
        let (h, _) = RawHead::read_from_prefix(bytes).map_err(|_| short())?;
        if h.magic != MAGIC {
            return Err(CodecError::Magic(WHAT));
        }
        let known = |field, value, want| CodecError::known(WHAT, field, value, want);
        // Before the version: every version keeps this checksum where it is, so that a damaged version is told from a new one.
        let (stored, computed) = (h.crc.get(), header_crc(bytes));
        if stored != computed {
            return Err(CodecError::Checksum { what: WHAT, stored, computed });
        }
        known("version", h.version.get().into(), VERSION.into())?;
        known("flags", h.flags.get().into(), 0)?;
        known("checksum kind", h.checksum.into(), CHECKSUM_CRC32.into())?;
        known("codec", h.codec.into(), 0)?;
        known("cipher", h.cipher.into(), 0)?;
        known("key id", h.key_id.get().into(), 0)?;
        known("number of frames", h.frames.get().into(), 1)?;
        let (e, n, m) = (h.extents.get() as usize, h.blocks.get() as usize, h.masks.get() as usize);
        if !Self::fits(e, n, m) {
            return Err(bad(format!("{e} extents, {n} blocks and {m} masks are more than it has room for")));
        }
        if h.frame_offset.get() != HEADER_ROOM as u64 || h.frame_size.get() != (n * BLOCK) as u64 {
            return Err(bad(format!("its frame is not the {n} blocks behind it")));
        }
        let (extents, extents_rest) = bytes[EXTENTS_AT..CRCS_AT].split_at(e * size_of::<RawExtent>());
        let (crcs, crcs_rest) = bytes[CRCS_AT..MASKS_AT].split_at(n * 4);
        let (masks, masks_rest) = bytes[MASKS_AT..].split_at(m * size_of::<RawMask>());
        let unused = [&h.frame_tag[..], &h.room, &[h.zero], extents_rest, crcs_rest, masks_rest];
        if unused.iter().any(|u| u.iter().any(|b| *b != 0)) {
            return Err(bad("there is something in its unused room"));
        }
        let out = Self {
            volume: Uuid::from_bytes(h.volume),
            chunk: ChunkNo(h.chunk.get()),
            epoch: Epoch(h.epoch.get()),
            nonce: Nonce(h.nonce.get()),
            after: Seq(h.after.get()),
            through: Seq(h.through.get()),
            group: GroupNo(h.group.get()),
            index: h.index.get(),
            count: h.count.get(),
            applied_through: GroupNo(h.applied_through.get()),
            extents: extents.as_chunks().0.iter().map(read_extent).collect::<Result<_, _>>()?,
            crcs: crcs.as_chunks().0.iter().map(|c| u32::from_le_bytes(*c)).collect(),
            masks: masks.as_chunks().0.iter().map(read_mask).collect::<Result<_, _>>()?,
        };
        out.check()?;
        Ok(out)
    }

    /// The rules that hold for what is written and for what is read.
    fn check(&self) -> Result<(), CodecError> {
        let (e, n, m) = (self.extents.len(), self.crcs.len(), self.masks.len());
        if !Self::fits(e, n, m) {
            return Err(bad(format!("{e} extents, {n} blocks and {m} masks are more than it has room for")));
        }
        if self.chunk.0 == 0 || self.chunk.0 > MAX_CHUNK {
            return Err(bad(format!("chunk number {} is out of range", self.chunk)));
        }
        if self.epoch.0 > u64::from(u32::MAX) {
            return Err(bad(format!("epoch {} is out of range", self.epoch)));
        }
        if self.after > self.through {
            return Err(bad(format!("its range of the log ({}, {}] runs backwards", self.after, self.through)));
        }
        if self.group.0 != 0 && self.index >= self.count {
            return Err(bad(format!("it is chunk {} of {}", self.index, self.count)));
        }
        let (mut next, mut stored) = (0, 0);
        let mut masks = self.masks.iter();
        for x in &self.extents {
            let end = x.block.0.checked_add(x.blocks).filter(|&end| end <= MAX_VOLUME_BLOCKS && x.blocks > 0);
            let Some(end) = end.filter(|_| x.block.0 >= next) else {
                return Err(bad(format!(
                    "its extent of {} blocks at block {} is out of order or range",
                    x.blocks, x.block
                )));
            };
            next = end;
            if !x.kind.stores() {
                continue;
            }
            if x.blocks > (n - stored) as u64 {
                return Err(bad(format!("its extents name more than its {n} stored blocks")));
            }
            for i in stored..stored + x.blocks as usize {
                if x.kind == ExtentKind::Damaged && masks.next().is_none_or(|m| usize::from(m.0) != i) {
                    return Err(bad(format!("the damaged block {i} has no mask in its place")));
                }
            }
            stored += x.blocks as usize;
        }
        if stored != n {
            return Err(bad(format!("its extents name {stored} stored blocks, it has {n}")));
        }
        match masks.next() {
            Some((i, _)) => Err(bad(format!("block {i} has a mask and is not damaged"))),
            None => Ok(()),
        }
    }
}

fn read_extent(raw: &[u8; size_of::<RawExtent>()]) -> Result<ChunkExtent, CodecError> {
    let raw: RawExtent = zerocopy::transmute!(*raw);
    let kind = match (raw.kind, raw.zero) {
        (1, 0) => ExtentKind::Data,
        (2, 0) => ExtentKind::Discard,
        (3, 0) => ExtentKind::Damaged,
        (k, z) => {
            let value = u64::from(k) | u64::from(z) << 8;
            return Err(CodecError::Unknown { what: WHAT, field: "kind of an extent", value });
        }
    };
    let mut blocks = [0; 8];
    blocks[..6].copy_from_slice(&raw.blocks);
    Ok(ChunkExtent {
        block: BlockNo(raw.block.get()),
        blocks: u64::from_le_bytes(blocks),
        kind,
        birth: Seq(raw.birth.get()),
    })
}

fn read_mask(raw: &[u8; size_of::<RawMask>()]) -> Result<(u16, u8), CodecError> {
    let raw: RawMask = zerocopy::transmute!(*raw);
    if raw.zero != 0 {
        return Err(bad("there is something in a mask's unused room"));
    }
    Ok((raw.index.get(), raw.good))
}

/// CRC-32 of the header's room with the checksum's own field as zero.
fn header_crc(room: &[u8]) -> u32 {
    crc_around(&[], room, CRC_AT)
}

/// The key of a chunk under the volume's `prefix` (empty, or ending in `/`). A listing is in order of number.
#[must_use]
pub fn key(prefix: &str, chunk: ChunkNo, epoch: Epoch, nonce: Nonce) -> String {
    format!("{prefix}chunks/{:016x}-{:08x}-{:016x}.chunk", chunk.0, epoch.0, nonce.0)
}

/// The parts of a chunk's name: what follows the last `/` of its key. `None` for anything that [`key`] does not write.
#[must_use]
pub fn parse_name(name: &str) -> Option<(ChunkNo, Epoch, Nonce)> {
    let mut parts = name.strip_suffix(".chunk")?.split('-');
    let mut hex = |digits: usize| {
        let p = parts.next().filter(|p| p.len() == digits)?;
        let lower = p.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        lower.then(|| u64::from_str_radix(p, 16).ok()).flatten()
    };
    let (chunk, epoch, nonce) = (hex(16)?, hex(8)?, hex(16)?);
    if parts.next().is_some() || chunk == 0 || chunk > MAX_CHUNK {
        return None;
    }
    Some((ChunkNo(chunk), Epoch(epoch), Nonce(nonce)))
}

#[cfg(test)]
mod tests;
