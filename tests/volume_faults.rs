//! The volume when things go wrong: lost hosts, damaged and missing objects, rot in the log, a store that fails.

mod damage_support;
mod support_rng;
mod volume_support;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use damage_support::{flip, name, objects, three_groups};
use support_rng::Rng;
use vb_ublk::chunk::header::HEADER_ROOM;
use vb_ublk::disk::IoBuf;
use vb_ublk::error::{Error, ErrorKind, Result};
use vb_ublk::gc::Policy;
use vb_ublk::manifest::{Manifest, Published};
use vb_ublk::store::fault::{Fault, FaultStore};
use vb_ublk::store::memory::MemoryStore;
use vb_ublk::store::{Op, StoreUrl};
use vb_ublk::units::{BLOCK, Lba, Nonce, SECTOR};
use vb_ublk::volume::Command;
use vb_ublk::volume::admin::{self, CreateOptions};
use vb_ublk::volume::engine::{Engine, IoFault};
use vb_ublk::volume::host::{AttachOptions, Host};
use vb_ublk::wal::codec::SUPERBLOCK_AT;
use volume_support::{Bench, TestLane, block_on, buf_of, churn, compare, drain, get, on_lane, put};

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

/// Per sector, the number of the request that wrote it last; 0: zeros.
type Stamps = Vec<u64>;

async fn stamps(e: &TestLane, sectors: usize) -> Stamps {
    let b = IoBuf::zeroed(sectors * SECTOR);
    e.read(Lba(0), b.clone()).await.unwrap();
    let stamp = |s: &[u8]| {
        let first = &s[..8];
        assert!(s.chunks(8).all(|w| w == first), "a sector is torn");
        u64::from_le_bytes(first.try_into().unwrap())
    };
    b.bytes().chunks(SECTOR).map(stamp).collect()
}

struct Request {
    id: u64,
    lba: usize,
    sectors: usize,
    zeroes: bool,
}

/// Rounds of requests side by side, which do not overlap. `completed` counts whole rounds.
async fn rounds(e: &TestLane, rng: &mut Rng, sectors: usize, n: usize, completed: &AtomicUsize) -> Vec<Vec<Request>> {
    let mut history: Vec<Vec<Request>> = Vec::new();
    for _ in 0..n {
        let mut round: Vec<Request> = Vec::new();
        for _ in 0..1 + rng.below(6) {
            let len = if rng.below(3) == 0 { 1 + rng.below(200) } else { 1 + rng.below(17) } as usize;
            let lba = rng.below((sectors - len) as u64) as usize;
            if round.iter().all(|r| lba + len <= r.lba || r.lba + r.sectors <= lba) {
                round.push(Request { id: rng.next() | 1, lba, sectors: len, zeroes: rng.below(6) == 0 });
            }
        }
        let requests = round.iter().map(|r| async move {
            let lba = Lba(r.lba as u64);
            if r.zeroes {
                e.discard(lba, r.sectors as u64, false).await.unwrap();
            } else {
                let data = r.id.to_le_bytes().repeat(r.sectors * SECTOR / 8);
                e.write(lba, buf_of(&data), false).await.unwrap();
            }
        });
        futures_util::future::join_all(requests).await;
        history.push(round);
        completed.fetch_add(1, Ordering::SeqCst);
    }
    history
}

/// How many whole rounds explain what is found, if one cut does: all rounds before it, any requests of its own, none after.
fn explain(before: &Stamps, history: &[Vec<Request>], found: &Stamps) -> Option<usize> {
    let stamp = |r: &Request| if r.zeroes { 0 } else { r.id };
    let mut state = before.clone();
    let mut best = (*found == state).then_some(0);
    for (n, round) in history.iter().enumerate() {
        let mut partly = state.clone();
        for r in round {
            let range = r.lba..r.lba + r.sectors;
            state[range.clone()].fill(stamp(r));
            if found[range.clone()].iter().all(|s| *s == stamp(r)) {
                partly[range].fill(stamp(r));
            }
        }
        if partly == *found {
            best = Some(if state == *found { n + 1 } else { n });
        }
    }
    best
}

#[test]
fn the_store_alone_holds_a_prefix_with_all_that_was_drained() {
    const SECTORS: usize = 4096;
    let bench = Bench::new(SECTORS * SECTOR);
    let mut state: Stamps = vec![0; SECTORS];
    let mut rng = Rng(11);
    let mut cut_off = 0;
    for life in 0..10 {
        let host = force(&bench).unwrap();
        let volume = host.volume().clone();
        let (completed, drained, stop) =
            (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let drainer = {
            let (volume, completed, drained, stop) = (volume.clone(), completed.clone(), drained.clone(), stop.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    let n = completed.load(Ordering::SeqCst);
                    if block_on(volume.command(Command::Drain)).is_err() {
                        return;
                    }
                    drained.store(n, Ordering::SeqCst);
                }
            })
        };
        let history = on_lane(&volume, async |e| {
            assert_eq!(stamps(&e, SECTORS).await, state, "life {life}");
            rounds(&e, &mut rng, SECTORS, 500, &completed).await
        });
        drop(volume);
        host.abandon().unwrap();
        stop.store(true, Ordering::SeqCst);
        drainer.join().unwrap();
        bench.wipe_local();

        let host = force(&bench).unwrap();
        let found = on_lane(host.volume(), async |e| stamps(&e, SECTORS).await);
        let whole = explain(&state, &history, &found);
        let must = drained.load(Ordering::SeqCst);
        assert!(whole.is_some_and(|n| n >= must), "life {life}: {whole:?} rounds explain it, {must} were drained");
        cut_off += usize::from(whole < Some(history.len()));
        state = found;
        if life % 2 == 0 {
            host.detach().unwrap();
        } else {
            host.abandon().unwrap();
            bench.wipe_local();
        }
    }
    assert!(cut_off > 3, "{cut_off} of 10 lives were cut off: too few to say anything");
}

#[test]
fn of_two_superblocks_one_is_enough() {
    let bench = Bench::new(1 << 20);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 3, 1, 9).await);
    host.abandon().unwrap();
    let flip = |places: &[u64]| {
        let mut bytes = fs::read(bench.log()).unwrap();
        places.iter().for_each(|at| bytes[*at as usize + 100] ^= 1);
        fs::write(bench.log(), bytes).unwrap();
    };
    flip(&SUPERBLOCK_AT);
    refused(bench.attach(), ErrorKind::Corrupt, "no copy of the log's superblock is valid");
    flip(&SUPERBLOCK_AT);
    for place in SUPERBLOCK_AT {
        flip(&[place]);
        let host = bench.attach().unwrap();
        on_lane(host.volume(), async |e| assert_eq!(get(&e, 3).await, Ok(9)));
        host.abandon().unwrap();
    }
}

#[test]
fn a_damaged_manifest_is_refused() {
    let bench = Bench::new(1 << 20);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 3, 1, 9).await);
    host.detach().unwrap();
    let path = bench.dir.path().join("store/vol/manifest.json");
    let good = fs::read(&path).unwrap();
    for at in (0..good.len()).step_by(7) {
        let mut bad = good.clone();
        bad[at] ^= 1;
        let read = Manifest::decode(&bad);
        assert!(read.is_err(), "byte {at} ({:?}) may change unseen", bad[at] as char);
        assert!(!read.unwrap_err().to_string().contains('\n'));
        if at % 70 == 0 {
            fs::write(&path, &bad).unwrap();
            let e = bench.attach().map(|_| ()).unwrap_err();
            assert!(matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported), "{e}");
        }
    }
    fs::write(&path, &good[..good.len() / 2]).unwrap();
    refused(bench.attach(), ErrorKind::Corrupt, "manifest.json");
    fs::write(&path, &good).unwrap();
    bench.attach().unwrap().detach().unwrap();
}

#[test]
fn a_damaged_checkpoint_part_is_refused() {
    let bench = Bench::new(1 << 20);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 3, 1, 9).await);
    host.detach().unwrap();
    let part = objects(&bench, "checkpoints").pop().unwrap();
    let good = fs::read(&part).unwrap();
    for at in [0, 9, good.len() / 2, good.len() - 1] {
        flip(&part, at);
        refused(bench.attach(), ErrorKind::Corrupt, &name(&part));
        fs::write(&part, &good).unwrap();
        // The refusal came after the epoch was taken: the next attach follows an unclean end.
    }
    fs::write(&part, &good[..good.len() - 1]).unwrap();
    refused(bench.attach(), ErrorKind::Corrupt, &name(&part));
    fs::remove_file(&part).unwrap();
    refused(bench.attach(), ErrorKind::Corrupt, &name(&part));
    fs::write(&part, &good).unwrap();
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| assert_eq!(get(&e, 3).await, Ok(9)));
    host.detach().unwrap();
}

#[test]
fn a_damaged_chunk_header_stops_an_attach_that_needs_it() {
    for at in [0, 4, 60, 252, 300, 24700, HEADER_ROOM - 1] {
        let bench = three_groups(false);
        let chunk = &objects(&bench, "chunks")[1];
        flip(chunk, at);
        refused(force(&bench), ErrorKind::Corrupt, &name(chunk));
        flip(chunk, at);
        force(&bench).unwrap().detach().unwrap();
    }
}

#[test]
fn a_cut_or_missing_chunk_stops_an_attach_that_needs_it() {
    let bench = three_groups(false);
    let chunk = objects(&bench, "chunks")[0].clone();
    let good = fs::read(&chunk).unwrap();
    fs::write(&chunk, &good[..1000]).unwrap();
    refused(force(&bench), ErrorKind::Corrupt, &name(&chunk));
    // A later chunk says that this group was whole.
    fs::remove_file(&chunk).unwrap();
    refused(force(&bench), ErrorKind::Corrupt, "group 1 ");
    fs::write(&chunk, &good).unwrap();
    let host = force(&bench).unwrap();
    on_lane(host.volume(), async |e| assert_eq!((get(&e, 0).await, get(&e, 29).await), (Ok(1), Ok(3))));
    host.detach().unwrap();
}

const MISSING: &str = "a missing chunk";

/// What is done to a chunk of blocks 10 to 19, and which of them it spoils.
type Damage = (&'static str, fn(&Path), std::ops::Range<u64>);

#[test]
fn damage_in_a_chunk_is_an_error_for_its_blocks_alone() {
    let damages: [Damage; 5] = [
        ("a flipped header", |p| flip(p, 300), 10..20),
        ("a flipped block", |p| flip(p, HEADER_ROOM + 4 * BLOCK + 77), 14..15),
        (
            "a chunk that ends early",
            |p| fs::write(p, &fs::read(p).unwrap()[..HEADER_ROOM + 6 * BLOCK + 9]).unwrap(),
            16..20,
        ),
        ("a chunk cut in its header", |p| fs::write(p, &fs::read(p).unwrap()[..99]).unwrap(), 10..20),
        (MISSING, |p| fs::remove_file(p).unwrap(), 10..20),
    ];
    // Side by side: nothing is given up in a hurry.
    std::thread::scope(|s| damages.into_iter().for_each(|d| drop(s.spawn(|| damaged_chunk(d)))));
}

fn damaged_chunk((what, damage, bad): Damage) {
    let bench = three_groups(true);
    damage(&objects(&bench, "chunks")[1]);
    let host = bench.attach().unwrap_or_else(|e| panic!("{what}: {e}"));
    on_lane(host.volume(), async |e| {
        for block in 0..40 {
            let want = if bad.contains(&block) {
                Err(IoFault::Io)
            } else {
                Ok(if block < 30 { block as u8 / 10 + 1 } else { 0 })
            };
            assert_eq!(get(&e, block).await, want, "{what}: block {block}");
        }
        let all = IoBuf::zeroed(40 * BLOCK);
        assert_eq!(e.read(Lba(0), all).await, Err(IoFault::Io), "{what}: a read over it");
        // A part of a bad block: the rest of the block stays lost, the part is right.
        if what != MISSING {
            e.write(Lba(bad.start * 8 + 2), buf_of(&[7; 512]), false).await.unwrap();
        }
    });
    drain(host.volume());
    on_lane(host.volume(), async |e| {
        if what == MISSING {
            return put(&e, bad.start, 1, 5).await;
        }
        let sector = IoBuf::zeroed(SECTOR);
        e.read(Lba(bad.start * 8 + 2), sector.clone()).await.unwrap();
        assert_eq!(sector.bytes(), [7; SECTOR], "{what}");
        for s in [0, 1, 3, 7] {
            assert_eq!(e.read(Lba(bad.start * 8 + s), sector.clone()).await, Err(IoFault::Io), "{what}: sector {s}");
        }
        put(&e, bad.start, 1, 5).await;
    });
    host.detach().unwrap();
    bench.wipe_local();
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| {
        assert_eq!(get(&e, bad.start).await, Ok(5), "{what}: an overwrite heals");
        assert_eq!((get(&e, 9).await, get(&e, 20).await), (Ok(1), Ok(3)));
    });
    host.detach().unwrap();
}

/// What a newer program would write: intact, and of another version.
fn make_newer(chunk: &Path) {
    const CRC_AT: usize = 252;
    let mut bytes = fs::read(chunk).unwrap();
    bytes[4] = 2;
    bytes[CRC_AT..CRC_AT + 4].fill(0);
    let crc = crc32fast::hash(&bytes[..HEADER_ROOM]);
    bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    fs::write(chunk, bytes).unwrap();
}

#[test]
fn a_chunk_of_a_newer_program_is_not_taken_for_damage() {
    let bench = three_groups(false);
    let chunk = &objects(&bench, "chunks")[1];
    make_newer(chunk);
    refused(force(&bench), ErrorKind::Unsupported, &name(chunk));
    part_of_a_block_waits(make_newer);
}

#[test]
fn a_part_of_a_block_waits_for_a_chunk_that_is_not_found() {
    part_of_a_block_waits(|chunk| fs::remove_file(chunk).unwrap());
}

/// A proxy that cuts answers short for a while, or sends a page of its own.
#[test]
fn a_part_of_a_block_waits_for_a_chunk_that_is_cut_short_for_a_while() {
    part_of_a_block_waits(|chunk| fs::write(chunk, b"<html>Bad gateway</html>").unwrap());
    part_of_a_block_waits(|chunk| fs::write(chunk, &fs::read(chunk).unwrap()[..40_000]).unwrap());
}

/// Nothing is known to be lost while the block below a partial write cannot be read but is not damaged.
fn part_of_a_block_waits(spoil: impl Fn(&Path)) {
    let bench = three_groups(true);
    let chunk = objects(&bench, "chunks")[1].clone();
    let good = fs::read(&chunk).unwrap();
    spoil(&chunk);
    let host = bench.attach().unwrap();
    // Of many blocks: each of them meets the chunk.
    let blocks = 11..19;
    on_lane(host.volume(), async |e| {
        for block in blocks.clone() {
            e.write(Lba(block * 8 + 2), buf_of(&[7; SECTOR]), false).await.unwrap();
        }
    });
    let volume = host.volume().clone();
    let drainer = std::thread::spawn(move || drain(&volume));
    let begin = Instant::now();
    while host.volume().status().background.store_trouble.is_none() {
        assert!(begin.elapsed() < Duration::from_secs(10), "the trouble is not told");
        volume_support::pause(Duration::from_millis(20));
    }
    // Several builds long.
    volume_support::pause(Duration::from_millis(1200));
    assert!(!drainer.is_finished());
    fs::write(&chunk, good).unwrap();
    drainer.join().unwrap();
    on_lane(host.volume(), async |e| {
        for (block, s) in blocks.flat_map(|b| (0..8).map(move |s| (b, s))) {
            let b = IoBuf::zeroed(SECTOR);
            e.read(Lba(block * 8 + s), b.clone()).await.unwrap();
            assert_eq!(b.bytes(), [if s == 2 { 7 } else { 2 }; SECTOR], "block {block}, sector {s}");
        }
    });
    host.detach().unwrap();
}

#[test]
fn an_incomplete_last_group_does_not_count() {
    for from_the_end in 1..=3 {
        incomplete_group(from_the_end);
    }
}

fn incomplete_group(from_the_end: usize) {
    // In a large log, a group has room for all of it.
    let bench = Bench { log_bytes: 512 << 20, ..Bench::new(32 << 20) };
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 0, 100, 1).await);
    drain(host.volume());
    on_lane(host.volume(), async |e| {
        // A group of three chunks.
        for mib in 0..10 {
            put(&e, mib * 256, 256, 2).await;
        }
    });
    drain(host.volume());
    host.abandon().unwrap();
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
    drain(old.volume());
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
        drain(old.volume());
        if round > 0 {
            on_lane(new.volume(), async |e| put(&e, u64::from(round), 1, 10 + round).await);
            drain(new.volume());
            expect[usize::from(round)] = 10 + round;
        }
        on_lane(old.volume(), async |e| put(&e, 0, 8, 200 + round).await);
        drain(old.volume());
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
            for _ in 0..1500 {
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

/// Flips a bit in the log's copy of the one block that begins with `mark`.
fn rot(bench: &Bench, mark: &[u8]) {
    let log = fs::read(bench.log()).unwrap();
    let found: Vec<usize> = (0..log.len()).step_by(SECTOR).filter(|at| log[*at..].starts_with(mark)).collect();
    let [at] = found[..] else { panic!("{} copies in the log", found.len()) };
    use std::os::unix::fs::FileExt;
    let file = fs::OpenOptions::new().write(true).open(bench.log()).unwrap();
    file.write_all_at(&[log[at + 40] ^ 1], at as u64 + 40).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn rot_in_the_log_is_an_error_for_its_block_alone_for_good() {
    let bench = Bench::new(1 << 20);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 20, 4, 0x33).await);
    drain(host.volume());
    on_lane(host.volume(), async |e| {
        let mut data = vec![0x41; BLOCK];
        data.extend([0x42; BLOCK]);
        data.extend([0x43; BLOCK]);
        e.write(Lba(80), buf_of(&data), true).await.unwrap();
        // One sector over a block that the store has.
        e.write(Lba(21 * 8 + 3), buf_of(&[0x51; SECTOR]), true).await.unwrap();
    });
    rot(&bench, &[0x42; BLOCK]);
    rot(&bench, &[0x51; SECTOR]);
    let check = |host: &Host, what: &str, merged: bool| {
        on_lane(host.volume(), async |e| {
            assert_eq!(get(&e, 10).await, Ok(0x41), "{what}");
            assert_eq!(get(&e, 11).await, Err(IoFault::Io), "{what}");
            assert_eq!(get(&e, 12).await, Ok(0x43), "{what}");
            assert_eq!(e.read(Lba(80), IoBuf::zeroed(3 * BLOCK)).await, Err(IoFault::Io), "{what}");
            for s in 0..8 {
                let b = IoBuf::zeroed(SECTOR);
                let read = e.read(Lba(21 * 8 + s), b.clone()).await;
                assert_eq!(read, if s == 3 { Err(IoFault::Io) } else { Ok(()) }, "{what}: sector {s}");
                assert!(s == 3 || b.bytes() == [0x33; SECTOR], "{what}: sector {s} (merged: {merged})");
            }
        });
    };
    check(&host, "in the log", false);
    drain(host.volume());
    check(&host, "packed", true);
    host.detach().unwrap();
    bench.wipe_local();
    let host = bench.attach().unwrap();
    check(&host, "from the store", true);
    on_lane(host.volume(), async |e| {
        put(&e, 11, 1, 9).await;
        e.write(Lba(21 * 8 + 3), buf_of(&[0x33; SECTOR]), false).await.unwrap();
    });
    drain(host.volume());
    on_lane(host.volume(), async |e| assert_eq!((get(&e, 11).await, get(&e, 21).await), (Ok(9), Ok(0x33))));
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
