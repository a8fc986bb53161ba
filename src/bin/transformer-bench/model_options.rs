//! Options that select the model of a run.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;
use transformer_bench::model::config::MAX_SIZE;
use transformer_bench::suite::{MAX_BATCH, custom_model};
use transformer_bench::text::variable;

use super::options;

/// The user's model and its sizes.
#[derive(Args)]
pub struct ModelOptions {
    /// Measure your model instead of the built-in ones: a Hugging Face config.json, its folder, or a TOML file
    /// (src/model/README.md)
    #[arg(long, value_name = "PATH", value_parser = options::existing_path())]
    model: Option<PathBuf>,
    /// Batch size of your model; default: the largest with a training step under an estimated two seconds
    #[arg(long, value_name = "B", value_parser = options::whole_number(MAX_BATCH))]
    pub batch: Option<String>,
    /// Tokens per sample of your model; default: its context, 1024 at most. With several (512,1024,2048), training steps
    /// are measured at each, with about as many tokens per step
    #[arg(long, value_name = "T", value_parser = options::whole_numbers(MAX_SIZE))]
    pub tokens: Option<String>,
    /// Micro-batches of a training step of your model: it adds up their gradients for one update
    #[arg(long, value_name = "N", value_parser = options::whole_number(MAX_BATCH))]
    accumulate: Option<String>,
    /// Train adapters of this rank in all linear layers of the blocks of your model (LoRA); R:qv adapts queries and values
    /// alone
    #[arg(long, value_name = "R", value_parser = options::lora())]
    lora: Option<String>,
    /// Optimizer of the training steps of your model: adamw (default), or muon for the matrices of its blocks
    #[arg(long, value_name = "NAME", value_parser = options::optimizer())]
    optimizer: Option<String>,
}

impl ModelOptions {
    /// Exports the options as environment variables, which every process of the suite reads. Options that are missing are
    /// taken from the environment.
    ///
    /// Must be called before this process starts a thread.
    ///
    /// # Errors
    /// Returns an error if a size has no model.
    pub fn export(&mut self) -> Result<()> {
        let has_model = self.model.is_some()
            || std::env::var_os(custom_model::MODEL_VARIABLE).is_some_and(|path| !path.is_empty());
        ensure!(
            has_model
                || [&self.batch, &self.tokens, &self.accumulate, &self.lora, &self.optimizer]
                    .iter()
                    .all(|option| option.is_none()),
            "--batch, --tokens, --accumulate, --lora and --optimizer need --model PATH: the built-in models have fixed \
             sizes"
        );
        if let Some(path) = &self.model {
            // SAFETY: the caller guarantees that no other thread runs yet.
            unsafe { std::env::set_var(custom_model::MODEL_VARIABLE, path) };
        }
        let sizes = [
            (custom_model::BATCH_VARIABLE, &mut self.batch),
            (custom_model::TOKENS_VARIABLE, &mut self.tokens),
            (custom_model::ACCUMULATE_VARIABLE, &mut self.accumulate),
            (custom_model::LORA_VARIABLE, &mut self.lora),
            (custom_model::OPTIMIZER_VARIABLE, &mut self.optimizer),
        ];
        for (name, size) in sizes {
            match size {
                // SAFETY: as above.
                Some(size) => unsafe { std::env::set_var(name, size) },
                None => *size = variable(name)?,
            }
        }
        Ok(())
    }
}
