//! Matrices of f64 or f32 numbers. The crate `matrixmultiply` computes their products, on several threads.

use std::fmt::Debug;
use std::iter::Sum;
use std::ops::{AddAssign, MulAssign};

use num_traits::Float;

/// The number type of a computation: f64 for exact results, f32 for results rounded as a precision does.
pub trait Real: Float + Send + Sync + Debug + Default + Sum + AddAssign + MulAssign + 'static {
    fn from_f32(value: f32) -> Self;
    fn from_f64(value: f64) -> Self;
    fn as_f32(self) -> f32;
    fn as_f64(self) -> f64;
    fn erf(self) -> Self;

    /// Computes c = a·b for a [m, k] and b [k, n]. The rows of c are `columns` elements apart.
    ///
    /// # Safety
    /// All elements that sizes and strides address must exist. No one else may access those of c.
    unsafe fn product(sizes: [usize; 3], a: Strided<Self>, b: Strided<Self>, c: *mut Self, columns: isize);
}

/// A pointer to the first element, the stride of the rows and the stride of the columns, both in elements.
pub type Strided<R> = (*const R, isize, isize);

macro_rules! real {
    ($type:ident, $product:path, $erf:path) => {
        impl Real for $type {
            fn from_f32(value: f32) -> Self {
                value.into()
            }
            fn from_f64(value: f64) -> Self {
                value as $type
            }
            fn as_f32(self) -> f32 {
                self as f32
            }
            fn as_f64(self) -> f64 {
                self.into()
            }
            fn erf(self) -> Self {
                $erf(self)
            }
            unsafe fn product(
                [m, k, n]: [usize; 3],
                a: Strided<Self>,
                b: Strided<Self>,
                c: *mut Self,
                columns: isize,
            ) {
                // SAFETY: the caller guarantees it.
                unsafe { $product(m, k, n, 1.0, a.0, a.1, a.2, b.0, b.1, b.2, 0.0, c, columns, 1) }
            }
        }
    };
}

real!(f64, matrixmultiply::dgemm, libm::erf);
real!(f32, matrixmultiply::sgemm, libm::erff);

/// Returns the number of threads that can run at once.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The fewest numbers for which starting a thread pays.
const MIN_NUMBERS_PER_THREAD: usize = 1 << 15;

/// Splits the rows of `data` over at most `threads` threads. Calls `part` with the index of the first number and
/// the numbers.
pub fn for_each_chunk<R: Send>(
    data: &mut [R],
    columns: usize,
    threads: usize,
    part: impl Fn(usize, &mut [R]) + Sync,
) {
    let rows = data.len() / columns.max(1);
    let threads = threads.min(data.len() / MIN_NUMBERS_PER_THREAD).min(rows);
    if threads < 2 {
        return part(0, data);
    }
    let each = rows.div_ceil(threads) * columns;
    std::thread::scope(|scope| {
        for (index, piece) in data.chunks_mut(each).enumerate() {
            let part = &part;
            scope.spawn(move || part(index * each, piece));
        }
    });
}

/// A matrix [rows, columns], row-major.
#[derive(Clone, Debug, Default)]
pub struct Matrix<R> {
    pub rows: usize,
    pub columns: usize,
    pub data: Vec<R>,
}

/// A range of a matrix's columns, or its transpose.
#[derive(Clone, Copy)]
pub struct View<'a, R> {
    rows: usize,
    columns: usize,
    /// Distances between rows and between columns, in elements.
    strides: [usize; 2],
    data: &'a [R],
}

impl<R: Real> Matrix<R> {
    pub fn new(rows: usize, columns: usize, data: Vec<R>) -> Self {
        assert_eq!(rows * columns, data.len());
        Self { rows, columns, data }
    }

    pub fn zeros(rows: usize, columns: usize) -> Self {
        Self::new(rows, columns, vec![R::zero(); rows * columns])
    }

    pub fn view(&self) -> View<'_, R> {
        self.columns_from(0, self.columns)
    }

    /// Returns a view of `count` columns, from column `first`.
    pub fn columns_from(&self, first: usize, count: usize) -> View<'_, R> {
        assert!(first + count <= self.columns);
        let data = if self.rows == 0 { &[] } else { &self.data[first..] };
        View { rows: self.rows, columns: count, strides: [self.columns, 1], data }
    }

    /// Adds `part` to the columns from column `first`.
    pub fn add_to_columns(&mut self, first: usize, part: &Self) {
        for (row, from) in self.data.chunks_mut(self.columns).zip(part.data.chunks(part.columns)) {
            row[first..first + part.columns].iter_mut().zip(from).for_each(|(a, &b)| *a += b);
        }
    }

    pub fn add(&mut self, other: &Self) {
        self.data.iter_mut().zip(&other.data).for_each(|(a, &b)| *a += b);
    }

    pub fn map(&self, threads: usize, f: impl Fn(R) -> R + Sync) -> Self {
        let mut new = self.clone();
        for_each_chunk(&mut new.data, 1, threads, |_, piece| piece.iter_mut().for_each(|v| *v = f(*v)));
        new
    }

    pub fn zip(&self, other: &Self, threads: usize, f: impl Fn(R, R) -> R + Sync) -> Self {
        assert_eq!((self.rows, self.columns), (other.rows, other.columns));
        let mut new = self.clone();
        for_each_chunk(&mut new.data, 1, threads, |first, piece| {
            piece.iter_mut().zip(&other.data[first..]).for_each(|(a, &b)| *a = f(*a, b));
        });
        new
    }

    pub fn row(&self, index: usize) -> &[R] {
        &self.data[index * self.columns..(index + 1) * self.columns]
    }
}

impl<'a, R: Real> View<'a, R> {
    pub fn transposed(self) -> Self {
        let [rows, columns] = self.strides;
        Self { rows: self.columns, columns: self.rows, strides: [columns, rows], data: self.data }
    }

    fn strided(&self) -> Strided<R> {
        (self.data.as_ptr(), self.strides[0] as isize, self.strides[1] as isize)
    }

    fn rows_from(self, row: usize, rows: usize) -> Self {
        Self { rows, data: &self.data[row * self.strides[0]..], ..self }
    }

    /// Computes self·other with at most `threads` threads.
    pub fn product(self, other: View<'_, R>, threads: usize) -> Matrix<R> {
        assert_eq!(self.columns, other.rows, "the inner dimensions of a product");
        let mut result = Matrix::zeros(self.rows, other.columns);
        if result.data.is_empty() || self.columns == 0 {
            return result;
        }
        // A thread pays from about a million multiplications.
        let work = self.rows * self.columns * other.columns;
        let threads = threads.min(work >> 20).max(1);
        let each = self.rows.div_ceil(threads);
        let columns = other.columns;
        let part = |first: usize, into: &mut [R]| {
            let a = self.rows_from(first, into.len() / columns);
            // SAFETY: the strides of a view stay within its slice, and only this call accesses `into`.
            unsafe {
                R::product(
                    [a.rows, a.columns, columns],
                    a.strided(),
                    other.strided(),
                    into.as_mut_ptr(),
                    columns as isize,
                );
            }
        };
        let chunks = result.data.chunks_mut(each * columns).enumerate();
        if threads == 1 {
            chunks.for_each(|(i, into)| part(i * each, into));
        } else {
            std::thread::scope(|scope| {
                chunks.for_each(|(i, into)| {
                    scope.spawn(move || part(i * each, into));
                });
            });
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_column_ranges_and_transposes_are_correct() {
        let make = |rows: usize, columns: usize| {
            let data = (0..rows * columns).map(|i| ((i * 7 + 3) % 11) as f64 - 5.0).collect();
            Matrix::new(rows, columns, data)
        };
        let (a, b) = (make(33, 7), make(33, 9));
        let direct = |i: usize, j: usize| (0..33).map(|k| a.row(k)[2 + i] * b.row(k)[j]).sum::<f64>();
        for threads in [1, 3] {
            let c = a.columns_from(2, 4).transposed().product(b.view(), threads);
            assert_eq!((c.rows, c.columns), (4, 9));
            assert!((0..36).all(|at| c.data[at] == direct(at / 9, at % 9)));
        }
        // Large enough for several threads, whose parts differ in size.
        let (a, b) = (make(131, 128), make(97, 128));
        let one = a.view().product(b.view().transposed(), 1);
        let many = a.view().product(b.view().transposed(), 4);
        assert_eq!(one.data, many.data);
        assert_eq!(one.row(130)[96], (0..128).map(|k| a.row(130)[k] * b.row(96)[k]).sum::<f64>());
    }
}
