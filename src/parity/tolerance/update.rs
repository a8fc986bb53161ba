//! The expected updates of AdamW and of Muon, and their tolerances.

use std::sync::Arc;

use super::{
    Expected, MIN_SCALE_TOLERANCE, RoundingError, SUM_TOLERANCE_FACTOR, TOLERANCE_FACTOR, norm,
    rounding_errors, with_tolerances,
};
use crate::fixture::{AdamW, Muon, Tensor};
use crate::reference::{Accumulation, Format, NamedValues, Real, Rounding, adamw, muon};
use crate::suite::{Precision, cost};

/// Returns half of the spacing at 1 of a 16-bit format, the largest relative rounding error.
fn half_unit(precision: Precision) -> f64 {
    if precision == Precision::Bf16 { 2f64.powi(-8) } else { 2f64.powi(-11) }
}

/// The update of a parameter in one optimizer step.
pub struct Update<'a> {
    pub name: &'a str,
    /// Parameter, first and second moment before the step.
    pub state: [&'a [f32]; 3],
    pub gradient: &'a [f32],
}

/// Returns the expected parameters and moments of a layer after step number `step` of AdamW.
pub fn expected_update(
    options: &AdamW,
    layer: &[Update<'_>],
    step: i32,
    precision: Precision,
) -> Vec<Expected> {
    let (format, factor) = if precision.is_half() {
        (Rounding::for_precision(precision, Accumulation::Wide).leaf, TOLERANCE_FACTOR)
    } else {
        (Rounding::NONE.leaf, SUM_TOLERANCE_FACTOR)
    };
    let min_scale = precision.is_half().then_some(&(|_: &str| MIN_SCALE_TOLERANCE) as &dyn Fn(&str) -> f64);
    // Stored values may be off by the rounding of each of a few operations. A large value in a layer of small ones has
    // a larger error than the layer's mean.
    let spacing = if precision.is_half() { factor * half_unit(precision) } else { 0.0 };
    let mut all = Vec::new();
    // Each kind of tensor has its own rounding error, so the kinds do not share a tolerance.
    let (mut exact, mut rounded) = ([const { Vec::new() }; 3], [const { Vec::new() }; 3]);
    for Update { name, state, gradient } in layer {
        let wide = state.map(|values| values.iter().copied().map(f64::from).collect());
        let values = adamw::<f64>(options, &wide, gradient, step, Rounding::NONE.leaf);
        let data = adamw::<f32>(options, &state.map(<[f32]>::to_vec), gradient, step, format);
        for (kind, (values, data)) in values.into_iter().zip(data).enumerate() {
            let name = format!("{}/{name}", ["param", "moment1", "moment2"][kind]);
            exact[kind].push((name.clone(), Arc::new(values)));
            rounded[kind].push(NamedValues { name, data });
        }
    }
    for (exact, rounded) in exact.into_iter().zip(rounded) {
        let errors = rounding_errors(&exact, 1, |_| rounded.clone());
        all.extend(with_tolerances(exact, errors, |_| factor, min_scale));
    }
    for expected in &mut all {
        expected.tolerance = expected.tolerance.max(spacing * norm(expected.values.iter().copied()));
    }
    all
}

/// The update of a matrix by Muon.
pub struct MatrixUpdate<'a> {
    pub name: &'a str,
    pub dims: [usize; 2],
    /// Parameter and first moment before the step.
    pub state: [&'a [f32]; 2],
    pub gradient: &'a [f32],
}

impl MatrixUpdate<'_> {
    /// Returns the number of rounded runs: several if they take no time, and a few in bf16, where one run can have a small
    /// error of the scale by chance.
    fn runs(&self, rounding: &Rounding) -> usize {
        match cost::orthogonalization_flops(self.dims[0], self.dims[1]) {
            flops if flops < 100_000_000 => 8,
            _ if rounding.product != Format::Unrounded => 3,
            _ => 1,
        }
    }

    /// Returns the first moment after a step of Muon.
    pub fn expected_moment(&self, options: &Muon, precision: Precision) -> Expected {
        let rounding = Rounding::for_muon(precision);
        let moment: Vec<f64> = self.state[1].iter().copied().map(f64::from).collect();
        let [exact, _] = muon::momentum::<f64>(options, &moment, self.gradient, &Rounding::NONE);
        let name = format!("moment1/{}", self.name);
        let exact = (name.clone(), Arc::new(exact));
        let errors = rounding_errors(std::slice::from_ref(&exact), self.runs(&rounding), |seed| {
            let rounding = Rounding { seed, ..rounding };
            let [data, _] = muon::momentum::<f32>(options, self.state[1], self.gradient, &rounding);
            vec![NamedValues { name: name.clone(), data }]
        });
        let size = norm(exact.1.iter().copied());
        with_floor(exact, errors[0], rounding.leaf, precision, size, MIN_SCALE_TOLERANCE)
    }

    /// Returns the change of the matrix by a step apart from weight decay, from the matrix after it. An error of its scale
    /// is smaller in the matrix itself.
    pub fn change(&self, options: &Muon, after: &[f32]) -> Tensor {
        let name = format!("update/{}", self.name);
        Tensor { name, dims: self.dims.to_vec(), data: self.change_of(options, after) }
    }

    fn change_of<R: Real>(&self, options: &Muon, after: &[R]) -> Vec<R> {
        let decay = 1.0 - options.lr * options.weight_decay;
        let change = |(&after, &before): (&R, &f32)| R::from_f64(after.as_f64() - decay * f64::from(before));
        after.iter().zip(self.state[0]).map(change).collect()
    }

    /// Returns the change of the matrix by a step of Muon, and its first moment.
    ///
    /// Rounding errors of the iterations depend on the matrix: they multiply small singular values by up to 485, and the
    /// errors in them. The rounded runs of the reference have the same errors.
    pub fn expected(&self, options: &Muon, precision: Precision) -> Vec<Expected> {
        let rounding = Rounding::for_muon(precision);
        let state = self.state.map(|values| values.iter().copied().map(f64::from).collect::<Vec<f64>>());
        let state = state.each_ref().map(Vec::as_slice);
        let exact = muon::muon::<f64>(options, state, self.gradient, self.dims, &Rounding::NONE);
        let sizes = exact.each_ref().map(|values| norm(values.iter().copied()));
        let [parameter, moment] = exact;
        let names = ["update", "moment1"].map(|kind| format!("{kind}/{}", self.name));
        let exact = [self.change_of(options, &parameter), moment];
        let exact: Vec<_> = names.iter().cloned().zip(exact.map(Arc::new)).collect();
        let errors = rounding_errors(&exact, self.runs(&rounding), |seed| {
            let rounding = Rounding { seed, ..rounding };
            let data = muon::muon::<f32>(options, self.state, self.gradient, self.dims, &rounding);
            let [parameter, moment] = data;
            let data = [self.change_of(options, &parameter), moment];
            names.iter().cloned().zip(data).map(|(name, data)| NamedValues { name, data }).collect()
        });
        // Each iteration rounds two products with a common factor, and the errors add up like a random walk.
        let roundings = f64::from(2 * options.iterations);
        let formats = [
            (rounding.product, MIN_SCALE_TOLERANCE * roundings.sqrt()),
            (rounding.leaf, MIN_SCALE_TOLERANCE),
        ];
        let all = exact.into_iter().zip(errors).zip(formats.into_iter().zip(sizes));
        let expected = |((exact, error), ((format, min_scale), size))| {
            with_floor(exact, error, format, precision, size, min_scale)
        };
        all.map(expected).collect()
    }
}

/// Returns an expected tensor of Muon. `format` is that of its rounding errors. In f32, the order of sums dominates them.
/// `size` is the norm of the stored tensor, which may be off by the rounding of a few operations.
fn with_floor(
    exact: (String, Arc<Vec<f64>>),
    error: RoundingError,
    format: Format,
    precision: Precision,
    size: f64,
    min_scale: f64,
) -> Expected {
    let factor = if format == Format::Unrounded { SUM_TOLERANCE_FACTOR } else { TOLERANCE_FACTOR };
    let checks_scale = format != Format::Unrounded;
    let min_scale = |_: &str| min_scale;
    let min_scale = checks_scale.then_some(&min_scale as &dyn Fn(&str) -> f64);
    let mut expected =
        with_tolerances(vec![exact], vec![error], |_| factor, min_scale).pop().expect("one tensor");
    if precision.is_half() {
        expected.tolerance = expected.tolerance.max(factor * half_unit(precision) * size);
    }
    expected
}
