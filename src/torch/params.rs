//! Parameters as leaves of the tape: how they are packed, loaded and read back.

use anyhow::Result;
use tch::{Device, Kind, Tensor};
use transformer_bench::model::fixture::Tensor as Named;
use transformer_bench::model::parameters::{InOrder, LayerParams, parameters};
use transformer_bench::suite::Shape;

/// Where a parameter lies: whole in its own leaf, or some rows of a packed one.
struct Place {
    name: String,
    dims: Vec<usize>,
    leaf: usize,
    row: i64,
    packed: bool,
}

/// The places of all parameters, in their order.
pub struct Places(Vec<Place>);

pub fn load(named: &Named, device: Device, kind: Kind) -> Tensor {
    let dims: Vec<i64> = named.dims.iter().map(|&d| d as i64).collect();
    Tensor::from_slice(&named.data).view(dims.as_slice()).to_device(device).to_kind(kind)
}

/// A tensor as f32 on the host.
pub fn read(name: String, dims: &[usize], tensor: &Tensor) -> Result<Named> {
    let flat = tensor.detach().to_device(Device::Cpu).to_kind(Kind::Float).contiguous().view([-1]);
    Ok(Named { name, dims: dims.to_vec(), data: Vec::<f32>::try_from(flat)? })
}

pub fn dims(tensor: &Tensor) -> Vec<usize> {
    tensor.size().iter().map(|&d| d as usize).collect()
}

/// The leaf that q, k and v of one attention share, where `name` is of one of them.
fn shared(name: &str) -> Option<String> {
    let (head, kind) = name.rsplit_once('.')?;
    let (owner, letter) = head.rsplit_once('.').unwrap_or(("", head));
    (owner.ends_with("attention") && matches!(letter, "q" | "k" | "v")).then(|| format!("{owner}.qkv.{kind}"))
}

/// The names of the leaves that [`pack`] makes with `fused`.
pub fn packed_names(shape: Shape) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for spec in parameters(shape) {
        let name = shared(&spec.name).unwrap_or(spec.name);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// Loads tensors that follow the parameters' order. With `fused`, the rows of q, k and v
/// of one attention share a leaf, so that one product projects all three.
pub fn pack(all: &[Named], device: Device, kind: Kind, fused: bool) -> (Vec<Tensor>, Places) {
    let mut leaves: Vec<Vec<Tensor>> = Vec::new();
    let mut packs: Vec<(String, usize)> = Vec::new();
    let mut places = Vec::new();
    for named in all {
        let pack = shared(&named.name).filter(|_| fused);
        let known = pack.as_ref().and_then(|p| packs.iter().find(|(n, _)| n == p)).map(|&(_, leaf)| leaf);
        let leaf = known.unwrap_or(leaves.len());
        if known.is_none() {
            leaves.push(Vec::new());
            packs.extend(pack.clone().map(|name| (name, leaf)));
        }
        let row = leaves[leaf].iter().map(|t| t.size()[0]).sum();
        leaves[leaf].push(load(named, device, kind));
        places.push(Place {
            name: named.name.clone(),
            dims: named.dims.clone(),
            leaf,
            row,
            packed: pack.is_some(),
        });
    }
    let joined =
        |mut parts: Vec<Tensor>| if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 0) };
    (leaves.into_iter().map(joined).collect(), Places(places))
}

impl Places {
    /// What the shape computes with, from the leaves or from copies of them.
    pub fn parts(&self, shape: Shape, leaves: &[Tensor]) -> LayerParams<Tensor> {
        let tensors = self.0.iter().map(|place| leaves[place.leaf].shallow_clone());
        LayerParams::take(&mut InOrder(tensors), shape)
    }

    /// What belongs to each parameter, named `prefix/<parameter>`.
    pub fn read(&self, prefix: &str, leaves: &[Tensor]) -> Result<Vec<Named>> {
        self.0
            .iter()
            .map(|place| {
                let leaf = &leaves[place.leaf];
                let rows = if place.packed {
                    leaf.narrow(0, place.row, place.dims[0] as i64)
                } else {
                    leaf.shallow_clone()
                };
                read(format!("{prefix}/{}", place.name), &place.dims, &rows)
            })
            .collect()
    }
}
