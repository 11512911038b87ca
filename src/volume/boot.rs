//! Boots: what one reads first is recorded, kept beside the snapshot that it began from, and fetched ahead by those that begin there later.
//!
//! Invariants:
//! - Nobody waits for any of it, and nothing depends on it: a trace that cannot be read costs time alone.
//! - What is fetched for a trace is what the map says now: of what was overwritten since nothing is.

use std::collections::VecDeque;

use futures_util::future::{Either, select};
use futures_util::stream::{FuturesUnordered, StreamExt};
use uuid::Uuid;

use super::Volume;
use crate::cache::Cache;
use crate::cache::fetch::Fetcher;
use crate::cache::trace::{PAGE_SECTORS, Recorder, decode, encode, trace_key};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::{Manifest, Published, Snapshot};
use crate::map::{Location, Piece};
use crate::store::Store;
use crate::units::Lba;

/// Requests under way at once, beside those that somebody waits for.
const PARALLEL: usize = 8;
/// Pages that are looked up together, so that neighbours are one request.
const TOGETHER: usize = 64;
/// The most blocks of a request: 1 MiB.
const MOST_BLOCKS: u16 = 256;

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
}

impl BootOf {
    /// Of a clone: what it was cloned from.
    pub(super) fn clone_of(m: &Manifest) -> Option<Self> {
        let p = m.parents.first()?;
        Some(Self { volume: p.name.clone(), uuid: p.uuid, snapshot: p.snapshot, name: p.snapshot_name.clone() })
    }

    /// Of a snapshot that is served itself.
    pub(super) fn snapshot(m: &Manifest, s: &Snapshot) -> Self {
        Self { volume: m.name.clone(), uuid: m.uuid, snapshot: s.id, name: s.name.clone() }
    }

    fn key(&self) -> String {
        trace_key(&self.volume, self.snapshot)
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
    if let Err(e) = there().await {
        store.delete(&of.key()).await?;
        return Err(e);
    }
    Ok(())
}

/// Fetches what the trace of the snapshot that the volume began from names, in its order, for the cache; until the volume is gone.
pub(super) async fn prefetch<D: Disk>(volume: &Volume, store: &dyn Store, fetcher: &Fetcher<D>) {
    let (Some(Boot { of, .. }), Some(cache)) = (volume.boot(), volume.cache()) else { return };
    let mut gone = std::pin::pin!(volume.until_gone());
    let got = match select(std::pin::pin!(store.get(&of.key())), gone.as_mut()).await {
        Either::Left((got, _)) => got,
        Either::Right(_) => return,
    };
    let pages = match got.map(|(bytes, _)| decode(&bytes, of.uuid, of.snapshot)) {
        Ok(Ok(pages)) => pages,
        Ok(Err(e)) => {
            tracing::warn!("the boot trace of {}@{} is of no use: {e}", of.volume, of.name);
            return;
        }
        // There is none, for the most part.
        Err(e) => {
            tracing::debug!("the boot trace of {}@{}: {e}", of.volume, of.name);
            return;
        }
    };
    tracing::debug!("fetching {} pages of a boot from {}@{}", pages.len(), of.volume, of.name);
    let (mut fetching, mut keeping) = (FuturesUnordered::new(), FuturesUnordered::new());
    let (mut some, mut waiting, mut pieces) = (pages.chunks(TOGETHER), VecDeque::new(), Vec::new());
    loop {
        if waiting.is_empty()
            && let Some(pages) = some.next()
        {
            waiting.extend(requests(volume, cache, pages, &mut pieces));
            continue;
        }
        while fetching.len() < PARALLEL
            && keeping.len() < PARALLEL
            && let Some((at, blocks)) = waiting.pop_front()
        {
            fetching.push(fetcher.fetch_ahead(at, blocks));
        }
        tokio::select! {
            () = &mut gone => break,
            Some(fetched) = fetching.next() => keeping.extend(Option::map(fetched, |f| fetcher.keep(f))),
            Some(()) = keeping.next() => {}
            else => break,
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
