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
    key_value_heads: 8,
    head_width: 32,
    ffn_width: 1024,
    vocabulary: 0,
    norm: NormKind::Layer { eps: 1e-5 },
    norm_order: NormOrder::PostNorm,
    qk_norm: None,
    embedding_norm: false,
    final_norm: true,
    position: Position::Learned,
    token_type: false,
    activation: Activation::Gelu,
    glu: false,
    bias: Biases::ALL,
    causal: false,
    dropout: Dropout { embedding: 0.0, ..Dropout::everywhere(0.1) },
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
    key_value_heads: 12,
    head_width: 64,
    ffn_width: 3072,
    vocabulary: 50304,
    norm: NormKind::Layer { eps: 1e-5 },
    norm_order: NormOrder::PreNorm,
    qk_norm: None,
    embedding_norm: false,
    final_norm: true,
    position: Position::Learned,
    token_type: false,
    activation: Activation::GeluTanh,
    glu: false,
    bias: Biases::ALL,
    causal: true,
    dropout: Dropout::NONE,
    input: Input::Tokens,
    output: Output::Tied,
};

/// Choices that neither model makes, at sizes that the oracle can follow: what a file may ask for is
/// tried in every test, whether or not one is given.
pub const CHOICE_MODELS: [Model; 3] = [
    // As Llama and Qwen 2: grouped heads, rotary, gated SiLU, an output of its own, biases of q, k, v.
    Model {
        key_value_heads: 2,
        norm: NormKind::Rms { eps: 1e-5, weight: true },
        position: Position::Rotary { theta: 1e4 },
        activation: Activation::Silu,
        glu: true,
        bias: Biases { qkv: true, ..Biases::NONE },
        output: Output::Untied,
        ..GPT2.miniature("grouped-tiny", 16)
    },
    // As nanochat and Qwen 3: norms without weights, norms of queries and keys, squared ReLU.
    Model {
        norm: NormKind::Rms { eps: 1e-6, weight: false },
        qk_norm: Some(NormKind::Rms { eps: 1e-6, weight: true }),
        embedding_norm: true,
        position: Position::Rotary { theta: 1e5 },
        activation: Activation::ReluSquared,
        bias: Biases::NONE,
        ..GPT2.miniature("normed-tiny", 16)
    },
    // As BERT, with its dropout.
    Model {
        norm_order: NormOrder::PostNorm,
        embedding_norm: true,
        final_norm: false,
        token_type: true,
        activation: Activation::Gelu,
        causal: false,
        dropout: Dropout { hidden: 0.0, heads: 0.0, ..Dropout::everywhere(0.1) },
        output: Output::MlmHead,
        ..GPT2.miniature("masked-tiny", 16)
    },
];

impl Model {
    /// The same choices at sizes that the oracle can follow.
    const fn miniature(self, name: &'static str, tokens: usize) -> Self {
        let vocabulary = if self.vocabulary > 0 { 64 } else { 0 };
        let key_value_heads = match self.key_value_heads {
            1 => 1,
            shared if shared < self.heads => 2,
            _ => 4,
        };
        Self {
            name,
            tokens,
            width: 32,
            layers: 2,
            heads: 4,
            key_value_heads,
            head_width: 8,
            ffn_width: 128,
            vocabulary,
            ..self
        }
    }
}

/// Every model that a case can be of, beside those that are given; a full one stands before its
/// miniature.
static MODELS: [Model; 4] =
    [INDICATOR, INDICATOR.miniature("indicator-tiny", 8), GPT2, GPT2.miniature("gpt2-tiny", 16)];

/// Models that this process has added; they stay for its life.
static INTERNED: Mutex<Vec<&'static Model>> = Mutex::new(Vec::new());

/// Those of a name that ids may use, with the configuration that the name stands for.
static CUSTOM: Mutex<Vec<Model>> = Mutex::new(Vec::new());

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

    /// The suite's own model of a name.
    pub fn named(name: &str) -> Option<Self> {
        Self::with_miniatures().find(|id| id.name == name)
    }

    /// A model that was given under a name, at so many tokens.
    pub fn custom(name: &str, tokens: Option<usize>) -> Option<Self> {
        let model = *CUSTOM.lock().expect("no panic holds it").iter().find(|m| m.name == name)?;
        Some(Self::intern(Model { tokens: tokens.unwrap_or(model.tokens), ..model }))
    }

    /// The names of models that were given.
    pub fn custom_names() -> Vec<&'static str> {
        CUSTOM.lock().expect("no panic holds it").iter().map(|m| m.name).collect()
    }

    /// Lets ids name a model, at any number of tokens.
    ///
    /// # Errors
    /// Where the name stands for another already.
    pub fn register(model: Model) -> Result<(), String> {
        let mut given = CUSTOM.lock().expect("no panic holds it");
        let taken = |known: &&Model| known.name == model.name;
        let same = |known: &Model| Model { tokens: model.tokens, ..*known } == model;
        if let Some(known) = given.iter().find(taken) {
            if same(known) {
                return Ok(());
            }
            return Err(format!(
                "model '{0}' is another configuration here than there: rename one (the folder of its \
                 config.json, or `name`)",
                model.name
            ));
        }
        given.push(model);
        Ok(())
    }

    pub const fn indicator() -> Self {
        Self(0)
    }

    /// A model that is on no list, for this process.
    pub fn intern(model: Model) -> Self {
        let mut added = INTERNED.lock().expect("no panic holds it");
        let known = added.iter().position(|known| **known == model);
        Self(
            MODELS.len()
                + known.unwrap_or_else(|| {
                    added.push(Box::leak(Box::new(model)));
                    added.len() - 1
                }),
        )
    }

    /// Whether it is one of the suite's own: its blocks are named by their sizes.
    pub fn is_preset(self) -> bool {
        self.0 < MODELS.len()
    }

    /// The same choices at small sizes; itself where it is small.
    pub fn miniature(self) -> Self {
        if self.is_miniature() {
            return self;
        }
        if self.is_preset() {
            return Self(self.0 | 1);
        }
        let name = Box::leak(format!("{}-tiny", self.name).into_boxed_str());
        Self::intern((*self).miniature(name, MODELS[3].tokens))
    }

    /// Whether the scalar oracle can follow.
    pub fn is_miniature(self) -> bool {
        self.width <= MODELS[1].width && self.tokens <= MODELS[3].tokens
    }
}

impl Deref for ModelId {
    type Target = Model;

    fn deref(&self) -> &Model {
        MODELS
            .get(self.0)
            .unwrap_or_else(|| INTERNED.lock().expect("no panic holds it")[self.0 - MODELS.len()])
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
