//! The expected results of a single operation, and their tolerances.

use std::sync::Arc;

use super::{
    ExactResults, Expected, min_scale_tolerance, rounding_errors, tolerance_factor, with_tolerances,
};
use crate::fixture::OperationFixture;
use crate::reference::{self, Accumulation, Rounding};
use crate::suite::Precision;
use crate::suite::operations::Function;

/// Returns the number of rounded runs of the reference. One is enough for large products, which have many results.
fn rounded_runs(fixture: &OperationFixture) -> usize {
    if fixture.part.flops() < 100_000_000 { 3 } else { 1 }
}

/// Returns the expected results of an operation, which is not dropout.
pub fn expected_operation(fixture: &OperationFixture, accumulation: Accumulation) -> Vec<Expected> {
    let exact: ExactResults = reference::operation::<f64>(fixture, Rounding::NONE)
        .into_iter()
        .map(|values| (values.name, Arc::new(values.data)))
        .collect();
    let (case, step) = (fixture.step.case, &fixture.step);
    let precision = case.method.precision;
    let rounding = Rounding {
        fused_attention: fixture.part.operation.function == Function::Attention,
        ..Rounding::for_precision(precision, accumulation)
    };
    let errors = rounding_errors(&exact, rounded_runs(fixture), |seed| {
        reference::operation(fixture, Rounding { seed, ..rounding })
    });
    let min_scale = |name: &str| min_scale_tolerance(name, case.shape, accumulation);
    let checks_scale = !matches!(precision, Precision::F32 | Precision::Tf32);
    let min_scale = checks_scale.then_some(&min_scale as &dyn Fn(&str) -> f64);
    with_tolerances(exact, errors, |name| tolerance_factor(name, step, accumulation), min_scale)
}
