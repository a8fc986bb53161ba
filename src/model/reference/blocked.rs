//! The oracle at full sizes: the scalar one's mathematics in products of matrices, one sample at
//! a time, in f64 or, rounded as a precision stores its results, in f32.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::graph::{Graph, Var};
use super::matrix::{Matrix, Real, in_pieces};
use super::rounding::Rounding;
use crate::model::fixture::{Fixture, Tensor};
use crate::model::parameters::{
    Attention, Block, Embedding, FeedForward, Head, InOrder, LayerParams, Linear, Network, Norm, OutputHead,
};
use crate::model::{Input, Model, NormKind, NormOrder, Output, Position};
use crate::suite::{Shape, Workload};

/// A place where dropout acts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Site {
    /// What the embedding gives.
    Embedding,
    /// Attention's weights of a layer's head.
    Weights {
        layer: usize,
        head: usize,
    },
    /// What a layer's attention adds to the residual stream.
    AttentionResidual {
        layer: usize,
    },
    Hidden {
        layer: usize,
    },
    /// What a layer's feed-forward part adds to the residual stream.
    FeedForwardResidual {
        layer: usize,
    },
    /// An output head.
    Head {
        index: usize,
    },
}

/// The factors of dropout at a sample's site, of so many rows and columns; None where it does nothing.
pub type Masks<'a> = &'a (dyn Fn(usize, Site, [usize; 2]) -> Option<Vec<f64>> + Sync);

/// What follows `loss`: the parts of which it is the sum, one a token.
pub const TERMS: &str = "loss/terms";

/// A result, by the names of a backend's outputs.
#[derive(Clone, Debug)]
pub struct Computed<R> {
    pub name: String,
    pub data: Vec<R>,
}

/// What a step of the fixture's case puts out, without the optimizer's results.
///
/// Samples that occur several times in the fixture are computed once.
pub fn computed<R: Real>(
    fixture: &Fixture,
    rounding: Rounding,
    masks: Option<Masks<'_>>,
) -> Vec<Computed<R>> {
    match fixture.case.shape {
        _ if fixture.case.workload == Workload::OptimizerStep => Vec::new(),
        Shape::Square { n, chain } => vec![named("out", squares(fixture, n, chain, rounding))],
        Shape::Buffer { .. } => {
            let negative = |&v: &f32| rounding.leaf.round(-R::from_f32(v));
            vec![named("out", fixture.input("buffer").data.iter().map(negative).collect())]
        }
        Shape::Model { model, .. } | Shape::Block { model, .. } => {
            Run { fixture, model: &model, rounding, masks }.all()
        }
    }
}

fn named<R>(name: &str, data: Vec<R>) -> Computed<R> {
    Computed { name: name.to_owned(), data }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn squares<R: Real>(fixture: &Fixture, n: usize, chain: usize, rounding: Rounding) -> Vec<R> {
    let load = |name: &str| {
        let data = fixture.input(name).data.iter().map(|&v| rounding.leaf.round(R::from_f32(v))).collect();
        Matrix::new(n, n, data)
    };
    let (a, mut out) = (load("a").map(cores(), |v| rounding.operand.round(v)), load("b"));
    for _ in 0..chain {
        out = a.view().product(out.map(cores(), |v| rounding.operand.round(v)).view(), cores());
        rounding.round_all(rounding.product, &mut out.data, cores());
    }
    out.data
}

struct Run<'a> {
    fixture: &'a Fixture,
    model: &'a Model,
    rounding: Rounding,
    masks: Option<Masks<'a>>,
}

/// What one sample gave.
#[derive(Default)]
struct OfSample<R> {
    results: Vec<(&'static str, Vec<R>)>,
    /// Of the loss, one a token.
    terms: Vec<R>,
    /// By the input, then by each parameter.
    input: Option<Vec<R>>,
    gradients: Vec<Matrix<R>>,
}

/// One sample on its graph.
struct Sample<'a, R> {
    graph: Graph<R>,
    run: &'a Run<'a>,
    index: usize,
}

impl Run<'_> {
    /// Samples on as many threads as there are cores, and their results together.
    fn all<R: Real>(&self) -> Vec<Computed<R>> {
        let order = self.fixture.samples();
        let distinct = order.iter().max().map_or(0, |most| most + 1);
        let outer = distinct.min(cores());
        let threads = (cores() / outer).max(1);
        let next = AtomicUsize::new(0);
        let found: Mutex<Vec<(usize, OfSample<R>)>> = Mutex::new(Vec::new());
        let gradients: Mutex<Vec<Matrix<R>>> = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..outer {
                scope.spawn(|| {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        if index >= distinct {
                            return;
                        }
                        let mut one = self.sample::<R>(index, threads);
                        let times = order.iter().filter(|&&i| i == index).count();
                        let mut sums = gradients.lock().expect("no thread panicked");
                        self.add_products(&mut sums, &mut one.gradients, times);
                        drop(sums);
                        found.lock().expect("no thread panicked").push((index, one));
                    }
                });
            }
        });
        let mut found = found.into_inner().expect("no thread panicked");
        found.sort_by_key(|(index, _)| *index);
        let samples: Vec<OfSample<R>> = found.into_iter().map(|(_, one)| one).collect();
        self.together(order, &samples, gradients.into_inner().expect("no thread panicked"))
    }

    /// Adds `times` of the gradients that are products, and keeps the others.
    fn add_products<R: Real>(&self, sums: &mut Vec<Matrix<R>>, own: &mut [Matrix<R>], times: usize) {
        let times = R::from_f64(times as f64);
        let first = sums.is_empty();
        for (index, (tensor, own)) in self.fixture.parameters().iter().zip(own).enumerate() {
            let mut part = if summed(tensor) { Matrix::default() } else { std::mem::take(own) };
            part.data.iter_mut().for_each(|v| *v *= times);
            if first {
                sums.push(part);
            } else {
                sums[index].add(&part);
            }
        }
    }

    fn together<R: Real>(
        &self,
        order: &[usize],
        samples: &[OfSample<R>],
        gradients: Vec<Matrix<R>>,
    ) -> Vec<Computed<R>> {
        let joined = |part: &dyn Fn(&OfSample<R>) -> &[R]| -> Vec<R> {
            order.iter().flat_map(|&i| part(&samples[i]).iter().copied()).collect()
        };
        let workload = self.fixture.case.workload;
        if !workload.trains() {
            return (0..samples[0].results.len())
                .map(|i| named(samples[0].results[i].0, joined(&|one| &one.results[i].1)))
                .collect();
        }
        let mut all = Vec::new();
        if workload.takes_model() {
            let terms = joined(&|one| &one.terms);
            all.push(named("loss", vec![terms.iter().copied().sum()]));
            all.push(named(TERMS, terms));
        } else {
            all.push(named("grad/x", joined(&|one| one.input.as_deref().unwrap_or(&[]))));
        }
        for (index, (tensor, mut gradient)) in self.fixture.parameters().iter().zip(gradients).enumerate() {
            if summed(tensor) {
                gradient = Matrix::zeros(1, tensor.data.len());
                let of_norm = tensor.name.contains("norm");
                for &i in order {
                    let rows = &samples[i].gradients[index].data;
                    self.rounding.sum(self.rounding.product, of_norm, &mut gradient.data, rows);
                }
            }
            self.rounding.round_all(self.rounding.product, &mut gradient.data, cores());
            all.push(named(&format!("grad/{}", tensor.name), gradient.data));
        }
        all
    }

    fn sample<R: Real>(&self, index: usize, threads: usize) -> OfSample<R> {
        let mut sample = Sample { graph: Graph::new(self.rounding, threads), run: self, index };
        let parameters: Vec<Var> =
            self.fixture.parameters().iter().map(|tensor| sample.parameter(tensor)).collect();
        let shape = self.fixture.case.shape;
        match LayerParams::take(&mut InOrder(parameters.iter().copied()), shape) {
            LayerParams::Model(network) => sample.whole(&network, &parameters),
            parts => sample.block(&parts, &parameters),
        }
    }
}

/// Whether a gradient is a sum of rows (or of whole tensors, one a sample), not a product.
fn summed(parameter: &Tensor) -> bool {
    parameter.dims.len() == 1 || parameter.name == "position"
}

impl<R: Real> Sample<'_, R> {
    fn leaf(&mut self, rows: usize, values: &[f32]) -> Var {
        let data: Vec<R> = values.iter().map(|&v| R::from_f32(v)).collect();
        self.graph.leaf(Matrix::new(rows, data.len() / rows, data))
    }

    fn parameter(&mut self, tensor: &Tensor) -> Var {
        let rows = if tensor.dims.len() > 1 { tensor.dims[0] } else { 1 };
        self.leaf(rows, &tensor.data)
    }

    /// The part of an input that is this sample's.
    fn input(&self, name: &str) -> Vec<f32> {
        let all = &self.run.fixture.input(name).data;
        let order = self.run.fixture.samples();
        let each = all.len() / order.len();
        let at = order.iter().position(|&i| i == self.index).expect("a sample of the fixture");
        all[at * each..(at + 1) * each].to_vec()
    }

    fn factors(&self, site: Site, rows: usize, columns: usize) -> Option<Matrix<R>> {
        let factors = self.run.masks?(self.index, site, [rows, columns])?;
        Some(Matrix::new(
            rows,
            columns,
            factors.into_iter().map(|f| self.run.rounding.leaf.round(R::from_f64(f))).collect(),
        ))
    }

    fn dropped(&mut self, x: Var, site: Site) -> Var {
        let (rows, columns) = (self.graph.get(x).rows, self.graph.get(x).columns);
        let factors = self.factors(site, rows, columns);
        self.graph.mask(x, factors)
    }

    fn linear(&mut self, x: Var, layer: &Linear<Var>) -> Var {
        self.graph.linear(x, layer.weight, layer.bias)
    }

    fn norm(&mut self, x: Var, layer: &Norm<Var>) -> Var {
        let width = self.graph.get(x).columns;
        self.norm_each(x, width, layer, self.run.model.norm)
    }

    fn norm_each(&mut self, x: Var, width: usize, layer: &Norm<Var>, kind: NormKind) -> Var {
        let centred = matches!(kind, NormKind::Layer { .. });
        self.graph.norm(x, width, layer.weight, layer.bias, (centred, kind.eps()))
    }

    fn attention(&mut self, x: Var, a: &Attention<Var>, layer: usize) -> Var {
        let m = self.run.model;
        let mut qkv = [&a.q, &a.k, &a.v].map(|part| self.linear(x, part));
        for (which, x) in qkv[..2].iter_mut().enumerate() {
            if let (Some(norms), Some(kind)) = (&a.norms, m.qk_norm) {
                *x = self.norm_each(*x, m.head_width, &norms[which], kind);
            }
            if let Position::Rotary { theta: base } = m.position {
                *x = self.graph.rotary(*x, m.head_width, base);
            }
        }
        let tokens = self.graph.get(x).rows;
        let masks: Vec<_> =
            (0..m.heads).map(|head| self.factors(Site::Weights { layer, head }, tokens, tokens)).collect();
        let mixed = self.graph.attention(qkv, m.heads, m.causal, |head| masks[head].clone());
        self.linear(mixed, &a.o)
    }

    fn feed_forward(&mut self, x: Var, f: &FeedForward<Var>, layer: usize) -> Var {
        let kind = self.run.model.activation;
        let up = self.linear(x, &f.up);
        let hidden = match &f.gate {
            Some(gate) => {
                let gate = self.linear(x, gate);
                let active = self.graph.activate(gate, kind);
                self.graph.mul(active, up)
            }
            None => self.graph.activate(up, kind),
        };
        let hidden = self.dropped(hidden, Site::Hidden { layer });
        self.linear(hidden, &f.down)
    }

    fn layer(&mut self, x: Var, b: &Block<Var>, layer: usize) -> Var {
        let x = self.around(x, &b.norm1, Site::AttentionResidual { layer }, |s, x| {
            s.attention(x, &b.attention, layer)
        });
        self.around(x, &b.norm2, Site::FeedForwardResidual { layer }, |s, x| {
            s.feed_forward(x, &b.feed_forward, layer)
        })
    }

    /// Adds a part's result to the residual stream, with the norm where the model has it.
    fn around(
        &mut self,
        x: Var,
        norm: &Norm<Var>,
        site: Site,
        part: impl FnOnce(&mut Self, Var) -> Var,
    ) -> Var {
        match self.run.model.norm_order {
            NormOrder::PostNorm => {
                let y = part(self, x);
                let y = self.dropped(y, site);
                let sum = self.graph.add(x, y);
                self.norm(sum, norm)
            }
            NormOrder::PreNorm => {
                let normed = self.norm(x, norm);
                let y = part(self, normed);
                let y = self.dropped(y, site);
                self.graph.add(x, y)
            }
        }
    }

    fn head(&mut self, x: Var, head: &Head<Var>, index: usize) -> Var {
        let hidden = self.linear(x, &head.hidden);
        let active = self.graph.relu(hidden);
        let active = self.dropped(active, Site::Head { index });
        self.linear(active, &head.out)
    }

    fn embed(&mut self, p: &Network<Var>) -> Var {
        let m = self.run.model;
        let x = match (&p.embedding, m.input) {
            (Embedding::Tokens(table, own), _) => {
                let tokens = self.input("tokens").iter().map(|&t| t as usize).collect();
                let rows = self.graph.rows(*table, tokens);
                own.map_or(rows, |own| self.graph.add_row(rows, own))
            }
            (Embedding::Indicator { value, market }, Input::Indicator { .. }) => {
                let (values, features) = (self.input("values"), self.input("market"));
                let values = self.leaf(m.tokens, &values);
                let features = self.leaf(1, &features);
                let own = self.linear(values, value);
                let shared = self.linear(features, market);
                self.graph.add_row(own, shared)
            }
            _ => unreachable!("the embedding is the input's"),
        };
        let x = p.position.map_or(x, |position| self.graph.add(x, position));
        let x = p.embedding_norm.as_ref().map_or(x, |norm| self.norm(x, norm));
        self.dropped(x, Site::Embedding)
    }

    /// Hidden rows [N, D] → logits [N, V]
    fn logits(&mut self, x: Var, p: &Network<Var>) -> Var {
        match &p.end {
            OutputHead::Untied(table) => self.graph.linear(x, *table, None),
            OutputHead::Masked { dense, norm, bias } => {
                let hidden = self.linear(x, dense);
                let active = self.graph.activate(hidden, self.run.model.activation);
                let normed = self.norm(active, norm);
                self.graph.linear(normed, *p.token_table(), Some(*bias))
            }
            OutputHead::Tied | OutputHead::Heads(_) => self.graph.linear(x, *p.token_table(), None),
        }
    }

    fn whole(mut self, p: &Network<Var>, parameters: &[Var]) -> OfSample<R> {
        let m = self.run.model;
        let mut x = self.embed(p);
        for (layer, block) in p.blocks.iter().enumerate() {
            x = self.layer(x, block, layer);
        }
        let x = p.norm.as_ref().map_or(x, |norm| self.norm(x, norm));
        let out = match &p.end {
            OutputHead::Heads([selection, allocation]) => {
                let selected = self.head(x, selection, 0);
                let scores = self.head(x, allocation, 1);
                vec![selected, self.graph.softmax(scores)]
            }
            _ => vec![self.logits(x, p)],
        };
        let case = self.run.fixture.case;
        if !case.workload.trains() {
            let results = m.output_names().iter().zip(&out);
            let results = results.map(|(name, &a)| (*name, self.graph.get(a).data.clone())).collect();
            return OfSample { results, ..OfSample::default() };
        }
        // Losses are means over the batch and the tokens.
        let scale = R::from_f64(1.0 / (case.shape.batch() * m.tokens) as f64);
        let loss = match m.output {
            Output::Tied | Output::Untied | Output::MlmHead => self.cross_entropy(out[0], scale),
            Output::IndicatorHeads => self.indicator_loss([out[0], out[1]], scale),
        };
        let terms = self.graph.get(loss).data.clone();
        let gradients = self.gradients(loss, Matrix::default(), parameters).1;
        OfSample { terms, gradients, ..OfSample::default() }
    }

    /// The gradients of a value's `input`, where there is one, and of the parameters.
    fn gradients(
        self,
        of: Var,
        upstream: Matrix<R>,
        wanted: &[Var],
    ) -> (Vec<Option<Matrix<R>>>, Vec<Matrix<R>>) {
        let shapes: Vec<(usize, usize)> =
            wanted.iter().map(|&a| (self.graph.get(a).rows, self.graph.get(a).columns)).collect();
        let mut all = self.graph.backward(of, upstream);
        let own = wanted
            .iter()
            .zip(shapes)
            .map(|(a, (rows, columns))| a.take(&mut all).unwrap_or_else(|| Matrix::zeros(rows, columns)))
            .collect();
        (all, own)
    }

    fn block(mut self, parts: &LayerParams<Var>, parameters: &[Var]) -> OfSample<R> {
        let (values, m) = (self.input("x"), self.run.model);
        let x = self.leaf(m.tokens, &values);
        let out = match parts {
            LayerParams::Attention(layer) => self.attention(x, layer, 0),
            LayerParams::FeedForward(layer) => self.feed_forward(x, layer, 0),
            LayerParams::Model(_) | LayerParams::None => unreachable!("a block's parts"),
        };
        if !self.run.fixture.case.workload.trains() {
            let results = vec![("out", self.graph.get(out).data.clone())];
            return OfSample { results, ..OfSample::default() };
        }
        let format = self.run.rounding.product;
        let upstream: Vec<R> = self.input("upstream").iter().map(|&v| format.round(R::from_f32(v))).collect();
        let upstream = Matrix::new(m.tokens, m.width, upstream);
        let Run { rounding, .. } = *self.run;
        let (mut all, gradients) = self.gradients(out, upstream, parameters);
        let mut input = x.take(&mut all).unwrap_or_default().data;
        rounding.round_all(rounding.leaf, &mut input, 1);
        OfSample { input: Some(input), gradients, ..OfSample::default() }
    }

    /// This sample's part of BCE(selection, u) + 0.5·MSE(weights, t) + 0.1·mean(σ(selection)),
    /// where t = u·σ(selection) over its row sum + 1e-8, and gradient flows through t.
    fn indicator_loss(&mut self, [selection, weights]: [Var; 2], scale: R) -> Var {
        let useful: Vec<R> = self.input("usefulness").iter().map(|&v| R::from_f32(v)).collect();
        let (s, w) = (&self.graph.get(selection).data, &self.graph.get(weights).data);
        let (half, tenth, one) = (R::from_f64(0.5), R::from_f64(0.1), R::one());
        let p: Vec<R> = s.iter().map(|&s| one / (one + (-s).exp())).collect();
        let total = useful.iter().zip(&p).map(|(&u, &p)| u * p).sum::<R>() + R::from_f64(1e-8);
        let target: Vec<R> = useful.iter().zip(&p).map(|(&u, &p)| u * p / total).collect();
        let miss: Vec<R> = w.iter().zip(&target).map(|(&w, &t)| w - t).collect();
        let along = miss.iter().zip(&target).map(|(&m, &t)| -scale * m * t).sum::<R>();
        let mut terms = Vec::with_capacity(s.len());
        let mut by_selection = Vec::with_capacity(s.len());
        for n in 0..s.len() {
            let softplus = s[n].max(R::zero()) + (-s[n].abs()).exp().ln_1p();
            let term = softplus - s[n] * useful[n] + half * miss[n] * miss[n] + tenth * p[n];
            terms.push(scale * term);
            let by_raw = (-scale * miss[n] - along) / total;
            let by_p = useful[n] * by_raw + tenth * scale;
            by_selection.push(p[n] * (one - p[n]) * by_p + scale * (p[n] - useful[n]));
        }
        let column = |data: Vec<R>| Matrix::new(data.len(), 1, data);
        let by_weights = column(miss.iter().map(|&m| scale * m).collect());
        self.graph.known(terms, vec![(selection, column(by_selection)), (weights, by_weights)])
    }

    /// This sample's part of the mean of −ln softmax(logits)[next].
    fn cross_entropy(&mut self, logits: Var, scale: R) -> Var {
        let next = self.input("next");
        let mut slopes = self.graph.get(logits).clone();
        let vocabulary = self.run.model.vocabulary;
        let threads = self.graph.threads();
        let terms: Mutex<Vec<R>> = Mutex::new(vec![R::zero(); next.len()]);
        in_pieces(&mut slopes.data, vocabulary, threads, |first, rows| {
            for (index, row) in rows.chunks_mut(vocabulary).enumerate() {
                let place = first / vocabulary + index;
                let token = next[place] as usize;
                let largest = row.iter().copied().fold(R::min_value(), R::max);
                let target = row[token];
                row.iter_mut().for_each(|v| *v = (*v - largest).exp());
                let total = row.iter().copied().sum::<R>();
                row.iter_mut().for_each(|v| *v = *v / total * scale);
                row[token] = row[token] - scale;
                terms.lock().expect("no thread panicked")[place] = scale * (total.ln() + largest - target);
            }
        });
        let terms = terms.into_inner().expect("no thread panicked");
        self.graph.known(terms, vec![(logits, slopes)])
    }
}
