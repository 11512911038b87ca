//! One volume, several connections.

use std::sync::Barrier;

use crate::nbd_support::client::Headers;
use crate::nbd_support::proto::{can, cmd};
use crate::nbd_support::requests::{Client, Request};
use crate::nbd_support::server::Place;
use crate::nbd_support::{pattern, soak};
use crate::support_rng::Rng;

/// No power of two, so that stripes begin and end everywhere in sectors and blocks.
const STRIPE: usize = 100;
const OWNERS: usize = 6;
const STRIPES: usize = 8;
/// Sectors and blocks that all owners share.
const REGION: usize = STRIPE * OWNERS * STRIPES;

/// Where an owner's `n`th stripe begins.
fn stripe(owner: usize, n: usize) -> usize {
    (n * OWNERS + owner) * STRIPE
}

/// One owner: writes and zeroes its stripes, several at a time, and reads them back now and then. Gives what its stripes must hold.
fn own(mut c: Client, owner: usize, base: u64, rounds: u64) -> Vec<Vec<u8>> {
    let mut rng = Rng(owner as u64 + 77);
    let mut model = vec![vec![0; STRIPE]; STRIPES];
    for round in 1..=rounds {
        // Each stripe once in a batch: two outstanding writes of the same bytes would have no order.
        let count = 1 + rng.below(STRIPES as u64) as usize;
        let first = rng.below(STRIPES as u64) as usize;
        for n in (0..count).map(|n| (first + n) % STRIPES) {
            // Part of the stripe, or all of it.
            let from = rng.below(STRIPE as u64 / 2) as usize;
            let len = 1 + rng.below((STRIPE - from) as u64) as usize;
            let offset = base + (stripe(owner, n) + from) as u64;
            if rng.below(4) == 0 {
                c.send(Request::new(cmd::WRITE_ZEROES, 0, offset, len as u64)).expect("send");
                model[n][from..from + len].fill(0);
            } else {
                let data = pattern(offset, owner as u64, round, len);
                c.send(Request::write(0, offset, &data)).expect("send");
                model[n][from..from + len].copy_from_slice(&data);
            }
        }
        while c.outstanding() > 0 {
            assert_eq!(c.receive().expect("an answer").error, 0);
        }
        let n = rng.below(STRIPES as u64) as usize;
        let found = c.read(base + stripe(owner, n) as u64, STRIPE);
        assert!(found == model[n], "owner {owner} stripe {n} round {round}: {found:02x?}, not {:02x?}", model[n]);
    }
    c.disconnect();
    model
}

/// A write of less than a sector is a read, a change and a write: done by two at once without care, one undoes the other.
#[test]
fn neighbours_in_a_sector_lose_no_byte() {
    let place = Place::file();
    let server = place.serve("64M", &["--workers", "4"]);
    let rounds = if soak() { 20_000 } else { 400 };
    // At the volume's start, across the border of two 2 MiB leaves, and at an odd place.
    for base in [0, (2 << 20) - REGION as u64 / 2, (5 << 20) + 77] {
        let models: Vec<_> = std::thread::scope(|s| {
            let server = &server;
            let all: Vec<_> = (0..OWNERS)
                .map(|owner| {
                    let headers = [Headers::Simple, Headers::Structured, Headers::Extended][owner % 3];
                    s.spawn(move || own(server.client(headers), owner, base, rounds))
                })
                .collect();
            all.into_iter().map(|t| t.join().expect("an owner")).collect()
        });
        let mut c = server.client(Headers::Structured);
        let region = c.read(base, REGION);
        for (owner, model) in models.iter().enumerate() {
            for (n, expected) in model.iter().enumerate() {
                let at = stripe(owner, n);
                assert!(region[at..at + STRIPE] == expected[..], "owner {owner} stripe {n} at {at}");
            }
        }
    }
    server.terminate();
}

/// Small writes pipelined on ONE connection over the same sectors: they take effect each, whatever their order.
#[test]
fn small_writes_of_one_connection_lose_no_byte() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    let mut c = server.client(Headers::Structured);
    for round in 1..40_u64 {
        let expected = pattern(0, 1, round, 4096);
        for (n, piece) in expected.chunks(13).enumerate() {
            c.send(Request::write(0, n as u64 * 13, piece)).expect("send");
        }
        while c.outstanding() > 0 {
            assert_eq!(c.receive().expect("an answer").error, 0);
        }
        assert!(c.read(0, 4096) == expected, "round {round}");
    }
}

/// What MULTI_CONN means: an answer on one connection is true on all.
#[test]
fn a_write_is_seen_on_every_connection() {
    let place = Place::file();
    let server = place.serve("64M", &["--workers", "4"]);
    let mut all: Vec<Client> = (0..9).map(|n| server.client([Headers::Simple, Headers::Extended][n % 2])).collect();
    assert!(all.iter().all(|c| c.info.flags & can::MULTI_CONN != 0));
    for round in 1..60_u64 {
        let writer = round as usize % all.len();
        let data = pattern(0, writer as u64, round, 20_000);
        all[writer].write(1000, &data);
        for c in &mut all {
            assert!(c.read(1000, 20_000) == data, "round {round}");
        }
        assert_eq!(all[writer].outcome(cmd::WRITE_ZEROES, 0, 1000, 20_000), 0);
        for c in &mut all {
            assert!(c.read(1000, 20_000).iter().all(|b| *b == 0), "round {round}");
        }
    }
}

/// Many that come at the same moment to a volume that is not attached yet: it is attached once.
#[test]
fn the_first_clients_may_come_together() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    let gate = Barrier::new(24);
    std::thread::scope(|s| {
        for n in 0..24_u64 {
            let (gate, server) = (&gate, &server);
            s.spawn(move || {
                gate.wait();
                let mut c = server.client(Headers::Structured);
                c.write(n * 4096, &pattern(n * 4096, n, 1, 4096));
                c.disconnect();
            });
        }
    });
    let mut c = server.client(Headers::Structured);
    for n in 0..24 {
        assert!(c.read(n * 4096, 4096) == pattern(n * 4096, n, 1, 4096), "client {n}");
    }
    drop(c);
    server.terminate();
}
