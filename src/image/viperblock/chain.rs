//! A volume's own block map, and those of the snapshots below it, from the store.
//!
//! What lies below a volume is what its configuration's `SnapshotID` names. A snapshot's blocks are in the chunks of its
//! `SourceVolumeName`. If that volume was a clone itself, the snapshot has its inherited layers in its map
//! (`HasFlatSection`); older ones have not, and the chain goes on with the `SnapshotID` of that volume, which never changes
//! in a volume's life.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::{Value, json};

use super::codec::{self, Age, BlockMap, MapRecord};
use super::config::{Config, Kind, SnapshotConfig, VolumeConfig};
use super::map::newest;
use crate::codec::CodecError;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::store::{Store, check_key};
use crate::units::BLOCK;

/// More snapshots one below the other are taken for damage.
const MAX_DEPTH: usize = 64;
const LIVE_MAP: &str = "blocks.live.bin";

/// Blocks in one volume's chunks: one record for each, in order.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) volume: String,
    pub(super) records: Vec<MapRecord>,
}

/// All maps of an image.
#[derive(Debug)]
pub(super) struct Chain {
    /// The image's size in bytes.
    pub(super) size_bytes: u64,
    /// A volume's own map, which its logs go over; absent for a snapshot.
    pub(super) own: Option<Layer>,
    /// Whether the own map's records have seqs.
    pub(super) numbered: bool,
    /// The chunks of a volume that has no map.
    pub(super) unmapped_chunks: usize,
    /// What lies below, nearest first.
    pub(super) below: Vec<Layer>,
    /// The configuration of what was asked for.
    pub(super) config: Config,
    /// What was found, for people.
    pub(super) facts: serde_json::Map<String, Value>,
}

/// The key of a chunk.
pub(super) fn chunk_key(volume: &str, number: u64) -> String {
    format!("{volume}/chunks/chunk.{number:08}.bin")
}

/// The number in a name such as `chunk.00000017.bin`, spelled as Viperblock does.
pub(super) fn number_in(name: &str, before: &str) -> Option<u64> {
    let digits = name.strip_prefix(before)?.strip_suffix(".bin")?;
    let number = digits.parse().ok()?;
    (format!("{number:08}") == digits).then_some(number)
}

/// Reads all maps of what is called `name`.
pub(super) async fn load(store: &Arc<dyn Store>, name: &str, accept_loss: bool) -> Result<Chain> {
    let r = Reader { store, accept_loss };
    let config = r.config(name).await?;
    match config.kind.clone() {
        Kind::Volume(v) => r.volume(name, config, &v).await,
        Kind::Snapshot(s) => {
            // A snapshot does not say how large it is: as large as its volume, which cannot have shrunk (inferred).
            let what = || format!("{name} is a snapshot of {}, from which it has its size", s.source);
            let Kind::Volume(v) = r.config(&s.source).await.context(what)?.kind else {
                return Err(corrupt(format!("{name} is a snapshot of {}, which is a snapshot, too", s.source)));
            };
            let mut chain = Chain {
                size_bytes: v.size_bytes,
                own: None,
                numbered: false,
                unmapped_chunks: 0,
                below: vec![],
                config,
                facts: kind("snapshot"),
            };
            r.below(&mut chain, Some(name.to_owned())).await?;
            Ok(chain)
        }
    }
}

struct Reader<'a> {
    store: &'a Arc<dyn Store>,
    accept_loss: bool,
}

impl Reader<'_> {
    async fn config(&self, name: &str) -> Result<Config> {
        if name.contains('/') || check_key(name).is_err() {
            return Err(corrupt(format!("{name:?} cannot be the name of a volume or snapshot")));
        }
        let key = format!("{name}/config.json");
        let (bytes, _) = self.store.get(&key).await.map_err(|e| match e.kind() {
            ErrorKind::NotFound => {
                e.context(format!("there is no {name}: name the bucket or folder that has the folder {name} in it"))
            }
            _ => e,
        })?;
        let config = Config::decode(&bytes).context(|| format!("reading {key}"))?;
        if !config.unknown.is_empty() && !self.accept_loss {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{key} has fields that this program does not know ({}) and that may change where blocks are: \
                     use a newer vb-ublk, or --accept-loss to go without",
                    config.unknown.join(", ")
                ),
            ));
        }
        Ok(config)
    }

    async fn volume(&self, name: &str, config: Config, v: &VolumeConfig) -> Result<Chain> {
        let mut facts = kind(if v.is_ami { "ami" } else { "volume" });
        let (mut numbered, mut unmapped_chunks) = (false, 0);
        let records = match self.own_map(name, v).await? {
            Some((file, map)) => {
                facts.insert("map".into(), about_map(&file, &map));
                numbered = map.age == Some(Age::Numbered);
                map.records
            }
            None => {
                unmapped_chunks = self.store.list(&format!("{name}/chunks/"), None).await?.len();
                Vec::new()
            }
        };
        let mut below = v.snapshot.clone();
        // An AMI that was registered for a snapshot has no blocks and no SnapshotID of its own: its metadata names the snapshot
        // (inferred). An imported AMI has both blocks and such a snapshot, of itself, which has nothing to add.
        if below.is_none() && records.is_empty() {
            below = v.ami_snapshot.clone();
        }
        let own = Layer { volume: name.to_owned(), records: newest(records) };
        check_inside(&own, v.size_bytes)?;
        let mut chain =
            Chain { size_bytes: v.size_bytes, own: Some(own), numbered, unmapped_chunks, below: vec![], config, facts };
        self.below(&mut chain, below).await?;
        Ok(chain)
    }

    /// A volume's own map: the live one, else the numbered one that its configuration names, else the last one.
    async fn own_map(&self, name: &str, v: &VolumeConfig) -> Result<Option<(String, BlockMap)>> {
        let prefix = format!("{name}/checkpoints/");
        let listed = self.store.list(&prefix, None).await?;
        let names: Vec<&str> = listed.iter().filter_map(|o| o.key.strip_prefix(&prefix)).collect();
        let numbered = format!("blocks.{:08}.bin", v.map_number);
        let last = || names.iter().filter_map(|n| Some((number_in(n, "blocks.")?, *n))).max().map(|(_, n)| n);
        let there = |n: &str| names.iter().find(|m| **m == n).copied();
        let Some(file) = there(LIVE_MAP).or_else(|| there(&numbered)).or_else(last) else {
            return Ok(None);
        };
        let key = format!("{prefix}{file}");
        let (bytes, _) = self.store.get(&key).await?;
        let map = codec::block_map(&bytes).map_err(|e| named(&key, e))?;
        Ok(Some((file.to_owned(), map)))
    }

    /// Adds the snapshot `from`, and what lies below it.
    async fn below(&self, chain: &mut Chain, from: Option<String>) -> Result<()> {
        let (mut next, mut seen, mut facts) = (from, BTreeSet::new(), Vec::new());
        while let Some(name) = next.take() {
            if seen.len() == MAX_DEPTH {
                return Err(corrupt(format!(
                    "more than {MAX_DEPTH} snapshots lie one below the other, down to {name}"
                )));
            }
            if !seen.insert(name.clone()) {
                return Err(corrupt(format!("snapshot {name} lies below itself; its configuration is damaged")));
            }
            let Kind::Snapshot(s) = self.config(&name).await?.kind else {
                return Err(corrupt(format!("{name} is named as a snapshot, and is none")));
            };
            let (map, layers) = self.snapshot_map(&name, &s).await?;
            let inherited: Vec<&str> = layers.iter().map(|l| l.volume.as_str()).collect();
            let mut about = about_map(&name, &map);
            about["volume"] = json!(s.source);
            about["inherited_from"] = json!(inherited);
            facts.push(about);
            if !s.layered {
                let what = || format!("snapshot {name} is of {}, which names what lies below", s.source);
                next = match self.config(&s.source).await.context(what)?.kind {
                    Kind::Volume(v) => v.snapshot,
                    Kind::Snapshot(_) => {
                        return Err(corrupt(format!("{name} is a snapshot of {}, also one", s.source)));
                    }
                };
            }
            chain.below.push(Layer { volume: s.source, records: newest(map.records) });
            for l in layers {
                if l.volume.contains('/') || check_key(&l.volume).is_err() {
                    return Err(corrupt(format!("snapshot {name} inherits from {:?}, which is no name", l.volume)));
                }
                chain.below.push(Layer { volume: l.volume, records: newest(l.records) });
            }
        }
        chain.facts.insert("below".into(), json!(facts));
        // A volume ends where it ends, also if what lies below goes on.
        let blocks = chain.size_bytes.div_ceil(BLOCK as u64);
        for l in &mut chain.below {
            l.records.truncate(l.records.partition_point(|r| r.block < blocks));
        }
        Ok(())
    }

    async fn snapshot_map(&self, name: &str, s: &SnapshotConfig) -> Result<(BlockMap, Vec<codec::InheritedLayer>)> {
        let key = format!("{name}/checkpoints/blocks.00000000.bin");
        let (bytes, _) = self.store.get(&key).await.context(|| format!("reading the map of snapshot {name}"))?;
        let decoded = match s.block_count.filter(|_| s.layered) {
            Some(own) => codec::layered_map(&bytes, own),
            None => codec::block_map(&bytes).map(|m| (m, Vec::new())),
        };
        let (map, layers) = decoded.map_err(|e| named(&key, e))?;
        // A map does not count its records; a snapshot's configuration does.
        match s.block_count {
            Some(n) if n != map.records.len() as u64 => Err(corrupt(format!(
                "{key} has {} records where {name}/config.json counts {n}; one of them is damaged",
                map.records.len()
            ))),
            _ => Ok((map, layers)),
        }
    }
}

fn check_inside(own: &Layer, size_bytes: u64) -> Result<()> {
    match own.records.last() {
        Some(r) if r.block >= size_bytes.div_ceil(BLOCK as u64) => Err(corrupt(format!(
            "the map of {} has block {}, past the end of its {size_bytes} bytes; its map or its config.json is damaged",
            own.volume, r.block
        ))),
        _ => Ok(()),
    }
}

fn about_map(file: &str, map: &BlockMap) -> Value {
    json!({ "name": file, "records": map.records.len(), "record_bytes": map.age.map(Age::record_bytes) })
}

fn kind(what: &str) -> serde_json::Map<String, Value> {
    serde_json::Map::from_iter([("kind".to_owned(), json!(what))])
}

fn named(key: &str, e: CodecError) -> Error {
    Error::from(e).context(format!("reading {key}"))
}

fn corrupt(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, why)
}
