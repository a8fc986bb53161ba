//! The same models once more, in f64, one scalar operation at a time.
//!
//! A reverse-mode tape over scalars (Griewank and Walther, *Evaluating Derivatives*,
//! 2008) has no shapes to get wrong, so it is slow and easy to trust. It serves the
//! miniature shapes alone.

use crate::case::{Family, Shape, Sizes, Workload};
use crate::fixture::{AdamW, Fixture, Tensor};
use crate::model::{
    self, Attention, Block, FeedForward, Gpt2, Head, InOrder, Indicator, Linear, NORM_EPS, Norm,
};

/// A scalar on the tape.
#[derive(Clone, Copy, Debug)]
struct Var(u32);

/// Up to two parents of a value, with the derivative by each.
#[derive(Clone, Copy)]
struct Node {
    parents: [u32; 2],
    slopes: [f64; 2],
}

#[derive(Default)]
struct Tape {
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

    fn leaf(&mut self, value: f64) -> Var {
        self.push(value, [0, 0], [0.0, 0.0])
    }

    fn get(&self, a: Var) -> f64 {
        self.values[a.0 as usize]
    }

    fn unary(&mut self, a: Var, value: f64, slope: f64) -> Var {
        self.push(value, [a.0, a.0], [slope, 0.0])
    }

    fn add(&mut self, a: Var, b: Var) -> Var {
        self.push(self.get(a) + self.get(b), [a.0, b.0], [1.0, 1.0])
    }

    fn sub(&mut self, a: Var, b: Var) -> Var {
        self.push(self.get(a) - self.get(b), [a.0, b.0], [1.0, -1.0])
    }

    fn mul(&mut self, a: Var, b: Var) -> Var {
        let (x, y) = (self.get(a), self.get(b));
        self.push(x * y, [a.0, b.0], [y, x])
    }

    fn div(&mut self, a: Var, b: Var) -> Var {
        let (x, y) = (self.get(a), self.get(b));
        self.push(x / y, [a.0, b.0], [1.0 / y, -x / (y * y)])
    }

    fn scale(&mut self, a: Var, factor: f64) -> Var {
        self.unary(a, self.get(a) * factor, factor)
    }

    fn shift(&mut self, a: Var, by: f64) -> Var {
        self.unary(a, self.get(a) + by, 1.0)
    }

    fn exp(&mut self, a: Var) -> Var {
        let value = self.get(a).exp();
        self.unary(a, value, value)
    }

    fn ln(&mut self, a: Var) -> Var {
        let x = self.get(a);
        self.unary(a, x.ln(), 1.0 / x)
    }

    fn sqrt(&mut self, a: Var) -> Var {
        let value = self.get(a).sqrt();
        self.unary(a, value, 0.5 / value)
    }

    fn sigmoid(&mut self, a: Var) -> Var {
        let value = 1.0 / (1.0 + (-self.get(a)).exp());
        self.unary(a, value, value * (1.0 - value))
    }

    /// ln(1 + eˣ), without overflow.
    fn softplus(&mut self, a: Var) -> Var {
        let x = self.get(a);
        self.unary(a, x.max(0.0) + (-x.abs()).exp().ln_1p(), 1.0 / (1.0 + (-x).exp()))
    }

    fn relu(&mut self, a: Var) -> Var {
        let x = self.get(a);
        self.unary(a, x.max(0.0), f64::from(x > 0.0))
    }

    /// x·Φ(x) (Hendrycks and Gimpel 2016), or its tanh approximation.
    fn gelu(&mut self, a: Var, tanh: bool) -> Var {
        use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI, PI};
        let x = self.get(a);
        if tanh {
            let root = (2.0 / PI).sqrt();
            let t = (root * (x + 0.044715 * x.powi(3))).tanh();
            let inner = root * (1.0 + 3.0 * 0.044715 * x * x);
            self.unary(a, 0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner)
        } else {
            let cdf = 0.5 * (1.0 + libm::erf(x * FRAC_1_SQRT_2));
            let pdf = 0.5 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2 * (-0.5 * x * x).exp();
            self.unary(a, x * cdf, cdf + x * pdf)
        }
    }

    fn sum(&mut self, terms: &[Var]) -> Var {
        let zero = self.leaf(0.0);
        terms.iter().fold(zero, |total, &term| self.add(total, term))
    }

    fn mean(&mut self, terms: &[Var]) -> Var {
        let total = self.sum(terms);
        self.scale(total, 1.0 / terms.len() as f64)
    }

    fn dot(&mut self, a: &[Var], b: &[Var]) -> Var {
        let zero = self.leaf(0.0);
        a.iter().zip(b).fold(zero, |total, (&x, &y)| {
            let product = self.mul(x, y);
            self.add(total, product)
        })
    }

    fn softmax(&mut self, row: &[Var]) -> Vec<Var> {
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

    /// The derivative of `of` by every value on the tape.
    fn backward(&self, of: Var) -> Vec<f64> {
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
        slopes
    }

    // ------------------------------------------------------------ layers, row by row

    /// x [in] → [out]
    fn linear(&mut self, x: &[Var], layer: &Linear<Vec<Var>>) -> Vec<Var> {
        layer
            .weight
            .chunks(x.len())
            .zip(&layer.bias)
            .map(|(row, &bias)| {
                let product = self.dot(row, x);
                self.add(product, bias)
            })
            .collect()
    }

    fn norm(&mut self, x: &[Var], layer: &Norm<Vec<Var>>) -> Vec<Var> {
        let mean = self.mean(x);
        let centred: Vec<_> = x.iter().map(|&v| self.sub(v, mean)).collect();
        let squares: Vec<_> = centred.iter().map(|&v| self.mul(v, v)).collect();
        let variance = self.mean(&squares);
        let variance = self.shift(variance, NORM_EPS);
        let deviation = self.sqrt(variance);
        centred
            .iter()
            .zip(layer.weight.iter().zip(&layer.bias))
            .map(|(&v, (&weight, &bias))| {
                let unit = self.div(v, deviation);
                let scaled = self.mul(unit, weight);
                self.add(scaled, bias)
            })
            .collect()
    }

    /// One sequence: x [N][D] → [N][D]
    fn attention(
        &mut self,
        x: &[Vec<Var>],
        layer: &Attention<Vec<Var>>,
        heads: usize,
        causal: bool,
    ) -> Vec<Vec<Var>> {
        let width = x[0].len();
        let each = width / heads;
        let q: Vec<_> = x.iter().map(|row| self.linear(row, &layer.q)).collect();
        let k: Vec<_> = x.iter().map(|row| self.linear(row, &layer.k)).collect();
        let v: Vec<_> = x.iter().map(|row| self.linear(row, &layer.v)).collect();
        let mut mixed = vec![Vec::with_capacity(width); x.len()];
        for head in 0..heads {
            let part = head * each..(head + 1) * each;
            for (n, out) in mixed.iter_mut().enumerate() {
                let seen = if causal { n + 1 } else { x.len() };
                let scores: Vec<_> = k[..seen]
                    .iter()
                    .map(|key| {
                        let score = self.dot(&q[n][part.clone()], &key[part.clone()]);
                        self.scale(score, 1.0 / (each as f64).sqrt())
                    })
                    .collect();
                let weights = self.softmax(&scores);
                for d in part.clone() {
                    let column: Vec<_> = v[..seen].iter().map(|row| row[d]).collect();
                    out.push(self.dot(&weights, &column));
                }
            }
        }
        mixed.iter().map(|row| self.linear(row, &layer.o)).collect()
    }

    fn feed_forward(&mut self, x: &[Var], layer: &FeedForward<Vec<Var>>, tanh: bool) -> Vec<Var> {
        let hidden = self.linear(x, &layer.up);
        let active: Vec<_> = hidden.iter().map(|&h| self.gelu(h, tanh)).collect();
        self.linear(&active, &layer.down)
    }

    fn add_rows(&mut self, a: &[Vec<Var>], b: &[Vec<Var>]) -> Vec<Vec<Var>> {
        a.iter().zip(b).map(|(a, b)| a.iter().zip(b).map(|(&x, &y)| self.add(x, y)).collect()).collect()
    }

    fn norm_rows(&mut self, x: &[Vec<Var>], layer: &Norm<Vec<Var>>) -> Vec<Vec<Var>> {
        x.iter().map(|row| self.norm(row, layer)).collect()
    }

    /// x = LN(x + MHA(x)); x = LN(x + FF(x))
    fn block_post_norm(&mut self, x: &[Vec<Var>], b: &Block<Vec<Var>>, heads: usize) -> Vec<Vec<Var>> {
        let attended = self.attention(x, &b.attention, heads, false);
        let sum = self.add_rows(x, &attended);
        let x = self.norm_rows(&sum, &b.norm1);
        let fed: Vec<_> = x.iter().map(|row| self.feed_forward(row, &b.feed_forward, false)).collect();
        let sum = self.add_rows(&x, &fed);
        self.norm_rows(&sum, &b.norm2)
    }

    /// x = x + MHA(LN(x)); x = x + FF(LN(x))
    fn block_pre_norm(&mut self, x: &[Vec<Var>], b: &Block<Vec<Var>>, heads: usize) -> Vec<Vec<Var>> {
        let normed = self.norm_rows(x, &b.norm1);
        let attended = self.attention(&normed, &b.attention, heads, true);
        let x = self.add_rows(x, &attended);
        let normed = self.norm_rows(&x, &b.norm2);
        let fed: Vec<_> = normed.iter().map(|row| self.feed_forward(row, &b.feed_forward, true)).collect();
        self.add_rows(&x, &fed)
    }

    fn head(&mut self, x: &[Var], head: &Head<Vec<Var>>) -> Var {
        let hidden = self.linear(x, &head.hidden);
        let active: Vec<_> = hidden.iter().map(|&h| self.relu(h)).collect();
        self.linear(&active, &head.out)[0]
    }

    /// One sample: (selection logits [N], weights [N])
    fn indicator(
        &mut self,
        values: &[Var],
        market: &[Var],
        p: &Indicator<Vec<Var>>,
        s: &Sizes,
    ) -> (Vec<Var>, Vec<Var>) {
        let market = self.linear(market, &p.market);
        let mut x: Vec<Vec<Var>> = values
            .iter()
            .zip(p.position.chunks(s.width))
            .map(|(&value, position)| {
                let row = self.linear(&[value], &p.value);
                row.iter()
                    .zip(&market)
                    .zip(position)
                    .map(|((&a, &b), &c)| {
                        let sum = self.add(a, b);
                        self.add(sum, c)
                    })
                    .collect()
            })
            .collect();
        for block in &p.blocks {
            x = self.block_post_norm(&x, block, s.heads);
        }
        let x = self.norm_rows(&x, &p.norm);
        let selection = x.iter().map(|row| self.head(row, &p.selection)).collect();
        let scores: Vec<_> = x.iter().map(|row| self.head(row, &p.allocation)).collect();
        (selection, self.softmax(&scores))
    }

    /// BCE(selection, u) + 0.5·MSE(weights, t) + 0.1·mean(σ(selection)), where
    /// t = u·σ(selection) over its row sum + 1e-8, and gradient flows through t.
    fn indicator_loss(&mut self, rows: &[(Vec<Var>, Vec<Var>)], usefulness: &[Vec<Var>]) -> Var {
        let (mut bce, mut squares, mut chosen) = (Vec::new(), Vec::new(), Vec::new());
        for ((selection, weights), useful) in rows.iter().zip(usefulness) {
            let probability: Vec<_> = selection.iter().map(|&s| self.sigmoid(s)).collect();
            let raw: Vec<_> = useful.iter().zip(&probability).map(|(&u, &p)| self.mul(u, p)).collect();
            let total = self.sum(&raw);
            let total = self.shift(total, 1e-8);
            for n in 0..selection.len() {
                let positive = self.softplus(selection[n]);
                let product = self.mul(selection[n], useful[n]);
                bce.push(self.sub(positive, product));
                let target = self.div(raw[n], total);
                let miss = self.sub(weights[n], target);
                squares.push(self.mul(miss, miss));
                chosen.push(probability[n]);
            }
        }
        let bce = self.mean(&bce);
        let mse = self.mean(&squares);
        let chosen = self.mean(&chosen);
        let mse = self.scale(mse, 0.5);
        let chosen = self.scale(chosen, 0.1);
        let sum = self.add(bce, mse);
        self.add(sum, chosen)
    }

    /// One sequence of token ids: logits [T][V]
    fn gpt2(&mut self, tokens: &[f32], p: &Gpt2<Vec<Var>>, s: &Sizes) -> Vec<Vec<Var>> {
        let embedding: Vec<&[Var]> = p.token.chunks(s.width).collect();
        let mut x: Vec<Vec<Var>> = tokens
            .iter()
            .zip(p.position.chunks(s.width))
            .map(|(&token, position)| {
                embedding[token as usize].iter().zip(position).map(|(&a, &b)| self.add(a, b)).collect()
            })
            .collect();
        for block in &p.blocks {
            x = self.block_pre_norm(&x, block, s.heads);
        }
        let x = self.norm_rows(&x, &p.norm);
        x.iter().map(|row| embedding.iter().map(|token| self.dot(token, row)).collect()).collect()
    }

    fn cross_entropy(&mut self, logits: &[Vec<Var>], next: &[f32]) -> Var {
        let terms: Vec<_> = logits
            .iter()
            .zip(next)
            .map(|(row, &token)| {
                let weights = self.softmax(row);
                let log = self.ln(weights[token as usize]);
                self.scale(log, -1.0)
            })
            .collect();
        self.mean(&terms)
    }
}

/// A reference result; values in f64.
#[derive(Clone, Debug)]
pub struct Expected {
    pub name: String,
    pub data: Vec<f64>,
}

fn leaves(tape: &mut Tape, tensor: &Tensor) -> Vec<Var> {
    tensor.data.iter().map(|&v| tape.leaf(f64::from(v))).collect()
}

/// What a step of the fixture's case must put out, without the optimizer's results:
/// those follow from a backend's own gradients through [`adamw`].
pub fn expected(fixture: &Fixture) -> Vec<Expected> {
    assert_eq!(fixture.dropout, 0.0, "the reference has no dropout");
    let case = fixture.case;
    let mut tape = Tape::default();
    let parameters: Vec<Vec<Var>> =
        fixture.parameters().iter().map(|tensor| leaves(&mut tape, tensor)).collect();
    let mut source = InOrder(parameters.iter().cloned());
    let t = &mut tape;
    let mut results: Vec<(&str, Vec<Var>)> = Vec::new();
    let mut inputs: Vec<(&str, Vec<Var>)> = Vec::new();
    let mut loss = None;

    match (case.workload, case.shape) {
        (Workload::OptimizerStep, _) => return Vec::new(),
        (_, Shape::Model { family: Family::Indicator, tiny, batch }) => {
            let s = Family::Indicator.sizes(tiny);
            let model = Indicator::take(&mut source, &s);
            let values = leaves(t, fixture.input("values"));
            let market = leaves(t, fixture.input("market"));
            let useful: Vec<_> =
                leaves(t, fixture.input("usefulness")).chunks(s.tokens).map(<[Var]>::to_vec).collect();
            let rows: Vec<_> = (0..batch)
                .map(|b| {
                    let values = &values[b * s.tokens..(b + 1) * s.tokens];
                    let market = &market[b * model::MARKET..(b + 1) * model::MARKET];
                    t.indicator(values, market, &model, &s)
                })
                .collect();
            if case.workload.trains() {
                loss = Some(t.indicator_loss(&rows, &useful));
            } else {
                results.push(("selection", rows.iter().flat_map(|r| r.0.clone()).collect()));
                results.push(("weights", rows.iter().flat_map(|r| r.1.clone()).collect()));
            }
        }
        (_, Shape::Model { family: Family::Gpt2, tiny, .. }) => {
            let s = Family::Gpt2.sizes(tiny);
            let model = Gpt2::take(&mut source, &s);
            let logits: Vec<_> = fixture
                .input("tokens")
                .data
                .chunks(s.tokens)
                .flat_map(|sequence| t.gpt2(sequence, &model, &s))
                .collect();
            if case.workload.trains() {
                loss = Some(t.cross_entropy(&logits, &fixture.input("next").data));
            } else {
                results.push(("logits", logits.concat()));
            }
        }
        (_, Shape::Attention { tokens, heads, head_width, causal, .. }) => {
            let layer = Attention::take(&mut source, "", heads * head_width);
            let x = leaves(t, fixture.input("x"));
            let rows: Vec<Vec<Var>> = x.chunks(heads * head_width).map(<[Var]>::to_vec).collect();
            let out: Vec<Var> = rows
                .chunks(tokens)
                .flat_map(|sequence| t.attention(sequence, &layer, heads, causal))
                .flatten()
                .collect();
            inputs.push(("x", x));
            loss = upstream(t, fixture, &out);
            results.push(("out", out));
        }
        (_, Shape::FeedForward { width, hidden, tanh, .. }) => {
            let layer = FeedForward::take(&mut source, "", width, hidden);
            let x = leaves(t, fixture.input("x"));
            let out: Vec<Var> = x.chunks(width).flat_map(|row| t.feed_forward(row, &layer, tanh)).collect();
            inputs.push(("x", x));
            loss = upstream(t, fixture, &out);
            results.push(("out", out));
        }
        (_, Shape::Square { n, chain }) => {
            let a = leaves(t, fixture.input("a"));
            let b = leaves(t, fixture.input("b"));
            let mut out = b;
            for _ in 0..chain {
                out = (0..n * n)
                    .map(|i| {
                        let column: Vec<_> = (0..n).map(|k| out[k * n + i % n]).collect();
                        t.dot(&a[i / n * n..(i / n + 1) * n], &column)
                    })
                    .collect();
            }
            results.push(("out", out));
        }
        (_, Shape::Buffer { .. }) => {
            let data = fixture.input("buffer").data.iter().map(|&v| -f64::from(v)).collect();
            return vec![Expected { name: "out".to_owned(), data }];
        }
    }

    let read = |vars: &[Var]| vars.iter().map(|&v| tape.get(v)).collect::<Vec<_>>();
    let mut expected = Vec::new();
    if let Some(loss) = loss {
        let slopes = tape.backward(loss);
        let slope = |vars: &[Var]| vars.iter().map(|v| slopes[v.0 as usize]).collect::<Vec<_>>();
        // A block's loss only carries the upstream gradient; its value means nothing.
        if case.workload.takes_model() {
            expected.push(Expected { name: "loss".to_owned(), data: read(&[loss]) });
        }
        for (name, vars) in &inputs {
            expected.push(Expected { name: format!("grad/{name}"), data: slope(vars) });
        }
        for (tensor, vars) in fixture.parameters().iter().zip(&parameters) {
            expected.push(Expected { name: format!("grad/{}", tensor.name), data: slope(vars) });
        }
    } else {
        for (name, vars) in &results {
            expected.push(Expected { name: (*name).to_owned(), data: read(vars) });
        }
    }
    expected
}

/// Σ out·upstream for the -grad workloads, so that `upstream` arrives as the gradient.
fn upstream(tape: &mut Tape, fixture: &Fixture, out: &[Var]) -> Option<Var> {
    fixture.case.workload.trains().then(|| {
        let weights = leaves(tape, fixture.input("upstream"));
        tape.dot(out, &weights)
    })
}

/// A parameter after `steps` AdamW steps with the same gradient, from zero moments.
pub fn adamw(setting: &AdamW, parameter: &[f32], gradient: &[f32], steps: i32) -> Vec<f64> {
    parameter
        .iter()
        .zip(gradient)
        .map(|(&p, &g)| {
            let (mut p, g) = (f64::from(p), f64::from(g));
            let (mut m, mut v) = (0.0, 0.0);
            for step in 1..=steps {
                p -= setting.lr * setting.weight_decay * p;
                m = setting.beta1 * m + (1.0 - setting.beta1) * g;
                v = setting.beta2 * v + (1.0 - setting.beta2) * g * g;
                let m_hat = m / (1.0 - setting.beta1.powi(step));
                let v_hat: f64 = v / (1.0 - setting.beta2.powi(step));
                p -= setting.lr * m_hat / (v_hat.sqrt() + setting.eps);
            }
            p
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Central differences of the loss, by a few parameters of each tensor.
    fn differences(id: &str) {
        let case = id.parse().unwrap();
        let loss = |fixture: &Fixture| -> f64 {
            let all = expected(fixture);
            all.iter().find(|e| e.name == "loss").unwrap().data[0]
        };
        let base = Fixture::for_parity(case);
        let all = expected(&base);
        for tensor in base.parameters() {
            let gradient = &all.iter().find(|e| e.name == format!("grad/{}", tensor.name)).unwrap().data;
            let at = tensor.data.len() / 2;
            // f32 parameters: the step is what was really added.
            let shifted = |by: f32| {
                let mut fixture = Fixture::for_parity(case);
                let mut real = 0.0;
                fixture.edit_parameter(&tensor.name, |data| {
                    let before = data[at];
                    data[at] += by;
                    real = f64::from(data[at]) - f64::from(before);
                });
                (loss(&fixture), real)
            };
            let ((up, above), (down, below)) = (shifted(1e-4), shifted(-1e-4));
            let numeric = (up - down) / (above - below);
            let scale = gradient.iter().fold(1e-3_f64, |m, g| m.max(g.abs()));
            assert!(
                (numeric - gradient[at]).abs() < 2e-3 * scale,
                "{}: {numeric} against {}",
                tensor.name,
                gradient[at]
            );
        }
    }

    #[test]
    fn gradients_agree_with_central_differences() {
        differences("train-step/torch-cpu/f32/indicator-tiny-b2");
        differences("train-step/torch-cpu/f32/gpt2-tiny-b2-t16");
    }

    #[test]
    fn gelu_agrees_with_published_values() {
        let mut tape = Tape::default();
        for (x, exact, tanh) in
            [(1.0, 0.841_344_746, 0.841_191_990_7), (-0.5, -0.154_268_769_4, -0.154_285_989)]
        {
            let a = tape.leaf(x);
            let (e, t) = (tape.gelu(a, false), tape.gelu(a, true));
            assert!((tape.get(e) - exact).abs() < 1e-8);
            assert!((tape.get(t) - tanh).abs() < 1e-7, "{}", tape.get(t));
        }
    }

    #[test]
    fn adamw_moves_by_the_learning_rate_and_decays() {
        // One step from zero moments is lr·sign(g), after the decay.
        let p = adamw(&AdamW::PARITY, &[1.0, -2.0], &[0.3, -0.7], 1);
        assert!((p[0] - (1.0 - 0.05 - 0.1)).abs() < 1e-6 && (p[1] - (-2.0 + 0.1 + 0.1)).abs() < 1e-6);
    }
}
