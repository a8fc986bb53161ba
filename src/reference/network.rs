//! The network of one sample: its layers, and the results of its step.

use super::attention::Scores;
use super::autograd::{Gradients, Graph, Var};
use super::matmul::{Matrix, Real};
use super::rounding::Rounding;
use crate::fixture::{Fixture, Tensor};
use crate::model::parameters::{
    Attention, Embedding, FeedForward, IndicatorHead, Layer, Linear, Network, Norm, OutputHead, Parameters,
};
use crate::model::{Input, Model, NormOrder, Output, Position};

/// A place where dropout acts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Site {
    /// The result of the embedding.
    Embedding,
    /// The attention weights of a head.
    Weights { layer: usize, head: usize },
    /// The result of attention, before it is added to the residual stream.
    AttentionResidual { layer: usize },
    /// The hidden features of the feed-forward part.
    Hidden { layer: usize },
    /// The result of the feed-forward part, before it is added to the residual stream.
    FeedForwardResidual { layer: usize },
    /// The hidden features of an output head of the indicator model.
    Head { index: usize },
}

/// Returns the factors of dropout for a sample, a site and its [rows, columns], or `None` if it drops nothing.
pub type DropoutMasks<'a> = &'a (dyn Fn(usize, Site, [usize; 2]) -> Option<Vec<f64>> + Sync);

/// The batch of a model or a block.
pub struct Batch<'a> {
    pub fixture: &'a Fixture,
    pub model: &'a Model,
    pub rounding: Rounding,
    pub masks: Option<DropoutMasks<'a>>,
}

/// The results of one sample.
#[derive(Default)]
pub struct SampleResults<R> {
    /// The outputs of a case without gradients, in the order of their names.
    pub outputs: Vec<Vec<R>>,
    pub loss_terms: Vec<R>,
    pub input_gradient: Vec<R>,
    /// The gradients of the parameters.
    pub gradients: Vec<Matrix<R>>,
}

/// One sample and its graph.
pub struct Sample<'a, R> {
    pub graph: Graph<R>,
    pub batch: &'a Batch<'a>,
    pub index: usize,
}

impl<R: Real> Sample<'_, R> {
    fn leaf(&mut self, rows: usize, values: &[f32]) -> Var {
        let data: Vec<R> = values.iter().map(|&v| R::from_f32(v)).collect();
        self.graph.leaf(Matrix::new(rows, data.len() / rows, data))
    }

    pub fn parameter(&mut self, tensor: &Tensor) -> Var {
        let rows = if tensor.dims.len() > 1 { tensor.dims[0] } else { 1 };
        self.leaf(rows, &tensor.data)
    }

    /// Returns this sample's part of an input.
    pub fn input(&self, name: &str) -> Vec<f32> {
        let all = &self.batch.fixture.input(name).data;
        let order = self.batch.fixture.samples();
        let each = all.len() / order.len();
        let at = order.iter().position(|&i| i == self.index).expect("a sample of the fixture");
        all[at * each..(at + 1) * each].to_vec()
    }

    fn dropout_factors(&self, site: Site, rows: usize, columns: usize) -> Option<Matrix<R>> {
        let factors = self.batch.masks?(self.index, site, [rows, columns])?;
        let round = |f| self.batch.rounding.leaf.round(R::from_f64(f));
        Some(Matrix::new(rows, columns, factors.into_iter().map(round).collect()))
    }

    fn dropout(&mut self, x: Var, site: Site) -> Var {
        let (rows, columns) = (self.graph.get(x).rows, self.graph.get(x).columns);
        let factors = self.dropout_factors(site, rows, columns);
        self.graph.dropout(x, factors)
    }

    /// Applies a linear layer, with its adapter if it has one.
    fn linear(&mut self, x: Var, layer: &Linear<Var>) -> Var {
        let y = self.graph.linear(x, layer.weight, layer.bias);
        let (Some(adapter), Some(lora)) = (&layer.adapter, self.batch.model.lora) else { return y };
        let low_rank = self.graph.linear(x, adapter.a, None);
        let update = self.graph.linear(low_rank, adapter.b, None);
        let update = self.graph.scale(update, lora.scale());
        self.graph.add_products(y, update)
    }

    fn norm(&mut self, x: Var, layer: &Norm<Var>) -> Var {
        let width = self.graph.get(x).columns;
        self.graph.norm(x, width, layer, self.batch.model.norm)
    }

    fn attention(&mut self, x: Var, a: &Attention<Var>, layer: usize) -> Var {
        let m = self.batch.model;
        let mut qkv = [&a.q, &a.k, &a.v].map(|part| self.linear(x, part));
        for (which, x) in qkv[..2].iter_mut().enumerate() {
            if let (Some(norms), Some(kind)) = (&a.qk_norms, m.qk_norm) {
                *x = self.graph.norm(*x, m.qk_norm_widths()[which], &norms[which], kind);
            }
            if let Position::Rotary(rotary) = m.attention_kind(layer).position {
                *x = self.graph.rotary(*x, m.head_width, &rotary);
            }
        }
        let tokens = self.graph.get(x).rows;
        let factors = |head| self.dropout_factors(Site::Weights { layer, head }, tokens, tokens);
        let factors: Vec<_> = (0..m.heads).map(factors).collect();
        let visible = |token| m.visible_tokens(layer, token);
        let scores = Scores { heads: m.heads, scale: m.score_scale(), cap: m.cap.scores, visible: &visible };
        let heads = self.graph.attention(qkv, &scores, |head| factors[head].clone());
        self.linear(heads, &a.o)
    }

    fn feed_forward(&mut self, x: Var, f: &FeedForward<Var>, layer: usize) -> Var {
        let kind = self.batch.model.activation;
        let up = self.linear(x, &f.up);
        let hidden = match &f.gate {
            Some(gate) => {
                let gate = self.linear(x, gate);
                let active = self.graph.activate(gate, kind);
                self.graph.mul(active, up)
            }
            None => self.graph.activate(up, kind),
        };
        let hidden = self.dropout(hidden, Site::Hidden { layer });
        self.linear(hidden, &f.down)
    }

    fn layer(&mut self, x: Var, l: &Layer<Var>, layer: usize) -> Var {
        let sites = [Site::AttentionResidual { layer }, Site::FeedForwardResidual { layer }];
        let order = self.batch.model.norm_order;
        if order.is_parallel() {
            let input = self.norm(x, &l.norm1);
            let attention = self.attention(input, &l.attention, layer);
            let attention = self.branch(attention, None, sites[0]);
            let input = l.norm2.as_ref().map_or(input, |norm| self.norm(x, norm));
            let feed_forward = self.feed_forward(input, &l.feed_forward, layer);
            let feed_forward = self.branch(feed_forward, None, sites[1]);
            let sum = self.graph.add(attention, feed_forward);
            return self.graph.add(sum, x);
        }
        let norm2 = l.norm2.as_ref().expect("two norms unless the blocks are parallel");
        let [output1, output2] = l.output_norms.as_ref().map_or([&l.norm1, norm2], |[a, b]| [a, b]);
        let x = self.residual(x, [&l.norm1, output1], sites[0], |s, x| s.attention(x, &l.attention, layer));
        self.residual(x, [norm2, output2], sites[1], |s, x| s.feed_forward(x, &l.feed_forward, layer))
    }

    /// Completes the result of a part for the residual addition.
    fn branch(&mut self, y: Var, norm: Option<&Norm<Var>>, site: Site) -> Var {
        let y = norm.map_or(y, |norm| self.norm(y, norm));
        let y = self.dropout(y, site);
        self.graph.scale(y, self.batch.model.scale.residual)
    }

    /// Adds the result of `part` to the residual stream, with norms where the model has them. `norms` are that of the
    /// input or of the sum, and that of the output.
    fn residual(
        &mut self,
        x: Var,
        [norm, output_norm]: [&Norm<Var>; 2],
        site: Site,
        part: impl FnOnce(&mut Self, Var) -> Var,
    ) -> Var {
        let order = self.batch.model.norm_order;
        let input = if order.norms_inputs() { self.norm(x, norm) } else { x };
        let y = part(self, input);
        let y = self.branch(y, order.norms_outputs().then_some(output_norm), site);
        let sum = self.graph.add(x, y);
        if order == NormOrder::PostNorm { self.norm(sum, norm) } else { sum }
    }

    fn indicator_head(&mut self, x: Var, head: &IndicatorHead<Var>, index: usize) -> Var {
        let hidden = self.linear(x, &head.hidden);
        let active = self.graph.relu(hidden);
        let active = self.dropout(active, Site::Head { index });
        self.linear(active, &head.out)
    }

    fn embed(&mut self, p: &Network<Var>) -> Var {
        let m = self.batch.model;
        let x = match (&p.embedding, m.input) {
            (Embedding::Tokens(table, token_type), _) => {
                let tokens = self.input("tokens").iter().map(|&t| t as usize).collect();
                let rows = self.graph.gather(*table, tokens);
                token_type.map_or(rows, |token_type| self.graph.add_row(rows, token_type))
            }
            (Embedding::Indicator { value, market }, Input::Indicator { .. }) => {
                let (values, features) = (self.input("values"), self.input("market"));
                let values = self.leaf(m.tokens, &values);
                let features = self.leaf(1, &features);
                let by_token = self.linear(values, value);
                let shared = self.linear(features, market);
                self.graph.add_row(by_token, shared)
            }
            _ => unreachable!("the embedding fits the input"),
        };
        let x = self.graph.scale(x, m.scale.embedding);
        let x = p.position.map_or(x, |position| self.graph.add(x, position));
        let x = p.embedding_norm.as_ref().map_or(x, |norm| self.norm(x, norm));
        self.dropout(x, Site::Embedding)
    }

    /// x [N, D] → logits [N, V]
    fn logits(&mut self, x: Var, p: &Network<Var>) -> Var {
        let m = self.batch.model;
        let logits = match &p.output {
            OutputHead::Untied(output) => self.linear(x, output),
            OutputHead::MlmHead { dense, norm, bias } => {
                let hidden = self.linear(x, dense);
                let active = self.graph.activate(hidden, m.activation);
                let normed = self.norm(active, norm);
                self.graph.linear(normed, *p.token_table(), Some(*bias))
            }
            OutputHead::Tied | OutputHead::IndicatorHeads(_) => self.graph.linear(x, *p.token_table(), None),
        };
        let logits = self.graph.scale(logits, m.scale.logits);
        self.graph.cap(logits, m.cap.logits)
    }

    /// Computes the step of a whole model.
    pub fn model_step(mut self, p: &Network<Var>, parameters: &[Var]) -> SampleResults<R> {
        let m = self.batch.model;
        let mut x = self.embed(p);
        for (layer, l) in p.blocks.iter().enumerate() {
            x = self.layer(x, l, layer);
        }
        let x = p.final_norm.as_ref().map_or(x, |norm| self.norm(x, norm));
        let x = self.graph.scale(x, m.scale.hidden);
        let out = match &p.output {
            OutputHead::IndicatorHeads([selection, allocation]) => {
                let selection = self.indicator_head(x, selection, 0);
                let scores = self.indicator_head(x, allocation, 1);
                vec![selection, self.graph.softmax(scores)]
            }
            _ => vec![self.logits(x, p)],
        };
        let case = self.batch.fixture.case;
        if !case.workload.trains() {
            let outputs = out.iter().map(|&a| self.graph.get(a).data.clone()).collect();
            return SampleResults { outputs, ..SampleResults::default() };
        }
        // Losses are means over the batch and the tokens.
        let scale = R::from_f64(1.0 / (case.shape.batch() * m.tokens) as f64);
        let loss = match m.output {
            Output::Tied | Output::Untied | Output::MlmHead => self.cross_entropy(out[0], scale),
            Output::IndicatorHeads => self.indicator_loss([out[0], out[1]], scale),
        };
        let loss_terms = self.graph.get(loss).data.clone();
        let (_, gradients) = self.backward(loss, Matrix::default(), parameters);
        SampleResults { loss_terms, gradients, ..SampleResults::default() }
    }

    /// Computes the step of an attention or feed-forward part.
    pub fn block_step(mut self, block: &Parameters<Var>, parameters: &[Var]) -> SampleResults<R> {
        let (values, m) = (self.input("x"), self.batch.model);
        let x = self.leaf(m.tokens, &values);
        let out = match block {
            Parameters::Attention(layer) => self.attention(x, layer, 0),
            Parameters::FeedForward(layer) => self.feed_forward(x, layer, 0),
            Parameters::Model(_) | Parameters::None => unreachable!("the shape is a block"),
        };
        if !self.batch.fixture.case.workload.trains() {
            let outputs = vec![self.graph.get(out).data.clone()];
            return SampleResults { outputs, ..SampleResults::default() };
        }
        let rounding = self.batch.rounding;
        let upstream =
            self.input("upstream").iter().map(|&v| rounding.product.round(R::from_f32(v))).collect();
        let upstream = Matrix::new(m.tokens, m.width, upstream);
        let (mut all, gradients) = self.backward(out, upstream, parameters);
        let mut input_gradient = all.take(x).unwrap_or_default().data;
        rounding.round_all(rounding.leaf, &mut input_gradient, 1);
        SampleResults { input_gradient, gradients, ..SampleResults::default() }
    }

    /// Returns the gradients of all leaves, without those of `parameters`, which it returns separately.
    fn backward(
        self,
        result: Var,
        upstream: Matrix<R>,
        parameters: &[Var],
    ) -> (Gradients<R>, Vec<Matrix<R>>) {
        let shapes: Vec<(usize, usize)> =
            parameters.iter().map(|&a| (self.graph.get(a).rows, self.graph.get(a).columns)).collect();
        let mut all = self.graph.backward(result, upstream);
        let gradient = |(&a, (rows, columns))| all.take(a).unwrap_or_else(|| Matrix::zeros(rows, columns));
        let own = parameters.iter().zip(shapes).map(gradient).collect();
        (all, own)
    }
}
