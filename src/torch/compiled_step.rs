//! Workloads that run a package of TorchInductor, then the optimizer, in a CUDA graph on CUDA.

use std::cell::RefCell;
use std::ops::Range;

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};
use transformer_bench::backend::{LoadedCase, result_names};
use transformer_bench::fixture::{AdamW, Fixture, Tensor as Named};
use transformer_bench::suite::Case;

use crate::accumulation::GradientSums;
use crate::checkpoint;
use crate::distributed::{BucketSizes, GradientSync};
use crate::extension::{self, Graph, PackageRunner};
use crate::inductor;
use crate::optimizer::OptimizerState;
use crate::params::{self, ParameterLayout};

/// A compiled case on a device.
pub struct CompiledStep {
    case: Case,
    device: Device,
    /// The forward pass, or the forward and backward pass. The all-reduce and the optimizer follow it.
    package: PackageRunner,
    /// Arguments of the package for each micro-batch: its inputs, dropout probabilities, and leaves.
    arguments: Vec<Vec<Tensor>>,
    /// Range of the leaves in the arguments.
    leaves: Range<usize>,
    /// The trained leaves, which the optimizer updates.
    trained: Vec<Tensor>,
    layout: ParameterLayout,
    gradient_sync: GradientSync,
    adamw: AdamW,
    optimizer: Option<OptimizerState>,
    /// Results and gradients of the last step.
    results: Vec<Tensor>,
    gradients: Vec<Tensor>,
    graph: Option<Graph>,
}

/// Loads the arguments of a package for each micro-batch, and returns them with the range of the leaves. The micro-batches
/// share the leaves.
fn load_arguments(
    fixture: &Fixture,
    device: Device,
    layout: &ParameterLayout,
) -> (Vec<Vec<Tensor>>, Range<usize>) {
    let kind = crate::kind(fixture.case.method.precision);
    let mut arguments = params::load_inputs(fixture, device, kind);
    let mut shared = Vec::new();
    if fixture.case.dropout().any() {
        let rows = fixture.dropout.all().map(|p| [p as f32, (1.0 / (1.0 - p)) as f32]).concat();
        shared.push(Tensor::from_slice(&rows).view([-1, 2]).to_device(device));
    }
    let first = arguments[0].len() + shared.len();
    shared.extend(layout.load(fixture.parameters(), device, kind));
    for all in &mut arguments {
        all.extend(shared.iter().map(Tensor::shallow_clone));
    }
    let leaves = first..arguments[0].len();
    (arguments, leaves)
}

impl CompiledStep {
    pub fn new(device: Device, fixture: &Fixture) -> Result<Self> {
        let case = fixture.case;
        let library = inductor::package_of(fixture).library()?;
        let package = PackageRunner::load(&library, device)?;
        let layout = ParameterLayout::new(case.shape, true);
        let (arguments, leaves) = load_arguments(fixture, device, &layout);
        let trained = layout.trained(&arguments[0][leaves.clone()]);
        let gradient_sync = if case.shape.ranks() > 1 {
            GradientSync::new(device, &trained, Some(BucketSizes::SINGLE), fixture.no_sync)?
        } else {
            GradientSync::Disabled
        };
        let optimizer =
            case.workload.optimizes().then(|| OptimizerState::new(fixture, &layout, &trained, true));
        let mut step = Self {
            case,
            device,
            package,
            arguments,
            leaves,
            trained,
            layout,
            gradient_sync,
            adamw: fixture.adamw,
            optimizer,
            results: Vec::new(),
            gradients: Vec::new(),
            graph: None,
        };
        if matches!(device, Device::Cuda(_)) {
            step.graph = Some(step.capture().context("capturing the compiled step as a CUDA graph")?);
        }
        extension::synchronize(device)?;
        Ok(step)
    }

    fn leaves(&self) -> &[Tensor] {
        &self.arguments[0][self.leaves.clone()]
    }

    /// Captures the step as a CUDA graph.
    fn capture(&mut self) -> Result<Graph> {
        let state = self.trained.iter().map(Tensor::shallow_clone);
        let state = state.chain(self.optimizer.iter().flat_map(OptimizerState::tensors)).collect();
        let this = RefCell::new(self);
        Graph::capture_step(state, || this.borrow_mut().run(), || this.borrow_mut().run())
    }

    fn run(&mut self) -> Result<()> {
        // The tensors of the last step are freed first, as in a training loop.
        self.results.clear();
        self.gradients.clear();
        let gradients = self.run_package()?;
        self.gradients = self.gradient_sync.all_reduce(gradients)?;
        if let Some(state) = &mut self.optimizer {
            state.step(&self.adamw, &self.trained, &self.gradients)?;
        }
        Ok(())
    }

    /// Runs the package for each micro-batch. Stores the results, and returns the gradients: the means over the
    /// micro-batches.
    fn run_package(&mut self) -> Result<Vec<Tensor>> {
        let results = result_names(&self.case).len();
        let gradients = if self.case.workload.trains() { self.trained.len() } else { 0 };
        let mut sums = GradientSums::new(self.trained.first().map_or(Kind::Float, Tensor::kind));
        for arguments in &self.arguments {
            let mut own = self.package.run(arguments, results + gradients)?;
            sums.add(own.split_off(results), false)?;
            if self.results.is_empty() {
                self.results = own;
            } else {
                extension::foreach_add(&self.results, &own)?;
            }
        }
        let gradients = sums.into_gradients();
        if self.arguments.len() > 1 {
            let share = 1.0 / self.arguments.len() as f64;
            extension::foreach_mul(&gradients, share)?;
            extension::foreach_mul(&self.results, share)?;
        }
        Ok(gradients)
    }
}

impl LoadedCase for CompiledStep {
    fn step(&mut self) -> Result<()> {
        match &self.graph {
            Some(graph) => graph.replay()?,
            None => extension::catch_panics(|| self.run())?,
        }
        extension::synchronize(self.device)
    }

    fn set_inputs(&mut self, fixture: &Fixture) -> Result<()> {
        extension::catch_panics(|| {
            params::copy_inputs(fixture, &self.arguments);
            Ok(())
        })
    }

    fn checkpoint(&mut self) -> Result<Vec<Named>> {
        checkpoint::read(&self.layout, self.leaves(), self.optimizer.as_ref())
    }

    fn restore(&mut self, tensors: &[Named], seed: u64) -> Result<()> {
        let leaves = &self.arguments[0][self.leaves.clone()];
        checkpoint::restore(&self.layout, leaves, self.optimizer.as_mut(), tensors, seed)
    }

    fn outputs(&mut self) -> Result<Vec<Named>> {
        let updated = if self.optimizer.is_some() { self.leaves() } else { &[] };
        self.layout.read_outputs(&self.case, &self.results, &self.gradients, updated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// MPS has no f64, and a copy of an f64 tensor to it fails.
    #[test]
    fn no_tensor_of_a_step_is_f64() {
        for shape in ["indicator-tiny-b2", "gpt2-tiny-b2-t16"] {
            for precision in ["f32", "bf16", "mixed"] {
                let case = format!("train-step/torch-mps/{precision}-compile/{shape}").parse().unwrap();
                let fixture = Fixture::new(case);
                let layout = ParameterLayout::new(case.shape, true);
                let (arguments, leaves) = load_arguments(&fixture, Device::Cpu, &layout);
                let mut tensors: Vec<Tensor> = arguments.into_iter().flatten().collect();
                assert_eq!(leaves.len(), layout.leaf_names().len());
                let state = OptimizerState::new(&fixture, &layout, &layout.trained(&tensors[leaves]), true);
                tensors.extend(state.tensors());
                for tensor in tensors {
                    let known = [Kind::Float, Kind::BFloat16, Kind::Int64];
                    assert!(known.contains(&tensor.kind()), "{case}: {tensor:?}");
                }
            }
        }
    }
}
