//! The command that makes a volume of what Viperblock has, held against what was written there.

#[expect(dead_code, reason = "no disk image is made")]
mod image_support;
#[path = "store_support/s3s.rs"]
mod s3s;
#[path = "store_support/s3s_thread.rs"]
mod s3s_thread;
mod support_rng;
mod viperblock_support;
#[expect(dead_code, reason = "nothing is drained")]
mod volume_support;

use std::fs;
use std::path::Path;

use image_support::{bench, command, failed, fails, json, objects, ok, path};
use s3s_thread::S3sThread;
use serde_json::json as js;
use vb_ublk::store::{self, StaticCredentials, StoreOptions};
use viperblock_support::{AGES, Bucket, Volume, tag_of};
use volume_support::block_on;

/// The bucket as a folder.
fn lay_out(bucket: &Bucket, folder: &Path) {
    for (key, bytes) in &bucket.objects {
        let to = folder.join(key);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::write(to, bytes).unwrap();
    }
}

fn image_of(file: &Path) -> Vec<u64> {
    fs::read(file).unwrap().chunks(4096).map(tag_of).collect()
}

#[test]
fn a_volume_its_snapshot_and_what_its_host_had_not_uploaded() {
    for age in AGES {
        let bench = bench();
        let mut bucket = Bucket::default();
        let mut golden = Volume::new("ami-0badc0de", 300, age, 10);
        for b in (0..300).step_by(3) {
            golden.write(b, b + 1);
        }
        let mut volume = golden.snapshot(&mut bucket, "snap-1", "vol-0123abcd", 5000);
        let of_snapshot = volume.model.clone();
        for b in 50..120 {
            volume.write(b, 1000 + b);
        }
        volume.upload(&mut bucket, 40);
        volume.checkpoint(&mut bucket, true, 1);
        for b in 100..140 {
            volume.write(b, 2000 + b);
        }
        let mut uploaded = of_snapshot.clone();
        (50..120).for_each(|b| uploaded[b] = 1000 + b as u64);
        volume.crash(&mut bucket);
        let from = path(&bench, "old");
        lay_out(&bucket, &from);
        let url = format!("file://{}", from.display());
        bucket.write_logs(&path(&bench, "host/vol-0123abcd/wal/chunks"));

        // Named after what it is, with the host's logs; and without them.
        let with_log = ["import", "--viperblock", "vol-0123abcd", "--from", &url, "--viperblock-wal", "host", "--json"];
        let said = json(&bench, &with_log);
        assert_eq!((&said["volume"], &said["size_bytes"]), (&js!("vol-0123abcd"), &js!(300 * 4096)), "{said:#}");
        ok(&bench, &["import", "--viperblock", "vol-0123abcd", "--from", &url, "--volume", "stale"]);
        ok(&bench, &["import", "--viperblock", "snap-1", "--from", &url, "--volume", "snap", "--size", "4M"]);
        for (name, want) in [("vol-0123abcd", &volume.model), ("stale", &uploaded), ("snap", &of_snapshot)] {
            ok(&bench, &["export", name, "out.raw"]);
            let found = image_of(&path(&bench, "out.raw"));
            assert!(found[..300] == want[..] && found[300..].iter().all(|t| *t == 0), "{age:?}: {name}");
            fs::remove_file(path(&bench, "out.raw")).unwrap();
            ok(&bench, &["volume", "verify", name]);
        }
        let info = json(&bench, &["volume", "info", "vol-0123abcd", "--json"]);
        assert_eq!(info["metadata"]["VolumeMetadata"]["VolumeID"], "vol-0123abcd", "{info:#}");
        assert!(info["metadata"]["viperblock"].is_object(), "{info:#}");
    }
}

#[test]
fn what_cannot_be_imported_leaves_nothing() {
    let bench = bench();
    let mut bucket = Bucket::default();
    let mut volume = Volume::new("vol-0123abcd", 64, AGES[3], 10);
    (0..64).for_each(|b| volume.write(b, b + 1));
    volume.upload(&mut bucket, 20);
    volume.checkpoint(&mut bucket, true, 0);
    let chunk = bucket.objects.keys().find(|k| k.contains("/chunks/")).unwrap().clone();
    lay_out(&bucket, &path(&bench, "old"));
    let url = format!("file://{}", path(&bench, "old").display());
    let import = ["import", "--viperblock", "vol-0123abcd", "--from", &url];
    fs::remove_file(path(&bench, "old").join(&chunk)).unwrap();
    fails(&bench, &import, 1, &["vol-0123abcd", &chunk]);
    assert_eq!(objects(&bench).len(), 0, "{:?}", objects(&bench));
    fails(&bench, &["import", "--viperblock", "other", "--from", &url, "--volume", "v"], 1, &["other"]);
    fails(&bench, &["import", "--from", &url, "--volume", "v"], 2, &["--viperblock"]);
    fails(&bench, &["import", "x.raw", "--viperblock", "v", "--volume", "v"], 2, &["cannot be used"]);
    fails(&bench, &["import", "--viperblock", "v", "--from", "gopher://x", "--volume", "v"], 2, &["gopher"]);
    let out = command(&bench, &import).env("LC_ALL", "C").output().unwrap();
    failed(&out, 1, &["vol-0123abcd"]);
}

/// The bucket that they are in has a server of its own; where the new volume goes is none of its business.
#[test]
fn from_a_bucket_on_another_server() {
    let bench = bench();
    let mut bucket = Bucket::default();
    let mut volume = Volume::new("vol-0123abcd", 64, AGES[3], 10);
    (0..64).for_each(|b| volume.write(b, b + 1));
    volume.upload(&mut bucket, 64);
    volume.checkpoint(&mut bucket, true, 0);
    let want = volume.model.clone();
    volume.crash(&mut bucket);
    let server = S3sThread::start(&["predastore"]);
    block_on(async {
        let (access_key, secret_key) = (s3s::KEYS.0.into(), s3s::KEYS.1.into());
        let credentials = Some(StaticCredentials { access_key, secret_key, session_token: None });
        let (endpoint, region) = (Some(server.endpoint.clone()), Some("us-east-1".to_owned()));
        let opts = StoreOptions { endpoint, region, credentials, ..StoreOptions::default() };
        let store = store::open(&"s3://predastore".parse().unwrap(), &opts).await.unwrap();
        for (key, bytes) in bucket.objects {
            store.put(&key, bytes.into()).await.unwrap();
        }
    });
    fs::write(
        path(&bench, "credentials"),
        format!("[old]\naws_access_key_id={}\naws_secret_access_key={}\n", s3s::KEYS.0, s3s::KEYS.1),
    )
    .unwrap();
    // The server of the new volume's bucket, had it one, and keys for that.
    let import = |more: &[&str]| {
        let args = [
            &[
                "import",
                "--viperblock",
                "vol-0123abcd",
                "--from",
                "s3://predastore",
                "--endpoint",
                "http://127.0.0.1:9",
            ],
            more,
        ]
        .concat();
        let keys = [("AWS_ACCESS_KEY_ID", "new"), ("AWS_SECRET_ACCESS_KEY", "new")];
        let files =
            [("AWS_SHARED_CREDENTIALS_FILE", "credentials"), ("AWS_CONFIG_FILE", "none"), ("AWS_REGION", "us-east-1")];
        command(&bench, &args).envs(keys).envs(files).output().unwrap()
    };
    let of_its_own = ["--from-endpoint", &server.endpoint, "--from-profile", "old", "--from-region", "eu-north-1"];
    failed(&import(&of_its_own[..2]), 1, &["predastore"]);
    let out = import(&of_its_own);
    assert!(out.status.success(), "{out:?}");
    ok(&bench, &["export", "vol-0123abcd", "out.raw"]);
    assert_eq!(image_of(&path(&bench, "out.raw")), want);
    fails(&bench, &["import", "x.raw", "--volume", "v", "--from-endpoint", &server.endpoint], 2, &["--from"]);
    server.stop();
}
