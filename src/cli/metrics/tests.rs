use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

/// Counts how often it is asked.
struct Fake(Arc<AtomicU64>);

impl Source for Fake {
    fn figures(&self) -> Figures {
        let accepted = self.0.fetch_add(1, Ordering::Relaxed) + 1;
        Figures { server: Some(ServerStatus { accepted, ..ServerStatus::default() }), volumes: Vec::new() }
    }
}

fn started() -> (Exporter, SocketAddr, Arc<AtomicU64>) {
    let listening = Listening::open(parse("0").expect("address")).expect("free");
    let (address, asked) = (listening.address(), Arc::default());
    (listening.answer(Fake(Arc::clone(&asked))).expect("started"), address, asked)
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("connect");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("time-out");
    stream
}

/// What is answered to these bytes, until the connection is closed.
fn say(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = connect(address);
    // It may be closed before all is read.
    let _ = stream.write_all(bytes);
    let mut said = Vec::new();
    let _ = stream.read_to_end(&mut said);
    String::from_utf8_lossy(&said).into_owned()
}

const GET: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";

#[test]
fn addresses_as_people_write_them() {
    for (text, address) in [
        ("9150", "127.0.0.1:9150"),
        ("0", "127.0.0.1:0"),
        ("127.0.0.1:9150", "127.0.0.1:9150"),
        ("0.0.0.0:1", "0.0.0.0:1"),
        ("[::1]:0", "[::1]:0"),
    ] {
        assert_eq!(parse(text).expect(text).to_string(), address);
    }
    for bad in
        ["", "+1", "-1", "65536", "127.0.0.1", "::1", "localhost:1", ":9150", "127.0.0.1:", "1 2", &"9".repeat(10_000)]
    {
        let e = parse(bad).expect_err(bad);
        assert!(e.kind() == ErrorKind::Usage && e.to_string().contains("[::1]:0") && e.to_string().len() < 300, "{e}");
    }
}

#[test]
fn a_port_that_is_taken_is_named() {
    let one = Listening::open(parse("0").expect("address")).expect("free");
    assert_ne!(one.address().port(), 0);
    let e = Listening::open(one.address()).expect_err("taken");
    assert_eq!(e.kind(), ErrorKind::Busy);
    for word in [&one.address().to_string(), "another process", "--metrics"] {
        assert!(e.to_string().contains(word), "{e}");
    }
    assert!(Listening::try_open(one.address()).is_none());
    // No address of any host.
    let e = Listening::open("192.0.2.1:0".parse().expect("address")).expect_err("elsewhere");
    assert!(e.kind() == ErrorKind::Usage && e.to_string().contains("192.0.2.1"), "{e}");
}

#[test]
fn only_a_get_of_metrics_is_answered() {
    let (exporter, address, _) = started();
    let page = say(address, GET);
    for word in [
        "HTTP/1.1 200 OK\r\n",
        "\r\ncontent-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n",
        "# EOF\n",
    ] {
        assert!(page.contains(word), "{word:?} in\n{page}");
    }
    // With a question, as some scrapers put one; and from those of old.
    assert!(say(address, b"GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\n\r\n").contains("200 OK"));
    assert!(say(address, b"GET /metrics HTTP/1.0\r\n\r\n").contains("200 OK"));
    for (request, answer) in [
        ("GET / HTTP/1.1", "404 Not Found"),
        ("GET /metrics/ HTTP/1.1", "404 Not Found"),
        ("POST / HTTP/1.1", "404 Not Found"),
        ("POST /metrics HTTP/1.1", "405 Method Not Allowed\r\nallow: GET\r\n"),
        ("HEAD /metrics HTTP/1.1", "405"),
        ("FROBNICATE /metrics HTTP/1.1", "405"),
        ("GET /metrics HTTP/9.9", "400 Bad Request"),
        ("garbage", "400 Bad Request"),
    ] {
        let said = say(address, format!("{request}\r\nHost: x\r\n\r\n").as_bytes());
        assert!(said.contains(answer) && !said.contains("vb_ublk"), "{request}: {said}");
    }
    let long = format!("GET /metrics HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(MAX_REQUEST));
    assert!(say(address, long.as_bytes()).contains("431"), "headers without end");
    let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1));
    assert!(say(address, many.as_bytes()).contains("431"), "too many headers");
    exporter.end();
}

#[test]
fn figures_are_not_gathered_for_every_call() {
    let (exporter, address, asked) = started();
    let begun = Instant::now();
    for _ in 0..200 {
        assert!(say(address, GET).contains("# EOF\n"));
    }
    let most = begun.elapsed().as_millis() / FRESH.as_millis() + 1;
    assert!(u128::from(asked.load(Ordering::Relaxed)) <= most, "{asked:?} in {:?}", begun.elapsed());
    super::super::pause(FRESH);
    assert!(
        say(address, GET).contains(&format!("vb_ublk_nbd_clients_accepted_total {}\n", asked.load(Ordering::Relaxed)))
    );
    exporter.end();
}

#[test]
fn who_is_idle_makes_place_for_who_asks() {
    let (exporter, address, _) = started();
    let mut idle: Vec<_> = (0..CLIENTS * 4).map(|_| connect(address)).collect();
    for stream in &mut idle {
        let _ = stream.write_all(b"GET /met");
    }
    let begun = Instant::now();
    assert!(say(address, GET).contains("200 OK"));
    assert!(begun.elapsed() < REQUEST, "it has waited for the idle ones: {:?}", begun.elapsed());
    let hung_up = |mut stream: TcpStream| {
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    };
    let last = idle.split_off(CLIENTS * 3);
    idle.into_iter().for_each(hung_up);
    assert!(begun.elapsed() < REQUEST, "who came first has kept a place: {:?}", begun.elapsed());
    // The last ones when their time is over.
    last.into_iter().for_each(hung_up);
    assert!(begun.elapsed() < CONVERSATION * 3, "{:?}", begun.elapsed());
    exporter.end();
}

#[test]
fn it_ends_when_told_to_whoever_is_connected() {
    let (exporter, address, asked) = started();
    let mut slow = connect(address);
    slow.write_all(b"GET /metrics HT").expect("send");
    let idle = connect(address);
    assert!(say(address, GET).contains("200 OK"));
    let begun = Instant::now();
    exporter.end();
    assert!(begun.elapsed() < REQUEST, "{:?}", begun.elapsed());
    assert_eq!(Arc::strong_count(&asked), 1, "it has let go of its source");
    let mut rest = Vec::new();
    let _ = slow.read_to_end(&mut rest);
    assert!(rest.is_empty());
    TcpStream::connect(address).expect_err("nobody listens");
    let _ = idle.shutdown(Shutdown::Both);
}
