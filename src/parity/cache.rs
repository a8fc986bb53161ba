//! The cache of passed parity checks.
//!
//! Its key covers the executable, its loaded libraries, the devices and the settings that affect results.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::files::{checksum, executable_checksum, lock_file, read_text, write_atomic};
use crate::process::loaded_libraries;
use crate::suite::{Case, custom_model};

/// Number of executables in the cache. The oldest are removed first.
const MAX_EXECUTABLES: usize = 16;

#[derive(Default, Serialize, Deserialize)]
struct File {
    /// The newest is last.
    executables: Vec<Executable>,
}

#[derive(Serialize, Deserialize)]
struct Executable {
    key: String,
    /// The largest error / tolerance of each case, by id.
    cases: BTreeMap<String, f64>,
}

/// The passed checks of one executable on this machine.
pub struct PassedChecks {
    path: PathBuf,
    key: String,
}

impl PassedChecks {
    /// Opens the cache for the running executable, after it has loaded its libraries. `machine` describes the
    /// devices, drivers and settings.
    ///
    /// # Errors
    /// Returns an error if the executable cannot be read.
    pub fn open(folder: &Path, machine: &str) -> Result<Self> {
        let mut text = executable_checksum()? + machine;
        // The name of a custom model may later belong to another configuration.
        let _ = write!(text, "{:?}", custom_model::custom_model().map(|custom| *custom.model));
        let mut libraries = loaded_libraries();
        libraries.sort();
        for library in libraries {
            if let Ok(file) = fs::metadata(&library) {
                let _ = write!(text, "{library} {} {:?}", file.len(), file.modified().ok());
            }
        }
        let key = format!("{:016x}", checksum(text.as_bytes()));
        Ok(Self { path: folder.join("checks.json"), key })
    }

    /// Reads the cache. A damaged file counts as empty, so everything is checked again.
    fn read(&self) -> File {
        let text = read_text(&self.path).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }

    /// Returns the largest error / tolerance of a case, or `None` if no passed check is cached.
    pub fn get(&self, case: &Case) -> Option<f64> {
        let file = self.read();
        file.executables.iter().find(|e| e.key == self.key)?.cases.get(&case.to_string()).copied()
    }

    /// Adds a passed check.
    ///
    /// # Errors
    /// Returns an error if the file cannot be written.
    pub fn add(&self, case: &Case, ratio: f64) -> Result<()> {
        let _lock = lock_file(&self.path)?;
        let mut file = self.read();
        let mut own = match file.executables.iter().position(|e| e.key == self.key) {
            Some(index) => file.executables.remove(index),
            None => Executable { key: self.key.clone(), cases: BTreeMap::new() },
        };
        own.cases.insert(case.to_string(), ratio);
        file.executables.push(own);
        let old = file.executables.len().saturating_sub(MAX_EXECUTABLES);
        file.executables.drain(..old);
        write_atomic(&self.path, &serde_json::to_string_pretty(&file)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tests::scratch;

    fn case(id: &str) -> Case {
        format!("train-step/{id}").parse().unwrap()
    }

    #[test]
    fn checks_of_two_threads_are_all_cached() {
        let folder = scratch("checks-of-two-threads");
        let open = || PassedChecks::open(&folder, "").unwrap();
        let case = |side: &str, batch: usize| case(&format!("{side}-cpu/f32/indicator-b{batch}"));
        let (batches, start) = (1..=20, std::sync::Barrier::new(2));
        std::thread::scope(|scope| {
            for side in ["torch", "mlx"] {
                let (open, case, batches, start) = (&open, &case, batches.clone(), &start);
                scope.spawn(move || {
                    let checks = open();
                    start.wait();
                    for batch in batches {
                        checks.add(&case(side, batch), 0.5).unwrap();
                    }
                });
            }
        });
        let checks = open();
        for batch in batches {
            for side in ["torch", "mlx"] {
                assert!(checks.get(&case(side, batch)).is_some(), "{side} {batch}");
            }
        }
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_check_is_cached_for_its_executable_and_machine_only() {
        let folder = scratch("checks");
        let [checked, unchecked] = ["torch-cpu/f32/indicator-b16", "torch-cpu/f32/indicator-b1"].map(case);
        let open = |machine| PassedChecks::open(&folder, machine).unwrap();
        let checks = open("");
        assert!(checks.get(&checked).is_none());
        checks.add(&checked, 0.5).unwrap();
        assert!(open("").get(&checked) == Some(0.5) && checks.get(&unchecked).is_none());
        let other = open("another driver");
        assert!(other.get(&checked).is_none());
        other.add(&unchecked, 0.5).unwrap();
        assert!(checks.get(&checked).is_some(), "the check of the first machine is still cached");
        fs::write(&checks.path, "{").unwrap();
        assert!(checks.get(&checked).is_none(), "a damaged file counts as empty");
        checks.add(&checked, 0.5).unwrap();
        assert!(checks.get(&checked).is_some());
        fs::remove_dir_all(folder).unwrap();
    }
}
