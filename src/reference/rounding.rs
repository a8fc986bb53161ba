//! The number formats in which a precision stores the results of its operations. The reference rounds likewise,
//! to measure the error that rounding causes.

use half::{bf16, f16};

use super::matmul::{Real, for_each_chunk};
use crate::suite::Precision;

/// A number format. Its numbers are stored in a wider type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The type of the arithmetic.
    Unrounded,
    /// f32 with 11 significant bits (NVIDIA, *A100 whitepaper*, 2020).
    Tf32,
    Bf16,
    F16,
}

impl Format {
    /// Returns the nearest number of the format, ties to even.
    pub fn round<R: Real>(self, value: R) -> R {
        match self {
            Self::Unrounded => value,
            Self::Tf32 => R::from_f32(tf32(value.as_f32())),
            Self::Bf16 => R::from_f32(bf16::from_f32(value.as_f32()).to_f32()),
            Self::F16 => R::from_f32(f16::from_f32(value.as_f32()).to_f32()),
        }
    }

    /// Returns the largest relative rounding error. For `Unrounded` it is that of f32.
    pub fn unit_roundoff(self) -> f64 {
        match self {
            Self::Unrounded => 2f64.powi(-24),
            Self::Tf32 | Self::F16 => 2f64.powi(-11),
            Self::Bf16 => 2f64.powi(-8),
        }
    }
}

fn tf32(value: f32) -> f32 {
    const DROPPED_BITS: u32 = 13;
    let bits = value.to_bits();
    let half = (1 << (DROPPED_BITS - 1)) - 1 + ((bits >> DROPPED_BITS) & 1);
    f32::from_bits(bits.wrapping_add(half) & !((1 << DROPPED_BITS) - 1))
}

/// The type in which a framework accumulates a sum over rows, such as the gradient of a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Accumulation {
    /// f32.
    Wide,
    /// The type of the summands for the gradients of a norm's weight and bias, f32 for all others.
    NarrowInNorms,
    /// The type of the summands. This includes the sum in the derivative of softmax.
    Narrow,
}

/// The format of each kind of value, and the direction in which values between two of its numbers are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rounding {
    /// Parameters and inputs of the network.
    pub leaf: Format,
    /// Operands of matrix products.
    pub operand: Format,
    /// Results of products, activations and dropout on them, and the gradients of parameters.
    pub product: Format,
    /// Results of norms and the residual stream.
    pub stream: Format,
    pub accumulation: Accumulation,
    /// True if attention's backward pass uses Σ gradient·result for Σ weight·gradient, as fused kernels do
    /// (Dao et al., *FlashAttention*, 2022). The rounding errors of a row then no longer cancel.
    pub fused_attention: bool,
    /// 0 rounds to the nearest number. Any other seed first shifts each value by up to half a unit, which
    /// draws other rounding errors.
    pub seed: u64,
}

impl Rounding {
    /// No rounding except that of the arithmetic.
    pub const NONE: Self = Self::all(Format::Unrounded);

    const fn all(format: Format) -> Self {
        Self {
            leaf: format,
            operand: format,
            product: format,
            stream: format,
            accumulation: Accumulation::Wide,
            fused_attention: false,
            seed: 0,
        }
    }

    /// Returns the rounding of a precision. Products always accumulate in f32.
    pub fn for_precision(precision: Precision, accumulation: Accumulation) -> Self {
        let formats = match precision {
            Precision::F32 => Self::NONE,
            Precision::Tf32 => Self { operand: Format::Tf32, ..Self::NONE },
            Precision::Bf16 | Precision::Mixed => Self::all(Format::Bf16),
            Precision::F16 => Self::all(Format::F16),
            Precision::Amp => Self { operand: Format::Bf16, product: Format::Bf16, ..Self::NONE },
        };
        Self { accumulation, ..formats }
    }

    /// Returns the rounding of Muon in a precision. Parameters and moments have their own type, and the iterations run in
    /// the type of the computation: in f32, or in bf16 as published.
    pub fn for_muon(precision: Precision) -> Self {
        let computation = Self::for_precision(precision, Accumulation::Wide);
        Self { leaf: if precision.is_half() { computation.leaf } else { Format::Unrounded }, ..computation }
    }

    /// Rounds a computed value to `format`. Leaves are not computed, so [`Format::round`] rounds them.
    pub fn round<R: Real>(&self, format: Format, value: R) -> R {
        if self.seed == 0 {
            return format.round(value);
        }
        // splitmix64 (Steele et al. 2014) of the value itself has no state, so threads do not change the result.
        let mut hash = value.as_f64().to_bits() ^ self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let signed = ((hash ^ (hash >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0;
        format.round(value + value * R::from_f64(signed * format.unit_roundoff()))
    }

    /// Adds rows to a sum, one after the other. `is_norm` is true for the gradients of a norm's weight and bias.
    pub fn add_rows<R: Real>(&self, format: Format, is_norm: bool, into: &mut [R], rows: &[R]) {
        let narrow = match self.accumulation {
            Accumulation::Wide => false,
            Accumulation::NarrowInNorms => is_norm,
            Accumulation::Narrow => true,
        };
        let format = if narrow { format } else { Format::Unrounded };
        for row in rows.chunks(into.len()) {
            into.iter_mut().zip(row).for_each(|(sum, &v)| *sum = format.round(*sum + v));
        }
    }

    /// Rounds all values to `format`, with at most `threads` threads.
    pub fn round_all<R: Real>(&self, format: Format, values: &mut [R], threads: usize) {
        if format != Format::Unrounded || self.seed != 0 {
            for_each_chunk(values, 1, threads, |_, piece| {
                piece.iter_mut().for_each(|v| *v = self.round(format, *v));
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tf32_has_eleven_significant_bits_and_rounds_ties_to_even() {
        let ulp = 2f32.powi(-10);
        assert_eq!(tf32(1.0 + ulp), 1.0 + ulp);
        assert_eq!(tf32(1.0 + 0.5 * ulp), 1.0);
        assert_eq!(tf32(1.0 + 1.5 * ulp), 1.0 + 2.0 * ulp);
        assert_eq!(tf32(-(1.0 + 0.51 * ulp)), -(1.0 + ulp));
        assert_eq!(Format::Tf32.round(1.0f64 + f64::from(0.4 * ulp)), 1.0);
    }

    #[test]
    fn a_seed_rounds_to_either_neighbour_repeatably() {
        let bf16 = Rounding::for_precision(Precision::Bf16, Accumulation::Wide);
        let at = |seed, v: f64| Rounding { seed, ..bf16 }.round(Format::Bf16, v);
        let (below, above) = (1.0, 1.0 + 2f64.powi(-7));
        let middle = 1.0 + 2f64.powi(-8);
        let all: Vec<f64> = (1..200).map(|seed| at(seed, middle)).collect();
        let up = all.iter().filter(|v| **v == above).count();
        assert!((60..140).contains(&up) && all.iter().all(|v| *v == above || *v == below), "{up}");
        assert_eq!(at(7, middle), at(7, middle));
    }

    #[test]
    fn the_unit_roundoff_bounds_the_rounding_error() {
        for format in [Format::Tf32, Format::Bf16, Format::F16] {
            let worst = (0..4096)
                .map(|i| 1.0 + f64::from(i) / 4096.0)
                .map(|v| (format.round(v) - v).abs() / v)
                .fold(0.0, f64::max);
            let unit = format.unit_roundoff();
            assert!(worst <= unit && worst > 0.8 * unit, "{format:?}: {worst:.2e} of {unit:.2e}");
        }
    }
}
