//! Files written and read past the page cache.
//!
//! What went through it would throw out what is read, and cost as much as the write. Above all, its pages are memory that this process
//! would have to wait for: where nearly all of a machine's memory is dirty pages of the very device that waits for this read or write,
//! nobody would ever find them.
//!
//! Where the file system cannot do it, all goes through the cache.

use std::fs::File;
use std::io::{self, ErrorKind as IoKind, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use bytes::Bytes;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::disk::IoBuf;
use crate::disk::buf::{ALIGN, aligned};

/// A body is written in pieces of this size: a larger one only waits in the disk's queue, where the log's writes wait behind it.
const PIECE: usize = 512 << 10;

/// Writes all of a new file.
pub(super) fn write(file: &mut File, body: &[u8]) -> io::Result<()> {
    if set_direct(file, true).is_err() {
        return file.write_all(body);
    }
    match write_pieces(file, body) {
        // The file system takes the flag, but not this write: begun or not, it is made again from the start.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            set_direct(file, false)?;
            file.set_len(0)?;
            file.seek(SeekFrom::Start(0))?;
            file.write_all(body)
        }
        result => result,
    }
}

fn write_pieces(file: &mut File, body: &[u8]) -> io::Result<()> {
    let mut bounce = None;
    for piece in body.chunks(PIECE) {
        file.write_all(aligned(piece, &mut bounce))?;
    }
    if !body.len().is_multiple_of(ALIGN) {
        file.set_len(body.len() as u64)?;
    }
    Ok(())
}

/// Reads a part of a file.
///
/// # Errors
/// `UnexpectedEof` where the file ends before it.
pub(super) fn read(file: &File, range: Range<u64>) -> io::Result<Bytes> {
    let len = (range.end - range.start) as usize;
    let start = range.start / ALIGN as u64 * ALIGN as u64;
    let skip = (range.start - start) as usize;
    let mut buf = IoBuf::zeroed((skip + len).next_multiple_of(ALIGN));
    let direct = set_direct(file, true).is_ok();
    match fill(file, start, buf.bytes_mut(), skip + len) {
        Err(e) if direct && e.raw_os_error() == Some(libc::EINVAL) => {
            set_direct(file, false)?;
            fill(file, start, buf.bytes_mut(), skip + len)?;
        }
        result => result?,
    }
    Ok(Bytes::from_owner(buf.slice(skip..skip + len)))
}

/// Reads into `buf` until `wanted` bytes of it are there. Its other bytes may be read, too.
fn fill(file: &File, start: u64, buf: &mut [u8], wanted: usize) -> io::Result<()> {
    let mut have = 0;
    while have < wanted {
        match file.read_at(&mut buf[have..], start + have as u64) {
            Ok(0) => return Err(IoKind::UnexpectedEof.into()),
            Ok(n) => have += n,
            Err(e) if e.kind() == IoKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn set_direct(file: &File, direct: bool) -> io::Result<()> {
    let mut flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_DIRECT, direct);
    fcntl(file, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A body whose address is a multiple of [`ALIGN`], plus `off`.
    fn body_of(len: usize, off: usize) -> Bytes {
        let buf = IoBuf::zeroed(len + off).slice(off..len + off);
        let bytes: Vec<u8> = (0..len).map(|i| (i / 7) as u8).collect();
        buf.copy_in(0, &bytes);
        Bytes::from_owner(buf)
    }

    fn is_direct(file: &File) -> bool {
        OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL).expect("flags")).contains(OFlag::O_DIRECT)
    }

    #[test]
    fn what_is_written_is_read_however_it_lies() {
        // In memory and on the disk, which differ in what they can do past the page cache.
        for dir in [tempfile::tempdir_in("/dev/shm"), tempfile::tempdir()] {
            let dir = dir.expect("tempdir");
            let path = dir.path().join("f");
            for (len, off) in [(4 << 20, 0), (PIECE + 4096, 0), (4 << 20, 512), ((1 << 20) + 513, 0), (1, 0), (0, 0)] {
                let body = body_of(len, off);
                write(&mut File::create(&path).expect("create"), &body).expect("written");
                assert_eq!(std::fs::read(&path).expect("read"), body, "{len} bytes at an offset of {off}");
                for (from, to) in [(0, len), (len / 2, len), (len / 3, len / 2), (4096.min(len), 8192.min(len))] {
                    let got = read(&File::open(&path).expect("open"), from as u64..to as u64).expect("read");
                    assert_eq!(got, body[from..to], "{from} to {to} of {len}");
                }
                let e = read(&File::open(&path).expect("open"), 0..len as u64 + 1).expect_err("too long");
                assert_eq!(e.kind(), IoKind::UnexpectedEof);
            }
        }
    }

    #[test]
    fn nothing_goes_through_the_page_cache_where_that_can_be() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("f");
        for (len, off) in [(4 << 20, 0), (4 << 20, 512), (100, 0)] {
            let body = body_of(len, off);
            let mut file = File::create(&path).expect("create");
            write(&mut file, &body).expect("written");
            assert!(is_direct(&file), "{len} bytes at an offset of {off}");
            let file = File::open(&path).expect("open");
            assert_eq!(read(&file, 50..100).expect("read"), body[50..100]);
            assert!(is_direct(&file));
        }
    }
}
