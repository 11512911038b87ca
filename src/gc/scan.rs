//! What is in the store: the volume's chunks, what snapshots keep of them, and what nobody knows.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use uuid::Uuid;

use super::usage::{HEADER_BLOCKS, Holes, Usage, named_by};
use crate::chunk::header::{self, HEADER_ROOM, MAX_BLOCKS};
use crate::error::Result;
use crate::manifest::images::load_checkpoint;
use crate::manifest::{Manifest, Published, prefix};
use crate::map::BaseImage;
use crate::store::{Store, list_folder};
use crate::units::{BLOCK, ChunkNo};

/// Keys that count for nothing.
pub type Orphans = Vec<String>;

/// What garbage collection knows of a volume; kept from round to round.
pub struct Known {
    /// How much of each chunk is live.
    pub usage: Usage,
    /// The chunks that snapshots name.
    pub held: HashSet<ChunkNo>,
    /// The same by snapshot.
    snapshots: HashMap<Uuid, Vec<ChunkNo>>,
}

impl Known {
    /// Nothing yet.
    #[must_use]
    pub fn new(volume_blocks: u64) -> Self {
        Self { usage: Usage::new(volume_blocks), held: HashSet::new(), snapshots: HashMap::new() }
    }

    /// Lists the volume's chunks. Those of the volume's own up to `last` become known; returned are chunks that can never count: of
    /// attachments before this one, under numbers that others own.
    ///
    /// # Errors
    /// The store's.
    pub async fn list(&mut self, store: &dyn Store, m: &Manifest, last: ChunkNo) -> Result<Orphans> {
        let folder = format!("{}chunks/", prefix(&m.name));
        let listed = list_folder(store, &folder).await?;
        let mut orphans = Vec::new();
        for o in listed {
            let Some((chunk, epoch, nonce)) = o.key.strip_prefix(&folder).and_then(header::parse_name) else {
                continue;
            };
            if m.owner(chunk) == Some((epoch, nonce)) {
                if chunk <= last {
                    self.usage.add(chunk, stored_blocks(o.size), Holes::Unknown);
                }
            } else if epoch < m.epoch {
                orphans.push(o.key);
            }
        }
        Ok(orphans)
    }

    /// Learns what snapshots that it did not know keep, and forgets those that are gone.
    ///
    /// # Errors
    /// `Corrupt` when a snapshot's map cannot be read: nobody knows what it keeps then. The store's.
    pub async fn look_at_snapshots(&mut self, store: &dyn Store, m: &Manifest) -> Result<()> {
        self.snapshots.retain(|id, _| m.snapshots.iter().any(|s| s.id == *id));
        for s in &m.snapshots {
            let Entry::Vacant(place) = self.snapshots.entry(s.id) else { continue };
            let image = load_checkpoint(store, &m.at_snapshot(s), s.checkpoint.as_ref()).await;
            let image = image.map_err(|e| e.context(format!("reading the map of snapshot {:?}", s.name)))?;
            place.insert(named_by(&image));
        }
        self.held = self.snapshots.values().flatten().copied().collect();
        Ok(())
    }

    /// Counts what a map names; gives way to others now and then.
    pub async fn count(&mut self, image: BaseImage) {
        for row in 0..self.usage.rows(&image) {
            self.usage.count_row(&image, row);
            GiveWay::once().await;
        }
        self.usage.counted(image);
    }
}

/// Stored blocks of a chunk's object of so many bytes.
const fn stored_blocks(bytes: u64) -> u16 {
    let blocks = bytes.saturating_sub(HEADER_ROOM as u64) / BLOCK as u64;
    if blocks > MAX_BLOCKS as u64 { MAX_BLOCKS as u16 } else { blocks as u16 }
}

const _: () = assert!(HEADER_BLOCKS as usize * BLOCK == HEADER_ROOM);

/// What nobody attached knows of a volume: for `gc --dry-run`.
///
/// # Errors
/// As [`Known::look_at_snapshots`], and those of reading the map.
pub async fn look(store: &dyn Store, name: &str) -> Result<(Known, Orphans, Manifest)> {
    let m = Published::load(store, name).await?.manifest;
    let image = load_checkpoint(store, &m, m.checkpoint.as_ref()).await?;
    let mut known = Known::new(image.volume_blocks());
    let last = m.last_chunk();
    let orphans = known.list(store, &m, last).await?;
    known.look_at_snapshots(store, &m).await?;
    known.count(image).await;
    Ok((known, orphans, m))
}

/// Lets the other tasks of the thread go on, once.
pub(super) struct GiveWay(bool);

impl GiveWay {
    pub(super) const fn once() -> Self {
        Self(false)
    }
}

impl Future for GiveWay {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.0, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
