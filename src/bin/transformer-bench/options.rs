//! Options that several subcommands share.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Args;
use clap::builder::{OsStringValueParser, PossibleValuesParser, StringValueParser, TypedValueParser};
use transformer_bench::compare::builds;
use transformer_bench::compare::releases::{self, Release};
use transformer_bench::compare::revisions::{Source, with_release};
use transformer_bench::compare::worker::Side;
use transformer_bench::model::Lora;
use transformer_bench::suite::{Case, Framework, Optimizer, Set, Workload};

/// Names the folder in which the user called a script. The scripts run this command in the project's root.
const CALLER_FOLDER: &str = "TRANSFORMER_BENCH_CALLER_FOLDER";
/// A year.
const MAX_MINUTES: f64 = 525_600.0;

/// Returns a path that is relative to the user's folder.
pub fn in_caller_folder(path: &OsStr) -> PathBuf {
    match std::env::var_os(CALLER_FOLDER) {
        Some(folder) => Path::new(&folder).join(path),
        None => path.into(),
    }
}

/// Parses a path, which need not be UTF-8.
pub fn path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(|text| in_caller_folder(&text))
}

/// Parses the path of a file or folder that exists, and returns it as an absolute path.
pub fn existing_path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().try_map(|text| -> Result<PathBuf> {
        let path = in_caller_folder(&text);
        ensure!(!text.is_empty() && path.exists(), "no such file or folder");
        Ok(std::path::absolute(path)?)
    })
}

fn is_whole_number(text: &str, max: usize) -> bool {
    text.parse().is_ok_and(|number| (1..=max).contains(&number))
}

/// Parses a whole number from 1 to `max`, and returns it as text for the environment.
pub fn whole_number(max: usize) -> impl TypedValueParser<Value = String> {
    StringValueParser::new().try_map(move |text| match is_whole_number(&text, max) {
        true => Ok(text),
        false => Err(format!("expected a whole number from 1 to {max}")),
    })
}

/// Parses whole numbers from 1 to `max` that are separated by commas, and returns them as text for the environment.
pub fn whole_numbers(max: usize) -> impl TypedValueParser<Value = String> {
    StringValueParser::new().try_map(move |text| match text.split(',').all(|n| is_whole_number(n, max)) {
        true => Ok(text),
        false => Err(format!("expected whole numbers from 1 to {max}, separated by commas")),
    })
}

/// Parses a rank of adapters, such as `16` or `16:qv`, and returns it as text for the environment.
pub fn lora() -> impl TypedValueParser<Value = String> {
    StringValueParser::new().try_map(move |text| text.parse::<Lora>().map(|_| text))
}

/// Parses the name of an optimizer, and returns it as text for the environment. The help text lists all names.
pub fn optimizer() -> impl TypedValueParser<Value = String> {
    PossibleValuesParser::new(Optimizer::ALL.iter().map(|optimizer| optimizer.id()))
}

/// Parses a side of a comparison: the path of `dir:PATH` is relative to the user's folder.
pub fn side(text: &str) -> Result<String, String> {
    match text.strip_prefix("dir:") {
        Some(folder) => Ok(format!("dir:{}", in_caller_folder(OsStr::new(folder)).display())),
        None => Ok(text.to_owned()),
    }
}

/// Parses a positive number of minutes.
pub fn minutes(text: &str) -> Result<Duration, String> {
    let minutes = text.parse().ok().filter(|minutes| *minutes > 0.0 && *minutes <= MAX_MINUTES);
    let minutes: f64 = minutes.ok_or(format!("expected minutes above 0 and up to {MAX_MINUTES}"))?;
    Ok(Duration::from_secs_f64(60.0 * minutes))
}

/// Parses the name of a set. The help text lists all names.
pub fn set() -> impl TypedValueParser<Value = Set> {
    PossibleValuesParser::new(Set::ALL.iter().map(|set| set.id())).try_map(|name| name.parse::<Set>())
}

/// The executables that a subcommand measures.
#[derive(Args)]
pub struct Executables {
    /// Measure the executables DIR/torch and DIR/mlx instead of those of the working tree
    #[arg(long = "executables", value_name = "DIR", value_parser = path())]
    pub folder: Option<PathBuf>,
    /// Measure the working tree with this release of PyTorch
    #[arg(long, value_name = "RELEASE", value_parser = |text: &str| releases::find(Framework::Torch, text))]
    #[arg(conflicts_with_all = ["folder", "mlx"])]
    torch: Option<&'static Release>,
    /// Measure the working tree with this release of MLX
    #[arg(long, value_name = "RELEASE", value_parser = |text: &str| releases::find(Framework::Mlx, text))]
    #[arg(conflicts_with = "folder")]
    mlx: Option<&'static Release>,
}

impl Executables {
    /// Returns true if they are those of the working tree with its locked releases.
    pub fn are_of_worktree(&self) -> bool {
        self.folder.is_none() && self.torch.or(self.mlx).is_none()
    }

    /// Returns the executables, built if they are those of the working tree.
    ///
    /// # Errors
    /// Returns an error if the build fails or the folder has no executables.
    pub fn build(&self) -> Result<Side> {
        let source = match (&self.folder, self.torch.or(self.mlx)) {
            (Some(folder), _) => Source::Folder(folder.clone()),
            (None, Some(release)) => with_release(release, &Source::Worktree)?,
            (None, None) => Source::Worktree,
        };
        let side = builds::build(&source, &print_progress)?;
        ensure!(!side.executables.is_empty(), "{} has no executable torch or mlx", side.name);
        Ok(side)
    }
}

/// Longest wait for the lists of cases.
const LIST_LIMIT: Duration = Duration::from_secs(120);

/// Returns the training steps of a single process that a side can run here.
///
/// # Errors
/// Returns an error if an executable does not start or answer.
pub fn list_training_steps(side: &Side, set: Set, filter: &str) -> Result<Vec<Case>> {
    let mut cases = side.cases(set, filter, Instant::now() + LIST_LIMIT)?;
    cases.retain(|case| case.workload == Workload::TrainStep && case.shape.ranks() == 1);
    Ok(cases)
}

/// Prints progress to standard error, apart from the results.
pub fn print_progress(line: &str) {
    eprintln!("{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minutes_are_positive_and_at_most_a_year() {
        assert_eq!(minutes("0.5"), Ok(Duration::from_secs(30)));
        for wrong in ["0", "-1", "1e18", "nan", "soon"] {
            assert!(minutes(wrong).is_err(), "{wrong}");
        }
    }
}
