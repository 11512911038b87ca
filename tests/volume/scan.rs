//! Reads that follow one another, beside reads that do not.

use vb_ublk::cache::Place;
use vb_ublk::units::BLOCK;
use vb_ublk::volume::host::{AttachOptions, Host};

use super::cache::{cache_of, file_of, filled, read, until_written};
use super::volume_support::{TestLane, on_lane};

const MIB: usize = 1 << 20;

/// A volume read from its beginning to its end is fetched ahead in few requests; what is read here and there is not.
#[test]
fn reads_that_follow_one_another_are_fetched_ahead() {
    let size = 24 * MIB;
    let (_bench, host) = filled(size);
    let gets = || host.volume().status().store_requests.get_range;
    on_lane(host.volume(), async |e| {
        for n in 0..100 {
            read(&e, n * 2711 % 6000, 1).await;
        }
    });
    until_written(&host);
    assert_eq!(cache_of(&host).ahead_bytes, 0, "{:?}", cache_of(&host));
    let before = gets();
    on_lane(host.volume(), async |e| {
        for block in (0..(size / BLOCK) as u64).step_by(8) {
            assert!(read(&e, block, 8).await.iter().all(|b| *b == (block / 256) as u8 + 1), "block {block}");
        }
    });
    until_written(&host);
    let (after, seen) = (gets(), cache_of(&host));
    assert!(seen.ahead_bytes > 16 * MIB as u64, "{seen:?}");
    let fetched = after.bytes_in - before.bytes_in;
    assert!(fetched <= size as u64 + 2 * MIB as u64, "{fetched} bytes: nothing is fetched twice");
    // What was read before lies in between, and cuts the requests.
    assert!(after.requests - before.requests < 200, "{} requests", after.requests - before.requests);
    host.detach().unwrap();
}

/// With room for it, what is fetched ahead are whole chunks, each once, and it is in memory when it is asked for.
#[test]
fn a_long_scan_fetches_whole_chunks() {
    let size = 96 * MIB;
    let (bench, host) = filled(size);
    host.detach().unwrap();
    let path = file_of(&bench);
    std::fs::remove_file(&path).unwrap();
    let options = AttachOptions { cache: Some(Place { path, bytes: 1 << 30 }), ..bench.options() };
    let host = Host::attach(options).unwrap();
    let gets = || host.volume().status().store_requests.get_range;
    let first = gets();
    on_lane(host.volume(), async |e| {
        for block in (0..(size / BLOCK) as u64).step_by(64) {
            assert!(read(&e, block, 64).await.iter().all(|b| *b == (block / 256) as u8 + 1), "block {block}");
        }
    });
    let last = gets();
    assert!(last.bytes_in - first.bytes_in < (size + size / 8) as u64, "{first:?} {last:?}");
    // A chunk has 4 MiB, and its header is a request of its own.
    assert!(last.requests - first.requests < 100, "{first:?} {last:?}");
    until_written(&host);
    assert!(cache_of(&host).ahead_bytes > (size - 8 * MIB) as u64, "{:?}", cache_of(&host));
    host.detach().unwrap();
}

/// None of it is fetched a second time because the cache has let go of it before anybody has read it.
#[test]
fn a_volume_larger_than_its_cache_goes_round() {
    let size = 80 * MIB;
    let (_bench, host) = filled(size);
    for round in 0..2 {
        on_lane(host.volume(), async |e| {
            for block in (0..(size / BLOCK) as u64).step_by(32) {
                let want = (block / 256) as u8 + 1;
                assert!(read(&e, block, 32).await.iter().all(|b| *b == want), "block {block}, round {round}");
            }
        });
        until_written(&host);
    }
    let seen = cache_of(&host);
    assert!(seen.used_bytes <= seen.size_bytes && seen.used_bytes > seen.size_bytes * 3 / 4, "{seen:?}");
    assert_eq!(seen.failed_writes, 0);
    // What is read again and again stays beside a scan.
    let hot = async |e: &TestLane| {
        for block in (0..1024).step_by(16) {
            read(e, block, 16).await;
        }
    };
    for _ in 0..3 {
        on_lane(host.volume(), async |e| hot(&e).await);
        until_written(&host);
    }
    let gets = || host.volume().status().store_requests.get_range;
    let first = gets();
    on_lane(host.volume(), async |e| {
        for block in (4096..(size / BLOCK) as u64).step_by(16) {
            read(&e, block, 16).await;
        }
    });
    until_written(&host);
    let (last, scanned) = (gets(), size as u64 - 16 * MIB as u64);
    assert!(last.bytes_in - first.bytes_in < scanned + scanned / 8, "{first:?} {last:?} for {scanned} bytes");
    assert!(last.requests - first.requests < scanned / (256 << 10), "{first:?} {last:?} for {scanned} bytes");
    let before = cache_of(&host);
    on_lane(host.volume(), async |e| hot(&e).await);
    let after = cache_of(&host);
    assert!(after.hits - before.hits > 32, "of 64 hot pages are left: {}", after.hits - before.hits);
    host.detach().unwrap();
}
