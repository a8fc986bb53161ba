//! The command that the scripts call, with one module per subcommand.

mod baseline;
mod bench;
mod bisect;
mod calibrate;
mod compare;
mod compare_arguments;
mod compare_baselines;
mod fit;
mod flamegraph;
mod interleave;
mod list;
mod options;
mod output;
mod process_group;
mod publish;
#[cfg(test)]
mod reader_tests;
mod report;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use transformer_bench::compare::signals;
use transformer_bench::results::machine::{self, Machine};
use transformer_bench::suite::custom_model;
use transformer_bench::text::{self, error_line};

/// Measures how fast PyTorch and MLX train the same transformer on this machine.
///
/// scripts/NAME sets up, builds this command and runs `transformer-bench NAME`.
#[derive(Parser)]
#[command(name = "transformer-bench", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Bench(bench::Arguments),
    Report(report::Arguments),
    Baseline(baseline::Arguments),
    Compare(compare_arguments::Arguments),
    Fit(fit::Arguments),
    Flamegraph(flamegraph::Arguments),
    List(list::Arguments),
    Interleave(interleave::Arguments),
    Calibrate(calibrate::Arguments),
    Publish(publish::Arguments),
}

/// Prints a result without control characters and flushes it. A closed pipe is not an error: its reader has seen enough.
///
/// # Errors
/// Returns an error if the text cannot be written, for example to a full disk.
fn show(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text::terminal(text).as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        done => done.context("the result could not be printed"),
    }
}

/// With this variable, the command only checks its arguments. The scripts do so before they build.
const CHECK_ARGUMENTS: &str = "TRANSFORMER_BENCH_CHECK_ARGUMENTS";

/// Checks what does not depend on the executables of the benchmarks.
///
/// # Errors
/// Returns an error that names the wrong argument.
fn check_arguments(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Bench(arguments) => arguments.selected().map(drop),
        Command::Compare(arguments) => arguments.check(),
        Command::Fit(arguments) => arguments.check(),
        Command::Flamegraph(arguments) => arguments.check(),
        Command::Calibrate(arguments) => arguments.check(),
        Command::Report(_)
        | Command::Baseline(_)
        | Command::List(_)
        | Command::Interleave(_)
        | Command::Publish(_) => Ok(()),
    }
}

/// Reads the custom model, which ids may name. Returns messages for the user.
fn read_model(command: &mut Command) -> anyhow::Result<Vec<String>> {
    match command {
        Command::Bench(arguments) => arguments.export_model()?,
        Command::Fit(arguments) => arguments.export_model()?,
        _ => {}
    }
    custom_model::from_environment(|| machine::capacity(&Machine::read()))
}

fn main() -> ExitCode {
    let mut command = Cli::parse().command;
    match read_model(&mut command) {
        // For the other commands, the bench targets print them.
        Ok(notes) if matches!(command, Command::List(_)) => {
            notes.iter().for_each(|note| eprintln!("note: {note}"));
        }
        Ok(_) => {}
        Err(reason) => return refuse("error", &reason),
    }
    if std::env::var_os(CHECK_ARGUMENTS).is_some() {
        return check_arguments(&command)
            .map_or_else(|reason| refuse("error", &reason), |()| ExitCode::SUCCESS);
    }
    // Other subcommands take less than a second, so an interrupt may end them at once.
    if !matches!(command, Command::Report(_) | Command::Baseline(_) | Command::List(_) | Command::Publish(_))
    {
        signals::catch_interrupts();
    }
    let (name, result) = match command {
        Command::Bench(arguments) => ("bench", bench::run(&arguments)),
        Command::Report(arguments) => ("report", report::run(&arguments).map(|()| 0)),
        Command::Baseline(arguments) => ("baseline", baseline::run(arguments).map(|()| 0)),
        Command::Compare(arguments) => ("compare", compare::run(&arguments)),
        Command::Fit(arguments) => ("fit", fit::run(&arguments).map(|()| 0)),
        Command::Flamegraph(arguments) => ("flamegraph", flamegraph::run(&arguments).map(|()| 0)),
        Command::List(arguments) => ("list", list::run(&arguments).map(|()| 0)),
        Command::Interleave(arguments) => ("interleave", interleave::run(&arguments)),
        Command::Calibrate(arguments) => ("calibrate", calibrate::run(&arguments).map(|()| 0)),
        Command::Publish(arguments) => ("publish", publish::run(&arguments).map(|()| 0)),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(_) if signals::interrupted() => {
            eprintln!("{name}: interrupted");
            ExitCode::from(130)
        }
        Err(reason) => refuse(name, &reason),
    }
}

/// Prints an error in one line. Returns the exit code.
fn refuse(name: &str, reason: &anyhow::Error) -> ExitCode {
    eprintln!("{name}: {}", error_line(reason));
    ExitCode::from(2)
}
