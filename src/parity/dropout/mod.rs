//! Checks of dropout: its rate, its scale and its independence.
//!
//! [`Probe`] reads the dropout masks of several steps from gradients. The rate must match the configuration, and the
//! masks must be independent. The reference repeats some steps with the masks, and loss and gradients must agree.
//! [`NoiseProbe`] compares the variance of the gradients between steps, at the number of tokens that is timed.

mod noise;
mod probe;

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::tolerance::expected_with_masks;
use super::{Mismatch, compare_tensors};
use crate::backend::{Accumulation, Backend, LoadedCase};
use crate::reference::Site;
use crate::suite::Case;
pub use noise::{NoiseProbe, NoiseReference};
pub use probe::{Masks, Probe};

/// Largest deviation of a count in standard deviations. Chance exceeds it once in 500 million, and a run makes about
/// 10,000 comparisons.
const MAX_DEVIATIONS: f64 = 6.0;
/// Shorter masks are not compared with each other: their counts are far from a normal distribution.
const MIN_COMPARED: usize = 16;

/// Checks the dropout of a case.
///
/// # Errors
/// Returns an error if the backend fails.
pub fn check(backend: &dyn Backend, case: Case, reference: &mut NoiseReference) -> Result<Option<Mismatch>> {
    let is_precompiled = backend.is_precompiled(case.method.variant);
    // Another shape is another package, which takes about a minute.
    let several = if is_precompiled { None } else { Probe::of_several_positions(case) };
    for probe in [Probe::new(case)].into_iter().chain(several) {
        let loaded = backend.load(&probe.fixture());
        let mut loaded = loaded.with_context(|| format!("{} could not be loaded", probe.case))?;
        let mismatch = check_loaded(&probe, loaded.as_mut(), backend.accumulation())?;
        if mismatch.is_some() {
            return Ok(mismatch);
        }
    }
    for probe in NoiseProbe::all(case, is_precompiled) {
        let fixture = probe.fixture();
        let mut loaded = backend.load(&fixture).with_context(|| format!("{case} could not be loaded"))?;
        let mismatch = probe.check(loaded.as_mut(), reference, &fixture)?;
        if mismatch.is_some() {
            return Ok(mismatch);
        }
    }
    Ok(None)
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
        Site::Head { index: 0 } => "the first output head",
        Site::Head { .. } => "the second output head",
    }
}

/// Returns a message about a kind of site with a wrong dropout rate, or `None` if all rates are right.
fn wrong_rate(probe: &Probe, steps: &[Masks]) -> Option<String> {
    let mut counts: BTreeMap<&str, (usize, usize, f64)> = BTreeMap::new();
    for ((_, site), mask) in steps.iter().flatten() {
        let count = counts.entry(site_name(*site)).or_insert((0, 0, probe.zero_probability(*site)));
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

/// Agreements by the pairs that are compared.
#[derive(Default)]
struct Agreements(BTreeMap<String, Agreement>);

impl Agreements {
    /// Compares two masks of independent values that are dropped with probability `p`.
    fn compare(&mut self, pair: impl FnOnce() -> String, p: f64, first: &[bool], second: &[bool]) {
        if first.len().min(second.len()) >= MIN_COMPARED {
            self.0.entry(pair()).or_default().add(p, first, second);
        }
    }

    /// Compares values of one mask: neighbors, halves and quarters.
    fn compare_within(&mut self, name: &str, p: f64, mask: &[bool]) {
        for (parts, distance) in [("neighbors", 1), ("halves", mask.len() / 2), ("quarters", mask.len() / 4)]
        {
            // A causal row at the beginning of a sample can see no key that is read.
            if distance > 0 && distance < mask.len() {
                self.compare(|| format!("{parts} of {name}"), p, mask, &mask[distance..]);
            }
        }
    }
}

/// Returns a message about masks that depend on each other, or `None` if they are independent: between steps,
/// between sites, samples, layers and heads, and within a mask.
fn dependence(probe: &Probe, steps: &[Masks]) -> Option<String> {
    let mut agreements = Agreements::default();
    for (index, step) in steps.iter().enumerate() {
        for (key, mask) in step {
            let (row, site) = *key;
            let (p, name) = (probe.zero_probability(site), site_name(site));
            if index > 0 {
                agreements.compare(
                    || format!("{name} and of the previous step"),
                    p,
                    &steps[index - 1][key],
                    mask,
                );
            }
            if index > 1 {
                agreements.compare(|| format!("{name} and of the first step"), p, &steps[0][key], mask);
            }
            agreements.compare_within(name, p, mask);
            let next_sample = probe.row_of_next_sample(row);
            if let Some(other) = step.get(&(next_sample, site)).filter(|_| next_sample != row) {
                agreements.compare(|| format!("{name} and of the next sample"), p, mask, other);
            }
            // Other masks of the same row and size: of a layer, a head or another kind of site.
            for ((_, other), mask_of_other) in
                step.range((row, Site::Embedding)..).take_while(|((r, _), _)| *r == row)
            {
                if *other > site && mask_of_other.len() == mask.len() && probe.zero_probability(*other) == p {
                    agreements.compare(|| format!("{site:?} and {other:?}"), p, mask, mask_of_other);
                }
            }
        }
    }
    let is_dependent = |a: &Agreement| (a.equal - a.expected).abs() > MAX_DEVIATIONS * a.variance.sqrt();
    let dependent = agreements.0.iter().find(|(_, agreement)| is_dependent(agreement));
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
