//! Times of the operations of a training step.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

/// A pass of an operation on two backends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationTime {
    /// Name of the operation, such as `activation`.
    pub operation: String,
    /// `forward`, `by-input`, `by-weight`, `backward` or `update`.
    pub pass: String,
    /// Number of calls in a step.
    pub count: u64,
    /// FLOPs and least bytes of a call.
    pub flops: u64,
    pub bytes: u64,
    /// Median time of a call on each backend in nanoseconds, or `None` if its step does not have the operation.
    pub ns: [Option<f64>; 2],
}

impl OperationTime {
    /// Returns the nanoseconds of all calls in a step of a side.
    pub fn step_ns(&self, side: usize) -> f64 {
        self.ns[side].unwrap_or(0.0) * self.count as f64
    }
}

/// The operations of a training step on two backends, measured interleaved by `scripts/explain`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// Ids of the two training steps.
    pub ids: [String; 2],
    /// Median times of the whole steps in nanoseconds.
    pub step_ns: [f64; 2],
    /// Name of the activation, such as `gelu`.
    pub activation: String,
    /// Largest measured rates of this machine: FLOP/s of a matrix product, and bytes/s of a copy.
    pub peak_flops: f64,
    pub peak_bytes: f64,
    pub operations: Vec<OperationTime>,
    pub commit: String,
}

impl Explanation {
    /// Returns the nanoseconds of all operations of a side.
    pub fn sum_ns(&self, side: usize) -> f64 {
        self.operations.iter().map(|operation| operation.step_ns(side)).sum()
    }

    /// Returns the shortest time of a call at the measured rates, in nanoseconds.
    pub fn roofline_ns(&self, operation: &OperationTime) -> f64 {
        let by_flops = operation.flops as f64 / self.peak_flops;
        1e9 * by_flops.max(operation.bytes as f64 / self.peak_bytes)
    }

    /// Returns the side with the longer step: 0 or 1.
    pub fn slower(&self) -> usize {
        usize::from(self.step_ns[1] > self.step_ns[0])
    }
}

fn path(folder: &Path) -> PathBuf {
    folder.join("operations.json")
}

/// Reads the explanations of every commit.
///
/// # Errors
/// Returns an error if the file is damaged.
pub fn read(folder: &Path) -> Result<Vec<Explanation>> {
    super::read_list(&path(folder))
}

/// Saves an explanation. It replaces an older one of the same steps.
///
/// # Errors
/// Returns an error if the file cannot be read or written.
pub fn save(folder: &Path, new: Explanation) -> Result<()> {
    super::save_into_list(&path(folder), vec![new], |old, new| old.ids == new.ids)
}
