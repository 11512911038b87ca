//! Time, injected: the volume sees this trait alone, so that the tests can own the clock.

use std::future::Future;
use std::time::Duration;

/// A monotonic clock with a timer, of one thread's runtime.
pub trait Timer: Clone + 'static {
    /// Time since an arbitrary fixed point; never goes back.
    fn now(&self) -> Duration;

    /// Completes when `d` has passed.
    fn sleep(&self, d: Duration) -> impl Future<Output = ()>;
}

/// CLOCK_MONOTONIC: the same for all threads, so that times taken on one compare with those of another.
#[must_use]
pub fn monotonic_now() -> Duration {
    // The clock exists on every Linux; were it missing, time would stand still rather than the program.
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}

/// The calendar's time, in seconds since 1970, for what people read: nothing is decided by it, so it may jump.
#[must_use]
#[allow(clippy::disallowed_methods)]
pub fn now_unix() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
