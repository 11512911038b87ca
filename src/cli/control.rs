//! The control socket: other commands ask a daemon. One JSON object per line, each way.
//!
//! `{"op":"status"}` is answered by `{"ok":{…}}`, `{"op":"detach","force":false}` by `{"ok":null}`, and what
//! fails by `{"error":{"kind":"Busy","message":"…"}}`. A detach is only begun by the call; the volume's lock
//! tells when it is over. `{"op":"order","order":{"snapshot":{…}}}` begins something, too, and is answered by the number
//! of a job; `{"op":"job","id":7}` says whether it is done.
//!
//! Invariants:
//! - One client at a time, for at most [`CONVERSATION`] and with requests of at most [`MAX_REQUEST`] bytes:
//!   none can hold up the others for longer, nor take memory.
//! - Nothing that a client sends ends the thread; [`Control::end`] does, whatever its client does.

use std::fs::Permissions;
use std::io::{self, ErrorKind as IoKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::socket::{Shutdown, shutdown};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::state::remove_if_there;
use crate::config::FlushTo;
use crate::error::{Context, Error, ErrorKind, Result};

/// The longest request, in bytes.
const MAX_REQUEST: usize = 4096;
/// The longest answer that a client takes, in bytes.
const MAX_ANSWER: usize = 4 << 20;
/// How long a client may take, from connecting to its last answer.
const CONVERSATION: Duration = Duration::from_secs(5);
/// How long a client waits for an answer: others may be served before it.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
enum Request {
    Status {},
    Detach {
        #[serde(default)]
        force: bool,
    },
    Order {
        order: Order,
    },
    Job {
        id: u64,
    },
}

/// What takes its time: the answer is the number of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Order {
    /// Keep the volume as it is now.
    Snapshot {
        /// The snapshot's name.
        name: String,
        /// The time, in seconds since 1970.
        created: u64,
    },
    /// Make the volume larger.
    Grow {
        /// Its size from then on, in bytes.
        size_bytes: u64,
    },
    /// Bring back the space of what was overwritten or discarded.
    CollectGarbage,
    /// Copy what a clone needs of its parents.
    Flatten,
    /// Keep what was read first as the boot trace of a snapshot.
    KeepTrace {
        /// The snapshot's volume.
        volume: String,
        /// Its name.
        snapshot: String,
    },
    /// Have what has completed survive the loss of power, or of this host.
    Barrier {
        /// How far it goes.
        to: FlushTo,
    },
    /// Delete a snapshot.
    DeleteSnapshot {
        /// Its name.
        name: String,
    },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Ok(Value),
    Error { kind: String, message: String },
}

/// The kinds that a client treats in their own way; all others arrive as `Io`.
const KINDS: [ErrorKind; 9] = [
    ErrorKind::Usage,
    ErrorKind::Busy,
    ErrorKind::Denied,
    ErrorKind::Exists,
    ErrorKind::NotFound,
    ErrorKind::Conflict,
    ErrorKind::Fenced,
    ErrorKind::Unsupported,
    ErrorKind::Internal,
];

/// What a daemon can be asked.
pub(super) trait Daemon: Send + 'static {
    /// Everything about the volume and its device.
    fn status(&self) -> Result<Value>;
    /// Begins to detach; returns at once.
    fn detach(&self, force: bool) -> Result<()>;
    /// Begins something; returns the number of the job.
    fn order(&self, order: &Order) -> Result<u64>;
    /// Whether a job is done; its failure is told once.
    fn is_done(&self, job: u64) -> Result<bool>;
}

/// Makes the socket, for the owner alone. Who calls holds the volume's lock: a socket that is there is a dead one's.
pub(super) fn listen(path: &Path) -> Result<UnixListener> {
    remove_if_there(path).context(|| format!("removing the old {}", path.display()))?;
    // The folder is its owner's alone, so nobody comes in between the two steps.
    let listener = UnixListener::bind(path)
        .and_then(|l| std::fs::set_permissions(path, Permissions::from_mode(0o600)).map(|()| l));
    listener.context(|| format!("making the control socket {}", path.display()))
}

/// What a thread that answers shares with who may end it.
#[derive(Debug, Default)]
struct Ending {
    ended: AtomicBool,
    /// The client that is being answered.
    client: Mutex<Option<UnixStream>>,
}

impl Ending {
    fn client(&self) -> MutexGuard<'_, Option<UnixStream>> {
        // Each change is one assignment.
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A control socket that is answered.
#[derive(Debug)]
pub(super) struct Control {
    listener: UnixListener,
    ending: Arc<Ending>,
    thread: JoinHandle<()>,
}

impl Control {
    /// Answers for as long as the process lives.
    pub(super) fn leave_running(self) {
        drop(self.thread);
    }

    /// Answers no more, hangs up on who is being answered, and has the thread let go of its daemon.
    pub(super) fn end(self) {
        self.ending.ended.store(true, Ordering::Release);
        // Wakes the thread wherever it waits: a listener that is shut down takes no more clients.
        if let Err(e) = shutdown(self.listener.as_raw_fd(), Shutdown::Both) {
            tracing::debug!("shutting down a control socket: {e}");
        }
        if let Some(client) = self.ending.client().take() {
            let _ = client.shutdown(std::net::Shutdown::Both);
        }
        if self.thread.join().is_err() {
            tracing::error!("the thread of a control socket has panicked");
        }
    }
}

/// Starts the thread that answers.
pub(super) fn spawn(listener: UnixListener, daemon: impl Daemon) -> Result<Control> {
    let starting = || "starting the thread of the control socket";
    let ending = Arc::new(Ending::default());
    let (own, shared) = (listener.try_clone().context(starting)?, Arc::clone(&ending));
    let run = move || {
        while !shared.ended.load(Ordering::Acquire) {
            match listener.accept() {
                Ok((stream, _)) => {
                    // Without a second descriptor nobody can hang up on the client; its time is limited all the same.
                    *shared.client() = stream.try_clone().ok();
                    // Who ended it before the client was to be seen has not hung up on it.
                    if !shared.ended.load(Ordering::Acquire)
                        && let Err(e) = converse(&stream, &daemon, CONVERSATION)
                    {
                        tracing::debug!("a client of the control socket: {e}");
                    }
                    *shared.client() = None;
                }
                Err(_) if shared.ended.load(Ordering::Acquire) => return,
                Err(e) => {
                    tracing::warn!("taking a client of the control socket: {e}");
                    super::pause(Duration::from_millis(100));
                }
            }
        }
    };
    let thread = std::thread::Builder::new().name("control".into()).spawn(run).context(starting)?;
    Ok(Control { listener: own, ending, thread })
}

/// Answers one client until it hangs up, breaks the rules or runs out of time.
fn converse(mut stream: &UnixStream, daemon: &impl Daemon, time: Duration) -> io::Result<()> {
    let end = Instant::now() + time;
    let mut got = Vec::with_capacity(256);
    let mut chunk = [0; 1024];
    loop {
        while let Some(at) = got.iter().position(|b| *b == b'\n') {
            let answer = answer(&got[..at], daemon);
            got.drain(..=at);
            send(stream, &answer, end)?;
        }
        if got.len() > MAX_REQUEST {
            let e = Error::new(ErrorKind::Usage, format!("a request has at most {MAX_REQUEST} bytes"));
            return send(stream, &failure(&e), end);
        }
        stream.set_read_timeout(Some(left(end)?))?;
        match stream.read(&mut chunk)? {
            0 => return Ok(()),
            n => got.extend_from_slice(&chunk[..n]),
        }
    }
}

fn left(end: Instant) -> io::Result<Duration> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(IoKind::TimedOut.into()) } else { Ok(left) }
}

fn send(mut stream: &UnixStream, answer: &Answer, end: Instant) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    let mut rest = &line[..];
    while !rest.is_empty() {
        stream.set_write_timeout(Some(left(end)?))?;
        match stream.write(rest)? {
            0 => return Err(IoKind::WriteZero.into()),
            n => rest = &rest[n..],
        }
    }
    Ok(())
}

fn answer(line: &[u8], daemon: &impl Daemon) -> Answer {
    if line.len() > MAX_REQUEST {
        return failure(&Error::new(ErrorKind::Usage, format!("a request has at most {MAX_REQUEST} bytes")));
    }
    let done = match serde_json::from_slice(line) {
        Ok(Request::Status {}) => daemon.status(),
        Ok(Request::Detach { force }) => daemon.detach(force).map(|()| Value::Null),
        Ok(Request::Order { order }) => daemon.order(&order).map(Value::from),
        Ok(Request::Job { id }) => daemon.is_done(id).map(Value::from),
        Err(e) => Err(Error::new(ErrorKind::Usage, "not a request that this version knows").with_source(e)),
    };
    done.map_or_else(|e| failure(&e), Answer::Ok)
}

fn failure(e: &Error) -> Answer {
    Answer::Error { kind: format!("{:?}", e.kind()), message: e.to_string() }
}

/// Asks a daemon for its status.
pub(super) fn status(socket: &Path) -> Result<Value> {
    ask(socket, &Request::Status {})
}

/// Asks a daemon to detach; it only begins to.
pub(super) fn detach(socket: &Path, force: bool) -> Result<()> {
    ask(socket, &Request::Detach { force }).map(drop)
}

/// Orders something of a daemon; returns the number of the job.
pub(super) fn order(socket: &Path, order: &Order) -> Result<u64> {
    let job = ask(socket, &Request::Order { order: order.clone() })?;
    job.as_u64().ok_or_else(|| Error::new(ErrorKind::Corrupt, format!("the daemon's answer {job} is no job's number")))
}

/// Asks a daemon whether a job is done.
pub(super) fn is_done(socket: &Path, job: u64) -> Result<bool> {
    Ok(ask(socket, &Request::Job { id: job })? == Value::Bool(true))
}

fn ask(socket: &Path, request: &Request) -> Result<Value> {
    let asking = || format!("asking the daemon at {}", socket.display());
    let mut stream = UnixStream::connect(socket).context(asking)?;
    let end = Instant::now() + PATIENCE;
    let mut line = serde_json::to_vec(request).map_err(io::Error::from).context(asking)?;
    line.push(b'\n');
    stream.set_write_timeout(Some(PATIENCE)).and_then(|()| stream.write_all(&line)).context(asking)?;
    let mut got = Vec::new();
    let mut chunk = [0; 4096];
    while !got.ends_with(b"\n") {
        let wait = left(end).and_then(|d| stream.set_read_timeout(Some(d))).and_then(|()| stream.read(&mut chunk));
        match wait {
            Ok(n) if n > 0 && got.len() + n <= MAX_ANSWER => got.extend_from_slice(&chunk[..n]),
            Ok(0) => return Err(Error::new(ErrorKind::Io, format!("{}: it hung up without an answer", asking()))),
            Ok(_) => return Err(Error::new(ErrorKind::Corrupt, format!("{}: the answer does not end", asking()))),
            Err(e) if matches!(e.kind(), IoKind::TimedOut | IoKind::WouldBlock) => {
                return Err(Error::new(ErrorKind::TimedOut, format!("{}: no answer within 30 s", asking())));
            }
            Err(e) if e.kind() == IoKind::Interrupted => {}
            Err(e) => return Err(e).context(asking),
        }
    }
    match serde_json::from_slice(&got) {
        Ok(Answer::Ok(v)) => Ok(v),
        Ok(Answer::Error { kind, message }) => {
            let kind = KINDS.into_iter().find(|k| format!("{k:?}") == kind).unwrap_or(ErrorKind::Io);
            Err(Error::new(kind, message))
        }
        Err(e) => {
            Err(Error::new(ErrorKind::Corrupt, format!("{}: the answer makes no sense", asking())).with_source(e))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[derive(Clone, Default)]
    struct Fake {
        detached: Arc<AtomicU32>,
    }

    impl Daemon for Fake {
        fn status(&self) -> Result<Value> {
            Ok(serde_json::json!({ "volume": "v" }))
        }
        fn detach(&self, force: bool) -> Result<()> {
            if !force {
                return Err(Error::new(ErrorKind::Busy, "/dev/ublkb0 is mounted"));
            }
            self.detached.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
        fn order(&self, order: &Order) -> Result<u64> {
            assert_eq!(*order, Order::DeleteSnapshot { name: "s".into() });
            Ok(7)
        }
        fn is_done(&self, job: u64) -> Result<bool> {
            if job == 7 { Ok(true) } else { Err(Error::new(ErrorKind::NotFound, "no such job")) }
        }
    }

    /// What the daemon says to these bytes, until it hangs up or `time` is over.
    fn say(bytes: &[u8], time: Duration) -> (String, io::Result<()>) {
        let (mine, theirs) = UnixStream::pair().expect("pair");
        let bytes = bytes.to_vec();
        let client = std::thread::spawn(move || {
            let mut mine = mine;
            // The daemon may hang up before it has read all.
            let _ = mine.write_all(&bytes);
            let _ = mine.shutdown(std::net::Shutdown::Write);
            let mut said = Vec::new();
            let _ = mine.read_to_end(&mut said);
            String::from_utf8(said).expect("text")
        });
        let ended = converse(&theirs, &Fake::default(), time);
        drop(theirs);
        (client.join().expect("client"), ended)
    }

    #[test]
    fn a_client_asks_over_the_socket() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("v.sock");
        std::fs::write(&path, "left by a dead one").expect("write");
        let listener = listen(&path).expect("listen");
        assert_eq!(std::fs::metadata(&path).expect("meta").permissions().mode() & 0o777, 0o600);
        let fake = Fake::default();
        spawn(listener, fake.clone()).expect("spawn").leave_running();
        assert_eq!(status(&path).expect("status")["volume"], "v");
        let e = detach(&path, false).expect_err("mounted");
        assert_eq!((e.kind(), e.to_string().as_str()), (ErrorKind::Busy, "/dev/ublkb0 is mounted"));
        detach(&path, true).expect("forced");
        assert_eq!(order(&path, &Order::DeleteSnapshot { name: "s".into() }).expect("begun"), 7);
        assert!(is_done(&path, 7).expect("done"));
        assert_eq!(is_done(&path, 8).expect_err("unknown").kind(), ErrorKind::NotFound);
        assert_eq!(fake.detached.load(Ordering::Relaxed), 1);
        let e = status(&dir.path().join("none.sock")).expect_err("none");
        assert_eq!(e.kind(), ErrorKind::NotFound);
    }

    #[test]
    fn it_ends_when_told_to_with_and_without_a_client() {
        for with_client in [false, true] {
            let dir = tempfile::tempdir().expect("dir");
            let path = dir.path().join("v.sock");
            let fake = Fake::default();
            let control = spawn(listen(&path).expect("listen"), fake.clone()).expect("spawn");
            // It has been answered once, and says no more.
            let mut client = with_client.then(|| UnixStream::connect(&path).expect("connect"));
            if let Some(client) = &mut client {
                client.write_all(b"{\"op\":\"status\"}\n").expect("ask");
                let _ = client.read(&mut [0; 100]).expect("answer");
            }
            let begun = Instant::now();
            control.end();
            assert!(begun.elapsed() < CONVERSATION, "{with_client}");
            assert_eq!(Arc::strong_count(&fake.detached), 1, "the thread has let go of the daemon");
            let _ = status(&path).expect_err("nobody answers");
        }
    }

    #[test]
    fn several_requests_in_one_conversation() {
        let (said, ended) = say(b"{\"op\":\"status\"}\n{\"op\":\"detach\"}\n{\"op\":\"sta", CONVERSATION);
        ended.expect("orderly");
        let lines: Vec<_> = said.lines().collect();
        assert_eq!(lines.len(), 2, "{said}");
        assert_eq!(lines[0], r#"{"ok":{"volume":"v"}}"#);
        assert!(lines[1].contains(r#""kind":"Busy""#), "{said}");
    }

    #[test]
    fn garbage_is_answered_with_an_error() {
        let deep = "[".repeat(4000);
        let garbage: [&[u8]; 8] = [
            b"",
            b"{}",
            b"\xff\xfe\0",
            b"{\"op\":\"format\"}",
            b"{\"op\":\"status\",\"x\":1}",
            b"{\"op\":\"detach\",\"force\":\"yes\"}",
            b"null",
            deep.as_bytes(),
        ];
        for bytes in garbage {
            let (said, ended) = say(&[bytes, b"\n{\"op\":\"status\"}\n"].concat(), CONVERSATION);
            ended.expect("orderly");
            let lines: Vec<_> = said.lines().collect();
            assert_eq!(lines.len(), 2, "{bytes:?}: {said}");
            assert!(lines[0].contains(r#""kind":"Usage""#), "{said}");
            assert!(lines[1].contains("\"ok\""), "{said}");
        }
    }

    #[test]
    fn a_request_without_end_is_cut_off() {
        let (said, _) = say(&vec![b'x'; 10 << 20], CONVERSATION);
        assert!(said.contains("at most 4096 bytes"), "{said}");
        let (said, _) = say(&[vec![b' '; MAX_REQUEST + 1], b"\n".to_vec()].concat(), CONVERSATION);
        assert!(said.contains("at most 4096 bytes"), "{said}");
    }

    #[test]
    fn a_silent_client_is_left() {
        let (mine, theirs) = UnixStream::pair().expect("pair");
        let begun = Instant::now();
        let e = converse(&theirs, &Fake::default(), Duration::from_millis(50)).expect_err("time-out");
        assert!(matches!(e.kind(), IoKind::TimedOut | IoKind::WouldBlock), "{e}");
        assert!(begun.elapsed() < CONVERSATION);
        drop(mine);
    }
}
