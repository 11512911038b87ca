//! Buckets as Viperblock leaves them, of every age, written from the description of its formats and with nothing of the
//! program that reads them.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Value, json};
use vb_ublk::image::ImageSource;
use vb_ublk::image::viperblock::Viperblock;
use vb_ublk::store::Store;
use vb_ublk::store::memory::MemoryStore;

pub(crate) const BLOCK: usize = 4096;

/// Objects in the store, and files on the host.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bucket {
    pub(crate) objects: BTreeMap<String, Vec<u8>>,
    pub(crate) logs: BTreeMap<String, Vec<u8>>,
}

impl Bucket {
    pub(crate) fn put(&mut self, key: impl Into<String>, bytes: Vec<u8>) {
        self.objects.insert(key.into(), bytes);
    }

    pub(crate) fn put_json(&mut self, key: impl Into<String>, v: &Value) {
        self.put(key, v.to_string().into_bytes());
    }

    pub(crate) async fn store(&self) -> Arc<dyn Store> {
        let store = MemoryStore::new();
        for (key, bytes) in &self.objects {
            store.put(key, Bytes::copy_from_slice(bytes)).await.unwrap();
        }
        Arc::new(store)
    }

    pub(crate) fn write_logs(&self, dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        for (name, bytes) in &self.logs {
            fs::write(dir.join(name), bytes).unwrap();
        }
    }
}

/// A block that tells who it is, in every word; 0 is zeros.
pub(crate) fn block(tag: u64) -> Vec<u8> {
    if tag == 0 {
        return vec![0; BLOCK];
    }
    (0..BLOCK as u64 / 8).flat_map(|n| (tag + (n << 32)).to_le_bytes()).collect()
}

pub(crate) fn tag_of(bytes: &[u8]) -> u64 {
    let tag = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert!(bytes == block(tag), "a block is of several writes, or of none: {tag}");
    tag
}

pub(crate) fn chunk(header: bool, blocks: &[u64]) -> Vec<u8> {
    let mut out = Vec::new();
    if header {
        out.extend(b"VBCH");
        out.extend(1u16.to_be_bytes());
        out.extend(4096u32.to_be_bytes());
    }
    out.extend(blocks.iter().flat_map(|t| block(*t)));
    out
}

pub(crate) fn map_record(numbered: bool, block: u64, chunk: u64, offset: u32, seq: u64) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(block.to_be_bytes());
    // What Viperblock writes here has meant different things; nobody may rely on it.
    out.extend((block as u16 ^ 0x55).to_be_bytes());
    out.extend(chunk.to_be_bytes());
    out.extend(offset.to_be_bytes());
    if numbered {
        out.extend(seq.to_be_bytes());
    }
    out.extend(crc32fast::hash(&out).to_be_bytes());
    out
}

pub(crate) fn map(records: &[Vec<u8>]) -> Vec<u8> {
    let mut out = b"VBWB".to_vec();
    out.extend(1u16.to_be_bytes());
    out.extend(1_700_000_000u64.to_be_bytes());
    out.extend(records.concat());
    out
}

pub(crate) fn layers(of: &[(&str, Vec<Vec<u8>>)]) -> Vec<u8> {
    let mut out = b"FLAT\x01".to_vec();
    out.push(of.len() as u8);
    for (name, records) in of {
        out.extend((name.len() as u16).to_be_bytes());
        out.extend(name.as_bytes());
        out.extend([0x77; 36]);
        out.extend((records.len() as u32).to_be_bytes());
        out.extend(records.concat());
    }
    out
}

pub(crate) fn log_head() -> Vec<u8> {
    let mut out = b"VBWL".to_vec();
    out.extend(1u16.to_be_bytes());
    out.extend(4096u32.to_be_bytes());
    out.extend(1_700_000_000u64.to_be_bytes());
    out
}

pub(crate) fn log_record(seq: u64, at: u64, len: u64, tag: u64) -> Vec<u8> {
    let head: Vec<u8> = [seq, at, len].iter().flat_map(|v| v.to_be_bytes()).collect();
    let data = block(tag);
    let mut crc = crc32fast::Hasher::new();
    crc.update(&head);
    crc.update(&data);
    [head, crc.finalize().to_be_bytes().to_vec(), data].concat()
}

pub(crate) fn log(records: &[Vec<u8>]) -> Vec<u8> {
    [log_head(), records.concat()].concat()
}

pub(crate) fn volume_config(name: &str, blocks: u64) -> Value {
    json!({
        "VolumeName": name, "VolumeSize": blocks * BLOCK as u64, "BlockSize": 4096, "ObjBlockSize": 4_194_304,
        "SeqNum": 1, "ObjectNum": 1, "WALNum": 1, "BlockToObjectWALNum": 0, "Version": 1,
        "VolumeConfig": {
            "VolumeMetadata": {"VolumeID": name, "SizeGiB": 0, "State": "available", "Tags": null},
            "AMIMetadata": {"ImageID": "", "Name": "", "Architecture": "", "Tags": {"a": "b"}},
        },
    })
}

pub(crate) fn snapshot_config(name: &str, source: &str, count: u64, layered: bool) -> Value {
    let mut v = json!({
        "SnapshotID": name, "SourceVolumeName": source, "SeqNum": 9, "ObjectNum": 9, "BlockSize": 4096,
        "ObjBlockSize": 4_194_304, "BlockCount": count, "CreatedAt": "2026-03-01T00:00:00Z",
    });
    if layered {
        v["HasFlatSection"] = json!(true);
    }
    v
}

/// How a volume is written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Age {
    /// Map records have seqs.
    pub(crate) numbered: bool,
    /// Chunks have headers.
    pub(crate) header: bool,
    /// Logs are in shards.
    pub(crate) shards: bool,
    /// Snapshots of clones have the layers below them.
    pub(crate) layers: bool,
}

pub(crate) const AGES: [Age; 6] = [
    Age { numbered: false, header: false, shards: false, layers: false },
    Age { numbered: false, header: true, shards: false, layers: false },
    Age { numbered: false, header: true, shards: true, layers: false },
    Age { numbered: true, header: true, shards: false, layers: false },
    Age { numbered: true, header: true, shards: true, layers: true },
    Age { numbered: true, header: false, shards: false, layers: true },
];

#[derive(Clone, Copy, Debug)]
struct Place {
    chunk: u64,
    index: u64,
    seq: u64,
}

/// A volume as Viperblock goes about it: writes go to the log, then into chunks, and the map is written now and then.
#[derive(Clone, Debug)]
pub(crate) struct Volume {
    pub(crate) name: String,
    pub(crate) age: Age,
    /// What each block holds, by the order of writes alone.
    pub(crate) model: Vec<u64>,
    seq: u64,
    next_chunk: u64,
    next_map: u64,
    map: BTreeMap<u64, Place>,
    /// Written and not in a chunk: seq, block, tag.
    pending: Vec<(u64, u64, u64)>,
    /// Logs that are still there: seq, block, tag; the last one is being written.
    logs: Vec<Vec<(u64, u64, u64)>>,
    base: Option<String>,
    /// Layers below, nearest first: volume, records.
    below: Vec<(String, BTreeMap<u64, Place>)>,
}

impl Volume {
    pub(crate) fn new(name: &str, blocks: u64, age: Age, seq: u64) -> Self {
        Self {
            name: name.into(),
            age,
            model: vec![0; blocks as usize],
            seq,
            next_chunk: seq % 7,
            next_map: 0,
            map: BTreeMap::new(),
            pending: vec![],
            logs: vec![vec![]],
            base: None,
            below: vec![],
        }
    }

    pub(crate) fn write(&mut self, block: u64, tag: u64) {
        self.seq += 1;
        self.model[block as usize] = tag;
        self.pending.push((self.seq, block, tag));
        self.logs.last_mut().unwrap().push((self.seq, block, tag));
    }

    /// Everything goes into chunks of at most `most` blocks, in the order of blocks; the log's next file begins.
    pub(crate) fn upload(&mut self, bucket: &mut Bucket, most: usize) {
        let newest: BTreeMap<u64, (u64, u64)> = self.pending.drain(..).map(|(s, b, t)| (b, (s, t))).collect();
        let all: Vec<_> = newest.into_iter().collect();
        for part in all.chunks(most) {
            let tags: Vec<u64> = part.iter().map(|(_, (_, t))| *t).collect();
            let key = format!("{}/chunks/chunk.{:08}.bin", self.name, self.next_chunk);
            bucket.put(key, chunk(self.age.header, &tags));
            for (index, (b, (seq, _))) in part.iter().enumerate() {
                self.map.insert(*b, Place { chunk: self.next_chunk, index: index as u64, seq: *seq });
            }
            self.next_chunk += 1;
        }
        self.logs.push(vec![]);
    }

    fn records(&self, of: &BTreeMap<u64, Place>) -> Vec<Vec<u8>> {
        let record =
            |(b, p): (&u64, &Place)| map_record(self.age.numbered, *b, p.chunk, 10 + p.index as u32 * 4096, p.seq);
        of.iter().map(record).collect()
    }

    /// Writes the map and the configuration. `keep` logs of what the map has stay, the oldest ones: then it has to have seqs.
    pub(crate) fn checkpoint(&mut self, bucket: &mut Bucket, live: bool, keep: usize) {
        let bytes = map(&self.records(&self.map));
        if live {
            bucket.put(format!("{}/checkpoints/blocks.live.bin", self.name), bytes);
        } else {
            self.next_map += 1;
            bucket.put(format!("{}/checkpoints/blocks.{:08}.bin", self.name, self.next_map), bytes);
        }
        let open = self.logs.pop().unwrap();
        self.logs.truncate(if self.age.numbered { keep } else { 0 });
        self.logs.push(open);
        self.save_config(bucket);
    }

    pub(crate) fn save_config(&self, bucket: &mut Bucket) {
        let mut v = volume_config(&self.name, self.model.len() as u64);
        v["BlockToObjectWALNum"] = json!(self.next_map);
        if let Some(base) = &self.base {
            v["SnapshotID"] = json!(base);
            v["SourceVolumeName"] = json!(self.below[0].0);
        }
        bucket.put_json(format!("{}/config.json", self.name), &v);
    }

    /// A snapshot, and a new volume on top of it. All that was written is uploaded first, as Viperblock does.
    pub(crate) fn snapshot(&mut self, bucket: &mut Bucket, snapshot: &str, clone: &str, seq: u64) -> Self {
        self.upload(bucket, 5);
        self.checkpoint(bucket, true, 0);
        let layered = self.age.layers && !self.below.is_empty();
        let mut bytes = map(&self.records(&self.map));
        if layered {
            // Nearest first, each without what is hidden.
            let mut hidden = self.map.clone();
            let mut of = Vec::new();
            for (name, map) in &self.below {
                let seen: BTreeMap<_, _> =
                    map.iter().filter(|(b, _)| !hidden.contains_key(b)).map(|(b, p)| (*b, *p)).collect();
                of.push((name.as_str(), self.records(&seen)));
                hidden.extend(seen);
            }
            bytes.extend(layers(&of));
        }
        bucket.put(format!("{snapshot}/checkpoints/blocks.00000000.bin"), bytes);
        let config = snapshot_config(snapshot, &self.name, self.map.len() as u64, layered);
        bucket.put_json(format!("{snapshot}/config.json"), &config);
        let mut new = Self::new(clone, self.model.len() as u64, self.age, seq);
        new.model.clone_from(&self.model);
        new.base = Some(snapshot.into());
        new.below = [(self.name.clone(), self.map.clone())].into_iter().chain(self.below.clone()).collect();
        new.save_config(bucket);
        new
    }

    /// The host goes down: its logs are what is left of what was not uploaded.
    pub(crate) fn crash(&self, bucket: &mut Bucket) {
        bucket.logs.clear();
        for (n, records) in self.logs.iter().enumerate() {
            let bytes = |of: &mut dyn Iterator<Item = &(u64, u64, u64)>| {
                log(&of.map(|(s, b, t)| log_record(*s, *b, if s % 2 == 0 { 0 } else { 4096 }, *t)).collect::<Vec<_>>())
            };
            if self.age.shards {
                for shard in 0..16u64 {
                    let name = format!("wal.{n:08}.shard_{shard:02}.bin");
                    bucket.logs.insert(name, bytes(&mut records.iter().filter(|(_, b, _)| b % 16 == shard)));
                }
            } else {
                bucket.logs.insert(format!("wal.{n:08}.bin"), bytes(&mut records.iter()));
            }
        }
        self.save_config(bucket);
    }
}

/// The whole image by tags: what `next_data` tells is read in pieces of `step` bytes, and the rest is zeros.
pub(crate) async fn image(src: &mut Viperblock, step: usize) -> vb_ublk::error::Result<Vec<u64>> {
    let size = src.size_bytes().unwrap() as usize;
    let mut all = vec![0; size.next_multiple_of(BLOCK)];
    let (mut at, mut before) = (0, None);
    while let Some((start, end)) = src.next_data(at).await? {
        assert!(at <= start && start < end && end <= size as u64, "{start}..{end} after {at} of {size}");
        assert_ne!(before, Some((start, end)), "it does not go on");
        before = Some((start, end));
        for from in (start as usize..end as usize).step_by(step) {
            let to = (from + step).min(end as usize);
            src.read(from as u64, &mut all[from..to]).await?;
        }
        at = end;
    }
    Ok(all.chunks(BLOCK).map(tag_of).collect())
}
