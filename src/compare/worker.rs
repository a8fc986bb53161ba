//! One half of a comparison, and the protocol with its processes (`benches/harness/worker.rs`).

use std::collections::BTreeMap;
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
use crate::results::Scratch;
use crate::results::machine::Machine;
use crate::statistics::lower_quartile;
use crate::suite::{Case, Framework, Set};

/// The share of its time above which a step is said to wait for something.
const WAITING: f64 = 0.01;
/// How long an answer may take that needs no more than the framework: loading it from a
/// slow disk takes seconds.
const SOON: Duration = Duration::from_secs(120);
/// How long any may take: MLX builds kernels of a compiled step for minutes.
const EVER: Duration = Duration::from_secs(900);
/// How long a proof may take: on two cores the oracle takes two minutes of GPT-2, and a step of
/// the slowest backend as many.
const PROOF: Duration = Duration::from_secs(3600);
/// What is given beyond a comparison's own end.
const GRACE: Duration = Duration::from_secs(20);

/// One half of a comparison.
#[derive(Clone, Debug, Default)]
pub struct Side {
    pub name: String,
    pub executables: BTreeMap<Framework, PathBuf>,
    pub environment: Vec<(String, String)>,
    /// Where the executables are, where they are a copy for this comparison alone.
    pub scratch: Option<Arc<Scratch>>,
}

impl Side {
    /// The cases that it can run here, asked of each of its executables.
    pub fn cases(&self, set: Set, filter: &str, until: Instant) -> Result<Vec<Case>> {
        let mut all = Vec::new();
        for &framework in self.executables.keys() {
            let mut worker = Worker::start(self, framework, Threads::All)?.until(until);
            all.extend(worker.cases(set, filter).with_context(|| format!("{}, {framework}", self.name))?);
        }
        Ok(all)
    }
}

/// How many threads and cores the processes of a comparison get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// Both sides on one core, CPU backends with one thread and by CPU time: what interleaving needs on a
    /// shared machine, where two cores are seldom alike at a time. A GPU backend keeps its
    /// threads, but its launches come from that core: its intervals get several times narrower.
    One,
    /// As the user's own runs.
    All,
}

/// What is true of how the two sides of a comparison run, for its reader; None of [`Threads::All`].
pub fn pinning_note(threads: Threads) -> Option<&'static str> {
    (threads == Threads::One).then(|| {
        if physical_cores().is_empty() {
            "CPU backends on one thread, by the CPU time of their process where steps never wait; this system \
             keeps no process on a core, so expect less to be decided"
        } else {
            "both sides on the same core, CPU backends on one thread, by its CPU time: --threads all for all"
        }
    })
}

/// A benchmark process that times steps on request (`benches/harness/worker.rs`).
pub struct Worker {
    child: Child,
    pub(super) input: Option<ChildStdin>,
    output: ChildStdout,
    /// What has been read behind the last whole line.
    rest: Vec<u8>,
    /// When whoever asks has no use for answers any more.
    until: Option<Instant>,
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
        die_with_parent(&mut command);
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
            output: child.stdout.take().context("a pipe")?,
            rest: Vec::new(),
            until: None,
            child,
            last_error,
        })
    }

    /// No answer is waited for long beyond this.
    pub fn until(mut self, until: Instant) -> Self {
        self.until = Some(until);
        self
    }

    /// Sends a request, whose answer [`Worker::look`] finds.
    ///
    /// # Errors
    /// Where the process has ended.
    pub fn send(&mut self, request: &str) -> Result<()> {
        let input = self.input.as_mut().context("the process has ended")?;
        Ok(writeln!(input, "{request}").and_then(|()| input.flush())?)
    }

    /// Ends the process; how it ended, and its last words.
    pub fn end(&mut self) -> String {
        self.input = None;
        let _ = self.child.kill();
        let status = self.child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
        // The reason may still be on its way through the other pipe.
        std::thread::sleep(Duration::from_millis(50));
        format!("the process ended with {status} {}", self.last_error.lock().expect("no panic holds it"))
    }

    /// Sends a request and returns the answer.
    ///
    /// # Errors
    /// What the process says against it, its end, or that it took longer than `patience`.
    fn ask(&mut self, request: &str, patience: Duration) -> Result<String> {
        let sent = self.send(request);
        let start = Instant::now();
        let last = start + patience;
        let last = self.until.map_or(last, |until| last.min(until.max(start) + GRACE));
        let line = if sent.is_ok() { self.line(request, start, last)? } else { None };
        let Some(line) = line else {
            check_interrupted()?;
            bail!("{}", self.end());
        };
        match line.trim().strip_prefix("failed: ") {
            Some(reason) => Err(anyhow!("{reason}")),
            None => Ok(line.trim().to_owned()),
        }
    }

    /// The next line of the process; None at its end.
    fn line(&mut self, request: &str, start: Instant, last: Instant) -> Result<Option<String>> {
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
                bail!("no answer to '{}' in {waited} s: ended", request.trim());
            }
        }
    }

    /// The next line of the process, where it comes within a moment.
    ///
    /// # Errors
    /// Where the process says no more.
    pub fn poll(&mut self, moment: Duration) -> Result<Option<String>> {
        if let Some(line) = self.whole_line() {
            return Ok(Some(line));
        }
        let mut ready = libc::pollfd { fd: self.output.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let moment = i32::try_from(moment.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one open file, described by plain data. A signal ends the wait early.
        if unsafe { libc::poll(&raw mut ready, 1, moment) } > 0 {
            let mut bytes = [0; 4096];
            match self.output.read(&mut bytes)? {
                0 => bail!("the process ended"),
                count => self.rest.extend_from_slice(&bytes[..count]),
            }
        }
        Ok(self.whole_line())
    }

    fn whole_line(&mut self) -> Option<String> {
        let end = self.rest.iter().position(|&byte| byte == b'\n')?;
        let line: Vec<u8> = self.rest.drain(..=end).collect();
        Some(String::from_utf8_lossy(&line).trim_end().to_owned())
    }

    fn cases(&mut self, set: Set, filter: &str) -> Result<Vec<Case>> {
        let text = self.ask(&format!("cases {set} {filter}"), SOON)?;
        // A case that only the other side knows is new or gone, by its text.
        Ok(text.split_whitespace().filter_map(|id| id.parse().ok()).collect())
    }

    pub fn machine(&mut self) -> Result<Machine> {
        serde_json::from_str(&self.ask("machine", SOON)?)
            .context("the executable describes its machine in another way")
    }

    pub fn load(&mut self, case: &Case) -> Result<()> {
        self.ask(&format!("case {case}"), EVER).map(|_| ())
    }

    /// Has a case proven, or recalled.
    pub fn check(&mut self, case: &Case) -> Result<CheckOutcome> {
        let answer = self.ask(&format!("prove {case}"), PROOF)?;
        let (word, rest) = answer.split_once(' ').unwrap_or((&answer, ""));
        let share = || rest.parse().with_context(|| format!("'{answer}' is no proof"));
        match word {
            "now" => Ok(CheckOutcome::Now(share()?)),
            "before" => Ok(CheckOutcome::Before(share()?)),
            "wrong" => Ok(CheckOutcome::Wrong(rest.to_owned())),
            _ => bail!("'{answer}' is no proof"),
        }
    }

    /// Whether the process still runs.
    pub fn alive(&mut self) -> bool {
        self.input.is_some() && matches!(self.child.try_wait(), Ok(None))
    }

    /// Seconds that rounds of thrown-away arithmetic take.
    pub fn work(&mut self, rounds: u64) -> Result<f64> {
        let answer = self.ask(&format!("work {rounds}"), SOON)?;
        Ok(answer.parse::<f64>().with_context(|| format!("'{answer}' is no time"))? * 1e-9)
    }

    pub fn time(&mut self, steps: u64) -> Result<BlockTiming> {
        let answer = self.ask(&steps.to_string(), EVER)?;
        let seconds = |text: &str| {
            let nanoseconds: f64 = text.parse().with_context(|| format!("'{answer}' is no time"))?;
            Ok::<f64, anyhow::Error>(nanoseconds * 1e-9 / steps as f64)
        };
        // Older executables tell less: as if they had waited throughout.
        let mut words = answer.split(' ');
        let mut next = || seconds(words.next().unwrap_or("0"));
        Ok(BlockTiming { wall: next()?, cpu: next()?, delayed: next()? })
    }
}

/// What a process says of a case's parity.
#[derive(Clone, Debug, PartialEq)]
pub enum CheckOutcome {
    /// How much of the error that is allowed the worst tensor took.
    Now(f64),
    /// The same, of an earlier proof.
    Before(f64),
    /// What is wrong.
    Wrong(String),
}

/// Ends a process when the thread that starts it ends, however that ends. Elsewhere than on
/// Linux the end of its input does, once it reads.
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

/// What a step took in seconds: by the clock; of that on a CPU, over all threads; and ready
/// for one that something else had.
#[derive(Clone, Copy, Debug)]
pub struct BlockTiming {
    pub wall: f64,
    pub cpu: f64,
    pub delayed: f64,
}

/// Whether blocks show that neither side's steps wait for anything but the core. Where the
/// system does not tell who was ready, three quarters of them may have lost the core to
/// others, but a step that waits does so in all.
pub fn never_wait(blocks: &[[BlockTiming; 2]]) -> bool {
    (0..2).all(|side| {
        let waited = |s: BlockTiming| 1.0 - (s.cpu + s.delayed) / s.wall;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_waits_only_where_every_block_shows_it() {
        let step = |wall, cpu, delayed| BlockTiming { wall, cpu, delayed };
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
}
