//! Comparisons with a baseline, which has the samples of one process.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::decision::{CONFIDENCE, Estimate, Verdict, estimate};
use super::rounds::steps_per_block;
use super::signals::check_interrupted;
use super::worker::{Side, Threads, Worker};
use crate::statistics::{mean, midmean, std_dev, student_t_two_sided};
use crate::suite::{Case, Framework};

/// The level of a baseline. Most cases were timed in one process, so the drift within the run replaces the spread
/// between processes.
#[derive(Clone, Debug, PartialEq)]
pub struct BaselineLevel {
    /// Log of the median step time.
    pub level: f64,
    /// Standard deviation of the level between consecutive segments of the run.
    pub drift: f64,
}

/// Number of segments of a run.
const SEGMENTS: usize = 5;

/// Summarizes samples (seconds per step, in run order). Returns `None` for fewer than ten samples.
pub fn summarize(samples: &[f64]) -> Option<BaselineLevel> {
    if samples.len() < 2 * SEGMENTS || samples.iter().any(|s| !s.is_finite() || *s <= 0.0) {
        return None;
    }
    let logs: Vec<f64> = samples.iter().map(|s| s.ln()).collect();
    let each = logs.len() / SEGMENTS;
    let levels: Vec<f64> = logs.chunks(each).take(SEGMENTS).map(midmean).collect();
    Some(BaselineLevel { level: midmean(&logs), drift: std_dev(&levels) })
}

/// Summarizes the step times of several processes in seconds. The drift is their spread. Returns `None` for fewer than
/// three processes.
pub fn summarize_processes(times: &[f64]) -> Option<BaselineLevel> {
    let logs: Vec<f64> = times.iter().map(|time| time.ln()).collect();
    (logs.len() > 2).then(|| BaselineLevel { level: mean(&logs), drift: std_dev(&logs) })
}

/// Compares a baseline with rounds of another side. `head` has one log level per round. The interval is that of
/// predicting one more process.
pub fn compare_with_baseline(base: &BaselineLevel, head: &[f64], threshold: f64) -> (Verdict, Estimate) {
    let count = head.len() as f64;
    let (now, freedom) =
        if head.len() < 2 { (0.0, SEGMENTS as f64 - 1.0) } else { (std_dev(head), count - 1.0) };
    let noise = (now.powi(2) * (1.0 + 1.0 / count) + base.drift.powi(2)).sqrt();
    classify(mean(head) - base.level, noise * student_t_two_sided(freedom, 1.0 - CONFIDENCE), threshold)
}

/// Compares two baselines.
pub fn compare_baselines(base: &BaselineLevel, head: &BaselineLevel, threshold: f64) -> (Verdict, Estimate) {
    let noise = base.drift.hypot(head.drift);
    let freedom = 2.0 * (SEGMENTS as f64 - 1.0);
    classify(head.level - base.level, noise * student_t_two_sided(freedom, 1.0 - CONFIDENCE), threshold)
}

/// Returns the verdict of an earlier estimate under another threshold.
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

/// Time for which a process measures a case with short steps.
const MEASUREMENT_TIME: Duration = Duration::from_millis(500);

/// Number of processes in which a side is measured.
const PROCESSES: usize = 5;

/// Measures a side alone, on all threads. Returns for each case the log of its step time in seconds in each
/// process, or the reason of its failure.
///
/// # Errors
/// Returns an error if a process does not start, and after an interrupt.
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
                let entry = all.get_mut(&case.to_string()).expect("inserted above");
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

/// Returns the log of a case's step time in seconds, the midmean of its blocks after a warm-up.
///
/// # Errors
/// Returns an error if the process ends or the case fails.
pub fn level(worker: &mut Worker, case: &Case) -> Result<f64> {
    worker.load(case)?;
    let each = worker.time(1)?.wall.min(worker.time(1)?.wall);
    let steps = steps_per_block(each);
    let start = Instant::now();
    let mut logs = Vec::new();
    while logs.len() < 4 || (start.elapsed() < MEASUREMENT_TIME && logs.len() < 200) {
        logs.push(worker.time(steps)?.wall.ln());
    }
    Ok(midmean(&logs))
}

#[cfg(test)]
mod tests {
    use super::super::decision::THRESHOLD;
    use super::*;

    #[test]
    fn drift_of_a_baseline_widens_the_interval() {
        let quiet: Vec<f64> = (0..50).map(|i| 1.0 + 1e-4 * f64::from(i % 3)).collect();
        let restless: Vec<f64> = (0..50).map(|i| 1.0 + 0.1 * f64::from(i / 10)).collect();
        let now = [0.0, 0.001, -0.001, 0.0005, 0.0];
        let verdict = |samples: &[f64], shift: f64| {
            let head: Vec<f64> = now.iter().map(|v| v + shift).collect();
            compare_with_baseline(&summarize(samples).unwrap(), &head, THRESHOLD).0
        };
        assert_eq!(verdict(&quiet, 0.0), Verdict::Equivalent);
        assert_eq!(verdict(&quiet, 0.1), Verdict::Slower);
        assert_eq!(verdict(&quiet, -0.1), Verdict::Faster);
        assert_eq!(verdict(&restless, 0.1), Verdict::Inconclusive);
        // Two of six processes of the baseline and all of the head are slow.
        let base = summarize_processes(&[1.0, 1.0, 2.5, 1.0, 2.5, 1.0]).unwrap();
        assert_eq!(compare_with_baseline(&base, &[2.5f64.ln(); 5], THRESHOLD).0, Verdict::Inconclusive);
        assert_eq!(compare_with_baseline(&base, &[25f64.ln(); 5], THRESHOLD).0, Verdict::Slower);
        assert!(summarize(&[1.0; 9]).is_none() && summarize(&[f64::INFINITY; 20]).is_none());
        assert_eq!(
            compare_baselines(&summarize(&quiet).unwrap(), &summarize(&quiet).unwrap(), THRESHOLD).0,
            Verdict::Equivalent
        );
    }
}
