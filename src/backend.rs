//! What a framework must offer to be measured.

use std::fmt;
use std::path::Path;

use anyhow::{Result, bail};

use crate::model::fixture::{Fixture, Tensor};
pub use crate::model::oracle::rounding::Sums;
use crate::suite::{BackendId, Case, Compute, Device, Framework, Recipe, Workload};

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
    fn prepare(&self, fixture: &Fixture) -> Result<Box<dyn Prepared>>;

    /// Whether the code of a recipe's cases is made before they can run: a minute each, once.
    fn is_made(&self, _recipe: Recipe) -> bool {
        false
    }

    /// Whether a case's code is still to be made; preparing the case makes it too.
    fn unmade(&self, _case: &Case) -> bool {
        false
    }

    /// Makes a case's code, where it is not there.
    ///
    /// # Errors
    /// Where it can't be made, with the compiler's last line.
    fn make(&self, _case: &Case) -> Result<()> {
        Ok(())
    }

    /// In which type it keeps sums over rows: decides what a gradient may be off by.
    fn sums(&self) -> Sums;

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
pub trait Prepared {
    /// Does one iteration and returns only when every result exists on the device.
    fn step(&mut self) -> Result<()>;

    /// The results of the last step as f32, for parity; untimed. Names: what the model
    /// puts out (`out`, `selection`, `weights`, `logits`), `loss`, `grad/<parameter>`,
    /// `grad/x`, and `param/<parameter>` where an optimizer ran.
    fn outputs(&mut self) -> Result<Vec<Tensor>>;
}

/// A backend that this machine lacks.
#[derive(Clone, Debug)]
pub struct Absent {
    pub id: BackendId,
    pub reason: String,
}

/// What a framework finds at run time: each of its backends is in one of the two lists.
#[derive(Default)]
pub struct Found {
    pub present: Vec<Box<dyn Backend>>,
    pub absent: Vec<Absent>,
}

impl Found {
    pub fn absent(&mut self, id: BackendId, reason: impl Into<String>) {
        self.absent.push(Absent { id, reason: reason.into() });
    }

    pub fn backend(&self, id: BackendId) -> Option<&dyn Backend> {
        self.present.iter().find(|b| b.id() == id).map(Box::as_ref)
    }
}

/// Width of the product that a device must get right before it counts as there.
pub const PROBE: usize = 32;

/// A matrix [PROBE, PROBE] of small integers, exact in every format and sum.
pub fn probe() -> Vec<f32> {
    (0..PROBE * PROBE).map(|i| (i % 7) as f32).collect()
}

/// Holds a device's product of [`probe`] with itself against the host's.
///
/// # Errors
/// Where a number differs.
pub fn check_probe(found: &[f32]) -> Result<()> {
    let x = probe();
    let cell =
        |i: usize| (0..PROBE).map(|k| x[i / PROBE * PROBE + k] * x[k * PROBE + i % PROBE]).sum::<f32>();
    let expected = (0..PROBE * PROBE).map(cell);
    if found.len() != x.len() || expected.zip(found).any(|(a, b)| a != *b) {
        bail!("a small matrix product comes out wrong");
    }
    Ok(())
}

/// Why this system can't have a device at all; None where it may.
pub fn impossible(device: Device) -> Option<&'static str> {
    match (device, cfg!(target_os = "macos")) {
        (Device::AppleGpu, false) => Some("needs macOS on Apple silicon"),
        (Device::NvidiaGpu, true) => Some("CUDA does not exist on macOS"),
        _ => None,
    }
}

/// Why a device that fails its probe is absent.
pub fn broken(error: &anyhow::Error) -> String {
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
    case.backend.framework() == Framework::Mlx && case.precision.compute == Compute::Tf32
}

/// Refuses what no backend can offer, whatever its framework.
pub fn meaningful(case: &Case) -> Result<(), Unsupported> {
    let no = |reason: &str| Err(Unsupported(reason.to_owned()));
    match case.precision.compute {
        Compute::F16 if case.workload.optimizes() => {
            no("AdamW in pure f16 divides by zero: squared gradients and ε = 1e-8 underflow; use bf16 or amp")
        }
        Compute::Amp | Compute::Autocast
            if matches!(
                case.workload,
                Workload::MatmulPeak | Workload::CopyPeak | Workload::OptimizerStep
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
        let x = probe();
        let row = |i: usize| (0..PROBE).map(move |j| (i, j));
        let sum =
            |(i, j): (usize, usize)| (0..PROBE).map(|k| x[i * PROBE + k] * x[k * PROBE + j]).sum::<f32>();
        let mut right: Vec<f32> = (0..PROBE).flat_map(row).map(sum).collect();
        check_probe(&right).unwrap();
        right[PROBE + 1] += 1.0;
        assert!(check_probe(&right).is_err());
        // What GitHub's paravirtual Metal device gives.
        assert!(check_probe(&vec![0.0; PROBE * PROBE]).is_err());
        assert!(check_probe(&[]).is_err());
    }
}
