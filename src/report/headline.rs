//! The rows of the headline tables, and the pairs of training steps that a run compares in interleaved rounds.

use super::{Measured, all_measured, find_measured, find_record};
use crate::results::Results;
use crate::suite::{BackendId, Case, Method, Precision, Shape, Variant, Workload};

/// A row of the headline tables.
pub struct Headline {
    pub label: String,
    pub case: Case,
}

/// The largest ratio of two runs of the same code, one after the other, that counts as noise. On a shared machine
/// such runs differ by 13 to 24 % (src/compare/README.md).
pub(super) const RUN_TO_RUN: f64 = 1.25;

/// Suffix of the label of a backend's fastest variant.
pub const ALL_OPT: &str = " + All Opt";

/// Order of the backends. The first measured row is the 1.00× of the table.
const ORDER: [BackendId; 6] = [
    BackendId::TorchCpu,
    BackendId::MlxMetal,
    BackendId::TorchMps,
    BackendId::TorchCuda,
    BackendId::MlxCuda,
    BackendId::MlxCpu,
];

/// Returns the rows of the headline tables, whether they were measured or not.
pub fn headlines(results: &Results) -> Vec<Headline> {
    ORDER.iter().flat_map(|&backend| backend_rows(results, backend)).collect()
}

fn train_step(backend: BackendId, method: Method, shape: Shape) -> Case {
    Case { workload: Workload::TrainStep, backend, method, shape }
}

/// Returns the rows of a backend: eager f32, AMP, mixed, All Opt, and anything that is faster still.
fn backend_rows(results: &Results, backend: BackendId) -> Vec<Headline> {
    let row = |suffix: &str, method| Headline {
        label: format!("{}{suffix}", backend.label()),
        case: train_step(backend, method, results.headline()),
    };
    let methods: Vec<Method> = fastest_first(results, backend).iter().map(|m| m.case.method).collect();
    let mut rows = vec![row("", Method::eager(Precision::F32))];
    let [amp, mixed] = [Precision::Amp, Precision::Mixed].map(Method::eager);
    if matches!(backend, BackendId::TorchMps | BackendId::TorchCuda) || methods.contains(&amp) {
        rows.push(row(" + AMP", amp));
    }
    if methods.contains(&mixed) {
        rows.push(row(" + mixed", mixed));
    }
    rows.push(match fastest_optimized(results, backend) {
        Some(case) => row(&format!("{ALL_OPT}: {}", case.method), case.method),
        None => {
            let precision = if backend.is_cpu() { Precision::F32 } else { Precision::Mixed };
            row(ALL_OPT, Method::tuned(precision))
        }
    });
    // With parameters in bf16 or f16, or products in TF32, the computation is another one.
    if let Some(&method) = methods.first()
        && rows.iter().all(|row| row.case.method != method)
    {
        let kind = match method.precision {
            Precision::Tf32 => "TF32 matrix products".to_owned(),
            precision => format!("{precision} parameters"),
        };
        rows.push(row(&format!(", {kind}: {method}"), method));
    }
    rows
}

/// Returns a backend's eager f32 step at the headline's shape, or `None` if it was not measured.
pub(super) fn find_eager(results: &Results, backend: BackendId) -> Option<Measured<'_>> {
    find_measured(results, &train_step(backend, Method::eager(Precision::F32), results.headline()))
}

/// Returns a backend's measured training steps at the headline's shape, the fastest first.
pub(super) fn fastest_first(results: &Results, backend: BackendId) -> Vec<Measured<'_>> {
    let mut steps = all_measured(results);
    steps.retain(|m| m.case == train_step(backend, m.case.method, results.headline()));
    // The choice must not depend on which steps have rounds.
    let median = |m: &Measured<'_>| m.record.median_ns.unwrap_or(f64::INFINITY);
    steps.sort_by(|a, b| median(a).total_cmp(&median(b)));
    steps
}

/// Returns the steps of [`fastest_first`] that store their parameters in f32 and do not use TF32.
fn f32_param_steps(results: &Results, backend: BackendId) -> Vec<Case> {
    let f32_params =
        |case: &Case| matches!(case.method.precision, Precision::F32 | Precision::Mixed | Precision::Amp);
    fastest_first(results, backend).iter().map(|m| m.case).filter(f32_params).collect()
}

/// Returns each backend's two fastest steps with f32 parameters. Interleaved rounds decide which is faster.
pub fn top_two(results: &Results) -> Vec<[Case; 2]> {
    let first_two = |&backend: &BackendId| f32_param_steps(results, backend).first_chunk::<2>().copied();
    BackendId::ALL.iter().filter_map(first_two).collect()
}

/// Returns the pairs of [`top_two`] that one run cannot rank.
pub fn near_ties(results: &Results) -> Vec<[Case; 2]> {
    let median = |case: &Case| find_record(results, case).and_then(|record| record.median_ns);
    let is_tie = |[first, second]: &[Case; 2]| {
        median(first).zip(median(second)).is_some_and(|(a, b)| b < RUN_TO_RUN * a)
    };
    top_two(results).into_iter().filter(is_tie).collect()
}

/// Returns a backend's fastest step with f32 parameters, by interleaved rounds or else by the medians. Returns
/// `None` if all its steps are eager.
fn fastest_optimized(results: &Results, backend: BackendId) -> Option<Case> {
    let steps = f32_param_steps(results, backend);
    steps.iter().find(|case| case.method.variant != Variant::Eager)?;
    let (first, second) = (*steps.first()?, steps.get(1));
    let faster_interleaved = second.filter(|second| {
        let ids = (first.to_string(), second.to_string());
        results.interleaved.iter().any(|r| (&r.base, &r.head) == (&ids.0, &ids.1) && r.ratio < 1.0)
    });
    Some(*faster_interleaved.unwrap_or(&first))
}

/// Returns the fastest step of each framework with f32 parameters, for every device with both frameworks.
pub fn best_pairs(results: &Results) -> Vec<[Case; 2]> {
    let best = |backend| {
        fastest_optimized(results, backend).or_else(|| f32_param_steps(results, backend).first().copied())
    };
    rivals().filter_map(|[a, b]| Some([best(a)?, best(b)?])).collect()
}

/// Returns the training steps in which two frameworks on one device are compared with the same method.
pub fn same_method_pairs(shape: Shape) -> Vec<[Case; 2]> {
    let methods = [Precision::F32, Precision::Mixed].map(|p| [Method::eager(p), Method::tuned(p)]);
    let pairs = |pair: [BackendId; 2]| {
        methods.into_iter().flatten().map(move |method| pair.map(|b| train_step(b, method, shape)))
    };
    rivals().flat_map(pairs).collect()
}

/// Returns the pairs of backends that share a device, PyTorch first.
pub(super) fn rivals() -> impl Iterator<Item = [BackendId; 2]> {
    BackendId::ALL.iter().flat_map(|&a| a.counterparts().filter(move |b| a < *b).map(move |b| [a, b]))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{interleaved, record, run};
    use super::*;
    use crate::results::machine::Machine;

    #[test]
    fn every_backend_has_a_row_and_a_partner() {
        for &backend in BackendId::ALL {
            let rows = headlines(&Results::new(Machine::default(), Vec::new()));
            assert!(rows.iter().any(|row| row.case.backend == backend), "{backend} has no row");
            assert_eq!(backend.counterparts().count(), 1, "{backend} does not have exactly one partner");
        }
    }

    #[test]
    fn the_first_five_rows_of_a_mac_stay() {
        let rows = headlines(&Results::new(Machine::default(), Vec::new()));
        let on_a_mac = |row: &&Headline| {
            matches!(row.case.backend, BackendId::MlxMetal | BackendId::TorchMps)
                || row.label == "PyTorch CPU"
        };
        let labels: Vec<&str> = rows.iter().filter(on_a_mac).map(|row| row.label.as_str()).collect();
        let expected = ["PyTorch CPU", "MLX (Metal)", "MLX (Metal) + All Opt"];
        assert_eq!(labels[..3], expected);
        assert_eq!(labels[3..], ["PyTorch MPS", "PyTorch MPS + AMP", "PyTorch MPS + All Opt"]);
        let amp = rows.iter().find(|row| row.label == "PyTorch MPS + AMP").unwrap();
        assert_eq!(amp.case.method, Method::eager(Precision::Amp));
    }

    #[test]
    fn amp_and_mixed_have_rows_of_their_own() {
        let results = run(&[
            ("train-step/torch-cpu/f32/indicator-b16", 4e6),
            ("train-step/torch-cpu/amp/indicator-b16", 3e6),
            ("train-step/mlx-cpu/f32/indicator-b16", 4e6),
            ("train-step/mlx-cpu/mixed/indicator-b16", 3e6),
        ]);
        let labels: Vec<String> = headlines(&results).into_iter().map(|row| row.label).collect();
        assert!(labels.contains(&"PyTorch CPU + AMP".to_owned()), "{labels:?}");
        assert!(labels.contains(&"MLX (CPU) + mixed".to_owned()), "{labels:?}");
        assert!(!labels.contains(&"PyTorch CPU + mixed".to_owned()), "{labels:?}");
    }

    #[test]
    fn the_best_steps_of_both_frameworks_are_a_pair() {
        let step = |case: &str, ns| record(&format!("train-step/{case}/indicator-b16"), ns);
        let mut cases = vec![step("torch-cpu/f32", 9e6), step("torch-cpu/mixed-compile", 5e6)];
        let pairs =
            |cases: &[crate::results::Record]| best_pairs(&Results::new(Machine::default(), cases.to_vec()));
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
    fn all_opt_is_the_fastest_variant_in_interleaved_rounds() {
        let step = |method: &str, ns| record(&format!("train-step/torch-cpu/{method}/indicator-b16"), ns);
        let mut results = Results::new(Machine::default(), vec![step("f32", 10e6), step("mixed", 6e6)]);
        let label = |results: &Results| {
            let rows = headlines(results);
            rows.into_iter().map(|row| row.label).find(|l| l.starts_with("PyTorch CPU + All Opt")).unwrap()
        };
        assert_eq!(label(&results), "PyTorch CPU + All Opt", "only eager steps");
        results.cases.extend([
            step("mixed-compile", 4e6),
            step("mixed-tuned", 4.1e6),
            step("bf16-tuned", 1e6),
        ]);
        assert_eq!(label(&results), "PyTorch CPU + All Opt: mixed-compile");
        let [first, second] = top_two(&results)[0].map(|case| case.to_string());
        assert!(first.contains("mixed-compile") && second.contains("mixed-tuned"));
        assert_eq!(near_ties(&results), top_two(&results));
        assert!(near_ties(&run(&[(&first, 4e6), (&second, 5.1e6)])).is_empty());
        results.interleaved.push(interleaved([&first, &second], 0.9, [0.85, 0.95]));
        assert_eq!(label(&results), "PyTorch CPU + All Opt: mixed-tuned");
    }
}
