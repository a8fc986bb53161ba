//! Reports of a run. Tables, sentences and pictures are views of the data that this file computes.

pub mod energy;
pub mod explain;
pub mod export;
pub mod first_step;
pub mod format;
pub mod headline;
pub mod html;
pub mod lengths;
pub mod machines;
pub mod markdown;
pub mod notes;
mod optimizers;
pub mod plots;
pub mod publish;
pub mod scaling;
pub mod summary;
pub mod table;
pub mod tables;

#[cfg(test)]
mod division_tests;
#[cfg(test)]
pub(crate) mod hostile_tests;

use std::fmt;

use crate::model::ModelId;
use crate::results::{Record, Results, Status};
use crate::suite::{BackendId, Case, Method, Precision, Shape, Workload, cost};

/// Origin of the step time of a case and of its interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Samples of one process: the interval is within one run.
    OneRun,
    /// Several fresh processes: the interval is between processes.
    Processes(usize),
    /// Interleaved rounds of fresh processes: the interval is between processes.
    Rounds(u64),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OneRun => f.write_str("one run"),
            Self::Processes(count) => write!(f, "{count} processes"),
            Self::Rounds(count) => write!(f, "{count} rounds"),
        }
    }
}

/// A measured case of a run.
#[derive(Clone, Copy)]
pub struct Measured<'a> {
    pub case: Case,
    pub record: &'a Record,
    pub median_ns: f64,
    /// 95 % confidence interval of the median.
    pub ci_ns: [f64; 2],
    pub source: Source,
}

impl<'a> Measured<'a> {
    /// Returns the result in the record. Returns `None` if the case has none, or if this version does not know its id.
    pub fn new(record: &'a Record) -> Option<Self> {
        let case = record.id.parse().ok().filter(|_| record.status == Status::Measured)?;
        let source = match record.process_ns.len() {
            0 => Source::OneRun,
            count => Source::Processes(count),
        };
        Some(Self { case, record, median_ns: record.median_ns?, ci_ns: record.ci_ns?, source })
    }

    /// Returns the result of the interleaved rounds that have the case, or else the one in the record.
    fn best(results: &Results, record: &'a Record) -> Option<Self> {
        let own = Self::new(record)?;
        let rounds = results.interleaved.iter().filter_map(|r| Some((r.rounds, r.step_time(&record.id)?)));
        let most = rounds.max_by_key(|(rounds, _)| *rounds);
        Some(most.map_or(own, |(rounds, (median_ns, ci_ns))| Self {
            median_ns,
            ci_ns,
            source: Source::Rounds(rounds),
            ..own
        }))
    }

    /// Returns the speed relative to `base`, with the range that both intervals allow.
    pub fn speedup_over(&self, base: &Self) -> Ratio {
        Ratio {
            value: base.median_ns / self.median_ns,
            range: [base.ci_ns[0] / self.ci_ns[1], base.ci_ns[1] / self.ci_ns[0]],
        }
    }

    /// Returns the speed in the unit of the model, with its 95 % confidence interval.
    pub fn speed(&self) -> Ratio {
        let speed = |ns| rate(self.case.shape, ns).0;
        Ratio { value: speed(self.median_ns), range: [speed(self.ci_ns[1]), speed(self.ci_ns[0])] }
    }
}

/// A ratio or rate with its interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio {
    pub value: f64,
    pub range: [f64; 2],
}

impl Ratio {
    pub fn inverse(self) -> Self {
        Self { value: 1.0 / self.value, range: [1.0 / self.range[1], 1.0 / self.range[0]] }
    }

    pub fn divided_by(self, divisor: f64) -> Self {
        Self { value: self.value / divisor, range: self.range.map(|end| end / divisor) }
    }
}

/// Returns every measured case in the order of the run.
pub fn all_measured(results: &Results) -> Vec<Measured<'_>> {
    results.cases.iter().filter_map(|record| Measured::best(results, record)).collect()
}

/// Returns the record of a case, or `None` if the run does not have it.
pub fn find_record<'a>(results: &'a Results, case: &Case) -> Option<&'a Record> {
    let id = case.to_string();
    results.cases.iter().find(|record| record.id == id)
}

/// Returns a case with its result, or `None` if it was not measured.
pub fn find_measured<'a>(results: &'a Results, case: &Case) -> Option<Measured<'a>> {
    find_record(results, case).and_then(|record| Measured::best(results, record))
}

/// Returns the speed at a step time in nanoseconds, and its unit: tokens/s for language models, else samples/s.
pub fn rate(shape: Shape, ns: f64) -> (f64, &'static str) {
    let samples = shape.batch() as f64 / ns * 1e9;
    match shape.model() {
        Some((model, _)) if model.is_language_model() => (samples * model.tokens as f64, "tokens/s"),
        _ => (samples, "samples/s"),
    }
}

/// Returns the training steps with their speed relative to eager f32 of the same backend and shape.
pub fn ablation<'a>(all: &[Measured<'a>]) -> Vec<(Measured<'a>, f64)> {
    let steps = || all.iter().filter(|m| m.case.workload == Workload::TrainStep);
    let mut rows = Vec::new();
    for eager in steps().filter(|m| m.case.method == Method::eager(Precision::F32)) {
        let same_place =
            |m: &&Measured<'_>| (m.case.backend, m.case.shape) == (eager.case.backend, eager.case.shape);
        let variants = steps().filter(same_place).map(|m| (*m, eager.median_ns / m.median_ns));
        // Without a second variant there is nothing to compare.
        rows.extend(Some(variants.collect::<Vec<_>>()).filter(|rows| rows.len() > 1).into_iter().flatten());
    }
    rows
}

/// Training speed at several batch sizes.
pub struct Sweep<'a> {
    pub model: ModelId,
    pub backend: BackendId,
    pub method: Method,
    /// The steps in ascending order of the batch.
    pub steps: Vec<Measured<'a>>,
}

impl Sweep<'_> {
    /// Returns the label of the series in tables and plots.
    pub fn label(&self) -> String {
        format!("{} {} {}", self.model, self.backend, self.method)
    }

    pub fn fastest(&self) -> &Measured<'_> {
        let by_speed = |a: &&Measured<'_>, b: &&Measured<'_>| a.speed().value.total_cmp(&b.speed().value);
        self.steps.iter().max_by(by_speed).expect("a sweep has at least two batches")
    }
}

/// Returns the models, backends and methods with more than one measured batch.
pub fn batches<'a>(all: &[Measured<'a>]) -> Vec<Sweep<'a>> {
    let mut sweeps: Vec<Sweep<'a>> = Vec::new();
    for m in all.iter().filter(|m| m.case.workload == Workload::TrainStep) {
        let Case { backend, method, .. } = m.case;
        if let Shape::Model { model, ranks: 1, micro_batches: 1, optimizer, .. } = m.case.shape
            && !model.is_miniature()
        {
            let same_optimizer = |s: &Sweep<'_>| s.steps[0].case.shape.optimizer() == optimizer;
            let same = |s: &&mut Sweep<'_>| {
                (s.model, s.backend, s.method) == (model, backend, method) && same_optimizer(s)
            };
            match sweeps.iter_mut().find(same) {
                Some(sweep) => sweep.steps.push(*m),
                None => sweeps.push(Sweep { model, backend, method, steps: vec![*m] }),
            }
        }
    }
    sweeps.retain(|sweep| sweep.steps.len() > 1);
    sweeps.iter_mut().for_each(|sweep| sweep.steps.sort_by_key(|m| m.case.shape.batch()));
    sweeps
}

/// Returns the highest rate in FLOP/s of the run's matrix products on a backend. Mixed precision multiplies in
/// bf16.
pub fn measured_peak(all: &[Measured<'_>], backend: BackendId, precision: Precision) -> Option<f64> {
    let precision = if precision.is_mixed_precision() { Precision::Bf16 } else { precision };
    all.iter()
        .filter(|m| m.case.workload == Workload::MatmulPeak && m.case.backend == backend)
        .filter(|m| m.case.method.precision == precision)
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

    /// Returns a run of cases with their medians in nanoseconds.
    pub(super) fn run(cases: &[(&str, f64)]) -> Results {
        Results::new(Machine::default(), cases.iter().map(|(id, median)| record(id, *median)).collect())
    }

    pub(super) fn interleaved([base, head]: [&str; 2], ratio: f64, ratio_ci: [f64; 2]) -> InterleavedResult {
        let (base, head) = (base.to_owned(), head.to_owned());
        let (base_ns, head_ns) = (Some(500e6), Some(500e6 * ratio));
        let (round_ns, commit) = (vec![[500e6, 500e6 * ratio]; 3], String::new());
        InterleavedResult { base, head, base_ns, head_ns, ratio, ratio_ci, rounds: 3, round_ns, commit }
    }

    #[test]
    fn variants_are_compared_with_eager_f32() {
        let results = run(&[
            ("train-step/torch-cuda/f32/indicator-b16", 10e6),
            ("train-step/torch-cuda/f32-cudagraph/indicator-b16", 5e6),
            ("train-step/mlx-cuda/f32/indicator-b16", 7e6),
        ]);
        let all = all_measured(&results);
        let rows = ablation(&all);
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[1].1, 2.0);
    }

    #[test]
    fn the_sweep_is_sorted_by_batch() {
        let results = run(&[
            ("train-step/mlx-cpu/f32/indicator-b64", 64e9),
            ("train-step/mlx-cpu/f32/indicator-b4", 2e9),
            ("train-step/torch-cpu/f32/indicator-b4", 2e9),
        ]);
        let all = all_measured(&results);
        let sweeps = batches(&all);
        assert_eq!(sweeps.len(), 1);
        let speeds = sweeps[0].steps.iter().map(|m| (m.case.shape.batch(), m.speed().value));
        assert_eq!(speeds.collect::<Vec<_>>(), [(4, 2.0), (64, 1.0)]);
    }

    #[test]
    fn the_measured_peak_of_mixed_precision_is_the_one_of_bf16() {
        let results = run(&[("matmul-peak/torch-cuda/bf16/n8192", 2.0 * 8192f64.powi(3) / 700e12 * 1e9)]);
        let all = all_measured(&results);
        let peak = measured_peak(&all, BackendId::TorchCuda, Precision::Mixed).unwrap();
        assert!((peak / 700e12 - 1.0).abs() < 1e-9);
        assert_eq!(measured_peak(&all, BackendId::TorchCuda, Precision::F32), None);
    }
}
