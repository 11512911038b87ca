//! How many reads of the log there may be at once: who uses the volume waits behind each.

use std::cell::Cell;
use std::time::Duration;

use crate::volume::counts::Requests;

/// While others want the disk.
const CALM: usize = 2;
/// While nobody does; and once the log fills up, when writers wait for the uploads instead.
const MANY: usize = 8;
/// Nobody uses the volume when no request has been answered for so long: longer than a request takes, but for the slowest of disks.
const QUIET: Duration = Duration::from_millis(20);

/// How many requests had been answered when somebody looked last, and since when it is so many.
#[derive(Debug, Default)]
pub(super) struct LogReads(Cell<(u64, Duration)>);

impl LogReads {
    /// By what has been `answered` until `now`.
    pub(super) fn at_once(&self, now: Duration, answered: &Requests, is_urgent: bool) -> usize {
        let answered = answered.by_kind().iter().map(|(_, c)| c.requests).sum();
        if answered != self.0.get().0 {
            self.0.set((answered, now));
        }
        let is_quiet = now.saturating_sub(self.0.get().1) >= QUIET;
        if is_urgent || is_quiet { MANY } else { CALM }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::counts::RequestCounts;

    #[test]
    fn reads_are_few_beside_requests() {
        let reads = LogReads::default();
        let ms = Duration::from_millis;
        let answered = |requests| Requests {
            read: RequestCounts { requests, ..RequestCounts::default() },
            flush: RequestCounts { requests: 1, ..RequestCounts::default() },
            ..Requests::default()
        };
        assert_eq!(reads.at_once(ms(100), &answered(10), false), CALM);
        assert_eq!(reads.at_once(ms(119), &answered(10), false), CALM, "not quiet yet");
        assert_eq!(reads.at_once(ms(119), &answered(10), true), MANY);
        assert_eq!(reads.at_once(ms(120), &answered(10), false), MANY);
        assert_eq!(reads.at_once(ms(121), &answered(11), false), CALM, "at once");
    }
}
