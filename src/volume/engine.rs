//! What a frontend asks of a volume, on one lane.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

use crate::disk::IoBuf;
use crate::units::Lba;

/// Why a request failed, in the terms of a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoFault {
    /// Data could not be read, written or verified (EIO).
    Io,
    /// The volume is read-only (EROFS; a block device answers EPERM).
    ReadOnly,
    /// The range ends past the volume, or is not a multiple of the logical block size (EINVAL).
    BadRange,
    /// No room, and none will come (ENOSPC).
    NoSpace,
    /// It waited longer than the user allows (ETIMEDOUT).
    TimedOut,
    /// The volume is being detached, or another host has taken it (ESHUTDOWN).
    Gone,
}

impl IoFault {
    /// The errno for the kernel, positive.
    #[must_use]
    pub const fn errno(self) -> i32 {
        match self {
            Self::Io => libc::EIO,
            Self::ReadOnly => libc::EPERM,
            Self::BadRange => libc::EINVAL,
            Self::NoSpace => libc::ENOSPC,
            Self::TimedOut => libc::ETIMEDOUT,
            Self::Gone => libc::ESHUTDOWN,
        }
    }
}

impl fmt::Display for IoFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Io => "input/output error",
            Self::ReadOnly => "the volume is read-only",
            Self::BadRange => "the range does not fit the volume",
            Self::NoSpace => "no space left",
            Self::TimedOut => "timed out",
            Self::Gone => "the volume is detached",
        })
    }
}

impl std::error::Error for IoFault {}

/// A stretch of sectors of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// How many sectors.
    pub sectors: u64,
    /// They take no room and read as zeros.
    pub hole: bool,
}

/// A volume as one lane sees it. Not `Send`: each lane has its own.
///
/// The lane's loop: run ready tasks until none is ready; call [`Engine::seal`]; run what that made
/// ready; one `io_uring_enter` that submits and waits; reap; again. A request's future runs to
/// completion: it is never dropped half way.
pub trait Engine: 'static {
    /// Reads `dst.len()` bytes (a multiple of 512) from `lba`.
    fn read(&self, lba: Lba, dst: IoBuf) -> impl Future<Output = Result<(), IoFault>>;

    /// Writes `src` at `lba`. With `fua`, it survives power loss when the future completes.
    /// `src` must not change until then: checksums are taken over it.
    fn write(&self, lba: Lba, src: IoBuf, fua: bool) -> impl Future<Output = Result<(), IoFault>>;

    /// Everything that completed before this call survives power loss afterwards.
    fn flush(&self) -> impl Future<Output = Result<(), IoFault>>;

    /// The sectors read as zeros afterwards and take no room.
    fn discard(&self, lba: Lba, sectors: u64, fua: bool) -> impl Future<Output = Result<(), IoFault>>;

    /// The sectors read as zeros afterwards.
    fn write_zeroes(&self, lba: Lba, sectors: u64, fua: bool) -> impl Future<Output = Result<(), IoFault>>;

    /// What the sectors hold, from `lba` on: appends neighbours of different kinds to `out`, which together have exactly `sectors`.
    /// Zeros that were written as data count as data. Takes time in proportion to the range and to what is in it.
    ///
    /// # Errors
    /// [`IoFault::BadRange`], [`IoFault::Gone`].
    fn extents(&self, lba: Lba, sectors: u64, out: &mut Vec<Extent>) -> Result<(), IoFault> {
        let _ = lba;
        out.push(Extent { sectors, hole: false });
        Ok(())
    }

    /// No more requests of this pass will come: what gathered may leave as one batch. Cheap when there is nothing.
    fn seal(&self);

    /// Tasks that the lane runs beside the requests, for ever (the committer and its like).
    fn tasks(self: Rc<Self>) -> Vec<Pin<Box<dyn Future<Output = ()>>>>;
}
