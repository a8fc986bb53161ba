//! The network in tch. B batch, N (T) tokens, D width, H heads, F hidden, V vocabulary.

use tch::{Kind, Reduction, Tensor};
use transformer_bench::model::parameters::{
    Attention, Block, Embedding, FeedForward, Head, Linear, Network, Norm,
};
use transformer_bench::model::{Activation, Dropout, Model, ModelId, NormKind, NormPlace, Output, Position};

use crate::extension;

/// How the layers are written.
#[derive(Debug)]
pub struct Layers {
    pub model: ModelId,
    /// One q-k-v projection and scaled_dot_product_attention.
    pub fused: bool,
    /// Parameter gradients on a second stream; a 1 for each token of the batch.
    pub side: Option<Tensor>,
    /// None outside training.
    pub dropout: Dropout,
}

impl Layers {
    fn linear(&self, x: &Tensor, layer: &Linear<Tensor>) -> Tensor {
        match &self.side {
            Some(ones) => {
                extension::side_linear(x, &layer.weight, &layer.bias, ones).expect("a linear layer")
            }
            None => x.linear(&layer.weight, Some(&layer.bias)),
        }
    }

    fn norm(&self, x: &Tensor, layer: &Norm<Tensor>) -> Tensor {
        let NormKind::Layer { eps } = self.model.norm;
        match &self.side {
            Some(ones) => {
                extension::side_norm(x, &layer.weight, &layer.bias, ones, eps).expect("a layer norm")
            }
            None => x.layer_norm(layer.weight.size(), Some(&layer.weight), Some(&layer.bias), eps, true),
        }
    }

    /// x [B, N, D] → [B, N, D]
    pub fn attention(&self, x: &Tensor, a: &Attention<Tensor>) -> Tensor {
        let m = &self.model;
        let (b, n, _) = x.size3().expect("x is [B, N, D]");
        let (heads, each) = (m.heads as i64, m.head_width as i64);
        let split = |y: &Tensor| y.view([b, n, heads, each]).transpose(1, 2);
        let mixed = if self.fused {
            // q holds the packed [3·D, D] projection.
            let parts = self.linear(x, &a.q).split(heads * each, -1);
            let [q, k, v] = &parts[..] else { panic!("the packed projection has three parts") };
            Tensor::scaled_dot_product_attention(
                &split(q),
                &split(k),
                &split(v),
                None::<Tensor>,
                self.dropout.weights,
                m.causal,
                None,
                false,
            )
        } else {
            let [q, k, v] = [&a.q, &a.k, &a.v].map(|layer| split(&self.linear(x, layer)));
            let mut scores = q.matmul(&k.transpose(-2, -1)) / (each as f64).sqrt(); // [B, H, N, N]
            if m.causal {
                let future = Tensor::ones([n, n], (Kind::Bool, x.device())).triu(1);
                scores = scores.masked_fill(&future, f64::NEG_INFINITY);
            }
            drop(scores.softmax(-1, None::<Kind>), self.dropout.weights).matmul(&v)
        };
        self.linear(&mixed.transpose(1, 2).reshape([b, n, heads * each]), &a.o)
    }

    /// x [.., D] → [.., D]
    pub fn feed_forward(&self, x: &Tensor, f: &FeedForward<Tensor>) -> Tensor {
        let hidden = self.linear(x, &f.up);
        let active = match self.model.activation {
            Activation::Gelu => hidden.gelu("none"),
            Activation::GeluTanh => hidden.gelu("tanh"),
        };
        self.linear(&drop(active, self.dropout.hidden), &f.down)
    }

    fn block(&self, x: &Tensor, b: &Block<Tensor>) -> Tensor {
        let x = self.around(x, &b.norm1, |x| self.attention(x, &b.attention));
        self.around(&x, &b.norm2, |x| self.feed_forward(x, &b.feed_forward))
    }

    /// Adds a part's result to the residual stream, with the norm where the model has it.
    fn around(&self, x: &Tensor, norm: &Norm<Tensor>, part: impl FnOnce(&Tensor) -> Tensor) -> Tensor {
        match self.model.norm_place {
            NormPlace::After => self.norm(&(x + drop(part(x), self.dropout.residual)), norm),
            NormPlace::Before => x + drop(part(&self.norm(x, norm)), self.dropout.residual),
        }
    }

    fn head(&self, x: &Tensor, h: &Head<Tensor>) -> Tensor {
        let hidden = self.linear(x, &h.hidden).relu();
        self.linear(&drop(hidden, self.dropout.heads), &h.out).squeeze_dim(-1)
    }

    /// What the model reads → [B, N, D], normalised
    fn hidden(&self, inputs: &[Tensor], p: &Network<Tensor>) -> Tensor {
        let embedded = match &p.embedding {
            Embedding::Tokens(table) => Tensor::embedding(table, &inputs[0], -1, false, false),
            Embedding::Indicator { value, market } => {
                self.linear(&inputs[0].unsqueeze(-1), value) + self.linear(&inputs[1], market).unsqueeze(1)
            }
        };
        let Position::Learned = self.model.position;
        let mut x = embedded + &p.position;
        for block in &p.blocks {
            x = self.block(&x, block);
        }
        self.norm(&x, &p.norm)
    }

    /// What the model reads → what it puts out, by [`Model::output_names`]
    pub fn model(&self, inputs: &[Tensor], p: &Network<Tensor>) -> Vec<Tensor> {
        let x = self.hidden(inputs, p);
        match (self.model.output, &p.heads) {
            (Output::IndicatorHeads, Some([selection, allocation])) => {
                vec![self.head(&x, selection), self.head(&x, allocation).softmax(-1, None::<Kind>)]
            }
            _ => vec![x.linear(p.token_table(), None::<&Tensor>)],
        }
    }

    /// The model with its loss where one call makes both, so that logits are never kept; None
    /// of other outputs.
    pub fn model_with_loss(&self, inputs: &[Tensor], p: &Network<Tensor>) -> Option<Tensor> {
        (self.model.output == Output::Tied).then(|| {
            let hidden = self.hidden(inputs, p).flatten(0, 1);
            extension::linear_cross_entropy(&hidden, p.token_table(), &inputs[1].flatten(0, 1))
                .expect("a loss")
        })
    }
}

fn drop(x: Tensor, p: f64) -> Tensor {
    if p > 0.0 { x.dropout(p, true) } else { x }
}

/// The loss of what the model puts out, in f32.
pub fn loss(model: &Model, out: &[Tensor], inputs: &[Tensor]) -> Tensor {
    match model.output {
        // Next-token cross-entropy: logits [B, T, V], next [B, T].
        Output::Tied => out[0].flatten(0, 1).log_softmax(-1, Kind::Float).nll_loss(&inputs[1].flatten(0, 1)),
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
