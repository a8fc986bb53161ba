//! `--profile-time`: samples the stacks of all threads while steps run, with pprof as Criterion's profiler.
//!
//! Blocks of steps with and without sampling alternate, so that the profile states the overhead of sampling.

use std::cell::RefCell;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use criterion::profiler::Profiler;
use pprof::protos::Message;
use pprof::{ProfilerGuard, ProfilerGuardBuilder, UnresolvedReport};
use transformer_bench::backend::{Backend, LoadedCase};
use transformer_bench::files;
use transformer_bench::profile::gpu;
use transformer_bench::profile::{Profile, Unit};
use transformer_bench::statistics::midmean;
use transformer_bench::suite::Case;

use super::sampling_timer::SamplingTimer;
use super::symbols::{self, Symbols, is_unnamed_jit_code};

/// Approximate duration of a block of steps with or without sampling.
const BLOCK: Duration = Duration::from_millis(200);

/// State that the harness and Criterion share.
#[derive(Default)]
struct State {
    guard: Option<(ProfilerGuard<'static>, SamplingTimer)>,
    /// Seconds per step of each block with sampling.
    sampled: Vec<f64>,
    /// Seconds per step of each block without sampling.
    unsampled: Vec<f64>,
    /// Seconds per step of the last block.
    last: Option<f64>,
    error: Option<anyhow::Error>,
}

/// The sampling profiler. Clones share their state.
#[derive(Clone, Default)]
pub struct Sampler(Rc<RefCell<State>>);

/// Sets environment variables that libraries read only once. Must run before the framework is used.
///
/// # Errors
/// Returns an error if this process can't restart itself, which macOS requires.
pub fn prepare_process() -> Result<()> {
    symbols::enable_jit_map();
    // Metal reads this when it is loaded, which was before `main`.
    const CAPTURE: &str = "MTL_CAPTURE_ENABLED";
    if cfg!(target_os = "macos") && std::env::var_os(CAPTURE).is_none() {
        let mut restarted = std::process::Command::new(std::env::current_exe()?);
        return Err(restarted.args(std::env::args_os().skip(1)).env(CAPTURE, "1").exec().into());
    }
    Ok(())
}

impl Sampler {
    /// Runs steps in blocks with and without sampling. Returns the time of all steps.
    pub fn run(&self, loaded: &mut dyn LoadedCase, steps: u64) -> Result<Duration> {
        let mut state = self.0.borrow_mut();
        if state.guard.is_none() {
            return loaded.time(steps);
        }
        let enable = |state: &State, on| state.guard.iter().for_each(|(_, timer)| timer.enable(on));
        let mut done = 0;
        let mut total = Duration::ZERO;
        while done < steps {
            let block = state.last.map_or(1, |seconds| (BLOCK.as_secs_f64() / seconds.max(1e-9)) as u64);
            let block = block.clamp(1, 100_000).min(steps - done);
            let sampled = state.sampled.len() <= state.unsampled.len();
            enable(&state, sampled);
            let elapsed = loaded.time(block);
            enable(&state, false);
            let elapsed = elapsed?;
            let seconds = elapsed.as_secs_f64() / block as f64;
            // The first block is atypical, and a short one may contain no sample.
            if state.last.replace(seconds).is_some() && 2 * elapsed >= BLOCK {
                let blocks = if sampled { &mut state.sampled } else { &mut state.unsampled };
                blocks.push(seconds);
            }
            total += elapsed;
            done += block;
        }
        Ok(total)
    }

    /// Returns the error of a method that Criterion called, and clears it.
    pub fn take_error(&self) -> Option<anyhow::Error> {
        self.0.borrow_mut().error.take()
    }

    /// Profiles steps without Criterion. Writes the profile to `folder` and returns its summary.
    pub fn profile_steps(
        &self,
        loaded: &mut dyn LoadedCase,
        steps: u64,
        id: &str,
        folder: &Path,
    ) -> Result<String> {
        self.start()?;
        self.run(loaded, steps)?;
        self.finish(id, folder)
    }

    fn start(&self) -> Result<()> {
        let mut state = self.0.borrow_mut();
        *state = State::default();
        let guard = ProfilerGuardBuilder::default()
            .build()
            .map_err(|error| anyhow!("this system can't sample stacks by signals: {error}"))?;
        let timer = SamplingTimer::start();
        // The first sample initializes the unwinder, which allocates. Here it interrupts no other code.
        // SAFETY: pprof has installed its signal handler.
        unsafe { libc::raise(libc::SIGPROF) };
        state.guard = Some((guard, timer));
        Ok(())
    }

    fn finish(&self, id: &str, folder: &Path) -> Result<String> {
        let mut state = self.0.borrow_mut();
        let (guard, timer) = state.guard.take().context("the profiler did not start")?;
        drop(timer);
        let unread = "the samples could not be read";
        let profile = collect_stacks(&guard.report().build_unresolved().context(unread)?);
        let report = guard.report().build().context(unread)?;
        drop(guard);
        anyhow::ensure!(!profile.is_empty(), "no samples: profile for a longer time");
        profile.write(folder, "flamegraph", id, Unit::Samples)?;
        let proto = report.pprof().map_err(|e| anyhow!("profile.pb could not be encoded: {e}"))?;
        std::fs::write(folder.join("profile.pb"), proto.encode_to_vec())
            .context("profile.pb could not be written")?;
        let pairs = state.sampled.len().min(state.unsampled.len());
        let overhead = if pairs < 3 {
            "the overhead of sampling is unknown: profile for a longer time".to_owned()
        } else {
            let change = midmean(&state.sampled) / midmean(&state.unsampled) - 1.0;
            format!("sampling changed the step time by {:+.1} % ({pairs} pairs of blocks)", 100.0 * change)
        };
        Ok(format!(
            "{id}: {} samples, {:.1} % of them in a named function; {overhead}\n{}",
            profile.total(),
            100.0 * profile.named_share(),
            folder.join("flamegraph.svg").display()
        ))
    }
}

impl Profiler for Sampler {
    fn start_profiling(&mut self, _id: &str, _folder: &Path) {
        let started = self.start();
        self.0.borrow_mut().error = started.err();
    }

    fn stop_profiling(&mut self, id: &str, folder: &Path) {
        match self.finish(id, folder) {
            Ok(text) => println!("{text}"),
            Err(error) => {
                self.0.borrow_mut().error.get_or_insert(error);
            }
        }
    }
}

/// Frames of closures and panic handling in Rust, by the start of their names.
const RUST_GLUE: [&str; 4] = ["catch_unwind<", "do_call<", "call_once<", "{closure#"];

/// First function of a thread, the innermost first: glibc, Linux, macOS (two names).
const THREAD_ROOTS: [&str; 4] = ["start_thread", "clone3", "_pthread_start", "thread_start"];

/// Returns the stacks of a report, outermost frame first, without the frames around a step. pprof itself would drop
/// frames without a symbol and blame their callers.
fn collect_stacks(report: &UnresolvedReport) -> Profile {
    let mut profile = Profile::default();
    let mut symbols = Symbols::read();
    // SAFETY: the call takes no arguments.
    let own_thread = unsafe { libc::pthread_self() } as u64;
    for (sample, &count) in &report.data {
        let mut frames: Vec<String> = Vec::new();
        for (depth, frame) in sample.frames.iter().enumerate().rev() {
            // The return address of a caller is after its call.
            let address = if depth == 0 { frame.ip } else { frame.ip.saturating_sub(1) };
            frames.extend_from_slice(symbols.at(address));
        }
        let thread = String::from_utf8_lossy(&sample.thread_name[..sample.thread_name_length]);
        let Some(root) = split_root(&mut frames, &thread, sample.thread_id == own_thread) else { continue };
        // The innermost frame stays, because it took the time.
        let leaf = frames.pop();
        frames.retain(|frame| !RUST_GLUE.iter().any(|name| frame.starts_with(name)));
        frames.extend(leaf);
        frames.insert(0, root);
        profile.add(&frames, count.max(0) as u64);
    }
    profile
}

/// Removes the frames around a step, or at the start of a thread. Returns the frame that replaces them, or `None` if
/// the sample is from between the steps.
fn split_root(frames: &mut Vec<String>, thread: &str, is_own_thread: bool) -> Option<String> {
    let position = |text: &str| frames.iter().rposition(|frame| frame.contains(text));
    // The name of an inlined function has no path and may end with types.
    let is = |frame: &String, name: &str| {
        frame.rsplit("::").next() == Some(name)
            || frame.strip_prefix(name).is_some_and(|rest| rest.starts_with('<'))
    };
    let step = frames.windows(2).rposition(|pair| is(&pair[0], "time") && is(&pair[1], "step"));
    if let Some(before) = step {
        frames.drain(..=before + 1);
        return Some("step".to_owned());
    }
    if let Some(start) = THREAD_ROOTS.iter().find_map(|root| position(root)) {
        frames.drain(..=start);
        return Some(thread_label(frames, thread));
    }
    if position("harness::main").is_some() || position("lang_start").is_some() {
        return None;
    }
    // Hand-written kernels, such as MKL's, have no unwind information: frames beyond them are wrong.
    let wrong = frames.iter().take_while(|frame| is_unnamed_jit_code(frame)).count();
    frames.drain(..wrong.min(frames.len() - 1));
    let unknown = "(caller unknown)".to_owned();
    if is_own_thread {
        // This thread is sampled only during steps.
        frames.insert(0, unknown);
        return Some("step".to_owned());
    }
    let label = thread_label(frames, thread);
    Some(if label.starts_with("thread ") { unknown } else { label })
}

/// Returns the purpose of a thread by its frames, or else its name.
fn thread_label(frames: &[String], name: &str) -> String {
    const LABELS: [(&str, &str); 6] = [
        ("gomp", "OpenMP worker"),
        ("omp_fn", "OpenMP worker"),
        ("kmp", "OpenMP worker"),
        ("mlx::core", "MLX stream"),
        ("blas_thread", "OpenBLAS worker"),
        ("torch::autograd", "autograd worker"),
    ];
    let known = LABELS.iter().find(|(text, _)| frames.iter().any(|frame| frame.contains(text)));
    known.map_or_else(|| format!("thread {name}"), |(_, label)| (*label).to_owned())
}

/// Captures a step as a `.gputrace`, or prints why the system can't.
pub fn capture_metal_trace(loaded: &mut dyn LoadedCase, backend: &dyn Backend, folder: &Path) {
    let trace = std::path::absolute(folder.join("step.gputrace")).unwrap_or_default();
    // Metal does not overwrite a trace.
    let _ = std::fs::remove_dir_all(&trace);
    match backend.capture_gpu_trace(&trace, &mut || loaded.step()) {
        Ok(()) => println!("{} (opens in Xcode)", trace.display()),
        Err(reason) => println!("the GPU was not traced: {reason:#}"),
    }
}

/// Returns the number of steps that [`profile_gpu`] should record: about 0.5 s.
pub fn gpu_steps(seconds_per_step: f64) -> u64 {
    (0.5 / seconds_per_step).clamp(3.0, 200.0) as u64
}

/// Records `2 × steps` steps on the GPU. Writes a flamegraph of device time by operator and kernel, and a trace of all
/// activities. Returns a summary.
pub fn profile_gpu(loaded: &mut dyn LoadedCase, case: &Case, steps: u64, folder: &Path) -> Result<String> {
    let attribution = gpu::attribute_launches()?;
    let attributed = gpu::record(steps, || loaded.step())?;
    drop(attribution);
    // Attribution slows the host down, so idle time comes from a second recording without it.
    let trace = gpu::record(steps, || loaded.step())?;
    let profile = attributed.profile(case.workload.id());
    profile.write(folder, "gpu", &format!("{case}, GPU time of {steps} steps"), Unit::Nanoseconds)?;
    files::write_atomic(&folder.join("gpu-trace.json"), &attributed.trace_events())?;
    let ms_per_step = |nanoseconds: u64| nanoseconds as f64 / steps as f64 * 1e-6;
    let (communication, exposed) = trace.communication();
    let communication = if communication > 0 {
        let (total, exposed) = (ms_per_step(communication), ms_per_step(exposed));
        format!(", {total:.3} ms of communication ({exposed:.3} ms exposed)")
    } else {
        String::new()
    };
    Ok(format!(
        "{case}: {:.3} ms per step; the GPU was busy for {:.3} ms ({:.1} % idle): {} launches, {:.3} ms of device time{communication}\n{}\n{}",
        ms_per_step(trace.wall),
        ms_per_step(trace.busy()),
        100.0 * trace.idle_share(),
        trace.activities.len() as u64 / steps,
        ms_per_step(trace.device_time()),
        folder.join("gpu.svg").display(),
        folder.join("gpu-trace.json").display(),
    ))
}
