//! The sizes at which a case runs.

use std::fmt;
use std::str::FromStr;

use super::{Optimizer, Workload};
use crate::model::parameters::{self, ParameterSource, ParameterSpec, Parameters};
use crate::model::{Activation, Block, Dropout, Lora, ModelId, config};

/// Largest batch, number of ranks, or size of a peak case: a matrix of 65,536 × 65,536 has 16 GiB in f32.
pub const MAX_BATCH: usize = 1 << 16;

/// The sizes of a case. The examples are ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shape {
    /// `indicator-b16`, `gpt2-b8-t1024`, `indicator-tiny-b2`. In `indicator-b16-lora16`, the model has adapters of rank 16.
    /// `indicator-b16-dp2` divides the global batch of 16
    /// between two ranks, with one device each. In `indicator-b16-a4`, each rank computes its samples in four
    /// micro-batches, one after the other, and adds up their gradients for one update. `indicator-b16-muon` has
    /// another optimizer than AdamW.
    Model { model: ModelId, batch: usize, optimizer: Optimizer, ranks: usize, micro_batches: usize },
    /// `b16-h8-t111-d32` (B, H, T and D per head), with `-causal` for a causal mask; `b16-t111-d256-f1024`
    /// (B, T, D, F), with `-tanh` for the approximated GELU. A block of a custom model has the name of the
    /// model instead, because these sizes do not describe all of it.
    Block { block: Block, model: ModelId, batch: usize },
    /// `n1024`: an n × n matrix product; `n1024-x4` chains four of them.
    Square { n: usize, chain: usize },
    /// `256mib`: a buffer of 256 MiB; `256mib-dp2`: one on each of two ranks.
    Buffer { mib: usize, ranks: usize },
}

impl Shape {
    /// Returns the model and its batch, or `None` for a peak case.
    pub fn model(self) -> Option<(ModelId, usize)> {
        match self {
            Self::Model { model, batch, .. } | Self::Block { model, batch, .. } => Some((model, batch)),
            Self::Square { .. } | Self::Buffer { .. } => None,
        }
    }

    /// Returns the number of ranks, with one device each.
    pub fn ranks(self) -> usize {
        match self {
            Self::Model { ranks, .. } | Self::Buffer { ranks, .. } => ranks,
            Self::Block { .. } | Self::Square { .. } => 1,
        }
    }

    /// Returns the shape with another number of ranks. Blocks and squares have one rank and stay unchanged.
    pub fn with_ranks(mut self, count: usize) -> Self {
        if let Self::Model { ranks, .. } | Self::Buffer { ranks, .. } = &mut self {
            *ranks = count;
        }
        self
    }

    /// Returns the number of micro-batches that a rank computes one after the other in a step.
    pub fn micro_batches(self) -> usize {
        if let Self::Model { micro_batches, .. } = self { micro_batches } else { 1 }
    }

    /// Returns the shape with another number of micro-batches. Only whole models have several, and other shapes stay
    /// unchanged.
    pub fn with_micro_batches(mut self, count: usize) -> Self {
        if let Self::Model { micro_batches, .. } = &mut self {
            *micro_batches = count;
        }
        self
    }

    /// Returns the optimizer of a training step.
    pub fn optimizer(self) -> Optimizer {
        if let Self::Model { optimizer, .. } = self { optimizer } else { Optimizer::Adamw }
    }

    /// Returns the shape with another optimizer. Only whole models have one, and other shapes stay unchanged.
    pub fn with_optimizer(mut self, other: Optimizer) -> Self {
        if let Self::Model { optimizer, .. } = &mut self {
            *optimizer = other;
        }
        self
    }

    /// Returns true if Muon updates a parameter of this shape.
    pub fn uses_muon_for(self, spec: &ParameterSpec) -> bool {
        self.optimizer() == Optimizer::Muon && spec.is_trained() && spec.is_block_matrix()
    }

    /// Returns the shape that computes the same function on one device, without micro-batches.
    pub fn undivided(self) -> Self {
        self.with_ranks(1).with_micro_batches(1)
    }

    /// Returns the shape of one micro-batch of one rank.
    pub fn micro_batch(mut self) -> Self {
        if let Self::Model { batch, ranks, micro_batches, .. } = &mut self {
            *batch /= *ranks * *micro_batches;
        }
        self.undivided()
    }

    /// Returns true if the ranks and micro-batches divide the batch into equal parts.
    pub fn divides_evenly(self) -> bool {
        self.batch().is_multiple_of(self.ranks() * self.micro_batches())
    }

    /// Returns the shape of a whole model on one device.
    pub const fn for_model(model: ModelId, batch: usize) -> Self {
        Self::Model { model, batch, optimizer: Optimizer::Adamw, ranks: 1, micro_batches: 1 }
    }

    /// Returns the shape of a workload on one device: the block that it runs, or the whole model.
    pub fn for_workload(workload: Workload, model: ModelId, batch: usize) -> Self {
        match workload.block() {
            // Only whole models have adapters.
            Some(block) => Self::Block { block, model: model.with_lora(None), batch },
            None => Self::for_model(model, batch),
        }
    }

    /// Returns the number of samples per step, or 1 for a peak case.
    pub fn batch(self) -> usize {
        self.model().map_or(1, |(_, batch)| batch)
    }

    /// Returns the dropout of a training workload.
    pub fn dropout(self) -> Dropout {
        self.model().map_or(Dropout::NONE, |(model, _)| model.dropout)
    }

    /// Returns the block, or `None` if the shape is not a block.
    fn block(self) -> Option<Block> {
        if let Self::Block { block, .. } = self { Some(block) } else { None }
    }

    /// Takes the parameters of this shape from `source`.
    pub fn take_parameters<T>(self, source: &mut impl ParameterSource<Item = T>) -> Parameters<T> {
        self.model().map_or(Parameters::None, |(model, _)| Parameters::take(source, &model, self.block()))
    }

    /// Returns the parameters of this shape in order. A peak case has none.
    pub fn parameter_specs(self) -> Vec<ParameterSpec> {
        self.model().map_or_else(Vec::new, |(model, _)| parameters::parameter_specs(&model, self.block()))
    }

    /// Returns the number of trained parameters (scalars).
    pub fn trained_count(self) -> usize {
        self.parameter_specs().iter().filter(|spec| spec.is_trained()).map(ParameterSpec::len).sum()
    }

    /// Returns the number of parameters (scalars).
    pub fn parameter_count(self) -> usize {
        self.parameter_specs().iter().map(ParameterSpec::len).sum()
    }

    fn parse_data_parallel(text: &str, single: &str, ranks: usize) -> Result<Self, String> {
        let shape = single.parse::<Self>()?.with_ranks(ranks);
        match shape {
            _ if ranks > MAX_BATCH => Err(format!("shape '{text}': use at most {MAX_BATCH} ranks")),
            _ if ranks < 2 => {
                Err(format!("shape '{text}': use at least 2 ranks; '{single}' is for one device"))
            }
            Self::Model { batch, micro_batches, .. } if !shape.divides_evenly() => {
                let parts = if micro_batches > 1 {
                    format!(" with {micro_batches} micro-batches each")
                } else {
                    String::new()
                };
                Err(format!("shape '{text}': {ranks} ranks{parts} cannot divide a batch of {batch}"))
            }
            _ if shape.ranks() == ranks => Ok(shape),
            _ => Err(format!("shape '{text}': '{single}' cannot be divided between ranks")),
        }
    }

    fn parse_lora(text: &str, base: &str, lora: Lora) -> Result<Self, String> {
        match base.parse::<Self>()? {
            shape @ Self::Model { model, batch, .. }
                if shape == Self::for_model(model, batch) && model.lora.is_none() =>
            {
                Ok(Self::for_model(model.with_lora(Some(lora)), batch))
            }
            _ => Err(format!("shape '{text}': write -lora{lora} behind the batch and tokens of a model")),
        }
    }

    fn parse_optimizer(text: &str, base: &str, optimizer: Optimizer) -> Result<Self, String> {
        match base.parse::<Self>()? {
            shape @ Self::Model { model, batch, .. } if shape == Self::for_model(model, batch) => {
                if model.lora.is_some() {
                    return Err(format!("shape '{text}': adapters are trained with AdamW"));
                }
                Ok(shape.with_optimizer(optimizer))
            }
            _ => Err(format!("shape '{text}': write -{optimizer} behind the batch and tokens of a model")),
        }
    }

    fn parse_accumulation(text: &str, undivided: &str, count: usize) -> Result<Self, String> {
        let shape = undivided.parse::<Self>()?.with_micro_batches(count);
        match shape {
            _ if !(2..=MAX_BATCH).contains(&count) => {
                Err(format!("shape '{text}': use 2 to {MAX_BATCH} micro-batches, or '{undivided}' for one"))
            }
            _ if shape.ranks() > 1 => {
                Err(format!("shape '{text}': write -a{count} before -dp{}", shape.ranks()))
            }
            Self::Model { batch, .. } if !shape.divides_evenly() => {
                Err(format!("shape '{text}': {count} micro-batches cannot divide a batch of {batch}"))
            }
            _ if shape.micro_batches() == count => Ok(shape),
            _ => Err(format!("shape '{text}': '{undivided}' cannot be divided into micro-batches")),
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.ranks() > 1 {
            return write!(f, "{}-dp{}", self.with_ranks(1), self.ranks());
        }
        if self.micro_batches() > 1 {
            return write!(f, "{}-a{}", self.with_micro_batches(1), self.micro_batches());
        }
        if self.optimizer() != Optimizer::Adamw {
            return write!(f, "{}-{}", self.with_optimizer(Optimizer::Adamw), self.optimizer());
        }
        if let Self::Model { model, batch, .. } = *self
            && let Some(lora) = model.lora
        {
            return write!(f, "{}-lora{lora}", Self::for_model(model.with_lora(None), batch));
        }
        match *self {
            Self::Model { model, batch, .. } if model.is_language_model() => {
                write!(f, "{model}-b{batch}-t{}", model.tokens)
            }
            Self::Model { model, batch, .. } => write!(f, "{model}-b{batch}"),
            Self::Block { model, batch, .. } if !model.is_preset() => Self::for_model(model, batch).fmt(f),
            Self::Block { block: Block::Attention, model: m, batch } => {
                let mark = if m.causal { "-causal" } else { "" };
                write!(f, "b{batch}-h{}-t{}-d{}{mark}", m.heads, m.tokens, m.head_width)
            }
            Self::Block { block: Block::FeedForward, model: m, batch } => {
                let mark = if m.activation == Activation::GeluTanh { "-tanh" } else { "" };
                write!(f, "b{batch}-t{}-d{}-f{}{mark}", m.tokens, m.width, m.ffn_width)
            }
            Self::Square { n, chain: 1 } => write!(f, "n{n}"),
            Self::Square { n, chain } => write!(f, "n{n}-x{chain}"),
            Self::Buffer { mib, .. } => write!(f, "{mib}mib"),
        }
    }
}

/// Returns the number after a letter: 16 for `b16` and the letter `b`.
fn size_after(word: &str, letter: char) -> Option<usize> {
    word.strip_prefix(letter)?.parse().ok()
}

/// Finds a built-in model, a custom model at this number of tokens, or the miniature of a custom model.
fn find_model(name: &str, tokens: Option<usize>) -> Result<ModelId, String> {
    let miniature = || ModelId::custom(name.strip_suffix("-tiny")?, None).map(ModelId::miniature);
    let tokens = tokens.filter(|t| (1..=config::MAX_SIZE).contains(t));
    ModelId::named(name).or_else(|| ModelId::custom(name, tokens)).or_else(miniature).ok_or_else(|| {
        let known: Vec<&str> =
            ModelId::with_miniatures().map(|m| m.name).chain(ModelId::custom_names()).collect();
        format!("unknown model '{name}': use {}, or set TRANSFORMER_BENCH_MODEL", known.join(", "))
    })
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((single, ranks)) = text.rsplit_once("-dp")
            && let Ok(ranks) = ranks.parse()
        {
            return Self::parse_data_parallel(text, single, ranks);
        }
        if let Some((undivided, count)) = text.rsplit_once("-a")
            && let Ok(count) = count.parse()
        {
            return Self::parse_accumulation(text, undivided, count);
        }
        if let Some((base, name)) = text.rsplit_once('-')
            && let Ok(optimizer) = name.parse::<Optimizer>()
        {
            if optimizer == Optimizer::Adamw {
                return Err(format!("shape '{text}': AdamW is the default, write '{base}'"));
            }
            return Self::parse_optimizer(text, base, optimizer);
        }
        if let Some((base, lora)) = text.rsplit_once("-lora")
            && let Some(lora) = Lora::from_id(lora)
        {
            return Self::parse_lora(text, base, lora);
        }
        let words: Vec<&str> = text.split('-').collect();
        let shape = if let Some(mib) = text.strip_suffix("mib") {
            mib.parse().ok().map(|mib| Self::Buffer { mib, ranks: 1 })
        } else if let Some(n) = size_after(words[0], 'n') {
            let chain = words.get(1).and_then(|word| size_after(word, 'x')).unwrap_or(1);
            Some(Self::Square { n, chain })
        } else if let Some(batch) = size_after(words[0], 'b') {
            // The sizes of a block identify its model.
            let blocks = [Block::Attention, Block::FeedForward];
            ModelId::with_miniatures()
                .flat_map(|model| blocks.map(|block| Self::Block { block, model, batch }))
                .find(|shape| shape.to_string() == text)
        } else if let Some(at) = words.iter().rposition(|word| size_after(word, 'b').is_some()) {
            let tokens = words.get(at + 1).and_then(|word| size_after(word, 't'));
            let model = find_model(&words[..at].join("-"), tokens)?;
            size_after(words[at], 'b').map(|batch| Self::for_model(model, batch))
        } else {
            None
        };
        let Some(shape) = shape.filter(|shape| shape.to_string() == text) else {
            return Err(format!(
                "unknown shape '{text}': use for example indicator-b16, gpt2-b8-t1024 or b16-h8-t111-d32"
            ));
        };
        let (smallest, largest) = match shape {
            Self::Model { batch, .. } | Self::Block { batch, .. } => (batch, batch),
            Self::Square { n, chain } => (n.min(chain), n.max(chain)),
            Self::Buffer { mib, .. } => (mib, mib),
        };
        if smallest > 0 && largest <= MAX_BATCH {
            Ok(shape)
        } else {
            Err(format!("shape '{text}': a size must be at least 1 and at most {MAX_BATCH}"))
        }
    }
}
