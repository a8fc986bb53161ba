//! The findings of a run as sentences.

use super::format::{count, digits, megabytes, range, speed};
use super::headline::{RUN_TO_RUN, best_pairs, fastest_first, find_eager, rivals, same_method_pairs};
use super::{Measured, Ratio, Sweep, all_measured, batches, find_measured, optimizers, scaling};
use crate::compare::decision::THRESHOLD;
use crate::installation::command;
use crate::results::{Record, Results};
use crate::suite::{BackendId, Case, Framework, Method, Precision, Variant, Workload};
use crate::{interference, memory};

const EAGER: Method = Method::eager(Precision::F32);

/// Two training steps on one device, PyTorch's first.
pub struct Comparison<'a> {
    pub steps: [Measured<'a>; 2],
    /// Speed of the first step over the speed of the second, with a 95 % CI if rounds measured it.
    pub speedup: Ratio,
    /// Step times of the rounds, or else medians of one run. The speedup is their ratio.
    pub times_ns: [f64; 2],
    /// Number of interleaved rounds. `None` if the steps were only measured one after the other.
    pub rounds: Option<u64>,
}

impl<'a> Comparison<'a> {
    /// Returns `None` if one of the cases was not measured.
    pub fn new(results: &'a Results, cases: [Case; 2]) -> Option<Self> {
        let steps = [find_measured(results, &cases[0])?, find_measured(results, &cases[1])?];
        let [base, head] = [&steps[0].record.id, &steps[1].record.id];
        // Files of version 2 have a ratio without the times that it divides.
        let interleaved = results.interleaved.iter().find_map(|r| {
            let times = [r.base_ns?, r.head_ns?];
            ((&r.base, &r.head) == (base, head)).then_some((r, times))
        });
        let (speedup, times_ns) = match interleaved {
            Some((result, times)) => (Ratio { value: result.ratio, range: result.ratio_ci }, times),
            None => (steps[0].speedup_over(&steps[1]), steps.map(|step| step.median_ns)),
        };
        Some(Self { steps, speedup, times_ns, rounds: interleaved.map(|(result, _)| result.rounds) })
    }

    /// Returns the reason why this comparison allows no conclusion, if there is one. The intervals of interleaved rounds
    /// contain the effect of other programs, and their times are not those of the disturbed samples.
    fn disturbance(&self) -> Option<String> {
        if self.rounds.is_some() { None } else { self.steps.iter().find_map(disturbance) }
    }

    /// Returns the index of the faster step with its speedup. Returns `None` without a clear difference: the whole
    /// interval must be beyond the difference that a comparison of revisions counts as none. Steps that were not
    /// interleaved must differ by more than runs of the same code.
    pub fn winner(&self) -> Option<(usize, Ratio)> {
        let noise = if self.rounds.is_some() { 1.0 + THRESHOLD } else { RUN_TO_RUN };
        let speedups = [self.speedup, self.speedup.inverse()].into_iter().enumerate();
        let mut clear = speedups.filter(|(_, speedup)| speedup.range[0] > noise);
        clear.next().filter(|_| self.disturbance().is_none())
    }

    /// Returns the command that compares the steps in interleaved rounds.
    fn command(&self, results: &Results) -> String {
        let [a, b] = self.steps.map(|step| step.case);
        let variables = results.model.as_ref().map_or_else(String::new, |custom| custom.variables() + " ");
        // The rounds at the end of `scripts/bench` compare different methods.
        if a.method != b.method {
            return variables + &command("bench");
        }
        format!(
            "{variables}{} --set quick --backends {} {} '^{}/[^/]*/{}/{}$'",
            command("compare"),
            a.backend,
            b.backend,
            a.workload,
            a.method,
            a.shape
        )
    }

    /// Describes how reliable a speedup is.
    fn evidence(&self, speedup: Ratio) -> String {
        match self.rounds {
            Some(rounds) => {
                format!("95 % CI {} between processes, {rounds} interleaved rounds", range(speedup.range))
            }
            None => format!(
                "{} from both 95 % CIs within one run, measured one after the other; such runs of the same code differ by up to {:.0} %",
                range(speedup.range),
                100.0 * (RUN_TO_RUN - 1.0)
            ),
        }
    }

    fn sentence(&self, results: &Results) -> String {
        let [a, b] = [0, 1].map(|side| {
            let Case { backend, method, shape, .. } = self.steps[side].case;
            let speed = speed(shape, self.times_ns[side]);
            (backend.framework().label(), format!("{speed} with {method}"))
        });
        let Case { backend, shape, .. } = self.steps[0].case;
        let (device, model) = (backend.device(), shape.model().map_or("", |(model, _)| model.name));
        if let Some(reason) = self.disturbance() {
            return format!(
                "On {device}, {} at {} and {} at {} are not compared, because {reason}.",
                a.0, a.1, b.0, b.1
            );
        }
        let Some((first, speedup)) = self.winner() else {
            let hint = format!(" To decide, run `{}`.", self.command(results));
            return format!(
                "On {device}, neither framework is clearly faster: {} trains {model} at {}, and {} at {} (speed ratio: {}).{}",
                a.0,
                a.1,
                b.0,
                b.1,
                self.evidence(self.speedup),
                if self.rounds.is_none() { &hint } else { "" }
            );
        };
        let [winner, other] = if first == 0 { [a, b] } else { [b, a] };
        format!(
            "On {device}, {} trains {model} {} times as fast as {} ({}): {} and {}.",
            winner.0,
            digits(speedup.value),
            other.0,
            self.evidence(speedup),
            winner.1,
            other.1
        )
    }
}

/// Returns the reason why nothing is concluded from a case, if other programs disturbed it.
pub(super) fn disturbance(step: &Measured<'_>) -> Option<String> {
    let share = step.record.cpu_wait_share.filter(|_| step.record.disturbed())?;
    Some(format!("{} waited for a core for {:.0} % of its time", step.record.id, 100.0 * share))
}

/// Returns the answer: for each device the comparison of both frameworks' fastest steps. Without any, it is the
/// speedup by more GPUs, or else the reason why there is no answer.
pub fn answer(results: &Results) -> Vec<String> {
    let pairs = best_pairs(results).into_iter().filter_map(|pair| Comparison::new(results, pair));
    let mut sentences: Vec<String> = pairs.map(|pair| pair.sentence(results)).collect();
    if sentences.is_empty() {
        sentences = scaling::sentences(&all_measured(results));
    }
    if sentences.is_empty() { vec![missing_answer(results).to_owned()] } else { sentences }
}

/// Returns the scope of the answer.
pub fn limits(results: &Results) -> String {
    let text = "The result applies only to this model, batch and machine. ";
    if best_pairs(results).is_empty() {
        return format!("{text}It is about single training steps on resident data.");
    }
    format!(
        "{text}It is about single training steps of {} on resident data, with parameters in f32.",
        results.headline()
    )
}

/// Returns the reason why the report does not name the faster framework.
fn missing_answer(results: &Results) -> &'static str {
    let has =
        |framework: Framework| all_measured(results).iter().any(|m| m.case.backend.framework() == framework);
    match (has(Framework::Torch), has(Framework::Mlx)) {
        (true, true) => {
            "No training step was measured with both frameworks on one device, so the report does not say which is \
             faster."
        }
        (true, false) => "Only PyTorch was measured, so the report does not compare it with MLX.",
        (false, true) => "Only MLX was measured, so the report does not compare it with PyTorch.",
        (false, false) => "Nothing was measured, so there is no result.",
    }
}

/// Returns the other findings, the most general first.
pub fn findings(results: &Results) -> Vec<String> {
    let answered = best_pairs(results);
    let others = same_method_pairs(results.headline()).into_iter().filter(|pair| !answered.contains(pair));
    let mut all: Vec<String> = others
        .filter_map(|pair| Comparison::new(results, pair))
        .map(|comparison| comparison.sentence(results))
        .collect();
    all.extend(memory_use(results));
    all.extend(fastest_methods(results));
    all.extend(slow_compilers(results));
    all.extend(optimizers::sentences(results));
    if !answered.is_empty() {
        all.extend(scaling::sentences(&all_measured(results)));
    }
    all.extend(best_batches(results));
    all.extend(page_faults(results));
    all.extend(disturbed_cases(results));
    all
}

/// Compares the memory of both frameworks' eager f32 steps on each device, by the first metric that both have.
fn memory_use(results: &Results) -> Vec<String> {
    type Peak = fn(&Record) -> Option<u64>;
    let metrics: [(&str, Peak); 2] = [
        ("peak of the allocator", |record| record.peak_bytes),
        ("peak RSS of the process", |record| record.rss_peak_bytes),
    ];
    let compare = |backends: [BackendId; 2]| {
        metrics.iter().find_map(|(metric, peak)| {
            let mut peaks = backends.map(|backend| {
                let bytes = find_eager(results, backend).and_then(|m| peak(m.record));
                (bytes, backend.framework().label())
            });
            peaks.sort();
            let [(Some(less), light), (Some(more), heavy)] = peaks else { return None };
            let sizes = format!("{} and {} ({metric})", megabytes(less), megabytes(more));
            let relation = if (more as f64) < 1.05 * less as f64 {
                format!("{light} and {heavy} need about the same memory")
            } else {
                format!("{light} needs less memory than {heavy}")
            };
            Some(format!("On {}, {relation}: {sizes}.", backends[0].device()))
        })
    };
    rivals().filter_map(compare).collect()
}

/// Names the fastest method of each backend, if it is clearly faster than eager f32.
fn fastest_methods(results: &Results) -> Vec<String> {
    let sentence = |&backend: &BackendId| {
        let steps = fastest_first(results, backend);
        let eager = steps.iter().find(|m| m.case.method == EAGER)?;
        let best = steps.iter().find(|m| m.case.method != EAGER)?;
        if let Some(reason) = [eager, best].into_iter().find_map(disturbance) {
            return Some(format!("On {backend}, the report names no fastest method, because {reason}."));
        }
        let (speedup, method) = (best.speedup_over(eager), best.case.method);
        Some(if speedup.range[0] > RUN_TO_RUN {
            format!(
                "On {backend}, the fastest method is {method}: {} times the speed of eager f32 ({} from both 95 % CIs).",
                digits(speedup.value),
                range(speedup.range)
            )
        } else {
            format!(
                "On {backend}, no method is clearly faster than eager f32. The fastest is {method} with {:.2} times its speed.",
                speedup.value
            )
        })
    };
    BackendId::ALL.iter().filter_map(sentence).collect()
}

/// Names the compiled steps that are slower than the eager step.
fn slow_compilers(results: &Results) -> Vec<String> {
    let sentence = |m: Measured<'_>| {
        let precision = m.case.method.precision;
        let eager = find_measured(results, &Case { method: Method::eager(precision), ..m.case })?;
        let slowdown = eager.speedup_over(&m);
        let clear = slowdown.range[0] > 1.0 && slowdown.value > RUN_TO_RUN;
        (clear && [&m, &eager].into_iter().find_map(disturbance).is_none()).then(|| {
            format!(
                "Compilation makes a step slower on {}: {} takes {} times as long as with {} ({} from both 95 % CIs).",
                m.case.backend,
                m.case,
                digits(slowdown.value),
                eager.case.method,
                range(slowdown.range)
            )
        })
    };
    let compiled = |m: &Measured<'_>| {
        m.case.workload == Workload::TrainStep && m.case.method.variant == Variant::Compile
    };
    all_measured(results).into_iter().filter(compiled).filter_map(sentence).collect()
}

/// Names the fastest batch and method of each model and backend with more than one batch.
fn best_batches(results: &Results) -> Vec<String> {
    let measured = all_measured(results);
    let mut sweeps = batches(&measured);
    sweeps.sort_by(|a, b| b.fastest().speed().value.total_cmp(&a.fastest().speed().value));
    let mut seen = Vec::new();
    sweeps.retain(|sweep| {
        seen.push((sweep.model, sweep.backend));
        seen.iter().filter(|key| **key == (sweep.model, sweep.backend)).count() == 1
    });
    let sentence = |Sweep { model, backend, method, .. }: &Sweep<'_>, fastest: &Measured<'_>| {
        let (batch, speed) = (fastest.case.shape.batch(), speed(fastest.case.shape, fastest.median_ns));
        format!(
            "Among the measured batches, {model} trains fastest on {backend} at batch {batch} with {method}: {speed}."
        )
    };
    sweeps.iter().map(|sweep| sentence(sweep, sweep.fastest())).collect()
}

/// Returns the number of records with a share above `threshold`, and the record with the largest one.
fn above(
    results: &Results,
    share: fn(&Record) -> Option<f64>,
    threshold: f64,
) -> Option<(usize, &Record, f64)> {
    let shares = results.cases.iter().filter_map(|record| Some((record, share(record)?)));
    let above: Vec<(&Record, f64)> = shares.filter(|(_, share)| *share > threshold).collect();
    let (record, share) = above.iter().max_by(|a, b| a.1.total_cmp(&b.1))?;
    Some((above.len(), record, *share))
}

/// Reports cases whose time depends on the allocator.
fn page_faults(results: &Results) -> Option<String> {
    let threshold = memory::PAGE_FAULT_SHARE_THRESHOLD;
    let (cases, worst, share) = above(results, |record| record.page_fault_share, threshold)?;
    Some(format!(
        "Page faults take over {:.0} % of the time of {}, at most {:.0} % ({}). Such a time depends on earlier \
         allocations of the process.",
        100.0 * threshold,
        count(cases, "case"),
        100.0 * share,
        worst.id
    ))
}

/// Reports cases that other programs disturbed.
fn disturbed_cases(results: &Results) -> Option<String> {
    let threshold = interference::WAIT_THRESHOLD;
    let (cases, worst, share) = above(results, |record| record.cpu_wait_share, threshold)?;
    Some(format!(
        "Other programs disturbed {}: threads waited for a core for over {:.0} % of the time, at most {:.0} % ({}).",
        count(cases, "case"),
        100.0 * threshold,
        100.0 * share,
        worst.id
    ))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{interleaved, record, run};
    use super::*;

    /// Returns the answer for two training steps, interleaved if a ratio with its interval is set.
    fn answer_for(ratio: Option<[f64; 3]>, cpu_wait: f64) -> String {
        let ids = ["train-step/torch-cpu/f32/indicator-b16", "train-step/mlx-cpu/f32/indicator-b16"];
        let mut results = run(&[(ids[0], 500e6), (ids[1], 1500e6)]);
        results.cases[1].cpu_wait_share = Some(cpu_wait);
        results.interleaved =
            ratio.map(|[ratio, low, high]| interleaved(ids, ratio, [low, high])).into_iter().collect();
        answer(&results)[0].clone()
    }

    #[test]
    fn a_winner_needs_interleaved_rounds_or_a_large_difference() {
        let text = answer_for(Some([3.1, 2.5, 3.8]), 0.0);
        assert!(
            text.starts_with(
                "On the CPU, PyTorch trains indicator 3.10 times as fast as MLX (95 % CI 2.50 to 3.80"
            ),
            "{text}"
        );
        assert!(text.contains("3 interleaved rounds): 32.0 samples/s with f32 and 10.3"), "{text}");
        let text = answer_for(Some([0.5, 0.4, 0.625]), 0.0);
        assert!(
            text.contains("MLX trains indicator 2.00 times as fast as PyTorch (95 % CI 1.60 to 2.50"),
            "{text}"
        );
        let text = answer_for(Some([1.1, 0.9, 1.3]), 0.0);
        assert!(text.contains("neither framework is clearly faster"), "{text}");
        let text = answer_for(None, 0.0);
        // The intervals allow 2.45, and runs of the same code differ by 1.25.
        assert!(text.contains("PyTorch trains indicator 3.00 times as fast as MLX (2.45 to 3.67"), "{text}");
        assert!(text.contains("measured one after the other"), "{text}");
        let text = answer_for(None, 0.3);
        assert!(text.contains("are not compared") && text.contains("30 %"), "{text}");
        // The disturbed samples are not those of the rounds.
        let text = answer_for(Some([3.1, 2.5, 3.8]), 0.3);
        assert!(text.contains("3.10 times as fast as MLX"), "{text}");
    }

    #[test]
    fn the_answer_compares_the_fastest_step_of_each_framework() {
        let ids = ["train-step/torch-cpu/mixed/indicator-b16", "train-step/mlx-cpu/f32-tuned/indicator-b16"];
        let results = |ratio| run(&[(ids[0], 400e6), (ids[1], ratio * 400e6)]);
        let text = |ratio| answer(&results(ratio))[0].clone();
        let near = text(1.4);
        assert!(
            near.starts_with(
                "On the CPU, neither framework is clearly faster: PyTorch trains indicator at 40.0 samples/s with mixed"
            ),
            "{near}"
        );
        assert!(near.contains("To decide, run `./scripts/bench`."), "{near}");
        assert!(text(3.5).contains("3.50 times as fast as MLX"), "{}", text(3.5));
        assert!(text(0.3).contains("3.33 times as fast as PyTorch"), "{}", text(0.3));
        let mut results = results(3.5);
        results.interleaved = vec![interleaved(ids, 3.5, [3.2, 3.9])];
        assert!(answer(&results)[0].contains("95 % CI 3.20 to 3.90"), "{}", answer(&results)[0]);
    }

    #[test]
    fn a_compiler_that_makes_steps_slower_is_reported() {
        let text = |compiled| {
            findings(&run(&[
                ("train-step/torch-cpu/f32/indicator-b16", 500e6),
                ("train-step/torch-cpu/f32-compile/indicator-b16", compiled),
            ]))
            .join("\n")
        };
        let slower = "Compilation makes a step slower on torch-cpu";
        assert!(text(675e6).contains(slower), "{}", text(675e6));
        assert!(!text(500e6).contains(slower));
    }

    #[test]
    fn one_framework_alone_has_no_comparison() {
        let text = |ids: &[&str]| {
            let cases: Vec<(&str, f64)> = ids.iter().map(|id| (*id, 1e6)).collect();
            answer(&run(&cases))[0].clone()
        };
        let torch = "train-step/torch-cpu/f32/indicator-b16";
        assert!(text(&[torch]).contains("Only PyTorch was measured"));
        assert!(text(&[]).contains("Nothing was measured"));
        let apart = text(&[torch, "train-step/mlx-metal/f32/indicator-b16"]);
        assert!(apart.contains("both frameworks on one device"), "{apart:?}");
    }

    #[test]
    fn page_faults_are_reported_if_they_matter() {
        let mut few = record("train-step/torch-cpu/f32/indicator-b16", 500e6);
        few.page_fault_share = Some(0.01);
        let mut many = record("attention/torch-cpu/f32/b16-h8-t111-d32", 16e6);
        many.page_fault_share = Some(0.4);
        let text = |cases| findings(&Results { cases, ..run(&[]) }).join("\n");
        assert!(!text(vec![few.clone()]).contains("Page faults"));
        let both = text(vec![few, many]);
        assert!(both.contains("of the time of 1 case, at most 40 % (attention/"), "{both}");
    }

    #[test]
    fn the_fastest_method_is_named_if_it_is_clearly_faster() {
        let text = |eager, method: &str, ns| {
            let id = format!("train-step/torch-cpu/{method}/indicator-b16");
            findings(&run(&[("train-step/torch-cpu/f32/indicator-b16", eager), (&id, ns)])).join("\n")
        };
        let clear = text(500e6, "mixed-tuned", 100e6);
        assert!(clear.contains("the fastest method is mixed-tuned: 5.00 times"), "{clear}");
        let equal = text(100e6, "mixed", 100e6);
        assert!(equal.contains("no method is clearly faster than eager f32"), "{equal}");
        // Two runs of the same code can differ by this much.
        let near = text(100e6, "mixed", 70e6);
        assert!(near.contains("no method is clearly faster than eager f32"), "{near}");
    }
}
