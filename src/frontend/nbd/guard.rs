//! Keeps changes of parts of sectors from losing what others change beside them.
//!
//! The engine writes whole sectors. A request for less reads the sector, changes its part, and writes it back: whoever changed
//! the sector meanwhile would be undone. So it excludes every other change of the sectors it touches, on whichever
//! connection, while changes of whole sectors do not exclude each other. Reads need no guard: a sector is read as one.
//!
//! Invariants:
//! - Two changes that overlap, of which at least one is exclusive, are never under way at once.
//! - Who waits goes before whoever comes later and overlaps: nobody starves.
//! - Nothing waits under the lock.

use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// A change of sectors.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Change {
    sectors: Range<u64>,
    exclusive: bool,
}

impl Change {
    const fn conflicts(&self, other: &Self) -> bool {
        (self.exclusive || other.exclusive)
            && self.sectors.start < other.sectors.end
            && other.sectors.start < self.sectors.end
    }
}

struct Waiting {
    id: u64,
    change: Change,
    waker: Waker,
    /// Where it is among those under way, once it is.
    granted: Option<usize>,
}

#[derive(Default)]
struct State {
    under_way: Vec<Option<Change>>,
    free: Vec<usize>,
    /// Exclusive ones, under way or waiting: while there is none, nothing has to be compared.
    exclusive: usize,
    queue: VecDeque<Waiting>,
    next_id: u64,
}

impl State {
    fn put(&mut self, change: Change) -> usize {
        if let Some(at) = self.free.pop() {
            self.under_way[at] = Some(change);
            return at;
        }
        self.under_way.push(Some(change));
        self.under_way.len() - 1
    }

    fn is_free(&self, change: &Change, before: usize) -> bool {
        let waiting = self.queue.iter().take(before).filter(|w| w.granted.is_none()).map(|w| &w.change);
        !self.under_way.iter().flatten().chain(waiting).any(|other| other.conflicts(change))
    }

    /// Lets those go on who can.
    fn grant(&mut self) {
        for i in 0..self.queue.len() {
            if self.queue[i].granted.is_none() && self.is_free(&self.queue[i].change, i) {
                let change = self.queue[i].change.clone();
                let at = self.put(change);
                self.queue[i].granted = Some(at);
                self.queue[i].waker.wake_by_ref();
            }
        }
    }

    fn end(&mut self, at: usize) {
        if let Some(change) = self.under_way[at].take() {
            self.exclusive -= usize::from(change.exclusive);
            self.free.push(at);
            if !self.queue.is_empty() {
                self.grant();
            }
        }
    }
}

/// One volume's guard, shared by all lanes.
#[derive(Default)]
pub(super) struct Guard(Mutex<State>);

/// A change under way; over when dropped.
pub(super) struct Pass<'a> {
    guard: &'a Guard,
    at: usize,
}

impl Guard {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For a change of whole sectors.
    pub(super) fn shared(&self, sectors: Range<u64>) -> Enter<'_> {
        self.enter(Change { sectors, exclusive: false })
    }

    /// For a change that reads first.
    pub(super) fn exclusive(&self, sectors: Range<u64>) -> Enter<'_> {
        self.enter(Change { sectors, exclusive: true })
    }

    const fn enter(&self, change: Change) -> Enter<'_> {
        Enter { guard: self, state: Entering::New(change) }
    }
}

enum Entering {
    New(Change),
    Waiting(u64),
    Over,
}

/// Waits for its turn.
pub(super) struct Enter<'a> {
    guard: &'a Guard,
    state: Entering,
}

impl<'a> Future for Enter<'a> {
    type Output = Pass<'a>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Pass<'a>> {
        let guard = self.guard;
        let mut s = guard.state();
        match std::mem::replace(&mut self.state, Entering::Over) {
            Entering::New(change) => {
                s.exclusive += usize::from(change.exclusive);
                if s.exclusive == 0 || s.is_free(&change, usize::MAX) {
                    return Poll::Ready(Pass { guard, at: s.put(change) });
                }
                let id = s.next_id;
                s.next_id += 1;
                s.queue.push_back(Waiting { id, change, waker: cx.waker().clone(), granted: None });
                self.state = Entering::Waiting(id);
                Poll::Pending
            }
            Entering::Waiting(id) => {
                // It is there until this future takes it out.
                let Some(i) = s.queue.iter().position(|w| w.id == id) else { return Poll::Pending };
                if let Some(at) = s.queue[i].granted {
                    s.queue.remove(i);
                    return Poll::Ready(Pass { guard, at });
                }
                s.queue[i].waker.clone_from(cx.waker());
                self.state = Entering::Waiting(id);
                Poll::Pending
            }
            Entering::Over => Poll::Pending,
        }
    }
}

impl Drop for Enter<'_> {
    fn drop(&mut self) {
        let Entering::Waiting(id) = self.state else { return };
        let mut s = self.guard.state();
        let Some(w) = s.queue.iter().position(|w| w.id == id).and_then(|i| s.queue.remove(i)) else { return };
        match w.granted {
            Some(at) => s.end(at),
            None => {
                s.exclusive -= usize::from(w.change.exclusive);
                s.grant();
            }
        }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.guard.state().end(self.at);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use proptest::prelude::*;

    use super::*;

    fn poll<F: Future>(f: Pin<&mut F>) -> Poll<F::Output> {
        f.poll(&mut Context::from_waker(Waker::noop()))
    }

    fn ready<'a>(f: Enter<'a>) -> Option<Pass<'a>> {
        match poll(pin!(f)) {
            Poll::Ready(p) => Some(p),
            Poll::Pending => None,
        }
    }

    #[test]
    fn whole_sectors_do_not_exclude_each_other() {
        let g = Guard::default();
        let a = ready(g.shared(0..8)).expect("free");
        let b = ready(g.shared(4..12)).expect("shared");
        assert!(ready(g.exclusive(11..12)).is_none());
        assert!(ready(g.exclusive(12..13)).is_some(), "beside them");
        drop((a, b));
        assert!(ready(g.exclusive(11..12)).is_some());
        let s = g.state();
        assert!(s.queue.is_empty() && s.exclusive == 0 && s.under_way.iter().all(Option::is_none));
    }

    #[test]
    fn who_waits_goes_first() {
        let g = Guard::default();
        let a = ready(g.shared(0..8)).expect("free");
        let mut x = pin!(g.exclusive(7..8));
        assert!(poll(x.as_mut()).is_pending());
        let mut late = pin!(g.shared(7..9));
        assert!(poll(late.as_mut()).is_pending(), "an exclusive one waits before it");
        assert!(ready(g.shared(8..9)).is_some(), "which does not touch this one");
        drop(a);
        let Poll::Ready(x) = poll(x.as_mut()) else { panic!("its turn") };
        assert!(poll(late.as_mut()).is_pending());
        drop(x);
        assert!(poll(late.as_mut()).is_ready());
    }

    #[test]
    fn giving_up_lets_others_on() {
        let g = Guard::default();
        let a = ready(g.shared(0..1)).expect("free");
        let mut gives_up = Box::pin(g.exclusive(0..2));
        assert!(poll(gives_up.as_mut()).is_pending());
        let mut after = pin!(g.shared(1..2));
        assert!(poll(after.as_mut()).is_pending());
        drop(gives_up);
        assert!(poll(after.as_mut()).is_ready());
        drop(a);
    }

    type Waits<'a> = Vec<(Change, Pin<Box<Enter<'a>>>)>;

    fn settle<'a>(waiting: &mut Waits<'a>, under_way: &mut Vec<(Change, Pass<'a>)>) {
        let mut i = 0;
        while i < waiting.len() {
            if let Poll::Ready(pass) = poll(waiting[i].1.as_mut()) {
                let (change, _) = waiting.remove(i);
                assert!(!under_way.iter().any(|(c, _)| c.conflicts(&change)), "{change:?}");
                under_way.push((change, pass));
            } else {
                i += 1;
            }
        }
    }

    proptest! {
        /// Against a model: never two that conflict, and everybody gets through.
        #[test]
        fn nobody_overlaps_and_nobody_starves(ops in prop::collection::vec((0u64..12, 1u64..4, any::<bool>(), any::<prop::sample::Index>()), 1..60)) {
            let g = Guard::default();
            let mut waiting: Waits<'_> = Vec::new();
            let mut under_way: Vec<(Change, Pass<'_>)> = Vec::new();
            for (start, len, exclusive, end) in ops {
                let change = Change { sectors: start..start + len, exclusive };
                waiting.push((change.clone(), Box::pin(g.enter(change))));
                settle(&mut waiting, &mut under_way);
                if end.index(3) == 0 && !under_way.is_empty() {
                    let i = end.index(under_way.len());
                    under_way.swap_remove(i);
                    settle(&mut waiting, &mut under_way);
                }
            }
            while !under_way.is_empty() {
                under_way.pop();
                settle(&mut waiting, &mut under_way);
            }
            prop_assert!(waiting.is_empty(), "somebody waits for ever");
            prop_assert_eq!(g.state().exclusive, 0);
        }
    }
}
