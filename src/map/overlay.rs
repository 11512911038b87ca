//! A leaf of the overlay: which of its 4096 sectors are newest in the log, and where.
//!
//! Invariants:
//! - Extents are sorted by start, do not overlap and lie inside the leaf.
//! - A sector's extent is that of the newest entry that covers it: entries come in seq order, and
//!   each takes the place of what it covers.
//! - Neighbours of one entry that adjoin in both sectors and log blocks are one extent.

use crate::units::{LEAF_SECTORS, SECTORS_PER_BLOCK};

/// Sectors in a leaf.
pub(crate) const SECTORS: u16 = LEAF_SECTORS as u16;
/// The log block of a hole.
const HOLE: u32 = u32::MAX;

/// Sectors `start .. start + len` of the leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) start: u16,
    pub(crate) len: u16,
    /// Log block that holds the first sector, or [`HOLE`].
    blk: u32,
    pub(crate) seq: u64,
}

const _: () = assert!(size_of::<Extent>() == 16);

impl Extent {
    /// Data whose first sector lies in log block `blk`, which is not `u32::MAX`.
    pub(crate) const fn data(start: u16, len: u16, blk: u32, seq: u64) -> Self {
        assert!(blk != HOLE, "the log's last addressable block is never used");
        Self { start, len, blk, seq }
    }

    pub(crate) const fn hole(start: u16, len: u16, seq: u64) -> Self {
        Self { start, len, blk: HOLE, seq }
    }

    pub(crate) const fn end(&self) -> u16 {
        self.start + self.len
    }

    /// The log block of the first sector, `None` for a hole.
    pub(crate) const fn log_block(&self) -> Option<u32> {
        if self.blk == HOLE { None } else { Some(self.blk) }
    }

    /// The part in `from..to`, which must meet the extent.
    pub(crate) const fn part(&self, from: u16, to: u16) -> Self {
        let start = if from > self.start { from } else { self.start };
        let end = if to < self.end() { to } else { self.end() };
        let blk = if self.blk == HOLE { HOLE } else { self.blk + block_of(start) - block_of(self.start) };
        Self { start, len: end - start, blk, seq: self.seq }
    }

    /// Whether `next` adjoins and goes on with the same entry.
    const fn joins(&self, next: &Self) -> bool {
        self.end() == next.start
            && self.seq == next.seq
            && (self.blk == HOLE) == (next.blk == HOLE)
            && (self.blk == HOLE || self.blk + block_of(next.start) - block_of(self.start) == next.blk)
    }
}

const fn block_of(sector: u16) -> u32 {
    sector as u32 / SECTORS_PER_BLOCK as u32
}

/// See the module's page.
#[derive(Default)]
pub(crate) struct LeafOverlay {
    extents: Vec<Extent>,
}

impl LeafOverlay {
    pub(crate) fn extents(&self) -> &[Extent] {
        &self.extents
    }

    pub(crate) const fn heap_bytes(&self) -> usize {
        self.extents.capacity() * size_of::<Extent>()
    }

    /// Lays a newer extent over what is there.
    pub(crate) fn insert(&mut self, mut new: Extent) {
        let x = &mut self.extents;
        let mut i = x.partition_point(|e| e.end() <= new.start);
        let mut j = i + x[i..].partition_point(|e| e.start < new.end());
        let mut parts = [new; 3];
        let mut n = 0;
        if i < j && x[i].start < new.start {
            parts[n] = x[i].part(0, new.start);
            n += 1;
        }
        let after = (i < j && x[j - 1].end() > new.end()).then(|| x[j - 1].part(new.end(), SECTORS));
        if n == 0 && i > 0 && x[i - 1].joins(&new) {
            i -= 1;
            new = Extent { len: x[i].len + new.len, ..x[i] };
        }
        if after.is_none() && j < x.len() && new.joins(&x[j]) {
            new.len += x[j].len;
            j += 1;
        }
        parts[n] = new;
        n += 1;
        if let Some(e) = after {
            parts[n] = e;
            n += 1;
        }
        if j - i == n {
            x[i..j].copy_from_slice(&parts[..n]);
        } else {
            if x.capacity() == 0 {
                x.reserve_exact(n);
            }
            x.splice(i..j, parts[..n].iter().copied());
        }
    }

    /// Lays a hole under what is there: only sectors without an extent take it.
    pub(crate) fn insert_below(&mut self, start: u16, end: u16, seq: u64) {
        let mut gaps = Vec::new();
        self.walk(start, end, |from, to, e| {
            if e.is_none() {
                gaps.push(Extent::hole(from, to - from, seq));
            }
        });
        for g in gaps {
            self.insert(g);
        }
    }

    /// Calls `f(from, to, extent)` for each stretch of `start..end`, in order; between extents, `None`.
    pub(crate) fn walk(&self, start: u16, end: u16, mut f: impl FnMut(u16, u16, Option<&Extent>)) {
        let mut at = start;
        let i = self.extents.partition_point(|e| e.end() <= start);
        for e in self.extents[i..].iter().take_while(|e| e.start < end) {
            if at < e.start {
                f(at, e.start, None);
            }
            let to = e.end().min(end);
            f(at.max(e.start), to, Some(e));
            at = to;
        }
        if at < end {
            f(at, end, None);
        }
    }

    /// Drops what is of `last` or older inside `ranges` (sorted, disjoint, in sectors).
    pub(crate) fn drop_through(&mut self, ranges: &[(u16, u16)], last: u64) {
        let old = |e: &Extent| e.seq <= last;
        if !self.extents.iter().any(old) {
            return;
        }
        let mut kept = Vec::with_capacity(self.extents.len());
        for e in &self.extents {
            if !old(e) {
                kept.push(*e);
                continue;
            }
            let mut at = e.start;
            let first = ranges.partition_point(|r| r.1 <= e.start);
            for &(from, to) in ranges[first..].iter().take_while(|r| r.0 < e.end()) {
                if at < from {
                    kept.push(e.part(at, from));
                }
                at = to;
            }
            if at < e.end() {
                kept.push(e.part(at, e.end()));
            }
        }
        kept.shrink_to_fit();
        self.extents = kept;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(x: &[Extent]) -> LeafOverlay {
        let mut l = LeafOverlay::default();
        for e in x {
            l.insert(*e);
        }
        l
    }

    #[test]
    fn a_newer_extent_splits_and_trims() {
        let mut l = leaf(&[Extent::data(4, 40, 100, 1), Extent::data(60, 8, 200, 2)]);
        l.insert(Extent::data(15, 2, 300, 3));
        l.insert(Extent::hole(40, 24, 4));
        let want = [
            Extent::data(4, 11, 100, 1),
            Extent::data(15, 2, 300, 3),
            // Sector 17 is in the third block of the entry, whose first sector is 4.
            Extent::data(17, 23, 102, 1),
            Extent::hole(40, 24, 4),
            Extent::data(64, 4, 201, 2),
        ];
        assert_eq!(l.extents(), want);
        l.insert(Extent::hole(0, SECTORS, 5));
        assert_eq!(l.extents(), [Extent::hole(0, SECTORS, 5)]);
    }

    #[test]
    fn only_one_entry_s_neighbours_join() {
        let l = leaf(&[Extent::data(0, 12, 7, 1), Extent::data(12, 4, 8, 1)]);
        assert_eq!(l.extents(), [Extent::data(0, 16, 7, 1)]);
        let l = leaf(&[Extent::data(12, 4, 8, 1), Extent::data(0, 12, 7, 1)]);
        assert_eq!(l.extents(), [Extent::data(0, 16, 7, 1)]);
        assert_eq!(leaf(&[Extent::data(0, 8, 7, 1), Extent::data(8, 8, 8, 2)]).extents().len(), 2);
        assert_eq!(leaf(&[Extent::data(0, 8, 7, 1), Extent::data(8, 8, 9, 1)]).extents().len(), 2);
        assert_eq!(leaf(&[Extent::data(0, 8, 7, 1), Extent::hole(8, 8, 1)]).extents().len(), 2);
    }

    #[test]
    fn dropping_keeps_the_newer_and_what_lies_outside() {
        let mut l = leaf(&[Extent::data(0, 64, 10, 1), Extent::data(16, 8, 50, 3)]);
        l.drop_through(&[(8, 32), (40, 48)], 2);
        let want = [
            Extent::data(0, 8, 10, 1),
            Extent::data(16, 8, 50, 3),
            Extent::data(32, 8, 14, 1),
            Extent::data(48, 16, 16, 1),
        ];
        assert_eq!(l.extents(), want);
        l.drop_through(&[(0, SECTORS)], 3);
        assert!(l.extents().is_empty());
        assert_eq!(l.heap_bytes(), 0);
    }

    #[test]
    fn a_hole_below_fills_the_gaps_only() {
        let mut l = leaf(&[Extent::data(8, 8, 1, 9)]);
        l.insert_below(4, 20, 3);
        assert_eq!(l.extents(), [Extent::hole(4, 4, 3), Extent::data(8, 8, 1, 9), Extent::hole(16, 4, 3)]);
    }
}
