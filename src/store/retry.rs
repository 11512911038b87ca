//! Bounded retries with exponential backoff and full jitter, for errors that may pass by themselves.
//!
//! Invariants:
//! - Only errors of a transient kind are retried, and refusals of reads where the policy says so; a [`Policy`] bounds the tries and
//!   the whole time.
//! - A conditional put is never sent again before a look at the object: after a try whose outcome is not
//!   known, equal bytes mean that it had landed (success), another content that somebody else wrote
//!   (`Conflict`). So bodies that are written conditionally must differ between writers; the manifest's
//!   carry a publish id.
//! - A conflict on the first try is the caller's: nothing of ours was on its way.

use std::fmt;
use std::ops::Range;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::{Either, select};

use super::{ObjectMeta, Op, Precondition, Store, Version};
use crate::error::{Error, ErrorKind, Result};

/// Longer than any outage. Not `Duration::MAX`, to which no time can be added.
const FOREVER: Duration = Duration::from_secs(20 * 365 * 86_400);

/// How often and how long to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Tries in all, the first included; at least one is made.
    pub attempts: u32,
    /// Upper bound of the first pause; it doubles with each further one.
    pub base: Duration,
    /// Upper bound of any pause.
    pub cap: Duration,
    /// Bound on the whole call: tries and pauses.
    pub deadline: Duration,
    /// Reads that are refused are tried again, too ([`Op::may_be_let_in_later`]).
    pub until_allowed: bool,
}

impl Policy {
    /// For calls that a person waits for: at most 15 s.
    #[must_use]
    pub const fn attach() -> Self {
        Self {
            attempts: 10,
            base: Duration::from_millis(100),
            cap: Duration::from_secs(3),
            deadline: Duration::from_secs(15),
            until_allowed: false,
        }
    }

    /// For a long run of calls, which a short outage must not end: at most a minute a call.
    #[must_use]
    pub const fn long_run() -> Self {
        Self {
            attempts: u32::MAX,
            base: Duration::from_millis(100),
            cap: Duration::from_secs(5),
            deadline: Duration::from_secs(60),
            until_allowed: false,
        }
    }

    /// For the background of a serving volume, which rather waits than fails: an hour a call. Who must
    /// wait longer than that calls again.
    #[must_use]
    pub const fn background() -> Self {
        Self {
            attempts: u32::MAX,
            base: Duration::from_millis(200),
            cap: Duration::from_secs(15),
            deadline: Duration::from_secs(3600),
            until_allowed: false,
        }
    }

    /// For lanes' reads of chunks, which wait for whatever may pass, refusals included, for as long as it takes: it is the request's
    /// timeout that ends them, or the end of the volume.
    #[must_use]
    pub const fn serving() -> Self {
        Self { until_allowed: true, deadline: FOREVER, ..Self::background() }
    }

    /// The pause before try `n` (the second is 1): full jitter, `random` spread over 0 ..= min(cap, base·2ⁿ⁻¹).
    fn pause(&self, n: u32, random: u64) -> Duration {
        let bound = self.base.saturating_mul(1u32.checked_shl(n.saturating_sub(1)).unwrap_or(u32::MAX)).min(self.cap);
        bound.mul_f64(random as f64 / u64::MAX as f64)
    }
}

/// Time and chance, so that tests can own them.
#[async_trait]
pub trait Pacer: Send + Sync + fmt::Debug {
    /// Time since an arbitrary fixed point.
    fn now(&self) -> Duration;
    /// Completes when `d` has passed.
    async fn sleep(&self, d: Duration);
    /// Evenly spread over all of `u64`.
    fn random(&self) -> u64;
}

/// Tokio's timer and the system's entropy.
#[derive(Debug)]
pub struct SystemPacer {
    start: tokio::time::Instant,
}

impl Default for SystemPacer {
    fn default() -> Self {
        Self { start: tokio::time::Instant::now() }
    }
}

#[async_trait]
impl Pacer for SystemPacer {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }
    async fn sleep(&self, d: Duration) {
        tokio::time::sleep(d).await;
    }
    fn random(&self) -> u64 {
        // Without entropy every pause has its full length, which is no harm.
        getrandom::u64().unwrap_or(u64::MAX)
    }
}

/// A store that tries again; see the module's page.
#[derive(Debug, Clone)]
pub struct Retry {
    inner: Arc<dyn Store>,
    policy: Policy,
    pacer: Arc<dyn Pacer>,
}

type Pending<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// One call's tries.
struct Tries<'a> {
    retry: &'a Retry,
    op: Op,
    key: &'a str,
    made: u32,
    started: Duration,
}

impl Tries<'_> {
    fn left(&self) -> Duration {
        self.retry.policy.deadline.saturating_sub(self.retry.pacer.now().saturating_sub(self.started))
    }

    /// Makes one try, cut off at the deadline.
    async fn attempt<T>(&mut self, call: impl Future<Output = Result<T>> + Send) -> Result<T> {
        self.made += 1;
        let limit = pin!(self.retry.pacer.sleep(self.left()));
        match select(pin!(call), limit).await {
            Either::Left((result, _)) => result,
            Either::Right(((), _)) => Err(Error::new(
                ErrorKind::TimedOut,
                format!(
                    "{} {} in {}: no answer within the {:?} allowed for all tries",
                    self.op.verb(),
                    self.key,
                    self.retry.inner.url(),
                    self.retry.policy.deadline
                ),
            )),
        }
    }

    /// Waits before the next try, or gives `error` back when there must be none.
    async fn wait_or_fail(&self, error: Error) -> Result<()> {
        let later = self.retry.policy.until_allowed && self.op.may_be_let_in_later(error.kind());
        if !error.kind().is_transient() && !later {
            return Err(error);
        }
        let pause = self.retry.policy.pause(self.made, self.retry.pacer.random());
        if self.made >= self.retry.policy.attempts || pause >= self.left() {
            if self.made == 1 {
                return Err(error);
            }
            return Err(error.context(format!("gave up after {} tries", self.made)));
        }
        let (verb, key, store) = (self.op.verb(), self.key, self.retry.inner.url());
        if self.made == 1 {
            tracing::warn!(%error, "{verb} {key} in {store} failed; trying again");
        }
        tracing::debug!(%error, tries = self.made, ?pause, "{verb} {key} in {store}: pausing before the next try");
        self.retry.pacer.sleep(pause).await;
        Ok(())
    }

    fn succeeded(&self) {
        if self.made > 1 {
            tracing::info!(
                "{} {} in {} succeeded after {} tries",
                self.op.verb(),
                self.key,
                self.retry.inner.url(),
                self.made
            );
        }
    }
}

/// What a look at the object says about a conditional put of ours whose outcome is not known.
enum Seen {
    /// It landed as this version.
    Ours(Version),
    /// It has not landed, and the precondition still holds.
    NotYet,
    /// Somebody else has written.
    Theirs,
}

impl Retry {
    /// Wraps `inner`, with the system's time and entropy.
    #[must_use]
    pub fn new(inner: Arc<dyn Store>, policy: Policy) -> Self {
        Self::with_pacer(inner, policy, Arc::new(SystemPacer::default()))
    }

    /// Wraps `inner`, with time and chance of the caller's.
    #[must_use]
    pub fn with_pacer(inner: Arc<dyn Store>, policy: Policy, pacer: Arc<dyn Pacer>) -> Self {
        Self { inner, policy, pacer }
    }

    fn tries<'a>(&'a self, op: Op, key: &'a str) -> Tries<'a> {
        Tries { retry: self, op, key, made: 0, started: self.pacer.now() }
    }

    async fn run<'a, T: Send>(
        &'a self,
        op: Op,
        key: &'a str,
        mut call: impl FnMut() -> Pending<'a, T> + Send,
    ) -> Result<T> {
        let mut tries = self.tries(op, key);
        loop {
            match tries.attempt(call()).await {
                Ok(value) => {
                    tries.succeeded();
                    return Ok(value);
                }
                Err(e) => tries.wait_or_fail(e).await?,
            }
        }
    }

    async fn look(&self, key: &str, sent: &Bytes, condition: &Precondition) -> Result<Seen> {
        match self.inner.get(key).await {
            Ok((found, version)) if found == *sent => Ok(Seen::Ours(version)),
            Ok((_, version)) => Ok(match condition {
                Precondition::Matches(wanted) if *wanted == version => Seen::NotYet,
                _ => Seen::Theirs,
            }),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(match condition {
                Precondition::Absent => Seen::NotYet,
                Precondition::Matches(_) => Seen::Theirs,
            }),
            Err(e) => Err(e),
        }
    }

    /// What to say when the object holds another's content: an earlier try of ours may be unknown, but it is not there.
    fn lost(&self, key: &str) -> Error {
        Error::new(
            ErrorKind::Conflict,
            format!("{key} in {} was written by somebody else while this write was tried again", self.inner.url()),
        )
    }

    /// The conditional put after a first try whose outcome is not known (`unknown` tells why).
    async fn put_if_again(
        &self,
        tries: &mut Tries<'_>,
        body: Bytes,
        condition: Precondition,
        unknown: Error,
    ) -> Result<Version> {
        let key = tries.key;
        let mut last = unknown;
        loop {
            tries.wait_or_fail(last).await?;
            match tries.attempt(self.look(key, &body, &condition)).await {
                Ok(Seen::Ours(version)) => return Ok(version),
                Ok(Seen::Theirs) => return Err(self.lost(key)),
                Ok(Seen::NotYet) => {}
                Err(e) => {
                    last = e;
                    continue;
                }
            }
            match tries.attempt(self.inner.put_if(key, body.clone(), condition.clone())).await {
                // The earlier try may have landed between the look and this one.
                Err(e) if e.kind() == ErrorKind::Conflict => loop {
                    match tries.attempt(self.look(key, &body, &condition)).await {
                        Ok(Seen::Ours(version)) => return Ok(version),
                        Ok(_) => return Err(self.lost(key).with_source(e)),
                        Err(again) => tries.wait_or_fail(again).await?,
                    }
                },
                Err(e) => last = e,
                written => return written,
            }
        }
    }
}

#[async_trait]
impl Store for Retry {
    async fn get(&self, key: &str) -> Result<(Bytes, Version)> {
        self.run(Op::Get, key, || self.inner.get(key)).await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.run(Op::GetRange, key, || self.inner.get_range(key, range.clone())).await
    }

    async fn put(&self, key: &str, body: Bytes) -> Result<()> {
        self.run(Op::Put, key, || self.inner.put(key, body.clone())).await
    }

    async fn put_if(&self, key: &str, body: Bytes, condition: Precondition) -> Result<Version> {
        let mut tries = self.tries(Op::PutIf, key);
        match tries.attempt(self.inner.put_if(key, body.clone(), condition.clone())).await {
            Err(e) if e.kind().is_transient() => {
                let version = self.put_if_again(&mut tries, body, condition, e).await?;
                tries.succeeded();
                Ok(version)
            }
            first => first,
        }
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectMeta>> {
        self.run(Op::List, prefix, || self.inner.list(prefix, start_after)).await
    }

    async fn delete(&self, key: &str) -> Result<()> {
        self.run(Op::Delete, key, || self.inner.delete(key)).await
    }

    fn url(&self) -> String {
        self.inner.url()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::store::fault::{Fault, FaultStore};
    use crate::store::memory::MemoryStore;

    /// Virtual time: a sleep lets other tasks go first, then has passed.
    #[derive(Debug, Default)]
    struct TestPacer(Mutex<(Duration, Vec<Duration>)>);

    #[async_trait]
    impl Pacer for TestPacer {
        fn now(&self) -> Duration {
            self.0.lock().expect("pacer").0
        }
        async fn sleep(&self, d: Duration) {
            tokio::task::yield_now().await;
            let mut p = self.0.lock().expect("pacer");
            p.0 += d;
            p.1.push(d);
        }
        fn random(&self) -> u64 {
            u64::MAX
        }
    }

    const POLICY: Policy = Policy {
        attempts: 4,
        base: Duration::from_millis(100),
        cap: Duration::from_millis(250),
        deadline: Duration::from_secs(10),
        until_allowed: false,
    };

    struct Rig {
        memory: Arc<MemoryStore>,
        faults: Arc<FaultStore>,
        pacer: Arc<TestPacer>,
        retry: Retry,
    }

    fn rig(script: Vec<(Op, Fault)>) -> Rig {
        let memory = Arc::new(MemoryStore::new());
        let faults = Arc::new(FaultStore::script(memory.clone(), script));
        let pacer = Arc::new(TestPacer::default());
        let retry = Retry::with_pacer(faults.clone(), POLICY, pacer.clone());
        Rig { memory, faults, pacer, retry }
    }

    const OURS: Bytes = Bytes::from_static(b"ours");
    const THEIRS: Bytes = Bytes::from_static(b"theirs");
    const LOST: Fault = Fault::After(ErrorKind::TimedOut);
    const DOWN: Fault = Fault::Before(ErrorKind::Unreachable);

    #[tokio::test]
    async fn an_outage_that_ends_is_survived_with_growing_pauses() {
        let r = rig(vec![(Op::Put, DOWN), (Op::Put, Fault::Before(ErrorKind::Throttled)), (Op::Put, LOST)]);
        r.retry.put("k", OURS).await.expect("the fourth try");
        assert_eq!(r.faults.calls(), 4);
        let paused = &r.pacer.0.lock().expect("pacer").1;
        assert_eq!(*paused, [100, 200, 250].map(Duration::from_millis));
    }

    #[tokio::test]
    async fn the_tries_are_bounded() {
        let r = rig(vec![(Op::Get, DOWN); 10]);
        let e = r.retry.get("k").await.expect_err("down");
        assert_eq!(e.kind(), ErrorKind::Unreachable);
        assert!(e.to_string().contains("gave up after 4 tries"), "{e}");
        assert_eq!(r.faults.calls(), 4);
    }

    #[tokio::test]
    async fn the_time_is_bounded() {
        let r = rig(vec![(Op::Get, DOWN); 10]);
        let policy = Policy { attempts: 100, deadline: Duration::from_millis(400), ..POLICY };
        let e = Retry::with_pacer(r.faults.clone(), policy, r.pacer).get("k").await.expect_err("down");
        assert_eq!(e.kind(), ErrorKind::Unreachable);
        assert_eq!(r.faults.calls(), 3);
    }

    #[tokio::test]
    async fn a_try_that_hangs_is_cut_off_at_the_deadline() {
        let r = rig(vec![(Op::Get, Fault::Delay(Duration::from_secs(3600)))]);
        let start = tokio::time::Instant::now();
        let policy = Policy { deadline: Duration::from_millis(50), ..Policy::attach() };
        let e = Retry::new(r.faults, policy).get("k").await.expect_err("hangs");
        assert_eq!(e.kind(), ErrorKind::TimedOut);
        assert!((50..5000).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
    }

    #[tokio::test]
    async fn lasting_errors_are_not_retried() {
        for kind in [ErrorKind::Denied, ErrorKind::Full, ErrorKind::Corrupt, ErrorKind::NotFound, ErrorKind::Conflict] {
            let r = rig(vec![(Op::PutIf, Fault::Before(kind)), (Op::List, Fault::Before(kind))]);
            let e = r.retry.put_if("k", OURS, Precondition::Absent).await.expect_err("lasting");
            assert_eq!(e.kind(), kind);
            assert_eq!(r.retry.list("", None).await.expect_err("lasting").kind(), kind);
            assert_eq!(r.faults.calls(), 2);
        }
    }

    /// Keys that were changed, a clock that was wrong: a read behind a serving volume waits for it, and nothing else does.
    #[tokio::test]
    async fn reads_wait_until_they_are_allowed_where_the_policy_says_so() {
        let refused = || vec![(Op::Get, Fault::Before(ErrorKind::Denied)); 3];
        let r = rig(refused());
        r.faults.put("k", OURS).await.expect("put");
        assert_eq!(r.retry.get("k").await.expect_err("at once").kind(), ErrorKind::Denied);
        for (policy, waits) in [(Policy::attach(), false), (Policy::background(), false), (Policy::serving(), true)] {
            let mut script = refused();
            script[1] = (Op::Get, Fault::Before(ErrorKind::Full));
            let r = rig(script);
            r.faults.put("k", OURS).await.expect("put");
            let retry = Retry::with_pacer(r.faults.clone(), policy, r.pacer);
            let got = retry.get("k").await;
            assert_eq!(got.is_ok(), waits, "{policy:?}");
            assert_eq!(r.faults.calls(), if waits { 5 } else { 2 });
        }
        let r = rig(vec![(Op::Put, Fault::Before(ErrorKind::Denied)), (Op::Delete, Fault::Before(ErrorKind::Denied))]);
        let retry = Retry::with_pacer(r.faults.clone(), Policy::serving(), r.pacer);
        assert_eq!(retry.put("k", OURS).await.expect_err("no").kind(), ErrorKind::Denied);
        assert_eq!(retry.delete("k").await.expect_err("no").kind(), ErrorKind::Denied);
    }

    #[tokio::test]
    async fn my_earlier_try_had_landed() {
        let r = rig(vec![(Op::PutIf, LOST), (Op::Get, DOWN)]);
        let version = r.retry.put_if("k", OURS, Precondition::Absent).await.expect("ours");
        assert_eq!(r.memory.get("k").await.expect("get"), (OURS, version.clone()));

        let r2 = rig(vec![(Op::PutIf, Fault::None), (Op::PutIf, LOST)]);
        let first = r2.retry.put_if("k", THEIRS, Precondition::Absent).await.expect("first");
        let second = r2.retry.put_if("k", OURS, Precondition::Matches(first)).await.expect("ours");
        assert_eq!(r2.memory.get("k").await.expect("get"), (OURS, second));
    }

    #[tokio::test]
    async fn somebody_else_wrote() {
        // Our try is lost on its way; before the next one, another host writes.
        for condition in [None, Some(THEIRS)] {
            let memory = Arc::new(MemoryStore::new());
            let condition = match condition {
                None => Precondition::Absent,
                Some(body) => Precondition::Matches(memory.put_if("k", body, Precondition::Absent).await.expect("put")),
            };
            let other = memory.clone();
            let faults = FaultStore::script(memory.clone(), vec![(Op::PutIf, DOWN)]);
            let pacer = Arc::new(OtherWrites(other, AtomicUsize::new(0)));
            let retry = Retry::with_pacer(Arc::new(faults), POLICY, pacer);
            let e = retry.put_if("k", OURS, condition).await.expect_err("theirs");
            assert_eq!(e.kind(), ErrorKind::Conflict);
            assert_eq!(&memory.get("k").await.expect("get").0[..], b"another host");
        }
    }

    /// Another host writes while we pause for the first time.
    #[derive(Debug)]
    struct OtherWrites(Arc<MemoryStore>, AtomicUsize);

    #[async_trait]
    impl Pacer for OtherWrites {
        fn now(&self) -> Duration {
            Duration::ZERO
        }
        async fn sleep(&self, d: Duration) {
            if d == POLICY.deadline {
                return std::future::pending().await;
            }
            if self.1.fetch_add(1, Ordering::Relaxed) == 0 {
                self.0.put("k", Bytes::from_static(b"another host")).await.expect("put");
            }
        }
        fn random(&self) -> u64 {
            u64::MAX
        }
    }

    #[tokio::test]
    async fn a_try_that_lands_late_is_still_ours() {
        // The look sees nothing yet; then the first try lands, and the second finds a conflict.
        let memory = Arc::new(MemoryStore::new());
        let late = memory.clone();
        let calls = AtomicUsize::new(0);
        let faults =
            FaultStore::new(memory.clone(), move |call| match (call.op, calls.fetch_add(1, Ordering::Relaxed)) {
                (Op::PutIf, 0) => DOWN,
                (Op::PutIf, _) => {
                    futures_util::FutureExt::now_or_never(late.put("k", OURS)).expect("memory is quick").expect("put");
                    Fault::None
                }
                _ => Fault::None,
            });
        let retry = Retry::with_pacer(Arc::new(faults), POLICY, Arc::new(TestPacer::default()));
        let version = retry.put_if("k", OURS, Precondition::Absent).await.expect("ours");
        assert_eq!(memory.get("k").await.expect("get").1, version);
    }

    #[test]
    fn pauses_are_jittered_and_never_overflow() {
        let p = Policy::background();
        assert_eq!(p.pause(1, 0), Duration::ZERO);
        assert_eq!(p.pause(u32::MAX, u64::MAX), p.cap);
        assert!(p.pause(3, u64::MAX / 2) < p.pause(3, u64::MAX));
    }
}
