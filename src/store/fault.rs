//! A store that misbehaves on purpose, for tests and benches: slow, failing before or after the effect,
//! handing out damaged bodies, ignoring conditions.
//!
//! Deterministic: what happens to a call is decided by a function of the call's kind, key and number.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};

use super::{ObjectMeta, Op, Precondition, Store, Version};
use crate::error::{Error, ErrorKind, Result};

/// A call that is about to be made.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// Its kind.
    pub op: Op,
    /// Its key or prefix.
    pub key: &'a str,
    /// How many calls this store has seen before it.
    pub number: u64,
}

/// What befalls a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// It fails with this kind and has no effect (`Throttled` for a 503).
    Before(ErrorKind),
    /// It takes effect, but the caller hears of a failure of this kind (the reply is lost).
    After(ErrorKind),
    /// A read hands out only this many bytes of the body, as if it were all. Other calls are not touched.
    Truncate(usize),
    /// A read hands out the body with this bit flipped (modulo its length). Other calls are not touched.
    Flip(usize),
    /// It starts this much later.
    Delay(Duration),
}

type Decide = Box<dyn Fn(Call<'_>) -> Fault + Send + Sync>;

/// See the module's page.
pub struct FaultStore {
    inner: Arc<dyn Store>,
    decide: Decide,
    calls: AtomicU64,
    latency: Duration,
    ignore_conditions: bool,
}

impl fmt::Debug for FaultStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultStore").field("inner", &self.inner).field("calls", &self.calls).finish_non_exhaustive()
    }
}

impl FaultStore {
    /// Asks `decide` about each call.
    pub fn new(inner: Arc<dyn Store>, decide: impl Fn(Call<'_>) -> Fault + Send + Sync + 'static) -> Self {
        Self {
            inner,
            decide: Box::new(decide),
            calls: AtomicU64::new(0),
            latency: Duration::ZERO,
            ignore_conditions: false,
        }
    }

    /// Faults in order: each call takes the first fault left in `script` for its kind.
    pub fn script(inner: Arc<dyn Store>, script: impl IntoIterator<Item = (Op, Fault)>) -> Self {
        let left = Mutex::new(script.into_iter().collect::<VecDeque<_>>());
        Self::new(inner, move |call| {
            let mut left = left.lock().unwrap_or_else(PoisonError::into_inner);
            let at = left.iter().position(|(op, _)| *op == call.op);
            at.and_then(|at| left.remove(at)).map_or(Fault::None, |(_, fault)| fault)
        })
    }

    /// Every call takes this much longer (tokio's time).
    #[must_use]
    pub const fn with_latency(mut self, latency: Duration) -> Self {
        self.latency = latency;
        self
    }

    /// Conditional writes always write, as some stores do.
    #[must_use]
    pub const fn with_conditions_ignored(mut self) -> Self {
        self.ignore_conditions = true;
        self
    }

    /// How many calls there were.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    async fn disturbed<T>(&self, op: Op, key: &str, call: impl Future<Output = Result<T>>) -> Result<(T, Fault)> {
        let fault = (self.decide)(Call { op, key, number: self.calls.fetch_add(1, Ordering::Relaxed) });
        let delay = self.latency + if let Fault::Delay(d) = fault { d } else { Duration::ZERO };
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let injected = |kind, when| Error::new(kind, format!("{} {key}: injected failure {when}", op.verb()));
        match fault {
            Fault::Before(kind) => Err(injected(kind, "before the effect")),
            Fault::After(kind) => {
                call.await?;
                Err(injected(kind, "after the effect"))
            }
            _ => call.await.map(|value| (value, fault)),
        }
    }
}

fn damaged(body: Bytes, fault: Fault) -> Bytes {
    match fault {
        Fault::Truncate(len) => body.slice(..len.min(body.len())),
        Fault::Flip(bit) if !body.is_empty() => {
            let mut changed = BytesMut::from(&body[..]);
            let bit = bit % (body.len() * 8);
            changed[bit / 8] ^= 1 << (bit % 8);
            changed.freeze()
        }
        _ => body,
    }
}

#[async_trait]
impl Store for FaultStore {
    async fn get(&self, key: &str) -> Result<(Bytes, Version)> {
        let ((body, version), fault) = self.disturbed(Op::Get, key, self.inner.get(key)).await?;
        Ok((damaged(body, fault), version))
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let (body, fault) = self.disturbed(Op::GetRange, key, self.inner.get_range(key, range)).await?;
        Ok(damaged(body, fault))
    }

    async fn put(&self, key: &str, body: Bytes) -> Result<()> {
        self.disturbed(Op::Put, key, self.inner.put(key, body)).await.map(|_| ())
    }

    async fn put_if(&self, key: &str, body: Bytes, condition: Precondition) -> Result<Version> {
        let call = async {
            if !self.ignore_conditions {
                return self.inner.put_if(key, body, condition).await;
            }
            self.inner.put(key, body).await?;
            Ok(self.inner.get(key).await?.1)
        };
        Ok(self.disturbed(Op::PutIf, key, call).await?.0)
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectMeta>> {
        Ok(self.disturbed(Op::List, prefix, self.inner.list(prefix, start_after)).await?.0)
    }

    async fn delete(&self, key: &str) -> Result<()> {
        self.disturbed(Op::Delete, key, self.inner.delete(key)).await.map(|_| ())
    }

    fn url(&self) -> String {
        self.inner.url()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::MemoryStore;

    #[tokio::test]
    async fn a_script_is_followed() {
        let m = Arc::new(MemoryStore::new());
        let s = FaultStore::script(
            m.clone(),
            [
                (Op::Put, Fault::Before(ErrorKind::Throttled)),
                (Op::Put, Fault::After(ErrorKind::TimedOut)),
                (Op::Get, Fault::Truncate(2)),
                (Op::Get, Fault::Flip(8)),
                (Op::Get, Fault::Delay(Duration::from_millis(30))),
            ],
        );
        let body = Bytes::from_static(b"abcd");
        assert_eq!(s.put("k", body.clone()).await.expect_err("503").kind(), ErrorKind::Throttled);
        assert!(m.get("k").await.is_err());
        assert_eq!(s.put("k", body.clone()).await.expect_err("lost reply").kind(), ErrorKind::TimedOut);
        assert_eq!(m.get("k").await.expect("it landed").0, body);
        assert_eq!(&s.get("k").await.expect("get").0[..], b"ab");
        assert_eq!(&s.get("k").await.expect("get").0[..], b"accd");
        let before = tokio::time::Instant::now();
        assert_eq!(&s.get("k").await.expect("get").0[..], b"abcd");
        assert!(before.elapsed() >= Duration::from_millis(30));
        assert_eq!(s.calls(), 5);
    }
}
