//! The environment of a run: backends, machine and background load.

use std::time::Duration;

use transformer_bench::backend::{Backend, Backends};
use transformer_bench::interference::{self, background_load};
use transformer_bench::memory;
use transformer_bench::results::machine::Machine;
use transformer_bench::suite::{Case, cost};

/// Time over which the background load is measured.
const LOAD_TIME: Duration = Duration::from_millis(500);
/// Largest share of a device's memory that a case may need by its estimate.
const USABLE_MEMORY: f64 = 0.85;

pub struct Environment {
    pub backends: Backends,
    pub machine: Machine,
}

impl Environment {
    pub fn new(backends: Backends) -> Self {
        Self { machine: describe_machine(&backends), backends }
    }

    /// Measures how much CPU other programs use, and prints a note if that may disturb the run.
    pub fn measure_background_load(&mut self) {
        let load = background_load(LOAD_TIME);
        self.machine.background_load = Some(load);
        let cores = self.machine.cores;
        if load > interference::WAIT_THRESHOLD * cores as f64 {
            eprintln!(
                "note: other programs use {load:.1} of {cores} cores; cases that this disturbs are marked"
            );
        }
    }

    /// Returns the backend that runs a case, or the reason why the case can't run. Cases that do not fit into memory
    /// are refused before anything is allocated.
    pub fn backend_for(&self, case: &Case) -> Result<&dyn Backend, String> {
        let backend = find_backend(&self.backends, case)?;
        // All ranks of a CPU share its memory; on GPUs, each rank has its own.
        let ranks = if case.backend.is_cpu() { case.shape.ranks() } else { 1 };
        let needed = ranks as f64 * cost::memory_estimate(case) as f64 / 1e9;
        let total = backend.memory_total().unwrap_or(self.machine.memory_bytes) as f64 / 1e9;
        if needed > USABLE_MEMORY * total {
            return Err(format!("needs about {needed:.0} GB of memory, and {total:.0} GB is available"));
        }
        Ok(backend)
    }
}

/// Returns the backend that supports a case, or the reason why there is none.
pub fn find_backend<'a>(backends: &'a Backends, case: &Case) -> Result<&'a dyn Backend, String> {
    let Some(backend) = backends.get(case.backend) else {
        let unavailable = backends.unavailable.iter().find(|backend| backend.id == case.backend);
        return Err(unavailable.map_or("this executable has no such backend", |b| &b.reason).to_owned());
    };
    backend.supports(case).map(|()| backend).map_err(|unsupported| unsupported.to_string())
}

/// Returns the machine with the versions of its backends and of the allocator.
pub fn describe_machine(backends: &Backends) -> Machine {
    let mut machine = Machine::read();
    machine.add_versions(backends.available.iter().flat_map(|backend| backend.versions()));
    machine.add_versions(memory::describe_allocator());
    machine
}
