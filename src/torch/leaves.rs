//! The parameters of a step as leaf tensors of autograd, and their copies in the type of the computation.

use anyhow::Result;
use tch::{Device, Kind, Tensor};
use transformer_bench::fixture::{Fixture, Tensor as Named};
use transformer_bench::model::parameters::Parameters;
use transformer_bench::suite::{Case, Shape};

use crate::extension;
use crate::params::ParameterLayout;

/// The leaves of a case.
pub struct Leaves {
    pub layout: ParameterLayout,
    /// All leaves, in the types in which they are stored.
    pub stored: Vec<Tensor>,
    /// The trained ones, which the optimizer updates.
    pub trained: Vec<Tensor>,
    /// The tensors that gradients are with respect to: the trained leaves or their copies.
    pub differentiated: Vec<Tensor>,
    /// In a variant that captures the full step: copies of the leaves that are stored in another type than that of the
    /// computation. One call per step updates them.
    copies: Vec<Tensor>,
    /// The leaves of the copies.
    copied: Vec<Tensor>,
    /// The type to which a step casts leaves under autograd, if they have another type and no copies.
    cast: Option<Kind>,
}

impl Leaves {
    /// Loads the parameters of a fixture. Returns them as leaves, and as the parameters of the network. With `packed`,
    /// q, k and v share a leaf.
    pub fn load(fixture: &Fixture, device: Device, packed: bool) -> (Self, Parameters<Tensor>) {
        let Case { workload, method, shape, .. } = fixture.case;
        let layout = ParameterLayout::new(shape, packed);
        let stored = layout.load(fixture.parameters(), device, crate::kind(method.precision));
        let needs_gradient = |leaf: usize| workload.trains() && layout.is_trained(leaf);
        let with_gradient = |(leaf, tensor): (usize, Tensor)| tensor.set_requires_grad(needs_gradient(leaf));
        let stored: Vec<Tensor> = stored.into_iter().enumerate().map(with_gradient).collect();
        let kind = crate::compute_kind(method.precision);
        let differs = stored.iter().any(|leaf| leaf.kind() != kind);
        let has_copies = differs && method.variant.captures_full_step();
        let (mut copies, mut copied) = (Vec::new(), Vec::new());
        let mut computed = Vec::new();
        for (leaf, tensor) in stored.iter().enumerate() {
            if !has_copies || tensor.kind() == kind {
                computed.push(tensor.shallow_clone());
                continue;
            }
            let copy = tensor.detach().to_kind(kind).set_requires_grad(needs_gradient(leaf));
            computed.push(copy.shallow_clone());
            copies.push(copy);
            copied.push(tensor.shallow_clone());
        }
        let parameters = layout.network_parameters(shape, &computed);
        let (trained, differentiated) = (layout.trained(&stored), layout.trained(&computed));
        let cast = (differs && !has_copies).then_some(kind);
        (Self { layout, stored, trained, differentiated, copies, copied, cast }, parameters)
    }

    /// Brings the parameters of the network up to date at the begin of a step.
    pub fn update_network(&self, shape: Shape, parameters: &mut Parameters<Tensor>) -> Result<()> {
        if !self.copies.is_empty() {
            extension::foreach_copy(&self.copies, &self.copied)?;
        }
        if let Some(kind) = self.cast {
            let casts: Vec<Tensor> = self.stored.iter().map(|leaf| leaf.to_kind(kind)).collect();
            *parameters = self.layout.network_parameters(shape, &casts);
        }
        Ok(())
    }

    /// Returns the type in which trained parameters are stored. Without parameters, it is f32.
    pub fn trained_kind(&self) -> Kind {
        self.trained.first().map_or(Kind::Float, Tensor::kind)
    }

    /// Loads the fixed gradients of an optimizer step.
    pub fn load_gradients(&self, gradients: &[Named], device: Device) -> Vec<Tensor> {
        self.layout.load_trained(gradients, device, self.trained_kind())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_adapters_of_a_bf16_model_are_copied_and_differentiated() {
        for (method, copied) in [("bf16", false), ("bf16-tuned", true), ("f32-tuned", false)] {
            let case: Case =
                format!("train-step/torch-cpu/{method}/indicator-tiny-b2-lora4").parse().unwrap();
            let (leaves, _) = Leaves::load(&Fixture::new(case), Device::Cpu, false);
            // Six layers in each of two blocks, with two matrices each.
            assert_eq!((leaves.trained.len(), leaves.differentiated.len()), (24, 24), "{method}");
            assert!(leaves.trained.iter().all(|leaf| leaf.kind() == Kind::Float), "{method}");
            assert_eq!(leaves.copies.len(), if copied { 24 } else { 0 }, "{method}");
            let trained = leaves.stored.iter().filter(|leaf| leaf.requires_grad()).count();
            assert_eq!(trained, 24, "{method}");
        }
    }
}
