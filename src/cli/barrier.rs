//! `barrier`: all that has completed, made to survive more.

use std::time::Instant;

use serde_json::json;

use super::args::BarrierArgs;
use super::control::Order;
use super::orders::ordered;
use super::output::{print, print_json};
use super::settings::Settings;
use super::snapshot::whole;
use crate::config::FlushTo;
use crate::error::{Error, ErrorKind, Result};

pub(super) fn run(settings: &Settings, args: &BarrierArgs) -> Result<()> {
    let volume = &args.volume;
    whole(volume)?;
    let to = args.to;
    let begun = Instant::now();
    if !ordered(settings, volume, &Order::Barrier { to })? {
        let what = format!(
            "volume {volume} is not attached on this host, so that there is nothing to wait for: what a detach has ended is in the store"
        );
        return Err(Error::new(ErrorKind::NotFound, what));
    }
    let seconds = begun.elapsed().as_secs_f64();
    if args.json.json {
        return print_json(&json!({ "volume": volume, "to": to, "seconds": seconds }));
    }
    let survives = match to {
        FlushTo::Wal => "is in the log, and survives the loss of power",
        FlushTo::Store => "is in the store, and survives the loss of this host",
    };
    print(&format!("what had completed on volume {volume} {survives} ({seconds:.3} s)\n"))
}
