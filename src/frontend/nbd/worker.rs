//! A worker: one lane that serves its share of the clients, log and sockets on one ring.
//!
//! Invariants:
//! - An export has one engine on a lane, which all its clients there share. It and its tasks end with the last of them, and only
//!   then the lane lets go of the export.
//! - Nothing that blocks is called here: what does has a thread of its own.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::{AbortHandle, Either, abortable, select};
use tokio::sync::oneshot;

use super::guard::Guard;
use super::handshake::{Agreed, Broken};
use super::memory::{Account, Memory};
use super::session::{Beside, Served, Session};
use super::shared::{Client, Door, Shared};
use super::signal::Signal;
use super::transport::{Input, Transport};
use super::visit::{Stream, Visit};
use super::{Export, ExportInfo, Exports};
use crate::error::{Context as _, Result};
use crate::lane::{Driver, Lane, LaneSocket, LaneTimer, OwnRing};
use crate::time::{Timer, monotonic_now};
use crate::volume::engine::Engine;

/// Places for submissions; more wait their turn.
const ENTRIES: u32 = 1024;
/// How often a lane looks for clients that hoard memory.
const WATCH: Duration = Duration::from_secs(5);
/// A client that has not moved for so long, and has what others wait for, is cut off.
const HOARDING: Duration = Duration::from_secs(30);
/// How long clients may take to leave when the server stops.
const FAREWELL: Duration = Duration::from_secs(10);

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
pub(super) struct Room<X: Exports> {
    engine: Rc<<X::Export as Export>::Engine>,
    guard: Arc<Guard>,
    pub(super) info: ExportInfo,
    tasks: Vec<AbortHandle>,
    engines: Engines<<X::Export as Export>::Engine>,
    /// Last: the engine goes before it, and its tasks keep it until they have ended.
    _export: Arc<X::Export>,
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

pub(super) struct Worker<X: Exports> {
    pub(super) lane: Lane,
    pub(super) shared: Arc<Shared<X>>,
    memory: Memory,
    engines: Engines<<X::Export as Export>::Engine>,
    rooms: RefCell<HashMap<usize, Weak<Room<X>>>>,
    guests: RefCell<HashMap<u64, Guest>>,
    left: Signal,
    pub(super) stopping: Rc<Cell<bool>>,
}

/// The life of a worker's thread. Says on `ready` how its set-up went.
pub(super) fn run<X: Exports>(shared: Arc<Shared<X>>, door: &Arc<Door>, ready: oneshot::Sender<Result<()>>) {
    let lane = OwnRing::best(ENTRIES).and_then(Lane::new);
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
            tracing::warn!(
                "{} clients have not left: cut off; what they asked of their volumes is waited for",
                self.guests.borrow().len()
            );
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
                Err(Broken::Nonsense(e)) => {
                    worker.shared.sparing.say(|| format!("client {} is cut off: {e}", client.name));
                }
            }
            worker.guests.borrow_mut().remove(&number);
            worker.shared.connections.fetch_sub(1, Ordering::Relaxed);
            door.clients.fetch_sub(1, Ordering::Relaxed);
            worker.left.tell();
        });
    }

    /// Everything from the greeting to the end.
    async fn attend(self: &Rc<Self>, socket: LaneSocket, account: Rc<Account>) -> Result<(), Broken> {
        let visit = Visit::new(self);
        let talked = match select(Box::pin(visit.talk(&socket)), Box::pin(visit.patience())).await {
            Either::Left((talked, _)) => talked?,
            Either::Right(_) => {
                socket.close();
                return Err(io::Error::new(io::ErrorKind::TimedOut, "it took too long to choose an export").into());
            }
        };
        match talked {
            Some((Stream::Plain(t), agreed, input)) => self.session(t, agreed, account, input).await,
            Some((Stream::Tls(t), agreed, input)) => self.session(*t, agreed, account, input).await,
            None => Ok(()),
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
        let (lane, timer) = (self.lane.clone(), LaneTimer::new(&self.lane));
        let beside = Beside {
            spawn: Box::new(move |task| lane.spawn_boxed(task)),
            sleep: Box::new(move |d| {
                let timer = timer.clone();
                Box::pin(async move { timer.sleep(d).await })
            }),
        };
        let memory = (self.memory.clone(), account);
        let ended = Session::new(transport, served, memory, beside, Rc::clone(&self.stopping)).run(input).await;
        drop(room);
        ended
    }

    /// The lane's room of an open export.
    pub(super) fn room(self: &Rc<Self>, export: Arc<X::Export>) -> Result<Rc<Room<X>>> {
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
            _export: export,
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
