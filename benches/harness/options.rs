//! The command-line options that the harness itself needs. Criterion reads all options from the same arguments.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use regex::Regex;
use transformer_bench::installation;
use transformer_bench::results::baseline::check_name;
use transformer_bench::results::criterion_folder;
use transformer_bench::suite::{self, Case, Set, cases};

/// Criterion's options that take a value.
const WITH_VALUE: &str = "-c --color -s --save-baseline -b --baseline --baseline-lenient --load-baseline --format \
    --profile-time --sample-size --warm-up-time --measurement-time --nresamples --noise-threshold --confidence-level \
    --significance-level --plotting-backend --output-format";

#[derive(Debug)]
pub struct Options {
    pub set: Set,
    pub filter: Regex,
    /// True for `--test` and `cargo test`: every case runs once and nothing is written.
    pub test: bool,
    pub list: bool,
    /// Time for which each case is profiled instead of measured.
    pub profile: Option<Duration>,
    /// True if the user set the number of samples, which then replaces the plan's.
    pub own_samples: bool,
    /// True if the user set the times, which then replace the plan's.
    pub own_times: bool,
    /// A baseline that must exist.
    pub baseline: Option<String>,
    pub load_baseline: bool,
}

impl Options {
    /// Reads the arguments. `set` is the value of `TRANSFORMER_BENCH_SET`.
    ///
    /// # Errors
    /// Returns an error if a value is invalid or if no case matches the filter.
    pub fn read(mut arguments: impl Iterator<Item = String>, set: Option<String>) -> Result<Self> {
        let mut options = Self {
            set: Set::Quick,
            filter: suite::parse_filter("")?,
            test: false,
            list: false,
            profile: None,
            own_samples: false,
            own_times: false,
            baseline: None,
            load_baseline: false,
        };
        let (mut pattern, mut exact, mut bench) = (None, false, false);
        while let Some(argument) = arguments.next() {
            let (name, joined) = match argument.split_once('=') {
                Some((name, value)) if name.starts_with("--") => (name.to_owned(), Some(value.to_owned())),
                _ => (argument.clone(), None),
            };
            let takes_value = WITH_VALUE.split(' ').any(|option| option == name);
            let value = if takes_value { joined.or_else(|| arguments.next()) } else { None };
            match name.as_str() {
                "--bench" => bench = true,
                "--test" => options.test = true,
                "--list" => options.list = true,
                "--exact" => exact = true,
                "--profile-time" => options.profile = Some(parse_seconds(&value.unwrap_or_default())?),
                "--sample-size" => {
                    check_sample_size(&value.unwrap_or_default())?;
                    options.own_samples = true;
                }
                "-s" | "--save-baseline" => check_name(&value.unwrap_or_default())?,
                "--warm-up-time" | "--measurement-time" => options.own_times = true,
                "-b" | "--baseline" => options.baseline = value,
                "--load-baseline" => (options.load_baseline, options.baseline) = (true, value),
                text if !text.starts_with('-') => pattern = Some(argument),
                _ => {}
            }
        }
        options.test |= !bench;
        options.set = match set {
            Some(set) => set.parse().map_err(anyhow::Error::msg).context("TRANSFORMER_BENCH_SET")?,
            None if options.test => Set::Smoke,
            None => Set::Quick,
        };
        if let Some(pattern) = pattern {
            // Hyphens, which are in every id, need no escape outside of brackets.
            let escaped = || regex::escape(&pattern).replace("\\-", "-");
            let pattern = if exact { format!("^{}$", escaped()) } else { pattern };
            options.filter = suite::parse_filter(&pattern)?;
        }
        options.check_filter()?;
        Ok(options)
    }

    pub fn selects(&self, case: &Case) -> bool {
        self.filter.is_match(&case.to_string())
    }

    /// Returns an error if the filter matches no case of any framework.
    fn check_filter(&self) -> Result<()> {
        if cases(self.set).iter().any(|c| self.selects(c)) {
            return Ok(());
        }
        let in_full_set = cases(Set::Full).iter().filter(|c| self.selects(c)).count();
        let hint = if in_full_set > 0 && self.set != Set::Full {
            format!(
                "the full set has {in_full_set}: use {} --full, or TRANSFORMER_BENCH_SET=full",
                installation::command("bench")
            )
        } else {
            format!(
                "ids are workload/backend/precision/shape, and {} prints them",
                installation::command("list")
            )
        };
        bail!("no case of the {} set matches '{}'; {hint}", self.set, self.filter)
    }

    /// Returns an error if the baseline lacks a case, because Criterion would panic in the middle of the run.
    pub fn check_baseline(&self, criterion_home: &Path, selected: &[Case]) -> Result<()> {
        let Some(name) = &self.baseline else { return Ok(()) };
        for case in selected {
            let folder = criterion_folder(criterion_home, case).join(name);
            ensure!(
                folder.join("estimates.json").exists(),
                "no baseline '{name}' of {case} in {}: save one with --save-baseline {name}",
                criterion_home.display()
            );
        }
        Ok(())
    }
}

fn parse_seconds(text: &str) -> Result<Duration> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.with_context(|| format!("--profile-time '{text}' is not a number of seconds"))
}

fn check_sample_size(text: &str) -> Result<()> {
    let valid = text.parse::<usize>().is_ok_and(|size| size >= 10);
    ensure!(valid, "--sample-size '{text}' is not a number from 10, the minimum of Criterion");
    Ok(())
}
