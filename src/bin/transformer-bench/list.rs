//! The table of cases, with what each costs.

use anyhow::Result;
use clap::Args;
use transformer_bench::suite::{Case, Set, cases, cost};

/// Lists the cases of a set, with FLOPs, bytes and estimated memory.
#[derive(Args)]
#[command(after_help = "Examples:
  scripts/list full | grep gpt2
  scripts/list --flops train-step/torch-cpu/f32/indicator-b16")]
pub struct Arguments {
    /// smoke, quick or full
    #[arg(default_value = "full", value_parser = |text: &str| text.parse::<Set>())]
    set: Set,
    /// The FLOPs of one case alone
    #[arg(long, value_name = "CASE", value_parser = |text: &str| text.parse::<Case>())]
    flops: Option<Case>,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    if let Some(case) = arguments.flops {
        println!("{}", cost::flops(&case));
        return Ok(());
    }
    println!("{:64} {:>20} {:>16} {:>10}", "case", "FLOPs", "bytes", "memory MB");
    for case in cases(arguments.set) {
        println!(
            "{:64} {:>20} {:>16} {:>10}",
            case.to_string(),
            cost::flops(&case),
            cost::bytes(&case),
            cost::memory_estimate(&case) / 1_000_000
        );
    }
    Ok(())
}
