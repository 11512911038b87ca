//! `gc`: the space of what was overwritten or discarded, brought back now.

use serde_json::{Value, json};

use super::args::GcArgs;
use super::control::{self, Order};
use super::engine;
use super::orders::{offline, ordered};
use super::output::{print, print_json};
use super::settings::Settings;
use super::snapshot::whole;
use super::state::RunDir;
use crate::error::Result;
use crate::units::human_bytes;

pub(super) fn run(settings: &Settings, args: &GcArgs) -> Result<()> {
    whole(&args.volume)?;
    let (url, opts) = (&settings.store, &settings.store_options);
    let name = args.volume.as_str();
    if args.dry_run {
        let found = engine::garbage(url, opts, name)?;
        if args.json.json {
            return print_json(&found);
        }
        let [stored, live, kept, garbage] = figures(&found);
        let orphans = found["orphans"].as_u64().unwrap_or(0);
        return print(&format!(
            "volume {name} takes {stored} in {url}; {live} of it are live, {kept} snapshots keep, and {garbage} would come back, with {orphans} objects that \
             count for nothing (as of its last checkpoint)\n"
        ));
    }
    let space = if ordered(settings, &args.volume, &Order::CollectGarbage)? {
        control::status(&RunDir::at(&settings.run_dir).socket_path(&args.volume)?)?["engine"]["background"]["space"]
            .clone()
    } else {
        offline(settings, &args.volume, &args.log, &Order::CollectGarbage, &mut |_| ())?["background"]["space"].take()
    };
    if args.json.json {
        return print_json(&json!({ "volume": name, "space": space }));
    }
    let [stored, live, kept, _] = figures(&space);
    let cost = |key: &str| human_bytes(space[key].as_u64().unwrap_or(0));
    print(&format!(
        "volume {name} takes {stored} in {url} now: {live} are live, {kept} snapshots keep\nsince it was attached this has cost {} requests, {} read and {} \
         written; {} chunks are deleted\n",
        space["gc_requests"],
        cost("gc_read_bytes"),
        cost("gc_written_bytes"),
        space["gc_deleted_chunks"]
    ))
}

/// What is stored, live, kept by snapshots, and garbage, for people.
fn figures(space: &Value) -> [String; 4] {
    ["stored_bytes", "live_bytes", "snapshot_bytes", "garbage_bytes"]
        .map(|key| human_bytes(space[key].as_u64().unwrap_or(0)))
}
