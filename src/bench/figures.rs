//! What a run has measured.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

/// Kinds of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A read.
    Read,
    /// A write.
    Write,
    /// A flush.
    Flush,
}

const KINDS: [(Kind, &str); 3] = [(Kind::Read, "read"), (Kind::Write, "write"), (Kind::Flush, "flush")];

/// Latencies up to this are told apart, in nanoseconds.
const LONGEST: u64 = 3_600_000_000_000;
/// Digits that latencies have: of all, and of an interval, of which there are many.
const DIGITS: u8 = 3;
const INTERVAL_DIGITS: u8 = 2;

/// Requests of one kind.
#[derive(Debug, Clone)]
pub struct Counted {
    /// Latencies, in nanoseconds.
    pub latency: Histogram<u64>,
    /// Bytes moved.
    pub bytes: u64,
}

impl Counted {
    fn new(digits: u8) -> Self {
        // These bounds are constants that the library takes.
        let latency = Histogram::new_with_bounds(1, LONGEST, digits).unwrap_or_else(|e| panic!("{e}"));
        Self { latency, bytes: 0 }
    }

    fn note(&mut self, latency: Duration, bytes: u64) {
        self.latency.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
        self.bytes += bytes;
    }

    fn add(&mut self, other: &Self) {
        // The bounds are the same.
        self.latency.add(&other.latency).unwrap_or_else(|e| panic!("{e}"));
        self.bytes += other.bytes;
    }
}

/// See the module's page.
#[derive(Debug, Clone)]
pub struct Figures {
    kinds: [Counted; 3],
    every: Option<Duration>,
    /// All kinds together.
    intervals: Vec<Counted>,
    took: Duration,
    filled: Option<Duration>,
    verified_bytes: u64,
}

impl Figures {
    /// Nothing yet; with intervals of this length.
    #[must_use]
    pub fn new(every: Option<Duration>) -> Self {
        Self {
            kinds: KINDS.map(|_| Counted::new(DIGITS)),
            every: every.filter(|e| !e.is_zero()),
            intervals: Vec::new(),
            took: Duration::ZERO,
            filled: None,
            verified_bytes: 0,
        }
    }

    /// A request has ended, `since` after the beginning.
    pub fn note(&mut self, kind: Kind, since: Duration, latency: Duration, bytes: u64) {
        self.kinds[kind as usize].note(latency, bytes);
        if let Some(every) = self.every {
            let at = (since.as_nanos() / every.as_nanos()) as usize;
            while self.intervals.len() <= at {
                self.intervals.push(Counted::new(INTERVAL_DIGITS));
            }
            self.intervals[at].note(latency, bytes);
        }
    }

    /// How long it was counted.
    pub(super) fn took(&mut self, took: Duration) {
        self.took = took;
    }

    /// How long it took before to fill the span, and to flush it.
    pub(super) fn filled(&mut self, took: Duration) {
        self.filled = Some(took);
    }

    pub(super) fn verified(&mut self, bytes: u64) {
        self.verified_bytes += bytes;
    }

    /// Another job's at the same time.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.kinds.iter_mut().zip(&other.kinds) {
            mine.add(theirs);
        }
        for (i, theirs) in other.intervals.iter().enumerate() {
            match self.intervals.get_mut(i) {
                Some(mine) => mine.add(theirs),
                None => self.intervals.push(theirs.clone()),
            }
        }
        self.took = self.took.max(other.took);
        self.filled = self.filled.max(other.filled);
        self.verified_bytes += other.verified_bytes;
    }

    /// Requests of a kind.
    #[must_use]
    pub const fn of(&self, kind: Kind) -> &Counted {
        &self.kinds[kind as usize]
    }

    /// How long it was counted.
    #[must_use]
    pub const fn seconds(&self) -> f64 {
        self.took.as_secs_f64()
    }

    /// Bytes that were read again in the end and found right.
    #[must_use]
    pub const fn verified_bytes(&self) -> u64 {
        self.verified_bytes
    }

    /// The kinds that there were, with their names.
    pub fn kinds(&self) -> impl Iterator<Item = (&'static str, &Counted)> {
        KINDS.into_iter().map(|(kind, name)| (name, self.of(kind))).filter(|(_, c)| !c.latency.is_empty())
    }

    /// All of it. Latencies are in microseconds.
    #[must_use]
    pub fn json(&self) -> Value {
        let seconds = self.seconds().max(f64::MIN_POSITIVE);
        let mut out = json!({ "seconds": seconds, "verified_bytes": self.verified_bytes });
        if let Some(filled) = self.filled {
            out["filled_seconds"] = json!(filled.as_secs_f64());
        }
        for (name, c) in self.kinds() {
            out[name] = json!({
                "requests": c.latency.len(),
                "bytes": c.bytes,
                "per_second": c.latency.len() as f64 / seconds,
                "bytes_per_second": c.bytes as f64 / seconds,
                "latency_us": latencies(&c.latency),
            });
        }
        if let Some(every) = self.every {
            let intervals = self.intervals.iter().zip(0_u32..).map(|(c, n)| {
                json!({
                    "at_seconds": (every * n).as_secs_f64(),
                    "requests": c.latency.len(),
                    "bytes": c.bytes,
                    "latency_us": latencies(&c.latency),
                })
            });
            out["intervals"] = intervals.collect();
        }
        out
    }
}

/// A time in nanoseconds, in microseconds.
fn micros(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

fn latencies(h: &Histogram<u64>) -> Value {
    let at = |q: f64| micros(h.value_at_quantile(q));
    json!({
        "mean": h.mean() / 1000.0,
        "p50": at(0.5),
        "p90": at(0.9),
        "p99": at(0.99),
        "p99.9": at(0.999),
        "p99.99": at(0.9999),
        "max": micros(h.max()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn jobs_at_the_same_time_add_up() {
        let mut a = Figures::new(Some(100 * MS));
        let mut b = a.clone();
        for i in 0..100 {
            a.note(Kind::Write, 2 * i * MS, MS, 4096);
        }
        a.note(Kind::Flush, 199 * MS, 3 * MS, 0);
        b.note(Kind::Write, 450 * MS, 9 * MS, 4096);
        a.took(Duration::from_secs(1));
        b.took(Duration::from_secs(2));
        a.add(&b);
        assert_eq!(a.kinds().map(|(name, _)| name).collect::<Vec<_>>(), ["write", "flush"]);
        let j = a.json();
        assert_eq!((j["write"]["requests"].as_u64(), j["write"]["bytes"].as_u64()), (Some(101), Some(101 * 4096)));
        assert!((j["write"]["per_second"].as_f64().expect("rate") - 50.5).abs() < 1e-9);
        let p50 = j["write"]["latency_us"]["p50"].as_f64().expect("p50");
        assert!((p50 - 1000.0).abs() < 2.0, "{p50}");
        let counts: Vec<_> =
            j["intervals"].as_array().expect("intervals").iter().map(|i| i["requests"].as_u64()).collect();
        assert_eq!(counts, [Some(50), Some(51), Some(0), Some(0), Some(1)]);
        assert_eq!(j["read"], Value::Null);
    }
}
