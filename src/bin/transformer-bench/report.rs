//! `scripts/report`: the report of the last run, or saved machines side by side.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use transformer_bench::files;
use transformer_bench::installation;
use transformer_bench::report::{export, html, machines, markdown};
use transformer_bench::results::baseline::{self, Baseline};
use transformer_bench::results::machine::Machine;
use transformer_bench::results::{self, Results, run, validate};

use super::options;

/// Prints the tables of the last run, or compares saved baselines.
///
/// Also writes report.html, report.md, results.json, results.csv and bmf.json for the last run.
#[derive(Args)]
#[command(after_help = "Examples:
  scripts/report                            the last run
  scripts/report --from results.json        a run from elsewhere
  scripts/report h100-80gb-hbm3-x2/training amd-epyc-avx512-2-cores/quick")]
pub struct Arguments {
    /// Saved baselines: NAME or MACHINE/NAME (scripts/baseline list)
    machines: Vec<String>,
    /// Report this results.json instead of the last run
    #[arg(long, value_name = "FILE", value_parser = options::path(), conflicts_with = "machines")]
    from: Option<PathBuf>,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let folder = results::folder();
    if !arguments.machines.is_empty() {
        let slug = Machine::read().slug();
        let mut sides = Vec::new();
        for name in &arguments.machines {
            sides.push((name.clone(), baseline::read(&baseline::root(), name, &slug)?.results()));
        }
        return super::show(&machines::render(&sides));
    }
    if let Some(path) = &arguments.from {
        let place = path.display().to_string();
        let read = validate::parse_results(&files::read_text(path)?, &place)?;
        return write(&folder, &read, &|_| Vec::new(), &installation::command("bench"));
    }
    last_run(&folder)
}

/// Writes and prints the report of the last run.
///
/// # Errors
/// Returns an error if no run exists, or a file is damaged or cannot be written.
pub fn last_run(folder: &Path) -> Result<()> {
    let (merged, parts) = run::merge(folder)?;
    let missing: Vec<String> = parts.iter().filter_map(run::missing_cases).collect();
    if !missing.is_empty() {
        eprintln!("report: the run was interrupted ({}), so some cases are missing", missing.join(", "));
    }
    // Criterion saves the samples. Without them the report lacks one picture.
    let saved = Baseline::of_last_run(folder, &results::criterion_home(), "new", true).ok();
    let timings =
        |id: &str| saved.as_ref().and_then(|run| run.case(id)).map(|case| case.samples()).unwrap_or_default();
    write(folder, &merged, &timings, &run::command(&parts))
}

fn write(folder: &Path, results: &Results, timings: &dyn Fn(&str) -> Vec<f64>, command: &str) -> Result<()> {
    let text = markdown::render(results, command);
    let files = [
        ("results.json", export::json(results)?),
        ("results.csv", export::csv(results)?),
        ("bmf.json", export::bmf(results)?),
        ("report.md", text.clone()),
        ("report.html", html::render(results, timings, command)?),
    ];
    for (name, content) in &files {
        files::write_atomic(&folder.join(name), content)?;
    }
    let names = files.map(|(name, _)| name).join(", ");
    super::show(&format!("{text}\nWritten to {}: {names}\n", folder.display()))
}
