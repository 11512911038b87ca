//! What gathers on a lane until it leaves as one record.

use std::time::Duration;

use super::codec::{RecordEntry, RecordKind};
use crate::disk::IoBuf;

/// Invariant: a ticket and a time for each entry, a buffer for each entry with data, a checksum for each stored block, all in the
/// order of the entries.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) entries: Vec<RecordEntry>,
    pub(super) crcs: Vec<u32>,
    pub(super) data: Vec<IoBuf>,
    pub(super) tickets: Vec<usize>,
    /// Since when each entry waits.
    pub(super) since: Vec<Duration>,
    /// Every entry asked for FUA.
    pub(super) all_fua: bool,
}

impl Batch {
    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.crcs.clear();
        self.data.clear();
        self.tickets.clear();
        self.since.clear();
    }

    /// Takes out what has waited since before `cutoff`; returns its tickets.
    pub(super) fn expire(&mut self, cutoff: Duration) -> Vec<usize> {
        if self.since.iter().all(|s| *s >= cutoff) {
            return Vec::new();
        }
        let all = std::mem::take(self);
        let (mut data, mut crcs) = (all.data.into_iter(), all.crcs.into_iter());
        let mut expired = Vec::new();
        self.all_fua = all.all_fua;
        for ((entry, ticket), since) in all.entries.into_iter().zip(all.tickets).zip(all.since) {
            let stored: Vec<u32> = crcs.by_ref().take(entry.stored_blocks() as usize).collect();
            let buf = (entry.kind == RecordKind::Data).then(|| data.next()).flatten();
            if since < cutoff {
                expired.push(ticket);
                continue;
            }
            self.entries.push(entry);
            self.tickets.push(ticket);
            self.since.push(since);
            self.crcs.extend(stored);
            self.data.extend(buf);
        }
        expired
    }
}
