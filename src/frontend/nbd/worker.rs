//! A worker: one lane that serves its share of the clients, log and sockets on one ring.
//!
//! Invariants:
//! - An export has one engine on a lane, which all its clients there share. It and its tasks end with the last of them, and only
//!   then the lane lets go of the export.
//! - Nothing that blocks is called here: what does has a thread of its own.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use futures_util::future::{AbortHandle, Either, abortable, select};
use tokio::sync::oneshot;

use super::guard::Guard;
use super::handshake::{Agreed, Broken, Hall, Handshake, Outcome, TlsState};
use super::memory::{Account, Memory};
use super::session::{Served, Session, Spawn};
use super::signal::Signal;
use super::tls::TlsSocket;
use super::transport::{Input, Transport};
use super::{Export, ExportInfo, Exports, Tls};
use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::lane::{Driver, Lane, LaneSocket, LaneTimer, OwnRing, RingMode};
use crate::time::{Timer, monotonic_now};
use crate::volume::engine::Engine;

/// Places for submissions; more wait their turn.
const ENTRIES: u32 = 1024;
/// What a client may send before it has chosen an export, at once.
const HANDSHAKE_INPUT: usize = 20 << 10;
/// How often a lane looks for clients that hoard memory.
const WATCH: Duration = Duration::from_secs(5);
/// A client that has not moved for so long, and has what others wait for, is cut off.
const HOARDING: Duration = Duration::from_secs(30);
/// How long a client may take to take its last answers.
const FAREWELL: Duration = Duration::from_secs(10);

/// What all workers share.
pub(super) struct Shared<X: Exports> {
    pub(super) exports: Arc<X>,
    pub(super) tls: Option<Tls>,
    pub(super) handshake_timeout: Duration,
    pub(super) connections: AtomicU64,
    /// The guards of open exports, by the export's address: who holds the guard holds the export.
    guards: Mutex<HashMap<usize, std::sync::Weak<Guard>>>,
}

impl<X: Exports> Shared<X> {
    pub(super) fn new(exports: Arc<X>, tls: Option<Tls>, handshake_timeout: Duration) -> Self {
        let (connections, guards) = (AtomicU64::new(0), Mutex::default());
        Self { exports, tls, handshake_timeout, connections, guards }
    }

    fn guard(&self, export: &Arc<X::Export>) -> Arc<Guard> {
        let mut guards = self.guards.lock().unwrap_or_else(PoisonError::into_inner);
        guards.retain(|_, g| g.strong_count() > 0);
        let slot = guards.entry(Arc::as_ptr(export).addr()).or_default();
        slot.upgrade().unwrap_or_else(|| {
            let guard = Arc::new(Guard::default());
            *slot = Arc::downgrade(&guard);
            guard
        })
    }
}

/// A client who has come.
pub(super) struct Client {
    pub(super) socket: OwnedFd,
    pub(super) name: String,
}

#[derive(Default)]
struct Arrivals {
    clients: VecDeque<Client>,
    stopping: bool,
    waker: Option<Waker>,
}

/// The door of a worker, for the threads that accept.
#[derive(Default)]
pub(super) struct Door {
    arrivals: Mutex<Arrivals>,
    /// Clients that are in or on their way.
    pub(super) clients: AtomicU64,
}

impl Door {
    fn change(&self, change: impl FnOnce(&mut Arrivals)) {
        let waker = {
            let mut a = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
            change(&mut a);
            a.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Lets a client in.
    pub(super) fn enter(&self, client: Client) {
        self.clients.fetch_add(1, Ordering::Relaxed);
        self.change(|a| a.clients.push_back(client));
    }

    /// Nobody comes any more, and who is in has to leave.
    pub(super) fn stop(&self) {
        self.change(|a| a.stopping = true);
    }

    /// The next client; `None` when the worker is to stop.
    async fn next(&self) -> Option<Client> {
        std::future::poll_fn(|cx| {
            let mut a = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
            if a.stopping {
                return Poll::Ready(None);
            }
            if let Some(client) = a.clients.pop_front() {
                return Poll::Ready(Some(client));
            }
            a.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

type Engines<E> = Rc<RefCell<Vec<Rc<E>>>>;

/// Seals the batches of every engine on the lane.
struct Seals<E>(Engines<E>);

impl<E: Engine> Driver for Seals<E> {
    fn seal(&mut self) {
        for engine in &*self.0.borrow() {
            engine.seal();
        }
    }
}

/// An export on this lane.
struct Room<X: Exports> {
    engine: Rc<<X::Export as Export>::Engine>,
    guard: Arc<Guard>,
    info: ExportInfo,
    tasks: Vec<AbortHandle>,
    engines: Engines<<X::Export as Export>::Engine>,
}

impl<X: Exports> Drop for Room<X> {
    fn drop(&mut self) {
        self.engines.borrow_mut().retain(|e| !Rc::ptr_eq(e, &self.engine));
        for task in &self.tasks {
            task.abort();
        }
    }
}

struct Guest {
    socket: LaneSocket,
    account: Rc<Account>,
}

struct Worker<X: Exports> {
    lane: Lane,
    shared: Arc<Shared<X>>,
    memory: Memory,
    engines: Engines<<X::Export as Export>::Engine>,
    rooms: RefCell<HashMap<usize, Weak<Room<X>>>>,
    guests: RefCell<HashMap<u64, Guest>>,
    left: Signal,
    stopping: Rc<Cell<bool>>,
}

/// The life of a worker's thread. Says on `ready` how its set-up went.
pub(super) fn run<X: Exports>(shared: Arc<Shared<X>>, door: &Arc<Door>, ready: oneshot::Sender<Result<()>>) {
    let lane = OwnRing::new(ENTRIES, RingMode::Cooperative).and_then(Lane::new);
    let lane = match lane.context(|| "making a worker's io_uring (it needs Linux 5.19)") {
        Ok(lane) => lane,
        Err(e) => {
            let _ = ready.send(Err(e));
            return;
        }
    };
    let _ = ready.send(Ok(()));
    let worker = Rc::new(Worker {
        lane: lane.clone(),
        shared,
        memory: Memory::default(),
        engines: Rc::default(),
        rooms: RefCell::default(),
        guests: RefCell::default(),
        left: Signal::default(),
        stopping: Rc::default(),
    });
    let mut driver = Seals(Rc::clone(&worker.engines));
    let ran = lane.run_with(&mut driver, worker.serve(door)).and_then(|()| lane.shutdown(&mut driver));
    if let Err(e) = ran {
        // Its clients would hang; a dead process can be started again, and the log has what was acknowledged.
        tracing::error!("a worker's ring is broken: {e}; ending the process");
        std::process::abort();
    }
}

impl<X: Exports> Worker<X> {
    async fn serve(self: &Rc<Self>, door: &Arc<Door>) {
        let watcher = Rc::clone(self);
        self.lane.spawn(async move { watcher.watch().await });
        let mut number = 0;
        while let Some(client) = door.next().await {
            number += 1;
            self.welcome(number, client, Arc::clone(door));
        }
        self.stopping.set(true);
        for guest in self.guests.borrow().values() {
            guest.socket.stop_reading();
        }
        let everybody_left = || self.guests.borrow().is_empty();
        let patience = LaneTimer::new(&self.lane);
        let timeout = std::pin::pin!(patience.sleep(FAREWELL));
        if let Either::Right(_) = select(std::pin::pin!(self.left.until(everybody_left)), timeout).await {
            tracing::warn!("{} clients did not take their last answers: cut off", self.guests.borrow().len());
            for guest in self.guests.borrow().values() {
                guest.socket.close();
            }
            self.left.until(everybody_left).await;
        }
        // The rooms are empty; their tasks have been told to end, and have to be polled once for that.
        self.left.until(|| self.lane.tasks() <= 1).await;
    }

    fn welcome(self: &Rc<Self>, number: u64, client: Client, door: Arc<Door>) {
        let worker = Rc::clone(self);
        let socket = LaneSocket::new(&self.lane, client.socket);
        let account = Rc::<Account>::default();
        self.guests.borrow_mut().insert(number, Guest { socket: socket.clone(), account: Rc::clone(&account) });
        self.lane.spawn(async move {
            tracing::debug!("client {} has come", client.name);
            match worker.attend(socket, account).await {
                Ok(()) => tracing::debug!("client {} has left", client.name),
                Err(Broken::Io(e)) => tracing::debug!("client {} is gone: {e}", client.name),
                Err(Broken::Nonsense(e)) => tracing::warn!("client {} is cut off: {e}", client.name),
            }
            worker.guests.borrow_mut().remove(&number);
            worker.shared.connections.fetch_sub(1, Ordering::Relaxed);
            door.clients.fetch_sub(1, Ordering::Relaxed);
            worker.left.tell();
        });
    }

    /// Everything from the greeting to the end.
    async fn attend(self: &Rc<Self>, socket: LaneSocket, account: Rc<Account>) -> Result<(), Broken> {
        let timer = LaneTimer::new(&self.lane);
        let (talk, patience) = (self.talk(&socket), timer.sleep(self.shared.handshake_timeout));
        let talked = match select(Box::pin(talk), Box::pin(patience)).await {
            Either::Left((talked, _)) => talked?,
            Either::Right(_) => {
                socket.close();
                return Err(io::Error::new(io::ErrorKind::TimedOut, "it took too long to choose an export").into());
            }
        };
        match talked {
            Some((Stream::Plain(t), agreed, input)) => self.session(t, agreed, account, input).await,
            Some((Stream::Tls(t), agreed, input)) => self.session(*t, agreed, account, input).await,
            None => {
                socket.close();
                Ok(())
            }
        }
    }

    async fn session<T: Transport>(
        self: &Rc<Self>,
        transport: T,
        agreed: Agreed<Rc<Room<X>>>,
        account: Rc<Account>,
        input: Input,
    ) -> Result<(), Broken> {
        let Agreed { export: room, info, dialect, allocation } = agreed;
        let served = Served {
            engine: Rc::clone(&room.engine),
            guard: Arc::clone(&room.guard),
            size: info.size_bytes,
            read_only: info.read_only,
            dialect,
            allocation,
        };
        let lane = self.lane.clone();
        let spawn: Spawn = Box::new(move |task| lane.spawn_boxed(task));
        let memory = (self.memory.clone(), account);
        let ended = Session::new(transport, served, memory, spawn, Rc::clone(&self.stopping)).run(input).await;
        drop(room);
        ended
    }

    async fn talk(self: &Rc<Self>, socket: &LaneSocket) -> Result<Option<Talked<X>>, Broken> {
        let tls = match &self.shared.tls {
            None => TlsState::Unavailable,
            Some(tls) if tls.required => TlsState::Required,
            Some(_) => TlsState::Offered,
        };
        let mut input = Input::new(HANDSHAKE_INPUT);
        let mut handshake = Handshake::new(tls);
        handshake.greet(&mut input, socket).await?;
        let outcome = handshake.options(&mut input, socket, self).await?;
        match (outcome, &self.shared.tls) {
            (Outcome::Serve(agreed), _) => Ok(Some((Stream::Plain(socket.clone()), agreed, input))),
            (Outcome::StartTls, Some(tls)) => {
                let secure = TlsSocket::accept(socket.clone(), Arc::clone(&tls.config)).await?;
                handshake.under_tls();
                match handshake.options(&mut input, &secure, self).await? {
                    Outcome::Serve(agreed) => Ok(Some((Stream::Tls(Box::new(secure)), agreed, input))),
                    _ => Ok(None),
                }
            }
            _ => Ok(None),
        }
    }

    /// Runs a call that may block on a thread of its own.
    async fn ask<R: Send + 'static>(&self, call: impl FnOnce(&X) -> Result<R> + Send + 'static) -> Result<R> {
        let (told, answer) = oneshot::channel();
        let exports = Arc::clone(&self.shared.exports);
        std::thread::Builder::new()
            .name("nbd-exports".into())
            .spawn(move || {
                // Whoever asked may have hung up.
                let _ = told.send(call(&exports));
            })
            .context(|| "starting a thread to look for an export")?;
        answer.await.unwrap_or_else(|_| Err(Error::new(ErrorKind::Internal, "looking for an export ended in a panic")))
    }

    /// The lane's room of an open export.
    fn room(self: &Rc<Self>, export: Arc<X::Export>) -> Result<Rc<Room<X>>> {
        let key = Arc::as_ptr(&export).addr();
        if let Some(room) = self.rooms.borrow().get(&key).and_then(Weak::upgrade) {
            return Ok(room);
        }
        let engine = export.engine(&self.lane)?;
        let mut tasks = Vec::new();
        for task in Rc::clone(&engine).tasks() {
            let (task, handle) = abortable(task);
            let export = Arc::clone(&export);
            let worker = Rc::downgrade(self);
            self.lane.spawn(async move {
                // It only ends when it is told to, with nothing of the engine's under way.
                let _ = task.await;
                // The last one lets go of the export.
                drop(export);
                if let Some(worker) = worker.upgrade() {
                    worker.left.tell();
                }
            });
            tasks.push(handle);
        }
        self.engines.borrow_mut().push(Rc::clone(&engine));
        let room = Rc::new(Room {
            engine,
            guard: self.shared.guard(&export),
            info: export.info(),
            tasks,
            engines: Rc::clone(&self.engines),
        });
        let mut rooms = self.rooms.borrow_mut();
        rooms.retain(|_, r| r.strong_count() > 0);
        rooms.insert(key, Rc::downgrade(&room));
        Ok(room)
    }

    /// Cuts off who holds what others wait for and does not move.
    async fn watch(&self) {
        let timer = LaneTimer::new(&self.lane);
        loop {
            timer.sleep(WATCH).await;
            let now = monotonic_now();
            if !self.memory.is_short_since(now.saturating_sub(WATCH)) {
                continue;
            }
            for guest in self.guests.borrow().values() {
                if guest.account.hoards_since(now.saturating_sub(HOARDING)) {
                    tracing::warn!(
                        "a client has not moved for {HOARDING:?} and holds memory that others wait for: cut off"
                    );
                    guest.socket.close();
                }
            }
        }
    }
}

enum Stream {
    Plain(LaneSocket),
    Tls(Box<TlsSocket>),
}

type Talked<X> = (Stream, Agreed<Rc<Room<X>>>, Input);

impl<X: Exports> Hall for Rc<Worker<X>> {
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
        let room = self.room(export)?;
        let info = room.info.clone();
        Ok((room, info))
    }
}
