//! `list` and `status`.

use serde_json::{Value, json};

use super::control;
use super::engine;
use super::output::{duration, print, print_json, table};
use super::readable;
use super::state::{RunDir, State};
use crate::config::VolumeName;
use crate::error::{Error, ErrorKind, Result};
use crate::units::human_bytes;

/// What a volume of this host is, as far as it can be found out.
fn look(run: &RunDir, state: &State) -> Result<Value> {
    let mut v = json!({
        "volume": state.volume,
        "device": state.device_path(),
        "nbd": state.endpoints(),
        "metrics": null,
        "state": "dead",
        "pid": state.pid,
        "started_unix_secs": state.started_unix_secs,
        "store": state.store,
        "wal": state.wal,
        "daemon_log": state.daemon_log,
        "failure": state.failure,
        "engine": null,
    });
    if !run.is_held(&state.volume)? {
        if state.failure.is_some() {
            v["state"] = "failed".into();
        }
        return Ok(v);
    }
    match run.socket_path(&state.volume).and_then(|s| control::status(&s)) {
        Ok(Value::Object(said)) => {
            if let Some(all) = v.as_object_mut() {
                all.extend(said);
            }
            if let Some(failure) = v.pointer("/engine/failure").filter(|f| !f.is_null()).cloned() {
                v["failure"] = failure;
                v["state"] = "failed".into();
            }
        }
        Ok(_) => v["state"] = "not answering".into(),
        Err(e) => {
            v["state"] = "not answering".into();
            v["failure"] = e.to_string().into();
        }
    }
    Ok(v)
}

/// Everything attached on this host. What cannot be read is in the list, too, and what dead programs have left in the kernel.
fn everything(run: &RunDir) -> Result<Vec<Value>> {
    let mut all = Vec::new();
    let mut known = Vec::new();
    for (volume, state) in run.all()? {
        known.extend(state.as_ref().ok().and_then(|s| s.device));
        let seen = state.and_then(|s| look(run, &s));
        all.push(seen.unwrap_or_else(|e| json!({ "volume": volume, "state": "unknown", "failure": e.to_string() })));
    }
    // Asking takes rights that listing does not.
    match engine::orphans(&known) {
        Ok(devices) => all.extend(devices.iter().map(orphan)),
        Err(e) => tracing::debug!("looking for devices without a server: {e}"),
    }
    Ok(all)
}

/// A device without a server and without a state: of another program, or the run folder was wiped.
fn orphan(d: &engine::DeviceStatus) -> Value {
    json!({ "volume": null, "device": engine::device_path(d.id), "state": "orphaned", "failure": null })
}

fn bytes(v: &Value, pointer: &str) -> Option<u64> {
    v.pointer(pointer).and_then(Value::as_u64)
}

fn row(v: &Value) -> Vec<String> {
    let dash = || "-".to_owned();
    let text = |key: &str| match &v[key] {
        Value::String(s) => s.clone(),
        Value::Number(n) => n.to_string(),
        _ => dash(),
    };
    let pending = bytes(v, "/engine/log/pending_bytes").map_or_else(dash, human_bytes);
    let age = v.pointer("/engine/background/oldest_pending_secs").and_then(Value::as_f64).map_or_else(dash, duration);
    let wal = match (bytes(v, "/engine/log/used_bytes"), bytes(v, "/engine/log/capacity_bytes")) {
        (Some(used), Some(all)) if all > 0 => format!("{} %", u128::from(used) * 100 / u128::from(all)),
        _ => dash(),
    };
    let size = bytes(v, "/engine/size_bytes").map_or_else(dash, human_bytes);
    let place = match v["nbd"].as_array() {
        Some(uris) => uris.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "),
        None => text("device"),
    };
    vec![place, text("volume"), text("pid"), size, text("store"), text("state"), pending, age, wal]
}

pub(super) fn list(run: &RunDir, as_json: bool) -> Result<()> {
    let all = everything(run)?;
    if as_json {
        return print_json(&Value::Array(all));
    }
    let rows: Vec<_> = all.iter().map(row).collect();
    print(&table(&["DEVICE", "VOLUME", "PID", "SIZE", "STORE", "STATE", "PENDING", "AGE", "WAL"], &rows))?;
    let notes = all.iter().filter_map(note);
    print(&notes.collect::<String>())
}

/// What to do about a volume that needs something done.
fn note(v: &Value) -> Option<String> {
    if v["state"] == "orphaned" {
        let device = v["device"].as_str()?;
        let number = device.trim_start_matches(|c: char| !c.is_ascii_digit());
        return Some(format!(
            "{device}: its server, of this program or another, has died, and nothing says what it served; `vb-ublk del -n {number} --force` removes it\n"
        ));
    }
    let volume = v["volume"].as_str()?;
    let failure = v["failure"].as_str().map(super::output::one_line);
    match (v["state"].as_str()?, failure) {
        ("dead", _) => Some(format!(
            "{volume}: its daemon has died; `vb-ublk recover --volume {volume}` serves its device again; `vb-ublk del --volume {volume}` clears \
             up, and the next attach on this host takes up its log\n"
        )),
        (_, None) => {
            let trouble = v.pointer("/engine/background/store_trouble")?.as_str()?;
            let since = v.pointer("/engine/background/store_trouble_secs").and_then(Value::as_f64);
            let since = since.map_or_else(String::new, |s| format!(" (for {})", duration(s)));
            let alone = if v["engine"]["confirmed"] == false {
                "; until it answers, only what is in the log is read"
            } else {
                ""
            };
            Some(format!("{volume}: the store{since}: {}{alone}\n", super::output::one_line(trouble)))
        }
        (_, Some(failure)) => Some(format!("{volume}: {failure}\n")),
    }
}

pub(super) fn status(run: &RunDir, volume: Option<&VolumeName>, as_json: bool) -> Result<()> {
    let Some(volume) = volume else {
        let all = everything(run)?;
        if as_json {
            return print_json(&Value::Array(all));
        }
        if all.is_empty() {
            return print("no volume is attached on this host\n");
        }
        return print(&all.iter().map(readable::status).collect::<Vec<_>>().join("\n"));
    };
    let Some(state) = run.read(volume)? else {
        let what = format!("volume {volume} is not attached on this host: `vb-ublk list` shows what is");
        return Err(Error::new(ErrorKind::NotFound, what));
    };
    let v = look(run, &state)?;
    if as_json { print_json(&v) } else { print(&readable::status(&v)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_what_the_daemon_says() {
        let v = json!({
            "device": "/dev/ublkb0", "volume": "v", "pid": 7, "store": "file:///s", "state": "serving",
            "engine": { "size_bytes": 10_u64 << 30, "background": { "oldest_pending_secs": 4.0 },
                        "log": { "used_bytes": 1, "capacity_bytes": 4, "pending_bytes": 3 << 20 } },
        });
        let expect = ["/dev/ublkb0", "v", "7", "10 GiB", "file:///s", "serving", "3 MiB", "4 s", "25 %"];
        assert_eq!(row(&v), expect);
        let mut over_nbd = v;
        (over_nbd["device"], over_nbd["nbd"]) =
            (Value::Null, json!(["nbd://127.0.0.1:10809/v", "nbd+unix:///v?socket=/s"]));
        assert_eq!(row(&over_nbd)[0], "nbd://127.0.0.1:10809/v nbd+unix:///v?socket=/s");
        assert_eq!(
            row(&json!({ "volume": "v", "state": "unknown" })),
            ["-", "v", "-", "-", "-", "unknown", "-", "-", "-"]
        );
    }

    #[test]
    fn the_dead_the_failed_and_the_silent_are_told_apart() {
        let dir = tempfile::tempdir().expect("dir");
        let run = RunDir::create(dir.path()).expect("run");
        let v: VolumeName = "v".parse().expect("name");
        let mut state = State::new(v.clone(), "file:///s".into(), "/w".into(), None);
        run.write(&state).expect("write");
        let word = |s: &State| look(&run, s).expect("look")["state"].as_str().expect("text").to_owned();
        assert_eq!(word(&state), "dead");
        state.failure = Some("no\nstore".into());
        assert_eq!(word(&state), "failed");
        assert_eq!(note(&look(&run, &state).expect("look")).as_deref(), Some("v: no store\n"));
        let held = run.lock(&v).expect("lock").expect("free");
        assert_eq!(word(&state), "not answering");
        let away = json!({ "volume": "v", "state": "serving", "failure": null, "engine": {
            "confirmed": false, "background": { "store_trouble": "no\nanswer", "store_trouble_secs": 65.0 } } });
        let said = "v: the store (for 1 min 5 s): no answer; until it answers, only what is in the log is read\n";
        assert_eq!(note(&away).as_deref(), Some(said));
        let left = note(&json!({ "volume": null, "device": "/dev/ublkb12", "state": "orphaned" })).expect("a note");
        assert!(left.contains("del -n 12 --force"), "{left}");
        drop(held);
        std::fs::write(dir.path().join("v.json"), "{").expect("write");
        assert_eq!(everything(&run).expect("all")[0]["state"], "unknown");
    }
}
