//! Cutting the tie of a clone to what it was made from.

use vb_ublk::error::ErrorKind;
use vb_ublk::manifest::Published;
use vb_ublk::units::Lba;
use vb_ublk::volume::engine::Engine;
use vb_ublk::volume::rebuild::{ManifestState, MapFrom, rebuild};
use vb_ublk::volume::{Command, Volume, admin};

use super::gc::{copy_folder, spoil};
use super::snapshots::{attach, clone, delete_snapshot, forced, holds, is_well, snapshot};
use crate::support_rng::Rng;
use crate::volume_support::{Bench, block_on, churn, compare, drain, on_lane, put};

const SIZE: usize = 16 << 20;

fn flatten(volume: &Volume) -> vb_ublk::error::Result<()> {
    block_on(volume.command(Command::Flatten))
}

fn delete(bench: &Bench, volume: &str) -> vb_ublk::error::Result<u64> {
    block_on(admin::delete(&*bench.store(), volume, false))
}

/// A volume of some age, with snapshot `s`, which is what is returned; it goes on after that.
fn parent(bench: &Bench, seed: u64) -> Vec<u8> {
    let (mut model, mut rng) = (vec![0; SIZE], Rng(seed));
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 400).await);
    snapshot(host.volume(), "s").unwrap();
    let kept = model.clone();
    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 100).await);
    host.detach().unwrap();
    kept
}

#[test]
fn a_clone_in_use_comes_to_stand_alone() {
    let bench = Bench::new(SIZE);
    let mut model = parent(&bench, 3);
    clone(&bench, ("vol", "s"), "c", None).unwrap();
    let mut rng = Rng(5);
    let host = attach(&bench, "c").unwrap();
    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 60).await);
    let e = delete_snapshot(&bench, "vol", "s").expect_err("needed");
    assert!(e.kind() == ErrorKind::Busy && e.to_string().contains("c was made from it"), "{e}");
    // Beside its user.
    let volume = host.volume().clone();
    let asked = std::thread::spawn(move || flatten(&volume));
    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 200).await);
    asked.join().unwrap().unwrap();
    assert_eq!(host.volume().status().background.flatten_left_bytes, None);
    on_lane(host.volume(), async |e| compare(&e, &model, "flattened").await);
    flatten(host.volume()).expect("twice is once");
    let m = block_on(Published::load(&*bench.store(), "c")).unwrap().manifest;
    assert!(m.flattened && m.parent().is_none() && m.source(1).is_some());
    delete_snapshot(&bench, "vol", "s").expect("nobody needs it");
    delete(&bench, "vol").expect("nor the volume");
    on_lane(host.volume(), async |e| compare(&e, &model, "alone").await);
    snapshot(host.volume(), "t").unwrap();
    host.detach().unwrap();
    bench.wipe_local();
    holds(&bench, "c", &model);
    is_well(&bench, "c");
    // It may be cloned itself, and its clones have one parent.
    clone(&bench, ("c", "t"), "d", None).unwrap();
    holds(&bench, "d", &model);
    let m = block_on(Published::load(&*bench.store(), "d")).unwrap().manifest;
    assert_eq!(m.parents.len(), 1);
}

#[test]
fn what_is_written_and_published_between_two_batches_is_no_damage() {
    // Several batches of 16 MiB.
    let size = 3 * SIZE;
    let bench = Bench::new(size);
    let mut model: Vec<u8> = (0..size / 4096).flat_map(|b| vec![b as u8 | 1; 4096]).collect();
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| {
        for block in 0..size as u64 / 4096 {
            put(&e, block, 1, block as u8 | 1).await;
        }
    });
    snapshot(host.volume(), "s").unwrap();
    host.detach().unwrap();
    clone(&bench, ("vol", "s"), "c", None).unwrap();
    let host = attach(&bench, "c").unwrap();
    let volume = host.volume().clone();
    let asked = std::thread::spawn(move || flatten(&volume));
    let (mut rng, mut rounds) = (Rng(8), 0);
    while !asked.is_finished() {
        on_lane(host.volume(), async |e| {
            for _ in 0..50 {
                let block = rng.below(size as u64 / 4096);
                put(&e, block, 1, 0xfe).await;
                model[block as usize * 4096..][..4096].fill(0xfe);
            }
        });
        drain(host.volume());
        // A checkpoint is published for it.
        block_on(host.volume().command(Command::CollectGarbage)).unwrap();
        rounds += 1;
    }
    asked.join().unwrap().unwrap();
    assert!(rounds > 0, "no checkpoint in between");
    host.detach().unwrap();
    delete(&bench, "vol").unwrap();
    holds(&bench, "c", &model);
    is_well(&bench, "c");
}

#[test]
fn what_cannot_be_flattened_says_why() {
    let bench = Bench::new(SIZE);
    let model = parent(&bench, 7);
    let host = bench.attach().unwrap();
    let e = flatten(host.volume()).expect_err("no clone");
    assert!(e.kind() == ErrorKind::Usage && e.to_string().contains("is no clone"), "{e}");
    host.detach().unwrap();
    clone(&bench, ("vol", "s"), "c", None).unwrap();
    let host = attach(&bench, "c").unwrap();
    snapshot(host.volume(), "early").unwrap();
    let e = flatten(host.volume()).expect_err("a snapshot needs the parent");
    assert!(e.kind() == ErrorKind::Busy && e.to_string().contains("early"), "{e}");
    host.detach().unwrap();
    delete_snapshot(&bench, "vol", "s").expect_err("c needs it");
    holds(&bench, "c@early", &model);
    delete_snapshot(&bench, "c", "early").unwrap();
    let host = attach(&bench, "c").unwrap();
    flatten(host.volume()).unwrap();
    host.detach().unwrap();
    delete(&bench, "vol").unwrap();
    holds(&bench, "c", &model);
}

#[test]
fn a_clone_of_a_clone_takes_what_it_needs_of_both() {
    let bench = Bench::new(SIZE);
    let mut model = parent(&bench, 11);
    let mut rng = Rng(12);
    clone(&bench, ("vol", "s"), "c", None).unwrap();
    let host = attach(&bench, "c").unwrap();
    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 60).await);
    snapshot(host.volume(), "s").unwrap();
    host.detach().unwrap();
    clone(&bench, ("c", "s"), "d", None).unwrap();
    // Nothing was ever written to it: its only map is its parent's.
    let host = attach(&bench, "d").unwrap();
    flatten(host.volume()).unwrap();
    host.detach().unwrap();
    delete(&bench, "c").unwrap();
    delete(&bench, "vol").unwrap();
    bench.wipe_local();
    holds(&bench, "d", &model);
    is_well(&bench, "d");
}

#[test]
fn one_that_names_nothing_of_its_parent_s_gives_up_its_map() {
    let bench = Bench::new(SIZE);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| {
        put(&e, 5, 3, 7).await;
        e.discard(Lba(0), 800, false).await.unwrap();
    });
    snapshot(host.volume(), "s").unwrap();
    host.detach().unwrap();
    clone(&bench, ("vol", "s"), "c", None).unwrap();
    let host = attach(&bench, "c").unwrap();
    flatten(host.volume()).unwrap();
    host.detach().unwrap();
    delete(&bench, "vol").unwrap();
    holds(&bench, "c", &vec![0; SIZE]);
}

#[test]
fn an_interrupted_one_is_taken_up_again() {
    let bench = Bench::new(SIZE);
    let model = parent(&bench, 17);
    clone(&bench, ("vol", "s"), "c", None).unwrap();
    for _ in 0..3 {
        let host = attach(&bench, "c").unwrap();
        let volume = host.volume().clone();
        let asked = std::thread::spawn(move || flatten(&volume));
        while host.volume().status().background.flatten_left_bytes.is_none() && !asked.is_finished() {
            std::thread::yield_now();
        }
        host.abandon().unwrap();
        let _ = asked.join().unwrap();
    }
    let host = attach(&bench, "c").unwrap();
    flatten(host.volume()).unwrap();
    host.detach().unwrap();
    delete(&bench, "vol").unwrap();
    holds(&bench, "c", &model);
    is_well(&bench, "c");
}

#[test]
fn a_damaged_chunk_of_the_parent_s_keeps_the_tie() {
    let bench = Bench::new(SIZE);
    let model = parent(&bench, 19);
    clone(&bench, ("vol", "s"), "c", None).unwrap();
    let store = bench.store();
    let first = block_on(store.list("vol/chunks/", None)).unwrap()[0].key.clone();
    let (good, _) = block_on(store.get(&first)).unwrap();
    let mut bad = good.to_vec();
    bad[9] ^= 1;
    block_on(store.put(&first, bad.into())).unwrap();
    let host = attach(&bench, "c").unwrap();
    let e = flatten(host.volume()).expect_err("damaged");
    assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains(&first), "{e}");
    delete_snapshot(&bench, "vol", "s").expect_err("c needs it");
    block_on(store.put(&first, good)).unwrap();
    flatten(host.volume()).unwrap();
    host.detach().unwrap();
    delete(&bench, "vol").unwrap();
    holds(&bench, "c", &model);
}

#[test]
fn a_flattened_clone_can_be_rebuilt() {
    let bench = Bench::new(SIZE);
    let mut model = parent(&bench, 23);
    let mut rng = Rng(24);
    clone(&bench, ("vol", "s"), "c", None).unwrap();
    let host = attach(&bench, "c").unwrap();
    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 80).await);
    flatten(host.volume()).unwrap();
    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 80).await);
    host.detach().unwrap();
    delete(&bench, "vol").unwrap();
    bench.wipe_local();
    let (store, folder, kept) = (bench.store(), bench.dir.path().join("store/c"), bench.dir.path().join("kept"));
    copy_folder(&folder, &kept);
    let maps_and_manifest = [(true, false), (false, true), (true, true)];
    for (maps, manifest) in maps_and_manifest {
        copy_folder(&kept, &folder);
        if maps {
            spoil(&folder.join("checkpoints"));
        }
        if manifest {
            std::fs::remove_file(folder.join("manifest.json")).unwrap();
        }
        let what = format!("without maps: {maps}, without the manifest: {manifest}");
        let report =
            block_on(rebuild(&*store, "c", &forced(), None, &mut |_| {})).unwrap_or_else(|e| panic!("{what}: {e}"));
        let state = if manifest { ManifestState::Missing } else { ManifestState::Good };
        assert_eq!(report.manifest, state, "{what}");
        assert_eq!(report.map_from, if maps { MapFrom::Chunks } else { MapFrom::Copy }, "{what}");
        holds(&bench, "c", &model);
        is_well(&bench, "c");
    }
    // Nothing tells what was copied: that is not taken for zeros.
    copy_folder(&kept, &folder);
    spoil(&folder.join("checkpoints"));
    std::fs::remove_dir_all(folder.join("gc")).unwrap();
    for manifest in [true, false] {
        if !manifest {
            std::fs::remove_file(folder.join("manifest.json")).unwrap();
        }
        let e = block_on(rebuild(&*store, "c", &forced(), None, &mut |_| {})).expect_err("nobody knows");
        assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains("was flattened"), "{e}");
    }
}
