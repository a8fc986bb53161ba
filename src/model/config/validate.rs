//! Completes and checks a model.

use anyhow::{Result, ensure};

use super::super::{Activation, Input, Model, Output, Position, Rotary};
use super::id_name;

/// Largest size of any kind: four times the longest context and the largest vocabulary in use.
pub const MAX_SIZE: usize = 1 << 22;
/// Largest number of layers: ten times the deepest model in use.
pub const MAX_LAYERS: usize = 2000;

/// Fills in the optional sizes of a model and checks that it can run. The name gets the form of ids.
///
/// # Errors
/// Returns one line that names the invalid option or size.
pub fn complete_and_check(mut m: Model) -> Result<Model> {
    m.name = id_name(m.name).leak();
    if m.head_width == 0 && m.heads > 0 {
        ensure!(
            m.width.is_multiple_of(m.heads),
            "{} heads do not divide the width {}: set head-width (head_dim)",
            m.heads,
            m.width
        );
        m.head_width = m.width / m.heads;
    }
    if m.key_value_heads == 0 {
        m.key_value_heads = m.heads;
    }
    check_sizes(&m)?;
    check_options(&m)?;
    check_dropout(&m)?;
    Ok(m)
}

fn check_sizes(m: &Model) -> Result<()> {
    let sizes = [
        ("tokens", m.tokens),
        ("width", m.width),
        ("layers", m.layers),
        ("heads", m.heads),
        ("head-width", m.head_width),
        ("ffn-width", m.ffn_width),
        ("vocabulary", if m.is_language_model() { m.vocabulary } else { 1 }),
    ];
    let market = match m.input {
        Input::Indicator { market } => market,
        Input::Tokens => 1,
    };
    for (name, size) in sizes.into_iter().chain([("market", market)]) {
        ensure!((1..=MAX_SIZE).contains(&size), "{name} is {size}: use a number from 1 to {MAX_SIZE}");
    }
    let width = m.heads.saturating_mul(m.head_width);
    ensure!(width <= MAX_SIZE, "heads times head-width is {width}: use at most {MAX_SIZE}");
    ensure!(m.layers <= MAX_LAYERS, "layers is {}: use at most {MAX_LAYERS}", m.layers);
    ensure!(
        m.key_value_heads > 0 && m.heads.is_multiple_of(m.key_value_heads) && m.key_value_heads <= m.heads,
        "{} key-value heads do not divide {} heads",
        m.key_value_heads,
        m.heads
    );
    Ok(())
}

fn check_options(m: &Model) -> Result<()> {
    let language = m.is_language_model();
    ensure!(
        language != matches!(m.output, Output::IndicatorHeads),
        "output does not match input: use tied, untied or mlm-head with tokens, and indicator-heads with indicator"
    );
    ensure!(!m.token_type || language, "token-type needs input = \"tokens\"");
    check_attention(m)?;
    ensure!(!m.bias.output || m.output == Output::Untied, "bias.output needs output = \"untied\"");
    let scales = [m.scale.embedding, m.score_scale(), m.scale.residual, m.scale.hidden, m.scale.logits];
    let caps = [m.cap.scores, m.cap.logits];
    for factor in scales.into_iter().chain(caps.into_iter().flatten()) {
        ensure!(factor.is_finite() && factor > 0.0, "a scale or cap is {factor}: use a number above 0");
    }
    ensure!(
        language || (m.scale.logits, m.cap.logits) == (1.0, None),
        "scale.logits and cap.logits need input = \"tokens\""
    );
    ensure!(
        m.lora.is_none_or(|lora| lora.is_valid()),
        "lora needs a rank from 1 to 65536 and alpha = 2·rank"
    );
    for norm in [Some(m.norm), m.qk_norm].into_iter().flatten() {
        let eps = norm.eps();
        ensure!(eps.is_finite() && eps >= 0.0, "eps of a norm is {eps}: use a number of at least 0");
    }
    Ok(())
}

/// Checks the positions and windows of both kinds of attention.
fn check_attention(m: &Model) -> Result<()> {
    if let Some(second) = m.second_attention {
        ensure!(!second.layers.is_empty(), "second-attention.layers is empty");
        ensure!(
            second.position != Position::Learned && m.position != Position::Learned,
            "second-attention needs rotary positions or none"
        );
    }
    for kind in m.attention_kinds() {
        ensure!(kind.window != Some(0), "window is 0: use a number of at least 1");
        let Position::Rotary(rotary) = kind.position else { continue };
        let Rotary { theta, share, factor, frequencies, .. } = rotary;
        let width = m.head_width;
        ensure!(width.is_multiple_of(2), "rotary positions need an even head-width, not {width}");
        ensure!(theta.is_finite() && theta > 1.0, "rotary theta is {theta}: use a number above 1");
        ensure!(share > 0.0 && share <= 1.0, "rotary share is {share}: use a number above 0 and at most 1");
        ensure!(factor.is_finite() && factor > 0.0, "rotary factor is {factor}: use a number above 0");
        let pairs = rotary.width(width) / 2;
        ensure!(
            frequencies.is_none_or(|list| list.len() == pairs && list.iter().all(|w| w.is_finite())),
            "rotary frequencies are not a list of {pairs} numbers, one per pair"
        );
    }
    Ok(())
}

fn check_dropout(m: &Model) -> Result<()> {
    for p in m.dropout.all() {
        ensure!((0.0..1.0).contains(&p), "dropout is {p}: use a probability of at least 0 and under 1");
    }
    // src/parity/dropout.rs reads masks from gradients that are not zero for another reason.
    let rectified = matches!(m.activation, Activation::Relu | Activation::ReluSquared);
    ensure!(
        m.dropout.hidden == 0.0 || (m.bias.feed_forward && !rectified && !m.glu),
        "dropout.hidden cannot be checked with a gate, with ReLU, or without feed-forward biases: set it to 0"
    );
    ensure!(
        m.dropout.embedding == 0.0 || !m.embedding_norm || m.norm.has_weight_and_bias().1,
        "dropout.embedding cannot be checked after a norm without bias: set it to 0"
    );
    ensure!(
        m.dropout.residual == 0.0 || !m.norm_order.norms_outputs(),
        "dropout.residual cannot be checked with a norm behind each block: set it to 0"
    );
    Ok(())
}
