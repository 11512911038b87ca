//! What outlives a crash, and one life of a volume in it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join_all, select};
use tempfile::TempDir;
use vb_ublk::disk::IoBuf;
use vb_ublk::disk::file::DataFile;
use vb_ublk::error::{ErrorKind, Result};
use vb_ublk::gc::Policy;
use vb_ublk::image::ImageSink;
use vb_ublk::manifest::{Published, Writer};
use vb_ublk::store::Store;
use vb_ublk::time::Timer;
use vb_ublk::units::{Lba, Nonce, SECTOR};
use vb_ublk::volume::admin::{self, CreateOptions};
use vb_ublk::volume::attach::{Attached, OpenLog, Request, Stores, attach};
use vb_ublk::volume::engine::{Engine, IoFault};
use vb_ublk::volume::export::{Base, export};
use vb_ublk::volume::host::{keep_log, serve_reads};
use vb_ublk::volume::lane::VolumeLane;
use vb_ublk::volume::resume::resume;
use vb_ublk::volume::{Command, Volume};
use vb_ublk::wal::codec::SLOTS_START;
use vb_ublk::wal::create::SuperblockFile;
use vb_ublk::wal::log::Geometry;

use crate::clock::SimClock;
use crate::machine::{Crash, SimDisk, Source, Spawner, run_all};
use crate::oracle::{After, Oracle};
use crate::store::SimStore;
use crate::support_rng::Rng;

/// Small: what is written meets what was written.
const SECTORS: u64 = 256;
const GEOMETRY: Geometry = Geometry { segment_bytes: 1 << 20, max_segments: 4 };
/// So little that a life writes over all of it several times.
const TIGHT: Geometry = Geometry { segment_bytes: 1 << 20, max_segments: 2 };

const fn log_bytes(g: Geometry) -> u64 {
    SLOTS_START + g.segment_bytes as u64 * g.max_segments as u64
}

type Outcome<T> = std::result::Result<T, IoFault>;
type Lane = VolumeLane<SimDisk, SimClock>;

/// Who asks for how much in a life.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) lanes: usize,
    /// On each lane, each with one request at a time.
    pub(crate) workers: usize,
    /// Of each worker.
    pub(crate) requests: usize,
    /// A write or a sync of the disk may fail.
    pub(crate) breaks: bool,
}

/// What a run has met, to see that it did what it is for.
#[derive(Default, Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub(crate) judged: u64,
    pub(crate) taken: u64,
    pub(crate) late: u64,
    pub(crate) drained: u64,
    pub(crate) groups: u64,
    /// Attaches that lost against what a dead process had sent.
    pub(crate) again: u64,
    /// Writes that a host which had lost the volume did not acknowledge.
    pub(crate) stopped: u64,
    /// Disks that failed.
    pub(crate) broken: u64,
    /// Lives that went on from the log, and had served before the store had been asked.
    pub(crate) resumed: u64,
    /// Objects that garbage collection has deleted, and bytes that it has written.
    pub(crate) deleted: u64,
    pub(crate) moved: u64,
    /// Snapshots that were read in the end, and those of which it was known what they have to hold.
    pub(crate) snapshots: u64,
    pub(crate) exact: u64,
}

impl Seen {
    pub(crate) fn plus(self, b: Self) -> Self {
        Self {
            judged: self.judged + b.judged,
            taken: self.taken + b.taken,
            late: self.late + b.late,
            drained: self.drained + b.drained,
            groups: self.groups + b.groups,
            again: self.again + b.again,
            stopped: self.stopped + b.stopped,
            broken: self.broken + b.broken,
            resumed: self.resumed + b.resumed,
            deleted: self.deleted + b.deleted,
            moved: self.moved + b.moved,
            snapshots: self.snapshots + b.snapshots,
            exact: self.exact + b.exact,
        }
    }
}

/// Sectors that a request in flight touches.
#[derive(Clone, Copy)]
struct Range {
    number: u64,
    lba: u64,
    sectors: u64,
}

struct Shared {
    rng: RefCell<Rng>,
    oracle: RefCell<Oracle>,
    /// What requests in flight touch.
    busy: RefCell<Vec<Range>>,
    next_range: Cell<u64>,
    /// The host whose requests count; none while another is taking the volume over.
    owner: Cell<Option<u32>>,
    /// Whether the disk of the present life has failed: from then on writes and flushes may fail.
    broken: Cell<bool>,
    seen: Cell<Seen>,
    gc: Policy,
    /// By name: what a snapshot has to hold, where it is known.
    snapshots: RefCell<BTreeMap<String, Option<Vec<u64>>>>,
}

pub(crate) struct World {
    shared: Rc<Shared>,
    disk: RefCell<SimDisk>,
    geometry: Geometry,
    store: SimStore,
    /// The simulated disk has the data; this one the name, the size and the lock.
    file: RefCell<Arc<DataFile>>,
    dir: TempDir,
    hosts: Cell<u32>,
    /// What has happened since the state was last judged; none: nothing.
    after: Cell<Option<After>>,
    /// The present host has had a life that served.
    served: Cell<bool>,
    trace: RefCell<String>,
}

fn content(stamp: u64, sector: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(SECTOR);
    while out.len() < SECTOR {
        out.extend_from_slice(&stamp.to_le_bytes());
        out.extend_from_slice(&(if stamp == 0 { 0 } else { sector }).to_le_bytes());
    }
    out
}

/// Whose the sector is.
fn stamp_of(bytes: &[u8], sector: u64) -> u64 {
    let stamp = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    assert!(bytes == content(stamp, sector), "sector {sector} is torn, or another's (stamp {stamp})");
    stamp
}

impl Shared {
    fn below(&self, n: u64) -> u64 {
        self.rng.borrow_mut().below(n)
    }

    fn saw(&self, what: impl FnOnce(&mut Seen)) {
        let mut seen = self.seen.get();
        what(&mut seen);
        self.seen.set(seen);
    }

    /// A range that no request in flight touches.
    fn range(&self) -> Option<Range> {
        let sectors = match self.below(4) {
            0 => 1 + self.below(7),
            1 => 8,
            _ => 1 + self.below(48),
        };
        let mut lba = self.below(SECTORS - sectors);
        if self.below(2) == 0 {
            lba -= lba % 8;
        }
        let free = self.busy.borrow().iter().all(|r| r.lba + r.sectors <= lba || lba + sectors <= r.lba);
        let range = Range { number: self.next_range.replace(self.next_range.get() + 1), lba, sectors };
        free.then(|| self.busy.borrow_mut().push(range))?;
        Some(range)
    }

    fn release(&self, range: Range) {
        self.busy.borrow_mut().retain(|r| r.number != range.number);
    }

    async fn write(&self, lane: &Lane) -> Outcome<()> {
        let Some(range) = self.range() else { return Ok(()) };
        let Range { lba, sectors, .. } = range;
        let (kind, fua) = (self.below(6), self.below(6) == 0);
        let kind = if self.oracle.borrow().in_doubt(lba, sectors) { kind.max(2) } else { kind };
        let id = self.oracle.borrow_mut().issue(lba, sectors, kind < 2);
        match kind {
            0 => lane.discard(Lba(lba), sectors, fua).await?,
            1 => lane.write_zeroes(Lba(lba), sectors, fua).await?,
            _ => {
                let buf = IoBuf::zeroed(sectors as usize * SECTOR);
                (0..sectors).for_each(|s| buf.copy_in(s as usize * SECTOR, &content(id as u64 + 1, lba + s)));
                lane.write(Lba(lba), buf, fua).await?;
            }
        }
        self.oracle.borrow_mut().complete(id, fua);
        self.release(range);
        Ok(())
    }

    async fn read(&self, lane: &Lane, me: u32) -> Outcome<()> {
        let Some(range) = self.range() else { return Ok(()) };
        let Range { lba, sectors, .. } = range;
        let found = stamps(lane, lba, sectors).await?;
        // Another host may have taken over meanwhile, and have written.
        for (s, stamp) in (lba..).zip(found).filter(|_| self.owner.get() == Some(me)) {
            assert_eq!(stamp, self.oracle.borrow().expected(s), "sector {s} while it lives");
        }
        self.release(range);
        Ok(())
    }

    async fn flush(&self, lane: &Lane) -> Outcome<()> {
        let covered = self.oracle.borrow().completed();
        lane.flush().await?;
        self.oracle.borrow_mut().mark(&covered, |w| w.durable = true);
        Ok(())
    }

    async fn drain(&self, volume: &Volume, me: u32) -> Outcome<()> {
        let covered = self.oracle.borrow().completed();
        if volume.command(Command::Drain).await.is_err() {
            return Err(IoFault::Gone);
        }
        // While another host takes over, what this one uploads may come too late, and it does not know yet.
        if self.owner.get() == Some(me) {
            self.oracle.borrow_mut().mark(&covered, |w| w.drained = true);
            self.saw(|s| s.drained += 1);
        }
        Ok(())
    }

    /// Makes a snapshot, deletes one, or has the garbage collected.
    async fn keep_house(&self, volume: &Volume, me: u32, alone: bool) -> Outcome<()> {
        let name = format!("s{}", self.below(6));
        let there = self.snapshots.borrow().contains_key(&name);
        let done = match self.below(3) {
            0 => volume.command(Command::CollectGarbage).await,
            _ if there => {
                // Whatever comes of it: it may be gone from now on.
                self.snapshots.borrow_mut().remove(&name);
                volume.command(|reply| Command::DeleteSnapshot { name, reply }).await
            }
            _ => {
                let now: Vec<u64> = (0..SECTORS).map(|s| self.oracle.borrow().expected(s)).collect();
                let done = volume.command(|reply| Command::Snapshot { name: name.clone(), created: 1, reply }).await;
                if done.is_ok() && self.owner.get() == Some(me) {
                    self.snapshots.borrow_mut().insert(name, alone.then_some(now));
                }
                done
            }
        };
        match done {
            Err(e) if self.owner.get() != Some(me) || volume.is_gone() => {
                let _ = e;
                Err(IoFault::Gone)
            }
            // One that was made by a process that did not live to hear of it.
            Err(e) if e.kind() == ErrorKind::Exists || e.kind() == ErrorKind::NotFound => Ok(()),
            Err(e) => panic!("{e}"),
            Ok(()) => Ok(()),
        }
    }

    /// What a host that has lost the volume still does: none of it may ever show.
    async fn haunt(&self, lane: &Lane) {
        let (lba, sectors) = (self.below(SECTORS - 8), 1 + self.below(8));
        let buf = IoBuf::zeroed(sectors as usize * SECTOR);
        (0..sectors).for_each(|s| buf.copy_in(s as usize * SECTOR, &content(u64::MAX, lba + s)));
        let fua = self.below(4) == 0;
        if lane.write(Lba(lba), buf, fua).await.is_err() {
            self.saw(|s| s.stopped += 1);
        }
    }

    async fn work(&self, life: &Life, lane: &Lane, volume: &Volume) {
        let (me, clock) = (life.me, &life.clock);
        for _ in 0..life.load.requests {
            if life.load.breaks && self.below(60) == 0 {
                life.break_disk();
            }
            if self.owner.get().is_some_and(|o| o != me) {
                self.haunt(lane).await;
                continue;
            }
            if self.gc.enabled && self.below(14) == 0 {
                // What failed is in doubt.
                let alone = life.load.workers == 1 && life.load.lanes == 1 && !self.broken.get();
                if let Err(e) = self.keep_house(volume, me, alone).await {
                    let may = self.broken.get() || self.owner.get() != Some(me);
                    assert!(may, "nothing fails here, and this did: {e}");
                }
                continue;
            }
            let done = match self.below(32) {
                0 => self.drain(volume, me).await,
                1 => {
                    clock.sleep(Duration::from_millis(self.below(8000))).await;
                    Ok(())
                }
                2..4 => self.flush(lane).await,
                4..12 => self.read(lane, me).await,
                _ => self.write(lane).await,
            };
            if let Err(e) = done {
                let may = self.broken.get() || self.owner.get() != Some(me);
                assert!(may, "nothing fails here, and this did: {e}");
            }
        }
    }
}

async fn stamps(lane: &Lane, lba: u64, sectors: u64) -> Outcome<Vec<u64>> {
    let buf = IoBuf::zeroed(sectors as usize * SECTOR);
    lane.read(Lba(lba), buf.clone()).await?;
    Ok(buf.bytes().chunks(SECTOR).zip(lba..).map(|(b, s)| stamp_of(b, s)).collect())
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        Self::with(seed, GEOMETRY, Policy::off())
    }

    /// One whose garbage is collected all the time.
    pub(crate) fn collecting(seed: u64) -> Self {
        let none = std::time::Duration::ZERO;
        let gc = Policy { start: 0.05, stop: 0.0, slack_blocks: 0, pause: none, grace: none, ..Policy::default() };
        Self::with(seed, GEOMETRY, gc)
    }

    /// One whose log turns over.
    pub(crate) fn tight(seed: u64) -> Self {
        Self::with(seed, TIGHT, Policy::off())
    }

    fn with(seed: u64, geometry: Geometry, gc: Policy) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("dir");
        let mut rng = Rng(seed);
        // Every third world has a store that gives no trouble.
        let store = SimStore::new(rng.next(), if seed.is_multiple_of(3) { 0 } else { 6 });
        let opts = CreateOptions { size_bytes: SECTORS * SECTOR as u64, logical_block: 512 };
        let plain = store.plain();
        let made = admin::create(&*plain, "v", &opts, 1);
        futures_util::FutureExt::now_or_never(made).expect("memory never waits").expect("created");
        let shared = Shared {
            rng: RefCell::new(rng),
            oracle: RefCell::new(Oracle::new(SECTORS as usize)),
            busy: RefCell::default(),
            next_range: Cell::new(0),
            owner: Cell::new(Some(0)),
            broken: Cell::new(false),
            seen: Cell::default(),
            gc,
            snapshots: RefCell::default(),
        };
        Self {
            shared: Rc::new(shared),
            disk: RefCell::new(SimDisk::new(vec![0; log_bytes(geometry) as usize])),
            geometry,
            store,
            file: RefCell::new(log_file(&dir, 0, geometry)),
            dir,
            hosts: Cell::new(0),
            after: Cell::new(None),
            served: Cell::new(false),
            trace: RefCell::default(),
        }
    }

    /// Reads every snapshot that the manifest names, whole.
    pub(crate) fn look_at_snapshots(&self) {
        let store: Arc<dyn Store> = self.store.plain();
        let look = async {
            let m = Published::load(&*store, "v").await.expect("the manifest").manifest;
            for s in &m.snapshots {
                let base = Base::of(&store, &m.at_snapshot(s)).await.expect("the snapshot's map");
                let mut image = Image(vec![0; SECTORS as usize * SECTOR]);
                export(&base, &mut image, &mut |_| {}).await.expect("all of it is there");
                let found: Vec<u64> = image.0.chunks(SECTOR).zip(0..).map(|(b, s)| stamp_of(b, s)).collect();
                self.shared.saw(|s| s.snapshots += 1);
                if let Some(Some(expected)) = self.shared.snapshots.borrow().get(&s.name) {
                    assert_eq!(&found, expected, "snapshot {}", s.name);
                    self.shared.saw(|s| s.exact += 1);
                }
            }
            let there: Vec<&str> = m.snapshots.iter().map(|s| s.name.as_str()).collect();
            for name in self.shared.snapshots.borrow().keys() {
                assert!(there.contains(&name.as_str()), "snapshot {name} is lost");
            }
        };
        futures_util::FutureExt::now_or_never(look).expect("memory never waits");
    }

    pub(crate) fn draw(&self, n: u64) -> u64 {
        self.shared.below(n)
    }

    pub(crate) fn seen(&self) -> Seen {
        Seen { taken: self.shared.oracle.borrow().taken, late: self.store.late(), ..self.shared.seen.get() }
    }

    /// What has happened, to compare runs.
    pub(crate) fn trace(&self) -> String {
        self.trace.borrow().clone()
    }

    /// Ends what was going on, with what is left on the disk.
    pub(crate) fn crash(&self, how: Crash) {
        let next = self.disk.borrow().crash(how, &mut self.shared.rng.borrow_mut());
        *self.disk.borrow_mut() = next;
        self.shared.busy.borrow_mut().clear();
        self.shared.broken.set(false);
        self.shared.owner.set(Some(self.hosts.get()));
        let after = match (self.after.get(), how) {
            (Some(After::Store), _) => After::Store,
            (Some(After::Power), _) | (_, Crash::Power) => After::Power,
            _ => After::Process,
        };
        self.after.set(Some(after));
    }

    /// All but the store is gone: another host goes on.
    pub(crate) fn lose_host(&self) {
        self.crash(Crash::Power);
        self.new_host();
        self.shared.owner.set(Some(self.hosts.get()));
    }

    fn new_host(&self) {
        self.hosts.set(self.hosts.get() + 1);
        self.served.set(false);
        *self.disk.borrow_mut() = SimDisk::new(vec![0; log_bytes(self.geometry) as usize]);
        *self.file.borrow_mut() = log_file(&self.dir, self.hosts.get(), self.geometry);
        self.after.set(Some(After::Store));
    }

    /// The present host's next life.
    fn next_life(&self, load: Load, clock: &SimClock, spawner: &Spawner) -> Life {
        Life {
            geometry: self.geometry,
            me: self.hosts.get(),
            shared: self.shared.clone(),
            disk: self.disk.borrow().clone(),
            store: Arc::new(self.store.clone()),
            file: self.file.borrow().clone(),
            clock: clock.clone(),
            spawner: spawner.clone(),
            // A host that has lost its log has to take the volume by force.
            force: self.after.get() == Some(After::Store),
            resume: self.after.get() == Some(After::Process) && self.served.get() && self.draw(2) == 0,
            after: self.after.get(),
            load,
            without_marks: false,
            judged: Rc::default(),
        }
    }

    /// What a life leaves to the next.
    fn outlived(&self, judged: bool) {
        if judged {
            self.after.set(None);
            self.served.set(true);
        }
    }

    /// Attaches, judges what is found, and serves `load`, until `crash_at` operations have ended, or all is done.
    pub(crate) fn life(&self, load: Load, crash_at: u64) {
        self.live_out(load, crash_at, false);
    }

    fn live_out(&self, load: Load, crash_at: u64, without_marks: bool) {
        let (clock, spawner) = (SimClock::default(), Spawner::default());
        let mut rng = Rng(self.shared.rng.borrow_mut().next());
        let life = Life { without_marks, ..self.next_life(load, &clock, &spawner) };
        let (disk, judged) = (life.disk.clone(), life.judged.clone());
        let ended = run_all(&[&disk, &self.store, &clock], &spawner, &mut rng, crash_at, live(life));
        self.outlived(judged.get());
        self.note(ended.is_some());
    }

    /// Serves `load` for a minute in which nothing that is written to the log's superblock gets there. What was written to the
    /// log meanwhile, in bytes, and whether any of that was written over.
    pub(crate) fn life_without_marks(&self, load: Load) -> (usize, bool) {
        self.live_out(load, u64::MAX, true);
        self.disk.borrow().written_since()
    }

    /// The same, and while it serves another host takes the volume by force. The first one goes on as long as it can.
    pub(crate) fn life_with_take_over(&self, load: Load, crash_at: u64) {
        let (clock, spawner) = (SimClock::default(), Spawner::default());
        let mut rng = Rng(self.shared.rng.borrow_mut().next());
        let first = self.next_life(load, &clock, &spawner);
        let first_disk = first.disk.clone();
        self.new_host();
        let second = self.next_life(load, &clock, &spawner);
        let (second_disk, judged) = (second.disk.clone(), second.judged.clone());
        let (shared, timer) = (self.shared.clone(), clock.clone());
        let patience = Duration::from_millis(self.draw(4000));
        let root = async move {
            let served = first.judged.clone();
            let taking = async {
                while !served.get() {
                    timer.sleep(Duration::from_millis(50)).await;
                }
                timer.sleep(patience).await;
                shared.owner.set(None);
                live(second).await;
            };
            futures_util::future::join(live(first), taking).await;
        };
        let sources: [&dyn Source; 4] = [&first_disk, &second_disk, &self.store, &clock];
        let ended = run_all(&sources, &spawner, &mut rng, crash_at, root);
        self.outlived(judged.get());
        self.note(ended.is_some());
    }

    fn note(&self, ended: bool) {
        let o = self.shared.oracle.borrow();
        self.trace.borrow_mut().push_str(&format!("{ended} {} {};", o.writes.len(), o.completed().len()));
    }
}

/// An image in memory.
struct Image(Vec<u8>);

#[async_trait::async_trait(?Send)]
impl ImageSink for Image {
    async fn write(&mut self, at: u64, data: &[u8]) -> Result<()> {
        self.0[at as usize..at as usize + data.len()].copy_from_slice(data);
        Ok(())
    }

    async fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

/// The real file beside a simulated disk.
fn log_file(dir: &TempDir, host: u32, geometry: Geometry) -> Arc<DataFile> {
    let path = dir.path().join(format!("{host}.wal"));
    std::fs::File::create(&path).and_then(|f| f.set_len(log_bytes(geometry))).expect("a file");
    Arc::new(DataFile::open(&path, false).expect("the log's file"))
}

/// What a life needs.
struct Life {
    geometry: Geometry,
    me: u32,
    shared: Rc<Shared>,
    disk: SimDisk,
    store: Arc<dyn Store>,
    file: Arc<DataFile>,
    clock: SimClock,
    spawner: Spawner,
    force: bool,
    /// Go on from the log.
    resume: bool,
    after: Option<After>,
    load: Load,
    /// See [`World::life_without_marks`].
    without_marks: bool,
    /// Its state was found to keep the rule.
    judged: Rc<Cell<bool>>,
}

impl Life {
    /// The next write or sync of the log's disk fails.
    fn break_disk(&self) {
        let shared = &self.shared;
        shared.broken.set(true);
        shared.saw(|s| s.broken += 1);
        if shared.below(2) == 0 { self.disk.fail_next_write() } else { self.disk.fail_next_sync() }
    }

    /// As often as it takes: what a dead process has sent may land at any time and look like another host.
    async fn attach(&self) -> Attached<SimDisk, SimClock> {
        for _ in 0..20 {
            match self.try_attach().await {
                Err(e) if matches!(e.kind(), ErrorKind::Fenced | ErrorKind::Conflict) => {
                    self.shared.saw(|s| s.again += 1);
                }
                attached => return attached.expect("attached"),
            }
        }
        panic!("twenty attaches have lost a race against nobody");
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
            io_timeout: None,
            gc: self.shared.gc.clone(),
            writer: Writer { host: "sim".into(), pid: 1, since: 1 },
            nonce: Nonce(self.shared.rng.borrow_mut().next()),
        };
        let stores = Stores { attach: self.store.clone(), background: self.store.clone() };
        if self.resume {
            return resume(stores, "v", log, self.clock.clone(), request).await;
        }
        let published = Published::load(&*self.store, "v").await?;
        attach(stores, published, log, self.clock.clone(), request).await
    }

    fn lane(&self, volume: &Arc<Volume>) -> Rc<Lane> {
        let lane = VolumeLane::new(volume.clone(), self.disk.clone(), self.clock.clone());
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
            let done = if shared.below(4) == 0 { shared.flush(lane).await } else { shared.write(lane).await };
            if let Err(e) = done {
                assert!(shared.broken.get(), "nothing fails here, and this did: {e}");
                return;
            }
        }
    });
    join_all(workers).await;
}

async fn live(life: Life) {
    let shared = &life.shared;
    let Attached { volume, background, reads, reader } = life.attach().await;
    life.spawner.spawn(background.run());
    life.spawner.spawn(serve_reads(reads, reader));
    life.spawner.spawn(keep_log(volume.clone(), life.disk.clone(), life.clock.clone()));
    let lanes: Vec<Rc<Lane>> = (0..life.load.lanes).map(|_| life.lane(&volume)).collect();
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
        let verdict = shared.oracle.borrow_mut().judge(after, &found);
        verdict.unwrap_or_else(|e| panic!("{e}"));
        shared.saw(|s| s.judged += 1);
    }
    if shared.owner.replace(Some(life.me)) != Some(life.me) {
        // What the other host has in flight is in nobody's way any more.
        shared.busy.borrow_mut().clear();
    }
    life.judged.set(true);
    let workers = (0..life.load.workers).flat_map(|_| &lanes);
    let work = join_all(workers.map(|lane| shared.work(&life, lane, &volume)));
    if life.without_marks {
        life.disk.hold_superblock();
        select(std::pin::pin!(work), std::pin::pin!(life.clock.sleep(Duration::from_secs(60)))).await;
    } else {
        work.await;
    }
    let told = volume.status().background;
    let space = told.space.unwrap_or_default();
    shared.saw(|s| {
        s.groups += told.groups;
        s.deleted += space.gc_deleted_objects;
        s.moved += space.gc_written_bytes >> 12;
    });
}
