//! Verifying a volume: all damage is told, by its sectors where it has any, and nothing else is.

mod command_support;
mod damage_support;
mod support_rng;
#[expect(dead_code, reason = "nothing here has to wait")]
mod volume_support;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use command_support::{everything, text, volume_command};
use damage_support::{a_group_of_three, flip, name, objects, rot, three_groups};
use serde_json::Value;
use support_rng::Rng;
use vb_ublk::chunk::header::HEADER_ROOM;
use vb_ublk::disk::IoBuf;
use vb_ublk::error::{ErrorKind, Result};
use vb_ublk::store::fault::{Fault, FaultStore};
use vb_ublk::store::retry::{Policy, Retry};
use vb_ublk::store::{Op, Store};
use vb_ublk::units::{BLOCK, Lba, SECTOR};
use vb_ublk::volume::damage::{DamageKind, Report};
use vb_ublk::volume::engine::Engine;
use vb_ublk::volume::host::{AttachOptions, Host};
use vb_ublk::volume::verify::{Progress, verify};
use volume_support::{Bench, block_on, buf_of, churn, compare, drain, on_lane, put};

/// Where something is damaged: sectors, and how many.
type Place = (DamageKind, Option<u64>, Option<u64>);
/// What is done to an object.
type Spoil = fn(&Path);

fn blocks(kind: DamageKind, blocks: std::ops::Range<u64>) -> Place {
    (kind, Some(blocks.start * 8), Some((blocks.end - blocks.start) * 8))
}

fn object(kind: DamageKind) -> Place {
    (kind, None, None)
}

fn over(store: &dyn Store) -> Result<Report> {
    block_on(verify(store, "vol", &mut |_| {}))
}

/// What a verification tells, after a look at what it may not do: change anything.
fn verified(bench: &Bench) -> Report {
    let before = everything(bench);
    let report = over(&*bench.store()).unwrap();
    assert!(before == everything(bench), "a verification has changed the store");
    assert_eq!(report.is_well(), report.damage.is_empty());
    for d in &report.damage {
        assert!(!d.why.is_empty() && !d.why.contains('\n') && !d.meaning.is_empty() && !d.advice.is_empty(), "{d:?}");
    }
    report
}

fn places(report: &Report) -> Vec<Place> {
    report.damage.iter().map(|d| (d.kind, d.lba, d.sectors)).collect()
}

/// The damage is at `expected`, all of it in `key`.
#[track_caller]
fn assert_damage(report: &Report, expected: &[Place], key: &str) {
    assert_eq!(places(report), expected, "{report:#?}");
    assert!(report.damage.iter().all(|d| d.key.ends_with(key)), "{key}: {report:#?}");
}

fn flip_block(path: &Path, block: usize) {
    flip(path, HEADER_ROOM + block * BLOCK + 77);
}

fn cut(path: &Path, bytes: usize) {
    fs::write(path, &fs::read(path).unwrap()[..bytes]).unwrap();
}

/// Exactly those sectors fail to be read that the report names.
#[track_caller]
fn assert_reads_agree(bench: &Bench, report: &Report, sectors: u64) {
    let is_bad = |lba: u64| {
        report.damage.iter().any(|d| d.lba.zip(d.sectors).is_some_and(|(first, n)| (first..first + n).contains(&lba)))
    };
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| {
        for lba in 0..sectors {
            let read = e.read(Lba(lba), IoBuf::zeroed(SECTOR)).await;
            assert_eq!(read.is_err(), is_bad(lba), "sector {lba}: {report:#?}");
        }
    });
    host.detach().unwrap();
    bench.wipe_local();
}

#[test]
fn a_new_volume_is_well() {
    let bench = Bench::new(1 << 20);
    let report = verified(&bench);
    assert!(report.is_well() && report.notes.is_empty(), "{report:?}");
    let state = report.state.unwrap();
    assert_eq!((state.epoch, state.mapped_blocks, report.chunks, report.bytes_read), (0, 0, 0, 0));
}

#[test]
fn a_volume_with_a_past_is_well_to_its_last_block() {
    const SIZE: usize = 24 << 20;
    let bench = Bench::new(SIZE);
    let mut model = vec![0; SIZE];
    let mut rng = Rng(21);
    for life in 0..4 {
        let host = bench.attach().unwrap();
        on_lane(host.volume(), async |e| {
            compare(&e, &model, &format!("life {life}")).await;
            churn(&e, &mut model, &mut rng, if life == 0 { 700 } else { 60 }).await;
        });
        drain(host.volume());
        let mapped = host.volume().status().mapped_blocks;
        if life == 2 {
            host.abandon().unwrap()
        } else {
            host.detach().unwrap()
        }
        let mut last = Progress::default();
        let report = block_on(verify(&*bench.store(), "vol", &mut |p| last = p)).unwrap();
        assert!(report.is_well(), "life {life}: {report:#?}");
        assert_eq!(report.notes.is_empty(), life != 2, "life {life}: {report:#?}");
        assert_eq!((report.blocks_checked, last.blocks, last.of), (mapped, mapped, mapped), "life {life}");
        assert!(report.chunks as usize <= objects(&bench, "chunks").len() && report.chunks > 0);
        assert!(report.bytes_read > report.blocks_checked * BLOCK as u64);
        assert_eq!(report.state.unwrap().epoch, life + 1);
    }
}

#[test]
fn damage_in_a_chunk_is_told_by_its_sectors_as_reads_meet_it() {
    let cases: [(&str, Spoil, Place); 6] = [
        ("a flipped block", |p| flip_block(p, 4), blocks(DamageKind::Checksum, 14..15)),
        ("a flipped header", |p| flip(p, 300), blocks(DamageKind::Header, 10..20)),
        ("a missing chunk", |p| fs::remove_file(p).unwrap(), blocks(DamageKind::Missing, 10..20)),
        ("a chunk that ends early", |p| cut(p, HEADER_ROOM + 6 * BLOCK + 9), blocks(DamageKind::Cut, 16..20)),
        ("a chunk without its data", |p| cut(p, HEADER_ROOM), blocks(DamageKind::Cut, 10..20)),
        ("a chunk cut in its header", |p| cut(p, 99), blocks(DamageKind::Cut, 10..20)),
    ];
    for (what, spoil, place) in cases {
        let bench = three_groups(true);
        let chunk = objects(&bench, "chunks")[1].clone();
        spoil(&chunk);
        let report = verified(&bench);
        eprintln!("{what}: {:?}", report.damage);
        assert_damage(&report, &[place], &name(&chunk));
        assert_eq!(report.damaged_sectors, place.2.unwrap(), "{what}");
        assert_eq!(report.chunks_missing, u64::from(place.0 == DamageKind::Missing), "{what}");
        assert_eq!((report.chunks, report.unlisted_sectors), (3, 0), "{what}");
        assert_reads_agree(&bench, &report, 40 * 8);
    }
}

#[test]
fn damage_is_told_in_order_and_joined_where_it_goes_on() {
    let bench = three_groups(true);
    let chunks = objects(&bench, "chunks");
    for (chunk, block) in [(2, 9), (0, 3), (1, 0), (1, 2), (1, 3), (0, 9)] {
        flip_block(&chunks[chunk], block);
    }
    let report = verified(&bench);
    let expected = [3..4, 9..10, 10..11, 12..14, 29..30].map(|b| blocks(DamageKind::Checksum, b));
    assert_damage(&report, &expected, "");
    assert_reads_agree(&bench, &report, 40 * 8);
}

#[test]
fn damage_that_nobody_reads_is_not_told() {
    let bench = Bench::new(1 << 20);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 0, 20, 1).await);
    drain(host.volume());
    on_lane(host.volume(), async |e| {
        put(&e, 2, 3, 2).await;
        e.discard(Lba(8 * 8), 4 * 8, false).await.unwrap();
        e.write_zeroes(Lba(15 * 8), 8, false).await.unwrap();
    });
    host.detach().unwrap();
    bench.wipe_local();
    let first = &objects(&bench, "chunks")[0];
    for block in [2, 4, 8, 11, 15] {
        flip_block(first, block);
    }
    let report = verified(&bench);
    assert!(report.is_well() && report.blocks_checked == 15, "{report:#?}");
    flip_block(first, 7);
    let report = verified(&bench);
    assert_damage(&report, &[blocks(DamageKind::Checksum, 7..8)], &name(first));
    assert_reads_agree(&bench, &report, 20 * 8);
    // A chunk that holds no block any more may be gone.
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 0, 20, 3).await);
    host.detach().unwrap();
    fs::remove_file(first).unwrap();
    assert!(verified(&bench).is_well());
}

#[test]
fn sectors_that_were_lost_before_they_were_packed_are_told() {
    let bench = Bench::new(1 << 20);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 20, 4, 0x33).await);
    drain(host.volume());
    on_lane(host.volume(), async |e| {
        e.write(Lba(11 * 8), buf_of(&[0x42; BLOCK]), true).await.unwrap();
        e.write(Lba(21 * 8 + 3), buf_of(&[0x51; SECTOR]), true).await.unwrap();
    });
    rot(&bench, &[0x42; BLOCK]);
    rot(&bench, &[0x51; SECTOR]);
    host.detach().unwrap();
    bench.wipe_local();
    let report = verified(&bench);
    let one_sector = (DamageKind::Lost, Some(21 * 8 + 3), Some(1));
    assert_damage(&report, &[blocks(DamageKind::Lost, 11..12), one_sector], ".chunk");
    assert_reads_agree(&bench, &report, 40 * 8);
}

#[test]
fn damaged_checkpoint_parts_are_all_named() {
    let bench = Bench::new(8 << 20);
    let host = bench.attach().unwrap();
    // Every other block, so that the full image is large and a delta worth its while.
    on_lane(host.volume(), async |e| {
        for i in 0..600 {
            put(&e, i * 2, 1, 1).await;
        }
    });
    host.detach().unwrap();
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 4, 1, 2).await);
    host.detach().unwrap();
    let parts = objects(&bench, "checkpoints");
    let [full, delta] = &parts[..] else { panic!("a full image and a delta: {parts:?}") };
    let good = [fs::read(full).unwrap(), fs::read(delta).unwrap()];
    assert!(verified(&bench).is_well());
    let spoils: [(Spoil, &str); 3] = [
        (|p| flip(p, 90), "SHA-256"),
        (|p| cut(p, 80), "bytes"),
        (|p| fs::remove_file(p).unwrap(), "not in the store"),
    ];
    for (spoil, what) in spoils {
        for part in [full, delta] {
            spoil(part);
            let report = verified(&bench);
            assert_damage(&report, &[object(DamageKind::Checkpoint)], &name(part));
            assert!(report.damage[0].why.contains(what), "{report:?}");
            assert!(report.state.is_none() && report.blocks_checked == 0);
            fs::write(full, &good[0]).unwrap();
            fs::write(delta, &good[1]).unwrap();
        }
        spoil(full);
        spoil(delta);
        let report = verified(&bench);
        assert_damage(&report, &[object(DamageKind::Checkpoint); 2], ".map");
        assert_ne!(report.damage[0].key, report.damage[1].key);
        fs::write(full, &good[0]).unwrap();
        fs::write(delta, &good[1]).unwrap();
    }
    assert!(verified(&bench).is_well());
}

#[test]
fn a_damaged_or_missing_manifest_is_damage_and_no_volume_is_an_error() {
    let bench = three_groups(true);
    let path = bench.dir.path().join("store/vol/manifest.json");
    let good = fs::read(&path).unwrap();
    let spoils: [Spoil; 3] = [|p| flip(p, 200), |p| cut(p, 100), |p| cut(p, 0)];
    for spoil in spoils {
        spoil(&path);
        let report = verified(&bench);
        assert_damage(&report, &[object(DamageKind::Manifest)], "vol/manifest.json");
        assert!(report.state.is_none() && report.blocks_checked == 0);
        fs::write(&path, &good).unwrap();
    }
    fs::remove_file(&path).unwrap();
    let report = verified(&bench);
    assert_damage(&report, &[object(DamageKind::Manifest)], "vol/manifest.json");
    assert!(report.damage[0].why.contains("4 other objects"), "{report:?}");
    let e = block_on(verify(&*bench.store(), "other", &mut |_| {})).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::NotFound, "{e}");
    let e = block_on(verify(&*bench.store(), "../vol", &mut |_| {})).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Usage, "{e}");
}

#[test]
fn groups_after_the_checkpoint_are_verified_too() {
    let bench = three_groups(false);
    let report = verified(&bench);
    let state = report.state.clone().unwrap();
    assert_eq!((state.checkpoint_group, state.group, report.blocks_checked), (0, 3, 30));
    assert!(report.is_well() && report.notes[0].contains("attached by"), "{report:?}");
    let chunks = objects(&bench, "chunks");
    let good = chunks.iter().map(|c| fs::read(c).unwrap()).collect::<Vec<_>>();
    let mend = || chunks.iter().zip(&good).for_each(|(c, bytes)| fs::write(c, bytes).unwrap());

    flip_block(&chunks[2], 5);
    assert_damage(&verified(&bench), &[blocks(DamageKind::Checksum, 25..26)], &name(&chunks[2]));
    mend();
    // A header that cannot be read stops an attach. What comes before it is checked all the same.
    flip(&chunks[1], 300);
    flip_block(&chunks[0], 1);
    let report = verified(&bench);
    assert_eq!(places(&report), [object(DamageKind::Group), blocks(DamageKind::Checksum, 1..2)], "{report:#?}");
    assert!(report.damage[0].key.ends_with(&name(&chunks[1])) && report.blocks_checked == 10, "{report:#?}");
    mend();
    fs::remove_file(&chunks[0]).unwrap();
    let report = verified(&bench);
    assert_damage(&report, &[object(DamageKind::Group)], "vol/chunks/");
    assert!(report.damage[0].why.contains("group 1 "), "{report:?}");
    mend();
    // The last group may not have been uploaded.
    fs::remove_file(&chunks[2]).unwrap();
    let report = verified(&bench);
    assert!(report.is_well() && report.blocks_checked == 20, "{report:#?}");
}

#[test]
fn a_group_that_is_being_uploaded_is_left_out_and_named() {
    let bench = a_group_of_three();
    let chunks = objects(&bench, "chunks");
    assert_eq!(chunks.len(), 4);
    assert_eq!(verified(&bench).blocks_checked, 2560);
    fs::remove_file(&chunks[2]).unwrap();
    let report = verified(&bench);
    assert!(report.is_well() && report.blocks_checked == 100, "{report:#?}");
    assert!(report.notes.iter().any(|n| n.contains("group 2 ") && n.contains("2 of its 3 chunks")), "{report:#?}");
}

#[test]
fn what_changes_meanwhile_is_no_damage() {
    let bench = three_groups(true);
    let mut begun = false;
    let report = block_on(verify(&*bench.store(), "vol", &mut |_| {
        if std::mem::replace(&mut begun, true) {
            return;
        }
        std::thread::scope(|s| {
            s.spawn(|| {
                let host = bench.attach().unwrap();
                on_lane(host.volume(), async |e| put(&e, 5, 20, 9).await);
                host.detach().unwrap();
            });
        });
    }))
    .unwrap();
    assert!(report.is_well() && report.blocks_checked == 30, "{report:#?}");
    assert_eq!(report.state.unwrap().epoch, 1);
    assert!(report.notes[0].contains("changed meanwhile"), "{:?}", report.notes);
    assert!(verified(&bench).is_well());
}

#[test]
fn what_goes_wrong_on_the_way_is_no_damage() {
    let bench = three_groups(true);
    let clean = over(&*bench.store()).unwrap();
    for op in [Op::Get, Op::GetRange] {
        for nth in 0..4 {
            for fault in [Fault::Flip(2400), Fault::Truncate(700)] {
                let mut script = vec![(op, Fault::None); nth];
                script.push((op, fault));
                let report = over(&FaultStore::script(bench.store(), script));
                assert_eq!(report.unwrap(), clean, "{op:?} {nth} {fault:?}");
            }
        }
        let script = vec![(op, Fault::Before(ErrorKind::Throttled)), (op, Fault::After(ErrorKind::TimedOut))];
        let store = Retry::new(Arc::new(FaultStore::script(bench.store(), script)), Policy::attach());
        assert_eq!(over(&store).unwrap(), clean, "{op:?}");
    }
}

#[test]
fn a_store_that_is_away_is_an_error_and_no_damage() {
    let bench = three_groups(true);
    for kind in [ErrorKind::Unreachable, ErrorKind::Denied] {
        for op in [Op::Get, Op::GetRange] {
            let away =
                FaultStore::new(bench.store(), move |c| if c.op == op { Fault::Before(kind) } else { Fault::None });
            let e = over(&away).unwrap_err();
            assert_eq!(e.kind(), kind, "{e}");
            assert!(e.to_string().contains("vol"), "{e}");
        }
    }
    // Nothing of it is there all at once: deleted, or a file system that was unmounted.
    let gone =
        FaultStore::new(bench.store(), |c| if c.number < 3 { Fault::None } else { Fault::Before(ErrorKind::NotFound) });
    let e = over(&gone).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::NotFound, "{e}");
    assert!(e.to_string().contains("says nothing"), "{e}");
}

/// The built binary, in surroundings of its own.
#[test]
fn the_command_says_it_to_people_and_to_scripts() {
    let bench = three_groups(true);
    let run = |args: &[&str]| volume_command(&bench, "verify", args);
    let out = run(&["vol"]);
    assert_eq!((out.status.code(), text(&out.stderr).as_str()), (Some(0), ""), "{out:?}");
    let said = text(&out.stdout);
    assert!(
        said.contains("volume vol is well: 30 blocks (120 KiB) in 3 chunks") && said.lines().count() == 1,
        "{said}"
    );
    let out = run(&["vol", "--json"]);
    assert_eq!((out.status.code(), text(&out.stderr).as_str()), (Some(0), ""), "{out:?}");
    let json: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((&json["damage"], &json["blocks_checked"]), (&Value::Array(vec![]), &Value::from(30)));

    let chunks = objects(&bench, "chunks");
    flip_block(&chunks[1], 4);
    fs::remove_file(&chunks[0]).unwrap();
    let out = run(&["vol"]);
    let (said, line) = (text(&out.stdout), text(&out.stderr));
    eprintln!("{said}{line}");
    assert_eq!((out.status.code(), line.lines().count()), (Some(1), 1), "{out:?}");
    assert!(line.starts_with("vb-ublk: volume vol in file://") && line.contains("88 sectors (44 KiB)"), "{line}");
    assert!(!line.contains('\x1b'), "{line}");
    let rows: Vec<Vec<&str>> = said.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(rows[0][..4], ["LBA", "SECTORS", "DAMAGE", "OBJECT"]);
    assert_eq!(rows[1][..3], ["0", "80", "missing"]);
    assert_eq!(rows[2][..4], ["112", "8", "checksum", &format!("vol/chunks/{}", name(&chunks[1]))]);
    assert!(said.contains("\nchecksum: reads of these sectors fail") && said.contains("\nmissing: "), "{said}");

    let out = run(&["vol", "--json"]);
    assert_eq!((out.status.code(), text(&out.stderr).lines().count()), (Some(1), 1), "{out:?}");
    let json: Value = serde_json::from_slice(&out.stdout).unwrap();
    let damage = json["damage"].as_array().unwrap();
    assert_eq!(damage.len(), 2);
    assert_eq!((&damage[1]["lba"], &damage[1]["sectors"]), (&Value::from(112), &Value::from(8)));
    assert_eq!((&damage[1]["kind"], &json["chunks_missing"]), (&Value::from("checksum"), &Value::from(1)));
    assert!(damage.iter().all(|d| ["key", "why", "meaning", "advice"].iter().all(|f| d[f].is_string())), "{json}");

    let out = run(&["nosuch"]);
    assert_eq!((out.status.code(), out.stdout.len()), (Some(1), 0), "{out:?}");
    assert!(text(&out.stderr).contains("nosuch"), "{out:?}");
    // Whoever still has it is named.
    let host = Host::attach(AttachOptions { force: true, ..bench.options() }).unwrap();
    let out = run(&["vol"]);
    assert!(text(&out.stdout).contains("note: the volume is attached by host"), "{out:?}");
    host.abandon().unwrap();
}
