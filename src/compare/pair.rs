//! Two processes whose samples alternate.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::signals::check_interrupted;
use super::worker::{BlockTiming, CheckOutcome, Worker};
use crate::statistics::median;
use crate::suite::Case;

/// Shortest duration of a sample. A request and the start of sleeping threads take tens of microseconds.
const SAMPLE: Duration = Duration::from_millis(20);
const MIN_SAMPLES: usize = 4;
const MAX_SAMPLES: usize = 60;

/// Returns the median wall time in nanoseconds.
pub(super) fn median_ns(times: &[BlockTiming]) -> f64 {
    1e9 * median(&times.iter().map(|time| time.wall).collect::<Vec<_>>())
}

/// Two processes, and the order of their samples.
pub struct WorkerPair {
    pub workers: [Worker; 2],
    random: ChaCha8Rng,
}

impl WorkerPair {
    pub fn new(workers: [Worker; 2]) -> Self {
        Self { workers, random: ChaCha8Rng::seed_from_u64(0) }
    }

    /// Checks both cases, or recalls earlier checks. `progress` gets a line for each.
    ///
    /// # Errors
    /// Returns an error if a result is wrong or a process ends.
    pub fn check(&mut self, cases: &[Case; 2], progress: &dyn Fn(&str)) -> Result<()> {
        for (worker, case) in self.workers.iter_mut().zip(cases) {
            progress(&format!("checking {case}"));
            if let CheckOutcome::Wrong(reason) = worker.check(case)? {
                bail!("{reason}");
            }
        }
        Ok(())
    }

    /// Loads a case in each process.
    ///
    /// # Errors
    /// Returns an error if a process cannot load it.
    pub fn load(&mut self, cases: &[Case; 2]) -> Result<()> {
        for (worker, case) in self.workers.iter_mut().zip(cases) {
            worker.load(case).with_context(|| case.to_string())?;
        }
        Ok(())
    }

    /// Verifies that the timed steps did their work.
    ///
    /// # Errors
    /// Returns an error if they did not, or if a process ends.
    pub fn verify(&mut self) -> Result<()> {
        self.workers.iter_mut().try_for_each(Worker::verify)
    }

    /// Samples what the processes have loaded, in random order, for about `time` and with at most `max_calls` calls in a
    /// sample. Processes with `false` are left out.
    ///
    /// # Errors
    /// Returns an error if a process ends or the user interrupts.
    pub fn sample(
        &mut self,
        has: [bool; 2],
        time: Duration,
        max_calls: u64,
    ) -> Result<[Vec<BlockTiming>; 2]> {
        let mut calls = [1; 2];
        for side in (0..2).filter(|&side| has[side]) {
            // The first call after a load is longer.
            self.workers[side].time(1)?;
            let one = self.workers[side].time(1)?.wall;
            ensure!(one > 0.0, "a call takes no time");
            calls[side] = ((SAMPLE.as_secs_f64() / one).ceil() as u64).clamp(1, max_calls);
        }
        let mut all = [Vec::new(), Vec::new()];
        let start = Instant::now();
        for count in 0..MAX_SAMPLES {
            if count >= MIN_SAMPLES && start.elapsed() > time {
                break;
            }
            check_interrupted()?;
            let first = (self.random.next_u32() & 1) as usize;
            for side in [first, 1 - first].into_iter().filter(|&side| has[side]) {
                all[side].push(self.workers[side].time(calls[side])?);
            }
        }
        Ok(all)
    }
}
