//! What of Viperblock is damaged, hostile, encrypted or gone: never a panic, never zeros for what was not read, and sentences that
//! name what is wrong. And how many requests a read takes.

mod viperblock_support;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use serde_json::{Value, json};
use vb_ublk::error::{Error, ErrorKind, Result};
use vb_ublk::image::ImageSource;
use vb_ublk::image::viperblock::{Options, Viperblock};
use vb_ublk::store::{ObjectMeta, Precondition, Store, Version};
use viperblock_support::{
    BLOCK, Bucket, chunk, image, layers, log, log_record, map, map_record, snapshot_config, volume_config,
};

const LIVE: &str = "vol/checkpoints/blocks.live.bin";
const CHUNK: &str = "vol/chunks/chunk.00000001.bin";
const LOG: &str = "wal.00000000.bin";
const RIGHT: [u64; 4] = [11, 72, 13, 73];

/// Blocks 0 to 2 in a chunk, 1 and 3 in a log.
fn fixture() -> Bucket {
    let mut b = Bucket::default();
    b.put_json("vol/config.json", &volume_config("vol", 4));
    b.put(CHUNK, chunk(true, &[11, 12, 13]));
    b.put(LIVE, map(&[0, 1, 2].map(|n| map_record(true, n, 1, 10 + 4096 * n as u32, n + 1))));
    b.logs.insert(LOG.into(), log(&[log_record(4, 1, 0, 71), log_record(5, 1, 0, 72), log_record(6, 3, 0, 73)]));
    b
}

fn config(b: &mut Bucket, name: &str, change: impl FnOnce(&mut Value)) {
    let mut v = volume_config(name, 4);
    change(&mut v);
    b.put_json(format!("{name}/config.json"), &v);
}

async fn read_with(b: &Bucket, name: &str, logs: bool, accept_loss: bool) -> Result<Vec<u64>> {
    let dir = tempfile::tempdir().unwrap();
    b.write_logs(dir.path());
    let wal_dir = logs.then(|| dir.path().to_owned());
    let mut src = Viperblock::open_with(b.store().await, name, Options { wal_dir, accept_loss }).await?;
    image(&mut src, 5000).await
}

async fn read(b: &Bucket) -> Result<Vec<u64>> {
    read_with(b, "vol", true, false).await
}

/// A refusal that a person can read: of this kind, on one line, naming what is wrong.
fn refused(result: Result<Vec<u64>>, kind: ErrorKind, names: &[&str]) {
    let e = result.unwrap_err();
    let text = e.to_string();
    assert_eq!(e.kind(), kind, "{text}");
    assert!(!text.contains('\n') && names.iter().all(|n| text.contains(n)), "{text:?} should name {names:?}");
}

#[tokio::test]
async fn no_flipped_byte_of_a_map_or_a_chunks_header_is_taken_for_content() {
    let whole = fixture();
    assert_eq!(read(&whole).await.unwrap(), RIGHT);
    for (key, bytes) in [(LIVE, 0..14 + 3 * 34), (CHUNK, 0..10)] {
        for at in bytes {
            for bit in [1, 0x80] {
                let mut b = whole.clone();
                b.objects.get_mut(key).unwrap()[at] ^= bit;
                match read(&b).await {
                    Ok(got) => assert_eq!(got, RIGHT, "{key}, byte {at}"),
                    Err(e) => assert!(matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported), "{e}"),
                }
            }
        }
    }
}

#[tokio::test]
async fn no_flipped_byte_of_a_log_is_taken_for_content() {
    let whole = fixture();
    let len = whole.logs[LOG].len();
    let last = len - 4124;
    for at in (0..len).filter(|at| *at < 60 || at % 97 == 0 || (last - 5..last + 40).contains(at)) {
        let mut b = whole.clone();
        b.logs.get_mut(LOG).unwrap()[at] ^= 0x20;
        match read(&b).await {
            // The last record may be a torn one; the others are followed by sound ones. The time in the header is for nobody.
            Ok(got) if at >= last => assert_eq!(got, [11, 72, 13, 0], "byte {at}"),
            Ok(got) => assert!((10..18).contains(&at) && got == RIGHT, "byte {at}"),
            Err(e) => {
                assert!(at < last && matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported), "byte {at}: {e}")
            }
        }
    }
}

#[tokio::test]
async fn a_flipped_byte_of_a_configuration_is_no_panic_and_no_other_content() {
    // It has no checksum: another size is believed. What it says of the place of blocks is not, whatever it turns into.
    let mut whole = fixture();
    whole.put_json("snap/config.json", &snapshot_config("snap", "vol", 3, false));
    whole.put("snap/checkpoints/blocks.00000000.bin", whole.objects[LIVE].clone());
    config(&mut whole, "clone", |v| v["SnapshotID"] = json!("snap"));
    for (key, name) in [("clone/config.json", "clone"), ("snap/config.json", "clone"), ("vol/config.json", "vol")] {
        for at in 0..whole.objects[key].len() {
            for bit in [1, 4, 0x80] {
                let mut b = whole.clone();
                b.objects.get_mut(key).unwrap()[at] ^= bit;
                let dir = tempfile::tempdir().unwrap();
                let _ = dir;
                let Ok(mut src) = Viperblock::open(b.store().await, name, None).await else { continue };
                if src.size_bytes().unwrap() > 1 << 20 {
                    continue;
                }
                let Ok(mut got) = image(&mut src, 5000).await else { continue };
                got.truncate(3);
                assert_eq!(got, RIGHT_BELOW[..got.len()], "{key}, byte {at}");
            }
        }
    }
}

const RIGHT_BELOW: [u64; 3] = [11, 12, 13];

#[tokio::test]
async fn everything_cut_short_anywhere() {
    let whole = fixture();
    for (key, whole_bytes) in &whole.objects {
        for len in (0..whole_bytes.len()).filter(|n| *n < 200 || n % 501 == 0 || n % 4096 < 12) {
            let mut b = whole.clone();
            b.put(key.clone(), whole_bytes[..len].to_vec());
            match read(&b).await {
                // A map does not count its records: what ends between two of them is whole.
                Ok(got) => assert!(key == LIVE && (len - 14) % 34 == 0 && got[1] == 72, "{key}, {len} bytes: {got:?}"),
                Err(e) => assert_eq!(e.kind(), ErrorKind::Corrupt, "{key}, {len} bytes: {e}"),
            }
        }
    }
    let log = &whole.logs[LOG];
    for len in (0..log.len()).step_by(331) {
        let mut b = whole.clone();
        b.logs.insert(LOG.into(), log[..len].to_vec());
        let want = match len.saturating_sub(18) / 4124 {
            0 => [11, 12, 13, 0],
            1 => [11, 71, 13, 0],
            _ => [11, 72, 13, 0],
        };
        assert_eq!(read(&b).await.unwrap(), want, "{len} bytes");
    }
}

#[tokio::test]
async fn a_torn_tail_is_told_and_damage_before_sound_records_is_refused() {
    let mut b = fixture();
    b.logs.get_mut(LOG).unwrap().extend([0; 6000]);
    b.logs.insert("wal.00000001.bin".into(), b"VBWL".to_vec());
    let dir = tempfile::tempdir().unwrap();
    b.write_logs(dir.path());
    let src = Viperblock::open(b.store().await, "vol", Some(dir.path())).await.unwrap();
    let torn = json!([{"file": LOG, "records": 3, "bytes_after": 6000}, {"file": "wal.00000001.bin", "records": 0, "bytes_after": 4}]);
    assert_eq!(src.metadata()["viperblock"]["wal"]["torn_tails"], torn);

    let mut b = fixture();
    b.logs.get_mut(LOG).unwrap()[18 + 4124 + 100] ^= 1;
    refused(read(&b).await, ErrorKind::Corrupt, &[LOG, "byte 4142", "--accept-loss"]);
    assert_eq!(read_with(&b, "vol", true, true).await.unwrap(), [11, 71, 13, 73]);
    b.logs.insert(LOG.into(), log(&[log_record(4, 4, 0, 71)]));
    refused(read(&b).await, ErrorKind::Corrupt, &[LOG, "byte 18", "block 4"]);
}

#[tokio::test]
async fn what_is_encrypted_or_has_other_blocks_is_refused_in_clear_words() {
    let unsupported = |r, word| refused(r, ErrorKind::Unsupported, &[word, "vol"]);
    let mut b = fixture();
    config(&mut b, "vol", |v| v["EncryptionEnabled"] = json!(true));
    unsupported(read(&b).await, "encrypted");
    b.put_json("vol/config.json", &json!({"v": 1, "payload": volume_config("vol", 4), "authtag": "AAAA"}));
    unsupported(read(&b).await, "encrypted");
    let mut b = fixture();
    b.objects.get_mut(CHUNK).unwrap()[3] = b'E';
    unsupported(read(&b).await, "encrypted");
    // Sealed blocks are 16 bytes longer.
    b.objects.get_mut(CHUNK).unwrap().extend([0; 48]);
    unsupported(read(&b).await, "encrypted");
    let mut b = fixture();
    b.logs.get_mut(LOG).unwrap()[3] = b'E';
    unsupported(read(&b).await, "encrypted");
    let mut b = fixture();
    config(&mut b, "vol", |v| v["BlockSize"] = json!(512));
    unsupported(read(&b).await, "512");
    config(&mut b, "vol", |v| v["Sparse"] = json!(1));
    unsupported(read(&b).await, "Sparse");
    assert_eq!(read_with(&b, "vol", true, true).await.unwrap(), RIGHT);
    config(&mut b, "vol", |v| v["VolumeSize"] = json!((1u64 << 46) + 1));
    unsupported(read(&b).await, "64 TiB");
}

#[tokio::test]
async fn maps_that_point_nowhere() {
    let corrupt = |r, names: &[&str]| refused(r, ErrorKind::Corrupt, names);
    for (chunk, offset, names) in [
        (1, 9, ["chunk.00000001.bin", "byte 9"]),
        (1, 0, ["chunk.00000001.bin", "byte 0"]),
        (1, 4107, ["chunk.00000001.bin", "byte 4107"]),
        (1, 10 + 3 * 4096, ["chunk.00000001.bin", "cut short"]),
        (1, u32::MAX, ["chunk.00000001.bin", "byte 4294967295"]),
        (2, 10, ["chunk.00000002.bin", "no such chunk"]),
        (u64::MAX, 10, ["chunk.18446744073709551615.bin", "no such chunk"]),
    ] {
        let mut b = fixture();
        b.put(LIVE, map(&[map_record(true, 0, chunk, offset, 1)]));
        corrupt(read(&b).await, &names);
        // What a newer write hides may well be gone.
        b.logs.insert(LOG.into(), log(&[log_record(2, 0, 0, 99)]));
        assert_eq!(read(&b).await.unwrap(), [99, 0, 0, 0]);
    }
    for block in [4, 1 << 40, u64::MAX] {
        let mut b = fixture();
        b.put(LIVE, map(&[map_record(true, block, 1, 10, 1)]));
        corrupt(read(&b).await, &["past the end", "vol"]);
    }
    let mut b = fixture();
    b.objects.remove(LIVE);
    corrupt(read_with(&b, "vol", false, false).await, &["vol/checkpoints/", "1 chunks"]);
    assert_eq!(read(&b).await.unwrap(), [0, 72, 0, 73], "what was never in a map is in the logs");
    b.logs.insert(LOG.into(), log(&[]));
    corrupt(read(&b).await, &["vol/checkpoints/", "1 chunks"]);
    assert_eq!(read_with(&b, "vol", false, true).await.unwrap(), [0; 4]);
    refused(read_with(&b, "nobody", false, false).await, ErrorKind::NotFound, &["nobody"]);
    for bad in ["", "a/b", "..", "../vol"] {
        refused(read_with(&b, bad, false, false).await, ErrorKind::Usage, &["cannot be the name"]);
    }
}

#[tokio::test]
async fn chains_that_end_nowhere_or_never() {
    let corrupt = |r, names: &[&str]| refused(r, ErrorKind::Corrupt, names);
    let mut b = fixture();
    let empty = map(&[]);
    // A snapshot of a volume that was made from it.
    config(&mut b, "vol", |v| v["SnapshotID"] = json!("snap"));
    b.put_json("snap/config.json", &snapshot_config("snap", "vol", 0, false));
    b.put("snap/checkpoints/blocks.00000000.bin", empty.clone());
    corrupt(read(&b).await, &["snap", "below itself"]);
    // Deep ones.
    for n in 0..100 {
        config(&mut b, &format!("v{n}"), |v| v["SnapshotID"] = json!(format!("s{}", n + 1)));
        b.put_json(format!("s{n}/config.json"), &snapshot_config("s", &format!("v{n}"), 0, false));
        b.put(format!("s{n}/checkpoints/blocks.00000000.bin"), empty.clone());
    }
    corrupt(read_with(&b, "v0", false, false).await, &["more than 64 snapshots"]);
    assert_eq!(read_with(&b, "v60", false, false).await.unwrap_err().kind(), ErrorKind::NotFound);
    // What it was made from is no snapshot, is gone, has no map, has another number of records, or bad names.
    config(&mut b, "vol", |v| v["SnapshotID"] = json!("v1"));
    corrupt(read(&b).await, &["v1", "is none"]);
    config(&mut b, "vol", |v| v["SnapshotID"] = json!("gone"));
    refused(read(&b).await, ErrorKind::NotFound, &["gone"]);
    config(&mut b, "vol", |v| v["SnapshotID"] = json!("../x"));
    corrupt(read(&b).await, &["../x"]);
    config(&mut b, "vol", |v| v["SnapshotID"] = json!("snap"));
    b.put_json("snap/config.json", &snapshot_config("snap", "v99", 2, false));
    corrupt(read(&b).await, &["counts 2", "snap"]);
    for count in [1, 2, u64::MAX, u64::MAX / 34 + 1] {
        b.put_json("snap/config.json", &snapshot_config("snap", "other", count, true));
        corrupt(read(&b).await, &["snap"]);
    }
    b.put_json("snap/config.json", &snapshot_config("snap", "other", 0, true));
    b.put("snap/checkpoints/blocks.00000000.bin", [empty, layers(&[("../x", vec![])])].concat());
    corrupt(read(&b).await, &["../x"]);
    b.objects.remove("snap/checkpoints/blocks.00000000.bin");
    refused(read(&b).await, ErrorKind::NotFound, &["map of snapshot snap"]);
}

/// Counts requests for ranges: all, and the most at a time.
#[derive(Debug)]
struct Counting(Arc<dyn Store>, AtomicUsize, AtomicUsize, AtomicUsize);

#[async_trait]
impl Store for Counting {
    async fn get(&self, key: &str) -> Result<(Bytes, Version)> {
        self.0.get(key).await
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.1.fetch_add(1, Ordering::SeqCst);
        let now = self.2.fetch_add(1, Ordering::SeqCst) + 1;
        self.3.fetch_max(now, Ordering::SeqCst);
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        self.2.fetch_sub(1, Ordering::SeqCst);
        self.0.get_range(key, range).await
    }
    async fn put(&self, _: &str, _: Bytes) -> Result<()> {
        Err(Error::new(ErrorKind::Internal, "an import writes"))
    }
    async fn put_if(&self, _: &str, _: Bytes, _: Precondition) -> Result<Version> {
        Err(Error::new(ErrorKind::Internal, "an import writes"))
    }
    async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Vec<ObjectMeta>> {
        self.0.list(prefix, after).await
    }
    async fn delete(&self, _: &str) -> Result<()> {
        Err(Error::new(ErrorKind::Internal, "an import deletes"))
    }
    fn url(&self) -> String {
        self.0.url()
    }
}

#[tokio::test]
async fn one_request_for_what_lies_together_and_a_few_ahead() {
    let mut b = Bucket::default();
    b.put_json("vol/config.json", &volume_config("vol", 3000));
    let mut records = Vec::new();
    // Two whole chunks in order, then blocks that lie apart.
    for n in 0..2048 {
        records.push(map_record(true, n, n / 1024, 10 + (n % 1024) as u32 * 4096, n));
    }
    for n in 0..100 {
        records.push(map_record(true, 2100 + n, 2, 10 + (99 - n) as u32 * 4096, n));
    }
    b.put("vol/checkpoints/blocks.live.bin", map(&records));
    for c in 0..2 {
        b.put(
            format!("vol/chunks/chunk.{c:08}.bin"),
            chunk(true, &(1..=1024).map(|n| c * 1024 + n).collect::<Vec<_>>()),
        );
    }
    b.put("vol/chunks/chunk.00000002.bin", chunk(true, &(1..=100).rev().map(|n| 2100 + n).collect::<Vec<_>>()));
    let store = Arc::new(Counting(b.store().await, AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0)));
    let mut src = Viperblock::open(store.clone(), "vol", None).await.unwrap();
    assert_eq!(store.1.load(Ordering::SeqCst), 0, "nothing is read before it is asked for");
    let want: Vec<u64> = (0..3000).map(|n| if n < 2048 || (2100..2200).contains(&n) { n + 1 } else { 0 }).collect();
    assert_eq!(image(&mut src, 70_000).await.unwrap(), want);
    // 2 chunks, 100 blocks, and the header of the last chunk.
    assert_eq!(store.1.load(Ordering::SeqCst), 103);
    let most = store.3.load(Ordering::SeqCst);
    assert!((8..=17).contains(&most), "{most} at a time");
    assert_eq!(
        src.read(0, &mut [0; 10]).await.unwrap_err().kind(),
        ErrorKind::Internal,
        "it is read from front to back"
    );
}

#[tokio::test]
async fn what_cannot_be_read_is_never_zeros() {
    let b = fixture();
    let (store, dir) = (b.store().await, tempfile::tempdir().unwrap());
    b.write_logs(dir.path());
    let mut src = Viperblock::open(store.clone(), "vol", Some(dir.path())).await.unwrap();
    store.delete(CHUNK).await.unwrap();
    let mut other = log(&[log_record(4, 1, 0, 71), log_record(5, 2, 0, 72)]);
    other.extend([0; 4124]);
    std::fs::write(dir.path().join(LOG), other).unwrap();
    let mut buf = vec![0; BLOCK];
    for (at, kind) in
        [(0, ErrorKind::NotFound), (0, ErrorKind::NotFound), (4096, ErrorKind::Corrupt), (3 * 4096, ErrorKind::Corrupt)]
    {
        let e = src.read(at, &mut buf).await.unwrap_err();
        assert_eq!(e.kind(), kind, "byte {at}: {e}");
    }
}
