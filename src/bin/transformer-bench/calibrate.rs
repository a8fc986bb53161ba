//! `scripts/calibrate`: how often comparisons are wrong on this machine.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use statrs::distribution::{Beta, ContinuousCDF};
use transformer_bench::compare::cores::run_pinned;
use transformer_bench::compare::decision::{Rule, THRESHOLD, Verdict};
use transformer_bench::compare::rounds::{self, Row};
use transformer_bench::compare::signals::{self, check_interrupted};
use transformer_bench::compare::worker::{Side, Threads, Worker};
use transformer_bench::files;
use transformer_bench::installation;
use transformer_bench::report::publish;
use transformer_bench::results;
use transformer_bench::results::machine::Machine;
use transformer_bench::statistics::{lower_quartile, median};
use transformer_bench::suite::{Case, Framework, Set};

use super::options::{self, Executables};

/// Measures how often comparisons are wrong on this machine.
///
/// It compares the suite with itself, and with copies that extra arithmetic slows down by 1, 2, 5 and 10 %. The default
/// threshold applies, except for 1 %, where it is 1 %. A third of the comparisons run under load on every core.
/// Criterion's own comparison of two runs of the same code is counted too.
#[derive(Args)]
#[command(after_help = "Examples:
  scripts/calibrate --minutes 60
  scripts/calibrate --minutes 60 --write   updates the table in src/compare/README.md
  scripts/calibrate --minutes 30 --power-curve --write && scripts/publish")]
pub struct Arguments {
    /// Stop after this many minutes
    #[arg(long, default_value = "30", value_parser = options::minutes, allow_negative_numbers = true)]
    minutes: Duration,
    /// Regular expression over ids (workload/backend/precision/shape)
    #[arg(default_value = "")]
    filter: String,
    /// Set of cases
    #[arg(long, default_value = Set::Smoke.id(), value_parser = options::set())]
    set: Set,
    #[command(flatten)]
    executables: Executables,
    /// Number of cases per comparison
    #[arg(long, default_value_t = 12)]
    cases: usize,
    /// Compare only equal sides (A/A)
    #[arg(long)]
    a_a: bool,
    /// Measure only the power curve: slowdowns from 0 to 10 % with the default threshold
    #[arg(long, conflicts_with = "a_a")]
    power_curve: bool,
    /// Update the table in src/compare/README.md
    #[arg(long)]
    write: bool,
    /// Write only the rounds of one A/A comparison to FILE: the noise that tests replay (src/compare/noise/)
    #[arg(long, value_name = "FILE", value_parser = options::path())]
    #[arg(conflicts_with_all = ["minutes", "a_a", "write"])]
    record: Option<PathBuf>,
}

impl Arguments {
    /// Checks the options and the filter.
    ///
    /// # Errors
    /// Returns an error if a number is 0, or if the filter is invalid or matches no case.
    pub fn check(&self) -> Result<()> {
        ensure!(self.cases > 0, "--cases must be at least 1");
        super::list::select(self.set, &self.filter, None).map(drop)
    }
}

/// A comparison to try.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
struct Scenario {
    /// Extra work of the head as a share of its step.
    slowdown: f64,
    loaded: bool,
    threshold: f64,
}

const fn scenario(slowdown: f64, loaded: bool, threshold: f64) -> Scenario {
    Scenario { slowdown, loaded, threshold }
}

/// The threshold at which a slowdown of one percent can be found.
const FINE_THRESHOLD: f64 = 0.01;

/// The scenarios in their order. Every other one has equal sides.
const SCENARIOS: [Scenario; 18] = [
    scenario(0.0, false, THRESHOLD),
    scenario(0.02, false, THRESHOLD),
    scenario(0.0, true, THRESHOLD),
    scenario(0.05, false, THRESHOLD),
    scenario(0.0, false, THRESHOLD),
    scenario(0.02, true, THRESHOLD),
    scenario(0.0, false, FINE_THRESHOLD),
    scenario(0.10, false, THRESHOLD),
    scenario(0.0, true, THRESHOLD),
    scenario(0.01, false, FINE_THRESHOLD),
    scenario(0.0, false, THRESHOLD),
    scenario(0.02, false, THRESHOLD),
    scenario(0.0, true, THRESHOLD),
    scenario(0.05, true, THRESHOLD),
    scenario(0.0, false, THRESHOLD),
    scenario(0.10, true, THRESHOLD),
    scenario(0.0, false, THRESHOLD),
    scenario(0.01, true, FINE_THRESHOLD),
];

/// The slowdowns of the power curve, which are closer together near the threshold.
const POWER_CURVE: [f64; 7] = [0.0, 0.01, 0.015, 0.02, 0.03, 0.05, 0.10];

/// The results of a scenario.
#[derive(Default)]
struct Tally {
    comparisons: u64,
    slower: u64,
    faster: u64,
    inconclusive: u64,
    equivalent: u64,
    /// Measured ratios minus one, which show whether the extra work had its intended size.
    excess: Vec<f64>,
    seconds: f64,
}

/// Changes that Criterion's own comparison reported between two runs of the same code.
#[derive(Default)]
struct CriterionTally {
    comparisons: u64,
    changes: u64,
}

/// Threads that load every core at random times until this is dropped.
struct BackgroundLoad(Arc<AtomicBool>);

impl BackgroundLoad {
    fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        for index in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                let mut random = ChaCha8Rng::seed_from_u64(index as u64);
                while !stop.load(Ordering::Relaxed) {
                    let busy = Instant::now() + Duration::from_millis(u64::from(random.next_u32() % 300));
                    while Instant::now() < busy {
                        std::hint::spin_loop();
                    }
                    std::thread::sleep(Duration::from_millis(u64::from(random.next_u32() % 300)));
                }
            });
        }
        Self(stop)
    }
}

impl Drop for BackgroundLoad {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs scenarios until the time is over, then prints the table and writes it on request.
///
/// # Errors
/// Returns an error if the input is wrong or a comparison fails.
pub fn run(arguments: &Arguments) -> Result<()> {
    installation::check_checkout("this command")?;
    arguments.check()?;
    let side = arguments.executables.build()?;
    let mut cases =
        side.cases(arguments.set, &arguments.filter, Instant::now() + Duration::from_secs(600))?;
    // Ranks would share one core.
    cases.retain(|case| case.shape.ranks() == 1);
    ensure!(!cases.is_empty(), "no case matches '{}'", arguments.filter);

    let mut random = ChaCha8Rng::seed_from_u64(std::process::id().into());
    if let Some(path) = &arguments.record {
        return record_noise(&side, &sample_cases(&cases, arguments.cases, &mut random), path);
    }
    let mut tallies = Vec::new();
    let mut criterion = CriterionTally::default();
    match run_scenarios(arguments, &side, &cases, &mut random, &mut tallies, &mut criterion) {
        // The results so far are still valid.
        Err(_) if signals::interrupted() => {}
        done => done?,
    }
    tallies.retain(|(_, tally)| tally.comparisons > 0);
    tallies.sort_by(|a, b| a.0.partial_cmp(&b.0).expect("numbers"));
    let table = table(&tallies, &criterion);
    super::show(&table)?;
    if !arguments.write {
        return Ok(());
    }
    ensure!(!tallies.is_empty(), "nothing was compared, so nothing was written: allow more --minutes");
    let name = if arguments.power_curve { "power" } else { "calibrate" };
    let page = Path::new("src/compare/README.md");
    let text =
        std::fs::read_to_string(page).with_context(|| format!("{} could not be read", page.display()))?;
    files::write_atomic(page, &publish::replace_block(&text, name, &table)?)
}

/// Runs scenarios in a cycle until the time is over.
fn run_scenarios(
    arguments: &Arguments,
    side: &Side,
    cases: &[Case],
    random: &mut ChaCha8Rng,
    tallies: &mut Vec<(Scenario, Tally)>,
    criterion: &mut CriterionTally,
) -> Result<()> {
    let scenarios: Vec<Scenario> = if arguments.power_curve {
        let both = |&slowdown: &f64| [false, true].map(|loaded| scenario(slowdown, loaded, THRESHOLD));
        POWER_CURVE.iter().flat_map(both).collect()
    } else {
        SCENARIOS.into_iter().filter(|scenario| !arguments.a_a || scenario.slowdown == 0.0).collect()
    };
    let start = Instant::now();
    for (index, &scenario) in scenarios.iter().cycle().enumerate() {
        if start.elapsed() >= arguments.minutes {
            break;
        }
        let chosen = sample_cases(cases, arguments.cases, random);
        let known = tallies.iter().position(|(other, _)| *other == scenario);
        let slot = known.unwrap_or(tallies.len());
        if known.is_none() {
            tallies.push((scenario, Tally::default()));
        }
        run_scenario(side, scenario, &chosen, &mut tallies[slot].1)?;
        if index % 3 == 1 && !arguments.power_curve {
            for case in &chosen[..2.min(chosen.len())] {
                if let Some(changed) = criterion_reports_change(side, case)? {
                    criterion.comparisons += 1;
                    criterion.changes += u64::from(changed);
                }
            }
        }
        if std::io::stderr().is_terminal() || index % 4 == 3 {
            let minutes = start.elapsed().as_secs_f64() / 60.0;
            let comparisons: u64 = tallies.iter().map(|(_, tally)| tally.comparisons).sum();
            eprintln!("{minutes:.0} min: {comparisons} comparisons");
        }
    }
    Ok(())
}

/// Returns random cases without repetition.
fn sample_cases(cases: &[Case], count: usize, random: &mut ChaCha8Rng) -> Vec<Case> {
    let mut left = cases.to_vec();
    (0..count.min(left.len())).map(|_| left.swap_remove(random.next_u32() as usize % left.len())).collect()
}

/// Writes the rounds of equal sides as logs of step times in units of 0.001, relative to the round's first.
fn record_noise(side: &Side, cases: &[Case], path: &Path) -> Result<()> {
    // This rule never decides.
    let rule = Rule { threshold: 0.0, cases: 1_000_000, max_rounds: 24, precision: None };
    let mut rows: Vec<Row> = cases.iter().map(|c| Row::new(*c, *c, rule)).collect();
    let sides = [side.clone(), side.clone()];
    let until = Instant::now() + Duration::from_secs(3600);
    rounds::decide(&sides, &mut rows, Threads::One, until, |round, _| eprintln!("round {round}"))?;
    let mut text = format!(
        "# Log step times of pairs of blocks in units of 0.001, with the same program on both sides.\n\
         # One line per round (fresh processes), base and head alternating. One heading per case.\n\
         # Recorded by scripts/calibrate --record on {}.\n",
        Machine::read().slug()
    );
    for row in &rows {
        text.push_str(&format!("# {}\n", row.base));
        for pairs in &row.rounds {
            let relative = |time: f64| format!("{:.0}", 1e3 * (time / pairs[0].0).ln());
            let line: Vec<String> = pairs.iter().flat_map(|p| [relative(p.0), relative(p.1)]).collect();
            text.push_str(&format!("{}\n", line.join(" ")));
        }
    }
    files::write_atomic(path, &text)
}

/// Compares the side with a slowed copy of itself.
fn run_scenario(side: &Side, scenario: Scenario, cases: &[Case], tally: &mut Tally) -> Result<()> {
    let mut head = side.clone();
    head.name = "slowed".to_owned();
    if scenario.slowdown > 0.0 {
        head.environment.push((
            "TRANSFORMER_BENCH_EXTRA_WORK".to_owned(),
            run_pinned(|| extra_work(side, scenario.slowdown, cases))?,
        ));
    }
    let rule = rounds::rule(scenario.threshold, cases.len());
    let mut rows: Vec<Row> = cases.iter().map(|c| Row::new(*c, *c, rule)).collect();
    let _load = scenario.loaded.then(BackgroundLoad::start);
    let start = Instant::now();
    rounds::decide(
        &[side.clone(), head],
        &mut rows,
        Threads::One,
        start + Duration::from_secs(3600),
        |_, _| (),
    )?;
    tally.seconds += start.elapsed().as_secs_f64();
    for row in rows {
        let verdict = row.verdict().unwrap_or(Verdict::Inconclusive);
        if let Some(failure) = &row.failed {
            bail!("{} failed: {}", row.base, failure.reason);
        }
        tally.comparisons += 1;
        match verdict {
            Verdict::Slower => tally.slower += 1,
            Verdict::Faster => tally.faster += 1,
            Verdict::Equivalent => tally.equivalent += 1,
            _ => tally.inconclusive += 1,
        }
        let expected = if scenario.slowdown == 0.0 { Verdict::Equivalent } else { Verdict::Slower };
        if verdict != expected {
            let (percent, load) = (100.0 * scenario.slowdown, if scenario.loaded { ", loaded" } else { "" });
            eprintln!("{} at {percent} %{load}: {} {:?}", verdict.id(), row.base, row.estimate());
        }
        tally.excess.extend(row.estimate().map(|e| e.ratio - 1.0));
    }
    Ok(())
}

/// Returns the amount of arithmetic that takes `share` of a step of each case. It is measured once, on one core, and
/// every slowed process gets the same amount.
fn extra_work(side: &Side, share: f64, cases: &[Case]) -> Result<String> {
    const WORK: u64 = 100_000;
    let mut workers: BTreeMap<Framework, Worker> = BTreeMap::new();
    let mut all = Vec::new();
    for case in cases {
        check_interrupted()?;
        let worker = match workers.entry(case.backend.framework()) {
            Entry::Occupied(started) => started.into_mut(),
            Entry::Vacant(none) => none.insert(Worker::start(side, case.backend.framework(), Threads::One)?),
        };
        worker.load(case)?;
        let (mut steps, mut works) = (Vec::new(), Vec::new());
        let start = Instant::now();
        while steps.len() < 8 || start.elapsed() < Duration::from_millis(300) {
            steps.push(worker.time(5)?.wall);
            works.push(worker.work(WORK)?);
        }
        let rounds = share * lower_quartile(&steps) / (lower_quartile(&works) / WORK as f64);
        all.push(format!("{case}={}", rounds.round() as u64));
    }
    Ok(all.join(";"))
}

/// Returns true if Criterion, with its defaults, reports a change for a second run of the same code. Returns `None` if
/// it does not report.
fn criterion_reports_change(side: &Side, case: &Case) -> Result<Option<bool>> {
    let home = results::folder().join("calibrate-criterion");
    let _ = std::fs::remove_dir_all(&home);
    let mut changed = None;
    for _ in 0..2 {
        check_interrupted()?;
        let framework = case.backend.framework();
        let done = Command::new(&side.executables[&framework])
            .args(["--bench", "--exact", &case.to_string()])
            .args("--sample-size 100 --warm-up-time 1 --measurement-time 3".split(' '))
            .env("CRITERION_HOME", &home)
            .env("TRANSFORMER_BENCH_SET", "smoke")
            // The records of this run are not needed.
            .env("TRANSFORMER_BENCH_RESULTS", &home)
            .stderr(Stdio::null())
            .output()?;
        let text = String::from_utf8_lossy(&done.stdout).into_owned();
        changed = if text.contains("Performance has") {
            Some(true)
        } else if text.contains("No change in performance") || text.contains("Change within noise") {
            Some(false)
        } else {
            None
        };
    }
    let _ = std::fs::remove_dir_all(&home);
    Ok(changed)
}

/// Formats a share and its 95 % interval (Clopper and Pearson, Biometrika 1934) in percent.
fn share_with_interval(hits: u64, trials: u64) -> String {
    let (k, n) = (hits as f64, trials as f64);
    let bound = |a: f64, b: f64, p: f64| Beta::new(a, b).map_or(f64::NAN, |d| d.inverse_cdf(p));
    let low = if hits == 0 { 0.0 } else { bound(k, n - k + 1.0, 0.025) };
    let high = if hits == trials { 1.0 } else { bound(k + 1.0, n - k, 0.975) };
    format!("{:.1} % ({:.1} to {:.1})", 100.0 * k / n, 100.0 * low, 100.0 * high)
}

/// Converts a share to percent with one decimal: 0.015 becomes 1.5.
fn percent(share: f64) -> f64 {
    (1000.0 * share).round() / 10.0
}

fn table(tallies: &[(Scenario, Tally)], criterion: &CriterionTally) -> String {
    let mut text = String::from(
        "| slowdown of head | threshold | machine | comparisons | reported slower | reported faster | equivalent | inconclusive | median change | time per case |\n\
         | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for (scenario, tally) in tallies {
        text.push_str(&format!(
            "| {} % | {} % | {} | {} | {} | {} | {} | {} | {:+.2} % | {:.1} s |\n",
            percent(scenario.slowdown),
            percent(scenario.threshold),
            if scenario.loaded { "loaded" } else { "unloaded" },
            tally.comparisons,
            share_with_interval(tally.slower, tally.comparisons),
            share_with_interval(tally.faster, tally.comparisons),
            tally.equivalent,
            tally.inconclusive,
            100.0 * median(&tally.excess),
            tally.seconds / tally.comparisons as f64,
        ));
    }
    if criterion.comparisons > 0 {
        let CriterionTally { comparisons, changes } = *criterion;
        text.push_str(&format!(
            "\nCriterion's own comparison reported a change in {changes} of {comparisons} pairs of runs of the same code: {}.\n",
            share_with_interval(changes, comparisons)
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_have_the_published_intervals() {
        // 0 of 30: 1 − 0.025^(1/30); 5 of 10 from the tables.
        assert_eq!(share_with_interval(0, 30), "0.0 % (0.0 to 11.6)");
        assert_eq!(share_with_interval(5, 10), "50.0 % (18.7 to 81.3)");
        assert_eq!(share_with_interval(10, 10), "100.0 % (69.2 to 100.0)");
    }
}
