//! `scripts/energy`: the energy of training steps.

use anyhow::{Result, bail, ensure};
use clap::Args;
use transformer_bench::compare::worker::{CheckOutcome, Side, Threads, Worker};
use transformer_bench::report::{energy as report, markdown};
use transformer_bench::results;
use transformer_bench::results::energy::{self, CaseEnergy};
use transformer_bench::results::machine::Machine;
use transformer_bench::suite::{Case, Set, parse_filter};
use transformer_bench::text::error_line;

use super::model_options::ModelOptions;
use super::options::{self, Executables, print_progress};

/// Measures the energy of a sample in training steps, and the idle power of the hardware.
///
/// The counters are those of NVIDIA's driver (the board), of Linux (the CPU packages, which only root may read) and of macOS
/// (the cores of the CPU or of the GPU; never tested). Energies of different hardware are in separate tables.
#[derive(Args)]
#[command(after_help = "Examples:
  scripts/energy
  scripts/energy --seconds 20 'train-step/torch-cuda/bf16-tuned/gpt2-b8-t1024'")]
pub struct Arguments {
    /// Regular expression over ids of training steps
    #[arg(default_value = "/(f32|f32-tuned|bf16-tuned)/")]
    filter: String,
    /// Set of cases
    #[arg(long, default_value = Set::Quick.id(), value_parser = options::set())]
    set: Set,
    /// Shortest time of the steps
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(5..=600))]
    seconds: u64,
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

/// Checks a case and measures its energy.
fn measure(side: &Side, case: &Case, seconds: u64) -> Result<CaseEnergy> {
    let mut worker = Worker::start(side, case.backend.framework(), Threads::All)?;
    if let CheckOutcome::Wrong(reason) = worker.check(case)? {
        bail!("{reason}");
    }
    worker.load(case)?;
    let energy = worker.energy(seconds)?;
    worker.verify()?;
    let (id, batch) = (case.to_string(), case.shape.batch() as u64);
    Ok(CaseEnergy { id, batch, energy, commit: Machine::read().commit })
}

/// Measures the selected cases, prints and saves their energy.
///
/// # Errors
/// Returns an error if no case matches, or if none has a counter of energy.
pub fn run(arguments: &Arguments) -> Result<()> {
    arguments.check()?;
    let side = arguments.executables.build()?;
    // The counter of one device has no part of those of other ranks.
    let cases = options::list_training_steps(&side, arguments.set, &arguments.filter)?;
    ensure!(!cases.is_empty(), "no training step that can run here matches '{}'", arguments.filter);
    let mut all = Vec::new();
    for case in &cases {
        print_progress(&case.to_string());
        match measure(&side, case, arguments.seconds) {
            Ok(measured) => {
                energy::save(&results::folder(), &measured)?;
                all.push(measured);
            }
            Err(reason) => eprintln!("{case}: {}", error_line(&reason)),
        }
    }
    ensure!(!all.is_empty(), "no energy was measured: see the reasons above");
    if arguments.json {
        return super::show(&format!("{}\n", serde_json::to_string_pretty(&all)?));
    }
    for table in report::tables(&all) {
        super::show(&format!("{}\n\n{}\n{}\n\n", table.title, markdown::table(&table), table.note))?;
    }
    Ok(())
}
