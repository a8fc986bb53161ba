//! `scripts/compare`: a verdict for each case on whether HEAD is slower than BASE.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use transformer_bench::compare::builds;
use transformer_bench::compare::cores;
use transformer_bench::compare::decision::Verdict;
use transformer_bench::compare::revisions::{self, Source, Spec};
use transformer_bench::compare::rounds::{self, Failure, Row};
use transformer_bench::compare::worker::{self, CheckOutcome, Side, Threads, Worker};
use transformer_bench::files;
use transformer_bench::installation::command;
use transformer_bench::results;
use transformer_bench::results::machine::Machine;
use transformer_bench::suite::{BackendId, Case, Framework};
use transformer_bench::text;

use super::bisect;
use super::compare_arguments::{Arguments, no_case};
use super::compare_baselines::{compare_baselines, compare_with_baseline};
use super::options::print_progress;
use super::output::{Line, Report};

/// Compares, prints the result and saves it. Returns the exit code.
///
/// # Errors
/// Returns an error if the input is wrong, or a side does not build or start.
pub fn run(arguments: &Arguments) -> Result<u8> {
    if let Some((sides, filter)) = arguments.bisected()? {
        return bisect::run(arguments, &sides, &filter);
    }
    let Some(spec) = arguments.spec()? else {
        return arguments.print(&reevaluate(arguments.from.clone().flatten(), arguments.threshold)?);
    };
    let folder = results::folder();
    if !arguments.env.is_empty() {
        // The effects are added to this file: a damaged one must be reported before hours of measuring.
        results::env_effects(&folder)?;
    }
    let report = match (&spec.base, &spec.head) {
        (Source::Baseline(base), Source::Baseline(head)) => compare_baselines(arguments, &spec, base, head)?,
        (Source::Baseline(base), head) => compare_with_baseline(arguments, &spec, base, head)?,
        (base, Source::Baseline(head)) => compare_with_baseline(arguments, &spec, head, base)?.mirrored(),
        _ => interleaved(arguments, &spec)?,
    };
    let code = arguments.print(&report)?;
    if !arguments.env.is_empty() && spec.base == spec.head && arguments.backends.is_none() {
        let effects = report.env_effects(&arguments.variables(), &Machine::read().commit);
        results::save_env_effects(&folder, effects)?;
    }
    save(&report)?;
    Ok(code)
}

/// Saves a comparison as the last one, for `--from`.
///
/// # Errors
/// Returns an error if the file cannot be written.
pub fn save(report: &Report) -> Result<()> {
    let path = results::folder().join("comparison.json");
    files::write_atomic(&path, &serde_json::to_string_pretty(&report.json())?)
}

/// Reads a finished comparison, the last one by default, and applies another threshold to it.
fn reevaluate(file: Option<PathBuf>, threshold: f64) -> Result<Report> {
    let path = file.unwrap_or_else(|| results::folder().join("comparison.json"));
    let text =
        files::read_text(&path).map_err(|error| anyhow!("{error:#}: compare first, or name a file"))?;
    let damaged = || format!("{} does not contain what {} --json prints", path.display(), command("compare"));
    let json = text::parse_json(&text).with_context(damaged)?;
    Report::reevaluate(json, threshold).with_context(damaged)
}

/// Compares two sides that can both run.
fn interleaved(arguments: &Arguments, spec: &Spec) -> Result<Report> {
    let base = builds::build(&spec.base, &print_progress)?;
    let mut head =
        if spec.head == spec.base { base.clone() } else { builds::build(&spec.head, &print_progress)? };
    if !arguments.env.is_empty() {
        head.name = format!("{} with {}", head.name, arguments.variables());
        head.environment = arguments.env.clone();
    }
    let mut sides = [base, head];
    for (side, backend) in sides.iter_mut().zip(arguments.backends.iter().flatten()) {
        side.name = backend.to_string();
    }
    compare_sides(arguments, spec, sides)
}

/// Compares two sides that are built.
///
/// # Errors
/// Returns an error if the filter selects no case, if a process does not start, or if the user interrupts.
pub fn compare_sides(arguments: &Arguments, spec: &Spec, sides: [Side; 2]) -> Result<Report> {
    let mut notes: Vec<String> = revisions::harness_note(&spec.base, &spec.head).into_iter().collect();
    let start = Instant::now();
    let until = start + arguments.minutes;
    let threads = arguments.threads();
    let (mut pairs, mut lines) = pair_cases(arguments, spec, &sides, until)?;
    if threads == Threads::One {
        notes.extend(drop_multi_device(&mut pairs)?);
        if !cores::can_pin() && spec.filter.is_empty() {
            let note = drop_cpu_cases(&mut pairs);
            note.iter().for_each(|note| eprintln!("compare: {note}"));
            notes.extend(note);
        }
    }
    if pairs.is_empty() && lines.is_empty() {
        return Err(no_case(spec, arguments.set));
    }
    let rule = rounds::rule(arguments.threshold / 100.0, pairs.len());
    let mut rows: Vec<Row> = pairs.into_iter().map(|[base, head]| Row::new(base, head, rule)).collect();
    notes.extend(check_parity(&sides, &mut rows, until)?);
    rounds::decide(&sides, &mut rows, threads, until, |round, open| {
        eprintln!("round {round}: {open} undecided cases, {:.0} s so far", start.elapsed().as_secs_f64());
    })?;
    if Instant::now() >= until {
        let minutes = arguments.minutes.as_secs_f64() / 60.0;
        notes.push(format!("stopped after {minutes} min (--minutes)"));
    }
    notes.extend(worker::pinning_note(threads).map(str::to_owned));
    notes.extend(library_note(&sides, &rows, until));
    let names = sides.map(|side| side.name);
    lines.extend(rows.iter().map(|row| Line::from_row(row, &names)));
    Ok(Report::new(names, lines, notes, arguments.threshold, start.elapsed()))
}

/// Returns the pairs of cases to compare, and lines for the cases that only one side has.
fn pair_cases(
    arguments: &Arguments,
    spec: &Spec,
    sides: &[Side; 2],
    until: Instant,
) -> Result<(Vec<[Case; 2]>, Vec<Line>)> {
    let mut base = sides[0].cases(arguments.set, &spec.filter, until)?;
    let Some(backends) = &arguments.backends else {
        let head = sides[1].cases(arguments.set, &spec.filter, until)?;
        let mut lines = lines_without(&base, &head, Verdict::Removed);
        lines.extend(lines_without(&head, &base, Verdict::New));
        base.retain(|case| head.contains(case));
        return Ok((base.into_iter().map(|case| [case; 2]).collect(), lines));
    };
    let select = |backend: BackendId| -> Result<Vec<Case>> {
        let found: Vec<Case> = base.iter().filter(|case| case.backend == backend).copied().collect();
        ensure!(!found.is_empty(), "{backend} has no such case here: {} shows the reason", command("bench"));
        Ok(found)
    };
    let (first, second) = (select(backends[0])?, select(backends[1])?);
    let counterpart = |case: &Case| Case { backend: backends[1], ..*case };
    let (both, only_first): (Vec<Case>, Vec<Case>) =
        first.into_iter().partition(|case| second.contains(&counterpart(case)));
    let pairs = both.iter().map(|case| [*case, counterpart(case)]).collect();
    Ok((pairs, lines_without(&only_first, &[], Verdict::Removed)))
}

/// Returns a line for each case that `others` does not have.
fn lines_without(cases: &[Case], others: &[Case], verdict: Verdict) -> Vec<Line> {
    cases.iter().filter(|case| !others.contains(case)).map(|case| Line::without(case, verdict)).collect()
}

/// Removes cases of several devices: their ranks would wait for each other on one core. Returns a note.
fn drop_multi_device(pairs: &mut Vec<[Case; 2]>) -> Result<Option<String>> {
    let all = pairs.len();
    pairs.retain(|[case, _]| case.shape.ranks() == 1);
    let dropped = all - pairs.len();
    let note = format!("cases on several devices need --threads all: {dropped} left out");
    ensure!(dropped == 0 || !pairs.is_empty(), "{note}");
    Ok((dropped > 0).then_some(note))
}

/// Removes the cases of CPU backends if others remain. Returns a note.
fn drop_cpu_cases(pairs: &mut Vec<[Case; 2]>) -> Option<String> {
    let all = pairs.len();
    if pairs.iter().any(|[case, _]| !case.backend.is_cpu()) {
        pairs.retain(|[case, _]| !case.backend.is_cpu());
    }
    let dropped = all - pairs.len();
    let note = || {
        format!(
            "{dropped} CPU cases left out: this system does not pin processes to cores, so most would stay inconclusive. \
             The filter '-cpu/' selects them"
        )
    };
    (dropped > 0).then(note)
}

/// Checks each side's cases at their own shapes, unless a saved check exists. Cases that fail are not timed.
///
/// Returns a note if a side cannot check.
fn check_parity(sides: &[Side; 2], rows: &mut [Row], until: Instant) -> Result<Option<String>> {
    let mut note = None;
    for (index, side) in sides.iter().enumerate() {
        let mut workers: BTreeMap<Framework, Worker> = BTreeMap::new();
        for row in rows.iter_mut().filter(|row| row.failed.is_none()) {
            let case = if index == 0 { row.base } else { row.head };
            let framework = case.backend.framework();
            if !workers.get_mut(&framework).is_some_and(Worker::is_alive) {
                workers.insert(framework, Worker::start(side, framework, Threads::All)?.until(until));
            }
            let worker = workers.get_mut(&framework).context("just started")?;
            match worker.check(&case) {
                Ok(CheckOutcome::Wrong(reason)) => {
                    row.failed = Some(Failure { side: index, reason, wrong_steps: true });
                }
                Ok(_) => {}
                // Early revisions do not know this request.
                Err(error) if worker::is_unknown_request(&error) => {
                    note = Some(format!(
                        "{} can't check its cases at these shapes: it is too old, or in Python",
                        side.name
                    ));
                    break;
                }
                Err(error) => {
                    let reason = format!("parity could not be checked: {error:#}");
                    row.failed = Some(Failure { side: index, reason, wrong_steps: false });
                }
            }
        }
    }
    Ok(note)
}

/// Returns a note that lists where the libraries and settings of the two sides differ, besides the framework itself.
///
/// Returns `None` if nothing differs, or if a side is too old to describe itself.
fn library_note(sides: &[Side; 2], rows: &[Row], until: Instant) -> Option<String> {
    let frameworks: BTreeSet<Framework> = rows.iter().map(|row| row.base.backend.framework()).collect();
    let mut all = Vec::new();
    for framework in
        frameworks.into_iter().filter(|f| sides[0].executables.get(f) != sides[1].executables.get(f))
    {
        let describe = |side| Worker::start(side, framework, Threads::All)?.until(until).machine();
        let (base, head) = (describe(&sides[0]).ok()?, describe(&sides[1]).ok()?);
        let release = format!("{}:", framework.label());
        all.extend(
            base.differences(&head).into_iter().filter(|difference| !difference.starts_with(&release)),
        );
    }
    all.dedup();
    (!all.is_empty()).then(|| format!("these differ too (base / head): {}", all.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_cases_are_left_out_only_if_others_remain() {
        let pairs =
            |ids: &[&str]| -> Vec<[Case; 2]> { ids.iter().map(|id| [id.parse().unwrap(); 2]).collect() };
        let (cpu, gpu) = ("train-step/torch-cpu/f32/indicator-b1", "train-step/torch-mps/f32/indicator-b16");
        let mut both = pairs(&[cpu, gpu, cpu]);
        let note = drop_cpu_cases(&mut both).unwrap();
        assert!(note.starts_with("2 CPU cases left out") && note.contains("'-cpu/'"), "{note}");
        assert_eq!(both, pairs(&[gpu]));
        for ids in [[gpu], [cpu]] {
            let mut single = pairs(&ids);
            assert_eq!(drop_cpu_cases(&mut single), None);
            assert_eq!(single, pairs(&ids));
        }
    }
}
