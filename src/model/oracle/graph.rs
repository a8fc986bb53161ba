//! Reverse mode over matrices: what the scalar tape does one number at a time, in products of
//! whole matrices, each result stored as the [`Rounding`] says. One sample: N rows.

use std::borrow::Cow;

use super::matrix::{Matrix, Real};
use super::rounding::{Format, Rounding, Sums};
use crate::model::Activation;

/// A matrix on the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Var(usize);

impl Var {
    /// Its gradient, out of those that [`Graph::backward`] gives.
    pub fn take<R>(self, all: &mut [Option<Matrix<R>>]) -> Option<Matrix<R>> {
        all[self.0].take()
    }
}

struct Node<R> {
    value: Matrix<R>,
    /// Of its value and of its gradient.
    format: Format,
    op: Op<R>,
}

enum Op<R> {
    Leaf,
    /// x·weightᵀ + bias
    Linear {
        x: Var,
        weight: Var,
        bias: Option<Var>,
    },
    Add(Var, Var),
    /// The one row of the second is added to each of the first.
    AddRow(Var, Var),
    Norm {
        x: Var,
        weight: Var,
        bias: Var,
        unit: Matrix<R>,
        /// 1 over the deviation, of each row.
        inverse: Vec<R>,
    },
    Attention {
        qkv: [Var; 3],
        heads: Vec<Head<R>>,
    },
    Activate(Var, Activation),
    Relu(Var),
    /// Dropout: a factor for each element.
    Mask(Var, Matrix<R>),
    /// Over the rows of the one column.
    Softmax(Var),
    /// Rows of a table.
    Rows(Var, Vec<usize>),
    /// The slopes of its sum are known.
    Known(Vec<(Var, Matrix<R>)>),
}

/// What attention keeps of a head.
struct Head<R> {
    weights: Matrix<R>,
    mask: Option<Matrix<R>>,
}

/// A step's operations, in order.
pub struct Graph<R> {
    nodes: Vec<Node<R>>,
    rounding: Rounding,
    threads: usize,
}

/// [N, D] → the columns of head `index`.
fn of_head(index: usize, all: usize, m: usize) -> (usize, usize) {
    let each = m / all;
    (index * each, each)
}

/// Each head's result, by several threads.
fn each_head<T: Send>(heads: usize, threads: usize, of: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let mut found: Vec<Option<T>> = (0..heads).map(|_| None).collect();
    let each = heads.div_ceil(threads.clamp(1, heads));
    std::thread::scope(|scope| {
        for (piece, into) in found.chunks_mut(each).enumerate() {
            let of = &of;
            let mut work =
                move || into.iter_mut().enumerate().for_each(|(i, one)| *one = Some(of(piece * each + i)));
            if each == heads {
                work();
            } else {
                scope.spawn(work);
            }
        }
    });
    found.into_iter().map(|one| one.expect("every head has its turn")).collect()
}

impl<R: Real> Graph<R> {
    pub fn new(rounding: Rounding, threads: usize) -> Self {
        Self { nodes: Vec::new(), rounding, threads }
    }

    fn push(&mut self, mut value: Matrix<R>, format: Format, op: Op<R>) -> Var {
        // Leaves are given; everything else is a result.
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

    /// How many threads it may use.
    pub fn threads(&self) -> usize {
        self.threads
    }

    pub fn get(&self, a: Var) -> &Matrix<R> {
        &self.nodes[a.0].value
    }

    /// A value as products read it.
    fn operand(&self, a: Var) -> Cow<'_, Matrix<R>> {
        self.as_operand(self.get(a), self.nodes[a.0].format)
    }

    fn as_operand<'a>(&self, value: &'a Matrix<R>, format: Format) -> Cow<'a, Matrix<R>> {
        let wanted = self.rounding.operand;
        if wanted == Format::Whole || wanted == format {
            return Cow::Borrowed(value);
        }
        Cow::Owned(value.map(self.threads, |v| wanted.round(v)))
    }

    /// x [N, in], weight [out, in], bias [1, out] → [N, out]
    pub fn linear(&mut self, x: Var, weight: Var, bias: Option<Var>) -> Var {
        let mut y = self.operand(x).view().product(self.operand(weight).view().transposed(), self.threads);
        if let Some(bias) = bias {
            let row = &self.operand(bias).data;
            for out in y.data.chunks_mut(row.len()) {
                out.iter_mut().zip(row).for_each(|(v, &b)| *v += b);
            }
        }
        self.push(y, self.rounding.product, Op::Linear { x, weight, bias })
    }

    pub fn add(&mut self, a: Var, b: Var) -> Var {
        let sum = self.get(a).zip(self.get(b), self.threads, |a, b| a + b);
        self.push(sum, self.rounding.stream, Op::Add(a, b))
    }

    pub fn add_row(&mut self, x: Var, row: Var) -> Var {
        let mut sum = self.get(x).clone();
        let row_values = &self.get(row).data;
        for out in sum.data.chunks_mut(row_values.len()) {
            out.iter_mut().zip(row_values).for_each(|(v, &b)| *v += b);
        }
        self.push(sum, self.rounding.stream, Op::AddRow(x, row))
    }

    pub fn norm(&mut self, x: Var, weight: Var, bias: Var, eps: f64) -> Var {
        let values = self.get(x);
        let (count, eps) = (R::from_f64(values.columns as f64), R::from_f64(eps));
        let mut unit = values.clone();
        let mut inverse = Vec::with_capacity(values.rows);
        for row in unit.data.chunks_mut(values.columns) {
            let mean = row.iter().copied().sum::<R>() / count;
            row.iter_mut().for_each(|v| *v = *v - mean);
            let variance = row.iter().map(|&v| v * v).sum::<R>() / count;
            let scale = R::one() / (variance + eps).sqrt();
            row.iter_mut().for_each(|v| *v *= scale);
            inverse.push(scale);
        }
        let (w, b) = (&self.get(weight).data, &self.get(bias).data);
        let mut y = unit.clone();
        for row in y.data.chunks_mut(w.len()) {
            row.iter_mut().zip(w.iter().zip(b)).for_each(|(v, (&w, &b))| *v = *v * w + b);
        }
        self.push(y, self.rounding.stream, Op::Norm { x, weight, bias, unit, inverse })
    }

    /// q, k, v [N, H·d] → [N, H·d]; `mask` gives each head's dropout factors [N, N].
    pub fn attention(
        &mut self,
        qkv: [Var; 3],
        heads: usize,
        causal: bool,
        mask: impl Fn(usize) -> Option<Matrix<R>> + Sync,
    ) -> Var {
        let [q, k, v] = qkv.map(|a| self.operand(a));
        let (rows, inner) = (q.rows, q.columns);
        let scale = R::from_f64(1.0 / ((inner / heads) as f64).sqrt());
        let product = self.rounding.product;
        let round = |v| self.rounding.round(product, v);
        let found = each_head(heads, self.threads, |index| {
            let (first, each) = of_head(index, heads, inner);
            let mut weights = q.part(first, each).product(k.part(first, each).transposed(), 1);
            for (n, row) in weights.data.chunks_mut(rows).enumerate() {
                let (seen, hidden) = row.split_at_mut(if causal { n + 1 } else { rows });
                hidden.fill(R::zero());
                seen.iter_mut().for_each(|s| *s = round(round(*s) * scale));
                softmax(seen);
                seen.iter_mut().for_each(|s| *s = round(*s));
            }
            let head = Head { mask: mask(index), weights };
            let dropped = head.dropped(product);
            let read = self.as_operand(&dropped, product);
            let part = read.view().product(v.part(first, each), 1);
            drop(read);
            drop(dropped);
            (head, part)
        });
        let mut mixed = Matrix::zeros(rows, inner);
        let mut kept = Vec::with_capacity(heads);
        for (index, (head, part)) in found.into_iter().enumerate() {
            mixed.set_part(of_head(index, heads, inner).0, &part);
            kept.push(head);
        }
        self.push(mixed, product, Op::Attention { qkv, heads: kept })
    }

    pub fn activate(&mut self, x: Var, kind: Activation) -> Var {
        let format = self.nodes[x.0].format;
        let round = |v| self.rounding.round(format, v);
        let y = self.get(x).map(self.threads, |v| Gate::new(v, kind, &round).value());
        self.push(y, format, Op::Activate(x, kind))
    }

    pub fn relu(&mut self, x: Var) -> Var {
        let y = self.get(x).map(self.threads, |v| v.max(R::zero()));
        self.push(y, self.nodes[x.0].format, Op::Relu(x))
    }

    /// Dropout by known factors; None leaves the value as it is.
    pub fn mask(&mut self, x: Var, factors: Option<Matrix<R>>) -> Var {
        let Some(factors) = factors else { return x };
        let y = self.get(x).zip(&factors, self.threads, |v, f| v * f);
        self.push(y, self.nodes[x.0].format, Op::Mask(x, factors))
    }

    pub fn softmax(&mut self, x: Var) -> Var {
        let mut y = self.get(x).clone();
        softmax(&mut y.data);
        self.push(y, self.rounding.stream, Op::Softmax(x))
    }

    pub fn rows(&mut self, table: Var, indices: Vec<usize>) -> Var {
        let all = self.get(table);
        let data = indices.iter().flat_map(|&i| all.row(i)).copied().collect();
        let y = Matrix::new(indices.len(), all.columns, data);
        self.push(y, self.nodes[table.0].format, Op::Rows(table, indices))
    }

    /// The terms of a loss, which is computed in f32 whatever the rest is.
    pub fn known(&mut self, terms: Vec<R>, slopes: Vec<(Var, Matrix<R>)>) -> Var {
        self.push(Matrix::new(terms.len(), 1, terms), Format::Whole, Op::Known(slopes))
    }

    /// The gradients of the leaves, from that of `of`, not rounded yet; of a leaf of one row a row
    /// of each token.
    pub fn backward(self, of: Var, upstream: Matrix<R>) -> Vec<Option<Matrix<R>>> {
        let mut all: Vec<Option<Matrix<R>>> = self.nodes.iter().map(|_| None).collect();
        all[of.0] = Some(upstream);
        for (index, node) in self.nodes.iter().enumerate().rev() {
            if matches!(node.op, Op::Leaf) {
                continue;
            }
            let Some(gradient) = all[index].take() else { continue };
            for (parent, mut part) in self.slopes(node, &gradient) {
                let leaf = matches!(self.nodes[parent.0].op, Op::Leaf);
                let format = self.nodes[parent.0].format;
                if !leaf {
                    self.rounding.round_all(format, &mut part.data, self.threads);
                }
                match &mut all[parent.0] {
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
        all
    }

    /// The gradients of what a node was made from.
    fn slopes(&self, node: &Node<R>, g: &Matrix<R>) -> Vec<(Var, Matrix<R>)> {
        match &node.op {
            Op::Leaf => Vec::new(),
            Op::Linear { x, weight, bias } => {
                let read = self.as_operand(g, node.format);
                let to_x = read.view().product(self.operand(*weight).view(), self.threads);
                let to_weight = read.view().transposed().product(self.operand(*x).view(), self.threads);
                let mut all = vec![(*x, to_x), (*weight, to_weight)];
                all.extend(bias.map(|bias| (bias, self.summed(bias, g.clone()))));
                all
            }
            Op::Add(a, b) => vec![(*a, g.clone()), (*b, g.clone())],
            Op::AddRow(x, row) => vec![(*x, g.clone()), (*row, self.summed(*row, g.clone()))],
            Op::Norm { x, weight, bias, unit, inverse } => {
                let to_weight = self.summed(*weight, g.zip(unit, self.threads, |g, u| g * u));
                let mut to_x = g.clone();
                let w = &self.get(*weight).data;
                let count = R::from_f64(w.len() as f64);
                for ((row, unit), &scale) in
                    to_x.data.chunks_mut(w.len()).zip(unit.data.chunks(w.len())).zip(inverse)
                {
                    row.iter_mut().zip(w).for_each(|(g, &w)| *g *= w);
                    let mean = row.iter().copied().sum::<R>() / count;
                    let along = row.iter().zip(unit).map(|(&g, &u)| g * u).sum::<R>() / count;
                    row.iter_mut().zip(unit).for_each(|(g, &u)| *g = scale * (*g - mean - u * along));
                }
                vec![(*x, to_x), (*weight, to_weight), (*bias, self.summed(*bias, g.clone()))]
            }
            Op::Attention { qkv, heads } => self.attention_slopes(*qkv, heads, &node.value, g),
            Op::Activate(x, kind) => {
                let round = |v| self.rounding.round(node.format, v);
                let slope = |v: R, g: R| Gate::new(v, *kind, &round).slope(g);
                vec![(*x, self.get(*x).zip(g, self.threads, slope))]
            }
            Op::Relu(x) => {
                vec![(
                    *x,
                    self.get(*x).zip(g, self.threads, |v, g| if v > R::zero() { g } else { R::zero() }),
                )]
            }
            Op::Mask(x, factors) => vec![(*x, g.zip(factors, self.threads, |g, f| g * f))],
            Op::Softmax(x) => {
                let mut to_x = g.clone();
                self.softmax_slope(node.format, &node.value.data, &mut to_x.data);
                vec![(*x, to_x)]
            }
            Op::Rows(table, indices) => {
                let all = self.get(*table);
                let mut sum = Matrix::zeros(all.rows, all.columns);
                for (n, &row) in indices.iter().enumerate() {
                    let into = &mut sum.data[row * all.columns..(row + 1) * all.columns];
                    into.iter_mut().zip(g.row(n)).for_each(|(a, &b)| *a += b);
                }
                vec![(*table, sum)]
            }
            Op::Known(slopes) => slopes.clone(),
        }
    }

    /// The sum of the rows that arrive at a row; of a leaf the rows themselves, since those of all
    /// samples make one sum.
    fn summed(&self, into: Var, rows: Matrix<R>) -> Matrix<R> {
        let node = &self.nodes[into.0];
        if matches!(node.op, Op::Leaf) {
            return rows;
        }
        let mut sum = Matrix::zeros(1, rows.columns);
        self.rounding.sum(node.format, false, &mut sum.data, &rows.data);
        sum
    }

    /// Turns the gradient of a softmax's result into that of its input.
    fn softmax_slope(&self, format: Format, weights: &[R], gradient: &mut [R]) {
        let narrow = self.rounding.sums == Sums::Narrow;
        let r = |v: R| if narrow { format.round(v) } else { v };
        let along = weights.iter().zip(&*gradient).fold(R::zero(), |sum, (&w, &g)| r(sum + r(w * g)));
        gradient.iter_mut().zip(weights).for_each(|(g, &w)| *g = r(r(w * *g) - r(w * along)));
    }

    fn attention_slopes(
        &self,
        qkv: [Var; 3],
        heads: &[Head<R>],
        mixed: &Matrix<R>,
        whole: &Matrix<R>,
    ) -> Vec<(Var, Matrix<R>)> {
        let product = self.rounding.product;
        let round = |v| self.rounding.round(product, v);
        let [q, k, v] = qkv.map(|a| self.operand(a));
        let (rows, inner) = (q.rows, q.columns);
        let scale = R::from_f64(1.0 / ((inner / heads.len()) as f64).sqrt());
        let g = self.as_operand(whole, product);
        let found = each_head(heads.len(), self.threads, |index| {
            let head = &heads[index];
            let (first, each) = of_head(index, heads.len(), inner);
            let part = g.part(first, each);
            let read = head.dropped(product);
            let read = self.as_operand(&read, product);
            let to_v = read.view().transposed().product(part, 1);
            let mut scores = part.product(v.part(first, each).transposed(), 1);
            let fused = self.rounding.fused;
            if !fused {
                scores.data.iter_mut().for_each(|v| *v = round(*v));
            }
            if let Some(mask) = &head.mask {
                scores = scores.zip(mask, 1, |g, f| if fused { g * f } else { round(g * f) });
            }
            let weights = head.weights.data.chunks(rows);
            for (n, (row, weights)) in scores.data.chunks_mut(rows).zip(weights).enumerate() {
                if fused {
                    let columns = first..first + each;
                    let pairs = whole.row(n)[columns.clone()].iter().zip(&mixed.row(n)[columns]);
                    let along = pairs.map(|(&g, &o)| g * o).sum::<R>();
                    row.iter_mut().zip(weights).for_each(|(g, &w)| *g = w * (*g - along));
                } else {
                    self.softmax_slope(product, weights, row);
                }
                row.iter_mut().for_each(|s| *s = round(round(*s) * scale));
            }
            let scores = self.as_operand(&scores, product);
            let to_q = scores.view().product(k.part(first, each), 1);
            [to_q, scores.view().transposed().product(q.part(first, each), 1), to_v]
        });
        let mut to = [(); 3].map(|()| Matrix::zeros(rows, inner));
        for (index, parts) in found.iter().enumerate() {
            let first = of_head(index, heads.len(), inner).0;
            to.iter_mut().zip(parts).for_each(|(all, part)| all.set_part(first, part));
        }
        qkv.into_iter().zip(to).collect()
    }
}

impl<R: Real> Head<R> {
    /// The weights behind dropout.
    fn dropped(&self, format: Format) -> Cow<'_, Matrix<R>> {
        match &self.mask {
            None => Cow::Borrowed(&self.weights),
            Some(mask) => Cow::Owned(self.weights.zip(mask, 1, |w, f| format.round(w * f))),
        }
    }
}

fn softmax<R: Real>(row: &mut [R]) {
    let largest = row.iter().copied().fold(R::min_value(), R::max);
    row.iter_mut().for_each(|v| *v = (*v - largest).exp());
    let total = row.iter().copied().sum::<R>();
    row.iter_mut().for_each(|v| *v = *v / total);
}

/// The gate of GELU at a value, x·gate; each elementary step is rounded, as frameworks without
/// a fused kernel have it.
struct Gate<R, F> {
    x: R,
    /// 1 + erf or 1 + tanh.
    twice: R,
    /// The derivative of the gate's inner function by x.
    inner: R,
    round: F,
}

impl<R: Real, F: Fn(R) -> R> Gate<R, F> {
    fn new(x: R, kind: Activation, round: F) -> Self {
        use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI, PI};
        let (of, r, one) = (R::from_f64, &round, R::one());
        let (twice, inner) = match kind {
            Activation::Gelu => {
                let at = r(x * of(FRAC_1_SQRT_2));
                let slope = r(of(FRAC_2_SQRT_PI) * r((-r(at * at)).exp()));
                (r(one + r(at.erf())), r(slope * of(FRAC_1_SQRT_2)))
            }
            Activation::GeluTanh => {
                let (cubic, root) = (of(0.044715), of((2.0 / PI).sqrt()));
                let square = r(x * x);
                let inside = r(x + r(r(square * x) * cubic));
                let t = r(r(inside * root).tanh());
                let along = r(root * r(one + r(of(3.0) * r(cubic * square))));
                (r(one + t), r(r(one - r(t * t)) * along))
            }
        };
        Self { x, twice, inner, round }
    }

    fn value(&self) -> R {
        let r = &self.round;
        r(r(self.x * R::from_f64(0.5)) * self.twice)
    }

    fn slope(&self, gradient: R) -> R {
        let r = &self.round;
        let half = R::from_f64(0.5);
        let direct = r(half * r(gradient * self.twice));
        r(direct + r(r(gradient * r(self.x * half)) * self.inner))
    }
}
