//! The NBD server killed again and again over real S3 servers, and nodes of theirs under it; in the end the store alone has everything.

#[path = "store_support/garage.rs"]
mod garage;
#[path = "nbd/load.rs"]
mod load;
mod nbd_support;
#[path = "store_support/s3s.rs"]
mod s3s;
#[path = "store_support/s3s_thread.rs"]
mod s3s_thread;
mod support_rng;

use std::time::Duration;

use garage::{Garage, NODES};
use load::{Writer, all_is_there, under_load, writers};
use nbd_support::client::Headers;
use nbd_support::requests::{Client, Request};
use nbd_support::server::{Bucket, Place, Server, Store};
use nbd_support::{Ended, moto, pattern, pause, soak, wait_until};
use nix::sys::signal::Signal;
use s3s_thread::S3sThread;
use serde_json::Value;
use support_rng::Rng;

const BUCKET: &str = "crash-cycle";
const SIZE: &str = "64M";

/// It keeps the volume while nobody is connected, so that each server attaches it once.
fn serve(place: &Place) -> Server {
    place.serve(SIZE, &["--linger", "600"])
}

/// What the engine says of the volume.
fn engine(place: &Place) -> Value {
    let mut all: Value = serde_json::from_str(&place.ok(&["status", "vol", "--json"])).expect("JSON");
    all["engine"].take()
}

/// Objects that this attachment has written so far.
fn uploads(place: &Place) -> u64 {
    let puts = &engine(place)["store_requests"]["put"];
    let of = |name: &str| puts[name].as_u64().unwrap_or(0);
    of("requests") - of("errors")
}

/// Waits until `more` objects more than now are in the store.
#[track_caller]
fn let_it_upload(place: &Place, more: u64) {
    let before = uploads(place);
    wait_until("uploads go on", Duration::from_secs(60), || uploads(place) >= before + more);
}

/// Whether the store honours conditional writes is found at each attach, and told once if it does not.
#[track_caller]
fn conditions_are(honoured: bool, place: &Place, server: &Server) {
    assert_eq!(engine(place)["background"]["conditional_writes"], honoured);
    let said = server.said();
    assert_eq!(said.matches("ignores conditional writes").count(), usize::from(!honoured), "{said}");
}

/// A clean detach; then the host is gone, and another one has nothing but the store.
fn the_store_alone_has_it(place: &mut Place, writers: &mut [Writer]) {
    let server = serve(place);
    all_is_there(&server, writers);
    server.terminate();
    place.wipe_host();
    place.move_to("another");
    let server = serve(place);
    all_is_there(&server, writers);
    server.terminate();
    place.ok(&["volume", "verify", "vol"]);
}

/// Kills at random moments while chunks are under way; each next server finds all that was acknowledged.
fn crash_cycle(mut place: Place) {
    let mut writers = writers();
    let mut rng = Rng(1);
    for round in 0..if soak() { 30 } else { 3 } {
        let server = serve(&place);
        if round > 0 {
            all_is_there(&server, &mut writers);
        }
        writers = under_load(server, writers, 1000, |server| {
            let_it_upload(&place, 1 + round % 4);
            conditions_are(true, &place, &server);
            pause(Duration::from_millis(rng.below(400)));
            server.kill9();
        });
    }
    the_store_alone_has_it(&mut place, &mut writers);
}

#[test]
fn over_moto() {
    if let Some(place) = Place::s3() {
        crash_cycle(place);
    }
}

#[test]
fn over_s3s_fs() {
    let server = S3sThread::start(&[BUCKET]);
    crash_cycle(Place::new(Store::S3(Bucket::elsewhere(server.endpoint.clone(), BUCKET, s3s::KEYS))));
    server.stop();
}

/// A place whose requests go to node `n`.
fn on_node(garage: &Garage, n: usize) -> Place {
    Place::new(Store::S3(Bucket::elsewhere(garage.endpoint(n), BUCKET, garage.keys.clone())))
}

/// One node after the other is killed under load and comes back, now before the NBD server is killed, and now after the next one
/// has attached. The program knows the first node alone: without that the store is away, without another one nothing happens.
#[test]
fn over_garage_that_loses_a_node_under_load() {
    let Some(mut garage) = Garage::long_form(&[BUCKET]) else { return };
    let mut place = on_node(&garage, 0);
    let mut writers = writers();
    let mut rng = Rng(2);
    let mut dead = None;
    for round in 0..2 * NODES {
        let (node, back_first) = (round % NODES, (round / NODES).is_multiple_of(2));
        let server = serve(&place);
        if round > 0 {
            all_is_there(&server, &mut writers);
        }
        if let Some(node) = dead.take() {
            garage.restart(node);
        }
        writers = under_load(server, writers, 1000, |mut server| {
            let_it_upload(&place, 2);
            conditions_are(false, &place, &server);
            pause(Duration::from_millis(rng.below(400)));
            garage.kill(node);
            if node == 0 {
                pause(Duration::from_secs(3));
            } else {
                let_it_upload(&place, 8);
            }
            if back_first || node == 0 {
                garage.restart(node);
                let_it_upload(&place, 4);
            } else {
                dead = Some(node);
            }
            assert!(server.ended().is_none(), "the server has gone on:\n{}", server.said());
            server.kill9();
        });
    }
    if let Some(node) = dead.take() {
        garage.restart(node);
    }
    the_store_alone_has_it(&mut place, &mut writers);
    // Nor is it any one node that has it.
    garage.kill(0);
    place.goes_to(garage.endpoint(1));
    place.wipe_host();
    let server = serve(&place);
    all_is_there(&server, &mut writers);
    server.terminate();
}

/// Where conditions are ignored it is the nonce in the manifest that tells a host that it has lost the volume.
#[test]
fn over_garage_a_host_that_was_overtaken_finds_out() {
    let Some(garage) = Garage::long_form(&[BUCKET]) else { return };
    let mut place = on_node(&garage, 0);
    let first = serve(&place);
    let mut a = first.client(Headers::Structured);
    a.write(0, &pattern(0, 1, 1, 8192));
    a.disconnect();
    first.terminate();
    let mut first = serve(&place);
    let mut a = first.client(Headers::Structured);
    assert_eq!(a.read(0, 8192), pattern(0, 1, 1, 8192));

    // Another host, which asks another node.
    place.move_to("b");
    place.goes_to(garage.endpoint(1));
    let second = serve(&place);
    assert!(Client::try_connect(&second.addr(), "vol", Headers::Structured).is_err(), "the volume is another host's");
    assert!(second.said().contains("attached"), "{}", second.said());
    second.terminate();
    let second = place.serve(SIZE, &["--force"]);
    let mut b = second.client(Headers::Structured);
    assert_eq!(b.read(0, 8192), pattern(0, 1, 1, 8192));
    b.write(0, &pattern(0, 2, 2, 8192));
    let mut round = 2;
    wait_until("the first host finds out", Duration::from_secs(60), || {
        round += 1;
        a.call(Request::write(0, 0, &pattern(0, 1, round, 8192))).is_ok_and(|r| r.error != 0)
    });
    assert_eq!(b.read(0, 8192), pattern(0, 2, 2, 8192));
    drop(a);
    first.signal(Signal::SIGTERM);
    assert_eq!(first.wait(Duration::from_secs(90)).code(), Some(1), "it could not release what it had lost");
    b.disconnect();
    second.terminate();
    place.wipe_host();
    let third = serve(&place);
    assert_eq!(third.client(Headers::Structured).read(0, 8192), pattern(0, 2, 2, 8192));
    third.terminate();
}
