//! Training speed and memory at several numbers of tokens per sample.

use super::format::{digits, megabytes, or_dash};
use super::table::{Table, cells};
use super::{Measured, rate};
use crate::model::Model;
use crate::suite::{BackendId, Shape, Workload};

/// The fastest measured training step of a backend at each number of tokens.
pub struct LengthSweep<'a> {
    pub name: &'static str,
    pub backend: BackendId,
    /// The steps in ascending order of the tokens.
    pub steps: Vec<Measured<'a>>,
}

/// Returns the tokens per sample of a training step on one device.
pub fn tokens(m: &Measured<'_>) -> Option<usize> {
    match m.case.shape {
        Shape::Model { model, ranks: 1, .. } => Some(model.tokens),
        _ => None,
    }
}

/// Returns the models and backends with training steps at more than one number of tokens.
pub fn length_sweeps<'a>(all: &[Measured<'a>]) -> Vec<LengthSweep<'a>> {
    let mut sweeps: Vec<LengthSweep<'a>> = Vec::new();
    let per_second = |m: &Measured<'_>| rate(m.case.shape, m.median_ns).0;
    for m in all.iter().filter(|m| m.case.workload == Workload::TrainStep) {
        let (Some((model, _)), Some(length)) = (m.case.shape.model(), tokens(m)) else { continue };
        let Model { name, .. } = *model;
        if !model.is_language_model() || model.is_miniature() {
            continue;
        }
        let backend = m.case.backend;
        let known = sweeps.iter().position(|sweep| (sweep.name, sweep.backend) == (name, backend));
        let steps = match known {
            Some(index) => &mut sweeps[index].steps,
            None => {
                sweeps.push(LengthSweep { name, backend, steps: Vec::new() });
                &mut sweeps.last_mut().expect("pushed").steps
            }
        };
        match steps.iter_mut().find(|other| tokens(other) == Some(length)) {
            Some(fastest) if per_second(fastest) >= per_second(m) => {}
            Some(slower) => *slower = *m,
            None => steps.push(*m),
        }
    }
    sweeps.retain(|sweep| sweep.steps.len() > 1);
    sweeps.iter_mut().for_each(|sweep| sweep.steps.sort_by_key(tokens));
    sweeps
}

/// Returns the table of speeds and memory by length.
pub fn table(all: &[Measured<'_>]) -> Table {
    let sweeps = length_sweeps(all);
    let row = |(backend, m): (BackendId, &Measured<'_>)| {
        let [allocator, rss] =
            [m.record.peak_bytes, m.record.rss_peak_bytes].map(|bytes| or_dash(bytes.map(megabytes)));
        let speed = digits(m.speed().value);
        cells([&m.case.shape, &backend, &m.case.method, &speed, &allocator, &rss])
    };
    let mut steps: Vec<(BackendId, &Measured<'_>)> =
        sweeps.iter().flat_map(|sweep| sweep.steps.iter().map(|m| (sweep.backend, m))).collect();
    steps.sort_by_key(|(_, m)| tokens(m));
    Table::new(
        "Training speed by tokens per sample",
        "Each row is the fastest checked method of its backend. A step has about the same number of tokens at each length. \
         The allocator peak and the peak RSS of the process are different metrics and must not be compared.",
        "shape|backend|fastest method|tokens/s|allocator peak|peak RSS",
        steps.into_iter().map(row).collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::super::all_measured;
    use super::super::tests::run;
    use super::*;
    use crate::model::{GPT2, ModelId};

    #[test]
    fn each_length_has_the_fastest_method() {
        ModelId::register(Model { name: "swept", tokens: 2048, ..GPT2 }).unwrap();
        let results = run(&[
            ("train-step/torch-cpu/f32/swept-b4-t512", 2.048e9),
            ("train-step/torch-cpu/f32-tuned/swept-b4-t512", 1.024e9),
            ("train-step/torch-cpu/f32/swept-b1-t2048", 2.048e9),
            ("train-step/torch-cpu/f32-tuned/swept-b1-t2048", 4.096e9),
            ("train-step/mlx-cpu/f32/swept-b4-t512", 2.048e9),
        ]);
        let rows = table(&all_measured(&results)).rows;
        // A backend with one length has no sweep.
        assert_eq!(rows.len(), 2, "{rows:?}");
        assert_eq!(rows[0][..4], ["swept-b4-t512", "torch-cpu", "f32-tuned", "2,000"]);
        assert_eq!(rows[1][..4], ["swept-b1-t2048", "torch-cpu", "f32", "1,000"]);
    }
}
