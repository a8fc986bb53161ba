//! Hugging Face's `config.json`: one function per family of models.

use std::cell::RefCell;
use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

use super::super::{Activation, Biases, Dropout, GPT2, Input, Model, NormKind, NormOrder, Output, Position};
use super::validate::MAX_SIZE;
use crate::text::shortened;

type Family = fn(&Fields<'_>) -> Result<Model>;

/// The supported values of `model_type`. A new one with known options is a row here and a function below.
const FAMILIES: &[(&str, Family)] = &[
    ("gpt2", gpt2),
    ("llama", llama),
    ("mistral", |f| rotary_decoder(f, Biases::NONE, 4096 * 32)),
    ("qwen2", |f| rotary_decoder(f, Biases { qkv: true, ..Biases::NONE }, 32768)),
    ("qwen3", qwen3),
    ("bert", bert),
];

/// Fields that do not change the computation of a training step.
const IGNORED_FIELDS: &str = "
    _attn_implementation_autoset _commit_hash _name_or_path architectures attn_implementation auto_map
    bos_token_id chunk_size_feed_forward classifier_dropout cls_token_id directionality dtype eos_token_id
    finetuning_task gradient_checkpointing id2label initializer_range is_llama_config
    keys_to_ignore_at_inference label2id max_window_layers model_type n_ctx output_attentions
    output_hidden_states output_past pad_token_id pretraining_tp problem_type return_dict sep_token_id
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    task_specific_params tokenizer_class torch_dtype transformers.js_config transformers_version
    unsloth_version use_cache use_return_dict";

/// A model from a configuration, without its final name.
pub struct Configuration {
    pub model: Model,
    /// `_name_or_path`.
    pub name: Option<String>,
    /// Messages about what the measured step leaves out.
    pub notes: Vec<String>,
}

/// Heads of the measured models, as the names in `architectures` end.
const LANGUAGE_MODEL_HEADS: [&str; 4] = ["LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForPreTraining"];

/// Parses a configuration.
///
/// # Errors
/// Returns an error that names a field if it is invalid or not implemented.
pub fn parse(json: &Value) -> Result<Configuration> {
    let f = Fields { all: json.as_object().context("not a JSON object")?, used: RefCell::default() };
    let names = || FAMILIES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    let way_out = || format!("use {}, or describe the model in TOML (src/model/README.md)", names());
    let family = f.get("model_type").with_context(|| format!("model_type is missing: {}", way_out()))?;
    // No family supports these fields. The listed values change nothing.
    for name in [
        "quantization_config",
        "quantization",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "no_rope_layers",
    ] {
        f.require_one_of(name, &[])?;
    }
    for name in ["num_experts", "num_local_experts", "n_routed_experts"] {
        f.require_one_of(name, &[0.into(), 1.into()])?;
    }
    for name in ["add_cross_attention", "is_encoder_decoder", "is_decoder", "tie_encoder_decoder"] {
        f.require_one_of(name, &[false.into()])?;
    }
    let known = FAMILIES.iter().find(|(name, _)| family == name);
    let Some((_, build)) = known else {
        bail!("model_type is {}, which is not implemented: {}", short(family), way_out())
    };
    let model = build(&f)?;
    let name = f.all.get("_name_or_path").and_then(Value::as_str).map(str::to_owned);
    let notes = f.other_head().into_iter().chain(f.unknown_fields()).collect();
    Ok(Configuration { model, name, notes })
}

/// The options that families share. Each family sets the sizes.
const BASE: Model = Model {
    key_value_heads: 0,
    head_width: 0,
    dropout: Dropout::NONE,
    input: Input::Tokens,
    output: Output::Tied,
    ..GPT2
};

/// GPT-2 (<https://huggingface.co/docs/transformers/model_doc/gpt2>).
fn gpt2(f: &Fields<'_>) -> Result<Model> {
    f.require_one_of("scale_attn_weights", &[true.into()])?;
    f.require_one_of("scale_attn_by_inverse_layer_idx", &[false.into()])?;
    f.require_one_of("reorder_and_upcast_attn", &[false.into()])?;
    let width = f.size("n_embd")?;
    Ok(Model {
        tokens: f.optional_size("n_positions")?.unwrap_or(1024),
        width,
        layers: f.size("n_layer")?,
        heads: f.size("n_head")?,
        ffn_width: f.optional_size("n_inner")?.unwrap_or(4 * width),
        vocabulary: f.size("vocab_size")?,
        norm: NormKind::Layer { eps: f.number("layer_norm_epsilon", 1e-5)? },
        activation: f.activation("activation_function", "gelu_new")?,
        dropout: Dropout {
            embedding: f.number("embd_pdrop", 0.1)?,
            weights: f.number("attn_pdrop", 0.1)?,
            residual: f.number("resid_pdrop", 0.1)?,
            ..Dropout::NONE
        },
        output: f.tied_or_untied(true)?,
        ..BASE
    })
}

/// BERT with its head for masked tokens (<https://huggingface.co/docs/transformers/model_doc/bert>).
fn bert(f: &Fields<'_>) -> Result<Model> {
    f.require_one_of("position_embedding_type", &["absolute".into()])?;
    f.require_one_of("tie_word_embeddings", &[true.into()])?;
    let dropout = f.number("hidden_dropout_prob", 0.1)?;
    f.optional_size("type_vocab_size")?;
    Ok(Model {
        tokens: f.optional_size("max_position_embeddings")?.unwrap_or(512),
        width: f.size("hidden_size")?,
        layers: f.size("num_hidden_layers")?,
        heads: f.size("num_attention_heads")?,
        ffn_width: f.size("intermediate_size")?,
        vocabulary: f.size("vocab_size")?,
        norm: NormKind::Layer { eps: f.number("layer_norm_eps", 1e-12)? },
        norm_order: NormOrder::PostNorm,
        embedding_norm: true,
        final_norm: false,
        token_type: true,
        activation: f.activation("hidden_act", "gelu")?,
        causal: false,
        dropout: Dropout {
            embedding: dropout,
            weights: f.number("attention_probs_dropout_prob", 0.1)?,
            residual: dropout,
            ..Dropout::NONE
        },
        output: Output::MlmHead,
        ..BASE
    })
}

fn llama(f: &Fields<'_>) -> Result<Model> {
    let attention = f.flag("attention_bias", false)?;
    let feed_forward = f.flag("mlp_bias", false)?;
    rotary_decoder(f, Biases { qkv: attention, out: attention, feed_forward }, 2048)
}

fn qwen3(f: &Fields<'_>) -> Result<Model> {
    let bias = f.flag("attention_bias", false)?;
    let m = rotary_decoder(f, Biases { qkv: bias, out: bias, feed_forward: false }, 32768)?;
    let norm = NormKind::Rms { eps: m.norm.eps(), weight: true };
    Ok(Model { qk_norm: Some(norm), head_width: f.optional_size("head_dim")?.unwrap_or(128), ..m })
}

/// Llama (<https://huggingface.co/docs/transformers/model_doc/llama>) and the families that share its options.
/// `default_tokens` is the family's default of `max_position_embeddings`.
fn rotary_decoder(f: &Fields<'_>, bias: Biases, default_tokens: usize) -> Result<Model> {
    f.require_one_of("is_causal", &[true.into()])?;
    f.require_one_of("use_bidirectional_attention", &[false.into()])?;
    f.require_one_of("partial_rotary_factor", &[1.into(), 1.0.into()])?;
    f.require_one_of("rope_interleaved", &[false.into()])?;
    let mut tokens = f.optional_size("max_position_embeddings")?.unwrap_or(default_tokens);
    // The model runs with at most as many tokens as its window has. Qwen has a switch for the window.
    let windowed = f.flag("use_sliding_window", !f.all.contains_key("use_sliding_window"))?;
    if let Some(window) = f.optional_size("sliding_window")?.filter(|_| windowed) {
        tokens = tokens.min(window);
    }
    if let Some(types) = f.get("layer_types") {
        let full = types.as_array().is_some_and(|all| all.iter().all(|t| t == "full_attention"));
        ensure!(full, "layer_types is {}, which is not implemented: use only full_attention", short(types));
    }
    Ok(Model {
        tokens,
        width: f.size("hidden_size")?,
        layers: f.size("num_hidden_layers")?,
        heads: f.size("num_attention_heads")?,
        key_value_heads: f.optional_size("num_key_value_heads")?.unwrap_or(0),
        head_width: f.optional_size("head_dim")?.unwrap_or(0),
        ffn_width: f.size("intermediate_size")?,
        vocabulary: f.size("vocab_size")?,
        norm: NormKind::Rms { eps: f.number("rms_norm_eps", 1e-6)?, weight: true },
        position: Position::Rotary { theta: rope_theta(f)? },
        activation: f.activation("hidden_act", "silu")?,
        glu: true,
        bias,
        dropout: Dropout { weights: f.number("attention_dropout", 0.0)?, ..Dropout::NONE },
        output: f.tied_or_untied(false)?,
        ..BASE
    })
}

/// Returns `rope_theta` from either place that files have it in. Scaled positions are an error.
fn rope_theta(f: &Fields<'_>) -> Result<f64> {
    let mut theta = f.number("rope_theta", 1e4)?;
    for name in ["rope_scaling", "rope_parameters"] {
        let Some(value) = f.get(name) else { continue };
        let kind = value.get("rope_type").or_else(|| value.get("type")).unwrap_or(&Value::Null);
        ensure!(
            kind == "default",
            "{name} is {}, which is not implemented: use null, or rope_type \"default\"",
            short(value)
        );
        if let Some(own) = value.get("rope_theta") {
            let number = own.as_f64();
            theta = number.with_context(|| format!("{name}.rope_theta is {}: use a number", short(own)))?;
        }
        let factor = value.get("partial_rotary_factor").and_then(Value::as_f64).unwrap_or(1.0);
        ensure!(factor == 1.0, "{name}.partial_rotary_factor is {factor}, which is not implemented: use 1");
    }
    Ok(theta)
}

/// The fields of a configuration, and the names of those that were read.
struct Fields<'a> {
    all: &'a Map<String, Value>,
    used: RefCell<BTreeSet<&'static str>>,
}

impl Fields<'_> {
    /// Returns a field, or `None` if it is missing or null.
    fn get(&self, name: &'static str) -> Option<&Value> {
        self.used.borrow_mut().insert(name);
        self.all.get(name).filter(|value| !value.is_null())
    }

    fn optional_size(&self, name: &'static str) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let size = value.as_u64().filter(|&n| n > 0 && n <= MAX_SIZE as u64);
        let error = || format!("{name} is {}: use a whole number from 1 to {MAX_SIZE}", short(value));
        Ok(Some(size.with_context(error)? as usize))
    }

    fn size(&self, name: &'static str) -> Result<usize> {
        self.optional_size(name)?.with_context(|| format!("{name} is missing"))
    }

    fn number(&self, name: &'static str, default: f64) -> Result<f64> {
        let Some(value) = self.get(name) else { return Ok(default) };
        value.as_f64().with_context(|| format!("{name} is {}: use a number", short(value)))
    }

    fn flag(&self, name: &'static str, default: bool) -> Result<bool> {
        let Some(value) = self.get(name) else { return Ok(default) };
        value.as_bool().with_context(|| format!("{name} is {}: use true or false", short(value)))
    }

    fn tied_or_untied(&self, default: bool) -> Result<Output> {
        Ok(if self.flag("tie_word_embeddings", default)? { Output::Tied } else { Output::Untied })
    }

    /// Refuses a field with a value that is not in `allowed`. A missing field and null are allowed.
    fn require_one_of(&self, name: &'static str, allowed: &[Value]) -> Result<()> {
        match self.get(name) {
            Some(value) if !allowed.contains(value) => {
                let words: Vec<String> = allowed.iter().map(ToString::to_string).collect();
                let words = if words.is_empty() { "null".to_owned() } else { words.join(" or ") };
                bail!("{name} is {}, which is not implemented: use {words}", short(value))
            }
            _ => Ok(()),
        }
    }

    fn activation(&self, name: &'static str, default: &str) -> Result<Activation> {
        let value = self.get(name).map_or(Ok(default), |v| {
            v.as_str().with_context(|| format!("{name} is {}: use a text", short(v)))
        })?;
        Ok(match value {
            "gelu" => Activation::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
            "silu" | "swish" => Activation::Silu,
            "relu" => Activation::Relu,
            "relu2" => Activation::ReluSquared,
            _ => bail!(
                "{name} is {}, which is not implemented: use gelu, gelu_new, silu, relu or relu2",
                short(&value.into())
            ),
        })
    }

    /// Returns a note if the file describes a model with another head.
    fn other_head(&self) -> Option<String> {
        let all = self.all.get("architectures")?.as_array()?;
        let named = all.first()?.as_str()?;
        let known = LANGUAGE_MODEL_HEADS.iter().any(|head| named.ends_with(head));
        (!known).then(|| format!("the measured model has a language-model head instead of that of {named}"))
    }

    /// Returns a note about the fields that were not read, or `None` if there are none.
    fn unknown_fields(&self) -> Option<String> {
        let used = self.used.borrow();
        let ignored = |name: &str| IGNORED_FIELDS.split_whitespace().any(|field| field == name);
        let unknown: Vec<String> = self
            .all
            .iter()
            .filter(|(name, value)| !used.contains(name.as_str()) && !ignored(name) && !value.is_null())
            .map(|(name, value)| format!("{} ({})", shortened(name.clone(), MAX_CHARS), short(value)))
            .collect();
        let fields = if unknown.len() == 1 { "field" } else { "fields" };
        let shown = unknown[..unknown.len().min(MAX_FIELDS)].join(", ");
        let more = match unknown.len().saturating_sub(MAX_FIELDS) {
            0 => String::new(),
            count => format!(" and {count} more"),
        };
        (!unknown.is_empty()).then(|| format!("ignores the unknown {fields} {shown}{more}"))
    }
}

/// Largest number of unknown fields in a note.
const MAX_FIELDS: usize = 20;

/// Largest number of characters of a name or value in a message, before the mark of the cut.
const MAX_CHARS: usize = 60;

/// Formats a value for a message.
fn short(value: &Value) -> String {
    shortened(value.to_string(), MAX_CHARS)
}
