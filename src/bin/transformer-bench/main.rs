//! The command behind the scripts: a subcommand each.

mod baseline;
mod calibrate;
mod compare;
mod flamegraph;
mod list;
mod output;
mod publish;
mod report;
mod turns;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use transformer_bench::compare::stop;
use transformer_bench::results::machine::{self, Machine};
use transformer_bench::results::printable;
use transformer_bench::suite::given;

/// Measured training speed of PyTorch and MLX on the same transformer, on this machine.
///
/// scripts/bench measures; these keep, compare and show what it found. scripts/NAME sets up
/// and builds first, and then does the same as transformer-bench NAME.
#[derive(Parser)]
#[command(name = "transformer-bench", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Baseline(baseline::Arguments),
    Compare(compare::Arguments),
    Flamegraph(flamegraph::Arguments),
    Report(report::Arguments),
    Turns(turns::Arguments),
    List(list::Arguments),
    Publish(publish::Arguments),
    #[command(alias = "selftest")]
    Calibrate(calibrate::Arguments),
}

/// Prints a result. Unlike `println!`, a full disk behind it is an error and no panic, and a
/// reader who has had enough is none.
fn show(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        done => done.context("the result could not be printed"),
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Ids may name the user's own model.
    if let Err(reason) = given::from_environment(|| machine::reach(&Machine::read())) {
        eprintln!("error: {}", printable(&format!("{reason:#}")));
        return ExitCode::from(2);
    }
    let (name, result) = match arguments.command {
        Command::Baseline(arguments) => ("baseline", baseline::run(arguments).map(|()| 0)),
        Command::Report(arguments) => ("report", report::run(&arguments).map(|()| 0)),
        Command::Publish(arguments) => ("publish", publish::run(&arguments).map(|()| 0)),
        Command::List(arguments) => ("list", list::run(&arguments).map(|()| 0)),
        Command::Compare(arguments) => {
            stop::catch_interrupts();
            ("compare", compare::run(&arguments))
        }
        Command::Turns(arguments) => {
            stop::catch_interrupts();
            ("turns", turns::run(&arguments).map(|()| 0))
        }
        Command::Flamegraph(arguments) => {
            stop::catch_interrupts();
            ("flamegraph", flamegraph::run(&arguments).map(|()| 0))
        }
        Command::Calibrate(arguments) => {
            stop::catch_interrupts();
            ("calibrate", calibrate::run(&arguments).map(|()| 0))
        }
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(_) if stop::interrupted() => {
            eprintln!("{name}: interrupted");
            ExitCode::from(130)
        }
        Err(reason) => {
            eprintln!("{name}: {}", printable(&format!("{reason:#}")));
            ExitCode::from(2)
        }
    }
}
