//! Packages: steps that TorchInductor compiles ahead of time (AOTInductor).
//!
//! The Python that set-up prepared builds them into the cache, with the code in `inductor/`. A package is loaded only for
//! the case, torch, compiler and machine that it was built for, and only if its library is the one that was built. Any
//! other package is built again.

use std::fs;
use std::io::Write;
use std::num::NonZero;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock, mpsc};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};
use transformer_bench::backend::{CompileReport, Unsupported};
use transformer_bench::files::{Scratch, cache_folder, checksum, lock_file, read_text, write_atomic};
use transformer_bench::fixture::Fixture;
use transformer_bench::installation;
use transformer_bench::parity::dropout::Probe;
use transformer_bench::process::is_running;
use transformer_bench::results::machine::Machine;
use transformer_bench::results::one_line;
use transformer_bench::suite::{Case, Device, Framework, Optimizer, Workload};

use crate::extension;
use crate::params::ParameterLayout;

const NETWORK: &str = include_str!("inductor/network.py");
const PACKAGE: &str = include_str!("inductor/package.py");

/// File in the folder of a package with everything that it was built from, and a checksum of its library.
const RECORD: &str = "built-from.json";

/// Memory in bytes that a build needs. Inductor and its compiler had a peak of 1.4 GiB together for the forward and
/// backward pass of `gpt2-b8-t1024` in f32 on a CPU.
const BUILD_MEMORY: u64 = 2 << 30;

/// Name of the compiler in the environment of a build if there is none.
const NO_COMPILER: &str = "none";

/// The C++ compiler that Inductor calls on Linux. It hides the weak templates of libstdc++, which libraries of other
/// compilers would otherwise share: packages of Ubuntu 24.04's g++ ended in a segmentation fault.
const COMPILER: &str = "#!/bin/sh
case \" $* \" in
  *\" -shared \"*) set -- \"$@\" -static-libstdc++ -static-libgcc -Wl,-Bsymbolic -Wl,--exclude-libs,ALL ;;
esac
exec c++ \"$@\"
";

/// Returns the Python that has torch, and a `PYTHONPATH` that it needs for that. An installation uses the interpreter of
/// its environment, and a checkout that of set-up.
///
/// # Errors
/// Returns the reason why this machine cannot build packages.
fn inductor_python() -> Result<(String, &'static str), Unsupported> {
    let unsupported = |reason: &str| Err(Unsupported(reason.to_owned()));
    if let Some(own) = installation::find() {
        return match own.python() {
            None => {
                unsupported("no interpreter is known: start this program by the command transformer-bench")
            }
            Some(_) if !has_compiler() => unsupported(
                "-compile needs a C++ compiler (Debian, Ubuntu: apt install g++; macOS: xcode-select --install)",
            ),
            Some(python) => Ok((python, "")),
        };
    }
    match (env!("TRANSFORMER_BENCH_NO_INDUCTOR"), env!("TRANSFORMER_BENCH_PYTHON")) {
        ("", "") => unsupported("set-up prepared no torch for Python: run ./scripts/setup"),
        ("", python) => Ok((python.to_owned(), env!("TRANSFORMER_BENCH_PYTHONPATH"))),
        (reason, _) => unsupported(reason),
    }
}

/// Returns true if there is a C++ compiler. Without the Command Line Tools, the c++ of macOS asks the user for them, so
/// it is not started.
fn has_compiler() -> bool {
    let has_tools =
        || Command::new("xcode-select").arg("-p").output().is_ok_and(|done| done.status.success());
    (!cfg!(target_os = "macos") || has_tools()) && build_environment()["compiler"] != NO_COMPILER
}

/// Checks that a workload has a `-compile` variant, and that this machine can build packages.
///
/// # Errors
/// Returns the reason if not.
pub fn check_supported(workload: Workload) -> Result<(), Unsupported> {
    if workload.trains() || workload == Workload::Forward {
        return inductor_python().map(drop);
    }
    Err(Unsupported("-compile exists for forward, and for the workloads with a backward pass".to_owned()))
}

/// Returns the case to compile. Of a train step, it is the forward and backward pass of one micro-batch of one rank.
pub fn compiled_case(case: &Case) -> Case {
    let workload = match case.workload {
        Workload::TrainStep => Workload::ForwardBackward,
        other => other,
    };
    // The optimizer is not a part of the package.
    let shape = case.shape.micro_batch().with_optimizer(Optimizer::Adamw);
    Case { workload, shape, ..*case }
}

/// Returns the package that a fixture runs.
pub fn package_of(fixture: &Fixture) -> Package {
    Package::new(&compiled_case(&fixture.case), fixture.dropout.weights)
}

/// Returns the packages that timing and checking a case need.
pub fn packages_for(case: &Case) -> Vec<Package> {
    let compiled = compiled_case(case);
    let mut all = vec![Package::new(&compiled, compiled.dropout().weights)];
    if compiled.dropout().any() {
        // The parity check runs without dropout. If all probabilities are inputs, it needs the same package.
        all.push(Package::new(&compiled, 0.0));
        all.dedup();
        let probe = compiled_case(&Probe::new(*case).case);
        all.push(Package::new(&probe, probe.dropout().weights));
    }
    all
}

/// Returns the number of packages to build at the same time: as many as there are cores, if the memory allows it.
fn max_builds() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let by_memory = (Machine::read().memory_bytes / BUILD_MEMORY) as usize;
    cores.min(by_memory).max(1)
}

/// Builds the missing packages of cases side by side, because Inductor uses one core for most of the time. Calls
/// `report` once for each case, when its packages are built or one of them has failed.
pub fn build_all(cases: &[Case], report: &mut CompileReport) {
    let start = Instant::now();
    let mut waiting: Vec<(Case, Vec<Package>)> =
        cases.iter().map(|case| (*case, packages_for(case))).collect();
    let mut packages: Vec<Package> = Vec::new();
    for package in waiting.iter().flat_map(|(_, packages)| packages) {
        if !packages.contains(package) {
            packages.push(package.clone());
        }
    }
    let next = Mutex::new(packages.iter());
    std::thread::scope(|scope| {
        let (sender, built) = mpsc::channel();
        for _ in 0..max_builds().min(packages.len()) {
            let (sender, next) = (sender.clone(), &next);
            scope.spawn(move || {
                let take = || next.lock().expect("no panic").next();
                while let Some(package) = take() {
                    // The receiver lives until all senders are dropped.
                    let _ = sender.send((package, package.build()));
                }
            });
        }
        drop(sender);
        for (package, outcome) in built {
            let error = outcome.err().map(|error| format!("{error:#}"));
            waiting.retain_mut(|(case, missing)| {
                let count = missing.len();
                missing.retain(|other| other != package);
                match &error {
                    Some(error) if missing.len() < count => report(case, Err(anyhow!(error.clone()))),
                    None if missing.is_empty() => report(case, Ok(start.elapsed())),
                    _ => return true,
                }
                false
            });
        }
    });
}

/// Returns the version of torch. Builds of one version with and without CUDA generate other code, and an environment can
/// change from one to the other.
fn torch_version() -> String {
    installation::find()
        .and_then(|own| own.installed_version(Framework::Torch))
        .unwrap_or_else(extension::version)
}

/// Returns what the generated code depends on besides the case: instruction set, GPUs, compiler, torch and sources.
fn build_environment() -> &'static Value {
    static ENVIRONMENT: OnceLock<Value> = OnceLock::new();
    ENVIRONMENT.get_or_init(|| {
        let machine = Machine::read();
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let flags = cpu.lines().find(|l| l.starts_with("flags") || l.starts_with("Features"));
        let compiler = Command::new("c++").arg("--version").output().ok();
        let compiler = compiler.map(|done| String::from_utf8_lossy(&done.stdout).into_owned());
        json!({
            "cpu": flags.map_or(machine.cpu, |line| line.split_once(':').map_or(line, |(_, f)| f).trim().to_owned()),
            "gpus": machine.gpus,
            "compiler": compiler.as_deref().and_then(|text| text.lines().next()).unwrap_or(NO_COMPILER),
            "torch": torch_version(),
            "sources": format!("{:016x}", checksum(format!("{NETWORK}{PACKAGE}{COMPILER}").as_bytes())),
        })
    })
}

/// A package, identified by everything that it is built from.
#[derive(Clone, PartialEq)]
pub struct Package(Value);

impl Package {
    /// `weights` is the dropout probability of the attention weights, which is a constant in CUDA's fused kernels. The
    /// other probabilities are inputs of the package.
    pub fn new(case: &Case, weights: f64) -> Self {
        let mut description = case.description();
        if case.backend.device() == Device::NvidiaGpu {
            description["dropout"]["weights"] = json!(weights);
        }
        let layout = ParameterLayout::new(case.shape, true);
        Self(json!({"case": description, "leaves": layout.leaf_names(), "environment": build_environment()}))
    }

    fn folder(&self) -> Result<PathBuf> {
        Ok(cache_folder()?.join(format!("compiled-{:016x}", checksum(self.0.to_string().as_bytes()))))
    }

    pub fn is_built(&self) -> bool {
        self.folder().and_then(|folder| self.library_in(&folder)).is_ok()
    }

    /// Returns the path of the library, and builds it first if it is missing.
    ///
    /// # Errors
    /// Returns an error if the build fails.
    pub fn library(&self) -> Result<PathBuf> {
        self.build()?;
        self.library_in(&self.folder()?)
    }

    /// Returns the record of the library in a folder.
    fn record(&self, library: &Path) -> Result<Value> {
        let bytes = fs::read(library).with_context(|| format!("{} could not be read", library.display()))?;
        Ok(json!({"package": self.0, "library": format!("{:016x}", checksum(&bytes))}))
    }

    /// Returns the path of the library in a folder, after a check of its record. A truncated library would end the
    /// process when it is loaded.
    fn library_in(&self, folder: &Path) -> Result<PathBuf> {
        let library = find_library(folder)?;
        let record: Value = serde_json::from_str(&read_text(&folder.join(RECORD))?)?;
        ensure!(record == self.record(&library)?, "{} is another package or damaged", folder.display());
        Ok(library)
    }

    /// Builds the package if it is missing. A failed build leaves no folder.
    ///
    /// # Errors
    /// Returns the last line of Inductor's log if it fails.
    pub fn build(&self) -> Result<()> {
        if self.is_built() {
            return Ok(());
        }
        let (python, python_path) = inductor_python().map_err(|Unsupported(reason)| anyhow!(reason))?;
        let folder = self.folder()?;
        let _lock = lock_file(&folder)?;
        // Processes that wait for the lock have the file open. Later ones find the package.
        let _lock_path = Scratch(folder.with_extension("lock"));
        if self.is_built() {
            return Ok(());
        }
        remove_abandoned_builds(&cache_folder()?);
        let work = Scratch(folder.with_extension(format!("partial-{}", std::process::id())));
        let output = work.0.join("package");
        fs::create_dir_all(&output)
            .and_then(|()| fs::create_dir_all(work.0.join("tmp")))
            .with_context(|| format!("{} could not be created", work.0.display()))?;
        self.run_inductor(&python, python_path, &work.0, &output)?;
        write_atomic(&output.join(RECORD), &self.record(&find_library(&output)?)?.to_string())?;
        let _ = fs::remove_dir_all(&folder).or_else(|_| fs::remove_file(&folder));
        fs::rename(&output, &folder).with_context(|| format!("{} could not be created", folder.display()))
    }

    /// Runs Inductor, which writes the package to `output`. Its temporary files stay in `work`.
    fn run_inductor(&self, python: &str, python_path: &str, work: &Path, output: &Path) -> Result<()> {
        write_atomic(&work.join("network.py"), NETWORK)?;
        write_atomic(&work.join("package.py"), PACKAGE)?;
        let mut command = Command::new(python);
        command
            .arg(work.join("package.py"))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("TMPDIR", work.join("tmp"))
            .env("TORCHINDUCTOR_CACHE_DIR", work.join("tmp/inductor"))
            .env("TRITON_CACHE_DIR", work.join("tmp/triton"))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(fs::File::create(work.join("log"))?);
        if !python_path.is_empty() {
            command.env("PYTHONPATH", python_path);
        }
        if cfg!(target_os = "linux") {
            // Inductor recognizes the compiler by its name.
            let clang = build_environment()["compiler"].as_str().is_some_and(|text| text.contains("clang"));
            let compiler = work.join(if clang { "clang++" } else { "g++" });
            write_atomic(&compiler, COMPILER)?;
            fs::set_permissions(&compiler, fs::Permissions::from_mode(0o755))?;
            command.env("CXX", compiler);
        }
        let mut child = command.spawn().with_context(|| format!("{python} does not start"))?;
        let request = json!({"case": self.0["case"], "leaves": self.0["leaves"], "folder": output});
        let sent = child.stdin.take().expect("piped").write_all(request.to_string().as_bytes());
        let status = child.wait()?;
        if !status.success() || sent.is_err() {
            let log = fs::read_to_string(work.join("log")).unwrap_or_default();
            let last = log.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it printed nothing");
            bail!("Inductor failed ({status}): {}", one_line(last));
        }
        Ok(())
    }
}

/// Returns the path of the only library in a folder.
fn find_library(folder: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| format!("{} could not be read", folder.display()))?;
    let mut paths = entries.flatten().map(|entry| entry.path());
    let library = paths.find(|path| path.extension().is_some_and(|e| e == "so") && path.is_file());
    library.with_context(|| format!("{} has no library", folder.display()))
}

/// Removes the work folders of builds whose process was killed.
fn remove_abandoned_builds(cache: &Path) {
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let process =
            name.strip_prefix("compiled-").and_then(|rest| rest.split_once(".partial-")?.1.parse().ok());
        if process.is_some_and(|process| !is_running(process)) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package() -> Package {
        Package::new(&"train-step/torch-cpu/f32-compile/indicator-tiny-b2".parse().unwrap(), 0.0)
    }

    #[test]
    fn the_folder_depends_on_everything_that_a_package_is_built_from() {
        let folder = |change: &dyn Fn(&mut Value)| {
            let mut package = package();
            change(&mut package.0);
            package.folder().unwrap()
        };
        let own = folder(&|_| {});
        assert_eq!(own, folder(&|_| {}));
        for part in ["cpu", "gpus", "compiler", "torch", "sources"] {
            assert!(!build_environment()[part].is_null(), "{part}");
            assert_ne!(own, folder(&|value| value["environment"][part] = json!("another")), "{part}");
        }
        for part in ["precision", "batch", "workload", "device", "model"] {
            assert_ne!(own, folder(&|value| value["case"][part] = json!("another")), "{part}");
        }
    }

    #[test]
    fn a_train_step_and_its_passes_share_a_package() {
        let package = |case: &str| Package::new(&compiled_case(&case.parse().unwrap()), 0.0);
        let own = package("train-step/torch-cpu/mixed-compile/indicator-b16");
        assert_eq!(own.0["case"]["workload"], "forward-backward");
        assert!(own == package("forward-backward/torch-cpu/mixed-compile/indicator-b16"));
        assert!(own == package("train-step/torch-cpu/mixed-compile/indicator-b32-dp2"));
        assert!(own == package("train-step/torch-cpu/mixed-compile/indicator-b64-a4"));
        assert!(own == package("train-step/torch-cpu/mixed-compile/indicator-b16-muon"));
        assert!(own == package("train-step/torch-cpu/mixed-compile/indicator-b128-a4-dp2"));
        assert!(own != package("train-step/torch-cpu/mixed-compile/indicator-b32"));
        assert!(own != package("forward/torch-cpu/mixed-compile/indicator-b16"));
        let all = packages_for(&"train-step/torch-cuda/mixed-compile/indicator-b16".parse().unwrap());
        assert_eq!(all.len(), 3, "with dropout, without it, and the probe");
        assert!(all.iter().all(|package| package.0["case"]["workload"] == "forward-backward"));
    }

    #[test]
    fn a_damaged_library_and_another_package_are_not_loaded() {
        let folder = std::env::temp_dir().join(format!("transformer-bench-package-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let package = package();
        let (library, record) = (folder.join("step.so"), folder.join(RECORD));
        fs::write(&library, "library").unwrap();
        let good = package.record(&library).unwrap();
        fs::write(&record, good.to_string()).unwrap();
        assert_eq!(package.library_in(&folder).unwrap(), library);
        let mut other = good.clone();
        other["package"]["environment"]["cpu"] = json!("another");
        for text in [other.to_string(), "{".to_owned(), String::new()] {
            fs::write(&record, text).unwrap();
            assert!(package.library_in(&folder).is_err());
        }
        fs::write(&record, good.to_string()).unwrap();
        // A full disk truncates a file, and a user can replace it.
        for bytes in ["librar", "", "another"] {
            fs::write(&library, bytes).unwrap();
            assert!(package.library_in(&folder).unwrap_err().to_string().contains("damaged"));
        }
        fs::remove_file(&library).unwrap();
        fs::create_dir(&library).unwrap();
        assert!(package.library_in(&folder).unwrap_err().to_string().contains("no library"));
        fs::remove_dir_all(folder).unwrap();
    }
}
