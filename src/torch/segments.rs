//! Backward passes in segments, which need less memory than one graph of the whole model.
//!
//! A segment starts at a copy of its input without history. Its backward pass runs before the graph of an earlier segment
//! is computed again (`-checkpoint`, a layer at a time), or before that of the next part of the tokens exists
//! (`-chunked-loss`).

use anyhow::{Context, Result};
use tch::{Device, Tensor};
use transformer_bench::model::parameters::Network;
use transformer_bench::suite::Variant;

use crate::network::{self, Layers};
use crate::{autograd, extension};

/// A forward and backward pass in segments.
pub struct SegmentedPass<'a> {
    pub layers: &'a Layers,
    pub network: &'a Network<Tensor>,
    pub device: Device,
    pub variant: Variant,
    /// True in precision `amp`.
    pub autocast: bool,
}

/// Gradients of leaves that several segments use.
struct LeafGradients<'a> {
    leaves: &'a [Tensor],
    gradients: Vec<Option<Tensor>>,
    /// True for each gradient whose memory belongs to the sum, so that it can grow in place.
    is_owned: Vec<bool>,
}

impl<'a> LeafGradients<'a> {
    fn new(leaves: &'a [Tensor]) -> Self {
        let none = leaves.iter().map(|_| None).collect();
        Self { leaves, gradients: none, is_owned: vec![false; leaves.len()] }
    }

    /// Runs the backward pass of a segment. Adds the gradients of the leaves, and returns that of its input.
    fn backward(&mut self, output: &Tensor, upstream: Option<&Tensor>, input: &Tensor) -> Result<Tensor> {
        let all = [input].into_iter().chain(self.leaves).map(Tensor::shallow_clone);
        let mut gradients = autograd::grad_of_used(output, upstream, &all.collect::<Vec<_>>())?.into_iter();
        let of_input = gradients.next().flatten().context("the result does not depend on its input")?;
        self.add(gradients);
        Ok(of_input)
    }

    /// Runs the backward pass of the first segment, whose input has no gradient.
    fn first_backward(&mut self, output: &Tensor, upstream: &Tensor) -> Result<()> {
        // Next to adapters, the embedding is frozen.
        if output.requires_grad() {
            let gradients = autograd::grad_of_used(output, Some(upstream), self.leaves)?;
            self.add(gradients.into_iter());
        }
        Ok(())
    }

    fn add(&mut self, gradients: impl Iterator<Item = Option<Tensor>>) {
        for (index, gradient) in gradients.enumerate() {
            let Some(gradient) = gradient else { continue };
            match &mut self.gradients[index] {
                Some(sum) if self.is_owned[index] => {
                    let _ = sum.g_add_(&gradient);
                }
                Some(sum) => {
                    *sum = &*sum + gradient;
                    self.is_owned[index] = true;
                }
                empty => *empty = Some(gradient),
            }
        }
    }

    fn finish(self) -> Result<Vec<Tensor>> {
        let all: Option<Vec<Tensor>> = self.gradients.into_iter().collect();
        all.context("a trained parameter has no gradient")
    }
}

/// Returns a copy without history that gradients can be with respect to. It shares the memory.
fn start_segment(x: &Tensor) -> Tensor {
    x.detach().set_requires_grad(true)
}

/// The results of the layers, from which a backward pass computes their graphs again.
struct Checkpoints {
    embedded: Tensor,
    /// Input of each layer, and the state of the random generator before it.
    layers: Vec<(Tensor, Tensor)>,
    /// Result of the last layer.
    last: Tensor,
}

impl SegmentedPass<'_> {
    /// Returns the loss multiplied by `share`, and the gradients of `leaves`. `inputs` are those of the network, and
    /// `targets` those of the loss.
    ///
    /// # Errors
    /// Returns an error if libtorch fails, or if a leaf has no gradient.
    pub fn loss_and_gradients(
        &self,
        inputs: &[Tensor],
        targets: &[Tensor],
        share: f64,
        leaves: &[Tensor],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let mut gradients = LeafGradients::new(leaves);
        let loss = if self.variant == Variant::Checkpoint {
            let checkpoints = self.checkpoint_layers(inputs)?;
            let last = start_segment(&checkpoints.last);
            let head = || self.layers.outputs(&self.layers.finish_layers(&last, self.network), self.network);
            let outputs = self.autocast(head)?;
            let loss = network::loss(&self.layers.model, &outputs, targets) * share;
            let upstream = gradients.backward(&loss, None, &last)?;
            self.layers_backward(checkpoints, upstream, &mut gradients)?;
            loss.detach()
        } else {
            let hidden = self.autocast(|| self.layers.hidden(inputs, self.network))?;
            let (loss, upstream) = self.chunked_loss(&hidden, targets, share, &mut gradients)?;
            gradients.first_backward(&hidden, &upstream)?;
            loss
        };
        Ok((loss, gradients.finish()?))
    }

    fn autocast<T>(&self, body: impl FnOnce() -> T) -> Result<T> {
        extension::autocast(self.device, self.autocast, body)
    }

    /// Runs the layers without a graph.
    fn checkpoint_layers(&self, inputs: &[Tensor]) -> Result<Checkpoints> {
        let embedded = self.autocast(|| self.layers.embed(inputs, self.network))?;
        let mut layers = Vec::new();
        let mut x = embedded.detach();
        for (index, layer) in self.network.blocks.iter().enumerate() {
            layers.push((x.shallow_clone(), autograd::random_state(self.device)?));
            x = self.autocast(|| tch::no_grad(|| self.layers.layer(&x, layer, index)))?;
        }
        Ok(Checkpoints { embedded, layers, last: x })
    }

    /// Computes each layer again with the same dropout masks, and runs its backward pass.
    fn layers_backward(
        &self,
        checkpoints: Checkpoints,
        mut upstream: Tensor,
        gradients: &mut LeafGradients<'_>,
    ) -> Result<()> {
        let after = autograd::random_state(self.device)?;
        let Checkpoints { embedded, mut layers, last } = checkpoints;
        drop(last);
        while let Some((x, state)) = layers.pop() {
            autograd::set_random_state(self.device, &state)?;
            let (x, index) = (start_segment(&x), layers.len());
            let y = self.autocast(|| self.layers.layer(&x, &self.network.blocks[index], index))?;
            upstream = gradients.backward(&y, Some(&upstream), &x)?;
        }
        autograd::set_random_state(self.device, &after)?;
        gradients.first_backward(&embedded, &upstream)
    }

    /// Returns the loss, and its gradient with respect to the hidden states [B, T, D]. The logits of a chunk are freed
    /// before the next one, as in `torch.nn.functional.linear_cross_entropy`, which libtorch does not have.
    fn chunked_loss(
        &self,
        hidden: &Tensor,
        targets: &[Tensor],
        share: f64,
        gradients: &mut LeafGradients<'_>,
    ) -> Result<(Tensor, Tensor)> {
        let (rows, targets) = (hidden.detach().flatten(0, 1), targets[1].flatten(0, 1));
        let count = rows.size()[0];
        let chunk = self.layers.model.loss_chunk_rows(count as usize) as i64;
        let upstream = rows.empty_like();
        let mut total: Option<Tensor> = None;
        for start in (0..count).step_by(chunk as usize) {
            let length = chunk.min(count - start);
            let x = start_segment(&rows.narrow(0, start, length));
            let logits = self.autocast(|| self.layers.outputs(&x, self.network))?.remove(0);
            let mean = network::cross_entropy(&logits, &targets.narrow(0, start, length));
            // The mean over all tokens is the sum of the shares of the chunks.
            let loss = mean * (share * length as f64 / count as f64);
            upstream.narrow(0, start, length).copy_(&gradients.backward(&loss, None, &x)?);
            total = Some(total.map_or(loss.detach(), |total| total + loss.detach()));
        }
        Ok((total.context("a batch has tokens")?, upstream.view_as(hidden)))
    }
}
