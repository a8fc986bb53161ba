//! Data-parallel cases. The measuring process starts one rank per device ([`launcher`]), sends all of them the same
//! requests and waits for the slowest. If `torchrun` or `mlx.launch` started one process per rank, rank 0 measures
//! and leads the others ([`launched`]). [`rank_worker`] is one rank.

mod controller;
mod distributed_case;
mod failure;
mod launched;
mod launcher;
pub mod rank_worker;

use std::fs;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};
use transformer_bench::backend::{
    Accumulation, Backend, Backends, CompileReport, EnvVars, LoadedCase, LoadedOperation, Rank, Unsupported,
    visible_gpu,
};
use transformer_bench::files::Scratch;
use transformer_bench::fixture::{Fixture, OperationFixture};
use transformer_bench::suite::{BackendId, Case, Variant};
use transformer_bench::text::variable;

use controller::Controller;
use distributed_case::DistributedCase;
pub use launched::{run_follower, shutdown_followers};
pub use launcher::{RANK_BACKEND, pin_to_assigned_cores};

/// Makes only its own GPU visible to a rank that a launcher started. Must run before other threads start.
///
/// # Errors
/// Returns an error if `LOCAL_RANK` is not a number.
pub fn restrict_visible_gpu(rank: Option<Rank>) -> Result<()> {
    if let (Some(_), Some(local)) = (rank, variable("LOCAL_RANK")?) {
        let local = local.parse().with_context(|| format!("LOCAL_RANK={local} is not a number"))?;
        // SAFETY: no other thread runs yet.
        unsafe { std::env::set_var("CUDA_VISIBLE_DEVICES", visible_gpu(local)) };
    }
    Ok(())
}

/// Lets every backend run cases of several ranks. `rank` is the rank of this process if a launcher started it.
pub fn with_ranks(backends: Backends, rank: Option<Rank>) -> Backends {
    let wrap = |inner| Box::new(DistributedBackend { inner: Rc::from(inner), rank }) as Box<dyn Backend>;
    let available = backends.available.into_iter().map(wrap).collect();
    Backends { available, ..backends }
}

/// A backend that runs a case of several ranks as a [`DistributedCase`].
struct DistributedBackend {
    inner: Rc<dyn Backend>,
    rank: Option<Rank>,
}

/// Forwards methods to the inner backend.
macro_rules! forward {
    ($(fn $name:ident(&self $(, $argument:ident: $type:ty)*) -> $result:ty;)*) => {
        $(fn $name(&self $(, $argument: $type)*) -> $result { self.inner.$name($($argument),*) })*
    };
}

impl Backend for DistributedBackend {
    fn supports(&self, case: &Case) -> Result<(), Unsupported> {
        self.inner.supports(case)?;
        let ranks = case.shape.ranks();
        let (devices, kind) = self.inner.devices();
        match self.rank {
            Some(Rank { count, .. }) if ranks != count => {
                Err(Unsupported(format!("{count} ranks were launched, which run only cases with -dp{count}")))
            }
            None if ranks > 1 && ranks > devices => Err(Unsupported(format!(
                "needs one device for each of {ranks} ranks, and this machine has {devices} {kind}"
            ))),
            _ => Ok(()),
        }
    }

    fn load(&self, fixture: &Fixture) -> Result<Box<dyn LoadedCase>> {
        let case = fixture.case;
        if case.shape.ranks() == 1 {
            return self.inner.load(fixture);
        }
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let id = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let folder = Scratch(std::env::temp_dir().join(format!("transformer-bench-ranks-{id}")));
        let _ = fs::remove_dir_all(&folder.0);
        fs::create_dir_all(&folder.0)
            .with_context(|| format!("{} could not be created", folder.0.display()))?;
        let controller: Box<dyn Controller> = match self.rank {
            Some(rank) => Box::new(launched::Leader::new(Rc::clone(&self.inner), rank)),
            None => Box::new(launcher::LocalRanks::start(self.inner.as_ref(), case, &folder.0)?),
        };
        let comm_backend = self.inner.comm_backend();
        Ok(Box::new(DistributedCase::load(case, fixture.is_for_parity(), controller, comm_backend, folder)?))
    }

    fn compile(&self, cases: &[Case], report: &mut CompileReport) {
        self.inner.compile(cases, report)
    }

    forward! {
        fn id(&self) -> BackendId;
        fn versions(&self) -> Vec<(String, String)>;
        fn make(&self, fixture: &Fixture) -> Result<()>;
        fn load_operation(&self, fixture: &OperationFixture) -> Result<Box<dyn LoadedOperation>>;
        fn is_precompiled(&self, variant: Variant) -> bool;
        fn needs_compile(&self, case: &Case) -> bool;
        fn devices(&self) -> (usize, &'static str);
        fn comm_backend(&self) -> &'static str;
        fn rendezvous_env(&self, ranks: usize, folder: &Path) -> Result<Vec<EnvVars>>;
        fn all_reduce_sum(&self, values: &[f32]) -> Result<Vec<f32>>;
        fn accumulation(&self) -> Accumulation;
        fn synchronize(&self) -> Result<()>;
        fn memory_total(&self) -> Option<u64>;
        fn reset_peak_memory(&self) -> Result<()>;
        fn peak_memory(&self) -> Option<u64>;
        fn capture_gpu_trace(&self, path: &Path, body: &mut dyn FnMut() -> Result<()>) -> Result<()>;
    }
}
