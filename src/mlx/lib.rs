//! The MLX backends: `mlx-rs` on CPU, Metal and CUDA.
//!
//! `net` is the network, `step` the workloads, `ranks` what several processes exchange, `native` the little that Linux needs.

mod distributed;
mod library;
mod network;
mod step;

use std::path::Path;

use anyhow::{Result, ensure};
use mlx_rs::{Array, Device, DeviceType, Dtype};
use transformer_bench::backend::{self, Backend, Backends, Environment, LoadedCase, Sums, Unsupported};
use transformer_bench::model::fixture::Fixture;
use transformer_bench::suite::{BackendId, Case, Framework, Precision, Variant};

/// MLX on one device.
struct Mlx {
    id: BackendId,
}

/// Finds the devices that this build of MLX and this machine offer.
pub fn find() -> Backends {
    library::pin_precision();
    let mut found = Backends::default();
    let missing = |id: BackendId| -> Option<String> {
        if id.is_cpu() {
            return None;
        }
        if let Some(reason) = backend::unsupported_reason(id.device()) {
            return Some(reason.to_owned());
        }
        if id == BackendId::MlxCuda && !library::built_with_cuda() {
            return Some("this MLX is a CPU build (no NVIDIA driver when scripts/setup ran)".to_owned());
        }
        if !library::gpu_available() {
            return Some("MLX sees no GPU on this machine".to_owned());
        }
        computes(DeviceType::Gpu).err().map(|error| backend::failure_message(&error))
    };
    for &id in BackendId::ALL.iter().filter(|id| id.framework() == Framework::Mlx) {
        match missing(id) {
            None => found.available.push(Box::new(Mlx { id })),
            Some(reason) => found.add_unavailable(id, reason),
        }
    }
    found
}

/// Whether a device gets a small product right.
fn computes(device: DeviceType) -> Result<()> {
    let device = Device::new(device, 0);
    Device::set_default(&device);
    // MLX leaves the default as it was where it has no such device.
    ensure!(Device::try_default()? == device, "MLX computes on another device instead");
    let side = backend::SANITY_WIDTH as i32;
    let x = Array::from_slice(&backend::sanity_matrix(), &[side, side]);
    let product = x.matmul(&x)?;
    product.eval()?;
    backend::check_sanity_product(product.try_as_slice::<f32>()?)
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
        let compute = case.method.precision;
        let no = |reason: &str| Err(Unsupported(reason.to_owned()));
        backend::check_supported(case)?;
        match case.method.variant {
            Variant::FusedAdamw => return no("MLX has no fused optimizer: compiling the step fuses it"),
            Variant::CudaGraph => return no("MLX records graphs of its own accord"),
            Variant::Sdpa if case.dropout().weights > 0.0 => {
                return no(
                    "MLX's fused attention has no dropout on the weights, and this model trains with it",
                );
            }
            _ => {}
        }
        if compute == Precision::Amp {
            return no("MLX has no autocast: mixed computes in bf16 in both frameworks");
        }
        if compute == Precision::Tf32 && self.id.is_cpu() {
            return no("MLX has TF32 on GPUs alone");
        }
        if compute == Precision::Tf32 && self.id == BackendId::MlxMetal && !library::neural_accelerators() {
            return no("TF32 needs the neural accelerators of an M5 and macOS 26.2: before, it is f32");
        }
        if (compute == Precision::Tf32) != backend::is_tf32_process() {
            return no("MLX reads its TF32 switch once a process, and this one has it the other way");
        }
        Ok(())
    }

    fn load(&self, fixture: &Fixture) -> Result<Box<dyn LoadedCase>> {
        Device::set_default(&self.device());
        Ok(Box::new(step::Step::new(fixture)?))
    }

    fn devices(&self) -> (usize, &'static str) {
        match self.id {
            BackendId::MlxCuda => (library::gpus(), "GPUs"),
            BackendId::MlxMetal => (1, "GPU, and ranks of Metal need a Mac each"),
            _ => backend::cpu_device_count(),
        }
    }

    fn comm_backend(&self) -> &'static str {
        distributed::engine(self.id)
    }

    fn rendezvous_env(&self, ranks: usize, folder: &Path) -> Result<Vec<Environment>> {
        distributed::meeting(self.id, ranks, folder)
    }

    fn all_reduce_sum(&self, values: &[f32]) -> Result<Vec<f32>> {
        Device::set_default(&self.device());
        distributed::sum(values)
    }

    /// MLX 0.32 accumulates in the type of the result: `strided_reduce` of its CPU backend, and
    /// `totals` in `reduction/reduce_col.h` of Metal's. Measured on a CPU: over 1,776 rows of bf16
    /// the gradients of biases and norms are off by 40 to 60 % of their norm.
    fn accumulation(&self) -> Sums {
        Sums::Narrow
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

    fn capture(&self, path: &Path, body: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        ensure!(self.id == BackendId::MlxMetal, "{} makes no Metal trace", self.id);
        library::capture(path, body)
    }
}

/// The type in which a precision stores parameters.
fn dtype(compute: Precision) -> Dtype {
    match compute {
        Precision::Bf16 => Dtype::Bfloat16,
        Precision::F16 => Dtype::Float16,
        Precision::F32 | Precision::Tf32 | Precision::Mixed | Precision::Amp => Dtype::Float32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_computes_and_a_missing_gpu_says_why() {
        computes(DeviceType::Cpu).unwrap();
        if library::gpu_available() {
            println!("skipped: this machine has a GPU");
            return;
        }
        let reason = backend::failure_message(&computes(DeviceType::Gpu).unwrap_err());
        assert!(reason.contains("can't compute"), "{reason}");
        Device::set_default(&Device::new(DeviceType::Cpu, 0));
    }
}
