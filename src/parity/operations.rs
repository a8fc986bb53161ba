//! The check of a single operation, before and after it is timed.

use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::tolerance::{Expected, expected_operation, norm};
use super::{compare_tensors, find};
use crate::backend::{Backend, LoadedOperation};
use crate::fixture::{OperationFixture, Tensor, fill_hidden};
use crate::model::{ModelId, OPTION_MODELS};
use crate::reference::{Accumulation, Rounding};
use crate::suite::operations::{
    Function, OperandRole, OperationPass, Pass, check_separable, operation_passes,
};
use crate::suite::{Case, Method, Precision, Shape, Variant, Workload};

/// Largest score of a token to which another does not attend. Both frameworks write -30,000 or less.
const HIDDEN_SCORE: f32 = -1e4;
/// Standard deviations by which the share of dropped values may differ from its probability. Of 10¹¹ checks, one fails by
/// chance.
const DROPOUT_DEVIATIONS: f64 = 6.8;
/// Rounding errors of dropout: of the factor, of the product, and of a mask in another type.
const DROPOUT_ROUNDINGS: f64 = 4.0;

/// A loaded operation, and its expected results.
pub struct CheckedOperation {
    pub loaded: Box<dyn LoadedOperation>,
    case: Case,
    fixture: OperationFixture,
    /// Empty for dropout, whose result follows from the mask.
    expected: Vec<Expected>,
    /// The result of the check that dropout must differ from.
    last_mask: Vec<f32>,
    /// Largest error / tolerance so far.
    pub share: f64,
}

impl CheckedOperation {
    /// Loads an operation of a training step, runs it once and compares its results with the reference.
    ///
    /// # Errors
    /// Returns an error if the backend fails or a result is wrong.
    pub fn load(backend: &dyn Backend, case: Case, part: OperationPass) -> Result<Self> {
        let fixture = || OperationFixture::new(case, part.clone());
        Self::load_as(backend, case, fixture(), &fixture())
    }

    /// Loads `backend_fixture`, and compares its results with the reference for `fixture`. They only differ in tests.
    ///
    /// # Errors
    /// Returns an error if the backend fails or a result is wrong.
    pub fn load_as(
        backend: &dyn Backend,
        case: Case,
        fixture: OperationFixture,
        backend_fixture: &OperationFixture,
    ) -> Result<Self> {
        let expected = match fixture.part.operation.function {
            Function::Dropout(_) => Vec::new(),
            _ => expected_operation(&fixture, backend.accumulation()),
        };
        backend.reset_peak_memory()?;
        let loaded = backend.load_operation(backend_fixture)?;
        let mut checked = Self { loaded, case, fixture, expected, last_mask: Vec::new(), share: 0.0 };
        checked.loaded.time(1)?;
        checked.check()?;
        // Later runs draw other masks, and all runs of a sample do their work.
        checked.loaded.time(2)?;
        checked.check()?;
        Ok(checked)
    }

    /// Compares the results of the last run with the reference.
    ///
    /// # Errors
    /// Returns an error if the backend fails or a result is wrong.
    pub fn check(&mut self) -> Result<()> {
        let mut results = self.loaded.outputs().context("the results could not be read")?;
        let part = &self.fixture.part;
        match part.operation.function {
            Function::Dropout(p) => {
                let mask = check_dropout(&self.fixture, p, &results)?;
                if mask == self.last_mask {
                    bail!("{part} draws the same mask again");
                }
                self.last_mask = mask;
            }
            Function::Scores => {
                let hide = |score: f32| if score < HIDDEN_SCORE { 0.0 } else { f32::INFINITY };
                let out = results.iter_mut().filter(|tensor| tensor.name == "out");
                out.for_each(|out| fill_hidden(part, &mut out.data, hide));
            }
            _ => {}
        }
        let compared = compare_tensors(self.case, &self.expected, &results);
        let share = compared.map_err(|wrong| anyhow::anyhow!("{part} is wrong: {}", wrong.reason))?;
        self.share = self.share.max(share);
        Ok(())
    }
}

/// Checks that dropout keeps the right share of the values, scales them, and drops the same gradients. Returns the factors.
fn check_dropout(fixture: &OperationFixture, p: f64, results: &[Tensor]) -> Result<Vec<f32>> {
    let part = &fixture.part;
    let read = |name: &str| find(results, name).with_context(|| format!("{part}: {name} is missing"));
    let (x, out) = (&fixture.operands[0].data, &read("out")?.data);
    let factor = |(x, out): (&f32, &f32)| if *out == 0.0 && *x != 0.0 { 0.0 } else { 1.0 / (1.0 - p) as f32 };
    let factors: Vec<f32> = x.iter().zip(out).map(factor).collect();
    let dropped = factors.iter().filter(|factor| **factor == 0.0).count() as f64;
    let count = factors.len() as f64;
    let deviation = (dropped - p * count) / (p * (1.0 - p) * count).sqrt();
    if deviation.abs() > DROPOUT_DEVIATIONS {
        bail!(
            "{part} is wrong: it drops {:.2} % of the values, not {:.2} %",
            100.0 * dropped / count,
            100.0 * p
        );
    }
    let rounding = Rounding::for_precision(fixture.step.case.method.precision, Accumulation::Wide);
    let unit = DROPOUT_ROUNDINGS * rounding.product.unit_roundoff();
    let mut checked = vec![("out", x)];
    if part.pass != Pass::Forward {
        checked.push(("grad/x", &fixture.upstream.data));
    }
    for (name, values) in checked {
        let values: Vec<f64> =
            values.iter().zip(&factors).map(|(&v, &f)| f64::from(v) * f64::from(f)).collect();
        let tolerance = unit * norm(values.iter().copied());
        let values = Arc::new(values);
        let expected = Expected { name: name.to_owned(), values, tolerance, scale_tolerance: None };
        let error = expected.error(results);
        if error.ratio() > 1.0 {
            bail!("{part} is wrong: {error}");
        }
    }
    Ok(factors)
}

/// Checks every operation of small models on a backend, and that a wrong operand of each is detected.
///
/// # Errors
/// Returns the first operation that is wrong, or whose fault is not detected.
pub fn operations_are_checked(backend: &dyn Backend) -> Result<()> {
    let presets = ["indicator", "gpt2"].map(|name| ModelId::named(name).expect("a preset").miniature());
    let models = presets.into_iter().chain(OPTION_MODELS.map(ModelId::intern));
    let methods = [Precision::F32, Precision::Bf16, Precision::Mixed].map(Method::eager);
    let fused = Method { precision: Precision::F32, variant: Variant::Sdpa };
    let (mut worst, mut count) = (0.0_f64, 0);
    for (model, method) in
        models.flat_map(|model| methods.into_iter().chain([fused]).map(move |m| (model, m)))
    {
        let shape = Shape::for_model(model, 2);
        let case = Case { workload: Workload::TrainStep, backend: backend.id(), method, shape };
        if backend.supports(&case).is_err() || check_separable(&case).is_err() {
            continue;
        }
        for part in operation_passes(&case) {
            let checked = CheckedOperation::load(backend, case, part.clone());
            worst = worst.max(checked.with_context(|| case.to_string())?.share);
            detects_faults(backend, case, &part).with_context(|| case.to_string())?;
            count += 1;
        }
    }
    println!("{}: error / tolerance of {count} operations at most {worst:.2}", backend.id());
    Ok(())
}

/// Checks that wrong operands are detected, and a wrong probability of dropout.
fn detects_faults(backend: &dyn Backend, case: Case, part: &OperationPass) -> Result<()> {
    let fixture = || OperationFixture::new(case, part.clone());
    for (index, operand) in part.operation.operands.iter().enumerate() {
        let mut wrong = fixture();
        match part.operation.function {
            Function::Dropout(p) => wrong.part.operation.function = Function::Dropout(0.5 * p),
            _ if operand.role == OperandRole::Input && wrong.operands[index].name != "x" => continue,
            _ => wrong.operands[index].data.iter_mut().step_by(2).for_each(|v| *v = -*v),
        }
        if CheckedOperation::load_as(backend, case, fixture(), &wrong).is_ok() {
            bail!("{part}: a wrong {} is not detected", operand.name);
        }
    }
    Ok(())
}
