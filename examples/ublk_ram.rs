//! Serves memory, or nothing, as a ublk device: the floor that a real volume is measured against.
//!
//! `ublk_ram [--null] [--size 1G] [--queues N] [--depth N] [--id N] [--block 512|4096] [--defer] [--recover]
//! [--fail-queue N]`; ends on SIGTERM or SIGINT. `--fail-queue` makes that queue's set-up fail.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::{Arc, RwLock};

use nix::sys::signal::{SigSet, Signal};
use vb_ublk::disk::IoBuf;
use vb_ublk::error::{Error, ErrorKind, Result};
use vb_ublk::frontend::ublk::{DeviceSpec, StopHandle, features, serve};
use vb_ublk::lane::{CountersHandle, RingMode};
use vb_ublk::units::{Lba, SECTOR};
use vb_ublk::volume::engine::{Engine, IoFault};

const PAGE: usize = 1 << 20;

/// Memory in pieces, shared by all queues; an absent piece is zeros.
struct Ram {
    pieces: Vec<RwLock<Option<Box<[u8]>>>>,
    null: bool,
    size: u64,
}

impl Ram {
    /// Calls `f` with each piece that the range touches, the range within it, and where it begins in the request.
    fn each(
        &self,
        lba: Lba,
        bytes: u64,
        mut f: impl FnMut(&RwLock<Option<Box<[u8]>>>, std::ops::Range<usize>, usize),
    ) -> Result<(), IoFault> {
        let start = lba.0 * SECTOR as u64;
        if start.checked_add(bytes).is_none_or(|end| end > self.size) {
            return Err(IoFault::BadRange);
        }
        if self.null {
            return Ok(());
        }
        let mut done = 0;
        while done < bytes {
            let at = start + done;
            let within = (at % PAGE as u64) as usize;
            let len = (PAGE - within).min((bytes - done) as usize);
            f(&self.pieces[(at / PAGE as u64) as usize], within..within + len, done as usize);
            done += len as u64;
        }
        Ok(())
    }
}

struct RamEngine(Arc<Ram>);

impl Engine for RamEngine {
    async fn read(&self, lba: Lba, dst: IoBuf) -> Result<(), IoFault> {
        self.0.each(lba, dst.len() as u64, |piece, range, at| match &*piece.read().unwrap() {
            Some(p) => dst.copy_in(at, &p[range]),
            None => dst.zero(at..at + range.len()),
        })
    }

    async fn write(&self, lba: Lba, src: IoBuf, _fua: bool) -> Result<(), IoFault> {
        self.0.each(lba, src.len() as u64, |piece, range, at| {
            let mut piece = piece.write().unwrap();
            let p = piece.get_or_insert_with(|| vec![0; PAGE].into_boxed_slice());
            let len = range.len();
            p[range].copy_from_slice(&src.bytes()[at..at + len]);
        })
    }

    async fn flush(&self) -> Result<(), IoFault> {
        Ok(())
    }

    async fn discard(&self, lba: Lba, sectors: u64, _fua: bool) -> Result<(), IoFault> {
        self.0.each(lba, sectors * SECTOR as u64, |piece, range, _| {
            let mut piece = piece.write().unwrap();
            if range.len() == PAGE {
                *piece = None;
            } else if let Some(p) = &mut *piece {
                p[range].fill(0);
            }
        })
    }

    async fn write_zeroes(&self, lba: Lba, sectors: u64, fua: bool) -> Result<(), IoFault> {
        self.discard(lba, sectors, fua).await
    }

    fn seal(&self) {}

    fn tasks(self: Rc<Self>) -> Vec<Pin<Box<dyn Future<Output = ()>>>> {
        Vec::new()
    }
}

struct Args {
    spec: DeviceSpec,
    null: bool,
    fail_queue: Option<u16>,
}

fn bytes(s: &str) -> Option<u64> {
    let (number, shift) = match s.as_bytes().last()? {
        b'K' => (&s[..s.len() - 1], 10),
        b'M' => (&s[..s.len() - 1], 20),
        b'G' => (&s[..s.len() - 1], 30),
        _ => (s, 0),
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn parse() -> Result<Args> {
    let mut args =
        Args { spec: DeviceSpec { size_bytes: 1 << 30, ..DeviceSpec::default() }, null: false, fail_queue: None };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let wrong = || Error::new(ErrorKind::Usage, format!("{word} is unknown, or lacks a good value"));
        let spec = &mut args.spec;
        match word.as_str() {
            "--null" => args.null = true,
            "--defer" => spec.ring_mode = RingMode::Deferred,
            "--recover" => spec.recover = true,
            _ => {
                let value = words.next().as_deref().and_then(bytes).ok_or_else(wrong)?;
                let short = || u16::try_from(value).map_err(|_| wrong());
                match word.as_str() {
                    "--size" => spec.size_bytes = value,
                    "--queues" => spec.queues = short()?,
                    "--depth" => spec.depth = short()?,
                    "--block" => spec.logical_block = u32::from(short()?),
                    "--id" => spec.id = Some(u32::from(short()?)),
                    "--fail-queue" => args.fail_queue = Some(short()?),
                    _ => return Err(wrong()),
                }
            }
        }
    }
    Ok(args)
}

fn run() -> Result<()> {
    let Args { spec, null, fail_queue } = parse()?;
    for (feature, has) in features()?.known() {
        if feature.used {
            println!("{} {}", feature.name, if has { "yes" } else { "no" });
        }
    }
    let stop = StopHandle::new()?;
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().map_err(|e| Error::io("blocking signals", e.into()))?;
    let stopper = stop.clone();
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            stopper.stop();
        }
    });
    let pieces = if null { 0 } else { spec.size_bytes.div_ceil(PAGE as u64) };
    let ram = Arc::new(Ram { pieces: (0..pieces).map(|_| RwLock::default()).collect(), null, size: spec.size_bytes });
    let counters = Arc::new(RwLock::new(Vec::<CountersHandle>::new()));
    let all = Arc::clone(&counters);
    let made = move |queue: u16, lane: &vb_ublk::lane::Lane| {
        if fail_queue == Some(queue) {
            return Err(Error::new(ErrorKind::Internal, "made to fail"));
        }
        all.write().unwrap().push(lane.counters());
        Ok(Rc::new(RamEngine(Arc::clone(&ram))))
    };
    let announced = RefCell::new(false);
    serve(
        &spec,
        made,
        |device| {
            println!("{} queues {} depth {}", device.path.display(), device.queues, device.depth);
            announced.replace(true);
        },
        &stop,
    )?;
    for (i, c) in counters.read().unwrap().iter().enumerate() {
        println!(
            "queue {i}: passes {} enters {} polls {} ops {}",
            c.passes.get(),
            c.enters.get(),
            c.polls.get(),
            c.ops.get()
        );
    }
    Ok(())
}

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(tracing::Level::WARN).init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("ublk_ram: {e}");
            ExitCode::FAILURE
        }
    }
}
