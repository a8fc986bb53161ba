//! What several devices bring: training steps that ranks share, against one device of the same run.

use super::Measured;
use super::summary::ratio;
use super::tables::{Table, prefixed, rate_text, time};
use crate::backend::RankStats;
use crate::model::ModelId;
use crate::model::parameters::parameter_count;
use crate::suite::{BackendId, Case, Method, Shape, Variant, Workload};

/// A part of the speed that as many lone devices would have, and the range that both intervals allow. A
/// process alone has all cores of a CPU, so ranks of one are held against that.
type Kept = (f64, [f64; 2]);

/// A training step that ranks shared.
pub struct Scaling<'a> {
    pub m: &'a Measured<'a>,
    pub ranks: &'a RankStats,
    /// The same batch in all, on one device before.
    pub strong: Option<Kept>,
    /// The same batch on each device.
    pub weak: Option<Kept>,
}

/// What one device does of a case that ranks share, at a batch: the recipe that exchanges in buckets
/// is the eager one there.
fn single_device_case(case: &Case, batch: usize) -> Option<Case> {
    let (model, _) = case.shape.model()?;
    let recipe = if case.method.variant == Variant::Overlap { Variant::Eager } else { case.method.variant };
    let precision = Method { variant: recipe, ..case.method };
    Some(Case { method: precision, shape: Shape::of_model(model, batch), ..*case })
}

/// How much of lone devices' speed is kept: `devices` of them would take `base` over their number.
fn efficiency(base: Option<&Measured<'_>>, shared: &Measured<'_>, devices: f64) -> Option<Kept> {
    let figure = |m: &Measured<'_>| Some((m.median_ns, m.record.ci_ns?));
    let (times, range) = ratio(figure(shared)?, figure(base?)?);
    Some((times / devices, range.map(|times| times / devices)))
}

/// Every training step of the run that ranks shared.
pub fn scalings<'a>(all: &'a [Measured<'a>]) -> Vec<Scaling<'a>> {
    let find = |case: Option<Case>| all.iter().find(|m| Some(m.case) == case);
    let of = |m: &'a Measured<'a>| {
        let (shape, ranks) = (m.case.shape, m.case.shape.ranks());
        let cpu = m.case.backend.is_cpu();
        (ranks > 1 && m.case.workload == Workload::TrainStep).then_some(())?;
        Some(Scaling {
            m,
            ranks: m.record.ranks.as_ref()?,
            strong: efficiency(
                find(single_device_case(&m.case, shape.batch())),
                m,
                if cpu { 1.0 } else { ranks as f64 },
            ),
            weak: if cpu {
                None
            } else {
                efficiency(find(single_device_case(&m.case, shape.batch() / ranks)), m, 1.0)
            },
        })
    };
    all.iter().filter_map(of).collect()
}

fn percent(part: f64) -> String {
    format!("{:.1} %", 100.0 * part)
}

fn range([low, high]: [f64; 2]) -> String {
    format!("{:.1} to {:.1}", 100.0 * low, 100.0 * high)
}

pub fn table(all: &[Measured<'_>]) -> Table {
    let none = || "–".to_owned();
    let told = |kept: Option<Kept>| {
        kept.map_or_else(none, |(part, of)| {
            // More than all of it can't be.
            let mark = if part > 1.05 { ": the lone figure wandered" } else { "" };
            format!("{} ({}){mark}", percent(part), range(of))
        })
    };
    let steps = scalings(all).into_iter().map(|s| {
        let exposed = s
            .ranks
            .exposed_communication
            .map(|[middle, low, high]| format!("{} ({})", percent(middle), range([low, high])));
        vec![
            s.m.case.to_string(),
            format!("{}, {}", s.m.case.shape.ranks(), s.ranks.comm_backend),
            time(s.m.median_ns),
            rate_text(s.m.case.shape, s.m.median_ns),
            told(s.strong),
            told(s.weak),
            exposed.unwrap_or_else(none),
            percent(s.ranks.skew),
        ]
    });
    let ceilings = all.iter().filter(|m| m.case.workload == Workload::AllReduce).filter_map(|m| {
        let (ranks, rate) = (m.record.ranks.as_ref()?, m.record.throughput.as_ref()?);
        Some(vec![
            m.case.to_string(),
            format!("{}, {}", m.case.shape.ranks(), ranks.comm_backend),
            time(m.median_ns),
            format!("{}B/s", prefixed(rate.value)),
            none(),
            none(),
            none(),
            percent(ranks.skew),
        ])
    });
    Table {
        title: "Several devices".to_owned(),
        note: "Kept is the part of the speed that as many lone devices would have, of the same run and recipe, with \
               the range that both 95 % intervals allow: of one batch divided (strong), and of one batch a device \
               (weak); ranks of a CPU are held against one process with all its cores. Exposed is what of the step ends when gradients are not exchanged, in turns on the same \
               ranks. The bandwidth of an all-reduce is the bus bandwidth of nccl-tests.",
        header: &["case", "devices", "median", "speed", "kept, strong", "kept, weak", "exposed", "skew"],
        rows: steps.chain(ceilings).collect(),
    }
}

/// Of each backend and shape the fastest recipe that can be held against lone devices.
fn fastest<'a>(all: &'a [Measured<'a>]) -> Vec<Scaling<'a>> {
    let mut scalings = scalings(all);
    scalings.retain(|s| s.weak.is_some() || s.strong.is_some());
    scalings.sort_by(|a, b| a.m.median_ns.total_cmp(&b.m.median_ns));
    let mut told: Vec<Case> = Vec::new();
    scalings.retain(|s| {
        let case = s.m.case;
        let known = told.iter().any(|known| known.backend == case.backend && known.shape == case.shape);
        told.push(case);
        !known
    });
    scalings
}

/// What a second GPU, or an eighth, is worth: a sentence for each backend and number of them.
pub fn speedup_summary(all: &[Measured<'_>]) -> Vec<String> {
    let mut groups: Vec<(BackendId, usize, Vec<Scaling<'_>>)> = Vec::new();
    for s in fastest(all).into_iter().filter(|s| !s.m.case.backend.is_cpu()) {
        let (backend, ranks) = (s.m.case.backend, s.m.case.shape.ranks());
        match groups.iter_mut().find(|(b, r, _)| (*b, *r) == (backend, ranks)) {
            Some((_, _, own)) => own.push(s),
            None => groups.push((backend, ranks, vec![s])),
        }
    }
    groups.into_iter().map(|(backend, ranks, own)| times(backend, ranks, &own)).collect()
}

/// `2 GPUs against one …`: model by model, the largest first, and the largest batch.
fn times(backend: BackendId, ranks: usize, all: &[Scaling<'_>]) -> String {
    let mut models: Vec<ModelId> = all.iter().filter_map(|s| Some(s.m.case.shape.model()?.0)).collect();
    models.sort_by_key(|model| std::cmp::Reverse(parameter_count(Shape::of_model(*model, 1))));
    models.dedup();
    let of_a_model = |model: ModelId| {
        let mut own: Vec<&Scaling<'_>> =
            all.iter().filter(|s| s.m.case.shape.model().is_some_and(|(m, _)| m == model)).collect();
        own.sort_by_key(|s| std::cmp::Reverse(s.m.case.shape.batch()));
        let figures: Vec<String> = own
            .iter()
            .flat_map(|s| {
                let (batch, recipe) = (s.m.case.shape.batch(), s.m.case.method);
                let times = |kept: Option<Kept>, how: String| {
                    kept.map(|(part, _)| format!("{:.2} times as fast {how} ({recipe})", part * ranks as f64))
                };
                let weak = times(s.weak, format!("at a batch of {} each", batch / ranks));
                weak.into_iter().chain(times(s.strong, format!("sharing a batch of {batch}")))
            })
            .collect();
        format!("{} trains {}", model.name, figures.join(", "))
    };
    format!(
        "{ranks} GPUs against one ({}): {}",
        backend.framework().names().0,
        models.into_iter().map(of_a_model).collect::<Vec<_>>().join("; ")
    )
}

/// The same in full, with what is lost.
pub fn sentences(all: &[Measured<'_>]) -> Vec<String> {
    let mut sentences = Vec::new();
    for s in &fastest(all) {
        let case = &s.m.case;
        let (ranks, batch) = (case.shape.ranks(), case.shape.batch());
        let of = |kept: Option<Kept>, how: String| {
            let lone = if case.backend.is_cpu() {
                "the speed of one process with all cores".to_owned()
            } else {
                format!("{ranks} lone ones' speed")
            };
            kept.map(|(part, of)| format!("{} ({}) of {lone} {how}", percent(part), range(of)))
        };
        let weak = of(s.weak, format!("at batch {} each", batch / ranks));
        let strong = of(s.strong, format!("where they share a batch of {batch}"));
        let both: Vec<String> = weak.into_iter().chain(strong).collect();
        let exposed = s.ranks.exposed_communication.map_or_else(String::new, |[middle, ..]| {
            format!("; exchange by {} that nothing hides takes {}", s.ranks.comm_backend, percent(middle))
        });
        sentences.push(format!(
            "{ranks} {} of {} train {} in {} with {}{exposed}",
            if case.backend.is_cpu() { "ranks" } else { "devices" },
            case.backend,
            case.shape.model().map_or("", |(model, _)| model.name),
            case.method,
            both.join(", and ")
        ));
    }
    sentences
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::super::{all_measured, summary, tables};
    use super::*;
    use crate::results::Results;
    use crate::results::machine::Machine;

    fn run(shared_ns: f64) -> Results {
        let mut shared = record("train-step/torch-cuda/bf16-tuned/indicator-b32-dp2", shared_ns);
        shared.ranks = Some(RankStats {
            comm_backend: "NCCL".to_owned(),
            exposed_communication: Some([0.03, 0.02, 0.04]),
            ..RankStats::default()
        });
        let alone = |batch| format!("train-step/torch-cuda/bf16-tuned/indicator-b{batch}");
        Results::new(Machine::default(), vec![record(&alone(16), 1e6), record(&alone(32), 1.8e6), shared])
    }

    #[test]
    fn two_devices_are_held_against_one_of_the_same_run() {
        let results = run(1.25e6);
        let measured = all_measured(&results);
        let found = scalings(&measured);
        let (weak, strong) = (found[0].weak.unwrap(), found[0].strong.unwrap());
        assert!((weak.0 - 0.8).abs() < 1e-12 && (strong.0 - 0.72).abs() < 1e-12, "{weak:?} {strong:?}");
        // Both intervals are a tenth on either side.
        assert!((weak.1[0] - 0.8 * 0.9 / 1.1).abs() < 1e-12, "{weak:?}");
        let row = &table(&measured).rows[0];
        assert!(
            row[5].starts_with("80.0 %") && row[6].starts_with("3.0 %") && row[1] == "2, NCCL",
            "{row:?}"
        );
        let said = summary::verdict(&results);
        assert!(said.iter().any(|s| s.contains("80.0 %") && s.contains("at batch 16 each")), "{said:?}");
        assert!(tables::all(&results).iter().any(|t| t.title == "Several devices"));
    }

    #[test]
    fn what_a_second_gpu_is_worth_is_said_in_speeds() {
        let mut results = run(1.25e6);
        let said = speedup_summary(&all_measured(&results));
        let whole = "2 GPUs against one (PyTorch): indicator trains 1.60 times as fast at a batch of 16 each \
                     (bf16-opt), 1.44 times as fast sharing a batch of 32 (bf16-opt)";
        assert_eq!(said, [whole]);
        // Without a winner to tell, it is the answer.
        assert_eq!(summary::answer(&results), [format!("{whole}.")]);
        // A slower recipe of the same shape is not told.
        let mut eager = record("train-step/torch-cuda/bf16/indicator-b32-dp2", 5e6);
        eager.ranks = Some(RankStats::default());
        results.cases.extend([eager, record("train-step/torch-cuda/bf16/indicator-b32", 9e6)]);
        assert_eq!(speedup_summary(&all_measured(&results)), [whole]);
        results.cases.iter_mut().for_each(|r| r.ranks = None);
        assert!(speedup_summary(&all_measured(&results)).is_empty());
    }

    #[test]
    fn ranks_of_a_cpu_are_held_against_all_its_cores() {
        let mut shared = record("train-step/torch-cpu/f32-overlap/indicator-b16-dp2", 5e8);
        shared.ranks = Some(RankStats::default());
        let alone = |batch| record(&format!("train-step/torch-cpu/f32/indicator-b{batch}"), 6e8);
        let results = Results::new(Machine::default(), vec![alone(8), alone(16), shared]);
        let measured = all_measured(&results);
        let found = scalings(&measured);
        assert!((found[0].strong.unwrap().0 - 1.2).abs() < 1e-12 && found[0].weak.is_none());
        let said = sentences(&measured);
        assert!(said[0].contains("120.0 %") && said[0].contains("one process with all cores"), "{said:?}");
    }

    #[test]
    fn one_device_alone_says_nothing() {
        let mut results = run(1e6);
        results.cases.remove(2);
        assert!(scalings(&all_measured(&results)).is_empty());
        assert!(sentences(&all_measured(&results)).is_empty());
    }
}
