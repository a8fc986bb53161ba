//! Proof that a backend computes the same function as the oracle. What is not proven is not timed.
//!
//! [`Prover::prove`] holds a case, at the shape that is timed, against the oracle ([`truth`] says how
//! near is near enough): two steps of it, and where it draws, dropout as a distribution
//! ([`dropout`]). [`proofs`] remembers what is proven, [`faults`] is what must be caught,
//! and [`conformance`] what else a backend must pass.

pub mod cache;
pub mod conformance;
pub mod dropout;
pub mod fault_injection;
pub mod tolerance;

use std::fmt;

use anyhow::{Context, Result};

use crate::backend::{Backend, LoadedCase, Sums};
use crate::model::fixture::{Fixture, Tensor};
use crate::suite::{Case, Shape, Workload};
use tolerance::{Expected, ReferenceCache, TensorError};

/// What a backend got wrong.
#[derive(Clone, Debug, PartialEq)]
pub struct Mismatch {
    pub case: Case,
    pub what: String,
}

impl Mismatch {
    fn new(case: Case, what: impl Into<String>) -> Self {
        Self { case, what: what.into() }
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "parity of {} failed: {}", self.case, self.what)
    }
}

/// That ranks hold different numbers where all should hold the same: of which tensor.
#[derive(Debug)]
pub struct RankMismatch(pub String);

impl fmt::Display for RankMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the ranks differ in {}", self.0)
    }
}

impl std::error::Error for RankMismatch {}

/// What a check of one case came to: how much of what is allowed the worst tensor took, or
/// what is wrong.
pub type Outcome = std::result::Result<f64, Mismatch>;

/// Holds backends against the oracle; remembers what the oracle said of the last shape.
#[derive(Default)]
pub struct ParityChecker {
    oracle: ReferenceCache,
}

impl ParityChecker {
    /// Proves a case at its own shape.
    ///
    /// # Errors
    /// Where the backend fails; what it gets wrong is the verdict.
    pub fn check_case(&mut self, backend: &dyn Backend, case: Case) -> Result<Outcome> {
        let fixture = Fixture::for_parity(case);
        let verdict = self.check(backend, &fixture, &fixture)?;
        if verdict.is_err() || !case.dropout().any() {
            return Ok(verdict);
        }
        Ok(dropout::check(backend, case)?.map_or(verdict, Err))
    }

    /// Holds a backend that was given `given` against the truth of `truth`.
    pub fn check(&mut self, backend: &dyn Backend, truth: &Fixture, given: &Fixture) -> Result<Outcome> {
        let case = truth.case;
        // Before the backend's tensors are there: of a large model either fills much of a machine.
        if !matches!(case.shape, Shape::Buffer { .. }) {
            self.oracle.expected(truth, backend.accumulation());
        }
        // What the case before has left cached would stand beside them.
        backend.reset_peak_memory()?;
        let mut prepared = backend.load(given).with_context(|| format!("preparing {case}"))?;
        self.compare(truth, prepared.as_mut(), backend.accumulation())
    }

    /// Holds the first steps of a prepared case against the oracle; `sums` is the backend's
    /// [`Backend::sums`].
    pub fn compare(&mut self, truth: &Fixture, prepared: &mut dyn LoadedCase, sums: Sums) -> Result<Outcome> {
        let case = truth.case;
        let optimizes = case.workload.optimizes();
        // Of the optimizer alone nothing but the last is read: a wrong bias correction or moment shows
        // in three.
        let steps = if case.workload == Workload::OptimizerStep { 3 } else { 2 };
        let mut worst = 0.0_f64;
        let mut earlier: Vec<Vec<Tensor>> = Vec::new();
        for index in 0..steps {
            prepared.step().with_context(|| format!("a step of {case}"))?;
            let mut found = match prepared.outputs() {
                Err(error) if error.is::<RankMismatch>() => {
                    return Ok(Err(Mismatch::new(case, format!("{error}"))));
                }
                found => found.with_context(|| format!("reading the results of {case}"))?,
            };
            if let Shape::Buffer { .. } = case.shape {
                return Ok(moved(truth, &found));
            }
            // What trains moves, so the oracle of the first step does not hold for the second.
            let known = (index == 0 || !optimizes).then(|| self.oracle.expected(truth, sums));
            // The last update holds what went wrong in those before.
            let updates = optimizes && index + 1 == steps;
            let judged =
                known.map_or(Ok(0.0), |known| compare_tensors(case, &known, &found)).and_then(|share| {
                    Ok(if updates { share.max(updated(truth, &earlier, &found, sums)?) } else { share })
                });
            match judged {
                Ok(share) => worst = worst.max(share),
                wrong => return Ok(wrong),
            }
            if optimizes {
                if !is_miniature(case) {
                    found.retain(|t| t.name.starts_with("grad/"));
                }
                earlier.push(found);
            }
        }
        Ok(Ok(worst))
    }
}

fn is_miniature(case: Case) -> bool {
    case.shape.model().is_some_and(|(model, _)| model.is_miniature())
}

/// Holds the updates against AdamW on the backend's own gradients, and a second training step against
/// the parameters that the first one left.
fn updated(truth: &Fixture, earlier: &[Vec<Tensor>], found: &[Tensor], sums: Sums) -> Outcome {
    let case = truth.case;
    let fixed = case.workload == Workload::OptimizerStep;
    let of = |step: &[Tensor], t: &Tensor| -> Option<usize> {
        let name = format!("grad/{}", t.name);
        step.iter().position(|f| f.name == name && f.data.len() == t.data.len())
    };
    let mut gradients: Vec<Vec<&[f32]>> = Vec::new();
    for step in earlier.iter().map(Vec::as_slice).chain([found]) {
        let own = truth.parameters().iter().enumerate().map(|(i, parameter)| {
            let fixed_one = || Some(&truth.gradients()[i].data[..]);
            if fixed { fixed_one() } else { Some(&step[of(step, parameter)?].data[..]) }
        });
        let own: Option<Vec<&[f32]>> = own.collect();
        gradients.push(own.ok_or_else(|| Mismatch::new(case, "a gradient is missing"))?);
    }
    let mut worst = 0.0_f64;
    for layer in tolerance::tensor_groups(truth.parameters()) {
        let own: Vec<Vec<&[f32]>> = gradients.iter().map(|step| step[layer.clone()].to_vec()).collect();
        let parameters = &truth.parameters()[layer];
        let known = tolerance::expected_update(&truth.adamw, parameters, &own, case.method.precision);
        worst = worst.max(compare_tensors(case, &known, found)?);
    }
    match earlier {
        [first] if !fixed => Ok(worst.max(second(truth, first, found, sums)?)),
        _ => Ok(worst),
    }
}

/// The second training step: all of it where the oracle is quick, else that it is another.
fn second(truth: &Fixture, first: &[Tensor], found: &[Tensor], sums: Sums) -> Outcome {
    let case = truth.case;
    for new in found {
        let old = first.iter().find(|old| old.name == new.name);
        // Of few numbers some may be the same by chance, or zero.
        if new.name.starts_with("grad/")
            && new.data.len() >= 64
            && old.is_some_and(|old| old.data == new.data)
        {
            return Err(Mismatch::new(case, format!("{} is that of the step before", new.name)));
        }
    }
    if !is_miniature(case) {
        return Ok(0.0);
    }
    let mut moved = Fixture::for_parity(case);
    for parameter in truth.parameters() {
        let name = format!("param/{}", parameter.name);
        let now = first.iter().find(|t| t.name == name);
        let now = now.ok_or_else(|| Mismatch::new(case, format!("{name} is missing")))?;
        moved.edit_parameter(&parameter.name, |data| data.clone_from(&now.data));
    }
    compare_tensors(case, &ReferenceCache::default().expected(&moved, sums), found)
}

/// Whether each tensor is as near the truth as its precision allows; the largest share, or the
/// first tensor that is not, the worst of them.
pub fn compare_tensors(case: Case, known: &[Expected], found: &[Tensor]) -> Outcome {
    let worst =
        known.iter().map(|tensor| tensor.error_of(found)).max_by(|a, b| a.ratio().total_cmp(&b.ratio()));
    match worst {
        Some(judged) if judged.ratio() > 1.0 => Err(Mismatch::new(case, judged.text())),
        judged => Ok(judged.map_or(0.0, |j: TensorError| j.ratio())),
    }
}

/// A copy is exact, number by number; a sum over ranks too, of numbers that are made for it.
fn moved(truth: &Fixture, found: &[Tensor]) -> Outcome {
    let case = truth.case;
    let (expected, what): (Vec<f32>, &str) = if case.workload == Workload::AllReduce {
        (truth.sum_over_ranks(), "out is not the sum of the ranks' buffers")
    } else {
        (truth.input("buffer").data.iter().map(|v| -v).collect(), "out is not the buffer's negation")
    };
    let same = found.first().is_some_and(|out| out.data == expected);
    if same { Ok(0.0) } else { Err(Mismatch::new(case, what)) }
}
