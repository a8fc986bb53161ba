//! Energy of training steps.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::energy::Scope;

/// Energy of a stretch of steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepEnergy {
    /// The hardware whose energy is counted.
    pub scope: Scope,
    /// Energy and duration of all steps.
    pub joules: f64,
    pub seconds: f64,
    pub steps: u64,
    /// Mean power before the steps, with the case loaded.
    pub idle_watts: f64,
    /// The largest power that the hardware allows, if it reports one.
    pub limit_watts: Option<f64>,
}

impl StepEnergy {
    pub fn watts(&self) -> f64 {
        self.joules / self.seconds
    }
}

/// Energy of a case, measured by `scripts/energy`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CaseEnergy {
    pub id: String,
    /// Samples of a step.
    pub batch: u64,
    pub energy: StepEnergy,
    pub commit: String,
}

impl CaseEnergy {
    pub fn joules_per_sample(&self) -> f64 {
        self.energy.joules / (self.energy.steps * self.batch) as f64
    }
}

fn path(folder: &Path) -> PathBuf {
    folder.join("energy.json")
}

/// Reads the energies of every commit.
///
/// # Errors
/// Returns an error if the file is damaged.
pub fn read(folder: &Path) -> Result<Vec<CaseEnergy>> {
    super::read_list(&path(folder))
}

/// Saves the energy of a case. It replaces an older one.
///
/// # Errors
/// Returns an error if the file cannot be read or written.
pub fn save(folder: &Path, new: &CaseEnergy) -> Result<()> {
    super::save_into_list(&path(folder), vec![new.clone()], |old, new| old.id == new.id)
}
