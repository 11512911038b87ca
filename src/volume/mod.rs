//! The volume: reads, writes, flushes and discards over the log, the maps and the store.
//!
//! - [`engine`]: what a frontend asks of a volume.
//! - [`lane`]: the requests, on one lane.
//! - [`attach`]: finding the state in log and store, and all that serves it.
//! - [`take`]: taking the next epoch.
//! - [`resume`]: going on from the log alone, until the store has been asked.
//! - `start`: the log made ready after replay.
//! - `salvage`: a damaged log, ended before its damage.
//! - [`recover`]: what the store holds beyond its last checkpoint.
//! - [`reads`]: what lanes read of chunks, and what fills the cache.
//! - [`background`]: packing, uploading, checkpoints, syncs, growth: one task on a store thread.
//! - [`host`]: the threads of an attached volume; [`counts`]: what its lanes count; `status`: what is told of it.
//! - [`admin`]: volumes that nobody attaches: create, list, info, delete.
//! - [`resize`]: a volume made larger or smaller.
//! - [`snapshots`]: snapshots and clones; `fixed`: a snapshot that is served.
//! - `boot`: what a boot reads first, kept beside its snapshot and fetched ahead by later ones.
//! - [`rebuild`]: map and manifest made anew from the chunks.
//! - [`import`]: a new volume from an image; [`export`]: a volume, or any base map, written to one.
//! - [`diff`]: what has changed between two snapshots; [`increment`]: that alone, written to an image.
//! - [`verify`]: everything that a volume has in the store, read and checked; [`damage`]: what that tells.
//!
//! Invariants:
//! - The maps are at every moment the state of the log's completed prefix over the applied groups.
//! - Once a volume is *gone* (detached, or another host has taken it) no request is acknowledged again.
//! - Until it is *confirmed* its base is not known: what the overlay alone cannot answer waits, and nothing is packed.

pub mod admin;
pub mod attach;
pub mod background;
mod boot;
pub mod counts;
pub mod damage;
pub mod diff;
pub mod engine;
pub mod export;
mod fixed;
pub mod host;
pub mod import;
pub mod increment;
pub mod lane;
mod log_device;
pub mod reads;
pub mod rebuild;
pub mod recover;
pub mod resize;
pub mod resume;
mod salvage;
pub mod snapshots;
mod stale;
mod start;
mod status;
pub mod take;
pub mod throttle;
pub mod verify;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use futures_util::future::{Either, select};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use uuid::Uuid;

use crate::cache::Cache;
use crate::chunk::pack::BuiltChunk;
use crate::chunk::reader::Blocks;
use crate::config::FlushTo;
use crate::disk::file::DataFile;
use crate::error::{Error, ErrorKind, Result};
use crate::gc::Policy;
use crate::map::{Location, Maps};
use crate::store::metrics::{Metrics, Snapshot};
use crate::units::{BlockNo, SECTOR};
use crate::wal::log::Log;
use boot::Boot;
use counts::{LaneCounter, LaneCounts};
use engine::IoFault;
use throttle::Throttle;

pub use status::{BackgroundStatus, SpaceStatus, VolumeStatus};

/// Lanes' reads of chunks that may wait in the channel.
const READ_QUEUE: usize = 1024;
/// Commands that may wait for the background.
const COMMAND_QUEUE: usize = 16;
/// Chunks just packed that may wait for the cache, each with its memory.
pub(crate) const PACKED_QUEUE: usize = 4;

/// What is asked of the thread that reads chunks and fills the cache.
#[derive(Debug)]
pub enum ReadRequest {
    /// A lane's wish for blocks of a chunk.
    Blocks {
        /// Where they are.
        at: Location,
        /// How many.
        blocks: u16,
        /// Who waits for them; nobody when they are fetched ahead, for the cache.
        waiting: Option<Waiting>,
    },
    /// A chunk that was just packed is in memory: the cache may have it without a read.
    Packed(BuiltChunk, OwnedSemaphorePermit),
}

/// Who waits for blocks.
#[derive(Debug)]
pub struct Waiting {
    /// The volume's block that the first one is.
    pub first: BlockNo,
    /// The answer.
    pub reply: oneshot::Sender<Result<Blocks>>,
}

/// What the control plane asks of the background.
#[derive(Debug)]
pub enum Command {
    /// Upload everything, checkpoint, release the epoch; then the background ends.
    Detach(oneshot::Sender<Result<()>>),
    /// End at once and leave everything as a dead process would: in the log.
    Abandon,
    /// Upload everything that is complete now. Answered when it is in the store, and the manifest, looked at after that, still names
    /// this attachment: whoever attaches the volume next finds it, wherever that is.
    Barrier(oneshot::Sender<Result<()>>),
    /// Upload everything that is complete now. That says nothing of whose the volume is then: a barrier does.
    Upload(oneshot::Sender<Result<()>>),
    /// Make everything that is complete now survive power loss here.
    Sync(oneshot::Sender<Result<()>>),
    /// Keep the volume as it is now, or a little later, under a name: every write that has completed is in it. Answered when it is in
    /// the store.
    Snapshot {
        /// Its name.
        name: String,
        /// The time, in seconds since 1970.
        created: u64,
        /// The answer.
        reply: oneshot::Sender<Result<()>>,
    },
    /// Make the volume larger.
    Grow {
        /// Its size in bytes from then on.
        size_bytes: u64,
        /// The answer.
        reply: oneshot::Sender<Result<()>>,
    },
    /// Bring back the space of all that was overwritten or discarded. Answered when there is none left.
    CollectGarbage(oneshot::Sender<Result<()>>),
    /// Keep what was read first, since the attach, as the boot trace of the snapshot that the volume began from.
    KeepTrace {
        /// That snapshot's volume.
        volume: String,
        /// Its name.
        snapshot: String,
        /// The answer.
        reply: oneshot::Sender<Result<()>>,
    },
    /// Copy all that a clone needs of its parents, and cut the tie. Answered when they may be deleted.
    Flatten(oneshot::Sender<Result<()>>),
    /// Delete a snapshot, unless a clone needs it.
    DeleteSnapshot {
        /// Its name.
        name: String,
        /// The answer.
        reply: oneshot::Sender<Result<()>>,
    },
}

/// See the module's page.
pub struct Volume {
    name: String,
    uuid: Uuid,
    /// Only grows.
    size_bytes: AtomicU64,
    logical_block: u32,
    read_only: bool,
    pub(crate) gc: Policy,
    store_url: String,
    pub(crate) log: Arc<Log>,
    log_file: Arc<DataFile>,
    pub(crate) maps: Arc<Maps>,
    pub(crate) throttle: Throttle,
    reads: mpsc::Sender<ReadRequest>,
    /// Room for chunks in `reads`.
    packed: Arc<Semaphore>,
    commands: mpsc::Sender<Command>,
    confirmed: watch::Sender<bool>,
    is_confirmed: AtomicBool,
    flush_to: FlushTo,
    /// How long a request may wait for the store.
    io_timeout: Option<Duration>,
    timeouts: AtomicU64,
    is_gone: AtomicBool,
    gone: watch::Sender<bool>,
    gone_reason: OnceLock<String>,
    background: Mutex<BackgroundStatus>,
    counts: LaneCounts,
    /// Those of each store thread's client.
    store_metrics: Mutex<Vec<Arc<Metrics>>>,
    cache: OnceLock<Arc<Cache>>,
    boot: OnceLock<Boot>,
}

/// What a volume is made of.
pub(crate) struct Parts {
    pub name: String,
    pub uuid: Uuid,
    pub size_bytes: u64,
    pub logical_block: u32,
    pub read_only: bool,
    pub flush_to: FlushTo,
    pub io_timeout: Option<Duration>,
    pub gc: Policy,
    pub store_url: String,
    pub log: Log,
    pub log_file: Arc<DataFile>,
    pub maps: Arc<Maps>,
}

impl Volume {
    /// A volume that is not confirmed yet, and where its lanes' reads and its commands arrive.
    pub(crate) fn new(p: Parts) -> (Arc<Self>, mpsc::Receiver<ReadRequest>, mpsc::Receiver<Command>) {
        let (reads, reads_out) = mpsc::channel(READ_QUEUE);
        let (commands, commands_out) = mpsc::channel(COMMAND_QUEUE);
        let Parts {
            name,
            uuid,
            size_bytes,
            logical_block,
            read_only,
            flush_to,
            io_timeout,
            gc,
            store_url,
            log,
            log_file,
            maps,
        } = p;
        let volume = Self {
            name,
            uuid,
            size_bytes: size_bytes.into(),
            logical_block,
            read_only,
            gc,
            store_url,
            log: Arc::new(log),
            log_file,
            maps,
            throttle: Throttle::default(),
            reads,
            packed: Arc::new(Semaphore::new(PACKED_QUEUE)),
            commands,
            confirmed: watch::Sender::new(false),
            is_confirmed: false.into(),
            flush_to,
            io_timeout,
            timeouts: AtomicU64::new(0),
            is_gone: false.into(),
            gone: watch::Sender::new(false),
            gone_reason: OnceLock::new(),
            background: Mutex::default(),
            counts: LaneCounts::default(),
            store_metrics: Mutex::default(),
            cache: OnceLock::new(),
            boot: OnceLock::new(),
        };
        (Arc::new(volume), reads_out, commands_out)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
    /// Size in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }
    /// Size in sectors.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.size_bytes() / SECTOR as u64
    }

    /// Serves more from now on. The maps come first: a request to what is new finds them ready.
    pub(crate) fn grow(&self, size_bytes: u64) {
        self.maps.grow(size_bytes / SECTOR as u64);
        self.size_bytes.store(size_bytes, Ordering::Release);
    }
    /// Logical block size in bytes.
    #[must_use]
    pub const fn logical_block(&self) -> u32 {
        self.logical_block
    }
    /// Whether writes are refused.
    #[must_use]
    pub const fn read_only(&self) -> bool {
        self.read_only
    }
    /// The log's file: lanes dup it.
    #[must_use]
    pub const fn log_file(&self) -> &Arc<DataFile> {
        &self.log_file
    }

    /// Its cache, if it has one: lanes dup the file.
    #[must_use]
    pub fn cache(&self) -> Option<&Arc<Cache>> {
        self.cache.get()
    }

    /// Gives it a cache: once, before the first lane.
    pub(crate) fn set_cache(&self, cache: Arc<Cache>) {
        let _ = self.cache.set(cache);
    }

    /// Whether the base is known.
    #[must_use]
    pub fn is_confirmed(&self) -> bool {
        self.is_confirmed.load(Ordering::Acquire)
    }

    /// The base is in the maps.
    pub(crate) fn set_confirmed(&self) {
        self.is_confirmed.store(true, Ordering::Release);
        self.confirmed.send_replace(true);
    }

    /// A request has waited longer than it may.
    fn count_timeout(&self) {
        if self.timeouts.fetch_add(1, Ordering::Relaxed) == 0 {
            let limit = self.io_timeout.unwrap_or_default().as_secs_f64();
            tracing::warn!("a request of volume {} has waited for {limit} s and failed (--io-timeout)", self.name);
        }
    }

    /// Waits until the base is known.
    async fn until_confirmed(&self) -> Result<(), IoFault> {
        // The senders are ours, so no channel can close before.
        let mut confirmed = self.confirmed.subscribe();
        let known = std::pin::pin!(confirmed.wait_for(|c| *c));
        match select(known, std::pin::pin!(self.until_gone())).await {
            Either::Left(_) => Ok(()),
            Either::Right(_) => Err(IoFault::Gone),
        }
    }

    /// Whether it is detached or lost.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::Acquire)
    }

    /// From now on no request is acknowledged.
    pub fn set_gone(&self, reason: impl Into<String>) {
        let _ = self.gone_reason.set(reason.into());
        self.is_gone.store(true, Ordering::Release);
        self.gone.send_replace(true);
    }

    /// Waits until it is detached or lost.
    pub async fn until_gone(&self) {
        // The sender is ours, so the channel cannot close before.
        let _ = self.gone.subscribe().wait_for(|gone| *gone).await;
    }

    /// Blocks of a chunk, by way of the store threads; `None` when the chunk is not there (any more).
    async fn read_chunk(&self, at: Location, first: BlockNo, blocks: u16) -> Result<Option<Blocks>, IoFault> {
        let (reply, answer) = oneshot::channel();
        let request = ReadRequest::Blocks { at, blocks, waiting: Some(Waiting { first, reply }) };
        if self.reads.send(request).await.is_err() {
            return Err(IoFault::Gone);
        }
        let answer = match select(answer, std::pin::pin!(self.until_gone())).await {
            Either::Left((answer, _)) => answer,
            // The store may never answer; the request is over all the same.
            Either::Right(_) => return Err(IoFault::Gone),
        };
        match answer {
            Ok(Ok(blocks)) => Ok(Some(blocks)),
            Ok(Err(e)) if e.kind() == ErrorKind::NotFound => {
                tracing::debug!("reading block {first} of volume {}: {e}", self.name);
                Ok(None)
            }
            Ok(Err(e)) => {
                tracing::error!("reading block {first} of volume {} from the store failed: {e}", self.name);
                Err(IoFault::Io)
            }
            Err(_) => Err(IoFault::Gone),
        }
    }

    /// Waits until the store has everything that has completed, and is seen to be this attachment's still.
    async fn barrier(&self) -> Result<(), IoFault> {
        let done = std::pin::pin!(self.command(Command::Barrier));
        match select(done, std::pin::pin!(self.until_gone())).await {
            Either::Left((Ok(()), _)) => Ok(()),
            // A barrier waits for as long as it takes, so that it fails only with the volume.
            Either::Left((Err(_), _)) | Either::Right(_) => Err(IoFault::Gone),
        }
    }

    /// Has blocks of a chunk fetched for the cache, unless so much is asked for already that somebody might have to wait.
    fn fetch_ahead(&self, at: Location, blocks: u16) {
        if self.reads.capacity() > READ_QUEUE / 2 {
            // Full or closed: then not.
            let _ = self.reads.try_send(ReadRequest::Blocks { at, blocks, waiting: None });
        }
    }

    /// Offers the cache a chunk that was just packed. Best effort: of those that come faster than its disk takes them some are left out.
    pub(crate) fn offer_packed(&self, chunk: &BuiltChunk) {
        if let Ok(turn) = Arc::clone(&self.packed).try_acquire_owned() {
            let _ = self.reads.try_send(ReadRequest::Packed(chunk.clone(), turn));
        }
    }

    /// Asks the background for something and waits for its answer.
    ///
    /// # Errors
    /// The answer's; `Internal` when the background has ended.
    pub async fn command(&self, make: impl FnOnce(oneshot::Sender<Result<()>>) -> Command) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        let ended = || Error::new(ErrorKind::Internal, format!("the background of volume {} has ended", self.name));
        self.commands.send(make(reply)).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?
    }

    /// Orders something of the background, from a thread that runs no tasks; the answer comes later.
    ///
    /// # Errors
    /// `Internal` when the background has ended.
    pub fn ask(
        &self,
        make: impl FnOnce(oneshot::Sender<Result<()>>) -> Command,
    ) -> Result<oneshot::Receiver<Result<()>>> {
        let (reply, answer) = oneshot::channel();
        let ended = |_| Error::new(ErrorKind::Internal, format!("the background of volume {} has ended", self.name));
        self.commands.blocking_send(make(reply)).map_err(ended)?;
        Ok(answer)
    }

    pub(crate) fn update_background(&self, change: impl FnOnce(&mut BackgroundStatus)) {
        change(&mut self.background.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Where a new lane counts.
    fn counter(&self) -> LaneCounter {
        self.counts.lane()
    }

    /// Has what a client of the store counts added to the status.
    pub(crate) fn count_store(&self, metrics: Arc<Metrics>) {
        self.store_metrics.lock().unwrap_or_else(PoisonError::into_inner).push(metrics);
    }

    /// Why the store does not answer, while it does not.
    pub(crate) fn store_silence(&self) -> Option<String> {
        self.store_metrics.lock().unwrap_or_else(PoisonError::into_inner).iter().find_map(|m| m.silence())
    }

    fn store_counts(&self) -> Snapshot {
        let all = self.store_metrics.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().map(|m| m.snapshot()).fold(Snapshot::default(), Snapshot::plus)
    }

    /// The present state.
    #[must_use]
    pub fn status(&self) -> VolumeStatus {
        let maps = self.maps.stats();
        let mut background = self.background.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // What is tried again has not failed yet, and may not for an hour.
        background.store_trouble = background.store_trouble.or_else(|| self.store_silence());
        if background.store_trouble.is_none() {
            background.store_trouble_secs = None;
        }
        VolumeStatus {
            name: self.name.clone(),
            uuid: self.uuid,
            size_bytes: self.size_bytes(),
            logical_block: self.logical_block,
            read_only: self.read_only,
            flush: self.flush_to,
            confirmed: self.is_confirmed(),
            store_url: self.store_url.clone(),
            log: self.log.status(),
            log_path: self.log_file.path().display().to_string(),
            mapped_blocks: maps.mapped_blocks,
            map_bytes: maps.base_bytes + maps.overlay_bytes,
            write_limit: self.throttle.limit(),
            timeouts: self.timeouts.load(Ordering::Relaxed),
            failure: self.gone_reason.get().cloned().or_else(|| self.log.failure().map(str::to_owned)),
            background,
            requests: self.counts.sum(),
            store_requests: self.store_counts(),
            cache: self.cache().map(|c| c.status()),
        }
    }
}
