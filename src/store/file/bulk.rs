//! Files read through the page cache, into memory that is used again: for a process that reads much and serves no device, which the system
//! may make wait for memory. What other programs have read lately is not read from the disk once more.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::disk::IoBuf;

/// Reads from so many bytes on use memory again; others have their own.
const SMALL: usize = 64 << 10;
/// The size of a buffer that is used again; larger reads have their own.
const BUFFER: usize = 1 << 20;
/// Buffers that are kept.
const KEPT: usize = 96;

/// See the module's page.
#[derive(Debug, Clone, Default)]
pub(super) struct Bulk(Arc<Mutex<Vec<IoBuf>>>);

/// A buffer that goes back when nobody reads it any more.
struct Lent {
    buf: IoBuf,
    len: usize,
    home: Bulk,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buf.bytes()[..self.len]
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut free = self.home.free();
        if self.buf.len() == BUFFER && free.len() < KEPT {
            free.push(self.buf.clone());
        }
    }
}

impl Bulk {
    fn free(&self) -> MutexGuard<'_, Vec<IoBuf>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a part of a file.
    ///
    /// # Errors
    /// `UnexpectedEof` where the file ends before it.
    pub(super) fn read(&self, file: &File, range: Range<u64>) -> io::Result<Bytes> {
        let len = (range.end - range.start) as usize;
        let size = if (SMALL..=BUFFER).contains(&len) { BUFFER } else { len };
        let kept = if size == BUFFER { self.free().pop() } else { None };
        let mut lent = Lent { buf: kept.unwrap_or_else(|| IoBuf::zeroed(size)), len, home: self.clone() };
        file.read_exact_at(&mut lent.buf.bytes_mut()[..len], range.start)?;
        Ok(Bytes::from_owner(lent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_is_what_is_there_while_anybody_reads_it() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("f");
        let all: Vec<u8> = (0..3 << 20).map(|i: u32| (i >> 9) as u8 ^ i as u8).collect();
        std::fs::write(&path, &all).expect("written");
        let file = File::open(&path).expect("open");
        let bulk = Bulk::default();
        let read = |from: usize, len: usize| bulk.read(&file, from as u64..(from + len) as u64).expect("read");
        let held: Vec<(usize, Bytes)> = (0..20).map(|i| (i * 1000, read(i * 1000, 100_000 + i))).collect();
        for (from, bytes) in &held {
            assert_eq!(bytes[..], all[*from..from + bytes.len()]);
        }
        drop(held);
        assert_eq!(bulk.free().len(), 20);
        for (from, len) in [(0, 1 << 20), (1, (1 << 20) + 1), (7, 0), (5, 10), (1 << 20, 2 << 20), (77, SMALL)] {
            assert_eq!(read(from, len)[..], all[from..from + len], "{len} bytes at {from}");
        }
        assert_eq!(bulk.free().len(), 20, "those of other sizes are not kept");
        let e = bulk.read(&file, 3 << 20..(3 << 20) + 1).expect_err("too long");
        assert_eq!(e.kind(), io::ErrorKind::UnexpectedEof);
        assert!((0..KEPT + 50).map(|_| read(0, SMALL)).collect::<Vec<_>>().iter().all(|b| b[..] == all[..SMALL]));
        assert_eq!(bulk.free().len(), KEPT);
    }
}
