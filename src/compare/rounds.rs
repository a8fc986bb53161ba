//! Runs base and head interleaved: fresh processes for each round, short blocks of steps in
//! pairs, in random order. Only this and `worker` know processes; `rule` decides.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::cores::{on_cores, physical_cores};
use super::decision::{Estimate, Rule, SequentialTest, THRESHOLD, Verdict};
use super::signals::check_interrupted;
use super::worker::{BlockTiming, Side, Threads, Worker, never_wait};
use crate::statistics::median;
use crate::suite::{BackendId, Case, cost};

/// Blocks of steps last about this: long against the request for them, short against
/// what disturbs a machine.
const BLOCK: Duration = Duration::from_millis(1);
/// How long a round measures a case whose steps are short, at least.
const ROUND: Duration = Duration::from_millis(250);
/// A case is measured so many times as long as it took to load, then loaded anew: where its
/// data lies in memory changes a step by some per cent, so a round tries several places.
const PER_LOAD: u32 = 8;
/// Pairs after each loading at least: the first are slower, as caches fill.
const PAIRS: usize = 16;
/// Bytes above which a case has the machine to itself.
const SMALL: u64 = 256 << 20;
/// Steps from here on are slow: one a block, and as many as fit a round of [`ROUND`], at least two.
const SLOW: Duration = Duration::from_millis(10);
const SLOW_PAIRS: usize = 2;
/// Rounds at most, and for steps longer than [`ROUND`], flagged or not (40 steps a side).
const MOST: usize = 60;
const MOST_LONG: usize = 20;

/// A case on each side. They differ where two backends are compared.
#[derive(Clone, Debug)]
pub struct Row {
    pub base: Case,
    pub head: Case,
    pub judge: SequentialTest,
    /// Step times in seconds of each round's pairs, base first.
    pub rounds: Vec<Vec<(f64, f64)>>,
    /// Whether a step takes so long that a round has few.
    slow: bool,
    /// Why it could not be measured, by side.
    pub failed: Option<(usize, String)>,
}

impl Row {
    pub fn new(base: Case, head: Case, rule: Rule) -> Self {
        Self { base, head, judge: SequentialTest::new(rule), rounds: Vec::new(), slow: false, failed: None }
    }

    pub fn verdict(&self) -> Option<Verdict> {
        if self.failed.is_some() { Some(Verdict::Failed) } else { self.judge.verdict() }
    }

    pub fn estimate(&self) -> Option<Estimate> {
        self.judge.estimate()
    }

    /// Median step time of a side in seconds; NaN without any.
    pub fn step_time(&self, side: usize) -> f64 {
        let times = self.rounds.iter().flatten().map(|p| if side == 0 { p.0 } else { p.1 });
        median(&times.collect::<Vec<f64>>())
    }

    fn take(&mut self, found: Found) {
        match found {
            Ok(round) => {
                if round.pairs[0].0 > ROUND.as_secs_f64() {
                    self.judge.limit_rounds(MOST_LONG);
                }
                self.slow = round.slow;
                self.judge.add(&round.pairs);
                self.rounds.push(round.pairs);
            }
            Err((side, reason)) => self.failed = Some((side, format!("{reason:#}"))),
        }
    }

    /// Whether it may be measured beside others: neither on a GPU, which cores_used would share,
    /// nor with steps that are slow or need much memory.
    fn is_single_core(&self) -> bool {
        let small = |case: &Case| case.backend.is_cpu() && cost::memory_estimate(case) < SMALL;
        small(&self.base) && small(&self.head) && !self.slow
    }
}

/// The rule for a number of cases.
pub fn rule(threshold: f64, cases: usize) -> Rule {
    Rule { threshold, cases, most: MOST }
}

/// Rounds of a comparison that wants an interval, not a verdict: the fewest whose spread says
/// something (Student's t with two degrees of freedom).
pub const MIN_ROUNDS: usize = 3;

/// The rule for a case that is compared for its interval.
pub fn quick_rule() -> Rule {
    Rule { most: MIN_ROUNDS, ..rule(THRESHOLD, 1) }
}

/// Runs rounds until every row has its verdict, or the time is over.
///
/// # Errors
/// Where no process starts, and after Ctrl-C. A case that fails is a row, not an error.
pub fn decide(
    sides: &[Side; 2],
    rows: &mut [Row],
    threads: Threads,
    until: Instant,
    mut progress: impl FnMut(usize, usize),
) -> Result<()> {
    let all_cores = if threads == Threads::One { physical_cores() } else { Vec::new() };
    let mut last_open = 0;
    for turn in 1.. {
        let open = rows.iter().filter(|r| r.verdict().is_none()).count();
        if open == 0 || Instant::now() >= until {
            break;
        }
        if open != last_open || turn % 10 == 1 {
            progress(turn, open);
        }
        last_open = open;
        for (chosen, most) in groups(rows) {
            let used = &all_cores[..all_cores.len().min(most)];
            rounds(sides, rows, &chosen, used, threads, turn, until)?;
        }
    }
    for row in rows {
        row.judge.close();
    }
    Ok(())
}

/// Open rows that are measured together, with the number of cores that they may be spread over.
fn groups(rows: &[Row]) -> Vec<(Vec<usize>, usize)> {
    let mut all: BTreeMap<([BackendId; 2], bool), Vec<usize>> = BTreeMap::new();
    for (index, row) in rows.iter().enumerate().filter(|(_, row)| row.verdict().is_none()) {
        let key = ([row.base.backend, row.head.backend], row.is_single_core());
        all.entry(key).or_default().push(index);
    }
    let most = |backends: [BackendId; 2], small: bool| {
        // Two frameworks split a GPU step over threads in their own ways: a shared core
        // would favour one of them.
        let alike = backends.iter().all(|b| b.is_cpu()) || backends[0] == backends[1];
        match (alike, small) {
            (false, _) => 0,
            (true, false) => 1,
            (true, true) => usize::MAX,
        }
    };
    all.into_iter().map(|((backends, small), rows)| (rows, most(backends, small))).collect()
}

/// A round of each chosen row, spread over the cores. Each gets as many: where that
/// does not come out even, some rows have more rounds.
fn rounds(
    sides: &[Side; 2],
    rows: &mut [Row],
    chosen: &[usize],
    cores: &[usize],
    threads: Threads,
    turn: usize,
    until: Instant,
) -> Result<()> {
    let cores_used = cores.len().max(1);
    let each = chosen.len().div_ceil(cores_used);
    let found = on_cores(cores, |core| {
        let mine = (0..each).map(|i| chosen[(i * cores_used + core) % chosen.len()]);
        let task = |i| Task { row: i, cases: [rows[i].base, rows[i].head] };
        let tasks: Vec<Task> = mine.map(task).collect();
        Pinned::new(sides, threads, turn + core).run(&tasks, until)
    });
    let found: Vec<Vec<(usize, Found)>> = found.into_iter().collect::<Result<_>>()?;
    for (index, found) in found.into_iter().flatten() {
        rows[index].take(found);
    }
    Ok(())
}

/// A row's cases for a round.
struct Task {
    row: usize,
    cases: [Case; 2],
}

/// What a round measured.
struct Round {
    pairs: Vec<(f64, f64)>,
    slow: bool,
}

/// A round, or the side that failed and why.
type Found = Result<Round, (usize, anyhow::Error)>;

/// Two processes that take turns on one core.
struct Pinned<'a> {
    sides: &'a [Side; 2],
    threads: Threads,
    /// Which side starts and is loaded first. What is loaded first lies elsewhere in memory,
    /// and is some tenths of a per cent slower: turns alternate.
    order: [usize; 2],
    workers: [Option<Worker>; 2],
    random: ChaCha8Rng,
}

impl<'a> Pinned<'a> {
    fn new(sides: &'a [Side; 2], threads: Threads, seed: usize) -> Self {
        let order = if seed.is_multiple_of(2) { [0, 1] } else { [1, 0] };
        let random = ChaCha8Rng::seed_from_u64(seed as u64);
        Self { sides, threads, order, workers: [None, None], random }
    }

    /// A round of each task, with its row.
    fn run(&mut self, tasks: &[Task], until: Instant) -> Result<Vec<(usize, Found)>> {
        let mut all = Vec::new();
        let mut at_least = ROUND;
        for task in tasks {
            check_interrupted()?;
            if Instant::now() >= until {
                break;
            }
            if self.workers.iter().any(Option::is_none) {
                // Few cases measure for longer, so that starting is never most of the time.
                at_least = ROUND.max(self.start(&task.cases, until)? / tasks.len() as u32);
            }
            let found = self.round(task, at_least);
            if found.is_err() {
                check_interrupted()?;
                // One that died is replaced, and the other with it.
                self.workers = [None, None];
                if Instant::now() >= until {
                    // It was not waited for any longer, which says nothing of the case.
                    break;
                }
            }
            all.push((task.row, found));
        }
        // Both end at once.
        self.workers.iter_mut().flatten().for_each(|worker| worker.input = None);
        Ok(all)
    }

    /// Starts both processes, and says how long that took.
    fn start(&mut self, cases: &[Case; 2], until: Instant) -> Result<Duration> {
        let start = Instant::now();
        for side in self.order {
            let backend = cases[side].backend;
            let threads = if backend.is_cpu() { self.threads } else { Threads::All };
            let worker = Worker::start(&self.sides[side], backend.framework(), threads)?;
            self.workers[side] = Some(worker.until(until));
        }
        for worker in self.workers.iter_mut().flatten() {
            // Any answer says that it is up; what is wrong with it shows when it loads.
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

    /// Prepares both sides and returns about how long their steps take, in seconds.
    fn load(&mut self, cases: &[Case; 2]) -> Result<[f64; 2], (usize, anyhow::Error)> {
        let mut each = [f64::MAX; 2];
        for side in self.order {
            self.worker(side).load(&cases[side]).map_err(|error| (side, error))?;
            let start = Instant::now();
            for count in 1..=5 {
                each[side] = each[side].min(self.time(side, 1)?.wall);
                // One slow step says that it is slow.
                if start.elapsed() > if count > 1 { 4 * BLOCK } else { SLOW } {
                    break;
                }
            }
        }
        self.order.reverse();
        Ok(each)
    }

    /// Times both sides of a case, interleaved.
    fn round(&mut self, task: &Task, at_least: Duration) -> Found {
        let cases = &task.cases;
        let (mut loading, mut measuring) = (Duration::ZERO, Duration::ZERO);
        let mut pairs: Vec<[BlockTiming; 2]> = Vec::new();
        loop {
            let start = Instant::now();
            let each = self.load(cases)?;
            let load = start.elapsed();
            loading += load;
            let longest = each[0].max(each[1]);
            let slow = longest > SLOW.as_secs_f64();
            let few = ((ROUND.as_secs_f64() / (2.0 * longest)) as usize).clamp(SLOW_PAIRS, PAIRS);
            let steps = each.map(|e| if slow { 1 } else { steps_per_block(e) });
            let goal = at_least.max(loading);
            let stretch = (PER_LOAD * load).min(goal.saturating_sub(measuring));
            let (start, before) = (Instant::now(), pairs.len());
            while if slow {
                pairs.len() < few
            } else {
                start.elapsed() < stretch || pairs.len() < before + PAIRS
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
                return Ok(Round { pairs, slow });
            }
        }
    }
}

/// How many steps of so many seconds a block has.
pub fn steps_per_block(step: f64) -> u64 {
    (BLOCK.as_secs_f64() / step).ceil().max(1.0) as u64
}
