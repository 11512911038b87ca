use uuid::Uuid;

use super::*;
use crate::cache::CacheStatus;
use crate::config::FlushTo;
use crate::frontend::nbd::ServerStatus;
use crate::store::metrics::{OpCounts, Snapshot};
use crate::volume::counts::{RequestCounts, Requests};
use crate::volume::{BackgroundStatus, SpaceStatus};
use crate::wal::log::LogStatus;

fn status() -> VolumeStatus {
    let space = SpaceStatus {
        logical_bytes: 1 << 30,
        mapped_bytes: 3 << 20,
        shared_bytes: 1 << 20,
        stored_bytes: 8 << 20,
        live_bytes: 2 << 20,
        snapshot_bytes: 4096,
        garbage_bytes: 5 << 20,
        gc_read_bytes: 11,
        gc_written_bytes: 12,
        gc_deleted_objects: 14,
        gc_deleted_chunks: 13,
        gc_requests: 15,
    };
    VolumeStatus {
        name: "v".into(),
        uuid: Uuid::nil(),
        size_bytes: 1 << 30,
        logical_block: 512,
        read_only: false,
        flush: FlushTo::Wal,
        confirmed: true,
        store_url: "memory:x".into(),
        log: LogStatus {
            capacity_bytes: 64 << 20,
            ready_bytes: 8 << 20,
            used_bytes: 4 << 20,
            entries: 3,
            pending_bytes: 12_288,
            last_seq: 9,
            packed_seq: 6,
            syncs: 5,
        },
        log_path: "/w".into(),
        mapped_blocks: 768,
        map_bytes: 65_536,
        write_limit: Some(1 << 20),
        timeouts: 2,
        failure: None,
        background: BackgroundStatus {
            epoch: 7,
            snapshots: 1,
            oldest_pending_secs: Some(1.5),
            upload_bytes_per_sec: Some(2.5e6),
            space: Some(space),
            ..BackgroundStatus::default()
        },
        requests: Requests {
            read: RequestCounts { requests: 1, errors: 0, bytes: 512 },
            write: RequestCounts { requests: 3, errors: 1, bytes: 8192 },
            ..Requests::default()
        },
        store_requests: Snapshot {
            get: OpCounts { requests: 2, errors: 1, bytes_in: 100, bytes_out: 0 },
            put: OpCounts { requests: 4, errors: 0, bytes_in: 0, bytes_out: 4_194_304 },
            ..Snapshot::default()
        },
        cache: Some(CacheStatus {
            size_bytes: 1 << 30,
            used_bytes: 1 << 20,
            hits: 5,
            hit_bytes: 20_480,
            misses: 2,
            ..CacheStatus::default()
        }),
    }
}

fn volume(name: &str, phase: Phase, engine: Option<VolumeStatus>) -> VolumeFigures {
    VolumeFigures { name: name.into(), phase, engine }
}

#[test]
fn the_text_is_what_it_was() {
    let volumes = vec![volume("v", Phase::Serving, Some(status())), volume("new", Phase::Attaching, None)];
    let server = Some(ServerStatus { connections: 1, accepted: 4, refused: 2 });
    let text = of(Figures { volumes, server }).expect("text").replace(env!("CARGO_PKG_VERSION"), "VERSION");
    assert_eq!(text, include_str!("golden.txt"), "{text}");
}

#[test]
fn what_is_not_known_is_left_out() {
    let text = of(Figures::default()).expect("text");
    assert!(
        text.starts_with("# HELP vb_ublk_build ") && text.ends_with("# EOF\n") && text.lines().count() == 4,
        "{text}"
    );
    let mut v = status();
    (v.write_limit, v.background.upload_bytes_per_sec, v.background.space) = (None, None, None);
    let text = of(Figures { volumes: vec![volume("v", Phase::Serving, Some(v))], server: None }).expect("text");
    for absent in ["write_limit", "upload_bytes_per_second", "space_", "nbd_"] {
        assert!(!text.contains(absent), "{absent} in\n{text}");
    }
    // A counter that begins with the first event is none that a rate can be taken of.
    assert!(text.contains("vb_ublk_gc_deleted_chunks_total{volume=\"v\"} 0\n"), "{text}");
}

#[test]
fn trouble_shows() {
    let (mut away, mut broken) = (status(), status());
    away.background.store_trouble = Some("no answer".into());
    away.background.store_trouble_secs = Some(90.0);
    broken.failure = Some("the log".into());
    let volumes = vec![volume("a", Phase::Serving, Some(away)), volume("b", Phase::Detaching, Some(broken))];
    let text = of(Figures { volumes, server: None }).expect("text");
    for (name, a, b) in [
        ("store_up", "0.0", "1.0"),
        ("store_trouble_seconds", "90.0", "0.0"),
        ("volume_failed", "0.0", "1.0"),
        ("volume_serving", "1.0", "0.0"),
    ] {
        let both = format!("vb_ublk_{name}{{volume=\"a\"}} {a}\nvb_ublk_{name}{{volume=\"b\"}} {b}\n");
        assert!(text.contains(&both), "{both} in\n{text}");
    }
}
