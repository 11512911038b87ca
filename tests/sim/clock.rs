//! Time that goes on when the run says so, from one waiter's end to the next.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use async_trait::async_trait;
use vb_ublk::store::retry::Pacer;
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
pub(crate) struct SimClock(Arc<Mutex<State>>);

impl SimClock {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no panic holds it")
    }
}

struct Sleep {
    clock: SimClock,
    id: u64,
}

impl Future for Sleep {
    type Output = ();
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut s = self.clock.state();
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
        self.clock.state().sleepers.remove(&self.id);
    }
}

impl Timer for SimClock {
    fn now(&self) -> Duration {
        self.state().now
    }

    fn sleep(&self, d: Duration) -> impl Future<Output = ()> {
        let mut s = self.state();
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
        let s = self.state();
        let waiting = s.sleepers.iter().filter(|(_, (until, _))| *until > s.now);
        waiting.min_by_key(|(_, (until, _))| *until).map(|(id, _)| *id).into_iter().collect()
    }

    fn end(&self, id: u64, _: &mut Rng) -> bool {
        let mut s = self.state();
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

/// The clock and chance of calls that are tried again.
pub(crate) struct SimPacer {
    clock: SimClock,
    rng: Mutex<Rng>,
}

impl SimPacer {
    pub(crate) fn new(clock: SimClock, seed: u64) -> Self {
        Self { clock, rng: Mutex::new(Rng(seed)) }
    }
}

impl fmt::Debug for SimPacer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimPacer")
    }
}

#[async_trait]
impl Pacer for SimPacer {
    fn now(&self) -> Duration {
        Timer::now(&self.clock)
    }
    async fn sleep(&self, d: Duration) {
        // The bounds on whole calls: where time goes on in leaps, from one sleeper to the next, they would end calls that take a moment.
        // (A pause is shorter. What is left of 15 s after a first try may end a second one.)
        if d >= Duration::from_secs(15) {
            std::future::pending::<()>().await;
        }
        Timer::sleep(&self.clock, d).await;
    }
    fn random(&self) -> u64 {
        self.rng.lock().expect("no panic holds it").next()
    }
}
