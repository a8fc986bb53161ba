//! The AdamW optimizer.

use super::matmul::{Real, cores, for_each_chunk};
use super::rounding::Format;
use crate::fixture::AdamW;

/// Returns a parameter after one AdamW step per gradient, from zero moments. Every result is rounded to `format`.
pub fn adamw<R: Real>(options: &AdamW, parameter: &[f32], gradients: &[&[f32]], format: Format) -> Vec<R> {
    let r = |v: R| format.round(v);
    let constant = |v: f64| format.round(R::from_f64(v));
    let decay = constant(1.0 - options.lr * options.weight_decay);
    let [beta1, one_minus_beta1] = [constant(options.beta1), constant(1.0 - options.beta1)];
    let [beta2, one_minus_beta2] = [constant(options.beta2), constant(1.0 - options.beta2)];
    let eps = constant(options.eps);
    // Computed in `R`, as fused kernels do: 1 − β2 has few significant digits in f32.
    let corrections: Vec<[R; 2]> = (1..=gradients.len() as i32)
        .map(|t| {
            let [first, second] = [options.beta1, options.beta2].map(|b| R::one() - R::from_f64(b).powi(t));
            [r(R::from_f64(options.lr) / first), r(R::one() / second.sqrt())]
        })
        .collect();
    let update = |index: usize, p: &mut R| {
        let (mut m, mut v) = (R::zero(), R::zero());
        for (gradient, &[step_size, root]) in gradients.iter().zip(&corrections) {
            let g = R::from_f32(gradient[index]);
            *p = r(*p * decay);
            m = r(r(beta1 * m) + r(one_minus_beta1 * g));
            v = r(r(beta2 * v) + r(one_minus_beta2 * r(g * g)));
            *p = r(*p - r(r(step_size * m) / r(r(r(v.sqrt()) * root) + eps)));
        }
    };
    let mut all: Vec<R> = parameter.iter().map(|&v| R::from_f32(v)).collect();
    for_each_chunk(&mut all, 1, cores(), |first, chunk| {
        chunk.iter_mut().enumerate().for_each(|(i, p)| update(first + i, p));
    });
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adamw_moves_by_the_learning_rate_and_decays() {
        // One step from zero moments is lr·sign(g), after the decay.
        let p = adamw::<f64>(&AdamW::PARITY, &[1.0, -2.0], &[&[0.3, -0.7]], Format::Unrounded);
        assert!((p[0] - (1.0 - 0.05 - 0.1)).abs() < 1e-6 && (p[1] - (-2.0 + 0.1 + 0.1)).abs() < 1e-6);
    }
}
