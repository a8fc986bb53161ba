//! The models of the suite, as values.

use std::sync::Mutex;

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

/// Models that this process has added; they stay for its life.
static ADDED: Mutex<Vec<&'static Model>> = Mutex::new(Vec::new());

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

    /// A model that is on no list, for this process.
    pub fn add(model: Model) -> Self {
        let mut added = ADDED.lock().expect("no panic holds it");
        let known = added.iter().position(|known| **known == model);
        Self(
            MODELS.len()
                + known.unwrap_or_else(|| {
                    added.push(Box::leak(Box::new(model)));
                    added.len() - 1
                }),
        )
    }

    /// Itself where it is one.
    pub fn miniature(self) -> Self {
        assert!(self.0 < MODELS.len(), "a model on the list");
        Self(self.0 | 1)
    }

    /// Whether the scalar oracle can follow.
    pub fn is_miniature(self) -> bool {
        self.width <= MODELS[1].width && self.tokens <= MODELS[3].tokens
    }
}

impl Deref for ModelId {
    type Target = Model;

    fn deref(&self) -> &Model {
        MODELS.get(self.0).unwrap_or_else(|| ADDED.lock().expect("no panic holds it")[self.0 - MODELS.len()])
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
