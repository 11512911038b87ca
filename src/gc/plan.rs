//! Which chunks are deleted, and which are emptied.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use super::Policy;
use super::usage::{Chunk, Holes, Space, Usage, packed};
use crate::units::ChunkNo;

/// Live blocks that are copied in one go…
pub const BATCH_BLOCKS: u64 = 4 * CHUNK_BLOCKS;
/// …and of what lives no more than this part of it, or a chunk: until what was copied is deleted it is there twice.
const BATCH_PART: u64 = 16;
const CHUNK_BLOCKS: u64 = crate::chunk::header::MAX_BLOCKS as u64;
/// Chunks that are emptied in one go.
pub const BATCH_CHUNKS: usize = 64;
/// Chunks of discards alone that are let be; of more the discards are put together.
const MARKS: usize = 16;
/// A batch is worth its requests when it frees this share of what it writes, or more: one part in…
const WORTH: u64 = 16;

/// What a round may do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// To be deleted.
    pub dead: Vec<ChunkNo>,
    /// To be emptied first: what lives of them, so many blocks, and the discards that they record, are to be copied.
    pub victims: Vec<(ChunkNo, u32)>,
    /// They are chunks of discards alone.
    pub is_marks: bool,
}

/// What stands in the way of a batch.
#[derive(Debug, Clone, Default)]
pub struct Bounds {
    /// The last chunk number that counts: of the published map that was counted, or below.
    pub last: ChunkNo,
    /// Chunks that were emptied since, by the last number of the batch that their blocks went to.
    pub moved: HashMap<ChunkNo, ChunkNo>,
    /// Chunks that could not be deleted lately.
    pub refused: HashMap<ChunkNo, Duration>,
    /// So many chunks of discards alone could not be made fewer.
    pub marks: usize,
}

/// Live blocks that are copied at most before what they were copied from is deleted, of so many that live.
#[must_use]
pub fn batch_blocks(live: u64) -> u64 {
    (live / BATCH_PART).clamp(CHUNK_BLOCKS, BATCH_BLOCKS)
}

/// Plans a batch.
#[must_use]
pub fn plan(usage: &Usage, held: &HashSet<ChunkNo>, bounds: &Bounds, policy: &Policy) -> Plan {
    let mut plan = Plan::default();
    let mut sparse: Vec<(ChunkNo, Chunk)> = Vec::new();
    let mut marks: Vec<(ChunkNo, u32)> = Vec::new();
    let mut left = left_over(usage, held, bounds);
    for (n, c) in usage.stored(bounds.last) {
        if held.contains(&n) || c.stuck || bounds.moved.contains_key(&n) || bounds.refused.contains_key(&n) {
            continue;
        }
        match (c.live, c.holes) {
            (0, Holes::None) => {
                left.garbage = left.garbage.saturating_sub(c.size());
                plan.dead.push(n);
            }
            (0, _) if c.is_marks() => marks.push((n, 0)),
            _ => sparse.push((n, *c)),
        }
    }
    // The emptiest first; of equals the oldest, which has had the longest time to be overwritten.
    sparse.sort_unstable_by(|(a, x), (b, y)| {
        let (p, q) = (u64::from(x.live) * y.size(), u64::from(y.live) * x.size());
        p.cmp(&q).then(a.cmp(b))
    });
    let allowed = (left.live as f64 * policy.stop) as u64 + policy.slack_blocks;
    let most = batch_blocks(left.live);
    let (mut live, mut size, mut freed) = (0, 0, 0);
    for (n, c) in sparse {
        let all_dead = c.live == 0;
        if !all_dead && left.garbage.saturating_sub(freed) <= allowed {
            break;
        }
        if live + u64::from(c.live) > most || plan.victims.len() >= BATCH_CHUNKS {
            break;
        }
        live += u64::from(c.live);
        size += c.size();
        freed = size.saturating_sub(packed(live));
        plan.victims.push((n, c.live));
    }
    if freed * WORTH < packed(live) {
        plan.victims.retain(|v| v.1 == 0);
    }
    // Discards that cannot be told in few chunks are let be until there are twice as many.
    if plan.victims.is_empty() && marks.len() > MARKS.max(2 * bounds.marks) {
        plan.victims = marks.into_iter().take(BATCH_CHUNKS).collect();
        plan.is_marks = true;
    }
    plan
}

/// The totals as they will be when what was emptied is gone.
fn left_over(usage: &Usage, held: &HashSet<ChunkNo>, bounds: &Bounds) -> Space {
    let mut space = usage.space(held, bounds.last);
    for (_, c) in usage.stored(bounds.last).filter(|(n, _)| bounds.moved.contains_key(n)) {
        space.garbage = space.garbage.saturating_sub(c.size().saturating_sub(packed(u64::from(c.live))));
    }
    space
}

/// Whether there is so much garbage that a round should begin.
#[must_use]
pub fn is_due(garbage: u64, live: u64, policy: &Policy) -> bool {
    policy.enabled && garbage as f64 > live as f64 * policy.start + policy.slack_blocks as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::{BaseImage, Location, Run};
    use crate::units::BlockNo;

    /// A volume of `chunks` full chunks, of which each has its first blocks alive.
    fn volume(live: &[u32]) -> Usage {
        let blocks = 1016 * live.len() as u64;
        let mut image = BaseImage::empty(blocks);
        let mut usage = Usage::new(blocks);
        for (i, n) in live.iter().enumerate() {
            let chunk = ChunkNo(i as u64 + 1);
            usage.add(chunk, 1016, Holes::None);
            if *n > 0 {
                let to = Some(Location::new(0, chunk, 0));
                image.apply_runs(&[Run { block: BlockNo(i as u64 * 1016), blocks: *n, to }]);
            }
        }
        for row in 0..usage.rows(&image) {
            usage.count_row(&image, row);
        }
        usage.counted(image);
        usage
    }

    fn policy() -> Policy {
        Policy { slack_blocks: 0, ..Policy::default() }
    }

    fn none() -> HashSet<ChunkNo> {
        HashSet::new()
    }

    fn until(last: u64) -> Bounds {
        Bounds { last: ChunkNo(last), ..Bounds::default() }
    }

    fn dead(p: &Plan) -> Vec<u64> {
        p.dead.iter().map(|n| n.0).collect()
    }

    fn victims(p: &Plan) -> Vec<u64> {
        p.victims.iter().map(|n| n.0.0).collect()
    }

    #[test]
    fn the_dead_go_and_the_emptiest_are_emptied_until_it_is_enough() {
        let u = volume(&[1016, 0, 600, 900, 100, 1016, 1016]);
        let p = plan(&u, &none(), &until(7), &policy());
        assert_eq!(dead(&p), [2]);
        // Without the dead chunk there is garbage of 0.31 of what lives: nothing else has to go.
        assert_eq!(victims(&p), [0; 0]);
        let p = plan(&u, &none(), &until(7), &policy().thorough());
        assert_eq!(victims(&p), [5, 3], "no more than a chunk's worth of so small a volume at once");
        assert_eq!([0, 1 << 15, 1 << 20].map(batch_blocks), [CHUNK_BLOCKS, 1 << 11, BATCH_BLOCKS]);
    }

    #[test]
    fn what_is_held_or_newer_than_the_map_stays() {
        let u = volume(&[0, 0, 10, 10]);
        let held = HashSet::from([ChunkNo(1), ChunkNo(3)]);
        let p = plan(&u, &held, &until(3), &policy());
        assert_eq!((dead(&p), victims(&p)), (vec![2], vec![]));
        let p = plan(&u, &none(), &Bounds { moved: HashMap::from([(ChunkNo(4), ChunkNo(9))]), ..until(4) }, &policy());
        assert_eq!((dead(&p), victims(&p)), (vec![1, 2], vec![3]));
    }

    #[test]
    fn discards_outlive_the_chunk_that_records_them() {
        let mut u = volume(&[0, 1016]);
        u.set_holes(ChunkNo(1), Holes::Unknown);
        let p = plan(&u, &none(), &until(2), &policy());
        assert_eq!((dead(&p), victims(&p)), (vec![], vec![1]));
    }

    #[test]
    fn chunks_of_discards_are_put_together_when_there_are_many() {
        let mut u = volume(&[1016]);
        for n in 2..=17 {
            u.add(ChunkNo(n), 0, Holes::Some);
        }
        assert_eq!(plan(&u, &none(), &until(99), &policy().thorough()), Plan::default());
        u.add(ChunkNo(18), 0, Holes::Some);
        assert_eq!(plan(&u, &none(), &until(99), &policy()).victims.len(), 17);
        // They could not be made fewer: not again before there are many more.
        let few = Bounds { marks: 17, ..until(99) };
        assert_eq!(plan(&u, &none(), &few, &policy()), Plan::default());
        (19..=36).for_each(|n| u.add(ChunkNo(n), 0, Holes::Some));
        assert!(plan(&u, &none(), &few, &policy()).is_marks);
    }

    #[test]
    fn nothing_is_done_for_nothing() {
        // All is alive: nothing to gain, however small the chunks are.
        let u = volume(&[1016, 1016]);
        assert_eq!(plan(&u, &none(), &until(2), &policy().thorough()), Plan::default());
        let mut u = volume(&[1016, 10]);
        u.add(ChunkNo(2), 10, Holes::None);
        assert_eq!(plan(&u, &none(), &until(2), &policy().thorough()), Plan::default());
    }

    #[test]
    fn a_count_changes_by_what_differs() {
        let mut u = volume(&[1016, 0]);
        let mut image = u.image().clone();
        let to = Some(Location::new(0, ChunkNo(2), 7));
        image.apply_runs(&[Run { block: BlockNo(100), blocks: 50, to }]);
        for row in 0..u.rows(&image) {
            u.count_row(&image, row);
        }
        u.counted(image);
        let live: Vec<u32> = u.stored(ChunkNo(9)).map(|(_, c)| c.live).collect();
        assert_eq!(live, [966, 50]);
    }
}
