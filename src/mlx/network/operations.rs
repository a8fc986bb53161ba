//! Single operations of a training step, with the functions of the network.

use std::time::{Duration, Instant};

use mlx_rs::error::{Exception, Result};
use mlx_rs::ops::indexing::take_axis;
use mlx_rs::random::{self, RandomState};
use mlx_rs::transforms::{async_eval, eval, fallible_vjp};
use mlx_rs::{Array, Dtype};
use transformer_bench::backend::LoadedOperation;
use transformer_bench::fixture::{OperationFixture, Tensor as Named};
use transformer_bench::model::parameters::{Linear, Norm};
use transformer_bench::suite::Precision;
use transformer_bench::suite::operations::{Function, OperationPass, Pass};

use super::{Layers, activate, attention_caches, linear, loss, norm_of_kind, softmax};
use crate::step;

/// A pass of an operation on the default device.
pub struct Operation {
    part: OperationPass,
    layers: Layers,
    operands: Vec<Array>,
    upstream: Array,
    /// The output of the last run, and its gradients.
    results: Vec<Array>,
}

impl Operation {
    pub fn new(fixture: &OperationFixture) -> anyhow::Result<Self> {
        let (part, case) = (fixture.part.clone(), fixture.step.case);
        let dtype = match case.method.precision {
            Precision::Mixed => Dtype::Bfloat16,
            precision => crate::dtype(precision),
        };
        let model = part.operation.model;
        let layers = Layers {
            model,
            caches: attention_caches(&model),
            recomputes: false,
            fused: part.operation.function == Function::Attention,
            dropout: case.dropout(),
            random: RandomState::from_key(random::key(1)?),
        };
        let load = |named: &Named| step::load(named, step::input_dtype(&named.name, dtype));
        let operands: Vec<Array> = fixture.operands.iter().map(load).collect();
        // The loss is in f32 for every precision.
        let is_loss = part.operation.function == Function::Loss;
        let upstream = step::load(&fixture.upstream, if is_loss { Dtype::Float32 } else { dtype });
        eval(operands.iter().chain([&upstream]))?;
        Ok(Self { part, layers, operands, upstream, results: Vec::new() })
    }

    /// Times forward passes. As in training, the graph of the gradients exists, and holds the intermediate results.
    fn time_forward(&mut self, runs: u64) -> Result<Duration> {
        let start = Instant::now();
        for _ in 0..runs {
            self.results.clear();
            let (output, _gradients) = self.outputs_and_gradients(Pass::Backward)?;
            async_eval([&output])?;
            self.results.push(output);
        }
        // The runs end in their order.
        eval(&self.results)?;
        Ok(start.elapsed())
    }

    fn time_backward(&mut self, runs: u64) -> Result<Duration> {
        self.results.clear();
        let mut prepared = Vec::new();
        for _ in 0..runs {
            prepared.push(self.outputs_and_gradients(self.part.pass)?);
        }
        eval(prepared.iter().map(|(output, _)| output))?;
        let start = Instant::now();
        for (_, gradients) in &prepared {
            async_eval(gradients)?;
        }
        eval(prepared.iter().flat_map(|(_, gradients)| gradients))?;
        let time = start.elapsed();
        let last = prepared.pop().into_iter();
        self.results =
            last.flat_map(|(output, gradients)| std::iter::once(output).chain(gradients)).collect();
        Ok(time)
    }

    /// Returns the output and the gradients of a pass, which are not evaluated.
    fn outputs_and_gradients(&mut self, pass: Pass) -> Result<(Array, Vec<Array>)> {
        let operands = self.part.operation.operands.iter();
        let places = operands.enumerate().filter(|(_, operand)| pass.differentiates(operand.role));
        let places: Vec<usize> = places.map(|(place, _)| place).collect();
        let primals: Vec<Array> = places.iter().map(|&place| self.operands[place].clone()).collect();
        let (part, layers, all) = (&self.part, &mut self.layers, &self.operands);
        let function = |primals: &[Array]| -> Result<Vec<Array>> {
            let mut operands = all.clone();
            places.iter().zip(primals).for_each(|(&place, primal)| operands[place] = primal.clone());
            Ok(vec![forward(part, layers, &operands)?])
        };
        let (mut outputs, gradients) =
            fallible_vjp(function, &primals, std::slice::from_ref(&self.upstream))?;
        let output = outputs.pop().ok_or_else(|| Exception::custom("the function has no output"))?;
        Ok((output, gradients))
    }
}

/// Splits queries, keys or values [B, N, H·d] into heads [B, H, N, d].
fn heads(x: &Array, width: usize) -> Result<Array> {
    let (b, n, all) = (x.dim(0), x.dim(1), x.dim(2));
    x.reshape(&[b, n, all / width as i32, width as i32])?.transpose_axes(&[0, 2, 1, 3])
}

/// Joins heads [B, H, N, d] to [B, N, H·d].
fn joined(context: &Array) -> Result<Array> {
    let [b, h, n, d] = [0, 1, 2, 3].map(|axis| context.dim(axis));
    context.transpose_axes(&[0, 2, 1, 3])?.reshape(&[b, n, h * d])
}

fn forward(part: &OperationPass, layers: &mut Layers, operands: &[Array]) -> Result<Array> {
    let (x, width) = (&operands[0], layers.model.head_width);
    let index = layers.model.attention_index(0);
    let window = layers.caches[index].kind.window;
    let named = |name: &str| {
        let mut all = part.operation.operands.iter().zip(operands);
        all.find(|(operand, _)| operand.name == name).map(|(_, array)| array.clone())
    };
    match part.operation.function {
        Function::Linear => {
            let weight = operands[1].clone();
            linear(x, &Linear { weight, bias: named("bias"), adapter: None })
        }
        Function::Gather => take_axis(x, &operands[1], 0),
        Function::Norm(kind) => {
            let layer = Norm { weight: named("norm.weight"), bias: named("norm.bias") };
            norm_of_kind(x, &layer, kind)
        }
        Function::Rotary => layers.caches[index].rotate(heads(x, width)?),
        Function::Scores => layers.scores(&heads(x, width)?, heads(&operands[1], width)?, window),
        Function::Softmax => softmax(x),
        Function::Values => joined(&layers.weighted_values(x, heads(&operands[1], width)?)?),
        Function::Attention => {
            let [q, k, v] = [0, 1, 2].map(|i| heads(&operands[i], width));
            joined(&layers.fused_attention(&q?, &k?, &v?, window)?)
        }
        Function::Activate(kind) => activate(x, kind),
        Function::Multiply => x.multiply(&operands[1]),
        Function::Dropout(p) => layers.dropout(x.clone(), p),
        Function::Add => x.add(&operands[1]),
        Function::Loss => loss(&layers.model, operands, operands),
    }
}

impl LoadedOperation for Operation {
    fn time(&mut self, runs: u64) -> anyhow::Result<Duration> {
        Ok(match self.part.pass {
            Pass::Forward => self.time_forward(runs)?,
            Pass::ByInput | Pass::ByWeight | Pass::Backward => self.time_backward(runs)?,
        })
    }

    fn outputs(&mut self) -> anyhow::Result<Vec<Named>> {
        let names = self.part.result_names();
        names.into_iter().zip(&self.results).map(|(name, array)| step::read(name, array)).collect()
    }
}
