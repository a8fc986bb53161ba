//! What a framework must offer to be measured.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::model::fixture::{Fixture, Tensor};
pub use crate::model::reference::rounding::Sums;
use crate::suite::{BackendId, Case, Device, Framework, Precision, Variant, Workload};

/// Why a case can't run here; shown as the row's reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsupported(pub String);

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A framework on a device that this machine has.
pub trait Backend {
    fn id(&self) -> BackendId;

    /// Names and versions of what computes: framework, BLAS, driver, thread count.
    fn versions(&self) -> Vec<(String, String)>;

    /// Whether the case can run, else why not.
    fn supports(&self, case: &Case) -> Result<(), Unsupported>;

    /// Loads the fixture and returns the case, ready to step.
    fn load(&self, fixture: &Fixture) -> Result<Box<dyn LoadedCase>>;

    /// Whether the code of a recipe's cases is made before they can run: a minute each, once.
    fn is_precompiled(&self, _recipe: Variant) -> bool {
        false
    }

    /// Whether a case's code is still to be made; preparing the case makes it too.
    fn needs_compile(&self, _case: &Case) -> bool {
        false
    }

    /// Makes a case's code, where it is not there.
    ///
    /// # Errors
    /// Where it can't be made, with the compiler's last line.
    fn compile(&self, _case: &Case) -> Result<()> {
        Ok(())
    }

    /// The devices of this machine that can each be a rank's, and what they are called; of a CPU its cores.
    fn devices(&self) -> (usize, &'static str);

    /// What exchanges gradients between ranks.
    fn comm_backend(&self) -> &'static str;

    /// What each of several ranks of this machine finds in its environment, so that they meet; `folder`
    /// is theirs alone.
    ///
    /// # Errors
    /// Where no place can be made.
    fn rendezvous_env(&self, ranks: usize, folder: &Path) -> Result<Vec<Environment>>;

    /// Adds up numbers over all ranks, of which this process is one: all have the sums then, so it
    /// is also how they wait for each other.
    ///
    /// # Errors
    /// Where a rank is gone, or does not answer in time.
    fn all_reduce_sum(&self, values: &[f32]) -> Result<Vec<f32>>;

    /// In which type it keeps sums over rows: decides what a gradient may be off by.
    fn accumulation(&self) -> Sums;

    /// Waits until the device has nothing left to do.
    fn synchronize(&self) -> Result<()>;

    /// Bytes the device can hold, where the framework tells.
    fn memory_total(&self) -> Option<u64>;

    /// Frees cached memory and starts a new peak.
    fn reset_peak_memory(&self) -> Result<()>;

    /// The peak of the framework's own allocator in bytes since the reset, where it keeps one.
    fn peak_memory(&self) -> Option<u64>;

    /// Records what Apple's GPU does while `body` runs, as a `.gputrace` for Xcode at an
    /// absolute path.
    ///
    /// # Errors
    /// Where the framework can't, with what to use instead.
    fn capture(&self, _path: &Path, _body: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        bail!("{} makes no GPU trace: record it with Instruments, template Metal System Trace", self.id())
    }
}

/// A case loaded onto a device.
pub trait LoadedCase {
    /// Does one iteration and returns only when every result exists on the device.
    fn step(&mut self) -> Result<()>;

    /// Does as many as one stretch: a step returns only when its results exist, so nothing of
    /// one leaks into the next.
    fn time(&mut self, steps: u64) -> Result<Duration> {
        let start = Instant::now();
        if !self.run_pipelined(steps)? {
            for _ in 0..steps {
                self.step()?;
            }
        }
        Ok(start.elapsed())
    }

    /// Does as many without waiting in between, where the case is timed so; false where it is not.
    fn run_pipelined(&mut self, _steps: u64) -> Result<bool> {
        Ok(false)
    }

    /// Where other processes do the work: what was seen of them.
    fn rank_stats(&mut self) -> Option<RankStats> {
        None
    }

    /// Where other processes do the work: leaves profiles of the first one in a folder, taken over
    /// about so long, and returns what is to be said of them.
    fn profile_first_rank(&mut self, _time: Duration, _folder: &Path) -> Option<Result<String>> {
        None
    }

    /// The results of the last step as f32, for parity; untimed. Names: what the model
    /// puts out (`out`, `selection`, `weights`, `logits`), `loss`, `grad/<parameter>`,
    /// `grad/x`, and `param/<parameter>` where an optimizer ran.
    fn outputs(&mut self) -> Result<Vec<Tensor>>;
}

/// What was seen of the ranks that worked for a case.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RankStats {
    /// [`Backend::engine`]
    pub comm_backend: String,
    /// The largest of any rank.
    pub peak_bytes: Option<u64>,
    pub rss_peak_bytes: Option<u64>,
    /// The largest part of its time that a rank's threads were ready and had no core.
    pub cpu_wait_share: f64,
    /// By how much the slowest rank took longer than the fastest, of its time; the median.
    pub skew: f64,
    /// What of the step is exchange that nothing hides: 1 less the same step without it over the step,
    /// in turns on the same ranks, and the range that the middle of it lies in.
    pub exposed_communication: Option<[f64; 3]>,
}

/// How long a rank waits for the others: within 30 s a user knows that one is missing.
pub const COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(18);

/// The cores that this process may use, and their name.
pub fn cpu_device_count() -> (usize, &'static str) {
    (std::thread::available_parallelism().map_or(1, usize::from), "cores")
}

/// How CUDA names the n-th GPU that this process sees: to a rank it is shown alone.
pub fn visible_gpu(n: usize) -> String {
    let shown = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default();
    let shown = shown.split(',').map(str::trim).filter(|name| !name.is_empty()).nth(n).map(str::to_owned);
    shown.unwrap_or_else(|| n.to_string())
}

/// Variables and their values.
pub type Environment = Vec<(String, String)>;

/// This process as one of several that share a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rank {
    pub index: usize,
    pub count: usize,
}

impl Rank {
    /// What the launcher says: ours, `torchrun`
    /// (<https://docs.pytorch.org/docs/stable/elastic/run.html>) or `mlx.launch`
    /// (<https://ml-explore.github.io/mlx/build/html/usage/distributed.html>). None of a process alone.
    ///
    /// # Errors
    /// Where only a part of it is there.
    pub fn from_environment(framework: Framework) -> Result<Option<Self>> {
        let variable = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
        let (name, size_name) = match framework {
            Framework::Torch => ("RANK", "WORLD_SIZE"),
            Framework::Mlx => ("MLX_RANK", "MLX_WORLD_SIZE"),
        };
        let hosts = variable("MLX_HOSTFILE").filter(|_| framework == Framework::Mlx);
        let of = match (variable(size_name), hosts) {
            (Some(size), _) => size.parse().with_context(|| format!("{size_name}={size} is no number"))?,
            (None, Some(path)) => {
                let text = std::fs::read_to_string(&path).with_context(|| format!("MLX_HOSTFILE={path}"))?;
                let hosts: Vec<serde_json::Value> =
                    serde_json::from_str(&text).with_context(|| format!("{path} lists no hosts"))?;
                hosts.len()
            }
            (None, None) => return Ok(None),
        };
        let Some(index) = variable(name) else { return Ok(None) };
        let index = index.parse().with_context(|| format!("{name}={index} is no number"))?;
        ensure!(index < of, "rank {index} of {of} can't be: see {name}");
        Ok((of > 1).then_some(Self { index, count: of }))
    }
}

/// A backend that this machine lacks.
#[derive(Clone, Debug)]
pub struct Unavailable {
    pub id: BackendId,
    pub reason: String,
}

/// What a framework finds at run time: each of its backends is in one of the two lists.
#[derive(Default)]
pub struct Backends {
    pub available: Vec<Box<dyn Backend>>,
    pub unavailable: Vec<Unavailable>,
}

impl Backends {
    pub fn add_unavailable(&mut self, id: BackendId, reason: impl Into<String>) {
        self.unavailable.push(Unavailable { id, reason: reason.into() });
    }

    pub fn get(&self, id: BackendId) -> Option<&dyn Backend> {
        self.available.iter().find(|b| b.id() == id).map(Box::as_ref)
    }
}

/// Width of the product that a device must get right before it counts as there.
pub const SANITY_WIDTH: usize = 32;

/// A matrix [PROBE, PROBE] of small integers, exact in every format and sum.
pub fn sanity_matrix() -> Vec<f32> {
    (0..SANITY_WIDTH * SANITY_WIDTH).map(|i| (i % 7) as f32).collect()
}

/// Holds a device's product of [`probe`] with itself against the host's.
///
/// # Errors
/// Where a number differs.
pub fn check_sanity_product(found: &[f32]) -> Result<()> {
    let x = sanity_matrix();
    let cell = |i: usize| {
        (0..SANITY_WIDTH)
            .map(|k| x[i / SANITY_WIDTH * SANITY_WIDTH + k] * x[k * SANITY_WIDTH + i % SANITY_WIDTH])
            .sum::<f32>()
    };
    let expected = (0..SANITY_WIDTH * SANITY_WIDTH).map(cell);
    if found.len() != x.len() || expected.zip(found).any(|(a, b)| a != *b) {
        bail!("a small matrix product comes out wrong");
    }
    Ok(())
}

/// Why this system can't have a device at all; None where it may.
pub fn unsupported_reason(device: Device) -> Option<&'static str> {
    match (device, cfg!(target_os = "macos")) {
        (Device::AppleGpu, false) => Some("needs macOS on Apple silicon"),
        (Device::NvidiaGpu, true) => Some("CUDA does not exist on macOS"),
        _ => None,
    }
}

/// Why a device that fails its probe is absent.
pub fn failure_message(error: &anyhow::Error) -> String {
    format!("the device is there and can't compute: {error:#}")
}

/// Set to 1 in a process that measures MLX in TF32: MLX reads its own switch once a
/// process, so those cases have one to themselves.
pub const TF32_PROCESS: &str = "TRANSFORMER_BENCH_TF32";

/// Whether this is such a process.
pub fn is_tf32_process() -> bool {
    std::env::var_os(TF32_PROCESS).is_some_and(|v| v == "1")
}

/// Whether a case can only run in such a process.
pub fn needs_tf32_process(case: &Case) -> bool {
    case.backend.framework() == Framework::Mlx && case.method.precision == Precision::Tf32
}

/// Refuses what no backend can offer, whatever its framework.
pub fn check_supported(case: &Case) -> Result<(), Unsupported> {
    let no = |reason: &str| Err(Unsupported(reason.to_owned()));
    match case.method.variant {
        Variant::Overlap if case.shape.ranks() == 1 => {
            return no("one device exchanges nothing: see the same case with -dp2");
        }
        Variant::Eager | Variant::Overlap | Variant::Compile | Variant::Tuned => {}
        _ if case.shape.ranks() == 1 => {}
        _ => return no("ranks are measured plain, -overlap, -compile and -opt"),
    }
    match case.method.precision {
        Precision::F16 if case.workload.optimizes() => no(
            "AdamW in pure f16 divides by zero: squared gradients and ε = 1e-8 underflow; use bf16 or mixed",
        ),
        Precision::Mixed | Precision::Amp
            if matches!(
                case.workload,
                Workload::MatmulPeak | Workload::CopyPeak | Workload::AllReduce | Workload::OptimizerStep
            ) =>
        {
            no("mixed precision changes nothing here: see f32 and bf16")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_computes_wrongly_fails_the_probe() {
        let x = sanity_matrix();
        let row = |i: usize| (0..SANITY_WIDTH).map(move |j| (i, j));
        let sum = |(i, j): (usize, usize)| {
            (0..SANITY_WIDTH).map(|k| x[i * SANITY_WIDTH + k] * x[k * SANITY_WIDTH + j]).sum::<f32>()
        };
        let mut right: Vec<f32> = (0..SANITY_WIDTH).flat_map(row).map(sum).collect();
        check_sanity_product(&right).unwrap();
        right[SANITY_WIDTH + 1] += 1.0;
        assert!(check_sanity_product(&right).is_err());
        // What GitHub's paravirtual Metal device gives.
        assert!(check_sanity_product(&vec![0.0; SANITY_WIDTH * SANITY_WIDTH]).is_err());
        assert!(check_sanity_product(&[]).is_err());
    }
}
