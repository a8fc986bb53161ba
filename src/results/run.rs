//! The last run: one file per measuring process, merged into one record.
//!
//! A filtered run is added to the last run of the same executable and machine. Any other run replaces it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::machine::Machine;
use super::{
    Record, Results, RunModel, Status, VERSION, energy, env_effects, first_step, interleaved_results,
    operations, read_json, run_again, validate,
};
use crate::files::{executable_checksum, write_atomic};
use crate::installation;
use crate::suite::{Case, Framework, Optimizer, Set, cases_for, custom_model};

/// The set and filter of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Selection {
    pub set: String,
    /// A regular expression over ids; empty for all cases.
    pub filter: String,
}

/// The record of one process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProcessRecord {
    pub framework: String,
    /// Checksum of the executable.
    pub executable: String,
    pub selections: Vec<Selection>,
    /// Number of selected cases.
    pub selected: usize,
    #[serde(flatten)]
    pub results: Results,
}

/// Describes how many cases are missing if the process ended early. Returns `None` for a complete record.
pub fn missing_cases(part: &ProcessRecord) -> Option<String> {
    let done = part.results.cases.len();
    (done < part.selected).then(|| format!("{}: {done} of {} cases", part.framework, part.selected))
}

/// Returns the path of a framework's record, or of the process that measures it in TF32.
pub fn part_path(folder: &Path, framework: Framework, tf32: bool) -> PathBuf {
    let tf32 = if tf32 { "-tf32" } else { "" };
    folder.join("run").join(format!("{framework}{tf32}.json"))
}

/// Reads the existing records with their paths.
fn parts(folder: &Path) -> Result<Vec<(PathBuf, ProcessRecord)>> {
    let paths = Framework::ALL.iter().flat_map(|&f| [false, true].map(|tf32| part_path(folder, f, tf32)));
    let read = |path: PathBuf| -> Result<(PathBuf, ProcessRecord)> {
        let part: ProcessRecord = read_json(&path, &run_again())?;
        let damaged = || format!("{} is damaged: {}", path.display(), run_again());
        // The run's own executable wrote it, so it has the present version.
        let version = part.results.version;
        ensure!(version == VERSION, "{}: its version is {version}, not {VERSION}", damaged());
        validate::check_results(&part.results).with_context(damaged)?;
        part.framework.parse::<Framework>().map_err(anyhow::Error::msg).with_context(damaged)?;
        Ok((path, part))
    };
    paths.filter(|path| path.exists()).map(read).collect()
}

/// Returns true if two records have the same code, model, machine and environment.
fn is_same_run(a: &Results, b: &Results) -> bool {
    let same_model = a.model == b.model;
    let (a, b) = (&a.machine, &b.machine);
    let key = |m: &Machine| {
        (m.commit.clone(), m.dirty, m.cpu.clone(), m.cores, m.os.clone(), m.gpus.clone(), m.profile.clone())
    };
    same_model
        && key(a) == key(b)
        && (&a.driver, &a.power, &a.environment) == (&b.driver, &b.power, &b.environment)
}

/// Writes the record of this process while it measures.
pub struct Writer {
    path: PathBuf,
    part: ProcessRecord,
    /// Records of the earlier run that this one extends.
    earlier: Vec<Record>,
}

impl Writer {
    /// Begins a record of the `selected` cases and removes the records of other runs. With a filter, earlier
    /// records of the same executable stay.
    ///
    /// # Errors
    /// Returns an error if the executable cannot be read or an old record cannot be removed.
    pub fn begin(
        folder: &Path,
        framework: Framework,
        tf32: bool,
        selection: Selection,
        selected: &[Case],
        machine: Machine,
    ) -> Result<Self> {
        let executable = executable_checksum()?;
        let path = part_path(folder, framework, tf32);
        let mut results = Results::new(machine, Vec::new());
        results.model = custom_model::custom_model().map(RunModel::of);
        let (mut selections, mut earlier) = (Vec::new(), Vec::new());
        let filtered = !selection.filter.is_empty();
        // An unreadable record is dropped too: this run replaces it.
        for (other, part) in parts(folder).unwrap_or_default() {
            let fits = is_same_run(&part.results, &results);
            let same = fits && part.executable == executable && filtered;
            if other == path && same {
                selections = part.selections;
                earlier = part.results.cases;
            } else if !fits || (part.framework == framework.id() && !same && !tf32) {
                fs::remove_file(&other).with_context(|| format!("{} can't be removed", other.display()))?;
            }
        }
        // A filter adds nothing to a set that was selected as a whole.
        let covered = selections.iter().any(|s| s.set == selection.set && s.filter.is_empty());
        if !covered && !selections.contains(&selection) {
            selections.push(selection);
        }
        let new = selected.iter().filter(|case| !earlier.iter().any(|old| old.id == case.to_string()));
        let selected = earlier.len() + new.count();
        let part =
            ProcessRecord { framework: framework.to_string(), executable, selections, selected, results };
        Ok(Self { path, part, earlier })
    }

    /// Writes the records so far and the earlier ones.
    pub fn save(&mut self, records: &[Record]) -> Result<()> {
        let old = self.earlier.iter().filter(|old| !records.iter().any(|new| new.id == old.id));
        self.part.results.cases = old.chain(records).cloned().collect();
        write_atomic(&self.path, &serde_json::to_string_pretty(&self.part)?)
    }
}

/// Reads the records of the last run and merges them in the order of the table.
///
/// # Errors
/// Returns an error if there is no run, or if the records come from different runs.
pub fn merge(folder: &Path) -> Result<(Results, Vec<ProcessRecord>)> {
    let parts: Vec<ProcessRecord> = parts(folder)?.into_iter().map(|(_, part)| part).collect();
    let Some(first) = parts.first() else {
        bail!("no run to report in {}: run {} first", folder.display(), installation::command("bench"));
    };
    let mut machine = first.results.machine.clone();
    for part in &parts[1..] {
        if !is_same_run(&first.results, &part.results) {
            bail!("the frameworks' records come from different runs: {}", run_again());
        }
        machine.add_versions(part.results.machine.versions.iter().cloned());
    }
    let model = first.results.model.clone();
    let mut records: Vec<Record> = parts.iter().flat_map(|p| p.results.cases.clone()).collect();
    validate::check_cases(&records)
        .with_context(|| format!("the records of the last run are damaged: {}", run_again()))?;
    let custom = model.as_ref().map(RunModel::custom_model);
    let cases = |&set: &Set| cases_for(set, custom.as_ref());
    let order: Vec<String> = Set::ALL.iter().rev().flat_map(cases).map(|c: Case| c.to_string()).collect();
    records.sort_by_key(|r| order.iter().position(|id| *id == r.id).unwrap_or(usize::MAX));
    let mut results = Results::new(machine, records);
    results.model = model;
    // Results of other commits do not belong to this run.
    results.env_effects = env_effects(folder)?;
    results.env_effects.retain(|s| s.commit == results.machine.commit);
    results.interleaved = interleaved_results(folder)?;
    results.interleaved.retain(|t| t.commit == results.machine.commit);
    results.operations = operations::read(folder)?;
    results.operations.retain(|explanation| explanation.commit == results.machine.commit);
    results.energy = energy::read(folder)?;
    results.energy.retain(|case| case.commit == results.machine.commit);
    results.first_steps = first_step::read(folder)?;
    results.first_steps.retain(|steps| steps.commit == results.machine.commit);
    validate::check_parts(&results)
        .with_context(|| format!("a file in {} is damaged: remove it", folder.display()))?;
    validate::check_comparisons(&results.interleaved, &results.env_effects)
        .with_context(|| format!("a comparison in {} is damaged: remove it", folder.display()))?;
    Ok((results, parts))
}

/// Replaces the result of a case of the last run by an error.
///
/// # Errors
/// Returns an error if a record cannot be read or written.
pub fn fail_case(folder: &Path, id: &str, reason: &str) -> Result<()> {
    for (path, mut part) in parts(folder)? {
        if let Some(record) = part.results.cases.iter_mut().find(|record| record.id == id) {
            let case = id.parse().map_err(anyhow::Error::msg)?;
            *record = Record::unmeasured(&case, Status::Error, reason);
            write_atomic(&path, &serde_json::to_string_pretty(&part)?)?;
        }
    }
    Ok(())
}

/// Returns the command that repeats the run.
pub fn command(parts: &[ProcessRecord]) -> String {
    let mut lines: Vec<String> = Vec::new();
    let custom = parts.iter().find_map(|part| part.results.model.as_ref());
    let model = custom.map_or_else(String::new, |custom| {
        let tokens = custom.lengths().map_or_else(String::new, |lengths| format!(" --tokens {lengths}"));
        let accumulate = match custom.micro_batches {
            1 => String::new(),
            count => format!(" --accumulate {count}"),
        };
        let m = custom.configuration;
        let lora = m.lora.map_or_else(String::new, |lora| format!(" --lora {}", lora.option()));
        let optimizer = match custom.optimizer {
            Optimizer::Adamw => String::new(),
            optimizer => format!(" --optimizer {optimizer}"),
        };
        format!(" --model {} --batch {}{tokens}{accumulate}{lora}{optimizer}", m.name, custom.batch)
    });
    for Selection { set, filter } in parts.iter().flat_map(|p| &p.selections) {
        let filter = if filter.is_empty() { String::new() } else { format!(" '{filter}'") };
        let line = format!("{} --{set}{model}{filter}", installation::command("bench"));
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    lines.join(" && ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tests::scratch;
    use crate::results::{
        EnvEffect, InterleavedResult, remove_last_run, save_env_effects, save_interleaved, settings_path,
    };

    fn part(framework: Framework, id: &str) -> ProcessRecord {
        let case: Case = id.parse().unwrap();
        ProcessRecord {
            framework: framework.to_string(),
            executable: "1".to_owned(),
            selected: 1,
            selections: vec![Selection { set: Set::Quick.to_string(), filter: String::new() }],
            results: Results::new(
                Machine::default(),
                vec![Record::unmeasured(&case, Status::Skipped, "not here")],
            ),
        }
    }

    #[test]
    fn parts_merge_in_the_order_of_the_table() {
        let folder = scratch("merge");
        for (framework, id) in [
            (Framework::Torch, "train-step/torch-cpu/f32/indicator-b16"),
            (Framework::Mlx, "attention/mlx-cpu/f32/b16-h8-t111-d32"),
        ] {
            let text = serde_json::to_string(&part(framework, id)).unwrap();
            write_atomic(&part_path(&folder, framework, false), &text).unwrap();
        }
        let (results, parts) = merge(&folder).unwrap();
        assert_eq!(parts.len(), 2);
        assert!(results.cases[0].id.starts_with("attention/"));
        let json = serde_json::to_value(&results).unwrap();
        assert_eq!(json["cases"][1]["status"], "skipped");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_case_of_the_last_run_can_become_an_error() {
        let folder = scratch("fail-case");
        let id = "train-step/torch-cpu/f32/indicator-b16";
        let text = serde_json::to_string(&part(Framework::Torch, id)).unwrap();
        write_atomic(&part_path(&folder, Framework::Torch, false), &text).unwrap();
        fail_case(&folder, id, "it stopped").unwrap();
        let record = merge(&folder).unwrap().0.cases.remove(0);
        assert_eq!((record.status, record.reason.as_str()), (Status::Error, "it stopped"));
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn settings_of_the_same_commit_come_with_the_run() {
        let folder = scratch("settings");
        let case = "train-step/torch-cpu/f32/indicator-b16";
        let text = serde_json::to_string(&part(Framework::Torch, case)).unwrap();
        write_atomic(&part_path(&folder, Framework::Torch, false), &text).unwrap();
        let setting = |ratio: f64, commit: &str| EnvEffect {
            variables: "OMP_NUM_THREADS=1".to_owned(),
            id: case.to_owned(),
            without_ns: 1e6,
            with_ns: 1e6 * ratio,
            ratio,
            ratio_ci: [0.9 * ratio, 1.1 * ratio],
            commit: commit.to_owned(),
        };
        save_env_effects(&folder, vec![setting(1.5, "")]).unwrap();
        save_env_effects(&folder, vec![setting(1.8, "")]).unwrap();
        let found = merge(&folder).unwrap().0.env_effects;
        assert_eq!(found, [setting(1.8, "")]);
        save_env_effects(&folder, vec![setting(1.8, "another")]).unwrap();
        assert!(merge(&folder).unwrap().0.env_effects.is_empty());
        write_atomic(&settings_path(&folder), "[").unwrap();
        assert!(merge(&folder).unwrap_err().to_string().contains("damaged"));
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_new_run_has_no_rounds_of_the_last_one() {
        let folder = scratch("last-run");
        let case = "train-step/torch-cpu/f32/indicator-b16";
        let text = serde_json::to_string(&part(Framework::Torch, case)).unwrap();
        let write = || write_atomic(&part_path(&folder, Framework::Torch, false), &text).unwrap();
        write();
        let rounds = InterleavedResult {
            base: case.to_owned(),
            head: case.to_owned(),
            base_ns: None,
            head_ns: None,
            ratio: 1.5,
            ratio_ci: [1.4, 1.6],
            rounds: 3,
            round_ns: Vec::new(),
            commit: String::new(),
        };
        save_interleaved(&folder, vec![rounds]).unwrap();
        assert_eq!(merge(&folder).unwrap().0.interleaved.len(), 1);
        remove_last_run(&folder).unwrap();
        remove_last_run(&folder).unwrap();
        assert!(merge(&folder).is_err());
        write();
        assert!(merge(&folder).unwrap().0.interleaved.is_empty());
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn an_empty_folder_and_a_damaged_part_say_what_to_do() {
        let folder = scratch("damaged");
        assert!(merge(&folder).unwrap_err().to_string().contains("scripts/bench"));
        write_atomic(&part_path(&folder, Framework::Mlx, false), "{\"machine\":").unwrap();
        assert!(merge(&folder).unwrap_err().to_string().contains("damaged"));
        fs::remove_dir_all(folder).unwrap();
    }

    const FORWARD: &str = "forward/torch-cpu/f32/indicator-b16";
    const STEP: &str = "train-step/torch-cpu/f32/indicator-b16";

    /// Runs cases with a filter; what the report then holds.
    fn run(folder: &Path, commit: &str, filter: &str, ids: &[(&str, &str)]) -> Vec<(String, String)> {
        let machine = Machine { commit: commit.to_owned(), ..Machine::default() };
        let selection = Selection { set: "quick".to_owned(), filter: filter.to_owned() };
        let selected: Vec<Case> = ids.iter().map(|(id, _)| id.parse().unwrap()).collect();
        let mut writer =
            Writer::begin(folder, Framework::Torch, false, selection, &selected, machine).unwrap();
        let record =
            |(id, reason): &(&str, &str)| Record::unmeasured(&id.parse().unwrap(), Status::Skipped, *reason);
        writer.save(&ids.iter().map(record).collect::<Vec<_>>()).unwrap();
        merge(folder).unwrap().0.cases.into_iter().map(|r| (r.id, r.reason)).collect()
    }

    #[test]
    fn a_filtered_run_adds_to_the_last_one_and_loses_nothing() {
        let folder = scratch("filtered");
        let of = |list: &[(&str, &str)]| {
            list.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect::<Vec<_>>()
        };
        assert_eq!(run(&folder, "a", "", &[(FORWARD, "1"), (STEP, "1")]), of(&[(FORWARD, "1"), (STEP, "1")]));
        assert_eq!(run(&folder, "a", "train", &[(STEP, "2")]), of(&[(FORWARD, "1"), (STEP, "2")]));
        assert_eq!(command(&merge(&folder).unwrap().1), "./scripts/bench --quick");
        // Another commit, and a run of all, start a new record.
        assert_eq!(run(&folder, "b", "train", &[(STEP, "3")]), of(&[(STEP, "3")]));
        assert_eq!(run(&folder, "b", "forward", &[(FORWARD, "3")]), of(&[(FORWARD, "3"), (STEP, "3")]));
        assert_eq!(
            command(&merge(&folder).unwrap().1),
            "./scripts/bench --quick 'train' && ./scripts/bench --quick 'forward'"
        );
        assert_eq!(run(&folder, "b", "", &[(STEP, "4")]), of(&[(STEP, "4")]));
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_run_that_was_cut_off_says_so() {
        let folder = scratch("cut");
        let selection = Selection { set: "quick".to_owned(), filter: String::new() };
        let selected = [FORWARD, STEP].map(|id| id.parse().unwrap());
        let mut writer =
            Writer::begin(&folder, Framework::Torch, false, selection, &selected, Machine::default())
                .unwrap();
        let record = |id: &Case| Record::unmeasured(id, Status::Skipped, "x");
        writer.save(&[record(&selected[0])]).unwrap();
        assert_eq!(missing_cases(&merge(&folder).unwrap().1[0]).as_deref(), Some("torch: 1 of 2 cases"));
        writer.save(&selected.each_ref().map(record)).unwrap();
        assert_eq!(missing_cases(&merge(&folder).unwrap().1[0]), None);
        fs::remove_dir_all(folder).unwrap();
    }
}
