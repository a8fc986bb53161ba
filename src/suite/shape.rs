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
    /// `indicator-b16`, `gpt2-b8-t1024`, `indicator-tiny-b2`
    Model { model: ModelId, batch: usize },
    /// `b16-h8-n111-d32` (B, H, N and D per head), with `-causal` for a decoder's;
    /// `b16-n111-d256-f1024` (B, N, D, F), with `-tanh` for the approximated GELU. A block of a
    /// model that was given has that model's name: its sizes do not say all of it.
    Block { part: Block, model: ModelId, batch: usize },
    /// `n1024`: an n × n product; `n1024-x4` chains four of them.
    Square { n: usize, chain: usize },
    /// `m256`: a buffer of that many MiB.
    Buffer { mib: usize },
}

impl Shape {
    /// The model that it is of, and its batch.
    pub fn model(self) -> Option<(ModelId, usize)> {
        match self {
            Self::Model { model, batch } | Self::Block { model, batch, .. } => Some((model, batch)),
            Self::Square { .. } | Self::Buffer { .. } => None,
        }
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
        match *self {
            Self::Model { model, batch } if model.of_tokens() => {
                write!(f, "{model}-b{batch}-t{}", model.tokens)
            }
            Self::Model { model, batch } => write!(f, "{model}-b{batch}"),
            Self::Block { model, batch, .. } if !model.is_preset() => Self::Model { model, batch }.fmt(f),
            Self::Block { part: Block::Attention, model: m, batch } => {
                let mark = if m.causal { "-causal" } else { "" };
                write!(f, "b{batch}-h{}-n{}-d{}{mark}", m.heads, m.tokens, m.head_width)
            }
            Self::Block { part: Block::FeedForward, model: m, batch } => {
                let mark = if m.activation == Activation::GeluTanh { "-tanh" } else { "" };
                write!(f, "b{batch}-n{}-d{}-f{}{mark}", m.tokens, m.width, m.hidden)
            }
            Self::Square { n, chain: 1 } => write!(f, "n{n}"),
            Self::Square { n, chain } => write!(f, "n{n}-x{chain}"),
            Self::Buffer { mib } => write!(f, "m{mib}"),
        }
    }
}

/// The number behind a letter: `b16` is 16 of b.
fn sized(word: &str, letter: char) -> Option<usize> {
    word.strip_prefix(letter)?.parse().ok()
}

/// The model of a name: one of the suite, or one that was given, at so many tokens.
fn model(name: &str, tokens: Option<usize>) -> Result<ModelId, String> {
    let small = || ModelId::given(name.strip_suffix("-tiny")?, None).map(ModelId::miniature);
    let tokens = tokens.filter(|t| *t > 0);
    ModelId::named(name).or_else(|| ModelId::given(name, tokens)).or_else(small).ok_or_else(|| {
        let known: Vec<&str> =
            ModelId::with_miniatures().map(|m| m.name).chain(ModelId::given_names()).collect();
        format!("unknown model '{name}': one of {}, or what TRANSFORMER_BENCH_MODEL names", known.join(", "))
    })
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
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
            [m] if sized(m, 'm').is_some() => {
                Some(Self::Buffer { mib: at_least_one(sized(m, 'm').unwrap_or(0))? })
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
                        Some(Self::Model { model, batch: at_least_one(batch)? })
                    }
                    None => None,
                }
            }
        };
        shape.filter(|shape| shape.to_string() == text).ok_or_else(|| {
            format!("unknown shape '{text}': for example indicator-b16, gpt2-b8-t1024, b16-h8-n111-d32")
        })
    }
}
