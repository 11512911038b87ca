//! Verifying a volume: everything that it has in the store is read and checked, and nothing is changed.
//!
//! What is verified is what an attach from the store alone would find: the manifest, its checkpoint, the whole groups after
//! that, and each block that the map then names. Objects that nothing names are not looked at.
//!
//! Invariants:
//! - Damage is what was read badly twice. A store that does not answer is an error, and so is one that has lost the
//!   manifest by the end of the run: then nothing that was missing before says anything.
//! - Somebody may have the volume attached meanwhile: nothing that the verified manifest names is ever changed.
//! - Memory: the map, 24 bytes for each run of blocks in a window of chunks, and sixteen chunks.

use std::collections::BTreeMap;

use futures_util::stream::{self, StreamExt};

use super::damage::{Damage, DamageKind, Report};
use super::recover::{PARALLEL_HEADERS, StoreEnd, apply_headers, checkpoint_end, newer_chunks, newer_header};
use crate::chunk::header::ChunkHeader;
use crate::chunk::reader::Keys;
use crate::chunk::verify::{Checked, Mapped, check};
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::images::{damaged_parts, load_image};
use crate::manifest::{self, Manifest, Published};
use crate::map::{BaseImage, Maps};
use crate::store::Store;
use crate::units::{ChunkNo, GroupNo, SECTOR, SECTORS_PER_BLOCK};

/// Chunks read at once, each of up to 4 MiB.
const PARALLEL_CHUNKS: usize = 16;
/// Runs of blocks sorted by chunk at once: 48 MiB. A larger map is walked several times.
const WINDOW_RUNS: usize = 2 << 20;
/// A listing is no snapshot: under an attached volume it may show a chunk and lack one that was there before it.
const LOOKS: usize = 3;

/// How far a verification is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// Blocks that are done.
    pub blocks: u64,
    /// Of so many.
    pub of: u64,
    /// Sectors found that cannot be read.
    pub damaged_sectors: u64,
}

/// A chunk, by its source volume and number.
type ChunkId = (u8, ChunkNo);

/// Verifies a volume, and tells now and then how far it is. See the module's page.
///
/// # Errors
/// `Usage` for a name that cannot be, `NotFound` when there is no such volume, `Unsupported` when a newer program wrote
/// its manifest or its checkpoint; the store's. Damage is no error.
pub async fn verify(store: &dyn Store, name: &str, told: &mut dyn FnMut(Progress)) -> Result<Report> {
    manifest::check_name(name)?;
    let mut report = Report::new(name, store.url());
    let Some(m) = find_manifest(store, name, &mut report).await? else { return Ok(report) };
    if let Some(image) = find_base(store, &m, &mut report).await? {
        check_blocks(store, &m, &image, &mut report, told)
            .await
            .map_err(|e| e.context(format!("verifying volume {name:?}; try again when the store answers")))?;
    }
    look_again(store, &m, &mut report).await?;
    report.finish();
    Ok(report)
}

async fn load_manifest(store: &dyn Store, name: &str) -> Result<Manifest> {
    let loaded = match Published::load(store, name).await {
        Err(e) if e.kind() == ErrorKind::Corrupt => Published::load(store, name).await,
        loaded => loaded,
    };
    loaded.map(|p| p.manifest)
}

async fn find_manifest(store: &dyn Store, name: &str, report: &mut Report) -> Result<Option<Manifest>> {
    let why = match load_manifest(store, name).await {
        Ok(m) => return Ok(Some(m)),
        Err(e) if e.kind() == ErrorKind::Corrupt => e.to_string(),
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let left = store.list(&manifest::prefix(name), None).await?.len();
            if left == 0 {
                return Err(e);
            }
            format!(
                "it is not in the store, but {left} other objects of the volume are: it was lost, or a `vb-ublk volume delete` \
                 was interrupted, which can then be run again"
            )
        }
        Err(e) => return Err(e),
    };
    report.damage.push(Damage::of_object(DamageKind::Manifest, manifest::key(name), why));
    Ok(None)
}

/// The base map as an attach from the store alone would have it, or `None` when nobody can say.
async fn find_base(store: &dyn Store, m: &Manifest, report: &mut Report) -> Result<Option<BaseImage>> {
    let prefix = manifest::prefix(&m.name);
    let Some(images) = find_checkpoint(store, m, report).await? else { return Ok(None) };
    let found = if m.writer.is_none() {
        // After a clean detach nothing behind the checkpoint counts; but it may show that the manifest is older than that.
        let end = checkpoint_end(m);
        newer_chunks(store, &prefix, m, &mut end.clone()).await.map(|_| (base_maps(m, &images), end))
    } else {
        find_groups(store, &prefix, m, &images, report).await
    };
    let (maps, end) = match found {
        Err(e) if e.kind() == ErrorKind::Corrupt => {
            report.damage.push(Damage::of_object(DamageKind::Manifest, manifest::key(&m.name), e.to_string()));
            return Ok(None);
        }
        found => found?,
    };
    let image = maps.base_image();
    report.set_state(m, &end, image.mapped_blocks());
    Ok(Some(image))
}

async fn find_checkpoint(store: &dyn Store, m: &Manifest, report: &mut Report) -> Result<Option<BaseImage>> {
    match load_image(store, m).await {
        Err(e) if e.kind() == ErrorKind::Corrupt => {}
        loaded => return loaded.map(Some),
    }
    for (key, e) in damaged_parts(store, m).await? {
        report.damage.push(Damage::of_object(DamageKind::Checkpoint, key, e.to_string()));
    }
    if !report.is_well() {
        return Ok(None);
    }
    // Each part is good now: it was a bit on the way, or they do not fit together.
    match load_image(store, m).await {
        Err(e) if e.kind() == ErrorKind::Corrupt => {
            let folder = format!("{}checkpoints/", manifest::prefix(&m.name));
            report.damage.push(Damage::of_object(DamageKind::Checkpoint, folder, e.to_string()));
            Ok(None)
        }
        loaded => loaded.map(Some),
    }
}

fn base_maps(m: &Manifest, checkpoint: &BaseImage) -> Maps {
    let maps = Maps::new(m.size_bytes / SECTOR as u64);
    maps.load_base(checkpoint);
    maps
}

/// The maps with the whole groups after the checkpoint.
async fn find_groups(
    store: &dyn Store,
    prefix: &str,
    m: &Manifest,
    checkpoint: &BaseImage,
    report: &mut Report,
) -> Result<(Maps, StoreEnd)> {
    let mut look = 1;
    let found = loop {
        let found = look_for_groups(store, prefix, m, checkpoint).await?;
        if found.damage.is_empty() || look == LOOKS {
            break found;
        }
        look += 1;
    };
    let Groups { maps, end, damage, left_out } = found;
    report.notes.push(format!(
        "the volume is attached by {}, or was when that host died: what was not uploaded when this began is not seen here",
        m.holder()
    ));
    report.notes.extend(left_out);
    if !damage.is_empty() {
        report.notes.push(format!("the blocks that were checked are those of the volume as of group {}", end.group));
    }
    report.damage.extend(damage);
    Ok((maps, end))
}

/// What one look finds after the checkpoint.
struct Groups {
    maps: Maps,
    end: StoreEnd,
    damage: Vec<Damage>,
    left_out: Option<String>,
}

async fn look_for_groups(store: &dyn Store, prefix: &str, m: &Manifest, checkpoint: &BaseImage) -> Result<Groups> {
    let (maps, mut end) = (base_maps(m, checkpoint), checkpoint_end(m));
    let keys = newer_chunks(store, prefix, m, &mut end).await?;
    let looked: Vec<_> =
        stream::iter(&keys).map(|key| newer_header(store, m, key)).buffered(PARALLEL_HEADERS).collect().await;
    let (mut headers, mut damage) = (Vec::new(), Vec::new());
    for (key, header) in keys.iter().zip(looked) {
        match header {
            Ok(h) => headers.push(h),
            Err(e) => match e.kind() {
                // Listed and then not there: the next look says what that was.
                ErrorKind::Corrupt | ErrorKind::NotFound => {
                    damage.push(Damage::of_object(DamageKind::Group, key, e.to_string()));
                }
                ErrorKind::Unsupported => damage.push(Damage::of_object(DamageKind::Newer, key, e.to_string())),
                _ => return Err(e),
            },
        }
    }
    let groups = tally(&headers);
    match apply_headers(&store.url(), m, headers, &maps, &mut end) {
        Ok(()) => {}
        // That follows from the headers that could not be read.
        Err(_) if !damage.is_empty() => {}
        Err(e) => damage.push(Damage::of_object(DamageKind::Group, format!("{prefix}chunks/"), e.to_string())),
    }
    let left_out = left_out(&groups, end.group);
    Ok(Groups { maps, end, damage, left_out })
}

/// Chunks found of each group, and how many it has.
fn tally(headers: &[ChunkHeader]) -> BTreeMap<GroupNo, (u32, u32)> {
    let mut groups = BTreeMap::new();
    for h in headers {
        groups.entry(h.group).or_insert((0, h.count)).0 += 1;
    }
    groups
}

/// The groups after the last that counts, in words.
fn left_out(groups: &BTreeMap<GroupNo, (u32, u32)>, last: GroupNo) -> Option<String> {
    let mut after = groups.range(last.next()..);
    let (group, (have, count)) = after.next()?;
    let why = if have < count {
        format!("{have} of its {count} chunks are there: it is being uploaded, or was when its host died")
    } else {
        format!("it does not go on where group {last} ends")
    };
    let more = match after.count() {
        0 => String::new(),
        n => format!("; so are {n} groups after it"),
    };
    Some(format!("group {group} is left out, as an attach from the store alone leaves it out: {why}{more}"))
}

/// Reads every block that the map names, chunk by chunk.
async fn check_blocks(
    store: &dyn Store,
    m: &Manifest,
    image: &BaseImage,
    report: &mut Report,
    told: &mut dyn FnMut(Progress),
) -> Result<()> {
    let prefix = manifest::prefix(&m.name);
    let keys = Keys::default();
    keys.set(m);
    let mut progress = Progress { of: image.mapped_blocks(), ..Progress::default() };
    told(progress);
    for (first, last) in windows(image, WINDOW_RUNS) {
        let mapped = mapped_in(image, first, last);
        let mut checks = stream::iter(mapped.chunk_by(|a, b| id_of(a) == id_of(b)))
            .map(|of_chunk| check_chunk(store, &keys, of_chunk))
            .buffer_unordered(PARALLEL_CHUNKS);
        while let Some(done) = checks.next().await {
            let (of_chunk, found) = done?;
            report.chunks += 1;
            match found {
                Ok((key, checked)) => report.add_chunk(&key, checked),
                Err(unowned) => report.add_sectors(in_no_chunk(&prefix, of_chunk, &unowned)),
            }
            progress.blocks += of_chunk.iter().map(|p| u64::from(p.blocks)).sum::<u64>();
            progress.damaged_sectors = report.damaged_sectors;
            told(progress);
        }
    }
    Ok(())
}

fn id_of(m: &Mapped) -> ChunkId {
    (m.at.source(), m.at.chunk())
}

/// All that is mapped, as the map has it.
fn all_mapped(image: &BaseImage) -> impl Iterator<Item = Mapped> + '_ {
    // A run ends with its leaf, so its length fits.
    image.runs().filter_map(|r| Some(Mapped { at: r.to?, block: r.block, blocks: r.blocks as u16 }))
}

/// The chunks that the map names, cut into windows of up to `most` runs, or of one chunk: first and last chunk of each.
fn windows(image: &BaseImage, most: usize) -> Vec<(ChunkId, ChunkId)> {
    let mut runs: BTreeMap<ChunkId, usize> = BTreeMap::new();
    for m in all_mapped(image) {
        *runs.entry(id_of(&m)).or_default() += 1;
    }
    let mut windows: Vec<(ChunkId, ChunkId)> = Vec::new();
    let mut room = 0;
    for (id, n) in runs {
        match windows.last_mut() {
            Some(w) if n <= room => w.1 = id,
            _ => {
                windows.push((id, id));
                room = most.max(n);
            }
        }
        room -= n;
    }
    windows
}

/// What the map names of a window's chunks, in the order of the chunks.
fn mapped_in(image: &BaseImage, first: ChunkId, last: ChunkId) -> Vec<Mapped> {
    let mut mapped: Vec<Mapped> = all_mapped(image).filter(|m| (first..=last).contains(&id_of(m))).collect();
    mapped.sort_unstable_by_key(|m| (id_of(m), m.at.index()));
    mapped
}

type Found = Result<(String, Checked), Error>;

async fn check_chunk<'a>(store: &dyn Store, keys: &Keys, mapped: &'a [Mapped]) -> Result<(&'a [Mapped], Found)> {
    let (source, chunk) = id_of(&mapped[0]);
    let key = match keys.key(source, chunk) {
        Ok((key, _)) => key,
        Err(unowned) => return Ok((mapped, Err(unowned))),
    };
    let checked = check(store, &key, mapped).await?;
    Ok((mapped, Ok((key, checked))))
}

/// A map that names what no epoch owns: it is the manifest's history that does not fit.
fn in_no_chunk(prefix: &str, mapped: &[Mapped], why: &Error) -> Vec<Damage> {
    let damage = |m: &Mapped| Damage {
        lba: Some(m.block.lba().0),
        sectors: Some(u64::from(m.blocks) * SECTORS_PER_BLOCK),
        ..Damage::of_object(DamageKind::Unowned, format!("{prefix}manifest.json"), why.to_string())
    };
    mapped.iter().map(damage).collect()
}

/// Whether the volume is still there, and still the same: what was missing may have been deleted with it.
async fn look_again(store: &dyn Store, m: &Manifest, report: &mut Report) -> Result<()> {
    let now = match load_manifest(store, &m.name).await {
        Ok(now) => now,
        Err(e) if e.kind() == ErrorKind::Corrupt => {
            report.damage.push(Damage::of_object(DamageKind::Manifest, manifest::key(&m.name), e.to_string()));
            return Ok(());
        }
        Err(e) => {
            return Err(e.context(format!(
                "volume {:?} had a manifest when its verification began, and now it cannot be read: what was found says \
                 nothing; see whether the volume was deleted or the store went away, and verify again",
                m.name
            )));
        }
    };
    if now.publish_id != m.publish_id && report.chunks_missing > 0 {
        return Err(Error::new(
            ErrorKind::Conflict,
            format!(
                "volume {:?} was written while it was verified, and {} chunks that its map named are gone: its host may have collected them as \
                 garbage; verify a snapshot of it in its place, or the volume when nobody has it attached",
                m.name, report.chunks_missing
            ),
        ));
    }
    if now.publish_id != m.publish_id {
        report.notes.push(format!(
            "the manifest has changed meanwhile (it has epoch {} now): what was verified is the volume as of epoch {} and its \
             checkpoint of group {}",
            now.epoch,
            m.epoch,
            m.checkpoint.as_ref().map_or(0, |c| c.group.0)
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::{Location, Run};
    use crate::units::BlockNo;

    #[test]
    fn windows_hold_each_run_once_and_no_more_than_they_may() {
        let mut image = BaseImage::empty(4096);
        let run = |i: u64| Run {
            block: BlockNo(i * 3),
            blocks: 1,
            to: Some(Location::new((i % 2) as u8, ChunkNo(1 + i * 7 % 10), (i % 100) as u16)),
        };
        image.apply_runs(&(0..500).map(run).collect::<Vec<_>>());
        for most in [1, 99, 100, 120, 500] {
            let mut seen = Vec::new();
            for (first, last) in windows(&image, most) {
                let mapped = mapped_in(&image, first, last);
                assert!(mapped.len() <= most || first == last, "{most}: {} runs", mapped.len());
                assert!(mapped.is_sorted_by_key(|m| (id_of(m), m.at.index())));
                seen.extend(mapped.iter().map(|m| m.block.0));
            }
            seen.sort_unstable();
            assert_eq!(seen, (0..500).map(|i| i * 3).collect::<Vec<_>>(), "{most}");
        }
    }
}
