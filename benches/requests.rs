//! What a request costs this program alone: an engine on a lane of its own over a log in memory, whose disk answers at once.
//!
//! `cargo bench --bench requests` prints the time of each kind of request; `scripts/bench/counts` runs `requests KIND DEPTH COUNT` under
//! callgrind, and counts instructions. There is no kernel in either, no frontend and no background: what is written stays in the log.

use std::cell::RefCell;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use futures_util::future::join_all;
use vb_ublk::config::FlushTo;
use vb_ublk::disk::file::DataFile;
use vb_ublk::disk::{Disk, IoBuf};
use vb_ublk::error::Result;
use vb_ublk::gc::Policy;
use vb_ublk::lane::{Driver, Lane, LaneTimer, OwnRing, RingMode};
use vb_ublk::manifest::{Published, Writer};
use vb_ublk::store::Store;
use vb_ublk::store::memory::MemoryStore;
use vb_ublk::units::{BLOCK, Lba, Nonce};
use vb_ublk::volume::admin::{self, CreateOptions};
use vb_ublk::volume::attach::{Attached, OpenLog, Request, Stores, attach};
use vb_ublk::volume::engine::Engine;
use vb_ublk::volume::host::keep_log;
use vb_ublk::volume::lane::VolumeLane;
use vb_ublk::wal::codec::SLOTS_START;
use vb_ublk::wal::log::Geometry;

/// Of the first segment, which is there from the start, room for all that is written: nothing takes it out of the log.
const GEOMETRY: Geometry = Geometry { segment_bytes: 320 << 20, max_segments: 8 };
/// 64 MiB, written once before reads are measured.
const BLOCKS: u64 = 16 << 10;

/// Clones are one disk, whose operations are copies.
#[derive(Clone)]
struct MemoryDisk(Rc<RefCell<Vec<u8>>>);

impl Disk for MemoryDisk {
    async fn read_at(&self, offset: u64, dst: IoBuf) -> io::Result<()> {
        let (at, n) = (offset as usize, dst.len());
        dst.copy_in(0, &self.0.borrow()[at..at + n]);
        Ok(())
    }

    async fn writev_at(&self, offset: u64, bufs: Vec<IoBuf>, _dsync: bool) -> io::Result<()> {
        let mut at = offset as usize;
        for buf in bufs {
            self.0.borrow_mut()[at..at + buf.len()].copy_from_slice(buf.bytes());
            at += buf.len();
        }
        Ok(())
    }

    async fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// The real file beside it, whose name errors would tell.
fn log_file(folder: &Path) -> Arc<DataFile> {
    let path = folder.join("log");
    std::fs::File::create(&path).expect("a file");
    Arc::new(DataFile::open(&path, false).expect("the log's file"))
}

type Engined = VolumeLane<MemoryDisk, LaneTimer>;

struct Sealer(Rc<Engined>);

impl Driver for Sealer {
    fn seal(&mut self) {
        self.0.seal();
    }
}

/// A small fixed generator: the same requests in every run.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((u128::from(self.0) * u128::from(n)) >> 64) as u64
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Write,
    Read,
}

fn filled(bytes: usize) -> IoBuf {
    let mut buf = IoBuf::zeroed(bytes);
    buf.bytes_mut().fill(7);
    buf
}

/// `count` requests of 4 KiB at random, `depth` at a time.
async fn requests(engine: &Engined, kind: Kind, depth: usize, count: u64) {
    let bufs: Vec<IoBuf> = (0..depth).map(|_| filled(BLOCK)).collect();
    let mut rng = Rng(1);
    let mut done = 0;
    while done < count {
        let round = bufs.iter().map(|buf| {
            let at = Lba(rng.below(BLOCKS) * 8);
            async move {
                match kind {
                    Kind::Write => engine.write(at, buf.clone(), false).await,
                    Kind::Read => engine.read(at, buf.clone()).await,
                }
            }
        });
        for outcome in join_all(round).await {
            outcome.expect("nothing fails here");
        }
        done += depth as u64;
    }
}

async fn attach_new(of_log: OpenLog<MemoryDisk>, timer: LaneTimer) -> Result<Attached<MemoryDisk, LaneTimer>> {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    admin::create(&*store, "v", &CreateOptions { size_bytes: BLOCKS * BLOCK as u64, logical_block: 512 }, 1).await?;
    let published = Published::load(&*store, "v").await?;
    let request = Request {
        force: false,
        read_only: false,
        flush_to: FlushTo::Wal,
        io_timeout: None,
        gc: Policy::default(),
        writer: Writer { host: "bench".into(), pid: 1, since: 1 },
        nonce: Nonce(1),
    };
    attach(Stores { attach: store.clone(), background: store }, published, of_log, timer, request).await
}

/// Attaches an empty volume and does `count` requests; their seconds.
fn run(kind: Kind, depth: usize, count: u64) -> f64 {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let lane = Lane::new(OwnRing::new(256, RingMode::default()).expect("a ring")).expect("a lane");
    let disk = MemoryDisk(Rc::new(RefCell::new(vec![0; SLOTS_START as usize + 2 * GEOMETRY.segment_bytes as usize])));
    let timer = LaneTimer::new(&lane);
    let of_log = OpenLog {
        file: log_file(folder.path()),
        disk: disk.clone(),
        superblock: None,
        geometry: GEOMETRY,
        salt: Box::new(|| 7),
    };
    // What is not run stays: nothing is packed while its owner lives.
    let attached = lane.run_until(attach_new(of_log, timer.clone())).expect("a lane").expect("attached");
    let volume = attached.volume.clone();
    let engine = VolumeLane::new(volume.clone(), disk.clone(), None, timer.clone());
    engine.clone().tasks().into_iter().for_each(|task| lane.spawn_boxed(task));
    lane.spawn(keep_log(volume, disk, timer));
    let mut driver = Sealer(engine.clone());
    let work = async {
        if kind == Kind::Read {
            for block in (0..BLOCKS).step_by(256) {
                engine.write(Lba(block * 8), filled(256 * BLOCK), false).await.expect("nothing fails here");
            }
        }
        let start = Instant::now();
        requests(&engine, kind, depth, count).await;
        start.elapsed().as_secs_f64()
    };
    let seconds = lane.run_with(&mut driver, work).expect("a lane");
    lane.shutdown(&mut driver).expect("a lane");
    seconds
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let kind = |name: &str| match name {
        "write" => Kind::Write,
        "read" => Kind::Read,
        other => panic!("{other} is neither write nor read"),
    };
    if let [name, depth, count] = &args[..] {
        run(kind(name), depth.parse().expect("a depth"), count.parse().expect("a count"));
        return;
    }
    for (name, depth) in [("write", 1), ("write", 32), ("read", 1), ("read", 32)] {
        let count = 30_000;
        println!("{name}, depth {depth}: {:.0} ns each", run(kind(name), depth, count) / count as f64 * 1e9);
    }
}
