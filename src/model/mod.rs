//! A model is a value: sizes and choices. Everything else of it follows from them, each in
//! one place: parameters, fixture, oracle, cost, and both frameworks' networks.
//!
//! | file | what |
//! | --- | --- |
//! | `presets.rs` | the two models of the suite, and their miniatures |
//! | `parameters.rs` | names, dims, initial values and order of the parameters |
//! | `fixture.rs` | seeded inputs, targets and parameters of a case |
//! | `oracle/` | the same mathematics in f64: one scalar at a time, and in matrix products |
//!
//! Letters as everywhere: B batch, N (T) tokens, D width, H heads, F hidden, V vocabulary.

pub mod fixture;
pub mod oracle;
pub mod parameters;
mod presets;

use std::fmt;
use std::ops::Deref;

pub use presets::{GPT2, INDICATOR, ModelId};

/// Where a normalisation stands in a block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormPlace {
    /// x + f(norm(x)) (GPT-2).
    Before,
    /// norm(x + f(x)) (Vaswani et al. 2017).
    After,
}

/// How features are normalised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormKind {
    /// Layer normalisation with weight and bias (Ba et al. 2016).
    Layer { eps: f64 },
}

/// How a token's place enters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Position {
    /// A learned vector [N, D], added to the embedding.
    Learned,
}

/// Between the two projections of the feed-forward part.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// x·Φ(x) (Hendrycks and Gimpel 2016).
    Gelu,
    /// Its tanh approximation, as GPT-2 has it.
    GeluTanh,
}

/// What the model reads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Input {
    /// `tokens` [B, T], embedded by a table [V, D].
    Tokens,
    /// `values` [B, N] and `market` [B, features], each through a linear layer.
    Indicator { market: usize },
}

/// What the model puts out; its loss follows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Output {
    /// Logits [B, T, V] by the embedding's transpose; cross-entropy with the next token.
    Tied,
    /// Two heads D → D/2, ReLU, → 1: selection logits, and weights by softmax over N. Loss:
    /// BCE with logits + 0.5·MSE(weights, t) + 0.1·mean(σ(selection)).
    IndicatorHeads,
}

/// Dropout probability at each place where a training step draws.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
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
        Self { weights: p, residual: p, hidden: p, heads: p }
    }

    pub fn any(&self) -> bool {
        [self.weights, self.residual, self.hidden, self.heads].iter().any(|p| *p > 0.0)
    }
}

/// Sizes and choices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Model {
    /// `[a-z0-9-]+`
    pub name: &'static str,
    /// Tokens N of a sample.
    pub tokens: usize,
    pub width: usize,
    pub layers: usize,
    pub heads: usize,
    pub head_width: usize,
    pub hidden: usize,
    /// 0 where it has none.
    pub vocabulary: usize,
    pub norm: NormKind,
    pub norm_place: NormPlace,
    pub position: Position,
    pub activation: Activation,
    pub causal: bool,
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
            Output::Tied => &["logits"],
            Output::IndicatorHeads => &["selection", "weights"],
        }
    }

    /// Whether a sample is a row of tokens, whose number an id tells.
    pub fn of_tokens(&self) -> bool {
        self.input == Input::Tokens
    }
}
