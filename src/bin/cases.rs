//! Lists the table of cases with what each costs.

use std::process::ExitCode;

use clap::Parser;
use transformer_bench::case::{Case, Set, cases};
use transformer_bench::cost;

/// Lists the cases of a set, with FLOPs, bytes and estimated memory.
#[derive(Parser)]
#[command(after_help = "\
Examples:
  cargo run --release --bin cases -- full | grep gpt2
  cargo run --release --bin cases -- --flops train-step/torch-cpu/f32/indicator-b16")]
struct Arguments {
    /// smoke, quick or full
    #[arg(default_value = "full", value_parser = |text: &str| text.parse::<Set>())]
    set: Set,
    /// The FLOPs of one case alone
    #[arg(long, value_name = "CASE", value_parser = |text: &str| text.parse::<Case>())]
    flops: Option<Case>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(case) = arguments.flops {
        println!("{}", cost::flops(&case));
        return ExitCode::SUCCESS;
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
    ExitCode::SUCCESS
}
