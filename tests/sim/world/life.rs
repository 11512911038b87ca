//! One life of a volume: it is attached, judged by what is found, and works.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join_all, select};
use vb_ublk::cache::fetch::Fetcher;
use vb_ublk::disk::file::DataFile;
use vb_ublk::error::{ErrorKind, Result};
use vb_ublk::manifest::{Published, Writer};
use vb_ublk::store::Store;
use vb_ublk::time::Timer;
use vb_ublk::units::Nonce;
use vb_ublk::volume::Volume;
use vb_ublk::volume::attach::{Attached, OpenLog, Request, Stores, attach};
use vb_ublk::volume::engine::Engine;
use vb_ublk::volume::host::keep_log;
use vb_ublk::volume::lane::VolumeLane;
use vb_ublk::volume::reads::serve_reads;
use vb_ublk::volume::resume::resume;
use vb_ublk::wal::create::SuperblockFile;
use vb_ublk::wal::log::Geometry;

use super::{Lane, Load, SECTORS, Shared, log_bytes, stamps};
use crate::clock::SimClock;
use crate::machine::{SimDisk, Spawner};
use crate::oracle::After;
use crate::support_rng::Rng;

/// The longest after which a host that asks for nothing knows that it has lost the volume: some looks at the manifest, of which some fail.
const FINDS_OUT: Duration = Duration::from_secs(60);

/// One store, for three that use it.
pub(super) struct LifeStores {
    pub(super) attach: Arc<dyn Store>,
    pub(super) background: Arc<dyn Store>,
    /// For the reads of lanes, where they are not the background's.
    pub(super) reads: Option<Arc<dyn Store>>,
}

/// What a life needs.
pub(super) struct Life {
    pub(super) geometry: Geometry,
    pub(super) me: u32,
    pub(super) shared: Rc<Shared>,
    pub(super) disk: SimDisk,
    pub(super) stores: LifeStores,
    pub(super) file: Arc<DataFile>,
    pub(super) clock: SimClock,
    pub(super) spawner: Spawner,
    pub(super) force: bool,
    /// Go on from the log.
    pub(super) resume: bool,
    pub(super) after: Option<After>,
    pub(super) load: Load,
    /// See [`World::life_without_marks`].
    pub(super) without_marks: bool,
    /// Its state was found to keep the rule.
    pub(super) judged: Rc<Cell<bool>>,
}

impl Life {
    /// The next write or sync of the log's disk fails.
    pub(super) fn break_disk(&self) {
        let shared = &self.shared;
        shared.broken.set(true);
        shared.saw(|s| s.broken += 1);
        if shared.below(2) == 0 { self.disk.fail_next_write() } else { self.disk.fail_next_sync() }
    }

    /// As often as it takes: what a dead process has sent may land at any time and look like another host.
    async fn attach(&self) -> Attached<SimDisk, SimClock> {
        let (mut races, mut silences) = (0, 0);
        // Each header of a chunk is asked for, without the retries that an attach has, and any may go without an answer: of fifty, one try in
        // four hundred has them all.
        while races < 20 && silences < 5000 {
            match self.try_attach().await {
                // Who attaches tries again, as a person or systemd does.
                Err(e) if self.shared.rough && e.kind().is_transient() => {
                    silences += 1;
                    self.clock.sleep(Duration::from_millis(500)).await;
                }
                Err(e) if matches!(e.kind(), ErrorKind::Fenced | ErrorKind::Conflict) => {
                    self.shared.saw(|s| s.again += 1);
                    races += 1;
                }
                attached => return attached.expect("attached"),
            }
        }
        panic!("{races} attaches have lost a race against nobody, and {silences} got no answer");
    }

    async fn try_attach(&self) -> Result<Attached<SimDisk, SimClock>> {
        let superblock = SuperblockFile::load(&self.disk, log_bytes(self.geometry)).await?;
        let mut salts = Rng(self.shared.rng.borrow_mut().next());
        let log = OpenLog {
            file: self.file.clone(),
            disk: self.disk.clone(),
            superblock,
            geometry: self.geometry,
            salt: Box::new(move || salts.next()),
        };
        let request = Request {
            force: self.force,
            read_only: false,
            flush_to: self.shared.flush_to,
            io_timeout: None,
            gc: self.shared.gc.clone(),
            writer: Writer { host: "sim".into(), pid: 1, since: 1 },
            nonce: Nonce(self.shared.rng.borrow_mut().next()),
        };
        let stores = Stores { attach: self.stores.attach.clone(), background: self.stores.background.clone() };
        if self.resume {
            return resume(stores, "v", log, self.clock.clone(), request).await;
        }
        let published = Published::load(&*self.stores.attach, "v").await?;
        attach(stores, published, log, self.clock.clone(), request).await
    }

    fn lane(&self, volume: &Arc<Volume>) -> Rc<Lane> {
        let lane = VolumeLane::new(volume.clone(), self.disk.clone(), None, self.clock.clone());
        lane.clone().tasks().into_iter().for_each(|t| self.spawner.spawn(t));
        let sealer = lane.clone();
        self.spawner.when_idle(move || sealer.seal());
        lane
    }
}

/// Before the store has been asked, perhaps: writes and flushes, without a look at what is there.
async fn early(life: &Life, lanes: &[Rc<Lane>], volume: &Volume) {
    let shared = &life.shared;
    let workers = lanes.iter().map(|lane| async move {
        for _ in 0..shared.below(8) {
            if !volume.is_confirmed() {
                shared.saw(|s| s.resumed += 1);
            }
            let done = if shared.below(4) == 0 {
                shared.flush(lane, life.me).await
            } else {
                shared.write(lane, life.me).await
            };
            if let Err(e) = done {
                assert!(shared.broken.get(), "nothing fails here, and this did: {e}");
                return;
            }
        }
    });
    join_all(workers).await;
}

pub(super) async fn live(life: Life) {
    let shared = &life.shared;
    let Attached { volume, background, reads, reader } = life.attach().await;
    life.spawner.spawn(background.run());
    let reader = match &life.stores.reads {
        Some(store) => reader.over(store.clone()),
        None => reader,
    };
    life.spawner.spawn(async move {
        serve_reads(reads, &Fetcher::<SimDisk>::new(reader, None), std::future::pending()).await;
    });
    life.spawner.spawn(keep_log(volume.clone(), life.disk.clone(), life.clock.clone()));
    let lanes: Vec<Rc<Lane>> = (0..life.load.lanes).map(|_| life.lane(&volume)).collect();
    // What is asked for from now on is not what was found, though it is seen when that is judged.
    let begun = shared.oracle.borrow().now();
    if life.resume {
        // Whoever meets it, a lane or who takes the volume, has to tell the others.
        if life.load.breaks && shared.below(2) == 0 {
            life.break_disk();
        }
        early(&life, &lanes, &volume).await;
        if shared.broken.get() {
            // What failed now is in doubt until the next life: nothing is to be judged yet.
            return;
        }
    }
    let found = stamps(&lanes[0], 0, SECTORS).await.expect("all can be read");
    if let Some(after) = life.after {
        let verdict = shared.oracle.borrow_mut().judge(after, &found, begun);
        verdict.unwrap_or_else(|e| panic!("{e}"));
        shared.saw(|s| s.judged += 1);
    }
    if shared.owner.replace(Some(life.me)) != Some(life.me) {
        // What the other host has in flight is in nobody's way any more.
        shared.busy.borrow_mut().clear();
    }
    life.judged.set(true);
    let workers = 0..life.load.workers * lanes.len();
    let work = join_all(workers.map(|at| shared.work(&life, &lanes, at, &volume)));
    if life.without_marks {
        life.disk.hold_superblock();
        select(std::pin::pin!(work), std::pin::pin!(life.clock.sleep(Duration::from_secs(60)))).await;
    } else {
        work.await;
    }
    if shared.owner.get().is_some_and(|o| o != life.me) {
        // One that asks for nothing more is told, too: it looks.
        let knew = volume.is_gone();
        // In small steps: time may leap past a task that has not had its turn.
        for _ in 0..100 {
            life.clock.sleep(FINDS_OUT / 100).await;
        }
        assert!(!shared.haunt(&lanes[0]).await, "a host that lost the volume {FINDS_OUT:?} ago still acknowledges");
        shared.saw(|s| s.heard += u64::from(!knew));
    }
    let told = volume.status().background;
    let space = told.space.unwrap_or_default();
    shared.saw(|s| {
        s.groups += told.groups;
        s.deleted += space.gc_deleted_objects;
        s.moved += space.gc_written_bytes >> 12;
    });
}
