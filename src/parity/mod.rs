//! Proof that a backend computes the same function as the oracle; `conformance` is what else it
//! must pass.

pub mod conformance;

use std::fmt;

use anyhow::{Context, Result};

use crate::backend::{Backend, Prepared};
use crate::model::fixture::{Fixture, Tensor};
use crate::model::oracle::rounding::Format;
use crate::model::oracle::{self, Expected};
use crate::suite::{Case, Compute, Precision, Set, Shape, Workload, cases};

/// Steps of the optimizer workload in a parity run: enough that a wrong bias
/// correction or moment shows.
const OPTIMIZER_STEPS: i32 = 3;

/// A tensor that differs by more than its precision explains.
#[derive(Clone, Debug, PartialEq)]
pub struct Mismatch {
    pub case: Case,
    pub tensor: String,
    pub error: f64,
    pub allowed: f64,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "parity failed: {} of {}, error {:.2e}, allowed {:.2e}",
            self.tensor, self.case, self.error, self.allowed
        )
    }
}

/// The largest error allowed, relative to the tensor's norm.
///
/// Some ten units of roundoff in every type: the rounding of each intermediate result
/// adds up over the layers of the miniature models.
pub fn allowed(precision: Precision) -> f64 {
    match precision.compute {
        Compute::F32 => 5e-6,
        Compute::Tf32 => 5e-3,
        Compute::F16 => 1e-2,
        Compute::Autocast => 5e-2,
        // The same computation: see conformance::amp_computes_as_bf16.
        Compute::Bf16 | Compute::Amp => 1e-1,
    }
}

/// The error of a tensor: ‖found − expected‖ over ‖expected‖. Tensors that are zero by
/// symmetry (a key's bias moves no softmax) are measured on `floor` a value instead.
fn error(found: &[f32], expected: &[f64], floor: f64) -> f64 {
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    let square = |sum: f64, v: f64| sum + v * v;
    let size = expected.iter().copied().fold(0.0, square).sqrt();
    let miss = found.iter().zip(expected).map(|(&a, &b)| f64::from(a) - b).fold(0.0, square).sqrt();
    miss / size.max(floor * (expected.len() as f64).sqrt())
}

/// The f64 results that a backend's outputs are held against.
fn expectations(fixture: &Fixture, found: &[Tensor]) -> Vec<Expected> {
    let mut all = oracle::scalar::expected(fixture);
    let steps = match fixture.case.workload {
        Workload::OptimizerStep => OPTIMIZER_STEPS,
        Workload::TrainStep => 1,
        _ => return all,
    };
    // From zero moments Adam's first step is the gradient's sign, which rounding
    // decides where the gradient is zero. So the update is checked on the backend's
    // own gradients, and the gradients on their own.
    for (index, parameter) in fixture.parameters().iter().enumerate() {
        let name = format!("grad/{}", parameter.name);
        let gradient = match fixture.case.workload {
            Workload::OptimizerStep => Some(&fixture.gradients()[index]),
            _ => found.iter().find(|t| t.name == name),
        };
        if let Some(gradient) = gradient {
            all.push(Expected {
                name: format!("param/{}", parameter.name),
                data: oracle::adamw(&fixture.adamw, &parameter.data, &gradient.data, steps, Format::Whole),
            });
        }
    }
    all
}

/// Compares what a prepared case puts out with the oracle for `truth`.
pub fn compare(truth: &Fixture, prepared: &mut dyn Prepared) -> Result<Option<Mismatch>> {
    let case = truth.case;
    let steps = if case.workload == Workload::OptimizerStep { OPTIMIZER_STEPS } else { 1 };
    for _ in 0..steps {
        prepared.step().with_context(|| format!("a step of {case}"))?;
    }
    let found = prepared.outputs().with_context(|| format!("reading the results of {case}"))?;
    let expected = expectations(truth, &found);
    let kind = |name: &str| name.split('/').next().unwrap_or("").to_owned();
    let allowed = allowed(case.precision);
    for want in &expected {
        let floor = 1e-2
            * expected
                .iter()
                .filter(|e| kind(&e.name) == kind(&want.name))
                .flat_map(|e| &e.data)
                .fold(0.0_f64, |m, v| m.max(v.abs()));
        let error = found
            .iter()
            .find(|t| t.name == want.name)
            .map_or(f64::INFINITY, |t| error(&t.data, &want.data, floor));
        if error.is_nan() || error > allowed {
            return Ok(Some(Mismatch { case, tensor: want.name.clone(), error, allowed }));
        }
    }
    Ok(None)
}

/// Proves one case, given at a miniature shape.
pub fn check_case(backend: &dyn Backend, case: Case) -> Result<Option<Mismatch>> {
    let fixture = Fixture::for_parity(case);
    let mut prepared = backend.prepare(&fixture).with_context(|| format!("preparing {case}"))?;
    compare(&fixture, prepared.as_mut())
}

/// The cases that prove a backend and precision: every workload at its miniature shapes.
fn proofs(like: Case) -> Vec<Case> {
    let eager = Precision::eager(Compute::F32);
    let chain = Shape::Square { n: 64, chain: 3 };
    cases(Set::Smoke)
        .into_iter()
        .filter(|c| c.backend == like.backend && c.precision == eager)
        .map(|c| Case { precision: like.precision, ..c })
        .chain([Case { workload: Workload::MatmulPeak, shape: chain, ..like }])
        .collect()
}

/// Proves every workload that the backend supports in the precision of `like`.
pub fn check(backend: &dyn Backend, like: Case) -> Result<Option<Mismatch>> {
    for case in proofs(like) {
        if backend.supports(&case).is_ok()
            && let Some(mismatch) = check_case(backend, case)?
        {
            return Ok(Some(mismatch));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_workload_is_proven() {
        let like = "train-step/mlx-cpu/bf16/indicator-b16".parse::<Case>().unwrap();
        let all = proofs(like);
        for &workload in Workload::ALL {
            assert!(all.iter().any(|c| c.workload == workload), "{workload}");
        }
        assert!(all.iter().all(|c| c.backend == like.backend && c.precision == like.precision));
    }

    #[test]
    fn nan_and_missing_values_are_errors() {
        assert!(error(&[f32::NAN, 1.0], &[1.0, 1.0], 0.0).is_nan());
        assert!(error(&[1.0, f32::NAN], &[1.0, 1.0], 0.0).is_nan());
        assert_eq!(error(&[1.0], &[1.0, 1.0], 0.0), f64::INFINITY);
        assert_eq!(error(&[3.5, 4.0], &[3.0, 4.0], 0.0), 0.1);
    }

    #[test]
    fn zero_by_symmetry_is_measured_on_its_neighbours() {
        assert!(error(&[1e-9], &[1e-18], 1e-3) < 1e-5);
    }
}
