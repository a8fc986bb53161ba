//! A model is a value: sizes and choices. Everything else of it follows from them, each in
//! one place: parameters, fixture, oracle, cost, and both frameworks' networks.
//!
//! | file | what |
//! | --- | --- |
//! | `presets.rs` | the two models of the suite, their miniatures, and models that are given |
//! | `config.rs` | a model read from `config.json`, or from a TOML file in the value's own words |
//! | `parameters.rs` | names, dims, initial values and order of the parameters |
//! | `fixture.rs` | seeded inputs, targets and parameters of a case |
//! | `oracle/` | the same mathematics in f64: one scalar at a time, and in matrix products |
//!
//! Letters as everywhere: B batch, N (T) tokens, D width, H heads, F hidden, V vocabulary.

pub mod config;
pub mod fixture;
pub mod parameters;
mod presets;
pub mod reference;

use std::fmt;
use std::ops::Deref;

use serde::{Deserialize, Serialize};

pub use presets::{CHOICE_MODELS, GPT2, INDICATOR, ModelId};

/// Where a normalisation stands in a block.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NormOrder {
    /// x + f(norm(x)) (GPT-2).
    PreNorm,
    /// norm(x + f(x)) (Vaswani et al. 2017).
    PostNorm,
}

/// How features are normalised.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum NormKind {
    /// Layer normalisation with weight and bias (Ba et al. 2016).
    Layer { eps: f64 },
    /// By the root mean square alone (Zhang and Sennrich 2019), times a weight or nothing.
    Rms { eps: f64, weight: bool },
}

impl NormKind {
    pub fn eps(self) -> f64 {
        match self {
            Self::Layer { eps } | Self::Rms { eps, .. } => eps,
        }
    }

    pub fn set_eps(&mut self, to: f64) {
        match self {
            Self::Layer { eps } | Self::Rms { eps, .. } => *eps = to,
        }
    }

    /// Whether it has a weight, and a bias.
    pub fn has_weight_and_bias(self) -> (bool, bool) {
        match self {
            Self::Layer { .. } => (true, true),
            Self::Rms { weight, .. } => (weight, false),
        }
    }
}

/// How a token's place enters.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Position {
    /// A learned vector [N, D], added to the embedding.
    Learned,
    /// Queries and keys are turned, each feature of a head's first half with its partner in the
    /// second, by token · base^(−2i/d) (Su et al. 2021; the halves as in GPT-NeoX and Hugging Face).
    Rotary { theta: f64 },
    /// Not at all.
    None,
}

/// Between the two projections of the feed-forward part.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// x·Φ(x) (Hendrycks and Gimpel 2016).
    Gelu,
    /// Its tanh approximation, as GPT-2 has it.
    GeluTanh,
    /// x·σ(x).
    Silu,
    Relu,
    /// The square of ReLU (So et al. 2021).
    ReluSquared,
}

/// Which projections add a bias.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Biases {
    /// Of q, k and v.
    pub qkv: bool,
    /// Of attention's output.
    pub out: bool,
    /// Of the feed-forward part.
    pub feed_forward: bool,
}

impl Biases {
    pub const ALL: Self = Self { qkv: true, out: true, feed_forward: true };
    pub const NONE: Self = Self { qkv: false, out: false, feed_forward: false };
}

/// What the model reads.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Input {
    /// `tokens` [B, T], embedded by a table [V, D].
    Tokens,
    /// `values` [B, N] and `market` [B, features], each through a linear layer.
    Indicator { market: usize },
}

/// What the model puts out; its loss follows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Output {
    /// Logits [B, T, V] by the embedding's transpose; cross-entropy with the next token.
    Tied,
    /// The same by a matrix of its own.
    Untied,
    /// BERT's head for masked tokens (Devlin et al. 2018): D → D, activation, norm, then the
    /// embedding's transpose and a bias; cross-entropy with a token at every place.
    MlmHead,
    /// Two heads D → D/2, ReLU, → 1: selection logits, and weights by softmax over N. Loss:
    /// BCE with logits + 0.5·MSE(weights, t) + 0.1·mean(σ(selection)).
    IndicatorHeads,
}

/// Dropout probability at each place where a training step draws.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Dropout {
    /// On what the embedding gives.
    pub embedding: f64,
    /// On attention's weights.
    pub weights: f64,
    /// On what a part adds to the residual stream.
    pub residual: f64,
    /// Inside the feed-forward part.
    pub hidden: f64,
    /// Inside the output heads.
    pub heads: f64,
}

impl Dropout {
    pub const NONE: Self = Self::everywhere(0.0);

    pub const fn everywhere(p: f64) -> Self {
        Self { embedding: p, weights: p, residual: p, hidden: p, heads: p }
    }

    /// Every probability.
    pub fn all(&self) -> [f64; 5] {
        [self.embedding, self.weights, self.residual, self.hidden, self.heads]
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

/// A model's name; it lives as long as the process.
type Name = &'static str;

fn name<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Name, D::Error> {
    Ok(Box::leak(String::deserialize(from)?.into_boxed_str()))
}

fn yes() -> bool {
    true
}

/// Sizes and choices.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Model {
    /// `[a-z0-9-]+`
    #[serde(deserialize_with = "name")]
    pub name: Name,
    /// Tokens N of a sample.
    pub tokens: usize,
    pub width: usize,
    pub layers: usize,
    pub heads: usize,
    /// Heads of keys and values, each shared by as many heads of queries (Ainslie et al. 2023).
    #[serde(default)]
    pub key_value_heads: usize,
    #[serde(default)]
    pub head_width: usize,
    pub ffn_width: usize,
    /// 0 where it has none.
    #[serde(default)]
    pub vocabulary: usize,
    pub norm: NormKind,
    pub norm_order: NormOrder,
    /// Of each head's queries and keys, before they are turned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qk_norm: Option<NormKind>,
    /// Behind the embedding.
    #[serde(default)]
    pub embedding_norm: bool,
    /// Behind the last block.
    #[serde(default = "yes")]
    pub final_norm: bool,
    pub position: Position,
    /// Whether the embedding adds a row that says of which sentence a token is; all are of the first.
    #[serde(default)]
    pub token_type: bool,
    pub activation: Activation,
    /// Whether the activation is taken of a projection of its own and multiplies the other (Shazeer
    /// 2020).
    #[serde(default)]
    pub glu: bool,
    pub bias: Biases,
    pub causal: bool,
    #[serde(default)]
    pub dropout: Dropout,
    pub input: Input,
    pub output: Output,
}

impl Model {
    /// The names of what the model reads, in the fixture's order.
    pub fn input_names(&self) -> &'static [&'static str] {
        match self.input {
            Input::Tokens => &["tokens", "next"],
            Input::Indicator { .. } => &["values", "market", "usefulness"],
        }
    }

    /// The names of what it puts out.
    pub fn output_names(&self) -> &'static [&'static str] {
        match self.output {
            Output::Tied | Output::Untied | Output::MlmHead => &["logits"],
            Output::IndicatorHeads => &["selection", "weights"],
        }
    }

    /// Columns of all queries, and of all keys or values.
    pub fn qkv_widths(&self) -> (usize, usize) {
        (self.heads * self.head_width, self.key_value_heads * self.head_width)
    }

    /// Whether a sample is a row of tokens, whose number an id tells.
    pub fn is_language_model(&self) -> bool {
        self.input == Input::Tokens
    }
}
