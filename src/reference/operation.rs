//! A single operation of a training step, with its gradients.

use super::attention::Scores;
use super::autograd::{Graph, Var};
use super::batch::{LOSS_TERMS, NamedValues};
use super::matmul::{Matrix, Real, cores};
use super::network::{Batch, Sample};
use super::rounding::Rounding;
use crate::fixture::{OperationFixture, Tensor, fill_hidden};
use crate::model::parameters::Norm;
use crate::model::{Model, Output, Position};
use crate::suite::operations::{Function, OperandRole};

/// Rows and columns of a matrix in the values of a sample.
#[derive(Clone, Copy)]
struct Slot {
    first: [usize; 2],
    size: [usize; 2],
    /// True if the function takes the transpose.
    transposed: bool,
}

impl Slot {
    const fn new(first: [usize; 2], size: [usize; 2]) -> Self {
        Self { first, size, transposed: false }
    }

    const fn transposed(self) -> Self {
        Self { transposed: true, ..self }
    }

    /// Returns each element's place in a matrix of `columns` columns, in the order of the function's operand.
    fn places(self, columns: usize) -> impl Iterator<Item = usize> {
        let [rows, own] = self.size;
        let (outer, inner) = if self.transposed { (own, rows) } else { (rows, own) };
        let place = move |i: usize, j: usize| {
            let [row, column] = if self.transposed { [j, i] } else { [i, j] };
            (self.first[0] + row) * columns + self.first[1] + column
        };
        (0..outer).flat_map(move |i| (0..inner).map(move |j| place(i, j)))
    }

    /// Returns the rows and columns of the function's operand.
    fn operand_size(self) -> [usize; 2] {
        let [rows, columns] = self.size;
        if self.transposed { [columns, rows] } else { [rows, columns] }
    }
}

/// Returns the rows and columns of a value: of a sample's part, or of a parameter.
fn matrix_size(dims: &[usize], role: OperandRole, batch: usize) -> [usize; 2] {
    let columns = dims.last().copied().unwrap_or(1);
    let len: usize = dims.iter().product();
    let of_batch = if role == OperandRole::Parameter { 1 } else { batch };
    [(len / of_batch / columns).max(1), columns]
}

/// An operation that is computed.
struct Computation<'a> {
    fixture: &'a OperationFixture,
    batch: Batch<'a>,
    /// Sizes of the operands' matrices, then of the output's.
    sizes: Vec<[usize; 2]>,
}

/// The results of one sample: the output, and the gradient of each operand that is differentiated.
struct SampleValues<R> {
    output: Vec<R>,
    gradients: Vec<Vec<R>>,
}

/// Returns the output of an operation, and the gradients that its pass computes. `loss` is followed by [`LOSS_TERMS`].
///
/// # Panics
/// Panics for dropout, whose result is random.
pub fn operation<R: Real>(fixture: &OperationFixture, rounding: Rounding) -> Vec<NamedValues<R>> {
    let operation = &fixture.part.operation;
    let batch = fixture.step.samples().len();
    let size = |(dims, role): (&[usize], OperandRole)| matrix_size(dims, role, batch);
    let operands = operation.operands.iter().map(|operand| (&*operand.dims, operand.role));
    let output = std::iter::once((&*operation.output, OperandRole::Activation));
    let computation = Computation {
        fixture,
        batch: Batch { fixture: &fixture.step, model: &operation.model, rounding, masks: None },
        sizes: operands.chain(output).map(size).collect(),
    };
    let order = fixture.step.samples();
    let distinct = order.iter().max().map_or(0, |most| most + 1);
    let samples: Vec<SampleValues<R>> = (0..distinct).map(|index| computation.sample(index)).collect();
    computation.combine(order, &samples)
}

impl Computation<'_> {
    fn model(&self) -> &Model {
        self.batch.model
    }

    /// Returns the matrices of each call of the function for a sample: those of the operands, then that of the output.
    fn calls(&self) -> Vec<Vec<Slot>> {
        let m = self.model();
        let (heads, tokens, width) = (m.heads, m.tokens, m.head_width);
        let key_value = |head: usize| head * m.key_value_heads / heads;
        let columns = |head: usize| Slot::new([0, head * width], [tokens, width]);
        let rows = |head: usize, columns: usize| Slot::new([head * tokens, 0], [tokens, columns]);
        match self.fixture.part.operation.function {
            Function::Scores => (0..heads)
                .map(|head| vec![columns(head), columns(key_value(head)), rows(head, tokens)])
                .collect(),
            Function::Values => (0..heads)
                .map(|head| vec![rows(head, tokens), columns(key_value(head)).transposed(), columns(head)])
                .collect(),
            Function::Rotary => {
                let heads = self.sizes[0][1] / width;
                (0..heads).map(|head| vec![columns(head), rows(head, width)]).collect()
            }
            // A softmax is over a row.
            Function::Softmax => {
                let row = |row| Slot::new([row, 0], [1, tokens]);
                (0..heads * tokens).map(|i| vec![row(i), row(i)]).collect()
            }
            // The loss of a sample has columns.
            Function::Loss if m.output == Output::IndicatorHeads => {
                let column = Slot::new([0, 0], [1, tokens]).transposed();
                vec![vec![column, column, column, Slot::new([0, 0], [1, 1])]]
            }
            _ => vec![self.sizes.iter().map(|&size| Slot::new([0, 0], size)).collect()],
        }
    }

    /// Returns this sample's part of a tensor, or all of a parameter.
    fn values<'t>(&self, tensor: &'t Tensor, role: OperandRole, index: usize) -> &'t [f32] {
        let order = self.fixture.step.samples();
        if role == OperandRole::Parameter {
            return &tensor.data;
        }
        let each = tensor.data.len() / order.len();
        let at = order.iter().position(|&i| i == index).expect("a sample of the fixture");
        &tensor.data[at * each..(at + 1) * each]
    }

    fn sample<R: Real>(&self, index: usize) -> SampleValues<R> {
        let operation = &self.fixture.part.operation;
        let count = operation.operands.len();
        let zeros = |[rows, columns]: [usize; 2]| vec![R::zero(); rows * columns];
        let mut all = SampleValues {
            output: zeros(self.sizes[count]),
            gradients: self.sizes[..count].iter().map(|_| Vec::new()).collect(),
        };
        for slots in self.calls() {
            let graph = Graph::new(self.batch.rounding, cores());
            let mut sample = Sample { graph, batch: &self.batch, index };
            let mut vars = Vec::new();
            for (i, operand) in operation.operands.iter().enumerate() {
                let values = self.values(&self.fixture.operands[i], operand.role, index);
                let data = slots[i].places(self.sizes[i][1]).map(|at| R::from_f32(values[at])).collect();
                let [rows, columns] = slots[i].operand_size();
                vars.push(sample.graph.leaf(Matrix::new(rows, columns, data)));
            }
            let output = self.apply(&mut sample, &vars);
            let result = &sample.graph.get(output).data;
            if operation.function == Function::Loss {
                all.output.clone_from(result);
            } else {
                let places = slots[count].places(self.sizes[count][1]);
                places.zip(result).for_each(|(at, &v)| all.output[at] = v);
            }
            self.add_gradients(sample.graph, output, (&vars, &slots), index, &mut all);
        }
        all
    }

    /// Adds the gradients of a call to those of its sample.
    fn add_gradients<R: Real>(
        &self,
        graph: Graph<R>,
        output: Var,
        (vars, slots): (&[Var], &[Slot]),
        index: usize,
        all: &mut SampleValues<R>,
    ) {
        let part = &self.fixture.part;
        if part.differentiated().next().is_none() {
            return;
        }
        let count = vars.len();
        let upstream = if part.operation.function == Function::Loss {
            Matrix::default()
        } else {
            let values = self.values(&self.fixture.upstream, OperandRole::Activation, index);
            let data = slots[count].places(self.sizes[count][1]).map(|at| R::from_f32(values[at])).collect();
            let [rows, columns] = slots[count].operand_size();
            Matrix::new(rows, columns, data)
        };
        let mut gradients = graph.backward(output, upstream);
        for (i, operand) in part.operation.operands.iter().enumerate() {
            if !part.pass.differentiates(operand.role) {
                continue;
            }
            let Some(own) = gradients.take(vars[i]) else { continue };
            let sum = &mut all.gradients[i];
            // The gradient of a leaf with one row has a row per token.
            if operand.role == OperandRole::Parameter {
                *sum = own.data;
                continue;
            }
            sum.resize(self.sizes[i][0] * self.sizes[i][1], R::zero());
            slots[i].places(self.sizes[i][1]).zip(own.data).for_each(|(at, v)| sum[at] += v);
        }
    }

    fn apply<R: Real>(&self, sample: &mut Sample<'_, R>, vars: &[Var]) -> Var {
        let (m, fixture) = (self.model(), self.fixture);
        let optional = |name: &str| fixture.operand(name).map(|i| vars[i]);
        let graph = &mut sample.graph;
        match fixture.part.operation.function {
            Function::Linear => graph.linear(vars[0], vars[1], optional("bias")),
            Function::Gather => {
                let tokens = sample.input("tokens").iter().map(|&token| token as usize).collect();
                sample.graph.gather(vars[0], tokens)
            }
            Function::Norm(kind) => {
                let layer = Norm { weight: optional("norm.weight"), bias: optional("norm.bias") };
                graph.norm(vars[0], self.sizes[0][1], &layer, kind)
            }
            Function::Rotary => {
                let Position::Rotary(rotary) = m.attention_kind(0).position else { return vars[0] };
                graph.rotary(vars[0], m.head_width, &rotary)
            }
            Function::Scores => {
                let scores = graph.linear(vars[0], vars[1], None);
                let scores = graph.scale(scores, m.score_scale());
                graph.cap(scores, m.cap.scores)
            }
            Function::Softmax => graph.softmax(vars[0]),
            Function::Values => graph.linear(vars[0], vars[1], None),
            Function::Attention => {
                let visible = |token| m.visible_tokens(0, token);
                let scores = Scores { heads: m.heads, scale: m.score_scale(), cap: None, visible: &visible };
                graph.attention([vars[0], vars[1], vars[2]], &scores, |_| None)
            }
            Function::Activate(kind) => graph.activate(vars[0], kind),
            Function::Multiply => graph.mul(vars[0], vars[1]),
            Function::Add => graph.add(vars[0], vars[1]),
            Function::Loss => {
                let scale = R::from_f64(1.0 / (fixture.step.samples().len() * m.tokens) as f64);
                match m.output {
                    Output::IndicatorHeads => sample.indicator_loss([vars[0], vars[1]], scale),
                    _ => sample.cross_entropy(vars[0], scale),
                }
            }
            Function::Dropout(_) => unreachable!("dropout is checked by its mask"),
        }
    }

    /// Returns the results of the batch. `order` has the sample at each place.
    fn combine<R: Real>(&self, order: &[usize], samples: &[SampleValues<R>]) -> Vec<NamedValues<R>> {
        let part = &self.fixture.part;
        let concat = |values: &dyn Fn(&SampleValues<R>) -> &[R]| -> Vec<R> {
            order.iter().flat_map(|&i| values(&samples[i]).iter().copied()).collect()
        };
        let named = |name: &str, data| NamedValues { name: name.to_owned(), data };
        let mut output = concat(&|sample| &sample.output);
        if part.operation.function == Function::Scores {
            fill_hidden(part, &mut output, |_| R::zero());
        }
        let mut all = match part.operation.function {
            Function::Loss => {
                vec![named("loss", vec![output.iter().copied().sum()]), named(LOSS_TERMS, output)]
            }
            _ => vec![named("out", output)],
        };
        let rounding = self.batch.rounding;
        for (i, operand) in part.operation.operands.iter().enumerate() {
            if !part.pass.differentiates(operand.role) {
                continue;
            }
            let mut data = match (operand.role, operand.dims.len()) {
                (OperandRole::Parameter, 1) => {
                    let mut sum = vec![R::zero(); operand.len()];
                    let is_norm = operand.name.contains("norm");
                    for &sample in order {
                        let rows = &samples[sample].gradients[i];
                        rounding.add_rows(rounding.product, is_norm, &mut sum, rows);
                    }
                    sum
                }
                (OperandRole::Parameter, _) => {
                    let mut sum = vec![R::zero(); operand.len()];
                    for &sample in order {
                        let own = &samples[sample].gradients[i];
                        sum.iter_mut().zip(own).for_each(|(sum, &v)| *sum += v);
                    }
                    sum
                }
                _ => concat(&|sample| &sample.gradients[i]),
            };
            rounding.round_all(rounding.product, &mut data, cores());
            all.push(named(&format!("grad/{}", operand.name), data));
        }
        all
    }
}
