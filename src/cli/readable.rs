//! Counters and space as people read them in `status` and `volume info`: a line for each kind, not one for each figure.

use serde_json::{Map, Value};

use super::output::fields;
use crate::units::human_bytes;

fn number(v: &Value, key: &str) -> u64 {
    v[key].as_u64().unwrap_or(0)
}

fn bytes(v: &Value, key: &str) -> String {
    human_bytes(number(v, key))
}

/// What a volume takes, by kind: `10 GiB logical, 3 GiB mapped; 4 GiB stored: …`.
pub(super) fn space(s: &Value) -> String {
    let shared = match number(s, "shared_bytes") {
        0 => String::new(),
        n => format!(", {} of it in chunks of the volumes that it was cloned from", human_bytes(n)),
    };
    format!(
        "{} logical, {} mapped{shared}; {} stored: {} live, {} garbage, {} kept for snapshots",
        bytes(s, "logical_bytes"),
        bytes(s, "mapped_bytes"),
        bytes(s, "stored_bytes"),
        bytes(s, "live_bytes"),
        bytes(s, "garbage_bytes"),
        bytes(s, "snapshot_bytes"),
    )
}

/// What collecting garbage has cost and brought.
fn collected(s: &Value) -> String {
    format!(
        "{} requests, {} read, {} written, {} objects deleted",
        number(s, "gc_requests"),
        bytes(s, "gc_read_bytes"),
        bytes(s, "gc_written_bytes"),
        number(s, "gc_deleted_objects")
    )
}

/// A line for each kind of request that there was: `12, 1 failed, 48 MiB sent`.
fn by_kind(all: &Value, sizes: &[(&str, &str)]) -> Value {
    let mut lines = Map::new();
    for (op, counts) in all.as_object().into_iter().flatten() {
        let requests = number(counts, "requests");
        if requests == 0 {
            continue;
        }
        let mut line = requests.to_string();
        if number(counts, "errors") > 0 {
            line += &format!(", {} failed", number(counts, "errors"));
        }
        for (key, word) in sizes {
            if number(counts, key) > 0 {
                line += &format!(", {}{word}", bytes(counts, key));
            }
        }
        lines.insert(op.clone(), line.into());
    }
    Value::Object(lines)
}

/// A volume's status as lines for people.
pub(super) fn status(v: &Value) -> String {
    let mut v = v.clone();
    if let Some(engine) = v.get_mut("engine").filter(|e| e.is_object()) {
        engine["requests"] = by_kind(&engine["requests"], &[("bytes", "")]);
        engine["store_requests"] =
            by_kind(&engine["store_requests"], &[("bytes_in", " received"), ("bytes_out", " sent")]);
        let found = engine["background"]["space"].clone();
        if found.is_object() {
            engine["background"]["space"] = space(&found).into();
            engine["background"]["garbage_collection"] = collected(&found).into();
        } else if engine["background"].is_object() {
            engine["background"]["space"] = "not counted yet (`vb-ublk volume info --space` counts it)".into();
        }
    }
    fields(&v)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_status_has_a_line_for_each_kind() {
        let gib = 1_u64 << 30;
        let mut v = json!({ "volume": "v", "engine": {
            "requests": { "read": { "requests": 3, "errors": 0, "bytes": 4096 }, "flush": { "requests": 2, "errors": 1, "bytes": 0 },
                          "discard": { "requests": 0, "errors": 0, "bytes": 0 } },
            "store_requests": { "put": { "requests": 12, "errors": 1, "bytes_in": 0, "bytes_out": 4 << 20 },
                                "get_range": { "requests": 1, "errors": 0, "bytes_in": 512, "bytes_out": 0 } },
            "background": { "space": {
                "logical_bytes": 10 * gib, "mapped_bytes": 3 * gib, "shared_bytes": gib, "stored_bytes": 4 * gib, "live_bytes": 2 * gib,
                "garbage_bytes": gib, "snapshot_bytes": 512, "gc_requests": 9, "gc_read_bytes": 1024, "gc_written_bytes": 512,
                "gc_deleted_objects": 7, "gc_deleted_chunks": 5 } },
        } });
        let said = status(&v);
        for line in [
            "    read: 3, 4 KiB\n",
            "    flush: 2, 1 failed\n",
            "  store requests:\n",
            "    put: 12, 1 failed, 4 MiB sent\n",
            "    get range: 1, 512 B received\n",
            "    space: 10 GiB logical, 3 GiB mapped, 1 GiB of it in chunks of the volumes that it was cloned from; 4 GiB stored: 2 GiB live, \
             1 GiB garbage, 512 B kept for snapshots\n",
            "    garbage collection: 9 requests, 1 KiB read, 512 B written, 7 objects deleted\n",
        ] {
            assert!(said.contains(line), "{line:?} in\n{said}");
        }
        assert!(!said.contains("discard"), "there was none:\n{said}");
        v["engine"]["background"]["space"] = Value::Null;
        assert!(status(&v).contains("    space: not counted yet"), "{}", status(&v));
        let attaching = json!({ "volume": "v", "engine": null });
        assert_eq!(status(&attaching), fields(&attaching));
        assert!(
            status(&json!({ "engine": { "mapped_blocks": 7 } })).contains("mapped blocks: 7\n"),
            "of an older daemon"
        );
    }
}
