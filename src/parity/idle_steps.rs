//! Cases whose steps leave work out, to verify that the checks refuse them.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::backend::LoadedCase;
use crate::fixture::{Fixture, Tensor};

/// The work that is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdleStep {
    /// Nothing is computed from the fourth step on.
    FromTheFourth,
    /// `time(k)` runs one step less.
    LastOfSeveral,
    /// A step runs when its results are read.
    UntilRead,
    /// The inputs stay those of the first step.
    SetInputs,
    /// Every third update of the optimizer is undone.
    EveryThirdUpdate,
}

impl IdleStep {
    pub const ALL: &[Self] =
        &[Self::FromTheFourth, Self::LastOfSeveral, Self::UntilRead, Self::SetInputs, Self::EveryThirdUpdate];
}

/// A case with this fault.
pub struct IdleCase {
    inner: Box<dyn LoadedCase>,
    fault: IdleStep,
    steps: u64,
    /// Steps that run before the next reading.
    pending: u64,
}

impl IdleCase {
    pub fn new(inner: Box<dyn LoadedCase>, fault: IdleStep) -> Self {
        Self { inner, fault, steps: 0, pending: 0 }
    }

    fn run_pending(&mut self) -> Result<()> {
        (0..std::mem::take(&mut self.pending)).try_for_each(|_| self.inner.step())
    }

    /// Runs a step, and then restores everything but the number of steps.
    fn step_without_update(&mut self) -> Result<()> {
        let mut before = self.inner.checkpoint()?;
        self.inner.step()?;
        if let Some(step) = before.iter_mut().find(|tensor| tensor.name == "step") {
            step.data[0] += 1.0;
        }
        self.inner.restore(&before, 0)
    }
}

impl LoadedCase for IdleCase {
    fn step(&mut self) -> Result<()> {
        self.steps += 1;
        match self.fault {
            IdleStep::FromTheFourth if self.steps > 3 => Ok(()),
            IdleStep::UntilRead => {
                self.pending += 1;
                Ok(())
            }
            IdleStep::EveryThirdUpdate if self.steps.is_multiple_of(3) => self.step_without_update(),
            _ => self.inner.step(),
        }
    }

    fn time(&mut self, steps: u64) -> Result<Duration> {
        let start = Instant::now();
        let left_out = u64::from(self.fault == IdleStep::LastOfSeveral && steps > 1);
        for _ in 0..steps - left_out {
            self.step()?;
        }
        Ok(start.elapsed())
    }

    fn set_inputs(&mut self, fixture: &Fixture) -> Result<()> {
        if self.fault == IdleStep::SetInputs { Ok(()) } else { self.inner.set_inputs(fixture) }
    }

    fn checkpoint(&mut self) -> Result<Vec<Tensor>> {
        self.run_pending()?;
        self.inner.checkpoint()
    }

    fn restore(&mut self, checkpoint: &[Tensor], seed: u64) -> Result<()> {
        self.run_pending()?;
        self.inner.restore(checkpoint, seed)
    }

    fn outputs(&mut self) -> Result<Vec<Tensor>> {
        self.run_pending()?;
        self.inner.outputs()
    }
}
