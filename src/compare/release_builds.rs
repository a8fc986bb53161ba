//! Builds of the suite with another release of a framework.
//!
//! The sources are copied into a tree of their own, whose manifests then require the crates of the release. Set-up
//! downloads the release into the cache that all clones share.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail, ensure};

use super::builds::{self, BuildCache};
use super::releases::{Release, require_crates};
use super::revisions::{Source, executables, root, title};
use crate::files;
use crate::results;
use crate::suite::Framework;

/// Files and folders of the sources, as far as a build needs them.
const SOURCES: [&str; 6] = ["Cargo.toml", "Cargo.lock", "build.rs", "src", "benches", "scripts"];

/// Builds the sources of a side with a release. Returns the folder with the executables, which is cached.
///
/// # Errors
/// Returns an error if the release can't be downloaded, or if the sources do not build with it.
pub fn build(release: &Release, sources: &Source, report: &dyn Fn(&str)) -> Result<PathBuf> {
    let cache = BuildCache::open(report)?;
    let id = format!("{}-{}", release.framework.id(), release.version);
    let tree = cache.tree(&id)?;
    let key = match sources {
        Source::Worktree => {
            static FIRST: OnceLock<String> = OnceLock::new();
            let checksum = copy_sources(&root(), &tree.0)?;
            ensure!(
                *FIRST.get_or_init(|| checksum.clone()) == checksum,
                "the working tree was changed while it was built with another release: compare again"
            );
            checksum
        }
        Source::Revision { commit, name } => {
            builds::export(commit, name, &tree.0)?;
            commit[..12].to_owned()
        }
        _ => bail!("{} has no sources that can be built with {release}", title(sources)),
    };
    require_crates(release, &tree.0)?;
    lock_crates(release, &tree.0)?;
    report(&format!("setting up {release} (downloads up to 0.6 GB once, or several GB with an NVIDIA GPU)"));
    let mut setup = Command::new("./scripts/setup");
    // The release is compared as published, not as the user's own libtorch.
    setup.arg("--quiet").args(release.setup_options()).current_dir(&tree.0).env_remove("LIBTORCH");
    builds::run_quietly(setup, &format!("{release}: its set-up failed"))?;
    let hash = files::checksum(&builds::configuration(&tree.0));
    let folder = cache.folder.join(format!("{key}-{id}-{hash:016x}"));
    if executables(&folder).len() == Framework::ALL.len() {
        return Ok(folder);
    }
    report(&format!("building with {release} (the first build takes several minutes)"));
    let built = builds::compile(&tree.0, Some(&build_folder(&id, &tree.0)?), &release.to_string())?;
    builds::copy_executables(&built, &folder)?;
    Ok(folder)
}

/// Locks the crates that the manifests of a tree now require. Other crates keep their versions.
fn lock_crates(release: &Release, tree: &Path) -> Result<()> {
    let update = |options: &[&str]| {
        let mut command = Command::new("cargo");
        command.args(["update", "--workspace"]).args(options).current_dir(tree);
        builds::run_quietly(command, &format!("{release}: its crates could not be fetched"))
    };
    // A second comparison needs no network.
    update(&["--offline"]).or_else(|_| update(&[])).map(drop)
}

/// Returns cargo's build folder for a release. If the tree is configured as the checkout is, it is that of revisions,
/// which starts with the dependencies of the checkout.
fn build_folder(id: &str, tree: &Path) -> Result<PathBuf> {
    if builds::configuration(tree) == builds::configuration(&root()) {
        return builds::build_folder();
    }
    let folder = results::target_folder().join("releases").join(id);
    fs::create_dir_all(&folder).with_context(|| format!("{} can't be written", folder.display()))?;
    Ok(fs::canonicalize(folder)?)
}

/// Copies the sources of a checkout, with changes that are not committed. Returns a checksum of them.
fn copy_sources(from: &Path, to: &Path) -> Result<String> {
    let mut contents = String::new();
    for name in SOURCES {
        copy_tree(&from.join(name), &to.join(name), &mut contents)?;
    }
    Ok(format!("{:016x}", files::checksum(contents.as_bytes())))
}

/// Copies a file, link or folder. Adds a line with the checksum of each file to `contents`.
fn copy_tree(from: &Path, to: &Path, contents: &mut String) -> Result<()> {
    let failed = || format!("{} could not be copied: is the disk full?", from.display());
    if from.is_symlink() {
        std::os::unix::fs::symlink(fs::read_link(from)?, to).with_context(failed)?;
    } else if from.is_dir() {
        fs::create_dir_all(to).with_context(failed)?;
        let mut names: Vec<_> =
            fs::read_dir(from)?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
        names.sort();
        // Python writes its cache at any time.
        for name in names.iter().filter(|name| *name != "__pycache__") {
            copy_tree(&from.join(name), &to.join(name), contents)?;
        }
    } else {
        fs::copy(from, to).with_context(failed)?;
        contents.push_str(&format!("{} {:016x}\n", from.display(), files::checksum(&fs::read(to)?)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tests::scratch;

    #[test]
    fn the_checksum_of_sources_follows_their_content() {
        let folder = scratch("sources");
        let (from, to) = (folder.join("from"), folder.join("to"));
        for name in SOURCES {
            let path = from.join(name);
            if name.contains('.') {
                fs::create_dir_all(&from).unwrap();
                fs::write(path, name).unwrap();
            } else {
                fs::create_dir_all(path.join("__pycache__")).unwrap();
                fs::write(path.join("a.rs"), name).unwrap();
            }
        }
        std::os::unix::fs::symlink("a.rs", from.join("scripts/link")).unwrap();
        let copy = || {
            let _ = fs::remove_dir_all(&to);
            fs::create_dir_all(&to).unwrap();
            copy_sources(&from, &to).unwrap()
        };
        let first = copy();
        assert_eq!(first, copy());
        fs::write(from.join("src/a.rs"), "changed").unwrap();
        assert_ne!(first, copy());
        assert_eq!(fs::read_to_string(to.join("src/a.rs")).unwrap(), "changed");
        assert!(to.join("scripts/link").is_symlink() && !to.join("src/__pycache__").exists());
        fs::remove_dir_all(folder).unwrap();
    }
}
