//! The losses of the models, with their gradients.

use std::sync::Mutex;

use super::autograd::Var;
use super::matmul::{Matrix, Real, for_each_chunk};
use super::network::Sample;

impl<R: Real> Sample<'_, R> {
    /// Returns the terms of this sample's part of BCE(selection, u) + 0.5·MSE(weights, t) + 0.1·mean(p).
    ///
    /// p is σ(selection), u the usefulness, and t = u·p / (Σ u·p + 1e-8). Gradient flows through t. `scale` is one
    /// over the tokens of the batch.
    pub fn indicator_loss(&mut self, [selection, weights]: [Var; 2], scale: R) -> Var {
        let useful: Vec<R> = self.input("usefulness").iter().map(|&v| R::from_f32(v)).collect();
        let (s, w) = (&self.graph.get(selection).data, &self.graph.get(weights).data);
        let (half, tenth, one) = (R::from_f64(0.5), R::from_f64(0.1), R::one());
        let p: Vec<R> = s.iter().map(|&s| one / (one + (-s).exp())).collect();
        let total = useful.iter().zip(&p).map(|(&u, &p)| u * p).sum::<R>() + R::from_f64(1e-8);
        let target: Vec<R> = useful.iter().zip(&p).map(|(&u, &p)| u * p / total).collect();
        let difference: Vec<R> = w.iter().zip(&target).map(|(&w, &t)| w - t).collect();
        // Σ (derivative by t)·t, by which the common divisor of all targets enters.
        let by_total = difference.iter().zip(&target).map(|(&d, &t)| -scale * d * t).sum::<R>();
        let mut terms = Vec::with_capacity(s.len());
        let mut by_selection = Vec::with_capacity(s.len());
        for n in 0..s.len() {
            let softplus = s[n].max(R::zero()) + (-s[n].abs()).exp().ln_1p();
            let term = softplus - s[n] * useful[n] + half * difference[n] * difference[n] + tenth * p[n];
            terms.push(scale * term);
            let by_product = (-scale * difference[n] - by_total) / total;
            let by_p = useful[n] * by_product + tenth * scale;
            by_selection.push(p[n] * (one - p[n]) * by_p + scale * (p[n] - useful[n]));
        }
        let column = |data: Vec<R>| Matrix::new(data.len(), 1, data);
        let by_weights = column(difference.iter().map(|&d| scale * d).collect());
        self.graph.loss(terms, vec![(selection, column(by_selection)), (weights, by_weights)])
    }

    /// Returns the terms of this sample's part of the mean of −ln softmax(logits)[next].
    pub fn cross_entropy(&mut self, logits: Var, scale: R) -> Var {
        let next = self.input("next");
        let mut gradient = self.graph.get(logits).clone();
        let vocabulary = gradient.columns;
        let terms: Mutex<Vec<R>> = Mutex::new(vec![R::zero(); next.len()]);
        for_each_chunk(&mut gradient.data, vocabulary, self.graph.threads, |first, rows| {
            for (index, row) in rows.chunks_mut(vocabulary).enumerate() {
                let place = first / vocabulary + index;
                let token = next[place] as usize;
                let largest = row.iter().copied().fold(R::min_value(), R::max);
                let target = row[token];
                row.iter_mut().for_each(|v| *v = (*v - largest).exp());
                let total = row.iter().copied().sum::<R>();
                row.iter_mut().for_each(|v| *v = *v / total * scale);
                row[token] = row[token] - scale;
                terms.lock().expect("no thread panicked")[place] = scale * (total.ln() + largest - target);
            }
        });
        let terms = terms.into_inner().expect("no thread panicked");
        self.graph.loss(terms, vec![(logits, gradient)])
    }
}
