//! Groups: cut, build, upload, apply, retire.

use std::rc::Rc;
use std::time::Duration;

use futures_util::future::{Either, select};

use super::memory::SHORT_GROUP_BYTES;
use super::{Background, Backoff, Event, Group, no_trouble, trouble};
use crate::chunk::header::MAX_BLOCKS;
use crate::chunk::pack::{BuiltChunk, GroupTicket, Sources, build, key_of, map_extents};
use crate::disk::Disk;
use crate::map::GroupUpdate;
use crate::time::Timer;
use crate::units::{BLOCK, ChunkNo, GroupNo};
use crate::volume::throttle;
use crate::wal::log::LogEntry;
use crate::wal::recent::PROVIDED_BYTES;

/// Data of a full chunk, in bytes.
const CHUNK_BYTES: u64 = (MAX_BLOCKS * BLOCK) as u64;
/// Data of a group, in bytes of log, at most: of whole chunks, so that none is left over for a few blocks. Twice as much under backlog,
/// when more is overwritten within a group.
const GROUP_BYTES: u64 = 8 * CHUNK_BYTES;
/// Data of a group in the smallest logs.
const GROUP_BYTES_MIN: u64 = CHUNK_BYTES;
/// A group is at most this share of the log: room comes free a group at a time.
const GROUPS_IN_LOG: u64 = 16;
/// Entries of a group.
const GROUP_ENTRIES: usize = 32 << 10;
/// A smaller group is cut when its first entry is this old and no upload is outstanding.
const GROUP_AGE: Duration = Duration::from_secs(5);
/// From groups of so many bytes on, or such a part of the log, what is written is kept in memory.
const MUCH: u64 = 8 << 20;
const MUCH_OF_LOG: u64 = 32;
/// Between two looks at the memory while some is used that one can do without.
const LOOK_AT_MEMORY: Duration = Duration::from_millis(50);
/// One that is built, and two on their way: so that the uploads do not wait for the next group.
const MAX_GROUPS: usize = 3;
const MAX_UPLOADS: usize = 16;
/// Share of the newest group in the uploads' pace.
const PACE_WEIGHT: f64 = 0.3;
/// Groups below this do not count for the pace.
const PACE_BYTES: u64 = 1 << 20;
/// No group is reckoned to have taken less, in seconds.
const SHORTEST_SERVICE: f64 = 0.01;

impl<D: Disk + Clone, T: Timer> Background<D, T> {
    pub(super) fn cut_group(&mut self, now: Duration) {
        let log = &self.volume.log;
        let status = log.status();
        if status.last_seq <= self.cut.0 {
            self.uncut_since = None;
            return;
        }
        let age = now.saturating_sub(*self.uncut_since.get_or_insert(now));
        if self.cut_groups().count() >= MAX_GROUPS || self.groups.iter().any(|g| g.chunks.is_none()) {
            return;
        }
        let in_flight: u64 = self.groups.iter().map(|g| g.bytes).sum();
        let waiting = status.pending_bytes.saturating_sub(in_flight);
        let fill = self.fill(now);
        let share = status.capacity_bytes / GROUPS_IN_LOG / CHUNK_BYTES * CHUNK_BYTES;
        let usual = share.clamp(GROUP_BYTES_MIN, GROUP_BYTES);
        let asked = self.barriers.want_beyond(self.cut) || self.snapshots.iter().any(|s| s.after > self.cut);
        let wanted = self.detach.is_some() || asked;
        let many = status.last_seq - self.cut.0 >= GROUP_ENTRIES as u64;
        let idle = self.cut_groups().next().is_none();
        if !(waiting >= usual || many || wanted || idle && (age >= GROUP_AGE || fill > throttle::START)) {
            return;
        }
        let mut most = if fill > 0.75 { 2 * usual } else { usual };
        if self.memory.is_short() {
            // Not even a batch of garbage collection's beside it.
            if !self.groups.is_empty() {
                return;
            }
            most = most.min(SHORT_GROUP_BYTES);
        }
        let entries = log.journal_after(self.cut, most, GROUP_ENTRIES);
        let Some(last) = entries.last() else { return };
        let ticket = GroupTicket {
            volume: log.volume(),
            epoch: self.epoch,
            nonce: self.nonce,
            group: self.next_group,
            after: self.cut,
            through: last.seq,
            first_chunk: self.next_chunk,
            applied_through: self.applied,
        };
        let bytes = entries.iter().map(LogEntry::stored_bytes).sum();
        self.keep_recent(bytes);
        self.groups.push_back(Group {
            number: ticket.group,
            through: ticket.through,
            bytes,
            since: now.saturating_sub(age),
            cut_at: now,
            built_at: now,
            chunks: None,
            left: 0,
            moves: None,
        });
        self.cut = ticket.through;
        self.next_group = ticket.group.next();
        self.uncut_since = None;
        self.build(ticket, entries, fill > throttle::START);
    }

    /// While there is much to pack, as in a group of so many bytes, what is written is kept in memory until it is packed.
    fn keep_recent(&mut self, bytes: u64) {
        let log = &self.volume.log;
        let capacity = log.geometry().capacity();
        if bytes < MUCH.min(capacity / MUCH_OF_LOG) {
            log.recent().shrink();
        } else if self.memory.is_plenty(bytes + PROVIDED_BYTES) {
            log.recent().provide(capacity);
        }
    }

    /// What is kept in memory is given back when others want it.
    pub(super) fn look_after_recent(&mut self, now: Duration) {
        let recent = self.volume.log.recent();
        if recent.is_empty() || now.saturating_sub(self.looked_at_memory) < LOOK_AT_MEMORY {
            return;
        }
        self.looked_at_memory = now;
        if !self.memory.is_plenty(0) {
            recent.clear();
        }
    }

    fn build(&self, ticket: GroupTicket, entries: Vec<LogEntry>, is_urgent: bool) {
        let pending: Vec<Rc<Vec<BuiltChunk>>> = self.cut_groups().filter_map(|g| g.chunks.clone()).collect();
        let (volume, disk, reader, timer) =
            (self.volume.clone(), self.disk.clone(), self.reader.clone(), self.timer.clone());
        let (bodies, suspects, log_reads) =
            (self.bodies.clone(), Rc::clone(&self.suspects), Rc::clone(&self.log_reads));
        self.spawn(async move {
            let mut backoff = Backoff::new();
            let (log, maps) = (&volume.log, &volume.maps);
            let log_reads = &|| log_reads.at_once(timer.now(), &volume.counts.sum(), is_urgent);
            let sources = Sources {
                log,
                disk: &disk,
                maps,
                reader: &reader,
                bodies: &bodies,
                log_reads,
                pending,
                suspects: &suspects,
            };
            loop {
                if volume.is_gone() {
                    return Event::Built { group: ticket.group, chunks: None };
                }
                match build(&sources, &ticket, &entries).await {
                    Ok(chunks) => return Event::Built { group: ticket.group, chunks: Some(chunks) },
                    Err(e) => trouble(&volume, &format!("packing group {}", ticket.group), &e),
                }
                backoff.pause(&timer).await;
            }
        });
    }

    pub(super) fn built(&mut self, number: GroupNo, chunks: Option<Vec<BuiltChunk>>) {
        let Some(chunks) = chunks else { return };
        let Some(group) = self.groups.iter_mut().find(|g| g.number == number) else { return };
        self.next_chunk = ChunkNo(self.next_chunk.0 + chunks.len() as u64);
        self.volume.log.recent().done(group.through);
        group.left = chunks.len();
        group.built_at = self.timer.now();
        self.uploads.extend(chunks.iter().map(|c| (number, c.clone())));
        group.chunks = Some(Rc::new(chunks));
    }

    pub(super) fn start_uploads(&mut self) {
        while self.uploading < MAX_UPLOADS {
            let Some((group, chunk)) = self.uploads.pop_front() else { return };
            self.uploading += 1;
            // Not a batch of garbage collection's, which nobody has asked for lately.
            let for_cache =
                self.volume.cache.get().is_some() && chunk.header.group != GroupNo(0) && !self.memory.is_short();
            let (volume, store, timer) = (self.volume.clone(), self.store.clone(), self.timer.clone());
            let key = key_of(&self.prefix, &chunk.header);
            self.spawn(async move {
                let mut backoff = Backoff::new();
                loop {
                    if volume.is_gone() {
                        return Event::Uploaded { group, ok: false };
                    }
                    let put = store.put(&key, chunk.body.clone());
                    match select(put, std::pin::pin!(volume.until_gone())).await {
                        Either::Left((Ok(()), _)) => {
                            no_trouble(&volume);
                            if for_cache {
                                volume.offer_packed(&chunk);
                            }
                            return Event::Uploaded { group, ok: true };
                        }
                        Either::Left((Err(e), _)) => trouble(&volume, &format!("uploading {key}"), &e),
                        Either::Right(_) => continue,
                    }
                    backoff.pause(&timer).await;
                }
            });
        }
    }

    pub(super) fn retire_groups(&mut self, now: Duration) {
        while self.groups.front().is_some_and(|g| g.chunks.is_some() && g.left == 0) {
            let Some(group) = self.groups.pop_front() else { return };
            let Group { number, through, bytes, cut_at, built_at, chunks, moves, .. } = group;
            let chunks = chunks.as_deref().map(Vec::as_slice).unwrap_or_default();
            if let Some(moves) = moves {
                self.retire_batch(chunks, &moves);
                continue;
            }
            let mut update = GroupUpdate { last: through, ..GroupUpdate::default() };
            for c in chunks {
                update.extents.extend(map_extents(&c.header, 0));
                self.reader.keep(0, c.header.clone());
                self.applied_chunk = self.applied_chunk.max(c.header.chunk);
                self.gc.note_chunk(&c.header);
            }
            self.volume.maps.apply_group(&update);
            self.volume.log.retire(through);
            self.applied = number;
            self.applied_seq = through;
            self.note_pace(now, cut_at, bytes);
            let (building, sending) = (built_at.saturating_sub(cut_at), now.saturating_sub(built_at));
            tracing::debug!(group = number.0, bytes, ?building, ?sending, "a group is in the store");
        }
        if self.groups.is_empty() && self.volume.log.passed_seq() == self.applied_seq {
            self.bodies.clear();
            self.volume.log.recent().clear();
        }
    }

    /// Bytes of log that groups retire per second while any are under way; `None` before the first is. A group that takes
    /// longer than its predecessors pulls it down while it waits: an outage slows writers before the log is full.
    pub(super) fn drain_rate(&self, now: Duration) -> Option<f64> {
        let Some(front) = self.cut_groups().next() else { return self.pace };
        let waited = now.saturating_sub(front.cut_at.max(self.last_retired)).as_secs_f64();
        let front = front.bytes.max(1) as f64 / waited.max(SHORTEST_SERVICE);
        Some(self.pace.map_or(front, |pace| pace.min(front)))
    }

    /// The groups of the log's entries, oldest first.
    pub(super) fn cut_groups(&self) -> impl Iterator<Item = &Group> {
        self.groups.iter().filter(|g| g.moves.is_none())
    }

    fn note_pace(&mut self, now: Duration, cut_at: Duration, bytes: u64) {
        let took = now.saturating_sub(cut_at.max(self.last_retired)).as_secs_f64();
        self.last_retired = now;
        // A small group says more of latency than of pace.
        if bytes < PACE_BYTES {
            return;
        }
        let rate = bytes as f64 / took.max(SHORTEST_SERVICE);
        self.pace = Some(self.pace.map_or(rate, |p| p.mul_add(1.0 - PACE_WEIGHT, rate * PACE_WEIGHT)));
    }
}
