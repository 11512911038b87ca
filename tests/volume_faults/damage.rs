//! What is damaged, cut or missing in the store and in the log: refused by name, or an error for its blocks alone.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use vb_ublk::cache::{MIN_BYTES, Place};
use vb_ublk::chunk::header::HEADER_ROOM;
use vb_ublk::disk::IoBuf;
use vb_ublk::error::ErrorKind;
use vb_ublk::manifest::Manifest;
use vb_ublk::units::{BLOCK, Lba, SECTOR};
use vb_ublk::volume::engine::{Engine, IoFault};
use vb_ublk::volume::host::{AttachOptions, Host};
use vb_ublk::wal::codec::SUPERBLOCK_AT;

use super::damage_support::{flip, name, objects, rot, three_groups};
use super::volume_support::{Bench, buf_of, drain, get, on_lane, put};
use super::{force, refused};

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
        super::volume_support::pause(Duration::from_millis(20));
    }
    // Several builds long.
    super::volume_support::pause(Duration::from_millis(1200));
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
    let cache = Some(Place { path: bench.dir.path().join("vol.cache"), bytes: MIN_BYTES });
    let host = Host::attach(AttachOptions { cache, ..bench.options() }).unwrap();
    check(&host, "from the store", true);
    let hits = || host.volume().status().cache.unwrap().hits;
    super::volume_support::pause(Duration::from_millis(300));
    let before = hits();
    check(&host, "with what is good of it in the cache", true);
    assert!(hits() > before);
    on_lane(host.volume(), async |e| {
        put(&e, 11, 1, 9).await;
        e.write(Lba(21 * 8 + 3), buf_of(&[0x33; SECTOR]), false).await.unwrap();
    });
    drain(host.volume());
    on_lane(host.volume(), async |e| assert_eq!((get(&e, 11).await, get(&e, 21).await), (Ok(9), Ok(0x33))));
    host.detach().unwrap();
}
