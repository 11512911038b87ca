//! A new volume from an image, straight to the store, without a log.
//!
//! What it writes looks as if one attachment (epoch 1) had written the image and been detached: chunk n is all of group n, and
//! group n is entry n of a log that never was. So attach, verify and rebuild need not know of it.
//!
//! Invariants:
//! - The manifest is the last to be written, and only where there is none: an interrupted import is no volume.
//! - Every key bears the import's own nonce: what it takes away when it fails is its own.
//! - At most [`PARALLEL`] chunks are on their way, and one is being filled, whatever the image's size.
//! - A block of zeros is not stored; nor is it mapped.

use std::cell::Cell;
use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use futures_util::future::{Either, FutureExt, select};
use futures_util::stream::{self, Stream, StreamExt, TryStreamExt};
use serde::Serialize;
use serde_json::{Map, Value};
use uuid::Uuid;

use super::admin::nothing_there;
use super::background::checkpoint::put_parts;
use crate::chunk::bodies::Bodies;
use crate::chunk::header::{ChunkExtent, ChunkHeader, ExtentKind, HEADER_ROOM, MAX_BLOCKS, block_crc, key};
use crate::chunk::pack::map_extents;
use crate::error::{Error, ErrorKind, Result};
use crate::image::ImageSource;
use crate::manifest::{self, Checkpoint, EpochEntry, FirstOwned, Image, Manifest, Published, part_key};
use crate::map::BaseImage;
use crate::map::checkpoint::{Ident, encode_full, part_bytes};
use crate::store::Store;
use crate::units::{BLOCK, BlockNo, ChunkNo, Epoch, GroupNo, MAX_VOLUME_BYTES, Nonce, Seq};

/// Chunks on their way to the store at once, each of up to 4 MiB.
pub const PARALLEL: usize = 16;
/// The only attachment.
const EPOCH: Epoch = Epoch(1);
const CHECKPOINT: u64 = 1;
/// How long what is under way may take to end when the import fails or is stopped.
const SETTLE: Duration = Duration::from_secs(10);

/// What the volume is to be, beside the image.
#[derive(Debug, Clone)]
pub struct Options {
    /// Its size in bytes; `None`: the image's, rounded up to a multiple of 4096.
    pub size_bytes: Option<u64>,
    /// Its logical block size in bytes: 512 or 4096.
    pub logical_block: u32,
    /// What is kept with the volume, beside what the image says of itself.
    pub metadata: Map<String, Value>,
    /// A fresh nonce.
    pub nonce: Nonce,
    /// The time, in seconds since 1970.
    pub now_unix: u64,
}

/// How far an import is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// Everything before this byte of the image is read.
    pub bytes: u64,
    /// Of so many; `None` for a pipe.
    pub of: Option<u64>,
}

/// What was imported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Imported {
    /// The volume's name.
    pub volume: String,
    /// Where it is.
    pub store: String,
    /// Its identity.
    pub uuid: Uuid,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The image's size in bytes.
    pub image_bytes: u64,
    /// Bytes of it that are not zeros, in blocks of 4096.
    pub data_bytes: u64,
    /// Chunks written.
    pub chunks: u64,
}

/// Makes the volume `name` of an image, and tells now and then how far it is. `stop` ends it as an error would.
///
/// # Errors
/// `Usage` for a name or size that cannot be, `Exists` when there is such a volume, or what an interrupted import left; the image's and
/// the store's; `Interrupted`. What was uploaded is deleted again; where that fails the message says so.
pub async fn import(
    store: &dyn Store,
    name: &str,
    source: &mut dyn ImageSource,
    opts: &Options,
    stop: impl Future<Output = ()>,
    told: &mut dyn FnMut(Progress),
) -> Result<Imported> {
    manifest::check_name(name)?;
    let size = match (opts.size_bytes, source.size_bytes()) {
        (Some(size), Some(image)) if image > size => return Err(too_small(size, image)),
        (Some(size), _) => Some(size),
        (None, image) => image.map(whole_blocks),
    };
    // A pipe's size shows at its end; the block size may be wrong all the same.
    manifest::check_size(size.unwrap_or(BLOCK as u64), opts.logical_block)?;
    let stop = stop.shared();
    match select(pin!(nothing_there(store, name)), stop.clone()).await {
        Either::Left((looked, _)) => looked?,
        Either::Right(_) => return Err(interrupted()),
    }
    let mut manifest = Manifest::new(name, size.unwrap_or(MAX_VOLUME_BYTES), opts.logical_block, opts.now_unix);
    let job =
        Job { store, prefix: manifest::prefix(name), nonce: opts.nonce, started: Cell::new(0), parts: Cell::new(0) };
    let mut packer = Packer::new(source, &manifest, opts.nonce, told);
    let done = async {
        job.upload(&mut packer, stop.clone()).await?;
        let image_bytes = packer.source.size_bytes().unwrap_or(packer.end);
        if size.is_none() {
            manifest.size_bytes = whole_blocks(image_bytes);
            manifest::check_size(manifest.size_bytes, opts.logical_block)?;
        }
        let map = packer.map.resized(manifest.size_bytes / BLOCK as u64);
        let metadata = packer.source.metadata().into_iter().chain(opts.metadata.clone()).collect();
        let checkpoint = job.checkpoint(&manifest, &map, stop.clone()).await?;
        manifest.metadata = metadata;
        let imported = Imported {
            volume: name.to_owned(),
            store: store.url(),
            uuid: manifest.uuid,
            size_bytes: manifest.size_bytes,
            image_bytes,
            data_bytes: map.mapped_blocks() * BLOCK as u64,
            chunks: job.started.get(),
        };
        Ok((as_after_a_detach(manifest, opts.nonce, checkpoint), imported))
    };
    let (manifest, imported) = match done.await {
        Ok(done) => done,
        Err(e) => return Err(job.clean_up(e).await),
    };
    job.publish(manifest).await?;
    Ok(imported)
}

fn whole_blocks(bytes: u64) -> u64 {
    bytes.next_multiple_of(BLOCK as u64)
}

fn too_small(size: u64, image: u64) -> Error {
    Error::new(
        ErrorKind::Usage,
        format!(
            "the image has {image} bytes or more, and --size is {size}: leave it out, or give at least {}",
            whole_blocks(image)
        ),
    )
}

fn interrupted() -> Error {
    Error::new(ErrorKind::Interrupted, "the import was stopped")
}

/// The volume as one attachment would have left it.
fn as_after_a_detach(mut m: Manifest, nonce: Nonce, checkpoint: Option<Checkpoint>) -> Manifest {
    let first = Some(FirstOwned { group: GroupNo(1), chunk: ChunkNo(1) });
    m.history = vec![EpochEntry { epoch: EPOCH, nonce, first }];
    (m.epoch, m.nonce, m.checkpoint) = (EPOCH, nonce, checkpoint);
    m
}

/// A chunk ready to go.
struct Ready {
    chunk: ChunkNo,
    body: bytes::Bytes,
}

/// Reads the image and fills chunks.
struct Packer<'a> {
    source: &'a mut dyn ImageSource,
    told: &'a mut dyn FnMut(Progress),
    bodies: Bodies,
    header: ChunkHeader,
    map: BaseImage,
    /// The next block to be read.
    next: u64,
    /// Up to here there is data.
    window: u64,
    /// Byte behind the last that the image said to have.
    end: u64,
    size: u64,
}

impl<'a> Packer<'a> {
    fn new(source: &'a mut dyn ImageSource, m: &Manifest, nonce: Nonce, told: &'a mut dyn FnMut(Progress)) -> Self {
        let header = ChunkHeader {
            volume: m.uuid,
            chunk: ChunkNo(0),
            epoch: EPOCH,
            nonce,
            after: Seq(0),
            through: Seq(0),
            group: GroupNo(0),
            index: 0,
            count: 1,
            applied_through: GroupNo(0),
            extents: Vec::new(),
            crcs: Vec::new(),
            masks: Vec::new(),
        };
        let map = BaseImage::empty(m.size_bytes / BLOCK as u64);
        // Those on their way, and the one that is being filled.
        let bodies = Bodies::keeping(PARALLEL + 1);
        Self { source, told, bodies, header, map, next: 0, window: 0, end: 0, size: m.size_bytes }
    }

    /// Moves to the next stretch that may hold data.
    async fn seek(&mut self) -> Result<bool> {
        let from = self.next * BLOCK as u64;
        let Some((start, end)) = self.source.next_data(from).await? else { return Ok(false) };
        if start < from || end <= start {
            let what = format!("the image has data at bytes {start} to {end}, asked for those from {from}");
            return Err(Error::new(ErrorKind::Internal, what));
        }
        if end > self.size {
            return Err(too_small(self.size, end));
        }
        // A stretch may begin and end inside of a block.
        self.next = self.next.max(start / BLOCK as u64);
        self.window = end.div_ceil(BLOCK as u64);
        self.end = self.end.max(end);
        Ok(true)
    }

    /// The next chunk; `None` at the image's end.
    async fn fill(&mut self) -> Result<Option<Ready>> {
        let mut body = self.bodies.take(HEADER_ROOM + MAX_BLOCKS * BLOCK);
        let h = &mut self.header;
        h.chunk = h.chunk.next();
        (h.after, h.through, h.group) = (Seq(h.chunk.0 - 1), Seq(h.chunk.0), GroupNo(h.chunk.0));
        h.extents.clear();
        h.crcs.clear();
        while self.header.crcs.len() < MAX_BLOCKS {
            if self.next >= self.window && !self.seek().await? {
                break;
            }
            let kept = self.header.crcs.len();
            let blocks = (self.window - self.next).min((MAX_BLOCKS - kept) as u64);
            let room = &mut body.buf.bytes_mut()[HEADER_ROOM + kept * BLOCK..][..blocks as usize * BLOCK];
            self.source.read(self.next * BLOCK as u64, room).await?;
            keep_data(&mut self.header, BlockNo(self.next), room);
            self.next += blocks;
            let bytes = self.next * BLOCK as u64;
            (self.told)(Progress { bytes, of: self.source.size_bytes() });
            // The image may never wait, as a file in memory does not: uploads, and whoever wants to stop, have their turn.
            tokio::task::yield_now().await;
        }
        if self.header.crcs.is_empty() {
            return Ok(None);
        }
        self.map.apply_extents(&map_extents(&self.header, 0));
        body.buf.copy_in(0, &self.header.encode().map_err(Error::from)?);
        let len = HEADER_ROOM + self.header.crcs.len() * BLOCK;
        Ok(Some(Ready { chunk: self.header.chunk, body: body.freeze().slice(..len) }))
    }
}

/// Takes the blocks of `room`, of which the first is the volume's `first`, into the chunk: all but those of zeros, over whose places the
/// others move up.
fn keep_data(h: &mut ChunkHeader, first: BlockNo, room: &mut [u8]) {
    let mut to = 0;
    for from in (0..room.len()).step_by(BLOCK) {
        let data = &room[from..from + BLOCK];
        if is_zero(data) {
            continue;
        }
        let block = BlockNo(first.0 + (from / BLOCK) as u64);
        h.crcs.push(block_crc(block, data));
        match h.extents.last_mut() {
            Some(e) if e.block.0 + e.blocks == block.0 => e.blocks += 1,
            _ => h.extents.push(ChunkExtent { block, blocks: 1, kind: ExtentKind::Data, birth: h.through }),
        }
        if from != to {
            room.copy_within(from..from + BLOCK, to);
        }
        to += BLOCK;
    }
}

/// Whether a block is all zeros. Data shows in the first words mostly; the rest is looked at many bytes at a time.
fn is_zero(block: &[u8]) -> bool {
    block
        .as_chunks::<256>()
        .0
        .iter()
        .all(|piece| piece.as_chunks::<8>().0.iter().fold(0, |all, word| all | u64::from_ne_bytes(*word)) == 0)
}

/// What goes to the store, and comes back from there if it has to.
struct Job<'a> {
    store: &'a dyn Store,
    prefix: String,
    nonce: Nonce,
    /// The last chunk whose upload was begun.
    started: Cell<u64>,
    /// Parts of the checkpoint, likewise.
    parts: Cell<usize>,
}

impl Job<'_> {
    fn chunk_key(&self, chunk: ChunkNo) -> String {
        key(&self.prefix, chunk, EPOCH, self.nonce)
    }

    /// All chunks of the image. When this returns an error, as good as nothing is under way any more.
    async fn upload(&self, packer: &mut Packer<'_>, stop: impl Future<Output = ()> + Clone) -> Result<()> {
        let halted = Cell::new(false);
        let (stopped, no_more) = (stop.clone(), &halted);
        let next = stream::unfold(packer, |p| {
            let stopped = stopped.clone();
            async move {
                if no_more.get() {
                    return None;
                }
                let filled = match select(pin!(p.fill()), pin!(stopped)).await {
                    Either::Left((filled, _)) => filled.transpose()?,
                    Either::Right(_) => Err(interrupted()),
                };
                Some((filled, p))
            }
        });
        let work = next.map(|ready| self.put(ready)).buffer_unordered(PARALLEL);
        let mut work = pin!(work);
        let failed = loop {
            match select(work.next(), pin!(stop.clone())).await {
                Either::Left((None, _)) => return Ok(()),
                Either::Left((Some(Ok(())), _)) => {}
                Either::Left((Some(Err(e)), _)) => break e,
                Either::Right(_) => break interrupted(),
            }
        };
        halted.set(true);
        settle(work).await;
        Err(failed)
    }

    async fn put(&self, ready: Result<Ready>) -> Result<()> {
        let Ready { chunk, body } = ready?;
        self.started.set(self.started.get().max(chunk.0));
        let key = self.chunk_key(chunk);
        self.store.put(&key, body).await.map_err(|e| e.context(format!("uploading {key} to {}", self.store.url())))
    }

    /// Writes the map. An image of zeros has none.
    async fn checkpoint(
        &self,
        m: &Manifest,
        map: &BaseImage,
        stop: impl Future<Output = ()>,
    ) -> Result<Option<Checkpoint>> {
        let last = self.started.get();
        if last == 0 {
            return Ok(None);
        }
        let ident = Ident { volume: m.uuid, number: CHECKPOINT };
        let name = |part: usize| {
            self.parts.set(part + 1);
            part_key(CHECKPOINT, EPOCH, self.nonce, part)
        };
        let put = pin!(put_parts(self.store, &self.prefix, encode_full(map, ident, part_bytes(map)), name));
        let parts = match select(put, pin!(stop)).await {
            Either::Left((parts, _)) => parts.map_err(|e| e.context("writing the volume's map"))?,
            Either::Right(((), put)) => {
                let _ = tokio::time::timeout(SETTLE, put).await;
                return Err(interrupted());
            }
        };
        let full = Image { number: CHECKPOINT, parts, source: 0 };
        let (group, through, last_chunk) = (GroupNo(last), Seq(last), ChunkNo(last));
        Ok(Some(Checkpoint { group, through, last_chunk, full, delta: None }))
    }

    /// Makes it a volume.
    async fn publish(&self, manifest: Manifest) -> Result<()> {
        let (name, id) = (manifest.name.clone(), manifest.publish_id);
        let Err(e) = Published::create(self.store, manifest).await else { return Ok(()) };
        match Published::load(self.store, &name).await {
            // It had landed with its reply lost.
            Ok(there) if there.manifest.publish_id == id => Ok(()),
            Ok(_) => Err(self.clean_up(e).await),
            Err(now) if now.kind() == ErrorKind::NotFound && !e.kind().is_transient() => Err(self.clean_up(e).await),
            // It may be there, or come late: a volume must not lose its chunks.
            Err(_) => Err(e.context(format!(
                "it is not known whether the volume is there: see `vb-ublk volume info {name}`; if not, `vb-ublk volume \
                 delete {name}` removes what was uploaded"
            ))),
        }
    }

    /// Deletes what this import has uploaded, and says in the error what has become of it.
    async fn clean_up(&self, e: Error) -> Error {
        let chunks = (1..=self.started.get()).map(|n| self.chunk_key(ChunkNo(n)));
        let parts =
            (0..self.parts.get()).map(|p| format!("{}{}", self.prefix, part_key(CHECKPOINT, EPOCH, self.nonce, p)));
        let deleted = stream::iter(chunks.chain(parts))
            .map(|key| async move { self.store.delete(&key).await })
            .buffer_unordered(PARALLEL)
            .try_collect::<()>()
            .await;
        let name = self.prefix.trim_end_matches('/');
        let so = match deleted {
            Ok(()) => format!("no volume {name:?} was made, and what was uploaded is deleted"),
            Err(why) => format!(
                "no volume {name:?} was made; what was uploaded could not be deleted ({why}): `vb-ublk volume delete {name}` \
                 does so"
            ),
        };
        e.context(so)
    }
}

/// Lets uploads end that are under way: one that is let go of may land after it was deleted.
async fn settle(work: impl Stream<Item = Result<()>>) {
    let _ = tokio::time::timeout(SETTLE, work.for_each(|_| async {})).await;
}
