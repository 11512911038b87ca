//! Which volumes are attached, and for whom: they are attached on first use, and detached when nobody has used them for a while.
//!
//! A volume goes absent → attaching → attached → detaching → absent. While it is attached it is *leased* (somebody holds
//! what [`Registry::open`] returned) or *idle*, since the last lease was dropped.
//!
//! Invariants:
//! - A volume is attached or detached by one thread at a time, and only while its slot says so. Volumes do not wait for each other.
//! - All who wait for an attach get its result; who comes after a failure tries anew.
//! - Only an idle volume is detached, but at the end ([`Registry::close`]). A lost one (fenced) does not linger, and nobody joins it.
//! - Nothing blocks under the lock, and no lease is dropped under it: dropping a lease takes the lock.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::config::VolumeName;
use crate::error::{Context, Error, ErrorKind, Result};

/// How often to look whether an idle volume is lost.
const LOOK: Duration = Duration::from_secs(1);

/// How volumes are attached; every call but `is_lost` may block.
pub(super) trait Attacher: Send + Sync + 'static {
    /// An attached volume.
    type Volume: Send + Sync + 'static;

    fn attach(&self, name: &VolumeName) -> Result<Self::Volume>;

    /// Called once for each attached volume; it is of no use afterwards, whatever comes out.
    fn detach(&self, volume: &Self::Volume) -> Result<()>;

    /// Whether another host has taken it, or it has failed for good.
    fn is_lost(&self, volume: &Self::Volume) -> bool;
}

/// The use of an attached volume. Dropping the last one of it starts the time for which it lingers.
pub(super) struct Lease<A: Attacher> {
    volume: Arc<A::Volume>,
    name: VolumeName,
    number: u64,
    registry: Arc<Inner<A>>,
}

impl<A: Attacher> Lease<A> {
    pub(super) fn volume(&self) -> &A::Volume {
        &self.volume
    }
}

impl<A: Attacher> fmt::Debug for Lease<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lease({}, {})", self.name, self.number)
    }
}

impl<A: Attacher> Drop for Lease<A> {
    fn drop(&mut self) {
        let mut table = self.registry.table();
        if let Some(Slot::Attached { lease, idle_since, .. }) = table.slots.get_mut(&self.name)
            // Else somebody has opened it anew between the last reference's end and this.
            && lease.0 == self.number
        {
            *idle_since = Some(Instant::now());
            self.registry.changed.notify_all();
        }
    }
}

/// How an attach ended, for those who waited for it.
type Outcome = Option<Result<(), (ErrorKind, String)>>;

enum Slot<A: Attacher> {
    Attaching(Arc<Mutex<Outcome>>),
    Attached {
        volume: Arc<A::Volume>,
        /// The lease that is handed out, by number.
        lease: (u64, Weak<Lease<A>>),
        idle_since: Option<Instant>,
    },
    Detaching,
}

struct Table<A: Attacher> {
    slots: BTreeMap<VolumeName, Slot<A>>,
    /// Why the last detach failed, until one of the same volume succeeds.
    failures: BTreeMap<VolumeName, String>,
    leases: u64,
    closing: bool,
}

/// A volume whose slot says that it is being detached, which somebody has to do now.
type Due<A> = (VolumeName, Arc<<A as Attacher>::Volume>);

impl<A: Attacher> Table<A> {
    /// Takes what has lingered long enough at `now`, or is lost and idle; and says when the next will have.
    fn due(&mut self, inner: &Inner<A>, now: Instant) -> (Vec<Due<A>>, Option<Instant>) {
        let (mut due, mut next) = (Vec::new(), None::<Instant>);
        for (name, slot) in &mut self.slots {
            if let Slot::Attached { volume, idle_since: Some(since), .. } = slot {
                // A time that the clock cannot tell never comes; a lost volume is still looked for.
                let end = since.checked_add(inner.linger);
                if end.is_some_and(|end| end <= now) || inner.attacher.is_lost(volume) {
                    due.push((name.clone(), Arc::clone(volume)));
                    *slot = Slot::Detaching;
                } else {
                    let end = end.unwrap_or(now + LOOK);
                    next = Some(next.map_or(end, |n| n.min(end)));
                }
            }
        }
        (due, next)
    }
}

struct Inner<A: Attacher> {
    attacher: A,
    linger: Duration,
    table: Mutex<Table<A>>,
    /// Any change of the table that somebody may wait for.
    changed: Condvar,
}

impl<A: Attacher> Inner<A> {
    fn table(&self) -> MutexGuard<'_, Table<A>> {
        // Each change leaves the table whole, so a panic elsewhere does.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, table: MutexGuard<'a, Table<A>>) -> MutexGuard<'a, Table<A>> {
        self.changed.wait(table).unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module's page.
pub(super) struct Registry<A: Attacher>(Arc<Inner<A>>);

impl<A: Attacher> fmt::Debug for Registry<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let table = self.0.table();
        f.debug_list().entries(table.slots.keys()).finish()
    }
}

fn closing(name: &VolumeName) -> Error {
    Error::new(ErrorKind::Busy, format!("volume {name} is not attached any more: the server is being stopped"))
}

impl<A: Attacher> Registry<A> {
    /// A registry whose idle volumes wait for [`Registry::keep`] (or for [`Registry::sweep`]).
    pub(super) fn new(attacher: A, linger: Duration) -> Self {
        let table = Table { slots: BTreeMap::new(), failures: BTreeMap::new(), leases: 0, closing: false };
        Self(Arc::new(Inner { attacher, linger, table: Mutex::new(table), changed: Condvar::new() }))
    }

    pub(super) fn attacher(&self) -> &A {
        &self.0.attacher
    }

    /// Starts the thread that detaches idle volumes; it ends after [`Registry::close`].
    ///
    /// # Errors
    /// When the system has no thread to give.
    pub(super) fn keep(&self) -> Result<()> {
        let inner = Arc::clone(&self.0);
        let run = move || {
            let mut table = inner.table();
            while !table.closing {
                let (due, next) = table.due(&inner, Instant::now());
                if !due.is_empty() {
                    drop(table);
                    begin_detaches(&inner, due);
                    table = inner.table();
                    continue;
                }
                table = match next {
                    // Whoever makes one idle wakes this.
                    None => inner.wait(table),
                    Some(at) => {
                        let wait = at.saturating_duration_since(Instant::now()).min(LOOK);
                        inner.changed.wait_timeout(table, wait).unwrap_or_else(PoisonError::into_inner).0
                    }
                };
            }
        };
        let starting = || "starting the thread that detaches idle volumes";
        std::thread::Builder::new().name("linger".into()).spawn(run).map(drop).context(starting)
    }

    /// The volume, attached, and to stay so until the lease is dropped. Blocks while it is being attached or detached.
    ///
    /// # Errors
    /// Those of the attach; `Fenced` for a lost volume that others still use; `Busy` when the registry is being closed.
    pub(super) fn open(&self, name: &VolumeName) -> Result<Arc<Lease<A>>> {
        let inner = &self.0;
        let mut table = inner.table();
        loop {
            if table.closing {
                return Err(closing(name));
            }
            let Table { slots, leases, .. } = &mut *table;
            match slots.get_mut(name) {
                None => {
                    let outcome = Arc::new(Mutex::new(None));
                    slots.insert(name.clone(), Slot::Attaching(Arc::clone(&outcome)));
                    drop(table);
                    return self.attach(name, &outcome);
                }
                Some(Slot::Attaching(outcome)) => {
                    let outcome = Arc::clone(outcome);
                    loop {
                        table = inner.wait(table);
                        let ended = outcome.lock().unwrap_or_else(PoisonError::into_inner).clone();
                        match ended {
                            None => {}
                            Some(Ok(())) => break,
                            Some(Err((kind, why))) => return Err(Error::new(kind, why)),
                        }
                    }
                }
                Some(Slot::Detaching) => table = inner.wait(table),
                Some(Slot::Attached { volume, lease, idle_since }) => {
                    let lost = inner.attacher.is_lost(volume);
                    if lost && idle_since.is_some() {
                        // It goes, and is attached anew.
                        let volume = Arc::clone(volume);
                        slots.insert(name.clone(), Slot::Detaching);
                        drop(table);
                        detach(inner, name, &volume);
                        table = inner.table();
                        continue;
                    }
                    if lost {
                        let what = format!(
                            "volume {name} is lost to this server: it is attached anew when the last of its clients has left"
                        );
                        return Err(Error::new(ErrorKind::Fenced, what));
                    }
                    if let Some(lease) = lease.1.upgrade() {
                        return Ok(lease);
                    }
                    *leases += 1;
                    let fresh = Arc::new(Lease {
                        volume: Arc::clone(volume),
                        name: name.clone(),
                        number: *leases,
                        registry: Arc::clone(inner),
                    });
                    *lease = (*leases, Arc::downgrade(&fresh));
                    *idle_since = None;
                    return Ok(fresh);
                }
            }
        }
    }

    /// Attaches for this opener and all who wait.
    fn attach(&self, name: &VolumeName, outcome: &Mutex<Outcome>) -> Result<Arc<Lease<A>>> {
        let inner = &self.0;
        let attached = inner.attacher.attach(name);
        let mut table = inner.table();
        let said = attached.as_ref().map(drop).map_err(|e| (e.kind(), e.to_string()));
        *outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(said);
        inner.changed.notify_all();
        let volume = match attached {
            Ok(volume) => Arc::new(volume),
            Err(e) => {
                table.slots.remove(name);
                return Err(e);
            }
        };
        if table.closing {
            // Whoever closes the registry detaches it.
            let slot = Slot::Attached { volume, lease: (0, Weak::new()), idle_since: Some(Instant::now()) };
            table.slots.insert(name.clone(), slot);
            return Err(closing(name));
        }
        table.leases += 1;
        let number = table.leases;
        let lease =
            Arc::new(Lease { volume: Arc::clone(&volume), name: name.clone(), number, registry: Arc::clone(inner) });
        let slot = Slot::Attached { volume, lease: (number, Arc::downgrade(&lease)), idle_since: None };
        table.slots.insert(name.clone(), slot);
        Ok(lease)
    }

    /// The volume, if it is attached.
    pub(super) fn attached(&self, name: &VolumeName) -> Option<Arc<A::Volume>> {
        match self.0.table().slots.get(name) {
            Some(Slot::Attached { volume, .. }) => Some(Arc::clone(volume)),
            _ => None,
        }
    }

    /// Those that are attached.
    pub(super) fn all_attached(&self) -> Vec<Arc<A::Volume>> {
        let volume = |slot: &Slot<A>| match slot {
            Slot::Attached { volume, .. } => Some(Arc::clone(volume)),
            _ => None,
        };
        self.0.table().slots.values().filter_map(volume).collect()
    }

    /// The volumes that are attached, or being attached or detached.
    pub(super) fn busy(&self) -> Vec<VolumeName> {
        self.0.table().slots.keys().cloned().collect()
    }

    /// What the thread of [`Registry::keep`] does, once, at time `now`.
    #[cfg(test)]
    fn sweep(&self, now: Instant) -> Option<Instant> {
        let (due, next) = self.0.table().due(&self.0, now);
        begin_detaches(&self.0, due);
        next
    }

    /// Detaches every volume, side by side, after those under way; nothing is opened any more. The leases should be gone.
    ///
    /// # Errors
    /// The failures to detach that nothing has made good since, of this call and before.
    pub(super) fn close(&self) -> Result<()> {
        let inner = &self.0;
        let mut table = inner.table();
        table.closing = true;
        inner.changed.notify_all();
        while !table.slots.is_empty() {
            let attached = table.slots.iter().find_map(|(name, slot)| match slot {
                Slot::Attached { volume, idle_since, .. } => {
                    Some((name.clone(), Arc::clone(volume), idle_since.is_some()))
                }
                _ => None,
            });
            let Some((name, volume, idle)) = attached else {
                table = inner.wait(table);
                continue;
            };
            if !idle {
                tracing::warn!("volume {name} is detached although somebody still uses it");
            }
            table.slots.insert(name.clone(), Slot::Detaching);
            drop(table);
            begin_detach(inner, name, volume);
            table = inner.table();
        }
        let failures: Vec<_> = table.failures.values().cloned().collect();
        if failures.is_empty() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Io, failures.join("; ")))
    }
}

fn begin_detaches<A: Attacher>(inner: &Arc<Inner<A>>, due: Vec<Due<A>>) {
    for (name, volume) in due {
        begin_detach(inner, name, volume);
    }
}

/// Detaches on a thread of its own, or on this one when there is none. The slot says `Detaching` already.
fn begin_detach<A: Attacher>(inner: &Arc<Inner<A>>, name: VolumeName, volume: Arc<A::Volume>) {
    let (own, own_name, own_volume) = (Arc::clone(inner), name.clone(), Arc::clone(&volume));
    let run = move || {
        detach(&own, &own_name, &own_volume);
    };
    if let Err(e) = std::thread::Builder::new().name("detach".into()).spawn(run) {
        tracing::warn!("starting a thread to detach volume {name}: {e}; others wait for it");
        detach(inner, &name, &volume);
    }
}

fn detach<A: Attacher>(inner: &Inner<A>, name: &VolumeName, volume: &A::Volume) {
    let done = inner.attacher.detach(volume);
    let mut table = inner.table();
    match done {
        Ok(()) => {
            table.failures.remove(name);
        }
        Err(e) => {
            tracing::error!("{e}");
            table.failures.insert(name.clone(), e.to_string());
        }
    }
    table.slots.remove(name);
    inner.changed.notify_all();
}

#[cfg(test)]
#[path = "registry_tests.rs"]
mod tests;
