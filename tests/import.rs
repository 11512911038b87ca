//! Importing raw images, and what an import that fails or is stopped leaves: nothing.

mod image_support;
mod support_rng;
#[expect(dead_code, reason = "nothing is drained")]
mod volume_support;

use std::cell::Cell;
use std::fs::{self, File};
use std::future::pending;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use image_support::{bench, command, disk, failed, fails, json, objects, ok, path};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use support_rng::Rng;
use vb_ublk::error::{Error, ErrorKind, Result};
use vb_ublk::image::{self, Backing, ImageSource};
use vb_ublk::manifest::{Manifest, Published};
use vb_ublk::store::fault::{Call, Fault, FaultStore};
use vb_ublk::store::retry::{Policy, Retry};
use vb_ublk::store::{Op, Store};
use vb_ublk::units::{BLOCK, Nonce};
use vb_ublk::volume::import::{Imported, Options, PARALLEL, import};
use volume_support::{Bench, block_on, churn, compare, get, on_lane, pause};

const MIB: usize = 1 << 20;

fn options() -> Options {
    let nonce = Nonce::draw().unwrap();
    Options { size_bytes: None, logical_block: 512, metadata: serde_json::Map::new(), nonce, now_unix: 1 }
}

async fn import_file(bench: &Bench, store: &dyn Store, file: &str) -> Result<Imported> {
    let mut source = image::open(&path(bench, file), None, &Backing::default()).await?;
    import(store, "vol", &mut *source, &options(), pending(), &mut |_| {}).await
}

/// What a volume has of an image.
fn padded(image: &[u8]) -> Vec<u8> {
    let mut all = image.to_vec();
    all.resize(image.len().next_multiple_of(4096), 0);
    all
}

/// A volume of random content, and that content.
fn imported(len: usize) -> (Bench, Vec<u8>) {
    let (bench, disk) = (bench(), disk(len, &mut Rng(len as u64)));
    fs::write(path(&bench, "disk"), &disk).unwrap();
    ok(&bench, &["import", "disk", "--volume", "vol"]);
    (bench, disk)
}

#[track_caller]
fn exports_as(bench: &Bench, volume: &str, want: &[u8]) {
    let out = path(bench, "out");
    ok(bench, &["export", volume, "out", "--force"]);
    let got = fs::read(&out).unwrap();
    assert_eq!(got.len(), want.len());
    assert!(got == want, "byte {:?} differs", got.iter().zip(want).position(|(a, b)| a != b));
    fs::remove_file(out).unwrap();
    ok(bench, &["volume", "verify", volume]);
}

#[test]
fn images_of_any_size_come_back_from_file_and_pipe() {
    let bench = bench();
    for (i, len) in [1, 511, 512, 4095, 4096, 4097, 8192 + 513, MIB, MIB + 7, 9 * MIB + 1000].into_iter().enumerate() {
        let disk = disk(len, &mut Rng(i as u64));
        fs::write(path(&bench, "disk"), &disk).unwrap();
        let (by_file, by_pipe) = (format!("f{i}"), format!("p{i}"));
        let told = json(&bench, &["import", "disk", "--volume", &by_file, "--json"]);
        assert_eq!(
            (told["image_bytes"].as_u64(), told["size_bytes"].as_u64()),
            (Some(len as u64), Some(padded(&disk).len() as u64))
        );
        let data = padded(&disk).chunks(BLOCK).filter(|b| b.iter().any(|x| *x != 0)).count() * BLOCK;
        assert_eq!(told["data_bytes"].as_u64(), Some(data as u64));
        exports_as(&bench, &by_file, &padded(&disk));
        let mut child = command(&bench, &["import", "-", "--volume", &by_pipe]).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(&disk).unwrap();
        assert!(child.wait().unwrap().success());
        exports_as(&bench, &by_pipe, &padded(&disk));
    }
}

#[test]
fn the_result_is_told_and_rounding_too() {
    let bench = bench();
    fs::write(path(&bench, "disk"), [7; 5000]).unwrap();
    let text = ok(&bench, &["import", "disk", "--volume", "a"]);
    assert!(
        text.contains("8192 bytes, 5000 rounded up to a multiple of 4096") && text.contains("in 1 chunks"),
        "{text}"
    );
    let text = ok(&bench, &["import", "disk", "--volume", "b", "--size", "1M", "--logical-block-size", "4096"]);
    assert!(text.contains("1 MiB") && !text.contains("rounded"), "{text}");
    let info = json(&bench, &["volume", "info", "b", "--json"]);
    assert_eq!((info["size_bytes"].as_u64(), info["logical_block"].as_u64()), (Some(1 << 20), Some(4096)));
    let mut want = vec![7; 5000];
    want.resize(1 << 20, 0);
    exports_as(&bench, "b", &want);
}

#[test]
fn holes_and_zeros_cost_nothing() {
    let bench = bench();
    let file = File::create(path(&bench, "disk")).unwrap();
    file.set_len(1 << 40).unwrap();
    file.write_all_at(&[1; 3 * BLOCK], 5 << 30).unwrap();
    file.write_all_at(&[2; 100], (1 << 40) - 100).unwrap();
    file.write_all_at(&vec![0; 8 * MIB], 7 << 30).unwrap();
    let begun = Instant::now();
    let told = json(&bench, &["import", "disk", "--volume", "vol", "--json"]);
    assert_eq!((told["data_bytes"].as_u64(), told["chunks"].as_u64()), (Some(4 * BLOCK as u64), Some(1)));
    ok(&bench, &["export", "vol", "out"]);
    assert!(begun.elapsed() < Duration::from_secs(30), "holes are read: {:?}", begun.elapsed());
    let out = File::open(path(&bench, "out")).unwrap();
    let meta = out.metadata().unwrap();
    assert!(meta.len() == 1 << 40 && meta.blocks() * 512 < MIB as u64, "{} bytes on disk", meta.blocks() * 512);
    let mut buf = vec![9; 5 * BLOCK];
    out.read_exact_at(&mut buf, (5 << 30) - BLOCK as u64).unwrap();
    assert!(
        buf[BLOCK..4 * BLOCK].iter().all(|b| *b == 1) && buf[..BLOCK].iter().chain(&buf[4 * BLOCK..]).all(|b| *b == 0)
    );

    // All zeros, and not sparse: there is no chunk and no map.
    fs::write(path(&bench, "zeros"), vec![0; 8 * MIB]).unwrap();
    ok(&bench, &["import", "zeros", "--volume", "none"]);
    assert_eq!(objects(&bench).iter().filter(|p| p.starts_with(path(&bench, "store/none"))).count(), 1);
    exports_as(&bench, "none", &vec![0; 8 * MIB]);
}

#[test]
fn the_volume_is_as_one_that_was_attached_and_detached() {
    let (bench, mut model) = imported(24 * MIB);
    for life in 0..3 {
        let host = bench.attach().unwrap();
        on_lane(host.volume(), async |e| {
            compare(&e, &model, "after the import").await;
            churn(&e, &mut model, &mut Rng(life), 150).await;
        });
        // Once as after a crash.
        if life == 1 { host.abandon().unwrap() } else { host.detach().unwrap() }
    }
    exports_as(&bench, "vol", &model);
}

#[test]
fn an_image_of_zeros_is_a_volume_to_write_to() {
    let bench = bench();
    fs::write(path(&bench, "zeros"), vec![0; MIB]).unwrap();
    ok(&bench, &["import", "zeros", "--volume", "vol"]);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| {
        assert_eq!(get(&e, 9).await, Ok(0));
        volume_support::put(&e, 9, 1, 5).await;
    });
    host.detach().unwrap();
    bench.wipe_local();
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| assert_eq!(get(&e, 9).await, Ok(5)));
    host.detach().unwrap();
}

#[test]
fn map_and_manifest_can_be_made_anew_from_the_chunks() {
    let (bench, disk) = imported(12 * MIB + 4096);
    let vol = path(&bench, "store/vol");
    fs::remove_dir_all(vol.join("checkpoints")).unwrap();
    fails(&bench, &["export", "vol", "out"], 1, &["checkpoint"]);
    ok(&bench, &["volume", "rebuild", "vol"]);
    exports_as(&bench, "vol", &disk);
    fs::remove_dir_all(vol.join("checkpoints")).unwrap();
    fs::remove_file(vol.join("manifest.json")).unwrap();
    fails(&bench, &["volume", "rebuild", "vol", "--force"], 2, &["--size"]);
    ok(&bench, &["volume", "rebuild", "vol", "--force", "--size", &disk.len().to_string()]);
    // It had no writer as far as anybody can tell; a rebuild names this host, and an attach ends that.
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| compare(&e, &disk, "from the chunks alone").await);
    host.detach().unwrap();
    exports_as(&bench, "vol", &disk);
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_written() {
    let (bench, disk) = imported(MIB);
    let before = objects(&bench);
    fails(&bench, &["import", "disk", "--volume", "vol"], 1, &["already", "another name"]);
    for (args, code, word) in [
        (&["import", "disk", "--volume", "new", "--size", "512K"][..], 2, "--size"),
        (&["import", "disk", "--volume", "new", "--size", "1000001"], 2, "steps of 4K"),
        (&["import", "disk", "--volume", "new", "--format", "qcow2"], 2, "not a qcow2"),
        (&["import", "disk", "--volume", "new", "--format", "vmdk"], 2, "raw"),
        (&["import", "disk"], 2, "--volume"),
        (&["import", "nowhere", "--volume", "new"], 1, "nowhere"),
        (&["import", ".", "--volume", "new"], 2, "neither"),
        (&["import", "/dev/null", "--volume", "new"], 2, "0 bytes"),
        (&["import", "disk", "--volume", "../new"], 2, "letter or a digit"),
        (&["export", "new", "out"], 1, "no volume"),
        (&["export", "vol", "disk"], 1, "--force"),
        (&["export", "vol", "-", "--format", "qcow2"], 2, "name a file"),
        (&["export", "vol", "-", "--json"], 2, "--json"),
        (&["export", "vol", "nowhere/out"], 1, "nowhere"),
    ] {
        fails(&bench, args, code, &[word]);
    }
    assert_eq!(objects(&bench), before);
    assert_eq!(fs::read(path(&bench, "disk")).unwrap(), disk);
    assert!(!path(&bench, "out").exists() && !path(&bench, "out.partial").exists());
}

#[test]
fn a_pipe_that_is_too_long_or_begins_as_another_format_is_refused() {
    let bench = bench();
    let feed = |args: &[&str], bytes: &[u8]| {
        let mut child =
            command(&bench, args).stdin(Stdio::piped()).stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // It may end before it has read all.
        let _ = child.stdin.take().unwrap().write_all(bytes);
        child.wait_with_output().unwrap()
    };
    let size = ["import", "-", "--volume", "vol", "--size", "8M"];
    failed(&feed(&size, &vec![3; 20 * MIB]), 2, &["--size is 8388608", "deleted"]);
    let mut qcow2 = b"QFI\xfb".to_vec();
    qcow2.resize(4096, 1);
    failed(&feed(&["import", "-", "--volume", "vol"], &qcow2), 2, &["write it to a file", "--format raw"]);
    failed(&feed(&["import", "-", "--volume", "vol", "--format", "qcow2"], &qcow2), 2, &["pipe"]);
    failed(&feed(&["import", "-", "--volume", "vol"], b""), 2, &["0 bytes"]);
    assert!(objects(&bench).is_empty(), "{:?}", objects(&bench));
    assert!(feed(&["import", "-", "--volume", "vol", "--format", "raw"], &qcow2).status.success());
    exports_as(&bench, "vol", &qcow2);
}

#[test]
fn metadata_name_the_volume_and_stay_with_it() {
    let bench = bench();
    fs::write(path(&bench, "disk"), [7; BLOCK]).unwrap();
    let config = json!({
        "VolumeMetadata": { "VolumeID": "", "SizeGiB": 4, "Tags": { "checksum": "\"checksum\": \"\"" } },
        "AMIMetadata": { "ImageID": "ami-0123456789abcdef0", "Name": "debian", "Architecture": "x86_64" },
    });
    fs::write(path(&bench, "ami.json"), config.to_string()).unwrap();
    ok(&bench, &["import", "disk", "--metadata", "ami.json"]);
    ok(&bench, &["import", "disk", "--metadata", "ami.json", "--volume", "other"]);
    for name in ["ami-0123456789abcdef0", "other"] {
        assert_eq!(json(&bench, &["volume", "info", name, "--json"])["metadata"], config);
        assert!(ok(&bench, &["volume", "info", name]).contains("Architecture: x86_64"));
    }
    fs::write(path(&bench, "ami.json"), "[1]").unwrap();
    fails(&bench, &["import", "disk", "--metadata", "ami.json"], 2, &["ami.json", "JSON object"]);
    fs::write(path(&bench, "ami.json"), "{}").unwrap();
    fails(&bench, &["import", "disk", "--metadata", "ami.json"], 2, &["--volume"]);
}

/// An import that waits for its pipe when it has uploaded something.
fn half_way(bench: &Bench) -> (std::process::Child, std::process::ChildStdin) {
    let mut child = command(bench, &["import", "-", "--volume", "vol"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pipe = child.stdin.take().unwrap();
    pipe.write_all(&vec![5; 20 * MIB]).unwrap();
    let begun = Instant::now();
    while objects(bench).iter().filter(|p| p.extension().is_some_and(|e| e == "chunk")).count() < 3 {
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", objects(bench));
        pause(Duration::from_millis(20));
    }
    (child, pipe)
}

#[test]
fn an_import_that_is_stopped_takes_everything_away() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let bench = bench();
        let (child, pipe) = half_way(&bench);
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
        let out = child.wait_with_output().unwrap();
        drop(pipe);
        failed(&out, 1, &["stopped", "deleted"]);
        assert!(objects(&bench).is_empty(), "{:?}", objects(&bench));
    }
}

#[test]
fn what_a_killed_import_leaves_is_no_volume_and_can_be_deleted() {
    let bench = bench();
    let (mut child, pipe) = half_way(&bench);
    child.kill().unwrap();
    child.wait().unwrap();
    drop(pipe);
    let listed = command(&bench, &["volume", "list"]).output().unwrap();
    assert!(listed.status.success() && listed.stdout.is_empty(), "{listed:?}");
    let said = String::from_utf8_lossy(&listed.stderr);
    assert!(said.contains("vol has objects in the store and no manifest") && said.contains("delete vol"), "{said}");
    fs::write(path(&bench, "disk"), [7; BLOCK]).unwrap();
    fails(&bench, &["import", "disk", "--volume", "vol"], 1, &["without a manifest", "volume delete vol"]);
    ok(&bench, &["volume", "delete", "vol"]);
    ok(&bench, &["import", "disk", "--volume", "vol"]);
    exports_as(&bench, "vol", &[7; BLOCK]);
}

/// The import of an image on a store with a fault. What is left of it is looked at on the healthy store.
fn with_fault(decide: impl Fn(Call<'_>) -> Fault + Send + Sync + 'static) -> (Bench, Result<Imported>) {
    let bench = bench();
    fs::write(path(&bench, "disk"), disk(40 * MIB, &mut Rng(40))).unwrap();
    let store =
        Retry::new(Arc::new(FaultStore::new(bench.store(), decide)), Policy { attempts: 3, ..Policy::attach() });
    let done = block_on(import_file(&bench, &store, "disk"));
    (bench, done)
}

#[test]
fn an_error_of_the_store_at_any_place_leaves_nothing() {
    type Place = fn(&Call<'_>) -> bool;
    let places: [(&str, Place); 4] = [
        ("the look at what is there", |c| c.op == Op::List),
        ("a chunk", |c| c.op == Op::Put && c.key.contains("0000002-")),
        ("the map", |c| c.op == Op::Put && c.key.contains("checkpoints/")),
        ("the manifest", |c| c.op == Op::PutIf),
    ];
    for (what, place) in places {
        let (bench, done) = with_fault(move |c| if place(&c) { Fault::Before(ErrorKind::Denied) } else { Fault::None });
        let e = done.expect_err(what);
        assert_eq!(e.kind(), ErrorKind::Denied, "{what}: {e}");
        assert!(objects(&bench).is_empty(), "{what}: {:?}", objects(&bench));
        assert!(what.contains("look") || e.to_string().contains("deleted"), "{e}");
    }
}

#[test]
fn what_passes_by_itself_is_no_error() {
    let tried = Mutex::new(std::collections::HashSet::new());
    let (bench, done) = with_fault(move |c| {
        // Each call fails once: the puts after their effect, with the reply lost.
        if !tried.lock().unwrap().insert((c.op, c.key.to_owned())) {
            return Fault::None;
        }
        if matches!(c.op, Op::Put | Op::PutIf) {
            Fault::After(ErrorKind::TimedOut)
        } else {
            Fault::Before(ErrorKind::Throttled)
        }
    });
    done.unwrap();
    exports_as(&bench, "vol", &fs::read(path(&bench, "disk")).unwrap());
}

#[test]
fn a_manifest_that_may_be_there_keeps_its_chunks() {
    // The manifest is written, its reply is lost, and the store cannot be asked any more.
    let away = std::sync::atomic::AtomicBool::new(false);
    let (bench, done) = with_fault(move |c| {
        if c.op == Op::PutIf {
            away.store(true, Ordering::Relaxed);
            return Fault::After(ErrorKind::TimedOut);
        }
        if away.load(Ordering::Relaxed) { Fault::Before(ErrorKind::Unreachable) } else { Fault::None }
    });
    let e = done.unwrap_err().to_string();
    assert!(e.contains("not known") && e.contains("volume info"), "{e}");
    exports_as(&bench, "vol", &fs::read(path(&bench, "disk")).unwrap());
}

#[test]
fn somebody_elses_volume_that_came_meanwhile_stays() {
    let bench = bench();
    fs::write(path(&bench, "disk"), disk(20 * MIB, &mut Rng(1))).unwrap();
    let other = bench.store();
    let store = FaultStore::new(bench.store(), move |c| {
        if c.op == Op::Put && c.key.contains("checkpoints/") {
            // It had looked before the import began.
            let theirs = Manifest::new("vol", 4096, 512, 1);
            let other = Arc::clone(&other);
            std::thread::spawn(move || drop(block_on(Published::create(&*other, theirs)).unwrap())).join().unwrap();
        }
        Fault::None
    });
    let e = block_on(import_file(&bench, &store, "disk")).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Exists, "{e}");
    assert_eq!(objects(&bench), [path(&bench, "store/vol/manifest.json")]);
    exports_as(&bench, "vol", &[0; 4096]);
}

/// An image that is larger than any memory, and says how far it was read.
struct Endless<'a> {
    read: &'a Cell<u64>,
    most: u64,
}

#[async_trait(?Send)]
impl ImageSource for Endless<'_> {
    fn size_bytes(&self) -> Option<u64> {
        Some(1 << 40)
    }
    async fn next_data(&mut self, from: u64) -> Result<Option<(u64, u64)>> {
        Ok(Some((from, 1 << 40)))
    }
    async fn read(&mut self, at: u64, buf: &mut [u8]) -> Result<()> {
        buf.fill(at.to_le_bytes()[2] | 1);
        self.read.set(at + buf.len() as u64);
        if self.read.get() > self.most {
            return Err(Error::new(ErrorKind::Io, "it goes on and on"));
        }
        Ok(())
    }
}

/// Counts the puts that are under way.
#[derive(Debug)]
struct Counting {
    inner: Arc<dyn Store>,
    now: AtomicUsize,
    most: AtomicUsize,
}

#[async_trait]
impl Store for Counting {
    async fn put(&self, key: &str, body: bytes::Bytes) -> Result<()> {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop((key, body));
        self.now.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }
    async fn get(&self, key: &str) -> Result<(bytes::Bytes, vb_ublk::store::Version)> {
        self.inner.get(key).await
    }
    async fn get_range(&self, key: &str, range: std::ops::Range<u64>) -> Result<bytes::Bytes> {
        self.inner.get_range(key, range).await
    }
    async fn put_if(
        &self,
        key: &str,
        body: bytes::Bytes,
        condition: vb_ublk::store::Precondition,
    ) -> Result<vb_ublk::store::Version> {
        self.inner.put_if(key, body, condition).await
    }
    async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Vec<vb_ublk::store::ObjectMeta>> {
        self.inner.list(prefix, after).await
    }
    async fn delete(&self, key: &str) -> Result<()> {
        self.inner.delete(key).await
    }
    fn url(&self) -> String {
        self.inner.url()
    }
}

fn resident() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn memory_is_bounded_and_uploads_go_on_while_the_image_is_read() {
    let bench = bench();
    let store = Counting { inner: bench.store(), now: AtomicUsize::new(0), most: AtomicUsize::new(0) };
    let read = Cell::new(0);
    let (before, most) = (resident(), Cell::new(0));
    let mut source = Endless { read: &read, most: 3 << 30 };
    let told = &mut |_| most.set(most.get().max(resident()));
    let done = block_on(import(&store, "vol", &mut source, &options(), pending(), told));
    assert_eq!(done.unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(store.most.load(Ordering::SeqCst), PARALLEL, "as many as allowed, and no more");
    let grown = most.get().saturating_sub(before);
    // Other tests of this process run beside it.
    assert!(grown < 400 << 20, "{} MiB for an image of 3 GiB", grown >> 20);
}
