//! The operations of a training step, each with its shapes, its number of calls, FLOPs and bytes.
//!
//! They are the calls of the eager networks of both frameworks. What a step does besides them, such as views, factors and
//! loops, is in no operation. `explain` compares the sum of all operations with the whole step.

use std::fmt;

use super::{Case, Shape, Variant};
use crate::model::parameters::ParameterSpec;
use crate::model::{Activation, Input, ModelId, NormKind, NormOrder, Output, Position};

/// A function of one call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Function {
    /// x·weightᵀ + bias
    Linear,
    /// The rows of a table [V, D] for tokens [B, T].
    Gather,
    Norm(NormKind),
    /// The rotary position of queries or keys: [B, T, H·d] to [B, H, T, d].
    Rotary,
    /// Scores [B, H, T, T] of queries and keys, with factor, soft cap and mask.
    Scores,
    Softmax,
    /// Weights [B, H, T, T] and values to [B, T, H·d].
    Values,
    /// Fused attention: queries, keys and values to [B, T, H·d].
    Attention,
    Activate(Activation),
    Multiply,
    Dropout(f64),
    Add,
    Loss,
}

/// Part of an operand in a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperandRole {
    /// A result of an earlier operation, which has a gradient.
    Activation,
    /// An input of the model, which has no gradient.
    Input,
    Parameter,
}

/// An operand of a call.
#[derive(Clone, Debug, PartialEq)]
pub struct Operand {
    pub name: &'static str,
    pub dims: Vec<usize>,
    pub role: OperandRole,
}

impl Operand {
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The part of an operation that is timed alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    Forward,
    /// Gradients of a linear layer's input.
    ByInput,
    /// Gradients of a linear layer's weight and bias.
    ByWeight,
    /// All gradients of another operation.
    Backward,
}

impl Pass {
    pub const ALL: [Self; 4] = [Self::Forward, Self::ByInput, Self::ByWeight, Self::Backward];

    pub fn id(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::ByInput => "by-input",
            Self::ByWeight => "by-weight",
            Self::Backward => "backward",
        }
    }

    /// Returns true if the pass computes the gradient of an operand with this role.
    pub fn differentiates(self, role: OperandRole) -> bool {
        match self {
            Self::Forward => false,
            Self::ByInput => role == OperandRole::Activation,
            Self::ByWeight => role == OperandRole::Parameter,
            Self::Backward => role != OperandRole::Input,
        }
    }
}

/// A call of a function with operands of these sizes.
#[derive(Clone, Debug, PartialEq)]
pub struct Operation {
    /// Lower-case words with hyphens, unique in a step.
    pub name: &'static str,
    pub function: Function,
    pub operands: Vec<Operand>,
    pub output: Vec<usize>,
    pub model: ModelId,
    /// Number of calls in a step.
    pub count: usize,
}

/// A pass of an operation. Its text is `name/pass`.
#[derive(Clone, Debug, PartialEq)]
pub struct OperationPass {
    pub operation: Operation,
    pub pass: Pass,
}

impl fmt::Display for OperationPass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.operation.name, self.pass.id())
    }
}

impl Operation {
    /// Returns the passes that a training step runs. An operation that only adds has no work in its backward pass.
    fn passes(&self) -> Vec<Pass> {
        let all: &[Pass] = match self.function {
            Function::Linear => &[Pass::Forward, Pass::ByInput, Pass::ByWeight],
            Function::Add => &[Pass::Forward],
            _ => &[Pass::Forward, Pass::Backward],
        };
        let is_run = |pass: &&Pass| {
            **pass == Pass::Forward || self.operands.iter().any(|operand| pass.differentiates(operand.role))
        };
        all.iter().filter(is_run).copied().collect()
    }
}

impl OperationPass {
    /// Returns the operands whose gradients the pass computes.
    pub fn differentiated(&self) -> impl Iterator<Item = &Operand> {
        self.operation.operands.iter().filter(|operand| self.pass.differentiates(operand.role))
    }

    /// Returns the names of the results: the output, and a gradient for each operand that the pass differentiates.
    pub fn result_names(&self) -> Vec<String> {
        let output = if self.operation.function == Function::Loss { "loss" } else { "out" };
        let gradients = self.differentiated().map(|operand| format!("grad/{}", operand.name));
        std::iter::once(output.to_owned()).chain(gradients).collect()
    }

    /// Returns the FLOPs of the matrix products of one call.
    pub fn flops(&self) -> u64 {
        let m = &self.operation.model;
        let output: usize = self.operation.output.iter().product();
        let product = match self.operation.function {
            Function::Linear => 2 * output * self.operation.operands[1].dims[1],
            Function::Scores => 2 * output * m.head_width,
            Function::Values => 2 * output * m.tokens,
            Function::Attention => 4 * output * m.tokens,
            _ => 0,
        };
        // Both operands of an attention product have a gradient.
        let products = if self.pass == Pass::Backward { 2 } else { 1 };
        (products * product) as u64
    }

    /// Returns the bytes that one call must move: each operand is read once, and each result is written once. A gradient of a
    /// linear layer reads the other operand only.
    pub fn bytes(&self, element: usize) -> u64 {
        let Operation { operands, output, .. } = &self.operation;
        let is_read = |operand: &&Operand| match self.pass {
            Pass::Forward | Pass::Backward => true,
            // The bias has no part in the gradients.
            Pass::ByInput => operand.name == "weight",
            Pass::ByWeight => operand.role != OperandRole::Parameter,
        };
        let read: usize = operands.iter().filter(is_read).map(Operand::len).sum();
        let written: usize = self.differentiated().map(Operand::len).sum();
        // A forward pass writes the output, and a backward pass reads its gradient.
        ((read + written + output.iter().product::<usize>()) * element) as u64
    }
}

/// Collects the operations of a step.
struct List {
    model: ModelId,
    batch: usize,
    all: Vec<Operation>,
}

fn operand(name: &'static str, dims: &[usize], role: OperandRole) -> Operand {
    Operand { name, dims: dims.to_vec(), role }
}

fn activation(name: &'static str, dims: &[usize]) -> Operand {
    operand(name, dims, OperandRole::Activation)
}

fn parameter(name: &'static str, dims: &[usize]) -> Operand {
    operand(name, dims, OperandRole::Parameter)
}

/// Returns the name of the operation of a linear layer, by the name of its weight.
fn linear_name(weight: &str, is_shared_width: bool) -> Option<&'static str> {
    let layer = weight.strip_suffix(".weight")?;
    let parts = layer.split('.').collect::<Vec<_>>();
    Some(match parts[..] {
        [.., "attention", "q" | "k" | "v"] if is_shared_width => "q-k-v",
        [.., "attention", "q"] => "q",
        [.., "attention", "k" | "v"] => "k-v",
        [.., "attention", "o"] => "attention-output",
        [.., "feed-forward", "gate" | "up"] => "feed-forward-up",
        [.., "feed-forward", "down"] => "feed-forward-down",
        ["value"] => "value-embedding",
        ["market"] => "market-embedding",
        ["output", "dense"] => "output-dense",
        ["output"] => "output-head",
        [_, "hidden"] => "head-hidden",
        [_, "out"] => "head-out",
        _ => return None,
    })
}

impl List {
    /// Adds calls of an operation. Those with a known name are counted together.
    fn add(
        &mut self,
        name: &'static str,
        function: Function,
        operands: Vec<Operand>,
        output: &[usize],
        count: usize,
    ) {
        if let Some(known) = self.all.iter_mut().find(|known| known.name == name) {
            debug_assert_eq!((&known.operands, &*known.output), (&operands, output), "{name}");
            known.count += count;
        } else if count > 0 {
            let output = output.to_vec();
            self.all.push(Operation { name, function, operands, output, model: self.model, count });
        }
    }

    /// Returns the dimensions [B, T, `width`].
    fn rows(&self, width: usize) -> [usize; 3] {
        [self.batch, self.model.tokens, width]
    }

    fn linears(&mut self, specs: &[ParameterSpec]) {
        let (q_width, kv_width) = self.model.qkv_widths();
        for spec in specs.iter().filter(|spec| spec.dims.len() == 2) {
            let Some(name) = linear_name(&spec.name, q_width == kv_width) else { continue };
            let (to, from) = (spec.dims[0], spec.dims[1]);
            let role =
                if name.ends_with("-embedding") { OperandRole::Input } else { OperandRole::Activation };
            let [x, output] = match name {
                "market-embedding" => [vec![self.batch, from], vec![self.batch, to]],
                _ => [self.rows(from).to_vec(), self.rows(to).to_vec()],
            };
            let bias = spec.name.replace(".weight", ".bias");
            let has_bias = specs.iter().any(|spec| spec.name == bias);
            let mut operands = vec![operand("x", &x, role), parameter("weight", &[to, from])];
            operands.extend(has_bias.then(|| parameter("bias", &[to])));
            self.add(name, Function::Linear, operands, &output, 1);
        }
        let (m, rows) = (self.model, self.rows(self.model.width));
        if matches!(m.output, Output::Tied | Output::MlmHead) {
            let mut operands = vec![activation("x", &rows), parameter("weight", &[m.vocabulary, m.width])];
            operands.extend((m.output == Output::MlmHead).then(|| parameter("bias", &[m.vocabulary])));
            self.add("output-head", Function::Linear, operands, &self.rows(m.vocabulary), 1);
        }
    }

    fn attention(&mut self, is_fused: bool, dropout: f64) {
        let m = self.model;
        let (q_width, kv_width) = m.qkv_widths();
        let (q, kv) = (self.rows(q_width), self.rows(kv_width));
        if matches!(m.position, Position::Rotary(_)) {
            let heads = [("rotary-queries", &q, m.heads), ("rotary-keys", &kv, m.key_value_heads)];
            for (name, dims, heads) in heads {
                let output = [self.batch, heads, m.tokens, m.head_width];
                self.add(name, Function::Rotary, vec![activation("x", dims)], &output, m.layers);
            }
        }
        if is_fused {
            let operands = vec![activation("q", &q), activation("k", &kv), activation("v", &kv)];
            return self.add("attention", Function::Attention, operands, &q, m.layers);
        }
        let scores = [self.batch, m.heads, m.tokens, m.tokens];
        let operands = vec![activation("q", &q), activation("k", &kv)];
        self.add("attention-scores", Function::Scores, operands, &scores, m.layers);
        self.add("softmax", Function::Softmax, vec![activation("x", &scores)], &scores, m.layers);
        self.dropout("weights-dropout", dropout, &scores, m.layers);
        let operands = vec![activation("weights", &scores), activation("v", &kv)];
        self.add("attention-values", Function::Values, operands, &q, m.layers);
    }

    fn dropout(&mut self, name: &'static str, p: f64, dims: &[usize], count: usize) {
        if p > 0.0 {
            self.add(name, Function::Dropout(p), vec![activation("x", dims)], dims, count);
        }
    }

    fn norm(&mut self, name: &'static str, kind: NormKind, dims: &[usize], count: usize) {
        let width = dims[dims.len() - 1];
        let (weight, bias) = kind.has_weight_and_bias();
        let mut operands = vec![activation("x", dims)];
        // The names contain "norm", by which the tolerance finds the sums of a norm.
        operands.extend(weight.then(|| parameter("norm.weight", &[width])));
        operands.extend(bias.then(|| parameter("norm.bias", &[width])));
        self.add(name, Function::Norm(kind), operands, dims, count);
    }

    fn norms(&mut self) {
        let m = self.model;
        let in_layer = 1 + usize::from(m.norm_order != NormOrder::ParallelSharedNorm);
        let in_layer = in_layer + 2 * usize::from(m.norm_order == NormOrder::SandwichNorm);
        let others = usize::from(m.embedding_norm) + usize::from(m.final_norm);
        let count = m.layers * in_layer + others + usize::from(m.output == Output::MlmHead);
        self.norm("norm", m.norm, &self.rows(m.width), count);
        if let Some(kind) = m.qk_norm {
            let widths = m.qk_norm_widths();
            let (q, kv) = m.qkv_widths();
            for (name, all, own) in [("q-norm", q, widths[0]), ("k-norm", kv, widths[1])] {
                self.norm(name, kind, &[self.batch, m.tokens, all / own, own], m.layers);
            }
        }
    }

    fn activations(&mut self) {
        let (m, hidden) = (self.model, self.rows(self.model.ffn_width));
        let operands = vec![activation("x", &hidden)];
        self.add("activation", Function::Activate(m.activation), operands, &hidden, m.layers);
        if m.glu {
            let operands = vec![activation("a", &hidden), activation("b", &hidden)];
            self.add("gate-product", Function::Multiply, operands, &hidden, m.layers);
        }
        match m.output {
            Output::IndicatorHeads => {
                let dims = self.rows(m.width / 2);
                let relu = Function::Activate(Activation::Relu);
                self.add("head-activation", relu, vec![activation("x", &dims)], &dims, 2);
            }
            Output::MlmHead => {
                let dims = self.rows(m.width);
                let function = Function::Activate(m.activation);
                self.add("head-activation", function, vec![activation("x", &dims)], &dims, 1);
            }
            Output::Tied | Output::Untied => {}
        }
    }

    /// Adds the additions of the residual stream, and those of the gradients of values that several operations use: the
    /// stream itself, and the input of the projections of a layer.
    fn additions(&mut self) {
        let (m, rows) = (self.model, self.rows(self.model.width));
        let mut add = |name, count| {
            self.add(name, Function::Add, vec![activation("a", &rows), activation("b", &rows)], &rows, count);
        };
        let positions = usize::from(m.position == Position::Learned);
        add("residual-sum", 2 * m.layers + positions + usize::from(m.input != Input::Tokens));
        add("gradient-sum", (4 + usize::from(m.glu)) * m.layers);
    }

    fn embedding_and_loss(&mut self) {
        let (m, rows) = (self.model, self.rows(self.model.width));
        let tokens = [self.batch, m.tokens];
        if m.is_language_model() {
            let table = parameter("table", &[m.vocabulary, m.width]);
            let operands = vec![table, operand("tokens", &tokens, OperandRole::Input)];
            self.add("embedding", Function::Gather, operands, &rows, 1);
        }
        let operands = match m.output {
            Output::IndicatorHeads => {
                let usefulness = operand("usefulness", &tokens, OperandRole::Input);
                vec![activation("selection", &tokens), activation("weights", &tokens), usefulness]
            }
            _ => {
                let logits = activation("logits", &self.rows(m.vocabulary));
                vec![logits, operand("next", &tokens, OperandRole::Input)]
            }
        };
        self.add("loss", Function::Loss, operands, &[], 1);
    }
}

/// Checks that the operations of a case can be timed alone.
///
/// # Errors
/// Returns the reason if they cannot.
pub fn check_separable(case: &Case) -> Result<(), String> {
    match (case.method.variant, case.shape) {
        (Variant::Sdpa, Shape::Model { .. }) if case.dropout().weights > 0.0 => {
            Err("fused attention draws the mask of its dropout, so its result alone cannot be checked"
                .to_owned())
        }
        (Variant::Eager | Variant::Sdpa, Shape::Model { .. }) if !case.has_adapters() => Ok(()),
        (_, Shape::Model { .. }) if case.has_adapters() => {
            Err("adapters train a small part of the model, and have no list of operations".to_owned())
        }
        _ => Err(format!("{case}: use an eager training step: the parts of others cannot be timed alone")),
    }
}

/// Returns the operations of a training step in the order of the forward pass, without the optimizer.
///
/// # Panics
/// Panics if the shape is not a whole model.
pub fn operations(case: &Case) -> Vec<Operation> {
    let Shape::Model { model, .. } = case.shape else { panic!("{case} has no whole model") };
    let batch = case.shape.micro_batch().batch();
    let mut list = List { model, batch, all: Vec::new() };
    let (m, dropout) = (model, case.dropout());
    list.embedding_and_loss();
    list.norms();
    list.linears(&case.shape.parameter_specs());
    let is_fused = case.fuses_attention() && dropout.weights == 0.0;
    list.attention(is_fused, dropout.weights);
    list.activations();
    let rows = list.rows(m.width);
    list.dropout("embedding-dropout", dropout.embedding, &rows, 1);
    list.dropout("attention-dropout", dropout.attention(), &rows, m.layers);
    list.dropout("residual-dropout", dropout.residual, &rows, m.layers);
    list.dropout("hidden-dropout", dropout.hidden, &list.rows(m.ffn_width), m.layers);
    if m.output == Output::IndicatorHeads {
        list.dropout("head-dropout", dropout.heads, &list.rows(m.width / 2), 2);
    }
    list.additions();
    // Several micro-batches repeat all operations.
    list.all.iter_mut().for_each(|operation| operation.count *= case.shape.micro_batches());
    list.all
}

/// Returns the passes of all operations of a training step.
pub fn operation_passes(case: &Case) -> Vec<OperationPass> {
    let passes = |operation: Operation| {
        let all = operation.passes().into_iter();
        all.map(|pass| OperationPass { operation: operation.clone(), pass }).collect::<Vec<_>>()
    };
    operations(case).into_iter().flat_map(passes).collect()
}
