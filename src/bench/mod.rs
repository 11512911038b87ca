//! A workload over anything that is a block device: a volume, an NBD server, a device or a file. What `vb-ublk bench` runs.
//!
//! - [`load`]: which request comes next, and what a verified block holds.
//! - [`figures`]: latencies and counts.
//! - [`disk`] and [`nbd`]: devices, files and NBD servers as a [`Target`]; every [`Engine`] is one.
//!
//! Invariants:
//! - A job's requests stay in its own span, and with verification no two in flight touch the same block: what a read has to find
//!   is known.
//! - The first failure ends the run, of all jobs, and is its result; nothing that failed is counted.
//! - A latency is the request's own: what it writes is made before, and what it reads is checked after.

pub mod disk;
pub mod figures;
pub mod load;
pub mod nbd;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::disk::IoBuf;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lane::{Driver, Lane, LaneTimer, NoDriver, OwnRing, RingMode};
use crate::time::Timer;
use crate::units::{Lba, SECTOR};
use crate::volume::engine::{Engine, IoFault};
use figures::{Figures, Kind};
use load::{Load, Turn};

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// How many of a hundred requests are reads.
    pub read_percent: u8,
    /// In order, again and again; else at random.
    pub sequential: bool,
    /// Bytes of a request, a multiple of 512.
    pub block_bytes: u32,
    /// Requests in flight.
    pub depth: u32,
    /// The bytes to do it in, whole blocks.
    pub span: Range<u64>,
    /// For how long.
    pub time: Duration,
    /// A flush after so many writes, which the writer waits for.
    pub flush_every: Option<u32>,
    /// Writes survive the loss of power when they are answered.
    pub fua: bool,
    /// Blocks say which write they are of: reads are checked, and in the end everything that was written.
    pub verify: bool,
    /// Writes every block of the span once before it begins, which is not counted.
    pub fill: bool,
    /// The same seed draws the same requests.
    pub seed: u64,
    /// The length of the intervals that are told one by one.
    pub interval: Option<Duration>,
}

impl Workload {
    /// Whether it makes sense.
    ///
    /// # Errors
    /// `Usage`.
    pub fn check(&self) -> Result<()> {
        let refuse = |what: String| Err(Error::new(ErrorKind::Usage, what));
        let (block, span) = (u64::from(self.block_bytes), self.span.end.saturating_sub(self.span.start));
        if block == 0 || !block.is_multiple_of(SECTOR as u64) || block > MAX_BLOCK {
            return refuse(format!("requests of {block} bytes are not possible: choose a multiple of 512 up to 32M"));
        }
        if self.depth == 0 || self.depth > MAX_DEPTH {
            return refuse(format!("{} requests in flight are not possible: choose 1 to {MAX_DEPTH}", self.depth));
        }
        // Half of the blocks are free at any time, so that one is soon found.
        if span / block < 2 * u64::from(self.depth) {
            return refuse(format!(
                "{span} bytes are not enough for {} requests of {block} bytes at once: leave room for twice as many",
                self.depth
            ));
        }
        if let Some(interval) = self.interval
            && (interval.is_zero() || self.time.as_nanos() / interval.as_nanos() > MAX_INTERVALS)
        {
            return refuse(format!(
                "{MAX_INTERVALS} intervals can be told, of at least a millisecond each: make them longer"
            ));
        }
        if self.verify && span / block > MAX_VERIFIED {
            return refuse(format!("what {MAX_VERIFIED} blocks hold can be checked, and not {}", span / block));
        }
        Ok(())
    }

    const fn writes(&self) -> bool {
        self.read_percent < 100
    }
}

/// The largest request, in bytes.
const MAX_BLOCK: u64 = 32 << 20;
/// The most requests in flight of a job.
const MAX_DEPTH: u32 = 1024;
/// The most intervals that are told one by one: tens of kilobytes of memory each.
const MAX_INTERVALS: u128 = 10_000;
/// The most blocks whose content is known: four bytes of memory each.
const MAX_VERIFIED: u64 = 1 << 28;

/// How a request ends.
pub type Done = std::result::Result<(), IoFault>;

/// What a workload runs over, on one lane: what it needs of an [`Engine`], and asked in the same way.
pub trait Target: 'static {
    /// Reads `dst.len()` bytes from `lba`.
    fn read(&self, lba: Lba, dst: IoBuf) -> impl Future<Output = Done>;

    /// Writes `src` at `lba`; with `fua` it survives the loss of power then.
    fn write(&self, lba: Lba, src: IoBuf, fua: bool) -> impl Future<Output = Done>;

    /// Everything that has completed survives the loss of power afterwards.
    fn flush(&self) -> impl Future<Output = Done>;

    /// No more requests of this pass will come.
    fn seal(&self);

    /// What runs beside the requests.
    fn tasks(self: Rc<Self>) -> Vec<Pin<Box<dyn Future<Output = ()>>>>;
}

impl<E: Engine> Target for E {
    fn read(&self, lba: Lba, dst: IoBuf) -> impl Future<Output = Done> {
        Engine::read(self, lba, dst)
    }

    fn write(&self, lba: Lba, src: IoBuf, fua: bool) -> impl Future<Output = Done> {
        Engine::write(self, lba, src, fua)
    }

    fn flush(&self) -> impl Future<Output = Done> {
        Engine::flush(self)
    }

    fn seal(&self) {
        Engine::seal(self);
    }

    fn tasks(self: Rc<Self>) -> Vec<Pin<Box<dyn Future<Output = ()>>>> {
        Engine::tasks(self)
    }
}

/// Has a target seal its batches.
struct Sealer<E>(Rc<E>);

impl<E: Target> Driver for Sealer<E> {
    fn seal(&mut self) {
        self.0.seal();
    }
}

/// One job on its lane.
struct Job<E> {
    engine: Rc<E>,
    timer: LaneTimer,
    work: Workload,
    load: RefCell<Load>,
    figures: RefCell<Figures>,
    since_flush: Cell<u32>,
    /// When the counting began.
    begun: Cell<Duration>,
    failed: RefCell<Option<Error>>,
    /// Somebody wants it to end.
    stop: Arc<AtomicBool>,
}

/// Runs a workload on a lane to its end, or until `stop` is set: what was counted until then is told. A failure sets it.
///
/// # Errors
/// What the engine answers, `Corrupt` when a block does not hold what was written.
pub async fn run<E: Target>(lane: &Lane, engine: Rc<E>, work: Workload, stop: Arc<AtomicBool>) -> Result<Figures> {
    work.check()?;
    for task in engine.clone().tasks() {
        lane.spawn_boxed(task);
    }
    let job = Rc::new(Job {
        engine,
        timer: LaneTimer::new(lane),
        load: RefCell::new(Load::new(&work)),
        figures: RefCell::new(Figures::new(work.interval)),
        since_flush: Cell::new(0),
        begun: Cell::default(),
        failed: RefCell::default(),
        stop,
        work,
    });
    if job.work.fill {
        let begun = job.timer.now();
        job.all(lane, Job::fill).await?;
        job.engine.flush().await.map_err(|fault| failed("flushing what was filled in", fault))?;
        job.figures.borrow_mut().filled(job.timer.now().saturating_sub(begun));
    }
    job.load.borrow_mut().rewind();
    job.begun.set(job.timer.now());
    job.all(lane, Job::work).await?;
    job.figures.borrow_mut().took(job.timer.now().saturating_sub(job.begun.get()));
    if job.work.verify && job.work.writes() {
        job.load.borrow_mut().rewind();
        job.all(lane, Job::verify).await?;
    }
    let figures = job.figures.borrow().clone();
    Ok(figures)
}

impl<E: Target> Job<E> {
    /// As many tasks as requests may be in flight, until all have ended. One that fails ends the others.
    async fn all<F: Future<Output = Result<()>> + 'static>(
        self: &Rc<Self>,
        lane: &Lane,
        task: fn(Rc<Self>) -> F,
    ) -> Result<()> {
        let mut ends = Vec::new();
        for _ in 0..self.work.depth {
            let (end, ended) = oneshot::channel::<()>();
            let (job, work) = (Rc::clone(self), task(Rc::clone(self)));
            lane.spawn(async move {
                if let Err(e) = work.await {
                    job.failed.borrow_mut().get_or_insert(e);
                }
                drop(end);
            });
            ends.push(ended);
        }
        for ended in ends {
            // It says nothing, and ends.
            let _ = ended.await;
        }
        self.failed.borrow_mut().take().map_or(Ok(()), Err)
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || self.failed.borrow().is_some()
    }

    fn buffer(&self) -> IoBuf {
        let buf = IoBuf::zeroed(self.work.block_bytes as usize);
        self.load.borrow_mut().scramble(&buf);
        buf
    }

    fn lba(&self, block: u64) -> Lba {
        Lba((self.work.span.start + block * u64::from(self.work.block_bytes)) / SECTOR as u64)
    }

    fn place(&self, block: u64) -> u64 {
        self.lba(block).0 * SECTOR as u64
    }

    /// From when a request is asked until it is answered.
    async fn timed(&self, request: impl Future<Output = Done>) -> std::result::Result<Took, IoFault> {
        let begun = self.timer.now();
        request.await?;
        Ok(Took { begun, ended: self.timer.now() })
    }

    /// What it is to hold is made before it begins.
    async fn write(&self, block: u64, buf: &IoBuf, fua: bool) -> Result<Took> {
        let version = self.load.borrow_mut().fill(block, buf);
        let done = self.timed(self.engine.write(self.lba(block), buf.clone(), fua)).await;
        self.load.borrow_mut().written(block, version);
        done.map_err(|e| failed(&format!("writing {} bytes at byte {}", buf.len(), self.place(block)), e))
    }

    /// What it holds is checked when it has ended.
    async fn read(&self, block: u64, buf: &IoBuf) -> Result<Took> {
        let done = self.timed(self.engine.read(self.lba(block), buf.clone())).await;
        let at = self.place(block);
        let took = done.map_err(|e| failed(&format!("reading {} bytes at byte {at}", buf.len()), e))?;
        let checked = self.load.borrow_mut().check(block, buf);
        checked.map_err(|why| Error::new(ErrorKind::Corrupt, format!("the {} bytes at byte {at} {why}", buf.len())))?;
        Ok(took)
    }

    async fn fill(self: Rc<Self>) -> Result<()> {
        let buf = self.buffer();
        while !self.is_over() {
            let Some(block) = self.load.borrow_mut().next_of_all() else { break };
            self.write(block, &buf, false).await?;
            breathe().await;
        }
        Ok(())
    }

    async fn verify(self: Rc<Self>) -> Result<()> {
        let buf = self.buffer();
        while !self.is_over() {
            let Some(block) = self.load.borrow_mut().next_known() else { break };
            self.read(block, &buf).await?;
            self.figures.borrow_mut().verified(buf.len() as u64);
            breathe().await;
        }
        Ok(())
    }

    async fn work(self: Rc<Self>) -> Result<()> {
        let buf = self.buffer();
        let end = self.begun.get() + self.work.time;
        while self.timer.now() < end && !self.is_over() {
            let Turn { block, read } = self.load.borrow_mut().turn();
            let done = if read { self.read(block, &buf).await } else { self.write(block, &buf, self.work.fua).await };
            self.load.borrow_mut().release(block);
            self.note(if read { Kind::Read } else { Kind::Write }, &done?, buf.len() as u64);
            if !read && self.flush_is_due() {
                let done = self.timed(self.engine.flush()).await.map_err(|e| failed("a flush", e));
                self.note(Kind::Flush, &done?, 0);
            }
            breathe().await;
        }
        Ok(())
    }

    fn note(&self, kind: Kind, took: &Took, bytes: u64) {
        let since = took.ended.saturating_sub(self.begun.get());
        self.figures.borrow_mut().note(kind, since, took.ended.saturating_sub(took.begun), bytes);
    }

    fn flush_is_due(&self) -> bool {
        let Some(every) = self.work.flush_every else { return false };
        let writes = self.since_flush.get() + 1;
        let due = writes >= every;
        self.since_flush.set(if due { 0 } else { writes });
        due
    }
}

/// When a request was asked, and answered.
struct Took {
    begun: Duration,
    ended: Duration,
}

fn failed(what: &str, fault: IoFault) -> Error {
    Error::new(ErrorKind::Io, format!("{what} failed: {fault}"))
}

/// Lets the lane go on: what is answered at once must not keep the others of this depth from being asked.
async fn breathe() {
    let mut breathed = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut breathed, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Runs a workload on a thread that is a lane of its own, on an engine that is made there.
///
/// # Errors
/// Those of [`run`], and of the ring.
pub fn run_here<E: Target>(
    work: Workload,
    stop: Arc<AtomicBool>,
    engine: impl FnOnce(&Lane) -> Result<Rc<E>>,
) -> Result<Figures> {
    let mut ending = Ending { stop: Arc::clone(&stop), failed: true };
    let figures = run_on_a_lane(work, stop, engine);
    ending.failed = figures.is_err();
    figures
}

/// What ends all jobs when one has failed, or panicked.
struct Ending {
    stop: Arc<AtomicBool>,
    failed: bool,
}

impl Drop for Ending {
    fn drop(&mut self) {
        if self.failed {
            self.stop.store(true, Ordering::Relaxed);
        }
    }
}

fn run_on_a_lane<E: Target>(
    work: Workload,
    stop: Arc<AtomicBool>,
    engine: impl FnOnce(&Lane) -> Result<Rc<E>>,
) -> Result<Figures> {
    let starting = || "starting a lane for the benchmark";
    let ring = OwnRing::new(RING_ENTRIES, RingMode::default()).context(starting)?;
    let lane = Lane::new(ring).context(starting)?;
    let engine = match engine(&lane) {
        Ok(engine) => engine,
        Err(e) => {
            lane.shutdown(&mut NoDriver).context(|| "ending a lane")?;
            return Err(e);
        }
    };
    let mut driver = Sealer(engine.clone());
    let figures = lane.run_with(&mut driver, run(&lane, engine, work, stop)).context(|| "running a lane");
    lane.shutdown(&mut driver).context(|| "ending a lane")?;
    figures?
}

/// Entries of a lane's submission queue; what is more waits for the next pass.
const RING_ENTRIES: u32 = 512;
