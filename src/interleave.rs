//! Runs two sides in turns: fresh processes for each round, short blocks of steps in
//! pairs, in random order. Only this knows processes; `compare` decides.

use std::collections::BTreeMap;
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
use crate::compare::{Estimate, Judge, Rule, Verdict, median, midmean};
use crate::machine::Machine;

/// Blocks of steps last about this: long against the request for them, short against
/// what disturbs a machine.
const BLOCK: Duration = Duration::from_millis(1);
/// How long a round measures a case whose steps are short.
const ROUND: Duration = Duration::from_millis(160);
/// Steps from here on are slow: few of them a round, one a block.
const SLOW: Duration = Duration::from_millis(10);
const SLOW_PAIRS: usize = 2;
/// Rounds at most for short steps (10 s a case), and for slow ones (40 steps a side).
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
            let mut worker = Worker::start(self, framework, None)?;
            all.extend(worker.cases(set, filter).with_context(|| format!("{}, {framework}", self.name))?);
        }
        Ok(all)
    }
}

/// How many threads and cores the processes of a comparison get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// Both sides on the same core, CPU backends with one thread: what interleaving needs on
    /// a shared machine, where two cores are seldom alike at a time. A GPU backend keeps its
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

/// The core for pinned workers: the last that this process may use. The first ones get
/// more of the system's own work.
#[cfg(target_os = "linux")]
fn core() -> Option<libc::cpu_set_t> {
    // SAFETY: plain data, filled by the call.
    unsafe {
        let mut allowed: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut allowed) != 0 {
            return None;
        }
        let last = (0..libc::CPU_SETSIZE as usize).rev().find(|&i| libc::CPU_ISSET(i, &allowed))?;
        let mut one: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(last, &mut one);
        Some(one)
    }
}

/// A benchmark process that times steps on request (`benches/harness/worker.rs`).
pub struct Worker {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    last_error: Arc<Mutex<String>>,
}

impl Worker {
    /// `pinned` names the backend whose steps it times on the comparison's core.
    ///
    /// # Errors
    /// Where the executable does not start.
    pub fn start(side: &Side, framework: Framework, pinned: Option<BackendId>) -> Result<Self> {
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
        if pinned.is_some_and(BackendId::is_cpu) {
            for name in
                ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"]
            {
                command.env(name, "1");
            }
        }
        #[cfg(target_os = "linux")]
        if let Some(core) = pinned.and_then(|_| core()) {
            use std::os::unix::process::CommandExt;
            // SAFETY: one system call, nothing allocated.
            unsafe {
                command.pre_exec(move || {
                    libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const core);
                    Ok(())
                });
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

    /// Seconds a step.
    pub fn time(&mut self, steps: u64) -> Result<f64> {
        let answer = self.ask(&steps.to_string())?;
        let nanoseconds: f64 = answer.parse().with_context(|| format!("'{answer}' is no time"))?;
        Ok(nanoseconds * 1e-9 / steps as f64)
    }
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
    /// Step times in seconds, of all rounds.
    pub times: [Vec<f64>; 2],
    /// Why it could not be measured, by side.
    pub failed: Option<(usize, String)>,
}

impl Row {
    pub fn new(base: Case, head: Case, rule: Rule) -> Self {
        Self { base, head, judge: Judge::new(rule), times: [Vec::new(), Vec::new()], failed: None }
    }

    pub fn verdict(&self) -> Option<Verdict> {
        if self.failed.is_some() { Some(Verdict::Failed) } else { self.judge.verdict() }
    }

    pub fn estimate(&self) -> Option<Estimate> {
        self.judge.estimate()
    }

    /// Median step time of a side in seconds; NaN without any.
    pub fn step_time(&self, side: usize) -> f64 {
        median(&self.times[side])
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
    let mut random = ChaCha8Rng::seed_from_u64(1);
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
        let pairs: std::collections::BTreeSet<(BackendId, BackendId)> =
            rows.iter().map(|r| (r.base.backend, r.head.backend)).collect();
        for pair in pairs {
            let mut group: Vec<&mut Row> = rows
                .iter_mut()
                .filter(|r| (r.base.backend, r.head.backend) == pair && r.verdict().is_none())
                .collect();
            one_round(sides, &mut group, threads, round, until, &mut random)?;
        }
    }
    for row in rows {
        row.judge.close();
    }
    Ok(())
}

fn one_round(
    sides: &[Side; 2],
    rows: &mut [&mut Row],
    threads: Threads,
    round: usize,
    until: Instant,
    random: &mut ChaCha8Rng,
) -> Result<()> {
    let Some(first) = rows.first() else { return Ok(()) };
    let backends = [first.base.backend, first.head.backend];
    let start = |side: usize| {
        // Two frameworks split a GPU step over threads in their own ways: a shared core
        // would favour one of them.
        let alike = backends[side].is_cpu() || backends[0] == backends[1];
        let pinned = (threads == Threads::One && alike).then_some(backends[side]);
        Worker::start(&sides[side], backends[side].framework(), pinned)
    };
    let mut workers: [Option<Worker>; 2] = [None, None];
    for row in rows {
        go_on()?;
        if Instant::now() >= until {
            break;
        }
        // The side that is loaded first alternates: ABBA. A process that died is replaced.
        for side in if round.is_multiple_of(2) { [0, 1] } else { [1, 0] } {
            if workers[side].is_none() {
                workers[side] = Some(start(side)?);
            }
        }
        let [Some(base), Some(head)] = &mut workers else { unreachable!("both were started") };
        match pairs([base, head], row, round.is_multiple_of(2), random) {
            Ok(pairs) => {
                row.times[0].extend(pairs.iter().map(|p| p.0));
                row.times[1].extend(pairs.iter().map(|p| p.1));
                row.judge.add(&pairs);
            }
            Err((side, reason)) => {
                go_on()?;
                row.failed = Some((side, format!("{reason:#}")));
                workers = [None, None];
            }
        }
    }
    Ok(())
}

/// Times both sides of a case in turns. What is loaded first lies elsewhere in memory, and
/// is some tenths of a per cent slower: rounds take turns at that too.
fn pairs(
    workers: [&mut Worker; 2],
    row: &mut Row,
    base_first: bool,
    random: &mut ChaCha8Rng,
) -> Result<Vec<(f64, f64)>, (usize, anyhow::Error)> {
    let cases = [row.base, row.head];
    let mut each = [f64::MAX; 2];
    for side in if base_first { [0, 1] } else { [1, 0] } {
        let fail = |error| (side, error);
        workers[side].load(&cases[side]).map_err(fail)?;
        let start = Instant::now();
        for count in 0..5 {
            if count > 0 && start.elapsed() > 3 * SLOW {
                break;
            }
            each[side] = each[side].min(workers[side].time(1).map_err(fail)?);
        }
    }
    let slow = each[0].max(each[1]) > SLOW.as_secs_f64();
    if slow {
        row.judge.at_most(MOST_SLOW);
    }
    let steps = each.map(|e| if slow { 1 } else { (BLOCK.as_secs_f64() / e).ceil().max(1.0) as u64 });
    let mut all = Vec::new();
    let start = Instant::now();
    while if slow { all.len() < SLOW_PAIRS } else { start.elapsed() < ROUND || all.len() < 8 } {
        let mut times = [0.0; 2];
        let first = (random.next_u32() & 1) as usize;
        for side in [first, 1 - first] {
            times[side] = workers[side].time(steps[side]).map_err(|e| (side, e))?;
        }
        all.push((times[0], times[1]));
    }
    Ok(all)
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
    let frameworks: std::collections::BTreeSet<Framework> =
        cases.iter().map(|c| c.backend.framework()).collect();
    for round in 1..=PROCESSES {
        progress(round);
        for &framework in &frameworks {
            let mut worker = Worker::start(side, framework, None)?;
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
                        worker = Worker::start(side, framework, None)?;
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
    let each = worker.time(1)?.min(worker.time(1)?);
    let steps = (BLOCK.as_secs_f64() / each).ceil().max(1.0) as u64;
    let start = Instant::now();
    let mut logs = Vec::new();
    while logs.len() < 4 || (start.elapsed() < 2 * ROUND && logs.len() < 200) {
        logs.push(worker.time(steps)?.ln());
    }
    Ok(midmean(&logs))
}
