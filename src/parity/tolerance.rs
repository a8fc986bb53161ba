//! Expected results and tolerances, both from the f64 reference.
//!
//! The reference computes in f64, and as the precision does, with every result rounded to its format. The distance
//! of the two is the rounding error of the precision. A backend rounds in another order, so its error may be a few
//! times as large. The distance can be small by chance. The reference therefore rounds several times if that is
//! fast, and the variance of a small tensor is shrunk towards the variance of its layer (Smyth, *Stat. Appl. Genet.
//! Mol. Biol.* 3, 2004).

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use crate::fixture::{AdamW, Fixture, Tensor};
use crate::reference::{self, Accumulation, DropoutMasks, LOSS_TERMS, NamedValues, Rounding, adamw};
use crate::suite::{Precision, Shape, Workload, cost};

/// Tolerance over the rounding error of the reference. Measured over all tensors, precisions and variants of both
/// frameworks on CPUs, the error of a backend is 1.0 times as large (median), and 1.9 times at most.
const TOLERANCE_FACTOR: f64 = 3.0;

/// [`TOLERANCE_FACTOR`] if the order of a long sum dominates, which each framework chooses: in f32, and for sums that
/// accumulate in the type of their terms. The largest measured value is 6.2, for a sum over 1,776 rows.
const SUM_TOLERANCE_FACTOR: f64 = 16.0;

/// Returns the tolerance of a tensor over the rounding error of the reference.
fn tolerance_factor(name: &str, precision: Precision, accumulation: Accumulation) -> f64 {
    let of_norm = name.contains("norm");
    let narrow_sum = match accumulation {
        Accumulation::Wide => false,
        Accumulation::NarrowInNorms => of_norm,
        Accumulation::Narrow => {
            of_norm || name.ends_with("bias") || name.ends_with("position") || name.ends_with("type")
        }
    };
    if precision == Precision::F32 || narrow_sum { SUM_TOLERANCE_FACTOR } else { TOLERANCE_FACTOR }
}

/// Weight of the variance of the whole layer, as a number of values.
const PRIOR_WEIGHT: f64 = 16.0;

/// The expected values of a tensor.
#[derive(Clone, Debug)]
pub struct Expected {
    pub name: String,
    pub values: Arc<Vec<f64>>,
    /// Largest L2 norm of the error.
    pub tolerance: f64,
}

/// The error of a tensor. All values are L2 norms.
#[derive(Clone, Debug)]
pub struct TensorError {
    pub name: String,
    pub error: f64,
    pub tolerance: f64,
    /// The norm of the expected values.
    pub norm: f64,
}

impl TensorError {
    /// Returns error / tolerance. NaN counts as infinite.
    pub fn ratio(&self) -> f64 {
        if self.error.is_nan() {
            f64::INFINITY
        } else if self.error <= self.tolerance {
            // Both may be zero.
            self.error / self.tolerance.max(f64::MIN_POSITIVE)
        } else {
            self.error / self.tolerance
        }
    }
}

impl fmt::Display for TensorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, of) = if self.norm > self.tolerance {
            (self.norm, "of its norm")
        } else {
            (1.0, "in its norm, which should vanish")
        };
        let [error, tolerance] = [self.error / unit, self.tolerance / unit];
        write!(f, "{}: error {error:.2e} {of}, tolerance {tolerance:.2e}", self.name)
    }
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|v| v * v).sum::<f64>().sqrt()
}

impl Expected {
    /// Compares the tensor of this name. The error of a missing tensor, or of a wrong length, is infinite.
    pub fn error(&self, results: &[Tensor]) -> TensorError {
        let error = match results.iter().find(|t| t.name == self.name) {
            Some(t) if t.data.len() == self.values.len() => {
                norm(t.data.iter().zip(&*self.values).map(|(&a, &b)| f64::from(a) - b))
            }
            _ => f64::INFINITY,
        };
        let norm = norm(self.values.iter().copied());
        TensorError { name: self.name.clone(), error, tolerance: self.tolerance, norm }
    }
}

/// The results of the reference in f64.
type ExactResults = Vec<(String, Arc<Vec<f64>>)>;

/// Returns the squared rounding error of each tensor, as a mean over `runs` runs with different seeds.
fn squared_errors(
    exact: &ExactResults,
    runs: usize,
    rounded: impl Fn(u64) -> Vec<NamedValues<f32>>,
) -> Vec<f64> {
    let mut sums = vec![0.0; exact.len()];
    for seed in 0..runs {
        for ((sum, (_, exact)), rounded) in sums.iter_mut().zip(exact).zip(rounded(seed as u64)) {
            *sum += exact.iter().zip(&rounded.data).map(|(a, &b)| (a - f64::from(b)).powi(2)).sum::<f64>();
        }
    }
    sums.into_iter().map(|sum| sum / runs as f64).collect()
}

/// Returns the number of rounded runs of the reference: several if they take no time, one if it takes seconds.
fn rounded_runs(fixture: &Fixture) -> usize {
    let distinct = fixture.samples().iter().max().map_or(1, |largest| largest + 1) as f64;
    let flops = cost::flops(&fixture.case) as f64 * distinct / fixture.samples().len() as f64;
    match flops {
        f if f < 1e9 => 8,
        f if f < 1e11 => 3,
        _ => 1,
    }
}

/// Returns the distance between the f32 nearest to a value and the next larger one.
fn f32_spacing(value: f64) -> f64 {
    let nearest = (value as f32).abs();
    f64::from(nearest.next_up() - nearest)
}

/// Combines exact results with tolerances from their squared rounding errors.
fn with_tolerances(
    exact: ExactResults,
    squared_errors: Vec<f64>,
    factor: impl Fn(&str) -> f64,
) -> Vec<Expected> {
    let mut layers: HashMap<String, [f64; 2]> = HashMap::new();
    for ((name, values), square) in exact.iter().zip(&squared_errors) {
        let sums = layers.entry(layer_name(name).to_owned()).or_default();
        sums[0] += square;
        sums[1] += values.len() as f64;
    }
    let mut all: Vec<Expected> = Vec::new();
    for ((name, values), square) in exact.into_iter().zip(squared_errors) {
        let count = values.len() as f64;
        if name == LOSS_TERMS {
            // The error of a mean is at most the root mean square error of its terms. The loss is a single f32: all
            // rounded runs may hit the nearest f32, and a backend the one next to it.
            let loss = all.last_mut().expect("the loss precedes its terms");
            let error = factor("loss") * (count * square).sqrt();
            loss.tolerance = error.max(1.5 * f32_spacing(loss.values[0]));
            continue;
        }
        let [layer_square, layer_count] = layers[layer_name(&name)];
        let variance = (PRIOR_WEIGHT * layer_square / layer_count + square) / (PRIOR_WEIGHT + count);
        let tolerance = factor(&name) * (count * variance).sqrt();
        all.push(Expected { name, values, tolerance });
    }
    all
}

/// Properties on which the exact results of a shape depend: dropout, the optimizer alone, and the storage format.
type ExactKey = (bool, bool, Option<Precision>);

/// A cache of the expected results of one shape.
#[derive(Default)]
pub struct ReferenceCache {
    shape: Option<Shape>,
    exact: HashMap<ExactKey, ExactResults>,
    expected: HashMap<(ExactKey, Precision, Accumulation, bool), Arc<Vec<Expected>>>,
}

impl ReferenceCache {
    /// Returns the expected results of a step with a parity fixture, without those of the optimizer.
    pub fn expected(&mut self, fixture: &Fixture, accumulation: Accumulation) -> Arc<Vec<Expected>> {
        let case = fixture.case;
        // The number of ranks does not change the function.
        let shape = case.shape.with_ranks(1);
        if self.shape != Some(shape) {
            *self = Self { shape: Some(shape), ..Self::default() };
        }
        let precision = case.method.precision;
        let stored = precision.is_half().then_some(precision);
        let exact_key = (case.workload.trains(), case.workload == Workload::OptimizerStep, stored);
        let key = (exact_key, precision, accumulation, case.fuses_attention());
        if let Some(expected) = self.expected.get(&key) {
            return Arc::clone(expected);
        }
        let exact = self.exact.entry(exact_key).or_insert_with(|| exact_results(fixture, None)).clone();
        let expected = Arc::new(expected_results(fixture, accumulation, exact, None));
        self.expected.insert(key, Arc::clone(&expected));
        expected
    }
}

fn exact_results(fixture: &Fixture, masks: Option<DropoutMasks<'_>>) -> ExactResults {
    let all = reference::compute::<f64>(fixture, Rounding::NONE, masks);
    all.into_iter().map(|values| (values.name, Arc::new(values.data))).collect()
}

/// Computes the tolerances of exact results in the precision of the fixture.
fn expected_results(
    fixture: &Fixture,
    accumulation: Accumulation,
    exact: ExactResults,
    masks: Option<DropoutMasks<'_>>,
) -> Vec<Expected> {
    let precision = fixture.case.method.precision;
    let rounding = Rounding {
        fused_attention: fixture.case.fuses_attention(),
        ..Rounding::for_precision(precision, accumulation)
    };
    let squared_errors = squared_errors(&exact, rounded_runs(fixture), |seed| {
        reference::compute(fixture, Rounding { seed, ..rounding }, masks)
    });
    with_tolerances(exact, squared_errors, |name| tolerance_factor(name, precision, accumulation))
}

/// Returns the expected results of a step with known dropout masks.
pub fn expected_with_masks(
    fixture: &Fixture,
    accumulation: Accumulation,
    masks: DropoutMasks<'_>,
) -> Vec<Expected> {
    expected_results(fixture, accumulation, exact_results(fixture, Some(masks)), Some(masks))
}

/// Returns the layer of a parameter: its name without the last part.
pub fn layer_name(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(layer, _)| layer)
}

/// Returns the expected parameters after AdamW steps from zero moments, with the backend's own gradients. The first
/// step only depends on the sign of a gradient, and rounding decides the sign of a zero gradient.
pub fn expected_update(
    adamw_options: &AdamW,
    parameters: &[Tensor],
    gradients_of_steps: &[Vec<&[f32]>],
    precision: Precision,
) -> Vec<Expected> {
    let (format, factor) = if precision.is_half() {
        (Rounding::for_precision(precision, Accumulation::Wide).leaf, TOLERANCE_FACTOR)
    } else {
        (Rounding::NONE.leaf, SUM_TOLERANCE_FACTOR)
    };
    let (mut exact, mut rounded) = (Vec::new(), Vec::new());
    for (index, parameter) in parameters.iter().enumerate() {
        let name = format!("param/{}", parameter.name);
        let gradients: Vec<&[f32]> = gradients_of_steps.iter().map(|step| step[index]).collect();
        let values = adamw::<f64>(adamw_options, &parameter.data, &gradients, Rounding::NONE.leaf);
        exact.push((name.clone(), Arc::new(values)));
        let data = adamw::<f32>(adamw_options, &parameter.data, &gradients, format);
        rounded.push(NamedValues { name, data });
    }
    let squared_errors = squared_errors(&exact, 1, |_| rounded.clone());
    with_tolerances(exact, squared_errors, |_| factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expected(values: &[f64], tolerance: f64) -> Expected {
        Expected { name: "a".to_owned(), values: Arc::new(values.to_vec()), tolerance }
    }

    /// Returns error / tolerance of a tensor with one value.
    fn ratio(exact: f64, tolerance: f64, result: f32) -> f64 {
        let result = Tensor { name: "a".to_owned(), dims: vec![1], data: vec![result] };
        expected(&[exact], tolerance).error(&[result]).ratio()
    }

    #[test]
    fn nan_missing_and_short_tensors_are_errors() {
        assert_eq!(ratio(1.0, 1.0, f32::NAN), f64::INFINITY);
        let expected = expected(&[1.0, 1.0], 9.0);
        assert_eq!(expected.error(&[]).ratio(), f64::INFINITY);
        let short = Tensor { name: "a".to_owned(), dims: vec![1], data: vec![1.0] };
        assert_eq!(expected.error(&[short]).ratio(), f64::INFINITY);
    }

    #[test]
    fn a_tolerance_of_zero_requires_the_exact_value() {
        assert_eq!(ratio(1.0, 0.0, 1.0), 0.0);
        assert_eq!(ratio(1.0, 0.0, 1.0 + f32::EPSILON), f64::INFINITY);
        assert!(ratio(1.0, 0.5, 1.4) < 1.0 && ratio(1.0, 0.5, 1.6) > 1.0);
    }

    #[test]
    fn a_small_tensor_gets_the_tolerance_of_its_layer() {
        let tensors = [("grad/o.weight", 1000, 1e-3f64), ("grad/o.bias", 1, 0.0), ("grad/p.bias", 1, 0.0)];
        let all = with_tolerances(
            tensors.iter().map(|(name, n, _)| ((*name).to_owned(), Arc::new(vec![1.0; *n]))).collect(),
            tensors.iter().map(|(_, n, error)| *n as f64 * error * error).collect(),
            |_| TOLERANCE_FACTOR,
        );
        // A single value gets 16 of 17 parts of the variance of the layer.
        let relative = |i: usize| all[i].tolerance / (TOLERANCE_FACTOR * 1e-3);
        assert!((relative(1) - (16.0f64 / 17.0).sqrt()).abs() < 1e-2);
        assert!((relative(0) / 1000f64.sqrt() - 1.0).abs() < 1e-2);
        assert_eq!(all[2].tolerance, 0.0);
    }

    #[test]
    fn a_loss_may_be_the_f32_next_to_the_nearest_one() {
        let next = |steps: i32| (0..steps).fold(2.9f32, |value, _| value.next_up());
        // The exact loss is between two f32 values, and no rounded run has an error.
        let exact = f64::from(next(0)) + 0.4 * f64::from(next(1) - next(0));
        let results = ["loss", LOSS_TERMS].map(|name| (name.to_owned(), Arc::new(vec![exact])));
        let tolerance = with_tolerances(results.to_vec(), vec![0.0, 0.0], |_| TOLERANCE_FACTOR)[0].tolerance;
        assert!(ratio(exact, tolerance, next(0)) <= 1.0 && ratio(exact, tolerance, next(1)) <= 1.0);
        assert!(ratio(exact, tolerance, next(0).next_down()) <= 1.0);
        assert!(ratio(exact, tolerance, next(2)) > 1.0);
    }
}
