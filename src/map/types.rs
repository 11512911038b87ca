//! What goes into the maps, and what comes out.

use super::location::Location;
use crate::units::{BlockNo, Lba, Seq};

/// Index of a 4096-byte block within the log file: file offset / 4096. `u32::MAX` is never used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub struct LogBlock(pub u32);

/// What an entry of the log does to its sectors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EntryKind {
    /// The entry's stored area is the 4096-aligned extension of its sector range: stored block `i`
    /// (`LogBlock(blk.0 + i)`) holds volume block `lba.block() + i`, each sector at its place inside the block,
    /// padding where the entry does not cover the block.
    Data(LogBlock),
    /// A discard or zeroing: reads as zeros.
    Hole,
}

/// One entry of the log, as the maps see it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The first sector.
    pub lba: Lba,
    /// Number of sectors.
    pub sectors: u64,
    /// The entry's number.
    pub seq: Seq,
    /// Data or hole.
    pub kind: EntryKind,
}

/// Keeps log room from being recycled while somebody reads it.
pub trait PinLog {
    /// Called once for each piece that a lookup hands out with [`Source::Log`], with that piece's block,
    /// under the shard's lock: it must be short and must not call the maps.
    fn pin(&self, blk: LogBlock);
}

/// A stretch of sectors with one source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// The first sector.
    pub lba: Lba,
    /// Number of sectors.
    pub sectors: u32,
    /// Where they are.
    pub what: Source,
}

/// Where a piece's content is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// Zeros.
    Zero,
    /// In the log; the piece is pinned.
    Log {
        /// The block that holds the piece's first sector, at its place inside the block; the next volume
        /// block is in the next log block.
        blk: LogBlock,
        /// The entry.
        seq: Seq,
    },
    /// In a chunk: the block that holds the piece's first sector; the piece's further blocks are consecutive
    /// indices in the same chunk.
    Chunk(Location),
    /// As `Chunk`, but some of the blocks' sectors are lost: the chunk's header says which.
    Damaged(Location),
}

/// What the base says of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BaseState {
    /// Zeros.
    Unmapped,
    /// In a chunk (the location says whether it is damaged).
    At(Location),
}

impl BaseState {
    pub(super) const fn from_raw(raw: u64) -> Self {
        match Location::from_raw(raw) {
            Some(at) => Self::At(at),
            None => Self::Unmapped,
        }
    }
}

/// A stretch of blocks that a group maps anew.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GroupExtent {
    /// The first block.
    pub block: BlockNo,
    /// Number of blocks.
    pub blocks: u64,
    /// `None`: unmap. Some: consecutive indices from there.
    pub to: Option<Location>,
}

/// What a group, uploaded whole, changes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GroupUpdate {
    /// The group's last entry.
    pub last: Seq,
    /// Sorted by block, disjoint.
    pub extents: Vec<GroupExtent>,
    /// Ranges (first block, number of blocks) whose overlay extents with seq ≤ `last` drop; the
    /// extents' own ranges are taken as touched in any case.
    pub touched: Vec<(BlockNo, u64)>,
}

/// Leaves of the base that map something, by form.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LeafForms {
    /// One run.
    pub run: u64,
    /// Two adjoining runs.
    pub pair: u64,
    /// A list of runs.
    pub runs: u64,
    /// A table of blocks.
    pub table: u64,
}

/// Totals, for status and metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MapStats {
    /// Blocks that the base maps.
    pub mapped_blocks: u64,
    /// Memory of the base, in bytes.
    pub base_bytes: u64,
    /// Leaves of the base.
    pub leaves: LeafForms,
    /// Extents in the overlay.
    pub overlay_extents: u64,
    /// Memory of the overlay, in bytes.
    pub overlay_bytes: u64,
}
