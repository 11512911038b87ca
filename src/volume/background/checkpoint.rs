//! Checkpoints and the release: writing the base map beside the volume's life, then publishing it.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::{Background, Backoff, Event, PublishDone, Reply, lost, no_trouble, trouble};
use crate::checksum::sha256_hex;
use crate::disk::Disk;
use crate::error::{ErrorKind, Result};
use crate::manifest::images::load_delta;
use crate::manifest::{Checkpoint, Image, Manifest, NO_ATTACHMENT, Part, Published, part_key, prefix};
use crate::map::checkpoint::{Ident, encode_delta, encode_full, part_bytes};
use crate::map::{BaseImage, Run, laid_over};
use crate::store::Store;
use crate::time::Timer;
use crate::units::{BLOCK, ChunkNo, GroupNo, Nonce, Seq};
use crate::volume::Volume;
use crate::volume::snapshots::{self, Wanted};

/// A checkpoint is due after this many chunks.
const CHECKPOINT_CHUNKS: u64 = 1024;
/// Parts that are in memory and on their way at a time.
const PARTS_AT_ONCE: usize = 4;

/// What a checkpoint is of.
struct Cut {
    group: GroupNo,
    through: Seq,
    last_chunk: ChunkNo,
    image: BaseImage,
    /// The map as of the checkpoint before.
    before: BaseImage,
    number: u64,
    release: bool,
    /// An image of a parent's is not to be named any more.
    own: bool,
    snapshots: Vec<Wanted>,
}

impl<D: Disk + Clone, T: Timer> Background<D, T> {
    pub(super) fn checkpoint_if_due(&mut self) {
        let settled = self.groups.is_empty() && self.volume.log.passed_seq() <= self.cut;
        let release = self.detach.is_some() && settled && !self.volume.log.durable_is_news();
        // A failed log takes no more marks; what it holds and what verified is in the store all the same.
        let release = release || self.detach.is_some() && settled && self.volume.log.failure().is_some();
        let Some(published) = &self.published else { return };
        let last = published.manifest.checkpoint.as_ref().map_or(0, |c| c.last_chunk.0);
        let snapshots = self.snapshots.iter().any(|s| s.after <= self.applied_seq);
        let due = release || snapshots || self.applied_chunk.0 - last >= CHECKPOINT_CHUNKS;
        if !(due || self.gc.wants_checkpoint()) {
            return;
        }
        // The release waits for the packed mark, so that the next attach finds a log that agrees.
        if release && self.packed_durable < self.applied_seq && self.volume.log.failure().is_none() {
            return;
        }
        let Some(published) = self.published.take() else { return };
        self.gc.note_cut(self.applied_chunk);
        let (snapshots, replies) = self.due_snapshots(&published.manifest);
        let cut = Cut {
            group: self.applied,
            through: self.applied_seq,
            last_chunk: self.applied_chunk,
            image: self.volume.maps.base_image(),
            before: self.checkpoint_image.clone(),
            number: self.next_checkpoint,
            release,
            own: self.wants_own_images(),
            snapshots,
        };
        self.next_checkpoint += 1;
        // What is for garbage collection alone is of its cost.
        let store = if due { Arc::clone(&self.store) } else { self.gc.store() };
        let (volume, timer, prefix) = (self.volume.clone(), self.timer.clone(), self.prefix.clone());
        self.spawn(async move {
            let mut published = published;
            let mut backoff = Backoff::new();
            let done = loop {
                if volume.is_gone() {
                    break PublishDone::Stopped;
                }
                match checkpoint(&volume, &store, &prefix, &mut published, &cut).await {
                    Ok(()) => {
                        no_trouble(&volume);
                        let Cut { image, group, release, .. } = cut;
                        break PublishDone::Done { image, group, released: release };
                    }
                    Err(e) if e.kind() == ErrorKind::Fenced => break PublishDone::Fenced(e),
                    Err(e) => trouble(&volume, "publishing a checkpoint", &e),
                }
                backoff.pause(&timer).await;
            };
            Event::Published { published, done, replies }
        });
    }

    pub(super) fn publish_done(&mut self, published: Box<Published>, done: PublishDone, replies: Vec<Reply>) {
        self.published = Some(published);
        let mut result = Ok(());
        match done {
            PublishDone::Done { image, group, released } => {
                // The same map, even where no new checkpoint was needed: nothing but groups and batches of chunks changes it.
                self.checkpoint_image = image.clone();
                if let Some(p) = &self.published {
                    self.gc.note_published(&p.manifest, image);
                }
                self.checkpoint_group = group;
                if released {
                    self.volume.set_gone("it was detached");
                    // The manifest was this attachment's until now, and all is in the store.
                    for reply in self.barriers.take() {
                        let _ = reply.send(Ok(()));
                    }
                    if let Some(reply) = self.detach.take() {
                        let _ = reply.send(Ok(()));
                    }
                    self.finished = true;
                }
            }
            PublishDone::Changed(changed) => result = changed,
            PublishDone::Fenced(e) => {
                self.fenced(&e);
                result = Err(lost(&self.volume));
            }
            PublishDone::Stopped => result = Err(lost(&self.volume)),
        }
        let failed = result.is_err();
        let mut result = Some(result);
        for reply in replies {
            // Several are of one checkpoint, which fails only with the volume.
            let same = || if failed { Err(lost(&self.volume)) } else { Ok(()) };
            let _ = reply.send(result.take().unwrap_or_else(same));
        }
    }
}

/// Writes and publishes one checkpoint, if there is anything new.
async fn checkpoint(
    volume: &Volume,
    store: &Arc<dyn Store>,
    prefix: &str,
    published: &mut Published,
    cut: &Cut,
) -> Result<()> {
    let m = &published.manifest;
    let fold = cut.own && m.checkpoint.as_ref().is_some_and(Checkpoint::is_borrowed);
    if !fold && m.checkpoint.as_ref().is_some_and(|c| c.group == cut.group && c.last_chunk == cut.last_chunk)
        || m.checkpoint.is_none() && cut.group.0 == 0
    {
        // Nothing new to write; a release, or a snapshot of what is there, still has to be published.
        return publish(&**store, published, cut, |_| ()).await;
    }
    let ident = Ident { volume: m.uuid, number: cut.number };
    let blocks = volume.size_bytes() / BLOCK as u64;
    let name = |part: usize| part_key(cut.number, m.epoch, m.nonce, part);
    let part = part_bytes(&cut.image);
    let small = |runs: &[Run], full: &Image| encode_delta(runs, blocks, ident, part).total_bytes() * 4 <= full.bytes();
    let delta = match &m.checkpoint {
        Some(c) if !fold => delta_since(&**store, m, c, cut).await?.filter(|runs| small(runs, &c.full)).map(|r| (c, r)),
        _ => None,
    };
    let (full, delta) = match delta {
        Some((c, runs)) => {
            let parts = put_parts(&**store, prefix, encode_delta(&runs, blocks, ident, part), name).await?;
            (c.full.clone(), Some(Image { number: cut.number, parts, source: 0 }))
        }
        None => {
            let parts = put_parts(&**store, prefix, encode_full(&cut.image, ident, part), name).await?;
            (Image { number: cut.number, parts, source: 0 }, None)
        }
    };
    let next = Checkpoint { group: cut.group, through: cut.through, last_chunk: cut.last_chunk, full, delta };
    publish(&**store, published, cut, |m| m.checkpoint = Some(next)).await
}

/// What the cut changes in the last checkpoint's full image: what that one's delta does, which is read back rather than kept in
/// memory, and what has changed since. `None` when that delta cannot be read: a full image needs none.
async fn delta_since(store: &dyn Store, m: &Manifest, c: &Checkpoint, cut: &Cut) -> Result<Option<Vec<Run>>> {
    let since = BaseImage::diff(&cut.before, &cut.image);
    let Some(delta) = &c.delta else { return Ok(Some(since)) };
    match load_delta(store, m, delta).await {
        Ok(until) => Ok(Some(laid_over(&until, &since))),
        Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => {
            tracing::warn!("the last checkpoint of volume {:?} is damaged, the next one has a full image: {e}", m.name);
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// Publishes what a cut changes in the manifest.
async fn publish(
    store: &dyn Store,
    published: &mut Published,
    cut: &Cut,
    checkpoint: impl FnOnce(&mut Manifest),
) -> Result<()> {
    let mut next = published.manifest.clone();
    checkpoint(&mut next);
    for wanted in &cut.snapshots {
        // It may have been published, and not be known to be.
        if !next.snapshots.iter().any(|s| s.id == wanted.id) {
            snapshots::add(&mut next, wanted)?;
        }
    }
    if cut.release {
        next.writer = None;
    }
    published.publish(store, |m| *m = next).await
}

/// Writes an image's parts, one after the other.
///
/// # Errors
/// The store's.
pub(in crate::volume) async fn put_parts(
    store: &dyn Store,
    prefix: &str,
    parts: impl Iterator<Item = Bytes>,
    name: impl Fn(usize) -> String,
) -> Result<Vec<Part>> {
    let puts = parts.enumerate().map(|(i, body)| {
        let key = name(i);
        async move {
            let part = Part { key, bytes: body.len() as u64, sha256: sha256_hex(&body) };
            store.put(&format!("{prefix}{}", part.key), body).await.map(|()| part)
        }
    });
    stream::iter(puts).buffered(PARTS_AT_ONCE).try_collect().await
}

/// Writes a map as a full image of its own, by whoever has not attached the volume: no attachment's epoch is in the keys, which must not
/// pass for traces of one, and the nonce is of this very run, so that whoever else writes a checkpoint of that number writes other objects.
///
/// # Errors
/// The store's.
pub(in crate::volume) async fn put_unattached(
    store: &dyn Store,
    m: &Manifest,
    image: &BaseImage,
    number: u64,
    nonce: Nonce,
) -> Result<Image> {
    let ident = Ident { volume: m.uuid, number };
    let name = |part: usize| part_key(number, NO_ATTACHMENT, nonce, part);
    let parts = put_parts(store, &prefix(&m.name), encode_full(image, ident, part_bytes(image)), name).await?;
    Ok(Image { number, parts, source: 0 })
}
