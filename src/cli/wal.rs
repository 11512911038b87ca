//! `wal inspect | export`: a write-ahead log that no process has.

mod raw;

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;
use serde_json::{Value, json};

use super::args::WalCommand;
use super::complain;
use super::engine::{self, BadBlock, End, Inspection, Item, LogPos, OpenLog, Piece, RecordKind, Standing};
use super::output::{fields, print, table};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{Lba, SECTOR, human_bytes};
use raw::{Extent, Kind, RawImage};

pub(super) fn run(command: &WalCommand) -> Result<()> {
    match command {
        WalCommand::Inspect { file, records, json } => inspect(file, *records, json.json),
        WalCommand::Export { file, out, all, json } => export(file, out, *all, json.json),
    }
}

fn inspect(file: &Path, records: bool, as_json: bool) -> Result<()> {
    let log = OpenLog::open(file)?;
    let found = log.inspect()?;
    let about = about(file, log.size()?, &found)?;
    if as_json {
        let entries = records.then(|| found.items().map(|i| Row::of(&found, &i)).collect());
        print_report(&Report { about: &about, entries, extents: None })?;
    } else {
        print(&fields(&about))?;
        if records {
            print(&listing(&found))?;
        }
    }
    verdict(file, &found)
}

/// The damage that a replay refuses the log for. It has been told on stdout as well.
fn verdict(file: &Path, found: &Inspection) -> Result<()> {
    let Some(first) = found.damage.first() else { return Ok(()) };
    let what = format!(
        "the log {} is damaged, and is not replayed: {first}. What is before the damage can be had with `vb-ublk wal export`, and what is after it with --all, too",
        file.display()
    );
    Err(Error::new(ErrorKind::Corrupt, what))
}

/// What is printed as JSON. Lists may be long, so they are no [`Value`].
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    about: &'a Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    entries: Option<Vec<Row>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    extents: Option<&'a [Extent]>,
}

fn print_report(report: &Report<'_>) -> Result<()> {
    let text = serde_json::to_string_pretty(report)
        .map_err(|e| Error::new(ErrorKind::Internal, "writing JSON").with_source(e))?;
    print(&format!("{text}\n"))
}

/// An entry of the log.
#[derive(Serialize)]
struct Row {
    seq: u64,
    kind: &'static str,
    lba: u64,
    sectors: u64,
    state: &'static str,
    /// Where its record is in the log.
    generation: u32,
    offset: u32,
    /// Where its data is in the file.
    data_byte: Option<u64>,
}

impl Row {
    fn of(found: &Inspection, i: &Item<'_>) -> Self {
        let (kind, has_data) = match i.entry.kind {
            RecordKind::Data => ("data", true),
            RecordKind::Discard => ("discard", false),
            RecordKind::Zeroes => ("zeroes", false),
        };
        Self {
            seq: i.entry.seq.0,
            kind,
            lba: i.entry.lba.0,
            sectors: i.entry.sectors,
            state: match i.record.standing {
                Standing::Beyond => "left",
                _ if found.is_unpacked(i) => "unpacked",
                _ => "packed",
            },
            generation: i.record.at().generation(),
            offset: i.record.at().offset(),
            data_byte: has_data.then(|| i.entry.data_byte()),
        }
    }
}

/// Lines, made one by one: a log may hold millions of entries.
fn listing(found: &Inspection) -> String {
    let mut text =
        format!("{:>10}  {:8}{:9}{:>14}  {:>8}  {}\n", "SEQ", "KIND", "STATE", "LBA", "SECTORS", "RECORD AT");
    for i in found.items() {
        let Row { seq, kind, lba, sectors, state, .. } = Row::of(found, &i);
        let _ = writeln!(text, "{seq:>10}  {kind:8}{state:9}{lba:>14}  {sectors:>8}  {}", i.record.at());
    }
    text
}

/// Counts of entries.
#[derive(Default, Serialize)]
struct Totals {
    entries: u64,
    data_bytes: u64,
    first_seq: Option<u64>,
    last_seq: Option<u64>,
}

impl Totals {
    fn of<'a>(items: impl Iterator<Item = Item<'a>>) -> Self {
        let mut t = Self::default();
        for i in items {
            t.entries += 1;
            if i.entry.kind == RecordKind::Data {
                t.data_bytes += i.entry.sectors * SECTOR as u64;
            }
            t.first_seq.get_or_insert(i.entry.seq.0);
            t.last_seq = Some(i.entry.seq.0);
        }
        t
    }
}

/// All about a log but its entries.
fn about(file: &Path, size: u64, found: &Inspection) -> Result<Value> {
    let sb = &found.superblock;
    let beyond = |i: &Item<'_>| i.record.standing == Standing::Beyond;
    let records = |beyond: bool| found.records.iter().filter(|r| (r.standing == Standing::Beyond) == beyond).count();
    let mut about = json!({
        "file": file.display().to_string(),
        "size_bytes": size,
        "superblock": {
            "volume": sb.volume,
            "volume_size_bytes": sb.volume_sectors * SECTOR as u64,
            "logical_block": sb.logical_block,
            "log_id": format!("{:016x}", sb.log_id),
            "segment_bytes": sb.segment_bytes,
            "max_segments": sb.max_segments,
            "updates": sb.update,
            "packed_through": sb.packed_through,
            "confirmed_nonce": sb.confirmed,
            "drawn_nonces": sb.drawn,
        },
        "segments": found.segments.len(),
        "generations": found.segments.iter().map(|s| s.header.generation).collect::<Vec<_>>(),
        "records": records(false),
        "packed_through": found.packed,
        "durable_through": position(found, found.durable),
        "holds": engine::json(&Totals::of(found.items().filter(|i| !beyond(i))))?,
        "unpacked": engine::json(&Totals::of(found.items().filter(|i| found.is_unpacked(i))))?,
        "end": {
            "why": match found.why {
                End::Clean => "clean",
                End::Torn => "torn",
                End::Damaged => "damaged",
            },
            "at": position(found, found.end),
            "records_left": records(true),
        },
        "damage": found.damage.iter().map(ToString::to_string).collect::<Vec<_>>(),
    });
    if records(true) > 0 {
        about["left"] = engine::json(&Totals::of(found.items().filter(beyond)))?;
    }
    Ok(about)
}

fn position(found: &Inspection, at: LogPos) -> Value {
    if at == LogPos::default() {
        return Value::Null;
    }
    json!({ "generation": at.generation(), "offset": at.offset(), "file_byte": found.byte_of(at) })
}

fn export(file: &Path, out: &Path, all: bool, as_json: bool) -> Result<()> {
    let log = OpenLog::open(file)?;
    let found = log.inspect()?;
    // With damage, what lies behind it was promised once; behind a torn tail nothing was.
    let beyond = all && !found.damage.is_empty();
    let wanted = |i: &Item<'_>| match i.record.standing {
        Standing::Beyond => beyond,
        Standing::Old => all,
        Standing::Chain => all || found.is_unpacked(i),
    };
    let outside = found.items().filter(|i| wanted(i) && !found.fits(i)).count() as u64;
    let wanted = |i: &Item<'_>| wanted(i) && found.fits(i);
    let size = Size::of(&found, &wanted);
    let mut image = RawImage::create(out, size.bytes)?;
    let mut bad_blocks = Vec::new();
    log.read(&found, wanted, |piece| {
        if let Piece::Damaged(lba, sectors, bad) = &piece {
            complain(&format!("{}: {}", file.display(), left_out(*lba, *sectors, bad)));
            bad_blocks
                .push(json!({ "lba": lba, "sectors": sectors, "seq": bad.seq, "byte": bad.byte, "why": bad.why }));
        }
        put(&mut image, &piece)
    })?;
    let mut extents = image.finish()?;
    extents.retain(|e| e.kind != Kind::Damaged);
    let totals = Totals::of(found.items().filter(wanted));
    let done = Exported { file, out, size, totals, extents, bad_blocks, outside };
    done.tell(&found, as_json)?;
    done.verdict(&found)
}

fn left_out(lba: Lba, sectors: u64, bad: &BadBlock) -> String {
    let BadBlock { seq, byte, why } = bad;
    let last = lba.0 + sectors - 1;
    format!("sectors {lba} to {last} are left out: the block of entry {seq} at byte {byte} is damaged: {why}")
}

fn put(image: &mut RawImage, piece: &Piece<'_>) -> Result<()> {
    match *piece {
        Piece::Data(lba, bytes) => image.data(lba.0, bytes),
        Piece::Hole(lba, sectors) => image.blank(lba.0, sectors, Kind::Hole),
        Piece::Damaged(lba, sectors, _) => image.blank(lba.0, sectors, Kind::Damaged),
    }
}

/// The size of an image.
struct Size {
    bytes: u64,
    /// The log says so; else it ends with the last entry.
    known: bool,
}

impl Size {
    fn of(found: &Inspection, wanted: &impl Fn(&Item<'_>) -> bool) -> Self {
        let known = found.superblock.volume_sectors;
        let last = || found.items().filter(wanted).map(|i| i.entry.lba.0 + i.entry.sectors).max().unwrap_or(0);
        let sectors = if known > 0 { known } else { last() };
        Self { bytes: sectors * SECTOR as u64, known: known > 0 }
    }
}

struct Exported<'a> {
    file: &'a Path,
    out: &'a Path,
    size: Size,
    totals: Totals,
    extents: Vec<Extent>,
    bad_blocks: Vec<Value>,
    /// Entries that lie past the end of the volume.
    outside: u64,
}

impl Exported<'_> {
    fn tell(&self, found: &Inspection, as_json: bool) -> Result<()> {
        let Totals { entries, data_bytes, first_seq, last_seq } = &self.totals;
        if as_json {
            let about = json!({
                "file": self.file.display().to_string(), "out": self.out.display().to_string(), "volume": found.superblock.volume,
                "size_bytes": self.size.bytes, "size_known": self.size.known,
                "entries": entries, "data_bytes": data_bytes, "first_seq": first_seq, "last_seq": last_seq,
                "bad_blocks": self.bad_blocks,
                "damage": found.damage.iter().map(ToString::to_string).collect::<Vec<_>>(),
            });
            return print_report(&Report { about: &about, entries: None, extents: Some(&self.extents) });
        }
        let rows: Vec<_> = self.extents.iter().map(Extent::row).collect();
        let mut text = table(&["LBA", "SECTORS", "KIND"], &rows);
        let _ = write!(text, "{} of volume {}: {entries} entries", self.out.display(), found.superblock.volume);
        if let (Some(first), Some(last)) = (first_seq, last_seq) {
            let _ = write!(text, " ({first} to {last}, {} of data)", human_bytes(*data_bytes));
        }
        text.push('\n');
        if !self.size.known {
            let _ = writeln!(text, "the log does not know the volume's size: the file ends with the last sector in it");
        }
        print(&text)
    }

    fn verdict(&self, found: &Inspection) -> Result<()> {
        let mut what = Vec::new();
        if let Some(first) = found.damage.first() {
            what.push(format!("the log is damaged: {first}"));
        }
        if !self.bad_blocks.is_empty() {
            what.push(format!("{} damaged blocks are left out", self.bad_blocks.len()));
        }
        if self.outside > 0 {
            what.push(format!("{} entries past the end of the volume are left out", self.outside));
        }
        if what.is_empty() {
            return Ok(());
        }
        let (out, file) = (self.out.display(), self.file.display());
        Err(Error::new(ErrorKind::Corrupt, format!("{out} does not have all of {file}: {}", what.join("; "))))
    }
}

impl Extent {
    fn row(&self) -> Vec<String> {
        let kind = if self.kind == Kind::Data { "data" } else { "hole" };
        vec![self.lba.to_string(), self.sectors.to_string(), kind.to_owned()]
    }
}
