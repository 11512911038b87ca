//! The base map's tree: for each shard a directory of copy-on-write pages of leaves.
//!
//! Invariants:
//! - Leaf `l` belongs to shard `l % 64` and is the shard's leaf `l / 64`; 32 of a shard's leaves make a
//!   page. A page without a mapped leaf is not there.
//! - A page that an image shares is never changed: whoever changes a leaf copies its page first
//!   (`Arc::make_mut`). So an image costs one pointer per 32 leaves, and two images of a volume differ
//!   only where their pages' pointers do.
//! - `Counts` is true for its shard after every call.

use std::sync::Arc;

use super::leaf::{BLOCKS, Leaf};
use super::location::Location;
use super::runs::{Run, RunMaker};
use super::{BaseState, GroupExtent, LeafForms};
use crate::units::{BlockNo, LEAF_BLOCKS};

/// Shards of the maps; each has a lock of its own.
pub(crate) const SHARDS: usize = 64;
/// Leaves in a page.
const PAGE_LEAVES: usize = 32;
/// Leaves of a row: the pages with one number in all shards.
const ROW_LEAVES: u64 = (SHARDS * PAGE_LEAVES) as u64;
/// What the allocator takes for a page: two counters, the leaves, and a block header.
const PAGE_BYTES: usize = (16 + PAGE_LEAVES * size_of::<Leaf>() + 8).next_multiple_of(16);

static EMPTY: Leaf = Leaf::Empty;

type Page = [Leaf; PAGE_LEAVES];

/// Totals of a shard's base leaves.
#[derive(Clone, Copy, Default)]
pub(crate) struct Counts {
    pub(crate) mapped: u64,
    /// Bytes of pages and of the leaves' tables.
    pub(crate) bytes: u64,
    pub(crate) forms: LeafForms,
}

impl Counts {
    fn count(&mut self, leaf: &Leaf, add: bool) {
        let step = |n: &mut u64, by: usize| if add { *n += by as u64 } else { *n -= by as u64 };
        step(&mut self.mapped, leaf.mapped());
        step(&mut self.bytes, leaf.heap_bytes());
        match leaf {
            Leaf::Empty => {}
            Leaf::Run { .. } => step(&mut self.forms.run, 1),
            Leaf::Pair { .. } => step(&mut self.forms.pair, 1),
            Leaf::Runs(_) => step(&mut self.forms.runs, 1),
            Leaf::Table(_) => step(&mut self.forms.table, 1),
        }
    }
}

/// The base leaves of one shard.
#[derive(Clone)]
pub(crate) struct ShardBase {
    pages: Vec<Option<Arc<Page>>>,
    pub(crate) counts: Counts,
}

impl ShardBase {
    pub(crate) fn new(leaves: u64) -> Self {
        Self { pages: vec![None; leaves.div_ceil(ROW_LEAVES) as usize], counts: Counts::default() }
    }

    /// Has room for so many leaves of the volume.
    pub(crate) fn grow(&mut self, leaves: u64) {
        let rows = leaves.div_ceil(ROW_LEAVES) as usize;
        self.pages.resize(rows.max(self.pages.len()), None);
    }

    /// Bytes of everything.
    pub(crate) fn bytes(&self) -> u64 {
        self.counts.bytes + (self.pages.capacity() * size_of::<Option<Arc<Page>>>()) as u64
    }

    pub(crate) fn get(&self, local: usize) -> &Leaf {
        match self.pages.get(local / PAGE_LEAVES) {
            Some(Some(p)) => &p[local % PAGE_LEAVES],
            _ => &EMPTY,
        }
    }

    pub(crate) fn set(&mut self, local: usize, leaf: Leaf) {
        let slot = &mut self.pages[local / PAGE_LEAVES];
        if slot.is_none() {
            if leaf.is_empty() {
                return;
            }
            self.counts.bytes += PAGE_BYTES as u64;
        }
        let page = Arc::make_mut(slot.get_or_insert_with(|| Arc::new(std::array::from_fn(|_| Leaf::Empty))));
        let old = &mut page[local % PAGE_LEAVES];
        self.counts.count(old, false);
        self.counts.count(&leaf, true);
        let emptied = leaf.is_empty();
        *old = leaf;
        if emptied && page.iter().all(Leaf::is_empty) {
            *slot = None;
            self.counts.bytes -= PAGE_BYTES as u64;
        }
    }

    /// Calls `f` with the local number of each leaf in `from..to` that maps something.
    pub(crate) fn mapped_in(&self, from: usize, to: usize, mut f: impl FnMut(usize)) {
        let end = to.div_ceil(PAGE_LEAVES).min(self.pages.len());
        for p in (from / PAGE_LEAVES).min(end)..end {
            let Some(page) = &self.pages[p] else { continue };
            for (i, _) in page.iter().enumerate().filter(|(_, l)| !l.is_empty()) {
                let local = p * PAGE_LEAVES + i;
                if (from..to).contains(&local) {
                    f(local);
                }
            }
        }
    }

    fn same_page(&self, other: &Self, p: usize) -> bool {
        match (self.pages.get(p).and_then(Option::as_ref), other.pages.get(p).and_then(Option::as_ref)) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            _ => false,
        }
    }
}

/// Shard and local number of a leaf.
pub(crate) const fn place(leaf: u64) -> (usize, usize) {
    ((leaf % SHARDS as u64) as usize, (leaf / SHARDS as u64) as usize)
}

/// The whole base map at one moment: cheap to take, cheap to clone, never changed by the maps.
#[derive(Clone)]
pub struct BaseImage {
    shards: Vec<ShardBase>,
    volume_blocks: u64,
}

impl BaseImage {
    /// An image of a volume that maps nothing.
    #[must_use]
    pub fn empty(volume_blocks: u64) -> Self {
        let leaves = volume_blocks.div_ceil(LEAF_BLOCKS);
        Self { shards: vec![ShardBase::new(leaves); SHARDS], volume_blocks }
    }

    pub(crate) const fn from_shards(shards: Vec<ShardBase>, volume_blocks: u64) -> Self {
        Self { shards, volume_blocks }
    }

    pub(crate) fn shard(&self, s: usize) -> &ShardBase {
        &self.shards[s]
    }

    /// Size of the volume in blocks.
    #[must_use]
    pub const fn volume_blocks(&self) -> u64 {
        self.volume_blocks
    }

    /// Number of mapped blocks.
    #[must_use]
    pub fn mapped_blocks(&self) -> u64 {
        self.shards.iter().map(|s| s.counts.mapped).sum()
    }

    /// Where a block is.
    #[must_use]
    pub fn lookup(&self, block: BlockNo) -> BaseState {
        BaseState::from_raw(self.leaf(block.0 / LEAF_BLOCKS).get((block.0 % LEAF_BLOCKS) as usize))
    }

    /// All that is mapped, in order, each run as long as it can be within its leaf.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.leaves(0..u64::MAX).flat_map(|(l, leaf)| {
            let mut runs = Vec::new();
            leaf.stretches(0, BLOCKS, |first, len, raw| {
                let block = BlockNo(l * LEAF_BLOCKS + first as u64);
                runs.push(Run { block, blocks: len as u32, to: Location::from_raw(raw) });
            });
            runs
        })
    }

    /// What is mapped of `blocks` blocks from `block` on, as [`Self::runs`].
    #[must_use]
    pub fn runs_of(&self, block: BlockNo, blocks: u64) -> Vec<Run> {
        let (start, end) = (block.0, block.0 + blocks);
        let mut runs = Vec::new();
        for (l, leaf) in self.leaves(start / LEAF_BLOCKS..end.div_ceil(LEAF_BLOCKS)) {
            let base = l * LEAF_BLOCKS;
            let (from, to) = (start.max(base) - base, end.min(base + LEAF_BLOCKS) - base);
            leaf.stretches(from as usize, to as usize, |first, len, raw| {
                let block = BlockNo(base + first as u64);
                runs.push(Run { block, blocks: len as u32, to: Location::from_raw(raw) });
            });
        }
        runs
    }

    pub(crate) const fn leaf_count(&self) -> u64 {
        self.volume_blocks.div_ceil(LEAF_BLOCKS)
    }

    pub(crate) fn leaf(&self, leaf: u64) -> &Leaf {
        let (s, local) = place(leaf);
        self.shards[s].get(local)
    }

    pub(crate) fn set_leaf(&mut self, leaf: u64, to: Leaf) {
        let (s, local) = place(leaf);
        self.shards[s].set(local, to);
    }

    /// The leaves in `range` that map something, in order.
    pub(crate) fn leaves(&self, range: std::ops::Range<u64>) -> impl Iterator<Item = (u64, &Leaf)> {
        let (mut next, end) = (range.start, range.end.min(self.leaf_count()));
        std::iter::from_fn(move || {
            while next < end {
                if next.is_multiple_of(ROW_LEAVES) {
                    let row = (next / ROW_LEAVES) as usize;
                    if self.shards.iter().all(|s| s.pages[row].is_none()) {
                        next += ROW_LEAVES;
                        continue;
                    }
                }
                let (l, leaf) = (next, self.leaf(next));
                next += 1;
                if !leaf.is_empty() {
                    return Some((l, leaf));
                }
            }
            None
        })
    }

    /// The same map of a volume of another size: what lies behind a nearer end is left out. A larger one shares its pages.
    #[must_use]
    pub fn resized(&self, volume_blocks: u64) -> Self {
        if volume_blocks >= self.volume_blocks {
            let mut new = Self { shards: self.shards.clone(), volume_blocks };
            let leaves = new.leaf_count();
            new.shards.iter_mut().for_each(|s| s.grow(leaves));
            return new;
        }
        let mut new = Self::empty(volume_blocks);
        for (l, leaf) in self.leaves(0..new.leaf_count()) {
            let end = (volume_blocks - l * LEAF_BLOCKS).min(LEAF_BLOCKS) as usize;
            let kept =
                if leaf.end() <= end { leaf.clone() } else { leaf.update(std::iter::once((end, BLOCKS - end, 0))) };
            new.set_leaf(l, kept);
        }
        new
    }

    /// What turns `old` into `new`: the fewest runs, in order. Shared pages cost nothing.
    #[must_use]
    pub fn diff(old: &Self, new: &Self) -> Vec<Run> {
        let mut out = RunMaker::default();
        let leaves = old.leaf_count().max(new.leaf_count());
        for row in 0..leaves.div_ceil(ROW_LEAVES) {
            let changed = Self::changed_shards(old, new, row);
            if !changed.contains(&true) {
                continue;
            }
            for l in row * ROW_LEAVES..((row + 1) * ROW_LEAVES).min(leaves) {
                let (a, b) = (old.leaf(l), new.leaf(l));
                if !changed[place(l).0] || a.same(b) {
                    continue;
                }
                for (i, (from, to)) in a.flat().into_iter().zip(b.flat()).enumerate() {
                    if from != to {
                        let block = BlockNo(l * LEAF_BLOCKS + i as u64);
                        out.push(Run { block, blocks: 1, to: Location::from_raw(to) });
                    }
                }
            }
        }
        out.done()
    }

    /// Of each shard, whether its page of this row is not the same one in both.
    pub(super) fn changed_shards(old: &Self, new: &Self, row: u64) -> [bool; SHARDS] {
        std::array::from_fn(|s| !old.shards[s].same_page(&new.shards[s], row as usize))
    }

    /// The leaves of a row, in order.
    pub(super) fn leaves_of_row(&self, row: u64) -> std::ops::Range<u64> {
        row * ROW_LEAVES..((row + 1) * ROW_LEAVES).min(self.leaf_count())
    }

    /// Rows of leaves, for [`Self::changes_in_row`].
    pub(crate) const fn rows(&self) -> u64 {
        self.leaf_count().div_ceil(ROW_LEAVES)
    }

    /// Tells what one row of leaves names in `old` and not, or no more, in `new` (`false`), and the other way round (`true`): each
    /// stretch by its first location and its blocks. What is in both may be told of both ways. Shared pages cost nothing.
    pub(crate) fn changes_in_row(old: &Self, new: &Self, row: u64, mut tell: impl FnMut(Location, u32, bool)) {
        let mut all = |leaf: &Leaf, come: bool| {
            leaf.stretches(0, BLOCKS, |_, len, raw| {
                if let Some(at) = Location::from_raw(raw) {
                    tell(at, len as u32, come);
                }
            });
        };
        for (a, b) in old.shards.iter().zip(&new.shards) {
            if a.same_page(b, row as usize) {
                continue;
            }
            for local in row as usize * PAGE_LEAVES..(row as usize + 1) * PAGE_LEAVES {
                let (a, b) = (a.get(local), b.get(local));
                if !a.same(b) {
                    // What comes is counted first: nothing is ever less than none.
                    all(b, true);
                    all(a, false);
                }
            }
        }
    }

    /// Lays runs over the image, in turn.
    ///
    /// # Panics
    /// When a run ends past the volume or past its chunk.
    pub fn apply_runs(&mut self, runs: &[Run]) {
        for r in runs {
            assert!(r.end() <= self.volume_blocks, "a run of blocks ends inside the volume");
            assert!(r.to.is_none_or(|t| u64::from(r.blocks) <= t.room()), "a run of blocks ends inside its chunk");
        }
        let mut rest = runs;
        while let Some(r) = rest.first() {
            let l = r.block.0 / LEAF_BLOCKS;
            let leaf = l * LEAF_BLOCKS..(l + 1) * LEAF_BLOCKS;
            // Runs that lie in this leaf are laid in one go; one that leaves it is cut.
            let n = rest.iter().take_while(|r| leaf.contains(&r.block.0) && r.end() <= leaf.end).count();
            if n == 0 {
                self.apply_long(*r);
                rest = &rest[1..];
                continue;
            }
            let ops = rest[..n].iter().map(|r| {
                let first = (r.block.0 % LEAF_BLOCKS) as usize;
                (first, r.blocks as usize, r.to.map_or(0, Location::raw))
            });
            let leaf = self.leaf(l).update(ops);
            self.set_leaf(l, leaf);
            rest = &rest[n..];
        }
    }

    /// Lays a group's extents over the image: at attach, for the groups that are newer than the checkpoint.
    ///
    /// # Panics
    /// As [`Self::apply_runs`].
    pub fn apply_extents(&mut self, extents: &[GroupExtent]) {
        let mut runs = Vec::with_capacity(extents.len());
        for e in extents {
            let mut done = 0;
            while done < e.blocks {
                let blocks = u32::try_from(e.blocks - done).unwrap_or(u32::MAX);
                // Only an unmapping is longer than a chunk; `apply_runs` refuses anything else.
                runs.push(Run { block: BlockNo(e.block.0 + done), blocks, to: e.to });
                done += u64::from(blocks);
            }
        }
        self.apply_runs(&runs);
    }

    /// A run over more than one leaf.
    fn apply_long(&mut self, r: Run) {
        let (start, end) = (r.block.0, r.end());
        for l in start / LEAF_BLOCKS..end.div_ceil(LEAF_BLOCKS) {
            let (a, b) = (start.max(l * LEAF_BLOCKS), end.min((l + 1) * LEAF_BLOCKS));
            if r.to.is_none() && self.leaf(l).is_empty() {
                continue;
            }
            let raw = r.to.map_or(0, |t| t.raw() + (a - start));
            let op = ((a - l * LEAF_BLOCKS) as usize, (b - a) as usize, raw);
            let leaf = self.leaf(l).update(std::iter::once(op));
            self.set_leaf(l, leaf);
        }
    }
}

impl std::fmt::Debug for BaseImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BaseImage({} of {} blocks mapped)", self.mapped_blocks(), self.volume_blocks)
    }
}
