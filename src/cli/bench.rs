//! `bench`: a workload over a volume, an NBD export, a block device or a file.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::add::check_size;
use super::args::BenchArgs;
use super::engine::{self, AttachOptions, Attached, CreateOptions, View};
use super::orders::for_a_while;
use super::output::{print, print_json, table};
use super::pause;
use super::place::{cache_folder, forget_cache, wal_file};
use super::progress::Progress;
use super::settings::{LogPlace, Settings};
use super::signals::Signals;
use super::snapshot::whole;
use super::state::{RunDir, remove_if_there};
use crate::bench::disk::OpenDisk;
use crate::bench::figures::Figures;
use crate::bench::nbd::{NbdTarget, NbdUri};
use crate::bench::{Target, Workload, run_here};
use crate::config::{ByteSize, VolumeName};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lane::Lane;
use crate::units::human_bytes;

/// The size of a volume that is made for it.
const OWN_SIZE: ByteSize = ByteSize(1 << 30);
/// Between two looks at the jobs.
const LOOK: Duration = Duration::from_millis(100);

pub(super) fn run(settings: &Settings, args: &BenchArgs) -> Result<()> {
    let last_word = "stopped at once: a volume that was made for this, bench-…, is left as it is";
    let stop = Signals::block()?.flag("kill -9", last_word)?;
    only_for_volumes(args)?;
    let (over, outcome) = match (&args.volume, &args.nbd, &args.device) {
        (_, Some(uri), _) => (uri.to_string(), over_nbd(args, uri, &stop)?),
        (_, _, Some(path)) => (path.display().to_string(), over_device(args, path, &stop)?),
        (Some(volume), ..) => (format!("volume {volume}"), over_volume(settings, args, volume, &stop)?),
        (None, None, None) => ("a volume of its own".to_owned(), over_own_volume(settings, args, &stop)?),
    };
    let Outcome { figures, uploaded_secs, volume } = outcome;
    if args.json.json {
        let mut out = figures.json();
        out["over"] = json!(over);
        out["rw"] = json!(args.rw.to_string());
        out["block_bytes"] = json!(args.bs.0);
        out["depth"] = json!(args.depth);
        out["jobs"] = json!(args.jobs);
        out["uploaded_seconds"] = json!(uploaded_secs);
        out["volume"] = volume;
        return print_json(&out);
    }
    print(&text(args, &over, &figures, uploaded_secs))
}

/// What came of it.
struct Outcome {
    figures: Figures,
    /// How long it took afterwards to upload the rest, where there was something to upload.
    uploaded_secs: Option<f64>,
    /// What the volume tells of itself in the end.
    volume: Value,
}

impl From<Figures> for Outcome {
    fn from(figures: Figures) -> Self {
        Self { figures, uploaded_secs: None, volume: Value::Null }
    }
}

/// Refuses to write over what is there.
fn may_write(args: &BenchArgs, what: &str) -> Result<()> {
    if args.overwrite || !args.writes() {
        return Ok(());
    }
    let what = format!("this writes over what {what} has: --overwrite says that it may, --rw randread only reads");
    Err(Error::new(ErrorKind::Usage, what))
}

/// Each job's part of so many bytes.
fn workloads(args: &BenchArgs, bytes: u64) -> Result<Vec<Workload>> {
    if args.jobs == 0 || args.jobs > MAX_JOBS {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("{} jobs are not possible: choose 1 to {MAX_JOBS}", args.jobs),
        ));
    }
    let bytes = args.size.map_or(bytes, |s| s.0.min(bytes));
    let block = args.bs.0.max(1);
    let part = bytes / block / u64::from(args.jobs) * block;
    let of = |n: u64| Workload {
        read_percent: args.rw.read_percent(args.reads),
        sequential: args.rw.sequential(),
        block_bytes: u32::try_from(args.bs.0).unwrap_or(u32::MAX),
        depth: args.depth,
        span: n * part..(n + 1) * part,
        time: Duration::from_secs(args.seconds.into()),
        flush_every: args.fsync.filter(|n| *n > 0),
        fua: args.fua,
        verify: args.verify,
        fill: args.fill,
        seed: args.seed.wrapping_add(n),
        interval: args.interval.map(|ms| Duration::from_millis(ms.into())),
    };
    let all: Vec<Workload> = (0..u64::from(args.jobs)).map(of).collect();
    all.iter().try_for_each(Workload::check)?;
    Ok(all)
}

/// The most jobs, each a thread.
const MAX_JOBS: u16 = 256;

/// Runs each workload on a thread of its own, on a target that `make` makes there, and adds up.
fn jobs<T: Target>(
    args: &BenchArgs,
    bytes: u64,
    stop: &Arc<AtomicBool>,
    make: impl Fn(&Lane) -> Result<Rc<T>> + Sync,
) -> Result<Figures> {
    let all = workloads(args, bytes)?;
    let begun = Instant::now();
    let mut line = Progress::new(!args.json.json);
    std::thread::scope(|s| {
        let running: Vec<_> =
            all.into_iter().map(|work| s.spawn(|| run_here(work, Arc::clone(stop), |lane| make(lane)))).collect();
        while !running.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            line.say(|| Some(format!("{} s of {} s", begun.elapsed().as_secs(), args.seconds)));
            pause(LOOK);
        }
        line.clear();
        let mut sum: Option<Figures> = None;
        for job in running {
            let figures = job.join().map_err(|_| Error::new(ErrorKind::Internal, "a job has panicked"))??;
            match &mut sum {
                Some(sum) => sum.add(&figures),
                None => sum = Some(figures),
            }
        }
        sum.ok_or_else(|| Error::new(ErrorKind::Internal, "there were no jobs"))
    })
}

fn over_nbd(args: &BenchArgs, uri: &NbdUri, stop: &Arc<AtomicBool>) -> Result<Outcome> {
    may_write(args, &uri.to_string())?;
    let first = uri.connect()?;
    let flushes = args.fill || args.rw.writes() && args.fsync.is_some();
    first.serves(args.writes(), flushes, args.fua && args.rw.writes()).map_err(|e| e.context(uri.to_string()))?;
    let bytes = first.size_bytes;
    drop(first);
    Ok(jobs(args, bytes, stop, |lane| Ok(NbdTarget::new(lane, uri.connect()?)))?.into())
}

fn over_device(args: &BenchArgs, path: &Path, stop: &Arc<AtomicBool>) -> Result<Outcome> {
    may_write(args, &path.display().to_string())?;
    let disk = OpenDisk::open(path, args.writes())?;
    Ok(jobs(args, disk.size()?, stop, |lane| Ok(disk.on(lane)))?.into())
}

fn over_volume(settings: &Settings, args: &BenchArgs, volume: &VolumeName, stop: &Arc<AtomicBool>) -> Result<Outcome> {
    whole(volume)?;
    may_write(args, &format!("volume {volume}"))?;
    over(settings, args, volume, &settings.log_place(args.log.place()), stop)
}

fn over(
    settings: &Settings,
    args: &BenchArgs,
    volume: &VolumeName,
    place: &LogPlace,
    stop: &Arc<AtomicBool>,
) -> Result<Outcome> {
    let (_held, options) = for_a_while(settings, volume, place, args.wal_size)?;
    let attached = Attached::attach(AttachOptions {
        flush_to: args.flush.or(settings.add.flush).unwrap_or_default(),
        cache: cache_folder(args.cache.clone(), settings)?.map(|c| c.of(volume)),
        ..options
    })?;
    let view = attached.view();
    let done = jobs(args, view.size_bytes(), stop, |lane| View::lane(&view, lane, Arc::new(())));
    let begun = Instant::now();
    let detached = attached.detach();
    let uploaded_secs = Some(begun.elapsed().as_secs_f64());
    // What the workload has found goes before what comes of it.
    let figures = done?;
    detached?;
    Ok(Outcome { figures, uploaded_secs, volume: view.status()? })
}

/// A volume that is made for it, and gone afterwards.
fn over_own_volume(settings: &Settings, args: &BenchArgs, stop: &Arc<AtomicBool>) -> Result<Outcome> {
    let size = check_size(args.size.unwrap_or(OWN_SIZE))?;
    // Never on a device: it would remember a volume that is no more.
    let dir = match args.log.place() {
        Some(LogPlace::Dir(dir)) => dir,
        Some(LogPlace::Device(_)) => {
            let what = "a volume that is made for this has its log in a folder: --wal-device goes with --volume";
            return Err(Error::new(ErrorKind::Usage, what));
        }
        None => settings.wal_dir(),
    };
    let (url, opts) = (&settings.store, &settings.store_options);
    let volume: VolumeName = format!("bench-{}", uuid::Uuid::new_v4().simple()).parse()?;
    engine::create(url, opts, volume.as_str(), &CreateOptions { size_bytes: size, logical_block: 512 })?;
    let done = over(settings, args, &volume, &LogPlace::Dir(dir.clone()), stop);
    // What a failure has left is of no use to anybody either.
    let deleted = engine::delete(url, opts, volume.as_str(), true);
    forget_cache(args.cache.clone().or(&settings.add.cache).cache_dir, settings, &volume);
    let forgotten = wal_file(&dir, &volume).and_then(|log| forget(&log)).and_then(|()| {
        // Its name is nobody else's.
        forget(&RunDir::at(&settings.run_dir).lock_path(&volume))
    });
    let left = |e: Error| e.context(format!("removing volume {volume}, which was made for this"));
    match (done, deleted.map(drop).and(forgotten).map_err(left)) {
        (Err(e), Err(left)) => Err(e.context(format!("{left}; and before"))),
        (done, left) => left.and(done),
    }
}

fn forget(path: &Path) -> Result<()> {
    remove_if_there(path).context(|| format!("removing {}", path.display()))
}

/// Options of a log, a cache or flushes say nothing of others' disks.
fn only_for_volumes(args: &BenchArgs) -> Result<()> {
    let cache = &args.cache;
    let of_volumes = args.wal_size.is_some()
        || args.log.place().is_some()
        || args.flush.is_some()
        || cache.cache_dir.is_some()
        || cache.cache_size.is_some();
    if of_volumes && (args.nbd.is_some() || args.device.is_some()) {
        let what = "--wal-dir, --wal-device, --wal-size, --cache-dir, --cache-size and --flush are of a volume that this process attaches: they go \
                    with --volume, or with none of --nbd and --device";
        return Err(Error::new(ErrorKind::Usage, what));
    }
    Ok(())
}

fn text(args: &BenchArgs, over: &str, figures: &Figures, uploaded_secs: Option<f64>) -> String {
    let mut out = format!(
        "{} of {}, depth {}, {} {}, {:.1} s over {over}\n",
        args.rw,
        human_bytes(args.bs.0),
        args.depth,
        args.jobs,
        if args.jobs == 1 { "job" } else { "jobs" },
        figures.seconds()
    );
    let all = figures.json();
    let rows: Vec<Vec<String>> = figures.kinds().map(|(name, _)| row(name, &all[name])).collect();
    out += &table(&["", "per second", "MiB/s", "mean", "p50", "p99", "p99.9", "max"], &rows);
    if figures.verified_bytes() > 0 {
        out += &format!("{} read again in the end, and right\n", human_bytes(figures.verified_bytes()));
    }
    if let Some(secs) = uploaded_secs {
        out += &format!("{secs:.1} s to upload the rest and detach\n");
    }
    out
}

fn row(name: &str, v: &Value) -> Vec<String> {
    let number = |v: &Value| v.as_f64().unwrap_or_default();
    let latency = |key: &str| human_micros(number(&v["latency_us"][key]));
    let mut row = vec![
        name.to_owned(),
        format!("{:.0}", number(&v["per_second"])),
        format!("{:.1}", number(&v["bytes_per_second"]) / f64::from(1 << 20)),
    ];
    row.extend(["mean", "p50", "p99", "p99.9", "max"].map(latency));
    row
}

fn human_micros(us: f64) -> String {
    match us {
        us if us < 1000.0 => format!("{us:.0} µs"),
        us if us < 1_000_000.0 => format!("{:.2} ms", us / 1000.0),
        us => format!("{:.2} s", us / 1_000_000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_for_people() {
        assert_eq!([0.4, 999.4, 1500.0, 2_500_000.0].map(human_micros), ["0 µs", "999 µs", "1.50 ms", "2.50 s"]);
    }
}
