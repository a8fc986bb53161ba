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
    Mul(Var, Var),
    Norm {
        x: Var,
        weight: Option<Var>,
        bias: Option<Var>,
        /// Whether the mean is taken off first.
        centred: bool,
        /// A row for each stretch that is normalised.
        unit: Matrix<R>,
        /// 1 over the deviation, of each row.
        inverse: Vec<R>,
    },
    /// Each head's row is turned; cosines and sines [N, d/2].
    Rotary {
        x: Var,
        turns: [Matrix<R>; 2],
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

/// Of head `index`: the first of its columns in queries and results, that in keys and values, which
/// several may share, and how many they are.
fn of_head(index: usize, all: usize, [own, shared]: [usize; 2]) -> (usize, usize, usize) {
    let each = own / all;
    (index * each, index * (shared / each) / all * each, each)
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

    pub fn mul(&mut self, a: Var, b: Var) -> Var {
        let y = self.get(a).zip(self.get(b), self.threads, |a, b| a * b);
        self.push(y, self.nodes[a.0].format, Op::Mul(a, b))
    }

    /// Normalises stretches of `width` columns, around their mean where `centred`, times a weight and
    /// plus a bias of as many where there are.
    pub fn norm(
        &mut self,
        x: Var,
        width: usize,
        weight: Option<Var>,
        bias: Option<Var>,
        (centred, eps): (bool, f64),
    ) -> Var {
        let values = self.get(x);
        let (rows, columns) = (values.rows, values.columns);
        let (count, eps) = (R::from_f64(width as f64), R::from_f64(eps));
        let mut unit = values.clone();
        let mut inverse = Vec::with_capacity(values.rows);
        for row in unit.data.chunks_mut(width) {
            let mean = if centred { row.iter().copied().sum::<R>() / count } else { R::zero() };
            row.iter_mut().for_each(|v| *v = *v - mean);
            let variance = row.iter().map(|&v| v * v).sum::<R>() / count;
            let scale = R::one() / (variance + eps).sqrt();
            row.iter_mut().for_each(|v| *v *= scale);
            inverse.push(scale);
        }
        let mut y = unit.data.clone();
        for row in y.chunks_mut(width) {
            if let Some(weight) = weight {
                row.iter_mut().zip(&self.get(weight).data).for_each(|(v, &w)| *v *= w);
            }
            if let Some(bias) = bias {
                row.iter_mut().zip(&self.get(bias).data).for_each(|(v, &b)| *v += b);
            }
        }
        (unit.rows, unit.columns) = (rows * columns / width, width);
        let y = Matrix::new(rows, columns, y);
        self.push(y, self.rounding.stream, Op::Norm { x, weight, bias, centred, unit, inverse })
    }

    /// Turns each stretch of `each` columns by its row's place: angles place · base^(−2i/each).
    pub fn rotary(&mut self, x: Var, each: usize, base: f64) -> Var {
        let (rows, half) = (self.get(x).rows, each / 2);
        let format = self.rounding.stream;
        let base = R::from_f64(base);
        let angle = |at: usize| {
            let power = R::from_f64(-2.0 * (at % half) as f64 / each as f64);
            R::from_f64((at / half) as f64) * base.powf(power)
        };
        let table = |of: fn(R) -> R| {
            Matrix::new(rows, half, (0..rows * half).map(|at| format.round(of(angle(at)))).collect())
        };
        let turns = [table(R::cos), table(R::sin)];
        let y = self.turned(self.get(x), format, &turns, false);
        self.push(y, format, Op::Rotary { x, turns })
    }

    /// Each stretch turned by its row's angle, or back.
    fn turned(&self, x: &Matrix<R>, format: Format, [cos, sin]: &[Matrix<R>; 2], back: bool) -> Matrix<R> {
        let r = |v: R| self.rounding.round(format, v);
        let mut y = x.clone();
        let half = cos.columns;
        for (n, row) in y.data.chunks_mut(x.columns).enumerate() {
            for stretch in row.chunks_mut(2 * half) {
                let (left, right) = stretch.split_at_mut(half);
                for (i, (a, b)) in left.iter_mut().zip(right).enumerate() {
                    let (cos, mut sin) = (cos.row(n)[i], sin.row(n)[i]);
                    if back {
                        sin = -sin;
                    }
                    (*a, *b) = (r(*a * cos) - r(*b * sin), r(*b * cos) + r(*a * sin));
                }
            }
        }
        y
    }

    /// q [N, H·d], k and v of as many columns or of fewer heads → [N, H·d]; `mask` gives each head's dropout factors [N, N].
    pub fn attention(
        &mut self,
        qkv: [Var; 3],
        heads: usize,
        causal: bool,
        mask: impl Fn(usize) -> Option<Matrix<R>> + Sync,
    ) -> Var {
        let [q, k, v] = qkv.map(|a| self.operand(a));
        let (rows, inner) = (q.rows, q.columns);
        let columns = [inner, k.columns];
        let scale = R::from_f64(1.0 / ((inner / heads) as f64).sqrt());
        let product = self.rounding.product;
        let round = |v| self.rounding.round(product, v);
        let found = each_head(heads, self.threads, |index| {
            let (first, shared, each) = of_head(index, heads, columns);
            let mut weights = q.part(first, each).product(k.part(shared, each).transposed(), 1);
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
            let part = read.view().product(v.part(shared, each), 1);
            drop(read);
            drop(dropped);
            (head, part)
        });
        let mut mixed = Matrix::zeros(rows, inner);
        let mut kept = Vec::with_capacity(heads);
        for (index, (head, part)) in found.into_iter().enumerate() {
            mixed.add_part(of_head(index, heads, columns).0, &part);
            kept.push(head);
        }
        self.push(mixed, product, Op::Attention { qkv, heads: kept })
    }

    pub fn activate(&mut self, x: Var, kind: Activation) -> Var {
        let format = self.nodes[x.0].format;
        let round = |v| self.rounding.round(format, v);
        let y = self.get(x).map(self.threads, |v| active(v, kind, &round));
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
            Op::Mul(a, b) => {
                let by = |other: Var| g.zip(self.get(other), self.threads, |g, v| g * v);
                vec![(*a, by(*b)), (*b, by(*a))]
            }
            Op::Norm { x, weight, bias, centred, unit, inverse } => {
                let width = unit.columns;
                let stretches = || Matrix::new(unit.rows, width, g.data.clone());
                let mut all = Vec::new();
                if let Some(weight) = *weight {
                    let along = stretches().zip(unit, self.threads, |g, u| g * u);
                    all.push((weight, self.summed(weight, along)));
                }
                all.extend(bias.map(|bias| (bias, self.summed(bias, stretches()))));
                let mut to_x = g.clone();
                let count = R::from_f64(width as f64);
                for ((row, unit), &scale) in
                    to_x.data.chunks_mut(width).zip(unit.data.chunks(width)).zip(inverse)
                {
                    if let Some(weight) = *weight {
                        row.iter_mut().zip(&self.get(weight).data).for_each(|(g, &w)| *g *= w);
                    }
                    let mean = if *centred { row.iter().copied().sum::<R>() / count } else { R::zero() };
                    let along = row.iter().zip(unit).map(|(&g, &u)| g * u).sum::<R>() / count;
                    row.iter_mut().zip(unit).for_each(|(g, &u)| *g = scale * (*g - mean - u * along));
                }
                all.push((*x, to_x));
                all
            }
            Op::Rotary { x, turns } => vec![(*x, self.turned(g, node.format, turns, true))],
            Op::Attention { qkv, heads } => self.attention_slopes(*qkv, heads, &node.value, g),
            Op::Activate(x, kind) => {
                let round = |v| self.rounding.round(node.format, v);
                let slope = |v: R, g: R| active_slope(v, g, *kind, &round);
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
        let columns = [inner, k.columns];
        let scale = R::from_f64(1.0 / ((inner / heads.len()) as f64).sqrt());
        let g = self.as_operand(whole, product);
        let found = each_head(heads.len(), self.threads, |index| {
            let head = &heads[index];
            let (first, shared, each) = of_head(index, heads.len(), columns);
            let part = g.part(first, each);
            let read = head.dropped(product);
            let read = self.as_operand(&read, product);
            let to_v = read.view().transposed().product(part, 1);
            let mut scores = part.product(v.part(shared, each).transposed(), 1);
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
            let to_q = scores.view().product(k.part(shared, each), 1);
            [to_q, scores.view().transposed().product(q.part(first, each), 1), to_v]
        });
        let mut to = [inner, k.columns, k.columns].map(|columns| Matrix::zeros(rows, columns));
        for (index, parts) in found.iter().enumerate() {
            let (first, shared, _) = of_head(index, heads.len(), columns);
            for ((all, part), first) in to.iter_mut().zip(parts).zip([first, shared, shared]) {
                all.add_part(first, part);
            }
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

/// An activation at a value; each elementary step is rounded, as frameworks without a fused kernel
/// have it.
fn active<R: Real>(x: R, kind: Activation, r: &impl Fn(R) -> R) -> R {
    match kind {
        Activation::Gelu | Activation::GeluTanh => Gate::new(x, kind, r).value(),
        Activation::Silu => r(x * r(sigmoid(x))),
        Activation::Relu => x.max(R::zero()),
        Activation::ReluSquared => {
            let positive = x.max(R::zero());
            r(positive * positive)
        }
    }
}

/// Its derivative at a value, times the gradient that arrives.
fn active_slope<R: Real>(x: R, gradient: R, kind: Activation, r: &impl Fn(R) -> R) -> R {
    let positive = |value: R| if x > R::zero() { value } else { R::zero() };
    match kind {
        Activation::Gelu | Activation::GeluTanh => Gate::new(x, kind, r).slope(gradient),
        Activation::Silu => {
            let gate = r(sigmoid(x));
            let through = r(r(gradient * x) * r(gate * r(R::one() - gate)));
            r(r(gradient * gate) + through)
        }
        Activation::Relu => positive(gradient),
        Activation::ReluSquared => positive(r(gradient * r(x + x))),
    }
}

fn sigmoid<R: Real>(x: R) -> R {
    R::one() / (R::one() + (-x).exp())
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
            Activation::Silu | Activation::Relu | Activation::ReluSquared => {
                unreachable!("GELU alone has this gate")
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
