//! `--profile-time`: samples the stacks of every thread while steps run, through
//! Criterion's hook and pprof.
//!
//! Blocks of steps with and without sampling take turns, so that the profile states what
//! it costs.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use criterion::profiler::Profiler;
use pprof::protos::Message;
use pprof::{ProfilerGuard, ProfilerGuardBuilder, UnresolvedReport};
use transformer_bench::backend::Prepared;
use transformer_bench::case::Case;
use transformer_bench::compare::midmean;
use transformer_bench::gpu;
use transformer_bench::profile::{Profile, Unit};
use transformer_bench::results;

use super::symbols::{Symbols, is_generated};
use super::timing;

/// Samples a second of CPU time.
const FREQUENCY: i32 = 997;
/// Steps of about this long run before sampling goes on or off: long against the
/// system's ticks of some milliseconds, at which it samples at best.
const BLOCK: Duration = Duration::from_millis(200);

/// What the harness and Criterion's hook share.
#[derive(Default)]
struct State {
    guard: Option<ProfilerGuard<'static>>,
    /// Seconds a step of each block, with sampling and without.
    sampled: Vec<f64>,
    bare: Vec<f64>,
    failed: Option<anyhow::Error>,
}

/// The sampling profiler, as Criterion's hook.
#[derive(Clone, Default)]
pub struct Sampler(Rc<RefCell<State>>);

/// Starts or stops pprof's timer, which counts the CPU time of all threads.
fn ticking(on: bool) {
    let microseconds = if on { 1_000_000 / i64::from(FREQUENCY) } else { 0 };
    let interval = libc::timeval { tv_sec: 0, tv_usec: microseconds as libc::suseconds_t };
    let value = libc::itimerval { it_interval: interval, it_value: interval };
    // SAFETY: plain data; the old value is not asked for.
    unsafe { libc::setitimer(libc::ITIMER_PROF, &raw const value, std::ptr::null_mut()) };
}

impl Sampler {
    /// Runs steps, by turns with and without sampling; returns the time of all.
    pub fn run(&self, prepared: &mut dyn Prepared, steps: u64) -> Result<Duration> {
        let mut state = self.0.borrow_mut();
        if state.guard.is_none() {
            return timing::time(prepared, steps);
        }
        let mut done = 0;
        let mut all = Duration::ZERO;
        while done < steps {
            let each = (all.as_secs_f64() / done.max(1) as f64).max(1e-9);
            let block = ((BLOCK.as_secs_f64() / each) as u64).clamp(1, 100_000).min(steps - done);
            // Each kind of block once, in either order.
            let sampled = state.sampled.len() <= state.bare.len();
            ticking(sampled);
            let elapsed = timing::time(prepared, block);
            ticking(false);
            let elapsed = elapsed?;
            let blocks = if sampled { &mut state.sampled } else { &mut state.bare };
            blocks.push(elapsed.as_secs_f64() / block as f64);
            all += elapsed;
            done += block;
        }
        Ok(all)
    }

    /// What went wrong in Criterion's hook, which can't return it.
    pub fn failure(&self) -> Option<anyhow::Error> {
        self.0.borrow_mut().failed.take()
    }

    fn finish(&self, id: &str, folder: &Path) -> Result<()> {
        let mut state = self.0.borrow_mut();
        let guard = state.guard.take().context("the profiler did not start")?;
        let unread = "the samples could not be read";
        let profile = stacks(&guard.report().build_unresolved().context(unread)?);
        let report = guard.report().build().context(unread)?;
        drop(guard);
        anyhow::ensure!(!profile.is_empty(), "no sample was taken: profile for longer");
        profile.write(folder, "flamegraph", id, Unit::Samples)?;
        let proto = report.pprof().map_err(|e| anyhow!("no protobuf: {e}"))?;
        std::fs::write(folder.join("profile.pb"), proto.encode_to_vec())
            .context("profile.pb could not be written")?;
        let slowdown = if state.bare.is_empty() {
            "its cost is unknown: profile for longer".to_owned()
        } else {
            let change = midmean(&state.sampled) / midmean(&state.bare) - 1.0;
            format!("sampling changed the step by {:+.1} % ({} blocks)", 100.0 * change, state.sampled.len())
        };
        println!(
            "{id}: {} samples, {:.1} % of them in a named function; {slowdown}\n{}",
            profile.total(),
            100.0 * profile.resolved(),
            folder.join("flamegraph.svg").display()
        );
        Ok(())
    }
}

impl Profiler for Sampler {
    fn start_profiling(&mut self, _id: &str, _folder: &Path) {
        let mut state = self.0.borrow_mut();
        *state = State::default();
        match ProfilerGuardBuilder::default().frequency(FREQUENCY).build() {
            Ok(guard) => {
                // The first sample prepares the unwinder, which allocates: taken here,
                // where no other code is interrupted.
                ticking(false);
                // SAFETY: pprof's own handler is in place.
                unsafe { libc::raise(libc::SIGPROF) };
                state.guard = Some(guard);
            }
            Err(error) => {
                state.failed = Some(anyhow!("this system lets no signal sample the stacks: {error}"));
            }
        }
    }

    fn stop_profiling(&mut self, id: &str, folder: &Path) {
        if let Err(error) = self.finish(id, folder) {
            self.0.borrow_mut().failed = Some(error);
        }
    }
}

/// The report's stacks, outermost first, without what lies around a step. pprof's own
/// resolution leaves out frames that have no symbol, as if their callers had worked.
fn stacks(report: &UnresolvedReport) -> Profile {
    let mut profile = Profile::default();
    let mut symbols = Symbols::read();
    for (sample, &count) in &report.data {
        let mut frames: Vec<String> = Vec::new();
        for (depth, frame) in sample.frames.iter().enumerate().rev() {
            // A caller's address is that behind its call.
            let address = if depth == 0 { frame.ip } else { frame.ip.saturating_sub(1) };
            frames.extend_from_slice(symbols.at(address));
        }
        let thread = String::from_utf8_lossy(&sample.thread_name[..sample.thread_name_length]).into_owned();
        let place = |wanted: &str| frames.iter().rposition(|f| f.contains(wanted));
        let root = if let Some(step) = place("Prepared>::step") {
            frames.drain(..=step);
            "step".to_owned()
        } else if let Some(start) = place("start_thread").or_else(|| place("clone3")) {
            frames.drain(..=start);
            thread_name(&frames, &thread)
        } else if place("harness::main").is_some() || place("lang_start").is_some() {
            // Between the steps.
            continue;
        } else {
            // Hand-written kernels (MKL's among them) say nothing of their callers: what
            // the unwinder finds beyond them is noise.
            let lost = frames.iter().take_while(|f| is_generated(f)).count();
            frames.drain(..lost.min(frames.len() - 1));
            match thread_name(&frames, &thread) {
                name if name.starts_with("thread ") => "(caller unknown)".to_owned(),
                name => name,
            }
        };
        frames.insert(0, root);
        profile.add(&frames, count.max(0) as u64);
    }
    profile
}

fn thread_name(frames: &[String], name: &str) -> String {
    let any = |wanted: &str| frames.iter().any(|f| f.contains(wanted));
    if any("gomp") || any("omp_fn") || any("kmp") {
        "OpenMP worker".to_owned()
    } else if any("mlx::core") {
        "MLX stream".to_owned()
    } else if any("blas_thread") {
        "OpenBLAS worker".to_owned()
    } else if any("torch::autograd") {
        "autograd worker".to_owned()
    } else {
        format!("thread {name}")
    }
}

/// Nanoseconds of GPU time that are recorded, about.
const RECORDED: f64 = 0.5e9;

/// The second flamegraph of a GPU case: what its kernels take, by operator.
pub fn gpu(prepared: &mut dyn Prepared, case: &Case, folder: &Path) -> Result<()> {
    let each = timing::time(prepared, 3)?.as_nanos() as f64 / 3.0;
    let steps = (RECORDED / each).clamp(3.0, 200.0) as u64;
    let watch = gpu::watch()?;
    let named = gpu::record(steps, || prepared.step())?;
    drop(watch);
    // Naming launches takes time of the host: idling is read without it.
    let plain = gpu::record(steps, || prepared.step())?;
    let profile = named.profile(case.workload.id());
    profile.write(folder, "gpu", &format!("{case}, GPU time of {steps} steps"), Unit::Nanoseconds)?;
    results::write_whole(&folder.join("gpu-trace.json"), &named.events())?;
    let a_step = |nanoseconds: u64| nanoseconds as f64 / steps as f64 * 1e-6;
    println!(
        "{case}: {:.3} ms a step, the GPU busy for {:.3} ms of it ({:.1} % idle); {} launches, {:.3} ms of device time\n{}\n{}",
        a_step(plain.wall),
        a_step(plain.busy()),
        100.0 * plain.idle(),
        plain.activities.len() as u64 / steps,
        a_step(plain.device_time()),
        folder.join("gpu.svg").display(),
        folder.join("gpu-trace.json").display(),
    );
    Ok(())
}
