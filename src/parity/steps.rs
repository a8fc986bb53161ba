//! The steps that a check drives, and what it compares after each of them.
//!
//! A check drives a case as its timing does, by [`LoadedCase::time`]. It changes the inputs on the way, so that
//! cached results are wrong. It compares a later step too, and reads once after several steps, as the timing does.

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Instant;

use anyhow::{Context, Error};

use super::tolerance::{self, Expected, ReferenceCache, layer_name};
use super::{Mismatch, RankMismatch, compare_tensors, find, timed_work};
use crate::backend::{Accumulation, LoadedCase};
use crate::fixture::{Fixture, Tensor};
use crate::model::parameters::ParameterSpec;
use crate::suite::{Case, Shape, Workload};

/// The last training step that is compared is at least and at most this one. Its number is random, so that no
/// fault can spare it.
const EARLIEST_LAST_STEP: usize = 4;
const LATEST_LAST_STEP: usize = 12;
/// Seconds that the steps up to the last one may take, if it can be an earlier one.
const STEP_SECONDS: f64 = 1.0;

/// The reason why a check ended before its last step.
pub enum Failure {
    Mismatch(Mismatch),
    Error(Error),
}

impl From<Mismatch> for Failure {
    fn from(mismatch: Mismatch) -> Self {
        Self::Mismatch(mismatch)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

pub(super) type Outcome<T> = Result<T, Failure>;

/// Returns a number in `0..count`, another one in each process and each call.
pub(super) fn random_below(count: usize) -> usize {
    (RandomState::new().build_hasher().finish() % count as u64) as usize
}

/// A case in its check.
pub struct StepCheck<'a> {
    pub reference: &'a mut ReferenceCache,
    pub fixture: &'a Fixture,
    pub loaded: &'a mut dyn LoadedCase,
    pub accumulation: Accumulation,
}

impl StepCheck<'_> {
    /// Drives all steps. Returns the largest error / tolerance.
    ///
    /// # Errors
    /// Returns the first mismatch, or an error of the backend.
    pub fn run(&mut self) -> Outcome<f64> {
        let ratio = match self.fixture.case {
            Case { shape: Shape::Buffer { .. }, .. } => self.check_buffer().map(|()| 0.0),
            case if case.workload.optimizes() => self.check_training(),
            _ => self.check_function(),
        }?;
        timed_work::check_reading(self.loaded).map_err(|delay| self.mismatch(delay))?;
        Ok(ratio)
    }

    pub(super) fn case(&self) -> Case {
        self.fixture.case
    }

    pub(super) fn mismatch(&self, reason: impl fmt::Display) -> Failure {
        Mismatch::new(self.case(), reason.to_string()).into()
    }

    /// Runs steps as the timing does.
    fn time(&mut self, steps: usize) -> Outcome<()> {
        let case = self.case();
        self.loaded.time(steps as u64).with_context(|| format!("a step of {case} failed"))?;
        Ok(())
    }

    fn set_inputs(&mut self, fixture: &Fixture) -> Outcome<()> {
        let case = self.case();
        self.loaded.set_inputs(fixture).with_context(|| format!("the inputs of {case} could not be set"))?;
        Ok(())
    }

    /// Converts what the backend read. Ranks that differ are a mismatch.
    fn read(&self, results: anyhow::Result<Vec<Tensor>>) -> Outcome<Vec<Tensor>> {
        match results {
            Err(error) if error.is::<RankMismatch>() => Err(self.mismatch(error)),
            results => {
                Ok(results.with_context(|| format!("the results of {} could not be read", self.case()))?)
            }
        }
    }

    fn outputs(&mut self) -> Outcome<Vec<Tensor>> {
        let results = self.loaded.outputs();
        self.read(results)
    }

    fn checkpoint(&mut self) -> Outcome<Vec<Tensor>> {
        let checkpoint = self.loaded.checkpoint();
        self.read(checkpoint)
    }

    /// Returns the fixture of the second batch.
    fn other_inputs(&self) -> Fixture {
        Fixture::for_parity(self.case()).with_batch(1)
    }

    /// Compares the outputs of the last step with expected ones.
    fn compare_outputs(&mut self, expected: &[Expected], step: &str) -> Outcome<f64> {
        let results = self.outputs()?;
        self.compare(expected, &results, step)
    }

    pub(super) fn compare(&self, expected: &[Expected], results: &[Tensor], step: &str) -> Outcome<f64> {
        compare_tensors(self.case(), expected, results)
            .map_err(|m| Mismatch { reason: format!("{}{step}", m.reason), ..m }.into())
    }

    /// Checks a copy, which is exact, or an all-reduce, which is exact for the numbers of the fixture.
    fn check_buffer(&mut self) -> Outcome<()> {
        let other = self.other_inputs();
        for (fixture, steps) in [(self.fixture, 1), (&other, 1), (&other, 3)] {
            // Several all-reduces in place have no simple result.
            if steps > 1 && self.case().workload == Workload::AllReduce {
                continue;
            }
            self.set_inputs(fixture)?;
            self.time(steps)?;
            let results = self.outputs()?;
            let (expected, reason): (Vec<f32>, &str) = if self.case().workload == Workload::AllReduce {
                (fixture.sum_over_ranks(), "out is not the sum of the ranks' buffers")
            } else {
                let buffer = &fixture.input("buffer").data;
                (buffer.iter().map(|v| -v).collect(), "out is not the negation of the buffer")
            };
            if results.first().is_none_or(|out| out.data != expected) {
                return Err(self.mismatch(reason));
            }
        }
        Ok(())
    }

    /// Checks a case without an optimizer: one step, several steps that are read once, and both on other inputs.
    fn check_function(&mut self) -> Outcome<f64> {
        let mut worst = 0.0_f64;
        let other = self.other_inputs();
        let several = 2 + random_below(3);
        for (fixture, batch) in [(self.fixture, ""), (&other, " on the second batch")] {
            let expected = self.reference.expected(fixture, self.accumulation);
            if fixture.batch_number() > 0 {
                self.loaded.restore(&parameter_checkpoint(fixture), 0)?;
                self.set_inputs(fixture)?;
            }
            for steps in [1, several] {
                self.time(steps)?;
                let after =
                    if steps > 1 { format!("{batch} after {steps} more steps") } else { batch.to_owned() };
                worst = worst.max(self.compare_outputs(&expected, &after)?);
            }
        }
        Ok(worst)
    }

    /// Checks a case with an optimizer: the update of every step up to a random one, the results of the first and of
    /// the last one, and the same steps again without reading.
    fn check_training(&mut self) -> Outcome<f64> {
        let started = Instant::now();
        let initial = initial_checkpoint(self.fixture);
        let (mut state, mut worst) = (initial, 0.0_f64);
        let results = self.checked_step(self.fixture, &mut state, &mut worst)?;
        let affordable = (STEP_SECONDS / started.elapsed().as_secs_f64()) as usize;
        let expected = self.reference.expected(self.fixture, self.accumulation);
        worst = worst.max(self.compare(&expected, &results, "")?);
        drop((results, expected));
        let first = state.clone();

        let latest = affordable.clamp(EARLIEST_LAST_STEP, LATEST_LAST_STEP);
        let last = EARLIEST_LAST_STEP + random_below(latest - EARLIEST_LAST_STEP + 1);
        for _ in 2..last {
            self.checked_step(self.fixture, &mut state, &mut worst)?;
        }
        let read = state.clone();
        let other = self.other_inputs();
        replace_parameters(&mut state, &other);
        let expected = self.reference.expected(&other, self.accumulation);
        self.loaded.restore(&state, 0)?;
        self.set_inputs(&other)?;
        let before_last = state.clone();
        let results = self.checked_step(&other, &mut state, &mut worst)?;
        let step = format!(" in step {last}, on the second batch");
        worst = worst.max(self.compare(&expected, &results, &step)?);
        drop(results);

        // The same steps as the timing drives them, which must end in the same state.
        self.loaded.restore(&first, 0)?;
        self.set_inputs(self.fixture)?;
        self.time(last - 2)?;
        let unread = self.checkpoint()?;
        let repeat = || -> Outcome<Vec<Tensor>> {
            self.loaded.restore(&first, 0)?;
            self.set_inputs(self.fixture)?;
            for _ in 2..last {
                self.time(1)?;
                self.outputs()?;
            }
            self.checkpoint()
        };
        if let Some(reason) = state_difference(&read, &unread, last - 2, repeat)? {
            return Err(self.mismatch(format!("after {} steps without reading, {reason}", last - 2)));
        }
        self.loaded.restore(&before_last, 0)?;
        self.set_inputs(&other)?;
        self.time(1)?;
        let step = format!(" in step {last}, repeated without reading");
        Ok(worst.max(self.compare_outputs(&expected, &step)?))
    }

    /// Runs one step, and compares its update with that of the optimizer for the gradients of the backend. Replaces `state`, the
    /// checkpoint before the step, with that after it. Returns the outputs.
    fn checked_step(
        &mut self,
        fixture: &Fixture,
        state: &mut Vec<Tensor>,
        worst: &mut f64,
    ) -> Outcome<Vec<Tensor>> {
        self.time(1)?;
        let results = self.outputs()?;
        let mut after = self.checkpoint()?;
        let step = find(state, "step").map_or(0.0, |step| step.data[0]) + 1.0;
        if find(&after, "step").is_none_or(|after| after.data[0] != step) {
            return Err(self.mismatch(format!("the optimizer did not count step {step}")));
        }
        // The outputs are what a user sees, so their parameters count.
        for tensor in after.iter_mut().filter(|tensor| tensor.name.starts_with("param/")) {
            let output = find(&results, &tensor.name);
            let output = output.ok_or_else(|| self.mismatch(format!("{} is missing", tensor.name)))?;
            tensor.data.clone_from(&output.data);
        }
        let ratio = self.compare_update(fixture, state, &results, &after, step as i32)?;
        *worst = worst.max(ratio);
        *state = after;
        Ok(results)
    }
}

/// Returns the checkpoint before the first step of a case without an optimizer.
fn parameter_checkpoint(fixture: &Fixture) -> Vec<Tensor> {
    let named = |t: &Tensor| Tensor { name: format!("param/{}", t.name), ..t.clone() };
    fixture.parameters().iter().map(named).collect()
}

/// Returns the checkpoint before the first step of a case with an optimizer.
fn initial_checkpoint(fixture: &Fixture) -> Vec<Tensor> {
    let mut all = parameter_checkpoint(fixture);
    let zeros = |prefix: &str, spec: &ParameterSpec| Tensor {
        name: format!("{prefix}/{}", spec.name),
        dims: spec.dims.clone(),
        data: vec![0.0; spec.len()],
    };
    let shape = fixture.case.shape;
    let specs: Vec<ParameterSpec> =
        shape.parameter_specs().into_iter().filter(ParameterSpec::is_trained).collect();
    all.extend(specs.iter().map(|spec| zeros("moment1", spec)));
    all.extend(specs.iter().filter(|spec| !shape.uses_muon_for(spec)).map(|spec| zeros("moment2", spec)));
    all.push(Tensor { name: "step".to_owned(), dims: vec![1], data: vec![0.0] });
    all
}

/// Replaces the parameters of a checkpoint by those of a fixture.
fn replace_parameters(checkpoint: &mut [Tensor], fixture: &Fixture) {
    for parameter in fixture.parameters() {
        let name = format!("param/{}", parameter.name);
        if let Some(tensor) = checkpoint.iter_mut().find(|tensor| tensor.name == name) {
            tensor.data.clone_from(&parameter.data);
        }
    }
}

/// Factor between two differences of runs that only round differently. Both are norms over many elements, so they are
/// about equal.
const ROUNDING_FACTOR: f64 = 2.0;

/// Compares two states that should be equal after `steps` steps from the same state. Returns the difference, or
/// `None` if they agree.
///
/// On most backends, they are equal bit for bit. Kernels with atomic additions round differently each time. A skipped
/// or repeated step changes the first moment by about 1/`steps` of its norm, and half of that is refused. The norm is
/// that of a layer: the gradient of a key bias is 0 apart from rounding errors, and AdamW amplifies these.
///
/// In bf16, the gradient of queries can be rounding errors altogether. So if a difference is too large, `repeat` runs the
/// steps of `first` again, and a tensor may differ by about as much as between these two runs.
///
/// # Errors
/// Returns the error of `repeat`.
pub fn state_difference<E>(
    first: &[Tensor],
    second: &[Tensor],
    steps: usize,
    repeat: impl FnOnce() -> Result<Vec<Tensor>, E>,
) -> Result<Option<String>, E> {
    let limit = 0.5 / steps.max(1) as f64;
    let exceeds = |share: f64, limit: f64| share.is_nan() || share > limit;
    let shares = match layer_shares(first, second) {
        Ok(shares) => shares,
        Err(reason) => return Ok(Some(reason)),
    };
    if !shares.iter().any(|(_, share)| exceeds(*share, limit)) {
        return Ok(None);
    }
    let own = match layer_shares(first, &repeat()?) {
        Ok(own) => own,
        Err(reason) => return Ok(Some(reason)),
    };
    let largest = |own: f64| limit.max(ROUNDING_FACTOR * own);
    let found = shares.iter().zip(&own).find(|((_, share), (_, own))| exceeds(*share, largest(*own)));
    Ok(found.map(|((name, share), _)| format!("{name} differs by {share:.1e} of its layer's norm")))
}

/// Returns the difference of each tensor of two states, as a share of the norm of its layer. Returns an error if a tensor
/// is missing or the steps were counted differently.
fn layer_shares<'a>(first: &'a [Tensor], second: &[Tensor]) -> Result<Vec<(&'a str, f64)>, String> {
    let norm = |values: &mut dyn Iterator<Item = f32>| tolerance::norm(values.map(f64::from));
    let mut shares = Vec::new();
    for layer in first.chunk_by(|a, b| layer_name(&a.name) == layer_name(&b.name)) {
        let layer_norm = norm(&mut layer.iter().flat_map(|tensor| tensor.data.iter().copied()));
        for tensor in layer {
            let other = find(second, &tensor.name).ok_or_else(|| format!("{} is missing", tensor.name))?;
            let is_equal = tensor.data == other.data;
            if tensor.name == "step" && !is_equal {
                return Err(format!("the optimizer counted {} steps, not {}", other.data[0], tensor.data[0]));
            }
            let difference = norm(&mut tensor.data.iter().zip(&other.data).map(|(a, b)| a - b));
            shares.push((&*tensor.name, if is_equal { 0.0 } else { difference / layer_norm }));
        }
    }
    Ok(shares)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    #[test]
    fn only_differences_above_rounding_errors_are_found() {
        let tensor = |name: &str, data: &[f32]| {
            let (name, dims) = (format!("moment1/blocks.0.attention.k.{name}"), vec![data.len()]);
            Tensor { name, dims, data: data.to_vec() }
        };
        let state = |weight: f32, bias: f32| vec![tensor("weight", &[weight; 4]), tensor("bias", &[bias])];
        let read = state(1.0, 1e-8);
        // Runs of a deterministic backend are equal.
        let difference = |second: &[Tensor]| {
            state_difference(&read, second, 8, || Ok::<_, Infallible>(read.clone())).unwrap()
        };
        assert_eq!(difference(&state(1.0, -1e-8)), None);
        // A tenth of the weight's moment: more than half a step of eight.
        assert!(difference(&state(0.9, 1e-8)).unwrap().contains("k.weight differs by 1.0e-1"));
        assert!(difference(&state(1.0, 0.5)).unwrap().contains("k.bias"));
        assert!(difference(&state(1.0, f32::NAN)).is_some());
        assert!(difference(&read[..1]).unwrap().contains("missing"));
        // The weight is noise in every run, and the bias is not.
        let noisy = |second: &[Tensor]| {
            state_difference(&read, second, 8, || Ok::<_, Infallible>(state(0.8, 1e-8))).unwrap()
        };
        assert_eq!(noisy(&state(1.3, 1e-8)), None);
        assert!(noisy(&state(1.5, 1e-8)).unwrap().contains("k.weight"));
        assert!(noisy(&state(1.3, 0.5)).unwrap().contains("k.bias"));
    }
}
