//! Estimates how long a run takes, from the FLOPs of its cases.

use std::time::Duration;

use transformer_bench::results::machine::{Machine, dense_peak};
use transformer_bench::suite::{BackendId, Case, Device, Framework, Precision, Set, cost};

use super::timing::Plan;

/// Time in which a case is loaded, besides its steps.
const LOAD_TIME: Duration = Duration::from_secs(1);

/// Returns the assumed rate of a backend in FLOP/s.
///
/// CPU: f32 steps of `indicator` at batch 16 on a two-core server. Apple's GPU: a third of the peak of an M1, which has
/// 2.6 TFLOP/s in 8 cores. NVIDIA: a third of the data sheet, or of 10 TFLOP/s for an unknown GPU.
fn assumed_rate(backend: BackendId, machine: &Machine) -> f64 {
    match (backend.device(), backend.framework()) {
        (Device::Cpu, Framework::Torch) => 50e9 * machine.cores as f64,
        (Device::Cpu, Framework::Mlx) => 16e9 * machine.cores as f64,
        (Device::AppleGpu, _) => 0.1e12 * apple_gpu_cores(machine).unwrap_or(8.0),
        (Device::NvidiaGpu, _) => {
            machine.gpus.first().and_then(|gpu| dense_peak(gpu, Precision::F32)).unwrap_or(10e12) / 3.0
        }
    }
}

/// Returns the cores in the name of Apple's GPU: `Apple M3 GPU (10 cores)`.
fn apple_gpu_cores(machine: &Machine) -> Option<f64> {
    machine.gpus.first()?.split_once('(')?.1.strip_suffix(" cores)")?.parse().ok()
}

/// Returns the estimated time in which the cases are loaded and timed, without their compilation and checks.
pub fn timing(cases: &[Case], set: Set, machine: &Machine) -> Duration {
    let estimate = |case: &Case| {
        let step = cost::flops(case) as f64 / assumed_rate(case.backend, machine);
        // A step without matrix products takes at least the time of a launch.
        let step = Duration::from_secs_f64(step.max(1e-4));
        LOAD_TIME + Plan::expected_duration(step, set, case.workload)
    };
    cases.iter().map(estimate).sum()
}

/// Formats a duration as seconds or minutes.
pub fn format(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 90.0 { format!("{seconds:.0} s") } else { format!("{:.0} min", seconds / 60.0) }
}
