//! The local cache: what was read once is read here, and nothing that happens to the file can change what is read.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::sync::{mpsc, oneshot};
use vb_ublk::cache::fetch::Fetcher;
use vb_ublk::cache::slot::SLOT_BYTES;
use vb_ublk::cache::{CacheStatus, MIN_BYTES, Place};
use vb_ublk::chunk::reader::{ChunkReader, Keys};
use vb_ublk::disk::IoBuf;
use vb_ublk::disk::uring::UringDisk;
use vb_ublk::error::ErrorKind;
use vb_ublk::manifest::Published;
use vb_ublk::map::Location;
use vb_ublk::store::fault::{Fault, FaultStore};
use vb_ublk::units::{BLOCK, BlockNo, ChunkNo, Lba, SECTOR};
use vb_ublk::volume::engine::Engine;
use vb_ublk::volume::host::{AttachOptions, Host};
use vb_ublk::volume::reads::serve_reads;
use vb_ublk::volume::{Command, ReadRequest, Waiting};

use super::support_rng::Rng;
use super::volume_support::{Bench, TestLane, block_on, churn, compare, drain, on_lane, pause, put};

const MIB: usize = 1 << 20;

pub(crate) fn file_of(bench: &Bench) -> PathBuf {
    bench.dir.path().join("cache/vol.cache")
}

fn options(bench: &Bench) -> AttachOptions {
    AttachOptions { cache: Some(Place { path: file_of(bench), bytes: MIN_BYTES }), ..bench.options() }
}

pub(crate) fn attach(bench: &Bench) -> Host {
    Host::attach(options(bench)).unwrap()
}

pub(crate) fn cache_of(host: &Host) -> CacheStatus {
    host.volume().status().cache.expect("a cache")
}

/// Bytes of chunks read from the store so far.
fn fetched(host: &Host) -> u64 {
    host.volume().status().store_requests.get_range.bytes_in
}

/// Waits until what the cache held before is found again.
fn until_restored(host: &Host, pages: u64) {
    for _ in 0..200 {
        if cache_of(host).used_bytes >= pages * (64 << 10) {
            return;
        }
        pause(Duration::from_millis(20));
    }
    panic!("{:?} after 4 s", cache_of(host));
}

/// Waits until nothing is being written to the cache any more.
pub(crate) fn until_written(host: &Host) {
    let (mut before, mut quiet, begun) = (u64::MAX, 0, Instant::now());
    while quiet < 4 {
        assert!(begun.elapsed() < Duration::from_secs(120), "{:?} after two minutes", cache_of(host));
        pause(Duration::from_millis(75));
        let now = cache_of(host);
        quiet = if now.written_bytes == before && now.held_bytes == 0 { quiet + 1 } else { 0 };
        before = now.written_bytes;
    }
}

/// The same volume, with nothing of it here: what was just packed is in the cache.
fn cold(bench: &Bench, host: Host) -> Host {
    host.detach().unwrap();
    std::fs::remove_file(file_of(bench)).unwrap();
    attach(bench)
}

pub(crate) async fn read(e: &TestLane, block: u64, blocks: usize) -> Vec<u8> {
    let b = IoBuf::zeroed(blocks * BLOCK);
    e.read(Lba(block * 8), b.clone()).await.unwrap();
    b.bytes().to_vec()
}

#[test]
fn what_was_read_once_is_read_here_also_by_the_next_process() {
    let bench = Bench::new(16 * MIB);
    let mut model = vec![0; 16 * MIB];
    let host = attach(&bench);
    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut Rng(1), 800).await);
    let host = cold(&bench, host);
    on_lane(host.volume(), async |e| compare(&e, &model, "from the store").await);
    until_written(&host);
    let (once, before) = (fetched(&host), cache_of(&host));
    assert!(once > 4 << 20 && before.misses > 0 && before.used_bytes > 4 << 20, "{once} {before:?}");
    on_lane(host.volume(), async |e| compare(&e, &model, "from the cache").await);
    let after = cache_of(&host);
    assert_eq!(fetched(&host), once, "nothing was fetched twice: {after:?}");
    assert_eq!((after.misses, after.damaged, after.failed_writes), (before.misses, 0, 0));
    assert!(after.hit_bytes >= before.hit_bytes + 8 * MIB as u64, "{before:?} {after:?}");
    host.detach().unwrap();

    let host = attach(&bench);
    until_restored(&host, after.used_bytes >> 16);
    let before = fetched(&host);
    on_lane(host.volume(), async |e| compare(&e, &model, "from the cache of the process before").await);
    assert_eq!(fetched(&host), before, "{:?}", cache_of(&host));
    host.detach().unwrap();
}

/// What is done to the file.
type Spoil = fn(&File);

/// Each way that a file can be wrong, and what is read is right.
#[test]
fn a_file_that_is_damaged_cut_or_anothers_costs_reads_alone() {
    let bench = Bench::new(8 * MIB);
    let mut model = vec![0; 8 * MIB];
    let host = attach(&bench);
    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut Rng(2), 400).await);
    cold(&bench, host).detach().unwrap();
    let fill = |host: &Host| {
        on_lane(host.volume(), async |e| compare(&e, &model, "filling").await);
        until_written(host);
    };
    let wrong: [(&str, Spoil); 6] = [
        ("each data block has a flipped bit", |f| {
            for at in (0..f.metadata().unwrap().len()).step_by(BLOCK).filter(|at| at % SLOT_BYTES != 0) {
                flip(f, at + 77);
            }
        }),
        ("each header has a flipped bit", |f| {
            (0..f.metadata().unwrap().len()).step_by(SLOT_BYTES as usize).for_each(|at| flip(f, at + 9));
        }),
        ("each slot is another's", |f| {
            let slots = f.metadata().unwrap().len() / SLOT_BYTES;
            let mut all: Vec<Vec<u8>> = (0..slots).map(|n| at(f, n * SLOT_BYTES, SLOT_BYTES as usize)).collect();
            all.rotate_left(1);
            for (n, bytes) in (0..).zip(&all) {
                f.write_all_at(bytes, n * SLOT_BYTES).unwrap();
            }
        }),
        ("each header is another's", |f| {
            let slots = f.metadata().unwrap().len() / SLOT_BYTES;
            let mut all: Vec<Vec<u8>> = (0..slots).map(|n| at(f, n * SLOT_BYTES, BLOCK)).collect();
            all.rotate_left(1);
            for (n, bytes) in (0..).zip(&all) {
                f.write_all_at(bytes, n * SLOT_BYTES).unwrap();
            }
        }),
        ("it is cut inside a slot", |f| f.set_len(3 * SLOT_BYTES + 9000).unwrap()),
        ("it is noise", |f| {
            let mut rng = Rng(3);
            let noise: Vec<u8> = (0..f.metadata().unwrap().len() / 8).flat_map(|_| rng.next().to_le_bytes()).collect();
            f.write_all_at(&noise, 0).unwrap();
        }),
    ];
    for (what, spoil) in wrong {
        // Slots that are free still hold what the way before has done to them.
        std::fs::remove_file(file_of(&bench)).unwrap();
        let host = attach(&bench);
        fill(&host);
        host.detach().unwrap();
        spoil(&OpenOptions::new().read(true).write(true).open(file_of(&bench)).unwrap());
        let host = attach(&bench);
        pause(Duration::from_millis(300));
        on_lane(host.volume(), async |e| compare(&e, &model, what).await);
        let seen = cache_of(&host);
        assert_eq!(seen.damaged > 0, what.contains("data") || what == "each header is another's", "{what}: {seen:?}");
        host.detach().unwrap();
    }
}

fn at(f: &File, from: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    f.read_exact_at(&mut bytes, from).unwrap();
    bytes
}

fn flip(f: &File, byte: u64) {
    let mut b = at(f, byte, 1);
    b[0] ^= 8;
    f.write_all_at(&b, byte).unwrap();
}

/// Rot while the volume is in use, under reads of all kinds.
#[test]
fn what_rots_in_the_file_meanwhile_is_read_from_the_store() {
    let bench = Bench::new(4 * MIB);
    let mut model = vec![0; 4 * MIB];
    let host = attach(&bench);
    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut Rng(4), 300).await);
    drain(host.volume());
    on_lane(host.volume(), async |e| compare(&e, &model, "filling").await);
    until_written(&host);
    let file = OpenOptions::new().read(true).write(true).open(file_of(&bench)).unwrap();
    for slot in 0..file.metadata().unwrap().len() / SLOT_BYTES {
        flip(&file, slot * SLOT_BYTES + 5 * BLOCK as u64 + 100);
    }
    on_lane(host.volume(), async |e| compare(&e, &model, "after the rot").await);
    assert!(cache_of(&host).damaged > 0, "{:?}", cache_of(&host));
    on_lane(host.volume(), async |e| compare(&e, &model, "once more").await);
    host.detach().unwrap();
}

/// A volume whose mebibyte n holds n + 1, in the store.
pub(crate) fn filled(size: usize) -> (Bench, Host) {
    let bench = Bench::new(size);
    let host = attach(&bench);
    on_lane(host.volume(), async |e| {
        for mib in 0..size / MIB {
            put(&e, (mib * 256) as u64, 256, mib as u8 + 1).await;
        }
    });
    let host = cold(&bench, host);
    (bench, host)
}

#[test]
fn all_who_wait_for_a_page_share_one_request() {
    let bench = Bench::new(4 * MIB);
    let host = attach(&bench);
    on_lane(host.volume(), async |e| put(&e, 0, 256, 7).await);
    let host = cold(&bench, host);
    let gets = |host: &Host| host.volume().status().store_requests.get_range.requests;
    on_lane(host.volume(), async |e| drop(read(&e, 200, 1).await));
    let before = gets(&host);
    on_lane(host.volume(), async |e| {
        // Backwards: no stream.
        let all = (0..32).map(|n| read(&e, 47 - n / 2, 1));
        assert!(join_all(all).await.concat().iter().all(|b| *b == 7));
    });
    assert_eq!(gets(&host) - before, 1, "the chunk's header was known");
    host.detach().unwrap();
}

/// Overwrites, discards, garbage collection, processes that die, and a file that rots or vanishes, in any order.
#[test]
fn a_long_life_with_a_cache() {
    for seed in 0..4 {
        let bench = Bench::new(12 * MIB);
        let mut rng = Rng(seed + 50);
        let mut model = vec![0; 12 * MIB];
        let mut host = attach(&bench);
        for round in 0..12 {
            on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 120).await);
            match rng.below(6) {
                0 => {
                    host.abandon().unwrap();
                    host = attach(&bench);
                }
                1 => {
                    host.detach().unwrap();
                    if rng.below(2) == 0 {
                        std::fs::remove_file(file_of(&bench)).unwrap();
                    }
                    host = attach(&bench);
                }
                2 => block_on(host.volume().command(Command::CollectGarbage)).unwrap(),
                3 => {
                    let file = OpenOptions::new().read(true).write(true).open(file_of(&bench)).unwrap();
                    let len = file.metadata().unwrap().len();
                    (0..200).for_each(|_| flip(&file, rng.below(len)));
                }
                _ => drain(host.volume()),
            }
            on_lane(host.volume(), async |e| compare(&e, &model, &format!("seed {seed}, round {round}")).await);
        }
        host.detach().unwrap();
    }
}

/// A clone finds in its own cache what it has read of its parent's chunks, also after both have been written to.
#[test]
fn a_clone_has_a_cache_of_its_own() {
    let bench = Bench::new(4 * MIB);
    let host = attach(&bench);
    on_lane(host.volume(), async |e| put(&e, 0, 512, 1).await);
    let snapshot = |reply| Command::Snapshot { name: "s".into(), created: 1, reply };
    block_on(host.volume().command(snapshot)).unwrap();
    on_lane(host.volume(), async |e| put(&e, 0, 64, 2).await);
    host.detach().unwrap();
    super::snapshots::clone(&bench, ("vol", "s"), "copy", None).unwrap();
    let of_copy = || AttachOptions {
        volume: "copy".into(),
        log_path: bench.dir.path().join("wal/copy.wal"),
        cache: Some(Place { path: bench.dir.path().join("cache/copy.cache"), bytes: MIN_BYTES }),
        ..bench.options()
    };
    let want = |block: u64| if (100..164).contains(&block) { 3 } else { 1 };
    for life in 0..3 {
        let host = Host::attach(of_copy()).unwrap();
        if life == 1 {
            until_restored(&host, 8);
        }
        let before = fetched(&host);
        on_lane(host.volume(), async |e| {
            if life == 0 {
                put(&e, 100, 64, 3).await;
                drain(host.volume());
            }
            for block in 0..512 {
                assert!(read(&e, block, 1).await.iter().all(|b| *b == want(block)), "block {block} in life {life}");
            }
        });
        if life == 1 {
            assert_eq!(fetched(&host), before, "{:?}", cache_of(&host));
        }
        until_written(&host);
        host.detach().unwrap();
    }
}

#[test]
fn a_volume_is_served_without_a_cache_that_cannot_be() {
    let bench = Bench::new(MIB);
    let place = Place { path: file_of(&bench), bytes: MIN_BYTES - 1 };
    let e = Host::attach(AttachOptions { cache: Some(place), ..bench.options() }).unwrap_err();
    assert!(e.kind() == ErrorKind::Usage && e.to_string().contains("--cache-size"), "{e}");
    let missing = AttachOptions { volume: "other".into(), ..options(&bench) };
    assert_eq!(Host::attach(missing).unwrap_err().kind(), ErrorKind::NotFound);
    assert!(!file_of(&bench).exists(), "a refusal leaves nothing behind");
    // A folder, a place where no folder can be made, and a file that another process has.
    let taken = bench.dir.path().join("taken.cache");
    let _other = vb_ublk::disk::file::DataFile::open(&taken, true).unwrap();
    for (n, path) in (1..).zip([bench.dir.path().to_owned(), "/proc/nothing/v.cache".into(), taken]) {
        for resume in [false, true] {
            let cache = Some(Place { path: path.clone(), bytes: MIN_BYTES });
            let host = Host::attach(AttachOptions { cache, resume, ..bench.options() }).unwrap();
            assert_eq!(host.volume().status().cache, None, "{}", path.display());
            on_lane(host.volume(), async |e| put(&e, n, 1, 9).await);
            host.abandon().unwrap();
        }
    }
    let host = attach(&bench);
    on_lane(host.volume(), async |e| assert_eq!(read(&e, 1, 3).await, vec![9; 3 * BLOCK]));
    assert_eq!(host.volume().sectors(), (MIB / SECTOR) as u64);
    host.detach().unwrap();
}

/// Smaller and larger from one attachment to the next.
#[test]
fn a_cache_changes_its_size_between_attachments() {
    let bench = Bench::new(60 * MIB);
    let model: Vec<u8> = (0..60 * MIB).map(|i| (i >> 20) as u8 + 1).collect();
    for (n, bytes) in [2 * MIN_BYTES, MIN_BYTES, 3 * MIN_BYTES, MIN_BYTES + 5].into_iter().enumerate() {
        let cache = Some(Place { path: file_of(&bench), bytes });
        let host = Host::attach(AttachOptions { cache, ..bench.options() }).unwrap();
        on_lane(host.volume(), async |e| {
            if n == 0 {
                for mib in 0..60 {
                    put(&e, mib * 256, 256, mib as u8 + 1).await;
                }
                drain(host.volume());
            } else {
                until_restored(&host, 100);
            }
            compare(&e, &model, &format!("with {bytes} bytes")).await;
        });
        until_written(&host);
        let seen = cache_of(&host);
        assert!(seen.size_bytes <= bytes && seen.used_bytes <= seen.size_bytes, "{seen:?}");
        host.detach().unwrap();
    }
}

/// Ended while it is being filled, and while it is being taken up again.
#[test]
fn a_cache_is_left_at_any_moment() {
    let bench = Bench::new(8 * MIB);
    let mut model = vec![0; 8 * MIB];
    for n in 0..12 {
        let host = attach(&bench);
        on_lane(host.volume(), async |e| {
            if n == 0 {
                churn(&e, &mut model, &mut Rng(60), 300).await;
                drain(host.volume());
            }
            read(&e, n * 100, 64).await;
        });
        if n % 2 == 0 { host.detach().unwrap() } else { host.abandon().unwrap() }
    }
    let host = attach(&bench);
    on_lane(host.volume(), async |e| compare(&e, &model, "in the end").await);
    host.detach().unwrap();
}

/// A chunk for which the store never answers, and readers who give up on it, time after time: those of other chunks are served.
#[test]
fn who_has_given_up_is_in_nobodys_way() {
    let bench = Bench::new(16 * MIB);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| {
        for at in 0..8 {
            put(&e, at * 254, 254, at as u8 + 1).await;
        }
    });
    host.detach().unwrap();
    let store = bench.store();
    block_on(async {
        let m = Published::load(&*store, "vol").await.unwrap().manifest;
        let silent = store.list("vol/chunks/", None).await.unwrap()[0].key.clone();
        let never = Duration::from_secs(3600);
        let faulty =
            FaultStore::new(store, move |call| if call.key == silent { Fault::Delay(never) } else { Fault::None });
        let keys = Arc::new(Keys::default());
        keys.set(&m);
        let fetcher = Fetcher::<UringDisk>::new(ChunkReader::new(Arc::new(faulty), keys), None);
        let (requests, served) = mpsc::channel(2000);
        let ask = |chunk: u64, index: u16, block: u64| {
            let (reply, answer) = oneshot::channel();
            let waiting = Some(Waiting { first: BlockNo(block), reply });
            let request = ReadRequest::Blocks { at: Location::new(0, ChunkNo(chunk), index), blocks: 1, waiting };
            requests.try_send(request).expect("room");
            answer
        };
        let asking = async {
            for _ in 0..3 {
                let given_up: Vec<_> = (0..100).map(|i| ask(1, i, u64::from(i))).collect();
                tokio::time::sleep(Duration::from_millis(50)).await;
                drop(given_up);
            }
            let answer = tokio::time::timeout(Duration::from_secs(10), ask(2, 3, 1019)).await;
            let blocks = answer.expect("it waits for those who do not").unwrap().unwrap();
            assert_eq!(blocks.data[0], 5);
        };
        let serving = std::pin::pin!(serve_reads(served, &fetcher, std::future::pending()));
        futures_util::future::select(serving, std::pin::pin!(asking)).await;
    });
}
