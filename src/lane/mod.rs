//! A lane: one thread, one io_uring, one small loop. The same for every frontend.
//!
//! A pass of the loop: run ready tasks until none is ready; let the frontend's engine seal its batch; run what
//! that made ready; push what the frontend has to say to its ring; one `io_uring_enter` that submits and waits;
//! reap. Nothing else blocks on a lane.
//!
//! Invariants:
//! - The lane sleeps only when no task is ready, the engine has sealed since the last task ran, and nobody has
//!   put a task into its inbox (see `waker` for why no wake is lost). A read of the eventfd is outstanding
//!   whenever it sleeps.
//! - Completions are recorded while the ring is borrowed and acted upon afterwards: a task may push to the
//!   ring at any time.
//! - Memory that the kernel may touch is kept by the operations' slots (see `ops`).
//! - Tasks and their futures live and die on the lane's thread.

mod disk;
mod executor;
mod ops;
mod ring;
mod socket;
mod timer;
mod waker;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use executor::Executor;
use ops::{Op, Request, Slots};
use waker::{MAIN, Registration};

pub use disk::{LaneDisk, MAX_IOVECS};
pub use ring::{OwnRing, Ring, RingMode};
pub use socket::LaneSocket;
pub use timer::LaneTimer;

use crate::disk::IoBuf;

/// Polls between two enters at most, so that tasks that keep waking themselves do not shut out the ring.
const POLLS_PER_PASS: usize = 4096;

/// A number that one thread counts and others read.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    fn add(&self, n: u64) {
        // One writer: a load and a store do.
        self.0.store(self.0.load(Ordering::Relaxed) + n, Ordering::Relaxed);
    }

    /// The number so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a lane has done since it began.
#[derive(Debug, Default)]
pub struct Counters {
    /// Passes of the loop.
    pub passes: Count,
    /// `io_uring_enter` calls.
    pub enters: Count,
    /// Operations of the lane's own (reads, writes, syncs, timeouts), without the frontend's.
    pub ops: Count,
    /// Polls of tasks.
    pub polls: Count,
}

/// Reads a lane's counters, from any thread.
#[derive(Clone)]
pub struct CountersHandle(Arc<waker::Shared>);

impl std::ops::Deref for CountersHandle {
    type Target = Counters;
    fn deref(&self) -> &Counters {
        &self.0.counters
    }
}

/// What a frontend and its engine do at their places in each pass.
pub trait Driver {
    /// No more requests of this pass will come (unless this makes a task ready: then it is called again).
    fn seal(&mut self) {}

    /// The last call before the enter: push what has to leave with it. If it wakes a task, the lane does not wait.
    fn push(&mut self) {}

    /// Hands every completion that is there to `sink`, as user data and result. `sink` only records.
    ///
    /// # Errors
    /// When the ring is broken.
    fn reap(&mut self, ring: &dyn Ring, sink: &mut dyn FnMut(u64, i32)) -> io::Result<()> {
        ring.with(&mut |ring| ring.completion().for_each(|cqe| sink(cqe.user_data(), cqe.result())));
        Ok(())
    }

    /// A completion that is not the lane's own.
    fn foreign(&mut self, user_data: u64, result: i32) {
        tracing::warn!(user_data, result, "a completion that nobody asked for");
    }
}

/// A driver for lanes without a frontend on their ring.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoDriver;

impl Driver for NoDriver {}

struct Inner {
    registration: Registration,
    executor: Executor,
    slots: RefCell<Slots>,
    ring: Box<dyn Ring>,
    /// The read of the eventfd.
    doorbell: RefCell<Option<Op>>,
    /// Room lent to the inbox and the reaper, so that neither allocates.
    inbox: RefCell<Vec<u32>>,
    reaped: RefCell<Vec<(u64, i32)>>,
    running: Cell<bool>,
}

/// A handle of a lane; clones are the same lane. Stays on its thread.
#[derive(Clone)]
pub struct Lane(Rc<Inner>);

impl Lane {
    /// Makes this thread a lane on `ring`. Whoever makes it ends it with [`Lane::shutdown`]: its tasks hold
    /// the lane, so it would not go away by itself.
    ///
    /// # Errors
    /// When the thread has a lane already, or the system has no descriptor to give.
    pub fn new(ring: impl Ring) -> io::Result<Self> {
        Ok(Self(Rc::new(Inner {
            registration: Registration::enter()?,
            executor: Executor::default(),
            slots: RefCell::default(),
            ring: Box::new(ring),
            doorbell: RefCell::default(),
            inbox: RefCell::default(),
            reaped: RefCell::default(),
            running: Cell::new(false),
        })))
    }

    fn inner(&self) -> &Inner {
        &self.0
    }

    /// Adds a task. It runs in the next pass, until it is done or the lane is shut down.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.spawn_boxed(Box::pin(task));
    }

    /// Adds a task that is boxed already.
    pub fn spawn_boxed(&self, task: Pin<Box<dyn Future<Output = ()>>>) {
        self.0.executor.spawn(task);
    }

    /// How many tasks there are.
    #[must_use]
    pub fn tasks(&self) -> usize {
        self.0.executor.len()
    }

    /// What the lane has done so far; may be read from other threads.
    #[must_use]
    pub fn counters(&self) -> CountersHandle {
        CountersHandle(Arc::clone(&self.0.registration.shared))
    }

    /// Runs the loop until `main` is done.
    ///
    /// # Errors
    /// When the ring is broken.
    pub fn run_until<F: Future>(&self, main: F) -> io::Result<F::Output> {
        self.run_with(&mut NoDriver, main)
    }

    /// Runs the loop with a frontend's driver until `main` is done.
    ///
    /// # Errors
    /// When the ring is broken.
    pub fn run_with<F: Future>(&self, driver: &mut dyn Driver, main: F) -> io::Result<F::Output> {
        let inner = &*self.0;
        if inner.running.replace(true) {
            return Err(io::Error::other("the lane's loop is running already"));
        }
        let result = self.run_loop(driver, pin!(main));
        inner.running.set(false);
        result
    }

    fn run_loop<F: Future>(&self, driver: &mut dyn Driver, mut main: Pin<&mut F>) -> io::Result<F::Output> {
        let shared = &*self.0.registration.shared;
        waker::push_local(MAIN);
        loop {
            shared.counters.passes.add(1);
            let mut output = None;
            let mut budget = POLLS_PER_PASS;
            loop {
                self.run_ready(&mut budget, &mut |cx| match main.as_mut().poll(cx) {
                    Poll::Ready(v) => {
                        output = Some(v);
                        true
                    }
                    Poll::Pending => false,
                });
                driver.seal();
                if output.is_some() || budget == 0 || waker::ready_local() == 0 {
                    break;
                }
            }
            driver.push();
            if let Some(output) = output {
                self.enter(0)?;
                return Ok(output);
            }
            self.listen();
            let may_wait = waker::ready_local() == 0 && shared.fall_asleep();
            let entered = self.enter(usize::from(may_wait));
            shared.awake();
            entered?;
            self.reap(driver)?;
        }
    }

    /// Polls ready tasks until none is ready, the budget is used up, or `main` is done.
    fn run_ready(&self, budget: &mut usize, main: &mut dyn FnMut(&mut Context<'_>) -> bool) {
        let inner = &*self.0;
        let Registration { lane, shared } = &inner.registration;
        let before = *budget;
        shared.drain(&mut inner.inbox.borrow_mut());
        while *budget > 0 {
            let Some(task) = waker::pop_local() else {
                shared.drain(&mut inner.inbox.borrow_mut());
                if waker::ready_local() == 0 {
                    break;
                }
                continue;
            };
            *budget -= 1;
            if task != MAIN {
                inner.executor.poll(*lane, task);
            } else if main(&mut Context::from_waker(&waker::waker(*lane, MAIN))) {
                break;
            }
        }
        shared.counters.polls.add((before - *budget) as u64);
    }

    /// Sees to it that a read of the eventfd is outstanding.
    fn listen(&self) {
        let mut doorbell = self.0.doorbell.borrow_mut();
        if doorbell.is_none() {
            let shared = Arc::clone(&self.0.registration.shared);
            let op = self.submit(Request::Read { fd: Rc::new(Bell(shared)), offset: 0, buf: IoBuf::zeroed(8) });
            self.0.slots.borrow_mut().set_cancellable(op.number());
            *doorbell = Some(op);
        }
    }

    /// One `io_uring_enter`: submits all and waits for `want` completions.
    fn enter(&self, want: usize) -> io::Result<()> {
        let inner = &*self.0;
        let want = if inner.slots.borrow_mut().flush_backlog(&*inner.ring) { want } else { 0 };
        inner.registration.shared.counters.enters.add(1);
        let mut result = Ok(0);
        inner.ring.with(&mut |ring| result = ring.submit_and_wait(want));
        match result {
            Ok(_) => Ok(()),
            // EBUSY: completions have to be reaped first. EAGAIN: the kernel is short of memory for a moment.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN | libc::ETIME)) => {
                Ok(())
            }
            Err(e) => Err(e),
        }
    }

    fn reap(&self, driver: &mut dyn Driver) -> io::Result<()> {
        let inner = &*self.0;
        let mut reaped = inner.reaped.take();
        driver.reap(&*inner.ring, &mut |user_data, result| reaped.push((user_data, result)))?;
        for &(user_data, result) in &reaped {
            if !ops::is_ours(user_data) {
                driver.foreign(user_data, result);
                continue;
            }
            let (waker, bufs) = inner.slots.borrow_mut().complete(user_data, result);
            drop(bufs);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
        reaped.clear();
        inner.reaped.replace(reaped);
        // Its own waker is none: a look per pass does.
        let rang = inner.doorbell.borrow().as_ref().is_some_and(|op| self.is_done(op));
        if rang {
            drop(inner.doorbell.take());
        }
        Ok(())
    }

    fn is_done(&self, op: &Op) -> bool {
        self.0.slots.borrow().is_done(op.number())
    }

    /// Drops all tasks, and waits until the kernel has let go of every buffer. The lane is of no use afterwards.
    ///
    /// # Errors
    /// When the ring is broken; what the kernel may still touch is leaked then.
    pub fn shutdown(&self, driver: &mut dyn Driver) -> io::Result<()> {
        let inner = &*self.0;
        inner.executor.clear();
        drop(inner.doorbell.take());
        loop {
            let in_flight = {
                let mut slots = inner.slots.borrow_mut();
                for number in slots.cancellable() {
                    slots.cancel(&*inner.ring, number);
                }
                slots.in_flight()
            };
            self.enter(usize::from(in_flight > 0))?;
            self.reap(driver)?;
            if in_flight == 0 {
                return Ok(());
            }
        }
    }
}

/// Keeps the eventfd open for as long as the kernel reads it.
struct Bell(Arc<waker::Shared>);

impl std::os::fd::AsFd for Bell {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}

#[cfg(test)]
mod tests;
