//! What a qcow2 image says of itself, checked before the library that reads it believes a word.
//!
//! The library takes tables of any length and reads zeros past the end of the file: a header of a hundred bytes could
//! make it allocate 32 GiB, and a truncated image would be imported with zeros in the place of what is missing.
//!
//! The layout (big-endian; `docs/interop/qcow2` of QEMU):
//!
//! | offset | size | field |
//! |---:|---:|---|
//! | 0 | 4 | magic `QFI\xfb` |
//! | 4 | 4 | version: 2 or 3 |
//! | 8 | 8 | where the backing file's name is; 0: there is none |
//! | 16 | 4 | its length, at most 1023 |
//! | 20 | 4 | log2 of the cluster size: 9 to 21 |
//! | 24 | 8 | size of the disk in bytes |
//! | 32 | 4 | encryption: 0 for none |
//! | 36 | 4 | entries of the L1 table, 8 bytes each: one for each L2 table, which is a cluster of 8-byte entries |
//! | 40 | 8 | where the L1 table is |
//! | 72 | 8 | version 3: features that a reader has to know |
//! | 100 | 4 | version 3: length of the header; extensions follow (type, length, data padded to 8 bytes) |

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::units::MAX_VOLUME_BYTES;

/// The first bytes.
pub(in crate::image) const MAGIC: [u8; 4] = *b"QFI\xfb";

const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;
/// The largest cluster: header, extensions and the backing file's name are in the first one.
const MAX_CLUSTER: u64 = 2 << 20;
/// The longest L1 table, in bytes: QEMU's own limit.
const MAX_L1: u64 = 32 << 20;
/// The longest name of a backing file.
pub(super) const MAX_NAME: usize = 1023;
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Where an L1 entry says its L2 table is.
const L1_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Features that a reader has to know, by bit, with what to do about them.
const FEATURES: [(&str, &str); 5] = [
    ("was not closed properly", "repair it with `qemu-img check -r all`"),
    ("is marked as corrupt", "repair it with `qemu-img check -r all`"),
    ("keeps its data in another file", "convert it with `qemu-img convert -O qcow2`"),
    ("is compressed by another method than deflate", "convert it with `qemu-img convert -O qcow2`"),
    ("has extended L2 entries", "convert it with `qemu-img convert -O qcow2`"),
];

/// What matters of a header.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) size: u64,
    pub(super) backing: Option<BackingName>,
    cluster: u64,
    l1_at: u64,
    l1_entries: u64,
}

/// The image below, as this one names it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BackingName {
    pub(super) name: String,
    pub(super) format: Option<String>,
}

fn bad(what: &str, why: impl AsRef<str>) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the qcow2 image {what} is damaged: {}", why.as_ref()))
}

fn cannot(what: &str, why: &str, advice: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("the qcow2 image {what} {why}, which cannot be read here: {advice}"))
}

/// A field of `N` bytes, if it is there.
fn at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

/// Reads and checks the header and the L1 table.
///
/// # Errors
/// `Corrupt`, `Unsupported`; `Io`.
pub(super) fn check(file: &File, what: &str) -> Result<Head> {
    let reading = || format!("reading {what}");
    // A block device has no length in its metadata.
    let length = (&mut &*file).seek(SeekFrom::End(0)).context(reading)?;
    let mut first = vec![0; length.min(MAX_CLUSTER) as usize];
    file.read_exact_at(&mut first, 0).context(reading)?;
    let head = parse(&first, what)?;
    let (table, entries) = (head.l1_at, head.l1_entries);
    if table.checked_add(entries * 8).is_none_or(|end| end > length) {
        return Err(bad(
            what,
            format!("its L1 table, {entries} entries at byte {table}, is not inside its {length} bytes"),
        ));
    }
    let mut piece = vec![0; 64 << 10];
    let mut done = 0;
    while done < entries * 8 {
        let n = (entries * 8 - done).min(piece.len() as u64) as usize;
        file.read_exact_at(&mut piece[..n], table + done).context(reading)?;
        for (i, entry) in piece[..n].as_chunks().0.iter().enumerate() {
            let l2 = u64::from_be_bytes(*entry) & L1_OFFSET;
            if l2 != 0 && (!l2.is_multiple_of(head.cluster) || l2 + head.cluster > length) {
                let n = done / 8 + i as u64;
                let why = format!(
                    "L2 table {n}, at byte {l2}, is not a cluster inside its {length} bytes: it may be cut off"
                );
                return Err(bad(what, why));
            }
        }
        done += n as u64;
    }
    Ok(head)
}

/// The header in the first bytes of the file: the first cluster, or more.
fn parse(first: &[u8], what: &str) -> Result<Head> {
    let cut = || bad(what, format!("it ends inside its header, after {} bytes", first.len()));
    let word = |offset| at(first, offset).map(u32::from_be_bytes).ok_or_else(cut);
    let long = |offset| at(first, offset).map(u64::from_be_bytes).ok_or_else(cut);
    if first.len() < V2_BYTES {
        return Err(if first.starts_with(&MAGIC) { cut() } else { not_qcow2(what) });
    }
    if !first.starts_with(&MAGIC) {
        return Err(not_qcow2(what));
    }
    let version = word(4)?;
    if !(2..=3).contains(&version) {
        let why = format!("has version {version}");
        return Err(cannot(what, &why, "convert it with `qemu-img convert -O qcow2`"));
    }
    let bits = word(20)?;
    if !(9..=21).contains(&bits) {
        return Err(bad(what, format!("its clusters of 2^{bits} bytes are none")));
    }
    let cluster = 1_u64 << bits;
    // The table of the largest image with the smallest clusters would not fit `MAX_L1`, as with QEMU.
    let (size, l1_entries) = (long(24)?, u64::from(word(36)?));
    if size > MAX_VOLUME_BYTES {
        let why = format!("has {size} bytes, more than the largest volume's {MAX_VOLUME_BYTES} (64 TiB)");
        return Err(cannot(what, &why, "nothing can be done about it"));
    }
    if word(32)? != 0 {
        return Err(cannot(what, "is encrypted", "decrypt it with `qemu-img convert`"));
    }
    let covers = cluster * (cluster / 8);
    if l1_entries * 8 > MAX_L1 || l1_entries < size.div_ceil(covers) {
        return Err(bad(what, format!("an L1 table of {l1_entries} entries is not that of a disk of {size} bytes")));
    }
    let mut format = None;
    if version == 3 {
        let features = long(72)?;
        if features != 0 {
            let bit = features.trailing_zeros() as usize;
            let unknown =
                ("has a feature that is unknown here", "convert it with `qemu-img convert -O qcow2 -o compat=v3`");
            let (why, advice) = FEATURES.get(bit).unwrap_or(&unknown);
            return Err(cannot(what, why, advice));
        }
        let header = word(100)? as usize;
        if header < V3_BYTES || header as u64 > cluster {
            return Err(bad(what, format!("its header has {header} bytes")));
        }
        format =
            backing_format(first, header, cluster).ok_or_else(|| bad(what, "its header's extensions are cut off"))?;
    }
    let (name_at, name_bytes) = (long(8)?, word(16)? as usize);
    let backing = if name_at == 0 {
        None
    } else {
        let name = usize::try_from(name_at).ok().filter(|n| *n as u64 <= cluster && name_bytes <= MAX_NAME);
        let name = name.and_then(|n| first.get(n..n + name_bytes)).and_then(|n| std::str::from_utf8(n).ok());
        let name = name.filter(|n| !n.is_empty() && !n.contains('\0'));
        Some(BackingName {
            name: name.ok_or_else(|| bad(what, "the name of its backing file is none"))?.to_owned(),
            format,
        })
    };
    Ok(Head { size, backing, cluster, l1_at: long(40)?, l1_entries })
}

fn not_qcow2(what: &str) -> Error {
    Error::new(ErrorKind::Usage, format!("{what} is not a qcow2 image: leave out --format, or say raw"))
}

/// The format of the backing file, among the extensions behind the header. `None`: they are cut off.
fn backing_format(first: &[u8], header: usize, cluster: u64) -> Option<Option<String>> {
    let mut next = header;
    loop {
        if next as u64 + 8 > cluster {
            return None;
        }
        let kind = u32::from_be_bytes(at(first, next)?);
        let length = u32::from_be_bytes(at(first, next + 4)?) as usize;
        let data = first.get(next + 8..)?.get(..length)?;
        match kind {
            0 => return Some(None),
            BACKING_FORMAT => return Some(Some(String::from_utf8_lossy(data).into_owned())),
            _ => next += 8 + length.next_multiple_of(8),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk of 1 GiB in clusters of 64 KiB, without extensions.
    fn header() -> Vec<u8> {
        let mut h = vec![0; 65536];
        h[..4].copy_from_slice(&MAGIC);
        h[7] = 3;
        h[23] = 16;
        h[24..32].copy_from_slice(&(1_u64 << 30).to_be_bytes());
        h[39] = 2;
        h[40..48].copy_from_slice(&(3_u64 << 16).to_be_bytes());
        h[103] = 104;
        h
    }

    fn with(offset: usize, value: &[u8]) -> Result<Head> {
        let mut h = header();
        h[offset..offset + value.len()].copy_from_slice(value);
        parse(&h, "x.qcow2")
    }

    #[test]
    fn a_header_is_read() {
        let want = Head { size: 1 << 30, backing: None, cluster: 65536, l1_at: 3 << 16, l1_entries: 2 };
        assert_eq!(parse(&header(), "x").expect("good"), want);
        let mut h = header();
        h[104..112].copy_from_slice(&[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 3]);
        h[112..115].copy_from_slice(b"raw");
        h[14..20].copy_from_slice(&[2, 0, 0, 0, 0, 8]);
        h[512..520].copy_from_slice(b"base.img");
        let backing = parse(&h, "x").expect("good").backing.expect("one");
        assert_eq!((backing.name.as_str(), backing.format.as_deref()), ("base.img", Some("raw")));
    }

    #[test]
    fn what_it_says_is_not_believed() {
        for (offset, value, word) in [
            (4, &[0, 0, 0, 4][..], "version 4"),
            (20, &[0, 0, 0, 63], "2^63"),
            (24, &[0xff; 8], "64 TiB"),
            (32, &[0, 0, 0, 1], "encrypted"),
            (36, &[0xff; 4], "L1 table"),
            (36, &[0; 4], "L1 table"),
            (79, &[1], "check -r"),
            (79, &[4], "another file"),
            (79, &[8], "deflate"),
            (72, &[0x80], "unknown"),
            (100, &[0xff; 4], "header has"),
            (100, &[0; 4], "header has"),
            (104, &[1; 8], "extensions"),
            (8, &[0xff; 8], "backing"),
            (15, &[200, 0, 0, 0, 0], "backing"),
            (15, &[200, 0xff, 0xff, 0xff, 0xff], "backing"),
        ] {
            let e = with(offset, value).expect_err(word).to_string();
            assert!(e.contains(word) && e.contains("x.qcow2"), "{offset}: {e}");
        }
        for length in 0..V3_BYTES + 8 {
            parse(&header()[..length], "x").expect_err("cut");
        }
        assert_eq!(parse(&[0; 4096], "x").expect_err("zeros").kind(), ErrorKind::Usage);
    }
}
