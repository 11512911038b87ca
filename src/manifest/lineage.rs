//! Snapshots, and whose chunks a map names.
//!
//! A map names chunks by *source*: 0 is the volume itself, `n` its parent `n - 1` ([`Manifest::parents`]). A clone has the volume that it
//! was made from as its first parent, followed by that one's parents; so source `k` of a volume is source `k + 1` of its clone, and what a
//! volume at source `s` wrote with sources of its own is read with `s` added to each ([`Image::source`]).
//!
//! Invariants:
//! - Parents keep their places for as long as the volume lives: maps of snapshots name them by number.
//! - A snapshot's checkpoint never changes, and nothing that it names is deleted while the entry is there.
//! - A volume refers to the snapshot it was cloned from by an object in that one's folder ([`ref_key`]), for as long as its own map or one
//!   of its snapshots names any parent. The parent's own ref does the same for the parent's parent: so one ref is enough.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Checkpoint, EpochEntry, Image, Manifest, NO_ATTACHMENT, check_name, check_size, epoch_of_part, prefix};
use crate::error::{Error, ErrorKind, Result};
use crate::map::MAX_SOURCE;
use crate::units::{ChunkNo, GroupNo, Seq};

/// The volume as it was at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// Its name, unique in the volume.
    pub name: String,
    /// Its identity: a later snapshot of the same name has another.
    pub id: Uuid,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// Size of the volume then, in bytes.
    pub size_bytes: u64,
    /// The map; absent when nothing had been written.
    pub checkpoint: Option<Checkpoint>,
    /// Somebody is deleting it, under this mark: it may not be cloned any more.
    #[serde(default)]
    pub deleting: Option<Uuid>,
}

/// A volume that this one's map may name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parent {
    /// Its name: the folder.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// The snapshot of it that was cloned, and that snapshot's name.
    pub snapshot: Uuid,
    /// See `snapshot`.
    pub snapshot_name: String,
    /// Who wrote its chunks, as of then.
    pub history: Vec<EpochEntry>,
    /// The map that the clone began with, of the first parent alone: for a rebuild.
    pub checkpoint: Option<Checkpoint>,
}

/// Where a source's objects are.
#[derive(Debug, Clone, Copy)]
pub struct SourceOf<'a> {
    /// The volume's name.
    pub name: &'a str,
    /// Its identity.
    pub uuid: Uuid,
    /// Who wrote its chunks.
    pub history: &'a [EpochEntry],
}

impl SourceOf<'_> {
    /// The prefix of its keys.
    #[must_use]
    pub fn prefix(&self) -> String {
        prefix(self.name)
    }
}

impl Manifest {
    /// A source of the volume's map; `None` when there is none of this number.
    #[must_use]
    pub fn source(&self, source: u8) -> Option<SourceOf<'_>> {
        if source == 0 {
            return Some(SourceOf { name: &self.name, uuid: self.uuid, history: &self.history });
        }
        self.parents.get(usize::from(source) - 1).map(|p| SourceOf { name: &p.name, uuid: p.uuid, history: &p.history })
    }

    /// All sources, in order; the volume itself is the first.
    pub fn sources(&self) -> impl Iterator<Item = SourceOf<'_>> {
        (0..=self.parents.len()).filter_map(|s| self.source(s as u8))
    }

    /// A snapshot by its name.
    ///
    /// # Errors
    /// `NotFound`, with the names that there are.
    pub fn snapshot(&self, name: &str) -> Result<&Snapshot> {
        self.snapshots.iter().find(|s| s.name == name).ok_or_else(|| {
            let there: Vec<&str> = self.snapshots.iter().map(|s| s.name.as_str()).collect();
            let has = if there.is_empty() { "it has none".to_owned() } else { format!("it has {}", there.join(", ")) };
            Error::new(ErrorKind::NotFound, format!("volume {:?} has no snapshot {name:?}: {has}", self.name))
        })
    }

    /// Every checkpoint that the manifest names: its own, and those of its snapshots.
    pub fn checkpoints(&self) -> impl Iterator<Item = &Checkpoint> {
        self.checkpoint.iter().chain(self.snapshots.iter().filter_map(|s| s.checkpoint.as_ref()))
    }

    /// Whether it may take a snapshot of this name.
    ///
    /// # Errors
    /// `Usage` for a name that cannot be, `Exists`.
    pub fn may_snapshot(&self, name: &str) -> Result<()> {
        check_name(name).map_err(|e| e.context("a snapshot's name is made like a volume's"))?;
        if self.snapshots.iter().any(|s| s.name == name) {
            return Err(Error::new(
                ErrorKind::Exists,
                format!(
                    "volume {:?} has a snapshot {name:?} already: delete it first, or choose another name",
                    self.name
                ),
            ));
        }
        Ok(())
    }

    /// The volume as of `snapshot`, as a manifest that nobody publishes: for those who only read.
    #[must_use]
    pub fn at_snapshot(&self, snapshot: &Snapshot) -> Self {
        Self {
            size_bytes: snapshot.size_bytes,
            checkpoint: snapshot.checkpoint.clone(),
            writer: None,
            snapshots: Vec::new(),
            ..self.clone()
        }
    }

    /// Whether the volume went on from before its checkpoint, as after a rebuild that gave chunks up: an attachment that came after the
    /// checkpoint owns numbers that are in it. They name other objects then. (Of a map that no attachment wrote this cannot be told.)
    #[must_use]
    pub(crate) fn was_rewound(&self) -> bool {
        let Some(c) = &self.checkpoint else { return false };
        let own = c.images().filter(|i| i.source == 0);
        let written = own.flat_map(|i| &i.parts).filter_map(|p| epoch_of_part(&p.key)).max();
        let Some(written) = written.filter(|e| *e != NO_ATTACHMENT) else { return false };
        self.history.iter().any(|e| e.epoch > written && e.first.is_some_and(|f| f.chunk <= c.last_chunk))
    }

    /// A new volume that begins as `snapshot` of this one.
    ///
    /// # Errors
    /// `Usage` for a size below the snapshot's, `Full` when the chain of clones is too long.
    pub fn clone_of(&self, snapshot: &Snapshot, name: &str, size_bytes: u64, created: u64) -> Result<Self> {
        if size_bytes < snapshot.size_bytes {
            return Err(Error::new(
                ErrorKind::Usage,
                format!(
                    "a clone of {size_bytes} bytes: the snapshot has {}, and a clone may only be larger",
                    snapshot.size_bytes
                ),
            ));
        }
        let mut clone = Self::new(name, size_bytes, self.logical_block, created);
        let parent = Parent {
            name: self.name.clone(),
            uuid: self.uuid,
            snapshot: snapshot.id,
            snapshot_name: snapshot.name.clone(),
            history: self.history.clone(),
            checkpoint: snapshot.checkpoint.as_ref().map(Checkpoint::inherited),
        };
        clone.checkpoint.clone_from(&parent.checkpoint);
        // Of a volume that stands alone no map names any.
        let older = self.parents.iter().filter(|_| !self.flattened).map(|p| Parent { checkpoint: None, ..p.clone() });
        clone.parents = std::iter::once(parent).chain(older).collect();
        if clone.parents.len() > usize::from(MAX_SOURCE) {
            return Err(Error::new(
                ErrorKind::Full,
                format!(
                    "volume {:?} is a clone of a clone, {} deep, and no map can name more: `vb-ublk volume flatten` makes it a volume of its own",
                    self.name,
                    self.parents.len()
                ),
            ));
        }
        Ok(clone)
    }

    /// Whether the volume depends on another one's chunks or maps, as far as its manifest tells.
    #[must_use]
    pub fn parent(&self) -> Option<&Parent> {
        self.parents.first().filter(|_| !self.flattened)
    }

    /// What decode checks of this page's matter.
    pub(super) fn check_lineage(&self) -> std::result::Result<(), &'static str> {
        if self.parents.len() > usize::from(MAX_SOURCE) {
            return Err("it has too many parents");
        }
        if self.parents.iter().any(|p| check_name(&p.name).is_err())
            || self.snapshots.iter().any(|s| check_name(&s.name).is_err())
        {
            return Err("a name in it cannot be one");
        }
        if self.snapshots.iter().any(|s| check_size(s.size_bytes, self.logical_block).is_err()) {
            return Err("a snapshot's size is impossible");
        }
        if self.checkpoints().any(|c| c.full.parts.is_empty() || c.number() == u64::MAX) {
            return Err("a checkpoint is impossible");
        }
        if self.checkpoints().flat_map(Checkpoint::images).any(|i| usize::from(i.source) > self.parents.len()) {
            return Err("a checkpoint lies with a parent that it does not name");
        }
        if self.snapshots.iter().enumerate().any(|(i, s)| self.snapshots[..i].iter().any(|t| t.name == s.name)) {
            return Err("two snapshots have one name");
        }
        Ok(())
    }
}

impl Checkpoint {
    /// As a clone of its volume names it: nothing of the clone's own is in it yet.
    fn inherited(&self) -> Self {
        let lift = |i: &Image| Image { source: i.source + 1, ..i.clone() };
        Self {
            group: GroupNo(0),
            through: Seq(0),
            last_chunk: ChunkNo(0),
            full: lift(&self.full),
            delta: self.delta.as_ref().map(lift),
        }
    }
}

/// The folder of the refs to one snapshot, or to all of a volume's.
#[must_use]
pub fn refs_prefix(volume: &str, snapshot: Option<Uuid>) -> String {
    snapshot.map_or_else(|| format!("{volume}/refs/"), |s| format!("{volume}/refs/{s}/"))
}

/// The key of a clone's ref to a snapshot of `volume`. With the clone's identity in it, what an older clone of the same name has left
/// behind is told apart.
#[must_use]
pub fn ref_key(volume: &str, snapshot: Uuid, clone: &str, clone_uuid: Uuid) -> String {
    format!("{}{clone}@{clone_uuid}", refs_prefix(volume, Some(snapshot)))
}

/// A ref's key read back: the snapshot, and the clone's name and identity.
#[must_use]
pub fn parse_ref_key(volume: &str, key: &str) -> Option<(Uuid, String, Uuid)> {
    let rest = key.strip_prefix(&refs_prefix(volume, None))?;
    let (snapshot, clone) = rest.split_once('/')?;
    let (name, uuid) = clone.rsplit_once('@')?;
    check_name(name).ok()?;
    Some((snapshot.parse().ok()?, name.to_owned(), uuid.parse().ok()?))
}
