//! `gc`: the space of what was overwritten or discarded, brought back now.

use serde_json::{Value, json};

use super::args::GcArgs;
use super::claim::take;
use super::control::{self, Order};
use super::engine::{self, AttachOptions, Attached, Collect};
use super::output::{print, print_json};
use super::place::{DEFAULT_WAL, absolute, wal_file};
use super::settings::Settings;
use super::snapshot::{ordered, whole};
use super::state::RunDir;
use crate::error::{Error, ErrorKind, Result};
use crate::units::human_bytes;

pub(super) fn run(settings: &Settings, args: &GcArgs) -> Result<()> {
    whole(&args.volume)?;
    let (url, opts) = (&settings.store, &settings.store_options);
    let name = args.volume.as_str();
    if args.dry_run {
        let found = engine::garbage(url, opts, name)?;
        let text = |key: &str| human_bytes(found[key].as_u64().unwrap_or(0));
        if args.json.json {
            return print_json(&found);
        }
        return print(&format!(
            "volume {name} takes {} in {url}; {} of it are live, {} snapshots keep, and {} would come back (as of its last checkpoint)\n",
            text("stored_bytes"),
            text("live_bytes"),
            text("snapshot_bytes"),
            text("garbage_bytes"),
        ));
    }
    let space = if ordered(settings, &args.volume, &Order::CollectGarbage)? {
        control::status(&RunDir::at(&settings.run_dir).socket_path(&args.volume)?)?["engine"]["background"]["space"]
            .clone()
    } else {
        offline(settings, args)?
    };
    if args.json.json {
        return print_json(&json!({ "volume": name, "space": space }));
    }
    let text = |key: &str| human_bytes(space[key].as_u64().unwrap_or(0));
    print(&format!(
        "volume {name} takes {} in {url} now: {} are live, {} snapshots keep\n",
        text("stored_bytes"),
        text("live_bytes"),
        text("snapshot_bytes"),
    ))
}

/// Attaches the volume for as long as it takes. A log of this host's that has something for it is uploaded on the way.
fn offline(settings: &Settings, args: &GcArgs) -> Result<Value> {
    let run = RunDir::create(&settings.run_dir)?;
    let _held = take(&run, &args.volume)?;
    let dir = args.wal_dir.clone().unwrap_or_else(|| settings.data_dir.join("wal"));
    let attached = Attached::attach(AttachOptions {
        store_url: settings.store.clone(),
        store_options: settings.store_options.clone(),
        volume: args.volume.to_string(),
        log_path: wal_file(&absolute(&dir)?, &args.volume)?,
        log_bytes: DEFAULT_WAL.0,
        force: false,
        read_only: false,
        io_timeout: None,
        resume: false,
        accept_loss: false,
        gc: Collect::default(),
    })?;
    let view = attached.view();
    let done = view.order(&Order::CollectGarbage).and_then(|answer| {
        let ended = |_| Error::new(ErrorKind::Internal, "the volume's background has ended before it was done");
        answer.blocking_recv().map_err(ended)?
    });
    let space = view.status().map(|s| s["background"]["space"].clone());
    attached.detach()?;
    done?;
    space
}
