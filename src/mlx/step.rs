//! The workloads in MLX. Each is one function from arrays to arrays; the eager recipe
//! calls it, the others compile it.

use std::cell::RefCell;

use anyhow::{Context, Result};
use half::{bf16, f16};
use mlx_rs::error::Exception;
use mlx_rs::random::{self, RandomState};
use mlx_rs::transforms::compile::compile;
use mlx_rs::transforms::{async_eval, eval, value_and_grad_with_argnums, vjp};
use mlx_rs::{Array, Dtype};
use transformer_bench::backend::LoadedCase;
use transformer_bench::model::fixture::{AdamW, Fixture, Tensor as Named};
use transformer_bench::model::parameters::{InOrder, LayerParams};
use transformer_bench::model::{Dropout, ModelId};
use transformer_bench::suite::{Case, Precision, Shape, Workload};

use crate::distributed;
use crate::network::{self, Layers, scalar};

type Function = Box<dyn FnMut(&[Array]) -> Result<Vec<Array>, Exception>>;

/// A case on the default device.
pub struct Step {
    program: Program,
    function: Function,
    names: Vec<(String, Vec<usize>)>,
    inputs: Vec<Array>,
    parameters: Vec<Array>,
    first: Vec<Array>,
    second: Vec<Array>,
    key: Array,
    steps: i32,
    adamw: AdamW,
    /// The last step's results and gradients.
    results: Vec<Array>,
    gradients: Vec<Array>,
}

/// What the function needs to know beside its arguments.
#[derive(Clone, Copy)]
struct Program {
    case: Case,
    dropout: Dropout,
    parameters: usize,
    inputs: usize,
    /// Whether ranks leave the exchange out.
    silent: bool,
}

/// How many arrays of each sort a program returns.
struct Returned {
    results: usize,
    gradients: usize,
    /// Parameters and both moments.
    updated: bool,
}

fn load(named: &Named, dtype: Dtype) -> Array {
    let dims: Vec<i32> = named.dims.iter().map(|&d| d as i32).collect();
    match dtype {
        Dtype::Bfloat16 => {
            Array::from_slice(&named.data.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>(), &dims)
        }
        Dtype::Float16 => {
            Array::from_slice(&named.data.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>(), &dims)
        }
        Dtype::Int32 => Array::from_slice(&named.data.iter().map(|&v| v as i32).collect::<Vec<_>>(), &dims),
        _ => Array::from_slice(&named.data, &dims),
    }
}

/// What the function reads beside parameters: of the optimizer alone its fixed gradients.
fn inputs(fixture: &Fixture, dtype: Dtype) -> Vec<Array> {
    let dtype_of = |name: &str| match name {
        "tokens" | "next" => Dtype::Int32,
        // The loss is in f32.
        "usefulness" => Dtype::Float32,
        _ => dtype,
    };
    let fixed = fixture.case.workload == Workload::OptimizerStep;
    let all = if fixed { fixture.gradients() } else { fixture.inputs() };
    all.iter().map(|named| load(named, dtype_of(&named.name))).collect()
}

impl Step {
    pub fn new(fixture: &Fixture) -> Result<Self> {
        let case = fixture.case;
        let dtype = crate::dtype(case.method.precision);
        let parameters: Vec<Array> = fixture.parameters().iter().map(|p| load(p, dtype)).collect();
        let inputs = inputs(fixture, dtype);
        let zeros = |p: &Array| mlx_rs::ops::zeros_like(p);
        let moments = if case.workload.optimizes() { &parameters[..] } else { &[] };
        let first = moments.iter().map(zeros).collect::<Result<Vec<_>, _>>()?;
        let second = moments.iter().map(zeros).collect::<Result<Vec<_>, _>>()?;
        let program = Program {
            case,
            dropout: fixture.dropout,
            parameters: parameters.len(),
            inputs: inputs.len(),
            silent: fixture.silent,
        };
        let function: Function = if case.method.variant.captures_full_step() {
            Box::new(compile(move |args: &[Array]| program.run(args), None))
        } else {
            Box::new(move |args: &[Array]| program.run(args))
        };
        let key = random::key(1 + fixture.rank() as u64)?;
        eval(inputs.iter().chain(&parameters).chain(&first).chain(&second).chain([&key]))?;
        let mut step = Self {
            program,
            function,
            names: fixture.parameters().iter().map(|p| (p.name.clone(), p.dims.clone())).collect(),
            inputs,
            parameters,
            first,
            second,
            key,
            steps: 0,
            adamw: fixture.adamw,
            results: Vec::new(),
            gradients: Vec::new(),
        };
        if case.method.variant.captures_full_step() {
            // Compiles: MLX builds kernels on the first evaluation, which can take a
            // minute. The state stays as it is, since arrays never change.
            let args = step.arguments(1);
            eval(&(step.function)(&args)?)?;
        }
        Ok(step)
    }
}

/// A program's arguments, apart.
struct Arguments<'a> {
    parameters: &'a [Array],
    first: &'a [Array],
    second: &'a [Array],
    inputs: &'a [Array],
    key: &'a Array,
    /// AdamW's.
    numbers: &'a [Array],
}

impl Program {
    /// The names of the results.
    fn names(&self) -> &'static [&'static str] {
        match (self.case.workload, self.case.shape) {
            (Workload::ForwardBackward | Workload::TrainStep, _) => &["loss"],
            (_, Shape::Model { model, .. }) => model.output_names(),
            _ => &["out"],
        }
    }

    fn returned(&self) -> Returned {
        let (results, gradients, updated) = match self.case.workload {
            Workload::AttentionGrad | Workload::FeedForwardGrad => (0, 1 + self.parameters, false),
            Workload::ForwardBackward => (1, self.parameters, false),
            Workload::TrainStep => (1, self.parameters, true),
            Workload::OptimizerStep => (0, 0, true),
            _ => (self.names().len(), 0, false),
        };
        Returned { results, gradients, updated }
    }

    /// Parameters, first and second moments where the workload has them, inputs, random key,
    /// and AdamW's numbers.
    fn apart<'a>(&self, args: &'a [Array]) -> Arguments<'a> {
        let (parameters, rest) = args.split_at(self.parameters);
        let moments = if self.returned().updated { self.parameters } else { 0 };
        let (first, rest) = rest.split_at(moments);
        let (second, rest) = rest.split_at(moments);
        let (inputs, rest) = rest.split_at(self.inputs);
        Arguments { parameters, first, second, inputs, key: &rest[0], numbers: &rest[1..] }
    }

    /// Takes what [`Program::apart`] takes apart. Returns results, gradients, what was
    /// updated, and the next key.
    fn run(&self, args: &[Array]) -> Result<Vec<Array>, Exception> {
        let a = self.apart(args);
        // The state behind the step's last draw: from any other, later steps would draw some
        // of this one's masks again.
        let state = RefCell::new(a.key.clone());
        let forward = |parameters: &[Array], inputs: &[Array]| -> Result<Vec<Array>, Exception> {
            let mut layers = self.layers(a.key.clone());
            let out = self.forward(parameters, inputs, &mut layers)?;
            *state.borrow_mut() = layers.random.as_array().clone();
            Ok(out)
        };
        let mut out = match self.case.workload {
            Workload::OptimizerStep => Vec::new(),
            Workload::CopyPeak => vec![a.inputs[0].negative()?],
            Workload::AllReduce => vec![distributed::all_reduce(&a.inputs[0])?],
            Workload::MatmulPeak => vec![self.chain(a.inputs)?],
            Workload::AttentionGrad | Workload::FeedForwardGrad => block_gradients(&forward, &a)?,
            Workload::ForwardBackward | Workload::TrainStep => self.model_gradients(&forward, &a)?,
            _ => forward(a.parameters, a.inputs)?,
        };
        if self.case.shape.ranks() > 1 && self.case.workload.trains() && !self.silent {
            let means = distributed::mean(&out[1..], self.case.method.variant.overlaps_communication())?;
            out.splice(1.., means);
        }
        if self.returned().updated {
            let fixed = self.case.workload == Workload::OptimizerStep;
            let gradients = if fixed { a.inputs } else { &out[1..] };
            out.extend(adamw(&a, gradients)?);
        }
        out.push(state.into_inner());
        Ok(out)
    }

    fn layers(&self, key: Array) -> Layers {
        Layers {
            model: self.case.shape.model().map_or(ModelId::indicator(), |(model, _)| model),
            fused: self.case.method.variant.uses_sdpa(),
            dropout: self.dropout,
            random: RandomState::from_key(key),
        }
    }

    /// Loss and every gradient.
    fn model_gradients(&self, forward: Forward<'_>, a: &Arguments<'_>) -> Result<Vec<Array>, Exception> {
        let Shape::Model { model, .. } = self.case.shape else { unreachable!("a model's workload") };
        let everything: Vec<i32> = (0..self.parameters as i32).collect();
        let f = |p: &[Array]| -> Result<Vec<Array>, Exception> {
            Ok(vec![network::loss(&model, &forward(p, a.inputs)?, a.inputs)?])
        };
        let (loss, gradients) = value_and_grad_with_argnums(f, &everything)(a.parameters)?;
        Ok(loss.into_iter().chain(gradients).collect())
    }

    fn forward(
        &self,
        parameters: &[Array],
        inputs: &[Array],
        layers: &mut Layers,
    ) -> Result<Vec<Array>, Exception> {
        // Mixed precision written out: the parameters stay f32, their copies are bf16.
        let amp = self.case.method.precision == Precision::Mixed;
        let cast = |a: &Array| {
            if amp && a.dtype() == Dtype::Float32 { a.as_dtype(Dtype::Bfloat16) } else { Ok(a.clone()) }
        };
        let parameters = parameters.iter().map(cast).collect::<Result<Vec<_>, _>>()?;
        // What the loss alone reads, the third, stays.
        let inputs = inputs.iter().take(2).map(cast).collect::<Result<Vec<_>, _>>()?;
        Ok(match LayerParams::take(&mut InOrder(parameters.into_iter()), self.case.shape) {
            LayerParams::Model(network) => layers.model(&inputs, &network)?,
            LayerParams::Attention(layer) => vec![layers.attention(&inputs[0], &layer)?],
            LayerParams::FeedForward(layer) => vec![layers.feed_forward(&inputs[0], &layer)?],
            LayerParams::None => unreachable!("peaks have no model"),
        })
    }

    fn chain(&self, inputs: &[Array]) -> Result<Array, Exception> {
        let Shape::Square { chain, .. } = self.case.shape else { unreachable!("a square shape") };
        let mut product = inputs[0].matmul(&inputs[1])?;
        for _ in 1..chain {
            product = inputs[0].matmul(&product)?;
        }
        Ok(product)
    }
}

/// From parameters and inputs to what comes out, drawing from the step's random state.
type Forward<'a> = &'a dyn Fn(&[Array], &[Array]) -> Result<Vec<Array>, Exception>;

/// The gradients of a block's input and parameters.
fn block_gradients(forward: Forward<'_>, a: &Arguments<'_>) -> Result<Vec<Array>, Exception> {
    let mut primals = vec![a.inputs[0].clone()];
    primals.extend_from_slice(a.parameters);
    let upstream = a.inputs[1].clone();
    // `vjp` takes no fallible function; a panic comes back as one.
    let f = |p: &[Array]| -> Vec<Array> {
        let out = forward(&p[1..], &p[..1]).expect("the forward pass");
        vec![out[0].as_dtype(upstream.dtype()).expect("a cast")]
    };
    Ok(vjp(f, &primals, std::slice::from_ref(&upstream))?.1)
}

/// The numbers of AdamW's step `t`, in the parameters' type: decay factor, β1, β2, step
/// size with the first bias correction, root of the second, ε.
fn adamw_numbers(s: &AdamW, t: i32, dtype: Dtype) -> Vec<Array> {
    let step_size = s.lr / (1.0 - s.beta1.powi(t));
    let root = 1.0 / (1.0 - s.beta2.powi(t)).sqrt();
    [1.0 - s.lr * s.weight_decay, s.beta1, 1.0 - s.beta1, s.beta2, 1.0 - s.beta2, step_size, root, s.eps]
        .map(|value| scalar(value, dtype))
        .into()
}

/// One AdamW step with bias correction, written as MLX's Python optimizer writes it
/// (mlx-rs's own has no correction). Returns parameters, then both moments.
fn adamw(a: &Arguments<'_>, gradients: &[Array]) -> Result<Vec<Array>, Exception> {
    let [decay, beta1, rest1, beta2, rest2, step_size, root, eps] = a.numbers else {
        unreachable!("eight numbers");
    };
    let (mut p_new, mut m_new, mut v_new) = (Vec::new(), Vec::new(), Vec::new());
    for (i, g) in gradients.iter().enumerate() {
        let m = a.first[i].multiply(beta1)?.add(g.multiply(rest1)?)?;
        let v = a.second[i].multiply(beta2)?.add(g.square()?.multiply(rest2)?)?;
        let denominator = v.sqrt()?.multiply(root)?.add(eps)?;
        let update = m.multiply(step_size)?.divide(denominator)?;
        p_new.push(a.parameters[i].multiply(decay)?.subtract(update)?);
        m_new.push(m);
        v_new.push(v);
    }
    p_new.append(&mut m_new);
    p_new.append(&mut v_new);
    Ok(p_new)
}

impl Step {
    /// The function's arguments, with the numbers of AdamW's step `t`.
    fn arguments(&self, t: i32) -> Vec<Array> {
        let mut args = self.parameters.clone();
        args.extend(self.first.iter().chain(&self.second).chain(&self.inputs).chain([&self.key]).cloned());
        if self.program.returned().updated {
            args.extend(adamw_numbers(&self.adamw, t, self.parameters[0].dtype()));
        }
        args
    }
}

impl LoadedCase for Step {
    fn step(&mut self) -> Result<()> {
        let returned = self.program.returned();
        self.results.clear();
        self.gradients.clear();
        self.steps += 1;
        let args = self.arguments(self.steps);
        if returned.updated {
            // The old state must have no other owner, so that its memory can be reused.
            self.parameters.clear();
            self.first.clear();
            self.second.clear();
        }
        let out = (self.function)(&args)?;
        drop(args);
        let mut out = out.into_iter();
        let mut take = |count: usize| out.by_ref().take(count).collect::<Vec<_>>();
        self.results = take(returned.results);
        self.gradients = take(returned.gradients);
        if returned.updated {
            self.parameters = take(self.program.parameters);
            self.first = take(self.program.parameters);
            self.second = take(self.program.parameters);
        }
        self.key = take(1).pop().context("the program returns a key last")?;
        // Everything at once: evaluated one by one, shared work could run twice, and
        // what is left out would not run at all.
        eval(
            self.results
                .iter()
                .chain(&self.gradients)
                .chain(&self.parameters)
                .chain(&self.first)
                .chain(&self.second)
                .chain([&self.key]),
        )?;
        Ok(())
    }

    /// An all-reduce, a ceiling, is timed as nccl-tests times it.
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

    fn outputs(&mut self) -> Result<Vec<Named>> {
        let read = |name: String, dims: &[usize], array: &Array| -> Result<Named> {
            let flat = array.as_dtype(Dtype::Float32)?.reshape(&[-1])?;
            // A strided result is laid out row-major by a copy.
            let flat = flat.add(Array::from_f32(0.0))?;
            flat.eval()?;
            Ok(Named { name, dims: dims.to_vec(), data: flat.try_as_slice::<f32>()?.to_vec() })
        };
        let mut all = Vec::new();
        let dims_of = |a: &Array| a.shape().iter().map(|&d| d as usize).collect::<Vec<_>>();
        for (name, array) in self.program.names().iter().zip(&self.results) {
            all.push(read((*name).to_owned(), &dims_of(array), array)?);
        }
        let mut gradients = self.gradients.iter();
        if self.gradients.len() > self.program.parameters
            && let Some(x) = gradients.next()
        {
            all.push(read("grad/x".to_owned(), &dims_of(x), x)?);
        }
        for ((name, dims), gradient) in self.names.iter().zip(gradients) {
            all.push(read(format!("grad/{name}"), dims, gradient)?);
        }
        if self.program.returned().updated {
            for ((name, dims), parameter) in self.names.iter().zip(&self.parameters) {
                all.push(read(format!("param/{name}"), dims, parameter)?);
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The random states that follow each other from `key` by splitting.
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
    fn a_step_starts_where_the_last_one_stopped_drawing() {
        mlx_rs::Device::set_default(&mlx_rs::Device::new(mlx_rs::DeviceType::Cpu, 0));
        // Two layers of weights, residual, hidden, residual; and two heads.
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
                assert_eq!(at, Some(draws - 1), "{id}: the next step would draw this one's masks again");
            }
        }
    }
}
