//! Wakers, and how a wake finds its lane.
//!
//! This is one of the marked files that may use `unsafe`.
//!
//! Invariants:
//! - A waker is two numbers, the lane and the task, packed into the data word of a [`RawWaker`]: nothing is
//!   allocated, counted or pointed at, so a waker may outlive its task and its lane. A stale wake polls
//!   whoever has the number now once too often, or nobody; both are harmless.
//! - A thread has at most one lane, and its run queue is thread-local: a wake on the lane's own thread
//!   touches no atomic and no lock.
//! - No wake from another thread is lost: the waker puts the task into the inbox and *then* takes the
//!   `asleep` mark; the lane sets the mark and *then* looks into the inbox. Whichever of the two took the
//!   inbox's lock second sees what the other did before, so either the lane finds the task, or the waker
//!   finds the mark and writes the eventfd.
//! - A task is at most once in the run queue and at most once in the inbox.

#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::task::{RawWaker, RawWakerVTable, Waker};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::Counters;

/// The number of the future that `run_until` polls itself.
pub(super) const MAIN: u32 = 0;

const NO_LANE: u32 = u32::MAX;
const _: () = assert!(usize::BITS == 64, "a waker packs two 32-bit numbers into a pointer");

/// What other threads may touch of a lane.
pub(super) struct Shared {
    inbox: Mutex<Inbox>,
    asleep: AtomicBool,
    /// Written to when the lane may be waiting in the kernel; the lane keeps a read of it outstanding.
    pub(super) event: EventFd,
    pub(super) counters: Counters,
}

#[derive(Default)]
struct Inbox {
    tasks: Vec<u32>,
    /// Indexed by task: whether it is in `tasks`.
    listed: Vec<bool>,
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves the inbox to the run queue of this thread. `spare` lends its room.
    pub(super) fn drain(&self, spare: &mut Vec<u32>) {
        {
            let mut inbox = self.inbox();
            if inbox.tasks.is_empty() {
                return;
            }
            std::mem::swap(&mut inbox.tasks, spare);
            for &task in &*spare {
                inbox.listed[task as usize] = false;
            }
        }
        LOCAL.with(|local| spare.drain(..).for_each(|task| local.push(task)));
    }

    /// Announces that the lane is about to wait. False: something came, do not wait.
    pub(super) fn fall_asleep(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        if self.inbox().tasks.is_empty() {
            return true;
        }
        self.asleep.store(false, Ordering::SeqCst);
        false
    }

    /// The lane looks for itself again.
    pub(super) fn awake(&self) {
        self.asleep.store(false, Ordering::SeqCst);
    }

    fn wake(&self, task: u32) {
        {
            let mut inbox = self.inbox();
            let at = task as usize;
            if inbox.listed.len() <= at {
                inbox.listed.resize(at + 1, false);
            }
            if !std::mem::replace(&mut inbox.listed[at], true) {
                inbox.tasks.push(task);
            }
        }
        if self.asleep.swap(false, Ordering::SeqCst) {
            // A blocking eventfd takes a write unless 2^64 - 2 are pending; a failure could only be a closed
            // descriptor, which `Shared` itself rules out.
            let _ = self.event.write(1);
        }
    }
}

/// The run queue of this thread's lane.
struct Local {
    lane: Cell<u32>,
    queue: RefCell<VecDeque<u32>>,
    /// Indexed by task: whether it is in `queue`.
    queued: RefCell<Vec<bool>>,
}

impl Local {
    fn push(&self, task: u32) {
        let mut queued = self.queued.borrow_mut();
        let at = task as usize;
        if queued.len() <= at {
            queued.resize(at + 1, false);
        }
        if !std::mem::replace(&mut queued[at], true) {
            self.queue.borrow_mut().push_back(task);
        }
    }
}

thread_local! {
    static LOCAL: Local = const {
        Local { lane: Cell::new(NO_LANE), queue: RefCell::new(VecDeque::new()), queued: RefCell::new(Vec::new()) }
    };
}

/// All lanes of the process, by number. Numbers are used again.
static LANES: RwLock<Vec<Option<Arc<Shared>>>> = RwLock::new(Vec::new());

/// This thread's place in the registry; leaves it when dropped.
pub(super) struct Registration {
    pub(super) lane: u32,
    pub(super) shared: Arc<Shared>,
}

impl Registration {
    /// Makes this thread a lane.
    ///
    /// # Errors
    /// When the thread has one already, or the system has no descriptor to give.
    pub(super) fn enter() -> std::io::Result<Self> {
        if LOCAL.with(|local| local.lane.get()) != NO_LANE {
            return Err(std::io::Error::other("this thread has a lane already"));
        }
        // Blocking on purpose: io_uring answers a read of a non-blocking descriptor with EAGAIN at once.
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
        let shared = Arc::new(Shared {
            inbox: Mutex::default(),
            asleep: AtomicBool::new(false),
            event,
            counters: Counters::default(),
        });
        let mut lanes = LANES.write().unwrap_or_else(PoisonError::into_inner);
        let at = lanes.iter().position(Option::is_none).unwrap_or_else(|| {
            lanes.push(None);
            lanes.len() - 1
        });
        lanes[at] = Some(Arc::clone(&shared));
        let lane = u32::try_from(at).map_err(std::io::Error::other)?;
        LOCAL.with(|local| local.lane.set(lane));
        Ok(Self { lane, shared })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        LANES.write().unwrap_or_else(PoisonError::into_inner)[self.lane as usize] = None;
        let _ = LOCAL.try_with(|local| {
            local.lane.set(NO_LANE);
            local.queue.borrow_mut().clear();
            local.queued.borrow_mut().clear();
        });
    }
}

/// Puts a task of this thread's lane into the run queue.
pub(super) fn push_local(task: u32) {
    LOCAL.with(|local| local.push(task));
}

/// The next ready task of this thread's lane.
pub(super) fn pop_local() -> Option<u32> {
    LOCAL.with(|local| {
        let task = local.queue.borrow_mut().pop_front()?;
        local.queued.borrow_mut()[task as usize] = false;
        Some(task)
    })
}

/// How many tasks of this thread's lane are ready.
pub(super) fn ready_local() -> usize {
    LOCAL.with(|local| local.queue.borrow().len())
}

fn wake(lane: u32, task: u32) {
    let here = LOCAL.try_with(|local| {
        let here = local.lane.get() == lane;
        if here {
            local.push(task);
        }
        here
    });
    if here.unwrap_or(false) {
        return;
    }
    let lanes = LANES.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(Some(shared)) = lanes.get(lane as usize) {
        shared.wake(task);
    }
}

const fn pack(lane: u32, task: u32) -> *const () {
    std::ptr::without_provenance(((lane as usize) << 32) | task as usize)
}

fn unpack(data: *const ()) -> (u32, u32) {
    let word = data.addr();
    // Both halves fit by construction.
    ((word >> 32) as u32, (word & 0xffff_ffff) as u32)
}

static VTABLE: RawWakerVTable = RawWakerVTable::new(
    |data| RawWaker::new(data, &VTABLE),
    |data| {
        let (lane, task) = unpack(data);
        wake(lane, task);
    },
    |data| {
        let (lane, task) = unpack(data);
        wake(lane, task);
    },
    |_| {},
);

/// The waker of a task.
pub(super) fn waker(lane: u32, task: u32) -> Waker {
    // SAFETY: the data word is a number and never dereferenced; clone copies it, drop does nothing, and both
    // wakes only reach thread-locals and locked statics, from any thread: the contract of RawWaker holds.
    unsafe { Waker::from_raw(RawWaker::new(pack(lane, task), &VTABLE)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_survive_packing() {
        for (lane, task) in [(0, 0), (7, 9), (u32::MAX - 1, u32::MAX)] {
            assert_eq!(unpack(pack(lane, task)), (lane, task));
        }
    }

    #[test]
    fn a_stale_wake_reaches_nobody() {
        waker(u32::MAX - 5, 3).wake();
        let lane = Registration::enter().unwrap();
        let w = waker(lane.lane, 40);
        w.wake_by_ref();
        w.wake_by_ref();
        assert_eq!(ready_local(), 1, "a task is in the queue once");
        drop(lane);
        w.wake();
        assert_eq!(pop_local(), None);
    }

    #[test]
    fn a_thread_has_one_lane() {
        let first = Registration::enter().unwrap();
        assert!(Registration::enter().is_err());
        drop(first);
        assert!(Registration::enter().is_ok());
    }
}
