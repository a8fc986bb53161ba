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
//! A case passes two gates before it is called slower or faster: it is *suspected* on the
//! rounds so far, and then *confirmed* on fresh rounds alone, at a level divided by the
//! number of cases and of looks (Bonferroni). What made it look slow by chance does not recur.

use serde::Serialize;
use statrs::distribution::{ContinuousCDF, StudentsT};

/// What is said of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    Slower,
    Failed,
    Gone,
    Unclear,
    New,
    Faster,
    Same,
}

impl Verdict {
    /// From what needs attention most.
    pub const BY_SEVERITY: [Verdict; 7] =
        [Self::Slower, Self::Failed, Self::Gone, Self::Unclear, Self::Faster, Self::New, Self::Same];

    pub fn id(self) -> &'static str {
        match self {
            Self::Slower => "slower",
            Self::Failed => "failed",
            Self::Gone => "gone",
            Self::Unclear => "unclear",
            Self::New => "new",
            Self::Faster => "faster",
            Self::Same => "same",
        }
    }
}

/// How a comparison decides.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// `same` means a ratio certainly within 1 ± this.
    pub threshold: f64,
    /// How many cases are judged together.
    pub cases: usize,
    /// Rounds after which a case stays unclear; twice as many for one that is suspected.
    pub most: usize,
}

/// The default of [`Rule::threshold`].
pub const THRESHOLD: f64 = 0.02;

/// Rounds before the first look, and between looks.
pub const FIRST_LOOK: usize = 6;
const BETWEEN: usize = 3;

/// Two-sided level at which a case is suspected.
const SUSPECT: f64 = 0.01;
/// Chance of one wrong call among all cases at the second gate alone, over all of its looks.
const FAMILY: f64 = 0.05;
/// Fresh rounds at which a suspicion is looked at again.
const CONFIRM: [usize; 7] = [6, 12, 24, 36, 54, 72, 96];
/// The part of [`FAMILY`] that a look of [`CONFIRM`] spends, in proportion to its rounds: of
/// what is found at all, most is found late.
fn spent(rounds: usize) -> f64 {
    rounds as f64 / CONFIRM.iter().sum::<usize>() as f64
}

/// Level of the interval that is shown.
const INTERVAL: f64 = 0.99;
/// Level of the interval that must lie within the threshold for `same`: looked at many
/// times, and the claim that hides a regression if it is wrong.
const SAME: f64 = 0.998;

fn sorted(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The value in the middle, the upper of two; NaN of none.
pub fn median(values: &[f64]) -> f64 {
    sorted(values.iter().copied()).get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The value that a quarter lies below; NaN of none.
pub fn lower_quartile(values: &[f64]) -> f64 {
    sorted(values.iter().copied()).get(values.len() / 4).copied().unwrap_or(f64::NAN)
}

/// Mean of the middle half: nearly as precise as the mean in quiet, and blind to the
/// quarter of the values that bursts spoil on either end.
///
/// # Panics
/// Where there are no values.
pub fn midmean(values: &[f64]) -> f64 {
    let sorted = sorted(values.iter().copied());
    let cut = sorted.len() / 4;
    let middle = &sorted[cut..sorted.len() - cut];
    middle.iter().sum::<f64>() / middle.len() as f64
}

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
        Self { centre, error: spread(&each) * (groups as f64 - 1.0) / (groups as f64).sqrt() }
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
    let error = spread(&centres) * ((n - 1.0) / (kept * (kept - 1.0))).sqrt();
    let own = rounds.iter().map(|r| r.error).sum::<f64>() / n / n.sqrt();
    error.max(own) * quantile(kept - 1.0, outside)
}

fn quantile(freedom: f64, outside: f64) -> f64 {
    StudentsT::new(0.0, 1.0, freedom).expect("positive degrees").inverse_cdf(1.0 - outside / 2.0)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Standard deviation of a sample.
pub fn spread(values: &[f64]) -> f64 {
    let centre = mean(values);
    let squares: f64 = values.iter().map(|v| (v - centre).powi(2)).sum();
    (squares / (values.len() as f64 - 1.0)).sqrt()
}

/// What was found of a case: the ratio head/base of step times with its 99 % interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    pub ratio: f64,
    pub ci: [f64; 2],
}

fn estimate(centre: f64, half: f64) -> Estimate {
    Estimate { ratio: centre.exp(), ci: [(centre - half).exp(), (centre + half).exp()] }
}

/// Collects the rounds of one case and decides as early as it can.
#[derive(Clone, Debug)]
pub struct Judge {
    rule: Rule,
    /// Rounds after which a suspicion stays unclear.
    most_suspected: usize,
    rounds: Vec<Round>,
    /// Where a suspicion arose: the rounds from here on must confirm it.
    suspected: Option<Suspicion>,
    verdict: Option<Verdict>,
}

#[derive(Clone, Copy, Debug)]
struct Suspicion {
    from: usize,
    sign: f64,
}

impl Judge {
    pub fn new(rule: Rule) -> Self {
        Self { rule, most_suspected: 2 * rule.most, rounds: Vec::new(), suspected: None, verdict: None }
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

    /// Fewer rounds at most than the rule says, suspected or not.
    pub fn at_most(&mut self, rounds: usize) {
        self.rule.most = self.rule.most.min(rounds);
        self.most_suspected = self.rule.most;
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
        let from = self.suspected.filter(|_| called).map_or(0, |s| s.from);
        let rounds = &self.rounds[from..];
        (!rounds.is_empty()).then(|| estimate(centre(rounds), half_width(rounds, 1.0 - INTERVAL)))
    }

    /// Differences below this are not called: two thirds of the threshold. Two builds of one
    /// source differ by up to about half of the default one, by where code and data lie.
    fn floor(&self) -> f64 {
        (1.0 + self.rule.threshold * 2.0 / 3.0).ln()
    }

    fn look(&mut self) {
        let count = self.rounds.len();
        if let Some(suspicion) = self.suspected {
            let fresh = &self.rounds[suspicion.from..];
            if CONFIRM.contains(&fresh.len()) {
                // One-sided, since the sign is known.
                let level = 2.0 * FAMILY * spent(fresh.len()) / self.rule.cases.max(1) as f64;
                let excess = centre(fresh) * suspicion.sign;
                if excess - half_width(fresh, level) > 0.0 && excess > self.floor() {
                    self.verdict = Some(if suspicion.sign > 0.0 { Verdict::Slower } else { Verdict::Faster });
                    return;
                }
                // It did not recur: back to all rounds.
                if fresh.len() >= CONFIRM[CONFIRM.len() - 1] || excess < 0.0 {
                    self.suspected = None;
                }
            }
        }
        if self.suspected.is_none() && count >= FIRST_LOOK && count.is_multiple_of(BETWEEN) {
            let found = centre(&self.rounds);
            if found.abs() > self.floor() && half_width(&self.rounds, SUSPECT) < found.abs() {
                self.suspected = Some(Suspicion { from: count, sign: found.signum() });
            } else {
                let half = half_width(&self.rounds, 1.0 - SAME);
                let limit = (1.0 + self.rule.threshold).ln();
                if found + half < limit && found - half > -limit {
                    self.verdict = Some(Verdict::Same);
                    return;
                }
            }
        }
        // A suspicion is followed up: without the rounds for it, it would stay unclear.
        if count >= if self.suspected.is_some() { self.most_suspected } else { self.rule.most } {
            self.verdict = Some(Verdict::Unclear);
        }
    }

    /// The verdict where no more rounds will come.
    pub fn close(&mut self) -> Verdict {
        *self.verdict.get_or_insert(Verdict::Unclear)
    }
}

/// The samples of a run that is over: one process, so its spread between processes is
/// taken from how its own level wandered.
#[derive(Clone, Debug, PartialEq)]
pub struct Past {
    /// Log of the median step time.
    pub level: f64,
    /// Standard deviation of the level between consecutive stretches of the run.
    pub wander: f64,
}

/// Stretches that a run is cut into.
const STRETCHES: usize = 5;

/// Reads a run's samples, in seconds a step, in their order; None of fewer than ten.
pub fn past(samples: &[f64]) -> Option<Past> {
    if samples.len() < 2 * STRETCHES || samples.iter().any(|s| !s.is_finite() || *s <= 0.0) {
        return None;
    }
    let logs: Vec<f64> = samples.iter().map(|s| s.ln()).collect();
    let each = logs.len() / STRETCHES;
    let levels: Vec<f64> = logs.chunks(each).take(STRETCHES).map(midmean).collect();
    Some(Past { level: midmean(&logs), wander: spread(&levels) })
}

/// Compares a past run with rounds of another side, or with another past run: `head` is
/// one log level a round. The band is that of predicting one more process.
pub fn against_past(base: &Past, head: &[f64], threshold: f64) -> (Verdict, Estimate) {
    let count = head.len() as f64;
    let (now, freedom) =
        if head.len() < 2 { (0.0, STRETCHES as f64 - 1.0) } else { (spread(head), count - 1.0) };
    let noise = (now.powi(2) * (1.0 + 1.0 / count) + base.wander.powi(2)).sqrt();
    judged(mean(head) - base.level, noise * quantile(freedom, 1.0 - INTERVAL), threshold)
}

/// Compares two past runs.
pub fn pasts(base: &Past, head: &Past, threshold: f64) -> (Verdict, Estimate) {
    let noise = base.wander.hypot(head.wander);
    let freedom = 2.0 * (STRETCHES as f64 - 1.0);
    judged(head.level - base.level, noise * quantile(freedom, 1.0 - INTERVAL), threshold)
}

fn judged(centre: f64, half: f64, threshold: f64) -> (Verdict, Estimate) {
    let limit = (1.0 + threshold).ln();
    let verdict = if centre - half > 0.0 && centre > limit {
        Verdict::Slower
    } else if centre + half < 0.0 && centre < -limit {
        Verdict::Faster
    } else if centre + half < limit && centre - half > -limit {
        Verdict::Same
    } else {
        Verdict::Unclear
    };
    (verdict, estimate(centre, half))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    type Pairs = Vec<(f64, f64)>;

    /// What the rule's constants were chosen by.
    const RECORDED: &str = include_str!("compare/recorded-noise.txt");
    /// What no constant was chosen by: recorded later, and never looked at but by these tests.
    const HELD_OUT: &str = include_str!("compare/held-out-noise.txt");

    /// Real noise of the same program on both sides: cases, rounds, pairs of times.
    fn recorded(text: &str) -> Vec<Vec<Pairs>> {
        let mut cases: Vec<Vec<Pairs>> = Vec::new();
        for line in text.lines() {
            match line.strip_prefix("# ") {
                Some(heading) if heading.contains('/') && !heading.contains(' ') => cases.push(Vec::new()),
                Some(_) => {}
                None => {
                    let times: Vec<f64> =
                        line.split(' ').map(|v| (v.parse::<f64>().unwrap() * 1e-3).exp()).collect();
                    cases.last_mut().unwrap().push(times.chunks(2).map(|p| (p[0], p[1])).collect());
                }
            }
        }
        cases
    }

    struct Dice(ChaCha8Rng);

    impl Dice {
        fn new(seed: u64) -> Self {
            Self(ChaCha8Rng::seed_from_u64(seed))
        }

        fn uniform(&mut self) -> f64 {
            f64::from(self.0.next_u32()) / f64::from(u32::MAX)
        }

        fn below(&mut self, n: usize) -> usize {
            (self.uniform() * n as f64) as usize % n
        }

        /// A sum of uniforms: near enough to a normal deviate.
        fn normal(&mut self) -> f64 {
            (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
        }
    }

    const RULE: Rule = Rule { threshold: THRESHOLD, cases: 30, most: 60 };
    const FINE: Rule = Rule { threshold: 0.01, ..RULE };

    /// Replays rounds through a judge, with a slowdown of the head added.
    fn judge(rule: Rule, mut round: impl FnMut() -> Pairs, slowdown: f64) -> Judge {
        let mut judge = Judge::new(rule);
        while judge.verdict().is_none() {
            let pairs: Pairs = round().iter().map(|(a, b)| (*a, b * (1.0 + slowdown))).collect();
            judge.add(&pairs);
        }
        judge
    }

    fn swapped(pairs: &Pairs) -> Pairs {
        pairs.iter().map(|(a, b)| (*b, *a)).collect()
    }

    /// Replays recorded rounds in random order, either side as the base.
    fn replay(cases: &[Vec<Pairs>], dice: &mut Dice, rule: Rule, slowdown: f64) -> Judge {
        let rounds = &cases[dice.below(cases.len())];
        judge(
            rule,
            || {
                let round = &rounds[dice.below(rounds.len())];
                if dice.uniform() < 0.5 { swapped(round) } else { round.clone() }
            },
            slowdown,
        )
    }

    fn share(verdicts: &[Verdict], wanted: Verdict) -> f64 {
        verdicts.iter().filter(|v| **v == wanted).count() as f64 / verdicts.len() as f64
    }

    fn replays(text: &str, seed: u64, trials: usize, rule: Rule, slowdown: f64) -> Vec<Verdict> {
        let (cases, mut dice) = (recorded(text), Dice::new(seed));
        (0..trials).map(|_| replay(&cases, &mut dice, rule, slowdown).verdict().unwrap()).collect()
    }

    #[test]
    fn the_same_code_under_recorded_noise_is_never_called_different() {
        let called = |v: &[Verdict]| share(v, Verdict::Slower) + share(v, Verdict::Faster);
        for (name, text, least) in [("recorded", RECORDED, 0.98), ("held out", HELD_OUT, 0.95)] {
            let verdicts = replays(text, 1, 3000, RULE, 0.0);
            println!("{name}: same {:.1} %", 100.0 * share(&verdicts, Verdict::Same));
            let (cases, mut dice) = (recorded(text), Dice::new(4));
            let rounds: usize = (0..500).map(|_| replay(&cases, &mut dice, RULE, 0.0).rounds()).sum();
            println!("{name}: {:.1} rounds a case", rounds as f64 / 500.0);
            assert_eq!(called(&verdicts), 0.0, "{name}");
            assert!(share(&verdicts, Verdict::Same) > least, "{name}: {}", share(&verdicts, Verdict::Same));
            assert_eq!(called(&replays(text, 6, 1000, FINE, 0.0)), 0.0, "{name}");
        }
    }

    #[test]
    fn a_slowdown_under_recorded_noise_is_found() {
        for (rule, slowdown, least) in [
            (RULE, 0.01, 0.01),
            (FINE, 0.01, 0.90),
            (RULE, 0.02, 0.99),
            (RULE, 0.03, 0.999),
            (RULE, 0.05, 0.999),
            (RULE, 0.10, 0.999),
            (RULE, -0.05, 0.999),
        ] {
            let verdicts = replays(RECORDED, 2, 1000, rule, slowdown);
            let found = share(&verdicts, if slowdown > 0.0 { Verdict::Slower } else { Verdict::Faster });
            println!(
                "{slowdown:+.2} at {}: found in {:.1} %, unclear {:.1} %, same {:.1} %",
                rule.threshold,
                100.0 * found,
                100.0 * share(&verdicts, Verdict::Unclear),
                100.0 * share(&verdicts, Verdict::Same)
            );
            assert!(found >= least, "{slowdown}: found in {found}");
            if slowdown.abs() > rule.threshold {
                assert_eq!(share(&verdicts, Verdict::Same), 0.0, "{slowdown} was called the same");
            }
        }
        let found = share(&replays(HELD_OUT, 2, 1000, RULE, 0.05), Verdict::Slower);
        println!("held out: +0.05 found in {:.1} %", 100.0 * found);
        assert!(found > 0.99, "held out: found in {found}");
    }

    /// Log times under a model of noise; `pair` is the pair's place in its round.
    fn synthetic(model: impl Fn(&mut Dice, usize) -> (f64, f64), slowdown: f64) -> Vec<Verdict> {
        let mut dice = Dice::new(3);
        let mut all = Vec::new();
        for _ in 0..300 {
            let mut round = || -> Pairs {
                let logs = (0..40).map(|pair| model(&mut dice, pair));
                logs.map(|(a, b)| (a.exp(), b.exp())).collect()
            };
            all.push(judge(RULE, &mut round, slowdown).verdict().unwrap());
        }
        all
    }

    fn holds(what: &str, model: impl Fn(&mut Dice, usize) -> (f64, f64) + Copy) {
        let null = synthetic(model, 0.0);
        let called = share(&null, Verdict::Slower) + share(&null, Verdict::Faster);
        assert!(called == 0.0, "{what}: {called} of the same code was called different");
        let slow = synthetic(model, 0.05);
        assert!(share(&slow, Verdict::Slower) > 0.99, "{what}: found {}", share(&slow, Verdict::Slower));
        assert_eq!(share(&slow, Verdict::Same), 0.0, "{what}");
    }

    #[test]
    fn other_kinds_of_noise_change_nothing() {
        // The machine gets slower by a tenth over the round.
        holds("drift", |dice, pair| {
            let drift = 0.1 * pair as f64 / 40.0;
            (drift + 0.02 * dice.normal(), drift + 0.1 / 40.0 + 0.02 * dice.normal())
        });
        // One block in eight takes up to five times as long, on either side.
        holds("spikes", |dice, _| {
            let time = |dice: &mut Dice| match dice.below(8) {
                0 => 1.6 * dice.uniform(),
                _ => 0.02 * dice.normal(),
            };
            (time(dice), time(dice))
        });
        // Each block runs in a fast or a slow mode, 8 % apart.
        holds("two modes", |dice, _| {
            let mode = |dice: &mut Dice| if dice.uniform() < 0.5 { 0.08 } else { 0.0 };
            (mode(dice) + 0.005 * dice.normal(), mode(dice) + 0.005 * dice.normal())
        });
        // One side warms up more slowly over the first pairs of a round.
        holds("slow warm-up", |dice, pair| {
            let cold = if pair < 8 { 0.5 * (-(pair as f64) / 2.0).exp() } else { 0.0 };
            let (a, b) = if dice.uniform() < 0.5 { (cold, 0.0) } else { (0.0, cold) };
            (a + 0.02 * dice.normal(), b + 0.02 * dice.normal())
        });
    }

    #[test]
    fn processes_that_differ_for_good_are_not_called() {
        // Every process lands in a layout of its own, up to 3 % from the next.
        let mut dice = Dice::new(5);
        for _ in 0..300 {
            let judge = judge(
                RULE,
                || {
                    let layout = 0.03 * (dice.uniform() - dice.uniform());
                    (0..40).map(|_| (1.0, (layout + 0.005 * dice.normal()).exp())).collect()
                },
                0.0,
            );
            assert!(!matches!(judge.verdict(), Some(Verdict::Slower | Verdict::Faster)));
        }
    }

    #[test]
    fn exchanging_the_sides_exchanges_the_verdict() {
        let (cases, opposite) = (recorded(RECORDED), |v| match v {
            Verdict::Slower => Verdict::Faster,
            Verdict::Faster => Verdict::Slower,
            other => other,
        });
        for (i, rounds) in cases.iter().enumerate() {
            let run = |swap: bool| {
                let mut at = 0;
                judge(
                    RULE,
                    || {
                        at += 1;
                        let shift = if i % 3 == 0 { 1.06 } else { 1.0 };
                        let round = rounds[at % rounds.len()].iter().map(|(a, b)| (*a, b * shift)).collect();
                        if swap { swapped(&round) } else { round }
                    },
                    0.0,
                )
            };
            let (a, b) = (run(false), run(true));
            assert_eq!(a.verdict().map(opposite), b.verdict());
            let (a, b) = (a.estimate().unwrap(), b.estimate().unwrap());
            assert!((a.ratio * b.ratio - 1.0).abs() < 1e-9);
            assert!((a.ci[0] * b.ci[1] - 1.0).abs() < 1e-9);
        }
    }

    #[test]
    fn the_midmean_ignores_a_quarter_on_either_end() {
        assert_eq!(midmean(&[1.0]), 1.0);
        assert_eq!(midmean(&[f64::MAX, 2.0, 4.0, f64::MIN]), 3.0);
        let mut dice = Dice::new(7);
        let values: Vec<f64> = (0..101).map(|_| dice.normal()).collect();
        let moved: Vec<f64> = values.iter().rev().map(|v| v + 3.0).collect();
        assert!((midmean(&moved) - midmean(&values) - 3.0).abs() < 1e-12);
    }

    #[test]
    fn a_round_compares_the_faster_three_quarters() {
        let pairs = [(1.0, 3.0), (2.0, 9.0), (9.0, 2.0), (3.0, 1.0)];
        assert_eq!(Round::of(&pairs).centre, 0.0);
        assert_eq!(Round::of(&pairs[..1]).centre, 2.0);
        // The jackknife's error is about the spread of repeated rounds.
        let mut dice = Dice::new(9);
        let rounds: Vec<Round> = (0..1000)
            .map(|_| Round::of(&(0..64).map(|_| (dice.normal(), dice.normal())).collect::<Vec<_>>()))
            .collect();
        let centres: Vec<f64> = rounds.iter().map(|r| r.centre).collect();
        let errors: Vec<f64> = rounds.iter().map(|r| r.error).collect();
        let share = mean(&errors) / spread(&centres);
        assert!((0.85..1.15).contains(&share), "{share}");
    }

    #[test]
    fn intervals_hold_the_truth_as_often_as_they_say() {
        let mut dice = Dice::new(8);
        let mut held = 0;
        for _ in 0..2000 {
            let rounds: Vec<Round> =
                (0..9).map(|_| Round { centre: 0.7 + dice.normal(), error: 0.0 }).collect();
            held += usize::from((centre(&rounds) - 0.7).abs() < half_width(&rounds, 0.01));
        }
        assert!((1965..=1995).contains(&held), "{held} of 2,000 at 99 %");
    }

    #[test]
    fn the_second_gate_errs_no_more_than_it_may_over_all_its_looks() {
        let mut dice = Dice::new(10);
        let rule = Rule { threshold: 1e-9, cases: 1, most: 60 };
        let (trials, mut wrong) = (4000, 0);
        for _ in 0..trials {
            let mut judge = Judge::new(rule);
            judge.suspected = Some(Suspicion { from: 0, sign: 1.0 });
            while judge.suspected.is_some() && judge.verdict.is_none() {
                judge.rounds.push(Round { centre: dice.normal(), error: 0.0 });
                judge.look();
            }
            wrong += usize::from(judge.verdict == Some(Verdict::Slower));
        }
        let share = wrong as f64 / f64::from(trials);
        println!("a suspicion without cause is confirmed in {:.1} %", 100.0 * share);
        // 5 % and three standard errors of the simulation.
        assert!(share < FAMILY + 3.0 * (FAMILY / f64::from(trials)).sqrt(), "{share}");
        assert!(share > 0.0);
    }

    #[test]
    fn slow_cases_end_in_time_even_where_suspected() {
        // Among so many cases nothing is ever confirmed.
        let rule = Rule { cases: usize::MAX, ..RULE };
        for (most, rounds) in [(None, 2 * RULE.most), (Some(20), 20)] {
            let mut judge = Judge::new(rule);
            most.into_iter().for_each(|m| judge.at_most(m));
            while judge.verdict().is_none() {
                let head = if judge.rounds().is_multiple_of(2) { 1.015 } else { 1.025 };
                judge.add(&[(1.0, head), (1.0, head)]);
            }
            assert_eq!((judge.verdict(), judge.rounds()), (Some(Verdict::Unclear), rounds));
        }
    }

    #[test]
    fn nothing_that_is_not_a_time_counts() {
        let mut judge = Judge::new(RULE);
        judge.add(&[]);
        judge.add(&[(0.0, 1.0), (1.0, 0.0), (f64::NAN, 1.0)]);
        assert_eq!(judge.rounds(), 0);
        assert!(judge.estimate().is_none());
        assert_eq!(judge.close(), Verdict::Unclear);
    }

    #[test]
    fn a_past_run_widens_the_band_by_its_own_wandering() {
        let quiet: Vec<f64> = (0..50).map(|i| 1.0 + 1e-4 * f64::from(i % 3)).collect();
        let restless: Vec<f64> = (0..50).map(|i| 1.0 + 0.1 * f64::from(i / 10)).collect();
        let now = [0.0, 0.001, -0.001, 0.0005, 0.0];
        let of = |samples: &[f64], shift: f64| {
            let head: Vec<f64> = now.iter().map(|v| v + shift).collect();
            against_past(&past(samples).unwrap(), &head, THRESHOLD).0
        };
        assert_eq!(of(&quiet, 0.0), Verdict::Same);
        assert_eq!(of(&quiet, 0.1), Verdict::Slower);
        assert_eq!(of(&quiet, -0.1), Verdict::Faster);
        assert_eq!(of(&restless, 0.1), Verdict::Unclear);
        assert!(past(&[1.0; 9]).is_none() && past(&[f64::INFINITY; 20]).is_none());
        assert_eq!(pasts(&past(&quiet).unwrap(), &past(&quiet).unwrap(), THRESHOLD).0, Verdict::Same);
    }
}
