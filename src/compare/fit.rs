//! The search for the largest training step that fits into memory: the largest batch, and the longest sequence, of a training step.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::signals::check_interrupted;
use super::worker::{CheckOutcome, Side, Threads, Worker};
use crate::memory::{MEMORY_LIMIT_VARIABLE, SwapWatch};
use crate::suite::Case;
use crate::suite::custom_model::{BATCH_VARIABLE, TOKENS_VARIABLE};

/// A step that took longer than this is not repeated, and no larger one is tried.
pub const LONGEST_STEP: Duration = Duration::from_secs(20);
/// A step that is shorter than this is timed a second time. The first one includes allocations.
const REPEATED_STEP: Duration = Duration::from_secs(5);
/// Longest wait for a step. MLX compiles the kernels of a step for minutes.
const STEP_TIMEOUT: Duration = Duration::from_secs(600);

/// The result of one size.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// The step ran.
    Fits { seconds: f64, memory: Memory },
    /// There was not enough memory.
    DoesNotFit { reason: String },
}

/// Peak memory of a process in bytes: that of the framework's allocator on a GPU, and of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    pub allocator: Option<u64>,
    pub process: Option<u64>,
}

/// A size that was tried.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    pub size: usize,
    pub outcome: Outcome,
}

/// Result of a search over sizes.
#[derive(Clone, Debug, PartialEq)]
pub struct Search {
    /// The sizes that were tried, from small to large.
    pub points: Vec<Point>,
    pub limit: Limit,
}

/// Reason why no larger size is in the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    Memory,
    /// The step takes longer than [`LONGEST_STEP`].
    Time,
    /// The model or the suite has no larger size.
    Size,
}

impl Search {
    /// Returns the largest size that fits.
    pub fn largest(&self) -> Option<&Point> {
        self.points.iter().rev().find(|point| matches!(point.outcome, Outcome::Fits { .. }))
    }
}

/// Returns the sizes of a search: powers of two, and one and a half times them, from `smallest` to `largest`. Neighbors
/// differ by a third to a half, and memory rarely decides more finely.
pub fn sizes(smallest: usize, largest: usize) -> Vec<usize> {
    let powers = std::iter::successors(Some(smallest), |size| size.checked_mul(2));
    let mut all: Vec<usize> = powers
        .take_while(|size| *size <= largest)
        .flat_map(|size| [Some(size), (size % 2 == 0).then_some(size + size / 2)])
        .flatten()
        .filter(|size| *size <= largest)
        .collect();
    if all.last().is_some_and(|last| *last < largest) {
        all.push(largest);
    }
    all
}

/// Positions in [`sizes`] between the attempts of a search before one fails: each size is twice the last one.
const STRIDE: usize = 2;

/// Finds the largest of ascending `sizes` whose step fits, if all smaller ones fit. It doubles the size until one does not
/// fit, and then tries the sizes between the last two.
///
/// # Errors
/// Returns the first error of `attempt`.
pub fn search(sizes: &[usize], mut attempt: impl FnMut(usize) -> Result<Outcome>) -> Result<Search> {
    let mut points: Vec<Point> = Vec::new();
    let mut limit = Limit::Size;
    // All positions below `low` fit, and none from `high` on.
    let (mut low, mut high) = (0, sizes.len());
    while low < high {
        let next = if low == 0 { 0 } else { low - 1 + STRIDE };
        let at = if limit == Limit::Size { next.min(high - 1) } else { usize::midpoint(low, high) };
        let outcome = attempt(sizes[at])?;
        match &outcome {
            Outcome::Fits { seconds, .. } if *seconds > LONGEST_STEP.as_secs_f64() => {
                (low, high, limit) = (at + 1, at + 1, Limit::Time);
            }
            Outcome::Fits { .. } => low = at + 1,
            Outcome::DoesNotFit { .. } => (high, limit) = (at, Limit::Memory),
        }
        points.push(Point { size: sizes[at], outcome });
    }
    points.sort_by_key(|point| point.size);
    Ok(Search { points, limit })
}

/// Runs training steps in fresh processes with limited memory.
pub struct Prober<'a> {
    pub side: &'a Side,
    /// Bytes that a process may allocate on the CPU, or `None` if the system cannot limit them.
    pub memory_limit: Option<u64>,
}

impl Prober<'_> {
    /// Returns a process that knows a custom model at `tokens` tokens.
    fn start(&self, case: &Case, tokens: usize) -> Result<Worker> {
        let mut side = self.side.clone();
        let mut set = |name: &str, value: String| side.environment.push((name.to_owned(), value));
        set(BATCH_VARIABLE, case.shape.batch().to_string());
        set(TOKENS_VARIABLE, tokens.to_string());
        if let Some(bytes) = self.memory_limit {
            set(MEMORY_LIMIT_VARIABLE, bytes.to_string());
        }
        Worker::start(&side, case.backend.framework(), Threads::All)
    }

    /// Checks a case against the reference.
    ///
    /// # Errors
    /// Returns an error if the check fails or cannot run.
    pub fn check(&self, case: &Case, tokens: usize) -> Result<()> {
        let unlimited = Prober { memory_limit: None, ..*self };
        match unlimited.start(case, tokens)?.check(case)? {
            CheckOutcome::Wrong(reason) => Err(anyhow!("{case} computes wrongly: {reason}")),
            _ => Ok(()),
        }
    }

    /// Loads a case in a fresh process and runs one or two steps.
    ///
    /// # Errors
    /// Returns an error if it fails for another reason than memory.
    pub fn attempt(&self, case: &Case, tokens: usize) -> Result<Outcome> {
        let worker = self.start(case, tokens)?;
        let mut process =
            WatchedProcess { worker, watch: SwapWatch::start(), is_limited: self.memory_limit.is_some() };
        let first = match process.request(&format!("case {case}"))? {
            Ok(answer) => answer.strip_prefix("ready ").and_then(|ns| ns.parse::<f64>().ok()),
            Err(reason) => return Ok(Outcome::DoesNotFit { reason }),
        };
        let mut seconds = first.context("the executable is older than this command")? * 1e-9;
        if seconds < REPEATED_STEP.as_secs_f64() {
            match process.request("1")? {
                Ok(answer) => {
                    let ns = answer.split(' ').next().and_then(|ns| ns.parse::<f64>().ok());
                    seconds = ns.with_context(|| format!("'{answer}' is not a time"))? * 1e-9;
                }
                Err(reason) => return Ok(Outcome::DoesNotFit { reason }),
            }
        }
        Ok(match process.request("memory")? {
            Ok(answer) => Outcome::Fits { seconds, memory: parse_memory(&answer)? },
            Err(reason) => Outcome::DoesNotFit { reason },
        })
    }
}

/// Parses the answer to `memory`: bytes of the allocator and of the process, or `-`.
fn parse_memory(answer: &str) -> Result<Memory> {
    let bytes = |word: &str| match word {
        "-" => Ok(None),
        word => word.parse().map(Some).with_context(|| format!("'{answer}' is not an amount of memory")),
    };
    let (allocator, process) = answer.split_once(' ').context("an answer has two amounts")?;
    Ok(Memory { allocator: bytes(allocator)?, process: bytes(process)? })
}

/// A worker whose memory is watched.
struct WatchedProcess {
    worker: Worker,
    watch: SwapWatch,
    /// True if its memory is limited.
    is_limited: bool,
}

impl WatchedProcess {
    /// Sends a request and returns the answer, or the reason why there was not enough memory. The process is ended if the
    /// system begins to swap.
    fn request(&mut self, request: &str) -> Result<Result<String, String>> {
        self.worker.send(request)?;
        let until = Instant::now() + STEP_TIMEOUT;
        loop {
            check_interrupted()?;
            match self.worker.poll(Duration::from_millis(200)) {
                Ok(Some(line)) => {
                    return match line.strip_prefix("failed: ") {
                        Some(reason) if is_out_of_memory(reason) => Ok(Err(reason.to_owned())),
                        Some(reason) => Err(anyhow!("{reason}")),
                        None => Ok(Ok(line)),
                    };
                }
                Ok(None) => {}
                Err(_) => {
                    let ended = self.worker.end();
                    let crashed = self.is_limited && has_crashed(&ended);
                    return if was_killed(&ended) || crashed || is_out_of_memory(&ended) {
                        Ok(Err(ended))
                    } else {
                        Err(anyhow!("{ended}"))
                    };
                }
            }
            if let Some(bytes) = self.watch.swapped() {
                self.worker.end();
                return Ok(Err(format!(
                    "the system swapped {} MB, so the step was stopped",
                    bytes / 1_000_000
                )));
            }
            if Instant::now() > until {
                self.worker.end();
                bail!("no answer to '{request}' in {} s; the process was ended", STEP_TIMEOUT.as_secs());
            }
        }
    }
}

/// Returns true if the system ended a process with SIGKILL, as Linux and macOS do if memory runs out.
fn was_killed(ended: &str) -> bool {
    ended.contains("signal: 9")
}

/// Returns true if a process ended with an invalid access. MLX writes to the null pointer of an allocation that failed.
fn has_crashed(ended: &str) -> bool {
    ended.contains("signal: 11") || ended.contains("signal: 7")
}

/// Returns true if a message of a framework or of the system is about missing memory.
fn is_out_of_memory(reason: &str) -> bool {
    let reason = reason.to_lowercase();
    // libtorch: "can't allocate memory", "out of memory". MLX: "Unable to allocate", "std::bad_alloc". Rust: "memory
    // allocation of N bytes failed".
    ["memory", "alloc"].iter().any(|word| reason.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fits(seconds: f64) -> Outcome {
        Outcome::Fits { seconds, memory: Memory::default() }
    }

    fn too_large() -> Outcome {
        Outcome::DoesNotFit { reason: "out of memory".to_owned() }
    }

    #[test]
    fn sizes_grow_by_a_third_to_a_half_and_end_at_the_largest() {
        assert_eq!(sizes(1, 16), [1, 2, 3, 4, 6, 8, 12, 16]);
        assert_eq!(sizes(64, 1000), [64, 96, 128, 192, 256, 384, 512, 768, 1000]);
        assert_eq!(sizes(64, 50), [0usize; 0]);
    }

    #[test]
    fn the_largest_size_that_fits_is_found_with_few_attempts() {
        let sizes = sizes(1, 1 << 16);
        for (limit, expected) in [(1, Some(1)), (5, Some(4)), (6, Some(6)), (100, Some(96)), (0, None)] {
            let mut attempts = 0;
            let found = search(&sizes, |size| {
                attempts += 1;
                Ok(if size <= limit { fits(1.0) } else { too_large() })
            })
            .unwrap();
            assert_eq!(found.largest().map(|point| point.size), expected, "{limit}");
            assert_eq!(found.limit, Limit::Memory);
            assert!(attempts <= 9, "{attempts} attempts for {limit}");
        }
    }

    #[test]
    fn a_long_step_ends_the_search() {
        let found = search(&sizes(1, 1 << 16), |size| Ok(fits(6.0 * size as f64))).unwrap();
        assert_eq!((found.largest().unwrap().size, found.limit), (6, Limit::Time));
        let all = search(&sizes(64, 128), |_| Ok(fits(0.1))).unwrap();
        assert_eq!((all.largest().unwrap().size, all.limit), (128, Limit::Size));
    }

    #[test]
    fn errors_about_memory_are_results_and_others_are_errors() {
        for reason in [
            "[enforce fail at alloc_cpu.cpp:129] DefaultCPUAllocator: can't allocate memory",
            "CUDA out of memory. Tried to allocate 2.00 GiB",
            "the process ended with signal: 6 (SIGABRT) (core dumped) memory allocation of 8 bytes failed",
            "[malloc] Unable to allocate 4294967296 bytes.",
            "std::bad_alloc",
        ] {
            assert!(is_out_of_memory(reason), "{reason}");
        }
        assert!(was_killed("the process ended with signal: 9 (SIGKILL) "));
        assert!(
            has_crashed("the process ended with signal: 11 (SIGSEGV) ") && !has_crashed("exit status: 11")
        );
        assert!(!is_out_of_memory("the shapes do not match") && !was_killed("exit status: 2"));
    }
}
