//! A model as plain data: sizes and options. Parameters, fixture, reference, cost and the networks of both
//! frameworks follow from it. README.md lists the files.
//!
//! Letters in dimensions: B batch, T tokens, D width, H heads, F feed-forward width, V vocabulary.

pub mod config;
mod lora;
pub mod parameters;
mod position;
mod presets;

use std::fmt;
use std::ops::Deref;

use serde::{Deserialize, Serialize};

pub use lora::{AdaptedLayers, Lora};
pub use position::{AttentionKind, Position, Rotary, SecondAttention};
pub use presets::{GPT2, INDICATOR, ModelId, NANOCHAT_D4, NANOCHAT_D12, OPTION_MODELS};

/// A part of a transformer layer that is benchmarked alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Block {
    Attention,
    FeedForward,
}

/// Arrangement of the norms and the two parts f (attention) and g (feed-forward) in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NormOrder {
    /// x + f(norm(x)), then the same with g (GPT-2).
    PreNorm,
    /// norm(x + f(x)) (Vaswani et al. 2017).
    PostNorm,
    /// x + norm(f(x)) (OLMo 2).
    OutputNorm,
    /// x + norm(f(norm(x))) (Gemma 2).
    SandwichNorm,
    /// x + f(norm(x)) + g(norm(x)), with two norms (GPT-NeoX).
    Parallel,
    /// Both parts in parallel with one norm (Phi).
    ParallelSharedNorm,
}

impl NormOrder {
    /// Returns true if a norm precedes each part.
    pub fn norms_inputs(self) -> bool {
        !matches!(self, Self::PostNorm | Self::OutputNorm)
    }

    /// Returns true if both parts have the same input.
    pub fn is_parallel(self) -> bool {
        matches!(self, Self::Parallel | Self::ParallelSharedNorm)
    }

    /// Returns true if a norm follows each part, before the residual addition.
    pub fn norms_outputs(self) -> bool {
        matches!(self, Self::OutputNorm | Self::SandwichNorm)
    }
}

/// Kind of a norm.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum NormKind {
    /// Layer norm (Ba et al. 2016).
    Layer {
        eps: f64,
        #[serde(default = "default_true")]
        weight: bool,
        #[serde(default = "default_true")]
        bias: bool,
    },
    /// RMS norm, with or without a weight (Zhang and Sennrich 2019).
    Rms {
        eps: f64,
        weight: bool,
        /// True if the parameter is the weight minus 1 (Gemma).
        #[serde(default)]
        offset: bool,
    },
}

impl NormKind {
    /// Returns a layer norm with weight and bias.
    pub const fn layer(eps: f64) -> Self {
        Self::Layer { eps, weight: true, bias: true }
    }

    /// Returns an RMS norm with a weight.
    pub const fn rms(eps: f64) -> Self {
        Self::Rms { eps, weight: true, offset: false }
    }

    pub fn eps(self) -> f64 {
        match self {
            Self::Layer { eps, .. } | Self::Rms { eps, .. } => eps,
        }
    }

    pub fn set_eps(&mut self, value: f64) {
        match self {
            Self::Layer { eps, .. } | Self::Rms { eps, .. } => *eps = value,
        }
    }

    /// Returns whether it has a weight, and whether it has a bias.
    pub fn has_weight_and_bias(self) -> (bool, bool) {
        match self {
            Self::Layer { weight, bias, .. } => (weight, bias),
            Self::Rms { weight, .. } => (weight, false),
        }
    }

    /// Returns true if the parameter is the weight minus 1.
    pub fn has_offset(self) -> bool {
        matches!(self, Self::Rms { weight: true, offset: true, .. })
    }
}

/// Activation of the feed-forward block.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// GELU, x·Φ(x) (Hendrycks and Gimpel 2016).
    Gelu,
    /// The tanh approximation of GELU, as in GPT-2.
    GeluTanh,
    /// SiLU, x·σ(x).
    Silu,
    Relu,
    /// The square of ReLU (So et al. 2021).
    ReluSquared,
}

/// Biases of the projections.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Biases {
    /// Biases of q, k and v.
    pub qkv: bool,
    /// Bias of the output projection of attention.
    pub out: bool,
    /// Biases of the feed-forward block.
    pub feed_forward: bool,
    /// Bias of an untied output matrix.
    #[serde(default)]
    pub output: bool,
}

impl Biases {
    /// Biases of all blocks.
    pub const ALL: Self = Self { qkv: true, out: true, feed_forward: true, output: false };
    pub const NONE: Self = Self { qkv: false, out: false, feed_forward: false, output: false };
}

/// Inputs of a model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Input {
    /// `tokens` [B, T], which index a table [V, D].
    Tokens,
    /// `values` [B, T] and `market` [B, features], each with a linear layer.
    Indicator { market: usize },
}

/// Outputs and loss of a model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Output {
    /// Logits [B, T, V] from the transpose of the token table, with cross-entropy of the next token.
    Tied,
    /// Logits from a separate matrix [V, D], with the same loss.
    Untied,
    /// BERT's head for masked tokens (Devlin et al. 2018): D → D, activation, norm, then the transpose of the
    /// token table and a bias. The loss is cross-entropy with a token at every position.
    MlmHead,
    /// Two heads D → D/2, ReLU, → 1: selection logits, and weights with softmax over T. The loss is
    /// BCE with logits + 0.5·MSE(weights, target) + 0.1·mean(σ(selection)).
    IndicatorHeads,
}

/// Dropout probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Dropout {
    /// After the embedding.
    pub embedding: f64,
    /// On the attention weights.
    pub weights: f64,
    /// On the output of a block, before the residual addition.
    pub residual: f64,
    /// On the output of attention, if it differs from `residual` (DistilBERT).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention: Option<f64>,
    /// Inside the feed-forward block.
    pub hidden: f64,
    /// Inside the output heads.
    pub heads: f64,
}

impl Dropout {
    pub const NONE: Self = Self::everywhere(0.0);

    pub const fn everywhere(p: f64) -> Self {
        Self { embedding: p, weights: p, residual: p, attention: None, hidden: p, heads: p }
    }

    /// Returns the probability on the output of attention.
    pub fn attention(&self) -> f64 {
        self.attention.unwrap_or(self.residual)
    }

    /// Returns every probability.
    pub fn all(&self) -> [f64; 6] {
        [self.embedding, self.weights, self.attention(), self.residual, self.hidden, self.heads]
    }

    pub fn any(&self) -> bool {
        self.all().iter().any(|p| *p > 0.0)
    }
}

impl Default for Dropout {
    fn default() -> Self {
        Self::NONE
    }
}

/// Constant factors. All are 1 by default, except that of the scores.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Scales {
    /// Factor of the embedding.
    pub embedding: f64,
    /// Factor of the attention scores; 1/√(head width) by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scores: Option<f64>,
    /// Factor of the output of a block, before the residual addition.
    pub residual: f64,
    /// Factor of the result of the last layer, before the output head.
    pub hidden: f64,
    /// Factor of the logits.
    pub logits: f64,
}

impl Scales {
    pub const NONE: Self = Self { embedding: 1.0, scores: None, residual: 1.0, hidden: 1.0, logits: 1.0 };
}

impl Default for Scales {
    fn default() -> Self {
        Self::NONE
    }
}

/// Soft caps: x becomes cap · tanh(x / cap) (Gemma 2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Caps {
    /// Cap of the attention scores.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scores: Option<f64>,
    /// Cap of the logits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logits: Option<f64>,
}

impl Caps {
    pub const NONE: Self = Self { scores: None, logits: None };
}

/// The name of a model, which lives as long as the process.
type Name = &'static str;

fn deserialize_name<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Name, D::Error> {
    Ok(String::deserialize(from)?.leak())
}

fn default_true() -> bool {
    true
}

fn one() -> f64 {
    1.0
}

/// Sizes and options of a transformer. README.md describes the fields.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Model {
    /// `[a-z0-9._-]+`
    #[serde(deserialize_with = "deserialize_name")]
    pub name: Name,
    /// Tokens T per sample.
    pub tokens: usize,
    pub width: usize,
    pub layers: usize,
    pub heads: usize,
    /// Number of key and value heads. Groups of query heads share one (Ainslie et al. 2023).
    #[serde(default)]
    pub key_value_heads: usize,
    #[serde(default)]
    pub head_width: usize,
    pub ffn_width: usize,
    /// Vocabulary V, or 0 without tokens.
    #[serde(default)]
    pub vocabulary: usize,
    pub norm: NormKind,
    pub norm_order: NormOrder,
    /// Norm of the queries and keys, before rotary positions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qk_norm: Option<NormKind>,
    /// True if that norm is over all heads (OLMo 2). By default each head has its own.
    #[serde(default)]
    pub qk_norm_across_heads: bool,
    /// True if a norm follows the embedding.
    #[serde(default)]
    pub embedding_norm: bool,
    /// True if a norm follows the last layer.
    #[serde(default = "default_true")]
    pub final_norm: bool,
    pub position: Position,
    /// Attention window: a token attends to tokens at a distance below it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second_attention: Option<SecondAttention>,
    /// True if the embedding adds BERT's row of the first sentence to every token.
    #[serde(default)]
    pub token_type: bool,
    pub activation: Activation,
    /// True for a gated feed-forward block: the activation of a second projection multiplies the first (Shazeer
    /// 2020).
    #[serde(default)]
    pub glu: bool,
    pub bias: Biases,
    pub causal: bool,
    #[serde(default)]
    pub scale: Scales,
    #[serde(default)]
    pub cap: Caps,
    #[serde(default)]
    pub dropout: Dropout,
    pub input: Input,
    pub output: Output,
    /// Adapters. Only they are trained, and all other parameters are frozen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<Lora>,
}

impl Model {
    /// Returns the names of the inputs and targets, in the order of the fixture.
    pub fn input_names(&self) -> &'static [&'static str] {
        match self.input {
            Input::Tokens => &["tokens", "next"],
            Input::Indicator { .. } => &["values", "market", "usefulness"],
        }
    }

    /// Returns the names of the outputs.
    pub fn output_names(&self) -> &'static [&'static str] {
        match self.output {
            Output::Tied | Output::Untied | Output::MlmHead => &["logits"],
            Output::IndicatorHeads => &["selection", "weights"],
        }
    }

    /// Returns the width of all query heads, and of all key (or value) heads.
    pub fn qkv_widths(&self) -> (usize, usize) {
        (self.heads * self.head_width, self.key_value_heads * self.head_width)
    }

    /// Returns the factor of the attention scores.
    pub fn score_scale(&self) -> f64 {
        self.scale.scores.unwrap_or_else(|| 1.0 / (self.head_width as f64).sqrt())
    }

    /// Returns the widths of the norms of queries and of keys.
    pub fn qk_norm_widths(&self) -> [usize; 2] {
        let (queries, keys) = self.qkv_widths();
        if self.qk_norm_across_heads { [queries, keys] } else { [self.head_width; 2] }
    }

    /// Returns the rows of logits that a chunked loss computes at a time, of `rows` tokens: the power of two from which on
    /// they need the memory of all hidden states. It is the rule "aspect_ratio" of `torch.nn.LinearCrossEntropyOptions`.
    pub fn loss_chunk_rows(&self, rows: usize) -> usize {
        rows.div_ceil(self.vocabulary.div_ceil(self.width)).next_power_of_two()
    }

    /// Returns true if a sample is a sequence of tokens. Ids then contain the number of tokens.
    pub fn is_language_model(&self) -> bool {
        self.input == Input::Tokens
    }
}
