//! Waiting for something on one lane.

use std::cell::RefCell;
use std::task::{Poll, Waker};

/// Says that something has changed; who waits looks again.
#[derive(Debug, Default)]
pub(super) struct Signal(RefCell<Vec<Waker>>);

impl Signal {
    /// Wakes everybody.
    pub(super) fn tell(&self) {
        // Taken out first: a waker may be anything.
        let wakers = self.0.take();
        for waker in wakers {
            waker.wake();
        }
    }

    /// Waits until `done`.
    pub(super) async fn until(&self, done: impl Fn() -> bool) {
        std::future::poll_fn(|cx| {
            if done() {
                return Poll::Ready(());
            }
            let mut wakers = self.0.borrow_mut();
            if !wakers.iter().any(|w| w.will_wake(cx.waker())) {
                wakers.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }
}
