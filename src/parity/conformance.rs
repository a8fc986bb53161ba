//! What every backend must pass before its figures mean anything. Each framework's
//! package runs this on the backends that the machine has.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::backend::{Backend, Found, Prepared};
use crate::model::ModelId;
use crate::model::fixture::Fixture;
use crate::results::machine;
use crate::statistics::median;
use crate::suite::{Block, Case, Compute, Precision, Recipe, Shape, Workload, cases};
use crate::{memory, parity};

fn case(backend: &dyn Backend, workload: Workload, precision: Precision, shape: Shape) -> Case {
    Case { workload, backend: backend.id(), precision, shape }
}

/// A model's miniature, or a part of its blocks.
fn tiny(name: &str) -> Shape {
    Shape::Model { model: named(name), batch: 2 }
}

fn tiny_block(part: Block) -> Shape {
    Shape::Block { part, model: named("indicator"), batch: 2 }
}

fn named(name: &str) -> ModelId {
    ModelId::named(name).expect("a preset").miniature()
}

const F32: Precision = Precision::eager(Compute::F32);

/// What a check found where nothing was wrong.
pub enum Outcome {
    Holds,
    /// It could not be checked here, and why.
    Skipped(String),
}

use Outcome::{Holds, Skipped};

/// Every precision and recipe that the backend offers computes what the oracle does.
pub fn parity_holds(backend: &dyn Backend) -> Result<Outcome> {
    let mut proven = 0;
    for &compute in Compute::ALL {
        for &recipe in Recipe::ALL {
            // A single optimisation is the same code in every number format.
            if compute != Compute::F32 && !matches!(recipe, Recipe::Eager | Recipe::Opt) {
                continue;
            }
            let precision = Precision { compute, recipe };
            let like = case(backend, Workload::TrainStep, precision, tiny("indicator"));
            let forward = Case { workload: Workload::Forward, ..like };
            if backend.supports(&forward).is_err() && backend.supports(&like).is_err() {
                continue;
            }
            if let Some(mismatch) = parity::check(backend, like)? {
                bail!("{mismatch}");
            }
            proven += 1;
        }
    }
    ensure!(proven > 0, "{} supports no precision at all", backend.id());
    Ok(Holds)
}

/// Mixed precision is one computation in both frameworks: bf16's, on copies of f32
/// parameters. So its forward pass gives bf16's results to the last bit.
pub fn amp_computes_as_bf16(backend: &dyn Backend) -> Result<Outcome> {
    for model in ModelId::all() {
        let outputs = |compute| -> Result<Vec<Vec<f32>>> {
            let precision = Precision::eager(compute);
            let case = case(backend, Workload::Forward, precision, tiny(model.name));
            let mut prepared = backend.prepare(&Fixture::for_parity(case))?;
            prepared.step()?;
            Ok(prepared.outputs()?.into_iter().map(|tensor| tensor.data).collect())
        };
        let amp = outputs(Compute::Amp)?;
        ensure!(amp == outputs(Compute::Bf16)?, "{model} in amp is not computed in bf16 throughout");
        ensure!(amp != outputs(Compute::F32)?, "{model} in amp is computed in f32");
    }
    Ok(Holds)
}

/// A fixture that makes the backend compute something wrong, while the truth stays.
type Sabotage = (&'static str, Workload, Shape, fn(&mut Fixture));

/// Wrong kernels must be caught. Each is planted in what the backend is given: a scaled
/// query projection is a wrong scale in attention, a zeroed bias a missing one.
pub fn parity_catches_wrong_kernels(backend: &dyn Backend) -> Result<Outcome> {
    let indicator = tiny("indicator");
    let gpt2 = tiny("gpt2");
    let attention = tiny_block(Block::Attention);
    let feed_forward = tiny_block(Block::FeedForward);
    let no_decay = |f: &mut Fixture| f.adamw.weight_decay = 0.0;
    fn scale_queries(f: &mut Fixture, name: &str) {
        f.edit_parameter(&format!("{name}.q.weight"), |w| w.iter_mut().for_each(|v| *v *= 1.1));
        f.edit_parameter(&format!("{name}.q.bias"), |b| b.iter_mut().for_each(|v| *v *= 1.1));
    }
    let planted: [Sabotage; 7] = [
        ("attention scale", Workload::Attention, attention, |f| scale_queries(f, "attention")),
        ("attention scale", Workload::AttentionGrad, attention, |f| scale_queries(f, "attention")),
        ("attention scale", Workload::ForwardBackward, indicator, |f| {
            scale_queries(f, "blocks.1.attention");
        }),
        ("missing bias", Workload::FeedForward, feed_forward, |f| {
            f.edit_parameter("feed-forward.up.bias", |b| b.fill(0.0));
        }),
        ("missing bias", Workload::Forward, gpt2, |f| {
            f.edit_parameter("blocks.0.feed-forward.down.bias", |b| b.fill(0.0));
        }),
        ("weight decay", Workload::OptimizerStep, indicator, no_decay),
        ("weight decay", Workload::TrainStep, indicator, no_decay),
    ];
    for (what, workload, shape, sabotage) in planted {
        let case = case(backend, workload, F32, shape);
        ensure!(parity::check_case(backend, case)?.is_none(), "{case} fails before it is sabotaged");
        let truth = Fixture::for_parity(case);
        let mut wrong = Fixture::for_parity(case);
        sabotage(&mut wrong);
        let caught = parity::compare(&truth, backend.prepare(&wrong)?.as_mut())?;
        // A wrong decay is compared on the parameters that the backend started from.
        ensure!(caught.is_some(), "a wrong {what} in {case} was not caught");
    }
    Ok(Holds)
}

fn time(prepared: &mut dyn Prepared) -> Result<Duration> {
    let start = Instant::now();
    prepared.step()?;
    Ok(start.elapsed())
}

/// Twice the work takes twice the time: a step that returned early would not.
pub fn time_follows_work(backend: &dyn Backend) -> Result<Outcome> {
    let square = |chain| {
        // On an accelerator small products measure launches.
        let n = if backend.id().is_cpu() { 512 } else { 4096 };
        let case = case(backend, Workload::MatmulPeak, F32, Shape::Square { n, chain });
        backend.prepare(&Fixture::new(case))
    };
    let (mut once, mut twice) = (square(8)?, square(16)?);
    let mut ratio = 0.0;
    // Other work on the machine can spoil one attempt; a missing wait spoils all.
    for _ in 0..5 {
        let mut ratios = Vec::new();
        for _ in 0..3 {
            time(once.as_mut())?;
            time(twice.as_mut())?;
        }
        for _ in 0..31 {
            let one = time(once.as_mut())?;
            let two = time(twice.as_mut())?;
            ratios.push(two.as_secs_f64() / one.as_secs_f64());
        }
        ratio = median(&ratios);
        if (1.9..=2.1).contains(&ratio) {
            return Ok(Holds);
        }
    }
    bail!("twice the work took {ratio:.2} times as long on {}", backend.id())
}

/// After `step()` the device is idle, and reading every result is copying alone.
pub fn nothing_is_left_pending(backend: &dyn Backend) -> Result<Outcome> {
    let precision = F32;
    let shape = Shape::Model { model: ModelId::indicator(), batch: 4 };
    let mut prepared =
        backend.prepare(&Fixture::new(case(backend, Workload::TrainStep, precision, shape)))?;
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
    ensure!(wait < 0.05, "after a step {} still works for {:.0} % of it", backend.id(), wait * 100.0);
    ensure!(read < 0.2, "reading results costs {} {:.0} % of a step", backend.id(), read * 100.0);
    Ok(Holds)
}

/// Two training steps on the same input draw different masks; two inference steps agree.
pub fn dropout_is_random(backend: &dyn Backend) -> Result<Outcome> {
    let mut proven = 0;
    for precision in [F32, Precision::opt(Compute::F32)] {
        let shape = tiny_block(Block::Attention);
        let train = case(backend, Workload::AttentionGrad, precision, shape);
        if let Err(reason) = backend.supports(&train) {
            println!("{train}: skipped, {reason}");
            continue;
        }
        let gradient = |prepared: &mut dyn Prepared| -> Result<Vec<f32>> {
            prepared.step()?;
            Ok(prepared.outputs()?.swap_remove(0).data)
        };
        let mut with = backend.prepare(&Fixture::new(train))?;
        let (a, b) = (gradient(with.as_mut())?, gradient(with.as_mut())?);
        ensure!(a != b, "two steps of {train} drew the same dropout mask");
        let mut without = backend.prepare(&Fixture::for_parity(train))?;
        let (a, b) = (gradient(without.as_mut())?, gradient(without.as_mut())?);
        ensure!(a == b, "{train} without dropout is not repeatable");
        proven += 1;
    }
    ensure!(proven > 0, "no recipe of {} could be tried", backend.id());
    Ok(Holds)
}

/// A known amount, allocated on the device and read back as the peak, within 1 %: a
/// buffer and its copy, and on a CPU without an allocator's peak the host's fixture too.
pub fn memory_is_counted(backend: &dyn Backend) -> Result<Outcome> {
    let mib = 256;
    let case = case(backend, Workload::CopyPeak, F32, Shape::Buffer { mib });
    backend.reset_peak_memory()?;
    memory::reset_resident_peak();
    let before = memory::resident_bytes();
    let fixture = Fixture::new(case);
    let mut prepared = backend.prepare(&fixture)?;
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

/// Bytes in 1,000 steps: 2 kB a step would be a leak; allocators settle within less.
const LEAK: u64 = 2_000_000;

/// The resident size stays flat over 1,000 steps of every workload at its miniature shape.
pub fn memory_does_not_grow(backend: &dyn Backend) -> Result<Outcome> {
    let mut tried = 0;
    for case in cases(crate::suite::Set::Smoke) {
        if case.backend != backend.id() || backend.supports(&case).is_err() {
            continue;
        }
        // Half types and single optimisations run on the same code paths.
        if case.precision.compute.is_half() || !matches!(case.precision.recipe, Recipe::Eager | Recipe::Opt) {
            continue;
        }
        let mut prepared = backend.prepare(&Fixture::new(case))?;
        for _ in 0..100 {
            prepared.step()?;
        }
        let mut grown = u64::MAX;
        // A leak grows for ever; caches of compiled kernels and graphs fill once.
        for _ in 0..3 {
            let before = memory::resident_bytes();
            for _ in 0..1000 {
                prepared.step()?;
            }
            grown = memory::resident_bytes().saturating_sub(before);
            if grown < LEAK {
                break;
            }
        }
        ensure!(grown < LEAK, "1,000 steps of {case} grew memory by {grown} bytes");
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
pub fn assert_all(found: &Found) {
    type Check = fn(&dyn Backend) -> Result<Outcome>;
    const CHECKS: &[(&str, Check)] = &[
        ("the process holds one framework", process_holds_one_framework),
        ("parity holds", parity_holds),
        ("amp computes as bf16 does", amp_computes_as_bf16),
        ("parity catches wrong kernels", parity_catches_wrong_kernels),
        ("memory is counted", memory_is_counted),
        ("dropout is random", dropout_is_random),
        ("nothing is left pending", nothing_is_left_pending),
        ("time follows work", time_follows_work),
        ("memory does not grow", memory_does_not_grow),
    ];
    memory::keep_freed().unwrap_or_else(|reason| panic!("{reason:#}"));
    for absent in &found.absent {
        println!("{}: skipped, {}", absent.id, absent.reason);
    }
    for backend in &found.present {
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
