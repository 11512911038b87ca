//! What a daemon leaves in the run folder for other commands to find.
//!
//! Invariants:
//! - `VOLUME.lock` is locked (`flock`) for as long as a process attaches, serves or detaches the volume, and
//!   is never removed: who holds the lock is alive, whatever became of process numbers since.
//! - `VOLUME.json` is replaced as a whole, by the holder of the lock alone (or by `del`, which takes the lock).
//! - Without the lock held, a state is that of a dead daemon, or the last words of one that failed.
//! - The run folder is nobody else's to write.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{ErrorKind as IoKind, Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::engine::CachePlace;
use crate::checksum::sha256_hex;
use crate::config::{FlushTo, GarbageLimit, VolumeName};
use crate::error::{Context, Error, ErrorKind, Result};

/// The version of the state file's format.
const VERSION: u32 = 1;
/// A state file is a few hundred bytes.
const MAX_STATE_BYTES: u64 = 64 << 10;
/// The kernel takes paths of sockets of up to this many bytes.
const MAX_SOCKET_PATH: usize = 107;

/// How a volume was attached, for whoever takes its device up again. No secrets: those come from where they came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct How {
    pub(crate) endpoint: Option<String>,
    pub(crate) region: Option<String>,
    pub(crate) profile: Option<String>,
    pub(crate) ca_cert: Option<PathBuf>,
    pub(crate) insecure: bool,
    pub(crate) log_bytes: u64,
    /// None without a cache, and in the states of older programs.
    #[serde(default)]
    pub(crate) cache: Option<CachePlace>,
    pub(crate) read_only: bool,
    #[serde(default)]
    pub(crate) flush: FlushTo,
    #[serde(default)]
    pub(crate) gc_garbage: GarbageLimit,
    /// In seconds.
    #[serde(default)]
    pub(crate) io_timeout: Option<u32>,
    /// Where metrics were asked for; port 0 is a free one, and a recovery takes the same again where it can.
    #[serde(default)]
    pub(crate) metrics: Option<SocketAddr>,
    pub(crate) strict: bool,
}

/// One attached volume, as its daemon describes it to other processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) version: u32,
    pub(crate) volume: VolumeName,
    pub(crate) pid: u32,
    /// Seconds since 1970.
    pub(crate) started_unix_secs: u64,
    /// N of `/dev/ublkbN`; none before it serves, and after it has been stopped.
    pub(crate) device: Option<u32>,
    /// While the device is being taken up: the process that the kernel still has as its server, dead though it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) taken_from: Option<i32>,
    /// Where it is served over NBD, as URIs; none when it is served as a device.
    #[serde(default)]
    pub(crate) nbd: Vec<String>,
    /// Where its metrics are.
    #[serde(default)]
    pub(crate) metrics: Option<SocketAddr>,
    pub(crate) store: String,
    /// The write-ahead log.
    pub(crate) wal: PathBuf,
    /// What the daemon has to say; none when it runs in the foreground.
    pub(crate) daemon_log: Option<PathBuf>,
    /// The last words of a daemon that failed.
    pub(crate) failure: Option<String>,
    /// None when it is served over NBD, and from programs before there was a recovery.
    #[serde(default)]
    pub(crate) how: Option<How>,
}

impl State {
    pub(crate) fn new(volume: VolumeName, store: String, wal: PathBuf, daemon_log: Option<PathBuf>) -> Self {
        Self {
            version: VERSION,
            volume,
            pid: std::process::id(),
            started_unix_secs: crate::time::now_unix(),
            device: None,
            taken_from: None,
            nbd: Vec::new(),
            metrics: None,
            store,
            wal,
            daemon_log,
            failure: None,
            how: None,
        }
    }

    /// `/dev/ublkbN`, if there is one.
    pub(crate) fn device_path(&self) -> Option<PathBuf> {
        self.device.map(super::engine::device_path)
    }

    /// Where it is served over NBD, if it is.
    pub(crate) fn endpoints(&self) -> Option<&[String]> {
        (!self.nbd.is_empty()).then_some(&self.nbd)
    }

    /// How a person detaches the volume from the process that has it.
    pub(crate) fn how_to_detach(&self) -> String {
        if self.nbd.is_empty() {
            format!("`vb-ublk del --volume {}`", self.volume)
        } else {
            format!("`kill {}` (or stop its systemd unit), which detaches all volumes of that server", self.pid)
        }
    }

    fn parse(text: &[u8], volume: &VolumeName, path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let bad = |why: &str| {
            let what =
                format!("the state file {} is damaged ({why}): if no vb-ublk runs for it, remove it", path.display());
            Error::new(ErrorKind::Corrupt, what)
        };
        let Versioned { version } = serde_json::from_slice(text).map_err(|e| bad(&e.to_string()))?;
        if version != VERSION {
            let what = format!("the state file {} has version {version}; this program knows 1", path.display());
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let state: Self = serde_json::from_slice(text).map_err(|e| bad(&e.to_string()))?;
        if state.volume != *volume {
            return Err(bad("it speaks of another volume"));
        }
        Ok(state)
    }
}

/// The run folder.
#[derive(Debug, Clone)]
pub(crate) struct RunDir(PathBuf);

/// The lock of a volume on this host; held until it is dropped, or the process ends.
#[derive(Debug)]
pub(crate) struct Held {
    _file: File,
}

/// Removes a file; one that is not there is no error.
pub(super) fn remove_if_there(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() == IoKind::NotFound => Ok(()),
        done => done,
    }
}

impl RunDir {
    /// The folder at `path`, which need not be there: then nothing is attached.
    pub(crate) fn at(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// Makes the folder, for its owner alone, or checks that nobody else can write to it.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .context(|| format!("making the run folder {} (choose another with --run-dir)", path.display()))?;
        let meta = std::fs::metadata(path).context(|| format!("looking at the run folder {}", path.display()))?;
        if meta.uid() != nix::unistd::geteuid().as_raw() || meta.mode() & 0o022 != 0 {
            let what = format!(
                "the run folder {} can be changed by others (owner {}, mode {:o}): make it yours alone, or choose another with \
                 --run-dir",
                path.display(),
                meta.uid(),
                meta.mode() & 0o7777
            );
            return Err(Error::new(ErrorKind::Denied, what));
        }
        Ok(Self(path.to_owned()))
    }

    fn state_path(&self, volume: &VolumeName) -> PathBuf {
        self.0.join(format!("{volume}.json"))
    }

    /// Where the daemon logs to.
    pub(crate) fn log_path(&self, volume: &VolumeName) -> PathBuf {
        self.0.join(format!("{volume}.log"))
    }

    /// The control socket. The kernel limits the length of its path: a long name is hashed.
    pub(crate) fn socket_path(&self, volume: &VolumeName) -> Result<PathBuf> {
        let path = self.0.join(format!("{volume}.sock"));
        if path.as_os_str().len() <= MAX_SOCKET_PATH {
            return Ok(path);
        }
        let hash = sha256_hex(volume.as_str().as_bytes());
        // No volume's name begins with a dot.
        let path = self.0.join(format!(".{}.sock", &hash[..16]));
        if path.as_os_str().len() <= MAX_SOCKET_PATH {
            return Ok(path);
        }
        let what = format!(
            "the path of the run folder {} is too long for a socket: choose a shorter --run-dir",
            self.0.display()
        );
        Err(Error::new(ErrorKind::Usage, what))
    }

    /// What is locked: it stays, so that nobody locks another of its name.
    pub(crate) fn lock_path(&self, volume: &VolumeName) -> PathBuf {
        self.0.join(format!("{volume}.lock"))
    }

    /// Takes the volume's lock; `None` when another process has it.
    pub(crate) fn lock(&self, volume: &VolumeName) -> Result<Option<Held>> {
        let path = self.lock_path(volume);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .context(|| format!("opening {}", path.display()))?;
        // Who only looks (`is_held`) has the lock for a moment, too.
        for _ in 0..10 {
            match file.try_lock() {
                Ok(()) => return Ok(Some(Held { _file: file })),
                Err(TryLockError::WouldBlock) => super::pause(Duration::from_millis(10)),
                Err(TryLockError::Error(e)) => return Err(e).context(|| format!("locking {}", path.display())),
            }
        }
        Ok(None)
    }

    /// Whether a process has the volume.
    pub(crate) fn is_held(&self, volume: &VolumeName) -> Result<bool> {
        let path = self.lock_path(volume);
        let file = match File::open(&path) {
            Ok(f) => f,
            Err(e) if e.kind() == IoKind::NotFound => return Ok(false),
            Err(e) => return Err(e).context(|| format!("opening {}", path.display())),
        };
        // Shared, so that two who only look do not see each other.
        match file.try_lock_shared() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(e)) => Err(e).context(|| format!("locking {}", path.display())),
        }
    }

    /// Replaces the volume's state.
    pub(crate) fn write(&self, state: &State) -> Result<()> {
        let path = self.state_path(&state.volume);
        let fresh = self.0.join(format!(".{}.json.tmp", state.volume));
        let text = serde_json::to_vec_pretty(state)
            .map_err(|e| Error::new(ErrorKind::Internal, "writing JSON").with_source(e))?;
        let written = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&fresh)
            .and_then(|mut f| f.write_all(&text))
            .and_then(|()| std::fs::rename(&fresh, &path));
        written.context(|| format!("writing the state file {}", path.display()))
    }

    /// The volume's state, if there is one.
    pub(crate) fn read(&self, volume: &VolumeName) -> Result<Option<State>> {
        let path = self.state_path(volume);
        let file = match File::open(&path) {
            Ok(f) => f,
            Err(e) if e.kind() == IoKind::NotFound => return Ok(None),
            Err(e) => return Err(e).context(|| format!("opening the state file {}", path.display())),
        };
        let mut text = Vec::new();
        file.take(MAX_STATE_BYTES)
            .read_to_end(&mut text)
            .context(|| format!("reading the state file {}", path.display()))?;
        State::parse(&text, volume, &path).map(Some)
    }

    /// Removes state and socket; what is missing is no error.
    pub(crate) fn remove(&self, volume: &VolumeName) -> Result<()> {
        for path in [self.state_path(volume), self.socket_path(volume)?] {
            remove_if_there(&path).context(|| format!("removing {}", path.display()))?;
        }
        Ok(())
    }

    /// All states, by name of volume. A damaged one is reported in its place and hides no other.
    pub(crate) fn all(&self) -> Result<Vec<(VolumeName, Result<State>)>> {
        let what = || format!("listing the run folder {}", self.0.display());
        let entries = match std::fs::read_dir(&self.0) {
            Ok(e) => e,
            Err(e) if e.kind() == IoKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e).context(what),
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.context(what)?.file_name();
            let volume = name.to_str().and_then(|n| n.strip_suffix(".json")).and_then(|n| n.parse::<VolumeName>().ok());
            names.extend(volume);
        }
        names.sort();
        let read = |v: VolumeName| self.read(&v).transpose().map(|s| (v, s));
        Ok(names.into_iter().filter_map(read).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(s: &str) -> VolumeName {
        s.parse().expect("name")
    }

    fn fresh() -> (tempfile::TempDir, RunDir) {
        let dir = tempfile::tempdir().expect("dir");
        let run = RunDir::create(&dir.path().join("run")).expect("run folder");
        (dir, run)
    }

    fn state(volume: &str) -> State {
        State::new(name(volume), "file:///s".into(), "/wal".into(), None)
    }

    #[test]
    fn what_is_written_is_read() {
        let (_dir, run) = fresh();
        assert!(run.all().expect("none").is_empty());
        let mut a = state("a");
        run.write(&a).expect("write");
        a.device = Some(3);
        run.write(&a).expect("replace");
        run.write(&state("b.json")).expect("write");
        assert_eq!(run.read(&name("a")).expect("read"), Some(a.clone()));
        assert_eq!(a.device_path(), Some("/dev/ublkb3".into()));
        let all: Vec<_> = run.all().expect("all").into_iter().map(|(n, _)| n.to_string()).collect();
        assert_eq!(all, ["a", "b.json"]);
        run.remove(&name("a")).expect("remove");
        run.remove(&name("a")).expect("again");
        assert_eq!(run.read(&name("a")).expect("gone"), None);
    }

    #[test]
    fn a_state_from_before_nbd_is_read() {
        let (dir, run) = fresh();
        let text = r#"{"version":1,"volume":"v","pid":7,"started_unix_secs":1,"device":3,"store":"file:///s","wal":"/w",
            "daemon_log":null,"failure":null}"#;
        std::fs::write(dir.path().join("run/v.json"), text).expect("write");
        let mut state = run.read(&name("v")).expect("read").expect("state");
        assert_eq!((state.device, state.endpoints()), (Some(3), None));
        assert_eq!(state.how_to_detach(), "`vb-ublk del --volume v`");
        assert_eq!(state.metrics, None);
        state.nbd = vec!["nbd://127.0.0.1:10809/v".into()];
        let how = r#"{"endpoint":null,"region":null,"profile":null,"ca_cert":null,"insecure":false,"log_bytes":1,"read_only":false,
            "strict":false}"#;
        let mut how: How = serde_json::from_str(how).expect("from before metrics");
        how.metrics = Some("[::1]:0".parse().expect("address"));
        state.how = Some(how);
        state.metrics = Some("[::1]:9150".parse().expect("address"));
        run.write(&state).expect("write");
        assert_eq!(run.read(&name("v")).expect("read"), Some(state.clone()));
        assert!(state.how_to_detach().contains("`kill 7`"));
    }

    #[test]
    fn damage_is_named_and_hides_nothing() {
        let (dir, run) = fresh();
        run.write(&state("good")).expect("write");
        for (file, text) in [
            ("cut.json", "{\"version\":1"),
            ("empty.json", ""),
            ("new.json", "{\"version\":2}"),
            ("other.json", &serde_json::to_string(&state("good")).expect("json")),
            ("-notaname.json", "x"),
        ] {
            std::fs::write(dir.path().join("run").join(file), text).expect("write");
        }
        let all = run.all().expect("all");
        let outcome: Vec<_> = all.iter().map(|(n, s)| (n.as_str(), s.as_ref().map_err(Error::kind).err())).collect();
        let corrupt = Some(ErrorKind::Corrupt);
        let expect = [
            ("cut", corrupt),
            ("empty", corrupt),
            ("good", None),
            ("new", Some(ErrorKind::Unsupported)),
            ("other", corrupt),
        ];
        assert_eq!(outcome, expect);
    }

    #[test]
    fn the_lock_tells_the_living_from_the_dead() {
        let (_dir, run) = fresh();
        let v = name("v");
        assert!(!run.is_held(&v).expect("never locked"));
        let held = run.lock(&v).expect("lock").expect("free");
        assert!(run.is_held(&v).expect("held"));
        assert!(run.lock(&v).expect("second").is_none());
        assert!(run.lock(&name("w")).expect("another volume").is_some());
        drop(held);
        assert!(!run.is_held(&v).expect("freed"));
    }

    #[test]
    fn a_folder_that_others_can_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("open");
        std::fs::create_dir(&path).expect("mkdir");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).expect("chmod");
        assert_eq!(RunDir::create(&path).expect_err("open to all").kind(), ErrorKind::Denied);
        let (_dir, run) = fresh();
        assert_eq!(std::fs::metadata(&run.0).expect("meta").mode() & 0o777, 0o700);
    }

    #[test]
    fn sockets_of_long_names_have_short_paths() {
        let run = RunDir::at(Path::new("/run/vb-ublk"));
        assert_eq!(run.socket_path(&name("v")).expect("short"), Path::new("/run/vb-ublk/v.sock"));
        let (a, b) = (name(&"x".repeat(128)), name(&"x".repeat(127)));
        let (a, b) = (run.socket_path(&a).expect("long"), run.socket_path(&b).expect("long"));
        assert!(a != b && a.as_os_str().len() <= MAX_SOCKET_PATH);
        let far = RunDir::at(Path::new(&format!("/{}", "d".repeat(120))));
        assert_eq!(far.socket_path(&name("v")).expect_err("too long").kind(), ErrorKind::Usage);
    }
}
