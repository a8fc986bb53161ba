//! The workloads in tch: what one iteration runs, and what it leaves for parity.

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};
use transformer_bench::backend::LoadedCase;
use transformer_bench::model::ModelId;
use transformer_bench::model::fixture::{AdamW, Fixture, Tensor as Named};
use transformer_bench::model::parameters::LayerParams;
use transformer_bench::suite::{Case, Precision, Shape, Workload};

use crate::distributed::{self, Exchange, Sizes};
use crate::extension::{self, Graph, Moments};
use crate::network::{self, Layers};
use crate::params::{self, Places};

/// A case on a device.
pub struct Step {
    case: Case,
    device: Device,
    layers: Layers,
    parts: LayerParams<Tensor>,
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
    fixture.inputs().iter().map(|named| params::load(named, device, kind_of(&named.name))).collect()
}

/// How the layers are written.
fn layers(fixture: &Fixture, device: Device) -> Layers {
    let Case { method: precision, shape, .. } = fixture.case;
    let kind = if precision.precision == Precision::Mixed {
        Kind::BFloat16
    } else {
        crate::kind(precision.precision)
    };
    let model = shape.model().map_or(ModelId::indicator(), |(model, _)| model);
    Layers {
        model,
        turns: network::turns(&model, device, kind),
        fused: precision.variant.uses_sdpa(),
        dropout: fixture.dropout,
    }
}

impl Step {
    pub fn new(device: Device, fixture: &Fixture) -> Result<Self> {
        let case = fixture.case;
        let recipe = case.method.variant;
        let kind = crate::kind(case.method.precision);
        let train = case.workload.trains();
        let recorded = recipe.captures_full_step() && matches!(device, Device::Cuda(_));
        let inputs = inputs(fixture, device, kind);
        let layers = layers(fixture, device);

        let (leaves, places) = params::pack(fixture.parameters(), device, kind, layers.fused);
        let leaves: Vec<Tensor> = leaves.into_iter().map(|t| t.set_requires_grad(train)).collect();
        let copied = case.method.precision == Precision::Mixed && recipe.captures_full_step();
        let copy = |l: &Tensor| l.detach().to_kind(Kind::BFloat16).set_requires_grad(train);
        let copies: Vec<Tensor> = leaves.iter().filter(|_| copied).map(copy).collect();
        let parts = places.parts(case.shape, if copied { &copies } else { &leaves });
        let moments = case.workload.optimizes().then(|| Moments::new(&leaves, recipe.uses_fused_adamw()));
        let fixed_gradients = match case.workload {
            Workload::OptimizerStep => params::pack(fixture.gradients(), device, kind, layers.fused).0,
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
            let sizes = (recipe.overlaps_communication() && train).then_some(sizes);
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
        self.case.method.variant.uses_fused_adamw()
    }

    fn amp(&self) -> bool {
        self.case.method.precision == Precision::Mixed
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
            (LayerParams::Model(network), _) => self.layers.model(inputs, network),
            (LayerParams::Attention(layer), _) => vec![self.layers.attention(&inputs[0], layer)],
            (LayerParams::FeedForward(layer), _) => vec![self.layers.feed_forward(&inputs[0], layer)],
            (LayerParams::None, Shape::Square { chain, .. }) => {
                let first = inputs[0].matmul(&inputs[1]);
                vec![(1..chain).fold(first, |product, _| inputs[0].matmul(&product))]
            }
            (LayerParams::None, _) => unreachable!("a copy has no forward pass"),
        }
    }

    /// Forward pass and loss, which is in f32 whatever the model computes in.
    fn loss(&self) -> Result<Tensor> {
        let out = self.forwarding(|| self.forward())?;
        Ok(network::loss(&self.layers.model, &out, &self.inputs))
    }

    /// Runs `body` under autocast where the precision is that.
    fn forwarding<T>(&self, body: impl FnOnce() -> T) -> Result<T> {
        extension::autocast(self.device, self.case.method.precision == Precision::Amp, body)
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
            Workload::AllReduce => distributed::all_reduce(&self.results[0], 1)?,
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
            (LayerParams::Model(_), _) => self.layers.model.output_names(),
            _ => &["out"],
        }
    }
}

impl LoadedCase for Step {
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
    fn run_pipelined(&mut self, steps: u64) -> Result<bool> {
        if self.case.workload != Workload::AllReduce {
            return Ok(false);
        }
        extension::caught(|| distributed::all_reduce(&self.results[0], steps))?;
        extension::synchronize(self.device)?;
        Ok(true)
    }

    fn outputs(&mut self) -> Result<Vec<Named>> {
        let mut all = Vec::new();
        for (name, tensor) in self.names().iter().zip(&self.results) {
            all.push(params::read((*name).to_owned(), &params::dims(tensor), tensor)?);
        }
        match self.case.workload {
            Workload::AttentionGrad | Workload::FeedForwardGrad => {
                all.push(params::read(
                    "grad/x".to_owned(),
                    &params::dims(&self.inputs[0]),
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
