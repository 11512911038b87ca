//! What an attached volume tells of itself: the source of `status` and of the metrics. What is added later has a default, so that
//! the answer of an older daemon is read.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::counts::Requests;
use crate::cache::CacheStatus;
use crate::config::FlushTo;
use crate::store::metrics::Snapshot;
use crate::wal::log::LogStatus;

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
    /// Snapshots that the volume has.
    #[serde(default)]
    pub snapshots: u64,
    /// Seconds for which the oldest entry has been waiting to be uploaded.
    pub oldest_pending_secs: Option<f64>,
    /// Bytes per second that the uploads have lately reached.
    pub upload_bytes_per_sec: Option<f64>,
    /// What is wrong with the store, while it is.
    pub store_trouble: Option<String>,
    /// For how many seconds it has been so.
    #[serde(default)]
    pub store_trouble_secs: Option<f64>,
    /// What the volume takes in the store; absent until somebody has looked.
    #[serde(default)]
    pub space: Option<SpaceStatus>,
    /// What is still to be copied of its parents, in bytes; absent while it is not being flattened.
    #[serde(default)]
    pub flatten_left_bytes: Option<u64>,
}

/// What a volume's chunks take in the store as of its last checkpoint, and what garbage collection has done since the attach.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpaceStatus {
    /// The volume's size then.
    #[serde(default)]
    pub logical_bytes: u64,
    /// What of it has content.
    #[serde(default)]
    pub mapped_bytes: u64,
    /// What of that is in chunks of the volumes that this one was cloned from.
    #[serde(default)]
    pub shared_bytes: u64,
    /// All chunks of the volume's own, in bytes.
    pub stored_bytes: u64,
    /// What the map names of them.
    pub live_bytes: u64,
    /// What is kept for snapshots: what does not live of the chunks that they name, garbage among it.
    pub snapshot_bytes: u64,
    /// What nothing names, and what is lost to chunks that are not full.
    pub garbage_bytes: u64,
    /// Bytes that garbage collection has read from the store.
    pub gc_read_bytes: u64,
    /// Bytes of chunks that it has written.
    pub gc_written_bytes: u64,
    /// Objects that it has deleted.
    pub gc_deleted_objects: u64,
    /// Those of them that were chunks.
    #[serde(default)]
    pub gc_deleted_chunks: u64,
    /// What it has asked of the store, not counting what was tried again.
    #[serde(default)]
    pub gc_requests: u64,
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
    /// How far flushes go.
    #[serde(default)]
    pub flush: FlushTo,
    /// Whether the store has been asked since the volume was taken up: before, only the log is served.
    #[serde(default)]
    pub confirmed: bool,
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
    /// Requests that failed because they would have waited too long.
    #[serde(default)]
    pub timeouts: u64,
    /// Why the log or the volume has failed.
    pub failure: Option<String>,
    /// The background.
    pub background: BackgroundStatus,
    /// What lanes have answered since the attach.
    #[serde(default)]
    pub requests: Requests,
    /// What has gone through the store since the attach, tries that failed included.
    #[serde(default)]
    pub store_requests: Snapshot,
    /// The local cache; absent without one.
    #[serde(default)]
    pub cache: Option<CacheStatus>,
}
