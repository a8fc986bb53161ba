//! Softmax and the activations of the feed-forward part, with their derivatives.
//!
//! `round` rounds the result of every elementary operation, as frameworks without a fused kernel do.

use super::matmul::Real;
use crate::model::Activation;

/// Replaces scores by their softmax. Returns the rounding error of the logarithm of their sum of exponentials.
pub fn softmax<R: Real>(row: &mut [R]) -> R {
    let largest = row.iter().copied().fold(R::min_value(), R::max);
    row.iter_mut().for_each(|v| *v = (*v - largest).exp());
    let total = row.iter().copied().sum::<R>();
    row.iter_mut().for_each(|v| *v = *v / total);
    let logarithm = total.ln();
    (largest - (largest + logarithm)) + logarithm
}

/// Returns cap · tanh(x / cap) and its derivative.
pub fn soft_cap<R: Real>(x: R, cap: R, round: &impl Fn(R) -> R) -> (R, R) {
    let tanh = round(round(x / cap).tanh());
    (round(cap * tanh), round(R::one() - round(tanh * tanh)))
}

/// Returns the activation at `x`.
pub fn activate<R: Real>(x: R, kind: Activation, round: &impl Fn(R) -> R) -> R {
    match kind {
        Activation::Gelu | Activation::GeluTanh => Gelu::new(x, kind, round).value(),
        Activation::Silu => round(x * round(sigmoid(x))),
        Activation::Relu => x.max(R::zero()),
        Activation::ReluSquared => {
            let positive = x.max(R::zero());
            round(positive * positive)
        }
    }
}

/// Returns the derivative of the activation at `x`, times the gradient of its result.
pub fn activation_gradient<R: Real>(x: R, gradient: R, kind: Activation, round: &impl Fn(R) -> R) -> R {
    let if_positive = |value: R| if x > R::zero() { value } else { R::zero() };
    match kind {
        Activation::Gelu | Activation::GeluTanh => Gelu::new(x, kind, round).gradient(gradient),
        Activation::Silu => {
            let gate = round(sigmoid(x));
            let through_gate = round(round(gradient * x) * round(gate * round(R::one() - gate)));
            round(round(gradient * gate) + through_gate)
        }
        Activation::Relu => if_positive(gradient),
        Activation::ReluSquared => if_positive(round(gradient * round(x + x))),
    }
}

fn sigmoid<R: Real>(x: R) -> R {
    R::one() / (R::one() + (-x).exp())
}

/// GELU at `x`, which is x·gate/2 with the gate 1 + erf(x/√2) or 1 + tanh(√(2/π)·(x + 0.044715·x³)).
struct Gelu<R, F> {
    x: R,
    gate: R,
    /// The derivative of the gate with respect to `x`.
    gate_derivative: R,
    round: F,
}

impl<R: Real, F: Fn(R) -> R> Gelu<R, F> {
    fn new(x: R, kind: Activation, round: F) -> Self {
        use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI, PI};
        let (constant, r, one) = (R::from_f64, &round, R::one());
        let (gate, gate_derivative) = match kind {
            Activation::Gelu => {
                let at = r(x * constant(FRAC_1_SQRT_2));
                let erf_derivative = r(constant(FRAC_2_SQRT_PI) * r((-r(at * at)).exp()));
                (r(one + r(at.erf())), r(erf_derivative * constant(FRAC_1_SQRT_2)))
            }
            Activation::GeluTanh => {
                let (cubic, root) = (constant(0.044715), constant((2.0 / PI).sqrt()));
                let square = r(x * x);
                let sum = r(x + r(r(square * x) * cubic));
                let tanh = r(r(sum * root).tanh());
                let inner = r(root * r(one + r(constant(3.0) * r(cubic * square))));
                (r(one + tanh), r(r(one - r(tanh * tanh)) * inner))
            }
            Activation::Silu | Activation::Relu | Activation::ReluSquared => {
                unreachable!("{kind:?} is not a GELU")
            }
        };
        Self { x, gate, gate_derivative, round }
    }

    fn value(&self) -> R {
        let r = &self.round;
        r(r(self.x * R::from_f64(0.5)) * self.gate)
    }

    fn gradient(&self, gradient: R) -> R {
        let r = &self.round;
        let half = R::from_f64(0.5);
        let direct = r(half * r(gradient * self.gate));
        r(direct + r(r(gradient * r(self.x * half)) * self.gate_derivative))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXACT: fn(f64) -> f64 = |v| v;

    #[test]
    fn gelu_agrees_with_published_values() {
        for (x, exact, tanh) in
            [(1.0, 0.841_344_746, 0.841_191_990_7), (-0.5, -0.154_268_769_4, -0.154_285_989)]
        {
            assert!((activate(x, Activation::Gelu, &EXACT) - exact).abs() < 1e-8);
            let approximate = activate(x, Activation::GeluTanh, &EXACT);
            assert!((approximate - tanh).abs() < 1e-7, "{approximate}");
        }
    }

    #[test]
    fn a_soft_cap_agrees_with_hand_computed_values() {
        let (value, slope) = soft_cap(30.0, 30.0, &EXACT);
        // tanh(1) = 0.76159…, and 1 − tanh(1)² = 0.41997….
        assert!((value - 30.0 * 0.761_594_155_955_765).abs() < 1e-12);
        assert!((slope - 0.419_974_341_614_026).abs() < 1e-12);
    }

    #[test]
    fn derivatives_agree_with_central_differences() {
        use Activation::{Gelu, GeluTanh, Relu, ReluSquared, Silu};
        let step = 2f64.powi(-17);
        for kind in [Gelu, GeluTanh, Silu, Relu, ReluSquared] {
            for x in [-3.0, -0.7, -0.1, 0.2, 1.0, 2.5] {
                let difference = activate(x + step, kind, &EXACT) - activate(x - step, kind, &EXACT);
                let derivative = activation_gradient(x, 1.0, kind, &EXACT);
                // Truncation: step²/6 times a third derivative below 2 is 2e-11. Rounding: half a unit of a value
                // below 8 over the step is 6e-11.
                assert!((difference / (2.0 * step) - derivative).abs() < 1e-9, "{kind:?} at {x}");
            }
        }
    }
}
