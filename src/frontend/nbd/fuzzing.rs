//! Doors for the fuzzer: whole handshakes and sessions without a socket.

use std::cell::Cell;
use std::rc::Rc;

use super::ExportInfo;
use super::handshake::{Dialect, Hall, Handshake, TlsState};
use super::memory::Memory;
use super::session::{Served, Session};
use super::testing::{Script, Sectors, Tasks};
use super::transport::Input;
use crate::error::{Error, ErrorKind, Result};

struct OneDoor;

impl Hall for OneDoor {
    type Opened = ();

    async fn names(&self) -> Result<Vec<String>> {
        Ok(vec!["v".into()])
    }

    async fn info(&self, name: &str) -> Result<ExportInfo> {
        if !name.is_empty() && name != "v" {
            return Err(Error::new(ErrorKind::NotFound, "there is none"));
        }
        Ok(ExportInfo { name: "v".into(), description: "one".into(), size_bytes: 1 << 20, read_only: false })
    }

    fn lament(&self, _: &str, _: &Error) {}

    async fn open(&self, name: &str) -> Result<((), ExportInfo)> {
        Ok(((), self.info(name).await?))
    }
}

/// A client that says `said`; the first byte chooses how it is cut and whether TLS is required.
///
/// # Panics
/// When the server does what it never should.
pub fn handshake(said: &[u8]) {
    let Some((choice, said)) = said.split_first() else { return };
    let tls = if choice & 0x80 == 0 { TlsState::Unavailable } else { TlsState::Required };
    let script = Script::new([&b"\0\0\0\x03"[..], said].concat(), usize::from(choice & 0x7f));
    let mut input = Input::new(20 << 10);
    let ended = Tasks::default().run(async {
        let mut h = Handshake::new(tls);
        h.greet(&mut input, &script).await?;
        h.options(&mut input, &script, &OneDoor).await
    });
    let served = matches!(ended, Ok(super::handshake::Outcome::Serve(_)));
    assert!(!served || tls != TlsState::Required, "served without TLS");
}

/// A client that says `said` as requests; the first byte chooses the dialect and how it is cut.
///
/// # Panics
/// When the server does what it never should.
pub fn session(said: &[u8]) {
    let Some((choice, said)) = said.split_first() else { return };
    let dialect = [Dialect::Simple, Dialect::Structured, Dialect::Extended][usize::from(choice % 3)];
    let script = Script::new(said.to_vec(), usize::from(choice / 3));
    let served = Served {
        engine: Sectors::new(64),
        guard: std::sync::Arc::default(),
        size: 64 * 512,
        read_only: false,
        dialect,
        allocation: true,
    };
    let tasks = Tasks::default();
    let session =
        Session::new(script, served, (Memory::default(), Rc::default()), tasks.beside(), Rc::new(Cell::new(false)));
    // How it ends is the client's affair; that it does is ours.
    let _ = tasks.run(session.run(Input::new(64)));
    assert!(tasks.is_empty(), "something is still under way");
}
