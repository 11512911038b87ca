//! What the tests of the NBD server share: the server as a process ([`server`]), and a raw client ([`client`], [`requests`]) that
//! sends whatever a test wants sent and holds every answer against the protocol.
//!
//! The client knows nothing of the program's own code. `VB_TEST_NBD_SERVER=qemu-nbd` puts QEMU's server in the program's place
//! (`nbdkit`: that one's memory). What fails there, too, may be the test's mistake.

// Each test program uses a part of this.
#![allow(dead_code)]

pub(crate) mod client;
#[path = "../store_support/moto.rs"]
pub(crate) mod moto;
pub(crate) mod proto;
pub(crate) mod requests;
pub(crate) mod server;
#[path = "../store_support/tls.rs"]
pub(crate) mod tls;

use std::process::Child;
use std::time::{Duration, Instant};

/// Ends the process when it goes out of scope, by its own id.
pub(crate) struct Ended(pub(crate) Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Lets this thread wait.
pub(crate) fn pause(d: Duration) {
    let until = Instant::now() + d;
    while let Some(left) = until.checked_duration_since(Instant::now()) {
        std::thread::park_timeout(left);
    }
}

/// Waits until `done`, at most `limit`.
#[track_caller]
pub(crate) fn wait_until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < until, "not in {limit:?}: {what}");
        pause(Duration::from_millis(20));
    }
}

/// Whether the long forms of the tests were asked for (`make soak`).
pub(crate) fn soak() -> bool {
    std::env::var("VB_SOAK").is_ok_and(|v| v == "1")
}

/// The bytes of a place of a test's own: 8 bytes that name the place, the writer and the round, over and over. Any 8 aligned
/// bytes say where they were to be.
pub(crate) fn pattern(offset: u64, writer: u64, round: u64, len: usize) -> Vec<u8> {
    let mut v = Vec::with_capacity(len + 8);
    let mut at = offset;
    while v.len() < len {
        let word = (at >> 3).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (writer << 48) ^ (round << 20) | 1;
        v.extend_from_slice(&word.to_be_bytes());
        at += 8;
    }
    v.truncate(len);
    v
}
