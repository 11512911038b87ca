//! Serves memory, or nothing, as a ublk device: the floor that a real volume is measured against.
//!
//! `ublk_ram [--null] [--size 1G] [--queues N] [--depth N] [--id N] [--block 512|4096] [--defer] [--recover]
//! [--fail-queue N]`; ends on SIGTERM or SIGINT. `--fail-queue` makes that queue's set-up fail.

mod ram;

use std::cell::RefCell;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::{Arc, RwLock};

use nix::sys::signal::{SigSet, Signal};
use ram::{Ram, RamEngine, bytes};
use vb_ublk::error::{Error, ErrorKind, Result};
use vb_ublk::frontend::ublk::{DeviceSpec, StopHandle, features, serve};
use vb_ublk::lane::{CountersHandle, RingMode};

struct Args {
    spec: DeviceSpec,
    null: bool,
    fail_queue: Option<u16>,
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
    let ram = Ram::new(spec.size_bytes, null);
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
