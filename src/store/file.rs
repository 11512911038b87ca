//! Objects as files below a folder: `file:///dir`, one file per key.
//!
//! Invariants:
//! - A key's file is complete whenever it can be seen: it is written under a temporary name in the same
//!   folder, synced, then renamed; the folder is synced before the call returns, and every folder above it
//!   before its first use by this process.
//! - Every change of a key (put, conditional put, delete) is made under an exclusive `flock` of one of 256
//!   lock files, chosen by the key's hash, each through an open file of its own: so compare-and-rename is
//!   atomic against threads and against other processes on this host. Readers take no lock.
//! - The version is the SHA-256 of the content.
//!
//! Names that begin with `.vb-` are this module's own: lock files in `ROOT/.vb-locks`, temporary files
//! beside their target. A temporary file that a dead process left is never listed, never read, and goes
//! when a process first uses its folder a day later.
//!
//! All system calls run on threads of the store's own, which stay: where memory is short, a new one might be waited for. What is read and
//! written goes past the page cache ([`direct`]), but for the reads of a process that may wait for memory ([`bulk`]).

mod bulk;
mod direct;

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind as IoKind};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;

use super::{
    ObjectMeta, Precondition, RESERVED, Store, StoreUrl, Version, check_key, check_prefix, check_range, check_size,
    no_such_object, short_object,
};
use crate::checksum::sha256_hex;
use crate::error::{Context, Error, ErrorKind, Result};
use bulk::Bulk;

const LOCK_FOLDER: &str = ".vb-locks";
const TEMPORARY: &str = ".vb-tmp-";
/// How old a temporary file must be before it counts as left behind.
const STALE: Duration = Duration::from_secs(24 * 3600);

/// Bodies of this size and above…
const LARGE: usize = 256 << 10;
/// …are written so many at once: more only wait in the disk's queue, where the log's writes wait behind them.
const LARGE_WRITES: usize = 2;

/// Threads for system calls, of all file stores of the process…
const THREADS: usize = 16;
/// …that stay when there is nothing to do…
const STAY: Duration = Duration::from_secs(1 << 30);
/// …with stacks that a process whose memory is locked can afford.
const STACK: usize = 256 << 10;

static TEMPORARIES: AtomicU64 = AtomicU64::new(0);

/// See the module's page.
#[derive(Debug, Clone)]
pub struct FileStore(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    /// Folders that are known to be on stable storage, with all above them.
    synced: Mutex<HashSet<PathBuf>>,
    /// Turns for large bodies.
    large: Semaphore,
    /// Reads go this way, if not past the page cache.
    bulk: Option<Bulk>,
}

impl FileStore {
    /// Opens the store at `root`; with `create`, makes the folder and those above it.
    ///
    /// # Errors
    /// `NotFound` when the folder is missing, `Usage` when it is something else, `Denied`, `Full`, `Io`.
    pub async fn open(root: &Path, create: bool) -> Result<Self> {
        Self::open_for(root, create, false).await
    }

    /// The same; with `bulk`, for a process that reads much of it and serves no device.
    ///
    /// # Errors
    /// Those of [`Self::open`].
    pub async fn open_for(root: &Path, create: bool, bulk: bool) -> Result<Self> {
        let store = Self(Arc::new(Inner {
            root: root.to_owned(),
            synced: Mutex::default(),
            large: Semaphore::new(LARGE_WRITES),
            bulk: bulk.then(Bulk::default),
        }));
        store
            .blocking(move |inner| {
                let root = &inner.root;
                match fs::metadata(root) {
                    Ok(m) if m.is_dir() => {}
                    Ok(_) => {
                        return Err(Error::new(
                            ErrorKind::Usage,
                            format!("{} is not a folder: name one for the store", root.display()),
                        ));
                    }
                    Err(e) if e.kind() == IoKind::NotFound && create => create_above(root)?,
                    Err(e) => {
                        let hint = if e.kind() == IoKind::NotFound { "; create it first" } else { "" };
                        return Err(Error::io(format!("opening the store folder {}{hint}", root.display()), e));
                    }
                }
                Ok(())
            })
            .await?;
        Ok(store)
    }

    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(&Inner) -> Result<T> + Send + 'static) -> Result<T> {
        let inner = Arc::clone(&self.0);
        threads()?
            .spawn_blocking(move || work(&inner))
            .await
            .map_err(|e| Error::new(ErrorKind::Internal, "a thread of the file store ended early").with_source(e))?
    }
}

/// Where the calls are made; nothing else runs there.
fn threads() -> Result<&'static Runtime> {
    static POOL: OnceLock<io::Result<Runtime>> = OnceLock::new();
    let make = || {
        Builder::new_current_thread()
            .max_blocking_threads(THREADS)
            .thread_stack_size(STACK)
            .thread_keep_alive(STAY)
            .thread_name("vb-file-store")
            .build()
    };
    POOL.get_or_init(make)
        .as_ref()
        .map_err(|e| Error::new(ErrorKind::Io, format!("starting the file store's threads: {e}")))
}

/// Makes the root folder and those missing above it; each is synced with its parent.
fn create_above(root: &Path) -> Result<()> {
    let mut missing: Vec<&Path> = root.ancestors().take_while(|p| !p.exists()).collect();
    while let Some(folder) = missing.pop() {
        create_folder(folder)?;
        sync_folder(folder.parent().unwrap_or(Path::new("/")))?;
    }
    Ok(())
}

fn create_folder(folder: &Path) -> Result<()> {
    match fs::create_dir(folder) {
        Err(e) if e.kind() != IoKind::AlreadyExists => Err(e).context(|| format!("creating {}", folder.display())),
        _ => Ok(()),
    }
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|f| f.sync_all()).context(|| format!("syncing the folder {}", folder.display()))
}

fn version_of(body: &[u8]) -> Version {
    Version(sha256_hex(body))
}

/// A name in a key's folder that goes when it is dropped, unless it was renamed away.
struct Temporary {
    path: PathBuf,
    armed: bool,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if self.armed {
            // Harmless if it stays: see the module's page.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Inner {
    fn url(&self) -> String {
        StoreUrl::File { root: self.root.clone() }.to_string()
    }

    fn path(&self, key: &str) -> Result<PathBuf> {
        check_key(key)?;
        Ok(self.root.join(key))
    }

    /// Makes `folder` (at or below the root) and brings it to stable storage, once per process.
    ///
    /// Another process may have made it without having synced it yet: existing is not enough.
    fn prepare_folder(&self, folder: &Path) -> Result<()> {
        if self.synced.lock().unwrap_or_else(PoisonError::into_inner).contains(folder) {
            return Ok(());
        }
        let mut below: Vec<&Path> = folder.ancestors().take_while(|p| *p != self.root).collect();
        let mut parent = self.root.as_path();
        while let Some(next) = below.pop() {
            create_folder(next)?;
            sync_folder(parent)?;
            parent = next;
        }
        remove_stale(folder);
        self.synced.lock().unwrap_or_else(PoisonError::into_inner).insert(folder.to_owned());
        Ok(())
    }

    /// The lock that covers `key`; held until dropped, or until the process dies.
    fn lock(&self, key: &str) -> Result<Flock<File>> {
        let folder = self.root.join(LOCK_FOLDER);
        let path = folder.join(format!("{:02x}", Sha256::digest(key.as_bytes())[0]));
        let mut file = self
            .in_folder(&folder, || OpenOptions::new().create(true).truncate(false).write(true).open(&path))
            .map_err(|e| e.context(format!("opening the lock {}", path.display())))?;
        loop {
            match Flock::lock(file, FlockArg::LockExclusive) {
                Ok(held) => return Ok(held),
                Err((again, nix::errno::Errno::EINTR)) => file = again,
                Err((_, e)) => return Err(Error::io(format!("taking the lock {}", path.display()), e.into())),
            }
        }
    }

    /// Makes a file in `folder`, and the folder before it; once more if somebody removed the folder meanwhile.
    fn in_folder(&self, folder: &Path, mut create: impl FnMut() -> io::Result<File>) -> Result<File> {
        self.prepare_folder(folder)?;
        let first = create();
        if !first.as_ref().is_err_and(|e| e.kind() == IoKind::NotFound) {
            return first.context(|| format!("creating a file in {}", folder.display()));
        }
        self.synced.lock().unwrap_or_else(PoisonError::into_inner).remove(folder);
        self.prepare_folder(folder)?;
        create().context(|| format!("creating a file in {}", folder.display()))
    }

    /// Writes `body` under a temporary name beside `path` and syncs it.
    fn write_temporary(&self, path: &Path, body: &[u8]) -> Result<Temporary> {
        let folder = path.parent().unwrap_or(&self.root);
        let name = format!(
            "{TEMPORARY}{}-{}-{:016x}",
            std::process::id(),
            TEMPORARIES.fetch_add(1, Ordering::Relaxed),
            // The process id alone is not unique when containers share a folder.
            getrandom::u64().map_err(|e| Error::new(ErrorKind::Io, "drawing a name for a file").with_source(e))?
        );
        let temporary = folder.join(name);
        let mut file = self.in_folder(folder, || OpenOptions::new().write(true).create_new(true).open(&temporary))?;
        let temporary = Temporary { path: temporary, armed: true };
        direct::write(&mut file, body)
            .and_then(|()| file.sync_all())
            .context(|| format!("writing {} bytes for {}", body.len(), path.display()))?;
        Ok(temporary)
    }

    /// Gives the temporary file its name and syncs the folder. Called under the key's lock.
    fn publish(&self, mut temporary: Temporary, path: &Path) -> Result<()> {
        fs::rename(&temporary.path, path).context(|| format!("renaming a new file to {}", path.display()))?;
        temporary.armed = false;
        sync_folder(path.parent().unwrap_or(&self.root))
    }

    fn read(&self, key: &str) -> Result<Bytes> {
        let path = self.path(key)?;
        let file = File::open(&path).map_err(|e| self.read_error(key, e))?;
        let size = file.metadata().map_err(|e| self.read_error(key, e))?.len();
        check_size(key, size)?;
        self.read_part(&file, 0..size).map_err(|e| self.read_error(key, e))
    }

    fn read_part(&self, file: &File, range: Range<u64>) -> io::Result<Bytes> {
        match &self.bulk {
            Some(bulk) => bulk.read(file, range),
            None => direct::read(file, range),
        }
    }

    fn read_error(&self, key: &str, e: io::Error) -> Error {
        match e.kind() {
            IoKind::NotFound if !self.root.exists() => self.away(),
            // A folder of that name, or a file where a folder would be: no such object.
            IoKind::NotFound | IoKind::IsADirectory | IoKind::NotADirectory => no_such_object(&self.url(), key),
            _ => Error::io(format!("reading {key} in {}", self.url()), e),
        }
    }

    /// The whole folder has gone since it was opened: that says nothing of any object, and may pass by itself.
    fn away(&self) -> Error {
        Error::new(ErrorKind::Unreachable, format!("the store folder {} is not there any more", self.root.display()))
    }

    fn read_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        check_range(key, &range)?;
        let path = self.path(key)?;
        let file = File::open(&path).map_err(|e| self.read_error(key, e))?;
        let meta = file.metadata().map_err(|e| self.read_error(key, e))?;
        if meta.is_dir() {
            return Err(no_such_object(&self.url(), key));
        }
        if meta.len() < range.end {
            return Err(short_object(key, &range, meta.len()));
        }
        self.read_part(&file, range).map_err(|e| self.read_error(key, e))
    }

    fn put(&self, key: &str, body: &[u8]) -> Result<()> {
        let path = self.path(key)?;
        check_size(key, body.len() as u64)?;
        let temporary = self.write_temporary(&path, body)?;
        let _lock = self.lock(key)?;
        self.publish(temporary, &path)
    }

    fn put_if(&self, key: &str, body: &[u8], condition: &Precondition) -> Result<Version> {
        let path = self.path(key)?;
        check_size(key, body.len() as u64)?;
        let conflict = |what: &str| Error::new(ErrorKind::Conflict, format!("{key} in {} {what}", self.url()));
        let mut temporary = self.write_temporary(&path, body)?;
        let _lock = self.lock(key)?;
        match condition {
            Precondition::Absent => {
                // A link never replaces, even where somebody writes without our lock.
                match fs::hard_link(&temporary.path, &path) {
                    Ok(()) => {
                        let _ = fs::remove_file(&temporary.path);
                        temporary.armed = false;
                        sync_folder(path.parent().unwrap_or(&self.root))?;
                    }
                    Err(e) if e.kind() == IoKind::AlreadyExists => return Err(conflict("exists already")),
                    // File systems without hard links: the lock alone must do.
                    Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EOPNOTSUPP | libc::ENOSYS)) => {
                        if path.exists() {
                            return Err(conflict("exists already"));
                        }
                        self.publish(temporary, &path)?;
                    }
                    Err(e) => return Err(Error::io(format!("creating {}", path.display()), e)),
                }
            }
            Precondition::Matches(wanted) => {
                match self.read(key) {
                    Ok(now) if version_of(&now) == *wanted => {}
                    Ok(_) => return Err(conflict("has been written meanwhile")),
                    Err(e) if e.kind() == ErrorKind::NotFound => return Err(conflict("is gone")),
                    Err(e) => return Err(e),
                }
                self.publish(temporary, &path)?;
            }
        }
        Ok(version_of(body))
    }

    fn delete(&self, key: &str) -> Result<()> {
        let path = self.path(key)?;
        let _lock = self.lock(key)?;
        match fs::remove_file(&path) {
            Ok(()) => sync_folder(path.parent().unwrap_or(&self.root)),
            Err(e) if matches!(e.kind(), IoKind::NotFound | IoKind::NotADirectory | IoKind::IsADirectory) => Ok(()),
            Err(e) => Err(Error::io(format!("deleting {}", path.display()), e)),
        }
    }

    fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectMeta>> {
        check_prefix(prefix)?;
        let mut found = Vec::new();
        let mut folders = vec![prefix.rsplit_once('/').map_or_else(String::new, |(folder, _)| folder.to_owned())];
        while let Some(folder) = folders.pop() {
            let path = self.root.join(&folder);
            let entries = match fs::read_dir(&path) {
                Ok(entries) => entries,
                Err(e) if e.kind() == IoKind::NotFound && !self.root.exists() => return Err(self.away()),
                // Nothing there (any more), or an object of that name.
                Err(e) if folder.is_empty() => return Err(Error::io(format!("listing {}", self.url()), e)),
                Err(e) if matches!(e.kind(), IoKind::NotFound | IoKind::NotADirectory) => continue,
                Err(e) => return Err(Error::io(format!("listing {}", path.display()), e)),
            };
            for entry in entries {
                let entry = entry.context(|| format!("listing {}", path.display()))?;
                let Some(key) = key_of(&folder, &entry.file_name()) else { continue };
                // A folder whose keys all lie outside the prefix is not entered.
                if !key.starts_with(prefix) && !prefix.starts_with(&format!("{key}/")) {
                    continue;
                }
                let kind = entry.file_type().context(|| format!("looking at {}", entry.path().display()))?;
                // A symbolic link is followed: a volume's folder may have been moved to another disk.
                let is_folder = kind.is_dir() || kind.is_symlink() && entry.path().is_dir();
                if is_folder {
                    // The bound ends walks through a link that leads back up.
                    if key.len() < super::MAX_KEY_BYTES {
                        folders.push(key);
                    }
                    continue;
                }
                if !key.starts_with(prefix) || start_after.is_some_and(|after| key.as_str() <= after) {
                    continue;
                }
                match fs::metadata(entry.path()) {
                    Ok(m) => found.push(ObjectMeta { key, size: m.len() }),
                    // Deleted since the folder was read.
                    Err(e) if e.kind() == IoKind::NotFound => {}
                    Err(e) => return Err(Error::io(format!("looking at {}", entry.path().display()), e)),
                }
            }
        }
        found.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        Ok(found)
    }
}

/// The key (or folder of keys) of a directory entry, unless it is none of the store's objects.
fn key_of(folder: &str, name: &OsStr) -> Option<String> {
    let Some(name) = name.to_str() else {
        tracing::warn!(folder, ?name, "a file in the store's folder cannot be an object: its name is not UTF-8");
        return None;
    };
    if name.starts_with(RESERVED) {
        return None;
    }
    Some(if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") })
}

/// Removes temporary files that nobody can be writing any more. Best effort.
fn remove_stale(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        if !entry.file_name().as_encoded_bytes().starts_with(TEMPORARY.as_bytes()) {
            continue;
        }
        let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|at| at.elapsed().ok());
        if age.is_some_and(|age| age > STALE) && fs::remove_file(entry.path()).is_ok() {
            tracing::info!(file = %entry.path().display(), "removed a file that a dead process left behind");
        }
    }
}

#[async_trait]
impl Store for FileStore {
    async fn get(&self, key: &str) -> Result<(Bytes, Version)> {
        let key = key.to_owned();
        self.blocking(move |s| {
            let body = s.read(&key)?;
            let version = version_of(&body);
            Ok((body, version))
        })
        .await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let key = key.to_owned();
        self.blocking(move |s| s.read_range(&key, range)).await
    }

    async fn put(&self, key: &str, body: Bytes) -> Result<()> {
        let key = key.to_owned();
        // Closed never: the store holds it.
        let _turn = if body.len() >= LARGE { self.0.large.acquire().await.ok() } else { None };
        self.blocking(move |s| s.put(&key, &body)).await
    }

    async fn put_if(&self, key: &str, body: Bytes, condition: Precondition) -> Result<Version> {
        let key = key.to_owned();
        self.blocking(move |s| s.put_if(&key, &body, &condition)).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectMeta>> {
        let (prefix, start_after) = (prefix.to_owned(), start_after.map(str::to_owned));
        self.blocking(move |s| s.list(&prefix, start_after.as_deref())).await
    }

    async fn delete(&self, key: &str) -> Result<()> {
        let key = key.to_owned();
        self.blocking(move |s| s.delete(&key)).await
    }

    fn url(&self) -> String {
        self.0.url()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missing_folder_is_made_only_on_demand() {
        let dir = tempfile::tempdir().expect("tempdir");
        let root = dir.path().join("a/b");
        assert_eq!(FileStore::open(&root, false).await.expect_err("missing").kind(), ErrorKind::NotFound);
        FileStore::open(&root, true).await.expect("created");
        FileStore::open(&root, false).await.expect("there now");
        fs::write(dir.path().join("f"), "").expect("write");
        assert_eq!(FileStore::open(&dir.path().join("f"), true).await.expect_err("a file").kind(), ErrorKind::Usage);
    }

    #[tokio::test]
    async fn a_folder_that_goes_away_says_nothing_of_its_objects() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (root, elsewhere) = (dir.path().join("s"), dir.path().join("t"));
        let s = FileStore::open(&root, true).await.expect("open");
        s.put("v/k", Bytes::from_static(b"xyz")).await.expect("put");
        fs::rename(&root, &elsewhere).expect("move it away");
        assert_eq!(s.get("v/k").await.expect_err("away").kind(), ErrorKind::Unreachable);
        assert_eq!(s.get_range("v/k", 0..1).await.expect_err("away").kind(), ErrorKind::Unreachable);
        assert_eq!(s.list("v/", None).await.expect_err("away").kind(), ErrorKind::Unreachable);
        s.put("v/l", Bytes::new()).await.expect_err("away");
        assert!(!root.exists(), "nobody makes a store anew in its place");
        fs::rename(&elsewhere, &root).expect("move it back");
        assert_eq!(s.get("v/k").await.expect("get").0, "xyz");
        assert_eq!(s.get("v/l").await.expect_err("none").kind(), ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn temporary_files_and_locks_are_never_objects() {
        let dir = tempfile::tempdir().expect("tempdir");
        let s = FileStore::open(dir.path(), true).await.expect("open");
        fs::create_dir(dir.path().join("v")).expect("mkdir");
        let (fresh, stale) = (dir.path().join("v/.vb-tmp-1-1-a"), dir.path().join("v/.vb-tmp-1-1-b"));
        fs::write(&fresh, "half").expect("write");
        let old = File::create(&stale).expect("create");
        let now = old.metadata().and_then(|m| m.modified()).expect("its time");
        old.set_modified(now - STALE * 2).expect("set the time");
        s.put("v/k", Bytes::from_static(b"x")).await.expect("put");
        assert_eq!(s.list("", None).await.expect("list"), [ObjectMeta { key: "v/k".into(), size: 1 }]);
        assert!(fresh.exists() && !stale.exists());
        assert_eq!(s.get("v/.vb-tmp-1-1-a").await.expect_err("reserved").kind(), ErrorKind::Usage);
    }

    #[tokio::test]
    async fn failures_leave_no_temporary_file() {
        let dir = tempfile::tempdir().expect("tempdir");
        let s = FileStore::open(dir.path(), true).await.expect("open");
        s.put("v/k", Bytes::from_static(b"x")).await.expect("put");
        let e = s.put_if("v/k", Bytes::from_static(b"y"), Precondition::Absent).await.expect_err("exists");
        assert_eq!(e.kind(), ErrorKind::Conflict);
        s.put("v", Bytes::from_static(b"y")).await.expect_err("a folder has that name");
        let left = |d: &Path| {
            fs::read_dir(d)
                .expect("read")
                .filter(|e| e.as_ref().is_ok_and(|e| e.file_name().to_string_lossy().starts_with(TEMPORARY)))
                .count()
        };
        assert_eq!(left(dir.path()) + left(&dir.path().join("v")), 0);
    }

    #[tokio::test]
    async fn a_folder_removed_by_somebody_comes_back() {
        let dir = tempfile::tempdir().expect("tempdir");
        let s = FileStore::open(dir.path(), true).await.expect("open");
        s.put("v/k", Bytes::from_static(b"x")).await.expect("put");
        fs::remove_dir_all(dir.path().join("v")).expect("remove");
        s.put("v/k", Bytes::from_static(b"y")).await.expect("the folder is made again");
        fs::remove_dir_all(dir.path().join(LOCK_FOLDER)).expect("remove");
        s.delete("v/k").await.expect("the lock folder is made again");
    }
}
