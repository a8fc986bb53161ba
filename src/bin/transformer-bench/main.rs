//! The command that the scripts call, with one module per subcommand.

mod baseline;
mod bench;
mod bisect;
mod calibrate;
mod compare;
mod compare_arguments;
mod compare_baselines;
mod compare_python;
mod energy;
mod explain;
mod first_step;
mod fit;
mod flamegraph;
mod interleave;
mod list;
mod model_options;
mod options;
mod output;
mod process_group;
mod publish;
#[cfg(test)]
mod reader_tests;
mod report;
mod send;

use std::io::Write;
use std::process::ExitCode;
use std::sync::LazyLock;

use anyhow::Context;
use clap::builder::StyledStr;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use transformer_bench::compare::signals;
use transformer_bench::installation;
use transformer_bench::results::machine::{self, Machine};
use transformer_bench::suite::custom_model;
use transformer_bench::text::{self, error_line};

/// Measures how fast PyTorch and MLX train the same transformer on this machine.
///
/// scripts/NAME sets up, builds this command and runs `transformer-bench NAME`.
#[derive(Parser)]
#[command(name = "transformer-bench", version = version())]
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
    ComparePython(compare_python::Arguments),
    Energy(energy::Arguments),
    Explain(explain::Arguments),
    FirstStep(first_step::Arguments),
    Fit(fit::Arguments),
    Flamegraph(flamegraph::Arguments),
    List(list::Arguments),
    Interleave(interleave::Arguments),
    Calibrate(calibrate::Arguments),
    Publish(publish::Arguments),
}

/// Returns the version, and what an installation was built from.
fn version() -> &'static str {
    static VERSION: LazyLock<String> = LazyLock::new(|| {
        installation::find().map_or_else(|| env!("CARGO_PKG_VERSION").to_owned(), |own| own.version())
    });
    &VERSION
}

/// Replaces the scripts in the help of a command and of its subcommands by the commands of an installation.
fn with_installed_words(mut command: clap::Command) -> clap::Command {
    let text = |found: Option<&StyledStr>| found.map(|text| installation::words(&text.to_string()));
    if let Some(notes) = text(command.get_after_help()) {
        command = command.after_help(notes);
    }
    if let Some(about) = text(command.get_long_about()) {
        command = command.long_about(about);
    }
    let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    command = names.iter().fold(command, |all, name| all.mut_subcommand(name, with_installed_words));
    command.mut_args(|argument| match text(argument.get_help()) {
        Some(help) => argument.help(help),
        None => argument,
    })
}

/// Reads the command line. Ends the process after help, or with a message after a wrong argument.
fn read_command() -> Command {
    let parsed = Cli::from_arg_matches(&with_installed_words(Cli::command()).get_matches());
    parsed.unwrap_or_else(|error| error.exit()).command
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
        Command::Energy(arguments) => arguments.check(),
        Command::Explain(arguments) => arguments.check(),
        Command::FirstStep(arguments) => arguments.check(),
        Command::Fit(arguments) => arguments.check(),
        Command::Flamegraph(arguments) => arguments.check(),
        Command::Calibrate(arguments) => arguments.check(),
        Command::Report(_)
        | Command::Baseline(_)
        | Command::ComparePython(_)
        | Command::List(_)
        | Command::Interleave(_)
        | Command::Publish(_) => Ok(()),
    }
}

/// Reads the custom model, which ids may name. Returns messages for the user.
fn read_model(command: &mut Command) -> anyhow::Result<Vec<String>> {
    match command {
        Command::Bench(arguments) => arguments.model.export()?,
        Command::Energy(arguments) => arguments.model.export()?,
        Command::Explain(arguments) => arguments.model.export()?,
        Command::FirstStep(arguments) => arguments.model.export()?,
        Command::Fit(arguments) => arguments.export_model()?,
        _ => {}
    }
    custom_model::from_environment(|| machine::capacity(&Machine::read()))
}

fn main() -> ExitCode {
    let mut command = read_command();
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
        Command::ComparePython(arguments) => ("compare-python", compare_python::run(&arguments)),
        Command::Energy(arguments) => ("energy", energy::run(&arguments).map(|()| 0)),
        Command::Explain(arguments) => ("explain", explain::run(&arguments).map(|()| 0)),
        Command::FirstStep(arguments) => ("first-step", first_step::run(&arguments).map(|()| 0)),
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
