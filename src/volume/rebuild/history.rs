//! Which chunks count: by the manifest's history, or by what the chunks themselves tell of it.

use std::collections::BTreeMap;

use crate::chunk::header::ChunkHeader;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::{EpochEntry, FirstOwned, owner};
use crate::units::{ChunkNo, Epoch, GroupNo, Nonce, Seq};

/// A chunk as its key names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Named {
    pub chunk: ChunkNo,
    pub epoch: Epoch,
    pub nonce: Nonce,
}

/// An attachment that has left chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attachment {
    pub epoch: Epoch,
    pub nonce: Nonce,
    /// Its lowest chunk number.
    pub lowest: ChunkNo,
    /// The first group it owns; absent when the header that would say so cannot be read.
    pub first_group: Option<GroupNo>,
    /// Chunk numbers and groups from here on are a later attachment's.
    pub until: FirstOwned,
}

const FOREVER: FirstOwned = FirstOwned { group: GroupNo(u64::MAX), chunk: ChunkNo(u64::MAX) };

/// The attachments that left chunks, oldest first, without what their headers say.
///
/// # Errors
/// `Corrupt` when two of them claim to be the same epoch: nobody can tell which came first.
pub(super) fn attachments(named: &[Named]) -> Result<Vec<Attachment>> {
    let mut found: BTreeMap<Epoch, Attachment> = BTreeMap::new();
    for n in named {
        let new = Attachment { epoch: n.epoch, nonce: n.nonce, lowest: n.chunk, first_group: None, until: FOREVER };
        let a = found.entry(n.epoch).or_insert(new);
        if a.nonce != n.nonce {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "two attachments left chunks of epoch {}, with the nonces {} and {}: without a manifest nobody can tell which of \
                     them had the volume; move the chunks of the other one away and try again",
                    n.epoch, a.nonce, n.nonce
                ),
            ));
        }
        a.lowest = a.lowest.min(n.chunk);
    }
    Ok(found.into_values().collect())
}

/// Has each attachment end where a later one begins.
pub(super) fn limit(attachments: &mut [Attachment]) {
    let mut until = FOREVER;
    for a in attachments.iter_mut().rev() {
        a.until = until;
        until.chunk = until.chunk.min(a.lowest);
        until.group = a.first_group.map_or(until.group, |g| until.group.min(g));
    }
}

/// Says which chunks count.
#[derive(Debug, Clone)]
pub(super) enum Rules {
    /// The manifest's history does.
    Known {
        history: Vec<EpochEntry>,
        /// Chunks up to this one are in the map already.
        after: ChunkNo,
        /// Nothing behind this one counts.
        until: ChunkNo,
    },
    /// The chunks do.
    Inferred {
        attachments: Vec<Attachment>,
        /// The newest attachment's log: all groups behind that entry are of that attachment.
        log: Option<(Seq, Nonce)>,
    },
}

impl Rules {
    /// Whether a chunk may count, by its key.
    pub(super) fn names(&self, n: &Named) -> bool {
        match self {
            Self::Known { history, after, until } => {
                n.chunk > *after && n.chunk <= *until && owner(history, n.chunk) == Some((n.epoch, n.nonce))
            }
            Self::Inferred { .. } => self.attachment(n.epoch).is_some_and(|a| n.chunk < a.until.chunk),
        }
    }

    /// Whether one that its key names counts, by its header.
    pub(super) fn takes(&self, h: &ChunkHeader) -> bool {
        match self {
            Self::Known { .. } => true,
            Self::Inferred { log, .. } => {
                let fits_log = log.is_none_or(|(packed, nonce)| h.nonce == nonce || h.through <= packed);
                fits_log && self.attachment(h.epoch).is_some_and(|a| h.group < a.until.group)
            }
        }
    }

    fn attachment(&self, epoch: Epoch) -> Option<&Attachment> {
        let Self::Inferred { attachments, .. } = self else { return None };
        let i = attachments.binary_search_by_key(&epoch, |a| a.epoch).ok()?;
        attachments.get(i)
    }
}

/// A history that ends before `first`, where a new attachment begins.
pub(super) fn cut(history: &mut Vec<EpochEntry>, epoch: Epoch, nonce: Nonce, first: FirstOwned) {
    for e in history.iter_mut() {
        if e.first.is_some_and(|f| f.group > first.group || f.chunk > first.chunk) {
            e.first = None;
        }
    }
    history.push(EpochEntry { epoch, nonce, first: Some(first) });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(all: &[(u64, u64)]) -> Vec<Named> {
        all.iter().map(|&(c, e)| Named { chunk: ChunkNo(c), epoch: Epoch(e), nonce: Nonce(e * 7) }).collect()
    }

    #[test]
    fn the_lowest_number_of_a_later_attachment_cuts_all_earlier_ones() {
        let named = named(&[(1, 1), (2, 1), (3, 1), (4, 1), (3, 5), (4, 5), (6, 5), (5, 2), (6, 2), (6, 9)]);
        let mut found = attachments(&named).unwrap();
        limit(&mut found);
        let rules = Rules::Inferred { attachments: found, log: None };
        let counts: Vec<(u64, u64)> = named.iter().filter(|n| rules.names(n)).map(|n| (n.chunk.0, n.epoch.0)).collect();
        assert_eq!(counts, [(1, 1), (2, 1), (3, 5), (4, 5), (6, 9)]);
    }

    #[test]
    fn two_of_one_epoch_are_refused() {
        let mut all = named(&[(1, 1), (2, 1)]);
        all[1].nonce = Nonce(5);
        assert_eq!(attachments(&all).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn a_cut_history_is_in_order() {
        let own = |n: u64| Some(FirstOwned { group: GroupNo(n), chunk: ChunkNo(n) });
        let entry = |e: u64, first| EpochEntry { epoch: Epoch(e), nonce: Nonce(e), first };
        let mut h = vec![entry(1, own(1)), entry(2, own(5)), entry(3, None), entry(4, own(9))];
        cut(&mut h, Epoch(5), Nonce(5), FirstOwned { group: GroupNo(5), chunk: ChunkNo(5) });
        assert_eq!(h.iter().map(|e| e.first).collect::<Vec<_>>(), [own(1), own(5), None, None, own(5)]);
        assert_eq!(owner(&h, ChunkNo(9)), Some((Epoch(5), Nonce(5))));
        assert_eq!(owner(&h, ChunkNo(4)), Some((Epoch(1), Nonce(1))));
    }
}
