//! A store that is there and refuses: for a while it is slow, says 503, 507 or 403, or breaks off in its answers. Writes go on, what
//! is on the host is read, what is not waits, and all of it goes on by itself.

mod nbd_support;
#[path = "store_support/s3s.rs"]
mod s3s;
#[path = "store_support/s3s_thread.rs"]
mod s3s_thread;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nbd_support::client::Headers;
use nbd_support::server::{Bucket, Place, Server, Store};
use nbd_support::{pattern, pause, wait_until};
use s3s_thread::S3sThread;

const MIB: u64 = 1 << 20;
/// Of the volume, in the store alone when the trouble begins.
const STORED: u64 = 8 * MIB;
/// So long as the store is in trouble.
const TROUBLE: Duration = Duration::from_secs(4);

/// What the store does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Well,
    /// Each call takes so much longer.
    Slow(Duration),
    /// Each call is answered with this status and S3's word for it.
    Refuses(u16, &'static str),
    /// Answers end after so many bytes.
    BreaksOff(usize),
}

/// Between the program and the server.
struct Proxy {
    addr: SocketAddr,
    mode: Arc<Mutex<Mode>>,
    live: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    fn start(upstream: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let addr = listener.local_addr().expect("address");
        let (mode, live) = (Arc::new(Mutex::new(Mode::Well)), Arc::new(Mutex::new(Vec::new())));
        let of = (Arc::clone(&mode), Arc::clone(&live));
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let of = of.clone();
                std::thread::spawn(move || {
                    // Under the lock: a connection is of one mode.
                    let now = of.0.lock().expect("mode");
                    let mode = *now;
                    let kept = client.try_clone().expect("a handle");
                    of.1.lock().expect("connections").push(kept);
                    drop(now);
                    // Whoever hangs up has been told all that was to be told.
                    let _ = relay(client, upstream, mode);
                });
            }
        });
        Self { addr, mode, live }
    }

    /// From now on; connections from before are cut.
    fn set(&self, mode: Mode) {
        let mut now = self.mode.lock().expect("mode");
        *now = mode;
        for old in self.live.lock().expect("connections").drain(..) {
            let _ = old.shutdown(Shutdown::Both);
        }
    }
}

fn relay(mut client: TcpStream, upstream: SocketAddr, mode: Mode) -> std::io::Result<()> {
    if let Mode::Refuses(status, code) = mode {
        let mut request = Vec::new();
        let mut some = [0; 4096];
        while !request.windows(4).any(|w| w == b"\r\n\r\n") {
            match client.read(&mut some)? {
                0 => return Ok(()),
                n => request.extend_from_slice(&some[..n]),
            }
        }
        let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>no</Message></Error>");
        let head = format!(
            "HTTP/1.1 {status} No\r\nContent-Type: application/xml\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        let body = if request.starts_with(b"HEAD") { "" } else { &body };
        client.write_all(format!("{head}{body}").as_bytes())?;
        client.shutdown(Shutdown::Write)?;
        // Not before the client has read it: a reset would take it away.
        client.set_read_timeout(Some(Duration::from_secs(2)))?;
        while client.read(&mut some)? > 0 {}
        return Ok(());
    }
    let mut server = TcpStream::connect(upstream)?;
    let (mut from, mut to) = (client.try_clone()?, server.try_clone()?);
    let asked = Arc::new(AtomicBool::new(false));
    let asks = Arc::clone(&asked);
    std::thread::spawn(move || {
        let mut some = vec![0; 64 << 10];
        while let Ok(n @ 1..) = from.read(&mut some) {
            asks.store(true, Ordering::Relaxed);
            if to.write_all(&some[..n]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
    });
    let mut some = vec![0; 64 << 10];
    let mut answered = 0;
    loop {
        let n = server.read(&mut some)?;
        if n == 0 {
            return client.shutdown(Shutdown::Both);
        }
        match mode {
            Mode::Slow(by) if asked.swap(false, Ordering::Relaxed) => pause(by),
            Mode::BreaksOff(most) if answered + n > most => {
                client.write_all(&some[..most - answered])?;
                client.shutdown(Shutdown::Both)?;
                return server.shutdown(Shutdown::Both);
            }
            _ => {}
        }
        answered += n;
        client.write_all(&some[..n])?;
    }
}

/// Bytes of the volume that are not in the store yet.
fn pending(place: &Place) -> u64 {
    let said: serde_json::Value = serde_json::from_str(&place.ok(&["status", "vol", "--json"])).expect("JSON");
    said["engine"]["log"]["pending_bytes"].as_u64().expect("a number")
}

/// A server whose volume is in the store alone, for its first part.
fn from_the_store(place: &Place) -> Server {
    let server = place.serve("64M", &[]);
    let mut c = server.client(Headers::Extended);
    for at in (0..STORED).step_by(MIB as usize) {
        c.write(at, &pattern(at, 1, 0, MIB as usize));
    }
    c.disconnect();
    server.terminate();
    place.wipe_host();
    place.serve("64M", &[])
}

fn goes_through(upstream: SocketAddr, name: &'static str, trouble: Mode) {
    let proxy = Proxy::start(upstream);
    let place = Place::new(Store::S3(Bucket::elsewhere(format!("http://{}", proxy.addr), name, s3s::KEYS)));
    let server = from_the_store(&place);
    let mut c = server.client(Headers::Extended);
    let mut other = server.client(Headers::Extended);

    proxy.set(trouble);
    let begun = Instant::now();
    let reader = std::thread::spawn(move || {
        let got = other.read(5 * MIB, MIB as usize);
        assert!(got == pattern(5 * MIB, 1, 0, MIB as usize), "{trouble:?}: a read that waited has other content");
        other.disconnect();
        begun.elapsed()
    });
    // A part of a block that the store has, whose rest has to be there in the end.
    let part = 2 * MIB + 512;
    let mut slowest = Duration::ZERO;
    let mut round = 0;
    while begun.elapsed() < TROUBLE {
        let at = STORED + round % 32 * MIB;
        let asked = Instant::now();
        c.write(at, &pattern(at, 2, round, 64 << 10));
        c.write(part, &pattern(part, 2, round, 512));
        c.flush();
        assert!(c.read(at, 64 << 10) == pattern(at, 2, round, 64 << 10), "{trouble:?}: what was written just now");
        slowest = slowest.max(asked.elapsed());
        round += 1;
        pause(Duration::from_millis(20));
    }
    assert!(slowest < Duration::from_secs(2), "{trouble:?}: {slowest:?} for what needs no store");
    let answers = matches!(trouble, Mode::Slow(_));
    assert!(answers || !reader.is_finished(), "{trouble:?}: a read was answered without the store");
    assert!(answers || pending(&place) > 0, "{trouble:?}: it counts as uploaded");

    proxy.set(Mode::Well);
    let waited = reader.join().expect("the read that waited");
    assert!(!answers || waited > Duration::from_secs(2), "the store was not slow: {waited:?}");
    wait_until("everything is in the store", Duration::from_secs(60), || pending(&place) == 0);
    println!("{trouble:?}: {round} rounds, the slowest in {slowest:?}; the read waited for {waited:?}");
    c.disconnect();
    server.kill9();

    // What the store has, without the host.
    let gone = Duration::from_secs(60);
    place.wipe_host();
    let server = place.serve("64M", &["--force"]);
    let mut c = server.client(Headers::Extended);
    for at in (0..STORED).step_by(MIB as usize) {
        let mut want = pattern(at, 1, 0, MIB as usize);
        if at == 2 * MIB {
            want[512..1024].copy_from_slice(&pattern(part, 2, round - 1, 512));
        }
        assert!(c.read(at, MIB as usize) == want, "{trouble:?}: at {at}");
    }
    for r in round.saturating_sub(32)..round {
        let at = STORED + r % 32 * MIB;
        assert!(c.read(at, 64 << 10) == pattern(at, 2, r, 64 << 10), "{trouble:?}: round {r}");
    }
    c.disconnect();
    let ended = Instant::now();
    server.terminate();
    assert!(ended.elapsed() < gone, "{trouble:?}: the end took {:?}", ended.elapsed());
}

#[test]
fn a_store_that_refuses_for_a_while_costs_nothing() {
    let troubles = [
        ("slow", Mode::Slow(Duration::from_secs(2))),
        ("throttled", Mode::Refuses(503, "SlowDown")),
        ("full", Mode::Refuses(507, "InsufficientStorage")),
        ("denied", Mode::Refuses(403, "AccessDenied")),
        ("skewed", Mode::Refuses(403, "RequestTimeTooSkewed")),
        ("half", Mode::BreaksOff(150)),
        ("half-body", Mode::BreaksOff(900)),
    ];
    let server = S3sThread::start(&troubles.map(|t| t.0));
    let upstream: SocketAddr =
        server.endpoint.strip_prefix("http://").expect("an address").parse().expect("an address");
    // Side by side: they wait, for the most part.
    let all = troubles.map(|(bucket, t)| std::thread::spawn(move || goes_through(upstream, bucket, t)));
    let failed: Vec<_> = all.into_iter().filter_map(|t| t.join().err()).collect();
    server.stop();
    assert!(failed.is_empty(), "{} of the troubles cost something", failed.len());
}
