//! The parameters of a model or a block: names, dims, initial values, and their one order.
//!
//! The oracle and both frameworks hold their own tensors in the structures below, filled
//! from that order, so they differ in nothing but the calls. Weights are [out, in], as in
//! both frameworks' linear layers.

use super::{Input, Model, NormKind, Output, Position};
use crate::suite::{Block as Part, Shape};

/// How a parameter starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Uniform in ±bound.
    Uniform(f32),
    /// 1 plus uniform in ±0.1: a norm's scale that a dropped factor can't hide behind.
    NearOne,
}

/// One parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterSpec {
    pub name: String,
    pub dims: Vec<usize>,
    pub init: Init,
}

impl ParameterSpec {
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// y = x·weightᵀ + bias
#[derive(Clone, Debug)]
pub struct Linear<T> {
    pub weight: T,
    pub bias: Option<T>,
}

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
    /// Of each head's queries, and of its keys.
    pub norms: Option<[Norm<T>; 2]>,
    pub o: Linear<T>,
}

/// down(act(up x)), or down(act(gate x)·up x).
#[derive(Clone, Debug)]
pub struct FeedForward<T> {
    pub gate: Option<Linear<T>>,
    pub up: Linear<T>,
    pub down: Linear<T>,
}

#[derive(Clone, Debug)]
pub struct Block<T> {
    pub attention: Attention<T>,
    pub norm1: Norm<T>,
    pub feed_forward: FeedForward<T>,
    pub norm2: Norm<T>,
}

/// D → D/2, ReLU, → 1
#[derive(Clone, Debug)]
pub struct Head<T> {
    pub hidden: Linear<T>,
    pub out: Linear<T>,
}

/// What turns the inputs into [B, N, D].
#[derive(Clone, Debug)]
pub enum Embedding<T> {
    /// [V, D], a tied output's projection too, and what every token's type adds, [D].
    Tokens(T, Option<T>),
    Indicator {
        value: Linear<T>,
        market: Linear<T>,
    },
}

/// A whole model.
#[derive(Clone, Debug)]
pub struct Network<T> {
    pub embedding: Embedding<T>,
    pub position: Option<T>,
    pub embedding_norm: Option<Norm<T>>,
    pub blocks: Vec<Block<T>>,
    pub norm: Option<Norm<T>>,
    pub end: OutputHead<T>,
}

/// What turns the last block's result into what comes out.
#[derive(Clone, Debug)]
pub enum OutputHead<T> {
    /// The table of tokens.
    Tied,
    /// [V, D]
    Untied(T),
    /// The table of tokens behind a layer of its own, and a bias [V].
    Masked { dense: Linear<T>, norm: Norm<T>, bias: T },
    /// Selection and allocation.
    Heads([Head<T>; 2]),
}

impl<T> Network<T> {
    /// The table of a model of tokens.
    ///
    /// # Panics
    /// Of another.
    pub fn token_table(&self) -> &T {
        match &self.embedding {
            Embedding::Tokens(table, _) => table,
            Embedding::Indicator { .. } => panic!("a model of indicators has no table of tokens"),
        }
    }
}

/// Hands out what comes next for each parameter; the calls below fix the order.
pub trait Source {
    type Item;
    fn next(&mut self, name: &str, dims: &[usize], init: Init) -> Self::Item;
}

/// Takes tensors that already are in the order.
pub struct InOrder<I>(pub I);

impl<I: Iterator> Source for InOrder<I> {
    type Item = I::Item;

    fn next(&mut self, name: &str, _: &[usize], _: Init) -> I::Item {
        self.0.next().unwrap_or_else(|| panic!("no tensor is left for parameter {name}"))
    }
}

/// Collects the specifications.
#[derive(Default)]
struct Specs(Vec<ParameterSpec>);

impl Source for Specs {
    type Item = ();

    fn next(&mut self, name: &str, dims: &[usize], init: Init) {
        self.0.push(ParameterSpec { name: name.to_owned(), dims: dims.to_vec(), init });
    }
}

impl<T> Linear<T> {
    fn take(source: &mut impl Source<Item = T>, name: &str, from: usize, to: usize, bias: bool) -> Self {
        let bound = Init::Uniform(1.0 / (from as f32).sqrt());
        Self {
            weight: source.next(&format!("{name}.weight"), &[to, from], bound),
            bias: bias.then(|| source.next(&format!("{name}.bias"), &[to], bound)),
        }
    }
}

impl<T> Norm<T> {
    fn take(source: &mut impl Source<Item = T>, name: &str, width: usize, kind: NormKind) -> Self {
        let (weight, bias) = kind.has_weight_and_bias();
        Self {
            weight: weight.then(|| source.next(&format!("{name}.weight"), &[width], Init::NearOne)),
            bias: bias.then(|| source.next(&format!("{name}.bias"), &[width], Init::Uniform(0.1))),
        }
    }
}

impl<T> Attention<T> {
    pub fn take(source: &mut impl Source<Item = T>, name: &str, m: &Model) -> Self {
        let (inner, shared) = m.qkv_widths();
        let mut linear =
            |part: &str, from, to, bias| Linear::take(source, &format!("{name}.{part}"), from, to, bias);
        let q = linear("q", m.width, inner, m.bias.qkv);
        let k = linear("k", m.width, shared, m.bias.qkv);
        let v = linear("v", m.width, shared, m.bias.qkv);
        let o = linear("o", inner, m.width, m.bias.out);
        let norms = m.qk_norm.map(|kind| {
            ["q-norm", "k-norm"].map(|part| Norm::take(source, &format!("{name}.{part}"), m.head_width, kind))
        });
        Self { q, k, v, norms, o }
    }
}

impl<T> FeedForward<T> {
    pub fn take(source: &mut impl Source<Item = T>, name: &str, m: &Model) -> Self {
        let bias = m.bias.feed_forward;
        let mut linear =
            |part: &str, from, to| Linear::take(source, &format!("{name}.{part}"), from, to, bias);
        Self {
            gate: m.glu.then(|| linear("gate", m.width, m.ffn_width)),
            up: linear("up", m.width, m.ffn_width),
            down: linear("down", m.ffn_width, m.width),
        }
    }
}

impl<T> Block<T> {
    fn take(source: &mut impl Source<Item = T>, name: &str, m: &Model) -> Self {
        Self {
            attention: Attention::take(source, &format!("{name}.attention"), m),
            norm1: Norm::take(source, &format!("{name}.norm1"), m.width, m.norm),
            feed_forward: FeedForward::take(source, &format!("{name}.feed-forward"), m),
            norm2: Norm::take(source, &format!("{name}.norm2"), m.width, m.norm),
        }
    }
}

impl<T> Head<T> {
    fn take(source: &mut impl Source<Item = T>, name: &str, width: usize) -> Self {
        Self {
            hidden: Linear::take(source, &format!("{name}.hidden"), width, width / 2, true),
            out: Linear::take(source, &format!("{name}.out"), width / 2, 1, true),
        }
    }
}

impl<T> Embedding<T> {
    fn take(source: &mut impl Source<Item = T>, m: &Model) -> Self {
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

/// Bound of what tables of tokens and their positions hold, about as GPT-2 starts.
const SMALL: f32 = 0.05;

impl<T> OutputHead<T> {
    fn take(source: &mut impl Source<Item = T>, m: &Model) -> Self {
        match m.output {
            Output::Tied => Self::Tied,
            Output::Untied => {
                let bound = Init::Uniform(1.0 / (m.width as f32).sqrt());
                Self::Untied(source.next("output.weight", &[m.vocabulary, m.width], bound))
            }
            Output::MlmHead => Self::Masked {
                dense: Linear::take(source, "output.dense", m.width, m.width, true),
                norm: Norm::take(source, "output.norm", m.width, m.norm),
                bias: source.next("output.bias", &[m.vocabulary], Init::Uniform(SMALL)),
            },
            Output::IndicatorHeads => {
                Self::Heads(["selection", "allocation"].map(|name| Head::take(source, name, m.width)))
            }
        }
    }
}

impl<T> Network<T> {
    pub fn take(source: &mut impl Source<Item = T>, m: &Model) -> Self {
        let position = Init::Uniform(if m.is_language_model() { SMALL } else { 0.5 });
        Self {
            embedding: Embedding::take(source, m),
            position: (m.position == Position::Learned)
                .then(|| source.next("position", &[m.tokens, m.width], position)),
            embedding_norm: m.embedding_norm.then(|| Norm::take(source, "embedding-norm", m.width, m.norm)),
            blocks: (0..m.layers).map(|layer| Block::take(source, &format!("blocks.{layer}"), m)).collect(),
            norm: m.final_norm.then(|| Norm::take(source, "norm", m.width, m.norm)),
            end: OutputHead::take(source, m),
        }
    }
}

/// What a shape computes with: a whole model, or a part of its blocks.
#[derive(Clone, Debug)]
pub enum LayerParams<T> {
    Model(Box<Network<T>>),
    Attention(Attention<T>),
    FeedForward(FeedForward<T>),
    /// The two peaks.
    None,
}

impl<T> LayerParams<T> {
    pub fn take(source: &mut impl Source<Item = T>, shape: Shape) -> Self {
        match shape {
            Shape::Model { model, .. } => Self::Model(Box::new(Network::take(source, &model))),
            Shape::Block { part: Part::Attention, model, .. } => {
                Self::Attention(Attention::take(source, "attention", &model))
            }
            Shape::Block { part: Part::FeedForward, model, .. } => {
                Self::FeedForward(FeedForward::take(source, "feed-forward", &model))
            }
            Shape::Square { .. } | Shape::Buffer { .. } => Self::None,
        }
    }
}

/// The parameters of a shape, in order; empty for the two peaks.
pub fn parameters(shape: Shape) -> Vec<ParameterSpec> {
    let mut specs = Specs::default();
    LayerParams::take(&mut specs, shape);
    specs.0
}

/// How many numbers the parameters of a shape hold.
pub fn parameter_count(shape: Shape) -> usize {
    parameters(shape).iter().map(ParameterSpec::len).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ModelId;

    fn model(name: &str) -> Shape {
        Shape::of_model(ModelId::named(name).unwrap(), 8)
    }

    #[test]
    fn counts_match_those_worked_out_by_hand() {
        // value 512, market 2 816, position 28 416; a block 263 168 + 525 568 + 1 024;
        // norm 512; a head 33 025.
        let indicator = 512 + 2816 + 28416 + 6 * (263168 + 525568 + 1024) + 512 + 2 * 33025;
        assert_eq!(parameter_count(model("indicator")), indicator);
        // GPT-2 small: 124 439 808 with 50 257 tokens, and 47 rows more of 768 here.
        assert_eq!(parameter_count(model("gpt2")), 124_439_808 + 47 * 768);
    }

    #[test]
    fn names_are_unique() {
        for id in ModelId::with_miniatures() {
            let specs = parameters(Shape::of_model(id, 1));
            let names: std::collections::HashSet<_> = specs.iter().map(|s| &s.name).collect();
            assert_eq!(names.len(), specs.len());
        }
    }
}
