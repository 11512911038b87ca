//! An NBD server's export as a target: one connection, on a lane, with simple replies.
//!
//! Invariants:
//! - A request keeps its buffer until its reply has come, or the connection has ended.
//! - Once the connection has failed, every request fails.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::Future;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::str::FromStr;
use std::task::{Poll, Waker};
use std::time::Duration;

use tokio::sync::oneshot;

use super::{Done, Target};
use crate::disk::IoBuf;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::frontend::nbd::wire::client::{
    GREETING, OPTION_REPLY_HEADER, REPLY_HEADER, export_info, go_data, hello, option_reply_header, parse_simple_reply,
    request, say_option,
};
use crate::frontend::nbd::wire::{Command, export_flag, flag, option, reply};
use crate::lane::{Lane, LaneSocket};
use crate::units::{Lba, SECTOR};
use crate::volume::engine::IoFault;

/// Bytes that are received at once: many replies to writes.
const RECEIVED: usize = 64 << 10;
/// The longest reply to an option that is read.
const MAX_OPTION_REPLY: u32 = 64 << 10;
/// The most replies that are read until the server is done.
const MAX_REPLIES: u32 = 64;
/// How long a server may take for each word of the handshake: it may have to attach a volume first.
const HANDSHAKE: Duration = Duration::from_secs(120);

/// Where an export is: `nbd://HOST:PORT/EXPORT`, or `nbd+unix:///EXPORT?socket=PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdUri {
    at: At,
    export: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum At {
    Tcp(String),
    Unix(PathBuf),
}

impl FromStr for NbdUri {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let bad = |why: &str| {
            let what = format!(
                "{s:?} is not the URI of an export: {why}, as in nbd://127.0.0.1:10809/vol-1 or nbd+unix:///vol-1?socket=/run/nbd.sock"
            );
            Error::new(ErrorKind::Usage, what)
        };
        let (scheme, rest) = s.split_once("://").ok_or_else(|| bad("it has no scheme"))?;
        if rest.contains('%') {
            return Err(bad("escapes are not taken"));
        }
        match scheme {
            "nbd" => {
                let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
                if host.is_empty() {
                    return Err(bad("it names no host"));
                }
                // The port may be left out; an IPv6 address has colons of its own.
                let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
                let host = if has_port { host.to_owned() } else { format!("{host}:10809") };
                Ok(Self { at: At::Tcp(host), export: export.to_owned() })
            }
            "nbd+unix" => {
                let (export, socket) = rest.split_once("?socket=").ok_or_else(|| bad("it names no socket"))?;
                let export = export.strip_prefix('/').ok_or_else(|| bad("a unix socket has no host"))?;
                Ok(Self { at: At::Unix(socket.into()), export: export.to_owned() })
            }
            "nbds" | "nbds+unix" => Err(bad("TLS is not spoken here")),
            _ => Err(bad("the scheme must be nbd or nbd+unix")),
        }
    }
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.at {
            At::Tcp(host) => write!(f, "nbd://{host}/{}", self.export),
            At::Unix(path) => write!(f, "nbd+unix:///{}?socket={}", self.export, path.display()),
        }
    }
}

/// A connection that has its export.
#[derive(Debug)]
pub struct Connected {
    fd: OwnedFd,
    /// The export's size in bytes.
    pub size_bytes: u64,
    flags: u16,
}

impl Connected {
    /// Whether it serves these: a server need not, and one that does not may take a flag for nothing.
    ///
    /// # Errors
    /// `Usage`, with what it does not serve.
    pub fn serves(&self, writes: bool, flushes: bool, fua: bool) -> Result<()> {
        let has = |flag| self.flags & flag != 0;
        let missing = match () {
            () if writes && has(export_flag::READ_ONLY) => "writes",
            () if flushes && !has(export_flag::SEND_FLUSH) => "flushes",
            () if fua && !has(export_flag::SEND_FUA) => "FUA",
            () => return Ok(()),
        };
        Err(Error::new(ErrorKind::Usage, format!("the server serves no {missing} of this export")))
    }
}

impl NbdUri {
    /// Connects and chooses the export; blocks.
    ///
    /// # Errors
    /// When nobody answers, or not in NBD, or refuses.
    pub fn connect(&self) -> Result<Connected> {
        match &self.at {
            At::Tcp(host) => {
                let connecting = || format!("connecting to {host}");
                let mut s = TcpStream::connect(host).context(connecting)?;
                s.set_nodelay(true).context(connecting)?;
                s.set_read_timeout(Some(HANDSHAKE)).context(connecting)?;
                let (size_bytes, flags) = self.choose(&mut s)?;
                s.set_read_timeout(None).context(connecting)?;
                Ok(Connected { fd: s.into(), size_bytes, flags })
            }
            At::Unix(path) => {
                let connecting = || format!("connecting to {}", path.display());
                let mut s = UnixStream::connect(path).context(connecting)?;
                s.set_read_timeout(Some(HANDSHAKE)).context(connecting)?;
                let (size_bytes, flags) = self.choose(&mut s)?;
                s.set_read_timeout(None).context(connecting)?;
                Ok(Connected { fd: s.into(), size_bytes, flags })
            }
        }
    }

    fn choose(&self, s: &mut (impl Read + Write)) -> Result<(u64, u16)> {
        let choosing = || format!("asking for export {:?}", self.export);
        let nonsense = |e| Error::new(ErrorKind::Corrupt, choosing()).with_source(e);
        let mut greeting = [0; GREETING];
        s.read_exact(&mut greeting).context(choosing)?;
        let flags = hello(&greeting).map_err(nonsense)?;
        let go = say_option(option::GO, &go_data(&self.export));
        s.write_all(&[&flags[..], &go].concat()).context(choosing)?;
        let mut found = None;
        for reply in 0.. {
            if reply == MAX_REPLIES {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("{}: the server does not come to an end", choosing()),
                ));
            }
            let mut header = [0; OPTION_REPLY_HEADER];
            s.read_exact(&mut header).context(choosing)?;
            let (kind, len) = option_reply_header(&header, option::GO).map_err(nonsense)?;
            if len > MAX_OPTION_REPLY {
                return Err(Error::new(ErrorKind::Corrupt, format!("{}: a reply of {len} bytes", choosing())));
            }
            let mut data = vec![0; len as usize];
            s.read_exact(&mut data).context(choosing)?;
            match kind {
                reply::ACK => break,
                reply::INFO => found = export_info(&data).or(found),
                other => {
                    let words = String::from_utf8_lossy(&data);
                    let what = format!("{}: the server refuses ({other:#x}): {words}", choosing());
                    return Err(Error::new(ErrorKind::NotFound, what));
                }
            }
        }
        found.ok_or_else(|| Error::new(ErrorKind::Corrupt, format!("{}: the server tells no size", choosing())))
    }
}

/// A request that waits for its reply.
struct Pending {
    /// Where what is read goes.
    dst: Option<IoBuf>,
    told: oneshot::Sender<u32>,
}

/// A connection on its lane.
pub struct NbdTarget {
    socket: LaneSocket,
    out: RefCell<Vec<IoBuf>>,
    sender: Cell<Option<Waker>>,
    pending: RefCell<Vec<Option<Pending>>>,
    free: RefCell<Vec<usize>>,
    failed: Cell<bool>,
}

impl NbdTarget {
    /// The connection through the ring of `lane`.
    #[must_use]
    pub fn new(lane: &Lane, connected: Connected) -> Rc<Self> {
        Rc::new(Self {
            socket: LaneSocket::new(lane, connected.fd),
            out: RefCell::default(),
            sender: Cell::default(),
            pending: RefCell::default(),
            free: RefCell::default(),
            failed: Cell::new(false),
        })
    }

    async fn ask(&self, command: Command, fua: bool, lba: Lba, len: usize, buf: Option<IoBuf>) -> Done {
        if self.failed.get() {
            return Err(IoFault::Gone);
        }
        // A workload's requests are of at most 32 MiB.
        let length = u32::try_from(len).map_err(|_| IoFault::BadRange)?;
        let (told, answer) = oneshot::channel();
        let (dst, src) = if command == Command::Read { (buf, None) } else { (None, buf) };
        let pending = Some(Pending { dst, told });
        let at = self.free.borrow_mut().pop();
        let cookie = match at {
            Some(at) => {
                self.pending.borrow_mut()[at] = pending;
                at
            }
            None => {
                let mut all = self.pending.borrow_mut();
                all.push(pending);
                all.len() - 1
            }
        };
        let header = request(command, if fua { flag::FUA } else { 0 }, cookie as u64, lba.0 * SECTOR as u64, length);
        let said = IoBuf::zeroed(header.len());
        said.copy_in(0, &header);
        self.out.borrow_mut().push(said);
        self.out.borrow_mut().extend(src);
        match answer.await {
            Ok(0) => Ok(()),
            Ok(1) => Err(IoFault::ReadOnly),
            Ok(22) => Err(IoFault::BadRange),
            Ok(28) => Err(IoFault::NoSpace),
            Ok(108) | Err(_) => Err(IoFault::Gone),
            Ok(_) => Err(IoFault::Io),
        }
    }

    fn fail(&self, why: &dyn fmt::Display) {
        if !self.failed.replace(true) {
            tracing::error!("the connection has ended: {why}");
        }
        // Who waits hears that nobody will tell.
        self.pending.borrow_mut().clear();
    }

    async fn send(self: Rc<Self>) {
        loop {
            let said = std::future::poll_fn(|cx| {
                let said = self.out.take();
                if said.is_empty() {
                    self.sender.set(Some(cx.waker().clone()));
                    return Poll::Pending;
                }
                Poll::Ready(said)
            })
            .await;
            if let Err(e) = self.socket.send(said, || ()).await {
                self.fail(&e);
                return;
            }
        }
    }

    async fn receive(self: Rc<Self>) {
        let buf = IoBuf::zeroed(RECEIVED);
        let (mut from, mut to) = (0, 0);
        loop {
            let reply = match parse_simple_reply(&buf.bytes()[from..to]) {
                Ok(reply) => reply,
                Err(e) => return self.fail(&e),
            };
            let Some((error, cookie)) = reply else {
                // What is there is the beginning of a reply: to the front with it.
                let rest = buf.bytes()[from..to].to_vec();
                buf.copy_in(0, &rest);
                (from, to) = (0, rest.len());
                match self.socket.recv(buf.slice(to..buf.len()), false).await {
                    Ok(0) => return self.fail(&"the server has hung up"),
                    Ok(n) => to += n,
                    Err(e) => return self.fail(&e),
                }
                continue;
            };
            from += REPLY_HEADER;
            let slot = usize::try_from(cookie).ok();
            let Some(pending) = slot.and_then(|at| self.pending.borrow_mut().get_mut(at)?.take()) else {
                return self.fail(&"a reply to nothing that was asked");
            };
            if let (0, Some(dst)) = (error, &pending.dst) {
                let here = dst.len().min(to - from);
                dst.copy_in(0, &buf.bytes()[from..from + here]);
                from += here;
                if here < dst.len() {
                    match self.socket.recv(dst.slice(here..dst.len()), true).await {
                        Ok(n) if n == dst.len() - here => {}
                        Ok(_) => return self.fail(&"the server has hung up"),
                        Err(e) => return self.fail(&e),
                    }
                }
            }
            self.free.borrow_mut().extend(slot);
            // Who has asked waits for it.
            let _ = pending.told.send(error);
        }
    }
}

impl Target for NbdTarget {
    async fn read(&self, lba: Lba, dst: IoBuf) -> Done {
        self.ask(Command::Read, false, lba, dst.len(), Some(dst)).await
    }

    async fn write(&self, lba: Lba, src: IoBuf, fua: bool) -> Done {
        self.ask(Command::Write, fua, lba, src.len(), Some(src)).await
    }

    async fn flush(&self) -> Done {
        self.ask(Command::Flush, false, Lba(0), 0, None).await
    }

    fn seal(&self) {
        if !self.out.borrow().is_empty()
            && let Some(sender) = self.sender.take()
        {
            sender.wake();
        }
    }

    fn tasks(self: Rc<Self>) -> Vec<Pin<Box<dyn Future<Output = ()>>>> {
        vec![Box::pin(self.clone().send()), Box::pin(self.receive())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_exports_are() {
        let uri = |s: &str| s.parse::<NbdUri>();
        let tcp = |host: &str, export: &str| NbdUri { at: At::Tcp(host.into()), export: export.into() };
        assert_eq!(uri("nbd://127.0.0.1:4/vol").expect("TCP"), tcp("127.0.0.1:4", "vol"));
        assert_eq!(uri("nbd://host").expect("TCP"), tcp("host:10809", ""));
        assert_eq!(uri("nbd://[::1]:7/v").expect("TCP"), tcp("[::1]:7", "v"));
        assert_eq!(uri("nbd://[::1]/v").expect("TCP"), tcp("[::1]:10809", "v"));
        let unix = NbdUri { at: At::Unix("/run/nbd.sock".into()), export: "v@s".into() };
        assert_eq!(uri("nbd+unix:///v@s?socket=/run/nbd.sock").expect("unix"), unix);
        assert_eq!(unix.to_string(), "nbd+unix:///v@s?socket=/run/nbd.sock");
        for bad in [
            "vol",
            "nbd:///v",
            "http://h/v",
            "nbds://h/v",
            "nbd+unix:///v",
            "nbd+unix://h/v?socket=/s",
            "nbd://h/a%20b",
        ] {
            assert_eq!(uri(bad).expect_err(bad).kind(), ErrorKind::Usage);
        }
    }
}
