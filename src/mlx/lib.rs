//! The MLX backends: `mlx-rs` on CPU, Metal and CUDA.
//!
//! `network` is the model, `program` a step as functions of arrays, `optimizer` AdamW and Muon, `step` the state that they update, and `distributed`
//! connects ranks. `library` wraps functions of mlx-c that mlx-rs lacks.

mod distributed;
mod library;
mod network;
mod optimizer;
mod program;
mod recompute;
mod step;

use std::path::Path;

use anyhow::{Result, ensure};
use mlx_rs::{Array, Device, DeviceType, Dtype};
use transformer_bench::backend::{
    self, Accumulation, Backend, Backends, EnvVars, LoadedCase, LoadedOperation, Unsupported,
};
use transformer_bench::fixture::{Fixture, OperationFixture};
use transformer_bench::installation;
use transformer_bench::suite::{BackendId, Case, Framework, Method, Precision, Variant};

/// MLX on one device.
struct Mlx {
    id: BackendId,
}

/// Detects the devices of this machine that this build of MLX supports.
pub fn find() -> Backends {
    library::set_tf32_switch();
    let mut found = Backends::default();
    for &id in BackendId::ALL.iter().filter(|id| id.framework() == Framework::Mlx) {
        found.add(Mlx { id }, check_available(id));
    }
    found
}

/// Checks that this machine has a device, and that it works.
///
/// # Errors
/// Returns the reason if it does not.
fn check_available(id: BackendId) -> Result<()> {
    if id.is_cpu() {
        return Ok(());
    }
    backend::check_system(id.device())?;
    ensure!(id != BackendId::MlxCuda || library::is_built_with_cuda(), "{}", installation::cpu_build("MLX"));
    ensure!(library::has_gpu(), "MLX finds no GPU on this machine");
    check_computes(DeviceType::Gpu)
}

/// Checks that a device computes a small matrix product correctly.
fn check_computes(device: DeviceType) -> Result<()> {
    backend::check_sanity_product(|x, n| {
        let device = Device::new(device, 0);
        Device::set_default(&device);
        // MLX does not change the default if it does not have the device.
        ensure!(Device::try_default()? == device, "MLX computes on another device instead");
        let x = Array::from_slice(x, &[n, n]);
        let product = x.matmul(&x)?;
        product.eval()?;
        Ok(product.try_as_slice::<f32>()?.to_vec())
    })
}

impl Mlx {
    fn device(&self) -> Device {
        let kind = if self.id.is_cpu() { DeviceType::Cpu } else { DeviceType::Gpu };
        Device::new(kind, 0)
    }
}

impl Backend for Mlx {
    fn id(&self) -> BackendId {
        self.id
    }

    fn versions(&self) -> Vec<(String, String)> {
        let mut all = vec![("MLX".to_owned(), library::version())];
        all.extend(library::blas());
        all
    }

    fn supports(&self, case: &Case) -> Result<(), Unsupported> {
        backend::check_supported(case)?;
        let Method { precision, variant } = case.method;
        let tf32 = precision == Precision::Tf32;
        let reason = match (precision, variant) {
            (_, Variant::FusedAdamw) => "MLX has no fused optimizer; compiling the step fuses it",
            (_, Variant::CudaGraph) => "MLX uses CUDA graphs without being asked",
            (_, Variant::Sdpa) if case.dropout().weights > 0.0 => {
                "MLX's fused attention has no dropout on the weights, and this model trains with it"
            }
            (_, Variant::Sdpa) if case.caps_scores() => {
                "MLX's fused attention has no soft cap of the scores, which this model has"
            }
            (Precision::Amp, _) => "MLX has no autocast; mixed computes in bf16 in both frameworks",
            _ if tf32 && self.id.is_cpu() => "MLX has TF32 only on GPUs",
            _ if tf32 && self.id == BackendId::MlxMetal && !library::uses_neural_accelerators() => {
                "TF32 needs the neural accelerators of an M5 and macOS 26.2; without them it is f32"
            }
            _ if tf32 != backend::is_tf32_process() => {
                "MLX reads its TF32 switch once per process, and this process has the other setting"
            }
            _ => return Ok(()),
        };
        Err(Unsupported(reason.to_owned()))
    }

    fn load(&self, fixture: &Fixture) -> Result<Box<dyn LoadedCase>> {
        Device::set_default(&self.device());
        Ok(Box::new(step::Step::new(fixture)?))
    }

    fn load_operation(&self, fixture: &OperationFixture) -> Result<Box<dyn LoadedOperation>> {
        Device::set_default(&self.device());
        Ok(Box::new(network::Operation::new(fixture)?))
    }

    fn devices(&self) -> (usize, &'static str) {
        match self.id {
            BackendId::MlxCuda => (library::gpu_count(), "GPUs"),
            BackendId::MlxMetal => (1, "GPU, and ranks of Metal need a Mac each"),
            _ => backend::cpu_device_count(),
        }
    }

    fn comm_backend(&self) -> &'static str {
        distributed::comm_backend(self.id)
    }

    fn rendezvous_env(&self, ranks: usize, folder: &Path) -> Result<Vec<EnvVars>> {
        distributed::rendezvous_env(self.id, ranks, folder)
    }

    fn all_reduce_sum(&self, values: &[f32]) -> Result<Vec<f32>> {
        Device::set_default(&self.device());
        distributed::all_reduce_sum(values)
    }

    /// MLX 0.32 accumulates in the type of the result: see `strided_reduce` of its CPU backend, and `totals` in
    /// `reduction/reduce_col.h` of its Metal backend. On a CPU, the gradients of biases and norms over 1,776 rows of
    /// bf16 had an error of 40 to 60 % of their norm.
    fn accumulation(&self) -> Accumulation {
        Accumulation::Narrow
    }

    fn synchronize(&self) -> Result<()> {
        library::synchronize(self.id.is_cpu())
    }

    fn memory_total(&self) -> Option<u64> {
        if self.id.is_cpu() { None } else { library::memory_total() }
    }

    fn reset_peak_memory(&self) -> Result<()> {
        mlx_rs::memory::clear_cache()?;
        Ok(mlx_rs::memory::reset_peak_memory()?)
    }

    fn peak_memory(&self) -> Option<u64> {
        mlx_rs::memory::peak_memory().ok().map(|bytes| bytes as u64)
    }

    fn capture_gpu_trace(&self, path: &Path, body: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        ensure!(self.id == BackendId::MlxMetal, "{} cannot capture a Metal trace", self.id);
        library::capture_gpu_trace(path, body)
    }
}

/// Returns the type in which a precision stores parameters.
fn dtype(precision: Precision) -> Dtype {
    match precision {
        Precision::Bf16 => Dtype::Bfloat16,
        Precision::F16 => Dtype::Float16,
        Precision::F32 | Precision::Tf32 | Precision::Mixed | Precision::Amp => Dtype::Float32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_computes_and_a_missing_gpu_has_a_reason() {
        check_computes(DeviceType::Cpu).unwrap();
        if library::has_gpu() {
            println!("skipped: this machine has a GPU");
            return;
        }
        let reason = format!("{:#}", check_computes(DeviceType::Gpu).unwrap_err());
        assert!(reason.contains("cannot compute"), "{reason}");
        Device::set_default(&Device::new(DeviceType::Cpu, 0));
    }
}
