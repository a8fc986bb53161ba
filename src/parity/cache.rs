//! What has been proven, so that it need not be again: by the executable, the libraries that it has
//! loaded, the devices and the settings that decide what they compute.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::results::machine::{Machine, loaded_libraries};
use crate::results::{checksum, executable, lock_file, write_atomic};
use crate::suite::{Case, custom_model};

/// As many executables are remembered; the oldest are forgotten first.
const MOST: usize = 16;

#[derive(Default, Serialize, Deserialize)]
struct File {
    /// Newest last.
    executables: Vec<Proven>,
}

#[derive(Serialize, Deserialize)]
struct Proven {
    key: String,
    /// Ids, and how much of what is allowed each took.
    cases: BTreeMap<String, f64>,
}

/// The memory of one executable on this machine.
pub struct PassedChecks {
    path: PathBuf,
    key: String,
}

impl PassedChecks {
    /// Of the running executable, once its libraries are loaded.
    ///
    /// # Errors
    /// Where the executable can't be read.
    pub fn open(folder: &Path, machine: &Machine) -> Result<Self> {
        let mut text = executable()?;
        let m = machine;
        // A given model's name may stand for another configuration tomorrow.
        let _ = write!(text, "{:?}", custom_model::custom_model().map(|given| *given.model));
        let _ =
            write!(text, "{:?}", (&m.cpu, m.cores, &m.os, &m.gpus, &m.driver, &m.versions, &m.environment));
        let mut libraries = loaded_libraries();
        libraries.sort();
        for library in libraries {
            if let Ok(file) = fs::metadata(&library) {
                let _ = write!(text, "{library} {} {:?}", file.len(), file.modified().ok());
            }
        }
        let key = format!("{:016x}", checksum(text.as_bytes()));
        Ok(Self { path: folder.join("proofs.json"), key })
    }

    /// What is remembered; nothing where the file is damaged, which proves all again.
    fn read(&self) -> File {
        let text = fs::read_to_string(&self.path).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }

    /// How much of what is allowed a case took; None where it has not been proven.
    pub fn get(&self, case: &Case) -> Option<f64> {
        let file = self.read();
        file.executables.iter().find(|e| e.key == self.key)?.cases.get(&case.to_string()).copied()
    }

    /// Keeps a proof.
    ///
    /// # Errors
    /// Where it can't be written.
    pub fn add(&self, case: &Case, share: f64) -> Result<()> {
        let _alone = lock_file(&self.path)?;
        let mut file = self.read();
        let place = file.executables.iter().position(|e| e.key == self.key);
        let mut own = match place {
            Some(place) => file.executables.remove(place),
            None => Proven { key: self.key.clone(), cases: BTreeMap::new() },
        };
        own.cases.insert(case.to_string(), share);
        file.executables.push(own);
        let old = file.executables.len().saturating_sub(MOST);
        file.executables.drain(..old);
        write_atomic(&self.path, &serde_json::to_string_pretty(&file)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::scratch;

    #[test]
    fn proofs_of_two_at_once_are_all_kept() {
        let folder = scratch("proofs-at-once");
        let batches = 1..=20;
        let together = std::sync::Barrier::new(2);
        let case = |side: &str, b: usize| -> Case {
            format!("train-step/{side}-cpu/f32/indicator-b{b}").parse().unwrap()
        };
        std::thread::scope(|scope| {
            for side in ["torch", "mlx"] {
                let (folder, together, batches) = (&folder, &together, batches.clone());
                scope.spawn(move || {
                    let proofs = PassedChecks::open(folder, &Machine::default()).unwrap();
                    together.wait();
                    for b in batches {
                        proofs.add(&case(side, b), 0.5).unwrap();
                    }
                });
            }
        });
        let proofs = PassedChecks::open(&folder, &Machine::default()).unwrap();
        for b in batches {
            assert!(proofs.get(&case("torch", b)).is_some() && proofs.get(&case("mlx", b)).is_some(), "{b}");
        }
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_proof_is_kept_for_its_executable_and_machine_alone() {
        let folder = scratch("proofs");
        let machine = Machine::default();
        let case: Case = "train-step/torch-cpu/f32/indicator-b16".parse().unwrap();
        let other: Case = "train-step/torch-cpu/f32/indicator-b1".parse().unwrap();
        let proofs = PassedChecks::open(&folder, &machine).unwrap();
        assert!(proofs.get(&case).is_none());
        proofs.add(&case, 0.5).unwrap();
        assert!(
            PassedChecks::open(&folder, &machine).unwrap().get(&case) == Some(0.5)
                && proofs.get(&other).is_none()
        );
        let elsewhere = Machine { driver: "another".to_owned(), ..Machine::default() };
        let elsewhere = PassedChecks::open(&folder, &elsewhere).unwrap();
        assert!(elsewhere.get(&case).is_none());
        elsewhere.add(&other, 0.5).unwrap();
        assert!(proofs.get(&case).is_some(), "the other's proofs stay");
        fs::write(&proofs.path, "{").unwrap();
        assert!(proofs.get(&case).is_none(), "damage proves again");
        proofs.add(&case, 0.5).unwrap();
        assert!(proofs.get(&case).is_some());
        fs::remove_dir_all(folder).unwrap();
    }
}
