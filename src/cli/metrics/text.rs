//! The figures in the text format that Prometheus reads (OpenMetrics 1.0). Pure.
//!
//! What is not known is left out: a 0 would be a figure.

use std::fmt;

use hyper::header::HeaderValue;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::super::engine::VolumeStatus;
use super::super::phase::Phase;
use super::{Figures, VolumeFigures};
use crate::units::BLOCK;

pub(super) const CONTENT_TYPE: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
const PREFIX: &str = "vb_ublk";

/// A name without prefix, unit and `_total`.
type Name = &'static str;
type Help = &'static str;
type Labels = Vec<(&'static str, String)>;

/// What a sample is measured in; counts have none.
#[derive(Clone, Copy)]
enum In {
    Count,
    Bytes,
    Seconds,
}

impl In {
    fn unit(self) -> Option<Unit> {
        match self {
            Self::Count => None,
            Self::Bytes => Some(Unit::Bytes),
            Self::Seconds => Some(Unit::Seconds),
        }
    }
}

/// A gauge of a volume.
type Gauge = (Name, In, Help, fn(&VolumeStatus) -> Option<f64>);
/// A counter of a volume.
type Counter = (Name, In, Help, fn(&VolumeStatus) -> u64);
/// A counter of a volume for each kind of request.
type ByKind = (Name, In, Help, fn(&VolumeStatus) -> Vec<(&'static str, u64)>);

const fn yes(is: bool) -> Option<f64> {
    Some(if is { 1.0 } else { 0.0 })
}

const fn number(n: u64) -> Option<f64> {
    Some(n as f64)
}

const GAUGES: &[Gauge] = &[
    ("volume_size", In::Bytes, "Size of the volume", |v| number(v.size_bytes)),
    ("volume_mapped", In::Bytes, "What of the volume has content in the store", |v| {
        number(v.mapped_blocks * BLOCK as u64)
    }),
    ("volume_read_only", In::Count, "Whether writes are refused", |v| yes(v.read_only)),
    (
        "volume_confirmed",
        In::Count,
        "Whether the store has been asked since a recovery: before, only the log is served",
        |v| yes(v.confirmed),
    ),
    (
        "volume_failed",
        In::Count,
        "Whether the log or the volume has failed for good, or another host has taken it",
        |v| yes(v.failure.is_some()),
    ),
    ("volume_epoch", In::Count, "Number of this attachment", |v| number(v.background.epoch)),
    ("volume_snapshots", In::Count, "Snapshots of the volume", |v| number(v.background.snapshots)),
    ("map_memory", In::Bytes, "Memory of the maps", |v| number(v.map_bytes)),
    ("store_up", In::Count, "Whether the store answers, and nothing is wrong with it", |v| {
        yes(v.background.store_trouble.is_none())
    }),
    ("store_trouble", In::Seconds, "For how long something has been wrong with the store; 0 when nothing is", |v| {
        Some(v.background.store_trouble_secs.unwrap_or(0.0))
    }),
    ("log_size", In::Bytes, "What the log may grow to", |v| number(v.log.capacity_bytes)),
    ("log_ready", In::Bytes, "What the log has on the disk so far", |v| number(v.log.ready_bytes)),
    ("log_used", In::Bytes, "What of the log cannot be reused yet", |v| number(v.log.used_bytes)),
    ("log_pending", In::Bytes, "Data in the log that is not in the store yet: the backlog of uploads", |v| {
        number(v.log.pending_bytes)
    }),
    ("log_pending_entries", In::Count, "Entries in the log that are not in the store yet", |v| number(v.log.entries)),
    (
        "log_pending_age",
        In::Seconds,
        "How long the oldest entry that is not in the store yet has been waiting; 0 when none is",
        |v| Some(v.background.oldest_pending_secs.unwrap_or(0.0)),
    ),
    ("upload_bytes_per_second", In::Count, "What uploads have lately reached; absent before the first", |v| {
        v.background.upload_bytes_per_sec
    }),
    ("write_limit_bytes_per_second", In::Count, "What writes are slowed to; absent while they are not", |v| {
        v.write_limit.map(|n| n as f64)
    }),
    ("space_logical", In::Bytes, "Size of the volume at the last count of what it takes in the store", |v| {
        v.background.space.and_then(|s| number(s.logical_bytes))
    }),
    ("space_mapped", In::Bytes, "What of the volume had content at the last count", |v| {
        v.background.space.and_then(|s| number(s.mapped_bytes))
    }),
    ("space_shared", In::Bytes, "What of the volume's content is in chunks of the volumes it was cloned from", |v| {
        v.background.space.and_then(|s| number(s.shared_bytes))
    }),
    ("space_stored", In::Bytes, "What the volume's own chunks take in the store", |v| {
        v.background.space.and_then(|s| number(s.stored_bytes))
    }),
    ("space_live", In::Bytes, "What of the volume's own chunks it needs", |v| {
        v.background.space.and_then(|s| number(s.live_bytes))
    }),
    ("space_snapshot", In::Bytes, "What is kept for snapshots: the rest of the chunks that they name", |v| {
        v.background.space.and_then(|s| number(s.snapshot_bytes))
    }),
    ("space_garbage", In::Bytes, "What of the volume's own chunks nobody needs", |v| {
        v.background.space.and_then(|s| number(s.garbage_bytes))
    }),
    ("cache_size", In::Bytes, "Size of the local cache; absent without one", |v| {
        v.cache.and_then(|c| number(c.size_bytes))
    }),
    ("cache_used", In::Bytes, "What of the local cache has content", |v| v.cache.and_then(|c| number(c.used_bytes))),
];

const COUNTERS: &[Counter] = &[
    ("request_timeouts", In::Count, "Requests that failed because they would have waited too long", |v| v.timeouts),
    ("log_syncs", In::Count, "Syncs of the log that flushes, FUA writes or time asked for", |v| v.log.syncs),
    ("gc_requests", In::Count, "Requests to the store for garbage collection, without what was tried again", |v| {
        v.background.space.unwrap_or_default().gc_requests
    }),
    ("gc_read", In::Bytes, "What garbage collection has read from the store", |v| {
        v.background.space.unwrap_or_default().gc_read_bytes
    }),
    ("gc_written", In::Bytes, "Chunks that garbage collection has written", |v| {
        v.background.space.unwrap_or_default().gc_written_bytes
    }),
    ("gc_deleted_chunks", In::Count, "Chunks that garbage collection has deleted", |v| {
        v.background.space.unwrap_or_default().gc_deleted_chunks
    }),
    ("gc_deleted_objects", In::Count, "Objects that garbage collection has deleted, chunks and others", |v| {
        v.background.space.unwrap_or_default().gc_deleted_objects
    }),
    ("cache_hits", In::Count, "Reads, or parts of reads, that the local cache answered", |v| {
        v.cache.unwrap_or_default().hits
    }),
    ("cache_hit", In::Bytes, "Bytes that the local cache answered reads with", |v| {
        v.cache.unwrap_or_default().hit_bytes
    }),
    ("cache_misses", In::Count, "Reads, or parts of reads, that had to go to the store past a local cache", |v| {
        v.cache.unwrap_or_default().misses
    }),
    ("cache_miss", In::Bytes, "Bytes of reads that had to go to the store past a local cache", |v| {
        v.cache.unwrap_or_default().miss_bytes
    }),
    ("cache_ahead", In::Bytes, "What was fetched into the local cache before it was asked for", |v| {
        v.cache.unwrap_or_default().ahead_bytes
    }),
    ("cache_written", In::Bytes, "What was written to the local cache", |v| v.cache.unwrap_or_default().written_bytes),
    ("cache_damaged_pages", In::Count, "Pages of the local cache that failed their check and were forgotten", |v| {
        v.cache.unwrap_or_default().damaged
    }),
];

const BY_KIND: &[ByKind] = &[
    ("requests", In::Count, "Requests of clients or the kernel that were answered", |v| {
        v.requests.by_kind().map(|(op, c)| (op, c.requests)).into()
    }),
    ("request_errors", In::Count, "Requests of clients or the kernel that failed", |v| {
        v.requests.by_kind().map(|(op, c)| (op, c.errors)).into()
    }),
    ("request", In::Bytes, "Bytes of the volume that requests were about which succeeded", |v| {
        v.requests.by_kind().map(|(op, c)| (op, c.bytes)).into()
    }),
    ("store_requests", In::Count, "Requests to the store that were answered, or given up", |v| {
        v.store_requests.by_kind().map(|(op, c)| (op, c.requests)).into()
    }),
    ("store_request_errors", In::Count, "Requests to the store that failed, conflicts included", |v| {
        v.store_requests.by_kind().map(|(op, c)| (op, c.errors)).into()
    }),
    ("store_received", In::Bytes, "Data of objects received from the store", |v| {
        v.store_requests.by_kind().map(|(op, c)| (op, c.bytes_in)).into()
    }),
    ("store_sent", In::Bytes, "Data of objects sent to the store by requests that succeeded", |v| {
        v.store_requests.by_kind().map(|(op, c)| (op, c.bytes_out)).into()
    }),
];

/// The whole text.
///
/// # Errors
/// None that is known: text is only added to.
pub(super) fn of(figures: Figures) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(figures));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

impl Collector for Figures {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let e = &mut encoder;
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        e.encode_descriptor("build", "The program", None, MetricType::Info)?.encode_info(&version)?;
        if let Some(server) = &self.server {
            gauges(e, "nbd_clients", In::Count, "Clients now", [(Labels::new(), server.connections as f64)])?;
            let accepted = [(Labels::new(), server.accepted)];
            counters(e, "nbd_clients_accepted", In::Count, "Clients so far, those turned away included", accepted)?;
            let refused = [(Labels::new(), server.refused)];
            counters(e, "nbd_clients_refused", In::Count, "Clients turned away, because there were too many", refused)?;
        }
        let serving = |v: &VolumeFigures| (labels(v), f64::from(u8::from(v.phase == Phase::Serving)));
        let help = "Whether the volume is served: 0 while it is being attached or detached";
        gauges(e, "volume_serving", In::Count, help, self.volumes.iter().map(serving))?;
        let attached = || self.volumes.iter().filter_map(|v| Some((v, v.engine.as_ref()?)));
        for (name, unit, help, get) in GAUGES {
            gauges(e, name, *unit, help, attached().filter_map(|(v, engine)| Some((labels(v), get(engine)?))))?;
        }
        for (name, unit, help, get) in COUNTERS {
            counters(e, name, *unit, help, attached().map(|(v, engine)| (labels(v), get(engine))))?;
        }
        for (name, unit, help, get) in BY_KIND {
            let of = |v: &VolumeFigures, op: &str| vec![("volume", v.name.clone()), ("op", op.to_owned())];
            let all = attached().flat_map(|(v, engine)| get(engine).into_iter().map(move |(op, n)| (of(v, op), n)));
            counters(e, name, *unit, help, all)?;
        }
        Ok(())
    }
}

fn labels(v: &VolumeFigures) -> Labels {
    vec![("volume", v.name.clone())]
}

fn gauges(
    e: &mut DescriptorEncoder<'_>,
    name: Name,
    unit: In,
    help: Help,
    samples: impl IntoIterator<Item = (Labels, f64)>,
) -> fmt::Result {
    let mut samples = samples.into_iter().peekable();
    if samples.peek().is_none() {
        return Ok(());
    }
    let unit = unit.unit();
    let mut family = e.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
    samples.try_for_each(|(labels, v)| {
        if labels.is_empty() { family.encode_gauge(&v) } else { family.encode_family(&labels)?.encode_gauge(&v) }
    })
}

fn counters(
    e: &mut DescriptorEncoder<'_>,
    name: Name,
    unit: In,
    help: Help,
    samples: impl IntoIterator<Item = (Labels, u64)>,
) -> fmt::Result {
    let mut samples = samples.into_iter().peekable();
    if samples.peek().is_none() {
        return Ok(());
    }
    let unit = unit.unit();
    let mut family = e.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
    samples.try_for_each(|(labels, v)| {
        if labels.is_empty() {
            family.encode_counter::<NoLabelSet, _, f64>(&v, None)
        } else {
            family.encode_family(&labels)?.encode_counter::<NoLabelSet, _, f64>(&v, None)
        }
    })
}

#[cfg(test)]
#[path = "text_tests.rs"]
mod tests;
