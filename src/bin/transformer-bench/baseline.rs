//! `scripts/baseline`: saves and restores runs.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand};
use transformer_bench::installation;
use transformer_bench::report::markdown;
use transformer_bench::results::baseline::{self, Baseline};
use transformer_bench::results::machine::Machine;
use transformer_bench::results::{self, Status};
use transformer_bench::text::printable;

use super::send;

/// Saves runs as baselines in criterion-baselines/MACHINE/NAME/, or in the data folder of an installation.
///
/// NAME alone refers to this machine, MACHINE/NAME to any machine.
#[derive(Args)]
#[command(after_help = "Examples:
  scripts/bench && scripts/baseline save nightly
  scripts/baseline save first --send
  scripts/compare baseline:nightly
  scripts/baseline restore nightly && cargo bench -- --baseline nightly")]
pub struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Saves the last run
    Save {
        name: String,
        /// Replace a baseline of the same name
        #[arg(long)]
        force: bool,
        /// Write the text of an issue with which you can send the results, and print both. Nothing is sent
        #[arg(long)]
        send: bool,
    },
    /// Lists the saved baselines
    List,
    /// Prints the machine, versions and results of a baseline
    Show { name: String },
    /// Copies a baseline to the folder in which Criterion and critcmp find it
    Restore {
        name: String,
        /// Replace Criterion's baseline of the same name
        #[arg(long)]
        force: bool,
        /// Restore the baseline of another machine or of other versions
        #[arg(long)]
        allow_mismatch: bool,
    },
    /// Deletes a baseline
    Remove { name: String },
}

/// Saves, lists, shows, restores or removes baselines.
pub fn run(arguments: Arguments) -> Result<()> {
    let root = baseline::root();
    let machine = Machine::read();
    let slug = machine.slug();
    match arguments.action {
        Action::Save { name, force, send } => save(&root, &name, force, send),
        Action::List => list(&root),
        Action::Show { name } => show(&baseline::find(&root, &name, &slug)?),
        Action::Restore { name, force, allow_mismatch } => {
            let saved = baseline::read(&root, &name, &slug)?;
            // This command loads no framework, so it cannot compare versions.
            let here = Machine { versions: saved.machine.versions.clone(), ..machine };
            let differences = saved.machine.differences(&here);
            if !differences.is_empty() && !allow_mismatch {
                bail!("another machine saved it (--allow-mismatch restores it): {}", differences.join("; "));
            }
            let short = name.rsplit('/').next().unwrap_or(&name);
            let count = saved.restore(&results::criterion_home(), short, force)?;
            let home = results::criterion_home();
            super::show(&match installation::find() {
                Some(_) => format!("restored {count} cases in {}\n", home.display()),
                None => format!("restored {count} cases: cargo bench -- --baseline {short}\n"),
            })
        }
        Action::Remove { name } => {
            let file = baseline::find(&root, &name, &slug)?;
            let folder = file.parent().context("a baseline without a folder")?;
            ensure!(
                name.contains('/') || folder.parent().is_some_and(|machine| machine.ends_with(&slug)),
                "{name} belongs to another machine: write {} to remove it",
                folder.strip_prefix(&root).unwrap_or(folder).display()
            );
            baseline::remove(folder)?;
            super::show(&format!("removed {}\n", folder.display()))
        }
    }
}

fn save(root: &Path, name: &str, force: bool, send: bool) -> Result<()> {
    baseline::check_name(name)?;
    let saved = Baseline::of_last_run(&results::folder(), &results::criterion_home(), name, force)?;
    let report = markdown::render(&saved.results(), &saved.command);
    let file = baseline::write(root, name, &saved, &report, force)?;
    let measured = saved.cases.iter().filter(|case| case.record.status == Status::Measured).count();
    super::show(&format!("saved {measured} cases as {}\n", file.display()))?;
    if saved.machine.dirty {
        super::show("note: the checkout has uncommitted changes, so comparisons need --allow-mismatch\n")?;
    }
    if send {
        show(&file)?;
        send::write(&saved, &file)?;
    }
    Ok(())
}

fn list(root: &Path) -> Result<()> {
    let mut text = String::new();
    for (machine, name, file) in baseline::list(root) {
        let line = match baseline::load(&file) {
            Ok(saved) => {
                let m = &saved.machine;
                let dirty = if m.dirty { " with changes" } else { "" };
                format!("{machine}/{name}: {} cases at {}{dirty}", saved.cases.len(), m.commit)
            }
            Err(reason) => format!("{machine}/{name}: {reason:#}"),
        };
        text.push_str(&printable(&line));
        text.push('\n');
    }
    super::show(&text)
}

fn show(file: &Path) -> Result<()> {
    let saved = baseline::load(file)?;
    let mut text = format!("{}\nmeasured by: {}\n\n", printable(&file.to_string_lossy()), saved.command);
    text.push_str(&serde_json::to_string_pretty(&saved.machine)?);
    text.push('\n');
    for case in &saved.cases {
        let record = &case.record;
        text.push_str(&match record.median_ns {
            Some(median) => format!("{:52} {:>14.3} ms\n", record.id, median * 1e-6),
            None => format!("{:52} {:?}: {}\n", record.id, record.status, record.reason),
        });
    }
    super::show(&text)
}
