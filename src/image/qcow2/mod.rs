//! qcow2 images, read and written by the crate `imago`, which is written by a maintainer of QEMU's block layer.
//!
//! Invariants:
//! - What the library opens is given to it: it follows no name that an image holds.
//! - Header and L1 table are checked before it sees them ([`check`]); where a stretch of data is, before it is read. So what is
//!   cut off is damage, not zeros.

mod below;
mod check;

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use bytes::Bytes;
use imago::file::File as Storage;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Mapping, Storage as _};

pub use self::below::Below;
pub(super) use self::check::MAGIC;
use self::check::{BackingName, Head};
use super::{Backing, Format, ImageSink, ImageSource};
use crate::error::{Context, Error, ErrorKind, Result};

/// The longest chain of backing files; also what ends a circle of them.
const MAX_CHAIN: usize = 32;

/// What the library says, as an error of ours: without an error of the system behind it, it is about the image.
fn failed(what: impl Into<String>, e: std::io::Error) -> Error {
    if e.raw_os_error().is_some() {
        return Error::io(what, e);
    }
    Error::new(ErrorKind::Corrupt, what).with_source(e)
}

/// An image and those below it.
#[derive(Debug)]
pub(super) struct Qcow2Image {
    access: FormatAccess<Storage>,
    what: String,
    size: u64,
}

/// Opens the image in `file`, which is at `path`.
pub(super) async fn open(file: File, path: &Path, backing: &Backing) -> Result<Qcow2Image> {
    let what = path.display().to_string();
    let mut chain: Vec<(File, PathBuf, Option<Head>)> = Vec::new();
    let head = check::check(&file, &what)?;
    let size = head.size;
    let folders = folders(path, backing)?;
    let mut below = head.backing.as_ref().map(|b| find(b, path, &folders)).transpose()?;
    chain.push((file, path.to_owned(), Some(head)));
    while let Some((file, path, format)) = below.take() {
        if chain.len() == MAX_CHAIN {
            let why =
                format!("{what} has more than {MAX_CHAIN} images below it, or they are a circle: convert it first");
            return Err(Error::new(ErrorKind::Unsupported, why));
        }
        let head = match format {
            Format::Raw => None,
            Format::Qcow2 => Some(check::check(&file, &path.display().to_string())?),
        };
        if let Some(b) = head.as_ref().and_then(|h| h.backing.as_ref()) {
            below = Some(find(b, &path, &folders)?);
        }
        chain.push((file, path, head));
    }
    let mut access: Option<FormatAccess<Storage>> = None;
    // From the bottom upwards.
    while let Some((file, path, head)) = chain.pop() {
        let opening = || format!("opening the image {}", path.display());
        let storage = Storage::try_from(file).map_err(|e| failed(opening(), e))?;
        access = Some(if head.is_some() {
            let image = Qcow2::<Storage>::builder(storage).backing(access).data_file(None);
            FormatAccess::new(image.open(DenyImplicitOpenGate::default()).await.map_err(|e| failed(opening(), e))?)
        } else {
            let image = Raw::<Storage>::builder(storage);
            FormatAccess::new(image.open(DenyImplicitOpenGate::default()).await.map_err(|e| failed(opening(), e))?)
        });
    }
    let access = access.ok_or_else(|| Error::new(ErrorKind::Internal, format!("{what} has come to nothing")))?;
    Ok(Qcow2Image { access, what, size })
}

/// Where backing files may be, links resolved.
fn folders(image: &Path, backing: &Backing) -> Result<Vec<PathBuf>> {
    let own = image.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::iter::once(own)
        .chain(backing.allowed.iter().map(PathBuf::as_path))
        .map(|f| f.canonicalize().context(|| format!("looking for backing files in {}", f.display())))
        .collect()
}

/// Opens the image that `above` names, if it may be.
fn find(name: &BackingName, above: &Path, folders: &[PathBuf]) -> Result<(File, PathBuf, Format)> {
    let BackingName { name, format } = name;
    let what = format!("the backing file {name:?} of {}", above.display());
    // QEMU takes `nbd:…` or `json:{…}` for more than a file.
    if name.split('/').next().is_some_and(|first| first.contains(':')) {
        let why = format!("{what} is not a plain file: convert the image with `qemu-img convert -O qcow2` first");
        return Err(Error::new(ErrorKind::Unsupported, why));
    }
    let path = above.parent().unwrap_or(Path::new("")).join(name);
    let real = path.canonicalize().context(|| format!("looking for {what}"))?;
    let allowed = |at: &Path| {
        if folders.iter().any(|f| at.starts_with(f)) {
            return Ok(());
        }
        let why = format!(
            "{what} is at {}, outside of the image's own folder, and is not opened only because the image says so: \
             if it is meant, add --allow-backing with its folder",
            at.display()
        );
        Err(Error::new(ErrorKind::Denied, why))
    };
    allowed(&real)?;
    // A pipe that was put there must not hold us up.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(&real);
    let file = file.context(|| format!("opening {what}"))?;
    if !file.metadata().context(|| format!("reading the type of {what}"))?.is_file() {
        return Err(Error::new(ErrorKind::Denied, format!("{what} is not a regular file: convert the image first")));
    }
    // What was opened, whatever has become of the path in between.
    let opened = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    allowed(&opened.context(|| format!("finding out where {what} is"))?)?;
    let format = match format.as_deref() {
        Some("qcow2") => Format::Qcow2,
        Some("raw" | "file") => Format::Raw,
        None => Format::of(&file, &what)?,
        Some(other) => {
            let why = format!("{what} has the format {other:?}: only raw and qcow2 can be read; convert it first");
            return Err(Error::new(ErrorKind::Unsupported, why));
        }
    };
    Ok((file, real, format))
}

impl Qcow2Image {
    /// What is at `at`, and for how long (at least one byte, at most `most`).
    async fn mapping(&self, at: u64, most: u64) -> Result<(Mapping<'_, Storage>, u64)> {
        let what = || format!("finding byte {at} of the disk in {}", self.what);
        let (mapping, length) = self.access.get_mapping(at, most).await.map_err(|e| failed(what(), e))?;
        if length == 0 {
            return Err(Error::new(ErrorKind::Corrupt, format!("{}: the image ends before it", what())));
        }
        if let Mapping::Raw { storage, offset, .. } = &mapping {
            let end = storage.size().map_err(|e| failed(what(), e))?;
            if offset.checked_add(length).is_none_or(|e| e > end) {
                let why = format!(
                    "{}: {length} bytes are said to be at byte {offset} of a file of {end} bytes: it is cut off or damaged",
                    what()
                );
                return Err(Error::new(ErrorKind::Corrupt, why));
            }
        }
        Ok((mapping, length))
    }
}

#[async_trait(?Send)]
impl ImageSource for Qcow2Image {
    fn size_bytes(&self) -> Option<u64> {
        Some(self.size)
    }

    async fn next_data(&mut self, mut from: u64) -> Result<Option<(u64, u64)>> {
        while from < self.size {
            let (mapping, length) = self.mapping(from, self.size - from).await?;
            if !matches!(mapping, Mapping::Zero { .. }) {
                return Ok(Some((from, from + length)));
            }
            from += length;
        }
        Ok(None)
    }

    async fn read(&mut self, at: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let from = at + done as u64;
            if from >= self.size {
                buf[done..].fill(0);
                break;
            }
            let most = (buf.len() - done) as u64;
            let (mapping, length) = self.mapping(from, most.min(self.size - from)).await?;
            let piece = &mut buf[done..done + length as usize];
            if matches!(mapping, Mapping::Zero { .. }) {
                piece.fill(0);
            } else {
                let what = || format!("reading bytes {from}..{} of the disk in {}", from + length, self.what);
                self.access.read(piece, from).await.map_err(|e| failed(what(), e))?;
            }
            done += length as usize;
        }
        Ok(())
    }
}

/// Bytes of a cluster of the images that are written: QEMU's own choice.
pub const CLUSTER: u64 = 64 << 10;

/// A new image. What it lies over is named in its header and never opened: every cluster is written whole.
#[derive(Debug)]
pub(super) struct NewQcow2 {
    access: FormatAccess<Storage>,
    what: String,
}

impl NewQcow2 {
    /// An image of a disk of `size` bytes in an empty file.
    pub(super) async fn create(file: File, what: &str, size: u64, below: Option<&Below>) -> Result<Self> {
        let making = || format!("making the qcow2 image {what}");
        let storage = Storage::try_from(file).map_err(|e| failed(making(), e))?;
        let mut builder = Qcow2::<Storage>::create_builder(storage).size(size).cluster_size(CLUSTER as usize);
        if let Some(below) = below {
            builder = builder.backing(below.name.clone(), below.format.name().to_owned());
        }
        let made =
            builder.create_open(DenyImplicitOpenGate::default(), |s| Ok(Qcow2::builder(s).backing(None).write(true)));
        let made = made.await.map_err(|e| failed(making(), e))?;
        Ok(Self { access: FormatAccess::new(made), what: what.to_owned() })
    }
}

#[async_trait(?Send)]
impl ImageSink for NewQcow2 {
    async fn write(&mut self, at: u64, data: Bytes) -> Result<()> {
        let what = || format!("writing {} bytes at byte {at} of the disk to {}", data.len(), self.what);
        self.access.write(&*data, at).await.map_err(|e| failed(what(), e))
    }

    async fn write_zeros(&mut self, at: u64, length: u64) -> Result<()> {
        let what = || format!("zeroing {length} bytes at byte {at} of the disk in {}", self.what);
        self.access.write_zeroes(at, length).await.map_err(|e| failed(what(), e))
    }

    async fn finish(&mut self) -> Result<()> {
        let what = || format!("finishing {}", self.what);
        self.access.flush().await.map_err(|e| failed(what(), e))?;
        self.access.sync().await.map_err(|e| failed(what(), e))
    }
}
