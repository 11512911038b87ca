//! The last checkpoint, read back: each part is checked against the manifest and against its own header.

use std::pin::pin;

use futures_util::stream::{self, Stream, StreamExt, TryStreamExt};

use super::{Checkpoint, Image, Manifest};
use crate::checksum::sha256_hex;
use crate::codec::CodecError;
use crate::error::{Error, ErrorKind, Result};
use crate::map::checkpoint::{Expect, Ident, Part, PartKind, decode_part};
use crate::map::{BaseImage, ImageBuilder};
use crate::store::Store;
use crate::units::BLOCK;

const PARALLEL_PARTS: usize = 4;

/// The volume's base map as its last checkpoint has it.
pub(crate) struct Images {
    /// The newest full image, without its delta: what the next delta is reckoned from.
    pub full: BaseImage,
    /// The map itself.
    pub current: BaseImage,
}

/// Reads the checkpoint that the manifest names.
///
/// # Errors
/// `Corrupt` for a part that is missing or is not what the manifest says; the store's.
pub(crate) async fn load_images(store: &dyn Store, m: &Manifest) -> Result<Images> {
    load_checkpoint(store, m, m.checkpoint.as_ref()).await
}

/// Reads a checkpoint of this volume's: its newest, a snapshot's, or the one that a clone began with. Sources are as the volume
/// counts them, whoever wrote the image.
///
/// # Errors
/// As [`load_images`].
pub(crate) async fn load_checkpoint(store: &dyn Store, m: &Manifest, c: Option<&Checkpoint>) -> Result<Images> {
    let blocks = m.size_bytes / BLOCK as u64;
    let Some(c) = c else {
        let empty = BaseImage::empty(blocks);
        return Ok(Images { full: empty.clone(), current: empty });
    };
    let mut builder = ImageBuilder::new(blocks);
    let mut parts = pin!(load_parts(store, m, &c.full, PartKind::Full));
    while let Some(part) = parts.try_next().await? {
        builder.full_part(part).map_err(bad)?;
    }
    let full = builder.finish().map_err(bad)?;
    over(store, m, full, c.delta.as_ref()).await
}

/// The map that the manifest names, beside another state of the same volume, which was read already: what both have is not read
/// again, and takes no memory of its own.
///
/// # Errors
/// As [`load_images`].
pub(crate) async fn load_beside(
    store: &dyn Store,
    m: &Manifest,
    known: Option<(&Checkpoint, &Images)>,
) -> Result<Images> {
    match (&m.checkpoint, known) {
        (Some(c), Some((k, images)))
            if c.full == k.full && images.full.volume_blocks() == m.size_bytes / BLOCK as u64 =>
        {
            over(store, m, images.full.clone(), c.delta.as_ref()).await
        }
        _ => load_images(store, m).await,
    }
}

/// A whole image, and its delta laid over it.
async fn over(store: &dyn Store, m: &Manifest, full: BaseImage, delta: Option<&Image>) -> Result<Images> {
    let Some(delta) = delta else { return Ok(Images { current: full.clone(), full }) };
    let mut builder = ImageBuilder::over(full.clone());
    let mut parts = pin!(load_parts(store, m, delta, PartKind::Delta));
    while let Some(part) = parts.try_next().await? {
        builder.delta_part(part).map_err(bad)?;
    }
    Ok(Images { current: builder.finish().map_err(bad)?, full })
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

/// Every part of the checkpoint that cannot be used, with the reason: [`load_images`] stops at the first.
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
