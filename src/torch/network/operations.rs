//! Single operations of a training step, with the functions of the network.

use std::time::{Duration, Instant};

use anyhow::Result;
use tch::{Device, Kind, Tensor};
use transformer_bench::backend::LoadedOperation;
use transformer_bench::fixture::{OperationFixture, Tensor as Named};
use transformer_bench::model::parameters::{Linear, Norm};
use transformer_bench::suite::operations::{Function, OperandRole, OperationPass, Pass};

use super::{AttentionCache, Layers, activate, attention_caches, dropout, loss};
use crate::{autograd, extension, params};

/// A pass of an operation on a device.
pub struct Operation {
    part: OperationPass,
    device: Device,
    layers: Layers,
    operands: Vec<Tensor>,
    /// The gradient of the output, or `None` for 1.
    upstream: Option<Tensor>,
    /// The output of the last run, and its gradients.
    results: Vec<Tensor>,
}

impl Operation {
    pub fn new(device: Device, fixture: &OperationFixture) -> Result<Self> {
        let (part, case) = (fixture.part.clone(), fixture.step.case);
        let kind = crate::compute_kind(case.method.precision);
        let model = part.operation.model;
        let layers = Layers {
            model,
            caches: attention_caches(&model, device, kind),
            fused: part.operation.function == Function::Attention,
            dropout: case.dropout(),
        };
        let load = |(named, role): (&Named, OperandRole)| {
            params::load_input(named, device, kind).set_requires_grad(role != OperandRole::Input)
        };
        let roles = part.operation.operands.iter().map(|operand| operand.role);
        let operands = fixture.operands.iter().zip(roles).map(load).collect();
        let has_upstream = part.operation.function != Function::Loss;
        let upstream = has_upstream.then(|| params::load_input(&fixture.upstream, device, kind));
        Ok(Self { part, device, layers, operands, upstream, results: Vec::new() })
    }

    /// Returns an operand.
    fn named(&self, name: &str) -> Option<Tensor> {
        let mut operands = self.part.operation.operands.iter().zip(&self.operands);
        operands.find(|(operand, _)| operand.name == name).map(|(_, tensor)| tensor.shallow_clone())
    }

    /// Splits queries, keys or values [B, N, H·d] into heads [B, H, N, d].
    fn heads(&self, x: &Tensor) -> Tensor {
        let (b, n, width) = x.size3().expect("x is [B, N, H·d]");
        let head_width = self.layers.model.head_width as i64;
        x.view([b, n, width / head_width, head_width]).transpose(1, 2)
    }

    /// Joins heads [B, H, N, d] to [B, N, H·d].
    fn joined(context: &Tensor) -> Tensor {
        let (b, h, n, d) = context.size4().expect("the context is [B, H, N, d]");
        context.transpose(1, 2).reshape([b, n, h * d])
    }

    fn cache(&self) -> &AttentionCache {
        &self.layers.caches[self.layers.model.attention_index(0)]
    }

    fn forward(&self) -> Tensor {
        let (layers, operands) = (&self.layers, &self.operands);
        let x = &operands[0];
        match self.part.operation.function {
            Function::Linear => {
                let [_, weight, ..] = &operands[..] else { unreachable!("a linear layer has a weight") };
                let weight = weight.shallow_clone();
                layers.linear(x, &Linear { weight, bias: self.named("bias"), adapter: None })
            }
            Function::Gather => Tensor::embedding(x, &operands[1], -1, false, false),
            Function::Norm(kind) => {
                let layer = Norm { weight: self.named("norm.weight"), bias: self.named("norm.bias") };
                layers.norm_of_kind(x, &layer, kind)
            }
            Function::Rotary => self.cache().rotate(self.heads(x)),
            Function::Scores => layers.scores(&self.heads(x), &self.heads(&operands[1]), self.cache()),
            Function::Softmax => x.softmax(-1, None::<Kind>),
            Function::Values => Self::joined(&layers.weighted_values(x, &self.heads(&operands[1]))),
            Function::Attention => {
                let [q, k, v] = [0, 1, 2].map(|i| self.heads(&operands[i]));
                Self::joined(&layers.fused_attention(&q, &k, &v, self.cache()))
            }
            Function::Activate(kind) => activate(x, kind),
            Function::Multiply => x * &operands[1],
            Function::Dropout(p) => dropout(x.shallow_clone(), p),
            Function::Add => x + &operands[1],
            Function::Loss => loss(&layers.model, operands, operands),
        }
    }

    /// Times forward passes. They record what a backward pass needs, as in training.
    fn time_forward(&mut self, runs: u64) -> Result<Duration> {
        extension::synchronize(self.device)?;
        let start = Instant::now();
        for _ in 0..runs {
            self.results.clear();
            self.results.push(self.forward());
        }
        extension::synchronize(self.device)?;
        Ok(start.elapsed())
    }

    fn time_backward(&mut self, runs: u64) -> Result<Duration> {
        let differentiated = self.part.differentiated();
        let inputs: Vec<Tensor> = differentiated.filter_map(|operand| self.named(operand.name)).collect();
        let outputs: Vec<Tensor> = (0..runs).map(|_| self.forward()).collect();
        extension::synchronize(self.device)?;
        let start = Instant::now();
        for output in outputs {
            self.results.clear();
            let gradients = autograd::grad(&output, self.upstream.as_ref(), &inputs)?;
            self.results.push(output);
            self.results.extend(gradients);
        }
        extension::synchronize(self.device)?;
        Ok(start.elapsed())
    }
}

impl LoadedOperation for Operation {
    fn time(&mut self, runs: u64) -> Result<Duration> {
        extension::catch_panics(|| match self.part.pass {
            Pass::Forward => self.time_forward(runs),
            Pass::ByInput | Pass::ByWeight | Pass::Backward => self.time_backward(runs),
        })
    }

    fn outputs(&mut self) -> Result<Vec<Named>> {
        let names = self.part.result_names();
        names.into_iter().zip(&self.results).map(|(name, tensor)| params::read(name, tensor)).collect()
    }
}
