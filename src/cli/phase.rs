//! How far the serving of a volume is, and how its process describes it to those who ask.

use std::time::Instant;

use serde_json::{Value, json};

use super::state::State;

/// It goes attaching → serving → detaching, never back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Attaching,
    Serving,
    Detaching,
}

impl Phase {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Attaching => "attaching",
            Self::Serving => "serving",
            Self::Detaching => "detaching",
        }
    }
}

/// The answer to `status`: of a volume that is served as a device or over NBD. `engine` is what the engine says of it, once attached.
pub(super) fn describe(state: &State, phase: Phase, begun: Instant, engine: Option<Value>) -> Value {
    json!({
        "volume": state.volume,
        "device": state.device_path(),
        "nbd": state.endpoints(),
        "metrics": state.metrics,
        "state": phase.name(),
        "pid": state.pid,
        "started_unix_secs": state.started_unix_secs,
        "uptime_secs": begun.elapsed().as_secs(),
        "store": state.store,
        "wal": state.wal,
        "daemon_log": state.daemon_log,
        "engine": engine,
    })
}
