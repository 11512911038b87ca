//! The command that makes a volume of what Viperblock has, held against what was written there.

#[expect(dead_code, reason = "no disk image is made")]
mod image_support;
mod support_rng;
mod viperblock_support;
#[expect(dead_code, reason = "nothing is drained")]
mod volume_support;

use std::fs;
use std::path::Path;

use image_support::{bench, command, failed, fails, json, objects, ok, path};
use serde_json::json as js;
use viperblock_support::{AGES, Bucket, Volume, tag_of};

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
