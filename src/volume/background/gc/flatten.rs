//! Cutting the tie of a clone to its parents: what the map names of their chunks is copied into chunks of the volume's own.
//!
//! 1. *Look*: refused while a snapshot of the volume's own names a parent, since that would need it all the same. Then the published map is
//!    looked through; what it names of parents is to be copied.
//! 2. *Copy*, a batch at a time, as garbage collection does it; then a checkpoint, whole and in the volume's own folder; then look again.
//! 3. *Cut*, when nothing was found: a copy of the manifest is kept, by which a rebuild knows the copied chunks; the manifest says that the
//!    volume stands alone; the ref at the parent goes.
//!
//! Batches and the steps of garbage collection take turns; while a batch has to wait for the log or for memory, collection goes on.
//!
//! Invariants:
//! - Writes only ever take blocks away from what parents are needed for: each look finds less than the one before, or something is wrong.
//! - The manifest says that the volume stands alone when its map and all its snapshots' do; a map that is published later is younger.

use uuid::Uuid;

use super::super::{Background, Event, PublishDone};
use super::{GcDone, Reply};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::gc::lent::{Lent, batch, lent};
use crate::gc::plan::{BATCH_BLOCKS, BATCH_CHUNKS};
use crate::manifest::Checkpoint;
use crate::map::BaseImage;
use crate::time::Timer;
use crate::units::BLOCK;
use crate::volume::{snapshots, throttle};

/// See the module's page.
#[derive(Default)]
pub(in crate::volume::background) struct Flatten {
    /// Who waits for it; nobody: it is not to be done.
    replies: Vec<Reply>,
    stage: Stage,
    /// Blocks that the last look found.
    found: Option<u64>,
    /// The checkpoint was to be written whole, since an image of it is a parent's.
    folded: bool,
    /// The snapshots that were looked at.
    looked_at: Vec<Uuid>,
    /// The last step was one of it.
    had_turn: bool,
}

#[derive(Default)]
enum Stage {
    #[default]
    Look,
    /// Of the map that was looked at: a newer one may name less of a chunk.
    Copy(BaseImage, Vec<Lent>),
    Cut,
}

/// What a look has found.
pub(in crate::volume) struct Looked {
    image: BaseImage,
    lent: Vec<Lent>,
    snapshots: Vec<Uuid>,
}

impl Flatten {
    pub(in crate::volume::background) fn order(&mut self, reply: Reply) {
        self.replies.push(reply);
    }

    /// Whether it is to be done.
    pub(in crate::volume::background) const fn is_active(&self) -> bool {
        !self.replies.is_empty()
    }

    /// Ends it, wherever it was.
    pub(in crate::volume::background) fn take_orders(&mut self) -> Vec<Reply> {
        std::mem::take(self).replies
    }
}

impl<D: Disk + Clone, T: Timer> Background<D, T> {
    /// Starts the next step, if it is its turn and nothing is in the way. Called when garbage collection has none under way. Returns whether
    /// that has to wait.
    pub(super) fn flatten(&mut self) -> bool {
        self.flatten.had_turn = !self.flatten.had_turn;
        if !self.flatten.had_turn {
            return false;
        }
        let Some(m) = self.published.as_ref().map(|p| &p.manifest) else { return true };
        if m.parents.is_empty() {
            let what = format!("volume {:?} is no clone: there is nothing to flatten", m.name);
            self.end_flatten(&Error::new(ErrorKind::Usage, what));
            return false;
        }
        let Some((image, _)) = self.gc.published.clone() else {
            self.gc.wants_checkpoint = true;
            return true;
        };
        match std::mem::take(&mut self.flatten.stage) {
            Stage::Look => {
                let (store, m) = (self.store.clone(), m.clone());
                self.gc.busy = true;
                self.spawn(async move {
                    let result = async {
                        let needed = snapshots::borrowers(&*store, &m).await?;
                        if needed.is_empty() {
                            let snapshots = m.snapshots.iter().map(|s| s.id).collect();
                            let lent = lent(&image).await;
                            return Ok(Looked { image, lent, snapshots });
                        }
                        let what = format!(
                            "snapshots of volume {:?} need what it was cloned from, too: {}; delete them first",
                            m.name,
                            needed.join(", ")
                        );
                        Err(Error::new(ErrorKind::Busy, what))
                    };
                    Event::Gc(GcDone::Looked(result.await))
                });
            }
            Stage::Copy(image, todo) => self.copy_lent(image, todo),
            Stage::Cut => self.cut_tie(),
        }
        self.tell_flatten();
        self.gc.busy || self.gc.wants_checkpoint
    }

    fn copy_lent(&mut self, image: BaseImage, mut todo: Vec<Lent>) {
        let now = self.timer.now();
        if self.fill(now) >= throttle::START || !self.has_memory(now) {
            self.flatten.stage = Stage::Copy(image, todo);
            return;
        }
        let some = batch(&mut todo, BATCH_BLOCKS, BATCH_CHUNKS);
        let Some(first) = some.first() else {
            // All of it is in the map; the next look is at the map with it.
            (self.flatten.folded, self.gc.wants_checkpoint) = (true, true);
            return;
        };
        let source = first.source;
        let victims = some.iter().map(|l| (l.chunk, l.blocks)).collect();
        self.flatten.stage = Stage::Copy(image.clone(), todo);
        self.read_batch(image, source, victims, GcDone::Copied);
    }

    /// What a look has found decides what comes next.
    pub(super) fn looked(&mut self, looked: Looked) -> Result<()> {
        let f = &mut self.flatten;
        f.looked_at = looked.snapshots;
        let found: u64 = looked.lent.iter().map(|l| u64::from(l.blocks)).sum();
        if f.found.is_some_and(|before| found > 0 && found >= before) {
            let what = format!("{found} blocks of the map still name a parent's chunks after those have been copied");
            return Err(Error::new(ErrorKind::Internal, what));
        }
        if found > 0 {
            (f.found, f.stage) = (Some(found), Stage::Copy(looked.image, looked.lent));
            return Ok(());
        }
        let borrowed = self
            .published
            .as_ref()
            .is_some_and(|p| p.manifest.checkpoint.as_ref().is_some_and(Checkpoint::is_borrowed));
        if borrowed && f.folded {
            let what = "a checkpoint that was to be the volume's own is its parent's";
            return Err(Error::new(ErrorKind::Internal, what));
        }
        if borrowed {
            (f.folded, self.gc.wants_checkpoint) = (true, true);
        } else {
            f.stage = Stage::Cut;
        }
        Ok(())
    }

    fn cut_tie(&mut self) {
        let Some(published) = &self.published else { return };
        let snapshots: Vec<Uuid> = published.manifest.snapshots.iter().map(|s| s.id).collect();
        let borrowed = published.manifest.checkpoint.as_ref().is_some_and(Checkpoint::is_borrowed);
        if snapshots != self.flatten.looked_at || borrowed {
            // One was made meanwhile.
            return;
        }
        let Some(mut published) = self.published.take() else { return };
        let replies = self.flatten.take_orders();
        let store = self.store.clone();
        self.spawn(async move {
            let done = PublishDone::of(snapshots::cut_tie(&*store, &mut published).await);
            Event::Published { published, done, replies }
        });
    }

    /// It cannot be done.
    pub(super) fn end_flatten(&mut self, why: &Error) {
        for reply in self.flatten.take_orders() {
            let _ = reply.send(Err(Error::new(why.kind(), why.to_string())));
        }
        self.tell_flatten();
    }

    /// Whether a checkpoint that is cut now must be of images of the volume's own alone.
    pub(in crate::volume::background) const fn wants_own_images(&self) -> bool {
        self.flatten.folded
    }

    fn tell_flatten(&self) {
        let left = match &self.flatten.stage {
            _ if !self.flatten.is_active() => None,
            Stage::Copy(_, todo) => Some(todo.iter().map(|l| u64::from(l.blocks)).sum::<u64>()),
            Stage::Look => Some(self.flatten.found.unwrap_or(0)),
            Stage::Cut => Some(0),
        };
        let left = left.map(|blocks| blocks * BLOCK as u64);
        self.volume.update_background(|b| b.flatten_left_bytes = left);
    }
}
