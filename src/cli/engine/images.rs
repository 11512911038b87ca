//! Images in and out.

use std::path::PathBuf;
use std::sync::Arc;

use futures_util::future::{Either, select};
use serde_json::{Map, Value};

use super::{now_unix, with_policy, with_shared};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::viperblock::{self, Viperblock};
use crate::image::{self, ImageSource, Output};
use crate::store::retry::{Policy, Retry};
use crate::store::{self, Store, StoreOptions, StoreUrl};
use crate::units::Nonce;
use crate::volume::{export, import};

pub(in crate::cli) use crate::image::{Backing, Format, Target};
pub(in crate::cli) use crate::volume::export::{Exported, Progress as Exporting};
pub(in crate::cli) use crate::volume::import::{Imported, Progress as Importing};

/// What is imported.
pub(in crate::cli) enum From {
    /// A disk image.
    Image { file: PathBuf, format: Option<Format>, backing: Backing },
    /// What Viperblock has, in a store of its own.
    Viperblock { volume: String, store: StoreUrl, wal_dir: Option<PathBuf>, accept_loss: bool },
}

impl From {
    async fn open(self, opts: &StoreOptions) -> Result<Box<dyn ImageSource>> {
        match self {
            Self::Image { file, format, backing } => image::open(&file, format, &backing).await,
            Self::Viperblock { volume, store: url, wal_dir, accept_loss } => {
                let store = store::open(&url, opts).await.context(|| format!("opening the store {url}"))?;
                let store: Arc<dyn Store> = Arc::new(Retry::new(store, Policy::long_run()));
                let how = viperblock::Options { wal_dir, accept_loss };
                Ok(Box::new(Viperblock::open_with(store, &volume, how).await?))
            }
        }
    }
}

/// How it is to be made a volume.
pub(in crate::cli) struct ImportOptions {
    pub(in crate::cli) from: From,
    pub(in crate::cli) size_bytes: Option<u64>,
    pub(in crate::cli) logical_block: u32,
    pub(in crate::cli) metadata: Map<String, Value>,
}

/// Makes a new volume; `name` names it, by what the source says of itself. `stop` ends it.
pub(in crate::cli) fn import(
    url: &StoreUrl,
    opts: &StoreOptions,
    name: impl FnOnce(&Map<String, Value>) -> Result<String>,
    how: ImportOptions,
    stop: impl Future<Output = ()>,
    told: &mut dyn FnMut(Importing),
) -> Result<Imported> {
    let ImportOptions { from, size_bytes, logical_block, metadata } = how;
    let nonce = Nonce::draw().context(|| "drawing a nonce")?;
    let create = StoreOptions { create: true, ..opts.clone() };
    with_policy(Policy::long_run(), url, &create, async |s| {
        let mut source = from.open(opts).await?;
        let name = name(&source.metadata())?;
        let how = import::Options { size_bytes, logical_block, metadata, nonce, now_unix: now_unix() };
        import::import(s, &name, &mut *source, &how, stop, told).await
    })
}

/// Writes a volume that nobody has attached to an image. `stop` ends it.
pub(in crate::cli) fn export(
    url: &StoreUrl,
    opts: &StoreOptions,
    name: &str,
    target: &Target,
    stop: impl Future<Output = ()>,
    told: &mut dyn FnMut(Exporting),
) -> Result<Exported> {
    with_shared(Policy::long_run(), url, opts, async |s| {
        let done = std::pin::pin!(async {
            let manifest = export::settled(&**s, name).await?;
            let base = export::Base::of(s, &manifest).await?;
            let mut out = Output::begin(target, base.size_bytes()).await?;
            let exported = export::export(&base, &mut *out.sink, told).await?;
            out.finish().await?;
            Ok(exported)
        });
        match select(done, std::pin::pin!(stop)).await {
            Either::Left((done, _)) => done,
            Either::Right(_) => Err(Error::new(ErrorKind::Interrupted, "the export was stopped")),
        }
        .map_err(|e| e.context(format!("exporting volume {name} to {}", target.path.display())))
    })
}
