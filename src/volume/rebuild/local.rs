//! The write-ahead log on this host, and what it says about the chunks.

use super::groups::Assembled;
use super::report::LogFate;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::Manifest;
use crate::units::Seq;
use crate::volume::attach::is_ours;
use crate::volume::recover::StoreEnd;
use crate::wal::codec::Superblock;
use crate::wal::create::SuperblockFile;
use crate::wal::inspect::Inspection;

/// The write-ahead log of the volume on this host. Whoever hands it in has it locked: its last user is dead.
#[derive(Debug, Clone)]
pub struct LocalLog {
    /// Where it is, for messages.
    pub path: String,
    /// Its superblock.
    pub superblock: Superblock,
    /// The packed mark.
    pub packed: Seq,
    /// The last entry that a replay returns.
    pub last_seq: Seq,
    /// Whether a replay refuses it.
    pub damaged: bool,
}

impl LocalLog {
    /// What an inspection says.
    #[must_use]
    pub fn of(path: String, found: &Inspection) -> Self {
        Self {
            path,
            superblock: found.superblock.clone(),
            packed: found.packed,
            last_seq: found.last_seq,
            damaged: !found.damage.is_empty(),
        }
    }

    pub(super) fn is_ours(&self, m: &Manifest) -> bool {
        is_ours(&SuperblockFile { current: self.superblock.clone() }, m)
    }

    /// Whether it has entries behind this one, as far as it can be read.
    pub(super) fn goes_on(&self, through: Seq) -> bool {
        self.damaged || self.last_seq > through
    }
}

/// Whose log it is, next to the chunks.
pub(super) enum Standing {
    /// The newest attachment's.
    Newest,
    /// An older one's: why.
    Old(String),
    /// Its attachment left no chunk and no checkpoint: the groups have to tell.
    Open,
}

/// Holds a log whose attachment left no trace in the store against the groups there. The store ended with the log's packed mark when
/// that attachment began.
pub(super) fn judge(log: &LocalLog, a: &Assembled) -> Result<Standing> {
    let mut beyond = a.shares.iter().filter(|s| s.last_through > log.packed);
    let Some(next) = beyond.next() else { return Ok(Standing::Newest) };
    if next.first_through <= log.packed {
        // It wrote before the log's attachment began and went on after it: as a fenced host does.
        return Ok(Standing::Newest);
    }
    let old = Standing::Old(format!("epoch {} went on from where its attachment began", next.epoch));
    // An attachment that found groups behind the mark whole came after the log's; or the log has nothing to lose.
    if beyond.next().is_some() || !log.goes_on(log.packed) {
        return Ok(old);
    }
    Err(Error::new(
        ErrorKind::Corrupt,
        format!(
            "the log {} (entries {} to {} of it are in no chunk) and the chunks of epoch {} (from entry {} on) both go on from entry {}, and without a \
             manifest nobody can tell which is newer: if another host had the volume last, move the log away and try again",
            log.path,
            log.packed.next(),
            log.last_seq,
            next.epoch,
            log.packed.next(),
            log.packed
        ),
    ))
}

/// What becomes of the log when the volume ends there.
pub(super) fn log_fate(log: Option<&LocalLog>, ours: bool, end: &StoreEnd) -> LogFate {
    match log {
        None => LogFate::None,
        Some(_) if !ours => LogFate::SetAside("it is not of the volume's newest attachment".to_owned()),
        Some(l) if l.goes_on(end.through) => LogFate::Replayed(l.last_seq.0),
        Some(_) => LogFate::Packed,
    }
}
