//! Tests that every backend must pass. The package of each framework runs them on the available backends.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::backend::{Backend, Backends, LoadedCase};
use crate::fixture::Fixture;
use crate::model::{Lora, Model, ModelId, OPTION_MODELS};
use crate::parity::ParityChecker;
use crate::parity::fault_injection::FAULTS;
use crate::parity::idle_steps::{IdleCase, IdleStep};
use crate::parity::timed_work;
use crate::statistics::median;
use crate::suite::{Case, Method, Precision, Set, Shape, Variant, Workload, cases};
use crate::{files, memory, process};

const F32: Method = Method::eager(Precision::F32);

fn case(backend: &dyn Backend, workload: Workload, method: Method, shape: Shape) -> Case {
    Case { workload, backend: backend.id(), method, shape }
}

fn miniature(name: &str) -> Shape {
    Shape::for_model(ModelId::named(name).expect("a built-in model").miniature(), 2)
}

/// Returns the smoke cases of a backend on a single device. scripts/tests/test_ranks.py tests several devices.
fn smoke_cases(backend: &dyn Backend) -> impl Iterator<Item = Case> {
    let id = backend.id();
    cases(Set::Smoke).into_iter().filter(move |c| c.shape.ranks() == 1 && c.backend == id)
}

/// Returns the smoke cases of a method: the only tested ones of a precompiled variant, which take a minute each.
fn smoke_cases_of(backend: &dyn Backend, method: Method) -> Vec<Case> {
    smoke_cases(backend).filter(|c| c.method == method).collect()
}

/// Returns the methods of the suite's cases on a backend.
fn methods(backend: &dyn Backend) -> Vec<Method> {
    let is_supported = |method: Method| {
        [Workload::Forward, Workload::TrainStep].iter().any(|&workload| {
            backend.supports(&case(backend, workload, method, miniature("indicator"))).is_ok()
        })
    };
    let is_tested = |method: Method| {
        !backend.is_precompiled(method.variant) || !smoke_cases_of(backend, method).is_empty()
    };
    let all: BTreeSet<Method> = [Set::Smoke, Set::Quick, Set::Full]
        .into_iter()
        .flat_map(cases)
        .filter(|c| c.backend == backend.id() && c.shape.ranks() == 1)
        .map(|c| c.method)
        .collect();
    all.into_iter().filter(|&method| is_supported(method) && is_tested(method)).collect()
}

/// Returns the cases that test a method: every workload at its miniature shapes.
fn miniature_cases(backend: &dyn Backend, method: Method) -> Vec<Case> {
    if backend.is_precompiled(method.variant) {
        return smoke_cases_of(backend, method);
    }
    let built_in = smoke_cases_of(backend, F32).into_iter().map(|c| Case { method, ..c });
    // Variants with a single optimization are only tested on the built-in models.
    let all_or_none = matches!(method.variant, Variant::Eager | Variant::Tuned);
    // A training step contains the other workloads, whose separate code paths are the same in each precision.
    let workloads: &[Workload] = if method.precision == Precision::F32 {
        &[Workload::AttentionGrad, Workload::FeedForwardGrad, Workload::Forward, Workload::TrainStep]
    } else {
        &[Workload::TrainStep]
    };
    let options = OPTION_MODELS.iter().filter(|_| all_or_none).flat_map(|model| {
        let model = ModelId::intern(*model);
        let of_model =
            move |&workload| case(backend, workload, method, Shape::for_workload(workload, model, 2));
        workloads.iter().map(of_model)
    });
    // A gate, and fewer key heads than query heads.
    let grouped = ModelId::intern(OPTION_MODELS[0]).with_lora(Lora::from_id("4"));
    let adapted = case(backend, Workload::TrainStep, method, Shape::for_model(grouped, 2));
    let chain = Shape::Square { n: 64, chain: 3 };
    built_in
        .chain(options)
        .chain(all_or_none.then_some(adapted))
        .chain([case(backend, Workload::MatmulPeak, method, chain)])
        .filter(|c| backend.supports(c).is_ok())
        .collect()
}

/// Checks that every method of the backend agrees with the reference.
pub fn parity_passes(backend: &dyn Backend) -> Result<()> {
    let mut checker = ParityChecker::default();
    let mut checked = 0;
    for method in methods(backend) {
        let mut worst = (0.0, String::new());
        for case in miniature_cases(backend, method) {
            match checker.check_case(backend, case)? {
                Ok(ratio) if ratio > worst.0 => worst = (ratio, case.to_string()),
                Ok(_) => {}
                Err(mismatch) => bail!("{mismatch}"),
            }
            checked += 1;
        }
        println!("{}: {method}: error / tolerance at most {:.2} ({})", backend.id(), worst.0, worst.1);
    }
    ensure!(checked > 0, "{} supports no precision at all", backend.id());
    Ok(())
}

/// Checks that `mixed` computes in bf16 on copies of f32 parameters, so that its forward pass equals that of `bf16`
/// bitwise in both frameworks.
pub fn mixed_computes_in_bf16(backend: &dyn Backend) -> Result<()> {
    for model in ModelId::all() {
        let outputs = |precision| -> Result<Vec<Vec<f32>>> {
            let case = case(backend, Workload::Forward, Method::eager(precision), miniature(model.name));
            let mut loaded = backend.load(&Fixture::for_parity(case))?;
            loaded.step()?;
            Ok(loaded.outputs()?.into_iter().map(|tensor| tensor.data).collect())
        };
        let mixed = outputs(Precision::Mixed)?;
        ensure!(mixed == outputs(Precision::Bf16)?, "{model} in mixed does not compute in bf16 throughout");
        ensure!(mixed != outputs(Precision::F32)?, "{model} in mixed computes in f32");
    }
    Ok(())
}

/// Checks that every injected fault is detected in every method that can show it.
pub fn parity_detects_faults(backend: &dyn Backend) -> Result<()> {
    let mut checker = ParityChecker::default();
    let mut missed = Vec::new();
    for fault in FAULTS {
        let mut hidden: BTreeMap<Precision, f64> = BTreeMap::new();
        for method in methods(backend) {
            let case = fault.case(backend, method);
            let untested = backend.is_precompiled(method.variant)
                && (fault.changes_model() || !smoke_cases_of(backend, method).contains(&case));
            if untested || backend.supports(&case).is_err() {
                continue;
            }
            if let Ok(ratio) = fault.check(backend, &mut checker, method)? {
                let largest = hidden.entry(method.precision).or_default();
                *largest = largest.max(ratio);
                if !fault.hidden.contains(&method.precision) {
                    missed.push(format!("{} in {method}", fault.name));
                }
            }
        }
        let hidden: Vec<String> = hidden.iter().map(|(p, ratio)| format!("{p} {ratio:.2}")).collect();
        let result = if hidden.is_empty() { "always detected".to_owned() } else { hidden.join(", ") };
        println!("{}: {}: {result}", backend.id(), fault.name);
    }
    ensure!(missed.is_empty(), "faults that were not detected: {}", missed.join("; "));
    Ok(())
}

/// Returns a case of every workload on one device, with dropout and without, and the faults to test.
fn idle_cases(backend: &dyn Backend) -> Vec<(Case, &'static [IdleStep])> {
    let tuned = Method { precision: Precision::F32, variant: Variant::Tuned };
    let of_model = |workload: Workload, model: &str| {
        let model = ModelId::named(model).expect("a built-in model").miniature();
        let method = if workload.trains() && workload.takes_model() { tuned } else { F32 };
        case(backend, workload, method, Shape::for_workload(workload, model, 2))
    };
    let models = ["indicator", "gpt2"].iter();
    let all = models.flat_map(|model| Workload::ALL.iter().map(move |workload| (*workload, *model)));
    all.filter_map(|(workload, model)| match workload {
        Workload::AllReduce => None,
        // A product and a copy that take longer than the call of a step.
        Workload::MatmulPeak => Some(case(backend, workload, F32, Shape::Square { n: 256, chain: 3 })),
        Workload::CopyPeak => Some(case(backend, workload, F32, Shape::Buffer { mib: 1, ranks: 1 })),
        _ => Some(of_model(workload, model)),
    })
    .map(|case| (case, IdleStep::ALL))
    // Its step is much longer than the noise of reading.
    .chain([(
        case(backend, Workload::OptimizerStep, F32, Shape::for_model(ModelId::indicator(), 1)),
        &[IdleStep::UntilRead][..],
    )])
    .collect()
}

/// Returns true if the results of a case are read in about the time of its steps.
fn hides_delay(loaded: &mut dyn LoadedCase) -> Result<bool> {
    Ok(loaded.time(timed_work::MAX_STEPS_BEFORE_READING)? < Duration::from_millis(20))
}

/// Checks that steps that leave work out are refused, by the parity check or after the samples.
pub fn idle_steps_are_refused(backend: &dyn Backend) -> Result<()> {
    for (case, faults) in idle_cases(backend) {
        let steps = 4;
        // A case without a fault passes.
        timed_work::verify(backend, case, backend.load(&Fixture::new(case))?, steps)?;
        let hides_delay = hides_delay(backend.load(&Fixture::new(case))?.as_mut())?;
        for &fault in faults {
            if fault == IdleStep::EveryThirdUpdate && !case.workload.optimizes()
                || fault == IdleStep::UntilRead && hides_delay
            {
                continue;
            }
            let parity = Fixture::for_parity(case);
            let mut idle = IdleCase::new(backend.load(&parity)?, fault);
            let checked = ParityChecker::default().compare(&parity, &mut idle, backend.accumulation())?;
            // Other programs can hide a missing step, but not in each of these attempts.
            let mut refused = checked.is_err();
            for _ in 0..3 {
                if refused {
                    break;
                }
                let idle = IdleCase::new(backend.load(&Fixture::new(case))?, fault);
                refused = timed_work::verify(backend, case, Box::new(idle), steps).is_err();
            }
            ensure!(refused, "{case} was accepted with the fault {fault:?}");
            if case.workload == Workload::TrainStep {
                ensure!(checked.is_err(), "the parity check of {case} accepted the fault {fault:?}");
            }
        }
    }
    Ok(())
}

fn time(loaded: &mut dyn LoadedCase) -> Result<Duration> {
    let start = Instant::now();
    loaded.step()?;
    Ok(start.elapsed())
}

/// Returns the median ratio of the step times of two cases, measured interleaved. Repeats the measurement until the
/// ratio is in the expected range, because other programs can disturb one attempt. A missing wait affects all.
fn time_ratio(
    [one, two]: [&mut dyn LoadedCase; 2],
    pairs: usize,
    expected: RangeInclusive<f64>,
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

/// Returns the f32 methods of the training step that run at any size without compilation ahead of time.
fn f32_methods(backend: &dyn Backend) -> Vec<Method> {
    let methods = Variant::ALL.iter().map(|&variant| Method { precision: Precision::F32, variant });
    let is_supported = |method: &Method| {
        !backend.is_precompiled(method.variant)
            && backend.supports(&case(backend, Workload::TrainStep, *method, miniature("indicator"))).is_ok()
    };
    methods.filter(is_supported).collect()
}

/// Checks that twice the work takes twice the time in every variant. A step that returned early would not.
pub fn time_follows_work(backend: &dyn Backend) -> Result<()> {
    let square = |chain| {
        // On an accelerator, the launch dominates small products.
        let n = if backend.id().is_cpu() { 512 } else { 4096 };
        backend.load(&Fixture::new(case(backend, Workload::MatmulPeak, F32, Shape::Square { n, chain })))
    };
    let (mut once, mut twice) = (square(8)?, square(16)?);
    let ratio = time_ratio([once.as_mut(), twice.as_mut()], 31, 1.9..=2.1)?;
    ensure!((1.9..=2.1).contains(&ratio), "twice the work took {ratio:.2} times as long on {}", backend.id());
    drop((once, twice));
    for method in f32_methods(backend) {
        let layers = |layers| {
            let model = ModelId::intern(Model { layers, ..*ModelId::indicator() });
            let batch = if backend.id().is_cpu() { 1 } else { 64 };
            let shape = Shape::for_model(model, batch);
            backend.load(&Fixture::new(case(backend, Workload::TrainStep, method, shape)))
        };
        let (mut three, mut six) = (layers(3)?, layers(6)?);
        // The embedding, the heads and the overhead of operations on many threads do not double.
        let ratio = time_ratio([three.as_mut(), six.as_mut()], 11, 1.4..=2.1)?;
        ensure!(
            (1.4..=2.1).contains(&ratio),
            "twice the layers took {ratio:.2} times as long on {} in {method}",
            backend.id()
        );
    }
    Ok(())
}

/// Checks in every variant that the device is idle after a step, and that reading the results only copies them.
pub fn steps_leave_nothing_pending(backend: &dyn Backend) -> Result<()> {
    for method in f32_methods(backend) {
        let case = case(backend, Workload::TrainStep, method, Shape::for_model(ModelId::indicator(), 4));
        let mut loaded = backend.load(&Fixture::new(case))?;
        time(loaded.as_mut())?;
        let (mut waits, mut reads) = (Vec::new(), Vec::new());
        for _ in 0..5 {
            let step = time(loaded.as_mut())?.as_secs_f64();
            let start = Instant::now();
            backend.synchronize()?;
            waits.push(start.elapsed().as_secs_f64() / step);
            // The first read would compute an unevaluated result. The second only copies.
            let start = Instant::now();
            loaded.outputs()?;
            let first = start.elapsed();
            let start = Instant::now();
            loaded.outputs()?;
            reads.push((first.as_secs_f64() - start.elapsed().as_secs_f64()) / step);
        }
        let [wait, read] = [waits, reads].map(|shares| median(&shares));
        ensure!(wait < 0.05, "after a step, {case} still runs for {:.0} % of its time", wait * 100.0);
        ensure!(read < 0.2, "reading the results of {case} takes {:.0} % of a step", read * 100.0);
    }
    Ok(())
}

/// Checks that the peak of the memory is within 1 % of a known allocation: a buffer and its copy. On a CPU without an
/// allocator peak, the fixture on the host counts too.
pub fn memory_is_counted(backend: &dyn Backend) -> Result<()> {
    let mib = 256;
    let case = case(backend, Workload::CopyPeak, F32, Shape::Buffer { mib, ranks: 1 });
    backend.reset_peak_memory()?;
    memory::reset_resident_peak();
    let before = memory::resident_bytes();
    let fixture = Fixture::new(case);
    let mut loaded = backend.load(&fixture)?;
    loaded.step()?;
    let (reported, buffers) = match backend.peak_memory() {
        Some(peak) => (peak, 2),
        None if cfg!(not(target_os = "linux")) => {
            println!("{}: memory is not checked: this system cannot reset the resident peak", backend.id());
            return Ok(());
        }
        None => (memory::resident_peak_bytes().unwrap_or(0) - before, 3),
    };
    let expected = (buffers * mib) << 20;
    let error = reported as f64 / expected as f64 - 1.0;
    ensure!(
        error.abs() < 0.01,
        "{} has {buffers} buffers of {mib} MiB and reports {reported} bytes, {:+.1} % off",
        backend.id(),
        error * 100.0
    );
    Ok(())
}

/// Checks that the resident size does not grow over many steps of every workload at its miniature shape.
pub fn memory_does_not_grow(backend: &dyn Backend) -> Result<()> {
    const STEPS: u64 = 250;
    // 4 kB per step is a leak. Allocators settle within less.
    const MAX_GROWTH: u64 = 4_000 * STEPS;
    let mut tested = 0;
    for case in smoke_cases(backend) {
        // 16-bit types and single optimizations run on the same code paths.
        let covered = case.method.precision.is_half()
            || !matches!(case.method.variant, Variant::Eager | Variant::Tuned);
        if covered || backend.supports(&case).is_err() {
            continue;
        }
        let mut loaded = backend.load(&Fixture::new(case))?;
        for _ in 0..50 {
            loaded.step()?;
        }
        let mut growth = u64::MAX;
        // A leak grows in each attempt, but caches of compiled kernels and graphs fill only once.
        for _ in 0..3 {
            let before = memory::resident_bytes();
            for _ in 0..STEPS {
                loaded.step()?;
            }
            growth = memory::resident_bytes().saturating_sub(before);
            if growth < MAX_GROWTH {
                break;
            }
        }
        ensure!(growth < MAX_GROWTH, "memory grew by {growth} bytes in {STEPS} steps of {case}");
        tested += 1;
    }
    ensure!(tested > 0, "no case of {} could run", backend.id());
    Ok(())
}

/// Checks that this process has not loaded the libraries of another framework.
pub fn process_has_one_framework(backend: &dyn Backend) -> Result<()> {
    process::assert_isolated(backend.id().framework())
}

/// A distinction of tests that measure time.
#[derive(Clone, Copy)]
enum Timing {
    Timed,
    Untimed,
}

/// Waits until a test may run. The tests of two frameworks run side by side, except those that measure time. The lock
/// ends when the file is dropped.
fn lock_machine(timing: Timing) -> Result<File> {
    let path = std::env::current_exe()?.with_file_name("conformance");
    match timing {
        Timing::Timed => files::lock_file(&path),
        Timing::Untimed => files::lock_file_shared(&path),
    }
}

/// Runs all tests on every available backend, and prints their names.
///
/// # Panics
/// Panics at the first failure, with the reason.
pub fn assert_all(backends: &Backends) {
    type Test = fn(&dyn Backend) -> Result<()>;
    const TESTS: &[(&str, Timing, Test)] = &[
        ("the process has one framework", Timing::Untimed, process_has_one_framework),
        ("parity passes", Timing::Untimed, parity_passes),
        ("mixed computes in bf16", Timing::Untimed, mixed_computes_in_bf16),
        ("parity detects faults", Timing::Untimed, parity_detects_faults),
        ("memory is counted", Timing::Untimed, memory_is_counted),
        ("memory does not grow", Timing::Untimed, memory_does_not_grow),
        ("idle steps are refused", Timing::Timed, idle_steps_are_refused),
        ("steps leave nothing pending", Timing::Timed, steps_leave_nothing_pending),
        ("time follows work", Timing::Timed, time_follows_work),
    ];
    memory::retain_freed_memory().unwrap_or_else(|reason| panic!("{reason:#}"));
    for unavailable in &backends.unavailable {
        println!("{}: skipped, {}", unavailable.id, unavailable.reason);
    }
    for backend in &backends.available {
        for (name, timing, test) in TESTS {
            let _lock = lock_machine(*timing).unwrap_or_else(|reason| panic!("{reason:#}"));
            let start = Instant::now();
            test(backend.as_ref()).unwrap_or_else(|reason| panic!("{}: {name}: {reason:#}", backend.id()));
            println!("{}: {name} ({:.1} s)", backend.id(), start.elapsed().as_secs_f64());
        }
    }
}
