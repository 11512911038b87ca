//! Memory, or nothing, as a volume: the floor that a real one is measured against.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, RwLock};

use vb_ublk::disk::IoBuf;
use vb_ublk::units::{Lba, SECTOR};
use vb_ublk::volume::engine::{Engine, Extent, IoFault};

const PAGE: usize = 1 << 20;

/// Memory in pieces, shared by all queues; an absent piece is zeros.
pub(crate) struct Ram {
    pieces: Vec<RwLock<Option<Box<[u8]>>>>,
    null: bool,
    size: u64,
}

impl Ram {
    /// `size` bytes of zeros; with `null`, they stay zeros.
    pub(crate) fn new(size: u64, null: bool) -> Arc<Self> {
        let pieces = if null { 0 } else { size.div_ceil(PAGE as u64) };
        Arc::new(Self { pieces: (0..pieces).map(|_| RwLock::new(None)).collect(), null, size })
    }

    /// Calls `f` with each piece that the range touches, the range within it, and where it begins in the request.
    fn each(
        &self,
        lba: Lba,
        bytes: u64,
        mut f: impl FnMut(&RwLock<Option<Box<[u8]>>>, std::ops::Range<usize>, usize),
    ) -> Result<(), IoFault> {
        let start = lba.0 * SECTOR as u64;
        if start.checked_add(bytes).is_none_or(|end| end > self.size) {
            return Err(IoFault::BadRange);
        }
        if self.null {
            return Ok(());
        }
        let mut done = 0;
        while done < bytes {
            let at = start + done;
            let within = (at % PAGE as u64) as usize;
            let len = (PAGE - within).min((bytes - done) as usize);
            f(&self.pieces[(at / PAGE as u64) as usize], within..within + len, done as usize);
            done += len as u64;
        }
        Ok(())
    }
}

/// One lane's view of it.
pub(crate) struct RamEngine(pub(crate) Arc<Ram>);

impl Engine for RamEngine {
    async fn read(&self, lba: Lba, dst: IoBuf) -> Result<(), IoFault> {
        self.0.each(lba, dst.len() as u64, |piece, range, at| match &*piece.read().unwrap() {
            Some(p) => dst.copy_in(at, &p[range]),
            None => dst.zero(at..at + range.len()),
        })
    }

    async fn write(&self, lba: Lba, src: IoBuf, _fua: bool) -> Result<(), IoFault> {
        self.0.each(lba, src.len() as u64, |piece, range, at| {
            let mut piece = piece.write().unwrap();
            let p = piece.get_or_insert_with(|| vec![0; PAGE].into_boxed_slice());
            let len = range.len();
            p[range].copy_from_slice(&src.bytes()[at..at + len]);
        })
    }

    async fn flush(&self) -> Result<(), IoFault> {
        Ok(())
    }

    async fn discard(&self, lba: Lba, sectors: u64, _fua: bool) -> Result<(), IoFault> {
        self.0.each(lba, sectors * SECTOR as u64, |piece, range, _| {
            let mut piece = piece.write().unwrap();
            if range.len() == PAGE {
                *piece = None;
            } else if let Some(p) = &mut *piece {
                p[range].fill(0);
            }
        })
    }

    async fn write_zeroes(&self, lba: Lba, sectors: u64, fua: bool) -> Result<(), IoFault> {
        self.discard(lba, sectors, fua).await
    }

    fn extents(&self, lba: Lba, sectors: u64, out: &mut Vec<Extent>) -> Result<(), IoFault> {
        self.0.each(lba, sectors * SECTOR as u64, |piece, range, _| {
            out.push(Extent { sectors: (range.len() / SECTOR) as u64, hole: piece.read().unwrap().is_none() });
        })
    }

    fn seal(&self) {}

    fn tasks(self: Rc<Self>) -> Vec<Pin<Box<dyn Future<Output = ()>>>> {
        Vec::new()
    }
}

/// A size: a number, or one with K, M or G.
pub(crate) fn bytes(s: &str) -> Option<u64> {
    let (number, shift) = match s.as_bytes().last()? {
        b'K' => (&s[..s.len() - 1], 10),
        b'M' => (&s[..s.len() - 1], 20),
        b'G' => (&s[..s.len() - 1], 30),
        _ => (s, 0),
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}
