//! The volume when things go wrong: lost hosts, damaged and missing objects, rot in the log, a store that fails.

mod damage;
#[path = "../damage_support/mod.rs"]
mod damage_support;
mod prefix;
#[path = "../support_rng/mod.rs"]
mod support_rng;
#[path = "../volume_support/mod.rs"]
mod volume_support;

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use damage_support::{a_group_of_three, objects};
use prefix::{Stamps, stamps};
use support_rng::Rng;
use vb_ublk::error::{Error, ErrorKind, Result};
use vb_ublk::gc::Policy;
use vb_ublk::manifest::{Manifest, Published};
use vb_ublk::store::fault::{Fault, FaultStore};
use vb_ublk::store::memory::MemoryStore;
use vb_ublk::store::{Op, StoreUrl};
use vb_ublk::units::{Lba, Nonce, SECTOR};
use vb_ublk::volume::Command;
use vb_ublk::volume::admin::{self, CreateOptions};
use vb_ublk::volume::engine::Engine;
use vb_ublk::volume::host::{AttachOptions, Host};
use volume_support::{Bench, block_on, buf_of, churn, compare, drain, get, on_lane, put};

fn force(bench: &Bench) -> Result<Host> {
    Host::attach(AttachOptions { force: true, ..bench.options() })
}

fn manifest(bench: &Bench) -> Manifest {
    Manifest::decode(&fs::read(bench.dir.path().join("store/vol/manifest.json")).unwrap()).unwrap()
}

/// A refusal that a person can read: of this kind, on one line, naming what is damaged.
fn refused(result: Result<Host>, kind: ErrorKind, names: &str) {
    let e: Error = result.map(|_| ()).unwrap_err();
    let text = e.to_string();
    assert_eq!(e.kind(), kind, "{text}");
    assert!(!text.contains('\n') && text.contains(names), "{text:?} should name {names}");
}

#[test]
fn an_incomplete_last_group_does_not_count() {
    for from_the_end in 1..=3 {
        incomplete_group(from_the_end);
    }
}

fn incomplete_group(from_the_end: usize) {
    let bench = a_group_of_three();
    bench.wipe_local();
    let chunks = objects(&bench, "chunks");
    assert!(chunks.len() >= 4, "{chunks:?}");
    fs::remove_file(&chunks[chunks.len() - from_the_end]).unwrap();
    let host = force(&bench).unwrap();
    on_lane(host.volume(), async |e| {
        for block in (0..2560).step_by(50) {
            assert_eq!(get(&e, block).await, Ok(u8::from(block < 100)), "block {block}");
        }
        put(&e, 5, 1, 3).await;
    });
    host.detach().unwrap();
    bench.wipe_local();
    // What is left of the old group stays without effect, under numbers that are another epoch's now.
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| {
        assert_eq!((get(&e, 5).await, get(&e, 6).await, get(&e, 2000).await), (Ok(3), Ok(1), Ok(0)));
    });
    host.detach().unwrap();
}

#[test]
fn the_log_knows_when_the_store_has_lost_a_group() {
    let bench = Bench::new(1 << 20);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 0, 10, 1).await);
    drain(host.volume());
    // The packed mark follows the upload.
    volume_support::pause(Duration::from_millis(100));
    host.abandon().unwrap();
    let chunk = objects(&bench, "chunks")[0].clone();
    let good = fs::read(&chunk).unwrap();
    fs::remove_file(&chunk).unwrap();
    refused(bench.attach(), ErrorKind::Corrupt, "objects are missing");
    fs::write(&chunk, good).unwrap();
    bench.attach().unwrap().detach().unwrap();
}

#[test]
fn what_a_fenced_host_still_uploads_never_shows() {
    let bench = Bench::new(1 << 20);
    let old = bench.attach().unwrap();
    on_lane(old.volume(), async |e| put(&e, 0, 4, 1).await);
    block_on(old.volume().command(Command::Upload)).unwrap();
    let other = |n: u32| AttachOptions {
        force: true,
        log_path: bench.dir.path().join(format!("other-{n}/vol.wal")),
        ..bench.options()
    };
    let new = Host::attach(other(1)).unwrap();
    // The old host has not noticed yet: its uploads land, before and after the new one's.
    let mut expect = [1, 1, 1, 1, 0, 0, 0, 0];
    for round in 0..3u8 {
        on_lane(old.volume(), async |e| put(&e, 2, 6, 100 + round).await);
        block_on(old.volume().command(Command::Upload)).unwrap();
        if round > 0 {
            on_lane(new.volume(), async |e| put(&e, u64::from(round), 1, 10 + round).await);
            drain(new.volume());
            expect[usize::from(round)] = 10 + round;
        }
        on_lane(old.volume(), async |e| put(&e, 0, 8, 200 + round).await);
        block_on(old.volume().command(Command::Upload)).unwrap();
    }
    new.abandon().unwrap();
    let host = Host::attach(other(2)).unwrap();
    on_lane(host.volume(), async |e| {
        for (block, want) in expect.iter().enumerate() {
            assert_eq!(get(&e, block as u64).await, Ok(*want), "block {block}");
        }
    });
    host.detach().unwrap();
    assert_eq!(old.detach().unwrap_err().kind(), ErrorKind::Fenced);
}

#[test]
fn parts_of_blocks_merge_over_what_lies_below() {
    const SECTORS: usize = 512;
    let bench = Bench::new(SECTORS * SECTOR);
    let mut state: Stamps = vec![0; SECTORS];
    let mut rng = Rng(3);
    for life in 0..3 {
        let host = bench.attach().unwrap();
        let volume = host.volume().clone();
        let stop = Arc::new(AtomicBool::new(false));
        let drainer = {
            let (volume, stop) = (volume.clone(), stop.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    drain(&volume);
                }
            })
        };
        on_lane(&volume, async |e| {
            let mut written = 0;
            // Groups to merge over, however slow the machine packs.
            while written < 1500 || volume.status().background.groups <= 4 {
                written += 1;
                let most = if rng.below(4) == 0 { 40 } else { 3 };
                let len = 1 + rng.below(most) as usize;
                let lba = rng.below((SECTORS - len) as u64) as usize;
                let id = if rng.below(8) == 0 { 0 } else { rng.next() | 1 };
                let at = Lba(lba as u64);
                if id == 0 {
                    e.write_zeroes(at, len as u64, false).await.unwrap();
                } else {
                    e.write(at, buf_of(&id.to_le_bytes().repeat(len * SECTOR / 8)), false).await.unwrap();
                }
                state[lba..lba + len].fill(id);
            }
            assert_eq!(stamps(&e, SECTORS).await, state, "life {life}, log and store");
        });
        stop.store(true, Ordering::SeqCst);
        drainer.join().unwrap();
        on_lane(&volume, async |e| assert_eq!(stamps(&e, SECTORS).await, state, "life {life}, drained"));
        assert!(volume.status().background.groups > 4, "too few groups to merge over");
        drop(volume);
        host.detach().unwrap();
        bench.wipe_local();
    }
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| assert_eq!(stamps(&e, SECTORS).await, state, "from the store"));
    host.detach().unwrap();
}

#[test]
fn an_outage_of_the_store_is_a_slow_device() {
    const MIB: u64 = 90;
    let bench = Bench::new(128 << 20);
    // Uploads fail while this file is where their folder should be.
    fs::create_dir_all(bench.dir.path().join("store/vol")).unwrap();
    let obstacle = bench.dir.path().join("store/vol/chunks");
    let host = bench.attach().unwrap();
    fs::write(&obstacle, b"").unwrap();
    let written = Arc::new(AtomicUsize::new(0));
    let watcher = {
        let (volume, written, obstacle) = (host.volume().clone(), written.clone(), obstacle.clone());
        std::thread::spawn(move || {
            let (mut last, mut since) = (0, Instant::now());
            while since.elapsed() < Duration::from_secs(2) {
                volume_support::pause(Duration::from_millis(50));
                let n = written.load(Ordering::SeqCst);
                if n != last {
                    (last, since) = (n, Instant::now());
                }
            }
            let status = volume.status();
            assert!((48..64).contains(&last), "{last} of {MIB} MiB went into a log of 64 MiB");
            assert!(status.background.store_trouble.is_some() && status.failure.is_none(), "{status:?}");
            on_lane(&volume, async |e| {
                for i in (0..last as u64).step_by(5) {
                    assert_eq!(get(&e, i * 256 + 3).await, Ok(i as u8 + 1), "local reads go on");
                }
                e.flush().await.unwrap();
            });
            fs::remove_file(&obstacle).unwrap();
        })
    };
    on_lane(host.volume(), async |e| {
        for i in 0..MIB {
            put(&e, i * 256, 256, i as u8 + 1).await;
            written.fetch_add(1, Ordering::SeqCst);
        }
        for i in 0..MIB {
            assert_eq!(get(&e, i * 256 + 255).await, Ok(i as u8 + 1));
        }
    });
    watcher.join().unwrap();
    host.detach().unwrap();
    bench.wipe_local();
    let host = bench.attach().unwrap();
    assert_eq!(host.volume().status().background.store_trouble, None);
    on_lane(host.volume(), async |e| {
        for i in 0..MIB {
            assert_eq!(get(&e, i * 256 + 100).await, Ok(i as u8 + 1));
        }
    });
    host.detach().unwrap();
}

#[test]
fn full_images_and_deltas_say_the_same() {
    const SIZE: usize = 24 << 20;
    let bench = Bench::new(SIZE);
    let mut model = vec![0; SIZE];
    let mut rng = Rng(8);
    let (mut full, mut delta) = (0, 0);
    for life in 0..12 {
        let host = bench.attach().unwrap();
        on_lane(host.volume(), async |e| {
            compare(&e, &model, &format!("life {life}")).await;
            churn(&e, &mut model, &mut rng, if life % 5 == 0 { 700 } else { 25 }).await;
        });
        if life % 3 == 1 {
            drain(host.volume());
            host.abandon().unwrap();
        } else {
            host.detach().unwrap();
            match manifest(&bench).checkpoint.unwrap().delta {
                Some(_) => delta += 1,
                None => full += 1,
            }
        }
        if life % 2 == 0 && life % 3 != 1 {
            bench.wipe_local();
        }
    }
    assert!(full >= 2 && delta >= 2, "{full} full images, {delta} deltas");
}

/// A delta is reckoned from the one before, as the store has it. Where that was damaged meanwhile, a full image needs none.
#[test]
fn a_delta_that_was_damaged_meanwhile_ends_with_the_next_checkpoint() {
    let bench = Bench::new(8 << 20);
    let delta = || manifest(&bench).checkpoint.unwrap().delta;
    // Every other block, so that the full image is large and a delta worth its while.
    let lives: [&[(u64, u8)]; 3] =
        [&(0..600).map(|i| (i * 2, 1)).collect::<Vec<_>>(), &[(0, 2), (1, 2), (2, 2)], &[(1, 3), (40, 3)]];
    for (life, blocks) in lives.iter().enumerate() {
        let host = bench.attach().unwrap();
        on_lane(host.volume(), async |e| {
            for &(block, fill) in *blocks {
                put(&e, block, 1, fill).await;
            }
        });
        if life == 2 {
            let part = delta().expect("a few blocks make a delta").parts[0].key.clone();
            let path = bench.dir.path().join("store/vol").join(part);
            let mut bytes = fs::read(&path).unwrap();
            bytes[90] ^= 1;
            fs::write(&path, bytes).unwrap();
        }
        host.detach().unwrap();
    }
    assert!(delta().is_none());
    bench.wipe_local();
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| {
        for (block, fill) in [(0, 2), (1, 3), (2, 2), (3, 0), (4, 1), (39, 0), (40, 3), (1198, 1)] {
            assert_eq!(get(&e, block).await, Ok(fill), "block {block}");
        }
    });
    host.detach().unwrap();
}

/// A checkpoint comes by itself after 1024 chunks, beside the volume's life, and the store alone holds what it says.
#[test]
fn a_checkpoint_comes_by_itself() {
    let bench = Bench::new(1 << 20);
    // Garbage collection has its own reasons for one.
    let host = Host::attach(AttachOptions { gc: Policy::off(), ..bench.options() }).unwrap();
    let volume = host.volume().clone();
    for i in 0..1030u64 {
        on_lane(&volume, async |e| put(&e, i % 250, 1, i as u8).await);
        drain(&volume);
        assert!(i > 1000 || manifest(&bench).checkpoint.is_none(), "a checkpoint after {i} groups");
    }
    let begin = Instant::now();
    while manifest(&bench).checkpoint.is_none() {
        assert!(begin.elapsed() < Duration::from_secs(20), "no checkpoint came");
        volume_support::pause(Duration::from_millis(20));
    }
    assert!(volume.status().background.checkpoint_group >= 1024);
    assert!(manifest(&bench).writer.is_some(), "it is no release");
    host.abandon().unwrap();
    bench.wipe_local();
    let host = force(&bench).unwrap();
    on_lane(host.volume(), async |e| {
        for block in 0..250u64 {
            let last = (block..1030).step_by(250).last().unwrap();
            assert_eq!(get(&e, block).await, Ok(last as u8), "block {block}");
        }
    });
    host.abandon().unwrap();
}

#[test]
fn a_thousand_attachments() {
    let url: StoreUrl = "memory:a-thousand-attachments".parse().unwrap();
    let store = Arc::new(MemoryStore::named("a-thousand-attachments"));
    block_on(admin::create(&*store, "vol", &CreateOptions { size_bytes: 1 << 20, logical_block: 512 }, 1)).unwrap();
    let bench = Bench::new(1 << 20);
    for n in 0..1010u64 {
        let host = Host::attach(AttachOptions { store_url: url.clone(), ..bench.options() }).unwrap();
        if n % 100 == 0 {
            on_lane(host.volume(), async |e| {
                assert_eq!(get(&e, 7).await, Ok((n / 100) as u8));
                put(&e, 7, 1, (n / 100) as u8 + 1).await;
            });
        }
        host.detach().unwrap();
    }
    let m = block_on(Published::load(&*store, "vol")).unwrap().manifest;
    let bytes = m.encode().unwrap().len();
    eprintln!("after {} attachments the manifest has {bytes} bytes", m.epoch);
    assert!(m.epoch.0 == 1010 && bytes < 1 << 20);
}

#[test]
fn a_publish_that_landed_unheard_is_not_taken_for_another_host() {
    let memory = Arc::new(MemoryStore::new());
    let opts = CreateOptions { size_bytes: 1 << 20, logical_block: 512 };
    block_on(admin::create(&*memory, "vol", &opts, 1)).unwrap();
    for conditional in [true, false] {
        let lost = [(Op::PutIf, Fault::After(ErrorKind::TimedOut)), (Op::PutIf, Fault::Before(ErrorKind::TimedOut))];
        let store = FaultStore::script(memory.clone(), lost);
        block_on(async {
            let mut ours = Published::load(&store, "vol").await.unwrap();
            for _ in 0..2 {
                ours.publish(&store, |m| m.conditional_writes = conditional).await.unwrap_err();
            }
            ours.still_ours(&store).await.unwrap();
            let mut theirs = Published::load(&store, "vol").await.unwrap();
            ours.publish(&store, |m| m.created = 2).await.unwrap();
            if conditional {
                // Another host's attachment has a nonce of its own.
                let lost = theirs.publish(&*memory, |m| m.nonce = Nonce(m.nonce.0 + 1)).await.unwrap_err();
                assert_eq!(lost.kind(), ErrorKind::Fenced, "{lost}");
            }
            assert_eq!(Published::load(&store, "vol").await.unwrap().manifest.created, 2);
        });
    }
}
