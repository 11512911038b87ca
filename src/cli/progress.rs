//! How far a long command is: one line on stderr that is written over, when that is a terminal.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// How often to say it.
const SAY: Duration = Duration::from_millis(500);

pub(super) struct Progress {
    shown: bool,
    said: Option<Instant>,
    dirty: bool,
}

impl Progress {
    /// Shown if it is `wanted` and somebody looks.
    pub(super) fn new(wanted: bool) -> Self {
        Self { shown: wanted && std::io::stderr().is_terminal(), said: None, dirty: false }
    }

    /// Says what `text` has to say, unless that was done a moment ago.
    pub(super) fn say(&mut self, text: impl FnOnce() -> Option<String>) {
        if !self.shown || self.said.is_some_and(|s| s.elapsed() < SAY) {
            return;
        }
        self.said = Some(Instant::now());
        if let Some(text) = text() {
            // A terminal that has gone is no reason to stop.
            let _ = write!(std::io::stderr(), "\r\x1b[K{text}");
            self.dirty = true;
        }
    }

    pub(super) fn clear(&mut self) {
        if std::mem::take(&mut self.dirty) {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}
