//! The workloads. Each is a function from arrays to arrays, which the eager variant calls and other variants compile.

use std::cell::RefCell;

use anyhow::{Context, Result};
use half::{bf16, f16};
use mlx_rs::error::Exception;
use mlx_rs::random::{self, RandomState};
use mlx_rs::transforms::compile::compile;
use mlx_rs::transforms::{async_eval, eval, value_and_grad_with_argnums, vjp};
use mlx_rs::{Array, Dtype};
use transformer_bench::backend::{LoadedCase, result_names};
use transformer_bench::fixture::{AdamW, Fixture, Tensor as Named};
use transformer_bench::model::parameters::{InOrder, Parameters};
use transformer_bench::model::{Dropout, ModelId};
use transformer_bench::suite::{Case, Precision, Shape, Workload};

use crate::distributed;
use crate::network::{self, Layers, scalar};

type Function = Box<dyn FnMut(&[Array]) -> Result<Vec<Array>, Exception>>;

/// A case on the default device.
pub struct Step {
    program: Program,
    /// Runs the program, eagerly or compiled.
    function: Function,
    /// Parameters, then AdamW's first and second moments if the workload optimizes.
    state: Vec<Array>,
    inputs: Vec<Array>,
    /// Random key of the next step.
    key: Array,
    step_count: i32,
    adamw: AdamW,
    /// Results and gradients of the last step.
    results: Vec<Array>,
    gradients: Vec<Array>,
}

/// One step as a function of arrays: state, inputs, random key and AdamW's scalars.
#[derive(Clone, Copy)]
struct Program {
    case: Case,
    dropout: Dropout,
    /// Number of parameters (arrays).
    parameters: usize,
    /// Number of inputs.
    inputs: usize,
    /// True if ranks skip the all-reduce, which measures exposed communication.
    no_sync: bool,
}

fn load(named: &Named, dtype: Dtype) -> Array {
    let dims: Vec<i32> = named.dims.iter().map(|&d| d as i32).collect();
    let data = named.data.iter();
    match dtype {
        Dtype::Bfloat16 => Array::from_slice(&data.map(|&v| bf16::from_f32(v)).collect::<Vec<_>>(), &dims),
        Dtype::Float16 => Array::from_slice(&data.map(|&v| f16::from_f32(v)).collect::<Vec<_>>(), &dims),
        Dtype::Int32 => Array::from_slice(&data.map(|&v| v as i32).collect::<Vec<_>>(), &dims),
        _ => Array::from_slice(&named.data, &dims),
    }
}

/// Loads the inputs of a case: token ids as int32, inputs of the loss as f32, and the others as `dtype`. The inputs of an
/// optimizer step are its fixed gradients.
fn load_inputs(fixture: &Fixture, dtype: Dtype) -> Vec<Array> {
    let dtype_of = |name: &str| match name {
        "tokens" | "next" => Dtype::Int32,
        // The loss is in f32 for every precision.
        "usefulness" => Dtype::Float32,
        _ => dtype,
    };
    let optimizer_step = fixture.case.workload == Workload::OptimizerStep;
    let all = if optimizer_step { fixture.gradients() } else { fixture.inputs() };
    all.iter().map(|named| load(named, dtype_of(&named.name))).collect()
}

impl Step {
    pub fn new(fixture: &Fixture) -> Result<Self> {
        let case = fixture.case;
        let dtype = crate::dtype(case.method.precision);
        let mut state: Vec<Array> = fixture.parameters().iter().map(|p| load(p, dtype)).collect();
        let inputs = load_inputs(fixture, dtype);
        let parameters = state.len();
        let program = Program {
            case,
            dropout: fixture.dropout,
            parameters,
            inputs: inputs.len(),
            no_sync: fixture.no_sync,
        };
        for i in 0..program.state_len() - parameters {
            state.push(mlx_rs::ops::zeros_like(&state[i])?);
        }
        let compiles = case.method.variant.captures_full_step();
        let function: Function = if compiles {
            Box::new(compile(move |args: &[Array]| program.run(args), None))
        } else {
            Box::new(move |args: &[Array]| program.run(args))
        };
        let key = random::key(1 + fixture.rank() as u64)?;
        eval(inputs.iter().chain(&state).chain([&key]))?;
        let mut step = Self {
            program,
            function,
            state,
            inputs,
            key,
            step_count: 0,
            adamw: fixture.adamw,
            results: Vec::new(),
            gradients: Vec::new(),
        };
        if compiles {
            // MLX compiles kernels in the first evaluation, which can take a minute. Arrays are immutable, so it does
            // not change the state.
            let args = step.arguments(1);
            eval(&(step.function)(&args)?)?;
        }
        Ok(step)
    }

    /// Reads one array per parameter, named `prefix/<parameter>`.
    fn read_all(&self, prefix: &str, arrays: &[Array]) -> Result<Vec<Named>> {
        let specs = self.program.case.shape.parameter_specs();
        specs.iter().zip(arrays).map(|(spec, array)| read(format!("{prefix}/{}", spec.name), array)).collect()
    }

    /// Returns the arguments of the function, with AdamW's scalars of step `t`.
    fn arguments(&self, t: i32) -> Vec<Array> {
        let mut args: Vec<Array> =
            self.state.iter().chain(&self.inputs).chain([&self.key]).cloned().collect();
        if self.program.case.workload.optimizes() {
            args.extend(adamw_scalars(&self.adamw, t, self.state[0].dtype()));
        }
        args
    }
}

/// The arguments of a program.
struct Arguments<'a> {
    parameters: &'a [Array],
    /// AdamW's first moments, then its second moments. Empty if the workload does not optimize.
    moments: &'a [Array],
    inputs: &'a [Array],
    key: &'a Array,
    adamw_scalars: &'a [Array],
}

impl Program {
    /// Returns the number of arrays that a step updates, or only reads if it does not optimize.
    fn state_len(&self) -> usize {
        if self.case.workload.optimizes() { 3 * self.parameters } else { self.parameters }
    }

    fn split<'a>(&self, args: &'a [Array]) -> Arguments<'a> {
        let (state, rest) = args.split_at(self.state_len());
        let (parameters, moments) = state.split_at(self.parameters);
        let (inputs, rest) = rest.split_at(self.inputs);
        Arguments { parameters, moments, inputs, key: &rest[0], adamw_scalars: &rest[1..] }
    }

    /// Runs a step. Returns the results, the gradients if the workload trains, the updated state if it optimizes, and the
    /// next random key.
    fn run(&self, args: &[Array]) -> Result<Vec<Array>, Exception> {
        let a = self.split(args);
        // The random state after the last draw of this step. From an earlier state, the next step would repeat masks.
        let last_state = RefCell::new(a.key.clone());
        let forward = |parameters: &[Array], inputs: &[Array]| -> Result<Vec<Array>, Exception> {
            let mut layers = self.layers(a.key.clone());
            let out = self.forward(parameters, inputs, &mut layers)?;
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
            Workload::Forward | Workload::Attention | Workload::FeedForward => {
                forward(a.parameters, a.inputs)?
            }
        };
        if self.case.shape.ranks() > 1 && self.case.workload.trains() && !self.no_sync {
            let overlap = self.case.method.variant.overlaps_communication();
            let means = distributed::average_gradients(&out[1..], overlap)?;
            out.splice(1.., means);
        }
        if self.case.workload.optimizes() {
            let fixed = self.case.workload == Workload::OptimizerStep;
            let gradients = if fixed { a.inputs } else { &out[1..] };
            out.extend(adamw(&a, gradients)?);
        }
        out.push(last_state.into_inner());
        Ok(out)
    }

    fn layers(&self, key: Array) -> Layers {
        let model = self.case.shape.model().map_or(ModelId::indicator(), |(model, _)| model);
        Layers {
            model,
            caches: network::attention_caches(&model),
            fused: self.case.method.variant.uses_sdpa(),
            dropout: self.dropout,
            random: RandomState::from_key(key),
        }
    }

    fn loss_and_gradients(&self, forward: Forward<'_>, a: &Arguments<'_>) -> Result<Vec<Array>, Exception> {
        let Shape::Model { model, .. } = self.case.shape else { unreachable!("a whole model") };
        let all: Vec<i32> = (0..self.parameters as i32).collect();
        let loss = |p: &[Array]| -> Result<Vec<Array>, Exception> {
            Ok(vec![network::loss(&model, &forward(p, a.inputs)?, a.inputs)?])
        };
        let (loss, gradients) = value_and_grad_with_argnums(loss, &all)(a.parameters)?;
        Ok(loss.into_iter().chain(gradients).collect())
    }

    fn forward(
        &self,
        parameters: &[Array],
        inputs: &[Array],
        layers: &mut Layers,
    ) -> Result<Vec<Array>, Exception> {
        // In precision `mixed`, the parameters are f32 master weights, and the network computes with bf16 copies.
        let mixed = self.case.method.precision == Precision::Mixed;
        let cast = |a: &Array| {
            if mixed && a.dtype() == Dtype::Float32 { a.as_dtype(Dtype::Bfloat16) } else { Ok(a.clone()) }
        };
        let parameters = parameters.iter().map(cast).collect::<Result<Vec<_>, _>>()?;
        // The third input belongs to the loss and keeps its type.
        let inputs = inputs.iter().take(2).map(cast).collect::<Result<Vec<_>, _>>()?;
        Ok(match self.case.shape.take_parameters(&mut InOrder(parameters.into_iter())) {
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

/// A function from parameters and inputs to outputs, which draws from the random state of the step.
type Forward<'a> = &'a dyn Fn(&[Array], &[Array]) -> Result<Vec<Array>, Exception>;

/// Returns the gradients of a block with respect to its input and its parameters.
fn block_gradients(forward: Forward<'_>, a: &Arguments<'_>) -> Result<Vec<Array>, Exception> {
    let mut primals = vec![a.inputs[0].clone()];
    primals.extend_from_slice(a.parameters);
    let upstream = a.inputs[1].clone();
    // `vjp` takes an infallible function, and returns an error if it panics.
    let f = |p: &[Array]| -> Vec<Array> {
        let out = forward(&p[1..], &p[..1]).expect("the forward pass");
        vec![out[0].as_dtype(upstream.dtype()).expect("a cast")]
    };
    Ok(vjp(f, &primals, std::slice::from_ref(&upstream))?.1)
}

/// Returns AdamW's scalars of step `t` in the type of the parameters: the factor of weight decay, β1, 1 − β1, β2, 1 − β2, lr
/// over the first bias correction, the inverse square root of the second one, and ε.
fn adamw_scalars(s: &AdamW, t: i32, dtype: Dtype) -> Vec<Array> {
    let rate = s.lr / (1.0 - s.beta1.powi(t));
    let root = 1.0 / (1.0 - s.beta2.powi(t)).sqrt();
    [1.0 - s.lr * s.weight_decay, s.beta1, 1.0 - s.beta1, s.beta2, 1.0 - s.beta2, rate, root, s.eps]
        .map(|value| scalar(value, dtype))
        .into()
}

/// Runs an AdamW step with bias correction, as MLX's Python optimizer does. The optimizer of mlx-rs has no correction.
/// Returns the new state: parameters, then first and second moments.
fn adamw(a: &Arguments<'_>, gradients: &[Array]) -> Result<Vec<Array>, Exception> {
    let [decay, beta1, rest1, beta2, rest2, rate, root, eps] = a.adamw_scalars else {
        unreachable!("AdamW has eight scalars");
    };
    let (first, second) = a.moments.split_at(gradients.len());
    let (mut p_new, mut m_new, mut v_new) = (Vec::new(), Vec::new(), Vec::new());
    for (i, g) in gradients.iter().enumerate() {
        let m = first[i].multiply(beta1)?.add(g.multiply(rest1)?)?;
        let v = second[i].multiply(beta2)?.add(g.square()?.multiply(rest2)?)?;
        let denominator = v.sqrt()?.multiply(root)?.add(eps)?;
        let update = m.multiply(rate)?.divide(denominator)?;
        p_new.push(a.parameters[i].multiply(decay)?.subtract(update)?);
        m_new.push(m);
        v_new.push(v);
    }
    p_new.append(&mut m_new);
    p_new.append(&mut v_new);
    Ok(p_new)
}

/// Prefixes of the names of a state's arrays, in their order.
const STATE_NAMES: [&str; 3] = ["param", "moment1", "moment2"];

/// Copies an array to the host as f32.
fn read(name: String, array: &Array) -> Result<Named> {
    let dims = array.shape().iter().map(|&d| d as usize).collect();
    let flat = array.as_dtype(Dtype::Float32)?.reshape(&[-1])?;
    // The addition writes a row-major copy if the array is strided.
    let flat = flat.add(Array::from_f32(0.0))?;
    flat.eval()?;
    Ok(Named { name, dims, data: flat.try_as_slice::<f32>()?.to_vec() })
}

impl LoadedCase for Step {
    fn step(&mut self) -> Result<()> {
        self.results.clear();
        self.gradients.clear();
        self.step_count += 1;
        let args = self.arguments(self.step_count);
        let Program { case, parameters, .. } = self.program;
        let (trains, optimizes) = (case.workload.trains(), case.workload.optimizes());
        if optimizes {
            // Without another owner of the old state, MLX can reuse its memory.
            self.state.clear();
        }
        let out = (self.function)(&args)?;
        drop(args);
        let mut out = out.into_iter();
        let mut take = |count: usize| out.by_ref().take(count).collect::<Vec<_>>();
        self.results = take(result_names(&case).len());
        self.gradients = take(if trains { parameters } else { 0 });
        if optimizes {
            self.state = take(self.program.state_len());
        }
        self.key = take(1).pop().context("the program returns a key last")?;
        // One evaluation of all arrays. Separate ones could repeat shared work, and an array that is left out would not
        // be computed.
        Ok(eval(self.results.iter().chain(&self.gradients).chain(&self.state).chain([&self.key]))?)
    }

    /// Runs all-reduces without waiting between them, as nccl-tests does.
    fn run_pipelined(&mut self, steps: u64) -> Result<bool> {
        if self.program.case.workload != Workload::AllReduce {
            return Ok(false);
        }
        for _ in 0..steps {
            self.results = vec![distributed::all_reduce(&self.inputs[0])?];
            async_eval(&self.results)?;
        }
        eval(&self.results)?;
        Ok(true)
    }

    fn set_inputs(&mut self, fixture: &Fixture) -> Result<()> {
        self.inputs = load_inputs(fixture, crate::dtype(self.program.case.method.precision));
        Ok(eval(&self.inputs)?)
    }

    fn checkpoint(&mut self) -> Result<Vec<Named>> {
        let mut all = Vec::new();
        for (prefix, arrays) in STATE_NAMES.iter().zip(self.state.chunks(self.program.parameters.max(1))) {
            all.extend(self.read_all(prefix, arrays)?);
        }
        if self.program.case.workload.optimizes() {
            all.push(Named { name: "step".to_owned(), dims: vec![1], data: vec![self.step_count as f32] });
        }
        Ok(all)
    }

    fn restore(&mut self, checkpoint: &[Named], seed: u64) -> Result<()> {
        let specs = self.program.case.shape.parameter_specs();
        let names =
            STATE_NAMES.iter().flat_map(|prefix| specs.iter().map(move |s| format!("{prefix}/{}", s.name)));
        for (array, name) in self.state.iter_mut().zip(names) {
            if let Some(named) = checkpoint.iter().find(|tensor| tensor.name == name) {
                *array = load(named, array.dtype());
            }
        }
        if let Some(step) = checkpoint.iter().find(|tensor| tensor.name == "step") {
            self.step_count = step.data[0] as i32;
        }
        self.key = random::key(seed)?;
        Ok(eval(self.state.iter().chain([&self.key]))?)
    }

    fn outputs(&mut self) -> Result<Vec<Named>> {
        let case = &self.program.case;
        let names = result_names(case).iter().map(|name| (*name).to_owned());
        let mut all = names.zip(&self.results).map(|(name, a)| read(name, a)).collect::<Result<Vec<_>>>()?;
        all.extend(self.read_all("grad", &self.gradients)?);
        if case.workload.optimizes() {
            all.extend(self.read_all("param", &self.state)?);
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the random states that follow `key` when it is split `count` times.
    fn states(key: &Array, count: usize) -> Vec<Vec<u32>> {
        let mut state = key.clone();
        let mut all = Vec::new();
        for _ in 0..count {
            state = random::split(&state, 2).unwrap().0;
            state.eval().unwrap();
            all.push(state.as_slice::<u32>().to_vec());
        }
        all
    }

    #[test]
    fn a_step_continues_the_random_state_of_the_last_one() {
        mlx_rs::Device::set_default(&mlx_rs::Device::new(mlx_rs::DeviceType::Cpu, 0));
        // Draws of dropout: weights, residual, hidden and residual in each of two layers, and two heads.
        for (id, draws) in [
            ("train-step/mlx-cpu/f32/indicator-tiny-b2", 10),
            ("train-step/mlx-cpu/f32-tuned/indicator-tiny-b2", 10),
            ("forward-backward/mlx-cpu/f32/indicator-tiny-b2", 10),
            ("attention-grad/mlx-cpu/f32/b2-h4-t8-d8", 1),
        ] {
            let fixture = Fixture::new(id.parse().unwrap());
            let mut step = Step::new(&fixture).unwrap();
            for _ in 0..2 {
                let expected = states(&step.key, draws);
                step.step().unwrap();
                let found = step.key.as_slice::<u32>().to_vec();
                let at = expected.iter().position(|state| *state == found);
                assert_eq!(at, Some(draws - 1), "{id}: the next step would repeat masks of this step");
            }
        }
    }
}
