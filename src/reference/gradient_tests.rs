//! Compares the gradients of every workload and every model option with central differences of its loss.

use super::test_data::{self, hash};
use super::{DropoutMasks, LOSS_TERMS, NamedValues, Rounding, compute};
use crate::fixture::{Fixture, Tensor};
use crate::suite::{Case, Workload};

/// Values of parameters and inputs are multiples of this. They are below 2, so `value ± step` is exact in f32.
const GRID: f64 = 1.0 / (1 << 22) as f64;

/// The smallest step that is used, and that of a single element.
///
/// The truncation error is step²/6 times the third derivative of the loss, so 4e-11 of it. The rounding error is
/// about that of the loss over the step. ReLU has a kink, so the steps are short.
const ELEMENT_STEP: f64 = 1.0 / (1 << 16) as f64;

/// Elements that are tested of each tensor.
const ELEMENTS: usize = 6;

/// Random directions that are tested of each tensor. Each changes all of its elements.
const DIRECTIONS: u64 = 2;

/// The assumed third derivative of the loss along a unit vector, over the norm of the gradient.
///
/// The largest difference that was seen is 0.5 of the tolerance that follows, which is 4e-9 of the gradient.
const THIRD_DERIVATIVE: f64 = 1e2;

/// The relative error of the loss's terms.
const TERM_ERROR: f64 = 64.0 * f64::EPSILON;

fn values<'a>(all: &'a [NamedValues<f64>], name: &str) -> &'a [f64] {
    &all.iter().find(|values| values.name == name).unwrap_or_else(|| panic!("no result {name}")).data
}

/// A workload whose loss can be evaluated at other parameters and inputs.
struct Loss {
    fixture: Fixture,
    masks: Option<DropoutMasks<'static>>,
}

impl Loss {
    fn new(case: Case, masks: Option<DropoutMasks<'static>>) -> Self {
        // The gradients of a block are those of Σ out·upstream, which its forward workload computes.
        let workload = match case.workload {
            Workload::AttentionGrad => Workload::Attention,
            Workload::FeedForwardGrad => Workload::FeedForward,
            other => other,
        };
        Self { fixture: on_grid(Case { workload, ..case }), masks }
    }

    /// Returns the terms that add up to the loss.
    fn terms(&self) -> Vec<f64> {
        let all = compute::<f64>(&self.fixture, Rounding::NONE, self.masks);
        if self.fixture.case.workload.takes_model() {
            return values(&all, LOSS_TERMS).to_vec();
        }
        let upstream = &self.fixture.input("upstream").data;
        values(&all, "out").iter().zip(upstream).map(|(out, &g)| out * f64::from(g)).collect()
    }

    /// Adds to the elements of a parameter or an input.
    fn shift(&mut self, name: &str, by: &[(usize, f64)]) {
        let shift = |data: &mut Vec<f32>| {
            for &(index, by) in by {
                let shifted = f64::from(data[index]) + by;
                data[index] = shifted as f32;
                assert_eq!(f64::from(data[index]), shifted, "{name} is on the grid");
            }
        };
        if name == "x" {
            self.fixture.edit_input(name, shift)
        } else {
            self.fixture.edit_parameter(name, shift)
        }
    }

    /// Returns the central difference in a direction, and a bound of its error by rounding.
    fn difference(&mut self, name: &str, direction: &[(usize, f64)]) -> [f64; 2] {
        let scaled = |factor: f64| direction.iter().map(|&(i, by)| (i, factor * by)).collect::<Vec<_>>();
        self.shift(name, direction);
        let above = self.terms();
        self.shift(name, &scaled(-2.0));
        let below = self.terms();
        self.shift(name, direction);
        let difference: f64 = above.iter().zip(&below).map(|(above, below)| above - below).sum();
        let size = above.iter().map(|term| term * term).sum::<f64>().sqrt();
        [difference / 2.0, TERM_ERROR * size]
    }
}

/// Returns the fixture with all values rounded to [`GRID`].
fn on_grid(case: Case) -> Fixture {
    let mut fixture = Fixture::for_parity(case);
    let round = |data: &mut Vec<f32>| {
        data.iter_mut().for_each(|v| *v = ((f64::from(*v) / GRID).round() * GRID) as f32);
    };
    let names = |all: &[Tensor]| all.iter().map(|tensor| tensor.name.clone()).collect::<Vec<_>>();
    names(fixture.parameters()).iter().for_each(|name| fixture.edit_parameter(name, round));
    names(fixture.inputs()).iter().for_each(|name| fixture.edit_input(name, round));
    fixture
}

/// Returns the elements and directions in which a tensor of `len` elements is tested, with steps.
fn directions(len: usize) -> Vec<Vec<(usize, f64)>> {
    let elements =
        (0..ELEMENTS.min(len)).map(|i| vec![((2 * i + 1) * len / (2 * ELEMENTS.min(len)), ELEMENT_STEP)]);
    // Of about the same length as an element's step, and still on the grid.
    let step = (ELEMENT_STEP / (len as f64).sqrt()).log2().floor().exp2().max(GRID);
    let random = (0..DIRECTIONS).map(|seed| {
        (0..len).map(|i| (i, if hash(seed, i as u64).is_multiple_of(2) { step } else { -step })).collect()
    });
    elements.chain(random).collect()
}

/// Returns the largest difference of a case over its tolerance.
fn check(case: Case, masks: Option<DropoutMasks<'static>>) -> f64 {
    let fixture = on_grid(case);
    let all = compute::<f64>(&fixture, Rounding::NONE, masks);
    let mut loss = Loss::new(case, masks);
    let mut names: Vec<&str> = fixture.trained_parameters().map(|tensor| &*tensor.name).collect();
    names.extend(case.workload.block().map(|_| "x"));
    let mut worst = 0.0_f64;
    for name in names {
        let gradient = values(&all, &format!("grad/{name}"));
        let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
        for direction in directions(gradient.len()) {
            let expected: f64 = direction.iter().map(|&(i, by)| gradient[i] * by).sum();
            let step = direction.iter().map(|(_, by)| by * by).sum::<f64>().sqrt();
            let [difference, rounding] = loss.difference(name, &direction);
            let tolerance = rounding + step.powi(3) / 6.0 * THIRD_DERIVATIVE * norm;
            let ratio = (difference - expected).abs() / tolerance;
            worst = worst.max(ratio);
        }
    }
    worst
}

#[test]
fn gradients_agree_with_central_differences() {
    let trained = test_data::cases().into_iter().filter(|case| case.workload.trains());
    let checks: Vec<(Case, Option<DropoutMasks<'static>>)> = trained
        .flat_map(|case| [(case, None), (case, Some(&test_data::masks as DropoutMasks<'static>))])
        .collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for first in 0..threads {
            let own = checks.iter().skip(first).step_by(threads);
            scope.spawn(move || {
                for &(case, masks) in own {
                    let ratio = check(case, masks);
                    assert!(ratio <= 1.0, "{case}, dropout {}: {ratio:.2} of the tolerance", masks.is_some());
                }
            });
        }
    });
}
