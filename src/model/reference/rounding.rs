//! How a precision stores what its operations give: the oracle rounds likewise to learn what
//! that costs.

use half::{bf16, f16};

use super::matrix::{Real, in_pieces};
use crate::suite::Precision;

/// A number format; values are kept in a wider type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As the arithmetic has it.
    Whole,
    /// 11 significant bits of an f32 (NVIDIA, *A100 whitepaper*, 2020).
    Tf32,
    Bf16,
    F16,
}

impl Format {
    /// The nearest number of the format; ties to even.
    pub fn round<R: Real>(self, value: R) -> R {
        match self {
            Self::Whole => value,
            Self::Tf32 => R::from_f32(tf32(value.as_f32())),
            Self::Bf16 => R::from_f32(bf16::from_f32(value.as_f32()).to_f32()),
            Self::F16 => R::from_f32(f16::from_f32(value.as_f32()).to_f32()),
        }
    }

    /// Half the distance of two neighbours over their size, at worst; of f32 where whole.
    pub fn unit_roundoff(self) -> f64 {
        match self {
            Self::Whole => 2f64.powi(-24),
            Self::Tf32 | Self::F16 => 2f64.powi(-11),
            Self::Bf16 => 2f64.powi(-8),
        }
    }
}

fn tf32(value: f32) -> f32 {
    const DROPPED: u32 = 13;
    let bits = value.to_bits();
    let half = (1 << (DROPPED - 1)) - 1 + ((bits >> DROPPED) & 1);
    f32::from_bits(bits.wrapping_add(half) & !((1 << DROPPED) - 1))
}

/// In which type a framework keeps a sum over rows while it grows, such as a bias's gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sums {
    /// In f32 to its end.
    Wide,
    /// In the type of what it sums, where it is the gradient of a norm's weight or bias.
    NarrowInNorms,
    /// In the type of what it sums, softmax's derivative among them.
    Narrow,
}

/// Which format each kind of value has, and how what is between two of its numbers goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rounding {
    /// Parameters and inputs, as the network takes them.
    pub leaf: Format,
    /// What a matrix product reads.
    pub operand: Format,
    /// What a product, an activation or dropout on one gives, and the gradients of parameters.
    pub product: Format,
    /// What norms and the residual stream give.
    pub stream: Format,
    pub sums: Sums,
    /// Whether attention's backward pass takes the inner product with the stored result for that with
    /// the weights, as fused kernels do (Dao et al., *FlashAttention*, 2022): rounding no longer
    /// cancels in a row.
    pub fused: bool,
    /// 0 rounds to the nearest; any other number shifts each value by up to half a unit before,
    /// so that the errors are drawn anew.
    pub draw: u64,
}

impl Rounding {
    /// None beside the arithmetic's own.
    pub const NONE: Self = Self::all(Format::Whole);

    const fn all(format: Format) -> Self {
        Self {
            leaf: format,
            operand: format,
            product: format,
            stream: format,
            sums: Sums::Wide,
            fused: false,
            draw: 0,
        }
    }

    /// As a precision has it, in f32 arithmetic: products accumulate in f32 everywhere, and sums
    /// unless `sums` says otherwise.
    pub fn of(compute: Precision, sums: Sums) -> Self {
        Self { sums, ..Self::formats(compute) }
    }

    fn formats(compute: Precision) -> Self {
        match compute {
            Precision::F32 => Self::NONE,
            Precision::Tf32 => Self { operand: Format::Tf32, ..Self::NONE },
            Precision::Bf16 | Precision::Mixed => Self::all(Format::Bf16),
            Precision::F16 => Self::all(Format::F16),
            Precision::Amp => Self { operand: Format::Bf16, product: Format::Bf16, ..Self::NONE },
        }
    }

    /// A value as the format keeps it. Leaves are given, so they are never shifted.
    pub fn round<R: Real>(&self, format: Format, value: R) -> R {
        if self.draw == 0 {
            return format.round(value);
        }
        // splitmix64 (Steele et al. 2014) of the value itself: no state, the same on any thread.
        let mut hash = value.as_f64().to_bits() ^ self.draw.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let signed = ((hash ^ (hash >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0;
        format.round(value + value * R::from_f64(signed * format.unit_roundoff()))
    }

    /// Adds rows to a sum, one after the other; `of_norm` where it is a norm's gradient.
    pub fn sum<R: Real>(&self, format: Format, of_norm: bool, into: &mut [R], rows: &[R]) {
        let narrow = self.sums == Sums::Narrow || (of_norm && self.sums == Sums::NarrowInNorms);
        let format = if narrow { format } else { Format::Whole };
        for row in rows.chunks(into.len()) {
            into.iter_mut().zip(row).for_each(|(sum, &v)| *sum = format.round(*sum + v));
        }
    }

    pub fn round_all<R: Real>(&self, format: Format, values: &mut [R], threads: usize) {
        if format != Format::Whole || self.draw != 0 {
            in_pieces(values, 1, threads, |_, piece| {
                piece.iter_mut().for_each(|v| *v = self.round(format, *v));
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tf32_keeps_eleven_bits_and_ties_go_to_even() {
        let ulp = 2f32.powi(-10);
        assert_eq!(tf32(1.0 + ulp), 1.0 + ulp);
        assert_eq!(tf32(1.0 + 0.5 * ulp), 1.0);
        assert_eq!(tf32(1.0 + 1.5 * ulp), 1.0 + 2.0 * ulp);
        assert_eq!(tf32(-(1.0 + 0.51 * ulp)), -(1.0 + ulp));
        assert_eq!(Format::Tf32.round(1.0f64 + f64::from(0.4 * ulp)), 1.0);
    }

    #[test]
    fn a_draw_goes_to_either_neighbour_and_is_repeatable() {
        let bf16 = Rounding::of(Precision::Bf16, Sums::Wide);
        let at = |draw, v: f64| Rounding { draw, ..bf16 }.round(Format::Bf16, v);
        let (below, above) = (1.0, 1.0 + 2f64.powi(-7));
        let middle = 1.0 + 2f64.powi(-8);
        let all: Vec<f64> = (1..200).map(|draw| at(draw, middle)).collect();
        let up = all.iter().filter(|v| **v == above).count();
        assert!((60..140).contains(&up) && all.iter().all(|v| *v == above || *v == below), "{up}");
        assert_eq!(at(7, middle), at(7, middle));
    }

    #[test]
    fn formats_round_by_at_most_their_unit() {
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
