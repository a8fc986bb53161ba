//! A reverse-mode tape over scalars in f64 (Griewank and Walther, *Evaluating Derivatives*,
//! 2008): no shapes to get wrong, so it is slow and easy to trust.

use crate::model::Activation;

/// A scalar on the tape.
#[derive(Clone, Copy, Debug)]
pub struct Var(u32);

/// Up to two parents of a value, with the derivative by each.
#[derive(Clone, Copy)]
struct Node {
    parents: [u32; 2],
    slopes: [f64; 2],
}

#[derive(Default)]
pub struct Tape {
    nodes: Vec<Node>,
    values: Vec<f64>,
}

impl Tape {
    fn push(&mut self, value: f64, parents: [u32; 2], slopes: [f64; 2]) -> Var {
        let index = self.nodes.len() as u32;
        self.nodes.push(Node { parents, slopes });
        self.values.push(value);
        Var(index)
    }

    pub fn leaf(&mut self, value: f64) -> Var {
        self.push(value, [0, 0], [0.0, 0.0])
    }

    pub fn get(&self, a: Var) -> f64 {
        self.values[a.0 as usize]
    }

    fn unary(&mut self, a: Var, value: f64, slope: f64) -> Var {
        self.push(value, [a.0, a.0], [slope, 0.0])
    }

    pub fn add(&mut self, a: Var, b: Var) -> Var {
        self.push(self.get(a) + self.get(b), [a.0, b.0], [1.0, 1.0])
    }

    pub fn sub(&mut self, a: Var, b: Var) -> Var {
        self.push(self.get(a) - self.get(b), [a.0, b.0], [1.0, -1.0])
    }

    pub fn mul(&mut self, a: Var, b: Var) -> Var {
        let (x, y) = (self.get(a), self.get(b));
        self.push(x * y, [a.0, b.0], [y, x])
    }

    pub fn div(&mut self, a: Var, b: Var) -> Var {
        let (x, y) = (self.get(a), self.get(b));
        self.push(x / y, [a.0, b.0], [1.0 / y, -x / (y * y)])
    }

    pub fn scale(&mut self, a: Var, factor: f64) -> Var {
        self.unary(a, self.get(a) * factor, factor)
    }

    pub fn shift(&mut self, a: Var, by: f64) -> Var {
        self.unary(a, self.get(a) + by, 1.0)
    }

    pub fn exp(&mut self, a: Var) -> Var {
        let value = self.get(a).exp();
        self.unary(a, value, value)
    }

    pub fn ln(&mut self, a: Var) -> Var {
        let x = self.get(a);
        self.unary(a, x.ln(), 1.0 / x)
    }

    pub fn sqrt(&mut self, a: Var) -> Var {
        let value = self.get(a).sqrt();
        self.unary(a, value, 0.5 / value)
    }

    pub fn sigmoid(&mut self, a: Var) -> Var {
        let value = 1.0 / (1.0 + (-self.get(a)).exp());
        self.unary(a, value, value * (1.0 - value))
    }

    /// ln(1 + eˣ), without overflow.
    pub fn softplus(&mut self, a: Var) -> Var {
        let x = self.get(a);
        self.unary(a, x.max(0.0) + (-x.abs()).exp().ln_1p(), 1.0 / (1.0 + (-x).exp()))
    }

    pub fn relu(&mut self, a: Var) -> Var {
        let x = self.get(a);
        self.unary(a, x.max(0.0), f64::from(x > 0.0))
    }

    /// Between the two projections of the feed-forward part.
    pub fn activation(&mut self, a: Var, kind: Activation) -> Var {
        use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI, PI};
        let x = self.get(a);
        match kind {
            Activation::Silu => {
                let gate = self.sigmoid(a);
                self.mul(a, gate)
            }
            Activation::Relu => self.relu(a),
            Activation::ReluSquared => {
                let active = self.relu(a);
                self.mul(active, active)
            }
            Activation::GeluTanh => {
                let root = (2.0 / PI).sqrt();
                let t = (root * (x + 0.044715 * x.powi(3))).tanh();
                let inner = root * (1.0 + 3.0 * 0.044715 * x * x);
                self.unary(a, 0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner)
            }
            Activation::Gelu => {
                let cdf = 0.5 * (1.0 + libm::erf(x * FRAC_1_SQRT_2));
                let pdf = 0.5 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2 * (-0.5 * x * x).exp();
                self.unary(a, x * cdf, cdf + x * pdf)
            }
        }
    }

    pub fn sum(&mut self, terms: &[Var]) -> Var {
        let zero = self.leaf(0.0);
        terms.iter().fold(zero, |total, &term| self.add(total, term))
    }

    pub fn mean(&mut self, terms: &[Var]) -> Var {
        let total = self.sum(terms);
        self.scale(total, 1.0 / terms.len() as f64)
    }

    pub fn dot(&mut self, a: &[Var], b: &[Var]) -> Var {
        let zero = self.leaf(0.0);
        a.iter().zip(b).fold(zero, |total, (&x, &y)| {
            let product = self.mul(x, y);
            self.add(total, product)
        })
    }

    pub fn softmax(&mut self, row: &[Var]) -> Vec<Var> {
        let largest = row.iter().map(|&x| self.get(x)).fold(f64::MIN, f64::max);
        let powers: Vec<_> = row
            .iter()
            .map(|&x| {
                let shifted = self.shift(x, -largest);
                self.exp(shifted)
            })
            .collect();
        let total = self.sum(&powers);
        powers.iter().map(|&p| self.div(p, total)).collect()
    }

    /// The derivatives of `of` by every value on the tape.
    pub fn backward(&self, of: Var) -> Slopes {
        let mut slopes = vec![0.0; self.nodes.len()];
        slopes[of.0 as usize] = 1.0;
        for (index, node) in self.nodes.iter().enumerate().rev() {
            let slope = slopes[index];
            if slope != 0.0 {
                for side in 0..2 {
                    if node.slopes[side] != 0.0 {
                        slopes[node.parents[side] as usize] += slope * node.slopes[side];
                    }
                }
            }
        }
        Slopes(slopes)
    }
}

/// Derivatives by the values of a tape.
pub struct Slopes(Vec<f64>);

impl Slopes {
    pub fn of(&self, vars: &[Var]) -> Vec<f64> {
        vars.iter().map(|v| self.0[v.0 as usize]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gelu_agrees_with_published_values() {
        let mut tape = Tape::default();
        for (x, exact, tanh) in
            [(1.0, 0.841_344_746, 0.841_191_990_7), (-0.5, -0.154_268_769_4, -0.154_285_989)]
        {
            let a = tape.leaf(x);
            let (e, t) = (tape.activation(a, Activation::Gelu), tape.activation(a, Activation::GeluTanh));
            assert!((tape.get(e) - exact).abs() < 1e-8);
            assert!((tape.get(t) - tanh).abs() < 1e-7, "{}", tape.get(t));
        }
    }
}
