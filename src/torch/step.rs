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
use crate::checkpoint;
use crate::distributed::{self, BucketSizes, GradientSync};
use crate::extension::{self, AdamWState, Graph};
use crate::network::{self, Layers};
use crate::params::{self, ParameterLayout};

/// A case on a device.
pub struct Step {
    case: Case,
    device: Device,
    layers: Layers,
    parameters: Parameters<Tensor>,
    /// Inputs of each micro-batch. Only a training step has more than one.
    micro_batches: Vec<Vec<Tensor>>,
    /// Leaf tensors of the parameters, which the optimizer updates.
    leaves: Vec<Tensor>,
    /// For precision `mixed` in a variant that captures the full step: bf16 copies of the leaves. One call per step
    /// updates them, and gradients are with respect to them. An eager step casts each leaf under autograd instead.
    bf16_leaves: Vec<Tensor>,
    layout: ParameterLayout,
    adamw: AdamW,
    adamw_state: Option<AdamWState>,
    fixed_gradients: Vec<Tensor>,
    /// Results of the last step, named by [`transformer_bench::backend::result_names`].
    results: Vec<Tensor>,
    /// Gradients of the leaves in the last step.
    gradients: Vec<Tensor>,
    gradient_sync: GradientSync,
    /// The captured step, if the variant and the device have one.
    graph: Option<Graph>,
}

fn layers(fixture: &Fixture, device: Device) -> Layers {
    let Case { method, shape, .. } = fixture.case;
    let mixed = method.precision == Precision::Mixed;
    let kind = if mixed { Kind::BFloat16 } else { crate::kind(method.precision) };
    let model = shape.model().map_or(ModelId::indicator(), |(model, _)| model);
    Layers {
        model,
        caches: network::attention_caches(&model, device, kind),
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

        let layout = ParameterLayout::new(case.shape, layers.fused);
        let leaves = layout.load(fixture.parameters(), device, kind).into_iter();
        let leaves: Vec<Tensor> = leaves.map(|leaf| leaf.set_requires_grad(trains)).collect();
        let copied = case.method.precision == Precision::Mixed && variant.captures_full_step();
        let copy = |leaf: &Tensor| leaf.detach().to_kind(Kind::BFloat16).set_requires_grad(trains);
        let bf16_leaves: Vec<Tensor> = leaves.iter().filter(|_| copied).map(copy).collect();
        let parameters = layout.network_parameters(case.shape, if copied { &bf16_leaves } else { &leaves });
        let adamw_state = workload.optimizes().then(|| AdamWState::new(&leaves, variant.uses_fused_adamw()));
        let fixed_gradients = match workload {
            Workload::OptimizerStep => layout.load(fixture.gradients(), device, kind),
            _ => Vec::new(),
        };
        let mut step = Self {
            case,
            device,
            layers,
            parameters,
            micro_batches,
            leaves,
            bf16_leaves,
            layout,
            adamw: fixture.adamw,
            adamw_state,
            fixed_gradients,
            results: Vec::new(),
            gradients: Vec::new(),
            gradient_sync: GradientSync::Disabled,
            graph: None,
        };
        if case.shape.ranks() > 1 {
            let leaves = step.compute_leaves();
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
        let state = self.leaves.iter().map(Tensor::detach);
        let state = state.chain(self.adamw_state.iter().flat_map(AdamWState::tensors)).collect();
        let this = RefCell::new(self);
        Graph::capture_step(
            state,
            || this.borrow_mut().run(),
            || {
                let mut this = this.borrow_mut();
                if let Some(state) = &mut this.adamw_state {
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

    /// Returns the leaves that the network computes with, and that gradients are with respect to.
    fn compute_leaves(&self) -> &[Tensor] {
        if self.bf16_leaves.is_empty() { &self.leaves } else { &self.bf16_leaves }
    }

    /// Returns the inputs of the first micro-batch, which are all inputs unless a training step has several.
    fn inputs(&self) -> &[Tensor] {
        &self.micro_batches[0]
    }

    /// Runs the forward pass, under autocast in precision `amp`. Returns the outputs.
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        extension::autocast(self.device, self.case.method.precision == Precision::Amp, || {
            if !self.is_mixed() {
                return self.forward_from(inputs);
            }
            // The third input belongs to the loss and keeps its type.
            let cast = |(i, input): (usize, &Tensor)| {
                let casts = i < 2 && input.kind() == Kind::Float;
                if casts { input.to_kind(Kind::BFloat16) } else { input.shallow_clone() }
            };
            self.forward_from(&inputs.iter().enumerate().map(cast).collect::<Vec<_>>())
        })
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
        let kind = crate::kind(self.case.method.precision);
        let gradients = self.layout.load(fixture.gradients(), self.device, kind);
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
        if !self.bf16_leaves.is_empty() {
            extension::foreach_copy(&self.bf16_leaves, &self.leaves)?;
        } else if self.is_mixed() {
            let casts: Vec<Tensor> = self.leaves.iter().map(|l| l.to_kind(Kind::BFloat16)).collect();
            self.parameters = self.layout.network_parameters(self.case.shape, &casts);
        }
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
                let inputs = self.inputs()[..1].iter().chain(self.compute_leaves());
                let inputs: Vec<Tensor> = inputs.map(Tensor::shallow_clone).collect();
                self.results = extension::grad(&out, Some(&upstream), &inputs)?;
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
        let mut sums = GradientSums::new(crate::kind(self.case.method.precision));
        let mut total: Option<Tensor> = None;
        for (index, inputs) in self.micro_batches.iter().enumerate() {
            let is_last = index + 1 == count;
            self.gradient_sync.start_backward(sums.so_far(), is_last)?;
            let mean = network::loss(&self.layers.model, &self.forward(inputs)?, inputs);
            // The mean of the batch is the sum of the shares of its micro-batches.
            let loss = if count > 1 { mean / count as f64 } else { mean };
            let gradients = extension::grad(&loss, None, self.compute_leaves())?;
            sums.add(gradients, is_last && self.gradient_sync.adds_sums())?;
            total = Some(total.map_or(loss.detach(), |total| total + loss.detach()));
        }
        Ok((total.expect("at least one micro-batch"), sums.into_gradients()))
    }

    /// Runs the optimizer, if the workload has one.
    fn run_optimizer(&mut self) -> Result<()> {
        let Some(state) = &mut self.adamw_state else { return Ok(()) };
        let gradients = match self.case.workload {
            Workload::OptimizerStep => &self.fixed_gradients,
            _ => &self.gradients,
        };
        state.step(&self.adamw, &self.leaves, gradients)
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
        checkpoint::read(&self.layout, &self.leaves, self.adamw_state.as_ref())
    }

    fn restore(&mut self, tensors: &[Named], seed: u64) -> Result<()> {
        checkpoint::restore(&self.layout, &self.leaves, self.adamw_state.as_mut(), tensors, seed)
    }

    fn outputs(&mut self) -> Result<Vec<Named>> {
        let updated: &[Tensor] = if self.adamw_state.is_some() { &self.leaves } else { &[] };
        self.layout.read_outputs(&self.case, &self.results, &self.gradients, updated)
    }
}
