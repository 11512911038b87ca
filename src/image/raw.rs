//! Raw images: files, block devices and pipes.

use std::fs::File;
use std::io::{ErrorKind as IoKind, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::mpsc as std_mpsc;

use async_trait::async_trait;
use nix::errno::Errno;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::unistd::{Whence, lseek};
use tokio::sync::mpsc;

use super::ImageSource;
use super::qcow2::MAGIC;
use crate::error::{Context, Error, ErrorKind, Result};

/// How far ahead of the reader the kernel is asked to read, in bytes.
const AHEAD: u64 = 16 << 20;
/// What a pipe is read in, in bytes: whole blocks.
const PIECE: usize = 1 << 20;
/// Pieces of a pipe that wait for the importer.
const PIECES: usize = 8;

/// A file or a block device. Its size is what it was when it was opened.
#[derive(Debug)]
pub struct RawImage {
    file: File,
    what: String,
    size: u64,
    /// Whether it can say where its holes are.
    knows_holes: bool,
    asked_for: u64,
}

impl RawImage {
    /// An image in `file`; `what` is its name for messages.
    ///
    /// # Errors
    /// When its size cannot be found out.
    pub fn new(mut file: File, what: &str) -> Result<Self> {
        // A block device has no length in its metadata.
        let size = file.seek(SeekFrom::End(0)).context(|| format!("finding the end of {what}"))?;
        // Advice: without it the import is slower, no more.
        let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_SEQUENTIAL);
        Ok(Self { file, what: what.to_owned(), size, knows_holes: true, asked_for: 0 })
    }

    fn seek_to(&mut self, from: u64, whence: Whence) -> Result<Option<u64>> {
        match lseek(&self.file, from.cast_signed(), whence) {
            Ok(at) => Ok(u64::try_from(at).ok()),
            // No data from there on.
            Err(Errno::ENXIO) => Ok(None),
            Err(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOTTY) => {
                self.knows_holes = false;
                Ok(Some(from))
            }
            Err(e) => Err(Error::io(format!("looking for holes in {} at byte {from}", self.what), e.into())),
        }
    }
}

#[async_trait(?Send)]
impl ImageSource for RawImage {
    fn size_bytes(&self) -> Option<u64> {
        Some(self.size)
    }

    async fn next_data(&mut self, from: u64) -> Result<Option<(u64, u64)>> {
        if from >= self.size {
            return Ok(None);
        }
        if self.knows_holes {
            let Some(start) = self.seek_to(from, Whence::SeekData)?.filter(|s| *s < self.size) else { return Ok(None) };
            if self.knows_holes {
                let end = self.seek_to(start, Whence::SeekHole)?.unwrap_or(self.size).min(self.size);
                if end > start {
                    return Ok(Some((start, end)));
                }
            }
        }
        Ok(Some((from, self.size)))
    }

    async fn read(&mut self, at: u64, buf: &mut [u8]) -> Result<()> {
        let inside = usize::try_from(self.size.saturating_sub(at)).unwrap_or(usize::MAX).min(buf.len());
        let end = at + inside as u64;
        if end + AHEAD / 2 > self.asked_for && self.asked_for < self.size {
            let from = self.asked_for.max(at);
            let _ = posix_fadvise(
                &self.file,
                from.cast_signed(),
                AHEAD.cast_signed(),
                PosixFadviseAdvice::POSIX_FADV_WILLNEED,
            );
            self.asked_for = from + AHEAD;
        }
        self.file.read_exact_at(&mut buf[..inside], at).map_err(|e| {
            let what = format!("reading bytes {at}..{end} of {}", self.what);
            if e.kind() == IoKind::UnexpectedEof {
                let why = format!("{what}: it has become shorter since it was opened; nobody may change it meanwhile");
                return Error::new(ErrorKind::Corrupt, why);
            }
            Error::io(what, e)
        })?;
        buf[inside..].fill(0);
        Ok(())
    }
}

/// What a pipe's thread sends: a whole piece, a shorter one before the end, nothing at the end.
type FromPipe = std::io::Result<Vec<u8>>;

/// A pipe, read ahead by a thread of its own. Its size is known at its end.
#[derive(Debug)]
pub struct Pipe {
    what: String,
    come: mpsc::Receiver<FromPipe>,
    used: std_mpsc::Sender<Vec<u8>>,
    piece: Vec<u8>,
    /// Where the piece begins in the image.
    at: u64,
    ended: bool,
    /// Whether the user said that it is raw, whatever it looks like.
    surely_raw: bool,
}

impl Pipe {
    /// An image that comes `from` there; `what` is its name for messages. Unless it is `surely_raw`, one that begins as a qcow2 image
    /// does is refused.
    ///
    /// # Errors
    /// When the system has no thread to give.
    pub fn new(from: Box<dyn Read + Send>, what: &str, surely_raw: bool) -> Result<Self> {
        let (send, come) = mpsc::channel(PIECES);
        let (used, free) = std_mpsc::channel();
        // Not joined: it may wait for its pipe for ever, and ends with the process.
        std::thread::Builder::new()
            .name("image-pipe".into())
            .spawn(move || read_pipe(from, &send, &free))
            .context(|| "starting the thread that reads the image")?;
        let what = what.to_owned();
        Ok(Self { what, come, used, piece: Vec::new(), at: 0, ended: false, surely_raw })
    }

    fn end(&self) -> u64 {
        self.at + self.piece.len() as u64
    }

    async fn next_piece(&mut self) -> Result<()> {
        let next = match self.come.recv().await {
            Some(piece) => piece.context(|| format!("reading {} at byte {}", self.what, self.end()))?,
            None => {
                return Err(Error::new(ErrorKind::Internal, format!("the thread that reads {} has ended", self.what)));
            }
        };
        if self.at == 0 && self.piece.is_empty() && next.starts_with(&MAGIC) && !self.surely_raw {
            let why = format!(
                "{} begins as a qcow2 image does, and a pipe has to be raw: write it to a file, or add --format raw to \
                 import it byte for byte",
                self.what
            );
            return Err(Error::new(ErrorKind::Usage, why));
        }
        self.at = self.end();
        self.ended = next.len() < PIECE;
        // A thread that has ended wants none back.
        let _ = self.used.send(std::mem::replace(&mut self.piece, next));
        Ok(())
    }
}

fn read_pipe(mut from: Box<dyn Read + Send>, send: &mpsc::Sender<FromPipe>, free: &std_mpsc::Receiver<Vec<u8>>) {
    loop {
        let mut piece = free.try_recv().unwrap_or_default();
        piece.clear();
        piece.reserve_exact(PIECE);
        let read = (&mut from).take(PIECE as u64).read_to_end(&mut piece);
        let last = piece.len() < PIECE;
        if send.blocking_send(read.map(|_| piece)).is_err() || last {
            return;
        }
    }
}

#[async_trait(?Send)]
impl ImageSource for Pipe {
    fn size_bytes(&self) -> Option<u64> {
        self.ended.then(|| self.end())
    }

    async fn next_data(&mut self, from: u64) -> Result<Option<(u64, u64)>> {
        while from >= self.end() {
            if self.ended {
                return Ok(None);
            }
            self.next_piece().await?;
        }
        Ok(Some((from, self.end())))
    }

    async fn read(&mut self, at: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let from = at + done as u64;
            if from >= self.end() {
                if self.ended {
                    buf[done..].fill(0);
                    break;
                }
                self.next_piece().await?;
                continue;
            }
            let Some(skip) = from.checked_sub(self.at) else {
                return Err(Error::new(
                    ErrorKind::Internal,
                    format!("{} is read backwards, at byte {from}", self.what),
                ));
            };
            let have = &self.piece[skip as usize..];
            let n = have.len().min(buf.len() - done);
            buf[done..done + n].copy_from_slice(&have[..n]);
            done += n;
        }
        Ok(())
    }
}
