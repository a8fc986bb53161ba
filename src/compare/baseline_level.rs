//! Comparing with a run that is over: a baseline.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::decision::{CONFIDENCE, Estimate, Verdict, estimate};
use super::rounds::steps_per_block;
use super::signals::check_interrupted;
use super::worker::{Side, Threads, Worker};
use crate::statistics::{mean, midmean, std_dev, student_t_two_sided};
use crate::suite::{Case, Framework};

/// The samples of a run that is over: one process, so its spread between processes is
/// taken from how its own level wandered.
#[derive(Clone, Debug, PartialEq)]
pub struct BaselineLevel {
    /// Log of the median step time.
    pub level: f64,
    /// Standard deviation of the level between consecutive stretches of the run.
    pub wander: f64,
}

/// Stretches that a run is cut into.
const STRETCHES: usize = 5;

/// Reads a run's samples, in seconds a step, in their order; None of fewer than ten.
pub fn summarize(samples: &[f64]) -> Option<BaselineLevel> {
    if samples.len() < 2 * STRETCHES || samples.iter().any(|s| !s.is_finite() || *s <= 0.0) {
        return None;
    }
    let logs: Vec<f64> = samples.iter().map(|s| s.ln()).collect();
    let each = logs.len() / STRETCHES;
    let levels: Vec<f64> = logs.chunks(each).take(STRETCHES).map(midmean).collect();
    Some(BaselineLevel { level: midmean(&logs), wander: std_dev(&levels) })
}

/// Compares a past run with rounds of another side, or with another past run: `head` is
/// one log level a round. The band is that of predicting one more process.
pub fn compare_with_baseline(base: &BaselineLevel, head: &[f64], threshold: f64) -> (Verdict, Estimate) {
    let count = head.len() as f64;
    let (now, freedom) =
        if head.len() < 2 { (0.0, STRETCHES as f64 - 1.0) } else { (std_dev(head), count - 1.0) };
    let noise = (now.powi(2) * (1.0 + 1.0 / count) + base.wander.powi(2)).sqrt();
    classify(mean(head) - base.level, noise * student_t_two_sided(freedom, 1.0 - CONFIDENCE), threshold)
}

/// Compares two past runs.
pub fn compare_baselines(base: &BaselineLevel, head: &BaselineLevel, threshold: f64) -> (Verdict, Estimate) {
    let noise = base.wander.hypot(head.wander);
    let freedom = 2.0 * (STRETCHES as f64 - 1.0);
    classify(head.level - base.level, noise * student_t_two_sided(freedom, 1.0 - CONFIDENCE), threshold)
}

/// The verdict of an interval that is known, by another threshold.
pub fn reevaluate(estimate: &Estimate, threshold: f64) -> Verdict {
    let [low, high] = estimate.ci.map(f64::ln);
    classify((low + high) / 2.0, (high - low) / 2.0, threshold).0
}

fn classify(centre: f64, half: f64, threshold: f64) -> (Verdict, Estimate) {
    let limit = (1.0 + threshold).ln();
    let verdict = if centre - half > 0.0 && centre > limit {
        Verdict::Slower
    } else if centre + half < 0.0 && centre < -limit {
        Verdict::Faster
    } else if centre + half < limit && centre - half > -limit {
        Verdict::Equivalent
    } else {
        Verdict::Inconclusive
    };
    (verdict, estimate(centre, half))
}

/// How long a process measures a case with short steps.
const MEASURED: Duration = Duration::from_millis(500);

/// Processes that a side is measured in against a baseline.
const PROCESSES: usize = 5;

/// Levels of a side that runs alone, on all threads as a user's run: for each case the
/// log of its step time in seconds, one a process, or why it failed.
///
/// # Errors
/// Where no process starts, and after Ctrl-C.
pub fn levels(
    side: &Side,
    cases: &[Case],
    until: Instant,
    mut progress: impl FnMut(usize),
) -> Result<BTreeMap<String, Result<Vec<f64>, String>>> {
    let mut all: BTreeMap<String, Result<Vec<f64>, String>> =
        cases.iter().map(|c| (c.to_string(), Ok(Vec::new()))).collect();
    let frameworks: BTreeSet<Framework> = cases.iter().map(|c| c.backend.framework()).collect();
    for round in 1..=PROCESSES {
        progress(round);
        for &framework in &frameworks {
            let mut worker = Worker::start(side, framework, Threads::All)?.until(until);
            for case in cases.iter().filter(|c| c.backend.framework() == framework) {
                check_interrupted()?;
                let entry = all.get_mut(&case.to_string()).expect("made above");
                let Ok(levels) = entry else { continue };
                if Instant::now() >= until {
                    return Ok(all);
                }
                match level(&mut worker, case) {
                    Ok(level) => levels.push(level),
                    Err(reason) => {
                        *entry = Err(format!("{reason:#}"));
                        worker = Worker::start(side, framework, Threads::All)?.until(until);
                    }
                }
            }
        }
    }
    Ok(all)
}

/// The midmean of the logs of some blocks of steps, after a warm-up.
fn level(worker: &mut Worker, case: &Case) -> Result<f64> {
    worker.load(case)?;
    let each = worker.time(1)?.wall.min(worker.time(1)?.wall);
    let steps = steps_per_block(each);
    let start = Instant::now();
    let mut logs = Vec::new();
    while logs.len() < 4 || (start.elapsed() < MEASURED && logs.len() < 200) {
        logs.push(worker.time(steps)?.wall.ln());
    }
    Ok(midmean(&logs))
}

#[cfg(test)]
mod tests {
    use super::super::decision::THRESHOLD;
    use super::*;

    #[test]
    fn a_past_run_widens_the_band_by_its_own_wandering() {
        let quiet: Vec<f64> = (0..50).map(|i| 1.0 + 1e-4 * f64::from(i % 3)).collect();
        let restless: Vec<f64> = (0..50).map(|i| 1.0 + 0.1 * f64::from(i / 10)).collect();
        let now = [0.0, 0.001, -0.001, 0.0005, 0.0];
        let of = |samples: &[f64], shift: f64| {
            let head: Vec<f64> = now.iter().map(|v| v + shift).collect();
            compare_with_baseline(&summarize(samples).unwrap(), &head, THRESHOLD).0
        };
        assert_eq!(of(&quiet, 0.0), Verdict::Equivalent);
        assert_eq!(of(&quiet, 0.1), Verdict::Slower);
        assert_eq!(of(&quiet, -0.1), Verdict::Faster);
        assert_eq!(of(&restless, 0.1), Verdict::Inconclusive);
        assert!(summarize(&[1.0; 9]).is_none() && summarize(&[f64::INFINITY; 20]).is_none());
        assert_eq!(
            compare_baselines(&summarize(&quiet).unwrap(), &summarize(&quiet).unwrap(), THRESHOLD).0,
            Verdict::Equivalent
        );
    }
}
