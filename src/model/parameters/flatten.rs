//! The parameters of a part of a model as a flat list, for functions that take a list of arrays.

use super::{Layer, Linear, Norm, OutputHead};

impl<T: Clone> Linear<T> {
    fn tensors(&self) -> impl Iterator<Item = T> {
        let adapter = self.adapter.iter().flat_map(|adapter| [&adapter.a, &adapter.b]);
        [&self.weight].into_iter().chain(&self.bias).chain(adapter).cloned()
    }
}

impl<T: Clone> Norm<T> {
    fn tensors(&self) -> impl Iterator<Item = T> {
        self.weight.iter().chain(&self.bias).cloned()
    }
}

impl<T: Clone> Layer<T> {
    /// Returns the parameters in the order in which [`Layer::take`] takes them.
    pub fn tensors(&self) -> Vec<T> {
        let (a, f) = (&self.attention, &self.feed_forward);
        let attention = [&a.q, &a.k, &a.v, &a.o].into_iter().flat_map(Linear::tensors);
        let qk_norms = a.qk_norms.iter().flatten().chain([&self.norm1]).flat_map(Norm::tensors);
        let feed_forward = f.gate.iter().chain([&f.up, &f.down]).flat_map(Linear::tensors);
        let norms = self.norm2.iter().chain(self.output_norms.iter().flatten()).flat_map(Norm::tensors);
        attention.chain(qk_norms).chain(feed_forward).chain(norms).collect()
    }
}

impl<T: Clone> OutputHead<T> {
    /// Returns the parameters in the order in which [`OutputHead::take`] takes them.
    pub fn tensors(&self) -> Vec<T> {
        match self {
            Self::Tied => Vec::new(),
            Self::Untied(output) => output.tensors().collect(),
            Self::MlmHead { dense, norm, bias } => {
                dense.tensors().chain(norm.tensors()).chain([bias.clone()]).collect()
            }
            Self::IndicatorHeads(heads) => {
                heads.iter().flat_map(|head| head.hidden.tensors().chain(head.out.tensors())).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Embedding, InOrder, Network, parameter_specs};
    use super::*;
    use crate::model::ModelId;

    /// Returns the network of a model with the numbers of its parameters, from 0.
    fn numbered(model: ModelId) -> Network<usize> {
        Network::take(&mut InOrder(0..), &model)
    }

    #[test]
    fn lists_have_the_order_in_which_parameters_are_taken() {
        for model in ModelId::with_miniatures() {
            let lora = model.with_lora("4".parse().ok());
            for model in [model, lora] {
                let network = numbered(model);
                let layers = network.blocks.iter().flat_map(Layer::tensors);
                let all: Vec<usize> = layers.collect();
                let first = all[0];
                assert_eq!(all, (first..first + all.len()).collect::<Vec<_>>(), "{model}");
                let head = network.output.tensors();
                let count = parameter_specs(&model, None).len();
                assert_eq!(head, (count - head.len()..count).collect::<Vec<_>>(), "{model}");
                let layer = Layer::take(&mut InOrder(network.blocks[0].tensors().into_iter()), "", &model);
                assert_eq!(layer.tensors(), network.blocks[0].tensors(), "{model}");
                assert!(matches!(network.embedding, Embedding::Tokens(0, _) | Embedding::Indicator { .. }));
            }
        }
    }
}
