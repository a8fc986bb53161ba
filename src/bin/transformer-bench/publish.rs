//! `scripts/publish`: the results in the project's documents, generated from criterion-baselines/.

use std::path::Path;

use anyhow::{Result, bail};
use clap::Args;
use transformer_bench::files;
use transformer_bench::installation;
use transformer_bench::report::publish;

/// Writes the generated blocks and pictures of README.md and criterion-baselines/README.md.
///
/// The tests fail if a document differs from its baselines. Only baselines that git tracks (git add) are published.
#[derive(Args)]
#[command(after_help = "Examples:
  scripts/baseline save first && git add criterion-baselines && scripts/publish
  scripts/publish --check")]
pub struct Arguments {
    /// Write nothing, and fail if a document differs
    #[arg(long)]
    check: bool,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    installation::check_checkout("this command")?;
    let mut differ = Vec::new();
    for (path, text) in publish::files(Path::new("."))? {
        if std::fs::read_to_string(&path).is_ok_and(|found| found == text) {
            continue;
        }
        differ.push(path.display().to_string());
        if !arguments.check {
            files::write_atomic(&path, &text)?;
        }
    }
    let list = differ.join(", ");
    match (differ.is_empty(), arguments.check) {
        (true, _) => super::show("the documents agree with the baselines\n"),
        (false, true) => bail!("these differ from the baselines: {list}; ./scripts/publish writes them"),
        (false, false) => super::show(&format!("written: {list}\n")),
    }
}
