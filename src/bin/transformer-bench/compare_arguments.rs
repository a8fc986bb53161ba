//! The arguments of `scripts/compare`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use transformer_bench::compare::decision::{THRESHOLD, Verdict};
use transformer_bench::compare::revisions::{self, Source, Spec};
use transformer_bench::compare::worker::Threads;
use transformer_bench::installation;
use transformer_bench::suite::{BackendId, Framework, Set, parse_filter};

use super::options;
use super::output::Report;

/// Reports for each case whether HEAD is slower than BASE, reliably enough to gate a merge.
///
/// BASE and HEAD are each a git revision, a saved baseline (baseline:NAME), a folder of executables (dir:PATH), or
/// the working tree (worktree, the default of HEAD). Fresh processes of both sides run interleaved. The checkout does
/// not change.
///
/// Exit codes: 0 no regression, 1 a regression, 2 wrong input, 3 inconclusive.
#[derive(Args)]
#[command(after_help = "Examples:
  scripts/compare main                          the working tree and main
  scripts/compare v1.0 v1.1 'train-step/.*/f32/'
  scripts/compare baseline:nightly              the working tree and a saved baseline
  scripts/compare --from --threshold 5          the last comparison with another threshold
  scripts/compare --backends torch-cpu mlx-cpu  two frameworks
  scripts/compare --torch 2.11.0 2.13.0         two releases of PyTorch
  scripts/compare --bisect 2.11.0..2.13.0 'train-step/torch-cpu/f32/indicator-b1$'
                                                the first release that is slower
  scripts/compare worktree --env OMP_NUM_THREADS=1 --threads all
                                                the effect of a variable")]
pub struct Arguments {
    /// The side that HEAD is compared with; with --backends, the side that has both backends
    #[arg(value_parser = options::side)]
    pub base: Option<String>,
    /// The side that is judged, or the filter
    #[arg(value_parser = options::side)]
    pub head: Option<String>,
    /// Regular expression over ids (workload/backend/precision/shape)
    pub filter: Option<String>,
    #[arg(long, value_name = "PERCENT", default_value_t = 100.0 * THRESHOLD, value_parser = percent)]
    #[arg(allow_negative_numbers = true, help = threshold_help())]
    pub threshold: f64,
    /// Set of cases; `compare` has true widths, and batches with short steps
    #[arg(long, default_value = Set::Compare.id(), value_parser = options::set())]
    pub set: Set,
    /// Apply another --threshold to the JSON of a finished comparison (default: the last one), without measuring
    #[arg(long, value_name = "FILE", num_args = 0..=1, value_parser = options::path())]
    #[arg(conflicts_with_all = ["base", "backends", "env"])]
    pub from: Option<Option<PathBuf>>,
    /// Compare two backends of one side
    #[arg(long, num_args = 2, value_names = ["A", "B"])]
    pub backends: Option<Vec<BackendId>>,
    /// Compare two releases of PyTorch, with the sources of one side
    #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with_all = ["mlx", "backends", "from", "bisect"])]
    pub torch: Option<Vec<String>>,
    /// Compare two releases of MLX, with the sources of one side
    #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with_all = ["backends", "from", "bisect"])]
    pub mlx: Option<Vec<String>>,
    /// Search the first release, or the first of several sides, that is slower than the first one for a case
    #[arg(long, value_name = "A..B|SIDE,SIDE,…", value_delimiter = ',', value_parser = options::side)]
    #[arg(conflicts_with_all = ["backends", "from", "env"])]
    pub bisect: Option<Vec<String>>,
    /// Set an environment variable on the HEAD side only
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    pub env: Vec<(String, String)>,
    /// Run CPU backends on one pinned thread or on all threads; default: one, but all with --backends, --env or a
    /// baseline
    #[arg(long, value_parser = PossibleValuesParser::new(["one", "all"]).map(threads))]
    pub threads: Option<Threads>,
    /// Stop after this many minutes; undecided cases are inconclusive
    #[arg(long, default_value = "30", value_parser = options::minutes, allow_negative_numbers = true)]
    pub minutes: Duration,
    /// Exit with 3 if any case is inconclusive
    #[arg(long)]
    pub strict: bool,
    /// Compare with a baseline of another machine or of other versions, and note the differences
    #[arg(long)]
    pub allow_mismatch: bool,
    /// Print Markdown for a pull request
    #[arg(long, conflicts_with = "json")]
    pub markdown: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

fn threshold_help() -> String {
    format!("A case is `{}` if its change is certainly within this many percent", Verdict::Equivalent.id())
}

fn threads(text: String) -> Threads {
    if text == "one" { Threads::One } else { Threads::All }
}

fn percent(text: &str) -> Result<f64, String> {
    let percent = text.parse().ok().filter(|percent| *percent > 0.0 && *percent <= 100.0);
    percent.ok_or("expected percent above 0 and up to 100".to_owned())
}

fn variable(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(name, _)| !name.is_empty());
    let (name, value) = pair.ok_or("expected NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

impl Arguments {
    /// Checks all that does not depend on executables.
    ///
    /// # Errors
    /// Returns an error that names the wrong argument.
    pub fn check(&self) -> Result<()> {
        match self.bisected()? {
            Some(_) => Ok(()),
            None => self.spec().map(drop),
        }
    }

    fn words(&self) -> [Option<&str>; 3] {
        [&self.base, &self.head, &self.filter].map(Option::as_deref)
    }

    /// Returns both sides and the filter, or `None` with `--from`.
    ///
    /// # Errors
    /// Returns an error if a word does not name a side, or if the filter is not a regular expression.
    pub fn spec(&self) -> Result<Option<Spec>> {
        if self.from.is_some() {
            return Ok(None);
        }
        let words = self.words();
        let spec = match (self.torch.as_deref(), self.mlx.as_deref()) {
            (Some([a, b]), _) => Spec::of_releases(Framework::Torch, [a, b], words)?,
            (_, Some([a, b])) => Spec::of_releases(Framework::Mlx, [a, b], words)?,
            _ => Spec::read(words[0], words[1], words[2], self.backends.is_some())?,
        };
        parse_filter(&spec.filter)?;
        Ok(Some(spec))
    }

    /// Returns the sides of `--bisect` and the filter, or `None` without that option.
    ///
    /// # Errors
    /// Returns an error if a word does not name a side, or if the filter is not a regular expression.
    pub fn bisected(&self) -> Result<Option<(Vec<Source>, String)>> {
        let Some(sides) = &self.bisect else { return Ok(None) };
        let (sides, filter) = revisions::bisected(sides, self.words())?;
        parse_filter(&filter)?;
        Ok(Some((sides, filter)))
    }

    /// Returns the variables of `--env` as one text: `A=1 B=2`.
    pub fn variables(&self) -> String {
        let pairs: Vec<String> = self.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
        pairs.join(" ")
    }

    /// Returns the number of threads of `--threads`, or the default.
    pub fn threads(&self) -> Threads {
        let as_user = self.backends.is_some() || !self.env.is_empty();
        self.threads.unwrap_or(if as_user { Threads::All } else { Threads::One })
    }

    /// Prints a report in the requested format, and returns the exit code.
    pub fn print(&self, report: &Report) -> Result<u8> {
        super::show(&report.text(self.json, self.markdown))?;
        Ok(report.exit_code(self.strict))
    }
}

/// Returns the error for a filter that selects nothing.
pub fn no_case(spec: &Spec, set: Set) -> anyhow::Error {
    let hint = spec.filter_hint.clone().unwrap_or_default();
    let filter = &spec.filter;
    let list = installation::command("list");
    anyhow!("no case of the {set} set that can run here matches '{filter}'{hint}: {list} shows the ids")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::Cli;

    #[test]
    fn help_names_the_sets_and_the_verdict_of_the_threshold() {
        let help = Cli::command().find_subcommand_mut("compare").unwrap().render_long_help().to_string();
        for word in Set::ALL.iter().map(|set| set.id()).chain([Verdict::Equivalent.id()]) {
            assert!(help.contains(word), "{word}: {help}");
        }
    }

    #[test]
    fn variables_need_a_name() {
        assert_eq!(variable("A=1=2"), Ok(("A".to_owned(), "1=2".to_owned())));
        assert!(variable("=1").is_err() && variable("A").is_err());
    }
}
