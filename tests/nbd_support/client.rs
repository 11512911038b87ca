//! The handshake of a blocking NBD client over std sockets. It checks what the server says, and panics where that is against the
//! protocol; what the protocol allows a server to refuse is a value.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use super::proto::{self, can, info, opt, rep};
use super::requests::Client;

/// Longer than anything takes on a busy machine: a server that does not answer fails the test and does not hang it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Addr {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Addr {
    /// Reads what `vb-ublk nbd` prints.
    pub(crate) fn of_uri(uri: &str) -> Self {
        let (scheme, rest) = uri.split_once("://").unwrap_or_else(|| panic!("not a URI: {uri:?}"));
        match scheme {
            "nbd" | "nbds" => Self::Tcp(rest.trim_end_matches('/').parse().expect("an address and a port")),
            "nbd+unix" | "nbds+unix" => {
                Self::Unix(rest.strip_prefix("/?socket=").expect("the path of a socket").into())
            }
            _ => panic!("not the URI of an NBD server: {uri:?}"),
        }
    }

    pub(crate) fn connect(&self) -> io::Result<Stream> {
        let s = match self {
            Self::Tcp(a) => {
                let s = TcpStream::connect(a)?;
                s.set_nodelay(true)?;
                Stream::Tcp(s)
            }
            Self::Unix(p) => Stream::Unix(UnixStream::connect(p)?),
        };
        s.set_timeout(Some(PATIENCE))?;
        Ok(s)
    }

    /// The URI that other clients take, with an export's name.
    pub(crate) fn uri(&self, export: &str) -> String {
        match self {
            Self::Tcp(a) => format!("nbd://{a}/{export}"),
            Self::Unix(p) => format!("nbd+unix:///{export}?socket={}", p.display()),
        }
    }
}

/// A connection.
#[derive(Debug)]
pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    pub(crate) fn set_timeout(&self, t: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(s) => s.set_read_timeout(t).and_then(|()| s.set_write_timeout(t)),
            Self::Unix(s) => s.set_read_timeout(t).and_then(|()| s.set_write_timeout(t)),
        }
    }

    pub(crate) fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match self {
            Self::Tcp(s) => s.shutdown(how),
            Self::Unix(s) => s.shutdown(how),
        }
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(s) => Self::Tcp(s.try_clone()?),
            Self::Unix(s) => Self::Unix(s.try_clone()?),
        })
    }

    pub(crate) fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut b = [0; N];
        self.read_exact(&mut b)?;
        Ok(b)
    }

    pub(crate) fn vec(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut b = vec![0; len];
        self.read_exact(&mut b)?;
        Ok(b)
    }

    /// Whether the server closes the connection within `t`; what it still says is dropped.
    pub(crate) fn closes_within(&mut self, t: Duration) -> bool {
        let until = std::time::Instant::now() + t;
        let mut rest = [0; 4096];
        loop {
            let left = until.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() || self.set_timeout(Some(left)).is_err() {
                return false;
            }
            match self.read(&mut rest) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(e) => match e.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => return false,
                    io::ErrorKind::Interrupted => {}
                    _ => return true,
                },
            }
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.read(buf),
            Self::Unix(s) => s.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.write(buf),
            Self::Unix(s) => s.write(buf),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How replies look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Headers {
    Simple,
    Structured,
    Extended,
}

/// The replies to an option, by kind, or the error that it was refused with.
pub(crate) type OptionAnswer = Result<Vec<(u32, Vec<u8>)>, u32>;

/// What a server says of an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Info {
    pub(crate) size: u64,
    pub(crate) flags: u16,
    pub(crate) name: Option<String>,
    pub(crate) description: Option<String>,
    /// Minimum, preferred, maximum.
    pub(crate) blocks: Option<(u32, u32, u32)>,
}

/// A connection before it is about an export.
#[derive(Debug)]
pub(crate) struct Handshake {
    pub(crate) stream: Stream,
    no_zeroes: bool,
    pub(crate) headers: Headers,
    /// The id of `base:allocation`, and the export it was asked for.
    context: Option<(u32, String)>,
}

impl Handshake {
    /// Connects, and exchanges greetings.
    pub(crate) fn new(addr: &Addr) -> io::Result<Self> {
        Self::with_flags(addr, proto::FIXED_NEWSTYLE | proto::NO_ZEROES)
    }

    /// The same with these of the client's flags.
    pub(crate) fn with_flags(addr: &Addr, flags: u16) -> io::Result<Self> {
        let mut stream = addr.connect()?;
        assert_eq!(u64::from_be_bytes(stream.array()?), proto::NBDMAGIC, "the greeting");
        assert_eq!(u64::from_be_bytes(stream.array()?), proto::IHAVEOPT, "the newstyle greeting");
        let server = u16::from_be_bytes(stream.array()?);
        assert_eq!(server, proto::FIXED_NEWSTYLE | proto::NO_ZEROES, "the handshake's flags");
        stream.write_all(&u32::from(flags).to_be_bytes())?;
        Ok(Self { stream, no_zeroes: flags & proto::NO_ZEROES != 0, headers: Headers::Simple, context: None })
    }

    /// Sends an option without waiting for its answer.
    pub(crate) fn send_option(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let mut b = proto::IHAVEOPT.to_be_bytes().to_vec();
        b.extend_from_slice(&option.to_be_bytes());
        b.extend_from_slice(&u32::try_from(data.len()).expect("an option's length").to_be_bytes());
        b.extend_from_slice(data);
        self.stream.write_all(&b)
    }

    /// Sends an option; what came before its last answer, or the error that it was refused with.
    pub(crate) fn option(&mut self, option: u32, data: &[u8]) -> io::Result<OptionAnswer> {
        self.send_option(option, data)?;
        let mut all = Vec::new();
        loop {
            let (kind, data) = self.option_reply(option)?;
            match kind {
                rep::ACK => {
                    assert!(data.is_empty(), "an acknowledgement has no data");
                    return Ok(Ok(all));
                }
                k if k & rep::ERROR != 0 => {
                    std::str::from_utf8(&data).expect("an option's error says why, in UTF-8");
                    return Ok(Err(k));
                }
                k => all.push((k, data)),
            }
            assert!(all.len() < 100_000, "no end of answers");
        }
    }

    fn option_reply(&mut self, option: u32) -> io::Result<(u32, Vec<u8>)> {
        assert_eq!(u64::from_be_bytes(self.stream.array()?), proto::OPTION_REPLY, "the magic of an option's reply");
        assert_eq!(u32::from_be_bytes(self.stream.array()?), option, "the reply is to another option");
        let kind = u32::from_be_bytes(self.stream.array()?);
        let len = u32::from_be_bytes(self.stream.array()?);
        assert!(len < 1 << 20, "an option's reply of {len} bytes");
        Ok((kind, self.stream.vec(len as usize)?))
    }

    /// The names of all exports.
    pub(crate) fn list(&mut self) -> io::Result<Result<Vec<String>, u32>> {
        Ok(self.option(opt::LIST, &[])?.map(|all| {
            let name = |(kind, data): (u32, Vec<u8>)| {
                assert_eq!(kind, rep::SERVER);
                let (len, rest) = data.split_first_chunk::<4>().expect("a length");
                let len = u32::from_be_bytes(*len) as usize;
                String::from_utf8(rest[..len].to_vec()).expect("a name")
            };
            all.into_iter().map(name).collect()
        }))
    }

    /// Asks for structured replies.
    pub(crate) fn structured(&mut self) -> io::Result<Result<(), u32>> {
        let r = self.option(opt::STRUCTURED_REPLY, &[])?.map(|all| assert!(all.is_empty()));
        if r.is_ok() {
            self.headers = self.headers.max(Headers::Structured);
        }
        Ok(r)
    }

    /// Asks for extended headers.
    pub(crate) fn extended(&mut self) -> io::Result<Result<(), u32>> {
        let r = self.option(opt::EXTENDED_HEADERS, &[])?.map(|all| assert!(all.is_empty()));
        if r.is_ok() {
            self.headers = Headers::Extended;
        }
        Ok(r)
    }

    /// `LIST_META_CONTEXT` or `SET_META_CONTEXT`: ids and names.
    pub(crate) fn meta(
        &mut self,
        option: u32,
        export: &str,
        queries: &[&str],
    ) -> io::Result<Result<Vec<(u32, String)>, u32>> {
        let mut data = named(export);
        data.extend_from_slice(&u32::try_from(queries.len()).expect("queries").to_be_bytes());
        for q in queries {
            data.extend(named(q));
        }
        let all = self.option(option, &data)?.map(|all| {
            let context = |(kind, data): (u32, Vec<u8>)| {
                assert_eq!(kind, rep::META_CONTEXT);
                let (id, name) = data.split_first_chunk::<4>().expect("an id");
                (u32::from_be_bytes(*id), String::from_utf8(name.to_vec()).expect("a context's name"))
            };
            all.into_iter().map(context).collect::<Vec<_>>()
        });
        if option == opt::SET_META_CONTEXT {
            let found = all.as_ref().ok().and_then(|v| v.iter().find(|(_, n)| n == "base:allocation"));
            self.context = found.map(|(id, _)| (*id, export.to_owned()));
        }
        Ok(all)
    }

    fn about(&mut self, option: u32, export: &str, asked: &[u16]) -> io::Result<Result<Info, u32>> {
        let mut data = named(export);
        data.extend_from_slice(&u16::try_from(asked.len()).expect("requests").to_be_bytes());
        for a in asked {
            data.extend_from_slice(&a.to_be_bytes());
        }
        Ok(self.option(option, &data)?.map(|all| read_infos(&all)))
    }

    /// What an export is.
    pub(crate) fn info(&mut self, export: &str) -> io::Result<Result<Info, u32>> {
        self.about(opt::INFO, export, &[info::NAME, info::DESCRIPTION, info::BLOCK_SIZE])
    }

    /// Begins with an export; the handshake goes on when it is refused.
    pub(crate) fn try_go(mut self, export: &str) -> io::Result<Result<Client, (Self, u32)>> {
        let asked = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE];
        Ok(match self.about(opt::GO, export, &asked)? {
            Ok(info) => {
                let context = self.context.filter(|(_, of)| of == export).map(|(id, _)| id);
                Ok(Client::new(self.stream, self.headers, info, context))
            }
            Err(e) => Err((self, e)),
        })
    }

    /// Begins with an export.
    #[track_caller]
    pub(crate) fn go(self, export: &str) -> Client {
        match self.try_go(export).expect("NBD_OPT_GO") {
            Ok(client) => client,
            Err((_, e)) => panic!("export {export:?} is refused: {}", e - rep::ERROR),
        }
    }

    /// Begins with an export the old way. A server that has none of the name closes the connection.
    pub(crate) fn export_name(mut self, export: &str) -> io::Result<Client> {
        self.send_option(opt::EXPORT_NAME, export.as_bytes())?;
        let size = u64::from_be_bytes(self.stream.array()?);
        let flags = u16::from_be_bytes(self.stream.array()?);
        if !self.no_zeroes {
            assert_eq!(self.stream.array::<124>()?, [0; 124], "the old zeros");
        }
        let context = self.context.filter(|(_, of)| of == export).map(|(id, _)| id);
        Ok(Client::new(self.stream, self.headers, Info { size, flags, ..Info::default() }, context))
    }
}

/// A string behind its length.
pub(crate) fn named(name: &str) -> Vec<u8> {
    let mut b = u32::try_from(name.len()).expect("a name's length").to_be_bytes().to_vec();
    b.extend_from_slice(name.as_bytes());
    b
}

fn read_infos(all: &[(u32, Vec<u8>)]) -> Info {
    let mut seen = Info::default();
    let mut export = false;
    for (kind, data) in all {
        assert_eq!(*kind, rep::INFO, "what answers INFO and GO");
        let (kind, rest) = data.split_first_chunk::<2>().expect("a kind of information");
        let text = || String::from_utf8(rest.to_vec()).expect("UTF-8");
        match u16::from_be_bytes(*kind) {
            info::EXPORT => {
                assert_eq!(rest.len(), 10, "NBD_INFO_EXPORT");
                seen.size = u64::from_be_bytes(rest[..8].try_into().expect("8"));
                seen.flags = u16::from_be_bytes(rest[8..].try_into().expect("2"));
                assert_ne!(seen.flags & can::HAS_FLAGS, 0, "NBD_FLAG_HAS_FLAGS");
                export = true;
            }
            info::NAME => seen.name = Some(text()),
            info::DESCRIPTION => seen.description = Some(text()),
            info::BLOCK_SIZE => {
                let at = |n: usize| u32::from_be_bytes(rest[n * 4..n * 4 + 4].try_into().expect("4"));
                assert_eq!(rest.len(), 12, "NBD_INFO_BLOCK_SIZE");
                seen.blocks = Some((at(0), at(1), at(2)));
            }
            k => panic!("information of kind {k}, which nobody asked for"),
        }
    }
    assert!(export, "NBD_INFO_EXPORT is always sent");
    seen
}
