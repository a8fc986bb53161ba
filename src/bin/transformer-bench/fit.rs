//! `scripts/fit`: the largest batch and the longest sequence that each framework can train in the memory of this machine.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde_json::{Value, json};
use transformer_bench::compare::fit::{self, LONGEST_STEP, Limit, Outcome, Point, Prober, Search};
use transformer_bench::compare::signals::check_interrupted;
use transformer_bench::memory;
use transformer_bench::model::config::{self, MAX_SIZE};
use transformer_bench::model::{Model, ModelId};
use transformer_bench::report::format::{digits, megabytes};
use transformer_bench::report::markdown;
use transformer_bench::report::table::Table;
use transformer_bench::results::one_line;
use transformer_bench::suite::custom_model::{self, CustomModel};
use transformer_bench::suite::{
    BackendId, Case, Framework, MAX_BATCH, Method, Precision, Set, Shape, Variant, Workload,
};
use transformer_bench::text::{shortened, variable};

use super::options::{self, Executables, print_progress};

/// The shortest sequence that is tried. Shorter ones take milliseconds and fit wherever the model does.
const SHORTEST: usize = 64;
/// Characters of a framework's message about missing memory that the progress shows.
const MAX_REASON: usize = 100;
/// Variants that are compared: plain steps, the fastest ones without a compiler ahead of time, and those that need less
/// memory.
const VARIANTS: [Variant; 4] = [Variant::Eager, Variant::Tuned, Variant::Checkpoint, Variant::ChunkedLoss];

/// Finds the largest batch and the longest sequence that each framework can train on this machine.
///
/// Each size runs a training step in a fresh process, with and without the variants that need less memory. On a CPU under
/// Linux, a process may allocate the available memory (--memory changes it). On a Mac, a step ends when the system begins
/// to swap. Each variant is checked at 64 tokens against the reference first.
///
/// Exit codes: 0 done, 2 wrong input or a failure that is not about memory, 130 interrupted.
#[derive(Args)]
#[command(after_help = "Examples:
  scripts/fit --model ../SmolLM2-135M --tokens 512
  scripts/fit --model ../SmolLM2-135M --lora 16 --precision bf16 --memory 8")]
pub struct Arguments {
    /// A Hugging Face config.json, its folder, or a TOML file (src/model/README.md)
    #[arg(long, value_name = "PATH", value_parser = options::existing_path())]
    model: Option<PathBuf>,
    /// Tokens per sample in the search for the largest batch; default: the model's context, 1024 at most
    #[arg(long, value_name = "T", value_parser = options::whole_number(MAX_SIZE))]
    tokens: Option<String>,
    /// Train adapters of this rank (LoRA); R:qv adapts queries and values alone
    #[arg(long, value_name = "R", value_parser = options::lora())]
    lora: Option<String>,
    /// Precision of the training step
    #[arg(long, default_value = Precision::F32.id(), value_parser = precision())]
    precision: Precision,
    /// Memory that a step may allocate on a CPU, in GB; Linux only. Default: the memory that is available now
    #[arg(long, value_name = "GB", value_parser = gigabytes)]
    memory: Option<u64>,
    /// Search with one framework
    #[arg(long)]
    framework: Option<Framework>,
    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    executables: Executables,
}

fn precision() -> impl TypedValueParser<Value = Precision> {
    PossibleValuesParser::new(Precision::ALL.iter().map(|p| p.id())).try_map(|name| name.parse::<Precision>())
}

/// Parses a positive amount in GB, and returns bytes.
fn gigabytes(text: &str) -> Result<u64, String> {
    let amount = text.parse().ok().filter(|amount: &f64| *amount > 0.0 && *amount < 1e6);
    let amount = amount.ok_or("expected GB above 0 and below 1,000,000")?;
    Ok((amount * 1e9) as u64)
}

impl Arguments {
    /// Exports the model options as environment variables, which every process of the suite reads. Must be called before
    /// this process starts a thread.
    ///
    /// # Errors
    /// Returns an error if neither `--model` nor the environment names a model.
    pub fn export_model(&self) -> Result<()> {
        let known = variable(custom_model::MODEL_VARIABLE).is_ok_and(|path| path.is_some());
        ensure!(
            self.model.is_some() || known,
            "fit needs --model PATH: the built-in models have fixed sizes"
        );
        // SAFETY: the caller guarantees that no other thread runs yet.
        let set = |name: &str, value: &std::ffi::OsStr| unsafe { std::env::set_var(name, value) };
        if let Some(path) = &self.model {
            set(custom_model::MODEL_VARIABLE, path.as_os_str());
        }
        // The search chooses the batch.
        set(custom_model::BATCH_VARIABLE, "1".as_ref());
        let sizes =
            [(custom_model::TOKENS_VARIABLE, &self.tokens), (custom_model::LORA_VARIABLE, &self.lora)];
        for (name, value) in sizes {
            if let Some(value) = value {
                set(name, value.as_ref());
            }
        }
        Ok(())
    }

    /// Checks the options that need no framework.
    ///
    /// # Errors
    /// Returns an error if a limit cannot be set on this system.
    pub fn check(&self) -> Result<()> {
        ensure!(
            self.memory.is_none() || memory::CAN_LIMIT_ALLOCATIONS,
            "--memory: this system cannot limit the memory of a process"
        );
        Ok(())
    }
}

/// The results of a method of a backend.
struct Found {
    backend: BackendId,
    method: Method,
    /// The search for the largest batch.
    batch: Search,
    /// The search for the longest sequence at batch 1, unless the model's samples have a fixed length.
    tokens: Option<Search>,
}

/// The model with its lengths.
struct Lengths {
    custom: CustomModel,
    /// The largest number of tokens that it takes.
    context: usize,
}

impl Lengths {
    fn read() -> Result<Self> {
        let custom = custom_model::custom_model().context("--model names a model")?;
        let path = variable(custom_model::MODEL_VARIABLE)?.context("--model is a path")?;
        let context = config::read(std::path::Path::new(&path))?.model.tokens;
        Ok(Self { custom, context })
    }

    fn case(&self, backend: BackendId, method: Method, batch: usize, tokens: usize) -> Case {
        let model = ModelId::intern(Model { tokens, ..*self.custom.model });
        Case { workload: Workload::TrainStep, backend, method, shape: Shape::for_model(model, batch) }
    }
}

/// Searches with every variant on the fastest kind of device of each framework, and prints the results.
///
/// # Errors
/// Returns an error if a process does not start, or fails for another reason than memory.
pub fn run(arguments: &Arguments) -> Result<()> {
    arguments.check()?;
    let lengths = Lengths::read()?;
    let side = arguments.executables.build()?;
    let available = options::list_training_steps(&side, Set::Quick, "^train-step/")?;
    let memory_limit = arguments.memory.or_else(memory::available_bytes);
    let mut all = Vec::new();
    for framework in Framework::ALL.iter().filter(|f| arguments.framework.is_none_or(|only| only == **f)) {
        let backends = available.iter().map(|case| case.backend).filter(|b| b.framework() == *framework);
        // A GPU comes after the CPU in the list of backends.
        let Some(backend) = backends.max() else { continue };
        let limits = backend.is_cpu() && memory::CAN_LIMIT_ALLOCATIONS;
        let prober = Prober { side: &side, memory_limit: memory_limit.filter(|_| limits) };
        for variant in VARIANTS {
            let method = Method { precision: arguments.precision, variant };
            all.extend(search(&prober, &lengths, backend, method)?);
        }
    }
    ensure!(!all.is_empty(), "no framework can run this training step here: see the reasons above");
    let limit = memory_limit.filter(|_| memory::CAN_LIMIT_ALLOCATIONS);
    super::show(&if arguments.json { json_text(&all, &lengths, limit) } else { text(&all, &lengths, limit) })
}

/// Searches with one method. Returns `None` with a message if the backend does not support it.
fn search(
    prober: &Prober<'_>,
    lengths: &Lengths,
    backend: BackendId,
    method: Method,
) -> Result<Option<Found>> {
    let tokens = lengths.custom.model.tokens;
    let has_lengths = lengths.custom.model.is_language_model();
    let short = if has_lengths { SHORTEST.min(tokens) } else { tokens };
    let checked = lengths.case(backend, method, 1, short);
    print_progress(&format!("{checked}: checking"));
    if let Err(reason) = prober.check(&checked, short) {
        check_interrupted()?;
        print_progress(&format!("{backend}/{method} skipped: {}", one_line(&format!("{reason:#}"))));
        return Ok(None);
    }
    let attempt = |case: Case, tokens: usize| {
        let outcome = prober.attempt(&case, tokens).with_context(|| case.to_string())?;
        print_progress(&format!("{}: {}", case.shape, describe(&outcome)));
        Ok(outcome)
    };
    let batch = fit::search(&fit::sizes(1, MAX_BATCH), |batch| {
        attempt(lengths.case(backend, method, batch, tokens), tokens)
    })?;
    let longer = fit::sizes(SHORTEST, lengths.context);
    let tokens = has_lengths
        .then(|| fit::search(&longer, |tokens| attempt(lengths.case(backend, method, 1, tokens), tokens)))
        .transpose()?;
    Ok(Some(Found { backend, method, batch, tokens }))
}

fn describe(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Fits { seconds, memory } => {
            let peak = memory.allocator.or(memory.process);
            let peak = peak.map_or_else(String::new, |bytes| format!(", peak {}", megabytes(bytes)));
            format!("{} s a step{peak}", digits(*seconds))
        }
        Outcome::DoesNotFit { reason } => {
            format!("does not fit ({})", shortened(one_line(reason), MAX_REASON))
        }
    }
}

/// Returns the fastest size of a search, by samples or tokens per second.
fn fastest(search: &Search) -> Option<(usize, f64)> {
    let speed = |point: &Point| match point.outcome {
        Outcome::Fits { seconds, .. } => Some((point.size, point.size as f64 / seconds)),
        Outcome::DoesNotFit { .. } => None,
    };
    search.points.iter().filter_map(speed).max_by(|a, b| a.1.total_cmp(&b.1))
}

/// Returns the largest size as text, with its speed and peak memory.
fn largest_cells(search: &Search) -> [String; 3] {
    let dash = || "–".to_owned();
    let Some(Point { size, outcome: Outcome::Fits { seconds, memory } }) = search.largest() else {
        return ["0".to_owned(), dash(), dash()];
    };
    let size_text = match search.limit {
        Limit::Memory => size.to_string(),
        Limit::Time => format!("{size} (then over {} s)", LONGEST_STEP.as_secs()),
        Limit::Size => format!("{size} (all)"),
    };
    let peak = memory.allocator.or(memory.process).map_or_else(dash, megabytes);
    [size_text, digits(*size as f64 / seconds), peak]
}

fn text(all: &[Found], lengths: &Lengths, limit: Option<u64>) -> String {
    let model = &lengths.custom.model;
    let row = |found: &Found| {
        let dash = || "–".to_owned();
        let [batch, samples, peak] = largest_cells(&found.batch);
        let best = fastest(&found.batch);
        let [fastest_batch, fastest_speed] =
            best.map_or([dash(), dash()], |(size, speed)| [size.to_string(), digits(speed)]);
        let [tokens, tokens_per_s, tokens_peak] =
            found.tokens.as_ref().map_or([(); 3].map(|()| String::new()), largest_cells);
        let backend = found.backend.label().to_owned();
        let method = found.method.to_string();
        vec![
            backend,
            method,
            batch,
            samples,
            peak,
            fastest_batch,
            fastest_speed,
            tokens,
            tokens_per_s,
            tokens_peak,
        ]
    };
    let header = "backend|method|largest batch|samples/s|peak memory|fastest batch|samples/s|longest sample|tokens/s|\
                  peak memory";
    let table = Table::new("What fits", "", header, all.iter().map(row).collect());
    let limit = limit.map_or_else(String::new, |bytes| {
        format!(" A process could allocate {} on the CPU.", megabytes(bytes))
    });
    format!(
        "# What fits: training steps of {}\n\nBatches have {} tokens per sample, and the longest sample is at batch 1.{limit} \
         Sizes between those that were tried may fit too: they differ by up to a half. Peak memory is that of the \
         framework's allocator on a GPU, and of the process on a CPU.\n\n{}",
        model.name,
        model.tokens,
        markdown::table(&table)
    )
}

fn json_text(all: &[Found], lengths: &Lengths, limit: Option<u64>) -> String {
    let point = |point: &Point| match &point.outcome {
        Outcome::Fits { seconds, memory } => json!({
            "size": point.size, "fits": true, "seconds": seconds, "allocator_peak_bytes": memory.allocator,
            "process_peak_bytes": memory.process,
        }),
        Outcome::DoesNotFit { reason } => json!({ "size": point.size, "fits": false, "reason": reason }),
    };
    let search = |search: &Search| {
        json!({
            "largest": search.largest().map(|point| point.size),
            "limited_by": match search.limit {
                Limit::Memory => "memory",
                Limit::Time => "time",
                Limit::Size => "size",
            },
            "points": search.points.iter().map(point).collect::<Vec<Value>>(),
        })
    };
    let found = |found: &Found| {
        json!({
            "backend": found.backend.id(), "method": found.method.to_string(), "batch": search(&found.batch),
            "tokens": found.tokens.as_ref().map(search),
        })
    };
    let value = json!({
        "model": lengths.custom.model.name, "tokens": lengths.custom.model.tokens, "memory_limit_bytes": limit,
        "methods": all.iter().map(found).collect::<Vec<Value>>(),
    });
    format!("{value:#}\n")
}

#[cfg(test)]
mod tests {
    use transformer_bench::compare::fit::Memory;

    use super::*;

    #[test]
    fn the_fastest_size_need_not_be_the_largest() {
        let memory = Memory { allocator: None, process: Some(1 << 30) };
        let point = |size, seconds| Point { size, outcome: Outcome::Fits { seconds, memory } };
        let too_large =
            Point { size: 8, outcome: Outcome::DoesNotFit { reason: "out of memory".to_owned() } };
        let search = Search {
            points: vec![point(1, 0.5), point(2, 0.6), point(4, 2.0), too_large],
            limit: Limit::Memory,
        };
        assert_eq!(fastest(&search), Some((2, 2.0 / 0.6)));
        assert_eq!(largest_cells(&search), ["4", "2.00", "1,074 MB"]);
        let none = Search { points: search.points[3..].to_vec(), limit: Limit::Memory };
        assert_eq!(largest_cells(&none), ["0", "–", "–"]);
    }
}
