//! How far a long command is: one line on stderr that is written over, when that is a terminal.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

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

/// Of something whose end is not known.
const WITHOUT_END: &str = "{msg}: {binary_bytes}, {binary_bytes_per_sec}";
const WITH_END: &str = "{msg}: [{wide_bar}] {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";

/// The same with bytes, rate and the time that is left.
pub(super) struct Bar {
    bar: ProgressBar,
    of: Option<u64>,
}

impl Bar {
    /// Shown if it is `wanted` and somebody looks.
    pub(super) fn new(wanted: bool, what: &str) -> Self {
        let target = if wanted { ProgressDrawTarget::stderr_with_hz(4) } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(None, target).with_message(what.to_owned());
        style(&bar, WITHOUT_END);
        Self { bar, of: None }
    }

    /// `bytes` are done, of so many if that is known.
    pub(super) fn at(&mut self, bytes: u64, of: Option<u64>) {
        if let Some(of) = of
            && self.of != Some(of)
        {
            self.of = Some(of);
            self.bar.set_length(of);
            style(&self.bar, WITH_END);
        }
        self.bar.set_position(bytes);
    }

    pub(super) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

fn style(bar: &ProgressBar, template: &str) {
    // One that makes no sense would be found by the test; without it there is the library's own.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bars_make_sense() {
        for template in [WITHOUT_END, WITH_END] {
            ProgressStyle::with_template(template).expect(template);
        }
    }
}
