//! Sockets that the service manager has opened and passed on (`sd_listen_fds`): descriptors from 3 on.
//!
//! Invariants:
//! - They are taken once, before this process has opened anything else that it keeps.
//! - What is passed to another process (`LISTEN_PID`) is left alone. What is passed to this one and is no listening socket
//!   is an error, not ignored: somebody has set it up to be served.
//! - No child inherits them.

#![allow(unsafe_code)]

use std::net::TcpListener;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::socket::{AddressFamily, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::frontend::nbd::Listener;

/// The first descriptor that is passed.
const FIRST: RawFd = 3;
/// More than these are a mistake.
const MOST: u16 = 64;

/// A socket that was passed on.
#[derive(Debug)]
pub(super) struct Passed {
    pub(super) listener: Listener,
    /// What the service manager calls it.
    pub(super) name: String,
}

/// Takes the sockets that this process was started with.
///
/// # Errors
/// `Usage` when the variables make no sense or what was passed is no listening stream socket.
pub(super) fn take() -> Result<Vec<Passed>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let names = announced(&|name| std::env::var(name).ok(), std::process::id())?;
    if names.is_empty() || TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    // All are made ours before any is looked at.
    let sockets: Vec<_> = (FIRST..).zip(names).map(|(fd, name)| own(fd).map(|socket| (socket, name))).collect();
    sockets.into_iter().map(|found| found.and_then(|(socket, name)| listener(socket, name))).collect()
}

/// The names of the sockets that the environment announces to process `pid`.
fn announced(env: &dyn Fn(&str) -> Option<String>, pid: u32) -> Result<Vec<String>> {
    let number = |name: &str| -> Result<Option<u32>> {
        let bad = |v: &str| {
            Error::new(ErrorKind::Usage, format!("{name} is {v:?}, and should be a number that a service manager sets"))
        };
        env(name).filter(|v| !v.is_empty()).map(|v| v.parse().map_err(|_| bad(&v))).transpose()
    };
    let (Some(to), Some(count)) = (number("LISTEN_PID")?, number("LISTEN_FDS")?) else { return Ok(Vec::new()) };
    if to != pid {
        return Ok(Vec::new());
    }
    if count > MOST.into() {
        let what = format!("LISTEN_FDS is {count}: this program takes at most {MOST} sockets");
        return Err(Error::new(ErrorKind::Usage, what));
    }
    let names = env("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').filter(|n| !n.is_empty()).map(str::to_owned);
    Ok((0..count).map(|_| names.next().unwrap_or_else(|| "unknown".to_owned())).collect())
}

fn own(fd: RawFd) -> Result<OwnedFd> {
    // SAFETY: these two commands take numbers and touch no memory. On a number that is no descriptor they fail.
    let marked =
        unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 && libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) == 0 };
    if !marked {
        let e = std::io::Error::last_os_error();
        let what = format!("LISTEN_FDS announces descriptor {fd}, which is not open");
        return Err(Error::new(ErrorKind::Usage, what).with_source(e));
    }
    // SAFETY: it is open, as was just seen. Nothing else owns it: LISTEN_PID says that it was passed to this very process, which has
    // opened nothing yet that it keeps, and `take` comes here once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn listener(socket: OwnedFd, name: String) -> Result<Passed> {
    let bad =
        |why: &str| Error::new(ErrorKind::Usage, format!("the socket {name:?} that the service manager passed {why}"));
    let asking = |e: nix::errno::Errno| bad("cannot be asked what it is: it should be a stream socket").with_source(e);
    if getsockopt(&socket, sockopt::SockType).map_err(asking)? != SockType::Stream
        || !getsockopt(&socket, sockopt::AcceptConn).map_err(asking)?
    {
        return Err(bad("is not a listening stream socket: use ListenStream= and Accept=no"));
    }
    let address: SockaddrStorage = getsockname(std::os::fd::AsRawFd::as_raw_fd(&socket)).map_err(asking)?;
    let listener = match address.family() {
        Some(AddressFamily::Inet | AddressFamily::Inet6) => Listener::Tcp(TcpListener::from(socket)),
        Some(AddressFamily::Unix) => Listener::Unix(UnixListener::from(socket)),
        _ => return Err(bad("is neither TCP nor a unix socket")),
    };
    // As those that this program opens itself.
    let blocking = match &listener {
        Listener::Tcp(l) => l.set_nonblocking(false),
        Listener::Unix(l) => l.set_nonblocking(false),
    };
    blocking.context(|| format!("preparing the socket {name:?} that the service manager passed"))?;
    Ok(Passed { listener, name })
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn names(vars: &[(&str, &str)]) -> Result<Vec<String>> {
        announced(&|name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()), 7)
    }

    #[test]
    fn what_is_passed_to_this_process_counts() {
        let none: [&[(&str, &str)]; 5] = [
            &[],
            &[("LISTEN_FDS", "2")],
            &[("LISTEN_PID", "7")],
            &[("LISTEN_PID", "8"), ("LISTEN_FDS", "2")],
            &[("LISTEN_PID", ""), ("LISTEN_FDS", "")],
        ];
        for vars in none {
            assert!(names(vars).expect("nothing").is_empty(), "{vars:?}");
        }
        let ours = [("LISTEN_PID", "7"), ("LISTEN_FDS", "2")];
        assert_eq!(names(&ours).expect("two"), ["unknown", "unknown"]);
        let named = [ours[0], ours[1], ("LISTEN_FDNAMES", "tcp:local:more")];
        assert_eq!(names(&named).expect("two"), ["tcp", "local"]);
        for bad in ["x", "-1", "65", "4294967296"] {
            assert_eq!(names(&[ours[0], ("LISTEN_FDS", bad)]).expect_err(bad).kind(), ErrorKind::Usage);
        }
    }

    #[test]
    fn only_listening_stream_sockets_are_taken() {
        let dir = tempfile::tempdir().expect("dir");
        let tcp = TcpListener::bind("127.0.0.1:0").expect("bind");
        let unix = UnixListener::bind(dir.path().join("s")).expect("bind");
        assert!(matches!(listener(tcp.into(), "a".into()).expect("tcp").listener, Listener::Tcp(_)));
        assert!(matches!(listener(unix.into(), "b".into()).expect("unix").listener, Listener::Unix(_)));
        let udp = UdpSocket::bind("127.0.0.1:0").expect("bind");
        let (stream, _other) = UnixStream::pair().expect("pair");
        let file = std::fs::File::open("/dev/null").expect("open");
        for (socket, word) in [(udp.into(), "listening"), (stream.into(), "listening"), (file.into(), "asked")] {
            let e = listener(socket, "odd".into()).expect_err(word);
            assert!(e.kind() == ErrorKind::Usage && e.to_string().contains(word), "{e}");
        }
        assert_eq!(own(1_000_000).expect_err("not open").kind(), ErrorKind::Usage);
    }
}
