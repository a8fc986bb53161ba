//! The model that the user gave: TRANSFORMER_BENCH_MODEL names its file, _BATCH and _TOKENS its sizes.
//! In this process it stands in the place of the suite's own.

use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, ensure};

use super::{BackendId, Case, Method, Precision, Shape, Workload, cost};
use crate::model::{Model, ModelId, config};

pub const MODEL_VARIABLE: &str = "TRANSFORMER_BENCH_MODEL";
pub const BATCH_VARIABLE: &str = "TRANSFORMER_BENCH_BATCH";
pub const TOKENS_VARIABLE: &str = "TRANSFORMER_BENCH_TOKENS";

/// A model and its batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CustomModel {
    pub model: ModelId,
    pub batch: usize,
}

impl CustomModel {
    pub fn shape(self) -> Shape {
        Shape::of_model(self.model, self.batch)
    }
}

/// What a machine can do, about: the sizes that are taken where the user names none follow from it.
#[derive(Clone, Copy, Debug)]
pub struct MachineCapacity {
    /// Of a training step in f32.
    pub flops_per_s: f64,
    /// Of the device that computes.
    pub memory: u64,
}

/// Tokens of a sample where the user names none, at most: longer ones take a CPU minutes.
const DEFAULT_MAX_TOKENS: usize = 1024;
/// A training step should be over by then, so that ten samples of it fit.
const TARGET_STEP_SECONDS: f64 = 2.0;
/// Of the memory.
const MAX_MEMORY_SHARE: f64 = 0.5;
/// Largest batch that is taken unasked, and that can be asked for.
const DEFAULT_MAX_BATCH: usize = 256;
pub const MAX_BATCH: usize = 1 << 16;

static CUSTOM_MODEL: OnceLock<CustomModel> = OnceLock::new();

/// The model that this process measures, where one was given.
pub fn custom_model() -> Option<CustomModel> {
    CUSTOM_MODEL.get().copied()
}

/// Reads what the environment names, and takes it for this process and those that it starts: to be
/// called before another thread runs. Returns what a user should know:
/// the file's notes, and what was taken and why.
///
/// # Errors
/// Where the file, a size or the model's need of memory is wrong.
pub fn from_environment(reach: impl FnOnce() -> MachineCapacity) -> Result<Vec<String>> {
    let variable = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
    let size = |name: &str| -> Result<Option<usize>> {
        let Some(text) = variable(name) else { return Ok(None) };
        let size = text.parse().ok().filter(|n| (1..=MAX_BATCH).contains(n));
        Ok(Some(size.with_context(|| format!("{name}={text}: a whole number from 1 to {MAX_BATCH}"))?))
    };
    let (tokens, batch) = (size(TOKENS_VARIABLE)?, size(BATCH_VARIABLE)?);
    let Some(path) = variable(MODEL_VARIABLE) else {
        ensure!(
            tokens.is_none() && batch.is_none(),
            "{TOKENS_VARIABLE} and {BATCH_VARIABLE} go with {MODEL_VARIABLE}"
        );
        return Ok(Vec::new());
    };
    let read = config::read(Path::new(&path))?;
    let model = ModelId::register(read.model).map_err(|text| anyhow!(text)).map(|()| read.model)?;
    let (given, why) = choose_sizes(model, tokens, batch, reach)?;
    CUSTOM_MODEL.get_or_init(|| given);
    // What was chosen once holds for the workers too.
    // SAFETY: no other thread runs yet.
    unsafe {
        std::env::set_var(BATCH_VARIABLE, given.batch.to_string());
        if model.is_language_model() {
            std::env::set_var(TOKENS_VARIABLE, given.model.tokens.to_string());
        }
    }
    Ok(read.notes.into_iter().chain([why]).collect())
}

/// The sizes at which a model is measured, and the reason in a line.
fn choose_sizes(
    model: Model,
    tokens: Option<usize>,
    batch: Option<usize>,
    reach: impl FnOnce() -> MachineCapacity,
) -> Result<(CustomModel, String)> {
    let name = model.name;
    if let Some(tokens) = tokens {
        ensure!(
            model.is_language_model(),
            "--tokens: the samples of {name} have {} tokens, always",
            model.tokens
        );
        ensure!(
            tokens <= model.tokens,
            "--tokens {tokens}: {name} takes at most {} (its context, or a window that is not built)",
            model.tokens
        );
    }
    let most = if model.is_language_model() { DEFAULT_MAX_TOKENS.min(model.tokens) } else { model.tokens };
    let own = tokens.unwrap_or(most);
    let id = ModelId::intern(Model { tokens: own, ..model });
    let at = |batch| CustomModel { model: id, batch };
    let parameters = crate::model::parameters::parameter_count(at(1).shape()) as f64 / 1e6;
    let said = |given: CustomModel, why: String| {
        let shape = given.shape();
        Ok((given, format!("{name}: {parameters:.1} M parameters, measured as {shape}, {why}")))
    };
    if let Some(batch) = batch {
        return said(at(batch), "as asked".to_owned());
    }
    let reach = reach();
    let step = |batch| Case {
        workload: Workload::TrainStep,
        backend: BackendId::TorchCpu,
        method: Method::eager(Precision::F32),
        shape: at(batch).shape(),
    };
    let seconds = |batch| cost::flops(&step(batch)) as f64 / reach.flops_per_s;
    let memory = |batch| cost::memory_estimate(&step(batch)) as f64;
    let gb = |bytes: f64| format!("{:.1} GB", bytes / 1e9);
    ensure!(
        memory(1) < reach.memory as f64,
        "{name} needs about {} for a training step of one sample of {own} tokens, and {} is there: \
         give --tokens, or a smaller model",
        gb(memory(1)),
        gb(reach.memory as f64)
    );
    let fits = |batch: &usize| {
        seconds(*batch) <= TARGET_STEP_SECONDS && memory(*batch) <= MAX_MEMORY_SHARE * reach.memory as f64
    };
    let batches = std::iter::successors(Some(1), |b| Some(2 * b)).take_while(|b| *b <= DEFAULT_MAX_BATCH);
    let batch_that_fits = batches.take_while(fits).last();
    let batch = batch_that_fits.unwrap_or(1);
    let estimate =
        format!("whose training step is estimated at {:.1} s and {}", seconds(batch), gb(memory(batch)));
    let rule = match batch_that_fits {
        Some(_) => format!(
            "the largest batch of a power of two under {TARGET_STEP_SECONDS} s and half of the memory"
        ),
        None => "the smallest there is (--tokens makes it shorter)".to_owned(),
    };
    said(at(batch), format!("{estimate}: {rule}; --batch and --tokens say otherwise"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::GPT2;

    fn model() -> Model {
        Model { name: "given", tokens: 4096, ..GPT2 }
    }

    fn reach(flops_per_s: f64, memory: u64) -> impl FnOnce() -> MachineCapacity {
        move || MachineCapacity { flops_per_s, memory }
    }

    #[test]
    fn what_fits_is_taken_and_said() {
        // GPT-2 at 1,024 tokens: 0.87 TFLOP a sample.
        let (given, why) = choose_sizes(model(), None, None, reach(2e12, 1 << 37)).unwrap();
        assert_eq!(given.shape().to_string(), "given-b4-t1024");
        assert!(why.contains("124.5 M parameters"), "{why}");
        let (given, why) = choose_sizes(model(), None, None, reach(1e10, 1 << 37)).unwrap();
        assert!(given.batch == 1 && why.contains("smallest"), "{why}");
        let (given, _) = choose_sizes(model(), Some(64), None, reach(1e11, 1 << 37)).unwrap();
        assert_eq!(given.shape().to_string(), "given-b4-t64");
        // Memory decides.
        let (given, _) = choose_sizes(model(), None, None, reach(1e15, 24 << 30)).unwrap();
        assert!((1..8).contains(&given.batch), "{given:?}");
        let (given, why) =
            choose_sizes(model(), Some(128), Some(3), || unreachable!("nothing is estimated")).unwrap();
        assert!(given.batch == 3 && why.contains("as asked"), "{why}");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refused = |tokens, memory| {
            format!("{:#}", choose_sizes(model(), tokens, None, reach(1e12, memory)).unwrap_err())
        };
        assert!(refused(Some(5000), 1 << 40).contains("at most 4096"));
        assert!(refused(None, 1 << 30).contains("needs about"));
    }
}
