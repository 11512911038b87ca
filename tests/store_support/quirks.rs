//! Odd, old and broken S3 servers, played by a scripted one.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use vb_ublk::error::ErrorKind;
use vb_ublk::store::retry::{Policy, Retry};
use vb_ublk::store::{Precondition, Store, StoreOptions, Version};

use super::scripted::{Answer, Scripted, Seen};
use super::{open_s3, options};

async fn store(answer: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> (Arc<dyn Store>, Scripted) {
    let server = Scripted::start(answer).await;
    (open_s3("s3://b/p", &options(&server.endpoint)).await, server)
}

fn page(keys: &[&str], more: &str) -> Answer {
    let all: String = keys.iter().map(|k| format!("<Contents><Key>{k}</Key><Size>1</Size></Contents>")).collect();
    let body = format!("<?xml version=\"1.0\"?><ListBucketResult><Name>b</Name>{more}{all}</ListBucketResult>");
    Answer::new("200 OK", "Content-Type: application/xml\r\n", body)
}

#[tokio::test]
async fn a_server_without_ranges_is_understood() {
    let (s, _server) = store(|_| Answer::new("200 OK", "ETag: \"e\"\r\n", "0123456789")).await;
    assert_eq!(&s.get_range("k", 3..6).await.expect("range")[..], b"345");
    assert_eq!(&s.get_range("k", 0..10).await.expect("range")[..], b"0123456789");
    assert_eq!(s.get_range("k", 8..11).await.expect_err("short").kind(), ErrorKind::Corrupt);
}

#[tokio::test]
async fn ranges_are_absolute_and_checked() {
    let (s, server) = store(|seen| match seen.line.as_str() {
        l if l.contains("short") => Answer::new("206 Partial Content", "Content-Range: bytes 3-4/5\r\n", "34"),
        l if l.contains("shifted") => Answer::new("206 Partial Content", "Content-Range: bytes 2-4/9\r\n", "234"),
        l if l.contains("lying") => Answer::new("206 Partial Content", "Content-Range: bytes 3-5/9\r\n", "34"),
        _ => Answer::new("206 Partial Content", "Content-Range: bytes 3-5/9\r\n", "345"),
    })
    .await;
    assert_eq!(&s.get_range("good", 3..6).await.expect("range")[..], b"345");
    for key in ["short", "shifted", "lying"] {
        assert_eq!(s.get_range(key, 3..6).await.expect_err(key).kind(), ErrorKind::Corrupt);
    }
    let seen = server.seen.lock().expect("log");
    assert!(seen[0].headers.contains("range: bytes=3-5\r\n"), "{:?}", seen[0]);
}

#[tokio::test]
async fn puts_are_plain() {
    let (s, server) = store(|_| Answer::new("200 OK", "ETag: \"e1\"\r\n", "")).await;
    s.put("k", Bytes::from_static(b"body")).await.expect("put");
    assert_eq!(s.put_if("k", Bytes::new(), Precondition::Absent).await.expect("put").0, "\"e1\"");
    s.put_if("k", Bytes::new(), Precondition::Matches(Version("\"e1\"".into()))).await.expect("put");
    let seen = server.seen.lock().expect("log");
    let h = &seen[0].headers;
    assert!(seen[0].line.starts_with("PUT /b/p/k") && h.contains("content-length: 4\r\n"), "{:?}", seen[0]);
    // The length is announced, and nothing is sent that a plain server does not know.
    for unwanted in ["transfer-encoding", "aws-chunked", "trailer", "x-amz-checksum", "x-amz-sdk-checksum", "expect"] {
        assert!(!h.contains(unwanted), "{unwanted}: {h}");
    }
    assert!(seen[1].headers.contains("if-none-match: *\r\n"), "{}", seen[1].headers);
    assert!(seen[2].headers.contains("if-match: \"e1\"\r\n"), "{}", seen[2].headers);
}

#[tokio::test]
async fn a_body_that_breaks_off_is_worth_a_retry() {
    let (s, _server) =
        store(|_| Answer::Bytes(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nETag: \"e\"\r\n\r\n01234".to_vec())).await;
    assert_eq!(s.get("k").await.expect_err("broken").kind(), ErrorKind::Unreachable);
    assert_eq!(s.get_range("k", 0..10).await.expect_err("broken").kind(), ErrorKind::Unreachable);
}

#[tokio::test]
async fn a_body_beyond_all_bounds_is_refused() {
    let (s, _server) =
        store(|_| Answer::Bytes(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\nx".to_vec())).await;
    assert_eq!(s.get("k").await.expect_err("too large").kind(), ErrorKind::Corrupt);
}

#[tokio::test]
async fn each_failure_has_its_kind() {
    let cases = [
        ("503 Slow Down", "SlowDown", ErrorKind::Throttled),
        ("507 Insufficient Storage", "InsufficientStorage", ErrorKind::Full),
        ("500 Internal Server Error", "InternalError", ErrorKind::Unreachable),
        ("409 Conflict", "ConditionalRequestConflict", ErrorKind::Conflict),
        ("412 Precondition Failed", "PreconditionFailed", ErrorKind::Conflict),
        ("403 Forbidden", "SignatureDoesNotMatch", ErrorKind::Denied),
        ("501 Not Implemented", "NotImplemented", ErrorKind::Unsupported),
    ];
    for (status, code, kind) in cases {
        let (s, server) = store(move |_| Answer::error(status, code)).await;
        let e = s.put_if("k", Bytes::from_static(b"x"), Precondition::Absent).await.expect_err(code);
        assert_eq!(e.kind(), kind, "{e}");
        assert!(e.to_string().contains(code), "{e}");
        assert_eq!(server.seen.lock().expect("log").len(), 1, "{code}: the client must not retry by itself");
    }
    // Without a body, as proxies answer.
    let (s, _server) = store(|_| Answer::new("502 Bad Gateway", "", "<html>nginx</html>")).await;
    assert_eq!(s.get("k").await.expect_err("proxy").kind(), ErrorKind::Unreachable);
    let (s, _server) = store(|_| Answer::new("200 OK", "", "{}")).await;
    assert_eq!(s.list("", None).await.expect_err("no XML").kind(), ErrorKind::Unreachable);
}

#[tokio::test]
async fn deleting_what_is_not_there_is_no_error() {
    let (s, _server) = store(|_| Answer::error("404 Not Found", "NoSuchKey")).await;
    s.delete("k").await.expect("delete");
    let gone = s.put_if("k", Bytes::new(), Precondition::Matches(Version("\"e\"".into()))).await;
    assert_eq!(gone.expect_err("nothing to match").kind(), ErrorKind::Conflict);
}

#[tokio::test]
async fn a_listing_in_pages_or_in_one_comes_whole() {
    // Never paginated, without a word about truncation, unsorted, ignoring start-after, with a "folder".
    let (s, _server) = store(|_| page(&["p/c", "p/a", "p/", "p/b", "q/x"], "")).await;
    let keys = |l: Vec<vb_ublk::store::ObjectMeta>| l.into_iter().map(|o| o.key).collect::<Vec<_>>();
    assert_eq!(keys(s.list("", None).await.expect("list")), ["a", "b", "c"]);
    assert_eq!(keys(s.list("", Some("a")).await.expect("list")), ["b", "c"]);

    const TRUNCATED: &str = "<IsTruncated>true</IsTruncated>";
    let (s, _server) = store(|seen| match seen.line.as_str() {
        l if l.contains("continuation-token=t1") => page(&["p/c"], ""),
        _ => page(&["p/a", "p/b"], &format!("{TRUNCATED}<NextContinuationToken>t1</NextContinuationToken>")),
    })
    .await;
    assert_eq!(keys(s.list("", None).await.expect("list")), ["a", "b", "c"]);

    // Garage begins behind start-after, and ends at the first key of another prefix.
    let (s, _server) = store(|seen| match seen.line.as_str() {
        l if l.contains("start-after=p%2Fa") => page(&[], ""),
        _ => page(&["p/b/1"], ""),
    })
    .await;
    assert_eq!(keys(s.list("b/", Some("a")).await.expect("list")), ["b/1"]);
    assert_eq!(keys(s.list("b/", Some("c")).await.expect("list")), [""; 0]);

    // Truncated without a token.
    let (s, _server) = store(|seen| match seen.line.as_str() {
        l if l.contains("start-after=p%2Fb") => page(&["p/c"], ""),
        _ => page(&["p/a", "p/b"], TRUNCATED),
    })
    .await;
    assert_eq!(keys(s.list("", None).await.expect("list")), ["a", "b", "c"]);

    // For ever the same page.
    for more in [TRUNCATED.to_owned(), format!("{TRUNCATED}<NextContinuationToken>t</NextContinuationToken>")] {
        let (s, _server) = store(move |_| page(&["p/a"], &more)).await;
        assert_eq!(s.list("", None).await.expect_err("endless").kind(), ErrorKind::Corrupt);
    }
}

#[tokio::test]
async fn silence_ends_at_the_timeout_and_nobody_is_unreachable() {
    let server = Scripted::start(|_| Answer::Silence).await;
    let opts = StoreOptions { request_timeout: Duration::from_millis(300), ..options(&server.endpoint) };
    let s = open_s3("s3://b/p", &opts).await;
    let start = Instant::now();
    assert_eq!(s.get("k").await.expect_err("silence").kind(), ErrorKind::TimedOut);
    assert!(start.elapsed() < Duration::from_secs(5));

    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let nobody = format!("http://{}", listener.local_addr().expect("address"));
    drop(listener);
    for insecure in [false, true] {
        let s = open_s3("s3://b/p", &StoreOptions { insecure, ..options(&nobody) }).await;
        let e = s.get("k").await.expect_err("nobody");
        assert_eq!(e.kind(), ErrorKind::Unreachable, "{e}");
        assert!(e.to_string().contains(&nobody), "{e}");
    }
}

/// The reply to a conditional put is lost; the retry wrapper finds out that it had landed.
#[tokio::test]
async fn a_lost_reply_over_the_wire_is_understood() {
    let puts = AtomicUsize::new(0);
    let server = Scripted::start(move |seen| {
        if seen.line.starts_with("PUT") {
            return match puts.fetch_add(1, Ordering::Relaxed) {
                // Applied, but the connection dies.
                0 => Answer::Bytes(Vec::new()),
                _ => Answer::error("412 Precondition Failed", "PreconditionFailed"),
            };
        }
        Answer::new("200 OK", "ETag: \"mine\"\r\n", "ours")
    })
    .await;
    let s = Retry::new(open_s3("s3://b/p", &options(&server.endpoint)).await, Policy::attach());
    let version = s.put_if("k", Bytes::from_static(b"ours"), Precondition::Absent).await.expect("ours");
    assert_eq!(version.0, "\"mine\"");
}

/// A server that keeps its connections open, in a thread of its own; gives its endpoint.
fn keep_alive_server() -> String {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let endpoint = format!("http://{}", listener.local_addr().expect("address"));
    let serve = |mut stream: std::net::TcpStream| {
        let mut got = Vec::new();
        let mut part = [0; 4096];
        while let Ok(n @ 1..) = stream.read(&mut part) {
            got.extend_from_slice(&part[..n]);
            // GETs alone come here: a request ends with its head.
            if got.ends_with(b"\r\n\r\n") {
                got.clear();
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nETag: \"e\"\r\n\r\nv").expect("answer");
            }
        }
    };
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.expect("accept");
            std::thread::spawn(move || serve(stream));
        }
    });
    endpoint
}

/// A connection that one runtime left open answers only while that runtime runs: another must not use it.
#[test]
fn connections_do_not_cross_runtimes() {
    let build = || tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let endpoint = keep_alive_server();
    for insecure in [false, true] {
        let opts = StoreOptions { insecure, request_timeout: Duration::from_secs(5), ..options(&endpoint) };
        let (one, two) = (build(), build());
        let s = one.block_on(open_s3("s3://b/p", &opts));
        for runtime in [&one, &two, &one] {
            runtime.block_on(s.get("k")).expect("get");
        }
    }
}
