//! The last checkpoint, read back: each part is checked against the manifest and against its own header.

use std::pin::pin;

use futures_util::stream::{self, Stream, StreamExt, TryStreamExt};

use super::{Checkpoint, Image, Manifest};
use crate::checksum::sha256_hex;
use crate::codec::CodecError;
use crate::error::{Error, ErrorKind, Result};
use crate::map::checkpoint::{Expect, Ident, Part, PartKind, decode_part};
use crate::map::{BaseImage, ImageBuilder, Run};
use crate::store::Store;
use crate::units::BLOCK;

const PARALLEL_PARTS: usize = 4;

/// Reads the checkpoint that the manifest names: the volume's base map as of then.
///
/// # Errors
/// `Corrupt` for a part that is missing or is not what the manifest says; the store's.
pub(crate) async fn load_image(store: &dyn Store, m: &Manifest) -> Result<BaseImage> {
    load_checkpoint(store, m, m.checkpoint.as_ref()).await
}

/// Reads a checkpoint of this volume's: its newest, a snapshot's, or the one that a clone began with. Sources are as the volume
/// counts them, whoever wrote the image.
///
/// # Errors
/// As [`load_image`].
pub(crate) async fn load_checkpoint(store: &dyn Store, m: &Manifest, c: Option<&Checkpoint>) -> Result<BaseImage> {
    let blocks = m.size_bytes / BLOCK as u64;
    let Some(c) = c else { return Ok(BaseImage::empty(blocks)) };
    let builder = with_full(store, m, &c.full).await?;
    with_delta(store, m, builder, c.delta.as_ref()).await?.finish().map_err(bad)
}

/// Reads the checkpoints of two states of one volume. What both have is read once, and takes memory once.
///
/// # Errors
/// As [`load_image`].
pub(crate) async fn load_pair(store: &dyn Store, one: &Manifest, other: &Manifest) -> Result<(BaseImage, BaseImage)> {
    if let (Some(a), Some(b)) = (&one.checkpoint, &other.checkpoint)
        && a.full == b.full
        && one.size_bytes == other.size_bytes
    {
        let full = with_full(store, one, &a.full).await?.finish().map_err(bad)?;
        let of_one = with_delta(store, one, ImageBuilder::over(full.clone()), a.delta.as_ref()).await?;
        let of_other = with_delta(store, other, ImageBuilder::over(full), b.delta.as_ref()).await?;
        return Ok((of_one.finish().map_err(bad)?, of_other.finish().map_err(bad)?));
    }
    Ok((load_image(store, one).await?, load_image(store, other).await?))
}

/// Reads what a checkpoint's delta lays over its full image, in order.
///
/// # Errors
/// As [`load_image`].
pub(crate) async fn load_delta(store: &dyn Store, m: &Manifest, delta: &Image) -> Result<Vec<Run>> {
    let empty = ImageBuilder::new(m.size_bytes / BLOCK as u64);
    with_delta(store, m, empty, Some(delta)).await?.finish_delta().map_err(bad)
}

async fn with_full(store: &dyn Store, m: &Manifest, full: &Image) -> Result<ImageBuilder> {
    let mut builder = ImageBuilder::new(m.size_bytes / BLOCK as u64);
    let mut parts = pin!(load_parts(store, m, full, PartKind::Full));
    while let Some(part) = parts.try_next().await? {
        builder.full_part(part).map_err(bad)?;
    }
    Ok(builder)
}

async fn with_delta(
    store: &dyn Store,
    m: &Manifest,
    mut builder: ImageBuilder,
    delta: Option<&Image>,
) -> Result<ImageBuilder> {
    if let Some(delta) = delta {
        let mut parts = pin!(load_parts(store, m, delta, PartKind::Delta));
        while let Some(part) = parts.try_next().await? {
            builder.delta_part(part).map_err(bad)?;
        }
    }
    Ok(builder)
}

fn bad(e: CodecError) -> Error {
    Error::from(e).context("joining the checkpoint's parts")
}

/// An image's parts, in order, few of them on their way or waiting at a time: together they are as large as the map.
fn load_parts<'a>(
    store: &'a dyn Store,
    m: &'a Manifest,
    image: &'a Image,
    kind: PartKind,
) -> impl Stream<Item = Result<Part>> + 'a {
    stream::iter(0..image.parts.len()).map(move |i| load_part(store, m, image, kind, i)).buffered(PARALLEL_PARTS)
}

/// The key of an image's part.
pub(crate) fn part_at(m: &Manifest, image: &Image, i: usize) -> String {
    let prefix = m.source(image.source).map(|s| s.prefix()).unwrap_or_default();
    format!("{prefix}{}", image.parts[i].key)
}

async fn load_part(store: &dyn Store, m: &Manifest, image: &Image, kind: PartKind, i: usize) -> Result<Part> {
    let part = &image.parts[i];
    let key = part_at(m, image, i);
    let damaged = |why: String| Error::new(ErrorKind::Corrupt, format!("checkpoint part {key} is damaged: {why}"));
    let source = m.source(image.source).ok_or_else(|| damaged(format!("no source {} is known", image.source)))?;
    let (bytes, _) = store.get(&key).await.map_err(|e| match e.kind() {
        ErrorKind::NotFound => damaged("it is not in the store".to_owned()).with_source(e),
        _ => e.context(format!("reading checkpoint part {key}")),
    })?;
    if bytes.len() as u64 != part.bytes {
        return Err(damaged(format!("it has {} bytes, the manifest says {}", bytes.len(), part.bytes)));
    }
    if sha256_hex(&bytes) != part.sha256 {
        return Err(damaged("its SHA-256 is not what the manifest says".to_owned()));
    }
    let expect = Expect {
        ident: Ident { volume: source.uuid, number: image.number },
        kind,
        part: i as u32,
        parts: image.parts.len() as u32,
        volume_blocks: m.size_bytes / BLOCK as u64,
    };
    let decoded = decode_part(&bytes, &expect).and_then(|p| p.lifted(image.source));
    decoded.map_err(|e| Error::from(e).context(format!("reading checkpoint part {key}")))
}

/// Every part of the checkpoint that cannot be used, with the reason: [`load_image`] stops at the first.
///
/// # Errors
/// The store's, and those of a newer program's parts.
pub(crate) async fn damaged_parts(store: &dyn Store, m: &Manifest) -> Result<Vec<(String, Error)>> {
    let Some(c) = &m.checkpoint else { return Ok(Vec::new()) };
    let images = [Some((&c.full, PartKind::Full)), c.delta.as_ref().map(|d| (d, PartKind::Delta))];
    let mut bad = Vec::new();
    for (image, kind) in images.into_iter().flatten() {
        for i in 0..image.parts.len() {
            match load_part(store, m, image, kind, i).await {
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::Corrupt => bad.push((part_at(m, image, i), e)),
                Err(e) => return Err(e),
            }
        }
    }
    Ok(bad)
}
