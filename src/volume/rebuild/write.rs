//! Writing what was rebuilt: nothing that is there changes but the manifest, and that last.

use uuid::Uuid;

use super::find::Found;
use super::report::{ManifestState, Report};
use super::{Job, Outcome};
use crate::error::{ErrorKind, Result};
use crate::manifest::{self, Checkpoint, Manifest, Published};
use crate::map::BaseImage;
use crate::store::Precondition;
use crate::units::GroupNo;
use crate::volume::background::checkpoint::put_unattached;
use crate::volume::recover::StoreEnd;

impl Job<'_> {
    /// Parts, then the manifest that is replaced, if it is damaged or old, under another key, then the new one.
    pub(super) async fn write(&self, found: Found, outcome: Outcome) -> Result<Report> {
        let Outcome { manifest: mut m, assembled: a, map_from, checkpoint_number, given_up, lost, log, notes } =
            outcome;
        let image = a.maps.base_image();
        let mut report = Report {
            volume: self.name.to_owned(),
            store: self.store.url(),
            dry_run: self.opts.dry_run,
            uuid: m.uuid,
            size_bytes: m.size_bytes,
            logical_block: m.logical_block,
            manifest: match &found {
                Found::Good(..) => ManifestState::Good,
                Found::Old(..) => ManifestState::Old,
                Found::Damaged(..) => ManifestState::Damaged,
                Found::Missing => ManifestState::Missing,
            },
            map_from,
            kept_as: None,
            epoch: m.epoch.0,
            chunks: a.chunks,
            chunks_ignored: a.end.ignored as u64,
            group: a.end.group.0,
            through: a.end.through.0,
            mapped_blocks: image.mapped_blocks(),
            groups_given_up: given_up,
            lost,
            log,
            notes,
        };
        if let Found::Damaged(_, _, why) | Found::Old(_, _, why) = &found {
            report.notes.insert(0, why.clone());
        }
        if self.opts.dry_run {
            return Ok(report);
        }
        m.checkpoint = self.put_checkpoint(&m, &image, checkpoint_number, &a.end).await?;
        m.publish_id = Uuid::new_v4();
        let version = match found {
            Found::Good(_, version) => Some(version),
            Found::Damaged(bytes, version, _) => {
                report.kept_as = Some(self.keep("damaged", bytes).await?);
                Some(version)
            }
            Found::Old(old, version, _) => {
                report.kept_as = Some(self.keep("old", old.encode()?.into()).await?);
                Some(version)
            }
            Found::Missing => None,
        };
        Published::replace(self.store, m, version).await?;
        Ok(report)
    }

    async fn put_checkpoint(
        &self,
        m: &Manifest,
        image: &BaseImage,
        number: u64,
        end: &StoreEnd,
    ) -> Result<Option<Checkpoint>> {
        // A clone maps what it began with, before it has a group of its own.
        if end.group == GroupNo(0) && image.mapped_blocks() == 0 {
            return Ok(None);
        }
        let full = put_unattached(self.store, m, image, number, self.opts.nonce)
            .await
            .map_err(|e| e.context(format!("writing the checkpoint of volume {:?}", self.name)))?;
        Ok(Some(Checkpoint { group: end.group, through: end.through, last_chunk: end.last_chunk, full, delta: None }))
    }

    /// Keeps a manifest that is damaged, or old, under the first key that is free, or already has it.
    async fn keep(&self, what: &str, bytes: bytes::Bytes) -> Result<String> {
        let mut n = 1;
        loop {
            let key = format!("{}.{what}-{n}", manifest::key(self.name));
            let keeping = || format!("keeping the {what} manifest as {key} in {}", self.store.url());
            match self.store.get(&key).await {
                Ok((there, _)) if there == bytes => return Ok(key),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    match self.store.put_if(&key, bytes.clone(), Precondition::Absent).await {
                        Ok(_) => return Ok(key),
                        Err(e) if e.kind() == ErrorKind::Conflict => continue,
                        Err(e) => return Err(e.context(keeping())),
                    }
                }
                Err(e) => return Err(e.context(keeping())),
            }
            n += 1;
        }
    }
}
