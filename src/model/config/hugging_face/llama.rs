//! Llama and its relatives: decoders with RMS norms, gated feed-forward blocks and rotary positions.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::BASE;
use super::fields::{Fields, short};
use super::rope::{self, Defaults, PLAIN};
use crate::model::config::validate::MAX_LAYERS;
use crate::model::{
    Activation, Biases, Caps, Dropout, Model, NormKind, NormOrder, Position, Rotary, Scales, SecondAttention,
};

/// The sizes and options that all families here share. Defaults are those of Llama.
fn decoder(f: &Fields<'_>, bias: Biases, rope: Defaults) -> Result<Model> {
    f.require_one_of("rope_interleaved", &[false.into()])?;
    Ok(Model {
        norm: NormKind::rms(f.number("rms_norm_eps", 1e-6)?),
        activation: f.activation("hidden_act", "silu")?,
        glu: true,
        bias,
        output: f.tied_or_untied(false)?,
        ..rope::decoder(f, rope)?
    })
}

/// Reads `attention_bias`, which all four projections of attention share.
fn attention_bias(f: &Fields<'_>) -> Result<Biases> {
    let bias = f.flag("attention_bias", false)?;
    Ok(Biases { qkv: bias, out: bias, ..Biases::NONE })
}

/// Returns a list per layer as [`SecondAttention`] repeats it: its shortest period.
fn period(layers: Vec<bool>) -> &'static [bool] {
    let repeats = |n: &usize| layers.iter().enumerate().all(|(i, value)| *value == layers[i % n]);
    let length = (1..layers.len()).find(repeats).unwrap_or(layers.len());
    Vec::leak(layers[..length].to_vec())
}

/// Gives a position and a window to the layers that `is_second` selects.
fn with_second(
    m: Model,
    is_second: impl Fn(usize) -> bool,
    position: Position,
    window: Option<usize>,
) -> Model {
    // More layers are refused later.
    let layers: Vec<bool> = (0..m.layers.min(MAX_LAYERS)).map(is_second).collect();
    if layers.iter().all(|second| *second) {
        return Model { position, window, ..m };
    }
    if (position, window) == (m.position, m.window) || !layers.contains(&true) {
        return m;
    }
    Model { second_attention: Some(SecondAttention { layers: period(layers), position, window }), ..m }
}

/// Gives the `sliding_window` of the file and a position to the layers that `layer_types` names, or else to those that
/// the family has by default.
pub fn with_window(
    f: &Fields<'_>,
    m: Model,
    default: impl Fn(usize) -> bool,
    position: Position,
) -> Result<Model> {
    let window = f.optional_size("sliding_window")?;
    let Some(types) = f.get("layer_types") else {
        return Ok(with_second(m, |layer| window.is_some() && default(layer), position, window));
    };
    let sliding = |name: &Value| match name.as_str() {
        Some("full_attention") => Some(false),
        Some("sliding_attention") => Some(true),
        _ => None,
    };
    let list = types.as_array().filter(|all| all.len() >= m.layers);
    let list = list.and_then(|all| all.iter().map(sliding).collect::<Option<Vec<_>>>());
    let list = list.with_context(|| {
        let layers = m.layers;
        format!(
            "layer_types is {}, which is not implemented: use full_attention or sliding_attention for {layers} layers",
            short(types)
        )
    })?;
    ensure!(window.is_some() || !list.contains(&true), "sliding_window is missing");
    Ok(with_second(m, |layer| list[layer], position, window))
}

/// Llama (<https://huggingface.co/docs/transformers/model_doc/llama>).
pub fn llama(f: &Fields<'_>) -> Result<Model> {
    let bias = Biases { feed_forward: f.flag("mlp_bias", false)?, ..attention_bias(f)? };
    decoder(f, bias, PLAIN)
}

/// Mistral (<https://huggingface.co/docs/transformers/model_doc/mistral>).
pub fn mistral(f: &Fields<'_>) -> Result<Model> {
    let m = decoder(f, Biases::NONE, PLAIN)?;
    let tokens = f.size_or("max_position_embeddings", 4096 * 32)?;
    with_window(f, Model { tokens, ..m }, |_| true, m.position)
}

/// Qwen's window: off by default, and in the layers from `max_window_layers` on.
fn qwen(f: &Fields<'_>, bias: Biases, rope: Defaults) -> Result<Model> {
    let m = decoder(f, bias, rope)?;
    let m = Model { tokens: f.size_or("max_position_embeddings", 32768)?, ..m };
    let first = f.get("max_window_layers").and_then(Value::as_u64).unwrap_or(28) as usize;
    if f.flag("use_sliding_window", false)? {
        return with_window(f, m, |layer| layer >= first, m.position);
    }
    f.optional_size("sliding_window")?;
    Ok(m)
}

/// Qwen 1.5 to 2.5 (<https://huggingface.co/docs/transformers/model_doc/qwen2>).
pub fn qwen2(f: &Fields<'_>) -> Result<Model> {
    qwen(f, Biases { qkv: true, ..Biases::NONE }, PLAIN)
}

/// Qwen 3 (<https://huggingface.co/docs/transformers/model_doc/qwen3>).
pub fn qwen3(f: &Fields<'_>) -> Result<Model> {
    let m = qwen(f, attention_bias(f)?, Defaults { head_width: Some(128), ..PLAIN })?;
    Ok(Model { qk_norm: Some(m.norm), ..m })
}

/// Phi 3 and 4 mini (<https://huggingface.co/docs/transformers/model_doc/phi3>).
pub fn phi3(f: &Fields<'_>) -> Result<Model> {
    f.require_zero("embd_pdrop")?;
    f.require_one_of("lm_head_bias", &[false.into()])?;
    f.require_one_of("mlp_bias", &[false.into()])?;
    f.require_one_of("attention_bias", &[false.into()])?;
    // Every layer has the same attention, and the positions are not interpolated again.
    f.require_one_of("full_attn_mod", &[1.into()])?;
    f.require_one_of("interpolate_factor", &[1.into()])?;
    f.optional_size("original_max_position_embeddings")?;
    let m = decoder(f, Biases::NONE, Defaults { share: Some(1.0), ..PLAIN })?;
    let dropout = Dropout { residual: f.number("resid_pdrop", 0.0)?, ..m.dropout };
    let norm = NormKind::rms(f.number("rms_norm_eps", 1e-5)?);
    with_window(f, Model { dropout, norm, ..m }, |_| true, m.position)
}

/// InternLM 2 (<https://huggingface.co/internlm/internlm2-1_8b>).
pub fn internlm2(f: &Fields<'_>) -> Result<Model> {
    let bias = f.flag("bias", true)?;
    decoder(f, Biases { qkv: bias, out: bias, ..Biases::NONE }, PLAIN)
}

/// Defaults of all Gemma models.
const GEMMA: Defaults = Defaults { head_width: Some(256), ..PLAIN };

/// The options of all Gemma models.
fn gemma_decoder(f: &Fields<'_>, rope: Defaults) -> Result<Model> {
    let width = f.size("hidden_size")?;
    Ok(Model {
        tokens: f.size_or("max_position_embeddings", 8192)?,
        width,
        layers: f.size("num_hidden_layers")?,
        heads: f.size_or("num_attention_heads", 8)?,
        key_value_heads: f.size_or("num_key_value_heads", 4)?,
        head_width: rope::head_width(f, rope)?,
        ffn_width: f.size("intermediate_size")?,
        vocabulary: f.size_or("vocab_size", 256_000)?,
        norm: NormKind::Rms { eps: f.number("rms_norm_eps", 1e-6)?, weight: true, offset: true },
        position: rope::position(f, rope)?,
        glu: true,
        bias: attention_bias(f)?,
        scale: Scales { embedding: (width as f64).sqrt(), ..Scales::NONE },
        dropout: Dropout { weights: f.number("attention_dropout", 0.0)?, ..Dropout::NONE },
        output: f.tied_or_untied(true)?,
        ..BASE
    })
}

/// Gemma 1 (<https://huggingface.co/docs/transformers/model_doc/gemma>). Its `gelu` is the tanh approximation.
pub fn gemma(f: &Fields<'_>) -> Result<Model> {
    let older = f.activation("hidden_act", "gelu_pytorch_tanh")?;
    let named =
        if f.get("hidden_activation").is_some() { f.activation("hidden_activation", "")? } else { older };
    Ok(Model {
        heads: f.size_or("num_attention_heads", 16)?,
        key_value_heads: f.size_or("num_key_value_heads", 16)?,
        activation: if named == Activation::Gelu { Activation::GeluTanh } else { named },
        ..gemma_decoder(f, GEMMA)?
    })
}

/// Options that Gemma 2 and 3 share: norms on both sides of a block, and the scale of the scores.
fn gemma_2_or_3(f: &Fields<'_>, rope: Defaults) -> Result<Model> {
    f.get("hidden_act");
    let m = gemma_decoder(f, rope)?;
    let scores = Some(f.factor("query_pre_attn_scalar", 256.0)?.powf(-0.5));
    Ok(Model {
        norm_order: NormOrder::SandwichNorm,
        activation: f.activation("hidden_activation", "gelu_pytorch_tanh")?,
        scale: Scales { scores, ..m.scale },
        ..m
    })
}

/// Reads a soft cap. A file without the field has the default, one with null has none.
fn cap(f: &Fields<'_>, name: &'static str, default: Option<f64>) -> Result<Option<f64>> {
    let value = f.optional_number(name)?;
    ensure!(
        value.is_none_or(|cap| cap > 0.0),
        "{name} is {}: use a number above 0",
        value.unwrap_or_default()
    );
    Ok(if f.all.contains_key(name) { value } else { default })
}

/// Gemma 2 (<https://huggingface.co/docs/transformers/model_doc/gemma2>).
pub fn gemma2(f: &Fields<'_>) -> Result<Model> {
    let m = gemma_2_or_3(f, GEMMA)?;
    let scores = cap(f, "attn_logit_softcapping", Some(50.0))?;
    let m = Model { cap: Caps { scores, logits: cap(f, "final_logit_softcapping", Some(30.0))? }, ..m };
    with_window(f, m, |layer| layer.is_multiple_of(2), m.position)
}

/// Gemma 3 (<https://huggingface.co/docs/transformers/model_doc/gemma3>).
pub fn gemma3(f: &Fields<'_>) -> Result<Model> {
    let m = gemma_2_or_3(f, Defaults { theta: 1e6, ..GEMMA })?;
    // The layers with a window have their own base and no scaling.
    let theta = f.factor("rope_local_base_freq", 1e4)?;
    let sliding = rope::position_of_sliding_layers(f, Defaults { theta, ..GEMMA })?;
    let scores = cap(f, "attn_logit_softcapping", None)?;
    let m = Model {
        tokens: f.size_or("max_position_embeddings", 131_072)?,
        vocabulary: f.size_or("vocab_size", 262_208)?,
        qk_norm: Some(m.norm),
        cap: Caps { scores, logits: cap(f, "final_logit_softcapping", None)? },
        ..m
    };
    let pattern = f.size_or("_sliding_window_pattern", f.size_or("sliding_window_pattern", 6)?)?;
    let mut m = with_window(f, m, |layer| !(layer + 1).is_multiple_of(pattern), sliding)?;
    if f.flag("use_bidirectional_attention", false)? {
        // The window then has half of its tokens on each side.
        let halve = |window: usize| window / 2 + 1;
        m.window = m.window.map(halve);
        m.second_attention = m.second_attention.map(|s| SecondAttention { window: s.window.map(halve), ..s });
    }
    Ok(m)
}

/// Granite 3 (<https://huggingface.co/docs/transformers/model_doc/granite>): Llama with four factors.
pub fn granite(f: &Fields<'_>) -> Result<Model> {
    let scale = Scales {
        embedding: f.factor("embedding_multiplier", 1.0)?,
        scores: Some(f.factor("attention_multiplier", 1.0)?),
        residual: f.factor("residual_multiplier", 1.0)?,
        hidden: 1.0,
        logits: 1.0 / f.factor("logits_scaling", 1.0)?,
    };
    Ok(Model { scale, ..llama(f)? })
}

/// MiniCPM 1 (<https://huggingface.co/openbmb/MiniCPM-2B-128k>): Llama with three factors.
pub fn minicpm(f: &Fields<'_>) -> Result<Model> {
    let m = llama(f)?;
    let scale = Scales {
        embedding: f.factor("scale_emb", 1.0)?,
        residual: f.factor("scale_depth", 1.0)? / (m.layers as f64).sqrt(),
        hidden: f.factor("dim_model_base", 1.0)? / m.width as f64,
        ..Scales::NONE
    };
    Ok(Model { scale, output: f.tied_or_untied(true)?, ..m })
}

/// OLMo 1 (<https://huggingface.co/docs/transformers/model_doc/olmo>): norms without weight and bias.
pub fn olmo(f: &Fields<'_>) -> Result<Model> {
    f.require_one_of("clip_qkv", &[])?;
    let norm = NormKind::Layer { eps: 1e-5, weight: false, bias: false };
    Ok(Model { norm, ..decoder(f, attention_bias(f)?, PLAIN)? })
}

/// OLMo 2 (<https://huggingface.co/docs/transformers/model_doc/olmo2>): norms behind the blocks, and of all heads.
pub fn olmo2(f: &Fields<'_>) -> Result<Model> {
    let m = decoder(f, attention_bias(f)?, PLAIN)?;
    let norm = NormKind::rms(f.number("rms_norm_eps", 1e-5)?);
    Ok(Model {
        norm,
        norm_order: NormOrder::OutputNorm,
        qk_norm: Some(norm),
        qk_norm_across_heads: true,
        ..m
    })
}

/// OLMo 3 (<https://huggingface.co/docs/transformers/model_doc/olmo3>): OLMo 2 with windows in three of four layers,
/// whose positions are not scaled.
pub fn olmo3(f: &Fields<'_>) -> Result<Model> {
    let m = olmo2(f)?;
    let Position::Rotary(Rotary { theta, .. }) = m.position else { unreachable!("rotary positions") };
    let sliding = rope::position_of_sliding_layers(f, Defaults { theta, ..PLAIN })?;
    with_window(f, m, |layer| !(layer + 1).is_multiple_of(4), sliding)
}

/// SmolLM 3 (<https://huggingface.co/docs/transformers/model_doc/smollm3>): every fourth layer without positions.
pub fn smollm3(f: &Fields<'_>) -> Result<Model> {
    f.require_one_of("use_sliding_window", &[false.into()])?;
    let m = llama(f)?;
    let m = Model {
        tokens: f.size_or("max_position_embeddings", 32768)?,
        key_value_heads: f.size_or("num_key_value_heads", 4)?,
        output: f.tied_or_untied(true)?,
        ..m
    };
    let interval = f.size_or("no_rope_layer_interval", 4)?;
    let Some(list) = f.get("no_rope_layers") else {
        return Ok(with_second(m, |layer| (layer + 1).is_multiple_of(interval), Position::None, None));
    };
    let unturned = |flag: &Value| match flag {
        Value::Bool(turned) => Some(!turned),
        _ => flag.as_u64().filter(|turned| *turned < 2).map(|turned| turned == 0),
    };
    let flags = list.as_array().and_then(|all| all.iter().map(unturned).collect::<Option<Vec<_>>>());
    let flags = flags.filter(|all| all.len() >= m.layers);
    let flags = flags
        .with_context(|| format!("no_rope_layers is {}: use a list of {} flags", short(list), m.layers))?;
    Ok(with_second(m, |layer| flags[layer], Position::None, None))
}

/// ERNIE 4.5 (<https://huggingface.co/docs/transformers/model_doc/ernie4_5>): neighboring features rotate together.
pub fn ernie(f: &Fields<'_>) -> Result<Model> {
    let bias = f.flag("use_bias", false)?;
    let rope = Defaults { head_width: Some(128), ..PLAIN };
    let m = decoder(f, if bias { Biases::ALL } else { Biases::NONE }, rope)?;
    let m =
        Model { norm: NormKind::rms(f.number("rms_norm_eps", 1e-5)?), output: f.tied_or_untied(true)?, ..m };
    Ok(with_rotary(m, |rotary| Rotary { pairs: true, ..rotary }))
}

/// Changes the rotary position.
fn with_rotary(m: Model, change: impl FnOnce(Rotary) -> Rotary) -> Model {
    let Position::Rotary(rotary) = m.position else { unreachable!("the family has rotary positions") };
    Model { position: Position::Rotary(change(rotary)), ..m }
}

/// nanochat of October 2025 (<https://huggingface.co/docs/transformers/model_doc/nanochat>): norms without weights, and
/// rotation in the other direction. It normalises queries and keys after the rotation, which changes no norm.
pub fn nanochat(f: &Fields<'_>) -> Result<Model> {
    let m = decoder(f, attention_bias(f)?, PLAIN)?;
    let norm = NormKind::Rms { eps: m.norm.eps(), weight: false, offset: false };
    let m = Model {
        norm,
        qk_norm: Some(norm),
        embedding_norm: true,
        activation: f.activation("hidden_act", "relu2")?,
        glu: false,
        cap: Caps { scores: None, logits: cap(f, "final_logit_softcapping", Some(15.0))? },
        ..m
    };
    let head_width = rope::head_width(f, PLAIN)?;
    Ok(with_rotary(m, |rotary| {
        let frequencies = rotary.frequencies(head_width).into_iter().map(|w| -w).collect::<Vec<_>>();
        Rotary { frequencies: Some(frequencies.leak()), ..rotary }
    }))
}
