//! The record of a run: what each case gave, or why it gave nothing. Written by the
//! harness, one file a framework, and merged into `results.json`.

pub mod baseline;
pub mod machine;
pub mod run;
pub mod upgrade;

#[cfg(test)]
mod hostile_tests;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer, Serialize};

use crate::backend::RankStats;
use crate::interference;
use crate::model::{Model, ModelId, config};
use crate::suite::{Case, CustomModel, HEADLINE_SHAPE, Shape, custom_model};
use machine::Machine;
pub use upgrade::VERSION;

/// What became of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    Measured,
    Skipped,
    TooSlow,
    ParityFailed,
    Error,
}

/// Work over the median time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Throughput {
    pub value: f64,
    /// `samples/s`, `FLOP/s` or `B/s`
    pub unit: String,
}

/// One case of a run. Times are nanoseconds an iteration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub id: String,
    pub workload: String,
    pub backend: String,
    pub precision: String,
    pub shape: String,
    pub status: Status,
    /// Empty where the case was measured.
    pub reason: String,
    pub median_ns: Option<f64>,
    /// 95 % interval of the median.
    pub ci_ns: Option<[f64; 2]>,
    pub samples: Option<u64>,
    pub throughput: Option<Throughput>,
    /// Peak of the framework's own allocator.
    pub peak_bytes: Option<u64>,
    /// Peak of the process's resident size, everything in it included.
    pub rss_peak_bytes: Option<u64>,
    /// Page faults a step, the median of the samples.
    #[serde(default)]
    pub page_faults: Option<f64>,
    /// What they take of the median, at what a fault takes in this process.
    #[serde(default)]
    pub page_fault_share: Option<f64>,
    /// How much of the error that its precision allows the worst tensor took when the case was
    /// proven.
    #[serde(default)]
    pub parity: Option<f64>,
    /// The part of its time that the process's threads were ready and had no core.
    #[serde(default)]
    pub cpu_wait_share: Option<f64>,
    /// Where several devices shared it: what was seen of their processes.
    #[serde(default)]
    pub ranks: Option<RankStats>,
}

/// Text without what a terminal would follow: a file's fields are anybody's.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// A reason on a line that can be read: a framework may put a compiler's whole output into one.
pub fn one_line(reason: &str) -> String {
    const MOST: usize = 300;
    let mut line = printable(reason).split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = line.char_indices().nth(MOST) {
        line.replace_range(end.., "…");
    }
    line
}

impl Record {
    /// A case without a figure; its reason becomes [`one_line`].
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
            ranks: None,
        }
    }
}

impl Record {
    /// Whether something else had the machine while the case was measured, so that nothing
    /// should be concluded from it.
    pub fn disturbed(&self) -> bool {
        self.cpu_wait_share.is_some_and(|share| share > interference::WAIT_THRESHOLD)
    }

    /// Whether there were too few steps for Criterion's ten samples; the interval is then the
    /// range of what was measured.
    pub fn too_few_samples(&self) -> Option<u64> {
        self.samples.filter(|n| self.status == Status::Measured && *n < 10)
    }
}

/// What environment variables bring to a case, found interleaved by `scripts/compare --env`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EnvEffect {
    /// `NAME=VALUE`, several joined by spaces.
    pub variables: String,
    pub id: String,
    /// Median step times in nanoseconds.
    pub without_ns: f64,
    pub with_ns: f64,
    /// Time with over time without, and its 99 % interval.
    pub ratio: f64,
    pub ratio_ci: [f64; 2],
    pub commit: String,
}

/// Two backends on the same case, measured in turns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InterleavedResult {
    /// Ids of the two cases.
    pub base: String,
    pub head: String,
    /// Step time of head over that of base, and its 99 % interval.
    pub ratio: f64,
    pub ratio_ci: [f64; 2],
    pub rounds: u64,
    pub commit: String,
}

/// Settings that were measured, whatever the commit.
pub fn env_effects(folder: &Path) -> Result<Vec<EnvEffect>> {
    read_list(&settings_path(folder))
}

/// What was measured in turns, whatever the commit.
pub fn interleaved_results(folder: &Path) -> Result<Vec<InterleavedResult>> {
    read_list(&turns_path(folder))
}

fn turns_path(folder: &Path) -> PathBuf {
    folder.join("interleaved.json")
}

fn read_list<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    if path.exists() { read_json(path, "remove it and compare again") } else { Ok(Vec::new()) }
}

/// Keeps what was measured in turns, in place of what older rounds found of the same.
pub fn save_interleaved(folder: &Path, new: Vec<InterleavedResult>) -> Result<()> {
    let path = turns_path(folder);
    let _alone = lock_file(&path)?;
    let mut all = interleaved_results(folder)?;
    all.retain(|old| !new.iter().any(|n| (&n.base, &n.head) == (&old.base, &old.head)));
    all.extend(new);
    write_atomic(&path, &serde_json::to_string_pretty(&all)?)
}

fn settings_path(folder: &Path) -> PathBuf {
    folder.join("env-effects.json")
}

/// Keeps what was measured, in place of what older comparisons found of the same.
pub fn save_env_effects(folder: &Path, new: Vec<EnvEffect>) -> Result<()> {
    let path = settings_path(folder);
    let _alone = lock_file(&path)?;
    let mut all = env_effects(folder)?;
    all.retain(|old| !new.iter().any(|n| (&n.variables, &n.id) == (&old.variables, &old.id)));
    all.extend(new);
    write_atomic(&path, &serde_json::to_string_pretty(&all)?)
}

fn first_version() -> u64 {
    1
}

/// Everything that a run left.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    #[serde(default = "first_version")]
    pub version: u64,
    pub machine: Machine,
    /// The user's own, where one stood in the place of the suite's.
    #[serde(default, deserialize_with = "deserialize_run_model", skip_serializing_if = "Option::is_none")]
    pub model: Option<RunModel>,
    pub cases: Vec<Record>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env_effects: Vec<EnvEffect>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interleaved: Vec<InterleavedResult>,
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
        }
    }

    /// The shape that the headline tables stand for.
    pub fn headline(&self) -> Shape {
        self.model.as_ref().map_or(HEADLINE_SHAPE, |own| own.custom_model().shape())
    }
}

/// A model that the user gave, whole: its name alone stands in ids.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunModel {
    pub batch: usize,
    pub configuration: Model,
}

impl RunModel {
    pub fn of(given: CustomModel) -> Self {
        Self { batch: given.batch, configuration: *given.model }
    }

    /// What has any command measure it, once PATH is its file's.
    pub fn variables(&self) -> String {
        let tokens = self.configuration.tokens;
        let tokens = if self.configuration.is_language_model() {
            format!(" {}={tokens}", custom_model::TOKENS_VARIABLE)
        } else {
            String::new()
        };
        format!(
            "{}=PATH {}={}{tokens}",
            custom_model::MODEL_VARIABLE,
            custom_model::BATCH_VARIABLE,
            self.batch
        )
    }

    pub fn custom_model(&self) -> CustomModel {
        CustomModel { model: ModelId::intern(self.configuration), batch: self.batch }
    }
}

/// Reads the model of a run, after which ids may name it. Refused where the name stands for another in
/// this process.
pub fn deserialize_run_model<'de, D: Deserializer<'de>>(from: D) -> Result<Option<RunModel>, D::Error> {
    let own: Option<RunModel> = Deserialize::deserialize(from)?;
    if let Some(own) = &own {
        let whole = config::complete(own.configuration).ok() == Some(own.configuration);
        if !whole || !(1..=custom_model::MAX_BATCH).contains(&own.batch) {
            return Err(D::Error::custom("the model of this run can't be built"));
        }
        ModelId::register(own.configuration).map_err(D::Error::custom)?;
    }
    Ok(own)
}

/// Where what took long to make is kept, for every clone. As set-up does, an empty or relative
/// XDG_CACHE_HOME counts as unset (XDG base directory specification).
///
/// # Errors
/// Where the environment names no home.
pub fn cache_folder() -> Result<PathBuf> {
    let given = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let base = match given {
        Some(cache) => cache,
        None => PathBuf::from(std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
            .join(".cache"),
    };
    Ok(base.join("transformer-bench"))
}

/// Removes a folder or a file when it goes.
#[derive(Debug)]
pub struct Scratch(pub PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0).or_else(|_| fs::remove_file(&self.0));
    }
}

/// Whether a process of this user is there.
pub fn is_running(process: i32) -> bool {
    // SAFETY: signal 0 only asks.
    unsafe { libc::kill(process, 0) == 0 }
}

/// FNV-1a, 64 bits, <https://www.rfc-editor.org/rfc/rfc9923>.
pub fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// A checksum of the program that runs.
///
/// # Errors
/// Where its file can't be read.
pub fn executable() -> Result<String> {
    let exe = std::env::current_exe()?;
    let bytes = fs::read(&exe).with_context(|| format!("{} could not be read", exe.display()))?;
    Ok(format!("{:016x}", checksum(&bytes)))
}

/// Writes a file whole or not at all.
pub fn write_atomic(path: &Path, text: &str) -> Result<()> {
    let folder = path.parent().context("a file lies in a folder")?;
    let partial = path.with_extension("partial");
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(folder)?;
        let mut file = fs::File::create(&partial)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&partial, path)
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&partial);
        anyhow::anyhow!(
            "{} could not be written: {error}; what was there before is untouched",
            path.display()
        )
    })
}

/// Keeps other processes from a file, until dropped: two that read it, add to it and write it at
/// once would each lose what the other added.
///
/// # Errors
/// Where the lock beside it can't be made.
pub fn lock_file(path: &Path) -> Result<fs::File> {
    let lock = path.with_extension("lock");
    let take = || -> std::io::Result<fs::File> {
        fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
        let file = fs::File::create(&lock)?;
        file.lock()?;
        Ok(file)
    };
    take().with_context(|| format!("{} could not be locked", lock.display()))
}

/// Where a run's files lie: `target/transformer-bench` of the target folder in use, or
/// what TRANSFORMER_BENCH_RESULTS says.
pub fn folder() -> PathBuf {
    std::env::var_os("TRANSFORMER_BENCH_RESULTS")
        .map_or_else(|| target_folder().join("transformer-bench"), PathBuf::from)
}

/// Cargo's target folder: this executable lies in `<target>/<profile>/[deps/]`.
pub fn target_folder() -> PathBuf {
    let exe = std::env::current_exe().unwrap_or_default();
    exe.ancestors()
        .find(|folder| folder.join("CACHEDIR.TAG").exists())
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target"), Path::to_path_buf)
}

/// Where Criterion keeps its files.
pub fn criterion_home() -> PathBuf {
    std::env::var_os("CRITERION_HOME").map_or_else(|| target_folder().join("criterion"), PathBuf::from)
}

/// Where Criterion keeps a case: group, function and value, with `/` made `_`.
pub fn criterion_folder(home: &Path, case: &Case) -> PathBuf {
    home.join(case.workload.id())
        .join(format!("{}_{}", case.backend, case.method))
        .join(case.shape.to_string())
}

/// Reads a file of ours; `advice` says what to do where it is damaged.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path, advice: &str) -> Result<T> {
    let text = fs::read_to_string(path).with_context(|| format!("{} could not be read", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is damaged: {advice}", path.display()))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A folder of this process's own that is not there yet.
    pub fn scratch(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("transformer-bench-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        folder
    }

    #[test]
    fn a_reason_is_one_short_line() {
        assert_eq!(one_line("a\n  b\tc "), "a b c");
        let long = one_line(&"é".repeat(1000));
        assert!(long.ends_with("é…") && long.chars().count() == 301, "{long}");
    }

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let folder = scratch("write");
        let path = folder.join("a.json");
        write_atomic(&path, "old").unwrap();
        fs::create_dir(path.with_extension("partial")).unwrap();
        assert!(write_atomic(&path, "new").unwrap_err().to_string().contains("untouched"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        fs::remove_dir_all(folder).unwrap();
    }
}
