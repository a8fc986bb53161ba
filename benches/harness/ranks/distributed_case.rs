//! A case that several ranks compute together. This process measures them and is not a rank itself, unless a
//! launcher started it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use transformer_bench::backend::{LoadedCase, RankStats};
use transformer_bench::files::Scratch;
use transformer_bench::fixture::{Fixture, Tensor};
use transformer_bench::parity::RankMismatch;
use transformer_bench::statistics::{median, sorted};
use transformer_bench::suite::{Case, Workload};

use super::super::protocol::{read_tensors, write_tensors};
use super::controller::{Controller, LOAD_TIME};

/// Rounds for exposed communication. The second and the eighth of nine sorted values enclose the median with
/// 96 % probability (binomial distribution).
const ROUNDS: usize = 9;
/// Minimum seconds of a round; it has at least one step.
const ROUND_SECONDS: f64 = 0.2;

pub struct DistributedCase {
    case: Case,
    controller: Box<dyn Controller>,
    comm_backend: &'static str,
    folder: Scratch,
    /// Time of one step in the last request.
    step: Duration,
    skews: Vec<f64>,
    cpu_wait_share: f64,
}

impl DistributedCase {
    /// Loads `case` on all ranks. `folder` is private to the case.
    ///
    /// # Errors
    /// Returns an error if a rank can't load the case.
    pub fn load(
        case: Case,
        parity: bool,
        mut controller: Box<dyn Controller>,
        comm_backend: &'static str,
        folder: Scratch,
    ) -> Result<Self> {
        let request = if parity { "parity" } else { "case" };
        controller.ask(&format!("{request} {case}"), LOAD_TIME)?;
        let step = Duration::from_secs(1);
        Ok(Self { case, controller, comm_backend, folder, step, skews: Vec::new(), cpu_wait_share: 0.0 })
    }

    /// Runs steps on all ranks and returns the time of the slowest. `request` is `steps` or `no-sync`.
    fn run_steps(&mut self, request: &str, steps: u64) -> Result<Duration> {
        let expected = self.step * u32::try_from(steps).unwrap_or(u32::MAX);
        let answer = self.controller.ask(&format!("{request} {steps}"), expected)?;
        let mut numbers = answer.split(' ').map(|word| word.parse::<f64>().ok());
        let mut next = || numbers.next().flatten().with_context(|| format!("'{answer}' is not a time"));
        let (slowest, fastest, cpu_wait) = (next()?, next()?, next()?);
        let elapsed = Duration::from_secs_f64(slowest);
        self.step = elapsed.div_f64(steps.max(1) as f64);
        self.skews.push(1.0 - fastest / slowest);
        self.cpu_wait_share = self.cpu_wait_share.max(cpu_wait);
        Ok(elapsed)
    }

    /// Reads the tensors that rank 0 writes after a request.
    fn read(&mut self, request: &str) -> Result<Vec<Tensor>> {
        let file = self.folder.0.join("tensors");
        let answer = self.controller.ask(&format!("{request} {}", file.display()), self.step)?;
        if let Some(name) = answer.strip_prefix("differ ") {
            return Err(anyhow::Error::new(RankMismatch(name.to_owned())));
        }
        read_tensors(&file)
    }

    /// Measures `1 - t_no_sync / t_step` in interleaved rounds. Returns the median and its 96 % interval.
    fn measure_exposed_communication(&mut self) -> Result<[f64; 3]> {
        self.run_steps("no-sync", 1)?;
        let step = self.run_steps("steps", 1)?;
        let steps = (ROUND_SECONDS / step.as_secs_f64()).ceil().max(1.0) as u64;
        let mut shares = Vec::new();
        for round in 0..ROUNDS {
            let order = if round % 2 == 0 { ["steps", "no-sync"] } else { ["no-sync", "steps"] };
            let (mut synchronized, mut no_sync) = (0.0, 0.0);
            for request in order {
                let time = if request == "steps" { &mut synchronized } else { &mut no_sync };
                *time = self.run_steps(request, steps)?.as_secs_f64();
            }
            shares.push(1.0 - no_sync / synchronized);
        }
        let shares = sorted(shares);
        Ok([shares[ROUNDS / 2], shares[1], shares[ROUNDS - 2]])
    }
}

impl LoadedCase for DistributedCase {
    fn step(&mut self) -> Result<()> {
        self.time(1).map(|_| ())
    }

    fn time(&mut self, steps: u64) -> Result<Duration> {
        self.run_steps("steps", steps)
    }

    fn rank_stats(&mut self) -> Option<RankStats> {
        // Read before exposed communication is measured, which is not part of the samples.
        let (skew, cpu_wait_share) = (median(&self.skews), self.cpu_wait_share);
        let memory = self.controller.ask("memory", Duration::ZERO).ok()?;
        let mut bytes = memory.split(' ').map(|word| word.parse().ok().filter(|bytes| *bytes > 0));
        let (peak_bytes, rss_peak_bytes) = (bytes.next().flatten(), bytes.next().flatten());
        let exposed_communication = match self.case.workload {
            // It may fail, because it needs memory for a second copy of the step.
            Workload::TrainStep => self
                .measure_exposed_communication()
                .map_err(|error| {
                    eprintln!("{}: exposed communication could not be measured: {error:#}", self.case);
                })
                .ok(),
            _ => None,
        };
        let comm_backend = self.comm_backend.to_owned();
        Some(RankStats {
            comm_backend,
            peak_bytes,
            rss_peak_bytes,
            cpu_wait_share,
            skew,
            exposed_communication,
        })
    }

    fn profile_first_rank(&mut self, time: Duration, folder: &Path) -> Option<Result<String>> {
        let mut profile = || {
            fs::create_dir_all(folder)
                .with_context(|| format!("{} could not be created", folder.display()))?;
            let steps = (time.as_secs_f64() / self.run_steps("steps", 1)?.as_secs_f64()).ceil().max(3.0);
            // The case may be loaded again, and the attribution of launches slows steps down.
            let expected = LOAD_TIME + 3 * time;
            let answer = self.controller.ask(&format!("profile {steps} {}", folder.display()), expected)?;
            Ok(serde_json::from_str(&answer)?)
        };
        Some(profile())
    }

    fn set_inputs(&mut self, fixture: &Fixture) -> Result<()> {
        self.controller.ask(&format!("inputs {}", fixture.batch_number()), LOAD_TIME).map(|_| ())
    }

    fn checkpoint(&mut self) -> Result<Vec<Tensor>> {
        self.read("checkpoint")
    }

    fn restore(&mut self, checkpoint: &[Tensor], seed: u64) -> Result<()> {
        let file = self.folder.0.join("checkpoint");
        write_tensors(&file, checkpoint)?;
        self.controller.ask(&format!("restore {seed} {}", file.display()), LOAD_TIME).map(|_| ())
    }

    fn outputs(&mut self) -> Result<Vec<Tensor>> {
        self.read("tensors")
    }
}
