//! Taking a volume: what the store has of it is found, and the next epoch is drawn, by conditional writes.
//!
//! 1. The base map is loaded and, after an unclean end, the whole groups beyond it are applied ([`look`]): whatever may be
//!    wrong with the volume is found before it is taken.
//! 2. A nonce is made durable in the log's superblock, so that a manifest that carries it is known as ours even if
//!    the reply to step 3 is lost.
//! 3. The manifest is replaced, conditionally, by one with the next epoch and that nonce.
//! 4. After an unclean end, where this epoch's own groups and chunk numbers begin is published. Only then may
//!    anything be uploaded.
//!
//! Where the store ignores conditional writes, two hosts that take a volume at the same moment may both have looked before
//! either has written. There, whoever has written waits for [`WEAK_PAUSE`] and looks again: of two whose writes come
//! within that time of their looks only the last goes on.
//!
//! May be begun again after an error, with the manifest loaded anew: a step that had been taken is not taken twice.

use std::sync::Arc;
use std::time::Duration;

use super::attach::Request;
use super::recover::{StoreEnd, apply_groups, checkpoint_end, newer_chunks};
use super::snapshots::{not_deleting, still_there};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::images::load_image;
use crate::manifest::{EpochEntry, FirstOwned, Manifest, Published, prefix};
use crate::map::{BaseImage, Maps};
use crate::store::{Store, probe};
use crate::time::Timer;
use crate::units::{SECTOR, Seq};
use crate::wal::create::SuperblockFile;

/// Longer than a host takes from its look at the manifest to its write of it, on a store in good health.
pub const WEAK_PAUSE: Duration = Duration::from_secs(3);

/// What the log says of the volume.
#[derive(Debug, Clone, Copy)]
pub(super) struct LogSays {
    /// It is the newest attachment's.
    pub ours: bool,
    /// Everything up to here is in the store.
    pub packed: Seq,
    /// Its newest entry.
    pub last: Seq,
}

/// What the store has of a volume.
pub(super) struct Found {
    /// The map as of the last checkpoint.
    pub checkpoint_image: BaseImage,
    /// The volume's base, with all whole groups.
    pub maps: Arc<Maps>,
    /// Where the whole groups end.
    pub end: StoreEnd,
}

/// Step 1. Nothing is changed.
///
/// # Errors
/// `Corrupt`, also when the store lacks what the log says that it has; the store's.
pub(super) async fn look(store: &dyn Store, m: &Manifest, log: LogSays) -> Result<Found> {
    not_deleting(m)?;
    still_there(store, m).await?;
    let checkpoint_image = load_image(store, m).await?;
    let (maps, end) = find_groups(store, m, &checkpoint_image, log.packed).await?;
    Ok(Found { checkpoint_image, maps, end })
}

/// What one takes a volume by.
pub(super) struct By<'a, D, T> {
    pub store: &'a dyn Store,
    /// The log's.
    pub disk: &'a D,
    pub timer: &'a T,
    pub request: &'a Request,
}

/// Steps 2 to 4: takes the volume whose manifest is `published`, and of which `found` was found.
///
/// # Errors
/// `Conflict` or `Fenced` when another takes it at the same time, the store's and the log's. Until step 3 nothing has changed in
/// the store.
pub(super) async fn take<D: Disk, T: Timer>(
    by: By<'_, D, T>,
    published: &mut Published,
    sb: &mut SuperblockFile,
    log: LogSays,
    mut found: Found,
) -> Result<Found> {
    let By { store, disk, timer, request } = by;
    let nonce = request.nonce;
    let before = published.manifest.clone();
    let name_prefix = prefix(&before.name);
    let clean = before.writer.is_none();
    let capability = probe::conditional_writes(store, &name_prefix)
        .await
        .map_err(|e| e.context(format!("trying conditional writes in {}", store.url())))?;
    let conditional = capability == probe::Capability::Honoured;
    if !conditional {
        tracing::warn!(
            "{} ignores conditional writes: nothing there stops two hosts from attaching volume {:?} at once; attach it on one host at a time",
            store.url(),
            before.name
        );
    }
    if sb.current.confirmed != nonce && !sb.current.drawn.contains(&nonce) {
        sb.draw(disk, nonce).await?;
    }
    // An earlier try may have come so far, and not have heard of it.
    let taken_before = before.nonce == nonce;
    if !taken_before {
        published
            .publish(store, |m| {
                m.epoch = m.epoch.next();
                m.nonce = nonce;
                m.writer = Some(request.writer.clone());
                m.conditional_writes = conditional;
                let first = clean.then(|| m.after_checkpoint());
                m.history.push(EpochEntry { epoch: m.epoch, nonce, first });
            })
            .await
            .map_err(|e| e.context(format!("taking epoch {} of volume {:?}", before.epoch.next(), before.name)))?;
    }
    if !conditional {
        timer.sleep(WEAK_PAUSE).await;
        published.still_ours(store).await?;
    }
    sb.update(disk, |s| {
        s.confirmed = nonce;
        s.drawn.clear();
    })
    .await?;

    // A host that was alive until just now may have finished a group since the look; one that is dead has it in the log.
    if !clean && !log.ours {
        (found.maps, found.end) = find_groups(store, &before, &found.checkpoint_image, log.packed).await?;
    }
    if published.manifest.history.last().is_none_or(|e| e.first.is_none()) {
        publish_first(published, store, &found.end).await?;
        report_end(&before, &found.end, log);
    }
    Ok(found)
}

async fn find_groups(
    store: &dyn Store,
    m: &Manifest,
    checkpoint: &BaseImage,
    packed: Seq,
) -> Result<(Arc<Maps>, StoreEnd)> {
    let maps = Arc::new(Maps::new(m.size_bytes / SECTOR as u64));
    maps.load_base(checkpoint);
    let clean = m.writer.is_none();
    let end = if clean {
        let mut end = checkpoint_end(m);
        // None of them counts; they may show that the manifest does not either.
        newer_chunks(store, &prefix(&m.name), m, &mut end).await?;
        end
    } else {
        apply_groups(store, &prefix(&m.name), m, &maps).await?
    };
    if packed > end.through {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "the log says that entries up to {packed} are in {}, but whole groups end at {}: objects are missing there; put them back \
                 from a copy of the store, else see what `vb-ublk volume rebuild {} --dry-run` says",
                store.url(),
                end.through,
                m.name
            ),
        ));
    }
    Ok((maps, end))
}

async fn publish_first(published: &mut Published, store: &dyn Store, end: &StoreEnd) -> Result<()> {
    let first = FirstOwned { group: end.group.next(), chunk: end.last_chunk.next() };
    published
        .publish(store, |m| {
            if let Some(e) = m.history.last_mut() {
                e.first = Some(first);
            }
        })
        .await
        .map_err(|e| e.context("publishing where this epoch's chunks begin"))
}

fn report_end(before: &Manifest, end: &StoreEnd, log: LogSays) {
    tracing::info!(
        "volume {:?} was not detached by {}: the store ends with group {} (entry {}){}",
        before.name,
        before.holder(),
        end.group,
        end.through,
        if log.ours {
            format!(", the log with entry {}; nothing acknowledged is lost", log.last)
        } else {
            "; what that host had not uploaded is lost".to_owned()
        }
    );
}
