//! The other side of benchmarks over S3: a server in memory that is as slow as one wants, and the bare SDK in a loop.
//!
//! `s3 serve [--latency-ms N] [--upload-rate BYTES] [--chunks-keep BYTES] [--room BYTES]`: on a free port of 127.0.0.1, which it prints. Every
//! answer comes N ms late; what is put takes its time at so many bytes per second, all requests together. Of chunks only their first bytes
//! are kept, if that is said: the others read as zeros, so that a volume may be larger than the memory. So many bytes of memory are there
//! for large objects from the start: what is put takes as long, whether it is new or in the place of something. It knows one bucket, and what
//! vb-ublk and those that it is measured against ask for: PUT with If-Match and If-None-Match, GET with a range, HEAD, DELETE, multipart
//! uploads, lists of both versions. While there is an object `hold`, chunks that are put wait, and are not even read. What it does not know it
//! names on standard error. Signatures are not looked at. Ends when its standard input does.
//!
//! `s3 put|get --endpoint URL [--objects N] [--size BYTES] [--parallel N]`: so many requests of the bare SDK, so many in flight; prints
//! bytes per second. `get` reads what `put` has put.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Credentials, Region, RequestChecksumCalculation, ResponseChecksumValidation,
};
use aws_sdk_s3::primitives::ByteStream;
use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{CONTENT_RANGE, ETAG, HeaderValue, IF_MATCH, IF_NONE_MATCH, RANGE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio::sync::watch;

const BUCKET: &str = "bench";

/// Bytes that are there already.
struct Whole(Bytes);

impl Body for Whole {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let all = std::mem::take(&mut self.0);
        Poll::Ready((!all.is_empty()).then(|| Ok(Frame::data(all))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.len() as u64)
    }
}

/// The size of the memory of large objects: a chunk of ours, and somewhat more.
const LARGE: usize = (4 << 20) + (64 << 10);

/// Memory for large objects, touched once: fresh memory of a virtual machine costs more than all the rest of a request.
struct Room(Mutex<Vec<Vec<u8>>>);

impl Room {
    fn of(bytes: usize) -> Self {
        Self(Mutex::new((0..bytes.div_ceil(LARGE)).map(|_| vec![1; LARGE]).collect()))
    }

    fn free(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For a body of so many bytes, as far as that is known.
    fn take(self: &Arc<Self>, len: usize) -> Taken {
        let large = (LARGE / 2..=LARGE).contains(&len);
        let mut content = if large { self.free().pop().unwrap_or_default() } else { Vec::new() };
        content.clear();
        content.reserve(if large { LARGE } else { len.min(LARGE) });
        Taken { content, home: large.then(|| Arc::clone(self)) }
    }
}

/// Memory that comes back.
struct Taken {
    content: Vec<u8>,
    home: Option<Arc<Room>>,
}

impl AsRef<[u8]> for Taken {
    fn as_ref(&self) -> &[u8] {
        &self.content
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some(room) = &self.home {
            room.free().push(std::mem::take(&mut self.content));
        }
    }
}

struct Server {
    latency: Duration,
    upload_rate: Option<f64>,
    room: Arc<Room>,
    /// Chunks wait.
    hold: watch::Sender<bool>,
    state: Mutex<State>,
}

/// An object: its length, and as much of it as is kept.
#[derive(Clone)]
struct Object {
    etag: u64,
    kept: Bytes,
    len: usize,
}

impl Object {
    fn bytes(&self, from: usize, to: usize) -> Bytes {
        if to <= self.kept.len() {
            return self.kept.slice(from..to);
        }
        let mut bytes = self.kept.get(from..).unwrap_or_default().to_vec();
        bytes.resize(to - from, 0);
        bytes.into()
    }
}

struct State {
    objects: BTreeMap<String, Object>,
    /// Bytes that are kept of a chunk.
    chunks_keep: usize,
    etag: u64,
    /// Parts of multipart uploads, by upload and number.
    parts: BTreeMap<(u64, u64), Bytes>,
    /// When the last of what is being put will have come.
    busy_until: Instant,
}

fn answer(status: StatusCode, body: impl Into<Bytes>) -> Response<Whole> {
    let mut response = Response::new(Whole(body.into()));
    *response.status_mut() = status;
    response
}

fn refuse(status: StatusCode, code: &str) -> Response<Whole> {
    answer(status, format!("<Error><Code>{code}</Code><Message>{code}</Message></Error>"))
}

fn with_etag(mut response: Response<Whole>, etag: u64) -> Response<Whole> {
    if let Ok(value) = HeaderValue::from_str(&format!("\"{etag:032x}\"")) {
        response.headers_mut().insert(ETAG, value);
    }
    response
}

/// `bytes=3-5`, as the object has it.
fn range_of(header: &str, size: usize) -> Option<(usize, usize)> {
    let (from, to) = header.strip_prefix("bytes=")?.split_once('-')?;
    let from: usize = from.parse().ok()?;
    let to = to.parse().map_or(size, |to: usize| (to + 1).min(size));
    (from < to).then_some((from, to))
}

/// `%2F` and its like; a plus is a plus.
fn unescape(s: &str) -> String {
    let mut out = Vec::new();
    let mut rest = s.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let hex = tail.get(..2).and_then(|h| u8::from_str_radix(std::str::from_utf8(h).ok()?, 16).ok());
        match (first, hex) {
            (b'%', Some(byte)) => {
                out.push(byte);
                rest = &tail[2..];
            }
            _ => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

impl Server {
    async fn serve(&self, request: Request<Incoming>) -> Response<Whole> {
        let (parts, mut body) = request.into_parts();
        if parts.method == Method::PUT && parts.uri.path().contains("/chunks/") {
            let _ = self.hold.subscribe().wait_for(|hold| !hold).await;
        }
        let mut taken = self.room.take(body.size_hint().lower() as usize);
        while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
            let Ok(frame) = frame else { return refuse(StatusCode::BAD_REQUEST, "IncompleteBody") };
            taken.content.extend_from_slice(frame.data_ref().map_or(&[], |d| d));
        }
        let content = Bytes::from_owner(taken);
        tokio::time::sleep(self.latency + self.turn(content.len())).await;
        let path = unescape(parts.uri.path());
        let Some(key) = path.strip_prefix(&format!("/{BUCKET}")).map(|k| k.trim_start_matches('/').to_owned()) else {
            return refuse(StatusCode::NOT_FOUND, "NoSuchBucket");
        };
        let header = |name| parts.headers.get(name).and_then(|v| v.to_str().ok());
        let query = parts.uri.query().unwrap_or_default();
        if key == "hold" {
            self.hold.send_replace(parts.method == Method::PUT);
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(answer) = state.multipart(&parts.method, &key, query, &content) {
            return answer;
        }
        let there = state.objects.get(&key).cloned();
        match parts.method {
            Method::GET if key.is_empty() => list(&state, query),
            Method::HEAD if key.is_empty() => answer(StatusCode::OK, ""),
            Method::HEAD => {
                let Some(there) = there else { return answer(StatusCode::NOT_FOUND, "") };
                // Its length is told, and none of it sent.
                with_etag(answer(StatusCode::OK, there.bytes(0, there.len)), there.etag)
            }
            Method::GET => {
                let Some(there) = there else { return refuse(StatusCode::NOT_FOUND, "NoSuchKey") };
                let Object { etag, len, .. } = there;
                let Some(asked) = header(RANGE) else {
                    return with_etag(answer(StatusCode::OK, there.bytes(0, len)), etag);
                };
                let Some((from, to)) = range_of(asked, len) else {
                    return refuse(StatusCode::RANGE_NOT_SATISFIABLE, "InvalidRange");
                };
                let mut response = answer(StatusCode::PARTIAL_CONTENT, there.bytes(from, to));
                if let Ok(value) = HeaderValue::from_str(&format!("bytes {from}-{}/{len}", to - 1)) {
                    response.headers_mut().insert(CONTENT_RANGE, value);
                }
                with_etag(response, etag)
            }
            Method::PUT => {
                let is = there.map(|o| format!("\"{:032x}\"", o.etag));
                let fits = header(IF_MATCH).is_none_or(|wanted| is.as_deref() == Some(wanted))
                    && (header(IF_NONE_MATCH).is_none() || is.is_none());
                if !fits {
                    return refuse(StatusCode::PRECONDITION_FAILED, "PreconditionFailed");
                }
                with_etag(answer(StatusCode::OK, ""), state.keep(key, content))
            }
            Method::DELETE => {
                state.objects.remove(&key);
                answer(StatusCode::NO_CONTENT, "")
            }
            method => {
                eprintln!("s3: {method} {} is not known here", parts.uri);
                refuse(StatusCode::NOT_IMPLEMENTED, "NotImplemented")
            }
        }
    }

    /// How long so many bytes have to wait until they have come.
    fn turn(&self, bytes: usize) -> Duration {
        let Some(rate) = self.upload_rate else { return Duration::ZERO };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        state.busy_until = state.busy_until.max(now) + Duration::from_secs_f64(bytes as f64 / rate);
        state.busy_until - now
    }
}

impl State {
    /// Keeps an object, and gives it an ETag.
    fn keep(&mut self, key: String, content: Bytes) -> u64 {
        self.etag += 1;
        let len = content.len();
        let keep = if key.contains("/chunks/") { self.chunks_keep.min(len) } else { len };
        // A part of its memory would keep all of it.
        let kept = if keep < len { Bytes::copy_from_slice(&content[..keep]) } else { content };
        self.objects.insert(key, Object { etag: self.etag, kept, len });
        self.etag
    }

    /// What is asked of multipart uploads, if it is that.
    fn multipart(&mut self, method: &Method, key: &str, query: &str, content: &[u8]) -> Option<Response<Whole>> {
        if *method == Method::POST && query.split('&').any(|q| q == "uploads" || q == "uploads=") {
            self.etag += 1;
            let body = format!(
                "<InitiateMultipartUploadResult><UploadId>{}</UploadId></InitiateMultipartUploadResult>",
                self.etag
            );
            return Some(answer(StatusCode::OK, body));
        }
        let upload: u64 = asked(query, "uploadId")?.parse().ok()?;
        let all = (upload, 0)..=(upload, u64::MAX);
        match *method {
            Method::PUT => {
                let number: u64 = asked(query, "partNumber")?.parse().ok()?;
                self.parts.insert((upload, number), Bytes::copy_from_slice(content));
                Some(with_etag(answer(StatusCode::OK, ""), number))
            }
            Method::POST => {
                let whole: Vec<u8> = self.parts.range(all.clone()).flat_map(|(_, part)| part.iter().copied()).collect();
                self.parts.retain(|k, _| !all.contains(k));
                let etag = self.keep(key.to_owned(), whole.into());
                let body = format!(
                    "<CompleteMultipartUploadResult><ETag>\"{etag:032x}\"</ETag></CompleteMultipartUploadResult>"
                );
                Some(answer(StatusCode::OK, body))
            }
            Method::DELETE => {
                self.parts.retain(|k, _| !all.contains(k));
                Some(answer(StatusCode::NO_CONTENT, ""))
            }
            _ => None,
        }
    }
}

/// What a query says of `name`.
fn asked(query: &str, name: &str) -> Option<String> {
    let found = query.split('&').filter_map(|p| p.split_once('=')).find(|(n, _)| *n == name);
    found.map(|(_, v)| unescape(v))
}

fn list(state: &State, query: &str) -> Response<Whole> {
    let asked = |name| asked(query, name);
    let prefix = asked("prefix").unwrap_or_default();
    let after = ["continuation-token", "start-after", "marker"].into_iter().find_map(asked).unwrap_or_default();
    let mut out = format!("<?xml version=\"1.0\"?><ListBucketResult><Name>{BUCKET}</Name>");
    let found: Vec<_> =
        state.objects.iter().filter(|(k, _)| k.starts_with(&prefix) && **k > after).take(1001).collect();
    for (key, Object { etag, len, .. }) in found.iter().take(1000) {
        out += &format!(
            "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>\"{etag:032x}\"</ETag>\
             <Size>{len}</Size></Contents>"
        );
    }
    if let (1001, Some((last, _))) = (found.len(), found.get(999)) {
        out += &format!("<IsTruncated>true</IsTruncated><NextContinuationToken>{last}</NextContinuationToken>");
    } else {
        out += "<IsTruncated>false</IsTruncated>";
    }
    answer(StatusCode::OK, out + "</ListBucketResult>")
}

async fn serve(latency: Duration, upload_rate: Option<f64>, chunks_keep: usize, room: usize) -> std::io::Result<()> {
    let state =
        State { objects: BTreeMap::new(), chunks_keep, etag: 0, parts: BTreeMap::new(), busy_until: Instant::now() };
    let room = Arc::new(Room::of(room));
    let server =
        Arc::new(Server { latency, upload_rate, room, hold: watch::Sender::new(false), state: Mutex::new(state) });
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("http://{}", listener.local_addr()?);
    let accept = async {
        loop {
            let Ok((client, _)) = listener.accept().await else { continue };
            let _ = client.set_nodelay(true);
            let server = Arc::clone(&server);
            tokio::task::spawn(async move {
                let answer = service_fn(|request| {
                    let server = Arc::clone(&server);
                    async move { Ok::<_, Infallible>(server.serve(request).await) }
                });
                // A connection that breaks is its client's to notice.
                let _ = http1::Builder::new().serve_connection(TokioIo::new(client), answer).await;
            });
        }
    };
    let (ended, end) = tokio::sync::oneshot::channel::<()>();
    std::thread::spawn(move || {
        let _ = std::io::Read::read_to_end(&mut std::io::stdin(), &mut Vec::new());
        drop(ended);
    });
    tokio::select! {
        () = accept => Ok(()),
        _ = end => Ok(()),
    }
}

fn client(endpoint: &str) -> Client {
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .endpoint_url(endpoint)
        .force_path_style(true)
        .region(Region::new("us-east-1"))
        .credentials_provider(Credentials::new("bench", "bench", None, None, "bench"))
        .retry_config(RetryConfig::disabled())
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
    Client::from_conf(config.build())
}

/// What the loops of the bare SDK do.
struct Loop {
    put: bool,
    endpoint: String,
    objects: usize,
    size: usize,
    parallel: usize,
}

/// Bytes per second.
async fn run(l: &Loop) -> Result<f64, Box<dyn std::error::Error>> {
    let client = Rc::new(client(&l.endpoint));
    let content = Bytes::from((0..l.size).map(|i| (i * 31 / 7) as u8).collect::<Vec<_>>());
    let begun = Instant::now();
    let requests = (0..l.objects).map(|i| {
        let (client, content) = (client.clone(), content.clone());
        let key = format!("bare/{i:06}");
        async move {
            if l.put {
                let put = client.put_object().bucket(BUCKET).key(key).content_length(l.size as i64);
                put.body(ByteStream::from(content)).send().await?;
            } else {
                let got = client.get_object().bucket(BUCKET).key(key).send().await?;
                let mut body = got.body.into_async_read();
                let mut all = Vec::with_capacity(l.size);
                body.read_to_end(&mut all).await?;
            }
            Ok::<_, Box<dyn std::error::Error>>(())
        }
    });
    let mut running = stream::iter(requests).buffer_unordered(l.parallel);
    while let Some(done) = running.next().await {
        done?;
    }
    Ok((l.objects * l.size) as f64 / begun.elapsed().as_secs_f64())
}

fn main() -> ExitCode {
    match start() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("s3: {e}");
            ExitCode::FAILURE
        }
    }
}

fn start() -> Result<(), Box<dyn std::error::Error>> {
    const USAGE: &str = "usage: s3 serve [--latency-ms N] [--upload-rate BYTES] [--chunks-keep BYTES] [--room BYTES] | s3 put|get --endpoint URL [--objects N] [--size BYTES] [--parallel N]";
    let mut args = std::env::args().skip(1);
    let what = args.next().ok_or(USAGE)?;
    let (mut latency, mut rate, mut keep, mut room, mut endpoint) = (0, None, usize::MAX, 0, String::new());
    let (mut objects, mut size, mut parallel) = (256, 4 << 20, 16);
    while let Some(name) = args.next() {
        let value = args.next().ok_or(USAGE)?;
        match name.as_str() {
            "--latency-ms" => latency = value.parse()?,
            "--upload-rate" => rate = Some(value.parse()?),
            "--chunks-keep" => keep = value.parse()?,
            "--room" => room = value.parse()?,
            "--endpoint" => endpoint = value,
            "--objects" => objects = value.parse()?,
            "--size" => size = value.parse()?,
            "--parallel" => parallel = value.parse()?,
            _ => return Err(USAGE.into()),
        }
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match what.as_str() {
        "serve" => Ok(runtime.block_on(serve(Duration::from_millis(latency), rate, keep, room))?),
        "put" | "get" => {
            let rate = runtime.block_on(run(&Loop { put: what == "put", endpoint, objects, size, parallel }))?;
            println!("{rate:.0}");
            Ok(())
        }
        _ => Err(USAGE.into()),
    }
}
