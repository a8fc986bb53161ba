//! Builds of the sides of a comparison, outside the checkout.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use super::release_builds;
use super::revisions::{Source, executables, git, root, title};
use super::signals::check_interrupted;
use super::worker::Side;
use crate::files::{self, Scratch};
use crate::installation;
use crate::process::is_running;
use crate::results;
use crate::suite::Framework;

/// Builds the executables of a side. `report` receives a line before each long operation.
///
/// # Errors
/// Returns the first error of exporting, setting up or building a side.
pub fn build(source: &Source, report: &dyn Fn(&str)) -> Result<Side> {
    let mut scratch = None;
    let folder = match source {
        Source::Baseline(name) => bail!("baseline {name} can't be run"),
        Source::Folder(path) => {
            prepare(path, report)?;
            path.clone()
        }
        Source::Worktree if let Some(own) = installation::find() => {
            // The executables find their libraries from their own folder.
            let (name, executables) = (title(source), own.executables()?);
            return Ok(Side { name, executables, environment: Vec::new(), scratch });
        }
        Source::Worktree => {
            // A later build or another comparison must not change the measured executables, so this one has a copy.
            remove_stale_copies(&results_folder());
            let folder = results_folder().join(format!("worktree-{}", std::process::id()));
            scratch = Some(Arc::new(Scratch(folder.clone())));
            copy_executables(&compile(&root(), None, "the working tree")?, &folder)?;
            folder
        }
        Source::Revision { commit, name } => revision(commit, name, report)?,
        Source::Release { release, sources } => release_builds::build(release, sources, report)?,
    };
    Ok(Side { name: title(source), executables: executables(&folder), environment: Vec::new(), scratch })
}

/// Runs the executable `prepare` of a folder, if it has one.
fn prepare(folder: &Path, report: &dyn Fn(&str)) -> Result<()> {
    let program = folder.join("prepare");
    if !program.is_file() {
        return Ok(());
    }
    let name = title(&Source::Folder(folder.to_owned()));
    report(&format!("preparing {name}"));
    run_quietly(Command::new(program), &format!("{name} could not be prepared")).map(drop)
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
pub(super) fn build_folder() -> Result<PathBuf> {
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

/// The cache of built revisions and releases. It is locked while one comparison builds.
pub(super) struct BuildCache {
    pub folder: PathBuf,
    _lock: fs::File,
}

impl BuildCache {
    /// Opens the cache, after waiting for other comparisons.
    ///
    /// # Errors
    /// Returns an error if the cache cannot be written.
    pub fn open(report: &dyn Fn(&str)) -> Result<Self> {
        let folder = revision_cache()?;
        fs::create_dir_all(&folder).with_context(|| format!("{} can't be written", folder.display()))?;
        let lock = fs::File::create(folder.join("lock"))?;
        if lock.try_lock().is_err() {
            report("waiting for another comparison that is building");
            lock.lock()?;
        }
        // A comparison that was killed may have left a tree.
        for entry in fs::read_dir(&folder)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with("tree-") {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        Ok(Self { folder, _lock: lock })
    }

    /// Creates an empty folder for the sources of a build, which is removed at its end.
    ///
    /// # Errors
    /// Returns an error if the folder cannot be created.
    pub fn tree(&self, name: &str) -> Result<Scratch> {
        let tree = Scratch(self.folder.join(format!("tree-{name}")));
        fs::create_dir_all(&tree.0)?;
        Ok(tree)
    }
}

/// Exports a commit into a tree.
///
/// # Errors
/// Returns an error if the commit has no comparisons, or if it cannot be exported.
pub(super) fn export(commit: &str, name: &str, tree: &Path) -> Result<()> {
    // Comparisons are in one of these files, depending on the age of the commit.
    let has_file = |file: &str| git(&["cat-file", "-e", &format!("{commit}:{file}")]).is_some();
    ensure!(
        has_file("src/compare/rounds.rs") || has_file("src/interleave.rs"),
        "{name} is older than comparisons: its executables cannot be interleaved"
    );
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
        .arg(tree)
        .stdin(archive.stdout.take().context("the child has no pipe")?)
        .status()
        .context("tar did not start")?;
    ensure!(
        archive.wait()?.success() && unpacked.success(),
        "{name} could not be exported: is the disk full?"
    );
    Ok(())
}

/// Returns the configuration that set-up wrote for a tree.
pub(super) fn configuration(tree: &Path) -> Vec<u8> {
    fs::read(tree.join(".cargo/config.toml")).unwrap_or_default()
}

/// Builds a commit in an exported tree outside the checkout.
fn revision(commit: &str, name: &str, report: &dyn Fn(&str)) -> Result<PathBuf> {
    let short = &commit[..12];
    let cache = BuildCache::open(report)?;
    let tree = cache.tree(short)?;
    export(commit, name, &tree.0)?;
    let mut setup = Command::new("./scripts/setup");
    setup.arg("--quiet").current_dir(&tree.0);
    run_quietly(setup, &format!("{name}: its set-up failed"))?;
    let hash = files::checksum(&configuration(&tree.0));
    let folder = cache.folder.join(format!("{short}-{hash:016x}"));
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
pub(super) fn run_quietly(mut command: Command, what: &str) -> Result<String> {
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
pub(super) fn compile(tree: &Path, target: Option<&Path>, name: &str) -> Result<Vec<(String, PathBuf)>> {
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
        // The configuration of the tree names the libraries, and a variable would replace it.
        command.env("CARGO_TARGET_DIR", target).env_remove("LIBTORCH");
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
pub(super) fn copy_executables(built: &[(String, PathBuf)], folder: &Path) -> Result<()> {
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
