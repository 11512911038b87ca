//! The order in which a boot first read its blocks, in pages of 64 KiB of the volume: recorded by whoever boots, kept beside the snapshot, and
//! fetched in that order by those that boot from it later.
//!
//! ```text
//!  at  bytes  field
//!   0      8  "vb-boot\0"
//!   8      2  version, 1
//!  10      2  flags, 0
//!  12      4  pages that follow
//!  16     16  the volume's uuid
//!  32     16  the snapshot's uuid
//!  48      4  CRC-32 over the whole with this field as zeros
//!  52      …  the pages' numbers, four bytes each
//! ```
//!
//! It is advice: without it, or with one that is damaged, a boot takes longer.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::checksum::crc_around;
use crate::codec::CodecError;

/// Sectors of a page of the volume.
pub const PAGE_SECTORS: u64 = 128;
/// The most pages of a trace: 2 GiB.
pub const MAX_PAGES: usize = 32 << 10;
/// A boot is over after this time.
const BOOT: Duration = Duration::from_secs(300);

const WHAT: &str = "a boot trace";
const MAGIC: [u8; 8] = *b"vb-boot\0";
const VERSION: u16 = 1;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHead {
    magic: [u8; 8],
    version: U16,
    flags: U16,
    pages: U32,
    volume: [u8; 16],
    snapshot: [u8; 16],
    crc: U32,
}

const HEAD: usize = size_of::<RawHead>();
const CRC_AT: usize = std::mem::offset_of!(RawHead, crc);
const _: () = assert!(HEAD == 52 && CRC_AT == 48);

/// Bytes before the pages.
pub const HEAD_BYTES: u64 = HEAD as u64;

/// Writes a trace of a boot from a snapshot.
#[must_use]
pub fn encode(volume: Uuid, snapshot: Uuid, pages: &[u32]) -> Vec<u8> {
    let pages = &pages[..pages.len().min(MAX_PAGES)];
    let head = RawHead {
        magic: MAGIC,
        version: VERSION.into(),
        flags: 0.into(),
        pages: U32::new(pages.len() as u32),
        volume: volume.into_bytes(),
        snapshot: snapshot.into_bytes(),
        crc: 0.into(),
    };
    let mut out = head.as_bytes().to_vec();
    out.extend(pages.iter().flat_map(|p| p.to_le_bytes()));
    let crc = crc_around(&[], &out, CRC_AT);
    out[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    out
}

fn short(got: usize, need: usize) -> CodecError {
    CodecError::Length { what: WHAT, got: got as u64, need: need as u64 }
}

/// The head at the beginning of these bytes, and what follows it.
fn head(bytes: &[u8]) -> Result<(&RawHead, &[u8]), CodecError> {
    let (head, rest) = RawHead::ref_from_prefix(bytes).map_err(|_| short(bytes.len(), HEAD))?;
    if head.magic != MAGIC {
        return Err(CodecError::Magic(WHAT));
    }
    CodecError::known(WHAT, "version", head.version.get().into(), VERSION.into())?;
    CodecError::known(WHAT, "flags", head.flags.get().into(), 0)?;
    if head.pages.get() as usize > MAX_PAGES {
        return Err(CodecError::invalid(WHAT, format!("it has {} pages", head.pages)));
    }
    Ok((head, rest))
}

/// How long a trace that begins so is, in bytes.
///
/// # Errors
/// What is wrong with its head.
pub fn whole_bytes(bytes: &[u8]) -> Result<u64, CodecError> {
    Ok(HEAD_BYTES + 4 * u64::from(head(bytes)?.0.pages.get()))
}

/// Reads a trace of a boot from this snapshot.
///
/// # Errors
/// What is wrong with the bytes.
pub fn decode(bytes: &[u8], volume: Uuid, snapshot: Uuid) -> Result<Vec<u32>, CodecError> {
    let (head, rest) = head(bytes)?;
    let count = head.pages.get() as usize;
    if rest.len() != 4 * count {
        return Err(short(bytes.len(), HEAD + 4 * count));
    }
    let (stored, computed) = (head.crc.get(), crc_around(&[], bytes, CRC_AT));
    if stored != computed {
        return Err(CodecError::Checksum { what: WHAT, stored, computed });
    }
    for (field, got, want) in [("the volume", head.volume, volume), ("the snapshot", head.snapshot, snapshot)] {
        let got = Uuid::from_bytes(got);
        if got != want {
            return Err(CodecError::Mismatch { what: WHAT, field, got: got.to_string(), want: want.to_string() });
        }
    }
    Ok(rest.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

/// The key of a snapshot's trace.
#[must_use]
pub fn trace_key(volume: &str, snapshot: Uuid) -> String {
    format!("{volume}/traces/{snapshot}.trace")
}

#[derive(Debug, Default)]
struct Seen {
    order: Vec<u32>,
    there: HashSet<u32>,
    until: Option<Duration>,
}

/// What is read first, by all lanes of an attachment, until the boot counts as over.
#[derive(Debug)]
pub struct Recorder {
    on: AtomicBool,
    seen: Mutex<Seen>,
}

impl Default for Recorder {
    fn default() -> Self {
        Self { on: AtomicBool::new(true), seen: Mutex::default() }
    }
}

impl Recorder {
    /// Whether it still listens: looked at before a time is asked for.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Sectors are read `now`. The first such read begins the boot.
    pub fn read(&self, sectors: Range<u64>, now: Duration) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let until = *seen.until.get_or_insert(now + BOOT);
        for page in sectors.start / PAGE_SECTORS..sectors.end.div_ceil(PAGE_SECTORS) {
            if now >= until || seen.order.len() >= MAX_PAGES {
                self.on.store(false, Ordering::Relaxed);
                seen.there = HashSet::new();
                return;
            }
            // A volume has at most 2^30 pages.
            let page = page as u32;
            if seen.there.insert(page) {
                seen.order.push(page);
            }
        }
    }

    /// The pages so far, in the order in which they were read first.
    #[must_use]
    pub fn pages(&self) -> Vec<u32> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).order.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOLUME: Uuid = Uuid::from_u128(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10);
    const SNAPSHOT: Uuid = Uuid::from_u128(0xf0);

    #[test]
    fn golden() {
        let bytes = encode(VOLUME, SNAPSHOT, &[7, 0x0102_0304]);
        assert_eq!(bytes.len(), 60);
        assert_eq!(bytes[..16], *b"vb-boot\0\x01\0\0\0\x02\0\0\0");
        assert_eq!(bytes[16..32], VOLUME.into_bytes());
        assert_eq!(bytes[32..48], SNAPSHOT.into_bytes());
        assert_eq!(bytes[52..], [7, 0, 0, 0, 4, 3, 2, 1]);
        let crc: String = bytes[48..52].iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(crc, "2532a3b4");
        assert_eq!(decode(&bytes, VOLUME, SNAPSHOT), Ok(vec![7, 0x0102_0304]));
    }

    #[test]
    fn what_is_wrong_is_refused() {
        let good = encode(VOLUME, SNAPSHOT, &[1, 2, 3]);
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            assert!(decode(&bad, VOLUME, SNAPSHOT).is_err(), "byte {at}");
            assert!(decode(&good[..at], VOLUME, SNAPSHOT).is_err(), "{at} bytes");
        }
        assert!(decode(&[&good[..], &[0]].concat(), VOLUME, SNAPSHOT).is_err());
        let other = decode(&good, VOLUME, VOLUME).expect_err("another snapshot's");
        assert!(matches!(other, CodecError::Mismatch { field: "the snapshot", .. }), "{other}");
    }

    #[test]
    fn each_page_counts_once_and_a_boot_comes_to_an_end() {
        let r = Recorder::default();
        let at = Duration::from_secs;
        r.read(1000..1008, at(50));
        r.read(0..1, at(51));
        r.read(900..1300, at(52));
        r.read(1001..1002, at(53));
        assert_eq!(r.pages(), [7, 0, 8, 9, 10]);
        assert!(r.is_on());
        r.read(5000..5008, at(50) + BOOT);
        assert!(!r.is_on());
        assert_eq!(r.pages().len(), 5);

        let r = Recorder::default();
        r.read(0..PAGE_SECTORS * (MAX_PAGES as u64 + 5), at(1));
        assert!(!r.is_on());
        assert_eq!(r.pages().len(), MAX_PAGES);
        let whole = encode(VOLUME, SNAPSHOT, &r.pages());
        assert_eq!(whole_bytes(&whole[..HEAD]), Ok(whole.len() as u64));
    }
}
