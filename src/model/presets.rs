//! The models of the suite, as values.

use super::*;

/// A post-norm encoder over 111 indicator tokens with two heads and a mixed loss; 4.8 M
/// parameters.
pub const INDICATOR: Model = Model {
    name: "indicator",
    tokens: 111,
    width: 256,
    layers: 6,
    heads: 8,
    head_width: 32,
    hidden: 1024,
    vocabulary: 0,
    norm: NormKind::Layer { eps: 1e-5 },
    norm_place: NormPlace::After,
    position: Position::Learned,
    activation: Activation::Gelu,
    causal: false,
    dropout: Dropout::everywhere(0.1),
    input: Input::Indicator { market: 10 },
    output: Output::IndicatorHeads,
};

/// GPT-2 small (Radford et al. 2019) with a vocabulary rounded up to a multiple of 128; 124 M
/// parameters.
pub const GPT2: Model = Model {
    name: "gpt2",
    tokens: 1024,
    width: 768,
    layers: 12,
    heads: 12,
    head_width: 64,
    hidden: 3072,
    vocabulary: 50304,
    norm: NormKind::Layer { eps: 1e-5 },
    norm_place: NormPlace::Before,
    position: Position::Learned,
    activation: Activation::GeluTanh,
    causal: true,
    dropout: Dropout::NONE,
    input: Input::Tokens,
    output: Output::Tied,
};

impl Model {
    /// The same choices at sizes that the oracle can follow.
    const fn miniature(self, name: &'static str, tokens: usize) -> Self {
        let vocabulary = if self.vocabulary > 0 { 64 } else { 0 };
        Self { name, tokens, width: 32, layers: 2, heads: 4, head_width: 8, hidden: 128, vocabulary, ..self }
    }
}

/// Every model that a case can be of; a full one stands before its miniature.
static MODELS: [Model; 4] =
    [INDICATOR, INDICATOR.miniature("indicator-tiny", 8), GPT2, GPT2.miniature("gpt2-tiny", 16)];

/// A model of the list, by its place in it: small, and equal only to itself.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelId(usize);

impl ModelId {
    /// The full models.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..MODELS.len()).step_by(2).map(Self)
    }

    /// All, the miniatures too.
    pub fn with_miniatures() -> impl Iterator<Item = Self> {
        (0..MODELS.len()).map(Self)
    }

    /// The model of a name.
    pub fn named(name: &str) -> Option<Self> {
        Self::with_miniatures().find(|id| id.name == name)
    }

    pub const fn indicator() -> Self {
        Self(0)
    }

    /// Itself where it is one.
    pub fn miniature(self) -> Self {
        Self(self.0 | 1)
    }

    pub fn is_miniature(self) -> bool {
        self.0 % 2 == 1
    }
}

impl Deref for ModelId {
    type Target = Model;

    fn deref(&self) -> &Model {
        &MODELS[self.0]
    }
}

impl fmt::Debug for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name)
    }
}
