//! Decoders that differ from Llama in their norms or their arrangement.

use anyhow::Result;

use super::BASE;
use super::fields::Fields;
use super::llama;
use super::rope::{self, Defaults, PLAIN};
use crate::model::{Biases, Dropout, Model, NormKind, NormOrder, Output};

/// GPT-2 (<https://huggingface.co/docs/transformers/model_doc/gpt2>).
pub fn gpt2(f: &Fields<'_>) -> Result<Model> {
    f.require_one_of("scale_attn_weights", &[true.into()])?;
    f.require_one_of("scale_attn_by_inverse_layer_idx", &[false.into()])?;
    f.require_one_of("reorder_and_upcast_attn", &[false.into()])?;
    let width = f.size("n_embd")?;
    Ok(Model {
        tokens: f.size_or("n_positions", 1024)?,
        width,
        layers: f.size("n_layer")?,
        heads: f.size("n_head")?,
        ffn_width: f.size_or("n_inner", 4 * width)?,
        vocabulary: f.size("vocab_size")?,
        norm: NormKind::layer(f.number("layer_norm_epsilon", 1e-5)?),
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

/// StarCoder 1 (<https://huggingface.co/docs/transformers/model_doc/gpt_bigcode>): GPT-2 with one key-value head.
pub fn gpt_bigcode(f: &Fields<'_>) -> Result<Model> {
    let key_value_heads = if f.flag("multi_query", true)? { 1 } else { 0 };
    Ok(Model { key_value_heads, ..gpt2(f)? })
}

/// OPT (<https://huggingface.co/docs/transformers/model_doc/opt>).
pub fn opt(f: &Fields<'_>) -> Result<Model> {
    let width = f.size("hidden_size")?;
    f.require_one_of("word_embed_proj_dim", &[width.into()])?;
    f.require_one_of("enable_bias", &[true.into()])?;
    f.require_one_of("layer_norm_elementwise_affine", &[true.into()])?;
    f.require_one_of("_remove_final_layer_norm", &[false.into()])?;
    f.require_zero("layerdrop")?;
    f.require_zero("activation_dropout")?;
    let norm_order =
        if f.flag("do_layer_norm_before", true)? { NormOrder::PreNorm } else { NormOrder::PostNorm };
    Ok(Model {
        tokens: f.size_or("max_position_embeddings", 2048)?,
        width,
        layers: f.size("num_hidden_layers")?,
        heads: f.size("num_attention_heads")?,
        ffn_width: f.size("ffn_dim")?,
        vocabulary: f.size("vocab_size")?,
        norm_order,
        final_norm: norm_order == NormOrder::PreNorm,
        activation: f.activation("activation_function", "relu")?,
        dropout: Dropout {
            weights: f.number("attention_dropout", 0.0)?,
            residual: f.number("dropout", 0.1)?,
            ..Dropout::NONE
        },
        output: f.tied_or_untied(true)?,
        ..BASE
    })
}

/// The sizes of a decoder with layer norms and rotary positions.
fn layer_norm_decoder(f: &Fields<'_>, eps: &'static str, rope: Defaults) -> Result<Model> {
    Ok(Model { norm: NormKind::layer(f.number(eps, 1e-5)?), ..rope::decoder(f, rope)? })
}

/// GPT-NeoX and Pythia (<https://huggingface.co/docs/transformers/model_doc/gpt_neox>).
pub fn gpt_neox(f: &Fields<'_>) -> Result<Model> {
    let defaults = Defaults {
        theta: f.number("rotary_emb_base", 1e4)?,
        share: Some(f.number("rotary_pct", 0.25)?),
        ..PLAIN
    };
    let m = layer_norm_decoder(f, "layer_norm_eps", defaults)?;
    let parallel = f.flag("use_parallel_residual", true)?;
    let bias = f.flag("attention_bias", true)?;
    let dropout = f.number("hidden_dropout", 0.0)?;
    Ok(Model {
        norm_order: if parallel { NormOrder::Parallel } else { NormOrder::PreNorm },
        activation: f.activation("hidden_act", "gelu")?,
        bias: Biases { qkv: bias, out: bias, ..Biases::ALL },
        dropout: Dropout { embedding: dropout, residual: dropout, ..m.dropout },
        output: f.tied_or_untied(false)?,
        ..m
    })
}

/// Phi 1 to 2 (<https://huggingface.co/docs/transformers/model_doc/phi>).
pub fn phi(f: &Fields<'_>) -> Result<Model> {
    f.require_one_of("qk_layernorm", &[false.into()])?;
    f.require_one_of("tie_word_embeddings", &[false.into()])?;
    let m = layer_norm_decoder(f, "layer_norm_eps", Defaults { share: Some(0.5), ..PLAIN })?;
    Ok(Model {
        norm_order: NormOrder::ParallelSharedNorm,
        activation: f.activation("hidden_act", "gelu_new")?,
        bias: Biases { output: true, ..Biases::ALL },
        dropout: Dropout {
            embedding: f.number("embd_pdrop", 0.0)?,
            residual: f.number("resid_pdrop", 0.0)?,
            ..m.dropout
        },
        output: Output::Untied,
        ..m
    })
}

/// StableLM (<https://huggingface.co/docs/transformers/model_doc/stablelm>).
pub fn stablelm(f: &Fields<'_>) -> Result<Model> {
    f.require_one_of("qk_layernorm", &[false.into()])?;
    let m = layer_norm_decoder(f, "layer_norm_eps", Defaults { share: Some(0.25), ..PLAIN })?;
    let parallel = f.flag("use_parallel_residual", false)?;
    Ok(Model {
        norm_order: if parallel { NormOrder::ParallelSharedNorm } else { NormOrder::PreNorm },
        activation: f.activation("hidden_act", "silu")?,
        glu: true,
        bias: Biases { qkv: f.flag("use_qkv_bias", false)?, ..Biases::NONE },
        dropout: Dropout { residual: f.number("hidden_dropout", 0.0)?, attention: Some(0.0), ..m.dropout },
        output: f.tied_or_untied(false)?,
        ..m
    })
}

/// StarCoder 2 (<https://huggingface.co/docs/transformers/model_doc/starcoder2>).
pub fn starcoder2(f: &Fields<'_>) -> Result<Model> {
    f.require_one_of("mlp_type", &["default".into()])?;
    f.require_one_of("norm_type", &["layer_norm".into()])?;
    f.require_one_of("scale_attn_weights", &[true.into()])?;
    // The library reads norm_epsilon and hidden_act. Files of 2024 have the older names too.
    for older in ["layer_norm_epsilon", "activation_function"] {
        f.get(older);
    }
    let m = layer_norm_decoder(f, "norm_epsilon", PLAIN)?;
    let bias = f.flag("use_bias", true)?;
    let m = Model {
        activation: f.activation("hidden_act", "gelu_pytorch_tanh")?,
        bias: if bias { Biases::ALL } else { Biases::NONE },
        dropout: Dropout {
            embedding: f.number("embedding_dropout", 0.0)?,
            residual: f.number("residual_dropout", 0.0)?,
            ..m.dropout
        },
        output: f.tied_or_untied(true)?,
        ..m
    };
    llama::with_window(f, m, |_| true, m.position)
}
