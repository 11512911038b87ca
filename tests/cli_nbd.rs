//! `vb-ublk nbd` as a process: where it listens, whom it tells, how it ends.

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

struct Bench {
    dir: TempDir,
}

/// A server that is killed with the test.
struct Running {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    fn of(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start");
        let out = BufReader::new(child.stdout.take().expect("stdout"));
        Self { child, out }
    }

    /// The next line on stdout; empty at its end.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).expect("text");
        line.trim_end().to_owned()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().expect("pid")), signal).expect("kill");
    }

    /// Its exit code, and what it has said on stderr.
    fn end(&mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        self.child.stderr.take().expect("stderr").read_to_string(&mut said).expect("text");
        (self.child.wait().expect("wait").code(), said)
    }
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("dir");
        std::fs::write(dir.path().join("config.toml"), "").expect("config");
        Self { dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().expect("text").to_owned()
    }

    fn surround(&self, command: &mut Command) {
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("VB_UBLK_DATA_DIR", self.path("data"))
            .env("VB_UBLK_RUN_DIR", self.path("run"))
            .env("VB_UBLK_CONFIG", self.path("config.toml"))
            .stdin(Stdio::null());
    }

    fn nbd(&self, args: &[&str]) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_vb-ublk"));
        c.arg("nbd").args(args);
        self.surround(&mut c);
        c
    }

    #[track_caller]
    fn fails(&self, args: &[&str], code: i32) -> String {
        failed(&self.nbd(args).output().expect("start"), code)
    }
}

/// The last line on stderr, which is the one for people; before it there may be warnings of the log.
#[track_caller]
fn failed(out: &Output, code: i32) -> String {
    let err = String::from_utf8(out.stderr.clone()).expect("text");
    assert_eq!(out.status.code(), Some(code), "{err}");
    let last = err.lines().last().unwrap_or_default();
    assert!(last.starts_with("vb-ublk: ") && !err.contains("panicked") && out.stdout.is_empty(), "{err}");
    last.to_owned()
}

#[test]
fn it_says_where_it_serves_and_leaves_at_a_signal() {
    let b = Bench::new();
    let manager = UnixDatagram::bind(b.path("notify")).expect("bind");
    manager.set_read_timeout(Some(Duration::from_secs(30))).expect("time-out");
    let hear = || {
        let mut got = [0; 1024];
        let n = manager.recv(&mut got).expect("a word");
        String::from_utf8(got[..n].to_vec()).expect("text")
    };
    let socket = b.path("nbd.sock");
    // Left by a dead server.
    drop(UnixListener::bind(&socket).expect("bind"));
    let args = ["--listen", "127.0.0.1:0", "--listen", "[::1]:0", "--unix", &socket];
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut server = Running::of(b.nbd(&args).env("NOTIFY_SOCKET", b.path("notify")));
        let lines = [server.line(), server.line(), server.line()];
        assert!(lines[0].starts_with("nbd://127.0.0.1:") && !lines[0].ends_with(":0"), "{lines:?}");
        assert!(lines[1].starts_with("nbd://[::1]:"), "{lines:?}");
        assert_eq!(lines[2], format!("nbd+unix:///?socket={socket}"));
        let ready = hear();
        assert!(ready.starts_with("READY=1\nSTATUS=serving file://") && ready.contains(&lines[0]), "{ready}");
        // One that is in use is refused, by name; and is still served afterwards.
        let e = b.fails(&["--unix", &socket], 1);
        assert!(e.contains("nbd.sock") && e.contains("another process"), "{e}");
        let tcp = lines[0].strip_prefix("nbd://").expect("TCP");
        assert!(b.fails(&["--listen", tcp], 1).contains(tcp));
        UnixStream::connect(&socket).expect("still there");
        server.signal(signal);
        assert!(hear().starts_with("STOPPING=1\n"));
        assert_eq!(server.line(), "");
        assert_eq!(server.end().0, Some(0));
        assert!(!Path::new(&socket).exists());
        while !hear().contains("detaching 0 volumes") {}
    }
}

#[test]
fn it_serves_what_the_service_manager_listens_on() {
    let b = Bench::new();
    // The shell makes the number of its process and descriptor 3 what a service manager would.
    let start = |socket: OwnedFd, pid: &str| {
        let mut c = Command::new("sh");
        let script =
            format!("LISTEN_PID={pid} LISTEN_FDS=1 LISTEN_FDNAMES=front exec \"$0\" nbd \"$@\" 3<&0 </dev/null");
        c.args(["-c", &script, env!("CARGO_BIN_EXE_vb-ublk")]);
        b.surround(&mut c);
        c.stdin(Stdio::from(socket));
        c
    };
    let tcp = TcpListener::bind("127.0.0.1:0").expect("bind");
    let uri = format!("nbd://{}", tcp.local_addr().expect("address"));
    let mut server = Running::of(&mut start(tcp.into(), "$$"));
    assert_eq!(server.line(), uri);
    server.signal(Signal::SIGTERM);
    // It alone: the default address is not listened on beside it.
    assert_eq!(server.line(), "");
    assert_eq!(server.end().0, Some(0));

    let path = b.path("passed.sock");
    let unix = UnixListener::bind(&path).expect("bind");
    let mut server = Running::of(&mut start(unix.into(), "$$"));
    assert_eq!(server.line(), format!("nbd+unix:///?socket={path}"));
    server.signal(Signal::SIGTERM);
    assert_eq!(server.end().0, Some(0));
    assert!(Path::new(&path).exists(), "it is the service manager's");

    // To all the world only by the user's word.
    let open = TcpListener::bind("0.0.0.0:0").expect("bind");
    let out = start(open.into(), "$$").output().expect("start");
    assert!(failed(&out, 1).contains("--insecure-listen"));
    let null = std::fs::File::open("/dev/null").expect("open");
    let out = start(null.into(), "$$").output().expect("start");
    assert!(failed(&out, 2).contains("\"front\""), "{out:?}");
    // Passed to another process.
    let null = std::fs::File::open("/dev/null").expect("open");
    let mut server = Running::of(start(null.into(), "1").env("VB_UBLK_LISTEN", "127.0.0.1:0"));
    assert!(server.line().starts_with("nbd://127.0.0.1:"));
    server.signal(Signal::SIGTERM);
    assert_eq!(server.end().0, Some(0));
}

#[test]
fn what_makes_no_sense_is_refused_before_anything_listens() {
    let b = Bench::new();
    for (args, code, word) in [
        (&["--listen", "localhost:10809"][..], 2, "127.0.0.1:10809"),
        (&["--listen", "0.0.0.0:0"], 1, "--insecure-listen"),
        (&["--listen", "[::]:0"], 1, "--tls-certs"),
        (&["--workers", "0"], 2, "1 to 64"),
        (&["--workers", "65"], 2, "1 to 64"),
        (&["--max-connections", "0"], 2, "1 or more"),
        (&["--linger", "long"], 2, "--linger"),
        (&["--tls", "required"], 2, "--tls-certs"),
        (&["--tls", "perhaps"], 2, "allowed"),
        (&["--tls-certs", "/does/not/exist"], 1, "/does/not/exist"),
        (&["--create-size", "100"], 2, "steps of 4K"),
        (&["--volume", "../etc"], 2, "letter or a digit"),
        (&["--wal-size", "1M"], 2, "64M"),
        (&["--unix", "/does/not/exist/nbd.sock"], 1, "/does/not/exist/nbd.sock"),
    ] {
        // An address of the test's own, so that the default one is in nobody's way.
        let mut command = b.nbd(args);
        if args[0] != "--listen" {
            command.env("VB_UBLK_LISTEN", "127.0.0.1:0");
        }
        let line = failed(&command.output().expect("start"), code);
        assert!(line.contains(word), "{args:?}: {line}");
    }
    let out = b.nbd(&["--listen", "127.0.0.1:0"]).env("VB_UBLK_WAL_DEVICE", "/dev/x").output().expect("start");
    let line = failed(&out, 2);
    assert!(line.contains("/dev/x") && line.contains("--wal-dir"), "{line}");
    std::fs::write(b.path("file"), "precious").expect("write");
    assert!(b.fails(&["--unix", &b.path("file")], 1).contains("not a socket"));
    let mut server = Running::of(&mut b.nbd(&["--listen", "0.0.0.0:0", "--insecure-listen"]));
    assert!(server.line().starts_with("nbd://0.0.0.0:"));
    server.signal(Signal::SIGTERM);
    assert_eq!(server.end().0, Some(0));
}

#[test]
fn the_file_says_it_too() {
    let b = Bench::new();
    let socket = b.path("from-file.sock");
    std::fs::write(b.path("config.toml"), format!("listen = \"127.0.0.1:0\"\nunix = [{socket:?}]\nlinger = 1\n"))
        .expect("write");
    let mut server = Running::of(&mut b.nbd(&[]));
    assert!(server.line().starts_with("nbd://127.0.0.1:"));
    assert_eq!(server.line(), format!("nbd+unix:///?socket={socket}"));
    let begun = Instant::now();
    server.signal(Signal::SIGTERM);
    assert_eq!(server.end().0, Some(0));
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[test]
fn signals_in_a_pair_are_one_wish_and_a_later_one_ends_the_wait() {
    let b = Bench::new();
    let socket = b.path("nbd.sock");
    let args = ["--unix", &socket, "--create-size", "64M", "--linger", "3600"];
    let mut server = Running::of(&mut b.nbd(&args));
    assert!(server.line().starts_with("nbd+unix:"));
    let qemu_io = |pattern: &str| {
        let uri = format!("nbd+unix:///v?socket={socket}");
        let out = Command::new("qemu-io").args(["-f", "raw", "-c", pattern, &uri]).output().expect("qemu-io");
        assert!(out.status.success(), "{out:?}");
    };
    qemu_io("write -P 7 0 1M");
    // Now there is nowhere to upload to: the server would wait for ever.
    let (store, away) = (b.path("data/store"), b.path("away"));
    std::fs::rename(&store, &away).expect("rename");
    std::fs::write(&store, "").expect("write");
    qemu_io("write -P 8 0 1M");
    server.signal(Signal::SIGTERM);
    server.signal(Signal::SIGINT);
    // Longer than the pair may take. Nothing is ever sent.
    let (_quiet, wait) = std::sync::mpsc::channel::<()>();
    let _ = wait.recv_timeout(Duration::from_millis(1500));
    assert!(server.child.try_wait().expect("wait").is_none(), "a pair of signals is no haste");
    server.signal(Signal::SIGTERM);
    let (code, said) = server.end();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("taken for the same wish") && said.contains("(of: v)"), "{said}");
    // What was acknowledged is in the log.
    std::fs::remove_file(&store).expect("remove");
    std::fs::rename(&away, &store).expect("rename");
    let mut server = Running::of(&mut b.nbd(&args));
    assert!(server.line().starts_with("nbd+unix:"));
    qemu_io("read -P 8 0 1M");
    server.signal(Signal::SIGTERM);
    assert_eq!(server.end().0, Some(0));
}

#[test]
fn flushes_and_barriers_go_as_far_as_they_are_told_to() {
    let b = Bench::new();
    let socket = b.path("nbd.sock");
    let args = ["--unix", &socket, "--create-size", "64M", "--linger", "3600", "--force"];
    let serve = |flush: &str| {
        let mut server = Running::of(&mut b.nbd(&[&args[..], &["--flush", flush]].concat()));
        assert!(server.line().starts_with("nbd+unix:"));
        server
    };
    let qemu_io = |volume: &str, orders: &[&str]| {
        let orders = orders.iter().flat_map(|o| ["-c", o]);
        let uri = format!("nbd+unix:///{volume}?socket={socket}");
        let out = Command::new("qemu-io").args(["-f", "raw"]).args(orders).arg(&uri).output().expect("qemu-io");
        assert!(out.status.success() && !String::from_utf8_lossy(&out.stdout).contains("failed"), "{out:?}");
    };
    let ask = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vb-ublk"));
        b.surround(command.args(args));
        command.output().expect("start")
    };
    // The end of this host: the process, and all that is local.
    let lose = |mut server: Running| {
        server.signal(Signal::SIGKILL);
        server.end();
        std::fs::remove_dir_all(b.path("data/wal")).expect("remove");
    };
    let server = serve("store");
    qemu_io("v", &["write -P 7 0 64k", "flush"]);
    qemu_io("v", &["write -P 8 1M 64k", "write -f -P 9 2M 64k"]);
    let said = String::from_utf8(ask(&["status", "v", "--json"]).stdout).expect("text");
    assert!(said.contains("\"flush\": \"store\""), "{said}");
    lose(server);

    let server = serve("wal");
    qemu_io("v", &["read -P 7 0 64k", "read -P 8 1M 64k", "read -P 9 2M 64k", "write -P 5 3M 64k"]);
    let out = ask(&["barrier", "v", "--to", "wal"]);
    assert!(out.status.success() && String::from_utf8_lossy(&out.stdout).contains("loss of power"), "{out:?}");
    let out = ask(&["barrier", "v", "--json"]);
    assert!(out.status.success() && String::from_utf8_lossy(&out.stdout).contains("\"to\": \"store\""), "{out:?}");
    assert!(failed(&ask(&["barrier", "w"]), 1).contains("not attached on this host"));
    assert!(failed(&ask(&["barrier", "v@s"]), 2).contains("name a volume"));
    assert!(b.fails(&["--flush", "disk"], 2).contains("`wal` or `store`"));
    lose(server);

    let server = serve("wal");
    qemu_io("v", &["read -P 5 3M 64k"]);
    lose(server);
}

#[test]
fn benchmarks_measure_and_check_what_they_are_pointed_at() {
    let b = Bench::new();
    let bench = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vb-ublk"));
        b.surround(command.arg("bench").args(args));
        command.output().expect("start")
    };
    let measured = |args: &[&str]| -> serde_json::Value {
        let out = bench(&[args, &["--verify", "--seconds", "1", "--depth", "8", "--json"]].concat());
        assert!(out.status.success(), "{out:?}");
        serde_json::from_slice(&out.stdout).expect("JSON")
    };
    // A volume of its own, of which nothing is left.
    let m = measured(&["--rw", "randrw", "--size", "64M", "--jobs", "2", "--fsync", "100", "--interval", "250"]);
    for kind in ["read", "write", "flush"] {
        assert!(m[kind]["requests"].as_u64() > Some(0) && m[kind]["latency_us"]["p99"].as_f64() > Some(0.0), "{m}");
    }
    assert!(m["verified_bytes"].as_u64() > Some(0) && m["intervals"].as_array().map(Vec::len) > Some(2), "{m}");
    assert!(m["uploaded_seconds"].as_f64() > Some(0.0), "{m}");
    let mut list = Command::new(env!("CARGO_BIN_EXE_vb-ublk"));
    b.surround(list.args(["volume", "list", "--json"]));
    assert_eq!(list.output().expect("start").stdout.trim_ascii(), b"[]");
    assert_eq!(std::fs::read_dir(b.path("data/wal")).expect("folder").count(), 0);

    let (socket, disk) = (b.path("nbd.sock"), b.path("disk"));
    let mut server = Running::of(&mut b.nbd(&["--unix", &socket, "--create-size", "64M", "--workers", "2"]));
    assert!(server.line().starts_with("nbd+unix:"));
    std::fs::File::create(&disk).and_then(|f| f.set_len(32 << 20)).expect("file");
    let uri = format!("nbd+unix:///v?socket={socket}");
    let size = |n: usize| n.to_string();
    for (target, bytes) in [(["--nbd", &uri], 64 << 20), (["--device", &disk], 32 << 20)] {
        let m = measured(&[&target[..], &["--rw", "write", "--bs", "64K", "--fill", "--overwrite"]].concat());
        assert_eq!(m["verified_bytes"].as_u64(), Some(bytes), "all of it: {m}");
        let m = measured(&[&target[..], &["--rw", "randread", "--bs", "512"]].concat());
        assert!(m["read"]["requests"].as_u64() > Some(0) && m["write"].is_null(), "{m}");
        let line = failed(&bench(&target), 2);
        assert!(line.contains("--overwrite") && line.contains(target[1]), "{line}");
        for (args, word) in [
            (["--depth", "0"], "1 to 1024"),
            (["--bs", "1000"], "multiple of 512"),
            (["--size", &size(4096)], "twice as many"),
        ] {
            let line = failed(&bench(&[&target[..], &["--overwrite"], &args].concat()), 2);
            assert!(line.contains(word), "{line}");
        }
    }
    // Another's hand in it, while it is measured: what it finds is not what it has written.
    let work = ["--device", &disk, "--overwrite", "--size", "1M", "--verify", "--seconds", "3"];
    let out = std::thread::scope(|s| {
        let run = s.spawn(|| bench(&[&work[..], &["--rw", "write", "--depth", "1"]].concat()));
        let begun = Instant::now();
        while !run.is_finished() && begun.elapsed() < Duration::from_secs(60) {
            let file = std::fs::OpenOptions::new().write(true).open(&disk).expect("open");
            std::os::unix::fs::FileExt::write_all_at(&file, &[7; 100], 100 << 10).expect("write");
        }
        run.join().expect("run")
    });
    assert!(failed(&out, 1).contains("at byte 102400 are not what was written"), "{out:?}");
    assert!(failed(&bench(&["--nbd", "nbds://h/v"]), 2).contains("TLS"));
    assert!(failed(&bench(&["--nbd", &uri.replace("/v?", "/../x?"), "--rw", "read"]), 1).contains("../x"));
    server.signal(Signal::SIGTERM);
    assert_eq!(server.end().0, Some(0));
}

/// Flips a bit of the header of the record whose data begins with a block full of `byte`.
fn damage_the_record_of(log: &str, byte: u8) {
    let mut bytes = std::fs::read(log).expect("the log");
    let blocks = bytes.chunks(4096).collect::<Vec<_>>();
    let data = blocks.iter().position(|b| b.iter().all(|x| *x == byte)).expect("the write is in the log");
    bytes[(data - 1) * 4096 + 100] ^= 4;
    std::fs::write(log, bytes).expect("write");
}

#[test]
fn a_damaged_log_is_refused_with_what_it_concerns_and_accept_loss_goes_on() {
    let b = Bench::new();
    let socket = b.path("nbd.sock");
    let args = ["--unix", &socket, "--volume", "v", "--create-size", "64M", "--linger", "3600"];
    let serve = |more: &[&str]| {
        let mut server = Running::of(&mut b.nbd(&[&args[..], more].concat()));
        assert!(server.line().starts_with("nbd+unix:"));
        server
    };
    let qemu_io = |orders: &[&str]| {
        let orders = orders.iter().flat_map(|o| ["-c", o]);
        let uri = format!("nbd+unix:///v?socket={socket}");
        let out = Command::new("qemu-io").args(["-f", "raw"]).args(orders).arg(&uri).output().expect("qemu-io");
        out.status.success() && !String::from_utf8_lossy(&out.stdout).contains("verification failed")
    };
    let served = |server: &mut Running| {
        server.signal(Signal::SIGTERM);
        let (code, said) = server.end();
        assert_eq!(code, Some(0), "{said}");
        said
    };
    let mut server = serve(&[]);
    assert!(qemu_io(&["read -P 0 0 64k"]));
    // Out of reach, so that what follows is in the log alone.
    let (store, away) = (b.path("data/store"), b.path("away"));
    std::fs::rename(&store, &away).expect("rename");
    let writes = ["write -P 1 0 64k", "flush", "write -P 2 1M 64k", "flush", "write -P 3 2M 64k", "flush"];
    assert!(qemu_io(&writes) && qemu_io(&["write -P 4 3M 64k", "flush"]));
    server.signal(Signal::SIGKILL);
    server.end();
    std::fs::rename(&away, &store).expect("rename");
    let log = b.path("data/wal/v.wal");
    damage_the_record_of(&log, 2);
    let damaged = std::fs::read(&log).expect("the log");

    let mut server = serve(&[]);
    assert!(!qemu_io(&["read 0 64k"]), "it serves a volume whose log is damaged");
    let said = served(&mut server);
    let refusal = said.lines().find(|l| l.contains("--accept-loss")).expect("a word of what to do");
    // The sectors of the write behind the damaged one, which can be read.
    assert!(refusal.contains("4096 to 4223") && refusal.contains("end with entry 1"), "{refusal}");
    assert!(std::fs::read(&log).expect("the log") == damaged, "a refusal has changed the log");

    let mut server = serve(&["--accept-loss"]);
    assert!(qemu_io(&[
        "read -P 1 0 64k",
        "read -P 0 1M 64k",
        "read -P 0 2M 64k",
        "read -P 0 3M 64k",
        "write -P 9 1M 64k"
    ]));
    let said = served(&mut server);
    assert!(said.contains("v.wal.lost-1"), "{said}");
    assert!(std::fs::read(b.path("data/wal/v.wal.lost-1")).expect("the copy") == damaged, "not the log as it was");
    // From then on the log is whole.
    let mut server = serve(&[]);
    assert!(qemu_io(&["read -P 1 0 64k", "read -P 9 1M 64k", "read -P 0 2M 64k"]));
    served(&mut server);
}
