//! Counts what goes through a store, and knows whether it answers.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{ObjectMeta, Op, Precondition, Store, Version};
use crate::error::{Error, Result};

/// The counters of one kind of call since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct OpCounts {
    /// Calls that have returned.
    pub requests: u64,
    /// Those of them that failed, conflicts included.
    pub errors: u64,
    /// Bytes of object data received.
    pub bytes_in: u64,
    /// Bytes of object data sent by calls that succeeded.
    pub bytes_out: u64,
}

/// All counters at one moment. Each is exact; together they may be a few calls apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Snapshot {
    /// Whole objects read.
    #[serde(default, skip_serializing_if = "OpCounts::is_zero")]
    pub get: OpCounts,
    /// Ranges read.
    #[serde(default, skip_serializing_if = "OpCounts::is_zero")]
    pub get_range: OpCounts,
    /// Objects written.
    #[serde(default, skip_serializing_if = "OpCounts::is_zero")]
    pub put: OpCounts,
    /// Conditional writes.
    #[serde(default, skip_serializing_if = "OpCounts::is_zero")]
    pub put_if: OpCounts,
    /// Listings.
    #[serde(default, skip_serializing_if = "OpCounts::is_zero")]
    pub list: OpCounts,
    /// Deletions.
    #[serde(default, skip_serializing_if = "OpCounts::is_zero")]
    pub delete: OpCounts,
}

impl OpCounts {
    // By reference, as serde asks.
    fn is_zero(&self) -> bool {
        *self == Self::default()
    }

    const fn plus(self, o: Self) -> Self {
        Self {
            requests: self.requests + o.requests,
            errors: self.errors + o.errors,
            bytes_in: self.bytes_in + o.bytes_in,
            bytes_out: self.bytes_out + o.bytes_out,
        }
    }
}

impl Snapshot {
    /// Each kind of call by its name, as in the JSON form.
    #[must_use]
    pub const fn by_kind(&self) -> [(&'static str, OpCounts); Op::ALL.len()] {
        let Self { get, get_range, put, put_if, list, delete } = *self;
        [("get", get), ("get_range", get_range), ("put", put), ("put_if", put_if), ("list", list), ("delete", delete)]
    }

    /// Calls of all kinds.
    #[must_use]
    pub fn total_requests(&self) -> u64 {
        self.by_kind().iter().map(|(_, c)| c.requests).sum()
    }

    /// The sums of two clients' counters.
    #[must_use]
    pub const fn plus(self, o: Self) -> Self {
        Self {
            get: self.get.plus(o.get),
            get_range: self.get_range.plus(o.get_range),
            put: self.put.plus(o.put),
            put_if: self.put_if.plus(o.put_if),
            list: self.list.plus(o.list),
            delete: self.delete.plus(o.delete),
        }
    }
}

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    errors: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
}

impl Counters {
    fn read(&self) -> OpCounts {
        // Plain counters: nothing is concluded from one about another.
        OpCounts {
            requests: self.requests.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
            bytes_in: self.bytes_in.load(Ordering::Relaxed),
            bytes_out: self.bytes_out.load(Ordering::Relaxed),
        }
    }
}

/// A store that counts; see the module's page.
#[derive(Debug)]
pub struct Metrics {
    inner: Arc<dyn Store>,
    counters: [Counters; Op::ALL.len()],
    /// Why the last call had no answer, if it had none. Who tries again behind this tells nobody for an hour.
    silence: Mutex<Option<String>>,
}

impl Metrics {
    /// Wraps `inner`.
    #[must_use]
    pub fn new(inner: Arc<dyn Store>) -> Self {
        Self { inner, counters: Default::default(), silence: Mutex::default() }
    }

    /// Why the store does not answer, from the first call that had none to the next that has one.
    #[must_use]
    pub fn silence(&self) -> Option<String> {
        self.silence.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The counters now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let [get, get_range, put, put_if, list, delete] = Op::ALL.map(|op| self.counters[op as usize].read());
        Snapshot { get, get_range, put, put_if, list, delete }
    }

    fn count<T>(&self, op: Op, result: Result<T>, received: impl FnOnce(&T) -> usize, sent: usize) -> Result<T> {
        let c = &self.counters[op as usize];
        c.requests.fetch_add(1, Ordering::Relaxed);
        // A refusal, or that there is no such object, is an answer; but readers wait for refusals to pass.
        let waits = |e: &&Error| e.kind().is_transient() || op.may_be_let_in_later(e.kind());
        let silence = result.as_ref().err().filter(waits).map(ToString::to_string);
        *self.silence.lock().unwrap_or_else(PoisonError::into_inner) = silence;
        match &result {
            Ok(value) => {
                c.bytes_in.fetch_add(received(value) as u64, Ordering::Relaxed);
                c.bytes_out.fetch_add(sent as u64, Ordering::Relaxed);
            }
            Err(_) => {
                c.errors.fetch_add(1, Ordering::Relaxed);
            }
        }
        result
    }
}

#[async_trait]
impl Store for Metrics {
    async fn get(&self, key: &str) -> Result<(Bytes, Version)> {
        self.count(Op::Get, self.inner.get(key).await, |(body, _)| body.len(), 0)
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.count(Op::GetRange, self.inner.get_range(key, range).await, Bytes::len, 0)
    }

    async fn put(&self, key: &str, body: Bytes) -> Result<()> {
        let sent = body.len();
        self.count(Op::Put, self.inner.put(key, body).await, |()| 0, sent)
    }

    async fn put_if(&self, key: &str, body: Bytes, condition: Precondition) -> Result<Version> {
        let sent = body.len();
        self.count(Op::PutIf, self.inner.put_if(key, body, condition).await, |_| 0, sent)
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectMeta>> {
        self.count(Op::List, self.inner.list(prefix, start_after).await, |_| 0, 0)
    }

    async fn delete(&self, key: &str) -> Result<()> {
        self.count(Op::Delete, self.inner.delete(key).await, |()| 0, 0)
    }

    fn url(&self) -> String {
        self.inner.url()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::store::fault::{Fault, FaultStore};
    use crate::store::memory::MemoryStore;

    #[tokio::test]
    async fn it_knows_whether_the_store_answers() {
        let away = Fault::Before(ErrorKind::Unreachable);
        let script = [(Op::Put, away), (Op::Put, Fault::Before(ErrorKind::Throttled))];
        let s = Metrics::new(Arc::new(FaultStore::script(Arc::new(MemoryStore::new()), script)));
        assert_eq!(s.silence(), None);
        for _ in 0..2 {
            let why = s.put("a", Bytes::new()).await.expect_err("away");
            assert_eq!(s.silence(), Some(why.to_string()));
        }
        s.get("b").await.expect_err("no such object");
        assert_eq!(s.silence(), None, "that was an answer");
    }

    #[tokio::test]
    async fn every_kind_has_its_own_counters() {
        let s = Metrics::new(Arc::new(MemoryStore::new()));
        s.put("a", Bytes::from_static(b"12345")).await.expect("put");
        s.put_if("a", Bytes::from_static(b"1"), Precondition::Absent).await.expect_err("exists");
        s.get("a").await.expect("get");
        s.get_range("a", 1..3).await.expect("range");
        s.list("", None).await.expect("list");
        s.delete("a").await.expect("delete");
        let one = OpCounts { requests: 1, ..OpCounts::default() };
        let all = Snapshot {
            get: OpCounts { bytes_in: 5, ..one },
            get_range: OpCounts { bytes_in: 2, ..one },
            put: OpCounts { bytes_out: 5, ..one },
            put_if: OpCounts { errors: 1, ..one },
            list: one,
            delete: one,
        };
        assert_eq!(s.snapshot(), all);
        let json = serde_json::to_value(all).expect("json");
        assert_eq!(json["get_range"]["bytes_in"], 2);
    }
}
