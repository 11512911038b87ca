//! What the system that this one replaces gets wrong, each as a test: so that none of it comes back by another door.
//!
//! Elsewhere: the stalls of writers behind a slow uploader (`scripts/e2e/tests/80-backpressure`).

use std::time::{Duration, Instant};

use crate::volume_support::{Bench, buf_of, drain, get, on_lane, pause, put};
use vb_ublk::error::ErrorKind;
use vb_ublk::units::Lba;
use vb_ublk::volume::engine::{Engine, IoFault};
use vb_ublk::volume::host::Host;

const SIZE: usize = 64 << 20;
const BLOCK: usize = 4096;

/// There: lost after a crash, because the run's blocks came back from the uploaded object.
#[test]
fn an_overwrite_in_the_middle_of_an_uploaded_run_survives_a_crash() {
    let bench = Bench::new(SIZE);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 0, 256, 1).await);
    drain(host.volume());
    on_lane(host.volume(), async |e| {
        put(&e, 100, 1, 2).await;
        e.flush().await.unwrap();
    });
    host.abandon().unwrap();
    for round in 0..2 {
        let host = bench.attach().unwrap();
        on_lane(host.volume(), async |e| {
            for block in 0..256 {
                assert_eq!(get(&e, block).await, Ok(if block == 100 { 2 } else { 1 }), "round {round}, block {block}");
            }
        });
        // The second time from the store alone.
        host.detach().unwrap();
        bench.wipe_local();
    }
}

/// There: log files stay for as long as the volume is attached.
#[test]
fn the_log_gives_its_room_back_while_attached() {
    let bench = Bench::new(SIZE);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| {
        for i in 0..160 {
            put(&e, i % 64 * 256, 256, i as u8).await;
        }
    });
    // 160 MiB have gone through a log of 64.
    drain(host.volume());
    let begun = Instant::now();
    while host.volume().status().log.used_bytes > 16 << 20 {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", host.volume().status().log);
        pause(Duration::from_millis(50));
    }
    host.detach().unwrap();
}

/// There: a trim does nothing.
#[test]
fn a_trim_takes_blocks_out_of_the_volume() {
    let bench = Bench::new(SIZE);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 0, 1024, 9).await);
    drain(host.volume());
    assert_eq!(host.volume().status().mapped_blocks, 1024);
    on_lane(host.volume(), async |e| {
        e.discard(Lba(8 * 24), 8 * 1000, false).await.unwrap();
        assert_eq!(get(&e, 500).await, Ok(0));
    });
    drain(host.volume());
    assert_eq!(host.volume().status().mapped_blocks, 24);
    host.detach().unwrap();
}

/// There: zeros are stored as data.
#[test]
fn zeroing_stores_no_zeros() {
    let bench = Bench::new(SIZE);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 0, 64, 9).await);
    drain(host.volume());
    let before = host.volume().status().store_requests.put.bytes_out;
    on_lane(host.volume(), async |e| {
        e.write_zeroes(Lba(0), (SIZE / 512) as u64, true).await.unwrap();
        assert_eq!(get(&e, 63).await, Ok(0));
    });
    drain(host.volume());
    let status = host.volume().status();
    assert_eq!(status.mapped_blocks, 0);
    assert!(status.store_requests.put.bytes_out - before < 1 << 20, "{:?}", status.store_requests);
    host.detach().unwrap();
}

/// There: whatever the object holds is handed out.
#[test]
fn what_the_store_hands_out_is_checked() {
    let bench = Bench::new(SIZE);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 0, 16, 9).await);
    host.detach().unwrap();
    let folder = bench.dir.path().join("store/vol/chunks");
    let chunk = std::fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&chunk).unwrap();
    let at = bytes.len() - 5 * BLOCK;
    bytes[at] ^= 0x10;
    std::fs::write(&chunk, bytes).unwrap();
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| {
        for block in 0..16 {
            assert_eq!(get(&e, block).await, if block == 11 { Err(IoFault::Io) } else { Ok(9) }, "block {block}");
        }
    });
    host.detach().unwrap();
}

/// There: two hosts write one volume, and neither hears of it.
#[test]
fn a_second_host_is_refused_and_told_who_has_it() {
    let bench = Bench::new(SIZE);
    let first = bench.attach().unwrap();
    let mut other = bench.options();
    other.log_path = bench.dir.path().join("other/vol.wal");
    let refused = Host::attach(other.clone()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    assert!(refused.to_string().contains("attached by"), "{refused}");
    // By force it is taken, and the first one's writes are refused as soon as it finds out.
    other.force = true;
    let second = Host::attach(other).unwrap();
    let begun = Instant::now();
    while !first.volume().is_gone() {
        assert!(begun.elapsed() < Duration::from_secs(40), "it does not find out");
        pause(Duration::from_millis(100));
    }
    on_lane(first.volume(), async |e| {
        assert_eq!(e.write(Lba(0), buf_of(&[1; 4096]), false).await, Err(IoFault::Gone));
    });
    first.abandon().unwrap();
    second.detach().unwrap();
}
