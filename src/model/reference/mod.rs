//! The same mathematics in f64: what every backend is held against.
//!
//! Twice: `scalar` (with `tape`) one number at a time, for the miniatures, with nothing to get wrong
//! but the mathematics; and `blocked` (with `graph` and `matrix`) in matrix products, at the sizes
//! that are timed, itself held against the first. The second also computes as a precision does,
//! rounding every result (`rounding`): what that costs is what a backend is allowed.

pub mod blocked;
mod graph;
mod matrix;
pub mod rounding;
pub mod scalar;
mod tape;

pub use matrix::Real;

use super::fixture::AdamW;
use rounding::Format;

/// A result of the oracle; values in f64.
#[derive(Clone, Debug)]
pub struct Expected {
    pub name: String,
    pub data: Vec<f64>,
}

/// A parameter after an AdamW step with each of the gradients, from zero moments; every result is
/// stored in the format.
pub fn adamw<R: Real>(setting: &AdamW, parameter: &[f32], gradients: &[&[f32]], format: Format) -> Vec<R> {
    let r = |v: R| format.round(v);
    let of = |v: f64| format.round(R::from_f64(v));
    let decay = of(1.0 - setting.lr * setting.weight_decay);
    let [beta1, rest1] = [of(setting.beta1), of(1.0 - setting.beta1)];
    let [beta2, rest2] = [of(setting.beta2), of(1.0 - setting.beta2)];
    let eps = of(setting.eps);
    // In the arithmetic at hand, as fused kernels do: 1 − β2 keeps few of f32's digits.
    let corrections: Vec<[R; 2]> = (1..=gradients.len() as i32)
        .map(|t| {
            let [first, second] = [setting.beta1, setting.beta2].map(|b| R::one() - R::from_f64(b).powi(t));
            [r(R::from_f64(setting.lr) / first), r(R::one() / second.sqrt())]
        })
        .collect();
    let mut all: Vec<R> = parameter.iter().map(|&v| R::from_f32(v)).collect();
    let move_one = |index: usize, p: &mut R| {
        let (mut m, mut v) = (R::zero(), R::zero());
        for (gradient, &[step_size, root]) in gradients.iter().zip(&corrections) {
            let g = R::from_f32(gradient[index]);
            *p = r(*p * decay);
            m = r(r(beta1 * m) + r(rest1 * g));
            v = r(r(beta2 * v) + r(rest2 * r(g * g)));
            *p = r(*p - r(r(step_size * m) / r(r(r(v.sqrt()) * root) + eps)));
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    matrix::in_pieces(&mut all, 1, threads, |first, piece| {
        piece.iter_mut().enumerate().for_each(|(i, p)| move_one(first + i, p));
    });
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::fixture::Fixture;
    use crate::model::{CHOICE_MODELS, ModelId};
    use crate::suite::{BackendId, Case, CustomModel, Method, Precision, Set, cases, cases_for};
    use rounding::Rounding;

    #[test]
    fn adamw_moves_by_the_learning_rate_and_decays() {
        // One step from zero moments is lr·sign(g), after the decay.
        let p = adamw::<f64>(&AdamW::PARITY, &[1.0, -2.0], &[&[0.3, -0.7]], Format::Whole);
        assert!((p[0] - (1.0 - 0.05 - 0.1)).abs() < 1e-6 && (p[1] - (-2.0 + 0.1 + 0.1)).abs() < 1e-6);
    }

    /// The largest difference of two results over the larger's size, and where.
    fn difference(a: &[Expected], b: &[blocked::Computed<f64>]) -> (f64, String) {
        let b: Vec<_> = b.iter().filter(|c| c.name != blocked::TERMS).collect();
        assert_eq!(a.len(), b.len());
        let mut worst = (0.0, String::new());
        let all = a.iter().flat_map(|t| &t.data).fold(0.0_f64, |m, v| m.max(v.abs()));
        for (a, b) in a.iter().zip(b) {
            assert_eq!((&a.name, a.data.len()), (&b.name, b.data.len()));
            let size = a.data.iter().fold(1e-6 * all, |m, v| m.max(v.abs()));
            let miss = a.data.iter().zip(&b.data).fold(0.0_f64, |m, (x, y)| m.max((x - y).abs()));
            if miss / size > worst.0 {
                worst = (miss / size, a.name.clone());
            }
        }
        worst
    }

    #[test]
    fn the_blocked_oracle_is_the_scalar_one() {
        let eager = Method::eager(Precision::F32);
        let own = cases(Set::Smoke).into_iter();
        let mine = |c: &Case| c.backend == BackendId::TorchCpu && c.method == eager;
        let given =
            |&model: &_| cases_for(Set::Smoke, Some(CustomModel { model: ModelId::intern(model), batch: 2 }));
        let mut tried = 0;
        for case in own.chain(CHOICE_MODELS.iter().flat_map(given)).filter(mine) {
            let fixture = Fixture::for_parity(case);
            let found = blocked::computed::<f64>(&fixture, Rounding::NONE, None);
            let (worst, name) = difference(&scalar::expected(&fixture), &found);
            // Sums in another order, in 2⁻⁵³ each.
            assert!(worst < 1e-11, "{case}: {name} differs by {worst:.1e}");
            // What fused kernels compute is the same where nothing is rounded.
            let fused = Rounding { fused: true, ..Rounding::NONE };
            let (worst, name) =
                difference(&scalar::expected(&fixture), &blocked::computed(&fixture, fused, None));
            assert!(worst < 1e-11, "{case}, fused: {name} differs by {worst:.1e}");
            tried += 1;
        }
        assert!(tried > 40);
    }
}
