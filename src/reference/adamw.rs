//! The AdamW optimizer.

use super::matmul::{Real, cores, for_each_chunk};
use super::rounding::Format;
use crate::fixture::AdamW;

/// Returns parameter, first and second moment after step number `step`. `state` has them before it. Every result is
/// rounded to `format`.
pub fn adamw<R: Real>(
    options: &AdamW,
    state: &[Vec<R>; 3],
    gradient: &[f32],
    step: i32,
    format: Format,
) -> [Vec<R>; 3] {
    let r = |v: R| format.round(v);
    let constant = |v: f64| format.round(R::from_f64(v));
    // Fused kernels compute 1 − β2 in f32, where it has few significant digits.
    let one_minus = |v: f64| format.round(R::one() - R::from_f64(v));
    let decay = constant(1.0 - options.lr * options.weight_decay);
    let [beta1, one_minus_beta1] = [constant(options.beta1), one_minus(options.beta1)];
    let [beta2, one_minus_beta2] = [constant(options.beta2), one_minus(options.beta2)];
    let eps = constant(options.eps);
    let [first, second] = [options.beta1, options.beta2].map(|b| R::one() - R::from_f64(b).powi(step));
    let [step_size, root] = [r(R::from_f64(options.lr) / first), r(R::one() / second.sqrt())];
    let update = |index: usize| {
        let [p, m, v] = [0, 1, 2].map(|kind: usize| state[kind][index]);
        let g = R::from_f32(gradient[index]);
        let p = r(p * decay);
        let m = r(r(beta1 * m) + r(one_minus_beta1 * g));
        let v = r(r(beta2 * v) + r(one_minus_beta2 * r(g * g)));
        [r(p - r(r(step_size * m) / r(r(r(v.sqrt()) * root) + eps))), m, v]
    };
    let mut all: Vec<[R; 3]> = vec![[R::zero(); 3]; gradient.len()];
    for_each_chunk(&mut all, 1, cores(), |first, chunk| {
        chunk.iter_mut().enumerate().for_each(|(i, values)| *values = update(first + i));
    });
    [0, 1, 2].map(|kind: usize| all.iter().map(|values| values[kind]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adamw_moves_by_the_learning_rate_and_decays() {
        // One step from zero moments is lr·sign(g), after the decay.
        let state = [vec![1.0, -2.0], vec![0.0; 2], vec![0.0; 2]];
        let [p, ..] = adamw::<f64>(&AdamW::PARITY, &state, &[0.3, -0.7], 1, Format::Unrounded);
        assert!((p[0] - (1.0 - 0.05 - 0.1)).abs() < 1e-6 && (p[1] - (-2.0 + 0.1 + 0.1)).abs() < 1e-6);
    }
}
