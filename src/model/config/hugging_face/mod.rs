//! Hugging Face's `config.json`: one function per family of models.
//!
//! | file | contents |
//! | --- | --- |
//! | `mod.rs` | the families, and what all of them share |
//! | `llama.rs` | decoders with RMS norms, gates and rotary positions, and their relatives |
//! | `decoders.rs`, `encoders.rs` | the other families |
//! | `rope.rs` | rotary positions and their scaling |
//! | `fields.rs` | reading and refusing of fields |

mod decoders;
mod encoders;
mod fields;
mod llama;
mod rope;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

use super::super::{Dropout, GPT2, Input, Model, Output};
use fields::{Fields, short};

type Family = fn(&Fields<'_>) -> Result<Model>;

/// The supported values of `model_type`. A new one with known options is a row here and a function.
const FAMILIES: &[(&str, Family)] = &[
    ("gpt2", decoders::gpt2),
    ("llama", llama::llama),
    ("mistral", llama::mistral),
    ("ministral", llama::mistral),
    ("ministral3", llama::mistral),
    ("qwen2", llama::qwen2),
    ("qwen2_vl", llama::qwen2),
    ("qwen2_vl_text", llama::qwen2),
    ("qwen2_5_vl", llama::qwen2),
    ("qwen2_5_vl_text", llama::qwen2),
    ("qwen3", llama::qwen3),
    ("qwen3_vl_text", llama::qwen3),
    ("phi3", llama::phi3),
    ("internlm2", llama::internlm2),
    ("gemma", llama::gemma),
    ("gemma2", llama::gemma2),
    ("gemma3", llama::gemma3),
    ("gemma3_text", llama::gemma3),
    ("granite", llama::granite),
    ("minicpm", llama::minicpm),
    ("olmo", llama::olmo),
    ("olmo2", llama::olmo2),
    ("olmo3", llama::olmo3),
    ("smollm3", llama::smollm3),
    ("ernie4_5", llama::ernie),
    ("nanochat", llama::nanochat),
    ("gpt_bigcode", decoders::gpt_bigcode),
    ("gpt_neox", decoders::gpt_neox),
    ("opt", decoders::opt),
    ("phi", decoders::phi),
    ("stablelm", decoders::stablelm),
    ("starcoder2", decoders::starcoder2),
    ("bert", encoders::bert),
    ("distilbert", encoders::distilbert),
    ("roberta", encoders::roberta),
    ("camembert", encoders::roberta),
    ("xlm-roberta", encoders::roberta),
];

/// The options that families share. Each family sets the sizes.
const BASE: Model = Model {
    key_value_heads: 0,
    head_width: 0,
    dropout: Dropout::NONE,
    input: Input::Tokens,
    output: Output::Tied,
    lora: None,
    ..GPT2
};

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

/// Fields that a multimodal configuration has outside its `text_config`.
const SHARED_FIELDS: [&str; 4] =
    ["tie_word_embeddings", "quantization", "quantization_config", "is_encoder_decoder"];

/// Parses a configuration.
///
/// # Errors
/// Returns an error that names a field if it is invalid or not implemented.
pub fn parse(json: &Value) -> Result<Configuration> {
    let all = json.as_object().context("not a JSON object")?;
    let name = all.get("_name_or_path").and_then(Value::as_str).map(str::to_owned);
    let Some(Value::Object(text)) = all.get("text_config") else {
        let (model, mut notes) = parse_text(all)?;
        notes.splice(0..0, other_head(all));
        return Ok(Configuration { model, name, notes });
    };
    let mut merged = text.clone();
    for (key, value) in all.iter().filter(|(key, _)| SHARED_FIELDS.contains(&key.as_str())) {
        merged.entry(key.clone()).or_insert_with(|| value.clone());
    }
    if let Some(family) = all.get("model_type") {
        merged.entry("model_type").or_insert_with(|| family.clone());
    }
    let (model, mut notes) = parse_text(&merged).context("text_config")?;
    let other =
        |key: &&String| key.ends_with("_config") && !key.starts_with("text") && !key.starts_with("quant");
    let others: Vec<&str> = all.keys().filter(other).map(String::as_str).collect();
    let without = if others.is_empty() { String::new() } else { format!(", without {}", others.join(", ")) };
    notes.insert(0, format!("the measured model is the text part (text_config){without}"));
    Ok(Configuration { model, name, notes })
}

/// Parses the fields of a language model.
fn parse_text(all: &Map<String, Value>) -> Result<(Model, Vec<String>)> {
    let f = Fields::new(all);
    for name in ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"] {
        f.require_one_of(name, &[0.into(), 1.into()])?;
    }
    for name in ["add_cross_attention", "is_encoder_decoder", "is_decoder"] {
        f.require_one_of(name, &[false.into()])?;
    }
    // The parts of multimodal models have the families of their text.
    let is_plain = |name: &&str| !name.ends_with("_text") && !name.contains("_vl");
    let names = || FAMILIES.iter().map(|(name, _)| *name).filter(is_plain).collect::<Vec<_>>().join(", ");
    let way_out = || format!("use {}, or describe the model in TOML (src/model/README.md)", names());
    let family = match f.get("model_type") {
        Some(family) => family.clone(),
        None => {
            let guess = guess_family(all).with_context(|| format!("model_type is missing: {}", way_out()))?;
            f.note(format!("model_type is missing: reads the file as that of a {guess} model"));
            guess.into()
        }
    };
    let Some((_, build)) = FAMILIES.iter().find(|(name, _)| family == *name) else {
        bail!("model_type is {}, which is not implemented: {}", short(&family), way_out())
    };
    let mut model = build(&f)?;
    f.require_equal_layers()?;
    model.tokens = model.tokens.min(f.max_tokens());
    if model.causal && (!f.flag("is_causal", true)? || f.flag("use_bidirectional_attention", false)?) {
        model.causal = false;
        f.note(
            "attention is in both directions, as the file says, with the loss of the next token".to_owned(),
        );
    }
    if [f.get("quantization_config"), f.get("quantization")].iter().any(Option::is_some) {
        f.note(
            "the measured step is that of the unquantized model, although the file says quantization"
                .to_owned(),
        );
    }
    Ok((model, f.into_notes()))
}

/// Returns the family of a configuration without `model_type`, which files before 2020 lack.
fn guess_family(all: &Map<String, Value>) -> Option<&'static str> {
    let class = all.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
    let plain = |text: &str| text.to_lowercase().replace(['_', '-'], "");
    let is_class = |family: &str| {
        let rest = class.and_then(|class| plain(class).strip_prefix(&plain(family)).map(str::to_owned));
        rest.is_some_and(|rest| ["for", "lmhead", "model"].iter().any(|word| rest.starts_with(word)))
    };
    let named = FAMILIES.iter().map(|(family, _)| *family).find(|family| is_class(family));
    let has = |names: &[&str]| names.iter().all(|name| all.contains_key(*name));
    named.or_else(|| {
        if has(&["n_embd", "n_layer", "n_head"]) {
            Some("gpt2")
        } else if class.is_none() && has(&["hidden_size", "type_vocab_size", "attention_probs_dropout_prob"])
        {
            Some("bert")
        } else {
            None
        }
    })
}

/// Returns a note if the file describes a model with another head.
fn other_head(all: &Map<String, Value>) -> Option<String> {
    let named = all.get("architectures")?.as_array()?.first()?.as_str()?;
    let known = LANGUAGE_MODEL_HEADS.iter().any(|head| named.ends_with(head));
    (!known).then(|| format!("the measured model has a language-model head instead of that of {named}"))
}
