//! A side of a comparison, and the client of its worker processes (`benches/harness/worker.rs`).

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
#[cfg(target_os = "linux")]
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::cores::physical_cores;
use super::signals::check_interrupted;
use crate::files::Scratch;
use crate::results::energy::StepEnergy;
use crate::results::first_step::StartTimes;
use crate::results::machine::Machine;
use crate::results::{self, upgrade};
use crate::statistics::lower_quartile;
use crate::suite::operations::OperationPass;
use crate::suite::{Case, Framework, Set, parse_filter};

/// Share of its time above which a step counts as waiting for something other than the core.
const MAX_WAIT_SHARE: f64 = 0.01;
/// Longest wait for an answer that needs only a loaded framework. Loading it from a slow disk takes seconds.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest wait for loading or timing a case. MLX compiles the kernels of a step for minutes.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(900);
/// Longest wait for a parity check. On two cores the reference of GPT-2 takes two minutes, and a step of the
/// slowest backend as long.
const CHECK_TIMEOUT: Duration = Duration::from_secs(3600);
/// Request for a parity check, unchanged since the executables of older revisions.
const CHECK_REQUEST: &str = "prove";
/// Request to verify the steps of the loaded case.
const VERIFY_REQUEST: &str = "verify";
/// Extra wait after the deadline of a comparison.
const GRACE_PERIOD: Duration = Duration::from_secs(20);

/// A side of a comparison: base or head.
#[derive(Clone, Debug, Default)]
pub struct Side {
    pub name: String,
    pub executables: BTreeMap<Framework, PathBuf>,
    pub environment: Vec<(String, String)>,
    /// Folder of the executables, if they are a copy for this comparison.
    pub scratch: Option<Arc<Scratch>>,
}

impl Side {
    /// Returns the cases that this side can run here, as its executables list them.
    ///
    /// # Errors
    /// Returns an error if an executable does not start or answer.
    pub fn cases(&self, set: Set, filter: &str, until: Instant) -> Result<Vec<Case>> {
        let mut all = Vec::new();
        for &framework in self.executables.keys() {
            let mut worker = Worker::start(self, framework, Threads::All)?.until(until);
            all.extend(worker.cases(set, filter).with_context(|| format!("{}, {framework}", self.name))?);
        }
        Ok(all)
    }
}

/// Threads and cores of the processes of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// Both sides on one core; CPU backends use one thread and are timed by CPU time. Two cores of a shared machine
    /// are seldom equally fast at one time. A GPU backend keeps its threads, but launches from that core, which
    /// makes its intervals several times narrower.
    One,
    /// All cores and threads, as in a run of the suite.
    All,
}

/// Describes how both sides are pinned, for the reader of a comparison. Returns `None` for [`Threads::All`].
pub fn pinning_note(threads: Threads) -> Option<&'static str> {
    (threads == Threads::One).then(|| {
        if physical_cores().is_empty() {
            "CPU backends run on one thread and are timed by CPU time if their steps never wait. This system does \
             not pin processes to cores, so more cases stay inconclusive"
        } else {
            "both sides run on the same core, and CPU backends on one thread, timed by CPU time; --threads all uses \
             all cores"
        }
    })
}

/// A benchmark process that times steps on request (`benches/harness/worker.rs`).
pub struct Worker {
    child: Child,
    pub(super) input: Option<ChildStdin>,
    output: ChildStdout,
    /// Bytes read after the last complete line.
    rest: Vec<u8>,
    /// Deadline of the comparison.
    deadline: Option<Instant>,
    /// For an executable from before version 3: its ids, by case.
    old_ids: Option<HashMap<Case, String>>,
    ids_known: bool,
    last_error: Arc<Mutex<String>>,
}

impl Worker {
    /// Starts a process of a side.
    ///
    /// # Errors
    /// Returns an error if the executable is missing or does not start.
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
            .stderr(Stdio::piped())
            // A copied executable cannot derive this folder, which has its passed checks, from its own path.
            .env("TRANSFORMER_BENCH_RESULTS", results::folder());
        if threads == Threads::One {
            for name in
                ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"]
            {
                command.env(name, "1");
            }
        }
        command.envs(side.environment.iter().map(|(k, v)| (k, v)));
        die_with_parent(&mut command);
        let mut child = command.spawn().with_context(|| format!("{} did not start", executable.display()))?;
        let last_error = Arc::new(Mutex::new(String::new()));
        let errors = BufReader::new(child.stderr.take().context("a pipe")?);
        let newest = Arc::clone(&last_error);
        std::thread::spawn(move || {
            for line in errors.lines().map_while(Result::ok).filter(|l| !l.trim().is_empty()) {
                *newest.lock().expect("no thread panics with it") = line;
            }
        });
        Ok(Self {
            input: child.stdin.take(),
            output: child.stdout.take().context("a pipe")?,
            rest: Vec::new(),
            deadline: None,
            old_ids: None,
            ids_known: false,
            child,
            last_error,
        })
    }

    /// Sets the deadline after which answers are waited for only briefly.
    pub fn until(mut self, deadline: Instant) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Sends a request. [`Worker::poll`] returns the answer.
    ///
    /// # Errors
    /// Returns an error if the process has ended.
    pub fn send(&mut self, request: &str) -> Result<()> {
        let input = self.input.as_mut().context("the process has ended")?;
        Ok(writeln!(input, "{request}").and_then(|()| input.flush())?)
    }

    /// Ends the process, and returns its exit status and last error line.
    pub fn end(&mut self) -> String {
        self.input = None;
        let _ = self.child.kill();
        let status = self.child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
        // The reason may still be on its way through the other pipe.
        std::thread::sleep(Duration::from_millis(50));
        format!(
            "the process ended with {status} {}",
            self.last_error.lock().expect("no thread panics with it")
        )
    }

    /// Sends a request and returns the answer.
    ///
    /// # Errors
    /// Returns an error if the process refuses the request, ends, or takes longer than `timeout`.
    fn ask(&mut self, request: &str, timeout: Duration) -> Result<String> {
        let sent = self.send(request);
        let start = Instant::now();
        let last = start + timeout;
        let last = self.deadline.map_or(last, |deadline| last.min(deadline.max(start) + GRACE_PERIOD));
        let line = if sent.is_ok() { self.read_line(request, start, last)? } else { None };
        let Some(line) = line else {
            check_interrupted()?;
            bail!("{}", self.end());
        };
        match line.trim().strip_prefix("failed: ") {
            Some(reason) => Err(anyhow!("{reason}")),
            None => Ok(line.trim().to_owned()),
        }
    }

    /// Returns the next line of the process, or `None` at its end.
    fn read_line(&mut self, request: &str, start: Instant, last: Instant) -> Result<Option<String>> {
        loop {
            match self.poll(Duration::from_millis(200)) {
                Ok(Some(line)) => return Ok(Some(line)),
                Ok(None) => {}
                Err(_) => return Ok(None),
            }
            check_interrupted()?;
            if Instant::now() >= last {
                let _ = self.child.kill();
                self.input = None;
                let waited = start.elapsed().as_secs();
                bail!("no answer to '{}' in {waited} s; the process was ended", request.trim());
            }
        }
    }

    /// Returns the next line of the process if it arrives within `timeout`.
    ///
    /// # Errors
    /// Returns an error at the end of the output.
    pub fn poll(&mut self, timeout: Duration) -> Result<Option<String>> {
        if let Some(line) = self.take_line() {
            return Ok(Some(line));
        }
        let mut ready = libc::pollfd { fd: self.output.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let timeout = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one open file, described by plain data. A signal ends the wait early.
        if unsafe { libc::poll(&raw mut ready, 1, timeout) } > 0 {
            let mut bytes = [0; 4096];
            match self.output.read(&mut bytes)? {
                0 => bail!("the process ended"),
                count => self.rest.extend_from_slice(&bytes[..count]),
            }
        }
        Ok(self.take_line())
    }

    fn take_line(&mut self) -> Option<String> {
        let end = self.rest.iter().position(|&byte| byte == b'\n')?;
        let line: Vec<u8> = self.rest.drain(..=end).collect();
        Some(String::from_utf8_lossy(&line).trim_end().to_owned())
    }

    /// Returns the cases of a set that match a filter and can run here.
    pub(super) fn cases(&mut self, set: Set, filter: &str) -> Result<Vec<Case>> {
        let parse = |text: &str| text.split_whitespace().filter_map(|id| id.parse().ok()).collect();
        if self.old_ids()?.is_none() {
            return Ok(parse(&self.ask(&format!("cases {set} {filter}"), STARTUP_TIMEOUT)?));
        }
        let ids = upgrade::upgrade_id(&self.ask(&format!("cases {set} "), STARTUP_TIMEOUT)?, 2);
        let (all, pattern): (Vec<Case>, _) = (parse(&ids), parse_filter(filter)?);
        Ok(all.into_iter().filter(|case| pattern.is_match(&case.to_string())).collect())
    }

    /// Returns the ids of an executable from before version 3 of the ids, or `None` for a newer one.
    fn old_ids(&mut self) -> Result<Option<&HashMap<Case, String>>> {
        if !self.ids_known {
            let answer = self.ask("version", STARTUP_TIMEOUT);
            if !answer.as_ref().is_err_and(is_unknown_request) {
                answer?;
            } else {
                let mut ids = HashMap::new();
                for set in Set::ALL {
                    let listed = self.ask(&format!("cases {set} "), STARTUP_TIMEOUT)?;
                    let new = |old: &str| Some((upgrade::upgrade_id(old, 2).parse().ok()?, old.to_owned()));
                    ids.extend(listed.split_whitespace().filter_map(new));
                }
                self.old_ids = Some(ids);
            }
            self.ids_known = true;
        }
        Ok(self.old_ids.as_ref())
    }

    /// Returns the id by which the executable knows a case.
    fn id_of(&mut self, case: &Case) -> Result<String> {
        let old = self.old_ids()?.map(|ids| ids.get(case).cloned());
        old.map_or_else(|| Ok(case.to_string()), |id| id.with_context(|| format!("{case} is unknown to it")))
    }

    /// Returns the machine as the process describes it.
    pub fn machine(&mut self) -> Result<Machine> {
        let version = if self.old_ids()?.is_some() { 2 } else { upgrade::VERSION };
        let mut machine = serde_json::from_str(&self.ask("machine", STARTUP_TIMEOUT)?)?;
        upgrade::upgrade(&mut machine, version);
        serde_json::from_value(machine).context("the executable describes its machine in another format")
    }

    /// Loads a case, ready to be timed. Returns the time of its first step in seconds. An older executable does not
    /// send it.
    pub fn load(&mut self, case: &Case) -> Result<Option<f64>> {
        let id = self.id_of(case)?;
        let answer = self.ask(&format!("case {id}"), REQUEST_TIMEOUT)?;
        let first: Option<f64> = answer.strip_prefix("ready ").and_then(|time| time.parse().ok());
        Ok(first.map(|nanoseconds| nanoseconds * 1e-9))
    }

    /// Makes what a case needs and loads it. Returns the times of this and of the first two steps.
    ///
    /// # Errors
    /// Returns an error if the process does not answer.
    pub fn start_case(&mut self, case: &Case) -> Result<StartTimes> {
        let answer = self.ask(&format!("start {case}"), REQUEST_TIMEOUT)?;
        let times: Result<Vec<f64>, _> = answer.split_whitespace().map(str::parse).collect();
        match times.as_deref() {
            Ok(&[made_ns, loaded_ns, first_ns, second_ns]) => {
                Ok(StartTimes { made_ns, loaded_ns, first_ns, second_ns })
            }
            _ => bail!("'{answer}' is not four times"),
        }
    }

    /// Measures the energy of steps of the loaded case for at least `seconds`.
    ///
    /// # Errors
    /// Returns an error if the device has no counter or counts an impossible power.
    pub fn energy(&mut self, seconds: u64) -> Result<StepEnergy> {
        let answer = self.ask(&format!("energy {seconds}"), REQUEST_TIMEOUT)?;
        serde_json::from_str(&answer).with_context(|| format!("'{answer}' is not an energy"))
    }

    /// Loads a pass of an operation of a training step, ready to be timed. Returns its largest error / tolerance.
    ///
    /// # Errors
    /// Returns an error if its results are wrong or the process does not answer.
    pub fn load_operation(&mut self, case: &Case, part: &OperationPass) -> Result<f64> {
        let answer = self.ask(&format!("operation {part} {case}"), REQUEST_TIMEOUT)?;
        let share = answer.strip_prefix("ready ").and_then(|share| share.parse().ok());
        share.with_context(|| format!("'{answer}' is not an outcome of a check"))
    }

    /// Returns a case as JSON, from which a program in another language builds the same step.
    ///
    /// # Errors
    /// Returns an error if the case has no such description.
    pub fn describe(&mut self, case: &Case) -> Result<String> {
        self.ask(&format!("describe {case}"), STARTUP_TIMEOUT)
    }

    /// Checks the parity of a case, or recalls an earlier check.
    pub fn check(&mut self, case: &Case) -> Result<CheckOutcome> {
        let id = self.id_of(case)?;
        let answer = self.ask(&format!("{CHECK_REQUEST} {id}"), CHECK_TIMEOUT)?;
        let (word, rest) = answer.split_once(' ').unwrap_or((&answer, ""));
        let share = || rest.parse().with_context(|| format!("'{answer}' is not an outcome of a check"));
        match word {
            "now" => Ok(CheckOutcome::Now(share()?)),
            "before" => Ok(CheckOutcome::Before(share()?)),
            "wrong" => Ok(CheckOutcome::Wrong(rest.to_owned())),
            _ => bail!("'{answer}' is not an outcome of a check"),
        }
    }

    /// Returns the share of `steps` steps in which an NVIDIA GPU is busy.
    ///
    /// # Errors
    /// Returns an error if CUPTI records nothing.
    pub fn gpu_busy_share(&mut self, steps: u64) -> Result<f64> {
        let answer = self.ask(&format!("gpu-busy {steps}"), REQUEST_TIMEOUT)?;
        answer.parse().with_context(|| format!("'{answer}' is not a share"))
    }

    /// Verifies that the timed steps still do their work. An older executable cannot.
    ///
    /// # Errors
    /// Returns [`WrongSteps`] if they do not, and another error if the process does not answer.
    pub fn verify(&mut self) -> Result<()> {
        let answer = self.ask(VERIFY_REQUEST, REQUEST_TIMEOUT).map(|_| ());
        let old = answer.as_ref().is_err_and(is_unknown_request);
        match answer {
            Err(error) if !old && self.is_alive() => Err(WrongSteps(format!("{error:#}")).into()),
            Err(error) if !old => Err(error),
            _ => Ok(()),
        }
    }

    /// Returns true if the process still runs.
    pub fn is_alive(&mut self) -> bool {
        self.input.is_some() && matches!(self.child.try_wait(), Ok(None))
    }

    /// Returns the time in seconds that `rounds` of arithmetic take.
    pub fn work(&mut self, rounds: u64) -> Result<f64> {
        let answer = self.ask(&format!("work {rounds}"), STARTUP_TIMEOUT)?;
        Ok(answer.parse::<f64>().with_context(|| format!("'{answer}' is not a time"))? * 1e-9)
    }

    /// Times a block of steps, and returns times per step.
    pub fn time(&mut self, steps: u64) -> Result<BlockTiming> {
        let answer = self.ask(&steps.to_string(), REQUEST_TIMEOUT)?;
        let seconds = |text: &str| {
            let nanoseconds: f64 = text.parse().with_context(|| format!("'{answer}' is not a time"))?;
            Ok::<f64, anyhow::Error>(nanoseconds * 1e-9 / steps as f64)
        };
        // An older executable does not send CPU times. It then counts as waiting.
        let mut words = answer.split(' ');
        let mut next = || seconds(words.next().unwrap_or("0"));
        Ok(BlockTiming { wall: next()?, cpu: next()?, delayed: next()? })
    }
}

/// The error of steps that ran and did not do their work.
#[derive(Debug)]
pub struct WrongSteps(String);

impl fmt::Display for WrongSteps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for WrongSteps {}

/// Outcome of a parity check in a worker.
#[derive(Clone, Debug, PartialEq)]
pub enum CheckOutcome {
    /// Passed, with the largest error over its tolerance.
    Now(f64),
    /// Passed in an earlier run of the same executable.
    Before(f64),
    /// Failed, with the mismatch.
    Wrong(String),
}

/// Returns true if an older executable does not know a request and refuses it.
pub fn is_unknown_request(error: &anyhow::Error) -> bool {
    error.to_string().ends_with(" request")
}

/// Ends a process when the thread that starts it ends. Outside Linux it ends when it reads the end of its
/// input.
fn die_with_parent(command: &mut Command) {
    #[cfg(target_os = "linux")]
    // SAFETY: a system call that is safe between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    #[cfg(not(target_os = "linux"))]
    let _ = command;
}

/// Times of a step in seconds: wall time, CPU time of all threads, and time that runnable threads waited for a
/// core.
#[derive(Clone, Copy, Debug)]
pub struct BlockTiming {
    pub wall: f64,
    pub cpu: f64,
    pub delayed: f64,
}

/// Returns true if the steps of neither side wait for anything but the core.
///
/// A system may not report the wait for a core. Then up to three quarters of the blocks may have lost the core
/// to other programs, but a step that waits does so in every block.
pub fn never_wait(blocks: &[[BlockTiming; 2]]) -> bool {
    (0..2).all(|side| {
        let waited = |s: BlockTiming| 1.0 - (s.cpu + s.delayed) / s.wall;
        let shares: Vec<f64> = blocks.iter().map(|b| waited(b[side])).collect();
        lower_quartile(&shares) <= MAX_WAIT_SHARE
    })
}

impl Drop for Worker {
    fn drop(&mut self) {
        // The process ends at the end of its input. One that hangs is killed.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_waits_only_if_every_block_shows_it() {
        let step = |wall, cpu, delayed| BlockTiming { wall, cpu, delayed };
        let interrupted =
            [[step(2.0, 1.0, 0.0), step(1.0, 1.0, 0.0)], [step(1.0, 1.0, 0.0), step(3.0, 1.0, 0.0)]];
        assert!(never_wait(&interrupted));
        let waiting =
            [[step(1.0, 1.0, 0.0), step(1.5, 1.0, 0.0)], [step(1.0, 1.0, 0.0), step(1.4, 1.0, 0.0)]];
        assert!(!never_wait(&waiting));
        let unreported = [[step(1.5, 0.0, 0.0), step(1.5, 1.0, 0.0)]];
        assert!(!never_wait(&unreported));
        // Another program had the core for half of the time of every block.
        assert!(never_wait(&[[step(2.0, 1.0, 1.0), step(2.1, 1.0, 1.1)]]));
        assert!(!never_wait(&[[step(2.0, 1.0, 0.5), step(2.0, 1.0, 1.0)]]));
    }
}
