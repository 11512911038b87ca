//! A client from its greeting to the choice of an export.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::handshake::{Agreed, Broken, Hall, Handshake, Outcome, TlsState};
use super::shared::Over;
use super::tls::TlsSocket;
use super::transport::{Input, Transport};
use super::worker::{Room, Worker};
use super::{ExportInfo, Exports};
use crate::error::{Error, ErrorKind, Result};
use crate::lane::{LaneSocket, LaneTimer};
use crate::time::{Timer, monotonic_now};

/// What a client may send before it has chosen an export, at once.
const HANDSHAKE_INPUT: usize = 20 << 10;
/// Characters of a name that a client has made up that go into the log.
const MAX_SHOWN: usize = 128;

/// A client's socket, as the talk has left it.
pub(super) enum Stream {
    Plain(LaneSocket),
    Tls(Box<TlsSocket>),
}

/// What a talk ends in.
pub(super) type Talked<X> = (Stream, Agreed<Rc<Room<X>>>, Input);

/// A client that has not chosen an export yet.
pub(super) struct Visit<X: Exports> {
    worker: Rc<Worker<X>>,
    /// Time that the client has waited for us.
    served: Cell<Duration>,
    /// Since when it does.
    asked: Cell<Option<Duration>>,
}

impl<X: Exports> Visit<X> {
    pub(super) fn new(worker: &Rc<Worker<X>>) -> Self {
        Self { worker: Rc::clone(worker), served: Cell::new(Duration::ZERO), asked: Cell::new(None) }
    }

    /// Ends when the client has had its time; what it waits for us does not count.
    pub(super) async fn patience(&self) {
        let timer = LaneTimer::new(&self.worker.lane);
        let begun = timer.now();
        loop {
            let now = timer.now();
            let ours = self.served.get() + self.asked.get().map_or(Duration::ZERO, |since| now.saturating_sub(since));
            let used = now.saturating_sub(begun + ours);
            let left = self.worker.shared.handshake_timeout.saturating_sub(used);
            if left.is_zero() {
                return;
            }
            timer.sleep(left).await;
        }
    }

    pub(super) async fn talk(&self, socket: &LaneSocket) -> Result<Option<Talked<X>>, Broken> {
        let tls = match &self.worker.shared.tls {
            None => TlsState::Unavailable,
            Some(tls) if tls.required => TlsState::Required,
            Some(_) => TlsState::Offered,
        };
        let mut input = Input::new(HANDSHAKE_INPUT);
        let mut handshake = Handshake::new(tls);
        handshake.greet(&mut input, socket).await?;
        let outcome = handshake.options(&mut input, socket, self).await?;
        match (outcome, &self.worker.shared.tls) {
            (Outcome::Serve(agreed), _) => Ok(Some((Stream::Plain(socket.clone()), agreed, input))),
            (Outcome::StartTls, Some(tls)) => {
                let secure = TlsSocket::accept(socket.clone(), Arc::clone(&tls.config)).await.inspect_err(|e| {
                    self.worker.shared.sparing.say(|| format!("a client was not let in by TLS: {e}"));
                })?;
                handshake.under_tls();
                match handshake.options(&mut input, &secure, self).await? {
                    Outcome::Serve(agreed) => Ok(Some((Stream::Tls(Box::new(secure)), agreed, input))),
                    _ => {
                        secure.finish().await?;
                        Ok(None)
                    }
                }
            }
            _ => {
                socket.stop_writing();
                Ok(None)
            }
        }
    }

    /// Runs a call that may block on a thread of its own.
    async fn ask<R: Send + 'static>(&self, call: impl FnOnce(&X) -> Result<R> + Send + 'static) -> Result<R> {
        self.asked.set(Some(monotonic_now()));
        let answer = self.ask_now(call).await;
        let took = self.asked.take().map_or(Duration::ZERO, |since| monotonic_now().saturating_sub(since));
        self.served.set(self.served.get() + took);
        answer
    }

    async fn ask_now<R: Send + 'static>(&self, call: impl FnOnce(&X) -> Result<R> + Send + 'static) -> Result<R> {
        let ended = || Error::new(ErrorKind::Internal, "looking for an export ended in a panic");
        let shared = Arc::clone(&self.worker.shared);
        let _turn = self.worker.shared.may_ask.acquire().await.map_err(|_| ended())?;
        if self.worker.stopping.get() {
            return Err(Error::new(ErrorKind::Denied, "the server is stopping"));
        }
        let (told, answer) = oneshot::channel();
        shared.count_asking(|n| *n += 1);
        let asking = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("nbd-exports".into()).spawn(move || {
            // Also when the call panics: who stops waits for this.
            let _over = Over(Arc::clone(&asking));
            // Whoever asked may have hung up: then what it got goes at once.
            let _ = told.send(call(&asking.exports));
        });
        if let Err(e) = thread {
            shared.count_asking(|n| *n -= 1);
            return Err(Error::io("starting a thread to look for an export", e));
        }
        answer.await.unwrap_or_else(|_| Err(ended()))
    }
}

impl<X: Exports> Hall for Visit<X> {
    type Opened = Rc<Room<X>>;

    async fn names(&self) -> Result<Vec<String>> {
        self.ask(|x| x.names()).await
    }

    async fn info(&self, name: &str) -> Result<ExportInfo> {
        let name = name.to_owned();
        self.ask(move |x| x.info(&name)).await
    }

    async fn open(&self, name: &str) -> Result<(Self::Opened, ExportInfo)> {
        let name = name.to_owned();
        let export = self.ask(move |x| x.open(&name)).await?;
        let room = self.worker.room(export)?;
        let info = room.info.clone();
        Ok((room, info))
    }

    fn lament(&self, name: &str, why: &Error) {
        let shown: String = name.chars().take(MAX_SHOWN).collect();
        if why.kind() == ErrorKind::NotFound {
            tracing::debug!("a client asked for export {shown:?}, which is not there");
            return;
        }
        self.worker.shared.sparing.say(|| format!("export {shown:?} could not be opened for a client: {why}"));
    }
}
