//! Low-rank adapters of linear layers (LoRA, Hu et al. 2021, arXiv 2106.09685).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Block;

/// Largest rank: that of the largest ids of ranks and batches.
const MAX_RANK: usize = 1 << 16;

/// The adapters of a model. A layer with one computes y = x·Wᵀ + b + (α / rank)·(x·Aᵀ)·Bᵀ, with A [rank, in] and
/// B [out, rank]. Only A and B are trained.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Lora {
    pub rank: usize,
    /// Twice the rank, a common choice. The defaults are α = rank in PEFT, and a factor of 20 in mlx-lm. With a factor
    /// of 1, a step that forgets it would pass the checks.
    pub alpha: usize,
    pub layers: AdaptedLayers,
}

/// The layers that have an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AdaptedLayers {
    /// All linear layers of the blocks (PEFT's `all-linear`).
    All,
    /// The projections of queries and values, as in the paper.
    QueriesValues,
}

impl Lora {
    pub const fn new(rank: usize, layers: AdaptedLayers) -> Self {
        Self { rank, alpha: 2 * rank, layers }
    }

    /// Returns the factor of the adapters' results.
    pub fn scale(&self) -> f64 {
        self.alpha as f64 / self.rank as f64
    }

    /// Returns true if a layer of a block has an adapter. `part` is its name there, such as `q` or `up`.
    pub fn adapts(&self, block: Block, part: &str) -> bool {
        self.layers == AdaptedLayers::All || (block == Block::Attention && matches!(part, "q" | "v"))
    }

    /// Returns true if ids can describe it.
    pub fn is_valid(&self) -> bool {
        (1..=MAX_RANK).contains(&self.rank) && *self == Self::new(self.rank, self.layers)
    }

    /// Returns the option that selects it, `16` or `16:qv`.
    pub fn option(&self) -> String {
        let layers = if self.layers == AdaptedLayers::QueriesValues { ":qv" } else { "" };
        format!("{}{layers}", self.rank)
    }

    /// Parses the end of an id, `16` or `16qv`. Returns `None` if it is not one.
    pub fn from_id(text: &str) -> Option<Self> {
        let (rank, layers) = match text.strip_suffix("qv") {
            Some(rank) => (rank, AdaptedLayers::QueriesValues),
            None => (text, AdaptedLayers::All),
        };
        let lora = Self::new(rank.parse().ok().filter(|rank| (1..=MAX_RANK).contains(rank))?, layers);
        (lora.to_string() == text).then_some(lora)
    }
}

impl fmt::Display for Lora {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layers = if self.layers == AdaptedLayers::QueriesValues { "qv" } else { "" };
        write!(f, "{}{layers}", self.rank)
    }
}

/// Parses the option `16` or `16:qv`.
impl FromStr for Lora {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let id = match text.strip_suffix(":qv") {
            Some(rank) => format!("{rank}qv"),
            None => text.to_owned(),
        };
        let is_id_only = text.ends_with("qv") && !text.ends_with(":qv");
        Self::from_id(&id).filter(|_| !is_id_only).ok_or_else(|| {
            format!(
                "'{text}': use a rank from 1 to {MAX_RANK}, or a rank with ':qv' for queries and values alone"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_and_ids_name_rank_and_layers() {
        let all = Lora::new(16, AdaptedLayers::All);
        let queries_values = Lora::new(8, AdaptedLayers::QueriesValues);
        assert_eq!(("16".parse(), "8:qv".parse()), (Ok(all), Ok(queries_values)));
        assert_eq!((all.option(), queries_values.option()), ("16".into(), "8:qv".into()));
        assert_eq!((Lora::from_id("16"), Lora::from_id("8qv")), (Some(all), Some(queries_values)));
        assert_eq!(
            (all.scale(), all.to_string(), queries_values.to_string()),
            (2.0, "16".into(), "8qv".into())
        );
        for wrong in ["", "0", "16:", "16:qk", "16qv", ":qv", "+16", "016", "65537"] {
            assert!(wrong.parse::<Lora>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn queries_and_values_are_parts_of_attention() {
        let adapted = |lora: Lora| {
            let parts = [(Block::Attention, "q"), (Block::Attention, "k"), (Block::FeedForward, "up")];
            parts.map(|(block, part)| lora.adapts(block, part))
        };
        assert_eq!(adapted(Lora::new(4, AdaptedLayers::All)), [true, true, true]);
        assert_eq!(adapted(Lora::new(4, AdaptedLayers::QueriesValues)), [true, false, false]);
    }
}
