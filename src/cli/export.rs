//! `export`: a volume as a disk image.

use serde_json::json;

use super::args::ExportArgs;
use super::engine::images::{self as engine, Target};
use super::output::{print, print_json};
use super::progress::Bar;
use super::settings::Settings;
use super::signals::Signals;
use crate::error::{Error, ErrorKind, Result};
use crate::units::human_bytes;

pub(super) fn run(settings: &Settings, args: &ExportArgs) -> Result<()> {
    let ExportArgs { volume, file, format, force, json } = args;
    let to_stdout = file.as_os_str() == "-";
    if to_stdout && json.json {
        return Err(Error::new(
            ErrorKind::Usage,
            "--json would go to standard output, where the image goes: leave it out",
        ));
    }
    let target = Target { path: file.clone(), format: *format, force: *force };
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
