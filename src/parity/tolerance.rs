//! What a step must put out, and how far a precision may stray from it.
//!
//! The oracle computes twice: in f64, and as the precision does, rounding every result to its
//! format. The distance of the two is what rounding costs; a backend, which rounds in another
//! order, may stray a few times as far. Chance may have made that distance small. So the oracle
//! rounds several times where it is quick, and the spread of a few numbers is drawn towards that
//! of their layer, as Smyth does with the variances of few measurements (*Stat. Appl. Genet.
//! Mol. Biol.* 3, 2004).

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use crate::model::fixture::{AdamW, Fixture, Tensor};
use crate::model::reference::blocked::{Computed, Masks, TERMS, computed};
use crate::model::reference::rounding::{Rounding, Sums};
use crate::model::reference::{adamw, scalar};
use crate::suite::{Precision, Shape, Workload, cost};

/// How many times the oracle's own rounding error a backend's may be. Measured over all tensors,
/// precisions and recipes of both frameworks on CPUs: 1.0 in the middle, 1.9 at most.
const FACTOR: f64 = 3.0;

/// The same where the order of a long sum decides, which is any engine's own: in f32, and of what
/// is summed in its own type. 6.2 at most was seen, of a sum over 1,776 rows.
const FACTOR_OF_SUMS: f64 = 16.0;

/// How often the oracle's rounding error a tensor's may be.
fn factor(name: &str, compute: Precision, sums: Sums) -> f64 {
    let of_norm = name.contains("norm");
    let narrow = match sums {
        Sums::Wide => false,
        Sums::NarrowInNorms => of_norm,
        Sums::Narrow => {
            of_norm || name.ends_with("bias") || name.ends_with("position") || name.ends_with("type")
        }
    };
    if compute == Precision::F32 || narrow { FACTOR_OF_SUMS } else { FACTOR }
}

/// How many numbers' weight the spread of the whole layer has.
const PRIOR: f64 = 16.0;

/// A tensor's true values.
#[derive(Clone, Debug)]
pub struct Expected {
    pub name: String,
    pub exact: Arc<Vec<f64>>,
    /// The largest norm of an error.
    pub allowed: f64,
}

/// How a tensor compares with the truth; norms.
#[derive(Clone, Debug)]
pub struct TensorError {
    pub name: String,
    pub error: f64,
    pub allowed: f64,
    pub size: f64,
}

impl TensorError {
    /// The error over what is allowed; infinite where it is no number.
    pub fn ratio(&self) -> f64 {
        if self.error.is_nan() {
            f64::INFINITY
        } else if self.error <= self.allowed {
            // Both may be zero.
            self.error / self.allowed.max(f64::MIN_POSITIVE)
        } else {
            self.error / self.allowed
        }
    }

    /// For people; relative where the tensor is not zero.
    pub fn text(&self) -> String {
        let size = if self.size > self.allowed { self.size } else { 1.0 };
        let of = if self.size > self.allowed { "of its norm" } else { "in its norm, which should vanish" };
        format!("{}: error {:.2e} {of}, allowed {:.2e}", self.name, self.error / size, self.allowed / size)
    }
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|v| v * v).sum::<f64>().sqrt()
}

impl Expected {
    pub fn error_of(&self, found: &[Tensor]) -> TensorError {
        let error = match found.iter().find(|t| t.name == self.name) {
            Some(t) if t.data.len() == self.exact.len() => {
                norm(t.data.iter().zip(&*self.exact).map(|(&a, &b)| f64::from(a) - b))
            }
            _ => f64::INFINITY,
        };
        let size = norm(self.exact.iter().copied());
        TensorError { name: self.name.clone(), error, allowed: self.allowed, size }
    }
}

/// The oracle's results in f64.
type Exact = Vec<(String, Arc<Vec<f64>>)>;

/// The squared error of each tensor, over one rounding or, of what is quick, the mean of several.
fn costs(exact: &Exact, runs: usize, rounded: impl Fn(u64) -> Vec<Computed<f32>>) -> Vec<f64> {
    let mut sums = vec![0.0; exact.len()];
    for draw in 0..runs {
        for ((sum, (_, exact)), rounded) in sums.iter_mut().zip(exact).zip(rounded(draw as u64)) {
            *sum += exact.iter().zip(&rounded.data).map(|(a, &b)| (a - f64::from(b)).powi(2)).sum::<f64>();
        }
    }
    sums.into_iter().map(|sum| sum / runs as f64).collect()
}

/// How often the oracle rounds: often where it takes no time, once where it takes seconds.
fn runs(fixture: &Fixture) -> usize {
    let distinct = fixture.samples().iter().max().map_or(1, |most| most + 1) as f64;
    let flops = cost::flops(&fixture.case) as f64 * distinct / fixture.samples().len() as f64;
    match flops {
        f if f < 1e9 => 8,
        f if f < 1e11 => 3,
        _ => 1,
    }
}

/// From the f32 next to a value to the one behind it.
fn spacing(value: f64) -> f64 {
    let near = (value as f32).abs();
    f64::from(near.next_up() - near)
}

/// Tensors with what is allowed of each.
fn known(exact: Exact, squares: Vec<f64>, factor: impl Fn(&str) -> f64) -> Vec<Expected> {
    let mut layers: HashMap<String, [f64; 2]> = HashMap::new();
    for ((name, values), square) in exact.iter().zip(&squares) {
        let sums = layers.entry(layer(name).to_owned()).or_default();
        sums[0] += square;
        sums[1] += values.len() as f64;
    }
    let mut all = Vec::new();
    for ((name, exact), square) in exact.into_iter().zip(squares) {
        let count = exact.len() as f64;
        if name == TERMS {
            // A mean strays by at most the root mean square of what its terms stray by.
            let loss: &mut Expected = all.last_mut().expect("the loss stands before its terms");
            let strays = factor("loss") * (count * square).sqrt();
            // It is one number of f32: all roundings of the oracle may happen to end next to the truth, and
            // an engine's beside it.
            loss.allowed = strays.max(1.5 * spacing(loss.exact[0]));
            continue;
        }
        let [sum, of] = layers[layer(&name)];
        let variance = (PRIOR * sum / of + square) / (PRIOR + count);
        let allowed = factor(&name) * (count * variance).sqrt();
        all.push(Expected { name, exact, allowed });
    }
    all
}

/// What makes two fixtures of a shape the same to the oracle in f64.
type Key = (bool, bool, Option<Precision>);

/// The truths of a shape, computed once.
#[derive(Default)]
pub struct ReferenceCache {
    shape: Option<Shape>,
    exact: HashMap<Key, Exact>,
    known: HashMap<(Key, Precision, Sums, bool), Arc<Vec<Expected>>>,
}

impl ReferenceCache {
    /// What a step of a parity fixture puts out, without the optimizer's results.
    /// `sums` is [`crate::backend::Backend::sums`].
    pub fn expected(&mut self, fixture: &Fixture, sums: Sums) -> Arc<Vec<Expected>> {
        let case = fixture.case;
        // Among ranks it is the same function.
        let shape = case.shape.with_ranks(1);
        if self.shape != Some(shape) {
            *self = Self { shape: Some(shape), ..Self::default() };
        }
        let compute = case.method.precision;
        let fused = case.fuses_attention();
        let stored = compute.is_half().then_some(compute);
        let key = (case.workload.trains(), case.workload == Workload::OptimizerStep, stored);
        if let Some(known) = self.known.get(&(key, compute, sums, fused)) {
            return Arc::clone(known);
        }
        let exact = self.exact.entry(key).or_insert_with(|| exact(fixture, None)).clone();
        let found = Arc::new(rounded(fixture, sums, exact, None));
        self.known.insert((key, compute, sums, fused), Arc::clone(&found));
        found
    }
}

/// What a precision may make of what is exact.
fn rounded(fixture: &Fixture, sums: Sums, exact: Exact, masks: Option<Masks<'_>>) -> Vec<Expected> {
    let fused = fixture.case.fuses_attention();
    let rounding = Rounding { fused, ..Rounding::of(fixture.case.method.precision, sums) };
    let squares =
        costs(&exact, runs(fixture), |draw| computed(fixture, Rounding { draw, ..rounding }, masks));
    let compute = fixture.case.method.precision;
    known(exact, squares, |name| factor(name, compute, sums))
}

fn exact(fixture: &Fixture, masks: Option<Masks<'_>>) -> Exact {
    let small = fixture.case.shape.model().is_some_and(|(model, _)| model.is_miniature());
    if small && masks.is_none() {
        // What nothing but the mathematics can get wrong, where it can follow.
        let mut all: Vec<_> =
            scalar::expected(fixture).into_iter().map(|e| (e.name, Arc::new(e.data))).collect();
        let terms = computed::<f64>(fixture, Rounding::NONE, None).into_iter().find(|c| c.name == TERMS);
        if let Some(terms) = terms {
            all.insert(1, (terms.name, Arc::new(terms.data)));
        }
        return all;
    }
    computed::<f64>(fixture, Rounding::NONE, masks).into_iter().map(|c| (c.name, Arc::new(c.data))).collect()
}

/// What a step puts out where dropout's masks are known; rounded once at full sizes, where many
/// numbers even chance out.
pub fn expected_with_masks(fixture: &Fixture, sums: Sums, masks: Masks<'_>) -> Vec<Expected> {
    rounded(fixture, sums, exact(fixture, Some(masks)), Some(masks))
}

/// The stretches of parameters that are one layer's.
pub fn tensor_groups(parameters: &[Tensor]) -> Vec<Range<usize>> {
    let mut all: Vec<Range<usize>> = Vec::new();
    for (index, parameter) in parameters.iter().enumerate() {
        match all.last_mut() {
            Some(last) if layer(&parameters[last.start].name) == layer(&parameter.name) => {
                last.end = index + 1
            }
            _ => all.push(index..index + 1),
        }
    }
    all
}

/// The layer of a parameter: its name without its last part.
fn layer(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(layer, _)| layer)
}

/// Parameters after AdamW steps from zero moments, by the backend's own gradients: its first
/// step is the gradient's sign, which rounding decides where the gradient is zero.
pub fn expected_update(
    setting: &AdamW,
    parameters: &[Tensor],
    steps: &[Vec<&[f32]>],
    compute: Precision,
) -> Vec<Expected> {
    let format = if compute.is_half() { Rounding::of(compute, Sums::Wide).leaf } else { Rounding::NONE.leaf };
    let (mut exact, mut rounded) = (Vec::new(), Vec::new());
    for (index, parameter) in parameters.iter().enumerate() {
        let name = format!("param/{}", parameter.name);
        let gradients: Vec<&[f32]> = steps.iter().map(|step| step[index]).collect();
        let truth = adamw::<f64>(setting, &parameter.data, &gradients, Rounding::NONE.leaf);
        exact.push((name.clone(), Arc::new(truth)));
        rounded.push(Computed { name, data: adamw::<f32>(setting, &parameter.data, &gradients, format) });
    }
    let squares = costs(&exact, 1, |_| rounded.clone());
    known(exact, squares, |_| if compute.is_half() { FACTOR } else { FACTOR_OF_SUMS })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(exact: f64, allowed: f64, found: f32) -> f64 {
        let known = Expected { name: "a".to_owned(), exact: Arc::new(vec![exact]), allowed };
        known.error_of(&[Tensor { name: "a".to_owned(), dims: vec![1], data: vec![found] }]).ratio()
    }

    #[test]
    fn nan_missing_and_short_tensors_are_errors() {
        assert_eq!(one(1.0, 1.0, f32::NAN), f64::INFINITY);
        let known = Expected { name: "a".to_owned(), exact: Arc::new(vec![1.0, 1.0]), allowed: 9.0 };
        assert_eq!(known.error_of(&[]).ratio(), f64::INFINITY);
        let short = Tensor { name: "a".to_owned(), dims: vec![1], data: vec![1.0] };
        assert_eq!(known.error_of(&[short]).ratio(), f64::INFINITY);
    }

    #[test]
    fn what_must_be_exact_has_to_be() {
        assert_eq!(one(1.0, 0.0, 1.0), 0.0);
        assert_eq!(one(1.0, 0.0, 1.0 + f32::EPSILON), f64::INFINITY);
        assert!(one(1.0, 0.5, 1.4) < 1.0 && one(1.0, 0.5, 1.6) > 1.0);
    }

    #[test]
    fn a_lucky_number_is_allowed_what_its_layer_is() {
        let exact = |n: usize| Arc::new(vec![1.0; n]);
        let names = [("grad/o.weight", 1000, 1e-3f64), ("grad/o.bias", 1, 0.0), ("grad/p.bias", 1, 0.0)];
        let all = known(
            names.iter().map(|(name, n, _)| ((*name).to_owned(), exact(*n))).collect(),
            names.iter().map(|(_, n, by)| *n as f64 * by * by).collect(),
            |_| FACTOR,
        );
        // 16 of 17 parts of the layer's spread, in one number.
        assert!((all[1].allowed / (FACTOR * 1e-3) - (16.0f64 / 17.0).sqrt()).abs() < 1e-2);
        assert!((all[0].allowed / (FACTOR * 1e-3 * 1000f64.sqrt()) - 1.0).abs() < 1e-2);
        assert_eq!(all[2].allowed, 0.0);
    }
    #[test]
    fn a_lucky_loss_may_be_the_number_beside_and_no_further() {
        let next = |steps: i32| (0..steps).fold(2.9f32, |value, _| value.next_up());
        // As near as f32 comes to a truth between two of its numbers, in every one of its roundings.
        let truth = f64::from(next(0)) + 0.4 * f64::from(next(1) - next(0));
        let exact =
            vec![("loss".to_owned(), Arc::new(vec![truth])), (TERMS.to_owned(), Arc::new(vec![truth]))];
        let loss = &known(exact, vec![0.0, 0.0], |_| FACTOR)[0];
        assert!(one(truth, loss.allowed, next(0)) <= 1.0 && one(truth, loss.allowed, next(1)) <= 1.0);
        assert!(one(truth, loss.allowed, next(0).next_down()) <= 1.0);
        assert!(one(truth, loss.allowed, next(2)) > 1.0);
    }
}
