//! Completions and man pages, from the definition of the command line.

use std::path::Path;

use clap::CommandFactory;

use super::args::Cli;
use super::output::print;
use crate::error::{Context, Error, ErrorKind, Result};

pub(super) fn completions(shell: clap_complete::Shell) -> Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "vb-ublk", &mut text);
    let text =
        String::from_utf8(text).map_err(|e| Error::new(ErrorKind::Internal, "making completions").with_source(e))?;
    print(&text)
}

/// One page for the program and each of its commands: `vb-ublk.1`, `vb-ublk-add.1`, …
pub(super) fn man(dir: &Path) -> Result<()> {
    if !dir.is_dir() {
        let what = format!("{} is not a folder: make it first, then the man pages are written into it", dir.display());
        return Err(Error::new(ErrorKind::NotFound, what));
    }
    clap_mangen::generate_to(Cli::command(), dir).context(|| format!("writing the man pages into {}", dir.display()))
}
