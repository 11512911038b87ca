//! From the first client to the last: making volumes, attaching and detaching, limits, sockets, signals.

use std::os::unix::net::{UnixDatagram, UnixListener};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::nbd_support::client::{Addr, Handshake, Headers};
use crate::nbd_support::proto::rep;
use crate::nbd_support::requests::Client;
use crate::nbd_support::server::{Place, Server};
use crate::nbd_support::{pattern, wait_until};

const LISTEN: [&str; 2] = ["--listen", "127.0.0.1:0"];

fn attached(place: &Place) -> serde_json::Value {
    serde_json::from_str(&place.ok(&["list", "--json"])).expect("JSON")
}

fn refusal(server: &Server, name: &str) -> Option<u32> {
    let h = Handshake::new(&server.addr()).expect("a greeting");
    h.try_go(name).expect("an answer").err().map(|(_, e)| e)
}

#[test]
fn unknown_names_are_made_where_that_was_asked_for() {
    let place = Place::file();
    let server = place.start(&[&LISTEN[..], &["--create-size", "64M"]].concat());
    for name in ["fresh", "another.one"] {
        let mut c = Client::connect(&server.addr(), name, Headers::Structured);
        assert_eq!(c.info.size, 64 << 20);
        c.write(0, &[5; 512]);
        c.disconnect();
    }
    for bad in ["../x", "-x", "a b", "a/b", &"n".repeat(129), ""] {
        assert_eq!(refusal(&server, bad), Some(rep::ERR_UNKNOWN), "{bad:?} is no name");
    }
    server.terminate();
    assert_eq!(place.ok(&["volume", "list"]), "another.one\nfresh\n");

    // Those named, and no others; and none is the default of two.
    let server = place.start(&[&LISTEN[..], &["--create-size", "64M", "--volume", "v1", "--volume", "v2"]].concat());
    for bad in ["v3", "", "fresh"] {
        assert_eq!(refusal(&server, bad), Some(rep::ERR_UNKNOWN), "{bad:?}");
    }
    assert_eq!(refusal(&server, "v2"), None);
    server.terminate();
    assert_eq!(place.ok(&["volume", "list"]), "another.one\nfresh\nv2\n");

    // Without it, nothing is made.
    let server = place.start(&[&LISTEN[..], &["--volume", "v4"]].concat());
    assert_eq!((refusal(&server, "v4"), refusal(&server, "")), (Some(rep::ERR_UNKNOWN), Some(rep::ERR_UNKNOWN)));
    server.terminate();
    // The size of one that is there stays.
    let server = place.start(&[&LISTEN[..], &["--volume", "fresh", "--create-size", "1G"]].concat());
    let mut c = Client::connect(&server.addr(), "", Headers::Structured);
    assert_eq!((c.info.size, c.read(0, 512)), (64 << 20, vec![5; 512]));
}

#[test]
fn a_volume_is_detached_when_its_last_client_has_left() {
    let mut place = Place::file();
    let server = place.serve("64M", &["--linger", "1"]);
    assert_eq!(attached(&place), serde_json::json!([]));
    let (mut a, b) = (server.client(Headers::Structured), server.client(Headers::Simple));
    a.write(8192, &pattern(8192, 1, 1, 8192));
    let list = attached(&place);
    assert_eq!(list[0]["volume"], "vol", "{list}");
    assert_eq!(list[0]["pid"], server.pid(), "{list}");
    assert!(place.ok(&["list"]).contains("vol"));
    let status = place.ok(&["status", "vol", "--json"]);
    assert!(status.contains("127.0.0.1"), "the status names where it is served: {status}");
    // Another process on this host: the one who has it is named.
    let second = place.serve("64M", &[]);
    assert!(refusal(&second, "vol").is_some(), "it is attached already");
    assert!(second.said().contains("vol"), "{}", second.said());
    // The other's own clients are not disturbed by that.
    assert_eq!(a.read(8192, 8192), pattern(8192, 1, 1, 8192));
    a.disconnect();
    crate::nbd_support::pause(Duration::from_secs(2));
    assert_eq!(attached(&place)[0]["volume"], "vol", "one client is still there");
    drop(b);
    wait_until("the volume is detached", Duration::from_secs(30), || attached(&place) == serde_json::json!([]));
    // The second has it now, for the asking.
    let mut c = second.client(Headers::Extended);
    assert_eq!(c.read(8192, 8192), pattern(8192, 1, 1, 8192));
    c.write(16384, &pattern(16384, 1, 2, 8192));
    drop(c);
    second.terminate();
    // And the first again, on another log's word.
    let mut c = server.client(Headers::Extended);
    assert_eq!(c.read(16384, 8192), pattern(16384, 1, 2, 8192));
    drop(c);
    wait_until("the volume is detached", Duration::from_secs(30), || attached(&place) == serde_json::json!([]));
    // Another host needs nothing but the store, while the server here still runs.
    place.move_to("b");
    let elsewhere = place.serve("64M", &[]);
    let mut c = elsewhere.client(Headers::Simple);
    assert_eq!(c.read(8192, 8192), pattern(8192, 1, 1, 8192));
    assert_eq!(c.read(16384, 8192), pattern(16384, 1, 2, 8192));
}

/// A client that is back before the time is up finds the volume as it was.
#[test]
fn a_client_may_come_back_in_time() {
    let place = Place::file();
    let server = place.serve("64M", &["--linger", "30"]);
    for round in 1..50 {
        let mut c = server.client(Headers::Structured);
        assert_eq!(c.read(0, 8)[7], round - 1);
        c.write(0, &[0, 0, 0, 0, 0, 0, 0, round]);
        if round % 2 == 0 {
            c.disconnect();
        }
    }
    assert_eq!(attached(&place)[0]["volume"], "vol");
    server.terminate();
}

/// Detached and attached again and again, with clients that come at the worst moment.
#[test]
fn clients_that_come_during_a_detach_are_served() {
    let place = Place::file();
    let server = place.serve("64M", &["--linger", "0"]);
    for round in 1..12_u8 {
        let mut c = server.client(Headers::Structured);
        assert_eq!(c.read(0, 512), [round - 1; 512], "round {round}");
        c.write(0, &[round; 512]);
        drop(c);
        crate::nbd_support::pause(Duration::from_millis(u64::from(round) * 7));
    }
    server.terminate();
}

#[test]
fn too_many_clients_are_turned_away() {
    let place = Place::file();
    let server = place.serve("64M", &["--max-connections", "3"]);
    let mut three: Vec<Client> = (0..3).map(|_| server.client(Headers::Structured)).collect();
    for _ in 0..5 {
        let turned_away = Client::try_connect(&server.addr(), "vol", Headers::Structured);
        assert!(turned_away.is_err(), "a fourth client is served");
    }
    for c in &mut three {
        assert_eq!(c.read(0, 512), [0; 512], "those who were there first");
    }
    three.pop().expect("one").disconnect();
    wait_until("there is room again", Duration::from_secs(10), || {
        Client::try_connect(&server.addr(), "vol", Headers::Structured).is_ok()
    });
}

#[test]
fn sockets_of_both_kinds_are_served_and_cleared_away() {
    let place = Place::file();
    let (fresh, stale) = (place.path("fresh.sock"), place.path("stale.sock"));
    drop(UnixListener::bind(&stale).expect("a socket that nobody answers on"));
    let text = |p: &std::path::Path| p.to_str().expect("text").to_owned();
    let (f, s) = (text(&fresh), text(&stale));
    let args = [
        "--unix",
        &f,
        "--listen",
        "127.0.0.1:0",
        "--unix",
        &s,
        "--listen",
        "[::1]:0",
        "--create-size",
        "64M",
        "--volume",
        "vol",
    ];
    let server = place.start(&args);
    assert_eq!(server.uris.len(), 4, "{:?}", server.uris);
    for uri in &server.uris {
        Client::connect(&Addr::of_uri(uri), "vol", Headers::Structured).disconnect();
    }
    // One in use is refused, and goes on.
    let (_, said) = place.try_start(&["--unix", &f]).err().expect("the socket is in use");
    assert!(said.contains(&f), "{said}");
    Client::connect(&Addr::Unix(fresh.clone()), "vol", Headers::Structured).disconnect();
    // So is a file that is no socket.
    std::fs::write(place.path("file"), "precious").expect("a file");
    assert!(place.try_start(&["--unix", &text(&place.path("file"))]).is_err());
    assert_eq!(std::fs::read_to_string(place.path("file")).expect("it is still there"), "precious");
    server.terminate();
    assert!(!fresh.exists() && !stale.exists(), "the sockets are removed at the end");
}

#[test]
fn an_address_that_others_can_reach_must_be_asked_for() {
    let place = Place::file();
    for listen in ["0.0.0.0:0", "[::]:0"] {
        let (status, said) = place.try_start(&["--listen", listen]).err().expect("not without a word");
        assert!(!status.success() && said.contains("--insecure-listen"), "{said}");
    }
    for bad in ["nowhere", "127.0.0.1:99999", ":10809:", ""] {
        let (status, said) = place.try_start(&["--listen", bad]).err().expect("no address");
        assert_eq!(status.code(), Some(2), "{said}");
    }
    // A port that is taken is named.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = taken.local_addr().expect("address").to_string();
    let (status, said) = place.try_start(&["--listen", &addr]).err().expect("the port is taken");
    assert!(status.code() == Some(1) && said.contains(&addr), "{said}");
}

#[test]
fn readiness_and_the_end_are_told() {
    let place = Place::file();
    let path = place.path("notify");
    let socket = UnixDatagram::bind(&path).expect("a socket");
    socket.set_read_timeout(Some(Duration::from_secs(60))).expect("a time-out");
    let mut command = place.command(&["nbd", "--listen", "127.0.0.1:0", "--volume", "v", "--create-size", "64M"]);
    let child = command.env("NOTIFY_SOCKET", &path).stdout(std::process::Stdio::null()).spawn().expect("start");
    let mut child = crate::nbd_support::Ended(child);
    let heard = |word: &str| {
        let mut b = [0; 4096];
        loop {
            let n = socket.recv(&mut b).unwrap_or_else(|e| panic!("{word} is not told: {e}"));
            if String::from_utf8_lossy(&b[..n]).lines().any(|l| l == word) {
                return;
            }
        }
    };
    heard("READY=1");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.0.id().cast_signed()), Signal::SIGINT).expect("SIGINT");
    heard("STOPPING=1");
    assert!(child.0.wait().expect("wait").success());
}

/// A memory store ends with the process; until then it is like any other.
#[test]
fn a_memory_store_serves() {
    let place = Place::new(crate::nbd_support::server::Store::Memory);
    let server = place.serve("64M", &["--linger", "0"]);
    let mut c = server.client(Headers::Extended);
    c.write(12345, &pattern(1, 1, 1, 100_000));
    c.disconnect();
    // Detached meanwhile, or not.
    crate::nbd_support::pause(Duration::from_millis(500));
    assert!(server.client(Headers::Structured).read(12345, 100_000) == pattern(1, 1, 1, 100_000));
    server.terminate();
}
