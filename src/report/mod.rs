//! The tables that answer the question, made from one run's results.

pub mod export;
pub mod html;
pub mod machines;
pub mod markdown;
pub mod plots;
pub mod publish;
pub mod scaling;
pub mod summary;
pub mod tables;

use crate::model::ModelId;
use crate::results::{Record, Results, Status};
use crate::suite::{BackendId, Case, Method, Precision, Shape, Variant, Workload, cost};

/// A row of the headline tables.
pub struct Headline {
    pub label: String,
    pub case: Case,
}

/// The rows, always all of them; the first that was measured is 1.0×.
pub fn headlines(results: &Results) -> Vec<Headline> {
    use BackendId::{MlxCpu, MlxCuda, MlxMetal, TorchCpu, TorchCuda, TorchMps};
    let step = |backend, precision| Case {
        workload: Workload::TrainStep,
        backend,
        method: precision,
        shape: results.headline(),
    };
    let f32 = |backend: BackendId| Headline {
        label: backend.label().to_owned(),
        case: step(backend, Method::eager(Precision::F32)),
    };
    let amp = |backend: BackendId| Headline {
        label: format!("{} + AMP", backend.label()),
        case: step(backend, Method::eager(Precision::Mixed)),
    };
    let all_opt = |backend: BackendId| match fastest(results, backend) {
        Some(case) => Headline { label: format!("{} + All Opt ({})", backend.label(), case.method), case },
        None => {
            let compute = if backend.is_cpu() { Precision::F32 } else { Precision::Mixed };
            Headline {
                label: format!("{} + All Opt", backend.label()),
                case: step(backend, Method::tuned(compute)),
            }
        }
    };
    let mut rows = vec![
        f32(TorchCpu),
        f32(MlxMetal),
        f32(TorchMps),
        amp(TorchMps),
        all_opt(TorchMps),
        all_opt(MlxMetal),
        f32(TorchCuda),
        amp(TorchCuda),
        all_opt(TorchCuda),
        f32(MlxCuda),
        all_opt(MlxCuda),
        all_opt(TorchCpu),
        f32(MlxCpu),
        all_opt(MlxCpu),
    ];
    // Where parameters in bf16 or f16, which train otherwise, are faster still.
    for &backend in BackendId::ALL {
        let narrow = steps(results, backend).into_iter().next();
        if let Some(case) = narrow.filter(|case| rows.iter().all(|row| row.case != *case)) {
            let what = match case.method.precision {
                Precision::Tf32 => "products in TF32".to_owned(),
                compute => format!("parameters in {compute}"),
            };
            let label = format!("{}, {what} ({})", backend.label(), case.method);
            let place =
                rows.iter().rposition(|row| row.case.backend == backend).map_or(rows.len(), |at| at + 1);
            rows.insert(place, Headline { label, case });
        }
    }
    rows
}

/// The measured training steps of a backend at the headline's shape, the fastest first.
fn steps(results: &Results, backend: BackendId) -> Vec<Case> {
    let mut all: Vec<Measured<'_>> = all_measured(results);
    all.retain(|m| {
        m.case.workload == Workload::TrainStep
            && m.case.backend == backend
            && m.case.shape == results.headline()
    });
    all.sort_by(|a, b| a.median_ns.total_cmp(&b.median_ns));
    all.iter().map(|m| m.case).collect()
}

/// The measured training steps of a backend with parameters in f32, the fastest first: what All Opt is
/// chosen from.
fn f32_param_steps(results: &Results, backend: BackendId) -> Vec<Case> {
    let mut all = steps(results, backend);
    all.retain(|case| matches!(case.method.precision, Precision::F32 | Precision::Mixed | Precision::Amp));
    all
}

/// The two recipes of each backend between which rounds in turns decide which is fastest.
pub fn top_two(results: &Results) -> Vec<[Case; 2]> {
    let first_two = |&backend: &BackendId| f32_param_steps(results, backend).first_chunk::<2>().copied();
    BackendId::ALL.iter().filter_map(first_two).collect()
}

/// A backend's fastest training step with parameters in f32, where more than the eager ones were measured:
/// by rounds in turns, or without them by the medians.
fn fastest(results: &Results, backend: BackendId) -> Option<Case> {
    let all = f32_param_steps(results, backend);
    all.iter().find(|case| case.method.variant != Variant::Eager)?;
    let (first, second) = (*all.first()?, all.get(1));
    let beaten = second.filter(|second| {
        results
            .interleaved
            .iter()
            .any(|turn| turn.base == first.to_string() && turn.head == second.to_string() && turn.ratio < 1.0)
    });
    Some(*beaten.unwrap_or(&first))
}

/// Where two frameworks were measured on one device: the fastest training step of either, with parameters
/// in f32.
pub fn best_pairs(results: &Results) -> Vec<[Case; 2]> {
    let best =
        |backend| fastest(results, backend).or_else(|| f32_param_steps(results, backend).first().copied());
    let pairs =
        BackendId::ALL.iter().flat_map(|&a| a.counterparts().filter(move |b| a < *b).map(move |b| [a, b]));
    pairs.filter_map(|[a, b]| Some([best(a)?, best(b)?])).collect()
}

/// The training steps in which two frameworks on one device are compared.
pub fn eager_pairs(shape: Shape) -> Vec<[Case; 2]> {
    let precisions = [
        Method::eager(Precision::F32),
        Method::tuned(Precision::F32),
        Method::eager(Precision::Mixed),
        Method::tuned(Precision::Mixed),
    ];
    let case = |backend, precision| Case { workload: Workload::TrainStep, backend, method: precision, shape };
    let of = |a: BackendId| {
        let others = a.counterparts().filter(move |b| a < *b);
        others.flat_map(move |b| precisions.map(|p| [case(a, p), case(b, p)]))
    };
    BackendId::ALL.iter().copied().flat_map(of).collect()
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

/// What a second of steps of so many nanoseconds gets through, in the unit of the model: tokens, or samples
/// where it reads none.
pub fn rate(shape: Shape, ns: f64) -> (f64, &'static str) {
    let samples = shape.batch() as f64 / ns * 1e9;
    match shape.model() {
        Some((model, _)) if model.is_language_model() => (samples * model.tokens as f64, "tokens/s"),
        _ => (samples, "samples/s"),
    }
}

/// A measured case of a run.
pub struct Measured<'a> {
    pub case: Case,
    pub record: &'a Record,
    pub median_ns: f64,
}

/// Every measured case whose id this version of the suite knows.
pub fn all_measured(results: &Results) -> Vec<Measured<'_>> {
    results
        .cases
        .iter()
        .filter_map(|record| {
            let case = record.id.parse().ok()?;
            let (record, median_ns, _) = measured(Some(record))?;
            Some(Measured { case, record, median_ns })
        })
        .collect()
}

/// What each optimisation brings to the training step: rows of a recipe with its time
/// and its speed against the eager recipe in f32 of the same backend and shape.
pub fn ablation<'a>(all: &'a [Measured<'a>]) -> Vec<(&'a Measured<'a>, f64)> {
    let steps = all.iter().filter(|m| m.case.workload == Workload::TrainStep);
    let mut rows = Vec::new();
    for eager in steps.clone().filter(|m| m.case.method == Method::eager(Precision::F32)) {
        let same = steps
            .clone()
            .filter(|m| m.case.backend == eager.case.backend && m.case.shape == eager.case.shape);
        let same: Vec<_> = same.map(|m| (m, eager.median_ns / m.median_ns)).collect();
        // A row alone compares with nothing.
        if same.len() > 1 {
            rows.extend(same);
        }
    }
    rows
}

/// The training step's speed over batch sizes.
pub struct Sweep {
    pub model: ModelId,
    pub backend: BackendId,
    pub precision: Method,
    /// (batch, [`rate`]), by batch.
    pub speeds: Vec<(usize, f64)>,
    pub unit: &'static str,
}

/// Every model, backend and precision that was measured at more than one batch.
pub fn batches(all: &[Measured<'_>]) -> Vec<Sweep> {
    let mut sweeps: Vec<Sweep> = Vec::new();
    for m in all.iter().filter(|m| m.case.workload == Workload::TrainStep) {
        if let Shape::Model { model, batch, ranks: 1 } = m.case.shape
            && !model.is_miniature()
        {
            let Case { backend, method: precision, .. } = m.case;
            let (speed, unit) = rate(m.case.shape, m.median_ns);
            let speed = (batch, speed);
            match sweeps.iter_mut().find(|s| (s.model, s.backend, s.precision) == (model, backend, precision))
            {
                Some(sweep) => sweep.speeds.push(speed),
                None => sweeps.push(Sweep { model, backend, precision, speeds: vec![speed], unit }),
            }
        }
    }
    sweeps.retain(|sweep| sweep.speeds.len() > 1);
    sweeps.iter_mut().for_each(|sweep| sweep.speeds.sort_by_key(|s| s.0));
    sweeps
}

/// How much of a peak a rate is; over 100 % can't be, and is told as the error it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Utilisation {
    Of(f64),
    /// Nothing is known to compare with.
    Unknown,
    Impossible(f64),
}

pub fn utilisation(flops_per_s: f64, peak: Option<f64>) -> Utilisation {
    match peak.map(|peak| flops_per_s / peak) {
        None => Utilisation::Unknown,
        Some(part) if part <= 1.0 => Utilisation::Of(part),
        Some(part) => Utilisation::Impossible(part),
    }
}

/// The best rate that the run's own matrix products reached on a backend in a format, in
/// FLOP/s. Mixed precision multiplies in bf16.
pub fn measured_peak(all: &[Measured<'_>], backend: BackendId, compute: Precision) -> Option<f64> {
    let compute = if compute.is_mixed_precision() { Precision::Bf16 } else { compute };
    all.iter()
        .filter(|m| m.case.workload == Workload::MatmulPeak && m.case.backend == backend)
        .filter(|m| m.case.method.precision == compute)
        .map(|m| cost::flops(&m.case) as f64 / m.median_ns * 1e9)
        .max_by(f64::total_cmp)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::InterleavedResult;
    use crate::results::machine::Machine;

    pub(super) fn record(id: &str, median: f64) -> Record {
        let case: Case = id.parse().unwrap();
        let mut record = Record::unmeasured(&case, Status::Measured, "");
        record.median_ns = Some(median);
        record.ci_ns = Some([0.9 * median, 1.1 * median]);
        record
    }

    /// Two cases in turns.
    pub(super) fn turn_of([base, head]: [&str; 2], ratio: f64, ratio_ci: [f64; 2]) -> InterleavedResult {
        let (base, head) = (base.to_owned(), head.to_owned());
        InterleavedResult { base, head, ratio, ratio_ci, rounds: 3, commit: String::new() }
    }

    #[test]
    fn optimisations_are_compared_with_eager_f32() {
        let results = Results::new(
            Machine::default(),
            vec![
                record("train-step/torch-cuda/f32/indicator-b16", 10e6),
                record("train-step/torch-cuda/f32-cudagraph/indicator-b16", 5e6),
                record("train-step/mlx-cuda/f32/indicator-b16", 7e6),
            ],
        );
        let all = all_measured(&results);
        let rows = ablation(&all);
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[1].1, 2.0);
    }

    #[test]
    fn every_backend_has_a_row_and_a_partner() {
        for &backend in BackendId::ALL {
            assert!(
                headlines(&Results::new(Machine::default(), Vec::new()))
                    .iter()
                    .any(|row| row.case.backend == backend),
                "{backend} has no row"
            );
            assert_eq!(backend.counterparts().count(), 1, "{backend} is compared with none, or with two");
        }
    }

    #[test]
    fn the_best_of_each_framework_meet() {
        let step = |case: &str, ns| record(&format!("train-step/{case}/indicator-b16"), ns);
        let mut cases = vec![step("torch-cpu/f32", 9e6), step("torch-cpu/mixed-compile", 5e6)];
        let pairs = |cases: &[Record]| best_pairs(&Results::new(Machine::default(), cases.to_vec()));
        assert!(pairs(&cases).is_empty());
        cases.extend([
            step("mlx-cpu/f32", 20e6),
            step("mlx-cpu/bf16-tuned", 1e6),
            step("mlx-metal/f32", 1e6),
        ]);
        let [[torch, mlx]] = pairs(&cases)[..] else { panic!("one device has both") };
        assert_eq!(torch.method.to_string(), "mixed-compile");
        // bf16 stores other parameters.
        assert_eq!(mlx.method.to_string(), "f32");
    }

    #[test]
    fn all_opt_is_the_fastest_recipe_by_turns() {
        let step =
            |precision: &str, ns| record(&format!("train-step/torch-cpu/{precision}/indicator-b16"), ns);
        let mut results = Results::new(Machine::default(), vec![step("f32", 10e6), step("mixed", 6e6)]);
        let label = |results: &Results| {
            let rows = headlines(results);
            rows.into_iter().map(|row| row.label).find(|l| l.starts_with("PyTorch CPU + All Opt")).unwrap()
        };
        assert_eq!(label(&results), "PyTorch CPU + All Opt", "nothing but eager steps");
        results.cases.extend([
            step("mixed-compile", 4e6),
            step("mixed-tuned", 4.1e6),
            step("bf16-tuned", 1e6),
        ]);
        assert_eq!(label(&results), "PyTorch CPU + All Opt (mixed-compile)");
        let [first, second] = top_two(&results)[0].map(|case| case.to_string());
        assert!(first.contains("mixed-compile") && second.contains("mixed-tuned"));
        results.interleaved.push(turn_of([&first, &second], 0.9, [0.85, 0.95]));
        assert_eq!(label(&results), "PyTorch CPU + All Opt (mixed-tuned)");
    }

    #[test]
    fn the_sweep_is_sorted_by_batch() {
        let results = Results::new(
            Machine::default(),
            vec![
                record("train-step/mlx-cpu/f32/indicator-b64", 64e9),
                record("train-step/mlx-cpu/f32/indicator-b4", 2e9),
                record("train-step/torch-cpu/f32/indicator-b4", 2e9),
            ],
        );
        let all = all_measured(&results);
        let sweeps = batches(&all);
        assert_eq!(sweeps.len(), 1);
        assert_eq!(sweeps[0].speeds, [(4, 2.0), (64, 1.0)]);
    }

    #[test]
    fn over_a_hundred_percent_is_an_error() {
        assert_eq!(utilisation(5e14, Some(1e15)), Utilisation::Of(0.5));
        assert_eq!(utilisation(2e15, Some(1e15)), Utilisation::Impossible(2.0));
        assert_eq!(utilisation(1.0, None), Utilisation::Unknown);
        let peak = record("matmul-peak/torch-cuda/bf16/n8192", 2.0 * 8192f64.powi(3) / 700e12 * 1e9);
        let results = Results::new(Machine::default(), vec![peak]);
        let all = all_measured(&results);
        let found = measured_peak(&all, BackendId::TorchCuda, Precision::Mixed).unwrap();
        assert!((found / 700e12 - 1.0).abs() < 1e-9);
        assert_eq!(measured_peak(&all, BackendId::TorchCuda, Precision::F32), None);
    }
}
