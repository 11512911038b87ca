//! What all threads of a server share.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use tokio::sync::Semaphore;

use super::guard::Guard;
use super::{Exports, Tls};
use crate::time::monotonic_now;

/// Calls of the exports that may be under way at once: each has a thread, and may wait for a store that is away.
const MAX_ASKING: usize = 16;

/// Says things that a client can have said as often as it likes: a line a second, and how many there would have been.
#[derive(Default)]
pub(super) struct Sparing(Mutex<(Option<Duration>, u64)>);

impl Sparing {
    pub(super) fn say(&self, line: impl FnOnce() -> String) {
        let mut s = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = monotonic_now();
        if s.0.is_some_and(|last| now < last + Duration::from_secs(1)) {
            s.1 += 1;
            return;
        }
        match std::mem::replace(&mut *s, (Some(now), 0)).1 {
            0 => tracing::warn!("{}", line()),
            n => tracing::warn!("{} (and {n} lines of this kind before)", line()),
        }
    }
}

/// What all workers share.
pub(super) struct Shared<X: Exports> {
    pub(super) exports: Arc<X>,
    pub(super) tls: Option<Tls>,
    pub(super) handshake_timeout: Duration,
    pub(super) connections: AtomicU64,
    pub(super) sparing: Sparing,
    pub(super) may_ask: Semaphore,
    asking: Mutex<usize>,
    none_asking: Condvar,
    /// The guards of open exports, by the export's address: who holds the guard holds the export.
    guards: Mutex<HashMap<usize, std::sync::Weak<Guard>>>,
}

impl<X: Exports> Shared<X> {
    pub(super) fn new(exports: Arc<X>, tls: Option<Tls>, handshake_timeout: Duration) -> Self {
        Self {
            exports,
            tls,
            handshake_timeout,
            connections: AtomicU64::new(0),
            sparing: Sparing::default(),
            may_ask: Semaphore::new(MAX_ASKING),
            asking: Mutex::new(0),
            none_asking: Condvar::new(),
            guards: Mutex::default(),
        }
    }

    /// Waits until no call of the exports is under way. Nobody makes new ones any more.
    pub(super) fn until_none_asks(&self) {
        let asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.none_asking.wait_while(asking, |n| *n > 0));
    }

    pub(super) fn count_asking(&self, change: impl FnOnce(&mut usize)) {
        change(&mut self.asking.lock().unwrap_or_else(PoisonError::into_inner));
        self.none_asking.notify_all();
    }

    pub(super) fn guard(&self, export: &Arc<X::Export>) -> Arc<Guard> {
        let mut guards = self.guards.lock().unwrap_or_else(PoisonError::into_inner);
        guards.retain(|_, g| g.strong_count() > 0);
        let slot = guards.entry(Arc::as_ptr(export).addr()).or_default();
        slot.upgrade().unwrap_or_else(|| {
            let guard = Arc::new(Guard::default());
            *slot = Arc::downgrade(&guard);
            guard
        })
    }
}

/// A call of the exports is over when this is dropped.
pub(super) struct Over<X: Exports>(pub(super) Arc<Shared<X>>);

impl<X: Exports> Drop for Over<X> {
    fn drop(&mut self) {
        self.0.count_asking(|n| *n -= 1);
    }
}

/// A client who has come.
pub(super) struct Client {
    pub(super) socket: OwnedFd,
    pub(super) name: String,
}

#[derive(Default)]
struct Arrivals {
    clients: VecDeque<Client>,
    stopping: bool,
    waker: Option<Waker>,
}

/// The door of a worker, for the threads that accept.
#[derive(Default)]
pub(super) struct Door {
    arrivals: Mutex<Arrivals>,
    /// Clients that are in or on their way.
    pub(super) clients: AtomicU64,
}

impl Door {
    fn change(&self, change: impl FnOnce(&mut Arrivals)) {
        let waker = {
            let mut a = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
            change(&mut a);
            a.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Lets a client in.
    pub(super) fn enter(&self, client: Client) {
        self.clients.fetch_add(1, Ordering::Relaxed);
        self.change(|a| a.clients.push_back(client));
    }

    /// Nobody comes any more, and who is in has to leave.
    pub(super) fn stop(&self) {
        self.change(|a| a.stopping = true);
    }

    /// The next client; `None` when the worker is to stop.
    pub(super) async fn next(&self) -> Option<Client> {
        std::future::poll_fn(|cx| {
            let mut a = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
            if a.stopping {
                return Poll::Ready(None);
            }
            if let Some(client) = a.clients.pop_front() {
                return Poll::Ready(Some(client));
            }
            a.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}
