//! Volumes, AMIs and snapshots of Viperblock, of every age: what is read is what was written, by the order of writes alone.

mod support_rng;
mod viperblock_support;

use std::ops::{Deref, DerefMut};
use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};
use support_rng::Rng;
use tempfile::TempDir;
use vb_ublk::error::{ErrorKind, Result};
use vb_ublk::image::ImageSource;
use vb_ublk::image::viperblock::Viperblock;
use viperblock_support::{
    AGES, Age, BLOCK, Bucket, Volume, chunk, image, layers, log, log_record, map, map_record, snapshot_config,
    volume_config,
};

/// An image, and the folder that its logs are in.
struct Opened(Viperblock, #[allow(dead_code, reason = "it has to stay")] TempDir);

impl Deref for Opened {
    type Target = Viperblock;
    fn deref(&self) -> &Viperblock {
        &self.0
    }
}

impl DerefMut for Opened {
    fn deref_mut(&mut self) -> &mut Viperblock {
        &mut self.0
    }
}

async fn open(bucket: &Bucket, name: &str, logs: bool) -> Result<Opened> {
    let dir = tempfile::tempdir().unwrap();
    bucket.write_logs(&dir.path().join(name).join("wal/chunks"));
    let src = Viperblock::open(bucket.store().await, name, logs.then_some(dir.path())).await?;
    Ok(Opened(src, dir))
}

async fn tags(bucket: &Bucket, name: &str, logs: bool) -> Vec<u64> {
    let mut src = open(bucket, name, logs).await.unwrap();
    image(&mut src, 3000).await.unwrap()
}

/// A bucket with the volume `vol` of 8 blocks, whose map has `records`: block, chunk, index, seq. Block `i` of chunk `c` is 10c + i + 1.
fn laid_out(numbered: bool, header: bool, file: &str, records: &[(u64, u64, u32, u64)]) -> Bucket {
    let mut b = Bucket::default();
    b.put_json("vol/config.json", &volume_config("vol", 8));
    put_map(&mut b, &format!("vol/checkpoints/{file}"), numbered, records);
    for c in 0..4 {
        b.put(format!("vol/chunks/chunk.{c:08}.bin"), chunk(header, &[10 * c + 1, 10 * c + 2, 10 * c + 3]));
    }
    b
}

fn put_map(b: &mut Bucket, key: &str, numbered: bool, records: &[(u64, u64, u32, u64)]) {
    let of: Vec<_> = records.iter().map(|r| map_record(numbered, r.0, r.1, 10 + r.2 * 4096, r.3)).collect();
    b.put(key, map(&of));
}

#[tokio::test]
async fn chunks_and_maps_of_every_age() {
    for numbered in [false, true] {
        for header in [false, true] {
            let mut b = laid_out(
                numbered,
                header,
                "blocks.live.bin",
                &[(0, 1, 0, 1), (1, 1, 1, 2), (2, 1, 2, 3), (5, 2, 1, 4)],
            );
            assert_eq!(tags(&b, "vol", false).await, [11, 12, 13, 0, 0, 22, 0, 0]);
            // Each chunk is of its own age.
            b.put("vol/chunks/chunk.00000002.bin", chunk(!header, &[91, 92]));
            let mut src = open(&b, "vol", false).await.unwrap();
            assert_eq!(image(&mut src, 100_000).await.unwrap(), [11, 12, 13, 0, 0, 92, 0, 0]);
            let m = Value::Object(src.metadata());
            assert_eq!(m["viperblock"]["chunks"], json!({"with_header": 1, "without_header": 1}));
            assert_eq!(m["viperblock"]["map"]["record_bytes"], if numbered { 34 } else { 26 });
            assert_eq!(m["VolumeMetadata"]["VolumeID"], "vol");
            assert_eq!(m["AMIMetadata"]["Tags"], json!({"a": "b"}));
        }
    }
}

#[tokio::test]
async fn the_live_map_counts_then_the_named_one_then_the_last() {
    let mut b = laid_out(true, true, "blocks.00000007.bin", &[(0, 0, 0, 1)]);
    put_map(&mut b, "vol/checkpoints/blocks.00000003.bin", true, &[(0, 1, 0, 1)]);
    assert_eq!(tags(&b, "vol", false).await[0], 1);
    let mut c = volume_config("vol", 8);
    c["BlockToObjectWALNum"] = json!(3);
    b.put_json("vol/config.json", &c);
    assert_eq!(tags(&b, "vol", false).await[0], 11);
    put_map(&mut b, "vol/checkpoints/blocks.live.bin", true, &[(0, 2, 0, 1)]);
    assert_eq!(tags(&b, "vol", false).await[0], 21);
}

#[tokio::test]
async fn of_records_of_a_block_the_highest_seq_counts_else_the_last() {
    let twice = [(3, 1, 0, 9), (3, 2, 0, 5), (4, 1, 1, 6), (4, 2, 1, 6)];
    let b = laid_out(true, true, "blocks.live.bin", &twice);
    assert_eq!(tags(&b, "vol", false).await[3..5], [11, 22]);
    let b = laid_out(false, true, "blocks.live.bin", &twice);
    assert_eq!(tags(&b, "vol", false).await[3..5], [21, 22]);
}

#[tokio::test]
async fn logs_go_over_the_map_block_by_block() {
    // The defect of Viperblock's own recovery: a block in the middle of an uploaded run is lost. And what is older than the map loses.
    let records = [(0, 1, 0, 10), (1, 1, 1, 11), (2, 1, 2, 12)];
    let mut b = laid_out(true, true, "blocks.live.bin", &records);
    b.logs.insert(
        "wal.00000001.bin".into(),
        log(&[log_record(10, 0, 4096, 70), log_record(13, 1, 0, 71), log_record(11, 2, 0, 72)]),
    );
    b.logs.insert(
        "wal.00000002.bin".into(),
        log(&[log_record(14, 6, 0, 73), log_record(12, 6, 0, 74), log_record(14, 6, 0, 75)]),
    );
    b.logs.insert("other.bin".into(), vec![1; 50]);
    assert_eq!(tags(&b, "vol", false).await, [11, 12, 13, 0, 0, 0, 0, 0]);
    let mut src = open(&b, "vol", true).await.unwrap();
    assert_eq!(image(&mut src, 512).await.unwrap(), [11, 71, 13, 0, 0, 0, 73, 0]);
    let wal = &src.metadata()["viperblock"]["wal"];
    assert_eq!((&wal["files"], &wal["records"], &wal["blocks_merged"]), (&json!(2), &json!(6), &json!(2)));
    assert_eq!(wal["blocks_already_uploaded"], 2);
    // An old map does not know: the logs count, as in Viperblock's recovery.
    let old = Bucket { logs: b.logs, ..laid_out(false, true, "blocks.live.bin", &records) };
    assert_eq!(tags(&old, "vol", true).await, [70, 71, 72, 0, 0, 0, 73, 0]);
}

#[tokio::test]
async fn a_clones_logs_go_over_what_lies_below_whatever_its_seqs() {
    let mut b = laid_out(true, true, "blocks.live.bin", &[(0, 1, 0, 1000), (1, 1, 1, 1001)]);
    b.put_json("snap/config.json", &snapshot_config("snap", "vol", 2, false));
    put_map(&mut b, "snap/checkpoints/blocks.00000000.bin", true, &[(0, 1, 0, 1000), (1, 1, 1, 1001)]);
    let mut c = volume_config("clone", 8);
    c["SnapshotID"] = json!("snap");
    b.put_json("clone/config.json", &c);
    assert_eq!(tags(&b, "clone", false).await[..3], [11, 12, 0]);
    b.logs.insert("wal.00000000.shard_01.bin".into(), log(&[log_record(1, 1, 0, 77)]));
    assert_eq!(tags(&b, "clone", true).await[..3], [11, 77, 0]);
    // The snapshot itself: all of its volume's size.
    let mut src = open(&b, "snap", false).await.unwrap();
    assert_eq!(src.size_bytes(), Some(8 * BLOCK as u64));
    assert_eq!(image(&mut src, 4096).await.unwrap(), [11, 12, 0, 0, 0, 0, 0, 0]);
    assert_eq!(src.metadata()["viperblock"]["snapshot"]["SourceVolumeName"], "vol");
    assert_eq!(open(&b, "snap", true).await.err().unwrap().kind(), ErrorKind::Usage);
    // A smaller clone ends where it ends.
    let mut small = volume_config("small", 1);
    small["SnapshotID"] = json!("snap");
    b.put_json("small/config.json", &small);
    assert_eq!(tags(&b, "small", false).await, [11]);
}

#[tokio::test]
async fn chains_with_and_without_inherited_layers() {
    for layered in [false, true] {
        let mut b = laid_out(true, true, "blocks.live.bin", &[(0, 0, 0, 5), (1, 0, 1, 6), (2, 0, 2, 7)]);
        b.put_json("snap-a/config.json", &snapshot_config("snap-a", "vol", 3, false));
        put_map(&mut b, "snap-a/checkpoints/blocks.00000000.bin", true, &[(0, 0, 0, 5), (1, 0, 1, 6), (2, 0, 2, 7)]);
        let mut c = volume_config("mid", 8);
        c["SnapshotID"] = json!("snap-a");
        b.put_json("mid/config.json", &c);
        b.put("mid/chunks/chunk.00000000.bin", chunk(true, &[51, 52]));
        let own = [map_record(true, 1, 0, 10, 1)];
        let mut bytes = map(&own);
        if layered {
            bytes.extend(layers(&[("vol", vec![map_record(true, 0, 0, 10, 5), map_record(true, 2, 0, 8202, 7)])]));
            // Nobody asks the volume in the middle any more.
            b.objects.remove("snap-a/config.json");
        }
        b.put("snap-b/checkpoints/blocks.00000000.bin", bytes);
        b.put_json("snap-b/config.json", &snapshot_config("snap-b", "mid", 1, layered));
        let mut c = volume_config("top", 8);
        c["SnapshotID"] = json!("snap-b");
        b.put_json("top/config.json", &c);
        b.put("top/chunks/chunk.00000009.bin", chunk(false, &[61]));
        put_map(&mut b, "top/checkpoints/blocks.live.bin", true, &[(2, 9, 0, 1)]);
        assert_eq!(tags(&b, "top", false).await, [1, 51, 61, 0, 0, 0, 0, 0], "layers: {layered}");
        assert_eq!(tags(&b, "snap-b", false).await, [1, 51, 3, 0, 0, 0, 0, 0], "layers: {layered}");
    }
}

#[tokio::test]
async fn amis_with_blocks_and_amis_that_are_names_of_snapshots() {
    let mut b = laid_out(true, true, "blocks.live.bin", &[(0, 1, 0, 1)]);
    // Imported: it has its blocks, and a snapshot of itself.
    let mut c = volume_config("vol", 8);
    c["VolumeConfig"]["AMIMetadata"] = json!({"ImageID": "ami-1", "Name": "debian", "SnapshotID": "snap-ami-1"});
    b.put_json("vol/config.json", &c);
    b.put_json("snap-ami-1/config.json", &snapshot_config("snap-ami-1", "vol", 1, false));
    put_map(&mut b, "snap-ami-1/checkpoints/blocks.00000000.bin", true, &[(0, 1, 0, 1)]);
    let mut src = open(&b, "vol", false).await.unwrap();
    assert_eq!(image(&mut src, 4096).await.unwrap()[..2], [11, 0]);
    assert_eq!(
        (&src.metadata()["viperblock"]["kind"], &src.metadata()["viperblock"]["id"]),
        (&json!("ami"), &json!("ami-1"))
    );
    // Made of an instance's volume: a name for a snapshot, with its size in the AMI's metadata.
    let mut c = volume_config("", 0);
    (c["BlockSize"], c["Version"]) = (json!(0), json!(0));
    c["VolumeConfig"]["AMIMetadata"] = json!({"ImageID": "ami-2", "SnapshotID": "snap-ami-1", "VolumeSizeGiB": 1});
    b.put_json("ami-2/config.json", &c);
    let mut src = open(&b, "ami-2", false).await.unwrap();
    assert_eq!(src.size_bytes(), Some(1 << 30));
    assert_eq!(src.next_data(0).await.unwrap(), Some((0, 4096)));
    assert_eq!(image(&mut src, 4096).await.unwrap()[..2], [11, 0]);
}

#[tokio::test]
async fn sizes_that_end_inside_a_block_and_empty_volumes() {
    let mut b = laid_out(true, true, "blocks.live.bin", &[(7, 1, 0, 1)]);
    let mut c = volume_config("vol", 8);
    c["VolumeSize"] = json!(7 * BLOCK + 100);
    b.put_json("vol/config.json", &c);
    let mut src = open(&b, "vol", false).await.unwrap();
    assert_eq!(src.next_data(3).await.unwrap(), Some((7 * 4096, 7 * 4096 + 100)));
    let mut buf = [9; 300];
    src.read(7 * 4096, &mut buf).await.unwrap();
    assert!(buf[..8] == 11u64.to_le_bytes() && buf[100..].iter().all(|b| *b == 0));
    let mut b = Bucket::default();
    b.put_json("vol/config.json", &volume_config("vol", 8));
    let mut src = open(&b, "vol", true).await.unwrap();
    assert_eq!(src.next_data(0).await.unwrap(), None);
    assert_eq!(image(&mut src, 4096).await.unwrap(), [0; 8]);
}

#[tokio::test]
async fn logs_are_found_where_viperblock_has_them() {
    let b = laid_out(true, true, "blocks.live.bin", &[]);
    let dir = tempfile::tempdir().unwrap();
    let with = Bucket { logs: [("wal.00000000.bin".into(), log(&[log_record(1, 0, 0, 5)]))].into(), ..b.clone() };
    for place in ["base/vol/wal/chunks", "volume/wal/chunks", "plain"] {
        with.write_logs(&dir.path().join(place));
    }
    let store = b.store().await;
    for named in ["base", "volume", "plain", "base/vol/wal/chunks"] {
        let mut src = Viperblock::open(store.clone(), "vol", Some(&dir.path().join(named))).await.unwrap();
        assert_eq!(image(&mut src, 4096).await.unwrap()[0], 5, "{named}");
    }
    std::fs::create_dir_all(dir.path().join("none")).unwrap();
    for wrong in ["none", "absent"] {
        let e = Viperblock::open(store.clone(), "vol", Some(&dir.path().join(wrong))).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::NotFound, "{e}");
    }
}

/// A past drawn at random: writes, uploads, maps, snapshots and clones, and a crash at its end.
async fn a_past(age: Age, seed: u64, steps: u64, dir: &Path) {
    let mut rng = Rng(seed);
    let (mut bucket, blocks) = (Bucket::default(), 1 + rng.below(60));
    let mut vol = Volume::new("v0", blocks, age, rng.below(1000));
    vol.save_config(&mut bucket);
    let (mut tag, mut clones, mut snapshots) = (0, 0, Vec::new());
    for _ in 0..steps {
        match rng.below(20) {
            0..=13 => {
                let first = rng.below(blocks);
                for b in first..(first + 1 + rng.below(9)).min(blocks) {
                    tag += 1;
                    // Viperblock writes real zeros.
                    vol.write(b, if rng.below(8) == 0 { 0 } else { tag });
                }
            }
            14..=16 => {
                vol.upload(&mut bucket, 1 + rng.below(20) as usize);
                if !age.numbered || rng.below(2) == 0 {
                    vol.checkpoint(&mut bucket, true, rng.below(3) as usize);
                }
            }
            17 | 18 => {
                vol.upload(&mut bucket, 7);
                vol.checkpoint(&mut bucket, true, 0);
            }
            _ if clones < 3 => {
                clones += 1;
                let (snap, clone) = (format!("snap{clones}"), format!("v{clones}"));
                let new = vol.snapshot(&mut bucket, &snap, &clone, rng.below(1000));
                snapshots.push((snap, vol.model.clone()));
                vol = new;
            }
            _ => {}
        }
    }
    vol.crash(&mut bucket);
    bucket.write_logs(&dir.join(&vol.name).join("wal/chunks"));
    let store = bucket.store().await;
    let mut src = Viperblock::open(store.clone(), &vol.name, Some(dir)).await.unwrap();
    let step = 1 + rng.below(50_000) as usize;
    assert_eq!(image(&mut src, step).await.unwrap(), vol.model, "the volume, {age:?}, seed {seed}");
    for (snap, model) in snapshots {
        let mut src = Viperblock::open(store.clone(), &snap, None).await.unwrap();
        assert_eq!(image(&mut src, step).await.unwrap(), model, "{snap}, {age:?}, seed {seed}");
    }
    // A read across everything at once, holes too.
    let mut src = Viperblock::open(store, &vol.name, Some(dir)).await.unwrap();
    let mut all = vec![1; blocks as usize * BLOCK + 5000];
    src.read(0, &mut all).await.unwrap();
    let want: Vec<u8> = vol.model.iter().flat_map(|t| viperblock_support::block(*t)).chain([0; 5000]).collect();
    assert!(all == want);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_past_reads_as_the_flat_model_does(age in 0..AGES.len(), seed: u64, steps in 1..60u64) {
        let dir = tempfile::tempdir().unwrap();
        let run = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        run.block_on(a_past(AGES[age], seed, steps, dir.path()));
    }
}
