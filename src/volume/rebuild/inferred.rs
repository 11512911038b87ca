//! Without a manifest: by what the chunks tell, and the copy of the manifest that garbage collection keeps.

use std::collections::BTreeSet;

use futures_util::stream::{self, StreamExt};
use uuid::Uuid;

use super::find::{list_checkpoints, stands_alone};
use super::groups::{Assembled, Ground, Looked, assemble, look};
use super::history::{self, Attachment, Named, Rules};
use super::kept::{self, Kept};
use super::local::{LocalLog, Standing, judge, log_fate};
use super::report::{LogFate, MapFrom};
use super::{COVERED, EPOCH_LEAP, Job, NOT_TOLD, NOWHERE, Outcome, Progress, behind, usage};
use crate::chunk::header;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::{self, Checkpoint, Manifest, NO_ATTACHMENT};
use crate::map::Maps;
use crate::units::{BLOCK, Epoch, GroupNo, MAX_VOLUME_BYTES, Nonce, SECTOR};
use crate::volume::recover::PARALLEL_HEADERS;

impl Job<'_> {
    /// By what the chunks tell, and a manifest from before, if there is one.
    pub(super) async fn inferred(
        &self,
        old: Option<&Manifest>,
        named: &[Named],
        told: &mut dyn FnMut(Progress),
    ) -> Result<Outcome> {
        let checkpoints = list_checkpoints(self.store, self.name).await?;
        let copy = kept::newest(self.store, self.name).await?;
        // Of two with one checkpoint the manifest is the newer: a copy is of the moment before a sweep.
        let age = |m: &Manifest| (m.epoch, m.checkpoint.as_ref().map_or(0, Checkpoint::number));
        let copy = match (copy, old) {
            (Some(copy), Some(old)) if age(old) >= age(&copy) => Some(old.clone()),
            (None, old) => old.cloned(),
            (copy, _) => copy,
        };
        let kept = match copy {
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
        if a.inherited && copy.is_none() {
            return Err(Error::new(ErrorKind::Corrupt, NOT_TOLD));
        }
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
            "metadata and snapshots are as an older manifest has them: what was changed of them since is lost"
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

fn unknown_size(a: &Assembled) -> Error {
    usage(format!(
        "the volume's size is in no manifest and in no log here: give it with --size (and --logical-block-size, if that is not 512). The \
         highest block that was ever written ends at byte {}: the volume had at least that size",
        a.blocks_touched * BLOCK as u64
    ))
}
