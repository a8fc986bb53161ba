//! The workloads in tch: what one iteration runs, and what it leaves for parity.

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};
use transformer_bench::backend::Prepared;
use transformer_bench::case::{Case, Compute, Family, Shape, Workload};
use transformer_bench::fixture::{AdamW, Fixture, Tensor as Named};
use transformer_bench::model::{Attention, FeedForward, Gpt2, InOrder, Indicator};

use crate::extension::{self, Graph, Moments};
use crate::net::{self, Layers};

/// Where a parameter lies: whole in its own leaf, or some rows of a packed one.
struct Place {
    name: String,
    dims: Vec<usize>,
    leaf: usize,
    row: i64,
    packed: bool,
}

/// What the case computes forward, with its parameters.
enum Net {
    Indicator(Indicator<Tensor>),
    Gpt2(Gpt2<Tensor>),
    Attention { layer: Attention<Tensor>, heads: usize, causal: bool },
    FeedForward { layer: FeedForward<Tensor>, tanh: bool },
    Square { chain: usize },
    Buffer,
}

impl Net {
    /// From the tensors that hold the parameters.
    fn of(shape: Shape, places: &[Place], tensors: &[Tensor]) -> Self {
        let mut source = InOrder(places.iter().map(|place| tensors[place.leaf].shallow_clone()));
        match shape {
            Shape::Model { family: Family::Indicator, tiny, .. } => {
                Self::Indicator(Indicator::take(&mut source, &Family::Indicator.sizes(tiny)))
            }
            Shape::Model { family: Family::Gpt2, tiny, .. } => {
                Self::Gpt2(Gpt2::take(&mut source, &Family::Gpt2.sizes(tiny)))
            }
            Shape::Attention { heads, head_width, causal, .. } => {
                Self::Attention { layer: Attention::take(&mut source, "", heads * head_width), heads, causal }
            }
            Shape::FeedForward { width, hidden, tanh, .. } => {
                Self::FeedForward { layer: FeedForward::take(&mut source, "", width, hidden), tanh }
            }
            Shape::Square { chain, .. } => Self::Square { chain },
            Shape::Buffer { .. } => Self::Buffer,
        }
    }
}

/// A case on a device.
pub struct Step {
    case: Case,
    device: Device,
    layers: Layers,
    net: Net,
    inputs: Vec<Tensor>,
    /// The tensors that gradients are taken by and the optimizer moves.
    leaves: Vec<Tensor>,
    /// Under amp where the whole step is optimised: bf16 copies of the leaves that every step
    /// fills with one call; the net computes with them, and gradients are taken by them. The
    /// plain way casts each leaf on the tape.
    copies: Vec<Tensor>,
    places: Vec<Place>,
    adamw: AdamW,
    moments: Option<Moments>,
    fixed_gradients: Vec<Tensor>,
    /// The last step's results.
    results: Vec<Tensor>,
    gradients: Vec<Tensor>,
    /// The step as one launch, where the recipe and the device have it.
    graph: Option<Graph>,
}

/// Steps before a recording: cuBLAS and the allocator settle in the first.
const WARM_UP: usize = 3;

fn load(named: &Named, device: Device, kind: Kind) -> Tensor {
    let dims: Vec<i64> = named.dims.iter().map(|&d| d as i64).collect();
    Tensor::from_slice(&named.data).view(dims.as_slice()).to_device(device).to_kind(kind)
}

impl Step {
    pub fn new(device: Device, fixture: &Fixture) -> Result<Self> {
        let case = fixture.case;
        let kind = crate::kind(case.precision.compute);
        let train = case.workload.trains();
        let wanted = case.precision.recipe;
        let captured = wanted.captured() && matches!(device, Device::Cuda(_));
        let inputs: Vec<Tensor> = fixture
            .inputs()
            .iter()
            .map(|named| {
                let kind = match named.name.as_str() {
                    "tokens" | "next" => Kind::Int64,
                    // The loss is in f32.
                    "usefulness" => Kind::Float,
                    _ => kind,
                };
                load(named, device, kind)
            })
            .collect();
        let layers = Layers {
            fused: wanted.fused_attention(),
            // A recording keeps both streams; without one the launches would cost more.
            side: (captured && train).then(|| {
                let kind = if case.precision.compute == Compute::Amp { Kind::BFloat16 } else { kind };
                let tokens = inputs.first().map_or(0, |x| x.size().iter().take(2).product());
                Tensor::ones([tokens], (kind, device))
            }),
            dropout: fixture.dropout,
            train,
        };

        let (leaves, places) = pack(fixture.parameters(), device, kind, layers.fused);
        let leaves: Vec<Tensor> = leaves.into_iter().map(|t| t.set_requires_grad(train)).collect();
        let amp = case.precision.compute == Compute::Amp;
        let copies: Vec<Tensor> = if amp && wanted.captured() {
            leaves.iter().map(|l| l.detach().to_kind(Kind::BFloat16).set_requires_grad(train)).collect()
        } else {
            Vec::new()
        };
        let net = Net::of(case.shape, &places, if copies.is_empty() { &leaves } else { &copies });
        let moments = case.workload.optimizes().then(|| Moments::new(&leaves, wanted.fused_optimizer()));
        let fixed_gradients = if case.workload == Workload::OptimizerStep {
            pack(fixture.gradients(), device, kind, layers.fused).0
        } else {
            Vec::new()
        };
        let mut step = Self {
            case,
            device,
            layers,
            net,
            inputs,
            leaves,
            copies,
            places,
            adamw: fixture.adamw,
            moments,
            fixed_gradients,
            results: Vec::new(),
            gradients: Vec::new(),
            graph: None,
        };
        if let Workload::CopyPeak = case.workload {
            // The destination exists before the clock runs, as a caching allocator's would.
            step.results = vec![step.inputs[0].empty_like()];
        }
        if train && !case.workload.takes_model() {
            step.inputs[0] = step.inputs[0].set_requires_grad(true);
        }
        if captured {
            step.graph = Some(step.record().context("recording the step as a CUDA graph")?);
        }
        extension::synchronize(device)?;
        Ok(step)
    }

    /// Records the step. What the warm-up changes is put back, so that the first replay
    /// is the first step.
    fn record(&mut self) -> Result<Graph> {
        let state: Vec<Tensor> = self
            .leaves
            .iter()
            .map(Tensor::detach)
            .chain(self.moments.iter().flat_map(Moments::state))
            .collect();
        let before: Vec<Tensor> = state.iter().map(Tensor::copy).collect();
        let this = std::cell::RefCell::new(self);
        Graph::record(
            || {
                for _ in 0..WARM_UP {
                    let mut this = this.borrow_mut();
                    this.passes()?;
                    this.update()?;
                }
                tch::no_grad(|| {
                    for (mut now, before) in state.into_iter().zip(&before) {
                        now.copy_(before);
                    }
                });
                if let Some(moments) = &mut this.borrow_mut().moments {
                    moments.restart();
                }
                Ok(())
            },
            || {
                let mut this = this.borrow_mut();
                this.passes()?;
                if this.records_update() { this.update() } else { Ok(()) }
            },
        )
    }

    /// The plain optimizer counts its steps on the host, so a recording would repeat the
    /// first for ever: it runs behind the replay.
    fn records_update(&self) -> bool {
        self.case.precision.recipe.fused_optimizer()
    }

    fn amp(&self) -> bool {
        self.case.precision.compute == Compute::Amp
    }

    /// An input in the type that the net computes in.
    fn narrow(&self, index: usize) -> Tensor {
        let input = &self.inputs[index];
        if !self.amp() || input.kind() != Kind::Float {
            return input.shallow_clone();
        }
        input.to_kind(Kind::BFloat16)
    }

    /// What gradients are taken by, beside the inputs.
    fn computes(&self) -> &[Tensor] {
        if self.copies.is_empty() { &self.leaves } else { &self.copies }
    }

    /// What the model puts out.
    fn forward(&self) -> Vec<Tensor> {
        let x = &self.narrow(0);
        match (&self.net, self.case.shape) {
            (Net::Indicator(p), Shape::Model { family, tiny, .. }) => {
                self.layers.indicator(x, &self.narrow(1), p, &family.sizes(tiny)).into()
            }
            (Net::Gpt2(p), Shape::Model { family, tiny, .. }) => {
                vec![self.layers.gpt2(x, p, &family.sizes(tiny))]
            }
            (Net::Attention { layer, heads, causal }, _) => {
                vec![self.layers.attention(x, layer, *heads, *causal)]
            }
            (Net::FeedForward { layer, tanh }, _) => vec![self.layers.feed_forward(x, layer, *tanh)],
            (Net::Square { chain }, _) => {
                let first = x.matmul(&self.inputs[1]);
                vec![(1..*chain).fold(first, |product, _| x.matmul(&product))]
            }
            _ => unreachable!("the net was made for the shape"),
        }
    }

    /// Forward pass and loss, which is in f32 whatever the model computes in.
    fn loss(&self) -> Result<Tensor> {
        if let (Net::Gpt2(p), Shape::Model { family, tiny, .. }) = (&self.net, self.case.shape)
            && self.case.precision.recipe.fused_loss()
        {
            return self.forwarding(|| {
                self.layers.gpt2_with_loss(&self.inputs[0], &self.inputs[1], p, &family.sizes(tiny))
            });
        }
        let out = self.forwarding(|| self.forward())?;
        Ok(match &self.net {
            Net::Indicator(_) => {
                let [selection, weights] = <[Tensor; 2]>::try_from(out).expect("two heads");
                net::indicator_loss(&[selection, weights], &self.inputs[2])
            }
            _ => net::gpt2_loss(&out[0], &self.inputs[1]),
        })
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
            self.net = Net::of(self.case.shape, &self.places, &casts);
        }
        match self.case.workload {
            Workload::CopyPeak => {
                let _ = self.inputs[0].neg_out(&self.results[0]);
            }
            Workload::Forward | Workload::Attention | Workload::FeedForward | Workload::MatmulPeak => {
                self.results.clear();
                self.results = tch::no_grad(|| self.forwarding(|| self.forward()))?;
            }
            Workload::AttentionGrad | Workload::FeedForwardGrad => {
                let out = self.forwarding(|| self.forward())?;
                let inputs: Vec<Tensor> =
                    self.inputs[..1].iter().chain(self.computes()).map(Tensor::shallow_clone).collect();
                let upstream = self.inputs[1].to_kind(out[0].kind());
                self.gradients =
                    extension::gradients(&out[0], Some(&upstream), &inputs, self.layers.side.is_some())?;
                extension::join(self.device)?;
            }
            Workload::ForwardBackward | Workload::TrainStep => {
                let loss = self.loss()?;
                self.gradients =
                    extension::gradients(&loss, None, self.computes(), self.layers.side.is_some())?;
                extension::join(self.device)?;
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

    /// A leaf's part that belongs to a parameter, as f32 on the host.
    fn read(&self, name: String, dims: &[usize], tensor: &Tensor) -> Result<Named> {
        let flat = tensor.detach().to_device(Device::Cpu).to_kind(Kind::Float).contiguous().view([-1]);
        Ok(Named { name, dims: dims.to_vec(), data: Vec::<f32>::try_from(flat)? })
    }

    fn read_parameters(&self, prefix: &str, leaves: &[Tensor]) -> Result<Vec<Named>> {
        self.places
            .iter()
            .map(|place| {
                let leaf = &leaves[place.leaf];
                let rows = if place.packed {
                    leaf.narrow(0, place.row, place.dims[0] as i64)
                } else {
                    leaf.shallow_clone()
                };
                self.read(format!("{prefix}/{}", place.name), &place.dims, &rows)
            })
            .collect()
    }
}

/// Loads tensors that follow the parameters' order. With `fused`, the rows of q, k and v
/// of one attention share a leaf, so that one product projects all three.
fn pack(all: &[Named], device: Device, kind: Kind, fused: bool) -> (Vec<Tensor>, Vec<Place>) {
    let part = |name: &str| {
        let (head, kind) = name.rsplit_once('.').unwrap_or((name, ""));
        let (owner, letter) = head.rsplit_once('.').unwrap_or(("", head));
        (fused && owner.ends_with("attention") && matches!(letter, "q" | "k" | "v"))
            .then(|| format!("{owner}.qkv.{kind}"))
    };
    let mut leaves: Vec<Vec<Tensor>> = Vec::new();
    let mut packs: Vec<(String, usize)> = Vec::new();
    let mut places = Vec::new();
    for named in all {
        let tensor = load(named, device, kind);
        let pack_name = part(&named.name);
        let known = pack_name.as_ref().and_then(|p| packs.iter().find(|(n, _)| n == p));
        let leaf = match known {
            Some(&(_, leaf)) => leaf,
            None => {
                leaves.push(Vec::new());
                if let Some(name) = &pack_name {
                    packs.push((name.clone(), leaves.len() - 1));
                }
                leaves.len() - 1
            }
        };
        let row = leaves[leaf].iter().map(|t| t.size()[0]).sum();
        leaves[leaf].push(tensor);
        places.push(Place {
            name: named.name.clone(),
            dims: named.dims.clone(),
            leaf,
            row,
            packed: pack_name.is_some(),
        });
    }
    let leaves = leaves
        .into_iter()
        .map(|mut parts| if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 0) })
        .collect();
    (leaves, places)
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

    fn outputs(&mut self) -> Result<Vec<Named>> {
        let mut all = Vec::new();
        let names: &[&str] = match (&self.net, self.case.workload) {
            (_, Workload::ForwardBackward | Workload::TrainStep) => &["loss"],
            (Net::Indicator(_), _) => &["selection", "weights"],
            (Net::Gpt2(_), _) => &["logits"],
            _ => &["out"],
        };
        for (name, tensor) in names.iter().zip(&self.results) {
            let dims: Vec<usize> = tensor.size().iter().map(|&d| d as usize).collect();
            all.push(self.read((*name).to_owned(), &dims, tensor)?);
        }
        match self.case.workload {
            Workload::AttentionGrad | Workload::FeedForwardGrad => {
                let dims: Vec<usize> = self.inputs[0].size().iter().map(|&d| d as usize).collect();
                all.push(self.read("grad/x".to_owned(), &dims, &self.gradients[0])?);
                all.extend(self.read_parameters("grad", &self.gradients[1..])?);
            }
            Workload::ForwardBackward | Workload::TrainStep => {
                all.extend(self.read_parameters("grad", &self.gradients)?);
            }
            _ => {}
        }
        if self.moments.is_some() {
            all.extend(self.read_parameters("param", &self.leaves)?);
        }
        Ok(all)
    }
}
