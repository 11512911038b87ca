//! Clients that mean harm, or are broken, beside one that is good: the good one's data is right and comes in time, the server stays
//! up, and its memory, threads and descriptors stay bounded.

mod nbd_support;
mod support_rng;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nbd_support::client::{Addr, Handshake, Headers, Stream, named};
use nbd_support::proto::{self, cmd, opt};
use nbd_support::requests::{Client, Request};
use nbd_support::server::{Place, Server};
use nbd_support::{pattern, pause, soak, wait_until};
use support_rng::Rng;

const MIB: u64 = 1 << 20;
/// Where the good client is; the others keep to the rest.
const GOOD: u64 = 48 * MIB;
/// Not what a good client should see, but what shows that it is starved, on a machine that others use, too.
const LATEST: Duration = Duration::from_secs(5);

/// The good client.
struct Good {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(u64, Duration)>,
}

impl Good {
    fn start(server: &Server) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (told, addr) = (stop.clone(), server.addr());
        let thread = std::thread::spawn(move || {
            let mut c = Client::connect(&addr, "vol", Headers::Structured);
            let (mut count, mut worst) = (0, Duration::ZERO);
            while count < 60 || !told.load(Ordering::Relaxed) {
                let offset = GOOD + (count * 7 % 61) * 8192;
                let begun = Instant::now();
                c.write(offset, &pattern(offset, 1, count, 8192));
                if count % 16 == 0 {
                    c.flush();
                }
                assert!(
                    c.read(offset, 8192) == pattern(offset, 1, count, 8192),
                    "the good client's data, round {count}"
                );
                if count % 50 == 49 {
                    Self::in_numbers(&mut c, count);
                }
                worst = worst.max(begun.elapsed());
                count += 1;
                pause(Duration::from_millis(1));
            }
            c.disconnect();
            (count, worst)
        });
        Self { stop, thread }
    }

    /// As many outstanding as a file system or a copying program has: 3 MiB.
    fn in_numbers(c: &mut Client, round: u64) {
        for n in 0..96 {
            let offset = GOOD + MIB + n * 32768;
            c.send(Request::write(0, offset, &pattern(offset, 2, round, 32768))).expect("send");
        }
        while c.outstanding() > 0 {
            assert_eq!(c.receive().expect("an answer").error, 0);
        }
        for n in 0..96 {
            c.send(Request::new(cmd::READ, 0, GOOD + MIB + n * 32768, 32768)).expect("send");
        }
        let first = c.outstanding();
        for _ in 0..first {
            assert_eq!(c.receive().expect("an answer").error, 0);
        }
    }

    #[track_caller]
    fn finish(self, what: &str) {
        self.stop.store(true, Ordering::Relaxed);
        let (count, worst) = self.thread.join().expect("the good client");
        println!("{what}: the good client did {count} rounds, the slowest in {worst:?}");
        assert!(worst < LATEST, "{what}: a round took {worst:?}");
    }
}

/// What a server has before the others come, and must have again when they are gone.
struct Ledger {
    threads: u64,
    descriptors: usize,
    rss: u64,
}

impl Ledger {
    /// After some ordinary use: that may leave things behind for later use.
    fn open(server: &Server) -> Self {
        for n in 0..20 {
            let mut c = server.client([Headers::Simple, Headers::Extended][n % 2]);
            c.write(0, &pattern(0, 9, n as u64, 1 << 20));
            c.read(0, 1 << 20);
            c.disconnect();
        }
        pause(Duration::from_millis(300));
        Self { threads: server.threads(), descriptors: server.descriptors(), rss: server.rss_kib() }
    }

    /// Everything was given back, but for this much memory.
    #[track_caller]
    fn close(&self, server: &Server, more_kib: u64) {
        wait_until("threads and descriptors are given back", Duration::from_secs(30), || {
            server.threads() <= self.threads + 1 && server.descriptors() <= self.descriptors + 2
        });
        self.bounded(server, more_kib);
    }

    #[track_caller]
    fn bounded(&self, server: &Server, more_kib: u64) {
        let rss = server.rss_kib();
        assert!(rss < self.rss + more_kib, "memory: {} KiB at first, {rss} KiB now", self.rss);
    }
}

/// Ends with a reset, not with a goodbye.
fn reset(stream: Stream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    if let Stream::Tcp(s) = &stream {
        nix::sys::socket::setsockopt(&s.as_fd(), nix::sys::socket::sockopt::Linger, &linger).expect("SO_LINGER");
    }
}

fn noise(rng: &mut Rng, len: usize) -> Vec<u8> {
    (0..len).map(|_| rng.next().to_le_bytes()[0]).collect()
}

/// A client of one volume in the transmission phase, for hostile hands.
fn through(addr: &Addr, headers: Headers) -> Client {
    Client::connect(addr, "vol", headers)
}

#[test]
fn garbage_half_requests_and_abrupt_ends() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    let ledger = Ledger::open(&server);
    let good = Good::start(&server);
    let addr = server.addr();
    let mut rng = Rng(4711);
    for round in 0..if soak() { 5000 } else { 300 } {
        let headers = [Headers::Simple, Headers::Structured, Headers::Extended][round % 3];
        let len = 1 + rng.below(300) as usize;
        let mut junk = noise(&mut rng, len);
        let mut stream = match round % 6 {
            // Before anything was said; the server may hang up while we still talk.
            0 => addr.connect().expect("connect"),
            1 => Handshake::new(&addr).expect("a greeting").stream,
            // An option with random content, and less of it than was announced.
            2 => {
                let mut h = Handshake::new(&addr).expect("a greeting");
                let option = rng.below(13) as u32;
                let mut b = proto::IHAVEOPT.to_be_bytes().to_vec();
                b.extend_from_slice(&option.to_be_bytes());
                b.extend_from_slice(&(rng.below(400) as u32).to_be_bytes());
                h.stream.write_all(&b).expect("send");
                h.stream
            }
            3 => through(&addr, headers).stream,
            // The beginning of a good request, then nothing or nonsense.
            4 => {
                let mut c = through(&addr, headers);
                let r = Request::write(0, rng.below(MIB), &vec![0x77; 1 + rng.below(70_000) as usize]);
                let mut b = c.header(&r, 1);
                b.extend_from_slice(&r.payload);
                b.truncate(1 + rng.below(b.len() as u64 - 1) as usize);
                c.stream.write_all(&b).expect("send");
                junk.clear();
                c.stream
            }
            // Good requests in numbers, and gone before the answers.
            _ => {
                let mut c = through(&addr, headers);
                c.stream.set_timeout(Some(Duration::from_millis(300))).expect("a time-out");
                for n in 0..40 {
                    let sent = if n % 2 == 0 {
                        c.send(Request::new(cmd::READ, 0, n * 65536, 1 << 20))
                    } else {
                        c.send(Request::write(0, n * 65536, &pattern(n, 3, 3, 65536)))
                    };
                    // Answers that nobody takes fill the pipes, and then no more requests are taken.
                    if sent.is_err() {
                        break;
                    }
                }
                junk.clear();
                c.stream
            }
        };
        let _ = stream.write_all(&junk);
        match rng.below(3) {
            0 => reset(stream),
            1 => drop(stream),
            _ => {
                let _ = stream.shutdown(std::net::Shutdown::Write);
                stream.set_timeout(Some(Duration::from_millis(50))).expect("a time-out");
                let _ = stream.read(&mut [0; 4096]);
            }
        }
    }
    good.finish("garbage");
    // Each of two lanes keeps 64 MiB of buffers, and three groups of up to 32 MiB are on their way, on a slow machine already in the
    // short run. What clients have asked for and not taken would be 1 GiB in it.
    ledger.close(&server, 256 << 10);
    server.terminate();
}

#[test]
fn wrong_magic_ends_that_connection_alone() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    let good = Good::start(&server);
    for headers in [Headers::Simple, Headers::Structured, Headers::Extended] {
        for wrong in [0, proto::REPLY_SIMPLE, proto::REPLY_STRUCTURED, u32::MAX] {
            let mut c = through(&server.addr(), headers);
            let mut b = c.header(&Request::new(cmd::READ, 0, 0, 512), 7);
            b[..4].copy_from_slice(&wrong.to_be_bytes());
            // Behind it one that is right, which must not be answered: nobody knows where requests begin now.
            let mut two = b.clone();
            two.extend(c.header(&Request::write(0, 0, &[0xbb; 512]), 8));
            two.extend([0xbb; 512]);
            c.stream.write_all(&two).expect("send");
            assert!(c.stream.closes_within(Duration::from_secs(20)), "{headers:?} {wrong:#x}");
        }
        // The other kind of header is wrong, too.
        let mut c = through(&server.addr(), headers);
        let other = if headers == Headers::Extended { proto::REQUEST } else { proto::REQUEST_EXT };
        let mut b = c.header(&Request::new(cmd::READ, 0, 0, 512), 7);
        b[..4].copy_from_slice(&other.to_be_bytes());
        b.resize(64, 0);
        c.stream.write_all(&b).expect("send");
        assert!(c.stream.closes_within(Duration::from_secs(20)), "{headers:?}");
    }
    assert_eq!(server.client(Headers::Simple).read(0, 512), [0; 512]);
    good.finish("wrong magic");
}

#[test]
fn huge_lengths_take_no_memory() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    let ledger = Ledger::open(&server);
    let good = Good::start(&server);
    let mut held = Vec::new();
    for n in 0..60_u32 {
        // An option of 4 GiB, and the beginning of it.
        let mut h = Handshake::new(&server.addr()).expect("a greeting");
        let mut b = proto::IHAVEOPT.to_be_bytes().to_vec();
        b.extend_from_slice(&[opt::GO, opt::LIST, opt::INFO, opt::EXPORT_NAME, 99][n as usize % 5].to_be_bytes());
        b.extend_from_slice(&[u32::MAX, 1 << 31, 1 << 24][n as usize % 3].to_be_bytes());
        b.extend_from_slice(&[0; 1000]);
        let _ = h.stream.write_all(&b);
        held.push(h.stream);
    }
    for n in 0..30_usize {
        let headers = [Headers::Simple, Headers::Structured, Headers::Extended][n % 3];
        let mut c = through(&server.addr(), headers);
        let lengths: &[u64] = if headers == Headers::Extended {
            &[1 << 40, u64::MAX, (64 << 20) + 1]
        } else {
            &[u64::from(u32::MAX), 1 << 31]
        };
        let length = lengths[n % lengths.len()];
        let command = [cmd::WRITE, cmd::READ, cmd::CACHE, cmd::BLOCK_STATUS][n % 4];
        let b = c.header(&Request::new(command, 0, 0, length), 1);
        let _ = c.stream.write_all(&b);
        let _ = c.stream.write_all(&[0x11; 5000]);
        held.push(c.stream);
    }
    pause(Duration::from_secs(1));
    ledger.bounded(&server, 128 << 10);
    drop(held);
    good.finish("huge lengths");
    ledger.close(&server, 128 << 10);
    assert_eq!(server.client(Headers::Simple).read(16 * MIB, 512), [0; 512]);
}

#[test]
fn clients_one_after_the_other_leave_nothing_behind() {
    let place = Place::file();
    let server = place.serve("64M", &["--linger", "20"]);
    let ledger = Ledger::open(&server);
    let good = Good::start(&server);
    let count = if soak() { 10_000 } else { 800 };
    let begun = Instant::now();
    for n in 0..count {
        let headers = [Headers::Simple, Headers::Structured, Headers::Extended][n % 3];
        let mut c = through(&server.addr(), headers);
        match n % 4 {
            0 => c.disconnect(),
            1 => reset(c.stream),
            2 => {
                let offset = (n as u64 % 100) * 8192;
                c.write(offset, &pattern(offset, 5, n as u64, 8192));
                assert!(c.read(offset, 8192) == pattern(offset, 5, n as u64, 8192));
            }
            _ => drop(Handshake::new(&server.addr()).expect("a greeting")),
        }
    }
    println!("{count} clients in {:?}", begun.elapsed());
    good.finish("many clients");
    ledger.close(&server, 64 << 10);
    server.terminate();
}

/// Reads by the gigabyte, and nobody takes the answers: the server must stop making them.
#[test]
fn slow_readers_hold_up_no_one() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    let mut c = server.client(Headers::Simple);
    c.write(0, &pattern(0, 2, 2, 32 << 20));
    c.disconnect();
    let ledger = Ledger::open(&server);
    let good = Good::start(&server);
    let mut slow: Vec<Client> =
        (0..12).map(|n| through(&server.addr(), [Headers::Simple, Headers::Structured][n % 2])).collect();
    for c in &mut slow {
        for _ in 0..64 {
            c.send(Request::new(cmd::READ, 0, MIB, 31 * MIB)).expect("a header");
        }
    }
    for _ in 0..30 {
        pause(Duration::from_millis(100));
        // 24 GiB are asked for.
        ledger.bounded(&server, 1 << 20);
    }
    // One of them wakes up, and the others are gone: what it asked for is all there.
    let mut c = slow.pop().expect("one");
    drop(slow);
    for _ in 0..3 {
        let r = c.receive().expect("an answer");
        assert!(r.error == 0 && r.data[..] == pattern(0, 2, 2, 32 << 20)[1 << 20..], "a slow reader's data");
    }
    drop(c);
    good.finish("slow readers");
    // The process keeps what it has had: 64 reads of a chunk each at most, and beside them what packing and collection take.
    ledger.close(&server, (256 + 128) << 10);
    server.terminate();
}

/// Large writes announced by many, whose data does not come.
#[test]
fn slow_writers_hold_up_no_one() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    let ledger = Ledger::open(&server);
    let good = Good::start(&server);
    let mut slow: Vec<Client> =
        (0..40).map(|n| through(&server.addr(), [Headers::Simple, Headers::Extended][n % 2])).collect();
    for c in &mut slow {
        let r = Request { length: 32 * MIB, ..Request::new(cmd::WRITE, 0, 0, 32 * MIB) };
        let b = c.header(&r, 1);
        c.stream.write_all(&b).expect("a header");
        c.stream.write_all(&[0xcc; 10_000]).expect("a beginning");
    }
    pause(Duration::from_secs(2));
    ledger.bounded(&server, 1 << 20);
    // A newcomer is served beside them.
    let mut c = server.client(Headers::Structured);
    c.write(40 * MIB, &pattern(1, 1, 1, 1 << 20));
    assert!(c.read(40 * MIB, 1 << 20) == pattern(1, 1, 1, 1 << 20));
    assert!(c.read(MIB, 65536).iter().all(|b| *b == 0), "what has not come is not written");
    drop((slow, c));
    good.finish("slow writers");
    ledger.close(&server, 256 << 10);
    server.terminate();
}

/// Silent ones take places, until their time is up.
#[test]
fn silent_clients_lose_their_places() {
    let place = Place::file();
    let server = place.serve("64M", &["--max-connections", "20"]);
    let ledger = Ledger::open(&server);
    let good = Good::start(&server);
    wait_until("the good client is in", Duration::from_secs(20), || {
        server.client(Headers::Simple).read(GOOD, 8) != [0; 8]
    });
    let mut silent = Vec::new();
    for n in 0..60 {
        let Ok(mut s) = server.addr().connect() else { continue };
        // Some say a little first.
        if n % 3 == 0 {
            let _ = s.write_all(&[0, 0, 0, 3]);
        } else if n % 3 == 1 {
            let _ = s.write_all(&[&[0, 0, 0, 3][..], &proto::IHAVEOPT.to_be_bytes(), &named("x")].concat());
        }
        silent.push(s);
    }
    // Places are free again for a client that means it, without anyone having left of their own will.
    wait_until("there is room again", Duration::from_secs(60), || {
        Client::try_connect(&server.addr(), "vol", Headers::Structured).is_ok_and(|mut c| c.read(0, 8).len() == 8)
    });
    drop(silent);
    good.finish("silent clients");
    ledger.close(&server, 64 << 10);
    server.terminate();
}
