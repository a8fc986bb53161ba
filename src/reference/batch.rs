//! The results of a case: those of its samples, computed on several threads and combined.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::autograd::{Graph, Var};
use super::matmul::{Matrix, Real, cores};
use super::network::{Batch, DropoutMasks, Sample, SampleResults};
use super::rounding::Rounding;
use crate::fixture::Fixture;
use crate::model::parameters::{InOrder, ParameterSpec, Parameters};
use crate::suite::{Shape, Workload};

/// The name of the terms that add up to `loss`, one per token.
pub const LOSS_TERMS: &str = "loss/terms";

/// A result, with the name that backends give it.
#[derive(Clone, Debug)]
pub struct NamedValues<R> {
    pub name: String,
    pub data: Vec<R>,
}

impl<R> NamedValues<R> {
    fn new(name: &str, data: Vec<R>) -> Self {
        Self { name: name.to_owned(), data }
    }
}

/// Returns the results of a step of the fixture's case, without those of the optimizer. `loss` is followed by
/// [`LOSS_TERMS`].
///
/// A sample that occurs several times in the batch is computed once.
pub fn compute<R: Real>(
    fixture: &Fixture,
    rounding: Rounding,
    masks: Option<DropoutMasks<'_>>,
) -> Vec<NamedValues<R>> {
    match fixture.case.shape {
        _ if fixture.case.workload == Workload::OptimizerStep => Vec::new(),
        Shape::Square { n, chain } => {
            vec![NamedValues::new("out", matrix_products(fixture, n, chain, rounding))]
        }
        Shape::Buffer { .. } => {
            let negative = |&v: &f32| rounding.leaf.round(-R::from_f32(v));
            vec![NamedValues::new("out", fixture.input("buffer").data.iter().map(negative).collect())]
        }
        Shape::Model { model, .. } | Shape::Block { model, .. } => {
            Batch { fixture, model: &model, rounding, masks }.compute()
        }
    }
}

fn matrix_products<R: Real>(fixture: &Fixture, n: usize, chain: usize, rounding: Rounding) -> Vec<R> {
    let load = |name: &str| {
        let data = fixture.input(name).data.iter().map(|&v| rounding.leaf.round(R::from_f32(v))).collect();
        Matrix::new(n, n, data)
    };
    let (a, mut out) = (load("a").map(cores(), |v| rounding.operand.round(v)), load("b"));
    for _ in 0..chain {
        out = a.view().product(out.map(cores(), |v| rounding.operand.round(v)).view(), cores());
        rounding.round_all(rounding.product, &mut out.data, cores());
    }
    out.data
}

impl Batch<'_> {
    /// Computes the samples on all cores, and combines their results.
    fn compute<R: Real>(&self) -> Vec<NamedValues<R>> {
        let order = self.fixture.samples();
        let distinct = order.iter().max().map_or(0, |most| most + 1);
        let workers = distinct.min(cores());
        let threads_per_sample = (cores() / workers).max(1);
        let next = AtomicUsize::new(0);
        let all: Mutex<Vec<(usize, SampleResults<R>)>> = Mutex::new(Vec::new());
        let gradients: Mutex<Vec<Matrix<R>>> = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        if index >= distinct {
                            return;
                        }
                        let mut results = self.sample::<R>(index, threads_per_sample);
                        let times = order.iter().filter(|&&i| i == index).count();
                        let mut sums = gradients.lock().expect("no thread panicked");
                        self.add_products(&mut sums, &mut results.gradients, times);
                        drop(sums);
                        all.lock().expect("no thread panicked").push((index, results));
                    }
                });
            }
        });
        let mut all = all.into_inner().expect("no thread panicked");
        all.sort_by_key(|(index, _)| *index);
        let samples: Vec<SampleResults<R>> = all.into_iter().map(|(_, results)| results).collect();
        self.combine(order, &samples, gradients.into_inner().expect("no thread panicked"))
    }

    fn sample<R: Real>(&self, index: usize, threads: usize) -> SampleResults<R> {
        let mut sample = Sample { graph: Graph::new(self.rounding, threads), batch: self, index };
        let parameters: Vec<Var> =
            self.fixture.parameters().iter().map(|tensor| sample.parameter(tensor)).collect();
        let shape = self.fixture.case.shape;
        match shape.take_parameters(&mut InOrder(parameters.iter().copied())) {
            Parameters::Model(network) => sample.model_step(&network, &parameters),
            block => sample.block_step(&block, &parameters),
        }
    }

    /// Moves the gradients that are products out of a sample's, and adds them `times` times to `sums`. A sum then
    /// needs the memory of one sample.
    fn add_products<R: Real>(&self, sums: &mut Vec<Matrix<R>>, own: &mut [Matrix<R>], times: usize) {
        let times = R::from_f64(times as f64);
        let first = sums.is_empty();
        let specs = self.fixture.case.shape.parameter_specs();
        for (index, (spec, own)) in specs.iter().zip(own).enumerate() {
            let is_product = spec.is_trained() && !is_row_sum(spec);
            let mut part = if is_product { std::mem::take(own) } else { Matrix::default() };
            part.data.iter_mut().for_each(|v| *v *= times);
            if first {
                sums.push(part);
            } else {
                sums[index].add(&part);
            }
        }
    }

    /// Returns the results of the batch. `order` has the sample at each place, `gradients` the sums of
    /// [`Batch::add_products`].
    fn combine<R: Real>(
        &self,
        order: &[usize],
        samples: &[SampleResults<R>],
        gradients: Vec<Matrix<R>>,
    ) -> Vec<NamedValues<R>> {
        let concat = |part: &dyn Fn(&SampleResults<R>) -> &[R]| -> Vec<R> {
            order.iter().flat_map(|&i| part(&samples[i]).iter().copied()).collect()
        };
        let workload = self.fixture.case.workload;
        if !workload.trains() {
            let names = if workload.takes_model() { self.model.output_names() } else { &["out"] };
            let output = |(i, name): (usize, &&str)| NamedValues::new(name, concat(&|s| &s.outputs[i]));
            return names.iter().enumerate().map(output).collect();
        }
        let mut all = Vec::new();
        if workload.takes_model() {
            let terms = concat(&|s| &s.loss_terms);
            all.push(NamedValues::new("loss", vec![terms.iter().copied().sum()]));
            all.push(NamedValues::new(LOSS_TERMS, terms));
        } else {
            all.push(NamedValues::new("grad/x", concat(&|s| &s.input_gradient)));
        }
        let specs = self.fixture.case.shape.parameter_specs();
        for (index, (spec, mut gradient)) in specs.iter().zip(gradients).enumerate() {
            // A frozen parameter has no gradient.
            if !spec.is_trained() {
                continue;
            }
            if is_row_sum(spec) {
                gradient = Matrix::zeros(1, spec.len());
                let is_norm = spec.name.contains("norm");
                for &i in order {
                    let rows = &samples[i].gradients[index].data;
                    self.rounding.add_rows(self.rounding.product, is_norm, &mut gradient.data, rows);
                }
            }
            self.rounding.round_all(self.rounding.product, &mut gradient.data, cores());
            all.push(NamedValues::new(&format!("grad/{}", spec.name), gradient.data));
        }
        all
    }
}

/// Returns true if the gradient of a parameter is a sum over tokens or samples, and not a matrix product.
fn is_row_sum(parameter: &ParameterSpec) -> bool {
    parameter.dims.len() == 1 || parameter.name == "position"
}
