//! Times of the operations of a training step on two backends. A process of each backend runs, and their samples alternate.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::pair::{WorkerPair, median_ns};
use super::worker::{BlockTiming, Side, Threads, Worker};
use crate::interference::WAIT_THRESHOLD;
use crate::model::ModelId;
use crate::results::machine::{self, Machine};
use crate::results::operations::{Explanation, OperationTime};
use crate::suite::operations::{OperationPass, check_separable, operation_passes};
use crate::suite::{BackendId, Case, Device, Framework, Method, Precision, Set, Shape, Workload, cost};

/// Time in which both sides of an operation are sampled.
const OPERATION_TIME: Duration = Duration::from_millis(500);
/// Samples of whole steps before the operations, and again after them.
const STEP_TIME: Duration = Duration::from_secs(2);
/// Largest number of calls in a sample, and their memory in bytes: all backward passes of a sample are prepared before it.
const MAX_CALLS: u64 = 64;
const MAX_SAMPLE_BYTES: u64 = 256 << 20;

/// Two processes that time the same operations.
pub struct Explainer {
    cases: [Case; 2],
    pair: WorkerPair,
    /// Timings of the whole steps, in which the wait for cores is counted.
    steps: [Vec<BlockTiming>; 2],
    machine: Machine,
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
        let steps = [Vec::new(), Vec::new()];
        Ok(Self { cases, pair: WorkerPair::new(workers), steps, machine: Machine::read() })
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
        let model = self.cases[0].shape.model().map_or(ModelId::indicator(), |(model, _)| model);
        let activation = serde_json::to_value(model.activation)?;
        Ok(Explanation {
            ids: self.cases.map(|case| case.to_string()),
            step_ns: [median_ns(&self.steps[0]), median_ns(&self.steps[1])],
            activation: activation.as_str().unwrap_or_default().to_owned(),
            peak_flops: peaks[0],
            peak_bytes: peaks[1],
            operations,
            commit: self.machine.commit.clone(),
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
        self.pair.check(&cases, progress)?;
        self.pair.load(&cases)?;
        let times = self.pair.sample([true; 2], OPERATION_TIME, MAX_CALLS)?;
        let amount = cost::work(&cases[0]).amount() as f64;
        let rate =
            |times: &Vec<BlockTiming>| amount / times.iter().map(|time| time.wall).fold(f64::MAX, f64::min);
        Ok(times.iter().map(rate).fold(0.0, f64::max))
    }

    fn time_steps(&mut self, progress: &dyn Fn(&str)) -> Result<()> {
        let cases = self.cases;
        self.pair.check(&cases, progress)?;
        progress("whole steps");
        self.pair.load(&cases)?;
        let times = self.pair.sample([true; 2], STEP_TIME, 1)?;
        self.pair.verify()?;
        self.steps.iter_mut().zip(times).for_each(|(all, times)| all.extend(times));
        Ok(())
    }

    /// Times one pass of an operation on the sides that have it.
    fn time_operation(&mut self, part: &OperationPass) -> Result<OperationTime> {
        let has = self.cases.map(|case| operation_passes(&case).contains(part));
        for side in (0..2).filter(|&side| has[side]) {
            let case = self.cases[side];
            self.pair.workers[side].load_operation(&case, part).with_context(|| case.to_string())?;
        }
        let precision = self.cases[0].method.precision;
        let element = if precision == Precision::Mixed { 2 } else { precision.parameter_bytes() };
        let bytes = part.bytes(element);
        let times =
            self.pair.sample(has, OPERATION_TIME, (MAX_SAMPLE_BYTES / bytes.max(1)).clamp(1, MAX_CALLS))?;
        let mut ns = [None; 2];
        for side in (0..2).filter(|&side| has[side]) {
            let time = median_ns(&times[side]);
            let ceiling = machine::flops_ceiling(self.cases[side].backend, precision, &self.machine);
            machine::check_rate(part.flops(), time, ceiling)
                .and_then(|()| self.pair.workers[side].verify())
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
        self.pair.check(&cases, &|_| {})?;
        self.pair.load(&cases)?;
        let times = self.pair.sample([true; 2], OPERATION_TIME, MAX_CALLS)?;
        self.pair.verify()?;
        let ns = times.map(|times| Some(median_ns(&times)));
        let (operation, pass) = ("optimizer".to_owned(), "update".to_owned());
        Ok(OperationTime { operation, pass, count: 1, flops: 0, bytes: cost::bytes(&cases[0]), ns })
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
