//! The workloads as eager steps, or as steps that a CUDA graph replays.

use std::cell::RefCell;

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};
use transformer_bench::backend::LoadedCase;
use transformer_bench::fixture::{AdamW, Fixture, Tensor as Named};
use transformer_bench::model::ModelId;
use transformer_bench::model::parameters::Parameters;
use transformer_bench::suite::{Case, Precision, Shape, Workload};

use crate::accumulation::GradientSums;
use crate::autograd;
use crate::checkpoint;
use crate::distributed::{self, BucketSizes, GradientSync};
use crate::extension::{self, Graph};
use crate::leaves::Leaves;
use crate::network::{self, Layers};
use crate::optimizer::OptimizerState;
use crate::params;
use crate::segments::SegmentedPass;

/// A case on a device.
pub struct Step {
    case: Case,
    device: Device,
    layers: Layers,
    parameters: Parameters<Tensor>,
    /// Inputs of each micro-batch. Only a training step has more than one.
    micro_batches: Vec<Vec<Tensor>>,
    leaves: Leaves,
    adamw: AdamW,
    optimizer: Option<OptimizerState>,
    fixed_gradients: Vec<Tensor>,
    /// Results of the last step, named by [`transformer_bench::backend::result_names`].
    results: Vec<Tensor>,
    /// Gradients of the trained leaves in the last step.
    gradients: Vec<Tensor>,
    gradient_sync: GradientSync,
    /// The captured step, if the variant and the device have one.
    graph: Option<Graph>,
}

fn layers(fixture: &Fixture, device: Device) -> Layers {
    let Case { method, shape, .. } = fixture.case;
    let model = shape.model().map_or(ModelId::indicator(), |(model, _)| model);
    Layers {
        model,
        caches: network::attention_caches(&model, device, crate::compute_kind(method.precision)),
        fused: method.variant.uses_sdpa(),
        dropout: fixture.dropout,
    }
}

impl Step {
    pub fn new(device: Device, fixture: &Fixture) -> Result<Self> {
        let case = fixture.case;
        let (workload, variant) = (case.workload, case.method.variant);
        let kind = crate::kind(case.method.precision);
        let trains = workload.trains();
        let captured = variant.captures_full_step() && matches!(device, Device::Cuda(_));
        let micro_batches = params::load_inputs(fixture, device, kind);
        let layers = layers(fixture, device);

        let (leaves, parameters) = Leaves::load(fixture, device, layers.fused);
        let fused = variant.uses_fused_adamw();
        let optimizer = workload
            .optimizes()
            .then(|| OptimizerState::new(fixture, &leaves.layout, &leaves.trained, fused));
        let fixed_gradients = match workload {
            Workload::OptimizerStep => leaves.load_gradients(fixture.gradients(), device),
            _ => Vec::new(),
        };
        let mut step = Self {
            case,
            device,
            layers,
            parameters,
            micro_batches,
            leaves,
            adamw: fixture.adamw,
            optimizer,
            fixed_gradients,
            results: Vec::new(),
            gradients: Vec::new(),
            gradient_sync: GradientSync::Disabled,
            graph: None,
        };
        if case.shape.ranks() > 1 {
            let leaves = &step.leaves.differentiated;
            let sizes = if captured { BucketSizes::for_graph(leaves) } else { BucketSizes::DDP };
            let sizes = (variant.overlaps_communication() && trains).then_some(sizes);
            step.gradient_sync = GradientSync::new(device, leaves, sizes, fixture.no_sync)?;
        }
        match workload {
            Workload::AllReduce => step.results = vec![step.inputs()[0].copy()],
            // The destination is allocated before the timing, as a caching allocator would.
            Workload::CopyPeak => step.results = vec![step.inputs()[0].empty_like()],
            Workload::AttentionGrad | Workload::FeedForwardGrad => {
                let input = &mut step.micro_batches[0][0];
                *input = input.set_requires_grad(true);
            }
            _ => {}
        }
        if captured {
            step.graph = Some(step.capture().context("capturing the step as a CUDA graph")?);
        }
        extension::synchronize(device)?;
        Ok(step)
    }

    /// Captures the step as a CUDA graph.
    fn capture(&mut self) -> Result<Graph> {
        let state = self.leaves.trained.iter().map(Tensor::detach);
        let state = state.chain(self.optimizer.iter().flat_map(OptimizerState::tensors)).collect();
        let this = RefCell::new(self);
        Graph::capture_step(
            state,
            || this.borrow_mut().run(),
            || {
                let mut this = this.borrow_mut();
                if let Some(state) = &mut this.optimizer {
                    state.reset_host_count();
                }
                this.run_workload()?;
                if this.captures_optimizer() { this.run_optimizer() } else { Ok(()) }
            },
        )
    }

    /// Returns true if the graph includes the optimizer. The eager optimizer counts its steps on the host, so a graph
    /// would repeat the first step. It runs after the replay instead.
    fn captures_optimizer(&self) -> bool {
        self.case.method.variant.uses_fused_adamw()
    }

    fn is_mixed(&self) -> bool {
        self.case.method.precision == Precision::Mixed
    }

    fn autocasts(&self) -> bool {
        self.case.method.precision == Precision::Amp
    }

    /// Returns the inputs of the first micro-batch, which are all inputs unless a training step has several.
    fn inputs(&self) -> &[Tensor] {
        &self.micro_batches[0]
    }

    /// Runs the forward pass, under autocast in precision `amp`. Returns the outputs.
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        extension::autocast(self.device, self.autocasts(), || self.forward_from(&self.cast_inputs(inputs)))
    }

    /// Returns inputs in the type of the computation.
    fn cast_inputs(&self, inputs: &[Tensor]) -> Vec<Tensor> {
        let cast = |(i, input): (usize, &Tensor)| {
            // The third input belongs to the loss and keeps its type.
            let casts = self.is_mixed() && i < 2 && input.kind() == Kind::Float;
            if casts { input.to_kind(Kind::BFloat16) } else { input.shallow_clone() }
        };
        inputs.iter().enumerate().map(cast).collect()
    }

    fn forward_from(&self, inputs: &[Tensor]) -> Vec<Tensor> {
        match (&self.parameters, self.case.shape) {
            (Parameters::Model(network), _) => self.layers.model(inputs, network),
            (Parameters::Attention(attention), _) => vec![self.layers.attention(&inputs[0], attention, 0)],
            (Parameters::FeedForward(block), _) => vec![self.layers.feed_forward(&inputs[0], block)],
            (Parameters::None, Shape::Square { chain, .. }) => {
                let first = inputs[0].matmul(&inputs[1]);
                vec![(1..chain).fold(first, |product, _| inputs[0].matmul(&product))]
            }
            (Parameters::None, _) => unreachable!("a copy has no forward pass"),
        }
    }

    fn copy_fixed_gradients(&self, fixture: &Fixture) {
        let gradients = self.leaves.load_gradients(fixture.gradients(), self.device);
        self.fixed_gradients.iter().zip(&gradients).for_each(|(to, from)| to.shallow_clone().copy_(from));
    }

    /// Runs a step.
    fn run(&mut self) -> Result<()> {
        self.run_workload()?;
        self.run_optimizer()
    }

    /// Runs a step without its optimizer.
    fn run_workload(&mut self) -> Result<()> {
        // The tensors of the last step are freed first, as in a training loop. Two workloads reuse their result.
        self.gradients.clear();
        if !matches!(self.case.workload, Workload::CopyPeak | Workload::AllReduce) {
            self.results.clear();
        }
        self.leaves.update_network(self.case.shape, &mut self.parameters)?;
        match self.case.workload {
            Workload::CopyPeak => {
                let _ = self.inputs()[0].neg_out(&self.results[0]);
            }
            Workload::AllReduce => distributed::all_reduce(&self.results[0], 1)?,
            Workload::Forward | Workload::Attention | Workload::FeedForward | Workload::MatmulPeak => {
                self.results = tch::no_grad(|| self.forward(self.inputs()))?;
            }
            Workload::AttentionGrad | Workload::FeedForwardGrad => {
                let out = self.forward(self.inputs())?.remove(0);
                let upstream = self.inputs()[1].to_kind(out.kind());
                let inputs = self.inputs()[..1].iter().chain(&self.leaves.differentiated);
                let inputs: Vec<Tensor> = inputs.map(Tensor::shallow_clone).collect();
                self.results = autograd::grad(&out, Some(&upstream), &inputs)?;
                self.gradients = self.results.split_off(1);
            }
            Workload::ForwardBackward | Workload::TrainStep => {
                let (loss, gradients) = self.loss_and_gradients()?;
                self.gradients = self.gradient_sync.finish_backward(gradients)?;
                self.results = vec![loss];
            }
            Workload::OptimizerStep => {}
        }
        Ok(())
    }

    /// Returns the loss and its gradients, summed over the micro-batches. The ranks communicate in the last backward pass
    /// only.
    fn loss_and_gradients(&self) -> Result<(Tensor, Vec<Tensor>)> {
        let count = self.micro_batches.len();
        let mut sums = GradientSums::new(self.leaves.trained_kind());
        let mut total: Option<Tensor> = None;
        for (index, inputs) in self.micro_batches.iter().enumerate() {
            let is_last = index + 1 == count;
            self.gradient_sync.start_backward(sums.so_far(), is_last)?;
            let (loss, gradients) = self.micro_batch_gradients(inputs, count)?;
            sums.add(gradients, is_last && self.gradient_sync.adds_sums())?;
            total = Some(total.map_or(loss.shallow_clone(), |total| total + loss));
        }
        Ok((total.expect("at least one micro-batch"), sums.into_gradients()))
    }

    /// Returns the loss of one of `count` micro-batches and its gradients. The mean of the batch is the sum of them.
    fn micro_batch_gradients(&self, inputs: &[Tensor], count: usize) -> Result<(Tensor, Vec<Tensor>)> {
        let (leaves, variant) = (&self.leaves.differentiated, self.case.method.variant);
        if let (Parameters::Model(network), true) = (&self.parameters, variant.reduces_memory()) {
            let (layers, device) = (&self.layers, self.device);
            let pass = SegmentedPass { layers, network, device, variant, autocast: self.autocasts() };
            return pass.loss_and_gradients(&self.cast_inputs(inputs), inputs, 1.0 / count as f64, leaves);
        }
        let mean = network::loss(&self.layers.model, &self.forward(inputs)?, inputs);
        let loss = if count > 1 { mean / count as f64 } else { mean };
        let gradients = autograd::grad(&loss, None, leaves)?;
        Ok((loss.detach(), gradients))
    }

    /// Runs the optimizer, if the workload has one.
    fn run_optimizer(&mut self) -> Result<()> {
        let Some(state) = &mut self.optimizer else { return Ok(()) };
        let gradients = match self.case.workload {
            Workload::OptimizerStep => &self.fixed_gradients,
            _ => &self.gradients,
        };
        state.step(&self.adamw, &self.leaves.trained, gradients)
    }
}

impl LoadedCase for Step {
    fn step(&mut self) -> Result<()> {
        match &self.graph {
            Some(graph) => {
                graph.replay()?;
                if !self.captures_optimizer() {
                    self.run_optimizer()?;
                }
            }
            None => extension::catch_panics(|| self.run())?,
        }
        extension::synchronize(self.device)
    }

    /// Runs all-reduces without waiting between them, as nccl-tests does.
    fn run_pipelined(&mut self, steps: u64) -> Result<bool> {
        if self.case.workload != Workload::AllReduce {
            return Ok(false);
        }
        extension::catch_panics(|| distributed::all_reduce(&self.results[0], steps))?;
        extension::synchronize(self.device)?;
        Ok(true)
    }

    fn set_inputs(&mut self, fixture: &Fixture) -> Result<()> {
        extension::catch_panics(|| {
            match self.case.workload {
                Workload::OptimizerStep => self.copy_fixed_gradients(fixture),
                _ => params::copy_inputs(fixture, &self.micro_batches),
            }
            if self.case.workload == Workload::AllReduce {
                // An all-reduce works in place.
                self.results[0].copy_(&self.micro_batches[0][0]);
            }
            Ok(())
        })
    }

    fn checkpoint(&mut self) -> Result<Vec<Named>> {
        checkpoint::read(&self.leaves.layout, &self.leaves.stored, self.optimizer.as_ref())
    }

    fn restore(&mut self, tensors: &[Named], seed: u64) -> Result<()> {
        checkpoint::restore(&self.leaves.layout, &self.leaves.stored, self.optimizer.as_mut(), tensors, seed)
    }

    fn outputs(&mut self) -> Result<Vec<Named>> {
        let updated: &[Tensor] = if self.optimizer.is_some() { &self.leaves.stored } else { &[] };
        self.leaves.layout.read_outputs(&self.case, &self.results, &self.gradients, updated)
    }
}
