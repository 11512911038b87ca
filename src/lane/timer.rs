//! Time on a lane: sleeping is a timeout on its ring.

use std::time::Duration;

use super::Lane;
use super::ops::Request;
use crate::time::Timer;
use crate::time::monotonic_now;

/// The clock and timer of a lane. `now` is CLOCK_MONOTONIC, so the times of all lanes compare.
#[derive(Clone)]
pub struct LaneTimer {
    lane: Lane,
}

impl LaneTimer {
    /// The timer of `lane`.
    #[must_use]
    pub fn new(lane: &Lane) -> Self {
        Self { lane: lane.clone() }
    }
}

impl Timer for LaneTimer {
    fn now(&self) -> Duration {
        monotonic_now()
    }

    async fn sleep(&self, d: Duration) {
        // ETIME is how it ends; anything else (a signal's EINTR, say) leaves a rest to sleep.
        let until = self.now().saturating_add(d);
        let mut rest = d;
        while self.lane.submit(Request::Timeout(rest)).await.result != -libc::ETIME {
            rest = until.saturating_sub(self.now());
            if rest.is_zero() {
                return;
            }
        }
    }
}
