//! The workloads as TorchInductor compiles them: one call a step, replayed as a CUDA graph on CUDA.

use anyhow::{Context, Result};
use tch::{Device, Tensor};
use transformer_bench::backend::LoadedCase;
use transformer_bench::model::fixture::{AdamW, Fixture, Tensor as Named};
use transformer_bench::suite::{Case, Workload};

use crate::distributed::{Exchange, Sizes};
use crate::extension::{self, Graph, Moments, Package};
use crate::params::{self, Places};
use crate::{packages, step};

/// Whether a workload is compiled: what a user of torch.compile would give it.
pub fn offers(workload: Workload) -> bool {
    workload.trains() || workload == Workload::Forward
}

/// A case on a device.
pub struct Compiled {
    case: Case,
    device: Device,
    package: Package,
    /// As the package takes them: inputs, dropout's chances, AdamW's numbers, leaves, moments.
    inputs: Vec<Tensor>,
    /// Where the leaves are among them.
    leaves: std::ops::Range<usize>,
    places: Places,
    optimizer: Option<Numbers>,
    /// Of ranks: what stands between the passes, which are compiled, and the optimizer.
    shared: Option<(Exchange, Moments, AdamW)>,
    /// What the last step gave: results, then gradients.
    made: Vec<Tensor>,
    graph: Option<Graph>,
}

/// What AdamW needs to know of a step, which changes from step to step: on the device, so that a
/// recording counts too.
struct Numbers {
    /// [7], as `adamw_` of `inductor/package.py` takes them.
    numbers: Tensor,
    /// βᵗ of both, and β.
    powers: Tensor,
    betas: Tensor,
    /// lr and −1, 1 and 1/2: the rate is lr/(1 − β1ᵗ), the root √(1 − β2ᵗ).
    factors: Tensor,
    exponents: Tensor,
}

impl Numbers {
    fn new(s: &AdamW, device: Device) -> Self {
        let on = |values: &[f64]| Tensor::from_slice(values).to_device(device);
        let fixed = [1.0 - s.lr * s.weight_decay, 1.0 - s.beta1, s.beta2, 1.0 - s.beta2, s.eps, 0.0, 0.0];
        Self {
            numbers: Tensor::from_slice(&fixed.map(|v| v as f32)).to_device(device),
            powers: on(&[1.0, 1.0]),
            betas: on(&[s.beta1, s.beta2]),
            factors: on(&[s.lr, 1.0]),
            exponents: on(&[-1.0, 0.5]),
        }
    }

    /// Counts a step.
    fn next(&mut self) {
        self.powers *= &self.betas;
        let corrections: Tensor = 1.0 - &self.powers;
        self.numbers.narrow(0, 5, 2).copy_(&(corrections.pow(&self.exponents) * &self.factors));
    }
}

impl Compiled {
    pub fn new(device: Device, fixture: &Fixture) -> Result<Self> {
        let case = fixture.case;
        let own = packages::compiled(&case);
        let library = packages::Package::new(&own, fixture.dropout.weights).library()?;
        let package = Package::load(&library, device)?;
        let kind = crate::kind(case.method.precision);
        let mut inputs = step::inputs(fixture, device, kind);
        if case.dropout().any() {
            let d = &fixture.dropout;
            let rows = d.all().map(|p| [p as f32, (1.0 / (1.0 - p)) as f32]).concat();
            inputs.push(Tensor::from_slice(&rows).view([5, 2]).to_device(device));
        }
        let optimizer = own.workload.optimizes().then(|| Numbers::new(&fixture.adamw, device));
        inputs.extend(optimizer.iter().map(|o| o.numbers.shallow_clone()));
        let (leaves, places) = params::pack(fixture.parameters(), device, kind, true);
        let start = inputs.len();
        let shared = if case.shape.ranks() > 1 {
            let exchange = Exchange::new(device, &leaves, Some(Sizes::WHOLE), fixture.silent)?;
            Some((exchange, Moments::new(&leaves, true), fixture.adamw))
        } else {
            None
        };
        let passes = if optimizer.is_some() { 2 } else { 0 };
        let moments: Vec<Tensor> =
            (0..passes).flat_map(|_| leaves.iter().map(Tensor::zeros_like).collect::<Vec<_>>()).collect();
        let range = start..start + leaves.len();
        inputs.extend(leaves);
        inputs.extend(moments);
        let mut compiled = Self {
            case,
            device,
            package,
            inputs,
            leaves: range,
            places,
            optimizer,
            shared,
            made: Vec::new(),
            graph: None,
        };
        if matches!(device, Device::Cuda(_)) {
            compiled.graph = Some(compiled.record().context("recording the compiled step as a CUDA graph")?);
        }
        extension::synchronize(device)?;
        Ok(compiled)
    }

    /// Records the step.
    fn record(&mut self) -> Result<Graph> {
        let moments = self.shared.iter().flat_map(|(_, moments, _)| moments.state());
        let state = self.inputs[self.leaves.start..].iter();
        let state = state.chain(self.optimizer.iter().map(|o| &o.powers)).map(Tensor::shallow_clone);
        let state = state.chain(moments).collect();
        let this = std::cell::RefCell::new(self);
        Graph::of_step(state, || this.borrow_mut().once(), || this.borrow_mut().once())
    }

    fn once(&mut self) -> Result<()> {
        // What the last step left is freed first, as a training loop's variables are.
        self.made.clear();
        if let Some(optimizer) = &mut self.optimizer {
            optimizer.next();
        }
        let results = self.names().len();
        self.made = self.package.run(&self.inputs, results + self.gradients())?;
        if let Some((exchange, moments, adamw)) = &mut self.shared {
            let means = exchange.all_at_once(self.made.split_off(results))?;
            moments.apply(adamw, &self.inputs[self.leaves.clone()], &means)?;
            self.made.extend(means);
        }
        Ok(())
    }

    /// The names of what comes before the gradients.
    fn names(&self) -> &'static [&'static str] {
        match (self.case.workload, self.case.shape.model()) {
            (Workload::ForwardBackward | Workload::TrainStep, _) => &["loss"],
            (Workload::Forward, Some((model, _))) => model.output_names(),
            _ => &["grad/x"],
        }
    }

    fn gradients(&self) -> usize {
        if self.case.workload.trains() { self.leaves.len() } else { 0 }
    }
}

impl LoadedCase for Compiled {
    fn step(&mut self) -> Result<()> {
        match &self.graph {
            Some(graph) => graph.replay()?,
            None => extension::caught(|| self.once())?,
        }
        extension::synchronize(self.device)
    }

    fn outputs(&mut self) -> Result<Vec<Named>> {
        let names = self.names();
        let mut all = Vec::new();
        for (name, tensor) in names.iter().zip(&self.made) {
            all.push(params::read((*name).to_owned(), &params::dims(tensor), tensor)?);
        }
        if self.gradients() > 0 {
            all.extend(self.places.read("grad", &self.made[names.len()..])?);
        }
        if self.optimizer.is_some() || self.shared.is_some() {
            all.extend(self.places.read("param", &self.inputs[self.leaves.clone()])?);
        }
        Ok(all)
    }
}
