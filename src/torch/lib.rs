//! The PyTorch backends: libtorch through `tch` on CPU, MPS and CUDA.
//!
//! `network` is the model, `params` and `leaves` its parameters, `step` the workloads, and `accumulation` adds up gradients of
//! micro-batches. `optimizer` has AdamW and Muon. `compiled_step` runs the packages that `inductor` builds. `distributed` connects ranks, and `extension`
//! wraps C++ functions that tch lacks.

mod accumulation;
mod autograd;
mod checkpoint;
mod compiled_step;
mod distributed;
mod extension;
mod inductor;
mod leaves;
mod network;
mod optimizer;
mod params;
mod segments;
mod step;

use std::path::Path;

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};
use transformer_bench::backend::{
    self, Accumulation, Backend, Backends, CompileReport, EnvVars, LoadedCase, LoadedOperation, Unsupported,
};
use transformer_bench::fixture::{Fixture, OperationFixture};
use transformer_bench::suite::{BackendId, Case, Method, Precision, Variant};

/// PyTorch on one device.
struct Torch {
    id: BackendId,
    device: Device,
}

/// Detects the devices of this machine that this libtorch supports.
pub fn find() -> Backends {
    let mut found = Backends::default();
    for (id, device) in [
        (BackendId::TorchCpu, Device::Cpu),
        (BackendId::TorchMps, Device::Mps),
        (BackendId::TorchCuda, Device::Cuda(0)),
    ] {
        found.add(Torch { id, device }, check_available(id, device));
    }
    found
}

/// Checks that this machine has a device, and that it works.
///
/// # Errors
/// Returns the reason if it does not.
fn check_available(id: BackendId, device: Device) -> Result<()> {
    backend::check_system(id.device())?;
    match device {
        Device::Mps => ensure!(tch::utils::has_mps(), "libtorch finds no MPS device on this Mac"),
        Device::Cuda(_) => {
            extension::load_cuda()?;
            ensure!(tch::Cuda::is_available(), "libtorch finds no NVIDIA GPU with a working driver");
        }
        _ => return Ok(()),
    }
    check_computes(device)
}

/// Checks that a device computes a small matrix product correctly.
fn check_computes(device: Device) -> Result<()> {
    backend::check_sanity_product(|x, n| {
        extension::catch_panics(|| {
            let x = Tensor::from_slice(x).view([i64::from(n); 2]).to_device(device);
            Ok(Vec::try_from(x.matmul(&x).to_device(Device::Cpu).view([-1]))?)
        })
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
        backend::check_supported(case)?;
        let (Method { precision, variant }, cuda) = (case.method, self.id == BackendId::TorchCuda);
        if variant == Variant::Compile {
            inductor::check_supported(case.workload)?;
        }
        let reason = match (precision, variant) {
            (_, Variant::Sdpa) if case.caps_scores() => {
                "scaled_dot_product_attention has no soft cap of the scores, which this model has"
            }
            (_, Variant::CudaGraph) if !cuda => "CUDA graphs need CUDA",
            (Precision::Amp, _) if variant.captures_full_step() => {
                "torch.autocast casts in every operation, but a captured step casts once, as mixed does"
            }
            (Precision::Tf32, _) if self.id.is_cpu() => "PyTorch has TF32 only on GPUs",
            (Precision::Tf32, _) if !cuda => "PyTorch has no TF32 products on MPS",
            _ => return Ok(()),
        };
        Err(Unsupported(reason.to_owned()))
    }

    fn make(&self, fixture: &Fixture) -> Result<()> {
        match fixture.case.method.variant {
            Variant::Compile => inductor::package_of(fixture).build(),
            _ => Ok(()),
        }
    }

    fn load(&self, fixture: &Fixture) -> Result<Box<dyn LoadedCase>> {
        let Method { precision, variant } = fixture.case.method;
        extension::allow_tf32(precision == Precision::Tf32)?;
        tch::manual_seed(1 + fixture.rank() as i64);
        extension::catch_panics(|| {
            Ok(match variant {
                Variant::Compile => Box::new(compiled_step::CompiledStep::new(self.device, fixture)?),
                _ => Box::new(step::Step::new(self.device, fixture)?) as Box<dyn LoadedCase>,
            })
        })
    }

    fn load_operation(&self, fixture: &OperationFixture) -> Result<Box<dyn LoadedOperation>> {
        extension::allow_tf32(fixture.step.case.method.precision == Precision::Tf32)?;
        tch::manual_seed(1);
        extension::catch_panics(|| {
            Ok(Box::new(network::Operation::new(self.device, fixture)?) as Box<dyn LoadedOperation>)
        })
    }

    fn is_precompiled(&self, variant: Variant) -> bool {
        variant == Variant::Compile
    }

    fn needs_compile(&self, case: &Case) -> bool {
        self.is_precompiled(case.method.variant)
            && inductor::packages_for(case).iter().any(|package| !package.is_built())
    }

    fn compile(&self, cases: &[Case], report: &mut CompileReport) {
        inductor::build_all(cases, report)
    }

    fn devices(&self) -> (usize, &'static str) {
        match self.id {
            BackendId::TorchCuda => (tch::Cuda::device_count().max(0) as usize, "GPUs"),
            BackendId::TorchMps => (1, "GPU, and ranks of MPS need a Mac each"),
            _ => backend::cpu_device_count(),
        }
    }

    fn comm_backend(&self) -> &'static str {
        distributed::comm_backend(self.id)
    }

    fn rendezvous_env(&self, ranks: usize, folder: &Path) -> Result<Vec<EnvVars>> {
        Ok(distributed::rendezvous_env(self.id, ranks, folder))
    }

    fn all_reduce_sum(&self, values: &[f32]) -> Result<Vec<f32>> {
        distributed::all_reduce_sum(values)
    }

    /// On the CPU, the gradients of layer norm accumulate in bf16. Over 1,776 rows, their error was 15 to 20 % of their
    /// norm. CUDA accumulates in f32. The accumulation type of MPS is unknown, so MPS gets the largest tolerance.
    fn accumulation(&self) -> Accumulation {
        match self.id {
            BackendId::TorchCpu => Accumulation::NarrowInNorms,
            BackendId::TorchCuda => Accumulation::Wide,
            _ => Accumulation::Narrow,
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

/// Returns the type in which a precision stores parameters.
fn kind(precision: Precision) -> Kind {
    match precision {
        Precision::Bf16 => Kind::BFloat16,
        Precision::F16 => Kind::Half,
        Precision::F32 | Precision::Tf32 | Precision::Mixed | Precision::Amp => Kind::Float,
    }
}

/// Returns the type in which the network of a precision computes. `torch.autocast` casts inside its operations.
fn compute_kind(precision: Precision) -> Kind {
    if precision == Precision::Mixed { Kind::BFloat16 } else { kind(precision) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_libraries_of_libtorch_are_read_from_its_description() {
        let text = "PyTorch built with:\n  - GCC 13.3\n  - C++ Version: 201703\n  - Intel(R) MKL-DNN v3.11.2 (Git \
                    Hash a)\n  - OpenMP 201511 (a.k.a. OpenMP 4.5)\n  - CUDA Runtime 13.0\n  - CuDNN 91.9.0\n  - Build \
                    settings: BLAS_INFO=open, BUILD_TYPE=Release\nCPU capability: AVX512";
        let expected = [
            ("PyTorch compiler", "GCC 13.3"),
            ("PyTorch oneDNN", "3.11.2"),
            ("PyTorch OpenMP", "201511"),
            ("PyTorch CUDA", "13.0"),
            ("PyTorch cuDNN", "91.9.0"),
            ("PyTorch instruction set", "AVX512"),
            ("PyTorch BLAS", "OPEN"),
        ];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(extension::parse_configuration(text), expected);
    }

    #[test]
    fn a_device_that_fails_is_unavailable_with_a_reason() {
        check_computes(Device::Cpu).unwrap();
        if cfg!(target_os = "macos") {
            println!("skipped: this system has an MPS device");
            return;
        }
        let reason = format!("{:#}", check_computes(Device::Mps).unwrap_err());
        assert!(reason.contains("cannot compute") && reason.to_lowercase().contains("mps"), "{reason}");
        assert!(!reason.contains('\n'), "{reason}");
    }
}
