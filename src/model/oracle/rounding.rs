//! How a precision stores what its operations give: the oracle rounds likewise to learn what
//! that costs.

use half::{bf16, f16};

use super::matrix::Real;
use crate::suite::Compute;

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

    pub fn round_all<R: Real>(self, values: &mut [R]) {
        if self != Self::Whole {
            values.iter_mut().for_each(|v| *v = self.round(*v));
        }
    }

    /// Half the distance of two neighbours over their size, at worst.
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

/// Which format each kind of value has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rounding {
    /// Parameters and inputs, as the network takes them.
    pub leaf: Format,
    /// What a matrix product reads.
    pub operand: Format,
    /// What a product, an activation or dropout on one gives, and the gradients of parameters.
    pub product: Format,
    /// What norms, softmax and the residual stream give.
    pub stream: Format,
}

impl Rounding {
    /// None beside the arithmetic's own.
    pub const NONE: Self = Self::all(Format::Whole);

    const fn all(format: Format) -> Self {
        Self { leaf: format, operand: format, product: format, stream: format }
    }

    /// As a precision has it, in f32 arithmetic: products accumulate in f32 everywhere.
    pub fn of(compute: Compute) -> Self {
        match compute {
            Compute::F32 => Self::NONE,
            Compute::Tf32 => Self { operand: Format::Tf32, ..Self::NONE },
            Compute::Bf16 | Compute::Amp => Self::all(Format::Bf16),
            Compute::F16 => Self::all(Format::F16),
            Compute::Autocast => Self { operand: Format::Bf16, product: Format::Bf16, ..Self::NONE },
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
