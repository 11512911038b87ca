//! Orders to a volume while the server has it: snapshots, collection, a clone that comes to stand alone, growth.

use std::time::Duration;

use crate::nbd_support::client::Headers;
use crate::nbd_support::requests::Client;
use crate::nbd_support::server::Place;
use crate::nbd_support::{pattern, wait_until};

const MIB: usize = 1 << 20;

#[test]
fn snapshots_and_collection_go_on_under_a_client() {
    let place = Place::file();
    // Of all that there is, snapshots included.
    let server = place.start(&["--listen", "127.0.0.1:0", "--create-size", "64M", "--linger", "60"]);
    let mut c = server.client(Headers::Structured);
    c.write(0, &pattern(0, 1, 1, 8 * MIB));
    assert_eq!(place.ok(&["snapshot", "create", "vol", "before"]), "vol@before\n");
    let e = place.fails(&["snapshot", "create", "vol", "before"], 1);
    assert!(e.contains("before"), "{e}");
    c.write(0, &pattern(0, 1, 2, 8 * MIB));
    assert!(place.ok(&["snapshot", "list", "vol"]).contains("before"));
    // What it was is there for another client, beside the volume as it is.
    let mut old = Client::connect(&server.addr(), "vol@before", Headers::Structured);
    assert_eq!(old.read(0, 8 * MIB), pattern(0, 1, 1, 8 * MIB));
    assert_eq!(c.read(0, 8 * MIB), pattern(0, 1, 2, 8 * MIB));
    let e = place.fails(&["volume", "delete", "vol"], 1);
    assert!(e.contains("vol"), "{e}");
    old.disconnect();

    place.ok(&["snapshot", "delete", "vol", "before"]);
    c.write(0, &pattern(0, 1, 3, 8 * MIB));
    c.flush();
    place.ok(&["gc", "vol"]);
    assert_eq!(c.read(0, 8 * MIB), pattern(0, 1, 3, 8 * MIB));
    c.disconnect();
    server.terminate();
    place.wipe_host();
    let server = place.serve("64M", &[]);
    assert_eq!(server.client(Headers::Simple).read(0, 8 * MIB), pattern(0, 1, 3, 8 * MIB));
    place.ok(&["volume", "verify", "vol"]);
}

#[test]
fn a_clone_that_is_served_comes_to_stand_alone() {
    let place = Place::file();
    let server = place.serve("64M", &["--linger", "1"]);
    let mut c = server.client(Headers::Structured);
    c.write(0, &pattern(0, 1, 1, 4 * MIB));
    place.ok(&["snapshot", "create", "vol", "base"]);
    place.ok(&["clone", "vol@base", "copy"]);
    c.disconnect();
    wait_until("the parent is detached", Duration::from_secs(30), || place.ok(&["list", "--json"]).trim() == "[]");
    server.terminate();

    let server = place.start(&["--listen", "127.0.0.1:0", "--volume", "copy", "--linger", "60"]);
    let mut c = Client::connect(&server.addr(), "copy", Headers::Structured);
    c.write(MIB as u64, &pattern(MIB as u64, 1, 2, MIB));
    let e = place.fails(&["volume", "delete", "vol"], 1);
    assert!(e.contains("copy"), "who needs it: {e}");
    place.ok(&["volume", "flatten", "copy"]);
    place.ok(&["volume", "delete", "vol"]);
    let expected = |c: &mut Client| {
        assert_eq!(c.read(0, MIB), pattern(0, 1, 1, MIB));
        assert_eq!(c.read(MIB as u64, MIB), pattern(MIB as u64, 1, 2, MIB));
        assert_eq!(c.read(2 * MIB as u64, 2 * MIB), pattern(2 * MIB as u64, 1, 1, 2 * MIB));
    };
    expected(&mut c);
    server.kill9();
    let server = place.start(&["--listen", "127.0.0.1:0", "--volume", "copy"]);
    expected(&mut Client::connect(&server.addr(), "copy", Headers::Structured));
    server.terminate();
}

/// The size is told in the handshake alone: who is connected keeps the old one.
#[test]
fn who_connects_after_a_growth_finds_the_new_size() {
    let place = Place::file();
    let server = place.serve("64M", &["--linger", "60"]);
    let mut c = server.client(Headers::Structured);
    c.write(0, &pattern(0, 1, 1, MIB));
    place.ok(&["volume", "resize", "vol", "128M"]);
    let e = place.fails(&["volume", "resize", "vol", "64M"], 2);
    assert!(e.contains("only grows"), "{e}");
    assert_eq!(c.read(0, MIB), pattern(0, 1, 1, MIB));
    let mut again = server.client(Headers::Structured);
    assert_eq!(again.info.size, 128 << 20);
    let end = (128 << 20) - MIB as u64;
    again.write(end, &pattern(end, 1, 2, MIB));
    assert_eq!(again.read(end, MIB), pattern(end, 1, 2, MIB));
    // It is one volume for both.
    c.write(4096, &[9; 512]);
    assert_eq!(again.read(4096, 512), [9; 512]);
    server.terminate();
    place.wipe_host();
    let server = place.serve("64M", &[]);
    let mut c = server.client(Headers::Structured);
    assert_eq!((c.info.size, c.read(end, MIB)), (128 << 20, pattern(end, 1, 2, MIB)));
}
