//! `--worker [ID]`: times steps on request, so that another program can interleave them
//! with those of another process. It reads a line and answers with one:
//!
//! | line | answer |
//! | --- | --- |
//! | `cases SET FILTER` | the ids of the set that can run here and that the regular expression matches, joined by spaces |
//! | `machine` | the machine and the versions, as JSON |
//! | `case ID` | `ready` once the case has been prepared and has done a step, or `failed: ` and why |
//! | `prove ID` | `now SHARE` or `before SHARE` where parity holds at the case's shape, proven now or remembered: how much of the allowed error it took; `wrong`, and what is |
//! | `outputs ID FILE` | `written` once the inputs, parameters and results of the case's first parity step are in the file: a line of JSON (names and dims), then their f32 values |
//! | `describe ID` | the case as JSON, from which a program in another language builds the same step |
//! | `work ROUNDS` | the nanoseconds that so many rounds of thrown-away arithmetic take |
//! | a number | the nanoseconds that so many steps of the case took, those that this process had a CPU meanwhile, and those that its threads were ready and had none, or `failed: ` and why |
//!
//! With an ID it starts as after `case ID`, and ends where that fails.

use std::convert::Infallible;
use std::io::{BufRead, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use transformer_bench::backend::{
    Backend, Backends, LoadedCase, TF32_PROCESS, is_tf32_process, needs_tf32_process,
};
use transformer_bench::interference::{cpu_time, scheduler_delay_ns};
use transformer_bench::model::fixture::{Fixture, Tensor};
use transformer_bench::parity::ParityChecker;
use transformer_bench::parity::cache::PassedChecks;
use transformer_bench::results::{self, machine, one_line};
use transformer_bench::suite::{Case, Framework, cases, parse_filter};

use super::ranks::{self, rank_worker};

/// Makes steps slower by arithmetic that is thrown away, for proving that comparisons
/// find what they should: `ID=ROUNDS` for each case, joined by `;`.
const EXTRA: &str = "TRANSFORMER_BENCH_EXTRA_WORK";

/// The case of a worker's first line; None where this is no worker.
pub fn requested(arguments: impl Iterator<Item = String>) -> Option<Option<String>> {
    let mut arguments = arguments.skip_while(|a| a != "--worker");
    arguments.next().map(|_| arguments.next())
}

struct Worker<'a> {
    found: &'a Backends,
    framework: Framework,
    current: Option<Box<dyn LoadedCase>>,
    prover: ParityChecker,
    proofs: Option<PassedChecks>,
}

/// Becomes a worker.
pub fn start(framework: Framework, find: fn() -> Backends, first: Option<String>) -> Result<Infallible> {
    let case = first.as_deref().and_then(|id| id.parse().ok());
    if case.is_some_and(|case| needs_tf32_process(&case)) {
        // SAFETY: no other thread runs yet.
        unsafe { std::env::set_var(TF32_PROCESS, "1") };
    }
    let found = find();
    machine::assert_isolated(framework)?;
    if let Ok(id) = std::env::var(ranks::RANK_OF) {
        return rank_worker::serve(found, &id);
    }
    let found = ranks::shared(found, None);
    serve(&found, framework, first)
}

/// Answers until its input ends, and ends the process then.
fn serve(found: &Backends, framework: Framework, first: Option<String>) -> Result<Infallible> {
    let mut worker =
        Worker { found, framework, current: None, prover: ParityChecker::default(), proofs: None };
    if let Some(id) = first {
        worker.load(&id)?;
        say("ready")?;
    }
    until_end(|line| worker.answer(line))
}

/// Answers line by line until the input ends, and ends the process then.
pub fn until_end(mut answer: impl FnMut(&str) -> Result<String>) -> Result<Infallible> {
    for line in std::io::stdin().lock().lines() {
        match answer(line?.trim()) {
            Ok(text) => say(&text)?,
            Err(error) => say(&format!("failed: {}", one_line(&format!("{error:#}"))))?,
        }
    }
    // PyTorch's own end takes a tenth of a second on a core that others wait for, and a rank's may
    // wait for ranks that have ended.
    // SAFETY: nothing that runs at exit is needed: every answer was flushed.
    unsafe { libc::_exit(0) }
}

pub fn say(line: &str) -> Result<()> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{line}")?;
    Ok(output.flush()?)
}

impl<'a> Worker<'a> {
    fn answer(&mut self, line: &str) -> Result<String> {
        if let Ok(steps) = line.parse() {
            let (delayed, before) = (scheduler_delay_ns(), cpu_time());
            let wall = self.time(steps)?;
            let cpu = cpu_time() - before;
            let delayed = scheduler_delay_ns().saturating_sub(delayed);
            return Ok(format!("{} {} {delayed}", wall.as_nanos(), cpu.as_nanos()));
        }
        match line.split_once(' ').unwrap_or((line, "")) {
            ("case", id) => self.load(id).map(|()| "ready".to_owned()),
            ("cases", rest) => {
                let (set, filter) = rest.split_once(' ').unwrap_or((rest, ""));
                self.cases(set, filter)
            }
            ("prove", id) => self.prove(id),
            ("outputs", rest) => {
                let (id, file) = rest.split_once(' ').context("outputs ID FILE")?;
                self.outputs(id, Path::new(file)).map(|()| "written".to_owned())
            }
            ("describe", id) => {
                let described = id.parse::<Case>().map_err(anyhow::Error::msg)?.description();
                if described.is_null() {
                    bail!("{id} is no model's, or of several devices");
                }
                Ok(described.to_string())
            }
            ("work", rounds) => {
                let rounds = rounds.parse().with_context(|| format!("'{rounds}' is no number"))?;
                let start = Instant::now();
                work(rounds);
                Ok(start.elapsed().as_nanos().to_string())
            }
            ("machine", "") => Ok(serde_json::to_string(&super::machine_of(self.found))?),
            _ => bail!("'{line}' is no request"),
        }
    }

    fn cases(&self, set: &str, filter: &str) -> Result<String> {
        let set = set.parse().map_err(anyhow::Error::msg)?;
        let filter = parse_filter(filter)?;
        let runs = |case: &Case| {
            case.backend.framework() == self.framework
                && filter.is_match(&case.to_string())
                && needs_tf32_process(case) == is_tf32_process()
                && self.found.get(case.backend).is_some_and(|b| b.supports(case).is_ok())
        };
        let ids: Vec<String> = cases(set).into_iter().filter(runs).map(|c| c.to_string()).collect();
        Ok(ids.join(" "))
    }

    /// Proves a case, unless this executable has on this machine.
    fn prove(&mut self, id: &str) -> Result<String> {
        self.current = None;
        let (case, backend) = self.runnable(id)?;
        let proofs = match &self.proofs {
            Some(proofs) => proofs,
            // Before the first case runs: engines load more libraries then.
            None => {
                let machine = super::machine_of(self.found);
                self.proofs.insert(PassedChecks::open(&results::folder(), &machine)?)
            }
        };
        if let Some(share) = proofs.get(&case) {
            return Ok(format!("before {share}"));
        }
        match self.prover.check_case(backend, case)? {
            Ok(share) => {
                proofs.add(&case, share)?;
                Ok(format!("now {share}"))
            }
            Err(mismatch) => Ok(format!("wrong {}", one_line(&mismatch.to_string()))),
        }
    }

    /// Writes what a case reads and puts out, for programs that hold it against others.
    fn outputs(&mut self, id: &str, file: &Path) -> Result<()> {
        self.current = None;
        let (case, backend) = self.runnable(id)?;
        let fixture = Fixture::for_parity(case);
        let mut prepared = backend.load(&fixture)?;
        prepared.step()?;
        let named = |kind: &str, tensors: &[Tensor]| -> Vec<Tensor> {
            tensors.iter().map(|t| Tensor { name: format!("{kind}/{}", t.name), ..t.clone() }).collect()
        };
        let mut all = named("input", fixture.inputs());
        all.extend(named("parameter", fixture.parameters()));
        all.extend(prepared.outputs()?);
        ranks::write_tensors(file, &all)
    }

    /// A case that runs here, and its backend.
    fn runnable(&self, id: &str) -> Result<(Case, &'a dyn Backend)> {
        let case: Case = id.parse().map_err(anyhow::Error::msg)?;
        let Some(backend) = self.found.get(case.backend) else {
            let reason =
                self.found.unavailable.iter().find(|a| a.id == case.backend).map(|a| a.reason.as_str());
            bail!("{}: {}", case.backend, reason.unwrap_or("not a backend of this executable"));
        };
        if let Err(reason) = backend.supports(&case) {
            bail!("{case}: {reason}");
        }
        Ok((case, backend))
    }

    fn load(&mut self, id: &str) -> Result<()> {
        // Freed first: two cases may not fit side by side.
        self.current = None;
        let (case, backend) = self.runnable(id)?;
        backend.reset_peak_memory()?;
        let mut prepared = backend.load(&Fixture::new(case))?;
        prepared.step()?;
        if let Some(rounds) = extra_work(id)? {
            prepared = Box::new(Slowed { inner: prepared, rounds });
        }
        self.current = Some(prepared);
        Ok(())
    }

    fn time(&mut self, steps: u64) -> Result<Duration> {
        let prepared = self.current.as_mut().context("no case: say 'case ID' first")?;
        prepared.time(steps)
    }
}

/// A case whose every step does extra work.
struct Slowed {
    inner: Box<dyn LoadedCase>,
    rounds: u64,
}

/// Real arithmetic, a chain that no compiler can shorten.
fn work(rounds: u64) {
    let mut x = 1.0f64;
    for i in 0..rounds {
        x = std::hint::black_box(x * 0.999_999 + i as f64 * 1e-9);
    }
    std::hint::black_box(x);
}

/// Rounds of extra work that the environment asks for in a case.
fn extra_work(id: &str) -> Result<Option<u64>> {
    let Ok(text) = std::env::var(EXTRA) else { return Ok(None) };
    for entry in text.split(';').filter(|e| !e.is_empty()) {
        let (name, rounds) =
            entry.split_once('=').with_context(|| format!("{EXTRA}: '{entry}': ID=ROUNDS"))?;
        if name == id {
            return rounds.parse().map(Some).with_context(|| format!("{EXTRA}: '{rounds}' is no number"));
        }
    }
    Ok(None)
}

impl LoadedCase for Slowed {
    fn step(&mut self) -> Result<()> {
        self.inner.step()?;
        work(self.rounds);
        Ok(())
    }

    fn outputs(&mut self) -> Result<Vec<transformer_bench::model::fixture::Tensor>> {
        self.inner.outputs()
    }
}
