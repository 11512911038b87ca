//! Garbage collection of an attached volume: when, and what of it goes on. What it does is told in [`crate::gc`].
//!
//! Invariants:
//! - One step at a time: a scan, which has what is known with it; a batch, from its reading until it is in the map; or a sweep.
//! - New chunks are numbered when no group is being built, and stand in line with the groups: so they are applied in the order of their
//!   numbers, and a checkpoint's last chunk number is true of all below it.
//! - A batch is a [`Group`] with moves instead of entries; nothing that packs merges over its blocks.
//! - What is deleted is dead in the image that was published last, which is the one that was counted.

mod steps;

use std::collections::HashSet;
use std::time::Duration;

use uuid::Uuid;

use super::{Background, Reply};
use crate::chunk::header::{ChunkHeader, ExtentKind};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::gc::Policy;
use crate::gc::gather::{Draft, Gathered};
use crate::gc::plan::{Bounds, Plan, is_due, plan};
use crate::gc::scan::{Known, Orphans};
use crate::gc::sweep::{Swept, part_keys};
use crate::gc::usage::{HEADER_BLOCKS, Holes, Space};
use crate::manifest::Manifest;
use crate::map::BaseImage;
use crate::time::Timer;
use crate::units::ChunkNo;
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
}
