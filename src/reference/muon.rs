//! The Muon optimizer: momentum, orthogonalization by Newton-Schulz iterations, and the update.
//!
//! The iterations are a polynomial of the matrix. The reference evaluates this polynomial, and not the orthogonal matrix
//! that it approximates.

use super::matmul::{Matrix, Real, cores};
use super::rounding::Rounding;
use crate::fixture::Muon;

/// Returns the first moment after a step, and the direction of Nesterov's momentum, which the iterations orthogonalize.
pub fn momentum<R: Real>(options: &Muon, moment: &[R], gradient: &[f32], rounding: &Rounding) -> [Vec<R>; 2] {
    let r = |v: R| rounding.round(rounding.leaf, v);
    let old = rounding.leaf.round(R::from_f64(options.momentum));
    let new = rounding.leaf.round(R::from_f64(1.0 - options.momentum));
    let step = |(&m, &g): (&R, &f32)| {
        let g = R::from_f32(g);
        let m = r(r(old * m) + r(new * g));
        (m, r(r(old * m) + r(new * g)))
    };
    let (moment, direction) = moment.iter().zip(gradient).map(step).unzip();
    [moment, direction]
}

/// Returns the norm by which a matrix is divided before the iterations. No singular value is then above 1.
pub fn divisor<R: Real>(options: &Muon, x: &Matrix<R>) -> R {
    let squares: f64 = x.data.iter().map(|v| v.as_f64() * v.as_f64()).sum();
    R::from_f64(squares.sqrt().max(options.eps))
}

/// Runs the iterations X ← a·X + (b·X·Xᵀ + c·(X·Xᵀ)²)·X on a matrix that was divided by its norm. The Gram matrix X·Xᵀ is
/// smallest if X has at least as many columns as rows.
pub fn iterate<R: Real>(options: &Muon, mut x: Matrix<R>, rounding: &Rounding) -> Matrix<R> {
    let [a, b, c] = options.coefficients.map(R::from_f64);
    let threads = cores();
    let operand = |matrix: &Matrix<R>| matrix.map(threads, |v| rounding.operand.round(v));
    let rounded = |mut matrix: Matrix<R>| {
        rounding.round_all(rounding.product, &mut matrix.data, threads);
        matrix
    };
    for _ in 0..options.iterations {
        let factor = operand(&x);
        let gram = rounded(factor.view().product(factor.view().transposed(), threads));
        let side = operand(&gram);
        let square = side.view().product(side.view(), threads);
        let polynomial = rounded(gram.zip(&square, threads, |g, s| b * g + c * s));
        let product = operand(&polynomial).view().product(factor.view(), threads);
        x = rounded(x.zip(&product, threads, |x, p| a * x + p));
    }
    x
}

/// Returns the transpose.
fn transposed<R: Real>(x: &Matrix<R>) -> Matrix<R> {
    let value = |at: usize| x.data[at % x.rows * x.columns + at / x.rows];
    Matrix::new(x.columns, x.rows, (0..x.data.len()).map(value).collect())
}

/// Orthogonalizes a matrix: each singular value becomes about 1. The iterations run on its transpose if it has more
/// rows than columns.
pub fn orthogonalize<R: Real>(options: &Muon, mut x: Matrix<R>, rounding: &Rounding) -> Matrix<R> {
    let is_tall = x.rows > x.columns;
    let threads = cores();
    rounding.round_all(rounding.product, &mut x.data, threads);
    let norm = divisor(options, &x);
    let mut x = x.map(threads, |v| v / norm);
    rounding.round_all(rounding.product, &mut x.data, threads);
    if is_tall {
        transposed(&iterate(options, transposed(&x), rounding))
    } else {
        iterate(options, x, rounding)
    }
}

/// Moves a parameter in a direction, after weight decay. `rate` is the learning rate of its matrix.
pub fn descend<R: Real>(
    options: &Muon,
    parameter: &[R],
    direction: &[R],
    rate: f64,
    rounding: &Rounding,
) -> Vec<R> {
    let r = |v: R| rounding.round(rounding.leaf, v);
    let constant = |v: f64| rounding.leaf.round(R::from_f64(v));
    let (decay, rate) = (constant(1.0 - options.lr * options.weight_decay), constant(rate));
    parameter.iter().zip(direction).map(|(&p, &d)| r(r(p * decay) - r(rate * d))).collect()
}

/// Returns a matrix and its first moment after a step. `state` has them before it.
pub fn muon<R: Real>(
    options: &Muon,
    state: [&[R]; 2],
    gradient: &[f32],
    [rows, columns]: [usize; 2],
    rounding: &Rounding,
) -> [Vec<R>; 2] {
    let [parameter, moment] = state;
    let [moment, direction] = momentum(options, moment, gradient, rounding);
    let direction = orthogonalize(options, Matrix::new(rows, columns, direction), rounding);
    let parameter = descend(options, parameter, &direction.data, options.rate(rows, columns), rounding);
    [parameter, moment]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::Accumulation;
    use crate::reference::test_data::hash;
    use crate::suite::Precision;

    /// Returns a matrix of numbers in ±1.
    fn random(rows: usize, columns: usize) -> Matrix<f64> {
        let value = |i| hash(7, i) as f64 / u64::MAX as f64 * 2.0 - 1.0;
        Matrix::new(rows, columns, (0..(rows * columns) as u64).map(value).collect())
    }

    fn polynomial(options: &Muon, x: f64) -> f64 {
        let [a, b, c] = options.coefficients;
        (0..options.iterations).fold(x, |x, _| a * x + b * x.powi(3) + c * x.powi(5))
    }

    #[test]
    fn the_iterations_apply_the_polynomial_to_each_singular_value() {
        // A diagonal matrix has its singular values on the diagonal.
        let values = [3.0, 2.0, 0.5, 0.01];
        let options = Muon::TRAINING;
        let mut x = Matrix::zeros(4, 6);
        values.iter().enumerate().for_each(|(i, v)| x.data[i * 6 + i] = *v);
        let norm = values.iter().map(|v| v * v).sum::<f64>().sqrt();
        let out = orthogonalize(&options, x, &Rounding::NONE);
        for (i, row) in out.data.chunks(6).enumerate() {
            for (j, found) in row.iter().enumerate() {
                let expected = if i == j { polynomial(&options, values[i] / norm) } else { 0.0 };
                assert!((found - expected).abs() < 1e-12, "{i} {j}: {found} {expected}");
            }
        }
        // The coefficients of the post map all values in this range to about 1.
        assert!((1..100).all(|i| (0.6..1.25).contains(&polynomial(&options, f64::from(i) / 100.0))));
    }

    #[test]
    fn a_tall_matrix_is_the_transpose_of_its_wide_one() {
        let tall = random(12, 5);
        let wide = orthogonalize(&Muon::TRAINING, transposed(&tall), &Rounding::NONE);
        let found = orthogonalize(&Muon::TRAINING, tall, &Rounding::NONE);
        assert_eq!(found.data, transposed(&wide).data);
        // Columns are about orthogonal and of about unit length.
        let gram = found.view().transposed().product(found.view(), 1);
        for (at, v) in gram.data.iter().enumerate() {
            let range = if at / 5 == at % 5 { 0.4..1.6 } else { -0.5..0.5 };
            assert!(range.contains(v), "{at}: {v}");
        }
    }

    #[test]
    fn the_scale_of_a_gradient_does_not_matter() {
        let (options, gradient) = (Muon::PARITY, random(4, 8));
        let step = |scale: f64| {
            let gradient: Vec<f32> = gradient.data.iter().map(|v| (v * scale) as f32).collect();
            let [parameter, moment] =
                muon::<f64>(&options, [&[1.0; 32], &[0.0; 32]], &gradient, [4, 8], &Rounding::NONE);
            (parameter, moment)
        };
        let [(one, small), (other, large)] = [step(1.0), step(1024.0)];
        assert!(one.iter().zip(&other).all(|(a, b)| (a - b).abs() < 1e-12));
        assert!(small.iter().zip(&large).all(|(a, b)| (1024.0 * a - b).abs() < 1e-9));
        // A gradient of zero leaves the decay, and no NaN.
        let [decayed, _] =
            muon::<f64>(&options, [&[1.0; 32], &[0.0; 32]], &[0.0; 32], [4, 8], &Rounding::NONE);
        assert!(decayed.iter().all(|v| (v - 0.9).abs() < 1e-12));
    }

    #[test]
    fn a_tall_matrix_moves_further_and_momentum_is_nesterov() {
        let options = Muon::PARITY;
        assert_eq!((options.rate(8, 2), options.rate(2, 8)), (2.0 * options.lr, options.lr));
        let [moment, direction] = momentum::<f64>(&options, &[1.0], &[3.0], &Rounding::NONE);
        let expected = 0.95 + 0.05 * 3.0;
        assert!((moment[0] - expected).abs() < 1e-12);
        assert!((direction[0] - (0.95 * expected + 0.05 * 3.0)).abs() < 1e-12);
    }

    #[test]
    fn bf16_iterations_have_a_small_error_and_no_nan() {
        let x = random(32, 48);
        let exact = orthogonalize(&Muon::TRAINING, x.clone(), &Rounding::NONE);
        let bf16 = Rounding::for_precision(Precision::Bf16, Accumulation::Wide);
        let rounded = orthogonalize(&Muon::TRAINING, x, &bf16);
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
        let error = square(&mut exact.data.iter().zip(&rounded.data).map(|(a, b)| a - b));
        let share = (error / square(&mut exact.data.iter().copied())).sqrt();
        assert!((1e-3..0.1).contains(&share), "{share}");
    }
}
