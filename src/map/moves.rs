//! Blocks that garbage collection has put elsewhere.

use super::image::place;
use super::{Location, Maps, locked};
use crate::units::{BlockNo, LEAF_BLOCKS};

/// A block's content lies in a second place, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// The block.
    pub block: BlockNo,
    /// Where it was read.
    pub from: Location,
    /// Where it is as well.
    pub to: Location,
}

impl Maps {
    /// Has the base name the new places of blocks that it still names at their old ones; others have been overwritten or discarded
    /// meanwhile, and stay. `moves` are sorted by block. Returns how many it has changed.
    ///
    /// As [`Maps::apply_group`]: one caller at a time, and the base is known.
    ///
    /// # Panics
    /// When a block lies past the volume.
    pub fn move_blocks(&self, moves: &[Move]) -> u64 {
        let mut moved = 0;
        for in_leaf in moves.chunk_by(|a, b| a.block.0 / LEAF_BLOCKS == b.block.0 / LEAF_BLOCKS) {
            let leaf = in_leaf[0].block.0 / LEAF_BLOCKS;
            assert!(leaf * LEAF_BLOCKS < self.volume_blocks(), "a block that is moved lies inside the volume");
            let (s, local) = place(leaf);
            let mut shard = locked(&self.shards[s]);
            let old = shard.base.get(local);
            let index = |m: &Move| (m.block.0 % LEAF_BLOCKS) as usize;
            let ops: Vec<(usize, usize, u64)> = in_leaf
                .iter()
                .filter(|m| old.get(index(m)) == m.from.raw())
                .map(|m| (index(m), 1, m.to.raw()))
                .collect();
            if !ops.is_empty() {
                moved += ops.len() as u64;
                let new = old.update(ops.iter().copied());
                shard.base.set(local, new);
            }
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::{BaseState, GroupExtent, GroupUpdate};
    use crate::units::{ChunkNo, SECTORS_PER_BLOCK, Seq};

    #[test]
    fn only_what_the_map_still_names_moves() {
        let maps = Maps::new(4 * LEAF_BLOCKS * SECTORS_PER_BLOCK);
        let old = |i| Location::new(0, ChunkNo(1), i);
        let new = |i| Location::new(0, ChunkNo(9), i);
        let extents = vec![
            GroupExtent { block: BlockNo(510), blocks: 4, to: Some(old(0)) },
            GroupExtent { block: BlockNo(600), blocks: 1, to: Some(old(4).damaged()) },
        ];
        maps.apply_group(&GroupUpdate { last: Seq(1), extents, ..GroupUpdate::default() });
        let other = Location::new(0, ChunkNo(2), 0);
        let extents = vec![
            GroupExtent { block: BlockNo(511), blocks: 1, to: Some(other) },
            GroupExtent { block: BlockNo(513), blocks: 1, to: None },
        ];
        maps.apply_group(&GroupUpdate { last: Seq(2), extents, ..GroupUpdate::default() });
        let mut moves: Vec<Move> =
            (0..4).map(|i| Move { block: BlockNo(510 + u64::from(i)), from: old(i), to: new(i) }).collect();
        moves.push(Move { block: BlockNo(600), from: old(4).damaged(), to: new(4).damaged() });
        assert_eq!(maps.move_blocks(&moves), 3);
        let at = |b| maps.base_lookup(BlockNo(b));
        assert_eq!([at(510), at(512)], [BaseState::At(new(0)), BaseState::At(new(2))]);
        assert_eq!([at(511), at(513)], [BaseState::At(other), BaseState::Unmapped]);
        assert_eq!(at(600), BaseState::At(new(4).damaged()));
        assert_eq!(maps.move_blocks(&moves), 0, "twice is once");
    }
}
