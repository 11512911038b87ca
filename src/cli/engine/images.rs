//! Images in and out, and what has changed between two.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::future::{Either, select};
use serde_json::{Map, Value};

use super::{with_policy, with_shared};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::viperblock::{self, Viperblock};
use crate::image::{self, Below, ImageSource, Output};
use crate::store::retry::{Policy, Retry};
use crate::store::{self, Store, StoreOptions, StoreUrl};
use crate::time::now_unix;
use crate::units::Nonce;
use crate::volume::diff::Pair;
use crate::volume::{export, import, increment};

pub(in crate::cli) use crate::image::{Backing, Format, Target};
pub(in crate::cli) use crate::map::ChangeKind;
pub(in crate::cli) use crate::volume::diff::{Diff, bytes_of};
pub(in crate::cli) use crate::volume::export::{Exported, Progress as Exporting};
pub(in crate::cli) use crate::volume::import::{Imported, Progress as Importing};
pub(in crate::cli) use crate::volume::increment::Increment;

/// What is imported.
pub(in crate::cli) enum From {
    /// A disk image.
    Image { file: PathBuf, format: Option<Format>, backing: Backing },
    /// What Viperblock has, in a store of its own.
    Viperblock {
        volume: String,
        store: StoreUrl,
        options: Box<StoreOptions>,
        wal_dir: Option<PathBuf>,
        accept_loss: bool,
    },
}

impl From {
    async fn open(self) -> Result<Box<dyn ImageSource>> {
        match self {
            Self::Image { file, format, backing } => image::open(&file, format, &backing).await,
            Self::Viperblock { volume, store: url, options, wal_dir, accept_loss } => {
                let store = store::open(&url, &options).await.context(|| format!("opening the store {url}"))?;
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
        let mut source = from.open().await?;
        let name = name(&source.metadata())?;
        let how = import::Options { size_bytes, logical_block, metadata, nonce, now_unix: now_unix() };
        import::import(s, &name, &mut *source, &how, stop, told).await
    })
}

fn much_read(opts: &StoreOptions) -> StoreOptions {
    StoreOptions { bulk: true, fetch_aside: true, ..opts.clone() }
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
    with_shared(Policy::long_run(), url, &much_read(opts), async |s| {
        let done = async {
            let manifest = export::settled(&**s, name).await?;
            let base = export::Base::of(s, &manifest).await?;
            let mut out = Output::begin(target, base.size_bytes()).await?;
            let exported = export::export(&base, &mut *out.sink, told).await?;
            out.finish().await?;
            Ok(exported)
        };
        unless(stop, done).await.map_err(|e| e.context(format!("exporting volume {name} to {}", target.path.display())))
    })
}

/// What an increment begins from, and what it is to lie over.
pub(in crate::cli) struct Since<'a> {
    pub(in crate::cli) snapshot: &'a str,
    pub(in crate::cli) backing: Option<(&'a Path, Option<Format>)>,
}

/// Writes what has changed in a volume since one of its snapshots to an image. `stop` ends it.
pub(in crate::cli) fn export_since(
    url: &StoreUrl,
    opts: &StoreOptions,
    (volume, snapshot): (&str, Option<&str>),
    since: &Since<'_>,
    target: &Target,
    stop: impl Future<Output = ()>,
    told: &mut dyn FnMut(Exporting),
) -> Result<Increment> {
    with_shared(Policy::long_run(), url, &much_read(opts), async |s| {
        let done = async {
            let pair = Pair::find(&**s, volume, since.snapshot, snapshot).await?;
            let below = since.backing.map(|(path, format)| Below::find(path, format, &target.path, pair.from_bytes()));
            let target = Target { below: below.transpose()?, ..target.clone() };
            let diff = pair.compare(s).await?;
            let mut out = Output::begin(&target, diff.base().size_bytes()).await?;
            let exported = increment::export(&diff, &mut *out.sink, told).await?;
            out.finish().await?;
            Ok(exported)
        };
        unless(stop, done).await.map_err(|e| {
            let what = format!("exporting what has changed in volume {volume} since snapshot {}", since.snapshot);
            e.context(format!("{what} to {}", target.path.display()))
        })
    })
}

async fn unless<T>(stop: impl Future<Output = ()>, done: impl Future<Output = Result<T>>) -> Result<T> {
    match select(std::pin::pin!(done), std::pin::pin!(stop)).await {
        Either::Left((done, _)) => done,
        Either::Right(_) => Err(Error::new(ErrorKind::Interrupted, "the export was stopped")),
    }
}

/// Has `tell` say what has changed from one state of a volume to another one.
pub(in crate::cli) fn diff(
    url: &StoreUrl,
    opts: &StoreOptions,
    volume: &str,
    (from, to): (&str, Option<&str>),
    tell: impl FnOnce(&Diff) -> Result<()>,
) -> Result<()> {
    let found = with_shared(Policy::long_run(), url, opts, async |s| {
        Pair::find(&**s, volume, from, to).await?.compare(s).await
    });
    tell(&found.map_err(|e| e.context(format!("comparing two states of volume {volume}")))?)
}
