//! `scripts/flamegraph`: CPU and GPU profiles of slow cases.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use transformer_bench::compare::builds;
use transformer_bench::compare::decision::Verdict;
use transformer_bench::compare::revisions;
use transformer_bench::compare::signals::check_interrupted;
use transformer_bench::compare::worker::Side;
use transformer_bench::files;
use transformer_bench::installation::command;
use transformer_bench::profile::{Profile, Unit};
use transformer_bench::results::{self, Status};
use transformer_bench::suite::{Case, Set, cases, parse_filter};
use transformer_bench::text;

use super::options::{self, Executables, print_progress};

/// Draws flamegraphs of slow cases and prints their heaviest frames.
///
/// Without a filter, it profiles the regressions of the last comparison, or else the slowest cases of the last run.
#[derive(Args)]
#[command(after_help = "Examples:
  scripts/flamegraph                              after scripts/bench or scripts/compare
  scripts/flamegraph 'train-step/mlx-cpu/f32/'
  scripts/flamegraph --diff main 'attention/'     changes since main")]
pub struct Arguments {
    /// Regular expression over ids (workload/backend/precision/shape)
    filter: Option<String>,
    /// Number of cases
    #[arg(long, value_name = "N", default_value_t = 3)]
    top: usize,
    /// Seconds for which each case is profiled
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    seconds: u64,
    /// Profile this side too and draw the differences: a git revision or dir:PATH
    #[arg(long, value_name = "BASE", value_parser = options::side)]
    diff: Option<String>,
    #[command(flatten)]
    executables: Executables,
}

impl Arguments {
    /// Checks the options and the filter.
    ///
    /// # Errors
    /// Returns an error if a number is 0, or if the filter is invalid or matches no case.
    pub fn check(&self) -> Result<()> {
        ensure!(self.top > 0 && self.seconds > 0, "--top and --seconds must be at least 1");
        self.filter.as_deref().map_or(Ok(()), |filter| matching(filter).map(drop))
    }
}

/// Profiles the selected cases, prints their heaviest frames and the paths of the pictures.
pub fn run(arguments: &Arguments) -> Result<()> {
    arguments.check()?;
    let selected = select(arguments)?;
    let head = arguments.executables.build()?;
    let build_base = |text: &String| builds::build(&revisions::named(text)?, &print_progress);
    let base = arguments.diff.as_ref().map(build_base).transpose()?;
    let home = results::criterion_home();
    let mut pictures = String::new();
    for case in &selected {
        let folder = profile(&head, case, &home, arguments.seconds)?;
        for (name, frames, unit) in
            [("flamegraph", "frames", Unit::Samples), ("gpu", "kernels", Unit::Nanoseconds)]
        {
            let Some(found) = read(&folder, name)? else { continue };
            super::show(&format!("\n{case}: heaviest {frames}\n"))?;
            for (frame, share) in found.heaviest(10) {
                super::show(&format!("{:6.1} %  {frame}\n", 100.0 * share))?;
            }
            pictures.push_str(&format!("{}\n", folder.join(format!("{name}.svg")).display()));
            if let Some(base) = &base {
                let place = results::folder().join("profile-base");
                let before = read(&profile(base, case, &place, arguments.seconds)?, name)?;
                let before = before.with_context(|| format!("{} has no such profile", base.name))?;
                let picture = folder.join(format!("{name}-diff.svg"));
                let title = format!("{case} since {}", base.name);
                files::write_atomic(&picture, &found.diff_svg(&before, &title, unit)?)?;
                pictures.push_str(&format!("{}\n", picture.display()));
            }
        }
    }
    super::show(&format!("\n{pictures}"))
}

/// Selects the cases to profile.
fn select(arguments: &Arguments) -> Result<Vec<Case>> {
    let mut selected = match &arguments.filter {
        Some(filter) => matching(filter)?,
        None => regressions()?,
    };
    if selected.is_empty() {
        selected = slowest_of_last_run()?;
    }
    selected.truncate(arguments.top);
    ensure!(!selected.is_empty(), "the last run measured nothing: run {}, or name a case", command("bench"));
    Ok(selected)
}

/// Returns the cases that match a filter. Cases of the last run, slowest first, take precedence over others.
fn matching(filter: &str) -> Result<Vec<Case>> {
    let expression = parse_filter(filter)?;
    let matches = |case: &Case| expression.is_match(&case.to_string());
    let mut measured = slowest_of_last_run().unwrap_or_default();
    measured.retain(matches);
    let exact = filter.parse::<Case>().map(|case| vec![case]);
    let mut found = exact.unwrap_or_else(|_| cases(Set::Quick));
    found.retain(|case| matches(case) && (measured.is_empty() || measured.contains(case)));
    found.sort_by_key(|case| measured.iter().position(|other| other == case));
    ensure!(!found.is_empty(), "no case matches '{filter}': {} shows the ids", command("list"));
    Ok(found)
}

/// Returns the cases that the last comparison reported as slower, if it is newer than the last run.
fn regressions() -> Result<Vec<Case>> {
    let path = results::folder().join("comparison.json");
    let modified = |path: &Path| fs::metadata(path).and_then(|file| file.modified()).ok();
    if modified(&path) <= modified(&results::folder().join("run")) {
        return Ok(Vec::new());
    }
    let comparison = text::parse_json(&files::read_text(&path)?)
        .with_context(|| format!("{} is damaged: compare again", path.display()))?;
    let cases = comparison["cases"].as_array().into_iter().flatten();
    let slower = cases.filter(|case| case["verdict"] == Verdict::Slower.id());
    Ok(slower.filter_map(|case| case["id"].as_str()?.parse().ok()).collect())
}

/// Returns the measured cases of the last run, slowest first.
fn slowest_of_last_run() -> Result<Vec<Case>> {
    let (merged, _) = results::run::merge(&results::folder())?;
    let mut timed: Vec<(f64, Case)> = merged
        .cases
        .iter()
        .filter(|r| r.status == Status::Measured)
        .filter_map(|r| Some((r.median_ns?, r.id.parse().ok()?)))
        .collect();
    timed.sort_by(|a, b| b.0.total_cmp(&a.0));
    Ok(timed.into_iter().map(|(_, case)| case).collect())
}

/// Profiles a case in its own process. Returns the folder with the profile.
fn profile(side: &Side, case: &Case, home: &Path, seconds: u64) -> Result<PathBuf> {
    check_interrupted()?;
    let executable = side
        .executables
        .get(&case.backend.framework())
        .with_context(|| format!("{} has no executable for {}", side.name, case.backend))?;
    let folder = results::criterion_folder(home, case).join("profile");
    let _ = fs::remove_dir_all(&folder);
    let set = Set::ALL.iter().copied().find(|&set| cases(set).contains(case)).unwrap_or(Set::Full);
    let status = Command::new(executable)
        .args(["--bench", "--exact", &case.to_string(), "--profile-time", &seconds.to_string()])
        .env("CRITERION_HOME", home)
        .env("TRANSFORMER_BENCH_SET", set.id())
        .status()
        .with_context(|| format!("{} did not start", executable.display()))?;
    check_interrupted()?;
    if !status.success() || !folder.join("flamegraph.svg").exists() {
        bail!("{case} could not be profiled: see the line above");
    }
    Ok(folder)
}

/// Reads a profile. Returns `None` if it does not exist.
fn read(folder: &Path, name: &str) -> Result<Option<Profile>> {
    let path = folder.join(format!("{name}.folded"));
    if !path.exists() {
        return Ok(None);
    }
    Profile::parse(&fs::read_to_string(&path)?).map(Some).with_context(|| path.display().to_string())
}
