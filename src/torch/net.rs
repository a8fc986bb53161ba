//! The models in tch. B batch, N (T) tokens, D width, H heads, F hidden, V vocabulary.

use tch::{Kind, Reduction, Tensor};
use transformer_bench::case::{Family, Sizes};
use transformer_bench::model::{
    Attention, Block, FeedForward, Gpt2, Head, Indicator, Linear, NORM_EPS, Norm,
};

use crate::extension;

/// How the layers are written.
#[derive(Debug)]
pub struct Layers {
    /// One q-k-v projection and scaled_dot_product_attention.
    pub fused: bool,
    /// Parameter gradients on a second stream; a 1 for each token of the batch.
    pub side: Option<Tensor>,
    pub dropout: f64,
    pub train: bool,
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
        match &self.side {
            Some(ones) => {
                extension::side_norm(x, &layer.weight, &layer.bias, ones, NORM_EPS).expect("a layer norm")
            }
            None => x.layer_norm(layer.weight.size(), Some(&layer.weight), Some(&layer.bias), NORM_EPS, true),
        }
    }

    fn drop(&self, x: Tensor) -> Tensor {
        if self.train && self.dropout > 0.0 { x.dropout(self.dropout, true) } else { x }
    }

    /// x [B, N, D] → [B, N, D]
    pub fn attention(&self, x: &Tensor, a: &Attention<Tensor>, heads: usize, causal: bool) -> Tensor {
        let (b, n, d) = x.size3().expect("x is [B, N, D]");
        let (heads, each) = (heads as i64, d / heads as i64);
        let split = |y: Tensor| y.view([b, n, heads, each]).transpose(1, 2);
        let mixed = if self.fused {
            // q holds the packed [3·D, D] projection.
            let parts = self.linear(x, &a.q).split(d, -1);
            let [q, k, v] = &parts[..] else { panic!("the packed projection has three parts") };
            let p = if self.train { self.dropout } else { 0.0 };
            Tensor::scaled_dot_product_attention(
                &split(q.shallow_clone()),
                &split(k.shallow_clone()),
                &split(v.shallow_clone()),
                None::<Tensor>,
                p,
                causal,
                None,
                false,
            )
        } else {
            let q = split(self.linear(x, &a.q));
            let k = split(self.linear(x, &a.k));
            let v = split(self.linear(x, &a.v));
            let mut scores = q.matmul(&k.transpose(-2, -1)) / (each as f64).sqrt(); // [B, H, N, N]
            if causal {
                let future = Tensor::ones([n, n], (Kind::Bool, x.device())).triu(1);
                scores = scores.masked_fill(&future, f64::NEG_INFINITY);
            }
            self.drop(scores.softmax(-1, None::<Kind>)).matmul(&v)
        };
        self.linear(&mixed.transpose(1, 2).reshape([b, n, d]), &a.o)
    }

    /// x [.., D] → [.., D]
    pub fn feed_forward(&self, x: &Tensor, f: &FeedForward<Tensor>, tanh: bool) -> Tensor {
        let hidden = self.linear(x, &f.up).gelu(if tanh { "tanh" } else { "none" });
        self.linear(&self.drop(hidden), &f.down)
    }

    fn block(&self, x: Tensor, b: &Block<Tensor>, heads: usize, family: Family) -> Tensor {
        match family {
            Family::Indicator => {
                let attended = self.drop(self.attention(&x, &b.attention, heads, false));
                let x = self.norm(&(x + attended), &b.norm1);
                let fed = self.drop(self.feed_forward(&x, &b.feed_forward, false));
                self.norm(&(x + fed), &b.norm2)
            }
            Family::Gpt2 => {
                let attended = self.attention(&self.norm(&x, &b.norm1), &b.attention, heads, true);
                let x = x + self.drop(attended);
                let fed = self.feed_forward(&self.norm(&x, &b.norm2), &b.feed_forward, true);
                x + self.drop(fed)
            }
        }
    }

    fn head(&self, x: &Tensor, h: &Head<Tensor>) -> Tensor {
        self.linear(&self.drop(self.linear(x, &h.hidden).relu()), &h.out).squeeze_dim(-1)
    }

    /// values [B, N], market [B, 10] → selection logits and weights, both [B, N]
    pub fn indicator(
        &self,
        values: &Tensor,
        market: &Tensor,
        p: &Indicator<Tensor>,
        s: &Sizes,
    ) -> [Tensor; 2] {
        let tokens = self.linear(&values.unsqueeze(-1), &p.value); // [B, N, D]
        let mut x = tokens + self.linear(market, &p.market).unsqueeze(1) + &p.position;
        for block in &p.blocks {
            x = self.block(x, block, s.heads, Family::Indicator);
        }
        let x = self.norm(&x, &p.norm);
        [self.head(&x, &p.selection), self.head(&x, &p.allocation).softmax(-1, None::<Kind>)]
    }

    /// tokens [B, T] → what the tied embedding turns into logits [B, T, D]
    fn gpt2_hidden(&self, tokens: &Tensor, p: &Gpt2<Tensor>, s: &Sizes) -> Tensor {
        let mut x = Tensor::embedding(&p.token, tokens, -1, false, false) + &p.position; // [B, T, D]
        for block in &p.blocks {
            x = self.block(x, block, s.heads, Family::Gpt2);
        }
        self.norm(&x, &p.norm)
    }

    /// tokens [B, T] → logits [B, T, V]
    pub fn gpt2(&self, tokens: &Tensor, p: &Gpt2<Tensor>, s: &Sizes) -> Tensor {
        self.gpt2_hidden(tokens, p, s).linear(&p.token, None::<&Tensor>)
    }

    /// The same with its loss: tokens and next [B, T] → cross-entropy, logits never kept
    pub fn gpt2_with_loss(&self, tokens: &Tensor, next: &Tensor, p: &Gpt2<Tensor>, s: &Sizes) -> Tensor {
        let hidden = self.gpt2_hidden(tokens, p, s).flatten(0, 1);
        extension::linear_cross_entropy(&hidden, &p.token, &next.flatten(0, 1)).expect("a loss")
    }
}

/// BCE with logits + 0.5·MSE(weights, t) + 0.1·mean(σ(selection)), in f32; gradient
/// flows through t = u·σ(selection) over its row sum + 1e-8.
pub fn indicator_loss([selection, weights]: &[Tensor; 2], usefulness: &Tensor) -> Tensor {
    let selection = selection.to_kind(Kind::Float);
    let probability = selection.sigmoid();
    let raw = usefulness * &probability;
    let target = &raw / (raw.sum_dim_intlist(-1, true, None::<Kind>) + 1e-8);
    let bce = selection.binary_cross_entropy_with_logits(
        usefulness,
        None::<&Tensor>,
        None::<&Tensor>,
        Reduction::Mean,
    );
    let mse = weights.to_kind(Kind::Float).mse_loss(&target, Reduction::Mean);
    bce + mse * 0.5 + probability.mean(None::<Kind>) * 0.1
}

/// Next-token cross-entropy in f32: logits [B, T, V], next [B, T]
pub fn gpt2_loss(logits: &Tensor, next: &Tensor) -> Tensor {
    logits.flatten(0, 1).log_softmax(-1, Kind::Float).nll_loss(&next.flatten(0, 1))
}
