//! Garbage collection of an attached volume: when, and what of it goes on. What it does is told in [`crate::gc`].
//!
//! Invariants:
//! - One step at a time: a scan, which has what is known with it; a batch, from its reading until it is in the map; or a sweep.
//! - New chunks are numbered when no group is being built, and stand in line with the groups: so they are applied in the order of their
//!   numbers, and a checkpoint's last chunk number is true of all below it.
//! - A batch is a [`Group`] with moves instead of entries; nothing that packs merges over its blocks.
//! - What is deleted is dead in the image that was published last, which is the one that was counted.

use std::collections::HashSet;
use std::rc::Rc;
use std::time::Duration;

use uuid::Uuid;

use super::{Background, Event, Group, Reply, no_trouble, trouble};
use crate::chunk::header::{ChunkHeader, ExtentKind};
use crate::chunk::pack::BuiltChunk;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::gc::Policy;
use crate::gc::gather::{Draft, Gathered, Ticket, gather, number};
use crate::gc::plan::{Bounds, Plan, is_due, plan};
use crate::gc::scan::{Known, Orphans};
use crate::gc::sweep::{Rubbish, Swept, leftovers, part_keys, sweep};
use crate::gc::usage::{HEADER_BLOCKS, Holes, Space};
use crate::manifest::Manifest;
use crate::map::{BaseImage, Move};
use crate::time::Timer;
use crate::units::{BLOCK, ChunkNo, GroupNo};
use crate::volume::take::WEAK_PAUSE;
use crate::volume::{SpaceStatus, throttle};

/// After a step that has failed.
const PAUSE_AFTER_TROUBLE: Duration = Duration::from_secs(10);
/// After one that is of no use to be made again at once: what is damaged, or may not be deleted.
const PAUSE_AFTER_REFUSAL: Duration = Duration::from_secs(600);
/// The store is listed only after so many of the policy's pauses: a short attachment collects nothing.
const PAUSES_FIRST: u32 = 6;
/// While the log is filling up, garbage is collected only when there is so many times more of it than begins a round.
const URGENT: u64 = 2;
/// Between two looks at how much garbage there is.
const LOOK: Duration = Duration::from_secs(1);
/// What older checkpoints have left is looked for once in so many checkpoints, and whenever chunks are deleted.
const TIDY_AFTER: u32 = 8;

/// How a step has ended.
pub(in crate::volume) enum GcDone {
    Scanned { known: Box<Known>, of: Box<Counted>, result: Result<Orphans> },
    Gathered(Result<Gathered>),
    Swept { result: Result<Swept>, copied: Option<Uuid> },
}

/// What was counted.
pub(in crate::volume) struct Counted {
    image: BaseImage,
    last_chunk: ChunkNo,
    snapshots: Vec<Uuid>,
}

/// See the module's page.
pub(super) struct Gc {
    /// A step is under way.
    busy: bool,
    /// Absent while it is being scanned.
    known: Option<Box<Known>>,
    /// Chunks that came meanwhile.
    came: Vec<(ChunkNo, u16, Holes)>,
    /// What the manifest names: its map, and its last chunk number. Absent until this attachment knows it.
    published: Option<(BaseImage, ChunkNo)>,
    /// What was counted last is not that any more.
    uncounted: bool,
    counted: Option<(ChunkNo, Vec<Uuid>)>,
    space: Space,
    /// Blocks that the map named at the last count, whoever's they are; and blocks of chunks that came into the store since.
    mapped_then: u64,
    came_since: u64,
    /// A batch that waits for its numbers, and what it empties.
    drafts: Option<Vec<Draft>>,
    emptying: Vec<ChunkNo>,
    bounds: Bounds,
    /// What is to be done next; made anew when anything has changed.
    plan: Option<Plan>,
    /// Discards are being put together.
    joining: bool,
    /// Garbage that the last round could not bring back, in blocks.
    residue: u64,
    /// Garbage is collected until there is little of it.
    in_round: bool,
    wants_checkpoint: bool,
    not_before: Duration,
    looked: Duration,
    /// Objects for nobody, by when they were first seen.
    orphans: Vec<(Duration, String)>,
    /// Checkpoints since leftovers were looked for.
    untidy: u32,
    /// The parts of maps that the manifest names, and those that it named before: somebody may be reading them.
    parts: [HashSet<String>; 2],
    /// The version of the manifest that there is a copy of.
    copied: Option<Uuid>,
    orders: Vec<Reply>,
    /// The orders' round has begun; and the last chunk number of the checkpoint that was cut for it: what comes later is left to later rounds.
    ordered: bool,
    order_last: Option<ChunkNo>,
    told: SpaceStatus,
}

impl Gc {
    pub(super) fn new() -> Self {
        Self {
            busy: false,
            known: None,
            came: Vec::new(),
            published: None,
            uncounted: false,
            counted: None,
            space: Space::default(),
            mapped_then: 0,
            came_since: 0,
            drafts: None,
            emptying: Vec::new(),
            bounds: Bounds::default(),
            plan: None,
            joining: false,
            residue: 0,
            in_round: false,
            wants_checkpoint: false,
            not_before: Duration::ZERO,
            looked: Duration::ZERO,
            orphans: Vec::new(),
            untidy: 0,
            parts: Default::default(),
            copied: None,
            orders: Vec::new(),
            ordered: false,
            order_last: None,
            told: SpaceStatus::default(),
        }
    }

    /// A volume was taken up, at the time `now`. `image` is the published map, where it is known.
    pub(super) fn begin(&mut self, m: &Manifest, image: Option<BaseImage>, now: Duration, policy: &Policy) {
        let last = m.checkpoint.as_ref().map_or(ChunkNo(0), |c| c.last_chunk);
        self.not_before = now + policy.pause * PAUSES_FIRST;
        self.parts[0] = part_keys(m);
        self.uncounted = image.is_some();
        self.published = image.map(|i| (i, last));
    }

    /// The manifest names this map now.
    pub(super) fn note_published(&mut self, m: &Manifest, image: BaseImage) {
        let last = m.checkpoint.as_ref().map_or(ChunkNo(0), |c| c.last_chunk);
        self.published = Some((image, last));
        self.uncounted = true;
        // A batch that came after the cut is in no published map yet.
        self.bounds.moved.retain(|_, batch| *batch > last);
        let parts = part_keys(m);
        if parts != self.parts[0] {
            self.parts = [parts, std::mem::take(&mut self.parts[0])];
            self.untidy += 1;
        }
    }

    /// Whether a checkpoint is to be published for its sake.
    pub(super) const fn wants_checkpoint(&self) -> bool {
        self.wants_checkpoint
    }

    /// A checkpoint is cut, with chunks up to `last`.
    pub(super) fn note_cut(&mut self, last: ChunkNo) {
        self.wants_checkpoint = false;
        if self.ordered {
            self.order_last.get_or_insert(last);
        }
    }

    /// Whether it is about to do something.
    pub(super) fn is_active(&self, now: Duration) -> bool {
        self.busy || (self.in_round || self.ordered) && now >= self.not_before
    }

    pub(super) fn order(&mut self, reply: Reply) {
        self.orders.push(reply);
        self.ordered = false;
        self.order_last = None;
        self.plan = None;
    }

    pub(super) fn take_orders(&mut self) -> Vec<Reply> {
        std::mem::take(&mut self.orders)
    }

    /// A chunk is in the store and in the map.
    pub(super) fn note_chunk(&mut self, h: &ChunkHeader) {
        let has_holes = h.extents.iter().any(|e| e.kind == ExtentKind::Discard);
        let came = (h.chunk, h.stored_blocks() as u16, if has_holes { Holes::Some } else { Holes::None });
        self.came_since += u64::from(came.1) + HEADER_BLOCKS;
        match &mut self.known {
            Some(k) => k.usage.add(came.0, came.1, came.2),
            None => self.came.push(came),
        }
    }
}

impl<D: Disk + Clone, T: Timer> Background<D, T> {
    /// Starts the next step, if one is due.
    pub(super) fn collect_garbage(&mut self, now: Duration) {
        if self.detach.is_some() {
            self.gc.drafts = None;
            for reply in self.gc.take_orders() {
                let _ = reply.send(Err(Error::new(ErrorKind::Busy, "the volume is being detached")));
            }
            return;
        }
        let ordered = !self.gc.orders.is_empty();
        let policy = if ordered { self.volume.gc.thorough() } else { self.volume.gc.clone() };
        if self.gc.busy || !policy.enabled || !ordered && now < self.gc.not_before {
            return;
        }
        if ordered && !self.gc.ordered {
            // What is garbage now is to be seen.
            self.gc.ordered = true;
            self.gc.wants_checkpoint = true;
        }
        // While the manifest is being changed nobody knows what it says.
        let Some(m) = self.published.as_ref().map(|p| &p.manifest) else { return };
        if self.gc.wants_checkpoint {
            return;
        }
        let Some((image, last_chunk)) = self.gc.published.clone() else {
            self.gc.wants_checkpoint = true;
            return;
        };
        let snapshots: Vec<Uuid> = m.snapshots.iter().map(|s| s.id).collect();
        if self.gc.uncounted || self.gc.counted.as_ref().is_none_or(|c| c.1 != snapshots) {
            self.gc.uncounted = false;
            self.scan(Counted { image, last_chunk, snapshots });
            return;
        }
        self.decide(&policy, now);
    }

    fn scan(&mut self, of: Counted) {
        let Some(m) = self.published.as_ref().map(|p| p.manifest.clone()) else { return };
        let known = self.gc.known.take();
        let mut known = known.unwrap_or_else(|| Box::new(Known::new(of.image.volume_blocks())));
        let (store, bound) = (self.store.clone(), self.applied_chunk);
        self.gc.busy = true;
        self.spawn(async move {
            let result = async {
                let orphans = if known.listed { Orphans::new() } else { known.list(&*store, &m, bound).await? };
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

    /// What is known is true of the published map.
    fn decide(&mut self, policy: &Policy, now: Duration) {
        let ordered = !self.gc.orders.is_empty();
        let fill = self.fill(now);
        let gc = &mut self.gc;
        let (Some((last, _)), Some(known)) = (&gc.counted, &gc.known) else { return };
        let collecting = gc.in_round || ordered;
        if !collecting && now.saturating_sub(gc.looked) < LOOK.min(policy.pause) {
            return;
        }
        gc.looked = now;
        let mapped = self.volume.maps.stats().mapped_blocks;
        let live = (gc.space.live + mapped).saturating_sub(gc.mapped_then);
        let garbage = (gc.space.garbage + gc.came_since + gc.mapped_then).saturating_sub(mapped);
        gc.bounds.last = gc.order_last.filter(|_| ordered).map_or(*last, |l| l.min(*last));
        gc.bounds.refused.retain(|_, since| now.saturating_sub(*since) < PAUSE_AFTER_REFUSAL);
        let plan = gc.plan.get_or_insert_with(|| plan(&known.usage, &known.held, &gc.bounds, policy));
        let is_over = |o: &&(Duration, String)| now.saturating_sub(o.0) >= policy.grace;
        let others: Vec<String> = gc.orphans.iter().filter(is_over).map(|o| o.1.clone()).collect();
        if !plan.dead.is_empty() || !others.is_empty() || gc.untidy >= TIDY_AFTER {
            let dead = std::mem::take(&mut plan.dead);
            self.sweep(dead, others);
            return;
        }
        if is_due(garbage.saturating_sub(gc.residue), live, policy) && !gc.in_round {
            gc.in_round = true;
            if gc.came_since > 0 || gc.mapped_then != mapped {
                // What was counted is not all.
                gc.wants_checkpoint = true;
                return;
            }
        }
        let urgent = garbage > (live as f64 * policy.start) as u64 * URGENT + policy.slack_blocks * URGENT;
        if collecting && !plan.victims.is_empty() {
            if urgent || fill < throttle::START {
                gc.joining |= plan.is_marks;
                let victims = std::mem::take(&mut plan.victims);
                self.gather(victims);
            }
            return;
        }
        if !gc.bounds.moved.is_empty() {
            gc.wants_checkpoint = true;
            return;
        }
        if collecting {
            gc.in_round = false;
            gc.ordered = false;
            gc.order_last = None;
            gc.plan = None;
            gc.not_before = now + self.volume.gc.pause;
            let normal = (live as f64 * self.volume.gc.stop) as u64 + self.volume.gc.slack_blocks;
            gc.residue = garbage.saturating_sub(normal);
            for reply in gc.take_orders() {
                let _ = reply.send(Ok(()));
            }
        }
    }

    fn sweep(&mut self, chunks: Vec<ChunkNo>, mut others: Vec<String>) {
        let Some(m) = self.published.as_ref().map(|p| p.manifest.clone()) else { return };
        let version = Some(m.publish_id);
        let is_copied = self.gc.copied == version;
        let copied = if chunks.is_empty() { self.gc.copied } else { version };
        let kept: HashSet<String> = self.gc.parts.iter().flatten().cloned().collect();
        self.gc.busy = true;
        self.gc.untidy = 0;
        let (store, timer) = (self.store.clone(), self.timer.clone());
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

    fn gather(&mut self, victims: Vec<(ChunkNo, u32)>) {
        let Some(known) = &self.gc.known else { return };
        let image = known.usage.image().clone();
        let (store, keys, bodies) = (self.store.clone(), self.reader.keys().clone(), self.bodies.clone());
        self.gc.busy = true;
        self.spawn(async move { Event::Gc(GcDone::Gathered(gather(&store, &keys, &image, &victims, &bodies).await)) });
    }

    pub(super) fn garbage_done(&mut self, done: GcDone) {
        let now = self.timer.now();
        self.gc.busy = false;
        self.gc.plan = None;
        let failed = match done {
            GcDone::Scanned { known, of, result } => self.scanned(known, *of, result, now).err(),
            GcDone::Gathered(result) => result.map(|g| self.gathered(g)).err(),
            GcDone::Swept { result, copied } => result.map(|s| self.swept(s, copied, now)).err(),
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
        let orphans = result?;
        no_trouble(&self.volume);
        gc.orphans.extend(orphans.into_iter().map(|key| (now, key)));
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

    fn gathered(&mut self, g: Gathered) {
        let gc = &mut self.gc;
        no_trouble(&self.volume);
        gc.told.gc_read_bytes += g.read_bytes;
        if let Some(known) = &mut gc.known {
            g.stuck.iter().for_each(|n| known.usage.set_stuck(*n));
            g.were_empty.iter().for_each(|n| known.usage.set_holes(*n, Holes::None));
        }
        gc.emptying = g.emptied.into_iter().filter(|n| !g.were_empty.contains(n)).collect();
        if !g.drafts.is_empty() {
            gc.busy = true;
            gc.drafts = Some(g.drafts);
        }
    }

    /// Puts a batch in line with the groups.
    pub(super) fn number_batch(&mut self) {
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
    pub(super) fn retire_batch(&mut self, chunks: &[BuiltChunk], moves: &[Move]) {
        let moved = self.volume.maps.move_blocks(moves);
        for c in chunks {
            self.reader.keep(0, c.header.clone());
            self.applied_chunk = self.applied_chunk.max(c.header.chunk);
            self.gc.note_chunk(&c.header);
            self.gc.told.gc_written_bytes += c.body.len() as u64;
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
        gc.orphans.retain(|o| !s.others.contains(&o.1));
        // One that could not be deleted waits once more.
        let grace = self.volume.gc.grace;
        gc.orphans.iter_mut().filter(|o| now.saturating_sub(o.0) >= grace).for_each(|o| o.0 = now);
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
        let bytes = |blocks: u64| blocks * BLOCK as u64;
        let (s, told) = (self.gc.space, &mut self.gc.told);
        told.stored_bytes = bytes(s.stored);
        told.live_bytes = bytes(s.live);
        told.snapshot_bytes = bytes(s.held);
        told.garbage_bytes = bytes(s.garbage);
        let told = *told;
        self.volume.update_background(|b| b.space = Some(told));
    }
}
