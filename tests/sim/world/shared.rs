//! What all lives of a volume share: what was asked of it, and what is known of that.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join3;
use vb_ublk::config::FlushTo;
use vb_ublk::disk::IoBuf;
use vb_ublk::error::{ErrorKind, Result};
use vb_ublk::gc::Policy;
use vb_ublk::store::Store;
use vb_ublk::time::Timer;
use vb_ublk::units::{Lba, SECTOR};
use vb_ublk::volume::engine::{Engine, IoFault};
use vb_ublk::volume::{Command, Volume};

use super::life::Life;
use super::{Lane, Outcome, SECTORS, Seen, content, stamps};
use crate::clone;
use crate::oracle::Oracle;
use crate::support_rng::Rng;

/// Sectors that a request in flight touches.
#[derive(Clone, Copy)]
pub(super) struct Range {
    pub(super) number: u64,
    pub(super) lba: u64,
    pub(super) sectors: u64,
}

pub(super) struct Shared {
    pub(super) rng: RefCell<Rng>,
    pub(super) oracle: RefCell<Oracle>,
    /// What requests in flight touch.
    pub(super) busy: RefCell<Vec<Range>>,
    pub(super) next_range: Cell<u64>,
    /// The host whose requests count; none while another is taking the volume over.
    pub(super) owner: Cell<Option<u32>>,
    /// Whether the disk of the present life has failed: from then on writes and flushes may fail.
    pub(super) broken: Cell<bool>,
    pub(super) seen: Cell<Seen>,
    pub(super) gc: Policy,
    pub(super) flush_to: FlushTo,
    /// By name: what a snapshot has to hold, where it is known.
    pub(super) snapshots: RefCell<BTreeMap<String, Option<Vec<u64>>>>,
    /// The store may leave any call without an answer.
    pub(super) rough: bool,
    /// The store without its troubles, of a world whose volume began as a clone.
    pub(super) cloned_in: Option<Arc<dyn Store>>,
}

impl Shared {
    pub(super) fn below(&self, n: u64) -> u64 {
        self.rng.borrow_mut().below(n)
    }

    pub(super) fn saw(&self, what: impl FnOnce(&mut Seen)) {
        let mut seen = self.seen.get();
        what(&mut seen);
        self.seen.set(seen);
    }

    /// A range that no request in flight touches.
    pub(super) fn range(&self) -> Option<Range> {
        let sectors = match self.below(4) {
            0 => 1 + self.below(7),
            1 => 8,
            _ => 1 + self.below(48),
        };
        let mut lba = self.below(SECTORS - sectors);
        if self.below(2) == 0 {
            lba -= lba % 8;
        }
        let free = self.busy.borrow().iter().all(|r| r.lba + r.sectors <= lba || lba + sectors <= r.lba);
        let range = Range { number: self.next_range.replace(self.next_range.get() + 1), lba, sectors };
        free.then(|| self.busy.borrow_mut().push(range))?;
        Some(range)
    }

    pub(super) fn release(&self, range: Range) {
        self.busy.borrow_mut().retain(|r| r.number != range.number);
    }

    /// Whether zeros there would leave it open, after a crash, what there is.
    fn no_hole(&self, lba: u64, sectors: u64) -> bool {
        let oracle = self.oracle.borrow();
        // Only where each flush ends a group a crash finds the store and the log so far apart, often enough.
        oracle.in_doubt(lba, sectors) || self.flush_to == FlushTo::Store && oracle.unsynced(lba, sectors)
    }

    pub(super) async fn write(&self, lane: &Lane, me: u32) -> Outcome<()> {
        let Some(range) = self.range() else { return Ok(()) };
        let Range { lba, sectors, .. } = range;
        let (kind, fua) = (self.below(6), self.below(6) == 0);
        let kind = if self.no_hole(lba, sectors) { kind.max(2) } else { kind };
        let before = if fua { self.oracle.borrow().completed() } else { Vec::new() };
        let id = self.oracle.borrow_mut().issue(lba, sectors, kind < 2);
        match kind {
            0 => lane.discard(Lba(lba), sectors, fua).await?,
            1 => lane.write_zeroes(Lba(lba), sectors, fua).await?,
            _ => self.write_stamped(lane, id, lba, sectors, fua).await?,
        }
        self.oracle.borrow_mut().complete(id, fua);
        if fua {
            self.flushed(&before, me);
            self.flushed(&[id], me);
        }
        self.release(range);
        Ok(())
    }

    /// Two writes at once, on two lanes where there are two, each over a part of the other, the second perhaps a zeroing; and a read beside
    /// them. Then what they have left is looked at.
    pub(super) async fn write_twice(&self, lane: &Lane, other: &Lane, me: u32) -> Outcome<()> {
        let Some(range) = self.range() else { return Ok(()) };
        let Range { lba, sectors, .. } = range;
        if self.oracle.borrow().in_doubt(lba, sectors) {
            self.release(range);
            return Ok(());
        }
        // Both have this sector.
        let shared = lba + self.below(sectors);
        let around = || {
            let (before, after) = (self.below(shared - lba + 1), self.below(lba + sectors - shared));
            (shared - before, before + 1 + after)
        };
        let (one, two, hole) = (around(), around(), self.below(6) == 0);
        let hole = hole && !self.no_hole(lba, sectors);
        let before: Vec<u64> = (lba..lba + sectors).map(|s| self.oracle.borrow().expected(s)).collect();
        let first = self.oracle.borrow_mut().issue(one.0, one.1, false);
        let second = self.oracle.borrow_mut().issue_beside(two.0, two.1, hole, first);
        let first_stamp = first as u64 + 1;
        let second_stamp = if hole { 0 } else { second as u64 + 1 };
        let fua = [self.below(6) == 0, self.below(6) == 0];
        let write = async {
            self.write_stamped(lane, first, one.0, one.1, fua[0]).await?;
            self.oracle.borrow_mut().complete(first, fua[0]);
            if fua[0] {
                self.flushed(&[first], me);
            }
            Ok(())
        };
        let over = async {
            if hole {
                other.write_zeroes(Lba(two.0), two.1, fua[1]).await?;
            } else {
                self.write_stamped(other, second, two.0, two.1, fua[1]).await?;
            }
            self.oracle.borrow_mut().complete(second, fua[1]);
            if fua[1] {
                self.flushed(&[second], me);
            }
            Ok(())
        };
        let look = async {
            let found = stamps(lane, lba, sectors).await?;
            for (s, (stamp, was)) in found.into_iter().zip(before).enumerate() {
                let known = [was, first_stamp, second_stamp].contains(&stamp) || self.owner.get() != Some(me);
                assert!(known, "sector {} has stamp {stamp} while it is written", lba + s as u64);
            }
            Ok(())
        };
        match self.below(3) {
            0 => try_join3(write, over, look).await?,
            1 => try_join3(look, over, write).await?,
            _ => try_join3(over, look, write).await?,
        };
        let found = stamps(lane, lba, sectors).await?;
        if self.owner.get() == Some(me) {
            self.oracle.borrow_mut().saw(lba, &found).unwrap_or_else(|e| panic!("after two writes at once: {e}"));
            let later = found[(shared - lba) as usize] == second_stamp;
            self.saw(|s| if later { s.later += 1 } else { s.earlier += 1 });
        }
        self.release(range);
        Ok(())
    }

    async fn write_stamped(&self, lane: &Lane, id: usize, lba: u64, sectors: u64, fua: bool) -> Outcome<()> {
        let buf = IoBuf::zeroed(sectors as usize * SECTOR);
        (0..sectors).for_each(|s| buf.copy_in(s as usize * SECTOR, &content(id as u64 + 1, lba + s)));
        lane.write(Lba(lba), buf, fua).await
    }

    pub(super) async fn read(&self, lane: &Lane, me: u32) -> Outcome<()> {
        let Some(range) = self.range() else { return Ok(()) };
        let Range { lba, sectors, .. } = range;
        let found = stamps(lane, lba, sectors).await?;
        // Another host may have taken over meanwhile, and have written.
        for (s, stamp) in (lba..).zip(found).filter(|_| self.owner.get() == Some(me)) {
            assert_eq!(stamp, self.oracle.borrow().expected(s), "sector {s} while it lives");
        }
        self.release(range);
        Ok(())
    }

    pub(super) async fn flush(&self, lane: &Lane, me: u32) -> Outcome<()> {
        let covered = self.oracle.borrow().completed();
        lane.flush().await?;
        self.oracle.borrow_mut().mark(&covered, |w| w.durable = true);
        self.flushed(&covered, me);
        Ok(())
    }

    /// A flush, or a write with FUA, has been answered.
    fn flushed(&self, covered: &[usize], me: u32) {
        if self.flush_to == FlushTo::Store {
            self.in_store(covered, me);
        }
    }

    pub(super) async fn barrier(&self, volume: &Volume, me: u32) -> Outcome<()> {
        let covered = self.oracle.borrow().completed();
        if volume.command(Command::Barrier).await.is_err() {
            return Err(IoFault::Gone);
        }
        self.in_store(&covered, me);
        Ok(())
    }

    /// A barrier has been passed. While another host takes over, too: what it promised before it knew has to be found.
    fn in_store(&self, covered: &[usize], me: u32) {
        let owner = self.owner.get();
        if owner.is_none_or(|o| o == me) {
            self.oracle.borrow_mut().mark(covered, |w| w.drained = true);
            self.saw(|s| s.drained += 1);
            self.saw(|s| s.promised += u64::from(owner.is_none()));
        }
    }

    /// Has the clone stand alone. Its parent is deleted at once then.
    pub(super) async fn flatten(&self, volume: &Volume, store: &Arc<dyn Store>) -> Result<()> {
        match volume.command(Command::Flatten).await {
            Ok(()) => {
                clone::delete_parent(store);
                self.saw(|s| s.alone += 1);
                Ok(())
            }
            // Its own snapshots are of the time before.
            Err(e) if e.kind() == ErrorKind::Busy => Ok(()),
            done => done,
        }
    }

    /// Makes a snapshot, deletes one, or has the garbage collected.
    pub(super) async fn keep_house(&self, volume: &Volume, me: u32, alone: bool) -> Outcome<()> {
        let name = format!("s{}", self.below(6));
        let there = self.snapshots.borrow().contains_key(&name);
        let done = match (self.below(3), &self.cloned_in) {
            (0, Some(store)) if self.below(2) == 0 => self.flatten(volume, store).await,
            (0, _) => volume.command(Command::CollectGarbage).await,
            _ if there => {
                // Whatever comes of it: it may be gone from now on.
                self.snapshots.borrow_mut().remove(&name);
                volume.command(|reply| Command::DeleteSnapshot { name, reply }).await
            }
            _ => {
                let now: Vec<u64> = (0..SECTORS).map(|s| self.oracle.borrow().expected(s)).collect();
                let done = volume.command(|reply| Command::Snapshot { name: name.clone(), created: 1, reply }).await;
                if done.is_ok() && self.owner.get() == Some(me) {
                    self.snapshots.borrow_mut().insert(name, alone.then_some(now));
                }
                done
            }
        };
        match done {
            Err(e) if self.owner.get() != Some(me) || volume.is_gone() => {
                let _ = e;
                Err(IoFault::Gone)
            }
            // One that was made by a process that did not live to hear of it.
            Err(e) if e.kind() == ErrorKind::Exists || e.kind() == ErrorKind::NotFound => Ok(()),
            Err(e) => panic!("{e}"),
            Ok(()) => Ok(()),
        }
    }

    /// What a host that has lost the volume still does: none of it may ever show. Whether it is still acknowledged.
    pub(super) async fn haunt(&self, lane: &Lane) -> bool {
        let (lba, sectors) = (self.below(SECTORS - 8), 1 + self.below(8));
        let buf = IoBuf::zeroed(sectors as usize * SECTOR);
        (0..sectors).for_each(|s| buf.copy_in(s as usize * SECTOR, &content(u64::MAX, lba + s)));
        let fua = self.below(4) == 0;
        let done = lane.write(Lba(lba), buf, fua).await.is_ok();
        self.saw(|s| s.stopped += u64::from(!done));
        done
    }

    pub(super) async fn work(&self, life: &Life, lanes: &[Rc<Lane>], at: usize, volume: &Volume) {
        let lane = &lanes[at % lanes.len()];
        let (me, clock) = (life.me, &life.clock);
        for _ in 0..life.load.requests {
            if life.load.breaks && self.below(60) == 0 {
                life.break_disk();
            }
            if self.owner.get().is_some_and(|o| o != me) {
                self.haunt(lane).await;
                continue;
            }
            if self.gc.enabled && self.below(14) == 0 {
                // What failed is in doubt.
                let alone = life.load.workers == 1 && life.load.lanes == 1 && !self.broken.get();
                if let Err(e) = self.keep_house(volume, me, alone).await {
                    let may = self.broken.get() || self.owner.get() != Some(me);
                    assert!(may, "nothing fails here, and this did: {e}");
                }
                continue;
            }
            let done = match self.below(32) {
                0 => self.barrier(volume, me).await,
                1 => {
                    clock.sleep(Duration::from_millis(self.below(8000))).await;
                    Ok(())
                }
                2..4 => self.flush(lane, me).await,
                4..12 => self.read(lane, me).await,
                12..16 if life.load.overlaps && self.owner.get() == Some(me) => {
                    self.write_twice(lane, &lanes[(at + 1) % lanes.len()], me).await
                }
                _ => self.write(lane, me).await,
            };
            if let Err(e) = done {
                let may = self.broken.get() || self.owner.get() != Some(me);
                assert!(may, "nothing fails here, and this did: {e}");
            }
        }
    }
}
