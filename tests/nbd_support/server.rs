//! `vb-ublk nbd` as a process of its own, with folders of its own, and what its volumes are stored in.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::client::{Addr, Headers};
use super::moto::Moto;
use super::pause;
use super::requests::Client;

/// Where the volumes are.
pub(crate) enum Store {
    File,
    /// Ends with the process that has it.
    Memory,
    S3(Bucket),
}

/// A bucket on an S3 server, and how to get at it.
pub(crate) struct Bucket {
    pub(crate) endpoint: String,
    pub(crate) name: &'static str,
    pub(crate) keys: (String, String),
    /// A server that ends with the place; none where the test has it.
    pub(crate) moto: Option<Moto>,
}

impl Bucket {
    /// One on a server that the test has.
    pub(crate) fn elsewhere(
        endpoint: String,
        name: &'static str,
        (access, secret): (impl Into<String>, impl Into<String>),
    ) -> Self {
        Self { endpoint, name, keys: (access.into(), secret.into()), moto: None }
    }
}

/// A store, and the folders of a host that uses it.
pub(crate) struct Place {
    dir: tempfile::TempDir,
    store: Store,
    host: &'static str,
}

/// For what is async and belongs to another test program, too.
pub(crate) fn block_on<F: Future>(f: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(f)
}

impl Place {
    pub(crate) fn new(store: Store) -> Self {
        // Not on a memory file system: the log wants O_DIRECT.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        std::fs::write(dir.path().join("config.toml"), "").expect("an empty configuration");
        Self { dir, store, host: "a" }
    }

    pub(crate) fn file() -> Self {
        Self::new(Store::File)
    }

    /// Objects in an S3 server of this test's own; none where S3 may be left out.
    pub(crate) fn s3() -> Option<Self> {
        let name = "vb-nbd";
        let moto = block_on(async {
            let moto = Moto::start(false).await?;
            moto.make_bucket(name).await;
            Some(moto)
        })?;
        let keys = ("test".to_owned(), "test".to_owned());
        Some(Self::new(Store::S3(Bucket { endpoint: moto.endpoint(), name, keys, moto: Some(moto) })))
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Another host, as far as the program can tell: another log and state, the same store.
    pub(crate) fn move_to(&mut self, host: &'static str) {
        self.host = host;
    }

    /// From now on requests to the S3 server go to another address of it.
    pub(crate) fn goes_to(&mut self, endpoint: String) {
        if let Store::S3(bucket) = &mut self.store {
            bucket.endpoint = endpoint;
        }
    }

    /// Takes the host's log and state away: what is left is the store's.
    pub(crate) fn wipe_host(&self) {
        std::fs::remove_dir_all(self.data_dir()).expect("the log and state");
    }

    pub(crate) fn data_dir(&self) -> PathBuf {
        self.path(&format!("data-{}", self.host))
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.path(&format!("run-{}", self.host))
    }

    /// The program, with this place's settings and none of the machine's.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_vb-ublk"));
        c.args(args)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("RUST_LOG", std::env::var_os("RUST_LOG").unwrap_or_default())
            .env("VB_UBLK_DATA_DIR", self.data_dir())
            .env("VB_UBLK_RUN_DIR", self.run_dir())
            .env("VB_UBLK_CONFIG", self.path("config.toml"))
            .stdin(Stdio::null());
        match &self.store {
            Store::File => c.env("VB_UBLK_STORE", format!("file://{}", self.path("store").display())),
            Store::Memory => c.env("VB_UBLK_STORE", "memory:nbd"),
            Store::S3(bucket) => c
                .env("VB_UBLK_STORE", format!("s3://{}/volumes", bucket.name))
                .env("AWS_ENDPOINT_URL_S3", &bucket.endpoint)
                .env("AWS_REGION", "us-east-1")
                .env("AWS_ACCESS_KEY_ID", &bucket.keys.0)
                .env("AWS_SECRET_ACCESS_KEY", &bucket.keys.1),
        };
        if matches!(self.store, Store::File) {
            std::fs::create_dir_all(self.path("store")).expect("the store's folder");
        }
        c
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("start the program")
    }

    #[track_caller]
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let out = self.run(args);
        assert!(out.status.success(), "{args:?}: {out:?}");
        String::from_utf8(out.stdout).expect("text")
    }

    /// The one line on stderr of a command that has to fail.
    #[track_caller]
    pub(crate) fn fails(&self, args: &[&str], code: i32) -> String {
        let out = self.run(args);
        let err = String::from_utf8(out.stderr).expect("text");
        assert_eq!(out.status.code(), Some(code), "{args:?}: {err}");
        assert!(err.starts_with("vb-ublk: ") && err.lines().count() == 1, "one line: {err}");
        err
    }

    pub(crate) fn create(&self, volume: &str, size: &str) {
        self.ok(&["volume", "create", volume, "--size", size]);
    }

    /// A server of the volume `vol`, made if it is not there, with these further options.
    #[track_caller]
    pub(crate) fn serve(&self, size: &str, more: &[&str]) -> Server {
        let args = [&["--listen", "127.0.0.1:0", "--volume", "vol", "--create-size", size][..], more].concat();
        self.start(&args)
    }

    /// `vb-ublk nbd` with these options; returns when it serves.
    #[track_caller]
    pub(crate) fn start(&self, args: &[&str]) -> Server {
        match self.try_start(args) {
            Ok(server) => server,
            Err((status, log)) => panic!("vb-ublk nbd {args:?} does not serve ({status}):\n{log}"),
        }
    }

    /// The same, or how it ended and what it said.
    #[track_caller]
    pub(crate) fn try_start(&self, args: &[&str]) -> Result<Server, (ExitStatus, String)> {
        if let Ok(program) = std::env::var("VB_TEST_NBD_SERVER") {
            return Ok(Server::reference(&program, self, args));
        }
        let mut all = vec!["nbd"];
        if !args.contains(&"--wal-size") {
            all.extend(["--wal-size", "64M"]);
        }
        all.extend(args);
        let log = self.path(&format!("nbd-{}.log", unique()));
        let mut command = self.command(&all);
        command.stdout(Stdio::piped()).stderr(File::create(&log).expect("a log"));
        let mut child = command.spawn().expect("start the program");
        let stdout = child.stdout.take().expect("piped");
        let mut server = Server { child, uris: Vec::new(), log };
        // One line per listener; the thread ends with the process.
        let (tx, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = tx.send(line);
            }
        });
        let listeners = args.iter().filter(|a| matches!(**a, "--listen" | "--unix")).count().max(1);
        while server.uris.len() < listeners {
            match lines.recv_timeout(Duration::from_secs(60)) {
                Ok(line) => server.uris.push(line),
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    let status = server.child.wait().expect("wait");
                    return Err((status, server.said()));
                }
                Err(mpsc::RecvTimeoutError::Timeout) => panic!("no URI in a minute:\n{}", server.said()),
            }
        }
        Ok(server)
    }
}

/// A number that no other caller in this process has.
fn unique() -> usize {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A running server; killed when dropped, and then it must not have panicked.
pub(crate) struct Server {
    child: Child,
    pub(crate) uris: Vec<String>,
    log: PathBuf,
}

impl Server {
    /// QEMU's server over a raw file, or nbdkit's memory, to try the tests themselves on.
    fn reference(program: &str, place: &Place, args: &[&str]) -> Self {
        let after = |name: &str| args.iter().position(|a| *a == name).and_then(|i| args.get(i + 1));
        let disk = place.path("reference.raw");
        if !disk.exists() {
            let size = after("--create-size").expect("the size of a volume");
            let out = Command::new("qemu-img").args(["create", "-q", "-f", "raw"]).arg(&disk).arg(size).output();
            assert!(out.expect("qemu-img").status.success());
        }
        let socket = place.path(&format!("reference-{}.sock", unique()));
        let log = place.path(&format!("reference-{}.log", unique()));
        let mut command = Command::new(program);
        if program == "nbdkit" {
            let size = after("--create-size").expect("the size of a volume");
            command.arg("-f").arg("-U").arg(&socket).arg("memory").arg(format!("size={size}"));
        } else if program.ends_with("nbd_ram") {
            command.arg("--size").arg(after("--create-size").expect("the size of a volume")).arg("--unix").arg(&socket);
        } else {
            command.args(["--persistent", "--shared=0", "--discard=unmap", "-f", "raw", "-x", "vol"]);
            command.args(args.contains(&"--read-only").then_some("--read-only"));
            command.arg("-k").arg(&socket).arg(&disk);
        }
        let child = command
            .stdin(Stdio::piped())
            .stderr(File::create(&log).expect("a log"))
            .spawn()
            .expect("start the reference");
        let server = Self { child, uris: vec![format!("nbd+unix:///?socket={}", socket.display())], log };
        super::wait_until("the reference listens", Duration::from_secs(20), || server.addr().connect().is_ok());
        server
    }

    /// Where the first listener is.
    pub(crate) fn addr(&self) -> Addr {
        Addr::of_uri(&self.uris[0])
    }

    #[track_caller]
    pub(crate) fn client(&self, headers: Headers) -> Client {
        Client::connect(&self.addr(), "vol", headers)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it said on stderr so far.
    pub(crate) fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).expect("a signal to the server");
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("wait")
    }

    #[track_caller]
    pub(crate) fn wait(&mut self, limit: Duration) -> ExitStatus {
        let until = Instant::now() + limit;
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            assert!(Instant::now() < until, "the server does not end in {limit:?}:\n{}", self.said());
            pause(Duration::from_millis(20));
        }
    }

    /// SIGTERM: everything is uploaded and released, and the exit code is 0.
    #[track_caller]
    pub(crate) fn terminate(mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.wait(Duration::from_secs(90));
        let reference = std::env::var_os("VB_TEST_NBD_SERVER").is_some();
        assert!(status.success() || reference, "after SIGTERM: {status}\n{}", self.said());
    }

    /// Kills it as a crash would.
    pub(crate) fn kill9(mut self) {
        self.signal(Signal::SIGKILL);
        self.child.wait().expect("wait");
    }

    fn proc_field(&self, file: &str, field: &str) -> u64 {
        let text = std::fs::read_to_string(Path::new("/proc").join(self.pid().to_string()).join(file)).expect("proc");
        let line = text.lines().find(|l| l.starts_with(field)).unwrap_or_else(|| panic!("no {field} in {file}"));
        line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
    }

    /// The memory it has, in KiB.
    pub(crate) fn rss_kib(&self) -> u64 {
        self.proc_field("status", "VmRSS:")
    }

    /// Its threads, but for those that the file store has and keeps, of which there are at most sixteen.
    pub(crate) fn threads(&self) -> u64 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("proc");
        let name = |t: std::fs::DirEntry| std::fs::read_to_string(t.path().join("comm")).unwrap_or_default();
        let names: Vec<String> = tasks.flatten().map(name).collect();
        let (stay, rest): (Vec<_>, Vec<_>) = names.iter().partition(|n| n.trim() == "vb-file-store");
        assert!(stay.len() <= 16, "{names:?}");
        rest.len() as u64
    }

    /// Its open files and sockets.
    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("proc").count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let said = self.said();
        if std::thread::panicking() {
            let from = said.lines().count().saturating_sub(30);
            eprintln!("the server said at last:");
            said.lines().skip(from).for_each(|l| eprintln!("  | {l}"));
        } else {
            assert!(!said.contains("panicked at"), "the server panicked:\n{said}");
        }
    }
}
