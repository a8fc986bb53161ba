//! The check of dropout by its noise, in a model with the number of tokens that is timed. No gradient shows single
//! masks there.
//!
//! All samples of the batch are equal, and all heads of a layer. Two steps then differ only by their masks. The
//! variance of a mean over B samples is 1/B of the variance of one sample, which the reference computes with random
//! masks. Masks that samples, heads or queries share multiply the variance. Without dropout, it vanishes.

use anyhow::{Context, Result};

use super::probe::probability;
use crate::backend::LoadedCase;
use crate::fixture::Fixture;
use crate::model::{Dropout, Model, ModelId};
use crate::parity::Mismatch;
use crate::reference::test_data::hash;
use crate::reference::{self, Rounding, Site};
use crate::statistics::median;
use crate::suite::{Case, Device, Precision, Shape};

/// Dropout probability of the checked site. The noise is then larger than the rounding errors of bf16.
const PROBABILITY: f64 = 0.5;
/// The batch, unless the case is a package of one batch. Masks that all samples share make the variance 4 times as
/// large.
const BATCH: usize = 4;
/// Number of steps, and number of steps of the reference. The ratio of the variances was measured from 0.8 to 1.4 over
/// all precisions and variants on two cores.
const STEPS: usize = 6;
const REFERENCE_STEPS: usize = 6;
/// The ratio of the variances may be at most this number, and at least its inverse.
const MAX_RATIO: f64 = 2.0;
/// A ratio beyond the limits by chance is not beyond them in each of these attempts.
const ATTEMPTS: usize = 3;
/// Standard deviation of the attention scores. About 12 of 111 keys then determine a query's result, and the dropout of
/// a weight has a large effect.
const SCORE_DEVIATION: f32 = 1.5;

/// The variances of the gradients of one sample, for each probe of the last model.
#[derive(Default)]
pub struct NoiseReference(Vec<(ModelId, Dropout, Variances)>);

/// The variance of each gradient, with its name.
type Variances = Vec<(String, f64)>;

/// A model in which dropout acts at one kind of site.
pub struct NoiseProbe {
    case: Case,
    model: ModelId,
    dropout: Dropout,
    site: &'static str,
}

/// The steps that a variance is computed from.
#[derive(Default)]
struct Steps {
    count: usize,
    first: Vec<(String, Vec<f32>)>,
    /// Sums over the later steps of the differences to the first step, and of their squares.
    sums: Vec<(Vec<f64>, f64)>,
}

impl Steps {
    fn add(&mut self, gradients: impl Iterator<Item = (String, Vec<f32>)>) {
        self.count += 1;
        if self.count == 1 {
            self.first = gradients.collect();
            self.sums = self.first.iter().map(|(_, data)| (vec![0.0; data.len()], 0.0)).collect();
            return;
        }
        for (((_, first), (sum, square)), (_, data)) in self.first.iter().zip(&mut self.sums).zip(gradients) {
            for ((sum, first), value) in sum.iter_mut().zip(first).zip(data) {
                let difference = f64::from(value - first);
                *sum += difference;
                *square += difference * difference;
            }
        }
    }

    fn variances(self) -> Variances {
        let count = self.count as f64;
        let variance = |(sum, square): (Vec<f64>, f64)| {
            (square - sum.iter().map(|v| v * v).sum::<f64>() / count) / (count - 1.0)
        };
        self.first.into_iter().zip(self.sums).map(|((name, _), sums)| (name, variance(sums))).collect()
    }
}

impl NoiseProbe {
    /// Returns the probes of a case. A precompiled case is probed at its own batch and at each kind of site, because probes
    /// at other shapes would be other packages. Another case is only probed in its attention weights, unless its model has
    /// adapters.
    pub fn all(case: Case, is_precompiled: bool) -> Vec<Self> {
        let Shape::Model { model, ranks, .. } = case.shape else { return Vec::new() };
        if is_precompiled && ranks > 1 {
            return Vec::new();
        }
        // Masks that micro-batches share have the effect of masks that samples share.
        let micro_batches = if case.shape.micro_batches() > 1 { BATCH } else { 1 };
        let probed = Shape::for_model(model, BATCH).with_micro_batches(micro_batches);
        let shape = if is_precompiled { case.shape } else { probed };
        let case = Case { shape, ..case };
        let d = case.dropout();
        let changed = |p: f64| if p > 0.0 { PROBABILITY } else { 0.0 };
        let mut weights = changed(d.weights);
        if is_precompiled && case.backend.device() == Device::NvidiaGpu {
            // It is a constant of the package.
            weights = d.weights;
        }
        let sites = [
            ("the attention weights", Dropout { weights, ..Dropout::NONE }),
            ("the residual", Dropout { residual: changed(d.residual), ..Dropout::NONE }),
            ("the hidden units", Dropout { hidden: changed(d.hidden), ..Dropout::NONE }),
            ("the output heads", Dropout { heads: changed(d.heads), ..Dropout::NONE }),
            ("the embedding", Dropout { embedding: changed(d.embedding), ..Dropout::NONE }),
        ];
        // No other probe has adapters.
        let count = if is_precompiled || case.has_adapters() { sites.len() } else { 1 };
        let probes = sites.into_iter().take(count).filter(|(_, dropout)| dropout.any());
        probes.map(|(site, dropout)| Self { case, model, dropout, site }).collect()
    }

    /// Returns the fixture of the probe. Its learning rate is 0, so the parameters do not change.
    pub fn fixture(&self) -> Fixture {
        let mut fixture = Fixture::new(self.case).with_equal_samples();
        fixture.stop_updates();
        fixture.dropout = self.dropout;
        fixture.spread_scores(SCORE_DEVIATION);
        make_heads_equal(&mut fixture, &self.model);
        fixture
    }

    /// Returns the variances of one sample.
    fn expected<'a>(&self, reference: &'a mut NoiseReference, fixture: &Fixture) -> &'a Variances {
        reference.0.retain(|(model, ..)| *model == self.model);
        let known = reference.0.iter().position(|(_, dropout, _)| *dropout == self.dropout);
        let index = known.unwrap_or_else(|| {
            let mut steps = Steps::default();
            for step in 0..REFERENCE_STEPS {
                let masks = random_masks(self.dropout, step);
                let results = reference::compute::<f32>(fixture, Rounding::NONE, Some(&masks));
                let gradients = results.into_iter().filter(|values| values.name.starts_with("grad/"));
                steps.add(gradients.map(|values| (values.name, values.data)));
            }
            reference.0.push((self.model, self.dropout, steps.variances()));
            reference.0.len() - 1
        });
        &reference.0[index].2
    }

    /// Checks the dropout of a case that a backend has loaded for the fixture.
    ///
    /// # Errors
    /// Returns an error if the backend fails.
    pub fn check(
        &self,
        loaded: &mut dyn LoadedCase,
        reference: &mut NoiseReference,
        fixture: &Fixture,
    ) -> Result<Option<Mismatch>> {
        let case = self.case;
        let expected = self.expected(reference, fixture);
        let mut wrong = None;
        for _ in 0..ATTEMPTS {
            let mut steps = Steps::default();
            for _ in 0..STEPS {
                loaded.step().with_context(|| format!("a step of {case} failed"))?;
                let results = loaded.outputs();
                let results = results.with_context(|| format!("the results of {case} could not be read"))?;
                let gradients = results.into_iter().filter(|tensor| tensor.name.starts_with("grad/"));
                steps.add(gradients.map(|tensor| (tensor.name, tensor.data)));
            }
            wrong = self.wrong_ratio(expected, &steps.variances());
            if wrong.is_none() {
                break;
            }
        }
        Ok(wrong.map(|ratio| {
            let site = self.site;
            let reason = "as independent masks cause, because some are missing or shared";
            Mismatch::new(
                case,
                format!("dropout of {site} causes {ratio:.2} times the variance of gradients {reason}"),
            )
        }))
    }

    /// Returns the ratio of the variances if it is beyond the limits.
    fn wrong_ratio(&self, expected: &Variances, found: &Variances) -> Option<f64> {
        let batch = self.case.shape.batch() as f64;
        let ratios = |of: &str| -> Vec<f64> {
            let pairs = expected
                .iter()
                .zip(found)
                .filter(|((name, expected), _)| name.contains(of) && *expected > 0.0);
            pairs.map(|((_, expected), (_, found))| found * batch / expected).collect()
        };
        // An output head has its own masks, whose effect the gradient of its last weight shows, if it is trained.
        let of_heads = self.dropout.heads > 0.0 && !self.case.has_adapters();
        let groups: &[&str] =
            if of_heads { &["selection.out.weight", "allocation.out.weight"] } else { &[""] };
        // The median leaves out gradients that vanish but for rounding.
        let medians = groups.iter().map(|group| median(&ratios(group)));
        let max = if self.hides_shared_masks() { f64::INFINITY } else { MAX_RATIO };
        medians.into_iter().find(|ratio| !(1.0 / MAX_RATIO..=max).contains(ratio))
    }

    /// Returns true if rounding errors are larger than the noise of independent masks: at the small probability that a
    /// package of CUDA has for the attention weights.
    fn hides_shared_masks(&self) -> bool {
        let is_precise = matches!(self.case.method.precision, Precision::F32 | Precision::Tf32);
        self.dropout.weights > 0.0 && self.dropout.weights < PROBABILITY && !is_precise
    }
}

/// Replaces the parameters of all heads by those of the first.
fn make_heads_equal(fixture: &mut Fixture, model: &Model) {
    let each = model.head_width;
    for layer in 0..model.layers {
        for part in ["q", "k", "v"] {
            let rank = model.lora.map_or(0, |lora| lora.rank);
            for (kind, row) in [("weight", model.width), ("bias", 1), ("lora-b", rank)] {
                let name = format!("blocks.{layer}.attention.{part}.{kind}");
                if fixture.has_parameter(&name) {
                    fixture.edit_parameter(&name, |data| repeat_first(data, each * row));
                }
            }
        }
        for kind in ["weight", "lora-a"] {
            let name = format!("blocks.{layer}.attention.o.{kind}");
            if fixture.has_parameter(&name) {
                fixture.edit_parameter(&name, |data| {
                    data.chunks_mut(model.heads * each).for_each(|row| repeat_first(row, each));
                });
            }
        }
    }
}

/// Replaces all parts of a length by the first one.
fn repeat_first(data: &mut [f32], length: usize) {
    for at in length..data.len() {
        data[at] = data[at - length];
    }
}

/// Returns random masks of a step of the reference.
fn random_masks(
    dropout: Dropout,
    step: usize,
) -> impl Fn(usize, Site, [usize; 2]) -> Option<Vec<f64>> + Sync {
    move |_, site, [rows, columns]| {
        let p = probability(&dropout, site);
        let seed = format!("{step} {site:?}").bytes().fold(0, |seed, byte| hash(seed, u64::from(byte)));
        let unit = |i| (hash(seed, i) >> 11) as f64 / (1u64 << 53) as f64;
        let factor = |i| if unit(i) < p { 0.0 } else { 1.0 / (1.0 - p) };
        (p > 0.0).then(|| (0..(rows * columns) as u64).map(factor).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variance_is_that_of_the_steps() {
        let mut steps = Steps::default();
        for values in [[1.0, 2.0], [3.0, 2.0], [5.0, 2.0]] {
            steps.add([("grad/a".to_owned(), values.to_vec())].into_iter());
        }
        assert_eq!(steps.variances(), [("grad/a".to_owned(), 4.0)]);
    }

    #[test]
    fn masks_drop_with_their_probability_and_differ_between_steps() {
        let masks = |step| {
            random_masks(Dropout::everywhere(0.25), step)(0, Site::Hidden { layer: 1 }, [40, 100]).unwrap()
        };
        let dropped = masks(0).iter().filter(|factor| **factor == 0.0).count();
        assert!((850..1150).contains(&dropped), "{dropped}");
        assert_ne!(masks(0), masks(1));
    }

    #[test]
    fn a_package_is_probed_at_its_own_batch_and_at_each_site() {
        let probes = |id: &str, precompiled| NoiseProbe::all(id.parse().unwrap(), precompiled);
        let compiled = probes("train-step/torch-cpu/f32-compile/indicator-b16", true);
        assert_eq!(compiled.len(), 4);
        assert!(compiled.iter().all(|probe| probe.case.shape.batch() == 16));
        let eager = probes("train-step/torch-cpu/f32/indicator-b16-dp2", false);
        assert_eq!(
            (eager.len(), eager[0].case.shape.batch(), eager[0].site),
            (1, 4, "the attention weights")
        );
        assert!(probes("train-step/torch-cpu/f32/gpt2-b8-t1024", false).is_empty());
    }
}
