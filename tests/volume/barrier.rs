//! Barriers, and flushes that go to the store.

use std::sync::Arc;
use std::time::Duration;

use vb_ublk::config::FlushTo;
use vb_ublk::error::ErrorKind;
use vb_ublk::units::Lba;
use vb_ublk::volume::engine::{Engine, IoFault};
use vb_ublk::volume::host::{AttachOptions, Host};
use vb_ublk::volume::{Command, Volume};

use super::volume_support::{Bench, TestLane, block_on, buf_of, get, on_lane, pause, put};
use super::{bring_store_back, take_store_away};

const SIZE: usize = 16 << 20;

fn to_store(bench: &Bench) -> AttachOptions {
    AttachOptions { flush_to: FlushTo::Store, ..bench.options() }
}

/// Whoever attaches the volume on another machine.
fn elsewhere(bench: &Bench) -> AttachOptions {
    AttachOptions { log_path: bench.dir.path().join("elsewhere/vol.wal"), force: true, ..bench.options() }
}

/// The first blocks, as another machine finds them.
fn found_elsewhere(bench: &Bench, blocks: u64) -> Vec<u8> {
    let other = Host::attach(elsewhere(bench)).unwrap();
    let found = on_lane(other.volume(), async |e| {
        let mut all = Vec::new();
        for block in 0..blocks {
            all.push(get(&e, block).await.unwrap());
        }
        all
    });
    other.abandon().unwrap();
    found
}

#[test]
fn what_was_flushed_to_the_store_survives_the_host() {
    for (flush_to, fua) in [(FlushTo::Store, false), (FlushTo::Store, true), (FlushTo::Wal, false)] {
        let bench = Bench::new(SIZE);
        let host = Host::attach(AttachOptions { flush_to, ..bench.options() }).unwrap();
        assert_eq!(host.volume().status().flush, flush_to);
        if flush_to == FlushTo::Wal {
            take_store_away(&bench);
        }
        on_lane(host.volume(), async |e| {
            put(&e, 0, 1, 1).await;
            if fua {
                e.write(Lba(8), buf_of(&[2; 4096]), true).await.unwrap();
            } else {
                put(&e, 1, 1, 2).await;
                e.flush().await.unwrap();
            }
        });
        host.abandon().unwrap();
        bench.wipe_local();
        let wanted = match flush_to {
            FlushTo::Store => [1, 2],
            FlushTo::Wal => {
                bring_store_back(&bench);
                [0, 0]
            }
        };
        assert_eq!(found_elsewhere(&bench, 2), wanted, "{flush_to:?}, fua {fua}");
    }
}

#[test]
fn a_barrier_brings_to_the_store_what_flushes_do_not() {
    let bench = Bench::new(SIZE);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 0, 1, 1).await);
    let durable = || host.volume().status().log.syncs;
    let before = durable();
    block_on(host.volume().command(Command::Sync)).unwrap();
    assert!(durable() > before, "of the log alone");
    block_on(host.volume().command(Command::Barrier)).unwrap();
    // One that finds all there is told at once.
    block_on(host.volume().command(Command::Barrier)).unwrap();
    host.abandon().unwrap();
    bench.wipe_local();
    assert_eq!(found_elsewhere(&bench, 1), [1]);
}

/// Starts a flush beside whoever calls.
fn flushing(volume: &Arc<Volume>) -> std::thread::JoinHandle<Result<(), IoFault>> {
    let volume = volume.clone();
    std::thread::spawn(move || on_lane(&volume, async |e| e.flush().await))
}

#[test]
fn a_flush_to_a_store_that_is_away_waits_for_it() {
    let bench = Bench::new(SIZE);
    let host = Host::attach(to_store(&bench)).unwrap();
    on_lane(host.volume(), async |e| put(&e, 0, 1, 1).await);
    take_store_away(&bench);
    let flushes = [flushing(host.volume()), flushing(host.volume())];
    pause(Duration::from_secs(1));
    assert!(flushes.iter().all(|f| !f.is_finished()));
    on_lane(host.volume(), async |e| {
        put(&e, 1, 1, 2).await;
        assert_eq!(get(&e, 1).await, Ok(2), "all else goes on");
    });
    bring_store_back(&bench);
    for flush in flushes {
        assert_eq!(flush.join().unwrap(), Ok(()));
    }
    host.abandon().unwrap();
    bench.wipe_local();
    assert_eq!(found_elsewhere(&bench, 1), [1]);
}

#[test]
fn a_flush_to_the_store_has_its_time_too() {
    let bench = Bench::new(SIZE);
    let io_timeout = Some(Duration::from_secs(1));
    let host = Host::attach(AttachOptions { io_timeout, ..to_store(&bench) }).unwrap();
    take_store_away(&bench);
    on_lane(host.volume(), async |e: std::rc::Rc<TestLane>| {
        put(&e, 0, 1, 1).await;
        assert_eq!(e.flush().await, Err(IoFault::TimedOut));
    });
    assert_eq!(host.volume().status().timeouts, 1);
    bring_store_back(&bench);
    on_lane(host.volume(), async |e| e.flush().await.unwrap());
    host.detach().unwrap();
}

/// All of it is in the store, and still it does not count: only the look at the manifest tells.
#[test]
fn who_has_lost_the_volume_flushes_no_more() {
    let bench = Bench::new(SIZE);
    let host = Host::attach(to_store(&bench)).unwrap();
    on_lane(host.volume(), async |e| {
        put(&e, 0, 1, 1).await;
        e.flush().await.unwrap();
    });
    let other = Host::attach(elsewhere(&bench)).unwrap();
    on_lane(host.volume(), async |e| {
        put(&e, 0, 1, 9).await;
        assert_eq!(e.flush().await, Err(IoFault::Gone));
        assert_eq!(get(&e, 0).await, Err(IoFault::Gone), "it has learned of it");
    });
    let e = block_on(host.volume().command(Command::Barrier)).expect_err("lost");
    assert_eq!(e.kind(), ErrorKind::Fenced, "{e}");
    on_lane(other.volume(), async |e| assert_eq!(get(&e, 0).await, Ok(1)));
    other.detach().unwrap();
    host.abandon().unwrap();
}
