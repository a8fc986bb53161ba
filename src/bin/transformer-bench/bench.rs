//! `scripts/bench`: measures this machine and prints the report.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use transformer_bench::compare::revisions;
use transformer_bench::compare::signals::check_interrupted;
use transformer_bench::compare::worker::Side;
use transformer_bench::installation;
use transformer_bench::results;
use transformer_bench::suite::{Case, Framework, Set, custom_model};
use transformer_bench::text::error_line;

use super::model_options::ModelOptions;
use super::options::Executables;
use super::process_group::ProcessGroup;
use super::{interleave, list, report};

/// Time limit of the interleaved rounds after the run.
const INTERLEAVE_LIMIT: Duration = Duration::from_secs(110);

/// Measures this machine with both frameworks and prints the report.
///
/// Each framework runs in its own process. Each case is checked against a reference before it is timed.
/// Interleaved rounds of the fastest training steps follow.
///
/// Exit codes: 0 all measured, 1 a case failed, 2 wrong input, 130 interrupted.
#[derive(Args)]
#[command(after_help = "Examples:
  scripts/bench
  scripts/bench 'train-step/.*/f32/'
  scripts/bench --full 'attention/torch-cpu/'
  scripts/bench --model src/model/indicator.toml --batch 4 'train-step/.*/f32/'
  scripts/bench --torch 2.11.0 && scripts/baseline save torch-2.11")]
pub struct Arguments {
    /// Measure the cases of the headline tables (default); about 5 minutes on a CPU, and 8 to 25 on a Mac (estimated)
    #[arg(long, overrides_with = "full")]
    quick: bool,
    /// Measure every case of the suite
    #[arg(long)]
    full: bool,
    #[command(flatten)]
    pub model: ModelOptions,
    /// Regular expression over ids (workload/backend/precision/shape); a filtered run adds to the last run of the
    /// same build
    filter: Option<String>,
    #[command(flatten)]
    executables: Executables,
}

impl Arguments {
    fn set(&self) -> Set {
        if self.full { Set::Full } else { Set::Quick }
    }

    /// Returns the cases to measure.
    ///
    /// # Errors
    /// Returns an error if the filter is not a regular expression or matches no case.
    pub fn selected(&self) -> Result<Vec<Case>> {
        list::select(self.set(), self.filter.as_deref().unwrap_or_default(), None)
    }
}

/// Runs the benchmarks, the interleaved rounds and the report. Returns the exit code.
///
/// # Errors
/// Returns an error if nothing could be measured, or if the user interrupts.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let (set, filter) = (arguments.set(), arguments.filter.as_deref());
    // A wrong filter must change nothing.
    let selected = arguments.selected()?;
    let folder = results::folder();
    let _lock = lock(&folder)?;
    let group = ProcessGroup::start()?;
    let side = build(&arguments.executables, &group)?;
    ensure!(
        selected.iter().any(|case| side.executables.contains_key(&case.backend.framework())),
        "{} has no executable for these cases{}",
        side.name,
        installation::find()
            .map_or_else(String::new, |own| format!(": {}", own.install_command(Framework::ALL)))
    );
    // A filtered run adds to the last run.
    if filter.is_none() {
        results::remove_last_run(&folder)?;
    }
    let mut code = u8::from(!measure(arguments, &side, set, &group)?);
    if !folder.join("run").exists() {
        return Ok(code);
    }
    // A failure of either step does not affect the run.
    let mut finish = |name: &str, result: Result<()>| -> Result<()> {
        check_interrupted()?;
        if let Err(reason) = result {
            eprintln!("bench: {name}: {}", error_line(&reason));
            code = 2;
        }
        Ok(())
    };
    let rounds = interleave::measure(&side, INTERLEAVE_LIMIT);
    let wrong_steps = matches!(rounds, Ok(false));
    finish("interleaved rounds", rounds.map(drop))?;
    finish("report", super::show("\n").and_then(|()| report::last_run(&folder)))?;
    Ok(code.max(u8::from(wrong_steps)))
}

/// Locks the results for this process. The system releases the lock when the process ends.
fn lock(folder: &Path) -> Result<File> {
    let path = folder.join("run.lock");
    let open = || -> std::io::Result<File> {
        fs::create_dir_all(folder)?;
        File::options().read(true).write(true).create(true).truncate(false).open(&path)
    };
    let mut file = open().with_context(|| format!("{} could not be opened", path.display()))?;
    if file.try_lock().is_err() {
        let mut process = String::new();
        file.read_to_string(&mut process)?;
        bail!("another run (process {}) writes to {}: wait for its end", process.trim(), folder.display());
    }
    file.set_len(0)?;
    writeln!(file, "{}", std::process::id())?;
    Ok(file)
}

/// Builds the executables. Cargo's progress is visible, since the first build takes minutes.
fn build(executables: &Executables, group: &ProcessGroup) -> Result<Side> {
    if executables.are_of_worktree() && installation::find().is_none() {
        let mut command = Command::new("cargo");
        command.args(["bench", "--no-run", "--locked", "--bench", "torch", "--bench", "mlx"]);
        let status = group.run(command.current_dir(revisions::root()))?;
        ensure!(status.success(), "the benchmarks could not be built: see the errors above");
    }
    executables.build()
}

/// Runs the executable of each framework. Returns true if no case failed.
fn measure(arguments: &Arguments, side: &Side, set: Set, group: &ProcessGroup) -> Result<bool> {
    let mut passed = true;
    for (framework, executable) in &side.executables {
        let mut command = Command::new(executable);
        command.arg("--bench").args(&arguments.filter).env("TRANSFORMER_BENCH_SET", set.id());
        // A copied executable cannot derive these folders from its own path.
        command.env("TRANSFORMER_BENCH_RESULTS", results::folder());
        command.env("CRITERION_HOME", results::criterion_home());
        // Without these, the executable chooses the sizes again and prints the reason.
        if arguments.model.batch.is_none() {
            command.env_remove(custom_model::BATCH_VARIABLE);
        }
        if arguments.model.tokens.is_none() {
            command.env_remove(custom_model::TOKENS_VARIABLE);
        }
        let ended = group.run(&mut command);
        check_interrupted()?;
        match ended {
            Ok(status) if status.success() => continue,
            Ok(status) => eprintln!("bench: {framework} ended with {status}"),
            Err(reason) => eprintln!("bench: {framework}: {reason:#}"),
        }
        passed = false;
    }
    Ok(passed)
}
