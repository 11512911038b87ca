//! Keeping the log fit: timely syncs, durable marks, packed marks, growth, recycling, the writers' pace.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::select;

use super::{Background, Event};
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::time::Timer;
use crate::volume::Volume;
use crate::wal::appender::append_empty;
use crate::wal::create::zero_slot;

/// Completed writes are synced after this time…
const SYNC_AFTER: Duration = Duration::from_secs(1);
/// …or this many bytes, flush or no flush.
const SYNC_BYTES: u64 = 64 << 20;
/// A durable mark that no record has carried after this time gets a record of its own.
const MARK_AFTER: Duration = Duration::from_millis(50);
/// Between two looks while something is due soon, and while nothing is.
const KEEPER_TICK: Duration = Duration::from_millis(20);
const KEEPER_IDLE_TICK: Duration = Duration::from_millis(100);
/// After the disk was full, growth is tried again after this time.
const GROW_RETRY: Duration = Duration::from_secs(10);

impl<D: Disk + Clone, T: Timer> Background<D, T> {
    pub(super) fn care_for_log(&mut self, now: Duration) {
        let log = self.volume.log.clone();
        self.held = log.recycle(self.packed_durable);
        self.volume.throttle.set(now, log.geometry().capacity(), self.fill(now), self.drain_rate(now));
        self.grow(now);
    }

    pub(super) fn mark_packed(&mut self) {
        if self.applied_seq <= self.packed_durable || self.volume.log.failure().is_some() {
            return;
        }
        let Some(mut sb) = self.superblock.take() else { return };
        let (log, disk, through) = (self.volume.log.clone(), self.disk.clone(), self.applied_seq);
        self.spawn(async move {
            // The superblock's sync is one of the whole file.
            let reached = log.frontier();
            let result = sb.packed(&disk, through).await;
            if result.is_ok() {
                log.durable_to(reached);
            }
            Event::Superblock { sb, result }
        });
    }

    fn grow(&mut self, now: Duration) {
        if self.growing || now < self.no_growth_until || self.volume.log_file().is_device() {
            return;
        }
        let Some(slot) = self.volume.log.wants_slot() else { return };
        self.growing = true;
        let (disk, geometry) = (self.disk.clone(), self.volume.log.geometry());
        let log = self.volume.log.clone();
        self.spawn(async move {
            let result = match zero_slot(&disk, &geometry, slot).await {
                // The kernel may report an earlier write's failure here, and only here.
                Ok(()) => disk.sync().await.map_err(|e| {
                    log.fail(format!("syncing the log failed: {e}; what was written since the last sync may be lost"));
                    Error::io("syncing the grown log", e)
                }),
                Err(e) => Err(e),
            };
            Event::Grown { slot, result }
        });
    }

    pub(super) fn grown(&mut self, slot: u32, result: Result<()>) {
        self.growing = false;
        match result {
            Ok(()) => self.volume.log.add_slot(slot),
            Err(e) => {
                self.no_growth_until = self.timer.now() + GROW_RETRY;
                tracing::warn!("{e}; the log goes on with the {slot} segments it has, and tries again");
            }
        }
    }
}

/// Syncs what no flush has synced in time, and sees to it that a durable mark reaches the log even if nobody writes.
/// Runs on a thread that never computes for long: while an empty record is under way, the lanes' records behind it
/// cannot pass the frontier, and whoever waits for a sync waits for this one. Ends when the volume is gone.
pub async fn keep_log<D: Disk, T: Timer>(volume: Arc<Volume>, disk: D, timer: T) {
    let log = &volume.log;
    let mut unsynced_since = None;
    let mut news_since = None;
    while !volume.is_gone() && log.failure().is_none() {
        let now = timer.now();
        let target = log.flush_target();
        if target > log.durable() {
            let since = *unsynced_since.get_or_insert(now);
            if now.saturating_sub(since) >= SYNC_AFTER || log.bytes_between(log.durable(), target) >= SYNC_BYTES {
                unsynced_since = None;
                // A failure has latched the log by itself.
                let _ = log.sync_through(target, &disk).await;
            }
        } else {
            unsynced_since = None;
        }
        if log.durable_is_news() {
            let since = *news_since.get_or_insert(now);
            if timer.now().saturating_sub(since) >= MARK_AFTER {
                news_since = None;
                let _ = append_empty(log, &disk).await;
            }
        } else {
            news_since = None;
        }
        let busy = unsynced_since.is_some() || news_since.is_some();
        let nap = std::pin::pin!(timer.sleep(if busy { KEEPER_TICK } else { KEEPER_IDLE_TICK }));
        select(nap, std::pin::pin!(volume.until_gone())).await;
    }
}
