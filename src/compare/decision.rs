//! The decision rule: statistics and verdicts, without a clock.
//!
//! Both sides run in rounds. A round is a fresh process of each side. In it, short blocks of steps run in pairs, one
//! of each side in random order, so that drift and bursts affect both sides.
//!
//! A round is one observation: the difference of the two levels. A level is the mean log time of the faster three
//! quarters of the blocks, because interference only adds time. Processes of one program differ by their memory
//! layout and the state of the machine. So intervals come from the spread between rounds (Student's t of a trimmed
//! mean) and not from the number of steps (Kalibera and Jones, "Rigorous benchmarking in reasonable time", ISMM 2013).
//!
//! A case passes two gates before it is reported as slower or faster. First it is *flagged* on the rounds so far. Then
//! it is *confirmed* on fresh rounds alone, at a level divided by the number of cases and looks (Bonferroni). A
//! difference by chance does not recur.

use serde::{Deserialize, Serialize};

use crate::statistics::{
    REPORT_CONFIDENCE, mean, sorted, std_dev, student_t_two_sided, trim, trimmed_error, trimmed_mean,
};

/// Result of a comparison of one case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    Slower,
    Failed,
    /// Only the base has the case. Older comparisons call this `gone`.
    #[serde(alias = "gone")]
    Removed,
    Inconclusive,
    New,
    Faster,
    Equivalent,
}

impl Verdict {
    /// All verdicts, the most urgent first.
    pub const BY_SEVERITY: [Verdict; 7] = [
        Self::Slower,
        Self::Failed,
        Self::Removed,
        Self::Inconclusive,
        Self::Faster,
        Self::New,
        Self::Equivalent,
    ];

    pub fn id(self) -> &'static str {
        match self {
            Self::Slower => "slower",
            Self::Failed => "failed",
            Self::Removed => "removed",
            Self::Inconclusive => "inconclusive",
            Self::New => "new",
            Self::Faster => "faster",
            Self::Equivalent => "equivalent",
        }
    }
}

/// Parameters of the decision rule.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// `equivalent` means that the interval of the ratio is within 1 ± this threshold.
    pub threshold: f64,
    /// Number of cases in the comparison.
    pub cases: usize,
    /// Rounds after which a case is inconclusive. A flagged case gets twice this number.
    pub max_rounds: usize,
    /// The goal of a case that is compared for its interval and not for a verdict.
    pub precision: Option<Precision>,
}

/// The interval after which a case needs no further round.
#[derive(Clone, Copy, Debug)]
pub struct Precision {
    pub min_rounds: usize,
    /// Largest distance of either end of the 95 % interval from the ratio, as a share of the ratio.
    pub half_width: f64,
}

/// The default of [`Rule::threshold`].
pub const THRESHOLD: f64 = 0.02;

/// Rounds before the first look, and between looks.
pub const FIRST_LOOK: usize = 6;
const ROUNDS_BETWEEN_LOOKS: usize = 3;

/// Two-sided level at which a case is flagged.
const FLAG_ALPHA: f64 = 0.01;
/// Probability of a false positive among all cases at the second gate, over all of its looks.
const FAMILYWISE_ALPHA: f64 = 0.05;
/// Numbers of fresh rounds at which a flagged case is tested again.
const CONFIRM_LOOKS: [usize; 7] = [6, 12, 24, 36, 54, 72, 96];
/// Returns the share of [`FAMILYWISE_ALPHA`] that a look of [`CONFIRM_LOOKS`] spends. It is proportional to the
/// rounds, because most differences are found late.
fn alpha_share(rounds: usize) -> f64 {
    rounds as f64 / CONFIRM_LOOKS.iter().sum::<usize>() as f64
}

/// Confidence level of the interval that is reported with a verdict, and with which a case is flagged.
pub const CONFIDENCE: f64 = 1.0 - FLAG_ALPHA;
/// Confidence level of the interval that must be within the threshold for `equivalent`. It is tested many times, and
/// a wrong claim hides a regression.
const EQUIVALENCE_CONFIDENCE: f64 = 0.998;

/// Returns the level of a side, the mean of the lower three quarters. The upper quarter contains the bursts.
fn level(logs: impl Iterator<Item = f64>) -> f64 {
    let sorted = sorted(logs);
    mean(&sorted[..sorted.len() - sorted.len() / 4])
}

/// Number of groups of the jackknife.
const GROUPS: usize = 8;

/// Observation of a round, and its standard error within the round.
#[derive(Clone, Copy, Debug)]
struct Round {
    /// Level of base, in log time.
    base: f64,
    /// Level of head minus level of base.
    centre: f64,
    error: f64,
}

impl Round {
    /// Computes a round from pairs of log times, base first. The jackknife leaves out groups of neighbours.
    fn from_pairs(pairs: &[(f64, f64)]) -> Self {
        let without = |skip: std::ops::Range<usize>| {
            let rest = || pairs.iter().enumerate().filter(|(i, _)| !skip.contains(i)).map(|(_, p)| p);
            level(rest().map(|p| p.1)) - level(rest().map(|p| p.0))
        };
        let (count, groups) = (pairs.len(), GROUPS.min(pairs.len()));
        let (base, centre) = (level(pairs.iter().map(|p| p.0)), without(0..0));
        if groups < 2 {
            return Self { base, centre, error: 0.0 };
        }
        let each: Vec<f64> =
            (0..groups).map(|i| without(i * count / groups..(i + 1) * count / groups)).collect();
        Self { base, centre, error: std_dev(&each) * (groups as f64 - 1.0) / (groups as f64).sqrt() }
    }
}

fn centres(rounds: &[Round]) -> Vec<f64> {
    rounds.iter().map(|round| round.centre).collect()
}

/// Returns the trimmed mean of the rounds.
fn centre(rounds: &[Round]) -> f64 {
    trimmed_mean(&centres(rounds))
}

/// Returns half the width of the two-sided interval of the trimmed mean at level `alpha`.
///
/// A few rounds can agree by chance, so their spread counts as no less than their standard errors.
fn half_width(rounds: &[Round], alpha: f64) -> f64 {
    let (error, freedom) = trimmed_error(&centres(rounds));
    let n = rounds.len() as f64;
    let own = rounds.iter().map(|r| r.error).sum::<f64>() / n / n.sqrt();
    error.max(own) * student_t_two_sided(freedom, alpha)
}

/// Ratio head / base of step times, with its confidence interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    pub ratio: f64,
    pub ci: [f64; 2],
}

impl Estimate {
    /// Returns the bounds of an inconclusive interval: the largest slowdown and the largest speedup of head as
    /// shares. Returns `None` without an interval.
    pub fn bounds(&self) -> Option<[f64; 2]> {
        let [low, high] = self.ci;
        (low.is_finite() && high.is_finite() && low > 0.0).then_some([high - 1.0, 1.0 - low])
    }

    /// Describes the bounds in words.
    pub fn describe_bounds(&self) -> Option<String> {
        let [slower, faster] = self.bounds()?.map(|share| format!("{:.1} %", 100.0 * share.abs()));
        let [low, high] = self.ci;
        Some(match (low > 1.0, high < 1.0) {
            (true, _) => format!("slower by {faster} to {slower}"),
            (_, true) => format!("faster by {slower} to {faster}"),
            _ => format!("slower by at most {slower}, faster by at most {faster}"),
        })
    }
}

/// Returns the estimate for a log ratio and half the width of its interval.
pub fn estimate(centre: f64, half: f64) -> Estimate {
    Estimate { ratio: centre.exp(), ci: [(centre - half).exp(), (centre + half).exp()] }
}

/// Collects the rounds of one case and decides as early as possible.
#[derive(Clone, Debug)]
pub struct SequentialTest {
    rule: Rule,
    /// Rounds after which a flagged case is inconclusive.
    max_flagged_rounds: usize,
    rounds: Vec<Round>,
    /// The flag of the case. Rounds after it must confirm it.
    flagged: Option<Flag>,
    verdict: Option<Verdict>,
}

#[derive(Clone, Copy, Debug)]
struct Flag {
    from: usize,
    sign: f64,
}

impl SequentialTest {
    pub fn new(rule: Rule) -> Self {
        Self {
            rule,
            max_flagged_rounds: 2 * rule.max_rounds,
            rounds: Vec::new(),
            flagged: None,
            verdict: None,
        }
    }

    /// Adds a round: step times of both sides in any unit, base first.
    pub fn add(&mut self, pairs: &[(f64, f64)]) {
        let logs: Vec<(f64, f64)> = pairs
            .iter()
            .map(|(base, head)| (base.ln(), head.ln()))
            .filter(|(base, head)| base.is_finite() && head.is_finite())
            .collect();
        if logs.is_empty() || self.verdict.is_some() {
            return;
        }
        self.rounds.push(Round::from_pairs(&logs));
        self.look();
    }

    /// Limits the number of rounds, for flagged cases too.
    pub fn limit_rounds(&mut self, rounds: usize) {
        self.rule.max_rounds = self.rule.max_rounds.min(rounds);
        self.max_flagged_rounds = self.rule.max_rounds;
    }

    /// Returns the step times of base and head, in the unit of the pairs, or `None` without rounds.
    ///
    /// They are the geometric means of the levels over the rounds that the ratio's trimmed mean retains, so that
    /// head / base is exactly the estimated ratio.
    pub fn step_times(&self) -> Option<[f64; 2]> {
        let mut rounds: Vec<&Round> = self.counted_rounds().iter().collect();
        rounds.sort_by(|a, b| a.centre.total_cmp(&b.centre));
        let cut = trim(rounds.len());
        let retained = &rounds[cut..rounds.len() - cut];
        let base = mean(&retained.iter().map(|r| r.base).collect::<Vec<_>>());
        let centre = mean(&retained.iter().map(|r| r.centre).collect::<Vec<_>>());
        (!retained.is_empty()).then(|| [base.exp(), (base + centre).exp()])
    }

    /// Applies another rule to earlier rounds, in their order.
    pub fn replay(rule: Rule, rounds: &[[f64; 2]]) -> Self {
        let mut test = Self::new(rule);
        for &[centre, error] in rounds.iter().filter(|r| r.iter().all(|v| v.is_finite())) {
            if test.verdict.is_none() {
                test.rounds.push(Round { base: f64::NAN, centre, error });
                test.look();
            }
        }
        test.close();
        test
    }

    /// Returns the log ratio and standard error of each round, for [`SequentialTest::replay`].
    pub fn observations(&self) -> Vec<[f64; 2]> {
        self.rounds.iter().map(|round| [round.centre, round.error]).collect()
    }

    pub fn rounds(&self) -> usize {
        self.rounds.len()
    }

    /// Returns the verdict, or `None` while the case is open.
    pub fn verdict(&self) -> Option<Verdict> {
        self.verdict
    }

    /// Returns the estimate from the rounds so far, or `None` without rounds. A confirmed difference is estimated
    /// from the confirming rounds, because the earlier ones were selected for a large difference.
    pub fn estimate(&self) -> Option<Estimate> {
        self.estimate_at(CONFIDENCE)
    }

    /// Returns [`Self::estimate`] with an interval of another confidence level.
    pub fn estimate_at(&self, confidence: f64) -> Option<Estimate> {
        let rounds = self.counted_rounds();
        (!rounds.is_empty()).then(|| estimate(centre(rounds), half_width(rounds, 1.0 - confidence)))
    }

    /// Returns the step times of base and head in each round, in the unit of the pairs.
    pub fn round_times(&self) -> Vec<[f64; 2]> {
        self.counted_rounds().iter().map(|r| [r.base.exp(), (r.base + r.centre).exp()]).collect()
    }

    fn counted_rounds(&self) -> &[Round] {
        let confirmed = matches!(self.verdict, Some(Verdict::Slower | Verdict::Faster));
        &self.rounds[self.flagged.filter(|_| confirmed).map_or(0, |flag| flag.from)..]
    }

    /// Returns the smallest log ratio that is reported, two thirds of the threshold. Two builds of one source differ
    /// by up to half of the default threshold through the layout of code and data.
    fn min_difference(&self) -> f64 {
        (1.0 + self.rule.threshold * 2.0 / 3.0).ln()
    }

    fn look(&mut self) {
        let count = self.rounds.len();
        if let Some(precision) = self.rule.precision {
            let narrow = || half_width(&self.rounds, 1.0 - REPORT_CONFIDENCE) <= precision.half_width.ln_1p();
            if count >= self.rule.max_rounds || count >= precision.min_rounds && narrow() {
                self.verdict = Some(Verdict::Inconclusive);
            }
            return;
        }
        if let Some(flag) = self.flagged {
            let fresh = &self.rounds[flag.from..];
            if CONFIRM_LOOKS.contains(&fresh.len()) {
                // One-sided, since the sign is known.
                let level = 2.0 * FAMILYWISE_ALPHA * alpha_share(fresh.len()) / self.rule.cases.max(1) as f64;
                let excess = centre(fresh) * flag.sign;
                if excess - half_width(fresh, level) > 0.0 && excess > self.min_difference() {
                    self.verdict = Some(if flag.sign > 0.0 { Verdict::Slower } else { Verdict::Faster });
                    return;
                }
                // The difference did not recur: all rounds count again.
                if fresh.len() >= CONFIRM_LOOKS[CONFIRM_LOOKS.len() - 1] || excess < 0.0 {
                    self.flagged = None;
                }
            }
        }
        if self.flagged.is_none() && count >= FIRST_LOOK && count.is_multiple_of(ROUNDS_BETWEEN_LOOKS) {
            let found = centre(&self.rounds);
            if found.abs() > self.min_difference() && half_width(&self.rounds, FLAG_ALPHA) < found.abs() {
                self.flagged = Some(Flag { from: count, sign: found.signum() });
            } else {
                let half = half_width(&self.rounds, 1.0 - EQUIVALENCE_CONFIDENCE);
                let limit = (1.0 + self.rule.threshold).ln();
                if found + half < limit && found - half > -limit {
                    self.verdict = Some(Verdict::Equivalent);
                    return;
                }
            }
        }
        // A flagged case needs more rounds to be confirmed.
        if count >= if self.flagged.is_some() { self.max_flagged_rounds } else { self.rule.max_rounds } {
            self.verdict = Some(Verdict::Inconclusive);
        }
    }

    /// Closes the case and returns its verdict: `Inconclusive` if it was open.
    pub fn close(&mut self) -> Verdict {
        *self.verdict.get_or_insert(Verdict::Inconclusive)
    }
}

#[cfg(test)]
#[path = "decision_tests.rs"]
mod tests;
