//! `volume create | list | info | verify | rebuild | delete`.

use serde_json::{Value, json};

use super::args::VolumeCommand;
use super::engine::{self, CreateOptions};
use super::output::{fields, print, print_json};
use super::settings::Settings;
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
            let names = engine::list(url, opts)?;
            if json.json {
                return print_json(&Value::from(names));
            }
            print(&names.iter().map(|n| format!("{n}\n")).collect::<String>())
        }
        VolumeCommand::Info { volume, json } => {
            let info = engine::info(url, opts, volume.as_str())?;
            if json.json { print_json(&info) } else { print(&fields(&info)) }
        }
        VolumeCommand::Verify { volume, json } => super::verify::run(settings, volume, json.json),
        VolumeCommand::Rebuild(args) => {
            not_attached_here(settings, &args.volume)?;
            super::rebuild::run(settings, args)
        }
        VolumeCommand::Delete { volume, force, json } => {
            not_attached_here(settings, volume)?;
            let objects = engine::delete(url, opts, volume.as_str(), *force)?;
            if json.json {
                return print_json(&json!({ "volume": volume, "objects": objects }));
            }
            print(&format!("volume {volume} is deleted from {url} ({objects} objects)\n"))
        }
    }
}

/// Not even by force: its daemon on this host would go on writing.
fn not_attached_here(settings: &Settings, volume: &VolumeName) -> Result<()> {
    let run = RunDir::at(&settings.run_dir);
    if run.is_held(volume)?
        && let Some(state) = run.read(volume)?
        && state.store == settings.store.to_string()
    {
        let what = format!(
            "volume {volume} is attached on this host by process {}: detach it first with {}",
            state.pid,
            state.how_to_detach()
        );
        return Err(Error::new(ErrorKind::Busy, what));
    }
    Ok(())
}
