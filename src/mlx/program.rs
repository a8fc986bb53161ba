//! One step as functions from arrays to arrays, which the eager variant calls and other variants compile.

use std::cell::RefCell;
use std::rc::Rc;

use mlx_rs::error::Exception;
use mlx_rs::random::RandomState;
use mlx_rs::transforms::{value_and_grad_with_argnums, vjp};
use mlx_rs::{Array, Dtype};
use transformer_bench::backend::result_names;
use transformer_bench::model::parameters::{InOrder, Parameters};
use transformer_bench::model::{Dropout, ModelId};
use transformer_bench::suite::{Case, Precision, Shape, Variant, Workload};

use crate::distributed;
use crate::network::{self, Layers};
use crate::optimizer::Optimizer;

/// The part of a step that one call of its function computes. As in mlx-lm's trainer, a call computes one micro-batch, and
/// its results are evaluated before the next call. One graph of the whole step would need the memory of all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The first micro-batch of several.
    First,
    /// A later micro-batch, whose results are added to those of the earlier ones.
    Middle,
    /// The last micro-batch, and the update with the sums of all.
    Last,
    /// The only micro-batch, and the update.
    Whole,
}

impl Part {
    /// The parts of a step with several micro-batches.
    pub const ALL: [Self; 3] = [Self::First, Self::Middle, Self::Last];

    /// Returns the part of a micro-batch of `count`.
    pub fn of(micro_batch: usize, count: usize) -> Self {
        match micro_batch {
            _ if count == 1 => Self::Whole,
            0 => Self::First,
            _ if micro_batch + 1 == count => Self::Last,
            _ => Self::Middle,
        }
    }

    /// Returns true if it adds the results of earlier micro-batches.
    pub fn adds_sums(self) -> bool {
        matches!(self, Self::Middle | Self::Last)
    }

    /// Returns true if the all-reduce and the optimizer are in it.
    pub fn updates(self) -> bool {
        matches!(self, Self::Last | Self::Whole)
    }
}

/// One part of a step as a function of arrays: state, frozen parameters, inputs, random key, sums of earlier micro-batches
/// and AdamW's scalars.
#[derive(Clone)]
pub struct Program {
    pub case: Case,
    pub part: Part,
    pub dropout: Dropout,
    /// True for each parameter that is trained. Adapters freeze all others.
    pub is_trained: Rc<[bool]>,
    pub optimizer: Rc<Optimizer>,
    /// Number of inputs of a micro-batch.
    pub inputs: usize,
    /// True if ranks skip the all-reduce, which measures exposed communication.
    pub no_sync: bool,
}

/// The arguments of a program.
struct Arguments<'a> {
    /// Parameters that are trained.
    trained: &'a [Array],
    /// First moments, then the second moments of the parameters that AdamW updates. Empty if the workload does not
    /// optimize.
    moments: &'a [Array],
    frozen: &'a [Array],
    inputs: &'a [Array],
    key: &'a Array,
    /// Results and gradients of earlier micro-batches. Empty in the first one.
    sums: &'a [Array],
    adamw_scalars: &'a [Array],
}

impl Program {
    /// Returns true if it runs the optimizer.
    pub fn updates(&self) -> bool {
        self.case.workload.optimizes() && self.part.updates()
    }

    /// Returns the number of parameters (arrays) that are trained.
    pub fn trained_count(&self) -> usize {
        self.is_trained.iter().filter(|is_trained| **is_trained).count()
    }

    /// Returns the number of arrays that it updates, or only reads if it does not run the optimizer.
    pub fn state_len(&self) -> usize {
        let moments = self.trained_count() + self.optimizer.second_moments();
        self.trained_count() + if self.updates() { moments } else { 0 }
    }

    /// Returns the number of results.
    pub fn result_count(&self) -> usize {
        result_names(&self.case).len()
    }

    /// Returns the number of gradients that it returns.
    pub fn gradient_count(&self) -> usize {
        if self.case.workload.trains() { self.trained_count() } else { 0 }
    }

    fn split<'a>(&self, args: &'a [Array]) -> Arguments<'a> {
        let (state, rest) = args.split_at(self.state_len());
        let (trained, moments) = state.split_at(self.trained_count());
        let (frozen, rest) = rest.split_at(self.is_trained.len() - trained.len());
        let (inputs, rest) = rest.split_at(self.inputs);
        let sums = if self.part.adds_sums() { self.result_count() + self.gradient_count() } else { 0 };
        let (sums, adamw_scalars) = rest[1..].split_at(sums);
        Arguments { trained, moments, frozen, inputs, key: &rest[0], sums, adamw_scalars }
    }

    /// Runs its part of a step. Returns the results, the gradients if the workload trains, the updated state if the optimizer
    /// runs, and the next random key.
    pub fn run(&self, args: &[Array]) -> Result<Vec<Array>, Exception> {
        let a = self.split(args);
        // The random state after the last draw of this step. From an earlier state, the next step would repeat masks.
        let last_state = RefCell::new(a.key.clone());
        let forward = |trained: &[Array], inputs: &[Array]| -> Result<Vec<Array>, Exception> {
            let mut layers = self.layers(a.key.clone());
            let out = self.forward(self.in_order(trained, a.frozen), inputs, &mut layers)?;
            *last_state.borrow_mut() = layers.random.as_array().clone();
            Ok(out)
        };
        let mut out = match self.case.workload {
            Workload::OptimizerStep => Vec::new(),
            Workload::CopyPeak => vec![a.inputs[0].negative()?],
            Workload::AllReduce => vec![distributed::all_reduce(&a.inputs[0])?],
            Workload::MatmulPeak => vec![self.matmul_chain(a.inputs)?],
            Workload::AttentionGrad | Workload::FeedForwardGrad => block_gradients(&forward, &a)?,
            Workload::ForwardBackward | Workload::TrainStep => self.loss_and_gradients(&forward, &a)?,
            Workload::Forward | Workload::Attention | Workload::FeedForward => forward(a.trained, a.inputs)?,
        };
        for (own, sum) in out.iter_mut().zip(a.sums) {
            *own = own.add(sum)?;
        }
        let all_reduces = self.case.shape.ranks() > 1 && self.part.updates();
        if all_reduces && self.case.workload.trains() && !self.no_sync {
            let overlap = self.case.method.variant.overlaps_communication();
            let means = distributed::average_gradients(&out[1..], overlap)?;
            out.splice(1.., means);
        }
        if self.updates() {
            let fixed = self.case.workload == Workload::OptimizerStep;
            let gradients = if fixed { a.inputs } else { &out[1..] };
            out.extend(self.optimizer.step(a.trained, a.moments, gradients, a.adamw_scalars)?);
        }
        out.push(last_state.into_inner());
        Ok(out)
    }

    /// Returns all parameters in order.
    fn in_order<'a>(&self, trained: &'a [Array], frozen: &'a [Array]) -> impl Iterator<Item = &'a Array> {
        let (mut trained, mut frozen) = (trained.iter(), frozen.iter());
        let is_trained: Vec<bool> = self.is_trained.to_vec();
        is_trained.into_iter().filter_map(
            move |is_trained| {
                if is_trained { trained.next() } else { frozen.next() }
            },
        )
    }

    fn layers(&self, key: Array) -> Layers {
        let model = self.case.shape.model().map_or(ModelId::indicator(), |(model, _)| model);
        Layers {
            model,
            caches: network::attention_caches(&model),
            recomputes: self.case.method.variant == Variant::Checkpoint,
            fused: self.case.method.variant.uses_sdpa(),
            dropout: self.dropout,
            random: RandomState::from_key(key),
        }
    }

    fn loss_and_gradients(&self, forward: Forward<'_>, a: &Arguments<'_>) -> Result<Vec<Array>, Exception> {
        let Shape::Model { model, .. } = self.case.shape else { unreachable!("a whole model") };
        let all: Vec<i32> = (0..a.trained.len() as i32).collect();
        // The mean of the batch is the sum of the shares of its micro-batches.
        let share = 1.0 / self.case.shape.micro_batches() as f64;
        let loss = |p: &[Array]| -> Result<Vec<Array>, Exception> {
            let outputs = forward(p, a.inputs)?;
            let loss = match self.case.method.variant {
                Variant::ChunkedLoss => outputs[0].clone(),
                _ => network::loss(&model, &outputs, a.inputs)?,
            };
            Ok(vec![network::scale(&loss, share)?])
        };
        let (loss, gradients) = value_and_grad_with_argnums(loss, &all)(a.trained)?;
        Ok(loss.into_iter().chain(gradients).collect())
    }

    /// Returns the outputs of the network, or its loss if it is computed in chunks.
    fn forward<'a>(
        &self,
        parameters: impl Iterator<Item = &'a Array>,
        inputs: &[Array],
        layers: &mut Layers,
    ) -> Result<Vec<Array>, Exception> {
        // Master weights in precision `mixed` are in f32, and so are adapters. The network computes with copies of its
        // own type.
        let kind = match self.case.method.precision {
            Precision::Mixed => Dtype::Bfloat16,
            other => crate::dtype(other),
        };
        let cast = |a: &Array| {
            if a.dtype() == Dtype::Float32 && a.dtype() != kind { a.as_dtype(kind) } else { Ok(a.clone()) }
        };
        let parameters = parameters.map(cast).collect::<Result<Vec<_>, _>>()?;
        // The third input belongs to the loss and keeps its type.
        let inputs = inputs.iter().take(2).map(cast).collect::<Result<Vec<_>, _>>()?;
        Ok(match self.case.shape.take_parameters(&mut InOrder(parameters.into_iter())) {
            Parameters::Model(network) if self.case.method.variant == Variant::ChunkedLoss => {
                vec![layers.chunked_loss(&inputs, &network)?]
            }
            Parameters::Model(network) => layers.model(&inputs, &network)?,
            Parameters::Attention(attention) => vec![layers.attention(&inputs[0], &attention, 0)?],
            Parameters::FeedForward(block) => vec![layers.feed_forward(&inputs[0], &block)?],
            Parameters::None => unreachable!("peak cases have no forward pass"),
        })
    }

    fn matmul_chain(&self, inputs: &[Array]) -> Result<Array, Exception> {
        let Shape::Square { chain, .. } = self.case.shape else { unreachable!("a square shape") };
        let first = inputs[0].matmul(&inputs[1])?;
        (1..chain).try_fold(first, |product, _| inputs[0].matmul(&product))
    }
}

/// A function from trained parameters and inputs to outputs, which draws from the random state of the step.
type Forward<'a> = &'a dyn Fn(&[Array], &[Array]) -> Result<Vec<Array>, Exception>;

/// Returns the gradients of a block with respect to its input and its parameters.
fn block_gradients(forward: Forward<'_>, a: &Arguments<'_>) -> Result<Vec<Array>, Exception> {
    let mut primals = vec![a.inputs[0].clone()];
    primals.extend_from_slice(a.trained);
    let upstream = a.inputs[1].clone();
    // `vjp` takes an infallible function, and returns an error if it panics.
    let f = |p: &[Array]| -> Vec<Array> {
        let out = forward(&p[1..], &p[..1]).expect("the forward pass");
        vec![out[0].as_dtype(upstream.dtype()).expect("a cast")]
    };
    Ok(vjp(f, &primals, std::slice::from_ref(&upstream))?.1)
}
