//! FLOPs, bytes and memory of a case, computed from its shape.
//!
//! A multiply-add is 2 FLOPs, and only matrix products count, as in PyTorch's `FlopCounterMode` and the
//! scaling-law literature (Kaplan et al. 2020). The backward pass has two products for each product whose
//! operands both need a gradient, and one if only one of them does. Causal attention counts in full. The products of
//! Muon count too. Bytes are the minimum traffic: each operand is read once, and each result is written once.
//!
//! Intermediate results have 128 bits, which no shape exceeds. A result of over 64 bits is `u64::MAX`, and
//! [`is_computable`] refuses its case.

use super::adapter_cost::AdapterCost;
use super::{Block, Case, Shape, Workload};
use crate::model::parameters::ParameterSpec;
use crate::model::{Input, Lora, Model, Output, Position};

const MIB: usize = 1 << 20;

/// Newton-Schulz iterations of Muon in a step, as published.
pub const NEWTON_SCHULZ_ITERATIONS: u32 = 5;

/// The work of one iteration, in the unit of the case's speed.
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

    /// Returns the unit of the speed.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Samples(_) => "samples/s",
            Self::Flops(_) => "FLOP/s",
            Self::Bytes(_) => "B/s",
        }
    }
}

/// Returns the work of one iteration.
pub fn work(case: &Case) -> Work {
    match case.workload {
        Workload::Forward | Workload::ForwardBackward | Workload::TrainStep => match case.shape {
            Shape::Model { batch, .. } => Work::Samples(batch as u64),
            _ => unreachable!("model workloads have model shapes"),
        },
        // The products of Muon take most of its time.
        Workload::OptimizerStep if flops(case) > 0 => Work::Flops(flops(case)),
        Workload::OptimizerStep | Workload::CopyPeak | Workload::AllReduce => Work::Bytes(bytes(case)),
        _ => Work::Flops(flops(case)),
    }
}

/// Returns true if the FLOPs, bytes and memory of a case have at most 64 bits.
pub fn is_computable(case: &Case) -> bool {
    [flops(case), min_bytes(case), memory_estimate(case)].iter().all(|amount| *amount < u64::MAX)
}

fn saturated(amount: u128) -> u64 {
    u64::try_from(amount).unwrap_or(u64::MAX)
}

/// Returns the product of sizes.
fn product<const N: usize>(sizes: [usize; N]) -> u128 {
    sizes.map(|size| size as u128).iter().product()
}

pub(super) fn linear(rows: usize, from: usize, to: usize) -> u128 {
    2 * product([rows, from, to])
}

/// Returns the FLOPs of the four projections and the two attention products, forward only.
fn attention_flops(batch: usize, m: &Model) -> u128 {
    let (rows, (q_width, kv_width)) = (batch * m.tokens, m.qkv_widths());
    2 * (linear(rows, m.width, q_width) + linear(rows, m.width, kv_width) + linear(rows, q_width, m.tokens))
}

fn feed_forward_flops(rows: usize, m: &Model) -> u128 {
    (2 + u128::from(m.glu)) * linear(rows, m.width, m.ffn_width)
}

/// Returns the FLOPs of the forward and of the backward pass.
fn model_flops(m: &Model, batch: usize) -> (u128, u128) {
    let rows = batch * m.tokens;
    let blocks = match m.lora {
        Some(lora) => return adapted_flops(m, lora, batch),
        None => m.layers as u128 * (attention_flops(batch, m) + feed_forward_flops(rows, m)),
    };
    let (embedding, output) = outer_flops(m, batch);
    let inner = blocks + output;
    (embedding + inner, embedding + 2 * inner)
}

/// Returns the FLOPs of the forward and of the backward pass of a model with adapters. The output head is frozen, so its
/// backward pass has one product for each of the forward pass, and that of the embedding none.
fn adapted_flops(m: &Model, lora: Lora, batch: usize) -> (u128, u128) {
    let (embedding, output) = outer_flops(m, batch);
    let blocks = AdapterCost::of_blocks(m, lora, batch);
    (embedding + blocks.forward + output, blocks.backward + output)
}

/// Returns the FLOPs of the embedding and of the output head, forward only.
fn outer_flops(m: &Model, batch: usize) -> (u128, u128) {
    let rows = batch * m.tokens;
    // Inputs need no gradient, so the backward pass of these products is a single product.
    let embedding = match m.input {
        Input::Tokens => 0,
        Input::Indicator { market } => linear(rows, 1, m.width) + linear(batch, market, m.width),
    };
    let output = match m.output {
        Output::Tied | Output::Untied => linear(rows, m.width, m.vocabulary),
        Output::MlmHead => linear(rows, m.width, m.width) + linear(rows, m.width, m.vocabulary),
        Output::IndicatorHeads => 2 * (linear(rows, m.width, m.width / 2) + linear(rows, m.width / 2, 1)),
    };
    (embedding, output)
}

/// Returns the FLOPs of the Newton-Schulz iterations of Muon for a matrix: in each iteration the Gram matrix of its
/// shorter side, the square of that, and a product with the matrix.
pub fn orthogonalization_flops(rows: usize, columns: usize) -> u128 {
    let (short, long) = (rows.min(columns), rows.max(columns));
    let iteration = 2 * linear(short, long, short) + linear(short, short, short);
    u128::from(NEWTON_SCHULZ_ITERATIONS) * iteration
}

/// Returns the FLOPs of the optimizer. AdamW has no matrix product. Ranks that repeat the products of Muon count once.
fn optimizer_flops(shape: Shape) -> u128 {
    let specs = shape.parameter_specs().into_iter().filter(|spec| shape.uses_muon_for(spec));
    specs.map(|spec| orthogonalization_flops(spec.dims[0], spec.dims[1])).sum()
}

/// Returns the numbers that the optimizer reads and writes at least. AdamW reads the parameter, its gradient and two
/// moments, and writes the parameter and the moments. Muon has one moment.
fn optimizer_traffic(shape: Shape) -> u128 {
    let specs = shape.parameter_specs().into_iter().filter(ParameterSpec::is_trained);
    specs.map(|spec| product([spec.len(), if shape.uses_muon_for(&spec) { 5 } else { 7 }])).sum()
}

/// Returns the FLOPs of one iteration. Workloads without a matrix product have 0.
pub fn flops(case: &Case) -> u64 {
    let (forward, backward) = match case.shape {
        Shape::Model { model, batch, .. } => model_flops(&model, batch),
        Shape::Block { block, model, batch } => {
            let forward = match block {
                Block::Attention => attention_flops(batch, &model),
                Block::FeedForward => feed_forward_flops(batch * model.tokens, &model),
            };
            (forward, 2 * forward)
        }
        Shape::Square { n, chain } => (chain as u128 * linear(n, n, n), 0),
        Shape::Buffer { .. } => (0, 0),
    };
    saturated(match case.workload {
        Workload::OptimizerStep => optimizer_flops(case.shape),
        Workload::TrainStep => forward + backward + optimizer_flops(case.shape),
        workload if workload.trains() => forward + backward,
        _ => forward,
    })
}

/// Returns the bytes that an optimizer step or a copy must move, and 0 for other workloads.
///
/// For an all-reduce, these are the bytes that each rank must send and receive. Divided by the time, they are
/// the bus bandwidth of nccl-tests (<https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md>).
pub fn bytes(case: &Case) -> u64 {
    saturated(match (case.workload, case.shape) {
        (Workload::OptimizerStep, shape) => {
            optimizer_traffic(shape) * case.optimizer_precision().parameter_bytes() as u128
        }
        (Workload::AllReduce, Shape::Buffer { mib, ranks }) => {
            product([2, ranks - 1, mib, MIB]) / ranks as u128
        }
        (_, Shape::Buffer { mib, .. }) => product([2, mib, MIB]),
        _ => 0,
    })
}

/// Returns the minimum memory traffic of an iteration in bytes: inputs, parameters, results and gradients once
/// each, and the traffic of the optimizer. Activations could remain in caches.
pub fn min_bytes(case: &Case) -> u64 {
    let width = case.method.precision.parameter_bytes();
    let trained_width = case.optimizer_precision().parameter_bytes() as u128;
    let trained = case.shape.trained_count() as u128 * trained_width;
    // Frozen parameters are only read.
    let frozen = product([case.shape.parameter_count() - case.shape.trained_count(), width]);
    let inputs_and_outputs = match case.shape {
        Shape::Model { model: m, batch, .. } => product([batch, m.tokens, m.vocabulary.max(2)]),
        Shape::Block { model: m, batch, .. } => product([2, batch, m.tokens, m.width]),
        Shape::Square { n, chain } => product([1 + 2 * chain, n, n]),
        Shape::Buffer { .. } => return bytes(case),
    };
    let of_trained = match case.workload {
        Workload::OptimizerStep => return bytes(case),
        Workload::TrainStep => 2 * trained + optimizer_traffic(case.shape) * trained_width,
        workload if workload.trains() => 2 * trained,
        _ => trained,
    };
    saturated(of_trained + frozen + inputs_and_outputs * width as u128)
}

/// Returns the activations per token that eager attention saves for the backward pass, including its norms.
/// Rotary positions and the norm of queries and keys save another copy of both, and a soft cap two of the scores.
fn attention_activations(m: &Model) -> usize {
    let (q_width, kv_width) = m.qkv_widths();
    let copies = usize::from(matches!(m.position, Position::Rotary(_))) + usize::from(m.qk_norm.is_some());
    let scores = 3 + 2 * usize::from(m.cap.scores.is_some());
    8 * m.width + scores * m.heads * m.tokens + copies * (q_width + kv_width)
}

/// Returns the activations per token that an eager feed-forward block saves.
fn feed_forward_activations(m: &Model) -> usize {
    (3 + 2 * usize::from(m.glu)) * m.ffn_width
}

/// Estimates the memory of a case in bytes, so that a case that cannot fit is refused before it runs: trained parameters
/// with gradients, moments and the fixture's copy, frozen parameters with this copy, and the saved activations of an
/// eager implementation.
pub fn memory_estimate(case: &Case) -> u64 {
    let trained = case.shape.trained_count() as u128;
    let frozen = case.shape.parameter_count() as u128 - trained;
    let width = case.method.precision.parameter_bytes() as u128;
    let trained_width = case.optimizer_precision().parameter_bytes() as u128;
    let trains = case.workload.trains();
    // Activations per token of a layer and of the output.
    let (rows, layers, layer, logits) = match case.shape {
        // One micro-batch of one rank, because each rank has its own device.
        Shape::Model { model: m, .. } => (
            case.shape.micro_batch().batch() * m.tokens,
            m.layers,
            attention_activations(&m) + feed_forward_activations(&m),
            3 * m.vocabulary,
        ),
        Shape::Block { block: Block::Attention, model: m, batch } => {
            (batch * m.tokens, 1, attention_activations(&m), 0)
        }
        Shape::Block { block: Block::FeedForward, model: m, batch } => {
            (batch * m.tokens, 1, 8 * m.width + feed_forward_activations(&m), 0)
        }
        Shape::Square { n, .. } => return saturated(product([3, n, n]) * (width + 4)),
        Shape::Buffer { mib, .. } => return saturated(product([3, mib, MIB])),
    };
    let saved = product([rows, layer, if trains { layers } else { 1 }]) + product([rows, logits]);
    let activations = if case.workload == Workload::OptimizerStep { 0 } else { saved * width };
    // The sums of gradients are another copy.
    let copies = if case.shape.micro_batches() > 1 { 5 } else { 4 };
    saturated(trained * (copies * trained_width + 4) + frozen * (width + 4) + activations)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ModelId;
    use crate::suite::MAX_BATCH;

    fn case(id: &str) -> Case {
        id.parse().unwrap()
    }

    #[test]
    fn flops_match_hand_computed_ones() {
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
        assert_eq!(flops(&case("train-step/torch-cpu/f32/indicator-b16-a4")), 3 * forward - inputs);
        assert_eq!(flops(&case("optimizer-step/torch-cpu/f32/indicator-b16")), 0);

        assert_eq!(flops(&case("matmul-peak/torch-cpu/f32/n1024")), 2 << 30);
        assert_eq!(flops(&case("matmul-peak/torch-cpu/f32/n1024-x3")), 6 << 30);

        // GPT-2 small: 12 layers, and the tied projection to 50,304 tokens.
        let block = 4 * 2 * 8192 * 768 * 768 + 2 * 2 * 8192u64 * 768 * 1024 + 2 * 2 * 8192 * 768 * 3072;
        let gpt2 = 12 * block + 2 * 8192 * 768 * 50304;
        assert_eq!(flops(&case("train-step/torch-cuda/mixed/gpt2-b8-t1024")), 3 * gpt2);
    }

    #[test]
    fn bytes_match_hand_computed_ones() {
        assert_eq!(bytes(&case("copy-peak/mlx-cpu/f32/256mib")), 2 * 256 * 1024 * 1024);
        // Each of four ranks sends three quarters twice: for the reduce-scatter and for the all-gather.
        assert_eq!(bytes(&case("all-reduce/torch-cuda/f32/64mib-dp4")), 2 * 48 * 1024 * 1024);
        assert_eq!(bytes(&case("optimizer-step/torch-cpu/f32/indicator-b16")), 7 * 4 * 4_836_866);
        assert_eq!(bytes(&case("optimizer-step/torch-cpu/bf16/indicator-b16")), 7 * 2 * 4_836_866);
    }

    #[test]
    fn muon_adds_the_products_of_its_iterations() {
        // Five iterations with two products of a matrix and the square of its Gram matrix.
        let square = 5 * 3 * 2 * 256 * 256 * 256;
        let wide = 5 * (2 * 2 * 256 * 256 * 1024 + 2 * 256 * 256 * 256);
        let all = 6 * (4 * square + 2 * wide);
        assert_eq!(flops(&case("optimizer-step/torch-cpu/f32/indicator-b16-muon")), all);
        let step = |shape| flops(&case(&format!("train-step/torch-cpu/f32/indicator-{shape}")));
        assert_eq!(step("b16-muon"), step("b16") + all);
        assert_eq!(step("b16-muon-a2-dp2"), step("b16-muon"));
        assert!(matches!(work(&case("optimizer-step/torch-cpu/f32/indicator-b16-muon")), Work::Flops(_)));
        // Matrices of the blocks have one moment.
        let matrices = 6 * (4 * 256 * 256 + 2 * 256 * 1024);
        let traffic = 4 * (7 * 4_836_866 - 2 * matrices);
        assert_eq!(bytes(&case("optimizer-step/torch-cpu/f32/indicator-b16-muon")), traffic);
    }

    #[test]
    fn the_unit_follows_the_workload() {
        assert_eq!(work(&case("train-step/torch-cpu/f32/indicator-b64")), Work::Samples(64));
        assert_eq!(work(&case("copy-peak/torch-cpu/f32/1mib")), Work::Bytes(2 << 20));
        assert!(matches!(work(&case("attention-grad/torch-cpu/f32/b1-h8-t111-d32")), Work::Flops(_)));
    }

    #[test]
    fn presets_are_computable_at_the_largest_batch() {
        for model in ModelId::with_miniatures() {
            let shape = Shape::for_model(model, MAX_BATCH);
            let step = Case { shape, ..case("train-step/torch-cpu/f32/indicator-b1") };
            assert!(is_computable(&step), "{step}");
        }
        let largest = Shape::Square { n: MAX_BATCH, chain: MAX_BATCH };
        assert!(!is_computable(&Case { shape: largest, ..case("matmul-peak/torch-cpu/f32/n64") }));
    }

    #[test]
    fn the_memory_estimate_of_gpt2_training_is_plausible() {
        let need = memory_estimate(&case("train-step/torch-cuda/f32/gpt2-b8-t1024")) as f64 / 1e9;
        assert!((10.0..40.0).contains(&need), "{need} GB");
        let accumulated = memory_estimate(&case("train-step/torch-cuda/f32/gpt2-b8-t1024-a8")) as f64 / 1e9;
        assert!(accumulated < need / 2.0, "{accumulated} GB");
    }
}
