//! `export`: a volume, or what has changed in it, as a disk image.

use serde_json::json;

use super::args::ExportArgs;
use super::engine::images::{self as engine, Format, Since, Target};
use super::output::{print, print_json};
use super::progress::Bar;
use super::settings::Settings;
use super::signals::Signals;
use crate::error::{Error, ErrorKind, Result};
use crate::units::human_bytes;

pub(super) fn run(settings: &Settings, args: &ExportArgs) -> Result<()> {
    let ExportArgs { volume, file, format, force, json, since, .. } = args;
    let to_stdout = file.as_os_str() == "-";
    if to_stdout && json.json {
        return Err(Error::new(
            ErrorKind::Usage,
            "--json would go to standard output, where the image goes: leave it out",
        ));
    }
    let target = Target { path: file.clone(), format: *format, force: *force, below: None };
    if let Some(since) = since {
        return increment(settings, args, since, &target);
    }
    let stop = Signals::block()?.first("kill -9")?;
    let mut bar = Bar::new(!json.json, &format!("exporting {volume}"));
    let told = &mut |p: engine::Exporting| bar.at(p.bytes, Some(p.of));
    let done = engine::export(&settings.store, &settings.store_options, volume.as_str(), &target, stop, told);
    bar.clear();
    let done = done?;
    if to_stdout {
        return Ok(());
    }
    if json.json {
        let engine::Exported { size_bytes, data_bytes } = done;
        return print_json(&json!({
            "volume": volume, "file": file, "format": format.name(), "size_bytes": size_bytes, "data_bytes": data_bytes,
        }));
    }
    print(&format!(
        "volume {volume} of {} is exported to {} ({format}): {} of data\n",
        human_bytes(done.size_bytes),
        file.display(),
        human_bytes(done.data_bytes)
    ))
}

fn increment(settings: &Settings, args: &ExportArgs, since: &str, target: &Target) -> Result<()> {
    let ExportArgs { volume, file, format, json, backing, backing_format, .. } = args;
    if *format == Format::Raw {
        let why = "--since with a raw image: it cannot leave out what has not changed, for it has no way to say so; add --format qcow2";
        return Err(Error::new(ErrorKind::Usage, why));
    }
    let how = Since { snapshot: since, backing: backing.as_deref().map(|b| (b, *backing_format)) };
    let stop = Signals::block()?.first("kill -9")?;
    let mut bar = Bar::new(!json.json, &format!("exporting {volume} since {since}"));
    let told = &mut |p: engine::Exporting| bar.at(p.bytes, Some(p.of));
    let done = engine::export_since(&settings.store, &settings.store_options, volume.parts(), &how, target, stop, told);
    bar.clear();
    let engine::Increment { size_bytes, data_bytes, zero_bytes } = done?;
    if json.json {
        return print_json(&json!({
            "volume": volume, "since": since, "file": file, "format": format.name(), "backing": backing,
            "size_bytes": size_bytes, "data_bytes": data_bytes, "zero_bytes": zero_bytes,
        }));
    }
    print(&format!(
        "what has changed in volume {volume} since {since} is exported to {} ({format}): {} of data, {} of zeros\n",
        file.display(),
        human_bytes(data_bytes),
        human_bytes(zero_bytes)
    ))
}
