//! `--worker [ID]`: a process that times steps on request, so that another program can interleave them with the steps
//! of other processes. Each request and each answer is one line:
//!
//! | request | answer |
//! | --- | --- |
//! | `cases SET FILTER` | the ids of the cases in the set that match the regular expression and can run here, separated by spaces |
//! | `machine` | the machine and the versions, as JSON |
//! | `case ID` | `ready` once the case is loaded and has done a step, with the nanoseconds of this step |
//! | `prove ID` | the parity check at the case's shape: `now SHARE` if it passed, `before SHARE` if it passed in an earlier process, `wrong REASON` if it failed. SHARE is the largest error as a share of its tolerance |
//! | `outputs ID FILE` | `written` once the inputs, parameters and results of the first parity step are in FILE |
//! | `describe ID` | the case as JSON, from which a program in another language builds the same step |
//! | `start ID` | the nanoseconds in which the case is made, is loaded, and does its first and its second step. What is in a cache is not made |
//! | `operation NAME/PASS ID` | `ready SHARE` once a pass of an operation of a training step is loaded and agrees with the reference. A number then times it, and `verify` checks the last results |
//! | `energy SECONDS` | the energy of steps of the loaded case, and the idle power before them, as JSON |
//! | `work ROUNDS` | the nanoseconds that ROUNDS of unrelated arithmetic take |
//! | `gpu-busy N` | the share of N steps in which an NVIDIA GPU is busy |
//! | `memory` | the peak bytes of the framework's allocator on a GPU, and of the process, or `-` |
//! | `verify` | `verified` if a step with other inputs has other results. Later steps use these inputs |
//! | a number N | nanoseconds of N steps of the loaded case: wall time, CPU time, and time that runnable threads waited for a CPU |
//!
//! A request that fails is answered with `failed: REASON`. With an ID, the worker starts as if by `case ID`, and exits
//! if that fails.

use std::convert::Infallible;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use transformer_bench::backend::{
    Backend, Backends, LoadedCase, TF32_VARIABLE, is_tf32_process, needs_tf32_process,
};
use transformer_bench::energy::Counter;
use transformer_bench::fixture::{Fixture, Tensor};
use transformer_bench::interference::{cpu_time, scheduler_delay_ns};
use transformer_bench::parity::cache::PassedChecks;
use transformer_bench::parity::idle_steps::{IdleCase, IdleStep};
use transformer_bench::parity::operations::CheckedOperation;
use transformer_bench::parity::{ParityChecker, timed_work};
use transformer_bench::profile::gpu;
use transformer_bench::results::energy::StepEnergy;
use transformer_bench::results::{self, one_line, upgrade};
use transformer_bench::suite::operations::{check_separable, operation_passes};
use transformer_bench::suite::{Case, Framework, cases, parse_filter};
use transformer_bench::{memory, process};

use super::environment::{describe_machine, find_backend};
use super::protocol::{send_line, serve_requests, write_tensors};
use super::ranks::{self, rank_worker};

/// Slows steps down, to verify that comparisons find it: `ID=ROUNDS` of [`burn_cpu`] per step, separated by `;`. The id of
/// an operation is `BACKEND/NAME/PASS`.
const EXTRA_WORK: &str = "TRANSFORMER_BENCH_EXTRA_WORK";

/// Makes the steps of a case stop computing, to verify that comparisons find it: the id of the case.
const IDLE_CASE: &str = "TRANSFORMER_BENCH_IDLE_CASE";

/// Duration from which steps are followed by a wait for the threads of this process. Waits after shorter ones would
/// take longer than the steps.
const LONG_STEPS: Duration = Duration::from_millis(10);

/// Time for which an operation runs before it is timed. The scheduler can leave the threads of OpenMP on one core for that
/// long after they have slept: on two cores, norms took 30 times as long, and products 4 times.
const OPERATION_WARM_UP: Duration = Duration::from_millis(20);

/// Time over which idle power is measured.
const IDLE_TIME: Duration = Duration::from_secs(3);

const NO_CASE: &str = "no case is loaded: send 'case ID' first";

struct Worker<'a> {
    backends: &'a Backends,
    framework: Framework,
    loaded: Option<(Case, Box<dyn LoadedCase>)>,
    /// The loaded operation, or `None` while a case is loaded.
    operation: Option<CheckedOperation>,
    /// Rounds of extra work per step of the loaded case or operation.
    extra_rounds: u64,
    checker: ParityChecker,
    passed: Option<PassedChecks>,
}

/// Serves requests until the end of the input if the arguments contain `--worker`, and returns otherwise.
///
/// # Errors
/// Returns an error if the worker can't start or can't load its first case.
pub fn serve_if_requested(framework: Framework, find: fn() -> Backends) -> Result<()> {
    let mut arguments = std::env::args().skip_while(|argument| argument != "--worker");
    if arguments.next().is_none() {
        return Ok(());
    }
    memory::limit_allocations()?;
    let first = arguments.next();
    if first.as_deref().and_then(|id| id.parse().ok()).is_some_and(|case| needs_tf32_process(&case)) {
        // SAFETY: no other thread runs yet.
        unsafe { std::env::set_var(TF32_VARIABLE, "1") };
    }
    let backends = find();
    process::assert_isolated(framework)?;
    match std::env::var(ranks::RANK_BACKEND) {
        Ok(id) => match rank_worker::serve(backends, &id)? {},
        Err(_) => match serve(&ranks::with_ranks(backends, None), framework, first)? {},
    }
}

fn serve(backends: &Backends, framework: Framework, first: Option<String>) -> Result<Infallible> {
    let mut worker = Worker {
        backends,
        framework,
        loaded: None,
        operation: None,
        extra_rounds: 0,
        checker: ParityChecker::default(),
        passed: None,
    };
    if let Some(id) = first {
        worker.load(&id)?;
        send_line("ready")?;
    }
    serve_requests(|line| worker.answer(line))
}

impl<'a> Worker<'a> {
    fn answer(&mut self, line: &str) -> Result<String> {
        if let Ok(steps) = line.parse() {
            return self.time(steps);
        }
        match line.split_once(' ').unwrap_or((line, "")) {
            ("case", id) => Ok(format!("ready {}", self.load(id)?.as_nanos())),
            ("energy", seconds) => self.energy(seconds),
            ("start", id) => self.start(id),
            ("operation", rest) => {
                let (name, id) = rest.split_once(' ').context("usage: operation NAME/PASS ID")?;
                Ok(format!("ready {}", self.load_operation(name, id)?))
            }
            ("cases", rest) => {
                let (set, filter) = rest.split_once(' ').unwrap_or((rest, ""));
                self.cases(set, filter)
            }
            ("gpu-busy", steps) => self.gpu_busy_share(steps),
            ("memory", "") => self.peak_memory(),
            ("verify", "") => self.verify().map(|()| "verified".to_owned()),
            ("prove", id) => self.check_parity(id),
            ("outputs", rest) => {
                let (id, file) = rest.split_once(' ').context("usage: outputs ID FILE")?;
                self.write_outputs(id, Path::new(file)).map(|()| "written".to_owned())
            }
            ("describe", id) => {
                let description = id.parse::<Case>().map_err(anyhow::Error::msg)?.description();
                if description.is_null() {
                    bail!("{id} can't be described: it has no model, or several ranks or micro-batches");
                }
                Ok(description.to_string())
            }
            ("work", rounds) => {
                let rounds = rounds.parse().with_context(|| format!("'{rounds}' is not a number"))?;
                let start = Instant::now();
                burn_cpu(rounds);
                Ok(start.elapsed().as_nanos().to_string())
            }
            ("version", "") => Ok(upgrade::VERSION.to_string()),
            ("machine", "") => Ok(serde_json::to_string(&describe_machine(self.backends))?),
            _ => bail!("'{line}' is not a request"),
        }
    }

    fn cases(&self, set: &str, filter: &str) -> Result<String> {
        let set = set.parse().map_err(anyhow::Error::msg)?;
        let filter = parse_filter(filter)?;
        let can_run = |case: &Case| {
            case.backend.framework() == self.framework
                && filter.is_match(&case.to_string())
                && needs_tf32_process(case) == is_tf32_process()
                && find_backend(self.backends, case).is_ok()
        };
        let ids: Vec<String> = cases(set).into_iter().filter(can_run).map(|c| c.to_string()).collect();
        Ok(ids.join(" "))
    }

    /// Checks the parity of a case, unless the same executable has passed the check on this machine.
    fn check_parity(&mut self, id: &str) -> Result<String> {
        self.loaded = None;
        let (case, backend) = self.find(id)?;
        let passed = match &self.passed {
            Some(passed) => passed,
            // Opened before the first case runs, because a framework may load more libraries later.
            None => {
                let machine = describe_machine(self.backends);
                self.passed.insert(PassedChecks::open(&results::folder(), &machine.fingerprint())?)
            }
        };
        if let Some(share) = passed.get(&case) {
            return Ok(format!("before {share}"));
        }
        match self.checker.check_case(backend, case)? {
            Ok(share) => {
                passed.add(&case, share)?;
                Ok(format!("now {share}"))
            }
            Err(mismatch) => Ok(format!("wrong {}", one_line(&mismatch.to_string()))),
        }
    }

    /// Writes the inputs, parameters and results of a case, for comparison with other programs.
    fn write_outputs(&mut self, id: &str, file: &Path) -> Result<()> {
        self.loaded = None;
        let (case, backend) = self.find(id)?;
        let fixture = Fixture::for_parity(case);
        let mut loaded = backend.load(&fixture)?;
        loaded.step()?;
        let with_prefix = |prefix: &'static str, tensors: &[Tensor]| -> Vec<Tensor> {
            tensors.iter().map(|t| Tensor { name: format!("{prefix}/{}", t.name), ..t.clone() }).collect()
        };
        let mut tensors = with_prefix("input", fixture.inputs());
        tensors.extend(with_prefix("parameter", fixture.parameters()));
        tensors.extend(loaded.outputs()?);
        write_tensors(file, &tensors)
    }

    fn find(&self, id: &str) -> Result<(Case, &'a dyn Backend)> {
        let case: Case = id.parse().map_err(anyhow::Error::msg)?;
        let backend = find_backend(self.backends, &case);
        Ok((case, backend.map_err(anyhow::Error::msg).with_context(|| case.to_string())?))
    }

    /// Loads a pass of an operation and compares its results with the reference. Returns the largest error / tolerance.
    fn load_operation(&mut self, name: &str, id: &str) -> Result<f64> {
        self.loaded = None;
        self.operation = None;
        let (case, backend) = self.find(id)?;
        check_separable(&case).map_err(anyhow::Error::msg)?;
        let found = operation_passes(&case).into_iter().find(|part| part.to_string() == name);
        let part = found.with_context(|| format!("{case} has no operation {name}"))?;
        self.extra_rounds = extra_work(&format!("{}/{name}", case.backend))?.unwrap_or(0);
        let share = self.operation.insert(CheckedOperation::load(backend, case, part)?).share;
        process::wait_until_idle();
        Ok(share)
    }

    /// Loads a case and runs a step. Returns the time of the step.
    fn load(&mut self, id: &str) -> Result<Duration> {
        // Freed first, because two cases may not fit into memory.
        self.loaded = None;
        self.operation = None;
        let (case, backend) = self.find(id)?;
        backend.reset_peak_memory()?;
        let mut loaded = backend.load(&Fixture::new(case))?;
        let first = loaded.time(1)?;
        process::wait_until_idle();
        if std::env::var(IDLE_CASE).is_ok_and(|idle| idle == id) {
            loaded = Box::new(IdleCase::new(loaded, IdleStep::FromTheFourth));
        }
        self.extra_rounds = extra_work(id)?.unwrap_or(0);
        self.loaded = Some((case, loaded));
        Ok(first)
    }

    /// Makes and loads a case, and runs two steps. Returns the nanoseconds of each part.
    fn start(&mut self, id: &str) -> Result<String> {
        self.loaded = None;
        self.operation = None;
        let (case, backend) = self.find(id)?;
        let fixture = Fixture::new(case);
        // A training program has its data and parameters anyway.
        let _ = (fixture.inputs(), fixture.parameters());
        let begin = Instant::now();
        backend.make(&fixture)?;
        let made = begin.elapsed();
        let mut loaded = backend.load(&fixture)?;
        let times = [made, begin.elapsed() - made, loaded.time(1)?, loaded.time(1)?];
        process::wait_until_idle();
        self.extra_rounds = extra_work(id)?.unwrap_or(0);
        self.loaded = Some((case, loaded));
        Ok(times.map(|time| time.as_nanos().to_string()).join(" "))
    }

    /// Returns the share of the steps in which an NVIDIA GPU is busy.
    fn gpu_busy_share(&mut self, steps: &str) -> Result<String> {
        let steps = steps.parse().with_context(|| format!("'{steps}' is not a number"))?;
        let (_, loaded) = self.loaded.as_mut().context(NO_CASE)?;
        let trace = gpu::record(steps, || loaded.step())?;
        Ok((1.0 - trace.idle_share()).to_string())
    }

    /// Returns the peak memory since the loaded case was loaded.
    fn peak_memory(&self) -> Result<String> {
        let (case, _) = self.loaded.as_ref().context(NO_CASE)?;
        let backend = find_backend(self.backends, case).map_err(anyhow::Error::msg)?;
        let allocator = backend.peak_memory().filter(|_| !case.backend.is_cpu());
        let text = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), |bytes| bytes.to_string());
        Ok(format!("{} {}", text(allocator), text(memory::resident_peak_bytes())))
    }

    /// Measures the idle power, then the energy of steps for at least some seconds.
    fn energy(&mut self, seconds: &str) -> Result<String> {
        let seconds: u64 = seconds.parse().with_context(|| format!("'{seconds}' is not a number"))?;
        let (case, loaded) = self.loaded.as_mut().context(NO_CASE)?;
        let mut counter = Counter::open(case.backend.device())?;
        let (before, start) = (counter.joules()?, Instant::now());
        std::thread::sleep(IDLE_TIME);
        let idle_watts = (counter.joules()? - before) / start.elapsed().as_secs_f64();
        loaded.time(1)?;
        let (before, start, mut steps) = (counter.joules()?, Instant::now(), 0);
        while start.elapsed() < Duration::from_secs(seconds) {
            loaded.time(1)?;
            steps += 1;
        }
        let (joules, seconds) = (counter.joules()? - before, start.elapsed().as_secs_f64());
        let (scope, limit_watts) = (counter.scope, counter.limit_watts);
        let energy = StepEnergy { scope, joules, seconds, steps, idle_watts, limit_watts };
        counter.check(energy.watts())?;
        Ok(serde_json::to_string(&energy)?)
    }

    /// Verifies that the steps of the loaded case still do their work.
    fn verify(&mut self) -> Result<()> {
        if let Some(operation) = &mut self.operation {
            return operation.check();
        }
        let (case, loaded) = self.loaded.as_mut().context(NO_CASE)?;
        timed_work::verify_progress(loaded.as_mut(), *case)
    }

    fn time(&mut self, steps: u64) -> Result<String> {
        let (delay_before, cpu_before) = (scheduler_delay_ns(), cpu_time());
        let mut wall = match (&mut self.operation, &mut self.loaded) {
            (Some(operation), _) => {
                let start = Instant::now();
                while start.elapsed() < OPERATION_WARM_UP {
                    operation.loaded.time(1)?;
                }
                operation.loaded.time(steps)?
            }
            (None, Some((_, loaded))) => loaded.time(steps)?,
            (None, None) => bail!(NO_CASE),
        };
        if self.extra_rounds > 0 {
            let start = Instant::now();
            burn_cpu(self.extra_rounds * steps);
            wall += start.elapsed();
        }
        let cpu = cpu_time() - cpu_before;
        let delay = scheduler_delay_ns().saturating_sub(delay_before);
        // The other process of an operation is sampled next, on the same cores.
        if wall > LONG_STEPS || self.operation.is_some() {
            process::wait_until_idle();
        }
        Ok(format!("{} {} {delay}", wall.as_nanos(), cpu.as_nanos()))
    }
}

/// Does arithmetic in a chain of dependencies that no compiler can shorten.
fn burn_cpu(rounds: u64) {
    let mut x = 1.0f64;
    for i in 0..rounds {
        x = std::hint::black_box(x * 0.999_999 + i as f64 * 1e-9);
    }
    std::hint::black_box(x);
}

/// Returns the rounds of extra work that the environment sets for a case.
fn extra_work(id: &str) -> Result<Option<u64>> {
    let Ok(text) = std::env::var(EXTRA_WORK) else { return Ok(None) };
    for entry in text.split(';').filter(|e| !e.is_empty()) {
        let (name, rounds) =
            entry.split_once('=').with_context(|| format!("{EXTRA_WORK}: '{entry}' is not ID=ROUNDS"))?;
        if name == id {
            let error = || format!("{EXTRA_WORK}: '{rounds}' is not a number");
            return rounds.parse().map(Some).with_context(error);
        }
    }
    Ok(None)
}
