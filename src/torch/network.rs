//! The network in tch. Dimensions: B batch, N (T) tokens, D width, H heads, F feed-forward width, V vocabulary.

use tch::{Device, Kind, Reduction, Tensor};
use transformer_bench::model::parameters::{
    Attention, Embedding, FeedForward, IndicatorHead, Layer, Linear, Network, Norm, OutputHead,
};
use transformer_bench::model::{Activation, Dropout, Model, ModelId, NormKind, NormOrder, Output, Position};

/// Configuration of the layers.
#[derive(Debug)]
pub struct Layers {
    pub model: ModelId,
    /// True for one q-k-v projection and `scaled_dot_product_attention`.
    pub fused: bool,
    /// See [`rope_cache`].
    pub rope_cache: Option<[Tensor; 2]>,
    /// Dropout probabilities, which are 0 outside training.
    pub dropout: Dropout,
}

/// Returns the cosines and sines [N, d/2] of the rotary embedding. They are computed in f32 and stored in the type of
/// the queries and keys, once per model as in training scripts. Returns `None` if the model has no rotary embedding.
pub fn rope_cache(m: &Model, device: Device, kind: Kind) -> Option<[Tensor; 2]> {
    let Position::Rotary { theta } = m.position else { return None };
    let float = (Kind::Float, device);
    let token = Tensor::arange(m.tokens as i64, float).unsqueeze(1);
    let power = Tensor::arange_start_step(0, m.head_width as i64, 2, float) / m.head_width as f64;
    let angle = token / Tensor::from(theta as f32).to_device(device).pow(&power).unsqueeze(0);
    Some([angle.cos().to_kind(kind), angle.sin().to_kind(kind)])
}

impl Layers {
    fn linear(&self, x: &Tensor, layer: &Linear<Tensor>) -> Tensor {
        x.linear(&layer.weight, layer.bias.as_ref())
    }

    fn norm(&self, x: &Tensor, layer: &Norm<Tensor>) -> Tensor {
        self.norm_of_kind(x, layer, self.model.norm)
    }

    fn norm_of_kind(&self, x: &Tensor, layer: &Norm<Tensor>, kind: NormKind) -> Tensor {
        let last = &x.size()[x.dim() - 1..];
        let (weight, bias) = (layer.weight.as_ref(), layer.bias.as_ref());
        match kind {
            NormKind::Layer { eps } => x.layer_norm(last, weight, bias, eps, true),
            NormKind::Rms { eps, .. } => x.rms_norm(last, weight, eps),
        }
    }

    /// Applies the query-key norm and the rotary embedding, if the model has them, to queries or keys [B, H, N, d].
    fn norm_and_rope(&self, x: Tensor, norm: Option<&Norm<Tensor>>) -> Tensor {
        let x = match (norm, self.model.qk_norm) {
            (Some(norm), Some(kind)) => self.norm_of_kind(&x, norm, kind),
            _ => x,
        };
        let Some([cos, sin]) = &self.rope_cache else { return x };
        let halves = x.chunk(2, -1);
        let [left, right] = &halves[..] else { panic!("chunk(2) returns two tensors") };
        Tensor::cat(&[left * cos - right * sin, right * cos + left * sin], -1)
    }

    /// Applies attention: x [B, N, D] → [B, N, D].
    pub fn attention(&self, x: &Tensor, a: &Attention<Tensor>) -> Tensor {
        let m = &self.model;
        let (b, n, _) = x.size3().expect("x is [B, N, D]");
        let (heads, key_value_heads, width) = (m.heads as i64, m.key_value_heads as i64, m.head_width as i64);
        let qkv = if self.fused {
            // `q` is the packed projection of queries, keys and values.
            let widths = [heads * width, key_value_heads * width, key_value_heads * width];
            self.linear(x, &a.q).split_with_sizes(widths, -1)
        } else {
            [&a.q, &a.k, &a.v].map(|layer| self.linear(x, layer)).into()
        };
        let split_heads = |i: usize, heads: i64| qkv[i].view([b, n, heads, width]).transpose(1, 2);
        let norms = a.qk_norms.as_ref();
        let q = self.norm_and_rope(split_heads(0, heads), norms.map(|all| &all[0])); // [B, H, N, d]
        let k = self.norm_and_rope(split_heads(1, key_value_heads), norms.map(|all| &all[1]));
        let v = split_heads(2, key_value_heads);
        let grouped = key_value_heads < heads;
        let context = if self.fused {
            let p = self.dropout.weights;
            Tensor::scaled_dot_product_attention(&q, &k, &v, None::<Tensor>, p, m.causal, None, grouped)
        } else {
            // Each key-value head serves a group of query heads.
            let repeat = |x: Tensor| {
                if grouped { x.repeat_interleave_self_int(heads / key_value_heads, 1, None) } else { x }
            };
            let (k, v) = (repeat(k), repeat(v));
            let mut scores = q.matmul(&k.transpose(-2, -1)) / (width as f64).sqrt(); // [B, H, N, N]
            if m.causal {
                let future = Tensor::ones([n, n], (Kind::Bool, x.device())).triu(1);
                scores = scores.masked_fill(&future, f64::NEG_INFINITY);
            }
            dropout(scores.softmax(-1, None::<Kind>), self.dropout.weights).matmul(&v)
        };
        self.linear(&context.transpose(1, 2).reshape([b, n, heads * width]), &a.o)
    }

    fn activate(&self, x: &Tensor) -> Tensor {
        match self.model.activation {
            Activation::Gelu => x.gelu("none"),
            Activation::GeluTanh => x.gelu("tanh"),
            Activation::Silu => x.silu(),
            Activation::Relu => x.relu(),
            Activation::ReluSquared => x.relu().square(),
        }
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

    fn layer(&self, x: &Tensor, layer: &Layer<Tensor>) -> Tensor {
        let x = self.residual(x, &layer.norm1, |x| self.attention(x, &layer.attention));
        self.residual(&x, &layer.norm2, |x| self.feed_forward(x, &layer.feed_forward))
    }

    /// Adds the result of a block to the residual stream, with the norm before or after it.
    fn residual(&self, x: &Tensor, norm: &Norm<Tensor>, block: impl FnOnce(&Tensor) -> Tensor) -> Tensor {
        match self.model.norm_order {
            NormOrder::PostNorm => self.norm(&(x + dropout(block(x), self.dropout.residual)), norm),
            NormOrder::PreNorm => x + dropout(block(&self.norm(x, norm)), self.dropout.residual),
        }
    }

    fn head(&self, x: &Tensor, h: &IndicatorHead<Tensor>) -> Tensor {
        let hidden = self.linear(x, &h.hidden).relu();
        self.linear(&dropout(hidden, self.dropout.heads), &h.out).squeeze_dim(-1)
    }

    /// Returns the hidden states [B, N, D] before the output head.
    fn hidden(&self, inputs: &[Tensor], p: &Network<Tensor>) -> Tensor {
        let embedded = match &p.embedding {
            Embedding::Tokens(table, token_type) => {
                let rows = Tensor::embedding(table, &inputs[0], -1, false, false);
                token_type.as_ref().map_or(rows.shallow_clone(), |token_type| rows + token_type)
            }
            Embedding::Indicator { value, market } => {
                self.linear(&inputs[0].unsqueeze(-1), value) + self.linear(&inputs[1], market).unsqueeze(1)
            }
        };
        let mut x = p.position.as_ref().map_or(embedded.shallow_clone(), |position| embedded + position);
        if let Some(norm) = &p.embedding_norm {
            x = self.norm(&x, norm);
        }
        x = dropout(x, self.dropout.embedding);
        for layer in &p.blocks {
            x = self.layer(&x, layer);
        }
        p.final_norm.as_ref().map_or(x.shallow_clone(), |norm| self.norm(&x, norm))
    }

    /// Returns the outputs of the model, in the order of [`Model::output_names`].
    pub fn model(&self, inputs: &[Tensor], p: &Network<Tensor>) -> Vec<Tensor> {
        let x = self.hidden(inputs, p);
        match &p.output {
            OutputHead::IndicatorHeads([selection, allocation]) => {
                vec![self.head(&x, selection), self.head(&x, allocation).softmax(-1, None::<Kind>)]
            }
            OutputHead::MlmHead { dense, norm, bias } => {
                let hidden = self.norm(&self.activate(&self.linear(&x, dense)), norm);
                vec![hidden.linear(p.token_table(), Some(bias))]
            }
            OutputHead::Untied(table) => vec![x.linear(table, None::<&Tensor>)],
            OutputHead::Tied => vec![x.linear(p.token_table(), None::<&Tensor>)],
        }
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
            outputs[0].flatten(0, 1).log_softmax(-1, Kind::Float).nll_loss(&inputs[1].flatten(0, 1))
        }
        Output::IndicatorHeads => indicator_loss(&outputs[0], &outputs[1], &inputs[2]),
    }
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
