//! `scripts/compare-python`: the suite's steps and the same steps written in Python.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;
use transformer_bench::compare::revisions;
use transformer_bench::installation;

/// Compares training steps with the same steps written in Python.
#[derive(Args)]
#[command(disable_help_flag = true)]
pub struct Arguments {
    /// Arguments of scripts/compare-python (--help lists them)
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Replaces this process by the script. An installation runs it with the interpreter of its environment.
///
/// # Errors
/// Returns an error if the interpreter does not start.
pub fn run(arguments: &Arguments) -> Result<u8> {
    const NAME: &str = "compare-python";
    let (python, script) = match installation::find() {
        Some(own) => (own.python().unwrap_or_else(|| "python3".to_owned()), own.script(NAME)),
        None => ("python3".to_owned(), revisions::root().join("scripts").join(NAME)),
    };
    let error = Command::new(&python).arg(script).args(&arguments.arguments).exec();
    Err(error).with_context(|| format!("{python} does not start"))
}
