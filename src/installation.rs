//! The layout of an installed wheel, which has neither a checkout nor cargo.
//!
//! `scripts/wheel` puts the executables into `bin` of a Python package, next to `installation.json` and the scripts of
//! `compare-python`. The launcher of the package starts them with the variables below. Without a wheel, every function
//! here answers for a checkout.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Result, ensure};
use serde::Deserialize;

use crate::suite::Framework;

/// File next to `bin` that makes a folder an installation.
const RECORD: &str = "installation.json";
/// Interpreter of the environment, which compiles steps and runs the Python counterparts.
const PYTHON: &str = "TRANSFORMER_BENCH_PYTHON";
/// Platform tag of MLX's wheel for macOS in the environment.
const MLX_WHEEL: &str = "TRANSFORMER_BENCH_MLX_WHEEL";

/// The folder of an installed wheel and what it was built from.
#[derive(Debug, PartialEq)]
pub struct Installation {
    folder: PathBuf,
    record: Record,
}

/// The content of `installation.json`.
#[derive(Debug, Default, PartialEq, Deserialize)]
struct Record {
    commit: String,
    /// True if the working tree differed from the commit.
    dirty: bool,
    /// The version of each framework that the executables are built for, by its id.
    versions: BTreeMap<String, String>,
    /// The requirement that installs each framework, as pip takes it.
    requirements: BTreeMap<String, String>,
}

/// Finds the installation that the running program belongs to. Returns `None` in a checkout.
pub fn find() -> Option<&'static Installation> {
    static FOUND: OnceLock<Option<Installation>> = OnceLock::new();
    FOUND.get_or_init(|| Installation::of_program(&std::env::current_exe().ok()?)).as_ref()
}

/// Returns the command line that starts a subcommand, for messages.
pub fn command(name: &str) -> String {
    match find() {
        Some(_) => installed_command(name),
        None => format!("./scripts/{name}"),
    }
}

fn installed_command(name: &str) -> String {
    format!("transformer-bench {name}")
}

/// Returns a text of this program, such as help, with the commands of an installation in place of `scripts/NAME`.
pub fn words(text: &str) -> String {
    if find().is_some() { installed_words(text) } else { text.to_owned() }
}

fn installed_words(text: &str) -> String {
    let script = regex::Regex::new(r"(\./)?\bscripts/([a-z][a-z-]*)").expect("a valid expression");
    script.replace_all(text, |found: &regex::Captures| installed_command(&found[2])).into_owned()
}

/// Describes a build of a framework without CUDA.
pub fn cpu_build(framework: &str) -> String {
    let reason = if find().is_some() { "" } else { " (no NVIDIA driver when scripts/setup ran)" };
    format!("this {framework} is a CPU build{reason}")
}

/// Checks that this program belongs to a checkout.
///
/// # Errors
/// Returns an error that begins with `what` in an installation.
pub fn check_checkout(what: &str) -> Result<()> {
    ensure!(
        find().is_none(),
        "{what} needs a checkout of the suite with Rust; an installation compares --backends, --env, baseline:NAME \
         and dir:PATH"
    );
    Ok(())
}

/// Returns a folder of the user's files of this suite: `XDG_…_HOME`, or else the platform's folder below the home.
/// An empty or relative variable counts as unset (XDG base directory specification).
pub(crate) fn user_folder(xdg: Option<OsString>, home: &Path, platform: &str) -> PathBuf {
    let custom = xdg.map(PathBuf::from).filter(|path| path.is_absolute());
    custom.unwrap_or_else(|| home.join(platform)).join("transformer-bench")
}

/// Returns a variable that the launcher sets, or `None` if a program was started without it.
fn launcher_variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Returns the variable with the version of a framework in the environment.
fn version_variable(framework: Framework) -> String {
    format!("TRANSFORMER_BENCH_{}_VERSION", framework.id().to_uppercase())
}

impl Installation {
    fn of_program(program: &Path) -> Option<Self> {
        let folder = program.parent().filter(|bin| bin.ends_with("bin"))?.parent()?;
        let text = std::fs::read_to_string(folder.join(RECORD)).ok()?;
        // A damaged record has no versions, so that no framework fits.
        let record = serde_json::from_str(&text).unwrap_or_default();
        Some(Self { folder: folder.to_owned(), record })
    }

    /// Returns the commit that the wheel was built from, and whether the working tree differed from it.
    pub fn commit(&self) -> (&str, bool) {
        (&self.record.commit, self.record.dirty)
    }

    /// Returns the versions for `--version`: of the suite, and of the frameworks that fit.
    pub fn version(&self) -> String {
        let (commit, dirty) = self.commit();
        let changes = if dirty { " with changes" } else { "" };
        let mut text = format!("{} (commit {commit}{changes}", env!("CARGO_PKG_VERSION"));
        for framework in Framework::ALL {
            text.push_str(&format!(", for {} {}", framework.label(), self.needed_version(*framework)));
        }
        text + ")"
    }

    fn needed_version(&self, framework: Framework) -> &str {
        self.record.versions.get(framework.id()).map_or("of no version", String::as_str)
    }

    /// Returns the folder of the user's results and baselines.
    pub fn data_folder(&self) -> PathBuf {
        let mac = cfg!(target_os = "macos");
        let platform = if mac { "Library/Application Support" } else { ".local/share" };
        let home = std::env::home_dir().unwrap_or_else(std::env::temp_dir);
        user_folder(std::env::var_os("XDG_DATA_HOME"), &home, platform)
    }

    /// Returns the path of a script of the wheel.
    pub fn script(&self, name: &str) -> PathBuf {
        self.folder.join("scripts").join(name)
    }

    /// Returns the interpreter of the environment, or `None` if the launcher did not start this program.
    pub fn python(&self) -> Option<String> {
        launcher_variable(PYTHON).filter(|path| !path.is_empty())
    }

    /// Returns the version of a framework in the environment, with its local part. Returns `None` if it is unknown, and an
    /// empty text if the framework is missing.
    pub fn installed_version(&self, framework: Framework) -> Option<String> {
        launcher_variable(&version_variable(framework))
    }

    /// Returns the platform tag of MLX's wheel for macOS in the environment.
    pub fn mlx_wheel(&self) -> String {
        launcher_variable(MLX_WHEEL).unwrap_or_default()
    }

    /// Returns the executables of the frameworks that the environment has.
    ///
    /// # Errors
    /// Returns an error that names pip's command if a framework has another version, or if there is none.
    pub fn executables(&self) -> Result<BTreeMap<Framework, PathBuf>> {
        self.executables_for(|framework| self.installed_version(framework))
    }

    fn executables_for(
        &self,
        installed: impl Fn(Framework) -> Option<String>,
    ) -> Result<BTreeMap<Framework, PathBuf>> {
        let mut found = BTreeMap::new();
        for &framework in Framework::ALL {
            let version = installed(framework);
            if version.as_deref() == Some("") {
                continue;
            }
            let needed = self.needed_version(framework);
            // A local part such as +cpu names the build, not the version.
            let fits = version.as_deref().is_none_or(|version| version.split('+').next() == Some(needed));
            ensure!(
                fits,
                "{} {} does not fit this installation, which is built for {needed}: run {}",
                framework.label(),
                version.unwrap_or_default(),
                self.install_command(&[framework])
            );
            found.insert(framework, self.folder.join("bin").join(framework.id()));
        }
        ensure!(
            !found.is_empty(),
            "this environment has neither torch nor mlx: run {}",
            self.install_command(Framework::ALL)
        );
        Ok(found)
    }

    /// Returns pip's command that installs the versions that fit.
    pub fn install_command(&self, frameworks: &[Framework]) -> String {
        let requirement =
            |f: &Framework| self.record.requirements.get(f.id()).map(|text| format!(" '{text}'"));
        format!("pip install{}", frameworks.iter().filter_map(requirement).collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::files::tests::scratch;

    fn installation(folder: &Path) -> Installation {
        fs::create_dir_all(folder.join("bin")).unwrap();
        let text = r#"{"commit": "0123456789ab", "dirty": false, "versions": {"torch": "2.13.0", "mlx": "0.32.2"},
                       "requirements": {"torch": "torch==2.13.0", "mlx": "mlx==0.32.2"}}"#;
        fs::write(folder.join(RECORD), text).unwrap();
        Installation::of_program(&folder.join("bin/torch")).unwrap()
    }

    #[test]
    fn only_a_folder_with_a_record_is_an_installation() {
        let folder = scratch("installation");
        fs::create_dir_all(folder.join("bin")).unwrap();
        assert_eq!(Installation::of_program(&folder.join("bin/torch")), None);
        let installed = installation(&folder);
        assert_eq!(installed.commit(), ("0123456789ab", false));
        assert!(installed.version().ends_with("(commit 0123456789ab, for PyTorch 2.13.0, for MLX 0.32.2)"));
        assert_eq!(Installation::of_program(&folder.join("lib/torch")), None);
        fs::write(folder.join(RECORD), "{").unwrap();
        let damaged = Installation::of_program(&folder.join("bin/torch")).unwrap();
        assert!(damaged.executables_for(|_| Some("2.13.0".to_owned())).is_err());
        fs::remove_dir_all(folder).unwrap();
        assert_eq!(find(), None, "the tests run in a checkout");
    }

    #[test]
    fn a_framework_that_does_not_fit_is_refused_with_the_command_that_does() {
        let folder = scratch("versions");
        let installed = installation(&folder);
        let found = |torch: Option<&str>, mlx: Option<&str>| {
            let version = |f: Framework| if f == Framework::Torch { torch } else { mlx }.map(str::to_owned);
            let names = |all: BTreeMap<Framework, PathBuf>| all.keys().map(|f| f.id()).collect::<Vec<_>>();
            installed.executables_for(version).map(names).map_err(|error| error.to_string())
        };
        assert_eq!(found(Some("2.13.0+cpu"), Some("0.32.2")).unwrap(), ["torch", "mlx"]);
        assert_eq!(found(Some("2.13.0"), Some("")).unwrap(), ["torch"]);
        assert_eq!(found(Some(""), Some("0.32.2")).unwrap(), ["mlx"]);
        assert_eq!(found(None, None).unwrap().len(), 2, "started without the launcher");
        let error = found(Some("2.13.1"), Some("0.32.2")).unwrap_err();
        assert!(error.contains("2.13.1") && error.ends_with("run pip install 'torch==2.13.0'"), "{error}");
        let error = found(Some(""), Some("")).unwrap_err();
        assert!(error.ends_with("run pip install 'torch==2.13.0' 'mlx==0.32.2'"), "{error}");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn files_of_the_user_are_in_the_folders_of_the_platform() {
        let home = Path::new("/home/a b");
        let folder = |xdg: &str| user_folder(Some(xdg.into()), home, ".local/share");
        assert_eq!(folder("/data"), Path::new("/data/transformer-bench"));
        for unset in ["", "relative"] {
            assert_eq!(folder(unset), Path::new("/home/a b/.local/share/transformer-bench"));
        }
    }

    #[test]
    fn an_installation_names_its_own_commands() {
        assert_eq!(command("bench"), "./scripts/bench");
        assert_eq!(
            installed_words(
                "  scripts/bench && ./scripts/baseline save a; see scripts/compare-python, 'x/scripts'"
            ),
            "  transformer-bench bench && transformer-bench baseline save a; see transformer-bench compare-python, \
             'x/scripts'"
        );
    }
}
