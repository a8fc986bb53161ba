//! Merges the last run's parts into `results.json` and `report.md`, and shows the latter.

use std::process::ExitCode;

use anyhow::Result;
use transformer_bench::report::markdown;
use transformer_bench::results;

const HELP: &str = "\
Shows the tables of the last run and writes results.json and report.md beside it.

Usage: cargo run --release --bin report

Run ./scripts/bench to measure first.";

fn run() -> Result<()> {
    let folder = results::folder();
    let (merged, parts) = results::merge(&folder)?;
    let text = markdown::render(&merged, &parts);
    results::write_whole(&folder.join("results.json"), &serde_json::to_string_pretty(&merged)?)?;
    results::write_whole(&folder.join("report.md"), &text)?;
    print!("{text}");
    println!("\nWritten: {0}/report.md and {0}/results.json", folder.display());
    Ok(())
}

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        None => {}
        Some("-h" | "--help") => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Some(other) => {
            eprintln!("error: unknown argument '{other}': see --help");
            return ExitCode::from(2);
        }
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("error: {reason:#}");
            ExitCode::from(2)
        }
    }
}
