//! What can be measured: workloads, backends, precisions and shapes, the id that
//! joins them, and the one table of cases.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result};
use regex::Regex;

/// Defines an enum whose values have ids, with `ALL`, `id()` and parsing.
macro_rules! named {
    ($(#[$doc:meta])* $name:ident, $what:literal, { $($(#[$vdoc:meta])* $variant:ident => $id:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $($(#[$vdoc])* $variant,)+ }

        impl $name {
            pub const ALL: &[$name] = &[$($name::$variant,)+];

            pub fn id(self) -> &'static str {
                match self { $($name::$variant => $id,)+ }
            }
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                Self::ALL.iter().copied().find(|v| v.id() == text).ok_or_else(|| {
                    let known: Vec<_> = Self::ALL.iter().map(|v| v.id()).collect();
                    format!("unknown {} '{text}': one of {}", $what, known.join(", "))
                })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.id())
            }
        }
    };
}

named! {
    /// What one iteration does.
    Workload, "workload", {
        /// Multi-head self-attention with its four projections, inference.
        Attention => "attention",
        /// The same with dropout, and the gradients of its input and parameters.
        AttentionGrad => "attention-grad",
        /// Linear, GELU, linear, inference.
        FeedForward => "feed-forward",
        /// The same with dropout, and the gradients of its input and parameters.
        FeedForwardGrad => "feed-forward-grad",
        /// The whole model, inference.
        Forward => "forward",
        /// Loss and every gradient, in training mode.
        ForwardBackward => "forward-backward",
        /// AdamW over every parameter of the model, with fixed gradients.
        OptimizerStep => "optimizer-step",
        /// Forward, loss, backward and AdamW.
        TrainStep => "train-step",
        /// A square matrix product: the ceiling for arithmetic.
        MatmulPeak => "matmul-peak",
        /// Reads a buffer and writes its negation: the ceiling for memory traffic.
        CopyPeak => "copy-peak",
    }
}

impl Workload {
    /// Whether dropout is part of the work.
    pub fn trains(self) -> bool {
        matches!(self, Self::AttentionGrad | Self::FeedForwardGrad | Self::ForwardBackward | Self::TrainStep)
    }

    /// Whether AdamW is part of the work.
    pub fn optimizes(self) -> bool {
        matches!(self, Self::OptimizerStep | Self::TrainStep)
    }

    /// Whether the shape is a whole model.
    pub fn takes_model(self) -> bool {
        matches!(self, Self::Forward | Self::ForwardBackward | Self::OptimizerStep | Self::TrainStep)
    }
}

named! {
    /// The library that computes.
    Framework, "framework", {
        Torch => "torch",
        Mlx => "mlx",
    }
}

named! {
    /// A framework on a device.
    BackendId, "backend", {
        TorchCpu => "torch-cpu",
        TorchMps => "torch-mps",
        TorchCuda => "torch-cuda",
        MlxCpu => "mlx-cpu",
        MlxMetal => "mlx-metal",
        MlxCuda => "mlx-cuda",
    }
}

impl BackendId {
    pub fn framework(self) -> Framework {
        match self {
            Self::TorchCpu | Self::TorchMps | Self::TorchCuda => Framework::Torch,
            Self::MlxCpu | Self::MlxMetal | Self::MlxCuda => Framework::Mlx,
        }
    }

    pub fn is_cpu(self) -> bool {
        matches!(self, Self::TorchCpu | Self::MlxCpu)
    }
}

named! {
    /// The number formats of parameters and arithmetic.
    Compute, "precision", {
        /// Strict: no TF32 in either framework.
        F32 => "f32",
        /// f32 storage; matrix products may round their inputs to TF32.
        Tf32 => "tf32",
        /// Parameters, optimizer state and compute in bf16.
        Bf16 => "bf16",
        /// Parameters and compute in f16.
        F16 => "f16",
        /// f32 parameters; bf16 copies of them and of the inputs, made in every step, compute
        /// everything but the loss. The same in both frameworks.
        Amp => "amp",
        /// f32 parameters under PyTorch's autocast: matrix products in bf16; norms, softmax and
        /// the residual stream in f32. Another computation than `amp`, and PyTorch's alone.
        Autocast => "autocast",
    }
}

impl Compute {
    /// Whether parameters and inputs are stored in a 16-bit type.
    pub fn is_half(self) -> bool {
        matches!(self, Self::Bf16 | Self::F16)
    }

    /// Whether parameters are f32 and products bf16.
    pub fn is_mixed(self) -> bool {
        matches!(self, Self::Amp | Self::Autocast)
    }

    /// Bytes of a stored parameter.
    pub fn parameter_bytes(self) -> usize {
        if self.is_half() { 2 } else { 4 }
    }
}

named! {
    /// How the step is written: the plain way, with one optimisation, or with all.
    Recipe, "recipe", {
        /// As a newcomer writes it.
        Plain => "plain",
        /// Fused attention, and one product for q, k and v where the framework gains by it.
        Attention => "attention",
        /// The optimizer in one kernel.
        Optimizer => "optimizer",
        /// The whole step compiled, or captured and replayed.
        Captured => "captured",
        /// Everything the framework offers that keeps the mathematics.
        Opt => "opt",
    }
}

impl Recipe {
    pub fn fused_attention(self) -> bool {
        matches!(self, Self::Attention | Self::Opt)
    }

    pub fn fused_optimizer(self) -> bool {
        matches!(self, Self::Optimizer | Self::Opt)
    }

    pub fn fused_loss(self) -> bool {
        matches!(self, Self::Opt)
    }

    pub fn captured(self) -> bool {
        matches!(self, Self::Captured | Self::Opt)
    }
}

/// A number format and a recipe, which an id names behind a hyphen unless it is plain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Precision {
    pub compute: Compute,
    pub recipe: Recipe,
}

impl Precision {
    pub const fn plain(compute: Compute) -> Self {
        Self { compute, recipe: Recipe::Plain }
    }

    pub const fn opt(compute: Compute) -> Self {
        Self { compute, recipe: Recipe::Opt }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.recipe {
            Recipe::Plain => write!(f, "{}", self.compute),
            recipe => write!(f, "{}-{recipe}", self.compute),
        }
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((compute, recipe)) = text.split_once('-') else {
            return Ok(Self::plain(text.parse()?));
        };
        match recipe.parse()? {
            Recipe::Plain => Err(format!("'{text}': the plain recipe has no suffix")),
            recipe => Ok(Self { compute: compute.parse()?, recipe }),
        }
    }
}

named! {
    /// The two architectures of the suite.
    Family, "model", {
        /// Post-norm encoder over N indicator tokens with two heads.
        Indicator => "indicator",
        /// GPT-2 small: pre-norm decoder, causal, tied embeddings.
        Gpt2 => "gpt2",
    }
}

/// The sizes of a model. Letters as in the code: B batch, N tokens, D width,
/// H heads, F hidden width of the feed-forward part, V vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sizes {
    pub tokens: usize,
    pub width: usize,
    pub heads: usize,
    pub layers: usize,
    pub hidden: usize,
    /// 0 where the model has none.
    pub vocabulary: usize,
}

impl Family {
    /// The sizes of the model, or of its miniature for parity and smoke runs.
    pub fn sizes(self, tiny: bool) -> Sizes {
        match (self, tiny) {
            (Self::Indicator, false) => {
                Sizes { tokens: 111, width: 256, heads: 8, layers: 6, hidden: 1024, vocabulary: 0 }
            }
            (Self::Indicator, true) => {
                Sizes { tokens: 8, width: 32, heads: 4, layers: 2, hidden: 128, vocabulary: 0 }
            }
            (Self::Gpt2, false) => {
                Sizes { tokens: 1024, width: 768, heads: 12, layers: 12, hidden: 3072, vocabulary: 50304 }
            }
            (Self::Gpt2, true) => {
                Sizes { tokens: 16, width: 32, heads: 4, layers: 2, hidden: 128, vocabulary: 64 }
            }
        }
    }

    /// Dropout probability of the training workloads.
    pub fn dropout(self) -> f64 {
        match self {
            Self::Indicator => 0.1,
            Self::Gpt2 => 0.0,
        }
    }
}

/// The sizes that a case runs at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shape {
    /// `indicator-b16`, `gpt2-b8-t1024`, `indicator-tiny-b2`
    Model { family: Family, tiny: bool, batch: usize },
    /// `b16-h8-n111-d32`, with `-causal` for the decoder's: B, H, N and D per head.
    Attention { batch: usize, heads: usize, tokens: usize, head_width: usize, causal: bool },
    /// `b16-n111-d256-f1024`, with `-tanh` for the decoder's GELU.
    FeedForward { batch: usize, tokens: usize, width: usize, hidden: usize, tanh: bool },
    /// `n1024`: an n × n product; `n1024-x4` chains four of them.
    Square { n: usize, chain: usize },
    /// `m256`: a buffer of that many MiB.
    Buffer { mib: usize },
}

impl Shape {
    pub const fn model(family: Family, batch: usize) -> Self {
        Self::Model { family, tiny: false, batch }
    }

    pub const fn tiny(family: Family) -> Self {
        Self::Model { family, tiny: true, batch: 2 }
    }

    /// The attention block of a model at a batch size.
    pub fn attention_of(family: Family, tiny: bool, batch: usize) -> Self {
        let s = family.sizes(tiny);
        Self::Attention {
            batch,
            heads: s.heads,
            tokens: s.tokens,
            head_width: s.width / s.heads,
            causal: family == Family::Gpt2,
        }
    }

    /// The feed-forward block of a model at a batch size.
    pub fn feed_forward_of(family: Family, tiny: bool, batch: usize) -> Self {
        let s = family.sizes(tiny);
        Self::FeedForward {
            batch,
            tokens: s.tokens,
            width: s.width,
            hidden: s.hidden,
            tanh: family == Family::Gpt2,
        }
    }

    /// Dropout probability of a training workload at this shape.
    pub fn dropout(self) -> f64 {
        match self {
            Self::Model { family, .. } => family.dropout(),
            Self::Attention { causal: true, .. } | Self::FeedForward { tanh: true, .. } => {
                Family::Gpt2.dropout()
            }
            _ => Family::Indicator.dropout(),
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Model { family, tiny, batch } => {
                let tiny_mark = if tiny { "-tiny" } else { "" };
                write!(f, "{family}{tiny_mark}-b{batch}")?;
                if family == Family::Gpt2 {
                    write!(f, "-t{}", family.sizes(tiny).tokens)?;
                }
                Ok(())
            }
            Self::Attention { batch, heads, tokens, head_width, causal } => {
                let mark = if causal { "-causal" } else { "" };
                write!(f, "b{batch}-h{heads}-n{tokens}-d{head_width}{mark}")
            }
            Self::FeedForward { batch, tokens, width, hidden, tanh } => {
                let mark = if tanh { "-tanh" } else { "" };
                write!(f, "b{batch}-n{tokens}-d{width}-f{hidden}{mark}")
            }
            Self::Square { n, chain: 1 } => write!(f, "n{n}"),
            Self::Square { n, chain } => write!(f, "n{n}-x{chain}"),
            Self::Buffer { mib } => write!(f, "m{mib}"),
        }
    }
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = Vec::new();
        let mut sizes = Vec::new();
        for part in text.split('-') {
            let split = part.find(|c: char| c.is_ascii_digit());
            match split {
                Some(1) => {
                    let size: usize =
                        part[1..].parse().map_err(|_| format!("shape '{text}': '{part}' is no size"))?;
                    if size == 0 {
                        return Err(format!("shape '{text}': '{part}' must be at least 1"));
                    }
                    sizes.push((&part[..1], size));
                }
                _ => words.push(part),
            }
        }
        let letters: String = sizes.iter().map(|(letter, _)| *letter).collect();
        let n: Vec<usize> = sizes.iter().map(|(_, size)| *size).collect();
        let shape = match (words.as_slice(), letters.as_str()) {
            ([family, rest @ ..], "b" | "bt") if matches!(rest, [] | ["tiny"]) => {
                Some(Self::Model { family: family.parse()?, tiny: !rest.is_empty(), batch: n[0] })
            }
            ([] | ["causal"], "bhnd") => Some(Self::Attention {
                batch: n[0],
                heads: n[1],
                tokens: n[2],
                head_width: n[3],
                causal: !words.is_empty(),
            }),
            ([] | ["tanh"], "bndf") => Some(Self::FeedForward {
                batch: n[0],
                tokens: n[1],
                width: n[2],
                hidden: n[3],
                tanh: !words.is_empty(),
            }),
            ([], "n") => Some(Self::Square { n: n[0], chain: 1 }),
            ([], "nx") => Some(Self::Square { n: n[0], chain: n[1] }),
            ([], "m") => Some(Self::Buffer { mib: n[0] }),
            _ => None,
        };
        shape.filter(|shape| shape.to_string() == text).ok_or_else(|| {
            format!("unknown shape '{text}': for example indicator-b16, gpt2-b8-t1024, b16-h8-n111-d32")
        })
    }
}

/// One row of the suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Case {
    pub workload: Workload,
    pub backend: BackendId,
    pub precision: Precision,
    pub shape: Shape,
}

impl Case {
    /// Dropout probability in force: 0 outside training.
    pub fn dropout(&self) -> f64 {
        if self.workload.trains() { self.shape.dropout() } else { 0.0 }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}/{}", self.workload, self.backend, self.precision, self.shape)
    }
}

impl FromStr for Case {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<_> = text.split('/').collect();
        let [workload, backend, precision, shape] = parts[..] else {
            return Err(format!("'{text}' is no case id: workload/backend/precision/shape"));
        };
        let case = Self {
            workload: workload.parse()?,
            backend: backend.parse()?,
            precision: precision.parse()?,
            shape: shape.parse()?,
        };
        let fits = match case.workload {
            Workload::Attention | Workload::AttentionGrad => {
                matches!(case.shape, Shape::Attention { .. })
            }
            Workload::FeedForward | Workload::FeedForwardGrad => {
                matches!(case.shape, Shape::FeedForward { .. })
            }
            Workload::MatmulPeak => matches!(case.shape, Shape::Square { .. }),
            Workload::CopyPeak => matches!(case.shape, Shape::Buffer { .. }),
            _ => matches!(case.shape, Shape::Model { .. }),
        };
        if fits { Ok(case) } else { Err(format!("'{text}': {workload} has no shape '{shape}'")) }
    }
}

named! {
    /// How much of the table a run takes.
    Set, "set", {
        /// Every case at its miniature shape: the suite's own test.
        Smoke => "smoke",
        /// What the headline table needs, at indicator-b16.
        Quick => "quick",
        /// Everything.
        Full => "full",
    }
}

/// A filter over ids.
pub fn pattern(text: &str) -> Result<Regex> {
    Regex::new(text).with_context(|| format!("'{text}' is no regular expression"))
}

/// The batch that the headline tables stand for.
pub const HEADLINE_BATCH: usize = 16;

/// The table of cases, in the order in which they run. Every backend is listed
/// whether or not this machine has it.
pub fn cases(set: Set) -> Vec<Case> {
    let mut all = Vec::new();
    for &workload in Workload::ALL {
        for &backend in BackendId::ALL {
            for shape in shapes(set, workload, backend) {
                for precision in precisions(set, workload, backend, shape) {
                    all.push(Case { workload, backend, precision, shape });
                }
            }
        }
    }
    all
}

fn precisions(set: Set, workload: Workload, backend: BackendId, shape: Shape) -> Vec<Precision> {
    use Compute::*;
    let headline = shape == Shape::model(Family::Indicator, HEADLINE_BATCH);
    let gpt2 = matches!(shape, Shape::Model { family: Family::Gpt2, .. });
    let quick = set == Set::Quick;
    // Its forward and backward pass in f32 take long and answer nothing quickly.
    let mut list = if quick && gpt2 { vec![] } else { vec![Precision::plain(F32)] };
    if !quick || (!backend.is_cpu() && matches!(workload, Workload::TrainStep | Workload::MatmulPeak)) {
        list.push(Precision::plain(Bf16));
    }
    if !quick {
        list.push(Precision::plain(F16));
    }
    if workload == Workload::TrainStep || (!quick && workload.trains()) {
        list.extend([Precision::plain(Amp), Precision::opt(Amp)]);
        if backend.framework() == Framework::Torch {
            list.push(Precision::plain(Autocast));
        }
        if !(quick && gpt2) {
            list.push(Precision::opt(F32));
        }
        if !quick || !backend.is_cpu() {
            list.push(Precision::opt(Bf16));
        }
    }
    if !quick && matches!(workload, Workload::TrainStep | Workload::MatmulPeak) {
        list.push(Precision::plain(Tf32));
        if workload == Workload::TrainStep {
            list.push(Precision::opt(Tf32));
        }
    }
    // What each optimisation brings alone.
    if workload == Workload::TrainStep && (headline && !quick || set == Set::Smoke) {
        for compute in [F32, Amp] {
            for recipe in [Recipe::Attention, Recipe::Optimizer, Recipe::Captured] {
                list.push(Precision { compute, recipe });
            }
        }
    }
    list.sort();
    list
}

fn shapes(set: Set, workload: Workload, backend: BackendId) -> Vec<Shape> {
    use Workload::*;
    let tiny = set == Set::Smoke;
    let mut sizes: Vec<(Family, usize)> = match set {
        Set::Smoke => vec![(Family::Indicator, 2), (Family::Gpt2, 2)],
        Set::Quick => vec![(Family::Indicator, HEADLINE_BATCH)],
        Set::Full => vec![
            (Family::Indicator, 1),
            (Family::Indicator, HEADLINE_BATCH),
            (Family::Indicator, 64),
            (Family::Indicator, 256),
            (Family::Gpt2, 8),
        ],
    };
    if workload == TrainStep {
        match set {
            // The sweep over batches.
            Set::Full => sizes.insert(1, (Family::Indicator, 4)),
            Set::Quick if !backend.is_cpu() => sizes.push((Family::Gpt2, 8)),
            _ => {}
        }
    }
    match workload {
        Attention | AttentionGrad => {
            sizes.iter().map(|&(family, batch)| Shape::attention_of(family, tiny, batch)).collect()
        }
        FeedForward | FeedForwardGrad => {
            sizes.iter().map(|&(family, batch)| Shape::feed_forward_of(family, tiny, batch)).collect()
        }
        // The optimizer's work does not depend on the batch.
        OptimizerStep if set == Set::Full => {
            vec![Shape::model(Family::Indicator, HEADLINE_BATCH), Shape::model(Family::Gpt2, 8)]
        }
        Forward | ForwardBackward | OptimizerStep | TrainStep => {
            sizes.iter().map(|&(family, batch)| Shape::Model { family, tiny, batch }).collect()
        }
        MatmulPeak => {
            let n: &[usize] = match (set, backend.is_cpu()) {
                (Set::Smoke, _) => &[64],
                (Set::Quick, true) => &[1024],
                (Set::Quick, false) => &[8192],
                (Set::Full, true) => &[1024, 2048],
                (Set::Full, false) => &[1024, 4096, 8192],
            };
            n.iter().map(|&n| Shape::Square { n, chain: 1 }).collect()
        }
        CopyPeak => {
            let mib = match (set, backend.is_cpu()) {
                (Set::Smoke, _) => 1,
                (_, true) => 256,
                (_, false) => 1024,
            };
            vec![Shape::Buffer { mib }]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn ids_are_short_lower_case_and_unique_and_parse_back() {
        for &set in Set::ALL {
            let mut seen = HashSet::new();
            for case in cases(set) {
                let id = case.to_string();
                assert!(id.len() < 64, "{id}");
                assert!(
                    id.split('/').all(|part| !part.is_empty()
                        && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')),
                    "{id}"
                );
                assert_eq!(id.parse::<Case>().as_ref(), Ok(&case), "{id}");
                assert!(seen.insert(id.clone()), "{id} twice");
            }
        }
    }

    #[test]
    fn ids_read_as_documented() {
        let case: Case = "train-step/torch-cuda/amp-opt/indicator-b16".parse().unwrap();
        assert_eq!(case.precision, Precision::opt(Compute::Amp));
        assert_eq!(case.shape, Shape::model(Family::Indicator, 16));
        let block = Shape::attention_of(Family::Indicator, false, 16);
        assert_eq!(block.to_string(), "b16-h8-n111-d32");
        assert_eq!(Shape::model(Family::Gpt2, 8).to_string(), "gpt2-b8-t1024");
    }

    #[test]
    fn wrong_ids_are_refused_with_what_is_wrong() {
        for (id, word) in [
            ("train-step/torch-cpu/f32", "workload/backend/precision/shape"),
            ("train/torch-cpu/f32/indicator-b16", "unknown workload"),
            ("train-step/torch/f32/indicator-b16", "unknown backend"),
            ("train-step/torch-cpu/f64/indicator-b16", "unknown precision"),
            ("train-step/torch-cpu/f32-fast/indicator-b16", "unknown recipe"),
            ("train-step/torch-cpu/f32-plain/indicator-b16", "no suffix"),
            ("train-step/torch-cpu/f32/indicator-b0", "at least 1"),
            ("train-step/torch-cpu/f32/bert-b1", "unknown model"),
            ("train-step/torch-cpu/f32/indicator-b1-t7", "unknown shape"),
            ("train-step/torch-cpu/f32/gpt2-b8-t99", "unknown shape"),
            ("train-step/torch-cpu/f32/n64", "has no shape"),
            ("attention/torch-cpu/f32/b1-h8-n111", "unknown shape"),
        ] {
            let error = id.parse::<Case>().unwrap_err();
            assert!(error.contains(word), "{id}: {error}");
        }
    }

    #[test]
    fn the_table_has_every_precision_recipe_and_model() {
        let full = cases(Set::Full);
        for &compute in Compute::ALL {
            assert!(full.iter().any(|c| c.precision.compute == compute), "no case in {compute}");
        }
        for &recipe in Recipe::ALL {
            assert!(full.iter().any(|c| c.precision.recipe == recipe), "no case of {recipe}");
        }
        for &family in Family::ALL {
            let of = |c: &Case| matches!(c.shape, Shape::Model { family: f, .. } if f == family);
            assert!(full.iter().any(of), "no case of {family}");
        }
    }

    #[test]
    fn the_readme_explains_every_part_of_an_id() {
        let readme = include_str!("../README.md");
        let mut parts: Vec<String> = Workload::ALL.iter().map(|w| w.to_string()).collect();
        parts.extend(BackendId::ALL.iter().map(|b| b.to_string()));
        parts.extend(Compute::ALL.iter().map(|c| c.to_string()));
        parts.extend(Recipe::ALL.iter().filter(|&&r| r != Recipe::Plain).map(|r| format!("-{r}")));
        for part in parts {
            assert!(readme.contains(&format!("`{part}`")), "README.md does not explain {part}");
        }
        for family in Family::ALL {
            assert!(readme.contains(&format!("`{family}` is")), "README.md does not explain {family}");
        }
    }

    #[test]
    fn quick_covers_every_workload_on_every_backend() {
        let quick = cases(Set::Quick);
        for &workload in Workload::ALL {
            for &backend in BackendId::ALL {
                assert!(quick.iter().any(|c| c.workload == workload && c.backend == backend));
            }
        }
    }
}
