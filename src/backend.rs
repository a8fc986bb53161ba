//! The two traits that a framework implements to be measured.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::fixture::{Fixture, OperationFixture, Tensor};
pub use crate::reference::Accumulation;
use crate::rendezvous;
use crate::suite::{BackendId, Case, Device, Framework, MAX_BATCH, Precision, Shape, Variant, Workload};
use crate::text::variable;

/// Reason why a case cannot run here, as the report shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsupported(pub String);

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Receives a case with the time after which it was compiled, or with the error of its compiler.
pub type CompileReport<'a> = dyn FnMut(&Case, Result<Duration>) + 'a;

/// A framework on a device of this machine.
pub trait Backend {
    fn id(&self) -> BackendId;

    /// Returns names and versions of the framework, BLAS and driver, and the thread count.
    fn versions(&self) -> Vec<(String, String)>;

    /// Checks that the backend can run a case.
    ///
    /// # Errors
    /// Returns the reason if it cannot.
    fn supports(&self, case: &Case) -> Result<(), Unsupported>;

    /// Makes what [`Backend::load`] needs for a fixture and a cache saves for later processes.
    ///
    /// # Errors
    /// Returns an error if a compiler fails.
    fn make(&self, _fixture: &Fixture) -> Result<()> {
        Ok(())
    }

    /// Loads a fixture onto the device.
    fn load(&self, fixture: &Fixture) -> Result<Box<dyn LoadedCase>>;

    /// Loads a pass of an operation of a training step onto the device.
    ///
    /// # Errors
    /// Returns an error if the backend does not have the operation.
    fn load_operation(&self, fixture: &OperationFixture) -> Result<Box<dyn LoadedOperation>>;

    /// Returns true if cases of this variant are compiled ahead of time (about a minute per case, cached).
    fn is_precompiled(&self, _variant: Variant) -> bool {
        false
    }

    /// Returns true if a case is not compiled yet. [`Backend::load`] compiles it too.
    fn needs_compile(&self, _case: &Case) -> bool {
        false
    }

    /// Compiles cases side by side, unless the cache has them. Calls `report` once for each case, with the time since
    /// the start or the last line of the compiler.
    fn compile(&self, _cases: &[Case], _report: &mut CompileReport) {}

    /// Returns the number of devices that ranks can use, and their name. The devices of a CPU are its cores.
    fn devices(&self) -> (usize, &'static str);

    /// Returns the library that all-reduces gradients between ranks.
    fn comm_backend(&self) -> &'static str;

    /// Returns the rendezvous environment of each local rank (`RANK`, `WORLD_SIZE`, …). `folder` is private to
    /// this group of ranks.
    ///
    /// # Errors
    /// Returns an error if no rendezvous file or port is available.
    fn rendezvous_env(&self, ranks: usize, folder: &Path) -> Result<Vec<EnvVars>>;

    /// All-reduces `values` (sum) over all ranks. It also serves as a barrier.
    ///
    /// # Errors
    /// Returns an error if a rank has ended or does not answer within [`COLLECTIVE_TIMEOUT`].
    fn all_reduce_sum(&self, values: &[f32]) -> Result<Vec<f32>>;

    /// Returns the type in which sums over rows accumulate. It determines the tolerance of gradients.
    fn accumulation(&self) -> Accumulation;

    /// Waits until the device is idle.
    fn synchronize(&self) -> Result<()>;

    /// Returns the memory of the device in bytes, if the framework reports it.
    fn memory_total(&self) -> Option<u64>;

    /// Frees cached memory and resets the peak.
    fn reset_peak_memory(&self) -> Result<()>;

    /// Returns the peak of the framework's allocator in bytes since the reset, if it counts one.
    fn peak_memory(&self) -> Option<u64>;

    /// Captures the work of Apple's GPU while `body` runs, as a `.gputrace` for Xcode at an absolute path.
    ///
    /// # Errors
    /// Returns an error that names an alternative if the framework cannot capture.
    fn capture_gpu_trace(&self, _path: &Path, _body: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        bail!("{} cannot capture a GPU trace: use the Metal System Trace template of Instruments", self.id())
    }
}

/// A case loaded onto a device.
pub trait LoadedCase {
    /// Runs one step and returns when every result exists on the device.
    fn step(&mut self) -> Result<()>;

    /// Times `steps` steps. Each step waits for its results, so no work moves into the next one.
    fn time(&mut self, steps: u64) -> Result<Duration> {
        let start = Instant::now();
        if !self.run_pipelined(steps)? {
            for _ in 0..steps {
                self.step()?;
            }
        }
        Ok(start.elapsed())
    }

    /// Runs steps without waiting between them. Returns false if the case is not timed in this way.
    fn run_pipelined(&mut self, _steps: u64) -> Result<bool> {
        Ok(false)
    }

    /// Returns the statistics of the ranks if other processes run the case.
    fn rank_stats(&mut self) -> Option<RankStats> {
        None
    }

    /// Profiles the first rank for about `time` if other processes run the case. Writes the profiles to
    /// `folder`, and returns a message for the user.
    fn profile_first_rank(&mut self, _time: Duration, _folder: &Path) -> Option<Result<String>> {
        None
    }

    /// Copies the inputs of `fixture` into the buffers of the case. An optimizer step's inputs are its gradients.
    fn set_inputs(&mut self, fixture: &Fixture) -> Result<()>;

    /// Returns the parameters (`param/<parameter>`), and if the workload optimizes also AdamW's moments
    /// (`moment1/<parameter>`, `moment2/<parameter>`) and its number of steps (`step`), in f32.
    fn checkpoint(&mut self) -> Result<Vec<Tensor>>;

    /// Continues from a checkpoint, and draws the next dropout masks from `seed`. Tensors that `checkpoint` leaves
    /// out keep their values.
    fn restore(&mut self, checkpoint: &[Tensor], seed: u64) -> Result<()>;

    /// Returns the results of the last step in f32, for the parity check; untimed.
    ///
    /// Names are the outputs of the model (`out`, `selection`, `weights`, `logits`), `loss`,
    /// `grad/<parameter>`, `grad/x`, and `param/<parameter>` after an optimizer step.
    fn outputs(&mut self) -> Result<Vec<Tensor>>;
}

/// A pass of an operation, loaded onto a device.
pub trait LoadedOperation {
    /// Times `runs` runs, and returns when all results of each run exist on the device. A backward pass is timed without
    /// the forward pass that it needs.
    fn time(&mut self, runs: u64) -> Result<Duration>;

    /// Returns the results of the last run in f32: `out` or `loss`, and `grad/<operand>` for each gradient of the pass.
    fn outputs(&mut self) -> Result<Vec<Tensor>>;
}

/// Returns the names of a step's results, without the gradients of parameters and the updated parameters.
pub fn result_names(case: &Case) -> &'static [&'static str] {
    match (case.workload, case.shape) {
        (Workload::ForwardBackward | Workload::TrainStep, _) => &["loss"],
        (Workload::AttentionGrad | Workload::FeedForwardGrad, _) => &["grad/x"],
        (Workload::OptimizerStep, _) => &[],
        (_, Shape::Model { model, .. }) => model.output_names(),
        _ => &["out"],
    }
}

/// Statistics of the ranks of a case.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RankStats {
    /// See [`Backend::comm_backend`].
    pub comm_backend: String,
    /// Largest peak of any rank in bytes: of its allocator, and of its resident size.
    pub peak_bytes: Option<u64>,
    pub rss_peak_bytes: Option<u64>,
    /// Largest share of time that the runnable threads of a rank waited for a core.
    pub cpu_wait_share: f64,
    /// Rank skew: the extra time of the slowest rank over the fastest, as a share. The median over samples.
    pub skew: f64,
    /// Exposed communication as a share of the step, `1 - t_no_sync / t_step`: `[median, low, high]` (96 % CI),
    /// interleaved on the same ranks.
    pub exposed_communication: Option<[f64; 3]>,
}

/// Timeout of a collective operation. A user learns within 30 s that a rank is missing.
pub const COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(18);

/// Returns the number of cores that this process may use, and their name.
pub fn cpu_device_count() -> (usize, &'static str) {
    (std::thread::available_parallelism().map_or(1, usize::from), "cores")
}

/// Returns CUDA's name of the n-th visible GPU, for the `CUDA_VISIBLE_DEVICES` of a rank.
pub fn visible_gpu(n: usize) -> String {
    let visible = std::env::var_os("CUDA_VISIBLE_DEVICES").unwrap_or_default();
    let visible = visible.to_string_lossy();
    let name = visible.split(',').map(str::trim).filter(|name| !name.is_empty()).nth(n);
    name.map_or_else(|| n.to_string(), str::to_owned)
}

/// Variables and their values.
pub type EnvVars = Vec<(String, String)>;

/// Returns the environment of each local rank: `variables` of the rank, and its own GPU if the backend runs on CUDA.
pub fn rank_environments(
    id: BackendId,
    ranks: usize,
    variables: impl Fn(usize) -> Vec<(&'static str, String)>,
) -> Vec<EnvVars> {
    let environment = |rank: usize| {
        let mut all = variables(rank);
        if id.device() == Device::NvidiaGpu {
            all.push(("CUDA_VISIBLE_DEVICES", visible_gpu(rank)));
        }
        all.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    };
    (0..ranks).map(environment).collect()
}

/// This process as one of several that share a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rank {
    pub index: usize,
    pub count: usize,
}

impl Rank {
    /// Reads the rank that this suite, `torchrun` or `mlx.launch` set. Returns `None` for a single process.
    /// <https://docs.pytorch.org/docs/stable/elastic/run.html>,
    /// <https://ml-explore.github.io/mlx/build/html/usage/distributed.html>
    ///
    /// # Errors
    /// Returns an error if a variable is invalid.
    pub fn from_environment(framework: Framework) -> Result<Option<Self>> {
        let (name, size_name) = match framework {
            Framework::Torch => ("RANK", "WORLD_SIZE"),
            Framework::Mlx => ("MLX_RANK", "MLX_WORLD_SIZE"),
        };
        let hosts =
            std::env::var_os("MLX_HOSTFILE").filter(|path| framework == Framework::Mlx && !path.is_empty());
        let count = match (variable(size_name)?, hosts) {
            (Some(size), _) => size.parse().with_context(|| format!("{size_name}={size} is not a number"))?,
            (None, Some(path)) => rendezvous::count_hosts(Path::new(&path)).context("MLX_HOSTFILE")?,
            (None, None) => return Ok(None),
        };
        let Some(index) = variable(name)? else { return Ok(None) };
        let index = index.parse().with_context(|| format!("{name}={index} is not a number"))?;
        ensure!(count <= MAX_BATCH, "{size_name}={count} is too large: use at most {MAX_BATCH}");
        ensure!(index < count, "{name}={index} is out of range (world size {count})");
        if count > 1 {
            rendezvous::check_environment(framework)?;
        }
        Ok((count > 1).then_some(Self { index, count }))
    }
}

/// A backend that this machine does not have.
#[derive(Clone, Debug)]
pub struct Unavailable {
    pub id: BackendId,
    pub reason: String,
}

/// The backends of a framework, as detected at run time.
#[derive(Default)]
pub struct Backends {
    pub available: Vec<Box<dyn Backend>>,
    pub unavailable: Vec<Unavailable>,
}

impl Backends {
    /// Adds a backend, or the reason why this machine does not have it.
    pub fn add(&mut self, backend: impl Backend + 'static, check: Result<()>) {
        match check {
            Ok(()) => self.available.push(Box::new(backend)),
            Err(error) => {
                self.unavailable.push(Unavailable { id: backend.id(), reason: format!("{error:#}") });
            }
        }
    }

    pub fn get(&self, id: BackendId) -> Option<&dyn Backend> {
        self.available.iter().find(|b| b.id() == id).map(Box::as_ref)
    }
}

/// Checks that a device multiplies a small matrix correctly. `square` computes the product of a matrix [n, n] with itself.
///
/// # Errors
/// Returns an error if the device cannot compute, or if a number differs from the product on the host.
pub fn check_sanity_product(square: impl FnOnce(&[f32], i32) -> Result<Vec<f32>>) -> Result<()> {
    const N: usize = 32;
    // Small integers are exact in every format.
    let x: Vec<f32> = (0..N * N).map(|i| (i % 7) as f32).collect();
    let element = |i: usize| (0..N).map(|k| x[i / N * N + k] * x[k * N + i % N]).sum::<f32>();
    let expected: Vec<f32> = (0..N * N).map(element).collect();
    let check = || -> Result<()> {
        ensure!(square(&x, N as i32)? == expected, "a small matrix product is wrong");
        Ok(())
    };
    check().context("the device exists and cannot compute")
}

/// Checks that a device can exist on this operating system.
///
/// # Errors
/// Returns the reason if it cannot.
pub fn check_system(device: Device) -> Result<()> {
    match (device, cfg!(target_os = "macos")) {
        (Device::AppleGpu, false) => bail!("needs macOS on Apple silicon"),
        (Device::NvidiaGpu, true) => bail!("CUDA does not exist on macOS"),
        _ => Ok(()),
    }
}

/// Variable that is 1 in a process that measures MLX in TF32. MLX reads its TF32 switch once per process, so
/// these cases have a process of their own.
pub const TF32_VARIABLE: &str = "TRANSFORMER_BENCH_TF32";

/// Returns true in a process for TF32 cases.
pub fn is_tf32_process() -> bool {
    std::env::var_os(TF32_VARIABLE).is_some_and(|v| v == "1")
}

/// Returns true if a case needs a process for TF32 cases.
pub fn needs_tf32_process(case: &Case) -> bool {
    case.backend.framework() == Framework::Mlx && case.method.precision == Precision::Tf32
}

/// Checks that a case makes sense for any framework.
///
/// # Errors
/// Returns the reason if it does not.
pub fn check_supported(case: &Case) -> Result<(), Unsupported> {
    let no = |reason: &str| Err(Unsupported(reason.to_owned()));
    match case.method.variant {
        Variant::Overlap if case.shape.ranks() == 1 => {
            return no("one device has no communication: use the same case with -dp2");
        }
        variant if variant.reduces_memory() && !case.workload.has_loss() => {
            return no(
                "the variant reduces the memory of a backward pass from a loss, which this workload does not have",
            );
        }
        Variant::ChunkedLoss if !case.is_language_model() => {
            return no("only a cross-entropy over a vocabulary can be computed in chunks");
        }
        Variant::Eager | Variant::Overlap | Variant::Compile | Variant::Tuned => {}
        _ if case.shape.ranks() == 1 => {}
        _ => return no("data-parallel cases have the variants eager, -overlap, -compile and -tuned"),
    }
    match case.method.precision {
        Precision::F16 if case.workload.optimizes() && case.has_adapters() => {
            no("training in f16 needs scaled losses, which the suite does not have; use bf16 or mixed")
        }
        Precision::F16 if case.workload.optimizes() => no(
            "AdamW in pure f16 divides by zero: squared gradients and ε = 1e-8 underflow; use bf16 or mixed",
        ),
        Precision::Mixed | Precision::Amp
            if matches!(
                case.workload,
                Workload::MatmulPeak | Workload::CopyPeak | Workload::AllReduce | Workload::OptimizerStep
            ) =>
        {
            no("mixed precision does not change this workload: use f32 or bf16")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_computes_wrongly_fails_the_sanity_product() {
        let product = |x: &[f32], n: i32| -> Vec<f32> {
            let n = n as usize;
            let row = |i: usize| &x[i * n..(i + 1) * n];
            let dot =
                |i: usize, j: usize| row(i).iter().zip(x.iter().skip(j).step_by(n)).map(|(a, b)| a * b).sum();
            (0..n * n).map(|at| dot(at / n, at % n)).collect()
        };
        check_sanity_product(|x, n| Ok(product(x, n))).unwrap();
        let off_by_one = |x: &[f32], n: i32| {
            let mut all = product(x, n);
            all[n as usize + 1] += 1.0;
            Ok(all)
        };
        assert!(check_sanity_product(off_by_one).is_err());
        // GitHub's paravirtual Metal device returns zeros.
        assert!(check_sanity_product(|x, _| Ok(vec![0.0; x.len()])).is_err());
        assert!(check_sanity_product(|_, _| Ok(Vec::new())).is_err());
    }
}
