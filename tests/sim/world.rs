//! What outlives a crash, and one life of a volume in it.

mod life;
mod shared;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tempfile::TempDir;
use vb_ublk::config::FlushTo;
use vb_ublk::disk::IoBuf;
use vb_ublk::disk::file::DataFile;
use vb_ublk::error::Result;
use vb_ublk::gc::Policy;
use vb_ublk::image::ImageSink;
use vb_ublk::manifest::Published;
use vb_ublk::store::Store;
use vb_ublk::store::retry::{self, Retry};
use vb_ublk::time::Timer;
use vb_ublk::units::{Lba, SECTOR};
use vb_ublk::volume::admin::{self, CreateOptions};
use vb_ublk::volume::engine::{Engine, IoFault};
use vb_ublk::volume::export::{Base, export};
use vb_ublk::volume::lane::VolumeLane;
use vb_ublk::wal::codec::SLOTS_START;
use vb_ublk::wal::log::Geometry;

use life::{Life, LifeStores, live};
use shared::Shared;

use crate::clock::{SimClock, SimPacer};
use crate::clone;
use crate::machine::{Crash, SimDisk, Source, Spawner, run_all};
use crate::oracle::{After, Oracle};
use crate::store::SimStore;
use crate::support_rng::Rng;

/// Small: what is written meets what was written.
const SECTORS: u64 = 256;
/// What a volume that begins as a clone begins with, from its start.
const INHERITED: u64 = 200;
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
    /// Some write at the same time over one another.
    pub(crate) overlaps: bool,
}

/// What a run has met, to see that it did what it is for.
#[derive(Default, Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub(crate) judged: u64,
    pub(crate) taken: u64,
    pub(crate) late: u64,
    pub(crate) drained: u64,
    /// Barriers that were passed while another host took over.
    pub(crate) promised: u64,
    pub(crate) groups: u64,
    /// Attaches that lost against what a dead process had sent.
    pub(crate) again: u64,
    /// Writes that a host which had lost the volume did not acknowledge.
    pub(crate) stopped: u64,
    /// Hosts that were told that they had lost the volume without asking for anything.
    pub(crate) heard: u64,
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
    /// Clones that came to stand alone.
    pub(crate) alone: u64,
    /// Chunks that were deleted, each while nothing that was published named it.
    pub(crate) garbage: u64,
    /// Calls of the store other than changes of chunks that were disturbed.
    pub(crate) refused: u64,
    /// Times that the log's disk had no room for it to grow.
    pub(crate) full: u64,
    /// Pairs of writes that overlapped in flight, where the one issued later was over the other, and where it was not.
    pub(crate) later: u64,
    pub(crate) earlier: u64,
}

impl Seen {
    pub(crate) fn plus(self, b: Self) -> Self {
        Self {
            judged: self.judged + b.judged,
            taken: self.taken + b.taken,
            late: self.late + b.late,
            garbage: self.garbage + b.garbage,
            drained: self.drained + b.drained,
            promised: self.promised + b.promised,
            groups: self.groups + b.groups,
            again: self.again + b.again,
            stopped: self.stopped + b.stopped,
            heard: self.heard + b.heard,
            broken: self.broken + b.broken,
            resumed: self.resumed + b.resumed,
            deleted: self.deleted + b.deleted,
            moved: self.moved + b.moved,
            snapshots: self.snapshots + b.snapshots,
            exact: self.exact + b.exact,
            alone: self.alone + b.alone,
            refused: self.refused + b.refused,
            full: self.full + b.full,
            later: self.later + b.later,
            earlier: self.earlier + b.earlier,
        }
    }
}

pub(crate) struct World {
    shared: Rc<Shared>,
    disk: RefCell<SimDisk>,
    geometry: Geometry,
    /// What the log's disk has room for.
    room: u64,
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

async fn stamps(lane: &Lane, lba: u64, sectors: u64) -> Outcome<Vec<u64>> {
    let buf = IoBuf::zeroed(sectors as usize * SECTOR);
    lane.read(Lba(lba), buf.clone()).await?;
    Ok(buf.bytes().chunks(SECTOR).zip(lba..).map(|(b, s)| stamp_of(b, s)).collect())
}

/// Garbage is collected whenever there is any.
fn always() -> Policy {
    let none = Duration::ZERO;
    Policy { start: 0.05, stop: 0.0, slack_blocks: 0, pause: none, grace: none, ..Policy::default() }
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        Self::with(seed, GEOMETRY, Policy::off(), 0)
    }

    /// One whose garbage is collected all the time.
    pub(crate) fn collecting(seed: u64) -> Self {
        Self::with(seed, GEOMETRY, always(), 0)
    }

    /// The same, on a store that leaves one in `one_in` of all calls without an answer, whatever came of it, or refuses it.
    pub(crate) fn rough(seed: u64, one_in: u64) -> Self {
        let gc = if seed.is_multiple_of(2) { always() } else { Policy::off() };
        Self::with(seed, GEOMETRY, gc, one_in)
    }

    /// One whose log turns over.
    pub(crate) fn tight(seed: u64) -> Self {
        Self::with(seed, TIGHT, Policy::off(), 0)
    }

    fn with(seed: u64, geometry: Geometry, gc: Policy, rough: u64) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("dir");
        let mut rng = Rng(seed);
        // Every third world has a store that gives no trouble.
        let store = SimStore::new(rng.next(), if seed.is_multiple_of(3) { 0 } else { 6 }, rough);
        let opts = CreateOptions { size_bytes: SECTORS * SECTOR as u64, logical_block: 512 };
        let plain: Arc<dyn Store> = store.plain();
        let is_clone = gc.enabled && seed % 5 > 2;
        let mut oracle = Oracle::new(SECTORS as usize);
        if is_clone {
            // What it begins with is as if it had been written, and brought to the store.
            let id = oracle.issue(0, INHERITED, false);
            oracle.complete(id, true);
            oracle.mark(&[id], |w| w.drained = true);
            let of = |s| if s < INHERITED { content(id as u64 + 1, s) } else { content(0, s) };
            clone::make(&plain, (0..SECTORS).flat_map(of).collect());
        } else {
            let made = admin::create(&*plain, "v", &opts, 1);
            futures_util::FutureExt::now_or_never(made).expect("memory never waits").expect("created");
        }
        // Every fifth rough world has a log that cannot grow beyond what it was made with, two segments.
        let room = if rough > 0 && seed % 5 == 2 { log_bytes(TIGHT) } else { u64::MAX };
        let shared = Shared {
            rng: RefCell::new(rng),
            oracle: RefCell::new(oracle),
            busy: RefCell::default(),
            next_range: Cell::new(0),
            owner: Cell::new(Some(0)),
            broken: Cell::new(false),
            seen: Cell::default(),
            gc,
            // None of the seeds that have found something.
            flush_to: if seed % 7 == 5 { FlushTo::Store } else { FlushTo::Wal },
            snapshots: RefCell::default(),
            rough: rough > 0,
            cloned_in: is_clone.then_some(plain),
        };
        Self {
            shared: Rc::new(shared),
            disk: RefCell::new(SimDisk::new(vec![0; log_bytes(geometry) as usize])),
            geometry,
            room,
            store,
            file: RefCell::new(log_file(&dir, 0, log_bytes(geometry).min(room))),
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
        Seen {
            taken: self.shared.oracle.borrow().taken(),
            late: self.store.late(),
            garbage: self.store.garbage(),
            refused: self.store.refused(),
            ..self.shared.seen.get()
        }
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
        *self.file.borrow_mut() = log_file(&self.dir, self.hosts.get(), log_bytes(self.geometry).min(self.room));
        self.after.set(Some(After::Store));
    }

    /// What a life calls: a rough store through the program's own retries.
    fn stores(&self, clock: &SimClock) -> LifeStores {
        let plain: Arc<dyn Store> = Arc::new(self.store.clone());
        if !self.shared.rough {
            return LifeStores { attach: plain.clone(), background: plain, reads: None };
        }
        let pacer = Arc::new(SimPacer::new(clock.clone(), self.shared.rng.borrow_mut().next()));
        let retry = |policy| -> Arc<dyn Store> { Arc::new(Retry::with_pacer(plain.clone(), policy, pacer.clone())) };
        LifeStores {
            attach: retry(retry::Policy::attach()),
            background: retry(retry::Policy::background()),
            reads: Some(retry(retry::Policy::serving())),
        }
    }

    /// The present host's next life.
    fn next_life(&self, load: Load, clock: &SimClock, spawner: &Spawner) -> Life {
        let disk = self.disk.borrow().clone();
        disk.set_room(self.room as usize);
        Life {
            geometry: self.geometry,
            me: self.hosts.get(),
            shared: self.shared.clone(),
            disk,
            stores: self.stores(clock),
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

    /// Attaches, judges what is found, and serves `load`, until `crash_at` operations have ended, or all is done. Whether all is.
    pub(crate) fn life(&self, load: Load, crash_at: u64) -> bool {
        self.live_out(load, crash_at, false)
    }

    fn live_out(&self, load: Load, crash_at: u64, without_marks: bool) -> bool {
        let (clock, spawner) = (SimClock::default(), Spawner::default());
        let mut rng = Rng(self.shared.rng.borrow_mut().next());
        let life = Life { without_marks, ..self.next_life(load, &clock, &spawner) };
        let (disk, judged) = (life.disk.clone(), life.judged.clone());
        let ended = run_all(&[&disk, &self.store, &clock], &spawner, &mut rng, crash_at, live(life));
        self.shared.saw(|s| s.full += disk.refused());
        self.outlived(judged.get());
        self.note(ended.is_some());
        ended.is_some()
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
        self.trace.borrow_mut().push_str(&format!("{ended} {} {};", o.issued(), o.completed().len()));
    }
}

/// An image in memory.
struct Image(Vec<u8>);

#[async_trait::async_trait(?Send)]
impl ImageSink for Image {
    async fn write(&mut self, at: u64, data: Bytes) -> Result<()> {
        self.0[at as usize..at as usize + data.len()].copy_from_slice(&data);
        Ok(())
    }

    async fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

/// The real file beside a simulated disk.
fn log_file(dir: &TempDir, host: u32, bytes: u64) -> Arc<DataFile> {
    let path = dir.path().join(format!("{host}.wal"));
    std::fs::File::create(&path).and_then(|f| f.set_len(bytes)).expect("a file");
    Arc::new(DataFile::open(&path, false).expect("the log's file"))
}
