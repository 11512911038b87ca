//! Disk images: what a volume is imported from and exported to.
//!
//! - [`ImageSource`]: what an importer reads.
//! - [`open`]: raw files, block devices, pipes and qcow2 images as such a source.
//! - [`ImageSink`] and [`Output`]: what an exporter writes; [`Below`]: what that may lie over.
//!
//! An image is a stranger's: nothing that it says is believed before it was checked, and no file is opened because it says
//! so, but under the rule for backing files ([`Backing`]).

mod out;
mod qcow2;
mod raw;
mod source;
pub mod viperblock;

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::{Context, Error, ErrorKind, Result};

pub use out::{ImageSink, Output, Target};
pub use qcow2::{Below, CLUSTER};
pub use raw::{Pipe, RawImage};
pub use source::ImageSource;

/// How an image is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Byte for byte.
    Raw,
    /// QEMU's, version 2 or 3.
    Qcow2,
}

impl Format {
    /// Its name, as people write it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    /// What a file is, by its first bytes.
    fn of(file: &File, what: &str) -> Result<Self> {
        let mut magic = [0; 4];
        match file.read_exact_at(&mut magic, 0) {
            Ok(()) if magic == qcow2::MAGIC => Ok(Self::Qcow2),
            Err(e) if e.kind() != std::io::ErrorKind::UnexpectedEof => Err(e).context(|| format!("reading {what}")),
            _ => Ok(Self::Raw),
        }
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err("`raw` or `qcow2` is possible".to_owned()),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which backing files may be opened because an image names them.
///
/// A qcow2 image from a stranger could name `/etc/shadow`: only regular files in the image's own folder, or below it, are
/// opened, wherever links lead; and those in or below the folders that the user has allowed.
#[derive(Debug, Clone, Default)]
pub struct Backing {
    /// Further folders.
    pub allowed: Vec<PathBuf>,
}

/// Opens an image. `-` is standard input.
///
/// # Errors
/// `NotFound`, `Denied`, `Usage` for what cannot be an image, `Corrupt` and `Unsupported` for what the image says of itself.
pub async fn open(path: &Path, format: Option<Format>, backing: &Backing) -> Result<Box<dyn ImageSource>> {
    if path.as_os_str() == "-" {
        return pipe(Box::new(std::io::stdin()), "standard input", format);
    }
    let what = path.display().to_string();
    let file = File::open(path).context(|| format!("opening the image {what}"))?;
    let kind = file.metadata().context(|| format!("reading the type of {what}"))?.file_type();
    if kind.is_fifo() || kind.is_char_device() || kind.is_socket() {
        return pipe(Box::new(file), &what, format);
    }
    if !kind.is_file() && !kind.is_block_device() {
        let why = format!(
            "{what} is neither a file, nor a block device, nor a pipe: name one of these, or - for standard input"
        );
        return Err(Error::new(ErrorKind::Usage, why));
    }
    // A disk's content is its owner's: what looks like qcow2 there is a guest's, unless the user says so.
    let format = match format {
        Some(f) => f,
        None if kind.is_block_device() => Format::Raw,
        None => Format::of(&file, &what)?,
    };
    match format {
        Format::Raw => Ok(Box::new(RawImage::new(file, &what)?)),
        Format::Qcow2 => Ok(Box::new(qcow2::open(file, path, backing).await?)),
    }
}

/// A pipe, whose format cannot be anything but raw: it is read once.
fn pipe(from: Box<dyn Read + Send>, what: &str, format: Option<Format>) -> Result<Box<dyn ImageSource>> {
    if format == Some(Format::Qcow2) {
        let why = format!("{what} is a pipe, and a qcow2 image is not read in one go: write it to a file first");
        return Err(Error::new(ErrorKind::Usage, why));
    }
    Ok(Box::new(Pipe::new(from, what, format.is_some())?))
}
