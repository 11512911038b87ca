//! Volumes over a real log and a file store, without a server.

use std::path::Path;

use tempfile::TempDir;

use super::super::super::args::{DelArgs, WhichArgs};
use super::super::super::{del, list};
use super::*;
use crate::disk::IoBuf;
use crate::lane::{Driver, OwnRing, RingMode};
use crate::units::Lba;
use crate::volume::engine::Engine;

const SIZE: u64 = 32 << 20;

fn name(s: &str) -> VolumeName {
    s.parse().expect("name")
}

fn volumes(dir: &Path, create: bool) -> Volumes {
    let listening = super::super::listen::open(super::super::listen::Wanted {
        unix: vec![dir.join("nbd.sock")],
        ..Default::default()
    });
    let figures = Figures::default();
    let _ = figures.0.set(Box::new(|| Some(ServerStatus { connections: 3, accepted: 4, refused: 1 })));
    Volumes {
        store: StoreUrl::File { root: dir.join("store") },
        store_options: StoreOptions { create: true, ..StoreOptions::default() },
        run: RunDir::create(&dir.join("run")).expect("run folder"),
        wal_dir: dir.join("wal"),
        wal_bytes: 64 << 20,
        cache: None,
        flush_to: FlushTo::Wal,
        gc_garbage: GarbageLimit::default(),
        io_timeout: None,
        force: false,
        accept_loss: false,
        read_only: false,
        create: create.then_some(CreateOptions { size_bytes: SIZE, logical_block: 512 }),
        uris: listening.expect("listen").uris,
        metrics: Some("127.0.0.1:7".parse().expect("address")),
        figures: Arc::new(figures),
    }
}

fn fresh() -> (TempDir, Volumes) {
    let dir = tempfile::tempdir().expect("dir");
    let volumes = volumes(dir.path(), true);
    (dir, volumes)
}

struct Sealer(std::rc::Rc<LaneEngine>);

impl Driver for Sealer {
    fn seal(&mut self) {
        self.0.seal();
    }
}

/// Writes `byte` over the first block and flushes, or reads it, on a lane of its own.
fn first_block(volume: &NbdVolume, write: Option<u8>) -> u8 {
    let lane = Lane::new(OwnRing::new(64, RingMode::default()).expect("ring")).expect("lane");
    let engine = volume.engine(&lane).expect("engine");
    engine.clone().tasks().into_iter().for_each(|t| lane.spawn_boxed(t));
    let mut driver = Sealer(engine.clone());
    let buf = IoBuf::zeroed(4096);
    let work = async {
        match write {
            Some(byte) => {
                let mut src = IoBuf::zeroed(4096);
                src.bytes_mut().fill(byte);
                engine.write(Lba(0), src, false).await.expect("write");
                engine.flush().await.expect("flush");
            }
            None => engine.read(Lba(0), buf.clone()).await.expect("read"),
        }
    };
    lane.run_with(&mut driver, work).expect("lane");
    lane.shutdown(&mut driver).expect("shutdown");
    buf.bytes()[0]
}

#[test]
fn a_volume_is_made_attached_told_of_and_given_back() {
    let (dir, volumes) = fresh();
    let v = name("v");
    // Asked about, it is not made.
    assert_eq!(volumes.info(&v).expect("would be").size_bytes, SIZE);
    assert!(!dir.path().join("store/v").exists());
    let volume = volumes.attach(&v).expect("attach");
    let info = volume.info();
    assert_eq!((info.name.as_str(), info.size_bytes, info.read_only), ("v", SIZE, false));
    assert!(info.description.contains("32 MiB of file://"), "{}", info.description);
    first_block(&volume, Some(7));

    let uri = format!("nbd+unix:///v?socket={}", dir.path().join("nbd.sock").display());
    let state = volumes.run.read(&v).expect("read").expect("state");
    assert_eq!((state.nbd.as_slice(), state.device), (&[uri.clone()][..], None));
    let said = control::status(&volumes.run.socket_path(&v).expect("path")).expect("status");
    assert_eq!(
        (&said["state"], &said["nbd"][0], &said["nbd_server"]["connections"]),
        (&"serving".into(), &uri.into(), &3.into())
    );
    assert_eq!(said.pointer("/engine/size_bytes"), Some(&SIZE.into()));
    list::list(&volumes.run, false).expect("list");
    list::status(&volumes.run, Some(&v), true).expect("status");

    // Nobody else may have it, and `del` says what to do.
    let e = volumes.attach(&v).err().expect("locked");
    assert!(e.kind() == ErrorKind::Busy && e.to_string().contains("nbd+unix:///v"), "{e}");
    let args =
        DelArgs { which: WhichArgs { number: None, volume: Some(v.clone()), all: false }, force: true, timeout: None };
    let e = del::run(&volumes.run, &args).expect_err("not del's");
    assert!(e.kind() == ErrorKind::Busy && e.to_string().contains(&format!("`kill {}`", std::process::id())), "{e}");

    volumes.detach(&volume).expect("detach");
    assert!(!volumes.run.is_held(&v).expect("lock") && volumes.run.read(&v).expect("read").is_none());
    // Others on this host can have it at once, though this is still there; and all of it is in the store.
    std::fs::remove_dir_all(dir.path().join("wal")).expect("no log");
    let again = volumes.attach(&v).expect("again");
    assert_eq!(first_block(&again, None), 7);
    volumes.detach(&again).expect("detach");
    drop(volume);
}

#[test]
fn a_name_that_is_no_volumes_leaves_nothing() {
    let dir = tempfile::tempdir().expect("dir");
    let volumes = volumes(dir.path(), false);
    for n in ["v", "w"] {
        assert_eq!(volumes.attach(&name(n)).err().expect("none").kind(), ErrorKind::NotFound);
        assert_eq!(volumes.info(&name(n)).expect_err("none").kind(), ErrorKind::NotFound);
    }
    assert_eq!(std::fs::read_dir(dir.path().join("run")).expect("run").count(), 0);
}

#[test]
fn a_failed_attach_gives_all_back() {
    let (dir, mut volumes) = fresh();
    let v = name("v");
    volumes.ensure(&v).expect("made");
    // No folder can be made where a file is.
    std::fs::write(dir.path().join("wal"), "").expect("write");
    volumes.attach(&v).err().expect("no log");
    assert!(!volumes.run.is_held(&v).expect("lock") && volumes.run.read(&v).expect("read").is_none());
    // One that comes as far as the engine: another host has it.
    volumes.wal_dir = dir.path().join("other");
    let other = volumes.attach(&v).expect("attach");
    let elsewhere = Volumes {
        wal_dir: dir.path().join("third"),
        run: RunDir::create(&dir.path().join("run2")).expect("run"),
        ..volumes
    };
    assert_eq!(elsewhere.attach(&v).err().expect("held").kind(), ErrorKind::Busy);
    assert!(!elsewhere.run.is_held(&v).expect("lock") && elsewhere.run.read(&v).expect("read").is_none());
    assert!(!elsewhere.run.socket_path(&v).expect("path").exists());
    // Taken over by force, the first one learns it at its detach, and leaves its last words.
    let by_force = Volumes { force: true, ..elsewhere };
    let new = by_force.attach(&v).expect("by force");
    let old_run = RunDir::at(&dir.path().join("run"));
    let old = Volumes { run: old_run.clone(), ..volumes_like(&by_force) };
    assert_eq!(old.detach(&other).expect_err("fenced").kind(), ErrorKind::Fenced);
    assert!(old.is_lost(&other) || old_run.read(&v).expect("read").expect("state").failure.is_some());
    assert!(!old_run.is_held(&v).expect("lock"));
    by_force.detach(&new).expect("detach");
}

/// Of the same store.
fn volumes_like(v: &Volumes) -> Volumes {
    Volumes {
        store: v.store.clone(),
        store_options: v.store_options.clone(),
        run: v.run.clone(),
        wal_dir: v.wal_dir.clone(),
        wal_bytes: v.wal_bytes,
        cache: v.cache.clone(),
        flush_to: v.flush_to,
        gc_garbage: v.gc_garbage,
        io_timeout: v.io_timeout,
        force: v.force,
        accept_loss: v.accept_loss,
        read_only: v.read_only,
        create: v.create,
        uris: v.uris.clone(),
        metrics: v.metrics,
        figures: Arc::clone(&v.figures),
    }
}

#[test]
fn a_lane_that_is_slow_to_end_is_waited_for() {
    let (_dir, volumes) = fresh();
    let volume = volumes.attach(&name("v")).expect("attach");
    let slow = Arc::clone(&volume.lanes);
    let waiter = std::thread::spawn(move || {
        pause(Duration::from_millis(100));
        drop(slow);
    });
    let begun = Instant::now();
    volumes.detach(&volume).expect("detach");
    assert!(begun.elapsed() >= Duration::from_millis(100));
    waiter.join().expect("thread");
    let lane = Lane::new(OwnRing::new(8, RingMode::default()).expect("ring")).expect("lane");
    assert_eq!(volume.engine(&lane).err().expect("detached").kind(), ErrorKind::Internal);
    lane.shutdown(&mut crate::lane::NoDriver).expect("shutdown");
}
