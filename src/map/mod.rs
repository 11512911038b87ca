//! The maps: for each sector of the volume, where its newest content is.
//!
//! Two layers. The *overlay* says what is newest in the log, by sector; the *base* says which block of
//! which chunk holds the rest, by block. Both are cut into leaves of 2 MiB, and leaf `l` belongs to
//! shard `l % 64`, whose one lock covers both layers. Nothing here waits, does I/O or reads a clock.
//!
//! Invariants:
//! - The overlay is the state of a prefix of the log: [`Maps::apply_entry`] is called in seq order, by one
//!   caller at a time, and each entry takes the place of what it covers.
//! - A sector without an overlay extent reads as the base says; a block without a location reads as zeros.
//! - A lookup and its pins are one step under the leaf's lock; so are, for each leaf, the base's change and
//!   the overlay's drop when a group applies. So a reader sees the old or the new state of a leaf,
//!   and what it was given stays readable while it holds its pins.
//! - A hole is kept only in a leaf that has something to hide: an extent in the overlay or a location in
//!   the base. This is sound, since what a later group brings to the base has, until that very step,
//!   its entries in the overlay. It holds only when the base is known: until the first
//!   [`Maps::load_base`] or [`Maps::apply_group`], holes are kept in a list of their own (the *early
//!   holes*) as well, and `load_base` lays those under the overlay, above the base.
//! - Locks are taken in the order: early holes, one shard.
//!
//! # Memory
//! With M mapped blocks, H leaves in an allocated form (`Runs`, `Table`; see `leaf.rs` for the forms), P
//! touched pages (32 leaves of one shard, 64 apart) and a volume of V leaves, the base takes at most
//! `8 M + 32 H + 800 P + 512 ceil(V / 2048)` bytes, counters of `Arc` and the allocator's block headers and rounding
//! included: where a row of 2048 leaves is in use, 8 bytes per mapped block + 58 per touched leaf, so at most 8.12
//! bytes per mapped block for full leaves however random. A sequential leaf is 24 bytes. An overlay
//! extent is 16 bytes, its leaf about 50.

mod builder;
mod changes;
pub mod checkpoint;
mod image;
mod leaf;
mod location;
mod moves;
mod overlay;
mod pieces;
mod runs;
#[cfg(test)]
mod tests;
mod types;
mod words;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::units::{BlockNo, LEAF_BLOCKS, LEAF_SECTORS, Lba, SECTORS_PER_BLOCK, Seq};
use image::{SHARDS, ShardBase, place};
use overlay::{Extent, LeafOverlay};
use pieces::Pieces;

pub use builder::ImageBuilder;
pub use changes::{Change, ChangeKind, Difference};
pub use image::BaseImage;
pub use location::{Location, MAX_CHUNK, MAX_SOURCE};
pub use moves::Move;
pub use runs::{Run, laid_over};
pub use types::{
    BaseState, Entry, EntryKind, GroupExtent, GroupUpdate, LeafForms, LogBlock, MapStats, Piece, PinLog, Source,
};

/// Up to so many leaves are visited one by one; of a wider range, only those that hold something.
const NARROW: u64 = 32;

/// Spreads leaf numbers; they need no protection against chosen collisions, the low bits being distinct.
#[derive(Default)]
struct LeafHasher(u64);

impl Hasher for LeafHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u32(u32::from(b));
        }
    }
    fn write_u32(&mut self, n: u32) {
        self.0 = (self.0 ^ u64::from(n)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// Both layers of a shard's leaves, by the leaf's number within the shard.
struct Shard {
    overlay: HashMap<u32, LeafOverlay, BuildHasherDefault<LeafHasher>>,
    extents: u64,
    heap_bytes: u64,
    base: ShardBase,
}

impl Shard {
    /// Changes a leaf's overlay and keeps the totals; a leaf left empty goes.
    fn change(&mut self, local: usize, f: impl FnOnce(&mut LeafOverlay)) {
        let key = local as u32;
        let o = self.overlay.entry(key).or_default();
        self.extents -= o.extents().len() as u64;
        self.heap_bytes -= o.heap_bytes() as u64;
        f(o);
        self.extents += o.extents().len() as u64;
        self.heap_bytes += o.heap_bytes() as u64;
        if o.extents().is_empty() {
            self.overlay.remove(&key);
            if self.overlay.capacity() > 1024 && self.overlay.len() * 8 < self.overlay.capacity() {
                self.overlay.shrink_to(self.overlay.len() * 2);
            }
        }
    }

    fn has_overlay(&self, local: usize) -> bool {
        self.overlay.contains_key(&(local as u32))
    }

    /// The shard's leaves in `from..to` that hold something in either layer (some may come twice).
    fn leaves_in(&self, from: usize, to: usize, mut f: impl FnMut(usize)) {
        self.base.mapped_in(from, to, &mut f);
        if to - from < self.overlay.len() {
            (from..to).filter(|&l| self.has_overlay(l)).for_each(f);
        } else {
            self.overlay.keys().map(|&k| k as usize).filter(|l| (from..to).contains(l)).for_each(f);
        }
    }

    fn overlay_bytes(&self) -> u64 {
        // A table keeps an eighth of its slots free and has a control byte for each.
        let slots = self.overlay.capacity() * 8 / 7;
        self.heap_bytes + (slots * (size_of::<(u32, LeafOverlay)>() + 1)) as u64
    }
}

/// A hole that came before the base was known.
struct EarlyHole {
    start: u64,
    end: u64,
    seq: u64,
}

/// See the module's page. Shared by all lanes and store threads.
pub struct Maps {
    shards: Box<[Mutex<Shard>]>,
    early: Mutex<Option<Vec<EarlyHole>>>,
    /// Only grows.
    volume_sectors: AtomicU64,
}

fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic under the lock aborts the process; a test that catches one may still look.
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Maps {
    /// Maps of a volume that holds nothing, with a base that is not known yet (third invariant).
    #[must_use]
    pub fn new(volume_sectors: u64) -> Self {
        let leaves = volume_sectors.div_ceil(LEAF_SECTORS);
        let shard = || Shard { overlay: HashMap::default(), extents: 0, heap_bytes: 0, base: ShardBase::new(leaves) };
        Self {
            shards: (0..SHARDS).map(|_| Mutex::new(shard())).collect(),
            early: Mutex::new(Some(Vec::new())),
            volume_sectors: volume_sectors.into(),
        }
    }

    /// Size of the volume in sectors.
    #[must_use]
    pub fn volume_sectors(&self) -> u64 {
        self.volume_sectors.load(Ordering::Acquire)
    }

    /// Makes the volume larger; what is new holds nothing. As with [`Maps::base_image`], nothing else changes the base meanwhile.
    ///
    /// # Panics
    /// When it would become smaller.
    pub fn grow(&self, volume_sectors: u64) {
        assert!(volume_sectors >= self.volume_sectors(), "maps do not shrink");
        for shard in &self.shards {
            locked(shard).base.grow(volume_sectors.div_ceil(LEAF_SECTORS));
        }
        self.volume_sectors.store(volume_sectors, Ordering::Release);
    }

    /// Size of the volume in blocks, the last of which may be a part.
    fn volume_blocks(&self) -> u64 {
        self.volume_sectors().div_ceil(SECTORS_PER_BLOCK)
    }

    /// Lays an entry over the overlay. Called in seq order, by one caller at a time.
    ///
    /// # Panics
    /// When the entry ends past the volume.
    pub fn apply_entry(&self, e: &Entry) {
        let end = self.checked_end(e.lba, e.sectors);
        match e.kind {
            EntryKind::Data(blk) => self.apply_data(e.lba.0, end, blk, e.seq.0),
            EntryKind::Hole => {
                let mut early = locked(&self.early);
                if let Some(list) = early.as_mut().filter(|_| e.sectors > 0) {
                    list.push(EarlyHole { start: e.lba.0, end, seq: e.seq.0 });
                }
                // Held to the end: `load_base` must see a hole whole, in the list and in the overlay.
                self.apply_hole(e.lba.0, end, e.seq.0);
                drop(early);
            }
        }
    }

    fn apply_data(&self, start: u64, end: u64, blk: LogBlock, seq: u64) {
        let first_block = start / SECTORS_PER_BLOCK;
        for (leaf, from, to) in leaf_parts(start, end) {
            let block = (leaf * LEAF_SECTORS + u64::from(from)) / SECTORS_PER_BLOCK;
            // An entry's area lies in the log, whose block numbers fit.
            let at = blk.0 + (block - first_block) as u32;
            let (s, local) = place(leaf);
            locked(&self.shards[s]).change(local, |o| o.insert(Extent::data(from, to - from, at, seq)));
        }
    }

    fn apply_hole(&self, start: u64, end: u64, seq: u64) {
        for leaf in self.worthwhile(start, end) {
            let (from, to) = part_of(leaf, start, end);
            let (s, local) = place(leaf);
            let mut shard = locked(&self.shards[s]);
            if shard.has_overlay(local) || !shard.base.get(local).is_empty() {
                shard.change(local, |o| o.insert(Extent::hole(from, to - from, seq)));
            }
        }
    }

    /// The leaves that sectors `start..end` meet and that may hold something, in order. Wide ranges cost
    /// what they hold, not what they span.
    fn worthwhile(&self, start: u64, end: u64) -> Vec<u64> {
        if start >= end {
            return Vec::new();
        }
        let (first, last) = (start / LEAF_SECTORS, (end - 1) / LEAF_SECTORS);
        if last - first < NARROW {
            return (first..=last).collect();
        }
        let mut leaves = Vec::new();
        for s in 0..SHARDS as u64 {
            let n = SHARDS as u64;
            let (from, to) = ((first + n - 1 - s) / n, (last + n - s) / n);
            let shard = locked(&self.shards[s as usize]);
            shard.leaves_in(from as usize, to as usize, |local| leaves.push(local as u64 * n + s));
        }
        leaves.sort_unstable();
        leaves.dedup();
        leaves
    }

    /// Appends to `out` where `sectors` sectors from `lba` are: pieces that cover the range exactly, in
    /// order, merged where contiguous. Pieces in the log are pinned, each once, at its block; so these are merged
    /// within a leaf of 2 MiB only, while its lock is held.
    ///
    /// # Panics
    /// When the range ends past the volume.
    pub fn lookup(&self, lba: Lba, sectors: u64, pins: &impl PinLog, out: &mut Vec<Piece>) {
        let mut pieces = Pieces { own: out.len(), out };
        for (leaf, from, to) in leaf_parts(lba.0, self.checked_end(lba, sectors)) {
            let (s, local) = place(leaf);
            let start = leaf * LEAF_SECTORS;
            let shard = locked(&self.shards[s]);
            let base = shard.base.get(local);
            let Some(overlay) = shard.overlay.get(&(local as u32)) else {
                pieces.base(start, from, to, base);
                continue;
            };
            overlay.walk(from, to, |from, to, e| {
                let Some(e) = e else { return pieces.base(start, from, to, base) };
                let e = e.part(from, to);
                let what = match e.log_block() {
                    Some(blk) => {
                        pins.pin(LogBlock(blk));
                        Source::Log { blk: LogBlock(blk), seq: Seq(e.seq) }
                    }
                    None => Source::Zero,
                };
                pieces.push(start + u64::from(from), to - from, what);
            });
        }
    }

    /// Whether the overlay alone answers for the whole range: each sector is in the log, or under a hole there.
    /// What may be read while the base is not known yet.
    ///
    /// # Panics
    /// When the range ends past the volume.
    #[must_use]
    pub fn overlay_covers(&self, lba: Lba, sectors: u64) -> bool {
        let early = locked(&self.early);
        let mut gaps = Vec::new();
        for (leaf, from, to) in leaf_parts(lba.0, self.checked_end(lba, sectors)) {
            let (s, local) = place(leaf);
            let start = leaf * LEAF_SECTORS;
            let mut gap = |from: u16, to: u16| gaps.push((start + u64::from(from), start + u64::from(to)));
            match locked(&self.shards[s]).overlay.get(&(local as u32)) {
                None => gap(from, to),
                Some(o) => o.walk(from, to, |from, to, e| {
                    if e.is_none() {
                        gap(from, to);
                    }
                }),
            }
        }
        for h in early.iter().flatten() {
            if gaps.is_empty() {
                break;
            }
            let left = |&(a, b): &(u64, u64)| [(a, b.min(h.start)), (a.max(h.end), b)];
            gaps = gaps.iter().flat_map(left).filter(|(a, b)| a < b).collect();
        }
        gaps.is_empty()
    }

    /// A group is in the store, whole: the base takes its locations and the overlay drops what they hold,
    /// leaf by leaf, each in one step. One caller at a time.
    ///
    /// # Panics
    /// When a range ends past the volume, or a run of locations past its chunk.
    pub fn apply_group(&self, g: &GroupUpdate) {
        // From here on the base is known: there was none to load.
        *locked(&self.early) = None;
        let touched = self.touched(g);
        let mut leaves = Vec::new();
        for &(start, end) in &touched {
            leaves.append(&mut self.worthwhile(start * SECTORS_PER_BLOCK, end * SECTORS_PER_BLOCK));
        }
        for e in g.extents.iter().filter(|e| e.to.is_some() && e.blocks > 0) {
            leaves.extend(e.block.0 / LEAF_BLOCKS..(e.block.0 + e.blocks).div_ceil(LEAF_BLOCKS));
        }
        leaves.sort_unstable();
        leaves.dedup();
        let (mut x, mut t) = (0, 0);
        for leaf in leaves {
            let (start, end) = (leaf * LEAF_BLOCKS, (leaf + 1) * LEAF_BLOCKS);
            x += g.extents[x..].iter().take_while(|e| e.block.0 + e.blocks <= start).count();
            t += touched[t..].iter().take_while(|r| r.1 <= start).count();
            let ops = g.extents[x..].iter().take_while(|e| e.block.0 < end && e.blocks > 0).map(|e| {
                let (a, b) = (e.block.0.max(start), (e.block.0 + e.blocks).min(end));
                ((a - start) as usize, (b - a) as usize, e.to.map_or(0, |t| t.raw() + (a - e.block.0)))
            });
            let spb = SECTORS_PER_BLOCK;
            let ranges: Vec<(u16, u16)> = touched[t..]
                .iter()
                .take_while(|r| r.0 < end)
                .map(|r| (((r.0.max(start) - start) * spb) as u16, ((r.1.min(end) - start) * spb) as u16))
                .collect();
            let (s, local) = place(leaf);
            let mut shard = locked(&self.shards[s]);
            let old = shard.base.get(local);
            if !old.is_empty() || ops.clone().any(|op| op.2 != 0) {
                let new = old.update(ops);
                shard.base.set(local, new);
            }
            if shard.has_overlay(local) {
                shard.change(local, |o| o.drop_through(&ranges, g.last.0));
            }
        }
    }

    /// The group's ranges in blocks, checked, sorted and joined.
    fn touched(&self, g: &GroupUpdate) -> Vec<(u64, u64)> {
        for e in &g.extents {
            assert!(e.to.is_none_or(|t| e.blocks <= t.room()), "a group's run of blocks ends inside its chunk");
        }
        assert!(
            g.extents.windows(2).all(|w| w[0].block.0 + w[0].blocks <= w[1].block.0),
            "a group's extents are sorted and disjoint"
        );
        let ranges = g.touched.iter().copied().chain(g.extents.iter().map(|e| (e.block, e.blocks)));
        let mut all: Vec<(u64, u64)> = ranges.filter(|r| r.1 > 0).map(|(b, n)| (b.0, b.0 + n)).collect();
        all.sort_unstable();
        all.dedup_by(|next, last| {
            let joined = next.0 <= last.1;
            if joined {
                last.1 = last.1.max(next.1);
            }
            joined
        });
        assert!(all.last().is_none_or(|r| r.1 <= self.volume_blocks()), "a group's blocks lie inside the volume");
        all
    }

    /// Drops the whole overlay up to `seq`: at attach, when the base is loaded and its last entry is known.
    pub fn drop_overlay_through(&self, seq: Seq) {
        if let Some(list) = locked(&self.early).as_mut() {
            list.retain(|h| h.seq > seq.0);
        }
        for shard in &self.shards {
            let mut shard = locked(shard);
            let all: Vec<u32> = shard.overlay.keys().copied().collect();
            for local in all {
                shard.change(local as usize, |o| o.drop_through(&[(0, overlay::SECTORS)], seq.0));
            }
        }
    }

    /// The base as it is now: pointer copies, one for each 32 leaves. Callers see to it that no
    /// [`Maps::apply_group`] or [`Maps::load_base`] runs meanwhile.
    #[must_use]
    pub fn base_image(&self) -> BaseImage {
        let shards = self.shards.iter().map(|s| locked(s).base.clone()).collect();
        BaseImage::from_shards(shards, self.volume_blocks())
    }

    /// Replaces the base, which is known from now on. Entries applied before, holes among them, stay above it.
    ///
    /// The image is the volume at the end of its last complete group, where the log goes on: groups
    /// newer than the checkpoint are laid over the image first ([`BaseImage::apply_extents`]). Given to
    /// [`Maps::apply_group`] afterwards instead, they would come out on top of holes that are newer.
    ///
    /// # Panics
    /// When the image is of a larger volume.
    pub fn load_base(&self, img: &BaseImage) {
        assert!(img.volume_blocks() <= self.volume_blocks(), "the base's image fits the volume");
        let grown;
        let img = if img.leaf_count() == self.volume_blocks().div_ceil(LEAF_BLOCKS) {
            img
        } else {
            // The volume has grown since: the directories get their full length.
            grown = img.resized(self.volume_blocks());
            &grown
        };
        let mut early = locked(&self.early);
        // Newest first: where holes overlap, the newest one stays. Over a base that is not there yet
        // they change nothing that a reader sees.
        for h in early.take().unwrap_or_default().iter().rev() {
            for (leaf, _) in img.leaves(h.start / LEAF_SECTORS..h.end.div_ceil(LEAF_SECTORS)) {
                let (from, to) = part_of(leaf, h.start, h.end);
                let (s, local) = place(leaf);
                locked(&self.shards[s]).change(local, |o| o.insert_below(from, to, h.seq));
            }
        }
        for (s, shard) in self.shards.iter().enumerate() {
            locked(shard).base = img.shard(s).clone();
        }
        drop(early);
    }

    /// Where the base, without the overlay, has a block.
    #[must_use]
    pub fn base_lookup(&self, block: BlockNo) -> BaseState {
        let (s, local) = place(block.0 / LEAF_BLOCKS);
        let raw = locked(&self.shards[s]).base.get(local).get((block.0 % LEAF_BLOCKS) as usize);
        BaseState::from_raw(raw)
    }

    /// Totals over the shards.
    #[must_use]
    pub fn stats(&self) -> MapStats {
        let mut t = MapStats::default();
        for shard in &self.shards {
            let s = locked(shard);
            t.mapped_blocks += s.base.counts.mapped;
            t.base_bytes += s.base.bytes();
            t.leaves.run += s.base.counts.forms.run;
            t.leaves.pair += s.base.counts.forms.pair;
            t.leaves.runs += s.base.counts.forms.runs;
            t.leaves.table += s.base.counts.forms.table;
            t.overlay_extents += s.extents;
            t.overlay_bytes += s.overlay_bytes();
        }
        t
    }

    /// The end of a range, which must lie in the volume.
    fn checked_end(&self, lba: Lba, sectors: u64) -> u64 {
        let end = lba.0.checked_add(sectors).filter(|&end| end <= self.volume_sectors());
        end.expect("a range of sectors lies inside the volume")
    }
}

impl std::fmt::Debug for Maps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Maps({:?})", self.stats())
    }
}

/// The part of sectors `start..end` that lies in a leaf, in sectors of the leaf.
fn part_of(leaf: u64, start: u64, end: u64) -> (u16, u16) {
    let at = leaf * LEAF_SECTORS;
    (start.saturating_sub(at) as u16, (end - at).min(LEAF_SECTORS) as u16)
}

/// Sectors `start..end` cut at leaves: leaf, first sector and end inside it.
fn leaf_parts(start: u64, end: u64) -> impl Iterator<Item = (u64, u16, u16)> {
    let leaves = if start < end { start / LEAF_SECTORS..end.div_ceil(LEAF_SECTORS) } else { 0..0 };
    leaves.map(move |l| {
        let (from, to) = part_of(l, start, end);
        (l, from, to)
    })
}
