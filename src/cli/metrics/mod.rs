//! `--metrics`: the figures of `status` for Prometheus, over HTTP.
//!
//! - [`text`]: the figures as text.
//!
//! Invariants:
//! - It has a thread of its own, and takes no lock for longer than `status` does; lanes never wait for a client. However often somebody
//!   asks, figures are gathered at most ten times a second.
//! - What clients can make it hold is bounded: so many of them, each for so long, with headers of such a size. Who comes when there are too
//!   many takes the place of who came first: a scrape takes a moment, so who is displaced is idle or slow.
//! - It ends when it is told to, whoever is connected, and lets go of what it looks at.

mod text;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::ready;
use std::io::ErrorKind as IoKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::{AbortHandle, JoinSet};

use super::engine::VolumeStatus;
use super::phase::Phase;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::frontend::nbd::ServerStatus;

/// Clients at once.
const CLIENTS: usize = 8;
/// How long a client may take, from connecting to the last byte of its answer.
const CONVERSATION: Duration = Duration::from_secs(10);
/// How long of that for its request.
const REQUEST: Duration = Duration::from_secs(5);
/// The longest request in bytes: the least that the library takes.
const MAX_REQUEST: usize = 8192;
const MAX_HEADERS: usize = 64;
/// How long an answer is given again before figures are gathered anew.
const FRESH: Duration = Duration::from_millis(100);
/// After an error that may last (no descriptors left).
const REST: Duration = Duration::from_millis(100);
/// The process is locked in memory, stacks and all: this one is as large as it has to be.
const STACK: usize = 512 << 10;
const PATH: &str = "/metrics";

/// What a server tells of itself.
#[derive(Debug, Clone, Default)]
pub(super) struct Figures {
    pub(super) volumes: Vec<VolumeFigures>,
    /// Of an NBD server.
    pub(super) server: Option<ServerStatus>,
}

/// What it tells of a volume.
#[derive(Debug, Clone)]
pub(super) struct VolumeFigures {
    pub(super) name: String,
    pub(super) phase: Phase,
    /// What the engine says, once the volume is attached.
    pub(super) engine: Option<VolumeStatus>,
}

/// Who has the figures.
pub(super) trait Source: Send + Sync + 'static {
    /// The figures now; blocks for no longer than a look at them takes.
    fn figures(&self) -> Figures;
}

/// An address as people write it: `9150`, which is this host's alone, `127.0.0.1:9150`, `[::1]:0`.
///
/// # Errors
/// `Usage`.
pub(super) fn parse(text: &str) -> Result<SocketAddr> {
    let port = || text.parse().map(|port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
    // A sign is no part of a port.
    let bare = text.bytes().all(|b| b.is_ascii_digit());
    let parsed = if bare { port().ok() } else { text.parse().ok() };
    parsed.ok_or_else(|| {
        let shown: String = text.chars().take(80).collect();
        let what = format!(
            "{shown:?} is not an address for metrics: give a port, or an address of this host with a port, as in 9150, 127.0.0.1:9150 \
             or [::1]:0"
        );
        Error::new(ErrorKind::Usage, what)
    })
}

/// An open socket that nobody is answered on yet.
#[derive(Debug)]
pub(super) struct Listening {
    listener: TcpListener,
    address: SocketAddr,
}

impl Listening {
    /// Opens it. An address that other hosts reach is taken with a warning: they can read figures and names of volumes there, and
    /// change nothing. (`nbd --insecure-listen` says that strangers may read and write every volume; to want that word for this would
    /// have people give it.)
    ///
    /// # Errors
    /// `Busy` for an address that is in use, `Usage` for one of another host, those of the system.
    pub(super) fn open(address: SocketAddr) -> Result<Self> {
        let what = || format!("listening on {address} for metrics");
        let listener = TcpListener::bind(address).map_err(|e| match e.kind() {
            IoKind::AddrInUse => {
                let why = "another process does so already; choose another port with --metrics, or 0 for a free one";
                Error::new(ErrorKind::Busy, format!("{}: {why}", what()))
            }
            IoKind::AddrNotAvailable => {
                Error::new(ErrorKind::Usage, format!("{}: it is not an address of this host", what()))
            }
            _ => Error::io(what(), e),
        })?;
        listener.set_nonblocking(true).context(what)?;
        let address = listener.local_addr().context(what)?;
        if !address.ip().to_canonical().is_loopback() {
            tracing::warn!(
                "metrics at http://{address}{PATH} are for everybody who reaches that address: names and figures of volumes, without a \
                 password"
            );
        }
        Ok(Self { listener, address })
    }

    /// The same where metrics matter less than a device that comes back: what fails is said, and there are none.
    pub(super) fn try_open(address: SocketAddr) -> Option<Self> {
        Self::open(address).inspect_err(|e| tracing::warn!("{e}: there are no metrics until the next start")).ok()
    }

    /// Where it is.
    pub(super) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers on a thread of its own.
    ///
    /// # Errors
    /// When the system has no thread or descriptor to give.
    pub(super) fn answer(self, source: impl Source) -> Result<Exporter> {
        let starting = || "starting the thread that answers for metrics";
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context(starting)?;
        let (end, ended) = oneshot::channel();
        let Self { listener, address } = self;
        let page = Arc::new(Page { source, last: Mutex::default() });
        let run = move || {
            runtime.block_on(async move {
                match tokio::net::TcpListener::from_std(listener) {
                    Ok(listener) => accept(&listener, &page, ended).await,
                    Err(e) => tracing::error!("listening on {address} for metrics: {e}: there are none"),
                }
            });
        };
        let thread = std::thread::Builder::new().name("metrics".into()).stack_size(STACK).spawn(run);
        tracing::info!("metrics are at http://{address}{PATH}");
        Ok(Exporter { end, thread: thread.context(starting)? })
    }
}

/// A socket that is answered on.
#[derive(Debug)]
pub(super) struct Exporter {
    end: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl Exporter {
    /// Answers no more, hangs up on who is connected, and lets go of the source.
    pub(super) fn end(self) {
        // A thread that is gone needs no telling.
        let _ = self.end.send(());
        if self.thread.join().is_err() {
            tracing::error!("the thread that answers for metrics has panicked");
        }
    }
}

/// Takes clients until it is told to end; those that are there go with it.
async fn accept<S: Source>(listener: &tokio::net::TcpListener, page: &Arc<Page<S>>, ended: oneshot::Receiver<()>) {
    let mut ended = pin!(ended);
    let mut clients = JoinSet::new();
    let mut oldest_first: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let taken = tokio::select! {
            biased;
            _ = &mut ended => return,
            Some(_) = clients.join_next() => continue,
            taken = listener.accept() => taken,
        };
        match taken {
            Ok((stream, _)) => {
                oldest_first.retain(|client| !client.is_finished());
                if oldest_first.len() >= CLIENTS
                    && let Some(oldest) = oldest_first.pop_front()
                {
                    oldest.abort();
                }
                oldest_first.push_back(clients.spawn(converse(stream, Arc::clone(page))));
                // Its request may be there already: it is answered before the next client could take its place.
                tokio::task::yield_now().await;
            }
            Err(e) => {
                tracing::warn!("taking a client for metrics: {e}");
                tokio::time::sleep(REST).await;
            }
        }
    }
}

/// Answers one request of a client.
async fn converse<S: Source>(stream: TcpStream, page: Arc<Page<S>>) {
    let service = service_fn(move |request| ready(Ok::<_, Infallible>(page.respond(&request))));
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST)
        .max_buf_size(MAX_REQUEST)
        .max_headers(MAX_HEADERS)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CONVERSATION, served).await {
        Ok(Ok(())) => {}
        Ok(Err(e)) => tracing::debug!("a client for metrics: {e}"),
        Err(_) => tracing::debug!("a client for metrics took too long"),
    }
}

/// What is shown, and when it was made.
struct Page<S> {
    source: S,
    last: Mutex<Option<(Instant, String)>>,
}

impl<S: Source> Page<S> {
    fn text(&self) -> Result<String, std::fmt::Error> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, text)) = &*last
            && at.elapsed() < FRESH
        {
            return Ok(text.clone());
        }
        let text = text::of(self.source.figures())?;
        *last = Some((Instant::now(), text.clone()));
        Ok(text)
    }

    fn respond<B>(&self, request: &Request<B>) -> Response<String> {
        let mut response = Response::new(String::new());
        let (status, body) = match (request.uri().path(), request.method()) {
            (PATH, &Method::GET) => match self.text() {
                Ok(text) => {
                    response.headers_mut().insert(CONTENT_TYPE, text::CONTENT_TYPE);
                    response.headers_mut().insert(CACHE_CONTROL, hyper::header::HeaderValue::from_static("no-store"));
                    (StatusCode::OK, text)
                }
                Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, format!("writing the metrics: {e}\n")),
            },
            (PATH, _) => {
                response.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET"));
                (StatusCode::METHOD_NOT_ALLOWED, "only GET is for metrics\n".to_owned())
            }
            _ => (StatusCode::NOT_FOUND, format!("metrics are at {PATH}\n")),
        };
        *response.status_mut() = status;
        *response.body_mut() = body;
        response
    }
}

#[cfg(test)]
mod tests;
