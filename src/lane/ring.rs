//! The seam between a lane and its io_uring: a ring of its own, or one that belongs to a frontend's library.

use std::cell::RefCell;
use std::io;

use io_uring::IoUring;

/// One io_uring, reached by the thread that owns it.
pub trait Ring: 'static {
    /// Hands the ring to `f`. Not to be called from within `f`.
    fn with(&self, f: &mut dyn FnMut(&mut IoUring));
}

/// How the kernel delivers completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RingMode {
    /// COOP_TASKRUN: at the next transition to the kernel; needs Linux 5.19.
    #[default]
    Cooperative,
    /// SINGLE_ISSUER | DEFER_TASKRUN | COOP_TASKRUN: when the thread asks for them; needs Linux 6.1.
    Deferred,
}

impl RingMode {
    /// Makes a ring with `entries` places for submissions and four times as many for completions.
    ///
    /// # Errors
    /// What `io_uring_setup` says.
    pub fn build(self, entries: u32) -> io::Result<IoUring> {
        let mut builder = IoUring::builder();
        builder.setup_clamp().setup_cqsize(entries.saturating_mul(4)).setup_coop_taskrun();
        if self == Self::Deferred {
            builder.setup_taskrun_flag().setup_single_issuer().setup_defer_taskrun();
        }
        builder.build(entries)
    }
}

/// A ring of the lane's own.
pub struct OwnRing(RefCell<IoUring>);

impl OwnRing {
    /// Makes one with `entries` places for submissions. To be made on the thread that will use it.
    ///
    /// # Errors
    /// What `io_uring_setup` says.
    pub fn new(entries: u32, mode: RingMode) -> io::Result<Self> {
        Ok(Self(RefCell::new(mode.build(entries)?)))
    }

    /// The same in the best mode that the kernel has.
    ///
    /// # Errors
    /// What `io_uring_setup` says.
    pub fn best(entries: u32) -> io::Result<Self> {
        Self::new(entries, RingMode::Deferred).or_else(|_| Self::new(entries, RingMode::Cooperative))
    }
}

impl Ring for OwnRing {
    fn with(&self, f: &mut dyn FnMut(&mut IoUring)) {
        f(&mut self.0.borrow_mut());
    }
}
