//! `scripts/calibrate`: how often comparisons are wrong on this machine, found by trying.

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
use transformer_bench::compare::cores::on_a_core;
use transformer_bench::compare::decision::{Rule, THRESHOLD, Verdict};
use transformer_bench::compare::revisions::{self, Source};
use transformer_bench::compare::rounds::{self, Row};
use transformer_bench::compare::signals::{self, check_interrupted};
use transformer_bench::compare::worker::{Side, Threads, Worker};
use transformer_bench::report::publish;
use transformer_bench::results;
use transformer_bench::results::machine::Machine;
use transformer_bench::statistics::{lower_quartile, median};
use transformer_bench::suite::{Case, Framework, Set};

use super::compare::LONGEST;

/// Compares this suite with itself, and with itself deliberately slowed, many times, and
/// counts the wrong answers.
///
/// Extra arithmetic in each step makes it slower by 1, 2, 5 and 10 per cent; 1 is looked
/// for with a threshold of 1 per cent, the others with the default. A third of
/// the comparisons run beside loads that go on and off on every core.
/// Criterion's own comparison of the same equal code is counted beside it.
#[derive(Args)]
#[command(after_help = "Examples:
  scripts/calibrate --minutes 60
  scripts/calibrate --minutes 60 --write   puts the table into src/compare/README.md
  scripts/calibrate --minutes 30 --curve --write && scripts/publish")]
pub struct Arguments {
    /// About how long to go on
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    /// A regular expression over ids
    #[arg(default_value = "")]
    filter: String,
    /// Of which cases
    #[arg(long, default_value = "smoke", value_parser = |text: &str| text.parse::<Set>())]
    set: Set,
    /// Take the executables DIR/torch and DIR/mlx, built elsewhere
    #[arg(long, value_name = "DIR")]
    executables: Option<PathBuf>,
    /// Cases a comparison
    #[arg(long, default_value_t = 12)]
    cases: usize,
    /// Only compare equal sides
    #[arg(long)]
    equal: bool,
    /// Only look for slowdowns from 0 to 10 per cent with the default threshold: the power curve
    #[arg(long, conflicts_with = "equal")]
    curve: bool,
    /// Write the table between its marks in src/compare/README.md
    #[arg(long)]
    write: bool,
    /// Only write the rounds of one comparison of equal sides to FILE: the noise that tests
    /// replay (src/compare/noise/)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["minutes", "equal", "write"])]
    record: Option<PathBuf>,
}

/// What is compared with the suite as it is.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
struct Kind {
    slowdown: f64,
    loaded: bool,
    threshold: f64,
}

const fn kind(slowdown: f64, loaded: bool, threshold: f64) -> Kind {
    Kind { slowdown, loaded, threshold }
}

/// What is tried, one after the other: every other time equal sides.
const KINDS: [Kind; 18] = [
    kind(0.0, false, THRESHOLD),
    kind(0.02, false, THRESHOLD),
    kind(0.0, true, THRESHOLD),
    kind(0.05, false, THRESHOLD),
    kind(0.0, false, THRESHOLD),
    kind(0.02, true, THRESHOLD),
    kind(0.0, false, FINE),
    kind(0.10, false, THRESHOLD),
    kind(0.0, true, THRESHOLD),
    kind(0.01, false, FINE),
    kind(0.0, false, THRESHOLD),
    kind(0.02, false, THRESHOLD),
    kind(0.0, true, THRESHOLD),
    kind(0.05, true, THRESHOLD),
    kind(0.0, false, THRESHOLD),
    kind(0.10, true, THRESHOLD),
    kind(0.0, false, THRESHOLD),
    kind(0.01, true, FINE),
];

/// The slowdowns of the power curve, those near the threshold apart by less.
const CURVE: [f64; 7] = [0.0, 0.01, 0.015, 0.02, 0.03, 0.05, 0.10];

/// The threshold with which one per cent is looked for.
const FINE: f64 = 0.01;

#[derive(Default)]
struct Count {
    trials: u64,
    slower: u64,
    faster: u64,
    inconclusive: u64,
    equivalent: u64,
    /// Measured ratios less one, to show that the extra work was what it should be.
    excess: Vec<f64>,
    seconds: f64,
}

/// Goes on and off on every core while it lives.
struct Load(Arc<AtomicBool>);

impl Load {
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

impl Drop for Load {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Progress, beside the results.
fn say(line: &str) {
    eprintln!("{line}");
}

pub fn run(arguments: &Arguments) -> Result<()> {
    ensure!(
        arguments.minutes > 0.0 && arguments.minutes <= LONGEST,
        "--minutes {}: over 0 and up to {LONGEST}",
        arguments.minutes
    );
    ensure!(arguments.cases > 0, "--cases 0: at least 1");
    let source = arguments.executables.clone().map_or(Source::Worktree, Source::Folder);
    let own = revisions::build(&source, &say)?;
    ensure!(!own.executables.is_empty(), "{} holds no executable torch or mlx", own.name);
    let mut cases = own.cases(arguments.set, &arguments.filter, Instant::now() + Duration::from_secs(600))?;
    // Ranks would share the one core of a lane.
    cases.retain(|case| case.shape.ranks() == 1);
    ensure!(!cases.is_empty(), "no case matches '{}'", arguments.filter);

    let mut random = ChaCha8Rng::seed_from_u64(std::process::id().into());
    if let Some(path) = &arguments.record {
        return record(&own, &draw(&cases, arguments.cases, &mut random), path);
    }
    let kinds: Vec<Kind> = if arguments.curve {
        CURVE
            .iter()
            .flat_map(|&slowdown| [false, true].map(|loaded| kind(slowdown, loaded, THRESHOLD)))
            .collect()
    } else {
        KINDS.into_iter().filter(|k| !arguments.equal || k.slowdown == 0.0).collect()
    };
    let mut counts: Vec<(Kind, Count)> = Vec::new();
    let mut criterion = (0, 0);
    let start = Instant::now();
    let end = start + Duration::from_secs_f64(60.0 * arguments.minutes);
    for turn in 0.. {
        if Instant::now() >= end {
            break;
        }
        let kind = kinds[turn % kinds.len()];
        let picked = draw(&cases, arguments.cases, &mut random);
        let slot = match counts.iter().position(|(k, _)| *k == kind) {
            Some(slot) => slot,
            None => {
                counts.push((kind, Count::default()));
                counts.len() - 1
            }
        };
        match trial(&own, kind, &picked, &mut counts[slot].1) {
            // What was counted until then is shown.
            Err(_) if signals::interrupted() => break,
            done => done?,
        }
        if turn % 3 == 1 && !arguments.curve {
            for case in &picked[..2.min(picked.len())] {
                if let Some(called) = criterions_own(&own, case)? {
                    criterion.0 += u64::from(called);
                    criterion.1 += 1;
                }
            }
        }
        if std::io::stderr().is_terminal() || turn % 4 == 3 {
            eprintln!(
                "{:.0} min: {} comparisons",
                start.elapsed().as_secs_f64() / 60.0,
                counts.iter().map(|c| c.1.trials).sum::<u64>()
            );
        }
    }
    counts.retain(|(_, count)| count.trials > 0);
    counts.sort_by(|a, b| a.0.partial_cmp(&b.0).expect("numbers"));
    let table = table(&counts, criterion);
    super::show(&table)?;
    if arguments.write {
        ensure!(!counts.is_empty(), "nothing was compared, so nothing was written: give it more --minutes");
    }
    let name = if arguments.curve { "power" } else { "calibrate" };
    if arguments.write { insert(Path::new("src/compare/README.md"), name, &table) } else { Ok(()) }
}

/// Some cases, none of them twice.
fn draw(cases: &[Case], count: usize, random: &mut ChaCha8Rng) -> Vec<Case> {
    let mut left = cases.to_vec();
    (0..count.min(left.len())).map(|_| left.swap_remove(random.next_u32() as usize % left.len())).collect()
}

/// Writes rounds of equal sides: logs of step times in units of 0.001, relative to the
/// round's first.
fn record(own: &Side, cases: &[Case], path: &Path) -> Result<()> {
    // A rule that never decides.
    let rule = Rule { threshold: 0.0, cases: 1_000_000, most: 24 };
    let mut rows: Vec<Row> = cases.iter().map(|c| Row::new(*c, *c, rule)).collect();
    let sides = [own.clone(), own.clone()];
    let until = Instant::now() + Duration::from_secs(3600);
    rounds::decide(&sides, &mut rows, Threads::One, until, |turn, _| eprintln!("round {turn}"))?;
    let mut text = format!(
        "# Log step times of pairs of blocks in units of 0.001, the same program on both sides: a line\n\
         # a round (fresh processes), base and head by turns; a heading a case. Recorded by\n\
         # scripts/calibrate --record on {}.\n",
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
    results::write_atomic(path, &text)
}

fn trial(own: &Side, kind: Kind, cases: &[Case], count: &mut Count) -> Result<()> {
    let mut head = own.clone();
    head.name = "slowed".to_owned();
    if kind.slowdown > 0.0 {
        head.environment.push((
            "TRANSFORMER_BENCH_EXTRA_WORK".to_owned(),
            on_a_core(|| extra_work(own, kind.slowdown, cases))?,
        ));
    }
    let rule = rounds::rule(kind.threshold, cases.len());
    let mut rows: Vec<Row> = cases.iter().map(|c| Row::new(*c, *c, rule)).collect();
    let _load = kind.loaded.then(Load::start);
    let start = Instant::now();
    rounds::decide(
        &[own.clone(), head],
        &mut rows,
        Threads::One,
        start + Duration::from_secs(3600),
        |_, _| (),
    )?;
    count.seconds += start.elapsed().as_secs_f64();
    for row in rows {
        let verdict = row.verdict().unwrap_or(Verdict::Inconclusive);
        if let Some((_, reason)) = &row.failed {
            bail!("{} failed: {reason}", row.base);
        }
        count.trials += 1;
        match verdict {
            Verdict::Slower => count.slower += 1,
            Verdict::Faster => count.faster += 1,
            Verdict::Equivalent => count.equivalent += 1,
            _ => count.inconclusive += 1,
        }
        let expected = if kind.slowdown == 0.0 { Verdict::Equivalent } else { Verdict::Slower };
        if verdict != expected {
            let (percent, load) = (100.0 * kind.slowdown, if kind.loaded { ", loaded" } else { "" });
            eprintln!("{} at {percent} %{load}: {} {:?}", verdict.id(), row.base, row.estimate());
        }
        count.excess.extend(row.estimate().map(|e| e.ratio - 1.0));
    }
    Ok(())
}

/// Arithmetic that takes `share` of a step of each case, measured once, as comparisons
/// measure: the same in every process that is slowed.
fn extra_work(own: &Side, share: f64, cases: &[Case]) -> Result<String> {
    const TRIAL: u64 = 100_000;
    let mut workers: BTreeMap<Framework, Worker> = BTreeMap::new();
    let mut all = Vec::new();
    for case in cases {
        check_interrupted()?;
        let worker = match workers.entry(case.backend.framework()) {
            Entry::Occupied(started) => started.into_mut(),
            Entry::Vacant(none) => none.insert(Worker::start(own, case.backend.framework(), Threads::One)?),
        };
        worker.load(case)?;
        let (mut steps, mut works) = (Vec::new(), Vec::new());
        let start = Instant::now();
        while steps.len() < 8 || start.elapsed() < Duration::from_millis(300) {
            steps.push(worker.time(5)?.wall);
            works.push(worker.work(TRIAL)?);
        }
        let rounds = share * lower_quartile(&steps) / (lower_quartile(&works) / TRIAL as f64);
        all.push(format!("{case}={}", rounds.round() as u64));
    }
    Ok(all.join(";"))
}

/// Whether Criterion with its defaults calls a second run of the same code changed; None
/// where it says nothing.
fn criterions_own(side: &Side, case: &Case) -> Result<Option<bool>> {
    let home = results::folder().join("calibrate-criterion");
    let _ = std::fs::remove_dir_all(&home);
    let mut said = None;
    for _ in 0..2 {
        check_interrupted()?;
        let framework = case.backend.framework();
        let done = Command::new(&side.executables[&framework])
            .args([
                "--bench",
                "--exact",
                &case.to_string(),
                "--sample-size",
                "100",
                "--warm-up-time",
                "1",
                "--measurement-time",
                "3",
            ])
            .env("CRITERION_HOME", &home)
            .env("TRANSFORMER_BENCH_SET", "smoke")
            // Records of this run belong nowhere.
            .env("TRANSFORMER_BENCH_RESULTS", &home)
            .stderr(Stdio::null())
            .output()?;
        let text = String::from_utf8_lossy(&done.stdout).into_owned();
        said = if text.contains("Performance has") {
            Some(true)
        } else if text.contains("No change in performance") || text.contains("Change within noise") {
            Some(false)
        } else {
            None
        };
    }
    let _ = std::fs::remove_dir_all(&home);
    Ok(said)
}

/// 95 % interval of a share (Clopper and Pearson, Biometrika 1934), in per cent.
fn interval(hits: u64, trials: u64) -> String {
    let (k, n) = (hits as f64, trials as f64);
    let bound = |a: f64, b: f64, p: f64| Beta::new(a, b).map_or(f64::NAN, |d| d.inverse_cdf(p));
    let low = if hits == 0 { 0.0 } else { bound(k, n - k + 1.0, 0.025) };
    let high = if hits == trials { 1.0 } else { bound(k + 1.0, n - k, 0.975) };
    format!("{:.1} % ({:.1} to {:.1})", 100.0 * k / n, 100.0 * low, 100.0 * high)
}

/// Per cent as a reader writes it: 1.5 is 1.5, although 0.015 is no binary number.
fn round(share: f64) -> f64 {
    (1000.0 * share).round() / 10.0
}

fn table(counts: &[(Kind, Count)], criterion: (u64, u64)) -> String {
    let mut text = String::from(
        "| head is slower by | threshold | machine | comparisons | called slower | called faster | equivalent | inconclusive | median found | time a case |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for (kind, c) in counts {
        text.push_str(&format!(
            "| {} % | {} % | {} | {} | {} | {} | {} | {} | {:+.2} % | {:.1} s |\n",
            round(kind.slowdown),
            round(kind.threshold),
            if kind.loaded { "loaded" } else { "as it was" },
            c.trials,
            interval(c.slower, c.trials),
            interval(c.faster, c.trials),
            c.equivalent,
            c.inconclusive,
            100.0 * median(&c.excess),
            c.seconds / c.trials as f64,
        ));
    }
    if criterion.1 > 0 {
        text.push_str(&format!(
            "\nCriterion's own comparison of two runs of the same code called {} of {} different: {}.\n",
            criterion.0,
            criterion.1,
            interval(criterion.0, criterion.1)
        ));
    }
    text
}

/// Puts the table between the marks of its name.
fn insert(path: &Path, name: &str, table: &str) -> Result<()> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("{} could not be read", path.display()))?;
    results::write_atomic(path, &publish::between(&text, name, table)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_have_the_published_intervals() {
        // 0 of 30: 1 − 0.025^(1/30); 5 of 10 from the tables.
        assert_eq!(interval(0, 30), "0.0 % (0.0 to 11.6)");
        assert_eq!(interval(5, 10), "50.0 % (18.7 to 81.3)");
        assert_eq!(interval(10, 10), "100.0 % (69.2 to 100.0)");
    }
}
