//! A volume on this machine without a frontend: a lane on a ring of its own, a file store, and a flat model.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use vb_ublk::config::FlushTo;
use vb_ublk::disk::file::DataFile;
use vb_ublk::disk::{Disk, IoBuf};
use vb_ublk::error::Result;
use vb_ublk::gc::Policy;
use vb_ublk::lane::{Driver, Lane, LaneDisk, LaneTimer, OwnRing, RingMode};
use vb_ublk::store::{StoreOptions, StoreUrl, open};
use vb_ublk::units::{BLOCK, Lba, SECTOR};
use vb_ublk::volume::admin::{self, CreateOptions};
use vb_ublk::volume::engine::{Engine, IoFault};
use vb_ublk::volume::host::{AttachOptions, Host};
use vb_ublk::volume::lane::VolumeLane;
use vb_ublk::volume::{Command, Volume};

use crate::support_rng::Rng;

pub(crate) type TestLane = VolumeLane<LaneDisk, LaneTimer>;

struct Sealer<D: Disk>(Rc<VolumeLane<D, LaneTimer>>);

impl<D: Disk> Driver for Sealer<D> {
    fn seal(&mut self) {
        self.0.seal();
    }
}

/// Runs `f` on a lane of the volume, on this thread.
pub(crate) fn on_lane<F: Future>(volume: &Arc<Volume>, f: impl FnOnce(Rc<TestLane>) -> F) -> F::Output {
    on_lane_with(volume, |disk| disk, f)
}

/// The same on disks of the test's own over the log and the cache.
pub(crate) fn on_lane_with<D: Disk, F: Future>(
    volume: &Arc<Volume>,
    wrap: impl Fn(LaneDisk) -> D,
    f: impl FnOnce(Rc<VolumeLane<D, LaneTimer>>) -> F,
) -> F::Output {
    let lane = Lane::new(OwnRing::new(256, RingMode::default()).unwrap()).unwrap();
    let disk = |file: &Arc<DataFile>| wrap(LaneDisk::new(&lane, file.clone()));
    let of_cache = volume.cache().map(|c| disk(c.file()));
    let engine = VolumeLane::new(volume.clone(), disk(volume.log_file()), of_cache, LaneTimer::new(&lane));
    for task in engine.clone().tasks() {
        lane.spawn_boxed(task);
    }
    let mut driver = Sealer(engine.clone());
    let out = lane.run_with(&mut driver, f(engine)).unwrap();
    lane.shutdown(&mut driver).unwrap();
    out
}

pub(crate) fn block_on<F: Future>(f: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f)
}

/// Lets this thread wait.
pub(crate) fn pause(d: std::time::Duration) {
    block_on(async { tokio::time::sleep(d).await });
}

/// A store, a log and a volume in a folder of their own.
pub(crate) struct Bench {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) log_bytes: u64,
}

impl Bench {
    pub(crate) fn new(size: usize) -> Self {
        // Not on a memory file system: the log wants O_DIRECT.
        let root = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let b = Self { dir: tempfile::tempdir_in(root).unwrap(), log_bytes: 64 << 20 };
        let store = b.store();
        let opts = CreateOptions { size_bytes: size as u64, logical_block: 512 };
        block_on(admin::create(&*store, "vol", &opts, 1)).unwrap();
        b
    }

    pub(crate) fn url(&self) -> StoreUrl {
        format!("file://{}", self.dir.path().join("store").display()).parse().unwrap()
    }

    pub(crate) fn store(&self) -> Arc<dyn vb_ublk::store::Store> {
        block_on(open(&self.url(), &StoreOptions { create: true, ..StoreOptions::default() })).unwrap()
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.dir.path().join("wal/vol.wal")
    }

    pub(crate) fn options(&self) -> AttachOptions {
        AttachOptions {
            store_url: self.url(),
            store_options: StoreOptions::default(),
            volume: "vol".to_owned(),
            log_path: self.log(),
            log_bytes: self.log_bytes,
            force: false,
            read_only: false,
            flush_to: FlushTo::Wal,
            io_timeout: None,
            resume: false,
            accept_loss: false,
            gc: Policy::default(),
            cache: None,
            guard_memory: true,
        }
    }

    pub(crate) fn attach(&self) -> Result<Host> {
        Host::attach(self.options())
    }

    /// Forgets everything local.
    pub(crate) fn wipe_local(&self) {
        std::fs::remove_dir_all(self.dir.path().join("wal")).unwrap();
    }
}

pub(crate) fn buf_of(bytes: &[u8]) -> IoBuf {
    let b = IoBuf::zeroed(bytes.len());
    b.copy_in(0, bytes);
    b
}

/// Brings everything that is complete to the store.
pub(crate) fn drain(volume: &Volume) {
    block_on(volume.command(Command::Barrier)).unwrap();
}

/// Fills whole blocks with a byte.
pub(crate) async fn put(e: &TestLane, block: u64, blocks: usize, fill: u8) {
    e.write(Lba(block * 8), buf_of(&vec![fill; blocks * BLOCK]), false).await.unwrap();
}

/// What a block holds, if it is all one byte.
pub(crate) async fn get(e: &TestLane, block: u64) -> std::result::Result<u8, IoFault> {
    let b = IoBuf::zeroed(BLOCK);
    e.read(Lba(block * 8), b.clone()).await?;
    let first = b.bytes()[0];
    assert!(b.bytes().iter().all(|x| *x == first), "block {block} is a mixture");
    Ok(first)
}

/// Random writes, discards and zeroings of all sizes, sixteen at a time, to the volume and to the model.
pub(crate) async fn churn(engine: &TestLane, model: &mut [u8], rng: &mut Rng, ops: usize) {
    let sectors = (model.len() / SECTOR) as u64;
    let mut done = 0;
    while done < ops {
        // Requests of one round do not overlap: their order would be open.
        let mut round: Vec<(u64, u64, u8, Vec<u8>)> = Vec::new();
        for _ in 0..16 {
            let len = match rng.below(4) {
                0 => 1 + rng.below(7),
                1 => 8,
                2 => 8 * (1 + rng.below(16)),
                _ => 1 + rng.below(256),
            };
            let mut lba = rng.below(sectors - len);
            if rng.below(2) == 0 {
                lba -= lba % 8;
            }
            if round.iter().any(|r| r.0 < lba + len && lba < r.0 + r.1) {
                continue;
            }
            let kind = rng.below(10) as u8;
            let data = if kind < 8 {
                let fill = rng.next().to_le_bytes();
                (0..len as usize * SECTOR).map(|i| fill[i % 8] ^ (i >> 9) as u8).collect()
            } else {
                vec![0; len as usize * SECTOR]
            };
            round.push((lba, len, kind, data));
        }
        let requests = round.iter().map(|(lba, len, kind, data)| async move {
            match kind {
                0..8 => engine.write(Lba(*lba), buf_of(data), *kind == 0).await.unwrap(),
                8 => engine.discard(Lba(*lba), *len, false).await.unwrap(),
                _ => engine.write_zeroes(Lba(*lba), *len, false).await.unwrap(),
            }
        });
        futures_util::future::join_all(requests).await;
        for (lba, _, _, data) in &round {
            let at = *lba as usize * SECTOR;
            model[at..at + data.len()].copy_from_slice(data);
        }
        done += round.len();
    }
}

/// Reads everything, in pieces of several sizes, and compares.
pub(crate) async fn compare(engine: &TestLane, model: &[u8], what: &str) {
    for (piece, label) in [(128 << 10, "128K"), (4096, "4K"), (7 * 512, "3.5K")] {
        let mut at = 0;
        // Small pieces over the first part only: the whole would take long.
        let end = if piece == 128 << 10 { model.len() } else { model.len().min(2 << 20) };
        while at < end {
            let n = piece.min(end - at);
            let b = IoBuf::zeroed(n);
            engine.read(Lba((at / SECTOR) as u64), b.clone()).await.unwrap();
            if b.bytes() != &model[at..at + n] {
                let bad = b.bytes().iter().zip(&model[at..at + n]).position(|(a, b)| a != b).unwrap();
                panic!("{what}: byte {} differs (read in {label} pieces)", at + bad);
            }
            at += n;
        }
    }
}
