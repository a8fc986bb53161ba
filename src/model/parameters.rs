//! The parameters of a model or a block: names, dimensions, initial values and order.
//!
//! The reference and both frameworks store their own tensors in the structures below, filled in the same
//! order. Weights are [out, in], as in the linear layers of both frameworks.

mod flatten;

use super::{Block, Input, Model, NormKind, NormOrder, Output, Position};

/// Distribution of a parameter's initial values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Uniform in ±bound.
    Uniform(f32),
    /// 1 plus uniform in ±0.1. With weights of exactly 1, a norm without its weight would pass the checks.
    NearOne,
}

/// The part of a parameter in training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Trained, in the precision of the case.
    Trained,
    /// Not trained, in the precision of the case, because the model has adapters.
    Frozen,
    /// A matrix of an adapter: trained, and stored in f32 with its optimizer state.
    Adapter,
}

/// Name, dimensions, initialization and role of a parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterSpec {
    pub name: String,
    pub dims: Vec<usize>,
    pub init: Init,
    pub role: Role,
}

impl ParameterSpec {
    /// Returns true if it has a gradient and an optimizer state.
    pub fn is_trained(&self) -> bool {
        self.role != Role::Frozen
    }

    /// Returns true for a matrix of a transformer block. Embeddings, positions, output heads, norms and biases are none.
    pub fn is_block_matrix(&self) -> bool {
        self.dims.len() == 2 && self.name.starts_with("blocks.")
    }

    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// y = x·weightᵀ + bias, plus the result of the adapter
#[derive(Clone, Debug)]
pub struct Linear<T> {
    pub weight: T,
    pub bias: Option<T>,
    pub adapter: Option<Adapter<T>>,
}

/// The matrices A [rank, in] and B [out, rank] of [`Lora`].
#[derive(Clone, Debug)]
pub struct Adapter<T> {
    pub a: T,
    pub b: T,
}

/// Weight and bias of a norm, each if [`NormKind::has_weight_and_bias`] says so.
#[derive(Clone, Debug)]
pub struct Norm<T> {
    pub weight: Option<T>,
    pub bias: Option<T>,
}

/// Multi-head self-attention (Vaswani et al. 2017).
#[derive(Clone, Debug)]
pub struct Attention<T> {
    pub q: Linear<T>,
    pub k: Linear<T>,
    pub v: Linear<T>,
    /// Norms of the queries and of the keys.
    pub qk_norms: Option<[Norm<T>; 2]>,
    pub o: Linear<T>,
}

/// down(act(up(x))), or down(act(gate(x))·up(x)) with a gate.
#[derive(Clone, Debug)]
pub struct FeedForward<T> {
    pub gate: Option<Linear<T>>,
    pub up: Linear<T>,
    pub down: Linear<T>,
}

/// A transformer layer: an attention block and a feed-forward block.
#[derive(Clone, Debug)]
pub struct Layer<T> {
    pub attention: Attention<T>,
    /// The norm of attention: of its input, of its output or of the sum, as [`NormOrder`] says.
    pub norm1: Norm<T>,
    pub feed_forward: FeedForward<T>,
    /// The norm of the feed-forward block, or `None` if both blocks share one.
    pub norm2: Option<Norm<T>>,
    /// The norms of both outputs, if there are others for the inputs.
    pub output_norms: Option<[Norm<T>; 2]>,
}

/// D → D/2, ReLU, → 1
#[derive(Clone, Debug)]
pub struct IndicatorHead<T> {
    pub hidden: Linear<T>,
    pub out: Linear<T>,
}

/// Maps the inputs to [B, T, D].
#[derive(Clone, Debug)]
pub enum Embedding<T> {
    /// The token table [V, D], which a tied output shares, and the row [D] of BERT's first token type.
    Tokens(T, Option<T>),
    Indicator {
        value: Linear<T>,
        market: Linear<T>,
    },
}

/// The parameters of a whole model.
#[derive(Clone, Debug)]
pub struct Network<T> {
    pub embedding: Embedding<T>,
    pub position: Option<T>,
    pub embedding_norm: Option<Norm<T>>,
    pub blocks: Vec<Layer<T>>,
    pub final_norm: Option<Norm<T>>,
    pub output: OutputHead<T>,
}

/// Maps the result of the last layer to the outputs.
#[derive(Clone, Debug)]
pub enum OutputHead<T> {
    /// Uses the token table.
    Tied,
    /// D → V
    Untied(Linear<T>),
    /// BERT's masked-token head: a linear layer, a norm, the token table and a bias [V].
    MlmHead { dense: Linear<T>, norm: Norm<T>, bias: T },
    /// The selection head and the allocation head.
    IndicatorHeads([IndicatorHead<T>; 2]),
}

impl<T> Network<T> {
    /// Returns the token table [V, D].
    ///
    /// # Panics
    /// Panics if the model is not a language model.
    pub fn token_table(&self) -> &T {
        match &self.embedding {
            Embedding::Tokens(table, _) => table,
            Embedding::Indicator { .. } => panic!("only a language model has a token table"),
        }
    }
}

/// A source of parameters. The calls in this file fix their order.
pub trait ParameterSource {
    type Item;

    /// Returns the next parameter.
    fn next(&mut self, name: &str, dims: &[usize], init: Init) -> Self::Item;
}

/// A source that takes tensors from an iterator in the order of the parameters.
pub struct InOrder<I>(pub I);

impl<I: Iterator> ParameterSource for InOrder<I> {
    type Item = I::Item;

    fn next(&mut self, name: &str, _: &[usize], _: Init) -> I::Item {
        self.0.next().unwrap_or_else(|| panic!("parameter {name} has no tensor"))
    }
}

/// A source that collects the specifications.
#[derive(Default)]
struct Specs(Vec<ParameterSpec>);

impl ParameterSource for Specs {
    type Item = ();

    fn next(&mut self, name: &str, dims: &[usize], init: Init) {
        self.0.push(ParameterSpec { name: name.to_owned(), dims: dims.to_vec(), init, role: Role::Trained });
    }
}

impl<T> Linear<T> {
    fn take(
        source: &mut impl ParameterSource<Item = T>,
        name: &str,
        from: usize,
        to: usize,
        bias: bool,
    ) -> Self {
        let bound = Init::Uniform(1.0 / (from as f32).sqrt());
        Self {
            weight: source.next(&format!("{name}.weight"), &[to, from], bound),
            bias: bias.then(|| source.next(&format!("{name}.bias"), &[to], bound)),
            adapter: None,
        }
    }
}

/// Last parts of the names of an adapter's matrices.
const ADAPTER_PARTS: [&str; 2] = ["lora-a", "lora-b"];

impl<T> Adapter<T> {
    /// Takes an adapter. B is random too. Training starts with zeros, with which A has no gradient, and a step that
    /// loses it would pass the checks.
    fn take(
        source: &mut impl ParameterSource<Item = T>,
        name: &str,
        [from, to]: [usize; 2],
        rank: usize,
    ) -> Self {
        let mut next = |part: &str, dims: [usize; 2]| {
            source.next(&format!("{name}.{part}"), &dims, Init::Uniform(1.0 / (dims[1] as f32).sqrt()))
        };
        let [a, b] = ADAPTER_PARTS;
        Self { a: next(a, [rank, from]), b: next(b, [to, rank]) }
    }
}

impl<T> Norm<T> {
    fn take(source: &mut impl ParameterSource<Item = T>, name: &str, width: usize, kind: NormKind) -> Self {
        let (weight, bias) = kind.has_weight_and_bias();
        Self {
            weight: weight.then(|| {
                let init = if kind.has_offset() { Init::Uniform(0.1) } else { Init::NearOne };
                source.next(&format!("{name}.weight"), &[width], init)
            }),
            bias: bias.then(|| source.next(&format!("{name}.bias"), &[width], Init::Uniform(0.1))),
        }
    }
}

/// A linear layer of a block, which can have an adapter.
struct BlockPart<'a> {
    model: &'a Model,
    block: Block,
    /// Name of the block.
    name: &'a str,
    part: &'a str,
}

impl BlockPart<'_> {
    fn take<T>(
        &self,
        source: &mut impl ParameterSource<Item = T>,
        from: usize,
        to: usize,
        bias: bool,
    ) -> Linear<T> {
        let name = format!("{}.{}", self.name, self.part);
        let layer = Linear::take(source, &name, from, to, bias);
        let lora = self.model.lora.filter(|lora| lora.adapts(self.block, self.part));
        Linear { adapter: lora.map(|lora| Adapter::take(source, &name, [from, to], lora.rank)), ..layer }
    }
}

impl<T> Attention<T> {
    pub fn take(source: &mut impl ParameterSource<Item = T>, name: &str, m: &Model) -> Self {
        let (inner, shared) = m.qkv_widths();
        let mut linear = |part, from, to, bias| {
            BlockPart { model: m, block: Block::Attention, name, part }.take(source, from, to, bias)
        };
        let q = linear("q", m.width, inner, m.bias.qkv);
        let k = linear("k", m.width, shared, m.bias.qkv);
        let v = linear("v", m.width, shared, m.bias.qkv);
        let o = linear("o", inner, m.width, m.bias.out);
        let [q_width, k_width] = m.qk_norm_widths();
        let norms = m.qk_norm.map(|kind| {
            [("q-norm", q_width), ("k-norm", k_width)]
                .map(|(part, width)| Norm::take(source, &format!("{name}.{part}"), width, kind))
        });
        Self { q, k, v, qk_norms: norms, o }
    }
}

impl<T> FeedForward<T> {
    pub fn take(source: &mut impl ParameterSource<Item = T>, name: &str, m: &Model) -> Self {
        let bias = m.bias.feed_forward;
        let mut linear = |part, from, to| {
            BlockPart { model: m, block: Block::FeedForward, name, part }.take(source, from, to, bias)
        };
        Self {
            gate: m.glu.then(|| linear("gate", m.width, m.ffn_width)),
            up: linear("up", m.width, m.ffn_width),
            down: linear("down", m.ffn_width, m.width),
        }
    }
}

impl<T> Layer<T> {
    /// Takes the parameters of a layer from `source`.
    pub fn take(source: &mut impl ParameterSource<Item = T>, name: &str, m: &Model) -> Self {
        let attention = Attention::take(source, &format!("{name}.attention"), m);
        let norm1 = Norm::take(source, &format!("{name}.norm1"), m.width, m.norm);
        let feed_forward = FeedForward::take(source, &format!("{name}.feed-forward"), m);
        let mut norm = |part: &str| Norm::take(source, &format!("{name}.{part}"), m.width, m.norm);
        let norm2 = (m.norm_order != NormOrder::ParallelSharedNorm).then(|| norm("norm2"));
        let output_norms = (m.norm_order == NormOrder::SandwichNorm)
            .then(|| ["output-norm1", "output-norm2"].map(&mut norm));
        Self { attention, norm1, feed_forward, norm2, output_norms }
    }
}

impl<T> IndicatorHead<T> {
    fn take(source: &mut impl ParameterSource<Item = T>, name: &str, width: usize) -> Self {
        Self {
            hidden: Linear::take(source, &format!("{name}.hidden"), width, width / 2, true),
            out: Linear::take(source, &format!("{name}.out"), width / 2, 1, true),
        }
    }
}

impl<T> Embedding<T> {
    fn take(source: &mut impl ParameterSource<Item = T>, m: &Model) -> Self {
        match m.input {
            Input::Tokens => {
                let small = Init::Uniform(SMALL);
                let table = source.next("token", &[m.vocabulary, m.width], small);
                Self::Tokens(table, m.token_type.then(|| source.next("type", &[m.width], small)))
            }
            Input::Indicator { market } => Self::Indicator {
                value: Linear::take(source, "value", 1, m.width, true),
                market: Linear::take(source, "market", market, m.width, true),
            },
        }
    }
}

/// Bound of the initial token and position tables, similar to GPT-2's initialization.
const SMALL: f32 = 0.05;

impl<T> OutputHead<T> {
    /// Takes the parameters of the output head from `source`.
    pub fn take(source: &mut impl ParameterSource<Item = T>, m: &Model) -> Self {
        match m.output {
            Output::Tied => Self::Tied,
            Output::Untied => {
                Self::Untied(Linear::take(source, "output", m.width, m.vocabulary, m.bias.output))
            }
            Output::MlmHead => Self::MlmHead {
                dense: Linear::take(source, "output.dense", m.width, m.width, true),
                norm: Norm::take(source, "output.norm", m.width, m.norm),
                bias: source.next("output.bias", &[m.vocabulary], Init::Uniform(SMALL)),
            },
            Output::IndicatorHeads => Self::IndicatorHeads(
                ["selection", "allocation"].map(|name| IndicatorHead::take(source, name, m.width)),
            ),
        }
    }
}

impl<T> Network<T> {
    pub fn take(source: &mut impl ParameterSource<Item = T>, m: &Model) -> Self {
        let position = Init::Uniform(if m.is_language_model() { SMALL } else { 0.5 });
        Self {
            embedding: Embedding::take(source, m),
            position: (m.position == Position::Learned)
                .then(|| source.next("position", &[m.tokens, m.width], position)),
            embedding_norm: m.embedding_norm.then(|| Norm::take(source, "embedding-norm", m.width, m.norm)),
            blocks: (0..m.layers).map(|layer| Layer::take(source, &format!("blocks.{layer}"), m)).collect(),
            final_norm: m.final_norm.then(|| Norm::take(source, "norm", m.width, m.norm)),
            output: OutputHead::take(source, m),
        }
    }
}

/// The parameters of a model or of one of its blocks.
#[derive(Clone, Debug)]
pub enum Parameters<T> {
    Model(Box<Network<T>>),
    Attention(Attention<T>),
    FeedForward(FeedForward<T>),
    /// A peak case has no parameters.
    None,
}

impl<T> Parameters<T> {
    /// Takes the parameters of a whole model, or of a single block.
    pub fn take(source: &mut impl ParameterSource<Item = T>, m: &Model, block: Option<Block>) -> Self {
        match block {
            None => Self::Model(Box::new(Network::take(source, m))),
            Some(Block::Attention) => Self::Attention(Attention::take(source, "attention", m)),
            Some(Block::FeedForward) => Self::FeedForward(FeedForward::take(source, "feed-forward", m)),
        }
    }
}

/// Returns the parameters of a model, or of one of its blocks, in order.
pub fn parameter_specs(m: &Model, block: Option<Block>) -> Vec<ParameterSpec> {
    let mut specs = Specs::default();
    Parameters::take(&mut specs, m, block);
    if m.lora.is_some() {
        specs.0.iter_mut().for_each(|spec| spec.role = role_with_adapters(&spec.name));
    }
    specs.0
}

/// Returns the role of a parameter of a model with adapters.
fn role_with_adapters(name: &str) -> Role {
    let last = name.rsplit('.').next().unwrap_or(name);
    if ADAPTER_PARTS.contains(&last) { Role::Adapter } else { Role::Frozen }
}

/// Returns the number of parameters (scalars) of a model or of one of its blocks.
pub fn parameter_count(m: &Model, block: Option<Block>) -> usize {
    parameter_specs(m, block).iter().map(ParameterSpec::len).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{AdaptedLayers, GPT2, INDICATOR, Lora, ModelId, NANOCHAT_D4, NANOCHAT_D12};

    #[test]
    fn parameter_counts_match_hand_computed_ones() {
        // value 512, market 2,816, position 28,416; a layer 263,168 + 525,568 + 1,024; norm 512; a head 33,025.
        let indicator = 512 + 2816 + 28416 + 6 * (263168 + 525568 + 1024) + 512 + 2 * 33025;
        assert_eq!(parameter_count(&INDICATOR, None), indicator);
        // GPT-2 small has 124,439,808 with 50,257 tokens; the preset has 47 more rows of 768.
        assert_eq!(parameter_count(&GPT2, None), 124_439_808 + 47 * 768);
        // Two tables of tokens, and 12 width² in each layer.
        let nanochat = |width: usize, layers: usize| 2 * 32768 * width + layers * 12 * width * width;
        assert_eq!(parameter_count(&NANOCHAT_D12, None), nanochat(768, 12));
        assert_eq!(parameter_count(&NANOCHAT_D4, None), nanochat(256, 4));
    }

    #[test]
    fn only_linear_layers_of_the_blocks_are_block_matrices() {
        let matrices = |m: &Model| {
            let specs = parameter_specs(m, None).into_iter().filter(ParameterSpec::is_block_matrix);
            specs.map(|spec| spec.name).collect::<Vec<_>>()
        };
        // Four projections, and two layers of the feed-forward block.
        assert_eq!(matrices(&GPT2).len(), 12 * 6);
        assert_eq!(matrices(&INDICATOR).len(), 6 * 6);
        let ends = [".q.weight", ".k.weight", ".v.weight", ".o.weight", ".up.weight", ".down.weight"];
        assert!(matrices(&INDICATOR).iter().all(|name| ends.iter().any(|end| name.ends_with(end))));
    }

    #[test]
    fn adapters_are_trained_and_everything_else_is_frozen() {
        let specs = |layers| {
            let model = Model { lora: Some(Lora::new(16, layers)), ..GPT2 };
            let specs = parameter_specs(&model, None);
            let (adapters, frozen): (Vec<_>, Vec<_>) = specs.into_iter().partition(ParameterSpec::is_trained);
            assert_eq!(frozen.iter().map(ParameterSpec::len).sum::<usize>(), parameter_count(&GPT2, None));
            adapters
        };
        let count = |layers| specs(layers).iter().map(ParameterSpec::len).sum::<usize>();
        // Rank times inputs plus outputs: four projections, and two layers of the feed-forward block.
        assert_eq!(count(AdaptedLayers::All), 12 * 16 * (4 * (768 + 768) + 2 * (768 + 3072)));
        assert_eq!(count(AdaptedLayers::QueriesValues), 12 * 16 * 2 * (768 + 768));
        let first = &specs(AdaptedLayers::All)[..2];
        let named: Vec<_> = first.iter().map(|spec| (&*spec.name, &spec.dims[..], spec.role)).collect();
        let [a, b] = ["blocks.0.attention.q.lora-a", "blocks.0.attention.q.lora-b"];
        assert_eq!(named, [(a, &[16, 768][..], Role::Adapter), (b, &[768, 16][..], Role::Adapter)]);
    }

    #[test]
    fn parameter_names_are_unique() {
        for id in ModelId::with_miniatures() {
            let specs = parameter_specs(&id, None);
            let names: std::collections::HashSet<_> = specs.iter().map(|s| &s.name).collect();
            assert_eq!(names.len(), specs.len());
        }
    }
}
