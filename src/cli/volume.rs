//! `volume create | list | info | verify | rebuild | resize | flatten | delete`.

use serde_json::{Value, json};

use super::args::VolumeCommand;
use super::claim::{attached_here, no_snapshot_served_here};
use super::control::Order;
use super::engine::{self, CreateOptions, Listed};
use super::orders::ordered;
use super::output::{fields, print, print_json};
use super::place::forget_cache;
use super::readable;
use super::settings::Settings;
use super::snapshot::whole;
use super::state::RunDir;
use crate::config::VolumeName;
use crate::error::{Error, ErrorKind, Result};

pub(super) fn run(settings: &Settings, command: &VolumeCommand) -> Result<()> {
    let (url, opts) = (&settings.store, &settings.store_options);
    match command {
        VolumeCommand::Create { volume, size, logical_block_size, json } => {
            let create =
                CreateOptions { size_bytes: super::add::check_size(*size)?, logical_block: *logical_block_size };
            let made = engine::create(url, opts, volume.as_str(), &create)?;
            if json.json {
                print_json(&made)
            } else {
                print(&format!("volume {volume} of {size} is created in {url}\n"))
            }
        }
        VolumeCommand::List(json) => {
            let Listed { volumes, remains } = engine::list(url, opts)?;
            for n in remains {
                tracing::warn!(
                    "{n} has objects in the store and no manifest: an import or a deletion is under way, or was interrupted (`vb-ublk volume delete \
                     {n}` removes the rest), or the manifest was lost (`vb-ublk volume rebuild {n}`)"
                );
            }
            if json.json {
                return print_json(&Value::from_iter(volumes));
            }
            print(&volumes.iter().map(|n| format!("{n}\n")).collect::<String>())
        }
        VolumeCommand::Info { volume, space, json } => {
            if *space {
                whole(volume)?;
            }
            let mut info = engine::info(url, opts, volume.as_str())?;
            if *space {
                let found = engine::garbage(url, opts, volume.as_str())?;
                info["space"] = if json.json { found } else { readable::space(&found).into() };
            }
            if json.json { print_json(&info) } else { print(&fields(&info)) }
        }
        VolumeCommand::Verify { volume, json } => super::verify::run(settings, volume, json.json),
        VolumeCommand::Rebuild(args) => {
            not_attached_here(settings, &args.volume)?;
            super::rebuild::run(settings, args)
        }
        VolumeCommand::Resize { volume, size, discard_tail, json } => {
            whole(volume)?;
            let size_bytes = super::add::check_size(*size)?;
            let here = ordered(settings, volume, &Order::Grow { size_bytes })?;
            let note = if here {
                tell_device(settings, volume, size_bytes)?
            } else {
                engine::resize(url, opts, volume.as_str(), size_bytes, *discard_tail)?;
                None
            };
            if json.json {
                return print_json(&json!({ "volume": volume, "size_bytes": size_bytes, "note": note }));
            }
            let note = note.map(|n| format!("; {n}")).unwrap_or_default();
            print(&format!("volume {volume} has {size} now{note}\n"))
        }
        VolumeCommand::Flatten(args) => super::flatten::run(settings, args),
        VolumeCommand::Delete { volume, force, json } => {
            not_attached_here(settings, volume)?;
            no_snapshot_served_here(settings, volume, None)?;
            let objects = engine::delete(url, opts, volume.as_str(), *force)?;
            forget_cache(settings.add.cache.cache_dir.clone(), settings, volume);
            if json.json {
                return print_json(&json!({ "volume": volume, "objects": objects }));
            }
            print(&format!("volume {volume} is deleted from {url} ({objects} objects)\n"))
        }
    }
}

/// Has the volume's device take its new size. What the user has to know of it, if anything.
fn tell_device(settings: &Settings, volume: &VolumeName, size_bytes: u64) -> Result<Option<String>> {
    let Some(state) = RunDir::at(&settings.run_dir).read(volume)? else { return Ok(None) };
    let Some(n) = state.device else {
        return Ok(Some("NBD clients see it when they connect anew".to_owned()));
    };
    match engine::resize_device(n, size_bytes) {
        Ok(()) => Ok(None),
        Err(e) if e.kind() == ErrorKind::Unsupported => Ok(Some(format!(
            "this kernel cannot resize a ublk device in use: /dev/ublkb{n} has its old size until it is detached and attached again"
        ))),
        Err(e) => Err(e.context(format!(
            "volume {volume} has its new size, but /dev/ublkb{n} has not; give the command again, or detach and attach it"
        ))),
    }
}

/// Not even by force: its daemon on this host would go on writing.
fn not_attached_here(settings: &Settings, volume: &VolumeName) -> Result<()> {
    if let Some(state) = attached_here(settings, volume)? {
        let what = format!(
            "volume {volume} is attached on this host by process {}: detach it first with {}",
            state.pid,
            state.how_to_detach()
        );
        return Err(Error::new(ErrorKind::Busy, what));
    }
    Ok(())
}
