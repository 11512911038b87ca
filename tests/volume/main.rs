//! The volume over a real log file and a file store, without a frontend.

mod at_once;
mod barrier;
mod boot;
mod cache;
mod dependants;
mod diff;
mod flatten;
mod gc;
mod latch;
mod lives;
mod packed;
mod resize;
mod scan;
mod snapshots;
#[path = "../support_rng/mod.rs"]
mod support_rng;
mod viperblock;
#[path = "../volume_support/mod.rs"]
mod volume_support;

use std::cell::Cell;
use std::io;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::time::Duration;

use support_rng::Rng;
use vb_ublk::disk::{Disk, IoBuf};
use vb_ublk::error::ErrorKind;
use vb_ublk::lane::LaneDisk;
use vb_ublk::units::Lba;
use vb_ublk::volume::Command;
use vb_ublk::volume::engine::{Engine, IoFault};
use vb_ublk::volume::host::{AttachOptions, Host};
use volume_support::{Bench, block_on, buf_of, churn, compare, drain, on_lane, on_lane_with};

const SIZE: usize = 32 << 20;

/// The store's machine is gone: every request to it fails, as a thing that may pass.
fn take_store_away(bench: &Bench) {
    let store = bench.dir.path().join("store");
    std::fs::rename(&store, store.with_extension("away")).unwrap();
    std::fs::write(&store, b"").unwrap();
}

fn bring_store_back(bench: &Bench) {
    let store = bench.dir.path().join("store");
    std::fs::remove_file(&store).unwrap();
    std::fs::rename(store.with_extension("away"), &store).unwrap();
}

#[test]
fn what_was_written_is_read_and_found_again_from_the_store_alone() {
    let bench = Bench::new(SIZE);
    let mut model = vec![0; SIZE];
    let mut rng = Rng(1);
    for round in 0..3 {
        let host = bench.attach().unwrap();
        on_lane(host.volume(), async |e| {
            compare(&e, &model, &format!("round {round}, at attach")).await;
            churn(&e, &mut model, &mut rng, 600).await;
            e.flush().await.unwrap();
            compare(&e, &model, "from the log").await;
        });
        drain(host.volume());
        let sent = host.volume().status().store_requests;
        assert!(sent.put.requests > 0 && sent.put.bytes_out > 1 << 20 && sent.put.errors == 0, "{sent:?}");
        on_lane(host.volume(), async |e| {
            compare(&e, &model, "from the store").await;
            churn(&e, &mut model, &mut rng, 200).await;
            compare(&e, &model, "from both").await;
        });
        let read = host.volume().status().store_requests.get_range;
        assert!(read.requests > sent.get_range.requests && read.bytes_in > 1 << 20, "{read:?}");
        host.detach().unwrap();
        if round != 1 {
            bench.wipe_local();
        }
    }
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| compare(&e, &model, "at the end").await);
    host.detach().unwrap();
}

#[test]
fn a_dead_process_loses_nothing_on_its_own_host() {
    let bench = Bench::new(SIZE);
    let mut model = vec![0; SIZE];
    let mut rng = Rng(2);
    for round in 0..6 {
        let host = bench.attach().unwrap();
        on_lane(host.volume(), async |e| {
            compare(&e, &model, &format!("after death {round}")).await;
            churn(&e, &mut model, &mut rng, 300).await;
        });
        if round % 2 == 1 {
            drain(host.volume());
            on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 100).await);
        }
        host.abandon().unwrap();
    }
    // Elsewhere, the volume says whose it is; by force it comes back as of its last group.
    bench.wipe_local();
    let refused = bench.attach().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    assert!(refused.to_string().contains("--force"), "{refused}");
    assert!(!bench.log().exists(), "a refusal changes nothing");
    let host = Host::attach(AttachOptions { force: true, ..bench.options() }).unwrap();
    host.detach().unwrap();
}

#[test]
fn a_volume_many_times_the_log_goes_through_it() {
    let bench = Bench::new(256 << 20);
    let host = bench.attach().unwrap();
    let chunk = 1 << 20;
    on_lane(host.volume(), async |e| {
        for i in 0..256u64 {
            let data = vec![(i % 251) as u8 + 1; chunk];
            e.write(Lba(i * 2048), buf_of(&data), false).await.unwrap();
        }
        for i in (0..256u64).step_by(17) {
            let b = IoBuf::zeroed(chunk);
            e.read(Lba(i * 2048), b.clone()).await.unwrap();
            assert!(b.bytes().iter().all(|x| *x == (i % 251) as u8 + 1), "MiB {i}");
        }
    });
    let status = host.volume().status();
    assert!(status.log.used_bytes <= status.log.capacity_bytes);
    host.detach().unwrap();
}

#[test]
fn requests_that_do_not_fit_are_refused() {
    let bench = Bench::new(1 << 20);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| {
        assert_eq!(e.write(Lba(2048), buf_of(&[0; 512]), false).await, Err(IoFault::BadRange));
        assert_eq!(e.write(Lba(2047), buf_of(&[0; 1024]), false).await, Err(IoFault::BadRange));
        assert_eq!(e.read(Lba(u64::MAX), buf_of(&[0; 512])).await, Err(IoFault::BadRange));
        assert_eq!(e.discard(Lba(0), 2049, false).await, Err(IoFault::BadRange));
        e.flush().await.unwrap();
    });
    host.detach().unwrap();
}

#[test]
fn a_log_of_another_attachment_is_set_aside_and_not_replayed() {
    let bench = Bench::new(1 << 20);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| e.write(Lba(0), buf_of(&[1; 4096]), true).await.unwrap());
    host.abandon().unwrap();
    // Another host takes the volume over, writes, and leaves cleanly.
    let other = AttachOptions { force: true, log_path: bench.dir.path().join("other/vol.wal"), ..bench.options() };
    let host = Host::attach(other).unwrap();
    on_lane(host.volume(), async |e| e.write(Lba(0), buf_of(&[2; 4096]), false).await.unwrap());
    host.detach().unwrap();
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| {
        let b = IoBuf::zeroed(4096);
        e.read(Lba(0), b.clone()).await.unwrap();
        assert_eq!(b.bytes(), [2; 4096]);
    });
    host.detach().unwrap();
    assert!(bench.dir.path().join("wal/vol.wal.aside-1").exists());
}

#[test]
fn a_second_attach_on_the_same_host_is_refused() {
    let bench = Bench::new(1 << 20);
    let host = bench.attach().unwrap();
    let second = bench.attach().unwrap_err();
    assert_eq!(second.kind(), ErrorKind::Busy, "{second}");
    host.detach().unwrap();
}

#[test]
fn a_forced_take_over_stops_the_old_writer() {
    let bench = Bench::new(1 << 20);
    let old = bench.attach().unwrap();
    let other = AttachOptions { force: true, log_path: bench.dir.path().join("other/vol.wal"), ..bench.options() };
    let new = Host::attach(other).unwrap();
    on_lane(old.volume(), async |e| e.write(Lba(0), buf_of(&[1; 4096]), false).await.unwrap());
    // Its next publish meets the other's manifest.
    let lost = old.detach().unwrap_err();
    assert_eq!(lost.kind(), ErrorKind::Fenced, "{lost}");
    on_lane(new.volume(), async |e| {
        let b = IoBuf::zeroed(4096);
        e.read(Lba(0), b.clone()).await.unwrap();
        assert_eq!(b.bytes(), [0; 4096]);
    });
    new.detach().unwrap();
}

/// A log whose head was wiped, as the program advises for devices, then used again for the same volume: the old
/// segments have the right volume and higher generations, and must not come back.
#[test]
fn segments_of_a_wiped_log_are_not_replayed() {
    let bench = Bench::new(64 << 20);
    let host = bench.attach().unwrap();
    // Else the forced attach may rightly find the first of these writes in the store.
    take_store_away(&bench);
    on_lane(host.volume(), async |e| {
        for i in 0..30u64 {
            e.write(Lba(i * 2048), buf_of(&vec![0xaa; 1 << 20]), false).await.unwrap();
        }
    });
    host.abandon().unwrap();
    bring_store_back(&bench);
    let log = std::fs::OpenOptions::new().write(true).open(bench.log()).unwrap();
    log.write_all_at(&vec![0u8; 1 << 20], 0).unwrap();
    let host = Host::attach(AttachOptions { force: true, ..bench.options() }).unwrap();
    on_lane(host.volume(), async |e| e.write(Lba(0), buf_of(&[0xbb; 4096]), true).await.unwrap());
    host.abandon().unwrap();
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| {
        assert_eq!(first_byte(&e, 0).await, Ok(0xbb));
        assert_eq!(first_byte(&e, 20 * 2048).await, Ok(0), "of the log before");
    });
    host.abandon().unwrap();
}

/// The store is away for a moment while a partial block is merged over one that is only there.
#[test]
fn a_store_that_is_away_damages_nothing() {
    let bench = Bench::new(1 << 20);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| e.write(Lba(0), buf_of(&[1; 4096]), false).await.unwrap());
    drain(host.volume());
    take_store_away(&bench);
    on_lane(host.volume(), async |e| e.write(Lba(0), buf_of(&[2; 512]), false).await.unwrap());
    let volume = host.volume().clone();
    let drained = std::thread::spawn(move || block_on(volume.command(Command::Barrier)));
    volume_support::pause(Duration::from_secs(2));
    assert!(!drained.is_finished());
    bring_store_back(&bench);
    drained.join().unwrap().unwrap();
    on_lane(host.volume(), async |e| {
        assert_eq!(first_byte(&e, 0).await, Ok(2));
        assert_eq!(first_byte(&e, 1).await, Ok(1), "the rest of the block");
    });
    host.detach().unwrap();
}

/// Uploads fail, the log fills, writers wait for room; then another host takes the volume: they get an error.
#[test]
fn who_waits_for_room_in_a_lost_volume_is_told() {
    let bench = Bench::new(256 << 20);
    let host = bench.attach().unwrap();
    std::fs::write(bench.dir.path().join("store/vol/chunks"), b"in the way").unwrap();
    let volume = host.volume().clone();
    let writer = std::thread::spawn(move || {
        on_lane(&volume, async |e| {
            for i in 0..200u64 {
                if let Err(fault) = e.write(Lba(i * 1024), buf_of(&vec![1; 1 << 19]), false).await {
                    return Some((i, fault));
                }
            }
            None
        })
    });
    volume_support::pause(Duration::from_secs(2));
    assert!(!writer.is_finished(), "the log is full: {:?}", host.volume().status().log);
    let log_path = bench.dir.path().join("other/vol.wal");
    let other = Host::attach(AttachOptions { force: true, log_path, ..bench.options() }).unwrap();
    assert_eq!(writer.join().unwrap().map(|(_, fault)| fault), Some(IoFault::Gone));
    assert_eq!(host.detach().unwrap_err().kind(), ErrorKind::Fenced);
    other.detach().unwrap();
}

async fn first_byte(e: &volume_support::TestLane, lba: u64) -> Result<u8, IoFault> {
    let b = IoBuf::zeroed(512);
    e.read(Lba(lba), b.clone()).await.map(|()| b.bytes()[0])
}

/// Counts what reaches stable storage: syncs, and writes that are synced with themselves.
struct Counted {
    disk: LaneDisk,
    synced: Rc<Cell<usize>>,
}

impl Disk for Counted {
    async fn read_at(&self, offset: u64, dst: IoBuf) -> io::Result<()> {
        self.disk.read_at(offset, dst).await
    }
    async fn writev_at(&self, offset: u64, bufs: Vec<IoBuf>, dsync: bool) -> io::Result<()> {
        self.disk.writev_at(offset, bufs, dsync).await?;
        self.synced.set(self.synced.get() + usize::from(dsync));
        Ok(())
    }
    async fn sync(&self) -> io::Result<()> {
        self.disk.sync().await?;
        self.synced.set(self.synced.get() + 1);
        Ok(())
    }
}

/// A flush and a write with FUA are answered after a sync of the log, a plain write without one. (The log's keeper may have
/// synced just before, from another thread: each is tried a few times.)
#[test]
fn flushes_and_fua_reach_stable_storage() {
    let bench = Bench::new(1 << 20);
    let host = bench.attach().unwrap();
    let synced = Rc::new(Cell::new(0));
    let counter = synced.clone();
    on_lane_with(
        host.volume(),
        |disk| Counted { disk, synced: counter.clone() },
        async |e| {
            let write = async |lba: u64, fua| e.write(Lba(lba), buf_of(&[1; 4096]), fua).await.unwrap();
            let (mut plain, mut by_flush, mut by_fua, mut other_lane, mut discards) = (0, 0, 0, 0, 0);
            let since = |before: usize| synced.get() - before;
            for _ in 0..5 {
                let before = synced.get();
                write(0, false).await;
                plain += since(before);
                let before = synced.get();
                e.flush().await.unwrap();
                by_flush += since(before);
                // A single writer's record is synced with itself; beside other writes it waits for a sync.
                let before = synced.get();
                write(8, true).await;
                futures_util::future::join(write(16, true), write(24, false)).await;
                by_fua += since(before);
                let before = synced.get();
                e.discard(Lba(32), 8, true).await.unwrap();
                discards += since(before);
                // What another lane has completed is covered, too.
                let volume = host.volume().clone();
                std::thread::spawn(move || {
                    on_lane(&volume, async |e| e.write(Lba(40), buf_of(&[2; 4096]), false).await.unwrap());
                })
                .join()
                .unwrap();
                let before = synced.get();
                e.flush().await.unwrap();
                other_lane += since(before);
            }
            assert_eq!(plain, 0, "a plain write does not wait for a sync");
            for (what, n) in [("flush", by_flush), ("FUA", by_fua), ("discard", discards), ("two lanes", other_lane)] {
                assert!(n > 0, "{what}: answered without a sync");
            }
        },
    );
    host.detach().unwrap();
}
