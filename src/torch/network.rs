//! The network in tch. B batch, N (T) tokens, D width, H heads, F hidden, V vocabulary.

use tch::{Device, Kind, Reduction, Tensor};
use transformer_bench::model::parameters::{
    Attention, Block, Embedding, FeedForward, Head, Linear, Network, Norm, OutputHead,
};
use transformer_bench::model::{Activation, Dropout, Model, ModelId, NormKind, NormOrder, Output, Position};

/// How the layers are written.
#[derive(Debug)]
pub struct Layers {
    pub model: ModelId,
    /// One q-k-v projection and scaled_dot_product_attention.
    pub fused: bool,
    /// Cosines and sines of a rotary position, [N, d/2], made once as training scripts do.
    pub turns: Option<[Tensor; 2]>,
    /// None outside training.
    pub dropout: Dropout,
}

/// The cosines and sines by which queries and keys are turned; computed in f32, as every training
/// script does, and kept in the type of what they turn.
pub fn turns(m: &Model, device: Device, kind: Kind) -> Option<[Tensor; 2]> {
    let Position::Rotary { theta: base } = m.position else { return None };
    let float = (Kind::Float, device);
    let place = Tensor::arange(m.tokens as i64, float).unsqueeze(1);
    let power = Tensor::arange_start_step(0, m.head_width as i64, 2, float) / m.head_width as f64;
    let angle = place / Tensor::from(base as f32).to_device(device).pow(&power).unsqueeze(0);
    Some([angle.cos().to_kind(kind), angle.sin().to_kind(kind)])
}

impl Layers {
    fn linear(&self, x: &Tensor, layer: &Linear<Tensor>) -> Tensor {
        x.linear(&layer.weight, layer.bias.as_ref())
    }

    fn norm(&self, x: &Tensor, layer: &Norm<Tensor>) -> Tensor {
        self.norm_of(x, layer, self.model.norm)
    }

    fn norm_of(&self, x: &Tensor, layer: &Norm<Tensor>, kind: NormKind) -> Tensor {
        let last = &x.size()[x.dim() - 1..];
        let (weight, bias) = (layer.weight.as_ref(), layer.bias.as_ref());
        match kind {
            NormKind::Layer { eps } => x.layer_norm(last, weight, bias, eps, true),
            NormKind::Rms { eps, .. } => x.rms_norm(last, weight, eps),
        }
    }

    /// Queries or keys [B, H, N, d], normalised and turned where the model has that.
    fn placed(&self, x: Tensor, norm: Option<&Norm<Tensor>>) -> Tensor {
        let x = match (norm, self.model.qk_norm) {
            (Some(norm), Some(kind)) => self.norm_of(&x, norm, kind),
            _ => x,
        };
        let Some([cos, sin]) = &self.turns else { return x };
        let halves = x.chunk(2, -1);
        let [left, right] = &halves[..] else { panic!("a head has two halves") };
        Tensor::cat(&[left * cos - right * sin, right * cos + left * sin], -1)
    }

    /// x [B, N, D] → [B, N, D]
    pub fn attention(&self, x: &Tensor, a: &Attention<Tensor>) -> Tensor {
        let m = &self.model;
        let (b, n, _) = x.size3().expect("x is [B, N, D]");
        let (heads, shared, each) = (m.heads as i64, m.key_value_heads as i64, m.head_width as i64);
        let qkv = if self.fused {
            // q holds the packed projection of all three.
            self.linear(x, &a.q).split_with_sizes([heads * each, shared * each, shared * each], -1)
        } else {
            [&a.q, &a.k, &a.v].map(|layer| self.linear(x, layer)).into()
        };
        let split = |i: usize, heads: i64| qkv[i].view([b, n, heads, each]).transpose(1, 2);
        let norms = a.norms.as_ref();
        let q = self.placed(split(0, heads), norms.map(|all| &all[0])); // [B, H, N, d]
        let k = self.placed(split(1, shared), norms.map(|all| &all[1]));
        let v = split(2, shared);
        let mixed = if self.fused {
            let (p, grouped) = (self.dropout.weights, shared < heads);
            Tensor::scaled_dot_product_attention(&q, &k, &v, None::<Tensor>, p, m.causal, None, grouped)
        } else {
            let every = |x: Tensor| {
                if shared < heads { x.repeat_interleave_self_int(heads / shared, 1, None) } else { x }
            };
            let (k, v) = (every(k), every(v));
            let mut scores = q.matmul(&k.transpose(-2, -1)) / (each as f64).sqrt(); // [B, H, N, N]
            if m.causal {
                let future = Tensor::ones([n, n], (Kind::Bool, x.device())).triu(1);
                scores = scores.masked_fill(&future, f64::NEG_INFINITY);
            }
            drop(scores.softmax(-1, None::<Kind>), self.dropout.weights).matmul(&v)
        };
        self.linear(&mixed.transpose(1, 2).reshape([b, n, heads * each]), &a.o)
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

    /// x [.., D] → [.., D]
    pub fn feed_forward(&self, x: &Tensor, f: &FeedForward<Tensor>) -> Tensor {
        let up = self.linear(x, &f.up);
        let hidden = match &f.gate {
            Some(gate) => self.activate(&self.linear(x, gate)) * up,
            None => self.activate(&up),
        };
        self.linear(&drop(hidden, self.dropout.hidden), &f.down)
    }

    fn block(&self, x: &Tensor, b: &Block<Tensor>) -> Tensor {
        let x = self.around(x, &b.norm1, |x| self.attention(x, &b.attention));
        self.around(&x, &b.norm2, |x| self.feed_forward(x, &b.feed_forward))
    }

    /// Adds a part's result to the residual stream, with the norm where the model has it.
    fn around(&self, x: &Tensor, norm: &Norm<Tensor>, part: impl FnOnce(&Tensor) -> Tensor) -> Tensor {
        match self.model.norm_order {
            NormOrder::PostNorm => self.norm(&(x + drop(part(x), self.dropout.residual)), norm),
            NormOrder::PreNorm => x + drop(part(&self.norm(x, norm)), self.dropout.residual),
        }
    }

    fn head(&self, x: &Tensor, h: &Head<Tensor>) -> Tensor {
        let hidden = self.linear(x, &h.hidden).relu();
        self.linear(&drop(hidden, self.dropout.heads), &h.out).squeeze_dim(-1)
    }

    /// What the model reads → [B, N, D], before its end
    fn hidden(&self, inputs: &[Tensor], p: &Network<Tensor>) -> Tensor {
        let embedded = match &p.embedding {
            Embedding::Tokens(table, own) => {
                let rows = Tensor::embedding(table, &inputs[0], -1, false, false);
                own.as_ref().map_or(rows.shallow_clone(), |own| rows + own)
            }
            Embedding::Indicator { value, market } => {
                self.linear(&inputs[0].unsqueeze(-1), value) + self.linear(&inputs[1], market).unsqueeze(1)
            }
        };
        let mut x = p.position.as_ref().map_or(embedded.shallow_clone(), |position| embedded + position);
        if let Some(norm) = &p.embedding_norm {
            x = self.norm(&x, norm);
        }
        x = drop(x, self.dropout.embedding);
        for block in &p.blocks {
            x = self.block(&x, block);
        }
        p.norm.as_ref().map_or(x.shallow_clone(), |norm| self.norm(&x, norm))
    }

    /// What the model reads → what it puts out, by [`Model::output_names`]
    pub fn model(&self, inputs: &[Tensor], p: &Network<Tensor>) -> Vec<Tensor> {
        let x = self.hidden(inputs, p);
        match &p.end {
            OutputHead::Heads([selection, allocation]) => {
                vec![self.head(&x, selection), self.head(&x, allocation).softmax(-1, None::<Kind>)]
            }
            OutputHead::Masked { dense, norm, bias } => {
                let hidden = self.norm(&self.activate(&self.linear(&x, dense)), norm);
                vec![hidden.linear(p.token_table(), Some(bias))]
            }
            OutputHead::Untied(table) => vec![x.linear(table, None::<&Tensor>)],
            OutputHead::Tied => vec![x.linear(p.token_table(), None::<&Tensor>)],
        }
    }
}

fn drop(x: Tensor, p: f64) -> Tensor {
    if p > 0.0 { x.dropout(p, true) } else { x }
}

/// The loss of what the model puts out, in f32.
pub fn loss(model: &Model, out: &[Tensor], inputs: &[Tensor]) -> Tensor {
    match model.output {
        // Next-token cross-entropy: logits [B, T, V], next [B, T].
        Output::Tied | Output::Untied | Output::MlmHead => {
            out[0].flatten(0, 1).log_softmax(-1, Kind::Float).nll_loss(&inputs[1].flatten(0, 1))
        }
        Output::IndicatorHeads => indicator_loss(&out[0], &out[1], &inputs[2]),
    }
}

/// BCE with logits + 0.5·MSE(weights, t) + 0.1·mean(σ(selection)); gradient flows through
/// t = u·σ(selection) over its row sum + 1e-8.
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
