//! The check of the work that was timed: after the samples of a case, its state is read.
//!
//! The timing never reads a result between steps. So a step could leave work out that nobody reads, or delay it until
//! somebody does. [`verify`] reads the state after the samples, and compares a stretch as long as a sample with the
//! same steps of a newly loaded case, which are read one at a time. Steps without state have the same results each
//! time, so [`verify`] also compares the time of several of them with that of single ones.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::state_difference;
use crate::backend::{Backend, LoadedCase};
use crate::fixture::{Fixture, Tensor};
use crate::suite::{Case, Workload};

/// Share of the timed steps that may remain for the first reading. The conformance tests allow the same for a step.
const DELAYED_SHARE: f64 = 0.2;
/// Time by which two readings of the same results differ on a busy machine.
const READING_NOISE: Duration = Duration::from_millis(5);
/// Other programs can disturb a reading, but not each of these attempts.
const ATTEMPTS: usize = 5;
/// Numbers of steps before a reading in the check before the samples, until they take [`LONG_ENOUGH`]. With the first
/// ones, a delay of 10 ms per step shows, and with the last ones a delay of 0.1 ms.
const STEPS_BEFORE_READING: [u64; 3] = [1, 16, MAX_STEPS_BEFORE_READING];
pub const MAX_STEPS_BEFORE_READING: u64 = 256;
/// [`DELAYED_SHARE`] of this time is [`READING_NOISE`].
const LONG_ENOUGH: Duration = Duration::from_millis(25);
/// Several steps take at least this share of the time of as many single ones. Two steps take as long as two single
/// ones, or half as long if one of them is left out. The limit is the middle.
const MIN_TIME_OF_SEVERAL: f64 = 0.75;
/// The shortest of at most this many times counts, within [`COUNTING_TIME`].
const MAX_COUNTED: usize = 31;
/// A busy machine can hide a missing step, so there are few attempts.
const COUNTING_ATTEMPTS: usize = 3;
/// Time for the comparison of several steps with single ones. A step of the headline is measured once or twice.
const COUNTING_TIME: Duration = Duration::from_millis(500);
/// Seed of the dropout masks in the compared stretch.
const SEED: u64 = 7;

/// Verifies a case after its samples had `steps` steps each.
///
/// # Errors
/// Returns an error if the backend fails, if reading the results does work that the timing left out, or if the same
/// steps have other results when each of them is read.
pub fn verify(backend: &dyn Backend, case: Case, mut loaded: Box<dyn LoadedCase>, steps: u64) -> Result<()> {
    if !has_state(&case) {
        check_number_of_steps(loaded.as_mut(), steps)?;
    }
    let start = check_delayed_work(loaded.as_mut(), steps)?;
    let inputs = Fixture::new(case).with_batch(1);
    loaded.set_inputs(&inputs)?;
    loaded.restore(&[], SEED)?;
    loaded.time(steps)?;
    let timed = read_all(loaded.as_mut())?;
    // Two copies of a large case may not fit into memory.
    drop(loaded);

    // Without state, the results of each step are the same.
    let count = if has_state(&case) { steps } else { steps.min(2) };
    let run_and_read = || -> Result<Vec<Tensor>> {
        let mut fresh = backend.load(&Fixture::new(case)).context("the case could not be loaded again")?;
        fresh.set_inputs(&inputs)?;
        fresh.restore(&start, SEED)?;
        let mut read = Vec::new();
        for step in 1..=count {
            fresh.step()?;
            if case.workload.optimizes() || step == count {
                read = read_all(fresh.as_mut())?;
            }
        }
        Ok(read)
    };
    let read = run_and_read()?;
    check_finite(&timed)?;
    match state_difference(&read, &timed, steps as usize, run_and_read)? {
        Some(difference) => bail!("the timed steps did other work than steps that are read: {difference}"),
        None => Ok(()),
    }
}

/// Verifies that a case still computes after it was timed: a step with other inputs has other results.
///
/// A device that fails silently ends a step at once and leaves the results of an earlier one. libtorch does not read
/// the error status of a Metal command buffer, so a step that ran out of memory there ends like this.
///
/// # Errors
/// Returns an error if the results stay the same or are not finite.
pub fn verify_progress(loaded: &mut dyn LoadedCase, case: Case) -> Result<()> {
    let before = read_all(loaded)?;
    loaded.set_inputs(&Fixture::new(case).with_batch(1))?;
    loaded.step()?;
    let after = read_all(loaded)?;
    check_finite(&after)?;
    let same = |(a, b): (&Tensor, &Tensor)| a.name == "step" || a.data == b.data;
    ensure!(
        before.len() != after.len() || !before.iter().zip(&after).all(same),
        "the timed steps did no work: a step with other inputs left their results unchanged"
    );
    Ok(())
}

/// Checks before the samples that reading only copies. Millions of delayed steps would otherwise run after them.
///
/// # Errors
/// Returns an error if the backend fails, or if reading the results does work that the steps left out.
pub fn check_reading(loaded: &mut dyn LoadedCase) -> Result<()> {
    for steps in STEPS_BEFORE_READING {
        check_delayed_work(loaded, steps)?;
        if loaded.time(steps)? > LONG_ENOUGH {
            break;
        }
    }
    Ok(())
}

/// Returns true if the results of a step depend on the steps before it.
fn has_state(case: &Case) -> bool {
    // An all-reduce works in place.
    case.workload.optimizes() || case.dropout().any() || case.workload == Workload::AllReduce
}

/// Reads the results of the last step and the state.
fn read_all(loaded: &mut dyn LoadedCase) -> Result<Vec<Tensor>> {
    let mut all = loaded.outputs()?;
    all.extend(loaded.checkpoint()?);
    Ok(all)
}

/// Checks that the first reading after timed steps takes no longer than a second one, which only copies. Returns the
/// checkpoint after the last step.
fn check_delayed_work(loaded: &mut dyn LoadedCase, steps: u64) -> Result<Vec<Tensor>> {
    let mut share = 0.0;
    for _ in 0..ATTEMPTS {
        let timed = loaded.time(steps)?;
        let mut reading = || -> Result<(Duration, Vec<Tensor>)> {
            let start = Instant::now();
            loaded.outputs()?;
            let checkpoint = loaded.checkpoint()?;
            Ok((start.elapsed(), checkpoint))
        };
        let ((first, _), (second, checkpoint)) = (reading()?, reading()?);
        let delayed = first.saturating_sub(second.mul_f64(1.0 + DELAYED_SHARE) + READING_NOISE);
        share = delayed.as_secs_f64() / timed.as_secs_f64();
        if share <= DELAYED_SHARE {
            return Ok(checkpoint);
        }
    }
    bail!("the timed steps left work for the first reading: {:.0} % of their time", share * 100.0)
}

/// Checks that two steps, and `steps` steps, take as long as that number of single ones.
fn check_number_of_steps(loaded: &mut dyn LoadedCase, steps: u64) -> Result<()> {
    let mut shares = [0.0; 2];
    for _ in 0..COUNTING_ATTEMPTS {
        let [mut one, mut two] = [Duration::MAX; 2];
        let started = Instant::now();
        for _ in 0..MAX_COUNTED {
            one = one.min(loaded.time(1)?);
            two = two.min(loaded.time(2)?);
            if started.elapsed() > COUNTING_TIME {
                break;
            }
        }
        let all = if steps > 2 { loaded.time(steps)? } else { two };
        let share = |time: Duration, steps: u64| time.as_secs_f64() / (one.as_secs_f64() * steps as f64);
        shares = [share(two, 2), share(all, steps.max(2))];
        if shares.iter().all(|share| *share >= MIN_TIME_OF_SEVERAL) {
            return Ok(());
        }
    }
    let [two, all] = shares.map(|share| 100.0 * share);
    bail!(
        "2 steps take {two:.0} % of the time of 2 single ones, and {steps} steps {all:.0} %: some are left out"
    )
}

fn check_finite(results: &[Tensor]) -> Result<()> {
    for tensor in results.iter().filter(|tensor| tensor.name == "loss") {
        ensure!(tensor.data.iter().all(|v| v.is_finite()), "the loss after the timed steps is not a number");
    }
    Ok(())
}
