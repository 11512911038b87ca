//! The tasks of a lane: a slab of futures, polled when their number comes up in the run queue.
//!
//! Invariants:
//! - A future is out of the slab while it is polled or dropped, so it may spawn, wake and drop whatever it
//!   likes; no borrow of the slab is held meanwhile.
//! - Task numbers start at 1 (0 is the future that the loop itself polls) and are used again.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use super::waker;

type Task = Pin<Box<dyn Future<Output = ()>>>;

enum Place {
    Free,
    Waiting(Task),
    /// Out to be polled.
    Running,
}

#[derive(Default)]
struct Slab {
    places: Vec<Place>,
    free: Vec<u32>,
}

/// See the module's page.
#[derive(Default)]
pub(super) struct Executor {
    slab: RefCell<Slab>,
}

impl Executor {
    /// Adds a task and marks it ready.
    pub(super) fn spawn(&self, task: Task) {
        let mut slab = self.slab.borrow_mut();
        let number = if let Some(number) = slab.free.pop() {
            slab.places[number as usize - 1] = Place::Waiting(task);
            number
        } else {
            slab.places.push(Place::Waiting(task));
            u32::try_from(slab.places.len()).expect("fewer than 2^32 tasks fit into memory")
        };
        drop(slab);
        waker::push_local(number);
    }

    /// Polls a task; a number without a task is a stale wake.
    pub(super) fn poll(&self, lane: u32, number: u32) {
        let at = number as usize - 1;
        let mut task = {
            let mut slab = self.slab.borrow_mut();
            let Some(place) = slab.places.get_mut(at) else { return };
            match std::mem::replace(place, Place::Running) {
                Place::Waiting(task) => task,
                other => {
                    *place = other;
                    return;
                }
            }
        };
        let waker = waker::waker(lane, number);
        let rest = match task.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Pending => Some(task),
            Poll::Ready(()) => {
                drop(task);
                None
            }
        };
        let mut slab = self.slab.borrow_mut();
        // `clear` from within the task has emptied the slab: the task goes, too.
        let Some(place) = slab.places.get_mut(at) else { return };
        if let Some(task) = rest {
            *place = Place::Waiting(task);
        } else {
            *place = Place::Free;
            slab.free.push(number);
        }
    }

    /// Drops all tasks.
    pub(super) fn clear(&self) {
        loop {
            // Outside the borrow: a drop may spawn or wake.
            let places = std::mem::take(&mut *self.slab.borrow_mut()).places;
            if places.is_empty() {
                return;
            }
            drop(places);
        }
    }

    /// How many tasks there are.
    pub(super) fn len(&self) -> usize {
        let slab = self.slab.borrow();
        slab.places.len() - slab.free.len()
    }
}
