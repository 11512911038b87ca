//! What is waited for and tried again: pauses, absences, the look at the manifest, and what is told of a store in trouble.

use std::time::Duration;

use super::{Background, Event, POLL_MANIFEST, POLLS_WITHOUT_MANIFEST, RETRY_PAUSE, RETRY_PAUSE_MAX};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::Published;
use crate::time::Timer;
use crate::volume::Volume;

/// How often in a row there was no manifest. Once may be an outage (a mount that is away, a proxy); several times are a deleted
/// volume.
#[derive(Default)]
pub(in crate::volume) struct Absences(u32);

impl Absences {
    pub(in crate::volume) const fn are_some(&self) -> bool {
        self.0 > 0
    }

    /// Once more; whether the volume counts as deleted now.
    pub(in crate::volume) fn one_more(&mut self) -> bool {
        self.0 += 1;
        self.0 >= POLLS_WITHOUT_MANIFEST
    }
}

impl<D: Disk + Clone, T: Timer> Background<D, T> {
    /// Looks whether the manifest still names this attachment; whatever else is going on with it.
    pub(super) fn poll_manifest(&mut self, now: Duration) {
        if self.polling || now.saturating_sub(self.last_poll) < POLL_MANIFEST {
            return;
        }
        self.polling = true;
        self.last_poll = now;
        let (store, volume, nonce) = (self.store.clone(), self.volume.clone(), self.nonce);
        self.spawn(async move {
            let result = Published::load(&*store, volume.name()).await;
            Event::Polled(result.and_then(|p| p.check_nonce(nonce)))
        });
    }

    pub(super) fn polled(&mut self, result: Result<()>) {
        self.polling = false;
        match result {
            Ok(()) => self.absences = Absences::default(),
            Err(e) if e.kind() == ErrorKind::Fenced => self.fenced(&e),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                if self.absences.one_more() {
                    self.fenced(&e);
                }
            }
            Err(e) => tracing::debug!("looking at the manifest failed: {e}"),
        }
    }
}

/// Pauses that double.
pub(in crate::volume) struct Backoff(Duration);

impl Backoff {
    pub(in crate::volume) const fn new() -> Self {
        Self(RETRY_PAUSE)
    }

    pub(in crate::volume) async fn pause<T: Timer>(&mut self, timer: &T) {
        timer.sleep(self.0).await;
        self.0 = (self.0 * 2).min(RETRY_PAUSE_MAX);
    }
}

/// Notes a failure of the store for `status`, and says it once when it begins.
pub(in crate::volume) fn trouble(volume: &Volume, what: &str, e: &Error) {
    volume.update_background(|s| {
        if s.store_trouble.is_none() {
            tracing::warn!("{what}: {e}; it goes on as soon as the store answers");
        }
        s.store_trouble = Some(format!("{what}: {e}"));
    });
}

pub(super) fn no_trouble(volume: &Volume) {
    volume.update_background(|s| {
        if s.store_trouble.take().is_some() {
            tracing::info!("the store answers again");
        }
    });
}
