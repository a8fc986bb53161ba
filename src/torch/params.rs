//! Loading of inputs and parameters, and reading of results.
//!
//! Parameters are leaf tensors of autograd. A leaf can pack several parameters.

use anyhow::Result;
use tch::{Device, Kind, Tensor};
use transformer_bench::backend::result_names;
use transformer_bench::fixture::{Fixture, Tensor as Named};
use transformer_bench::model::parameters::{InOrder, Parameters};
use transformer_bench::suite::{Case, Shape};

fn load(named: &Named, device: Device, kind: Kind) -> Tensor {
    let dims: Vec<i64> = named.dims.iter().map(|&d| d as i64).collect();
    Tensor::from_slice(&named.data).view(dims.as_slice()).to_device(device).to_kind(kind)
}

/// Returns the inputs of each micro-batch: token ids as int64, inputs of the loss as f32, and the others as `kind`. Each
/// tensor has its own memory, as those of a data loader do.
pub fn load_inputs(fixture: &Fixture, device: Device, kind: Kind) -> Vec<Vec<Tensor>> {
    let kind_of = |name: &str| match name {
        "tokens" | "next" => Kind::Int64,
        // The loss is in f32 for every precision.
        "usefulness" => Kind::Float,
        _ => kind,
    };
    let count = fixture.case.shape.micro_batches() as i64;
    let mut micro_batches: Vec<Vec<Tensor>> = (0..count).map(|_| Vec::new()).collect();
    for named in fixture.inputs() {
        let whole = load(named, device, kind_of(&named.name));
        if count == 1 {
            micro_batches[0].push(whole);
            continue;
        }
        for (inputs, part) in micro_batches.iter_mut().zip(whole.chunk(count, 0)) {
            inputs.push(part.copy());
        }
    }
    micro_batches
}

/// Copies the inputs of a fixture into tensors that [`load_inputs`] returned. Further tensors stay unchanged.
pub fn copy_inputs(fixture: &Fixture, micro_batches: &[Vec<Tensor>]) {
    for (index, named) in fixture.inputs().iter().enumerate() {
        let first = &micro_batches[0][index];
        let parts = load(named, first.device(), first.kind()).chunk(micro_batches.len() as i64, 0);
        for (inputs, part) in micro_batches.iter().zip(&parts) {
            inputs[index].detach().copy_(part);
        }
    }
}

/// Copies a tensor to the host as f32.
fn read(name: String, tensor: &Tensor) -> Result<Named> {
    let dims = tensor.size().iter().map(|&d| d as usize).collect();
    let flat = tensor.detach().to_device(Device::Cpu).to_kind(Kind::Float).contiguous().view([-1]);
    Ok(Named { name, dims, data: Vec::<f32>::try_from(flat)? })
}

/// Returns the name of the packed leaf if `name` is the weight or bias of q, k or v.
fn packed_name(name: &str) -> Option<String> {
    let (head, kind) = name.rsplit_once('.')?;
    let (owner, letter) = head.rsplit_once('.').unwrap_or(("", head));
    (owner.ends_with("attention") && matches!(letter, "q" | "k" | "v")).then(|| format!("{owner}.qkv.{kind}"))
}

/// Location of a parameter: rows of a leaf.
struct Location {
    name: String,
    leaf: usize,
    first_row: i64,
    rows: i64,
}

/// Locations of all parameters, in order.
pub struct ParameterLayout {
    leaf_names: Vec<String>,
    locations: Vec<Location>,
}

impl ParameterLayout {
    /// Returns the layout of a shape's parameters. With `packed`, q, k and v of an attention block share a leaf, so that
    /// one matrix product projects all three.
    pub fn new(shape: Shape, packed: bool) -> Self {
        let mut layout = Self { leaf_names: Vec::new(), locations: Vec::new() };
        for spec in shape.parameter_specs() {
            let leaf_name = packed_name(&spec.name).filter(|_| packed).unwrap_or_else(|| spec.name.clone());
            let known = layout.leaf_names.iter().position(|name| *name == leaf_name);
            let leaf = known.unwrap_or_else(|| {
                layout.leaf_names.push(leaf_name);
                layout.leaf_names.len() - 1
            });
            let first_row = layout.locations.iter().filter(|l| l.leaf == leaf).map(|l| l.rows).sum();
            layout.locations.push(Location { name: spec.name, leaf, first_row, rows: spec.dims[0] as i64 });
        }
        layout
    }

    pub fn leaf_names(&self) -> &[String] {
        &self.leaf_names
    }

    /// Loads a list with one tensor per parameter, in order, as leaves.
    pub fn load(&self, tensors: &[Named], device: Device, kind: Kind) -> Vec<Tensor> {
        let leaf = |leaf: usize| {
            let parts = self.locations.iter().zip(tensors).filter(|(location, _)| location.leaf == leaf);
            let mut parts: Vec<Tensor> = parts.map(|(_, named)| load(named, device, kind)).collect();
            if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 0) }
        };
        (0..self.leaf_names.len()).map(leaf).collect()
    }

    /// Returns the parameters of the network. Each of q, k and v is the whole leaf if they are packed.
    pub fn network_parameters(&self, shape: Shape, leaves: &[Tensor]) -> Parameters<Tensor> {
        let tensors = self.locations.iter().map(|location| leaves[location.leaf].shallow_clone());
        shape.take_parameters(&mut InOrder(tensors))
    }

    /// Reads leaves as one tensor per parameter, named `prefix/<parameter>`.
    pub fn read_leaves(&self, prefix: &str, leaves: &[Tensor]) -> Result<Vec<Named>> {
        let read_one = |location: &Location| {
            let rows = leaves[location.leaf].narrow(0, location.first_row, location.rows);
            read(format!("{prefix}/{}", location.name), &rows)
        };
        self.locations.iter().map(read_one).collect()
    }

    /// Copies the tensors that are named `prefix/<parameter>` into leaves. Other leaves keep their values.
    pub fn copy_into_leaves(&self, prefix: &str, tensors: &[Named], leaves: &[Tensor]) {
        for location in &self.locations {
            let name = format!("{prefix}/{}", location.name);
            let Some(named) = tensors.iter().find(|tensor| tensor.name == name) else { continue };
            let leaf = leaves[location.leaf].detach();
            leaf.narrow(0, location.first_row, location.rows).copy_(&load(named, leaf.device(), leaf.kind()));
        }
    }

    /// Reads the results of a step, the gradients of the leaves, and the updated leaves. The last two can be empty.
    pub fn read_outputs(
        &self,
        case: &Case,
        results: &[Tensor],
        gradients: &[Tensor],
        updated: &[Tensor],
    ) -> Result<Vec<Named>> {
        let names = result_names(case).iter().map(|name| (*name).to_owned());
        let mut all = names.zip(results).map(|(name, t)| read(name, t)).collect::<Result<Vec<_>>>()?;
        for (prefix, leaves) in [("grad", gradients), ("param", updated)] {
            if !leaves.is_empty() {
                all.extend(self.read_leaves(prefix, leaves)?);
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_leaves_have_the_names_of_the_compiled_network() {
        let case: Case = "train-step/torch-cpu/f32-compile/indicator-tiny-b2".parse().unwrap();
        let fixture = Fixture::new(case);
        let layout = ParameterLayout::new(case.shape, true);
        let leaves = layout.load(fixture.parameters(), Device::Cpu, Kind::Float);
        assert_eq!(layout.leaf_names().len(), leaves.len());
        assert!(
            layout.leaf_names().contains(&"blocks.0.attention.qkv.weight".to_owned()),
            "{:?}",
            layout.leaf_names
        );
    }
}
