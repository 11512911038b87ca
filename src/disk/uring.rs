//! [`Disk`] on the store threads' runtime (tokio-uring). Only this file knows that crate.
//!
//! That runtime hands operations to the kernel when its thread parks, or when the ring has no room for another one (0.5.0,
//! `Runtime::new`, `Driver::submit_op`), and a thread that is busy with a store never parks. So its ring has one entry, and behind each
//! operation goes one that does nothing: decision 012.
//!
//! This is one of the marked files that may use `unsafe`: the buffer traits of tokio-uring are unsafe to implement.

#![allow(unsafe_code)]

use std::future::Future;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::FutureExt;
use tokio_uring::buf::{IoBuf as UringBuf, IoBufMut};

use super::Disk;
use super::buf::IoBuf;
use super::file::DataFile;
use crate::time::Timer;

/// Completions that the ring has room for before the kernel keeps them back.
const COMPLETIONS: u32 = 1024;

/// Runs `work` on this thread, which may use [`UringDisk`]s.
///
/// # Panics
/// When the kernel has no ring to give.
pub fn run<F: Future>(work: F) -> F::Output {
    let ring = tokio_uring::uring_builder().setup_cqsize(COMPLETIONS).clone();
    tokio_uring::builder().entries(1).uring_builder(&ring).start(work)
}

/// Has the kernel begin an operation at once, and waits for its end.
async fn begun<F: Future>(operation: F) -> F::Output {
    let mut operation = pin!(operation);
    if let Some(result) = operation.as_mut().now_or_never() {
        return result;
    }
    let _ = tokio_uring::no_op().now_or_never();
    operation.await
}

struct Owned(IoBuf);

// SAFETY: an `IoBuf`'s address does not move with the value, and its memory is initialised and alive as long as
// the value is; tokio-uring keeps the value until the operation has completed.
unsafe impl UringBuf for Owned {
    fn stable_ptr(&self) -> *const u8 {
        self.0.as_ptr()
    }
    fn bytes_init(&self) -> usize {
        self.0.len()
    }
    fn bytes_total(&self) -> usize {
        self.0.len()
    }
}

// SAFETY: as above; the request that submitted the operation owns the range (third invariant of `buf`).
unsafe impl IoBufMut for Owned {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.0.as_ptr()
    }
    unsafe fn set_init(&mut self, _pos: usize) {}
}

/// A file on a tokio-uring runtime; clones share the descriptor.
#[derive(Clone)]
pub struct UringDisk {
    file: Rc<tokio_uring::fs::File>,
}

impl UringDisk {
    /// Dups the file's descriptor for this thread.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new(file: &DataFile) -> io::Result<Self> {
        Ok(Self { file: Rc::new(tokio_uring::fs::File::from_std(file.dup()?)) })
    }
}

/// Keeps the buffers of an operation alive for good if its future is dropped before the operation ends.
///
/// tokio-uring keeps them itself while the runtime lives, but its driver, when it is dropped, frees the buffers of
/// operations whose futures are gone *before* it waits for them (0.5.0, `Driver::drop`): the kernel would write into
/// freed memory. So those are leaked; it happens only where a volume ends with work under way.
struct InFlight(Vec<IoBuf>);

impl InFlight {
    /// The operation has ended.
    fn ended(mut self) {
        self.0.clear();
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if !self.0.is_empty() {
            Vec::leak(std::mem::take(&mut self.0));
        }
    }
}

fn interrupted(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

impl Disk for UringDisk {
    async fn read_at(&self, offset: u64, dst: IoBuf) -> io::Result<()> {
        let mut done = 0;
        while done < dst.len() {
            let in_flight = InFlight(vec![dst.clone()]);
            let (r, _) = begun(self.file.read_at(Owned(dst.slice(done..dst.len())), offset + done as u64)).await;
            in_flight.ended();
            match r {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => done += n,
                Err(e) if interrupted(&e) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    async fn writev_at(&self, offset: u64, bufs: Vec<IoBuf>, dsync: bool) -> io::Result<()> {
        let total: usize = bufs.iter().map(IoBuf::len).sum();
        let mut done = 0;
        while done < total {
            let rest = super::skip(&bufs, done).into_iter().map(Owned).collect();
            let in_flight = InFlight(bufs.clone());
            let (r, _) = begun(self.file.writev_at(rest, offset + done as u64)).await;
            in_flight.ended();
            match r {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(e) if interrupted(&e) => {}
                Err(e) => return Err(e),
            }
        }
        if dsync { self.sync().await } else { Ok(()) }
    }

    async fn sync(&self) -> io::Result<()> {
        begun(self.file.sync_data()).await
    }
}

/// The store threads' clock: CLOCK_MONOTONIC, so that its times compare with the lanes'.
#[derive(Debug, Clone, Copy, Default)]
pub struct TokioTimer;

impl Timer for TokioTimer {
    fn now(&self) -> Duration {
        crate::time::monotonic_now()
    }

    async fn sleep(&self, d: Duration) {
        tokio::time::sleep(d).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A runtime that ends with a read under way must not free the buffer: the kernel may still write into it.
    #[test]
    fn a_runtime_that_ends_with_an_operation_in_flight_frees_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = DataFile::open(&dir.path().join("f"), true).unwrap();
        let buf = IoBuf::zeroed(4096);
        run(async {
            let disk = UringDisk::new(&file).unwrap();
            let mut read = Box::pin(disk.read_at(0, buf.clone()));
            std::future::poll_fn(|cx| {
                assert!(read.as_mut().poll(cx).is_pending());
                std::task::Poll::Ready(())
            })
            .await;
        });
        assert!(buf.is_shared(), "somebody keeps the buffer");
    }

    /// A thread that is never out of work has its disk work all the same.
    #[test]
    fn operations_go_on_while_the_thread_is_busy() {
        let dir = tempfile::tempdir().unwrap();
        let file = DataFile::open(&dir.path().join("f"), true).unwrap();
        run(async {
            let disk = UringDisk::new(&file).unwrap();
            let busy = async {
                let end = std::time::Instant::now() + Duration::from_secs(10);
                while std::time::Instant::now() < end {
                    tokio::task::yield_now().await;
                }
                panic!("nothing has come of it in 10 s");
            };
            let works = async {
                for n in 0..100 {
                    let buf = IoBuf::zeroed(4096);
                    disk.writev_at(n * 4096, vec![buf.clone()], n % 10 == 0).await.unwrap();
                    disk.read_at(n * 4096, buf).await.unwrap();
                }
            };
            futures_util::future::select(pin!(busy), pin!(works)).await;
        });
    }
}
