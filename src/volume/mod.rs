//! The volume: reads, writes, flushes and discards over the log, the maps and the store.
//!
//! - [`engine`]: what a frontend asks of a volume.
//! - [`lane`]: the requests, on one lane.
//! - [`attach`]: taking an epoch, finding the state in log and store.
//! - `images`: the last checkpoint, read back.
//! - `start`: the log made ready after replay.
//! - `salvage`: a damaged log, ended before its damage.
//! - [`recover`]: what the store holds beyond its last checkpoint.
//! - [`background`]: packing, uploading, checkpoints, syncs, growth: one task on a store thread.
//! - [`host`]: the threads of an attached volume.
//! - [`admin`]: volumes that nobody attaches: create, list, info, delete.
//! - [`rebuild`]: map and manifest made anew from the chunks.
//! - [`verify`]: everything that a volume has in the store, read and checked; [`damage`]: what that tells.
//!
//! Invariants:
//! - The maps are at every moment the state of the log's completed prefix over the applied groups.
//! - Once a volume is *gone* (detached, or another host has taken it) no request is acknowledged again.

pub mod admin;
pub mod attach;
pub mod background;
pub mod damage;
pub mod engine;
pub mod host;
mod images;
pub mod lane;
pub mod rebuild;
pub mod recover;
mod salvage;
mod start;
pub mod throttle;
pub mod verify;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use futures_util::future::{Either, select};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use uuid::Uuid;

use crate::chunk::reader::Blocks;
use crate::disk::file::DataFile;
use crate::error::{Error, ErrorKind, Result};
use crate::map::{Location, Maps};
use crate::store::metrics::{Metrics, Snapshot};
use crate::units::{BlockNo, SECTOR};
use crate::wal::log::{Log, LogStatus};
use engine::IoFault;
use throttle::Throttle;

/// A lane's wish for blocks of a chunk.
#[derive(Debug)]
pub struct ReadRequest {
    /// Where they are.
    pub at: Location,
    /// The volume's block that the first one is.
    pub first: BlockNo,
    /// How many.
    pub blocks: u16,
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
    /// Upload everything that is complete now.
    Drain(oneshot::Sender<Result<()>>),
}

/// What the background tells about itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct BackgroundStatus {
    /// The epoch of this attachment.
    pub epoch: u64,
    /// Whether the store was seen to honour conditional writes.
    pub conditional_writes: bool,
    /// Groups of chunks in the store and in the map.
    pub groups: u64,
    /// The last group that a published checkpoint holds.
    pub checkpoint_group: u64,
    /// Seconds for which the oldest entry has been waiting to be uploaded.
    pub oldest_pending_secs: Option<f64>,
    /// Bytes per second that the uploads have lately reached.
    pub upload_bytes_per_sec: Option<f64>,
    /// What is wrong with the store, while it is.
    pub store_trouble: Option<String>,
}

/// An attached volume, as people see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Logical block size in bytes.
    pub logical_block: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// The store.
    pub store_url: String,
    /// The log.
    pub log: LogStatus,
    /// Where the log is.
    pub log_path: String,
    /// Blocks of 4096 bytes that the base maps.
    pub mapped_blocks: u64,
    /// Memory of the maps in bytes.
    pub map_bytes: u64,
    /// The rate to which writes are slowed, in bytes per second.
    pub write_limit: Option<u64>,
    /// Why the log or the volume has failed.
    pub failure: Option<String>,
    /// The background.
    pub background: BackgroundStatus,
    /// What has gone through the store since the attach, tries that failed included.
    #[serde(default)]
    pub store_requests: Snapshot,
}

/// See the module's page.
pub struct Volume {
    name: String,
    uuid: Uuid,
    size_bytes: u64,
    logical_block: u32,
    read_only: bool,
    store_url: String,
    pub(crate) log: Arc<Log>,
    log_file: Arc<DataFile>,
    pub(crate) maps: Arc<Maps>,
    pub(crate) throttle: Throttle,
    reads: mpsc::Sender<ReadRequest>,
    commands: mpsc::Sender<Command>,
    is_gone: AtomicBool,
    gone: watch::Sender<bool>,
    gone_reason: OnceLock<String>,
    background: Mutex<BackgroundStatus>,
    /// Those of each store thread's client.
    store_metrics: Mutex<Vec<Arc<Metrics>>>,
}

impl Volume {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
    /// Size in bytes.
    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
    /// Size in sectors.
    #[must_use]
    pub const fn sectors(&self) -> u64 {
        self.size_bytes / SECTOR as u64
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

    /// Blocks of a chunk, by way of the store threads.
    async fn read_chunk(&self, at: Location, first: BlockNo, blocks: u16) -> Result<Blocks, IoFault> {
        let (reply, answer) = oneshot::channel();
        let request = ReadRequest { at, first, blocks, reply };
        if self.reads.send(request).await.is_err() {
            return Err(IoFault::Gone);
        }
        let answer = match select(answer, std::pin::pin!(self.until_gone())).await {
            Either::Left((answer, _)) => answer,
            // The store may never answer; the request is over all the same.
            Either::Right(_) => return Err(IoFault::Gone),
        };
        match answer {
            Ok(Ok(blocks)) => Ok(blocks),
            Ok(Err(e)) => {
                tracing::error!("reading block {first} of volume {} from the store failed: {e}", self.name);
                Err(IoFault::Io)
            }
            Err(_) => Err(IoFault::Gone),
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

    pub(crate) fn update_background(&self, change: impl FnOnce(&mut BackgroundStatus)) {
        change(&mut self.background.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Has what a client of the store counts added to the status.
    pub(crate) fn count_store(&self, metrics: Arc<Metrics>) {
        self.store_metrics.lock().unwrap_or_else(PoisonError::into_inner).push(metrics);
    }

    fn store_counts(&self) -> Snapshot {
        let all = self.store_metrics.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().map(|m| m.snapshot()).fold(Snapshot::default(), Snapshot::plus)
    }

    /// The present state.
    #[must_use]
    pub fn status(&self) -> VolumeStatus {
        let maps = self.maps.stats();
        VolumeStatus {
            name: self.name.clone(),
            uuid: self.uuid,
            size_bytes: self.size_bytes,
            logical_block: self.logical_block,
            read_only: self.read_only,
            store_url: self.store_url.clone(),
            log: self.log.status(),
            log_path: self.log_file.path().display().to_string(),
            mapped_blocks: maps.mapped_blocks,
            map_bytes: maps.base_bytes + maps.overlay_bytes,
            write_limit: self.throttle.limit(),
            failure: self.gone_reason.get().cloned().or_else(|| self.log.failure().map(str::to_owned)),
            background: self.background.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            store_requests: self.store_counts(),
        }
    }
}
