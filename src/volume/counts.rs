//! What lanes count of the requests that they answer.
//!
//! Invariants:
//! - A lane counts in a place of its own that nobody else writes: a count is a load and a store, and no cache line goes between processors.
//! - What a lane has counted outlives it: counters never go back.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

/// The kinds of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

const KINDS: usize = 5;

/// The counters of one kind of request since the attach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RequestCounts {
    /// Requests that were answered.
    pub requests: u64,
    /// Those of them that failed.
    pub errors: u64,
    /// Bytes of the volume that those were about which succeeded.
    pub bytes: u64,
}

impl RequestCounts {
    const fn plus(self, o: Self) -> Self {
        Self { requests: self.requests + o.requests, errors: self.errors + o.errors, bytes: self.bytes + o.bytes }
    }
}

/// All counters at one moment. Each is exact; together they may be a few requests apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Requests {
    /// Reads.
    pub read: RequestCounts,
    /// Writes.
    pub write: RequestCounts,
    /// Flushes.
    pub flush: RequestCounts,
    /// Discards.
    pub discard: RequestCounts,
    /// Zeroings.
    pub write_zeroes: RequestCounts,
}

impl Requests {
    /// Each kind of request by its name, as in the JSON form.
    #[must_use]
    pub const fn by_kind(&self) -> [(&'static str, RequestCounts); KINDS] {
        let Self { read, write, flush, discard, write_zeroes } = *self;
        [("read", read), ("write", write), ("flush", flush), ("discard", discard), ("write_zeroes", write_zeroes)]
    }

    const fn plus(self, o: Self) -> Self {
        Self {
            read: self.read.plus(o.read),
            write: self.write.plus(o.write),
            flush: self.flush.plus(o.flush),
            discard: self.discard.plus(o.discard),
            write_zeroes: self.write_zeroes.plus(o.write_zeroes),
        }
    }
}

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    errors: AtomicU64,
    bytes: AtomicU64,
}

/// Where one lane counts. As large as what processors fetch at once, so that nothing else lies in it.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Place([Counters; KINDS]);

impl Place {
    fn read(&self) -> Requests {
        // Plain counters: nothing is concluded from one about another.
        let one = |kind: Kind| {
            let c = &self.0[kind as usize];
            RequestCounts {
                requests: c.requests.load(Ordering::Relaxed),
                errors: c.errors.load(Ordering::Relaxed),
                bytes: c.bytes.load(Ordering::Relaxed),
            }
        };
        Requests {
            read: one(Kind::Read),
            write: one(Kind::Write),
            flush: one(Kind::Flush),
            discard: one(Kind::Discard),
            write_zeroes: one(Kind::WriteZeroes),
        }
    }
}

/// A lane's right to count; one thread at a time has it.
#[derive(Debug)]
pub(crate) struct LaneCounter(Arc<Place>, PhantomData<Cell<()>>);

impl LaneCounter {
    /// A request has been answered.
    pub(crate) fn count(&self, kind: Kind, bytes: u64, ok: bool) {
        let c = &self.0.0[kind as usize];
        // Nobody else writes here, so no addition has to be atomic.
        let add = |to: &AtomicU64, n: u64| to.store(to.load(Ordering::Relaxed) + n, Ordering::Relaxed);
        add(&c.requests, 1);
        if ok {
            add(&c.bytes, bytes);
        } else {
            add(&c.errors, 1);
        }
    }
}

/// The counters of all lanes that a volume has and had.
#[derive(Debug, Default)]
pub(crate) struct LaneCounts(Mutex<Lanes>);

#[derive(Debug, Default)]
struct Lanes {
    here: Vec<Arc<Place>>,
    /// Of lanes that have ended.
    ended: Requests,
}

impl Lanes {
    /// NBD clients come and go, and their lanes with them: what those have counted is kept, their places are not.
    fn settle(&mut self) {
        let ended = &mut self.ended;
        self.here.retain_mut(|place| match Arc::get_mut(place) {
            Some(place) => {
                *ended = ended.plus(place.read());
                false
            }
            None => true,
        });
    }
}

impl LaneCounts {
    fn settled<T>(&self, f: impl FnOnce(&mut Lanes) -> T) -> T {
        let mut lanes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lanes.settle();
        f(&mut lanes)
    }

    /// For a new lane.
    pub(crate) fn lane(&self) -> LaneCounter {
        let place = Arc::<Place>::default();
        self.settled(|lanes| lanes.here.push(Arc::clone(&place)));
        LaneCounter(place, PhantomData)
    }

    /// The counters now.
    pub(crate) fn sum(&self) -> Requests {
        self.settled(|lanes| lanes.here.iter().map(|place| place.read()).fold(lanes.ended, Requests::plus))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_lane_has_counted_outlives_it() {
        let all = LaneCounts::default();
        let (a, b) = (all.lane(), all.lane());
        a.count(Kind::Read, 4096, true);
        b.count(Kind::Read, 512, true);
        b.count(Kind::Write, 512, false);
        let expected = Requests {
            read: RequestCounts { requests: 2, errors: 0, bytes: 4608 },
            write: RequestCounts { requests: 1, errors: 1, bytes: 0 },
            ..Requests::default()
        };
        assert_eq!(all.sum(), expected);
        drop(b);
        assert_eq!((all.sum(), all.sum()), (expected, expected), "once, however often it is asked for");
        for _ in 0..100 {
            all.lane().count(Kind::Flush, 0, true);
        }
        assert_eq!(all.sum().flush.requests, 100);
        assert_eq!(all.settled(|lanes| lanes.here.len()), 1, "only those that there are have places");
        a.count(Kind::Discard, 1 << 30, true);
        a.count(Kind::WriteZeroes, 1 << 20, true);
        assert_eq!((all.sum().discard.bytes, all.sum().write_zeroes.bytes), (1 << 30, 1 << 20));
    }

    #[test]
    fn no_two_lanes_share_what_a_processor_fetches() {
        assert_eq!((align_of::<Place>(), size_of::<Place>() % 128), (128, 0));
    }
}
