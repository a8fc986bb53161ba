//! Checks that a backend computes the same function as the f64 reference, before a case is timed.
//!
//! [`ParityChecker::check_case`] checks two steps of a case at the shape that is timed, within the tolerance of
//! [`tolerance`]. For cases with dropout it also checks the dropout masks ([`dropout`]). [`cache`] remembers passed
//! checks, [`fault_injection`] verifies that the checks detect faults, and [`conformance`] has the other tests of a
//! backend. README.md describes the method.

pub mod cache;
pub mod conformance;
pub mod dropout;
pub mod fault_injection;
pub mod tolerance;

use std::fmt;

use anyhow::{Context, Result};

use crate::backend::{Accumulation, Backend, LoadedCase};
use crate::fixture::{Fixture, Tensor};
use crate::suite::{Case, Shape, Workload};
use tolerance::{Expected, ReferenceCache, layer_name};

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
        Ok(dropout::check(backend, case)?.map_or(result, Err))
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

    /// Runs the first steps of a loaded case and compares them with the reference.
    ///
    /// # Errors
    /// Returns an error if the backend fails.
    pub fn compare(
        &mut self,
        fixture: &Fixture,
        loaded: &mut dyn LoadedCase,
        accumulation: Accumulation,
    ) -> Result<ParityResult> {
        let case = fixture.case;
        // Only the last update of the optimizer alone is compared, and three show a wrong moment or bias correction.
        let steps = if case.workload == Workload::OptimizerStep { 3 } else { 2 };
        let mut worst = 0.0_f64;
        let mut earlier: Vec<Vec<Tensor>> = Vec::new();
        for index in 0..steps {
            loaded.step().with_context(|| format!("a step of {case} failed"))?;
            let mut results = match loaded.outputs() {
                Err(error) if error.is::<RankMismatch>() => {
                    return Ok(Err(Mismatch::new(case, error.to_string())));
                }
                results => results.with_context(|| format!("the results of {case} could not be read"))?,
            };
            if let Shape::Buffer { .. } = case.shape {
                return Ok(compare_buffer(fixture, &results));
            }
            match self.compare_step(fixture, &earlier, &results, index + 1 == steps, accumulation) {
                Ok(ratio) => worst = worst.max(ratio),
                mismatch => return Ok(mismatch),
            }
            if case.workload.optimizes() {
                if !is_miniature(case) {
                    results.retain(|t| t.name.starts_with("grad/"));
                }
                earlier.push(results);
            }
        }
        Ok(Ok(worst))
    }

    fn compare_step(
        &mut self,
        fixture: &Fixture,
        earlier: &[Vec<Tensor>],
        results: &[Tensor],
        last: bool,
        accumulation: Accumulation,
    ) -> ParityResult {
        let optimizes = fixture.case.workload.optimizes();
        let mut ratio = 0.0_f64;
        // A step with an optimizer changes the parameters, so these results only apply to the first one.
        if earlier.is_empty() {
            let expected = self.reference.expected(fixture, accumulation);
            ratio = compare_tensors(fixture.case, &expected, results)?;
        }
        // The last update contains the errors of those before it.
        if optimizes && last {
            ratio = ratio.max(compare_updates(fixture, earlier, results, accumulation)?);
        }
        Ok(ratio)
    }
}

fn is_miniature(case: Case) -> bool {
    case.shape.model().is_some_and(|(model, _)| model.is_miniature())
}

fn find<'a>(tensors: &'a [Tensor], name: &str) -> Option<&'a Tensor> {
    tensors.iter().find(|tensor| tensor.name == name)
}

/// Compares the parameters after the last step with AdamW on the backend's own gradients, and a second training
/// step with the parameters after the first.
fn compare_updates(
    fixture: &Fixture,
    earlier: &[Vec<Tensor>],
    results: &[Tensor],
    accumulation: Accumulation,
) -> ParityResult {
    let case = fixture.case;
    let fixed = case.workload == Workload::OptimizerStep;
    let mut gradients: Vec<Vec<&[f32]>> = Vec::new();
    for step in earlier.iter().map(Vec::as_slice).chain([results]) {
        let own = fixture.parameters().iter().enumerate().map(|(i, parameter)| {
            if fixed {
                return Some(&fixture.gradients()[i].data[..]);
            }
            let gradient = find(step, &format!("grad/{}", parameter.name))?;
            (gradient.data.len() == parameter.data.len()).then_some(&gradient.data[..])
        });
        let own: Option<Vec<&[f32]>> = own.collect();
        gradients.push(own.ok_or_else(|| Mismatch::new(case, "a gradient is missing"))?);
    }
    let mut worst = 0.0_f64;
    let same_layer = |a: &Tensor, b: &Tensor| layer_name(&a.name) == layer_name(&b.name);
    let mut end = 0;
    for layer in fixture.parameters().chunk_by(same_layer) {
        let start = end;
        end += layer.len();
        let own: Vec<Vec<&[f32]>> = gradients.iter().map(|step| step[start..end].to_vec()).collect();
        let expected = tolerance::expected_update(&fixture.adamw, layer, &own, case.method.precision);
        worst = worst.max(compare_tensors(case, &expected, results)?);
    }
    match earlier {
        [first] if !fixed => Ok(worst.max(compare_second_step(fixture, first, results, accumulation)?)),
        _ => Ok(worst),
    }
}

/// Checks that the second training step differs from the first. At a miniature, it compares the second step with
/// the reference too.
fn compare_second_step(
    fixture: &Fixture,
    first: &[Tensor],
    second: &[Tensor],
    accumulation: Accumulation,
) -> ParityResult {
    // Small tensors may be equal by chance, or zero.
    const MIN_VALUES: usize = 64;
    let case = fixture.case;
    let gradients = second.iter().filter(|t| t.name.starts_with("grad/") && t.data.len() >= MIN_VALUES);
    for new in gradients {
        if find(first, &new.name).is_some_and(|old| old.data == new.data) {
            return Err(Mismatch::new(case, format!("{} equals that of the previous step", new.name)));
        }
    }
    if !is_miniature(case) {
        return Ok(0.0);
    }
    let mut updated = Fixture::for_parity(case);
    for parameter in fixture.parameters() {
        let name = format!("param/{}", parameter.name);
        let value = find(first, &name).ok_or_else(|| Mismatch::new(case, format!("{name} is missing")))?;
        updated.edit_parameter(&parameter.name, |data| data.clone_from(&value.data));
    }
    compare_tensors(case, &ReferenceCache::default().expected(&updated, accumulation), second)
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

/// Compares a buffer with its expected values. A copy is exact. A sum over ranks is exact for the numbers of the
/// fixture.
fn compare_buffer(fixture: &Fixture, results: &[Tensor]) -> ParityResult {
    let (expected, reason): (Vec<f32>, &str) = if fixture.case.workload == Workload::AllReduce {
        (fixture.sum_over_ranks(), "out is not the sum of the ranks' buffers")
    } else {
        (fixture.input("buffer").data.iter().map(|v| -v).collect(), "out is not the negation of the buffer")
    };
    let equal = results.first().is_some_and(|out| out.data == expected);
    if equal { Ok(0.0) } else { Err(Mismatch::new(fixture.case, reason)) }
}
