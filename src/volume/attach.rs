//! Attaching: take an epoch, find the volume's state in the store and in the log, in this order.
//!
//! 1. The caller has locked the log and read its superblock, and has loaded the manifest.
//! 2. A nonce is drawn and made durable in the superblock, so that a manifest that carries it is known as ours
//!    even if the reply to the next step is lost.
//! 3. The manifest is replaced, conditionally, by one with the next epoch and that nonce.
//! 4. After an unclean end, where this epoch's own groups and chunk numbers begin is published. Only then may
//!    anything be uploaded.
//!
//! Before step 2 the log is replayed if it is ours (if the previous attachment's nonce is one that its superblock
//! knows), and before step 3 the base map is loaded, after an unclean end the whole groups beyond it are applied, and the
//! log gets room: an attach that must be refused is refused before it has taken the volume.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::background::{Attachment, Background};
use super::images::{Images, load_images};
use super::recover::{StoreEnd, apply_groups, checkpoint_end};
use super::start::{Place, prepare_slots, start_log};
use super::throttle::Throttle;
use super::{BackgroundStatus, ReadRequest, Volume};
use crate::chunk::reader::{ChunkReader, Keys};
use crate::disk::Disk;
use crate::disk::file::DataFile;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::{EpochEntry, FirstOwned, Manifest, Published, Writer, prefix};
use crate::map::Maps;
use crate::store::{Store, probe};
use crate::time::Timer;
use crate::units::{Nonce, SECTOR};
use crate::wal::create::{SuperblockFile, new_superblock};
use crate::wal::log::Geometry;
use crate::wal::replay::{Replay, replay};

/// Lanes' reads of chunks that may wait in the channel.
const READ_QUEUE: usize = 1024;

/// Who attaches, and how.
#[derive(Debug, Clone)]
pub struct Request {
    /// Take the volume over from another host, and lose what it has not uploaded.
    pub force: bool,
    /// Refuse writes.
    pub read_only: bool,
    /// Who we are, for the manifest.
    pub writer: Writer,
    /// This attachment's nonce.
    pub nonce: Nonce,
}

/// The log as the caller found it.
pub struct OpenLog<D: Disk> {
    /// The file, locked.
    pub file: Arc<DataFile>,
    /// The descriptor of this thread.
    pub disk: D,
    /// Its superblock; absent: it is new.
    pub superblock: Option<SuperblockFile>,
    /// Sizes for a new log.
    pub geometry: Geometry,
    /// Draws salts for segments.
    pub salt: Box<dyn FnMut() -> u64 + Send>,
}

/// The two ways to the same store: the first gives up soon, the second goes on for as long as the device lives.
#[derive(Debug, Clone)]
pub struct Stores {
    /// For attaching.
    pub attach: Arc<dyn Store>,
    /// For the background.
    pub background: Arc<dyn Store>,
}

/// An attached volume and what serves it.
pub struct Attached<D: Disk, T: Timer> {
    /// What lanes share.
    pub volume: Arc<Volume>,
    /// To be run on a store thread.
    pub background: Background<D, T>,
    /// Lanes' reads of chunks, to be served by [`super::host`].
    pub reads: mpsc::Receiver<ReadRequest>,
    /// Reads chunks.
    pub reader: ChunkReader,
}

/// Whether this log is the newest attachment's: then it holds everything acknowledged, and replay is right.
#[must_use]
pub fn is_ours(sb: &SuperblockFile, m: &Manifest) -> bool {
    let sb = &sb.current;
    sb.volume == m.uuid && (m.epoch.0 == 0 || sb.confirmed == m.nonce || sb.drawn.contains(&m.nonce))
}

/// Attaches the volume. See the module's page.
///
/// # Errors
/// `Busy` when another host has it and `force` is not set, `Corrupt`, `Conflict` or `Fenced` when another attaches at the
/// same time, the store's and the log's. Until step 3 nothing has changed in the store.
pub async fn attach<D: Disk + Clone, T: Timer>(
    stores: Stores,
    mut published: Published,
    log: OpenLog<D>,
    timer: T,
    request: Request,
) -> Result<Attached<D, T>> {
    let store = &*stores.attach;
    let before = published.manifest.clone();
    let OpenLog { file, disk, superblock, geometry, mut salt } = log;
    let ours = superblock.as_ref().is_some_and(|sb| is_ours(sb, &before));
    if before.writer.is_some() && !ours && !request.force {
        return Err(held(&before));
    }
    let mut replayed = match &superblock {
        Some(sb) if ours => replay(&disk, file.size()?, &sb.current)
            .await
            .map_err(|e| e.context(format!("replaying the log {}", file.path().display())))?,
        _ => Replay { next_generation: 1, ..Replay::default() },
    };
    let geometry = superblock.as_ref().map_or(geometry, |sb| Geometry {
        segment_bytes: sb.current.segment_bytes,
        max_segments: sb.current.max_segments,
    });

    let mut sb = match superblock {
        Some(mut sb) => {
            sb.draw(&disk, request.nonce).await?;
            sb
        }
        None => {
            let mut first =
                new_superblock(before.uuid, salt(), geometry, before.size_bytes / SECTOR as u64, before.logical_block);
            first.drawn.push(request.nonce);
            SuperblockFile::create(&disk, first).await?
        }
    };

    let name_prefix = prefix(&before.name);
    let clean = before.writer.is_none();
    // Whatever may be wrong with the volume or with the log's disk is found before the volume is taken.
    let images = load_images(store, &name_prefix, &before).await?;
    let found = find_groups(store, &name_prefix, &before, &images, clean, &replayed).await?;
    prepare_slots(&Place { disk: &disk, file: &file, geometry }, &mut replayed).await?;
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
    published
        .publish(store, |m| {
            m.epoch = m.epoch.next();
            m.nonce = request.nonce;
            m.writer = Some(request.writer.clone());
            m.conditional_writes = conditional;
            let first = clean.then(|| m.after_checkpoint());
            m.history.push(EpochEntry { epoch: m.epoch, nonce: m.nonce, first });
        })
        .await
        .map_err(|e| e.context(format!("taking epoch {} of volume {:?}", before.epoch.next(), before.name)))?;
    sb.update(&disk, |s| {
        s.confirmed = request.nonce;
        s.drawn.clear();
    })
    .await?;

    // A host that was alive until just now may have finished a group since the look; one that is dead has it in the log.
    let Found { maps, end } = if clean || ours {
        found
    } else {
        find_groups(store, &name_prefix, &before, &images, clean, &replayed).await?
    };
    if !clean {
        publish_first(&mut published, store, &end).await?;
        report_end(&before, &end, &replayed, ours);
    }

    let log = start_log(Place { disk: &disk, file: &file, geometry }, &mut sb, salt, replayed, &end, &maps).await?;
    let keys = Arc::new(Keys::default());
    keys.set_own(&name_prefix, &published.manifest.history);
    let reader = ChunkReader::new(stores.background.clone(), keys);
    let (reads_in, reads) = mpsc::channel(READ_QUEUE);
    let (commands_in, commands) = mpsc::channel(16);
    let volume = Arc::new(Volume {
        name: before.name.clone(),
        uuid: before.uuid,
        size_bytes: before.size_bytes,
        logical_block: before.logical_block,
        read_only: request.read_only,
        store_url: store.url(),
        log: Arc::new(log),
        log_file: file,
        maps,
        throttle: Throttle::default(),
        reads: reads_in,
        commands: commands_in,
        is_gone: false.into(),
        gone: tokio::sync::watch::Sender::new(false),
        gone_reason: std::sync::OnceLock::new(),
        store_metrics: std::sync::Mutex::default(),
        background: std::sync::Mutex::new(BackgroundStatus {
            epoch: published.manifest.epoch.0,
            conditional_writes: conditional,
            groups: end.group.0,
            checkpoint_group: before.checkpoint.as_ref().map_or(0, |c| c.group.0),
            ..BackgroundStatus::default()
        }),
    });
    let background = Background::new(Attachment {
        volume: volume.clone(),
        store: stores.background,
        disk,
        timer,
        reader: reader.clone(),
        published,
        superblock: sb,
        commands,
        end,
        full_image: images.full,
    });
    Ok(Attached { volume, background, reads, reader })
}

/// The volume's base as the store has it.
struct Found {
    maps: Arc<Maps>,
    end: StoreEnd,
}

async fn find_groups(
    store: &dyn Store,
    name_prefix: &str,
    m: &Manifest,
    images: &Images,
    clean: bool,
    replayed: &Replay,
) -> Result<Found> {
    let maps = Arc::new(Maps::new(m.size_bytes / SECTOR as u64));
    maps.load_base(&images.current);
    let end = if clean { checkpoint_end(m) } else { apply_groups(store, name_prefix, m, &maps).await? };
    if replayed.packed > end.through {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "the log says that entries up to {} are in {}, but whole groups end at {}: objects are missing there; put them back from a \
                 copy of the store, else see what `vb-ublk volume rebuild {} --dry-run` says",
                replayed.packed,
                store.url(),
                end.through,
                m.name
            ),
        ));
    }
    Ok(Found { maps, end })
}

pub(super) fn held(m: &Manifest) -> Error {
    let since = m.writer.as_ref().map_or(0, |w| w.since);
    Error::new(
        ErrorKind::Busy,
        format!(
            "volume {:?} is attached by {} since {}; its log is not here. Detach it there. If that host is gone for good, \
             --force attaches what had reached the store (up to the last whole group after entry {}) and loses what had not",
            m.name,
            m.holder(),
            utc(since),
            checkpoint_end(m).through
        ),
    )
}

/// `2026-11-20 21:53:00 UTC`.
#[must_use]
pub fn utc(unix: u64) -> String {
    let (days, secs) = (unix / 86400, unix % 86400);
    // Days to a civil date: Howard Hinnant's algorithm, for dates after 1970.
    let z = days + 719_468;
    let era = z / 146_097;
    let doe = z % 146_097;
    let yoe = (doe - doe / 1460 + doe / 36524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", secs / 3600, secs / 60 % 60, secs % 60)
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

fn report_end(before: &Manifest, end: &StoreEnd, replayed: &Replay, ours: bool) {
    tracing::info!(
        "volume {:?} was not detached by {}: the store ends with group {} (entry {}){}",
        before.name,
        before.holder(),
        end.group,
        end.through,
        if ours {
            format!(", the log with entry {}; nothing acknowledged is lost", replayed.last_seq)
        } else {
            "; what that host had not uploaded is lost".to_owned()
        }
    );
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn dates() {
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(utc(1_795_211_580), "2026-11-20 21:53:00 UTC");
    }
}
