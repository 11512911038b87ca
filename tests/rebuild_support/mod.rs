//! Rebuilding a volume and holding the result against its promises; and the ways to lose a volume's map.

use std::fs;
use std::path::{Path, PathBuf};

use vb_ublk::disk::file::DataFile;
use vb_ublk::disk::uring::UringDisk;
use vb_ublk::error::{ErrorKind, Result};
use vb_ublk::manifest::{Manifest, Writer};
use vb_ublk::store::Store;
use vb_ublk::units::Nonce;
use vb_ublk::volume::host::{AttachOptions, Host};
use vb_ublk::volume::rebuild::{LocalLog, Options, Report, rebuild};
use vb_ublk::volume::verify::verify;
use vb_ublk::wal::inspect::inspect;

use crate::command_support::everything;
use crate::damage_support::{flip, name};
use crate::volume_support::{Bench, block_on, get, on_lane};

pub(crate) const MIB: usize = 1 << 20;
/// What is done to an object.
pub(crate) type Spoil = fn(&Path);

pub(crate) fn options() -> Options {
    Options {
        force: false,
        accept_loss: false,
        dry_run: false,
        size_bytes: None,
        logical_block: None,
        writer: Writer { host: "here".to_owned(), pid: 1, since: 1 },
        nonce: Nonce::draw().unwrap(),
        now_unix: 2,
    }
}

/// Without manifest and log: the size, and leave, for nobody can tell who has the volume.
pub(crate) fn sized(bytes: usize) -> Options {
    Options { size_bytes: Some(bytes as u64), force: true, ..options() }
}

pub(crate) fn with_loss(opts: Options) -> Options {
    Options { accept_loss: true, ..opts }
}

/// The log as the command hands it in.
pub(crate) fn local_log(path: &Path) -> Option<LocalLog> {
    if !path.exists() {
        return None;
    }
    let file = DataFile::open_to_read(path).unwrap();
    let size = file.size().unwrap();
    let found = vb_ublk::disk::uring::run(async { inspect(&UringDisk::new(&file).unwrap(), size).await.unwrap() });
    Some(LocalLog::of(path.display().to_string(), &found))
}

pub(crate) fn over(store: &dyn Store, bench: &Bench, opts: &Options) -> Result<Report> {
    let log = local_log(&bench.log());
    block_on(rebuild(store, "vol", opts, log.as_ref(), &mut |_| {}))
}

/// Rebuilds, and holds it against its promises: nothing is deleted, and the volume is well.
#[track_caller]
pub(crate) fn rebuilt(bench: &Bench, opts: &Options) -> Report {
    let before = everything(bench);
    let dry = over(&*bench.store(), bench, &Options { dry_run: true, ..opts.clone() }).unwrap();
    assert!(before == everything(bench), "a dry run has changed something");
    let report = over(&*bench.store(), bench, opts).unwrap();
    assert_eq!(Report { dry_run: true, kept_as: None, ..report.clone() }, dry);
    let after = everything(bench);
    let manifest = manifest_path(bench);
    assert!(before.iter().all(|(p, bytes)| *p == manifest || after.get(p) == Some(bytes)), "something is gone");
    let verified = block_on(verify(&*bench.store(), "vol", &mut |_| {})).unwrap();
    let state = verified.state.clone().unwrap_or_else(|| panic!("{verified:#?}"));
    assert_eq!((state.group, state.mapped_blocks), (report.group, report.mapped_blocks), "{report:#?}");
    assert!(verified.is_well(), "{verified:#?}");
    report
}

/// A refusal that a person can read, and that has changed nothing.
#[track_caller]
pub(crate) fn refused(bench: &Bench, opts: &Options, kind: ErrorKind, words: &[&str]) {
    let before = everything(bench);
    let e = over(&*bench.store(), bench, opts).unwrap_err();
    let text = e.to_string();
    eprintln!("{text}");
    assert_eq!(e.kind(), kind, "{text}");
    assert!(!text.contains('\n'), "{text:?}");
    words.iter().for_each(|w| assert!(text.contains(w), "{w:?} is not in {text:?}"));
    assert!(before == everything(bench), "a refusal has changed something");
}

pub(crate) fn manifest_path(bench: &Bench) -> PathBuf {
    bench.dir.path().join("store/vol/manifest.json")
}

pub(crate) fn is_readable(bench: &Bench) -> bool {
    fs::read(manifest_path(bench)).is_ok_and(|bytes| Manifest::decode(&bytes).is_ok())
}

pub(crate) fn manifest(bench: &Bench) -> Manifest {
    Manifest::decode(&fs::read(manifest_path(bench)).unwrap()).unwrap()
}

pub(crate) fn attach(bench: &Bench, force: bool) -> Host {
    Host::attach(AttachOptions { force, ..bench.options() }).unwrap()
}

/// What the first blocks hold; the volume is detached, and its log forgotten.
#[track_caller]
pub(crate) fn assert_blocks(bench: &Bench, expect: &[u8]) {
    let host = attach(bench, false);
    on_lane(host.volume(), async |e| {
        for (block, want) in expect.iter().enumerate() {
            assert_eq!(get(&e, block as u64).await, Ok(*want), "block {block}");
        }
    });
    host.detach().unwrap();
}

/// What three groups make, of which so many are left.
pub(crate) fn first_groups(n: u8) -> Vec<u8> {
    (0..40u8).map(|b| if b < n * 10 { b / 10 + 1 } else { 0 }).collect()
}

pub(crate) fn remove(p: &Path) {
    fs::remove_file(p).unwrap();
}

/// The ways to lose the map.
pub(crate) const MAPS: [(&str, Spoil); 5] = [
    ("a damaged part", |vol| each_part(vol, |p| flip(p, 80))),
    ("a missing part", |vol| each_part(vol, remove)),
    ("no manifest", |vol| remove(&vol.join("manifest.json"))),
    ("a garbage manifest", |vol| fs::write(vol.join("manifest.json"), "{ \"format\": 7").unwrap()),
    ("an empty manifest", |vol| fs::write(vol.join("manifest.json"), "").unwrap()),
];

pub(crate) fn each_part(vol: &Path, spoil: Spoil) {
    let Ok(parts) = fs::read_dir(vol.join("checkpoints")) else { return };
    parts.map(|p| p.unwrap().path()).filter(|p| !name(p).starts_with('.')).for_each(|p| spoil(&p));
}
