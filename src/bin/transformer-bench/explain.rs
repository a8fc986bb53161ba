//! `scripts/explain`: the operations in which one framework loses its time.

use anyhow::{Result, anyhow, ensure};
use clap::Args;
use transformer_bench::compare::explain::Explainer;
use transformer_bench::report::{explain, markdown};
use transformer_bench::results::{self, operations};
use transformer_bench::suite::operations::check_separable;
use transformer_bench::suite::{
    BackendId, Case, HEADLINE_SHAPE, Method, Precision, Shape, Workload, custom_model,
};

use super::model_options::ModelOptions;
use super::options::{Executables, print_progress};

/// Shows in which operations of a training step a framework loses its time.
///
/// Each operation of the model is timed alone, forward and backward, on two backends whose samples alternate. Each is first
/// compared with the reference. The last rows compare the sum of the parts with the whole step.
#[derive(Args)]
#[command(after_help = "Examples:
  scripts/explain
  scripts/explain torch-mps mlx-metal
  scripts/explain --model src/model/indicator.toml --batch 4 torch-cpu mlx-cpu")]
pub struct Arguments {
    /// Two backends, such as torch-cpu and mlx-cpu; default: those of both frameworks on the best device
    #[arg(num_args = 2, value_name = "BACKEND")]
    backends: Vec<BackendId>,
    #[command(flatten)]
    pub model: ModelOptions,
    /// Precision of the step, with -sdpa for fused attention
    #[arg(long, value_name = "PRECISION", default_value = "f32")]
    method: Method,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    executables: Executables,
}

impl Arguments {
    fn backends(&self) -> Option<[BackendId; 2]> {
        <[BackendId; 2]>::try_from(&self.backends[..]).ok()
    }

    /// Returns the shape of the step: that of the user's model, or of the headline tables.
    fn shape() -> Shape {
        custom_model::custom_model().map_or(HEADLINE_SHAPE, |custom| custom.shape())
    }

    /// Checks that the step consists of operations that can be timed alone.
    ///
    /// # Errors
    /// Returns the reason if it does not.
    pub fn check(&self) -> Result<()> {
        ensure!(
            self.method.precision != Precision::Amp,
            "torch.autocast casts in every operation, and MLX does not have it: use mixed"
        );
        for backend in self.backends().unwrap_or([BackendId::TorchCpu, BackendId::MlxCpu]) {
            let (workload, method) = (Workload::TrainStep, self.method);
            let case = Case { workload, backend, method, shape: Self::shape() };
            check_separable(&case).map_err(|reason| anyhow!(reason))?;
        }
        Ok(())
    }
}

/// Measures the operations, prints and saves them.
///
/// # Errors
/// Returns an error if a result is wrong or a process ends.
pub fn run(arguments: &Arguments) -> Result<()> {
    arguments.check()?;
    let side = arguments.executables.build()?;
    let mut explainer = Explainer::start(&side, arguments.backends(), arguments.method, Arguments::shape())?;
    let explanation = explainer.explain(&print_progress)?;
    if let Some(note) = explainer.disturbance() {
        eprintln!("note: {note}");
    }
    if arguments.json {
        super::show(&format!("{}\n", serde_json::to_string_pretty(&explanation)?))?;
    } else {
        let table = explain::table(&explanation);
        super::show(&format!("{}\n{}\n", markdown::table(&table), table.note))?;
    }
    operations::save(&results::folder(), explanation)
}
