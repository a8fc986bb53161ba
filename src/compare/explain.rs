//! Times of the operations of a training step on two backends. A process of each backend runs, and their samples alternate.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::signals::check_interrupted;
use super::worker::{BlockTiming, CheckOutcome, Side, Threads, Worker};
use crate::interference::WAIT_THRESHOLD;
use crate::model::ModelId;
use crate::results::machine::{self, Machine};
use crate::results::operations::{Explanation, OperationTime};
use crate::statistics::median;
use crate::suite::operations::{OperationPass, check_separable, operation_passes};
use crate::suite::{BackendId, Case, Device, Framework, Method, Precision, Set, Shape, Workload, cost};

/// Shortest duration of a sample. A request takes tens of microseconds.
const SAMPLE: Duration = Duration::from_millis(2);
/// Time in which both sides of an operation are sampled, if they have [`MIN_SAMPLES`] by then.
const OPERATION_TIME: Duration = Duration::from_millis(600);
const MIN_SAMPLES: usize = 5;
const MAX_SAMPLES: usize = 60;
/// Samples of whole steps before the operations, and again after them.
const STEP_TIME: Duration = Duration::from_secs(3);
/// Largest number of calls in a sample, and their memory in bytes: all backward passes of a sample are prepared before it.
const MAX_CALLS: u64 = 64;
const MAX_SAMPLE_BYTES: u64 = 256 << 20;

/// Two processes that time the same operations.
pub struct Explainer {
    cases: [Case; 2],
    workers: [Worker; 2],
    random: ChaCha8Rng,
    /// Timings of the whole steps, in which the wait for cores is counted.
    steps: [Vec<BlockTiming>; 2],
}

/// Returns the backends of both frameworks on one device: a GPU, if both have it.
///
/// # Errors
/// Returns an error if no device has both.
fn best_backends(available: &[BackendId]) -> Result<[BackendId; 2]> {
    for device in [Device::NvidiaGpu, Device::AppleGpu, Device::Cpu] {
        let of = |framework: Framework| {
            let fits = |id: &&BackendId| id.device() == device && id.framework() == framework;
            available.iter().find(fits).copied()
        };
        if let (Some(torch), Some(mlx)) = (of(Framework::Torch), of(Framework::Mlx)) {
            return Ok([torch, mlx]);
        }
    }
    bail!("no device of this machine has a backend of both frameworks")
}

impl Explainer {
    /// Starts a process of each backend. Without backends, it takes the best ones of this machine.
    ///
    /// # Errors
    /// Returns an error if a process does not start, or if a step does not consist of operations that run alone.
    pub fn start(
        side: &Side,
        backends: Option<[BackendId; 2]>,
        method: Method,
        shape: Shape,
    ) -> Result<Self> {
        let start = |framework| Worker::start(side, framework, Threads::All);
        let (workers, backends) = if let Some(backends) = backends {
            let [first, second] = backends.map(|backend| start(backend.framework()));
            ([first?, second?], backends)
        } else {
            let mut workers = [start(Framework::Torch)?, start(Framework::Mlx)?];
            let mut available = Vec::new();
            for worker in &mut workers {
                let cases = worker.cases(Set::Quick, "^train-step/[^/]*/f32/")?;
                available.extend(cases.iter().map(|case| case.backend));
            }
            (workers, best_backends(&available)?)
        };
        let case = |backend| Case { workload: Workload::TrainStep, backend, method, shape };
        let cases = backends.map(case);
        for case in &cases {
            check_separable(case).map_err(anyhow::Error::msg)?;
        }
        let random = ChaCha8Rng::seed_from_u64(0);
        Ok(Self { cases, workers, random, steps: [Vec::new(), Vec::new()] })
    }

    /// Returns the training steps that are explained.
    pub fn cases(&self) -> [Case; 2] {
        self.cases
    }

    /// Checks and times the steps and all their operations. `progress` gets a line for each.
    ///
    /// # Errors
    /// Returns an error if a result is wrong, a time is impossible, or a process ends.
    pub fn explain(&mut self, progress: &dyn Fn(&str)) -> Result<Explanation> {
        let peaks = [self.peak(Workload::MatmulPeak, progress)?, self.peak(Workload::CopyPeak, progress)?];
        self.time_steps(progress)?;
        let mut operations = Vec::new();
        for part in self.parts() {
            progress(&format!("{part}"));
            operations.push(self.time_operation(&part)?);
        }
        progress("optimizer");
        operations.push(self.time_optimizer()?);
        self.time_steps(progress)?;
        let wall =
            |steps: &Vec<BlockTiming>| 1e9 * median(&steps.iter().map(|step| step.wall).collect::<Vec<_>>());
        let model = self.cases[0].shape.model().map_or(ModelId::indicator(), |(model, _)| model);
        let activation = serde_json::to_value(model.activation)?;
        Ok(Explanation {
            ids: self.cases.map(|case| case.to_string()),
            step_ns: [wall(&self.steps[0]), wall(&self.steps[1])],
            activation: activation.as_str().unwrap_or_default().to_owned(),
            peak_flops: peaks[0],
            peak_bytes: peaks[1],
            operations,
            commit: Machine::read().commit,
        })
    }

    /// Returns a note if other programs took the cores from a step.
    pub fn disturbance(&self) -> Option<String> {
        let share = |steps: &Vec<BlockTiming>| {
            let [delayed, cpu] = [|step: &BlockTiming| step.delayed, |step: &BlockTiming| step.cpu]
                .map(|value| steps.iter().map(value).sum::<f64>());
            delayed / (delayed + cpu)
        };
        let largest = self.steps.iter().map(share).fold(0.0, f64::max);
        (largest > WAIT_THRESHOLD).then(|| {
            format!(
                "other programs disturbed the steps: threads waited {:.0} % of their time for a core",
                100.0 * largest
            )
        })
    }

    /// Returns the passes of both steps. They differ if one step fuses operations that the other has.
    fn parts(&self) -> Vec<OperationPass> {
        let [mut all, other] = self.cases.map(|case| operation_passes(&case));
        let new = other.into_iter().filter(|part| !all.contains(part)).collect::<Vec<_>>();
        all.extend(new);
        all
    }

    /// Checks both cases, or recalls earlier checks.
    fn check(&mut self, cases: &[Case; 2], progress: &dyn Fn(&str)) -> Result<()> {
        for (worker, case) in self.workers.iter_mut().zip(cases) {
            progress(&format!("checking {case}"));
            if let CheckOutcome::Wrong(reason) = worker.check(case)? {
                bail!("{reason}");
            }
        }
        Ok(())
    }

    fn load(&mut self, cases: &[Case; 2]) -> Result<()> {
        for (worker, case) in self.workers.iter_mut().zip(cases) {
            worker.load(case).with_context(|| case.to_string())?;
        }
        Ok(())
    }

    /// Returns the largest rate of both backends in a peak case, per second.
    fn peak(&mut self, workload: Workload, progress: &dyn Fn(&str)) -> Result<f64> {
        let cpu = self.cases[0].backend.is_cpu();
        let precision = match self.cases[0].method.precision {
            Precision::Mixed => Precision::Bf16,
            precision if workload == Workload::CopyPeak && precision == Precision::Tf32 => Precision::F32,
            precision => precision,
        };
        let shape = match (workload, cpu) {
            (Workload::MatmulPeak, true) => Shape::Square { n: 1024, chain: 1 },
            (Workload::MatmulPeak, false) => Shape::Square { n: 8192, chain: 1 },
            (_, true) => Shape::Buffer { mib: 256, ranks: 1 },
            (_, false) => Shape::Buffer { mib: 1024, ranks: 1 },
        };
        let method = Method::eager(precision);
        let cases = self.cases.map(|case| Case { workload, method, shape, ..case });
        self.check(&cases, progress)?;
        self.load(&cases)?;
        let times = self.sample([true; 2], OPERATION_TIME, MAX_CALLS)?;
        let amount = cost::work(&cases[0]).amount() as f64;
        let rate =
            |times: &Vec<BlockTiming>| amount / times.iter().map(|time| time.wall).fold(f64::MAX, f64::min);
        Ok(times.iter().map(rate).fold(0.0, f64::max))
    }

    fn time_steps(&mut self, progress: &dyn Fn(&str)) -> Result<()> {
        let cases = self.cases;
        self.check(&cases, progress)?;
        progress("whole steps");
        self.load(&cases)?;
        let times = self.sample([true; 2], STEP_TIME, 1)?;
        self.workers.iter_mut().try_for_each(Worker::verify)?;
        self.steps.iter_mut().zip(times).for_each(|(all, times)| all.extend(times));
        Ok(())
    }

    /// Times one pass of an operation on the sides that have it.
    fn time_operation(&mut self, part: &OperationPass) -> Result<OperationTime> {
        let has = self.cases.map(|case| operation_passes(&case).contains(part));
        for side in (0..2).filter(|&side| has[side]) {
            let case = self.cases[side];
            self.workers[side].load_operation(&case, part).with_context(|| case.to_string())?;
        }
        let precision = self.cases[0].method.precision;
        let element = if precision == Precision::Mixed { 2 } else { precision.parameter_bytes() };
        let bytes = part.bytes(element);
        let times =
            self.sample(has, OPERATION_TIME, (MAX_SAMPLE_BYTES / bytes.max(1)).clamp(1, MAX_CALLS))?;
        let mut ns = [None; 2];
        for side in (0..2).filter(|&side| has[side]) {
            let time = 1e9 * median(&times[side].iter().map(|time| time.wall).collect::<Vec<_>>());
            let ceiling = machine::flops_ceiling(self.cases[side].backend, precision, &Machine::read());
            machine::check_rate(part.flops(), time, ceiling)
                .and_then(|()| self.workers[side].verify())
                .with_context(|| format!("{part} of {}", self.cases[side]))?;
            ns[side] = Some(time);
        }
        let (operation, pass) = (part.operation.name.to_owned(), part.pass.id().to_owned());
        Ok(OperationTime {
            operation,
            pass,
            count: part.operation.count as u64,
            flops: part.flops(),
            bytes,
            ns,
        })
    }

    /// Times the optimizer, which has a case of its own.
    fn time_optimizer(&mut self) -> Result<OperationTime> {
        let cases = self.cases.map(|case| {
            let precision = match case.method.precision {
                Precision::Mixed => Precision::F32,
                precision => precision,
            };
            let (workload, method) = (Workload::OptimizerStep, Method::eager(precision));
            Case { workload, method, shape: case.shape.undivided(), ..case }
        });
        self.check(&cases, &|_| {})?;
        self.load(&cases)?;
        let times = self.sample([true; 2], OPERATION_TIME, MAX_CALLS)?;
        self.workers.iter_mut().try_for_each(Worker::verify)?;
        let ns =
            times.map(|times| Some(1e9 * median(&times.iter().map(|time| time.wall).collect::<Vec<_>>())));
        let (operation, pass) = ("optimizer".to_owned(), "update".to_owned());
        Ok(OperationTime { operation, pass, count: 1, flops: 0, bytes: cost::bytes(&cases[0]), ns })
    }

    /// Samples what both processes have loaded, in random order, with at most `max_calls` calls in a sample.
    fn sample(&mut self, has: [bool; 2], time: Duration, max_calls: u64) -> Result<[Vec<BlockTiming>; 2]> {
        let mut calls = [1; 2];
        for side in (0..2).filter(|&side| has[side]) {
            // The first call after a load is longer.
            self.workers[side].time(1)?;
            let one = self.workers[side].time(1)?.wall;
            ensure!(one > 0.0, "{} takes no time", self.cases[side]);
            calls[side] = ((SAMPLE.as_secs_f64() / one).ceil() as u64).clamp(1, max_calls);
        }
        let mut all = [Vec::new(), Vec::new()];
        let start = Instant::now();
        for count in 0..MAX_SAMPLES {
            if count >= MIN_SAMPLES && start.elapsed() > time {
                break;
            }
            check_interrupted()?;
            let first = (self.random.next_u32() & 1) as usize;
            for side in [first, 1 - first].into_iter().filter(|&side| has[side]) {
                all[side].push(self.workers[side].time(calls[side])?);
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_is_preferred_if_both_frameworks_have_it() {
        use BackendId::{MlxCpu, MlxCuda, MlxMetal, TorchCpu, TorchCuda, TorchMps};
        let best = |available: &[BackendId]| best_backends(available).ok();
        assert_eq!(best(&[TorchCpu, TorchMps, MlxCpu, MlxMetal]), Some([TorchMps, MlxMetal]));
        assert_eq!(best(&[TorchCpu, TorchCuda, MlxCpu]), Some([TorchCpu, MlxCpu]));
        assert_eq!(best(&[TorchCpu, TorchCuda, MlxCpu, MlxCuda]), Some([TorchCuda, MlxCuda]));
        assert_eq!(best(&[TorchCpu, TorchCuda]), None);
    }
}
