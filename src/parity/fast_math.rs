//! A test that the tolerances allow for the fast math of Apple's GPUs.
//!
//! The reference computes in a number type whose functions have the errors of fast math, and replaces a backend.

use std::iter::Sum;
use std::num::FpCategory;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Rem, Sub};

use num_traits::{Float, Num, One, ToPrimitive, Zero};

use super::tolerance::ReferenceCache;
use crate::fixture::{Fixture, Tensor};
use crate::reference::test_data::{cases, hash};
use crate::reference::{self, Accumulation, Real, Rounding};
use crate::suite::{BackendId, Case, Workload};

/// The smallest and the largest error of a function, in units in the last place. Table 8.2 of the Metal Shading
/// Language specification allows 2 for the inverse square root and 3 + ⌊2|x|⌋ for exp(x), which is 23 at x = −10.
/// Kernels with a polynomial for erf or tanh have similar errors.
const ULPS: [f64; 2] = [4.0, 24.0];

/// An f32 whose functions have the errors of fast math, and whose subnormal results are 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd)]
#[repr(transparent)]
struct FastMath(f32);

fn flushed(value: f32) -> FastMath {
    FastMath(if value.is_subnormal() { 0.0 } else { value })
}

/// Returns a value with an error between the smallest and `ulps` units in the last place.
fn with_error(value: f32, ulps: f64) -> FastMath {
    let random = hash(u64::from(value.to_bits()), 0);
    let share = (random >> 12) as f64 / (1u64 << 52) as f64;
    let sign = if random & 1 == 0 { 1.0 } else { -1.0 };
    let error = sign * (ULPS[0] + share * (ulps - ULPS[0]).max(0.0)) * f64::from(f32::EPSILON);
    flushed((f64::from(value) * (1.0 + error)) as f32)
}

macro_rules! operators {
    ($($trait:ident $function:ident),*) => {
        $(impl $trait for FastMath {
            type Output = Self;
            fn $function(self, other: Self) -> Self {
                flushed(self.0.$function(other.0))
            }
        })*
    };
}

operators!(Add add, Sub sub, Mul mul, Div div, Rem rem);

impl Neg for FastMath {
    type Output = Self;
    fn neg(self) -> Self {
        Self(-self.0)
    }
}

impl AddAssign for FastMath {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl MulAssign for FastMath {
    fn mul_assign(&mut self, other: Self) {
        *self = *self * other;
    }
}

impl Sum for FastMath {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self(0.0), |sum, value| sum + value)
    }
}

impl Zero for FastMath {
    fn zero() -> Self {
        Self(0.0)
    }
    fn is_zero(&self) -> bool {
        self.0 == 0.0
    }
}

impl One for FastMath {
    fn one() -> Self {
        Self(1.0)
    }
}

impl Num for FastMath {
    type FromStrRadixErr = <f32 as Num>::FromStrRadixErr;
    fn from_str_radix(text: &str, radix: u32) -> Result<Self, Self::FromStrRadixErr> {
        f32::from_str_radix(text, radix).map(Self)
    }
}

impl ToPrimitive for FastMath {
    fn to_i64(&self) -> Option<i64> {
        self.0.to_i64()
    }
    fn to_u64(&self) -> Option<u64> {
        self.0.to_u64()
    }
    fn to_f64(&self) -> Option<f64> {
        Some(self.0.into())
    }
}

impl num_traits::NumCast for FastMath {
    fn from<T: ToPrimitive>(value: T) -> Option<Self> {
        value.to_f32().map(Self)
    }
}

/// Delegates functions to those of f32.
macro_rules! exact {
    (values: $($value:ident)*; tests: $($test:ident)*; unary: $($unary:ident)*; binary: $($binary:ident)*) => {
        $(fn $value() -> Self { Self(<f32 as Float>::$value()) })*
        $(fn $test(self) -> bool { self.0.$test() })*
        $(fn $unary(self) -> Self { Self(Float::$unary(self.0)) })*
        $(fn $binary(self, other: Self) -> Self { Self(Float::$binary(self.0, other.0)) })*
    };
}

/// Delegates functions to those of f32, with an error.
macro_rules! inexact {
    ($($function:ident)*) => {
        $(fn $function(self) -> Self { with_error(Float::$function(self.0), ULPS[1]) })*
    };
}

impl Float for FastMath {
    exact! {
        values: nan infinity neg_infinity neg_zero min_value min_positive_value max_value;
        tests: is_nan is_infinite is_finite is_normal is_sign_positive is_sign_negative;
        unary: floor ceil round trunc fract abs signum recip sin cos tan asin acos atan exp_m1 sinh cosh asinh acosh
               atanh exp2 log2 log10 cbrt ln_1p;
        binary: max min abs_sub log powf hypot atan2
    }
    inexact!(tanh sqrt ln);

    /// The error in the table is 3 + ⌊|2x|⌋ units.
    fn exp(self) -> Self {
        with_error(Float::exp(self.0), ULPS[1].max(3.0 + f64::from((2.0 * self.0.abs()).floor())))
    }
    fn classify(self) -> FpCategory {
        Float::classify(self.0)
    }
    fn mul_add(self, a: Self, b: Self) -> Self {
        flushed(self.0.mul_add(a.0, b.0))
    }
    fn powi(self, power: i32) -> Self {
        flushed(self.0.powi(power))
    }
    fn sin_cos(self) -> (Self, Self) {
        (self.sin(), self.cos())
    }
    fn integer_decode(self) -> (u64, i16, i8) {
        self.0.integer_decode()
    }
}

impl Real for FastMath {
    fn from_f32(value: f32) -> Self {
        flushed(value)
    }
    fn from_f64(value: f64) -> Self {
        flushed(value as f32)
    }
    fn as_f32(self) -> f32 {
        self.0
    }
    fn as_f64(self) -> f64 {
        self.0.into()
    }
    fn erf(self) -> Self {
        with_error(Real::erf(self.0), ULPS[1])
    }
    unsafe fn product(
        sizes: [usize; 3],
        a: (*const Self, isize, isize),
        b: (*const Self, isize, isize),
        c: *mut Self,
        columns: isize,
    ) {
        let [a, b] = [a, b].map(|(data, row, column)| (data.cast::<f32>(), row, column));
        // SAFETY: the type is transparent, and the caller guarantees the rest.
        unsafe { f32::product(sizes, a, b, c.cast::<f32>(), columns) }
    }
}

/// Returns the largest error / tolerance of a fixture in fast math, and the tensor.
fn largest_ratio(fixture: &Fixture) -> (f64, String) {
    let rounding = Rounding { fused_attention: fixture.case.fuses_attention(), ..Rounding::NONE };
    let results = reference::compute::<FastMath>(fixture, rounding, None).into_iter().map(|values| Tensor {
        dims: vec![values.data.len()],
        name: values.name,
        data: values.data.into_iter().map(Real::as_f32).collect(),
    });
    let results: Vec<Tensor> = results.collect();
    let expected = ReferenceCache::default().expected(fixture, Accumulation::Wide);
    let ratios = expected.iter().map(|tensor| (tensor.error(&results).ratio(), &tensor.name));
    let (ratio, name) = ratios.max_by(|(a, _), (b, _)| a.total_cmp(b)).expect("a result");
    (ratio, format!("{name} of {}", fixture.case))
}

#[test]
fn fast_math_is_within_the_tolerances_of_apples_gpus() {
    let own_sizes = ["f32", "f32-tuned"].map(|method| format!("train-step/torch-mps/{method}/indicator-b2"));
    let own_sizes = own_sizes.map(|id| id.parse().unwrap());
    let miniatures = cases().into_iter().map(|case| Case { backend: BackendId::TorchMps, ..case });
    let all = miniatures.filter(|case| case.workload != Workload::OptimizerStep).chain(own_sizes);
    let mut worst = [(0.0, String::new()), (0.0, String::new())];
    for case in all {
        let fixtures = [Fixture::for_parity(case), Fixture::for_parity(case).with_batch(1)];
        for (worst, fixture) in worst.iter_mut().zip(&fixtures) {
            let found = largest_ratio(fixture);
            if found.0 > worst.0 {
                *worst = found;
            }
        }
    }
    for (ratio, tensor) in &worst {
        println!("fast math: error / tolerance at most {ratio:.2}: {tensor}");
    }
    assert!(worst.iter().all(|(ratio, _)| *ratio <= 1.0));
}

#[test]
fn an_error_is_within_its_bounds() {
    for i in 1..1000 {
        let value = i as f32 * 0.37;
        let ulps = (with_error(value, ULPS[1]).0 / value - 1.0).abs() / f32::EPSILON;
        assert!((2.0..=25.0).contains(&ulps), "{value}: {ulps}");
    }
    assert_eq!(flushed(1e-40).0, 0.0);
}
