//! Reading and restoring of the parameters and of the optimizer's state.

use anyhow::Result;
use tch::Tensor;
use transformer_bench::fixture::Tensor as Named;

use crate::extension;
use crate::optimizer::OptimizerState;
use crate::params::ParameterLayout;

/// Names of the moments in [`transformer_bench::backend::LoadedCase::checkpoint`].
const MOMENTS: [&str; 2] = ["moment1", "moment2"];

/// Reads the leaves, and the state of the optimizer if there is one.
pub fn read(
    layout: &ParameterLayout,
    leaves: &[Tensor],
    optimizer: Option<&OptimizerState>,
) -> Result<Vec<Named>> {
    let mut all = layout.read_leaves("param", leaves)?;
    if let Some(state) = optimizer {
        for (name, moments) in MOMENTS.iter().zip(state.moments()) {
            all.extend(layout.read_trained(name, moments)?);
        }
        all.push(Named { name: "step".to_owned(), dims: vec![1], data: vec![state.step_count() as f32] });
    }
    Ok(all)
}

/// Copies the tensors of a checkpoint into the leaves and the state of the optimizer, and seeds dropout.
pub fn restore(
    layout: &ParameterLayout,
    leaves: &[Tensor],
    optimizer: Option<&mut OptimizerState>,
    tensors: &[Named],
    seed: u64,
) -> Result<()> {
    tch::manual_seed(seed as i64);
    extension::catch_panics(|| {
        layout.copy_into_leaves("param", tensors, leaves);
        if let Some(state) = optimizer {
            for (name, moments) in MOMENTS.iter().zip(state.moments()) {
                layout.copy_into_trained(name, tensors, moments);
            }
            if let Some(step) = tensors.iter().find(|tensor| tensor.name == "step") {
                state.set_step_count(step.data[0] as i64);
            }
        }
        Ok(())
    })
}
