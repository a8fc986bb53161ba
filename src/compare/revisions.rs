//! What a user may compare, and how it comes to have executables.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use super::signals::check_interrupted;
use super::worker::Side;
use crate::results::{self, Scratch, is_running};
use crate::suite::{Framework, Set, cases, parse_filter};
use anyhow::{Context, Result, bail, ensure};

/// Where a side comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Worktree,
    /// A commit's full hash, and what the user called it.
    Revision {
        commit: String,
        name: String,
    },
    /// A saved baseline's name.
    Past(String),
    /// Executables built elsewhere: `torch`, `mlx`.
    Folder(PathBuf),
}

/// Both sides and the filter.
#[derive(Debug)]
pub struct Spec {
    pub base: Source,
    pub head: Source,
    pub filter: String,
    /// What else the user may have meant by the filter.
    pub filter_hint: Option<String>,
}

impl Spec {
    /// Reads BASE [HEAD] [FILTER]: the second word is HEAD where it names a side.
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
        let base = base.context("compare what? For example: scripts/compare main (see --help)")?;
        let base = named(base)?;
        let (head, filter, filter_hint) = match (second, third) {
            (None, _) => (Source::Worktree, "", None),
            (Some(head), Some(filter)) => (named(head)?, filter, None),
            (Some(text), None) => match source(text)? {
                Some(head) => (head, "", None),
                None if fits_some(text) => (Source::Worktree, text, None),
                None => (Source::Worktree, text, Some(format!(", and no revision is called '{text}'"))),
            },
        };
        Ok(Self { base, head, filter: filter.to_owned(), filter_hint })
    }
}

fn fits_some(filter: &str) -> bool {
    parse_filter(filter).is_ok_and(|f| cases(Set::Full).iter().any(|c| f.is_match(&c.to_string())))
}

fn root() -> PathBuf {
    let here = PathBuf::from(".");
    if here.join("src/compare/sides.rs").exists() || here.join("src/sides.rs").exists() {
        here
    } else {
        PathBuf::from(env!("CARGO_MANIFEST_DIR"))
    }
}

/// What git answers, or its own word against it.
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

/// The side that a word names; None where it names none.
fn source(text: &str) -> Result<Option<Source>> {
    if text == "worktree" {
        return Ok(Some(Source::Worktree));
    }
    if let Some(name) = text.strip_prefix("baseline:") {
        return Ok(Some(Source::Past(name.to_owned())));
    }
    if let Some(path) = text.strip_prefix("dir:") {
        let path = PathBuf::from(path);
        ensure!(!executables(&path).is_empty(), "{} holds no executable torch or mlx", path.display());
        return Ok(Some(Source::Folder(path)));
    }
    ensure!(!text.starts_with('-') && !text.is_empty(), "'{text}' is no revision");
    let commit = git(&["rev-parse", "--verify", "--quiet", &format!("{text}^{{commit}}")]);
    Ok(commit.map(|commit| Source::Revision { commit, name: text.to_owned() }))
}

/// The side that a word names.
///
/// # Errors
/// Where it names none, with what would.
pub fn named(text: &str) -> Result<Source> {
    source(text)?.with_context(|| {
        let how = "a git revision, baseline:NAME, dir:PATH or worktree";
        match git_or_why(&["rev-parse", "--git-dir"]) {
            Ok(_) => format!("'{text}' is no revision of this repository; a side is {how}"),
            Err(why) => {
                format!("'{text}': without git a side is baseline:NAME, dir:PATH or worktree ({why})")
            }
        }
    })
}

/// The executables that a folder holds.
pub fn executables(folder: &Path) -> BTreeMap<Framework, PathBuf> {
    Framework::ALL.iter().map(|&f| (f, folder.join(f.id()))).filter(|(_, path)| path.is_file()).collect()
}

/// Executables of a side. What takes long is told to `say`, a line each.
///
/// # Errors
/// Where a revision does not export, set up or build, with the first error of it.
pub fn build(source: &Source, say: &dyn Fn(&str)) -> Result<Side> {
    let side = |name: String, folder: &Path| Side {
        name,
        executables: executables(folder),
        environment: Vec::new(),
        scratch: None,
    };
    match source {
        Source::Past(name) => bail!("baseline {name} can't be run"),
        Source::Folder(path) => Ok(side(path.display().to_string(), path)),
        Source::Worktree => {
            let commit = git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "no commit".to_owned());
            let changed =
                git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|t| !t.is_empty());
            let changes = if changed { " with changes" } else { "" };
            // Copied: what the user builds meanwhile, or another comparison, must not change
            // what is measured.
            drop_left(&results_folder());
            let folder = results_folder().join(format!("worktree-{}", std::process::id()));
            let scratch = Some(Arc::new(Scratch(folder.clone())));
            copy(&compile(&root(), None, "the working tree")?, &folder)?;
            Ok(Side { scratch, ..side(format!("working tree ({commit}{changes})"), &folder) })
        }
        Source::Revision { commit, name } => {
            let short = &commit[..12];
            let title = if commit.starts_with(name.as_str()) {
                short.to_owned()
            } else {
                format!("{name} ({short})")
            };
            Ok(side(title, &revision(commit, name, say)?))
        }
    }
}

fn results_folder() -> PathBuf {
    results::folder().join("compare")
}

/// Where builds of revisions are kept between comparisons.
fn cache() -> Result<PathBuf> {
    Ok(results::cache_folder()?.join("compare"))
}

/// Removes copies of the working tree's executables whose comparison was killed.
fn drop_left(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let process = name.strip_prefix("worktree-").and_then(|rest| rest.split('.').next()?.parse().ok());
        if process.is_some_and(|process| !is_running(process)) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// The build folder of revisions, which begins with the dependencies that the checkout has
/// built. It can't be the checkout's own: cargo goes by relative paths and times, and would
/// take one tree's files for the other's.
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

/// Copies a folder of cargo's with its times, by which cargo knows what is fresh; without
/// executables and this project's own libraries.
fn copy_dependencies(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        let kept = ["rlib", "rmeta", "so", "dylib"].iter().any(|e| path.extension().is_some_and(|x| x == *e));
        let skipped = from.ends_with("deps") && !kept;
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
            // Its owner may set a file's times; to write it needs more, which read-only ones refuse.
            fs::File::open(&place)?.set_modified(fs::metadata(&path)?.modified()?)?;
        }
    }
    Ok(())
}

/// Builds a commit in an exported tree, outside the checkout and without touching it or
/// git's index.
fn revision(commit: &str, name: &str, say: &dyn Fn(&str)) -> Result<PathBuf> {
    let short = &commit[..12];
    // Where the rounds live, and where they lived.
    let holds = |file: &str| git(&["cat-file", "-e", &format!("{commit}:{file}")]).is_some();
    ensure!(
        holds("src/compare/rounds.rs") || holds("src/interleave.rs"),
        "{name} is from before comparisons existed: its executables can't be interleaved"
    );
    let cache = cache()?;
    fs::create_dir_all(&cache).with_context(|| format!("{} can't be written", cache.display()))?;
    let lock = fs::File::create(cache.join("lock"))?;
    if lock.try_lock().is_err() {
        say("waiting for another comparison that is building");
        lock.lock()?;
    }
    // Left by one that was killed.
    for entry in fs::read_dir(&cache)?.flatten() {
        if entry.file_name().to_string_lossy().starts_with("tree-") {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    let tree = Scratch(cache.join(format!("tree-{short}")));
    fs::create_dir_all(&tree.0)?;
    // Its files are new (-m), so that cargo takes nothing of another revision for theirs.
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
        .stdin(archive.stdout.take().context("a pipe")?)
        .status()
        .context("tar did not start")?;
    ensure!(
        archive.wait()?.success() && unpacked.success(),
        "{name} could not be exported: is the disk full?"
    );

    let mut setup = Command::new("./scripts/setup");
    setup.arg("--quiet").current_dir(&tree.0);
    quietly(setup, &format!("{name}: its set-up failed"))?;
    let configuration = fs::read(tree.0.join(".cargo/config.toml")).unwrap_or_default();
    let hash = results::checksum(&configuration);
    let kept = cache.join(format!("{short}-{hash:016x}"));
    if executables(&kept).len() == Framework::ALL.len() {
        return Ok(kept);
    }
    say(&format!("building {name} ({short})"));
    copy(&compile(&tree.0, Some(&build_folder()?), name)?, &kept)?;
    Ok(kept)
}

/// Runs a command whose output matters only where it fails.
fn quietly(mut command: Command, what: &str) -> Result<String> {
    let done = command.output().with_context(|| what.to_owned())?;
    check_interrupted()?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
    }
    let errors = String::from_utf8_lossy(&done.stderr);
    // The first error tells more than what follows from it.
    let line = errors
        .lines()
        .find(|l| l.starts_with("error"))
        .or(errors.lines().last())
        .unwrap_or("no reason given");
    bail!("{what}: {line}")
}

/// Builds the bench targets in a tree.
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
    let output = quietly(command, &format!("{name} does not build"))?;
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

/// Copies executables into a folder, whole or not at all.
fn copy(built: &[(String, PathBuf)], folder: &Path) -> Result<()> {
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

/// Says so where the sides' own timing code differs.
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
    let note = "the sides' harnesses differ (benches/): part of a difference may be the timing's own";
    differ.then(|| note.to_owned())
}
