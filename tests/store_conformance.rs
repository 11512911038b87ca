//! One suite over every store, and what each of them must do besides.

mod store_support;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt as _};
use store_support::garage::{self, Garage};
use store_support::moto::Moto;
use store_support::s3s::{self, S3sFs};
use store_support::tls::Authority;
use store_support::{finished, is_child, open_s3, options, options_with, pattern, run_child};
use vb_ublk::error::{ErrorKind, Result};
use vb_ublk::store::probe::{self, Capability};
use vb_ublk::store::retry::{Policy, Retry};
use vb_ublk::store::{self, ObjectMeta, Precondition, Store, StoreOptions, StoreUrl};

#[track_caller]
fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.expect_err("an error").kind()
}

async fn keys(s: &dyn Store, prefix: &str, after: Option<&str>) -> Vec<String> {
    s.list(prefix, after).await.expect("list").into_iter().map(|o| o.key).collect()
}

/// What every store does. `s` is empty.
async fn suite(s: Arc<dyn Store>) {
    suite_but_for_the_race(&*s).await;
    race(&s).await;
}

/// For servers whose conditional writes hold one after the other, but not against each other.
async fn suite_but_for_the_race(s: &dyn Store) {
    suite_but_for_conditions(s).await;
    conditions(s).await;
    the_probe_finds(s, Capability::Honoured).await;
}

/// For servers that do not know conditional writes.
async fn suite_but_for_conditions(s: &dyn Store) {
    whole_objects(s).await;
    ranges(s).await;
    listings(s).await;
    many(s).await;
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
async fn ignored_conditions(s: &dyn Store) {
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

/// Under the retries, as volumes write their manifests: a server may answer a race with an internal error (moto does), and then only
/// a look at the object says who won.
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

#[tokio::test]
async fn memory() {
    suite(store::open(&"memory:suite".parse().expect("URL"), &StoreOptions::default()).await.expect("open")).await;
}

async fn open_file(dir: &std::path::Path) -> Arc<dyn Store> {
    let url: StoreUrl = format!("file://{}", dir.display()).parse().expect("URL");
    store::open(&url, &StoreOptions { create: true, ..StoreOptions::default() }).await.expect("open")
}

#[tokio::test]
async fn file() {
    let dir = tempfile::tempdir().expect("tempdir");
    suite(open_file(&dir.path().join("new/store")).await).await;
}

/// Four processes add to one number, each time by a conditional put: no addition may be lost.
#[tokio::test]
async fn file_conditions_hold_between_processes() {
    const NAME: &str = "file_conditions_hold_between_processes";
    const ADDITIONS: usize = 40;
    if is_child(NAME) {
        let s = open_file(std::env::var("VB_STORE_DIR").expect("a folder").as_ref()).await;
        for _ in 0..ADDITIONS {
            loop {
                let (body, version) = s.get("n").await.expect("get");
                let n: usize = std::str::from_utf8(&body).expect("text").parse().expect("a number");
                match s.put_if("n", (n + 1).to_string().into(), Precondition::Matches(version)).await {
                    Ok(_) => break,
                    Err(e) => assert_eq!(e.kind(), ErrorKind::Conflict, "{e}"),
                }
            }
        }
        return;
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let s = open_file(dir.path()).await;
    s.put("n", Bytes::from_static(b"0")).await.expect("put");
    let vars = BTreeMap::from([("VB_STORE_DIR", dir.path().display().to_string())]);
    let children: Vec<_> = (0..4).map(|_| run_child(NAME, &vars)).collect();
    for child in children {
        let (ok, text) = finished(child);
        assert!(ok, "{text}");
    }
    assert_eq!(s.get("n").await.expect("get").0, (4 * ADDITIONS).to_string());
}

/// Prints how long a chunk takes. No bound: it is the disk that is measured.
#[tokio::test]
async fn file_speed() {
    let dir = tempfile::Builder::new().tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder on disk");
    let s = open_file(dir.path()).await;
    let body = pattern(1, 4 << 20);
    let (mut put, mut get) = (Vec::new(), Vec::new());
    for n in 0..9 {
        let key = format!("v/{n}");
        let t = Instant::now();
        s.put(&key, body.clone()).await.expect("put");
        put.push(t.elapsed());
        let t = Instant::now();
        assert!(s.get_range(&key, 0..4 << 20).await.expect("get") == body);
        get.push(t.elapsed());
    }
    put.sort_unstable();
    get.sort_unstable();
    println!("file store, 4 MiB: PUT {:?}, GET {:?} (medians of 9)", put[4], get[4]);
}

#[tokio::test]
async fn s3_over_http() {
    let Some(moto) = Moto::shared(false).await else { return };
    moto.make_bucket("suite").await;
    suite(open_s3("s3://suite/some/prefix", &options(&moto.endpoint())).await).await;
    suite(open_s3("s3://suite", &options(&moto.endpoint())).await).await;
}

/// Without the race of writers, which this server loses: it looks first and writes afterwards, without a lock.
/// What a race does is seen over the other stores.
#[tokio::test]
async fn s3s_fs_does_all_but_the_race() {
    let server = S3sFs::start().await;
    server.make_bucket("suite");
    server.make_bucket("whole-bucket");
    let opts = options_with(&server.endpoint(), s3s::KEYS);
    suite_but_for_the_race(&*open_s3("s3://suite/some/prefix", &opts).await).await;
    suite_but_for_the_race(&*open_s3("s3://whole-bucket", &opts).await).await;
    // The connector that trusts anybody is another one: its requests are to be signed as well.
    let insecure = StoreOptions { insecure: true, ..opts };
    suite_but_for_the_race(&*open_s3("s3://suite/insecure", &insecure).await).await;
}

/// The second oddity in [`s3s`]'s list: refused aloud, and nothing that was there is hurt.
#[tokio::test]
async fn s3s_fs_refuses_a_key_below_a_key_and_harms_nothing() {
    let server = S3sFs::start().await;
    server.make_bucket("quirks");
    let s = open_s3("s3://quirks/p", &options_with(&server.endpoint(), s3s::KEYS)).await;
    s.put("k", Bytes::from_static(b"v")).await.expect("put");
    let e = s.put("k/below", Bytes::from_static(b"w")).await.expect_err("a folder where a file is");
    assert_eq!(e.kind(), ErrorKind::Unreachable, "{e}");
    assert!(e.to_string().contains("k/below") && e.to_string().contains("InternalError"), "{e}");
    assert_eq!(&s.get("k").await.expect("get").0[..], b"v");
}

/// A cluster: what one node has acknowledged is there on every other, also while one is dead, and on that when it is back.
#[tokio::test]
async fn garage_does_all_but_conditional_writes() {
    let Some(mut garage) = Garage::long_form(&["suite", "whole-bucket", "locked"]) else { return };
    let (id, secret) = garage.keys.clone();
    let on = |garage: &Garage, n: usize| options_with(&garage.endpoint(n), (&id, &secret));
    for (n, url) in ["s3://suite/some/prefix", "s3://whole-bucket"].into_iter().enumerate() {
        let s = open_s3(url, &on(&garage, n)).await;
        suite_but_for_conditions(&*s).await;
        ignored_conditions(&*s).await;
    }
    let mut nodes = Vec::new();
    for n in 0..garage::NODES {
        nodes.push(open_s3("s3://suite/nodes", &on(&garage, n)).await);
    }
    wrong_keys_are_refused(&garage.endpoint(0), &id, &secret).await;
    a_missing_bucket_is_named(&*open_s3("s3://missing-bucket/p", &on(&garage, 0)).await).await;

    for dead in [None, Some(2), Some(1), Some(0)] {
        if let Some(n) = dead {
            garage.kill(n);
        }
        let alive: Vec<_> = (0..garage::NODES).filter(|n| Some(*n) != dead).collect();
        for round in 0..40 {
            let key = format!("k{}", round % 7);
            let body = pattern(round, 3 << (round % 20));
            let writer = alive[round as usize % alive.len()];
            nodes[writer].put(&key, body.clone()).await.expect("put");
            for reader in &alive {
                let found = nodes[*reader].get(&key).await.expect("get").0;
                assert!(found == body, "{dead:?} dead: node {reader} has not what {writer} acknowledged");
                assert!(keys(&*nodes[*reader], "", None).await.contains(&key));
            }
            // It stays for whoever has been away.
            if round < 33 {
                nodes[writer].delete(&key).await.expect("delete");
                let gone = nodes[alive[alive.len() - 1]].get(&key).await;
                assert_eq!(kind(gone), ErrorKind::NotFound);
            }
        }
        suite_but_for_conditions(&*open_s3("s3://suite/rest", &on(&garage, alive[0])).await).await;
        if let Some(n) = dead {
            garage.restart(n);
            assert_eq!(keys(&*nodes[n], "", None).await.len(), 7, "node {n} is back");
            for round in 33..40 {
                let found = nodes[n].get(&format!("k{}", round % 7)).await.expect("get").0;
                assert!(found == pattern(round, 3 << (round % 20)), "node {n} is back");
            }
        }
    }
}

#[tokio::test]
async fn s3_prefixes_do_not_see_each_other() {
    let Some(moto) = Moto::shared(false).await else { return };
    moto.make_bucket("prefixes").await;
    let a = open_s3("s3://prefixes/a", &options(&moto.endpoint())).await;
    let ab = open_s3("s3://prefixes/ab", &options(&moto.endpoint())).await;
    a.put("k", Bytes::from_static(b"a")).await.expect("put");
    ab.put("k", Bytes::from_static(b"ab")).await.expect("put");
    assert_eq!(keys(&*a, "", None).await, ["k"]);
    assert_eq!(&ab.get("k").await.expect("get").0[..], b"ab");
    assert_eq!(ab.url(), "s3://prefixes/ab");
}

#[tokio::test]
async fn s3_over_tls_with_a_private_authority() {
    let (Some(moto), Some(plain)) = (Moto::shared(true).await, Moto::shared(false).await) else { return };
    let authority = moto.authority.as_ref().expect("a TLS server");
    let trusting = StoreOptions { ca_cert: Some(authority.file("ca.pem")), ..options(&moto.endpoint()) };
    // This server has no buckets: that it says so shows that it was reached.
    let e = open_s3("s3://tls/p", &trusting).await.get("k").await.expect_err("no bucket");
    assert!(e.kind() == ErrorKind::NotFound && e.to_string().contains("no bucket tls"), "{e}");

    // The whole suite through TLS 1.3 with P-384 alone and with X25519 alone.
    for (x25519, bucket) in [(false, "p384"), (true, "x25519")] {
        plain.make_bucket(bucket).await;
        let front = format!("https://127.0.0.1:{}", authority.front(plain.addr, x25519).await);
        let opts = StoreOptions { endpoint: Some(front), ..trusting.clone() };
        suite(open_s3(&format!("s3://{bucket}/p"), &opts).await).await;
    }
}

#[tokio::test]
async fn s3_with_another_authority_is_refused_at_once() {
    let Some(moto) = Moto::shared(true).await else { return };
    let other = Authority::new();
    for ca_cert in [None, Some(other.file("ca.pem"))] {
        let opts = StoreOptions { ca_cert, ..options(&moto.endpoint()) };
        let e = open_s3("s3://b/p", &opts).await.get("k").await.expect_err("not trusted");
        assert_eq!(e.kind(), ErrorKind::Denied, "{e}");
        assert!(e.to_string().contains("--ca-cert"), "{e}");
    }
}

#[tokio::test]
async fn s3_insecure_accepts_any_certificate() {
    let Some(plain) = Moto::shared(false).await else { return };
    plain.make_bucket("insecure").await;
    let front = format!("https://127.0.0.1:{}", Authority::new().front(plain.addr, false).await);
    let opts = StoreOptions { insecure: true, ..options(&front) };
    suite(open_s3("s3://insecure/p", &opts).await).await;
    // And without TLS.
    let opts = StoreOptions { insecure: true, ..options(&plain.endpoint()) };
    assert_eq!(kind(open_s3("s3://insecure/p", &opts).await.get("none").await), ErrorKind::NotFound);
}

#[tokio::test]
async fn s3_wrong_keys_are_refused() {
    let Some(moto) = Moto::start(false).await else { return };
    moto.make_bucket("locked").await;
    let (access_key, secret_key) = moto.check_signatures().await;
    wrong_keys_are_refused(&moto.endpoint(), &access_key, &secret_key).await;
}

#[tokio::test]
async fn s3s_fs_wrong_keys_are_refused() {
    let server = S3sFs::start().await;
    server.make_bucket("locked");
    wrong_keys_are_refused(&server.endpoint(), s3s::KEYS.0, s3s::KEYS.1).await;
}

/// The server has the bucket `locked` and knows these keys alone.
async fn wrong_keys_are_refused(endpoint: &str, access_key: &str, secret_key: &str) {
    let with = |access_key: &str, secret_key: &str| options_with(endpoint, (access_key, secret_key));
    let right = open_s3("s3://locked/p", &with(access_key, secret_key)).await;
    right.put("k", Bytes::from_static(b"v")).await.expect("the right keys");
    for (id, secret) in [(access_key, "wrong"), ("AKIAUNKNOWN", secret_key)] {
        let s = open_s3("s3://locked/p", &with(id, secret)).await;
        let e = s.get("k").await.expect_err("wrong keys");
        assert_eq!(e.kind(), ErrorKind::Denied, "{e}");
        assert!(e.to_string().contains("check"), "{e}");
        assert!(!e.to_string().contains(secret_key), "{e}");
        assert_eq!(kind(s.put("k", Bytes::new()).await), ErrorKind::Denied);
        assert_eq!(kind(s.list("", None).await), ErrorKind::Denied);
    }
    assert_eq!(&right.get("k").await.expect("get").0[..], b"v", "a refused put has written");
}

#[tokio::test]
async fn s3_a_missing_bucket_is_named() {
    let Some(moto) = Moto::shared(false).await else { return };
    a_missing_bucket_is_named(&*open_s3("s3://missing-bucket/p", &options(&moto.endpoint())).await).await;
}

async fn a_missing_bucket_is_named(s: &dyn Store) {
    let condition = Precondition::Absent;
    for e in [
        s.get("k").await.expect_err("get"),
        s.put("k", Bytes::new()).await.expect_err("put"),
        s.put_if("k", Bytes::new(), condition).await.expect_err("put_if"),
        s.list("", None).await.expect_err("list"),
        s.delete("k").await.expect_err("delete"),
    ] {
        assert_eq!(e.kind(), ErrorKind::NotFound, "{e}");
        assert!(e.to_string().contains("no bucket missing-bucket"), "{e}");
    }
}

#[tokio::test]
async fn s3_without_credentials_says_so_quickly() {
    const NAME: &str = "s3_without_credentials_says_so_quickly";
    if is_child(NAME) {
        let opts = StoreOptions { credentials: None, ..options("http://127.0.0.1:9") };
        for (profile, hint) in [(None, "set AWS_ACCESS_KEY_ID"), (Some("nobody".to_owned()), "profile nobody")] {
            let start = Instant::now();
            let opts = StoreOptions { profile, ..opts.clone() };
            let e = store::open(&"s3://b".parse().expect("URL"), &opts).await.expect_err("no credentials");
            assert_eq!(e.kind(), ErrorKind::Denied, "{e}");
            assert!(e.to_string().contains(hint), "{e}");
            assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        }
        return;
    }
    let home = tempfile::tempdir().expect("tempdir");
    let (ok, text) = finished(run_child(NAME, &BTreeMap::from([("HOME", home.path().display().to_string())])));
    assert!(ok, "{text}");
}

#[tokio::test]
async fn s3_settings_come_from_environment_and_profile() {
    const NAME: &str = "s3_settings_come_from_environment_and_profile";
    if is_child(NAME) {
        let profile = std::env::var("VB_STORE_PROFILE").ok();
        let endpoint = profile.as_ref().map(|_| std::env::var("VB_STORE_ENDPOINT").expect("an endpoint"));
        let opts = StoreOptions { profile, endpoint, ..StoreOptions::default() };
        let s = store::open(&"s3://".parse().expect("the bucket of AWS_BUCKET"), &opts).await.expect("open");
        s.put("from-outside", Bytes::from_static(b"v")).await.expect("put");
        return;
    }
    let Some(moto) = Moto::start(false).await else { return };
    moto.make_bucket("outside").await;
    let (id, secret) = moto.check_signatures().await;
    let home = tempfile::tempdir().expect("tempdir");
    std::fs::create_dir(home.path().join(".aws")).expect("mkdir");
    let text = format!("[p]\naws_access_key_id = {id}\naws_secret_access_key = {secret}\nregion = eu-west-1\n");
    std::fs::write(home.path().join(".aws/credentials"), text).expect("write");
    let home = home.path().display().to_string();
    let base = BTreeMap::from([("HOME", home), ("AWS_BUCKET", "outside".to_owned())]);
    for vars in [
        vec![("AWS_HOST", moto.endpoint()), ("AWS_ACCESS_KEY", id.clone()), ("AWS_SECRET_KEY", secret.clone())],
        vec![("AWS_ENDPOINT_URL", moto.endpoint()), ("AWS_ACCESS_KEY_ID", id), ("AWS_SECRET_ACCESS_KEY", secret)],
        vec![
            ("VB_STORE_PROFILE", "p".to_owned()),
            ("VB_STORE_ENDPOINT", moto.endpoint()),
            // Keys in the environment do not go before the profile that was asked for.
            ("AWS_ACCESS_KEY_ID", "wrong".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "wrong".to_owned()),
        ],
    ] {
        let vars: BTreeMap<_, _> = base.clone().into_iter().chain(vars).collect();
        let (ok, text) = finished(run_child(NAME, &vars));
        assert!(ok, "{vars:?}: {text}");
    }
}

/// One store, shared by threads with a runtime each, some of which end: connections must not cross.
#[test]
fn s3_is_shared_between_runtimes() {
    let build = || tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let main = build();
    let Some(moto) = main.block_on(Moto::shared(false)) else { return };
    main.block_on(moto.make_bucket("shared"));
    let s = main.block_on(open_s3("s3://shared/p", &options(&moto.endpoint())));
    main.block_on(s.put("k", Bytes::from_static(b"v"))).expect("put");
    for _ in 0..3 {
        // `main` is not running now, so a connection of its would not answer.
        let got = build().block_on(s.get("k")).expect("get");
        assert_eq!(&got.0[..], b"v");
    }
    drop(main);
    // The store threads' own runtime.
    let s2 = Arc::clone(&s);
    tokio_uring::start(async move {
        s2.put("uring", pattern(3, 4 << 20)).await.expect("put");
        assert!(s2.get_range("uring", 1..4 << 20).await.expect("get") == pattern(3, 4 << 20).slice(1..));
    });
}
