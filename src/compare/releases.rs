//! Releases of PyTorch and MLX that the suite can be built with.
//!
//! [`RELEASES`] is the only place that relates a release to versions of crates. A version of `tch` fits one release.
//! A version of `mlx-sys` contains mlx-c, which fits the releases whose C++ interface it calls. Set-up compiles it with each
//! of them (`src/mlx/native/later_releases.hpp`). A release without a row has no crate that fits.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use toml::{Table, Value};

use crate::installation::command;
use crate::suite::Framework;

/// A release of a framework, and the crates that fit.
#[derive(Debug, PartialEq, Eq)]
pub struct Release {
    pub framework: Framework,
    pub version: &'static str,
    /// Names and versions of the direct dependencies that select the release.
    crates: &'static [(&'static str, &'static str)],
}

/// All releases, from the oldest to the newest of each framework. The requirements in `src/torch/Cargo.toml` and
/// `src/mlx/Cargo.toml` allow these versions of the crates.
static RELEASES: [Release; 5] = [
    Release { framework: Framework::Torch, version: "2.11.0", crates: &[("tch", "0.24.0")] },
    Release { framework: Framework::Torch, version: "2.13.0", crates: &[("tch", "0.26.0")] },
    Release { framework: Framework::Mlx, version: "0.32.2", crates: MLX_0_32 },
    Release { framework: Framework::Mlx, version: "0.32.3", crates: MLX_0_32 },
    Release { framework: Framework::Mlx, version: "0.32.4", crates: MLX_0_32 },
];

const MLX_0_32: &[(&str, &str)] = &[("mlx-rs", "0.33.0"), ("mlx-sys", "0.7.0")];

impl Release {
    /// Returns the options of set-up that select the release, if the crates do not.
    pub fn setup_options(&self) -> Vec<&'static str> {
        match self.framework {
            Framework::Torch => Vec::new(),
            Framework::Mlx => vec!["--mlx", self.version],
        }
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.framework.label(), self.version)
    }
}

/// Lists the releases of a framework: `PyTorch 2.11.0 or 2.13.0`.
fn list(framework: Framework) -> String {
    let versions: Vec<&str> =
        RELEASES.iter().filter(|r| r.framework == framework).map(|r| r.version).collect();
    format!("{} {}", framework.label(), versions.join(" or "))
}

/// Returns a release.
///
/// # Errors
/// Returns an error that lists the releases that have crates, if this one has none.
pub fn find(framework: Framework, version: &str) -> Result<&'static Release> {
    let found = RELEASES.iter().find(|r| r.framework == framework && r.version == version);
    found.with_context(|| {
        format!(
            "{} {version} cannot be built, because no allowed crate fits: choose {} \
             ({} compares any release)",
            framework.label(),
            list(framework),
            command("compare-python")
        )
    })
}

/// Returns the releases from A to B, for the text `A..B`.
///
/// # Errors
/// Returns an error that lists all releases, if A and B are not two releases of one framework in this order.
pub fn range(text: &str) -> Result<Vec<&'static Release>> {
    let (first, last) = text.split_once("..").context("expected A..B")?;
    let index = |version: &str| RELEASES.iter().position(|release| release.version == version);
    let (Some(first), Some(last)) = (index(first), index(last)) else {
        let all: Vec<String> = Framework::ALL.iter().map(|&framework| list(framework)).collect();
        bail!(
            "'{text}' is not a range of releases that have crates: {} ({} bisects any release)",
            all.join(", "),
            command("compare-python")
        );
    };
    let chosen = RELEASES.get(first..=last).unwrap_or_default();
    ensure!(
        chosen.len() > 1 && chosen.iter().all(|release| release.framework == RELEASES[first].framework),
        "'{text}' does not go from a release to a later one of the same framework"
    );
    Ok(chosen.iter().collect())
}

/// Sets the crates of a release in the manifests of a tree.
///
/// # Errors
/// Returns an error if a manifest cannot be read or written, or if none has one of the crates.
pub fn require_crates(release: &Release, tree: &Path) -> Result<()> {
    let mut found = vec![false; release.crates.len()];
    for framework in Framework::ALL {
        let path = tree.join("src").join(framework.id()).join("Cargo.toml");
        let text =
            fs::read_to_string(&path).with_context(|| format!("{} could not be read", path.display()))?;
        let mut manifest: Table =
            text.parse().with_context(|| format!("{} is not a manifest", path.display()))?;
        for (index, (name, version)) in release.crates.iter().enumerate() {
            found[index] |= set_version(&mut manifest, name, version);
        }
        fs::write(&path, manifest.to_string())
            .with_context(|| format!("{} could not be written", path.display()))?;
    }
    match found.iter().position(|found| !found) {
        Some(index) => {
            bail!("{release} needs the crate {}, which these sources do not use", release.crates[index].0)
        }
        None => Ok(()),
    }
}

/// Sets the version of a crate in all tables of dependencies. Returns true if one has it.
fn set_version(table: &mut Table, name: &str, version: &str) -> bool {
    let mut found = false;
    for (key, value) in table.iter_mut() {
        let Value::Table(inner) = value else { continue };
        match inner.get_mut(name).filter(|_| key == "dependencies") {
            Some(Value::Table(dependency)) => {
                dependency.insert("version".to_owned(), Value::String(format!("={version}")));
                found = true;
            }
            Some(dependency) => {
                *dependency = Value::String(format!("={version}"));
                found = true;
            }
            // The dependencies of a platform.
            None => found |= set_version(inner, name, version),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tests::scratch;

    /// Returns true if `version` is in a requirement such as `>=0.24, <0.27` or `0.33`.
    fn allows(requirement: &str, version: &str) -> bool {
        let parts = |text: &str| -> Vec<u64> { text.trim().split('.').map(|n| n.parse().unwrap()).collect() };
        requirement.split(',').map(str::trim).all(|bound| {
            if let Some(least) = bound.strip_prefix(">=") {
                parts(version) >= parts(least)
            } else if let Some(limit) = bound.strip_prefix('<') {
                parts(version) < parts(limit)
            } else {
                // Versions 0.N.P are compatible if they have the same N.
                bound.starts_with("0.") && parts(version).starts_with(&parts(bound))
            }
        })
    }

    #[test]
    fn the_manifests_allow_the_crates_of_all_releases() {
        for release in &RELEASES {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(release.framework.id());
            let manifest: Table = fs::read_to_string(folder.join("Cargo.toml")).unwrap().parse().unwrap();
            for (name, version) in release.crates {
                let requirement = manifest["dependencies"][name]["version"].as_str().unwrap();
                assert!(allows(requirement, version), "{release}: {name} {version} is not in {requirement}");
            }
        }
    }

    #[test]
    fn a_release_without_crates_is_refused_with_the_others() {
        assert_eq!(find(Framework::Torch, "2.11.0").unwrap().to_string(), "PyTorch 2.11.0");
        for (framework, version) in [(Framework::Torch, "2.9.1"), (Framework::Mlx, "2.11.0")] {
            let error = find(framework, version).unwrap_err().to_string();
            assert!(error.contains(version) && error.contains(&list(framework)), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn a_range_has_the_releases_of_one_framework_in_order() {
        let names = |text| range(text).map(|all| all.iter().map(|r| r.to_string()).collect::<Vec<_>>());
        assert_eq!(names("2.11.0..2.13.0").unwrap(), ["PyTorch 2.11.0", "PyTorch 2.13.0"]);
        for wrong in ["2.13.0..2.11.0", "2.11.0..2.11.0", "2.13.0..0.32.2", "2.9.1..2.13.0", "..", "2.11.0"] {
            assert!(range(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn all_tables_of_dependencies_get_the_crates_of_a_release() {
        let tree = scratch("manifests");
        for framework in Framework::ALL {
            fs::create_dir_all(tree.join("src").join(framework.id())).unwrap();
            let manifest = Path::new("src").join(framework.id()).join("Cargo.toml");
            fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join(&manifest), tree.join(&manifest)).unwrap();
        }
        require_crates(find(Framework::Mlx, "0.32.3").unwrap(), &tree).unwrap();
        let text = fs::read_to_string(tree.join("src/mlx/Cargo.toml")).unwrap();
        let written: Table = text.parse().unwrap();
        let macos = &written["target"]["cfg(target_os = \"macos\")"]["dependencies"];
        for dependencies in [&written["dependencies"], macos] {
            assert_eq!(dependencies["mlx-rs"]["version"].as_str(), Some("=0.33.0"), "{text}");
            assert_eq!(dependencies["mlx-rs"]["default-features"].as_bool(), Some(false), "{text}");
        }
        assert_eq!(written["dependencies"]["mlx-sys"]["version"].as_str(), Some("=0.7.0"), "{text}");
        fs::write(tree.join("src/torch/Cargo.toml"), "[dependencies]\n").unwrap();
        let error = require_crates(find(Framework::Torch, "2.11.0").unwrap(), &tree).unwrap_err();
        assert!(error.to_string().contains("needs the crate tch"), "{error}");
        fs::remove_dir_all(tree).unwrap();
    }
}
