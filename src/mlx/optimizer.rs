//! The optimizers: AdamW and Muon as functions of arrays.

use std::collections::BTreeMap;

use mlx_rs::error::Exception;
use mlx_rs::ops::{addmm, stack};
use mlx_rs::{Array, Dtype};
use transformer_bench::fixture::{AdamW, Fixture, Muon};
use transformer_bench::suite::Precision;

use crate::network::{scalar, scale};

/// The optimizer of a case.
pub struct Optimizer {
    /// True for each trained parameter that Muon updates.
    is_muon: Vec<bool>,
    muon: Muon,
    /// Type of the iterations of Muon.
    dtype: Dtype,
    /// True if matrices of one size share their products.
    stacks: bool,
}

impl Optimizer {
    pub fn new(fixture: &Fixture) -> Self {
        let (shape, method) = (fixture.case.shape, fixture.case.method);
        let specs = shape.parameter_specs().into_iter().filter(|spec| spec.is_trained());
        let is_bf16 = !matches!(method.precision, Precision::F32 | Precision::Tf32);
        Self {
            is_muon: specs.map(|spec| shape.uses_muon_for(&spec)).collect(),
            muon: fixture.muon,
            dtype: if is_bf16 { Dtype::Bfloat16 } else { Dtype::Float32 },
            stacks: method.variant.uses_fused_adamw(),
        }
    }

    /// Returns the number of second moments, one per parameter of AdamW.
    pub fn second_moments(&self) -> usize {
        self.is_muon.iter().filter(|is_muon| !**is_muon).count()
    }

    /// Returns those of the trained parameters that have a second moment.
    pub fn of_adamw<'a, T>(&'a self, trained: &'a [T]) -> impl Iterator<Item = &'a T> {
        trained.iter().zip(&self.is_muon).filter(|(_, is_muon)| !**is_muon).map(|(parameter, _)| parameter)
    }

    /// Returns the new state: trained parameters, then first and second moments.
    pub fn step(
        &self,
        trained: &[Array],
        moments: &[Array],
        gradients: &[Array],
        scalars: &[Array],
    ) -> Result<Vec<Array>, Exception> {
        let (first, second) = moments.split_at(trained.len());
        let mut second = second.iter();
        let (mut new, mut new_second) = ([Vec::new(), Vec::new()], Vec::new());
        let mut directions = Vec::new();
        for (index, gradient) in gradients.iter().enumerate() {
            if self.is_muon[index] {
                let [moment, direction] = self.momentum(&first[index], gradient)?;
                directions.push(direction);
                new[1].push(moment);
                new[0].push(trained[index].clone());
                continue;
            }
            let second = second.next().expect("a second moment for each parameter of AdamW");
            let [p, m, v] = adamw([&trained[index], &first[index], second], gradient, scalars)?;
            new[0].push(p);
            new[1].push(m);
            new_second.push(v);
        }
        let directions = if self.stacks {
            self.orthogonalize_stacked(&directions)?
        } else {
            directions.iter().map(|x| self.orthogonalize(x)).collect::<Result<_, _>>()?
        };
        let matrices = new[0].iter_mut().zip(&self.is_muon).filter(|(_, is_muon)| **is_muon);
        for ((p, _), direction) in matrices.zip(directions) {
            *p = self.descend(p, &direction)?;
        }
        let [p, m] = new;
        Ok(p.into_iter().chain(m).chain(new_second).collect())
    }

    /// Returns the first moment of a matrix after the step, and the direction of Nesterov's momentum.
    fn momentum(&self, moment: &Array, gradient: &Array) -> Result<[Array; 2], Exception> {
        let old = self.muon.momentum;
        let gradient = scale(gradient, 1.0 - old)?;
        let moment = scale(moment, old)?.add(&gradient)?;
        let direction = scale(&moment, old)?.add(gradient)?;
        Ok([moment, direction])
    }

    /// Returns matrices [.., rows, columns] whose singular values are about 1, by Newton-Schulz iterations. The norm is
    /// computed in f32. MLX adds bf16 numbers up in bf16, where a long sum stops growing.
    fn orthogonalize(&self, x: &Array) -> Result<Array, Exception> {
        let is_tall = x.dim(-2) > x.dim(-1);
        let x = if is_tall { x.swap_axes(-1, -2)? } else { x.clone() };
        let wide = x.as_dtype(self.dtype)?.as_dtype(Dtype::Float32)?;
        // A CPU adds all numbers of a sum to one f32, whose error grows with their count. Two short sums have less.
        let norm = wide.square()?.sum_axes(&[-1], true)?.sum_axes(&[-2], true)?.sqrt()?;
        let norm = mlx_rs::ops::maximum(norm, scalar(self.muon.eps, Dtype::Float32))?;
        let mut x = wide.divide(norm)?.as_dtype(self.dtype)?;
        let [a, b, c] = self.muon.coefficients.map(|v| v as f32);
        for _ in 0..self.muon.iterations {
            let gram = x.matmul(x.swap_axes(-1, -2)?)?;
            // As in PyTorch, the factors are not rounded to bf16, and each sum is rounded once.
            let polynomial = addmm(&gram, &gram, &gram, c, b)?;
            x = addmm(&x, &polynomial, &x, 1.0, a)?;
        }
        if is_tall { x.swap_axes(-1, -2) } else { Ok(x) }
    }

    /// Orthogonalizes matrices in one batch for each size. A tall matrix is in the batch of its transpose.
    fn orthogonalize_stacked(&self, all: &[Array]) -> Result<Vec<Array>, Exception> {
        let is_tall = |x: &Array| x.dim(-2) > x.dim(-1);
        let mut groups: BTreeMap<(i32, i32), Vec<usize>> = BTreeMap::new();
        for (index, x) in all.iter().enumerate() {
            let sides = (x.dim(-2).min(x.dim(-1)), x.dim(-2).max(x.dim(-1)));
            groups.entry(sides).or_default().push(index);
        }
        let mut results = all.to_vec();
        for members in groups.values() {
            let turn = |x: &Array, turns: bool| if turns { x.swap_axes(-1, -2) } else { Ok(x.clone()) };
            let wide = members.iter().map(|&i| turn(&all[i], is_tall(&all[i])));
            let stacked = self.orthogonalize(&stack(&wide.collect::<Result<Vec<_>, _>>()?, 0)?)?;
            for (&i, part) in members.iter().zip(stacked.split_equal(members.len() as i32, 0)?) {
                results[i] = turn(&part.squeeze_axes(&[0])?, is_tall(&all[i]))?;
            }
        }
        Ok(results)
    }

    /// Moves a matrix in a direction, after weight decay.
    fn descend(&self, parameter: &Array, direction: &Array) -> Result<Array, Exception> {
        let rate = self.muon.rate(parameter.dim(-2) as usize, parameter.dim(-1) as usize);
        let update = scale(&direction.as_dtype(parameter.dtype())?, rate)?;
        scale(parameter, 1.0 - self.muon.lr * self.muon.weight_decay)?.subtract(update)
    }
}

/// Returns AdamW's scalars of step `t` in the type of the parameters: the factor of weight decay, β1, 1 − β1, β2, 1 − β2, lr
/// over the first bias correction, the inverse square root of the second one, and ε.
pub fn adamw_scalars(s: &AdamW, t: i32, dtype: Dtype) -> Vec<Array> {
    let rate = s.lr / (1.0 - s.beta1.powi(t));
    let root = 1.0 / (1.0 - s.beta2.powi(t)).sqrt();
    [1.0 - s.lr * s.weight_decay, s.beta1, 1.0 - s.beta1, s.beta2, 1.0 - s.beta2, rate, root, s.eps]
        .map(|value| scalar(value, dtype))
        .into()
}

/// Runs an AdamW step with bias correction, as MLX's Python optimizer does. The optimizer of mlx-rs has no correction.
/// `state` is a parameter with its first and second moment, and the result replaces it.
fn adamw(state: [&Array; 3], g: &Array, scalars: &[Array]) -> Result<[Array; 3], Exception> {
    let [decay, beta1, rest1, beta2, rest2, rate, root, eps] = scalars else {
        unreachable!("AdamW has eight scalars");
    };
    let [p, m, v] = state;
    let m = m.multiply(beta1)?.add(g.multiply(rest1)?)?;
    let v = v.multiply(beta2)?.add(g.square()?.multiply(rest2)?)?;
    let denominator = v.sqrt()?.multiply(root)?.add(eps)?;
    let update = m.multiply(rate)?.divide(denominator)?;
    Ok([p.multiply(decay)?.subtract(update)?, m, v])
}
