//! Multi-head attention on the graph, forward and backward.

use std::borrow::Cow;
use std::ops::Range;

use super::activation::{soft_cap, softmax};
use super::autograd::{Graph, HeadWeights, Op, Var};
use super::matmul::{Matrix, Real};
use super::rounding::Format;

impl<R: Real> HeadWeights<R> {
    /// Returns the weights as the backward pass of a fused kernel computes them.
    fn recomputed(&self) -> Self {
        let mut weights = self.weights.clone();
        for (row, &error) in weights.data.chunks_mut(self.weights.columns).zip(&self.logarithm_errors) {
            row.iter_mut().for_each(|w| *w = *w + *w * error);
        }
        Self {
            weights,
            dropout: self.dropout.clone(),
            logarithm_errors: Vec::new(),
            cap_slopes: self.cap_slopes.clone(),
        }
    }

    /// Returns the weights after dropout.
    fn dropped(&self, format: Format) -> Cow<'_, Matrix<R>> {
        match &self.dropout {
            None => Cow::Borrowed(&self.weights),
            Some(factors) => Cow::Owned(self.weights.zip(factors, 1, |w, f| format.round(w * f))),
        }
    }
}

/// Options of the scores of attention.
pub struct Scores<'a> {
    pub heads: usize,
    pub scale: f64,
    /// The soft cap.
    pub cap: Option<f64>,
    /// Returns the tokens to which a token attends.
    pub visible: &'a (dyn Fn(usize) -> Range<usize> + Sync),
}

/// The columns of a head.
struct HeadColumns {
    /// The first column of its queries and results.
    first: usize,
    /// The first column of its keys and values, which other heads may use too.
    key_value: usize,
    width: usize,
}

impl HeadColumns {
    /// Returns the columns of head `index`. Queries have `query` columns, keys and values `key_value` each.
    fn new(index: usize, heads: usize, [query, key_value]: [usize; 2]) -> Self {
        let width = query / heads;
        Self { first: index * width, key_value: index * (key_value / width) / heads * width, width }
    }
}

/// Computes `head(index)` for each head, with at most `threads` threads.
fn for_each_head<T: Send>(heads: usize, threads: usize, head: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let mut results: Vec<Option<T>> = (0..heads).map(|_| None).collect();
    let per_thread = heads.div_ceil(threads.clamp(1, heads));
    std::thread::scope(|scope| {
        for (chunk, results) in results.chunks_mut(per_thread).enumerate() {
            let head = &head;
            let mut work = move || {
                for (i, result) in results.iter_mut().enumerate() {
                    *result = Some(head(chunk * per_thread + i));
                }
            };
            if per_thread == heads {
                work();
            } else {
                scope.spawn(work);
            }
        }
    });
    results.into_iter().map(|result| result.expect("every head was computed")).collect()
}

impl<R: Real> Graph<R> {
    /// q [N, H·d], k and v [N, (key-value heads)·d] → [N, H·d]. `dropout` returns a head's factors [N, N].
    pub fn attention(
        &mut self,
        qkv: [Var; 3],
        scores: &Scores<'_>,
        dropout: impl Fn(usize) -> Option<Matrix<R>> + Sync,
    ) -> Var {
        let [q, k, v] = qkv.map(|a| self.operand(a));
        let (rows, inner, heads) = (q.rows, q.columns, scores.heads);
        let columns = [inner, k.columns];
        let (scale, cap) = (R::from_f64(scores.scale), scores.cap.map(R::from_f64));
        let format = self.rounding.product;
        let round = |v| self.rounding.round(format, v);
        let results = for_each_head(heads, self.threads, |index| {
            let HeadColumns { first, key_value, width } = HeadColumns::new(index, heads, columns);
            let keys = k.columns_from(key_value, width).transposed();
            let mut weights = q.columns_from(first, width).product(keys, 1);
            let mut logarithm_errors = Vec::with_capacity(rows);
            let mut cap_slopes = cap.map(|_| Matrix::zeros(rows, rows));
            for (n, row) in weights.data.chunks_mut(rows).enumerate() {
                let visible = (scores.visible)(n);
                row[..visible.start].fill(R::zero());
                row[visible.end..].fill(R::zero());
                let own = &mut row[visible.clone()];
                own.iter_mut().for_each(|s| *s = round(round(*s) * scale));
                if let (Some(cap), Some(slopes)) = (cap, &mut cap_slopes) {
                    let slopes = &mut slopes.data[n * rows..][visible];
                    own.iter_mut()
                        .zip(slopes)
                        .for_each(|(s, slope)| (*s, *slope) = soft_cap(*s, cap, &round));
                }
                logarithm_errors.push(softmax(own));
                own.iter_mut().for_each(|s| *s = round(*s));
            }
            let head = HeadWeights { dropout: dropout(index), weights, logarithm_errors, cap_slopes };
            let dropped = head.dropped(format);
            let result =
                self.as_operand(&dropped, format).view().product(v.columns_from(key_value, width), 1);
            drop(dropped);
            (head, result)
        });
        let mut y = Matrix::zeros(rows, inner);
        let mut all_weights = Vec::with_capacity(heads);
        for (index, (head, result)) in results.into_iter().enumerate() {
            y.add_to_columns(HeadColumns::new(index, heads, columns).first, &result);
            all_weights.push(head);
        }
        self.push(y, format, Op::Attention { qkv, scale, heads: all_weights })
    }

    /// Returns the gradients of queries, keys and values, given the result and its gradient.
    pub(super) fn attention_gradients(
        &self,
        qkv: [Var; 3],
        scale: R,
        heads: &[HeadWeights<R>],
        result: &Matrix<R>,
        gradient: &Matrix<R>,
    ) -> Vec<(Var, Matrix<R>)> {
        let format = self.rounding.product;
        let round = |v| self.rounding.round(format, v);
        let [q, k, v] = qkv.map(|a| self.operand(a));
        let (rows, inner) = (q.rows, q.columns);
        let columns = [inner, k.columns];
        let g = self.as_operand(gradient, format);
        let parts = for_each_head(heads.len(), self.threads, |index| {
            let fused = self.rounding.fused_attention;
            let head = if fused { &heads[index].recomputed() } else { &heads[index] };
            let HeadColumns { first, key_value, width } = HeadColumns::new(index, heads.len(), columns);
            let own = g.columns_from(first, width);
            let dropped = head.dropped(format);
            let to_v = self.as_operand(&dropped, format).view().transposed().product(own, 1);
            let mut scores = own.product(v.columns_from(key_value, width).transposed(), 1);
            if !fused {
                scores.data.iter_mut().for_each(|v| *v = round(*v));
            }
            if let Some(factors) = &head.dropout {
                scores = scores.zip(factors, 1, |g, f| if fused { g * f } else { round(g * f) });
            }
            let weights = head.weights.data.chunks(rows);
            for (n, (row, weights)) in scores.data.chunks_mut(rows).zip(weights).enumerate() {
                if fused {
                    let columns = first..first + width;
                    let pairs = gradient.row(n)[columns.clone()].iter().zip(&result.row(n)[columns]);
                    let mean = pairs.map(|(&g, &o)| g * o).sum::<R>();
                    row.iter_mut().zip(weights).for_each(|(g, &w)| *g = w * (*g - mean));
                } else {
                    self.softmax_gradient(format, weights, row);
                }
                if let Some(slopes) = &head.cap_slopes {
                    row.iter_mut().zip(slopes.row(n)).for_each(|(s, &slope)| *s = round(round(*s) * slope));
                }
                row.iter_mut().for_each(|s| *s = round(round(*s) * scale));
            }
            let scores = self.as_operand(&scores, format);
            let to_q = scores.view().product(k.columns_from(key_value, width), 1);
            [to_q, scores.view().transposed().product(q.columns_from(first, width), 1), to_v]
        });
        let mut sums = [inner, k.columns, k.columns].map(|columns| Matrix::zeros(rows, columns));
        for (index, parts) in parts.iter().enumerate() {
            let HeadColumns { first, key_value, .. } = HeadColumns::new(index, heads.len(), columns);
            for ((sum, part), first) in sums.iter_mut().zip(parts).zip([first, key_value, key_value]) {
                sum.add_to_columns(first, part);
            }
        }
        qkv.into_iter().zip(sums).collect()
    }
}
