//! `snapshot create | list | delete`, and `clone`.

use std::time::Duration;

use serde_json::json;

use super::args::{CloneArgs, SnapshotCommand};
use super::claim::attached_here;
use super::control::{self, Order};
use super::output::{print, print_json, table};
use super::settings::Settings;
use super::state::RunDir;
use super::{engine, pause};
use crate::config::VolumeName;
use crate::error::{Error, ErrorKind, Result};
use crate::units::human_bytes;

/// Between two looks at what a daemon was ordered to do.
const LOOK: Duration = Duration::from_millis(20);

pub(super) fn run(settings: &Settings, command: &SnapshotCommand) -> Result<()> {
    let (url, opts) = (&settings.store, &settings.store_options);
    match command {
        SnapshotCommand::Create { volume, name, json } => {
            whole(volume)?;
            let created = engine::now_unix();
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
        SnapshotCommand::Delete { volume, name, json } => {
            whole(volume)?;
            if !ordered(settings, volume, &Order::DeleteSnapshot { name: name.clone() })? {
                engine::delete_snapshot(url, opts, volume.as_str(), name)?;
            }
            if json.json {
                return print_json(&json!({ "volume": volume, "snapshot": name }));
            }
            print(&format!("snapshot {volume}@{name} is deleted\n"))
        }
    }
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

/// Has the volume's daemon do it, if it is attached on this host, and waits for the end. `false`: it is not.
///
/// # Errors
/// The order's own, and when the daemon cannot be asked.
pub(super) fn ordered(settings: &Settings, volume: &VolumeName, order: &Order) -> Result<bool> {
    if attached_here(settings, volume)?.is_none() {
        return Ok(false);
    }
    let socket = RunDir::at(&settings.run_dir).socket_path(volume)?;
    let asking = |e: Error| e.context(format!("volume {volume}, attached on this host"));
    let job = control::order(&socket, order).map_err(asking)?;
    while !control::is_done(&socket, job).map_err(asking)? {
        pause(LOOK);
    }
    Ok(true)
}
