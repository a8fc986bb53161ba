//! Faults of an optimizer: the step of some parameters is replaced by a wrong one of the reference.

use anyhow::Result;

use crate::backend::LoadedCase;
use crate::fixture::{Fixture, Muon, Tensor};
use crate::model::parameters::ParameterSpec;
use crate::parity::find;
use crate::reference::muon::{descend, divisor, iterate, momentum, orthogonalize};
use crate::reference::{Format, Matrix, Rounding};

/// The values of a parameter in a step.
pub struct Values<'a> {
    /// Parameter and first moment before the step.
    state: [&'a [f32]; 2],
    gradient: &'a [f32],
    dims: [usize; 2],
}

/// Returns a parameter and its first moment after a wrong step.
pub type WrongStep = fn(&Muon, &Values<'_>, &Rounding) -> [Vec<f32>; 2];

/// A wrong step, and the parameters that have it.
#[derive(Clone, Copy)]
pub struct WrongUpdate {
    pub applies: fn(&ParameterSpec) -> bool,
    pub step: WrongStep,
}

impl WrongUpdate {
    /// Returns a wrong step of the matrices of the blocks.
    pub const fn of_matrices(step: WrongStep) -> Self {
        Self { applies: ParameterSpec::is_block_matrix, step }
    }
}

/// Returns the step with wrong functions for the direction and for the learning rate of a matrix.
fn step_with(
    options: &Muon,
    values: &Values<'_>,
    rounding: &Rounding,
    orthogonalized: impl FnOnce(Matrix<f32>) -> Matrix<f32>,
    rate: f64,
) -> [Vec<f32>; 2] {
    let [rows, columns] = values.dims;
    let [parameter, moment] = values.state;
    let [moment, direction] = momentum(options, moment, values.gradient, rounding);
    let direction = orthogonalized(Matrix::new(rows, columns, direction));
    [descend(options, parameter, &direction.data, rate, rounding), moment]
}

/// Divides a matrix by a number, and runs the iterations without a transpose.
fn divide_and_iterate(options: &Muon, x: &Matrix<f32>, by: f32, rounding: &Rounding) -> Matrix<f32> {
    iterate(options, x.map(1, |v| rounding.product.round(v / by)), rounding)
}

/// Iterates on a tall matrix instead of its transpose.
pub fn no_transpose(options: &Muon, values: &Values<'_>, rounding: &Rounding) -> [Vec<f32>; 2] {
    let direction = |x: Matrix<f32>| {
        let x = x.map(1, |v| rounding.product.round(v));
        divide_and_iterate(options, &x, divisor(options, &x), rounding)
    };
    step_with(options, values, rounding, direction, options.rate(values.dims[0], values.dims[1]))
}

/// Adds the squares of the norm up in bf16.
pub fn norm_in_bf16(options: &Muon, values: &Values<'_>, rounding: &Rounding) -> [Vec<f32>; 2] {
    let direction = |x: Matrix<f32>| {
        let bf16 = |v: f32| Format::Bf16.round(v);
        let x = x.map(1, |v| rounding.product.round(v));
        let squares = x.data.iter().fold(0.0, |sum, v| bf16(sum + bf16(v * v)));
        divide_and_iterate(options, &x, bf16(squares.sqrt()), rounding)
    };
    step_with(options, values, rounding, direction, options.rate(values.dims[0], values.dims[1]))
}

/// Divides by a norm that underflowed to zero.
pub fn norm_of_zero(options: &Muon, values: &Values<'_>, rounding: &Rounding) -> [Vec<f32>; 2] {
    let direction = |x: Matrix<f32>| divide_and_iterate(options, &x, 0.0, rounding);
    step_with(options, values, rounding, direction, options.lr)
}

/// Leaves out the larger learning rate of tall matrices.
pub fn no_scale(options: &Muon, values: &Values<'_>, rounding: &Rounding) -> [Vec<f32>; 2] {
    step_with(options, values, rounding, |x| orthogonalize(options, x, rounding), options.lr)
}

/// Orthogonalizes the moment instead of Nesterov's direction.
pub fn no_nesterov(options: &Muon, values: &Values<'_>, rounding: &Rounding) -> [Vec<f32>; 2] {
    let [rows, columns] = values.dims;
    let [parameter, moment] = values.state;
    let [moment, _] = momentum(options, moment, values.gradient, rounding);
    let direction = orthogonalize(options, Matrix::new(rows, columns, moment.clone()), rounding);
    let rate = options.rate(rows, columns);
    [descend(options, parameter, &direction.data, rate, rounding), moment]
}

/// Orthogonalizes the gradient, and applies the momentum to the result.
pub fn late_momentum(options: &Muon, values: &Values<'_>, rounding: &Rounding) -> [Vec<f32>; 2] {
    let [rows, columns] = values.dims;
    let [parameter, moment] = values.state;
    let direction = orthogonalize(options, Matrix::new(rows, columns, values.gradient.to_vec()), rounding);
    let [moment, direction] = momentum(options, moment, &direction.data, rounding);
    [descend(options, parameter, &direction, options.rate(rows, columns), rounding), moment]
}

/// Runs a correct step of Muon. It is wrong for a parameter that is not a matrix of a block.
pub fn muon_step(options: &Muon, values: &Values<'_>, rounding: &Rounding) -> [Vec<f32>; 2] {
    let rate = options.rate(values.dims[0], values.dims[1]);
    step_with(options, values, rounding, |x| orthogonalize(options, x, rounding), rate)
}

/// Leaves a parameter and its moment unchanged.
pub fn skipped(_: &Muon, values: &Values<'_>, _: &Rounding) -> [Vec<f32>; 2] {
    values.state.map(<[f32]>::to_vec)
}

/// A loaded case whose optimizer has a fault.
pub struct WrongOptimizer<'a> {
    pub inner: Box<dyn LoadedCase>,
    pub fixture: &'a Fixture,
    pub update: WrongUpdate,
    /// The parameters and moments after the last step.
    pub state: Vec<Tensor>,
}

impl WrongOptimizer<'_> {
    /// Replaces the result of a step in its checkpoint.
    fn replace(&self, before: &[Tensor], results: &[Tensor], after: &mut [Tensor]) {
        let rounding = Rounding::for_muon(self.fixture.case.method.precision);
        for spec in
            self.fixture.case.shape.parameter_specs().iter().filter(|spec| (self.update.applies)(spec))
        {
            let find = |all, prefix: &str| {
                let tensor: Option<&Tensor> = find(all, &format!("{prefix}/{}", spec.name));
                &tensor.expect("a tensor of the parameter").data[..]
            };
            let dims = [spec.dims[0], spec.dims.get(1).copied().unwrap_or(1)];
            let state = [find(before, "param"), find(before, "moment1")];
            let values = Values { state, gradient: find(results, "grad"), dims };
            let new = (self.update.step)(&self.fixture.muon, &values, &rounding);
            for (prefix, data) in ["param", "moment1"].into_iter().zip(new) {
                let name = format!("{prefix}/{}", spec.name);
                let tensor = after.iter_mut().find(|tensor| tensor.name == name);
                tensor.expect("a tensor of the parameter").data = data;
            }
        }
    }
}

impl LoadedCase for WrongOptimizer<'_> {
    fn step(&mut self) -> Result<()> {
        let before = self.inner.checkpoint()?;
        self.inner.step()?;
        let mut after = self.inner.checkpoint()?;
        let results = self.inner.outputs()?;
        self.replace(&before, &results, &mut after);
        self.inner.restore(&after, 0)?;
        self.state = after;
        Ok(())
    }

    fn set_inputs(&mut self, fixture: &Fixture) -> Result<()> {
        self.inner.set_inputs(fixture)
    }

    fn checkpoint(&mut self) -> Result<Vec<Tensor>> {
        self.inner.checkpoint()
    }

    fn restore(&mut self, checkpoint: &[Tensor], seed: u64) -> Result<()> {
        self.inner.restore(checkpoint, seed)
    }

    fn outputs(&mut self) -> Result<Vec<Tensor>> {
        let mut all = self.inner.outputs()?;
        for tensor in &mut all {
            if let Some(new) = find(&self.state, &tensor.name) {
                tensor.data.clone_from(&new.data);
            }
        }
        Ok(all)
    }
}
