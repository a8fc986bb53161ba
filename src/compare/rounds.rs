//! Interleaved rounds of base and head. A round starts fresh processes and times short blocks of steps in pairs, in
//! random order. `decision` turns the rounds into a verdict.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::cores::{physical_cores, run_on_cores};
use super::decision::{Estimate, Precision, Rule, SequentialTest, THRESHOLD, Verdict};
use super::signals::check_interrupted;
use super::worker::{BlockTiming, Side, Threads, Worker, WrongSteps, never_wait};
use crate::statistics::median;
use crate::suite::{BackendId, Case, cost};

/// Target duration of a block: long compared with the request, short compared with interference.
const BLOCK: Duration = Duration::from_millis(1);
/// Minimum measurement time per round of a case with short steps.
const MIN_ROUND_TIME: Duration = Duration::from_millis(250);
/// Measurement time per loading time, after which the case is loaded again. The memory layout changes the time of a
/// step by some per cent, so a round samples several layouts.
const MEASURE_PER_LOAD: u32 = 8;
/// Minimum number of pairs per load. The first pairs are slower, because caches are cold.
const MIN_PAIRS: usize = 16;
/// Memory in bytes from which a case is measured alone.
const MAX_SHARED_BYTES: u64 = 256 << 20;
/// Duration from which a step is slow: one step per block, and at least two pairs per round.
const SLOW_STEP: Duration = Duration::from_millis(10);
const MIN_SLOW_PAIRS: usize = 2;
/// Maximum number of rounds, and for steps longer than [`MIN_ROUND_TIME`] (40 steps per side).
const MAX_ROUNDS: usize = 60;
const MAX_LONG_ROUNDS: usize = 20;

/// A compared pair of cases. They differ if two backends are compared.
#[derive(Clone, Debug)]
pub struct Row {
    pub base: Case,
    pub head: Case,
    pub test: SequentialTest,
    /// Step times in seconds of the pairs of each round, base first.
    pub rounds: Vec<Vec<(f64, f64)>>,
    /// True if a round has only a few long steps.
    slow: bool,
    pub failed: Option<Failure>,
}

/// The failure of a side.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Index of the side: 0 base, 1 head.
    pub side: usize,
    pub reason: String,
    /// True if the timed steps did not do their work.
    pub wrong_steps: bool,
}

impl Row {
    pub fn new(base: Case, head: Case, rule: Rule) -> Self {
        Self { base, head, test: SequentialTest::new(rule), rounds: Vec::new(), slow: false, failed: None }
    }

    pub fn verdict(&self) -> Option<Verdict> {
        if self.failed.is_some() { Some(Verdict::Failed) } else { self.test.verdict() }
    }

    pub fn estimate(&self) -> Option<Estimate> {
        self.test.estimate()
    }

    /// Returns the median step time of a side in seconds, or NaN without rounds.
    pub fn step_time(&self, side: usize) -> f64 {
        let times = self.rounds.iter().flatten().map(|p| if side == 0 { p.0 } else { p.1 });
        median(&times.collect::<Vec<f64>>())
    }

    fn add(&mut self, outcome: RoundOutcome) {
        match outcome {
            Ok(round) => {
                if round.pairs[0].0 > MIN_ROUND_TIME.as_secs_f64() {
                    self.test.limit_rounds(MAX_LONG_ROUNDS);
                }
                self.slow = round.slow;
                self.test.add(&round.pairs);
                self.rounds.push(round.pairs);
            }
            Err((side, error)) => {
                let wrong_steps = error.is::<WrongSteps>();
                self.failed = Some(Failure { side, reason: format!("{error:#}"), wrong_steps });
            }
        }
    }

    /// Returns true if other cases may run at the same time on other cores. Cases on a GPU, with slow steps or with
    /// much memory run alone.
    fn is_single_core(&self) -> bool {
        let small = |case: &Case| case.backend.is_cpu() && cost::memory_estimate(case) < MAX_SHARED_BYTES;
        small(&self.base) && small(&self.head) && !self.slow
    }
}

/// Returns the decision rule for a number of cases.
pub fn rule(threshold: f64, cases: usize) -> Rule {
    Rule { threshold, cases, max_rounds: MAX_ROUNDS, precision: None }
}

/// Returns the rule for a case that is compared for its interval.
pub fn interval_rule(precision: Precision) -> Rule {
    Rule { max_rounds: MAX_LONG_ROUNDS, precision: Some(precision), ..rule(THRESHOLD, 1) }
}

/// Runs rounds until every row has a verdict or the deadline passes.
///
/// # Errors
/// Returns an error if a process does not start, and after an interrupt. A case that fails is a row, not an error.
pub fn decide(
    sides: &[Side; 2],
    rows: &mut [Row],
    threads: Threads,
    until: Instant,
    mut progress: impl FnMut(usize, usize),
) -> Result<()> {
    let all_cores = if threads == Threads::One { physical_cores() } else { Vec::new() };
    let mut last_open = 0;
    for round in 1.. {
        let open = rows.iter().filter(|r| r.verdict().is_none()).count();
        if open == 0 || Instant::now() >= until {
            break;
        }
        if open != last_open || round % 10 == 1 {
            progress(round, open);
        }
        last_open = open;
        for (chosen, max_cores) in groups(rows) {
            let used = &all_cores[..all_cores.len().min(max_cores)];
            run_round(sides, rows, &chosen, used, threads, round, until)?;
        }
    }
    for row in rows {
        row.test.close();
    }
    Ok(())
}

/// Groups open rows that run together, with the maximum number of cores for each group.
fn groups(rows: &[Row]) -> Vec<(Vec<usize>, usize)> {
    let mut all: BTreeMap<([BackendId; 2], bool), Vec<usize>> = BTreeMap::new();
    for (index, row) in rows.iter().enumerate().filter(|(_, row)| row.verdict().is_none()) {
        let key = ([row.base.backend, row.head.backend], row.is_single_core());
        all.entry(key).or_default().push(index);
    }
    let max_cores = |backends: [BackendId; 2], small: bool| {
        // Frameworks launch a GPU step from different numbers of threads, so one core would favour one of them.
        let alike = backends.iter().all(|b| b.is_cpu()) || backends[0] == backends[1];
        match (alike, small) {
            (false, _) => 0,
            (true, false) => 1,
            (true, true) => usize::MAX,
        }
    };
    all.into_iter().map(|((backends, small), rows)| (rows, max_cores(backends, small))).collect()
}

/// Runs a round of each chosen row, distributed over the cores. Each core runs the same number of rows, so some rows may
/// get two rounds.
fn run_round(
    sides: &[Side; 2],
    rows: &mut [Row],
    chosen: &[usize],
    cores: &[usize],
    threads: Threads,
    round: usize,
    until: Instant,
) -> Result<()> {
    let cores_used = cores.len().max(1);
    let each = chosen.len().div_ceil(cores_used);
    let outcomes = run_on_cores(cores, |core| {
        let indices = (0..each).map(|i| chosen[(i * cores_used + core) % chosen.len()]);
        let task = |i| Task { row: i, cases: [rows[i].base, rows[i].head] };
        let tasks: Vec<Task> = indices.map(task).collect();
        WorkerPair::new(sides, threads, round + core).run(&tasks, until)
    });
    let outcomes: Vec<Vec<(usize, RoundOutcome)>> = outcomes.into_iter().collect::<Result<_>>()?;
    for (index, outcome) in outcomes.into_iter().flatten() {
        rows[index].add(outcome);
    }
    Ok(())
}

/// The cases of a row, for one round.
struct Task {
    row: usize,
    cases: [Case; 2],
}

/// Step times of a round.
struct Round {
    pairs: Vec<(f64, f64)>,
    slow: bool,
}

/// A round, or the side that failed with its error.
type RoundOutcome = Result<Round, (usize, anyhow::Error)>;

/// A process of each side, whose blocks alternate.
struct WorkerPair<'a> {
    sides: &'a [Side; 2],
    threads: Threads,
    /// Order in which the sides start and load. The first one is some tenths of a per cent slower through its memory
    /// layout, so rounds alternate.
    order: [usize; 2],
    workers: [Option<Worker>; 2],
    random: ChaCha8Rng,
}

impl<'a> WorkerPair<'a> {
    fn new(sides: &'a [Side; 2], threads: Threads, seed: usize) -> Self {
        let order = if seed.is_multiple_of(2) { [0, 1] } else { [1, 0] };
        let random = ChaCha8Rng::seed_from_u64(seed as u64);
        Self { sides, threads, order, workers: [None, None], random }
    }

    /// Runs a round of each task. Returns outcomes with the index of their row.
    fn run(&mut self, tasks: &[Task], until: Instant) -> Result<Vec<(usize, RoundOutcome)>> {
        let mut all = Vec::new();
        let mut min_time = MIN_ROUND_TIME;
        for task in tasks {
            check_interrupted()?;
            if Instant::now() >= until {
                break;
            }
            if self.workers.iter().any(Option::is_none) {
                // A small number of cases is measured longer, so that starting takes less than half of the time.
                min_time = MIN_ROUND_TIME.max(self.start(&task.cases, until)? / tasks.len() as u32);
            }
            let outcome = self.round(task, min_time);
            if outcome.is_err() {
                check_interrupted()?;
                // Both processes are replaced after a failure.
                self.workers = [None, None];
                if Instant::now() >= until {
                    // The deadline ended the wait, so the case itself did not fail.
                    break;
                }
            }
            all.push((task.row, outcome));
        }
        // Both processes end at the same time.
        self.workers.iter_mut().flatten().for_each(|worker| worker.input = None);
        Ok(all)
    }

    /// Starts both processes, and returns the time that this took.
    fn start(&mut self, cases: &[Case; 2], until: Instant) -> Result<Duration> {
        let start = Instant::now();
        for side in self.order {
            let backend = cases[side].backend;
            let threads = if backend.is_cpu() { self.threads } else { Threads::All };
            let worker = Worker::start(&self.sides[side], backend.framework(), threads)?;
            self.workers[side] = Some(worker.until(until));
        }
        for worker in self.workers.iter_mut().flatten() {
            // Any answer means that the process runs. Its errors are reported when it loads a case.
            let _ = worker.work(0);
        }
        Ok(start.elapsed())
    }

    fn worker(&mut self, side: usize) -> &mut Worker {
        self.workers[side].as_mut().expect("both were started")
    }

    fn time(&mut self, side: usize, steps: u64) -> Result<BlockTiming, (usize, anyhow::Error)> {
        self.worker(side).time(steps).map_err(|error| (side, error))
    }

    /// Loads the case on both sides, and returns estimates of the step times in seconds.
    fn load(&mut self, cases: &[Case; 2]) -> Result<[f64; 2], (usize, anyhow::Error)> {
        let mut each = [f64::MAX; 2];
        for side in self.order {
            let first = self.worker(side).load(&cases[side]).map_err(|error| (side, error))?;
            // On a GPU, a first step is long because it compiles kernels. On a CPU, the round has room for few steps.
            let long = |first: &f64| cases[side].backend.is_cpu() && *first > MIN_ROUND_TIME.as_secs_f64();
            if let Some(first) = first.filter(long) {
                each[side] = first;
                continue;
            }
            let start = Instant::now();
            for count in 1..=5 {
                each[side] = each[side].min(self.time(side, 1)?.wall);
                // One step is enough to see that it is slow.
                if start.elapsed() > if count > 1 { 4 * BLOCK } else { SLOW_STEP } {
                    break;
                }
            }
        }
        self.order.reverse();
        Ok(each)
    }

    /// Times both sides of a case, interleaved.
    fn round(&mut self, task: &Task, min_time: Duration) -> RoundOutcome {
        let cases = &task.cases;
        let (mut loading, mut measuring) = (Duration::ZERO, Duration::ZERO);
        let mut pairs: Vec<[BlockTiming; 2]> = Vec::new();
        loop {
            let start = Instant::now();
            let each = self.load(cases)?;
            let load = start.elapsed();
            loading += load;
            let longest = each[0].max(each[1]);
            let slow = longest > SLOW_STEP.as_secs_f64();
            let slow_pairs =
                ((MIN_ROUND_TIME.as_secs_f64() / (2.0 * longest)) as usize).clamp(MIN_SLOW_PAIRS, MIN_PAIRS);
            let steps = each.map(|e| if slow { 1 } else { steps_per_block(e) });
            let goal = min_time.max(loading);
            let stretch = (MEASURE_PER_LOAD * load).min(goal.saturating_sub(measuring));
            let (start, before) = (Instant::now(), pairs.len());
            while if slow {
                pairs.len() < slow_pairs
            } else {
                start.elapsed() < stretch || pairs.len() < before + MIN_PAIRS
            } {
                let mut pair = [BlockTiming { wall: f64::NAN, cpu: f64::NAN, delayed: f64::NAN }; 2];
                let first = (self.random.next_u32() & 1) as usize;
                for side in [first, 1 - first] {
                    pair[side] = self.time(side, steps[side])?;
                }
                pairs.push(pair);
            }
            measuring += start.elapsed();
            if slow || measuring >= goal {
                let by_cpu = self.threads == Threads::One && cases.iter().all(|c| c.backend.is_cpu());
                let by_cpu = by_cpu && never_wait(&pairs);
                let time = |step: BlockTiming| if by_cpu { step.cpu } else { step.wall };
                let pairs = pairs.iter().map(|[base, head]| (time(*base), time(*head))).collect();
                for side in 0..2 {
                    self.worker(side).verify().map_err(|error| (side, error))?;
                }
                return Ok(Round { pairs, slow });
            }
        }
    }
}

/// Returns the number of steps per block, for a step time in seconds.
pub fn steps_per_block(step: f64) -> u64 {
    (BLOCK.as_secs_f64() / step).ceil().max(1.0) as u64
}
