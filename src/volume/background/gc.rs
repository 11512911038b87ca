//! Garbage collection of an attached volume: when, and what of it goes on. What it does is told in [`crate::gc`].
//!
//! Invariants:
//! - One step at a time: a scan, which has what is known with it; a batch, from its reading until it is in the map; or a sweep.
//! - New chunks are numbered when no group is being built, and stand in line with the groups: so they are applied in the order of their
//!   numbers, and a checkpoint's last chunk number is true of all below it.
//! - A batch is a [`Group`] with moves instead of entries; nothing that packs merges over its blocks.
//! - What is deleted is dead in the image that was published last, which is the one that was counted.

mod flatten;
mod steps;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

pub(super) use flatten::Flatten;
use flatten::Looked;
use uuid::Uuid;

use super::{Background, Reply};
use crate::chunk::header::{ChunkHeader, ExtentKind};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::gc::Policy;
use crate::gc::gather::{Draft, Gathered};
use crate::gc::plan::{BATCH_BLOCKS, Bounds, Plan, batch_blocks, is_due, plan};
use crate::gc::scan::{Known, Orphans};
use crate::gc::sweep::{Swept, part_keys};
use crate::gc::usage::{HEADER_BLOCKS, Holes, Space};
use crate::manifest::Manifest;
use crate::map::BaseImage;
use crate::store::Store;
use crate::store::metrics::Metrics;
use crate::time::Timer;
use crate::units::ChunkNo;
use crate::volume::{SpaceStatus, throttle};

/// After a step that has failed.
const PAUSE_AFTER_TROUBLE: Duration = Duration::from_secs(10);
/// After one that is of no use to be made again at once: what is damaged, or may not be deleted.
const PAUSE_AFTER_REFUSAL: Duration = Duration::from_secs(600);
/// The store is listed only after so many of the policy's pauses: a short attachment collects nothing.
const PAUSES_FIRST: u32 = 6;
/// With enough garbage for a round only this part of the pause is kept.
const SHORT_PAUSE: u32 = 10;
/// While the log is filling up, garbage is collected only when there is so many times more of it than begins a round.
const URGENT: u64 = 2;
/// Seconds that a round takes, about, until what it has emptied is deleted.
const ROUND_TAKES: f64 = 0.8;
/// Seconds over which the pace is reckoned.
const RATE_OVER: f64 = 2.0;
/// However fast garbage grows, so much of the usual share begins a round.
const LEAST_START: f64 = 0.5;
/// Between two batches while memory is short.
const PAUSE_WHILE_SHORT: Duration = Duration::from_secs(60);
/// Between two looks at how much garbage there is.
const LOOK: Duration = Duration::from_millis(100);
/// What older checkpoints have left is looked for once in so many checkpoints, and whenever chunks are deleted.
const TIDY_AFTER: u32 = 8;

/// How a step has ended.
pub(in crate::volume) enum GcDone {
    Scanned {
        known: Box<Known>,
        of: Box<Counted>,
        result: Result<Orphans>,
    },
    Gathered(Result<Gathered>),
    Swept {
        result: Result<Swept>,
        copied: Option<Uuid>,
    },
    /// Steps of flattening.
    Looked(Result<Looked>),
    Copied(Result<Gathered>),
}

/// What was counted.
pub(in crate::volume) struct Counted {
    image: BaseImage,
    last_chunk: ChunkNo,
    snapshots: Vec<Uuid>,
}

/// How fast garbage grows, as of the last look.
#[derive(Default)]
struct Pace {
    at: Duration,
    grown: u64,
    mapped: u64,
    /// In blocks per second.
    rate: f64,
}

/// See the module's page.
pub(super) struct Gc {
    /// Counts what it asks for.
    store: Arc<Metrics>,
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
    /// Nothing is done before the first, nor before the second if there is not enough garbage for a round.
    rest: (Duration, Duration),
    /// Since when a batch has been waiting for memory.
    short_since: Option<Duration>,
    /// Blocks of groups' chunks that have come since the attach, and how fast.
    grown: u64,
    pace: Pace,
    looked: Duration,
    /// Objects for nobody, and when they were first seen.
    orphans: BTreeMap<String, Duration>,
    /// Those of an order have been tried.
    orphans_tried: bool,
    /// When the store was listed last; `None`: it is to be listed.
    listed: Option<Duration>,
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
    /// Chunks that it has written.
    chunks_written: u64,
}

impl Gc {
    pub(super) fn new(store: &Arc<dyn Store>) -> Self {
        Self {
            store: Arc::new(Metrics::new(Arc::clone(store))),
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
            rest: (Duration::ZERO, Duration::ZERO),
            short_since: None,
            grown: 0,
            pace: Pace::default(),
            looked: Duration::ZERO,
            orphans: BTreeMap::new(),
            listed: None,
            orphans_tried: false,
            untidy: 0,
            parts: Default::default(),
            copied: None,
            orders: Vec::new(),
            ordered: false,
            order_last: None,
            told: SpaceStatus::default(),
            chunks_written: 0,
        }
    }

    /// A volume was taken up, at the time `now`. `image` is the published map, where it is known.
    pub(super) fn begin(&mut self, m: &Manifest, image: Option<BaseImage>, now: Duration, policy: &Policy) {
        let mapped_blocks = image.as_ref().map_or(0, BaseImage::mapped_blocks);
        let last = m.last_chunk();
        self.rest(now, policy, PAUSES_FIRST);
        self.mapped_then = mapped_blocks;
        self.parts[0] = part_keys(m);
        self.uncounted = image.is_some();
        self.published = image.map(|i| (i, last));
    }

    /// Between two rounds, or so many times as long before the first.
    fn rest(&mut self, now: Duration, policy: &Policy, pauses: u32) {
        self.rest = (now + policy.pause / SHORT_PAUSE, now + policy.pause * pauses);
    }

    /// What is collected by while so much comes: a round takes its time, so it begins the earlier, the faster garbage grows.
    fn ahead(&mut self, policy: &Policy, mapped: u64, now: Duration) -> Policy {
        let since = now.saturating_sub(self.pace.at);
        if since >= LOOK {
            // What is new in the map is no garbage.
            let more = (self.grown - self.pace.grown) as f64 - mapped.saturating_sub(self.pace.mapped) as f64;
            let rate = more.max(0.0) / since.as_secs_f64();
            let weight = (since.as_secs_f64() / RATE_OVER).min(1.0);
            let rate = self.pace.rate.mul_add(1.0 - weight, rate * weight);
            self.pace = Pace { at: now, grown: self.grown, mapped, rate };
        }
        let (live, _) = self.estimate(mapped);
        let lead = self.pace.rate * ROUND_TAKES / live.max(1) as f64;
        let start = (policy.start - lead).max(policy.start * LEAST_START);
        Policy { start, stop: (policy.stop - (policy.start - start)).max(0.0), ..policy.clone() }
    }

    /// Blocks that live, and those that are garbage, by what has come and what is `mapped` since the last count. Before the first count
    /// all that was there is taken for live.
    fn estimate(&self, mapped: u64) -> (u64, u64) {
        let live = if self.counted.is_some() { self.space.live } else { self.mapped_then };
        let live = (live + mapped).saturating_sub(self.mapped_then);
        (live, (self.space.garbage + self.came_since + self.mapped_then).saturating_sub(mapped))
    }

    /// The manifest names this map now.
    pub(super) fn note_published(&mut self, m: &Manifest, image: BaseImage) {
        let last = m.last_chunk();
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

    /// The store, through which all requests count as its own.
    pub(super) fn store(&self) -> Arc<dyn Store> {
        self.store.clone()
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
        self.busy || (self.in_round || self.ordered) && now >= self.not_before.max(self.rest.0)
    }

    pub(super) fn order(&mut self, reply: Reply) {
        self.orders.push(reply);
        self.ordered = false;
        self.listed = None;
        self.orphans_tried = false;
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
        // Of no group: garbage collection's own.
        if h.group.0 != 0 {
            self.grown += u64::from(came.1);
        }
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
            let orders = self.gc.take_orders().into_iter().chain(self.flatten.take_orders());
            for reply in orders {
                let _ = reply.send(Err(Error::new(ErrorKind::Busy, "the volume is being detached")));
            }
            return;
        }
        if self.flatten.is_active() && (self.gc.busy || self.gc.wants_checkpoint || self.flatten()) {
            return;
        }
        let (usual, ordered) = (&self.volume.gc, !self.gc.orders.is_empty());
        if self.gc.busy || !ordered && (!usual.enabled || now < self.gc.not_before.max(self.gc.rest.0)) {
            return;
        }
        // A look takes the locks of the map, which lanes want too.
        let collecting = self.gc.in_round || ordered;
        if !collecting && now.saturating_sub(self.gc.looked) < LOOK.min(usual.pause) {
            return;
        }
        self.gc.looked = now;
        let mapped = self.volume.maps.stats().mapped_blocks;
        let policy = if ordered { usual.thorough() } else { self.gc.ahead(usual, mapped, now) };
        if !ordered && now < self.gc.rest.1 {
            let (live, garbage) = self.gc.estimate(mapped);
            if !is_due(garbage.saturating_sub(self.gc.residue), live, &policy) {
                return;
            }
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
        if self.gc.listed.is_some_and(|at| now.saturating_sub(at) >= self.volume.gc.relist) {
            self.gc.listed = None;
            self.gc.uncounted = true;
        }
        let snapshots: Vec<Uuid> = m.snapshots.iter().map(|s| s.id).collect();
        if self.gc.uncounted || self.gc.counted.as_ref().is_none_or(|c| c.1 != snapshots) {
            self.gc.uncounted = false;
            self.scan(Counted { image, last_chunk, snapshots });
            return;
        }
        self.decide(&policy, mapped, now);
    }

    /// Whether a batch may be read now: where memory is short, one goes through once in a while, since it may be so for good.
    pub(super) fn has_memory(&mut self, now: Duration) -> bool {
        if !self.memory.is_short() {
            self.gc.short_since = None;
            return true;
        }
        let since = *self.gc.short_since.get_or_insert_with(|| {
            tracing::info!("memory is short: garbage collection and flattening go slowly");
            now
        });
        let is_over = now.saturating_sub(since) >= PAUSE_WHILE_SHORT;
        if is_over {
            self.gc.short_since = Some(now);
        }
        is_over
    }

    /// What is known is true of the published map.
    fn decide(&mut self, policy: &Policy, mapped: u64, now: Duration) {
        let ordered = !self.gc.orders.is_empty();
        let fill = self.fill(now);
        let gc = &mut self.gc;
        let (Some((last, _)), Some(known)) = (&gc.counted, &gc.known) else { return };
        let collecting = gc.in_round || ordered;
        let (live, garbage) = gc.estimate(mapped);
        gc.bounds.last = gc.order_last.filter(|_| ordered).map_or(*last, |l| l.min(*last));
        gc.bounds.refused.retain(|_, since| now.saturating_sub(*since) < PAUSE_AFTER_REFUSAL);
        let plan = gc.plan.get_or_insert_with(|| plan(&known.usage, &known.held, &gc.bounds, policy));
        // Whoever uploaded them has lost the volume, and nothing can make them count: an order does not wait, once.
        let at_once = ordered && !gc.orphans_tried;
        let is_over = |seen: Duration| at_once || now.saturating_sub(seen) >= policy.grace;
        let others: Vec<String> = gc.orphans.iter().filter(|(_, s)| is_over(**s)).map(|(key, _)| key.clone()).collect();
        gc.orphans_tried |= ordered;
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
        // What was copied is there twice until it is deleted, which a small volume does not wait with.
        let enough = !gc.bounds.moved.is_empty() && batch_blocks(live) < BATCH_BLOCKS;
        let wants_batch = collecting && !plan.victims.is_empty() && !enough;
        if wants_batch && (urgent || fill < throttle::START) && self.has_memory(now) {
            let Some(plan) = &mut self.gc.plan else { return };
            let victims = std::mem::take(&mut plan.victims);
            self.gc.joining |= plan.is_marks;
            self.gather(victims);
            return;
        }
        let gc = &mut self.gc;
        if !gc.bounds.moved.is_empty() {
            gc.wants_checkpoint = true;
            return;
        }
        if wants_batch {
            return;
        }
        if collecting {
            gc.in_round = false;
            gc.ordered = false;
            gc.order_last = None;
            gc.plan = None;
            gc.rest(now, &self.volume.gc, 1);
            let normal = (live as f64 * self.volume.gc.stop) as u64 + self.volume.gc.slack_blocks;
            gc.residue = garbage.saturating_sub(normal);
            for reply in gc.take_orders() {
                let _ = reply.send(Ok(()));
            }
        }
    }
}
