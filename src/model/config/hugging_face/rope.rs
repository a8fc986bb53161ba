//! Rotary positions of a configuration: base, partial rotation, and scaling as a list of frequencies.
//!
//! Scaling is at `rope_scaling`, or at `rope_parameters` since transformers 5, which can have one object per kind of
//! layer. The formulas are those of transformers' `modeling_rope_utils.py`.

use std::f64::consts::PI;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::BASE;
use super::fields::{Fields, short};
use crate::model::{Dropout, Model, Position, Rotary};

/// Keys of a scaling object. Another one is reported.
const KNOWN_KEYS: &[&str] = &[
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "beta_fast",
    "beta_slow",
    "truncate",
    "short_factor",
    "long_factor",
    "short_mscale",
    "long_mscale",
    "mrope_section",
    "mrope_interleaved",
    "llama_4_scaling_beta",
];

/// Defaults of a family.
#[derive(Clone, Copy)]
pub struct Defaults {
    pub theta: f64,
    /// Share of rotating features, or `None` if the family has no partial rotation.
    pub share: Option<f64>,
    /// `head_dim`; by default the width over the number of heads.
    pub head_width: Option<usize>,
}

pub const PLAIN: Defaults = Defaults { theta: 1e4, share: None, head_width: None };

/// Reads the sizes, positions and dropout of a decoder with rotary positions.
pub fn decoder(f: &Fields<'_>, rope: Defaults) -> Result<Model> {
    Ok(Model {
        tokens: f.size_or("max_position_embeddings", 2048)?,
        width: f.size("hidden_size")?,
        layers: f.size("num_hidden_layers")?,
        heads: f.size("num_attention_heads")?,
        key_value_heads: f.size_or("num_key_value_heads", 0)?,
        head_width: f.optional_size("head_dim")?.or(rope.head_width).unwrap_or(0),
        ffn_width: f.size("intermediate_size")?,
        vocabulary: f.size("vocab_size")?,
        position: position(f, rope)?,
        dropout: Dropout { weights: f.number("attention_dropout", 0.0)?, ..Dropout::NONE },
        ..BASE
    })
}

/// Returns the number of features of a head.
pub fn head_width(f: &Fields<'_>, defaults: Defaults) -> Result<usize> {
    match f.optional_size("head_dim")?.or(defaults.head_width) {
        Some(width) => Ok(width),
        None => Ok(f.size("hidden_size")? / f.size("num_attention_heads")?),
    }
}

/// Returns the rotary position of the layers without a window, or of all layers.
///
/// # Errors
/// Returns an error that names the field if it is invalid or not implemented.
pub fn position(f: &Fields<'_>, defaults: Defaults) -> Result<Position> {
    let theta = f.number("rope_theta", defaults.theta)?;
    let share = f.optional_number("partial_rotary_factor")?.or(defaults.share).unwrap_or(1.0);
    scaled(f, Defaults { theta, ..defaults }, share, Scaling::find(f, "full_attention")?)
}

/// Returns the rotary position of the layers with a window, in a family where they have their own base and no scaling.
///
/// # Errors
/// As for [`position`].
pub fn position_of_sliding_layers(f: &Fields<'_>, defaults: Defaults) -> Result<Position> {
    scaled(f, defaults, 1.0, Scaling::find(f, "sliding_attention")?)
}

fn scaled(
    f: &Fields<'_>,
    defaults: Defaults,
    mut share: f64,
    scaling: Option<Scaling<'_>>,
) -> Result<Position> {
    let mut rotary = Rotary::new(defaults.theta);
    if let Some(scaling) = &scaling {
        rotary.theta = scaling.number("rope_theta")?.unwrap_or(rotary.theta);
        share = scaling.number("partial_rotary_factor")?.unwrap_or(share);
    }
    ensure!(
        share == 1.0 || defaults.share.is_some() && share > 0.0 && share < 1.0,
        "partial_rotary_factor is {share}, which is not implemented: use 1"
    );
    let theta = rotary.theta;
    ensure!(theta.is_finite() && theta > 1.0, "rope_theta is {theta}: use a number above 1");
    rotary.share = share;
    if let Some(scaling) = &scaling {
        scaling.apply(&mut rotary, head_width(f, defaults)?)?;
    }
    Ok(Position::Rotary(rotary))
}

/// A scaling object and the name of its field.
struct Scaling<'a> {
    f: &'a Fields<'a>,
    name: &'static str,
    value: &'a Value,
}

impl<'a> Scaling<'a> {
    /// Returns the scaling of a kind of layer, or `None` if there is none.
    fn find(f: &'a Fields<'_>, kind: &str) -> Result<Option<Self>> {
        for name in ["rope_parameters", "rope_scaling"] {
            let Some(value) = f.get(name) else { continue };
            ensure!(value.is_object(), "{name} is {}: use an object or null", short(value));
            let is_nested =
                ["full_attention", "sliding_attention"].iter().any(|key| value.get(key).is_some());
            // A flat object belongs to the layers without a window.
            let own =
                if is_nested { value.get(kind) } else { Some(value).filter(|_| kind == "full_attention") };
            return Ok(own.filter(|own| own.is_object()).map(|value| Self { f, name, value }));
        }
        Ok(None)
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.value.get(key).filter(|value| !value.is_null())
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().filter(|number| number.is_finite());
        number.map(Some).with_context(|| format!("{}.{key} is {}: use a number", self.name, short(value)))
    }

    fn positive(&self, key: &str) -> Result<Option<f64>> {
        let number = self.number(key)?;
        ensure!(
            number.is_none_or(|n| n > 0.0),
            "{}.{key} is {}: use a number above 0",
            self.name,
            number.unwrap_or_default()
        );
        Ok(number)
    }

    fn required(&self, key: &str) -> Result<f64> {
        self.positive(key)?.with_context(|| format!("{}.{key} is missing", self.name))
    }

    /// Returns the context of the unscaled model.
    fn original_context(&self) -> Result<Option<f64>> {
        let own = self.positive("original_max_position_embeddings")?;
        Ok(own.or(self.f.optional_size("original_max_position_embeddings")?.map(|n| n as f64)))
    }

    fn list(&self, key: &str, pairs: usize) -> Result<Vec<f64>> {
        let numbers = |value: &Value| value.as_array()?.iter().map(Value::as_f64).collect::<Option<Vec<_>>>();
        let list = self.get(key).and_then(numbers).filter(|list| list.iter().all(|n| *n > 0.0));
        let list = list.with_context(|| format!("{}.{key} is not a list of numbers above 0", self.name))?;
        ensure!(
            list.len() == pairs,
            "{}.{key} has {} numbers: use {pairs}, half of the rotating features",
            self.name,
            list.len()
        );
        Ok(list)
    }

    /// Sets the frequencies and the factor.
    fn apply(&self, rotary: &mut Rotary, head_width: usize) -> Result<()> {
        let kind = self.get("rope_type").or_else(|| self.get("type"));
        let kind = kind.map_or(Some("default"), Value::as_str).unwrap_or_default();
        let plain = rotary.frequencies(head_width);
        match kind {
            // The sections of multimodal positions are equal for text. Dynamic scaling begins after the context.
            "default" | "mrope" | "dynamic" => {}
            "linear" => {
                let factor = self.required("factor")?;
                rotary.frequencies = Some(plain.iter().map(|w| w / factor).collect::<Vec<_>>().leak());
            }
            "llama3" => rotary.frequencies = Some(self.llama3(&plain)?.leak()),
            // Phi-3 files of 2024 call longrope "su" or "yarn".
            "longrope" | "su" => self.longrope(rotary, &plain)?,
            "yarn" if self.get("short_factor").is_some() => self.longrope(rotary, &plain)?,
            "yarn" => self.yarn(rotary, &plain)?,
            _ => bail!(
                "{}.rope_type is {}, which is not implemented: use default, linear, dynamic, llama3, yarn or longrope",
                self.name,
                short(&kind.into())
            ),
        }
        let keys = self.value.as_object().into_iter().flat_map(|object| object.keys());
        for key in keys.filter(|key| !KNOWN_KEYS.contains(&key.as_str())) {
            self.f.note(format!("ignores the unknown field {}.{}", self.name, short(&key.as_str().into())));
        }
        Ok(())
    }

    /// Llama 3.1: long waves are slower by a factor, with a smooth transition.
    fn llama3(&self, plain: &[f64]) -> Result<Vec<f64>> {
        let factor = self.required("factor")?;
        let (low, high) = (self.required("low_freq_factor")?, self.required("high_freq_factor")?);
        let context = self.original_context()?;
        let context =
            context.with_context(|| format!("{}.original_max_position_embeddings is missing", self.name))?;
        ensure!(low < high, "{}.low_freq_factor is {low}: use less than high_freq_factor", self.name);
        let scaled = |w: &f64| {
            let turns = context * w / (2.0 * PI);
            let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 - smooth) * w / factor + smooth * w
        };
        Ok(plain.iter().map(scaled).collect())
    }

    /// YaRN (Peng et al. 2023): pairs that turn seldom within the context are slower by a factor.
    fn yarn(&self, rotary: &mut Rotary, plain: &[f64]) -> Result<()> {
        let max_tokens = self.f.optional_size("max_position_embeddings")?.map(|n| n as f64);
        let context = self.original_context()?.or(max_tokens);
        let context =
            context.with_context(|| format!("{}.original_max_position_embeddings is missing", self.name))?;
        let factor = self.positive("factor")?.or(max_tokens.map(|tokens| tokens / context));
        let factor = factor.with_context(|| format!("{}.factor is missing", self.name))?;
        let magnitude = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
        let scales = (self.number("mscale")?, self.number("mscale_all_dim")?);
        rotary.factor = match (self.positive("attention_factor")?, scales) {
            (Some(own), _) => own,
            (None, (Some(a), Some(b))) if a != 0.0 && b != 0.0 => magnitude(a) / magnitude(b),
            _ => magnitude(1.0),
        };
        let width = 2.0 * plain.len() as f64;
        // The pair that turns this number of times within the context.
        let pair = |turns: f64| width * (context / (turns * 2.0 * PI)).ln() / (2.0 * rotary.theta.ln());
        let (mut low, mut high) = (
            pair(self.positive("beta_fast")?.unwrap_or(32.0)),
            pair(self.positive("beta_slow")?.unwrap_or(1.0)),
        );
        if self.get("truncate").is_none_or(|value| value != false) {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(width - 1.0));
        // The formula's own way out of a division by zero.
        let span = if low == high { 0.001 } else { high - low };
        let scaled = |(i, w): (usize, &f64)| {
            let slow = ((i as f64 - low) / span).clamp(0.0, 1.0);
            slow * w / factor + (1.0 - slow) * w
        };
        rotary.frequencies = Some(plain.iter().enumerate().map(scaled).collect::<Vec<_>>().leak());
        if self.number("llama_4_scaling_beta")?.is_some_and(|beta| beta != 0.0) {
            self.f.limit_tokens(context as usize, "llama_4_scaling_beta changes longer samples");
        }
        Ok(())
    }

    /// LongRoPE (Ding et al. 2024), within the context of the unscaled model.
    fn longrope(&self, rotary: &mut Rotary, plain: &[f64]) -> Result<()> {
        let max_tokens = self.f.optional_size("max_position_embeddings")?.map(|n| n as f64);
        let context = self.original_context()?.or(max_tokens);
        let context =
            context.with_context(|| format!("{}.original_max_position_embeddings is missing", self.name))?;
        let factor = self.positive("factor")?.or(max_tokens.map(|tokens| tokens / context)).unwrap_or(1.0);
        let default = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / context.ln()).sqrt() };
        rotary.factor = self.positive("attention_factor")?.unwrap_or(default);
        let short = self.list("short_factor", plain.len())?;
        self.list("long_factor", plain.len())?;
        rotary.frequencies = Some(plain.iter().zip(short).map(|(w, by)| w / by).collect::<Vec<_>>().leak());
        if max_tokens.is_none_or(|tokens| tokens > context) {
            self.f.limit_tokens(context as usize, "longrope has other frequencies for longer samples");
        }
        Ok(())
    }
}
