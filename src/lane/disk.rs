//! [`Disk`] over a lane's ring.

use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;

use super::Lane;
use super::ops::Request;
use crate::disk::{Disk, IoBuf, skip};

/// The most buffers that go into one vectored write; the kernel's limit is 1024.
pub const MAX_IOVECS: usize = 1000;

/// One file or device, read and written through a lane's ring. It and every operation in flight keep the
/// file open.
#[derive(Clone)]
pub struct LaneDisk {
    lane: Lane,
    file: Rc<dyn AsFd>,
}

impl LaneDisk {
    /// `file` through the ring of `lane`.
    #[must_use]
    pub fn new<F: AsFd + 'static>(lane: &Lane, file: Arc<F>) -> Self {
        Self { lane: lane.clone(), file: Rc::new(file) }
    }

    /// Submits until the kernel neither puts off nor interrupts. Returns what `make`'s request completed
    /// with: bytes, or an error.
    async fn transfer(&self, mut make: impl FnMut() -> Request) -> io::Result<usize> {
        loop {
            let done = self.lane.submit(make()).await;
            match usize::try_from(done.result) {
                Ok(n) => return Ok(n),
                Err(_) if is_passing(done.result) => {}
                Err(_) => return Err(io::Error::from_raw_os_error(-done.result)),
            }
        }
    }

    async fn write_part(&self, mut offset: u64, mut bufs: Vec<IoBuf>, dsync: bool) -> io::Result<()> {
        let mut left: usize = bufs.iter().map(IoBuf::len).sum();
        while left > 0 {
            let done = self.lane.submit(Request::Writev { fd: Rc::clone(&self.file), offset, bufs, dsync }).await;
            bufs = done.bufs;
            match usize::try_from(done.result) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero)),
                Ok(n) => {
                    offset += n as u64;
                    left -= n;
                    if left > 0 {
                        bufs = skip(&bufs, n);
                    }
                }
                Err(_) if is_passing(done.result) => {}
                Err(_) => return Err(io::Error::from_raw_os_error(-done.result)),
            }
        }
        Ok(())
    }
}

/// Whether the kernel only asks for another try.
pub(super) const fn is_passing(result: i32) -> bool {
    matches!(-result, libc::EAGAIN | libc::EINTR)
}

impl Disk for LaneDisk {
    async fn read_at(&self, offset: u64, dst: IoBuf) -> io::Result<()> {
        let mut done = 0;
        while done < dst.len() {
            let part = self
                .transfer(|| Request::Read {
                    fd: Rc::clone(&self.file),
                    offset: offset + done as u64,
                    buf: dst.slice(done..dst.len()),
                })
                .await;
            match part {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
                Ok(n) => done += n,
                // With O_DIRECT the rest of a read that ended within a block, at the end of the file, is not aligned.
                Err(e) if done > 0 && e.raw_os_error() == Some(libc::EINVAL) => {
                    return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    async fn writev_at(&self, offset: u64, bufs: Vec<IoBuf>, dsync: bool) -> io::Result<()> {
        if bufs.len() <= MAX_IOVECS {
            return self.write_part(offset, bufs, dsync).await;
        }
        let mut at = offset;
        for part in bufs.chunks(MAX_IOVECS) {
            self.write_part(at, part.to_vec(), dsync).await?;
            at += part.iter().map(|b| b.len() as u64).sum::<u64>();
        }
        Ok(())
    }

    async fn sync(&self) -> io::Result<()> {
        self.transfer(|| Request::Sync { fd: Rc::clone(&self.file) }).await.map(|_| ())
    }
}
