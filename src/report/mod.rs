//! The tables that answer the question, made from one run's results.

pub mod devices;
pub mod export;
pub mod html;
pub mod markdown;
pub mod plots;
pub mod publish;
pub mod side_by_side;
pub mod tables;
pub mod words;

use crate::model::ModelId;
use crate::results::{Record, Results, Status};
use crate::suite::{BackendId, Case, Compute, Precision, Recipe, Shape, Workload, cost};

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
        precision,
        shape: results.headline(),
    };
    let f32 = |backend: BackendId| Headline {
        label: backend.label().to_owned(),
        case: step(backend, Precision::eager(Compute::F32)),
    };
    let amp = |backend: BackendId| Headline {
        label: format!("{} + AMP", backend.label()),
        case: step(backend, Precision::eager(Compute::Amp)),
    };
    let all_opt = |backend: BackendId| match fastest(results, backend) {
        Some(case) => Headline { label: format!("{} + All Opt ({})", backend.label(), case.precision), case },
        None => {
            let compute = if backend.is_cpu() { Compute::F32 } else { Compute::Amp };
            Headline {
                label: format!("{} + All Opt", backend.label()),
                case: step(backend, Precision::opt(compute)),
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
            let what = match case.precision.compute {
                Compute::Tf32 => "products in TF32".to_owned(),
                compute => format!("parameters in {compute}"),
            };
            let label = format!("{}, {what} ({})", backend.label(), case.precision);
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
fn contestants(results: &Results, backend: BackendId) -> Vec<Case> {
    let mut all = steps(results, backend);
    all.retain(|case| matches!(case.precision.compute, Compute::F32 | Compute::Amp | Compute::Autocast));
    all
}

/// The two recipes of each backend between which rounds in turns decide which is fastest.
pub fn finalists(results: &Results) -> Vec<[Case; 2]> {
    let first_two = |&backend: &BackendId| contestants(results, backend).first_chunk::<2>().copied();
    BackendId::ALL.iter().filter_map(first_two).collect()
}

/// A backend's fastest training step with parameters in f32, where more than the eager ones were measured:
/// by rounds in turns, or without them by the medians.
fn fastest(results: &Results, backend: BackendId) -> Option<Case> {
    let all = contestants(results, backend);
    all.iter().find(|case| case.precision.recipe != Recipe::Eager)?;
    let (first, second) = (*all.first()?, all.get(1));
    let beaten = second.filter(|second| {
        results
            .turns
            .iter()
            .any(|turn| turn.base == first.to_string() && turn.head == second.to_string() && turn.ratio < 1.0)
    });
    Some(*beaten.unwrap_or(&first))
}

/// Where two frameworks were measured on one device: the fastest training step of either, with parameters
/// in f32.
pub fn champions(results: &Results) -> Vec<[Case; 2]> {
    let best = |backend| fastest(results, backend).or_else(|| contestants(results, backend).first().copied());
    let pairs = BackendId::ALL.iter().flat_map(|&a| a.rivals().filter(move |b| a < *b).map(move |b| [a, b]));
    pairs.filter_map(|[a, b]| Some([best(a)?, best(b)?])).collect()
}

/// The training steps in which two frameworks on one device are compared.
pub fn rivals(shape: Shape) -> Vec<[Case; 2]> {
    let precisions = [
        Precision::eager(Compute::F32),
        Precision::opt(Compute::F32),
        Precision::eager(Compute::Amp),
        Precision::opt(Compute::Amp),
    ];
    let case = |backend, precision| Case { workload: Workload::TrainStep, backend, precision, shape };
    let of = |a: BackendId| {
        let rivals = a.rivals().filter(move |b| a < *b);
        rivals.flat_map(move |b| precisions.map(|p| [case(a, p), case(b, p)]))
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
        Some((model, _)) if model.of_tokens() => (samples * model.tokens as f64, "tokens/s"),
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
    for eager in steps.clone().filter(|m| m.case.precision == Precision::eager(Compute::F32)) {
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
    pub precision: Precision,
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
            let Case { backend, precision, .. } = m.case;
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
pub fn measured_peak(all: &[Measured<'_>], backend: BackendId, compute: Compute) -> Option<f64> {
    let compute = if compute.is_mixed() { Compute::Bf16 } else { compute };
    all.iter()
        .filter(|m| m.case.workload == Workload::MatmulPeak && m.case.backend == backend)
        .filter(|m| m.case.precision.compute == compute)
        .map(|m| cost::flops(&m.case) as f64 / m.median_ns * 1e9)
        .max_by(f64::total_cmp)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::Turn;
    use crate::results::machine::Machine;

    pub(super) fn record(id: &str, median: f64) -> Record {
        let case: Case = id.parse().unwrap();
        let mut record = Record::without(&case, Status::Measured, "");
        record.median_ns = Some(median);
        record.ci_ns = Some([0.9 * median, 1.1 * median]);
        record
    }

    /// Two cases in turns.
    pub(super) fn turn_of([base, head]: [&str; 2], ratio: f64, ratio_ci: [f64; 2]) -> Turn {
        let (base, head) = (base.to_owned(), head.to_owned());
        Turn { base, head, ratio, ratio_ci, rounds: 3, commit: String::new() }
    }

    #[test]
    fn optimisations_are_compared_with_eager_f32() {
        let results = Results::new(
            Machine::default(),
            vec![
                record("train-step/torch-cuda/f32/indicator-b16", 10e6),
                record("train-step/torch-cuda/f32-graph/indicator-b16", 5e6),
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
            assert_eq!(backend.rivals().count(), 1, "{backend} is compared with none, or with two");
        }
    }

    #[test]
    fn the_best_of_each_framework_meet() {
        let step = |case: &str, ns| record(&format!("train-step/{case}/indicator-b16"), ns);
        let mut cases = vec![step("torch-cpu/f32", 9e6), step("torch-cpu/amp-compile", 5e6)];
        let pairs = |cases: &[Record]| champions(&Results::new(Machine::default(), cases.to_vec()));
        assert!(pairs(&cases).is_empty());
        cases.extend([step("mlx-cpu/f32", 20e6), step("mlx-cpu/bf16-opt", 1e6), step("mlx-metal/f32", 1e6)]);
        let [[torch, mlx]] = pairs(&cases)[..] else { panic!("one device has both") };
        assert_eq!(torch.precision.to_string(), "amp-compile");
        // bf16 stores other parameters.
        assert_eq!(mlx.precision.to_string(), "f32");
    }

    #[test]
    fn all_opt_is_the_fastest_recipe_by_turns() {
        let step =
            |precision: &str, ns| record(&format!("train-step/torch-cpu/{precision}/indicator-b16"), ns);
        let mut results = Results::new(Machine::default(), vec![step("f32", 10e6), step("amp", 6e6)]);
        let label = |results: &Results| {
            let rows = headlines(results);
            rows.into_iter().map(|row| row.label).find(|l| l.starts_with("PyTorch CPU + All Opt")).unwrap()
        };
        assert_eq!(label(&results), "PyTorch CPU + All Opt", "nothing but eager steps");
        results.cases.extend([step("amp-compile", 4e6), step("amp-opt", 4.1e6), step("bf16-opt", 1e6)]);
        assert_eq!(label(&results), "PyTorch CPU + All Opt (amp-compile)");
        let [first, second] = finalists(&results)[0].map(|case| case.to_string());
        assert!(first.contains("amp-compile") && second.contains("amp-opt"));
        results.turns.push(turn_of([&first, &second], 0.9, [0.85, 0.95]));
        assert_eq!(label(&results), "PyTorch CPU + All Opt (amp-opt)");
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
        let found = measured_peak(&all, BackendId::TorchCuda, Compute::Amp).unwrap();
        assert!((found / 700e12 - 1.0).abs() < 1e-9);
        assert_eq!(measured_peak(&all, BackendId::TorchCuda, Compute::F32), None);
    }
}
