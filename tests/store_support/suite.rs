//! What every store does.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt as _};
use vb_ublk::error::{ErrorKind, Result};
use vb_ublk::store::probe::{self, Capability};
use vb_ublk::store::retry::{Policy, Retry};
use vb_ublk::store::{ObjectMeta, Precondition, Store};

use crate::store_support::pattern;

#[track_caller]
pub(crate) fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.expect_err("an error").kind()
}

pub(crate) async fn keys(s: &dyn Store, prefix: &str, after: Option<&str>) -> Vec<String> {
    s.list(prefix, after).await.expect("list").into_iter().map(|o| o.key).collect()
}

/// What every store does. `s` is empty.
pub(crate) async fn suite(s: Arc<dyn Store>) {
    suite_but_for_the_race(&*s).await;
    race(&s).await;
}

/// For servers whose conditional writes hold one after the other, but not against each other.
pub(crate) async fn suite_but_for_the_race(s: &dyn Store) {
    many(s).await;
    one_after_the_other(s).await;
}

/// Without what takes a server long, for one that has had the rest: by another way, under another prefix.
pub(crate) async fn one_after_the_other(s: &dyn Store) {
    few(s).await;
    conditions(s).await;
    the_probe_finds(s, Capability::Honoured).await;
}

/// For servers that do not know conditional writes.
pub(crate) async fn suite_but_for_conditions(s: &dyn Store) {
    few(s).await;
    many(s).await;
}

async fn few(s: &dyn Store) {
    whole_objects(s).await;
    ranges(s).await;
    listings(s).await;
}

async fn the_probe_finds(s: &dyn Store, expected: Capability) {
    assert_eq!(probe::conditional_writes(s, "probe/").await.expect("probe"), expected);
    assert_eq!(keys(s, "probe/", None).await, [""; 0], "the probe cleans up");
}

async fn whole_objects(s: &dyn Store) {
    assert_eq!(kind(s.get("none").await), ErrorKind::NotFound);
    assert_eq!(kind(s.get("none/below").await), ErrorKind::NotFound);
    assert_eq!(kind(s.get("../up").await), ErrorKind::Usage);
    for (seed, len) in [(1, 0), (2, 1), (3, 4096), (4, (4 << 20) + 32_768 + 1), (5, 9 << 20)] {
        let body = pattern(seed, len);
        s.put("whole", body.clone()).await.expect("put");
        let (found, version) = s.get("whole").await.expect("get");
        assert!(found == body, "{len} bytes came back changed");
        // The version changes with the content.
        let more = Bytes::from([&body[..], b"!"].concat());
        s.put("whole", more.clone()).await.expect("overwrite");
        let (found, changed) = s.get("whole").await.expect("get");
        assert!(found == more, "{len} bytes: the overwrite is not there");
        assert_ne!(version, changed);
    }
    for key in [
        "a-b_c.d/E=1,2/x y",
        "deep/1/2/3/4/5/k",
        "dots..in/.name",
        "at@b:c;d(e)'f*g!",
        "umlaut-ü",
        "plus+100%",
        "plus+%2Bc%20d",
    ] {
        s.put(key, Bytes::copy_from_slice(key.as_bytes())).await.expect(key);
        assert_eq!(s.get(key).await.expect(key).0, key.as_bytes());
        assert_eq!(s.list(key, None).await.expect(key), [ObjectMeta { key: key.into(), size: key.len() as u64 }]);
        s.delete(key).await.expect(key);
    }
    s.delete("whole").await.expect("delete");
    s.delete("whole").await.expect("deleting again is no error");
    s.delete("never/was").await.expect("deleting what never was is no error");
    assert_eq!(kind(s.get("whole").await), ErrorKind::NotFound);
    assert_eq!(keys(s, "", None).await, [""; 0]);
}

async fn ranges(s: &dyn Store) {
    let body = pattern(7, 10_000);
    s.put("v/ranges", body.clone()).await.expect("put");
    for r in [0..1u64, 0..10_000, 4096..8192, 9_999..10_000, 1..9_999] {
        let part = s.get_range("v/ranges", r.clone()).await.expect("range");
        assert_eq!(part, body.slice(r.start as usize..r.end as usize), "{r:?}");
    }
    for r in [9_999..10_001u64, 10_000..10_001, 50_000..60_000, 0..10_001] {
        assert_eq!(kind(s.get_range("v/ranges", r).await), ErrorKind::Corrupt);
    }
    let backwards = Range { start: 6, end: 5 };
    for r in [5..5u64, backwards, 0..u64::MAX] {
        assert_eq!(kind(s.get_range("v/ranges", r).await), ErrorKind::Usage);
    }
    s.put("v/empty", Bytes::new()).await.expect("put");
    assert_eq!(kind(s.get_range("v/empty", 0..1).await), ErrorKind::Corrupt);
    assert_eq!(kind(s.get_range("v/none", 0..1).await), ErrorKind::NotFound);
    for key in ["v/ranges", "v/empty"] {
        s.delete(key).await.expect("delete");
    }
}

async fn listings(s: &dyn Store) {
    // In byte order: '-' < '.' < '/' < '0'.
    let all = ["l/a", "l/b-1", "l/b.1", "l/b/1", "l/b/2/x", "l/b0", "l/c", "m/z"];
    for (i, key) in all.iter().rev().enumerate() {
        s.put(key, Bytes::from(vec![0; i])).await.expect("put");
    }
    assert_eq!(keys(s, "", None).await, all);
    assert_eq!(keys(s, "l/", None).await, all[..7]);
    assert_eq!(keys(s, "l/b", None).await, all[1..6]);
    assert_eq!(keys(s, "l/b/", None).await, all[3..5]);
    assert_eq!(keys(s, "l/b/2/x", None).await, all[4..5]);
    assert_eq!(keys(s, "l/", Some("l/b.1")).await, all[3..7]);
    assert_eq!(keys(s, "l/", Some("l/b")).await, all[1..7], "start_after need not exist");
    assert_eq!(keys(s, "l/b/", Some("a")).await, all[3..5], "start_after before the prefix");
    assert_eq!(keys(s, "l/b/", Some("z")).await, [""; 0], "start_after behind the prefix");
    assert_eq!(keys(s, "x", None).await, [""; 0]);
    assert_eq!(s.list("m/", None).await.expect("list"), [ObjectMeta { key: "m/z".into(), size: 0 }]);
    assert_eq!(s.list("l/a", None).await.expect("list")[0].size, 7);
    for key in all {
        s.delete(key).await.expect("delete");
    }
}

async fn conditions(s: &dyn Store) {
    let body = |n: u64| pattern(n, 300);
    let first = s.put_if("c/k", body(1), Precondition::Absent).await.expect("absent");
    assert_eq!(s.get("c/k").await.expect("get"), (body(1), first.clone()));
    assert_eq!(kind(s.put_if("c/k", body(2), Precondition::Absent).await), ErrorKind::Conflict);
    let second = s.put_if("c/k", body(3), Precondition::Matches(first.clone())).await.expect("matches");
    assert_ne!(first, second);
    assert_eq!(kind(s.put_if("c/k", body(4), Precondition::Matches(first)).await), ErrorKind::Conflict);
    assert_eq!(s.get("c/k").await.expect("get"), (body(3), second.clone()));
    s.put("c/k", body(5)).await.expect("put");
    assert_eq!(kind(s.put_if("c/k", body(6), Precondition::Matches(second.clone())).await), ErrorKind::Conflict);
    s.delete("c/k").await.expect("delete");
    assert_eq!(kind(s.put_if("c/k", body(7), Precondition::Matches(second)).await), ErrorKind::Conflict);
    s.put_if("c/k", body(8), Precondition::Absent).await.expect("absent again");
    s.delete("c/k").await.expect("delete");
}

/// What takes the place of [`conditions`] on a server that ignores them: it writes, and says so, whatever the condition.
pub(crate) async fn ignored_conditions(s: &dyn Store) {
    let body = |n: u64| pattern(n, 300);
    let first = s.put_if("c/k", body(1), Precondition::Absent).await.expect("absent");
    let second = s.put_if("c/k", body(2), Precondition::Absent).await.expect("ignored");
    assert_eq!(s.get("c/k").await.expect("get"), (body(2), second.clone()));
    let third = s.put_if("c/k", body(3), Precondition::Matches(first)).await.expect("ignored");
    assert_ne!(second, third);
    assert_eq!(s.get("c/k").await.expect("get"), (body(3), third.clone()), "the version is that of the content");
    s.delete("c/k").await.expect("delete");
    s.put_if("c/k", body(4), Precondition::Matches(third)).await.expect("ignored, though there is nothing");
    s.delete("c/k").await.expect("delete");
    the_probe_finds(s, Capability::Ignored).await;
}

/// Under the retries, as volumes write their manifests: a server may answer a race with an internal error, and then only a look at the
/// object says who won.
async fn race(s: &Arc<dyn Store>) {
    let s = &Arc::new(Retry::new(Arc::clone(s), Policy::attach()));
    for round in 0..4 {
        let key = format!("race/{round}");
        let tries = (0..8u64).map(|n| {
            let (s, key) = (Arc::clone(s), key.clone());
            tokio::spawn(async move { s.put_if(&key, pattern(n, 5000), Precondition::Absent).await })
        });
        let mut winner = None;
        for (n, outcome) in join_all(tries).await.into_iter().enumerate() {
            match outcome.expect("join") {
                Ok(version) => assert!(winner.replace((n as u64, version)).is_none(), "two winners"),
                Err(e) => assert_eq!(e.kind(), ErrorKind::Conflict, "{e}"),
            }
        }
        let (n, version) = winner.expect("one wins");
        assert_eq!(s.get(&key).await.expect("get"), (pattern(n, 5000), version));
        s.delete(&key).await.expect("delete");
    }
}

/// More objects than a server lists at once.
async fn many(s: &dyn Store) {
    let all: Vec<String> = (0..1100).map(|n| format!("many/{n:016x}")).collect();
    let put = |key: String| async move { s.put(&key, Bytes::from_static(b"x")).await.expect("put") };
    stream::iter(all.clone()).map(put).buffer_unordered(16).collect::<Vec<()>>().await;
    assert_eq!(keys(s, "many/", None).await, all);
    assert_eq!(keys(s, "", Some(&all[1049])).await, all[1050..]);
    let delete = |key: String| async move { s.delete(&key).await.expect("delete") };
    stream::iter(all).map(delete).buffer_unordered(16).collect::<Vec<()>>().await;
}
