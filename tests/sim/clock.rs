//! Time that goes on when the run says so, from one waiter's end to the next.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use vb_ublk::time::Timer;

use crate::machine::Source;
use crate::support_rng::Rng;

#[derive(Default)]
struct State {
    now: Duration,
    next: u64,
    /// Until when, and who.
    sleepers: BTreeMap<u64, (Duration, Option<Waker>)>,
}

/// Clones are one clock.
#[derive(Clone, Default)]
pub(crate) struct SimClock(Rc<RefCell<State>>);

struct Sleep {
    clock: SimClock,
    id: u64,
}

impl Future for Sleep {
    type Output = ();
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut s = self.clock.0.borrow_mut();
        let now = s.now;
        match s.sleepers.get_mut(&self.id) {
            Some((until, waker)) if *until > now => {
                *waker = Some(cx.waker().clone());
                Poll::Pending
            }
            _ => Poll::Ready(()),
        }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.clock.0.borrow_mut().sleepers.remove(&self.id);
    }
}

impl Timer for SimClock {
    fn now(&self) -> Duration {
        self.0.borrow().now
    }

    fn sleep(&self, d: Duration) -> impl Future<Output = ()> {
        let mut s = self.0.borrow_mut();
        let (id, until) = (s.next, s.now + d);
        s.next += 1;
        s.sleepers.insert(id, (until, None));
        drop(s);
        Sleep { clock: self.clone(), id }
    }
}

impl Source for SimClock {
    /// The next to end, alone: time does not go back.
    fn under_way(&self) -> Vec<u64> {
        let s = self.0.borrow();
        let waiting = s.sleepers.iter().filter(|(_, (until, _))| *until > s.now);
        waiting.min_by_key(|(_, (until, _))| *until).map(|(id, _)| *id).into_iter().collect()
    }

    fn end(&self, id: u64, _: &mut Rng) -> bool {
        let mut s = self.0.borrow_mut();
        let until = s.sleepers[&id].0;
        s.now = until;
        let due: Vec<Waker> =
            s.sleepers.values_mut().filter(|(t, _)| *t <= until).filter_map(|(_, w)| w.take()).collect();
        drop(s);
        due.into_iter().for_each(Waker::wake);
        false
    }

    fn is_patient(&self) -> bool {
        true
    }
}
