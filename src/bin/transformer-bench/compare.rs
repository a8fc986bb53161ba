//! `scripts/compare`: is one side slower than the other?

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::{Args, ValueEnum};
use transformer_bench::compare::baseline_level;
use transformer_bench::compare::decision::{Estimate, THRESHOLD, Verdict};
use transformer_bench::compare::revisions::{self, Source, Spec};
use transformer_bench::compare::rounds::{self, Row};
use transformer_bench::compare::worker::{self, CheckOutcome, Side, Threads, Worker};
use transformer_bench::results::machine::Machine;
use transformer_bench::results::{self, RunModel, baseline};
use transformer_bench::statistics::midmean;
use transformer_bench::suite::{BackendId, Case, Framework, Set, custom_model, parse_filter};

use super::output::{Line, Report};

/// Says whether HEAD is slower than BASE, case by case, in a way that can block a merge.
///
/// BASE and HEAD are each a git revision, a saved baseline (baseline:NAME), executables
/// built elsewhere (dir:PATH), or the working tree (worktree, the default for HEAD).
/// Two that can run are interleaved, in fresh processes; the checkout stays as it is.
///
/// Exit codes: 0 no regression, 1 a regression, 2 wrong input, 3 not measured well enough.
#[derive(Args)]
#[command(after_help = "Examples:
  scripts/compare main                          the working tree against main
  scripts/compare v1.0 v1.1 'train-step/.*/f32/'
  scripts/compare baseline:nightly              now against a saved baseline
  scripts/compare --from --threshold 5          the last comparison by another threshold
  scripts/compare --backends torch-cpu mlx-cpu  which framework is faster
  scripts/compare worktree --env OMP_NUM_THREADS=1 --threads all
                                                what a setting brings")]
pub struct Arguments {
    /// The side that is compared with; with --backends the one whose backends are taken
    base: Option<String>,
    /// The side that is judged, or the filter
    head: Option<String>,
    /// A regular expression over ids: workload/backend/precision/shape
    filter: Option<String>,
    /// `same` means certainly within this many per cent
    #[arg(long, value_name = "PER CENT", default_value_t = 100.0 * THRESHOLD, allow_negative_numbers = true)]
    threshold: f64,
    /// Which cases: `compare` is true widths at batches whose steps are short
    #[arg(long, default_value = "compare", value_parser = |text: &str| text.parse::<Set>())]
    set: Set,
    /// Judge a finished comparison again, from its JSON (default: the last one), by another
    /// --threshold; nothing is measured
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "", conflicts_with_all = ["base", "backends", "env"])]
    from: Option<String>,
    /// Compare two backends of one side
    #[arg(long, num_args = 2, value_names = ["A", "B"], value_parser = |text: &str| text.parse::<BackendId>())]
    backends: Option<Vec<BackendId>>,
    /// An environment variable for HEAD alone
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// CPU backends on one pinned thread, or on all as a user's run; default: one, and all
    /// with --backends, --env or a baseline
    #[arg(long)]
    threads: Option<ThreadsArgument>,
    /// Stop after so many minutes; what is undecided then is inconclusive
    #[arg(long, value_name = "MINUTES", default_value_t = 30.0, allow_negative_numbers = true)]
    budget: f64,
    /// Fail with 3 where a case stays inconclusive
    #[arg(long)]
    strict: bool,
    /// Compare with a baseline although machine or versions differ; the result says so
    #[arg(long)]
    anyway: bool,
    /// Markdown, for a pull request
    #[arg(long, conflicts_with = "json")]
    markdown: bool,
    /// JSON on standard output
    #[arg(long)]
    json: bool,
}

/// Minutes: a year.
pub const LONGEST: f64 = 525_600.0;

#[derive(Clone, Copy, ValueEnum)]
enum ThreadsArgument {
    One,
    All,
}

/// Progress, beside the results.
fn say(line: &str) {
    eprintln!("{line}");
}

pub fn run(arguments: &Arguments) -> Result<u8> {
    ensure!(
        arguments.threshold.is_finite() && arguments.threshold > 0.0 && arguments.threshold <= 100.0,
        "--threshold {}: per cent, over 0 and up to 100",
        arguments.threshold
    );
    ensure!(
        arguments.budget > 0.0 && arguments.budget <= LONGEST,
        "--budget {}: minutes, over 0 and up to {LONGEST}",
        arguments.budget
    );
    if let Some(file) = &arguments.from {
        let report = again(file, arguments.threshold)?;
        super::show(&report.text(arguments.json, arguments.markdown))?;
        return Ok(report.exit_code(arguments.strict));
    }
    let spec = Spec::read(
        arguments.base.as_deref(),
        arguments.head.as_deref(),
        arguments.filter.as_deref(),
        arguments.backends.is_some(),
    )?;
    parse_filter(&spec.filter)?;
    let environment: Vec<(String, String)> = arguments
        .env
        .iter()
        .map(|text| {
            let (name, value) = text.split_once('=').with_context(|| format!("--env {text}: NAME=VALUE"))?;
            ensure!(!name.is_empty() && !text.contains('\0'), "--env {text}: NAME=VALUE");
            Ok((name.to_owned(), value.to_owned()))
        })
        .collect::<Result<_>>()?;
    if !environment.is_empty() {
        // What was found is kept beside what is there: damage is told before hours of measuring.
        results::env_effects(&results::folder())?;
    }
    let as_users = arguments.backends.is_some() || !environment.is_empty();
    let threads = match arguments.threads {
        Some(ThreadsArgument::One) => Threads::One,
        Some(ThreadsArgument::All) => Threads::All,
        None if as_users => Threads::All,
        None => Threads::One,
    };

    let report = match (&spec.base, &spec.head) {
        (Source::Past(base), Source::Past(head)) => {
            ensure!(environment.is_empty(), "--env needs a side that runs");
            two_pasts(arguments, &spec, &load(base)?, &load(head)?)?
        }
        (Source::Past(base), _) => against(arguments, &spec, &load(base)?, environment, false)?,
        (_, Source::Past(head)) => against(arguments, &spec, &load(head)?, environment, true)?,
        _ => interleaved(arguments, &spec, environment, threads)?,
    };
    super::show(&report.text(arguments.json, arguments.markdown))?;
    if !arguments.env.is_empty() && spec.base == spec.head && arguments.backends.is_none() {
        let found = report.settings(&arguments.env.join(" "), &Machine::read().commit);
        results::save_env_effects(&results::folder(), found)?;
    }
    let kept = results::folder().join("comparison.json");
    results::write_atomic(&kept, &serde_json::to_string_pretty(&report.json())?)?;
    Ok(report.exit_code(arguments.strict))
}

/// A finished comparison by another threshold; the last one where no file is named.
fn again(file: &str, threshold: f64) -> Result<Report> {
    let path = if file.is_empty() { results::folder().join("comparison.json") } else { file.into() };
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("{} could not be read: compare first, or name a file", path.display()))?;
    let damaged = || format!("{} is no comparison: it is what scripts/compare --json prints", path.display());
    let json = serde_json::from_str(&text).with_context(damaged)?;
    Report::again(&json, threshold).with_context(damaged)
}

/// When the budget is over, from now.
fn until_of(arguments: &Arguments) -> Instant {
    Instant::now() + Duration::from_secs_f64(60.0 * arguments.budget)
}

fn load(name: &str) -> Result<baseline::Baseline> {
    baseline::read(&baseline::root(), name, &Machine::read().slug())
}

fn nothing(spec: &Spec, set: Set) -> anyhow::Error {
    let hint = spec.filter_hint.clone().unwrap_or_default();
    anyhow!(
        "no case of the {set} set that can run here matches '{}'{hint}: cargo bench -- --list shows ids",
        spec.filter
    )
}

fn interleaved(
    arguments: &Arguments,
    spec: &Spec,
    environment: Vec<(String, String)>,
    threads: Threads,
) -> Result<Report> {
    let mut base = revisions::build(&spec.base, &say)?;
    let mut head = if spec.head == spec.base { base.clone() } else { revisions::build(&spec.head, &say)? };
    let mut notes: Vec<String> = revisions::harness_note(&spec.base, &spec.head).into_iter().collect();
    if !environment.is_empty() {
        head.name = format!("{} with {}", head.name, arguments.env.join(" "));
        head.environment = environment;
    }
    let (start, until) = (Instant::now(), until_of(arguments));
    let mut lines: Vec<Line> = Vec::new();
    let mut pairs: Vec<(Case, Case)> = if let Some(backends) = &arguments.backends {
        let (a, b) = (backends[0], backends[1]);
        base.name = a.to_string();
        head.name = b.to_string();
        let offered = base.cases(arguments.set, &spec.filter, until)?;
        let of = |backend| offered.iter().filter(move |c: &&Case| c.backend == backend);
        for (backend, present) in [(a, of(a).count()), (b, of(b).count())] {
            ensure!(present > 0, "{backend} has no such case here: cargo bench -- --test says why");
        }
        let twin = |case: &Case| Case { backend: b, ..*case };
        let both = of(a).filter(|c| of(b).any(|d| *d == twin(c)));
        lines
            .extend(of(a).filter(|c| !of(b).any(|d| *d == twin(c))).map(|c| Line::without(c, Verdict::Gone)));
        both.map(|c| (*c, twin(c))).collect()
    } else {
        let (old, new) = (
            base.cases(arguments.set, &spec.filter, until)?,
            head.cases(arguments.set, &spec.filter, until)?,
        );
        lines.extend(old.iter().filter(|c| !new.contains(c)).map(|c| Line::without(c, Verdict::Gone)));
        lines.extend(new.iter().filter(|c| !old.contains(c)).map(|c| Line::without(c, Verdict::New)));
        old.iter().filter(|c| new.contains(c)).map(|c| (*c, *c)).collect()
    };
    if threads == Threads::One {
        // Ranks on one core would wait for each other.
        let all = pairs.len();
        pairs.retain(|(case, _)| case.shape.ranks() == 1);
        let left = all - pairs.len();
        ensure!(
            left == 0 || !pairs.is_empty(),
            "{left} cases of several devices: --threads all compares them"
        );
        if left > 0 {
            notes.push(format!("{left} cases of several devices are left out: --threads all compares them"));
        }
    }
    if pairs.is_empty() && lines.is_empty() {
        return Err(nothing(spec, arguments.set));
    }
    let threshold = arguments.threshold / 100.0;
    let rule = rounds::rule(threshold, pairs.len());
    let mut rows: Vec<Row> = pairs.into_iter().map(|(a, b)| Row::new(a, b, rule)).collect();
    let sides = [base, head];
    notes.extend(prove(&sides, &mut rows, until)?);
    rounds::decide(&sides, &mut rows, threads, until, |round, open| {
        eprintln!("round {round}: {open} of the cases open, {:.0} s so far", start.elapsed().as_secs_f64());
    })?;
    if Instant::now() >= until {
        notes.push(format!("stopped at the budget of {} min", arguments.budget));
    }
    notes.extend(worker::pinning_note(threads).map(str::to_owned));
    let names = sides.map(|s| s.name);
    lines.extend(rows.iter().map(|row| Line::of(row, &names)));
    Ok(Report::new(names, lines, notes, arguments.threshold, start.elapsed()))
}

/// Has both sides prove the cases at their shapes, unless they have; what is wrong is not timed.
/// Returns a note for a side that can't.
fn prove(sides: &[Side; 2], rows: &mut [Row], until: Instant) -> Result<Option<String>> {
    let mut unable = None;
    for (index, side) in sides.iter().enumerate() {
        let mut workers: BTreeMap<Framework, Worker> = BTreeMap::new();
        for row in rows.iter_mut().filter(|row| row.failed.is_none()) {
            let case = if index == 0 { row.base } else { row.head };
            let framework = case.backend.framework();
            if !workers.get_mut(&framework).is_some_and(Worker::alive) {
                workers.insert(framework, Worker::start(side, framework, Threads::All)?.until(until));
            }
            let worker = workers.get_mut(&framework).context("just started")?;
            match worker.check(&case) {
                Ok(CheckOutcome::Wrong(text)) => row.failed = Some((index, text)),
                Ok(_) => {}
                // A revision from before proofs were asked for.
                Err(error) if error.to_string().contains("is no request") => {
                    unable =
                        Some(format!("{} is of a revision that proves nothing at these shapes", side.name));
                    break;
                }
                Err(error) => row.failed = Some((index, format!("parity could not be checked: {error:#}"))),
            }
        }
    }
    Ok(unable)
}

/// Differences that forbid comparing, or notes where the user wants it anyway.
fn comparable(base: &Machine, head: &Machine, anyway: bool) -> Result<Vec<String>> {
    let mut differences = base.differences(head);
    if base.dirty {
        differences
            .push(format!("dirty tree: the baseline was taken with uncommitted changes at {}", base.commit));
    }
    if differences.is_empty() {
        return Ok(Vec::new());
    }
    if anyway {
        return Ok(differences
            .into_iter()
            .map(|d| format!("compared anyway, although they differ: {d}"))
            .collect());
    }
    bail!("the two can't be compared (baseline / now; --anyway does): {}", differences.join("; "))
}

/// A baseline against a side that runs now.
fn against(
    arguments: &Arguments,
    spec: &Spec,
    past: &baseline::Baseline,
    environment: Vec<(String, String)>,
    reversed: bool,
) -> Result<Report> {
    ensure!(arguments.backends.is_none(), "--backends compares two backends of one side, without a baseline");
    let mut now = revisions::build(if reversed { &spec.base } else { &spec.head }, &say)?;
    now.environment = environment;
    let mut notes = comparable(&past.machine, &machine_of(&now, past)?, arguments.anyway)?;
    notes.push("a baseline is one process of another time: the band holds its wandering, and that between processes now".to_owned());
    let (both, mut lines) = shared(arguments, spec, past, &now, reversed)?;
    let (start, until) = (Instant::now(), until_of(arguments));
    let levels =
        baseline_level::levels(&now, &both, until, |round| say(&format!("process {round} of each backend")))?;
    for case in both {
        let id = case.to_string();
        let base = baseline_level::summarize(&past.case(&id).context("taken from the baseline")?.samples());
        lines.push(match (base, &levels[&id]) {
            (Some(base), Ok(head)) if head.len() >= 2 => {
                let (verdict, estimate) =
                    baseline_level::compare_with_baseline(&base, head, arguments.threshold / 100.0);
                let times = [base.level.exp(), midmean(head).exp()];
                if reversed {
                    let (verdict, estimate) = mirrored(verdict, estimate);
                    Line::judged(&case, verdict, estimate, [times[1], times[0]], head.len())
                } else {
                    Line::judged(&case, verdict, estimate, times, head.len())
                }
            }
            (_, Err(reason)) => Line::failed(&case, reason),
            _ => Line::without(&case, Verdict::Inconclusive),
        });
    }
    let mut names = [format!("baseline {}", past_name(spec)), now.name];
    if reversed {
        names.reverse();
    }
    Ok(Report::new(names, lines, notes, arguments.threshold, start.elapsed()))
}

/// The machine as the executables of a side see it, as far as the baseline's frameworks go.
fn machine_of(now: &Side, past: &baseline::Baseline) -> Result<Machine> {
    let mut machine: Option<Machine> = None;
    for &framework in now.executables.keys() {
        if !past.selections.iter().any(|s| s.framework == framework.id()) {
            continue;
        }
        let found = Worker::start(now, framework, Threads::All)?.machine()?;
        match &mut machine {
            None => machine = Some(found),
            Some(all) => all.add_versions(found.versions),
        }
    }
    machine.context("the baseline is of no framework that is built here")
}

/// The cases that a baseline and a side both have, and lines for those of one alone.
fn shared(
    arguments: &Arguments,
    spec: &Spec,
    past: &baseline::Baseline,
    now: &Side,
    reversed: bool,
) -> Result<(Vec<Case>, Vec<Line>)> {
    let (gone, new) = if reversed { (Verdict::New, Verdict::Gone) } else { (Verdict::Gone, Verdict::New) };
    if past.model.as_ref().map(RunModel::custom_model) != custom_model::custom_model() {
        match &past.model {
            Some(own) => bail!("the baseline is of {}: say {}", own.configuration.name, own.variables()),
            None => {
                bail!("the baseline is of the suite's own models: unset {}", custom_model::MODEL_VARIABLE)
            }
        }
    }
    // The baseline says which cases; the set of this run only names new ones.
    let filter = parse_filter(&spec.filter)?;
    let sets = past.selections.iter().filter_map(|s| s.set.parse::<Set>().ok());
    let set = sets.max().unwrap_or(arguments.set);
    let offered = now.cases(set, &spec.filter, until_of(arguments))?;
    let covered = |case: &Case| {
        past.selections.iter().any(|s| {
            s.framework == case.backend.framework().id()
                && parse_filter(&s.filter).is_ok_and(|f| f.is_match(&case.to_string()))
        })
    };
    let (mut both, mut lines) = (Vec::new(), Vec::new());
    for id in past.cases.iter().map(|kept| &kept.record.id) {
        if !filter.is_match(id) || past.case(id).is_none() {
            continue;
        }
        match offered.iter().find(|c| c.to_string() == *id) {
            Some(case) => both.push(*case),
            None => lines.push(Line::named(id, gone)),
        }
    }
    let fresh = offered.iter().filter(|c| covered(c) && past.case(&c.to_string()).is_none());
    lines.extend(fresh.map(|c| Line::without(c, new)));
    if both.is_empty() && lines.is_empty() {
        return Err(nothing(spec, set));
    }
    Ok((both, lines))
}

fn past_name(spec: &Spec) -> String {
    match (&spec.base, &spec.head) {
        (Source::Past(name), _) | (_, Source::Past(name)) => name.clone(),
        _ => String::new(),
    }
}

fn mirrored(verdict: Verdict, e: Estimate) -> (Verdict, Estimate) {
    let verdict = match verdict {
        Verdict::Slower => Verdict::Faster,
        Verdict::Faster => Verdict::Slower,
        other => other,
    };
    (verdict, Estimate { ratio: 1.0 / e.ratio, ci: [1.0 / e.ci[1], 1.0 / e.ci[0]] })
}

fn two_pasts(
    arguments: &Arguments,
    spec: &Spec,
    base: &baseline::Baseline,
    head: &baseline::Baseline,
) -> Result<Report> {
    let mut notes = comparable(&base.machine, &head.machine, arguments.anyway)?;
    notes.push("both are baselines, taken at different times: nothing was measured now".to_owned());
    let filter = parse_filter(&spec.filter)?;
    let mut lines: BTreeMap<String, Line> = BTreeMap::new();
    for kept in base.cases.iter().chain(&head.cases).filter(|k| filter.is_match(&k.record.id)) {
        let id = kept.record.id.clone();
        let (Some(a), Some(b)) = (base.case(&id), head.case(&id)) else {
            if kept.record.status == results::Status::Measured {
                let verdict = if base.case(&id).is_some() { Verdict::Gone } else { Verdict::New };
                lines.insert(id.clone(), Line::named(&id, verdict));
            }
            continue;
        };
        let case: Case = id.parse().map_err(anyhow::Error::msg)?;
        let line = match (baseline_level::summarize(&a.samples()), baseline_level::summarize(&b.samples())) {
            (Some(a), Some(b)) => {
                let (verdict, estimate) =
                    baseline_level::compare_baselines(&a, &b, arguments.threshold / 100.0);
                Line::judged(&case, verdict, estimate, [a.level.exp(), b.level.exp()], 1)
            }
            _ => Line::without(&case, Verdict::Inconclusive),
        };
        lines.insert(id, line);
    }
    if lines.is_empty() {
        return Err(nothing(spec, arguments.set));
    }
    let names = [&spec.base, &spec.head].map(|s| match s {
        Source::Past(name) => format!("baseline {name}"),
        _ => String::new(),
    });
    Ok(Report::new(names, lines.into_values().collect(), notes, arguments.threshold, Duration::ZERO))
}
