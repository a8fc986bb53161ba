//! Plans how often a case is timed, from its first steps.

use std::time::Duration;

use anyhow::Result;
use transformer_bench::backend::LoadedCase;
use transformer_bench::suite::{Set, Workload};

/// The sampling of a case. All samples have the same number of steps (flat sampling).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    pub samples: usize,
    pub measurement: Duration,
    pub warm_up: Duration,
}

/// Minimum of Criterion.
const MIN_SAMPLES: usize = 10;
const MAX_SAMPLES: usize = 100;

/// Minimum for a median with an interval if ten samples take too long.
const MIN_SLOW_SAMPLES: usize = 3;
/// A case with a longer step is not measured.
const MAX_STEP: Duration = Duration::from_secs(60);

/// Times the number of steps that the time limit of the case allows, from 3 to 9. Returns `None` if one step takes
/// more than a minute.
pub fn time_slow_steps(
    loaded: &mut dyn LoadedCase,
    step: Duration,
    set: Set,
    workload: Workload,
) -> Result<Option<Vec<Duration>>> {
    if step > MAX_STEP {
        return Ok(None);
    }
    let count = (Plan::limit(set, workload).as_secs_f64() / step.as_secs_f64()) as usize;
    (0..count.clamp(MIN_SLOW_SAMPLES, MIN_SAMPLES - 1))
        .map(|_| loaded.time(1))
        .collect::<Result<_>>()
        .map(Some)
}

/// Returns the target and the limit for the duration of a case, in seconds.
fn time_budget(set: Set, workload: Workload) -> (f64, f64) {
    match (set, workload) {
        (Set::Smoke | Set::Compare, _) => (0.1, 60.0),
        // The headline table shows training steps, so they get the most samples.
        (Set::Quick, Workload::TrainStep) => (3.0, 40.0),
        (Set::Quick, _) => (1.8, 35.0),
        (Set::Full, Workload::TrainStep) => (20.0, 120.0),
        (Set::Full, _) => (5.0, 60.0),
    }
}

impl Plan {
    /// Returns the longest time that a case may take.
    fn limit(set: Set, workload: Workload) -> Duration {
        Duration::from_secs_f64(time_budget(set, workload).1)
    }

    /// Runs one or two steps. Returns the time of the faster one and the plan for it.
    ///
    /// # Errors
    /// Returns an error if a step fails.
    pub fn from_first_steps(
        loaded: &mut dyn LoadedCase,
        set: Set,
        workload: Workload,
    ) -> Result<(Duration, Option<Self>)> {
        let mut step = loaded.time(1)?;
        // The first step also loads kernels, compiles and fills caches. A second one says more, unless the first took
        // much of the time limit.
        if step < Self::limit(set, workload) / 4 {
            step = loaded.time(1)?.min(step);
        }
        Ok((step, Self::new(step, set, workload)))
    }

    /// Plans a case by the time of its step. Returns `None` if ten samples and a warm-up exceed the time limit; see
    /// [`time_slow_steps`].
    pub fn new(step: Duration, set: Set, workload: Workload) -> Option<Self> {
        let (target, limit) = time_budget(set, workload);
        let step = step.as_secs_f64();
        if (MIN_SAMPLES + 1) as f64 * step > limit {
            return None;
        }
        let samples = ((target / step) as usize).clamp(MIN_SAMPLES, MAX_SAMPLES);
        let steps_per_sample = (target / (samples as f64 * step)).floor().max(1.0);
        Some(Self {
            samples,
            // Criterion rounds the steps per sample up, so the time allows half a step less.
            measurement: Duration::from_secs_f64((steps_per_sample - 0.5) * samples as f64 * step),
            // Criterion warms up with 1, 2, 4, … steps until this time is over.
            warm_up: Duration::from_secs_f64((0.1 * target).min(0.3)),
        })
    }

    /// Returns the expected duration of a case before its first step, from an assumed time of a step.
    pub fn expected_duration(step: Duration, set: Set, workload: Workload) -> Duration {
        match Self::new(step, set, workload) {
            Some(plan) => plan.duration(step) + 2 * step,
            None if step > MAX_STEP => step,
            None => Self::limit(set, workload).max((MIN_SLOW_SAMPLES as u32 + 1) * step),
        }
    }

    /// Returns the approximate duration of the case.
    pub fn duration(&self, step: Duration) -> Duration {
        self.measurement.max(self.samples as u32 * step) + self.warm_up.max(step)
    }
}
