//! Rebuilding a volume: map and manifest made anew from its chunks, which hold all that they are made of.
//!
//! **The manifest is readable.** Its history says which chunks count. If its checkpoint is good the map begins with that,
//! else with the first chunk; whole groups are laid over it, in order, exactly as an attach does; a new checkpoint is written
//! and the manifest names it. Epoch, nonce and writer stay as they are: to the next attach the volume looks as before, so a
//! log that was to be replayed still is.
//!
//! **The manifest is damaged or missing.** Its history is inferred.
//! - A chunk's key has its number and the epoch of who wrote it. An attachment never gives a number below the first it owns, and
//!   owns all from there on: the lowest number of an epoch cuts the chunks of all lower epochs from that number on. Those
//!   are what fenced hosts uploaded late.
//! - A chunk's header says which groups its writer knew to be whole (`applied_through`); what came after them was the
//!   writer's own. So the oldest chunk of an attachment says with which group it began, also when the chunks of that very
//!   group never arrived; groups of lower epochs do not count from there on.
//! - A log here that is the newest attachment's knows how far the store was packed; groups behind that which another attachment
//!   wrote are late uploads of a fenced host, too.
//! - Groups count whole, in order, each continuing the entries of the one before, up to the first that is not whole. If a
//!   later chunk (or the log) says that it was whole once, objects are missing.
//!
//! What can be wrong with an inferred history, and why the result still is a past of the volume:
//! - *An attachment that took the volume over and left no chunk is unknown.* Groups that the host before it uploaded late then
//!   count. They continue that host's own writes without a gap: the volume as that host had it, at some moment. What
//!   the unknown attachment had acknowledged is in its log alone. If that log is here, it is what cuts the late groups; where
//!   nobody can tell which of the two is newer, the rebuild is refused.
//! - *The newest chunks were lost*: nothing says that they were there, but for later chunks and a log here. The volume ends
//!   before them.
//! - *The volume was detached cleanly, or not*: this cannot be told. The last whole group ends it; without a log here,
//!   what had not been uploaded is not there, as after the loss of a host.
//! - *All chunks of an attachment's first groups were lost*, with a fenced host's late groups of the same numbers and entries
//!   in their place: it takes the loss of objects and equal entry numbers at both ends. This is not found out.
//! - *A chunk's oldest header of an attachment is damaged.* Its number still cuts; the volume cannot go on past it anyway.
//!
//! The new manifest has an epoch far above all seen, so that attachments that left no trace are below it, and that
//! epoch owns everything behind the end. With the confirmed nonce of the log here it is that log's: no chunk was ever written under
//! this epoch and nonce together, and the next attach replays the log as after any crash.
//!
//! **Loss.** A chunk that counts and is missing, or whose header is damaged, takes its group with it, and all after that: to leave
//! it out would show old data in blocks that nobody can name. Without leave this is refused. It is no loss where the log here
//! has all entries from that group on.
//!
//! Invariants:
//! - Nothing is deleted or written over but the manifest, and a damaged one is kept under another key first.
//! - The manifest is the last to be written, on the condition that it is still what was read. Before that, an
//!   interruption leaves objects that nothing names; a rebuild can be begun anew at any time.

mod find;
mod groups;
mod history;
mod kept;
mod local;
mod report;
mod write;

use std::collections::BTreeSet;

use futures_util::stream::{self, StreamExt};
use uuid::Uuid;

use find::{Found, find_manifest, list_checkpoints, list_chunks, stands_alone};
use groups::{Assembled, Ground, Looked, assemble, look};
use history::{Attachment, Named, Rules};
use kept::Kept;
pub use local::LocalLog;
use local::{Standing, judge, log_fate};
pub use report::{LogFate, Lost, ManifestState, MapFrom, Report};

use super::attach::utc;
use super::images::{load_checkpoint, load_images};
use super::recover::{PARALLEL_HEADERS, StoreEnd, checkpoint_end};
use crate::chunk::header;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::{self, Checkpoint, FirstOwned, Manifest, NO_ATTACHMENT, Writer};
use crate::map::Maps;
use crate::store::Store;
use crate::units::{BLOCK, ChunkNo, Epoch, GroupNo, MAX_VOLUME_BYTES, Nonce, SECTOR, Seq};

const COVERED: &str = "objects are missing or damaged, and the log here has all that was in them";
/// More attachments than this are not expected to have left no chunk and no checkpoint.
const EPOCH_LEAP: u64 = 1 << 16;
/// Objects that a refusal names.
const MOST_TOLD: usize = 4;
const NOWHERE: StoreEnd = StoreEnd { group: GroupNo(0), through: Seq(0), last_chunk: ChunkNo(0), ignored: 0 };

/// How to rebuild.
#[derive(Debug, Clone)]
pub struct Options {
    /// Even though a host has, or may have, the volume attached whose log is not here.
    pub force: bool,
    /// End the volume before the first group that is not whole any more.
    pub accept_loss: bool,
    /// Write nothing.
    pub dry_run: bool,
    /// The volume's size in bytes, for want of a manifest and a log.
    pub size_bytes: Option<u64>,
    /// Its logical block size in bytes, likewise.
    pub logical_block: Option<u32>,
    /// Who rebuilds: the next attach with the log is this host's.
    pub writer: Writer,
    /// A fresh nonce.
    pub nonce: Nonce,
    /// The time, in seconds since 1970.
    pub now_unix: u64,
}

/// How far a rebuild is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// Chunks that were looked at.
    pub chunks: u64,
    /// Of so many.
    pub of: u64,
    /// The last group in the map.
    pub groups: u64,
}

/// What is to be written.
struct Outcome {
    /// The new manifest, but for its checkpoint.
    manifest: Manifest,
    assembled: Assembled,
    map_from: MapFrom,
    checkpoint_number: u64,
    given_up: u64,
    lost: Vec<Lost>,
    log: LogFate,
    notes: Vec<String>,
}

/// Everything that a step needs.
struct Job<'a> {
    store: &'a dyn Store,
    name: &'a str,
    opts: &'a Options,
    log: Option<&'a LocalLog>,
}

/// Makes the map and the manifest of a volume anew, and tells now and then how far it is. See the module's page.
///
/// # Errors
/// `Usage` for options that contradict what is known, and when the volume's size is not known; `NotFound` when nothing of the volume
/// is there; `Busy` when a host has it attached, or may have, for want of a manifest; `Corrupt` for losses without leave; `Unsupported` when a newer program wrote
/// something; `Conflict` when the manifest changes meanwhile; the store's. After an error the volume is as it was.
pub async fn rebuild(
    store: &dyn Store,
    name: &str,
    opts: &Options,
    log: Option<&LocalLog>,
    told: &mut dyn FnMut(Progress),
) -> Result<Report> {
    manifest::check_name(name)?;
    let job = Job { store, name, opts, log };
    let found = find_manifest(store, name).await?;
    let named = list_chunks(store, name).await?;
    let outcome = match &found {
        Found::Good(m, _) => job.known(m, &named, told).await,
        Found::Damaged(..) | Found::Missing => job.inferred(&named, told).await,
    };
    let outcome = outcome.map_err(|e| e.context(format!("rebuilding volume {name:?} in {}", store.url())))?;
    job.write(found, outcome).await
}

fn usage(what: String) -> Error {
    Error::new(ErrorKind::Usage, what)
}

impl Job<'_> {
    /// By the manifest's history.
    async fn known(&self, m: &Manifest, named: &[Named], told: &mut dyn FnMut(Progress)) -> Result<Outcome> {
        let ours = self.log.filter(|l| l.is_ours(m));
        self.may_touch(m, ours.is_some())?;
        let size_differs = self.opts.size_bytes.is_some_and(|s| s != m.size_bytes);
        if size_differs || self.opts.logical_block.is_some_and(|b| b != m.logical_block) {
            return Err(usage(format!(
                "the manifest is good and says {} bytes in logical blocks of {}: leave out --size and --logical-block-size",
                m.size_bytes, m.logical_block
            )));
        }
        let mut notes = Vec::new();
        let maps = Maps::new(m.size_bytes / SECTOR as u64);
        let (start, map_from) = match load_images(self.store, m).await {
            Ok(images) => {
                maps.load_base(&images.current);
                (checkpoint_end(m), MapFrom::Checkpoint)
            }
            Err(e) if e.kind() == ErrorKind::Corrupt => {
                notes.push(e.to_string());
                let copy = kept::newest(self.store, self.name).await?.filter(|c| c.uuid == m.uuid);
                if let Some(copy) = copy {
                    let kept = kept::map_of(self.store, copy, named).await?;
                    let from = if kept.of_chunks { MapFrom::Chunks } else { MapFrom::Copy };
                    return self.known_from(m, named, (kept.maps(m.size_bytes), kept.end(), from), notes, told).await;
                }
                // A clone begins as the snapshot that it was made from.
                if let Some(parent) = m.parents.first() {
                    maps.load_base(&load_checkpoint(self.store, m, parent.checkpoint.as_ref()).await?.current);
                }
                (NOWHERE, MapFrom::Chunks)
            }
            Err(e) => return Err(e),
        };
        self.known_from(m, named, (maps, start, map_from), notes, told).await
    }

    /// By the manifest's history, from a map on.
    async fn known_from(
        &self,
        m: &Manifest,
        named: &[Named],
        (maps, start, map_from): (Maps, StoreEnd, MapFrom),
        mut notes: Vec<String>,
        told: &mut dyn FnMut(Progress),
    ) -> Result<Outcome> {
        let ours = self.log.filter(|l| l.is_ours(m));
        let wanted = checkpoint_end(m);
        // After a clean detach nothing behind the checkpoint counts.
        let until = if m.writer.is_none() { wanted.last_chunk } else { ChunkNo(u64::MAX) };
        let rules = Rules::Known { history: m.history.clone(), after: start.last_chunk, until };
        let packed = ours.map(|l| l.packed);
        let ground = Ground { store: self.store, draft: m, volume: Some(m.uuid), maps, start, packed };
        let a = assemble(ground, named, &rules, told).await?;

        let number = m.checkpoint.as_ref().map_or(0, Checkpoint::number);
        let log_continues =
            ours.filter(|l| m.writer.is_some() && l.packed <= a.end.through && l.last_seq >= wanted.through);
        let lacks_packed = ours.filter(|l| l.packed > a.end.through);
        let is_damaged = !a.bad.is_empty() || a.relied_on.max(wanted.group) > a.end.group || lacks_packed.is_some();
        let mut next = m.clone();
        let mut log = log_fate(self.log, ours.is_some(), &a.end);
        let (mut given_up, mut lost) = (0, Vec::new());
        if is_damaged {
            let nonce = if log_continues.is_some() {
                notes.push(COVERED.to_owned());
                m.nonce
            } else {
                (given_up, lost) = self.give_up(&a, wanted.group, lacks_packed)?;
                next.writer = None;
                if ours.is_some_and(|l| l.goes_on(a.end.through)) {
                    log = LogFate::SetAside("entries between the volume's new end and those in it are lost".to_owned());
                }
                self.opts.nonce
            };
            next.epoch = m.epoch.next();
            next.nonce = nonce;
            history::cut(&mut next.history, next.epoch, nonce, behind(&a.end));
        }
        Ok(Outcome {
            manifest: next,
            assembled: a,
            map_from,
            checkpoint_number: number + 1,
            given_up,
            lost,
            log,
            notes,
        })
    }

    fn may_touch(&self, m: &Manifest, ours: bool) -> Result<()> {
        let may = ours || self.opts.force || self.opts.dry_run;
        let Some(w) = m.writer.as_ref().filter(|_| !may) else { return Ok(()) };
        Err(Error::new(
            ErrorKind::Busy,
            format!(
                "it is attached by {} since {}, whose log is not here: rebuild it there when that process has ended, or detach it there \
                 if it lives. If that host is gone for good, --force rebuilds the volume here",
                m.holder(),
                utc(w.since)
            ),
        ))
    }

    /// Without a manifest, and without the newest attachment's log, a host may be serving the volume.
    fn nobody_known(&self) -> Result<()> {
        if self.opts.force || self.opts.dry_run {
            return Ok(());
        }
        let what = "no manifest says who has the volume attached, and the log of the host that had it last is not here: rebuild it on that host, \
                    with its log. If no host has it, or the one that had it is gone for good, --force rebuilds the volume here";
        Err(Error::new(ErrorKind::Busy, what))
    }

    /// Refuses a loss, or tells how much it is.
    fn give_up(&self, a: &Assembled, wanted: GroupNo, log: Option<&LocalLog>) -> Result<(u64, Vec<Lost>)> {
        let lost: Vec<Lost> = a.bad.iter().chain(&a.missing).cloned().collect();
        let last = a.relied_on.max(wanted).max(a.last_whole);
        let last = if a.bad.is_empty() && log.is_none() { last } else { last.max(a.end.group.next()) };
        let given_up = last.0 - a.end.group.0;
        if self.opts.accept_loss {
            return Ok((given_up, lost));
        }
        let mut what: Vec<String> = lost.iter().take(MOST_TOLD).map(ToString::to_string).collect();
        if lost.len() > MOST_TOLD {
            what.push(format!("and {} more, which --accept-loss --dry-run lists", lost.len() - MOST_TOLD));
        }
        if let Some(log) = log {
            what.push(format!("the log {} says that entries up to {} were in the store", log.path, log.packed));
        }
        if what.is_empty() {
            what.push(format!("the chunks of group {} are not in the store", a.end.group.next()));
        }
        Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "what was in the store is not all there any more: {}. Put the objects back from a copy of the store and try again; or give \
                 --accept-loss: the volume then ends with group {} (entry {}), as after a power cut at that moment, and at least {given_up} \
                 {} given up",
                what.join("; "),
                a.end.group,
                a.end.through,
                if given_up == 1 { "group is" } else { "groups are" },
            ),
        ))
    }

    /// By what the chunks tell.
    async fn inferred(&self, named: &[Named], told: &mut dyn FnMut(Progress)) -> Result<Outcome> {
        let checkpoints = list_checkpoints(self.store, self.name).await?;
        let kept = match kept::newest(self.store, self.name).await? {
            Some(copy) => Some(kept::map_of(self.store, copy, named).await?),
            None => None,
        };
        let copy = kept.as_ref().map(|k| &k.manifest);
        let start = kept.as_ref().map_or(NOWHERE, Kept::end);
        // What is not behind the copy's checkpoint is in its map, and what came after it is not of those who came before.
        let since = copy.map_or(Epoch(0), |c| c.epoch);
        let behind_copy: Vec<Named> =
            named.iter().copied().filter(|n| n.chunk > start.last_chunk && n.epoch >= since).collect();
        let named = &behind_copy[..];
        let mut attachments = history::attachments(named)?;
        let volume = self.ask_firsts(&mut attachments).await?;
        let volume = copy.map(|c| c.uuid).or(volume);
        history::limit(&mut attachments);
        if named.is_empty() && self.log.is_none() && copy.is_none() {
            let what = "there is nothing to rebuild it from, no chunk and no log: see `vb-ublk volume list`, or create it anew";
            return Err(Error::new(ErrorKind::NotFound, what));
        }
        let log = self.log.filter(|l| volume.is_none_or(|v| v == l.superblock.volume));
        if let Some(uuid) = volume.or(log.map(|l| l.superblock.volume)) {
            stands_alone(self.store, self.name, uuid, copy).await?;
        }
        let (size, logical_block) = self.sizes(log)?;
        let (size, logical_block) =
            (size.or(copy.map(|c| c.size_bytes)), logical_block.or(copy.map(|c| c.logical_block)));
        let mut draft = copy.cloned().unwrap_or_else(|| {
            let (size, block) = (size.unwrap_or(MAX_VOLUME_BYTES), logical_block.unwrap_or(512));
            Manifest::new(self.name, size, block, self.opts.now_unix)
        });
        draft.size_bytes = size.unwrap_or(draft.size_bytes);
        draft.uuid = volume.or(log.map(|l| l.superblock.volume)).unwrap_or(draft.uuid);
        let traces = checkpoints.iter().map(|c| (c.1, c.2)).filter(|c| c.0 != NO_ATTACHMENT);
        let older = copy.iter().flat_map(|c| &c.history).map(|h| (h.epoch, h.nonce));
        let epochs = || attachments.iter().map(|a| (a.epoch, a.nonce)).chain(traces.clone()).chain(older.clone());
        let newest = epochs().map(|e| e.0).max().unwrap_or_default();
        let log = log.filter(|l| l.superblock.confirmed != Nonce(0));
        let mut standing = log.map(|l| match epochs().filter(|e| e.1 == l.superblock.confirmed).map(|e| e.0).max() {
            None => Standing::Open,
            Some(e) if e == newest => Standing::Newest,
            Some(e) => Standing::Old(format!("it is epoch {e}'s, and epoch {newest} came after that")),
        });
        let mut rules = Rules::Inferred { attachments: attachments.clone(), log: None };
        let bind = |rules: &mut Rules, l: &LocalLog| {
            if let Rules::Inferred { log, .. } = rules {
                *log = Some((l.packed, l.superblock.confirmed));
            }
        };
        if let (Some(l), Some(Standing::Newest)) = (log, &standing) {
            bind(&mut rules, l);
        }
        let sectors = draft.size_bytes / SECTOR as u64;
        let ground = || Ground {
            store: self.store,
            draft: &draft,
            volume: None,
            maps: kept.as_ref().map_or_else(|| Maps::new(sectors), |k| k.maps(draft.size_bytes)),
            start,
            packed: log.map(|l| l.packed),
        };
        let mut a = assemble(ground(), named, &rules, told).await?;
        self.one_volume(&a, volume.or(log.map(|l| l.superblock.volume)))?;
        if let (Some(l), Some(Standing::Open)) = (log, &standing) {
            let judged = judge(l, &a)?;
            if matches!(judged, Standing::Newest) && a.shares.last().is_some_and(|s| s.last_through > l.packed) {
                bind(&mut rules, l);
                a = assemble(ground(), named, &rules, told).await?;
            }
            standing = Some(judged);
        }
        let mut notes = Vec::new();
        let Some(size) = size else { return Err(unknown_size(&a)) };
        if logical_block.is_none() {
            notes.push(
                "the logical block size is not known: it is 512 now (--logical-block-size has others)".to_owned(),
            );
        }

        let ours = log.filter(|_| matches!(standing, Some(Standing::Newest)));
        if ours.is_none() {
            self.nobody_known()?;
        }
        let continues = ours.filter(|l| l.packed <= a.end.through && a.meets_log);
        let is_damaged = !a.bad.is_empty() || a.relied_on > a.end.group || ours.is_some() && continues.is_none();
        let mut fate = match &standing {
            Some(Standing::Old(why)) => LogFate::SetAside(why.clone()),
            _ => log_fate(self.log, ours.is_some(), &a.end),
        };
        let (mut given_up, mut lost) = (0, Vec::new());
        if is_damaged && continues.is_some() {
            notes.push(COVERED.to_owned());
        } else if is_damaged {
            (given_up, lost) = self.give_up(&a, GroupNo(0), ours)?;
            if ours.is_some() {
                fate = LogFate::SetAside("entries between the volume's new end and those in it are lost".to_owned());
            }
        }
        let nonce = continues.map_or(self.opts.nonce, |l| l.superblock.confirmed);
        let epoch = Epoch(newest.0 + EPOCH_LEAP);
        if epoch.0 >= u64::from(u32::MAX) {
            let what =
                format!("epoch {newest} is among the chunks, too high to be followed by another: it cannot be one");
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
        let mut history = copy.map_or_else(Vec::new, |c| c.history.clone());
        for at in attachments.iter().filter(|a| copy.is_none_or(|c| a.epoch > c.epoch)) {
            let share = a.shares.iter().find(|s| s.epoch == at.epoch);
            let first = share.map(|s| s.first);
            history.push(manifest::EpochEntry { epoch: at.epoch, nonce: at.nonce, first });
        }
        history::cut(&mut history, epoch, nonce, behind(&a.end));
        let manifest = Manifest {
            size_bytes: size,
            epoch,
            nonce,
            history,
            // Without it, another host might take the volume and leave behind what the log has.
            writer: continues.filter(|l| l.goes_on(a.end.through)).map(|_| self.opts.writer.clone()),
            ..draft
        };
        notes.push(if copy.is_some() {
            "metadata and snapshots are as garbage collection has kept them: what was changed of them since is lost"
                .to_owned()
        } else {
            "what was kept as metadata in the manifest, its snapshots, and when the volume was created, are lost"
                .to_owned()
        });
        if continues.is_none() {
            notes.push(
                "what had not been uploaded is in no log here: if another host had the volume last, rebuild it there instead, with its log"
                    .to_owned(),
            );
        }
        let last = copy.and_then(|c| c.checkpoint.as_ref()).map(Checkpoint::number);
        let number = checkpoints.iter().map(|c| c.0).chain(last).max().unwrap_or(0) + 1;
        let map_from = if kept.as_ref().is_some_and(|k| !k.of_chunks) { MapFrom::Copy } else { MapFrom::Chunks };
        let log = fate;
        Ok(Outcome { manifest, assembled: a, map_from, checkpoint_number: number, given_up, lost, log, notes })
    }

    /// Has the oldest chunk of each attachment say with which group that began. Returns whose chunks they are.
    async fn ask_firsts(&self, attachments: &mut [Attachment]) -> Result<Option<Uuid>> {
        let prefix = manifest::prefix(self.name);
        let keys: Vec<String> = attachments.iter().map(|a| header::key(&prefix, a.lowest, a.epoch, a.nonce)).collect();
        let mut looked = stream::iter(&keys).map(|k| look(self.store, k)).buffered(PARALLEL_HEADERS);
        let mut volume = None;
        for a in attachments {
            let Some(looked) = looked.next().await else { break };
            if let Looked::Header(h) = looked? {
                a.first_group = Some(h.applied_through.next());
                volume.get_or_insert(h.volume);
            }
        }
        Ok(volume)
    }

    /// Size and logical block size, as far as they are known.
    fn sizes(&self, log: Option<&LocalLog>) -> Result<(Option<u64>, Option<u32>)> {
        let known = log.map(|l| &l.superblock).filter(|s| s.volume_sectors > 0);
        let (size, block) = (known.map(|s| s.volume_sectors * SECTOR as u64), known.map(|s| s.logical_block));
        let contradicts = |given: Option<u64>, known: Option<u64>| given.zip(known).is_some_and(|(g, k)| g != k);
        let given_block = self.opts.logical_block.map(u64::from);
        if contradicts(self.opts.size_bytes, size) || contradicts(given_block, block.map(u64::from)) {
            return Err(usage(format!(
                "the volume's log {} says {} bytes in logical blocks of {}: leave out --size and --logical-block-size",
                log.map_or("", |l| &l.path),
                size.unwrap_or(0),
                block.unwrap_or(0)
            )));
        }
        let (size, block) = (size.or(self.opts.size_bytes), block.or(self.opts.logical_block));
        if let Some(size) = size {
            manifest::check_size(size, block.unwrap_or(512))?;
        }
        Ok((size, block))
    }

    fn one_volume(&self, a: &Assembled, expected: Option<Uuid>) -> Result<()> {
        let volumes: BTreeSet<Uuid> = a.volumes.iter().copied().chain(expected).collect();
        if volumes.len() < 2 {
            return Ok(());
        }
        let all: Vec<String> = volumes.iter().map(ToString::to_string).collect();
        Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "there are chunks of {} volumes under {}chunks/ (or the log here is another's): {}. Move away what does not \
                 belong there, and try again",
                all.len(),
                manifest::prefix(self.name),
                all.join(", ")
            ),
        ))
    }
}

/// What begins behind the end.
const fn behind(end: &StoreEnd) -> FirstOwned {
    FirstOwned { group: end.group.next(), chunk: end.last_chunk.next() }
}

fn unknown_size(a: &Assembled) -> Error {
    usage(format!(
        "the volume's size is in no manifest and in no log here: give it with --size (and --logical-block-size, if that is not 512). The \
         highest block that was ever written ends at byte {}: the volume had at least that size",
        a.blocks_touched * BLOCK as u64
    ))
}
