//! Slowing writers down smoothly, early, at the pace of the uploads.
//!
//! The background sets a rate from how full the log is and how fast groups retire; lanes ask, before each write, how
//! long to wait. Below half full nobody waits.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// From this share of the log on, writes are paced.
pub(super) const START: f64 = 0.5;
/// Writes are never paced slower than this share of the log per second, however slow the store: an outage is to find the
/// log's second half usable, and a full log stops them anyway.
const FLOOR_OF_LOG: f64 = 1.0 / 64.0;
/// What paced writers together may do at once before they wait, in bytes.
const BURST: u64 = 256 << 10;
/// A waiting write looks again after this time: the rate may have risen.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// See the module's page. Bytes are numbered as they are queued; `allowed` is the number up to which they may go.
#[derive(Debug, Default)]
pub struct Throttle {
    limited: AtomicBool,
    queued: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default, Clone, Copy)]
struct State {
    rate: Option<u64>,
    /// When `allowed` was reckoned.
    at: Duration,
    allowed: u64,
}

impl State {
    fn allowed(&self, now: Duration) -> u64 {
        let gained = u128::from(self.rate.unwrap_or(0)) * now.saturating_sub(self.at).as_nanos() / 1_000_000_000;
        self.allowed.saturating_add(u64::try_from(gained).unwrap_or(u64::MAX))
    }
}

impl Throttle {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the rate: `fill` is the used share of the log of `capacity_bytes` (0 to 1), `drain` the uploads' bytes per second
    /// (`None` while nothing has been uploaded yet). `now` is by the lanes' clock.
    pub fn set(&self, now: Duration, capacity_bytes: u64, fill: f64, drain: Option<f64>) {
        let mut s = self.state();
        let queued = self.queued.load(Ordering::Acquire);
        let next = rate(capacity_bytes, fill, drain);
        // Time that nobody used is not saved up beyond a burst.
        s.allowed = if s.rate.is_none() { queued } else { s.allowed(now).min(queued + BURST) };
        s.at = now;
        s.rate = next;
        self.limited.store(next.is_some(), Ordering::Release);
    }

    /// The present limit in bytes per second.
    #[must_use]
    pub fn limit(&self) -> Option<u64> {
        self.state().rate
    }

    /// Takes a turn for `bytes`; `None` while writes are not paced.
    #[must_use]
    pub fn queue(&self, bytes: u64) -> Option<u64> {
        if !self.limited.load(Ordering::Acquire) {
            return None;
        }
        Some(self.queued.fetch_add(bytes, Ordering::AcqRel) + bytes)
    }

    /// How long the turn still has to wait before it looks again; `None`: it has come.
    #[must_use]
    pub fn wait(&self, turn: u64, now: Duration) -> Option<Duration> {
        let s = *self.state();
        let rate = s.rate?;
        let short = turn.saturating_sub(s.allowed(now));
        (short > 0)
            .then(|| Duration::from_secs_f64(short as f64 / rate as f64).clamp(Duration::from_micros(100), LOOK_AGAIN))
    }
}

/// Bytes per second, or no limit.
fn rate(capacity_bytes: u64, fill: f64, drain: Option<f64>) -> Option<u64> {
    let drain = drain?;
    if fill <= START {
        return None;
    }
    // Ten times the uploads' pace at half full, their own pace at three quarters, a tenth of it at the end: what
    // is left of the log then takes the groups, which free room a whole one at a time.
    let left = ((1.0 - fill) / (1.0 - START)).clamp(0.0, 1.0);
    let factor = 0.1 * 100f64.powf(left);
    Some((drain * factor).max(capacity_bytes as f64 * FLOOR_OF_LOG) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: u64 = 4 << 20;

    #[test]
    fn the_rate_falls_smoothly() {
        assert_eq!(rate(LOG, 0.5, Some(1e6)), None);
        assert_eq!(rate(LOG, 0.9, None), None);
        let mut last = f64::MAX;
        for i in 1..=100 {
            let r = rate(LOG, 0.5 + f64::from(i) * 0.005, Some(1e8)).unwrap() as f64;
            assert!(r <= last && (i == 1 || r > last * 0.9), "step {i}: {last} to {r}");
            last = r;
        }
        assert!((9e6..=1.1e7).contains(&last));
        let middle = rate(LOG, 0.75, Some(1e8)).unwrap();
        assert!((9.9e7..=1.01e8).contains(&(middle as f64)), "the uploads' own pace at three quarters");
    }

    /// Many writers at once, in a world where time goes on only when all wait.
    #[test]
    fn many_writers_together_keep_the_rate() {
        let t = Throttle::default();
        let start = Duration::from_secs(5);
        let mut now = start;
        t.set(now, LOG, 0.99, Some(1e6));
        let limit = t.limit().unwrap() as f64;
        let size = 64 << 10;
        let mut turns: Vec<u64> = (0..64).filter_map(|_| t.queue(size)).collect();
        let mut done = 0u64;
        while now < start + Duration::from_secs(60) {
            let mut soonest = Duration::MAX;
            for turn in &mut turns {
                match t.wait(*turn, now) {
                    None => {
                        done += size;
                        *turn = t.queue(size).unwrap();
                    }
                    Some(w) => soonest = soonest.min(w),
                }
            }
            now += soonest.min(Duration::from_millis(20));
            t.set(now, LOG, 0.99, Some(1e6));
        }
        let got = done as f64 / 60.0;
        assert!((got / limit - 1.0).abs() < 0.1, "{got} against {limit}");
    }

    #[test]
    fn a_lifted_limit_leaves_no_debt() {
        let t = Throttle::default();
        let now = Duration::from_secs(5);
        t.set(now, LOG, 0.99, Some(1e5));
        let turns: Vec<u64> = (0..64).filter_map(|_| t.queue(64 << 10)).collect();
        assert!(t.wait(turns[63], now).is_some());
        t.set(now, LOG, 0.1, Some(1e5));
        assert!(t.wait(turns[63], now).is_none(), "who waits is let go");
        let later = now + Duration::from_secs(60);
        t.set(later, LOG, 0.6, Some(1e8));
        let turn = t.queue(4096).unwrap();
        assert!(t.wait(turn, later).is_none_or(|w| w < Duration::from_millis(2)));
    }
}
