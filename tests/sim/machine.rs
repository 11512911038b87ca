//! A disk that forgets, and an executor whose every choice comes from a seed.
//!
//! The disk's operations end in any order, one at a time; each end is a numbered crash point. At a crash,
//! what had ended survives a process's death, and writes under way land whole, in part or not at all. A power cut keeps
//! what a sync had covered when it was *submitted*, and of the rest each write is kept, lost or torn in sectors of 512
//! bytes.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use nix::errno::Errno;
use vb_ublk::disk::{Disk, IoBuf};
use vb_ublk::units::{BLOCK, SECTOR};
use vb_ublk::wal::codec::SLOTS_START;

use crate::support_rng::Rng;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Crash {
    Process,
    Power,
}

#[derive(Clone)]
struct Write {
    number: u64,
    offset: usize,
    data: Vec<u8>,
    /// On stable storage already. It stays in the list to keep its place: what was written there before lies below it.
    pinned: bool,
}

enum What {
    Write { write: Write, dsync: bool },
    Sync { covers: u64 },
    Tick,
}

struct Op {
    what: Option<What>,
    done: Option<io::Result<()>>,
    waker: Option<Waker>,
}

struct State {
    visible: Vec<u8>,
    platter: Vec<u8>,
    /// Ended and not covered by a sync, in the order of their ends.
    unsynced: Vec<Write>,
    ended_writes: u64,
    ops: BTreeMap<u64, Op>,
    next: u64,
    fail_write: bool,
    fail_sync: bool,
    /// Nothing is written from here on: there is no room for it.
    room: usize,
    /// Writes that there was no room for.
    refused: u64,
    /// Writes to the superblock do not end from now on; the blocks written since then, and whether one was written twice.
    held: Option<(BTreeSet<usize>, bool)>,
    /// Blocks that cannot be read until they are written.
    bad: BTreeSet<usize>,
}

fn lay(image: &mut Vec<u8>, offset: usize, data: &[u8]) {
    if image.len() < offset + data.len() {
        image.resize(offset + data.len(), 0);
    }
    image[offset..offset + data.len()].copy_from_slice(data);
}

/// Clones are one disk.
#[derive(Clone)]
pub(crate) struct SimDisk(Rc<RefCell<State>>);

impl SimDisk {
    pub(crate) fn new(image: Vec<u8>) -> Self {
        Self(Rc::new(RefCell::new(State {
            platter: image.clone(),
            visible: image,
            unsynced: Vec::new(),
            ended_writes: 0,
            ops: BTreeMap::new(),
            next: 0,
            fail_write: false,
            fail_sync: false,
            room: usize::MAX,
            refused: 0,
            held: None,
            bad: BTreeSet::new(),
        })))
    }

    /// The block at that byte cannot be read until it is written.
    pub(crate) fn lose_block(&self, at: u64) {
        self.0.borrow_mut().bad.insert(at as usize);
    }

    /// No write to the superblock ends any more.
    pub(crate) fn hold_superblock(&self) {
        self.0.borrow_mut().held = Some(Default::default());
    }

    /// Bytes of the log's slots that were written since, and whether any of them were written over again.
    pub(crate) fn written_since(&self) -> (usize, bool) {
        let s = self.0.borrow();
        let (blocks, twice) = s.held.as_ref().expect("it is held");
        (blocks.len() * BLOCK, *twice)
    }

    /// What a reader sees now.
    pub(crate) fn image(&self) -> Vec<u8> {
        self.0.borrow().visible.clone()
    }

    pub(crate) fn size(&self) -> u64 {
        self.0.borrow().visible.len() as u64
    }

    /// Writes that go beyond `bytes` fail for want of room. The next process has to be told anew.
    pub(crate) fn set_room(&self, bytes: usize) {
        self.0.borrow_mut().room = bytes;
    }

    /// How many writes there was no room for.
    pub(crate) fn refused(&self) -> u64 {
        self.0.borrow().refused
    }

    /// The next write or sync to end fails; a failed write may have taken effect in part.
    pub(crate) fn fail_next_write(&self) {
        self.0.borrow_mut().fail_write = true;
    }
    pub(crate) fn fail_next_sync(&self) {
        self.0.borrow_mut().fail_sync = true;
    }

    /// A moment of waiting.
    pub(crate) fn tick(&self) -> impl Future<Output = io::Result<()>> + use<> {
        self.submit(What::Tick)
    }

    fn submit(&self, what: What) -> Pending {
        let mut s = self.0.borrow_mut();
        let id = s.next;
        s.next += 1;
        s.ops.insert(id, Op { what: Some(what), done: None, waker: None });
        Pending { disk: self.clone(), id }
    }

    /// Ends one operation. Says whether it counts (a tick does not).
    fn end_one(&self, id: u64, rng: &mut Rng) -> bool {
        let mut guard = self.0.borrow_mut();
        let s = &mut *guard;
        let op = s.ops.get_mut(&id).expect("an operation under way");
        let what = op.what.take().expect("an operation under way");
        let mut result = Ok(());
        let counts = !matches!(what, What::Tick);
        match what {
            What::Tick => {}
            What::Write { write, .. } if write.offset + write.data.len() > s.room => {
                s.refused += 1;
                result = Err(io::Error::from(io::ErrorKind::StorageFull));
            }
            What::Write { mut write, dsync } => {
                write.number = s.ended_writes;
                s.ended_writes += 1;
                if std::mem::take(&mut s.fail_write) {
                    result = Err(io::Error::other("injected write failure"));
                    write.data.truncate(rng.below(write.data.len() as u64 / SECTOR as u64) as usize * SECTOR);
                }
                lay(&mut s.visible, write.offset, &write.data);
                if let Some((blocks, twice)) = &mut s.held {
                    for at in (write.offset..write.offset + write.data.len()).step_by(BLOCK) {
                        *twice |= !blocks.insert(at);
                    }
                }
                if dsync && result.is_ok() {
                    lay(&mut s.platter, write.offset, &write.data);
                    write.pinned = true;
                }
                s.unsynced.push(write);
            }
            What::Sync { covers } => {
                if std::mem::take(&mut s.fail_sync) {
                    result = Err(io::Error::other("injected sync failure"));
                } else {
                    let (now, later) = s.unsynced.drain(..).partition(|w| w.number < covers);
                    let now: Vec<Write> = now;
                    s.unsynced = later;
                    for w in &now {
                        lay(&mut s.platter, w.offset, &w.data);
                    }
                }
            }
        }
        op.done = Some(result);
        let waker = op.waker.take();
        drop(guard);
        if let Some(w) = waker {
            w.wake();
        }
        counts
    }

    /// The disk as the next process finds it.
    pub(crate) fn crash(&self, how: Crash, rng: &mut Rng) -> Self {
        let s = self.0.borrow();
        let flying = s.ops.values().filter_map(|o| match &o.what {
            Some(What::Write { write, .. }) if write.offset + write.data.len() <= s.room => Some(write),
            _ => None,
        });
        match how {
            Crash::Process => {
                let next = Self::new(s.platter.clone());
                let mut n = next.0.borrow_mut();
                n.visible = s.visible.clone();
                n.unsynced = s.unsynced.clone();
                n.ended_writes = s.ended_writes;
                for w in flying {
                    // A write under way is one request: what is missing is missing at its end.
                    let keep = match rng.below(3) {
                        0 => 0,
                        1 => w.data.len(),
                        _ => rng.below((w.data.len() / SECTOR) as u64) as usize * SECTOR,
                    };
                    let w = Write {
                        number: n.ended_writes,
                        offset: w.offset,
                        data: w.data[..keep].to_vec(),
                        pinned: false,
                    };
                    n.ended_writes += 1;
                    lay(&mut n.visible, w.offset, &w.data);
                    n.unsynced.push(w);
                }
                drop(n);
                next
            }
            Crash::Power => {
                let mut image = s.platter.clone();
                image.resize(s.visible.len().max(image.len()), 0);
                let lost = rng.below(4);
                for w in s.unsynced.iter().chain(flying) {
                    match rng.below(4) {
                        _ if w.pinned => lay(&mut image, w.offset, &w.data),
                        n if n < lost => {}
                        3 => {
                            for (i, sector) in w.data.chunks(SECTOR).enumerate() {
                                if rng.below(2) == 0 {
                                    lay(&mut image, w.offset + i * SECTOR, sector);
                                }
                            }
                        }
                        _ => lay(&mut image, w.offset, &w.data),
                    }
                }
                Self::new(image)
            }
        }
    }
}

struct Pending {
    disk: SimDisk,
    id: u64,
}

impl Future for Pending {
    type Output = io::Result<()>;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut s = self.disk.0.borrow_mut();
        let op = s.ops.get_mut(&self.id).expect("polled after its end");
        match op.done.take() {
            Some(r) => {
                s.ops.remove(&self.id);
                Poll::Ready(r)
            }
            None => {
                op.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Disk for SimDisk {
    async fn read_at(&self, offset: u64, dst: IoBuf) -> io::Result<()> {
        let s = self.0.borrow();
        let at = offset as usize;
        if s.bad.range(at..at + dst.len()).next().is_some() {
            return Err(io::Error::from_raw_os_error(Errno::EIO as i32));
        }
        let from = s.visible.get(at..at + dst.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        dst.copy_in(0, from);
        Ok(())
    }

    async fn writev_at(&self, offset: u64, bufs: Vec<IoBuf>, dsync: bool) -> io::Result<()> {
        assert!(offset.is_multiple_of(4096) && bufs.iter().all(|b| b.is_aligned(4096)), "O_DIRECT wants whole blocks");
        assert!(bufs.len() <= 1000, "a vectored write takes 1000 buffers, not {}", bufs.len());
        let mut data = Vec::with_capacity(bufs.iter().map(IoBuf::len).sum());
        bufs.iter().for_each(|b| data.extend_from_slice(b.bytes()));
        let written = offset as usize..offset as usize + data.len();
        self.0.borrow_mut().bad.retain(|at| !written.contains(at));
        self.submit(What::Write { write: Write { number: 0, offset: offset as usize, data, pinned: false }, dsync })
            .await
    }

    async fn sync(&self) -> io::Result<()> {
        let covers = self.0.borrow().ended_writes;
        self.submit(What::Sync { covers }).await
    }
}

/// Where operations are under way, which end one at a time, when the run says so.
pub(crate) trait Source {
    fn under_way(&self) -> Vec<u64>;
    /// Ends one; says whether that is a crash point.
    fn end(&self, id: u64, rng: &mut Rng) -> bool;
    /// Used when nothing else is under way, and seldom otherwise: so goes time.
    fn is_patient(&self) -> bool {
        false
    }
}

impl Source for SimDisk {
    fn under_way(&self) -> Vec<u64> {
        let s = self.0.borrow();
        let stuck = |what: &What| {
            s.held.is_some() && matches!(what, What::Write { write, .. } if write.offset < SLOTS_START as usize)
        };
        s.ops.iter().filter(|(_, o)| o.what.as_ref().is_some_and(|w| !stuck(w))).map(|(id, _)| *id).collect()
    }
    fn end(&self, id: u64, rng: &mut Rng) -> bool {
        self.end_one(id, rng)
    }
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Called when every task waits.
type Hooks = Vec<Box<dyn Fn()>>;

/// Starts tasks from inside a task; clones are one.
#[derive(Clone, Default)]
pub(crate) struct Spawner {
    fresh: Rc<RefCell<Vec<Task>>>,
    idle: Rc<RefCell<Hooks>>,
}

impl Spawner {
    pub(crate) fn spawn(&self, f: impl Future<Output = ()> + 'static) {
        self.fresh.borrow_mut().push(Box::pin(f));
    }
    /// `f` runs whenever no task is ready: where a lane seals its batch.
    pub(crate) fn when_idle(&self, f: impl Fn() + 'static) {
        self.idle.borrow_mut().push(Box::new(f));
    }
}

struct Wakeup {
    id: usize,
    ready: Arc<Mutex<BTreeSet<usize>>>,
}

impl Wake for Wakeup {
    fn wake(self: Arc<Self>) {
        self.ready.lock().expect("no panic holds it").insert(self.id);
    }
}

/// Runs `root` and what it spawns until it ends (`Some`), or until `crash_at` operations have ended (`None`).
pub(crate) fn run<T: 'static>(
    disk: &SimDisk,
    spawner: &Spawner,
    rng: &mut Rng,
    crash_at: u64,
    root: impl Future<Output = T> + 'static,
) -> Option<T> {
    run_all(&[disk], spawner, rng, crash_at, root)
}

/// The same with more than a disk.
pub(crate) fn run_all<T: 'static>(
    sources: &[&dyn Source],
    spawner: &Spawner,
    rng: &mut Rng,
    crash_at: u64,
    root: impl Future<Output = T> + 'static,
) -> Option<T> {
    let out = Rc::new(RefCell::new(None));
    let result = out.clone();
    spawner.spawn(async move {
        let value = root.await;
        *result.borrow_mut() = Some(value);
    });
    let ready = Arc::new(Mutex::new(BTreeSet::new()));
    let mut tasks: Vec<Option<Task>> = Vec::new();
    let poll = |tasks: &mut Vec<Option<Task>>, id: usize| {
        ready.lock().unwrap().remove(&id);
        let waker = Waker::from(Arc::new(Wakeup { id, ready: ready.clone() }));
        if let Some(mut t) = tasks[id].take()
            && t.as_mut().poll(&mut Context::from_waker(&waker)).is_pending()
        {
            tasks[id] = Some(t);
        }
    };
    let mut ended = 0;
    for step in 0.. {
        assert!(step < 3_000_000, "nothing moves any more");
        // Started in order, as a lane does.
        let fresh: Vec<Task> = spawner.fresh.borrow_mut().drain(..).collect();
        for t in fresh {
            tasks.push(Some(t));
            let id = tasks.len() - 1;
            poll(&mut tasks, id);
        }
        if let Some(value) = out.borrow_mut().take() {
            return Some(value);
        }
        let waiting: Vec<usize> = ready.lock().unwrap().iter().copied().collect();
        if !waiting.is_empty() && rng.below(8) != 0 {
            poll(&mut tasks, waiting[rng.below(waiting.len() as u64) as usize]);
            continue;
        }
        if waiting.is_empty() {
            spawner.idle.borrow().iter().for_each(|f| f());
            if !ready.lock().unwrap().is_empty() {
                continue;
            }
        }
        let list = |patient: bool| -> Vec<(usize, u64)> {
            let of = |(at, s): (usize, &&dyn Source)| s.under_way().into_iter().map(move |id| (at, id));
            sources.iter().enumerate().filter(|(_, s)| s.is_patient() == patient).flat_map(of).collect()
        };
        let mut flying = list(false);
        if flying.is_empty() || sources.len() > 1 && rng.below(16) == 0 {
            let patient = list(true);
            if !patient.is_empty() {
                flying = patient;
            }
        }
        if flying.is_empty() {
            assert!(!waiting.is_empty(), "nothing is ready and nothing is under way: a wake-up was lost");
            continue;
        }
        let (at, id) = flying[rng.below(flying.len() as u64) as usize];
        if sources[at].end(id, rng) {
            ended += 1;
            if ended == crash_at {
                return None;
            }
        }
    }
    unreachable!("the loop ends by itself")
}
