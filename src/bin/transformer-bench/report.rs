//! `scripts/report`: the last run as tables, a page and data; or machines side by side.

use std::fs;

use anyhow::{Context, Result};
use clap::Args;
use transformer_bench::report::{export, html, markdown, side_by_side};
use transformer_bench::results::baseline::{self, Baseline};
use transformer_bench::results::machine::Machine;
use transformer_bench::results::{self, Results, run};

/// Shows the tables of the last run, and writes them as report.html, report.md,
/// results.json, results.csv and bmf.json; or lays saved baselines side by side.
#[derive(Args)]
#[command(after_help = "Examples:
  scripts/report                            the last run
  scripts/report --from results.json        a run from elsewhere
  scripts/report h100-80gb-hbm3-x2/training amd-epyc-avx512-2-cores/quick")]
pub struct Arguments {
    /// Saved baselines: NAME or MACHINE/NAME (scripts/baseline list)
    machines: Vec<String>,
    /// Make the report of this results.json instead of the last run's
    #[arg(long, value_name = "FILE", conflicts_with = "machines")]
    from: Option<std::path::PathBuf>,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let folder = results::folder();
    if !arguments.machines.is_empty() {
        let slug = Machine::read().slug();
        let mut sides = Vec::new();
        for name in &arguments.machines {
            sides.push((name.clone(), baseline::read(&baseline::root(), name, &slug)?.results()));
        }
        return super::show(&side_by_side::render(&sides));
    }
    if let Some(path) = &arguments.from {
        let place = path.display().to_string();
        let text = fs::read_to_string(path).with_context(|| format!("{place} could not be read"))?;
        let read = export::read(&text, &place)?;
        return write(&folder, &read, &|_| Vec::new(), "./scripts/bench");
    }
    let (merged, parts) = run::merge(&folder)?;
    let left: Vec<String> = parts.iter().filter_map(run::cut).collect();
    if !left.is_empty() {
        eprintln!("report: the run was cut off ({}): what is missing was not measured", left.join(", "));
    }
    // The timings are Criterion's; without them the report lacks one picture.
    let kept = Baseline::of_last_run(&folder, &results::criterion_home(), "new", true).ok();
    let timings = |id: &str| kept.as_ref().and_then(|k| k.case(id)).map(|c| c.samples()).unwrap_or_default();
    write(&folder, &merged, &timings, &run::command(&parts))
}

fn write(
    folder: &std::path::Path,
    results: &Results,
    timings: &dyn Fn(&str) -> Vec<f64>,
    command: &str,
) -> Result<()> {
    let text = markdown::render(results, command);
    let files = [
        ("results.json", export::json(results)?),
        ("results.csv", export::csv(results)?),
        ("bmf.json", export::bmf(results)?),
        ("report.md", text.clone()),
        ("report.html", html::render(results, timings, command)?),
    ];
    for (name, content) in &files {
        results::write_whole(&folder.join(name), content)?;
    }
    let names = files.map(|(name, _)| name).join(", ");
    super::show(&format!("{text}\nWritten to {}: {names}\n", folder.display()))
}
