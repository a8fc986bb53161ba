//! The network in tch. Dimensions: B batch, N (T) tokens, D width, H heads, F feed-forward width, V vocabulary.

mod operations;

use tch::{Device, Kind, Reduction, Tensor};
use transformer_bench::fixture::round_to;
use transformer_bench::model::parameters::{
    Adapter, Attention, Embedding, FeedForward, IndicatorHead, Layer, Linear, Network, Norm, OutputHead,
};
use transformer_bench::model::{
    Activation, AttentionKind, Dropout, Model, ModelId, NormKind, NormOrder, Output, Position, Rotary,
};
use transformer_bench::suite::Precision;

pub use operations::Operation;

/// Configuration of the layers.
#[derive(Debug)]
pub struct Layers {
    pub model: ModelId,
    /// True for one q-k-v projection and `scaled_dot_product_attention`.
    pub fused: bool,
    /// Constants of attention, by the model's kinds of attention.
    pub caches: Vec<AttentionCache>,
    /// Dropout probabilities, which are 0 outside training.
    pub dropout: Dropout,
}

/// Constants of a kind of attention. They are computed once per model, as in training scripts.
#[derive(Debug)]
pub struct AttentionCache {
    /// The cosines and sines [N, pairs] of the rotary position, in the type of the queries and keys.
    rope: Option<[Tensor; 2]>,
    pairs: bool,
    /// True [N, N] where a token attends to another, if the kind has a window.
    visible: Option<Tensor>,
}

/// Returns the constants of each kind of attention.
pub fn attention_caches(m: &Model, device: Device, kind: Kind) -> Vec<AttentionCache> {
    let cache = |attention: &AttentionKind| {
        let token = Tensor::arange(m.tokens as i64, (Kind::Float, device));
        let rope = |rotary: &Rotary| {
            let frequencies: Vec<f32> =
                rotary.frequencies(m.head_width).into_iter().map(|w| w as f32).collect();
            let angle = token.unsqueeze(1) * Tensor::from_slice(&frequencies).to_device(device).unsqueeze(0);
            [angle.cos(), angle.sin()].map(|table| (table * rotary.factor).to_kind(kind))
        };
        let distance = || token.unsqueeze(1) - token.unsqueeze(0);
        let visible = |window: usize| {
            let near = distance().abs().lt(window as f64);
            if m.causal { near.logical_and(&distance().ge(0.0)) } else { near }
        };
        let rotary = if let Position::Rotary(rotary) = &attention.position { Some(rotary) } else { None };
        AttentionCache {
            rope: rotary.map(rope),
            pairs: rotary.is_some_and(|rotary| rotary.pairs),
            visible: attention.window.map(visible),
        }
    };
    m.attention_kinds().iter().map(cache).collect()
}

impl AttentionCache {
    /// Applies the rotary position to queries or keys [B, H, N, d].
    fn rotate(&self, x: Tensor) -> Tensor {
        let Some([cos, sin]) = &self.rope else { return x };
        let (width, head_width) = (2 * cos.size()[1], x.size()[3]);
        let turning = x.narrow(-1, 0, width);
        let turned = if self.pairs {
            let (left, right) = (turning.slice(-1, 0, None, 2), turning.slice(-1, 1, None, 2));
            Tensor::stack(&[&left * cos - &right * sin, right * cos + left * sin], -1).flatten(-2, -1)
        } else {
            let halves = turning.chunk(2, -1);
            let [left, right] = &halves[..] else { panic!("chunk(2) returns two tensors") };
            Tensor::cat(&[left * cos - right * sin, right * cos + left * sin], -1)
        };
        if width == head_width {
            return turned;
        }
        Tensor::cat(&[turned, x.narrow(-1, width, head_width - width)], -1)
    }
}

/// Multiplies by a constant in the type of `x`, as both frameworks' model libraries do.
fn scale(x: Tensor, factor: f64) -> Tensor {
    if factor == 1.0 {
        return x;
    }
    let mut rounded = [factor as f32];
    match x.kind() {
        Kind::BFloat16 => round_to(Precision::Bf16, &mut rounded),
        Kind::Half => round_to(Precision::F16, &mut rounded),
        _ => return x * factor,
    }
    x * f64::from(rounded[0])
}

/// Limits values softly: cap · tanh(x / cap).
fn soft_cap(x: Tensor, cap: Option<f64>) -> Tensor {
    cap.map_or_else(|| x.shallow_clone(), |cap| (&x / cap).tanh() * cap)
}

/// Applies the matrix A of an adapter: x [B, N, in] → [B, N, rank].
fn low_rank(x: &Tensor, a: &Tensor) -> Tensor {
    x.linear(a, None::<&Tensor>)
}

impl Layers {
    /// Applies a linear layer, with its adapter if it has one.
    fn linear(&self, x: &Tensor, layer: &Linear<Tensor>) -> Tensor {
        let y = x.linear(&layer.weight, layer.bias.as_ref());
        match &layer.adapter {
            Some(adapter) => self.add_adapter(y, low_rank(x, &adapter.a), &adapter.b),
            None => y,
        }
    }

    /// Adds the result of an adapter to `y` [B, N, out], given the result of its matrix A [B, N, rank].
    fn add_adapter(&self, y: Tensor, low_rank: Tensor, b: &Tensor) -> Tensor {
        let factor = self.model.lora.map_or(1.0, |lora| lora.scale());
        if !self.fused {
            return y + scale(low_rank.linear(b, None::<&Tensor>), factor);
        }
        // A product that adds to its result needs two dimensions. The factor is cheaper before it.
        let low_rank = scale(low_rank, factor);
        let rows = |x: &Tensor| x.flatten(0, -2);
        rows(&y).addmm(&rows(&low_rank), &b.tr()).view_as(&y)
    }

    /// Returns queries, keys and values [B, N, H·d]. Packed ones have one product for all three, and another one for the
    /// matrices A of their adapters.
    fn project(&self, x: &Tensor, a: &Attention<Tensor>) -> Vec<Tensor> {
        let layers = [&a.q, &a.k, &a.v];
        if !self.fused {
            return layers.map(|layer| self.linear(x, layer)).into();
        }
        let m = &self.model;
        let (queries, keys) = m.qkv_widths();
        let widths = [queries, keys, keys].map(|width| width as i64);
        let mut qkv = x.linear(&a.q.weight, a.q.bias.as_ref()).split_with_sizes(widths, -1);
        let adapted = layers.iter().enumerate().filter_map(|(i, layer)| Some((i, layer.adapter.as_ref()?)));
        let adapted: Vec<_> = adapted.collect();
        if let Some((_, Adapter { a, .. })) = adapted.first() {
            let low_rank = low_rank(x, a).chunk(adapted.len() as i64, -1);
            for ((i, adapter), low_rank) in adapted.into_iter().zip(low_rank) {
                qkv[i] = self.add_adapter(qkv[i].shallow_clone(), low_rank, &adapter.b);
            }
        }
        qkv
    }

    fn norm(&self, x: &Tensor, layer: &Norm<Tensor>) -> Tensor {
        self.norm_of_kind(x, layer, self.model.norm)
    }

    fn norm_of_kind(&self, x: &Tensor, layer: &Norm<Tensor>, kind: NormKind) -> Tensor {
        let last = &x.size()[x.dim() - 1..];
        let (weight, bias) = (layer.weight.as_ref(), layer.bias.as_ref());
        match kind {
            NormKind::Layer { eps, .. } => x.layer_norm(last, weight, bias, eps, true),
            NormKind::Rms { eps, .. } => {
                let with_offset = weight.filter(|_| kind.has_offset()).map(|weight| weight + 1.0);
                x.rms_norm(last, with_offset.as_ref().or(weight), eps)
            }
        }
    }

    /// Returns queries, keys and values [B, H, N, d] before the rotary position.
    fn heads(&self, x: &Tensor, a: &Attention<Tensor>) -> [Tensor; 3] {
        let m = &self.model;
        let (b, n, _) = x.size3().expect("x is [B, N, D]");
        let (heads, key_value_heads, width) = (m.heads as i64, m.key_value_heads as i64, m.head_width as i64);
        let qkv = self.project(x, a);
        let split = |x: Tensor, heads: i64| x.view([b, n, heads, width]).transpose(1, 2);
        let counts = [heads, key_value_heads, key_value_heads];
        std::array::from_fn(|i| {
            let norm = a.qk_norms.as_ref().and_then(|norms| norms.get(i)).zip(m.qk_norm);
            match norm {
                Some((norm, kind)) if m.qk_norm_across_heads => {
                    split(self.norm_of_kind(&qkv[i], norm, kind), counts[i])
                }
                Some((norm, kind)) => {
                    self.norm_of_kind(&split(qkv[i].shallow_clone(), counts[i]), norm, kind)
                }
                None => split(qkv[i].shallow_clone(), counts[i]),
            }
        })
    }

    /// Applies the attention of a layer: x [B, N, D] → [B, N, D].
    pub fn attention(&self, x: &Tensor, a: &Attention<Tensor>, layer: usize) -> Tensor {
        let m = &self.model;
        let (b, n, _) = x.size3().expect("x is [B, N, D]");
        let cache = &self.caches[m.attention_index(layer)];
        let [q, k, v] = self.heads(x, a);
        let (q, k) = (cache.rotate(q), cache.rotate(k));
        // The fused function has no soft cap of the scores.
        let context = if self.fused && m.cap.scores.is_none() {
            self.fused_attention(&q, &k, &v, cache)
        } else {
            let weights = self.scores(&q, &k, cache).softmax(-1, None::<Kind>);
            self.weighted_values(&dropout(weights, self.dropout.weights), &v)
        };
        self.linear(&context.transpose(1, 2).reshape([b, n, (m.heads * m.head_width) as i64]), &a.o)
    }

    /// Applies the fused function to queries, keys and values [B, H, N, d].
    fn fused_attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, cache: &AttentionCache) -> Tensor {
        let m = &self.model;
        let (p, mask) = (self.dropout.weights, cache.visible.as_ref());
        let (causal, grouped) = (m.causal && mask.is_none(), m.heads > m.key_value_heads);
        Tensor::scaled_dot_product_attention(q, k, v, mask, p, causal, m.scale.scores, grouped)
    }

    /// Repeats key or value heads: each serves a group of query heads.
    fn repeat_heads(&self, x: &Tensor) -> Tensor {
        let groups = (self.model.heads / self.model.key_value_heads) as i64;
        if groups > 1 { x.repeat_interleave_self_int(groups, 1, None) } else { x.shallow_clone() }
    }

    /// Returns the masked attention scores [B, H, N, N] of queries and keys [B, H, N, d].
    fn scores(&self, q: &Tensor, k: &Tensor, cache: &AttentionCache) -> Tensor {
        let m = &self.model;
        let scores = q.matmul(&self.repeat_heads(k).transpose(-2, -1));
        let scores = match m.scale.scores {
            Some(factor) => scores * factor,
            None => scores / (m.head_width as f64).sqrt(),
        };
        let scores = soft_cap(scores, m.cap.scores);
        if let Some(visible) = &cache.visible {
            scores.masked_fill(&visible.logical_not(), f64::NEG_INFINITY)
        } else if m.causal {
            let n = scores.size()[3];
            let future = Tensor::ones([n, n], (Kind::Bool, q.device())).triu(1);
            scores.masked_fill(&future, f64::NEG_INFINITY)
        } else {
            scores
        }
    }

    /// Returns the values [B, H, N, d], weighted by [B, H, N, N].
    fn weighted_values(&self, weights: &Tensor, v: &Tensor) -> Tensor {
        weights.matmul(&self.repeat_heads(v))
    }

    fn activate(&self, x: &Tensor) -> Tensor {
        activate(x, self.model.activation)
    }

    /// Applies the feed-forward block: x [.., D] → [.., D].
    pub fn feed_forward(&self, x: &Tensor, f: &FeedForward<Tensor>) -> Tensor {
        let up = self.linear(x, &f.up);
        let hidden = match &f.gate {
            Some(gate) => self.activate(&self.linear(x, gate)) * up,
            None => self.activate(&up),
        };
        self.linear(&dropout(hidden, self.dropout.hidden), &f.down)
    }

    /// Applies the layer of an index: x [B, N, D] → [B, N, D].
    pub fn layer(&self, x: &Tensor, l: &Layer<Tensor>, index: usize) -> Tensor {
        let dropouts = [self.dropout.attention(), self.dropout.residual];
        if self.model.norm_order.is_parallel() {
            let input = self.norm(x, &l.norm1);
            let attention = self.branch(self.attention(&input, &l.attention, index), None, dropouts[0]);
            let input = l.norm2.as_ref().map_or(input, |norm| self.norm(x, norm));
            return attention
                + self.branch(self.feed_forward(&input, &l.feed_forward), None, dropouts[1])
                + x;
        }
        let norm2 = l.norm2.as_ref().expect("two norms unless the blocks are parallel");
        let [output1, output2] = l.output_norms.as_ref().map_or([&l.norm1, norm2], |[a, b]| [a, b]);
        let attention = |x: &Tensor| self.attention(x, &l.attention, index);
        let x = self.residual(x, [&l.norm1, output1], dropouts[0], attention);
        self.residual(&x, [norm2, output2], dropouts[1], |x| self.feed_forward(x, &l.feed_forward))
    }

    /// Completes the result of a block for the residual addition.
    fn branch(&self, y: Tensor, norm: Option<&Norm<Tensor>>, p: f64) -> Tensor {
        let y = norm.map_or_else(|| y.shallow_clone(), |norm| self.norm(&y, norm));
        scale(dropout(y, p), self.model.scale.residual)
    }

    /// Adds the result of a block to the residual stream, with norms where the model has them. `norms` are that of
    /// the input or of the sum, and that of the output.
    fn residual(
        &self,
        x: &Tensor,
        [norm, output_norm]: [&Norm<Tensor>; 2],
        p: f64,
        block: impl FnOnce(&Tensor) -> Tensor,
    ) -> Tensor {
        let order = self.model.norm_order;
        let y = if order.norms_inputs() { block(&self.norm(x, norm)) } else { block(x) };
        let sum = x + self.branch(y, order.norms_outputs().then_some(output_norm), p);
        if order == NormOrder::PostNorm { self.norm(&sum, norm) } else { sum }
    }

    fn head(&self, x: &Tensor, h: &IndicatorHead<Tensor>) -> Tensor {
        let hidden = self.linear(x, &h.hidden).relu();
        self.linear(&dropout(hidden, self.dropout.heads), &h.out).squeeze_dim(-1)
    }

    /// Returns the input of the first layer [B, N, D].
    pub fn embed(&self, inputs: &[Tensor], p: &Network<Tensor>) -> Tensor {
        let embedded = match &p.embedding {
            Embedding::Tokens(table, token_type) => {
                let rows = Tensor::embedding(table, &inputs[0], -1, false, false);
                token_type.as_ref().map_or(rows.shallow_clone(), |token_type| rows + token_type)
            }
            Embedding::Indicator { value, market } => {
                self.linear(&inputs[0].unsqueeze(-1), value) + self.linear(&inputs[1], market).unsqueeze(1)
            }
        };
        let embedded = scale(embedded, self.model.scale.embedding);
        let mut x = p.position.as_ref().map_or(embedded.shallow_clone(), |position| embedded + position);
        if let Some(norm) = &p.embedding_norm {
            x = self.norm(&x, norm);
        }
        dropout(x, self.dropout.embedding)
    }

    /// Returns the input of the output head, from the result of the last layer [B, N, D].
    pub fn finish_layers(&self, x: &Tensor, p: &Network<Tensor>) -> Tensor {
        let x = p.final_norm.as_ref().map_or(x.shallow_clone(), |norm| self.norm(x, norm));
        scale(x, self.model.scale.hidden)
    }

    /// Returns the input of the output head [B, N, D].
    pub fn hidden(&self, inputs: &[Tensor], p: &Network<Tensor>) -> Tensor {
        let layers = p.blocks.iter().enumerate();
        let x = layers.fold(self.embed(inputs, p), |x, (index, layer)| self.layer(&x, layer, index));
        self.finish_layers(&x, p)
    }

    /// Returns the outputs of the model, in the order of [`Model::output_names`].
    pub fn model(&self, inputs: &[Tensor], p: &Network<Tensor>) -> Vec<Tensor> {
        self.outputs(&self.hidden(inputs, p), p)
    }

    /// Applies the output head: x [.., D] → the outputs of the model.
    pub fn outputs(&self, x: &Tensor, p: &Network<Tensor>) -> Vec<Tensor> {
        let logits = match &p.output {
            OutputHead::IndicatorHeads([selection, allocation]) => {
                return vec![self.head(x, selection), self.head(x, allocation).softmax(-1, None::<Kind>)];
            }
            OutputHead::MlmHead { dense, norm, bias } => {
                let hidden = self.norm(&self.activate(&self.linear(x, dense)), norm);
                hidden.linear(p.token_table(), Some(bias))
            }
            OutputHead::Untied(output) => self.linear(x, output),
            OutputHead::Tied => x.linear(p.token_table(), None::<&Tensor>),
        };
        vec![soft_cap(scale(logits, self.model.scale.logits), self.model.cap.logits)]
    }
}

fn activate(x: &Tensor, kind: Activation) -> Tensor {
    match kind {
        Activation::Gelu => x.gelu("none"),
        Activation::GeluTanh => x.gelu("tanh"),
        Activation::Silu => x.silu(),
        Activation::Relu => x.relu(),
        Activation::ReluSquared => x.relu().square(),
    }
}

fn dropout(x: Tensor, p: f64) -> Tensor {
    if p > 0.0 { x.dropout(p, true) } else { x }
}

/// Returns the loss in f32.
pub fn loss(model: &Model, outputs: &[Tensor], inputs: &[Tensor]) -> Tensor {
    match model.output {
        // Cross-entropy of logits [B, T, V] and targets [B, T].
        Output::Tied | Output::Untied | Output::MlmHead => {
            cross_entropy(&outputs[0].flatten(0, 1), &inputs[1].flatten(0, 1))
        }
        Output::IndicatorHeads => indicator_loss(&outputs[0], &outputs[1], &inputs[2]),
    }
}

/// Returns the mean cross-entropy of logits [N, V] and targets [N] in f32.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Tensor {
    logits.log_softmax(-1, Kind::Float).nll_loss(targets)
}

/// Returns BCE with logits + 0.5·MSE(weights, t) + 0.1·mean(σ(selection)), with t = u·σ(selection) divided by its
/// row sum + 1e-8. The gradient flows through t.
fn indicator_loss(selection: &Tensor, weights: &Tensor, usefulness: &Tensor) -> Tensor {
    let selection = selection.to_kind(Kind::Float);
    let probability = selection.sigmoid();
    let raw = usefulness * &probability;
    let target = &raw / (raw.sum_dim_intlist(-1, true, None::<Kind>) + 1e-8);
    let none = None::<&Tensor>;
    let bce = selection.binary_cross_entropy_with_logits(usefulness, none, none, Reduction::Mean);
    let mse = weights.to_kind(Kind::Float).mse_loss(&target, Reduction::Mean);
    bce + mse * 0.5 + probability.mean(None::<Kind>) * 0.1
}
