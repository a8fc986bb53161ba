//! Step times of several fresh processes, for training steps whose time depends on the process.

use std::time::Instant;

use anyhow::Result;
use transformer_bench::compare::baseline_level;
use transformer_bench::compare::worker::{REQUEST_TIMEOUT, Side, Threads, Worker};
use transformer_bench::results::{LAUNCH_BOUND_SHARE, Record};
use transformer_bench::suite::{BackendId, Case, Device, Workload};

use super::profiler::gpu_steps;

/// Number of processes. The range of six values contains the median of all processes with a probability of
/// 1 − 2 · 2⁻⁶ = 97 %.
pub const PROCESSES: usize = 6;

fn is_training_on_one_device(case: &Case) -> bool {
    case.workload == Workload::TrainStep && case.shape.ranks() == 1
}

/// Returns true if one process does not show how long a step takes.
///
/// On Metal, about 40 % of PyTorch's processes use matrix kernels that take 2 to 3 times as long, for as long as the
/// process lives (PyTorch issue 182815). If kernel launches limit a step, the state of the host decides.
pub fn depends_on_process(case: &Case, record: &Record) -> bool {
    is_training_on_one_device(case)
        && (case.backend == BackendId::TorchMps
            || record.gpu_busy_share.is_some_and(|share| share < LAUNCH_BOUND_SHARE))
}

/// Returns the share of a training step in which an NVIDIA GPU is busy, recorded in a process of its own: CUPTI slows
/// down the launches of later steps. Returns `None` on other devices, and if CUPTI is missing or refuses this user.
pub fn gpu_busy_share(case: &Case, record: &Record) -> Option<f64> {
    if !is_training_on_one_device(case) || case.backend.device() != Device::NvidiaGpu {
        return None;
    }
    let steps = gpu_steps(1e-9 * record.median_ns?);
    let worker = Worker::start(&own_side(case).ok()?, case.backend.framework(), Threads::All).ok()?;
    let mut worker = worker.until(Instant::now() + REQUEST_TIMEOUT);
    worker.load(case).and_then(|_| worker.gpu_busy_share(steps)).ok()
}

/// Returns this executable as a side whose processes time steps.
///
/// # Errors
/// Returns an error if the path of this executable is unknown.
pub fn own_side(case: &Case) -> Result<Side> {
    let executables = [(case.backend.framework(), std::env::current_exe()?)].into();
    Ok(Side { name: "this executable".to_owned(), executables, ..Side::default() })
}

/// Returns the step time of a case in nanoseconds in each of several fresh processes.
///
/// # Errors
/// Returns an error if a process does not start, or if its steps fail or do not do their work.
pub fn time(side: &Side, case: &Case) -> Result<Vec<f64>> {
    let time_once = || -> Result<f64> {
        let worker = Worker::start(side, case.backend.framework(), Threads::All)?;
        let mut worker = worker.until(Instant::now() + REQUEST_TIMEOUT);
        let level = baseline_level::level(&mut worker, case)?;
        worker.verify()?;
        Ok(1e9 * level.exp())
    };
    (0..PROCESSES).map(|_| time_once()).collect()
}
