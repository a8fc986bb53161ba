//! Comparisons in which at least one side is a saved baseline.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use transformer_bench::compare::baseline_level::{self, BaselineLevel};
use transformer_bench::compare::builds;
use transformer_bench::compare::decision::Verdict;
use transformer_bench::compare::revisions::{Source, Spec};
use transformer_bench::compare::worker::{Side, Threads, Worker};
use transformer_bench::results::baseline::{self, Baseline, SavedCase};
use transformer_bench::results::machine::Machine;
use transformer_bench::results::{RunModel, Status};
use transformer_bench::statistics::midmean;
use transformer_bench::suite::{Case, Set, custom_model, parse_filter};

use super::compare_arguments::{Arguments, no_case};
use super::options::print_progress;
use super::output::{Line, Report};

fn load(name: &str) -> Result<Baseline> {
    baseline::read(&baseline::root(), name, &Machine::read().slug())
}

/// Returns notes about the differences between two machines.
///
/// # Errors
/// Returns an error if they differ and the user did not allow it.
fn check_machines(base: &Machine, head: &Machine, allow_mismatch: bool) -> Result<Vec<String>> {
    let mut differences = base.differences(head);
    if base.dirty {
        differences.push(format!("dirty tree: the baseline has uncommitted changes at {}", base.commit));
    }
    if !differences.is_empty() && !allow_mismatch {
        bail!(
            "the two differ (baseline / now; --allow-mismatch compares anyway): {}",
            differences.join("; ")
        );
    }
    Ok(differences.iter().map(|difference| format!("compared despite a difference: {difference}")).collect())
}

/// Compares a baseline, as the base, with a side that runs now.
///
/// # Errors
/// Returns an error if the baseline cannot be compared, or the side does not build or start.
pub fn compare_with_baseline(
    arguments: &Arguments,
    spec: &Spec,
    name: &str,
    head: &Source,
) -> Result<Report> {
    ensure!(arguments.backends.is_none(), "--backends compares two backends of one side, without a baseline");
    let base = load(name)?;
    check_model(&base)?;
    let mut side = builds::build(head, &print_progress)?;
    side.environment = arguments.env.clone();
    let machine = machine_of(&side, &base)?;
    let mut notes = check_machines(&base.machine, &machine, arguments.allow_mismatch)?;
    notes.push(
        "the interval covers drift within the baseline's process and differences between processes now"
            .to_owned(),
    );
    let (start, until) = (Instant::now(), Instant::now() + arguments.minutes);
    let (cases, mut lines) = shared_cases(arguments, spec, &base, &side, until)?;
    let progress = |round| print_progress(&format!("process {round} of each backend"));
    let levels = baseline_level::levels(&side, &cases, until, progress)?;
    for case in cases {
        let id = case.to_string();
        let saved = base.case(&id).context("taken from the baseline")?;
        lines.push(match (level_of(saved), &levels[&id]) {
            (Some(old), Ok(new)) if new.len() >= 2 => {
                let threshold = arguments.threshold / 100.0;
                let (verdict, estimate) = baseline_level::compare_with_baseline(&old, new, threshold);
                Line::judged(&case, verdict, estimate, [old.level.exp(), midmean(new).exp()], new.len())
            }
            (_, Err(reason)) => Line::failed(&case, reason),
            _ => Line::without(&case, Verdict::Inconclusive),
        });
    }
    let names = [format!("baseline {name}"), side.name];
    Ok(Report::new(names, lines, notes, arguments.threshold, start.elapsed()))
}

/// Returns the level of a case of a baseline, from its processes or else from the samples of one.
fn level_of(case: &SavedCase) -> Option<BaselineLevel> {
    let processes: Vec<f64> = case.record.process_ns.iter().map(|ns| 1e-9 * ns).collect();
    baseline_level::summarize_processes(&processes).or_else(|| baseline_level::summarize(&case.samples()))
}

/// Checks that this process and a baseline measure the same model.
fn check_model(base: &Baseline) -> Result<()> {
    match &base.model {
        model if model.as_ref().map(RunModel::custom_model) == custom_model::custom_model() => Ok(()),
        Some(own) => bail!("the baseline measured {}: set {}", own.configuration.name, own.variables()),
        None => bail!("the baseline measured the built-in models: unset {}", custom_model::MODEL_VARIABLE),
    }
}

/// Returns the machine as the executables of a side see it, for the baseline's frameworks.
fn machine_of(side: &Side, base: &Baseline) -> Result<Machine> {
    let mut machine: Option<Machine> = None;
    for &framework in side.executables.keys() {
        if !base.selections.iter().any(|selection| selection.framework == framework.id()) {
            continue;
        }
        let found = Worker::start(side, framework, Threads::All)?.machine()?;
        match &mut machine {
            None => machine = Some(found),
            Some(all) => all.add_versions(found.versions),
        }
    }
    machine.context("no framework of the baseline is built here")
}

/// Returns the cases that a baseline and a side both have, and lines for cases of only one of them.
fn shared_cases(
    arguments: &Arguments,
    spec: &Spec,
    base: &Baseline,
    side: &Side,
    until: Instant,
) -> Result<(Vec<Case>, Vec<Line>)> {
    // The baseline decides which cases are compared. Its largest set may add new ones.
    let filter = parse_filter(&spec.filter)?;
    let sets = base.selections.iter().filter_map(|selection| selection.set.parse::<Set>().ok());
    let set = sets.max().unwrap_or(arguments.set);
    let offered = side.cases(set, &spec.filter, until)?;
    let was_selected = |case: &Case| {
        base.selections.iter().any(|selection| {
            selection.framework == case.backend.framework().id()
                && parse_filter(&selection.filter).is_ok_and(|filter| filter.is_match(&case.to_string()))
        })
    };
    let (mut both, mut lines) = (Vec::new(), Vec::new());
    for id in base.cases.iter().map(|case| &case.record.id) {
        if !filter.is_match(id) || base.case(id).is_none() {
            continue;
        }
        match offered.iter().find(|case| case.to_string() == *id) {
            Some(case) => both.push(*case),
            None => lines.push(Line::named(id, Verdict::Removed)),
        }
    }
    let new = offered.iter().filter(|case| was_selected(case) && base.case(&case.to_string()).is_none());
    lines.extend(new.map(|case| Line::without(case, Verdict::New)));
    if both.is_empty() && lines.is_empty() {
        return Err(no_case(spec, set));
    }
    Ok((both, lines))
}

/// Compares two baselines without measuring.
///
/// # Errors
/// Returns an error if a baseline cannot be read, or the two cannot be compared.
pub fn compare_baselines(arguments: &Arguments, spec: &Spec, base: &str, head: &str) -> Result<Report> {
    ensure!(arguments.env.is_empty(), "--env needs a side that runs");
    let names = [base, head].map(|name| format!("baseline {name}"));
    let (base, head) = (load(base)?, load(head)?);
    let mut notes = check_machines(&base.machine, &head.machine, arguments.allow_mismatch)?;
    notes.push("both sides are baselines from different times: nothing was measured now".to_owned());
    let filter = parse_filter(&spec.filter)?;
    let mut lines: BTreeMap<String, Line> = BTreeMap::new();
    for record in base.cases.iter().chain(&head.cases).map(|case| &case.record) {
        let id = &record.id;
        if !filter.is_match(id) {
            continue;
        }
        let (Some(old), Some(new)) = (base.case(id), head.case(id)) else {
            if record.status == Status::Measured {
                let verdict = if base.case(id).is_some() { Verdict::Removed } else { Verdict::New };
                lines.insert(id.clone(), Line::named(id, verdict));
            }
            continue;
        };
        let case: Case = id.parse().map_err(anyhow::Error::msg)?;
        let levels = [old, new].map(level_of);
        let line = match levels {
            [Some(old), Some(new)] => {
                let threshold = arguments.threshold / 100.0;
                let (verdict, estimate) = baseline_level::compare_baselines(&old, &new, threshold);
                Line::judged(&case, verdict, estimate, [old.level.exp(), new.level.exp()], 1)
            }
            _ => Line::without(&case, Verdict::Inconclusive),
        };
        lines.insert(id.clone(), line);
    }
    if lines.is_empty() {
        return Err(no_case(spec, arguments.set));
    }
    let lines = lines.into_values().collect();
    Ok(Report::new(names, lines, notes, arguments.threshold, Duration::ZERO))
}
