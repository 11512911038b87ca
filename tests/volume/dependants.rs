//! Clones and deletions at the same time: every order in which two processes' requests can come to the store.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use async_trait::async_trait;
use bytes::Bytes;
use vb_ublk::error::{ErrorKind, Result};
use vb_ublk::manifest::{By, Published};
use vb_ublk::store::fault::{Fault, FaultStore};
use vb_ublk::store::memory::MemoryStore;
use vb_ublk::store::{ObjectMeta, Precondition, Store, Version};
use vb_ublk::volume::{admin, snapshots};

use crate::volume_support::block_on;

/// Each request waits for one poll before it is made: whoever polls decides whose is next.
#[derive(Debug, Clone, Default)]
struct Turns(MemoryStore);

async fn turn() {
    let mut asked = false;
    std::future::poll_fn(move |cx| {
        if asked {
            return Poll::Ready(());
        }
        asked = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[async_trait]
impl Store for Turns {
    async fn get(&self, key: &str) -> Result<(Bytes, Version)> {
        turn().await;
        self.0.get(key).await
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        turn().await;
        self.0.get_range(key, range).await
    }
    async fn put(&self, key: &str, body: Bytes) -> Result<()> {
        turn().await;
        self.0.put(key, body).await
    }
    async fn put_if(&self, key: &str, body: Bytes, condition: Precondition) -> Result<Version> {
        turn().await;
        self.0.put_if(key, body, condition).await
    }
    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectMeta>> {
        turn().await;
        self.0.list(prefix, start_after).await
    }
    async fn delete(&self, key: &str) -> Result<()> {
        turn().await;
        self.0.delete(key).await
    }
    fn url(&self) -> String {
        self.0.url()
    }
}

type Doing = Pin<Box<dyn Future<Output = Result<()>>>>;

/// Runs all, and at each step polls the one that `order` says; behind its end the first that is not done. Returns what came of
/// each, and the choices: (which of, how many).
fn interleave(mut all: Vec<Doing>, order: &[usize]) -> (Vec<Result<()>>, Vec<(usize, usize)>) {
    let mut cx = Context::from_waker(Waker::noop());
    let mut done: Vec<Option<Result<()>>> = all.iter().map(|_| None).collect();
    let mut choices = Vec::new();
    while done.iter().any(Option::is_none) {
        let open: Vec<usize> = (0..all.len()).filter(|i| done[*i].is_none()).collect();
        let choice = order.get(choices.len()).copied().unwrap_or(0);
        choices.push((choice, open.len()));
        let i = open[choice];
        if let Poll::Ready(result) = all[i].as_mut().poll(&mut cx) {
            done[i] = Some(result);
        }
    }
    (done.into_iter().flatten().collect(), choices)
}

/// Every order there is, one after the other.
fn every_order(mut run: impl FnMut(&[usize]) -> Vec<(usize, usize)>) -> usize {
    let (mut order, mut runs) = (Vec::new(), 0);
    loop {
        let mut choices = run(&order);
        runs += 1;
        while choices.last().is_some_and(|(choice, of)| choice + 1 == *of) {
            choices.pop();
        }
        let Some(last) = choices.last_mut() else { return runs };
        last.0 += 1;
        order = choices.into_iter().map(|c| c.0).collect();
    }
}

/// A volume with a snapshot, in a store of its own.
fn fresh() -> Turns {
    let store = Turns::default();
    block_on(async {
        let opts = admin::CreateOptions { size_bytes: 1 << 20, logical_block: 512 };
        admin::create(&store, "vol", &opts, 1).await.unwrap();
        snapshots::create(&store, "vol", "s", 1).await.unwrap();
    });
    store
}

fn clone(store: &Turns, new: &'static str) -> Doing {
    clone_of(store, "vol", new)
}

fn clone_of(store: &Turns, volume: &'static str, new: &'static str) -> Doing {
    let store = store.clone();
    Box::pin(async move { snapshots::clone(&store, volume, "s", new, None, 2).await.map(drop) })
}

fn delete_snapshot(store: &Turns) -> Doing {
    let store = store.clone();
    Box::pin(async move {
        let mut published = Published::load(&store, "vol").await?;
        snapshots::delete(&store, &mut published, By::Anybody, "s").await
    })
}

fn delete_volume(store: &Turns) -> Doing {
    delete_named(store, "vol", false)
}

fn delete_named(store: &Turns, volume: &'static str, force: bool) -> Doing {
    let store: Arc<dyn Store> = Arc::new(store.clone());
    Box::pin(async move { admin::delete(&*store, volume, force).await.map(drop) })
}

/// As [`fresh`], with a clone of it that has a snapshot of its own, both called `c` and `s`.
fn fresh_chain() -> Turns {
    let store = fresh();
    block_on(async {
        snapshots::clone(&store, "vol", "s", "c", None, 2).await.unwrap();
        snapshots::create(&store, "c", "s", 3).await.unwrap();
    });
    store
}

/// Runs whole when its turn comes, at whatever point between the others' steps: every order of all would be too many.
fn at_once(mut doing: Doing) -> Doing {
    Box::pin(std::future::poll_fn(move |cx| {
        loop {
            if let Poll::Ready(done) = doing.as_mut().poll(cx) {
                return Poll::Ready(done);
            }
        }
    }))
}

fn is_there(store: &Turns, volume: &str) -> bool {
    block_on(Published::load(store, volume)).is_ok()
}

/// A clone that is there has its snapshot; nothing is left of one that is not.
fn check(store: &Turns, clones: &[(&str, bool)], order: &[usize]) {
    block_on(async {
        let parent = Published::load(store, "vol").await.ok().map(|p| p.manifest);
        for (name, made) in clones {
            let there = Published::load(store, name).await.ok().map(|p| p.manifest);
            assert_eq!(there.is_some(), *made, "{order:?}: {name}");
            if let Some(c) = there {
                let of = c.parent().expect("it is a clone").snapshot;
                let kept = parent.iter().flat_map(|p| &p.snapshots).any(|s| s.id == of);
                assert!(kept, "{order:?}: {name} has lost what it was made from");
            }
        }
        let refs = store.list("vol/refs/", None).await.unwrap().len();
        let made = clones.iter().filter(|c| c.1).count();
        assert!(refs >= made, "{order:?}: {refs} refs of {made} clones");
        let marked = parent.iter().any(|p| p.deleting.is_some() || p.snapshots.iter().any(|s| s.deleting.is_some()));
        assert!(!marked, "{order:?}: a mark is left");
    });
}

#[test]
fn of_a_clone_and_a_deletion_at_the_same_time_at_most_one_succeeds() {
    for delete in [delete_snapshot as fn(&Turns) -> Doing, delete_volume] {
        let (mut cloned, mut deleted) = (0, 0);
        let runs = every_order(|order| {
            let store = fresh();
            let (done, choices) = interleave(vec![clone(&store, "c"), delete(&store)], order);
            let ok = (done[0].is_ok(), done[1].is_ok());
            assert!(ok != (true, true), "{order:?}: both");
            cloned += usize::from(ok.0);
            deleted += usize::from(ok.1);
            check(&store, &[("c", ok.0)], order);
            choices
        });
        eprintln!("{runs} orders: cloned in {cloned}, deleted in {deleted}");
        assert!(runs > 100 && cloned > 10 && deleted > 10);
    }
}

#[test]
fn two_deletions_beside_a_clone_do_not_let_each_other_in() {
    // Every order of a clone and one of them, which are a third of a million, in the long form alone.
    let is_long = std::env::var("VB_SOAK").is_ok();
    let of_both = |clone_at_once: bool| {
        every_order(|order| {
            let store = fresh();
            let (cloning, second) = (clone(&store, "c"), at_once(delete_snapshot(&store)));
            let (cloning, first) = match (is_long, clone_at_once) {
                (true, _) => (cloning, delete_snapshot(&store)),
                (false, true) => (at_once(cloning), delete_snapshot(&store)),
                (false, false) => (cloning, at_once(delete_snapshot(&store))),
            };
            let (done, choices) = interleave(vec![cloning, first, second], order);
            let (cloned, deleted) = (done[0].is_ok(), done[1].is_ok() || done[2].is_ok());
            assert!(!(cloned && deleted), "{order:?}: both");
            check(&store, &[("c", cloned)], order);
            choices
        })
    };
    let runs = of_both(false) + if is_long { 0 } else { of_both(true) };
    eprintln!("{runs} orders");
    assert!(runs > 100);
}

#[test]
fn two_clones_of_one_name_are_one() {
    let mut runs = 0;
    runs += every_order(|order| {
        let store = fresh();
        let (done, choices) = interleave(vec![clone(&store, "c"), clone(&store, "c")], order);
        assert_eq!(done.iter().filter(|d| d.is_ok()).count(), 1, "{order:?}");
        check(&store, &[("c", true)], order);
        choices
    });
    assert!(runs > 100, "{runs}");
}

/// A clone goes while what it was made from goes, too: whatever the order, it has that for as long as it is there.
#[test]
fn a_clone_that_is_deleted_lets_go_of_its_snapshot_last() {
    let (mut both, mut clone_alone, mut runs) = (0, 0, 0);
    for delete in [delete_snapshot as fn(&Turns) -> Doing, delete_volume] {
        for clone_at_once in [false, true] {
            runs += every_order(|order| {
                let store = fresh_chain();
                let (of_clone, of_parent) = (delete_named(&store, "c", false), delete(&store));
                let all =
                    if clone_at_once { vec![at_once(of_clone), of_parent] } else { vec![of_clone, at_once(of_parent)] };
                let (done, choices) = interleave(all, order);
                assert!(done[0].is_ok() && !is_there(&store, "c"), "{order:?}: {:?}", done[0]);
                both += usize::from(done[1].is_ok());
                clone_alone += usize::from(done[1].is_err());
                check(&store, &[("c", false)], order);
                // What was refused meanwhile is not any more.
                if done[1].is_err() {
                    let (again, _) = interleave(vec![delete(&store)], &[]);
                    assert!(again[0].is_ok(), "{order:?}: {again:?}");
                }
                choices
            });
        }
    }
    assert!(runs > 30 && both > 5 && clone_alone > 5, "{runs} {both} {clone_alone}");
}

/// The middle of a chain is deleted while a third is made from it.
#[test]
fn of_a_clone_of_a_clone_and_the_deletion_of_the_first_at_most_one_succeeds() {
    let (mut made, mut deleted, mut runs) = (0, 0, 0);
    for (force, clone_at_once) in [(false, false), (false, true), (true, false), (true, true)] {
        runs += every_order(|order| {
            let store = fresh_chain();
            let (cloning, deleting) = (clone_of(&store, "c", "d"), delete_named(&store, "c", force));
            let all = if clone_at_once { vec![at_once(cloning), deleting] } else { vec![cloning, at_once(deleting)] };
            let (done, choices) = interleave(all, order);
            let ok = (done[0].is_ok(), done[1].is_ok());
            assert!(ok != (true, true), "{order:?}: both");
            assert_eq!((is_there(&store, "d"), is_there(&store, "c")), (ok.0, !ok.1), "{order:?}");
            made += usize::from(ok.0);
            deleted += usize::from(ok.1);
            choices
        });
    }
    assert!(runs > 30 && made > 5 && deleted > 5, "{runs} {made} {deleted}");
}

/// A deletion that ends at any of its requests, before it or after: a second one leaves nothing, not even what its parent keeps of it.
#[test]
fn an_interrupted_deletion_is_finished_by_the_next() {
    for (volume, fault) in [
        ("c", Fault::Before(ErrorKind::Unreachable)),
        ("c", Fault::After(ErrorKind::TimedOut)),
        ("lone", Fault::Before(ErrorKind::Unreachable)),
    ] {
        let mut at = 0;
        loop {
            let store = fresh();
            let plain: Arc<dyn Store> = Arc::new(store.0.clone());
            let faulty =
                FaultStore::new(plain.clone(), move |call| if call.number >= at { fault } else { Fault::None });
            let opts = admin::CreateOptions { size_bytes: 1 << 20, logical_block: 512 };
            block_on(async {
                snapshots::clone(&*plain, "vol", "s", "c", None, 2).await.unwrap();
                admin::create(&*plain, "lone", &opts, 1).await.unwrap();
                for n in 0..3 {
                    plain.put(&format!("{volume}/chunks/{n}"), Bytes::from_static(b"x")).await.unwrap();
                }
                let first = admin::delete(&faulty, volume, false).await;
                assert_eq!(first.is_ok(), faulty.calls() <= at, "cut at {at}: {first:?}");
                match admin::delete(&*plain, volume, false).await {
                    Ok(_) => assert!(first.is_err(), "cut at {at}: there was something left"),
                    Err(e) => assert_eq!(e.kind(), ErrorKind::NotFound, "cut at {at}: {e}"),
                }
                let left = plain.list(&format!("{volume}/"), None).await.unwrap();
                assert!(left.is_empty(), "cut at {at}: {left:?}");
                let refs = plain.list("vol/refs/", None).await.unwrap();
                assert_eq!(refs.is_empty(), volume == "c", "cut at {at}: {refs:?}");
                assert!(Published::load(&*plain, "vol").await.is_ok());
            });
            if faulty.calls() <= at {
                assert!(at > 5, "{at} requests");
                break;
            }
            at += 1;
        }
    }
}
