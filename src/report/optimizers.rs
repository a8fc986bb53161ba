//! The cost of an optimizer over AdamW, as sentences.

use super::format::{digits, range};
use super::summary::disturbance;
use super::{Measured, all_measured, find_measured};
use crate::results::Results;
use crate::suite::{BackendId, Case, Optimizer, Workload};

/// Names the cost of each other optimizer on each backend, if the run has the same training step with AdamW. Of several
/// methods and models, the fastest step of the largest model counts.
pub fn sentences(results: &Results) -> Vec<String> {
    let all = all_measured(results);
    let others = Optimizer::ALL.iter().filter(|optimizer| **optimizer != Optimizer::Adamw);
    let pairs = others.flat_map(|&optimizer| BackendId::ALL.iter().map(move |&backend| (optimizer, backend)));
    pairs.filter_map(|(optimizer, backend)| sentence(results, &all, optimizer, backend)).collect()
}

fn sentence(
    results: &Results,
    all: &[Measured<'_>],
    optimizer: Optimizer,
    backend: BackendId,
) -> Option<String> {
    let with_adamw = |step: &Measured<'_>| {
        let shape = step.case.shape.with_optimizer(Optimizer::Adamw);
        find_measured(results, &Case { shape, ..step.case })
    };
    let steps = all.iter().filter(|m| {
        let Case { workload, shape, .. } = m.case;
        let key = (m.case.backend, workload, shape.optimizer(), shape.ranks());
        key == (backend, Workload::TrainStep, optimizer, 1)
    });
    let pairs = steps.filter_map(|step| Some((step, with_adamw(step)?)));
    let size = |step: &Measured<'_>| step.case.shape.parameter_count();
    let (step, adamw) =
        pairs.max_by(|(a, _), (b, _)| size(a).cmp(&size(b)).then(b.median_ns.total_cmp(&a.median_ns)))?;
    let Case { method, shape, .. } = adamw.case;
    let name = optimizer.label();
    if let Some(reason) = [step, &adamw].into_iter().find_map(disturbance) {
        return Some(format!("On {backend}, {name} is not compared with AdamW, because {reason}."));
    }
    let cost = adamw.speedup_over(step);
    Some(format!(
        "On {backend}, a training step of {shape} takes {} times as long with {name} as with AdamW ({} from both 95 % CIs, \
         with {method}).",
        digits(cost.value),
        range(cost.range)
    ))
}

#[cfg(test)]
mod tests {
    use super::super::tests::run;
    use super::*;

    #[test]
    fn the_cost_of_muon_is_one_sentence_per_backend() {
        let step = |backend: &str, method: &str, shape: &str| {
            format!("train-step/{backend}/{method}/indicator-{shape}")
        };
        let ids = [
            (step("torch-cpu", "f32", "b16"), 500e6),
            (step("torch-cpu", "f32", "b16-muon"), 900e6),
            (step("torch-cpu", "f32-tuned", "b16"), 400e6),
            (step("torch-cpu", "f32-tuned", "b16-muon"), 600e6),
            (step("mlx-cpu", "f32-tuned", "b16-muon"), 900e6),
        ];
        let cases: Vec<(&str, f64)> = ids.iter().map(|(id, ns)| (&**id, *ns)).collect();
        let found = sentences(&run(&cases));
        // MLX has no step with AdamW.
        assert_eq!(found.len(), 1, "{found:?}");
        let start = "On torch-cpu, a training step of indicator-b16 takes 1.50 times as long with Muon as with AdamW (";
        assert!(found[0].starts_with(start) && found[0].ends_with("with f32-tuned)."), "{found:?}");
        let mut disturbed = run(&cases);
        disturbed.cases[3].cpu_wait_share = Some(0.3);
        let found = sentences(&disturbed);
        assert!(found[0].contains("not compared with AdamW") && found[0].contains("30 %"), "{found:?}");
        assert!(sentences(&run(&cases[..1])).is_empty());
    }
}
