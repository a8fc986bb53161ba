//! Finds the rank that is to blame when a request fails.

use std::time::Duration;

/// The outcome of a request on each rank.
#[derive(Default)]
pub struct FailureReport {
    pub answers: Vec<Option<String>>,
    /// Ranks that ended, each with its reason.
    pub ended: Vec<String>,
    /// Ranks that answered with a failure, each with its reason.
    pub failed: Vec<String>,
    /// True for ranks that were about to wait for the others.
    pub waiting: Vec<bool>,
}

impl FailureReport {
    /// Returns the reason why a request failed, or `None` if all ranks have answered.
    ///
    /// A rank that ended is to blame first, then a rank that made the others wait, then a rank that failed. Other
    /// failures may be consequences.
    pub fn blame(&self, request: &str, waited: Duration) -> Option<String> {
        if let Some(ended) = self.ended.first() {
            return Some(ended.clone());
        }
        let word = request.split(' ').next().unwrap_or_default();
        let announces_waiting = matches!(word, "join" | "steps" | "no-sync");
        let missing: Vec<usize> =
            (0..self.waiting.len()).filter(|&rank| self.answers[rank].is_none()).collect();
        let stuck: Vec<usize> =
            missing.iter().copied().filter(|&rank| announces_waiting && !self.waiting[rank]).collect();
        if let (Some(failed), true) = (self.failed.first(), stuck.is_empty()) {
            return Some(failed.clone());
        }
        let blamed = if stuck.is_empty() { missing } else { stuck };
        let list: Vec<String> = blamed.iter().map(usize::to_string).collect();
        let ranks = if list.len() == 1 { "rank" } else { "ranks" };
        (!list.is_empty()).then(|| {
            format!("{ranks} {} did not answer '{request}' within {} s", list.join(", "), waited.as_secs())
        })
    }
}
