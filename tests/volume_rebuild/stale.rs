//! A manifest that was put back from an old copy: never a silent way back in time.

use vb_ublk::volume::damage::DamageKind;
use vb_ublk::volume::verify::verify;

use super::*;
use crate::command_support::everything;

/// Blocks 0 to 9 hold 1 as of the manifest that is kept; 10 to 19 hold 2 since another attachment, which ended as `end` says.
fn with_an_old_manifest(end: impl FnOnce(Host)) -> (Bench, Vec<u8>) {
    let bench = Bench::new(MIB);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 0, 10, 1).await);
    host.detach().unwrap();
    let old = fs::read(manifest_path(&bench)).unwrap();
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 10, 10, 2).await);
    end(host);
    (bench, old)
}

#[track_caller]
fn refuses_to_attach(bench: &Bench, opts: AttachOptions) {
    let before = everything(bench);
    let e = Host::attach(opts).map(|_| ()).unwrap_err();
    let text = e.to_string();
    assert_eq!(e.kind(), ErrorKind::Corrupt, "{text}");
    assert!(text.contains("is older than the volume") && !text.contains('\n'), "{text}");
    assert!(before == everything(bench), "a refusal has changed something");
}

#[test]
fn a_manifest_from_before_the_last_attachment_is_refused_and_rebuilt() {
    let (bench, old) = with_an_old_manifest(|host| host.detach().unwrap());
    let newest = fs::read(manifest_path(&bench)).unwrap();
    fs::write(manifest_path(&bench), &old).unwrap();
    for force in [false, true] {
        // By the log; and on another host, by the chunks.
        refuses_to_attach(&bench, AttachOptions { force, ..bench.options() });
        let log_path = bench.dir.path().join("other/vol.wal");
        refuses_to_attach(&bench, AttachOptions { force, log_path, ..bench.options() });
    }
    let report = block_on(verify(&*bench.store(), "vol", &mut |_| {})).unwrap();
    let found: Vec<_> = report.damage.iter().map(|d| (d.kind, d.why.as_str())).collect();
    assert!(matches!(&found[..], [(DamageKind::Manifest, why)] if why.contains("older than the volume")), "{found:?}");
    // Put back, the newest one serves as ever.
    fs::write(manifest_path(&bench), &newest).unwrap();
    assert_blocks(&bench, &[1, 1]);

    fs::write(manifest_path(&bench), &old).unwrap();
    let report = rebuilt(&bench, &options());
    assert_eq!((report.manifest, report.groups_given_up), (ManifestState::Old, 0), "{report:#?}");
    assert_eq!(fs::read(bench.dir.path().join("store").join(report.kept_as.unwrap())).unwrap(), old);
    bench.wipe_local();
    assert_blocks(&bench, &[[1; 10], [2; 10]].concat());
}

/// Without the log: what was uploaded is there, after a host has said that it has the right to it.
#[test]
fn an_old_manifest_is_rebuilt_from_the_chunks_alone() {
    let (bench, old) = with_an_old_manifest(|host| {
        drain(host.volume());
        host.abandon().unwrap();
    });
    fs::write(manifest_path(&bench), &old).unwrap();
    bench.wipe_local();
    refuses_to_attach(&bench, bench.options());
    refused(&bench, &options(), ErrorKind::Busy, &["--force"]);
    let report = rebuilt(&bench, &Options { force: true, ..options() });
    assert_eq!((report.manifest, report.map_from), (ManifestState::Old, MapFrom::Copy), "{report:#?}");
    assert_blocks(&bench, &[[1; 10], [2; 10]].concat());
}

/// With the log, what had not been uploaded is there, too.
#[test]
fn what_only_the_log_has_survives_an_old_manifest() {
    let (bench, old) = with_an_old_manifest(|host| host.abandon().unwrap());
    fs::write(manifest_path(&bench), &old).unwrap();
    refuses_to_attach(&bench, bench.options());
    let report = rebuilt(&bench, &options());
    assert_eq!(report.manifest, ManifestState::Old, "{report:#?}");
    assert_blocks(&bench, &[[1; 10], [2; 10]].concat());
}

/// The snapshots that an old manifest knows are those of the rebuilt one.
#[test]
fn an_old_manifests_snapshots_are_kept() {
    let bench = Bench::new(MIB);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 0, 10, 1).await);
    // A copy of the manifest is kept, which knows nothing of the snapshot.
    drain(host.volume());
    on_lane(host.volume(), async |e| put(&e, 0, 10, 1).await);
    drain(host.volume());
    block_on(host.volume().command(vb_ublk::volume::Command::CollectGarbage)).unwrap();
    host.detach().unwrap();
    assert!(!block_on(bench.store().list("vol/gc/", None)).unwrap().is_empty());
    block_on(vb_ublk::volume::snapshots::create(&*bench.store(), "vol", "s", 1)).unwrap();
    let old = fs::read(manifest_path(&bench)).unwrap();
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 0, 20, 2).await);
    host.detach().unwrap();
    fs::write(manifest_path(&bench), &old).unwrap();
    rebuilt(&bench, &options());
    assert_blocks(&bench, &[2; 20]);
    let host = Host::attach(AttachOptions { volume: "vol@s".to_owned(), read_only: true, ..bench.options() }).unwrap();
    on_lane(host.volume(), async |e| assert_eq!((get(&e, 3).await, get(&e, 13).await), (Ok(1), Ok(0))));
    host.detach().unwrap();
}

/// What goes on from its log asks the store later, and then nothing is acknowledged by an old manifest, nor by a damaged one.
#[test]
fn whoever_goes_on_from_the_log_is_stopped_by_an_old_or_a_damaged_manifest() {
    for spoil in [None, Some(MAPS[3].1)] {
        let (bench, old) = with_an_old_manifest(|host| {
            drain(host.volume());
            on_lane(host.volume(), async |e| put(&e, 20, 10, 3).await);
            host.abandon().unwrap();
        });
        let newest = fs::read(manifest_path(&bench)).unwrap();
        match spoil {
            None => fs::write(manifest_path(&bench), &old).unwrap(),
            Some(spoil) => spoil(&bench.dir.path().join("store/vol")),
        }
        let host = Host::attach(AttachOptions { resume: true, ..bench.options() }).unwrap();
        let begun = std::time::Instant::now();
        while !host.volume().is_gone() {
            assert!(begun.elapsed().as_secs() < 60, "it waits for what will not come");
            pause(std::time::Duration::from_millis(10));
        }
        on_lane(host.volume(), async |e| assert!(get(&e, 100).await.is_err()));
        assert_eq!(host.detach().unwrap_err().kind(), ErrorKind::Fenced);
        if spoil.is_none() {
            // The log is as it was.
            fs::write(manifest_path(&bench), &newest).unwrap();
            assert_blocks(&bench, &[[1; 10], [2; 10], [3; 10]].concat());
        }
    }
}

/// A history that was inferred knows nothing of attachments that left no chunk: their logs are older ones, and no sign of anything.
#[test]
fn the_log_of_an_attachment_that_left_nothing_is_set_aside_after_a_rebuild() {
    let bench = Bench::new(MIB);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 0, 10, 1).await);
    host.detach().unwrap();
    // Another host, which writes nothing.
    let other = AttachOptions { log_path: bench.dir.path().join("other/vol.wal"), ..bench.options() };
    Host::attach(other.clone()).unwrap().detach().unwrap();
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 10, 10, 2).await);
    host.detach().unwrap();
    remove(&manifest_path(&bench));
    rebuilt(&bench, &options());
    let host = Host::attach(other).unwrap();
    on_lane(host.volume(), async |e| assert_eq!((get(&e, 3).await, get(&e, 13).await), (Ok(1), Ok(2))));
    host.detach().unwrap();
}
