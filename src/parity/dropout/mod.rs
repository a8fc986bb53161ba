//! Checks of dropout: its rate, its scale and its independence.
//!
//! [`Probe`] reads the dropout masks of several steps from gradients. The rate must match the configuration, and the
//! masks must be independent. The reference repeats some steps with the masks, and loss and gradients must agree.

mod probe;

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::tolerance::expected_with_masks;
use super::{Mismatch, compare_tensors};
use crate::backend::{Accumulation, Backend, LoadedCase};
use crate::reference::Site;
use crate::suite::Case;
pub use probe::{Masks, Probe};

/// Largest deviation of a count in standard deviations. Chance exceeds it once in 1.7 million.
const MAX_DEVIATIONS: f64 = 5.0;

/// Checks the dropout of a case.
///
/// # Errors
/// Returns an error if the backend fails.
pub fn check(backend: &dyn Backend, case: Case) -> Result<Option<Mismatch>> {
    let probe = Probe::new(case);
    let loaded = backend.load(&probe.fixture());
    let mut loaded = loaded.with_context(|| format!("{} could not be loaded", probe.case))?;
    check_loaded(&probe, loaded.as_mut(), backend.accumulation())
}

/// Checks the dropout of a case that a backend has loaded for a probe.
///
/// # Errors
/// Returns an error if the backend fails.
pub fn check_loaded(
    probe: &Probe,
    loaded: &mut dyn LoadedCase,
    accumulation: Accumulation,
) -> Result<Option<Mismatch>> {
    let case = probe.case;
    let fixture = probe.fixture();
    let mut steps: Vec<Masks> = Vec::new();
    for index in 0..probe.steps() {
        loaded.step().with_context(|| format!("a step of {case} failed"))?;
        let results = loaded.outputs();
        let mut results = results.with_context(|| format!("the results of {case} could not be read"))?;
        let Some(masks) = probe.read_masks(&results) else {
            return Ok(Some(Mismatch::new(case, "a gradient is missing")));
        };
        if index < probe.compared_steps() {
            let mut expected = expected_with_masks(&fixture, accumulation, &|sample, site, dims| {
                probe.factors(&masks, sample, site, dims)
            });
            expected.retain(|tensor| probe.determines(&tensor.name));
            for tensor in &expected {
                probe.replace_undetermined(&tensor.name, &tensor.values, &mut results);
            }
            if let Err(mismatch) = compare_tensors(case, &expected, &results) {
                return Ok(Some(Mismatch::new(case, format!("with dropout, {}", mismatch.reason))));
            }
        }
        steps.push(masks);
    }
    let reason = wrong_rate(probe, &steps).or_else(|| dependence(probe, &steps));
    Ok(reason.map(|reason| Mismatch::new(case, reason)))
}

/// Returns true if `hits` of `all` values are within chance of a probability.
fn is_within_chance(hits: usize, all: usize, probability: f64) -> bool {
    let all = all as f64;
    let deviation = (probability * (1.0 - probability) / all).sqrt();
    (hits as f64 / all - probability).abs() <= MAX_DEVIATIONS * deviation
}

fn site_name(site: Site) -> &'static str {
    match site {
        Site::Embedding => "the embedding",
        Site::Weights { .. } => "the attention weights",
        Site::AttentionResidual { .. } => "the attention residual",
        Site::Hidden { .. } => "the hidden units",
        Site::FeedForwardResidual { .. } => "the feed-forward residual",
        Site::Head { .. } => "the output head",
    }
}

/// Returns a message about a kind of site with a wrong dropout rate, or `None` if all rates are right.
fn wrong_rate(probe: &Probe, steps: &[Masks]) -> Option<String> {
    let mut counts: BTreeMap<&str, (usize, usize, f64)> = BTreeMap::new();
    for ((_, site), mask) in steps.iter().flatten() {
        let count = counts.entry(site_name(*site)).or_insert((0, 0, probe.probability(*site)));
        count.0 += mask.iter().filter(|kept| !**kept).count();
        count.1 += mask.len();
    }
    let wrong = counts.iter().find(|(_, (dropped, all, p))| !is_within_chance(*dropped, *all, *p));
    wrong.map(|(site, (dropped, all, p))| {
        format!("dropout of {site} with p = {p} dropped {dropped} of {all} values")
    })
}

/// Agreement between pairs of mask values.
#[derive(Clone, Copy, Default)]
struct Agreement {
    pairs: f64,
    equal: f64,
    /// Expected number of equal pairs of independent masks, for the first values of the pairs.
    expected: f64,
    variance: f64,
}

impl Agreement {
    fn add(&mut self, p: f64, first: &[bool], second: &[bool]) {
        for (first, second) in first.iter().zip(second) {
            self.pairs += 1.0;
            self.equal += f64::from(u8::from(first == second));
            self.expected += if *first { 1.0 - p } else { p };
            self.variance += p * (1.0 - p);
        }
    }
}

/// Returns a message about masks that depend on each other, or `None` if they are independent: between steps,
/// between sites, and within a mask.
fn dependence(probe: &Probe, steps: &[Masks]) -> Option<String> {
    let mut agreements: BTreeMap<String, Agreement> = BTreeMap::new();
    let mut compare = |what: String, p: f64, first: &[bool], second: &[bool]| {
        agreements.entry(what).or_default().add(p, first, second);
    };
    for (index, step) in steps.iter().enumerate() {
        let all: Vec<_> = step.iter().collect();
        for (at, (key, mask)) in all.iter().enumerate() {
            let (p, name) = (probe.probability(key.1), site_name(key.1));
            if index > 0 {
                compare(format!("{name} and of the previous step"), p, &steps[index - 1][key], mask);
            }
            if index > 1 {
                compare(format!("{name} and of the first step"), p, &steps[0][key], mask);
            }
            compare(format!("neighbors in {name}"), p, mask, &mask[1.min(mask.len())..]);
            // The next mask of the same size: another row, head, layer or block.
            let next = all[at + 1..].iter().find(|(other, mask_of_other)| {
                (name == site_name(other.1) || probe.case.shape.batch() == 1)
                    && probe.probability(other.1) == p
                    && mask_of_other.len() == mask.len()
            });
            if let Some((other, mask_of_other)) = next {
                compare(format!("{name} and {}", site_name(other.1)), p, mask, mask_of_other);
            }
        }
    }
    let dependent =
        agreements.iter().find(|(_, a)| (a.equal - a.expected).abs() > MAX_DEVIATIONS * a.variance.sqrt());
    dependent.map(|(what, Agreement { pairs, equal, expected, .. })| {
        format!(
            "dropout masks of {what} are equal in {equal} of {pairs} values, expected about {expected:.0}"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviations_within_chance_are_allowed() {
        for hits in [200, 230, 170] {
            assert!(is_within_chance(hits, 2000, 0.1), "{hits}");
        }
        for hits in [400, 20, 0] {
            assert!(!is_within_chance(hits, 2000, 0.1), "{hits}");
        }
    }

    #[test]
    fn repeated_masks_are_detected() {
        let probe = Probe::new("train-step/torch-cpu/f32/indicator-b16".parse().unwrap());
        let masks = |mask| Masks::from([((0, Site::Hidden { layer: 0 }), mask)]);
        let random = |seed: u64| -> Vec<bool> {
            let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut next = || {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                !x.is_multiple_of(10)
            };
            (0..2000).map(|_| next()).collect()
        };
        let steps = |seeds: [u64; 3]| seeds.map(|seed| masks(random(seed))).to_vec();
        assert_eq!(wrong_rate(&probe, &steps([1, 2, 3])), None);
        assert_eq!(dependence(&probe, &steps([1, 2, 3])), None);
        assert!(dependence(&probe, &steps([1, 2, 2])).unwrap().contains("previous step"));
        assert!(dependence(&probe, &steps([1, 2, 1])).unwrap().contains("first step"));
        assert!(wrong_rate(&probe, &[masks(vec![true; 2000])]).unwrap().contains("0 of 2000"));
    }
}
