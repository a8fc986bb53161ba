//! The sizes that a case runs at.

use std::fmt;
use std::str::FromStr;

use crate::model::{Activation, Dropout, ModelId};

/// A part of a model's blocks, measured alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Block {
    Attention,
    FeedForward,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shape {
    /// `indicator-b16`, `gpt2-b8-t1024`, `indicator-tiny-b2`; `indicator-b16-dp2` divides that batch
    /// among two ranks, a device each.
    Model { model: ModelId, batch: usize, ranks: usize },
    /// `b16-h8-t111-d32` (B, H, T and D per head), with `-causal` for a decoder's;
    /// `b16-t111-d256-f1024` (B, T, D, F), with `-tanh` for the approximated GELU. A block of a
    /// model that was given has that model's name: its sizes do not say all of it.
    Block { part: Block, model: ModelId, batch: usize },
    /// `n1024`: an n × n product; `n1024-x4` chains four of them.
    Square { n: usize, chain: usize },
    /// `256mib`: a buffer of 256 MiB; `256mib-dp2`: one on each of two ranks.
    Buffer { mib: usize, ranks: usize },
}

impl Shape {
    /// The model that it is of, and its batch.
    pub fn model(self) -> Option<(ModelId, usize)> {
        match self {
            Self::Model { model, batch, .. } | Self::Block { model, batch, .. } => Some((model, batch)),
            Self::Square { .. } | Self::Buffer { .. } => None,
        }
    }

    /// The processes, a device each, among which it is divided.
    pub fn ranks(self) -> usize {
        match self {
            Self::Model { ranks, .. } | Self::Buffer { ranks, .. } => ranks,
            Self::Block { .. } | Self::Square { .. } => 1,
        }
    }

    /// The same divided among so many; on one device it is the same function.
    pub fn with_ranks(mut self, among: usize) -> Self {
        if let Self::Model { ranks, .. } | Self::Buffer { ranks, .. } = &mut self {
            *ranks = among;
        }
        self
    }

    /// A whole model on one device.
    pub const fn of_model(model: ModelId, batch: usize) -> Self {
        Self::Model { model, batch, ranks: 1 }
    }

    /// Samples that go in at once; 1 where it has none.
    pub fn batch(self) -> usize {
        self.model().map_or(1, |(_, batch)| batch)
    }

    /// Dropout of a training workload at this shape.
    pub fn dropout(self) -> Dropout {
        self.model().map_or(Dropout::NONE, |(model, _)| model.dropout)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.ranks() > 1 {
            return write!(f, "{}-dp{}", self.with_ranks(1), self.ranks());
        }
        match *self {
            Self::Model { model, batch, .. } if model.is_language_model() => {
                write!(f, "{model}-b{batch}-t{}", model.tokens)
            }
            Self::Model { model, batch, .. } => write!(f, "{model}-b{batch}"),
            Self::Block { model, batch, .. } if !model.is_preset() => Self::of_model(model, batch).fmt(f),
            Self::Block { part: Block::Attention, model: m, batch } => {
                let mark = if m.causal { "-causal" } else { "" };
                write!(f, "b{batch}-h{}-t{}-d{}{mark}", m.heads, m.tokens, m.head_width)
            }
            Self::Block { part: Block::FeedForward, model: m, batch } => {
                let mark = if m.activation == Activation::GeluTanh { "-tanh" } else { "" };
                write!(f, "b{batch}-t{}-d{}-f{}{mark}", m.tokens, m.width, m.ffn_width)
            }
            Self::Square { n, chain: 1 } => write!(f, "n{n}"),
            Self::Square { n, chain } => write!(f, "n{n}-x{chain}"),
            Self::Buffer { mib, .. } => write!(f, "{mib}mib"),
        }
    }
}

/// The number behind a letter: `b16` is 16 of b.
fn sized(word: &str, letter: char) -> Option<usize> {
    word.strip_prefix(letter)?.parse().ok()
}

/// Returns the size of a buffer: 16 for `16mib`.
fn mebibytes(word: &str) -> Option<usize> {
    word.strip_suffix("mib")?.parse().ok()
}

/// The model of a name: one of the suite, or one that was given, at so many tokens.
fn model(name: &str, tokens: Option<usize>) -> Result<ModelId, String> {
    let small = || ModelId::custom(name.strip_suffix("-tiny")?, None).map(ModelId::miniature);
    let tokens = tokens.filter(|t| *t > 0);
    ModelId::named(name).or_else(|| ModelId::custom(name, tokens)).or_else(small).ok_or_else(|| {
        let known: Vec<&str> =
            ModelId::with_miniatures().map(|m| m.name).chain(ModelId::custom_names()).collect();
        format!("unknown model '{name}': one of {}, or what TRANSFORMER_BENCH_MODEL names", known.join(", "))
    })
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((one, ranks)) = text.rsplit_once("-dp")
            && let Ok(ranks) = ranks.parse::<usize>()
        {
            let shape: Self = one.parse()?;
            return match shape.with_ranks(ranks) {
                _ if ranks < 2 => Err(format!("shape '{text}': ranks are 2 at least; one device is '{one}'")),
                Self::Model { batch, .. } if batch % ranks != 0 => {
                    Err(format!("shape '{text}': {ranks} ranks can't share a batch of {batch} alike"))
                }
                divided if divided.ranks() == ranks => Ok(divided),
                _ => Err(format!("shape '{text}': '{one}' is not divided among ranks")),
            };
        }
        let words: Vec<&str> = text.split('-').collect();
        let at_least_one = |n: usize| {
            if n == 0 { Err(format!("shape '{text}': a size must be at least 1")) } else { Ok(n) }
        };
        let shape = match words[..] {
            [n] if sized(n, 'n').is_some() => {
                Some(Self::Square { n: at_least_one(sized(n, 'n').unwrap_or(0))?, chain: 1 })
            }
            [n, x] if sized(n, 'n').is_some() && sized(x, 'x').is_some() => Some(Self::Square {
                n: at_least_one(sized(n, 'n').unwrap_or(0))?,
                chain: at_least_one(sized(x, 'x').unwrap_or(0))?,
            }),
            [size] if mebibytes(size).is_some() => {
                Some(Self::Buffer { mib: at_least_one(mebibytes(size).unwrap_or(0))?, ranks: 1 })
            }
            [first, ..] if sized(first, 'b').is_some() => {
                let batch = at_least_one(sized(first, 'b').unwrap_or(0))?;
                // A block is some model's: its sizes say whose.
                ModelId::with_miniatures()
                    .flat_map(|model| {
                        [Block::Attention, Block::FeedForward].map(|part| Self::Block { part, model, batch })
                    })
                    .find(|shape| shape.to_string() == text)
            }
            _ => {
                let place = words.iter().rposition(|word| sized(word, 'b').is_some());
                let (name, sizes) = words.split_at(place.unwrap_or(words.len()));
                match sizes.first().and_then(|word| sized(word, 'b')) {
                    Some(batch) => {
                        let tokens = sizes.get(1).and_then(|word| sized(word, 't'));
                        let model = model(&name.join("-"), tokens)?;
                        Some(Self::of_model(model, at_least_one(batch)?))
                    }
                    None => None,
                }
            }
        };
        shape.filter(|shape| shape.to_string() == text).ok_or_else(|| {
            format!("unknown shape '{text}': for example indicator-b16, gpt2-b8-t1024, b16-h8-t111-d32")
        })
    }
}
