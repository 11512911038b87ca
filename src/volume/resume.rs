//! Going on with a volume whose process has died, from its log alone: the store is asked in the background. What waits at
//! a quiesced device gets its answer after the replay, even while the store is away.
//!
//! Until the volume is taken ([`super::take`]) it is *unconfirmed*: writes and flushes are served, and reads that the overlay
//! answers; other reads wait, and nothing is packed, uploaded or published.
//!
//! Invariants:
//! - This is only for a process that died while the kernel lived on: then the log has everything that the dead one had
//!   completed, and the store nothing that is not in the log. This is checked as soon as the store answers; after a
//!   power cut it need not be so, and entry numbers would be given out twice.
//! - The base is loaded, then the overlay drops what the store has, then waiting reads go on: at no moment
//!   does a reader see a base that lacks what the overlay has lost.
//! - A manifest that another attachment has taken since means that the volume is lost: nothing is acknowledged any more. So does damage in
//!   the store: with the log, which is kept, it can be attached again when that is mended.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::attach::{Attached, OpenLog, Request, Stores, is_ours};
use super::background::{Absences, Backoff, Holding, POLL_MANIFEST, trouble};
use super::stale::check_log;
use super::start::{Place, prepare_slots, start_log};
use super::take::{By, LogSays, look, take};
use super::{Parts, Volume};
use crate::chunk::reader::ChunkReader;
use crate::disk::{Disk, IoBuf};
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::Published;
use crate::map::Maps;
use crate::store::Store;
use crate::time::Timer;
use crate::units::{SECTOR, Seq};
use crate::wal::create::SuperblockFile;
use crate::wal::replay::{geometry_of, replay};

/// Damage that each look finds for so long is there.
const DAMAGE_IS_THERE: Duration = Duration::from_secs(15);

/// Takes up the volume `name`, whose last process has died, from its log. See the module's page.
///
/// # Errors
/// `NotFound` for a log without a superblock, `Corrupt`, the log's. None of the store's: nothing is asked of it.
pub async fn resume<D: Disk + Clone, T: Timer>(
    stores: Stores,
    name: &str,
    log: OpenLog<D>,
    timer: T,
    request: Request,
) -> Result<Attached<D, T>> {
    let OpenLog { file, disk, superblock, salt, .. } = log;
    let path = file.path().display().to_string();
    let Some(mut sb) = superblock else {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("the log {path} is empty: there is nothing to go on from"),
        ));
    };
    let mut replayed =
        replay(&disk, file.size()?, &sb.current).await.map_err(|e| e.context(format!("replaying the log {path}")))?;
    let geometry = geometry_of(&sb.current);
    let at = Place { disk: &disk, file: &file, geometry };
    prepare_slots(&at, &mut replayed).await?;
    let says = LogSays { ours: true, packed: replayed.packed, last: replayed.last_seq };
    let maps = Arc::new(Maps::new(sb.current.volume_sectors));
    let log = start_log(at, &mut sb, salt, replayed, says.packed, &maps).await?;
    tracing::info!(
        "volume {name:?} goes on from its log, which ends with entry {}; the store is asked meanwhile",
        says.last
    );
    let parts = Parts {
        name: name.to_owned(),
        uuid: sb.current.volume,
        size_bytes: sb.current.volume_sectors * SECTOR as u64,
        logical_block: sb.current.logical_block,
        read_only: request.read_only,
        flush_to: request.flush_to,
        io_timeout: request.io_timeout,
        gc: request.gc.clone(),
        store_url: stores.background.url(),
        log,
        log_file: file,
        maps,
    };
    let attached = Attached::new(parts, stores.background, disk.clone(), timer.clone());
    let volume = attached.volume.clone();
    let latching = Latching { disk, volume: volume.clone() };
    let taking = Taking {
        volume,
        store: stores.attach,
        disk: latching,
        reader: attached.reader.clone(),
        sb,
        says,
        request,
        absences: Absences::default(),
        damaged_since: None,
    };
    attached.background.confirm_by(taking.run(timer));
    Ok(attached)
}

/// The log's disk while lanes write to it: the kernel tells of a failed write or sync once, and whoever is told latches the log.
struct Latching<D> {
    disk: D,
    volume: Arc<Volume>,
}

impl<D> Latching<D> {
    fn seen(&self, result: io::Result<()>) -> io::Result<()> {
        result.inspect_err(|e| self.volume.log.fail(format!("writing or syncing the log's superblock failed: {e}")))
    }
}

impl<D: Disk> Disk for Latching<D> {
    async fn read_at(&self, offset: u64, dst: IoBuf) -> io::Result<()> {
        self.disk.read_at(offset, dst).await
    }

    async fn writev_at(&self, offset: u64, bufs: Vec<IoBuf>, dsync: bool) -> io::Result<()> {
        self.seen(self.disk.writev_at(offset, bufs, dsync).await)
    }

    async fn sync(&self) -> io::Result<()> {
        self.seen(self.disk.sync().await)
    }
}

/// The taking of a volume that is served already.
struct Taking<D> {
    volume: Arc<Volume>,
    store: Arc<dyn Store>,
    disk: Latching<D>,
    reader: ChunkReader,
    sb: SuperblockFile,
    says: LogSays,
    request: Request,
    absences: Absences,
    /// Since when each look has found damage.
    damaged_since: Option<Duration>,
}

impl<D: Disk> Taking<D> {
    /// Until it is taken; an error means that it is lost.
    async fn run<T: Timer>(mut self, timer: T) -> Result<Holding> {
        let mut backoff = Backoff::new();
        loop {
            let e = match self.once(&timer).await {
                Ok(Ok(holding)) => return Ok(holding),
                Ok(Err(trouble)) => trouble,
                Err(lost) => return Err(lost),
            };
            // No waiting mends what is damaged, but a page that a proxy sent in its place.
            self.damaged_since =
                (e.kind() == ErrorKind::Corrupt).then(|| self.damaged_since.unwrap_or_else(|| timer.now()));
            if self.damaged_since.is_some_and(|since| timer.now().saturating_sub(since) >= DAMAGE_IS_THERE) {
                return Err(
                    e.context(format!("volume {:?} cannot go on from what is in the store", self.volume.name()))
                );
            }
            trouble(&self.volume, "looking for the volume in the store", &e);
            if self.absences.are_some() {
                timer.sleep(POLL_MANIFEST).await;
            } else {
                backoff.pause(&timer).await;
            }
        }
    }

    /// One try. The outer error is for good; after the inner one it is tried again.
    async fn once<T: Timer>(&mut self, timer: &T) -> Result<Result<Holding>> {
        let mut published = match Published::load(&*self.store, self.volume.name()).await {
            Ok(published) => published,
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return if self.absences.one_more() { Err(e) } else { Ok(Err(e)) };
            }
            Err(e) => return Ok(Err(e)),
        };
        self.absences = Absences::default();
        let m = &published.manifest;
        if let Err(old) = check_log(&*self.store, m, &self.sb.current) {
            return Ok(Err(old));
        }
        if !is_ours(&self.sb, m) {
            let what = format!(
                "volume {:?} was taken by {} while it was not served here; its log {} is kept, and will be set aside",
                m.name,
                m.holder(),
                self.volume.log_file().path().display()
            );
            return Err(Error::new(ErrorKind::Fenced, what));
        }
        if m.deleting.is_some() {
            let what = format!("volume {:?} is being deleted", m.name);
            return Err(Error::new(ErrorKind::Fenced, what));
        }
        if m.size_bytes > self.volume.size_bytes() {
            // It was made larger by a process that did not live to note it.
            if let Err(e) = self.sb.set_size(&self.disk, m.size_bytes).await {
                return Ok(Err(e));
            }
            self.volume.grow(m.size_bytes);
        } else if m.size_bytes < self.volume.size_bytes() {
            let what = format!(
                "volume {:?} has {} bytes in the store, but {} in its log: attach it anew",
                m.name,
                m.size_bytes,
                self.volume.size_bytes()
            );
            return Err(Error::new(ErrorKind::Conflict, what));
        }
        // Who has it now shows in the next look at the manifest.
        let found = match look(&*self.store, m, self.says).await {
            Ok(found) => found,
            Err(e) => return Ok(Err(e)),
        };
        self.check_log(found.end.through)?;
        let by = By { store: &*self.store, disk: &self.disk, timer, request: &self.request };
        let found = match take(by, &mut published, &mut self.sb, self.says, found).await {
            Ok(found) => found,
            Err(e) => return Ok(Err(e)),
        };
        let (end, checkpoint_image) = (found.end, found.checkpoint_image);
        // Before the first reader can meet a location.
        self.reader.keys().set(&published.manifest);
        self.volume.maps.load_base(&found.maps.base_image());
        self.volume.maps.drop_overlay_through(end.through);
        self.volume.log.retire(end.through);
        tracing::info!("volume {:?} is confirmed: epoch {}", published.manifest.name, published.manifest.epoch);
        Ok(Ok(Holding { published, superblock: self.sb.clone(), end, checkpoint_image }))
    }

    /// The store must have nothing that the log had not, or numbers were given out twice.
    fn check_log(&self, stored: Seq) -> Result<()> {
        if stored <= self.says.last {
            return Ok(());
        }
        let what = format!(
            "the store has entries up to {stored} of volume {:?}, but the log ended with entry {} when it was taken up: the log's disk has \
             lost what it had written",
            self.volume.name(),
            self.says.last
        );
        Err(Error::new(ErrorKind::Corrupt, what))
    }
}
