//! How much of each chunk the map still names.
//!
//! Invariants:
//! - `live` is counted of one image, the one that [`Usage::count_row`] has come to the end of: it changes by what differs between two
//!   images, so a count costs what was written since, not what there is.
//! - Totals are sums over what is known to be in the store.

use std::collections::{BTreeMap, HashSet};

use crate::chunk::header::MAX_BLOCKS;
use crate::map::{BaseImage, Location};
use crate::units::{BLOCK, ChunkNo};

/// What a chunk's header takes in the store, in blocks.
pub const HEADER_BLOCKS: u64 = 8;

/// Whether a chunk records discards that would be forgotten with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holes {
    /// Its header was not looked at.
    Unknown,
    /// It records none, or they are recorded elsewhere too.
    None,
    /// It does.
    Some,
}

/// A chunk of the volume's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Blocks that it stores; `None` when it is not known to be in the store.
    pub stored: Option<u16>,
    /// Blocks of it that the map names.
    pub live: u32,
    /// See there.
    pub holes: Holes,
    /// It cannot be read whole, and stays.
    pub stuck: bool,
}

impl Chunk {
    const UNKNOWN: Self = Self { stored: None, live: 0, holes: Holes::Unknown, stuck: false };

    /// What it takes in the store, in blocks.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.stored.map_or(0, |n| u64::from(n) + HEADER_BLOCKS)
    }

    /// Whether it stores no block, only discards.
    #[must_use]
    pub fn is_marks(&self) -> bool {
        self.stored == Some(0)
    }
}

/// What so many live blocks would take if they were packed well.
#[must_use]
pub const fn packed(live: u64) -> u64 {
    live + HEADER_BLOCKS * live.div_ceil(MAX_BLOCKS as u64)
}

/// Space in the store, in blocks, headers included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Space {
    /// The volume's size.
    pub logical: u64,
    /// Blocks that the map names.
    pub mapped: u64,
    /// Those of them that are in chunks of the volume's parents.
    pub shared: u64,
    /// All chunks of the volume's own.
    pub stored: u64,
    /// Blocks of them that the map names.
    pub live: u64,
    /// What snapshots, or chunks that cannot be emptied, keep and the map does not name.
    pub held: u64,
    /// What nobody needs.
    pub garbage: u64,
}

impl Space {
    /// The same in bytes.
    #[must_use]
    pub const fn in_bytes(self) -> Self {
        let n = BLOCK as u64;
        Self {
            logical: self.logical * n,
            mapped: self.mapped * n,
            shared: self.shared * n,
            stored: self.stored * n,
            live: self.live * n,
            held: self.held * n,
            garbage: self.garbage * n,
        }
    }
}

/// See the module's page.
#[derive(Debug)]
pub struct Usage {
    image: BaseImage,
    chunks: BTreeMap<ChunkNo, Chunk>,
    /// Blocks that the map names in chunks of the volume's parents.
    inherited: u64,
}

impl Usage {
    /// Of a map that names nothing.
    #[must_use]
    pub fn new(volume_blocks: u64) -> Self {
        Self { image: BaseImage::empty(volume_blocks), chunks: BTreeMap::new(), inherited: 0 }
    }

    /// A chunk is in the store.
    pub fn add(&mut self, chunk: ChunkNo, stored: u16, holes: Holes) {
        let c = self.chunks.entry(chunk).or_insert(Chunk::UNKNOWN);
        c.stored = Some(stored);
        if holes != Holes::Unknown {
            c.holes = holes;
        }
    }

    /// A chunk is gone.
    pub fn remove(&mut self, chunk: ChunkNo) {
        if let Some(c) = self.chunks.get_mut(&chunk) {
            c.stored = None;
            if c.live == 0 {
                self.chunks.remove(&chunk);
            }
        }
    }

    /// A chunk cannot be emptied.
    pub fn set_stuck(&mut self, chunk: ChunkNo) {
        self.chunks.entry(chunk).or_insert(Chunk::UNKNOWN).stuck = true;
    }

    /// What its discards are is known now.
    pub fn set_holes(&mut self, chunk: ChunkNo, holes: Holes) {
        if let Some(c) = self.chunks.get_mut(&chunk) {
            c.holes = holes;
        }
    }

    /// The map that is counted.
    #[must_use]
    pub const fn image(&self) -> &BaseImage {
        &self.image
    }

    /// Rows that [`Self::count_row`] has to be called for.
    #[must_use]
    pub fn rows(&self, new: &BaseImage) -> u64 {
        self.image.rows().max(new.rows())
    }

    /// Counts a part of the difference; after the last row, call [`Self::counted`].
    pub fn count_row(&mut self, new: &BaseImage, row: u64) {
        let (chunks, inherited) = (&mut self.chunks, &mut self.inherited);
        BaseImage::changes_in_row(&self.image, new, row, |at, blocks, come| {
            if at.source() != 0 {
                *inherited = if come { *inherited + u64::from(blocks) } else { *inherited - u64::from(blocks) };
                return;
            }
            let c = chunks.entry(at.chunk()).or_insert(Chunk::UNKNOWN);
            c.live = if come { c.live + blocks } else { c.live - blocks };
        });
    }

    /// All rows of `new` have been counted.
    pub fn counted(&mut self, new: BaseImage) {
        self.image = new;
        self.chunks.retain(|_, c| c.stored.is_some() || c.live > 0);
    }

    /// The chunks that are in the store, with numbers up to `last`, in order.
    pub fn stored(&self, last: ChunkNo) -> impl Iterator<Item = (ChunkNo, &Chunk)> {
        self.chunks.range(..=last).filter(|(_, c)| c.stored.is_some()).map(|(n, c)| (*n, c))
    }

    /// Totals of the chunks with numbers up to `last`.
    #[must_use]
    pub fn space(&self, held: &HashSet<ChunkNo>, last: ChunkNo) -> Space {
        let mut s = Space {
            logical: self.image.volume_blocks(),
            mapped: self.image.mapped_blocks(),
            shared: self.inherited,
            ..Space::default()
        };
        for (n, c) in self.chunks.range(..=last) {
            s.stored += c.size();
            s.live += u64::from(c.live);
            if held.contains(n) || c.stuck {
                s.held += c.size().saturating_sub(packed(u64::from(c.live)));
            }
        }
        s.garbage = s.stored.saturating_sub(packed(s.live) + s.held);
        s
    }
}

/// The chunks of the volume's own that an image names, in order.
#[must_use]
pub fn named_by(image: &BaseImage) -> Vec<ChunkNo> {
    let own = |at: Location| (at.source() == 0).then(|| at.chunk());
    let mut all: Vec<ChunkNo> = Vec::new();
    for chunk in image.runs().filter_map(|r| r.to.and_then(own)) {
        if all.last() != Some(&chunk) {
            all.push(chunk);
        }
        // Where the map jumps between chunks the list would be as long as the map.
        if all.len() > 1 << 20 && all.len().is_power_of_two() {
            all.sort_unstable();
            all.dedup();
        }
    }
    all.sort_unstable();
    all.dedup();
    all
}
