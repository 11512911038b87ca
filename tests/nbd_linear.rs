//! Linearizability over NBD: many connections write and read overlapping sectors at once, and every sector's history must have an
//! order that explains it. How that is decided: `linear_support`.

mod linear_support;
mod nbd_support;
mod support_rng;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use linear_support::{Moment, Op, Value, check};
use nbd_support::client::{Addr, Headers};
use nbd_support::proto::{cmd, flag};
use nbd_support::requests::{Client, Request};
use nbd_support::server::Place;
use nbd_support::soak;
use support_rng::Rng;

const SECTOR: u64 = 512;
/// Few, so that they are fought over.
const SECTORS: u64 = 24;
/// Where they are: across the border of two 2 MiB leaves of the map, which have locks of their own.
const BASE: u64 = (2 << 20) - 12 * SECTOR;

/// A clock that never gives the same moment twice, in the order in which it is asked.
static CLOCK: AtomicU64 = AtomicU64::new(1);

fn now() -> Moment {
    CLOCK.fetch_add(1, Ordering::SeqCst)
}

/// One connection's operations, sector by sector.
type History = Vec<(u64, Op)>;

struct Pending {
    first: u64,
    count: u64,
    /// Of a write or a zeroing: what each sector is given. A zeroing's are 0.
    values: Option<Vec<Value>>,
    invoked: Moment,
}

/// A sector full of one value.
fn fill(value: Value) -> [u8; SECTOR as usize] {
    let mut sector = [0; SECTOR as usize];
    for place in sector.chunks_exact_mut(8) {
        place.copy_from_slice(&value.to_be_bytes());
    }
    sector
}

/// The value that fills a sector; a sector is never a mixture of two.
fn value_of(sector: &[u8]) -> Value {
    let value = Value::from_be_bytes(sector[..8].try_into().expect("8 bytes"));
    if let Some(n) = sector.chunks_exact(8).position(|w| w != value.to_be_bytes()) {
        panic!("a torn sector: {value:#x}, and from byte {} on {:02x?}", n * 8, &sector[n * 8..n * 8 + 8]);
    }
    value
}

/// One connection at work. When it breaks, what had no answer has none in the history.
fn connection(addr: &Addr, who: u64, operations: u64, seed: u64) -> History {
    let headers = [Headers::Simple, Headers::Structured, Headers::Extended][who as usize % 3];
    let mut rng = Rng(seed ^ (who << 32));
    let mut history = History::new();
    let mut pending: HashMap<u64, Pending> = HashMap::new();
    let Ok(mut c) = Client::try_connect(addr, "vol", headers) else { return history };
    let mut sent = 0;
    let mut serial = 0;
    let broken = loop {
        // One to eight at a time.
        let depth = 1 + rng.below(8) as usize;
        while pending.len() < depth && sent < operations {
            sent += 1;
            let first = rng.below(SECTORS);
            let count = 1 + rng.below((SECTORS - first).min(9));
            let (offset, length) = (BASE + first * SECTOR, count * SECTOR);
            let (request, values) = if rng.below(2) == 0 {
                let values: Vec<Value> = (0..count)
                    .map(|_| {
                        serial += 1;
                        seed << 56 | (who + 1) << 40 | serial
                    })
                    .collect();
                let data: Vec<u8> = values.iter().flat_map(|v| fill(*v)).collect();
                let fua = if rng.below(16) == 0 { flag::FUA } else { 0 };
                (Request::write(fua, offset, &data), Some(values))
            } else {
                (Request::new(cmd::READ, 0, offset, length), None)
            };
            let invoked = now();
            match c.send(request) {
                Ok(cookie) => {
                    pending.insert(cookie, Pending { first, count, values, invoked });
                }
                Err(_) => {
                    // Part of it may have gone out.
                    pending.insert(0, Pending { first, count, values, invoked });
                    break;
                }
            }
        }
        if pending.is_empty() {
            break false;
        }
        let Ok(reply) = c.receive() else { break true };
        let returned = Some(now());
        let p = pending.remove(&reply.cookie).expect("one of ours");
        if reply.error != 0 {
            // A server that ends may refuse what it has not begun.
            record(&mut history, &p, None, None);
            continue;
        }
        record(&mut history, &p, Some(&reply.data), returned);
    };
    assert!(broken || pending.is_empty());
    for p in pending.values() {
        record(&mut history, p, None, None);
    }
    history
}

fn record(history: &mut History, p: &Pending, read: Option<&[u8]>, returned: Option<Moment>) {
    for n in 0..p.count {
        let at = (n * SECTOR) as usize;
        let value = match (&p.values, read) {
            (Some(values), _) => values[n as usize],
            (None, Some(data)) => value_of(&data[at..at + SECTOR as usize]),
            (None, None) => continue,
        };
        history.push((p.first + n, Op { write: p.values.is_some(), value, invoked: p.invoked, returned }));
    }
}

/// Every sector's history, from all connections of all rounds.
#[track_caller]
fn explain(histories: Vec<History>) {
    let mut registers: HashMap<u64, Vec<Op>> = HashMap::new();
    for (sector, op) in histories.into_iter().flatten() {
        registers.entry(sector).or_default().push(op);
    }
    assert_eq!(registers.len() as u64, SECTORS);
    let (mut operations, mut concurrent) = (0, 0);
    for (sector, mut ops) in registers {
        ops.sort_by_key(|o| o.invoked);
        operations += ops.len();
        concurrent += ops.windows(2).filter(|p| p[0].returned.is_none_or(|r| r > p[1].invoked)).count();
        if let Err(why) = check(&ops) {
            let name = std::env::temp_dir().join(format!("nbd-linear-{}-{sector}.txt", std::process::id()));
            let text: Vec<String> = ops.iter().map(|o| format!("{o:?}")).collect();
            std::fs::write(&name, text.join("\n")).expect("keep the history");
            panic!("sector {sector}: {why}\nits history is in {}", name.display());
        }
    }
    println!("{operations} operations on {SECTORS} sectors, {concurrent} beside another");
    assert!(concurrent * 10 > operations, "hardly anything happened at the same time");
}

fn operations() -> u64 {
    if soak() { 40_000 } else { 2_000 }
}

#[test]
fn every_sector_has_an_order_that_explains_it() {
    let place = Place::file();
    let server = place.serve("64M", &["--workers", "4"]);
    let addr = server.addr();
    let histories = std::thread::scope(|s| {
        let addr = &addr;
        let all: Vec<_> = (0..12).map(|who| s.spawn(move || connection(addr, who, operations(), 1))).collect();
        all.into_iter().map(|t| t.join().expect("a connection")).collect()
    });
    explain(histories);
    server.terminate();
}

/// The same across the death of the process: a request that had no answer may have taken place or not, and then for good.
#[test]
fn the_order_holds_across_kill_9() {
    let place = Place::file();
    let mut histories = Vec::new();
    for round in 2..if soak() { 40 } else { 6 } {
        let server = place.serve("64M", &["--workers", "3"]);
        let addr = server.addr();
        std::thread::scope(|s| {
            let addr = &addr;
            let all: Vec<_> = (0..6).map(|who| s.spawn(move || connection(addr, who, u64::MAX, round))).collect();
            nbd_support::pause(Duration::from_millis(700 + round * 130));
            server.kill9();
            histories.extend(all.into_iter().map(|t| t.join().expect("a connection")));
        });
    }
    // What is there in the end has to be explained as well.
    let server = place.serve("64M", &[]);
    histories.push(connection(&server.addr(), 7, 200, 1));
    explain(histories);
}
