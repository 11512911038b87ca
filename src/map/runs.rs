//! Stretches of the volume by what they map to: what deltas are made of.

use super::location::Location;
use crate::units::BlockNo;

/// A stretch of the volume whose mapping is, or becomes, one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first block.
    pub block: BlockNo,
    /// Number of blocks, at least one.
    pub blocks: u32,
    /// `None`: unmapped. Some: consecutive indices from there.
    pub to: Option<Location>,
}

impl Run {
    /// The block after the last.
    pub(crate) const fn end(&self) -> u64 {
        self.block.0 + self.blocks as u64
    }

    /// What of it lies in `from..end`, which overlaps it.
    fn part(&self, from: u64, end: u64) -> Self {
        let (from, end) = (from.max(self.block.0), end.min(self.end()));
        // Less than a run's blocks, which a chunk's index can count.
        let to = self.to.map(|t| t.plus((from - self.block.0) as u16));
        Self { block: BlockNo(from), blocks: (end - from) as u32, to }
    }
}

/// Gathers stretches, which come in order, into the fewest runs.
#[derive(Default)]
pub(super) struct RunMaker(Vec<Run>);

impl RunMaker {
    pub(super) fn push(&mut self, r: Run) {
        if let Some(last) = self.0.last_mut()
            && last.end() == r.block.0
            && let Some(blocks) = last.blocks.checked_add(r.blocks)
        {
            let goes_on = match (last.to, r.to) {
                (Some(a), Some(b)) => a.leads_to(last.blocks.into(), b),
                (None, None) => true,
                _ => false,
            };
            if goes_on {
                last.blocks = blocks;
                return;
            }
        }
        self.0.push(r);
    }

    pub(super) fn done(self) -> Vec<Run> {
        self.0
    }
}

/// The runs that change what `old` changes first and `new` then. Both are sorted by block and disjoint, and so is what comes out.
#[must_use]
pub fn laid_over(old: &[Run], new: &[Run]) -> Vec<Run> {
    let mut out = RunMaker::default();
    let (mut rest, mut from) = (old, 0);
    // With one behind the end of everything.
    let gaps = new.iter().map(|n| (n.block.0, Some(n))).chain([(u64::MAX, None)]);
    for (until, n) in gaps {
        while let Some(o) = rest.first().filter(|o| o.block.0 < until) {
            if from < o.end().min(until) {
                out.push(o.part(from, until));
            }
            if o.end() > until {
                break;
            }
            rest = &rest[1..];
        }
        if let Some(n) = n {
            out.push(*n);
            from = n.end();
        }
    }
    out.done()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::map::BaseImage;
    use crate::units::ChunkNo;

    const BLOCKS: u64 = 700;

    /// Sorted and disjoint, over more than one leaf; long ones unmap.
    fn runs() -> impl Strategy<Value = Vec<Run>> {
        let run = (0..60_u64, 1..40_u32, proptest::option::of((1..4_u64, 0..100_u16)));
        proptest::collection::vec(run, 0..40).prop_map(|parts| {
            let mut at = 0;
            let mut out = Vec::new();
            for (gap, blocks, to) in parts {
                let block = at + gap / 3;
                at = block + u64::from(blocks);
                if at > BLOCKS {
                    break;
                }
                let to = to.map(|(chunk, index)| Location::new(0, ChunkNo(chunk), index));
                out.push(Run { block: BlockNo(block), blocks, to });
            }
            out
        })
    }

    proptest! {
        #[test]
        fn two_deltas_make_one(base in runs(), a in runs(), b in runs()) {
            let mut full = BaseImage::empty(BLOCKS);
            full.apply_runs(&base);
            let both = laid_over(&a, &b);
            prop_assert!(both.windows(2).all(|w| w[0].end() <= w[1].block.0), "sorted and disjoint: {:?}", both);
            let (mut one, mut two) = (full.clone(), full);
            one.apply_runs(&both);
            two.apply_runs(&a);
            two.apply_runs(&b);
            prop_assert_eq!(BaseImage::diff(&one, &two), vec![]);
        }
    }

    #[test]
    fn what_lies_under_a_run_is_cut_and_what_adjoins_is_joined() {
        let at = |i| Some(Location::new(0, ChunkNo(1), i));
        let run = |block, blocks, to| Run { block: BlockNo(block), blocks, to };
        let old = [run(0, 10, at(0)), run(20, 5, None)];
        assert_eq!(laid_over(&old, &[]), old);
        assert_eq!(laid_over(&[], &old), old);
        let new = [run(3, 2, None), run(10, 10, None)];
        let want = [run(0, 3, at(0)), run(3, 2, None), run(5, 5, at(5)), run(10, 15, None)];
        assert_eq!(laid_over(&old, &new), want);
        assert_eq!(laid_over(&want, &[run(3, 2, at(3))]), [run(0, 10, at(0)), run(10, 15, None)]);
        assert_eq!(laid_over(&want, &[run(0, 100, None)]), [run(0, 100, None)]);
    }
}
