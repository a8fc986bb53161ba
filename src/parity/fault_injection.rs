//! Injected faults. The parity check must detect each one in every precision that can show it.
//!
//! A fault changes the inputs of a backend (a scaled query projection acts like a wrong attention scale), its model
//! or its outputs, or a reference with another rounding replaces the backend. No fault is a switch in timed code.
//! README.md has the table of faults.

mod edits;
mod muon;

use anyhow::Result;

use super::dropout::{self, NoiseProbe, Probe};
use super::tolerance::ReferenceCache;
use super::{ParityChecker, ParityResult, compare_tensors};
use crate::backend::{Backend, LoadedCase};
use crate::fixture::{Fixture, Tensor};
use crate::model::{
    Activation, Dropout, Lora, Model, ModelId, NormKind, NormOrder, OPTION_MODELS, Output, Position, Rotary,
    SecondAttention,
};
use crate::reference::{self, Accumulation, NamedValues, Rounding};
use crate::suite::{Case, Method, Optimizer, Precision, Shape, Workload};
use edits::{
    accumulate_gradients, copy_first_key_head, double_noise, edit, edit_rotary, enlarge_even_gradients, fill,
    model_of, pair_rotary_features, repeat_first_half, repeat_last_quarter, scale, scale_queries,
    swap_adapter, swap_norm_gradients, swap_parameters, swap_two_heads, undo_update,
};
use muon::{WrongOptimizer, WrongUpdate};

/// The change that a fault makes.
enum Change {
    /// The fixture that the backend loads.
    Input(fn(&mut Fixture)),
    /// The model of the fixture that the backend loads.
    Model(fn(&mut Model)),
    /// The results of the backend, from those of each step so far.
    Output(fn(&[Vec<Tensor>]) -> Vec<Tensor>),
    /// The fixture of the dropout check.
    DropoutInput(fn(&mut Fixture)),
    /// The results in the dropout check.
    DropoutOutput(fn(&[Vec<Tensor>]) -> Vec<Tensor>),
    /// The fixture of the noise of dropout.
    NoiseInput(fn(&mut Fixture)),
    /// The results in the check of the noise of dropout.
    NoiseOutput(fn(&[Vec<Tensor>]) -> Vec<Tensor>),
    /// The optimizer's step of some parameters.
    Update(WrongUpdate),
    /// The number formats. The reference replaces the backend.
    Rounding(fn() -> Rounding),
}

/// A fault, and the case that detects it.
pub struct Fault {
    pub name: &'static str,
    /// Precisions whose rounding hides the fault. README.md has the error / tolerance of each.
    pub hidden: &'static [Precision],
    workload: Workload,
    model: &'static str,
    change: Change,
}

use Precision::{Amp, Bf16, F16, F32, Mixed, Tf32};
use Workload::{
    Attention, AttentionGrad, FeedForward, FeedForwardGrad, Forward, ForwardBackward, OptimizerStep,
    TrainStep,
};

/// The precisions that compute with 8 significant bits.
const BF16: &[Precision] = &[Bf16, Mixed, Amp];

const fn fault(
    name: &'static str,
    workload: Workload,
    model: &'static str,
    change: Change,
    hidden: &'static [Precision],
) -> Fault {
    Fault { name, hidden, workload, model, change }
}

#[rustfmt::skip]
pub const FAULTS: &[Fault] = &[
    fault("attention scale 10 % off", Attention, "indicator", Change::Input(|f| scale_queries(f, "attention", 1.1)), BF16),
    fault("attention scale 10 % off, gradients", AttentionGrad, "indicator", Change::Input(|f| scale_queries(f, "attention", 1.1)), &[]),
    fault("attention scale 10 % off in one layer", ForwardBackward, "indicator", Change::Input(|f| scale_queries(f, "blocks.1.attention", 1.1)), &[]),
    fault("feed-forward 5 % too large", FeedForward, "indicator", Change::Input(|f| scale(f, "feed-forward.down.weight", 1.05)), &[]),
    fault("feed-forward 5 % too large in one layer", ForwardBackward, "gpt2", Change::Input(|f| scale(f, "blocks.0.feed-forward.down.weight", 1.05)), BF16),
    fault("feed-forward 1 % too large", FeedForwardGrad, "indicator", Change::Input(|f| scale(f, "feed-forward.down.weight", 1.01)), BF16),
    fault("no bias before the activation", FeedForward, "indicator", Change::Input(|f| fill(f, "feed-forward.up.bias", 0.0)), &[]),
    fault("no bias of v", Attention, "gpt2", Change::Input(|f| fill(f, "attention.v.bias", 0.0)), &[]),
    fault("no bias of one layer", Forward, "gpt2", Change::Input(|f| fill(f, "blocks.0.feed-forward.down.bias", 0.0)), &[]),
    fault("norm without weight", ForwardBackward, "indicator", Change::Input(|f| fill(f, "blocks.1.norm1.weight", 1.0)), &[]),
    fault("norm without bias", ForwardBackward, "indicator", Change::Input(|f| fill(f, "blocks.0.norm2.bias", 0.0)), &[]),
    fault("positions off by one", Forward, "gpt2", Change::Input(|f| f.edit_parameter("position", |p| p.rotate_left(32))), &[]),
    fault("queries of all heads rotated by one head", AttentionGrad, "indicator", Change::Input(|f| f.edit_parameter("attention.q.weight", |w| w.rotate_left(8 * 32))), &[]),
    fault("tokens off by one", ForwardBackward, "gpt2", Change::Input(|f| f.edit_input("tokens", |t| t.iter_mut().for_each(|v| *v = (*v + 1.0) % 64.0))), &[]),
    fault("targets not shifted", TrainStep, "gpt2", Change::Input(|f| f.edit_input("next", |t| t.rotate_left(1))), &[]),
    fault("only half of the batch", TrainStep, "indicator", Change::Input(repeat_first_half), &[]),
    fault("only the last micro-batch", TrainStep, "indicator-a4", Change::Input(repeat_last_quarter), &[]),
    fault("gradients not divided by the micro-batches", TrainStep, "indicator-a4", Change::Output(|all| edit(all, "grad/", |g| g.iter_mut().for_each(|v| *v *= 4.0))), &[]),
    fault("adapter without gradient (a constant)", TrainStep, "indicator-lora4", Change::Output(|all| edit(all, "grad/blocks.1.attention.v.lora-a", |g| g.fill(0.0))), &[]),
    fault("frozen parameter moved", TrainStep, "indicator-lora4", Change::Output(|all| edit(all, "param/blocks.0.attention.q.weight", |w| w.iter_mut().for_each(|v| *v *= 1.001))), &[]),
    fault("α / rank forgotten", ForwardBackward, "indicator-lora4", Change::Model(|m| m.lora = m.lora.map(|lora| Lora { alpha: lora.rank, ..lora })), &[]),
    fault("A and B of an adapter swapped", ForwardBackward, "indicator-lora4", Change::Input(swap_adapter), &[]),
    fault("no adapter of one layer", ForwardBackward, "indicator-lora4", Change::Input(|f| fill(f, "blocks.0.feed-forward.up.lora-b", 0.0)), &[]),
    fault("targets 5 % too large", ForwardBackward, "indicator", Change::Input(|f| f.edit_input("usefulness", |u| u.iter_mut().for_each(|v| *v *= 1.05))), &[]),
    fault("no weight decay", TrainStep, "indicator", Change::Input(|f| f.adamw.weight_decay = 0.0), &[]),
    fault("no weight decay, optimizer alone", OptimizerStep, "indicator", Change::Input(|f| f.adamw.weight_decay = 0.0), &[]),
    fault("no bias correction", TrainStep, "indicator", Change::Input(|f| f.adamw.lr *= 0.1 / 0.001f64.sqrt()), &[]),
    fault("β2 of 0.9", TrainStep, "gpt2", Change::Input(|f| f.adamw.beta2 = 0.9), &[Bf16]),
    fault("learning rate 5 % off", OptimizerStep, "indicator", Change::Input(|f| f.adamw.lr *= 1.05), &[]),
    fault("Muon's weight decay missing", TrainStep, "indicator-muon", Change::Input(|f| f.muon.weight_decay = 0.0), &[]),
    fault("Muon's learning rate 5 % off", OptimizerStep, "indicator-muon", Change::Input(|f| f.muon.lr *= 1.05), &[]),
    fault("four iterations", TrainStep, "gpt2-muon", Change::Input(|f| f.muon.iterations = 4), &[]),
    fault("coefficients (2, −1.5, 0.5)", TrainStep, "indicator-muon", Change::Input(|f| f.muon.coefficients = [2.0, -1.5, 0.5]), &[]),
    fault("no transpose of tall matrices", TrainStep, "indicator-muon", of_matrices(muon::no_transpose), &[F32, Tf32, Bf16, Mixed, Amp]),
    fault("norm added up in bf16", TrainStep, "gpt2-muon", of_matrices(muon::norm_in_bf16), &[]),
    fault("no scale of tall matrices", TrainStep, "indicator-muon", of_matrices(muon::no_scale), &[]),
    fault("momentum without Nesterov", TrainStep, "gpt2-muon", of_matrices(muon::no_nesterov), &[]),
    fault("momentum after the orthogonalization", TrainStep, "indicator-muon", of_matrices(muon::late_momentum), &[]),
    fault("NaN in the iterations", TrainStep, "indicator-muon", of_matrices(muon::norm_of_zero), &[]),
    fault("an embedding updated by Muon", TrainStep, "gpt2-muon", Change::Update(WrongUpdate { applies: |spec| spec.name == "token", step: muon::muon_step }), &[]),
    fault("AdamW's part skipped", TrainStep, "indicator-muon", Change::Update(WrongUpdate { applies: |spec| !spec.is_block_matrix(), step: muon::skipped }), &[]),
    fault("no causal mask", Forward, "gpt2", Change::Model(|m| m.causal = false), &[]),
    fault("no causal mask, gradients", AttentionGrad, "gpt2", Change::Model(|m| m.causal = false), &[]),
    fault("an extra causal mask", ForwardBackward, "indicator", Change::Model(|m| m.causal = true), &[]),
    fault("tanh GELU instead of erf GELU", FeedForwardGrad, "indicator", Change::Model(|m| m.activation = Activation::GeluTanh), &[Tf32, Bf16, F16, Mixed, Amp]),
    fault("norm's ε of 1e-2", ForwardBackward, "indicator", Change::Model(|m| m.norm.set_eps(1e-2)), BF16),
    fault("norm's ε of 1e-2, small activations", Forward, "gpt2", Change::Model(|m| m.norm.set_eps(1e-2)), &[]),
    fault("pre-norm instead of post-norm", ForwardBackward, "indicator", Change::Model(|m| m.norm_order = NormOrder::PreNorm), &[]),
    fault("twice the heads, half as wide", AttentionGrad, "indicator", Change::Model(|m| (m.heads, m.key_value_heads, m.head_width) = (2 * m.heads, 2 * m.key_value_heads, m.head_width / 2)), &[]),
    fault("a zero gradient", ForwardBackward, "indicator", Change::Output(|all| edit(all, "grad/blocks.0.attention.k.weight", |g| g.fill(0.0))), &[]),
    fault("gradients of two parameters swapped", TrainStep, "gpt2", Change::Output(swap_norm_gradients), &[]),
    fault("a zero tile of a gradient", FeedForwardGrad, "gpt2", Change::Output(|all| edit(all, "grad/feed-forward.up.weight", |g| (0..64).for_each(|i| g[i / 8 * 32 + i % 8] = 0.0))), &[]),
    fault("a NaN in a gradient", ForwardBackward, "gpt2", Change::Output(|all| edit(all, "grad/token", |g| g[3] = f32::NAN)), &[]),
    fault("a gradient 10 % too small", ForwardBackward, "indicator", Change::Output(|all| edit(all, "grad/blocks.1.feed-forward.down.weight", |g| g.iter_mut().for_each(|v| *v *= 0.9))), &[]),
    fault("gradients of a norm with the wrong sign", ForwardBackward, "indicator", Change::Output(|all| edit(all, "grad/blocks.0.norm1.weight", |g| g.iter_mut().for_each(|v| *v = -*v))), &[]),
    fault("gradients 1.5 times too large in even steps", TrainStep, "gpt2", Change::Output(enlarge_even_gradients), &[]),
    fault("sum instead of mean", ForwardBackward, "indicator", Change::Output(|all| edit(all, "grad/", |g| g.iter_mut().for_each(|v| *v *= 16.0))), &[]),
    fault("loss 5 % off", ForwardBackward, "indicator", Change::Output(|all| edit(all, "loss", |l| l[0] *= 1.05)), &[]),
    fault("loss 0.1 % off", ForwardBackward, "gpt2", Change::Output(|all| edit(all, "loss", |l| l[0] *= 1.001)), BF16),
    fault("a parameter without its update", TrainStep, "indicator", Change::Output(undo_update), &[]),
    fault("results of the first step (stale replay)", TrainStep, "indicator", Change::Output(|all| all[0].clone()), &[]),
    fault("results of the previous step", TrainStep, "gpt2", Change::Output(|all| all[all.len().saturating_sub(2)].clone()), &[]),
    fault("gradients accumulated over steps", ForwardBackward, "gpt2", Change::Output(accumulate_gradients), &[]),
    fault("dropout 0.2 instead of 0.1", TrainStep, "indicator", Change::DropoutInput(|f| f.dropout = Dropout::everywhere(0.2)), &[]),
    fault("dropout 0.01 instead of 0.1", TrainStep, "indicator", Change::DropoutInput(|f| f.dropout = Dropout::everywhere(0.01)), &[]),
    fault("no dropout", ForwardBackward, "indicator", Change::DropoutInput(|f| f.dropout = Dropout::NONE), &[]),
    fault("no dropout of attention's weights", AttentionGrad, "indicator", Change::DropoutInput(|f| f.dropout.weights = 0.0), &[]),
    fault("no dropout of the residual", TrainStep, "indicator", Change::DropoutInput(|f| f.dropout.residual = 0.0), &[]),
    fault("no dropout of the hidden units", FeedForwardGrad, "indicator", Change::DropoutInput(|f| f.dropout.hidden = 0.0), &[]),
    fault("no dropout in the heads", ForwardBackward, "indicator", Change::DropoutInput(|f| f.dropout.heads = 0.0), &[]),
    fault("dropout without 1/(1 − p)", FeedForwardGrad, "indicator", Change::DropoutOutput(|all| edit(all, "grad/feed-forward.down.weight", |g| g.iter_mut().for_each(|v| *v *= 0.9))), &[]),
    fault("dropout without 1/(1 − p) in one layer", TrainStep, "indicator", Change::DropoutInput(|f| scale(f, "blocks.0.feed-forward.down.weight", 0.9)), &[]),
    fault("the same masks in every step", TrainStep, "indicator", Change::DropoutOutput(|all| all[0].clone()), &[]),
    fault("no dropout of attention's weights, all tokens", ForwardBackward, "indicator", Change::NoiseInput(|f| f.dropout.weights = 0.0), &[]),
    fault("masks of attention's weights that samples share", TrainStep, "masked-tiny", Change::NoiseOutput(double_noise), &[]),
    fault("rotary theta 500 instead of 10,000", AttentionGrad, "grouped-tiny", Change::Model(|m| m.position = Position::Rotary(Rotary::new(500.0))), &[]),
    fault("no rotary positions", Attention, "grouped-tiny", Change::Model(|m| m.position = Position::None), &[]),
    fault("rotary pairs instead of halves", Attention, "grouped-tiny", Change::Input(pair_rotary_features), &[]),
    fault("query heads grouped in another order", Attention, "grouped-tiny", Change::Input(swap_two_heads), &[]),
    fault("one key head for all query heads", Attention, "grouped-tiny", Change::Input(copy_first_key_head), &[]),
    fault("gate and up projection swapped", FeedForward, "grouped-tiny", Change::Input(|f| swap_parameters(f, "feed-forward.gate.weight", "feed-forward.up.weight")), &[]),
    fault("no gate", FeedForward, "grouped-tiny", Change::Model(|m| m.glu = false), &[]),
    fault("layer norm instead of RMS norm", Forward, "grouped-tiny", Change::Model(|m| m.norm = NormKind::layer(m.norm.eps())), &[]),
    fault("RMS norm's ε of 1e-2", Forward, "grouped-tiny", Change::Model(|m| m.norm.set_eps(1e-2)), &[]),
    fault("no norm of queries and keys", Attention, "normed-tiny", Change::Model(|m| m.qk_norm = None), &[]),
    fault("norm of queries without weight", AttentionGrad, "normed-tiny", Change::Input(|f| fill(f, "attention.q-norm.weight", 1.0)), &[]),
    fault("ReLU not squared", FeedForward, "normed-tiny", Change::Model(|m| m.activation = Activation::Relu), &[]),
    fault("no norm after the embedding", Forward, "normed-tiny", Change::Model(|m| m.embedding_norm = false), &[]),
    fault("tied output instead of untied", Forward, "grouped-tiny", Change::Model(|m| m.output = Output::Tied), &[]),
    fault("no token type", Forward, "masked-tiny", Change::Model(|m| m.token_type = false), &[]),
    fault("no bias of the output", ForwardBackward, "masked-tiny", Change::Input(|f| fill(f, "output.bias", 0.0)), &[Bf16, Mixed]),
    fault("no dropout of the embedding", TrainStep, "masked-tiny", Change::DropoutInput(|f| f.dropout.embedding = 0.0), &[]),
    fault("no soft cap of the scores", Attention, "capped-tiny", Change::Model(|m| m.cap.scores = None), &[]),
    fault("no soft cap of the logits", Forward, "capped-tiny", Change::Model(|m| m.cap.logits = None), &[]),
    fault("embedding not scaled", Forward, "capped-tiny", Change::Model(|m| m.scale.embedding = 1.0), &[]),
    fault("blocks not scaled", ForwardBackward, "capped-tiny", Change::Model(|m| m.scale.residual = 1.0), &[]),
    fault("norm without its offset", Forward, "capped-tiny", Change::Input(|f| f.edit_parameter("blocks.0.norm1.weight", |w| w.iter_mut().for_each(|v| *v -= 1.0))), &[]),
    fault("no attention window", Attention, "capped-tiny", Change::Model(|m| m.second_attention = m.second_attention.map(|s| SecondAttention { window: None, ..s })), &[]),
    fault("one rotary base for all layers", Forward, "capped-tiny", Change::Model(|m| m.position = Position::Rotary(Rotary::new(1e4))), &[]),
    fault("blocks one after the other", Forward, "parallel-tiny", Change::Model(|m| m.norm_order = NormOrder::PreNorm), &[]),
    fault("rotary halves instead of pairs", Attention, "parallel-tiny", Change::Model(|m| edit_rotary(m, |r| r.pairs = false)), &[]),
    fault("all features rotate", Attention, "parallel-tiny", Change::Model(|m| edit_rotary(m, |r| r.share = 1.0)), &[]),
    fault("no factor on cosines and sines", AttentionGrad, "parallel-tiny", Change::Model(|m| edit_rotary(m, |r| r.factor = 1.0)), &[]),
    fault("no bias of an untied output", Forward, "parallel-tiny", Change::Input(|f| fill(f, "output.bias", 0.0)), &[]),
    fault("no dropout of an embedding without positions", TrainStep, "parallel-tiny", Change::DropoutInput(|f| f.dropout.embedding = 0.0), &[]),
    fault("dropout behind attention too", TrainStep, "parallel-tiny", Change::DropoutInput(|f| f.dropout.attention = None), &[]),
    fault("norms before the blocks instead of behind", Forward, "unturned-tiny", Change::Model(|m| m.norm_order = NormOrder::PreNorm), &[]),
    fault("rotary positions in every layer", Forward, "unturned-tiny", Change::Model(|m| m.second_attention = None), &[]),
    fault("TF32 in f32", ForwardBackward, "indicator", Change::Rounding(|| Rounding::for_precision(Tf32, Accumulation::Wide)), &[Tf32, Bf16, F16, Mixed, Amp]),
    fault("bf16 products in f32 and f16", ForwardBackward, "gpt2", Change::Rounding(|| Rounding::for_precision(Bf16, Accumulation::Wide)), BF16),
    fault("sums accumulated in bf16", FeedForwardGrad, "indicator", Change::Rounding(|| Rounding::for_precision(Bf16, Accumulation::Narrow)), BF16),
];

const fn of_matrices(step: muon::WrongStep) -> Change {
    Change::Update(WrongUpdate::of_matrices(step))
}

/// Returns the miniature of a built-in model, or one of [`OPTION_MODELS`].
fn miniature(name: &str) -> ModelId {
    let option_model = || OPTION_MODELS.iter().find(|m| m.name == name).copied().map(ModelId::intern);
    ModelId::named(name).map(ModelId::miniature).or_else(option_model).expect("a model of the suite")
}

/// A loaded case that returns changed results.
struct FaultyCase {
    inner: Box<dyn LoadedCase>,
    steps: Vec<Vec<Tensor>>,
    change: fn(&[Vec<Tensor>]) -> Vec<Tensor>,
}

impl FaultyCase {
    fn load(
        backend: &dyn Backend,
        fixture: &Fixture,
        change: fn(&[Vec<Tensor>]) -> Vec<Tensor>,
    ) -> Result<Self> {
        Ok(Self { inner: backend.load(fixture)?, steps: Vec::new(), change })
    }
}

impl LoadedCase for FaultyCase {
    fn step(&mut self) -> Result<()> {
        self.inner.step()?;
        self.steps.push(self.inner.outputs()?);
        Ok(())
    }

    fn set_inputs(&mut self, fixture: &Fixture) -> Result<()> {
        self.inner.set_inputs(fixture)
    }

    fn checkpoint(&mut self) -> Result<Vec<Tensor>> {
        self.inner.checkpoint()
    }

    fn restore(&mut self, checkpoint: &[Tensor], seed: u64) -> Result<()> {
        self.inner.restore(checkpoint, seed)
    }

    fn outputs(&mut self) -> Result<Vec<Tensor>> {
        Ok((self.change)(&self.steps))
    }
}

/// Checks the noise of dropout in a case that `load` loads.
fn check_noise(
    case: Case,
    checker: &mut ParityChecker,
    load: impl FnOnce(Fixture) -> Result<Box<dyn LoadedCase>>,
) -> Result<ParityResult> {
    let [probe] = &NoiseProbe::all(case, false)[..] else { unreachable!("one probe") };
    let mut loaded = load(probe.fixture())?;
    let mismatch = probe.check(loaded.as_mut(), &mut checker.noise, &probe.fixture())?;
    Ok(mismatch.map_or(Ok(0.0), Err))
}

impl Fault {
    /// Returns the case that detects the fault, at a miniature.
    pub fn case(&self, backend: &dyn Backend, method: Method) -> Case {
        let shape = match self.model.rsplit_once('-') {
            Some((model, "a4")) => Shape::for_model(miniature(model), 8).with_micro_batches(4),
            Some((model, "muon")) => Shape::for_model(miniature(model), 2).with_optimizer(Optimizer::Muon),
            Some((model, "lora4")) => Shape::for_model(miniature(model).with_lora(Lora::from_id("4")), 2),
            _ => Shape::for_workload(self.workload, miniature(self.model), 2),
        };
        Case { workload: self.workload, backend: backend.id(), method, shape }
    }

    /// Returns true if the fault changes the model that the backend loads.
    pub fn changes_model(&self) -> bool {
        matches!(self.change, Change::Model(_))
    }

    /// Checks a backend with this fault. The check must fail, unless the precision hides the fault.
    ///
    /// # Errors
    /// Returns an error if the backend fails.
    pub fn check(
        &self,
        backend: &dyn Backend,
        checker: &mut ParityChecker,
        method: Method,
    ) -> Result<ParityResult> {
        let case = self.case(backend, method);
        let accumulation = backend.accumulation();
        let mut fixture = Fixture::for_parity(case);
        let check_dropout = |probe: &Probe, loaded: &mut dyn LoadedCase| {
            let mismatch = dropout::check_loaded(probe, loaded, accumulation)?;
            Ok(mismatch.map_or(Ok(0.0), Err))
        };
        match self.change {
            Change::Input(edit) => {
                edit(&mut fixture);
                checker.check(backend, &Fixture::for_parity(case), &fixture)
            }
            Change::Model(edit) => {
                let mut model = *model_of(&fixture);
                edit(&mut model);
                let shape = Shape::for_workload(self.workload, ModelId::intern(model), case.shape.batch());
                checker.check(backend, &fixture, &Fixture::for_parity(Case { shape, ..case }))
            }
            Change::Output(change) => {
                let mut loaded = FaultyCase::load(backend, &fixture, change)?;
                checker.compare(&fixture, &mut loaded, accumulation)
            }
            Change::Update(update) => {
                let inner = backend.load(&fixture)?;
                let mut loaded = WrongOptimizer { inner, fixture: &fixture, update, state: Vec::new() };
                checker.compare(&fixture, &mut loaded, accumulation)
            }
            Change::DropoutInput(edit) => {
                let probe = Probe::new(case);
                let mut fixture = probe.fixture();
                edit(&mut fixture);
                check_dropout(&probe, backend.load(&fixture)?.as_mut())
            }
            Change::DropoutOutput(change) => {
                let probe = Probe::new(case);
                check_dropout(&probe, &mut FaultyCase::load(backend, &probe.fixture(), change)?)
            }
            Change::NoiseInput(edit) => check_noise(case, checker, |mut fixture| {
                edit(&mut fixture);
                backend.load(&fixture)
            }),
            Change::NoiseOutput(change) => check_noise(case, checker, |fixture| {
                Ok(Box::new(FaultyCase::load(backend, &fixture, change)?))
            }),
            Change::Rounding(rounding) => Ok(check_rounding(&fixture, rounding())),
        }
    }
}

/// Checks the results of the reference with other number formats.
fn check_rounding(fixture: &Fixture, rounding: Rounding) -> ParityResult {
    let results = reference::compute::<f32>(fixture, rounding, None);
    let tensor = |values: NamedValues<f32>| Tensor {
        dims: vec![values.data.len()],
        name: values.name,
        data: values.data,
    };
    let results: Vec<Tensor> = results.into_iter().map(tensor).collect();
    let expected = ReferenceCache::default().expected(fixture, Accumulation::Wide);
    compare_tensors(fixture.case, &expected, &results)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_lists_these_faults() {
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
            for precision in Precision::ALL {
                let listed = row[2].split([' ', ',']).any(|word| word == precision.id());
                assert_eq!(listed, fault.hidden.contains(precision), "{}: {precision}", fault.name);
            }
        }
    }
}
