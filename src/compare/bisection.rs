//! The search for the first slower side among several, such as the releases of a framework.

use anyhow::Result;

/// Result of one comparison with the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Slower,
    NotSlower,
    /// The comparison was inconclusive, or a side failed.
    Unknown,
}

/// Result of a search. Sides are counted from the base, which is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The first slower side.
    Found(usize),
    /// The last side is not slower.
    NoneSlower,
    /// The side `at` could not be decided. The first slower one comes after `last_good`; if `first_slow` is a side, it
    /// is at most that one.
    Undecided { at: usize, last_good: usize, first_slow: Option<usize> },
}

/// Finds the first of `count` sides that is slower than side 0, if all later sides are slower too. `compare` receives a
/// side and compares it with side 0.
///
/// It halves the range, so it compares at most ⌈log₂ count⌉ times.
///
/// # Errors
/// Returns the first error of a comparison.
pub fn first_slower(count: usize, mut compare: impl FnMut(usize) -> Result<Answer>) -> Result<Outcome> {
    // The answer is above `low` and at most `high`. At `count` there is none.
    let (mut low, mut high) = (0, count);
    while high - low > 1 {
        let middle = usize::midpoint(low, high);
        match compare(middle)? {
            Answer::Slower => high = middle,
            Answer::NotSlower => low = middle,
            Answer::Unknown => {
                let first_slow = (high < count).then_some(high);
                return Ok(Outcome::Undecided { at: middle, last_good: low, first_slow });
            }
        }
    }
    Ok(if high < count { Outcome::Found(high) } else { Outcome::NoneSlower })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_first_slower_side_is_found_in_logarithmic_time() {
        for count in 2..40usize {
            let most = (count as f64).log2().ceil() as usize;
            // At `count`, no side is slower.
            for first in 1..=count {
                let mut compared = 0;
                let outcome = first_slower(count, |side| {
                    assert!(0 < side && side < count);
                    compared += 1;
                    Ok(if side >= first { Answer::Slower } else { Answer::NotSlower })
                });
                let expected = if first < count { Outcome::Found(first) } else { Outcome::NoneSlower };
                assert_eq!(outcome.unwrap(), expected);
                assert!(compared <= most, "{compared} comparisons of {count} sides");
            }
        }
    }

    #[test]
    fn an_undecided_comparison_ends_the_search_with_its_bounds() {
        let outcome = first_slower(9, |side| {
            Ok(match side {
                4 => Answer::Slower,
                _ => Answer::Unknown,
            })
        });
        assert_eq!(outcome.unwrap(), Outcome::Undecided { at: 2, last_good: 0, first_slow: Some(4) });
        let outcome = first_slower(5, |_| Ok(Answer::Unknown));
        assert_eq!(outcome.unwrap(), Outcome::Undecided { at: 2, last_good: 0, first_slow: None });
    }
}
