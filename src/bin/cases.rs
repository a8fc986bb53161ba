//! Lists the table of cases with what each costs.

use std::process::ExitCode;

use transformer_bench::case::{Case, Set, cases};
use transformer_bench::cost;

const HELP: &str = "\
Lists the cases of a set, with FLOPs, bytes and estimated memory.

Usage: cargo run --release --bin cases -- [smoke | quick | full]
       cargo run --release --bin cases -- --flops CASE

Example: cargo run --release --bin cases -- full | grep gpt2";

fn run(arguments: &[String]) -> Result<(), String> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["-h" | "--help"] => println!("{HELP}"),
        ["--flops", id] => println!("{}", cost::flops(&id.parse::<Case>()?)),
        [] | [_] => {
            let set: Set = words.first().unwrap_or(&"full").parse()?;
            println!("{:64} {:>20} {:>16} {:>10}", "case", "FLOPs", "bytes", "memory MB");
            for case in cases(set) {
                println!(
                    "{:64} {:>20} {:>16} {:>10}",
                    case.to_string(),
                    cost::flops(&case),
                    cost::bytes(&case),
                    cost::memory_estimate(&case) / 1_000_000
                );
            }
        }
        _ => return Err("too many arguments: see --help".to_owned()),
    }
    Ok(())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("error: {reason}");
            ExitCode::from(2)
        }
    }
}
