//! What is not the same in two maps of one volume.
//!
//! Invariants:
//! - What is told is in order and disjoint, and all of it: a block of the second map that is not told of is where the first one says.
//! - Nothing is told of what lies behind the second map's end. Behind the first one's end there is nothing.
//! - Shared pages cost nothing; of all others one leaf of either map at a time is spread out.

use super::image::{BaseImage, place};
use super::leaf::Leaf;
use super::location::Location;
use crate::units::{BlockNo, LEAF_BLOCKS};

/// Blocks that the two maps place differently, each side at consecutive locations, or nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The first block.
    pub block: BlockNo,
    /// Number of blocks, at least one.
    pub blocks: u32,
    /// Where the first map has them.
    pub from: Option<Location>,
    /// Where the second map has them. Not both are `None`.
    pub to: Option<Location>,
}

/// What has become of a stretch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    /// There is data that was not there before.
    Data,
    /// There was data, and it is gone.
    Zero,
}

/// A stretch that has changed, as long as it can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The first block.
    pub block: BlockNo,
    /// Number of blocks, at least one.
    pub blocks: u64,
    /// What it is now.
    pub kind: ChangeKind,
}

impl Change {
    /// The block after the last.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.block.0 + self.blocks
    }
}

impl BaseImage {
    /// Where `new` differs from `old`, in order.
    pub fn differences<'a>(old: &'a Self, new: &'a Self) -> impl Iterator<Item = Difference> + 'a {
        (0..new.rows()).flat_map(|row| Self::changed_leaves(old, new, row)).flat_map(|l| {
            let first = l * LEAF_BLOCKS;
            let blocks = (new.volume_blocks() - first).min(LEAF_BLOCKS) as usize;
            leaf_differences(first, blocks, old.leaf(l), new.leaf(l))
        })
    }

    /// What has changed from `old` to `new`, in order, in the fewest stretches.
    pub fn changes<'a>(old: &'a Self, new: &'a Self) -> impl Iterator<Item = Change> + 'a {
        let mut all = Self::differences(old, new).map(|d| Change {
            block: d.block,
            blocks: d.blocks.into(),
            kind: if d.to.is_some() { ChangeKind::Data } else { ChangeKind::Zero },
        });
        let mut next = all.next();
        std::iter::from_fn(move || {
            let mut c = next.take()?;
            for d in all.by_ref() {
                if d.block.0 != c.end() || d.kind != c.kind {
                    next = Some(d);
                    break;
                }
                c.blocks += d.blocks;
            }
            Some(c)
        })
    }

    /// The leaves of a row that may differ, in order.
    fn changed_leaves(old: &Self, new: &Self, row: u64) -> impl Iterator<Item = u64> {
        let changed = Self::changed_shards(old, new, row);
        new.leaves_of_row(row).filter(move |l| changed[place(*l).0])
    }
}

fn leaf_differences(first: u64, blocks: usize, old: &Leaf, new: &Leaf) -> Vec<Difference> {
    let mut out: Vec<Difference> = Vec::new();
    if old.same(new) {
        return out;
    }
    for (i, (from, to)) in old.flat().into_iter().zip(new.flat()).enumerate().take(blocks) {
        if from == to {
            continue;
        }
        let (block, from, to) = (first + i as u64, Location::from_raw(from), Location::from_raw(to));
        let goes_on = |d: &Difference| {
            let n = u64::from(d.blocks);
            d.block.0 + n == block && leads(d.from, n, from) && leads(d.to, n, to)
        };
        match out.last_mut().filter(|d| goes_on(d)) {
            Some(d) => d.blocks += 1,
            None => out.push(Difference { block: BlockNo(block), blocks: 1, from, to }),
        }
    }
    out
}

/// Whether `then` is `n` blocks further on than `first`, where nowhere is followed by nowhere.
fn leads(first: Option<Location>, n: u64, then: Option<Location>) -> bool {
    match (first, then) {
        (Some(a), Some(b)) => a.leads_to(n, b),
        (None, None) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::map::Run;
    use crate::units::ChunkNo;

    /// More than a row of leaves, and ends inside a leaf.
    const LARGE: u64 = 2050 * LEAF_BLOCKS + 77;

    /// Block and length, chunk (0: unmapped) and index.
    type Op = (u64, u32, u64, u16);

    fn ops(most: usize) -> impl Strategy<Value = Vec<Op>> {
        // Near the ends of leaf, row and volume, and near each other.
        let block = prop_oneof![0u64..1600, LARGE - 40 - 3 * LEAF_BLOCKS..LARGE - 40];
        prop::collection::vec((block, 1u32..40, 0u64..4, 0u16..40), 0..most)
    }

    fn apply(map: &mut BaseImage, flat: &mut BTreeMap<u64, Location>, ops: &[Op]) {
        for &(block, blocks, chunk, index) in ops {
            let end = map.volume_blocks();
            let blocks = u64::from(blocks).min(end.saturating_sub(block)) as u32;
            if blocks == 0 {
                continue;
            }
            let to = (chunk > 0).then(|| Location::new(0, ChunkNo(chunk), index));
            map.apply_runs(&[Run { block: BlockNo(block), blocks, to }]);
            for i in 0..blocks {
                match to {
                    Some(to) => flat.insert(block + u64::from(i), to.plus(i as u16)),
                    None => flat.remove(&(block + u64::from(i))),
                };
            }
        }
    }

    proptest! {
        #[test]
        fn a_difference_is_what_a_flat_array_says(
            before in ops(30), after in ops(12), sizes in (0usize..3, 0usize..3), share in any::<bool>(),
        ) {
            let size = |i: usize| [1000, LARGE, LARGE - 30][i];
            let (mut old, mut was) = (BaseImage::empty(size(sizes.0)), BTreeMap::new());
            apply(&mut old, &mut was, &before);
            // Grown from the old one, with pages that both have; or like it, but nothing is shared.
            let (mut new, mut now) = (BaseImage::empty(size(sizes.1)), BTreeMap::new());
            if share && sizes.0 == sizes.1 {
                (new, now) = (old.clone(), was.clone());
            } else {
                apply(&mut new, &mut now, &before);
            }
            apply(&mut new, &mut now, &after);

            let mut told = BTreeMap::new();
            let mut end = 0;
            for d in BaseImage::differences(&old, &new) {
                prop_assert!(d.blocks > 0 && d.block.0 >= end, "{:?} after {}", d, end);
                end = d.block.0 + u64::from(d.blocks);
                for i in 0..d.blocks {
                    told.insert(d.block.0 + u64::from(i), (d.from.map(|l| l.plus(i as u16)), d.to.map(|l| l.plus(i as u16))));
                }
            }
            let all: std::collections::BTreeSet<u64> = was.keys().chain(now.keys()).copied().filter(|b| *b < size(sizes.1)).collect();
            let at = |map: &BTreeMap<u64, Location>, b: &u64| map.get(b).copied();
            let want: BTreeMap<_, _> =
                all.iter().map(|b| (*b, (at(&was, b), at(&now, b)))).filter(|(_, (a, b))| a != b).collect();
            prop_assert_eq!(&told, &want);

            let mut kinds = BTreeMap::new();
            let mut last: Option<Change> = None;
            for c in BaseImage::changes(&old, &new) {
                if let Some(l) = last {
                    prop_assert!(c.block.0 > l.end() || c.block.0 == l.end() && c.kind != l.kind, "{:?}, then {:?}", l, c);
                }
                last = Some(c);
                (c.block.0..c.end()).for_each(|b| { kinds.insert(b, c.kind); });
            }
            let kind = |to: Option<Location>| if to.is_some() { ChangeKind::Data } else { ChangeKind::Zero };
            prop_assert_eq!(kinds, want.iter().map(|(b, (_, to))| (*b, kind(*to))).collect::<BTreeMap<_, _>>());
        }
    }
}
