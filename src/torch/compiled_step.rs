//! Workloads that run a package of TorchInductor: one call per step, in a CUDA graph on CUDA.

use std::cell::RefCell;

use anyhow::{Context, Result};
use tch::{Device, Tensor};
use transformer_bench::backend::{LoadedCase, result_names};
use transformer_bench::fixture::{AdamW, Fixture, Tensor as Named};
use transformer_bench::suite::Case;

use crate::distributed::{BucketSizes, GradientSync};
use crate::extension::{self, AdamWState, Graph, PackageRunner};
use crate::inductor::{self, Package};
use crate::params::{self, ParameterLayout};

/// A compiled case on a device.
pub struct CompiledStep {
    case: Case,
    device: Device,
    package: PackageRunner,
    /// Arguments of the package: inputs, dropout probabilities, AdamW's scalars, leaves, and both moments.
    arguments: Vec<Tensor>,
    /// Range of the leaves in the arguments.
    leaves: std::ops::Range<usize>,
    layout: ParameterLayout,
    adamw_scalars: Option<AdamWScalars>,
    /// For ranks, the package is the forward and backward pass. The all-reduce and the optimizer follow it.
    after_package: Option<(GradientSync, AdamWState, AdamW)>,
    /// Results and gradients of the last step.
    results: Vec<Tensor>,
    gradients: Vec<Tensor>,
    graph: Option<Graph>,
}

/// AdamW's scalars. Some change in each step, so they are computed on the device, where a CUDA graph can update them.
struct AdamWScalars {
    /// [7], the argument `numbers` of `adamw_` in `inductor/package.py`.
    scalars: Tensor,
    /// [β1ᵗ, β2ᵗ]
    powers: Tensor,
    betas: Tensor,
    /// Factors [lr, 1] and exponents [−1, 1/2] of the last two scalars, lr/(1 − β1ᵗ) and √(1 − β2ᵗ).
    factors: Tensor,
    exponents: Tensor,
}

impl AdamWScalars {
    fn new(s: &AdamW, device: Device) -> Self {
        let load = |values: &[f64]| Tensor::from_slice(values).to_device(device);
        let scalars = [1.0 - s.lr * s.weight_decay, 1.0 - s.beta1, s.beta2, 1.0 - s.beta2, s.eps, 0.0, 0.0];
        Self {
            scalars: Tensor::from_slice(&scalars.map(|v| v as f32)).to_device(device),
            powers: load(&[1.0, 1.0]),
            betas: load(&[s.beta1, s.beta2]),
            factors: load(&[s.lr, 1.0]),
            exponents: load(&[-1.0, 0.5]),
        }
    }

    /// Advances to the next step.
    fn advance(&mut self) {
        self.powers *= &self.betas;
        let corrections: Tensor = 1.0 - &self.powers;
        self.scalars.narrow(0, 5, 2).copy_(&(corrections.pow(&self.exponents) * &self.factors));
    }
}

impl CompiledStep {
    pub fn new(device: Device, fixture: &Fixture) -> Result<Self> {
        let case = fixture.case;
        let compiled_case = inductor::compiled_case(&case);
        let library = Package::new(&compiled_case, fixture.dropout.weights).library()?;
        let package = PackageRunner::load(&library, device)?;
        let kind = crate::kind(case.method.precision);
        let mut arguments = params::load_inputs(fixture, device, kind);
        if case.dropout().any() {
            let rows = fixture.dropout.all().map(|p| [p as f32, (1.0 / (1.0 - p)) as f32]).concat();
            arguments.push(Tensor::from_slice(&rows).view([5, 2]).to_device(device));
        }
        let adamw_scalars =
            compiled_case.workload.optimizes().then(|| AdamWScalars::new(&fixture.adamw, device));
        arguments.extend(adamw_scalars.iter().map(|s| s.scalars.shallow_clone()));
        let layout = ParameterLayout::new(case.shape, true);
        let leaves = layout.load(fixture.parameters(), device, kind);
        let after_package = if case.shape.ranks() > 1 {
            let sync = GradientSync::new(device, &leaves, Some(BucketSizes::SINGLE), fixture.no_sync)?;
            Some((sync, AdamWState::new(&leaves, true), fixture.adamw))
        } else {
            None
        };
        let zeros = || leaves.iter().map(Tensor::zeros_like);
        let moments: Vec<Tensor> = match adamw_scalars {
            Some(_) => zeros().chain(zeros()).collect(),
            None => Vec::new(),
        };
        let range = arguments.len()..arguments.len() + leaves.len();
        arguments.extend(leaves.into_iter().chain(moments));
        let mut step = Self {
            case,
            device,
            package,
            arguments,
            leaves: range,
            layout,
            adamw_scalars,
            after_package,
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

    /// Captures the step as a CUDA graph.
    fn capture(&mut self) -> Result<Graph> {
        let leaves_and_moments = self.arguments[self.leaves.start..].iter();
        let state = leaves_and_moments.chain(self.adamw_scalars.iter().map(|s| &s.powers));
        let state = state.map(Tensor::shallow_clone);
        let state = state.chain(self.after_package.iter().flat_map(|(_, adamw, _)| adamw.tensors()));
        let state = state.collect();
        let this = RefCell::new(self);
        Graph::capture_step(state, || this.borrow_mut().run(), || this.borrow_mut().run())
    }

    fn run(&mut self) -> Result<()> {
        // The tensors of the last step are freed first, as in a training loop.
        self.results.clear();
        self.gradients.clear();
        if let Some(scalars) = &mut self.adamw_scalars {
            scalars.advance();
        }
        let results = result_names(&self.case).len();
        let gradients = if self.case.workload.trains() { self.leaves.len() } else { 0 };
        self.results = self.package.run(&self.arguments, results + gradients)?;
        self.gradients = self.results.split_off(results);
        if let Some((sync, state, adamw)) = &mut self.after_package {
            self.gradients = sync.all_reduce(std::mem::take(&mut self.gradients))?;
            state.step(adamw, &self.arguments[self.leaves.clone()], &self.gradients)?;
        }
        Ok(())
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

    fn outputs(&mut self) -> Result<Vec<Named>> {
        let updates = self.case.workload.optimizes();
        let updated = if updates { &self.arguments[self.leaves.clone()] } else { &[] };
        self.layout.read_outputs(&self.case, &self.results, &self.gradients, updated)
    }
}
