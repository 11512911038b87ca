//! Viperblock's binary formats, for reading only: chunk headers, block maps, snapshots' inherited layers, log records.
//!
//! All integers are big-endian, the block size is 4096, the version is 1 in every release so far (also where the layout
//! has changed). CRC-32 is the common one (IEEE).
//!
//! ```text
//! chunk header, 10 bytes: `chunks/chunk.%08d.bin`; blocks back to back follow
//! offset  size  field
//!      0     4  magic "VBCH", or "VBCE": encrypted
//!      4     2  version, 1
//!      6     4  block size, 4096
//!
//! block map, 14 bytes: `checkpoints/blocks.*.bin`; records follow, one for each block
//!      0     4  magic "VBWB"
//!      4     2  version, 1
//!      6     8  when it was written, in seconds since 1970
//!
//! record of a block map, 26 bytes before release 1.6, else 34
//!      0     8  block
//!      8     2  number of blocks; a record stands for one whatever it says
//!     10     8  chunk number
//!     18     4  offset in the chunk, counted with a header even where the chunk has none
//!     22     8  seq (34 bytes only)
//!  22/30     4  CRC-32 of the bytes before it
//!
//! inherited layers, behind the BlockCount records of a snapshot whose config says HasFlatSection
//!      0     4  magic "FLAT"
//!      4     1  version, 1
//!      5     1  number of layers, nearest first; each:
//!                  0  2  length n of the volume's name
//!                  2  n  name of the volume whose chunks are meant
//!                n+2  4  that volume's uuid
//!                n+6 32  hash of its name
//!               n+38  4  number of records; they follow, of 34 bytes
//!
//! log, 18 bytes: `wal/chunks/wal.%08d[.shard_%02d].bin`; records follow
//!      0     4  magic "VBWL", or "VBWE": encrypted
//!      4     2  version, 1
//!      6     4  block size, 4096
//!     10     8  when it was begun, in seconds since 1970
//!
//! record of a log, 4124 bytes
//!      0     8  seq
//!      8     8  block
//!     16     8  length, or 0; the data has 4096 bytes whatever it says
//!     24     4  CRC-32 of bytes 0 to 23 and the data
//!     28  4096  data
//! ```

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::codec::CodecError;
use crate::units::BLOCK;

/// Bytes of a chunk's header.
pub const CHUNK_HEAD: usize = 10;
/// Bytes before the first record of a block map.
pub const MAP_HEAD: usize = 14;
/// Bytes before the first record of a log.
pub const LOG_HEAD: usize = 18;
/// Bytes of a log's record.
pub const LOG_RECORD: usize = LOG_RECORD_HEAD + BLOCK;
/// Bytes of a log's record before its data.
pub const LOG_RECORD_HEAD: usize = 28;
/// The only version there is.
pub const VERSION: u16 = 1;

const CHUNK: &str = "Viperblock chunk";
const MAP: &str = "Viperblock block map";
const LAYERS: &str = "Viperblock snapshot's inherited layers";
const LOG: &str = "Viperblock log";

const _: () = assert!(size_of::<RawChunkHead>() == CHUNK_HEAD);
const _: () = assert!(size_of::<RawMapHead>() == MAP_HEAD);
const _: () = assert!(size_of::<RawLogHead>() == LOG_HEAD);
const _: () = assert!(size_of::<RawLogRecord>() == LOG_RECORD_HEAD);
const _: () = assert!(size_of::<RawMapRecord>() + 4 == Age::Unnumbered.record_bytes());
const _: () = assert!(size_of::<RawMapRecord>() + 12 == Age::Numbered.record_bytes());

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawChunkHead {
    magic: [u8; 4],
    version: U16,
    block_bytes: U32,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawMapHead {
    magic: [u8; 4],
    version: U16,
    written: U64,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawLogHead {
    magic: [u8; 4],
    version: U16,
    block_bytes: U32,
    begun: U64,
}

/// What records of a block map of both ages begin with.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawMapRecord {
    block: U64,
    blocks: U16,
    chunk: U64,
    offset: U32,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawLogRecord {
    seq: U64,
    block: U64,
    len: U64,
    crc: U32,
}

/// The two ages of a block map's records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Age {
    /// Before release 1.6: without a seq.
    Unnumbered,
    /// Since release 1.6: with a seq.
    Numbered,
}

impl Age {
    /// Bytes of a record.
    #[must_use]
    pub const fn record_bytes(self) -> usize {
        match self {
            Self::Unnumbered => 26,
            Self::Numbered => 34,
        }
    }
}

/// Where a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapRecord {
    /// The block of the volume.
    pub block: u64,
    /// The chunk's number.
    pub chunk: u64,
    /// Bytes from the chunk's beginning, its header included even where it has none.
    pub offset: u32,
    /// The write's number; 0 where the format has none, or nobody knew it.
    pub seq: u64,
}

/// A block map as stored: records in the order of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockMap {
    /// The records' age; absent where there are none.
    pub age: Option<Age>,
    /// The records.
    pub records: Vec<MapRecord>,
}

/// Blocks that a snapshot has from another volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InheritedLayer {
    /// The volume whose chunks the records mean.
    pub volume: String,
    /// The records.
    pub records: Vec<MapRecord>,
}

/// A record of a log, whose data has passed its check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogRecord<'a> {
    /// The write's number.
    pub seq: u64,
    /// The block of the volume.
    pub block: u64,
    /// Its 4096 bytes.
    pub data: &'a [u8],
}

/// Whether what a header announces is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cipher {
    /// Stored as is.
    Plain,
    /// Sealed with a key of Viperblock's.
    Encrypted,
}

/// Checks a chunk's header: its first [`CHUNK_HEAD`] bytes (what follows is not looked at).
///
/// # Errors
/// Anything that is not a chunk's header of version 1 with blocks of 4096 bytes.
pub fn chunk_head(bytes: &[u8]) -> Result<Cipher, CodecError> {
    let (h, _) = RawChunkHead::read_from_prefix(bytes).map_err(|_| short(CHUNK, bytes, CHUNK_HEAD))?;
    let cipher = cipher(CHUNK, h.magic, *b"VBCH", *b"VBCE")?;
    CodecError::known(CHUNK, "version", h.version.get().into(), VERSION.into())?;
    CodecError::known(CHUNK, "block size", h.block_bytes.get().into(), BLOCK as u64)?;
    Ok(cipher)
}

/// Checks a log's header: its first [`LOG_HEAD`] bytes (what follows is not looked at).
///
/// # Errors
/// Anything that is not a log's header of version 1 with blocks of 4096 bytes.
pub fn log_head(bytes: &[u8]) -> Result<Cipher, CodecError> {
    let (h, _) = RawLogHead::read_from_prefix(bytes).map_err(|_| short(LOG, bytes, LOG_HEAD))?;
    let cipher = cipher(LOG, h.magic, *b"VBWL", *b"VBWE")?;
    CodecError::known(LOG, "version", h.version.get().into(), VERSION.into())?;
    CodecError::known(LOG, "block size", h.block_bytes.get().into(), BLOCK as u64)?;
    Ok(cipher)
}

/// Decodes and checks a log's record: the first [`LOG_RECORD`] bytes.
///
/// # Errors
/// A record cut short, or one that fails its checksum.
pub fn log_record(bytes: &[u8]) -> Result<LogRecord<'_>, CodecError> {
    let bytes = bytes.get(..LOG_RECORD).ok_or_else(|| short(LOG, bytes, LOG_RECORD))?;
    let (h, data) = RawLogRecord::read_from_prefix(bytes).map_err(|_| short(LOG, bytes, LOG_RECORD))?;
    let mut crc = crc32fast::Hasher::new();
    crc.update(&bytes[..LOG_RECORD_HEAD - 4]);
    crc.update(data);
    let (stored, computed) = (h.crc.get(), crc.finalize());
    if stored != computed {
        return Err(CodecError::Checksum { what: LOG, stored, computed });
    }
    Ok(LogRecord { seq: h.seq.get(), block: h.block.get(), data })
}

/// Decodes and checks a whole block map.
///
/// The file does not say how long its records are. Its length allows one age or the other, seldom both; then the age is
/// that under which more records pass their checksums.
///
/// # Errors
/// Anything but a whole map all of whose records pass; damage names the record.
pub fn block_map(bytes: &[u8]) -> Result<BlockMap, CodecError> {
    let body = map_body(bytes)?;
    let fits = |age: Age| body.len().is_multiple_of(age.record_bytes());
    let age = match (fits(Age::Unnumbered), fits(Age::Numbered)) {
        _ if body.is_empty() => return Ok(BlockMap { age: None, records: Vec::new() }),
        (true, false) => Age::Unnumbered,
        (false, true) => Age::Numbered,
        // Both lengths are possible (a multiple of 442 bytes): damage to a few records does not change the vote.
        (true, true) if sound(body, Age::Unnumbered) > sound(body, Age::Numbered) => Age::Unnumbered,
        (true, true) => Age::Numbered,
        (false, false) => {
            return Err(bad(
                MAP,
                format!("{} bytes are neither whole records of 34 bytes nor of 26: it is cut short", body.len()),
            ));
        }
    };
    Ok(BlockMap { age: Some(age), records: records(MAP, body, age, MAP_HEAD)? })
}

/// Decodes and checks the map of a snapshot with inherited layers: `own` records of its volume, then the layers.
///
/// # Errors
/// As [`block_map`].
pub fn layered_map(bytes: &[u8], own: u64) -> Result<(BlockMap, Vec<InheritedLayer>), CodecError> {
    let body = map_body(bytes)?;
    // Layers came after the longer records.
    let width = Age::Numbered.record_bytes();
    let own = usize::try_from(own).ok().and_then(|n| n.checked_mul(width)).filter(|n| *n <= body.len());
    let Some(own) = own else {
        return Err(bad(MAP, format!("its snapshot counts more records than {} bytes can hold", body.len())));
    };
    let records = records(MAP, &body[..own], Age::Numbered, MAP_HEAD)?;
    let mut rest = Rest { all: bytes, at: MAP_HEAD + own };
    if rest.take(4)? != b"FLAT" {
        return Err(CodecError::Magic(LAYERS));
    }
    let [version, count] = *rest.array::<2>()?;
    CodecError::known(LAYERS, "version", version.into(), 1)?;
    let mut layers = Vec::new();
    for _ in 0..count {
        let name = usize::from(u16::from_be_bytes(*rest.array()?));
        let volume =
            std::str::from_utf8(rest.take(name)?).map_err(|_| bad(LAYERS, "a volume's name is not UTF-8"))?.to_owned();
        rest.take(4 + 32)?;
        let blocks = u32::from_be_bytes(*rest.array()?) as usize;
        let begin = rest.at;
        let body = rest.take(blocks.checked_mul(width).ok_or_else(|| bad(LAYERS, "a layer is too long"))?)?;
        layers.push(InheritedLayer { volume, records: self::records(LAYERS, body, Age::Numbered, begin)? });
    }
    if rest.at != bytes.len() {
        return Err(bad(LAYERS, format!("{} bytes follow the last layer", bytes.len() - rest.at)));
    }
    let age = (own > 0).then_some(Age::Numbered);
    Ok((BlockMap { age, records }, layers))
}

/// What is still to be read of an object.
struct Rest<'a> {
    all: &'a [u8],
    at: usize,
}

impl<'a> Rest<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], CodecError> {
        let end = self.at.checked_add(n).filter(|e| *e <= self.all.len());
        let end = end.ok_or_else(|| short(LAYERS, self.all, self.at.saturating_add(n)))?;
        let out = &self.all[self.at..end];
        self.at = end;
        Ok(out)
    }

    fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], CodecError> {
        let got = self.take(N)?;
        got.as_array().ok_or_else(|| short(LAYERS, self.all, self.at))
    }
}

fn map_body(bytes: &[u8]) -> Result<&[u8], CodecError> {
    let (h, body) = RawMapHead::read_from_prefix(bytes).map_err(|_| short(MAP, bytes, MAP_HEAD))?;
    if h.magic != *b"VBWB" {
        return Err(CodecError::Magic(MAP));
    }
    CodecError::known(MAP, "version", h.version.get().into(), VERSION.into())?;
    Ok(body)
}

/// How many records pass their checksums.
fn sound(body: &[u8], age: Age) -> usize {
    body.chunks_exact(age.record_bytes()).filter(|r| map_record(r).is_ok()).count()
}

/// Decodes records back to back; `begin` is where they begin in the object, for messages.
fn records(what: &'static str, body: &[u8], age: Age, begin: usize) -> Result<Vec<MapRecord>, CodecError> {
    let width = age.record_bytes();
    let mut out = Vec::with_capacity(body.len() / width);
    for (n, raw) in body.chunks_exact(width).enumerate() {
        out.push(map_record(raw).map_err(|(stored, computed)| {
            let at = begin + n * width;
            bad(
                what,
                format!("record {n}, at byte {at}, fails its checksum (stored {stored:08x}, computed {computed:08x})"),
            )
        })?);
    }
    Ok(out)
}

/// A record of the age that its length says; else its checksums, stored and computed.
fn map_record(raw: &[u8]) -> Result<MapRecord, (u32, u32)> {
    let (head, crc) = raw.split_last_chunk::<4>().ok_or((0, 0))?;
    let (stored, computed) = (u32::from_be_bytes(*crc), crc32fast::hash(head));
    if stored != computed {
        return Err((stored, computed));
    }
    let (r, seq) = RawMapRecord::read_from_prefix(head).map_err(|_| (0, 0))?;
    let seq = seq.as_array().map_or(0, |s| u64::from_be_bytes(*s));
    Ok(MapRecord { block: r.block.get(), chunk: r.chunk.get(), offset: r.offset.get(), seq })
}

fn cipher(what: &'static str, got: [u8; 4], plain: [u8; 4], encrypted: [u8; 4]) -> Result<Cipher, CodecError> {
    match got {
        m if m == plain => Ok(Cipher::Plain),
        m if m == encrypted => Ok(Cipher::Encrypted),
        _ => Err(CodecError::Magic(what)),
    }
}

fn short(what: &'static str, bytes: &[u8], need: usize) -> CodecError {
    CodecError::Length { what, got: bytes.len() as u64, need: need as u64 }
}

fn bad(what: &'static str, why: impl Into<String>) -> CodecError {
    CodecError::invalid(what, why)
}

#[cfg(test)]
mod tests;
