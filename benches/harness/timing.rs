//! The plan that is made from a case's first step.

use std::time::Duration;

use anyhow::Result;
use transformer_bench::backend::LoadedCase;
use transformer_bench::suite::{Set, Workload};

/// How a case is sampled. Sampling is flat: every sample holds equally many steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    pub samples: usize,
    pub measurement: Duration,
    pub warm_up: Duration,
}

/// Criterion takes no fewer.
const FEWEST: usize = 10;
const MOST: usize = 100;

/// The fewest steps that make a median with an interval, where Criterion's ten samples do not fit.
const VERY_FEW: usize = 3;
/// A step that takes longer is measured once and called too slow.
const LONGEST: Duration = Duration::from_secs(60);

/// Times as many steps as fit into a case's limit, at least three; None where one takes over a
/// minute.
pub fn few(
    prepared: &mut dyn LoadedCase,
    step: Duration,
    set: Set,
    workload: Workload,
) -> Result<Option<Vec<Duration>>> {
    if step > LONGEST {
        return Ok(None);
    }
    let fit = (Plan::limit(set, workload).as_secs_f64() / step.as_secs_f64()) as usize;
    (0..fit.clamp(VERY_FEW, FEWEST - 1)).map(|_| prepared.time(1)).collect::<Result<_>>().map(Some)
}

/// Seconds that a case should take, and at most may.
fn budget(set: Set, workload: Workload) -> (f64, f64) {
    match (set, workload) {
        (Set::Smoke | Set::Compare, _) => (0.1, 60.0),
        // The headline rows get the most samples.
        (Set::Quick, Workload::TrainStep) => (7.0, 40.0),
        (Set::Quick, _) => (1.8, 35.0),
        (Set::Full, Workload::TrainStep) => (20.0, 120.0),
        (Set::Full, _) => (5.0, 60.0),
    }
}

impl Plan {
    /// The longest that a case may take.
    pub fn limit(set: Set, workload: Workload) -> Duration {
        Duration::from_secs_f64(budget(set, workload).1)
    }

    /// From the time of a step; None where ten samples and a warm-up do not fit: see [`few`].
    pub fn new(step: Duration, set: Set, workload: Workload) -> Option<Self> {
        let (target, limit) = budget(set, workload);
        let step = step.as_secs_f64();
        if (FEWEST + 1) as f64 * step > limit {
            return None;
        }
        let samples = ((target / step) as usize).clamp(FEWEST, MOST);
        let each = (target / (samples as f64 * step)).floor().max(1.0);
        Some(Self {
            samples,
            // Criterion rounds the steps a sample up; half a step less makes it `each`.
            measurement: Duration::from_secs_f64((each - 0.5) * samples as f64 * step),
            // At least a step; Criterion doubles until the time is over.
            warm_up: Duration::from_secs_f64((0.1 * target).min(0.3)),
        })
    }

    /// About how long the case will take.
    pub fn duration(&self, step: Duration) -> Duration {
        self.measurement.max(self.samples as u32 * step) + self.warm_up.max(step)
    }
}
