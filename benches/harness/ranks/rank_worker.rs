//! What one rank does. It reads a line and answers with one, as any worker, but in step with the others,
//! who are asked the same.
//!
//! | line | answer |
//! | --- | --- |
//! | `join` | `joined` once all ranks have met |
//! | `case ID` | `ready` once this rank's part of the case has been prepared and has done a step |
//! | `part ID` | `ready` once its part of the parity fixture has been prepared |
//! | `steps N`, `silent N` | seconds that so many steps took, of the slowest rank and the fastest, and the largest share of it that a rank waited for a core; silent ones leave the exchange out |
//! | `profile N FOLDER` | as JSON, what is to be said of the profiles that the first rank has left in the folder, of so many steps of all |
//! | `tensors FILE` | `written` once the first rank has put the last step's results into the file, the loss as the mean over ranks; `differ` and what, where the ranks hold different ones |
//! | `memory` | peak bytes of the allocator and of the process, the largest of any rank; 0 where nothing tells |
//!
//! Before it waits for the others on `join`, `steps` and `silent` it says `here`, so that whoever conducts
//! knows which rank keeps the others waiting.

use std::convert::Infallible;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use transformer_bench::backend::{Backend, Backends, LoadedCase, Rank};
use transformer_bench::interference::CpuUsage;
use transformer_bench::memory;
use transformer_bench::model::fixture::{Fixture, Tensor};
use transformer_bench::profile::gpu;
use transformer_bench::results::checksum;
use transformer_bench::suite::{Case, Device};

use super::super::profiler::{self, Sampler};
use super::super::symbols;
use super::super::worker::{say, until_end};
use super::write_tensors;

/// Makes rank N fail (`absent N`, `hang N`, `die N`), or all exchange wrongly (`silent`: not at all; `sum`: sums
/// for means; `same`: all with the first one's part). For tests of what is said then.
const FAULT: &str = "TRANSFORMER_BENCH_RANK_FAULT";
const HOUR: Duration = Duration::from_secs(3600);

/// One rank's side of a case.
pub struct Part {
    backend: Rc<dyn Backend>,
    rank: Rank,
    case: Option<Case>,
    prepared: Option<Box<dyn LoadedCase>>,
    silent: Option<Box<dyn LoadedCase>>,
    fault: String,
    /// Called when this rank is about to wait for the others.
    here: fn(),
}

impl Part {
    pub fn new(backend: Rc<dyn Backend>, rank: Rank, here: fn()) -> Self {
        let fault = std::env::var(FAULT).unwrap_or_default();
        Self { backend, rank, case: None, prepared: None, silent: None, fault, here }
    }

    /// Whether this rank should fail in a way, on purpose.
    fn fails(&self, way: &str) -> bool {
        self.fault == format!("{way} {}", self.rank.index)
    }

    pub fn backend(&self) -> &dyn Backend {
        self.backend.as_ref()
    }

    pub fn answer(&mut self, line: &str) -> Result<String> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let steps = || rest.parse().with_context(|| format!("'{rest}' is no number of steps"));
        match word {
            "join" => {
                if self.fails("absent") {
                    std::thread::sleep(HOUR);
                }
                (self.here)();
                self.backend.all_reduce_sum(&[1.0]).map(|_| "joined".to_owned())
            }
            "case" | "part" => self.load(rest, word == "part").map(|()| "ready".to_owned()),
            "steps" => self.time(steps()?, false),
            "silent" => self.time(steps()?, true),
            "profile" => {
                let (steps, folder) = rest.split_once(' ').context("profile N FOLDER")?;
                let steps = steps.parse().with_context(|| format!("'{steps}' is no number of steps"))?;
                Ok(serde_json::to_string(&self.profile(steps, Path::new(folder))?)?)
            }
            "tensors" => self.tensors(Path::new(rest)),
            "memory" => self.memory(),
            _ => bail!("'{line}' is no request to a rank"),
        }
    }

    fn fixture(&self, case: Case, parity: bool) -> Fixture {
        let mut fixture = if parity { Fixture::for_parity(case) } else { Fixture::new(case) };
        fixture.silent = parity && self.fault == "silent";
        fixture.for_rank(if self.fault == "same" { 0 } else { self.rank.index })
    }

    fn load(&mut self, id: &str, parity: bool) -> Result<()> {
        (self.prepared, self.silent) = (None, None);
        let case: Case = id.parse().map_err(anyhow::Error::msg)?;
        if case.shape.ranks() != self.rank.count {
            bail!("{case} is no case of {} ranks", self.rank.count);
        }
        self.case = Some(case);
        self.backend.reset_peak_memory()?;
        memory::reset_resident_peak();
        let mut prepared = self.backend.load(&self.fixture(case, parity))?;
        if !parity {
            prepared.step()?;
        }
        self.prepared = Some(prepared);
        Ok(())
    }

    /// The numbers of all ranks, in their order: each gives its own.
    fn all(&self, own: f32) -> Result<Vec<f32>> {
        let mut each = vec![0.0; self.rank.count];
        each[self.rank.index] = own;
        self.backend.all_reduce_sum(&each)
    }

    fn most(&self, own: f32) -> Result<f32> {
        Ok(self.all(own)?.into_iter().fold(0.0, f32::max))
    }

    fn time(&mut self, steps: u64, silent: bool) -> Result<String> {
        if self.fails("die") {
            std::process::abort();
        }
        if self.fails("hang") {
            std::thread::sleep(HOUR);
        }
        let case = self.case.context("no case: say 'case ID' first")?;
        if silent && self.silent.is_none() {
            let mut fixture = self.fixture(case, false);
            fixture.silent = true;
            self.silent = Some(self.backend.load(&fixture)?);
        }
        // All begin at once.
        (self.here)();
        self.backend.all_reduce_sum(&[0.0])?;
        let prepared = if silent { &mut self.silent } else { &mut self.prepared };
        let prepared = prepared.as_mut().context("no case: say 'case ID' first")?;
        let (watch, start) = (CpuUsage::now(), Instant::now());
        prepared.time(steps)?;
        let elapsed = start.elapsed().as_secs_f32();
        let waiting = CpuUsage::now().since(watch).cpu_wait_share().unwrap_or(0.0);
        let times = self.all(elapsed)?;
        let slowest = times.iter().copied().fold(0.0, f32::max);
        let fastest = times.iter().copied().fold(slowest, f32::min);
        Ok(format!("{slowest:e} {fastest:e} {:e}", self.most(waiting as f32)?))
    }

    /// All do the same steps, so that the first, who looks, waits for nobody.
    fn profile(&mut self, steps: u64, folder: &Path) -> Result<String> {
        let case = self.case.context("no case: say 'case ID' first")?;
        let gpu = case.backend.device() == Device::NvidiaGpu;
        if gpu {
            // A recorded graph's kernels are named while it is recorded: once more.
            let _watch = gpu::watch()?;
            self.load(&case.to_string(), false)?;
        }
        let looks = self.rank.index == 0;
        let prepared = self.prepared.as_mut().context("the part was loaded")?;
        let mut said = Vec::new();
        if looks {
            said.push(Sampler::default().steps(prepared.as_mut(), steps, &case.to_string(), folder)?);
        } else {
            prepared.time(steps)?;
        }
        if gpu {
            let each = prepared.time(3)?.as_secs_f32() / 3.0;
            let recorded = profiler::recorded(f64::from(self.most(each)?));
            let prepared = self.prepared.as_mut().context("the part was loaded")?;
            if looks {
                said.push(profiler::gpu(prepared.as_mut(), &case, recorded, folder)?);
            } else {
                prepared.time(2 * recorded)?;
            }
        }
        symbols::drop_generated();
        Ok(said.join("\n"))
    }

    fn tensors(&mut self, file: &Path) -> Result<String> {
        let prepared = self.prepared.as_mut().context("no case: say 'part ID' first")?;
        let mut all = prepared.outputs()?;
        for tensor in &mut all {
            if tensor.name == "loss" {
                // A mean over the batch is the mean of its parts' means.
                let shares: Vec<f32> = tensor.data.iter().map(|v| v / self.rank.count as f32).collect();
                tensor.data = self.backend.all_reduce_sum(&shares)?;
            } else if self.fault == "sum" && tensor.name.starts_with("grad/") {
                tensor.data.iter_mut().for_each(|v| *v *= self.rank.count as f32);
            }
        }
        if let Some(name) = self.differs(&all)? {
            return Ok(format!("differ {name}"));
        }
        if self.rank.index == 0 {
            write_tensors(file, &all)?;
        }
        Ok("written".to_owned())
    }

    /// The tensor that the ranks do not hold alike to the last bit.
    fn differs(&self, all: &[Tensor]) -> Result<Option<String>> {
        // A checksum in four numbers that f32 holds exactly; the first rank's are everybody's.
        let mut own: Vec<f32> = Vec::new();
        for tensor in all {
            let bytes: Vec<u8> = tensor.data.iter().flat_map(|v| v.to_bits().to_le_bytes()).collect();
            own.extend(
                checksum(&bytes).to_le_bytes().chunks(2).map(|b| f32::from(u16::from_le_bytes([b[0], b[1]]))),
            );
        }
        let given = if self.rank.index == 0 { own.clone() } else { vec![0.0; own.len()] };
        let first = self.backend.all_reduce_sum(&given)?;
        let wrong: Vec<f32> = own.iter().zip(&first).map(|(a, b)| f32::from(u8::from(a != b))).collect();
        let wrong = self.backend.all_reduce_sum(&wrong)?;
        let place = wrong.iter().position(|count| *count > 0.0);
        Ok(place.map(|place| all[place / 4].name.clone()))
    }

    fn memory(&self) -> Result<String> {
        // Of so many bytes f32 keeps seven digits.
        let peak = self.most(self.backend.peak_memory().unwrap_or(0) as f32)?;
        let resident = self.most(memory::resident_peak_bytes().unwrap_or(0) as f32)?;
        Ok(format!("{} {}", peak as u64, resident as u64))
    }
}

/// Answers the process that conducts, until it ends.
///
/// # Errors
/// Where this process has no such backend, or is no rank.
pub fn serve(found: Backends, id: &str) -> Result<Infallible> {
    end_with_parent();
    let backend = found.available.into_iter().find(|b| b.id().id() == id);
    let backend = backend.with_context(|| format!("this rank has no {id}"))?;
    let rank = Rank::from_environment(backend.id().framework())?.context("this process is no rank")?;
    let mut part = Part::new(Rc::from(backend), rank, || say("here").unwrap_or(()));
    until_end(|line| part.answer(line))
}

/// A rank that waits in an exchange reads nothing, and so does not see its input end.
fn end_with_parent() {
    // SAFETY (both): no arguments, no memory.
    let parent = unsafe { libc::getppid() };
    std::thread::spawn(move || {
        while unsafe { libc::getppid() } == parent {
            std::thread::sleep(Duration::from_secs(1));
        }
        unsafe { libc::_exit(1) }
    });
}
