//! The log on a disk that forgets: crashes at every operation, generation after generation, against the crash rule;
//! then damage, failures and a full log, one by one.
//!
//! The rule, for entries of the log: a completed one survives the death of the process; one that completed before a sync
//! was asked for survives a power cut; what is there is always a prefix of an order in which an entry comes after all that
//! had completed before it was issued.

mod damage;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::machine::{Crash, SimDisk, Spawner, run};
use crate::support_rng::Rng;
use futures_util::FutureExt;
use futures_util::future::join_all;
use uuid::Uuid;
use vb_ublk::checksum::block_crc;
use vb_ublk::disk::{Disk, IoBuf};
use vb_ublk::error::ErrorKind;
use vb_ublk::units::{BLOCK, BlockNo, Lba, SECTOR, Seq};
use vb_ublk::wal::appender::{Appender, NotLogged, append_empty};
use vb_ublk::wal::codec::{LogPos, RecordKind, SLOTS_START, Superblock};
use vb_ublk::wal::create::{SuperblockFile, new_superblock};
use vb_ublk::wal::log::{Failed, Geometry, Log, LogEntry, Start};
use vb_ublk::wal::replay::{Replay, replay};

const SEGMENT: u32 = 64 << 10;
const SLOTS: u32 = 6;
const GEOMETRY: Geometry = Geometry { segment_bytes: SEGMENT, max_segments: SLOTS };
const VOLUME: Uuid = Uuid::from_u128(7);
const LOG_ID: u64 = 77;
/// Sectors between the addresses of two requests: an entry's address tells whose it is.
pub(crate) const STRIDE: u64 = 256;

/// Content of a request: each sector its own.
fn content(id: u64, sectors: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(sectors as usize * SECTOR);
    for s in 0..sectors {
        let word = (id.wrapping_mul(0x9e37_79b9) ^ s).to_le_bytes();
        (0..SECTOR / 8).for_each(|_| out.extend_from_slice(&word));
    }
    out
}

struct Request {
    lba: u64,
    sectors: u64,
    kind: RecordKind,
    issued: u64,
    /// When it was answered.
    acked: Option<u64>,
    /// A sync that was asked for later has ended.
    durable: bool,
    /// Known to be gone: it must not come back.
    lost: bool,
}

/// What outlives a crash: the disk, the store's end, and what we know.
struct World {
    rng: Rng,
    disk: SimDisk,
    requests: Vec<Request>,
    clock: u64,
    /// Everything up to here is in the store, and which requests these are.
    stored: Seq,
    in_store: BTreeMap<u64, usize>,
    /// What the log told its sink in this life.
    passed: Arc<Mutex<BTreeMap<u64, usize>>>,
    /// Counts, to see that a run did what it is for.
    recycled: u64,
    replayed: u64,
    cut_short: u64,
    overlapped: u64,
}

type Shared = Rc<RefCell<World>>;

fn superblock() -> Superblock {
    // The file's copy has a size that its decoder takes; the runs use smaller segments.
    new_superblock(VOLUME, LOG_ID, Geometry { segment_bytes: 1 << 20, max_segments: SLOTS }, 1 << 40, 512)
}

fn small(sb: &Superblock) -> Superblock {
    Superblock { segment_bytes: SEGMENT, ..sb.clone() }
}

fn ready<T>(f: impl Future<Output = T>) -> T {
    f.now_or_never().expect("reads of the simulated disk do not wait")
}

/// A new log with two slots on the disk.
pub(crate) fn fresh_disk() -> SimDisk {
    let mut image = vec![0; SLOTS_START as usize + 2 * SEGMENT as usize];
    let sb = superblock();
    for (update, at) in [(1, 64 << 10), (2, 0)] {
        image[at..at + BLOCK].copy_from_slice(&Superblock { update, ..sb.clone() }.encode());
    }
    SimDisk::new(image)
}

impl World {
    fn new(seed: u64) -> Shared {
        Rc::new(RefCell::new(Self {
            rng: Rng(seed),
            disk: fresh_disk(),
            requests: Vec::new(),
            clock: 0,
            stored: Seq(0),
            in_store: BTreeMap::new(),
            passed: Arc::default(),
            recycled: 0,
            replayed: 0,
            cut_short: 0,
            overlapped: 0,
        }))
    }

    fn now(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn random_request(&mut self) -> usize {
        let id = self.requests.len();
        let kind = match self.rng.below(8) {
            0 => RecordKind::Discard,
            1 => RecordKind::Zeroes,
            _ => RecordKind::Data,
        };
        let sectors = match self.rng.below(4) {
            0 => 1 + self.rng.below(7),
            1 => 8,
            2 => 8 * (1 + self.rng.below(4)),
            _ => 1 + self.rng.below(64),
        };
        let lba = id as u64 * STRIDE + if self.rng.below(2) == 0 { 0 } else { self.rng.below(8) };
        let issued = self.now();
        self.requests.push(Request { lba, sectors, kind, issued, acked: None, durable: false, lost: false });
        id
    }

    /// Checks an entry and its data in the file; says whose it is.
    fn check_entry(&self, e: &LogEntry, crc: impl Fn(u32) -> u32) -> usize {
        let id = (e.lba.0 / STRIDE) as usize;
        let r = &self.requests[id];
        assert_eq!((e.lba.0, e.sectors, e.kind), (r.lba, r.sectors, r.kind), "entry {} of request {id}", e.seq);
        if e.kind == RecordKind::Data {
            let blocks = e.record().stored_blocks() as usize;
            let buf = IoBuf::zeroed(blocks * BLOCK);
            ready(self.disk.read_at(u64::from(e.file_block) * BLOCK as u64, buf.clone())).unwrap();
            for (i, data) in buf.bytes().chunks(BLOCK).enumerate() {
                let block = BlockNo(e.lba.block().0 + i as u64);
                assert_eq!(block_crc(block, data), crc(e.file_block + i as u32), "block {i} of entry {}", e.seq);
            }
            let skip = (e.lba.0 % 8) as usize * SECTOR;
            let want = content(id as u64, e.sectors);
            assert!(buf.bytes()[skip..skip + want.len()] == want, "the data of entry {}", e.seq);
        }
        id
    }

    /// The crash rule, after a replay.
    fn judge(&mut self, r: &Replay, how: Option<Crash>) {
        let crcs: HashMap<u32, u32> = r.crcs.iter().copied().collect();
        let mut here = self.in_store.clone();
        let mut next = self.stored.next();
        let passed = self.passed.lock().unwrap().clone();
        for e in r.entries.iter().filter(|e| e.seq > self.stored) {
            assert_eq!(e.seq, next, "the entries have a gap");
            next = next.next();
            let id = self.check_entry(e, |b| crcs[&b]);
            assert!(!self.requests[id].lost, "request {id} (entry {}) was gone and comes back", e.seq);
            if let Some(was) = passed.get(&e.seq.0) {
                assert_eq!(*was, id, "entry {} was another's", e.seq);
            }
            assert!(here.insert(e.seq.0, id).is_none());
        }
        self.replayed += here.len() as u64;
        let present: BTreeSet<usize> = here.values().copied().collect();
        assert_eq!(present.len(), here.len(), "a request came twice");
        for (id, q) in self.requests.iter().enumerate() {
            let must = q.durable || how != Some(Crash::Power) && q.acked.is_some() && !q.lost;
            assert!(!must || present.contains(&id), "request {id} is not there after {how:?}: {:?}", q.acked);
        }
        // A prefix of an order that extends "completed before the other was issued": what is missing comes last.
        let missing = (0..self.requests.len()).filter(|id| !present.contains(id) && !self.requests[*id].lost);
        let mut first_ack = missing.filter_map(|id| self.requests[id].acked).min().unwrap_or(u64::MAX);
        if first_ack < u64::MAX {
            self.cut_short += 1;
        }
        for (seq, id) in here.iter().rev() {
            let q = &self.requests[*id];
            assert!(q.issued < first_ack, "entry {seq} was issued after a later or missing one had completed");
            first_ack = first_ack.min(q.acked.unwrap_or(u64::MAX));
        }
        for (id, q) in self.requests.iter_mut().enumerate() {
            if !present.contains(&id) {
                q.lost = true;
            }
        }
        // Judged from here on as what this life began with.
        *self.passed.lock().unwrap() = here;
    }
}

async fn replay_disk(disk: &SimDisk) -> (SuperblockFile, vb_ublk::error::Result<Replay>) {
    let sb = SuperblockFile::load(disk, disk.size()).await.unwrap().unwrap();
    let r = replay(disk, disk.size(), &small(&sb.current)).await;
    (sb, r)
}

/// As `volume::attach` does it.
async fn start(disk: &SimDisk, sb: &mut SuperblockFile, mut r: Replay, world: &Shared) -> Log {
    let stored = world.borrow().stored;
    r.entries.retain(|e| e.seq > stored);
    disk.sync().await.unwrap();
    let packed = stored.max(r.packed);
    sb.packed(disk, packed).await.unwrap();
    let kept: Vec<_> = r.live.iter().copied().filter(|l| l.last_seq > packed).collect();
    r.free.extend(r.live.iter().filter(|l| l.last_seq <= packed).map(|l| l.slot));
    let mut slots_ready = r.slots_ready.min(SLOTS);
    while r.free.is_empty() && slots_ready < SLOTS {
        zero(disk, slots_ready).await;
        r.free.push(slots_ready);
        slots_ready += 1;
    }
    let mut salts = Rng(world.borrow_mut().rng.next());
    let passed = world.borrow().passed.clone();
    let log = Log::new(
        VOLUME,
        LOG_ID,
        GEOMETRY,
        Start {
            next_seq: Seq(stored.max(r.last_seq).0 + 1),
            packed,
            end: if kept.is_empty() { LogPos::default() } else { r.end },
            next_generation: r.next_generation,
            live: kept,
            free: r.free,
            journal: r.entries,
            slots_ready,
        },
        Box::new(move || salts.next()),
        Box::new(move |e| {
            passed.lock().unwrap().insert(e.seq.0, (e.lba.0 / STRIDE) as usize);
        }),
    );
    r.crcs.iter().for_each(|(b, c)| log.set_crc(*b, *c));
    log
}

async fn zero(disk: &SimDisk, slot: u32) {
    disk.writev_at(GEOMETRY.slot_offset(slot), vec![IoBuf::zeroed(SEGMENT as usize)], false).await.unwrap();
    disk.sync().await.unwrap();
}

pub(crate) fn appender(log: &Arc<Log>, disk: &SimDisk, spawner: &Spawner) -> Rc<Appender<SimDisk>> {
    let a = Rc::new(Appender::new(log.clone(), disk.clone()));
    a.clone().tasks().into_iter().for_each(|t| spawner.spawn(t));
    let sealer = a.clone();
    spawner.when_idle(move || sealer.seal());
    a
}

/// One request, answered as the volume answers it.
async fn request(world: &Shared, log: &Log, a: &Appender<SimDisk>) -> Result<(), NotLogged> {
    let (id, lba, sectors, kind, fua) = {
        let mut w = world.borrow_mut();
        let id = w.random_request();
        let fua = w.rng.below(6) == 0;
        let q = &w.requests[id];
        (id, Lba(q.lba), q.sectors, q.kind, fua)
    };
    let end = if kind == RecordKind::Data {
        let data = content(id as u64, sectors);
        let src = IoBuf::zeroed(data.len());
        src.copy_in(0, &data);
        a.push_data(lba, &src, fua, Duration::ZERO).await?
    } else {
        a.push_hole(lba, sectors, kind, fua, Duration::ZERO).await?
    };
    if fua {
        log.sync_through(end, a.disk()).await?;
    }
    let mut w = world.borrow_mut();
    w.overlapped = w.overlapped.max(a.counters().overlapped);
    let now = w.now();
    w.requests[id].acked = Some(now);
    w.requests[id].durable = fua;
    Ok(())
}

async fn flush(world: &Shared, log: &Log, disk: &SimDisk) -> Result<(), Failed> {
    let covered: Vec<usize> = {
        let w = world.borrow();
        (0..w.requests.len()).filter(|id| w.requests[*id].acked.is_some() && !w.requests[*id].lost).collect()
    };
    log.sync_through(log.flush_target(), disk).await?;
    let mut w = world.borrow_mut();
    covered.iter().for_each(|id| w.requests[*id].durable = true);
    Ok(())
}

/// Packing, marks, recycling and growth, as the volume's background does them.
async fn background(world: Shared, log: Arc<Log>, disk: SimDisk, mut sb: SuperblockFile) {
    let mut packed = sb.current.packed_through;
    loop {
        disk.tick().await.unwrap();
        let dice = world.borrow_mut().rng.below(12);
        match dice {
            0 => drop(log.sync_through(log.flush_target(), &disk).await),
            1 if log.durable_is_news() => drop(append_empty(&log, &disk).await),
            2..5 => {
                let (stored, entries) = {
                    let mut w = world.borrow_mut();
                    let most = w.rng.below(u64::from(SEGMENT) * 2);
                    let entries = log.journal_after(w.stored, most, 100);
                    for e in &entries {
                        // The packer reads what the log has: nothing may have overwritten it.
                        let id = w.check_entry(e, |b| log.crc(b));
                        w.in_store.insert(e.seq.0, id);
                    }
                    (entries.last().map_or(w.stored, |e| e.seq), entries)
                };
                if entries.is_empty() {
                    continue;
                }
                world.borrow_mut().stored = stored;
                disk.tick().await.unwrap();
                log.retire(stored);
                let reached = log.frontier();
                sb.packed(&disk, stored).await.unwrap();
                log.durable_to(reached);
                packed = stored;
            }
            5 => {
                if let Some(slot) = log.wants_slot() {
                    zero(&disk, slot).await;
                    log.add_slot(slot);
                }
            }
            _ => {
                let used = log.status().used_bytes;
                log.recycle(packed);
                world.borrow_mut().recycled += u64::from(log.status().used_bytes < used);
            }
        }
    }
}

/// Who asks for how much in a life.
#[derive(Clone, Copy)]
struct Load {
    lanes: usize,
    /// On each lane, each with one request at a time.
    workers: usize,
    /// Of each worker.
    requests: usize,
}

/// Looks at what is there, and writes nothing.
const IDLE: Load = Load { lanes: 1, workers: 1, requests: 0 };

/// One life: replay, judge, go on; until `crash_at` operations have ended, or all requests of `load`.
fn life(world: &Shared, how: Option<Crash>, crash_at: u64, load: Load) -> bool {
    let (disk, mut rng) = {
        let mut w = world.borrow_mut();
        (w.disk.clone(), Rng(w.rng.next()))
    };
    let (first, second) = (ready(replay_disk(&disk)), ready(replay_disk(&disk)));
    assert_eq!(format!("{:?}", first.1), format!("{:?}", second.1), "a replay changes nothing");
    let (mut sb, r) = first;
    let r = r.unwrap_or_else(|e| panic!("after {how:?}: {e}"));
    world.borrow_mut().judge(&r, how);

    let spawner = Spawner::default();
    let (root_world, root_disk, root_spawner) = (world.clone(), disk.clone(), spawner.clone());
    let done = run(&disk, &spawner, &mut rng, crash_at, async move {
        let (world, disk, spawner) = (root_world, root_disk, root_spawner);
        let log = Arc::new(start(&disk, &mut sb, r, &world).await);
        spawner.spawn(background(world.clone(), log.clone(), disk.clone(), sb));
        let workers: Vec<_> = (0..load.lanes)
            .map(|_| appender(&log, &disk, &spawner))
            .flat_map(|a| (0..load.workers).map(move |_| a.clone()))
            .map(|a| {
                let (world, log, disk) = (&world, &log, &disk);
                async move {
                    for _ in 0..load.requests {
                        let dice = world.borrow_mut().rng.below(10);
                        match dice {
                            0 => flush(world, log, disk).await.unwrap(),
                            1 => disk.tick().await.unwrap(),
                            _ => request(world, log, &a).await.unwrap(),
                        }
                    }
                }
            })
            .collect();
        join_all(workers).await;
    });
    done.is_some()
}

fn crash(world: &Shared, how: Crash) {
    let mut w = world.borrow_mut();
    let mut rng = Rng(w.rng.next());
    let next = w.disk.crash(how, &mut rng);
    w.disk = next;
}

#[test]
fn many_lives_keep_the_crash_rule() {
    let (mut recycled, mut replayed, mut cut_short, mut overlapped) = (0, 0, 0, 0);
    for seed in 0..400 {
        let world = World::new(seed);
        let mut how = None;
        // Few workers write records of a few entries; many have two records of a lane in flight.
        let workers = if seed % 3 == 0 { 24 } else { 3 };
        let load = Load { lanes: 1 + (seed % 4) as usize, workers, requests: 40 };
        for _ in 0..5 {
            let (at, dice) = {
                let mut w = world.borrow_mut();
                (1 + w.rng.below(120), w.rng.below(2))
            };
            life(&world, how, at, load);
            how = Some(if dice == 0 { Crash::Process } else { Crash::Power });
            crash(&world, how.unwrap());
        }
        life(&world, how, 1, IDLE);
        let w = world.borrow();
        recycled += w.recycled;
        replayed += w.replayed;
        cut_short += w.cut_short;
        overlapped += w.overlapped;
    }
    let enough = recycled > 300 && replayed > 50_000 && cut_short > 100 && overlapped > 100;
    assert!(enough, "{recycled} {replayed} {cut_short} {overlapped}");
}

#[test]
fn a_crash_at_every_operation() {
    for how in [Crash::Process, Crash::Power] {
        for at in 1..120 {
            let world = World::new(1);
            let load = Load { lanes: 2, workers: 3, requests: 12 };
            let finished = life(&world, None, at, load);
            crash(&world, how);
            life(&world, Some(how), at / 2 + 1, load);
            crash(&world, how);
            life(&world, Some(how), 1, IDLE);
            assert!(at > 20 || !finished, "the run is too short to be cut at {at}");
        }
    }
}

/// A log and a lane on a disk where nothing crashes.
pub(crate) async fn begin(disk: &SimDisk, spawner: &Spawner) -> (Arc<Log>, Rc<Appender<SimDisk>>, SuperblockFile) {
    let (mut sb, r) = replay_disk(disk).await;
    let log = Arc::new(start(disk, &mut sb, r.unwrap(), &World::new(1)).await);
    let a = appender(&log, disk, spawner);
    (log, a, sb)
}

pub(crate) fn quietly<T: 'static>(disk: &SimDisk, f: impl AsyncFnOnce(Spawner) -> T + 'static) -> T {
    let spawner = Spawner::default();
    run(disk, &spawner.clone(), &mut Rng(5), u64::MAX, async move { f(spawner).await }).unwrap()
}

pub(crate) async fn write(a: &Appender<SimDisk>, id: u64, sectors: u64) -> Result<LogPos, NotLogged> {
    let data = content(id, sectors);
    let src = IoBuf::zeroed(data.len());
    src.copy_in(0, &data);
    a.push_data(Lba(id * STRIDE), &src, false, Duration::ZERO).await
}

pub(crate) fn replay_image(image: Vec<u8>) -> vb_ublk::error::Result<Replay> {
    ready(replay_disk(&SimDisk::new(image))).1
}
