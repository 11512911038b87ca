//! The crash rule: which pasts of a volume may be found again.
//!
//! Each sector has one order of its writes, and of two that overlap while both are in flight all their sectors have the same one; which,
//! is open until something tells: all orders that are possible are kept, and go as what is found speaks against them. There has to be a
//! set of writes that is closed under "completed before the other was issued", holds all that must be there, and
//! explains what every sector has. The smallest such set is looked for: it grows only where it must, so if it grows
//! past what a sector shows, there is none.

use std::collections::BTreeSet;

/// A write, a discard or a zeroing.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Write {
    /// It leaves zeros.
    pub(crate) hole: bool,
    pub(crate) issued: u64,
    pub(crate) acked: Option<u64>,
    /// A flush that was asked for later has ended, or it was FUA.
    pub(crate) durable: bool,
    /// Everything up to it has been brought to the store, on demand.
    pub(crate) drained: bool,
    /// It was not there after a crash, or when another host had taken over: no rule speaks of it any more.
    lost: bool,
}

/// Whose word has to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// The process has died.
    Process,
    /// The power was cut.
    Power,
    /// All but the store is gone.
    Store,
}

/// What is known: one [`Past`], or several of which one is the truth. They have the same writes.
pub(crate) struct Oracle(Vec<Past>);

impl Oracle {
    pub(crate) fn new(sectors: usize) -> Self {
        Self(vec![Past { sectors: vec![Vec::new(); sectors], ..Past::default() }])
    }

    pub(crate) fn issue(&mut self, lba: u64, sectors: u64, hole: bool) -> usize {
        self.0.iter_mut().for_each(|p| p.issue(lba, sectors, hole, None));
        self.issued() - 1
    }

    /// One that overlaps `other`, which is in flight: it comes after that, or before.
    pub(crate) fn issue_beside(&mut self, lba: u64, sectors: u64, hole: bool, other: usize) -> usize {
        assert!(self.0.len() <= 1024, "so many orders are open at once");
        let mut before = self.0.clone();
        before.iter_mut().for_each(|p| p.issue(lba, sectors, hole, Some(other)));
        let id = self.issue(lba, sectors, hole);
        self.0.append(&mut before);
        id
    }

    pub(crate) fn complete(&mut self, id: usize, fua: bool) {
        self.0.iter_mut().for_each(|p| p.complete(id, fua));
    }

    pub(crate) fn in_doubt(&self, lba: u64, sectors: u64) -> bool {
        self.0.iter().any(|p| p.in_doubt(lba, sectors))
    }

    pub(crate) fn unsynced(&self, lba: u64, sectors: u64) -> bool {
        self.0.iter().any(|p| p.unsynced(lba, sectors))
    }

    pub(crate) fn completed(&self) -> Vec<usize> {
        self.0[0].completed()
    }

    pub(crate) fn mark(&mut self, ids: &[usize], how: impl Fn(&mut Write)) {
        self.0.iter_mut().for_each(|p| p.mark(ids, &how));
    }

    /// Nothing that is in flight touches these sectors, and this is what they have.
    pub(crate) fn saw(&mut self, lba: u64, found: &[u64]) -> Result<(), String> {
        let wanted = |p: &Past| (lba..).take(found.len()).map(|s| p.expected(s)).collect::<Vec<_>>();
        let first = wanted(&self.0[0]);
        self.0.retain(|p| wanted(p) == found);
        if self.0.is_empty() { Err(format!("from sector {lba} on it is {found:?}, and not {first:?}")) } else { Ok(()) }
    }

    pub(crate) fn expected(&self, sector: u64) -> u64 {
        self.0[0].expected(sector)
    }

    /// What was issued after `begun` is no part of what was to be found, but of what the present life has done already.
    pub(crate) fn judge(&mut self, after: After, found: &[u64], begun: u64) -> Result<(), String> {
        let mut why = None;
        let mut possible = Vec::new();
        for mut p in self.0.clone() {
            match p.judge(after, found, begun) {
                // An order of what is lost is no difference.
                Ok(()) if possible.contains(&p) => {}
                Ok(()) => possible.push(p),
                Err(e) => _ = why.get_or_insert(e),
            }
        }
        if possible.is_empty() {
            return Err(why.expect("a past"));
        }
        self.0 = possible;
        Ok(())
    }

    /// What a [`Past`] counts issues and completions by.
    pub(crate) fn now(&self) -> u64 {
        self.0[0].clock
    }

    /// How many writes there were.
    pub(crate) fn issued(&self) -> usize {
        self.0[0].writes.len()
    }

    /// How many completed writes crashes have taken, as they may.
    pub(crate) fn taken(&self) -> u64 {
        self.0[0].taken
    }
}

/// All writes that are not known to be lost. A write's stamp is its number + 1; 0 are zeros.
#[derive(Clone, Default, PartialEq)]
struct Past {
    writes: Vec<Write>,
    /// For each sector, the writes to it, in order.
    sectors: Vec<Vec<usize>>,
    clock: u64,
    taken: u64,
}

impl Past {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// After all others, but for one that it may come before.
    fn issue(&mut self, lba: u64, sectors: u64, hole: bool, before: Option<usize>) {
        let (id, issued) = (self.writes.len(), self.tick());
        self.writes.push(Write { hole, issued, acked: None, durable: false, drained: false, lost: false });
        for history in &mut self.sectors[lba as usize..(lba + sectors) as usize] {
            let place = history.iter().position(|w| Some(*w) == before).unwrap_or(history.len());
            history.insert(place, id);
        }
    }

    fn complete(&mut self, id: usize, fua: bool) {
        let now = self.tick();
        if self.writes[id].lost {
            return;
        }
        self.writes[id].acked = Some(now);
        self.writes[id].durable |= fua;
    }

    /// Whether a write is known there of which nobody knows if it has come to be. A hole over another that is in doubt could not
    /// be told from it: the smallest set would hold the older one where the newer one is the truth (seed 4379).
    fn in_doubt(&self, lba: u64, sectors: u64) -> bool {
        let doubtful = |id: &usize| self.writes[*id].acked.is_none();
        (lba..lba + sectors).any(|s| self.sectors[s as usize].iter().any(doubtful))
    }

    /// Whether a power cut may take away what is known there. Zeros over that could not be told afterwards from neither being there, while the
    /// store may hold the one without the other (seed 4044).
    fn unsynced(&self, lba: u64, sectors: u64) -> bool {
        (lba..lba + sectors).any(|s| self.sectors[s as usize].iter().any(|id| !self.writes[*id].durable))
    }

    /// The completed writes.
    fn completed(&self) -> Vec<usize> {
        (0..self.writes.len()).filter(|id| self.writes[*id].acked.is_some()).collect()
    }

    /// Those of `ids` that are not lost.
    fn mark(&mut self, ids: &[usize], how: impl Fn(&mut Write)) {
        for id in ids {
            let w = &mut self.writes[*id];
            if !w.lost {
                how(w);
            }
        }
    }

    fn stamp(&self, id: usize) -> u64 {
        if self.writes[id].hole { 0 } else { id as u64 + 1 }
    }

    /// What a sector has while nothing that is in flight touches it.
    fn expected(&self, sector: u64) -> u64 {
        self.sectors[sector as usize].last().map_or(0, |id| self.stamp(*id))
    }

    /// Judges what is found after a crash, and forgets what is lost: that must not come back.
    fn judge(&mut self, after: After, found: &[u64], begun: u64) -> Result<(), String> {
        let must = |w: &Write| match after {
            After::Process => w.acked.is_some(),
            After::Power => w.durable,
            After::Store => w.drained,
        };
        let mut set = BTreeSet::new();
        let mut todo: Vec<usize> = (0..self.writes.len()).filter(|id| must(&self.writes[*id])).collect();
        loop {
            while let Some(id) = todo.pop() {
                if set.insert(id) {
                    let issued = self.writes[id].issued;
                    let earlier = |w: &Write| w.acked.is_some_and(|a| a < issued);
                    // Those lost before are in no sector's history and explain nothing.
                    todo.extend((0..id).filter(|e| earlier(&self.writes[*e]) && !set.contains(e)));
                }
            }
            for (s, history) in self.sectors.iter().enumerate() {
                let has = history.iter().rposition(|id| set.contains(id)).map_or(0, |p| p + 1);
                let shows = |n: usize| if n == 0 { 0 } else { self.stamp(history[n - 1]) };
                let Some(n) = (has..=history.len()).find(|n| shows(*n) == found[s]) else {
                    let want: Vec<u64> = (has..=history.len()).map(shows).collect();
                    return Err(format!("sector {s} has stamp {} after {after:?}, where {want:?} could be", found[s]));
                };
                if n > has {
                    todo.push(history[n - 1]);
                }
            }
            if todo.is_empty() {
                break;
            }
        }
        // One that was in flight, or that nothing had made durable, may be there or not if each of its sectors is hidden by a newer one,
        // or shows the zeros that it may have left: nothing has told yet.
        let may_be = |id: &usize| {
            let w = &self.writes[*id];
            let earlier = |e: &usize| self.writes[*e].acked.is_some_and(|a| a < w.issued);
            !w.lost && !set.contains(id) && (0..*id).filter(earlier).all(|e| set.contains(&e))
        };
        let mut hidden: BTreeSet<usize> = (0..self.writes.len()).filter(may_be).collect();
        for (history, found) in self.sectors.iter().zip(found) {
            let shown = history.iter().rposition(|id| set.contains(id)).map_or(0, |p| p + 1);
            hidden.retain(|id| !history[shown..].contains(id) || self.stamp(*id) == *found);
        }
        for history in &mut self.sectors {
            history.retain(|id| set.contains(id) || hidden.contains(id));
        }
        // What was found has been read from a log that was synced, or from the store.
        let now = self.tick();
        for (id, w) in self.writes.iter_mut().enumerate() {
            self.taken += u64::from(w.acked.is_some() && !set.contains(&id) && !hidden.contains(&id));
            if set.contains(&id) {
                w.acked.get_or_insert(now);
                w.durable |= w.issued <= begun;
                w.drained |= after == After::Store;
            } else if hidden.contains(&id) {
                w.acked = None;
            } else {
                (w.acked, w.durable, w.drained, w.lost) = (None, false, false, true);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two sectors; 1 to the first, 2 to the second, 3 to both, each after the other.
    fn three() -> Oracle {
        let mut o = Oracle::new(2);
        for (lba, n) in [(0, 1), (1, 1), (0, 2)] {
            let id = o.issue(lba, n, false);
            o.complete(id, false);
        }
        o
    }

    #[test]
    fn prefixes_and_nothing_else() {
        for found in [[0, 0], [1, 0], [1, 2], [3, 3]] {
            three().judge(After::Power, &found, u64::MAX).unwrap();
        }
        for found in [[0, 2], [3, 2], [1, 3], [2, 2], [3, 0]] {
            three().judge(After::Power, &found, u64::MAX).unwrap_err();
        }
        for found in [[0, 0], [1, 0], [1, 2]] {
            three().judge(After::Process, &found, u64::MAX).unwrap_err();
        }
        let mut o = three();
        o.mark(&[1], |w| w.durable = true);
        o.judge(After::Power, &[1, 0], u64::MAX).unwrap_err();
    }

    #[test]
    fn the_lost_stay_lost_and_the_found_stay_found() {
        let mut o = three();
        o.judge(After::Power, &[1, 2], u64::MAX).unwrap();
        assert_eq!(o.taken(), 1);
        let id = o.issue(0, 1, true);
        o.complete(id, false);
        assert_eq!((o.expected(0), o.expected(1)), (0, 2));
        o.judge(After::Power, &[3, 3], u64::MAX).unwrap_err();
        o.judge(After::Power, &[1, 2], u64::MAX).unwrap();
        o.judge(After::Power, &[0, 2], u64::MAX).unwrap_err();
    }

    #[test]
    fn one_in_flight_that_is_hidden_may_show_later() {
        for found in [[1, 0], [2, 0], [3, 0]] {
            let mut o = Oracle::new(2);
            let first = o.issue(0, 1, false);
            o.complete(first, true);
            o.mark(&[first], |w| w.drained = true);
            o.issue(0, 1, false);
            let newer = o.issue(0, 1, false);
            o.complete(newer, true);
            o.judge(After::Process, &[3, 0], u64::MAX).unwrap();
            o.judge(After::Store, &found, u64::MAX).unwrap();
        }
        // Its second sector shows that it is not there; or, if that was zeros already, nothing.
        for (hole, first, good) in [(false, 0, false), (true, 0, true)] {
            let mut o = Oracle::new(2);
            o.issue(0, 2, hole);
            let newer = o.issue(0, 1, false);
            o.complete(newer, false);
            o.judge(After::Process, &[2, 0], u64::MAX).unwrap();
            assert_eq!(o.judge(After::Store, &[first, 0], u64::MAX).is_ok() && o.0[0].sectors[0].len() == 1, good);
        }
        let mut o = Oracle::new(2);
        o.issue(0, 2, false);
        let newer = o.issue(0, 1, false);
        o.complete(newer, false);
        o.judge(After::Process, &[2, 0], u64::MAX).unwrap();
        o.judge(After::Store, &[1, 0], u64::MAX).unwrap_err();
    }

    #[test]
    fn what_the_present_life_has_done_before_it_is_judged_is_not_durable_yet() {
        let mut o = Oracle::new(1);
        let found = o.issue(0, 1, false);
        o.complete(found, false);
        let begun = o.now();
        let early = o.issue(0, 1, false);
        o.complete(early, false);
        o.judge(After::Process, &[2], begun).unwrap();
        o.judge(After::Power, &[1], u64::MAX).unwrap();
        o.judge(After::Power, &[0], u64::MAX).unwrap_err();
    }

    #[test]
    fn one_in_flight_may_be_there_or_not() {
        for found in [[1, 2], [4, 2]] {
            let mut o = Oracle::new(2);
            for lba in [0, 1] {
                let id = o.issue(lba, 1, false);
                o.complete(id, true);
            }
            o.issue(0, 1, false);
            o.judge(After::Process, &found.map(|s| if s == 4 { 3 } else { s }), u64::MAX).unwrap();
        }
    }

    /// Two sectors; 1 to both, then 2 and 3 to both at the same time.
    fn two_at_once() -> Oracle {
        let mut o = Oracle::new(2);
        let first = o.issue(0, 2, false);
        o.complete(first, false);
        let one = o.issue(0, 2, false);
        o.issue_beside(0, 2, false, one);
        o
    }

    #[test]
    fn of_two_at_once_all_sectors_tell_the_same_order() {
        for found in [[1, 1], [2, 2], [3, 3]] {
            two_at_once().judge(After::Process, &found, u64::MAX).unwrap();
        }
        for found in [[2, 3], [3, 2], [1, 2], [0, 0]] {
            two_at_once().judge(After::Process, &found, u64::MAX).unwrap_err();
        }
        let mut o = two_at_once();
        o.complete(1, false);
        o.complete(2, false);
        o.judge(After::Process, &[1, 1], u64::MAX).unwrap_err();
        // The newer one hides the other, which may be all that has come to the store.
        let mut o = two_at_once();
        o.mark(&[0], |w| (w.durable, w.drained) = (true, true));
        o.complete(1, false);
        o.complete(2, false);
        o.judge(After::Power, &[2, 2], u64::MAX).unwrap();
        o.judge(After::Store, &[3, 3], u64::MAX).unwrap();
        for shown in [2, 3] {
            let mut o = two_at_once();
            o.complete(1, false);
            o.complete(2, false);
            o.saw(0, &[2, 3]).unwrap_err();
            let mut o = two_at_once();
            o.complete(1, false);
            o.complete(2, false);
            o.saw(0, &[shown, shown]).unwrap();
            o.judge(After::Process, &[5 - shown; 2], u64::MAX).unwrap_err();
        }
    }
}
