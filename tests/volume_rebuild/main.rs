//! Rebuilding a volume: whatever becomes of manifest and checkpoints, the chunks (and the log) bring it back; and what
//! cannot be brought back is refused, by name.

#[path = "../command_support/mod.rs"]
mod command_support;
#[expect(dead_code, reason = "no log rots here, and no group is cut short")]
#[path = "../damage_support/mod.rs"]
mod damage_support;
#[path = "../rebuild_support/mod.rs"]
mod rebuild_support;
mod stale;
#[path = "../support_rng/mod.rs"]
mod support_rng;
#[path = "../volume_support/mod.rs"]
mod volume_support;
mod zombies;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use command_support::{text, volume_command};
use damage_support::{flip, name, objects, three_groups};
use rebuild_support::{
    MAPS, MIB, Spoil, assert_blocks, attach, each_part, first_groups, is_readable, local_log, manifest, manifest_path,
    options, over, rebuilt, refused, remove, sized, with_loss,
};
use serde_json::Value;
use support_rng::Rng;
use vb_ublk::chunk::header::{self, ChunkHeader, HEADER_ROOM};
use vb_ublk::error::ErrorKind;
use vb_ublk::store::Op;
use vb_ublk::store::fault::{Fault, FaultStore};
use vb_ublk::units::{BLOCK, ChunkNo, GroupNo, Lba, Seq};
use vb_ublk::volume::engine::{Engine, IoFault};
use vb_ublk::volume::host::{AttachOptions, Host};
use vb_ublk::volume::rebuild::{LogFate, ManifestState, MapFrom, Options, rebuild};
use volume_support::{Bench, block_on, churn, compare, drain, get, on_lane, pause, put};

/// Lives of all kinds, with every way to end, then every way to lose the map.
#[test]
fn whatever_its_past_a_volume_comes_back_byte_for_byte() {
    const SIZE: usize = 8 * MIB;
    for (n, (what, spoil)) in MAPS.into_iter().cycle().take(10).enumerate() {
        let bench = Bench::new(SIZE);
        let (mut model, mut rng) = (vec![0; SIZE], Rng(40 + n as u64));
        let (mut force, mut is_clean) = (false, false);
        for _ in 0..2 + rng.below(4) {
            let host = attach(&bench, force);
            let ops = 20 + rng.below(120) as usize;
            on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, ops).await);
            (force, is_clean) = (false, false);
            match rng.below(4) {
                0 => {
                    host.detach().unwrap();
                    is_clean = true;
                    if rng.below(2) == 0 {
                        bench.wipe_local();
                    }
                }
                1 => {
                    drain(host.volume());
                    host.abandon().unwrap();
                    bench.wipe_local();
                    force = true;
                }
                2 => {
                    drain(host.volume());
                    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 20).await);
                    host.abandon().unwrap();
                }
                _ => host.abandon().unwrap(),
            }
        }
        spoil(&bench.dir.path().join("store/vol"));
        let is_known = is_readable(&bench);
        let has_log = bench.log().exists();
        let opts = if is_known || has_log { Options { force, ..options() } } else { sized(SIZE) };
        let report = rebuilt(&bench, &opts);
        eprintln!("{n}, {what}: group {}, {:?}, force {force}, clean {is_clean}", report.group, report.log);
        assert_eq!((report.groups_given_up, report.size_bytes), (0, SIZE as u64), "{what}: {report:#?}");
        assert_eq!(report.manifest == ManifestState::Good, is_known);
        // Twice is once.
        let again = rebuilt(&bench, &Options { force, ..options() });
        assert_eq!((again.group, again.mapped_blocks), (report.group, report.mapped_blocks));
        assert_eq!((again.manifest, again.map_from), (ManifestState::Good, MapFrom::Checkpoint));
        let host = attach(&bench, force);
        on_lane(host.volume(), async |e| compare(&e, &model, &format!("{n}, {what}")).await);
        on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 30).await);
        host.detach().unwrap();
        bench.wipe_local();
        let host = attach(&bench, false);
        on_lane(host.volume(), async |e| compare(&e, &model, &format!("{n}, {what}, later")).await);
        host.detach().unwrap();
    }
}

#[test]
fn what_was_acknowledged_and_not_uploaded_comes_back_with_the_log() {
    for spoil in [MAPS[2].1, MAPS[3].1] {
        let bench = Bench::new(MIB);
        let host = bench.attach().unwrap();
        on_lane(host.volume(), async |e| put(&e, 0, 10, 1).await);
        drain(host.volume());
        on_lane(host.volume(), async |e| {
            put(&e, 5, 10, 2).await;
            e.discard(Lba(0), 16, false).await.unwrap();
        });
        host.abandon().unwrap();
        let before = local_log(&bench.log()).unwrap().superblock.confirmed;
        spoil(&bench.dir.path().join("store/vol"));
        let report = rebuilt(&bench, &options());
        assert!(matches!(report.log, LogFate::Replayed(n) if n > report.through), "{report:#?}");
        let m = manifest(&bench);
        assert_eq!((m.nonce, m.writer.as_ref().map(|w| w.host.as_str())), (before, Some("here")));
        // Nobody takes it from here, with the log left behind.
        let other = AttachOptions { log_path: bench.dir.path().join("other/vol.wal"), ..bench.options() };
        assert_eq!(Host::attach(other).map(|_| ()).unwrap_err().kind(), ErrorKind::Busy);
        assert_blocks(&bench, &[0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 0]);
    }
}

#[test]
fn a_volume_that_never_uploaded_anything_comes_back_from_its_log() {
    let bench = Bench::new(MIB);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 3, 2, 7).await);
    host.abandon().unwrap();
    remove(&manifest_path(&bench));
    let report = rebuilt(&bench, &options());
    assert_eq!((report.group, report.size_bytes), (0, MIB as u64));
    assert_blocks(&bench, &[0, 0, 0, 7, 7, 0]);
    // And with neither there is nothing.
    let empty = Bench::new(MIB);
    remove(&manifest_path(&empty));
    refused(&empty, &sized(MIB), ErrorKind::NotFound, &["nothing to rebuild it from"]);
}

#[test]
fn a_group_that_was_lost_is_refused_by_name_and_given_up_with_leave() {
    let spoils: [(&str, Spoil, &str); 3] = [
        ("missing", remove, "not in the store"),
        ("header", |p| flip(p, 300), "checksum"),
        ("cut", |p| fs::write(p, &fs::read(p).unwrap()[..99]).unwrap(), "99"),
    ];
    for (what, spoil, why) in spoils {
        for (map, lose_map) in &MAPS[..4] {
            let bench = three_groups(true);
            let chunk = objects(&bench, "chunks")[1].clone();
            spoil(&chunk);
            lose_map(&bench.dir.path().join("store/vol"));
            let opts = if is_readable(&bench) { options() } else { sized(MIB) };
            refused(&bench, &opts, ErrorKind::Corrupt, &[&name(&chunk), why, "group 1 ", "--accept-loss"]);
            let report = rebuilt(&bench, &with_loss(opts));
            assert_eq!((report.group, report.groups_given_up), (1, 2), "{what}, {map}: {report:#?}");
            assert!(report.lost[0].key.ends_with(&name(&chunk)), "{report:#?}");
            if what == "missing" {
                assert_eq!((report.lost[0].group, report.lost[0].entries.is_some()), (Some(2), true), "{report:#?}");
            }
            assert_blocks(&bench, &first_groups(1));
            assert_blocks(&bench, &first_groups(1));
        }
    }
}

#[test]
fn what_a_lost_chunk_held_is_told_by_its_neighbours() {
    // In a large log, a group has room for all of it.
    let bench = Bench { log_bytes: 512 << 20, ..Bench::new(32 * MIB) };
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| {
        for mib in 0..10 {
            put(&e, mib * 256, 256, 2).await;
        }
    });
    host.detach().unwrap();
    bench.wipe_local();
    let chunks = objects(&bench, "chunks");
    assert_eq!(chunks.len(), 3);
    remove(&chunks[1]);
    remove(&manifest_path(&bench));
    // An incomplete last group may never have been whole, and nothing says it was.
    let dry = Options { dry_run: true, ..sized(32 * MIB) };
    assert_eq!(over(&*bench.store(), &bench, &dry).unwrap().groups_given_up, 0);
    // A checkpoint says so.
    let bench = Bench { log_bytes: 512 << 20, ..Bench::new(32 * MIB) };
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| {
        for mib in 0..10 {
            put(&e, mib * 256, 256, 2).await;
        }
    });
    host.detach().unwrap();
    let chunks = objects(&bench, "chunks");
    remove(&chunks[1]);
    each_part(&bench.dir.path().join("store/vol"), remove);
    // 1016 blocks a chunk.
    let place = format!("somewhere in sectors {} to {}", 1016 * 8, 2032 * 8 - 1);
    refused(&bench, &options(), ErrorKind::Corrupt, &[&name(&chunks[1]), &place, "group 1, entries 1 to 10"]);
}

#[test]
fn a_good_checkpoint_is_built_upon() {
    // What lies before it may be lost: reads of it fail as before, and what came after it is given up alone.
    let bench = three_groups(true);
    let host = bench.attach().unwrap();
    for n in 3..6u8 {
        on_lane(host.volume(), async |e| put(&e, u64::from(n) * 10, 10, n + 1).await);
        drain(host.volume());
    }
    host.abandon().unwrap();
    bench.wipe_local();
    let chunks = objects(&bench, "chunks");
    remove(&chunks[0]);
    flip(&chunks[4], 300);
    refused(&bench, &options(), ErrorKind::Busy, &["--force", "whose log is not here"]);
    let forced = Options { force: true, ..options() };
    refused(&bench, &forced, ErrorKind::Corrupt, &[&name(&chunks[4]), "group 4 "]);
    let report = over(&*bench.store(), &bench, &with_loss(forced)).unwrap();
    assert_eq!((report.map_from, report.group, report.groups_given_up), (MapFrom::Checkpoint, 4, 2), "{report:#?}");
    let host = attach(&bench, false);
    on_lane(host.volume(), async |e| {
        for (block, want) in [(0, Err(IoFault::Io)), (10, Ok(2)), (29, Ok(3)), (39, Ok(4)), (40, Ok(0))] {
            assert_eq!(get(&e, block).await, want, "block {block}");
        }
    });
    host.detach().unwrap();
}

#[test]
fn without_manifest_and_log_it_wants_to_be_told_that_no_host_has_the_volume() {
    for spoil in [MAPS[2].1, MAPS[3].1] {
        let bench = three_groups(true);
        spoil(&bench.dir.path().join("store/vol"));
        let unsure = Options { force: false, ..sized(MIB) };
        refused(&bench, &unsure, ErrorKind::Busy, &["--force", "no manifest says", "is not here"]);
        let dry = over(&*bench.store(), &bench, &Options { dry_run: true, ..unsure }).unwrap();
        assert_eq!(rebuilt(&bench, &sized(MIB)).group, dry.group);
    }
}

#[test]
fn a_damaged_block_stays_mapped_and_unreadable() {
    let bench = three_groups(true);
    flip(&objects(&bench, "chunks")[1], HEADER_ROOM + 4 * BLOCK + 77);
    remove(&manifest_path(&bench));
    let report = over(&*bench.store(), &bench, &sized(MIB)).unwrap();
    assert_eq!((report.groups_given_up, report.mapped_blocks), (0, 30));
    let host = attach(&bench, false);
    on_lane(host.volume(), async |e| {
        assert_eq!((get(&e, 13).await, get(&e, 14).await, get(&e, 15).await), (Ok(2), Err(IoFault::Io), Ok(2)));
    });
    host.detach().unwrap();
}

/// The log has what the lost objects had, as far as it knows: nothing is lost, and no leave is needed.
#[test]
fn the_log_covers_what_the_store_has_lost() {
    for lose_map in [None, Some(MAPS[2].1)] {
        let bench = Bench::new(MIB);
        let host = bench.attach().unwrap();
        on_lane(host.volume(), async |e| put(&e, 0, 10, 1).await);
        drain(host.volume());
        on_lane(host.volume(), async |e| put(&e, 5, 10, 2).await);
        // The log as of now: its packed mark knows nothing of the second group.
        volume_support::pause(std::time::Duration::from_millis(200));
        let copy = bench.dir.path().join("copy");
        fs::copy(bench.log(), &copy).unwrap();
        drain(host.volume());
        on_lane(host.volume(), async |e| put(&e, 30, 1, 3).await);
        drain(host.volume());
        host.abandon().unwrap();
        fs::copy(&copy, bench.log()).unwrap();
        flip(&objects(&bench, "chunks")[1], 300);
        let e = bench.attach().map(|_| ()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
        lose_map.iter().for_each(|lose: &Spoil| lose(&bench.dir.path().join("store/vol")));
        let report = rebuilt(&bench, &options());
        assert_eq!((report.group, report.groups_given_up), (1, 0), "{report:#?}");
        assert!(matches!(report.log, LogFate::Replayed(_)), "{report:#?}");
        let host = bench.attach().unwrap();
        on_lane(host.volume(), async |e| assert_eq!((get(&e, 4).await, get(&e, 14).await), (Ok(1), Ok(2))));
        host.detach().unwrap();
    }
}

#[test]
fn a_log_that_knows_of_more_than_the_store_has_is_not_left_behind_silently() {
    for lose_map in [MAPS[1].1, MAPS[2].1] {
        let bench = Bench::new(MIB);
        let host = bench.attach().unwrap();
        for n in 0..3u8 {
            on_lane(host.volume(), async |e| put(&e, u64::from(n) * 10, 10, n + 1).await);
            drain(host.volume());
        }
        host.detach().unwrap();
        remove(&objects(&bench, "chunks")[2]);
        lose_map(&bench.dir.path().join("store/vol"));
        refused(&bench, &options(), ErrorKind::Corrupt, &["vol.wal says that entries up to", "group 2 "]);
        let report = rebuilt(&bench, &with_loss(options()));
        assert_eq!(report.group, 2);
        let host = attach(&bench, false);
        on_lane(host.volume(), async |e| assert_eq!((get(&e, 19).await, get(&e, 20).await), (Ok(2), Ok(0))));
        host.detach().unwrap();
        assert!(bench.dir.path().join("wal/vol.wal.aside-1").exists() || report.log == LogFate::Packed);
    }
}

#[test]
fn chunks_of_two_volumes_are_refused_by_name() {
    let (bench, other) = (three_groups(true), Bench::new(MIB));
    for n in 0..2u8 {
        let host = other.attach().unwrap();
        on_lane(host.volume(), async |e| put(&e, 0, 4, n).await);
        host.detach().unwrap();
    }
    let alien = objects(&other, "chunks").pop().unwrap();
    fs::copy(&alien, bench.dir.path().join("store/vol/chunks").join(name(&alien))).unwrap();
    let uuids: BTreeSet<String> = [&bench, &other].map(|b| manifest(b).uuid.to_string()).into();
    remove(&manifest_path(&bench));
    let uuids: Vec<&str> = uuids.iter().map(String::as_str).collect();
    refused(&bench, &sized(MIB), ErrorKind::Corrupt, &[&["2 volumes"], &uuids[..]].concat());
}

#[test]
fn a_size_that_nobody_knows_has_to_be_given() {
    let bench = three_groups(true);
    remove(&manifest_path(&bench));
    let least = format!("byte {}:", 30 * BLOCK);
    refused(&bench, &options(), ErrorKind::Usage, &["--size", &least]);
    refused(&bench, &sized(29 * BLOCK), ErrorKind::Corrupt, &["--size is too small"]);
    refused(&bench, &sized(4097), ErrorKind::Usage, &["multiple of 4096"]);
    rebuilt(&bench, &sized(30 * BLOCK));
    refused(&bench, &sized(MIB), ErrorKind::Usage, &["leave out --size"]);
    assert_blocks(&bench, &first_groups(3)[..30]);
}

#[test]
fn a_damaged_manifest_is_kept_under_a_free_name() {
    let bench = three_groups(true);
    for n in 1..3 {
        let garbage = format!("garbage {n}");
        fs::write(manifest_path(&bench), &garbage).unwrap();
        let report = rebuilt(&bench, &sized(MIB));
        let key = format!("vol/manifest.json.damaged-{n}");
        assert_eq!(report.kept_as.as_ref(), Some(&key));
        assert_eq!(fs::read_to_string(bench.dir.path().join("store").join(key)).unwrap(), garbage);
    }
    assert_blocks(&bench, &first_groups(3));
}

/// Three groups in the store, and a write that is in the log alone.
fn three_groups_and_a_log() -> Bench {
    let bench = Bench::new(MIB);
    let host = bench.attach().unwrap();
    for n in 0..3u8 {
        on_lane(host.volume(), async |e| put(&e, u64::from(n) * 10, 10, n + 1).await);
        drain(host.volume());
    }
    on_lane(host.volume(), async |e| put(&e, 30, 10, 4).await);
    host.abandon().unwrap();
    bench
}

/// Cut short at any call it has done no harm, and the next one brings it to its end.
#[test]
fn an_interrupted_rebuild_is_begun_anew() {
    let each_call = |lose_map: Spoil, with_log: bool| {
        let mut calls = 0;
        loop {
            let bench = if with_log { three_groups_and_a_log() } else { three_groups(true) };
            lose_map(&bench.dir.path().join("store/vol"));
            let cut = if calls % 2 == 0 { Fault::Before } else { Fault::After };
            let at = calls / 2;
            let store =
                FaultStore::new(
                    bench.store(),
                    move |c| if c.number >= at { cut(ErrorKind::Denied) } else { Fault::None },
                );
            let opts = |bench| if with_log || is_readable(bench) { options() } else { sized(MIB) };
            let done = over(&store, &bench, &opts(&bench)).is_ok();
            if !done {
                over(&*bench.store(), &bench, &opts(&bench)).unwrap();
            }
            assert_blocks(&bench, &if with_log { (0..40).map(|b| b / 10 + 1).collect() } else { first_groups(3) });
            if done {
                break;
            }
            calls += 1;
        }
        assert!(calls >= 12, "{calls} calls were cut short");
    };
    std::thread::scope(|s| {
        for (lose_map, with_log) in MAPS[1..4].iter().flat_map(|m| [(m.1, false), (m.1, true)]) {
            s.spawn(move || each_call(lose_map, with_log));
        }
    });
}

#[test]
fn a_manifest_that_changes_meanwhile_is_left_alone() {
    let bench = three_groups(true);
    let mut begun = false;
    let done = block_on(rebuild(&*bench.store(), "vol", &options(), None, &mut |_| {
        if !std::mem::replace(&mut begun, true) {
            std::thread::scope(|s| drop(s.spawn(|| bench.attach().unwrap().detach().unwrap())));
        }
    }));
    assert_eq!(done.unwrap_err().kind(), ErrorKind::Conflict);
    assert_blocks(&bench, &first_groups(3));
}

#[test]
fn what_goes_wrong_on_the_way_is_no_damage() {
    for op in [Op::Get, Op::GetRange] {
        for nth in 0..4 {
            let bench = three_groups(true);
            each_part(&bench.dir.path().join("store/vol"), |p| flip(p, 80));
            let mut script = vec![(op, Fault::None); nth];
            script.push((op, Fault::Flip(2400)));
            let report = over(&FaultStore::script(bench.store(), script), &bench, &options()).unwrap();
            assert_eq!((report.group, report.groups_given_up), (3, 0), "{op:?} {nth}");
        }
    }
}

/// The built binary; the log is where it looks for it by itself.
#[test]
fn the_command_says_it_to_people_and_to_scripts() {
    let bench = Bench::new(MIB);
    let run = |args: &[&str]| volume_command(&bench, "rebuild", args);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 0, 10, 1).await);
    drain(host.volume());
    // Whoever has the log has the volume.
    let out = run(&["vol"]);
    assert!(text(&out.stderr).contains("in use by another process"), "{out:?}");
    on_lane(host.volume(), async |e| put(&e, 5, 10, 2).await);
    host.abandon().unwrap();
    fs::write(manifest_path(&bench), "garbage").unwrap();
    let out = run(&["vol", "--dry-run"]);
    let said = text(&out.stdout);
    assert!(out.status.success() && said.contains("would be rebuilt as of group 1"), "{out:?}");
    let out = run(&["vol", "--json"]);
    assert_eq!((out.status.code(), text(&out.stderr).as_str()), (Some(0), ""), "{out:?}");
    let json: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((&json["group"], &json["kept_as"]), (&1.into(), &"vol/manifest.json.damaged-1".into()), "{json:#}");
    assert_eq!((&json["size_bytes"], &json["groups_given_up"]), (&MIB.into(), &0.into()), "{json:#}");
    assert!(json["log"]["replayed"].is_u64(), "{json:#}");
    let out = run(&["vol"]);
    let said = text(&out.stdout);
    assert!(said.contains("its good checkpoint") && said.contains("log: the next `vb-ublk add`"), "{said}");
    assert_blocks(&bench, &[1, 1, 1, 1, 1, 2, 2]);
    let out = run(&["vol", "--wal-dir", "/does/not/exist"]);
    assert!(out.status.code() == Some(1) && text(&out.stderr).contains("there is no log"), "{out:?}");
    let out = run(&["other"]);
    assert!(out.status.code() == Some(1) && text(&out.stderr).contains("nothing to rebuild it from"), "{out:?}");
}
