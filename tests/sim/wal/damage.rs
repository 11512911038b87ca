//! Damage, failures and batches that are too large, one by one.

use super::*;
use vb_ublk::wal::codec::SUPERBLOCK_AT;
use vb_ublk::wal::salvage::end_before_damage;

/// Slot 0: segment header, record 1 with a block (durable), record 2 with a block, which says so.
fn two_records() -> Vec<u8> {
    let disk = fresh_disk();
    let d = disk.clone();
    quietly(&disk, async move |spawner| {
        let (log, a, _) = begin(&d, &spawner).await;
        let end = write(&a, 1, 8).await.unwrap();
        log.sync_through(end, &d).await.unwrap();
        write(&a, 2, 8).await.unwrap();
    });
    disk.image()
}

fn flipped(image: &[u8], at_block: usize) -> Vec<u8> {
    let mut image = image.to_vec();
    image[SLOTS_START as usize + at_block * BLOCK + 20] ^= 4;
    image
}

#[test]
fn damage_is_told_from_a_torn_tail_by_the_durable_mark() {
    let image = two_records();
    let whole = replay_image(image.clone()).unwrap();
    assert_eq!((whole.entries.len(), whole.torn_bytes), (2, 0));
    assert_eq!(whole.durable, LogPos::new(1, 3 * BLOCK as u32));

    for (block, what) in [(0, "segment header"), (1, "header of record 1")] {
        let e = replay_image(flipped(&image, block)).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{what}: {e}");
        assert!(!e.to_string().contains('\n'), "{e}");
    }
    // Data at or below the mark is not read: the check fails for its reader alone.
    let r = replay_image(flipped(&image, 2)).unwrap();
    assert_eq!((r.entries.len(), r.torn_bytes), (2, 0));
    assert_eq!(r.crcs, whole.crcs);
    for (block, what) in [(3, "header of record 2"), (4, "data of record 2")] {
        let r = replay_image(flipped(&image, block)).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(r.entries.len(), 1, "{what}");
        assert_eq!(r.end, LogPos::new(1, 3 * BLOCK as u32), "{what}");
    }
}

/// What a disk cannot read may have been acknowledged, wherever it is: no such block is taken for the end of the log.
#[test]
fn a_block_that_cannot_be_read_is_no_torn_tail() {
    let image = two_records();
    let block = |n: u64| SLOTS_START + n * BLOCK as u64;
    let second = u64::from(SEGMENT) / BLOCK as u64;
    // What is lost, and how many entries are left before it; `None`: nothing that matters is.
    let cases = [
        (vec![0], Some(0)),
        (vec![1], Some(0)),
        (vec![2], None),
        (vec![3], Some(1)),
        (vec![4], Some(1)),
        // The end of the log, and the header of a segment that was never used, of which the next block tells.
        (vec![5], Some(2)),
        (vec![second], None),
        (vec![second, second + 1], Some(2)),
    ];
    for (lost, left) in cases {
        let disk = SimDisk::new(image.clone());
        lost.iter().for_each(|n| disk.lose_block(block(*n)));
        let (sb, r) = ready(replay_disk(&disk));
        let Some(left) = left else {
            let r = r.unwrap_or_else(|e| panic!("{lost:?}: {e}"));
            assert_eq!((r.entries.len(), r.torn_bytes), (2, 0), "{lost:?}");
            continue;
        };
        let e = r.expect_err("it is refused");
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{lost:?}: {e}");
        assert!(
            lost == [0]
                || e.to_string().contains("cannot be read")
                || e.to_string().contains("cannot read")
                || e.to_string().contains("damaged at"),
            "{lost:?}: {e}"
        );
        let (d, mut small_sb) = (disk.clone(), SuperblockFile { current: small(&sb.current) });
        quietly(&disk, async move |_| {
            end_before_damage(&d, d.size(), &mut small_sb).await.unwrap_or_else(|e| panic!("{lost:?}: {e}"));
            let r = replay(&d, d.size(), &small_sb.current).await.unwrap();
            assert_eq!(r.entries.len(), left, "{lost:?}");
        });
    }
    // A disk that reads nothing at all may come back, and everything with it.
    let disk = SimDisk::new(image.clone());
    let (sb, _) = ready(replay_disk(&disk));
    (0..image.len()).step_by(BLOCK).for_each(|at| disk.lose_block(at as u64));
    let e = ready(replay(&disk, disk.size(), &small(&sb.current))).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Io, "{e}");
    // One copy of the superblock is enough.
    let disk = SimDisk::new(image);
    disk.lose_block(SUPERBLOCK_AT[(sb.current.update % 2) as usize ^ 1]);
    assert_eq!(ready(replay_disk(&disk)).1.unwrap().entries.len(), 2);
}

/// Three segments; `synced`: everything is durable, and the last record says so.
fn three_segments(synced: bool) -> Vec<u8> {
    let disk = fresh_disk();
    let d = disk.clone();
    quietly(&disk, async move |spawner| {
        let (log, a, _) = begin(&d, &spawner).await;
        zero(&d, 2).await;
        log.add_slot(2);
        for id in 0..3 {
            write(&a, id, u64::from(SEGMENT) * 5 / 8 / SECTOR as u64).await.unwrap();
        }
        if synced {
            log.sync_through(log.flush_target(), &d).await.unwrap();
            append_empty(&log, &d).await.unwrap();
        }
    });
    disk.image()
}

/// A slot whose entries are all packed is not written again before the next segment's header is durable: a power cut could
/// take that header, and a mark in a later segment would name a place that no chain holds.
#[test]
fn a_slot_is_reused_only_when_its_successor_is_durable() {
    let disk = fresh_disk();
    let d = disk.clone();
    quietly(&disk, async move |spawner| {
        let (log, a, mut sb) = begin(&d, &spawner).await;
        let most = u64::from(SEGMENT) * 5 / 8 / SECTOR as u64;
        write(&a, 0, most).await.unwrap();
        sb.packed(&d, Seq(1)).await.unwrap();
        log.durable_to(log.frontier());
        write(&a, 1, most).await.unwrap();
        log.retire(Seq(1));
        log.recycle(Seq(1));
        let used = log.status().used_bytes;
        log.sync_through(log.flush_target(), &d).await.unwrap();
        log.recycle(Seq(1));
        assert_eq!(used - log.status().used_bytes, u64::from(SEGMENT), "one slot came free, and only now");
    });
}

#[test]
fn a_lost_segment_is_a_torn_tail_or_corruption() {
    let slot = SEGMENT as usize / BLOCK;
    let erased = |synced, n: usize| {
        let mut image = three_segments(synced);
        let at = SLOTS_START as usize + n * SEGMENT as usize;
        image[at..at + BLOCK].fill(0);
        replay_image(image)
    };
    for n in 0..3 {
        let r = erased(false, n).unwrap_or_else(|e| panic!("segment {n}: {e}"));
        assert_eq!(r.entries.len(), n, "what lies before segment {n}");
    }
    for n in 0..2 {
        let e = erased(true, n).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt, "segment {n}: {e}");
    }
    // A header that is there and damaged is no tear: a sector is old or new. The segment was there, and may be needed.
    for n in 0..3 {
        let e = replay_image(flipped(&three_segments(false), n * slot)).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt, "segment {n}: {e}");
    }
}

#[test]
fn a_failure_latches() {
    for failing_sync in [false, true] {
        let disk = fresh_disk();
        let d = disk.clone();
        quietly(&disk, async move |spawner| {
            let (log, a, _) = begin(&d, &spawner).await;
            let b = appender(&log, &d, &spawner);
            let first = write(&a, 1, 8).await.unwrap();
            if failing_sync {
                d.fail_next_sync();
                let both = join_all([first, log.flush_target()].map(|t| log.sync_through(t, &d))).await;
                assert_eq!(both, [Err(Failed), Err(Failed)]);
            } else {
                d.fail_next_write();
                let all = join_all([write(&a, 2, 8), write(&b, 3, 8), write(&a, 4, 64), write(&b, 5, 1)]).await;
                assert!(all.iter().filter(|r| r.is_err()).count() >= 2, "{all:?}");
            }
            assert!(log.failure().is_some_and(|f| f.contains("injected")), "{:?}", log.failure());
            for lane in [&a, &b] {
                assert_eq!(write(lane, 9, 8).await, Err(NotLogged::Failed));
                assert_eq!(
                    lane.push_hole(Lba(0), 8, RecordKind::Discard, true, Duration::ZERO).await,
                    Err(NotLogged::Failed)
                );
            }
            assert_eq!(log.sync_through(first, &d).await, Err(Failed));
            assert_eq!(append_empty(&log, &d).await, Err(Failed));
        });
        let r = replay_image(disk.image()).unwrap();
        assert_eq!(r.entries[0].lba, Lba(STRIDE), "what was answered before is there");
    }
}

#[test]
fn a_batch_of_very_many_discards_is_replayed() {
    let geometry = Geometry { segment_bytes: 4 << 20, max_segments: 2 };
    let disk = SimDisk::new(vec![0; (SLOTS_START + geometry.capacity()) as usize]);
    let d = disk.clone();
    let many = 60_000;
    quietly(&disk, async move |spawner| {
        let start = Start {
            next_seq: Seq(1),
            packed: Seq(0),
            end: LogPos::default(),
            next_generation: 1,
            live: Vec::new(),
            free: vec![0, 1],
            journal: Vec::new(),
            slots_ready: 2,
        };
        let log = Arc::new(Log::new(VOLUME, LOG_ID, geometry, start, Box::new(|| 1), Box::new(|_| ())));
        let a = appender(&log, &d, &spawner);
        join_all((0..many).map(|i| a.push_hole(Lba(i), 1, RecordKind::Discard, false, Duration::ZERO))).await;
    });
    let r = ready(replay(&disk, disk.size(), &new_superblock(VOLUME, LOG_ID, geometry, 1 << 40, 512))).unwrap();
    assert_eq!(r.entries.len() as u64, many, "every acknowledged discard is there");
}
