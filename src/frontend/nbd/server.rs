//! The server: threads that accept clients and hand them to the workers.
//!
//! Invariants:
//! - A client counts from the moment it is accepted until its worker has let go of it; there are never more than `max_connections`.
//! - [`Server::stop`] returns when every thread has ended.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::sync::oneshot;

use super::shared::{Client, Door, Shared};
use super::{Exports, Listener, ServerSpec, ServerStatus, worker};
use crate::error::{Context, Error, ErrorKind, Result};

/// How long an acceptor rests after an error that may last (no descriptors left), in milliseconds.
const REST: u8 = 100;

struct Lobby<X: Exports> {
    shared: Arc<Shared<X>>,
    doors: Vec<Arc<Door>>,
    max_connections: u64,
    accepted: AtomicU64,
    refused: AtomicU64,
    stopping: AtomicBool,
    bell: EventFd,
}

/// A running server. It runs until it is stopped, also when this is dropped.
#[must_use = "a server runs until it is stopped"]
pub struct Server<X: Exports> {
    lobby: Arc<Lobby<X>>,
    workers: Vec<JoinHandle<()>>,
    acceptors: Vec<JoinHandle<()>>,
}

impl<X: Exports> Server<X> {
    /// Starts accepting; returns when all workers run.
    ///
    /// # Errors
    /// When the system has no thread, descriptor or io_uring to give.
    pub fn start(spec: ServerSpec, exports: Arc<X>) -> Result<Self> {
        let shared = Arc::new(Shared::new(exports, spec.tls, spec.handshake_timeout));
        let doors: Vec<Arc<Door>> = (0..spec.workers.max(1)).map(|_| Arc::default()).collect();
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(std::io::Error::from);
        let lobby = Arc::new(Lobby {
            shared: Arc::clone(&shared),
            doors,
            max_connections: spec.max_connections as u64,
            accepted: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            bell: bell.context(|| "making an eventfd for the NBD server")?,
        });
        let mut server = Self { lobby, workers: Vec::new(), acceptors: Vec::new() };
        let started = server.start_threads(shared, spec.listeners);
        if let Err(e) = started {
            // What has begun ends again; that a thread cannot be joined is less news than why.
            let _ = server.stop();
            return Err(e);
        }
        Ok(server)
    }

    fn start_threads(&mut self, shared: Arc<Shared<X>>, listeners: Vec<Listener>) -> Result<()> {
        for (i, door) in self.lobby.doors.iter().enumerate() {
            let (told, ready) = oneshot::channel();
            let (shared, door) = (Arc::clone(&shared), Arc::clone(door));
            self.workers.push(spawn(format!("nbd-{i}"), move || worker::run(shared, &door, told))?);
            let died = || Error::new(ErrorKind::Internal, "an NBD worker ended before it was ready");
            ready.blocking_recv().map_err(|_| died())??;
        }
        for (i, listener) in listeners.into_iter().enumerate() {
            let lobby = Arc::clone(&self.lobby);
            self.acceptors.push(spawn(format!("nbd-accept-{i}"), move || lobby.accept(&listener))?);
        }
        Ok(())
    }

    /// Its figures.
    #[must_use]
    pub fn status(&self) -> ServerStatus {
        ServerStatus {
            connections: self.lobby.shared.connections.load(Ordering::Relaxed),
            accepted: self.lobby.accepted.load(Ordering::Relaxed),
            refused: self.lobby.refused.load(Ordering::Relaxed),
        }
    }

    /// Takes no more clients and no more requests; answers what is under way; closes; ends the threads. Holds no export
    /// afterwards.
    ///
    /// # Errors
    /// `Internal` when a thread has panicked.
    pub fn stop(self) -> Result<()> {
        self.lobby.stopping.store(true, Ordering::SeqCst);
        self.lobby.bell.write(1).map_err(std::io::Error::from).context(|| "stopping the NBD server")?;
        let join = |threads: Vec<JoinHandle<()>>| {
            let died = || Error::new(ErrorKind::Internal, "a thread of the NBD server has panicked");
            threads.into_iter().map(|t| t.join().map_err(|_| died())).fold(Ok(()), Result::and)
        };
        let accepted = join(self.acceptors);
        for door in &self.lobby.doors {
            door.stop();
        }
        let worked = join(self.workers);
        self.lobby.shared.until_none_asks();
        accepted.and(worked)
    }
}

fn spawn(name: String, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let what = format!("starting the thread {name}");
    std::thread::Builder::new().name(name).spawn(run).context(|| what)
}

impl<X: Exports> Lobby<X> {
    /// The life of an acceptor's thread.
    fn accept(&self, listener: &Listener) {
        let fd = match listener {
            Listener::Tcp(l) => l.as_fd(),
            Listener::Unix(l) => l.as_fd(),
        };
        // Who else listens may be faster: then there is nobody to wait for.
        let patient = match listener {
            Listener::Tcp(l) => l.set_nonblocking(true),
            Listener::Unix(l) => l.set_nonblocking(true),
        };
        if let Err(e) = patient {
            tracing::error!("preparing a listening socket: {e}");
            return;
        }
        while !self.stopping.load(Ordering::SeqCst) {
            let mut fds = [PollFd::new(fd, PollFlags::POLLIN), PollFd::new(self.bell.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) if self.stopping.load(Ordering::SeqCst) => return,
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(e) => {
                    tracing::error!("waiting for NBD clients: {e}");
                    self.rest();
                    continue;
                }
            }
            match listener.accept() {
                Ok(client) => self.admit(client),
                // Somebody was faster, or has thought better of it.
                Err(e)
                    if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::ConnectionAborted) => {}
                Err(e) => {
                    tracing::warn!("accepting an NBD client: {e}");
                    self.rest();
                }
            }
        }
    }

    /// Waits a while, or until the server stops.
    fn rest(&self) {
        // However it ends, the loop looks around again.
        let _ = poll(&mut [PollFd::new(self.bell.as_fd(), PollFlags::POLLIN)], REST);
    }

    fn admit(&self, client: Client) {
        self.accepted.fetch_add(1, Ordering::Relaxed);
        let connections = &self.shared.connections;
        if connections.fetch_add(1, Ordering::Relaxed) >= self.max_connections {
            connections.fetch_sub(1, Ordering::Relaxed);
            self.refused.fetch_add(1, Ordering::Relaxed);
            let most = self.max_connections;
            self.shared.sparing.say(|| format!("client {} is turned away: there are {most} already", client.name));
            return;
        }
        if let Some(door) = self.doors.iter().min_by_key(|d| d.clients.load(Ordering::Relaxed)) {
            door.enter(client);
        }
    }
}

impl Listener {
    /// The next client; its socket is a blocking one, as the ring wants it.
    fn accept(&self) -> std::io::Result<Client> {
        match self {
            Self::Tcp(l) => {
                let (socket, from) = l.accept()?;
                socket.set_nonblocking(false)?;
                socket.set_nodelay(true)?;
                setsockopt(&socket, sockopt::KeepAlive, &true)?;
                // An idle client whose machine has died is found out within minutes; for a busy one, TCP gives up after a quarter of an hour.
                setsockopt(&socket, sockopt::TcpKeepIdle, &60)?;
                setsockopt(&socket, sockopt::TcpKeepInterval, &15)?;
                setsockopt(&socket, sockopt::TcpKeepCount, &4)?;
                Ok(Client { socket: OwnedFd::from(socket), name: from.to_string() })
            }
            Self::Unix(l) => {
                let (socket, _) = l.accept()?;
                socket.set_nonblocking(false)?;
                let pid = nix::sys::socket::getsockopt(&socket, sockopt::PeerCredentials).map(|c| c.pid());
                let name =
                    pid.map_or_else(|_| "on a unix socket".to_owned(), |pid| format!("on a unix socket, pid {pid}"));
                Ok(Client { socket: OwnedFd::from(socket), name })
            }
        }
    }
}
