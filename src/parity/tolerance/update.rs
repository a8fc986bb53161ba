//! The expected update of AdamW, and its tolerance.

use std::sync::Arc;

use super::{
    Expected, MIN_SCALE_TOLERANCE, SUM_TOLERANCE_FACTOR, TOLERANCE_FACTOR, norm, rounding_errors,
    with_tolerances,
};
use crate::fixture::AdamW;
use crate::reference::{Accumulation, NamedValues, Rounding, adamw};
use crate::suite::Precision;

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
