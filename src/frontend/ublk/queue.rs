//! One hardware queue: a lane on libublk's ring, with a task per tag.
//!
//! Invariants:
//! - A tag is either with the kernel (fetched or committed) or with its task, never both: its buffer belongs
//!   to whoever has the tag.
//! - Tasks never touch libublk's queue: arrivals are put into the tag's place when the ring has been reaped,
//!   results are committed together before the next enter.
//! - Buffers are counted ([`IoBuf`]): a clone that an engine keeps past the queue's end is memory still.
//! - The queue ends when every tag has: its fetch was cancelled, or its result could not be committed any
//!   more because the queue is stopping.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::mpsc::Sender;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use io_uring::IoUring;
use libublk::io::{UblkDev, UblkQueue};
use libublk::uring_async::ublk_reap_io_events_with_update_queue;
use libublk::{BufDesc, UblkError, UblkIORes, sys, ublk_init_task_ring, with_task_io_ring_mut};

use super::{from_ublk, pause};
use crate::disk::IoBuf;
use crate::error::{Context as _, Result};
use crate::lane::{Driver, Lane, Ring, RingMode};
use crate::units::{Lba, SECTOR};
use crate::volume::engine::{Engine, IoFault};

/// Places for the engine's own operations beside the queue's commands.
const OWN_ENTRIES: u32 = 256;

/// How long the kernel may lack memory for a queue…
const PATIENCE: Duration = Duration::from_secs(60);
/// …and the pause before it is asked again.
const BREATH: Duration = Duration::from_millis(100);

/// libublk's ring of this thread.
struct TaskRing;

impl Ring for TaskRing {
    fn with(&self, f: &mut dyn FnMut(&mut IoUring)) {
        with_task_io_ring_mut(|ring| f(ring));
    }
}

/// A request as the driver described it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Request {
    op: u32,
    flags: u32,
    lba: Lba,
    sectors: u32,
}

enum Arrival {
    Request(Request),
    End,
}

struct Tag {
    buf: IoBuf,
    arrival: Cell<Option<Arrival>>,
    waker: RefCell<Option<Waker>>,
}

/// What the tasks and the driver of a queue share.
struct Tags {
    tags: Vec<Tag>,
    /// Requests that are done: tag and result.
    results: RefCell<Vec<(u16, i32)>>,
    living: Cell<usize>,
    all_ended: RefCell<Option<Waker>>,
}

impl Tags {
    fn new(depth: u16, bytes: usize) -> Self {
        let tag = |_| Tag { buf: IoBuf::zeroed(bytes), arrival: Cell::new(None), waker: RefCell::default() };
        Self {
            tags: (0..depth).map(tag).collect(),
            results: RefCell::default(),
            living: Cell::new(usize::from(depth)),
            all_ended: RefCell::default(),
        }
    }

    fn deliver(&self, tag: u16, arrival: Arrival) {
        let Some(place) = self.tags.get(usize::from(tag)) else { return };
        place.arrival.set(Some(arrival));
        let waker = place.waker.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    async fn next(&self, tag: u16) -> Arrival {
        let place = &self.tags[usize::from(tag)];
        std::future::poll_fn(|cx| {
            if let Some(arrival) = place.arrival.take() {
                return Poll::Ready(arrival);
            }
            *place.waker.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    fn ended(&self) {
        self.living.set(self.living.get() - 1);
        if self.living.get() == 0
            && let Some(waker) = self.all_ended.take()
        {
            waker.wake();
        }
    }

    async fn wait_for_end(&self) {
        std::future::poll_fn(|cx| {
            if self.living.get() == 0 {
                return Poll::Ready(());
            }
            *self.all_ended.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// Serves one tag until its fetch is cancelled.
async fn serve_tag<E: Engine>(tags: Rc<Tags>, tag: u16, engine: Rc<E>) {
    while let Arrival::Request(request) = tags.next(tag).await {
        let result = handle(&*engine, request, &tags.tags[usize::from(tag)].buf).await;
        tags.results.borrow_mut().push((tag, result));
    }
    tags.ended();
}

/// Runs one request: bytes done, or a negative errno.
async fn handle<E: Engine>(engine: &E, request: Request, buf: &IoBuf) -> i32 {
    let Request { op, flags, lba, sectors } = request;
    let fua = flags & sys::UBLK_IO_F_FUA != 0;
    let bytes = sectors as usize * SECTOR;
    let data = || if bytes <= buf.len() { Ok(buf.slice(0..bytes)) } else { Err(IoFault::BadRange) };
    let done = match op {
        sys::UBLK_IO_OP_READ => match data() {
            Ok(dst) => engine.read(lba, dst).await,
            Err(e) => Err(e),
        },
        sys::UBLK_IO_OP_WRITE => match data() {
            Ok(src) => engine.write(lba, src, fua).await,
            Err(e) => Err(e),
        },
        sys::UBLK_IO_OP_FLUSH => engine.flush().await,
        sys::UBLK_IO_OP_DISCARD => engine.discard(lba, u64::from(sectors), fua).await,
        // With or without NOUNMAP: zeros take no room here.
        sys::UBLK_IO_OP_WRITE_ZEROES => engine.write_zeroes(lba, u64::from(sectors), fua).await,
        _ => return -libc::EOPNOTSUPP,
    };
    match done {
        // The driver takes only READ's and WRITE's as a number of bytes.
        Ok(()) if matches!(op, sys::UBLK_IO_OP_READ | sys::UBLK_IO_OP_WRITE) => {
            i32::try_from(bytes).unwrap_or(i32::MAX)
        }
        Ok(()) => 0,
        Err(fault) => -fault.errno(),
    }
}

/// The queue's part in the lane's loop.
struct QueueDriver<'d, E> {
    queue: UblkQueue<'d>,
    tags: Rc<Tags>,
    engine: Rc<E>,
    /// Room lent to `push`.
    committing: Vec<(u16, i32)>,
}

impl<E: Engine> Driver for QueueDriver<'_, E> {
    fn seal(&mut self) {
        self.engine.seal();
    }

    fn push(&mut self) {
        std::mem::swap(&mut *self.tags.results.borrow_mut(), &mut self.committing);
        for (tag, result) in self.committing.drain(..) {
            if self.queue.is_stopping() {
                // libublk would drop the commit without a word.
                self.tags.deliver(tag, Arrival::End);
                continue;
            }
            let buf = BufDesc::RawAddress(self.tags.tags[usize::from(tag)].buf.as_ptr());
            // Results always go as `Ok`: some kinds of `Err` are dropped silently, and the request would hang.
            if let Err(e) = self.queue.complete_io_cmd_unified(tag, buf, Ok(UblkIORes::Result(result))) {
                // It cannot be refused: a raw address suits every device, and the buffers are not locked.
                tracing::error!("completing a request of queue {} failed: {e}", self.queue.get_qid());
                std::process::abort();
            }
        }
    }

    fn reap(&mut self, _: &dyn Ring, sink: &mut dyn FnMut(u64, i32)) -> io::Result<()> {
        ublk_reap_io_events_with_update_queue(&self.queue, false, None, |cqe| sink(cqe.user_data(), cqe.result()))
            .map(drop)
            .map_err(io::Error::other)
    }

    fn foreign(&mut self, user_data: u64, result: i32) {
        // Every command of the queue has its tag in the low 16 bits.
        let tag = (user_data & 0xffff) as u16;
        if result == sys::UBLK_IO_RES_OK.cast_signed() {
            let iod = self.queue.get_iod(tag);
            let request = Request {
                op: iod.op_flags & 0xff,
                flags: iod.op_flags & !0xff,
                lba: Lba(iod.start_sector),
                sectors: iod.nr_sectors,
            };
            self.tags.deliver(tag, Arrival::Request(request));
            return;
        }
        if result != sys::UBLK_IO_RES_ABORT {
            let e = io::Error::from_raw_os_error(-result);
            tracing::error!("the driver refused a command of queue {} tag {tag}: {e}", self.queue.get_qid());
        }
        self.tags.deliver(tag, Arrival::End);
    }
}

/// The life of a queue's thread. Says on `report` when its set-up is over, well or not.
///
/// # Errors
/// A set-up that failed (reported, too), or a broken ring.
pub(super) fn run<E, M>(number: u16, dev: &UblkDev, mode: RingMode, make: &M, report: &Sender<Result<()>>) -> Result<()>
where
    E: Engine,
    M: Fn(u16, &Lane) -> Result<Rc<E>>,
{
    let set_up = set_up(number, dev, mode, make);
    // Whoever waits for reports may have heard of another queue's failure and stopped listening.
    let (lane, mut driver) = match set_up {
        Ok(ready) => {
            let _ = report.send(Ok(()));
            ready
        }
        Err(e) => {
            let _ = report.send(Err(e.context(format!("setting up queue {number}"))));
            return Ok(());
        }
    };
    let tags = Rc::clone(&driver.tags);
    let ran = lane.run_with(&mut driver, tags.wait_for_end()).and_then(|()| lane.shutdown(&mut driver));
    if let Err(e) = ran {
        // Requests would hang; a dead process can be recovered.
        tracing::error!("the ring of queue {number} is broken: {e}; ending the process, the device can be recovered");
        std::process::abort();
    }
    Ok(())
}

/// Tries again while the kernel finds no memory for it: on the way out of that may be what is written to this very device.
fn patiently<T>(mut step: impl FnMut() -> std::result::Result<T, UblkError>) -> std::result::Result<T, UblkError> {
    let begun = Instant::now();
    loop {
        let lacking = match step() {
            Err(UblkError::IOError(e)) if e.raw_os_error() == Some(libc::ENOMEM) => UblkError::IOError(e),
            Err(UblkError::UringIOError(code)) if code == -libc::ENOMEM => UblkError::UringIOError(code),
            done => return done,
        };
        if begun.elapsed() >= PATIENCE {
            return Err(lacking);
        }
        pause(BREATH);
    }
}

fn set_up<'d, E, M>(number: u16, dev: &'d UblkDev, mode: RingMode, make: &M) -> Result<(Lane, QueueDriver<'d, E>)>
where
    E: Engine,
    M: Fn(u16, &Lane) -> Result<Rc<E>>,
{
    let depth = dev.dev_info.queue_depth;
    let entries = u32::from(depth) + OWN_ENTRIES;
    let ring = patiently(|| {
        ublk_init_task_ring(|cell| {
            let ring = mode.build(entries.next_power_of_two()).map_err(UblkError::IOError)?;
            cell.set(RefCell::new(ring)).map_err(|_| UblkError::OtherError(-libc::EEXIST))
        })
    });
    ring.map_err(from_ublk).context(|| "making the queue's io_uring")?;
    let open = || {
        UblkQueue::new(number, dev).inspect_err(|_| {
            // What it had registered before it failed would be in the way of the next try.
            with_task_io_ring_mut(|ring| {
                let _ = ring.submitter().unregister_files();
                let _ = ring.submitter().unregister_buffers();
            });
        })
    };
    let queue = patiently(open).map_err(from_ublk).context(|| "opening the queue")?;
    let lane = Lane::new(TaskRing).context(|| "making the queue's lane")?;
    let engine = make(number, &lane)?;
    let tags = Rc::new(Tags::new(depth, dev.dev_info.max_io_buf_bytes as usize));
    for task in Rc::clone(&engine).tasks() {
        lane.spawn_boxed(task);
    }
    for tag in 0..depth {
        lane.spawn(serve_tag(Rc::clone(&tags), tag, Rc::clone(&engine)));
        fetch(&queue, tag, &tags.tags[usize::from(tag)].buf);
    }
    // The driver has to have the fetches before this queue is reported ready: see `all_ready`.
    let mut submitted = Ok(0);
    TaskRing.with(&mut |ring| submitted = ring.submit());
    submitted.context(|| "offering the queue's tags to the driver")?;
    dev.notify_buffer_registration_complete(false);
    Ok((lane, QueueDriver { queue, tags, engine, committing: Vec::new() }))
}

/// Offers a tag to the driver for the first time.
fn fetch(queue: &UblkQueue<'_>, tag: u16, buf: &IoBuf) {
    // The calls that replace it want libublk's own buffers, which live no longer than the queue.
    #[expect(deprecated, reason = "the only way to fetch into a buffer of our own")]
    // Nobody polls the future: the completion is seen by `foreign`.
    let _future = queue.submit_io_cmd(tag, sys::UBLK_U_IO_FETCH_REQ, buf.as_ptr(), -1);
}

#[cfg(test)]
mod tests;
