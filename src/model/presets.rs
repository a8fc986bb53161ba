//! The built-in models, and the registry of models of this process.

use std::sync::Mutex;

use anyhow::{Result, ensure};

use super::*;

/// A post-norm encoder over 111 indicator tokens with two output heads and a mixed loss; 4.8 M parameters.
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
    norm: NormKind::layer(1e-5),
    norm_order: NormOrder::PostNorm,
    qk_norm: None,
    qk_norm_across_heads: false,
    embedding_norm: false,
    final_norm: true,
    position: Position::Learned,
    window: None,
    second_attention: None,
    token_type: false,
    activation: Activation::Gelu,
    glu: false,
    bias: Biases::ALL,
    causal: false,
    scale: Scales::NONE,
    cap: Caps::NONE,
    dropout: Dropout { embedding: 0.0, ..Dropout::everywhere(0.1) },
    input: Input::Indicator { market: 10 },
    output: Output::IndicatorHeads,
    lora: None,
};

/// GPT-2 small (Radford et al. 2019), with the vocabulary rounded up to a multiple of 128; 124 M parameters.
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
    norm: NormKind::layer(1e-5),
    norm_order: NormOrder::PreNorm,
    qk_norm: None,
    qk_norm_across_heads: false,
    embedding_norm: false,
    final_norm: true,
    position: Position::Learned,
    window: None,
    second_attention: None,
    token_type: false,
    activation: Activation::GeluTanh,
    glu: false,
    bias: Biases::ALL,
    causal: true,
    scale: Scales::NONE,
    cap: Caps::NONE,
    dropout: Dropout::NONE,
    input: Input::Tokens,
    output: Output::Tied,
    lora: None,
};

/// nanochat of 7 January 2026 (<https://github.com/karpathy/nanochat>, commit ccf4b7f) at depth 12; 135 M parameters.
/// Width and heads follow from the depth, as in its training script. It is the last version before learned factors of the
/// residual stream, windows and value embeddings.
pub const NANOCHAT_D12: Model = Model {
    name: "nanochat-d12",
    tokens: 2048,
    heads: 6,
    key_value_heads: 6,
    head_width: 128,
    vocabulary: 1 << 15,
    norm: NANOCHAT_NORM,
    qk_norm: Some(NANOCHAT_NORM),
    embedding_norm: true,
    position: Position::Rotary(Rotary::new(1e4)),
    activation: Activation::ReluSquared,
    bias: Biases::NONE,
    cap: Caps { scores: None, logits: Some(15.0) },
    output: Output::Untied,
    ..GPT2
};

/// The norm of nanochat, with PyTorch's default ε in f32.
const NANOCHAT_NORM: NormKind = NormKind::Rms { eps: f32::EPSILON as f64, weight: false, offset: false };

/// nanochat at depth 4, for CPUs; 20 M parameters.
pub const NANOCHAT_D4: Model = Model {
    name: "nanochat-d4",
    width: 256,
    layers: 4,
    heads: 2,
    key_value_heads: 2,
    ffn_width: 1024,
    ..NANOCHAT_D12
};

/// Miniatures with the options that no built-in model has, so that the tests cover the options of custom models.
pub const OPTION_MODELS: [Model; 6] = [
    // Like Llama and Qwen 2: grouped heads, rotary positions, gated SiLU, an untied output, biases of q, k, v.
    Model {
        key_value_heads: 2,
        norm: NormKind::rms(1e-5),
        position: Position::Rotary(Rotary::new(1e4)),
        activation: Activation::Silu,
        glu: true,
        bias: Biases { qkv: true, ..Biases::NONE },
        output: Output::Untied,
        ..GPT2.miniature("grouped-tiny", 16)
    },
    // Like nanochat and Qwen 3: norms without weights, norms of queries and keys, squared ReLU.
    Model {
        norm: NormKind::Rms { eps: 1e-6, weight: false, offset: false },
        qk_norm: Some(NormKind::rms(1e-6)),
        embedding_norm: true,
        position: Position::Rotary(Rotary::new(1e5)),
        activation: Activation::ReluSquared,
        bias: Biases::NONE,
        ..GPT2.miniature("normed-tiny", 16)
    },
    // Like BERT, with its dropout.
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
    // Like Gemma 2 and 3 and Granite: norms around each block with an offset, caps, factors, and two kinds of
    // attention, with a window in one.
    Model {
        key_value_heads: 1,
        norm: NormKind::Rms { eps: 1e-6, weight: true, offset: true },
        norm_order: NormOrder::SandwichNorm,
        qk_norm: Some(NormKind::Rms { eps: 1e-6, weight: true, offset: true }),
        position: Position::Rotary(Rotary {
            frequencies: Some(&[0.5, 0.125, 0.02, 0.001]),
            ..Rotary::new(1e6)
        }),
        second_attention: Some(SecondAttention {
            layers: &[true, false],
            position: Position::Rotary(Rotary::new(1e4)),
            window: Some(5),
        }),
        glu: true,
        bias: Biases::NONE,
        scale: Scales {
            embedding: 5.656854249492381,
            scores: Some(0.25),
            residual: 0.5,
            hidden: 0.75,
            logits: 1.5,
        },
        cap: Caps { scores: Some(2.0), logits: Some(0.5) },
        ..GPT2.miniature("capped-tiny", 16)
    },
    // Like GPT-NeoX, Phi and ERNIE: parallel blocks, partial rotary positions in neighboring pairs with a factor, a
    // bias of the output, dropout of the embedding.
    Model {
        norm_order: NormOrder::Parallel,
        position: Position::Rotary(Rotary { share: 0.5, factor: 1.1875, pairs: true, ..Rotary::new(1e4) }),
        activation: Activation::Gelu,
        bias: Biases { output: true, ..Biases::ALL },
        dropout: Dropout { hidden: 0.0, heads: 0.0, attention: Some(0.0), ..Dropout::everywhere(0.1) },
        output: Output::Untied,
        ..GPT2.miniature("parallel-tiny", 16)
    },
    // Like OLMo 1 and 2 and SmolLM3: norms after each block without weight and bias, a query-key norm across heads,
    // layers without rotary positions, a window in both directions.
    Model {
        key_value_heads: 2,
        norm: NormKind::Layer { eps: 1e-5, weight: false, bias: false },
        norm_order: NormOrder::OutputNorm,
        qk_norm: Some(NormKind::rms(1e-6)),
        qk_norm_across_heads: true,
        position: Position::Rotary(Rotary::new(1e4)),
        window: Some(7),
        second_attention: Some(SecondAttention {
            layers: &[false, true],
            position: Position::None,
            window: None,
        }),
        activation: Activation::Silu,
        glu: true,
        bias: Biases::NONE,
        causal: false,
        ..GPT2.miniature("unturned-tiny", 16)
    },
];

impl Model {
    /// Returns a model with the same options at small sizes.
    const fn miniature(self, name: &'static str, tokens: usize) -> Self {
        let vocabulary = if self.vocabulary > 0 { 64 } else { 0 };
        let key_value_heads = match self.key_value_heads {
            1 => 1,
            shared if shared < self.heads => 2,
            _ => 4,
        };
        // Two layers have both kinds of attention.
        let second_attention = match self.second_attention {
            Some(second) => Some(SecondAttention { layers: &[true, false], ..second }),
            None => None,
        };
        Self {
            name,
            tokens,
            second_attention,
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

/// The built-in models. Each is followed by its miniature.
static MODELS: [Model; 8] = [
    INDICATOR,
    INDICATOR.miniature("indicator-tiny", 8),
    GPT2,
    GPT2.miniature("gpt2-tiny", 16),
    NANOCHAT_D12,
    NANOCHAT_D12.miniature("nanochat-d12-tiny", 16),
    NANOCHAT_D4,
    NANOCHAT_D4.miniature("nanochat-d4-tiny", 16),
];

/// Other models of this process. They live as long as the process.
static INTERNED: Mutex<Vec<&'static Model>> = Mutex::new(Vec::new());

/// Custom models that ids can name.
static CUSTOM: Mutex<Vec<Model>> = Mutex::new(Vec::new());

const UNPOISONED: &str = "no thread panics with the lock";

/// An index into the models of this process.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelId(usize);

impl ModelId {
    /// Returns the built-in models without their miniatures.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..MODELS.len()).step_by(2).map(Self)
    }

    /// Returns the built-in models and their miniatures.
    pub fn with_miniatures() -> impl Iterator<Item = Self> {
        (0..MODELS.len()).map(Self)
    }

    /// Returns the built-in model of a name.
    pub fn named(name: &str) -> Option<Self> {
        Self::with_miniatures().find(|id| id.name == name)
    }

    /// Returns the custom model of a name, with this number of tokens per sample.
    pub fn custom(name: &str, tokens: Option<usize>) -> Option<Self> {
        let model = *CUSTOM.lock().expect(UNPOISONED).iter().find(|m| m.name == name)?;
        Some(Self::intern(Model { tokens: tokens.unwrap_or(model.tokens), ..model }))
    }

    /// Returns the names of the custom models.
    pub fn custom_names() -> Vec<&'static str> {
        CUSTOM.lock().expect(UNPOISONED).iter().map(|m| m.name).collect()
    }

    /// Registers a custom model, so that ids can name it with any number of tokens and with any adapters.
    ///
    /// # Errors
    /// Returns an error if the name belongs to another configuration.
    pub fn register(model: Model) -> Result<()> {
        // Ids name the adapters.
        let model = Model { lora: None, ..model };
        let mut custom = CUSTOM.lock().expect(UNPOISONED);
        match custom.iter().find(|known| known.name == model.name) {
            Some(known) => ensure!(
                Model { tokens: model.tokens, ..*known } == model,
                "two configurations have the name '{}': rename one (the folder of its config.json, or `name`)",
                model.name
            ),
            None => custom.push(model),
        }
        Ok(())
    }

    pub const fn indicator() -> Self {
        Self(0)
    }

    /// Returns the id of a model, which it adds to the models of this process.
    pub fn intern(model: Model) -> Self {
        let mut interned = INTERNED.lock().expect(UNPOISONED);
        let index = interned.iter().position(|known| **known == model).unwrap_or_else(|| {
            interned.push(Box::leak(Box::new(model)));
            interned.len() - 1
        });
        Self(MODELS.len() + index)
    }

    /// Returns the model with other adapters, or without.
    pub fn with_lora(self, lora: Option<Lora>) -> Self {
        let model = Model { lora, ..*self };
        Self::with_miniatures().find(|id| **id == model).unwrap_or_else(|| Self::intern(model))
    }

    /// Returns true for a built-in model without adapters. Ids name its blocks by their sizes.
    pub fn is_preset(self) -> bool {
        self.0 < MODELS.len()
    }

    /// Returns the model with the same options at small sizes. A miniature returns itself.
    pub fn miniature(self) -> Self {
        if self.is_miniature() {
            return self;
        }
        if self.lora.is_some() {
            return self.with_lora(None).miniature().with_lora(self.lora);
        }
        if self.is_preset() {
            return Self(self.0 | 1);
        }
        Self::intern((*self).miniature(format!("{}-tiny", self.name).leak(), MODELS[3].tokens))
    }

    /// Returns true for models of a miniature's size. Their parity check covers the second training step.
    pub fn is_miniature(self) -> bool {
        self.width <= MODELS[1].width && self.tokens <= MODELS[3].tokens
    }
}

impl Deref for ModelId {
    type Target = Model;

    fn deref(&self) -> &Model {
        MODELS.get(self.0).unwrap_or_else(|| INTERNED.lock().expect(UNPOISONED)[self.0 - MODELS.len()])
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
