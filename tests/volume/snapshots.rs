//! Snapshots and clones: what they hold, and what depends on what.

use std::path::PathBuf;

use vb_ublk::error::{ErrorKind, Result};
use vb_ublk::manifest::{By, Published, Writer};
use vb_ublk::units::Nonce;
use vb_ublk::volume::engine::{Engine, IoFault};
use vb_ublk::volume::host::{AttachOptions, Host};
use vb_ublk::volume::rebuild::{Options, rebuild};
use vb_ublk::volume::verify::verify;
use vb_ublk::volume::{Command, Volume, admin, snapshots};

use crate::support_rng::Rng;
use crate::volume_support::{Bench, block_on, buf_of, churn, compare, drain, get, on_lane, put};

const SIZE: usize = 16 << 20;
const MIB: usize = 1 << 20;

fn log_of(bench: &Bench, name: &str) -> PathBuf {
    bench.dir.path().join(format!("wal/{name}.wal"))
}

pub(crate) fn attach(bench: &Bench, name: &str) -> Result<Host> {
    Host::attach(AttachOptions { volume: name.to_owned(), log_path: log_of(bench, name), ..bench.options() })
}

pub(crate) fn snapshot(volume: &Volume, name: &str) -> Result<()> {
    block_on(volume.command(|reply| Command::Snapshot { name: name.to_owned(), created: 5, reply }))
}

pub(crate) fn delete_snapshot(bench: &Bench, volume: &str, name: &str) -> Result<()> {
    let store = bench.store();
    block_on(async {
        let mut published = Published::load(&*store, volume).await?;
        snapshots::delete(&*store, &mut published, By::Anybody, name).await
    })
}

pub(crate) fn clone(bench: &Bench, from: (&str, &str), new: &str, size: Option<u64>) -> Result<()> {
    block_on(snapshots::clone(&*bench.store(), from.0, from.1, new, size, 9)).map(drop)
}

/// All of it, at once and from the store alone.
pub(crate) fn holds(bench: &Bench, name: &str, model: &[u8]) {
    let host = attach(bench, name).unwrap();
    assert_eq!(host.volume().size_bytes(), model.len() as u64, "{name}");
    on_lane(host.volume(), async |e| compare(&e, model, name).await);
    host.detach().unwrap();
}

pub(crate) fn is_well(bench: &Bench, name: &str) {
    let report = block_on(verify(&*bench.store(), name, &mut |_| {})).unwrap();
    assert!(report.is_well(), "{name}: {report:#?}");
}

#[test]
fn a_snapshot_of_a_busy_volume_is_the_volume_at_its_moment() {
    let bench = Bench::new(SIZE);
    let (mut model, mut rng) = (vec![0; SIZE], Rng(7));
    let mut kept = Vec::new();
    let host = bench.attach().unwrap();
    for n in 0..4 {
        on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 150).await);
        let before = model.clone();
        // What comes while it is being made is in it or not, as it pleases; so it goes to the last MiB alone.
        let volume = host.volume().clone();
        let busy = std::thread::spawn(move || {
            on_lane(&volume, async |e| {
                for i in 0..40u64 {
                    put(&e, (SIZE as u64 - MIB as u64) / 4096 + i, 1, n + 1).await;
                }
            });
        });
        snapshot(host.volume(), &format!("s{n}")).unwrap();
        busy.join().unwrap();
        let tail = SIZE - MIB;
        for i in 0..40usize {
            model[tail + i * 4096..tail + (i + 1) * 4096].fill(n + 1);
        }
        kept.push((format!("vol@s{n}"), before));
    }
    // While the volume is attached, and after.
    for (name, before) in &kept {
        let view = attach(&bench, name).unwrap();
        let n = SIZE - MIB;
        on_lane(view.volume(), async |e| {
            compare_up_to(&e, before, n).await;
            assert_eq!(e.write(vb_ublk::units::Lba(0), buf_of(&[1; 4096]), false).await, Err(IoFault::ReadOnly));
        });
        view.detach().unwrap();
        assert!(!log_of(&bench, name).exists());
    }
    on_lane(host.volume(), async |e| compare(&e, &model, "the volume itself").await);
    host.detach().unwrap();
    bench.wipe_local();
    for (name, before) in &kept {
        let view = attach(&bench, name).unwrap();
        on_lane(view.volume(), async |e| compare_up_to(&e, before, SIZE - MIB).await);
        view.detach().unwrap();
    }
    holds(&bench, "vol", &model);
    is_well(&bench, "vol");
}

async fn compare_up_to(e: &crate::volume_support::TestLane, model: &[u8], bytes: usize) {
    let b = vb_ublk::disk::IoBuf::zeroed(bytes);
    e.read(vb_ublk::units::Lba(0), b.clone()).await.unwrap();
    assert!(b.bytes() == &model[..bytes], "it is not as it was");
}

#[test]
fn what_was_flushed_before_it_is_in_it_and_an_idle_volume_takes_one_at_once() {
    let bench = Bench::new(SIZE);
    let host = bench.attach().unwrap();
    snapshot(host.volume(), "empty").unwrap();
    on_lane(host.volume(), async |e| {
        put(&e, 3, 2, 9).await;
        e.flush().await.unwrap();
    });
    snapshot(host.volume(), "a").unwrap();
    // Nothing has changed in between: nothing is written but the manifest.
    drain(host.volume());
    let puts = || {
        let sent = host.volume().status().store_requests;
        (sent.put.requests, sent.put_if.requests)
    };
    let before = puts();
    snapshot(host.volume(), "b").unwrap();
    assert_eq!(puts(), (before.0, before.1 + 1), "the manifest alone");
    for (name, kind) in [("a", ErrorKind::Exists), ("a b", ErrorKind::Usage), ("", ErrorKind::Usage)] {
        assert_eq!(snapshot(host.volume(), name).unwrap_err().kind(), kind, "{name}");
    }
    host.abandon().unwrap();
    for (name, want) in [("vol@empty", 0), ("vol@a", 9), ("vol@b", 9)] {
        let view = attach(&bench, name).unwrap();
        on_lane(view.volume(), async |e| assert_eq!(get(&e, 4).await, Ok(want), "{name}"));
        view.detach().unwrap();
    }
    let e = attach(&bench, "vol@c").map(|_| ()).unwrap_err();
    assert!(e.kind() == ErrorKind::NotFound && e.to_string().contains("empty, a, b"), "{e}");
}

#[test]
fn a_detached_volume_has_its_snapshots_made_and_deleted_by_anybody() {
    let bench = Bench::new(SIZE);
    let store = bench.store();
    let (mut model, mut rng) = (vec![0; SIZE], Rng(3));
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 200).await);
    let e = block_on(snapshots::create(&*store, "vol", "a", 1)).unwrap_err();
    assert!(e.kind() == ErrorKind::Busy && e.to_string().contains("attached by"), "{e}");
    host.detach().unwrap();
    block_on(snapshots::create(&*store, "vol", "a", 1)).unwrap();
    assert_eq!(block_on(snapshots::create(&*store, "vol", "a", 1)).unwrap_err().kind(), ErrorKind::Exists);
    let before = model.clone();
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 200).await);
    let e = delete_snapshot(&bench, "vol", "a").unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Busy, "{e}");
    host.detach().unwrap();
    holds(&bench, "vol@a", &before);
    delete_snapshot(&bench, "vol", "a").unwrap();
    assert_eq!(delete_snapshot(&bench, "vol", "a").unwrap_err().kind(), ErrorKind::NotFound);
    holds(&bench, "vol", &model);
}

#[test]
fn clones_of_clones_go_their_own_ways() {
    let bench = Bench::new(SIZE);
    let (mut model, mut rng) = (vec![0; SIZE], Rng(11));
    let mut all: Vec<(String, Vec<u8>)> = Vec::new();
    let mut name = "vol".to_owned();
    for generation in 0..4 {
        let host = attach(&bench, &name).unwrap();
        on_lane(host.volume(), async |e| {
            compare(&e, &model, &format!("{name}, at attach")).await;
            churn(&e, &mut model, &mut rng, 120).await;
        });
        snapshot(host.volume(), "s").unwrap();
        let at_snapshot = model.clone();
        // What comes after the snapshot is the volume's alone.
        on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 60).await);
        if generation == 2 {
            host.abandon().unwrap();
        } else {
            host.detach().unwrap();
        }
        all.push((name.clone(), model));
        all.push((format!("{name}@s"), at_snapshot.clone()));
        model = at_snapshot;
        let next = format!("clone-{generation}");
        // One in two is larger than what it came from.
        let size = (generation == 1).then_some((SIZE + MIB) as u64);
        clone(&bench, (&name, "s"), &next, size).unwrap();
        model.resize(size.unwrap_or(model.len() as u64) as usize, 0);
        name = next;
    }
    all.push((name, model));
    for (name, model) in &all {
        holds(&bench, name, model);
        is_well(&bench, name.split('@').next().unwrap());
    }
    bench.wipe_local();
    for (name, model) in &all {
        holds(&bench, name, model);
    }
    // From the oldest to the newest none can go; from the newest to the oldest all can.
    let e = block_on(admin::delete(&*bench.store(), "vol", false)).unwrap_err();
    assert!(e.kind() == ErrorKind::Busy && e.to_string().contains("clone-0"), "{e}");
    let e = delete_snapshot(&bench, "clone-1", "s").unwrap_err();
    assert!(e.kind() == ErrorKind::Busy && e.to_string().contains("clone-2"), "{e}");
    for (name, model) in &all {
        holds(&bench, name, model);
    }
    for name in ["clone-3", "clone-2", "clone-1", "clone-0", "vol"] {
        block_on(admin::delete(&*bench.store(), name, false)).unwrap();
    }
    assert!(block_on(bench.store().list("", None)).unwrap().is_empty());
}

#[test]
fn making_a_clone_costs_the_same_whatever_the_size() {
    use std::sync::Arc;
    use vb_ublk::store::metrics::Metrics;
    let bench = Bench::new(256 << 20);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| {
        for i in 0..64 {
            put(&e, i * 700, 128, i as u8 + 1).await;
        }
    });
    snapshot(host.volume(), "s").unwrap();
    let store = Arc::new(Metrics::new(bench.store()));
    // Of a volume that is attached, too.
    let made = |name: &str| {
        let begun = std::time::Instant::now();
        block_on(snapshots::clone(&*store, "vol", "s", name, None, 1)).unwrap();
        begun.elapsed()
    };
    let first = made("c");
    let sent = store.snapshot();
    // The best of five, on a machine that does other things as well.
    let took = ["c2", "c3", "c4", "c5"].into_iter().map(made).min().unwrap().min(first);
    assert!(took < std::time::Duration::from_millis(100), "{took:?}");
    assert_eq!(
        (sent.get.requests, sent.put.requests, sent.put_if.requests, sent.list.requests),
        (3, 1, 1, 1),
        "{sent:?}"
    );
    host.detach().unwrap();
    let c = attach(&bench, "c").unwrap();
    on_lane(c.volume(), async |e| assert_eq!(get(&e, 63 * 700).await, Ok(64)));
    c.detach().unwrap();
    for (new, size, kind) in
        [("c", None, ErrorKind::Exists), ("d", Some(4096), ErrorKind::Usage), ("d/", None, ErrorKind::Usage)]
    {
        assert_eq!(clone(&bench, ("vol", "s"), new, size).unwrap_err().kind(), kind, "{new} {size:?}");
    }
    assert_eq!(clone(&bench, ("vol", "t"), "d", None).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(clone(&bench, ("lov", "t"), "d", None).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn what_an_interrupted_clone_or_deletion_leaves_is_in_nobody_s_way() {
    let bench = Bench::new(SIZE);
    let store = bench.store();
    block_on(snapshots::create(&*store, "vol", "s", 1)).unwrap();
    clone(&bench, ("vol", "s"), "c", None).unwrap();
    // The clone's manifest is gone, its ref is not; then a volume of the same name that has nothing to do with it.
    block_on(store.delete("c/manifest.json")).unwrap();
    let opts = admin::CreateOptions { size_bytes: 4096, logical_block: 512 };
    block_on(admin::create(&*store, "c", &opts, 1)).unwrap();
    delete_snapshot(&bench, "vol", "s").unwrap();
    assert!(block_on(store.list("vol/refs/", None)).unwrap().is_empty());

    // A deletion that was interrupted after its mark: no clone, no attach, and the next deletion goes on.
    block_on(snapshots::create(&*store, "vol", "s", 1)).unwrap();
    let mark = |volume: bool| {
        block_on(async {
            let mut p = Published::load(&*store, "vol").await.unwrap();
            let mark = Some(p.manifest.uuid);
            p.edit(&*store, false, |m| {
                if volume {
                    m.deleting = mark
                } else {
                    m.snapshots[0].deleting = mark
                }
                Ok(())
            })
            .await
            .unwrap();
        });
    };
    mark(false);
    assert_eq!(clone(&bench, ("vol", "s"), "d", None).unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(
        block_on(store.list("d/", None)).unwrap().len() + block_on(store.list("vol/refs/", None)).unwrap().len(),
        0
    );
    delete_snapshot(&bench, "vol", "s").unwrap();
    mark(true);
    for e in [
        attach(&bench, "vol").map(|_| ()).unwrap_err(),
        block_on(snapshots::create(&*store, "vol", "t", 1)).unwrap_err(),
    ] {
        assert!(e.kind() == ErrorKind::Busy && e.to_string().contains("volume delete"), "{e}");
    }
    block_on(admin::delete(&*store, "vol", false)).unwrap();
}

#[test]
fn a_refused_deletion_leaves_a_clone_its_ref_and_an_interrupted_clone_is_not_attached() {
    let bench = Bench::new(SIZE);
    let store = bench.store();
    block_on(snapshots::create(&*store, "vol", "s", 1)).unwrap();
    clone(&bench, ("vol", "s"), "x", None).unwrap();
    // One that is being made: its ref is there, its manifest is not.
    let id = block_on(admin::info(&*store, "vol")).unwrap().snapshots[0].id;
    let made = uuid::Uuid::new_v4();
    let key = vb_ublk::manifest::ref_key("vol", id, "y", made);
    block_on(store.put(&key, "{}".into())).unwrap();
    for _ in 0..2 {
        assert_eq!(delete_snapshot(&bench, "vol", "s").unwrap_err().kind(), ErrorKind::Busy);
        assert_eq!(block_on(admin::delete(&*store, "vol", true)).unwrap_err().kind(), ErrorKind::Busy);
        block_on(store.get(&key)).expect("its ref is there still");
    }
    // Its maker died before it looked, and the snapshot went.
    let mut m = block_on(admin::info(&*store, "x")).unwrap();
    (m.name, m.uuid) = ("y".to_owned(), made);
    block_on(admin::delete(&*store, "x", false)).unwrap();
    block_on(store.delete(&key)).unwrap();
    delete_snapshot(&bench, "vol", "s").unwrap();
    block_on(Published::create(&*store, m)).unwrap();
    let e = attach(&bench, "y").map(|_| ()).unwrap_err();
    assert!(e.kind() == ErrorKind::NotFound && e.to_string().contains("interrupted"), "{e}");
    block_on(admin::delete(&*store, "y", false)).unwrap();
    // Without a manifest a volume's clones still count.
    block_on(snapshots::create(&*store, "vol", "t", 1)).unwrap();
    clone(&bench, ("vol", "t"), "z", None).unwrap();
    block_on(store.delete("vol/manifest.json")).unwrap();
    let e = block_on(admin::delete(&*store, "vol", false)).unwrap_err();
    assert!(e.kind() == ErrorKind::Busy && e.to_string().contains('z'), "{e}");
}

#[test]
fn what_another_has_put_is_not_overwritten_for_bearing_ones_own_nonce() {
    let bench = Bench::new(SIZE);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 0, 1, 5).await);
    drain(host.volume());
    // As if its release had landed with the reply lost, and somebody else had made a snapshot since.
    let store = bench.store();
    block_on(async {
        let mut p = Published::load(&*store, "vol").await.unwrap();
        p.edit(&*store, true, |m| {
            m.writer = None;
            Ok(())
        })
        .await
        .unwrap();
        snapshots::create(&*store, "vol", "s", 1).await.unwrap();
    });
    let e = host.detach().unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Fenced, "{e}");
    assert_eq!(block_on(admin::info(&*store, "vol")).unwrap().snapshots.len(), 1);
}

/// How to rebuild a volume whose host has gone.
pub(crate) fn forced() -> Options {
    Options {
        force: true,
        accept_loss: false,
        dry_run: false,
        size_bytes: None,
        logical_block: None,
        writer: Writer { host: "here".to_owned(), pid: 1, since: 1 },
        nonce: Nonce::draw().unwrap(),
        now_unix: 2,
    }
}

#[test]
fn a_rebuilt_clone_keeps_what_it_began_with() {
    let bench = Bench::new(SIZE);
    let (mut model, mut rng) = (vec![0; SIZE], Rng(21));
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 200).await);
    host.detach().unwrap();
    let store = bench.store();
    block_on(snapshots::create(&*store, "vol", "s", 1)).unwrap();
    clone(&bench, ("vol", "s"), "c", None).unwrap();
    let again = |opts: &Options| block_on(rebuild(&*store, "c", opts, None, &mut |_| {}));
    // Before it has anything of its own.
    again(&forced()).unwrap();
    holds(&bench, "c", &model);
    let host = attach(&bench, "c").unwrap();
    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 100).await);
    host.detach().unwrap();
    again(&forced()).unwrap();
    holds(&bench, "c", &model);
    // Its own checkpoint is damaged: its chunks are laid over its parent's snapshot.
    for part in std::fs::read_dir(bench.dir.path().join("store/c/checkpoints")).unwrap() {
        std::fs::write(part.unwrap().path(), "garbage").unwrap();
    }
    again(&forced()).unwrap();
    holds(&bench, "c", &model);
    is_well(&bench, "c");
    // Without its manifest nobody knows; nor what a clone of a volume without one began with.
    for (name, words) in [("c", "is a clone of a snapshot of volume \"vol\""), ("vol", "\"c\" was cloned")] {
        block_on(store.delete(&format!("{name}/manifest.json"))).unwrap();
        let opts = Options { size_bytes: Some(SIZE as u64), ..forced() };
        let e = block_on(rebuild(&*store, name, &opts, None, &mut |_| {})).unwrap_err();
        assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains(words), "{e}");
    }
}
