//! Writers whose writes are counted: what was issued, and what was acknowledged, block by block.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::nbd_support::client::{Addr, Headers};
use crate::nbd_support::proto::{cmd, flag};
use crate::nbd_support::requests::{Client, Request};
use crate::nbd_support::server::Server;
use crate::nbd_support::{pattern, wait_until};
use crate::support_rng::Rng;

/// Every block is written by one connection alone, and not again before its last write was answered.
pub(crate) const BLOCK: usize = 4096;

/// Blocks that are read back by one request.
const READ: usize = 32;

/// What is known of one block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Known {
    /// The round last sent; 0 for never. No two writes of a block have the same.
    round: u64,
    /// The newest round that may be there.
    issued: u64,
    /// The oldest that may be: the one last acknowledged, or found.
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

    /// Writes, 16 at a time, until told to stop or hung up on: every other writer block after block and from the beginning again,
    /// the others at random.
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
        let mut rng = Rng(self.who << 32 | self.blocks[0].round);
        while !stop.load(Ordering::Relaxed) || c.outstanding() > 0 {
            while c.outstanding() < 16 && !stop.load(Ordering::Relaxed) {
                let block = match self.who % 2 {
                    0 => next % self.blocks.len(),
                    _ => rng.below(self.blocks.len() as u64) as usize,
                };
                if under_way.values().any(|b| *b == Some(block)) {
                    break;
                }
                next += 1;
                let round = self.blocks[block].round + 1;
                let (offset, data) = self.data(block, round);
                self.blocks[block].round = round;
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
        let mut piece = Vec::new();
        for block in 0..self.blocks.len() {
            let known = self.blocks[block];
            let (offset, acked) = self.data(block, known.acked);
            let (_, issued) = self.data(block, known.issued);
            let zeros = vec![0; BLOCK];
            let acked = if known.acked == 0 { &zeros } else { &acked };
            // Many at a time: the store may be far.
            let at = block % READ;
            if at == 0 {
                piece = c.read(offset, READ.min(self.blocks.len() - block) * BLOCK);
            }
            let found = &piece[at * BLOCK..(at + 1) * BLOCK];
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
            // Which of the two it is has been seen now, and may not change any more.
            if found == issued && known.issued > 0 {
                self.blocks[block].acked = known.issued;
            } else if found == acked {
                self.blocks[block].issued = known.acked;
            }
        }
        count
    }
}

/// Writers at work until `stop` says how the server ends; then what they know.
pub(crate) fn under_load(server: Server, writers: Vec<Writer>, enough: u64, stop: impl FnOnce(Server)) -> Vec<Writer> {
    let (halt, acked) = (AtomicBool::new(false), AtomicU64::new(0));
    let addr = server.addr();
    std::thread::scope(|s| {
        let (halt, acked, addr) = (&halt, &acked, &addr);
        let running: Vec<_> = writers
            .into_iter()
            .zip([Headers::Simple, Headers::Structured, Headers::Extended].into_iter().cycle())
            .map(|(mut w, headers)| {
                s.spawn(move || {
                    // It ends with the connection, in whichever way that ends.
                    let end = w.run(addr, headers, halt, acked);
                    assert!(end.is_err(), "nobody told it to stop");
                    w
                })
            })
            .collect();
        wait_until("writes are acknowledged", Duration::from_secs(120), || acked.load(Ordering::Relaxed) >= enough);
        stop(server);
        let writers = running.into_iter().map(|r| r.join().expect("a writer")).collect();
        println!("{} writes had been acknowledged", acked.load(Ordering::Relaxed));
        writers
    })
}

/// Four of them, with 2 MiB each.
pub(crate) fn writers() -> Vec<Writer> {
    (0..4).map(|who| Writer::new(who, 512)).collect()
}

/// Every writer finds what was acknowledged to it.
#[track_caller]
pub(crate) fn all_is_there(server: &Server, writers: &mut [Writer]) {
    let mut c = server.client(Headers::Structured);
    let blocks: usize = writers.iter_mut().map(|w| w.verify(&mut c)).sum();
    assert!(blocks > 100, "only {blocks} blocks had been acknowledged");
    c.disconnect();
}
