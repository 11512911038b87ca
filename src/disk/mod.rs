//! Local data files and block devices: a small async trait, and what implements it.
//!
//! The volume is written against [`Disk`] alone, so the same code runs on a lane's ring, on the
//! store threads' runtime and on the simulated disk of the tests. Only this module opens data files.

pub mod buf;
pub mod file;
pub mod uring;

use std::future::Future;
use std::io;

pub use buf::IoBuf;

/// One open file or device, read and written at offsets with O_DIRECT.
///
/// Offsets, buffer addresses and buffer lengths are multiples of the alignment that
/// [`file::DataFile::open`] found; the log and the cache use 4096 throughout.
///
/// A future of this trait may be dropped: the operation goes on, and its buffers stay alive
/// until the kernel is done with them.
pub trait Disk: 'static {
    /// Fills `dst` from `offset`. Short reads are continued; the end of the file is
    /// [`io::ErrorKind::UnexpectedEof`].
    fn read_at(&self, offset: u64, dst: IoBuf) -> impl Future<Output = io::Result<()>>;

    /// Writes all of `bufs`, one after the other, at `offset`: one vectored write, continued when short.
    /// With `dsync` the data is on stable storage when the future completes (RWF_DSYNC).
    fn writev_at(&self, offset: u64, bufs: Vec<IoBuf>, dsync: bool) -> impl Future<Output = io::Result<()>>;

    /// `fdatasync`: everything that had completed before this call is on stable storage afterwards.
    fn sync(&self) -> impl Future<Output = io::Result<()>>;
}

/// What is left of `bufs` after their first `done` bytes: for continuing a short write.
#[must_use]
pub fn skip(bufs: &[IoBuf], mut done: usize) -> Vec<IoBuf> {
    let mut rest = Vec::with_capacity(bufs.len());
    for b in bufs {
        if done >= b.len() {
            done -= b.len();
        } else {
            rest.push(b.slice(done..b.len()));
            done = 0;
        }
    }
    rest
}
