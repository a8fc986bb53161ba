//! Wrong kernels, planted on purpose: each must be caught in every precision that can show it.
//!
//! They are planted in what a backend is given (a scaled query projection is a wrong scale in
//! attention), in the model that it is told, in what it returns, or in the oracle's own rounding
//! in a backend's place; never by a switch in code that is timed. The table is in README.md.

use anyhow::Result;

use super::dropout::{self, Probe};
use super::tolerance::ReferenceCache;
use super::{Mismatch, Outcome, ParityChecker, compare_tensors};
use crate::backend::{Backend, LoadedCase};
use crate::model::fixture::{Fixture, Tensor};
use crate::model::reference::blocked::computed;
use crate::model::reference::rounding::{Rounding, Sums};
use crate::model::{
    Activation, CHOICE_MODELS, Dropout, Model, ModelId, NormKind, NormOrder, Output, Position,
};
use crate::suite::{Block, Case, Method, Precision, Shape, Workload};

/// Where a fault sits.
enum Plant {
    /// What the backend is given.
    Given(fn(&mut Fixture)),
    /// The model that it is told.
    Told(fn(&mut Model)),
    /// What it returns, from what it found in each step so far.
    Returned(fn(&[Vec<Tensor>]) -> Vec<Tensor>),
    /// Its dropout, or what it is given where dropout is looked at.
    Drops(fn(&mut Fixture)),
    /// What it returns where dropout is looked at.
    DropsReturned(fn(&[Vec<Tensor>]) -> Vec<Tensor>),
    /// Number formats: the oracle computes in the backend's place.
    Rounds(fn() -> Rounding),
}

/// A wrong kernel.
pub struct Fault {
    pub name: &'static str,
    /// Ids of precisions whose rounding hides it; README.md says by how much.
    pub hidden: &'static [Precision],
    workload: Workload,
    model: &'static str,
    plant: Plant,
}

use Plant::{Drops, DropsReturned, Given, Returned, Rounds, Told};
use Precision::{Amp, Bf16, F16, Mixed, Tf32};
use Workload::{
    Attention, AttentionGrad, FeedForward, FeedForwardGrad, Forward, ForwardBackward, OptimizerStep,
    TrainStep,
};

/// With eight significant bits.
const BF16: &[Precision] = &[Bf16, Mixed, Amp];

const fn fault(
    name: &'static str,
    workload: Workload,
    model: &'static str,
    plant: Plant,
    hidden: &'static [Precision],
) -> Fault {
    Fault { name, hidden, workload, model, plant }
}

#[rustfmt::skip]
pub const FAULTS: &[Fault] = &[
    fault("attention scale 10 % off", Attention, "indicator", Given(|f| scale_queries(f, "attention", 1.1)), BF16),
    fault("attention scale 10 % off, gradients", AttentionGrad, "indicator", Given(|f| scale_queries(f, "attention", 1.1)), &[]),
    fault("attention scale 10 % off in one layer", ForwardBackward, "indicator", Given(|f| scale_queries(f, "blocks.1.attention", 1.1)), &[]),
    fault("feed-forward 5 % too large", FeedForward, "indicator", Given(|f| scale(f, "feed-forward.down.weight", 1.05)), &[]),
    fault("feed-forward 5 % too large in one layer", ForwardBackward, "gpt2", Given(|f| scale(f, "blocks.0.feed-forward.down.weight", 1.05)), BF16),
    fault("feed-forward 1 % too large", FeedForwardGrad, "indicator", Given(|f| scale(f, "feed-forward.down.weight", 1.01)), BF16),
    fault("no bias before the activation", FeedForward, "indicator", Given(|f| fill(f, "feed-forward.up.bias", 0.0)), &[]),
    fault("no bias of v", Attention, "gpt2", Given(|f| fill(f, "attention.v.bias", 0.0)), &[]),
    fault("no bias of one layer", Forward, "gpt2", Given(|f| fill(f, "blocks.0.feed-forward.down.bias", 0.0)), &[]),
    fault("norm without weight", ForwardBackward, "indicator", Given(|f| fill(f, "blocks.1.norm1.weight", 1.0)), &[]),
    fault("norm without bias", ForwardBackward, "indicator", Given(|f| fill(f, "blocks.0.norm2.bias", 0.0)), &[]),
    fault("positions off by one", Forward, "gpt2", Given(|f| f.edit_parameter("position", |p| p.rotate_left(32))), &[]),
    fault("queries of all heads rotated by one head", AttentionGrad, "indicator", Given(|f| f.edit_parameter("attention.q.weight", |w| w.rotate_left(8 * 32))), &[]),
    fault("tokens off by one", ForwardBackward, "gpt2", Given(|f| f.edit_input("tokens", |t| t.iter_mut().for_each(|v| *v = (*v + 1.0) % 64.0))), &[]),
    fault("targets not shifted", TrainStep, "gpt2", Given(|f| f.edit_input("next", |t| t.rotate_left(1))), &[]),
    fault("only half of the batch", TrainStep, "indicator", Given(first_half), &[]),
    fault("targets 5 % too large", ForwardBackward, "indicator", Given(|f| f.edit_input("usefulness", |u| u.iter_mut().for_each(|v| *v *= 1.05))), &[]),
    fault("no weight decay", TrainStep, "indicator", Given(|f| f.adamw.weight_decay = 0.0), &[]),
    fault("no weight decay, optimizer alone", OptimizerStep, "indicator", Given(|f| f.adamw.weight_decay = 0.0), &[]),
    fault("no bias correction", TrainStep, "indicator", Given(|f| f.adamw.lr *= 0.1 / 0.001f64.sqrt()), &[]),
    fault("β2 of 0.9", TrainStep, "gpt2", Given(|f| f.adamw.beta2 = 0.9), &[Bf16]),
    fault("learning rate 5 % off", OptimizerStep, "indicator", Given(|f| f.adamw.lr *= 1.05), &[]),
    fault("no causal mask", Forward, "gpt2", Told(|m| m.causal = false), &[]),
    fault("no causal mask, gradients", AttentionGrad, "gpt2", Told(|m| m.causal = false), &[]),
    fault("an extra causal mask", ForwardBackward, "indicator", Told(|m| m.causal = true), &[]),
    fault("tanh GELU instead of erf GELU", FeedForwardGrad, "indicator", Told(|m| m.activation = Activation::GeluTanh), &[Tf32, Bf16, F16, Mixed, Amp]),
    fault("norm's ε of 1e-2", ForwardBackward, "indicator", Told(|m| m.norm.set_eps(1e-2)), BF16),
    fault("norm's ε of 1e-2, small activations", Forward, "gpt2", Told(|m| m.norm.set_eps(1e-2)), &[]),
    fault("pre-norm instead of post-norm", ForwardBackward, "indicator", Told(|m| m.norm_order = NormOrder::PreNorm), &[]),
    fault("twice the heads, half as wide", AttentionGrad, "indicator", Told(|m| (m.heads, m.key_value_heads, m.head_width) = (2 * m.heads, 2 * m.key_value_heads, m.head_width / 2)), &[]),
    fault("a zero gradient", ForwardBackward, "indicator", Returned(|all| with(all, "grad/blocks.0.attention.k.weight", |g| g.fill(0.0))), &[]),
    fault("gradients of two parameters swapped", TrainStep, "gpt2", Returned(exchanged), &[]),
    fault("a zero tile of a gradient", FeedForwardGrad, "gpt2", Returned(|all| with(all, "grad/feed-forward.up.weight", |g| (0..64).for_each(|i| g[i / 8 * 32 + i % 8] = 0.0))), &[]),
    fault("a NaN in a gradient", ForwardBackward, "gpt2", Returned(|all| with(all, "grad/token", |g| g[3] = f32::NAN)), &[]),
    fault("sum instead of mean", ForwardBackward, "indicator", Returned(|all| with(all, "grad/", |g| g.iter_mut().for_each(|v| *v *= 16.0))), &[]),
    fault("loss 5 % off", ForwardBackward, "indicator", Returned(|all| with(all, "loss", |l| l[0] *= 1.05)), &[]),
    fault("loss 0.1 % off", ForwardBackward, "gpt2", Returned(|all| with(all, "loss", |l| l[0] *= 1.001)), BF16),
    fault("a parameter without its update", TrainStep, "indicator", Returned(unmoved), &[]),
    fault("results of the first step (stale replay)", TrainStep, "indicator", Returned(|all| all[0].clone()), &[]),
    fault("results of the previous step", TrainStep, "gpt2", Returned(|all| all[all.len().saturating_sub(2)].clone()), &[]),
    fault("gradients accumulated over steps", ForwardBackward, "gpt2", Returned(added), &[]),
    fault("dropout 0.2 instead of 0.1", TrainStep, "indicator", Drops(|f| f.dropout = Dropout::everywhere(0.2)), &[]),
    fault("dropout 0.01 instead of 0.1", TrainStep, "indicator", Drops(|f| f.dropout = Dropout::everywhere(0.01)), &[]),
    fault("no dropout", ForwardBackward, "indicator", Drops(|f| f.dropout = Dropout::NONE), &[]),
    fault("no dropout of attention's weights", AttentionGrad, "indicator", Drops(|f| f.dropout.weights = 0.0), &[]),
    fault("no dropout of the residual", TrainStep, "indicator", Drops(|f| f.dropout.residual = 0.0), &[]),
    fault("no dropout of the hidden units", FeedForwardGrad, "indicator", Drops(|f| f.dropout.hidden = 0.0), &[]),
    fault("no dropout in the heads", ForwardBackward, "indicator", Drops(|f| f.dropout.heads = 0.0), &[]),
    fault("dropout without 1/(1 − p)", FeedForwardGrad, "indicator", DropsReturned(|all| with(all, "grad/feed-forward.down.weight", |g| g.iter_mut().for_each(|v| *v *= 0.9))), &[]),
    fault("dropout without 1/(1 − p) in one layer", TrainStep, "indicator", Drops(|f| scale(f, "blocks.0.feed-forward.down.weight", 0.9)), &[]),
    fault("the same masks in every step", TrainStep, "indicator", DropsReturned(|all| all[0].clone()), &[]),
    fault("rotary theta 500 instead of 10,000", AttentionGrad, "grouped-tiny", Told(|m| m.position = Position::Rotary { theta: 500.0 }), &[]),
    fault("no rotary positions", Attention, "grouped-tiny", Told(|m| m.position = Position::None), &[]),
    fault("rotary pairs instead of halves", Attention, "grouped-tiny", Given(interleaved), &[]),
    fault("query heads grouped in another order", Attention, "grouped-tiny", Given(regrouped), &[]),
    fault("one key head for all query heads", Attention, "grouped-tiny", Given(one_head_of_keys), &[]),
    fault("gate and up projection swapped", FeedForward, "grouped-tiny", Given(|f| exchange(f, "feed-forward.gate.weight", "feed-forward.up.weight")), &[]),
    fault("no gate", FeedForward, "grouped-tiny", Told(|m| m.glu = false), &[]),
    fault("layer norm instead of RMS norm", Forward, "grouped-tiny", Told(|m| m.norm = NormKind::Layer { eps: m.norm.eps() }), &[]),
    fault("RMS norm's ε of 1e-2", Forward, "grouped-tiny", Told(|m| m.norm.set_eps(1e-2)), &[]),
    fault("no norm of queries and keys", Attention, "normed-tiny", Told(|m| m.qk_norm = None), &[]),
    fault("norm of queries without weight", AttentionGrad, "normed-tiny", Given(|f| fill(f, "attention.q-norm.weight", 1.0)), &[]),
    fault("ReLU not squared", FeedForward, "normed-tiny", Told(|m| m.activation = Activation::Relu), &[]),
    fault("no norm after the embedding", Forward, "normed-tiny", Told(|m| m.embedding_norm = false), &[]),
    fault("tied output instead of untied", Forward, "grouped-tiny", Told(|m| m.output = Output::Tied), &[]),
    fault("no token type", Forward, "masked-tiny", Told(|m| m.token_type = false), &[]),
    fault("no bias of the output", ForwardBackward, "masked-tiny", Given(|f| fill(f, "output.bias", 0.0)), &[Bf16, Mixed]),
    fault("no dropout of the embedding", TrainStep, "masked-tiny", Drops(|f| f.dropout.embedding = 0.0), &[]),
    fault("TF32 in f32", ForwardBackward, "indicator", Rounds(|| Rounding::of(Tf32, Sums::Wide)), &[Tf32, Bf16, F16, Mixed, Amp]),
    fault("bf16 products in f32 and f16", ForwardBackward, "gpt2", Rounds(|| Rounding::of(Bf16, Sums::Wide)), BF16),
    fault("sums accumulated in bf16", FeedForwardGrad, "indicator", Rounds(|| Rounding::of(Bf16, Sums::Narrow)), BF16),
];

/// A preset's miniature, or one of [`CHOICES`].
pub fn miniature(name: &str) -> ModelId {
    let choice = || CHOICE_MODELS.iter().find(|m| m.name == name).copied().map(ModelId::intern);
    ModelId::named(name).map(ModelId::miniature).or_else(choice).expect("a model of the suite")
}

fn scale(f: &mut Fixture, name: &str, by: f32) {
    f.edit_parameter(name, |data| data.iter_mut().for_each(|v| *v *= by));
}

fn fill(f: &mut Fixture, name: &str, value: f32) {
    f.edit_parameter(name, |data| data.fill(value));
}

fn scale_queries(f: &mut Fixture, name: &str, by: f32) {
    scale(f, &format!("{name}.q.weight"), by);
    scale(f, &format!("{name}.q.bias"), by);
}

/// Queries and keys with the features of a head's pairs laid in halves: turned in halves, they give the
/// scores of pairs.
fn interleaved(f: &mut Fixture) {
    let (model, _) = f.case.shape.model().expect("a block's case");
    let each = model.head_width;
    for name in ["q.weight", "q.bias", "k.weight", "k.bias"] {
        f.edit_parameter(&format!("attention.{name}"), |data| {
            let row = if name.ends_with("weight") { model.width } else { 1 };
            for head in data.chunks_mut(each * row) {
                let old = head.to_vec();
                for i in 0..each {
                    let from = if i < each / 2 { 2 * i } else { 2 * i - each + 1 };
                    head[i * row..(i + 1) * row].copy_from_slice(&old[from * row..(from + 1) * row]);
                }
            }
        });
    }
}

/// The second and third of four heads change places, so that each reads the other's keys and values.
fn regrouped(f: &mut Fixture) {
    let (model, _) = f.case.shape.model().expect("a block's case");
    let each = model.head_width;
    for (name, row) in [("q.weight", model.width), ("q.bias", 1)] {
        f.edit_parameter(&format!("attention.{name}"), |data| {
            data[each * row..3 * each * row].rotate_left(each * row);
        });
    }
    f.edit_parameter("attention.o.weight", |data| {
        data.chunks_mut(model.qkv_widths().0).for_each(|row| row[each..3 * each].rotate_left(each));
    });
}

fn one_head_of_keys(f: &mut Fixture) {
    for name in ["k.weight", "k.bias"] {
        f.edit_parameter(&format!("attention.{name}"), |data| {
            let half = data.len() / 2;
            data.copy_within(..half, half);
        });
    }
}

fn exchange(f: &mut Fixture, a: &str, b: &str) {
    let mut kept = Vec::new();
    f.edit_parameter(a, |data| kept = std::mem::take(data));
    f.edit_parameter(b, |data| std::mem::swap(data, &mut kept));
    f.edit_parameter(a, |data| *data = kept);
}

/// The second half of the batch becomes the first.
fn first_half(f: &mut Fixture) {
    for name in ["values", "market", "usefulness"] {
        f.edit_input(name, |data| {
            let half = data.len() / 2;
            data.copy_within(..half, half);
        });
    }
}

/// The last step's results, with those of a name (or a kind of name) changed.
fn with(all: &[Vec<Tensor>], name: &str, change: impl Fn(&mut [f32])) -> Vec<Tensor> {
    let mut last = all.last().cloned().unwrap_or_default();
    last.iter_mut().filter(|t| t.name.starts_with(name)).for_each(|t| change(&mut t.data));
    last
}

fn exchanged(all: &[Vec<Tensor>]) -> Vec<Tensor> {
    let mut last = all.last().cloned().unwrap_or_default();
    let at = |name: &str| last.iter().position(|t| t.name == name).expect("a gradient of the model");
    let (a, b) = (at("grad/blocks.0.norm1.weight"), at("grad/blocks.0.norm2.weight"));
    let kept = std::mem::take(&mut last[a].data);
    last[a].data = std::mem::replace(&mut last[b].data, kept);
    last
}

/// The sum of all steps' gradients.
fn added(all: &[Vec<Tensor>]) -> Vec<Tensor> {
    let mut sum = all[0].clone();
    for step in &all[1..] {
        for (sum, now) in sum.iter_mut().zip(step).filter(|(t, _)| t.name.starts_with("grad/")) {
            sum.data.iter_mut().zip(&now.data).for_each(|(a, b)| *a += b);
        }
    }
    sum
}

/// One parameter as it was before the step: from its own first update, taken back.
fn unmoved(all: &[Vec<Tensor>]) -> Vec<Tensor> {
    let name = "blocks.0.feed-forward.down.weight";
    let case: Case = "train-step/torch-cpu/f32/indicator-tiny-b2".parse().expect("an id");
    let fixture = Fixture::for_parity(case);
    let start = fixture.parameters().iter().find(|t| t.name == name).expect("a parameter");
    with(all, &format!("param/{name}"), |data| data.copy_from_slice(&start.data))
}

/// A backend's case whose results are changed.
struct Faulty {
    inner: Box<dyn LoadedCase>,
    steps: Vec<Vec<Tensor>>,
    change: fn(&[Vec<Tensor>]) -> Vec<Tensor>,
}

impl LoadedCase for Faulty {
    fn step(&mut self) -> Result<()> {
        self.inner.step()?;
        self.steps.push(self.inner.outputs()?);
        Ok(())
    }

    fn outputs(&mut self) -> Result<Vec<Tensor>> {
        Ok((self.change)(&self.steps))
    }
}

fn verdict(wrong: Option<Mismatch>) -> Outcome {
    wrong.map_or(Ok(0.0), Err)
}

impl Fault {
    /// The case in which a backend shows it, at a miniature.
    pub fn case(&self, backend: &dyn Backend, precision: Method) -> Case {
        let model = miniature(self.model);
        let shape = match self.workload {
            Attention | AttentionGrad => Shape::Block { part: Block::Attention, model, batch: 2 },
            FeedForward | FeedForwardGrad => Shape::Block { part: Block::FeedForward, model, batch: 2 },
            _ => Shape::of_model(model, 2),
        };
        Case { workload: self.workload, backend: backend.id(), method: precision, shape }
    }

    /// Whether the backend is told of another model.
    pub fn changes_model(&self) -> bool {
        matches!(self.plant, Told(_))
    }

    /// What parity says of a backend with this fault: where it is not caught, how much of what is
    /// allowed it took.
    ///
    /// # Errors
    /// Where the backend fails.
    pub fn outcome(
        &self,
        backend: &dyn Backend,
        prover: &mut ParityChecker,
        precision: Method,
    ) -> Result<Outcome> {
        let case = self.case(backend, precision);
        let truth = Fixture::for_parity(case);
        match self.plant {
            Given(plant) => {
                let mut given = Fixture::for_parity(case);
                plant(&mut given);
                prover.check(backend, &truth, &given)
            }
            Told(plant) => {
                let (model, batch) = case.shape.model().expect("a model's case");
                let mut wrong = *model;
                plant(&mut wrong);
                let model = ModelId::intern(wrong);
                let shape = match case.shape {
                    Shape::Block { part, .. } => Shape::Block { part, model, batch },
                    _ => Shape::of_model(model, batch),
                };
                prover.check(backend, &truth, &Fixture::for_parity(Case { shape, ..case }))
            }
            Returned(change) => {
                let inner = backend.load(&truth)?;
                let mut faulty = Faulty { inner, steps: Vec::new(), change };
                prover.compare(&truth, &mut faulty, backend.accumulation())
            }
            Drops(plant) => {
                let probe = Probe::new(case);
                let mut given = probe.fixture();
                plant(&mut given);
                dropout::check_with(&probe, backend.load(&given)?.as_mut(), backend.accumulation())
                    .map(verdict)
            }
            DropsReturned(change) => {
                let probe = Probe::new(case);
                let inner = backend.load(&probe.fixture())?;
                let mut faulty = Faulty { inner, steps: Vec::new(), change };
                dropout::check_with(&probe, &mut faulty, backend.accumulation()).map(verdict)
            }
            Rounds(rounding) => {
                let found = computed::<f32>(&truth, rounding(), None);
                let tensor = |c: crate::model::reference::blocked::Computed<f32>| Tensor {
                    dims: vec![c.data.len()],
                    name: c.name,
                    data: c.data,
                };
                let found: Vec<Tensor> = found.into_iter().map(tensor).collect();
                Ok(compare_tensors(case, &ReferenceCache::default().expected(&truth, Sums::Wide), &found))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_in_the_readme_is_of_these_faults() {
        let readme = include_str!("README.md");
        let table = readme.split("<!-- faults:").nth(1).expect("the table");
        let rows: Vec<Vec<&str>> = table
            .lines()
            .filter(|line| {
                line.starts_with("| ") && !line.starts_with("| fault") && !line.starts_with("| ---")
            })
            .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
            .collect();
        assert_eq!(rows.len(), FAULTS.len());
        for (row, fault) in rows.iter().zip(FAULTS) {
            assert_eq!(row[0], fault.name);
            for compute in Precision::ALL {
                let told = row[2].split([' ', ',']).any(|word| word == compute.id());
                assert_eq!(told, fault.hidden.contains(compute), "{}: {compute}", fault.name);
            }
        }
    }
}
