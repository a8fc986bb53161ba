//! Runs two sides in turns: fresh processes for each round, short blocks of steps in
//! pairs, in random order. Only this knows processes; `compare` decides.
//!
//! A lane is a core with one process of each side and the thread that asks them: one of
//! the three always runs, so the core never sleeps. A core that has slept takes a step's
//! time to be itself again, and whoever shares the hardware has had its caches meanwhile;
//! asked from another core, the same steps take a fifth longer and scatter half as much again.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::case::{BackendId, Case, Framework, Set};
use crate::compare::{Estimate, Judge, Rule, Verdict, lower_quartile, median, midmean};
use crate::cost;
use crate::machine::Machine;

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
/// The share of its time above which a step is said to wait for something.
const WAITING: f64 = 0.01;
/// Bytes above which a case has the machine to itself.
const SMALL: u64 = 256 << 20;
/// Steps from here on are slow: few of them a round, one a block.
const SLOW: Duration = Duration::from_millis(10);
const SLOW_PAIRS: usize = 2;
/// Rounds at most for short steps, and for slow ones, suspected or not (40 steps a side).
const MOST: usize = 60;
const MOST_SLOW: usize = 20;

/// One half of a comparison.
#[derive(Clone, Debug, Default)]
pub struct Side {
    pub name: String,
    pub executables: BTreeMap<Framework, PathBuf>,
    pub environment: Vec<(String, String)>,
}

impl Side {
    /// The cases that it can run here, asked of each of its executables.
    pub fn cases(&self, set: Set, filter: &str) -> Result<Vec<Case>> {
        let mut all = Vec::new();
        for &framework in self.executables.keys() {
            let mut worker = Worker::start(self, framework, Threads::All)?;
            all.extend(worker.cases(set, filter).with_context(|| format!("{}, {framework}", self.name))?);
        }
        Ok(all)
    }
}

/// How many threads and cores the processes of a comparison get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// Both sides in one lane, CPU backends with one thread and by CPU time: what interleaving needs on a
    /// shared machine, where two cores are seldom alike at a time. A GPU backend keeps its
    /// threads, but its launches come from that core: its intervals get several times narrower.
    One,
    /// As the user's own runs.
    All,
}

/// Set by Ctrl-C.
static STOP: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C and TERM end the work at the next step, with everything cleaned up.
pub fn catch_interrupts() {
    extern "C" fn stop(_: libc::c_int) {
        STOP.store(true, Ordering::Relaxed);
    }
    let handler = stop as extern "C" fn(libc::c_int);
    // SAFETY: the handler only stores to an atomic.
    unsafe {
        libc::signal(libc::SIGINT, handler as libc::sighandler_t);
        libc::signal(libc::SIGTERM, handler as libc::sighandler_t);
    }
}

/// Whether Ctrl-C was pressed.
pub fn interrupted() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// The exit code of a command that can be interrupted, with its one line where it failed.
pub fn ended(command: &str, result: anyhow::Result<u8>) -> ExitCode {
    match result {
        Ok(code) => ExitCode::from(code),
        Err(_) if interrupted() => {
            eprintln!("{command}: interrupted");
            ExitCode::from(130)
        }
        Err(reason) => {
            eprintln!("{command}: {reason:#}");
            ExitCode::from(2)
        }
    }
}

/// Fails after Ctrl-C.
pub fn go_on() -> Result<()> {
    if interrupted() { bail!("interrupted") } else { Ok(()) }
}

/// Cores for lanes, one of each physical core, the last first: the first ones get more of the
/// system's own work. Empty where threads can't be kept on a core.
#[cfg(target_os = "linux")]
fn cores() -> Vec<usize> {
    // Lanes at most: they share the memory's bandwidth.
    const LANES: usize = 8;
    // SAFETY: plain data, filled by the call.
    let allowed = unsafe {
        let mut allowed: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut allowed) != 0 {
            return Vec::new();
        }
        allowed
    };
    let mut seen = BTreeSet::new();
    (0..libc::CPU_SETSIZE as usize)
        .rev()
        // SAFETY: below the size of the set.
        .filter(|&core| unsafe { libc::CPU_ISSET(core, &allowed) })
        .filter(|core| {
            let siblings = format!("/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list");
            std::fs::read_to_string(siblings).map_or(true, |text| seen.insert(text))
        })
        // A container may have more cores in sight than time on them.
        .take(std::thread::available_parallelism().map_or(1, usize::from).min(LANES))
        .collect()
}

#[cfg(not(target_os = "linux"))]
fn cores() -> Vec<usize> {
    Vec::new()
}

/// Keeps this thread, and every process that it starts, on a core, where none of them
/// interrupts another by waking up (`SCHED_BATCH`): a framework's threads then run one after
/// the other, which halves the time that comparing MLX takes. Where the system refuses,
/// the work is done all the same.
fn stay_on(core: usize) {
    #[cfg(target_os = "linux")]
    // SAFETY: a set of one core, and plain data.
    unsafe {
        let mut one: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut one);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const one);
        let parameters: libc::sched_param = std::mem::zeroed();
        libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameters);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = core;
}

/// What is true of how the two sides of a comparison run, for its reader; None of [`Threads::All`].
pub fn how(threads: Threads) -> Option<&'static str> {
    (threads == Threads::One).then(|| {
        if cores().is_empty() {
            "CPU backends on one thread, by the CPU time of their process where steps never wait; this system \
             keeps no process on a core, so expect less to be decided"
        } else {
            "both sides on the same core, CPU backends on one thread, by its CPU time: --threads all for all"
        }
    })
}

/// Does work in one lane for each core, or in one anywhere without any, and returns what
/// each returned.
fn in_lanes<T: Send>(cores: &[usize], work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let work = &work;
    std::thread::scope(|scope| {
        let lane = |index: usize| {
            let core = cores.get(index).copied();
            scope.spawn(move || {
                core.into_iter().for_each(stay_on);
                work(index)
            })
        };
        let lanes: Vec<_> = (0..cores.len().max(1)).map(lane).collect();
        let join = |lane: std::thread::ScopedJoinHandle<'_, T>| {
            lane.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        lanes.into_iter().map(join).collect()
    })
}

/// Does work in a lane, as comparisons measure.
pub fn in_a_lane<T: Send>(work: impl Fn() -> T + Sync) -> T {
    let cores = cores();
    in_lanes(&cores[..cores.len().min(1)], |_| work()).pop().expect("there is one lane")
}

/// A benchmark process that times steps on request (`benches/harness/worker.rs`).
pub struct Worker {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    last_error: Arc<Mutex<String>>,
}

impl Worker {
    /// A process with one thread for a CPU backend, or with all.
    ///
    /// # Errors
    /// Where the executable does not start.
    pub fn start(side: &Side, framework: Framework, threads: Threads) -> Result<Self> {
        let executable = side
            .executables
            .get(&framework)
            .with_context(|| format!("{} has no executable for {framework}", side.name))?;
        let mut command = Command::new(executable);
        command
            .args(["--bench", "--worker"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if threads == Threads::One {
            for name in
                ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"]
            {
                command.env(name, "1");
            }
        }
        command.envs(side.environment.iter().map(|(k, v)| (k, v)));
        let mut child = command.spawn().with_context(|| format!("{} did not start", executable.display()))?;
        let last_error = Arc::new(Mutex::new(String::new()));
        let errors = BufReader::new(child.stderr.take().context("a pipe")?);
        let keep = Arc::clone(&last_error);
        std::thread::spawn(move || {
            for line in errors.lines().map_while(Result::ok).filter(|l| !l.trim().is_empty()) {
                *keep.lock().expect("no panic holds it") = line;
            }
        });
        Ok(Self {
            input: child.stdin.take(),
            output: BufReader::new(child.stdout.take().context("a pipe")?),
            child,
            last_error,
        })
    }

    /// Sends a request and returns the answer.
    fn ask(&mut self, request: &str) -> Result<String> {
        let input = self.input.as_mut().context("the process has ended")?;
        let sent = writeln!(input, "{request}").and_then(|()| input.flush());
        let mut line = String::new();
        if sent.is_err() || self.output.read_line(&mut line)? == 0 {
            go_on()?;
            let status = self.child.wait()?;
            // The reason may still be on its way through the other pipe.
            std::thread::sleep(Duration::from_millis(50));
            let reason = self.last_error.lock().expect("no panic holds it").clone();
            bail!("the process ended with {status} {reason}");
        }
        match line.trim().strip_prefix("failed: ") {
            Some(reason) => Err(anyhow!("{reason}")),
            None => Ok(line.trim().to_owned()),
        }
    }

    fn cases(&mut self, set: Set, filter: &str) -> Result<Vec<Case>> {
        let text = self.ask(&format!("cases {set} {filter}"))?;
        // A case that only the other side knows is new or gone, by its text.
        Ok(text.split_whitespace().filter_map(|id| id.parse().ok()).collect())
    }

    pub fn machine(&mut self) -> Result<Machine> {
        serde_json::from_str(&self.ask("machine")?)
            .context("the executable describes its machine in another way")
    }

    pub fn load(&mut self, case: &Case) -> Result<()> {
        self.ask(&format!("case {case}")).map(|_| ())
    }

    /// Seconds that rounds of thrown-away arithmetic take.
    pub fn work(&mut self, rounds: u64) -> Result<f64> {
        let answer = self.ask(&format!("work {rounds}"))?;
        Ok(answer.parse::<f64>().with_context(|| format!("'{answer}' is no time"))? * 1e-9)
    }

    pub fn time(&mut self, steps: u64) -> Result<Step> {
        let answer = self.ask(&steps.to_string())?;
        let seconds = |text: &str| {
            let nanoseconds: f64 = text.parse().with_context(|| format!("'{answer}' is no time"))?;
            Ok::<f64, anyhow::Error>(nanoseconds * 1e-9 / steps as f64)
        };
        // Older executables tell less: as if they had waited throughout.
        let mut words = answer.split(' ');
        let mut next = || seconds(words.next().unwrap_or("0"));
        Ok(Step { wall: next()?, cpu: next()?, delayed: next()? })
    }
}

/// What a step took in seconds: by the clock; of that on a CPU, over all threads; and ready
/// for one that something else had.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub wall: f64,
    pub cpu: f64,
    pub delayed: f64,
}

/// Whether blocks show that neither side's steps wait for anything but the core. Where the
/// system does not tell who was ready, three quarters of them may have lost the core to
/// others, but a step that waits does so in all.
fn never_wait(blocks: &[[Step; 2]]) -> bool {
    (0..2).all(|side| {
        let waited = |s: Step| 1.0 - (s.cpu + s.delayed) / s.wall;
        let shares: Vec<f64> = blocks.iter().map(|b| waited(b[side])).collect();
        lower_quartile(&shares) <= WAITING
    })
}

impl Drop for Worker {
    fn drop(&mut self) {
        // The end of its input ends it; a hanging one is killed.
        self.input = None;
        for _ in 0..100 {
            if matches!(self.child.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A case on each side. They differ where two backends are compared.
#[derive(Clone, Debug)]
pub struct Row {
    pub base: Case,
    pub head: Case,
    pub judge: Judge,
    /// Step times in seconds of each round's pairs, base first.
    pub rounds: Vec<Vec<(f64, f64)>>,
    /// Whether a step takes so long that a round has few.
    slow: bool,
    /// Why it could not be measured, by side.
    pub failed: Option<(usize, String)>,
}

impl Row {
    pub fn new(base: Case, head: Case, rule: Rule) -> Self {
        Self { base, head, judge: Judge::new(rule), rounds: Vec::new(), slow: false, failed: None }
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
                if round.slow {
                    self.judge.at_most(MOST_SLOW);
                }
                self.slow = round.slow;
                self.judge.add(&round.pairs);
                self.rounds.push(round.pairs);
            }
            Err((side, reason)) => self.failed = Some((side, format!("{reason:#}"))),
        }
    }

    /// Whether it may be measured beside others: neither on a GPU, which lanes would share,
    /// nor with steps that are slow or need much memory.
    fn small(&self) -> bool {
        let small = |case: &Case| case.backend.is_cpu() && cost::memory_estimate(case) < SMALL;
        small(&self.base) && small(&self.head) && !self.slow
    }
}

/// The rule for a number of cases.
pub fn rule(threshold: f64, cases: usize) -> Rule {
    Rule { threshold, cases, most: MOST }
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
    let all_cores = if threads == Threads::One { cores() } else { Vec::new() };
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
        let pairs: BTreeSet<[BackendId; 2]> = rows.iter().map(|r| [r.base.backend, r.head.backend]).collect();
        for backends in pairs {
            // Two frameworks split a GPU step over threads in their own ways: a shared core
            // would favour one of them.
            let alike = backends.iter().all(|b| b.is_cpu()) || backends[0] == backends[1];
            for small in [false, true] {
                let chosen: Vec<usize> = (0..rows.len())
                    .filter(|&i| {
                        let row = &rows[i];
                        [row.base.backend, row.head.backend] == backends
                            && row.verdict().is_none()
                            && row.small() == small
                    })
                    .collect();
                let lanes = match (alike, small) {
                    (false, _) => 0,
                    (true, false) => all_cores.len().min(1),
                    (true, true) => all_cores.len(),
                };
                if !chosen.is_empty() {
                    rounds(sides, rows, &chosen, &all_cores[..lanes], threads, turn, until)?;
                }
            }
        }
    }
    for row in rows {
        row.judge.close();
    }
    Ok(())
}

/// A round of each chosen row, spread over lanes. Each lane gets as many: where that
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
    let lanes = cores.len().max(1);
    let each = chosen.len().div_ceil(lanes);
    let found = in_lanes(cores, |lane| {
        let mine = (0..each).map(|i| chosen[(i * lanes + lane) % chosen.len()]);
        let task = |i| Task { row: i, cases: [rows[i].base, rows[i].head] };
        let tasks: Vec<Task> = mine.map(task).collect();
        Lane::new(sides, threads, turn + lane).run(&tasks, until)
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
struct Lane<'a> {
    sides: &'a [Side; 2],
    threads: Threads,
    /// Which side starts and is loaded first. What is loaded first lies elsewhere in memory,
    /// and is some tenths of a per cent slower: turns alternate.
    order: [usize; 2],
    workers: [Option<Worker>; 2],
    random: ChaCha8Rng,
}

impl<'a> Lane<'a> {
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
            go_on()?;
            if Instant::now() >= until {
                break;
            }
            if self.workers.iter().any(Option::is_none) {
                // Few cases measure for longer, so that starting is never most of the time.
                at_least = ROUND.max(self.start(&task.cases)? / tasks.len() as u32);
            }
            let found = self.round(task, at_least);
            if found.is_err() {
                go_on()?;
                // One that died is replaced, and the other with it.
                self.workers = [None, None];
            }
            all.push((task.row, found));
        }
        // Both end at once.
        self.workers.iter_mut().flatten().for_each(|worker| worker.input = None);
        Ok(all)
    }

    /// Starts both processes, and says how long that took.
    fn start(&mut self, cases: &[Case; 2]) -> Result<Duration> {
        let start = Instant::now();
        for side in self.order {
            let backend = cases[side].backend;
            let threads = if backend.is_cpu() { self.threads } else { Threads::All };
            self.workers[side] = Some(Worker::start(&self.sides[side], backend.framework(), threads)?);
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

    fn time(&mut self, side: usize, steps: u64) -> Result<Step, (usize, anyhow::Error)> {
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

    /// Times both sides of a case in turns.
    fn round(&mut self, task: &Task, at_least: Duration) -> Found {
        let cases = &task.cases;
        let (mut loading, mut measuring) = (Duration::ZERO, Duration::ZERO);
        let mut pairs: Vec<[Step; 2]> = Vec::new();
        loop {
            let start = Instant::now();
            let each = self.load(cases)?;
            let load = start.elapsed();
            loading += load;
            let slow = each[0].max(each[1]) > SLOW.as_secs_f64();
            let steps = each.map(|e| if slow { 1 } else { steps_a_block(e) });
            let goal = at_least.max(loading);
            let stretch = (PER_LOAD * load).min(goal.saturating_sub(measuring));
            let (start, before) = (Instant::now(), pairs.len());
            while if slow {
                pairs.len() < SLOW_PAIRS
            } else {
                start.elapsed() < stretch || pairs.len() < before + PAIRS
            } {
                let mut pair = [Step { wall: f64::NAN, cpu: f64::NAN, delayed: f64::NAN }; 2];
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
                let time = |step: Step| if by_cpu { step.cpu } else { step.wall };
                let pairs = pairs.iter().map(|[base, head]| (time(*base), time(*head))).collect();
                return Ok(Round { pairs, slow });
            }
        }
    }
}

/// How many steps of so many seconds a block has.
fn steps_a_block(step: f64) -> u64 {
    (BLOCK.as_secs_f64() / step).ceil().max(1.0) as u64
}

/// Processes that a side is measured in against a baseline.
const PROCESSES: usize = 5;

/// Levels of a side that runs alone, on all threads as a user's run: for each case the
/// log of its step time in seconds, one a process, or why it failed.
///
/// # Errors
/// Where no process starts, and after Ctrl-C.
pub fn levels(
    side: &Side,
    cases: &[Case],
    until: Instant,
    mut progress: impl FnMut(usize),
) -> Result<BTreeMap<String, Result<Vec<f64>, String>>> {
    let mut all: BTreeMap<String, Result<Vec<f64>, String>> =
        cases.iter().map(|c| (c.to_string(), Ok(Vec::new()))).collect();
    let frameworks: BTreeSet<Framework> = cases.iter().map(|c| c.backend.framework()).collect();
    for round in 1..=PROCESSES {
        progress(round);
        for &framework in &frameworks {
            let mut worker = Worker::start(side, framework, Threads::All)?;
            for case in cases.iter().filter(|c| c.backend.framework() == framework) {
                go_on()?;
                let entry = all.get_mut(&case.to_string()).expect("made above");
                let Ok(levels) = entry else { continue };
                if Instant::now() >= until {
                    return Ok(all);
                }
                match level(&mut worker, case) {
                    Ok(level) => levels.push(level),
                    Err(reason) => {
                        *entry = Err(format!("{reason:#}"));
                        worker = Worker::start(side, framework, Threads::All)?;
                    }
                }
            }
        }
    }
    Ok(all)
}

/// The midmean of the logs of some blocks of steps, after a warm-up.
fn level(worker: &mut Worker, case: &Case) -> Result<f64> {
    worker.load(case)?;
    let each = worker.time(1)?.wall.min(worker.time(1)?.wall);
    let steps = steps_a_block(each);
    let start = Instant::now();
    let mut logs = Vec::new();
    while logs.len() < 4 || (start.elapsed() < 2 * ROUND && logs.len() < 200) {
        logs.push(worker.time(steps)?.wall.ln());
    }
    Ok(midmean(&logs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_waits_only_where_every_block_shows_it() {
        let step = |wall, cpu, delayed| Step { wall, cpu, delayed };
        let interrupted =
            [[step(2.0, 1.0, 0.0), step(1.0, 1.0, 0.0)], [step(1.0, 1.0, 0.0), step(3.0, 1.0, 0.0)]];
        assert!(never_wait(&interrupted));
        let waiting =
            [[step(1.0, 1.0, 0.0), step(1.5, 1.0, 0.0)], [step(1.0, 1.0, 0.0), step(1.4, 1.0, 0.0)]];
        assert!(!never_wait(&waiting));
        let untold = [[step(1.5, 0.0, 0.0), step(1.5, 1.0, 0.0)]];
        assert!(!never_wait(&untold));
        // The core was another's for half of the time of every block.
        assert!(never_wait(&[[step(2.0, 1.0, 1.0), step(2.1, 1.0, 1.1)]]));
        assert!(!never_wait(&[[step(2.0, 1.0, 0.5), step(2.0, 1.0, 1.0)]]));
    }

    #[test]
    fn a_lane_stays_on_its_core() {
        let cores = cores();
        let seen = in_lanes(&cores, |lane| (lane, std::thread::available_parallelism().unwrap().get()));
        assert_eq!(seen.iter().map(|s| s.0).collect::<Vec<_>>(), (0..cores.len().max(1)).collect::<Vec<_>>());
        if !cores.is_empty() {
            assert!(seen.iter().all(|s| s.1 == 1), "{seen:?}");
        }
        assert!(!cfg!(target_os = "linux") || !cores.is_empty());
    }
}
