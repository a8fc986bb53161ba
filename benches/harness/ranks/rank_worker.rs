//! One rank. It answers requests like any worker, but in step with the other ranks, which get the same requests.
//!
//! | request | answer |
//! | --- | --- |
//! | `join` | `joined` once all ranks have joined |
//! | `case ID` | `ready` once this rank has loaded its share of the case and done a step |
//! | `parity ID` | `ready` once this rank has loaded its share of the parity fixture |
//! | `steps N`, `no-sync N` | seconds that N steps took on the slowest and the fastest rank, and the largest CPU wait share of any rank; `no-sync` leaves the all-reduce out |
//! | `profile N FOLDER` | a JSON string with the summary of the profiles of N steps that rank 0 wrote to FOLDER |
//! | `tensors FILE` | `written` once rank 0 has written the results of the last step, with the loss averaged over ranks; `differ NAME` if the ranks hold different values |
//! | `inputs N` | `ready` once this rank's inputs are its share of batch N |
//! | `checkpoint FILE` | as `tensors`, for the parameters and the state of the optimizer |
//! | `restore SEED FILE` | `ready` once this rank continues from the checkpoint in FILE |
//! | `memory` | peak bytes of the allocator and of the process, each the largest of any rank; 0 if unknown |
//!
//! A rank sends `waiting` before it waits for the others in `join`, `steps` and `no-sync`. So the controller knows
//! which rank makes the others wait.

use std::convert::Infallible;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use transformer_bench::backend::{Backend, Backends, LoadedCase, Rank};
use transformer_bench::files::checksum;
use transformer_bench::fixture::{Fixture, Tensor};
use transformer_bench::interference::CpuUsage;
use transformer_bench::memory;
use transformer_bench::profile::gpu;
use transformer_bench::suite::{Case, Device};

use super::super::profiler::{self, Sampler};
use super::super::protocol::{read_tensors, send_line, serve_requests, write_tensors};
use super::super::symbols;

/// Injects a fault for tests: rank N fails (`absent N`, `hang N`, `die N`), or all ranks communicate wrongly.
/// `no-sync` leaves the all-reduce out, `sum` returns sums instead of means, `same` gives all ranks the first share.
const FAULT: &str = "TRANSFORMER_BENCH_RANK_FAULT";
const HOUR: Duration = Duration::from_secs(3600);
const NO_CASE: &str = "no case is loaded: send 'case ID' first";

/// The state of one rank.
pub struct RankWorker {
    backend: Rc<dyn Backend>,
    rank: Rank,
    case: Option<Case>,
    /// True if the loaded case has the fixture of a parity check.
    parity: bool,
    loaded: Option<Box<dyn LoadedCase>>,
    loaded_without_sync: Option<Box<dyn LoadedCase>>,
    fault: String,
    /// Called when this rank is about to wait for the others.
    announce_waiting: fn(),
}

impl RankWorker {
    pub fn new(backend: Rc<dyn Backend>, rank: Rank, announce_waiting: fn()) -> Self {
        let fault = std::env::var(FAULT).unwrap_or_default();
        Self {
            backend,
            rank,
            case: None,
            parity: false,
            loaded: None,
            loaded_without_sync: None,
            fault,
            announce_waiting,
        }
    }

    /// Returns true if this rank has to inject `fault`.
    fn injects(&self, fault: &str) -> bool {
        self.fault == format!("{fault} {}", self.rank.index)
    }

    pub fn backend(&self) -> &dyn Backend {
        self.backend.as_ref()
    }

    /// Runs a request together with the other ranks and returns its answer.
    ///
    /// # Errors
    /// Returns an error if the request is unknown or fails.
    pub fn answer(&mut self, line: &str) -> Result<String> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let number = |text: &str| text.parse().with_context(|| format!("'{text}' is not a number of steps"));
        match word {
            "join" => {
                if self.injects("absent") {
                    std::thread::sleep(HOUR);
                }
                (self.announce_waiting)();
                self.backend.all_reduce_sum(&[1.0]).map(|_| "joined".to_owned())
            }
            "case" | "parity" => self.load(rest, word == "parity").map(|()| "ready".to_owned()),
            "steps" => self.time(number(rest)?, false),
            "no-sync" => self.time(number(rest)?, true),
            "profile" => {
                let (steps, folder) = rest.split_once(' ').context("usage: profile N FOLDER")?;
                Ok(serde_json::to_string(&self.profile(number(steps)?, Path::new(folder))?)?)
            }
            "tensors" => self.write_results(Path::new(rest)),
            "inputs" => self.set_inputs(rest.parse()?).map(|()| "ready".to_owned()),
            "checkpoint" => {
                let tensors = self.loaded.as_mut().context(NO_CASE)?.checkpoint()?;
                self.write_equal_tensors(&tensors, Path::new(rest))
            }
            "restore" => {
                let (seed, file) = rest.split_once(' ').context("usage: restore SEED FILE")?;
                // Each rank draws its own masks.
                let seed = seed.parse::<u64>()? + self.rank.index as u64;
                let loaded = self.loaded.as_mut().context(NO_CASE)?;
                loaded.restore(&read_tensors(Path::new(file))?, seed)?;
                Ok("ready".to_owned())
            }
            "memory" => self.memory(),
            _ => bail!("'{line}' is not a request to a rank"),
        }
    }

    fn fixture(&self, case: Case, parity: bool) -> Fixture {
        let mut fixture = if parity { Fixture::for_parity(case) } else { Fixture::new(case) };
        fixture.no_sync = parity && self.fault == "no-sync";
        fixture.for_rank(if self.fault == "same" { 0 } else { self.rank.index })
    }

    fn load(&mut self, id: &str, parity: bool) -> Result<()> {
        (self.loaded, self.loaded_without_sync) = (None, None);
        let case: Case = id.parse().map_err(anyhow::Error::msg)?;
        ensure!(case.shape.ranks() == self.rank.count, "{case} is not a case of {} ranks", self.rank.count);
        (self.case, self.parity) = (Some(case), parity);
        self.backend.reset_peak_memory()?;
        memory::reset_resident_peak();
        let mut loaded = self.backend.load(&self.fixture(case, parity))?;
        if !parity {
            loaded.step()?;
        }
        self.loaded = Some(loaded);
        Ok(())
    }

    fn set_inputs(&mut self, batch: usize) -> Result<()> {
        let fixture = self.fixture(self.case.context(NO_CASE)?, self.parity).with_batch(batch);
        self.loaded.as_mut().context(NO_CASE)?.set_inputs(&fixture)
    }

    /// Returns the values of all ranks, in their order.
    fn all_gather(&self, own: f32) -> Result<Vec<f32>> {
        let mut values = vec![0.0; self.rank.count];
        values[self.rank.index] = own;
        self.backend.all_reduce_sum(&values)
    }

    /// Returns the largest value of any rank.
    fn all_reduce_max(&self, own: f32) -> Result<f32> {
        Ok(self.all_gather(own)?.into_iter().fold(0.0, f32::max))
    }

    fn time(&mut self, steps: u64, no_sync: bool) -> Result<String> {
        if self.injects("die") {
            std::process::abort();
        }
        if self.injects("hang") {
            std::thread::sleep(HOUR);
        }
        let case = self.case.context(NO_CASE)?;
        if no_sync && self.loaded_without_sync.is_none() {
            let mut fixture = self.fixture(case, false);
            fixture.no_sync = true;
            self.loaded_without_sync = Some(self.backend.load(&fixture)?);
        }
        // A barrier: all ranks begin at the same time.
        (self.announce_waiting)();
        self.backend.all_reduce_sum(&[0.0])?;
        let loaded = if no_sync { &mut self.loaded_without_sync } else { &mut self.loaded };
        let loaded = loaded.as_mut().context(NO_CASE)?;
        let (before, start) = (CpuUsage::now(), Instant::now());
        loaded.time(steps)?;
        let elapsed = start.elapsed().as_secs_f32();
        let cpu_wait = CpuUsage::now().since(before).cpu_wait_share().unwrap_or(0.0);
        let times = self.all_gather(elapsed)?;
        let slowest = times.iter().copied().fold(0.0, f32::max);
        let fastest = times.iter().copied().fold(slowest, f32::min);
        Ok(format!("{slowest:e} {fastest:e} {:e}", self.all_reduce_max(cpu_wait as f32)?))
    }

    /// Profiles rank 0. The other ranks do the same steps, so that rank 0 does not wait for them.
    fn profile(&mut self, steps: u64, folder: &Path) -> Result<String> {
        let case = self.case.context(NO_CASE)?;
        let on_gpu = case.backend.device() == Device::NvidiaGpu;
        if on_gpu {
            // The kernels of a CUDA graph are attributed while the graph is captured, so it is captured again.
            let _attribution = gpu::attribute_launches()?;
            self.load(&case.to_string(), false)?;
        }
        let profiles = self.rank.index == 0;
        let loaded = self.loaded.as_mut().context(NO_CASE)?;
        let mut summary = Vec::new();
        if profiles {
            let sampler = Sampler::default();
            summary.push(sampler.profile_steps(loaded.as_mut(), steps, &case.to_string(), folder)?);
        } else {
            loaded.time(steps)?;
        }
        if on_gpu {
            let step = loaded.time(3)?.as_secs_f32() / 3.0;
            let steps = profiler::gpu_steps(f64::from(self.all_reduce_max(step)?));
            let loaded = self.loaded.as_mut().context(NO_CASE)?;
            if profiles {
                summary.push(profiler::profile_gpu(loaded.as_mut(), &case, steps, folder)?);
            } else {
                loaded.time(2 * steps)?;
            }
        }
        symbols::remove_jit_map();
        Ok(summary.join("\n"))
    }

    fn write_results(&mut self, file: &Path) -> Result<String> {
        let mut tensors = self.loaded.as_mut().context(NO_CASE)?.outputs()?;
        for tensor in &mut tensors {
            if tensor.name == "loss" {
                // The mean over the batch is the mean of the ranks' means.
                let shares: Vec<f32> = tensor.data.iter().map(|v| v / self.rank.count as f32).collect();
                tensor.data = self.backend.all_reduce_sum(&shares)?;
            } else if self.fault == "sum" && tensor.name.starts_with("grad/") {
                tensor.data.iter_mut().for_each(|v| *v *= self.rank.count as f32);
            }
        }
        self.write_equal_tensors(&tensors, file)
    }

    /// Writes tensors on rank 0 if they are equal on all ranks.
    fn write_equal_tensors(&self, tensors: &[Tensor], file: &Path) -> Result<String> {
        if let Some(name) = self.first_difference(tensors)? {
            return Ok(format!("differ {name}"));
        }
        if self.rank.index == 0 {
            write_tensors(file, tensors)?;
        }
        Ok("written".to_owned())
    }

    /// Returns the first tensor whose bits differ between ranks.
    fn first_difference(&self, tensors: &[Tensor]) -> Result<Option<String>> {
        // MLX cannot reduce an empty array.
        if tensors.is_empty() {
            return Ok(None);
        }
        // Each checksum becomes four 16-bit integers, which f32 represents exactly.
        let mut own: Vec<f32> = Vec::new();
        for tensor in tensors {
            let bytes: Vec<u8> = tensor.data.iter().flat_map(|v| v.to_bits().to_le_bytes()).collect();
            let checksum = checksum(&bytes).to_le_bytes();
            own.extend(checksum.chunks(2).map(|b| f32::from(u16::from_le_bytes([b[0], b[1]]))));
        }
        // Broadcasts the checksums of rank 0.
        let sent = if self.rank.index == 0 { own.clone() } else { vec![0.0; own.len()] };
        let first = self.backend.all_reduce_sum(&sent)?;
        let differs: Vec<f32> = own.iter().zip(&first).map(|(a, b)| f32::from(u8::from(a != b))).collect();
        let differs = self.backend.all_reduce_sum(&differs)?;
        let position = differs.iter().position(|count| *count > 0.0);
        Ok(position.map(|position| tensors[position / 4].name.clone()))
    }

    fn memory(&self) -> Result<String> {
        // f32 rounds the number of bytes to seven digits.
        let peak = self.all_reduce_max(self.backend.peak_memory().unwrap_or(0) as f32)?;
        let resident = self.all_reduce_max(memory::resident_peak_bytes().unwrap_or(0) as f32)?;
        Ok(format!("{} {}", peak as u64, resident as u64))
    }
}

/// Answers the requests of the controller until it closes standard input.
///
/// # Errors
/// Returns an error if this process lacks the backend or has no rank.
pub fn serve(backends: Backends, id: &str) -> Result<Infallible> {
    exit_with_parent();
    let backend = backends.available.into_iter().find(|b| b.id().id() == id);
    let backend = backend.with_context(|| format!("this rank has no backend {id}"))?;
    let rank = Rank::from_environment(backend.id().framework())?.context("this process has no rank")?;
    let mut worker = RankWorker::new(Rc::from(backend), rank, || send_line("waiting").unwrap_or(()));
    serve_requests(|line| worker.answer(line))
}

/// Ends this process after its parent. A rank that waits in an all-reduce does not notice the end of its input.
fn exit_with_parent() {
    // SAFETY (all): the calls take no pointers.
    let parent = unsafe { libc::getppid() };
    std::thread::spawn(move || {
        while unsafe { libc::getppid() } == parent {
            std::thread::sleep(Duration::from_secs(1));
        }
        unsafe { libc::_exit(1) }
    });
}
