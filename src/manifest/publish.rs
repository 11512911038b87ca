//! Loading the manifest and replacing it by compare-and-swap.

use uuid::Uuid;

use super::{Manifest, key};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Precondition, Store, Version};
use crate::units::Nonce;

/// How often a change is made anew when others change the manifest at the same time.
const EDIT_TRIES: usize = 8;

/// Who changes a manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// The attachment that the manifest names as its writer.
    Attachment,
    /// Somebody who has it not attached, while nobody has.
    Anybody,
    /// The same, even if another has.
    Force,
}

/// The manifest as the store has it.
#[derive(Debug, Clone)]
pub struct Published {
    /// What it says.
    pub manifest: Manifest,
    version: Version,
    /// Publish ids of this one's own puts of which it is not known whether they landed.
    unanswered: Vec<Uuid>,
}

impl Published {
    const fn of(manifest: Manifest, version: Version) -> Self {
        Self { manifest, version, unanswered: Vec::new() }
    }

    /// Reads a volume's manifest.
    ///
    /// # Errors
    /// `NotFound` when there is no such volume; `Corrupt`, `Unsupported`; the store's.
    pub async fn load(store: &dyn Store, name: &str) -> Result<Self> {
        let key = key(name);
        let (bytes, version) = store.get(&key).await.map_err(|e| match e.kind() {
            ErrorKind::NotFound => Error::new(
                ErrorKind::NotFound,
                format!(
                    "there is no volume {name:?} in {}: see `vb-ublk volume list`, or add --create --size",
                    store.url()
                ),
            )
            .with_source(e),
            _ => e.context(format!("reading the manifest of {name:?} in {}", store.url())),
        })?;
        let manifest = Manifest::decode(&bytes).map_err(|e| e.context(format!("reading {key} in {}", store.url())))?;
        if manifest.name != name {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "{key} in {} is the manifest of volume {:?}: it sits under a wrong name",
                    store.url(),
                    manifest.name
                ),
            ));
        }
        Ok(Self::of(manifest, version))
    }

    /// Writes the first manifest of a volume.
    ///
    /// # Errors
    /// `Exists` when there is one; the store's.
    pub async fn create(store: &dyn Store, manifest: Manifest) -> Result<Self> {
        let body = manifest.encode()?;
        let version =
            store.put_if(&key(&manifest.name), body.into(), Precondition::Absent).await.map_err(|e| {
                match e.kind() {
                    ErrorKind::Conflict => Error::new(
                        ErrorKind::Exists,
                        format!("there is a volume {:?} in {} already", manifest.name, store.url()),
                    ),
                    _ => e.context(format!("creating volume {:?} in {}", manifest.name, store.url())),
                }
            })?;
        Ok(Self::of(manifest, version))
    }

    /// Puts a manifest in the place of what was found there: of nothing, or of exactly that version, whatever it says.
    /// For a rebuild: no attachment may do so.
    ///
    /// # Errors
    /// `Conflict` when something else is there by now; the store's.
    pub async fn replace(store: &dyn Store, manifest: Manifest, found: Option<Version>) -> Result<Self> {
        let key = key(&manifest.name);
        let changed = || {
            let what = format!(
                "{key} in {} has changed meanwhile: somebody else attaches, deletes or rebuilds volume {:?}; look at it \
                 (`vb-ublk volume info`) and try again",
                store.url(),
                manifest.name
            );
            Error::new(ErrorKind::Conflict, what)
        };
        // A store that ignores conditions would let this go through: look first.
        let now = match store.get(&key).await {
            Ok((_, version)) => Some(version),
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Err(e) => return Err(e.context(format!("looking at {key} in {}", store.url()))),
        };
        if now != found {
            return Err(changed());
        }
        let condition = found.map_or(Precondition::Absent, Precondition::Matches);
        let body = bytes::Bytes::from(manifest.encode()?);
        match store.put_if(&key, body, condition).await {
            Ok(version) => Ok(Self::of(manifest, version)),
            Err(e) if e.kind() == ErrorKind::Conflict => match Self::load(store, &manifest.name).await {
                // An earlier try of this very put had landed with its reply lost.
                Ok(there) if there.manifest.publish_id == manifest.publish_id => Ok(there),
                _ => Err(changed().with_source(e)),
            },
            Err(e) => Err(e.context(format!("publishing {key} in {}", store.url()))),
        }
    }

    /// Replaces the manifest by a changed one, if nobody else has replaced it meanwhile.
    ///
    /// # Errors
    /// `Fenced` when somebody has (the message says who); the store's. After an error that may be worth a retry the
    /// new version may or may not be there; the next call finds out.
    pub async fn publish(&mut self, store: &dyn Store, change: impl FnOnce(&mut Manifest)) -> Result<()> {
        let mut next = self.manifest.clone();
        change(&mut next);
        next.publish_id = Uuid::new_v4();
        if !next.conditional_writes {
            self.still_ours(store).await?;
        }
        let id = next.publish_id;
        match self.put_next(store, next).await {
            Ok(published) => *self = published,
            Err(e) => {
                if e.kind() != ErrorKind::Fenced {
                    self.unanswered.push(id);
                }
                return Err(e);
            }
        }
        if !self.manifest.conditional_writes {
            self.still_ours(store).await?;
        }
        Ok(())
    }

    /// Puts it in the place of the version that is known, or of one's own that had landed unheard.
    async fn put_next(&self, store: &dyn Store, next: Manifest) -> Result<Self> {
        let key = key(&next.name);
        let publishing = |e: Error| e.context(format!("publishing {key} in {}", store.url()));
        let body = bytes::Bytes::from(next.encode()?);
        match store.put_if(&key, body.clone(), Precondition::Matches(self.version.clone())).await {
            Ok(version) => return Ok(Self::of(next, version)),
            Err(e) if e.kind() == ErrorKind::Conflict => {}
            Err(e) => return Err(publishing(e)),
        }
        let now = Self::load(store, &next.name).await?;
        if now.manifest.publish_id == next.publish_id {
            // An earlier try of this very put had landed with its reply lost.
            return Ok(now);
        }
        // An earlier publish of this attachment, which writes one at a time, may have landed with its reply lost; this one
        // goes on top of it. Anything else there is somebody else's, whatever nonce it bears.
        if !self.unanswered.contains(&now.manifest.publish_id) || now.manifest.nonce != self.manifest.nonce {
            return Err(fenced(&now.manifest));
        }
        let version = store.put_if(&key, body, Precondition::Matches(now.version)).await.map_err(publishing)?;
        Ok(Self::of(next, version))
    }

    /// Changes the manifest of a volume that this process does not have attached: `change` is made on what is there, and made anew if
    /// somebody else has changed it meanwhile. With `force` also while another has it attached, who is then refused his next change.
    ///
    /// # Errors
    /// `Busy` while a host has the volume attached: its daemon alone may change it; `change`'s; the store's.
    pub async fn edit(
        &mut self,
        store: &dyn Store,
        force: bool,
        change: impl Fn(&mut Manifest) -> Result<()>,
    ) -> Result<()> {
        let name = self.manifest.name.clone();
        for _ in 0..EDIT_TRIES {
            // A store that ignores conditions would let this go over what has come meanwhile: look first, and after.
            if !self.manifest.conditional_writes {
                *self = Self::load(store, &name).await?;
            }
            let mut next = self.manifest.clone();
            if next.writer.is_some() && !force {
                return Err(Error::new(
                    ErrorKind::Busy,
                    format!(
                        "volume {name:?} is attached by {}: this is done on that host, or when it is detached",
                        next.holder()
                    ),
                ));
            }
            change(&mut next)?;
            next.publish_id = Uuid::new_v4();
            let key = key(&name);
            let body = bytes::Bytes::from(next.encode()?);
            match store.put_if(&key, body, Precondition::Matches(self.version.clone())).await {
                Ok(version) if next.conditional_writes => {
                    *self = Self::of(next, version);
                    return Ok(());
                }
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::Conflict => {}
                Err(e) => return Err(e.context(format!("publishing {key} in {}", store.url()))),
            }
            *self = Self::load(store, &name).await?;
            // Also when an earlier try of this very put had landed with its reply lost.
            if self.manifest.publish_id == next.publish_id {
                return Ok(());
            }
        }
        let what =
            format!("the manifest of volume {name:?} in {} is changed by others all the time: try again", store.url());
        Err(Error::new(ErrorKind::Conflict, what))
    }

    /// The same by whoever has the volume attached, or by anybody while nobody has.
    ///
    /// # Errors
    /// As [`Published::edit`], or as [`Published::publish`] when this attachment is the writer.
    pub async fn change(
        &mut self,
        store: &dyn Store,
        by: By,
        change: impl Fn(&mut Manifest) -> Result<()>,
    ) -> Result<()> {
        match by {
            By::Anybody => self.edit(store, false, change).await,
            By::Force => self.edit(store, true, change).await,
            By::Attachment => {
                let mut next = self.manifest.clone();
                change(&mut next)?;
                self.publish(store, |m| *m = next).await
            }
        }
    }

    /// The weaker rule for stores without conditional writes: look, for want of a lock.
    ///
    /// # Errors
    /// `Fenced` when the manifest is another's, `Conflict` when it is not the version that was read: a map that is made of that one may name
    /// what is gone.
    pub async fn still_ours(&mut self, store: &dyn Store) -> Result<()> {
        let now = Self::load(store, &self.manifest.name).await?;
        now.check_nonce(self.manifest.nonce)?;
        let id = now.manifest.publish_id;
        if id != self.manifest.publish_id && !self.unanswered.contains(&id) {
            let what = format!(
                "the manifest of volume {:?} has been changed by {} since it was read: try again",
                now.manifest.name,
                now.manifest.holder()
            );
            return Err(Error::new(ErrorKind::Conflict, what));
        }
        self.version = now.version;
        Ok(())
    }

    /// Whether this is still the manifest of the attachment with that nonce.
    ///
    /// # Errors
    /// `Fenced` when it is another's.
    pub fn check_nonce(&self, nonce: Nonce) -> Result<()> {
        if self.manifest.nonce == nonce { Ok(()) } else { Err(fenced(&self.manifest)) }
    }
}

fn fenced(now: &Manifest) -> Error {
    Error::new(
        ErrorKind::Fenced,
        format!(
            "volume {:?} has been taken over by {}: this attachment may not change it any more",
            now.name,
            now.holder()
        ),
    )
}
