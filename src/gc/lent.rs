//! What the map of a clone names of its parents' chunks.

use std::collections::BTreeMap;

use super::scan::GiveWay;
use crate::map::BaseImage;
use crate::units::ChunkNo;

/// Runs of a map that are looked at before others have their turn.
const RUNS: usize = 4096;

/// A chunk of a parent's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lent {
    /// Whose it is, as the map counts sources.
    pub source: u8,
    /// Its number.
    pub chunk: ChunkNo,
    /// Blocks of it that the map names.
    pub blocks: u32,
}

/// All of them, by source and number; gives way to others now and then.
pub async fn lent(image: &BaseImage) -> Vec<Lent> {
    let mut found: BTreeMap<(u8, ChunkNo), u32> = BTreeMap::new();
    for (i, run) in image.runs().enumerate() {
        if let Some(at) = run.to.filter(|at| at.source() != 0) {
            *found.entry((at.source(), at.chunk())).or_default() += run.blocks;
        }
        if i % RUNS == RUNS - 1 {
            GiveWay::once().await;
        }
    }
    found.into_iter().map(|((source, chunk), blocks)| Lent { source, chunk, blocks }).collect()
}

/// Takes from the end of `todo` what is copied in one go: chunks of one parent, of `most_blocks` in all unless it is a single one.
pub fn batch(todo: &mut Vec<Lent>, most_blocks: u64, most_chunks: usize) -> Vec<Lent> {
    let (mut blocks, mut count) = (0, 0);
    let source = todo.last().map(|l| l.source);
    for l in todo.iter().rev() {
        blocks += u64::from(l.blocks);
        if Some(l.source) != source || count == most_chunks || count > 0 && blocks > most_blocks {
            break;
        }
        count += 1;
    }
    todo.split_off(todo.len() - count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::{Location, Run};
    use crate::units::BlockNo;

    #[tokio::test]
    async fn what_others_have_is_found_and_taken_in_batches() {
        let mut image = BaseImage::empty(4096);
        let run = |block, blocks, source, chunk| Run {
            block: BlockNo(block),
            blocks,
            to: Some(Location::new(source, ChunkNo(chunk), 0)),
        };
        image.apply_runs(&[
            run(0, 10, 1, 7),
            run(20, 5, 0, 7),
            run(30, 3, 2, 7),
            run(40, 4, 1, 7),
            run(50, 100, 1, 8),
            run(200, 1, 1, 9),
        ]);
        let mut todo = lent(&image).await;
        let l = |source, chunk, blocks| Lent { source, chunk: ChunkNo(chunk), blocks };
        assert_eq!(todo, [l(1, 7, 14), l(1, 8, 100), l(1, 9, 1), l(2, 7, 3)]);
        assert_eq!(batch(&mut todo, 50, 9), [l(2, 7, 3)]);
        assert_eq!(batch(&mut todo, 50, 9), [l(1, 9, 1)]);
        assert_eq!(batch(&mut todo, 50, 9), [l(1, 8, 100)], "one is taken however large it is");
        todo.push(l(1, 8, 1));
        assert_eq!(batch(&mut todo, 50, 1), [l(1, 8, 1)]);
        assert_eq!(batch(&mut todo, 50, 9), [l(1, 7, 14)]);
        assert_eq!(batch(&mut todo, 50, 9), []);
    }
}
