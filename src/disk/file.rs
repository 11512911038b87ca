//! Opening data files and devices: O_DIRECT, one lock, known size.
//!
//! Invariant: the lock (`flock`) sits on the open file description that every lane and store thread
//! writes through (they dup it, never reopen), so a dead process's requests in flight still hold it,
//! and whoever takes it next knows that those writes are over.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::error::{Context, Error, ErrorKind, Result};

/// An open log or cache file, or a block device.
#[derive(Debug)]
pub struct DataFile {
    file: Flock<File>,
    path: PathBuf,
    device: bool,
    direct: bool,
}

#[derive(Clone, Copy)]
enum Access {
    Read,
    Write { create: bool },
}

/// How long to wait for a lock: the kernel ends a dead process's requests after the process itself, and udev holds a
/// lock on a block device while it looks at it.
const LOCK_TRIES: u32 = 100;
const LOCK_PAUSE_MS: u16 = 50;

/// Takes the lock, waiting up to five seconds for it.
fn lock(mut file: File) -> std::result::Result<Flock<File>, nix::errno::Errno> {
    for _ in 1..LOCK_TRIES {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Err((f, nix::errno::Errno::EWOULDBLOCK)) => file = f,
            locked => return locked.map_err(|(_, e)| e),
        }
        // Interrupted, it waits less.
        let _ = nix::poll::poll(&mut [], nix::poll::PollTimeout::from(LOCK_PAUSE_MS));
    }
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| e)
}

impl DataFile {
    /// Opens `path` for reading and writing with O_DIRECT and locks it. With `create` a missing file is
    /// made, with its folder entry synced. A file system without O_DIRECT is used through the page cache, with a
    /// warning: completed writes still survive the process, and flushes the power.
    ///
    /// # Errors
    /// `Busy` when another process holds the lock, else the kind of the I/O error.
    pub fn open(path: &Path, create: bool) -> Result<Self> {
        Self::open_as(path, Access::Write { create })
    }

    /// The same for reading alone: nothing can be changed through it. Takes the lock, so nobody else changes it either.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn open_to_read(path: &Path) -> Result<Self> {
        Self::open_as(path, Access::Read)
    }

    fn open_as(path: &Path, access: Access) -> Result<Self> {
        let (write, create) = match access {
            Access::Read => (false, false),
            Access::Write { create } => (true, create),
        };
        let attempt = |direct: bool| {
            let mut flags = libc::O_CLOEXEC;
            if direct {
                flags |= libc::O_DIRECT;
            }
            OpenOptions::new()
                .read(true)
                .write(write)
                .create(create)
                .truncate(false)
                .custom_flags(flags)
                .mode(0o600)
                .open(path)
        };
        let (file, direct) = match attempt(true) {
            Ok(f) => (f, true),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                if write {
                    tracing::warn!(
                        "{} has no O_DIRECT: using the page cache, which costs memory and speed",
                        path.display()
                    );
                }
                (attempt(false).context(|| format!("opening {}", path.display()))?, false)
            }
            Err(e) => return Err(e).context(|| format!("opening {}", path.display())),
        };
        let kind = file.metadata().context(|| format!("reading the type of {}", path.display()))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("{} is neither a file nor a block device: name one of these", path.display()),
            ));
        }
        let file = lock(file).map_err(|errno| match errno {
            nix::errno::Errno::EWOULDBLOCK => Error::new(
                ErrorKind::Busy,
                format!(
                    "{} is in use by another process (or by requests of a dead one that are still in flight): \
                     see `vb-ublk list`, detach it there, or try again in a moment",
                    path.display()
                ),
            ),
            e => Error::io(format!("locking {}", path.display()), e.into()),
        })?;
        if create && kind.is_file() {
            sync_parent(path)?;
        }
        Ok(Self { file, path: path.to_owned(), device: kind.is_block_device(), direct })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is a block device (of fixed size).
    #[must_use]
    pub const fn is_device(&self) -> bool {
        self.device
    }

    /// Whether O_DIRECT is in use.
    #[must_use]
    pub const fn is_direct(&self) -> bool {
        self.direct
    }

    /// Its present size in bytes.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn size(&self) -> Result<u64> {
        use std::io::{Seek, SeekFrom};
        let mut f: &File = &self.file;
        // Seeking tells a device's size too, where metadata says 0.
        f.seek(SeekFrom::End(0)).context(|| format!("reading the size of {}", self.path.display()))
    }

    /// Another descriptor of the same open file description.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn dup(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Holds a block device for this process: while what is returned is open, nobody mounts it or builds on it. `None` for a file.
    ///
    /// # Errors
    /// `Busy` when somebody has it mounted, or part of another device.
    pub fn claim(&self) -> Result<Option<File>> {
        if !self.device {
            return Ok(None);
        }
        match OpenOptions::new().read(true).custom_flags(libc::O_CLOEXEC | libc::O_EXCL).open(&self.path) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                let what = format!("{} is mounted or in use: choose another, or unmount it", self.path.display());
                Err(Error::new(ErrorKind::Busy, what))
            }
            opened => opened.map(Some).context(|| format!("claiming {}", self.path.display())),
        }
    }

    /// The descriptor.
    #[must_use]
    pub fn raw_fd(&self) -> RawFd {
        self.file.as_fd().as_raw_fd()
    }
}

/// Makes a new name in a folder survive a power cut.
///
/// # Errors
/// When the folder cannot be opened or synced.
pub fn sync_parent(path: &Path) -> Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent).and_then(|d| d.sync_all()).context(|| format!("syncing the folder {}", parent.display()))
}

impl AsFd for DataFile {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }
}
