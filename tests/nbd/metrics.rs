//! `--metrics`, from the outside: every line of it, what it counts, and who cannot disturb it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::nbd_support::client::Headers;
use crate::nbd_support::proto::cmd;
use crate::nbd_support::server::{Place, Server};
use crate::nbd_support::{pattern, pause, wait_until};

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where it says that its metrics are.
fn metrics_of(server: &Server) -> SocketAddr {
    let said = server.said();
    let (_, rest) = said.split_once("metrics are at http://").expect("it says where");
    rest.split_once("/metrics").expect("a path").0.parse().expect("an address")
}

/// What is answered to these bytes, until the connection is closed.
fn say(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("time-out");
    // It may be closed before all is read.
    let _ = stream.write_all(bytes);
    let mut said = Vec::new();
    let _ = stream.read_to_end(&mut said);
    String::from_utf8(said).expect("text")
}

/// The present figures, each line checked.
#[track_caller]
fn scrape(address: SocketAddr) -> Exposition {
    // Figures are gathered at most ten times a second.
    pause(Duration::from_millis(110));
    let said = say(address, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let (head, body) = said.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {said:?}"));
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"), "{head}");
    Exposition::parse(body).unwrap_or_else(|e| panic!("{e} in\n{body}"))
}

/// What a scraper makes of the text, by the rules of OpenMetrics that Prometheus holds to.
#[derive(Debug, Default)]
struct Exposition {
    /// By name with labels, as written.
    samples: BTreeMap<String, f64>,
    /// Those of counters, which never go back.
    counters: BTreeSet<String>,
}

#[derive(Default)]
struct Family<'a> {
    name: &'a str,
    kind: &'a str,
    has_help: bool,
    samples: usize,
}

fn is_name(s: &str) -> bool {
    s.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

/// `a="b",c="d"`; returns the names.
fn labels(mut text: &str) -> Option<Vec<&str>> {
    let mut names = Vec::new();
    while !text.is_empty() {
        let (name, rest) = text.split_once("=\"")?;
        let mut escaped = false;
        let end = rest.find(|c| {
            let ends = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        })?;
        if !is_name(name) || names.contains(&name) {
            return None;
        }
        names.push(name);
        text = &rest[end + 1..];
        if !text.is_empty() {
            text = text.strip_prefix(',').filter(|rest| !rest.is_empty())?;
        }
    }
    Some(names)
}

impl Exposition {
    fn parse(text: &str) -> Result<Self, String> {
        let mut all = Self::default();
        let mut seen = BTreeSet::new();
        let mut family = Family::default();
        let Some(body) = text.strip_suffix("# EOF\n") else { return Err("it has no end".into()) };
        for line in body.lines() {
            let bad = |why: &str| Err(format!("{line:?}: {why}"));
            if let Some(comment) = line.strip_prefix("# ") {
                let mut words = comment.splitn(3, ' ');
                let (Some(what), Some(name), Some(rest)) = (words.next(), words.next(), words.next()) else {
                    return bad("three words are wanted");
                };
                if name != family.name {
                    if !family.name.is_empty() && family.samples == 0 {
                        return bad("the family before has no samples");
                    }
                    if !is_name(name) || !name.starts_with("vb_ublk_") || !seen.insert(name.to_owned()) {
                        return bad("not a name, or one that was there before");
                    }
                    family = Family { name, ..Family::default() };
                }
                if family.samples > 0 {
                    return bad("it comes after its samples");
                }
                match what {
                    "HELP" if !rest.is_empty() && !family.has_help => family.has_help = true,
                    "TYPE" if family.kind.is_empty() && ["gauge", "counter", "info"].contains(&rest) => {
                        family.kind = rest;
                    }
                    "UNIT" if ["bytes", "seconds"].contains(&rest) && name.ends_with(&format!("_{rest}")) => {}
                    _ => return bad("what is this?"),
                }
                continue;
            }
            let Some((series, value)) = line.rsplit_once(' ') else { return bad("a name and a value are wanted") };
            let (name, inner) = match series.split_once('{') {
                Some((name, rest)) => (name, rest.strip_suffix('}').unwrap_or("}")),
                None => (series, ""),
            };
            let suffix = match family.kind {
                "counter" => "_total",
                "info" => "_info",
                "gauge" => "",
                _ => return bad("it comes before its TYPE"),
            };
            if !family.has_help || name.strip_suffix(suffix) != Some(family.name) {
                return bad("it is not of the family that it stands in");
            }
            if labels(inner).is_none() {
                return bad("its labels are none");
            }
            let value = match value.parse::<f64>() {
                Ok(v) if v.is_finite() && v >= 0.0 => v,
                _ => return bad("its value is none"),
            };
            family.samples += 1;
            if family.kind == "counter" {
                all.counters.insert(series.to_owned());
            }
            if all.samples.insert(series.to_owned(), value).is_some() {
                return bad("it is there twice");
            }
        }
        Ok(all)
    }

    /// Of the volume `vol`; without labels where there is no such.
    #[track_caller]
    fn get(&self, name: &str) -> f64 {
        let of_volume = format!("vb_ublk_{name}{{volume=\"vol\"}}");
        let found = self.samples.get(&of_volume).or_else(|| self.samples.get(&format!("vb_ublk_{name}")));
        *found.unwrap_or_else(|| panic!("no {of_volume} in {self:#?}"))
    }

    #[track_caller]
    fn by_op(&self, name: &str, op: &str) -> f64 {
        let series = format!("vb_ublk_{name}{{volume=\"vol\",op=\"{op}\"}}");
        *self.samples.get(&series).unwrap_or_else(|| panic!("no {series} in {self:#?}"))
    }

    fn has_volume(&self) -> bool {
        self.samples.keys().any(|s| s.contains("volume=\"vol\""))
    }

    /// No counter has gone back, or away, since `before`.
    #[track_caller]
    fn follows(&self, before: &Self) {
        for series in &before.counters {
            assert!(self.samples[series] >= before.samples[series], "{series} went back");
        }
    }
}

#[test]
fn the_checker_sees_what_is_wrong() {
    let good =
        "# HELP vb_ublk_a x\n# TYPE vb_ublk_a counter\nvb_ublk_a_total{v=\"a\\\"b\"} 1\nvb_ublk_a_total 2\n# EOF\n";
    let found = Exposition::parse(good).expect("good");
    assert_eq!((found.samples.len(), found.counters.len()), (2, 2));
    for (from, to) in [
        ("# EOF\n", ""),
        ("vb_ublk_a_total 2", "vb_ublk_a_total{v=\"a\\\"b\"} 2"),
        ("vb_ublk_a_total 2", "vb_ublk_a 2"),
        ("vb_ublk_a_total 2", "vb_ublk_a_total{v=\"a} 2"),
        ("vb_ublk_a_total 2", "vb_ublk_a_total{v=\"a\",} 2"),
        ("vb_ublk_a_total 2", "vb_ublk_a_total{v=\"a\",v=\"b\"} 2"),
        ("vb_ublk_a_total 2", "vb_ublk_a_total two"),
        ("vb_ublk_a_total 2", "vb_ublk_a_total NaN"),
        ("vb_ublk_a_total 2", "# HELP vb_ublk_a x"),
        ("vb_ublk_a_total 2", ""),
        ("# TYPE vb_ublk_a counter\n", ""),
        ("# HELP vb_ublk_a x\n", ""),
        ("counter", "number"),
        ("vb_ublk_a ", "b_"),
    ] {
        let bad = good.replace(from, to);
        assert_ne!(bad, good);
        Exposition::parse(&bad).expect_err(&bad);
    }
}

#[test]
fn counters_move_with_what_they_count() {
    let place = Place::file();
    let server = place.serve("64M", &["--metrics", "0", "--linger", "1"]);
    let metrics = metrics_of(&server);
    assert!(metrics.ip().is_loopback(), "{metrics}");
    let idle = scrape(metrics);
    assert!(!idle.has_volume() && idle.get("nbd_clients") == 0.0, "{idle:?}");
    assert!(idle.samples.keys().any(|s| s.starts_with("vb_ublk_build_info{version=")), "{idle:?}");

    let mut c = server.client(Headers::Structured);
    let fresh = scrape(metrics);
    assert_eq!((fresh.get("nbd_clients"), fresh.get("nbd_clients_accepted_total")), (1.0, 1.0));
    assert_eq!((fresh.get("volume_size_bytes"), fresh.get("volume_serving")), (f64::from(64 << 20), 1.0));
    assert_eq!((fresh.get("store_up"), fresh.get("volume_failed"), fresh.get("volume_confirmed")), (1.0, 0.0, 1.0));
    assert_eq!((fresh.by_op("requests_total", "write"), fresh.get("log_syncs_total")), (0.0, 0.0));
    for i in 0..8 {
        c.write(i << 16, &pattern(i << 16, 1, 1, 1 << 16));
    }
    c.flush();
    c.read(0, 4096);
    assert_eq!(c.outcome(cmd::TRIM, 0, 32 << 20, 1 << 20), 0);
    assert_eq!(c.outcome(cmd::WRITE_ZEROES, 0, 40 << 20, 1 << 20), 0);
    // Figures may be a tenth of a second old.
    let mut written = scrape(metrics);
    wait_until("all is counted", PATIENCE, || {
        written = scrape(metrics);
        written.by_op("requests_total", "write_zeroes") > 0.0
    });
    written.follows(&fresh);
    for (op, requests, bytes) in [
        ("write", 8.0, f64::from(8 << 16)),
        ("read", 1.0, 4096.0),
        ("flush", 1.0, 0.0),
        ("discard", 1.0, f64::from(1 << 20)),
        ("write_zeroes", 1.0, f64::from(1 << 20)),
    ] {
        let seen = (written.by_op("requests_total", op), written.by_op("request_bytes_total", op));
        assert_eq!(seen, (requests, bytes), "{op}");
        assert_eq!(written.by_op("request_errors_total", op), 0.0, "{op}");
    }
    assert!(written.get("log_syncs_total") >= 1.0 && written.get("log_used_bytes") > 0.0, "{written:?}");
    assert!(written.get("volume_epoch") >= 1.0, "{written:?}");

    // What people and programs are told is the same.
    let status: serde_json::Value = serde_json::from_str(&place.ok(&["status", "vol", "--json"])).expect("JSON");
    assert_eq!(status["metrics"], metrics.to_string(), "{status}");
    assert_eq!(status["engine"]["requests"]["write"]["bytes"], 8 << 16, "{status}");
    let status = place.ok(&["status", "vol"]);
    for line in
        [&format!("metrics: {metrics}\n"), "    write: 8, 512 KiB\n", "    put if: ", "    space: not counted yet"]
    {
        assert!(status.contains(line), "{line:?} in\n{status}");
    }

    let mut uploaded = scrape(metrics);
    wait_until("it is uploaded", PATIENCE, || {
        uploaded = scrape(metrics);
        uploaded.get("log_pending_bytes") == 0.0
    });
    uploaded.follows(&written);
    assert!(uploaded.by_op("store_requests_total", "put") > written.by_op("store_requests_total", "put"));
    assert!(uploaded.by_op("store_sent_bytes_total", "put") >= f64::from(8 << 16), "{uploaded:?}");
    assert_eq!(uploaded.get("volume_mapped_bytes"), f64::from(8 << 16));

    // A client's lane ends with it; what it has counted does not.
    let mut second = server.client(Headers::Simple);
    c.disconnect();
    second.write(0, &[7; 512]);
    wait_until("the second's write is counted", PATIENCE, || scrape(metrics).by_op("requests_total", "write") == 9.0);
    second.disconnect();
    wait_until("it is detached", PATIENCE, || !scrape(metrics).has_volume());
    assert_eq!(scrape(metrics).get("nbd_clients_accepted_total"), 2.0);
    server.terminate();
    TcpStream::connect(metrics).expect_err("nobody answers any more");

    // What it takes, by kind; of a clone, all of it is its parent's.
    let space = |volume: &str| -> serde_json::Value {
        let info = place.ok(&["volume", "info", volume, "--space", "--json"]);
        serde_json::from_str::<serde_json::Value>(&info).expect("JSON")["space"].clone()
    };
    let own = space("vol");
    let figures =
        |s: &serde_json::Value| ["logical", "mapped", "live", "shared"].map(|k| s[format!("{k}_bytes")].as_u64());
    assert_eq!(figures(&own), [Some(64 << 20), Some(8 << 16), Some(8 << 16), Some(0)], "{own}");
    let sum = ["live", "garbage", "snapshot"].map(|k| own[format!("{k}_bytes")].as_u64().expect("a number"));
    assert!(own["stored_bytes"].as_u64() > Some(8 << 16) && sum[1] > 0 && sum[2] == 0, "{own}");
    place.ok(&["snapshot", "create", "vol", "s"]);
    place.ok(&["clone", "vol@s", "copy"]);
    let copy = space("copy");
    assert_eq!(figures(&copy), [Some(64 << 20), Some(8 << 16), Some(0), Some(8 << 16)], "{copy}");
    assert_eq!(copy["stored_bytes"], 0, "{copy}");
    let said = place.ok(&["volume", "info", "copy", "--space"]);
    assert!(said.contains("space: 64 MiB logical, 512 KiB mapped, 512 KiB of it in chunks of the volumes"), "{said}");
    assert!(!place.ok(&["volume", "info", "copy"]).contains("space:"));
    assert!(place.fails(&["volume", "info", "vol@s", "--space"], 2).contains("name a volume"));
    let said: serde_json::Value =
        serde_json::from_str(&place.ok(&["gc", "copy", "--dry-run", "--json"])).expect("JSON");
    assert_eq!(said["shared_bytes"], 8 << 16, "{said}");
}

#[test]
fn strangers_disturb_neither_metrics_nor_clients() {
    let place = Place::file();
    let server = place.serve("64M", &["--metrics", "127.0.0.1:0"]);
    let metrics = metrics_of(&server);
    let mut c = server.client(Headers::Structured);
    c.write(0, &pattern(0, 1, 1, 8192));
    scrape(metrics);
    let (threads, descriptors) = (server.threads(), server.descriptors());
    let mut held: Vec<TcpStream> = (0..100).map(|_| TcpStream::connect(metrics).expect("connect")).collect();
    // Some say nothing, some something, one byte at a time.
    for (i, stream) in held.iter_mut().enumerate().filter(|(i, _)| i % 2 == 0) {
        let _ = stream.write_all(&b"GET /metrics"[..i % 12]);
    }
    let begun = Instant::now();
    for round in 0..10 {
        scrape(metrics).get("volume_size_bytes");
        c.write(8192, &pattern(8192, 1, round, 4096));
        assert_eq!(c.read(8192, 4096), pattern(8192, 1, round, 4096));
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "they were waited for: {:?}", begun.elapsed());
    assert!(server.descriptors() <= descriptors + 16, "{} now, {descriptors} before", server.descriptors());
    // One more may be a worker of the kernel's, of an io_uring.
    assert!(server.threads() <= threads + 1, "{} threads, {threads} before", server.threads());
    for garbage in [
        &b"\0\xff\xfe\r\n\r\n"[..],
        b"GET /metrics HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n",
        b"GET \x16\x03\x01 HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &[b'x'; 100_000],
        &pattern(0, 9, 9, 100_000),
    ] {
        let said = say(metrics, garbage);
        assert!(said.is_empty() || said.starts_with("HTTP/1.1 4") || said.starts_with("HTTP/1.1 200"), "{said}");
    }
    assert!(say(metrics, b"GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
    assert!(say(metrics, b"POST /metrics HTTP/1.1\r\ncontent-length: 4\r\n\r\nabcd").starts_with("HTTP/1.1 405"));
    scrape(metrics);
    assert_eq!(c.read(0, 8192), pattern(0, 1, 1, 8192));
    c.disconnect();
    // With strangers still connected.
    let late = TcpStream::connect(metrics).expect("connect");
    let begun = Instant::now();
    server.terminate();
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    drop((held, late));
}

#[test]
fn a_port_that_is_taken_ends_it_before_it_serves() {
    let place = Place::file();
    let taken = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = taken.local_addr().expect("an address").to_string();
    // The last line on stderr is the one for people; before it there may be warnings of the log.
    let listen = &["nbd", "--listen", "127.0.0.1:0"];
    let refusal = |command: &mut Command| {
        let out = command.output().expect("start");
        let err = String::from_utf8(out.stderr).expect("text");
        assert!(out.status.code() == Some(1) && out.stdout.is_empty(), "{err}");
        err.lines().last().unwrap_or_default().to_owned()
    };
    let line = refusal(place.command(listen).args(["--metrics", &address]));
    for word in [&address[..], "for metrics", "another process", "--metrics"] {
        assert!(line.contains(word), "{line}");
    }
    assert!(place.fails(&["nbd", "--metrics", "here"], 2).contains("\"here\""));
    // From the environment and the file, too; a port is enough.
    let port = address.rsplit(':').next().expect("a port").to_owned();
    assert!(refusal(place.command(listen).env("VB_UBLK_METRICS", &port)).contains(&address));
    std::fs::write(place.path("config.toml"), format!("metrics = {port}\n")).expect("write");
    assert!(refusal(&mut place.command(listen)).contains(&address));
}
