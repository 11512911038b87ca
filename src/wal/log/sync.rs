//! Syncs of the log, shared by all who wait for one.
//!
//! Invariants:
//! - *Durable* (D) is a value of the frontier read before a sync was submitted that then succeeded.
//! - One sync runs at a time. A waiter joins only a sync that is not yet submitted: one that runs may have read its
//!   frontier too early for it.
//! - A failed sync latches the log's failure before anybody who waits for it goes on.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};

use super::{Failed, Log, lock};
use crate::disk::Disk;
use crate::wal::codec::LogPos;

/// Lets one caller through at a time.
#[derive(Default)]
pub(super) struct SyncGate(Mutex<Gate>);

#[derive(Default)]
struct Gate {
    running: bool,
    waiters: Vec<Waker>,
}

impl SyncGate {
    /// True: the caller runs the next sync, and then leaves. False: one that was running has ended; look again.
    async fn enter(&self) -> bool {
        let mut waited = false;
        std::future::poll_fn(|cx| {
            let mut g = lock(&self.0);
            if !g.running {
                // A waiter looks at the durable mark first: the sync that ended may have been enough.
                if waited {
                    return Poll::Ready(false);
                }
                g.running = true;
                return Poll::Ready(true);
            }
            waited = true;
            g.waiters.push(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// The sync has ended.
    fn leave(&self) {
        let waiters = {
            let mut g = lock(&self.0);
            g.running = false;
            std::mem::take(&mut g.waiters)
        };
        waiters.into_iter().for_each(Waker::wake);
    }

    /// The log has failed. While a sync runs, those who wait for it wait on for its end.
    pub(super) fn wake(&self) {
        let waiters = std::mem::take(&mut lock(&self.0).waiters);
        waiters.into_iter().for_each(Waker::wake);
    }
}

/// The sync that runs, until it is dropped: also by whoever gives up half way, for those who wait behind it.
struct Running<'a>(&'a SyncGate);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl Log {
    /// What a flush that is issued now has to make durable.
    #[must_use]
    pub fn flush_target(&self) -> LogPos {
        LogPos(self.flush_target.load(Ordering::Acquire))
    }

    /// Everything below is on stable storage.
    #[must_use]
    pub fn durable(&self) -> LogPos {
        LogPos(self.durable.load(Ordering::Acquire))
    }

    /// Whether the newest durable mark is not yet in any record.
    #[must_use]
    pub fn durable_is_news(&self) -> bool {
        self.durable() > LogPos(self.carried.load(Ordering::Relaxed))
    }

    /// Makes everything below `target` survive power loss. Waiters join only a sync that is not yet submitted. Dropped half way, nobody
    /// hears whether the sync under way has failed: only for who answers nothing from then on.
    ///
    /// # Errors
    /// When the sync fails (which latches the log), or the log had failed.
    pub async fn sync_through<D: Disk>(&self, target: LogPos, disk: &D) -> Result<(), Failed> {
        loop {
            if self.durable() >= target {
                return Ok(());
            }
            if self.failure().is_some() {
                return Err(Failed);
            }
            if self.gate.enter().await {
                let running = Running(&self.gate);
                let reached = self.frontier();
                let result = disk.sync().await;
                match &result {
                    Ok(()) => {
                        self.durable.fetch_max(reached.0, Ordering::AcqRel);
                        self.syncs.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(e) => self.sync_failed(e),
                }
                drop(running);
                if result.is_err() {
                    return Err(Failed);
                }
            }
        }
    }

    /// Everything up to `end` is durable by other means than [`Log::sync_through`]: a record was written with RWF_DSYNC
    /// over a durable log, or `end` was the frontier before somebody else's sync of the file was submitted.
    pub fn durable_to(&self, end: LogPos) {
        self.durable.fetch_max(end.0, Ordering::AcqRel);
    }

    fn sync_failed(&self, e: &io::Error) {
        self.fail(format!("syncing the log failed: {e}; what was written since the last sync may be lost"));
    }
}
