//! The models in MLX. B batch, N (T) tokens, D width, H heads, F hidden, V vocabulary.

use half::{bf16, f16};
use mlx_rs::error::Result;
use mlx_rs::ops::indexing::{take_along_axis, take_axis};
use mlx_rs::random::{RandomState, bernoulli};
use mlx_rs::{Array, Dtype, fast, ops};
use transformer_bench::case::{Family, Sizes};
use transformer_bench::model::{
    Attention, Block, FeedForward, Gpt2, Head, Indicator, Linear, NORM_EPS, Norm,
};

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
    /// Fused attention, where the weights need no dropout: MLX's has none.
    pub fused: bool,
    pub dropout: f64,
    pub train: bool,
    pub random: RandomState,
}

fn linear(x: &Array, layer: &Linear<Array>) -> Result<Array> {
    ops::addmm(&layer.bias, x, layer.weight.transpose()?, None, None)
}

fn norm(x: &Array, layer: &Norm<Array>) -> Result<Array> {
    fast::layer_norm(x, &layer.weight, &layer.bias, NORM_EPS as f32)
}

fn gelu(x: &Array, tanh: bool) -> Result<Array> {
    let one = scalar(1.0, x.dtype());
    let gate = if tanh {
        let cube = x.multiply(x)?.multiply(x)?;
        let inner = x.add(times(&cube, 0.044715)?)?;
        ops::tanh(times(&inner, (2.0 / std::f64::consts::PI).sqrt())?)?
    } else {
        ops::erf(times(x, std::f64::consts::FRAC_1_SQRT_2)?)?
    };
    times(x, 0.5)?.multiply(one.add(gate)?)
}

fn softmax(x: &Array) -> Result<Array> {
    // `precise` accumulates in f32; in f32 it changes nothing.
    ops::softmax_axis(x, -1, true)
}

impl Layers {
    fn drop(&mut self, x: Array) -> Result<Array> {
        if !self.train || self.dropout == 0.0 {
            return Ok(x);
        }
        let keep = 1.0 - self.dropout;
        let key = self.random.next_key()?;
        let mask = bernoulli(&Array::from_f32(keep as f32), x.shape(), &key)?;
        times(&x.multiply(mask)?, 1.0 / keep)
    }

    /// x [B, N, D] → [B, N, D]
    pub fn attention(
        &mut self,
        x: &Array,
        a: &Attention<Array>,
        heads: usize,
        causal: bool,
    ) -> Result<Array> {
        let &[b, n, d] = x.shape() else { unreachable!("x is [B, N, D]") };
        let (heads, each) = (heads as i32, d / heads as i32);
        let split = |y: Array| y.reshape(&[b, n, heads, each])?.transpose_axes(&[0, 2, 1, 3]);
        let q = split(linear(x, &a.q)?)?; // [B, H, N, D/H]
        let k = split(linear(x, &a.k)?)?;
        let v = split(linear(x, &a.v)?)?;
        let scale = 1.0 / f64::from(each).sqrt();
        let mixed = if self.fused && (!self.train || self.dropout == 0.0) {
            let mask = causal.then_some(fast::ScaledDotProductAttentionMask::Causal);
            fast::scaled_dot_product_attention(&q, &k, &v, scale as f32, mask, None)?
        } else {
            let mut scores = times(&q, scale)?.matmul(k.transpose_axes(&[0, 1, 3, 2])?)?; // [B, H, N, N]
            if causal {
                scores = scores.add(causal_mask(n, x.dtype())?)?;
            }
            let weights = softmax(&scores)?;
            self.drop(weights)?.matmul(v)?
        };
        linear(&mixed.transpose_axes(&[0, 2, 1, 3])?.reshape(&[b, n, d])?, &a.o)
    }

    /// x [.., D] → [.., D]
    pub fn feed_forward(&mut self, x: &Array, f: &FeedForward<Array>, tanh: bool) -> Result<Array> {
        let hidden = gelu(&linear(x, &f.up)?, tanh)?;
        linear(&self.drop(hidden)?, &f.down)
    }

    fn block(&mut self, x: Array, b: &Block<Array>, heads: usize, family: Family) -> Result<Array> {
        match family {
            Family::Indicator => {
                let attended = self.attention(&x, &b.attention, heads, false)?;
                let x = norm(&x.add(self.drop(attended)?)?, &b.norm1)?;
                let fed = self.feed_forward(&x, &b.feed_forward, false)?;
                norm(&x.add(self.drop(fed)?)?, &b.norm2)
            }
            Family::Gpt2 => {
                let attended = self.attention(&norm(&x, &b.norm1)?, &b.attention, heads, true)?;
                let x = x.add(self.drop(attended)?)?;
                let fed = self.feed_forward(&norm(&x, &b.norm2)?, &b.feed_forward, true)?;
                x.add(self.drop(fed)?)
            }
        }
    }

    fn head(&mut self, x: &Array, h: &Head<Array>) -> Result<Array> {
        let hidden = linear(x, &h.hidden)?;
        let active = ops::maximum(&hidden, scalar(0.0, hidden.dtype()))?;
        linear(&self.drop(active)?, &h.out)?.squeeze_axes(&[-1])
    }

    /// values [B, N], market [B, 10] → selection logits and weights, both [B, N]
    pub fn indicator(
        &mut self,
        values: &Array,
        market: &Array,
        p: &Indicator<Array>,
        s: &Sizes,
    ) -> Result<[Array; 2]> {
        let tokens = linear(&values.expand_dims_axes(&[-1])?, &p.value)?; // [B, N, D]
        let market = linear(market, &p.market)?.expand_dims_axes(&[1])?;
        let mut x = tokens.add(market)?.add(&p.position)?;
        for block in &p.blocks {
            x = self.block(x, block, s.heads, Family::Indicator)?;
        }
        let x = norm(&x, &p.norm)?;
        let selection = self.head(&x, &p.selection)?;
        let weights = softmax(&self.head(&x, &p.allocation)?)?;
        Ok([selection, weights])
    }

    /// tokens [B, T] → logits [B, T, V]
    pub fn gpt2(&mut self, tokens: &Array, p: &Gpt2<Array>, s: &Sizes) -> Result<Array> {
        let mut x = take_axis(&p.token, tokens, 0)?.add(&p.position)?; // [B, T, D]
        for block in &p.blocks {
            x = self.block(x, block, s.heads, Family::Gpt2)?;
        }
        norm(&x, &p.norm)?.matmul(p.token.transpose()?)
    }
}

/// 0 at and below the diagonal, far below any score above it: [N, N]
fn causal_mask(n: i32, dtype: Dtype) -> Result<Array> {
    let index = ops::arange::<f32, f32>(None, n as f32, None)?;
    let future = index.expand_dims_axes(&[1])?.lt(index.expand_dims_axes(&[0])?)?;
    // f16 ends at 65 504.
    future.as_dtype(dtype)?.multiply(scalar(-3e4, dtype))
}

/// BCE with logits + 0.5·MSE(weights, t) + 0.1·mean(σ(selection)), in f32; gradient
/// flows through t = u·σ(selection) over its row sum + 1e-8.
pub fn indicator_loss([selection, weights]: &[Array; 2], usefulness: &Array) -> Result<Array> {
    let selection = selection.as_dtype(Dtype::Float32)?;
    let probability = ops::sigmoid(&selection)?;
    let raw = usefulness.multiply(&probability)?;
    let target = raw.divide(raw.sum_axis(-1, true)?.add(Array::from_f32(1e-8))?)?;
    let softplus = ops::logaddexp(Array::from_f32(0.0), &selection)?;
    let bce = softplus.subtract(selection.multiply(usefulness)?)?.mean(false)?;
    let mse = weights.as_dtype(Dtype::Float32)?.subtract(target)?.square()?.mean(false)?;
    bce.add(times(&mse, 0.5)?)?.add(times(&probability.mean(false)?, 0.1)?)
}

/// Next-token cross-entropy in f32: logits [B, T, V], next [B, T]
pub fn gpt2_loss(logits: &Array, next: &Array) -> Result<Array> {
    let logits = logits.as_dtype(Dtype::Float32)?;
    let chosen = take_along_axis(&logits, next.expand_dims_axes(&[-1])?, -1)?.squeeze_axes(&[-1])?;
    logits.logsumexp_axis(-1, false)?.subtract(chosen)?.mean(false)
}
