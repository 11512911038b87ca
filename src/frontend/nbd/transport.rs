//! How bytes come and go: a socket, bare or under TLS. And the buffer in front of what parses them.

use std::future::Future;
use std::io;

use crate::disk::IoBuf;
use crate::lane::LaneSocket;

/// A client's stream of bytes. One task receives, one sends.
pub(super) trait Transport: 'static {
    /// What is there, at least a byte; 0 at the end. With `all`, until `buf` is full: less means the end.
    fn recv(&self, buf: IoBuf, all: bool) -> impl Future<Output = io::Result<usize>>;

    /// All of `bufs`; `moved` is called whenever some of it has gone.
    fn send(&self, bufs: Vec<IoBuf>, moved: &dyn Fn()) -> impl Future<Output = io::Result<()>>;

    /// Takes no more: who receives finds the end, behind what has come already.
    fn stop_reading(&self);

    /// Ends our direction as it should be: the peer finds the end behind what has been sent.
    fn finish(&self) -> impl Future<Output = io::Result<()>>;

    /// Ends both directions, also for who waits there.
    fn close(&self);
}

impl Transport for LaneSocket {
    async fn recv(&self, buf: IoBuf, all: bool) -> io::Result<usize> {
        Self::recv(self, buf, all).await
    }

    async fn send(&self, bufs: Vec<IoBuf>, moved: &dyn Fn()) -> io::Result<()> {
        Self::send(self, bufs, moved).await
    }

    fn stop_reading(&self) {
        Self::stop_reading(self);
    }

    async fn finish(&self) -> io::Result<()> {
        self.stop_writing();
        Ok(())
    }

    fn close(&self) {
        Self::close(self);
    }
}

/// What has come and is not yet parsed.
pub(super) struct Input {
    buf: IoBuf,
    start: usize,
    end: usize,
}

impl Input {
    /// Room for `len` bytes.
    pub(super) fn new(len: usize) -> Self {
        Self { buf: IoBuf::zeroed(len), start: 0, end: 0 }
    }

    /// The same bytes in a larger room.
    pub(super) fn grown(self, len: usize) -> Self {
        let larger = Self { end: self.bytes().len(), ..Self::new(len.max(self.bytes().len())) };
        larger.buf.copy_in(0, self.bytes());
        larger
    }

    /// What has come.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.buf.bytes()[self.start..self.end]
    }

    /// There is no room for more.
    pub(super) const fn is_full(&self) -> bool {
        self.end - self.start == self.buf.len()
    }

    /// So many have been parsed.
    pub(super) const fn consume(&mut self, n: usize) {
        self.start += n;
        if self.start >= self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Receives more; false at the end. There has to be room.
    pub(super) async fn fill(&mut self, from: &impl Transport) -> io::Result<bool> {
        if self.start > 0 {
            let (start, end) = (self.start, self.end);
            self.buf.bytes_mut().copy_within(start..end, 0);
            (self.start, self.end) = (0, end - start);
        }
        let n = from.recv(self.buf.slice(self.end..self.buf.len()), false).await?;
        self.end += n;
        Ok(n > 0)
    }

    /// Waits until `n` bytes are there, no more than there is room for.
    ///
    /// # Errors
    /// The transport's; `UnexpectedEof`.
    pub(super) async fn need(&mut self, n: usize, from: &impl Transport) -> io::Result<()> {
        while self.bytes().len() < n {
            if !self.fill(from).await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    /// Reads past `n` bytes.
    ///
    /// # Errors
    /// The transport's; `UnexpectedEof`.
    pub(super) async fn skip(&mut self, mut n: u64, from: &impl Transport) -> io::Result<()> {
        loop {
            let here = self.bytes().len().min(usize::try_from(n).unwrap_or(usize::MAX));
            self.consume(here);
            n -= here as u64;
            if n == 0 {
                return Ok(());
            }
            self.need(1, from).await?;
        }
    }
}
