//! What has changed between two states of a volume: all of it, and nothing that was only moved.

use std::time::Duration;

use vb_ublk::error::{ErrorKind, Result};
use vb_ublk::gc::Policy;
use vb_ublk::manifest::Published;
use vb_ublk::map::ChangeKind::{self, Data, Zero};
use vb_ublk::units::{BLOCK, Lba, Nonce};
use vb_ublk::volume::diff::Pair;
use vb_ublk::volume::engine::Engine;
use vb_ublk::volume::host::{AttachOptions, Host};
use vb_ublk::volume::resize::{Options, resize};
use vb_ublk::volume::{Command, snapshots};

use crate::snapshots::{attach, clone, delete_snapshot, snapshot};
use crate::support_rng::Rng;
use crate::volume_support::{Bench, block_on, buf_of, churn, drain, on_lane, put};

const SIZE: usize = 16 << 20;

/// First block, blocks, what has become of them.
type Told = Vec<(u64, u64, ChangeKind)>;

fn try_diff(bench: &Bench, volume: &str, from: &str, to: Option<&str>) -> Result<Told> {
    let store = bench.store();
    block_on(async {
        let diff = Pair::find(&*store, volume, from, to).await?.compare(&store).await?;
        Ok(diff.changes().map(|c| (c.block.0, c.blocks, c.kind)).collect())
    })
}

#[track_caller]
fn diff(bench: &Bench, volume: &str, from: &str, to: &str) -> Told {
    try_diff(bench, volume, from, Some(to)).unwrap()
}

fn keep(bench: &Bench, name: &str) {
    block_on(snapshots::create(&*bench.store(), "vol", name, 1)).unwrap();
}

fn resized(bench: &Bench, bytes: u64) {
    let how = Options { size_bytes: bytes, discard_tail: true, nonce: Nonce::draw().unwrap() };
    block_on(resize(&*bench.store(), "vol", &how)).map(drop).unwrap();
}

#[test]
fn what_is_written_and_what_is_discarded_is_told() {
    let bench = Bench::new(SIZE);
    let host = bench.attach().unwrap();
    let volume = host.volume();
    snapshot(volume, "empty").unwrap();
    on_lane(volume, async |e| {
        put(&e, 10, 20, 1).await;
        put(&e, 100, 600, 2).await;
    });
    snapshot(volume, "a").unwrap();
    on_lane(volume, async |e| {
        put(&e, 12, 3, 9).await;
        // The same again is written, too.
        put(&e, 29, 2, 1).await;
        e.discard(Lba(120 * 8), 30 * 8, false).await.unwrap();
        e.write_zeroes(Lba(150 * 8), 8, false).await.unwrap();
        // Of zeros, and of what was discarded before: there was nothing.
        e.discard(Lba(2000 * 8), 80, false).await.unwrap();
        // A part of a block.
        e.write(Lba(699 * 8 + 3), buf_of(&[7; 512]), false).await.unwrap();
        put(&e, 1000, 1, 4).await;
    });
    snapshot(volume, "b").unwrap();
    snapshot(volume, "c").unwrap();
    let there = vec![(12, 3, Data), (29, 2, Data), (120, 31, Zero), (699, 1, Data), (1000, 1, Data)];
    let back = vec![(12, 3, Data), (29, 1, Data), (30, 1, Zero), (120, 31, Data), (699, 1, Data), (1000, 1, Zero)];
    assert_eq!(diff(&bench, "vol", "a", "b"), there);
    assert_eq!(diff(&bench, "vol", "b", "a"), back);
    assert_eq!(diff(&bench, "vol", "a", "c"), there);
    assert_eq!(diff(&bench, "vol", "b", "c"), []);
    assert_eq!(diff(&bench, "vol", "empty", "a"), [(10, 20, Data), (100, 600, Data)]);
    assert_eq!(diff(&bench, "vol", "a", "empty"), [(10, 20, Zero), (100, 600, Zero)]);
    on_lane(volume, async |e| put(&e, 5, 1, 5).await);
    let busy = try_diff(&bench, "vol", "b", None).unwrap_err();
    assert!(busy.kind() == ErrorKind::Busy && busy.to_string().contains("attached by"), "{busy}");
    host.detach().unwrap();
    assert_eq!(diff(&bench, "vol", "a", "b"), there);
    assert_eq!(try_diff(&bench, "vol", "b", None).unwrap(), [(5, 1, Data)]);
}

/// Most of a large volume's snapshots share a map and differ in what is laid over it.
#[test]
fn maps_that_have_an_image_in_common_are_compared_with_what_is_laid_over_it() {
    let bench = Bench::new(SIZE);
    let host = bench.attach().unwrap();
    let volume = host.volume();
    on_lane(volume, async |e| {
        for i in 0..1500 {
            put(&e, 2 * i, 1, 1).await;
        }
    });
    snapshot(volume, "a").unwrap();
    on_lane(volume, async |e| put(&e, 7, 2, 2).await);
    snapshot(volume, "b").unwrap();
    on_lane(volume, async |e| e.discard(Lba(8 * 8), 3 * 8, false).await.unwrap());
    snapshot(volume, "c").unwrap();
    let m = block_on(Published::load(&*bench.store(), "vol")).unwrap().manifest;
    let [a, b, c] = &m.snapshots[..] else { panic!("three of them") };
    let (a, b, c) = (a.checkpoint.as_ref(), b.checkpoint.as_ref(), c.checkpoint.as_ref());
    let (Some(a), Some(b), Some(c)) = (a, b, c) else { panic!("each has a map") };
    assert!(a.full == b.full && b.full == c.full && a.delta.is_none() && b.delta.is_some() && c.delta != b.delta);
    for (from, to, told) in [
        ("a", "b", vec![(7, 2, Data)]),
        ("b", "a", vec![(7, 1, Zero), (8, 1, Data)]),
        ("b", "c", vec![(8, 1, Zero), (10, 1, Zero)]),
        ("a", "c", vec![(7, 1, Data), (8, 1, Zero), (10, 1, Zero)]),
        ("c", "a", vec![(7, 1, Zero), (8, 1, Data), (10, 1, Data)]),
    ] {
        assert_eq!(diff(&bench, "vol", from, to), told, "{from} to {to}");
    }
    host.detach().unwrap();
}

#[test]
fn what_is_left_out_is_the_same_whatever_was_done() {
    let bench = Bench::new(SIZE);
    let (mut model, mut rng) = (vec![0; SIZE], Rng(23));
    let mut states = Vec::new();
    for n in 0..6 {
        let gc = Policy { slack_blocks: 0, pause: Duration::from_millis(5), ..Policy::default() };
        let host = Host::attach(AttachOptions { gc, ..bench.options() }).unwrap();
        on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 60 + 150 * (n % 3)).await);
        if n % 2 == 0 {
            drain(host.volume());
            block_on(host.volume().command(Command::CollectGarbage)).unwrap();
        }
        snapshot(host.volume(), &format!("s{n}")).unwrap();
        states.push((format!("s{n}"), model.clone()));
        if n == 3 { host.abandon().unwrap() } else { host.detach().unwrap() }
    }
    let mut left_out = 0;
    for (from, was) in &states {
        for (to, is) in states.iter().filter(|s| s.0 != *from) {
            let mut told = vec![None; SIZE / BLOCK];
            for (block, blocks, kind) in diff(&bench, "vol", from, to) {
                told[block as usize..(block + blocks) as usize].fill(Some(kind));
            }
            for (b, kind) in told.iter().enumerate() {
                let bytes = b * BLOCK..(b + 1) * BLOCK;
                let (was, is) = (&was[bytes.clone()], &is[bytes]);
                match kind {
                    None => assert!(was == is, "{from} to {to}: block {b}"),
                    Some(Zero) => assert!(is.iter().all(|x| *x == 0), "{from} to {to}: block {b}"),
                    Some(Data) => {}
                }
                left_out += usize::from(kind.is_none() && is.iter().any(|x| *x != 0));
            }
        }
    }
    assert!(left_out > 1000, "{left_out}");
}

#[test]
fn a_volume_that_has_grown_or_shrunk_in_between() {
    let bench = Bench::new(SIZE);
    let end = (SIZE / BLOCK) as u64;
    let write = |block: u64, blocks: usize| {
        let host = bench.attach().unwrap();
        on_lane(host.volume(), async |e| put(&e, block, blocks, 3).await);
        host.detach().unwrap();
    };
    write(end - 10, 10);
    keep(&bench, "small");
    resized(&bench, 2 * SIZE as u64);
    write(end - 1, 3);
    write(2 * end - 1, 1);
    keep(&bench, "large");
    let grown = [(end - 1, 3, Data), (2 * end - 1, 1, Data)];
    assert_eq!(diff(&bench, "vol", "small", "large"), grown);
    assert_eq!(diff(&bench, "vol", "large", "small"), [(end - 1, 1, Data)], "nothing behind the end");
    // Cut off and grown again: what was there is zeros.
    resized(&bench, (end - 4) * BLOCK as u64);
    keep(&bench, "cut");
    assert_eq!(diff(&bench, "vol", "small", "cut"), []);
    resized(&bench, 2 * SIZE as u64);
    write(end - 2, 1);
    keep(&bench, "again");
    assert_eq!(diff(&bench, "vol", "small", "again"), [(end - 4, 2, Zero), (end - 2, 1, Data), (end - 1, 1, Zero)]);
    assert_eq!(diff(&bench, "vol", "cut", "again"), [(end - 2, 1, Data)]);
}

/// A snapshot's chunks are not emptied while it is there, so what it has is moved only by a batch that was under way when it was
/// made. The same comes of putting a snapshot and its objects back behind the collector.
fn moved() -> (Bench, Told) {
    let bench = Bench::new(SIZE);
    let host = bench.attach().unwrap();
    for i in 0..3 {
        on_lane(host.volume(), async |e| put(&e, i * 1016, 1016, i as u8 + 1).await);
        drain(host.volume());
    }
    host.detach().unwrap();
    keep(&bench, "a");
    let folder = bench.dir.path().join("store/vol");
    let kept = bench.dir.path().join("kept");
    let copy = |how: &str, from: &str, to: &std::path::Path| {
        let from = bench.dir.path().join(from);
        assert!(std::process::Command::new("cp").arg(how).arg(from).arg(to).status().unwrap().success());
    };
    copy("-a", "store/vol", &kept);
    let a = block_on(Published::load(&*bench.store(), "vol")).unwrap().manifest.snapshots.remove(0);
    delete_snapshot(&bench, "vol", "a").unwrap();

    let gc = Policy { slack_blocks: 0, pause: Duration::from_millis(5), grace: Duration::ZERO, ..Policy::default() };
    let host = Host::attach(AttachOptions { gc, ..bench.options() }).unwrap();
    let mut told = Vec::new();
    for i in 0..250 {
        told.push((12 * i, 8, Data));
        on_lane(host.volume(), async |e| put(&e, 12 * i, 8, 0x77).await);
    }
    on_lane(host.volume(), async |e| e.discard(Lba(3000 * 8), 8 * 8, false).await.unwrap());
    told.push((3000, 8, Zero));
    drain(host.volume());
    block_on(host.volume().command(Command::CollectGarbage)).unwrap();
    let space = host.volume().status().background.space.unwrap();
    assert!(space.gc_written_bytes > 3 << 20, "{space:?}");
    host.detach().unwrap();
    keep(&bench, "b");
    copy("-an", "kept/.", &folder);
    let store = bench.store();
    let mut m = block_on(Published::load(&*store, "vol")).unwrap().manifest;
    m.snapshots.insert(0, a);
    block_on(store.put("vol/manifest.json", m.encode().unwrap().into())).unwrap();
    (bench, told)
}

#[test]
fn what_garbage_collection_has_moved_has_not_changed() {
    let (bench, told) = moved();
    assert_eq!(diff(&bench, "vol", "a", "b"), told);
    let back: Told = told.iter().map(|(block, blocks, _)| (*block, *blocks, Data)).collect();
    assert_eq!(diff(&bench, "vol", "b", "a"), back);
    assert_eq!(try_diff(&bench, "vol", "a", None).unwrap(), told);
}

#[test]
fn what_lies_in_a_chunk_that_cannot_be_read_counts_as_changed() {
    let (bench, told) = moved();
    let store = bench.store();
    let newest = block_on(store.list("vol/chunks/", None)).unwrap().pop().unwrap().key;
    let whole = block_on(store.get(&newest)).unwrap().0;
    let mut damaged = whole.to_vec();
    damaged[300] ^= 1;
    for gone in [false, true] {
        if gone {
            block_on(store.delete(&newest)).unwrap();
        } else {
            block_on(store.put(&newest, damaged.clone().into())).unwrap();
        }
        let more = diff(&bench, "vol", "a", "b");
        let has = |b: u64, all: &Told| all.iter().any(|(s, n, _)| (*s..s + n).contains(&b));
        let count = |all: &Told| all.iter().map(|t| t.1).sum::<u64>();
        assert!(told.iter().all(|(s, n, _)| (*s..s + n).all(|b| has(b, &more))));
        assert!(count(&more) > count(&told), "{} blocks", count(&more));
    }
}

#[test]
fn snapshots_of_a_clone_are_compared_over_its_parents_chunks() {
    let bench = Bench::new(SIZE);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 0, 300, 1).await);
    snapshot(host.volume(), "base").unwrap();
    host.detach().unwrap();
    clone(&bench, ("vol", "base"), "middle", None).unwrap();
    let step = |volume: &str, name: &str, block: u64, blocks: usize| {
        let host = attach(&bench, volume).unwrap();
        on_lane(host.volume(), async |e| put(&e, block, blocks, 2).await);
        snapshot(host.volume(), name).unwrap();
        host.detach().unwrap();
    };
    step("middle", "one", 100, 50);
    clone(&bench, ("middle", "one"), "top", Some(2 * SIZE as u64)).unwrap();
    block_on(snapshots::create(&*bench.store(), "top", "fresh", 3)).unwrap();
    // Numbers of entries and chunks that its parents have used as well.
    step("top", "two", 90, 20);
    step("top", "three", 140, 20);
    assert_eq!(diff(&bench, "top", "fresh", "two"), [(90, 20, Data)]);
    assert_eq!(diff(&bench, "top", "two", "three"), [(140, 20, Data)]);
    assert_eq!(diff(&bench, "top", "fresh", "three"), [(90, 20, Data), (140, 20, Data)]);
    assert_eq!(diff(&bench, "top", "three", "fresh"), [(90, 20, Data), (140, 20, Data)]);
    assert_eq!(try_diff(&bench, "top", "two", None).unwrap(), [(140, 20, Data)]);
    assert_eq!(try_diff(&bench, "middle", "one", None).unwrap(), []);
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let bench = Bench::new(SIZE);
    for name in ["a", "b"] {
        keep(&bench, name);
    }
    assert_eq!(diff(&bench, "vol", "a", "b"), []);
    let refused = |from: &str, to: Option<&str>, kind: ErrorKind, word: &str| {
        let e = try_diff(&bench, "vol", from, to).unwrap_err();
        assert!(e.kind() == kind && e.to_string().contains(word), "{from} to {to:?}: {e}");
    };
    refused("a", Some("a"), ErrorKind::Usage, "itself");
    refused("x", Some("a"), ErrorKind::NotFound, "it has a, b");
    refused("a", Some("x"), ErrorKind::NotFound, "it has a, b");
    assert_eq!(try_diff(&bench, "none", "a", None).unwrap_err().kind(), ErrorKind::NotFound);
    // A deletion that was interrupted.
    let store = bench.store();
    let mut m = block_on(Published::load(&*store, "vol")).unwrap().manifest;
    let write = |m: &vb_ublk::manifest::Manifest| {
        block_on(store.put("vol/manifest.json", m.encode().unwrap().into())).unwrap();
    };
    m.snapshots[1].deleting = Some(m.uuid);
    write(&m);
    refused("a", Some("b"), ErrorKind::Busy, "snapshot delete vol b");
    refused("b", Some("a"), ErrorKind::Busy, "being deleted");
    m.snapshots[1].deleting = None;
    m.deleting = Some(m.uuid);
    write(&m);
    refused("a", Some("b"), ErrorKind::Busy, "volume delete vol");
}

/// A rebuild that gives chunks up has the next attachment give their numbers out again: what two maps place alike need not be the same.
#[test]
fn a_volume_that_went_on_from_before_a_snapshot_is_not_compared_with_it() {
    let bench = Bench::new(SIZE);
    let round = |name: &str| {
        let host = bench.attach().unwrap();
        on_lane(host.volume(), async |e| put(&e, 1, 5, 1).await);
        snapshot(host.volume(), name).unwrap();
        host.detach().unwrap();
    };
    for name in ["a", "b", "c"] {
        round(name);
    }
    let store = bench.store();
    let mut m = block_on(Published::load(&*store, "vol")).unwrap().manifest;
    // As if it had been rebuilt up to `a`, and attached again.
    let first = m.history[1].first;
    m.history[2].first = first;
    block_on(store.put("vol/manifest.json", m.encode().unwrap().into())).unwrap();
    let e = try_diff(&bench, "vol", "a", Some("b")).unwrap_err();
    assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("from before b"), "{e}");
    let e = try_diff(&bench, "vol", "b", None).unwrap_err();
    assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("from before b"), "{e}");
    assert_eq!(diff(&bench, "vol", "a", "c"), [(1, 5, Data)]);
}
