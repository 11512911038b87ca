//! TLS over a lane's socket.
//!
//! Invariants:
//! - Only the task that sends writes to the socket; what the TLS machine wants to say meanwhile goes with its next send.
//! - No borrow of the machine is held while something waits.

use std::cell::RefCell;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};

use super::transport::Transport;
use crate::disk::IoBuf;
use crate::error::{Error, ErrorKind, Result};
use crate::lane::LaneSocket;

/// Received at once, in bytes: a TLS record and its like.
const CIPHERTEXT: usize = 32 << 10;

/// Reads `server-cert.pem`, `server-key.pem` and, if it is there, `ca-cert.pem` from a folder: the names that QEMU and
/// nbdkit use. With the last, clients need a certificate from that authority.
///
/// # Errors
/// `NotFound` and `Denied` for what cannot be read, `Usage` for what is no certificate or key, or do not belong together.
pub fn load(dir: &Path) -> Result<Arc<ServerConfig>> {
    let (cert, key, ca) = (dir.join("server-cert.pem"), dir.join("server-key.pem"), dir.join("ca-cert.pem"));
    let certs = certificates(&cert)?;
    let key = PrivateKeyDer::from_pem_slice(&read(&key)?)
        .map_err(|e| bad(&key, "has no private key: make it PKCS#8, PKCS#1 or SEC1 in PEM").with_source(e))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| Error::new(ErrorKind::Internal, "setting up TLS").with_source(e))?;
    // Only what is certainly not there is not wanted: a link to nowhere must not let everybody in.
    let absent = std::fs::symlink_metadata(&ca).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
    let builder = if !absent {
        let mut roots = RootCertStore::empty();
        for c in certificates(&ca)? {
            roots.add(c).map_err(|e| bad(&ca, "has a certificate that cannot sign others").with_source(e))?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
            .build()
            .map_err(|e| bad(&ca, "cannot be used to check clients").with_source(e))?;
        builder.with_client_cert_verifier(verifier)
    } else {
        builder.with_no_client_auth()
    };
    let config = builder
        .with_single_cert(certs, key)
        .map_err(|e| bad(&cert, "does not go with the key beside it").with_source(e))?;
    Ok(Arc::new(config))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| Error::io(format!("reading {} for TLS", path.display()), e))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    let found = found.map_err(|e| bad(path, "is not PEM").with_source(e))?;
    if found.is_empty() { Err(bad(path, "has no certificate")) } else { Ok(found) }
}

fn bad(path: &Path, why: &str) -> Error {
    Error::new(ErrorKind::Usage, format!("the TLS file {} {why}", path.display()))
}

struct Machine {
    tls: ServerConnection,
    /// Room lent to what is sent.
    outgoing: Vec<u8>,
}

/// See the module's page.
pub(super) struct TlsSocket {
    socket: LaneSocket,
    machine: RefCell<Machine>,
    /// What has come and the machine has not taken: the buffer, and where it begins and ends there.
    incoming: RefCell<(IoBuf, usize, usize)>,
}

impl TlsSocket {
    /// Shakes hands.
    ///
    /// # Errors
    /// The socket's, and `InvalidData` for what is not TLS, or a client that is not let in.
    pub(super) async fn accept(socket: LaneSocket, config: Arc<ServerConfig>) -> io::Result<Self> {
        let tls = ServerConnection::new(config).map_err(io::Error::other)?;
        let this = Self {
            socket,
            machine: RefCell::new(Machine { tls, outgoing: Vec::new() }),
            incoming: RefCell::new((IoBuf::zeroed(CIPHERTEXT), 0, 0)),
        };
        while this.machine.borrow().tls.is_handshaking() {
            this.flush(&|| {}).await?;
            if !this.machine.borrow().tls.is_handshaking() {
                break;
            }
            let fed = this.feed();
            if let Err(e) = &fed {
                tracing::debug!("a client's TLS handshake failed: {e}");
                // The alert says why.
                let _ = this.flush(&|| {}).await;
            }
            if !fed? && !this.receive().await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        this.flush(&|| {}).await?;
        Ok(this)
    }

    /// Sends what the machine has to say.
    async fn flush(&self, moved: &dyn Fn()) -> io::Result<()> {
        loop {
            let buf = {
                let Machine { tls, outgoing } = &mut *self.machine.borrow_mut();
                outgoing.clear();
                while tls.wants_write() {
                    tls.write_tls(outgoing)?;
                }
                if outgoing.is_empty() {
                    return Ok(());
                }
                let buf = IoBuf::zeroed(outgoing.len());
                buf.copy_in(0, outgoing);
                buf
            };
            self.socket.send(vec![buf], moved).await?;
        }
    }

    /// Receives ciphertext; false at the end.
    async fn receive(&self) -> io::Result<bool> {
        let buf = self.incoming.borrow().0.clone();
        let n = self.socket.recv(buf, false).await?;
        let mut incoming = self.incoming.borrow_mut();
        (incoming.1, incoming.2) = (0, n);
        Ok(n > 0)
    }

    /// Gives the machine what has come, as far as it takes it. False when there is nothing left to give.
    fn feed(&self) -> io::Result<bool> {
        let incoming = &mut *self.incoming.borrow_mut();
        if incoming.1 >= incoming.2 {
            return Ok(false);
        }
        let tls = &mut self.machine.borrow_mut().tls;
        let mut rest = &incoming.0.bytes()[incoming.1..incoming.2];
        tls.read_tls(&mut rest)?;
        incoming.1 = incoming.2 - rest.len();
        tls.process_new_packets().map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        Ok(true)
    }

    /// Plaintext that is there. `None`: none yet.
    fn plaintext(&self, to: &mut [u8]) -> io::Result<Option<usize>> {
        match self.machine.borrow_mut().tls.reader().read(to) {
            Ok(n) => Ok(Some(n)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }
}

impl Transport for TlsSocket {
    async fn recv(&self, mut buf: IoBuf, all: bool) -> io::Result<usize> {
        let mut have = 0;
        while have < buf.len() {
            match self.plaintext(&mut buf.bytes_mut()[have..])? {
                Some(0) => break,
                Some(n) => have += n,
                None if have > 0 && !all => break,
                // A client that ends without a word under TLS may have been cut off by somebody else: an error.
                None if !self.feed()? && !self.receive().await? => return Err(io::ErrorKind::UnexpectedEof.into()),
                None => {}
            }
        }
        Ok(have)
    }

    async fn send(&self, bufs: Vec<IoBuf>, moved: &dyn Fn()) -> io::Result<()> {
        for buf in bufs {
            let mut rest = buf.bytes();
            while !rest.is_empty() {
                // The machine takes a part, until it has been emptied.
                let n = self.machine.borrow_mut().tls.writer().write(rest)?;
                rest = &rest[n..];
                if !rest.is_empty() {
                    self.flush(moved).await?;
                }
            }
        }
        self.flush(moved).await
    }

    fn stop_reading(&self) {
        self.socket.stop_reading();
    }

    async fn finish(&self) -> io::Result<()> {
        self.machine.borrow_mut().tls.send_close_notify();
        self.flush(&|| {}).await?;
        self.socket.stop_writing();
        Ok(())
    }

    fn close(&self) {
        self.socket.close();
    }
}
