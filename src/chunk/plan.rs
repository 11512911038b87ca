//! What a group of log entries comes to: per block, the newest version inside the group's own range.
//!
//! Pure: it sees entries, never data. It is given the entries of (a, b] and nothing newer, so that the
//! store holds a prefix of the volume's writes.

use std::collections::BTreeMap;
use std::ops::Bound;

use crate::units::{BlockNo, SECTORS_PER_BLOCK};
use crate::wal::codec::RecordKind;
use crate::wal::log::LogEntry;

/// One step of a group, in block order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// Blocks that read as zeros from now on.
    Hole {
        /// First block.
        block: BlockNo,
        /// How many.
        blocks: u64,
    },
    /// Whole blocks of one write, stored one after the other in the log.
    Run {
        /// First block.
        block: BlockNo,
        /// How many.
        blocks: u32,
        /// Block of the log file that holds the first.
        file_block: u32,
    },
    /// One block made of several writes, or of a part of one.
    Mixed {
        /// The block.
        block: BlockNo,
        /// Its parts, in order, without overlap.
        parts: Vec<MixedPart>,
    },
}

/// Sectors of one block from one write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MixedPart {
    /// First sector within the block.
    pub from: u8,
    /// Sector after the last.
    pub to: u8,
    /// Block of the log file that holds them; `None`: zeros.
    pub file_block: Option<u32>,
}

impl Item {
    /// First block and number of blocks.
    #[must_use]
    pub const fn range(&self) -> (BlockNo, u64) {
        match self {
            Self::Hole { block, blocks } => (*block, *blocks),
            Self::Run { block, blocks, .. } => (*block, *blocks as u64),
            Self::Mixed { block, .. } => (*block, 1),
        }
    }
}

/// Whether these parts cover the whole block.
#[must_use]
pub fn covers_block(parts: &[MixedPart]) -> bool {
    let mut at = 0;
    for p in parts {
        if p.from != at {
            return false;
        }
        at = p.to;
    }
    u64::from(at) == SECTORS_PER_BLOCK
}

/// Lays the entries over each other, in order, and cuts the result at block boundaries.
#[must_use]
pub fn plan(entries: &[LogEntry]) -> Vec<Item> {
    // Sector ranges: start → (end, index of the entry).
    let mut newest: BTreeMap<u64, (u64, usize)> = BTreeMap::new();
    for (i, e) in entries.iter().enumerate() {
        lay(&mut newest, e.lba.0, e.lba.0 + e.sectors, i);
    }
    let mut items = Vec::with_capacity(newest.len());
    for (start, (end, i)) in newest {
        emit(&mut items, start, end, &entries[i]);
    }
    items
}

fn lay(map: &mut BTreeMap<u64, (u64, usize)>, start: u64, end: u64, i: usize) {
    if let Some((&s, &(e, j))) = map.range(..start).next_back()
        && e > start
    {
        map.insert(s, (start, j));
        if e > end {
            map.insert(end, (e, j));
        }
    }
    while let Some((&s, &(e, j))) = map.range((Bound::Included(start), Bound::Excluded(end))).next() {
        map.remove(&s);
        if e > end {
            map.insert(end, (e, j));
        }
    }
    map.insert(start, (end, i));
}

fn emit(items: &mut Vec<Item>, start: u64, end: u64, e: &LogEntry) {
    let data = e.kind == RecordKind::Data;
    let file_block = |block: u64| e.file_block + (block - e.lba.block().0) as u32;
    let mut at = start;
    while at < end {
        let block = at / SECTORS_PER_BLOCK;
        let from = at % SECTORS_PER_BLOCK;
        let whole = (end - at) / SECTORS_PER_BLOCK;
        if from == 0 && whole > 0 {
            if data {
                items.push(Item::Run { block: BlockNo(block), blocks: whole as u32, file_block: file_block(block) });
            } else {
                push_hole(items, block, whole);
            }
            at += whole * SECTORS_PER_BLOCK;
            continue;
        }
        let to = (from + end - at).min(SECTORS_PER_BLOCK);
        let part = MixedPart { from: from as u8, to: to as u8, file_block: data.then(|| file_block(block)) };
        match items.last_mut() {
            Some(Item::Mixed { block: b, parts }) if b.0 == block => parts.push(part),
            _ => items.push(Item::Mixed { block: BlockNo(block), parts: vec![part] }),
        }
        at += to - from;
    }
}

fn push_hole(items: &mut Vec<Item>, block: u64, blocks: u64) {
    if let Some(Item::Hole { block: b, blocks: n }) = items.last_mut()
        && b.0 + *n == block
    {
        *n += blocks;
        return;
    }
    items.push(Item::Hole { block: BlockNo(block), blocks });
}

/// One chunk to be: its items, with the index of their first stored block.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChunkPlan {
    /// Items with the index of the first block in the chunk (holes: the next index).
    pub items: Vec<(Item, u16)>,
    /// Stored blocks.
    pub blocks: u16,
}

/// Cuts a plan into chunks of at most `max_blocks` stored blocks and `max_extents` items. A group is at least one chunk.
#[must_use]
pub fn split(items: Vec<Item>, max_blocks: u16, max_extents: usize) -> Vec<ChunkPlan> {
    let mut out = Vec::new();
    let mut chunk = ChunkPlan::default();
    for item in items {
        let mut rest = Some(item);
        while let Some(item) = rest.take() {
            if chunk.items.len() >= max_extents || chunk.blocks >= max_blocks && !matches!(item, Item::Hole { .. }) {
                out.push(std::mem::take(&mut chunk));
            }
            let at = chunk.blocks;
            let item = match item {
                Item::Run { block, blocks, file_block } => {
                    let room = u32::from(max_blocks - at);
                    let now = blocks.min(room);
                    if now < blocks {
                        rest = Some(Item::Run {
                            block: BlockNo(block.0 + u64::from(now)),
                            blocks: blocks - now,
                            file_block: file_block + now,
                        });
                    }
                    chunk.blocks += now as u16;
                    Item::Run { block, blocks: now, file_block }
                }
                Item::Mixed { .. } => {
                    chunk.blocks += 1;
                    item
                }
                Item::Hole { .. } => item,
            };
            chunk.items.push((item, at));
        }
    }
    if !chunk.items.is_empty() || out.is_empty() {
        out.push(chunk);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Lba, Seq};
    use proptest::prelude::*;

    fn entry(seq: u64, lba: u64, sectors: u64, file_block: u32, kind: RecordKind) -> LogEntry {
        LogEntry { seq: Seq(seq), lba: Lba(lba), sectors, file_block, kind }
    }

    /// Per sector: the entry that a flat array says is newest, against what the plan says.
    fn check(entries: &[LogEntry], max_blocks: u16, max_extents: usize) {
        let mut flat: Vec<Option<usize>> = vec![None; 2048];
        for (i, e) in entries.iter().enumerate() {
            flat[e.lba.0 as usize..(e.lba.0 + e.sectors) as usize].fill(Some(i));
        }
        let mut seen: Vec<Option<Option<u32>>> = vec![None; 2048];
        let mut last_end = 0;
        for chunk in split(plan(entries), max_blocks, max_extents) {
            let mut stored = 0;
            assert!(chunk.items.len() <= max_extents && chunk.blocks <= max_blocks);
            for (item, index) in &chunk.items {
                let (block, blocks) = item.range();
                assert!(block.0 >= last_end, "sorted and disjoint");
                last_end = block.0 + blocks;
                assert_eq!(*index, stored);
                let mut set = |sector: u64, v: Option<u32>| {
                    assert!(seen[sector as usize].replace(v).is_none(), "sector {sector} twice");
                };
                match item {
                    Item::Hole { .. } => (block.0 * 8..(block.0 + blocks) * 8).for_each(|s| set(s, None)),
                    Item::Run { file_block, .. } => {
                        stored += blocks as u16;
                        (0..blocks * 8).for_each(|s| set(block.0 * 8 + s, Some(file_block + (s / 8) as u32)));
                    }
                    Item::Mixed { parts, .. } => {
                        stored += 1;
                        for p in parts {
                            (p.from..p.to).for_each(|s| set(block.0 * 8 + u64::from(s), p.file_block));
                        }
                    }
                }
            }
            assert_eq!(stored, chunk.blocks);
        }
        for (s, owner) in flat.iter().enumerate() {
            let want = owner.map(|i| {
                let e = &entries[i];
                (e.kind == RecordKind::Data).then(|| e.file_block + (s as u64 / 8 - e.lba.0 / 8) as u32)
            });
            assert_eq!(seen[s], want, "sector {s}");
        }
    }

    #[test]
    fn an_empty_group_is_one_empty_chunk() {
        assert_eq!(split(plan(&[]), 1016, 1016), vec![ChunkPlan::default()]);
    }

    proptest! {
        #[test]
        fn the_plan_is_what_a_flat_array_says(
            list in proptest::collection::vec((0u64..1800, 1u64..200, any::<bool>()), 0..40),
            max_blocks in 1u16..40, max_extents in 1usize..30,
        ) {
            let entries: Vec<_> = list.iter().enumerate().map(|(i, &(lba, sectors, data))| {
                let kind = if data { RecordKind::Data } else { RecordKind::Discard };
                entry(i as u64 + 1, lba, sectors, 1000 * (i as u32 + 1), kind)
            }).collect();
            check(&entries, max_blocks, max_extents);
        }
    }
}
