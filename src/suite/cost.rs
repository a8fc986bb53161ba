//! How much work a case is, counted from its shape.
//!
//! Convention: a multiply-add is 2 FLOPs, and only matrix products count, as in
//! PyTorch's `FlopCounterMode` and the scaling-law literature (Kaplan et al. 2020).
//! A backward pass counts the products that it needs: two for each product whose
//! operands both need a gradient, one where only the weight does. Causal attention
//! counts in full. Bytes are the fewest that must move: each operand read once,
//! each result written once.

use super::{Block, Case, Shape, Workload};
use crate::model::parameters::parameter_count;
use crate::model::{Input, Model, Output, Position};

/// The unit in which a case's speed is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    Samples(u64),
    Flops(u64),
    Bytes(u64),
}

impl Work {
    pub fn amount(self) -> u64 {
        match self {
            Self::Samples(n) | Self::Flops(n) | Self::Bytes(n) => n,
        }
    }

    /// The unit of `amount` over seconds.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Samples(_) => "samples/s",
            Self::Flops(_) => "FLOP/s",
            Self::Bytes(_) => "B/s",
        }
    }
}

/// What one iteration counts as.
pub fn work(case: &Case) -> Work {
    match case.workload {
        Workload::Forward | Workload::ForwardBackward | Workload::TrainStep => match case.shape {
            Shape::Model { batch, .. } => Work::Samples(batch as u64),
            _ => unreachable!("model workloads have model shapes"),
        },
        Workload::OptimizerStep | Workload::CopyPeak | Workload::AllReduce => Work::Bytes(bytes(case)),
        _ => Work::Flops(flops(case)),
    }
}

fn linear(rows: usize, from: usize, to: usize) -> u64 {
    2 * (rows * from * to) as u64
}

/// The projections and the two products of attention over `batch` sequences.
fn attention(batch: usize, m: &Model) -> u64 {
    let (rows, (inner, shared)) = (batch * m.tokens, m.qkv_widths());
    2 * linear(rows, m.width, inner) + 2 * linear(rows, m.width, shared) + 2 * linear(rows, inner, m.tokens)
}

fn feed_forward(rows: usize, m: &Model) -> u64 {
    (2 + u64::from(m.glu)) * linear(rows, m.width, m.ffn_width)
}

/// (forward, backward) of a model.
fn model_flops(m: &Model, batch: usize) -> (u64, u64) {
    let rows = batch * m.tokens;
    let blocks = m.layers as u64 * (attention(batch, m) + feed_forward(rows, m));
    // Inputs need no gradient, so their products come back once.
    let embedding = match m.input {
        Input::Tokens => 0,
        Input::Indicator { market } => linear(rows, 1, m.width) + linear(batch, market, m.width),
    };
    let output = match m.output {
        Output::Tied | Output::Untied => linear(rows, m.width, m.vocabulary),
        Output::MlmHead => linear(rows, m.width, m.width) + linear(rows, m.width, m.vocabulary),
        Output::IndicatorHeads => 2 * (linear(rows, m.width, m.width / 2) + linear(rows, m.width / 2, 1)),
    };
    let inner = blocks + output;
    (embedding + inner, embedding + 2 * inner)
}

/// FLOPs of one iteration; 0 where it has no matrix product.
pub fn flops(case: &Case) -> u64 {
    let (forward, backward) = match case.shape {
        Shape::Model { model, batch, .. } => model_flops(&model, batch),
        Shape::Block { part, model, batch } => {
            let forward = match part {
                Block::Attention => attention(batch, &model),
                Block::FeedForward => feed_forward(batch * model.tokens, &model),
            };
            (forward, 2 * forward)
        }
        Shape::Square { n, chain } => (chain as u64 * linear(n, n, n), 0),
        Shape::Buffer { .. } => (0, 0),
    };
    match case.workload {
        Workload::OptimizerStep => 0,
        workload if workload.trains() => forward + backward,
        _ => forward,
    }
}

/// Bytes that an optimizer step or a copy must move; of an all-reduce what each rank must send, and
/// receive, if all links carry alike, so that over time it is nccl-tests' bus bandwidth
/// (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md). 0 for other workloads.
pub fn bytes(case: &Case) -> u64 {
    match (case.workload, case.shape) {
        // Reads parameter, gradient and two moments; writes parameter and moments.
        (Workload::OptimizerStep, shape) => {
            7 * (parameter_count(shape) * case.method.precision.parameter_bytes()) as u64
        }
        (Workload::AllReduce, Shape::Buffer { mib, ranks }) => {
            (((2 * (ranks - 1) * mib) as u64) << 20) / ranks as u64
        }
        (_, Shape::Buffer { mib, .. }) => (2 * mib as u64) << 20,
        _ => 0,
    }
}

/// The fewest bytes that an iteration can move: inputs, parameters and results once each,
/// gradients written once, and the optimizer's traffic; activations could stay in caches.
pub fn min_bytes(case: &Case) -> u64 {
    let parameters = parameter_count(case.shape);
    let ends = match case.shape {
        Shape::Model { model: m, batch, .. } => batch * m.tokens * m.vocabulary.max(2),
        Shape::Block { model: m, batch, .. } => 2 * batch * m.tokens * m.width,
        Shape::Square { n, chain } => (1 + 2 * chain) * n * n,
        Shape::Buffer { .. } => return bytes(case),
    };
    let passes = match case.workload {
        Workload::OptimizerStep => return bytes(case),
        Workload::TrainStep => 9,
        workload if workload.trains() => 2,
        _ => 1,
    };
    ((passes * parameters + ends) * case.method.precision.parameter_bytes()) as u64
}

/// Numbers that an eager attention layer keeps of a token, its norms among them; turned and
/// normalised queries and keys are kept once more each.
fn attention_activations(m: &Model) -> usize {
    let placed =
        usize::from(matches!(m.position, Position::Rotary { .. })) + usize::from(m.qk_norm.is_some());
    8 * m.width + 3 * m.heads * m.tokens + placed * (m.qkv_widths().0 + m.qkv_widths().1)
}

/// The same of a feed-forward part.
fn feed_forward_activations(m: &Model) -> usize {
    (3 + 2 * usize::from(m.glu)) * m.ffn_width
}

/// A rough need of memory in bytes, to refuse what can't fit before it is tried:
/// parameters with gradients, moments and the fixture's copy, and the activations
/// that an eager implementation keeps.
pub fn memory_estimate(case: &Case) -> u64 {
    let parameters = parameter_count(case.shape) as u64;
    let width = case.method.precision.parameter_bytes() as u64;
    let trains = case.workload.trains();
    // What a layer keeps of each token, and what the output does.
    let (rows, layers, layer, logits) = match case.shape {
        // Of one rank, which has a device to itself.
        Shape::Model { model: m, batch, ranks } => (
            batch / ranks * m.tokens,
            m.layers,
            attention_activations(&m) + feed_forward_activations(&m),
            3 * m.vocabulary,
        ),
        Shape::Block { part: Block::Attention, model: m, batch } => {
            (batch * m.tokens, 1, attention_activations(&m), 0)
        }
        Shape::Block { part: Block::FeedForward, model: m, batch } => {
            (batch * m.tokens, 1, 8 * m.width + feed_forward_activations(&m), 0)
        }
        Shape::Square { n, .. } => return (3 * n * n) as u64 * (width + 4),
        Shape::Buffer { mib, .. } => return (3 * mib as u64) << 20,
    };
    let kept = (rows * (layer * if trains { layers } else { 1 } + logits)) as u64;
    let activations = if case.workload == Workload::OptimizerStep { 0 } else { kept * width };
    parameters * (4 * width + 4) + activations
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(id: &str) -> Case {
        id.parse().unwrap()
    }

    #[test]
    fn flops_match_those_worked_out_by_hand() {
        // 4 projections of 1776 × 256 × 256 and 2 products of 16 · 111 × 256 × 111.
        let attention = 4 * 2 * 1776 * 256 * 256 + 2 * 2 * 1776 * 256 * 111;
        assert_eq!(flops(&case("attention/torch-cpu/f32/b16-h8-t111-d32")), attention);
        assert_eq!(flops(&case("attention-grad/mlx-cpu/bf16/b16-h8-t111-d32")), 3 * attention);

        let feed_forward = 2 * 2 * 1776 * 256 * 1024;
        assert_eq!(flops(&case("feed-forward/torch-cpu/f32/b16-t111-d256-f1024")), feed_forward);

        let inputs = 2 * 1776 * 256 + 2 * 16 * 10 * 256;
        let heads = 2 * (2 * 1776 * 256 * 128 + 2 * 1776 * 128);
        let forward = inputs + 6 * (attention + feed_forward) + heads;
        assert_eq!(flops(&case("forward/torch-cpu/f32/indicator-b16")), forward);
        assert_eq!(flops(&case("train-step/torch-cpu/f32/indicator-b16")), 3 * forward - inputs);
        assert_eq!(flops(&case("optimizer-step/torch-cpu/f32/indicator-b16")), 0);

        assert_eq!(flops(&case("matmul-peak/torch-cpu/f32/n1024")), 2 << 30);
        assert_eq!(flops(&case("matmul-peak/torch-cpu/f32/n1024-x3")), 6 << 30);

        // GPT-2 small: 12 blocks, and the tied projection on 50 304 tokens.
        let block = 4 * 2 * 8192 * 768 * 768 + 2 * 2 * 8192u64 * 768 * 1024 + 2 * 2 * 8192 * 768 * 3072;
        let gpt2 = 12 * block + 2 * 8192 * 768 * 50304;
        assert_eq!(flops(&case("train-step/torch-cuda/mixed/gpt2-b8-t1024")), 3 * gpt2);
    }

    #[test]
    fn bytes_match_those_worked_out_by_hand() {
        assert_eq!(bytes(&case("copy-peak/mlx-cpu/f32/256mib")), 2 * 256 * 1024 * 1024);
        // Each of four sends and receives three quarters twice: to add up, and to hand out.
        assert_eq!(bytes(&case("all-reduce/torch-cuda/f32/64mib-dp4")), 2 * 48 * 1024 * 1024);
        assert_eq!(bytes(&case("optimizer-step/torch-cpu/f32/indicator-b16")), 7 * 4 * 4_836_866);
        assert_eq!(bytes(&case("optimizer-step/torch-cpu/bf16/indicator-b16")), 7 * 2 * 4_836_866);
    }

    #[test]
    fn the_unit_follows_the_workload() {
        assert_eq!(work(&case("train-step/torch-cpu/f32/indicator-b64")), Work::Samples(64));
        assert_eq!(work(&case("copy-peak/torch-cpu/f32/1mib")), Work::Bytes(2 << 20));
        assert!(matches!(work(&case("attention-grad/torch-cpu/f32/b1-h8-t111-d32")), Work::Flops(_)));
    }

    #[test]
    fn gpt2_training_is_estimated_near_what_it_takes() {
        let need = memory_estimate(&case("train-step/torch-cuda/f32/gpt2-b8-t1024")) as f64 / 1e9;
        assert!((10.0..40.0).contains(&need), "{need} GB");
    }
}
