//! The tables that answer the question, made from one run's results.

pub mod markdown;

use crate::case::{BackendId, Case, Compute, Family, Precision, Shape, Workload};
use crate::results::{Record, Results, Status};

/// A row of the headline tables.
pub struct Headline {
    pub label: &'static str,
    pub case: Case,
}

/// The shape that the headline tables stand for.
pub const HEADLINE_SHAPE: Shape = Shape::model(Family::Indicator, 16);

/// The rows, always all of them; the first that was measured is 1.0×.
pub fn headlines() -> Vec<Headline> {
    let row = |label, backend, precision| Headline {
        label,
        case: Case { workload: Workload::TrainStep, backend, precision, shape: HEADLINE_SHAPE },
    };
    let plain = Precision::plain(Compute::F32);
    let amp = Precision::plain(Compute::Amp);
    let all = Precision::opt(Compute::Amp);
    vec![
        row("PyTorch CPU", BackendId::TorchCpu, plain),
        row("MLX (Metal)", BackendId::MlxMetal, plain),
        row("PyTorch MPS", BackendId::TorchMps, plain),
        row("PyTorch MPS + AMP", BackendId::TorchMps, amp),
        row("PyTorch MPS + All Opt", BackendId::TorchMps, all),
        row("MLX (Metal) + All Opt", BackendId::MlxMetal, all),
        row("PyTorch CUDA", BackendId::TorchCuda, plain),
        row("PyTorch CUDA + AMP", BackendId::TorchCuda, amp),
        row("PyTorch CUDA + All Opt", BackendId::TorchCuda, all),
        row("MLX (CUDA)", BackendId::MlxCuda, plain),
        row("MLX (CUDA) + All Opt", BackendId::MlxCuda, all),
        row("PyTorch CPU + All Opt, f32", BackendId::TorchCpu, Precision::opt(Compute::F32)),
        row("MLX (CPU)", BackendId::MlxCpu, plain),
        row("MLX (CPU) + All Opt, f32", BackendId::MlxCpu, Precision::opt(Compute::F32)),
    ]
}

/// The record of a case, if the run has one.
pub fn find<'a>(results: &'a Results, case: &Case) -> Option<&'a Record> {
    let id = case.to_string();
    results.cases.iter().find(|r| r.id == id)
}

/// A record's figures, where it has them.
pub fn measured(record: Option<&Record>) -> Option<(&Record, f64, [f64; 2])> {
    let record = record.filter(|r| r.status == Status::Measured)?;
    Some((record, record.median_ns?, record.ci_ns?))
}

/// Why a row has no figure.
pub fn reason(record: Option<&Record>) -> String {
    match record {
        Some(record) => record.reason.clone(),
        None => "not part of this run".to_owned(),
    }
}
