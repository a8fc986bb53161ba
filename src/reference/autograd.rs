//! Reverse-mode automatic differentiation over matrices, for one sample of N rows. Each result is stored as the
//! [`Rounding`] says.

use std::borrow::Cow;

use super::activation::{activate, activation_gradient, soft_cap, softmax};
use super::matmul::{Matrix, Real};
use super::rounding::{Accumulation, Format, Rounding};
use crate::model::parameters::Norm;
use crate::model::{Activation, NormKind, Rotary};

/// A matrix on the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Var(usize);

/// The gradients of the leaves of a graph.
pub struct Gradients<R>(Vec<Option<Matrix<R>>>);

impl<R> Gradients<R> {
    /// Removes and returns the gradient of a leaf. Returns `None` if the result does not depend on it.
    pub fn take(&mut self, leaf: Var) -> Option<Matrix<R>> {
        self.0[leaf.0].take()
    }
}

struct Node<R> {
    value: Matrix<R>,
    /// The format of its value and of its gradient.
    format: Format,
    op: Op<R>,
}

/// The attention weights of a head, which its gradient needs.
pub struct HeadWeights<R> {
    pub weights: Matrix<R>,
    pub dropout: Option<Matrix<R>>,
    /// The backward pass of a fused kernel computes the weights again, as exp(score − logarithm). The rounding error of
    /// the logarithm, one per row, is then a relative error of the weights.
    pub logarithm_errors: Vec<R>,
    /// The derivatives of the soft cap of the scores, if there is one.
    pub cap_slopes: Option<Matrix<R>>,
}

/// An operation, with the values that its gradient needs.
pub(super) enum Op<R> {
    Leaf,
    /// x·weightᵀ + bias
    Linear {
        x: Var,
        weight: Var,
        bias: Option<Var>,
    },
    Add(Var, Var),
    /// Adds the single row of the second to each row of the first.
    AddRow(Var, Var),
    Mul(Var, Var),
    /// Multiplies by a constant.
    Scale(Var, R),
    /// Adds a constant.
    Shift(Var),
    /// cap · tanh(x / cap)
    Cap(Var, R),
    Norm {
        x: Var,
        weight: Option<Var>,
        bias: Option<Var>,
        /// True if the mean is subtracted.
        centered: bool,
        /// The normalised values before weight and bias, with a row per group of features.
        normalised: Matrix<R>,
        /// 1 / deviation of each row of `normalised`.
        inverse_deviations: Vec<R>,
    },
    Rotary {
        x: Var,
        angles: Angles<R>,
    },
    Attention {
        qkv: [Var; 3],
        scale: R,
        heads: Vec<HeadWeights<R>>,
    },
    Activate(Var, Activation),
    Relu(Var),
    /// Multiplies each element by a factor.
    Dropout(Var, Matrix<R>),
    /// Softmax over the rows of a single column.
    Softmax(Var),
    /// Selects rows of a table.
    Gather(Var, Vec<usize>),
    /// The terms of a loss, with the gradients of their sum.
    Loss(Vec<(Var, Matrix<R>)>),
}

/// The rotation of the heads of each token.
pub(super) struct Angles<R> {
    /// Cosines and sines [N, pairs].
    cos_sin: [Matrix<R>; 2],
    head_width: usize,
    /// True if a pair is two neighboring features.
    pairs: bool,
}

/// The operations of a step, in order.
pub struct Graph<R> {
    nodes: Vec<Node<R>>,
    pub(super) rounding: Rounding,
    pub(super) threads: usize,
}

impl<R: Real> Graph<R> {
    pub fn new(rounding: Rounding, threads: usize) -> Self {
        Self { nodes: Vec::new(), rounding, threads }
    }

    /// Appends an operation. Its result is rounded to `format`, unless it is a leaf.
    pub(super) fn push(&mut self, mut value: Matrix<R>, format: Format, op: Op<R>) -> Var {
        if !matches!(op, Op::Leaf) {
            self.rounding.round_all(format, &mut value.data, self.threads);
        }
        self.nodes.push(Node { value, format, op });
        Var(self.nodes.len() - 1)
    }

    pub fn leaf(&mut self, value: Matrix<R>) -> Var {
        let format = self.rounding.leaf;
        self.push(value.map(self.threads, |v| format.round(v)), format, Op::Leaf)
    }

    pub fn get(&self, a: Var) -> &Matrix<R> {
        &self.nodes[a.0].value
    }

    /// Returns the value, rounded as an operand of a product.
    pub(super) fn operand(&self, a: Var) -> Cow<'_, Matrix<R>> {
        self.as_operand(self.get(a), self.nodes[a.0].format)
    }

    /// Rounds a value of `format` as an operand of a product.
    pub(super) fn as_operand<'a>(&self, value: &'a Matrix<R>, format: Format) -> Cow<'a, Matrix<R>> {
        let operand = self.rounding.operand;
        if operand == Format::Unrounded || operand == format {
            return Cow::Borrowed(value);
        }
        Cow::Owned(value.map(self.threads, |v| operand.round(v)))
    }

    /// x [N, in], weight [out, in], bias [1, out] → [N, out]
    pub fn linear(&mut self, x: Var, weight: Var, bias: Option<Var>) -> Var {
        let mut y = self.operand(x).view().product(self.operand(weight).view().transposed(), self.threads);
        if let Some(bias) = bias {
            add_to_each_row(&mut y.data, &self.operand(bias).data);
        }
        self.push(y, self.rounding.product, Op::Linear { x, weight, bias })
    }

    pub fn add(&mut self, a: Var, b: Var) -> Var {
        self.add_as(a, b, self.rounding.stream)
    }

    /// Adds two results of products in their format.
    pub fn add_products(&mut self, a: Var, b: Var) -> Var {
        self.add_as(a, b, self.rounding.product)
    }

    fn add_as(&mut self, a: Var, b: Var, format: Format) -> Var {
        let sum = self.get(a).zip(self.get(b), self.threads, |a, b| a + b);
        self.push(sum, format, Op::Add(a, b))
    }

    /// x [N, D], row [1, D] → [N, D]
    pub fn add_row(&mut self, x: Var, row: Var) -> Var {
        let mut sum = self.get(x).clone();
        add_to_each_row(&mut sum.data, &self.get(row).data);
        self.push(sum, self.rounding.stream, Op::AddRow(x, row))
    }

    pub fn mul(&mut self, a: Var, b: Var) -> Var {
        let y = self.get(a).zip(self.get(b), self.threads, |a, b| a * b);
        self.push(y, self.nodes[a.0].format, Op::Mul(a, b))
    }

    /// Multiplies by a constant in the format of `x`.
    pub fn scale(&mut self, x: Var, factor: f64) -> Var {
        if factor == 1.0 {
            return x;
        }
        let format = self.nodes[x.0].format;
        let factor = format.round(R::from_f64(factor));
        let y = self.get(x).map(self.threads, |v| v * factor);
        self.push(y, format, Op::Scale(x, factor))
    }

    /// Limits values softly: cap · tanh(x / cap).
    pub fn cap(&mut self, x: Var, cap: Option<f64>) -> Var {
        let Some(cap) = cap.map(R::from_f64) else { return x };
        let format = self.nodes[x.0].format;
        let r = |v| self.rounding.round(format, v);
        let y = self.get(x).map(self.threads, |v| soft_cap(v, cap, &r).0);
        self.push(y, format, Op::Cap(x, cap))
    }

    /// Returns the layer with 1 + weight as its weight, if that is the kind of the norm.
    fn with_offset(&mut self, layer: &Norm<Var>, kind: NormKind) -> Norm<Var> {
        let weight = layer.weight.map(|weight| {
            if !kind.has_offset() {
                return weight;
            }
            let sum = self.get(weight).map(1, |w| R::one() + w);
            self.push(sum, self.nodes[weight.0].format, Op::Shift(weight))
        });
        Norm { weight, bias: layer.bias }
    }

    /// Normalises each group of `width` features.
    pub fn norm(&mut self, x: Var, width: usize, layer: &Norm<Var>, kind: NormKind) -> Var {
        let centered = matches!(kind, NormKind::Layer { .. });
        let Norm { weight, bias } = self.with_offset(layer, kind);
        let values = self.get(x);
        let (rows, columns) = (values.rows, values.columns);
        let (count, eps) = (R::from_f64(width as f64), R::from_f64(kind.eps()));
        let mut normalised = values.clone();
        let mut inverse_deviations = Vec::with_capacity(values.rows);
        for row in normalised.data.chunks_mut(width) {
            let mean = if centered { row.iter().copied().sum::<R>() / count } else { R::zero() };
            row.iter_mut().for_each(|v| *v = *v - mean);
            let variance = row.iter().map(|&v| v * v).sum::<R>() / count;
            let scale = R::one() / (variance + eps).sqrt();
            row.iter_mut().for_each(|v| *v *= scale);
            inverse_deviations.push(scale);
        }
        let mut y = normalised.data.clone();
        for row in y.chunks_mut(width) {
            if let Some(weight) = weight {
                row.iter_mut().zip(&self.get(weight).data).for_each(|(v, &w)| *v *= w);
            }
            if let Some(bias) = bias {
                row.iter_mut().zip(&self.get(bias).data).for_each(|(v, &b)| *v += b);
            }
        }
        (normalised.rows, normalised.columns) = (rows * columns / width, width);
        let op = Op::Norm { x, weight, bias, centered, normalised, inverse_deviations };
        self.push(Matrix::new(rows, columns, y), self.rounding.stream, op)
    }

    /// Rotates pairs of features in each head of `head_width` columns by token · frequency.
    pub fn rotary(&mut self, x: Var, head_width: usize, rotary: &Rotary) -> Var {
        let (rows, format) = (self.get(x).rows, self.rounding.stream);
        let factor = R::from_f64(rotary.factor);
        let frequencies: Vec<R> = rotary.frequencies(head_width).into_iter().map(R::from_f64).collect();
        let table = |function: fn(R) -> R| {
            let value = |token: usize, frequency: R| function(R::from_f64(token as f64) * frequency) * factor;
            let row = |token| frequencies.iter().map(move |&frequency| format.round(value(token, frequency)));
            Matrix::new(rows, frequencies.len(), (0..rows).flat_map(row).collect())
        };
        let angles = Angles { cos_sin: [table(R::cos), table(R::sin)], head_width, pairs: rotary.pairs };
        let y = self.rotated(self.get(x), format, &angles, false);
        self.push(y, format, Op::Rotary { x, angles })
    }

    /// Rotates each head by its row's angles, or back.
    fn rotated(&self, x: &Matrix<R>, format: Format, angles: &Angles<R>, back: bool) -> Matrix<R> {
        let r = |v: R| self.rounding.round(format, v);
        let mut y = x.clone();
        let [cos, sin] = &angles.cos_sin;
        let half = cos.columns;
        for (n, row) in y.data.chunks_mut(x.columns).enumerate() {
            for head in row.chunks_mut(angles.head_width) {
                for i in 0..half {
                    let (first, second) = if angles.pairs { (2 * i, 2 * i + 1) } else { (i, i + half) };
                    let (a, b) = (head[first], head[second]);
                    let (cos, mut sin) = (cos.row(n)[i], sin.row(n)[i]);
                    if back {
                        sin = -sin;
                    }
                    (head[first], head[second]) = (r(a * cos) - r(b * sin), r(b * cos) + r(a * sin));
                }
            }
        }
        y
    }

    pub fn activate(&mut self, x: Var, kind: Activation) -> Var {
        let format = self.nodes[x.0].format;
        let round = |v| self.rounding.round(format, v);
        let y = self.get(x).map(self.threads, |v| activate(v, kind, &round));
        self.push(y, format, Op::Activate(x, kind))
    }

    pub fn relu(&mut self, x: Var) -> Var {
        let y = self.get(x).map(self.threads, |v| v.max(R::zero()));
        self.push(y, self.nodes[x.0].format, Op::Relu(x))
    }

    /// Multiplies by dropout's factors. Returns `x` if there are none.
    pub fn dropout(&mut self, x: Var, factors: Option<Matrix<R>>) -> Var {
        let Some(factors) = factors else { return x };
        let y = self.get(x).zip(&factors, self.threads, |v, f| v * f);
        self.push(y, self.nodes[x.0].format, Op::Dropout(x, factors))
    }

    pub fn softmax(&mut self, x: Var) -> Var {
        let mut y = self.get(x).clone();
        let _ = softmax(&mut y.data);
        self.push(y, self.rounding.stream, Op::Softmax(x))
    }

    /// table [V, D] → [N, D]
    pub fn gather(&mut self, table: Var, indices: Vec<usize>) -> Var {
        let all = self.get(table);
        let data = indices.iter().flat_map(|&i| all.row(i)).copied().collect();
        let y = Matrix::new(indices.len(), all.columns, data);
        self.push(y, self.nodes[table.0].format, Op::Gather(table, indices))
    }

    /// Appends the terms of a loss, and the gradients of their sum. A loss is never rounded: every precision
    /// computes it in f32.
    pub fn loss(&mut self, terms: Vec<R>, gradients: Vec<(Var, Matrix<R>)>) -> Var {
        self.push(Matrix::new(terms.len(), 1, terms), Format::Unrounded, Op::Loss(gradients))
    }

    /// Returns the gradients of the leaves, given the gradient of `result`.
    ///
    /// They are not rounded. The gradient of a leaf with one row has a row per token, because
    /// [`Rounding::add_rows`] adds up the rows of all samples.
    pub fn backward(self, result: Var, upstream: Matrix<R>) -> Gradients<R> {
        let mut all: Vec<Option<Matrix<R>>> = self.nodes.iter().map(|_| None).collect();
        all[result.0] = Some(upstream);
        for (index, node) in self.nodes.iter().enumerate().rev() {
            if matches!(node.op, Op::Leaf) {
                continue;
            }
            let Some(gradient) = all[index].take() else { continue };
            for (operand, mut part) in self.operand_gradients(node, &gradient) {
                let leaf = matches!(self.nodes[operand.0].op, Op::Leaf);
                let format = self.nodes[operand.0].format;
                if !leaf {
                    self.rounding.round_all(format, &mut part.data, self.threads);
                }
                match &mut all[operand.0] {
                    Some(sum) => {
                        sum.add(&part);
                        if !leaf {
                            self.rounding.round_all(format, &mut sum.data, self.threads);
                        }
                    }
                    empty => *empty = Some(part),
                }
            }
        }
        Gradients(all)
    }

    /// Returns the gradients of a node's operands, given its own gradient `g`.
    fn operand_gradients(&self, node: &Node<R>, g: &Matrix<R>) -> Vec<(Var, Matrix<R>)> {
        match &node.op {
            Op::Leaf => Vec::new(),
            Op::Linear { x, weight, bias } => {
                let read = self.as_operand(g, node.format);
                let to_x = read.view().product(self.operand(*weight).view(), self.threads);
                let to_weight = read.view().transposed().product(self.operand(*x).view(), self.threads);
                let mut all = vec![(*x, to_x), (*weight, to_weight)];
                all.extend(bias.map(|bias| (bias, self.row_gradient(bias, g.clone()))));
                all
            }
            Op::Add(a, b) => vec![(*a, g.clone()), (*b, g.clone())],
            Op::AddRow(x, row) => vec![(*x, g.clone()), (*row, self.row_gradient(*row, g.clone()))],
            Op::Mul(a, b) => {
                let times = |other: Var| g.zip(self.get(other), self.threads, |g, v| g * v);
                vec![(*a, times(*b)), (*b, times(*a))]
            }
            Op::Scale(x, factor) => vec![(*x, g.map(self.threads, |g| g * *factor))],
            Op::Shift(x) => vec![(*x, g.clone())],
            Op::Cap(x, cap) => {
                let round = |v| self.rounding.round(node.format, v);
                let to_x = |v: R, g: R| g * soft_cap(v, *cap, &round).1;
                vec![(*x, self.get(*x).zip(g, self.threads, to_x))]
            }
            Op::Norm { .. } => self.norm_gradients(&node.op, g),
            Op::Rotary { x, angles } => vec![(*x, self.rotated(g, node.format, angles, true))],
            Op::Attention { qkv, scale, heads } => {
                self.attention_gradients(*qkv, *scale, heads, &node.value, g)
            }
            Op::Activate(x, kind) => {
                let round = |v| self.rounding.round(node.format, v);
                let to_x = |v: R, g: R| activation_gradient(v, g, *kind, &round);
                vec![(*x, self.get(*x).zip(g, self.threads, to_x))]
            }
            Op::Relu(x) => {
                let to_x = |v: R, g: R| if v > R::zero() { g } else { R::zero() };
                vec![(*x, self.get(*x).zip(g, self.threads, to_x))]
            }
            Op::Dropout(x, factors) => vec![(*x, g.zip(factors, self.threads, |g, f| g * f))],
            Op::Softmax(x) => {
                let mut to_x = g.clone();
                self.softmax_gradient(node.format, &node.value.data, &mut to_x.data);
                vec![(*x, to_x)]
            }
            Op::Gather(table, indices) => {
                let all = self.get(*table);
                let mut sum = Matrix::zeros(all.rows, all.columns);
                for (n, &row) in indices.iter().enumerate() {
                    let into = &mut sum.data[row * all.columns..(row + 1) * all.columns];
                    into.iter_mut().zip(g.row(n)).for_each(|(a, &b)| *a += b);
                }
                vec![(*table, sum)]
            }
            Op::Loss(gradients) => gradients.clone(),
        }
    }

    fn norm_gradients(&self, op: &Op<R>, g: &Matrix<R>) -> Vec<(Var, Matrix<R>)> {
        let Op::Norm { x, weight, bias, centered, normalised, inverse_deviations } = op else {
            unreachable!("the operation is a norm")
        };
        let width = normalised.columns;
        let groups = || Matrix::new(normalised.rows, width, g.data.clone());
        let mut all = Vec::new();
        if let Some(weight) = *weight {
            let products = groups().zip(normalised, self.threads, |g, u| g * u);
            all.push((weight, self.row_gradient(weight, products)));
        }
        all.extend(bias.map(|bias| (bias, self.row_gradient(bias, groups()))));
        let mut to_x = g.clone();
        let count = R::from_f64(width as f64);
        let rows = to_x.data.chunks_mut(width).zip(normalised.data.chunks(width));
        for ((row, unit), &scale) in rows.zip(inverse_deviations) {
            if let Some(weight) = *weight {
                row.iter_mut().zip(&self.get(weight).data).for_each(|(g, &w)| *g *= w);
            }
            let mean = if *centered { row.iter().copied().sum::<R>() / count } else { R::zero() };
            let projection = row.iter().zip(unit).map(|(&g, &u)| g * u).sum::<R>() / count;
            row.iter_mut().zip(unit).for_each(|(g, &u)| *g = scale * (*g - mean - u * projection));
        }
        all.push((*x, to_x));
        all
    }

    /// Returns the gradient of a row that an operation used for each of `rows`: their sum. For a leaf it returns
    /// the rows themselves, see [`Graph::backward`].
    fn row_gradient(&self, row: Var, rows: Matrix<R>) -> Matrix<R> {
        let node = &self.nodes[row.0];
        if matches!(node.op, Op::Leaf) {
            return rows;
        }
        let mut sum = Matrix::zeros(1, rows.columns);
        self.rounding.add_rows(node.format, false, &mut sum.data, &rows.data);
        sum
    }

    /// Converts the gradient of a softmax's result to that of its input.
    pub(super) fn softmax_gradient(&self, format: Format, weights: &[R], gradient: &mut [R]) {
        let narrow = self.rounding.accumulation == Accumulation::Narrow;
        let r = |v: R| if narrow { format.round(v) } else { v };
        let mean = weights.iter().zip(&*gradient).fold(R::zero(), |sum, (&w, &g)| r(sum + r(w * g)));
        gradient.iter_mut().zip(weights).for_each(|(g, &w)| *g = r(r(w * *g) - r(w * mean)));
    }
}

fn add_to_each_row<R: Real>(data: &mut [R], row: &[R]) {
    for values in data.chunks_mut(row.len()) {
        values.iter_mut().zip(row).for_each(|(v, &b)| *v += b);
    }
}
