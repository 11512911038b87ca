//! What the background is asked to do: taken, kept until it is due, answered.
//!
//! Invariant: whoever asks is answered, also when the volume is lost meanwhile, or is a snapshot.

use tokio::sync::oneshot;
use uuid::Uuid;

use super::{Background, Event, PublishDone};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::{By, Manifest};
use crate::time::Timer;
use crate::units::Seq;
use crate::volume::boot::keep_trace;
use crate::volume::snapshots::{self, Wanted};
use crate::volume::{Command, Volume};

/// To whom the end of something is told.
pub(super) type Reply = oneshot::Sender<Result<()>>;

/// A snapshot that waits for its moment to be in the store.
pub(super) struct SnapshotOrder {
    wanted: Wanted,
    /// The last entry that had completed when it was asked for.
    pub(super) after: Seq,
    reply: Reply,
}

impl<D: Disk + Clone, T: Timer> Background<D, T> {
    pub(super) fn command(&mut self, command: Option<Command>) {
        match command {
            Some(Command::Detach(reply)) => self.detach = Some(reply),
            Some(Command::Snapshot { name, created, reply }) => {
                let wanted = Wanted { name, id: Uuid::new_v4(), created };
                self.snapshots.push(SnapshotOrder { wanted, after: self.volume.log.passed_seq(), reply });
            }
            Some(Command::Grow { size_bytes, reply }) => self.resizes.push_back((size_bytes, reply)),
            Some(Command::CollectGarbage(reply)) => self.gc.order(reply),
            Some(Command::Flatten(reply)) => self.flatten.order(reply),
            Some(Command::DeleteSnapshot { name, reply }) => self.deletions.push_back((name, reply)),
            Some(Command::Barrier(reply)) => self.barriers.order(self.volume.log.passed_seq(), reply),
            Some(Command::Upload(reply)) => self.barriers.order_upload(self.volume.log.passed_seq(), reply),
            Some(Command::Sync(reply)) => self.sync_log(reply),
            Some(Command::KeepTrace { volume, snapshot, reply }) => {
                let (of, store) = (self.volume.clone(), self.store.clone());
                self.spawn(async move {
                    let _ = reply.send(keep_trace(&of, &*store, (&volume, &snapshot)).await);
                    Event::Answered
                });
            }
            Some(Command::Abandon) | None => {
                self.volume.set_gone("it was abandoned");
                self.volume.log.fail("the volume was abandoned");
                self.finished = true;
            }
        }
    }

    /// The snapshots whose moment has been applied, for the next checkpoint, and who waits for them.
    pub(super) fn due_snapshots(&mut self, m: &Manifest) -> (Vec<Wanted>, Vec<Reply>) {
        let applied = self.applied_seq;
        let (due, later) = self.snapshots.drain(..).partition(|s| s.after <= applied);
        self.snapshots = later;
        let (mut wanted, mut replies) = (Vec::new(), Vec::new());
        // Each is tried on what the others before it leave.
        let mut tried = m.clone();
        for SnapshotOrder { wanted: w, reply, .. } in due {
            match snapshots::add(&mut tried, &w) {
                Ok(()) => {
                    wanted.push(w);
                    replies.push(reply);
                }
                Err(e) => {
                    let _ = reply.send(Err(e));
                }
            }
        }
        (wanted, replies)
    }

    /// Deletes a snapshot when the manifest is free.
    pub(super) fn delete_snapshots(&mut self) {
        if self.deletions.is_empty() {
            return;
        }
        let Some(mut published) = self.published.take() else { return };
        let Some((name, reply)) = self.deletions.pop_front() else { return };
        let store = self.store.clone();
        self.spawn(async move {
            let done = PublishDone::of(snapshots::delete(&*store, &mut published, By::Attachment, &name).await);
            Event::Published { published, done, replies: vec![reply] }
        });
    }

    /// There is nothing to upload and nothing to release.
    pub(super) fn let_go(&mut self) {
        self.volume.set_gone("it was detached");
        if let Some(reply) = self.detach.take() {
            let _ = reply.send(Ok(()));
        }
        self.finished = true;
    }

    /// Who waits for what has not been begun.
    pub(super) fn orders(&mut self) -> Vec<Reply> {
        let snapshots = self.snapshots.drain(..).map(|s| s.reply);
        let deletions = self.deletions.drain(..).map(|d| d.1);
        let resizes = self.resizes.drain(..).map(|r| r.1);
        snapshots
            .chain(deletions)
            .chain(resizes)
            .chain(self.gc.take_orders())
            .chain(self.flatten.take_orders())
            .collect()
    }

    pub(super) fn refuse_orders(&mut self) {
        // All there is of it is in the store.
        for reply in self.barriers.take() {
            let _ = reply.send(Ok(()));
        }
        for reply in self.orders() {
            let what = format!("{} is a snapshot, which never changes", self.volume.name());
            let _ = reply.send(Err(Error::new(ErrorKind::Usage, what)));
        }
    }

    /// The volume is another's: whoever waits is told, and a detach only ends.
    pub(super) fn give_up(&mut self) {
        self.volume.log.recent().clear();
        for reply in self.barriers.take().into_iter().chain(self.orders()) {
            let _ = reply.send(Err(lost(&self.volume)));
        }
        if let Some(reply) = self.detach.take() {
            let _ = reply.send(Err(lost(&self.volume)));
            self.finished = true;
        }
    }
}

/// What whoever waits for a volume that is gone is told.
pub(super) fn lost(v: &Volume) -> Error {
    let reason = v.status().failure.unwrap_or_default();
    Error::new(ErrorKind::Fenced, format!("volume {:?} was lost while it was attached: {reason}", v.name()))
}
