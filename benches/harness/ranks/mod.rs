//! Cases that several devices share. The process that measures is no rank: it starts one for each
//! device (`processes.rs`), asks all of them for the same, and waits for the slowest. Where
//! `torchrun` or `mlx.launch` has started a rank a host, the first measures and leads the others
//! (`led.rs`). What a rank answers is in `part.rs`.

mod failure;
mod launched;
mod launcher;
pub mod rank_worker;

use std::fs;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use transformer_bench::backend::{
    Backend, Backends, COLLECTIVE_TIMEOUT, Environment, LoadedCase, Rank, RankStats, Sums, Unsupported,
    visible_gpu,
};
use transformer_bench::model::fixture::{Fixture, Tensor};
use transformer_bench::parity::RankMismatch;
use transformer_bench::results::Scratch;
use transformer_bench::statistics::{median, sorted};
use transformer_bench::suite::{BackendId, Case, Variant, Workload};

pub use launched::{dismiss, follow};
pub use launcher::{RANK_OF, stay};

/// Rounds in turns from which the exchange that nothing hides is read: of nine numbers the second and
/// the eighth enclose the median in 96 of 100 cases (binomial).
const ROUNDS: usize = 9;
/// A round takes at least so long, or a step.
const ROUND: f64 = 0.2;

/// Whoever has all ranks do the same, and hears of it from the first.
trait Lead {
    /// The first rank's answer, once all have answered. `expected` is what the work should take.
    ///
    /// # Errors
    /// Where a rank fails, ends or does not answer: which, and why. None is left running then.
    fn ask(&mut self, request: &str, expected: Duration) -> Result<String>;
}

/// How long ranks may take for what should take `expected`. The engine's own patience comes first, since
/// its reason is the better one.
fn limit(expected: Duration) -> Duration {
    3 * expected + COLLECTIVE_TIMEOUT + Duration::from_secs(5)
}

/// A case that ranks work for.
struct Shared {
    case: Case,
    ranks: Box<dyn Lead>,
    engine: &'static str,
    folder: Scratch,
    step: Duration,
    skews: Vec<f64>,
    waiting: f64,
}

impl Shared {
    /// Has so many steps done; returns what the slowest rank took.
    fn steps(&mut self, request: &str, steps: u64) -> Result<Duration> {
        let expected = self.step * u32::try_from(steps).unwrap_or(u32::MAX);
        let answer = self.ranks.ask(&format!("{request} {steps}"), expected)?;
        let mut numbers = answer.split(' ').map(|word| word.parse::<f64>().ok());
        let mut next = || numbers.next().flatten().with_context(|| format!("'{answer}' is no time"));
        let (slowest, fastest, waiting) = (next()?, next()?, next()?);
        let elapsed = Duration::from_secs_f64(slowest);
        self.step = elapsed.div_f64(steps.max(1) as f64);
        self.skews.push(1.0 - fastest / slowest);
        self.waiting = self.waiting.max(waiting);
        Ok(elapsed)
    }

    /// 1 less the step without its exchange over the step.
    fn exposed(&mut self) -> Result<[f64; 3]> {
        self.steps("silent", 1)?;
        let whole = self.steps("steps", 1)?;
        let steps = (ROUND / whole.as_secs_f64()).ceil().max(1.0) as u64;
        let mut shares = Vec::new();
        for round in 0..ROUNDS {
            let order = if round % 2 == 0 { ["steps", "silent"] } else { ["silent", "steps"] };
            let mut times = order.map(|_| 0.0);
            for (time, request) in times.iter_mut().zip(order) {
                *time = self.steps(request, steps)?.as_secs_f64();
            }
            let [whole, silent] = if round % 2 == 0 { times } else { [times[1], times[0]] };
            shares.push(1.0 - silent / whole);
        }
        let shares = sorted(shares);
        Ok([shares[ROUNDS / 2], shares[1], shares[ROUNDS - 2]])
    }
}

impl LoadedCase for Shared {
    fn step(&mut self) -> Result<()> {
        self.time(1).map(|_| ())
    }

    fn time(&mut self, steps: u64) -> Result<Duration> {
        self.steps("steps", steps)
    }

    fn rank_stats(&mut self) -> Option<RankStats> {
        let skew = median(&self.skews);
        let memory = self.ranks.ask("memory", Duration::ZERO).ok()?;
        let mut bytes = memory.split(' ').map(|word| word.parse().ok().filter(|bytes| *bytes > 0));
        let (peak_bytes, rss_peak_bytes) = (bytes.next().flatten(), bytes.next().flatten());
        let waiting_share = self.waiting;
        let exposed = match self.case.workload {
            // A second copy of the step may not fit.
            Workload::TrainStep => self
                .exposed()
                .map_err(|error| eprintln!("{}: no exposed exchange: {error:#}", self.case))
                .ok(),
            _ => None,
        };
        Some(RankStats {
            comm_backend: self.engine.to_owned(),
            peak_bytes,
            rss_peak_bytes,
            cpu_wait_share: waiting_share,
            skew,
            exposed_communication: exposed,
        })
    }

    fn profile_first_rank(&mut self, time: Duration, folder: &Path) -> Option<Result<String>> {
        let mut ask = || {
            fs::create_dir_all(folder).with_context(|| format!("{} could not be made", folder.display()))?;
            let steps = (time.as_secs_f64() / self.steps("steps", 1)?.as_secs_f64()).ceil().max(3.0);
            // The part is loaded again, and launches that are named take their time.
            let expected = launcher::LOADING + 3 * time;
            let said = self.ranks.ask(&format!("profile {steps} {}", folder.display()), expected)?;
            Ok(serde_json::from_str(&said)?)
        };
        Some(ask())
    }

    fn outputs(&mut self) -> Result<Vec<Tensor>> {
        let file = self.folder.0.join("tensors");
        let answer = self.ranks.ask(&format!("tensors {}", file.display()), self.step)?;
        if let Some(what) = answer.strip_prefix("differ ") {
            return Err(anyhow::Error::new(RankMismatch(what.to_owned())));
        }
        read_tensors(&file)
    }
}

/// A line of JSON (names and dims), then the values.
///
/// # Errors
/// Where the file can't be written.
pub fn write_tensors(file: &Path, all: &[Tensor]) -> Result<()> {
    let index: Vec<(&String, &Vec<usize>)> = all.iter().map(|t| (&t.name, &t.dims)).collect();
    let mut bytes = serde_json::to_vec(&index)?;
    bytes.push(b'\n');
    bytes.extend(all.iter().flat_map(|t| &t.data).flat_map(|v| v.to_le_bytes()));
    fs::write(file, bytes).with_context(|| format!("{} could not be written", file.display()))
}

/// Reads what [`write_tensors`] has written.
fn read_tensors(file: &Path) -> Result<Vec<Tensor>> {
    let bytes = fs::read(file).with_context(|| format!("{} can't be read", file.display()))?;
    let end = bytes.iter().position(|b| *b == b'\n').context("tensors begin with a line of JSON")?;
    let index: Vec<(String, Vec<usize>)> = serde_json::from_slice(&bytes[..end])?;
    let mut numbers = bytes[end + 1..].chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let tensor = |(name, dims): (String, Vec<usize>)| {
        let count: usize = dims.iter().product();
        let data: Vec<f32> = numbers.by_ref().take(count).collect();
        if data.len() < count {
            bail!("{} ends within {name}: is the disk full?", file.display());
        }
        Ok(Tensor { name, dims, data })
    };
    index.into_iter().map(tensor).collect()
}

/// Shows a rank that a launcher started its own GPU alone, as our own are shown theirs; before any
/// other thread runs.
pub fn see_own_gpu(led: Option<Rank>) {
    let Ok(local) = std::env::var("LOCAL_RANK") else { return };
    if let (Some(_), Ok(local)) = (led, local.parse()) {
        // SAFETY: no other thread runs yet.
        unsafe { std::env::set_var("CUDA_VISIBLE_DEVICES", visible_gpu(local)) };
    }
}

/// A backend whose cases may be shared among ranks.
struct Sharing {
    inner: Rc<dyn Backend>,
    /// This process's own place, where a launcher started it as one of several.
    led: Option<Rank>,
}

/// Gives every backend that was found its ranks; `led` is this process's own place among those that a
/// launcher started.
pub fn shared(found: Backends, led: Option<Rank>) -> Backends {
    let share = |inner| Box::new(Sharing { inner: Rc::from(inner), led }) as Box<dyn Backend>;
    Backends { available: found.available.into_iter().map(share).collect(), unavailable: found.unavailable }
}

impl Backend for Sharing {
    fn supports(&self, case: &Case) -> Result<(), Unsupported> {
        self.inner.supports(case)?;
        let ranks = case.shape.ranks();
        let no = |reason: String| Err(Unsupported(reason));
        if let Some(led) = self.led {
            return if ranks == led.count {
                Ok(())
            } else {
                no(format!("started as {} ranks: cases with -r{} are measured", led.count, led.count))
            };
        }
        let (devices, kind) = self.inner.devices();
        if ranks > 1 && ranks > devices {
            return no(format!("{ranks} ranks take a device each, and this machine has {devices} {kind}"));
        }
        Ok(())
    }

    fn load(&self, fixture: &Fixture) -> Result<Box<dyn LoadedCase>> {
        let case = fixture.case;
        if case.shape.ranks() == 1 {
            return self.inner.load(fixture);
        }
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let own = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let folder = std::env::temp_dir().join(format!("transformer-bench-ranks-{own}"));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).with_context(|| format!("{} could not be made", folder.display()))?;
        let folder = Scratch(folder);
        let mut ranks: Box<dyn Lead> = match self.led {
            Some(rank) => Box::new(launched::Leader::new(Rc::clone(&self.inner), rank)),
            None => Box::new(launcher::Processes::start(self.inner.as_ref(), case, &folder.0)?),
        };
        let word = if fixture.is_for_parity() { "part" } else { "case" };
        ranks.ask(&format!("{word} {case}"), launcher::LOADING)?;
        let step = Duration::from_secs(1);
        let engine = self.inner.comm_backend();
        Ok(Box::new(Shared { case, ranks, engine, folder, step, skews: Vec::new(), waiting: 0.0 }))
    }

    fn id(&self) -> BackendId {
        self.inner.id()
    }

    fn versions(&self) -> Vec<(String, String)> {
        self.inner.versions()
    }

    fn is_precompiled(&self, recipe: Variant) -> bool {
        self.inner.is_precompiled(recipe)
    }

    fn needs_compile(&self, case: &Case) -> bool {
        self.inner.needs_compile(case)
    }

    fn compile(&self, case: &Case) -> Result<()> {
        self.inner.compile(case)
    }

    fn devices(&self) -> (usize, &'static str) {
        self.inner.devices()
    }

    fn comm_backend(&self) -> &'static str {
        self.inner.comm_backend()
    }

    fn rendezvous_env(&self, ranks: usize, folder: &Path) -> Result<Vec<Environment>> {
        self.inner.rendezvous_env(ranks, folder)
    }

    fn all_reduce_sum(&self, values: &[f32]) -> Result<Vec<f32>> {
        self.inner.all_reduce_sum(values)
    }

    fn accumulation(&self) -> Sums {
        self.inner.accumulation()
    }

    fn synchronize(&self) -> Result<()> {
        self.inner.synchronize()
    }

    fn memory_total(&self) -> Option<u64> {
        self.inner.memory_total()
    }

    fn reset_peak_memory(&self) -> Result<()> {
        self.inner.reset_peak_memory()
    }

    fn peak_memory(&self) -> Option<u64> {
        self.inner.peak_memory()
    }

    fn capture(&self, path: &Path, body: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.inner.capture(path, body)
    }
}
