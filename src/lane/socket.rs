//! A connected stream socket over a lane's ring.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;

use nix::sys::socket::{Shutdown, shutdown};

use super::Lane;
use super::disk::{MAX_IOVECS, is_passing};
use super::ops::Request;
use crate::disk::{IoBuf, skip};

/// One socket; clones are the same one, and it is closed with the last of them. It has to be a blocking one: the ring waits, and
/// would answer a non-blocking one's EAGAIN.
#[derive(Clone)]
pub struct LaneSocket {
    lane: Lane,
    fd: Rc<OwnedFd>,
}

impl LaneSocket {
    /// `fd` through the ring of `lane`.
    #[must_use]
    pub fn new(lane: &Lane, fd: OwnedFd) -> Self {
        Self { lane: lane.clone(), fd: Rc::new(fd) }
    }

    fn fd(&self) -> Rc<dyn AsFd> {
        Rc::clone(&self.fd) as Rc<dyn AsFd>
    }

    /// What is there, at least a byte; 0 at the end. With `all`, until `buf` is full: less means the end or an error to come. Dropped
    /// half way, it is cancelled, and bytes may be lost.
    ///
    /// # Errors
    /// The socket's.
    pub async fn recv(&self, buf: IoBuf, all: bool) -> io::Result<usize> {
        loop {
            let done = self.lane.submit(Request::Recv { fd: self.fd(), buf: buf.clone(), all }).await;
            match usize::try_from(done.result) {
                Ok(n) => return Ok(n),
                Err(_) if is_passing(done.result) => {}
                Err(_) => return Err(io::Error::from_raw_os_error(-done.result)),
            }
        }
    }

    /// All of `bufs`. `moved` is called whenever some of it has gone.
    ///
    /// # Errors
    /// The socket's.
    pub async fn send(&self, mut bufs: Vec<IoBuf>, moved: impl Fn()) -> io::Result<()> {
        while !bufs.is_empty() {
            let rest = if bufs.len() > MAX_IOVECS { bufs.split_off(MAX_IOVECS) } else { Vec::new() };
            let mut left: usize = bufs.iter().map(IoBuf::len).sum();
            while left > 0 {
                let done = self.lane.submit(Request::Send { fd: self.fd(), bufs }).await;
                bufs = done.bufs;
                match usize::try_from(done.result) {
                    Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero)),
                    Ok(n) => {
                        moved();
                        left -= n;
                        if left > 0 {
                            bufs = skip(&bufs, n);
                        }
                    }
                    Err(_) if is_passing(done.result) => {}
                    Err(_) => return Err(io::Error::from_raw_os_error(-done.result)),
                }
            }
            bufs = rest;
        }
        Ok(())
    }

    /// Nothing more is received: who waits for it finds the end, once what has come already has been taken.
    pub fn stop_reading(&self) {
        self.shut(Shutdown::Read);
    }

    /// The peer finds the end behind what has been sent.
    pub fn stop_writing(&self) {
        self.shut(Shutdown::Write);
    }

    /// Ends both directions: receives and sends under way end, and the peer hears of it.
    pub fn close(&self) {
        self.shut(Shutdown::Both);
    }

    fn shut(&self, how: Shutdown) {
        // It fails when the peer has hung up already.
        let _ = shutdown(self.fd.as_raw_fd(), how);
    }
}
