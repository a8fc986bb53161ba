//! Baselines: saved runs with their samples and machine, as text files that can be committed.
//!
//! A baseline is `criterion-baselines/<machine>/<name>/baseline.json`, with a `report.md` next to it. The JSON
//! has one line per case, so that a diff shows which cases changed. Its third line is a checksum (FNV-1a,
//! 64 bits) of the lines that follow.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::energy::CaseEnergy;
use super::first_step::FirstSteps;
use super::machine::Machine;
use super::operations::Explanation;
use super::run::{self, ProcessRecord};
use super::upgrade::{self, VERSION};
use super::validate;
use super::{EnvEffect, InterleavedResult, Record, Results, RunModel, Status, deserialize_run_model};
use crate::files;
use crate::installation;
use crate::results;
use crate::suite::Case;
use crate::text;

const FORMAT: &str = "transformer-bench baseline";

/// A case with Criterion's files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedCase {
    #[serde(flatten)]
    pub record: Record,
    /// Criterion's `sample.json`, `estimates.json` and `benchmark.json`; null if the case was not measured.
    pub sample: Value,
    pub estimates: Value,
    pub benchmark: Value,
}

impl SavedCase {
    /// Returns the samples in seconds per step, in run order.
    pub fn samples(&self) -> Vec<f64> {
        let list = |name: &str| -> Vec<f64> {
            self.sample[name].as_array().into_iter().flatten().filter_map(Value::as_f64).collect()
        };
        list("times").iter().zip(list("iters")).map(|(time, steps)| time * 1e-9 / steps).collect()
    }

    fn is_measured(&self) -> bool {
        self.record.status == Status::Measured
    }
}

/// The set and filter that selected the cases of one framework.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Selection {
    pub framework: String,
    pub set: String,
    pub filter: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    /// The command that repeats the run.
    pub command: String,
    pub selections: Vec<Selection>,
    pub machine: Machine,
    /// The custom model of the run.
    #[serde(default, deserialize_with = "deserialize_run_model", skip_serializing_if = "Option::is_none")]
    pub model: Option<RunModel>,
    pub cases: Vec<SavedCase>,
    /// Interleaved results at the commit of the run.
    #[serde(default)]
    pub interleaved: Vec<InterleavedResult>,
    #[serde(default)]
    pub env_effects: Vec<EnvEffect>,
    #[serde(default)]
    pub operations: Vec<Explanation>,
    #[serde(default)]
    pub first_steps: Vec<FirstSteps>,
    #[serde(default)]
    pub energy: Vec<CaseEnergy>,
}

impl Baseline {
    /// Returns the last run, from its records and Criterion's files.
    ///
    /// # Errors
    /// Returns an error if there is no run, or if Criterion's files or its baseline `named` belong to another
    /// run. An incomplete run is an error too, unless `cut` is true.
    pub fn of_last_run(folder: &Path, home: &Path, named: &str, cut: bool) -> Result<Self> {
        let (merged, parts) = run::merge(folder)?;
        let left: Vec<String> = parts.iter().filter_map(run::missing_cases).collect();
        ensure!(
            cut || left.is_empty(),
            "the last run was cut off ({}): run {bench} again, or --force saves what there is",
            left.join(", "),
            bench = installation::command("bench")
        );
        let mut cases = Vec::new();
        for record in merged.cases {
            cases.push(save_case(home, record, named)?);
        }
        ensure!(
            cases.iter().any(SavedCase::is_measured),
            "the last run measured nothing: run {} first",
            installation::command("bench")
        );
        let of = |p: &ProcessRecord| -> Vec<Selection> {
            let selection = |s: &run::Selection| Selection {
                framework: p.framework.clone(),
                set: s.set.clone(),
                filter: s.filter.clone(),
            };
            p.selections.iter().map(selection).collect()
        };
        let selections: Vec<Selection> = parts.iter().flat_map(of).collect();
        Ok(Self {
            command: run::command(&parts),
            selections,
            machine: merged.machine,
            model: merged.model,
            cases,
            interleaved: merged.interleaved,
            env_effects: merged.env_effects,
            operations: merged.operations,
            first_steps: merged.first_steps,
            energy: merged.energy,
        })
    }

    /// Returns the text of the file.
    pub fn render(&self) -> Result<String> {
        let mut body = String::new();
        body.push_str(&format!("\"command\": {},\n", serde_json::to_string(&self.command)?));
        body.push_str(&format!("\"selections\": {},\n", serde_json::to_string(&self.selections)?));
        body.push_str(&format!("\"machine\": {},\n", serde_json::to_string_pretty(&self.machine)?));
        if let Some(model) = &self.model {
            body.push_str(&format!("\"model\": {},\n", serde_json::to_string(model)?));
        }
        fn lines<T: Serialize>(of: &[T]) -> Result<String> {
            Ok(of.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>()?.join(",\n"))
        }
        for (name, lines) in [
            ("interleaved", lines(&self.interleaved)?),
            ("env_effects", lines(&self.env_effects)?),
            ("operations", lines(&self.operations)?),
            ("first_steps", lines(&self.first_steps)?),
            ("energy", lines(&self.energy)?),
        ] {
            if !lines.is_empty() {
                body.push_str(&format!("\"{name}\": [\n{lines}\n],\n"));
            }
        }
        body.push_str(&format!("\"cases\": [\n{}\n]\n}}\n", lines(&self.cases)?));
        Ok(format!(
            "{{\"format\": \"{FORMAT}\",\n\"version\": {VERSION},\n\"checksum\": \"{:016x}\",\n{body}",
            files::checksum(body.as_bytes())
        ))
    }

    /// Parses the text of a file and makes its strings printable.
    ///
    /// # Errors
    /// Returns an error that begins with `place` if the text is damaged, changed or of a newer version.
    pub fn parse(file: &str, place: &str) -> Result<Self> {
        ensure!(!file.trim().is_empty(), "{place} is empty: restore it from git, or save it again");
        let mut value = text::parse_json(file)
            .with_context(|| format!("{place} is damaged: restore it from git, or save it again"))?;
        ensure!(value["format"] == FORMAT, "{place} is not a baseline of this suite");
        let version = validate::check_version(&value["version"], place)?;
        let body = file.splitn(4, '\n').nth(3).unwrap_or("");
        ensure!(
            value["checksum"] == format!("{:016x}", files::checksum(body.as_bytes())),
            "{place} was changed after it was saved: restore it from git, or save it again"
        );
        upgrade::upgrade(&mut value, version);
        let baseline: Self = serde_json::from_value(value).with_context(|| format!("{place} is damaged"))?;
        validate::check_results(&baseline.results()).with_context(|| place.to_owned())?;
        for kept in &baseline.cases {
            ensure!(
                !kept.is_measured()
                    || [&kept.sample, &kept.estimates, &kept.benchmark].iter().all(|v| v.is_object()),
                "{place}: {} lacks Criterion's files",
                kept.record.id
            );
            let samples = kept.samples();
            ensure!(
                !kept.is_measured()
                    || (!samples.is_empty() && samples.iter().all(|s| s.is_finite() && *s > 0.0)),
                "{place}: {} has no valid samples",
                kept.record.id
            );
        }
        ensure!(baseline.cases.iter().any(SavedCase::is_measured), "{place} holds no measured case");
        Ok(baseline)
    }

    pub fn results(&self) -> Results {
        let records = self.cases.iter().map(|kept| kept.record.clone()).collect();
        Results {
            model: self.model.clone(),
            interleaved: self.interleaved.clone(),
            env_effects: self.env_effects.clone(),
            operations: self.operations.clone(),
            first_steps: self.first_steps.clone(),
            energy: self.energy.clone(),
            ..Results::new(self.machine.clone(), records)
        }
    }

    pub fn case(&self, id: &str) -> Option<&SavedCase> {
        self.cases.iter().find(|kept| kept.record.id == id && kept.is_measured())
    }

    /// Copies the samples to where Criterion and critcmp look for a baseline called `name`. Returns the number of
    /// cases.
    ///
    /// # Errors
    /// Returns an error if Criterion already has a baseline of that name, unless `force` is true.
    pub fn restore(&self, home: &Path, name: &str, force: bool) -> Result<usize> {
        let mut folders = Vec::new();
        for kept in self.cases.iter().filter(|kept| kept.is_measured()) {
            let case: Case = kept.record.id.parse().map_err(anyhow::Error::msg)?;
            let folder = results::criterion_folder(home, &case).join(name);
            ensure!(
                force || !folder.exists(),
                "Criterion has a baseline '{name}' of {case} already: --force replaces it"
            );
            folders.push((folder, kept));
        }
        for (folder, kept) in &folders {
            for (file, value) in
                [("sample", &kept.sample), ("estimates", &kept.estimates), ("benchmark", &kept.benchmark)]
            {
                files::write_atomic(&folder.join(format!("{file}.json")), &serde_json::to_string(value)?)?;
            }
        }
        Ok(folders.len())
    }
}

fn save_case(home: &Path, record: Record, named: &str) -> Result<SavedCase> {
    let mut kept = SavedCase { record, sample: Value::Null, estimates: Value::Null, benchmark: Value::Null };
    if !kept.is_measured() {
        return Ok(kept);
    }
    let id = kept.record.id.clone();
    let case: Case = id.parse().map_err(anyhow::Error::msg)?;
    let folder = results::criterion_folder(home, &case);
    let advice = results::run_again();
    let read = |run: &str, name: &str| -> Result<Value> {
        let path = folder.join(run).join(name);
        ensure!(path.exists(), "Criterion's {} is missing: {advice}", path.display());
        results::read_json(&path, &advice)
    };
    kept.estimates = read("new", "estimates.json")?;
    let same = |estimates: &Value| estimates["median"]["point_estimate"].as_f64() == kept.record.median_ns;
    ensure!(
        same(&kept.estimates),
        "Criterion's files of {id} are of another run than the last one: {advice}"
    );
    if folder.join(named).join("estimates.json").exists() && !same(&read(named, "estimates.json")?) {
        bail!(
            "Criterion's baseline '{named}' of {id} is of another run than the last one: choose another name, \
             or run cargo bench -- --save-baseline {named} again"
        );
    }
    kept.sample = read("new", "sample.json")?;
    kept.benchmark = read("new", "benchmark.json")?;
    Ok(kept)
}

/// Returns the folder of all baselines: in the current folder or in the checkout that built this program, or in the
/// user's data folder in an installation.
pub fn root() -> PathBuf {
    if let Some(own) = installation::find() {
        return own.data_folder().join("baselines");
    }
    let here = Path::new("criterion-baselines");
    if here.is_dir() { here.to_owned() } else { Path::new(env!("CARGO_MANIFEST_DIR")).join(here) }
}

/// Lists all baselines under `root` as machine, name and file.
pub fn list(root: &Path) -> Vec<(String, String, PathBuf)> {
    let mut all = Vec::new();
    let entries = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path());
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    for machine in entries(root) {
        for folder in entries(&machine) {
            let file = folder.join("baseline.json");
            if file.exists() {
                all.push((name(&machine), name(&folder), file));
            }
        }
    }
    all.sort();
    all
}

/// Checks that a name is a plain folder name and not one of Criterion's.
///
/// # Errors
/// Returns an error that lists the allowed characters.
pub fn check_name(name: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    ensure!(
        !name.is_empty() && !name.starts_with(['.', '-']) && name.chars().all(good),
        "'{name}' is not a valid baseline name: use letters, digits, '-', '_' and '.'"
    );
    // Criterion's own folders.
    ensure!(
        !["new", "base", "change", "report"].contains(&name),
        "'{name}' is a name that Criterion uses itself"
    );
    Ok(())
}

/// Returns the file of the baseline `NAME` or `MACHINE/NAME`. For a bare name, this machine (`slug`) comes first.
///
/// # Errors
/// Returns an error if no baseline or several baselines have the name.
pub fn find(root: &Path, text: &str, slug: &str) -> Result<PathBuf> {
    let all = list(root);
    let fits: Vec<_> = match text.split_once('/') {
        Some((machine, name)) => all.iter().filter(|(m, n, _)| m == machine && n == name).collect(),
        None => all.iter().filter(|(_, n, _)| n == text).collect(),
    };
    if let Some(own) = fits.iter().find(|(machine, ..)| machine == slug) {
        return Ok(own.2.clone());
    }
    match fits.as_slice() {
        [one] => Ok(one.2.clone()),
        [] => {
            let known: Vec<String> = all.iter().map(|(m, n, _)| format!("{m}/{n}")).collect();
            let known = if known.is_empty() { "there are none yet".to_owned() } else { known.join(", ") };
            bail!("no baseline '{text}' in {}: {known}", root.display())
        }
        several => {
            let names: Vec<String> = several.iter().map(|(m, n, _)| format!("{m}/{n}")).collect();
            bail!("'{text}' is the name of several baselines: write {}", names.join(" or "))
        }
    }
}

/// Loads a baseline from a file.
pub fn load(file: &Path) -> Result<Baseline> {
    Baseline::parse(&files::read_text(file)?, &file.display().to_string())
}

/// Loads the baseline `NAME` or `MACHINE/NAME`.
pub fn read(root: &Path, text: &str, slug: &str) -> Result<Baseline> {
    load(&find(root, text, slug)?)
}

/// Writes a baseline and its report atomically, and returns the file.
///
/// # Errors
/// Returns an error if the name exists, unless `force` is true. An older baseline is then unchanged.
pub fn write(root: &Path, name: &str, baseline: &Baseline, report: &str, force: bool) -> Result<PathBuf> {
    check_name(name)?;
    let folder = root.join(baseline.machine.slug()).join(name);
    let file = folder.join("baseline.json");
    ensure!(
        force || !file.exists(),
        "{} exists already: choose another name, or --force to replace it",
        file.display()
    );
    // Both files exist in full before either takes its place.
    let new = |name: &str| folder.join(format!("{name}.new"));
    let place = || -> Result<()> {
        files::write_atomic(&new("report.md"), report)?;
        files::write_atomic(&new("baseline.json"), &baseline.render()?)?;
        for name in ["report.md", "baseline.json"] {
            fs::rename(new(name), folder.join(name))
                .with_context(|| format!("{} could not be written", folder.join(name).display()))?;
        }
        Ok(())
    };
    place().inspect_err(|_| {
        let _ = fs::remove_file(new("report.md"));
        let _ = fs::remove_file(new("baseline.json"));
        // This fails if the folder has other files.
        let _ = fs::remove_dir(&folder);
    })?;
    Ok(file)
}

/// Removes the files of a baseline, and its folder if it is empty.
///
/// # Errors
/// Returns an error if a file cannot be removed.
pub fn remove(folder: &Path) -> Result<()> {
    for name in ["baseline.json", "report.md"] {
        let path = folder.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("{} could not be removed", path.display()));
            }
            _ => {}
        }
    }
    let _ = fs::remove_dir(folder);
    Ok(())
}

#[cfg(test)]
#[path = "baseline_tests.rs"]
mod tests;
