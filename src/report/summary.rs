//! The verdict in sentences, each with the figures that it stands on.

use super::tables::{bytes, digits, rate_text};
use super::{Sweep, all_measured, batches, best_pairs, find, measured, scaling};
use crate::results::{Record, Results};
use crate::suite::{BackendId, Case, Framework, Method, Precision, Variant, Workload};
use crate::{interference, memory};

/// Step times in nanoseconds: the median and its 95 % interval.
pub(super) type Figure = (f64, [f64; 2]);

fn figure(results: &Results, case: &Case) -> Option<Figure> {
    measured(find(results, case)).map(|(_, median, ci)| (median, ci))
}

/// How many times as fast `a` is as `b`, with the interval that both intervals allow.
pub(super) fn ratio(a: Figure, b: Figure) -> (f64, [f64; 2]) {
    (b.0 / a.0, [b.1[0] / a.1[1], b.1[1] / a.1[0]])
}

/// How far runs of the same code, one after the other, lie apart on a shared machine: 13 to 24 %
/// (src/compare/README.md). What differs by less was not seen.
const APART: f64 = 1.25;

/// What two cases' times say of which is faster.
enum Compared {
    /// Nothing, since one was disturbed.
    Held(String),
    /// The place of the faster, by how much, and the interval of that.
    Apart {
        first: usize,
        times: f64,
        range: [f64; 2],
        how: String,
    },
    Near {
        how: String,
    },
}

/// From rounds in turns; without them there is a winner only where the cases lie further apart than runs of the
/// same code.
fn compared(results: &Results, cases: [&Case; 2], figures: [Figure; 2]) -> Compared {
    if let Some(held) = cases.iter().find_map(|case| held_back(results, case)) {
        return Compared::Held(held);
    }
    let ids = cases.map(ToString::to_string);
    let turn = results.interleaved.iter().find(|t| [&t.base, &t.head] == [&ids[0], &ids[1]]);
    let (times, range) =
        turn.map_or_else(|| ratio(figures[0], figures[1]), |turn| (turn.ratio, turn.ratio_ci));
    let (first, times, range) =
        if times >= 1.0 { (0, times, range) } else { (1, 1.0 / times, [1.0 / range[1], 1.0 / range[0]]) };
    let [low, high] = range.map(digits);
    match turn {
        Some(turn) if range[0] > 1.0 => {
            let how = format!("99 % interval, {} rounds in turns", turn.rounds);
            Compared::Apart { first, times, range, how }
        }
        Some(turn) => {
            let how =
                format!("{low} to {high} times as fast; 99 % interval, {} rounds in turns", turn.rounds);
            Compared::Near { how }
        }
        None if range[0] > APART => {
            let apart = 100.0 * (APART - 1.0);
            let how = format!("one after the other; runs of the same code lie up to {apart:.0} % apart");
            Compared::Apart { first, times, range, how }
        }
        None => {
            let own = results.model.as_ref().map_or_else(String::new, |own| own.variables() + " ");
            // Cases of one recipe are compared by name; others by the turns with which a run ends.
            let command = if cases[0].method == cases[1].method {
                format!(
                    "./scripts/compare --set quick --backends {} {} '^{}/[^/]*/{}/{}$'",
                    cases[0].backend, cases[1].backend, cases[0].workload, cases[0].method, cases[0].shape
                )
            } else {
                "./scripts/bench".to_owned()
            };
            Compared::Near {
                how: format!("one after the other, which names no winner; `{own}{command}` does"),
            }
        }
    }
}

/// "A is 2.3 times as fast as B (2.1 to 2.5: how)", or both speeds.
fn faster(results: &Results, what: &str, cases: [&Case; 2], figures: [Figure; 2]) -> String {
    let names = cases.map(|case| case.backend.framework().names().0);
    let speeds = figures.map(|f| rate_text(cases[0].shape, f.0));
    match compared(results, cases, figures) {
        Compared::Held(why) => format!("{what}: nothing is concluded, since {why}"),
        Compared::Apart { first, times, range, how } => {
            let [low, high] = range.map(digits);
            let (second, times) = (1 - first, digits(times));
            format!(
                "{what}: {} is {times} times as fast as {} ({low} to {high}: {how}; {} against {})",
                names[first], names[second], speeds[first], speeds[second]
            )
        }
        Compared::Near { how } => {
            format!(
                "{what}: no clear difference, {} {}, {} {} ({how})",
                names[0], speeds[0], names[1], speeds[1]
            )
        }
    }
}

/// Why nothing should be concluded from a case.
fn held_back(results: &Results, case: &Case) -> Option<String> {
    let record = find(results, case).filter(|record| record.disturbed())?;
    let share = record.cpu_wait_share.unwrap_or(0.0);
    Some(format!("{} waited for a core for {:.0} % of its time", record.id, 100.0 * share))
}

/// The answer: of each device that both frameworks have, the fastest step of either, a line each. Where there
/// is none, what further devices bring; else why there is none.
pub fn answer(results: &Results) -> Vec<String> {
    let mut all: Vec<String> =
        best_pairs(results).into_iter().filter_map(|pair| best(results, pair)).collect();
    all.extend(of_devices(results));
    ended(if all.is_empty() { vec![inconclusive(results).to_owned()] } else { all })
}

/// What further devices bring, where no two frameworks stand against each other.
fn of_devices(results: &Results) -> Vec<String> {
    if best_pairs(results).is_empty() { scaling::speedup_summary(&all_measured(results)) } else { Vec::new() }
}

/// What must not be concluded from the answer.
pub fn limits(results: &Results) -> String {
    if !of_devices(results).is_empty() {
        return "It does not follow for another model, batch or link between the devices: these are training steps one \
                after the other on data that is there, each in the precision and recipe beside it."
            .to_owned();
    }
    format!(
        "It does not follow for another model, batch or machine, nor for parameters in bf16, which train otherwise: this is \
         {}, one training step after the other on data that is there, with parameters in f32.",
        results.headline()
    )
}

fn ended(sentences: Vec<String>) -> Vec<String> {
    sentences.into_iter().map(|s| if s.ends_with('.') { s } else { s + "." }).collect()
}

/// Why nothing can be said of which framework is faster.
fn inconclusive(results: &Results) -> &'static str {
    let has =
        |framework: Framework| all_measured(results).iter().any(|m| m.case.backend.framework() == framework);
    match (has(Framework::Torch), has(Framework::Mlx)) {
        (true, true) => {
            "No training step was measured with both frameworks on one device, so nothing can be concluded of which \
             is faster."
        }
        (true, false) => "Only PyTorch was measured, so nothing can be concluded about MLX.",
        (false, true) => "Only MLX was measured, so nothing can be concluded about PyTorch.",
        (false, false) => "Nothing was measured, so nothing can be concluded.",
    }
}

/// What else can be said, most asked first.
pub fn verdict(results: &Results) -> Vec<String> {
    let mut all = Vec::new();
    for &backend in BackendId::ALL {
        for rival in backend.counterparts().filter(|rival| backend < *rival) {
            all.extend(pair(results, [backend, rival]));
        }
    }
    all.extend(tips(results));
    all.extend(compiling(results));
    all.extend(scaling::sentences(&all_measured(results)));
    all.extend(sizes(results));
    all.extend(faulting(results));
    all.extend(disturbed(results));
    ended(all)
}

/// The fastest training steps of two frameworks on one device, whatever their recipes.
fn best(results: &Results, cases: [Case; 2]) -> Option<String> {
    let figures = [figure(results, &cases[0])?, figure(results, &cases[1])?];
    let place = format!("On {}", cases[0].backend.device());
    let said = compared(results, [&cases[0], &cases[1]], figures);
    let with = |i: usize| format!("{} with {}", rate_text(cases[i].shape, figures[i].0), cases[i].method);
    let name = |i: usize| cases[i].backend.framework().names().0;
    Some(match said {
        Compared::Held(why) => format!("{place} nothing is concluded, since {why}"),
        Compared::Apart { first, times, range, how } => {
            let second = 1 - first;
            format!(
                "{place} {} is {} times as fast as {}: {} against {} ({} to {}: {how})",
                name(first),
                digits(times),
                name(second),
                with(first),
                with(second),
                digits(range[0]),
                digits(range[1])
            )
        }
        Compared::Near { how } => {
            format!(
                "{place} neither framework is clearly faster: {} {}, {} {} ({how})",
                name(0),
                with(0),
                name(1),
                with(1)
            )
        }
    })
}

/// What can be said of two backends on one device.
fn pair(results: &Results, backends: [BackendId; 2]) -> Vec<String> {
    let mut all = speeds(results, backends);
    all.extend(memory_of(results, backends));
    all
}

fn speeds(results: &Results, [first, second]: [BackendId; 2]) -> Vec<String> {
    let (mut all, place) = (Vec::new(), first.device());
    // Whose training, where it is not the suite's own model's.
    let own = results.model.as_ref().map_or_else(String::new, |own| format!("{}: ", own.configuration.name));
    let answered = best_pairs(results);
    let rows = [
        (Workload::TrainStep, Method::eager(Precision::F32), "Training in f32"),
        (Workload::TrainStep, Method::tuned(Precision::F32), "Training in f32 with all optimisations"),
        (Workload::TrainStep, Method::eager(Precision::Mixed), "Training in mixed precision"),
        (
            Workload::TrainStep,
            Method::tuned(Precision::Mixed),
            "Training in mixed precision with all optimisations",
        ),
    ];
    for (workload, precision, what) in rows {
        let case = |backend| Case { workload, backend, method: precision, shape: results.headline() };
        let (a, b) = (case(first), case(second));
        // Those are the answer.
        if answered.contains(&[a, b]) {
            continue;
        }
        if let (Some(fa), Some(fb)) = (figure(results, &a), figure(results, &b)) {
            all.push(faster(results, &format!("{own}{what} on {place}"), [&a, &b], [fa, fb]));
        }
    }
    all
}

/// Reads one definition of a peak.
type Peak = fn(&Record) -> Option<u64>;

fn memory_of(results: &Results, backends: [BackendId; 2]) -> Option<String> {
    let case = |backend| Case {
        workload: Workload::TrainStep,
        backend,
        method: Method::eager(Precision::F32),
        shape: results.headline(),
    };
    let peak = |backend, of: Peak| measured(find(results, &case(backend))).and_then(|m| of(m.0));
    let place = backends[0].device();
    let names = backends.map(|backend| backend.framework().names().0);
    // One definition a sentence.
    let definitions: [(&str, Peak); 2] =
        [("peak of the allocator", |r| r.peak_bytes), ("resident peak of the process", |r| r.rss_peak_bytes)];
    definitions.into_iter().find_map(|(name, of)| {
        let [a, b] = backends.map(|backend| peak(backend, of));
        let (a, b) = (a?, b?);
        let (less, more) = if a <= b { (0, 1) } else { (1, 0) };
        let values = [a, b];
        let [less_text, more_text] = [less, more].map(|i| bytes(Some(values[i])).unwrap_or_default());
        Some(if (values[more] as f64) < 1.05 * values[less] as f64 {
            format!("Memory on {place} ({name}): no clear difference, {less_text} and {more_text}")
        } else {
            format!(
                "Memory on {place} ({name}): {} needs {less_text}, {} {more_text}",
                names[less], names[more]
            )
        })
    })
}

/// What pays most on each backend.
fn tips(results: &Results) -> Vec<String> {
    let mut all = Vec::new();
    for &backend in BackendId::ALL {
        let case = |precision| Case {
            workload: Workload::TrainStep,
            backend,
            method: precision,
            shape: results.headline(),
        };
        let Some(eager) = figure(results, &case(Method::eager(Precision::F32))) else { continue };
        let mut gains: Vec<(String, f64, [f64; 2])> = Vec::new();
        for m in all_measured(results) {
            if m.case.backend == backend
                && m.case.workload == Workload::TrainStep
                && m.case.shape == results.headline()
                && m.case.method != Method::eager(Precision::F32)
                && let Some(own) = figure(results, &m.case)
            {
                let (times, range) = ratio(own, eager);
                gains.push((m.case.method.to_string(), times, range));
            }
        }
        gains.sort_by(|a, b| b.1.total_cmp(&a.1));
        let Some((name, times, [low, high])) = gains.first() else { continue };
        let best = Case {
            method: name.parse().unwrap_or(Method::eager(Precision::F32)),
            ..case(Method::eager(Precision::F32))
        };
        if let Some(held) =
            [case(Method::eager(Precision::F32)), best].iter().find_map(|c| held_back(results, c))
        {
            all.push(format!("On {backend} no precision is named the best, since {held}"));
            continue;
        }
        all.push(if *low > APART {
            format!(
                "On {backend} the best precision is {name}: {} times the speed of eager f32 ({} to {})",
                digits(*times),
                digits(*low),
                digits(*high)
            )
        } else {
            format!("On {backend} no precision or optimisation is clearly faster than eager f32 (best: {name}, {}×)", digits(*times))
        });
    }
    all
}

/// Where the framework's compiler makes the training step slower than it is without.
fn compiling(results: &Results) -> Vec<String> {
    let measured = all_measured(results);
    let steps = measured.iter().filter(|m| m.case.workload == Workload::TrainStep);
    let compiled = steps.filter(|m| m.case.method.variant == Variant::Compile);
    compiled
        .filter_map(|m| {
            let eager = Case { method: Method::eager(m.case.method.precision), ..m.case };
            if [&m.case, &eager].iter().any(|case| held_back(results, case).is_some()) {
                return None;
            }
            let (times, [low, high]) = ratio(figure(results, &eager)?, figure(results, &m.case)?);
            (low > 1.0 && times > APART).then(|| {
                format!(
                    "Compiling loses on {}: {} takes {} times the time of {} ({} to {})",
                    m.case.backend,
                    m.case,
                    digits(times),
                    eager.method,
                    digits(low),
                    digits(high)
                )
            })
        })
        .collect()
}

/// The best batch and precision of each model and backend, where more than one batch was measured.
fn sizes(results: &Results) -> Vec<String> {
    let measured = all_measured(results);
    let mut best: Vec<(Sweep, (usize, f64))> = Vec::new();
    for sweep in batches(&measured) {
        let Some(most) = sweep.speeds.iter().copied().max_by(|a, b| a.1.total_cmp(&b.1)) else { continue };
        match best.iter_mut().find(|(s, _)| (s.model, s.backend) == (sweep.model, sweep.backend)) {
            Some(known) if known.1.1 < most.1 => *known = (sweep, most),
            Some(_) => {}
            None => best.push((sweep, most)),
        }
    }
    let line = |(sweep, (batch, speed)): (Sweep, (usize, f64))| {
        let speed = format!("{} {}", digits(speed), sweep.unit);
        format!(
            "Of the batches measured, {} trains fastest on {} at {batch}, in {}: {speed}",
            sweep.model, sweep.backend, sweep.precision
        )
    };
    best.into_iter().map(line).collect()
}

/// Cases whose time hangs on what the heap did before.
fn faulting(results: &Results) -> Option<String> {
    let much = |r: &&Record| r.page_fault_share.is_some_and(|share| share > memory::FAULT_SHARE_THRESHOLD);
    let mut cases: Vec<&Record> = results.cases.iter().filter(much).collect();
    cases.sort_by(|a, b| b.page_fault_share.unwrap_or(0.0).total_cmp(&a.page_fault_share.unwrap_or(0.0)));
    let most = cases.first()?;
    Some(format!(
        "Page faults take over {:.0} % of the time of {} cases, most of {} ({:.0} %): such a time depends on \
         what the process allocated before",
        100.0 * memory::FAULT_SHARE_THRESHOLD,
        cases.len(),
        most.id,
        100.0 * most.page_fault_share.unwrap_or(0.0)
    ))
}

/// That something else had the machine.
fn disturbed(results: &Results) -> Option<String> {
    let mut cases: Vec<&Record> = results.cases.iter().filter(|r| r.disturbed()).collect();
    let share = |r: &Record| r.cpu_wait_share.unwrap_or(0.0);
    cases.sort_by(|a, b| share(b).total_cmp(&share(a)));
    let most = cases.first()?;
    Some(format!(
        "Something else had the machine: in {} cases threads waited for a core for over {:.0} % of their time, most \
         in {} ({:.0} %)",
        cases.len(),
        100.0 * interference::WAIT_THRESHOLD,
        most.id,
        100.0 * share(most)
    ))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{record, turn_of};
    use super::*;
    use crate::results::machine::Machine;

    fn of(cases: &[(&str, f64)]) -> Vec<String> {
        let cases = cases.iter().map(|(id, median)| record(id, *median)).collect();
        verdict(&Results::new(Machine::default(), cases))
    }

    /// The verdict of two training steps, by turns where there were such.
    fn pair(turn: Option<[f64; 3]>, waiting: f64) -> String {
        let ids = ["train-step/torch-cpu/f32/indicator-b16", "train-step/mlx-cpu/f32/indicator-b16"];
        let mut cases = vec![record(ids[0], 500e6), record(ids[1], 1500e6)];
        cases[1].cpu_wait_share = Some(waiting);
        let mut results = Results::new(Machine::default(), cases);
        results.interleaved =
            turn.map(|[ratio, low, high]| turn_of(ids, ratio, [low, high])).into_iter().collect();
        answer(&results)[0].clone()
    }

    #[test]
    fn a_winner_is_named_from_rounds_in_turns_or_where_runs_lie_far_apart() {
        let said = pair(Some([3.1, 2.5, 3.8]), 0.0);
        assert!(
            said.starts_with("On the CPU PyTorch is 3.10 times as fast as MLX: 32.0 samples/s with f32"),
            "{said}"
        );
        assert!(said.contains("(2.50 to 3.80: 99 % interval, 3 rounds in turns)"), "{said}");
        let said = pair(Some([0.5, 0.4, 0.625]), 0.0);
        assert!(
            said.contains("MLX is 2.00 times as fast as PyTorch") && said.contains("(1.60 to 2.50"),
            "{said}"
        );
        assert!(pair(Some([1.1, 0.9, 1.3]), 0.0).contains("neither framework is clearly faster"));
        let said = pair(None, 0.0);
        // The intervals allow 2.45, and runs of the same code 1.25.
        assert!(said.contains("PyTorch is 3.00 times as fast as MLX"), "{said}");
        assert!(said.contains("(2.45 to 3.67: one after the other"), "{said}");
        let said = pair(Some([3.1, 2.5, 3.8]), 0.3);
        assert!(said.contains("nothing is concluded") && said.contains("30 %"), "{said}");
    }

    #[test]
    fn the_best_of_each_framework_stand_first() {
        let ids = ["train-step/torch-cpu/mixed/indicator-b16", "train-step/mlx-cpu/f32-tuned/indicator-b16"];
        let said = |times| {
            let cases = vec![record(ids[0], 400e6), record(ids[1], times * 400e6)];
            answer(&Results::new(Machine::default(), cases))[0].clone()
        };
        let near = said(1.4);
        assert!(
            near.starts_with(
                "On the CPU neither framework is clearly faster: PyTorch 40.0 samples/s with mixed, MLX"
            ),
            "{near}"
        );
        assert!(near.contains("names no winner; `./scripts/bench` does"), "{near}");
        assert!(said(3.5).contains("PyTorch is 3.50 times as fast as MLX"), "{}", said(3.5));
        assert!(said(0.3).contains("MLX is 3.33 times as fast as PyTorch"), "{}", said(0.3));
        let cases = vec![record(ids[0], 400e6), record(ids[1], 1400e6)];
        let mut results = Results::new(Machine::default(), cases);
        results.interleaved = vec![turn_of(ids, 3.5, [3.2, 3.9])];
        assert!(answer(&results)[0].contains("(3.20 to 3.90: 99 %"), "{}", answer(&results)[0]);
    }

    #[test]
    fn a_compiler_that_loses_is_told() {
        let said = |compiled| {
            of(&[
                ("train-step/torch-cpu/f32/indicator-b16", 500e6),
                ("train-step/torch-cpu/f32-compile/indicator-b16", compiled),
            ])
            .join("\n")
        };
        assert!(said(675e6).contains("Compiling loses on torch-cpu"), "{}", said(675e6));
        assert!(!said(500e6).contains("Compiling loses"));
    }

    #[test]
    fn one_framework_alone_concludes_nothing() {
        let said = |ids: &[&str]| {
            let cases = ids.iter().map(|id| record(id, 1e6)).collect();
            answer(&Results::new(Machine::default(), cases))[0].clone()
        };
        assert!(
            said(&["train-step/torch-cpu/f32/indicator-b16"]).contains("nothing can be concluded about MLX")
        );
        assert!(said(&[]).contains("Nothing was measured"));
        let apart =
            said(&["train-step/torch-cpu/f32/indicator-b16", "train-step/mlx-metal/f32/indicator-b16"]);
        assert!(apart.contains("both frameworks on one device"), "{apart:?}");
    }

    #[test]
    fn page_faults_are_told_where_they_matter() {
        let mut quiet = record("train-step/torch-cpu/f32/indicator-b16", 500e6);
        quiet.page_fault_share = Some(0.01);
        let mut much = record("attention/torch-cpu/f32/b16-h8-t111-d32", 16e6);
        much.page_fault_share = Some(0.4);
        let said = |cases| verdict(&Results::new(Machine::default(), cases));
        assert!(!said(vec![quiet.clone()]).iter().any(|s| s.contains("Page faults")));
        let both = said(vec![quiet, much]);
        assert!(
            both.iter().any(|s| s.contains("of 1 cases, most of attention") && s.contains("40 %")),
            "{both:?}"
        );
    }

    #[test]
    fn tips_pay_or_do_not() {
        let said = of(&[
            ("train-step/torch-cpu/f32/indicator-b16", 500e6),
            ("train-step/torch-cpu/mixed-tuned/indicator-b16", 100e6),
        ]);
        assert!(said.iter().any(|s| s.contains("best precision is mixed-tuned: 5.00 times")), "{said:?}");
        let said = of(&[
            ("train-step/torch-cpu/f32/indicator-b16", 100e6),
            ("train-step/torch-cpu/mixed/indicator-b16", 100e6),
        ]);
        assert!(said.iter().any(|s| s.contains("clearly faster than eager f32")), "{said:?}");
        // Two runs of the same code may lie as far apart.
        let said = of(&[
            ("train-step/torch-cpu/f32/indicator-b16", 100e6),
            ("train-step/torch-cpu/mixed/indicator-b16", 70e6),
        ]);
        assert!(said.iter().any(|s| s.contains("clearly faster than eager f32")), "{said:?}");
    }
}
