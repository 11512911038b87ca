//! Memory for chunks on their way to the store, used again.
//!
//! Fresh memory has to be found, zeroed and mapped by the kernel a page at a time, which costs more than to pack into it.
//!
//! Invariant: a buffer is free, or in one body: it comes back when the last of the body's holders has gone, on
//! whatever thread that is; one that a read may still be filling does not. A body from the pool has whatever an earlier one left in it.

use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::header::{HEADER_ROOM, MAX_BLOCKS};
use crate::disk::IoBuf;
use crate::units::BLOCK;

/// The largest chunk.
const FULL: usize = HEADER_ROOM + MAX_BLOCKS * BLOCK;
/// Smaller bodies are made for the occasion.
const WORTH_KEEPING: usize = FULL / 2;
/// Free buffers that are kept unless somebody says otherwise: those of a large group.
const KEPT: usize = 16;

/// A pool of chunk-sized buffers; clones share it.
#[derive(Debug, Clone)]
pub struct Bodies {
    free: Arc<Mutex<Vec<IoBuf>>>,
    kept: usize,
    /// So many stay when the pool is cleared.
    reserved: usize,
}

impl Default for Bodies {
    fn default() -> Self {
        Self::keeping(KEPT)
    }
}

impl Bodies {
    /// A pool that keeps so many free buffers.
    #[must_use]
    pub fn keeping(kept: usize) -> Self {
        Self { free: Arc::default(), kept, reserved: 0 }
    }

    /// Has `reserved` buffers from now on, and keeps them.
    pub fn reserve(&mut self, reserved: usize) {
        (self.reserved, self.kept) = (reserved, self.kept.max(reserved));
        self.free().resize_with(reserved, || IoBuf::zeroed(FULL));
    }

    fn free(&self) -> MutexGuard<'_, Vec<IoBuf>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Room for a chunk of `len` bytes, which are to be filled, all of them.
    #[must_use]
    pub fn take(&self, len: usize) -> Body {
        let keep = (WORTH_KEEPING..=FULL).contains(&len);
        let buf = if keep { self.free().pop().unwrap_or_else(|| IoBuf::zeroed(FULL)) } else { IoBuf::zeroed(len) };
        if cfg!(debug_assertions) {
            // Who forgets to fill a byte is found by any test that compares.
            buf.slice(0..len).bytes_mut().fill(0xdb);
        }
        Body { buf: buf.slice(0..len), home: keep.then(|| (buf, self.clone())) }
    }

    /// Gives what is free back to the system, but for what is reserved.
    pub fn clear(&self) {
        self.free().truncate(self.reserved);
    }
}

/// A chunk in the making.
#[derive(Debug)]
pub struct Body {
    /// What the chunk has of its buffer.
    pub buf: IoBuf,
    home: Option<(IoBuf, Bodies)>,
}

impl Body {
    /// The chunk as it goes to the store.
    #[must_use]
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Body {
    fn as_ref(&self) -> &[u8] {
        self.buf.bytes()
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        if let Some((buf, pool)) = self.home.take() {
            // Both of ours; any other is that of a read that nobody waited for.
            if buf.holders() > 2 {
                return;
            }
            // Who had one has done with the bytes.
            fence(Ordering::Acquire);
            let mut free = pool.free();
            if free.len() < pool.kept {
                free.push(buf);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_when_its_last_holder_has_gone() {
        let pool = Bodies::default();
        let body = pool.take(FULL);
        let at = body.buf.as_ptr();
        body.buf.copy_in(0, &[7; 4096]);
        let whole = body.freeze();
        let part = whole.slice(4000..4096);
        drop(whole);
        assert!(pool.free().is_empty() && part.iter().all(|b| *b == 7));
        std::thread::spawn(move || drop(part)).join().expect("joined");
        assert_eq!(pool.take(FULL).buf.as_ptr(), at, "the same again");
    }

    #[test]
    fn what_is_still_being_filled_is_not_used_again() {
        let pool = Bodies::default();
        let body = pool.take(FULL);
        let filled = body.buf.slice(4096..8192);
        drop(body);
        assert!(pool.free().is_empty() && filled.len() == 4096);
    }

    #[test]
    fn what_is_kept_is_bounded_and_can_be_given_back() {
        let pool = Bodies::default();
        drop((0..KEPT + 3).map(|_| pool.take(FULL)).collect::<Vec<_>>());
        assert_eq!(pool.free().len(), KEPT);
        drop(pool.take(4096));
        assert_eq!(pool.free().len(), KEPT, "small ones are not kept");
        pool.clear();
        assert!(pool.free().is_empty());
        let mut pool = pool;
        pool.reserve(2);
        drop((0..5).map(|_| pool.take(FULL)).collect::<Vec<_>>());
        pool.clear();
        assert_eq!(pool.free().len(), 2);
    }
}
