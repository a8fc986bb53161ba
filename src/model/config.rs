//! A model from a file: Hugging Face's `config.json`, or TOML in the words of [`Model`].
//!
//! What a configuration says is taken, refused or told. Refused is what would change the
//! mathematics and is not built; told is what nobody here knows.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Map, Value};

use super::{Activation, Biases, Dropout, Input, Model, NormKind, NormOrder, Output, Position, presets};

/// A model as its file has it, at the most tokens that it allows.
#[derive(Clone, Debug, PartialEq)]
pub struct ParsedModel {
    pub model: Model,
    /// What a user should know of the file, a line each.
    pub notes: Vec<String>,
}

/// Reads a `config.json`, a folder that holds one, or a TOML file.
///
/// # Errors
/// One line: what is wrong with the file, or which field says what is not built.
pub fn read(path: &Path) -> Result<ParsedModel> {
    let shown = path.display();
    let file = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
    let text = fs::read_to_string(&file).with_context(|| {
        format!(
            "{} can't be read: give a config.json, a folder that holds one, or a TOML file",
            file.display()
        )
    })?;
    let name = name_of(&file);
    let read = if file.extension().is_some_and(|e| e == "toml") {
        let model = toml::from_str(&text).map_err(|error| {
            anyhow!("{shown}: {}", error.to_string().split_whitespace().collect::<Vec<_>>().join(" "))
        })?;
        ParsedModel { model, notes: Vec::new() }
    } else {
        let value: Value =
            serde_json::from_str(&text).map_err(|error| anyhow!("{} is no JSON: {error}", file.display()))?;
        let Value::Object(all) = value else { bail!("{} is no JSON object", file.display()) };
        let fields = Fields { all: &all, used: RefCell::default() };
        let own = fields.all.get("_name_or_path").and_then(Value::as_str).filter(|text| !text.is_empty());
        let mut model = hugging_face(&fields).with_context(|| shown.to_string())?;
        model.name = leaked(&own.and_then(|text| text.rsplit('/').next()).map_or(name, str::to_owned));
        ParsedModel {
            model,
            notes: fields.unknown().map(|note| format!("{shown}: {note}")).into_iter().collect(),
        }
    };
    let model = complete(read.model).with_context(|| shown.to_string())?;
    Ok(ParsedModel { model, ..read })
}

fn leaked(text: &str) -> &'static str {
    Box::leak(text.to_owned().into_boxed_str())
}

/// What a file's place says of the model's name: the folder of a `config.json`, or the file itself.
fn name_of(file: &Path) -> String {
    let of = |path: Option<&Path>| path.and_then(Path::file_name).map(|n| n.to_string_lossy().into_owned());
    let absolute = fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
    if absolute.file_name().is_none_or(|n| n != "config.json") {
        return absolute.file_stem().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    }
    // Hugging Face's cache: models--OWNER--NAME/snapshots/COMMIT/config.json
    let cached = of(absolute.ancestors().nth(3)).filter(|name| name.starts_with("models--"));
    let cached = cached.and_then(|name| name.rsplit("--").next().map(str::to_owned));
    cached.or_else(|| of(absolute.parent())).unwrap_or_default()
}

/// Characters of a name: an id stays under 64 with the longest workload and precision.
const LONGEST_NAME: usize = 16;

/// A name as ids have it.
fn named(text: &str) -> String {
    let plain: String =
        text.to_lowercase().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let words: Vec<&str> = plain.split('-').filter(|word| !word.is_empty()).collect();
    let mut name: String = words.join("-").chars().take(LONGEST_NAME).collect();
    name.truncate(name.trim_end_matches('-').len());
    // Letters before a number begin sizes in an id.
    let sized = |word: &str| word.len() > 1 && word[1..].bytes().all(|b| b.is_ascii_digit());
    if name.is_empty() || sized(words[0]) {
        name = format!("m-{name}").trim_end_matches('-').chars().take(LONGEST_NAME).collect();
    }
    if presets::ModelId::named(&name).is_some() || name.ends_with("-tiny") {
        name = format!("own-{name}");
        name.truncate(LONGEST_NAME);
    }
    name
}

/// Largest number of anything that a size may be: four times the longest context and the widest
/// vocabulary in use.
const LARGEST: usize = 1 << 22;
/// Ten times the deepest in use.
const MOST_LAYERS: usize = 2000;

/// A model with what a file may leave out, if it can be built.
///
/// # Errors
/// One line: the choice or size that can't be.
pub fn complete(mut m: Model) -> Result<Model> {
    m.name = leaked(&named(m.name));
    if m.head_width == 0 && m.heads > 0 {
        ensure!(
            m.width.is_multiple_of(m.heads),
            "{} heads do not divide the width {}: give head-width (head_dim)",
            m.heads,
            m.width
        );
        m.head_width = m.width / m.heads;
    }
    if m.key_value_heads == 0 {
        m.key_value_heads = m.heads;
    }
    let sizes = [
        ("tokens", m.tokens),
        ("width", m.width),
        ("layers", m.layers),
        ("heads", m.heads),
        ("head-width", m.head_width),
        ("hidden", m.ffn_width),
    ];
    for (name, size) in sizes {
        ensure!((1..=LARGEST).contains(&size), "{name} is {size}: from 1 to {LARGEST}");
    }
    ensure!(m.layers <= MOST_LAYERS, "layers is {}: at most {MOST_LAYERS}", m.layers);
    ensure!(
        m.heads.is_multiple_of(m.key_value_heads) && m.key_value_heads <= m.heads,
        "{} key-value heads do not divide {} heads",
        m.key_value_heads,
        m.heads
    );
    let tokens = m.is_language_model();
    ensure!(
        !tokens || (1..=LARGEST).contains(&m.vocabulary),
        "vocabulary is {}: from 1 to {LARGEST}",
        m.vocabulary
    );
    ensure!(
        tokens != matches!(m.output, Output::IndicatorHeads),
        "output and input do not fit: tokens go with tied, untied and masked, indicators with indicator-heads"
    );
    ensure!(!m.token_type || tokens, "token-type needs input = \"tokens\"");
    if let Position::Rotary { theta: base } = m.position {
        ensure!(
            m.head_width.is_multiple_of(2),
            "rotary positions need an even head-width, not {}",
            m.head_width
        );
        ensure!(base.is_finite() && base > 1.0, "rotary base is {base}: over 1");
    }
    for norm in [Some(m.norm), m.qk_norm].into_iter().flatten() {
        ensure!(norm.eps().is_finite() && norm.eps() >= 0.0, "a norm's eps is {}: at least 0", norm.eps());
    }
    for p in m.dropout.all() {
        ensure!((0.0..1.0).contains(&p), "dropout is {p}: at least 0 and under 1");
    }
    // Masks are read off gradients (src/parity/dropout.rs): where none is zero by itself.
    let rectified = matches!(m.activation, Activation::Relu | Activation::ReluSquared);
    ensure!(
        m.dropout.hidden == 0.0 || (m.bias.feed_forward && !rectified && !m.glu),
        "dropout.hidden can be proven where the feed-forward part has biases, no gate and no ReLU"
    );
    ensure!(
        m.dropout.embedding == 0.0
            || m.position == Position::Learned
            || m.embedding_norm && m.norm.has_weight_and_bias().1,
        "dropout.embedding can be proven with learned positions, or with a layer norm behind the embedding"
    );
    Ok(m)
}

/// The fields of a configuration, and which have been looked at.
struct Fields<'a> {
    all: &'a Map<String, Value>,
    used: RefCell<BTreeSet<&'static str>>,
}

/// Says nothing of the mathematics of a training step.
const IGNORED_FIELDS: &[&str] = &[
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "cls_token_id",
    "directionality",
    "dtype",
    "eos_token_id",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "max_window_layers",
    "model_type",
    "n_ctx",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "sep_token_id",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_version",
    "use_cache",
    "use_return_dict",
];

impl Fields<'_> {
    /// A field; None where it is missing or null.
    fn get(&self, name: &'static str) -> Option<&Value> {
        self.used.borrow_mut().insert(name);
        self.all.get(name).filter(|value| !value.is_null())
    }

    fn size_or(&self, name: &'static str) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let size = value.as_u64().filter(|&n| n > 0 && n <= LARGEST as u64);
        let size = size.with_context(|| format!("{name} is {value}: a whole number from 1 to {LARGEST}"))?;
        Ok(Some(size as usize))
    }

    fn size(&self, name: &'static str) -> Result<usize> {
        self.size_or(name)?.with_context(|| format!("{name} is missing"))
    }

    fn number(&self, name: &'static str, default: f64) -> Result<f64> {
        let Some(value) = self.get(name) else { return Ok(default) };
        value.as_f64().with_context(|| format!("{name} is {value}: a number"))
    }

    fn flag(&self, name: &'static str, default: bool) -> Result<bool> {
        let Some(value) = self.get(name) else { return Ok(default) };
        value.as_bool().with_context(|| format!("{name} is {value}: true or false"))
    }

    /// Refuses a field that has another value than one that changes nothing.
    fn require_one_of(&self, name: &'static str, runs: &[Value]) -> Result<()> {
        match self.get(name) {
            Some(value) if !runs.contains(value) => {
                let words: Vec<String> = runs.iter().map(ToString::to_string).collect();
                let words = if words.is_empty() { "null".to_owned() } else { words.join(" or ") };
                bail!("{name} is {}, which is not built: with {words} it runs", short(value))
            }
            _ => Ok(()),
        }
    }

    fn activation(&self, name: &'static str, default: &str) -> Result<Activation> {
        let value = self
            .get(name)
            .map_or(Ok(default), |v| v.as_str().with_context(|| format!("{name} is no text")))?;
        Ok(match value {
            "gelu" => Activation::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
            "silu" | "swish" => Activation::Silu,
            "relu" => Activation::Relu,
            "relu2" => Activation::ReluSquared,
            other => {
                bail!("{name} is \"{other}\", which is not built: gelu, gelu_new, silu, relu and relu2 run")
            }
        })
    }

    /// What nobody here knows, told in one line.
    fn unknown(&self) -> Option<String> {
        let used = self.used.borrow();
        let known = |name: &str| used.contains(name) || IGNORED_FIELDS.contains(&name);
        let unknown: Vec<String> = self
            .all
            .iter()
            .filter(|(name, value)| !known(name) && !value.is_null())
            .map(|(name, value)| format!("{name} ({})", short(value)))
            .collect();
        let verb = if unknown.len() == 1 { "is" } else { "are" };
        (!unknown.is_empty())
            .then(|| format!("{} {verb} not known here and changed nothing", unknown.join(", ")))
    }
}

/// A value in few characters.
fn short(value: &Value) -> String {
    const MOST: usize = 60;
    let text = value.to_string();
    if text.chars().count() > MOST { text.chars().take(MOST).chain(['…']).collect() } else { text }
}

/// The families that are built; each says which fields are its own.
fn hugging_face(f: &Fields<'_>) -> Result<Model> {
    let family = f.get("model_type").context("model_type is missing")?;
    // What no family has, wherever it stands.
    for name in ["quantization_config", "attn_logit_softcapping", "final_logit_softcapping", "no_rope_layers"]
    {
        f.require_one_of(name, &[])?;
    }
    for name in ["num_experts", "num_local_experts", "n_routed_experts"] {
        f.require_one_of(name, &[0.into(), 1.into()])?;
    }
    for name in ["add_cross_attention", "is_encoder_decoder", "is_decoder", "tie_encoder_decoder"] {
        f.require_one_of(name, &[false.into()])?;
    }
    match family.as_str() {
        Some("gpt2") => gpt2(f),
        Some("bert") => bert(f),
        Some("llama") => {
            let bias = f.flag("attention_bias", false)?;
            let feed_forward = f.flag("mlp_bias", false)?;
            llama(f, Biases { qkv: bias, out: bias, feed_forward }, 2048)
        }
        Some("mistral") => llama(f, Biases::NONE, 4096 * 32),
        Some("qwen2") => llama(f, Biases { qkv: true, ..Biases::NONE }, 32768),
        Some("qwen3") => {
            let bias = f.flag("attention_bias", false)?;
            let m = llama(f, Biases { qkv: bias, out: bias, feed_forward: false }, 32768)?;
            let norm = NormKind::Rms { eps: m.norm.eps(), weight: true };
            let head_width = f.size_or("head_dim")?.unwrap_or(128);
            Ok(Model { qk_norm: Some(norm), head_width, ..m })
        }
        _ => bail!(
            "model_type is {family}, which is not built: gpt2, llama, mistral, qwen2, qwen3 and bert run, and a \
             TOML file says what else is made of their parts (src/model/README.md)"
        ),
    }
}

/// What the families share: the sizes of `hidden_size` and so on are filled by each.
const BARE: Model = Model {
    key_value_heads: 0,
    head_width: 0,
    dropout: Dropout::NONE,
    input: Input::Tokens,
    output: Output::Tied,
    ..presets::GPT2
};

/// <https://huggingface.co/docs/transformers/model_doc/gpt2>
fn gpt2(f: &Fields<'_>) -> Result<Model> {
    f.require_one_of("scale_attn_weights", &[true.into()])?;
    f.require_one_of("scale_attn_by_inverse_layer_idx", &[false.into()])?;
    f.require_one_of("reorder_and_upcast_attn", &[false.into()])?;
    let width = f.size("n_embd")?;
    Ok(Model {
        tokens: f.size_or("n_positions")?.unwrap_or(1024),
        width,
        layers: f.size("n_layer")?,
        heads: f.size("n_head")?,
        ffn_width: f.size_or("n_inner")?.unwrap_or(4 * width),
        vocabulary: f.size("vocab_size")?,
        norm: NormKind::Layer { eps: f.number("layer_norm_epsilon", 1e-5)? },
        activation: f.activation("activation_function", "gelu_new")?,
        dropout: Dropout {
            embedding: f.number("embd_pdrop", 0.1)?,
            weights: f.number("attn_pdrop", 0.1)?,
            residual: f.number("resid_pdrop", 0.1)?,
            ..Dropout::NONE
        },
        output: if f.flag("tie_word_embeddings", true)? { Output::Tied } else { Output::Untied },
        ..BARE
    })
}

/// <https://huggingface.co/docs/transformers/model_doc/bert>, with the head for masked tokens.
fn bert(f: &Fields<'_>) -> Result<Model> {
    f.require_one_of("position_embedding_type", &["absolute".into()])?;
    f.require_one_of("tie_word_embeddings", &[true.into()])?;
    let dropout = f.number("hidden_dropout_prob", 0.1)?;
    f.size_or("type_vocab_size")?;
    Ok(Model {
        tokens: f.size_or("max_position_embeddings")?.unwrap_or(512),
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
        ..BARE
    })
}

/// <https://huggingface.co/docs/transformers/model_doc/llama> and those that follow it.
fn llama(f: &Fields<'_>, bias: Biases, longest: usize) -> Result<Model> {
    f.require_one_of("partial_rotary_factor", &[1.into(), 1.0.into()])?;
    f.require_one_of("rope_interleaved", &[false.into()])?;
    let mut tokens = f.size_or("max_position_embeddings")?.unwrap_or(longest);
    // A window that nothing reaches changes nothing; Qwen has a switch for it.
    let windowed = f.flag("use_sliding_window", !f.all.contains_key("use_sliding_window"))?;
    if let Some(window) = f.size_or("sliding_window")?.filter(|_| windowed) {
        tokens = tokens.min(window);
    }
    if let Some(types) = f.get("layer_types") {
        let full = types.as_array().is_some_and(|all| all.iter().all(|t| t == "full_attention"));
        ensure!(full, "layer_types is {}, which is not built: all \"full_attention\" runs", short(types));
    }
    let norm = NormKind::Rms { eps: f.number("rms_norm_eps", 1e-6)?, weight: true };
    Ok(Model {
        tokens,
        width: f.size("hidden_size")?,
        layers: f.size("num_hidden_layers")?,
        heads: f.size("num_attention_heads")?,
        key_value_heads: f.size_or("num_key_value_heads")?.unwrap_or(0),
        head_width: f.size_or("head_dim")?.unwrap_or(0),
        ffn_width: f.size("intermediate_size")?,
        vocabulary: f.size("vocab_size")?,
        norm,
        position: Position::Rotary { theta: rotary_base(f)? },
        activation: f.activation("hidden_act", "silu")?,
        glu: true,
        bias,
        dropout: Dropout { weights: f.number("attention_dropout", 0.0)?, ..Dropout::NONE },
        output: if f.flag("tie_word_embeddings", false)? { Output::Tied } else { Output::Untied },
        ..BARE
    })
}

/// `rope_theta`, or where newer files keep it; scaled positions are refused.
fn rotary_base(f: &Fields<'_>) -> Result<f64> {
    let mut base = f.number("rope_theta", 1e4)?;
    for name in ["rope_scaling", "rope_parameters"] {
        let Some(value) = f.get(name) else { continue };
        let kind = value.get("rope_type").or_else(|| value.get("type")).unwrap_or(&Value::Null);
        ensure!(
            kind == "default",
            "{name} is {}, which is not built: with null, or rope_type \"default\", it runs",
            short(value)
        );
        if let Some(own) = value.get("rope_theta") {
            base = own.as_f64().with_context(|| format!("{name}.rope_theta is {own}: a number"))?;
        }
        let part = value.get("partial_rotary_factor").and_then(Value::as_f64).unwrap_or(1.0);
        ensure!(part == 1.0, "{name}.partial_rotary_factor is {part}, which is not built: 1 runs");
    }
    Ok(base)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::model::parameters::parameter_count;
    use crate::model::{GPT2, INDICATOR, ModelId};
    use crate::results::tests::scratch;
    use crate::suite::Shape;

    fn of(text: &str, file: &str) -> Result<ParsedModel> {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let folder = scratch(&format!("config-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join(file);
        fs::write(&path, text).unwrap();
        let read = read(&path);
        fs::remove_dir_all(folder).unwrap();
        read
    }

    fn json(text: &str) -> Result<ParsedModel> {
        of(text, "some-model.json")
    }

    fn parameters(model: Model) -> usize {
        parameter_count(Shape::of_model(ModelId::intern(model), 1))
    }

    const SMOLLM2: &str = r#"{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 0, "hidden_act": "silu", "hidden_size": 576,
        "intermediate_size": 1536, "max_position_embeddings": 8192, "model_type": "llama",
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000,
        "tie_word_embeddings": true, "vocab_size": 49152}"#;

    #[test]
    fn parameters_are_as_many_as_published() {
        // SmolLM2-135M: 134 515 008.
        let read = json(SMOLLM2).unwrap();
        assert!(read.notes.is_empty(), "{:?}", read.notes);
        let m = read.model;
        assert_eq!((m.name, m.tokens, m.key_value_heads, m.head_width), ("some-model", 8192, 3, 64));
        assert_eq!(parameters(m), 134_515_008);
        // Qwen2.5-0.5B: 494 032 768.
        let qwen2 = r#"{"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
            "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14,
            "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
            "sliding_window": 32768, "tie_word_embeddings": true, "use_sliding_window": false,
            "vocab_size": 151936}"#;
        assert_eq!(parameters(json(qwen2).unwrap().model), 494_032_768);
        // Qwen3-0.6B: 596 049 920.
        let qwen3 = r#"{"model_type": "qwen3", "attention_bias": false, "head_dim": 128, "hidden_size": 1024,
            "intermediate_size": 3072, "num_attention_heads": 16, "num_hidden_layers": 28,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_theta": 1000000,
            "tie_word_embeddings": true, "vocab_size": 151936}"#;
        assert_eq!(parameters(json(qwen3).unwrap().model), 596_049_920);
        // BERT base, uncased, with its head for masked tokens: 109 514 298; the second sentence's
        // row of 768 is left out here.
        let bert = r#"{"model_type": "bert", "hidden_size": 768, "intermediate_size": 3072,
            "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 30522, "type_vocab_size": 2}"#;
        assert_eq!(parameters(json(bert).unwrap().model), 109_514_298 - 768);
        // GPT-2 small: 124 439 808.
        let gpt2 =
            r#"{"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257}"#;
        assert_eq!(parameters(json(gpt2).unwrap().model), 124_439_808);
        // Mistral 7B: 7 241 732 096; its window is its length.
        let mistral = r#"{"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
            "tie_word_embeddings": false, "vocab_size": 32000}"#;
        let mistral = json(mistral).unwrap().model;
        assert_eq!((parameters(mistral), mistral.tokens), (7_241_732_096, 4096));
    }

    #[test]
    fn the_presets_are_what_their_files_would_say() {
        let gpt2 = r#"{"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50304,
            "embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0}"#;
        assert_eq!(Model { name: "gpt2", ..json(gpt2).unwrap().model }, GPT2);
        let indicator = of(include_str!("indicator.toml"), "indicator.toml").unwrap().model;
        assert_eq!(Model { name: "indicator", ..indicator }, INDICATOR);
        assert_eq!(indicator.name, "own-indicator");
        let back: Model = toml::from_str(&toml::to_string(&INDICATOR).unwrap()).unwrap();
        assert_eq!(back, INDICATOR);
    }

    #[test]
    fn what_is_not_built_is_refused_by_its_field() {
        let with = |change: &str| {
            let (name, _) = change.split_once(':').unwrap();
            let old: Map<String, Value> = serde_json::from_str(SMOLLM2).unwrap();
            let mut new: Map<String, Value> = serde_json::from_str(&format!("{{{change}}}")).unwrap();
            for (key, value) in old {
                new.entry(key).or_insert(value);
            }
            (name.trim_matches('"').to_owned(), json(&Value::Object(new).to_string()))
        };
        for change in [
            r#""rope_scaling": {"factor": 8.0, "rope_type": "llama3"}"#,
            r#""rope_parameters": {"rope_theta": 10000.0, "rope_type": "yarn"}"#,
            r#""partial_rotary_factor": 0.5"#,
            r#""rope_interleaved": true"#,
            r#""num_local_experts": 8"#,
            r#""layer_types": ["full_attention", "sliding_attention"]"#,
            r#""final_logit_softcapping": 30.0"#,
            r#""quantization_config": {"bits": 4}"#,
            r#""hidden_act": "laplace""#,
            r#""model_type": "gemma3""#,
            r#""hidden_size": -576"#,
            r#""num_hidden_layers": "many""#,
            r#""vocab_size": 99999999999"#,
            r#""num_hidden_layers": null"#,
            r#""rms_norm_eps": true"#,
        ] {
            let (name, read) = with(change);
            let error = format!("{:#}", read.unwrap_err());
            assert!(error.contains(&name) && !error.contains('\n'), "{change}: {error}");
        }
        for (change, word) in [
            (r#""num_key_value_heads": 4"#, "do not divide"),
            (r#""num_attention_heads": 7"#, "do not divide"),
            (r#""attention_dropout": 1.5"#, "under 1"),
        ] {
            let error = format!("{:#}", with(change).1.unwrap_err());
            assert!(error.contains(word), "{change}: {error}");
        }
        // A longer window than the context, and a field that nobody knows, change nothing.
        let read = with(r#""sliding_window": 100000, "use_mup": true"#).1.unwrap();
        assert_eq!(read.model.tokens, 8192);
        assert!(read.notes.len() == 1 && read.notes[0].contains("use_mup (true)"), "{:?}", read.notes);
        assert_eq!(with(r#""sliding_window": 512"#).1.unwrap().model.tokens, 512);
    }

    #[test]
    fn what_is_no_configuration_is_told_in_one_line() {
        for (text, file, word) in [
            ("{", "a.json", "no JSON"),
            ("[]", "a.json", "no JSON object"),
            ("{}", "a.json", "model_type is missing"),
            ("name = 3", "a.toml", "name"),
            ("name = 'a'\nwidht = 3", "a.toml", "widht"),
        ] {
            let error = format!("{:#}", of(text, file).unwrap_err());
            assert!(error.contains(word) && !error.contains('\n'), "{error}");
        }
        let error = format!("{:#}", read(Path::new("/nowhere/config.json")).unwrap_err());
        assert!(error.contains("can't be read"), "{error}");
    }

    #[test]
    fn names_fit_into_ids() {
        for (text, name) in [
            ("SmolLM2-135M", "smollm2-135m"),
            ("Qwen2.5-0.5B", "qwen2-5-0-5b"),
            ("Meta Llama 3.1 8B Instruct", "meta-llama-3-1-8"),
            ("b16", "m-b16"),
            ("gpt2", "own-gpt2"),
            ("___", "m"),
            ("../x", "x"),
        ] {
            assert_eq!(named(text), name);
        }
    }
}
