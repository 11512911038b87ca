//! `import`: a new volume from a disk image.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::args::ImportArgs;
use super::engine::images::{self as engine, Backing, From, ImportOptions, Imported};
use super::output::{print, print_json};
use super::progress::Bar;
use super::settings::Settings;
use super::signals::Signals;
use crate::config::VolumeName;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::store::{StoreOptions, StoreUrl};
use crate::units::human_bytes;

/// More than this is no metadata.
const MAX_METADATA: u64 = 1 << 20;

pub(super) fn run(settings: &Settings, args: &ImportArgs) -> Result<()> {
    let metadata = args.metadata.as_deref().map(read_metadata).transpose()?;
    let name = |of_image: &Map<String, Value>| -> Result<String> {
        let of_file = args.metadata.as_deref().zip(metadata.as_ref());
        let named = match (&args.volume, of_file) {
            (Some(name), _) => Ok(name.clone()),
            (None, Some((file, m))) => {
                name_of(m).map_err(|e| e.context(format!("naming the volume after {}", file.display())))
            }
            (None, None) => {
                name_of(of_image).map_err(|e| e.context("naming the volume after what it is imported from"))
            }
        };
        named.map(|n| n.to_string())
    };
    let (from, what) = source(settings, args)?;
    let how = ImportOptions {
        from,
        size_bytes: args.size.map(super::add::check_size).transpose()?,
        logical_block: args.logical_block_size,
        metadata: metadata.clone().unwrap_or_default(),
    };
    let stop = Signals::block()?.first("kill -9")?;
    let mut bar = Bar::new(!args.json.json, &format!("importing {what}"));
    let told = &mut |p: engine::Importing| bar.at(p.bytes, p.of);
    let done = engine::import(&settings.store, &settings.store_options, name, how, stop, told);
    bar.clear();
    let done = done.map_err(|e| e.context(format!("importing {what}")))?;
    if args.json.json { print_json(&super::engine::json(&done)?) } else { print(&text(&done)) }
}

/// What is imported, and its name for people.
fn source(settings: &Settings, args: &ImportArgs) -> Result<(From, String)> {
    if let Some(volume) = &args.viperblock {
        let store: StoreUrl = match &args.from {
            Some(url) => url.parse()?,
            None => settings.store.clone(),
        };
        let what = format!("{volume} of Viperblock's in {store}");
        let (volume, wal_dir, accept_loss) = (volume.clone(), args.viperblock_wal.clone(), args.accept_loss);
        let of_target = settings.store_options.clone();
        let options = Box::new(StoreOptions {
            endpoint: args.from_endpoint.clone().or(of_target.endpoint),
            region: args.from_region.clone().or(of_target.region),
            profile: args.from_profile.clone().or(of_target.profile),
            ..of_target
        });
        return Ok((From::Viperblock { volume, store, options, wal_dir, accept_loss }, what));
    }
    let Some(file) = args.file.clone() else {
        return Err(Error::new(ErrorKind::Usage, "there is nothing to import: name an image, or --viperblock"));
    };
    let what = file.display().to_string();
    let backing = Backing { allowed: args.allow_backing.clone() };
    Ok((From::Image { file, format: args.format, backing }, what))
}

fn text(i: &Imported) -> String {
    let rounded = if i.size_bytes == i.image_bytes.next_multiple_of(4096) && i.size_bytes != i.image_bytes {
        format!(", {} rounded up to a multiple of 4096", i.image_bytes)
    } else {
        String::new()
    };
    format!(
        "volume {} of {} ({} bytes{rounded}) is imported to {}: {} of data in {} chunks\n",
        i.volume,
        human_bytes(i.size_bytes),
        i.size_bytes,
        i.store,
        human_bytes(i.data_bytes),
        i.chunks
    )
}

fn read_metadata(path: &Path) -> Result<Map<String, Value>> {
    let what = || format!("reading the metadata in {}", path.display());
    let size = fs::metadata(path).context(what)?.len();
    if size > MAX_METADATA {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("{}: {size} bytes are more than metadata has (1 MiB)", what()),
        ));
    }
    let text = fs::read(path).context(what)?;
    serde_json::from_slice(&text)
        .map_err(|e| Error::new(ErrorKind::Usage, format!("{}: it is not a JSON object", what())).with_source(e))
}

/// The name that metadata give a volume: the image's id, else the volume's. They are what is in a `VolumeConfig`, or have it whole.
fn name_of(metadata: &Map<String, Value>) -> Result<VolumeName> {
    let config = metadata.get("VolumeConfig").and_then(Value::as_object).unwrap_or(metadata);
    let id = |part: &str, field: &str| {
        config.get(part).and_then(|p| p.get(field)).and_then(Value::as_str).filter(|id| !id.is_empty())
    };
    let ids = [("AMIMetadata", "ImageID", "ami-"), ("VolumeMetadata", "VolumeID", "vol-")];
    for (part, field, prefix) in ids {
        let Some(id) = id(part, field) else { continue };
        let hex = id.strip_prefix(prefix).is_some_and(|h| !h.is_empty() && h.bytes().all(|b| b.is_ascii_hexdigit()));
        if !hex {
            let what =
                format!("{part}.{field} is {id:?}, not {prefix} and hexadecimal digits: name the volume with --volume");
            return Err(Error::new(ErrorKind::Usage, what));
        }
        return id.parse();
    }
    Err(Error::new(
        ErrorKind::Usage,
        "it has neither AMIMetadata.ImageID nor VolumeMetadata.VolumeID: name the volume with --volume",
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn name(v: Value) -> Result<String> {
        let Value::Object(m) = v else { panic!("an object") };
        name_of(&m).map(|n| n.as_str().to_owned())
    }

    #[test]
    fn metadata_name_the_volume() {
        let ami = json!({ "ImageID": "ami-0abc", "Name": "debian" });
        let vol = json!({ "VolumeID": "vol-00ff" });
        let both = json!({ "VolumeMetadata": vol, "AMIMetadata": ami });
        assert_eq!(name(both.clone()).expect("ami"), "ami-0abc");
        assert_eq!(name(json!({ "VolumeConfig": both })).expect("ami"), "ami-0abc");
        assert_eq!(name(json!({ "VolumeMetadata": vol, "AMIMetadata": { "ImageID": "" } })).expect("vol"), "vol-00ff");
        for bad in
            [json!({}), json!({ "AMIMetadata": { "ImageID": 5 } }), json!({ "AMIMetadata": { "ImageID": "ami-../x" } })]
        {
            assert!(name(bad).expect_err("none").to_string().contains("--volume"));
        }
    }
}
