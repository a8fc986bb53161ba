//! The workloads: the state of a case, and the calls of its program.

use std::rc::Rc;

use anyhow::{Context, Result};
use half::{bf16, f16};
use mlx_rs::error::Exception;
use mlx_rs::random;
use mlx_rs::transforms::compile::compile;
use mlx_rs::transforms::{async_eval, eval};
use mlx_rs::{Array, Dtype};
use transformer_bench::backend::{LoadedCase, result_names};
use transformer_bench::fixture::{AdamW, Fixture, Tensor as Named};
use transformer_bench::model::parameters::{ParameterSpec, Role};
use transformer_bench::suite::Workload;

use crate::distributed;
use crate::optimizer::{Optimizer, adamw_scalars};
use crate::program::{Part, Program};

type Function = Box<dyn FnMut(&[Array]) -> Result<Vec<Array>, Exception>>;

/// A case on the default device.
pub struct Step {
    program: Program,
    /// Run the program, eagerly or compiled: for each [`Part`] of a step, in the order of [`Part::ALL`], or for a whole step.
    functions: Vec<Function>,
    /// Trained parameters, then the moments of the optimizer if the workload optimizes.
    state: Vec<Array>,
    /// Parameters that are not trained, next to adapters.
    frozen: Vec<Array>,
    /// Inputs of each micro-batch. Only a training step has more than one.
    micro_batches: Vec<Vec<Array>>,
    /// Random key of the next step.
    key: Array,
    step_count: i32,
    adamw: AdamW,
    /// Results and gradients of the last step.
    results: Vec<Array>,
    gradients: Vec<Array>,
}

pub fn load(named: &Named, dtype: Dtype) -> Array {
    let dims: Vec<i32> = named.dims.iter().map(|&d| d as i32).collect();
    let data = named.data.iter();
    match dtype {
        Dtype::Bfloat16 => Array::from_slice(&data.map(|&v| bf16::from_f32(v)).collect::<Vec<_>>(), &dims),
        Dtype::Float16 => Array::from_slice(&data.map(|&v| f16::from_f32(v)).collect::<Vec<_>>(), &dims),
        Dtype::Int32 => Array::from_slice(&data.map(|&v| v as i32).collect::<Vec<_>>(), &dims),
        _ => Array::from_slice(&named.data, &dims),
    }
}

/// Returns the type in which a parameter is stored. Adapters are in f32, and others in the type of the precision.
fn stored_dtype(role: Role, dtype: Dtype) -> Dtype {
    if role == Role::Adapter { Dtype::Float32 } else { dtype }
}

/// Returns the type of an input: int32 for token ids, f32 for inputs of the loss, and `dtype` for others.
pub fn input_dtype(name: &str, dtype: Dtype) -> Dtype {
    match name {
        "tokens" | "next" => Dtype::Int32,
        // The loss is in f32 for every precision.
        "usefulness" => Dtype::Float32,
        _ => dtype,
    }
}

/// Returns the inputs of each micro-batch. The inputs of an optimizer step are its fixed gradients.
fn load_inputs(fixture: &Fixture, dtype: Dtype) -> Vec<Vec<Array>> {
    let dtype_of = |name: &str| input_dtype(name, dtype);
    if fixture.case.workload == Workload::OptimizerStep {
        let role = if fixture.case.has_adapters() { Role::Adapter } else { Role::Trained };
        return vec![
            fixture.gradients().iter().map(|named| load(named, stored_dtype(role, dtype))).collect(),
        ];
    }
    let count = fixture.case.shape.micro_batches();
    let part = |named: &Named, index: usize| {
        if count == 1 {
            return load(named, dtype_of(&named.name));
        }
        let each = named.data.len() / count;
        let mut dims = named.dims.clone();
        dims[0] /= count;
        let data = named.data[index * each..(index + 1) * each].to_vec();
        load(&Named { name: named.name.clone(), dims, data }, dtype_of(&named.name))
    };
    (0..count).map(|index| fixture.inputs().iter().map(|named| part(named, index)).collect()).collect()
}

impl Step {
    pub fn new(fixture: &Fixture) -> Result<Self> {
        let case = fixture.case;
        let dtype = crate::dtype(case.method.precision);
        let specs = case.shape.parameter_specs();
        let (mut state, mut frozen) = (Vec::new(), Vec::new());
        for (spec, parameter) in specs.iter().zip(fixture.parameters()) {
            let list = if spec.is_trained() { &mut state } else { &mut frozen };
            list.push(load(parameter, stored_dtype(spec.role, dtype)));
        }
        let micro_batches = load_inputs(fixture, dtype);
        let program = Program {
            case,
            part: Part::Whole,
            dropout: fixture.dropout,
            is_trained: specs.iter().map(ParameterSpec::is_trained).collect(),
            optimizer: Rc::new(Optimizer::new(fixture)),
            inputs: micro_batches[0].len(),
            no_sync: fixture.no_sync,
        };
        if program.updates() {
            let zeros = state.iter().chain(program.optimizer.of_adamw(&state)).map(mlx_rs::ops::zeros_like);
            let zeros = zeros.collect::<Result<Vec<_>, _>>()?;
            state.extend(zeros);
        }
        let compiles = case.method.variant.captures_full_step();
        let function = |part: &Part| -> Function {
            let program = Program { part: *part, ..program.clone() };
            if compiles {
                Box::new(compile(move |args: &[Array]| program.run(args), None))
            } else {
                Box::new(move |args: &[Array]| program.run(args))
            }
        };
        let parts = if micro_batches.len() > 1 { &Part::ALL[..] } else { &[Part::Whole] };
        let functions = parts.iter().map(function).collect();
        let key = random::key(1 + fixture.rank() as u64)?;
        eval(micro_batches.iter().flatten().chain(&state).chain(&frozen).chain([&key]))?;
        let mut step = Self {
            program,
            functions,
            state,
            frozen,
            micro_batches,
            key,
            step_count: 0,
            adamw: fixture.adamw,
            results: Vec::new(),
            gradients: Vec::new(),
        };
        if compiles {
            // MLX compiles kernels in the first evaluation, which can take a minute. Arrays are immutable, so the step
            // does not change the initial state.
            let (state, key) = (step.state.clone(), step.key.clone());
            step.step()?;
            step = Self { state, key, step_count: 0, results: Vec::new(), gradients: Vec::new(), ..step };
        }
        Ok(step)
    }

    /// Returns the names of the trained or of the frozen parameters, in order.
    fn names(&self, is_trained: bool) -> Vec<String> {
        let specs = self.program.case.shape.parameter_specs().into_iter();
        specs.filter(|spec| spec.is_trained() == is_trained).map(|spec| spec.name).collect()
    }

    /// Returns the names of the arrays of the state, in order.
    fn state_names(&self) -> Vec<String> {
        let trained = self.names(true);
        let named = |prefix: &'static str| move |name: &String| format!("{prefix}/{name}");
        let first = trained.iter().map(named("param")).chain(trained.iter().map(named("moment1")));
        first.chain(self.program.optimizer.of_adamw(&trained).map(named("moment2"))).collect()
    }

    /// Reads one array per trained parameter, named `prefix/<parameter>`.
    fn read_trained(&self, prefix: &str, arrays: &[Array]) -> Result<Vec<Named>> {
        let names = self.names(true).into_iter();
        names.zip(arrays).map(|(name, array)| read(format!("{prefix}/{name}"), array)).collect()
    }

    /// Reads the parameters that are not trained.
    fn read_frozen(&self) -> Result<Vec<Named>> {
        let names = self.names(false).into_iter();
        names.zip(&self.frozen).map(|(name, array)| read(format!("param/{name}"), array)).collect()
    }

    /// Returns the arguments of a program for a micro-batch, with AdamW's scalars of step `t` if it updates. Takes the
    /// results of earlier micro-batches as their sums.
    fn arguments(&mut self, program: &Program, inputs: &[Array], t: i32) -> Vec<Array> {
        let state = self.state.iter().take(program.state_len());
        let mut args: Vec<Array> =
            state.chain(&self.frozen).chain(inputs).chain([&self.key]).cloned().collect();
        let sums = self.results.drain(..).chain(self.gradients.drain(..));
        args.extend(sums.filter(|_| program.part.adds_sums()));
        if program.updates() {
            args.extend(adamw_scalars(&self.adamw, t, self.state[0].dtype()));
        }
        args
    }

    /// Runs a micro-batch of step `t`, without waiting for its results.
    fn run_micro_batch(&mut self, index: usize, t: i32) -> Result<()> {
        let count = self.micro_batches.len();
        let program = Program { part: Part::of(index, count), ..self.program.clone() };
        let inputs = std::mem::take(&mut self.micro_batches[index]);
        let args = self.arguments(&program, &inputs, t);
        self.micro_batches[index] = inputs;
        if program.updates() {
            // Without another owner of the old state, MLX can reuse its memory.
            self.state.clear();
        }
        let function = Part::ALL.iter().position(|part| *part == program.part).unwrap_or(0);
        let out = (self.functions[function])(&args)?;
        drop(args);
        let mut out = out.into_iter();
        let mut take = |count: usize| out.by_ref().take(count).collect::<Vec<_>>();
        self.results = take(program.result_count());
        self.gradients = take(program.gradient_count());
        if program.updates() {
            self.state = take(program.state_len());
        }
        self.key = take(1).pop().context("the program returns a key last")?;
        Ok(())
    }
}

/// Copies an array to the host as f32.
pub fn read(name: String, array: &Array) -> Result<Named> {
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
        let last = self.micro_batches.len() - 1;
        for index in 0..last {
            self.run_micro_batch(index, self.step_count)?;
            eval(self.results.iter().chain(&self.gradients).chain([&self.key]))?;
        }
        self.run_micro_batch(last, self.step_count)?;
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
            self.results = vec![distributed::all_reduce(&self.micro_batches[0][0])?];
            async_eval(&self.results)?;
        }
        eval(&self.results)?;
        Ok(true)
    }

    fn set_inputs(&mut self, fixture: &Fixture) -> Result<()> {
        self.micro_batches = load_inputs(fixture, crate::dtype(self.program.case.method.precision));
        Ok(eval(self.micro_batches.iter().flatten())?)
    }

    fn checkpoint(&mut self) -> Result<Vec<Named>> {
        let names = self.state_names().into_iter();
        let mut all: Vec<Named> =
            names.zip(&self.state).map(|(name, array)| read(name, array)).collect::<Result<_>>()?;
        all.extend(self.read_frozen()?);
        if self.program.case.workload.optimizes() {
            all.push(Named { name: "step".to_owned(), dims: vec![1], data: vec![self.step_count as f32] });
        }
        Ok(all)
    }

    fn restore(&mut self, checkpoint: &[Named], seed: u64) -> Result<()> {
        let of_frozen = self.names(false).into_iter().map(|name| format!("param/{name}"));
        let of_state = self.state_names();
        let arrays = self.state.iter_mut().zip(of_state).chain(self.frozen.iter_mut().zip(of_frozen));
        for (array, name) in arrays {
            if let Some(named) = checkpoint.iter().find(|tensor| tensor.name == name) {
                *array = load(named, array.dtype());
            }
        }
        if let Some(step) = checkpoint.iter().find(|tensor| tensor.name == "step") {
            self.step_count = step.data[0] as i32;
        }
        self.key = random::key(seed)?;
        Ok(eval(self.state.iter().chain(&self.frozen).chain([&self.key]))?)
    }

    fn outputs(&mut self) -> Result<Vec<Named>> {
        let case = &self.program.case;
        let names = result_names(case).iter().map(|name| (*name).to_owned());
        let mut all = names.zip(&self.results).map(|(name, a)| read(name, a)).collect::<Result<Vec<_>>>()?;
        all.extend(self.read_trained("grad", &self.gradients)?);
        if case.workload.optimizes() {
            all.extend(self.read_trained("param", &self.state)?);
            all.extend(self.read_frozen()?);
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
            ("train-step/mlx-cpu/f32/indicator-tiny-b8-a4", 40),
            ("train-step/mlx-cpu/f32-tuned/indicator-tiny-b8-a4", 40),
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
