//! Garbage collection: what is overwritten or discarded gives its space back, and nothing else does.

use std::time::{Duration, Instant};

use vb_ublk::error::ErrorKind;
use vb_ublk::gc::Policy;
use vb_ublk::units::Lba;
use vb_ublk::volume::Command;
use vb_ublk::volume::engine::Engine;
use vb_ublk::volume::host::{AttachOptions, Host};
use vb_ublk::volume::rebuild::{ManifestState, MapFrom, rebuild};

use super::snapshots::{attach, clone, forced, holds, is_well, snapshot};
use crate::support_rng::Rng;
use crate::volume_support::{Bench, block_on, churn, compare, drain, get, on_lane, pause, put};

const MIB: usize = 1 << 20;
const SIZE: usize = 32 * MIB;

/// As soon as there is any, and with nothing to spare.
pub(crate) fn eager() -> Policy {
    Policy { slack_blocks: 0, pause: Duration::from_millis(5), grace: Duration::ZERO, ..Policy::default() }
}

fn attach_eager(bench: &Bench) -> Host {
    Host::attach(AttachOptions { gc: eager(), ..bench.options() }).unwrap()
}

fn collect(host: &Host) {
    drain(host.volume());
    block_on(host.volume().command(Command::CollectGarbage)).unwrap();
}

/// Bytes of all chunks in the store.
fn stored(bench: &Bench) -> u64 {
    block_on(bench.store().list("vol/chunks/", None)).unwrap().iter().map(|o| o.size).sum()
}

fn objects(bench: &Bench, folder: &str) -> usize {
    block_on(bench.store().list(&format!("vol/{folder}/"), None)).unwrap().len()
}

#[test]
fn what_is_overwritten_gives_its_space_back() {
    let bench = Bench::new(SIZE);
    let (mut model, mut rng) = (vec![0; SIZE], Rng(3));
    let host = attach_eager(&bench);
    for round in 0..12 {
        on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 900).await);
        drain(host.volume());
        on_lane(host.volume(), async |e| compare(&e, &model, &format!("round {round}")).await);
    }
    collect(&host);
    on_lane(host.volume(), async |e| compare(&e, &model, "collected").await);
    let space = host.volume().status().background.space.unwrap();
    assert_eq!(space.stored_bytes, stored(&bench), "{space:?}");
    let live = space.live_bytes;
    // What is left would have cost 16 times as much to copy; and chunks have headers.
    assert!(live > 20 << 20 && space.stored_bytes < live + live / 16 + live / 64, "{space:?}");
    assert!(space.gc_deleted_objects > space.gc_deleted_chunks && space.gc_deleted_chunks > 10, "{space:?}");
    assert!(space.gc_deleted_objects > 20 && space.gc_read_bytes > 0 && space.gc_written_bytes > 0, "{space:?}");
    host.detach().unwrap();
    is_well(&bench, "vol");
    // The maps of old checkpoints have gone, too.
    assert!(objects(&bench, "checkpoints") < 12 && objects(&bench, "gc") <= 3, "{}", objects(&bench, "checkpoints"));
    bench.wipe_local();
    holds(&bench, "vol", &model);
}

#[test]
fn what_is_discarded_gives_its_space_back() {
    let bench = Bench::new(SIZE);
    let host = attach_eager(&bench);
    on_lane(host.volume(), async |e| {
        for i in 0..32 {
            put(&e, i * 256, 256, i as u8 + 1).await;
        }
    });
    drain(host.volume());
    assert!(stored(&bench) > SIZE as u64);
    on_lane(host.volume(), async |e| e.discard(Lba(0), SIZE as u64 / 512, false).await.unwrap());
    collect(&host);
    // The discard itself is remembered.
    assert!(stored(&bench) <= 64 << 10, "{}", stored(&bench));
    host.detach().unwrap();
    bench.wipe_local();
    holds(&bench, "vol", &vec![0; SIZE]);
}

#[test]
fn a_snapshot_keeps_what_it_has_until_it_is_deleted() {
    let bench = Bench::new(SIZE);
    let (mut model, mut rng) = (vec![0; SIZE], Rng(5));
    let host = attach_eager(&bench);
    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 1500).await);
    snapshot(host.volume(), "s").unwrap();
    let kept = model.clone();
    for _ in 0..6 {
        on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 900).await);
        drain(host.volume());
    }
    collect(&host);
    let with = host.volume().status().background.space.unwrap();
    assert!(with.snapshot_bytes > 8 << 20, "{with:?}");
    holds(&bench, "vol@s", &kept);
    clone(&bench, ("vol", "s"), "copy", None).unwrap();
    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 900).await);
    collect(&host);
    holds(&bench, "copy", &kept);
    // What the clone writes and collects is its own.
    let copy = Host::attach(AttachOptions {
        volume: "copy".into(),
        log_path: bench.dir.path().join("wal/copy.wal"),
        gc: eager(),
        ..bench.options()
    })
    .unwrap();
    let mut other = kept.clone();
    on_lane(copy.volume(), async |e| churn(&e, &mut other, &mut rng, 600).await);
    collect(&copy);
    let space = copy.volume().status().background.space.unwrap();
    assert_eq!(space.mapped_bytes, space.live_bytes + space.shared_bytes, "{space:?}");
    assert!(space.shared_bytes > 0 && space.live_bytes > 0 && space.logical_bytes == SIZE as u64, "{space:?}");
    assert!(space.gc_requests >= space.gc_deleted_objects && space.gc_requests > 0, "{space:?}");
    copy.detach().unwrap();
    holds(&bench, "copy", &other);
    holds(&bench, "vol@s", &kept);
    block_on(vb_ublk::volume::admin::delete(&*bench.store(), "copy", false)).unwrap();
    block_on(host.volume().command(|reply| Command::DeleteSnapshot { name: "s".into(), reply })).unwrap();
    collect(&host);
    let without = host.volume().status().background.space.unwrap();
    assert!(without.snapshot_bytes == 0 && without.stored_bytes < with.stored_bytes, "{with:?} {without:?}");
    assert!(without.stored_bytes < without.live_bytes + without.live_bytes / 16, "{without:?}");
    on_lane(host.volume(), async |e| compare(&e, &model, "after all").await);
    host.detach().unwrap();
    bench.wipe_local();
    holds(&bench, "vol", &model);
}

#[test]
fn readers_and_writers_see_nothing_of_it() {
    let bench = Bench::new(SIZE);
    let (mut model, mut rng) = (vec![0; SIZE], Rng(9));
    let host = attach_eager(&bench);
    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 2000).await);
    drain(host.volume());
    // A quarter is only read from now on, by others.
    let quiet = model[..SIZE / 4].to_vec();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let (volume, quiet, stop) = (host.volume().clone(), quiet.clone(), stop.clone());
            std::thread::spawn(move || {
                let mut rounds = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    on_lane(&volume, async |e| compare(&e, &quiet, "meanwhile").await);
                    rounds += 1;
                }
                rounds
            })
        })
        .collect();
    for n in 0..20u64 {
        on_lane(host.volume(), async |e| {
            for _ in 0..60 {
                let block = (SIZE / 4 / 4096) as u64 + rng.below((SIZE / 4 * 3 / 4096 - 32) as u64);
                put(&e, block, 32, n as u8).await;
                let at = block as usize * 4096;
                model[at..at + 32 * 4096].fill(n as u8);
            }
        });
        drain(host.volume());
    }
    collect(&host);
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let rounds: Vec<u32> = readers.into_iter().map(|r| r.join().unwrap()).collect();
    assert!(rounds.iter().all(|r| *r > 0), "{rounds:?}");
    let space = host.volume().status().background.space.unwrap();
    assert!(space.gc_deleted_objects > 10 && space.gc_written_bytes > 0, "{space:?}");
    on_lane(host.volume(), async |e| compare(&e, &model, "collected").await);
    host.abandon().unwrap();
    // And after the death of its process.
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| compare(&e, &model, "after a death").await);
    host.detach().unwrap();
}

/// Blocks 0 to 63 hold 7, from an attachment before; 64 to 127 hold 8, from this one. All is in the store.
fn second_attachment(bench: &Bench, gc: Policy) -> Host {
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 0, 64, 7).await);
    host.detach().unwrap();
    let host = Host::attach(AttachOptions { gc, ..bench.options() }).unwrap();
    on_lane(host.volume(), async |e| put(&e, 64, 64, 8).await);
    drain(host.volume());
    host
}

/// What comes late while a volume is attached for long, is found by a later list; it is kept until its grace is over, and then deleted, with
/// nobody asking.
#[test]
fn what_comes_late_is_found_and_has_its_grace() {
    const GRACE: Duration = Duration::from_secs(2);
    let bench = Bench::new(SIZE);
    let host = second_attachment(&bench, Policy { grace: GRACE, relist: Duration::from_millis(1500), ..eager() });
    let store = bench.store();
    let keys = block_on(store.list("vol/chunks/", None)).unwrap();
    let body = block_on(store.get(&keys[0].key)).unwrap().0;
    // Long past the list that an attachment begins with.
    collect(&host);
    let (number, oldest) = keys[0].key.rsplit('/').next().unwrap().split_once('-').unwrap();
    let late = format!("vol/chunks/{:016x}-{oldest}", u64::from_str_radix(number, 16).unwrap() + 2);
    block_on(store.put(&late, body)).unwrap();
    let came = Instant::now();
    while block_on(store.get(&late)).is_ok() {
        assert!(came.elapsed() < 10 * GRACE, "{late} is still there");
        pause(Duration::from_millis(50));
    }
    assert!(came.elapsed() >= GRACE, "deleted after {:?}", came.elapsed());
    on_lane(host.volume(), async |e| assert_eq!((get(&e, 10).await, get(&e, 70).await), (Ok(7), Ok(8))));
    host.detach().unwrap();
    is_well(&bench, "vol");
}

/// Nobody waits an hour for what was ordered, nor for the next attachment.
#[test]
fn an_order_sweeps_what_counts_for_nothing_at_once() {
    let bench = Bench::new(SIZE);
    let host = second_attachment(&bench, Policy { grace: Policy::default().grace, ..eager() });
    let store = bench.store();
    let keys = block_on(store.list("vol/chunks/", None)).unwrap();
    let body = block_on(store.get(&keys[0].key)).unwrap().0;
    let (first, oldest) = keys[0].key.split_once("-").unwrap();
    let chunks =
        || -> Vec<String> { block_on(store.list("vol/chunks/", None)).unwrap().into_iter().map(|o| o.key).collect() };
    let first = first.rsplit('/').next().unwrap();
    for number in 2..5 {
        let late = format!("vol/chunks/{:016x}-{oldest}", u64::from_str_radix(first, 16).unwrap() + number);
        block_on(store.put(&late, body.clone())).unwrap();
        // Rounds of its own that are not ordered leave it alone.
        on_lane(host.volume(), async |e| {
            for i in 0..8 {
                put(&e, 64, 64, number as u8 * 8 + i).await;
            }
        });
        drain(host.volume());
        pause(Duration::from_millis(300));
        assert!(chunks().contains(&late));
        collect(&host);
        assert!(!chunks().contains(&late), "{:?}", chunks());
        on_lane(host.volume(), async |e| assert_eq!(get(&e, 10).await, Ok(7)));
    }
    host.detach().unwrap();
    is_well(&bench, "vol");
}

/// What hosts have uploaded that lost the volume, or died before it counted.
#[test]
fn what_counts_for_nothing_is_swept() {
    let bench = Bench::new(SIZE);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 0, 64, 7).await);
    host.detach().unwrap();
    let host = attach(&bench, "vol").unwrap();
    on_lane(host.volume(), async |e| put(&e, 64, 64, 8).await);
    drain(host.volume());
    let store = bench.store();
    let keys = block_on(store.list("vol/chunks/", None)).unwrap();
    let newest = keys.last().unwrap().key.clone();
    let body = block_on(store.get(&newest)).unwrap().0;
    // Under the first attachment's name, and a number that the second owns.
    let number = newest.split_once("chunks/").unwrap().1.split('-').next().unwrap().to_owned();
    let oldest = keys[0].key.split_once('-').unwrap().1.to_owned();
    let late = format!("vol/chunks/{number}-{oldest}");
    block_on(store.put(&late, body.clone())).unwrap();
    // Of an attachment that is yet to come: not ours to touch.
    let future = newest.replace("-00000002-", "-00000009-");
    assert_ne!(future, newest);
    block_on(store.put(&future, body)).unwrap();
    host.detach().unwrap();
    let host = attach_eager(&bench);
    collect(&host);
    let left: Vec<String> = block_on(store.list("vol/chunks/", None)).unwrap().into_iter().map(|o| o.key).collect();
    assert!(!left.contains(&late) && left.contains(&future), "{left:?}");
    host.detach().unwrap();
    block_on(store.delete(&future)).unwrap();
    is_well(&bench, "vol");
}

#[test]
fn a_chunk_that_cannot_be_read_stays_and_the_rest_goes_on() {
    let bench = Bench::new(SIZE);
    let (mut model, mut rng) = (vec![0; SIZE], Rng(11));
    let host = attach_eager(&bench);
    on_lane(host.volume(), async |e| {
        for i in 0..8 {
            put(&e, i * 1016, 1016, i as u8 + 1).await;
            model[i as usize * 1016 * 4096..(i as usize + 1) * 1016 * 4096].fill(i as u8 + 1);
            drain(&host.volume().clone());
        }
    });
    host.detach().unwrap();
    let store = bench.store();
    let first = block_on(store.list("vol/chunks/", None)).unwrap()[0].key.clone();
    let mut body = block_on(store.get(&first)).unwrap().0.to_vec();
    let at = body.len() - 1;
    body[at] ^= 1;
    block_on(store.put(&first, body.into())).unwrap();
    let host = attach_eager(&bench);
    for i in 0..8u64 {
        on_lane(host.volume(), async |e| {
            for j in 0..200 {
                put(&e, i * 1016 + j * 4, 2, 0x77).await;
                let at = (i * 1016 + j * 4) as usize * 4096;
                model[at..at + 8192].fill(0x77);
            }
        });
    }
    let _ = rng.next();
    collect(&host);
    let left: Vec<String> = block_on(store.list("vol/chunks/", None)).unwrap().into_iter().map(|o| o.key).collect();
    assert!(left.contains(&first), "{left:?}");
    let good = 1015 * 4096;
    on_lane(host.volume(), async |e| compare(&e, &model[..good], "before the damage").await);
    host.detach().unwrap();
}

/// Its objects, to be put back.
fn objects_of(bench: &Bench) -> std::path::PathBuf {
    bench.dir.path().join("store/vol")
}

pub(crate) fn spoil(folder: &std::path::Path) {
    for part in std::fs::read_dir(folder).unwrap() {
        std::fs::write(part.unwrap().path(), "garbage").unwrap();
    }
}

/// In the place of what is there.
pub(crate) fn copy_folder(from: &std::path::Path, to: &std::path::Path) {
    let _ = std::fs::remove_dir_all(to);
    assert!(std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap().success());
}

/// What is lost, how, and what a rebuild says of manifest and map.
type Way = (&'static str, fn(&std::path::Path), ManifestState, MapFrom);

#[test]
fn a_volume_that_was_collected_can_be_rebuilt() {
    let bench = Bench::new(SIZE);
    let (mut model, mut rng) = (vec![0; SIZE], Rng(13));
    for _ in 0..3 {
        let host = attach_eager(&bench);
        for _ in 0..3 {
            on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 700).await);
            drain(host.volume());
        }
        collect(&host);
        on_lane(host.volume(), async |e| {
            e.discard(Lba(800), 9000, false).await.unwrap();
            model[800 * 512..9800 * 512].fill(0);
            put(&e, 1000, 3, 9).await;
            model[1000 * 4096..1003 * 4096].fill(9);
        });
        host.detach().unwrap();
    }
    // A few groups behind the last collection.
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 300).await);
    host.detach().unwrap();
    bench.wipe_local();
    let (store, folder) = (bench.store(), objects_of(&bench));
    let kept = bench.dir.path().join("kept");
    copy_folder(&folder, &kept);
    let ways: [Way; 5] = [
        ("nothing", |_| {}, ManifestState::Good, MapFrom::Checkpoint),
        (
            "the manifest",
            |f| std::fs::remove_file(f.join("manifest.json")).unwrap(),
            ManifestState::Missing,
            MapFrom::Copy,
        ),
        (
            "a damaged manifest",
            |f| std::fs::write(f.join("manifest.json"), "{").unwrap(),
            ManifestState::Damaged,
            MapFrom::Copy,
        ),
        ("all maps", |f| spoil(&f.join("checkpoints")), ManifestState::Good, MapFrom::Chunks),
        (
            "manifest and maps",
            |f| {
                spoil(&f.join("checkpoints"));
                std::fs::remove_file(f.join("manifest.json")).unwrap();
            },
            ManifestState::Missing,
            MapFrom::Chunks,
        ),
    ];
    for (what, lose, state, from) in ways {
        copy_folder(&kept, &folder);
        lose(&folder);
        let report =
            block_on(rebuild(&*store, "vol", &forced(), None, &mut |_| {})).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!((report.manifest, report.map_from), (state, from), "{what}: {report:#?}");
        holds(&bench, "vol", &model);
        is_well(&bench, "vol");
        // It goes on, and collects.
        let host = attach_eager(&bench);
        on_lane(host.volume(), async |e| compare(&e, &model, what).await);
        let mut after = model.clone();
        on_lane(host.volume(), async |e| churn(&e, &mut after, &mut rng, 600).await);
        collect(&host);
        on_lane(host.volume(), async |e| compare(&e, &after, what).await);
        host.detach().unwrap();
        bench.wipe_local();
        holds(&bench, "vol", &after);
        bench.wipe_local();
    }
    // A chunk that is needed is damaged as well: nothing is made up.
    copy_folder(&kept, &folder);
    spoil(&folder.join("checkpoints"));
    let first = block_on(store.list("vol/chunks/", None)).unwrap()[0].key.clone();
    block_on(store.put(&first, bytes::Bytes::from_static(b"garbage"))).unwrap();
    let e = block_on(rebuild(&*store, "vol", &forced(), None, &mut |_| {})).unwrap_err();
    assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains("left behind cannot be used"), "{e}");
}

/// A discard is recorded in a chunk that goes, and what it discarded is still in one that stays.
#[test]
fn a_discard_outlives_the_chunk_that_records_it() {
    let bench = Bench::new(SIZE);
    let mut model = vec![0; SIZE];
    let host = attach_eager(&bench);
    let mut fill = |from: usize, blocks: usize, byte: u8| {
        on_lane(host.volume(), async |e| put(&e, from as u64, blocks, byte).await);
        model[from * 4096..(from + blocks) * 4096].fill(byte);
    };
    fill(0, 1016, 1);
    drain(host.volume());
    on_lane(host.volume(), async |e| e.discard(Lba(0), 20 * 8, false).await.unwrap());
    fill(2000, 900, 2);
    drain(host.volume());
    fill(2000, 900, 3);
    model[..20 * 4096].fill(0);
    collect(&host);
    let told = host.volume().status().background.space.unwrap();
    assert!(told.gc_deleted_objects > 0 && told.gc_written_bytes > 0, "{told:?}");
    host.detach().unwrap();
    bench.wipe_local();
    let folder = objects_of(&bench);
    spoil(&folder.join("checkpoints"));
    std::fs::remove_file(folder.join("manifest.json")).unwrap();
    let report = block_on(rebuild(&*bench.store(), "vol", &forced(), None, &mut |_| {})).unwrap();
    assert_eq!(report.map_from, MapFrom::Chunks);
    holds(&bench, "vol", &model);
}
