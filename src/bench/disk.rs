//! A block device or a file as a target, through a lane's ring: what it costs without us.

use std::fs::File;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use super::{Done, Target};
use crate::disk::file::DataFile;
use crate::disk::{Disk, IoBuf};
use crate::error::Result;
use crate::lane::{Lane, LaneDisk};
use crate::units::{Lba, SECTOR};
use crate::volume::engine::IoFault;

/// A block device or a file that is open, with O_DIRECT where there is any, and locked.
#[derive(Debug)]
pub struct OpenDisk {
    file: Arc<DataFile>,
    /// While it is written over, nobody else may mount it.
    _claim: Option<File>,
}

impl OpenDisk {
    /// Opens it to be written, or only read.
    ///
    /// # Errors
    /// Those of [`DataFile::open`]; `Busy` for a device that is to be written and is mounted.
    pub fn open(path: &Path, writes: bool) -> Result<Self> {
        let file = if writes { DataFile::open(path, false)? } else { DataFile::open_to_read(path)? };
        let claim = if writes { file.claim()? } else { None };
        Ok(Self { file: Arc::new(file), _claim: claim })
    }

    /// In bytes.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn size(&self) -> Result<u64> {
        self.file.size()
    }

    /// Through the ring of `lane`.
    #[must_use]
    pub fn on(&self, lane: &Lane) -> Rc<DiskTarget<LaneDisk>> {
        Rc::new(DiskTarget(LaneDisk::new(lane, self.file.clone())))
    }
}

/// A disk, read and written as it is.
pub struct DiskTarget<D>(pub D);

fn fault(e: &std::io::Error) -> IoFault {
    tracing::error!("{e}");
    match e.raw_os_error() {
        Some(libc::ENOSPC) => IoFault::NoSpace,
        Some(libc::EINVAL) => IoFault::BadRange,
        Some(libc::EPERM | libc::EROFS) => IoFault::ReadOnly,
        Some(libc::ETIMEDOUT) => IoFault::TimedOut,
        _ => IoFault::Io,
    }
}

const fn bytes(lba: Lba) -> u64 {
    lba.0 * SECTOR as u64
}

impl<D: Disk> Target for DiskTarget<D> {
    async fn read(&self, lba: Lba, dst: IoBuf) -> Done {
        self.0.read_at(bytes(lba), dst).await.map_err(|e| fault(&e))
    }

    async fn write(&self, lba: Lba, src: IoBuf, fua: bool) -> Done {
        self.0.writev_at(bytes(lba), vec![src], fua).await.map_err(|e| fault(&e))
    }

    async fn flush(&self) -> Done {
        self.0.sync().await.map_err(|e| fault(&e))
    }

    fn seal(&self) {}

    fn tasks(self: Rc<Self>) -> Vec<Pin<Box<dyn Future<Output = ()>>>> {
        Vec::new()
    }
}
