//! Driver that both bench targets share: selects cases, checks their parity, samples them with Criterion and writes
//! records.
//!
//! The parity of all selected cases is checked before the first is timed. Records are written after every case, so
//! that a run that is killed leaves the cases it has measured.

mod ceiling;
mod criterion_files;
mod environment;
mod estimate;
mod measurement;
mod options;
mod parity;
mod processes;
mod profiler;
mod protocol;
mod ranks;
mod records;
mod sampling;
mod sampling_timer;
mod symbols;
mod timing;
mod worker;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use transformer_bench::backend::{self, Backends, Rank};
use transformer_bench::compare::worker::WrongSteps;
use transformer_bench::results::machine::{self, Machine};
use transformer_bench::results::run::{Selection, Writer};
use transformer_bench::results::{self, Record, Status};
use transformer_bench::suite::{Case, Framework, cases, custom_model};
use transformer_bench::{memory, process, text};

use ceiling::Ceiling;
use environment::Environment;
use options::Options;
use parity::ParityResults;
use records::{failure_record, fill_record, use_process_times};
use sampling::CaseRunner;

/// Runs the cases of a framework, or a worker process if the arguments ask for one.
pub fn main(framework: Framework, find: fn() -> Backends) -> ExitCode {
    match run(framework, find) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(reason) => {
            eprintln!("error: {}", text::error_line(&reason));
            ExitCode::from(2)
        }
    }
}

/// Returns the arguments of this process. Criterion and the worker read them again.
///
/// # Errors
/// Returns an error if one is not UTF-8.
fn arguments() -> Result<Vec<String>> {
    let text = |argument: OsString| {
        let refused =
            |argument: OsString| anyhow!("the argument '{}' is not UTF-8", argument.to_string_lossy());
        argument.into_string().map_err(refused)
    };
    std::env::args_os().skip(1).map(text).collect()
}

/// Returns true unless a case failed.
fn run(framework: Framework, find: fn() -> Backends) -> Result<bool> {
    let arguments = arguments()?;
    memory::retain_freed_memory()?;
    ranks::pin_to_assigned_cores();
    let notes = custom_model::from_environment(|| machine::capacity(&Machine::read()))?;
    worker::serve_if_requested(framework, find)?;
    notes.iter().for_each(|note| eprintln!("{framework}: {note}"));
    let options = Options::read(arguments.into_iter(), text::variable("TRANSFORMER_BENCH_SET")?)?;
    let criterion_home = set_criterion_home();
    let mut selected = cases(options.set);
    selected.retain(|case| case.backend.framework() == framework && options.selects(case));
    if options.list {
        selected.iter().for_each(|case| println!("{case}: benchmark"));
        return Ok(true);
    }
    if options.profile.is_some() {
        profiler::prepare_process()?;
    }
    // The rank of this process, if torchrun or mlx.launch started it.
    let rank = Rank::from_environment(framework)?;
    ranks::restrict_visible_gpu(rank)?;
    let backends = find();
    process::assert_isolated(framework)?;
    if let Some(rank) = rank.filter(|rank| rank.index > 0) {
        return ranks::run_follower(backends, rank).map(|()| true);
    }
    let backends = ranks::with_ranks(backends, rank);
    // A launched rank skips these cases, because another process would not be a rank.
    let needs_process = |case: &Case| {
        rank.is_none()
            && backend::needs_tf32_process(case)
            && !case.backend.is_cpu()
            && backends.get(case.backend).is_some()
    };
    let (tf32, others): (Vec<Case>, Vec<Case>) = selected.into_iter().partition(needs_process);
    let is_tf32_process = backend::is_tf32_process();
    let start_tf32_process = !is_tf32_process && !tf32.is_empty();
    let mut suite = Suite::new(&options, criterion_home, backends);
    let passed = suite.run(framework, if is_tf32_process { &tf32 } else { &others }, rank)?;
    ranks::shutdown_followers(&suite.environment.backends, rank);
    Ok(if start_tf32_process { run_tf32_process()? && passed } else { passed })
}

/// Runs the cases that need TF32 from the start of their process. Returns true unless a case failed.
fn run_tf32_process() -> Result<bool> {
    let status = std::process::Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(backend::TF32_VARIABLE, "1")
        .status()
        .context("the process for the tf32 cases did not start")?;
    match status.code() {
        Some(0) => Ok(true),
        Some(1) => Ok(false),
        _ => bail!("the process for the tf32 cases ended with {status}"),
    }
}

/// Returns Criterion's output folder, after making Criterion use the same.
fn set_criterion_home() -> PathBuf {
    let home = results::criterion_home();
    // SAFETY: no other thread runs yet.
    unsafe { std::env::set_var("CRITERION_HOME", &home) };
    home
}

/// Returns the estimated time for the cases that are left, as `, 2 min left`. The text is empty before the first.
fn eta(elapsed: Duration, done: usize, left: usize) -> String {
    if done == 0 || left == 0 {
        return String::new();
    }
    format!(", {} left", estimate::format(elapsed.mul_f64(left as f64 / done as f64)))
}

struct Suite<'a> {
    options: &'a Options,
    criterion_home: PathBuf,
    environment: Environment,
    runner: CaseRunner<'a>,
    parity: ParityResults,
    ceiling: Ceiling,
}

impl<'a> Suite<'a> {
    fn new(options: &'a Options, criterion_home: PathBuf, backends: Backends) -> Self {
        let mut environment = Environment::new(backends);
        if !options.test && !options.load_baseline {
            environment.measure_background_load();
        }
        let runner = CaseRunner::new(options, criterion_home.clone());
        let (parity, ceiling) = (ParityResults::new(), Ceiling::default());
        Self { options, criterion_home, environment, runner, parity, ceiling }
    }

    /// Compiles, checks and measures the cases. Returns true unless a case failed.
    fn run(&mut self, framework: Framework, selected: &[Case], rank: Option<Rank>) -> Result<bool> {
        let Environment { backends, machine } = &self.environment;
        let (options, machine) = (self.options, machine.clone());
        let mut available = selected.to_vec();
        available.retain(|case| backends.get(case.backend).is_some());
        options.check_baseline(&self.criterion_home, &available)?;
        if self.checks() && !options.test {
            let runnable = self.runnable(selected);
            let time = estimate::format(estimate::timing(&runnable, options.set, &machine));
            eprintln!(
                "{framework}: {} cases, timed in an estimated {time} after their checks",
                runnable.len()
            );
        }
        let mut writer = None;
        let (mut records, mut done) = (Vec::new(), 0);
        let mut elapsed = Duration::ZERO;
        let [ready, uncompiled] = self.groups(selected);
        for (group, is_compiled) in [(ready, true), (uncompiled, false)] {
            if !is_compiled && group.is_empty() {
                continue;
            }
            self.prepare(framework, &group, is_compiled, rank)?;
            if writer.is_none() && !options.test && options.profile.is_none() && !options.load_baseline {
                let selection =
                    Selection { set: options.set.to_string(), filter: options.filter.to_string() };
                let (folder, tf32) = (results::folder(), backend::is_tf32_process());
                let machine = machine.clone();
                writer = Some(Writer::begin(&folder, framework, tf32, selection, selected, machine)?);
            }
            let started = Instant::now();
            for case in &group {
                let (position, left) = (records.len() + 1, available.len() - done);
                let eta = eta(elapsed + started.elapsed(), done, left);
                records.extend(self.measure(case, &format!("[{position}/{}{eta}]", selected.len())));
                done += usize::from(available.contains(case));
                if let Some(writer) = &mut writer {
                    writer.save(&records)?;
                }
            }
            elapsed += started.elapsed();
        }
        symbols::remove_jit_map();
        self.runner.final_summary();
        if options.test {
            print_test_summary(framework, &records);
        }
        Ok(!records.iter().any(|r| matches!(r.status, Status::Error | Status::ParityFailed)))
    }

    /// Returns true if cases are checked. Cases that are only profiled or reported again need no check.
    fn checks(&self) -> bool {
        self.options.profile.is_none() && !self.options.load_baseline
    }

    fn runnable(&self, cases: &[Case]) -> Vec<Case> {
        cases.iter().copied().filter(|case| self.environment.backend_for(case).is_ok()).collect()
    }

    /// Returns the cases that are ready, and those to compile, which are measured later. Compiling a deep model takes
    /// minutes.
    fn groups(&self, selected: &[Case]) -> [Vec<Case>; 2] {
        let needs_compile =
            |case: &Case| self.environment.backend_for(case).is_ok_and(|b| b.needs_compile(case));
        let (uncompiled, ready) = selected.iter().partition(|case| needs_compile(case));
        [ready, uncompiled]
    }

    /// Checks cases, after compiling them if they are not compiled.
    fn prepare(
        &mut self,
        framework: Framework,
        cases: &[Case],
        is_compiled: bool,
        rank: Option<Rank>,
    ) -> Result<()> {
        if !self.checks() {
            return Ok(());
        }
        let mut runnable = self.runnable(cases);
        let failed = if is_compiled { ParityResults::new() } else { self.compile_cases(&runnable) };
        runnable.retain(|case| !failed.contains_key(case));
        self.parity.extend(match rank {
            // A subprocess would not be a rank.
            Some(_) => parity::check_in_process(&self.environment.backends, &runnable),
            None => parity::check_in_subprocess(framework, &runnable)?,
        });
        parity::refuse_after_failed_f32(&mut self.parity);
        self.parity.extend(failed);
        Ok(())
    }

    /// Compiles cases. Returns those that failed, with the reason.
    fn compile_cases(&self, cases: &[Case]) -> ParityResults {
        let mut failed = ParityResults::new();
        for backend in &self.environment.backends.available {
            let cases: Vec<Case> =
                cases.iter().copied().filter(|case| case.backend == backend.id()).collect();
            if cases.is_empty() {
                continue;
            }
            let count = cases.len();
            eprintln!("{}: compiling {count} cases, which takes minutes and is cached", backend.id());
            backend.compile(&cases, &mut |case, outcome| match outcome {
                Ok(time) => eprintln!("{case}: compiled after {:.0} s", time.as_secs_f64()),
                Err(error) => {
                    let reason = format!("compilation failed: {error:#}");
                    eprintln!("{case}: {reason}");
                    failed.insert(*case, Err((Status::Error, reason)));
                }
            });
        }
        failed
    }

    /// Measures a case. Returns `None` if it was only profiled or reported again.
    fn measure(&mut self, case: &Case, label: &str) -> Option<Record> {
        let unmeasured = |status, reason| {
            let record = Record::unmeasured(case, status, reason);
            report_status(&record, label, self.options.test);
            Some(record)
        };
        let backend = match self.environment.backend_for(case) {
            Ok(backend) => backend,
            Err(reason) => return unmeasured(Status::Skipped, reason),
        };
        let parity = match self.parity.get(case) {
            Some(Err((status, reason))) => return unmeasured(*status, reason.clone()),
            Some(Ok(share)) => Some(*share),
            None => None,
        };
        let measured = self.runner.run(backend, case, label);
        let mut record = measured.unwrap_or_else(|error| Some(failure_record(case, &error)))?;
        record.parity = parity;
        if record.status == Status::Measured && !self.options.test {
            record = self.complete(case, record, label).unwrap_or_else(|error| failure_record(case, &error));
        }
        if record.status == Status::Error && !self.options.test {
            // No comparison may use the samples of a failed case.
            let _ =
                std::fs::remove_dir_all(results::criterion_folder(&self.criterion_home, case).join("new"));
        }
        report_status(&record, label, self.options.test);
        Some(record)
    }

    /// Adds the times of a measured case to its record and checks that they are possible.
    ///
    /// # Errors
    /// Returns an error if a process fails, if a file of Criterion is missing, or if the time is impossible.
    fn complete(&mut self, case: &Case, mut record: Record, label: &str) -> Result<Record> {
        record = fill_record(&self.criterion_home, case, record)?;
        record.gpu_busy_share = processes::gpu_busy_share(case, &record);
        if processes::depends_on_process(case, &record) {
            eprintln!("{label} {case}: {} fresh processes", processes::PROCESSES);
            match processes::time(&processes::own_side(case)?, case) {
                Ok(times) => use_process_times(&mut record, case, times),
                Err(error) if error.is::<WrongSteps>() => return Err(error),
                // Memory that this process holds can be missing in another.
                Err(error) => eprintln!("{label} {case}: timed in one process only: {error:#}"),
            }
        }
        let backend = self.environment.backend_for(case).map_err(|reason| anyhow!(reason))?;
        self.ceiling.check(case, &record, backend, &self.environment.machine)?;
        Ok(record)
    }
}

/// Prints how many cases passed, for `cargo bench -- --test`.
fn print_test_summary(framework: Framework, records: &[Record]) {
    let count = |status| records.iter().filter(|r| r.status == status).count();
    println!(
        "{framework}: {} passed, {} failed, {} skipped",
        count(Status::Measured),
        count(Status::Error) + count(Status::ParityFailed) + count(Status::TooSlow),
        count(Status::Skipped)
    );
}

/// Prints the status of a case that Criterion does not report.
fn report_status(record: &Record, label: &str, test: bool) {
    let (id, reason) = (&record.id, &record.reason);
    match record.status {
        Status::Measured => {}
        Status::Skipped if test => println!("{id} skipped: {reason}"),
        Status::Skipped => eprintln!("{label} {id} skipped: {reason}"),
        Status::TooSlow => eprintln!("{label} {id} not measured: {reason}"),
        Status::ParityFailed => eprintln!("{label} {id} failed its parity check: {reason}"),
        Status::Error => eprintln!("{label} {id} failed: {reason}"),
    }
}
