//! Times until the first step of a compiled training step and of the eager one, with empty and with filled caches.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::pair::{WorkerPair, median_ns};
use super::python_side::torch_side;
use super::worker::{CheckOutcome, Side, Threads, Worker};
use crate::files::Scratch;
use crate::results::first_step::{FirstSteps, StartTimes};
use crate::results::machine::Machine;
use crate::suite::{Case, Method, Variant};

/// Time in which later steps of both sides are sampled.
const STEP_TIME: Duration = Duration::from_secs(4);

/// Returns the eager step of a case.
fn eager(case: &Case) -> Case {
    Case { method: Method::eager(case.method.precision), ..*case }
}

/// Returns a side whose processes have caches of their own in `folder`.
fn with_caches(side: &Side, folder: &str) -> Side {
    let mut side = side.clone();
    // XDG_CACHE_HOME has the packages of Inductor and of this suite, TMPDIR the CPU kernels of MLX. The other two are those
    // of CUDA's driver and of MLX on CUDA.
    for name in ["XDG_CACHE_HOME", "TMPDIR", "CUDA_CACHE_PATH", "MLX_PTX_CACHE_DIR"] {
        side.environment.push((name.to_owned(), format!("{folder}/{}", name.to_lowercase())));
    }
    side
}

/// Starts a process, and returns it with the times of its first steps.
fn start(side: &Side, case: &Case) -> Result<(Worker, StartTimes)> {
    let mut worker = Worker::start(side, case.backend.framework(), Threads::All)?;
    let times = worker.start_case(case).with_context(|| case.to_string())?;
    Ok((worker, times))
}

/// Measures a compiled case and its eager one. A case of PyTorch's compiler is then measured in Python too, where set-up
/// prepared torch. `progress` gets a line for each part.
///
/// # Errors
/// Returns an error if a step is wrong or a process ends.
pub fn measure(side: &Side, case: &Case, progress: &dyn Fn(&str)) -> Result<Vec<FirstSteps>> {
    let cases = [eager(case), *case];
    let mut all = vec![measure_side(side, &cases, progress)?];
    if case.method.variant == Variant::Compile {
        let folder = temporary_folder("python")?;
        if let Some(python) = torch_side(side, &[(cases[0], "eager"), (cases[1], "compile")], &folder.0)? {
            let progress = |line: &str| progress(&format!("in Python: {line}"));
            all.push(FirstSteps { python: true, ..measure_side(&python, &cases, &progress)? });
        }
    }
    Ok(all)
}

/// Creates an empty folder that is removed with its guard.
fn temporary_folder(name: &str) -> Result<Scratch> {
    let name = format!("transformer-bench-first-step-{name}-{}", std::process::id());
    let folder = Scratch(std::env::temp_dir().join(name));
    let _ = fs::remove_dir_all(&folder.0);
    fs::create_dir_all(&folder.0).with_context(|| format!("{} could not be created", folder.0.display()))?;
    Ok(folder)
}

/// Measures the eager and the compiled step of a side.
fn measure_side(side: &Side, cases: &[Case; 2], progress: &dyn Fn(&str)) -> Result<FirstSteps> {
    let folder = temporary_folder("caches")?;
    let mut cold = Vec::new();
    let mut warm = Vec::new();
    let mut workers = Vec::new();
    for (index, case) in cases.iter().enumerate() {
        let caches = folder.0.join(index.to_string());
        let caches = caches.to_str().context("the temporary folder is not UTF-8")?;
        let side = with_caches(side, caches);
        for (name, _) in &side.environment {
            fs::create_dir_all(format!("{caches}/{}", name.to_lowercase()))
                .with_context(|| format!("{caches} could not be created"))?;
        }
        progress(&format!("{case}: empty caches"));
        let (mut worker, times) = start(&side, case)?;
        cold.push(times);
        progress(&format!("{case}: check"));
        if let CheckOutcome::Wrong(reason) = worker.check(case)? {
            bail!("{reason}");
        }
        drop(worker);
        progress(&format!("{case}: filled caches"));
        let (worker, times) = start(&side, case)?;
        warm.push(times);
        workers.push(worker);
    }
    progress(&format!("{}: later steps", cases[1]));
    let workers = <[Worker; 2]>::try_from(workers).unwrap_or_else(|_| unreachable!("two cases"));
    let mut pair = WorkerPair::new(workers);
    let times = pair.sample([true; 2], STEP_TIME, 1)?;
    pair.verify()?;
    let both = |times: Vec<StartTimes>| [times[0], times[1]];
    Ok(FirstSteps {
        ids: cases.map(|case| case.to_string()),
        python: false,
        cold: both(cold),
        warm: both(warm),
        step_ns: times.map(|times| median_ns(&times)),
        commit: Machine::read().commit,
    })
}
