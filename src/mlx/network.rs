//! The network in MLX. Dimensions: B batch, N (T) tokens, D width, H heads, F feed-forward width, V vocabulary.

use half::{bf16, f16};
use mlx_rs::error::Result;
use mlx_rs::ops::indexing::{take_along_axis, take_axis};
use mlx_rs::random::{RandomState, bernoulli};
use mlx_rs::{Array, Dtype, fast, ops};
use transformer_bench::model::parameters::{
    Attention, Embedding, FeedForward, IndicatorHead, Layer, Linear, Network, Norm, OutputHead,
};
use transformer_bench::model::{Activation, Dropout, Model, ModelId, NormKind, NormOrder, Output, Position};

/// Returns a scalar array. MLX promotes bf16 × f32 to f32, so a constant needs the type of the other operand.
pub fn scalar(value: f64, dtype: Dtype) -> Array {
    match dtype {
        Dtype::Bfloat16 => Array::from_slice(&[bf16::from_f64(value)], &[]),
        Dtype::Float16 => Array::from_slice(&[f16::from_f64(value)], &[]),
        _ => Array::from_f32(value as f32),
    }
}

fn scale(x: &Array, factor: f64) -> Result<Array> {
    x.multiply(scalar(factor, x.dtype()))
}

/// Configuration of the layers, and the random state of dropout.
pub struct Layers {
    pub model: ModelId,
    /// True for fused attention, unless the attention weights need dropout, which MLX's kernel does not have.
    pub fused: bool,
    /// Dropout probabilities, which are 0 outside training.
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
            let inner = x.add(scale(&cube, 0.044715)?)?;
            ops::tanh(scale(&inner, (2.0 / std::f64::consts::PI).sqrt())?)?
        }
        Activation::Gelu => ops::erf(scale(x, std::f64::consts::FRAC_1_SQRT_2)?)?,
    };
    scale(x, 0.5)?.multiply(one.add(gate)?)
}

fn softmax(x: &Array) -> Result<Array> {
    let precise = true; // accumulates in f32
    ops::softmax_axis(x, -1, precise)
}

fn norm_of_kind(x: &Array, layer: &Norm<Array>, kind: NormKind) -> Result<Array> {
    match kind {
        NormKind::Layer { eps } => {
            fast::layer_norm(x, layer.weight.as_ref(), layer.bias.as_ref(), eps as f32)
        }
        NormKind::Rms { eps, .. } => fast::rms_norm(x, layer.weight.as_ref(), eps as f32),
    }
}

impl Layers {
    fn norm(&self, x: &Array, layer: &Norm<Array>) -> Result<Array> {
        norm_of_kind(x, layer, self.model.norm)
    }

    /// Applies the query-key norm and the rotary embedding, if the model has them, to queries or keys [B, H, N, d].
    fn norm_and_rope(&self, x: Array, norm: Option<&Norm<Array>>) -> Result<Array> {
        let x = match (norm, self.model.qk_norm) {
            (Some(norm), Some(kind)) => norm_of_kind(&x, norm, kind)?,
            _ => x,
        };
        match self.model.position {
            Position::Rotary { theta } => {
                fast::rope(x, self.model.head_width as i32, false, theta as f32, 1.0, 0, None::<&Array>)
            }
            Position::Learned | Position::None => Ok(x),
        }
    }

    fn dropout(&mut self, x: Array, p: f64) -> Result<Array> {
        if p == 0.0 {
            return Ok(x);
        }
        let keep = 1.0 - p;
        let key = self.random.next_key()?;
        let mask = bernoulli(&Array::from_f32(keep as f32), x.shape(), &key)?;
        scale(&x.multiply(mask)?, 1.0 / keep)
    }

    /// Applies attention: x [B, N, D] → [B, N, D].
    pub fn attention(&mut self, x: &Array, a: &Attention<Array>) -> Result<Array> {
        let m = self.model;
        let &[b, n, _] = x.shape() else { unreachable!("x is [B, N, D]") };
        let (heads, key_value_heads, width) = (m.heads as i32, m.key_value_heads as i32, m.head_width as i32);
        let project = |layer: &Linear<Array>, heads: i32| {
            linear(x, layer)?.reshape(&[b, n, heads, width])?.transpose_axes(&[0, 2, 1, 3])
        };
        let norms = a.qk_norms.as_ref();
        let q = self.norm_and_rope(project(&a.q, heads)?, norms.map(|all| &all[0]))?; // [B, H, N, d]
        let k = self.norm_and_rope(project(&a.k, key_value_heads)?, norms.map(|all| &all[1]))?;
        let v = project(&a.v, key_value_heads)?;
        let factor = 1.0 / f64::from(width).sqrt();
        let context = if self.fused && self.dropout.weights == 0.0 {
            let mask = m.causal.then_some(fast::ScaledDotProductAttentionMask::Causal);
            fast::scaled_dot_product_attention(&q, &k, &v, factor as f32, mask, None)?
        } else {
            // Each key-value head serves a group of query heads.
            let groups = heads / key_value_heads;
            let repeat = |x: Array| if groups > 1 { ops::repeat_axis::<f32>(x, groups, 1) } else { Ok(x) };
            let (k, v) = (repeat(k)?, repeat(v)?);
            let mut scores = scale(&q, factor)?.matmul(k.transpose_axes(&[0, 1, 3, 2])?)?; // [B, H, N, N]
            if m.causal {
                scores = scores.add(causal_mask(n, x.dtype())?)?;
            }
            let weights = softmax(&scores)?;
            self.dropout(weights, self.dropout.weights)?.matmul(v)?
        };
        linear(&context.transpose_axes(&[0, 2, 1, 3])?.reshape(&[b, n, heads * width])?, &a.o)
    }

    /// Applies the feed-forward block: x [.., D] → [.., D].
    pub fn feed_forward(&mut self, x: &Array, f: &FeedForward<Array>) -> Result<Array> {
        let (kind, up) = (self.model.activation, linear(x, &f.up)?);
        let hidden = match &f.gate {
            Some(gate) => activate(&linear(x, gate)?, kind)?.multiply(up)?,
            None => activate(&up, kind)?,
        };
        linear(&self.dropout(hidden, self.dropout.hidden)?, &f.down)
    }

    fn layer(&mut self, x: &Array, layer: &Layer<Array>) -> Result<Array> {
        let x = self.residual(x, &layer.norm1, |layers, x| layers.attention(x, &layer.attention))?;
        self.residual(&x, &layer.norm2, |layers, x| layers.feed_forward(x, &layer.feed_forward))
    }

    /// Adds the result of a block to the residual stream, with the norm before or after it.
    fn residual(
        &mut self,
        x: &Array,
        norm: &Norm<Array>,
        block: impl FnOnce(&mut Self, &Array) -> Result<Array>,
    ) -> Result<Array> {
        let pre_norm = self.model.norm_order == NormOrder::PreNorm;
        let y = if pre_norm { block(self, &self.norm(x, norm)?)? } else { block(self, x)? };
        let sum = x.add(self.dropout(y, self.dropout.residual)?)?;
        if pre_norm { Ok(sum) } else { self.norm(&sum, norm) }
    }

    fn head(&mut self, x: &Array, h: &IndicatorHead<Array>) -> Result<Array> {
        let hidden = linear(x, &h.hidden)?;
        let active = ops::maximum(&hidden, scalar(0.0, hidden.dtype()))?;
        linear(&self.dropout(active, self.dropout.heads)?, &h.out)?.squeeze_axes(&[-1])
    }

    /// Returns the outputs of the model, in the order of [`Model::output_names`].
    pub fn model(&mut self, inputs: &[Array], p: &Network<Array>) -> Result<Vec<Array>> {
        let embedded = match &p.embedding {
            Embedding::Tokens(table, token_type) => {
                let rows = take_axis(table, &inputs[0], 0)?;
                token_type.as_ref().map_or(Ok(rows.clone()), |token_type| rows.add(token_type))?
            }
            Embedding::Indicator { value, market } => {
                let values = linear(&inputs[0].expand_dims_axes(&[-1])?, value)?;
                values.add(linear(&inputs[1], market)?.expand_dims_axes(&[1])?)?
            }
        };
        let mut x = p.position.as_ref().map_or(Ok(embedded.clone()), |position| embedded.add(position))?;
        if let Some(norm) = &p.embedding_norm {
            x = self.norm(&x, norm)?;
        }
        x = self.dropout(x, self.dropout.embedding)?; // [B, N, D]
        for layer in &p.blocks {
            x = self.layer(&x, layer)?;
        }
        if let Some(norm) = &p.final_norm {
            x = self.norm(&x, norm)?;
        }
        match &p.output {
            OutputHead::IndicatorHeads([selection, allocation]) => {
                let selection = self.head(&x, selection)?;
                Ok(vec![selection, softmax(&self.head(&x, allocation)?)?])
            }
            OutputHead::MlmHead { dense, norm, bias } => {
                let hidden = activate(&linear(&x, dense)?, self.model.activation)?;
                let hidden = self.norm(&hidden, norm)?;
                Ok(vec![ops::addmm(bias, hidden, p.token_table().transpose()?, None, None)?])
            }
            OutputHead::Untied(table) => Ok(vec![x.matmul(table.transpose()?)?]),
            OutputHead::Tied => Ok(vec![x.matmul(p.token_table().transpose()?)?]),
        }
    }
}

/// Returns the additive causal mask [N, N]: 0 at and below the diagonal, and a large negative number above it.
fn causal_mask(n: i32, dtype: Dtype) -> Result<Array> {
    let index = ops::arange::<f32, f32>(None, n as f32, None)?;
    let future = index.expand_dims_axes(&[1])?.lt(index.expand_dims_axes(&[0])?)?;
    // The largest f16 is 65,504.
    future.as_dtype(dtype)?.multiply(scalar(-3e4, dtype))
}

/// Returns the loss in f32.
pub fn loss(model: &Model, outputs: &[Array], inputs: &[Array]) -> Result<Array> {
    match model.output {
        Output::Tied | Output::Untied | Output::MlmHead => cross_entropy(&outputs[0], &inputs[1]),
        Output::IndicatorHeads => indicator_loss(&outputs[0], &outputs[1], &inputs[2]),
    }
}

/// Returns BCE with logits + 0.5·MSE(weights, t) + 0.1·mean(σ(selection)), with t = u·σ(selection) divided by its
/// row sum + 1e-8. The gradient flows through t.
fn indicator_loss(selection: &Array, weights: &Array, usefulness: &Array) -> Result<Array> {
    let selection = selection.as_dtype(Dtype::Float32)?;
    let probability = ops::sigmoid(&selection)?;
    let raw = usefulness.multiply(&probability)?;
    let target = raw.divide(raw.sum_axis(-1, true)?.add(Array::from_f32(1e-8))?)?;
    let softplus = ops::logaddexp(Array::from_f32(0.0), &selection)?;
    let bce = softplus.subtract(selection.multiply(usefulness)?)?.mean(false)?;
    let mse = weights.as_dtype(Dtype::Float32)?.subtract(target)?.square()?.mean(false)?;
    bce.add(scale(&mse, 0.5)?)?.add(scale(&probability.mean(false)?, 0.1)?)
}

/// Returns the cross-entropy of logits [B, T, V] and targets [B, T].
fn cross_entropy(logits: &Array, targets: &Array) -> Result<Array> {
    let logits = logits.as_dtype(Dtype::Float32)?;
    let target_logits =
        take_along_axis(&logits, targets.expand_dims_axes(&[-1])?, -1)?.squeeze_axes(&[-1])?;
    logits.logsumexp_axis(-1, false)?.subtract(target_logits)?.mean(false)
}
