//! Building the chunks of a group: data read from the log, checked, merged where a block is partial.
//!
//! Invariant: a chunk's bytes depend only on the entries of its group, on the pending groups before it and on the
//! base below them; never on anything newer.

mod from_log;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use uuid::Uuid;

use super::bodies::{Bodies, Body};
use super::header::{self, ChunkExtent, ChunkHeader, ExtentKind, HEADER_ROOM, MAX_BLOCKS, MAX_EXTENTS};
use super::plan::{ChunkPlan, Item, MixedPart, covers_block, plan, split};
use super::reader::ChunkReader;
use crate::checksum::block_crc;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::map::{BaseState, GroupExtent, Location, Maps};
use crate::units::{BLOCK, BlockNo, ChunkNo, Epoch, GroupNo, Nonce, SECTOR, Seq};
use crate::wal::log::{Log, LogEntry};
use from_log::{Want, lay_log};

const PARALLEL_BASE_READS: usize = 16;
/// Plans that leave room in the header for damaged blocks, which split extents and need masks.
const ROOMY: (u16, usize) = (200, 200);

/// What a group is, before its chunks are known.
#[derive(Debug, Clone, Copy)]
pub struct GroupTicket {
    /// The volume.
    pub volume: Uuid,
    /// The attachment that writes it.
    pub epoch: Epoch,
    /// Its nonce.
    pub nonce: Nonce,
    /// The group's number.
    pub group: GroupNo,
    /// The last entry before the group.
    pub after: Seq,
    /// The last entry in the group.
    pub through: Seq,
    /// The number of its first chunk.
    pub first_chunk: ChunkNo,
    /// Groups known to be whole in the store.
    pub applied_through: GroupNo,
}

/// A chunk ready to go.
#[derive(Debug, Clone)]
pub struct BuiltChunk {
    /// Its header.
    pub header: Arc<ChunkHeader>,
    /// Header and data.
    pub body: Bytes,
}

impl BuiltChunk {
    fn block(&self, block: BlockNo) -> Option<Base> {
        let mut index = 0;
        for e in &self.header.extents {
            let at = block.0.wrapping_sub(e.block.0);
            let inside = at < e.blocks;
            match e.kind {
                ExtentKind::Discard if inside => return Some(Base { data: None, mask: 0xff }),
                ExtentKind::Data | ExtentKind::Damaged if inside => {
                    let n = index + at as usize;
                    let start = HEADER_ROOM + n * BLOCK;
                    let mask = self.header.masks.iter().find(|m| usize::from(m.0) == n).map_or(0xff, |m| m.1);
                    return Some(Base { data: Some(self.body.slice(start..start + BLOCK)), mask });
                }
                ExtentKind::Discard => {}
                ExtentKind::Data | ExtentKind::Damaged => index += e.blocks as usize,
            }
        }
        None
    }
}

/// A block below a partial one: its data (absent: zeros) and the sectors of it that are good.
struct Base {
    data: Option<Bytes>,
    mask: u8,
}

/// What packing needs to see.
pub struct Sources<'a, D: Disk> {
    /// The log's state.
    pub log: &'a Log,
    /// Its file.
    pub disk: &'a D,
    /// The base map.
    pub maps: &'a Maps,
    /// Chunks of the base.
    pub reader: &'a ChunkReader,
    /// Memory for new chunks.
    pub bodies: &'a Bodies,
    /// How many reads of the log there may be at once, of up to 128 KiB each; asked before each.
    pub log_reads: &'a dyn Fn() -> usize,
    /// Groups built and not yet applied, oldest first.
    pub pending: Vec<Rc<Vec<BuiltChunk>>>,
    /// Chunks that could not be read for a base.
    pub suspects: &'a Suspects,
}

/// What looks damaged, by how many builds of groups in a row have found it so. What is packed as lost stays lost, while a proxy that cuts
/// answers short, or sends a page of its own for them, is right again after a while; so may be the way to a disk.
#[derive(Default)]
pub struct Suspects {
    builds: Cell<u64>,
    /// How many builds, and the last of them.
    seen: RefCell<HashMap<Suspect, (u32, u64)>>,
}

/// What may be damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Suspect {
    /// A chunk: its first block.
    Chunk(Location),
    /// A block of the log's file, which the disk cannot read.
    Log(u32),
}

impl Suspects {
    /// Builds that have to find it so; the caller pauses between them.
    const ENOUGH: u32 = 6;

    /// It looks damaged in that build; whether it counts as damaged now.
    fn is_damaged(&self, what: Suspect, build: u64) -> bool {
        let mut seen = self.seen.borrow_mut();
        let (times, last) = seen.entry(what).or_default();
        if *last != build {
            (*times, *last) = (*times + 1, build);
        }
        *times >= Self::ENOUGH
    }

    /// It reads well.
    fn is_well(&self, what: Suspect) {
        let mut seen = self.seen.borrow_mut();
        if !seen.is_empty() {
            seen.remove(&what);
        }
    }
}

/// The chunk, whatever its block.
fn whole(at: Location) -> Suspect {
    Suspect::Chunk(Location::new(at.source(), at.chunk(), 0))
}

/// One build's look at the bases: the first chunk that looks damaged and does not count as that yet. All are looked at before it
/// fails, so that many of them take no longer than one.
struct Look {
    build: u64,
    unproven: RefCell<Option<Error>>,
}

/// Builds all chunks of a group.
///
/// # Errors
/// The log's or the store's; nothing has happened then, and the same call may be made again. Damaged blocks are no
/// error: they are packed as damaged.
pub async fn build<D: Disk>(
    src: &Sources<'_, D>,
    ticket: &GroupTicket,
    entries: &[LogEntry],
) -> Result<Vec<BuiltChunk>> {
    let items = plan(entries);
    let dense = split(items.clone(), MAX_BLOCKS as u16, MAX_EXTENTS);
    match fill(src, ticket, dense).await {
        Err(e) if e.kind() == ErrorKind::Full => fill(src, ticket, split(items, ROOMY.0, ROOMY.1)).await,
        r => r,
    }
}

struct Draft {
    /// Every byte of it is written: it may have been another chunk's.
    body: Body,
    /// Per stored block: its volume block, checksum, and the sectors that are good.
    blocks: Vec<(BlockNo, u32, u8)>,
}

async fn fill<D: Disk>(src: &Sources<'_, D>, ticket: &GroupTicket, plans: Vec<ChunkPlan>) -> Result<Vec<BuiltChunk>> {
    let mut drafts: Vec<Draft> = Vec::with_capacity(plans.len());
    let mut wants = Vec::new();
    let mut partial: Vec<(usize, u16, BlockNo, Vec<MixedPart>)> = Vec::new();
    for (c, p) in plans.iter().enumerate() {
        let mut blocks = Vec::with_capacity(usize::from(p.blocks));
        for (item, index) in &p.items {
            let (block, n) = item.range();
            match item {
                Item::Hole { .. } => {}
                Item::Run { file_block, blocks: count, .. } => {
                    blocks.extend((0..n).map(|i| (BlockNo(block.0 + i), 0, 0xff)));
                    wants.push(Want {
                        file_block: *file_block,
                        blocks: *count,
                        chunk: c,
                        index: *index,
                        block,
                        part: None,
                    });
                }
                Item::Mixed { parts, .. } => {
                    blocks.push((block, 0, 0xff));
                    for p in parts {
                        if let Some(file_block) = p.file_block {
                            let part = Some((p.from, p.to));
                            wants.push(Want { file_block, blocks: 1, chunk: c, index: *index, block, part });
                        }
                    }
                    partial.push((c, *index, block, parts.clone()));
                }
            }
        }
        drafts.push(Draft { body: src.bodies.take(HEADER_ROOM + usize::from(p.blocks) * BLOCK), blocks });
    }
    lay_bases(src, &mut drafts, &partial).await?;
    lay_log(src, &mut drafts, wants).await?;
    // A merged block is no longer what its writes were checked by; it is checked by what it is now.
    for (c, index, block, _) in &partial {
        let d = &mut drafts[*c];
        let at = HEADER_ROOM + usize::from(*index) * BLOCK;
        d.blocks[usize::from(*index)].1 = block_crc(*block, &d.body.buf.bytes()[at..at + BLOCK]);
    }
    let count = drafts.len() as u32;
    plans
        .iter()
        .zip(drafts)
        .enumerate()
        .map(|(i, (plan, draft))| finish(ticket, i as u32, count, plan, draft))
        .collect()
}

/// Puts what lies below partial blocks into the drafts; holes in them are zeroed.
async fn lay_bases<D: Disk>(
    src: &Sources<'_, D>,
    drafts: &mut [Draft],
    partial: &[(usize, u16, BlockNo, Vec<MixedPart>)],
) -> Result<()> {
    src.suspects.builds.set(src.suspects.builds.get() + 1);
    let look = &Look { build: src.suspects.builds.get(), unproven: RefCell::default() };
    let bases: Vec<Option<Base>> = stream::iter(partial)
        .map(|(_, _, block, parts)| async move {
            if covers_block(parts) { Ok(None) } else { base_of(src, *block, look).await.map(Some) }
        })
        .buffered(PARALLEL_BASE_READS)
        .try_collect()
        .await?;
    if let Some(e) = look.unproven.take() {
        return Err(e);
    }
    for ((c, index, _, parts), base) in partial.iter().zip(bases) {
        let d = &mut drafts[*c];
        let at = HEADER_ROOM + usize::from(*index) * BLOCK;
        let room = &mut d.body.buf.bytes_mut()[at..at + BLOCK];
        room.fill(0);
        if let Some(base) = base {
            if let Some(data) = &base.data {
                room.copy_from_slice(data);
            }
            d.blocks[usize::from(*index)].2 = base.mask;
        }
        for p in parts {
            let range = usize::from(p.from) * SECTOR..usize::from(p.to) * SECTOR;
            room[range].fill(0);
            // Whatever was below, these sectors are new.
            d.blocks[usize::from(*index)].2 |= sector_mask(p.from, p.to);
        }
    }
    Ok(())
}

fn sector_mask(from: u8, to: u8) -> u8 {
    (from..to).fold(0, |m, s| m | 1 << s)
}

async fn base_of<D: Disk>(src: &Sources<'_, D>, block: BlockNo, look: &Look) -> Result<Base> {
    let newest = src.pending.iter().rev().flat_map(|g| g.iter()).find_map(|c| c.block(block));
    if let Some(base) = newest {
        return Ok(base);
    }
    let mut tried = None;
    loop {
        let at = match src.maps.base_lookup(block) {
            BaseState::Unmapped => return Ok(Base { data: None, mask: 0xff }),
            BaseState::At(at) => at,
        };
        match src.reader.read(at, block, 1).await {
            Ok(b) => {
                src.suspects.is_well(whole(at));
                let mask = b.bad.first().map_or(0xff, |(_, good)| *good);
                return Ok(Base { data: Some(b.data), mask });
            }
            // All else is tried again: an object that is not there may be a store that is not, and a newer program's chunk is whole.
            Err(e) if e.kind() == ErrorKind::Corrupt => {
                if src.suspects.is_damaged(whole(at), look.build) {
                    tracing::error!(
                        "block {block} cannot be read to merge a partial write: {e}; its other sectors are lost"
                    );
                } else {
                    look.unproven.borrow_mut().get_or_insert(e);
                }
                return Ok(Base { data: None, mask: 0 });
            }
            // Garbage collection may have put it elsewhere.
            Err(e) if e.kind() == ErrorKind::NotFound && tried != Some(at) => tried = Some(at),
            Err(e) => return Err(e),
        }
    }
}

fn finish(t: &GroupTicket, index: u32, count: u32, plan: &ChunkPlan, d: Draft) -> Result<BuiltChunk> {
    let mut extents: Vec<ChunkExtent> = Vec::with_capacity(plan.items.len());
    let mut push = |block: BlockNo, blocks: u64, kind: ExtentKind| {
        if let Some(last) = extents.last_mut()
            && last.kind == kind
            && last.block.0 + last.blocks == block.0
        {
            last.blocks += blocks;
            return;
        }
        extents.push(ChunkExtent { block, blocks, kind, birth: t.through });
    };
    for (item, at) in &plan.items {
        let (block, n) = item.range();
        if matches!(item, Item::Hole { .. }) {
            push(block, n, ExtentKind::Discard);
            continue;
        }
        for i in 0..n {
            let good = d.blocks[usize::from(*at) + i as usize].2 == 0xff;
            push(BlockNo(block.0 + i), 1, if good { ExtentKind::Data } else { ExtentKind::Damaged });
        }
    }
    let masks: Vec<(u16, u8)> =
        d.blocks.iter().enumerate().filter(|(_, b)| b.2 != 0xff).map(|(i, b)| (i as u16, b.2)).collect();
    if !ChunkHeader::fits(extents.len(), d.blocks.len(), masks.len()) {
        return Err(Error::new(ErrorKind::Full, "a chunk's header has no room for its damaged blocks"));
    }
    let header = ChunkHeader {
        volume: t.volume,
        chunk: ChunkNo(t.first_chunk.0 + u64::from(index)),
        epoch: t.epoch,
        nonce: t.nonce,
        after: t.after,
        through: t.through,
        group: t.group,
        index,
        count,
        applied_through: t.applied_through,
        extents,
        crcs: d.blocks.iter().map(|b| b.1).collect(),
        masks,
    };
    let bytes = header.encode().map_err(Error::from)?;
    d.body.buf.copy_in(0, &bytes);
    Ok(BuiltChunk { header: Arc::new(header), body: d.body.freeze() })
}

/// Where a chunk's extents go in the base map of a volume that knows it as `source`.
#[must_use]
pub fn map_extents(h: &ChunkHeader, source: u8) -> Vec<GroupExtent> {
    let mut index = 0u16;
    h.extents
        .iter()
        .map(|e| {
            let to = match e.kind {
                ExtentKind::Discard => None,
                ExtentKind::Data => Some(Location::new(source, h.chunk, index)),
                ExtentKind::Damaged => Some(Location::new(source, h.chunk, index).damaged()),
            };
            if e.kind != ExtentKind::Discard {
                index += e.blocks as u16;
            }
            GroupExtent { block: e.block, blocks: e.blocks, to }
        })
        .collect()
}

/// The key of a chunk below the volume's prefix.
#[must_use]
pub fn key_of(prefix: &str, h: &ChunkHeader) -> String {
    header::key(prefix, h.chunk, h.epoch, h.nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_damaged_after_builds_not_after_blocks() {
        let (suspects, chunk, other) =
            (Suspects::default(), whole(Location::new(0, ChunkNo(3), 9)), whole(Location::new(0, ChunkNo(4), 9)));
        for build in 1..Suspects::ENOUGH.into() {
            for index in 0..20 {
                assert!(!suspects.is_damaged(whole(Location::new(0, ChunkNo(3), index)), build), "build {build}");
            }
        }
        assert!(!suspects.is_damaged(other, 6) && suspects.is_damaged(chunk, 6) && suspects.is_damaged(chunk, 6));
        suspects.is_well(chunk);
        assert!(!suspects.is_damaged(chunk, 7));
    }
}
