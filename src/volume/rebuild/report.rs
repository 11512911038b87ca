//! What a rebuild tells.

use std::fmt;

use serde::Serialize;
use uuid::Uuid;

use crate::units::ChunkNo;

/// An object that the volume should have and that cannot be used, with what is known of its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Lost {
    /// The object.
    pub key: String,
    /// Its chunk number.
    pub chunk: ChunkNo,
    /// What is wrong with it.
    pub why: String,
    /// The group it is of.
    pub group: Option<u64>,
    /// The first and the last entry of that group.
    pub entries: Option<(u64, u64)>,
    /// The sectors among which its own are: from the first, before the second.
    pub sectors: Option<(u64, u64)>,
}

impl Lost {
    pub(super) const fn new(key: String, chunk: ChunkNo, why: String) -> Self {
        Self { key, chunk, why, group: None, entries: None, sectors: None }
    }

    pub(super) fn missing(key: String, chunk: ChunkNo) -> Self {
        Self::new(key, chunk, "it is not in the store".to_owned())
    }
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (", self.key)?;
        match self.group {
            Some(group) => write!(f, "group {group}")?,
            None => write!(f, "of an unknown group")?,
        }
        if let Some((first, last)) = self.entries {
            write!(f, ", entries {first} to {last}")?;
        }
        match self.sectors {
            Some((first, end)) => write!(f, ", somewhere in sectors {first} to {}", end.saturating_sub(1))?,
            None => write!(f, ", sectors not known")?,
        }
        write!(f, "): {}", self.why)
    }
}

/// What was found of the manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ManifestState {
    /// It is good: its history says what counts.
    Good,
    /// It can be read, and is older than the volume: what came after it was inferred from the chunks.
    Old,
    /// It cannot be read: history was inferred from the chunks.
    Damaged,
    /// It is not there: history was inferred from the chunks.
    Missing,
}

/// What became of the checkpoint that the manifest names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MapFrom {
    /// It is good, and what came after it was added.
    Checkpoint,
    /// It is damaged, or there is no manifest: the map is that of the copy that garbage collection keeps, and what came after it was
    /// added.
    Copy,
    /// The map was made from the first chunk on.
    Chunks,
}

/// What becomes of the write-ahead log on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFate {
    /// There is none where it was looked for.
    None,
    /// The next attach on this host replays it up to this entry.
    Replayed(u64),
    /// It holds nothing that the store does not have.
    Packed,
    /// It is not of the newest attachment, or what it continues is lost: the next attach sets it aside. This is why.
    SetAside(String),
}

/// See the module's page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The volume.
    pub volume: String,
    /// The store.
    pub store: String,
    /// Nothing was written.
    pub dry_run: bool,
    /// The volume's identity.
    pub uuid: Uuid,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its logical block size in bytes.
    pub logical_block: u32,
    /// What was found of the manifest.
    pub manifest: ManifestState,
    /// What the map was made from.
    pub map_from: MapFrom,
    /// The key under which a damaged or an old manifest is kept.
    pub kept_as: Option<String>,
    /// The manifest's epoch from now on.
    pub epoch: u64,
    /// Chunks whose content was brought into the map.
    pub chunks: u64,
    /// Chunks that do not count.
    pub chunks_ignored: u64,
    /// The last group.
    pub group: u64,
    /// The last entry.
    pub through: u64,
    /// Blocks of 4096 bytes that are mapped.
    pub mapped_blocks: u64,
    /// Groups that were in the store and are given up, at least.
    pub groups_given_up: u64,
    /// Objects that cannot be used.
    pub lost: Vec<Lost>,
    /// The log of this host.
    pub log: LogFate,
    /// What is good to know.
    pub notes: Vec<String>,
}
