//! `scripts/baseline`: keeps runs, and brings them back.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand};
use transformer_bench::report::markdown;
use transformer_bench::results::baseline::{self, Baseline};
use transformer_bench::results::machine::Machine;
use transformer_bench::results::{self, Status, printable};

/// Keeps runs as baselines in criterion-baselines/<machine>/<name>/.
///
/// NAME is a name, or MACHINE/NAME for another machine's.
#[derive(Args)]
#[command(after_help = "Examples:
  scripts/bench && scripts/baseline save nightly
  scripts/compare baseline:nightly
  scripts/baseline restore nightly && cargo bench -- --baseline nightly")]
pub struct Arguments {
    #[command(subcommand)]
    command: What,
}

#[derive(Subcommand)]
enum What {
    /// Saves the last run
    Save {
        name: String,
        /// Replace one of the same name
        #[arg(long)]
        force: bool,
    },
    /// Lists what is saved
    List,
    /// Shows one: machine, versions, figures
    Show { name: String },
    /// Puts one where Criterion and critcmp look for it
    Restore {
        name: String,
        /// Replace Criterion's of the same name
        #[arg(long)]
        force: bool,
        /// Although it is of another machine or other versions
        #[arg(long)]
        anyway: bool,
    },
    /// Deletes one
    Remove { name: String },
}

pub fn run(arguments: Arguments) -> Result<()> {
    let root = baseline::root();
    let machine = Machine::read();
    let slug = machine.slug();
    match arguments.command {
        What::Save { name, force } => {
            baseline::check_name(&name)?;
            let folder = results::folder();
            let kept = Baseline::of_last_run(&folder, &results::criterion_home(), &name, force)?;
            let report = markdown::render(&kept.results(), &kept.command);
            let file = baseline::write(&root, &name, &kept, &report, force)?;
            let measured = kept.cases.iter().filter(|k| k.record.status == Status::Measured).count();
            super::show(&format!("saved {measured} cases as {}\n", file.display()))?;
            if kept.machine.dirty {
                super::show(
                    "note: taken with uncommitted changes, so it can only be compared with --anyway\n",
                )?;
            }
        }
        What::List => list(&root)?,
        What::Show { name } => show(&baseline::find(&root, &name, &slug)?)?,
        What::Restore { name, force, anyway } => {
            let kept = baseline::read(&root, &name, &slug)?;
            // What this command can see without a framework: the rest is compare's.
            let seen = Machine { versions: kept.machine.versions.clone(), ..machine };
            let differences = kept.machine.differences(&seen);
            if !differences.is_empty() && !anyway {
                bail!("it is not of this machine (--anyway restores it): {}", differences.join("; "));
            }
            let short = name.rsplit('/').next().unwrap_or(&name);
            let count = kept.restore(&results::criterion_home(), short, force)?;
            super::show(&format!("restored {count} cases: cargo bench -- --baseline {short}\n"))?;
        }
        What::Remove { name } => {
            let file = baseline::find(&root, &name, &slug)?;
            let folder = file.parent().context("a file lies in a folder")?;
            ensure!(
                name.contains('/') || folder.parent().is_some_and(|machine| machine.ends_with(&slug)),
                "{name} is of another machine: say {} to remove it",
                folder.strip_prefix(&root).unwrap_or(folder).display()
            );
            baseline::remove(folder)?;
            super::show(&format!("removed {}\n", folder.display()))?;
        }
    }
    Ok(())
}

fn list(root: &Path) -> Result<()> {
    let mut text = String::new();
    for (machine, name, file) in baseline::list(root) {
        text.push_str(&printable(&match baseline::load(&file) {
            Ok(kept) => {
                let m = &kept.machine;
                let dirty = if m.dirty { " with changes" } else { "" };
                format!("{machine}/{name}: {} cases at {}{dirty}", kept.cases.len(), m.commit)
            }
            Err(reason) => format!("{machine}/{name}: {reason:#}"),
        }));
        text.push('\n');
    }
    super::show(&text)
}

fn show(file: &Path) -> Result<()> {
    let kept = baseline::load(file)?;
    let mut text = format!("{}\nmeasured by: {}\n\n", file.display(), printable(&kept.command));
    text.push_str(&serde_json::to_string_pretty(&kept.machine)?);
    text.push('\n');
    for case in &kept.cases {
        let record = &case.record;
        text.push_str(&match record.median_ns {
            Some(median) => format!("{:52} {:>14.3} ms\n", record.id, median * 1e-6),
            None => format!("{:52} {:?}: {}\n", record.id, record.status, printable(&record.reason)),
        });
    }
    super::show(&text)
}
