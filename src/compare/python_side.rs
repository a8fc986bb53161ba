//! A side of a comparison whose steps are the Python counterparts (`scripts/python_counterparts/side.py`).

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::worker::{Side, Threads, Worker};
use crate::installation;
use crate::suite::{Case, Framework};

/// Returns the Python interpreter that has torch and its PYTHONPATH, or `None` if set-up prepared none.
fn interpreter() -> Option<(String, &'static str)> {
    match installation::find() {
        Some(own) => own.python().map(|python| (python, "")),
        None => {
            let python = option_env!("TRANSFORMER_BENCH_PYTHON").filter(|python| !python.is_empty())?;
            Some((python.to_owned(), option_env!("TRANSFORMER_BENCH_PYTHONPATH").unwrap_or_default()))
        }
    }
}

/// Returns the path of the program of a side.
fn script() -> PathBuf {
    match installation::find() {
        Some(own) => own.script("python_counterparts/side.py"),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/python_counterparts/side.py"),
    }
}

/// Writes the side into `folder`, which must exist. `cases` have the variant of the counterpart. Returns `None` if there is
/// no Python with torch.
///
/// # Errors
/// Returns an error if a case has no counterpart, or the folder cannot be written.
pub fn torch_side(side: &Side, cases: &[(Case, &str)], folder: &Path) -> Result<Option<Side>> {
    let Some((python, path)) = interpreter() else { return Ok(None) };
    let mut worker = Worker::start(side, Framework::Torch, Threads::All)?;
    let mut steps = serde_json::Map::new();
    for (case, variant) in cases {
        let description: Value = serde_json::from_str(&worker.describe(case)?)
            .with_context(|| format!("the description of {case} is not JSON"))?;
        steps.insert(case.to_string(), json!({ "description": description, "variant": variant }));
    }
    let file = folder.join("side.json");
    fs::write(&file, json!({ "script": "torch_counterpart", "steps": steps, "model": null }).to_string())?;
    let program = folder.join("torch");
    let quoted = [Path::new(&python), &script(), &file].map(quote).join(" ");
    fs::write(&program, format!("#!/bin/sh\nexec {quoted}\n"))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let mut environment = vec![("PYTHONDONTWRITEBYTECODE".to_owned(), "1".to_owned())];
    if !path.is_empty() {
        environment.push(("PYTHONPATH".to_owned(), path.to_owned()));
    }
    let executables = BTreeMap::from([(Framework::Torch, program)]);
    Ok(Some(Side { name: "Python".to_owned(), executables, environment, scratch: None }))
}

/// Quotes a path for a shell.
fn quote(path: &Path) -> String {
    format!("'{}'", path.to_string_lossy().replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quoted_path_stays_one_word() {
        assert_eq!(quote(Path::new("/a b/it's")), r"'/a b/it'\''s'");
    }

    #[test]
    fn the_checkout_has_the_program_of_a_side() {
        assert!(script().is_file());
    }
}
