//! What an answer means: the volume's promises, kept through the death of the process and by the store alone.

use std::time::Duration;

use nix::sys::signal::Signal;

use crate::load::{BLOCK, all_is_there, under_load, writers};
use crate::nbd_support::client::Headers;
use crate::nbd_support::proto::{cmd, flag};
use crate::nbd_support::requests::Request;
use crate::nbd_support::server::{Place, Server};
use crate::nbd_support::{pattern, soak};

#[test]
fn after_kill_9_every_acknowledged_write_is_there() {
    let place = Place::file();
    let mut writers = writers();
    for round in 0..if soak() { 40 } else { 3 } {
        let server = place.serve("64M", &[]);
        writers = under_load(server, writers, 2000 + round * 700, Server::kill9);
        let server = place.serve("64M", &[]);
        all_is_there(&server, &mut writers);
        // Every other time from a clean start.
        if round % 2 == 0 {
            server.terminate();
        } else {
            server.kill9();
        }
    }
}

#[test]
fn after_sigterm_the_store_alone_has_every_acknowledged_write() {
    sigterm_under_load(Place::file());
}

#[test]
fn after_sigterm_an_s3_store_alone_has_every_acknowledged_write() {
    if let Some(place) = Place::s3() {
        sigterm_under_load(place);
    }
}

fn sigterm_under_load(mut place: Place) {
    let mut writers = writers();
    for (round, host) in (0..).zip(["b", "c", "d"]) {
        let server = place.serve("64M", &[]);
        writers = under_load(server, writers, 2000 + round * 700, Server::terminate);
        place.wipe_host();
        place.move_to(host);
        let server = place.serve("64M", &[]);
        all_is_there(&server, &mut writers);
        server.terminate();
    }
}

/// Two signals: the second ends it at once, and the log keeps what the store does not have.
#[test]
fn a_second_sigterm_ends_it_at_once_and_nothing_is_lost() {
    let place = Place::file();
    let mut writers = writers();
    let server = place.serve("64M", &[]);
    writers = under_load(server, writers, 3000, |mut server| {
        server.signal(Signal::SIGTERM);
        server.signal(Signal::SIGTERM);
        // It may have been quicker than the second signal.
        let code = server.wait(Duration::from_secs(30)).code();
        assert!(matches!(code, Some(0 | 1)), "{code:?}");
    });
    let server = place.serve("64M", &[]);
    all_is_there(&server, &mut writers);
}

#[test]
fn a_flush_on_one_connection_covers_the_writes_of_another() {
    let place = Place::file();
    for round in 1..6_u64 {
        let server = place.serve("64M", &[]);
        let mut a = server.client(Headers::Extended);
        let mut b = server.client(Headers::Structured);
        // A is answered before B flushes: these are what B's flush has to cover.
        for n in 0..64 {
            a.write(n * 8192, &pattern(n * 8192, 1, round, 8192));
        }
        assert_eq!(a.outcome(cmd::TRIM, 0, 64 * 8192, 8192), 0);
        b.flush();
        server.kill9();
        let server = place.serve("64M", &[]);
        let mut c = server.client(Headers::Simple);
        for n in 0..64 {
            assert!(c.read(n * 8192, 8192) == pattern(n * 8192, 1, round, 8192), "block {n} of round {round}");
        }
        assert_eq!(c.read(64 * 8192, 8192), [0; 8192]);
        c.write(64 * 8192, &[9; 8192]);
        drop(c);
        server.terminate();
    }
}

/// FUA is a promise of its own: no flush follows.
#[test]
fn fua_needs_no_flush() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    let mut c = server.client(Headers::Structured);
    for n in 0..32_u64 {
        let r = c.call(Request::write(flag::FUA, n * 5000, &pattern(n, 1, 1, 5000))).expect("a write");
        assert_eq!(r.error, 0);
    }
    assert_eq!(c.outcome(cmd::WRITE_ZEROES, flag::FUA, 5000, 5000), 0);
    server.kill9();
    let server = place.serve("64M", &[]);
    let mut c = server.client(Headers::Structured);
    for n in (0..32).filter(|n| *n != 1) {
        assert!(c.read(n * 5000, 5000) == pattern(n, 1, 1, 5000), "write {n}");
    }
    assert_eq!(c.read(5000, 5000), [0; 5000]);
}

/// A connection that breaks off takes nothing with it: what was answered stays, and the next client sees it at once.
#[test]
fn a_broken_connection_loses_nothing() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    for round in 1..20_u64 {
        let mut c = server.client(Headers::Structured);
        c.write(0, &pattern(0, 1, round, 4 * BLOCK));
        // And one that is cut off half way.
        let half = Request::write(0, 1 << 20, &[0xff; 65536]);
        let mut b = c.header(&half, 1);
        b.extend_from_slice(&half.payload[..30_000]);
        std::io::Write::write_all(&mut c.stream, &b).expect("send");
        drop(c);
        let mut c = server.client(Headers::Simple);
        assert!(c.read(0, 4 * BLOCK) == pattern(0, 1, round, 4 * BLOCK));
        assert!(c.read(1 << 20, 65536).iter().all(|b| *b == 0), "half a write is none");
    }
}
