//! The comparison of an optimizer's update with the reference.

use std::collections::HashSet;

use super::find;
use super::steps::{Outcome, StepCheck, random_below};
use super::tolerance::{MatrixUpdate, Update, expected_update, layer_name};
use crate::fixture::{Fixture, Tensor};
use crate::model::parameters::ParameterSpec;
use crate::suite::{Shape, Workload, cost};

/// FLOPs of the orthogonalizations that the reference computes in a checked step, so that it takes a few seconds on two
/// cores. The matrices of `indicator-b16` have fewer, and those of `gpt2` 16 times this number.
const MAX_FLOPS: u128 = 100_000_000_000;

/// A parameter before and after a step.
struct Step<'a> {
    spec: &'a ParameterSpec,
    gradient: &'a [f32],
    before: &'a [Tensor],
    after: &'a [Tensor],
}

impl StepCheck<'_> {
    /// Returns the values of `prefix/<parameter>`, which must be as many as those of the parameter.
    fn values<'t>(&self, all: &'t [Tensor], prefix: &str, parameter: &ParameterSpec) -> Outcome<&'t [f32]> {
        let name = format!("{prefix}/{}", parameter.name);
        let found = find(all, &name).filter(|tensor| tensor.data.len() == parameter.len());
        Ok(&found.ok_or_else(|| self.mismatch(format!("{name} is missing")))?.data)
    }

    /// Checks that a step left the frozen parameters unchanged, bit for bit.
    fn check_frozen(&self, before: &[Tensor], after: &[Tensor], step: i32) -> Outcome<()> {
        for spec in self.case().shape.parameter_specs().iter().filter(|spec| !spec.is_trained()) {
            let name = format!("param/{}", spec.name);
            let (before, after) = (find(before, &name), find(after, &name));
            if before.is_none() || before.map(|t| &t.data) != after.map(|t| &t.data) {
                return Err(self.mismatch(format!("{name} is frozen, and step {step} changed it")));
            }
        }
        Ok(())
    }

    /// Compares the parameters and moments after step number `step` with those of the reference.
    pub(super) fn compare_update(
        &self,
        fixture: &Fixture,
        before: &[Tensor],
        results: &[Tensor],
        after: &[Tensor],
        step: i32,
    ) -> Outcome<f64> {
        let mut worst = 0.0_f64;
        self.check_frozen(before, after, step)?;
        let shape = self.case().shape;
        let specs: Vec<ParameterSpec> =
            shape.parameter_specs().into_iter().filter(ParameterSpec::is_trained).collect();
        let same_layer = |a: &ParameterSpec, b: &ParameterSpec| layer_name(&a.name) == layer_name(&b.name);
        let fixed = self.case().workload == Workload::OptimizerStep;
        let mut fixed_gradients = if fixed { fixture.gradients().iter() } else { [].iter() };
        let chosen = choose_matrices(shape, &specs);
        for layer in specs.chunk_by(same_layer) {
            let mut updates = Vec::new();
            for spec in layer {
                let gradient = if fixed {
                    &fixed_gradients.next().expect("a gradient for each trained parameter").data[..]
                } else {
                    self.values(results, "grad", spec)?
                };
                let of_step = Step { spec, gradient, before, after };
                if shape.uses_muon_for(spec) {
                    let is_chosen = chosen.contains(&spec.name);
                    worst = worst.max(self.compare_matrix(fixture, &of_step, step, is_chosen)?);
                    continue;
                }
                let before = |prefix| self.values(before, prefix, spec);
                let state = [before("param")?, before("moment1")?, before("moment2")?];
                updates.push(Update { name: &spec.name, state, gradient });
            }
            let expected = expected_update(&fixture.adamw, &updates, step, self.case().optimizer_precision());
            worst =
                worst.max(self.compare(&expected, after, &format!(" after the update of step {step}"))?);
        }
        Ok(worst)
    }

    /// Compares a matrix that Muon updates, and its moment. A matrix that is not chosen must have moved to finite values.
    fn compare_matrix(
        &self,
        fixture: &Fixture,
        of_step: &Step<'_>,
        step: i32,
        is_chosen: bool,
    ) -> Outcome<f64> {
        let Step { spec, gradient, before, after } = *of_step;
        let values = |prefix| self.values(before, prefix, spec);
        let update = MatrixUpdate {
            name: &spec.name,
            dims: [spec.dims[0], spec.dims[1]],
            state: [values("param")?, values("moment1")?],
            gradient,
        };
        let precision = self.case().optimizer_precision();
        let text = format!(" after the update of step {step}");
        let moved = self.values(after, "param", spec)?;
        if is_chosen {
            let data = self.values(after, "moment1", spec)?.to_vec();
            let moment = Tensor { name: format!("moment1/{}", spec.name), dims: spec.dims.clone(), data };
            let results = [update.change(&fixture.muon, moved), moment];
            return self.compare(&update.expected(&fixture.muon, precision), &results, &text);
        }
        if moved == update.state[0] || moved.iter().any(|v| !v.is_finite()) {
            let name = &spec.name;
            return Err(self.mismatch(format!("param/{name} did not move, or is not finite,{text}")));
        }
        self.compare(&[update.expected_moment(&fixture.muon, precision)], after, &text)
    }
}

/// Returns the names of the matrices whose orthogonalization is checked in a step: all, or if that takes too long, one of
/// each size and others up to the limit. They are random, so that no fault can spare them.
fn choose_matrices(shape: Shape, specs: &[ParameterSpec]) -> HashSet<String> {
    let mut waiting: Vec<&ParameterSpec> = specs.iter().filter(|spec| shape.uses_muon_for(spec)).collect();
    let mut shuffled = Vec::new();
    while !waiting.is_empty() {
        shuffled.push(waiting.swap_remove(random_below(waiting.len())));
    }
    let mut sizes = HashSet::new();
    let (firsts, others): (Vec<_>, Vec<_>) = shuffled.into_iter().partition(|spec| sizes.insert(&spec.dims));
    let mut left = MAX_FLOPS;
    let mut chosen = HashSet::new();
    for (spec, is_first) in firsts.iter().map(|spec| (spec, true)).chain(others.iter().map(|s| (s, false))) {
        let flops = cost::orthogonalization_flops(spec.dims[0], spec.dims[1]);
        if is_first || flops <= left {
            left = left.saturating_sub(flops);
            chosen.insert(spec.name.clone());
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::Case;

    fn chosen(id: &str) -> HashSet<String> {
        let shape = id.parse::<Case>().unwrap().shape;
        choose_matrices(shape, &shape.parameter_specs())
    }

    #[test]
    fn a_large_model_is_checked_in_random_matrices_of_each_size() {
        assert_eq!(chosen("train-step/torch-cpu/f32/indicator-b16-muon").len(), 36);
        assert!(chosen("train-step/torch-cpu/f32/indicator-b16").is_empty());
        let of_gpt2 = || chosen("train-step/torch-cpu/f32/gpt2-b8-t1024-muon");
        let first = of_gpt2();
        for part in [".q.", ".up.", ".down."] {
            let square = ["q", "k", "v", "o"].map(|name| format!(".{name}."));
            let found = first.iter().any(|name| {
                name.contains(part) || part == ".q." && square.iter().any(|part| name.contains(part))
            });
            assert!(found, "{part}: {first:?}");
        }
        assert!((3..9).contains(&first.len()), "{first:?}");
        assert!((0..20).any(|_| of_gpt2() != first));
    }
}
