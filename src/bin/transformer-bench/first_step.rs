//! `scripts/first-step`: the time until a compiled step runs, and when it pays.

use anyhow::{Result, ensure};
use clap::Args;
use transformer_bench::compare::first_step;
use transformer_bench::report::{first_step as report, markdown};
use transformer_bench::results::{self, first_step as records};
use transformer_bench::suite::{BackendId, Case, Framework, Set, Variant, parse_filter};

use super::model_options::ModelOptions;
use super::options::{self, Executables, print_progress};

/// Measures how long a compiled training step takes to start, and after how many steps it pays.
///
/// Each case starts in a new process with empty caches, and in another one with the caches that the first has filled. They
/// are temporary folders, so your own caches stay unchanged. macOS caches the kernels of Metal itself. torch.compile in Python is
/// measured next to PyTorch's -compile.
#[derive(Args)]
#[command(after_help = "Examples:
  scripts/first-step
  scripts/first-step 'train-step/torch-cpu/f32-compile/'
  scripts/first-step --model src/model/indicator.toml --batch 4")]
pub struct Arguments {
    /// Regular expression over ids of compiled training steps
    #[arg(default_value = "/f32-(compile|tuned)/")]
    filter: String,
    /// Set of cases
    #[arg(long, default_value = Set::Quick.id(), value_parser = options::set())]
    set: Set,
    #[command(flatten)]
    pub model: ModelOptions,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    executables: Executables,
}

impl Arguments {
    /// Checks the filter.
    ///
    /// # Errors
    /// Returns an error if it is not a regular expression.
    pub fn check(&self) -> Result<()> {
        parse_filter(&self.filter).map(drop)
    }
}

/// Returns true if a step is compiled or captured before it runs. PyTorch's `-tuned` is a recorded graph on CUDA and eager
/// elsewhere.
fn is_compiled(case: &Case) -> bool {
    let variant = case.method.variant;
    let is_eager = case.backend.framework() == Framework::Torch && case.backend != BackendId::TorchCuda;
    variant == Variant::Compile || (variant.captures_full_step() && !is_eager)
}

/// Measures the selected cases, prints and saves their times.
///
/// # Errors
/// Returns an error if no case matches, a step is wrong or a process ends.
pub fn run(arguments: &Arguments) -> Result<()> {
    arguments.check()?;
    let side = arguments.executables.build()?;
    // Only one process of a case with ranks would have the caches.
    let mut cases = options::list_training_steps(&side, arguments.set, &arguments.filter)?;
    cases.retain(is_compiled);
    ensure!(!cases.is_empty(), "no compiled training step that can run here matches '{}'", arguments.filter);
    let mut all = Vec::new();
    for case in &cases {
        for steps in first_step::measure(&side, case, &print_progress)? {
            records::save(&results::folder(), &steps)?;
            all.push(steps);
        }
    }
    if arguments.json {
        return super::show(&format!("{}\n", serde_json::to_string_pretty(&all)?));
    }
    let table = report::table(&all);
    super::show(&format!("{}\n{}\n", markdown::table(&table), table.note))
}
