//! `volume verify`: what is damaged of a volume in the store, and what that means.

use std::fmt::Write as _;

use super::engine::{self, Damage, Report};
use super::output::{one_line, print, print_json, table};
use super::progress::Progress;
use super::settings::Settings;
use crate::config::VolumeName;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{BLOCK, SECTOR, human_bytes};

pub(super) fn run(settings: &Settings, volume: &VolumeName, json: bool) -> Result<()> {
    let mut line = Progress::new(!json);
    let report = engine::verify(&settings.store, &settings.store_options, volume.as_str(), &mut |p| {
        line.say(|| Some(how_far(volume, p)));
    });
    line.clear();
    let report = report?;
    if json {
        print_json(&engine::json(&report)?)?;
    } else {
        print(&text(&report))?;
    }
    if report.is_well() { Ok(()) } else { Err(Error::new(ErrorKind::Corrupt, summary(&report))) }
}

fn how_far(volume: &VolumeName, p: engine::Progress) -> String {
    let percent = (p.blocks * 100).checked_div(p.of).unwrap_or(100);
    let bytes = |blocks: u64| human_bytes(blocks * BLOCK as u64);
    let damaged = match p.damaged_sectors {
        0 => String::new(),
        n => format!(", {n} sectors damaged"),
    };
    format!("verifying {volume}: {percent} %, {} of {}{damaged}", bytes(p.blocks), bytes(p.of))
}

fn text(r: &Report) -> String {
    let mut text = if r.is_well() { format!("volume {} is well: {}\n", r.volume, figures(r)) } else { damage(r) };
    for note in &r.notes {
        let _ = writeln!(text, "note: {}", one_line(note));
    }
    text
}

/// What was checked.
fn figures(r: &Report) -> String {
    let Some(s) = &r.state else { return "no block was checked".to_owned() };
    format!(
        "{} blocks ({}) in {} chunks checked, as of epoch {}, checkpoint of group {}, group {}",
        r.blocks_checked,
        human_bytes(r.blocks_checked * BLOCK as u64),
        r.chunks,
        s.epoch,
        s.checkpoint_group,
        s.group
    )
}

/// A row for each damaged place, then what each kind of damage means.
fn damage(r: &Report) -> String {
    let row = |d: &Damage| {
        let number = |n: Option<u64>| n.map_or_else(|| "-".to_owned(), |n| n.to_string());
        vec![number(d.lba), number(d.sectors), d.kind.name().to_owned(), d.key.clone(), one_line(&d.why)]
    };
    let rows: Vec<Vec<String>> = r.damage.iter().map(row).collect();
    let mut text = table(&["LBA", "SECTORS", "DAMAGE", "OBJECT", "WHY"], &rows);
    if r.unlisted_sectors > 0 {
        let _ = writeln!(text, "and {} sectors more, which are not listed", r.unlisted_sectors);
    }
    let mut kinds: Vec<_> = r.damage.iter().map(|d| d.kind).collect();
    kinds.sort_unstable();
    kinds.dedup();
    for kind in kinds {
        let _ = writeln!(text, "{}: {}; {}", kind.name(), kind.meaning(), kind.advice());
    }
    text
}

/// The one line for stderr.
fn summary(r: &Report) -> String {
    let count = |n: u64, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    let mut text = format!("volume {} in {} is damaged: {}", r.volume, r.store, count(r.damage.len() as u64, "place"));
    if r.damaged_sectors > 0 {
        let bytes = human_bytes(r.damaged_sectors * SECTOR as u64);
        let _ = write!(text, ", {} ({bytes}) that cannot be read", count(r.damaged_sectors, "sector"));
    }
    if r.chunks_missing > 0 {
        let _ = write!(text, ", {} missing", count(r.chunks_missing, "chunk"));
    }
    format!("{text}; {}; the table says where, and what to do", figures(r))
}
