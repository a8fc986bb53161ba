//! `scripts/flamegraph`: draws where slow cases spend their time.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use transformer_bench::compare::sides::{self, Source};
use transformer_bench::compare::stop::go_on;
use transformer_bench::compare::worker::Side;
use transformer_bench::profile::{Profile, Unit};
use transformer_bench::results::{self, Status};
use transformer_bench::suite::{Case, Set, cases, pattern};

/// Draws flamegraphs of the slow cases, and prints their heaviest frames.
///
/// Without a filter: the cases that the last comparison called slower, or else the
/// slowest of the last run.
#[derive(Args)]
#[command(after_help = "Examples:
  scripts/flamegraph                              after scripts/bench or scripts/compare
  scripts/flamegraph 'train-step/mlx-cpu/f32/'
  scripts/flamegraph --diff main 'attention/'     what grew since main")]
pub struct Arguments {
    /// A regular expression over ids: workload/backend/precision/shape
    filter: Option<String>,
    /// How many cases
    #[arg(long, value_name = "N", default_value_t = 3)]
    slowest: usize,
    /// Seconds that each is profiled
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    seconds: u64,
    /// Profile this side too, and draw what grew and shrank since: a revision or dir:PATH
    #[arg(long, value_name = "BASE")]
    diff: Option<String>,
    /// Take executables built elsewhere: DIR/torch, DIR/mlx
    #[arg(long, value_name = "DIR")]
    executables: Option<PathBuf>,
}

/// Progress, beside the results.
fn say(line: &str) {
    eprintln!("{line}");
}

pub fn run(arguments: &Arguments) -> Result<()> {
    ensure!(arguments.slowest > 0 && arguments.seconds > 0, "--slowest and --seconds are at least 1");
    let picked = pick(arguments)?;
    let now = match &arguments.executables {
        Some(folder) => sides::build(&Source::Folder(folder.clone()), &say)?,
        None => sides::build(&Source::Worktree, &say)?,
    };
    let base = arguments.diff.as_deref().map(|text| sides::build(&sides::named(text)?, &say)).transpose()?;
    let home = results::criterion_home();
    let mut pictures = Vec::new();
    for case in &picked {
        let folder = profile(&now, case, &home, arguments.seconds)?;
        for (name, unit) in [("flamegraph", Unit::Samples), ("gpu", Unit::Nanoseconds)] {
            let Some(found) = read(&folder, name)? else { continue };
            super::show(&format!(
                "\n{case}: heaviest {}\n",
                if name == "gpu" { "kernels" } else { "frames" }
            ))?;
            for (frame, share) in found.heaviest(10) {
                super::show(&format!("{:6.1} %  {frame}\n", 100.0 * share))?;
            }
            pictures.push(folder.join(format!("{name}.svg")));
            if let Some(base) = &base {
                let place = results::folder().join("profile-base");
                let before = profile(base, case, &place, arguments.seconds)?;
                let before =
                    read(&before, name)?.with_context(|| format!("{} has no such profile", base.name))?;
                let title = format!("{case} since {}", base.name);
                let picture = folder.join(format!("{name}-diff.svg"));
                results::write_whole(&picture, &found.svg_since(&before, &title, unit)?)?;
                pictures.push(picture);
            }
        }
    }
    let list: String = pictures.iter().map(|picture| format!("{}\n", picture.display())).collect();
    super::show(&format!("\n{list}"))?;
    Ok(())
}

/// The cases to draw.
fn pick(arguments: &Arguments) -> Result<Vec<Case>> {
    let parse = |id: &str| id.parse::<Case>().ok();
    if let Some(filter) = &arguments.filter {
        let pattern = pattern(filter)?;
        let exact: Vec<Case> = parse(filter).into_iter().collect();
        let all = if exact.is_empty() { cases(Set::Quick) } else { exact };
        let mut fits: Vec<Case> = all.into_iter().filter(|c| pattern.is_match(&c.to_string())).collect();
        // Those of the last run, slowest first, before those that nobody measured.
        let measured = slowest_of_last_run();
        if let Ok(measured) = &measured {
            fits.sort_by_key(|c| measured.iter().position(|m| m == c).unwrap_or(usize::MAX));
            fits.retain(|c| {
                measured.contains(c) || !measured.iter().any(|m| pattern.is_match(&m.to_string()))
            });
        }
        fits.truncate(arguments.slowest);
        ensure!(!fits.is_empty(), "no case matches '{filter}': cargo bench -- --list shows ids");
        return Ok(fits);
    }
    let comparison = results::folder().join("comparison.json");
    let newer = |a: &Path, b: &Path| {
        let time = |p: &Path| fs::metadata(p).and_then(|m| m.modified()).ok();
        time(a) > time(b)
    };
    if newer(&comparison, &results::folder().join("run")) {
        let value: serde_json::Value = serde_json::from_str(&fs::read_to_string(&comparison)?)
            .with_context(|| format!("{} is damaged: compare again", comparison.display()))?;
        let slower: Vec<Case> = value["cases"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|c| c["verdict"] == "slower")
            .filter_map(|c| parse(c["id"].as_str()?))
            .take(arguments.slowest)
            .collect();
        if !slower.is_empty() {
            return Ok(slower);
        }
    }
    let mut all = slowest_of_last_run()?;
    all.truncate(arguments.slowest);
    ensure!(!all.is_empty(), "the last run measured nothing: run ./scripts/bench, or say which case");
    Ok(all)
}

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

/// Profiles a case in a process of its own; returns the folder of its files.
fn profile(side: &Side, case: &Case, home: &Path, seconds: u64) -> Result<PathBuf> {
    go_on()?;
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
    go_on()?;
    if !status.success() || !folder.join("flamegraph.svg").exists() {
        bail!("{case} could not be profiled: the line above says why");
    }
    Ok(folder)
}

fn read(folder: &Path, name: &str) -> Result<Option<Profile>> {
    let path = folder.join(format!("{name}.folded"));
    if !path.exists() {
        return Ok(None);
    }
    Profile::parse(&fs::read_to_string(&path)?).map(Some).with_context(|| path.display().to_string())
}
