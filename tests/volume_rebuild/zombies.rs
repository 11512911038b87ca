//! What a fenced host has left behind beside the new one's: its late groups never count.

use vb_ublk::volume::Command;

use super::*;

/// An old host that goes on uploading after a new one has taken over by force: what each leaves, and the new one's log.
fn zombies(new_uploads: bool) -> (Bench, PathBuf, Vec<u8>) {
    let bench = Bench::new(MIB);
    let old = bench.attach().unwrap();
    on_lane(old.volume(), async |e| put(&e, 0, 4, 1).await);
    block_on(old.volume().command(Command::Upload)).unwrap();
    let log_path = bench.dir.path().join("other/vol.wal");
    let new = Host::attach(AttachOptions { force: true, log_path: log_path.clone(), ..bench.options() }).unwrap();
    let mut expect = vec![1, 1, 1, 1, 0, 0, 0, 0];
    for round in 0..3u8 {
        on_lane(old.volume(), async |e| put(&e, 2, 6, 100 + round).await);
        block_on(old.volume().command(Command::Upload)).unwrap();
        if round > 0 {
            on_lane(new.volume(), async |e| put(&e, u64::from(round), 1, 10 + round).await);
            if new_uploads {
                drain(new.volume());
            }
            expect[usize::from(round)] = 10 + round;
        }
        on_lane(old.volume(), async |e| put(&e, 0, 8, 200 + round).await);
        block_on(old.volume().command(Command::Upload)).unwrap();
    }
    new.abandon().unwrap();
    old.abandon().unwrap();
    (bench, log_path, expect)
}

#[test]
fn what_a_fenced_host_uploaded_late_does_not_count() {
    for lose_map in &MAPS {
        let (bench, _, expect) = zombies(true);
        bench.wipe_local();
        lose_map.1(&bench.dir.path().join("store/vol"));
        let known = is_readable(&bench);
        let report = rebuilt(&bench, &Options { force: true, ..if known { options() } else { sized(MIB) } });
        assert!(report.chunks_ignored >= 4, "{}: {report:#?}", lose_map.0);
        let host = attach(&bench, true);
        on_lane(host.volume(), async |e| {
            for (block, want) in expect.iter().enumerate() {
                assert_eq!(get(&e, block as u64).await, Ok(*want), "{}: block {block}", lose_map.0);
            }
        });
        host.detach().unwrap();
    }
}

/// The chunk of a number that the newest attachment wrote.
fn newest_chunk(bench: &Bench, number: u64) -> PathBuf {
    let m = manifest(bench);
    bench.dir.path().join("store/vol").join(header::key("", ChunkNo(number), m.epoch, m.nonce))
}

/// The new host's first group was on its way when it died, the next had arrived; the old one's late group would fit the gap.
#[test]
fn a_late_group_of_a_fenced_host_does_not_fill_a_gap() {
    let (bench, _, _) = zombies(true);
    bench.wipe_local();
    remove(&newest_chunk(&bench, 2));
    let next = newest_chunk(&bench, 3);
    let mut bytes = fs::read(&next).unwrap();
    let mut h = ChunkHeader::decode(&bytes).unwrap();
    assert_eq!((h.after, h.applied_through), (Seq(2), GroupNo(2)));
    h.applied_through = GroupNo(1);
    bytes[..HEADER_ROOM].copy_from_slice(&h.encode().unwrap());
    fs::write(&next, bytes).unwrap();
    remove(&manifest_path(&bench));
    assert_eq!(rebuilt(&bench, &sized(MIB)).group, 1);
    assert_blocks(&bench, &[1, 1, 1, 1, 0, 0, 0, 0]);
}

#[test]
fn a_late_group_of_a_fenced_host_does_not_stand_in_for_a_damaged_one() {
    let (bench, _, _) = zombies(true);
    bench.wipe_local();
    let chunk = newest_chunk(&bench, 2);
    flip(&chunk, 300);
    remove(&manifest_path(&bench));
    refused(&bench, &sized(MIB), ErrorKind::Corrupt, &[&name(&chunk), "group 1 "]);
    assert_eq!(rebuilt(&bench, &with_loss(sized(MIB))).group, 1);
    assert_blocks(&bench, &[1, 1, 1, 1, 0, 0, 0, 0]);
}

/// The new host has left nothing in the store: its log alone tells that the old one's late groups do not count.
#[test]
fn a_log_here_tells_late_groups_of_a_fenced_host() {
    let (bench, log_path, expect) = zombies(false);
    fs::rename(bench.log(), bench.dir.path().join("old.wal")).unwrap();
    fs::rename(log_path, bench.log()).unwrap();
    remove(&manifest_path(&bench));
    let report = rebuilt(&bench, &options());
    assert_eq!((report.group, report.groups_given_up), (1, 0), "{report:#?}");
    assert!(report.chunks_ignored >= 6, "{report:#?}");
    assert_blocks(&bench, &expect);
}

/// Two attachments began at the same place, and one of them has left a log alone: which came first?
#[test]
fn a_log_and_chunks_that_go_on_from_the_same_place_are_not_guessed_about() {
    let bench = Bench::new(MIB);
    let first = bench.attach().unwrap();
    on_lane(first.volume(), async |e| put(&e, 0, 4, 1).await);
    first.abandon().unwrap();
    let log_path = bench.dir.path().join("other/vol.wal");
    let second = Host::attach(AttachOptions { force: true, log_path, ..bench.options() }).unwrap();
    on_lane(second.volume(), async |e| put(&e, 0, 4, 2).await);
    second.detach().unwrap();
    remove(&manifest_path(&bench));
    refused(&bench, &options(), ErrorKind::Corrupt, &["nobody can tell", "move the log away"]);
    bench.wipe_local();
    rebuilt(&bench, &sized(MIB));
    assert_blocks(&bench, &[2, 2, 2, 2, 0]);
}
