//! Checks that a backend computes the same function as the f64 reference, before a case is timed.
//!
//! [`ParityChecker::check_case`] drives steps of a case at the shape that is timed ([`steps`]), and compares them within
//! the tolerance of [`tolerance`]. For cases with dropout it also checks the dropout masks ([`dropout`]). [`operations`]
//! checks a single operation of a step. [`cache`] remembers passed checks, [`fault_injection`] verifies that the checks
//! detect faults, and [`conformance`] has the other tests of a backend. README.md describes the method.

pub mod cache;
pub mod conformance;
pub mod dropout;
#[cfg(test)]
mod fast_math;
pub mod fault_injection;
pub mod idle_steps;
pub mod operations;
mod steps;
pub mod timed_work;
pub mod tolerance;
mod updates;

use std::fmt;

use anyhow::{Context, Result};

use crate::backend::{Accumulation, Backend, LoadedCase};
use crate::fixture::{Fixture, Tensor};
use crate::suite::{Case, Shape};
use dropout::NoiseReference;
pub use steps::state_difference;
use steps::{Failure, StepCheck};
use tolerance::{Expected, ReferenceCache};

/// A difference between a backend and the reference.
#[derive(Clone, Debug, PartialEq)]
pub struct Mismatch {
    pub case: Case,
    pub reason: String,
}

impl Mismatch {
    fn new(case: Case, reason: impl Into<String>) -> Self {
        Self { case, reason: reason.into() }
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "parity of {} failed: {}", self.case, self.reason)
    }
}

/// The name of a tensor that differs between ranks and should not.
#[derive(Debug)]
pub struct RankMismatch(pub String);

impl fmt::Display for RankMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the ranks differ in {}", self.0)
    }
}

impl std::error::Error for RankMismatch {}

/// The result of a parity check: the largest error / tolerance of any tensor, or the mismatch.
pub type ParityResult = std::result::Result<f64, Mismatch>;

/// Compares backends with the reference. It caches the reference results of the last shape.
#[derive(Default)]
pub struct ParityChecker {
    reference: ReferenceCache,
    noise: NoiseReference,
}

impl ParityChecker {
    /// Checks a case at its own shape.
    ///
    /// # Errors
    /// Returns an error if the backend fails. A wrong result is a mismatch instead.
    pub fn check_case(&mut self, backend: &dyn Backend, case: Case) -> Result<ParityResult> {
        let fixture = Fixture::for_parity(case);
        let result = self.check(backend, &fixture, &fixture)?;
        if result.is_err() || !case.dropout().any() {
            return Ok(result);
        }
        Ok(dropout::check(backend, case, &mut self.noise)?.map_or(result, Err))
    }

    /// Compares a backend that loads `backend_fixture` with the reference for `fixture`. They only differ in tests.
    ///
    /// # Errors
    /// Returns an error if the backend fails.
    pub fn check(
        &mut self,
        backend: &dyn Backend,
        fixture: &Fixture,
        backend_fixture: &Fixture,
    ) -> Result<ParityResult> {
        let case = fixture.case;
        // Runs before the backend loads its tensors, because either needs much memory for a large model.
        if !matches!(case.shape, Shape::Buffer { .. }) {
            self.reference.expected(fixture, backend.accumulation());
        }
        // Frees the allocator cache of earlier cases.
        backend.reset_peak_memory()?;
        let loaded = backend.load(backend_fixture);
        let mut loaded = loaded.with_context(|| format!("{case} could not be loaded"))?;
        self.compare(fixture, loaded.as_mut(), backend.accumulation())
    }

    /// Drives the steps of a loaded case and compares them with the reference.
    ///
    /// # Errors
    /// Returns an error if the backend fails.
    pub fn compare(
        &mut self,
        fixture: &Fixture,
        loaded: &mut dyn LoadedCase,
        accumulation: Accumulation,
    ) -> Result<ParityResult> {
        let mut steps = StepCheck { reference: &mut self.reference, fixture, loaded, accumulation };
        match steps.run() {
            Ok(ratio) => Ok(Ok(ratio)),
            Err(Failure::Mismatch(mismatch)) => Ok(Err(mismatch)),
            Err(Failure::Error(error)) => Err(error),
        }
    }
}

fn find<'a>(tensors: &'a [Tensor], name: &str) -> Option<&'a Tensor> {
    tensors.iter().find(|tensor| tensor.name == name)
}

/// Compares tensors with their expected values. Returns the largest error / tolerance, or the worst tensor if it
/// exceeds its tolerance.
pub fn compare_tensors(case: Case, expected: &[Expected], results: &[Tensor]) -> ParityResult {
    let errors = expected.iter().map(|tensor| tensor.error(results));
    match errors.max_by(|a, b| a.ratio().total_cmp(&b.ratio())) {
        Some(error) if error.ratio() > 1.0 => Err(Mismatch::new(case, error.to_string())),
        Some(error) => Ok(error.ratio()),
        None => Ok(0.0),
    }
}
