//! The workloads in tch: what one iteration runs, and what it leaves for parity.

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};
use transformer_bench::backend::Prepared;
use transformer_bench::model::ModelId;
use transformer_bench::model::fixture::{AdamW, Fixture, Tensor as Named};
use transformer_bench::model::parameters::Parts;
use transformer_bench::suite::{Case, Compute, Shape, Workload};

use crate::extension::{self, Graph, Moments};
use crate::leaves::{self, Places};
use crate::net::{self, Layers};
use crate::ranks::{self, Exchange, Sizes};

/// A case on a device.
pub struct Step {
    case: Case,
    device: Device,
    layers: Layers,
    parts: Parts<Tensor>,
    inputs: Vec<Tensor>,
    /// The tensors that the optimizer moves, and that gradients are taken by.
    leaves: Vec<Tensor>,
    /// Under amp where the whole step is optimised: bf16 copies of the leaves that every step
    /// fills with one call; the network computes with them, and gradients are taken by them.
    /// The eager way casts each leaf on the tape.
    copies: Vec<Tensor>,
    places: Places,
    adamw: AdamW,
    moments: Option<Moments>,
    fixed_gradients: Vec<Tensor>,
    /// The last step's results.
    results: Vec<Tensor>,
    gradients: Vec<Tensor>,
    exchange: Exchange,
    /// The step as one launch, where the recipe and the device have it.
    graph: Option<Graph>,
}

pub fn inputs(fixture: &Fixture, device: Device, kind: Kind) -> Vec<Tensor> {
    let kind_of = |name: &str| match name {
        "tokens" | "next" => Kind::Int64,
        // The loss is in f32.
        "usefulness" => Kind::Float,
        _ => kind,
    };
    fixture.inputs().iter().map(|named| leaves::load(named, device, kind_of(&named.name))).collect()
}

/// How the layers are written.
fn layers(fixture: &Fixture, device: Device) -> Layers {
    let Case { precision, shape, .. } = fixture.case;
    let kind =
        if precision.compute == Compute::Amp { Kind::BFloat16 } else { crate::kind(precision.compute) };
    let model = shape.model().map_or(ModelId::indicator(), |(model, _)| model);
    Layers {
        model,
        turns: net::turns(&model, device, kind),
        fused: precision.recipe.fused_attention(),
        dropout: fixture.dropout,
    }
}

impl Step {
    pub fn new(device: Device, fixture: &Fixture) -> Result<Self> {
        let case = fixture.case;
        let recipe = case.precision.recipe;
        let kind = crate::kind(case.precision.compute);
        let train = case.workload.trains();
        let recorded = recipe.whole_step() && matches!(device, Device::Cuda(_));
        let inputs = inputs(fixture, device, kind);
        let layers = layers(fixture, device);

        let (leaves, places) = leaves::pack(fixture.parameters(), device, kind, layers.fused);
        let leaves: Vec<Tensor> = leaves.into_iter().map(|t| t.set_requires_grad(train)).collect();
        let copied = case.precision.compute == Compute::Amp && recipe.whole_step();
        let copy = |l: &Tensor| l.detach().to_kind(Kind::BFloat16).set_requires_grad(train);
        let copies: Vec<Tensor> = leaves.iter().filter(|_| copied).map(copy).collect();
        let parts = places.parts(case.shape, if copied { &copies } else { &leaves });
        let moments = case.workload.optimizes().then(|| Moments::new(&leaves, recipe.fused_optimizer()));
        let fixed_gradients = match case.workload {
            Workload::OptimizerStep => leaves::pack(fixture.gradients(), device, kind, layers.fused).0,
            _ => Vec::new(),
        };
        let mut step = Self {
            case,
            device,
            layers,
            parts,
            inputs,
            leaves,
            copies,
            places,
            adamw: fixture.adamw,
            moments,
            fixed_gradients,
            results: Vec::new(),
            gradients: Vec::new(),
            exchange: Exchange::None,
            graph: None,
        };
        if case.shape.ranks() > 1 {
            let sizes = if recorded { Sizes::recorded(step.computes()) } else { Sizes::DDP };
            let sizes = (recipe.overlaps() && train).then_some(sizes);
            step.exchange = Exchange::new(device, step.computes(), sizes, fixture.silent)?;
        }
        if case.workload == Workload::AllReduce {
            step.results = vec![step.inputs[0].copy()];
        }
        if let Workload::CopyPeak = case.workload {
            // The destination exists before the clock runs, as a caching allocator's would.
            step.results = vec![step.inputs[0].empty_like()];
        }
        if train && !case.workload.takes_model() {
            step.inputs[0] = step.inputs[0].set_requires_grad(true);
        }
        if recorded {
            step.graph = Some(step.record().context("recording the step as a CUDA graph")?);
        }
        extension::synchronize(device)?;
        Ok(step)
    }

    /// Records the step.
    fn record(&mut self) -> Result<Graph> {
        let state = self.leaves.iter().map(Tensor::detach);
        let state = state.chain(self.moments.iter().flat_map(Moments::state)).collect();
        let this = std::cell::RefCell::new(self);
        Graph::of_step(
            state,
            || {
                let mut this = this.borrow_mut();
                this.passes()?;
                this.update()
            },
            || {
                let mut this = this.borrow_mut();
                if let Some(moments) = &mut this.moments {
                    moments.restart();
                }
                this.passes()?;
                if this.records_update() { this.update() } else { Ok(()) }
            },
        )
    }

    /// The eager optimizer counts its steps on the host, so a recording would repeat the
    /// first for ever: it runs behind the replay.
    fn records_update(&self) -> bool {
        self.case.precision.recipe.fused_optimizer()
    }

    fn amp(&self) -> bool {
        self.case.precision.compute == Compute::Amp
    }

    /// The inputs in the type that the network computes in; what the loss alone reads stays.
    fn narrowed(&self) -> Vec<Tensor> {
        let narrow = |(i, input): (usize, &Tensor)| {
            let computed = self.amp() && i < 2 && input.kind() == Kind::Float;
            if computed { input.to_kind(Kind::BFloat16) } else { input.shallow_clone() }
        };
        self.inputs.iter().enumerate().map(narrow).collect()
    }

    /// What gradients are taken by, beside the inputs.
    fn computes(&self) -> &[Tensor] {
        if self.copies.is_empty() { &self.leaves } else { &self.copies }
    }

    /// What the case puts out.
    fn forward(&self) -> Vec<Tensor> {
        if self.amp() { self.forward_of(&self.narrowed()) } else { self.forward_of(&self.inputs) }
    }

    fn forward_of(&self, inputs: &[Tensor]) -> Vec<Tensor> {
        match (&self.parts, self.case.shape) {
            (Parts::Model(network), _) => self.layers.model(inputs, network),
            (Parts::Attention(layer), _) => vec![self.layers.attention(&inputs[0], layer)],
            (Parts::FeedForward(layer), _) => vec![self.layers.feed_forward(&inputs[0], layer)],
            (Parts::None, Shape::Square { chain, .. }) => {
                let first = inputs[0].matmul(&inputs[1]);
                vec![(1..chain).fold(first, |product, _| inputs[0].matmul(&product))]
            }
            (Parts::None, _) => unreachable!("a copy has no forward pass"),
        }
    }

    /// Forward pass and loss, which is in f32 whatever the model computes in.
    fn loss(&self) -> Result<Tensor> {
        let out = self.forwarding(|| self.forward())?;
        Ok(net::loss(&self.layers.model, &out, &self.inputs))
    }

    /// Runs `body` under autocast where the precision is that.
    fn forwarding<T>(&self, body: impl FnOnce() -> T) -> Result<T> {
        extension::autocast(self.device, self.case.precision.compute == Compute::Autocast, body)
    }

    /// One iteration without its optimizer.
    fn passes(&mut self) -> Result<()> {
        // What the last step left is freed first, as a training loop's variables are.
        self.gradients.clear();
        if !self.copies.is_empty() {
            extension::copy(&self.copies, &self.leaves)?;
        } else if self.amp() {
            let casts: Vec<Tensor> = self.leaves.iter().map(|l| l.to_kind(Kind::BFloat16)).collect();
            self.parts = self.places.parts(self.case.shape, &casts);
        }
        match self.case.workload {
            Workload::CopyPeak => {
                let _ = self.inputs[0].neg_out(&self.results[0]);
            }
            Workload::AllReduce => ranks::all_reduce(&self.results[0], 1)?,
            Workload::Forward | Workload::Attention | Workload::FeedForward | Workload::MatmulPeak => {
                self.results.clear();
                self.results = tch::no_grad(|| self.forwarding(|| self.forward()))?;
            }
            Workload::AttentionGrad | Workload::FeedForwardGrad => {
                let out = self.forwarding(|| self.forward())?;
                let inputs: Vec<Tensor> =
                    self.inputs[..1].iter().chain(self.computes()).map(Tensor::shallow_clone).collect();
                let upstream = self.inputs[1].to_kind(out[0].kind());
                self.gradients = extension::gradients(&out[0], Some(&upstream), &inputs)?;
            }
            Workload::ForwardBackward | Workload::TrainStep => {
                let loss = self.loss()?;
                let own = extension::gradients(&loss, None, self.computes())?;
                self.gradients = self.exchange.finish(own)?;
                self.results = vec![loss.detach()];
            }
            Workload::OptimizerStep => {}
        }
        Ok(())
    }

    /// The optimizer's part, where the workload has one.
    fn update(&mut self) -> Result<()> {
        let Some(moments) = &mut self.moments else { return Ok(()) };
        let gradients = match self.case.workload {
            Workload::OptimizerStep => &self.fixed_gradients,
            _ => &self.gradients,
        };
        moments.apply(&self.adamw, &self.leaves, gradients)
    }

    /// The names of the results.
    fn names(&self) -> &'static [&'static str] {
        match (&self.parts, self.case.workload) {
            (_, Workload::ForwardBackward | Workload::TrainStep) => &["loss"],
            (Parts::Model(_), _) => self.layers.model.output_names(),
            _ => &["out"],
        }
    }
}

impl Prepared for Step {
    fn step(&mut self) -> Result<()> {
        match &self.graph {
            Some(graph) => {
                graph.replay()?;
                if !self.records_update() {
                    self.update()?;
                }
            }
            None => extension::caught(|| self.passes().and_then(|()| self.update()))?,
        }
        extension::synchronize(self.device)
    }

    /// An all-reduce, a ceiling, is timed as nccl-tests times it.
    fn in_a_row(&mut self, steps: u64) -> Result<bool> {
        if self.case.workload != Workload::AllReduce {
            return Ok(false);
        }
        extension::caught(|| ranks::all_reduce(&self.results[0], steps))?;
        extension::synchronize(self.device)?;
        Ok(true)
    }

    fn outputs(&mut self) -> Result<Vec<Named>> {
        let mut all = Vec::new();
        for (name, tensor) in self.names().iter().zip(&self.results) {
            all.push(leaves::read((*name).to_owned(), &leaves::dims(tensor), tensor)?);
        }
        match self.case.workload {
            Workload::AttentionGrad | Workload::FeedForwardGrad => {
                all.push(leaves::read(
                    "grad/x".to_owned(),
                    &leaves::dims(&self.inputs[0]),
                    &self.gradients[0],
                )?);
                all.extend(self.places.read("grad", &self.gradients[1..])?);
            }
            Workload::ForwardBackward | Workload::TrainStep => {
                all.extend(self.places.read("grad", &self.gradients)?);
            }
            _ => {}
        }
        if self.moments.is_some() {
            all.extend(self.places.read("param", &self.leaves)?);
        }
        Ok(all)
    }
}
