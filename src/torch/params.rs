//! Loading of inputs and parameters, and reading of results.
//!
//! Parameters are leaf tensors of autograd. A leaf can pack several parameters.

use anyhow::Result;
use tch::{Device, Kind, Tensor};
use transformer_bench::backend::result_names;
use transformer_bench::fixture::{Fixture, Tensor as Named};
use transformer_bench::model::parameters::{InOrder, Parameters, Role};
use transformer_bench::suite::{Case, Shape};

fn load(named: &Named, device: Device, kind: Kind) -> Tensor {
    let dims: Vec<i64> = named.dims.iter().map(|&d| d as i64).collect();
    Tensor::from_slice(&named.data).view(dims.as_slice()).to_device(device).to_kind(kind)
}

/// Loads an input: token ids as int64, inputs of the loss as f32, and others as `kind`.
pub fn load_input(named: &Named, device: Device, kind: Kind) -> Tensor {
    let kind = match &*named.name {
        "tokens" | "next" => Kind::Int64,
        // The loss is in f32 for every precision.
        "usefulness" => Kind::Float,
        _ => kind,
    };
    load(named, device, kind)
}

/// Returns the inputs of each micro-batch. Each tensor has its own memory, as those of a data loader do.
pub fn load_inputs(fixture: &Fixture, device: Device, kind: Kind) -> Vec<Vec<Tensor>> {
    let count = fixture.case.shape.micro_batches() as i64;
    let mut micro_batches: Vec<Vec<Tensor>> = (0..count).map(|_| Vec::new()).collect();
    for named in fixture.inputs() {
        let whole = load_input(named, device, kind);
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
pub fn read(name: String, tensor: &Tensor) -> Result<Named> {
    let dims = tensor.size().iter().map(|&d| d as usize).collect();
    let flat = tensor.detach().to_device(Device::Cpu).to_kind(Kind::Float).contiguous().view([-1]);
    Ok(Named { name, dims, data: Vec::<f32>::try_from(flat)? })
}

/// Returns the name of the packed leaf if `name` is the weight, the bias or the matrix A of an adapter of q, k or v. They
/// have the same input.
fn packed_name(name: &str) -> Option<String> {
    let (head, kind) = name.rsplit_once('.')?;
    let (owner, letter) = head.rsplit_once('.').unwrap_or(("", head));
    let is_packed = owner.ends_with("attention") && matches!(letter, "q" | "k" | "v") && kind != "lora-b";
    is_packed.then(|| format!("{owner}.qkv.{kind}"))
}

/// Location of a parameter: rows of a leaf.
struct Location {
    name: String,
    leaf: usize,
    first_row: i64,
    rows: i64,
    /// True if it is a matrix that Muon updates in a shape with this optimizer.
    is_muon: bool,
}

/// Locations of all parameters, in order.
pub struct ParameterLayout {
    leaf_names: Vec<String>,
    /// Roles of the leaves.
    roles: Vec<Role>,
    locations: Vec<Location>,
}

impl ParameterLayout {
    /// Returns the layout of a shape's parameters. With `packed`, q, k and v of an attention block share a leaf, so that
    /// one matrix product projects all three.
    pub fn new(shape: Shape, packed: bool) -> Self {
        let mut layout = Self { leaf_names: Vec::new(), roles: Vec::new(), locations: Vec::new() };
        for spec in shape.parameter_specs() {
            let leaf_name = packed_name(&spec.name).filter(|_| packed).unwrap_or_else(|| spec.name.clone());
            let known = layout.leaf_names.iter().position(|name| *name == leaf_name);
            let leaf = known.unwrap_or_else(|| {
                layout.leaf_names.push(leaf_name);
                layout.roles.push(spec.role);
                layout.leaf_names.len() - 1
            });
            let first_row = layout.locations.iter().filter(|l| l.leaf == leaf).map(|l| l.rows).sum();
            let is_muon = shape.uses_muon_for(&spec);
            let rows = spec.dims[0] as i64;
            layout.locations.push(Location { name: spec.name, leaf, first_row, rows, is_muon });
        }
        layout
    }

    pub fn leaf_names(&self) -> &[String] {
        &self.leaf_names
    }

    /// Returns the rows of each matrix that Muon updates, for each trained leaf. The list of a leaf of AdamW is empty.
    pub fn trained_matrices(&self) -> Vec<Vec<i64>> {
        let rows_of = |leaf: usize| {
            let of_leaf = self.locations.iter().filter(|l| l.leaf == leaf && l.is_muon);
            of_leaf.map(|l| l.rows).collect()
        };
        (0..self.leaf_names.len()).filter(|leaf| self.is_trained(*leaf)).map(rows_of).collect()
    }

    /// Loads a list with one tensor per parameter, in order, as leaves. Adapters are in f32, and other leaves in `kind`.
    pub fn load(&self, tensors: &[Named], device: Device, kind: Kind) -> Vec<Tensor> {
        self.load_selected(|_| true, tensors, device, kind)
    }

    /// Loads a list with one tensor per trained parameter as [`ParameterLayout::load`] does.
    pub fn load_trained(&self, tensors: &[Named], device: Device, kind: Kind) -> Vec<Tensor> {
        self.load_selected(|leaf| self.is_trained(leaf), tensors, device, kind)
    }

    fn load_selected(
        &self,
        selects: impl Fn(usize) -> bool,
        tensors: &[Named],
        device: Device,
        kind: Kind,
    ) -> Vec<Tensor> {
        let selected: Vec<&Location> =
            self.locations.iter().filter(|location| selects(location.leaf)).collect();
        let load_leaf = |leaf: usize| {
            let kind = if self.roles[leaf] == Role::Adapter { Kind::Float } else { kind };
            let parts = selected.iter().zip(tensors).filter(|(location, _)| location.leaf == leaf);
            let mut parts: Vec<Tensor> = parts.map(|(_, named)| load(named, device, kind)).collect();
            if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 0) }
        };
        (0..self.leaf_names.len()).filter(|leaf| selects(*leaf)).map(load_leaf).collect()
    }

    pub fn is_trained(&self, leaf: usize) -> bool {
        self.roles[leaf] != Role::Frozen
    }

    /// Returns the trained ones of all leaves.
    pub fn trained(&self, leaves: &[Tensor]) -> Vec<Tensor> {
        let trained = leaves.iter().enumerate().filter(|(leaf, _)| self.is_trained(*leaf));
        trained.map(|(_, tensor)| tensor.shallow_clone()).collect()
    }

    /// Returns the tensors of all leaves, from those of the trained ones.
    fn by_leaf<'a>(&self, trained: impl IntoIterator<Item = Option<&'a Tensor>>) -> Vec<Option<&'a Tensor>> {
        let mut next = trained.into_iter();
        let of_leaf = |leaf| if self.is_trained(leaf) { next.next().flatten() } else { None };
        (0..self.leaf_names.len()).map(of_leaf).collect()
    }

    /// Returns the parameters of the network. Each of q, k and v is the whole leaf if they are packed.
    pub fn network_parameters(&self, shape: Shape, leaves: &[Tensor]) -> Parameters<Tensor> {
        let tensors = self.locations.iter().map(|location| leaves[location.leaf].shallow_clone());
        shape.take_parameters(&mut InOrder(tensors))
    }

    /// Reads leaves as one tensor per parameter, named `prefix/<parameter>`.
    pub fn read_leaves(&self, prefix: &str, leaves: &[Tensor]) -> Result<Vec<Named>> {
        self.read_some(prefix, &leaves.iter().map(Some).collect::<Vec<_>>())
    }

    /// Reads tensors of the trained leaves as one tensor per trained parameter, named `prefix/<parameter>`. A leaf
    /// can have none.
    pub fn read_trained<'a>(
        &self,
        prefix: &str,
        trained: impl IntoIterator<Item = Option<&'a Tensor>>,
    ) -> Result<Vec<Named>> {
        self.read_some(prefix, &self.by_leaf(trained))
    }

    fn read_some(&self, prefix: &str, leaves: &[Option<&Tensor>]) -> Result<Vec<Named>> {
        let read_one = |location: &Location| {
            let rows = leaves[location.leaf]?.narrow(0, location.first_row, location.rows);
            Some(read(format!("{prefix}/{}", location.name), &rows))
        };
        self.locations.iter().filter_map(read_one).collect()
    }

    /// Copies the tensors that are named `prefix/<parameter>` into leaves. Other leaves keep their values.
    pub fn copy_into_leaves(&self, prefix: &str, tensors: &[Named], leaves: &[Tensor]) {
        self.copy_into_some(prefix, tensors, &leaves.iter().map(Some).collect::<Vec<_>>());
    }

    /// Copies the tensors that are named `prefix/<parameter>` into tensors of the trained leaves. A leaf can have none.
    pub fn copy_into_trained<'a>(
        &self,
        prefix: &str,
        tensors: &[Named],
        trained: impl IntoIterator<Item = Option<&'a Tensor>>,
    ) {
        self.copy_into_some(prefix, tensors, &self.by_leaf(trained));
    }

    fn copy_into_some(&self, prefix: &str, tensors: &[Named], leaves: &[Option<&Tensor>]) {
        for location in &self.locations {
            let name = format!("{prefix}/{}", location.name);
            let named = tensors.iter().find(|tensor| tensor.name == name);
            let (Some(named), Some(leaf)) = (named, leaves[location.leaf]) else { continue };
            let rows = leaf.detach().narrow(0, location.first_row, location.rows);
            rows.shallow_clone().copy_(&load(named, leaf.device(), leaf.kind()));
        }
    }

    /// Reads the results of a step, the gradients of the trained leaves, and all leaves after the update. The last two can
    /// be empty.
    pub fn read_outputs(
        &self,
        case: &Case,
        results: &[Tensor],
        gradients: &[Tensor],
        updated: &[Tensor],
    ) -> Result<Vec<Named>> {
        let names = result_names(case).iter().map(|name| (*name).to_owned());
        let mut all = names.zip(results).map(|(name, t)| read(name, t)).collect::<Result<Vec<_>>>()?;
        if !gradients.is_empty() {
            all.extend(self.read_trained("grad", gradients.iter().map(Some))?);
        }
        if !updated.is_empty() {
            all.extend(self.read_leaves("param", updated)?);
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_of_q_k_and_v_share_the_leaf_of_their_matrices_a() {
        let case: Case = "train-step/torch-cpu/bf16-tuned/indicator-tiny-b2-lora4".parse().unwrap();
        let layout = ParameterLayout::new(case.shape, true);
        let leaves = layout.load(Fixture::new(case).parameters(), Device::Cpu, Kind::BFloat16);
        let leaf = |name: &str| layout.leaf_names().iter().position(|known| known == name).unwrap();
        let of_attention = |name: &str| leaf(&format!("blocks.0.attention.{name}"));
        let [a, b, weight] = ["qkv.lora-a", "q.lora-b", "qkv.weight"].map(of_attention);
        assert_eq!(leaves[a].size(), [3 * 4, 32]);
        assert_eq!(
            [a, b, weight].map(|leaf| leaves[leaf].kind()),
            [Kind::Float, Kind::Float, Kind::BFloat16]
        );
        assert_eq!([a, b, weight].map(|leaf| layout.is_trained(leaf)), [true, true, false]);
        assert!(layout.trained(&leaves).iter().all(|leaf| leaf.kind() == Kind::Float));
    }

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
