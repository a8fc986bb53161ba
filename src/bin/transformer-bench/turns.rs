//! The frameworks' best steps in turns, their headline steps, and each backend's two fastest: what `scripts/bench` ends with.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Args;
use transformer_bench::compare::rounds::{self, Row};
use transformer_bench::compare::sides::{self, Source};
use transformer_bench::compare::worker::Threads;
use transformer_bench::report::{champions, finalists, find, measured, rivals};
use transformer_bench::results::{self, Turn, run};
use transformer_bench::suite::Case;

/// Compares the frameworks' training steps of the last run in turns, for the report.
///
/// Two figures taken one after the other name no winner: on a shared machine, runs of the same
/// code differ by 13 to 24 %. Here both run at once in fresh processes, by turns.
#[derive(Args)]
pub struct Arguments {
    /// Stop after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0, allow_negative_numbers = true)]
    budget: f64,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    ensure!(
        arguments.budget > 0.0 && arguments.budget <= 86400.0,
        "--budget {}: seconds, over 0 and up to a day",
        arguments.budget
    );
    let folder = results::folder();
    let (last, _) = run::merge(&folder)?;
    let was_measured = |case: &Case| measured(find(&last, case)).is_some();
    let mut pairs = champions(&last);
    let others = rivals(last.headline()).into_iter().filter(|pair| pair.iter().all(was_measured));
    for pair in others.chain(finalists(&last)) {
        if !pairs.contains(&pair) {
            pairs.push(pair);
        }
    }
    if pairs.is_empty() {
        return Ok(());
    }
    eprintln!("in turns: {} pairs of training steps, {:.0} s at most", pairs.len(), arguments.budget);
    let until = Instant::now() + Duration::from_secs_f64(arguments.budget);
    let side = sides::build(&Source::Worktree, &|line: &str| eprintln!("{line}"))?;
    let sides = [side.clone(), side];
    let mut rows: Vec<Row> = Vec::new();
    // One pair after the other: where time is short, the first has an interval and the rest have none.
    for [base, head] in pairs {
        let mut row = [Row::new(base, head, rounds::few())];
        rounds::decide(&sides, &mut row, Threads::All, until, |_, _| {})?;
        rows.extend(row);
    }
    let turn = |row: &Row| -> Option<Turn> {
        let estimate = row.estimate().filter(|_| row.judge.rounds() >= rounds::FEW)?;
        estimate.ci.iter().all(|c| c.is_finite()).then(|| Turn {
            base: row.base.to_string(),
            head: row.head.to_string(),
            ratio: estimate.ratio,
            ratio_ci: estimate.ci,
            rounds: row.judge.rounds() as u64,
            commit: last.machine.commit.clone(),
        })
    };
    results::keep_turns(&folder, rows.iter().filter_map(turn).collect())
}
