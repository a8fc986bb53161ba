//! A user-supplied model (`TRANSFORMER_BENCH_MODEL`, `_BATCH`, `_TOKENS`, `_ACCUMULATE`, `_LORA`, `_OPTIMIZER`) that
//! replaces the built-in ones for this process.

use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, ensure};

use super::{BackendId, Case, MAX_BATCH, Method, Optimizer, Precision, Shape, Workload, cost};
use crate::model::config::{self, ParsedModel};
use crate::model::{Lora, Model, ModelId};
use crate::text::variable;

pub const MODEL_VARIABLE: &str = "TRANSFORMER_BENCH_MODEL";
pub const BATCH_VARIABLE: &str = "TRANSFORMER_BENCH_BATCH";
pub const TOKENS_VARIABLE: &str = "TRANSFORMER_BENCH_TOKENS";
pub const ACCUMULATE_VARIABLE: &str = "TRANSFORMER_BENCH_ACCUMULATE";
pub const LORA_VARIABLE: &str = "TRANSFORMER_BENCH_LORA";
pub const OPTIMIZER_VARIABLE: &str = "TRANSFORMER_BENCH_OPTIMIZER";

/// A model with its sizes.
#[derive(Clone, Debug, PartialEq)]
pub struct CustomModel {
    /// The model at the number of tokens of the headline, with its adapters if `--lora` asks for them.
    pub model: ModelId,
    pub batch: usize,
    /// Micro-batches of a training step (`--accumulate`).
    pub micro_batches: usize,
    /// Optimizer of a training step (`--optimizer`).
    pub optimizer: Optimizer,
    /// Other numbers of tokens of its training steps, with about as many tokens per step (`--tokens 512,1024`).
    pub other_lengths: Vec<usize>,
}

impl CustomModel {
    /// Returns a model at one number of tokens, trained with AdamW and without micro-batches.
    pub fn plain(model: ModelId, batch: usize) -> Self {
        Self { model, batch, micro_batches: 1, optimizer: Optimizer::Adamw, other_lengths: Vec::new() }
    }

    /// Returns the shape of the headline's training step.
    pub fn shape(&self) -> Shape {
        Shape::for_model(self.model, self.batch)
            .with_optimizer(self.optimizer)
            .with_micro_batches(self.micro_batches)
    }

    /// Returns the numbers of tokens, as `--tokens` takes them.
    pub fn lengths(&self) -> String {
        let lengths = std::iter::once(&self.model.tokens).chain(&self.other_lengths);
        lengths.map(usize::to_string).collect::<Vec<_>>().join(",")
    }

    /// Returns the shapes of the training steps, the headline's first.
    pub fn step_shapes(&self) -> Vec<Shape> {
        let other = |&tokens: &usize| {
            let model = ModelId::intern(Model { tokens, ..*self.model });
            let batch = batch_at(tokens, self.model.tokens * self.batch).next_multiple_of(self.micro_batches);
            Shape::for_model(model, batch)
                .with_optimizer(self.optimizer)
                .with_micro_batches(self.micro_batches)
        };
        std::iter::once(self.shape()).chain(self.other_lengths.iter().map(other)).collect()
    }
}

/// Returns the batch with about `step_tokens` tokens per step.
fn batch_at(tokens: usize, step_tokens: usize) -> usize {
    ((step_tokens as f64 / tokens as f64).round() as usize).max(1)
}

/// The approximate capacity of a machine, which determines the default sizes.
#[derive(Clone, Copy, Debug)]
pub struct MachineCapacity {
    /// FLOP/s of a training step in f32.
    pub flops_per_s: f64,
    /// Memory of the measured device in bytes.
    pub memory: u64,
}

/// Largest default number of tokens per sample. Longer samples take minutes on a CPU.
const DEFAULT_MAX_TOKENS: usize = 1024;
/// Longest training step of the default batch, so that ten samples fit into a measurement.
const TARGET_STEP_SECONDS: f64 = 2.0;
/// Largest share of the memory for the default batch.
const MAX_MEMORY_SHARE: f64 = 0.5;
const DEFAULT_MAX_BATCH: usize = 256;
static CUSTOM_MODEL: OnceLock<CustomModel> = OnceLock::new();

/// Returns the custom model of this process, if there is one.
pub fn custom_model() -> Option<CustomModel> {
    CUSTOM_MODEL.get().cloned()
}

/// The options of the environment next to the path of the model.
#[derive(PartialEq)]
struct Options {
    batch: Option<usize>,
    tokens: Vec<usize>,
    micro_batches: usize,
    lora: Option<Lora>,
    optimizer: Optimizer,
}

impl Options {
    const NONE: Self =
        Self { batch: None, tokens: Vec::new(), micro_batches: 1, lora: None, optimizer: Optimizer::Adamw };

    /// Reads the options from the environment.
    ///
    /// # Errors
    /// Returns an error if one is invalid, or if Muon should train adapters.
    fn read() -> Result<Self> {
        let mut options = Self::NONE;
        if let Some(text) = variable(BATCH_VARIABLE)? {
            options.batch = Some(parse_size(BATCH_VARIABLE, &text, MAX_BATCH)?);
        }
        if let Some(text) = variable(TOKENS_VARIABLE)? {
            let sizes = text.split(',').map(|text| parse_size(TOKENS_VARIABLE, text, config::MAX_SIZE));
            options.tokens = sizes.collect::<Result<_>>()?;
        }
        if let Some(text) = variable(ACCUMULATE_VARIABLE)? {
            options.micro_batches = parse_size(ACCUMULATE_VARIABLE, &text, MAX_BATCH)?;
        }
        if let Some(text) = variable(LORA_VARIABLE)? {
            options.lora = Some(text.parse().map_err(|reason| anyhow!("{LORA_VARIABLE}={reason}"))?);
        }
        if let Some(text) = variable(OPTIMIZER_VARIABLE)? {
            options.optimizer = text.parse().map_err(|reason| anyhow!("{OPTIMIZER_VARIABLE}: {reason}"))?;
        }
        ensure!(
            options.lora.is_none() || options.optimizer == Optimizer::Adamw,
            "--optimizer {}: adapters (--lora) are trained with AdamW",
            options.optimizer
        );
        Ok(options)
    }
}

/// Reads the custom model from the environment, for this process and the processes that it starts. Must be called
/// before another thread runs. Returns messages for the user: notes about the file, and the sizes with their
/// reason.
///
/// # Errors
/// Returns an error if the file or a size is invalid, or if the model does not fit into the memory.
pub fn from_environment(capacity: impl FnOnce() -> MachineCapacity) -> Result<Vec<String>> {
    let options = Options::read()?;
    let Some(path) = std::env::var_os(MODEL_VARIABLE).filter(|path| !path.is_empty()) else {
        ensure!(
            options == Options::NONE,
            "{TOKENS_VARIABLE}, {BATCH_VARIABLE}, {ACCUMULATE_VARIABLE}, {LORA_VARIABLE} and {OPTIMIZER_VARIABLE} \
             need {MODEL_VARIABLE}"
        );
        return Ok(Vec::new());
    };
    let ParsedModel { model, notes } = config::read(Path::new(&path))?;
    ModelId::register(model)?;
    let Options { batch, tokens, micro_batches, lora, optimizer } = options;
    let model = Model { lora, ..model };
    let (custom, message) = choose_lengths(model, &tokens, batch, capacity)?;
    let (custom, message) = accumulate(custom, message, micro_batches, batch.is_some())?;
    let (custom, message) = optimize(custom, message, optimizer);
    let custom = CUSTOM_MODEL.get_or_init(|| custom);
    // Workers use the same sizes.
    // SAFETY: no other thread runs yet.
    unsafe {
        std::env::set_var(BATCH_VARIABLE, custom.batch.to_string());
        std::env::set_var(ACCUMULATE_VARIABLE, custom.micro_batches.to_string());
        if model.is_language_model() {
            std::env::set_var(TOKENS_VARIABLE, custom.lengths());
        }
    }
    Ok(notes.into_iter().chain([message]).collect())
}

/// Sets the optimizer of the training steps.
fn optimize(custom: CustomModel, message: String, optimizer: Optimizer) -> (CustomModel, String) {
    let custom = CustomModel { optimizer, ..custom };
    let message = match optimizer {
        Optimizer::Adamw => message,
        Optimizer::Muon => {
            let shape = custom.shape();
            format!("{message}. Muon trains the matrices of its blocks, and AdamW the rest: {shape}")
        }
    };
    (custom, message)
}

/// Divides the batch into micro-batches. A batch that the user did not choose is first rounded up to a multiple of their
/// number.
fn accumulate(
    custom: CustomModel,
    message: String,
    micro_batches: usize,
    is_batch_requested: bool,
) -> Result<(CustomModel, String)> {
    if micro_batches == 1 {
        return Ok((custom, message));
    }
    let batch = if is_batch_requested { custom.batch } else { custom.batch.next_multiple_of(micro_batches) };
    ensure!(
        batch.is_multiple_of(micro_batches),
        "--accumulate {micro_batches}: it does not divide the batch of {batch}"
    );
    let custom = CustomModel { batch, micro_batches, ..custom };
    let shapes: Vec<String> = custom.step_shapes().iter().map(Shape::to_string).collect();
    let message = format!(
        "{message}. A training step adds up the gradients of {micro_batches} micro-batches: {}",
        shapes.join(", ")
    );
    Ok((custom, message))
}

fn parse_size(name: &str, text: &str, max: usize) -> Result<usize> {
    let size = text.parse().ok().filter(|n| (1..=max).contains(n));
    size.with_context(|| format!("{name}={text}: use a whole number from 1 to {max}"))
}

/// Returns the tokens per sample: those that the user asked for, or as many as the model takes, up to a limit.
fn choose_tokens(model: &Model, tokens: Option<usize>) -> Result<usize> {
    let (name, context) = (model.name, model.tokens);
    let Some(tokens) = tokens else {
        return Ok(if model.is_language_model() { DEFAULT_MAX_TOKENS.min(context) } else { context });
    };
    ensure!(model.is_language_model(), "--tokens: a sample of {name} always has {context} tokens");
    ensure!(tokens <= context, "--tokens {tokens}: {name} takes at most {context} (its context)");
    Ok(tokens)
}

/// Returns the number of parameters, and how many of them are trained if the model has adapters.
fn parameter_message(shape: Shape) -> String {
    let millions = |count: usize| format!("{:.1} M", count as f64 / 1e6);
    let all = millions(shape.parameter_count());
    match shape.model().and_then(|(model, _)| model.lora) {
        Some(lora) => {
            let trained = millions(shape.trained_count());
            format!("{all} parameters ({trained} of them trained, in adapters of rank {})", lora.rank)
        }
        None => format!("{all} parameters"),
    }
}

/// Returns what attention windows change at the model's number of tokens, for the message about its sizes.
fn window_message(model: &Model) -> String {
    match model.smallest_window() {
        Some(window) if window < model.tokens => format!(", with attention windows of {window} tokens"),
        Some(window) => format!(", with plain attention (the window of {window} tokens contains all)"),
        None => String::new(),
    }
}

/// Chooses the sizes for several numbers of tokens. The first one is that of the headline, and `batch` is its batch.
/// The longest one determines the default batch. Returns the sizes with a message that gives the reason.
fn choose_lengths(
    model: Model,
    lengths: &[usize],
    batch: Option<usize>,
    capacity: impl FnOnce() -> MachineCapacity,
) -> Result<(CustomModel, String)> {
    let (Some(&first), Some(&longest)) = (lengths.first(), lengths.iter().max()) else {
        return choose_sizes(model, None, batch, capacity);
    };
    for tokens in lengths {
        choose_tokens(&model, Some(*tokens))?;
    }
    let batch_of_longest = batch.map(|batch| batch_at(longest, first * batch));
    let (at_longest, message) = choose_sizes(model, Some(longest), batch_of_longest, capacity)?;
    let mut other_lengths = Vec::new();
    for &tokens in lengths {
        if tokens != first && !other_lengths.contains(&tokens) {
            other_lengths.push(tokens);
        }
    }
    if other_lengths.is_empty() {
        return Ok((at_longest, message));
    }
    let batch = batch.unwrap_or_else(|| batch_at(first, longest * at_longest.batch)).min(MAX_BATCH);
    let model = ModelId::intern(Model { tokens: first, ..model });
    let custom = CustomModel { other_lengths, ..CustomModel::plain(model, batch) };
    let shapes: Vec<String> = custom.step_shapes().iter().map(Shape::to_string).collect();
    Ok((custom, format!("{message}. Training steps: {}", shapes.join(", "))))
}

/// Chooses the sizes at which a model is measured. Returns them with a message that gives the reason.
fn choose_sizes(
    model: Model,
    tokens: Option<usize>,
    batch: Option<usize>,
    capacity: impl FnOnce() -> MachineCapacity,
) -> Result<(CustomModel, String)> {
    let name = model.name;
    let tokens = choose_tokens(&model, tokens)?;
    let id = ModelId::intern(Model { tokens, ..model });
    let step = |batch| Case {
        workload: Workload::TrainStep,
        backend: BackendId::TorchCpu,
        method: Method::eager(Precision::F32),
        shape: Shape::for_model(id, batch),
    };
    let smallest = batch.unwrap_or(1);
    ensure!(
        cost::is_computable(&step(smallest)),
        "{name} is too large: a training step of batch {smallest} has over 2^64 FLOPs or bytes"
    );
    let with_batch = |batch| CustomModel::plain(id, batch);
    let parameters = parameter_message(with_batch(1).shape());
    let window = window_message(&id);
    let message = |batch, reason: String| {
        let custom = with_batch(batch);
        let shape = custom.shape();
        Ok((custom, format!("{name}: {parameters}, measured as {shape}{window}, {reason}")))
    };
    if let Some(batch) = batch {
        return message(batch, "as requested".to_owned());
    }
    let capacity = capacity();
    let seconds = |batch| cost::flops(&step(batch)) as f64 / capacity.flops_per_s;
    let memory = |batch| cost::memory_estimate(&step(batch)) as f64;
    let gb = |bytes: f64| format!("{:.1} GB", bytes / 1e9);
    ensure!(
        memory(1) < capacity.memory as f64,
        "{name} needs about {} for a training step of one sample of {tokens} tokens, and the device has {}: \
         set --tokens, or use a smaller model",
        gb(memory(1)),
        gb(capacity.memory as f64)
    );
    let fits = |batch: &usize| {
        seconds(*batch) <= TARGET_STEP_SECONDS && memory(*batch) <= MAX_MEMORY_SHARE * capacity.memory as f64
    };
    let powers = std::iter::successors(Some(1), |b| Some(2 * b)).take_while(|b| *b <= DEFAULT_MAX_BATCH);
    let (batch, rule) = match powers.take_while(fits).last() {
        Some(batch) => {
            let limits = format!("{TARGET_STEP_SECONDS} s and half of the memory");
            (batch, format!("the largest power of two within {limits}"))
        }
        None => (1, "the smallest batch (--tokens shortens the step)".to_owned()),
    };
    let estimate =
        format!("estimated at {:.1} s and {} per training step", seconds(batch), gb(memory(batch)));
    message(batch, format!("{estimate}: {rule}; --batch and --tokens change it"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::GPT2;

    fn model() -> Model {
        Model { name: "custom", tokens: 4096, ..GPT2 }
    }

    fn capacity(flops_per_s: f64, memory: u64) -> impl FnOnce() -> MachineCapacity {
        move || MachineCapacity { flops_per_s, memory }
    }

    #[test]
    fn default_sizes_fit_the_machine_and_are_explained() {
        // GPT-2 at 1,024 tokens takes 0.87 TFLOP per sample.
        let (custom, message) = choose_sizes(model(), None, None, capacity(2e12, 1 << 37)).unwrap();
        assert_eq!(custom.shape().to_string(), "custom-b4-t1024");
        assert!(message.contains("124.5 M parameters"), "{message}");
        let (custom, message) = choose_sizes(model(), None, None, capacity(1e10, 1 << 37)).unwrap();
        assert!(custom.batch == 1 && message.contains("smallest"), "{message}");
        let (custom, _) = choose_sizes(model(), Some(64), None, capacity(1e11, 1 << 37)).unwrap();
        assert_eq!(custom.shape().to_string(), "custom-b4-t64");
        // The memory limits the batch.
        let (custom, _) = choose_sizes(model(), None, None, capacity(1e15, 24 << 30)).unwrap();
        assert!((1..8).contains(&custom.batch), "{custom:?}");
        let (custom, message) =
            choose_sizes(model(), Some(128), Some(3), || unreachable!("nothing is estimated")).unwrap();
        assert!(custom.batch == 3 && message.contains("as requested"), "{message}");
    }

    #[test]
    fn several_lengths_have_about_the_same_tokens_per_step() {
        let ids = |lengths: &[usize], batch| -> Vec<String> {
            let capacity = capacity(1e12, 1 << 37);
            let (custom, _) = choose_lengths(model(), lengths, batch, capacity).unwrap();
            custom.step_shapes().iter().map(Shape::to_string).collect()
        };
        assert_eq!(ids(&[512, 1024, 512], Some(8)), ["custom-b8-t512", "custom-b4-t1024"]);
        assert_eq!(ids(&[4096, 1000], Some(1)), ["custom-b1-t4096", "custom-b4-t1000"]);
        // At 1,024 tokens, two samples take less than two seconds.
        assert_eq!(ids(&[256, 1024], None), ["custom-b8-t256", "custom-b2-t1024"]);
        assert_eq!(ids(&[256], Some(2)), ["custom-b2-t256"]);
        let error = choose_lengths(model(), &[512, 5000], None, || unreachable!()).unwrap_err();
        assert!(error.to_string().contains("at most 4096"), "{error}");
    }

    #[test]
    fn adapters_are_a_part_of_the_shape_and_of_the_message() {
        let adapted = Model { lora: Some("16:qv".parse().unwrap()), ..model() };
        let (custom, message) = choose_sizes(adapted, Some(128), Some(8), || unreachable!()).unwrap();
        assert_eq!(custom.shape().to_string(), "custom-b8-t128-lora16qv");
        assert!(message.contains("(0.6 M of them trained, in adapters of rank 16)"), "{message}");
        // The state of the optimizer is small, so more samples fit into the memory.
        let batch = |model| choose_sizes(model, None, None, capacity(1e15, 24 << 30)).unwrap().0.batch;
        assert!(batch(adapted) >= batch(model()));
    }

    #[test]
    fn micro_batches_divide_the_batch() {
        let sized = |batch, micro_batches, is_requested| {
            let custom = choose_sizes(model(), Some(128), Some(batch), || unreachable!()).unwrap().0;
            accumulate(custom, String::new(), micro_batches, is_requested)
        };
        let (custom, message) = sized(8, 4, true).unwrap();
        assert_eq!(custom.shape().to_string(), "custom-b8-t128-a4");
        assert!(message.contains("4 micro-batches: custom-b8-t128-a4"), "{message}");
        assert_eq!(sized(2, 4, false).unwrap().0.shape().to_string(), "custom-b4-t128-a4");
        assert!(sized(6, 4, true).unwrap_err().to_string().contains("does not divide the batch of 6"));
        let longer = CustomModel { other_lengths: vec![512], ..sized(16, 8, true).unwrap().0 };
        let shapes: Vec<String> = longer.step_shapes().iter().map(Shape::to_string).collect();
        assert_eq!(shapes, ["custom-b16-t128-a8", "custom-b8-t512-a8"]);
    }

    #[test]
    fn the_optimizer_is_a_part_of_the_shape_of_training_steps() {
        let custom = choose_sizes(model(), Some(128), Some(8), || unreachable!()).unwrap().0;
        let (custom, message) = optimize(custom, String::new(), Optimizer::Muon);
        assert!(message.contains("AdamW the rest: custom-b8-t128-muon"), "{message}");
        let custom = CustomModel { other_lengths: vec![512], ..custom };
        let shapes: Vec<String> = custom.step_shapes().iter().map(Shape::to_string).collect();
        assert_eq!(shapes, ["custom-b8-t128-muon", "custom-b2-t512-muon"]);
    }

    #[test]
    fn the_message_says_whether_a_window_has_an_effect() {
        let windowed = Model { window: Some(64), ..model() };
        for (tokens, words) in [(64, "plain attention (the window of 64"), (65, "attention windows of 64")] {
            let (_, message) = choose_sizes(windowed, Some(tokens), Some(1), || unreachable!()).unwrap();
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let refused = |tokens, memory| {
            format!("{:#}", choose_sizes(model(), tokens, None, capacity(1e12, memory)).unwrap_err())
        };
        assert!(refused(Some(5000), 1 << 40).contains("at most 4096"));
        assert!(refused(None, 1 << 30).contains("needs about"));
        let largest = Model { tokens: 1 << 22, width: 1 << 22, layers: 2000, ffn_width: 1 << 22, ..model() };
        let error =
            choose_sizes(largest, Some(1 << 22), Some(65536), || unreachable!()).unwrap_err().to_string();
        assert!(error.contains("over 2^64"), "{error}");
    }
}
