//! The network in MLX. Dimensions: B batch, N (T) tokens, D width, H heads, F feed-forward width, V vocabulary.

mod operations;

use std::cell::RefCell;
use std::rc::Rc;

use half::{bf16, f16};
use mlx_rs::error::Result;
use mlx_rs::ops::indexing::{take_along_axis, take_axis};
use mlx_rs::random::{RandomState, bernoulli};
use mlx_rs::{Array, Dtype, fast, ops};
use transformer_bench::model::parameters::{
    Attention, Embedding, FeedForward, InOrder, IndicatorHead, Layer, Linear, Network, Norm, OutputHead,
};
use transformer_bench::model::{
    Activation, AttentionKind, Dropout, Lora, Model, ModelId, NormKind, NormOrder, Output, Position,
};

pub use operations::Operation;

use crate::recompute;

/// Returns a scalar array. MLX promotes bf16 × f32 to f32, so a constant needs the type of the other operand.
pub fn scalar(value: f64, dtype: Dtype) -> Array {
    match dtype {
        Dtype::Bfloat16 => Array::from_slice(&[bf16::from_f64(value)], &[]),
        Dtype::Float16 => Array::from_slice(&[f16::from_f64(value)], &[]),
        _ => Array::from_f32(value as f32),
    }
}

/// Multiplies by a constant in the type of `x`.
pub fn scale(x: &Array, factor: f64) -> Result<Array> {
    if factor == 1.0 { Ok(x.clone()) } else { x.multiply(scalar(factor, x.dtype())) }
}

/// Limits values softly: cap · tanh(x / cap).
fn soft_cap(x: Array, cap: Option<f64>) -> Result<Array> {
    let Some(cap) = cap else { return Ok(x) };
    scale(&ops::tanh(x.divide(scalar(cap, x.dtype()))?)?, cap)
}

/// Constants of a kind of attention.
pub struct AttentionCache {
    kind: AttentionKind,
    /// 1 / frequency of each pair that rotates, if the frequencies do not follow from a base.
    periods: Option<Array>,
}

/// Returns the constants of each kind of attention.
pub fn attention_caches(m: &Model) -> Rc<[AttentionCache]> {
    let cache = |kind: AttentionKind| {
        let listed = match kind.position {
            Position::Rotary(rotary) if rotary.frequencies.is_some() => rotary.frequencies(m.head_width),
            _ => Vec::new(),
        };
        let periods: Vec<f32> = listed.iter().map(|frequency| (1.0 / frequency) as f32).collect();
        let periods = (!periods.is_empty()).then(|| Array::from_slice(&periods, &[periods.len() as i32]));
        AttentionCache { kind, periods }
    };
    m.attention_kinds().into_iter().map(cache).collect()
}

impl AttentionCache {
    /// Applies the rotary position to queries or keys [B, H, N, d].
    fn rotate(&self, x: Array) -> Result<Array> {
        let Position::Rotary(rotary) = self.kind.position else { return Ok(x) };
        let head_width = x.dim(-1);
        let width = rotary.width(head_width as usize) as i32;
        let base = self.periods.is_none().then_some(rotary.theta as f32);
        let turn = |x: &Array| fast::rope(x, width, rotary.pairs, base, 1.0, 0, self.periods.as_ref());
        if rotary.factor == 1.0 {
            return turn(&x);
        }
        // The factor applies to the rotating features only.
        if width == head_width {
            return turn(&scale(&x, rotary.factor)?);
        }
        let parts = ops::split_at_indices(&x, &[width], -1)?;
        ops::concatenate(&[turn(&scale(&parts[0], rotary.factor)?)?, parts[1].clone()], -1)
    }
}

/// Configuration of the layers, and the random state of dropout.
#[derive(Clone)]
pub struct Layers {
    pub model: ModelId,
    /// Constants of attention, by the model's kinds of attention.
    pub caches: Rc<[AttentionCache]>,
    /// True if the backward pass computes each layer again.
    pub recomputes: bool,
    /// True for fused attention, unless the attention weights need dropout, which MLX's kernel does not have.
    pub fused: bool,
    /// Dropout probabilities, which are 0 outside training.
    pub dropout: Dropout,
    pub random: RandomState,
}

/// Applies a linear layer without its adapter.
fn linear(x: &Array, layer: &Linear<Array>) -> Result<Array> {
    match &layer.bias {
        Some(bias) => ops::addmm(bias, x, layer.weight.transpose()?, None, None),
        None => x.matmul(layer.weight.transpose()?),
    }
}

/// Applies a linear layer of a block, with its adapter if it has one.
fn adapted_linear(x: &Array, layer: &Linear<Array>, lora: Option<Lora>) -> Result<Array> {
    let y = linear(x, layer)?;
    let (Some(adapter), Some(lora)) = (&layer.adapter, lora) else { return Ok(y) };
    let low_rank = x.matmul(adapter.a.transpose()?)?;
    y.add(scale(&low_rank.matmul(adapter.b.transpose()?)?, lora.scale())?)
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
        NormKind::Layer { eps, .. } => {
            fast::layer_norm(x, layer.weight.as_ref(), layer.bias.as_ref(), eps as f32)
        }
        NormKind::Rms { eps, .. } => {
            let one = scalar(1.0, x.dtype());
            let with_offset = layer.weight.as_ref().filter(|_| kind.has_offset()).map(|w| w.add(one));
            fast::rms_norm(x, with_offset.transpose()?.as_ref().or(layer.weight.as_ref()), eps as f32)
        }
    }
}

impl Layers {
    /// Applies a linear layer of a block, with its adapter if it has one.
    fn linear(&self, x: &Array, layer: &Linear<Array>) -> Result<Array> {
        adapted_linear(x, layer, self.model.lora)
    }

    fn norm(&self, x: &Array, layer: &Norm<Array>) -> Result<Array> {
        norm_of_kind(x, layer, self.model.norm)
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

    /// Returns queries, keys and values [B, H, N, d] before the rotary position.
    fn heads(&self, x: &Array, a: &Attention<Array>) -> Result<[Array; 3]> {
        let m = self.model;
        let &[b, n, _] = x.shape() else { unreachable!("x is [B, N, D]") };
        let project = |layer: &Linear<Array>, heads: usize, norm: Option<&Norm<Array>>| {
            let all = adapted_linear(x, layer, m.lora)?;
            let split = |x: &Array| {
                x.reshape(&[b, n, heads as i32, m.head_width as i32])?.transpose_axes(&[0, 2, 1, 3])
            };
            match norm.zip(m.qk_norm) {
                Some((norm, kind)) if m.qk_norm_across_heads => split(&norm_of_kind(&all, norm, kind)?),
                Some((norm, kind)) => norm_of_kind(&split(&all)?, norm, kind),
                None => split(&all),
            }
        };
        let norms = a.qk_norms.as_ref();
        Ok([
            project(&a.q, m.heads, norms.map(|all| &all[0]))?,
            project(&a.k, m.key_value_heads, norms.map(|all| &all[1]))?,
            project(&a.v, m.key_value_heads, None)?,
        ])
    }

    /// Applies the attention of a layer: x [B, N, D] → [B, N, D].
    pub fn attention(&mut self, x: &Array, a: &Attention<Array>, layer: usize) -> Result<Array> {
        let m = self.model;
        let &[b, n, _] = x.shape() else { unreachable!("x is [B, N, D]") };
        let cache = &self.caches[m.attention_index(layer)];
        let [q, k, v] = self.heads(x, a)?;
        let (q, k) = (cache.rotate(q)?, cache.rotate(k)?);
        let window = cache.kind.window;
        // The fused function has neither dropout nor a soft cap.
        let context = if self.fused && self.dropout.weights == 0.0 && m.cap.scores.is_none() {
            self.fused_attention(&q, &k, &v, window)?
        } else {
            let weights = softmax(&self.scores(&q, k, window)?)?;
            let weights = self.dropout(weights, self.dropout.weights)?;
            self.weighted_values(&weights, v)?
        };
        let inner = (m.heads * m.head_width) as i32;
        self.linear(&context.transpose_axes(&[0, 2, 1, 3])?.reshape(&[b, n, inner])?, &a.o)
    }

    /// Applies the fused function to queries, keys and values [B, H, N, d].
    fn fused_attention(&self, q: &Array, k: &Array, v: &Array, window: Option<usize>) -> Result<Array> {
        let m = self.model;
        let windowed = window.map(|_| mask(q.dim(2), m.causal, window, q.dtype())).transpose()?;
        let mask = match &windowed {
            Some(mask) => Some(fast::ScaledDotProductAttentionMask::Array(mask)),
            None => m.causal.then_some(fast::ScaledDotProductAttentionMask::Causal),
        };
        fast::scaled_dot_product_attention(q, k, v, m.score_scale() as f32, mask, None)
    }

    /// Repeats key or value heads: each serves a group of query heads.
    fn repeat_heads(&self, x: Array) -> Result<Array> {
        let groups = (self.model.heads / self.model.key_value_heads) as i32;
        if groups > 1 { ops::repeat_axis::<f32>(x, groups, 1) } else { Ok(x) }
    }

    /// Returns the masked attention scores [B, H, N, N] of queries and keys [B, H, N, d].
    fn scores(&self, q: &Array, k: Array, window: Option<usize>) -> Result<Array> {
        let m = self.model;
        let k = self.repeat_heads(k)?;
        let scores = scale(q, m.score_scale())?.matmul(k.transpose_axes(&[0, 1, 3, 2])?)?;
        let scores = soft_cap(scores, m.cap.scores)?;
        if m.causal || window.is_some() {
            return scores.add(mask(q.dim(2), m.causal, window, q.dtype())?);
        }
        Ok(scores)
    }

    /// Returns the values [B, H, N, d], weighted by [B, H, N, N].
    fn weighted_values(&self, weights: &Array, v: Array) -> Result<Array> {
        weights.matmul(self.repeat_heads(v)?)
    }

    /// Applies the feed-forward block: x [.., D] → [.., D].
    pub fn feed_forward(&mut self, x: &Array, f: &FeedForward<Array>) -> Result<Array> {
        let (kind, up) = (self.model.activation, self.linear(x, &f.up)?);
        let hidden = match &f.gate {
            Some(gate) => activate(&self.linear(x, gate)?, kind)?.multiply(up)?,
            None => activate(&up, kind)?,
        };
        let hidden = self.dropout(hidden, self.dropout.hidden)?;
        self.linear(&hidden, &f.down)
    }

    fn layer(&mut self, x: &Array, l: &Layer<Array>, index: usize) -> Result<Array> {
        let dropouts = [self.dropout.attention(), self.dropout.residual];
        if self.model.norm_order.is_parallel() {
            let input = self.norm(x, &l.norm1)?;
            let attention = self.attention(&input, &l.attention, index)?;
            let attention = self.branch(attention, None, dropouts[0])?;
            let input = l.norm2.as_ref().map_or(Ok(input), |norm| self.norm(x, norm))?;
            let feed_forward = self.feed_forward(&input, &l.feed_forward)?;
            return attention.add(self.branch(feed_forward, None, dropouts[1])?)?.add(x);
        }
        let norm2 = l.norm2.as_ref().expect("two norms unless the blocks are parallel");
        let [output1, output2] = l.output_norms.as_ref().map_or([&l.norm1, norm2], |[a, b]| [a, b]);
        let x = self.residual(x, [&l.norm1, output1], dropouts[0], |layers, x| {
            layers.attention(x, &l.attention, index)
        })?;
        self.residual(&x, [norm2, output2], dropouts[1], |layers, x| layers.feed_forward(x, &l.feed_forward))
    }

    /// Applies a layer that the backward pass computes again, with the same dropout masks.
    fn recomputed_layer(&mut self, x: &Array, l: &Layer<Array>, index: usize) -> Result<Array> {
        let mut inputs = vec![x.clone()];
        inputs.extend(l.tensors());
        let next_state = Rc::new(RefCell::new(self.random.clone()));
        let (layers, state) = (self.clone(), next_state.clone());
        let body = move |inputs: &[Array]| {
            let mut layers = layers.clone();
            let l = Layer::take(&mut InOrder(inputs[1..].iter().cloned()), "", &layers.model);
            let y = layers.layer(&inputs[0], &l, index)?;
            *state.borrow_mut() = layers.random;
            Ok(vec![y])
        };
        let y = recompute::checkpoint(body, &inputs)?.remove(0);
        self.random = next_state.borrow().clone();
        Ok(y)
    }

    /// Completes the result of a block for the residual addition.
    fn branch(&mut self, y: Array, norm: Option<&Norm<Array>>, p: f64) -> Result<Array> {
        let y = norm.map_or(Ok(y.clone()), |norm| self.norm(&y, norm))?;
        scale(&self.dropout(y, p)?, self.model.scale.residual)
    }

    /// Adds the result of a block to the residual stream, with norms where the model has them. `norms` are that of
    /// the input or of the sum, and that of the output.
    fn residual(
        &mut self,
        x: &Array,
        [norm, output_norm]: [&Norm<Array>; 2],
        p: f64,
        block: impl FnOnce(&mut Self, &Array) -> Result<Array>,
    ) -> Result<Array> {
        let order = self.model.norm_order;
        let y = if order.norms_inputs() { block(self, &self.norm(x, norm)?)? } else { block(self, x)? };
        let sum = x.add(self.branch(y, order.norms_outputs().then_some(output_norm), p)?)?;
        if order == NormOrder::PostNorm { self.norm(&sum, norm) } else { Ok(sum) }
    }

    fn head(&mut self, x: &Array, h: &IndicatorHead<Array>) -> Result<Array> {
        let hidden = linear(x, &h.hidden)?;
        let active = ops::maximum(&hidden, scalar(0.0, hidden.dtype()))?;
        linear(&self.dropout(active, self.dropout.heads)?, &h.out)?.squeeze_axes(&[-1])
    }

    /// Returns the input of the output head [B, N, D].
    fn hidden(&mut self, inputs: &[Array], p: &Network<Array>) -> Result<Array> {
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
        let embedded = scale(&embedded, self.model.scale.embedding)?;
        let mut x = p.position.as_ref().map_or(Ok(embedded.clone()), |position| embedded.add(position))?;
        if let Some(norm) = &p.embedding_norm {
            x = self.norm(&x, norm)?;
        }
        x = self.dropout(x, self.dropout.embedding)?; // [B, N, D]
        for (index, layer) in p.blocks.iter().enumerate() {
            let recomputes = self.recomputes;
            x = if recomputes {
                self.recomputed_layer(&x, layer, index)
            } else {
                self.layer(&x, layer, index)
            }?;
        }
        if let Some(norm) = &p.final_norm {
            x = self.norm(&x, norm)?;
        }
        scale(&x, self.model.scale.hidden)
    }

    /// Returns the outputs of the model, in the order of [`Model::output_names`].
    pub fn model(&mut self, inputs: &[Array], p: &Network<Array>) -> Result<Vec<Array>> {
        let x = self.hidden(inputs, p)?;
        if let OutputHead::IndicatorHeads([selection, allocation]) = &p.output {
            let selection = self.head(&x, selection)?;
            return Ok(vec![selection, softmax(&self.head(&x, allocation)?)?]);
        }
        Ok(vec![self.logits(&x, &p.output, p.token_table())?])
    }

    /// Applies the output head of a language model: x [.., D] → logits [.., V].
    fn logits(&self, x: &Array, output: &OutputHead<Array>, token_table: &Array) -> Result<Array> {
        let logits = match output {
            OutputHead::IndicatorHeads(_) => unreachable!("a language model"),
            OutputHead::MlmHead { dense, norm, bias } => {
                let hidden = activate(&linear(x, dense)?, self.model.activation)?;
                ops::addmm(bias, self.norm(&hidden, norm)?, token_table.transpose()?, None, None)?
            }
            OutputHead::Untied(output) => linear(x, output)?,
            OutputHead::Tied => x.matmul(token_table.transpose()?)?,
        };
        soft_cap(scale(&logits, self.model.scale.logits)?, self.model.cap.logits)
    }

    /// Returns the cross-entropy of a language model in f32. The logits of a chunk of the tokens exist at a time, and the
    /// backward pass computes them again.
    pub fn chunked_loss(&mut self, inputs: &[Array], p: &Network<Array>) -> Result<Array> {
        let (x, targets) = (self.hidden(inputs, p)?, inputs[1].reshape(&[-1])?);
        let (rows, count) = (x.reshape(&[-1, x.dim(-1)])?, targets.dim(0));
        let chunk = self.model.loss_chunk_rows(count as usize);
        let ends: Vec<i32> = (chunk as i32..count).step_by(chunk).collect();
        let parts = ops::split_at_indices(&rows, &ends, 0)?;
        let mut total: Option<Array> = None;
        for (rows, targets) in parts.into_iter().zip(ops::split_at_indices(&targets, &ends, 0)?) {
            // The mean over all tokens is the sum of the shares of the chunks.
            let share = f64::from(targets.dim(0)) / f64::from(count);
            let layers = self.clone();
            let body = move |inputs: &[Array]| {
                let mut parameters = InOrder(inputs[2..].iter().cloned());
                let output = OutputHead::take(&mut parameters, &layers.model);
                let logits = layers.logits(&inputs[0], &output, &inputs[1])?;
                Ok(vec![scale(&cross_entropy(&logits, &targets)?, share)?])
            };
            let mut inputs = vec![rows, p.token_table().clone()];
            inputs.extend(p.output.tensors());
            let loss = recompute::checkpoint(body, &inputs)?.remove(0);
            total = Some(total.map_or(Ok(loss.clone()), |total| total.add(&loss))?);
        }
        Ok(total.expect("a batch has tokens"))
    }
}

/// Returns the additive mask [N, N]: 0 where a token attends to another, and a large negative number elsewhere.
fn mask(n: i32, causal: bool, window: Option<usize>, dtype: Dtype) -> Result<Array> {
    let index = ops::arange::<f32, f32>(None, n as f32, None)?;
    let distance = index.expand_dims_axes(&[1])?.subtract(index.expand_dims_axes(&[0])?)?;
    let future = distance.lt(Array::from_f32(0.0))?;
    let far = |window: usize| distance.abs()?.ge(Array::from_f32(window as f32));
    let hidden = match window {
        Some(window) if causal => future.logical_or(far(window)?)?,
        Some(window) => far(window)?,
        None => future,
    };
    // The largest f16 is 65,504.
    hidden.as_dtype(dtype)?.multiply(scalar(-3e4, dtype))
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

/// Returns the mean cross-entropy of logits [.., V] and targets [..] in f32.
fn cross_entropy(logits: &Array, targets: &Array) -> Result<Array> {
    let logits = logits.as_dtype(Dtype::Float32)?;
    let target_logits =
        take_along_axis(&logits, targets.expand_dims_axes(&[-1])?, -1)?.squeeze_axes(&[-1])?;
    logits.logsumexp_axis(-1, false)?.subtract(target_logits)?.mean(false)
}
