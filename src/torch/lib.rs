//! The PyTorch backends: libtorch through `tch` on CPU, MPS and CUDA.
//!
//! `extension` wraps what tch lacks, `net` is the network, `leaves` its parameters, `step` the workloads.
//! `ranks` is what several processes exchange; `compiled` runs them as TorchInductor compiles them, in `packages` that `inductor/` makes.

mod compiled;
mod distributed;
mod extension;
mod network;
mod packages;
mod params;
mod step;

use std::path::Path;

use anyhow::Result;
use tch::{Device, Kind, Tensor};
use transformer_bench::backend::{
    self, Backend, Backends, Environment, LoadedCase, Sums, Unsupported, failure_message,
};
use transformer_bench::model::fixture::Fixture;
use transformer_bench::suite::{self, BackendId, Case, Precision, Variant};

/// PyTorch on one device.
struct Torch {
    id: BackendId,
    device: Device,
}

/// Finds the devices that this libtorch and this machine offer.
pub fn find() -> Backends {
    let mut found = Backends::default();
    let mut offer = |id, device, missing: Option<String>| match missing {
        None => found.available.push(Box::new(Torch { id, device })),
        Some(reason) => found.add_unavailable(id, reason),
    };
    offer(BackendId::TorchCpu, Device::Cpu, None);
    offer(BackendId::TorchMps, Device::Mps, mps_missing());
    offer(BackendId::TorchCuda, Device::Cuda(0), cuda_missing());
    found
}

fn mps_missing() -> Option<String> {
    if let Some(reason) = backend::unsupported_reason(suite::Device::AppleGpu) {
        return Some(reason.to_owned());
    }
    if !tch::utils::has_mps() {
        return Some("this Mac offers libtorch no MPS device".to_owned());
    }
    computes(Device::Mps).err().map(|error| failure_message(&error))
}

fn cuda_missing() -> Option<String> {
    if let Some(reason) = backend::unsupported_reason(suite::Device::NvidiaGpu) {
        return Some(reason.to_owned());
    }
    if let Err(reason) = extension::load_cuda() {
        return Some(reason);
    }
    if !tch::Cuda::is_available() {
        return Some("libtorch sees no NVIDIA GPU with a working driver".to_owned());
    }
    computes(Device::Cuda(0)).err().map(|error| failure_message(&error))
}

/// Whether a device gets a small product right.
fn computes(device: Device) -> Result<()> {
    extension::caught(|| {
        let side = backend::SANITY_WIDTH as i64;
        let x = Tensor::from_slice(&backend::sanity_matrix()).view([side, side]).to_device(device);
        let product = x.matmul(&x).to_device(Device::Cpu).view([-1]);
        backend::check_sanity_product(&Vec::<f32>::try_from(product)?)
    })
}

impl Backend for Torch {
    fn id(&self) -> BackendId {
        self.id
    }

    fn versions(&self) -> Vec<(String, String)> {
        let mut all = vec![
            ("PyTorch".to_owned(), extension::version()),
            ("PyTorch threads".to_owned(), tch::get_num_threads().to_string()),
        ];
        all.extend(extension::configuration());
        all
    }

    fn supports(&self, case: &Case) -> Result<(), Unsupported> {
        let compute = case.method.precision;
        let no = |reason: &str| Err(Unsupported(reason.to_owned()));
        backend::check_supported(case)?;
        match case.method.variant {
            Variant::CudaGraph if self.id != BackendId::TorchCuda => {
                return no("a graph is recorded on CUDA alone");
            }
            Variant::Compile if !compiled::offers(case.workload) => {
                return no("steps and blocks with gradients, and forward, are what is compiled");
            }
            Variant::Compile => {
                if let Some(reason) = packages::missing() {
                    return no(&reason);
                }
            }
            _ => {}
        }
        if compute == Precision::Amp && case.method.variant.captures_full_step() {
            return no("torch.autocast casts at every operation; a captured step casts once, as mixed does");
        }
        if compute == Precision::Tf32 && self.id != BackendId::TorchCuda {
            return no("TF32 is a format of NVIDIA's tensor cores");
        }
        Ok(())
    }

    fn load(&self, fixture: &Fixture) -> Result<Box<dyn LoadedCase>> {
        extension::allow_tf32(fixture.case.method.precision == Precision::Tf32)?;
        tch::manual_seed(1 + fixture.rank() as i64);
        extension::caught(|| {
            Ok(match fixture.case.method.variant {
                Variant::Compile => {
                    Box::new(compiled::Compiled::new(self.device, fixture)?) as Box<dyn LoadedCase>
                }
                _ => Box::new(step::Step::new(self.device, fixture)?),
            })
        })
    }

    fn devices(&self) -> (usize, &'static str) {
        match self.id {
            BackendId::TorchCuda => (tch::Cuda::device_count().max(0) as usize, "GPUs"),
            BackendId::TorchMps => (1, "GPU, and ranks of MPS need a Mac each"),
            _ => backend::cpu_device_count(),
        }
    }

    fn comm_backend(&self) -> &'static str {
        distributed::engine(self.id)
    }

    fn rendezvous_env(&self, ranks: usize, folder: &Path) -> Result<Vec<Environment>> {
        Ok(distributed::meeting(self.id, ranks, folder))
    }

    fn all_reduce_sum(&self, values: &[f32]) -> Result<Vec<f32>> {
        distributed::sum(values)
    }

    fn is_precompiled(&self, recipe: Variant) -> bool {
        recipe == Variant::Compile
    }

    fn needs_compile(&self, case: &Case) -> bool {
        self.is_precompiled(case.method.variant) && packages::of(case).iter().any(|package| !package.there())
    }

    fn compile(&self, case: &Case) -> Result<()> {
        packages::make(&packages::of(case))
    }

    /// The CPU's layer norm adds up its gradients in bf16 (measured: over 1,776 rows they are off by 15
    /// to 20 % of their norm); CUDA's in f32. What MPS does is not known, so the most is allowed.
    fn accumulation(&self) -> Sums {
        match self.id {
            BackendId::TorchCpu => Sums::NarrowInNorms,
            BackendId::TorchCuda => Sums::Wide,
            _ => Sums::Narrow,
        }
    }

    fn synchronize(&self) -> Result<()> {
        extension::synchronize(self.device)
    }

    fn memory_total(&self) -> Option<u64> {
        extension::memory_total(self.device)
    }

    fn reset_peak_memory(&self) -> Result<()> {
        extension::reset_peak_memory(self.device);
        Ok(())
    }

    fn peak_memory(&self) -> Option<u64> {
        extension::peak_memory(self.device)
    }
}

/// The type in which a precision stores parameters.
fn kind(compute: Precision) -> Kind {
    match compute {
        Precision::Bf16 => Kind::BFloat16,
        Precision::F16 => Kind::Half,
        Precision::F32 | Precision::Tf32 | Precision::Mixed | Precision::Amp => Kind::Float,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_fails_is_absent_with_its_reason() {
        computes(Device::Cpu).unwrap();
        if cfg!(target_os = "macos") {
            println!("skipped: this system has an MPS device");
            return;
        }
        let reason = failure_message(&computes(Device::Mps).unwrap_err());
        assert!(reason.contains("can't compute") && reason.to_lowercase().contains("mps"), "{reason}");
        assert!(!reason.contains('\n'), "{reason}");
    }
}
