//! Rebuilding a volume: map and manifest made anew from its chunks, which hold all that they are made of.
//!
//! **The manifest is readable.** Its history says which chunks count. If its checkpoint is good the map begins with that,
//! else with the first chunk; whole groups are laid over it, in order, exactly as an attach does; a new checkpoint is written
//! and the manifest names it. Epoch, nonce and writer stay as they are: to the next attach the volume looks as before, so a
//! log that was to be replayed still is.
//!
//! **The manifest is damaged or missing.** Its history is inferred. So is what came after one that is older than the volume
//! ([`super::stale`]), which serves as a copy from then.
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
//! - Nothing is deleted or written over but the manifest, and a damaged or old one is kept under another key first.
//! - The manifest is the last to be written, on the condition that it is still what was read. Before that, an
//!   interruption leaves objects that nothing names; a rebuild can be begun anew at any time.

mod find;
mod groups;
mod history;
mod inferred;
mod kept;
mod local;
mod report;
mod write;

use find::{Found, find_manifest, judge_age, list_chunks};
use groups::{Assembled, Ground, assemble};
use history::{Named, Rules};
pub use local::LocalLog;
use local::log_fate;
pub use report::{LogFate, Lost, ManifestState, MapFrom, Report};

use super::attach::utc;
use super::recover::{StoreEnd, checkpoint_end};
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::images::load_image;
use crate::manifest::{self, Checkpoint, FirstOwned, Manifest, Writer};
use crate::map::Maps;
use crate::store::Store;
use crate::units::{ChunkNo, GroupNo, Nonce, SECTOR, Seq};

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
    let found = judge_age(store, found, &named, log).await?;
    let outcome = match &found {
        Found::Good(m, _) => job.known(m, &named, told).await,
        Found::Old(m, ..) => job.inferred(Some(m), &named, told).await,
        Found::Damaged(..) | Found::Missing => job.inferred(None, &named, told).await,
    };
    let outcome = outcome.map_err(|e| e.context(format!("rebuilding volume {name:?} in {}", store.url())))?;
    job.write(found, outcome).await
}

/// Of a clone that was flattened.
const NOT_TOLD: &str = "the volume was flattened, and what it copied is told by a copy of the manifest in its folder gc, which is not there: put that back \
                        from a copy of the store";

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
        let (start, map_from) = match load_image(self.store, m).await {
            Ok(image) => {
                maps.load_base(&image);
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
                if m.flattened {
                    return Err(Error::new(ErrorKind::Corrupt, NOT_TOLD));
                }
                maps.load_base(&kept::beginning(self.store, m).await?);
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
}

/// What begins behind the end.
const fn behind(end: &StoreEnd) -> FirstOwned {
    FirstOwned { group: end.group.next(), chunk: end.last_chunk.next() }
}
