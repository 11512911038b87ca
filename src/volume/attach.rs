//! Attaching: the log is replayed if it is ours, the volume is taken ([`super::take`]), and all that serves it is made.
//!
//! The caller has locked the log and read its superblock, and has loaded the manifest. The log is ours if the previous
//! attachment's nonce is one that its superblock knows. It is replayed and gets room before the volume is taken: an
//! attach that must be refused is refused before.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::background::{Attachment, Background, Holding};
use super::boot::BootOf;
use super::recover::checkpoint_end;
use super::stale::check_log;
use super::start::{Place, prepare_slots, start_log};
use super::take::{By, Found, LogSays, look, take};
use super::{Parts, ReadRequest, Volume};
use crate::chunk::reader::ChunkReader;
use crate::config::FlushTo;
use crate::disk::Disk;
use crate::disk::file::DataFile;
use crate::error::{Error, ErrorKind, Result};
use crate::gc::Policy;
use crate::manifest::{Manifest, Published, Writer};
use crate::store::Store;
use crate::time::Timer;
use crate::units::{Nonce, SECTOR};
use crate::wal::create::{SuperblockFile, new_superblock};
use crate::wal::log::Geometry;
use crate::wal::replay::{Replay, geometry_of, replay};

/// Who attaches, and how.
#[derive(Debug, Clone)]
pub struct Request {
    /// Take the volume over from another host, and lose what it has not uploaded.
    pub force: bool,
    /// Refuse writes.
    pub read_only: bool,
    /// How far flushes go.
    pub flush_to: FlushTo,
    /// How long a request may wait for the store; none: as long as it takes.
    pub io_timeout: Option<Duration>,
    /// How garbage is collected.
    pub gc: Policy,
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

impl<D: Disk + Clone, T: Timer> Attached<D, T> {
    /// All that serves a volume, which is not taken yet. `store` goes on for as long as the device lives.
    pub(super) fn new(parts: Parts, store: Arc<dyn Store>, disk: D, timer: T) -> Self {
        let (volume, reads, commands) = Volume::new(parts);
        let reader = ChunkReader::new(store.clone(), Arc::default());
        let (of, by) = (volume.clone(), reader.clone());
        let background = Background::new(Attachment { volume: of, store, disk, timer, reader: by, commands });
        Self { volume, background, reads, reader }
    }
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
/// same time, the store's and the log's. Nothing has changed in the store then, unless the log cannot be started.
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
    if let Some(sb) = &superblock {
        check_log(store, &before, &sb.current)?;
    }
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
    let geometry = superblock.as_ref().map_or(geometry, |sb| geometry_of(&sb.current));
    let mut sb = match superblock {
        Some(sb) => sb,
        None => {
            let mut first =
                new_superblock(before.uuid, salt(), geometry, before.size_bytes / SECTOR as u64, before.logical_block);
            first.drawn.push(request.nonce);
            SuperblockFile::create(&disk, first).await?
        }
    };
    // It may have been resized while nobody had it attached; its log is empty then.
    sb.set_size(&disk, before.size_bytes).await?;
    prepare_slots(&Place { disk: &disk, file: &file, geometry }, &mut replayed).await?;
    let says = LogSays { ours, packed: replayed.packed, last: replayed.last_seq };
    let by = By { store, disk: &disk, timer: &timer, request: &request };
    let found = look(store, &published.manifest, says).await?;
    let taken = take(by, &mut published, &mut sb, says, found).await?;

    let at = Place { disk: &disk, file: &file, geometry };
    let log = start_log(at, &mut sb, salt, replayed, taken.end.through, &taken.maps).await?;
    let parts = Parts {
        name: before.name,
        uuid: before.uuid,
        size_bytes: before.size_bytes,
        logical_block: before.logical_block,
        read_only: request.read_only,
        flush_to: request.flush_to,
        io_timeout: request.io_timeout,
        gc: request.gc.clone(),
        store_url: store.url(),
        log,
        log_file: file,
        maps: taken.maps.clone(),
    };
    let mut attached = Attached::new(parts, stores.background, disk, timer);
    attached.reader.keys().set(&published.manifest);
    if let Some(of) = BootOf::clone_of(&published.manifest) {
        attached.volume.set_boot(of);
    }
    let Found { checkpoint_image, end, .. } = taken;
    attached.background.take_up(Holding { published, superblock: sb, end, checkpoint_image });
    Ok(attached)
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
