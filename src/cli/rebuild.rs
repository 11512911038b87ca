//! `volume rebuild`: a volume's map and manifest, made anew from its chunks.

use std::fmt::Write as _;
use std::path::PathBuf;

use super::args::RebuildArgs;
use super::engine::{self, LogFate, ManifestState, MapFrom, OpenLog, RebuildOptions, Rebuilding, Rebuilt};
use super::output::{one_line, print, print_json};
use super::place::absolute;
use super::progress::Progress;
use super::settings::{LogPlace, Settings};
use crate::config::VolumeName;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{BLOCK, human_bytes};

pub(super) fn run(settings: &Settings, args: &RebuildArgs) -> Result<()> {
    let how = RebuildOptions {
        force: args.force,
        accept_loss: args.accept_loss,
        dry_run: args.dry_run,
        size_bytes: args.size.map(super::add::check_size).transpose()?,
        logical_block: args.logical_block_size,
    };
    let log = find_log(settings, args)?;
    let log = log.as_ref().map(|(path, log)| (path.as_path(), log));
    let mut line = Progress::new(!args.json.json);
    let (url, opts) = (&settings.store, &settings.store_options);
    let done = engine::rebuild(url, opts, args.volume.as_str(), &how, log, &mut |p| {
        line.say(|| Some(how_far(&args.volume, p)));
    });
    line.clear();
    let done = done?;
    if args.json.json { print_json(&engine::json(&done)?) } else { print(&text(&done)) }
}

/// The volume's log where `add` would have it, if it is there, locked.
fn find_log(settings: &Settings, args: &RebuildArgs) -> Result<Option<(PathBuf, OpenLog)>> {
    let given = args.log.place();
    let is_given = given.is_some();
    let path = match settings.log_place(given) {
        LogPlace::Dir(dir) => absolute(&dir)?.join(format!("{}.wal", args.volume)),
        LogPlace::Device(device) => absolute(&device)?,
    };
    match OpenLog::open(&path) {
        Ok(log) => Ok(Some((path, log))),
        Err(e) if e.kind() == ErrorKind::NotFound && is_given => Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "there is no log {}: leave out --wal-dir and --wal-device to rebuild volume {} without one",
                path.display(),
                args.volume
            ),
        )),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e.context(format!("rebuilding volume {}", args.volume))),
    }
}

fn how_far(volume: &VolumeName, p: Rebuilding) -> String {
    let percent = (p.chunks * 100).checked_div(p.of).unwrap_or(100);
    format!("rebuilding {volume}: {percent} %, {} of {} chunks, group {}", p.chunks, p.of, p.groups)
}

fn text(r: &Rebuilt) -> String {
    let mut text = String::new();
    for lost in &r.lost {
        let _ = writeln!(text, "lost: {}", one_line(&lost.to_string()));
    }
    let _ = writeln!(
        text,
        "volume {} {} as of group {} (entry {}): {} ({}) mapped, from {}, {} chunks read",
        r.volume,
        if r.dry_run { "would be rebuilt" } else { "is rebuilt" },
        r.group,
        r.through,
        count(r.mapped_blocks, "block"),
        human_bytes(r.mapped_blocks * BLOCK as u64),
        match r.map_from {
            MapFrom::Checkpoint => "its good checkpoint and what came after it",
            MapFrom::Copy => "the map that garbage collection keeps and what came after it",
            MapFrom::Chunks => "its chunks alone",
        },
        r.chunks
    );
    if r.groups_given_up > 0 {
        let _ = writeln!(text, "given up: at least {}", count(r.groups_given_up, "group"));
    }
    let _ = writeln!(text, "manifest: {}", manifest(r));
    let _ = writeln!(text, "log: {}", log(&r.log));
    for note in &r.notes {
        let _ = writeln!(text, "note: {}", one_line(note));
    }
    text
}

fn count(n: u64, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn manifest(r: &Rebuilt) -> String {
    let epoch = r.epoch;
    match (r.manifest, &r.kept_as) {
        (ManifestState::Good, _) => format!("it was good; epoch {epoch}"),
        (ManifestState::Missing, _) => format!("it was missing, and is made from the chunks; epoch {epoch}"),
        (ManifestState::Old, None) => format!("it is older than the volume, and is made anew; epoch {epoch}"),
        (ManifestState::Old, Some(key)) => {
            format!("it was older than the volume, and is made anew; epoch {epoch}; the old one is kept as {key}")
        }
        (ManifestState::Damaged, None) => format!("it is damaged, and is made from the chunks; epoch {epoch}"),
        (ManifestState::Damaged, Some(key)) => {
            format!("it was damaged, and is made from the chunks; epoch {epoch}; the damaged one is kept as {key}")
        }
    }
}

fn log(fate: &LogFate) -> String {
    match fate {
        LogFate::None => "there is none here".to_owned(),
        LogFate::Replayed(last) => format!("the next `vb-ublk add` on this host replays it, up to entry {last}"),
        LogFate::Packed => "it holds nothing that the store does not have".to_owned(),
        LogFate::SetAside(why) => format!("it does not continue the volume and will be set aside: {}", one_line(why)),
    }
}
