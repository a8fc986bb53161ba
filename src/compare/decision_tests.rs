//! Replays recorded and synthetic noise through the decision rule.

use super::*;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

type Pairs = Vec<(f64, f64)>;

/// Noise by which the constants of the rule were chosen.
const RECORDED: &str = include_str!("noise/chosen-by.txt");
/// Noise recorded later, which no constant was chosen by.
const HELD_OUT: &str = include_str!("noise/held-out.txt");

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

const RULE: Rule = Rule { threshold: THRESHOLD, cases: 30, max_rounds: 60, precision: None };
const FINE: Rule = Rule { threshold: 0.01, ..RULE };

/// Runs the test on rounds, with a slowdown added to head.
fn run_test(rule: Rule, mut round: impl FnMut() -> Pairs, slowdown: f64) -> SequentialTest {
    let mut test = SequentialTest::new(rule);
    while test.verdict().is_none() {
        let pairs: Pairs = round().iter().map(|(a, b)| (*a, b * (1.0 + slowdown))).collect();
        test.add(&pairs);
    }
    test
}

fn swapped(pairs: &Pairs) -> Pairs {
    pairs.iter().map(|(a, b)| (*b, *a)).collect()
}

/// Replays recorded rounds in random order, either side as the base.
fn replay(cases: &[Vec<Pairs>], dice: &mut Dice, rule: Rule, slowdown: f64) -> SequentialTest {
    let rounds = &cases[dice.below(cases.len())];
    run_test(
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
        println!("{name}: equivalent {:.1} %", 100.0 * share(&verdicts, Verdict::Equivalent));
        let (cases, mut dice) = (recorded(text), Dice::new(4));
        let rounds: usize = (0..500).map(|_| replay(&cases, &mut dice, RULE, 0.0).rounds()).sum();
        println!("{name}: {:.1} rounds a case", rounds as f64 / 500.0);
        assert_eq!(called(&verdicts), 0.0, "{name}");
        assert!(
            share(&verdicts, Verdict::Equivalent) > least,
            "{name}: {}",
            share(&verdicts, Verdict::Equivalent)
        );
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
            "{slowdown:+.2} at {}: found in {:.1} %, inconclusive {:.1} %, equivalent {:.1} %",
            rule.threshold,
            100.0 * found,
            100.0 * share(&verdicts, Verdict::Inconclusive),
            100.0 * share(&verdicts, Verdict::Equivalent)
        );
        assert!(found >= least, "{slowdown}: found in {found}");
        if slowdown.abs() > rule.threshold {
            assert_eq!(share(&verdicts, Verdict::Equivalent), 0.0, "{slowdown} was reported as equivalent");
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
        all.push(run_test(RULE, &mut round, slowdown).verdict().unwrap());
    }
    all
}

fn holds(what: &str, model: impl Fn(&mut Dice, usize) -> (f64, f64) + Copy) {
    let null = synthetic(model, 0.0);
    let called = share(&null, Verdict::Slower) + share(&null, Verdict::Faster);
    assert!(called == 0.0, "{what}: {called} of the same code was called different");
    let slow = synthetic(model, 0.05);
    assert!(share(&slow, Verdict::Slower) > 0.99, "{what}: found {}", share(&slow, Verdict::Slower));
    assert_eq!(share(&slow, Verdict::Equivalent), 0.0, "{what}");
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
        let test = run_test(
            RULE,
            || {
                let layout = 0.03 * (dice.uniform() - dice.uniform());
                (0..40).map(|_| (1.0, (layout + 0.005 * dice.normal()).exp())).collect()
            },
            0.0,
        );
        assert!(!matches!(test.verdict(), Some(Verdict::Slower | Verdict::Faster)));
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
            run_test(
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
fn a_round_compares_the_faster_three_quarters() {
    let pairs = [(1.0, 3.0), (2.0, 9.0), (9.0, 2.0), (3.0, 1.0)];
    assert_eq!(Round::from_pairs(&pairs).centre, 0.0);
    assert_eq!(Round::from_pairs(&pairs[..1]).centre, 2.0);
    // The jackknife's error is about the spread of repeated rounds.
    let mut dice = Dice::new(9);
    let rounds: Vec<Round> = (0..1000)
        .map(|_| Round::from_pairs(&(0..64).map(|_| (dice.normal(), dice.normal())).collect::<Vec<_>>()))
        .collect();
    let centres: Vec<f64> = rounds.iter().map(|r| r.centre).collect();
    let errors: Vec<f64> = rounds.iter().map(|r| r.error).collect();
    let share = mean(&errors) / std_dev(&centres);
    assert!((0.85..1.15).contains(&share), "{share}");
}

#[test]
fn intervals_hold_the_truth_as_often_as_they_say() {
    let mut dice = Dice::new(8);
    let mut held = 0;
    for _ in 0..2000 {
        let rounds: Vec<Round> =
            (0..9).map(|_| Round { base: 0.0, centre: 0.7 + dice.normal(), error: 0.0 }).collect();
        held += usize::from((centre(&rounds) - 0.7).abs() < half_width(&rounds, 0.01));
    }
    assert!((1965..=1995).contains(&held), "{held} of 2,000 at 99 %");
}

#[test]
fn the_second_gate_errs_no_more_than_it_may_over_all_its_looks() {
    let mut dice = Dice::new(10);
    let rule = Rule { threshold: 1e-9, cases: 1, max_rounds: 60, precision: None };
    let (trials, mut wrong) = (4000, 0);
    for _ in 0..trials {
        let mut test = SequentialTest::new(rule);
        test.flagged = Some(Flag { from: 0, sign: 1.0 });
        while test.flagged.is_some() && test.verdict.is_none() {
            test.rounds.push(Round { base: 0.0, centre: dice.normal(), error: 0.0 });
            test.look();
        }
        wrong += usize::from(test.verdict == Some(Verdict::Slower));
    }
    let share = wrong as f64 / f64::from(trials);
    println!("a flag without cause is confirmed in {:.1} %", 100.0 * share);
    // 5 % and three standard errors of the simulation.
    assert!(share < FAMILYWISE_ALPHA + 3.0 * (FAMILYWISE_ALPHA / f64::from(trials)).sqrt(), "{share}");
    assert!(share > 0.0);
}

#[test]
fn slow_cases_end_in_time_even_if_flagged() {
    // With this number of cases nothing is confirmed.
    let rule = Rule { cases: usize::MAX, ..RULE };
    for (most, rounds) in [(None, 2 * RULE.max_rounds), (Some(20), 20)] {
        let mut test = SequentialTest::new(rule);
        most.into_iter().for_each(|m| test.limit_rounds(m));
        while test.verdict().is_none() {
            let head = if test.rounds().is_multiple_of(2) { 1.015 } else { 1.025 };
            test.add(&[(1.0, head), (1.0, head)]);
        }
        assert_eq!((test.verdict(), test.rounds()), (Some(Verdict::Inconclusive), rounds));
    }
}

#[test]
fn step_times_divide_to_the_ratio() {
    let mut test = SequentialTest::new(RULE);
    let mut dice = Dice::new(5);
    for _ in 0..20 {
        test.add(&(0..10).map(|_| (dice.normal().exp(), (0.5 + dice.normal()).exp())).collect::<Vec<_>>());
    }
    let [base, head] = test.step_times().unwrap();
    let ratio = test.estimate().unwrap().ratio;
    assert!((head / base / ratio - 1.0).abs() < 1e-12, "{head} / {base} is not {ratio}");
    // With one round the times are its own levels.
    let mut test = SequentialTest::new(RULE);
    test.add(&[(2.0, 6.0)]);
    let [base, head] = test.step_times().unwrap();
    assert!((base - 2.0).abs() < 1e-12 && (head - 6.0).abs() < 1e-12);
}

#[test]
fn nothing_that_is_not_a_time_counts() {
    let mut test = SequentialTest::new(RULE);
    test.add(&[]);
    test.add(&[(0.0, 1.0), (1.0, 0.0), (f64::NAN, 1.0)]);
    assert_eq!(test.rounds(), 0);
    assert!(test.estimate().is_none());
    assert_eq!(test.close(), Verdict::Inconclusive);
}

#[test]
fn rounds_end_at_a_narrow_interval_that_still_holds_the_truth() {
    let precision = Precision { min_rounds: 8, half_width: 0.05 };
    let rule = Rule { max_rounds: 20, precision: Some(precision), ..RULE };
    let mut dice = Dice::new(11);
    // The spread of processes, from a quiet machine to one that is too noisy for the goal.
    for spread in [0.02, 0.06, 0.3] {
        let (mut held, mut rounds) = (0, 0);
        for _ in 0..1000 {
            let mut test = SequentialTest::new(rule);
            while test.verdict().is_none() {
                let head = (0.7 + spread * dice.normal()).exp();
                test.add(&[(1.0, head), (1.0, head)]);
            }
            let [low, high] = test.estimate_at(REPORT_CONFIDENCE).unwrap().ci;
            held += usize::from(low.ln() < 0.7 && 0.7 < high.ln());
            rounds += test.rounds();
        }
        println!("spread {spread}: {held} of 1,000, {} rounds on average", rounds / 1000);
        // 95 %, three standard errors of the simulation, and 1 % because a narrow interval ends the rounds.
        assert!(held >= 920, "spread {spread}: {held} of 1,000");
        assert!((8..=20).contains(&(rounds / 1000)));
    }
}
