//! Where clients come to: sockets that are opened here, or were passed by the service manager.
//!
//! Invariants:
//! - A TCP address that others than this host can reach is opened only when TLS is required or the user has said that it may.
//! - A unix socket that somebody answers on is left alone; one that nobody does is replaced. At the end only the file is removed that was
//!   made here.

use std::fmt::Write as _;
use std::io::ErrorKind as IoKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::activation::Passed;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::frontend::nbd::Listener;

/// The port that NBD has.
const PORT: u16 = 10809;
/// Where the server listens unless told otherwise.
pub(super) const DEFAULT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), PORT);

/// An address as people write it: `127.0.0.1:10809`, `[::1]:10809`; without a port it is NBD's.
///
/// # Errors
/// `Usage`.
pub(in crate::cli) fn parse(text: &str) -> Result<SocketAddr> {
    let bare = || text.trim_start_matches('[').trim_end_matches(']').parse().map(|ip| SocketAddr::new(ip, PORT));
    text.parse().or_else(|_| bare()).map_err(|_| {
        let shown: String = text.chars().take(80).collect();
        Error::new(
            ErrorKind::Usage,
            format!("{shown:?} is not an address to listen on: give one of this host's with a port, as in 127.0.0.1:10809, [::1]:10809 or 0.0.0.0:0"),
        )
    })
}

/// What is wanted of the listeners.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    pub(super) tcp: Vec<SocketAddr>,
    pub(super) unix: Vec<PathBuf>,
    pub(super) passed: Vec<Passed>,
    /// TLS is required of clients.
    pub(super) tls_required: bool,
    /// Others than this host may come without TLS.
    pub(super) insecure: bool,
}

/// Open listeners.
#[derive(Debug, Default)]
pub(super) struct Listening {
    pub(super) listeners: Vec<Listener>,
    /// Of each listener.
    pub(super) uris: Vec<Uri>,
    /// Removed with this.
    pub(super) files: Vec<SocketFile>,
}

/// Where an export is, but for its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Uri {
    before: String,
    after: String,
}

impl Uri {
    /// Of an export by name; the empty name is the default export.
    pub(super) fn of(&self, export: &str) -> String {
        match (export, self.after.as_str()) {
            ("", "") => self.before.clone(),
            (_, after) => format!("{}/{export}{after}", self.before),
        }
    }
}

fn tcp_uri(address: SocketAddr, tls: bool) -> Uri {
    let scheme = if tls { "nbds" } else { "nbd" };
    Uri { before: format!("{scheme}://{address}"), after: String::new() }
}

fn unix_uri(path: &[u8], tls: bool) -> Uri {
    let scheme = if tls { "nbds" } else { "nbd" };
    let mut after = "?socket=".to_owned();
    for b in path {
        if b.is_ascii_alphanumeric() || b"/._-~@".contains(b) {
            after.push(char::from(*b));
        } else {
            let _ = write!(after, "%{b:02X}");
        }
    }
    Uri { before: format!("{scheme}+unix://"), after }
}

/// A socket's file, which goes with this.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Another server may have replaced it since.
        let ours = std::fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.identity);
        if ours && let Err(e) = std::fs::remove_file(&self.path) {
            tracing::warn!("removing the socket {}: {e}", self.path.display());
        }
    }
}

/// Opens them; the default one when none is wanted.
///
/// # Errors
/// `Denied` for an address that needs TLS or the user's word, `Busy` for one that is in use, those of the system.
pub(super) fn open(wanted: Wanted) -> Result<Listening> {
    let Wanted { mut tcp, unix, passed, tls_required, insecure } = wanted;
    if tcp.is_empty() && unix.is_empty() && passed.is_empty() {
        tcp.push(DEFAULT);
    }
    let mut all = Listening::default();
    for socket in passed {
        let asking =
            || format!("asking for the address of the socket {:?} that the service manager passed", socket.name);
        let uri = match &socket.listener {
            Listener::Tcp(l) => {
                let address = l.local_addr().context(asking)?;
                check(address, tls_required || insecure)?;
                tcp_uri(address, tls_required)
            }
            Listener::Unix(l) => {
                let address = l.local_addr().context(asking)?;
                let abstract_name = address.as_abstract_name().map(|n| [b"@", n].concat());
                let path = address.as_pathname().map(|p| p.as_os_str().as_bytes().to_vec());
                unix_uri(&path.or(abstract_name).unwrap_or_default(), tls_required)
            }
        };
        tracing::info!("the service manager's socket {:?} is {}", socket.name, uri.of(""));
        all.uris.push(uri);
        all.listeners.push(socket.listener);
    }
    for address in tcp {
        check(address, tls_required || insecure)?;
        let listener = bind_tcp(address)?;
        let address = listener.local_addr().context(|| format!("asking for the port of {address}"))?;
        all.uris.push(tcp_uri(address, tls_required));
        all.listeners.push(Listener::Tcp(listener));
    }
    for path in unix {
        let (listener, file) = bind_unix(&path)?;
        all.uris.push(unix_uri(path.as_os_str().as_bytes(), tls_required));
        all.listeners.push(Listener::Unix(listener));
        all.files.push(file);
    }
    Ok(all)
}

fn check(address: SocketAddr, safe: bool) -> Result<()> {
    if safe || address.ip().to_canonical().is_loopback() {
        return Ok(());
    }
    let what = format!(
        "listening on {address}: other hosts could read and write every volume without a password, as NBD has none: require TLS with client \
         certificates (--tls-certs DIR), listen on 127.0.0.1 or a unix socket, or, if the network is yours alone, give --insecure-listen"
    );
    Err(Error::new(ErrorKind::Denied, what))
}

fn bind_tcp(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).map_err(|e| match e.kind() {
        IoKind::AddrInUse => {
            let what = format!("listening on {address}: another process does so already; choose another address, or port 0 for a free one");
            Error::new(ErrorKind::Busy, what)
        }
        IoKind::AddrNotAvailable => {
            Error::new(ErrorKind::Usage, format!("listening on {address}: it is not an address of this host"))
        }
        _ => Error::io(format!("listening on {address}"), e),
    })
}

fn bind_unix(path: &Path) -> Result<(UnixListener, SocketFile)> {
    let binding = || format!("making the socket {}", path.display());
    let listener = match UnixListener::bind(path) {
        Err(e) if e.kind() == IoKind::AddrInUse => {
            make_way(path)?;
            UnixListener::bind(path)
        }
        bound => bound,
    };
    let listener = listener.context(binding)?;
    let meta = std::fs::symlink_metadata(path).context(binding)?;
    Ok((listener, SocketFile { path: path.to_owned(), identity: (meta.dev(), meta.ino()) }))
}

/// Removes a socket that nobody answers on.
fn make_way(path: &Path) -> Result<()> {
    let busy = |why: &str| {
        let what = format!("making the socket {}: {why}; choose another with --unix", path.display());
        Error::new(ErrorKind::Busy, what)
    };
    let meta = std::fs::symlink_metadata(path).context(|| format!("looking at {}", path.display()))?;
    if !meta.file_type().is_socket() {
        return Err(busy("a file that is not a socket is there"));
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == IoKind::ConnectionRefused => {}
        Ok(_) => return Err(busy("another process listens on it")),
        // Busy, or not to be asked: not dead for certain.
        Err(e) => return Err(busy("whether another process listens on it cannot be found out").with_source(e)),
    }
    tracing::info!("the socket {} was left by a server that is dead: it is replaced", path.display());
    std::fs::remove_file(path).context(|| format!("removing the dead socket {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_as_people_write_them() {
        for (text, address) in [
            ("127.0.0.1:10809", "127.0.0.1:10809"),
            ("127.0.0.1", "127.0.0.1:10809"),
            ("0.0.0.0:0", "0.0.0.0:0"),
            ("::1", "[::1]:10809"),
            ("[::1]", "[::1]:10809"),
            ("[::]:7", "[::]:7"),
        ] {
            assert_eq!(parse(text).expect(text).to_string(), address);
        }
        for bad in ["", "localhost", "127.0.0.1:", "127.0.0.1:65536", ":10809", "::1:99999", "a b", &"9".repeat(10_000)]
        {
            let e = parse(bad).expect_err(bad);
            assert!(e.kind() == ErrorKind::Usage && e.to_string().len() < 300, "{e}");
        }
    }

    #[test]
    fn uris_name_the_export() {
        let tcp = tcp_uri("[::1]:7".parse().expect("address"), false);
        assert_eq!((tcp.of("").as_str(), tcp.of("v").as_str()), ("nbd://[::1]:7", "nbd://[::1]:7/v"));
        let unix = unix_uri(b"/run/a b?.sock", true);
        assert_eq!(unix.of(""), "nbds+unix:///?socket=/run/a%20b%3F.sock");
        assert_eq!(unix.of("v"), "nbds+unix:///v?socket=/run/a%20b%3F.sock");
    }

    #[test]
    fn other_hosts_need_tls_or_the_users_word() {
        for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:10809"] {
            let address = parse(address).expect("address");
            let e = check(address, false).expect_err("open to all");
            assert!(e.kind() == ErrorKind::Denied && e.to_string().contains("--insecure-listen"), "{e}");
            check(address, true).expect("allowed");
        }
        for address in ["127.0.0.1:0", "127.1.2.3:0", "[::1]:0", "[::ffff:127.0.0.1]:0"] {
            check(parse(address).expect("address"), false).expect(address);
        }
        let wanted = Wanted { tcp: vec![parse("0.0.0.0:0").expect("address")], ..Wanted::default() };
        assert_eq!(open(wanted).expect_err("refused").kind(), ErrorKind::Denied);
    }

    #[test]
    fn a_port_that_is_taken_is_named() {
        let wanted = |address| Wanted { tcp: vec![address], ..Wanted::default() };
        let all = open(wanted(parse("127.0.0.1:0").expect("address"))).expect("free");
        let uri = all.uris[0].of("");
        let address: SocketAddr = uri.strip_prefix("nbd://").expect("TCP").parse().expect("address");
        assert_ne!(address.port(), 0);
        let e = open(wanted(address)).expect_err("taken");
        assert!(e.kind() == ErrorKind::Busy && e.to_string().contains(&address.to_string()), "{e}");
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("nbd.sock");
        drop(UnixListener::bind(&path).expect("bind"));
        let wanted = || Wanted { unix: vec![path.clone()], ..Wanted::default() };
        let all = open(wanted()).expect("replaced");
        assert_eq!(all.uris[0].of(""), format!("nbd+unix:///?socket={}", path.display()));
        UnixStream::connect(&path).expect("answered");
        let e = open(wanted()).expect_err("in use");
        assert!(e.kind() == ErrorKind::Busy && e.to_string().contains("nbd.sock"), "{e}");
        drop(all);
        assert!(!path.exists());
        // What is there instead by then stays, and is not taken for a socket.
        let all = open(wanted()).expect("free");
        std::fs::remove_file(&path).expect("remove");
        std::fs::write(&path, "precious").expect("write");
        drop(all);
        assert!(open(wanted()).expect_err("a file").to_string().contains("not a socket"));
        assert_eq!(std::fs::read(&path).expect("read"), b"precious");
    }

    #[test]
    fn what_was_passed_is_served_and_nothing_else() {
        let passed = || Passed {
            listener: Listener::Tcp(TcpListener::bind("127.0.0.1:0").expect("bind")),
            name: "nbd.socket".into(),
        };
        let all = open(Wanted { passed: vec![passed()], ..Wanted::default() }).expect("passed");
        assert!(all.listeners.len() == 1 && all.uris[0].of("").starts_with("nbd://127.0.0.1:"), "{all:?}");
        let tcp = vec![parse("127.0.0.1:0").expect("address")];
        let all = open(Wanted { passed: vec![passed()], tcp, tls_required: true, ..Wanted::default() }).expect("both");
        assert!(all.listeners.len() == 2 && all.uris.iter().all(|u| u.of("v").starts_with("nbds://")), "{all:?}");
    }
}
