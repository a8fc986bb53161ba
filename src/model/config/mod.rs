//! Reads a model from Hugging Face's `config.json`, or from TOML with the fields of [`Model`].
//!
//! A field that changes the computation and is not implemented is an error. An unknown field is a note for the
//! user.

mod hugging_face;
#[cfg(test)]
mod tests;
mod validate;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};

use super::{Model, ModelId};
pub use validate::complete_and_check;

/// A model from a file, with the largest number of tokens that it allows.
#[derive(Clone, Debug, PartialEq)]
pub struct ParsedModel {
    pub model: Model,
    /// Messages for the user, one line each.
    pub notes: Vec<String>,
}

/// Reads a `config.json`, a folder that contains one, or a TOML file.
///
/// # Errors
/// Returns one line that says what is wrong with the file, or which field is not implemented.
pub fn read(path: &Path) -> Result<ParsedModel> {
    let file = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
    let text = fs::read_to_string(&file).with_context(|| {
        format!("{} cannot be read: use a config.json, its folder, or a TOML file", file.display())
    })?;
    let shown = path.display().to_string();
    let (model, note) = if file.extension().is_some_and(|e| e == "toml") {
        let model =
            toml::from_str(&text).map_err(|error| anyhow!("{shown}: {}", on_one_line(&error.to_string())))?;
        (model, None)
    } else {
        let json = serde_json::from_str(&text).with_context(|| format!("{} is not JSON", file.display()))?;
        let (mut model, name, note) = hugging_face::parse(&json).with_context(|| shown.clone())?;
        model.name = name.unwrap_or_else(|| name_from_path(&file)).leak();
        (model, note)
    };
    let model = complete_and_check(model).with_context(|| shown.clone())?;
    Ok(ParsedModel { model, notes: note.map(|note| format!("{shown}: {note}")).into_iter().collect() })
}

fn on_one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Returns the name of the folder of a `config.json`, or of another file itself.
fn name_from_path(file: &Path) -> String {
    let last = |path: Option<&Path>| path.and_then(Path::file_name).map(|n| n.to_string_lossy().into_owned());
    let absolute = fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
    if absolute.file_name().is_none_or(|n| n != "config.json") {
        return absolute.file_stem().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    }
    // Hugging Face's cache: models--OWNER--NAME/snapshots/COMMIT/config.json
    let cached = last(absolute.ancestors().nth(3)).filter(|name| name.starts_with("models--"));
    let cached = cached.and_then(|name| name.rsplit("--").next().map(str::to_owned));
    cached.or_else(|| last(absolute.parent())).unwrap_or_default()
}

/// Longest name in characters. An id with the longest workload, precision and sizes then has fewer than 72.
const MAX_NAME_LENGTH: usize = 16;

/// Converts a name to the form of ids: lower-case letters, digits and hyphens.
fn id_name(text: &str) -> String {
    let plain: String =
        text.to_lowercase().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let words: Vec<&str> = plain.split('-').filter(|word| !word.is_empty()).collect();
    let mut name: String = words.join("-").chars().take(MAX_NAME_LENGTH).collect();
    name.truncate(name.trim_end_matches('-').len());
    // A letter with a number is a size in ids.
    let is_size = |word: &str| word.len() > 1 && word[1..].bytes().all(|b| b.is_ascii_digit());
    if name.is_empty() || is_size(words[0]) {
        name = format!("m-{name}").trim_end_matches('-').chars().take(MAX_NAME_LENGTH).collect();
    }
    if ModelId::named(&name).is_some() || name.ends_with("-tiny") {
        name = format!("own-{name}");
        name.truncate(MAX_NAME_LENGTH);
    }
    name
}
