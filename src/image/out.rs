//! What an exporter writes to.
//!
//! Invariants:
//! - A file appears under its name when it is whole and synced; until then it is `NAME.partial`, which goes when an
//!   [`Output`] is dropped unfinished. A device or a pipe is written in place.
//! - Nothing is replaced that was not there when the user said that it may be.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use nix::fcntl::{AT_FDCWD, FallocateFlags, RenameFlags, fallocate, renameat2};
use tokio::task::JoinHandle;

use super::Format;
use super::qcow2::{Below, NewQcow2};
use crate::disk::buf::{ALIGN, aligned};
use crate::disk::file::sync_parent;
use crate::error::{Context, Error, ErrorKind, Result};

/// What zeros are written in, in bytes.
const ZEROS: usize = 1 << 20;
/// Bytes from which on a write is worth another thread's time: the next reads are checked meanwhile.
const WORTH_A_THREAD: usize = 64 << 10;
/// Writes of a raw image under way, each of up to 1 MiB.
const WRITES: usize = 4;

/// An image that is written once, from front to back; what is not written is zeros, or what lies below the image.
#[async_trait(?Send)]
pub trait ImageSink {
    /// Writes `data` at byte `at`, behind all that was written before. What is much goes to a file or a device on another thread.
    ///
    /// # Errors
    /// The system's.
    async fn write(&mut self, at: u64, data: Bytes) -> Result<()>;

    /// Says that bytes behind all that was written before are zeros, whatever lies below.
    ///
    /// # Errors
    /// The system's.
    async fn write_zeros(&mut self, _at: u64, _length: u64) -> Result<()> {
        // Nothing lies below: what is not written is zeros.
        Ok(())
    }

    /// Ends the image, and brings it to stable storage if it has any.
    ///
    /// # Errors
    /// The system's.
    async fn finish(&mut self) -> Result<()>;
}

/// Where an image is to go, and how.
#[derive(Debug, Clone)]
pub struct Target {
    /// A file, a block device, or `-` for standard output.
    pub path: PathBuf,
    /// The image's format.
    pub format: Format,
    /// Replace a file that is there, write over a block device.
    pub force: bool,
    /// What a qcow2 image is to lie over.
    pub below: Option<Below>,
}

/// An image in the making.
pub struct Output {
    /// What is to be written.
    pub sink: Box<dyn ImageSink>,
    place: Option<Place>,
}

/// A file under its name for the time being.
#[derive(Debug)]
struct Place {
    /// Keeps the lock.
    _file: File,
    partial: PathBuf,
    path: PathBuf,
    replace: bool,
}

impl Drop for Output {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            // What cannot be removed is found by its name, and written over the next time.
            let _ = std::fs::remove_file(&place.partial);
        }
    }
}

impl Output {
    /// Begins the image of a disk of `size` bytes.
    ///
    /// # Errors
    /// `Exists` for what may not be replaced, `Usage` for a format that cannot go there, `Full` for a device that is too small, `Busy`
    /// when another export writes the same file; the system's.
    pub async fn begin(target: &Target, size: u64) -> Result<Self> {
        let Target { path, format, force, below } = target;
        let what = path.display().to_string();
        let no_qcow2 =
            |why: &str| Error::new(ErrorKind::Usage, format!("a qcow2 image cannot be written to {why}: name a file"));
        if path.as_os_str() == "-" {
            if *format == Format::Qcow2 {
                return Err(no_qcow2("standard output, its header is written last"));
            }
            return Ok(Self {
                sink: Box::new(Stream::new(Box::new(std::io::stdout()), "standard output", size)),
                place: None,
            });
        }
        let kind = match std::fs::metadata(path) {
            Ok(m) => Some(m.file_type()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(e).context(|| format!("looking at {what}")),
        };
        if let Some(kind) = kind.filter(|k| !k.is_file()) {
            if *format == Format::Qcow2 {
                return Err(no_qcow2(&format!("{what}, which is no regular file")));
            }
            if kind.is_block_device() {
                return Ok(Self { sink: Box::new(RawOut::device(path, size, *force)?), place: None });
            }
            if kind.is_fifo() || kind.is_char_device() {
                let to = OpenOptions::new().write(true).open(path).context(|| format!("opening {what}"))?;
                return Ok(Self { sink: Box::new(Stream::new(Box::new(to), &what, size)), place: None });
            }
            let why = format!(
                "{what} is neither a file, nor a block device, nor a pipe: name one of these, or - for standard output"
            );
            return Err(Error::new(ErrorKind::Usage, why));
        }
        if kind.is_some() && !force {
            return Err(exists(path));
        }
        let place = Place::begin(path, *force)?;
        // From here on, whatever fails, the partial file goes.
        let mut out = Self { sink: Box::new(Nowhere), place: Some(place) };
        let Some(Place { _file: file, .. }) = &out.place else { return Ok(out) };
        let file = file.try_clone().context(|| format!("opening {what} once more"))?;
        out.sink = match format {
            Format::Raw => {
                file.set_len(size).context(|| format!("making {what} {size} bytes long"))?;
                // By its descriptor: the name may be another's by now.
                let again = format!("/proc/self/fd/{}", file.as_raw_fd());
                let direct = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(again);
                Box::new(RawOut::new(file, direct.ok(), what, size, None))
            }
            Format::Qcow2 => Box::new(NewQcow2::create(file, &what, size, below.as_ref()).await?),
        };
        Ok(out)
    }

    /// Ends the image and gives it its name.
    ///
    /// # Errors
    /// `Exists` when somebody has made a file of that name meanwhile; the system's.
    pub async fn finish(mut self) -> Result<()> {
        self.sink.finish().await?;
        if let Some(place) = &self.place {
            place.publish()?;
            // There is no partial file any more; another export may have begun one.
            self.place = None;
        }
        Ok(())
    }
}

fn exists(path: &Path) -> Error {
    Error::new(
        ErrorKind::Exists,
        format!("{} is there already: name another file, or add --force to replace it", path.display()),
    )
}

impl Place {
    fn begin(path: &Path, replace: bool) -> Result<Self> {
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let making = || format!("creating {}", partial.display());
        let file = loop {
            let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&partial);
            let file = open.context(making)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let why =
                        format!("another export is writing {}: wait for it, or name another file", partial.display());
                    return Err(Error::new(ErrorKind::Busy, why));
                }
                Err(TryLockError::Error(e)) => return Err(e).context(|| format!("locking {}", partial.display())),
            }
            // Another export may have ended between the two calls: what is locked then is its image, under its name by now.
            let here = file.metadata().context(making)?;
            if std::fs::metadata(&partial).is_ok_and(|m| (m.dev(), m.ino()) == (here.dev(), here.ino())) {
                break file;
            }
        };
        // What an export left that was killed.
        file.set_len(0).context(making)?;
        Ok(Self { _file: file, partial, path: path.to_owned(), replace })
    }

    fn publish(&self) -> Result<()> {
        let naming = || format!("renaming {} to {}", self.partial.display(), self.path.display());
        if self.replace {
            std::fs::rename(&self.partial, &self.path).context(naming)?;
        } else {
            match renameat2(AT_FDCWD, &self.partial, AT_FDCWD, &self.path, RenameFlags::RENAME_NOREPLACE) {
                Ok(()) => {}
                Err(nix::errno::Errno::EEXIST) => return Err(exists(&self.path)),
                // File systems without it: a look has to do.
                Err(nix::errno::Errno::EINVAL) if !self.path.exists() => {
                    std::fs::rename(&self.partial, &self.path).context(naming)?;
                }
                Err(e) => return Err(Error::io(naming(), e.into())),
            }
        }
        sync_parent(&self.path)
    }
}

/// For the moment before there is something to write to.
struct Nowhere;

#[async_trait(?Send)]
impl ImageSink for Nowhere {
    async fn write(&mut self, at: u64, _data: Bytes) -> Result<()> {
        Err(Error::new(ErrorKind::Internal, format!("writing byte {at} of an image that was never begun")))
    }

    async fn finish(&mut self) -> Result<()> {
        Err(Error::new(ErrorKind::Internal, "finishing an image that was never begun"))
    }
}

/// A raw image in a new file, where gaps are holes; or on a device, where they are zeroed.
///
/// Large writes to a file go past the page cache, where its file system can do that: what is written would be in memory once more, and
/// the sync in the end would find all of it to be written.
struct RawOut {
    file: Arc<File>,
    /// The same, past the page cache.
    direct: Option<Arc<File>>,
    what: String,
    size: u64,
    /// On a device: everything before this is done.
    at: Option<u64>,
    under_way: VecDeque<Writing>,
}

/// A write on another thread.
struct Writing {
    at: u64,
    length: usize,
    done: JoinHandle<io::Result<()>>,
}

impl RawOut {
    fn new(file: File, direct: Option<File>, what: String, size: u64, at: Option<u64>) -> Self {
        Self { file: Arc::new(file), direct: direct.map(Arc::new), what, size, at, under_way: VecDeque::new() }
    }

    fn device(path: &Path, size: u64, force: bool) -> Result<Self> {
        let what = path.display().to_string();
        if !force {
            let why = format!("{what} is a block device, whose content would be lost: add --force if that is meant");
            return Err(Error::new(ErrorKind::Exists, why));
        }
        // The kernel refuses this while the device is mounted or otherwise held.
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(path);
        let mut file = file.context(|| format!("opening {what} for writing while nobody uses it"))?;
        let room = file.seek(SeekFrom::End(0)).context(|| format!("finding the end of {what}"))?;
        if room < size {
            let why = format!("{what} has {room} bytes, the volume {size}: name a larger device");
            return Err(Error::new(ErrorKind::Full, why));
        }
        Ok(Self::new(file, None, what, size, Some(0)))
    }

    /// Waits until no more than so many writes are under way.
    async fn wait_for(&mut self, left: usize) -> Result<()> {
        while self.under_way.len() > left {
            let Some(Writing { at, length, done }) = self.under_way.pop_front() else { break };
            let wrote = done.await.unwrap_or_else(|e| Err(io::Error::other(e)));
            wrote.context(|| format!("writing {length} bytes at byte {at} of {}", self.what))?;
        }
        Ok(())
    }

    /// Zeros from where it is up to byte `to`, on a device.
    fn zero_up_to(&mut self, to: u64) -> Result<()> {
        let Some(from) = self.at.filter(|at| *at < to) else { return Ok(()) };
        let length = to - from;
        self.at = Some(to);
        // On a block device the kernel makes this the device's own zeroing (as BLKZEROOUT does), or writes zeros.
        let zeroing = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        if fallocate(&*self.file, zeroing, from.cast_signed(), length.cast_signed()).is_ok() {
            return Ok(());
        }
        let zeros = vec![0; ZEROS.min(length as usize)];
        let mut at = from;
        while at < to {
            let n = (to - at).min(zeros.len() as u64) as usize;
            self.file
                .write_all_at(&zeros[..n], at)
                .context(|| format!("zeroing {n} bytes at byte {at} of {}", self.what))?;
            at += n as u64;
        }
        Ok(())
    }
}

#[async_trait(?Send)]
impl ImageSink for RawOut {
    async fn write(&mut self, at: u64, data: Bytes) -> Result<()> {
        self.zero_up_to(at)?;
        let length = data.len();
        if let Some(done) = &mut self.at {
            *done = (*done).max(at + length as u64);
        }
        if length < WORTH_A_THREAD {
            let writing = || format!("writing {length} bytes at byte {at} of {}", self.what);
            return self.file.write_all_at(&data, at).context(writing);
        }
        self.wait_for(WRITES - 1).await?;
        let (file, direct) = (Arc::clone(&self.file), self.direct.clone());
        let done = tokio::task::spawn_blocking(move || write_large(&file, direct.as_deref(), &data, at));
        self.under_way.push_back(Writing { at, length, done });
        Ok(())
    }

    async fn finish(&mut self) -> Result<()> {
        self.wait_for(0).await?;
        self.zero_up_to(self.size)?;
        self.file.sync_all().context(|| format!("syncing {}", self.what))
    }
}

/// Writes past the page cache if that can be.
fn write_large(file: &File, direct: Option<&File>, data: &[u8], at: u64) -> io::Result<()> {
    let Some(direct) = direct.filter(|_| data.len().is_multiple_of(ALIGN) && at.is_multiple_of(ALIGN as u64)) else {
        return file.write_all_at(data, at);
    };
    match direct.write_all_at(aligned(data, &mut None), at) {
        // The file system takes the flag, but not this write.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => file.write_all_at(data, at),
        wrote => wrote,
    }
}

/// A raw image into a pipe, zeros and all.
struct Stream {
    to: Box<dyn Write>,
    what: String,
    size: u64,
    at: u64,
    zeros: Vec<u8>,
}

impl Stream {
    fn new(to: Box<dyn Write>, what: &str, size: u64) -> Self {
        Self { to, what: what.to_owned(), size, at: 0, zeros: vec![0; ZEROS] }
    }

    fn zero_up_to(&mut self, to: u64) -> Result<()> {
        while self.at < to {
            let n = (to - self.at).min(ZEROS as u64) as usize;
            self.to.write_all(&self.zeros[..n]).context(|| format!("writing byte {} to {}", self.at, self.what))?;
            self.at += n as u64;
        }
        Ok(())
    }
}

#[async_trait(?Send)]
impl ImageSink for Stream {
    async fn write(&mut self, at: u64, data: Bytes) -> Result<()> {
        self.zero_up_to(at)?;
        self.to.write_all(&data).context(|| format!("writing byte {at} to {}", self.what))?;
        self.at = at + data.len() as u64;
        Ok(())
    }

    async fn finish(&mut self) -> Result<()> {
        self.zero_up_to(self.size)?;
        self.to.flush().context(|| format!("writing the end to {}", self.what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::IoBuf;

    #[test]
    fn large_writes_are_there_however_they_lie_and_whatever_the_file_system_can() {
        // In memory and on the disk, which differ in what they can do past the page cache.
        for dir in [tempfile::tempdir_in("/dev/shm"), tempfile::tempdir()] {
            let dir = dir.expect("tempdir");
            let path = dir.path().join("f");
            let file = File::create(&path).expect("created");
            let direct = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(&path).ok();
            let mut model = Vec::new();
            for (i, (len, off)) in
                [(1 << 20, 0), (1 << 20, 513), (65536, 0), (65536 + 100, 0), (4096, 7)].iter().enumerate()
            {
                let buf = IoBuf::zeroed(len + off);
                buf.slice(*off..len + off).bytes_mut().fill(i as u8 + 1);
                write_large(&file, direct.as_ref(), &buf.bytes()[*off..], model.len() as u64).expect("written");
                model.resize(model.len() + len, i as u8 + 1);
            }
            assert!(std::fs::read(&path).expect("read") == model);
        }
    }

    #[tokio::test]
    async fn what_fails_on_another_thread_is_told() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("f");
        std::fs::write(&path, b"").expect("made");
        for writes in [1, WRITES + 1] {
            let mut out = RawOut::new(File::open(&path).expect("to read"), None, "f".into(), 64 << 20, None);
            let mut result = Ok(());
            for n in 0..writes as u64 {
                result = result.and(out.write(n << 20, Bytes::from(vec![7; 1 << 20])).await);
            }
            let e = match result {
                Ok(()) => out.finish().await.expect_err("it cannot be written"),
                Err(e) => e,
            };
            assert!(e.to_string().contains("writing 1048576 bytes at byte 0 of f"), "{e}");
        }
    }
}
