//! Which rank is the cause where a request is not done.

use std::time::Duration;

/// What became of a request.
pub struct Heard {
    pub answers: Vec<Option<String>>,
    /// Ranks that ended, and those that answered with a failure, each with its reason.
    pub ended: Vec<String>,
    pub failed: Vec<String>,
    /// Ranks that were about to wait for the others.
    pub here: Vec<bool>,
}

impl Heard {
    /// Why the request was not done; None where all have answered. A rank that has ended is the cause,
    /// before one that keeps the others from beginning, before those that failed for the want of it.
    pub fn cause(&self, request: &str, waited: Duration) -> Option<String> {
        if let Some(ended) = self.ended.first() {
            return Some(ended.clone());
        }
        let word = request.split(' ').next().unwrap_or_default();
        let says_here = matches!(word, "join" | "steps" | "silent");
        let lacking: Vec<usize> = (0..self.here.len()).filter(|&rank| self.answers[rank].is_none()).collect();
        let stuck: Vec<usize> =
            lacking.iter().copied().filter(|&rank| says_here && !self.here[rank]).collect();
        if let (Some(failed), true) = (self.failed.first(), stuck.is_empty()) {
            return Some(failed.clone());
        }
        let named = if stuck.is_empty() { lacking } else { stuck };
        let list: Vec<String> = named.iter().map(usize::to_string).collect();
        let ranks = if list.len() == 1 { "rank" } else { "ranks" };
        (!list.is_empty()).then(|| {
            format!("{ranks} {} did not answer '{request}' within {} s", list.join(", "), waited.as_secs())
        })
    }
}
