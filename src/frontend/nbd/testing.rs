//! For tests: a client's stream without a socket, and a volume in memory.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use super::session::{Beside, Task};
use super::signal::Signal;
use super::transport::Transport;
use crate::disk::IoBuf;
use crate::units::{Lba, SECTOR};
use crate::volume::engine::{Engine, Extent, IoFault};

/// What the client has said comes in pieces of at most `piece` bytes; what it hears is kept.
pub(super) struct Script {
    said: RefCell<Vec<u8>>,
    at: Cell<usize>,
    piece: usize,
    /// The client says no more: without this, who waits for it waits.
    pub(super) over: Cell<bool>,
    changed: Signal,
    pub(super) heard: RefCell<Vec<u8>>,
    pub(super) closed: Cell<bool>,
}

impl Script {
    pub(super) fn new(said: Vec<u8>, piece: usize) -> Rc<Self> {
        Rc::new(Self {
            said: said.into(),
            at: Cell::new(0),
            piece: piece.max(1),
            over: Cell::new(true),
            changed: Signal::default(),
            heard: RefCell::default(),
            closed: Cell::new(false),
        })
    }
}

impl Transport for Rc<Script> {
    async fn recv(&self, buf: IoBuf, all: bool) -> io::Result<usize> {
        let mut have = 0;
        loop {
            let here = {
                let said = self.said.borrow();
                let rest = &said[self.at.get()..];
                let n = rest.len().min(buf.len() - have).min(self.piece);
                buf.copy_in(have, &rest[..n]);
                n
            };
            self.at.set(self.at.get() + here);
            have += here;
            if here == 0 && (self.over.get() || self.closed.get() || have > 0) || have > 0 && !all || have == buf.len()
            {
                return Ok(have);
            }
            if here == 0 {
                let at = self.at.get();
                self.changed.until(|| self.said.borrow().len() > at || self.over.get() || self.closed.get()).await;
            }
        }
    }

    async fn send(&self, bufs: Vec<IoBuf>, moved: &dyn Fn()) -> io::Result<()> {
        if self.closed.get() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        for b in bufs {
            self.heard.borrow_mut().extend_from_slice(b.bytes());
            moved();
        }
        Ok(())
    }

    fn stop_reading(&self) {
        self.over.set(true);
        self.changed.tell();
    }

    async fn finish(&self) -> io::Result<()> {
        Ok(())
    }

    fn close(&self) {
        self.closed.set(true);
        self.changed.tell();
    }
}

/// Runs tasks until none of them moves any more.
#[derive(Clone, Default)]
pub(super) struct Tasks(Rc<RefCell<Vec<Task>>>);

impl Tasks {
    /// Polls `main` and the tasks by turns; panics when `main` is not done after very many rounds.
    pub(super) fn run<T>(&self, main: impl Future<Output = T>) -> T {
        let mut main = std::pin::pin!(main);
        for _ in 0..100_000 {
            if let Poll::Ready(v) = main.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                return v;
            }
            let tasks = self.0.take();
            for mut task in tasks {
                if task.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
                    self.0.borrow_mut().push(task);
                }
            }
        }
        panic!("it waits for ever");
    }

    /// What a session wants of its lane. A sleep takes some rounds, whatever its length.
    pub(super) fn beside(&self) -> Beside {
        let tasks = self.clone();
        let sleep = |_| -> Task {
            let mut left = 20;
            Box::pin(std::future::poll_fn(move |_| {
                left -= 1;
                if left == 0 { Poll::Ready(()) } else { Poll::Pending }
            }))
        };
        Beside { spawn: Box::new(move |t| tasks.0.borrow_mut().push(t)), sleep: Box::new(sleep) }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.borrow().is_empty()
    }
}

/// Bytes, by sector; a sector that was never written is a hole. Every call yields a few times, so that requests mix.
pub(super) struct Sectors {
    pub(super) bytes: RefCell<Vec<u8>>,
    written: RefCell<Vec<bool>>,
    turn: Cell<u32>,
}

impl Sectors {
    pub(super) fn new(sectors: usize) -> Rc<Self> {
        Rc::new(Self {
            bytes: vec![0; sectors * SECTOR].into(),
            written: vec![false; sectors].into(),
            turn: Cell::new(0),
        })
    }

    async fn dawdle(&self) {
        let turns = self.turn.get() % 5;
        self.turn.set(self.turn.get() + 1);
        let mut left = turns;
        std::future::poll_fn(|cx| {
            if left == 0 {
                return Poll::Ready(());
            }
            left -= 1;
            // For who polls only what has been woken.
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    fn place(&self, lba: Lba, bytes: usize) -> Result<std::ops::Range<usize>, IoFault> {
        let from = lba.0 as usize * SECTOR;
        if bytes == 0 || from + bytes > self.bytes.borrow().len() {
            Err(IoFault::BadRange)
        } else {
            Ok(from..from + bytes)
        }
    }

    fn mark(&self, place: &std::ops::Range<usize>, written: bool) {
        self.written.borrow_mut()[place.start / SECTOR..place.end / SECTOR].fill(written);
    }
}

impl Engine for Sectors {
    async fn read(&self, lba: Lba, dst: IoBuf) -> Result<(), IoFault> {
        let place = self.place(lba, dst.len())?;
        self.dawdle().await;
        dst.copy_in(0, &self.bytes.borrow()[place]);
        Ok(())
    }

    async fn write(&self, lba: Lba, src: IoBuf, _: bool) -> Result<(), IoFault> {
        let place = self.place(lba, src.len())?;
        self.dawdle().await;
        self.mark(&place, true);
        self.bytes.borrow_mut()[place].copy_from_slice(src.bytes());
        Ok(())
    }

    async fn flush(&self) -> Result<(), IoFault> {
        self.dawdle().await;
        Ok(())
    }

    async fn discard(&self, lba: Lba, sectors: u64, _: bool) -> Result<(), IoFault> {
        let place = self.place(lba, sectors as usize * SECTOR)?;
        self.dawdle().await;
        self.mark(&place, false);
        self.bytes.borrow_mut()[place].fill(0);
        Ok(())
    }

    async fn write_zeroes(&self, lba: Lba, sectors: u64, fua: bool) -> Result<(), IoFault> {
        self.discard(lba, sectors, fua).await
    }

    fn extents(&self, lba: Lba, sectors: u64, out: &mut Vec<Extent>) -> Result<(), IoFault> {
        let place = self.place(lba, sectors as usize * SECTOR)?;
        let first = out.len();
        for written in &self.written.borrow()[place.start / SECTOR..place.end / SECTOR] {
            match out[first..].last_mut() {
                Some(last) if last.hole != *written => last.sectors += 1,
                _ => out.push(Extent { sectors: 1, hole: !written }),
            }
        }
        Ok(())
    }

    fn seal(&self) {}

    fn tasks(self: Rc<Self>) -> Vec<Pin<Box<dyn Future<Output = ()>>>> {
        Vec::new()
    }
}
