//! The oracle that is easy to trust, one scalar operation at a time. It serves the miniatures alone.

use super::Expected;
use super::tape::{Tape, Var};
use crate::model::fixture::{Fixture, Tensor};
use crate::model::parameters::{
    Attention, Block, Embedding, FeedForward, Head, InOrder, LayerParams, Linear, Network, Norm, OutputHead,
};
use crate::model::{Model, NormKind, NormOrder, Output, Position};
use crate::suite::{Shape, Workload};

/// Layers, row by row.
impl Tape {
    /// x [in] → [out]
    fn linear(&mut self, x: &[Var], layer: &Linear<Vec<Var>>) -> Vec<Var> {
        let products: Vec<Var> = layer.weight.chunks(x.len()).map(|row| self.dot(row, x)).collect();
        match &layer.bias {
            Some(bias) => products.iter().zip(bias).map(|(&y, &b)| self.add(y, b)).collect(),
            None => products,
        }
    }

    fn norm(&mut self, x: &[Var], layer: &Norm<Vec<Var>>, kind: NormKind) -> Vec<Var> {
        let centred: Vec<Var> = match kind {
            NormKind::Layer { .. } => {
                let mean = self.mean(x);
                x.iter().map(|&v| self.sub(v, mean)).collect()
            }
            NormKind::Rms { .. } => x.to_vec(),
        };
        let squares: Vec<_> = centred.iter().map(|&v| self.mul(v, v)).collect();
        let variance = self.mean(&squares);
        let variance = self.shift(variance, kind.eps());
        let deviation = self.sqrt(variance);
        let mut y: Vec<Var> = centred.iter().map(|&v| self.div(v, deviation)).collect();
        if let Some(weight) = &layer.weight {
            y = y.iter().zip(weight).map(|(&v, &w)| self.mul(v, w)).collect();
        }
        if let Some(bias) = &layer.bias {
            y = y.iter().zip(bias).map(|(&v, &b)| self.add(v, b)).collect();
        }
        y
    }

    /// A head's query or key [d] of a token: normalised and turned where the model has that.
    fn placed(&mut self, x: &[Var], token: usize, norm: Option<&Norm<Vec<Var>>>, m: &Model) -> Vec<Var> {
        let x = match (norm, m.qk_norm) {
            (Some(norm), Some(kind)) => self.norm(x, norm, kind),
            _ => x.to_vec(),
        };
        let Position::Rotary { theta: base } = m.position else { return x };
        let half = x.len() / 2;
        let mut y = x.clone();
        for i in 0..half {
            let angle = token as f64 * base.powf(-2.0 * i as f64 / x.len() as f64);
            let (sin, cos) = angle.sin_cos();
            let (a, b) = (self.scale(x[i], cos), self.scale(x[i + half], sin));
            y[i] = self.sub(a, b);
            let (a, b) = (self.scale(x[i + half], cos), self.scale(x[i], sin));
            y[i + half] = self.add(a, b);
        }
        y
    }

    /// One sequence: x [N][D] → [N][D]
    fn attention(&mut self, x: &[Vec<Var>], layer: &Attention<Vec<Var>>, m: &Model) -> Vec<Vec<Var>> {
        let each = m.head_width;
        let q: Vec<_> = x.iter().map(|row| self.linear(row, &layer.q)).collect();
        let k: Vec<_> = x.iter().map(|row| self.linear(row, &layer.k)).collect();
        let v: Vec<_> = x.iter().map(|row| self.linear(row, &layer.v)).collect();
        let norms = layer.norms.as_ref();
        let mut mixed = vec![Vec::with_capacity(m.heads * each); x.len()];
        for head in 0..m.heads {
            let part = |head: usize| head * each..(head + 1) * each;
            let (own, shared) = (part(head), part(head * m.key_value_heads / m.heads));
            let mut placed =
                |rows: &[Vec<Var>], part: &std::ops::Range<usize>, which: usize| -> Vec<Vec<Var>> {
                    let rows = rows.iter().enumerate();
                    rows.map(|(n, row)| self.placed(&row[part.clone()], n, norms.map(|all| &all[which]), m))
                        .collect()
                };
            let (q, k) = (placed(&q, &own, 0), placed(&k, &shared, 1));
            for (n, out) in mixed.iter_mut().enumerate() {
                let seen = if m.causal { n + 1 } else { x.len() };
                let scores: Vec<_> = k[..seen]
                    .iter()
                    .map(|key| {
                        let score = self.dot(&q[n], key);
                        self.scale(score, 1.0 / (each as f64).sqrt())
                    })
                    .collect();
                let weights = self.softmax(&scores);
                for d in shared.clone() {
                    let column: Vec<_> = v[..seen].iter().map(|row| row[d]).collect();
                    out.push(self.dot(&weights, &column));
                }
            }
        }
        mixed.iter().map(|row| self.linear(row, &layer.o)).collect()
    }

    fn feed_forward(&mut self, x: &[Var], layer: &FeedForward<Vec<Var>>, m: &Model) -> Vec<Var> {
        let up = self.linear(x, &layer.up);
        let hidden = match &layer.gate {
            Some(gate) => {
                let gate = self.linear(x, gate);
                gate.iter()
                    .zip(&up)
                    .map(|(&gate, &up)| {
                        let active = self.activation(gate, m.activation);
                        self.mul(active, up)
                    })
                    .collect()
            }
            None => up.iter().map(|&h| self.activation(h, m.activation)).collect::<Vec<_>>(),
        };
        self.linear(&hidden, &layer.down)
    }

    fn add_rows(&mut self, a: &[Vec<Var>], b: &[Vec<Var>]) -> Vec<Vec<Var>> {
        a.iter().zip(b).map(|(a, b)| a.iter().zip(b).map(|(&x, &y)| self.add(x, y)).collect()).collect()
    }

    fn norm_rows(&mut self, x: &[Vec<Var>], layer: &Norm<Vec<Var>>, m: &Model) -> Vec<Vec<Var>> {
        x.iter().map(|row| self.norm(row, layer, m.norm)).collect()
    }

    fn block(&mut self, x: &[Vec<Var>], b: &Block<Vec<Var>>, m: &Model) -> Vec<Vec<Var>> {
        let x = self.around(x, &b.norm1, m, |t, x| t.attention(x, &b.attention, m));
        self.around(&x, &b.norm2, m, |t, x| {
            x.iter().map(|row| t.feed_forward(row, &b.feed_forward, m)).collect()
        })
    }

    /// Adds a part's result to the residual stream, with the norm where the model has it.
    fn around(
        &mut self,
        x: &[Vec<Var>],
        norm: &Norm<Vec<Var>>,
        m: &Model,
        part: impl FnOnce(&mut Self, &[Vec<Var>]) -> Vec<Vec<Var>>,
    ) -> Vec<Vec<Var>> {
        match m.norm_order {
            NormOrder::PostNorm => {
                let y = part(self, x);
                let sum = self.add_rows(x, &y);
                self.norm_rows(&sum, norm, m)
            }
            NormOrder::PreNorm => {
                let normed = self.norm_rows(x, norm, m);
                let y = part(self, &normed);
                self.add_rows(x, &y)
            }
        }
    }

    fn head(&mut self, x: &[Var], head: &Head<Vec<Var>>) -> Var {
        let hidden = self.linear(x, &head.hidden);
        let active: Vec<_> = hidden.iter().map(|&h| self.relu(h)).collect();
        self.linear(&active, &head.out)[0]
    }

    /// One sample's inputs: [N][D]
    fn embed(&mut self, sample: &Sample, p: &Network<Vec<Var>>, m: &Model) -> Vec<Vec<Var>> {
        let x: Vec<Vec<Var>> = match (&p.embedding, sample) {
            (Embedding::Tokens(table, own), Sample::Tokens(tokens)) => {
                let row = |&t: &f32| table.chunks(m.width).nth(t as usize).expect("below V").to_vec();
                let rows: Vec<_> = tokens.iter().map(row).collect();
                let types = own.as_ref().map(|own| vec![own.clone(); rows.len()]);
                types.map_or(rows.clone(), |types| self.add_rows(&rows, &types))
            }
            (Embedding::Indicator { value, market }, Sample::Indicator { values, features }) => {
                let shared = self.linear(features, market);
                values
                    .iter()
                    .map(|&v| {
                        let own = self.linear(&[v], value);
                        own.iter().zip(&shared).map(|(&a, &b)| self.add(a, b)).collect()
                    })
                    .collect()
            }
            _ => unreachable!("the sample is the model's"),
        };
        let x = match &p.position {
            Some(position) => {
                let places: Vec<Vec<Var>> = position.chunks(m.width).map(<[Var]>::to_vec).collect();
                self.add_rows(&x, &places)
            }
            None => x,
        };
        match &p.embedding_norm {
            Some(norm) => self.norm_rows(&x, norm, m),
            None => x,
        }
    }

    /// One sample's last hidden rows: [N][D]
    fn hidden(&mut self, sample: &Sample, p: &Network<Vec<Var>>, m: &Model) -> Vec<Vec<Var>> {
        let mut x = self.embed(sample, p, m);
        for block in &p.blocks {
            x = self.block(&x, block, m);
        }
        match &p.norm {
            Some(norm) => self.norm_rows(&x, norm, m),
            None => x,
        }
    }

    /// The logits of a hidden row [D] → [V]
    fn logits(&mut self, row: &[Var], p: &Network<Vec<Var>>, m: &Model) -> Vec<Var> {
        let table = if let OutputHead::Untied(table) = &p.end { table } else { p.token_table() };
        match &p.end {
            OutputHead::Masked { dense, norm, bias } => {
                let hidden = self.linear(row, dense);
                let active: Vec<_> = hidden.iter().map(|&h| self.activation(h, m.activation)).collect();
                let normed = self.norm(&active, norm, m.norm);
                self.linear(&normed, &Linear { weight: table.clone(), bias: Some(bias.clone()) })
            }
            _ => table.chunks(m.width).map(|token| self.dot(token, row)).collect(),
        }
    }

    /// Selection logits and weights of one sample, [N] each.
    fn two_heads(&mut self, x: &[Vec<Var>], [selection, allocation]: &[Head<Vec<Var>>; 2]) -> [Vec<Var>; 2] {
        let selected = x.iter().map(|row| self.head(row, selection)).collect();
        let scores: Vec<_> = x.iter().map(|row| self.head(row, allocation)).collect();
        [selected, self.softmax(&scores)]
    }

    /// BCE(selection, u) + 0.5·MSE(weights, t) + 0.1·mean(σ(selection)), where
    /// t = u·σ(selection) over its row sum + 1e-8, and gradient flows through t.
    fn indicator_loss(&mut self, rows: &[[Vec<Var>; 2]], usefulness: &[Vec<Var>]) -> Var {
        let (mut bce, mut squares, mut chosen) = (Vec::new(), Vec::new(), Vec::new());
        for ([selection, weights], useful) in rows.iter().zip(usefulness) {
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

/// What a model reads of one sample.
enum Sample<'a> {
    Tokens(&'a [f32]),
    Indicator { values: &'a [Var], features: &'a [Var] },
}

fn leaves(tape: &mut Tape, tensor: &Tensor) -> Vec<Var> {
    tensor.data.iter().map(|&v| tape.leaf(f64::from(v))).collect()
}

/// What a step computes, before anything is read off the tape.
#[derive(Default)]
struct Computed {
    /// What comes out, where no loss does.
    results: Vec<(&'static str, Vec<Var>)>,
    /// The input whose gradient is asked for.
    input: Option<Vec<Var>>,
    loss: Option<Var>,
}

/// What a step of the fixture's case must put out, without the optimizer's results:
/// those follow from a backend's own gradients through [`super::adamw`].
pub fn expected(fixture: &Fixture) -> Vec<Expected> {
    assert!(!fixture.dropout.any(), "the oracle has no dropout");
    let case = fixture.case;
    if case.workload == Workload::OptimizerStep {
        return Vec::new();
    }
    let mut tape = Tape::default();
    let parameters: Vec<Vec<Var>> =
        fixture.parameters().iter().map(|tensor| leaves(&mut tape, tensor)).collect();
    let parts = LayerParams::take(&mut InOrder(parameters.iter().cloned()), case.shape);
    let t = &mut tape;
    let computed = match (&parts, case.shape) {
        (LayerParams::Model(network), Shape::Model { model, batch, .. }) => {
            whole(t, fixture, network, &model, batch)
        }
        (_, Shape::Block { model, .. }) => block(t, fixture, &parts, &model),
        (_, Shape::Square { n, chain }) => squares(t, fixture, n, chain),
        (_, Shape::Buffer { .. }) => {
            let data = leaves(t, fixture.input("buffer")).iter().map(|&v| t.scale(v, -1.0)).collect();
            Computed { results: vec![("out", data)], ..Computed::default() }
        }
        _ => unreachable!("the parts were taken for the shape"),
    };
    told(&tape, fixture, &parameters, &computed)
}

fn whole(t: &mut Tape, fixture: &Fixture, p: &Network<Vec<Var>>, m: &Model, batch: usize) -> Computed {
    let inputs: Vec<Vec<Var>> = if m.is_language_model() {
        Vec::new()
    } else {
        fixture.inputs().iter().map(|tensor| leaves(t, tensor)).collect()
    };
    let hidden: Vec<Vec<Vec<Var>>> = (0..batch)
        .map(|b| {
            let row = |all: &'_ [Var]| -> std::ops::Range<usize> {
                let each = all.len() / batch;
                b * each..(b + 1) * each
            };
            let sample = match &inputs[..] {
                [] => Sample::Tokens(&fixture.input("tokens").data[b * m.tokens..(b + 1) * m.tokens]),
                [values, features, ..] => {
                    Sample::Indicator { values: &values[row(values)], features: &features[row(features)] }
                }
                _ => unreachable!("indicators have three inputs"),
            };
            t.hidden(&sample, p, m)
        })
        .collect();
    let trains = fixture.case.workload.trains();
    let mut computed = Computed::default();
    match (m.output, &p.end) {
        (Output::Tied | Output::Untied | Output::MlmHead, _) => {
            let logits: Vec<Vec<Var>> = hidden.iter().flatten().map(|row| t.logits(row, p, m)).collect();
            if trains {
                computed.loss = Some(t.cross_entropy(&logits, &fixture.input("next").data));
            } else {
                computed.results.push(("logits", logits.concat()));
            }
        }
        (Output::IndicatorHeads, end) => {
            let OutputHead::Heads(heads) = end else { unreachable!("the end is the output's") };
            let rows: Vec<_> = hidden.iter().map(|x| t.two_heads(x, heads)).collect();
            if trains {
                let useful: Vec<_> = inputs[2].chunks(m.tokens).map(<[Var]>::to_vec).collect();
                computed.loss = Some(t.indicator_loss(&rows, &useful));
            } else {
                for (i, name) in m.output_names().iter().enumerate() {
                    computed.results.push((*name, rows.iter().flat_map(|r| r[i].clone()).collect()));
                }
            }
        }
    }
    computed
}

fn block(t: &mut Tape, fixture: &Fixture, parts: &LayerParams<Vec<Var>>, m: &Model) -> Computed {
    let x = leaves(t, fixture.input("x"));
    let rows: Vec<Vec<Var>> = x.chunks(m.width).map(<[Var]>::to_vec).collect();
    let out: Vec<Vec<Var>> = match parts {
        LayerParams::Attention(layer) => {
            rows.chunks(m.tokens).flat_map(|sequence| t.attention(sequence, layer, m)).collect()
        }
        LayerParams::FeedForward(layer) => rows.iter().map(|row| t.feed_forward(row, layer, m)).collect(),
        LayerParams::Model(_) | LayerParams::None => unreachable!("a block's parts"),
    };
    let out = out.concat();
    // Σ out·upstream for the -grad workloads, so that `upstream` arrives as the gradient.
    let loss = fixture.case.workload.trains().then(|| {
        let weights = leaves(t, fixture.input("upstream"));
        t.dot(&out, &weights)
    });
    Computed { results: vec![("out", out)], input: Some(x), loss }
}

fn squares(t: &mut Tape, fixture: &Fixture, n: usize, chain: usize) -> Computed {
    let a = leaves(t, fixture.input("a"));
    let mut out = leaves(t, fixture.input("b"));
    for _ in 0..chain {
        out = (0..n * n)
            .map(|i| {
                let column: Vec<_> = (0..n).map(|k| out[k * n + i % n]).collect();
                t.dot(&a[i / n * n..(i / n + 1) * n], &column)
            })
            .collect();
    }
    Computed { results: vec![("out", out)], ..Computed::default() }
}

/// Reads values and derivatives off the tape, by their names.
fn told(tape: &Tape, fixture: &Fixture, parameters: &[Vec<Var>], computed: &Computed) -> Vec<Expected> {
    let read = |vars: &[Var]| vars.iter().map(|&v| tape.get(v)).collect::<Vec<_>>();
    let named = |name: String, data| Expected { name, data };
    let Some(loss) = computed.loss else {
        return computed.results.iter().map(|(name, vars)| named((*name).to_owned(), read(vars))).collect();
    };
    let slopes = tape.backward(loss);
    let mut all = Vec::new();
    // A block's loss only carries the upstream gradient; its value means nothing.
    if fixture.case.workload.takes_model() {
        all.push(named("loss".to_owned(), read(&[loss])));
    }
    all.extend(computed.input.iter().map(|x| named("grad/x".to_owned(), slopes.of(x))));
    all.extend(
        fixture
            .parameters()
            .iter()
            .zip(parameters)
            .map(|(tensor, vars)| named(format!("grad/{}", tensor.name), slopes.of(vars))),
    );
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{CHOICE_MODELS, ModelId};
    use crate::suite::Case;

    /// Central differences of the loss, by a few parameters of each tensor.
    fn differences(case: Case) {
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
        differences("train-step/torch-cpu/f32/indicator-tiny-b2".parse().unwrap());
        let gpt2: Case = "train-step/torch-cpu/f32/gpt2-tiny-b2-t16".parse().unwrap();
        differences(gpt2);
        for choice in CHOICE_MODELS {
            differences(Case { shape: Shape::of_model(ModelId::intern(choice), 2), ..gpt2 });
        }
    }
}
