//! One suite over every store, and what each of them must do besides.

mod store_support;
#[path = "store_support/suite.rs"]
mod suite;

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use store_support::garage::{self, Garage};
use store_support::moto::{Moto, listening};
use store_support::s3s::{self, S3sFs};
use store_support::tls::Authority;
use store_support::{finished, is_child, open_s3, options, options_with, pattern, run_child};
use suite::{
    ignored_conditions, keys, kind, one_after_the_other, suite, suite_but_for_conditions, suite_but_for_the_race,
};
use vb_ublk::error::ErrorKind;
use vb_ublk::store::{self, Precondition, Store, StoreOptions, StoreUrl};

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
    suite_but_for_the_race(&*open_s3("s3://suite/some/prefix", &options(&moto.endpoint())).await).await;
    one_after_the_other(&*open_s3("s3://suite", &options(&moto.endpoint())).await).await;
}

/// As moto, this server loses a race of writers: both look first and write afterwards, without a lock.
#[tokio::test]
async fn s3s_fs_does_all_but_the_race() {
    let server = S3sFs::start().await;
    server.make_bucket("suite");
    server.make_bucket("whole-bucket");
    let opts = options_with(&server.endpoint(), s3s::KEYS);
    suite_but_for_the_race(&*open_s3("s3://suite/some/prefix", &opts).await).await;
    one_after_the_other(&*open_s3("s3://whole-bucket", &opts).await).await;
    // The connector that trusts anybody is another one: its requests are to be signed as well.
    let insecure = StoreOptions { insecure: true, ..opts };
    one_after_the_other(&*open_s3("s3://suite/insecure", &insecure).await).await;
}

/// The soak's server, for which looking and writing are one step, as S3 promises.
#[tokio::test]
async fn s3_with_a_race_of_writers() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (addr, _server) = listening("s3disk.py", |port| {
        let mut command = Command::new("python3");
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/soak/s3disk.py")).arg(dir.path());
        command.args([&port.to_string(), "bucket"]);
        command
    })
    .await;
    suite(open_s3("s3://bucket/some/prefix", &options(&format!("http://{addr}"))).await).await;
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
        one_after_the_other(&*open_s3(&format!("s3://{bucket}/p"), &opts).await).await;
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
    one_after_the_other(&*open_s3("s3://insecure/p", &opts).await).await;
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
    vb_ublk::disk::uring::run(async move {
        s2.put("uring", pattern(3, 4 << 20)).await.expect("put");
        assert!(s2.get_range("uring", 1..4 << 20).await.expect("get") == pattern(3, 4 << 20).slice(1..));
    });
}
