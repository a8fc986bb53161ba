//! The parameters of every shape: names, dims, initial values, and their one order.
//!
//! The reference and both frameworks hold their own tensors in the structures
//! below, filled from that order, so the models differ in nothing but the calls.
//! Weights are [out, in], as in both frameworks' linear layers.

use crate::case::{Family, Shape, Sizes};

/// Market features of a sample beside the tokens' values.
pub const MARKET: usize = 10;

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
pub struct Spec {
    pub name: String,
    pub dims: Vec<usize>,
    pub init: Init,
}

impl Spec {
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
    pub bias: T,
}

/// Layer normalisation (Ba et al. 2016), ε = 1e-5.
#[derive(Clone, Debug)]
pub struct Norm<T> {
    pub weight: T,
    pub bias: T,
}

pub const NORM_EPS: f64 = 1e-5;

/// Multi-head self-attention (Vaswani et al. 2017), every projection with a bias.
#[derive(Clone, Debug)]
pub struct Attention<T> {
    pub q: Linear<T>,
    pub k: Linear<T>,
    pub v: Linear<T>,
    pub o: Linear<T>,
}

#[derive(Clone, Debug)]
pub struct FeedForward<T> {
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

#[derive(Clone, Debug)]
pub struct Indicator<T> {
    pub value: Linear<T>,
    pub market: Linear<T>,
    pub position: T,
    pub blocks: Vec<Block<T>>,
    pub norm: Norm<T>,
    pub selection: Head<T>,
    pub allocation: Head<T>,
}

#[derive(Clone, Debug)]
pub struct Gpt2<T> {
    /// Token embedding and, transposed, the output projection: [V, D].
    pub token: T,
    pub position: T,
    pub blocks: Vec<Block<T>>,
    pub norm: Norm<T>,
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
struct Specs(Vec<Spec>);

impl Source for Specs {
    type Item = ();

    fn next(&mut self, name: &str, dims: &[usize], init: Init) {
        self.0.push(Spec { name: name.to_owned(), dims: dims.to_vec(), init });
    }
}

impl<T> Linear<T> {
    fn take(source: &mut impl Source<Item = T>, name: &str, from: usize, to: usize) -> Self {
        let bound = Init::Uniform(1.0 / (from as f32).sqrt());
        Self {
            weight: source.next(&format!("{name}.weight"), &[to, from], bound),
            bias: source.next(&format!("{name}.bias"), &[to], bound),
        }
    }
}

impl<T> Norm<T> {
    fn take(source: &mut impl Source<Item = T>, name: &str, width: usize) -> Self {
        Self {
            weight: source.next(&format!("{name}.weight"), &[width], Init::NearOne),
            bias: source.next(&format!("{name}.bias"), &[width], Init::Uniform(0.1)),
        }
    }
}

impl<T> Attention<T> {
    pub fn take(source: &mut impl Source<Item = T>, name: &str, width: usize) -> Self {
        let mut linear = |part: &str| Linear::take(source, &format!("{name}.{part}"), width, width);
        Self { q: linear("q"), k: linear("k"), v: linear("v"), o: linear("o") }
    }
}

impl<T> FeedForward<T> {
    pub fn take(source: &mut impl Source<Item = T>, name: &str, width: usize, hidden: usize) -> Self {
        Self {
            up: Linear::take(source, &format!("{name}.up"), width, hidden),
            down: Linear::take(source, &format!("{name}.down"), hidden, width),
        }
    }
}

impl<T> Block<T> {
    fn take(source: &mut impl Source<Item = T>, name: &str, sizes: &Sizes) -> Self {
        Self {
            attention: Attention::take(source, &format!("{name}.attention"), sizes.width),
            norm1: Norm::take(source, &format!("{name}.norm1"), sizes.width),
            feed_forward: FeedForward::take(
                source,
                &format!("{name}.feed-forward"),
                sizes.width,
                sizes.hidden,
            ),
            norm2: Norm::take(source, &format!("{name}.norm2"), sizes.width),
        }
    }

    fn take_all(source: &mut impl Source<Item = T>, sizes: &Sizes) -> Vec<Self> {
        (0..sizes.layers).map(|layer| Self::take(source, &format!("blocks.{layer}"), sizes)).collect()
    }
}

impl<T> Head<T> {
    fn take(source: &mut impl Source<Item = T>, name: &str, width: usize) -> Self {
        Self {
            hidden: Linear::take(source, &format!("{name}.hidden"), width, width / 2),
            out: Linear::take(source, &format!("{name}.out"), width / 2, 1),
        }
    }
}

impl<T> Indicator<T> {
    pub fn take(source: &mut impl Source<Item = T>, sizes: &Sizes) -> Self {
        let d = sizes.width;
        Self {
            value: Linear::take(source, "value", 1, d),
            market: Linear::take(source, "market", MARKET, d),
            position: source.next("position", &[sizes.tokens, d], Init::Uniform(0.5)),
            blocks: Block::take_all(source, sizes),
            norm: Norm::take(source, "norm", d),
            selection: Head::take(source, "selection", d),
            allocation: Head::take(source, "allocation", d),
        }
    }
}

impl<T> Gpt2<T> {
    pub fn take(source: &mut impl Source<Item = T>, sizes: &Sizes) -> Self {
        let d = sizes.width;
        Self {
            token: source.next("token", &[sizes.vocabulary, d], Init::Uniform(0.05)),
            position: source.next("position", &[sizes.tokens, d], Init::Uniform(0.05)),
            blocks: Block::take_all(source, sizes),
            norm: Norm::take(source, "norm", d),
        }
    }
}

/// The parameters of a shape, in order; empty for the two peaks.
pub fn parameters(shape: Shape) -> Vec<Spec> {
    let mut specs = Specs::default();
    match shape {
        Shape::Model { family: Family::Indicator, tiny, .. } => {
            Indicator::take(&mut specs, &Family::Indicator.sizes(tiny));
        }
        Shape::Model { family: Family::Gpt2, tiny, .. } => {
            Gpt2::take(&mut specs, &Family::Gpt2.sizes(tiny));
        }
        Shape::Attention { heads, head_width, .. } => {
            Attention::take(&mut specs, "attention", heads * head_width);
        }
        Shape::FeedForward { width, hidden, .. } => {
            FeedForward::take(&mut specs, "feed-forward", width, hidden);
        }
        Shape::Square { .. } | Shape::Buffer { .. } => {}
    }
    specs.0
}

/// How many numbers the parameters of a shape hold.
pub fn parameter_count(shape: Shape) -> usize {
    parameters(shape).iter().map(Spec::len).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_match_those_worked_out_by_hand() {
        // value 512, market 2 816, position 28 416; a block 263 168 + 525 568 + 1 024;
        // norm 512; a head 33 025.
        let indicator = 512 + 2816 + 28416 + 6 * (263168 + 525568 + 1024) + 512 + 2 * 33025;
        assert_eq!(parameter_count(Shape::model(Family::Indicator, 16)), indicator);
        // GPT-2 small: 124 439 808 with 50 257 tokens, and 47 rows more of 768 here.
        assert_eq!(parameter_count(Shape::model(Family::Gpt2, 8)), 124_439_808 + 47 * 768);
    }

    #[test]
    fn names_are_unique() {
        for shape in [Shape::model(Family::Indicator, 1), Shape::model(Family::Gpt2, 1)] {
            let specs = parameters(shape);
            let names: std::collections::HashSet<_> = specs.iter().map(|s| &s.name).collect();
            assert_eq!(names.len(), specs.len());
        }
    }
}
