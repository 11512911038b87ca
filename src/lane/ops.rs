//! A lane's own operations on its ring.
//!
//! This is one of the marked files that may use `unsafe`.
//!
//! Invariants:
//! - Everything the kernel was told the address of (buffers, iovecs, a message's header, a timeout's timespec) and the file
//!   itself belong to the operation's *slot* from before its submission entry is pushed until its
//!   completion has been reaped. A dropped future leaves the slot to the kernel; the completion frees it.
//! - A slot has one operation at a time, so a completion's slot number says whose it is.
//! - A slot's heap memory does not move while it is in flight: the table may grow (slots move), but the
//!   addresses the kernel has are those of heap blocks that the slot owns, and they are not touched.
//! - A table that is dropped with operations in flight is leaked: the kernel may still write into it.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::future::Future;
use std::mem;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use io_uring::types::{CancelBuilder, Fd, FsyncFlags, Timespec};
use io_uring::{IoUring, opcode, squeue};

use super::{Lane, Ring};
use crate::disk::IoBuf;

/// Marks the completions of a lane's own operations. Bit 63 is what libublk calls a target's operation,
/// so its own bookkeeping leaves them alone; bit 61 tells ours from other targets'.
const OURS: u64 = 1 << 63 | 1 << 61;
/// A completion that nobody waits for.
const IGNORED: u64 = OURS | 0xffff_ffff;

/// What a lane can ask of its ring.
pub(crate) enum Request {
    /// Read into all of `buf` at `offset`.
    Read { fd: Rc<dyn AsFd>, offset: u64, buf: IoBuf },
    /// Write `bufs`, at most 1024 and not empty, one after the other at `offset`.
    Writev { fd: Rc<dyn AsFd>, offset: u64, bufs: Vec<IoBuf>, dsync: bool },
    /// Read what a socket has into `buf`; with `all`, wait until it is full. May be cancelled.
    Recv { fd: Rc<dyn AsFd>, buf: IoBuf, all: bool },
    /// Write `bufs`, at most 1024 and not empty, to a socket. May be cancelled.
    Send { fd: Rc<dyn AsFd>, bufs: Vec<IoBuf> },
    /// fdatasync.
    Sync { fd: Rc<dyn AsFd> },
    /// Completes with -ETIME after this time.
    Timeout(Duration),
}

/// What came of a request: bytes, 0, or a negative errno; and its buffers.
pub(crate) struct Completed {
    pub(crate) result: i32,
    pub(crate) bufs: Vec<IoBuf>,
}

enum State {
    Free,
    InFlight {
        waker: Option<Waker>,
        /// The future is gone: the completion frees the slot.
        abandoned: bool,
    },
    Done(i32),
}

struct Slot {
    state: State,
    /// May stay in flight for ever, and loses nothing by being cancelled.
    cancellable: bool,
    fd: Option<Rc<dyn AsFd>>,
    bufs: Vec<IoBuf>,
    iovecs: Vec<libc::iovec>,
    timespec: Box<Timespec>,
    /// Points at `iovecs`.
    msghdr: Box<libc::msghdr>,
}

impl Slot {
    fn empty() -> Self {
        Self {
            state: State::Free,
            cancellable: false,
            fd: None,
            bufs: Vec::new(),
            iovecs: Vec::new(),
            timespec: Box::default(),
            // SAFETY: a msghdr is numbers and pointers, for which zero is a value: an empty message.
            msghdr: Box::new(unsafe { mem::zeroed() }),
        }
    }
}

impl Slot {
    fn point_at(&mut self, bufs: &[IoBuf]) {
        self.iovecs.clear();
        self.iovecs.extend(bufs.iter().map(|b| libc::iovec { iov_base: b.as_ptr().cast(), iov_len: b.len() }));
    }
}

/// See the module's page.
#[derive(Default)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
    in_flight: usize,
    /// Entries that found the submission queue full.
    backlog: VecDeque<squeue::Entry>,
}

const fn user_data(slot: u32) -> u64 {
    OURS | slot as u64
}

/// The slot of a completion, if it is one of ours that somebody may wait for.
fn slot_of(user_data: u64) -> Option<u32> {
    // The mask leaves 32 bits.
    (user_data & OURS == OURS && user_data != IGNORED).then_some((user_data & 0xffff_ffff) as u32)
}

/// Whether a completion belongs to a lane rather than to its frontend.
pub(super) const fn is_ours(user_data: u64) -> bool {
    user_data & OURS == OURS
}

impl Slots {
    /// Takes a slot, fills it, and hands back its number and the entry to push.
    fn prepare(&mut self, request: Request) -> (u32, squeue::Entry) {
        let number = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::empty());
            u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 operations fit into memory")
        });
        let slot = &mut self.slots[number as usize];
        slot.state = State::InFlight { waker: None, abandoned: false };
        slot.cancellable = false;
        let entry = match request {
            Request::Read { fd, offset, buf } => {
                // A request is bounded by the device's limits, far below 4 GiB; the rest would be a short read.
                let len = u32::try_from(buf.len()).unwrap_or(1 << 30);
                let entry = opcode::Read::new(Fd(fd.as_fd().as_raw_fd()), buf.as_ptr(), len).offset(offset).build();
                slot.fd = Some(fd);
                slot.bufs.push(buf);
                entry
            }
            Request::Writev { fd, offset, bufs, dsync } => {
                slot.point_at(&bufs);
                let count = u32::try_from(slot.iovecs.len()).unwrap_or(u32::MAX);
                let entry = opcode::Writev::new(Fd(fd.as_fd().as_raw_fd()), slot.iovecs.as_ptr(), count)
                    .offset(offset)
                    .rw_flags(if dsync { libc::RWF_DSYNC } else { 0 })
                    .build();
                slot.fd = Some(fd);
                slot.bufs = bufs;
                entry
            }
            Request::Recv { fd, buf, all } => {
                let len = u32::try_from(buf.len()).unwrap_or(1 << 30);
                let flags = if all { libc::MSG_WAITALL } else { 0 };
                let entry = opcode::Recv::new(Fd(fd.as_fd().as_raw_fd()), buf.as_ptr(), len).flags(flags).build();
                slot.fd = Some(fd);
                slot.bufs.push(buf);
                slot.cancellable = true;
                entry
            }
            Request::Send { fd, bufs } => {
                slot.point_at(&bufs);
                slot.msghdr.msg_iov = slot.iovecs.as_mut_ptr();
                slot.msghdr.msg_iovlen = slot.iovecs.len() as _;
                let flags = libc::MSG_NOSIGNAL.cast_unsigned();
                let entry =
                    opcode::SendMsg::new(Fd(fd.as_fd().as_raw_fd()), &raw const *slot.msghdr).flags(flags).build();
                slot.fd = Some(fd);
                slot.bufs = bufs;
                slot.cancellable = true;
                entry
            }
            Request::Sync { fd } => {
                let entry = opcode::Fsync::new(Fd(fd.as_fd().as_raw_fd())).flags(FsyncFlags::DATASYNC).build();
                slot.fd = Some(fd);
                entry
            }
            Request::Timeout(d) => {
                *slot.timespec = Timespec::from(d);
                slot.cancellable = true;
                opcode::Timeout::new(&raw const *slot.timespec).build()
            }
        };
        self.in_flight += 1;
        (number, entry.user_data(user_data(number)))
    }

    fn release(&mut self, number: u32) -> Vec<IoBuf> {
        let slot = &mut self.slots[number as usize];
        slot.state = State::Free;
        slot.fd = None;
        self.free.push(number);
        mem::take(&mut slot.bufs)
    }

    /// Records a completion. Returns whom to wake, and buffers to drop once no borrow is held.
    pub(super) fn complete(&mut self, user_data: u64, result: i32) -> (Option<Waker>, Vec<IoBuf>) {
        let Some(number) = slot_of(user_data) else { return (None, Vec::new()) };
        let Some(slot) = self.slots.get_mut(number as usize) else { return (None, Vec::new()) };
        match mem::replace(&mut slot.state, State::Done(result)) {
            State::InFlight { abandoned: true, .. } => {
                self.in_flight -= 1;
                (None, self.release(number))
            }
            State::InFlight { waker, .. } => {
                self.in_flight -= 1;
                (waker, Vec::new())
            }
            // Each operation completes once; a second completion would be a fault of the kernel's.
            other => {
                slot.state = other;
                (None, Vec::new())
            }
        }
    }

    /// How many operations the kernel has not completed.
    pub(super) const fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Slots in all, free ones, and buffers held.
    #[cfg(test)]
    pub(super) fn census(&self) -> (usize, usize, usize) {
        (self.slots.len(), self.free.len(), self.slots.iter().map(|s| s.bufs.len()).sum())
    }

    /// The operations that would not end on their own soon.
    pub(super) fn cancellable(&self) -> Vec<u32> {
        let waits = |s: &Slot| s.cancellable && matches!(s.state, State::InFlight { .. });
        let numbers = self.slots.iter().enumerate().filter(|(_, s)| waits(s));
        numbers.filter_map(|(i, _)| u32::try_from(i).ok()).collect()
    }

    /// Whether an operation has completed and nobody has fetched its result.
    pub(super) fn is_done(&self, number: u32) -> bool {
        matches!(self.slots[number as usize].state, State::Done(_))
    }

    /// Lets `number` be cancelled at shutdown.
    pub(super) fn set_cancellable(&mut self, number: u32) {
        self.slots[number as usize].cancellable = true;
    }

    /// Pushes an entry, or keeps it for the next [`Slots::flush_backlog`].
    fn push(&mut self, ring: &dyn Ring, entry: squeue::Entry) {
        if !self.backlog.is_empty() {
            self.backlog.push_back(entry);
            return;
        }
        ring.with(&mut |ring| {
            if !push_entry(ring, &entry) {
                // Full: what is there may leave at once. Its errors come again at the next enter, and are told there.
                let _ = ring.submit();
                if !push_entry(ring, &entry) {
                    self.backlog.push_back(entry.clone());
                }
            }
        });
    }

    /// Moves what waits into the submission queue. True when nothing is left.
    pub(super) fn flush_backlog(&mut self, ring: &dyn Ring) -> bool {
        while let Some(entry) = self.backlog.pop_front() {
            let mut pushed = false;
            ring.with(&mut |ring| pushed = push_entry(ring, &entry));
            if !pushed {
                self.backlog.push_front(entry);
                return false;
            }
        }
        true
    }

    /// Asks the kernel to end an operation; its completion comes all the same.
    pub(super) fn cancel(&mut self, ring: &dyn Ring, number: u32) {
        let cancel = CancelBuilder::user_data(user_data(number));
        self.push(ring, opcode::AsyncCancel2::new(cancel).build().user_data(IGNORED));
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        if self.in_flight > 0 {
            Box::leak(Box::new(mem::take(&mut self.slots)));
        }
    }
}

fn push_entry(ring: &mut IoUring, entry: &squeue::Entry) -> bool {
    // SAFETY: entries are made by `Slots::prepare` and `Slots::cancel` alone. What the former point at belongs
    // to a slot that stays as it is until the operation's completion is reaped, or is leaked (module's
    // invariants); the latter point at nothing.
    unsafe { ring.submission().push(entry) }.is_ok()
}

/// An operation in flight. Dropping it leaves the operation running.
pub(crate) struct Op {
    lane: Lane,
    number: u32,
    finished: bool,
}

impl Op {
    /// The slot's number.
    pub(super) const fn number(&self) -> u32 {
        self.number
    }
}

impl Lane {
    /// Queues a request for the next enter.
    pub(crate) fn submit(&self, request: Request) -> Op {
        let inner = self.inner();
        let mut slots = inner.slots.borrow_mut();
        let (number, entry) = slots.prepare(request);
        slots.push(&*inner.ring, entry);
        inner.registration.shared.counters.ops.add(1);
        Op { lane: self.clone(), number, finished: false }
    }
}

impl Future for Op {
    type Output = Completed;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Completed> {
        assert!(!self.finished, "an operation's future was polled after it had completed");
        let number = self.number;
        let done = {
            let mut slots = self.lane.inner().slots.borrow_mut();
            match &mut slots.slots[number as usize].state {
                State::Done(result) => {
                    let result = *result;
                    Some(Completed { result, bufs: slots.release(number) })
                }
                State::InFlight { waker, .. } => {
                    if !waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
                        *waker = Some(cx.waker().clone());
                    }
                    None
                }
                State::Free => unreachable!("the slot of a living future is not free"),
            }
        };
        match done {
            Some(done) => {
                self.finished = true;
                Poll::Ready(done)
            }
            None => Poll::Pending,
        }
    }
}

impl Drop for Op {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        let inner = self.lane.inner();
        let mut slots = inner.slots.borrow_mut();
        let slot = &mut slots.slots[self.number as usize];
        let cancellable = slot.cancellable;
        let bufs = match &mut slot.state {
            State::InFlight { waker, abandoned } => {
                *waker = None;
                *abandoned = true;
                if cancellable {
                    // A long sleep that nobody wants any more would hold its slot for as long.
                    slots.cancel(&*inner.ring, self.number);
                }
                Vec::new()
            }
            _ => slots.release(self.number),
        };
        drop(slots);
        drop(bufs);
    }
}
