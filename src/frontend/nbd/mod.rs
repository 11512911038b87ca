//! The NBD server: volumes over TCP and unix sockets, for QEMU, `nbd-client` and their like.
//!
//! - [`wire`]: what goes over the socket, as pure functions.
//! - `handshake`: the talk before the first request.
//! - `session`: requests and their answers. `guard`: changes of parts of sectors. `memory`: what a client may make the
//!   server hold. `signal`: waiting for each other on a lane.
//! - `transport`: a client's bytes; [`tls`]: the same under TLS.
//! - `worker`: a lane with its clients; `visit`: one that has not chosen yet; [`server`]: the threads, and who accepts; `shared`: what
//!   they have in common.
//!
//! Protocol: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>.

#[cfg(fuzzing)]
pub mod fuzzing;
mod guard;
mod handshake;
mod memory;
pub mod server;
mod session;
mod shared;
mod signal;
#[cfg(any(test, fuzzing))]
mod testing;
pub mod tls;
mod transport;
mod visit;
pub mod wire;
mod worker;

use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::error::Result;
use crate::lane::Lane;
use crate::volume::engine::Engine;

/// What clients are told of an export before they use it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its name; what a client asked for with the empty name is told so.
    pub name: String,
    /// For people.
    pub description: String,
    /// Size in bytes, a multiple of 512.
    pub size_bytes: u64,
    /// Writes will be refused.
    pub read_only: bool,
}

/// The volumes behind a server. Every call may block (for seconds: a store is asked, a log replayed); none is made on a lane, and
/// several may be made at once.
pub trait Exports: Send + Sync + 'static {
    /// What is open.
    type Export: Export;

    /// The names of all exports.
    ///
    /// # Errors
    /// When the store does not answer.
    fn names(&self) -> Result<Vec<String>>;

    /// What an export is, without opening it. The empty name is the default export.
    ///
    /// # Errors
    /// `NotFound` when there is none of this name.
    fn info(&self, name: &str) -> Result<ExportInfo>;

    /// Opens an export, or joins those who have it open. It stays open as long as somebody holds what this returns;
    /// dropping it does not block.
    ///
    /// # Errors
    /// `NotFound`, and whatever attaching a volume ends in.
    fn open(&self, name: &str) -> Result<Arc<Self::Export>>;
}

/// An open export.
pub trait Export: Send + Sync + 'static {
    /// How it is read and written.
    type Engine: Engine;

    /// What it is.
    fn info(&self) -> ExportInfo;

    /// The volume as a lane sees it; called on the lane's thread, once for each lane that serves it. It does not block.
    ///
    /// # Errors
    /// When the system has no descriptor to give.
    fn engine(&self, lane: &Lane) -> Result<Rc<Self::Engine>>;
}

/// A socket that clients come to.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A socket in the file system, or an abstract one.
    Unix(UnixListener),
}

/// What to do about TLS.
#[derive(Debug, Clone)]
pub struct Tls {
    /// Certificates and keys.
    pub config: Arc<rustls::ServerConfig>,
    /// Clients that do not start TLS may do nothing else; otherwise they are served without.
    pub required: bool,
}

/// How to serve.
#[derive(Debug)]
pub struct ServerSpec {
    /// Where clients come to.
    pub listeners: Vec<Listener>,
    /// Threads, each a lane.
    pub workers: usize,
    /// Clients at once; further ones are turned away.
    pub max_connections: usize,
    /// Absent: no TLS.
    pub tls: Option<Tls>,
    /// How long a client may take to choose an export, without what it waits for the exports.
    pub handshake_timeout: Duration,
}

/// A server's figures, for `status`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ServerStatus {
    /// Clients now.
    pub connections: u64,
    /// Clients so far, those turned away included.
    pub accepted: u64,
    /// Clients turned away because there were too many.
    pub refused: u64,
}
