//! Tells the service manager how far the process is (`sd_notify`): datagrams to the socket that `$NOTIFY_SOCKET` names.
//!
//! Invariant: nothing that goes wrong here stops a volume from being served; it is logged once a message.
//! The protocol is three lines of text over a datagram, and a client library would be longer than this file.

use std::ffi::OsString;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use super::output::one_line;

/// What the service manager is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Word<'a> {
    /// It serves; with a line for people.
    Ready(&'a str),
    /// It has begun to end; with a line for people.
    Stopping(&'a str),
    /// A line for people.
    Status(&'a str),
}

impl Word<'_> {
    fn text(&self) -> String {
        match self {
            // A line break would begin another assignment.
            Self::Ready(line) => format!("READY=1\nSTATUS={}", one_line(line)),
            Self::Stopping(line) => format!("STOPPING=1\nSTATUS={}", one_line(line)),
            Self::Status(line) => format!("STATUS={}", one_line(line)),
        }
    }
}

/// Tells it, if there is a service manager.
pub(super) fn tell(word: &Word<'_>) {
    if let Some(socket) = std::env::var_os("NOTIFY_SOCKET").filter(|s| !s.is_empty())
        && let Err(e) = send(&socket, &word.text())
    {
        tracing::warn!("telling the service manager at {} ($NOTIFY_SOCKET): {e}", socket.display());
    }
}

fn send(socket: &OsString, text: &str) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(socket)?,
        _ => return Err(io::Error::new(io::ErrorKind::Unsupported, "neither a path nor an abstract socket")),
    };
    let from = UnixDatagram::unbound()?;
    // A manager that reads nothing must not hold up the volume.
    from.set_nonblocking(true)?;
    from.send_to_addr(text.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(manager: &UnixDatagram) -> String {
        let mut got = [0; 512];
        let n = manager.recv(&mut got).expect("a message");
        String::from_utf8(got[..n].to_vec()).expect("text")
    }

    #[test]
    fn a_manager_behind_a_path_or_an_abstract_name_hears_it() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("notify");
        let name = format!("vb-ublk-test-{}", std::process::id());
        let abstract_name = SocketAddr::from_abstract_name(&name).expect("name");
        for (manager, socket) in [
            (UnixDatagram::bind(&path).expect("bind"), path.clone().into_os_string()),
            (UnixDatagram::bind_addr(&abstract_name).expect("bind"), OsString::from(format!("@{name}"))),
        ] {
            send(&socket, &Word::Ready("volume v serves").text()).expect("send");
            assert_eq!(received(&manager), "READY=1\nSTATUS=volume v serves");
            send(&socket, &Word::Status("a\nREADY=1").text()).expect("send");
            assert_eq!(received(&manager), "STATUS=a READY=1");
            send(&socket, &Word::Stopping("").text()).expect("send");
            assert_eq!(received(&manager), "STOPPING=1\nSTATUS=");
        }
    }

    #[test]
    fn a_manager_that_is_not_there_or_reads_nothing_is_an_error_at_once() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("notify").into_os_string();
        assert_eq!(send(&path, "x").expect_err("none").kind(), io::ErrorKind::NotFound);
        for odd in ["vsock:2:1234", "relative", "@"] {
            let _ = send(&odd.into(), "x").expect_err(odd);
        }
        let _full = UnixDatagram::bind(&path).expect("bind");
        let end = (0..1_000_000).find_map(|_| send(&path, "x").err()).expect("a full queue");
        assert_eq!(end.kind(), io::ErrorKind::WouldBlock);
    }
}
