//! What every backend must pass before its figures mean anything. Each framework's
//! package runs this on the backends that the machine has.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::backend::{Backend, Backends, LoadedCase};
use crate::memory;
use crate::model::fixture::Fixture;
use crate::model::{CHOICE_MODELS, Model, ModelId};
use crate::parity::ParityChecker;
use crate::parity::fault_injection::FAULTS;
use crate::results::machine;
use crate::statistics::median;
use crate::suite::{Case, Method, Precision, Set, Shape, Variant, Workload, cases};

fn case(backend: &dyn Backend, workload: Workload, precision: Method, shape: Shape) -> Case {
    Case { workload, backend: backend.id(), method: precision, shape }
}

/// A model's miniature, or a part of its blocks.
fn tiny(name: &str) -> Shape {
    Shape::of_model(named(name), 2)
}

fn named(name: &str) -> ModelId {
    ModelId::named(name).expect("a preset").miniature()
}

const F32: Method = Method::eager(Precision::F32);

/// What a check found where nothing was wrong.
pub enum Outcome {
    Holds,
    /// It could not be checked here, and why.
    Skipped(String),
}

use Outcome::{Holds, Skipped};

/// The precisions and recipes that a backend offers.
fn precisions(backend: &dyn Backend) -> Vec<Method> {
    let all = Precision::ALL.iter().flat_map(|&compute| {
        Variant::ALL.iter().map(move |&recipe| Method { precision: compute, variant: recipe })
    });
    let offered = |precision: &Method| {
        [Workload::Forward, Workload::TrainStep].iter().any(|&workload| {
            backend.supports(&case(backend, workload, *precision, tiny("indicator"))).is_ok()
        })
    };
    // Of what is made first, a precision that the suite's own test leaves out is not tried.
    let tried = |p: &Method| !backend.is_precompiled(p.variant) || !smoke(backend, *p).is_empty();
    all.filter(offered).filter(tried).collect()
}

/// The suite's own test without what several processes share: scripts/tests/test_ranks.py has that.
fn alone() -> impl Iterator<Item = Case> {
    cases(Set::Smoke).into_iter().filter(|case| case.shape.ranks() == 1)
}

/// The cases that prove a precision: every workload at its miniature shapes.
fn miniatures(backend: &dyn Backend, precision: Method) -> Vec<Case> {
    let eager = Method::eager(Precision::F32);
    let chain = Shape::Square { n: 64, chain: 3 };
    let of_backend = |c: &Case| c.backend == backend.id() && c.method == eager;
    let all = alone().filter(of_backend).map(|c| Case { method: precision, ..c });
    if backend.is_precompiled(precision.variant) {
        return smoke(backend, precision);
    }
    // Single optimisations are tried on the suite's own models.
    let all_or_none = matches!(precision.variant, Variant::Eager | Variant::Tuned);
    let choices = CHOICE_MODELS.iter().filter(|_| all_or_none).flat_map(|choice| {
        let model = ModelId::intern(*choice);
        [Workload::AttentionGrad, Workload::FeedForwardGrad, Workload::Forward, Workload::TrainStep].map(
            |w| {
                let shape = match w.block() {
                    Some(part) => Shape::Block { part, model, batch: 2 },
                    None => Shape::of_model(model, 2),
                };
                case(backend, w, precision, shape)
            },
        )
    });
    all.chain(choices)
        .chain([case(backend, Workload::MatmulPeak, precision, chain)])
        .filter(|c| backend.supports(c).is_ok())
        .collect()
}

/// The cases of the suite's own test in a precision: all that is tried where each takes a minute to make.
fn smoke(backend: &dyn Backend, precision: Method) -> Vec<Case> {
    alone().filter(|c| c.backend == backend.id() && c.method == precision).collect()
}

/// Every precision and recipe that the backend offers computes what the oracle does.
pub fn parity_passes(backend: &dyn Backend) -> Result<Outcome> {
    let mut prover = ParityChecker::default();
    let mut proven = 0;
    for precision in precisions(backend) {
        let mut worst = (0.0, String::new());
        for case in miniatures(backend, precision) {
            match prover.check_case(backend, case)? {
                Ok(share) if share > worst.0 => worst = (share, case.to_string()),
                Ok(_) => {}
                Err(mismatch) => bail!("{mismatch}"),
            }
            proven += 1;
        }
        println!("{}: {precision}: {:.2} of what is allowed ({})", backend.id(), worst.0, worst.1);
    }
    ensure!(proven > 0, "{} supports no precision at all", backend.id());
    Ok(Holds)
}

/// Mixed precision is one computation in both frameworks: bf16's, on copies of f32
/// parameters. So its forward pass gives bf16's results to the last bit.
pub fn mixed_computes_in_bf16(backend: &dyn Backend) -> Result<Outcome> {
    for model in ModelId::all() {
        let outputs = |compute| -> Result<Vec<Vec<f32>>> {
            let precision = Method::eager(compute);
            let case = case(backend, Workload::Forward, precision, tiny(model.name));
            let mut prepared = backend.load(&Fixture::for_parity(case))?;
            prepared.step()?;
            Ok(prepared.outputs()?.into_iter().map(|tensor| tensor.data).collect())
        };
        let amp = outputs(Precision::Mixed)?;
        ensure!(amp == outputs(Precision::Bf16)?, "{model} in mixed is not computed in bf16 throughout");
        ensure!(amp != outputs(Precision::F32)?, "{model} in mixed is computed in f32");
    }
    Ok(Holds)
}

/// Every planted fault is caught in every precision and recipe that can show it.
pub fn parity_catches_wrong_kernels(backend: &dyn Backend) -> Result<Outcome> {
    let mut prover = ParityChecker::default();
    let mut missed = Vec::new();
    for fault in FAULTS {
        let mut hidden: BTreeMap<Precision, f64> = BTreeMap::new();
        for precision in precisions(backend) {
            let case = fault.case(backend, precision);
            if backend.supports(&case).is_err() {
                continue;
            }
            if backend.is_precompiled(precision.variant)
                && (fault.changes_model() || !smoke(backend, precision).contains(&case))
            {
                continue;
            }
            if let Ok(share) = fault.outcome(backend, &mut prover, precision)? {
                let most = hidden.entry(precision.precision).or_default();
                *most = most.max(share);
                if !fault.hidden.contains(&precision.precision) {
                    missed.push(format!("{} in {precision}", fault.name));
                }
            }
        }
        let hidden: Vec<String> = hidden.iter().map(|(c, share)| format!("{c} {share:.2}")).collect();
        let found = if hidden.is_empty() { "caught in all".to_owned() } else { hidden.join(", ") };
        println!("{}: {}: {found}", backend.id(), fault.name);
    }
    ensure!(missed.is_empty(), "not caught: {}", missed.join("; "));
    Ok(Holds)
}

fn time(prepared: &mut dyn LoadedCase) -> Result<Duration> {
    let start = Instant::now();
    prepared.step()?;
    Ok(start.elapsed())
}

/// The median ratio of the step times of two prepared cases, taken by turns; tried anew until it
/// lies where it should, since other work on the machine can spoil one attempt, and a missing
/// wait spoils all.
fn ratio_of_times(
    [one, two]: [&mut dyn LoadedCase; 2],
    pairs: usize,
    expected: std::ops::RangeInclusive<f64>,
) -> Result<f64> {
    let mut ratio = 0.0;
    for _ in 0..5 {
        for _ in 0..3 {
            time(one)?;
            time(two)?;
        }
        let mut ratios = Vec::new();
        for _ in 0..pairs {
            let first = time(one)?;
            ratios.push(time(two)?.as_secs_f64() / first.as_secs_f64());
        }
        ratio = median(&ratios);
        if expected.contains(&ratio) {
            break;
        }
    }
    Ok(ratio)
}

/// The recipes of the training step in f32 that take any size at once.
fn recipes(backend: &dyn Backend) -> Vec<Method> {
    let precision = |&recipe: &Variant| Method { precision: Precision::F32, variant: recipe };
    let offered = |p: &Method| {
        !backend.is_precompiled(p.variant)
            && backend.supports(&case(backend, Workload::TrainStep, *p, tiny("indicator"))).is_ok()
    };
    Variant::ALL.iter().map(precision).filter(offered).collect()
}

/// Twice the work takes twice the time, in every recipe: a step that returned early would not.
pub fn time_follows_work(backend: &dyn Backend) -> Result<Outcome> {
    let square = |chain| {
        // On an accelerator small products measure launches.
        let n = if backend.id().is_cpu() { 512 } else { 4096 };
        let case = case(backend, Workload::MatmulPeak, F32, Shape::Square { n, chain });
        backend.load(&Fixture::new(case))
    };
    let (mut once, mut twice) = (square(8)?, square(16)?);
    let ratio = ratio_of_times([once.as_mut(), twice.as_mut()], 31, 1.9..=2.1)?;
    ensure!((1.9..=2.1).contains(&ratio), "twice the work took {ratio:.2} times as long on {}", backend.id());
    drop((once, twice));
    for precision in recipes(backend) {
        let layers = |layers| {
            let model = ModelId::intern(Model { layers, ..*ModelId::indicator() });
            let batch = if backend.id().is_cpu() { 1 } else { 64 };
            let shape = Shape::of_model(model, batch);
            backend.load(&Fixture::new(case(backend, Workload::TrainStep, precision, shape)))
        };
        let (mut three, mut six) = (layers(3)?, layers(6)?);
        // Embedding, heads and what an operation costs on many threads stay as they are; a step that
        // returned early would not take longer at all.
        let ratio = ratio_of_times([three.as_mut(), six.as_mut()], 11, 1.4..=2.1)?;
        ensure!(
            (1.4..=2.1).contains(&ratio),
            "twice the layers took {ratio:.2} times as long on {} in {precision}",
            backend.id()
        );
    }
    Ok(Holds)
}

/// After `step()` the device is idle, and reading every result is copying alone, in every recipe.
pub fn steps_leave_nothing_pending(backend: &dyn Backend) -> Result<Outcome> {
    for precision in recipes(backend) {
        let shape = Shape::of_model(ModelId::indicator(), 4);
        let case = case(backend, Workload::TrainStep, precision, shape);
        let mut prepared = backend.load(&Fixture::new(case))?;
        time(prepared.as_mut())?;
        let (mut waits, mut reads) = (Vec::new(), Vec::new());
        for _ in 0..5 {
            let step = time(prepared.as_mut())?.as_secs_f64();
            let start = Instant::now();
            backend.synchronize()?;
            waits.push(start.elapsed().as_secs_f64() / step);
            // The first reading of an unevaluated result would compute it; the second copies.
            let start = Instant::now();
            prepared.outputs()?;
            let first = start.elapsed();
            let start = Instant::now();
            prepared.outputs()?;
            reads.push((first.as_secs_f64() - start.elapsed().as_secs_f64()) / step);
        }
        let (wait, read) = (median(&waits), median(&reads));
        ensure!(wait < 0.05, "after a step {case} still works for {:.0} % of it", wait * 100.0);
        ensure!(read < 0.2, "reading the results of {case} costs {:.0} % of a step", read * 100.0);
    }
    Ok(Holds)
}

/// A known amount, allocated on the device and read back as the peak, within 1 %: a
/// buffer and its copy, and on a CPU without an allocator's peak the host's fixture too.
pub fn memory_is_counted(backend: &dyn Backend) -> Result<Outcome> {
    let mib = 256;
    let case = case(backend, Workload::CopyPeak, F32, Shape::Buffer { mib, ranks: 1 });
    backend.reset_peak_memory()?;
    memory::reset_resident_peak();
    let before = memory::resident_bytes();
    let fixture = Fixture::new(case);
    let mut prepared = backend.load(&fixture)?;
    prepared.step()?;
    let (found, buffers) = match backend.peak_memory() {
        Some(peak) => (peak, 2),
        None if cfg!(not(target_os = "linux")) => {
            return Ok(Skipped("the resident peak can't be reset on this system".to_owned()));
        }
        None => (memory::resident_peak_bytes().unwrap_or(0) - before, 3),
    };
    let expected = (buffers * mib) << 20;
    let error = found as f64 / expected as f64 - 1.0;
    ensure!(
        error.abs() < 0.01,
        "{} holds {buffers} buffers of {mib} MiB and reports {found} bytes, {:+.1} % off",
        backend.id(),
        error * 100.0
    );
    Ok(Holds)
}

/// Bytes in [`STEPS`] steps: 2 kB a step would be a leak; allocators settle within less.
const LEAK: u64 = 2_000 * STEPS;
const STEPS: u64 = 500;

/// The resident size stays flat over [`STEPS`] steps of every workload at its miniature shape.
pub fn memory_does_not_grow(backend: &dyn Backend) -> Result<Outcome> {
    let mut tried = 0;
    for case in alone() {
        if case.backend != backend.id() || backend.supports(&case).is_err() {
            continue;
        }
        // Half types and single optimisations run on the same code paths.
        if case.method.precision.is_half() || !matches!(case.method.variant, Variant::Eager | Variant::Tuned)
        {
            continue;
        }
        let mut prepared = backend.load(&Fixture::new(case))?;
        for _ in 0..100 {
            prepared.step()?;
        }
        let mut grown = u64::MAX;
        // A leak grows for ever; caches of compiled kernels and graphs fill once.
        for _ in 0..3 {
            let before = memory::resident_bytes();
            for _ in 0..STEPS {
                prepared.step()?;
            }
            grown = memory::resident_bytes().saturating_sub(before);
            if grown < LEAK {
                break;
            }
        }
        ensure!(grown < LEAK, "{STEPS} steps of {case} grew memory by {grown} bytes");
        tried += 1;
    }
    ensure!(tried > 0, "no case of {} could be tried", backend.id());
    Ok(Holds)
}

/// The other framework's libraries are not in this process.
pub fn process_holds_one_framework(backend: &dyn Backend) -> Result<Outcome> {
    machine::assert_isolated(backend.id().framework()).map(|()| Holds)
}

/// Runs everything on every backend that was found, and says what ran.
///
/// # Panics
/// On the first backend that fails, with the reason.
pub fn assert_all(found: &Backends) {
    type Check = fn(&dyn Backend) -> Result<Outcome>;
    const CHECKS: &[(&str, Check)] = &[
        ("the process holds one framework", process_holds_one_framework),
        ("parity holds", parity_passes),
        ("mixed computes as bf16 does", mixed_computes_in_bf16),
        ("parity catches wrong kernels", parity_catches_wrong_kernels),
        ("memory is counted", memory_is_counted),
        ("nothing is left pending", steps_leave_nothing_pending),
        ("time follows work", time_follows_work),
        ("memory does not grow", memory_does_not_grow),
    ];
    memory::retain_freed_memory().unwrap_or_else(|reason| panic!("{reason:#}"));
    for absent in &found.unavailable {
        println!("{}: skipped, {}", absent.id, absent.reason);
    }
    for backend in &found.available {
        for (name, check) in CHECKS {
            let start = Instant::now();
            let outcome = check(backend.as_ref())
                .unwrap_or_else(|reason| panic!("{}: {name}: {reason:#}", backend.id()));
            let took = start.elapsed().as_secs_f64();
            match outcome {
                Holds => println!("{}: {name} ({took:.1} s)", backend.id()),
                Skipped(reason) => println!("{}: {name}: skipped, {reason}", backend.id()),
            }
        }
    }
}
