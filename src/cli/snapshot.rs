//! `snapshot create | list | diff | delete`, and `clone`.

use serde_json::json;

use super::args::{CloneArgs, SnapshotCommand};
use super::claim::no_snapshot_served_here;
use super::control::Order;
use super::engine;
use super::engine::images::{self, ChangeKind, Diff, bytes_of};
use super::orders::ordered;
use super::output::{Long, print, print_json, table};
use super::place::forget_cache;
use super::settings::Settings;
use crate::config::VolumeName;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{BLOCK, human_bytes};

pub(super) fn run(settings: &Settings, command: &SnapshotCommand) -> Result<()> {
    let (url, opts) = (&settings.store, &settings.store_options);
    match command {
        SnapshotCommand::Create { volume, name, json } => {
            whole(volume)?;
            let created = crate::time::now_unix();
            let name = name.clone().unwrap_or_else(|| engine::moment(created));
            let order = Order::Snapshot { name: name.clone(), created };
            if !ordered(settings, volume, &order)? {
                engine::create_snapshot(url, opts, volume.as_str(), &name, created)?;
            }
            if json.json {
                return print_json(&json!({ "volume": volume, "snapshot": name, "created": created }));
            }
            print(&format!("{volume}@{name}\n"))
        }
        SnapshotCommand::List { volume, json } => {
            whole(volume)?;
            let all = engine::snapshots(url, opts, volume.as_str())?;
            if json.json {
                return print_json(&engine::json(&all)?);
            }
            let rows: Vec<Vec<String>> = all
                .iter()
                .map(|s| {
                    let state = if s.deleting.is_some() { "being deleted" } else { "" };
                    vec![s.name.clone(), engine::utc(s.created), human_bytes(s.size_bytes), state.to_owned()]
                })
                .collect();
            print(&table(&["SNAPSHOT", "CREATED", "SIZE", ""], &rows))
        }
        SnapshotCommand::Diff { volume, from, to, json } => {
            whole(volume)?;
            let states = (from.as_str(), to.as_deref());
            images::diff(url, opts, volume.as_str(), states, |diff| {
                if json.json { diff_json(volume, states, diff) } else { diff_text(diff) }
            })
        }
        SnapshotCommand::Record { snapshot: of, clone, json } => {
            let (volume, Some(snapshot)) = of.parts() else {
                let what = format!("{of} is a volume, not a snapshot: name VOLUME@SNAPSHOT");
                return Err(Error::new(ErrorKind::Usage, what));
            };
            let booted = clone.as_ref().unwrap_or(of);
            let order = Order::KeepTrace { volume: volume.to_owned(), snapshot: snapshot.to_owned() };
            if !ordered(settings, booted, &order)? {
                let what = format!(
                    "{booted} is not attached on this host: attach a clone of {of}, boot from it, and name it here while it is attached"
                );
                return Err(Error::new(ErrorKind::NotFound, what));
            }
            if json.json {
                return print_json(&json!({ "volume": volume, "snapshot": snapshot, "recorded": booted }));
            }
            print(&format!("what {booted} has read first is fetched ahead by those that boot from {of} from now on\n"))
        }
        SnapshotCommand::Delete { volume, name, json } => {
            whole(volume)?;
            no_snapshot_served_here(settings, volume, Some(name))?;
            if !ordered(settings, volume, &Order::DeleteSnapshot { name: name.clone() })? {
                engine::delete_snapshot(url, opts, volume.as_str(), name)?;
            }
            forget_cache(settings.add.cache.cache_dir.clone(), settings, &format!("{volume}@{name}").parse()?);
            if json.json {
                return print_json(&json!({ "volume": volume, "snapshot": name }));
            }
            print(&format!("snapshot {volume}@{name} is deleted\n"))
        }
    }
}

const fn named(kind: ChangeKind) -> &'static str {
    match kind {
        ChangeKind::Data => "data",
        ChangeKind::Zero => "zero",
    }
}

fn diff_text(diff: &Diff) -> Result<()> {
    let mut out = Long::new();
    let (mut extents, mut data, mut zero) = (0_u64, 0, 0);
    for c in diff.changes() {
        let (offset, length) = bytes_of(&c);
        out.put(format_args!("{offset:>16}  {length:>16}  {}\n", named(c.kind)))?;
        extents += 1;
        *if c.kind == ChangeKind::Data { &mut data } else { &mut zero } += length;
        if out.is_gone() {
            break;
        }
    }
    out.put(format_args!("{extents} extents: {data} bytes of data, {zero} bytes of zeros\n"))?;
    out.end()
}

/// There may be more than memory should take: each stretch is written as it is found.
fn diff_json(volume: &VolumeName, (from, to): (&str, Option<&str>), diff: &Diff) -> Result<()> {
    let mut out = Long::new();
    let (volume, from, to) = (json!(volume), json!(from), json!(to));
    let size = diff.base().size_bytes();
    out.put(format_args!("{{\n  \"volume\": {volume},\n  \"from\": {from},\n  \"to\": {to},\n"))?;
    out.put(format_args!("  \"block_bytes\": {BLOCK},\n  \"size_bytes\": {size},\n  \"extents\": ["))?;
    let (mut changed, mut comma) = (0, "");
    for c in diff.changes() {
        let ((offset, length), kind) = (bytes_of(&c), named(c.kind));
        out.put(format_args!("{comma}\n    {{ \"offset\": {offset}, \"length\": {length}, \"kind\": \"{kind}\" }}"))?;
        comma = ",";
        changed += length;
        if out.is_gone() {
            break;
        }
    }
    out.put(format_args!("\n  ],\n  \"changed_bytes\": {changed}\n}}\n"))?;
    out.end()
}

pub(super) fn clone(settings: &Settings, args: &CloneArgs) -> Result<()> {
    whole(&args.new)?;
    let (volume, Some(snapshot)) = args.from.parts() else {
        let what = format!(
            "{} is a volume, not a snapshot: `vb-ublk snapshot create {}` makes one, and {}@NAME is cloned",
            args.from, args.from, args.from
        );
        return Err(Error::new(ErrorKind::Usage, what));
    };
    let size = args.size.map(super::add::check_size).transpose()?;
    let (url, opts) = (&settings.store, &settings.store_options);
    let made = engine::clone(url, opts, (volume, snapshot), args.new.as_str(), size)?;
    if args.json.json {
        return print_json(&engine::json(&made)?);
    }
    let size = human_bytes(made.size_bytes);
    print(&format!("volume {} of {size} is a clone of {}\n", args.new, args.from))
}

/// A volume is wanted, not one of its snapshots.
pub(super) fn whole(volume: &VolumeName) -> Result<()> {
    if volume.parts().1.is_none() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Usage, format!("{volume} is a snapshot: name a volume")))
}
