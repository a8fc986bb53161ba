//! Scaling over several devices: data-parallel training steps compared with one device of the same run.

use super::format::{or_dash, percent, percent_with_range, time};
use super::table::{Table, cells, throughput};
use super::{Measured, Ratio};
use crate::backend::RankStats;
use crate::model::ModelId;
use crate::suite::{BackendId, Case, Method, Shape, Variant};

/// A case on several devices.
///
/// The efficiencies are speeds as a share of linear scaling. Ranks on a CPU share its cores, so they are compared
/// with one process that uses all cores.
#[derive(Clone, Copy)]
pub struct Scaling<'a> {
    pub step: Measured<'a>,
    pub stats: &'a RankStats,
    /// Efficiency at the same global batch, if one device was measured with it.
    pub strong: Option<Ratio>,
    /// Efficiency at the same batch per device. `None` on a CPU.
    pub weak: Option<Ratio>,
}

/// Returns the case of one device that computes the same at `batch`. Without other ranks, `-overlap` is eager.
fn single_device_case(case: &Case, batch: usize) -> Option<Case> {
    let (model, _) = case.shape.model()?;
    let variant = if case.method.variant == Variant::Overlap { Variant::Eager } else { case.method.variant };
    let shape = Shape::for_model(model, batch).with_optimizer(case.shape.optimizer());
    Some(Case { method: Method { variant, ..case.method }, shape, ..*case })
}

/// Returns every measured case with several ranks. An all-reduce has no efficiency.
pub fn scalings<'a>(all: &[Measured<'a>]) -> Vec<Scaling<'a>> {
    let scaling = |step: &Measured<'a>| {
        let (shape, cpu) = (step.case.shape, step.case.backend.is_cpu());
        let ranks = shape.ranks();
        let efficiency = |batch, linear: usize| {
            let single = single_device_case(&step.case, batch)?;
            let base = all.iter().find(|m| m.case == single)?;
            Some(step.speedup_over(base).divided_by(linear as f64))
        };
        Some(Scaling {
            step: *step,
            stats: step.record.ranks.as_ref().filter(|_| ranks > 1)?,
            strong: efficiency(shape.batch(), if cpu { 1 } else { ranks }),
            weak: if cpu { None } else { efficiency(shape.batch() / ranks, 1) },
        })
    };
    all.iter().filter_map(scaling).collect()
}

/// Efficiency above which the single-device time must be noisy: linear scaling is the limit.
const ABOVE_LINEAR: f64 = 1.05;

/// Returns the table of data-parallel steps and all-reduce bandwidths.
pub fn table(all: &[Measured<'_>]) -> Table {
    let row = |s: Scaling<'_>| {
        let exposed =
            s.stats.exposed_communication.map(|[value, low, high]| Ratio { value, range: [low, high] });
        let noisy = !s.step.case.backend.is_cpu()
            && [s.strong, s.weak].into_iter().flatten().any(|share| share.value > ABOVE_LINEAR);
        let remark = if noisy { "above linear scaling: the time of one device is noisy" } else { "" };
        let (case, ranks) = (s.step.case, s.step.case.shape.ranks());
        let median = time(s.step.median_ns);
        let mut row = cells([&case, &ranks, &s.stats.comm_backend, &median, &throughput(&s.step)]);
        row.extend([s.strong, s.weak, exposed].map(|share| or_dash(share.map(percent_with_range))));
        row.extend([percent(s.stats.skew), remark.to_owned()]);
        row
    };
    Table::new(
        "Multiple devices",
        "Scaling efficiency is the speed as a share of linear scaling from one device of the same run. Strong scaling \
         uses the same global batch, and weak scaling the same batch per device. Ranks of a CPU are compared with one \
         process that uses all cores. Exposed communication is the share of the step that disappears without the \
         all-reduce. It is measured interleaved on the same ranks. The rate of an all-reduce is the bus bandwidth of \
         nccl-tests.",
        "case|devices|communication|median|throughput|strong-scaling efficiency|weak-scaling efficiency|exposed communication|rank skew|remarks",
        scalings(all).into_iter().map(row).collect(),
    )
}

/// The speedup of a model over one GPU, with its largest measured batches.
pub struct ModelScaling {
    pub model: ModelId,
    pub backend: BackendId,
    pub ranks: usize,
    pub weak: Option<Speedup>,
    pub strong: Option<Speedup>,
}

pub struct Speedup {
    pub value: f64,
    pub efficiency: f64,
    /// `32 samples per GPU`, `32 samples in total`
    pub batch: String,
    pub method: Method,
}

/// Returns the scaling of each model over GPUs, the largest model first.
pub fn by_model(all: &[Measured<'_>]) -> Vec<ModelScaling> {
    let mut scalings = scalings(all);
    scalings.sort_by(|a, b| {
        let batches = b.step.case.shape.batch().cmp(&a.step.case.shape.batch());
        batches.then(a.step.median_ns.total_cmp(&b.step.median_ns))
    });
    scalings.retain(|s| s.weak.is_some() || s.strong.is_some());
    let mut models: Vec<ModelScaling> = Vec::new();
    // The first scaling of each kind is the fastest method of the largest batch.
    for s in scalings {
        let Case { backend, shape, method, .. } = s.step.case;
        let Some((model, batch)) = shape.model().filter(|_| !backend.is_cpu()) else { continue };
        let ranks = shape.ranks();
        let known = models.iter().position(|m| (m.model, m.backend, m.ranks) == (model, backend, ranks));
        let slot = known.unwrap_or_else(|| {
            models.push(ModelScaling { model, backend, ranks, weak: None, strong: None });
            models.len() - 1
        });
        let speedup = |efficiency: Option<Ratio>, batch: String| {
            let efficiency = efficiency?.value;
            Some(Speedup { value: efficiency * ranks as f64, efficiency, batch, method })
        };
        let ModelScaling { weak, strong, .. } = &mut models[slot];
        *weak = weak.take().or_else(|| speedup(s.weak, format!("{} samples per GPU", batch / ranks)));
        *strong = strong.take().or_else(|| speedup(s.strong, format!("{batch} samples in total")));
    }
    models.sort_by_key(|m| {
        let parameters = Shape::for_model(m.model, 1).parameter_count();
        (m.backend, m.ranks, std::cmp::Reverse(parameters))
    });
    models
}

/// Describes the speedup of each model by more GPUs.
pub fn sentences(all: &[Measured<'_>]) -> Vec<String> {
    let sentence = |model: ModelScaling| {
        let speedup = |s: Speedup| format!("{:.2} times as fast with {} ({})", s.value, s.batch, s.method);
        let speedups: Vec<String> = model.weak.into_iter().chain(model.strong).map(speedup).collect();
        format!(
            "On {} GPUs, {} trains {} {}, compared with one GPU.",
            model.ranks,
            model.backend.framework().label(),
            model.model.name,
            speedups.join(" and ")
        )
    };
    by_model(all).into_iter().map(sentence).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::super::{all_measured, summary, tables};
    use super::*;
    use crate::results::Results;
    use crate::results::machine::Machine;

    fn run(parallel_ns: f64) -> Results {
        let mut parallel = record("train-step/torch-cuda/bf16-tuned/indicator-b32-dp2", parallel_ns);
        parallel.ranks = Some(RankStats {
            comm_backend: "NCCL".to_owned(),
            exposed_communication: Some([0.03, 0.02, 0.04]),
            ..RankStats::default()
        });
        let single = |batch| format!("train-step/torch-cuda/bf16-tuned/indicator-b{batch}");
        Results::new(Machine::default(), vec![record(&single(16), 1e6), record(&single(32), 1.8e6), parallel])
    }

    #[test]
    fn two_devices_are_compared_with_one_of_the_same_run() {
        let results = run(1.25e6);
        let measured = all_measured(&results);
        let found = scalings(&measured);
        let (weak, strong) = (found[0].weak.unwrap(), found[0].strong.unwrap());
        assert!(
            (weak.value - 0.8).abs() < 1e-12 && (strong.value - 0.72).abs() < 1e-12,
            "{weak:?} {strong:?}"
        );
        // Both intervals are a tenth on either side.
        assert!((weak.range[0] - 0.8 * 0.9 / 1.1).abs() < 1e-12, "{weak:?}");
        let row = &table(&measured).rows[0];
        assert!(row[6].starts_with("80.0 %") && row[7].starts_with("3.0 %"), "{row:?}");
        assert_eq!(row[1..3], ["2", "NCCL"]);
        assert!(tables::all(&results).iter().any(|t| t.title == "Multiple devices"));
    }

    #[test]
    fn the_speedup_by_a_second_gpu_is_an_answer() {
        let mut results = run(1.25e6);
        let text = sentences(&all_measured(&results));
        let expected = "On 2 GPUs, PyTorch trains indicator 1.60 times as fast with 16 samples per GPU (bf16-tuned) and \
                        1.44 times as fast with 32 samples in total (bf16-tuned), compared with one GPU.";
        assert_eq!(text, [expected]);
        // Without a comparison of frameworks, it is the answer.
        assert_eq!(summary::answer(&results), [expected]);
        // A slower variant of the same shape is left out.
        let mut eager = record("train-step/torch-cuda/bf16/indicator-b32-dp2", 5e6);
        eager.ranks = Some(RankStats::default());
        results.cases.extend([eager, record("train-step/torch-cuda/bf16/indicator-b32", 9e6)]);
        assert_eq!(sentences(&all_measured(&results)), [expected]);
        results.cases.iter_mut().for_each(|r| r.ranks = None);
        assert!(sentences(&all_measured(&results)).is_empty());
    }

    #[test]
    fn ranks_of_a_cpu_are_compared_with_all_its_cores() {
        let mut parallel = record("train-step/torch-cpu/f32-overlap/indicator-b16-dp2", 5e8);
        parallel.ranks = Some(RankStats::default());
        let single = |batch| record(&format!("train-step/torch-cpu/f32/indicator-b{batch}"), 6e8);
        let results = Results::new(Machine::default(), vec![single(8), single(16), parallel]);
        let measured = all_measured(&results);
        let found = scalings(&measured);
        assert!((found[0].strong.unwrap().value - 1.2).abs() < 1e-12 && found[0].weak.is_none());
        assert!(table(&measured).rows[0][4].starts_with("120.0 %"), "{:?}", table(&measured).rows);
    }

    #[test]
    fn one_device_has_no_scaling() {
        let mut results = run(1e6);
        results.cases.remove(2);
        assert!(scalings(&all_measured(&results)).is_empty());
        assert!(sentences(&all_measured(&results)).is_empty());
    }
}
