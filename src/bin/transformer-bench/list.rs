//! The table of cases, with what each costs.

use anyhow::{Result, bail};
use clap::Args;
use transformer_bench::suite::{Case, Framework, Set, cases, cost, pattern};

/// Lists the cases of a set, with FLOPs, the fewest bytes that must move, and estimated memory.
#[derive(Args)]
#[command(after_help = "Examples:
  scripts/list full gpt2
  scripts/list --flops train-step/torch-cpu/f32/indicator-b16")]
pub struct Arguments {
    /// smoke, quick or full
    #[arg(default_value = "full", value_parser = |text: &str| text.parse::<Set>())]
    set: Set,
    /// A regular expression over ids
    #[arg(default_value = "")]
    filter: String,
    /// Of one framework alone
    #[arg(long, value_parser = |text: &str| text.parse::<Framework>())]
    framework: Option<Framework>,
    /// The FLOPs of one case alone
    #[arg(long, value_name = "CASE", value_parser = |text: &str| text.parse::<Case>())]
    flops: Option<Case>,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    if let Some(case) = arguments.flops {
        return super::show(&format!("{}\n", cost::flops(&case)));
    }
    let filter = pattern(&arguments.filter)?;
    let wanted = |case: &Case| {
        let framework = arguments.framework.is_none_or(|framework| case.backend.framework() == framework);
        framework && filter.is_match(&case.to_string())
    };
    let found: Vec<Case> = cases(arguments.set).into_iter().filter(wanted).collect();
    if found.is_empty() {
        let full = cases(Set::Full).iter().filter(|case| wanted(case)).count();
        let hint = match full {
            0 => "ids read workload/backend/precision/shape: scripts/list shows them".to_owned(),
            count => format!("{count} cases of the full set do: scripts/bench --full"),
        };
        bail!("no case of the {} set matches '{}'; {hint}", arguments.set, arguments.filter);
    }
    let mut text = format!("{:64} {:>20} {:>16} {:>10}\n", "case", "FLOPs", "bytes", "memory MB");
    for case in found {
        text.push_str(&format!(
            "{:64} {:>20} {:>16} {:>10}\n",
            case.to_string(),
            cost::flops(&case),
            cost::least_bytes(&case),
            cost::memory_estimate(&case) / 1_000_000
        ));
    }
    super::show(&text)
}
