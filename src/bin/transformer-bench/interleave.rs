//! `transformer-bench interleave`: rounds of pairs of training steps, with which `scripts/bench` ends.

use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use transformer_bench::compare::rounds::{self, Row};
use transformer_bench::compare::worker::{Side, Threads};
use transformer_bench::report::find_measured;
use transformer_bench::report::headline::{best_pairs, same_method_pairs, top_two};
use transformer_bench::results::{self, InterleavedResult, run};
use transformer_bench::suite::Case;

use super::options::{self, Executables};

/// Compares training steps of the last run in interleaved rounds, and adds the results to its report.
///
/// The pairs are each backend's two fastest steps, and steps of both frameworks on the same device. Medians of one
/// run cannot rank them: on a shared machine, runs of the same code differ by 13 to 24 %. A round starts a fresh
/// process of each side, and their steps alternate.
#[derive(Args)]
pub struct Arguments {
    /// Stop after this many minutes
    #[arg(long, default_value = "1", value_parser = options::minutes, allow_negative_numbers = true)]
    minutes: Duration,
    #[command(flatten)]
    executables: Executables,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    measure(&arguments.executables.build()?, arguments.minutes)
}

/// Measures the pairs of the last run and saves the results next to it.
///
/// # Errors
/// Returns an error if the run cannot be read, a process does not start or the user interrupts.
pub fn measure(side: &Side, time_limit: Duration) -> Result<()> {
    let folder = results::folder();
    let (last, _) = run::merge(&folder)?;
    let was_measured = |case: &Case| find_measured(&last, case).is_some();
    let mut pairs = best_pairs(&last);
    let others = same_method_pairs(last.headline()).into_iter().filter(|pair| pair.iter().all(was_measured));
    for pair in others.chain(top_two(&last)) {
        if !pairs.contains(&pair) {
            pairs.push(pair);
        }
    }
    if pairs.is_empty() {
        return Ok(());
    }
    eprintln!(
        "interleaved rounds: {} pairs of training steps, {:.0} s at most",
        pairs.len(),
        time_limit.as_secs_f64()
    );
    let until = Instant::now() + time_limit;
    let sides = [side.clone(), side.clone()];
    let mut rows: Vec<Row> = Vec::new();
    // The most important pairs come first. If time runs out, they have an interval.
    for [base, head] in pairs {
        let mut row = [Row::new(base, head, rounds::quick_rule())];
        rounds::decide(&sides, &mut row, Threads::All, until, |_, _| {})?;
        rows.extend(row);
    }
    let result = |row: &Row| -> Option<InterleavedResult> {
        let times = row.test.step_times()?;
        let estimate = row.estimate().filter(|_| row.test.rounds() >= rounds::MIN_ROUNDS)?;
        estimate.ci.iter().all(|c| c.is_finite()).then(|| InterleavedResult {
            base: row.base.to_string(),
            head: row.head.to_string(),
            base_ns: Some(1e9 * times[0]),
            head_ns: Some(1e9 * times[1]),
            ratio: estimate.ratio,
            ratio_ci: estimate.ci,
            rounds: row.test.rounds() as u64,
            commit: last.machine.commit.clone(),
        })
    };
    results::save_interleaved(&folder, rows.iter().filter_map(result).collect())
}
