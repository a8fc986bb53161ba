//! Reads a model from Hugging Face's `config.json`, or from TOML with the fields of [`Model`].
//!
//! A field that changes the computation and is not implemented is an error. An unknown field is a note for the
//! user.

#[cfg(test)]
mod family_tests;
mod hugging_face;
#[cfg(test)]
mod tests;
mod validate;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};

use super::{Model, ModelId};
use crate::files;
use crate::text::{self, one_line, printable};
pub use validate::{MAX_SIZE, complete_and_check};

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
    let file = if path.is_dir() { find_in_folder(path) } else { path.to_owned() };
    let text = files::read_text(&file)
        .map_err(|error| anyhow!("{error:#}: use a config.json, its folder, or a TOML file"))?;
    let shown = path.display().to_string();
    let (model, notes) = if file.extension().is_some_and(|e| e == "toml") {
        let model =
            toml::from_str(&text).map_err(|error| anyhow!("{shown}: {}", one_line(&error.to_string())))?;
        (model, Vec::new())
    } else {
        let json = text::parse_json(&text).with_context(|| format!("{} is not JSON", file.display()))?;
        let parsed = hugging_face::parse(&json).with_context(|| shown.clone())?;
        let published = || parsed.name.as_deref().and_then(published_name).unwrap_or_default();
        let name = Some(name_from_path(&file)).filter(|name| !name.is_empty()).unwrap_or_else(published);
        (Model { name: name.leak(), ..parsed.model }, parsed.notes)
    };
    let model = complete_and_check(model).with_context(|| shown.clone())?;
    ensure!(model.lora.is_none(), "{shown}: lora is not a property of the file: use --lora");
    Ok(ParsedModel {
        model,
        notes: notes.into_iter().map(|note| printable(&format!("{shown}: {note}"))).collect(),
    })
}

/// Returns the `config.json` of a folder. A model's folder in Hugging Face's cache has it in the snapshot of the commit
/// that `refs/main` names.
fn find_in_folder(folder: &Path) -> PathBuf {
    let own = folder.join("config.json");
    let cached = || {
        let commit = files::read_text(&folder.join("refs/main")).ok()?;
        let snapshot = folder.join("snapshots").join(commit.trim()).join("config.json");
        snapshot.exists().then_some(snapshot)
    };
    if own.exists() { own } else { cached().unwrap_or(own) }
}

/// Returns the name in a path of Hugging Face's cache, `models--OWNER--NAME/snapshots/COMMIT/…`.
fn name_in_cache(path: &Path) -> Option<String> {
    let parts: Vec<_> = path.iter().map(|part| part.to_string_lossy()).collect();
    let snapshots = parts.iter().rposition(|part| *part == "snapshots")?;
    let (_, name) = parts.get(snapshots.checked_sub(1)?)?.strip_prefix("models--")?.rsplit_once("--")?;
    Some(name.to_owned())
}

/// Returns the name in `_name_or_path`: NAME or OWNER/NAME, or a path of the cache. Other paths are those of another
/// machine, which often end in a number of steps.
fn published_name(text: &str) -> Option<String> {
    let trimmed = text.trim_end_matches('/');
    let is_path = text.starts_with(['/', '.', '~']) || trimmed.matches('/').count() > 1;
    match trimmed.rsplit('/').next() {
        Some(name) if !is_path && !name.is_empty() => Some(name.to_owned()),
        _ => name_in_cache(Path::new(text)),
    }
}

/// Returns the name of the folder of a `config.json`, or of another file itself.
fn name_from_path(file: &Path) -> String {
    // Files in the cache are links to blobs without a name, so only the folder's links are followed.
    let folder = file.parent().and_then(|folder| {
        fs::canonicalize(if folder.as_os_str().is_empty() { Path::new(".") } else { folder }).ok()
    });
    let text = |name: Option<&OsStr>| name.unwrap_or_default().to_string_lossy().into_owned();
    if file.file_name().is_none_or(|name| name != "config.json") {
        return text(file.file_stem());
    }
    let folder = folder.unwrap_or_default();
    name_in_cache(&folder).unwrap_or_else(|| text(folder.file_name()))
}

/// Longest name in characters. With the largest sizes, a shape then has at most 64, as many as Criterion's folders.
const MAX_NAME_LENGTH: usize = 44;

/// Converts a name to the form of ids: lower-case letters, digits, dots, underscores and hyphens.
fn id_name(text: &str) -> String {
    let is_plain = |c: &char| c.is_ascii_alphanumeric() || "._".contains(*c);
    let plain: String = text.to_lowercase().chars().map(|c| if is_plain(&c) { c } else { '-' }).collect();
    let words = plain.split('-').map(|word| word.trim_matches(['.', '_']));
    let words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
    let mut name: String = words.join("-").chars().take(MAX_NAME_LENGTH).collect();
    name.truncate(name.trim_end_matches(['-', '.', '_']).len());
    // A letter with a number is a size in ids.
    let is_size = |word: &str| word.len() > 1 && word[1..].bytes().all(|b| b.is_ascii_digit());
    if words.first().is_none_or(|first| is_size(first)) {
        name = format!("m-{name}").trim_end_matches('-').chars().take(MAX_NAME_LENGTH).collect();
    }
    if ModelId::named(&name).is_some() || name.ends_with("-tiny") {
        name = format!("own-{name}");
        name.truncate(MAX_NAME_LENGTH);
    }
    name
}
