//! Times until a training step runs, and the number of steps after which a compiled one pays.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

/// Times in a new process, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StartTimes {
    /// Making what a cache saves apart from the process: PyTorch's package of Inductor.
    pub made_ns: f64,
    /// Loading the parameters and, for a compiled step, the package. MLX compiles its kernels and PyTorch captures a CUDA
    /// graph here.
    pub loaded_ns: f64,
    pub first_ns: f64,
    pub second_ns: f64,
}

impl StartTimes {
    /// Returns the nanoseconds until the end of the second step.
    pub fn two_steps_ns(&self) -> f64 {
        self.made_ns + self.loaded_ns + self.first_ns + self.second_ns
    }
}

/// A compiled training step and the eager one. Arrays have the eager step first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FirstSteps {
    pub ids: [String; 2],
    /// Start with empty caches.
    pub cold: [StartTimes; 2],
    /// Start with the caches that the cold one filled.
    pub warm: [StartTimes; 2],
    /// Median times of later steps, measured interleaved.
    pub step_ns: [f64; 2],
    /// True if both steps were written in Python.
    #[serde(default)]
    pub python: bool,
    pub commit: String,
}

/// The run from which on a compiled step needs less time in total than the eager one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BreakEven {
    /// Number of steps, at least 1.
    pub steps: f64,
    /// Duration of a compiled run with this number of steps.
    pub ns: f64,
}

/// Returns the nanoseconds of a run with `steps` steps.
fn run_ns(start: &StartTimes, step_ns: f64, steps: f64) -> f64 {
    start.two_steps_ns() + (steps - 2.0) * step_ns
}

/// Returns the shortest run in which the second step is faster in total than the first. Returns `None` if there is none: its
/// steps are not faster.
pub fn break_even(start: &[StartTimes; 2], step_ns: [f64; 2]) -> Option<BreakEven> {
    let gain = step_ns[0] - step_ns[1];
    let cost = start[1].two_steps_ns() - start[0].two_steps_ns();
    if gain <= 0.0 {
        return None;
    }
    let steps = (2.0 + cost / gain).max(1.0);
    Some(BreakEven { steps, ns: run_ns(&start[1], step_ns[1], steps) })
}

fn path(folder: &Path) -> PathBuf {
    folder.join("first-steps.json")
}

/// Reads the first steps of every commit.
///
/// # Errors
/// Returns an error if the file is damaged.
pub fn read(folder: &Path) -> Result<Vec<FirstSteps>> {
    super::read_list(&path(folder))
}

/// Saves first steps. They replace older ones of the same cases.
///
/// # Errors
/// Returns an error if the file cannot be read or written.
pub fn save(folder: &Path, new: &FirstSteps) -> Result<()> {
    super::save_into_list(&path(folder), vec![new.clone()], |old, new| {
        (&old.ids, old.python) == (&new.ids, new.python)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(made: f64, loaded: f64, first: f64, second: f64) -> StartTimes {
        StartTimes { made_ns: made, loaded_ns: loaded, first_ns: first, second_ns: second }
    }

    #[test]
    fn both_runs_take_equally_long_at_the_break_even() {
        let starts = [start(0.0, 2e9, 5e8, 4e8), start(6e10, 3e9, 4e8, 3e8)];
        let step_ns = [4e8, 3e8];
        let even = break_even(&starts, step_ns).unwrap();
        // 60.8 s over 0.1 s a step, after two steps.
        assert!((even.steps - 610.0).abs() < 1e-6, "{even:?}");
        let eager = run_ns(&starts[0], step_ns[0], even.steps);
        assert!((eager / even.ns - 1.0).abs() < 1e-9);
        // One step more, and the compiled run is shorter.
        assert!(run_ns(&starts[1], step_ns[1], 611.0) < run_ns(&starts[0], step_ns[0], 611.0));
    }

    #[test]
    fn a_step_that_is_not_faster_never_pays_and_a_free_one_always_does() {
        let starts = [start(0.0, 2e9, 5e8, 4e8), start(6e10, 3e9, 4e8, 3e8)];
        assert_eq!(break_even(&starts, [3e8, 3e8]), None);
        assert_eq!(break_even(&starts, [3e8, 4e8]), None);
        let free = break_even(&[starts[0], start(0.0, 1e9, 3e8, 3e8)], [4e8, 3e8]).unwrap();
        assert_eq!(free.steps, 1.0);
    }
}
