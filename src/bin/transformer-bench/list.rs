//! `scripts/list`: the cases of a set and their cost.

use anyhow::{Result, bail};
use clap::Args;
use transformer_bench::installation::command;
use transformer_bench::report::format::prefixed;
use transformer_bench::report::headline::best_pairs;
use transformer_bench::results::{self, run};
use transformer_bench::suite::{Case, Framework, Set, cases, cost, parse_filter};

use super::options;

/// Lists the cases of a set with their FLOPs, the bytes that they must move at least, and their estimated memory.
#[derive(Args)]
#[command(after_help = "Examples:
  scripts/list full gpt2
  scripts/list --flops train-step/torch-cpu/f32/indicator-b16")]
pub struct Arguments {
    /// Set of cases
    #[arg(default_value = Set::Full.id(), value_parser = options::set())]
    set: Set,
    /// Regular expression over ids (workload/backend/precision/shape)
    #[arg(default_value = "")]
    filter: String,
    /// List the cases of one framework
    #[arg(long)]
    framework: Option<Framework>,
    /// Print only the number of FLOPs of one case
    #[arg(long, value_name = "CASE")]
    flops: Option<Case>,
    /// Print the fastest training steps of both frameworks in the last run, a line per device
    #[arg(long, conflicts_with = "flops")]
    fastest: bool,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    if let Some(case) = arguments.flops {
        return super::show(&format!("{}\n", cost::flops(&case)));
    }
    if arguments.fastest {
        let (last, _) = run::merge(&results::folder())?;
        let lines = best_pairs(&last).into_iter().map(|[torch, mlx]| format!("{torch} {mlx}\n"));
        return super::show(&lines.collect::<String>());
    }
    let line =
        |cells: [&str; 4]| format!("{:64} {:>12} {:>10} {:>10}\n", cells[0], cells[1], cells[2], cells[3]);
    let mut text = line(["case", "FLOPs", "bytes", "memory"]);
    for case in select(arguments.set, &arguments.filter, arguments.framework)? {
        let flops = quantity(cost::flops(&case), "FLOP");
        let [bytes, memory] =
            [cost::min_bytes(&case), cost::memory_estimate(&case)].map(|count| quantity(count, "B"));
        text.push_str(&line([&case.to_string(), &flops, &bytes, &memory]));
    }
    super::show(&text)
}

/// Formats a count with an SI prefix and three significant digits: `4.13 GFLOP`, `75.2 MB`.
fn quantity(count: u64, unit: &str) -> String {
    prefixed(count as f64) + unit
}

/// Returns the cases of a set that match a filter and a framework.
///
/// # Errors
/// Returns an error if the filter is not a regular expression or matches no case.
pub fn select(set: Set, filter: &str, framework: Option<Framework>) -> Result<Vec<Case>> {
    let expression = parse_filter(filter)?;
    let matches = |case: &Case| {
        framework.is_none_or(|framework| case.backend.framework() == framework)
            && expression.is_match(&case.to_string())
    };
    let found: Vec<Case> = cases(set).into_iter().filter(matches).collect();
    if found.is_empty() {
        let hint = match cases(Set::Full).iter().filter(|case| matches(case)).count() {
            0 => format!("ids read workload/backend/precision/shape: {} shows them", command("list")),
            count => format!("{count} cases of the full set match: {} --full", command("bench")),
        };
        bail!("no case of the {set} set matches '{filter}'; {hint}");
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::Cli;

    #[test]
    fn help_lists_every_set() {
        let help = Cli::command().find_subcommand_mut("list").unwrap().render_long_help().to_string();
        for set in Set::ALL {
            assert!(help.contains(set.id()), "{set}: {help}");
        }
    }

    #[test]
    fn quantities_have_readable_units() {
        assert_eq!(quantity(4_130_000_000, "FLOP"), "4.13 GFLOP");
        assert_eq!(quantity(75_234_567, "B"), "75.2 MB");
        assert_eq!(quantity(0, "FLOP"), "0 FLOP");
    }
}
