//! Live blocks out of chunks that are to go, put into new ones, and the discards that those chunks record.
//!
//! Invariants:
//! - A block is copied only if it passes the check that a reader makes, or was stored as damaged; it keeps its checksum, birth and mask.
//!   A chunk of which any live block does not is left as it is, whole.
//! - Discards are kept in chunks of their own: there they may lie over blocks that have newer content elsewhere.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use uuid::Uuid;

use crate::chunk::bodies::{Bodies, Body};
use crate::chunk::header::{ChunkExtent, ChunkHeader, ExtentKind, HEADER_ROOM, MAX_BLOCKS, MAX_EXTENTS};
use crate::chunk::pack::BuiltChunk;
use crate::chunk::reader::{Keys, WHOLE, good_sectors, parse_header};
use crate::error::{Error, ErrorKind, Result};
use crate::map::{BaseImage, BaseState, Location, Move};
use crate::store::Store;
use crate::units::{BLOCK, BlockNo, ChunkNo, Epoch, GroupNo, Nonce, Seq};

/// Chunks read at once.
const PARALLEL: usize = 4;
/// A discard of up to so many blocks is looked at block by block, whether it still says anything.
const SMALL: u64 = 64;

/// A block on its way.
struct Block {
    block: BlockNo,
    birth: Seq,
    crc: u32,
    mask: u8,
    from: Location,
    data: Bytes,
}

/// What one chunk has.
#[derive(Default)]
struct Found {
    blocks: Vec<Block>,
    discards: Vec<ChunkExtent>,
    read_bytes: u64,
}

/// A new chunk but for its number.
pub struct Draft {
    extents: Vec<ChunkExtent>,
    crcs: Vec<u32>,
    masks: Vec<(u16, u8)>,
    /// Of each stored block: which it is, and where it was.
    from: Vec<(BlockNo, Location)>,
    body: Body,
}

/// What a batch has come to.
#[derive(Default)]
pub struct Gathered {
    /// The new chunks.
    pub drafts: Vec<Draft>,
    /// Chunks of the volume's own of which nothing is needed any more when the drafts are in the store and in a published map.
    pub emptied: Vec<ChunkNo>,
    /// Of them, those that nothing had to be copied of.
    pub were_empty: Vec<ChunkNo>,
    /// Chunks that cannot be read whole, and why.
    pub stuck: Vec<(ChunkNo, Error)>,
    /// Bytes read from the store.
    pub read_bytes: u64,
}

/// Who writes the new chunks.
#[derive(Debug, Clone, Copy)]
pub struct Ticket {
    /// The volume.
    pub volume: Uuid,
    /// The attachment.
    pub epoch: Epoch,
    /// Its nonce.
    pub nonce: Nonce,
    /// The first number.
    pub first_chunk: ChunkNo,
    /// The groups and the last entry that are in the map.
    pub applied: (GroupNo, Seq),
}

/// Reads `victims`, chunks of one source, each with the number of its blocks that `image` names, and makes new chunks of those. What
/// comes from a parent was born before the volume.
///
/// # Errors
/// The store's: nothing has happened then.
pub async fn gather(
    store: &Arc<dyn Store>,
    keys: &Keys,
    image: &BaseImage,
    source: u8,
    victims: &[(ChunkNo, u32)],
    bodies: &Bodies,
) -> Result<Gathered> {
    let mut out = Gathered::default();
    let mut blocks = Vec::new();
    let mut discards = Vec::new();
    let mut reads = stream::iter(victims.iter().copied())
        .map(|(chunk, live)| async move { (chunk, read_twice(&**store, keys, image, (source, chunk), live).await) })
        .buffered(PARALLEL);
    while let Some((chunk, found)) = reads.next().await {
        match found {
            Ok(found) => {
                out.read_bytes += found.read_bytes;
                if source == 0 {
                    out.emptied.push(chunk);
                    if found.blocks.is_empty() && found.discards.is_empty() {
                        out.were_empty.push(chunk);
                    }
                }
                blocks.extend(found.blocks);
                discards.extend(found.discards);
            }
            Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::NotFound | ErrorKind::Unsupported) => {
                out.stuck.push((chunk, e));
            }
            Err(e) => return Err(e),
        }
    }
    blocks.sort_unstable_by_key(|b| b.block);
    out.drafts.extend(blocks.chunks(MAX_BLOCKS).map(|b| draft(b, bodies)));
    let discards = newest(discards);
    out.drafts.extend(discards.chunks(MAX_EXTENTS).map(|d| Draft {
        extents: d.to_vec(),
        crcs: Vec::new(),
        masks: Vec::new(),
        from: Vec::new(),
        body: bodies.take(HEADER_ROOM),
    }));
    Ok(out)
}

/// What reads badly once may have been damaged on its way.
async fn read_twice(store: &dyn Store, keys: &Keys, image: &BaseImage, chunk: (u8, ChunkNo), n: u32) -> Result<Found> {
    match read(store, keys, image, chunk, n).await {
        Err(e) if e.kind() == ErrorKind::Corrupt => read(store, keys, image, chunk, n).await,
        found => found,
    }
}

async fn read(
    store: &dyn Store,
    keys: &Keys,
    image: &BaseImage,
    (source, chunk): (u8, ChunkNo),
    named: u32,
) -> Result<Found> {
    let is_own = source == 0;
    let (key, volume) = keys.key(source, chunk)?;
    let head = store.get_range(&key, 0..HEADER_ROOM as u64).await?;
    let h = parse_header(&key, &head)?;
    let damaged = |why: String| Error::new(ErrorKind::Corrupt, format!("{key} {why}"));
    if h.volume != volume {
        return Err(damaged(format!("is of volume {}, not of {volume}", h.volume)));
    }
    let mut found = Found { read_bytes: HEADER_ROOM as u64, ..Found::default() };
    // Stored block, volume block, birth.
    let mut live: Vec<(u16, BlockNo, Seq, Location)> = Vec::new();
    let mut index = 0u16;
    for e in &h.extents {
        if e.kind == ExtentKind::Discard {
            // A parent's hide nothing of the volume's own.
            if is_own && says_something(image, e) {
                found.discards.push(*e);
            }
            continue;
        }
        for i in 0..e.blocks {
            let block = BlockNo(e.block.0 + i);
            if block.0 < image.volume_blocks()
                && let BaseState::At(at) = image.lookup(block)
                && (at.source(), at.chunk(), at.index()) == (source, chunk, index)
            {
                live.push((index, block, if is_own { e.birth } else { Seq(0) }, at));
            }
            index += 1;
        }
    }
    if live.len() != named as usize {
        return Err(damaged(format!("has {} of the {named} blocks that the map names of it", live.len())));
    }
    let (Some(first), Some(last)) = (live.first().map(|l| l.0), live.last().map(|l| l.0)) else { return Ok(found) };
    let start = HEADER_ROOM as u64 + u64::from(first) * BLOCK as u64;
    let end = HEADER_ROOM as u64 + (u64::from(last) + 1) * BLOCK as u64;
    let data = store.get_range(&key, start..end).await?;
    found.read_bytes += end - start;
    // What is mostly dead must not be held in memory by the little that lives.
    let sparse = live.len() * 2 < usize::from(last - first) + 1;
    for (n, block, birth, from) in live {
        let at = usize::from(n - first) * BLOCK;
        let one = data.slice(at..at + BLOCK);
        let mask = good_sectors(&h, usize::from(n), block, &one)
            .ok_or_else(|| damaged(format!("fails its check in block {n}, which is block {block} of the volume")))?;
        let data = if sparse { Bytes::copy_from_slice(&one) } else { one };
        found.blocks.push(Block { block, birth, crc: h.crcs[usize::from(n)], mask, from, data });
    }
    Ok(found)
}

/// Whether forgetting a discard could bring old content back: where all of it has been written since, it cannot.
fn says_something(image: &BaseImage, e: &ChunkExtent) -> bool {
    let end = (e.block.0 + e.blocks).min(image.volume_blocks());
    e.blocks > SMALL || (e.block.0..end).any(|b| image.lookup(BlockNo(b)) == BaseState::Unmapped)
}

fn draft(blocks: &[Block], bodies: &Bodies) -> Draft {
    let body = bodies.take(HEADER_ROOM + blocks.len() * BLOCK);
    let mut extents: Vec<ChunkExtent> = Vec::new();
    let mut masks = Vec::new();
    for (i, b) in blocks.iter().enumerate() {
        body.buf.copy_in(HEADER_ROOM + i * BLOCK, &b.data);
        let kind = if b.mask == WHOLE { ExtentKind::Data } else { ExtentKind::Damaged };
        if b.mask != WHOLE {
            masks.push((i as u16, b.mask));
        }
        match extents.last_mut() {
            Some(e) if e.kind == kind && e.birth == b.birth && e.block.0 + e.blocks == b.block.0 => e.blocks += 1,
            _ => extents.push(ChunkExtent { block: b.block, blocks: 1, kind, birth: b.birth }),
        }
    }
    let crcs = blocks.iter().map(|b| b.crc).collect();
    let from = blocks.iter().map(|b| (b.block, b.from)).collect();
    Draft { extents, crcs, masks, from, body }
}

/// Lays discards over each other, by birth; what comes out is sorted and disjoint.
fn newest(mut all: Vec<ChunkExtent>) -> Vec<ChunkExtent> {
    all.sort_by_key(|e| e.birth);
    // First block → (block after the last, birth).
    let mut map: BTreeMap<u64, (u64, Seq)> = BTreeMap::new();
    for e in all {
        let (start, end) = (e.block.0, e.block.0 + e.blocks);
        let met: Vec<u64> = map.range(..end).rev().take_while(|(_, v)| v.0 > start).map(|(s, _)| *s).collect();
        for s in met {
            let Some((until, birth)) = map.remove(&s) else { continue };
            if s < start {
                map.insert(s, (start, birth));
            }
            if until > end {
                map.insert(end, (until, birth));
            }
        }
        map.insert(start, (end, e.birth));
    }
    let mut out: Vec<ChunkExtent> = Vec::with_capacity(map.len());
    for (start, (end, birth)) in map {
        match out.last_mut() {
            Some(e) if e.birth == birth && e.block.0 + e.blocks == start => e.blocks += end - start,
            _ => out.push(ChunkExtent { block: BlockNo(start), blocks: end - start, kind: ExtentKind::Discard, birth }),
        }
    }
    out
}

/// Numbers the new chunks. They belong to no group.
///
/// # Errors
/// `Internal`, for drafts that break the format's rules: a mistake here.
pub fn number(drafts: Vec<Draft>, t: &Ticket) -> Result<(Vec<BuiltChunk>, Vec<Move>)> {
    let mut moves = Vec::new();
    let mut chunks = Vec::with_capacity(drafts.len());
    for (i, d) in drafts.into_iter().enumerate() {
        let chunk = ChunkNo(t.first_chunk.0 + i as u64);
        for (n, (block, from)) in d.from.iter().enumerate() {
            let to = Location::new(0, chunk, n as u16);
            let damaged = d.masks.binary_search_by_key(&(n as u16), |m| m.0).is_ok();
            moves.push(Move { block: *block, from: *from, to: if damaged { to.damaged() } else { to } });
        }
        let header = ChunkHeader {
            volume: t.volume,
            chunk,
            epoch: t.epoch,
            nonce: t.nonce,
            after: t.applied.1,
            through: t.applied.1,
            group: GroupNo(0),
            index: 0,
            count: 1,
            applied_through: t.applied.0,
            extents: d.extents,
            crcs: d.crcs,
            masks: d.masks,
        };
        let bytes = header.encode().map_err(Error::from)?;
        d.body.buf.copy_in(0, &bytes);
        chunks.push(BuiltChunk { header: Arc::new(header), body: d.body.freeze() });
    }
    Ok((chunks, moves))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hole(block: u64, blocks: u64, birth: u64) -> ChunkExtent {
        ChunkExtent { block: BlockNo(block), blocks, kind: ExtentKind::Discard, birth: Seq(birth) }
    }

    proptest! {
        #[test]
        fn of_discards_over_each_other_the_newest_stays(all in prop::collection::vec((0u64..60, 1u64..20, 1u64..9), 0..20)) {
            let all: Vec<ChunkExtent> = all.into_iter().map(|(b, n, s)| hole(b, n, s)).collect();
            let mut flat = [0u64; 100];
            for e in &all {
                for b in e.block.0..e.block.0 + e.blocks {
                    flat[b as usize] = flat[b as usize].max(e.birth.0);
                }
            }
            let out = newest(all);
            prop_assert!(out.windows(2).all(|w| w[0].block.0 + w[0].blocks <= w[1].block.0));
            let mut found = [0u64; 100];
            for e in &out {
                found[e.block.0 as usize..(e.block.0 + e.blocks) as usize].fill(e.birth.0);
            }
            prop_assert_eq!(flat, found);
        }
    }
}
