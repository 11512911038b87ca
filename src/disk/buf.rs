//! Buffers that a kernel may fill or drain while this process does other things.
//!
//! This is one of the marked files that may use `unsafe`.
//!
//! Invariants:
//! - The memory behind an [`IoBuf`] is valid as long as any clone or slice of it lives: either it is
//!   counted (`owner`), or the maker of the view promised it ([`IoBuf::from_raw`]).
//! - Whoever submits an operation keeps a clone until the kernel has completed it.
//! - Nobody looks at the bytes of a range that an operation in flight may write, or writes a range that
//!   an operation in flight reads: a request owns its buffer from its arrival to its completion.

#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, mprotect, munmap};

/// Alignment of owned buffers: a page, enough for O_DIRECT on any device.
pub const ALIGN: usize = 4096;

/// Buffers from this size on are mappings of their own: they come zeroed, and go back to the system when they are dropped, whatever the
/// heap keeps.
const MAPPED: usize = 4 << 20;

/// The bytes themselves where they lie and end as O_DIRECT wants it; else a copy in `bounce`, which ends with a whole page. A bounce buffer
/// is as large as the first copy in it.
pub fn aligned<'a>(bytes: &'a [u8], bounce: &'a mut Option<IoBuf>) -> &'a [u8] {
    if bytes.len().is_multiple_of(ALIGN) && bytes.as_ptr().addr().is_multiple_of(ALIGN) {
        return bytes;
    }
    let len = bytes.len().next_multiple_of(ALIGN);
    let buf = bounce.get_or_insert_with(|| IoBuf::zeroed(len));
    buf.copy_in(0, bytes);
    &buf.bytes()[..len]
}

struct Mem {
    ptr: NonNull<u8>,
    layout: Layout,
}

impl Mem {
    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(1), ALIGN).expect("a buffer's size fits the address space")
    }

    /// `None`: the system has no memory to give.
    fn zeroed(len: usize) -> Option<Self> {
        let layout = Self::layout(len);
        if let Some(size) = NonZeroUsize::new(len).filter(|n| n.get() >= MAPPED) {
            return map(size).map(|ptr| Self { ptr, layout });
        }
        // SAFETY: the layout's size is not zero.
        let raw = unsafe { alloc_zeroed(layout) };
        NonNull::new(raw).map(|ptr| Self { ptr, layout })
    }
}

/// A mapping of its own. It is used whole, and a page fault for each 4 KiB costs more than filling them, so it asks for huge pages; before
/// it may be accessed, since in a process whose memory is locked it is there from then on. A kernel that has no such pages says so.
fn map(size: NonZeroUsize) -> Option<NonNull<u8>> {
    // SAFETY: a new anonymous mapping, at an address of the kernel's choice, overlaps nothing.
    let ptr = unsafe { mmap_anonymous(None, size, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE) }.ok()?;
    // SAFETY: the mapping is ours, and nobody has seen it yet.
    let given = unsafe {
        let _ = madvise(ptr, size.get(), MmapAdvise::MADV_HUGEPAGE);
        mprotect(ptr, size.get(), ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)
    };
    if given.is_err() {
        // SAFETY: as above, and nobody ever will.
        let _ = unsafe { munmap(ptr, size.get()) };
        return None;
    }
    Some(ptr.cast())
}

// SAFETY: `Mem` is a plain allocation without thread affinity.
unsafe impl Send for Mem {}
// SAFETY: shared access follows the module's third invariant.
unsafe impl Sync for Mem {}

impl Drop for Mem {
    fn drop(&mut self) {
        if self.layout.size() >= MAPPED {
            // SAFETY: `ptr` is a mapping of that size (`zeroed`), unmapped once, which nobody uses any more.
            let gone = unsafe { munmap(self.ptr.cast(), self.layout.size()) };
            debug_assert!(gone.is_ok(), "a mapping of ours can be unmapped: {gone:?}");
            return;
        }
        // SAFETY: `ptr` came from `alloc_zeroed` with this very layout and is freed once.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) }
    }
}

/// A view of memory for I/O: cheap to clone and to slice.
#[derive(Clone)]
pub struct IoBuf {
    ptr: NonNull<u8>,
    len: usize,
    owner: Option<Arc<Mem>>,
}

// SAFETY: the view carries no thread affinity; the memory's lifetime is counted or promised.
unsafe impl Send for IoBuf {}
// SAFETY: shared access follows the module's third invariant.
unsafe impl Sync for IoBuf {}

impl IoBuf {
    /// A zeroed, page-aligned buffer of `len` bytes (at least one).
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        Self::try_zeroed(len).unwrap_or_else(|| handle_alloc_error(Mem::layout(len)))
    }

    /// The same, of which one can do without; `None` when the system has no memory to give.
    #[must_use]
    pub fn try_zeroed(len: usize) -> Option<Self> {
        let mem = Mem::zeroed(len)?;
        Some(Self { ptr: mem.ptr, len, owner: Some(Arc::new(mem)) })
    }

    /// A view of memory that somebody else keeps alive.
    ///
    /// # Safety
    /// `ptr .. ptr + len` stays valid for reads and writes until every clone and slice of the view is
    /// gone, and nobody but the holders of the view touches it meanwhile.
    #[must_use]
    pub const unsafe fn from_raw(ptr: NonNull<u8>, len: usize) -> Self {
        Self { ptr, len, owner: None }
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether other clones or slices of a counted buffer are alive.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.holders() > 1
    }

    /// How many clones and slices of a counted buffer are alive, this one included.
    #[must_use]
    pub fn holders(&self) -> usize {
        self.owner.as_ref().map_or(0, Arc::strong_count)
    }

    /// The address, for the kernel.
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Whether address and length are multiples of `align`.
    #[must_use]
    pub fn is_aligned(&self, align: usize) -> bool {
        (self.ptr.as_ptr() as usize).is_multiple_of(align) && self.len.is_multiple_of(align)
    }

    /// A part of the buffer.
    ///
    /// # Panics
    /// When the range lies outside.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "slice {range:?} of a buffer of {} bytes", self.len);
        // SAFETY: the offset lies inside the same allocation, as just checked.
        let ptr = unsafe { self.ptr.add(range.start) };
        Self { ptr, len: range.end - range.start, owner: self.owner.clone() }
    }

    /// The bytes. Not to be held over an operation that may write them (third invariant).
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: valid and initialised for `len` bytes (first invariant); no writer (third).
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }

    /// Some of the bytes; others may be written meanwhile.
    ///
    /// # Panics
    /// When the range lies outside.
    #[must_use]
    pub fn bytes_in(&self, range: Range<usize>) -> &[u8] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of a buffer of {} bytes", self.len);
        // SAFETY: valid and initialised (first invariant), as just checked; no writer of these (third).
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr().add(range.start), range.end - range.start) }
    }

    /// The bytes, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: valid for `len` bytes (first invariant); the request that holds the view owns them (third).
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }

    /// Copies `src` to `at`.
    ///
    /// # Panics
    /// When it does not fit.
    pub fn copy_in(&self, at: usize, src: &[u8]) {
        assert!(at.checked_add(src.len()).is_some_and(|end| end <= self.len), "copy past the end of a buffer");
        // SAFETY: the range lies inside (just checked); a `&[u8]` of ours does not overlap a range that its
        // holder changes (third invariant).
        unsafe { std::ptr::copy_nonoverlapping(src.as_ptr(), self.ptr.as_ptr().add(at), src.len()) }
    }

    /// Zeroes a range.
    ///
    /// # Panics
    /// When it lies outside.
    pub fn zero(&self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.len, "zeroing past the end of a buffer");
        // SAFETY: the range lies inside, as just checked.
        unsafe { std::ptr::write_bytes(self.ptr.as_ptr().add(range.start), 0, range.end - range.start) }
    }
}

impl AsRef<[u8]> for IoBuf {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

impl std::fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoBuf({:p}, {} bytes)", self.ptr, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_ones_are_like_small_ones() {
        for len in [MAPPED - 1, MAPPED, MAPPED + 4097] {
            let b = IoBuf::zeroed(len);
            assert!(b.len() == len && b.slice(0..4096).is_aligned(4096) && b.bytes().iter().all(|b| *b == 0));
            let s = b.slice(len - 3..len);
            b.copy_in(len - 3, b"end");
            drop(b);
            assert_eq!(s.bytes(), b"end");
        }
    }

    #[test]
    fn slices_keep_the_memory_alive() {
        let s = {
            let b = IoBuf::zeroed(8192);
            assert!(b.is_aligned(4096));
            b.copy_in(4096, &[7; 512]);
            b.slice(4096..4608)
        };
        assert_eq!(s.bytes(), [7; 512]);
    }

    #[test]
    #[should_panic(expected = "slice")]
    fn a_slice_outside_is_refused() {
        let _ = IoBuf::zeroed(512).slice(0..513);
    }
}
