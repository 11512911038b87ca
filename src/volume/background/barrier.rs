//! Barriers: the store has everything that had completed, and this attachment still has the volume.
//!
//! Invariants:
//! - The look at the manifest that lets a barrier go begins when the last of its chunks is in the store. Who takes the volume over
//!   later lists the chunks after that, and finds them.
//! - One look at a time; who comes meanwhile waits for the next.

use futures_util::future::{Either, select};

use super::orders::Reply;
use super::{Background, Backoff, Event, lost, no_trouble, trouble};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::Published;
use crate::time::Timer;
use crate::units::Seq;

/// Who waits for the store.
#[derive(Default)]
pub(super) struct Barriers {
    /// Each with the last entry that had completed when it was asked for.
    waiting: Vec<(Seq, Reply)>,
    /// Who waits for the chunks alone, in the same way.
    uploads: Vec<(Seq, Reply)>,
    /// Those for whom the manifest is being looked at.
    looking: Option<Vec<Reply>>,
}

impl Barriers {
    pub(super) fn order(&mut self, after: Seq, reply: Reply) {
        self.waiting.push((after, reply));
    }

    pub(super) fn order_upload(&mut self, after: Seq, reply: Reply) {
        self.uploads.push((after, reply));
    }

    /// Whether one waits for entries beyond `seq`.
    pub(super) fn want_beyond(&self, seq: Seq) -> bool {
        self.waiting.iter().chain(&self.uploads).any(|(after, _)| *after > seq)
    }

    /// All who wait.
    pub(super) fn take(&mut self) -> Vec<Reply> {
        let looking = self.looking.as_mut().map(std::mem::take).unwrap_or_default();
        self.waiting.drain(..).chain(self.uploads.drain(..)).map(|(_, reply)| reply).chain(looking).collect()
    }
}

impl<D: Disk + Clone, T: Timer> Background<D, T> {
    /// Looks at the manifest for those whose chunks are in the store.
    pub(super) fn pass_barriers(&mut self) {
        let applied = self.applied_seq;
        for (_, reply) in self.barriers.uploads.extract_if(.., |(after, _)| *after <= applied) {
            let _ = reply.send(Ok(()));
        }
        if self.barriers.looking.is_some() {
            return;
        }
        // Some have given up: they may wait no longer than the user allows.
        self.barriers.waiting.retain(|(_, reply)| !reply.is_closed());
        let (ready, later) = self.barriers.waiting.drain(..).partition::<Vec<_>, _>(|(after, _)| *after <= applied);
        self.barriers.waiting = later;
        if ready.is_empty() {
            return;
        }
        self.barriers.looking = Some(ready.into_iter().map(|(_, reply)| reply).collect());
        let (store, volume, timer, nonce) = (self.store.clone(), self.volume.clone(), self.timer.clone(), self.nonce);
        self.spawn(async move {
            let mut backoff = Backoff::new();
            let look = loop {
                if volume.is_gone() {
                    break Err(lost(&volume));
                }
                let load = std::pin::pin!(Published::load(&*store, volume.name()));
                match select(load, std::pin::pin!(volume.until_gone())).await {
                    Either::Left((Ok(p), _)) => {
                        no_trouble(&volume);
                        break p.check_nonce(nonce);
                    }
                    // Also when there is no manifest: the poll decides what that means.
                    Either::Left((Err(e), _)) => trouble(&volume, "looking at the manifest", &e),
                    Either::Right(_) => continue,
                }
                select(std::pin::pin!(backoff.pause(&timer)), std::pin::pin!(volume.until_gone())).await;
            };
            Event::Looked(look)
        });
    }

    pub(super) fn barrier_looked(&mut self, look: Result<()>) {
        let replies = self.barriers.looking.take().unwrap_or_default();
        if let Err(e) = &look
            && e.kind() == ErrorKind::Fenced
            && !self.volume.is_gone()
        {
            self.fenced(e);
        }
        for reply in replies {
            let _ = reply.send(if look.is_ok() { Ok(()) } else { Err(lost(&self.volume)) });
        }
    }

    /// Makes the log itself durable for whoever orders it; not for long, so that nothing waits for it.
    pub(super) fn sync_log(&self, reply: Reply) {
        let (log, disk, name) = (self.volume.log.clone(), self.disk.clone(), self.volume.name().to_owned());
        self.spawn(async move {
            let synced = log.sync_through(log.flush_target(), &disk).await;
            let failed = |_| {
                let why = log.failure().unwrap_or_default();
                Error::new(ErrorKind::Io, format!("syncing the log of volume {name:?} failed: {why}"))
            };
            let _ = reply.send(synced.map_err(failed));
            Event::Answered
        });
    }
}
