//! Encoders with a head for masked tokens.

use anyhow::{Result, ensure};

use super::BASE;
use super::fields::Fields;
use crate::model::{Dropout, Model, NormKind, NormOrder, Output};

/// The options of all encoders here.
const ENCODER: Model = Model {
    norm_order: NormOrder::PostNorm,
    embedding_norm: true,
    final_norm: false,
    causal: false,
    output: Output::MlmHead,
    ..BASE
};

/// BERT (<https://huggingface.co/docs/transformers/model_doc/bert>).
pub fn bert(f: &Fields<'_>) -> Result<Model> {
    f.require_one_of("position_embedding_type", &["absolute".into()])?;
    f.require_one_of("tie_word_embeddings", &[true.into()])?;
    let dropout = f.number("hidden_dropout_prob", 0.1)?;
    f.optional_size("type_vocab_size")?;
    Ok(Model {
        tokens: f.size_or("max_position_embeddings", 512)?,
        width: f.size("hidden_size")?,
        layers: f.size("num_hidden_layers")?,
        heads: f.size("num_attention_heads")?,
        ffn_width: f.size("intermediate_size")?,
        vocabulary: f.size("vocab_size")?,
        norm: NormKind::layer(f.number("layer_norm_eps", 1e-12)?),
        token_type: true,
        activation: f.activation("hidden_act", "gelu")?,
        dropout: Dropout {
            embedding: dropout,
            weights: f.number("attention_probs_dropout_prob", 0.1)?,
            residual: dropout,
            ..Dropout::NONE
        },
        ..ENCODER
    })
}

/// RoBERTa (<https://huggingface.co/docs/transformers/model_doc/roberta>): BERT whose positions begin after that of the
/// padding token. Its head always has GELU.
pub fn roberta(f: &Fields<'_>) -> Result<Model> {
    f.require_one_of("hidden_act", &["gelu".into()])?;
    let m = bert(f)?;
    let padding = f.get("pad_token_id").and_then(serde_json::Value::as_u64).unwrap_or(1) as usize;
    ensure!(m.tokens > padding + 1, "max_position_embeddings is {}: use more than {}", m.tokens, padding + 1);
    Ok(Model { tokens: m.tokens - padding - 1, ..m })
}

/// DistilBERT (<https://huggingface.co/docs/transformers/model_doc/distilbert>).
pub fn distilbert(f: &Fields<'_>) -> Result<Model> {
    f.require_one_of("sinusoidal_pos_embds", &[false.into()])?;
    f.require_one_of("tie_word_embeddings", &[true.into()])?;
    let dropout = f.number("dropout", 0.1)?;
    Ok(Model {
        tokens: f.size_or("max_position_embeddings", 512)?,
        width: f.size_or("dim", 768)?,
        layers: f.size_or("n_layers", 6)?,
        heads: f.size_or("n_heads", 12)?,
        ffn_width: f.size_or("hidden_dim", 3072)?,
        vocabulary: f.size_or("vocab_size", 30522)?,
        norm: NormKind::layer(1e-12),
        activation: f.activation("activation", "gelu")?,
        dropout: Dropout {
            embedding: dropout,
            weights: f.number("attention_dropout", 0.1)?,
            residual: dropout,
            attention: Some(0.0),
            ..Dropout::NONE
        },
        ..ENCODER
    })
}
