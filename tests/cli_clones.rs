//! Snapshots and clones as commands: two processes at once, and a clone that comes to stand alone.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        // Not on a memory file system: a log wants O_DIRECT.
        Self { dir: tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR"))).expect("dir") }
    }

    fn command(&self, args: &str) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_vb-ublk"));
        c.args(args.split(' '))
            .env_clear()
            .env("VB_UBLK_DATA_DIR", self.dir.path().join("data"))
            .env("VB_UBLK_RUN_DIR", self.dir.path().join("run"))
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        c
    }

    fn ok(&self, args: &str) -> String {
        let out = self.command(args).output().expect("started");
        assert!(out.status.success(), "{args}: {out:?}");
        String::from_utf8(out.stdout).expect("text")
    }

    fn fails(&self, args: &str) -> String {
        let out = self.command(args).output().expect("started");
        assert_eq!(out.status.code(), Some(1), "{args}: {out:?}");
        String::from_utf8(out.stderr).expect("text")
    }

    fn at_once(&self, both: [&str; 2]) -> [Output; 2] {
        let started = both.map(|args| self.command(args).spawn().expect("started"));
        started.map(|child| child.wait_with_output().expect("ended"))
    }

    fn volumes(&self) -> String {
        self.ok("volume list")
    }
}

#[test]
fn of_a_clone_and_a_deletion_by_two_processes_at_most_one_succeeds() {
    let b = Bench::new();
    b.ok("volume create v --size 1M");
    let (mut cloned, mut deleted) = (0, 0);
    for round in 0..16 {
        b.ok("snapshot create v s");
        let commands = ["clone v@s c", "snapshot delete v s"];
        // Who is started first has the better chance.
        let [a, z] = if round % 2 == 0 {
            b.at_once(commands)
        } else {
            let [z, a] = b.at_once([commands[1], commands[0]]);
            [a, z]
        };
        let (made, gone) = (a.status.success(), z.status.success());
        assert!(!(made && gone), "round {round}: {a:?} {z:?}");
        assert_eq!(b.volumes().contains('c'), made, "round {round}: {a:?} {z:?}");
        assert_eq!(b.ok("snapshot list v").contains("s "), !gone, "round {round}: {a:?} {z:?}");
        (cloned, deleted) = (cloned + u32::from(made), deleted + u32::from(gone));
        if made {
            let refused = b.fails("snapshot delete v s");
            assert!(refused.contains("c was made from it"), "{refused}");
            let refused = b.fails("volume delete v");
            assert!(refused.contains("c was made from it"), "{refused}");
            b.ok("volume delete c");
        }
        if !gone {
            b.ok("snapshot delete v s");
        }
    }
    println!("{cloned} clones were made, {deleted} snapshots were deleted");
    b.ok("volume delete v");
}

#[test]
fn a_clone_is_flattened_and_its_parent_deleted() {
    let b = Bench::new();
    let image = b.dir.path().join("image");
    let content: Vec<u8> = (0..3 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    std::fs::write(&image, &content).expect("image");
    b.ok("import image --volume v");
    let refused = b.command("volume flatten v").output().expect("started");
    assert!(
        refused.status.code() == Some(2) && String::from_utf8_lossy(&refused.stderr).contains("is no clone"),
        "{refused:?}"
    );
    b.ok("snapshot create v s");
    b.ok("clone v@s c");
    b.ok("clone v@s d");
    b.ok("snapshot create c own");
    let refused = b.fails("volume flatten c");
    assert!(refused.contains("need what it was cloned from, too: own"), "{refused}");
    b.ok("snapshot delete c own");
    let said = b.ok("volume flatten c");
    assert!(said.contains("stands alone"), "{said}");
    let refused = b.fails("volume delete v");
    assert!(refused.contains("d was made from it"), "{refused}");
    assert_eq!(b.ok("volume flatten d --json").trim(), "{\n  \"flattened\": true,\n  \"volume\": \"d\"\n}");
    b.ok("snapshot delete v s");
    b.ok("volume delete v");
    assert_eq!(b.volumes(), "c\nd\n");
    for v in ["c", "d"] {
        b.ok(&format!("volume verify {v}"));
        b.ok(&format!("export {v} {v}.img"));
        assert!(std::fs::read(b.dir.path().join(format!("{v}.img"))).expect("image") == content, "{v}");
    }
}

/// What is attached for as long as an order takes is detached again when the order is stopped.
#[test]
fn a_flattening_that_is_stopped_leaves_the_volume_detached() {
    let b = Bench::new();
    let block = |i: u32| i.to_le_bytes().repeat(1024);
    let content: Vec<u8> = (1..=(256 << 20) / 4096).flat_map(block).collect();
    std::fs::write(b.dir.path().join("image"), &content).expect("image");
    b.ok("import image --volume v");
    b.ok("snapshot create v s");
    let stopped = || {
        b.ok("clone v@s c");
        let child = b.command("volume flatten c").spawn().expect("started");
        let begun = Instant::now();
        while !b.dir.path().join("data/store/c/chunks").exists() {
            assert!(begun.elapsed() < Duration::from_secs(30), "nothing is copied");
            std::thread::park_timeout(Duration::from_millis(5));
        }
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).expect("signal");
        child.wait_with_output().expect("ended")
    };
    let mut out = stopped();
    // On a busy machine this process may have slept until it was done.
    for _ in 0..4 {
        if !out.status.success() {
            break;
        }
        b.ok("volume delete c");
        out = stopped();
    }
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(1) && said.contains("stopped before volume c was done"), "{out:?}");
    let info: serde_json::Value = serde_json::from_str(&b.ok("volume info c --json")).expect("JSON");
    assert!(info["writer"].is_null(), "{info}");
    let refused = b.fails("volume delete v");
    assert!(refused.contains("c was made from it"), "{refused}");
    b.ok("volume flatten c");
    b.ok("snapshot delete v s");
    b.ok("volume delete v");
    b.ok("export c c.img");
    assert!(std::fs::read(b.dir.path().join("c.img")).expect("image") == content);
}

/// What a deletion has left that was cut short is of the volume that it was of.
#[test]
fn no_volume_is_made_over_what_is_left_of_another() {
    let b = Bench::new();
    std::fs::write(b.dir.path().join("image"), [7; 1 << 20]).expect("image");
    b.ok("import image --volume v");
    b.ok("volume create w --size 1M");
    b.ok("snapshot create w s");
    std::fs::remove_file(b.dir.path().join("data/store/v/manifest.json")).expect("the manifest");
    for again in ["volume create v --size 1M", "clone w@s v", "import image --volume v"] {
        let refused = b.fails(again);
        assert!(refused.contains("without a manifest") && refused.contains("volume delete v"), "{again}: {refused}");
    }
    b.ok("volume delete v");
    b.ok("clone w@s v");
    assert_eq!(b.volumes(), "v\nw\n");
}

/// The log is where `add` would have it, so that the next `add` finds its own.
#[test]
fn collecting_uses_the_volumes_own_log() {
    let b = Bench::new();
    b.ok("volume create v --size 1M");
    let run = |args: &str| {
        let out = b.command(args).env("VB_UBLK_WAL_DIR", b.dir.path().join("logs")).output().expect("started");
        assert!(out.status.success(), "{args}: {out:?}");
    };
    run("gc v");
    let log = |path: &str| b.dir.path().join(path).exists();
    assert!(log("logs/v.wal") && !log("data/wal"));
    b.ok("gc v --wal-dir there");
    assert!(log("there/v.wal") && !log("data/wal"));
    let refused = b.command("gc v --wal-device /dev/nothing").output().expect("started");
    assert!(
        !refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("/dev/nothing"),
        "{refused:?}"
    );
    let refused = b.command("gc v --dry-run --wal-dir there").output().expect("started");
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
}

#[test]
fn caches_go_with_what_they_are_of() {
    let b = Bench::new();
    let cache = b.dir.path().join("data/cache");
    std::fs::create_dir_all(&cache).expect("folder");
    let left = || {
        let files = std::fs::read_dir(&cache).expect("folder").map(|f| f.expect("file").file_name());
        let mut names: Vec<String> = files.map(|n| n.into_string().expect("text")).collect();
        names.sort();
        names
    };
    b.ok("volume create v --size 1M");
    b.ok("snapshot create v s");
    for name in ["v.cache", "v@s.cache", "v@t.cache", "w.cache", "vv@s.cache", "v@s.cache.mine"] {
        std::fs::write(cache.join(name), "x").expect("write");
    }
    b.ok("snapshot delete v s");
    assert_eq!(left(), ["v.cache", "v@s.cache.mine", "v@t.cache", "vv@s.cache", "w.cache"]);
    b.ok("volume delete v");
    assert_eq!(left(), ["v@s.cache.mine", "vv@s.cache", "w.cache"]);
}
