//! The network in MLX. B batch, N (T) tokens, D width, H heads, F hidden, V vocabulary.

use half::{bf16, f16};
use mlx_rs::error::Result;
use mlx_rs::ops::indexing::{take_along_axis, take_axis};
use mlx_rs::random::{RandomState, bernoulli};
use mlx_rs::{Array, Dtype, fast, ops};
use transformer_bench::model::parameters::{
    Attention, Block, Embedding, FeedForward, Head, Linear, Network, Norm, OutputHead,
};
use transformer_bench::model::{Activation, Dropout, Model, ModelId, NormKind, NormOrder, Output, Position};

/// A scalar of a type. MLX promotes bf16 × f32 to f32, so constants must match.
pub fn scalar(value: f64, dtype: Dtype) -> Array {
    match dtype {
        Dtype::Bfloat16 => Array::from_slice(&[bf16::from_f64(value)], &[]),
        Dtype::Float16 => Array::from_slice(&[f16::from_f64(value)], &[]),
        _ => Array::from_f32(value as f32),
    }
}

fn times(x: &Array, factor: f64) -> Result<Array> {
    x.multiply(scalar(factor, x.dtype()))
}

/// How the layers are written, and the random state that dropout draws from.
pub struct Layers {
    pub model: ModelId,
    /// Fused attention, where the weights need no dropout: MLX's has none.
    pub fused: bool,
    /// None outside training.
    pub dropout: Dropout,
    pub random: RandomState,
}

fn linear(x: &Array, layer: &Linear<Array>) -> Result<Array> {
    match &layer.bias {
        Some(bias) => ops::addmm(bias, x, layer.weight.transpose()?, None, None),
        None => x.matmul(layer.weight.transpose()?),
    }
}

fn activate(x: &Array, kind: Activation) -> Result<Array> {
    let one = scalar(1.0, x.dtype());
    let positive = || ops::maximum(x, scalar(0.0, x.dtype()));
    let gate = match kind {
        Activation::Silu => return x.multiply(ops::sigmoid(x)?),
        Activation::Relu => return positive(),
        Activation::ReluSquared => return positive()?.square(),
        Activation::GeluTanh => {
            let cube = x.multiply(x)?.multiply(x)?;
            let inner = x.add(times(&cube, 0.044715)?)?;
            ops::tanh(times(&inner, (2.0 / std::f64::consts::PI).sqrt())?)?
        }
        Activation::Gelu => ops::erf(times(x, std::f64::consts::FRAC_1_SQRT_2)?)?,
    };
    times(x, 0.5)?.multiply(one.add(gate)?)
}

fn softmax(x: &Array) -> Result<Array> {
    // `precise` accumulates in f32; in f32 it changes nothing.
    ops::softmax_axis(x, -1, true)
}

fn norm_of(x: &Array, layer: &Norm<Array>, kind: NormKind) -> Result<Array> {
    match kind {
        NormKind::Layer { eps } => {
            fast::layer_norm(x, layer.weight.as_ref(), layer.bias.as_ref(), eps as f32)
        }
        NormKind::Rms { eps, .. } => fast::rms_norm(x, layer.weight.as_ref(), eps as f32),
    }
}

impl Layers {
    fn norm(&self, x: &Array, layer: &Norm<Array>) -> Result<Array> {
        norm_of(x, layer, self.model.norm)
    }

    /// Queries or keys [B, H, N, d], normalised and turned where the model has that.
    fn placed(&self, x: Array, norm: Option<&Norm<Array>>) -> Result<Array> {
        let x = match (norm, self.model.qk_norm) {
            (Some(norm), Some(kind)) => norm_of(&x, norm, kind)?,
            _ => x,
        };
        match self.model.position {
            Position::Rotary { theta: base } => {
                fast::rope(x, self.model.head_width as i32, false, base as f32, 1.0, 0, None::<&Array>)
            }
            Position::Learned | Position::None => Ok(x),
        }
    }

    fn drop(&mut self, x: Array, p: f64) -> Result<Array> {
        if p == 0.0 {
            return Ok(x);
        }
        let keep = 1.0 - p;
        let key = self.random.next_key()?;
        let mask = bernoulli(&Array::from_f32(keep as f32), x.shape(), &key)?;
        times(&x.multiply(mask)?, 1.0 / keep)
    }

    /// x [B, N, D] → [B, N, D]
    pub fn attention(&mut self, x: &Array, a: &Attention<Array>) -> Result<Array> {
        let m = self.model;
        let &[b, n, _] = x.shape() else { unreachable!("x is [B, N, D]") };
        let (heads, shared, each) = (m.heads as i32, m.key_value_heads as i32, m.head_width as i32);
        let split = |y: Array, heads: i32| y.reshape(&[b, n, heads, each])?.transpose_axes(&[0, 2, 1, 3]);
        let norms = a.norms.as_ref();
        let q = self.placed(split(linear(x, &a.q)?, heads)?, norms.map(|all| &all[0]))?; // [B, H, N, d]
        let k = self.placed(split(linear(x, &a.k)?, shared)?, norms.map(|all| &all[1]))?;
        let v = split(linear(x, &a.v)?, shared)?;
        let scale = 1.0 / f64::from(each).sqrt();
        let mixed = if self.fused && self.dropout.weights == 0.0 {
            let mask = m.causal.then_some(fast::ScaledDotProductAttentionMask::Causal);
            fast::scaled_dot_product_attention(&q, &k, &v, scale as f32, mask, None)?
        } else {
            // Each head of keys and values serves its group of queries' heads.
            let every = |x: Array| {
                if shared < heads { ops::repeat_axis::<f32>(x, heads / shared, 1) } else { Ok(x) }
            };
            let (k, v) = (every(k)?, every(v)?);
            let mut scores = times(&q, scale)?.matmul(k.transpose_axes(&[0, 1, 3, 2])?)?; // [B, H, N, N]
            if m.causal {
                scores = scores.add(causal_mask(n, x.dtype())?)?;
            }
            let weights = softmax(&scores)?;
            self.drop(weights, self.dropout.weights)?.matmul(v)?
        };
        linear(&mixed.transpose_axes(&[0, 2, 1, 3])?.reshape(&[b, n, heads * each])?, &a.o)
    }

    /// x [.., D] → [.., D]
    pub fn feed_forward(&mut self, x: &Array, f: &FeedForward<Array>) -> Result<Array> {
        let (kind, up) = (self.model.activation, linear(x, &f.up)?);
        let hidden = match &f.gate {
            Some(gate) => activate(&linear(x, gate)?, kind)?.multiply(up)?,
            None => activate(&up, kind)?,
        };
        linear(&self.drop(hidden, self.dropout.hidden)?, &f.down)
    }

    fn block(&mut self, x: &Array, b: &Block<Array>) -> Result<Array> {
        let x = self.around(x, &b.norm1, |layers, x| layers.attention(x, &b.attention))?;
        self.around(&x, &b.norm2, |layers, x| layers.feed_forward(x, &b.feed_forward))
    }

    /// Adds a part's result to the residual stream, with the norm where the model has it.
    fn around(
        &mut self,
        x: &Array,
        norm: &Norm<Array>,
        part: impl FnOnce(&mut Self, &Array) -> Result<Array>,
    ) -> Result<Array> {
        let before = self.model.norm_order == NormOrder::PreNorm;
        let y = if before { part(self, &self.norm(x, norm)?)? } else { part(self, x)? };
        let sum = x.add(self.drop(y, self.dropout.residual)?)?;
        if before { Ok(sum) } else { self.norm(&sum, norm) }
    }

    fn head(&mut self, x: &Array, h: &Head<Array>) -> Result<Array> {
        let hidden = linear(x, &h.hidden)?;
        let active = ops::maximum(&hidden, scalar(0.0, hidden.dtype()))?;
        linear(&self.drop(active, self.dropout.heads)?, &h.out)?.squeeze_axes(&[-1])
    }

    /// What the model reads → what it puts out, by [`Model::output_names`]
    pub fn model(&mut self, inputs: &[Array], p: &Network<Array>) -> Result<Vec<Array>> {
        let embedded = match &p.embedding {
            Embedding::Tokens(table, own) => {
                let rows = take_axis(table, &inputs[0], 0)?;
                own.as_ref().map_or(Ok(rows.clone()), |own| rows.add(own))?
            }
            Embedding::Indicator { value, market } => {
                let own = linear(&inputs[0].expand_dims_axes(&[-1])?, value)?;
                own.add(linear(&inputs[1], market)?.expand_dims_axes(&[1])?)?
            }
        };
        let mut x = p.position.as_ref().map_or(Ok(embedded.clone()), |position| embedded.add(position))?;
        if let Some(norm) = &p.embedding_norm {
            x = self.norm(&x, norm)?;
        }
        x = self.drop(x, self.dropout.embedding)?; // [B, N, D]
        for block in &p.blocks {
            x = self.block(&x, block)?;
        }
        if let Some(norm) = &p.norm {
            x = self.norm(&x, norm)?;
        }
        match &p.end {
            OutputHead::Heads([selection, allocation]) => {
                let selection = self.head(&x, selection)?;
                Ok(vec![selection, softmax(&self.head(&x, allocation)?)?])
            }
            OutputHead::Masked { dense, norm, bias } => {
                let hidden = activate(&linear(&x, dense)?, self.model.activation)?;
                let hidden = self.norm(&hidden, norm)?;
                Ok(vec![ops::addmm(bias, hidden, p.token_table().transpose()?, None, None)?])
            }
            OutputHead::Untied(table) => Ok(vec![x.matmul(table.transpose()?)?]),
            OutputHead::Tied => Ok(vec![x.matmul(p.token_table().transpose()?)?]),
        }
    }
}

/// 0 at and below the diagonal, far below any score above it: [N, N]
fn causal_mask(n: i32, dtype: Dtype) -> Result<Array> {
    let index = ops::arange::<f32, f32>(None, n as f32, None)?;
    let future = index.expand_dims_axes(&[1])?.lt(index.expand_dims_axes(&[0])?)?;
    // f16 ends at 65 504.
    future.as_dtype(dtype)?.multiply(scalar(-3e4, dtype))
}

/// The loss of what the model puts out, in f32.
pub fn loss(model: &Model, out: &[Array], inputs: &[Array]) -> Result<Array> {
    match model.output {
        Output::Tied | Output::Untied | Output::MlmHead => cross_entropy(&out[0], &inputs[1]),
        Output::IndicatorHeads => indicator_loss(&out[0], &out[1], &inputs[2]),
    }
}

/// BCE with logits + 0.5·MSE(weights, t) + 0.1·mean(σ(selection)); gradient flows through
/// t = u·σ(selection) over its row sum + 1e-8.
fn indicator_loss(selection: &Array, weights: &Array, usefulness: &Array) -> Result<Array> {
    let selection = selection.as_dtype(Dtype::Float32)?;
    let probability = ops::sigmoid(&selection)?;
    let raw = usefulness.multiply(&probability)?;
    let target = raw.divide(raw.sum_axis(-1, true)?.add(Array::from_f32(1e-8))?)?;
    let softplus = ops::logaddexp(Array::from_f32(0.0), &selection)?;
    let bce = softplus.subtract(selection.multiply(usefulness)?)?.mean(false)?;
    let mse = weights.as_dtype(Dtype::Float32)?.subtract(target)?.square()?.mean(false)?;
    bce.add(times(&mse, 0.5)?)?.add(times(&probability.mean(false)?, 0.1)?)
}

/// Next-token cross-entropy: logits [B, T, V], next [B, T]
fn cross_entropy(logits: &Array, next: &Array) -> Result<Array> {
    let logits = logits.as_dtype(Dtype::Float32)?;
    let chosen = take_along_axis(&logits, next.expand_dims_axes(&[-1])?, -1)?.squeeze_axes(&[-1])?;
    logits.logsumexp_axis(-1, false)?.subtract(chosen)?.mean(false)
}
