//! Volumes, AMIs and snapshots of Viperblock, as images to import from.
//!
//! Invariants:
//! - Nothing is written, neither to the store nor to the logs' folder.
//! - A block's content is what the newest log record of it says, if that has a higher seq than the volume's own map; else what
//!   the own map says; else what the nearest snapshot below says that has it; else zeros.
//! - What has a checksum is checked: every record of every map, and the logs with their data. Blocks in chunks have none.
//!   Of chunks their presence, size and header are checked, and that blocks lie inside of them.
//!
//! The formats are in [`codec`], the configuration in [`config`]; `docs/VIPERBLOCK.md` has the whole, and what is inferred.

mod ahead;
mod chain;
pub mod codec;
pub mod config;
mod map;
mod wal;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use serde_json::{Map, Value, json};

use self::ahead::{Ahead, check_head};
use self::chain::{Chain, Layer, number_in};
use self::config::Kind;
use self::map::{Entry, Origin, Run};
use self::wal::Logs;
use super::ImageSource;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::store::{Store, check_key};
use crate::units::BLOCK;

/// Adjoining runs that are told as one stretch, at most: a bound on the work of one call.
const STRETCH_RUNS: usize = 64;

/// How to open an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// Where the local logs are of the host that had the volume last: Viperblock's base folder there, or the volume's folder
    /// in it, or the folder with the logs. Without it, what was not uploaded is not in the image.
    pub wal_dir: Option<PathBuf>,
    /// Go without what is damaged in logs, without a map that is missing, and without fields that are not known.
    pub accept_loss: bool,
}

/// See the module's page.
#[derive(Debug)]
pub struct Viperblock {
    size_bytes: u64,
    metadata: Map<String, Value>,
    ahead: Ahead,
}

impl Viperblock {
    /// Opens the volume, AMI or snapshot of this name, a folder at the top of `store`, and reads its maps. `wal_dir` is as in
    /// [`Options`]. To be called on a tokio runtime, as all stores are; `store` should be one that tries again.
    ///
    /// # Errors
    /// As [`Viperblock::open_with`].
    pub async fn open(store: Arc<dyn Store>, volume: &str, wal_dir: Option<&Path>) -> Result<Self> {
        Self::open_with(store, volume, Options { wal_dir: wal_dir.map(Path::to_owned), accept_loss: false }).await
    }

    /// [`Viperblock::open`], with more to say.
    ///
    /// # Errors
    /// `NotFound` for what is not there, `Usage` for a name that cannot be one and for logs of a snapshot, `Unsupported` for what
    /// is encrypted, of another version or has other blocks than of 4096 bytes, `Corrupt` for damage; and the store's own.
    pub async fn open_with(store: Arc<dyn Store>, volume: &str, options: Options) -> Result<Self> {
        if volume.contains('/') || check_key(volume).is_err() {
            let why = format!(
                "{volume:?} cannot be the name of a volume of Viperblock: it is one folder at the top of its bucket"
            );
            return Err(Error::new(ErrorKind::Usage, why));
        }
        let what = format!("opening {volume} of Viperblock in {}", store.url());
        open(store, volume, options).await.context(|| what)
    }
}

async fn open(store: Arc<dyn Store>, volume: &str, options: Options) -> Result<Viperblock> {
    let Options { wal_dir, accept_loss } = options;
    let chain = chain::load(&store, volume, accept_loss).await?;
    let logs = match wal_dir {
        None => None,
        Some(_) if chain.own.is_none() => {
            return Err(Error::new(ErrorKind::Usage, "a snapshot has no logs: leave the logs' folder out"));
        }
        Some(dir) => {
            let (name, blocks) = (volume.to_owned(), chain.size_bytes.div_ceil(BLOCK as u64));
            let task = tokio::task::spawn_blocking(move || wal::scan(&dir, &name, blocks, accept_loss));
            Some(task.await.map_err(|e| Error::new(ErrorKind::Internal, "reading the logs").with_source(e))??)
        }
    };
    // Viperblock takes a volume without a map for empty. With chunks it is none, and all would be read as zeros. But a host that
    // went down before it wrote the first map has all its logs still: they are not deleted while it has the volume.
    if chain.unmapped_chunks > 0 && logs.as_ref().is_none_or(|l| l.records == 0) && !accept_loss {
        let why = format!(
            "it has {} chunks and no map in {volume}/checkpoints/ that says what is in them: give the logs of its host \
             (--viperblock-wal), have Viperblock attach and detach it once, or --accept-loss to go without",
            chain.unmapped_chunks
        );
        return Err(Error::new(ErrorKind::Corrupt, why));
    }
    let mut origins = Vec::new();
    let (entries, stale) = merge(&chain, logs.as_ref(), &mut origins);
    // What counts only: a map below may name chunks that nobody needs any more.
    list_chunks(&*store, &entries, &mut origins).await?;
    if let Some((key, size)) = map::first_odd(&entries, &origins)
        && size >= codec::CHUNK_HEAD as u64
    {
        // Sealed blocks are longer than others, which should not look like damage.
        let head = store.get_range(&key, 0..codec::CHUNK_HEAD as u64).await?;
        check_head(&head, true).context(|| format!("reading {key}, which has {size} bytes"))?;
    }
    let runs = map::runs(&entries, &origins)?;
    if let Kind::Volume(v) = &chain.config.kind
        && v.state.as_deref() == Some("in-use")
    {
        tracing::warn!("{volume} is in use, says Viperblock; what is imported may lack what it was told last");
    }
    let facts = Facts { volume, chain: &chain, logs: logs.as_ref(), stale, origins: &origins, runs: &runs };
    let metadata = facts.metadata();
    Ok(Viperblock { size_bytes: chain.size_bytes, metadata, ahead: Ahead::new(store, origins, runs) })
}

/// All layers laid over one another; and how many of the logs' blocks were in the own map already.
fn merge(chain: &Chain, logs: Option<&Logs>, origins: &mut Vec<Origin>) -> (Vec<Entry>, u64) {
    let mut of: BTreeMap<String, usize> = BTreeMap::new();
    let mut entries = |layer: &Layer, origins: &mut Vec<Origin>| -> Vec<Entry> {
        let origin = *of.entry(layer.volume.clone()).or_insert_with(|| {
            origins.push(Origin::Chunks { volume: layer.volume.clone(), sizes: BTreeMap::new() });
            origins.len() - 1
        });
        let entry = |r: &codec::MapRecord| Entry { block: r.block, object: r.chunk, offset: r.offset.into(), origin };
        layer.records.iter().map(entry).collect()
    };
    let (mut all, mut stale) = (Vec::new(), 0);
    if let Some(own) = &chain.own {
        all = entries(own, origins);
        if let Some(logs) = logs {
            let first = origins.len();
            origins.extend(logs.files.iter().cloned().map(Origin::Log));
            let newer: Vec<Entry> = logs
                .entries
                .iter()
                .filter(|e| {
                    // Only the own map's seqs are of the same count as the logs'. An old map has none: then the log counts, as
                    // it does in Viperblock's own recovery.
                    let known = own.records.binary_search_by_key(&e.block, |r| r.block);
                    known.ok().and_then(|n| own.records.get(n)).is_none_or(|r| e.seq > r.seq || !chain.numbered)
                })
                .map(|e| Entry { block: e.block, object: 0, offset: e.at, origin: first + e.file })
                .collect();
            stale = (logs.entries.len() - newer.len()) as u64;
            all = map::lay_over(&newer, &all);
        }
    }
    for layer in &chain.below {
        let lower = entries(layer, origins);
        all = map::lay_over(&all, &lower);
    }
    (all, stale)
}

/// The sizes of all chunks of the volumes that `entries` name.
async fn list_chunks(store: &dyn Store, entries: &[Entry], origins: &mut [Origin]) -> Result<()> {
    let used: BTreeSet<usize> = entries.iter().map(|e| e.origin).collect();
    for (n, origin) in origins.iter_mut().enumerate() {
        if let Origin::Chunks { volume, sizes } = origin
            && used.contains(&n)
        {
            let prefix = format!("{volume}/chunks/");
            let listed = store.list(&prefix, None).await?;
            let chunk = |key: &str| number_in(key.strip_prefix(&prefix)?, "chunk.");
            *sizes = listed.iter().filter_map(|o| Some((chunk(&o.key)?, o.size))).collect();
        }
    }
    Ok(())
}

/// What goes into the metadata.
struct Facts<'a> {
    volume: &'a str,
    chain: &'a Chain,
    logs: Option<&'a Logs>,
    stale: u64,
    origins: &'a [Origin],
    runs: &'a [Run],
}

impl Facts<'_> {
    /// `VolumeConfig` as it is, field by field (what Viperblock takes and gives as metadata), and `viperblock`: what was found.
    fn metadata(&self) -> Map<String, Value> {
        let raw = &self.chain.config.raw;
        let mut out = match raw.get("VolumeConfig") {
            Some(Value::Object(v)) => v.clone(),
            _ => Map::new(),
        };
        let mut found = self.chain.facts.clone();
        found.insert("name".into(), json!(self.volume));
        match &self.chain.config.kind {
            Kind::Volume(v) => found.insert("id".into(), json!(v.id)),
            Kind::Snapshot(_) => found.insert("snapshot".into(), Value::Object(raw.clone())),
        };
        if !self.chain.config.unknown.is_empty() {
            found.insert("unknown_fields".into(), json!(self.chain.config.unknown));
        }
        let (mut with, mut without, mut logged) = (BTreeSet::new(), BTreeSet::new(), 0);
        for r in self.runs {
            match self.origins.get(r.origin) {
                Some(Origin::Log(_)) => logged += u64::from(r.blocks),
                _ if r.header => _ = with.insert((r.origin, r.object)),
                _ => _ = without.insert((r.origin, r.object)),
            }
        }
        found.insert("chunks".into(), json!({ "with_header": with.len(), "without_header": without.len() }));
        found.insert("blocks".into(), json!(self.runs.iter().map(|r| u64::from(r.blocks)).sum::<u64>()));
        if let Some(l) = self.logs {
            let wal = json!({
                "files": l.files.len(), "records": l.records, "blocks_merged": logged, "blocks_already_uploaded": self.stale,
                "torn_tails": l.torn, "bad_records_passed_over": l.lost,
            });
            found.insert("wal".into(), wal);
        }
        out.insert("viperblock".into(), Value::Object(found));
        out
    }
}

#[async_trait(?Send)]
impl ImageSource for Viperblock {
    fn size_bytes(&self) -> Option<u64> {
        Some(self.size_bytes)
    }

    async fn next_data(&mut self, from: u64) -> Result<Option<(u64, u64)>> {
        let (runs, block) = (self.ahead.runs(), BLOCK as u64);
        let first = runs.partition_point(|r| r.end() * block <= from);
        let Some(r) = runs.get(first) else { return Ok(None) };
        let adjoining = runs[first..].windows(2).take(STRETCH_RUNS).take_while(|w| w[0].end() == w[1].block);
        let end = adjoining.last().map_or(r.end(), |w| w[1].end());
        let (start, end) = ((r.block * block).max(from), (end * block).min(self.size_bytes));
        Ok((start < end).then_some((start, end)))
    }

    async fn read(&mut self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.ahead.read(at, buf).await?;
        // A volume may end inside of its last block; what the block holds behind that is nobody's.
        let past = at.saturating_add(buf.len() as u64).saturating_sub(self.size_bytes).min(buf.len() as u64) as usize;
        let inside = buf.len() - past;
        buf[inside..].fill(0);
        Ok(())
    }

    fn metadata(&self) -> Map<String, Value> {
        self.metadata.clone()
    }
}
