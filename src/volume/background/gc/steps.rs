//! The steps of garbage collection: begun here, and their ends taken.

use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::super::{Background, Event, Group, no_trouble, trouble};
use super::{Counted, GcDone, PAUSE_AFTER_REFUSAL, PAUSE_AFTER_TROUBLE};
use crate::chunk::pack::BuiltChunk;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::gc::gather::{Gathered, Ticket, gather, number};
use crate::gc::scan::{Known, Orphans};
use crate::gc::sweep::{Rubbish, Swept, leftovers, sweep};
use crate::gc::usage::Holes;
use crate::map::{BaseImage, Move};
use crate::store::Store;
use crate::time::Timer;
use crate::units::{ChunkNo, GroupNo};
use crate::volume::take::WEAK_PAUSE;

impl<D: Disk + Clone, T: Timer> Background<D, T> {
    pub(super) fn scan(&mut self, of: Counted) {
        let Some(m) = self.published.as_ref().map(|p| p.manifest.clone()) else { return };
        let known = self.gc.known.take();
        let mut known = known.unwrap_or_else(|| Box::new(Known::new(of.image.volume_blocks())));
        let (store, bound) = (self.gc.store.clone(), self.applied_chunk);
        let list = self.gc.listed.is_none();
        self.gc.listed.get_or_insert(self.timer.now());
        self.gc.busy = true;
        self.spawn(async move {
            let result = async {
                let orphans = if list { known.list(&*store, &m, bound).await? } else { Orphans::new() };
                known.look_at_snapshots(&*store, &m).await?;
                Ok(orphans)
            };
            let result = result.await;
            if result.is_ok() {
                known.count(of.image.clone()).await;
            }
            Event::Gc(GcDone::Scanned { known, of: Box::new(of), result })
        });
    }

    pub(super) fn sweep(&mut self, chunks: Vec<ChunkNo>, mut others: Vec<String>) {
        let Some(m) = self.published.as_ref().map(|p| p.manifest.clone()) else { return };
        let version = Some(m.publish_id);
        let is_copied = self.gc.copied == version;
        let copied = if chunks.is_empty() { self.gc.copied } else { version };
        let kept: HashSet<String> = self.gc.parts.iter().flatten().cloned().collect();
        self.gc.busy = true;
        self.gc.untidy = 0;
        let (store, timer) = (self.gc.store.clone(), self.timer.clone());
        self.spawn(async move {
            let result = async {
                if !m.conditional_writes {
                    // Whoever takes the volume by what it said before has written by then, and is seen.
                    timer.sleep(WEAK_PAUSE).await;
                }
                let left = leftovers(&*store, &m, &kept).await?;
                others.extend(left);
                sweep(&*store, &m, Rubbish { chunks, others, is_copied }).await
            };
            Event::Gc(GcDone::Swept { result: result.await, copied })
        });
    }

    pub(super) fn gather(&mut self, victims: Vec<(ChunkNo, u32)>) {
        let Some(known) = &self.gc.known else { return };
        self.read_batch(known.usage.image().clone(), 0, victims, GcDone::Gathered);
    }

    /// Reads what `image` names of chunks of one source.
    pub(super) fn read_batch(
        &mut self,
        image: BaseImage,
        source: u8,
        victims: Vec<(ChunkNo, u32)>,
        done: fn(Result<Gathered>) -> GcDone,
    ) {
        let (keys, bodies) = (self.reader.keys().clone(), self.bodies.clone());
        let store: Arc<dyn Store> = self.gc.store.clone();
        self.gc.busy = true;
        self.spawn(async move { Event::Gc(done(gather(&store, &keys, &image, source, &victims, &bodies).await)) });
    }

    pub(in crate::volume::background) fn garbage_done(&mut self, done: GcDone) {
        let now = self.timer.now();
        self.gc.busy = false;
        self.gc.plan = None;
        let failed = match done {
            GcDone::Scanned { known, of, result } => self.scanned(known, *of, result, now).err(),
            GcDone::Gathered(result) => result.map(|g| self.gathered(g)).err(),
            GcDone::Swept { result, copied } => result.map(|s| self.swept(s, copied, now)).err(),
            GcDone::Looked(result) => {
                let result = result.and_then(|l| self.looked(l));
                return self.flattened(result);
            }
            GcDone::Copied(result) => {
                let result = result.and_then(|g| self.copied(g));
                return self.flattened(result);
            }
        };
        match failed {
            None => {}
            Some(e) if e.kind() == ErrorKind::Fenced => self.fenced(&e),
            Some(e) => {
                let what = "collecting garbage";
                if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported | ErrorKind::NotFound) {
                    tracing::warn!("{what}: {e}: nothing is deleted");
                    self.gc.not_before = now + PAUSE_AFTER_REFUSAL;
                } else {
                    trouble(&self.volume, what, &e);
                    self.gc.not_before = now + PAUSE_AFTER_TROUBLE;
                }
                self.gc.ordered = false;
                self.gc.order_last = None;
                self.gc.uncounted = true;
                for reply in self.gc.take_orders() {
                    let _ = reply.send(Err(Error::new(e.kind(), format!("{what}: {e}"))));
                }
            }
        }
    }

    fn scanned(&mut self, known: Box<Known>, of: Counted, result: Result<Orphans>, now: Duration) -> Result<()> {
        let gc = &mut self.gc;
        let known = gc.known.insert(known);
        for (chunk, stored, holes) in gc.came.drain(..) {
            known.usage.add(chunk, stored, holes);
        }
        let orphans = result.inspect_err(|_| gc.listed = None)?;
        no_trouble(&self.volume);
        for key in orphans {
            gc.orphans.entry(key).or_insert(now);
        }
        gc.space = known.usage.space(&known.held, of.last_chunk);
        if std::mem::take(&mut gc.joining) {
            gc.bounds.marks = known.usage.stored(of.last_chunk).filter(|c| c.1.is_marks()).count();
        }
        gc.mapped_then = of.image.mapped_blocks();
        gc.came_since = known.usage.stored(ChunkNo(u64::MAX)).filter(|c| c.0 > of.last_chunk).map(|c| c.1.size()).sum();
        gc.counted = Some((of.last_chunk, of.snapshots));
        self.tell_space();
        Ok(())
    }

    /// A step of flattening has ended.
    fn flattened(&mut self, result: Result<()>) {
        match result {
            Ok(()) => no_trouble(&self.volume),
            Err(e) if e.kind() == ErrorKind::Fenced => self.fenced(&e),
            Err(e) => self.end_flatten(&e),
        }
    }

    /// Blocks of parents' chunks were read.
    fn copied(&mut self, mut g: Gathered) -> Result<()> {
        if let Some((chunk, e)) = g.stuck.pop() {
            return Err(e.context(format!("copying what is needed of chunk {chunk} of a parent")));
        }
        self.gathered(g);
        Ok(())
    }

    fn gathered(&mut self, g: Gathered) {
        let gc = &mut self.gc;
        no_trouble(&self.volume);
        gc.told.gc_read_bytes += g.read_bytes;
        if let Some(known) = &mut gc.known {
            for (chunk, e) in &g.stuck {
                tracing::error!("garbage collection leaves chunk {chunk} as it is: {e}");
                known.usage.set_stuck(*chunk);
            }
            g.were_empty.iter().for_each(|n| known.usage.set_holes(*n, Holes::None));
        }
        gc.emptying = g.emptied.into_iter().filter(|n| !g.were_empty.contains(n)).collect();
        if !g.drafts.is_empty() {
            gc.busy = true;
            gc.drafts = Some(g.drafts);
        }
    }

    /// Puts a batch in line with the groups.
    pub(in crate::volume::background) fn number_batch(&mut self) {
        if self.groups.iter().any(|g| g.chunks.is_none()) {
            return;
        }
        let Some(drafts) = self.gc.drafts.take() else { return };
        let ticket = Ticket {
            volume: self.volume.log.volume(),
            epoch: self.epoch,
            nonce: self.nonce,
            first_chunk: self.next_chunk,
            applied: (self.applied, self.applied_seq),
        };
        let (chunks, moves) = match number(drafts, &ticket) {
            Ok(made) => made,
            Err(e) => {
                tracing::error!("collecting garbage: {e}");
                let gc = &mut self.gc;
                (gc.busy, gc.plan) = (false, None);
                let emptying = std::mem::take(&mut gc.emptying);
                if let Some(known) = &mut gc.known {
                    emptying.into_iter().for_each(|n| known.usage.set_stuck(n));
                }
                return;
            }
        };
        let now = self.timer.now();
        self.next_chunk = ChunkNo(self.next_chunk.0 + chunks.len() as u64);
        self.uploads.extend(chunks.iter().map(|c| (GroupNo(0), c.clone())));
        self.groups.push_back(Group {
            number: GroupNo(0),
            through: self.applied_seq,
            bytes: 0,
            since: now,
            cut_at: now,
            built_at: now,
            left: chunks.len(),
            chunks: Some(Rc::new(chunks)),
            moves: Some(moves),
        });
    }

    /// A batch is in the store.
    pub(in crate::volume::background) fn retire_batch(&mut self, chunks: &[BuiltChunk], moves: &[Move]) {
        let moved = self.volume.maps.move_blocks(moves);
        for c in chunks {
            self.reader.keep(0, c.header.clone());
            self.applied_chunk = self.applied_chunk.max(c.header.chunk);
            self.gc.note_chunk(&c.header);
            self.gc.told.gc_written_bytes += c.body.len() as u64;
            self.gc.chunks_written += 1;
        }
        // What stood behind it did not take so long itself.
        self.last_retired = self.timer.now();
        let gc = &mut self.gc;
        (gc.busy, gc.plan) = (false, None);
        let last = chunks.iter().map(|c| c.header.chunk).max().unwrap_or_default();
        let emptied = std::mem::take(&mut gc.emptying);
        if let Some(known) = &mut gc.known {
            // What they record of discards is recorded elsewhere now.
            emptied.iter().for_each(|n| known.usage.set_holes(*n, Holes::None));
        }
        gc.bounds.moved.extend(emptied.into_iter().map(|n| (n, last)));
        tracing::debug!(chunks = chunks.len(), of = moves.len(), moved, "live blocks were put together");
    }

    fn swept(&mut self, s: Swept, copied: Option<Uuid>, now: Duration) {
        let gc = &mut self.gc;
        no_trouble(&self.volume);
        gc.copied = copied;
        gc.bounds.refused.extend(s.refused.iter().map(|n| (*n, now)));
        for key in &s.others {
            gc.orphans.remove(key);
        }
        // One that could not be deleted waits once more.
        let grace = self.volume.gc.grace;
        gc.orphans.values_mut().filter(|seen| now.saturating_sub(**seen) >= grace).for_each(|seen| *seen = now);
        gc.told.gc_deleted_chunks += s.chunks.len() as u64;
        gc.told.gc_deleted_objects += (s.chunks.len() + s.others.len()) as u64;
        if let Some(known) = &mut gc.known {
            s.chunks.iter().for_each(|n| known.usage.remove(*n));
            let before = gc.space.stored;
            gc.space = known.usage.space(&known.held, gc.counted.as_ref().map_or(ChunkNo(0), |c| c.0));
            let freed = before.saturating_sub(gc.space.stored);
            let count = s.chunks.len() + s.others.len();
            if count > 0 {
                let name = self.volume.name();
                tracing::info!(
                    "volume {name:?}: {count} objects are deleted that nothing needs any more ({freed} blocks)"
                );
            }
        }
        self.tell_space();
    }

    fn tell_space(&mut self) {
        let (bytes, told) = (self.gc.space.in_bytes(), &mut self.gc.told);
        told.logical_bytes = bytes.logical;
        told.mapped_bytes = bytes.mapped;
        told.shared_bytes = bytes.shared;
        told.stored_bytes = bytes.stored;
        told.live_bytes = bytes.live;
        told.snapshot_bytes = bytes.held;
        told.garbage_bytes = bytes.garbage;
        told.gc_requests = self.gc.store.snapshot().total_requests() + self.gc.chunks_written;
        let told = *told;
        self.volume.update_background(|b| b.space = Some(told));
    }
}
