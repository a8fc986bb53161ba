//! What of the command line and the environment the harness itself must know. The rest
//! is Criterion's, which reads the same arguments.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use regex::Regex;
use transformer_bench::results::baseline::check_name;
use transformer_bench::results::criterion_folder;
use transformer_bench::suite::{self, Case, Set, cases};

/// Criterion's options that are followed by a value.
const WITH_VALUE: &[&str] = &[
    "-c",
    "--color",
    "-s",
    "--save-baseline",
    "-b",
    "--baseline",
    "--baseline-lenient",
    "--format",
    "--profile-time",
    "--load-baseline",
    "--sample-size",
    "--warm-up-time",
    "--measurement-time",
    "--nresamples",
    "--noise-threshold",
    "--confidence-level",
    "--significance-level",
    "--plotting-backend",
    "--output-format",
];

#[derive(Debug)]
pub enum Filter {
    All,
    Pattern(Regex),
    Exact(String),
}

#[derive(Debug)]
pub struct Options {
    pub set: Set,
    pub filter: Filter,
    /// `--test`, or run by `cargo test`: every case once, nothing written.
    pub test: bool,
    pub list: bool,
    /// Profiles are taken, over so long.
    pub profile: Option<Duration>,
    /// The user's own sampling settings win over the plan.
    pub own_samples: bool,
    pub own_times: bool,
    /// A baseline that must be there.
    pub baseline: Option<String>,
    pub load_baseline: bool,
}

impl Options {
    pub fn read(mut arguments: impl Iterator<Item = String>, set: Option<String>) -> Result<Self> {
        let mut options = Self {
            set: Set::Quick,
            filter: Filter::All,
            test: false,
            list: false,
            profile: None,
            own_samples: false,
            own_times: false,
            baseline: None,
            load_baseline: false,
        };
        let (mut pattern, mut exact, mut bench, mut test) = (None, false, false, false);
        while let Some(argument) = arguments.next() {
            let (name, joined) = match argument.split_once('=') {
                Some((name, value)) if name.starts_with("--") => (name.to_owned(), Some(value.to_owned())),
                _ => (argument.clone(), None),
            };
            let value =
                if WITH_VALUE.contains(&name.as_str()) { joined.or_else(|| arguments.next()) } else { None };
            match name.as_str() {
                "--bench" => bench = true,
                "--test" => test = true,
                "--list" => options.list = true,
                "--exact" => exact = true,
                "--profile-time" => {
                    let seconds = value.as_deref().and_then(|v| v.parse().ok());
                    let time = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok());
                    let told = value.unwrap_or_default();
                    options.profile = Some(time.with_context(|| format!("--profile-time {told}: seconds"))?);
                }
                "--sample-size" => {
                    let enough =
                        value.as_deref().and_then(|v| v.parse::<usize>().ok()).is_some_and(|n| n >= 10);
                    ensure!(
                        enough,
                        "--sample-size {}: Criterion takes 10 at least",
                        value.unwrap_or_default()
                    );
                    options.own_samples = true;
                }
                "-s" | "--save-baseline" => check_name(&value.unwrap_or_default())?,
                "--warm-up-time" | "--measurement-time" => options.own_times = true,
                "-b" | "--baseline" => options.baseline = value,
                "--load-baseline" => {
                    options.load_baseline = true;
                    options.baseline = value;
                }
                text if !text.starts_with('-') => pattern = Some(argument),
                _ => {}
            }
        }
        options.test = !bench || test;
        if options.test {
            options.set = Set::Smoke;
        }
        if let Some(set) = set {
            options.set = set.parse().map_err(anyhow::Error::msg).context("TRANSFORMER_BENCH_SET")?;
        }
        if let Some(pattern) = pattern {
            options.filter =
                if exact { Filter::Exact(pattern) } else { Filter::Pattern(suite::parse_filter(&pattern)?) };
        }
        options.check_filter()?;
        Ok(options)
    }

    pub fn selects(&self, case: &Case) -> bool {
        let id = case.to_string();
        match &self.filter {
            Filter::All => true,
            Filter::Pattern(pattern) => pattern.is_match(&id),
            Filter::Exact(exact) => *exact == id,
        }
    }

    pub fn filter_text(&self) -> String {
        match &self.filter {
            Filter::All => String::new(),
            Filter::Pattern(pattern) => pattern.as_str().to_owned(),
            Filter::Exact(exact) => exact.clone(),
        }
    }

    /// A filter that no case of either framework matches is a mistake.
    fn check_filter(&self) -> Result<()> {
        if cases(self.set).iter().any(|c| self.selects(c)) {
            return Ok(());
        }
        let elsewhere = cases(Set::Full).iter().filter(|c| self.selects(c)).count();
        let hint = if elsewhere > 0 && self.set != Set::Full {
            format!(
                "{elsewhere} cases of the full set do: ./scripts/bench --full, or TRANSFORMER_BENCH_SET=full"
            )
        } else {
            "ids read workload/backend/precision/shape, and 'cargo bench -- --list' shows them".to_owned()
        };
        bail!("no case of the {} set matches '{}'; {hint}", self.set, self.filter_text())
    }

    /// Criterion panics half-way through where a baseline is missing.
    pub fn check_baseline(&self, criterion_home: &Path, selected: &[Case]) -> Result<()> {
        let Some(name) = &self.baseline else { return Ok(()) };
        for case in selected {
            let folder = criterion_folder(criterion_home, case).join(name);
            if !folder.join("estimates.json").exists() {
                bail!(
                    "no baseline '{name}' of {case} in {}: save one with --save-baseline {name}",
                    criterion_home.display()
                );
            }
        }
        Ok(())
    }
}
