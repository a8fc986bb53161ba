//! `--profile-time`: samples the stacks of every thread while steps run, through
//! Criterion's hook and pprof.
//!
//! Blocks of steps with and without sampling take turns, so that the profile states what
//! it costs.

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
use transformer_bench::profile::gpu;
use transformer_bench::profile::{Profile, Unit};
use transformer_bench::results;
use transformer_bench::statistics::midmean;
use transformer_bench::suite::Case;

use super::sampling_timer::Ticker;
use super::symbols::{self, Symbols, is_generated};

/// Steps of about this long run before sampling goes on or off.
const BLOCK: Duration = Duration::from_millis(200);

/// What the harness and Criterion's hook share.
#[derive(Default)]
struct State {
    guard: Option<(ProfilerGuard<'static>, Ticker)>,
    /// Seconds a step of each block, with sampling and without.
    sampled: Vec<f64>,
    bare: Vec<f64>,
    /// Of the last block, whichever it was.
    last: Option<f64>,
    failed: Option<anyhow::Error>,
}

/// The sampling profiler, as Criterion's hook.
#[derive(Clone, Default)]
pub struct Sampler(Rc<RefCell<State>>);

/// Tells libraries what they read once: before the framework is first used.
///
/// # Errors
/// Where this process can't begin anew.
pub fn prepare() -> Result<()> {
    symbols::ask_for_generated();
    // Metal records captures only where this is set when it is loaded, which was before now.
    const CAPTURE: &str = "MTL_CAPTURE_ENABLED";
    if cfg!(target_os = "macos") && std::env::var_os(CAPTURE).is_none() {
        let mut anew = std::process::Command::new(std::env::current_exe()?);
        return Err(anew.args(std::env::args_os().skip(1)).env(CAPTURE, "1").exec().into());
    }
    Ok(())
}

impl Sampler {
    /// Runs steps, by turns with and without sampling; returns the time of all.
    pub fn run(&self, prepared: &mut dyn LoadedCase, steps: u64) -> Result<Duration> {
        let mut state = self.0.borrow_mut();
        if state.guard.is_none() {
            return prepared.time(steps);
        }
        let tick = |state: &State, on| state.guard.iter().for_each(|(_, ticker)| ticker.tick(on));
        let mut done = 0;
        let mut all = Duration::ZERO;
        while done < steps {
            let block = state.last.map_or(1, |each| (BLOCK.as_secs_f64() / each.max(1e-9)) as u64);
            let block = block.clamp(1, 100_000).min(steps - done);
            // Each kind of block once, in either order.
            let sampled = state.sampled.len() <= state.bare.len();
            tick(&state, sampled);
            let elapsed = prepared.time(block);
            tick(&state, false);
            let elapsed = elapsed?;
            let each = elapsed.as_secs_f64() / block as f64;
            // The first steps are not like the others, and short blocks hold no tick.
            if state.last.replace(each).is_some() && 2 * elapsed >= BLOCK {
                let blocks = if sampled { &mut state.sampled } else { &mut state.bare };
                blocks.push(each);
            }
            all += elapsed;
            done += block;
        }
        Ok(all)
    }

    /// What went wrong in Criterion's hook, which can't return it.
    pub fn failure(&self) -> Option<anyhow::Error> {
        self.0.borrow_mut().failed.take()
    }

    /// Profiles so many steps without Criterion; returns what is to be said.
    pub fn steps(
        &self,
        prepared: &mut dyn LoadedCase,
        steps: u64,
        id: &str,
        folder: &Path,
    ) -> Result<String> {
        self.start()?;
        self.run(prepared, steps)?;
        self.finish(id, folder)
    }

    fn start(&self) -> Result<()> {
        let mut state = self.0.borrow_mut();
        *state = State::default();
        let guard = ProfilerGuardBuilder::default()
            .build()
            .map_err(|error| anyhow!("this system lets no signal sample the stacks: {error}"))?;
        let ticker = Ticker::start();
        // The first sample prepares the unwinder, which allocates: taken here,
        // where no other code is interrupted.
        // SAFETY: pprof's own handler is in place.
        unsafe { libc::raise(libc::SIGPROF) };
        state.guard = Some((guard, ticker));
        Ok(())
    }

    fn finish(&self, id: &str, folder: &Path) -> Result<String> {
        let mut state = self.0.borrow_mut();
        let (guard, ticker) = state.guard.take().context("the profiler did not start")?;
        drop(ticker);
        let unread = "the samples could not be read";
        let profile = stacks(&guard.report().build_unresolved().context(unread)?);
        let report = guard.report().build().context(unread)?;
        drop(guard);
        anyhow::ensure!(!profile.is_empty(), "no sample was taken: profile for longer");
        profile.write(folder, "flamegraph", id, Unit::Samples)?;
        let proto = report.pprof().map_err(|e| anyhow!("no protobuf: {e}"))?;
        std::fs::write(folder.join("profile.pb"), proto.encode_to_vec())
            .context("profile.pb could not be written")?;
        let blocks = state.sampled.len().min(state.bare.len());
        let slowdown = if blocks < 3 {
            "its cost is unknown: profile for longer".to_owned()
        } else {
            let change = midmean(&state.sampled) / midmean(&state.bare) - 1.0;
            format!("sampling changed the step by {:+.1} % ({blocks} pairs of blocks)", 100.0 * change)
        };
        Ok(format!(
            "{id}: {} samples, {:.1} % of them in a named function; {slowdown}\n{}",
            profile.total(),
            100.0 * profile.resolved(),
            folder.join("flamegraph.svg").display()
        ))
    }
}

impl Profiler for Sampler {
    fn start_profiling(&mut self, _id: &str, _folder: &Path) {
        let started = self.start();
        self.0.borrow_mut().failed = started.err();
    }

    fn stop_profiling(&mut self, id: &str, folder: &Path) {
        match self.finish(id, folder) {
            Ok(text) => println!("{text}"),
            Err(error) => {
                self.0.borrow_mut().failed.get_or_insert(error);
            }
        }
    }
}

const PLUMBING: [&str; 4] = ["catch_unwind<", "do_call<", "call_once<", "{closure#"];

/// Where a thread begins, the innermost first: glibc, Linux; macOS.
const THREAD_ROOTS: [&str; 4] = ["start_thread", "clone3", "_pthread_start", "thread_start"];

/// The report's stacks, outermost first, without what lies around a step. pprof's own
/// resolution leaves out frames that have no symbol, as if their callers had worked.
fn stacks(report: &UnresolvedReport) -> Profile {
    let mut profile = Profile::default();
    let mut symbols = Symbols::read();
    // SAFETY: no arguments, no memory.
    let own = unsafe { libc::pthread_self() } as u64;
    for (sample, &count) in &report.data {
        let mut frames: Vec<String> = Vec::new();
        for (depth, frame) in sample.frames.iter().enumerate().rev() {
            // A caller's address is that behind its call.
            let address = if depth == 0 { frame.ip } else { frame.ip.saturating_sub(1) };
            frames.extend_from_slice(symbols.at(address));
        }
        let thread = String::from_utf8_lossy(&sample.thread_name[..sample.thread_name_length]).into_owned();
        let place = |wanted: &str| frames.iter().rposition(|f| f.contains(wanted));
        // Inlined functions have no path in their names, and may have types behind; others have a path.
        let is = |frame: &String, name: &str| {
            frame.rsplit("::").next() == Some(name)
                || frame.strip_prefix(name).is_some_and(|rest| rest.starts_with('<'))
        };
        let step = frames.windows(2).rposition(|pair| is(&pair[0], "time") && is(&pair[1], "step"));
        let root = if let Some(before) = step {
            frames.drain(..=before + 1);
            "step".to_owned()
        } else if let Some(start) = THREAD_ROOTS.iter().find_map(|root| place(root)) {
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
            let unknown = "(caller unknown)".to_owned();
            if sample.thread_id == own {
                // This thread is interrupted in steps only.
                frames.insert(0, unknown);
                "step".to_owned()
            } else {
                match thread_name(&frames, &thread) {
                    name if name.starts_with("thread ") => unknown,
                    name => name,
                }
            }
        };
        // What Rust's closures and panics add says nothing; the leaf stays, whatever it is.
        let plumbing = |f: &String| PLUMBING.iter().any(|name| f.starts_with(name));
        let leaf = frames.pop();
        frames.retain(|frame| !plumbing(frame));
        frames.extend(leaf);
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

/// A step as a `.gputrace`, where the system allows one; a line that says so elsewhere.
pub fn metal(prepared: &mut dyn LoadedCase, backend: &dyn Backend, folder: &Path) {
    let trace = std::path::absolute(folder.join("step.gputrace")).unwrap_or_default();
    // Metal overwrites nothing.
    let _ = std::fs::remove_dir_all(&trace);
    match backend.capture(&trace, &mut || prepared.step()) {
        Ok(()) => println!("{} (opens in Xcode)", trace.display()),
        Err(reason) => println!("no trace of the GPU: {reason:#}"),
    }
}

/// Seconds of a GPU's time that are recorded, about.
const RECORDED: f64 = 0.5;

/// How many steps of a length in seconds are recorded of a GPU.
pub fn recorded(each: f64) -> u64 {
    (RECORDED / each).clamp(3.0, 200.0) as u64
}

/// The second flamegraph of a GPU case: what its kernels take, by operator, over twice so many
/// steps. Returns what is to be said.
pub fn gpu(prepared: &mut dyn LoadedCase, case: &Case, steps: u64, folder: &Path) -> Result<String> {
    let watch = gpu::watch()?;
    let named = gpu::record(steps, || prepared.step())?;
    drop(watch);
    // Naming launches takes time of the host: idling is read without it.
    let plain = gpu::record(steps, || prepared.step())?;
    let profile = named.profile(case.workload.id());
    profile.write(folder, "gpu", &format!("{case}, GPU time of {steps} steps"), Unit::Nanoseconds)?;
    results::write_atomic(&folder.join("gpu-trace.json"), &named.events())?;
    let a_step = |nanoseconds: u64| nanoseconds as f64 / steps as f64 * 1e-6;
    let (exchange, alone) = plain.exchange();
    let exchange = if exchange > 0 {
        format!(
            "; exchange for {:.3} ms, {:.3} ms of it beside nothing else",
            a_step(exchange),
            a_step(alone)
        )
    } else {
        String::new()
    };
    Ok(format!(
        "{case}: {:.3} ms a step, the GPU busy for {:.3} ms of it ({:.1} % idle); {} launches, {:.3} ms of device time{exchange}\n{}\n{}",
        a_step(plain.wall),
        a_step(plain.busy()),
        100.0 * plain.idle(),
        plain.activities.len() as u64 / steps,
        a_step(plain.device_time()),
        folder.join("gpu.svg").display(),
        folder.join("gpu-trace.json").display(),
    ))
}
