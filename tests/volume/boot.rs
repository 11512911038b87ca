//! Boot traces: what one boot reads first, the next ones find in their cache.

use std::time::Duration;

use vb_ublk::cache::trace::{decode, trace_key};
use vb_ublk::cache::{MIN_BYTES, Place};
use vb_ublk::disk::IoBuf;
use vb_ublk::error::ErrorKind;
use vb_ublk::manifest::Published;
use vb_ublk::units::{BLOCK, Lba};
use vb_ublk::volume::Command;
use vb_ublk::volume::engine::Engine;
use vb_ublk::volume::host::{AttachOptions, Host};

use super::cache::cache_of;
use super::volume_support::{Bench, TestLane, block_on, drain, get, on_lane, pause, put};

const MIB: usize = 1 << 20;
/// Pages of 16 blocks, out of order, in several chunks; two adjoin.
const READ: [u64; 6] = [400, 3, 4, 90, 257, 130];

/// A volume whose blocks hold the number of their page, kept as the snapshot `s` of `vol`.
fn parent() -> Bench {
    let bench = Bench::new(32 * MIB);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| {
        for page in 0..512 {
            put(&e, page * 16, 16, fill_of(page)).await;
        }
    });
    let snapshot = |reply| Command::Snapshot { name: "s".into(), created: 1, reply };
    block_on(host.volume().command(snapshot)).unwrap();
    host.detach().unwrap();
    bench
}

const fn fill_of(page: u64) -> u8 {
    (page % 251) as u8 + 1
}

fn options(bench: &Bench, name: &str) -> AttachOptions {
    AttachOptions {
        volume: name.to_owned(),
        log_path: bench.dir.path().join(format!("wal/{name}.wal")),
        cache: Some(Place { path: bench.dir.path().join(format!("cache/{name}.cache")), bytes: MIN_BYTES }),
        ..bench.options()
    }
}

fn clone(bench: &Bench, name: &str) -> Host {
    super::snapshots::clone(bench, ("vol", "s"), name, None).unwrap();
    Host::attach(options(bench, name)).unwrap()
}

async fn boot(e: &TestLane, pages: &[u64]) {
    for page in pages {
        let b = IoBuf::zeroed(BLOCK);
        e.read(Lba((page * 16 + 5) * 8), b.clone()).await.unwrap();
        assert!(b.bytes().iter().all(|x| *x == fill_of(*page)), "page {page}");
    }
}

fn record(host: &Host, snapshot: &str) -> vb_ublk::error::Result<()> {
    let (volume, snapshot) = ("vol".to_owned(), snapshot.to_owned());
    block_on(host.volume().command(|reply| Command::KeepTrace { volume, snapshot, reply }))
}

/// The pages of the trace.
fn recorded(bench: &Bench) -> Vec<u64> {
    let store = bench.store();
    let m = block_on(Published::load(&*store, "vol")).unwrap().manifest;
    let (bytes, _) = block_on(store.get(&trace_key("vol", m.snapshots[0].id))).unwrap();
    decode(&bytes, m.uuid, m.snapshots[0].id).unwrap().into_iter().map(u64::from).collect()
}

/// Waits until so many bytes were fetched before anybody asked for them, and written.
fn until_fetched(host: &Host, pages: u64) {
    for _ in 0..250 {
        let c = cache_of(host);
        if c.ahead_bytes >= pages << 16 && c.used_bytes >= pages << 16 {
            return;
        }
        pause(Duration::from_millis(20));
    }
    panic!("{:?} after 5 s", cache_of(host));
}

#[test]
fn what_one_boot_reads_the_next_one_finds() {
    let bench = parent();
    let host = clone(&bench, "first");
    let e = record(&host, "s").expect_err("nothing is read yet");
    assert_eq!(e.kind(), ErrorKind::Usage);
    on_lane(host.volume(), async |e| {
        boot(&e, &READ).await;
        // What is its own is no part of what others boot from.
        put(&e, 500 * 16, 16, 9).await;
    });
    drain(host.volume());
    on_lane(host.volume(), async |e| assert_eq!(get(&e, 500 * 16).await, Ok(9)));
    assert_eq!(cache_of(&host).ahead_bytes, 0, "there was no trace");
    assert_eq!(record(&host, "t").expect_err("another snapshot").kind(), ErrorKind::Usage);
    record(&host, "s").unwrap();
    assert_eq!(recorded(&bench), READ);
    host.detach().unwrap();

    // Nobody reads anything, and it is all here.
    let host = clone(&bench, "second");
    until_fetched(&host, READ.len() as u64);
    let before = cache_of(&host);
    // A page of the volume may lie in two of a chunk.
    let most = (2 * READ.len() as u64) << 16;
    assert!(before.misses == 0 && before.ahead_bytes <= most, "{before:?}");
    let asked = host.volume().status().store_requests.get_range.requests;
    on_lane(host.volume(), async |e| boot(&e, &READ).await);
    let after = cache_of(&host);
    assert_eq!((after.misses, host.volume().status().store_requests.get_range.requests), (0, asked), "{after:?}");
    // What it has written itself is not fetched again from the parent.
    on_lane(host.volume(), async |e| put(&e, 400 * 16, 16, 77).await);
    drain(host.volume());
    host.detach().unwrap();
    std::fs::remove_file(bench.dir.path().join("cache/second.cache")).unwrap();
    let host = Host::attach(options(&bench, "second")).unwrap();
    until_fetched(&host, READ.len() as u64);
    on_lane(host.volume(), async |e| {
        assert_eq!(get(&e, 400 * 16).await, Ok(77));
        boot(&e, &READ[1..]).await;
    });
    assert_eq!(cache_of(&host).misses, 0);
    host.detach().unwrap();

    // The snapshot itself, served read-only, has it, too, and may record one of its own.
    let host = Host::attach(options(&bench, "vol@s")).unwrap();
    until_fetched(&host, READ.len() as u64);
    on_lane(host.volume(), async |e| boot(&e, &[40]).await);
    record(&host, "s").unwrap();
    host.detach().unwrap();
    let host = clone(&bench, "third");
    until_fetched(&host, 1);
    assert!(cache_of(&host).ahead_bytes <= 2 << 16, "the later trace");
    assert_eq!(recorded(&bench), [40]);
    host.detach().unwrap();
}

#[test]
fn a_trace_that_is_damaged_or_gone_is_in_nobody_s_way() {
    let bench = parent();
    let store = bench.store();
    let m = block_on(Published::load(&*store, "vol")).unwrap().manifest;
    let key = trace_key("vol", m.snapshots[0].id);
    let host = bench.attach().unwrap();
    assert_eq!(record(&host, "s").expect_err("it did not begin from there").kind(), ErrorKind::Usage);
    host.detach().unwrap();
    for bytes in [&b""[..], b"vb-boot\0", &[7; 4096]] {
        block_on(store.put(&key, bytes.to_vec().into())).unwrap();
        let name = format!("c{}", bytes.len());
        let host = clone(&bench, &name);
        on_lane(host.volume(), async |e| boot(&e, &READ).await);
        assert_eq!(cache_of(&host).ahead_bytes, 0);
        record(&host, "s").unwrap();
        host.detach().unwrap();
        block_on(vb_ublk::volume::admin::delete(&*store, &name, false)).unwrap();
    }
    // It goes with its snapshot; one who records later is told.
    let host = clone(&bench, "last");
    on_lane(host.volume(), async |e| boot(&e, &READ).await);
    block_on(host.volume().command(Command::Flatten)).unwrap();
    let mut published = block_on(Published::load(&*store, "vol")).unwrap();
    block_on(vb_ublk::volume::snapshots::delete(&*store, &mut published, vb_ublk::manifest::By::Anybody, "s")).unwrap();
    assert_eq!(block_on(store.list("vol/traces/", None)).unwrap(), []);
    assert_eq!(record(&host, "s").expect_err("gone").kind(), ErrorKind::NotFound);
    assert_eq!(block_on(store.list("vol/traces/", None)).unwrap(), []);
    host.detach().unwrap();
}
