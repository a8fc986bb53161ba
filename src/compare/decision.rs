//! Whether one side is slower than the other: statistics and verdicts, without a clock.
//!
//! Both sides run in rounds. A round is a fresh process for each side, and in it short
//! blocks of steps in pairs, one of each side in random order, so that drift and bursts
//! hit both. A round counts as one observation: the difference of the sides' levels, each
//! the mean log time of the faster three quarters of its blocks, since disturbance only
//! ever adds time. Processes of the same program differ, by where memory lies and
//! what the machine does meanwhile, so intervals come from the spread between rounds
//! (Student's t of a trimmed mean), never from the number of steps (Kalibera and Jones, "Rigorous
//! benchmarking in reasonable time", ISMM 2013).
//!
//! A case passes two gates before it is called slower or faster: it is *flagged* on the
//! rounds so far, and then *confirmed* on fresh rounds alone, at a level divided by the
//! number of cases and of looks (Bonferroni). What made it look slow by chance does not recur.

use serde::{Deserialize, Serialize};

use crate::statistics::{mean, sorted, std_dev, student_t_two_sided};

/// What is said of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    Slower,
    Failed,
    Gone,
    Inconclusive,
    New,
    Faster,
    Equivalent,
}

impl Verdict {
    /// From what needs attention most.
    pub const BY_SEVERITY: [Verdict; 7] = [
        Self::Slower,
        Self::Failed,
        Self::Gone,
        Self::Inconclusive,
        Self::Faster,
        Self::New,
        Self::Equivalent,
    ];

    pub fn id(self) -> &'static str {
        match self {
            Self::Slower => "slower",
            Self::Failed => "failed",
            Self::Gone => "gone",
            Self::Inconclusive => "inconclusive",
            Self::New => "new",
            Self::Faster => "faster",
            Self::Equivalent => "equivalent",
        }
    }
}

/// How a comparison decides.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// `equivalent` means a ratio certainly within 1 ± this.
    pub threshold: f64,
    /// How many cases are judged together.
    pub cases: usize,
    /// Rounds after which a case stays inconclusive; twice as many for one that is flagged.
    pub most: usize,
}

/// The default of [`Rule::threshold`].
pub const THRESHOLD: f64 = 0.02;

/// Rounds before the first look, and between looks.
pub const FIRST_LOOK: usize = 6;
const BETWEEN: usize = 3;

/// Two-sided level at which a case is flagged.
const FLAG: f64 = 0.01;
/// Chance of one wrong call among all cases at the second gate alone, over all of its looks.
const FAMILY: f64 = 0.05;
/// Fresh rounds at which a flag is looked at again.
const CONFIRM: [usize; 7] = [6, 12, 24, 36, 54, 72, 96];
/// The part of [`FAMILY`] that a look of [`CONFIRM`] spends, in proportion to its rounds: of
/// what is found at all, most is found late.
fn spent(rounds: usize) -> f64 {
    rounds as f64 / CONFIRM.iter().sum::<usize>() as f64
}

/// Level of the interval that is shown.
pub const CONFIDENCE: f64 = 0.99;
/// Level of the interval that must lie within the threshold for `equivalent`: looked at many
/// times, and the claim that hides a regression if it is wrong.
const SAME: f64 = 0.998;

/// The level of a side: the mean of the lower three quarters. A burst only ever adds time,
/// and the quarter above holds the bursts.
fn level(logs: impl Iterator<Item = f64>) -> f64 {
    let sorted = sorted(logs);
    mean(&sorted[..sorted.len() - sorted.len() / 4])
}

/// Groups of pairs that are left out in turn to see how exact a round is.
const GROUPS: usize = 8;

/// A round's observation, and how exact it can be at best.
#[derive(Clone, Copy, Debug)]
struct Round {
    centre: f64,
    error: f64,
}

impl Round {
    /// From log times in pairs, base first. The error is the jackknife's, which leaves out
    /// neighbours together.
    fn of(pairs: &[(f64, f64)]) -> Self {
        let without = |skip: std::ops::Range<usize>| {
            let kept = || pairs.iter().enumerate().filter(|(i, _)| !skip.contains(i)).map(|(_, p)| p);
            level(kept().map(|p| p.1)) - level(kept().map(|p| p.0))
        };
        let (count, groups) = (pairs.len(), GROUPS.min(pairs.len()));
        let centre = without(0..0);
        if groups < 2 {
            return Self { centre, error: 0.0 };
        }
        let each: Vec<f64> =
            (0..groups).map(|i| without(i * count / groups..(i + 1) * count / groups)).collect();
        Self { centre, error: std_dev(&each) * (groups as f64 - 1.0) / (groups as f64).sqrt() }
    }
}

/// How many rounds at either end count no more than the next: now and then a process
/// is a third slower for as long as it lives.
fn trim(count: usize) -> usize {
    count / 8
}

fn sorted_centres(rounds: &[Round]) -> Vec<f64> {
    sorted(rounds.iter().map(|r| r.centre))
}

/// The trimmed mean of the rounds.
fn centre(rounds: &[Round]) -> f64 {
    let cut = trim(rounds.len());
    mean(&sorted_centres(rounds)[cut..rounds.len() - cut])
}

/// Half the width of the two-sided interval of the trimmed mean, by Student's t with the
/// spread of the winsorized rounds (Yuen, "The two-sample trimmed t for unequal population
/// variances", Biometrika 1974; here for one sample). Few rounds can agree by chance, so
/// their spread counts as no less than their own errors.
fn half_width(rounds: &[Round], outside: f64) -> f64 {
    if rounds.len() < 2 {
        return f64::INFINITY;
    }
    let (n, cut) = (rounds.len(), trim(rounds.len()));
    let mut centres = sorted_centres(rounds);
    let (low, high) = (centres[cut], centres[n - 1 - cut]);
    centres.iter_mut().for_each(|c| *c = c.clamp(low, high));
    let (n, kept) = (n as f64, (n - 2 * cut) as f64);
    let error = std_dev(&centres) * ((n - 1.0) / (kept * (kept - 1.0))).sqrt();
    let own = rounds.iter().map(|r| r.error).sum::<f64>() / n / n.sqrt();
    error.max(own) * student_t_two_sided(kept - 1.0, outside)
}

/// What was found of a case: the ratio head/base of step times with its 99 % interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    pub ratio: f64,
    pub ci: [f64; 2],
}

impl Estimate {
    /// What an interval says where it decides nothing: by how much the head can be slower, and
    /// faster, at most; None of no interval.
    pub fn bounds(&self) -> Option<[f64; 2]> {
        let [low, high] = self.ci;
        (low.is_finite() && high.is_finite() && low > 0.0).then_some([high - 1.0, 1.0 - low])
    }

    /// The bounds in words.
    pub fn bound(&self) -> Option<String> {
        let [slower, faster] = self.bounds()?.map(|share| format!("{:.1} %", 100.0 * share.abs()));
        let [low, high] = self.ci;
        Some(match (low > 1.0, high < 1.0) {
            (true, _) => format!("slower by {faster} to {slower}"),
            (_, true) => format!("faster by {slower} to {faster}"),
            _ => format!("slower by at most {slower}, faster by at most {faster}"),
        })
    }
}

pub fn estimate(centre: f64, half: f64) -> Estimate {
    Estimate { ratio: centre.exp(), ci: [(centre - half).exp(), (centre + half).exp()] }
}

/// Collects the rounds of one case and decides as early as it can.
#[derive(Clone, Debug)]
pub struct SequentialTest {
    rule: Rule,
    /// Rounds after which a flag stays inconclusive.
    most_flagged: usize,
    rounds: Vec<Round>,
    /// Where a flag arose: the rounds from here on must confirm it.
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
        Self { rule, most_flagged: 2 * rule.most, rounds: Vec::new(), flagged: None, verdict: None }
    }

    /// Adds a round: the step times of both sides, base first, in any unit.
    pub fn add(&mut self, pairs: &[(f64, f64)]) {
        let logs: Vec<(f64, f64)> = pairs
            .iter()
            .map(|(base, head)| (base.ln(), head.ln()))
            .filter(|(base, head)| base.is_finite() && head.is_finite())
            .collect();
        if logs.is_empty() || self.verdict.is_some() {
            return;
        }
        self.rounds.push(Round::of(&logs));
        self.look();
    }

    /// Fewer rounds at most than the rule says, flagged or not.
    pub fn limit_rounds(&mut self, rounds: usize) {
        self.rule.most = self.rule.most.min(rounds);
        self.most_flagged = self.rule.most;
    }

    /// Judges rounds that are over by another rule, as if they came one after the other.
    pub fn replay(rule: Rule, rounds: &[[f64; 2]]) -> Self {
        let mut judge = Self::new(rule);
        for &[centre, error] in rounds.iter().filter(|r| r.iter().all(|v| v.is_finite())) {
            if judge.verdict.is_none() {
                judge.rounds.push(Round { centre, error });
                judge.look();
            }
        }
        judge.close();
        judge
    }

    /// Each round's log ratio and its error, for [`Judge::again`].
    pub fn observations(&self) -> Vec<[f64; 2]> {
        self.rounds.iter().map(|round| [round.centre, round.error]).collect()
    }

    pub fn rounds(&self) -> usize {
        self.rounds.len()
    }

    /// The verdict, as soon as it stands.
    pub fn verdict(&self) -> Option<Verdict> {
        self.verdict
    }

    /// What the rounds so far say; None without any. A confirmed call is estimated on the
    /// rounds that confirmed it, since those before were chosen for looking extreme.
    pub fn estimate(&self) -> Option<Estimate> {
        let called = matches!(self.verdict, Some(Verdict::Slower | Verdict::Faster));
        let from = self.flagged.filter(|_| called).map_or(0, |s| s.from);
        let rounds = &self.rounds[from..];
        (!rounds.is_empty()).then(|| estimate(centre(rounds), half_width(rounds, 1.0 - CONFIDENCE)))
    }

    /// Differences below this are not called: two thirds of the threshold. Two builds of one
    /// source differ by up to about half of the default one, by where code and data lie.
    fn floor(&self) -> f64 {
        (1.0 + self.rule.threshold * 2.0 / 3.0).ln()
    }

    fn look(&mut self) {
        let count = self.rounds.len();
        if let Some(flag) = self.flagged {
            let fresh = &self.rounds[flag.from..];
            if CONFIRM.contains(&fresh.len()) {
                // One-sided, since the sign is known.
                let level = 2.0 * FAMILY * spent(fresh.len()) / self.rule.cases.max(1) as f64;
                let excess = centre(fresh) * flag.sign;
                if excess - half_width(fresh, level) > 0.0 && excess > self.floor() {
                    self.verdict = Some(if flag.sign > 0.0 { Verdict::Slower } else { Verdict::Faster });
                    return;
                }
                // It did not recur: back to all rounds.
                if fresh.len() >= CONFIRM[CONFIRM.len() - 1] || excess < 0.0 {
                    self.flagged = None;
                }
            }
        }
        if self.flagged.is_none() && count >= FIRST_LOOK && count.is_multiple_of(BETWEEN) {
            let found = centre(&self.rounds);
            if found.abs() > self.floor() && half_width(&self.rounds, FLAG) < found.abs() {
                self.flagged = Some(Flag { from: count, sign: found.signum() });
            } else {
                let half = half_width(&self.rounds, 1.0 - SAME);
                let limit = (1.0 + self.rule.threshold).ln();
                if found + half < limit && found - half > -limit {
                    self.verdict = Some(Verdict::Equivalent);
                    return;
                }
            }
        }
        // A flag is followed up: without the rounds for it, it would stay inconclusive.
        if count >= if self.flagged.is_some() { self.most_flagged } else { self.rule.most } {
            self.verdict = Some(Verdict::Inconclusive);
        }
    }

    /// The verdict where no more rounds will come.
    pub fn close(&mut self) -> Verdict {
        *self.verdict.get_or_insert(Verdict::Inconclusive)
    }
}

#[cfg(test)]
#[path = "decision_tests.rs"]
mod tests;
