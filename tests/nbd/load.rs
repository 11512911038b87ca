//! Writers whose writes are counted: what was issued, and what was acknowledged, block by block.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::nbd_support::client::{Addr, Headers};
use crate::nbd_support::pattern;
use crate::nbd_support::proto::{cmd, flag};
use crate::nbd_support::requests::{Client, Request};

/// Every block is written by one connection alone, and not again before its last write was answered.
pub(crate) const BLOCK: usize = 4096;

/// What is known of one block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Known {
    /// The round last sent; 0 for never.
    issued: u64,
    /// The round last acknowledged.
    acked: u64,
}

/// One connection's blocks.
pub(crate) struct Writer {
    who: u64,
    first: u64,
    pub(crate) blocks: Vec<Known>,
}

impl Writer {
    /// The `who`th of writers with `count` blocks each.
    pub(crate) fn new(who: u64, count: usize) -> Self {
        Self { who, first: who * count as u64, blocks: vec![Known::default(); count] }
    }

    fn data(&self, block: usize, round: u64) -> (u64, Vec<u8>) {
        let offset = (self.first + block as u64) * BLOCK as u64;
        (offset, pattern(offset, self.who, round, BLOCK))
    }

    /// Writes, 16 at a time, block after block and from the beginning again, until told to stop or hung up on.
    pub(crate) fn run(
        &mut self,
        addr: &Addr,
        headers: Headers,
        stop: &AtomicBool,
        acked: &AtomicU64,
    ) -> io::Result<()> {
        let mut c = Client::try_connect(addr, "vol", headers)?;
        let mut under_way = std::collections::HashMap::new();
        let mut next = 0;
        while !stop.load(Ordering::Relaxed) || c.outstanding() > 0 {
            while c.outstanding() < 16 && !stop.load(Ordering::Relaxed) {
                let block = next % self.blocks.len();
                if under_way.values().any(|b| *b == Some(block)) {
                    break;
                }
                next += 1;
                let round = self.blocks[block].issued + 1;
                let (offset, data) = self.data(block, round);
                self.blocks[block].issued = round;
                let flags = if next % 37 == 0 { flag::FUA } else { 0 };
                under_way.insert(c.send(Request::write(flags, offset, &data))?, Some(block));
                if next % 101 == 0 {
                    under_way.insert(c.send(Request::new(cmd::FLUSH, 0, 0, 0))?, None);
                }
            }
            let r = c.receive()?;
            if let Some(block) = under_way.remove(&r.cookie).expect("one of ours") {
                // A server on its way out may refuse; then nothing is known of the write.
                if r.error != 0 {
                    return Err(io::Error::other(format!("error {}", r.error)));
                }
                self.blocks[block].acked = self.blocks[block].issued;
                acked.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Reads all back: every sector holds what was acknowledged last, or what was under way when the server went. Gives how
    /// many blocks have anything acknowledged, and makes what was found the new truth.
    pub(crate) fn verify(&mut self, c: &mut Client) -> usize {
        let mut count = 0;
        for block in 0..self.blocks.len() {
            let known = self.blocks[block];
            let (offset, acked) = self.data(block, known.acked);
            let (_, issued) = self.data(block, known.issued);
            let zeros = vec![0; BLOCK];
            let acked = if known.acked == 0 { &zeros } else { &acked };
            let found = c.read(offset, BLOCK);
            for at in (0..BLOCK).step_by(512) {
                let sector = &found[at..at + 512];
                assert!(
                    sector == &acked[at..at + 512] || (known.issued > 0 && sector == &issued[at..at + 512]),
                    "writer {} block {block} at {offset}+{at}: neither round {} (acknowledged) nor {}: {:02x?}",
                    self.who,
                    known.acked,
                    known.issued,
                    &sector[..16]
                );
            }
            count += usize::from(known.acked > 0);
            // Later rounds have other numbers, whichever of the two it is now.
            if found == issued && known.issued > 0 {
                self.blocks[block].acked = known.issued;
            }
        }
        count
    }
}
