//! `transformer-bench interleave`: rounds of pairs of training steps, with which `scripts/bench` ends.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use transformer_bench::compare::decision::Precision;
use transformer_bench::compare::rounds::{self, Row};
use transformer_bench::compare::worker::{Side, Threads};
use transformer_bench::report::find_measured;
use transformer_bench::report::headline::{best_pairs, near_ties, same_method_pairs, top_two};
use transformer_bench::results::{self, InterleavedResult, Results, run};
use transformer_bench::statistics::REPORT_CONFIDENCE;
use transformer_bench::suite::Case;

use super::options::{self, Executables};

/// The comparison of both frameworks' fastest steps, which the report begins with. Student's t with seven degrees of
/// freedom is 1.2 times the limit for many rounds; with two it is 2.2 times.
const ANSWER: Precision = Precision { min_rounds: 8, half_width: 0.05 };
/// Other comparisons: the fewest rounds with a usable spread.
const FINDING: Precision = Precision { min_rounds: 3, half_width: 0.1 };
/// Part of the time limit in which similar steps of one backend are ranked, before the answer is measured.
const RANKING_SHARE: f64 = 0.25;

/// Compares training steps of the last run in interleaved rounds, and adds the results to its report.
///
/// The pairs are both frameworks' fastest steps on a device, steps with the same method, and each backend's two
/// fastest steps. Medians of one run cannot rank them: on a shared machine, runs of the same code differ by 13 to
/// 24 %. A round starts a fresh process of each side, and their steps alternate. The fastest steps get rounds until
/// the 95 % interval of their ratio is within 5 %, and at least eight.
#[derive(Args)]
pub struct Arguments {
    /// Stop after this many minutes
    #[arg(long, default_value = "2", value_parser = options::minutes, allow_negative_numbers = true)]
    minutes: Duration,
    #[command(flatten)]
    executables: Executables,
}

/// Runs the subcommand. Returns the exit code.
///
/// # Errors
/// Returns the errors of [`measure`].
pub fn run(arguments: &Arguments) -> Result<u8> {
    Ok(u8::from(!measure(&arguments.executables.build()?, arguments.minutes)?))
}

/// Measures the pairs of the last run and saves the results next to it. Returns false if steps did not do their work.
///
/// # Errors
/// Returns an error if the run cannot be read, a process does not start or the user interrupts.
pub fn measure(side: &Side, time_limit: Duration) -> Result<bool> {
    let mut interleaving = Interleaving {
        folder: results::folder(),
        sides: [side.clone(), side.clone()],
        measured: Vec::new(),
        passed: true,
    };
    let start = Instant::now();
    let until = start + time_limit;
    interleaving.measure(near_ties, FINDING, start + time_limit.mul_f64(RANKING_SHARE))?;
    interleaving.measure(best_pairs, ANSWER, until)?;
    interleaving.measure(|last| same_method_pairs(last.headline()), FINDING, until)?;
    interleaving.measure(top_two, FINDING, until)?;
    Ok(interleaving.passed)
}

/// The pairs of a run, measured one after the other.
struct Interleaving {
    folder: PathBuf,
    sides: [Side; 2],
    measured: Vec<[Case; 2]>,
    /// False if steps did not do their work.
    passed: bool,
}

impl Interleaving {
    /// Measures the pairs that `choose` takes from the last run, except those that were measured before.
    fn measure(
        &mut self,
        choose: impl Fn(&Results) -> Vec<[Case; 2]>,
        precision: Precision,
        until: Instant,
    ) -> Result<()> {
        let (last, _) = run::merge(&self.folder)?;
        for pair in choose(&last) {
            let known = self.measured.contains(&pair);
            if known
                || Instant::now() >= until
                || pair.iter().any(|case| find_measured(&last, case).is_none())
            {
                continue;
            }
            self.measured.push(pair);
            let [base, head] = pair;
            eprintln!("interleaved rounds: {base} and {head}");
            let mut row = [Row::new(base, head, rounds::interval_rule(precision))];
            rounds::decide(&self.sides, &mut row, Threads::All, until, |_, _| {})?;
            let [row] = row;
            if let Some(failure) = &row.failed {
                let id = pair[failure.side].to_string();
                let reason = format!("interleaved rounds: {}", failure.reason);
                eprintln!("bench: {id}: {reason}");
                if failure.wrong_steps {
                    run::fail_case(&self.folder, &id, &reason)?;
                    self.passed = false;
                }
            }
            let new = result(&row, &last.machine.commit).into_iter().collect();
            results::save_interleaved(&self.folder, new)?;
        }
        Ok(())
    }
}

/// Returns the result of a row, or `None` if it has no interval.
fn result(row: &Row, commit: &str) -> Option<InterleavedResult> {
    let [base_ns, head_ns] = row.test.step_times().filter(|_| row.failed.is_none())?.map(|s| 1e9 * s);
    let estimate = row.test.estimate_at(REPORT_CONFIDENCE)?;
    estimate.ci.iter().all(|c| c.is_finite()).then(|| InterleavedResult {
        base: row.base.to_string(),
        head: row.head.to_string(),
        base_ns: Some(base_ns),
        head_ns: Some(head_ns),
        ratio: estimate.ratio,
        ratio_ci: estimate.ci,
        rounds: row.test.rounds() as u64,
        round_ns: row.test.round_times().iter().map(|round| round.map(|s| 1e9 * s)).collect(),
        commit: commit.to_owned(),
    })
}
