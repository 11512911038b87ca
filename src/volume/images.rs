//! The last checkpoint, read back: each part is checked against the manifest and against its own header.

use futures_util::stream::{self, StreamExt, TryStreamExt};

use crate::checksum::sha256_hex;
use crate::codec::CodecError;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::{Image, Manifest};
use crate::map::checkpoint::{Expect, Ident, Part, PartKind, decode_part};
use crate::map::{BaseImage, ImageBuilder};
use crate::store::Store;
use crate::units::BLOCK;

const PARALLEL_PARTS: usize = 4;

/// The volume's base map as its last checkpoint has it.
pub(super) struct Images {
    /// The newest full image, without its delta: what the next delta is reckoned from.
    pub full: BaseImage,
    /// The map itself.
    pub current: BaseImage,
}

/// Reads the checkpoint that the manifest names.
///
/// # Errors
/// `Corrupt` for a part that is missing or is not what the manifest says; the store's.
pub(super) async fn load_images(store: &dyn Store, name_prefix: &str, m: &Manifest) -> Result<Images> {
    let blocks = m.size_bytes / BLOCK as u64;
    let Some(c) = &m.checkpoint else {
        let empty = BaseImage::empty(blocks);
        return Ok(Images { full: empty.clone(), current: empty });
    };
    let bad = |e: CodecError| Error::from(e).context("joining the checkpoint's parts");
    let mut builder = ImageBuilder::new(blocks);
    for part in load_parts(store, name_prefix, m, &c.full, PartKind::Full).await? {
        builder.full_part(part).map_err(bad)?;
    }
    let full = builder.finish().map_err(bad)?;
    let Some(delta) = &c.delta else { return Ok(Images { current: full.clone(), full }) };
    let mut builder = ImageBuilder::over(full.clone());
    for part in load_parts(store, name_prefix, m, delta, PartKind::Delta).await? {
        builder.delta_part(part).map_err(bad)?;
    }
    Ok(Images { current: builder.finish().map_err(bad)?, full })
}

async fn load_parts(
    store: &dyn Store,
    name_prefix: &str,
    m: &Manifest,
    image: &Image,
    kind: PartKind,
) -> Result<Vec<Part>> {
    stream::iter(0..image.parts.len())
        .map(|i| load_part(store, name_prefix, m, image, kind, i))
        .buffered(PARALLEL_PARTS)
        .try_collect()
        .await
}

async fn load_part(
    store: &dyn Store,
    name_prefix: &str,
    m: &Manifest,
    image: &Image,
    kind: PartKind,
    i: usize,
) -> Result<Part> {
    let part = &image.parts[i];
    let key = format!("{name_prefix}{}", part.key);
    let damaged = |why: String| Error::new(ErrorKind::Corrupt, format!("checkpoint part {key} is damaged: {why}"));
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
        ident: Ident { volume: m.uuid, number: image.number },
        kind,
        part: i as u32,
        parts: image.parts.len() as u32,
        volume_blocks: m.size_bytes / BLOCK as u64,
    };
    decode_part(&bytes, &expect).map_err(|e| Error::from(e).context(format!("reading checkpoint part {key}")))
}

/// Every part of the checkpoint that cannot be used, with the reason: [`load_images`] stops at the first.
///
/// # Errors
/// The store's, and those of a newer program's parts.
pub(super) async fn damaged_parts(store: &dyn Store, name_prefix: &str, m: &Manifest) -> Result<Vec<(String, Error)>> {
    let Some(c) = &m.checkpoint else { return Ok(Vec::new()) };
    let images = [Some((&c.full, PartKind::Full)), c.delta.as_ref().map(|d| (d, PartKind::Delta))];
    let mut bad = Vec::new();
    for (image, kind) in images.into_iter().flatten() {
        for (i, part) in image.parts.iter().enumerate() {
            match load_part(store, name_prefix, m, image, kind, i).await {
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::Corrupt => bad.push((format!("{name_prefix}{}", part.key), e)),
                Err(e) => return Err(e),
            }
        }
    }
    Ok(bad)
}
