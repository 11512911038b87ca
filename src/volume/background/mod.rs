//! What goes on behind an attached volume: one task on a store thread.
//!
//! An actor: all state is owned by [`Background`]; everything that takes time is a future in one set, which ends in
//! an [`Event`]. [`Background::step`] starts what is due, [`Background::handle`] takes what has ended. So nothing here
//! needs a lock, and nothing is cancelled half way.
//!
//! Invariants:
//! - Groups are cut, applied and retired strictly in order; at most three are in flight, one of them being built.
//! - A group is applied (base, then overlay, per leaf in one step) when all its chunks are in the store; the
//!   superblock's packed mark follows, durably, and only then is the log's room free.
//! - One task at a time owns the manifest, and one the superblock.
//! - Once fenced, nothing is uploaded or published again.

mod barrier;
pub(super) mod checkpoint;
mod gc;
mod groups;
pub(super) mod logcare;
mod logreads;
mod memory;
mod orders;
mod patience;
mod resize;

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::mpsc;

use barrier::Barriers;
use gc::{Flatten, Gc, GcDone};
use logreads::LogReads;
use memory::{Memory, RESERVED_BODIES};
use orders::{Reply, SnapshotOrder, lost};
use patience::no_trouble;
pub(super) use patience::{Absences, Backoff, trouble};

use super::recover::StoreEnd;
use super::{Command, PACKED_QUEUE, Volume};
use crate::chunk::bodies::Bodies;
use crate::chunk::pack::BuiltChunk;
use crate::chunk::pack::Suspects;
use crate::chunk::reader::ChunkReader;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::{Published, prefix};
use crate::map::{BaseImage, Move};
use crate::store::Store;
use crate::time::Timer;
use crate::units::{ChunkNo, Epoch, GroupNo, Nonce, Seq};
use crate::wal::create::SuperblockFile;
use crate::wal::log::MAX_ENTRIES;

/// Between two looks at a busy volume.
const BUSY_TICK: Duration = Duration::from_millis(20);
/// Between two looks at an idle one, if nothing is heard of it.
const IDLE_TICK: Duration = Duration::from_secs(1);
/// How often the manifest is looked at, to find out that another host has taken the volume.
pub(super) const POLL_MANIFEST: Duration = Duration::from_secs(10);
/// The volume counts as deleted when its manifest was missing so often in a row.
const POLLS_WITHOUT_MANIFEST: u32 = 3;
/// First pause after a failure of the store; it doubles…
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// …up to this.
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(10);

type Task = Pin<Box<dyn Future<Output = Event>>>;

/// What has ended.
pub(super) enum Event {
    Tick,
    Built {
        group: GroupNo,
        chunks: Option<Vec<BuiltChunk>>,
    },
    Uploaded {
        group: GroupNo,
        ok: bool,
    },
    Superblock {
        sb: Box<SuperblockFile>,
        result: Result<()>,
    },
    Published {
        published: Box<Published>,
        done: PublishDone,
        /// Who waits for it.
        replies: Vec<Reply>,
    },
    Polled(Result<()>),
    /// The manifest was looked at for barriers.
    Looked(Result<()>),
    /// Something that changes nothing here has ended, and who ordered it was told.
    Answered,
    /// The volume was to be made larger.
    Resized {
        published: Box<Published>,
        sb: Box<SuperblockFile>,
        result: Result<()>,
        reply: Reply,
    },
    Grown {
        slot: u32,
        result: Result<()>,
    },
    /// The volume is taken, or another's.
    Confirmed(Result<Box<Holding>>),
    /// A step of garbage collection.
    Gc(GcDone),
}

/// How a checkpoint, a release or another change of the manifest ended.
pub(super) enum PublishDone {
    /// The manifest says so.
    Done { image: BaseImage, group: GroupNo, released: bool },
    /// Something else was changed, or not.
    Changed(Result<()>),
    /// Another host has the volume.
    Fenced(Error),
    /// The volume went away meanwhile.
    Stopped,
}

impl PublishDone {
    /// Of a change that is made once, and not tried again.
    fn of(changed: Result<()>) -> Self {
        match changed {
            Err(e) if e.kind() == ErrorKind::Fenced => Self::Fenced(e),
            changed => Self::Changed(changed),
        }
    }
}

/// A group between its cut and its retirement.
struct Group {
    number: GroupNo,
    through: Seq,
    bytes: u64,
    /// When its first entry was seen waiting.
    since: Duration,
    /// When it was cut.
    cut_at: Duration,
    /// When its chunks were ready to go.
    built_at: Duration,
    chunks: Option<Rc<Vec<BuiltChunk>>>,
    /// Chunks not yet in the store.
    left: usize,
    /// No entries of the log, but blocks that garbage collection puts elsewhere.
    moves: Option<Vec<Move>>,
}

/// See the module's page.
pub struct Background<D: Disk, T: Timer> {
    volume: Arc<Volume>,
    store: Arc<dyn Store>,
    disk: D,
    timer: T,
    reader: ChunkReader,
    prefix: String,
    epoch: Epoch,
    nonce: Nonce,
    published: Option<Box<Published>>,
    superblock: Option<Box<SuperblockFile>>,
    commands: mpsc::Receiver<Command>,
    tasks: FuturesUnordered<Task>,

    groups: VecDeque<Group>,
    uploads: VecDeque<(GroupNo, BuiltChunk)>,
    uploading: usize,
    bodies: Bodies,
    suspects: Rc<Suspects>,
    log_reads: Rc<LogReads>,
    memory: Memory,
    looked_at_memory: Duration,
    /// The last entry that some group holds.
    cut: Seq,
    uncut_since: Option<Duration>,
    next_group: GroupNo,
    next_chunk: ChunkNo,
    applied: GroupNo,
    applied_seq: Seq,
    /// The last chunk number of an applied group.
    applied_chunk: ChunkNo,
    packed_durable: Seq,
    pace: Option<f64>,
    last_retired: Duration,

    /// What the next delta is reckoned from: the map as of the last checkpoint. It shares all pages that have not changed since.
    checkpoint_image: BaseImage,
    trouble_since: Option<Duration>,
    checkpoint_group: GroupNo,
    next_checkpoint: u64,
    last_poll: Duration,
    polling: bool,
    absences: Absences,

    /// Slots could be recycled but for readers.
    held: bool,
    growing: bool,
    no_growth_until: Duration,

    /// What is served never changes: nothing is cared for.
    is_fixed: bool,
    snapshots: Vec<SnapshotOrder>,
    /// Snapshots that are to be deleted, by name.
    deletions: VecDeque<(String, Reply)>,

    gc: Gc,
    flatten: Flatten,

    /// Sizes that the volume is to have, in bytes.
    resizes: VecDeque<(u64, Reply)>,
    barriers: Barriers,
    detach: Option<Reply>,
    finished: bool,
}

/// What an attachment hands to its background.
pub(super) struct Attachment<D, T> {
    pub volume: Arc<Volume>,
    pub store: Arc<dyn Store>,
    pub disk: D,
    pub timer: T,
    pub reader: ChunkReader,
    pub commands: mpsc::Receiver<Command>,
}

/// What whoever has taken the volume holds.
pub(super) struct Holding {
    pub published: Published,
    pub superblock: SuperblockFile,
    /// What the store holds; the maps have it.
    pub end: StoreEnd,
    /// The map as of the last checkpoint.
    pub checkpoint_image: BaseImage,
}

impl<D: Disk + Clone, T: Timer> Background<D, T> {
    /// Of a volume that is not taken yet: [`Background::take_up`], or [`Background::confirm_by`].
    pub(super) fn new(a: Attachment<D, T>) -> Self {
        let Attachment { volume, store, disk, timer, reader, commands } = a;
        let now = timer.now();
        let gc = Gc::new(&store);
        Self {
            prefix: prefix(volume.name()),
            epoch: Epoch(0),
            nonce: Nonce(0),
            checkpoint_group: GroupNo(0),
            next_checkpoint: 1,
            packed_durable: Seq(0),
            published: None,
            superblock: None,
            checkpoint_image: BaseImage::empty(0),
            volume,
            store,
            disk,
            timer,
            reader,
            commands,
            tasks: FuturesUnordered::new(),
            groups: VecDeque::new(),
            uploads: VecDeque::new(),
            uploading: 0,
            bodies: Bodies::default(),
            suspects: Rc::default(),
            log_reads: Rc::default(),
            memory: Memory::plenty(),
            looked_at_memory: Duration::ZERO,
            cut: Seq(0),
            uncut_since: None,
            next_group: GroupNo(1),
            next_chunk: ChunkNo(1),
            applied: GroupNo(0),
            applied_seq: Seq(0),
            applied_chunk: ChunkNo(0),
            pace: None,
            last_retired: now,
            trouble_since: None,
            last_poll: now,
            polling: false,
            absences: Absences::default(),
            held: false,
            growing: false,
            no_growth_until: Duration::ZERO,
            is_fixed: false,
            snapshots: Vec::new(),
            deletions: VecDeque::new(),
            gc,
            flatten: Flatten::default(),
            resizes: VecDeque::new(),
            barriers: Barriers::default(),
            detach: None,
            finished: false,
        }
    }

    /// The volume is ours: from here on it is packed and published. Its maps have the base, and its reader the keys.
    pub(super) fn take_up(&mut self, holding: Holding) {
        let Holding { published, superblock, end, checkpoint_image } = holding;
        let m = &published.manifest;
        let checkpoint = m.checkpoint.as_ref();
        self.epoch = m.epoch;
        self.nonce = m.nonce;
        self.checkpoint_group = checkpoint.map_or(GroupNo(0), |c| c.group);
        self.next_checkpoint = checkpoint.map_or(1, |c| c.number() + 1);
        self.packed_durable = superblock.current.packed_through;
        self.cut = end.through;
        self.next_group = end.group.next();
        self.next_chunk = end.last_chunk.next();
        self.applied = end.group;
        self.applied_seq = end.through;
        self.applied_chunk = end.last_chunk;
        self.checkpoint_image = checkpoint_image;
        let is_published = end.group == self.checkpoint_group && m.after_checkpoint().chunk == self.next_chunk;
        let image = is_published.then(|| self.volume.maps.base_image());
        self.gc.begin(m, image, self.timer.now(), &self.volume.gc);
        self.last_poll = self.timer.now();
        self.volume.update_background(|s| {
            s.epoch = m.epoch.0;
            s.conditional_writes = m.conditional_writes;
            s.groups = end.group.0;
            s.checkpoint_group = checkpoint.map_or(0, |c| c.group.0);
            s.snapshots = m.snapshots.len() as u64;
        });
        self.published = Some(Box::new(published));
        self.superblock = Some(Box::new(superblock));
        self.volume.set_confirmed();
    }

    /// A snapshot is served: its maps have the base, and its reader the keys.
    pub(super) fn serve_fixed(&mut self) {
        self.is_fixed = true;
        self.volume.set_confirmed();
    }

    /// The volume is a device of this machine: see [`memory`].
    pub(super) fn guard_memory(&mut self, has_cache: bool) {
        self.bodies.reserve(RESERVED_BODIES + if has_cache { PACKED_QUEUE } else { 0 });
        self.memory = Memory::watched();
    }

    /// The volume is being taken by `taking`, which goes on until it has it, or knows that it is another's.
    pub(super) fn confirm_by(&self, taking: impl Future<Output = Result<Holding>> + 'static) {
        self.spawn(async move { Event::Confirmed(taking.await.map(Box::new)) });
    }

    /// Runs until the volume is detached, or lost and asked to detach.
    pub async fn run(mut self) {
        self.arm_tick();
        while !self.finished {
            self.step();
            if self.finished {
                break;
            }
            let event = tokio::select! {
                biased;
                Some(event) = self.tasks.next() => Some(event),
                command = self.commands.recv() => {
                    self.command(command);
                    None
                }
            };
            if let Some(event) = event {
                self.handle(event);
            }
        }
    }

    /// Starts what is due.
    fn step(&mut self) {
        let now = self.timer.now();
        if self.is_fixed && self.detach.is_some() {
            self.let_go();
            return;
        }
        if self.is_fixed {
            self.refuse_orders();
            return;
        }
        self.care_for_log(now);
        self.look_after_recent(now);
        if self.volume.is_gone() {
            self.give_up();
            return;
        }
        if self.volume.is_confirmed() {
            self.number_batch();
            self.cut_group(now);
            self.start_uploads();
            self.retire_groups(now);
            self.pass_barriers();
            self.mark_packed();
            self.checkpoint_if_due();
            self.delete_snapshots();
            self.resize();
            self.collect_garbage(now);
            self.poll_manifest(now);
        }
        self.report(now);
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Tick => self.arm_tick(),
            Event::Built { group, chunks } => self.built(group, chunks),
            Event::Uploaded { group, ok } => {
                self.uploading -= 1;
                if let Some(g) = self.groups.iter_mut().find(|g| g.number == group)
                    && ok
                {
                    g.left -= 1;
                }
            }
            Event::Superblock { sb, result } => {
                match result {
                    Ok(()) => self.packed_durable = sb.current.packed_through,
                    Err(e) => self.volume.log.fail(format!("the log's superblock cannot be written: {e}")),
                }
                self.superblock = Some(sb);
            }
            Event::Published { published, done, replies } => self.publish_done(published, done, replies),
            Event::Polled(result) => self.polled(result),
            Event::Looked(look) => self.barrier_looked(look),
            Event::Answered => {}
            Event::Resized { published, sb, result, reply } => self.resized(published, sb, result, reply),
            Event::Grown { slot, result } => self.grown(slot, result),
            Event::Confirmed(Ok(holding)) => {
                no_trouble(&self.volume);
                self.take_up(*holding);
            }
            Event::Confirmed(Err(e)) => self.fenced(&e),
            Event::Gc(done) => self.garbage_done(done),
        }
    }

    /// How full the log is, 0 to 1. Where the disk has no room to grow, what there is counts as the whole.
    fn fill(&self, now: Duration) -> f64 {
        let s = self.volume.log.status();
        let room = if now < self.no_growth_until { s.ready_bytes } else { s.capacity_bytes };
        let bytes = s.used_bytes as f64 / room.max(1) as f64;
        bytes.max(s.entries as f64 / MAX_ENTRIES as f64)
    }

    fn spawn(&self, f: impl Future<Output = Event> + 'static) {
        self.tasks.push(Box::pin(f));
    }

    fn arm_tick(&self) {
        let busy = !self.groups.is_empty()
            || self.held
            || self.gc.is_active(self.timer.now())
            || self.flatten.is_active()
            || self.volume.log.passed_seq() > self.applied_seq
            || self.detach.is_some();
        let (timer, volume) = (self.timer.clone(), self.volume.clone());
        self.spawn(async move {
            if busy {
                timer.sleep(BUSY_TICK).await;
            } else {
                let heard = std::pin::pin!(volume.log.news());
                let slept = std::pin::pin!(timer.sleep(IDLE_TICK));
                futures_util::future::select(heard, slept).await;
            }
            Event::Tick
        });
    }

    fn fenced(&mut self, e: &Error) {
        tracing::error!("{e}: no write is acknowledged any more, and nothing is uploaded");
        self.volume.set_gone(e.to_string());
        // Whoever waits for room in the log, for the frontier or for a sync must not wait for ever.
        self.volume.log.fail(e.to_string());
    }

    fn report(&mut self, now: Duration) {
        let oldest = self.cut_groups().next().map(|g| g.since).or(self.uncut_since);
        let drain = self.drain_rate(now);
        let silent = self.volume.store_silence().is_some();
        // While the manifest is being changed nobody knows what it says.
        let snapshots = self.published.as_ref().map(|p| p.manifest.snapshots.len() as u64);
        let trouble_since = &mut self.trouble_since;
        self.volume.update_background(|s| {
            *trouble_since = (silent || s.store_trouble.is_some()).then(|| trouble_since.unwrap_or(now));
            s.store_trouble_secs = trouble_since.map(|t| now.saturating_sub(t).as_secs_f64());
            s.groups = self.applied.0;
            s.checkpoint_group = self.checkpoint_group.0;
            s.snapshots = snapshots.unwrap_or(s.snapshots);
            s.oldest_pending_secs = oldest.map(|t| now.saturating_sub(t).as_secs_f64());
            s.upload_bytes_per_sec = drain;
        });
    }
}
