//! `scripts/publish`: the figures that the project's own pages show, made from criterion-baselines/.

use std::path::Path;

use anyhow::{Result, bail};
use clap::Args;
use transformer_bench::report::publish;
use transformer_bench::results;

/// Writes what README.md, criterion-baselines/README.md and their pictures show of the kept baselines.
///
/// No figure there is written by hand: the tests compare the pages with what this makes. A baseline counts once
/// git knows it (git add): what you keep for yourself is not published.
#[derive(Args)]
#[command(after_help = "Examples:
  scripts/baseline save first && git add criterion-baselines && scripts/publish
  scripts/publish --check")]
pub struct Arguments {
    /// Write nothing, and fail where a page differs
    #[arg(long)]
    check: bool,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let mut differ = Vec::new();
    for (path, text) in publish::files(Path::new("."))? {
        if std::fs::read_to_string(&path).is_ok_and(|found| found == text) {
            continue;
        }
        differ.push(path.display().to_string());
        if !arguments.check {
            results::write_whole(&path, &text)?;
        }
    }
    let list = differ.join(", ");
    match (differ.is_empty(), arguments.check) {
        (true, _) => super::show("the pages show what the baselines say\n"),
        (false, true) => bail!("not what the baselines say: {list}; ./scripts/publish writes them"),
        (false, false) => super::show(&format!("written: {list}\n")),
    }
}
