//! Expected results and tolerances, both from the f64 reference.
//!
//! The reference computes in f64, and as the precision does, with every result rounded to its format. The distance
//! of the two is the rounding error of the precision. A backend rounds in another order, so its error may be a few
//! times as large. The distance can be small by chance. The reference therefore rounds several times if that is
//! fast, and the variance of a small tensor is shrunk towards the variance of its layer (Smyth, *Stat. Appl. Genet.
//! Mol. Biol.* 3, 2004).

mod operation;
mod update;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use crate::fixture::{Fixture, Tensor};
use crate::reference::{self, Accumulation, DropoutMasks, LOSS_TERMS, NamedValues, Rounding};
use crate::suite::{Case, Device, Precision, Shape, Workload, cost};
pub use operation::expected_operation;
pub use update::{MatrixUpdate, Update, expected_update};

/// Tolerance over the rounding error of the reference. Measured over all tensors, precisions and variants of both
/// frameworks on CPUs, the error of a backend is 1.0 times as large (median), and 1.9 times at most.
const TOLERANCE_FACTOR: f64 = 3.0;

/// [`TOLERANCE_FACTOR`] if the order of a long sum dominates, which each framework chooses: in f32, and for sums that
/// accumulate in the type of their terms. The largest measured value is 6.2, for a sum over 1,776 rows.
const SUM_TOLERANCE_FACTOR: f64 = 16.0;

/// [`SUM_TOLERANCE_FACTOR`] with saturated softmax in f32 and TF32. An attention score near 100 has two digits less, and
/// kernels differ in how they compute and subtract it. The largest measured value is 85, of PyTorch's fused attention on an
/// H200.
const SATURATED_TOLERANCE_FACTOR: f64 = 256.0;

/// Tolerance in f32 and TF32 on Apple's GPUs, as a factor. Fast math allows exp an error of 3 + ⌊|2x|⌋ units in the last
/// place (Metal Shading Language specification, table 8.2), and polynomials for erf and tanh have similar ones. With 4
/// to 24 units in exp, erf, tanh, ln and the square root, the error in `fast_math.rs` is at most 1.1 times the tolerance
/// without this factor. The rest allows for kernels that sum in another order.
const FAST_MATH_FACTOR: f64 = 8.0;

/// [`FAST_MATH_FACTOR`] with saturated softmax, where a gradient of a head nearly cancels. The error in `fast_math.rs` is
/// 3.3 times the tolerance without this factor.
const SATURATED_FAST_MATH_FACTOR: f64 = 32.0;

/// [`SATURATED_TOLERANCE_FACTOR`] of fused attention, as a factor. On a CPU with AVX-512, PyTorch computes its exp with an
/// error of up to 20 units in the last place (`exp_u20` in ATen's `vec512_float.h`). The largest error measured there is
/// 1.5 times the tolerance without this factor.
const SATURATED_FUSED_FACTOR: f64 = 4.0;

/// Returns true if the device of a case computes functions in fast math.
fn uses_fast_math(case: &Case) -> bool {
    case.backend.device() == Device::AppleGpu
}

/// Returns true if a backend sums the rows of a gradient in the type of the summands.
fn is_narrow_sum(name: &str, accumulation: Accumulation) -> bool {
    let of_norm = name.contains("norm");
    match accumulation {
        Accumulation::Wide => false,
        Accumulation::NarrowInNorms => of_norm,
        Accumulation::Narrow => {
            of_norm || name.ends_with("bias") || name.ends_with("position") || name.ends_with("type")
        }
    }
}

/// Returns the tolerance of a tensor over the rounding error of the reference.
fn tolerance_factor(name: &str, fixture: &Fixture, accumulation: Accumulation) -> f64 {
    let precision = fixture.case.method.precision;
    let is_saturated = fixture.batch_number() > 0 && fixture.is_for_parity();
    let of_functions = match (uses_fast_math(&fixture.case), is_saturated) {
        (false, _) => 1.0,
        (true, false) => FAST_MATH_FACTOR,
        (true, true) => SATURATED_FAST_MATH_FACTOR,
    };
    let of_fusion = if fixture.case.fuses_attention() { SATURATED_FUSED_FACTOR } else { 1.0 };
    match precision {
        Precision::F32 | Precision::Tf32 if is_saturated => {
            of_functions.max(of_fusion) * SATURATED_TOLERANCE_FACTOR
        }
        Precision::F32 => of_functions * SUM_TOLERANCE_FACTOR,
        _ if is_narrow_sum(name, accumulation) => SUM_TOLERANCE_FACTOR,
        _ => TOLERANCE_FACTOR,
    }
}

/// Returns the smallest tolerance of the scale. Each layer rounds common factors, such as that of its norm, and the errors
/// of several layers add up like a random walk. In 30 layers on an H200, the largest error was 1.0 %, of 2.1 % that are
/// allowed. A long sum in bf16 stops growing, so that MLX's gradients of biases were
/// measured to be half as large as the reference, and PyTorch's gradients of norms 20 % smaller. A wrong sign is an
/// error of 2.
fn min_scale_tolerance(name: &str, shape: Shape, accumulation: Accumulation) -> f64 {
    let layers = match shape {
        Shape::Model { model, .. } => model.layers,
        _ => 1,
    };
    match accumulation {
        Accumulation::Narrow if is_narrow_sum(name, accumulation) => 0.75,
        Accumulation::NarrowInNorms if is_narrow_sum(name, accumulation) => 0.4,
        _ => MIN_SCALE_TOLERANCE * (layers as f64).sqrt(),
    }
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
    /// Largest scale error, see [`RoundingError`]. `None` if rounding may be larger than the values.
    pub scale_tolerance: Option<f64>,
}

/// The error of a tensor. `error`, `tolerance` and `norm` are L2 norms.
#[derive(Clone, Debug)]
pub struct TensorError {
    pub name: String,
    pub error: f64,
    pub tolerance: f64,
    /// The norm of the expected values.
    pub norm: f64,
    /// The scale error, and its tolerance.
    pub scale: f64,
    pub scale_tolerance: Option<f64>,
    /// Number of results that are NaN.
    pub nan: usize,
}

/// Returns error / tolerance. NaN counts as infinite.
fn share(error: f64, tolerance: f64) -> f64 {
    if error.is_nan() {
        f64::INFINITY
    } else if error <= tolerance {
        // Both may be zero.
        error / tolerance.max(f64::MIN_POSITIVE)
    } else {
        error / tolerance
    }
}

impl TensorError {
    /// Returns error / tolerance of the scale of all values.
    fn scale_ratio(&self) -> f64 {
        self.scale_tolerance.map_or(0.0, |tolerance| share(self.scale.abs(), tolerance))
    }

    /// Returns error / tolerance, of the values or of their scale, whichever is larger.
    pub fn ratio(&self) -> f64 {
        share(self.error, self.tolerance).max(self.scale_ratio())
    }
}

impl fmt::Display for TensorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nan > 0 {
            return write!(f, "{}: {} NaN", self.name, self.nan);
        }
        if let Some(tolerance) = self.scale_tolerance
            && self.scale_ratio() > share(self.error, self.tolerance)
        {
            let [factor, tolerance] = [1.0 + self.scale, 100.0 * tolerance];
            return write!(f, "{}: {factor:.4} times the reference, tolerance {tolerance:.2} %", self.name);
        }
        let (unit, of) = if self.norm > self.tolerance {
            (self.norm, "of its norm")
        } else {
            (1.0, "in its norm, which should vanish")
        };
        let [error, tolerance] = [self.error / unit, self.tolerance / unit];
        write!(f, "{}: error {error:.2e} {of}, tolerance {tolerance:.2e}", self.name)
    }
}

fn sum_of_squares(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|v| v * v).sum()
}

/// Returns the L2 norm.
pub fn norm(values: impl Iterator<Item = f64>) -> f64 {
    sum_of_squares(values).sqrt()
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
        let (name, tolerance) = (self.name.clone(), self.tolerance);
        let found = results.iter().find(|t| t.name == self.name).map_or(&[][..], |t| &t.data);
        let scale = scale_error(&self.values, found);
        let nan = found.iter().filter(|v| v.is_nan()).count();
        TensorError { name, error, tolerance, norm, scale, scale_tolerance: self.scale_tolerance, nan }
    }
}

/// The results of the reference in f64.
type ExactResults = Vec<(String, Arc<Vec<f64>>)>;

/// The rounding error of a tensor, as a mean over runs.
#[derive(Clone, Copy, Debug, Default)]
struct RoundingError {
    /// Square of the L2 norm of the error.
    square: f64,
    /// Square of the scale error: the projection of the error on the values, as a share of their norm. Rounding
    /// errors of single values hide a fault in one of them, but cancel in this sum. A gradient that is 1 % too large
    /// has a scale error of 0.01.
    scale_square: f64,
}

/// Returns the projection of `found - exact` on `exact` as a share of the norm of `exact`.
fn scale_error(exact: &[f64], found: &[f32]) -> f64 {
    let projection: f64 = exact.iter().zip(found).map(|(a, &b)| (f64::from(b) - a) * a).sum();
    projection / sum_of_squares(exact.iter().copied())
}

/// Returns the rounding error of each tensor, as a mean over `runs` runs with different seeds.
fn rounding_errors(
    exact: &[(String, Arc<Vec<f64>>)],
    runs: usize,
    rounded: impl Fn(u64) -> Vec<NamedValues<f32>>,
) -> Vec<RoundingError> {
    let mut errors = vec![RoundingError::default(); exact.len()];
    for seed in 0..runs {
        for ((error, (_, exact)), rounded) in errors.iter_mut().zip(exact).zip(rounded(seed as u64)) {
            let differences = exact.iter().zip(&rounded.data).map(|(a, &b)| a - f64::from(b));
            error.square += sum_of_squares(differences) / runs as f64;
            error.scale_square += scale_error(exact, &rounded.data).powi(2) / runs as f64;
        }
    }
    errors
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

/// Sums over the tensors of a layer.
#[derive(Default)]
struct LayerSums {
    square: f64,
    values: f64,
    scale_square: f64,
    tensors: f64,
}

/// Tolerance of the scale over its rounding error. The error is a single number per run, so its estimate is poor.
/// Measured over 20,000 tensors of both frameworks in bf16, f16 and mixed precision on a CPU, the error of a backend is
/// 0.5 times as large (median), and 4.7 times at most.
const SCALE_TOLERANCE_FACTOR: f64 = 8.0;
/// The scale may be wrong by half of the spacing of bf16 at 1, 2⁻⁸: a single rounding of a common factor.
const MIN_SCALE_TOLERANCE: f64 = 1.0 / 256.0;

/// Returns true if the rounding error of values is less than half of their norm. Their scale is then known.
fn has_scale(square: f64, error_square: f64) -> bool {
    error_square < 0.25 * square
}

/// Returns the tolerance of the scale, or `None` if the values have none. It is not below the error of independent
/// values.
fn scale_tolerance(values: &[f64], variance: f64, layer: &LayerSums, min: f64) -> Option<f64> {
    let square = sum_of_squares(values.iter().copied());
    let of_layer = layer.scale_square / layer.tensors.max(1.0);
    let tolerance = SCALE_TOLERANCE_FACTOR * of_layer.max(variance / square).sqrt();
    has_scale(square, variance * values.len() as f64).then(|| tolerance.max(min))
}

/// Combines exact results with tolerances from their rounding errors. Without a smallest tolerance of the scale, the
/// scale is not checked: in f32, the tolerance of the values is small enough.
fn with_tolerances(
    exact: ExactResults,
    errors: Vec<RoundingError>,
    factor: impl Fn(&str) -> f64,
    min_scale_tolerance: Option<&dyn Fn(&str) -> f64>,
) -> Vec<Expected> {
    let mut layers: HashMap<String, LayerSums> = HashMap::new();
    for ((name, values), error) in exact.iter().zip(&errors) {
        let sums = layers.entry(layer_name(name).to_owned()).or_default();
        sums.square += error.square;
        sums.values += values.len() as f64;
        if has_scale(sum_of_squares(values.iter().copied()), error.square) {
            sums.scale_square += error.scale_square;
            sums.tensors += 1.0;
        }
    }
    let mut all: Vec<Expected> = Vec::new();
    for ((name, values), RoundingError { square, .. }) in exact.into_iter().zip(errors) {
        let count = values.len() as f64;
        if name == LOSS_TERMS {
            // The error of a mean is at most the root mean square error of its terms. The loss is a single f32: all
            // rounded runs may hit the nearest f32, and a backend the one next to it.
            let loss = all.last_mut().expect("the loss precedes its terms");
            let error = factor("loss") * (count * square).sqrt();
            loss.tolerance = error.max(1.5 * f32_spacing(loss.values[0]));
            continue;
        }
        let layer = &layers[layer_name(&name)];
        let variance = (PRIOR_WEIGHT * layer.square / layer.values + square) / (PRIOR_WEIGHT + count);
        let tolerance = factor(&name) * (count * variance).sqrt();
        let scale_tolerance =
            min_scale_tolerance.and_then(|min| scale_tolerance(&values, variance, layer, min(&name)));
        all.push(Expected { name, values, tolerance, scale_tolerance });
    }
    all
}

/// Properties on which the exact results of a shape depend: dropout, the optimizer alone, the storage format, and the
/// number of the batch.
type ExactKey = (bool, bool, Option<Precision>, usize);

/// The key of expected results. Two properties of the case change their tolerance: fused attention and fast math.
type ExpectedKey = (ExactKey, Precision, Accumulation, [bool; 2]);

/// A cache of the expected results of one shape.
#[derive(Default)]
pub struct ReferenceCache {
    shape: Option<Shape>,
    exact: HashMap<ExactKey, ExactResults>,
    expected: HashMap<ExpectedKey, Arc<Vec<Expected>>>,
}

impl ReferenceCache {
    /// Returns the expected results of a step with a parity fixture, without those of the optimizer.
    pub fn expected(&mut self, fixture: &Fixture, accumulation: Accumulation) -> Arc<Vec<Expected>> {
        let case = fixture.case;
        // Ranks and micro-batches do not change the function.
        let shape = case.shape.undivided();
        if self.shape != Some(shape) {
            *self = Self { shape: Some(shape), ..Self::default() };
        }
        let precision = case.method.precision;
        let stored = precision.is_half().then_some(precision);
        let optimizer_alone = case.workload == Workload::OptimizerStep;
        let exact_key = (case.workload.trains(), optimizer_alone, stored, fixture.batch_number());
        let key = (exact_key, precision, accumulation, [case.fuses_attention(), uses_fast_math(&case)]);
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
    let errors = rounding_errors(&exact, rounded_runs(fixture), |seed| {
        reference::compute(fixture, Rounding { seed, ..rounding }, masks)
    });
    let min_scale = |name: &str| min_scale_tolerance(name, fixture.case.shape, accumulation);
    let checks_scale = !matches!(precision, Precision::F32 | Precision::Tf32);
    let min_scale = checks_scale.then_some(&min_scale as &dyn Fn(&str) -> f64);
    with_tolerances(exact, errors, |name| tolerance_factor(name, fixture, accumulation), min_scale)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn expected(values: &[f64], tolerance: f64) -> Expected {
        Expected { name: "a".to_owned(), values: Arc::new(values.to_vec()), tolerance, scale_tolerance: None }
    }

    /// Returns error / tolerance of a tensor with one value.
    fn ratio(exact: f64, tolerance: f64, result: f32) -> f64 {
        let result = Tensor { name: "a".to_owned(), dims: vec![1], data: vec![result] };
        expected(&[exact], tolerance).error(&[result]).ratio()
    }

    fn squared(square: f64) -> RoundingError {
        RoundingError { square, scale_square: 0.0 }
    }

    #[test]
    fn nan_missing_and_short_tensors_are_errors() {
        assert_eq!(ratio(1.0, 1.0, f32::NAN), f64::INFINITY);
        let expected = expected(&[1.0, 1.0], 9.0);
        let nan = Tensor { name: "a".to_owned(), dims: vec![2], data: vec![f32::NAN, 1.0] };
        assert_eq!(expected.error(&[nan]).to_string(), "a: 1 NaN");
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
            tensors.iter().map(|(_, n, error)| squared(*n as f64 * error * error)).collect(),
            |_| TOLERANCE_FACTOR,
            None,
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
        let errors = vec![squared(0.0); 2];
        let tolerance = with_tolerances(results.to_vec(), errors, |_| TOLERANCE_FACTOR, None)[0].tolerance;
        assert!(ratio(exact, tolerance, next(0)) <= 1.0 && ratio(exact, tolerance, next(1)) <= 1.0);
        assert!(ratio(exact, tolerance, next(0).next_down()) <= 1.0);
        assert!(ratio(exact, tolerance, next(2)) > 1.0);
    }
}
