//! What is waited for and tried again: pauses, absences, and what is told of a store in trouble.

use std::time::Duration;

use super::{POLLS_WITHOUT_MANIFEST, RETRY_PAUSE, RETRY_PAUSE_MAX};
use crate::error::Error;
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
