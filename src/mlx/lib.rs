//! The MLX backends: `mlx-rs` on CPU, Metal and CUDA.
//!
//! `net` is the network, `step` the workloads, `ranks` what several processes exchange, `native` the little that Linux needs.

mod library;
mod net;
mod ranks;
mod step;

use std::path::Path;

use anyhow::{Result, ensure};
use mlx_rs::{Array, Device, DeviceType, Dtype};
use transformer_bench::backend::{self, Backend, Environment, Found, Prepared, Sums, Unsupported};
use transformer_bench::model::fixture::Fixture;
use transformer_bench::suite::{BackendId, Case, Compute, Framework, Recipe};

/// MLX on one device.
struct Mlx {
    id: BackendId,
}

/// Finds the devices that this build of MLX and this machine offer.
pub fn find() -> Found {
    library::pin_precision();
    let mut found = Found::default();
    let missing = |id: BackendId| -> Option<String> {
        if id.is_cpu() {
            return None;
        }
        if let Some(reason) = backend::impossible(id.device()) {
            return Some(reason.to_owned());
        }
        if id == BackendId::MlxCuda && !library::built_with_cuda() {
            return Some("this MLX is a CPU build (no NVIDIA driver when scripts/setup ran)".to_owned());
        }
        if !library::gpu_available() {
            return Some("MLX sees no GPU on this machine".to_owned());
        }
        computes(DeviceType::Gpu).err().map(|error| backend::broken(&error))
    };
    for &id in BackendId::ALL.iter().filter(|id| id.framework() == Framework::Mlx) {
        match missing(id) {
            None => found.present.push(Box::new(Mlx { id })),
            Some(reason) => found.absent(id, reason),
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
    let side = backend::PROBE as i32;
    let x = Array::from_slice(&backend::probe(), &[side, side]);
    let product = x.matmul(&x)?;
    product.eval()?;
    backend::check_probe(product.try_as_slice::<f32>()?)
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
        let compute = case.precision.compute;
        let no = |reason: &str| Err(Unsupported(reason.to_owned()));
        backend::meaningful(case)?;
        match case.precision.recipe {
            Recipe::Optimizer => return no("MLX has no fused optimizer: compiling the step fuses it"),
            Recipe::Graph => return no("MLX records graphs of its own accord"),
            Recipe::Attention if case.dropout().weights > 0.0 => {
                return no(
                    "MLX's fused attention has no dropout on the weights, and this model trains with it",
                );
            }
            _ => {}
        }
        if compute == Compute::Autocast {
            return no("MLX has no autocast: amp is the same computation in both frameworks");
        }
        if compute == Compute::Tf32 && self.id.is_cpu() {
            return no("MLX has TF32 on GPUs alone");
        }
        if compute == Compute::Tf32 && self.id == BackendId::MlxMetal && !library::neural_accelerators() {
            return no("TF32 needs the neural accelerators of an M5 and macOS 26.2: before, it is f32");
        }
        if (compute == Compute::Tf32) != backend::is_tf32_process() {
            return no("MLX reads its TF32 switch once a process, and this one has it the other way");
        }
        Ok(())
    }

    fn prepare(&self, fixture: &Fixture) -> Result<Box<dyn Prepared>> {
        Device::set_default(&self.device());
        Ok(Box::new(step::Step::new(fixture)?))
    }

    fn devices(&self) -> (usize, &'static str) {
        match self.id {
            BackendId::MlxCuda => (library::gpus(), "GPUs"),
            BackendId::MlxMetal => (1, "GPU, and ranks of Metal need a Mac each"),
            _ => backend::cores(),
        }
    }

    fn engine(&self) -> &'static str {
        ranks::engine(self.id)
    }

    fn meeting(&self, ranks: usize, folder: &Path) -> Result<Vec<Environment>> {
        ranks::meeting(self.id, ranks, folder)
    }

    fn sum(&self, values: &[f32]) -> Result<Vec<f32>> {
        Device::set_default(&self.device());
        ranks::sum(values)
    }

    /// MLX 0.32 accumulates in the type of the result: `strided_reduce` of its CPU backend, and
    /// `totals` in `reduction/reduce_col.h` of Metal's. Measured on a CPU: over 1,776 rows of bf16
    /// the gradients of biases and norms are off by 40 to 60 % of their norm.
    fn sums(&self) -> Sums {
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
fn dtype(compute: Compute) -> Dtype {
    match compute {
        Compute::Bf16 => Dtype::Bfloat16,
        Compute::F16 => Dtype::Float16,
        Compute::F32 | Compute::Tf32 | Compute::Amp | Compute::Autocast => Dtype::Float32,
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
        let reason = backend::broken(&computes(DeviceType::Gpu).unwrap_err());
        assert!(reason.contains("can't compute"), "{reason}");
        Device::set_default(&Device::new(DeviceType::Cpu, 0));
    }
}
