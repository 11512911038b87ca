//! The command line: what each command does, and how it tells.
//!
//! - Every failure is one line on stderr, `vb-ublk: what, on what, why, what to do`, and exit code 1; bad usage
//!   is exit code 2.
//! - [`engine`] has every call into the engine and the ublk frontend.

mod add;
mod args;
mod barrier;
mod bench;
mod claim;
mod collect;
mod control;
mod daemonize;
mod del;
mod engine;
mod export;
mod features;
mod flatten;
mod import;
mod jobs;
mod layers;
mod list;
mod metrics;
mod nbd;
mod notify;
mod orders;
mod output;
mod phase;
mod place;
mod progress;
mod protect;
mod readable;
mod rebuild;
mod recover;
mod serve;
mod settings;
mod shell;
mod signals;
mod snapshot;
mod state;
mod verify;
mod volume;
mod wal;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use clap::error::ErrorKind as ClapKind;
use tracing_subscriber::EnvFilter;

use crate::error::{ErrorKind, Result};
use args::{Cli, Command, Global};
use recover::Verb;
use settings::Settings;
use state::RunDir;

/// Runs the command that the process was started with.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    let serves = matches!(cli.command, Command::Add(_) | Command::Nbd(_) | Command::Recover(_) | Command::Upgrade(_));
    start_logging(&cli.global, serves);
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            complain(&e.to_string());
            ExitCode::from(if e.kind() == ErrorKind::Usage { 2 } else { 1 })
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    // These need no settings, and work with a broken configuration file.
    match &cli.command {
        Command::Completions { shell } => return shell::completions(*shell),
        Command::Man { dir } => return shell::man(dir),
        Command::Features(json) => return features::run(json.json),
        Command::Wal(command) => return wal::run(command),
        _ => {}
    }
    let settings = Settings::of_process(&cli.global)?;
    let run_dir = RunDir::at(&settings.run_dir);
    match &cli.command {
        Command::Add(args) => add::run(&settings, args),
        Command::Nbd(args) => nbd::run(&settings, args),
        Command::Del(args) => del::run(&run_dir, args),
        Command::Recover(args) => recover::run(&settings, args, Verb::Recover),
        Command::Upgrade(args) => recover::run(&settings, args, Verb::Upgrade),
        Command::List(json) => list::list(&run_dir, json.json),
        Command::Status(args) => list::status(&run_dir, args.volume.as_ref(), args.json.json),
        Command::Volume(command) => volume::run(&settings, command),
        Command::Snapshot(command) => snapshot::run(&settings, command),
        Command::Clone(args) => snapshot::clone(&settings, args),
        Command::Barrier(args) => barrier::run(&settings, args),
        Command::Gc(args) => collect::run(&settings, args),
        Command::Import(args) => import::run(&settings, args),
        Command::Export(args) => export::run(&settings, args),
        Command::Bench(args) => bench::run(&settings, args),
        Command::Completions { .. } | Command::Man { .. } | Command::Features(_) | Command::Wal(_) => Ok(()),
    }
}

/// What clap has to say: help and version as they are, errors on one line.
fn usage(e: &clap::Error) -> ExitCode {
    if matches!(e.kind(), ClapKind::DisplayHelp | ClapKind::DisplayVersion) {
        // A reader that has gone is no error.
        let _ = e.print();
        return ExitCode::SUCCESS;
    }
    complain(&usage_line(e));
    ExitCode::from(2)
}

fn usage_line(e: &clap::Error) -> String {
    if e.kind() == ClapKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "no command is given: see `vb-ublk --help`".to_owned();
    }
    let text = e.to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let end = ["\nUsage:", "\nFor more information"].iter().filter_map(|m| text.find(m)).min().unwrap_or(text.len());
    format!("{}; see `vb-ublk --help`", output::one_line(&text[..end]).trim_end_matches('.'))
}

/// One line on stderr. A stderr that has gone cannot be told.
fn complain(what: &str) {
    let _ = writeln!(std::io::stderr(), "vb-ublk: {}", output::one_line(what));
}

/// To stderr, which a daemon sends to its log.
fn start_logging(global: &Global, serves: bool) {
    let level = match (global.quiet, global.verbose, serves) {
        (true, _, _) => "error",
        (_, 0, false) => "warn",
        (_, 0, true) => "vb_ublk=info,warn",
        (_, 1, _) => "vb_ublk=debug,info",
        _ => "vb_ublk=trace,debug",
    };
    // What the library for qcow2 images has to say comes back as an error; of an image that is given up it complains for no reason.
    let level = &format!("{level},imago=off");
    let filter = match std::env::var("RUST_LOG") {
        Ok(asked) if !asked.is_empty() => EnvFilter::try_new(&asked).unwrap_or_else(|e| {
            complain(&format!("RUST_LOG is {asked:?}, which makes no sense ({e}): logging as without it"));
            EnvFilter::new(level)
        }),
        _ => EnvFilter::new(level),
    };
    // Colours only where somebody looks; the daemon's log is decided after the fork, by what it was before.
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_target(false).with_writer(std::io::stderr);
    let builder = builder.with_ansi(!serves && std::io::stderr().is_terminal());
    if serves { builder.init() } else { builder.without_time().init() }
}

/// Waits; for threads that serve no requests.
fn pause(d: Duration) {
    let time = nix::poll::PollTimeout::try_from(d).unwrap_or(nix::poll::PollTimeout::ZERO);
    // Interrupted, it waits less: all who call this look again.
    let _ = nix::poll::poll(&mut [], time);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_holds_together() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn usage_errors_are_one_line() {
        for (args, words) in [
            (&["vb-ublk", "add"][..], &["--volume", "--help"][..]),
            (&["vb-ublk", "add", "--volume", "a/b"], &["a/b", "only letters"]),
            (&["vb-ublk", "add", "--volume", "v", "--create"], &["--size"]),
            (&["vb-ublk", "add", "--volume", "v", "--frobnicate"], &["--frobnicate"]),
            (&["vb-ublk", "add", "--volume", "v", "--wal-size", "1Q"], &["1Q", "unit"]),
            (&["vb-ublk", "del"], &["--all"]),
            (&["vb-ublk", "del", "--all", "-n", "1"], &["cannot be used"]),
            (&["vb-ublk"], &["no command"]),
            (&["vb-ublk", "volume"], &["no command"]),
            (&["vb-ublk", "list", "--store", "x", "--bucket", "y"], &["cannot be used"]),
        ] {
            let line = usage_line(&Cli::try_parse_from(args).expect_err("usage"));
            assert!(!line.contains('\n'), "{line}");
            for w in words {
                assert!(line.contains(w), "{args:?}: {line}");
            }
        }
    }
}
