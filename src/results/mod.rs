//! The record of a run: the result of each case, or the reason why it has none.
//!
//! The harness writes one file per process; [`run::merge`] joins them into `results.json`.

mod apple;
pub mod baseline;
pub mod energy;
pub mod first_step;
pub mod machine;
pub mod operations;
pub mod run;
pub mod upgrade;
pub mod validate;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer, Serialize};

use crate::backend::RankStats;
use crate::files::{self, lock_file, write_atomic};
use crate::installation;
use crate::interference;
use crate::model::{Model, ModelId, config};
use crate::statistics::{REPORT_CONFIDENCE, trimmed_half_width};
use crate::suite::{Case, CustomModel, HEADLINE_SHAPE, MAX_BATCH, Optimizer, Shape, custom_model};
use crate::text;
use energy::CaseEnergy;
use first_step::FirstSteps;
use machine::Machine;
use operations::Explanation;
pub use upgrade::VERSION;

pub use crate::text::one_line;

/// Outcome of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    Measured,
    Skipped,
    TooSlow,
    ParityFailed,
    Error,
}

/// Work per second at the median time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Throughput {
    pub value: f64,
    /// `samples/s`, `FLOP/s` or `B/s`
    pub unit: String,
}

/// One case of a run. Times are in nanoseconds per step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub id: String,
    pub workload: String,
    pub backend: String,
    pub precision: String,
    pub shape: String,
    pub status: Status,
    /// Reason why the case has no result; empty if it was measured.
    pub reason: String,
    pub median_ns: Option<f64>,
    /// 95 % confidence interval of the median: within this run, or between the processes of `process_ns`.
    pub ci_ns: Option<[f64; 2]>,
    pub samples: Option<u64>,
    pub throughput: Option<Throughput>,
    /// Peak of the framework's allocator in bytes, if it counts one.
    pub peak_bytes: Option<u64>,
    /// Peak resident set size (RSS) of the process in bytes, libraries included.
    pub rss_peak_bytes: Option<u64>,
    /// Page faults per step, the median over the samples.
    #[serde(default)]
    pub page_faults: Option<f64>,
    /// Estimated share of the median time that page faults take.
    #[serde(default)]
    pub page_fault_share: Option<f64>,
    /// Largest error over its tolerance among the tensors of the parity check.
    #[serde(default)]
    pub parity: Option<f64>,
    /// Share of time that runnable threads waited for a core.
    #[serde(default)]
    pub cpu_wait_share: Option<f64>,
    /// True if the processor was slowed down because of its temperature.
    #[serde(default)]
    pub throttled: bool,
    /// Share of the step in which an NVIDIA GPU was busy, if CUPTI recorded it.
    #[serde(default)]
    pub gpu_busy_share: Option<f64>,
    /// Step times of several fresh processes, of which `median_ns` is the median and `ci_ns` the range.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub process_ns: Vec<f64>,
    /// Statistics of the ranks, for a case on several devices.
    #[serde(default)]
    pub ranks: Option<RankStats>,
}

impl Record {
    /// Returns the record of a case without a result. The reason is shortened by [`one_line`].
    pub fn unmeasured(case: &Case, status: Status, reason: impl Into<String>) -> Self {
        Self {
            id: case.to_string(),
            workload: case.workload.to_string(),
            backend: case.backend.to_string(),
            precision: case.method.to_string(),
            shape: case.shape.to_string(),
            status,
            reason: one_line(&reason.into()),
            median_ns: None,
            ci_ns: None,
            samples: None,
            throughput: None,
            peak_bytes: None,
            rss_peak_bytes: None,
            page_faults: None,
            page_fault_share: None,
            parity: None,
            cpu_wait_share: None,
            throttled: false,
            gpu_busy_share: None,
            process_ns: Vec::new(),
            ranks: None,
        }
    }
}

impl Record {
    /// Returns true if other programs took the cores while the case was measured, so that its time should not
    /// be used.
    pub fn disturbed(&self) -> bool {
        self.cpu_wait_share.is_some_and(|share| share > interference::WAIT_THRESHOLD)
    }

    /// Returns the number of samples if it is below Criterion's minimum of ten. The interval is then the range
    /// of the samples.
    pub fn too_few_samples(&self) -> Option<u64> {
        self.samples.filter(|n| self.status == Status::Measured && *n < 10)
    }
}

/// Share of a step below which a GPU waits for the CPU to launch its kernels for most of the time.
pub const LAUNCH_BOUND_SHARE: f64 = 0.5;

/// Effect of environment variables on a case, measured interleaved by `scripts/compare --env`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EnvEffect {
    /// `NAME=VALUE`, several joined by spaces.
    pub variables: String,
    pub id: String,
    /// Median step times in nanoseconds.
    pub without_ns: f64,
    pub with_ns: f64,
    /// Time with the variables over time without, and its 95 % confidence interval between processes.
    pub ratio: f64,
    pub ratio_ci: [f64; 2],
    pub commit: String,
}

/// Two backends on the same case, measured interleaved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InterleavedResult {
    /// Ids of the two cases.
    pub base: String,
    pub head: String,
    /// Step times of both sides in nanoseconds, from the rounds of the ratio: `head_ns / base_ns` is `ratio`. `None` in
    /// files of version 2.
    #[serde(default)]
    pub base_ns: Option<f64>,
    #[serde(default)]
    pub head_ns: Option<f64>,
    /// Step time of head over step time of base, and its 95 % confidence interval between processes.
    pub ratio: f64,
    pub ratio_ci: [f64; 2],
    pub rounds: u64,
    /// Step times of base and head in each round, in nanoseconds. Files of version 3 lack them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub round_ns: Vec<[f64; 2]>,
    pub commit: String,
}

impl InterleavedResult {
    /// Returns the step time of a case in nanoseconds with its 95 % confidence interval between processes. Returns
    /// `None` if it is neither side, or if the file lacks the rounds.
    pub fn step_time(&self, id: &str) -> Option<(f64, [f64; 2])> {
        let side = [&self.base, &self.head].iter().position(|side| *side == id)?;
        let time = [self.base_ns?, self.head_ns?][side];
        let logs: Vec<f64> = self.round_ns.iter().map(|round| round[side].ln()).collect();
        let half = trimmed_half_width(&logs, REPORT_CONFIDENCE);
        half.is_finite().then(|| (time, [time * (-half).exp(), time * half.exp()]))
    }
}

/// Reads the effects of environment variables, of every commit.
pub fn env_effects(folder: &Path) -> Result<Vec<EnvEffect>> {
    read_list(&settings_path(folder))
}

/// Reads the interleaved results of every commit.
pub fn interleaved_results(folder: &Path) -> Result<Vec<InterleavedResult>> {
    read_list(&rounds_path(folder))
}

fn rounds_path(folder: &Path) -> PathBuf {
    folder.join("interleaved.json")
}

fn read_list<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    if path.exists() { read_json(path, "remove it and compare again") } else { Ok(Vec::new()) }
}

/// Adds `new` values to the list in a file. They replace the older ones that `replaces` selects.
///
/// # Errors
/// Returns an error if the file is damaged or cannot be written.
fn save_into_list<T: Serialize + DeserializeOwned>(
    path: &Path,
    new: Vec<T>,
    replaces: impl Fn(&T, &T) -> bool,
) -> Result<()> {
    let _lock = lock_file(path)?;
    let mut all: Vec<T> = read_list(path)?;
    all.retain(|old| !new.iter().any(|new| replaces(old, new)));
    all.extend(new);
    write_atomic(path, &serde_json::to_string_pretty(&all)?)
}

/// Removes the last run with its interleaved rounds, so that the next report has no result of it.
///
/// # Errors
/// Returns an error if a file cannot be removed.
pub fn remove_last_run(folder: &Path) -> Result<()> {
    let run = folder.join("run");
    if run.exists() {
        fs::remove_dir_all(&run).with_context(|| format!("{} could not be removed", run.display()))?;
    }
    let rounds = rounds_path(folder);
    if rounds.exists() {
        fs::remove_file(&rounds).with_context(|| format!("{} could not be removed", rounds.display()))?;
    }
    Ok(())
}

/// Saves interleaved results. They replace older results of the same pairs.
pub fn save_interleaved(folder: &Path, new: Vec<InterleavedResult>) -> Result<()> {
    save_into_list(&rounds_path(folder), new, |old, new| (&new.base, &new.head) == (&old.base, &old.head))
}

fn settings_path(folder: &Path) -> PathBuf {
    folder.join("env-effects.json")
}

/// Saves effects of environment variables. They replace older ones of the same variables and cases.
pub fn save_env_effects(folder: &Path, new: Vec<EnvEffect>) -> Result<()> {
    save_into_list(&settings_path(folder), new, |old, new| {
        (&new.variables, &new.id) == (&old.variables, &old.id)
    })
}

fn first_version() -> u64 {
    1
}

/// All results of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    #[serde(default = "first_version")]
    pub version: u64,
    pub machine: Machine,
    /// The custom model, if the run measured one instead of the built-in models.
    #[serde(default, deserialize_with = "deserialize_run_model", skip_serializing_if = "Option::is_none")]
    pub model: Option<RunModel>,
    pub cases: Vec<Record>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env_effects: Vec<EnvEffect>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interleaved: Vec<InterleavedResult>,
    /// Operations of training steps, from `scripts/explain`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub operations: Vec<Explanation>,
    /// Starts of compiled training steps, from `scripts/first-step`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub first_steps: Vec<FirstSteps>,
    /// Energy of training steps, from `scripts/energy`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub energy: Vec<CaseEnergy>,
}

impl Results {
    pub fn new(machine: Machine, cases: Vec<Record>) -> Self {
        Self {
            version: VERSION,
            machine,
            model: None,
            cases,
            env_effects: Vec::new(),
            interleaved: Vec::new(),
            operations: Vec::new(),
            first_steps: Vec::new(),
            energy: Vec::new(),
        }
    }

    /// Returns the shape of the headline tables.
    pub fn headline(&self) -> Shape {
        self.model.as_ref().map_or(HEADLINE_SHAPE, |own| own.custom_model().shape())
    }
}

/// The complete configuration of a custom model. Ids contain only its name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunModel {
    pub batch: usize,
    /// Micro-batches of a training step.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub micro_batches: usize,
    /// Optimizer of a training step.
    #[serde(default = "adamw", skip_serializing_if = "is_adamw")]
    pub optimizer: Optimizer,
    pub configuration: Model,
    /// Numbers of tokens of further training steps.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub other_lengths: Vec<usize>,
}

fn one() -> usize {
    1
}

fn is_one(count: &usize) -> bool {
    *count == 1
}

fn adamw() -> Optimizer {
    Optimizer::Adamw
}

fn is_adamw(optimizer: &Optimizer) -> bool {
    *optimizer == Optimizer::Adamw
}

impl RunModel {
    pub fn of(custom: CustomModel) -> Self {
        let CustomModel { model, batch, micro_batches, optimizer, other_lengths } = custom;
        Self { batch, micro_batches, optimizer, configuration: *model, other_lengths }
    }

    /// Returns the numbers of tokens, as `--tokens` takes them. Returns `None` if the model has a fixed number.
    pub fn lengths(&self) -> Option<String> {
        self.configuration.is_language_model().then(|| self.custom_model().lengths())
    }

    /// Returns the environment variables that select this model, with PATH as a placeholder for its file.
    pub fn variables(&self) -> String {
        let tokens = self
            .lengths()
            .map_or_else(String::new, |lengths| format!(" {}={lengths}", custom_model::TOKENS_VARIABLE));
        let accumulate = match self.micro_batches {
            1 => String::new(),
            count => format!(" {}={count}", custom_model::ACCUMULATE_VARIABLE),
        };
        let lora = self
            .configuration
            .lora
            .map_or_else(String::new, |lora| format!(" {}={}", custom_model::LORA_VARIABLE, lora.option()));
        let optimizer = match self.optimizer {
            Optimizer::Adamw => String::new(),
            optimizer => format!(" {}={optimizer}", custom_model::OPTIMIZER_VARIABLE),
        };
        format!(
            "{}=PATH {}={}{tokens}{accumulate}{lora}{optimizer}",
            custom_model::MODEL_VARIABLE,
            custom_model::BATCH_VARIABLE,
            self.batch
        )
    }

    pub fn custom_model(&self) -> CustomModel {
        CustomModel {
            model: ModelId::intern(self.configuration),
            batch: self.batch,
            micro_batches: self.micro_batches,
            optimizer: self.optimizer,
            other_lengths: self.other_lengths.clone(),
        }
    }
}

/// Deserializes the model of a run and registers its name, so that ids with it can be parsed.
///
/// # Errors
/// Returns an error if the model is invalid, or if this process uses the name for another model.
pub fn deserialize_run_model<'de, D: Deserializer<'de>>(from: D) -> Result<Option<RunModel>, D::Error> {
    let own: Option<RunModel> = Deserialize::deserialize(from)?;
    if let Some(own) = &own {
        let whole = config::complete_and_check(own.configuration).ok() == Some(own.configuration);
        let lengths = own.other_lengths.iter().all(|tokens| (1..=config::MAX_SIZE).contains(tokens));
        let sizes = [own.batch, own.micro_batches].iter().all(|size| (1..=MAX_BATCH).contains(size));
        let optimizes = own.configuration.lora.is_none() || is_adamw(&own.optimizer);
        if !whole || !lengths || !sizes || !optimizes || !own.batch.is_multiple_of(own.micro_batches) {
            return Err(D::Error::custom("the model of this run is not valid"));
        }
        ModelId::register(own.configuration).map_err(D::Error::custom)?;
    }
    Ok(own)
}

/// Returns the folder of the last run: TRANSFORMER_BENCH_RESULTS, the user's data folder in an installation, or
/// `transformer-bench` in Cargo's target folder.
pub fn folder() -> PathBuf {
    output_folder("TRANSFORMER_BENCH_RESULTS", "results", "transformer-bench")
}

/// Returns the folder that a variable names. Without the variable, it is in the user's data folder in an installation,
/// and in Cargo's target folder in a checkout.
fn output_folder(variable: &str, installed: &str, built: &str) -> PathBuf {
    std::env::var_os(variable).map(PathBuf::from).unwrap_or_else(|| match installation::find() {
        Some(own) => own.data_folder().join(installed),
        None => target_folder().join(built),
    })
}

/// Returns Cargo's target folder. This executable is in `<target>/<profile>/[deps/]`.
pub fn target_folder() -> PathBuf {
    let exe = std::env::current_exe().unwrap_or_default();
    exe.ancestors()
        .find(|folder| folder.join("CACHEDIR.TAG").exists())
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target"), Path::to_path_buf)
}

/// Returns Criterion's output folder.
pub fn criterion_home() -> PathBuf {
    output_folder("CRITERION_HOME", "criterion", "criterion")
}

/// Returns Criterion's folder of a case: group, function and value, with `_` for `/`.
pub fn criterion_folder(home: &Path, case: &Case) -> PathBuf {
    home.join(case.workload.id())
        .join(format!("{}_{}", case.backend, case.method))
        .join(case.shape.to_string())
}

/// Advises to repeat a run whose files are missing or damaged.
pub(crate) fn run_again() -> String {
    format!("run {} again", installation::command("bench"))
}

/// Reads a JSON file of this suite.
///
/// # Errors
/// Returns an error that ends in `advice` if the file is damaged.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path, advice: &str) -> Result<T> {
    let text = files::read_text(path)?;
    let damaged = || format!("{} is damaged: {advice}", path.display());
    serde_json::from_value(text::parse_json(&text).with_context(damaged)?).with_context(damaged)
}
