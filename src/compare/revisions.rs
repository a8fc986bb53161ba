//! Sides that a user may compare.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::releases::{self, Release};
use crate::files;
use crate::installation::{self, command};
use crate::suite::{Framework, Set, cases, parse_filter};
use anyhow::{Context, Result, bail, ensure};

/// Origin of a side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Worktree,
    /// The full hash of a commit, and the name that the user gave.
    Revision {
        commit: String,
        name: String,
    },
    /// The name of a saved baseline.
    Baseline(String),
    /// Executables built elsewhere: `torch`, `mlx`. An executable `prepare` runs before they do, and a file `name` has
    /// the title of the side.
    Folder(PathBuf),
    /// The sources of another side, built with a release of a framework.
    Release {
        release: &'static Release,
        sources: Box<Source>,
    },
}

/// Both sides of a comparison, and its filter.
#[derive(Debug)]
pub struct Spec {
    pub base: Source,
    pub head: Source,
    pub filter: String,
    /// A note for a filter that may be a misspelt revision.
    pub filter_hint: Option<String>,
}

impl Spec {
    /// Parses BASE [HEAD] [FILTER]. The second word is HEAD if it names a side.
    ///
    /// # Errors
    /// Returns an error if BASE is missing or a word does not name a side.
    pub fn read(
        base: Option<&str>,
        second: Option<&str>,
        third: Option<&str>,
        backends: bool,
    ) -> Result<Self> {
        if backends {
            let (side, filter) = one_side([base, second, third])?;
            return Ok(Self { base: side.clone(), head: side, filter, filter_hint: None });
        }
        let missing = || format!("BASE is missing, for example: {} main (see --help)", command("compare"));
        let base = base.with_context(missing)?;
        let base = named(base)?;
        let (head, filter, filter_hint) = match (second, third) {
            (None, _) => (Source::Worktree, "", None),
            (Some(head), Some(filter)) => (named(head)?, filter, None),
            (Some(text), None) => match source(text)? {
                Some(head) => (head, "", None),
                None if fits_some(text) => (Source::Worktree, text, None),
                None => (Source::Worktree, text, Some(format!(", and '{text}' is not a revision either"))),
            },
        };
        Ok(Self { base, head, filter: filter.to_owned(), filter_hint })
    }

    /// Parses [SIDE] [FILTER] for a comparison of two releases.
    ///
    /// # Errors
    /// Returns an error if a release has no crates, or if SIDE has no sources.
    pub fn of_releases(framework: Framework, versions: [&str; 2], words: [Option<&str>; 3]) -> Result<Self> {
        let releases = [releases::find(framework, versions[0])?, releases::find(framework, versions[1])?];
        let (sources, filter) = one_side(words)?;
        let [base, head] = releases.map(|release| with_release(release, &sources));
        Ok(Self { base: base?, head: head?, filter, filter_hint: None })
    }
}

/// Parses [SIDE] [FILTER]. One word is the filter if it does not name a side.
fn one_side(words: [Option<&str>; 3]) -> Result<(Source, String)> {
    let (side, filter) = match words {
        [Some(word), None, None] => match source(word)? {
            Some(side) => (side, ""),
            None => (Source::Worktree, word),
        },
        [Some(side), Some(filter), None] => (named(side)?, filter),
        [_, _, None] => (Source::Worktree, ""),
        _ => bail!("this comparison takes one side and a filter"),
    };
    Ok((side, filter.to_owned()))
}

/// Parses the sides of `--bisect` in their order: a range of releases `A..B`, or several sides.
///
/// # Errors
/// Returns an error if a word does not name a side that can run.
pub fn bisected(words: &[String], filter: [Option<&str>; 3]) -> Result<(Vec<Source>, String)> {
    let (sources, filter) = one_side(filter)?;
    let sides: Vec<Source> = match words {
        [range] => {
            let all = releases::range(range)?;
            all.into_iter().map(|release| with_release(release, &sources)).collect::<Result<_>>()?
        }
        several => {
            ensure!(sources == Source::Worktree, "--bisect with a list of sides takes only a filter");
            several.iter().map(|side| named(side)).collect::<Result<_>>()?
        }
    };
    for side in &sides {
        ensure!(
            !matches!(side, Source::Baseline(_)),
            "--bisect needs sides that run, and a baseline does not"
        );
    }
    Ok((sides, filter))
}

/// Returns a side that is built from the sources of another one with a release.
///
/// # Errors
/// Returns an error if the other side has no sources.
pub fn with_release(release: &'static Release, sources: &Source) -> Result<Source> {
    ensure!(
        installation::find().is_none(),
        "another release is built from a checkout of the suite with Rust; here, {} compares releases",
        command("compare-python")
    );
    ensure!(
        matches!(sources, Source::Worktree | Source::Revision { .. }),
        "a release is built from a git revision or the worktree, not from executables or a baseline"
    );
    Ok(Source::Release { release, sources: Box::new(sources.clone()) })
}

fn fits_some(filter: &str) -> bool {
    parse_filter(filter).is_ok_and(|f| cases(Set::Full).iter().any(|c| f.is_match(&c.to_string())))
}

/// Returns the project's root: the current folder, or else the checkout that this program was built in.
pub fn root() -> PathBuf {
    let here = PathBuf::from(".");
    if here.join("src/compare/revisions.rs").exists() {
        here
    } else {
        PathBuf::from(env!("CARGO_MANIFEST_DIR"))
    }
}

/// Returns git's output.
///
/// # Errors
/// Returns the first line of git's error message.
fn git_or_why(arguments: &[&str]) -> Result<String, String> {
    // A repository in the user's folder is not the suite's.
    installation::check_checkout("a git revision").map_err(|error| error.to_string())?;
    let done = Command::new("git").arg("-C").arg(root()).args(arguments).output();
    let done = done.map_err(|error| format!("git does not start: {error}"))?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).trim().to_owned());
    }
    let why = String::from_utf8_lossy(&done.stderr);
    Err(why.lines().next().unwrap_or("git gave no reason").trim_start_matches("fatal: ").to_owned())
}

pub(super) fn git(arguments: &[&str]) -> Option<String> {
    git_or_why(arguments).ok()
}

/// Returns the side that a word names, or `None` if it does not name one.
fn source(text: &str) -> Result<Option<Source>> {
    if text == "worktree" {
        return Ok(Some(Source::Worktree));
    }
    if let Some(name) = text.strip_prefix("baseline:") {
        return Ok(Some(Source::Baseline(name.to_owned())));
    }
    if let Some(path) = text.strip_prefix("dir:") {
        let path = PathBuf::from(path);
        ensure!(!executables(&path).is_empty(), "{} has no executable named torch or mlx", path.display());
        return Ok(Some(Source::Folder(path)));
    }
    ensure!(!text.starts_with('-') && !text.is_empty(), "'{text}' is not a revision");
    let commit = git(&["rev-parse", "--verify", "--quiet", &format!("{text}^{{commit}}")]);
    Ok(commit.map(|commit| Source::Revision { commit, name: text.to_owned() }))
}

/// Returns the side that a word names.
///
/// # Errors
/// Returns an error that lists the possible sides if the word does not name one.
pub fn named(text: &str) -> Result<Source> {
    source(text)?.with_context(|| {
        if installation::find().is_some() {
            return format!(
                "'{text}' is not a side: an installation compares baseline:NAME, dir:PATH and worktree, which is itself; \
                 revisions need a checkout"
            );
        }
        let how = "a git revision, baseline:NAME, dir:PATH or worktree";
        match git_or_why(&["rev-parse", "--git-dir"]) {
            Ok(_) => format!("'{text}' is not a revision of this repository; a side is {how}"),
            Err(why) => {
                format!("'{text}': without git a side is baseline:NAME, dir:PATH or worktree ({why})")
            }
        }
    })
}

/// Returns the executables in a folder.
pub fn executables(folder: &Path) -> BTreeMap<Framework, PathBuf> {
    Framework::ALL.iter().map(|&f| (f, folder.join(f.id()))).filter(|(_, path)| path.is_file()).collect()
}

/// Returns the name of a side in reports.
pub fn title(source: &Source) -> String {
    match source {
        Source::Baseline(name) => format!("baseline {name}"),
        Source::Folder(path) => {
            let named = files::read_text(&path.join("name")).ok();
            named.map_or_else(|| path.display().to_string(), |name| name.trim().to_owned())
        }
        Source::Worktree if let Some(own) = installation::find() => {
            format!("this installation ({}, commit {})", env!("CARGO_PKG_VERSION"), own.commit().0)
        }
        Source::Worktree => {
            let commit = git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "no commit".to_owned());
            let changed =
                git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|t| !t.is_empty());
            let changes = if changed { " with changes" } else { "" };
            format!("working tree ({commit}{changes})")
        }
        Source::Revision { commit, name } => {
            let short = &commit[..12];
            if commit.starts_with(name.as_str()) { short.to_owned() } else { format!("{name} ({short})") }
        }
        Source::Release { release, sources } => format!("{release} in {}", title(sources)),
    }
}

/// Returns a note if the timing code of the two sides differs.
pub fn harness_note(base: &Source, head: &Source) -> Option<String> {
    let commit = |source: &Source| match source {
        Source::Revision { commit, .. } => Some(commit.clone()),
        _ => None,
    };
    let differs = |arguments: &[&str]| {
        let mut all = vec!["diff", "--quiet"];
        all.extend_from_slice(arguments);
        all.extend_from_slice(&["--", "benches"]);
        git(&all).is_none()
    };
    let differ = match (commit(base), commit(head)) {
        (Some(a), Some(b)) => differs(&[&a, &b]),
        (Some(one), None) if *head == Source::Worktree => differs(&[&one]),
        (None, Some(one)) if *base == Source::Worktree => differs(&[&one]),
        _ => false,
    };
    let note = "the timing code of the two sides differs (benches/): part of a difference may come from it";
    differ.then(|| note.to_owned())
}
