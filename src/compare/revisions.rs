//! Sides that a user may compare, and how their executables are built.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use super::signals::check_interrupted;
use super::worker::Side;
use crate::files;
use crate::files::Scratch;
use crate::process::is_running;
use crate::results::{self};
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
    /// Executables built elsewhere: `torch`, `mlx`.
    Folder(PathBuf),
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
            ensure!(third.is_none(), "--backends takes one side and a filter");
            let (side, filter) = match (base, second) {
                (Some(one), None) => match source(one)? {
                    Some(side) => (side, ""),
                    None => (Source::Worktree, one),
                },
                (Some(side), Some(filter)) => (named(side)?, filter),
                _ => (Source::Worktree, ""),
            };
            return Ok(Self { base: side.clone(), head: side, filter: filter.to_owned(), filter_hint: None });
        }
        let base = base.context("BASE is missing, for example: scripts/compare main (see --help)")?;
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
    let done = Command::new("git").arg("-C").arg(root()).args(arguments).output();
    let done = done.map_err(|error| format!("git does not start: {error}"))?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).trim().to_owned());
    }
    let why = String::from_utf8_lossy(&done.stderr);
    Err(why.lines().next().unwrap_or("git gave no reason").trim_start_matches("fatal: ").to_owned())
}

fn git(arguments: &[&str]) -> Option<String> {
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

/// Builds the executables of a side. `report` receives a line before each long operation.
///
/// # Errors
/// Returns the first error of exporting, setting up or building a revision.
pub fn build(source: &Source, report: &dyn Fn(&str)) -> Result<Side> {
    let side = |name: String, folder: &Path| Side {
        name,
        executables: executables(folder),
        environment: Vec::new(),
        scratch: None,
    };
    match source {
        Source::Baseline(name) => bail!("baseline {name} can't be run"),
        Source::Folder(path) => Ok(side(path.display().to_string(), path)),
        Source::Worktree => {
            let commit = git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "no commit".to_owned());
            let changed =
                git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|t| !t.is_empty());
            let changes = if changed { " with changes" } else { "" };
            // A later build or another comparison must not change the measured executables, so this one has a copy.
            remove_stale_copies(&results_folder());
            let folder = results_folder().join(format!("worktree-{}", std::process::id()));
            let scratch = Some(Arc::new(Scratch(folder.clone())));
            copy_executables(&compile(&root(), None, "the working tree")?, &folder)?;
            Ok(Side { scratch, ..side(format!("working tree ({commit}{changes})"), &folder) })
        }
        Source::Revision { commit, name } => {
            let short = &commit[..12];
            let title = if commit.starts_with(name.as_str()) {
                short.to_owned()
            } else {
                format!("{name} ({short})")
            };
            Ok(side(title, &revision(commit, name, report)?))
        }
    }
}

fn results_folder() -> PathBuf {
    results::folder().join("compare")
}

/// Returns the folder that caches the builds of revisions.
fn revision_cache() -> Result<PathBuf> {
    Ok(files::cache_folder()?.join("compare"))
}

/// Removes copies of the working tree's executables whose comparison was killed.
fn remove_stale_copies(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let process = name.strip_prefix("worktree-").and_then(|rest| rest.split('.').next()?.parse().ok());
        if process.is_some_and(|process| !is_running(process)) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Returns the build folder of revisions, which starts with the dependencies that the checkout has built.
///
/// It is not the checkout's own build folder: cargo identifies files by relative paths and times, and would confuse
/// the two trees.
fn build_folder() -> Result<PathBuf> {
    let own = fs::canonicalize(results::target_folder())?;
    let folder = own.join("revisions");
    if !folder.exists() {
        let partial = Scratch(own.join("revisions.partial"));
        let _ = fs::remove_dir_all(&partial.0);
        for part in ["build", "deps", ".fingerprint"] {
            copy_dependencies(&own.join("release").join(part), &partial.0.join("release").join(part))?;
        }
        fs::rename(&partial.0, &folder)?;
    }
    Ok(folder)
}

/// Copies a build folder of cargo with its file times, without executables and the libraries of this project.
fn copy_dependencies(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        let is_library =
            ["rlib", "rmeta", "so", "dylib"].iter().any(|e| path.extension().is_some_and(|x| x == *e));
        let skipped = from.ends_with("deps") && !is_library;
        if skipped || name.contains("transformer-bench") || name.contains("transformer_bench") {
            continue;
        }
        let place = to.join(name);
        if path.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(&path)?, &place)?;
        } else if path.is_dir() {
            copy_dependencies(&path, &place)?;
        } else {
            fs::copy(&path, &place).with_context(|| format!("{}: is the disk full?", place.display()))?;
            // Setting times needs no write access, and some files are read-only.
            fs::File::open(&place)?.set_modified(fs::metadata(&path)?.modified()?)?;
        }
    }
    Ok(())
}

/// Builds a commit in an exported tree outside the checkout.
fn revision(commit: &str, name: &str, report: &dyn Fn(&str)) -> Result<PathBuf> {
    let short = &commit[..12];
    // Comparisons are in one of these files, depending on the age of the commit.
    let has_file = |file: &str| git(&["cat-file", "-e", &format!("{commit}:{file}")]).is_some();
    ensure!(
        has_file("src/compare/rounds.rs") || has_file("src/interleave.rs"),
        "{name} is older than comparisons: its executables cannot be interleaved"
    );
    let cache = revision_cache()?;
    fs::create_dir_all(&cache).with_context(|| format!("{} can't be written", cache.display()))?;
    let lock = fs::File::create(cache.join("lock"))?;
    if lock.try_lock().is_err() {
        report("waiting for another comparison that is building");
        lock.lock()?;
    }
    // A comparison that was killed may have left a tree.
    for entry in fs::read_dir(&cache)?.flatten() {
        if entry.file_name().to_string_lossy().starts_with("tree-") {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    let tree = Scratch(cache.join(format!("tree-{short}")));
    fs::create_dir_all(&tree.0)?;
    // With -m the files are new, so that cargo does not reuse objects of another revision.
    let mut archive = Command::new("git")
        .arg("-C")
        .arg(root())
        .args(["archive", commit])
        .stdout(Stdio::piped())
        .spawn()
        .context("git did not start")?;
    let unpacked = Command::new("tar")
        .args(["-x", "-m", "-C"])
        .arg(&tree.0)
        .stdin(archive.stdout.take().context("the child has no pipe")?)
        .status()
        .context("tar did not start")?;
    ensure!(
        archive.wait()?.success() && unpacked.success(),
        "{name} could not be exported: is the disk full?"
    );

    let mut setup = Command::new("./scripts/setup");
    setup.arg("--quiet").current_dir(&tree.0);
    run_quietly(setup, &format!("{name}: its set-up failed"))?;
    let configuration = fs::read(tree.0.join(".cargo/config.toml")).unwrap_or_default();
    let hash = files::checksum(&configuration);
    let folder = cache.join(format!("{short}-{hash:016x}"));
    if executables(&folder).len() == Framework::ALL.len() {
        return Ok(folder);
    }
    report(&format!("building {name} ({short})"));
    copy_executables(&compile(&tree.0, Some(&build_folder()?), name)?, &folder)?;
    Ok(folder)
}

/// Runs a command and returns its output.
///
/// # Errors
/// Returns the first error line of the command if it fails.
fn run_quietly(mut command: Command, what: &str) -> Result<String> {
    let done = command.output().with_context(|| what.to_owned())?;
    check_interrupted()?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
    }
    let errors = String::from_utf8_lossy(&done.stderr);
    // The first error is the cause of the later ones.
    let line = errors
        .lines()
        .find(|l| l.starts_with("error"))
        .or(errors.lines().last())
        .unwrap_or("no reason given");
    bail!("{what}: {line}")
}

/// Builds the bench targets in a tree. Returns their names and paths.
fn compile(tree: &Path, target: Option<&Path>, name: &str) -> Result<Vec<(String, PathBuf)>> {
    let mut command = Command::new("cargo");
    command
        .args([
            "bench",
            "--no-run",
            "--locked",
            "--bench",
            "torch",
            "--bench",
            "mlx",
            "--message-format=json-render-diagnostics",
        ])
        .current_dir(tree);
    if let Some(target) = target {
        command.env("CARGO_TARGET_DIR", target);
    }
    let output = run_quietly(command, &format!("{name} does not build"))?;
    let mut all = Vec::new();
    for line in output.lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        if let Some(path) = message["executable"].as_str()
            && message["target"]["kind"][0] == "bench"
        {
            all.push((
                message["target"]["name"].as_str().unwrap_or_default().to_owned(),
                PathBuf::from(path),
            ));
        }
    }
    ensure!(!all.is_empty(), "{name} builds no bench target");
    Ok(all)
}

/// Copies executables into a folder atomically.
fn copy_executables(built: &[(String, PathBuf)], folder: &Path) -> Result<()> {
    let partial = Scratch(folder.with_extension("partial"));
    let _ = fs::remove_dir_all(&partial.0);
    fs::create_dir_all(&partial.0)?;
    for (name, path) in built {
        fs::copy(path, partial.0.join(name))
            .with_context(|| format!("{} could not be copied", path.display()))?;
    }
    let _ = fs::remove_dir_all(folder);
    fs::rename(&partial.0, folder).with_context(|| format!("{} can't be written", folder.display()))
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
