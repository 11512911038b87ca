//! A store whose every call is two steps, its effect and its answer, each taken when the run says so.
//!
//! An answer may be lost after the effect, or the effect come long after the caller has given up, or has died. In a rough store
//! this happens to every call, in the others to changes of chunks alone.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use async_trait::async_trait;
use bytes::Bytes;
use vb_ublk::chunk::header::parse_name;
use vb_ublk::error::{Error, ErrorKind, Result};
use vb_ublk::gc::scan;
use vb_ublk::manifest;
use vb_ublk::store::memory::MemoryStore;
use vb_ublk::store::{ObjectMeta, Precondition, Store, Version};

use crate::machine::Source;
use crate::support_rng::Rng;

enum Effect {
    Put(String, Bytes),
    PutIf(String, Bytes, Precondition),
    Delete(String),
}

enum Step {
    /// Somebody waits for it.
    Of(Option<Waker>),
    /// Nobody does any more.
    Late(Effect),
    Done,
}

struct State {
    rng: Rng,
    next: u64,
    steps: BTreeMap<u64, Step>,
    /// One in so many changes of a chunk is disturbed; 0: none.
    trouble: u64,
    /// One in so many of all others is, and of those where `trouble` is 0; 0: none.
    rough: u64,
    late: u64,
    /// Calls other than changes of chunks that got no answer, or a refusal.
    refused: u64,
    /// Chunks that were deleted, each seen to be garbage at that moment.
    garbage: u64,
}

/// Clones are one store.
#[derive(Clone)]
pub(crate) struct SimStore {
    objects: Arc<MemoryStore>,
    state: Arc<Mutex<State>>,
}

impl fmt::Debug for SimStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimStore")
    }
}

struct Wait {
    store: SimStore,
    id: u64,
}

impl Future for Wait {
    type Output = ();
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        match self.store.state().steps.get_mut(&self.id) {
            Some(Step::Of(waker)) => {
                *waker = Some(cx.waker().clone());
                Poll::Pending
            }
            _ => Poll::Ready(()),
        }
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.store.state().steps.remove(&self.id);
    }
}

/// A change on its way. Whoever gives it up, or dies, does not know whether it comes to be.
struct Flying {
    store: SimStore,
    effect: Option<Effect>,
}

impl Drop for Flying {
    fn drop(&mut self) {
        if let Some(effect) = self.effect.take() {
            let mut s = self.store.state();
            if s.rng.below(2) == 0 {
                let id = s.next;
                s.next += 1;
                s.late += 1;
                s.steps.insert(id, Step::Late(effect));
            }
        }
    }
}

impl SimStore {
    pub(crate) fn new(seed: u64, trouble: u64, rough: u64) -> Self {
        let state =
            State { rng: Rng(seed), next: 0, steps: BTreeMap::new(), trouble, rough, late: 0, refused: 0, garbage: 0 };
        Self { objects: Arc::new(MemoryStore::new()), state: Arc::new(Mutex::new(state)) }
    }

    /// How many changes came after their caller had gone.
    pub(crate) fn late(&self) -> u64 {
        self.state().late
    }

    /// How many calls other than changes of chunks were disturbed.
    pub(crate) fn refused(&self) -> u64 {
        self.state().refused
    }

    /// How many chunks were deleted and seen to be garbage.
    pub(crate) fn garbage(&self) -> u64 {
        self.state().garbage
    }

    /// The objects, without steps and troubles.
    pub(crate) fn plain(&self) -> Arc<MemoryStore> {
        self.objects.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic holds it")
    }

    async fn step(&self) {
        let id = {
            let mut s = self.state();
            s.next += 1;
            let id = s.next - 1;
            s.steps.insert(id, Step::Of(None));
            id
        };
        Wait { store: self.clone(), id }.await;
    }

    async fn apply(&self, effect: Effect) -> Result<Option<Version>> {
        match effect {
            Effect::Put(key, body) => self.objects.put(&key, body).await.map(|()| None),
            Effect::PutIf(key, body, condition) => self.objects.put_if(&key, body, condition).await.map(Some),
            Effect::Delete(key) => {
                at_once(self.is_garbage(&key));
                self.objects.delete(&key).await.map(|()| None)
            }
        }
    }

    /// Whoever deletes a chunk, whenever that comes to be: no published map names it, no snapshot's, and it is none that an attach would look for.
    async fn is_garbage(&self, key: &str) {
        let Some((volume, (chunk, epoch, nonce))) =
            key.split_once("/chunks/").and_then(|(v, c)| Some((v, parse_name(c)?)))
        else {
            return;
        };
        // The rest of a volume that is being deleted is nobody's.
        let Ok((known, _, m)) = scan::look(&*self.objects, volume).await else {
            assert!(
                self.objects.get(&manifest::key(volume)).await.is_err(),
                "{volume} cannot be read when {key} is deleted"
            );
            return;
        };
        if m.deleting.is_some() || m.owner(chunk) != Some((epoch, nonce)) {
            return;
        }
        assert!(chunk <= m.last_chunk(), "{key} is deleted, but the checkpoint ends before it");
        assert!(!known.held.contains(&chunk), "{key} is deleted, but a snapshot names it");
        let live = known.usage.stored(chunk).find(|(c, _)| *c == chunk).map_or(0, |(_, c)| c.live);
        assert_eq!(live, 0, "{key} is deleted, but the published map names it");
        self.state().garbage += 1;
    }

    /// 0: nothing happens to this call; else 1 to 3.
    fn dice(&self, of_a_chunk: bool) -> u64 {
        let mut s = self.state();
        let n = if of_a_chunk && s.trouble > 0 { s.trouble } else { s.rough };
        if n == 0 || s.rng.below(n) != 0 {
            return 0;
        }
        s.refused += u64::from(!of_a_chunk);
        1 + s.rng.below(3)
    }

    async fn change(&self, effect: Effect, of_a_chunk: bool) -> Result<Option<Version>> {
        let mut flying = Flying { store: self.clone(), effect: Some(effect) };
        self.step().await;
        let dice = self.dice(of_a_chunk);
        match dice {
            1 => {
                flying.effect = None;
                return Err(slow_down());
            }
            // The effect comes later, or never.
            2 => return Err(lost()),
            _ => {}
        }
        let Some(effect) = flying.effect.take() else { return Err(lost()) };
        let result = self.apply(effect).await;
        self.step().await;
        if dice == 3 { Err(lost()) } else { result }
    }

    async fn look<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        self.step().await;
        let dice = self.dice(false);
        if dice == 1 {
            return Err(slow_down());
        }
        let result = call.await;
        self.step().await;
        if dice > 1 { Err(lost()) } else { result }
    }
}

/// Runs what waits for nothing, though it may give way to others.
fn at_once<T>(work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    let mut cx = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(done) = work.as_mut().poll(&mut cx) {
            return done;
        }
    }
}

fn slow_down() -> Error {
    Error::new(ErrorKind::Throttled, "slow down")
}

fn lost() -> Error {
    Error::new(ErrorKind::TimedOut, "no answer came")
}

impl Source for SimStore {
    fn under_way(&self) -> Vec<u64> {
        self.state().steps.iter().filter(|(_, s)| !matches!(s, Step::Done)).map(|(id, _)| *id).collect()
    }

    fn end(&self, id: u64, _: &mut Rng) -> bool {
        let step = self.state().steps.insert(id, Step::Done).expect("a step under way");
        match step {
            Step::Of(waker) => {
                if let Some(w) = waker {
                    w.wake();
                }
                true
            }
            Step::Late(effect) => {
                self.state().steps.remove(&id);
                // Nobody hears whether it was refused.
                let _ = at_once(self.apply(effect));
                false
            }
            Step::Done => unreachable!("ended twice"),
        }
    }
}

#[async_trait]
impl Store for SimStore {
    async fn get(&self, key: &str) -> Result<(Bytes, Version)> {
        self.look(self.objects.get(key)).await
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.look(self.objects.get_range(key, range)).await
    }
    async fn put(&self, key: &str, body: Bytes) -> Result<()> {
        // What attaching writes goes through retries of its own, which are tested elsewhere.
        let chunk = key.contains("/chunks/");
        self.change(Effect::Put(key.to_owned(), body), chunk).await.map(drop)
    }
    async fn put_if(&self, key: &str, body: Bytes, condition: Precondition) -> Result<Version> {
        let version = self.change(Effect::PutIf(key.to_owned(), body, condition), false).await?;
        Ok(version.expect("a conditional write has a version"))
    }
    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectMeta>> {
        self.look(self.objects.list(prefix, start_after)).await
    }
    async fn delete(&self, key: &str) -> Result<()> {
        self.change(Effect::Delete(key.to_owned()), false).await.map(drop)
    }
    fn url(&self) -> String {
        "sim:".to_owned()
    }
}
