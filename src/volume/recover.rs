//! What the store holds beyond the last checkpoint: the chunks of whole groups, in order.
//!
//! Invariants:
//! - A group counts only when all its chunks are there, under the epoch that owns their numbers.
//! - Groups count in order and without a gap; what comes after the first incomplete one does not.
//! - A header that cannot be read is corruption, never absence.

use std::collections::BTreeMap;

use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::stale::check_chunks;
use crate::chunk::header::{self, ChunkHeader};
use crate::chunk::pack::map_extents;
use crate::chunk::reader::fetch_header;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::Manifest;
use crate::map::{GroupUpdate, Maps};
use crate::store::Store;
use crate::units::{BLOCK, ChunkNo, Epoch, GroupNo, Nonce, Seq};

pub(super) const PARALLEL_HEADERS: usize = 16;

/// The newest complete state in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreEnd {
    /// The last whole group.
    pub group: GroupNo,
    /// Its last entry.
    pub through: Seq,
    /// The last chunk number that counts.
    pub last_chunk: ChunkNo,
    /// Chunks found that do not count.
    pub ignored: usize,
}

/// Where the checkpoint ends.
#[must_use]
pub fn checkpoint_end(m: &Manifest) -> StoreEnd {
    m.checkpoint.as_ref().map_or(
        StoreEnd { group: GroupNo(0), through: Seq(0), last_chunk: ChunkNo(0), ignored: 0 },
        |c| StoreEnd { group: c.group, through: c.through, last_chunk: c.last_chunk, ignored: 0 },
    )
}

/// Lists the chunks after the checkpoint, applies the whole groups to `maps` (which hold the checkpoint), and says
/// where the store ends.
///
/// # Errors
/// `Corrupt` when a header cannot be read, or a group that another one relies on is not whole; the store's.
pub async fn apply_groups(store: &dyn Store, prefix: &str, m: &Manifest, maps: &Maps) -> Result<StoreEnd> {
    let mut end = checkpoint_end(m);
    let keys = newer_chunks(store, prefix, m, &mut end).await?;
    let headers: Vec<ChunkHeader> =
        stream::iter(&keys).map(|key| newer_header(store, m, key)).buffered(PARALLEL_HEADERS).try_collect().await?;
    apply_headers(&store.url(), m, headers, maps, &mut end)?;
    Ok(end)
}

/// The keys of the chunks after the checkpoint, in order, under the epochs that own their numbers. Others are counted in `end`.
///
/// # Errors
/// `Corrupt` when some of them show that the manifest is older than the volume; the store's.
pub(super) async fn newer_chunks(
    store: &dyn Store,
    prefix: &str,
    m: &Manifest,
    end: &mut StoreEnd,
) -> Result<Vec<String>> {
    let folder = format!("{prefix}chunks/");
    // No epoch or nonce sorts above these: everything of the checkpoint's last number is skipped.
    let after = header::key(prefix, end.last_chunk, Epoch(u64::from(u32::MAX)), Nonce(u64::MAX));
    let listed = store
        .list(&folder, Some(&after))
        .await
        .map_err(|e| e.context(format!("listing {folder} in {}", store.url())))?;
    let (mut keys, mut later) = (Vec::new(), Vec::new());
    for object in listed {
        let Some((chunk, epoch, nonce)) = object.key.strip_prefix(&folder).and_then(header::parse_name) else {
            continue;
        };
        if chunk > end.last_chunk && m.owner(chunk) == Some((epoch, nonce)) {
            keys.push(object.key);
        } else {
            end.ignored += 1;
            if epoch > m.epoch {
                later.push((epoch, object.key));
            }
        }
    }
    check_chunks(store, m, &later).await?;
    Ok(keys)
}

/// The header of one of them.
pub(super) async fn newer_header(store: &dyn Store, m: &Manifest, key: &str) -> Result<ChunkHeader> {
    let h = fetch_header(store, key).await?;
    if h.volume == m.uuid {
        Ok(h)
    } else {
        Err(Error::new(ErrorKind::Corrupt, format!("{key} belongs to another volume ({})", h.volume)))
    }
}

/// Applies the whole groups among chunks after the checkpoint. After an error `maps` and `end` are as of the last group
/// before it.
pub(super) fn apply_headers(
    url: &str,
    m: &Manifest,
    headers: Vec<ChunkHeader>,
    maps: &Maps,
    end: &mut StoreEnd,
) -> Result<()> {
    let relied_on = headers.iter().map(|h| h.applied_through).max().unwrap_or_default();
    let mut groups: BTreeMap<GroupNo, Vec<ChunkHeader>> = BTreeMap::new();
    for h in headers {
        groups.entry(h.group).or_default().push(h);
    }
    for (group, mut chunks) in groups {
        chunks.sort_by_key(|h| h.index);
        if group != end.group.next() || !is_whole(&chunks, end.through) {
            end.ignored += chunks.len();
            continue;
        }
        let update = group_update(m, &chunks)?;
        maps.apply_group(&update);
        end.last_chunk = chunks.iter().map(|h| h.chunk).fold(end.last_chunk, ChunkNo::max);
        end.group = group;
        end.through = update.last;
    }
    if relied_on > end.group {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "group {} of volume {:?} is not whole in {url}, but a later chunk says that group {relied_on} was: objects are missing; put them \
                 back from a copy of the store, else see what `vb-ublk volume rebuild {} --dry-run` says",
                end.group.next(),
                m.name,
                m.name
            ),
        ));
    }
    Ok(())
}

/// What a whole group changes.
pub(super) fn group_update(m: &Manifest, chunks: &[ChunkHeader]) -> Result<GroupUpdate> {
    let mut update = GroupUpdate { last: chunks[0].through, ..GroupUpdate::default() };
    let mut free_from = 0;
    for h in chunks {
        for e in &h.extents {
            let until = e.block.0.checked_add(e.blocks).filter(|u| *u <= m.size_bytes / BLOCK as u64);
            match until {
                Some(until) if e.block.0 >= free_from => free_from = until,
                _ => {
                    return Err(Error::new(
                        ErrorKind::Corrupt,
                        format!(
                            "chunk {} of volume {:?} has an extent at block {} that does not fit the volume or its group",
                            h.chunk, m.name, e.block
                        ),
                    ));
                }
            }
        }
        update.extents.extend(map_extents(h, 0));
    }
    Ok(update)
}

pub(super) fn is_whole(chunks: &[ChunkHeader], after: Seq) -> bool {
    let Some(first) = chunks.first() else { return false };
    chunks.len() == first.count as usize
        && chunks.iter().enumerate().all(|(i, h)| {
            h.index as usize == i && h.after == after && h.through == first.through && h.count == first.count
        })
}
