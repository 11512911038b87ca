//! Boots: what one reads first is recorded, kept beside the snapshot that it began from, and fetched ahead by those that begin there later.
//!
//! Invariants:
//! - Nothing depends on it: a trace that cannot be read costs time alone. Nobody waits for it, but for a block that is on its way for it already.
//! - What is fetched for a trace is what the map says now: of what was overwritten since nothing is.

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::future::{Either, select};
use futures_util::stream::{FuturesUnordered, StreamExt};
use uuid::Uuid;

use super::Volume;
use super::lane::Unpinned;
use crate::cache::Cache;
use crate::cache::fetch::Fetcher;
use crate::cache::trace::{HEAD_BYTES, PAGE_SECTORS, Recorder, decode, encode, trace_key, whole_bytes};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::{Manifest, Published, Snapshot};
use crate::map::{Location, Piece, Source};
use crate::store::Store;
use crate::units::{Lba, SECTOR, SECTORS_PER_BLOCK};

/// Requests under way at once while nobody waits for any.
const PARALLEL: usize = 8;
/// The same beside those that somebody waits for.
const PARALLEL_BESIDE: usize = 2;
/// Pages that are looked up together, so that neighbours are one request.
const TOGETHER: usize = 64;
/// The most blocks of a request, 256 KiB: who wants one of them waits for all.
const MOST_BLOCKS: u16 = 64;

/// The boot of an attachment that begins from a snapshot.
#[derive(Debug)]
pub(super) struct Boot {
    pub(super) of: BootOf,
    /// What is read first.
    pub(super) recorder: Recorder,
}

/// The snapshot that an attachment's boot begins from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BootOf {
    /// The snapshot's volume.
    pub volume: String,
    /// Its identity.
    pub uuid: Uuid,
    /// The snapshot.
    pub snapshot: Uuid,
    /// Its name.
    pub name: String,
    /// Sources of the map from this one on are the snapshot's; those before are the attachment's own.
    pub first_source: u8,
}

impl BootOf {
    /// Of a clone: what it was cloned from.
    pub(super) fn clone_of(m: &Manifest) -> Option<Self> {
        let p = m.parent()?;
        let (volume, name) = (p.name.clone(), p.snapshot_name.clone());
        Some(Self { volume, uuid: p.uuid, snapshot: p.snapshot, name, first_source: 1 })
    }

    /// Of a snapshot that is served itself.
    pub(super) fn snapshot(m: &Manifest, s: &Snapshot) -> Self {
        Self { volume: m.name.clone(), uuid: m.uuid, snapshot: s.id, name: s.name.clone(), first_source: 0 }
    }

    fn key(&self) -> String {
        trace_key(&self.volume, self.snapshot)
    }
}

impl Boot {
    /// Pieces are read: of the snapshot, not of what was written since. `now` is asked for while it counts.
    pub(super) fn read(&self, pieces: &[Piece], now: impl FnOnce() -> Duration) {
        if !self.recorder.is_on() {
            return;
        }
        let now = now();
        let of_snapshot = |p: &&Piece| matches!(p.what, Source::Chunk(at) if at.source() >= self.of.first_source);
        for p in pieces.iter().filter(of_snapshot) {
            self.recorder.read(p.lba.0..p.lba.0 + u64::from(p.sectors), now);
        }
    }
}

impl Volume {
    /// The boot that begins with this attachment, if it begins from a snapshot.
    pub(super) fn boot(&self) -> Option<&Boot> {
        self.boot.get()
    }

    /// It begins from a snapshot: once, before the first lane.
    pub(super) fn set_boot(&self, of: BootOf) {
        let _ = self.boot.set(Boot { of, recorder: Recorder::default() });
    }

    /// What of these sectors is in chunks, and not in the cache.
    pub(super) fn not_here(
        &self,
        cache: &Cache,
        lba: Lba,
        sectors: u64,
        pieces: &mut Vec<Piece>,
        mut tell: impl FnMut(Location, u16),
    ) {
        self.maps.lookup(lba, sectors, &Unpinned, pieces);
        for p in pieces.drain(..) {
            let Source::Chunk(at) = p.what else { continue };
            let blocks = (p.lba.0 % SECTORS_PER_BLOCK + u64::from(p.sectors)).div_ceil(SECTORS_PER_BLOCK) as u16;
            for run in cache.missing(at, blocks, sectors / SECTORS_PER_BLOCK) {
                tell(at.plus(run.start), run.end - run.start);
            }
        }
    }
}

/// Keeps what this attachment has read first as the trace of the snapshot that it began from.
///
/// # Errors
/// `Usage` when it did not begin from `wanted` (volume and snapshot), or has read nothing; `NotFound` when the snapshot is gone; the store's.
pub(super) async fn keep_trace(volume: &Volume, store: &dyn Store, wanted: (&str, &str)) -> Result<()> {
    let refuse = |what: String| Err(Error::new(ErrorKind::Usage, what));
    let Some(Boot { of, recorder }) = volume.boot().filter(|b| (b.of.volume.as_str(), b.of.name.as_str()) == wanted)
    else {
        return refuse(format!(
            "{} did not begin from {}@{}, or has been taken up by `recover` since",
            volume.name(),
            wanted.0,
            wanted.1
        ));
    };
    let pages = recorder.pages();
    if pages.is_empty() {
        return refuse(format!(
            "nothing of {}@{} has been read through {} since it was attached",
            wanted.0,
            wanted.1,
            volume.name()
        ));
    }
    let there = async || {
        let m = Published::load(store, &of.volume).await?.manifest;
        let found = m.snapshots.iter().any(|s| s.id == of.snapshot && s.deleting.is_none());
        let gone = || Error::new(ErrorKind::NotFound, format!("snapshot {}@{} is gone", wanted.0, wanted.1));
        if found && m.uuid == of.uuid { Ok(()) } else { Err(gone()) }
    };
    there().await?;
    store.put(&of.key(), encode(of.uuid, of.snapshot, &pages).into()).await?;
    tracing::info!(
        "the first {} pages that {} has read are the trace of {}@{}",
        pages.len(),
        volume.name(),
        wanted.0,
        wanted.1
    );
    // A deletion at the same time may have looked before.
    let still = there().await;
    if matches!(&still, Err(e) if e.kind() == ErrorKind::NotFound) {
        store.delete(&of.key()).await?;
    }
    still
}

/// The pages of a snapshot's trace. An object of any size is not read for it.
async fn load(store: &dyn Store, of: &BootOf) -> Result<Vec<u32>> {
    let key = of.key();
    let head = store.get_range(&key, 0..HEAD_BYTES).await?;
    let whole = store.get_range(&key, 0..whole_bytes(&head)?).await?;
    Ok(decode(&whole, of.uuid, of.snapshot)?)
}

/// Fetches what the trace of the snapshot that the volume began from names, in its order, for the cache; until the volume is gone.
pub(super) async fn prefetch<D: Disk>(volume: &Volume, store: &dyn Store, fetcher: &Fetcher<D>) {
    let (Some(Boot { of, .. }), Some(cache)) = (volume.boot(), volume.cache()) else { return };
    let mut gone = std::pin::pin!(volume.until_gone());
    let loaded = match select(std::pin::pin!(load(store, of)), gone.as_mut()).await {
        Either::Left((loaded, _)) => loaded,
        Either::Right(_) => return,
    };
    let mut pages = match loaded {
        Ok(pages) => pages,
        Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => {
            tracing::warn!("the boot trace of {}@{} is of no use: {e}", of.volume, of.name);
            return;
        }
        // There is none, for the most part.
        Err(e) => {
            tracing::debug!("the boot trace of {}@{}: {e}", of.volume, of.name);
            return;
        }
    };
    // What does not fit in would push out what does, at every attach anew.
    pages.truncate((cache.status().size_bytes / 2 / (PAGE_SECTORS * SECTOR as u64)) as usize);
    tracing::debug!("fetching {} pages of a boot from {}@{}", pages.len(), of.volume, of.name);
    let (mut fetching, mut keeping) = (FuturesUnordered::new(), FuturesUnordered::new());
    let (mut some, mut waiting, mut pieces) = (pages.chunks(TOGETHER), VecDeque::new(), Vec::new());
    loop {
        if waiting.is_empty()
            && let Some(pages) = some.next()
        {
            waiting.extend(requests(volume, cache, pages, &mut pieces));
            // The thread has others to serve, and there may be nothing to fetch.
            tokio::task::yield_now().await;
            continue;
        }
        let most = if fetcher.is_waited_for() { PARALLEL_BESIDE } else { PARALLEL };
        while fetching.len() < most
            && keeping.len() < PARALLEL
            && let Some((at, blocks)) = waiting.pop_front()
        {
            fetching.push(fetcher.fetch_ahead(at, blocks));
        }
        if fetching.is_empty() && keeping.is_empty() || volume.is_gone() {
            break;
        }
        tokio::select! {
            () = &mut gone => break,
            Some(fetched) = fetching.next() => keeping.extend(Option::map(fetched, |f| fetcher.keep(f))),
            Some(()) = keeping.next() => {}
        }
    }
    // The buffers of a write that is not awaited are never freed.
    while keeping.next().await.is_some() {}
}

/// What of these pages is in chunks and not here, neighbours together, in the order in which the first of each is wanted.
fn requests(volume: &Volume, cache: &Cache, pages: &[u32], pieces: &mut Vec<Piece>) -> Vec<(Location, u16)> {
    let mut found: Vec<(Location, u16)> = Vec::new();
    for page in pages {
        let start = u64::from(*page) * PAGE_SECTORS;
        let end = (start + PAGE_SECTORS).min(volume.sectors());
        if start >= end {
            continue;
        }
        volume.not_here(cache, Lba(start), end - start, pieces, |at, blocks| {
            let joins = |f: &&mut (Location, u16)| f.1 + blocks <= MOST_BLOCKS && f.0.leads_to(f.1.into(), at);
            match found.iter_mut().rev().find(joins) {
                Some(before) => before.1 += blocks,
                None => found.push((at, blocks)),
            }
        });
    }
    found
}
