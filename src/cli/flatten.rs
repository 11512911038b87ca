//! `volume flatten`: a clone copies what it needs of its parents, and stands alone.

use serde_json::{Value, json};

use super::args::FlattenArgs;
use super::control::{self, Order};
use super::orders::{offline, ordered_telling};
use super::output::{print, print_json};
use super::progress::Progress;
use super::settings::Settings;
use super::snapshot::whole;
use crate::config::VolumeName;
use crate::error::Result;
use crate::units::human_bytes;

pub(super) fn run(settings: &Settings, args: &FlattenArgs) -> Result<()> {
    let volume = &args.volume;
    whole(volume)?;
    let mut line = Progress::new(!args.json.json);
    let mut tell = |status: &dyn Fn() -> Result<Value>| line.say(|| how_far(volume, &status().ok()?));
    let by_daemon = ordered_telling(settings, volume, &Order::Flatten, &mut |socket| {
        tell(&|| Ok(control::status(socket)?["engine"].take()));
    });
    let done = by_daemon.and_then(|here| {
        if here {
            return Ok(());
        }
        offline(settings, volume, &args.log, &Order::Flatten, &mut |view| tell(&|| view.status())).map(drop)
    });
    line.clear();
    done?;
    if args.json.json {
        return print_json(&json!({ "volume": volume, "flattened": true }));
    }
    print(&format!("volume {volume} stands alone: what it was cloned from may be deleted\n"))
}

fn how_far(volume: &VolumeName, engine: &Value) -> Option<String> {
    let left = engine["background"]["flatten_left_bytes"].as_u64()?;
    Some(format!("flattening {volume}: {} to be copied", human_bytes(left)))
}
