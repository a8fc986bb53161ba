//! Packages of compiled steps: made by the Python that set-up prepared, kept in the cache, and loaded
//! only where they were made for just this case, torch, compiler and machine.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use transformer_bench::parity::dropout::Probe;
use transformer_bench::results::machine::Machine;
use transformer_bench::results::{Scratch, cache_folder, checksum, is_running, lock_file, one_line};
use transformer_bench::suite::{Case, Device, Shape, Workload};

use crate::{extension, params};

const NETWORK: &str = include_str!("inductor/network.py");
const PACKAGE: &str = include_str!("inductor/package.py");

/// What a package's folder says it was made of.
const RECORD: &str = "made.json";

/// The C++ compiler as Inductor calls it on Linux. libstdc++'s weak templates would else be shared with
/// libraries that other compilers built: what Ubuntu 24.04's g++ made ended in a segmentation fault when it
/// was loaded.
const COMPILER: &str = "#!/bin/sh
case \" $* \" in
  *\" -shared \"*) set -- \"$@\" -static-libstdc++ -static-libgcc -Wl,-Bsymbolic -Wl,--exclude-libs,ALL ;;
esac
exec c++ \"$@\"
";

/// Why no package can be made here; None where it can.
pub fn missing() -> Option<String> {
    let reason = env!("TRANSFORMER_BENCH_NO_INDUCTOR");
    match (reason, env!("TRANSFORMER_BENCH_PYTHON")) {
        ("", "") => Some("set-up prepared no torch for Python: run ./scripts/setup".to_owned()),
        ("", _) => None,
        (reason, _) => Some(reason.to_owned()),
    }
}

/// A package, by what it is made of.
#[derive(PartialEq)]
pub struct Package(Value);

/// What is compiled of a case: of a step that ranks share what one of them does before gradients are
/// exchanged.
pub fn compiled(case: &Case) -> Case {
    match case.shape {
        Shape::Model { model, batch, ranks } if ranks > 1 => Case {
            workload: Workload::ForwardBackward,
            shape: Shape::of_model(model, batch / ranks),
            ..*case
        },
        _ => *case,
    }
}

/// The packages that timing and proving a case takes.
pub fn of(case: &Case) -> Vec<Package> {
    let own = compiled(case);
    let mut all = vec![Package::new(&own, own.dropout().weights)];
    if own.dropout().any() {
        // Proofs run without dropout; where it is a tensor this is the same package.
        all.push(Package::new(&own, 0.0));
        all.dedup();
        let probe = Probe::new(*case).case;
        all.push(Package::new(&probe, probe.dropout().weights));
    }
    all
}

/// Makes all that are not there, side by side: Inductor uses one core.
///
/// # Errors
/// Where one of them can't be made.
pub fn make(all: &[Package]) -> Result<()> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = all.iter().map(|package| scope.spawn(|| package.make())).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Vec<_>>()
    })
    .into_iter()
    .collect()
}

/// What the generated code depends on beside the case: the instruction set, the compiler, the device.
fn here() -> &'static Value {
    static HERE: OnceLock<Value> = OnceLock::new();
    HERE.get_or_init(|| {
        let machine = Machine::read();
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let flags = cpu.lines().find(|l| l.starts_with("flags") || l.starts_with("Features"));
        let compiler = Command::new("c++").arg("--version").output().ok();
        let compiler = compiler.map(|done| String::from_utf8_lossy(&done.stdout).into_owned());
        json!({
            "cpu": flags.map_or(machine.cpu, |line| line.split_once(':').map_or(line, |(_, f)| f).trim().to_owned()),
            "gpus": machine.gpus,
            "compiler": compiler.as_deref().and_then(|text| text.lines().next()).unwrap_or("none"),
            "torch": extension::version(),
            "sources": format!("{:016x}", checksum(format!("{NETWORK}{PACKAGE}{COMPILER}").as_bytes())),
        })
    })
}

impl Package {
    /// `weights` is the dropout of attention's weights, which CUDA's fused kernels hold as a number; every
    /// other probability is an input.
    pub fn new(case: &Case, weights: f64) -> Self {
        let mut description = case.description();
        if case.backend.device() == Device::NvidiaGpu {
            description["dropout"]["weights"] = json!(weights);
        }
        Self(json!({"case": description, "leaves": params::packed_names(case.shape), "on": here()}))
    }

    fn folder(&self) -> Result<PathBuf> {
        Ok(cache_folder()?.join(format!("compiled-{:016x}", checksum(self.0.to_string().as_bytes()))))
    }

    /// Whether it has been made.
    pub fn there(&self) -> bool {
        self.folder().is_ok_and(|folder| folder.join(RECORD).exists())
    }

    /// The library, made where it is not there.
    ///
    /// # Errors
    /// Where it can't be made, or what lies in its place was made of or for something else.
    pub fn library(&self) -> Result<PathBuf> {
        self.make()?;
        self.library_in(&self.folder()?)
    }

    /// The library of a folder that was made as this package asks for.
    fn library_in(&self, folder: &Path) -> Result<PathBuf> {
        let record = fs::read_to_string(folder.join(RECORD)).unwrap_or_default();
        let record: Value = serde_json::from_str(&record).unwrap_or_default();
        ensure!(
            record == self.0,
            "{} was made of another case, or for another CPU, GPU, compiler or torch: remove it",
            folder.display()
        );
        let libraries = fs::read_dir(folder)?.flatten().map(|entry| entry.path());
        let library = libraries.into_iter().find(|path| path.extension().is_some_and(|e| e == "so"));
        library.with_context(|| format!("{} holds no library: remove it", folder.display()))
    }

    /// Makes it, whole or not at all, unless it is there.
    ///
    /// # Errors
    /// Where Inductor fails, with its last line.
    pub fn make(&self) -> Result<()> {
        if self.there() {
            return Ok(());
        }
        if let Some(reason) = missing() {
            bail!("{reason}");
        }
        let (place, home) = (self.folder()?, cache_folder()?);
        let _alone = lock_file(&place)?;
        // Whoever waits for it holds the file; a later one finds the package.
        let _lock = Scratch(place.with_extension("lock"));
        if self.there() {
            return Ok(());
        }
        drop_left(&home);
        let work = Scratch(place.with_extension(format!("partial-{}", std::process::id())));
        let made = work.0.join("made");
        fs::create_dir_all(&made)
            .and_then(|()| fs::create_dir_all(work.0.join("tmp")))
            .with_context(|| format!("{} could not be made", work.0.display()))?;
        self.run(&work.0, &made)?;
        fs::write(made.join(RECORD), self.0.to_string())?;
        let _ = fs::remove_dir_all(&place);
        fs::rename(&made, &place).with_context(|| format!("{} could not be made", place.display()))?;
        Ok(())
    }

    /// Runs Inductor, with everything that it leaves inside `work`.
    fn run(&self, work: &Path, made: &Path) -> Result<()> {
        let write = |name: &str, text: &str| fs::write(work.join(name), text);
        write("network.py", NETWORK)?;
        write("package.py", PACKAGE)?;
        let python = env!("TRANSFORMER_BENCH_PYTHON");
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
        if !env!("TRANSFORMER_BENCH_PYTHONPATH").is_empty() {
            command.env("PYTHONPATH", env!("TRANSFORMER_BENCH_PYTHONPATH"));
        }
        if cfg!(target_os = "linux") {
            // Inductor goes by the compiler's name.
            let clang = here()["compiler"].as_str().is_some_and(|text| text.contains("clang"));
            let compiler = work.join(if clang { "clang++" } else { "g++" });
            fs::write(&compiler, COMPILER)?;
            fs::set_permissions(&compiler, fs::Permissions::from_mode(0o755))?;
            command.env("CXX", compiler);
        }
        let mut child = command.spawn().with_context(|| format!("{python} does not start"))?;
        let asked = json!({"case": self.0["case"], "leaves": self.0["leaves"], "folder": made});
        let told = child.stdin.take().expect("piped").write_all(asked.to_string().as_bytes());
        let status = child.wait()?;
        if !status.success() || told.is_err() {
            let log = fs::read_to_string(work.join("log")).unwrap_or_default();
            let last = log.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
            bail!("Inductor made no code ({status}): {}", one_line(last));
        }
        Ok(())
    }
}

/// Removes what makings that were killed have left.
fn drop_left(home: &Path) {
    for entry in fs::read_dir(home).into_iter().flatten().flatten() {
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
    fn a_package_is_known_by_all_that_it_is_made_of() {
        let folder = |change: &dyn Fn(&mut Value)| {
            let mut package = package();
            change(&mut package.0);
            package.folder().unwrap()
        };
        let own = folder(&|_| {});
        assert_eq!(own, folder(&|_| {}));
        for part in ["cpu", "gpus", "compiler", "torch", "sources"] {
            assert!(!here()[part].is_null(), "{part}");
            assert_ne!(own, folder(&|value| value["on"][part] = json!("another")), "{part}");
        }
        for part in ["precision", "batch", "workload", "device", "model"] {
            assert_ne!(own, folder(&|value| value["case"][part] = json!("another")), "{part}");
        }
    }

    #[test]
    fn what_was_made_for_another_machine_is_refused() {
        let folder = std::env::temp_dir().join(format!("transformer-bench-package-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let package = package();
        fs::write(folder.join("step.so"), "").unwrap();
        fs::write(folder.join(RECORD), package.0.to_string()).unwrap();
        assert_eq!(package.library_in(&folder).unwrap(), folder.join("step.so"));
        let mut other = package.0.clone();
        other["on"]["cpu"] = json!("another");
        for record in [other.to_string(), "{".to_owned(), String::new()] {
            fs::write(folder.join(RECORD), record).unwrap();
            let refused = package.library_in(&folder).unwrap_err().to_string();
            assert!(refused.contains("another CPU") && refused.contains("remove it"), "{refused}");
        }
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn the_leaves_are_those_that_are_packed() {
        let case: Case = "train-step/torch-cpu/f32-compile/indicator-tiny-b2".parse().unwrap();
        let fixture = transformer_bench::model::fixture::Fixture::new(case);
        let (tensors, _) = params::pack(fixture.parameters(), tch::Device::Cpu, tch::Kind::Float, true);
        let names = params::packed_names(case.shape);
        assert_eq!(names.len(), tensors.len());
        assert!(names.contains(&"blocks.0.attention.qkv.weight".to_owned()), "{names:?}");
    }
}
