//! Gradients that add up over the micro-batches of a step.

use std::collections::HashSet;

use anyhow::Result;
use tch::{Kind, Tensor};

use crate::extension;

/// Sums of the gradients of micro-batches.
pub struct GradientSums {
    /// Type of the sums of several gradients: that of the stored parameters, as `.grad` has in a training script.
    kind: Kind,
    gradients: Vec<Tensor>,
}

impl GradientSums {
    pub fn new(kind: Kind) -> Self {
        Self { kind, gradients: Vec::new() }
    }

    /// Returns the sums over the micro-batches so far. They are empty before the first one.
    pub fn so_far(&self) -> &[Tensor] {
        &self.gradients
    }

    /// Adds the gradients of a micro-batch in place. Those of the first one become the sums. With `has_sums`, they
    /// contain the earlier ones, because the hooks of the all-reduce have added them.
    pub fn add(&mut self, gradients: Vec<Tensor>, has_sums: bool) -> Result<()> {
        if self.gradients.is_empty() || has_sums {
            self.gradients = gradients;
            return Ok(());
        }
        self.own_sums();
        extension::foreach_add(&self.gradients, &gradients)
    }

    /// Gives each sum its type and its own memory. A package of TorchInductor can return one tensor for two equal
    /// gradients. A single micro-batch needs neither.
    fn own_sums(&mut self) {
        let mut known = HashSet::new();
        for sum in &mut self.gradients {
            if sum.kind() != self.kind {
                *sum = sum.to_kind(self.kind);
            } else if !known.insert(sum.data_ptr()) {
                *sum = sum.copy();
            }
        }
    }

    /// Returns the sums.
    pub fn into_gradients(self) -> Vec<Tensor> {
        self.gradients
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn equal_gradients_that_share_memory_add_up_once() {
        let mut sums = GradientSums::new(Kind::Float);
        for _ in 0..2 {
            let shared = Tensor::ones([2], (Kind::Float, Device::Cpu));
            sums.add(vec![shared.shallow_clone(), shared.shallow_clone()], false).unwrap();
        }
        for sum in sums.into_gradients() {
            assert_eq!(sum.double_value(&[1]), 2.0);
        }
    }

    #[test]
    fn several_bf16_gradients_add_up_in_f32() {
        let gradient = |value: f64| vec![Tensor::full([3], value, (Kind::BFloat16, Device::Cpu))];
        let mut sums = GradientSums::new(Kind::Float);
        for value in [1.0, 1.0 / 512.0, 1.0 / 512.0] {
            sums.add(gradient(value), false).unwrap();
        }
        let [sum] = &sums.into_gradients()[..] else { panic!("one gradient") };
        // In bf16, 1 + 1/512 is rounded to 1.
        assert_eq!((sum.kind(), sum.double_value(&[0])), (Kind::Float, 1.0 + 1.0 / 256.0));
    }
}
