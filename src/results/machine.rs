//! The machine of a run: hardware, operating system, versions and commit.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::apple;
use crate::installation;
use crate::suite::custom_model::MachineCapacity;
use crate::suite::{BackendId, Device, Precision};

/// The machine as `results.json` and baselines record it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    pub cpu: String,
    /// Number of cores that this process may use.
    pub cores: usize,
    pub memory_bytes: u64,
    pub os: String,
    pub arch: String,
    /// The widest vector extension of an x86-64 CPU, `AVX512` or `AVX2`. Empty on other CPUs and in older files.
    #[serde(default)]
    pub simd: String,
    /// Names of the NVIDIA GPUs, or of Apple's GPU. Empty without a GPU.
    pub gpus: Vec<String>,
    pub driver: String,
    /// The day of the run in UTC, for example `2026-11-25`. Empty in older files.
    #[serde(default)]
    pub date: String,
    pub commit: String,
    /// True if the working tree differed from the commit.
    pub dirty: bool,
    /// Names and versions of frameworks, BLAS and drivers, and thread counts, as the backends report them.
    pub versions: Vec<(String, String)>,
    /// Cargo's build profile, `release` or `debug`.
    #[serde(default)]
    pub profile: String,
    /// Settings that govern clocks and power, if the system reports them.
    #[serde(default)]
    pub power: Vec<(String, String)>,
    /// CPU time that other programs used before the run, in cores.
    #[serde(default)]
    pub background_load: Option<f64>,
    /// Environment variables that the frameworks and their libraries read.
    #[serde(default)]
    pub environment: Vec<(String, String)>,
}

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let done = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8_lossy(&done.stdout).trim().to_owned();
    (done.status.success() && !text.is_empty()).then_some(text)
}

/// Returns the commit of the suite, and whether its files differ from the commit.
///
/// An installation has recorded both. Other executables read the checkout that built them, or the one that they run in
/// if they were carried to another machine. A repository of the user is neither.
fn source_version() -> (String, bool) {
    if let Some(own) = installation::find() {
        let (commit, dirty) = own.commit();
        return (commit.to_owned(), dirty);
    }
    let git = |root: &str, arguments: &[&str]| output("git", &[&["-C", root], arguments].concat());
    let is_checkout = |root: &&str| {
        // A folder without .git can be part of any repository.
        [".git", "src/results/machine.rs"].iter().all(|name| Path::new(root).join(name).exists())
    };
    let Some(root) = [env!("CARGO_MANIFEST_DIR"), "."].into_iter().find(is_checkout) else {
        return ("unknown".to_owned(), false);
    };
    let commit = git(root, &["rev-parse", "--short=12", "HEAD"]);
    let dirty = git(root, &["status", "--porcelain", "--untracked-files=no"]);
    (commit.clone().unwrap_or_else(|| "unknown".to_owned()), commit.is_some() && dirty.is_some())
}

impl Machine {
    /// Reads the machine. The backends add `versions`.
    pub fn read() -> Self {
        let mut system = sysinfo::System::new();
        system.refresh_memory();
        system.refresh_cpu_all();
        let cpu = system.cpus().first().map(|c| c.brand().trim().to_owned()).unwrap_or_default();
        let (mut gpus, mut driver) = (Vec::new(), String::new());
        if let Some(text) =
            output("nvidia-smi", &["--query-gpu=name,driver_version", "--format=csv,noheader"])
        {
            for line in text.lines() {
                let (name, version) = line.rsplit_once(", ").unwrap_or((line, ""));
                gpus.push(name.to_owned());
                driver = format!("NVIDIA {version}");
            }
        } else if cfg!(target_os = "macos") {
            let ioreg = output("ioreg", &["-rc", "AGXAccelerator", "-d1"]);
            gpus.push(apple::gpu_name(&cpu, &ioreg.unwrap_or_default()));
        }
        let (commit, dirty) = source_version();
        Self {
            cpu,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: system.total_memory(),
            os: sysinfo::System::long_os_version().unwrap_or_else(|| std::env::consts::OS.to_owned()),
            arch: std::env::consts::ARCH.to_owned(),
            simd: simd_extension().to_owned(),
            date: output("date", &["-u", "+%F"]).unwrap_or_default(),
            gpus,
            driver,
            commit,
            dirty,
            versions: Vec::new(),
            profile: if cfg!(debug_assertions) { "debug" } else { "release" }.to_owned(),
            power: power(),
            background_load: None,
            environment: environment(),
        }
    }

    /// Returns a sentence for each power setting of a Mac that makes it slower.
    pub fn power_warnings(&self) -> Vec<&'static str> {
        let has = |name: &str, value: &str| self.power.iter().any(|(n, v)| n == name && v.contains(value));
        let warnings = [
            (has(SOURCE, "Battery"), "The machine ran on battery power."),
            (has(LOW_POWER_MODE, "on"), "Low-power mode was on."),
        ];
        warnings.into_iter().filter_map(|(applies, warning)| applies.then_some(warning)).collect()
    }

    /// Adds the versions that are not listed yet.
    pub fn add_versions(&mut self, versions: impl IntoIterator<Item = (String, String)>) {
        for entry in versions {
            if !self.versions.contains(&entry) {
                self.versions.push(entry);
            }
        }
    }

    /// Returns a text that changes if a parity check must run again: the hardware, drivers, versions and settings.
    pub fn fingerprint(&self) -> String {
        let m = self;
        format!("{:?}", (&m.cpu, m.cores, &m.os, &m.gpus, &m.driver, &m.versions, &m.environment))
    }

    /// Returns a readable name for the hardware, `[a-z0-9-]+`: the GPU and its count, or the CPU.
    ///
    /// Clouds sell different CPUs under one name, so the vector extension and the cores belong to it. The GPU of a Mac
    /// shares the memory, so the memory belongs to its name.
    pub fn slug(&self) -> String {
        let name = match &self.gpus[..] {
            [gpu] if gpu.starts_with("Apple") => format!("{gpu} {} GB", gibibytes(self.memory_bytes)),
            [gpu] => gpu.trim_start_matches("NVIDIA ").to_owned(),
            [gpu, ..] => format!("{} x{}", gpu.trim_start_matches("NVIDIA "), self.gpus.len()),
            // Linux on Arm does not always report a name.
            [] if self.cpu.is_empty() => format!("{} {} cores", self.arch, self.cores),
            [] => format!("{} {} {} cores", self.cpu, self.simd, self.cores),
        };
        let mut slug = String::new();
        for c in name.to_lowercase().replace("(r)", " ").replace("(tm)", " ").chars() {
            match c {
                c if c.is_ascii_alphanumeric() => slug.push(c),
                _ if !slug.is_empty() && !slug.ends_with('-') => slug.push('-'),
                _ => {}
            }
        }
        let slug = slug.trim_end_matches('-');
        if slug.is_empty() { "unknown".to_owned() } else { slug.to_owned() }
    }

    /// Returns one line for each difference that makes results of two machines incomparable. The commit is
    /// not one of them.
    pub fn differences(&self, other: &Machine) -> Vec<String> {
        let mut all = Vec::new();
        let mut differ = |what: &str, a: String, b: String| {
            if a != b {
                let word = |text: String| if text.is_empty() { "none".to_owned() } else { text };
                all.push(format!("{what}: {} / {}", word(a), word(b)));
            }
        };
        differ("CPU", self.cpu.clone(), other.cpu.clone());
        differ("cores", self.cores.to_string(), other.cores.to_string());
        // Kernels reserve a little more or less from boot to boot.
        let gib = |bytes: u64| format!("{} GiB", gibibytes(bytes));
        differ("memory", gib(self.memory_bytes), gib(other.memory_bytes));
        differ("architecture", self.arch.clone(), other.arch.clone());
        // Older files lack it.
        if !self.simd.is_empty() && !other.simd.is_empty() {
            differ("vector instructions", self.simd.clone(), other.simd.clone());
        }
        differ("system", self.os.clone(), other.os.clone());
        differ("GPU", self.gpus.join(", "), other.gpus.join(", "));
        differ("driver", self.driver.clone(), other.driver.clone());
        differ("build profile", self.profile.clone(), other.profile.clone());
        for (what, left, right) in [
            ("", &self.versions, &other.versions),
            ("power: ", &self.power, &other.power),
            ("environment: ", &self.environment, &other.environment),
        ] {
            let value = |list: &[(String, String)], name: &str| {
                list.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone()).unwrap_or_default()
            };
            let names: std::collections::BTreeSet<&String> =
                left.iter().chain(right.iter()).map(|(name, _)| name).collect();
            for name in names {
                let [a, b] = [left, right].map(|list| value(list, name));
                if !OLDER_FILES_LACK.contains(&name.as_str()) || !(a.is_empty() || b.is_empty()) {
                    differ(&format!("{what}{name}"), a, b);
                }
            }
        }
        all
    }
}

/// Names of versions that older files lack.
const OLDER_FILES_LACK: &[&str] =
    &["PyTorch compiler", "PyTorch oneDNN", "PyTorch OpenMP", "PyTorch CUDA", "PyTorch cuDNN"];

/// Names of power settings of a Mac.
const SOURCE: &str = "source";
const LOW_POWER_MODE: &str = "low power mode";

fn gibibytes(bytes: u64) -> f64 {
    (bytes as f64 / (1u64 << 30) as f64).round()
}

fn simd_extension() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            return "AVX512";
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            return "AVX2";
        }
    }
    ""
}

/// Returns the clock governor, turbo and energy preference. On NVIDIA it adds the power limit; on a Mac, the
/// power source and the low-power mode.
fn power() -> Vec<(String, String)> {
    let mut all = Vec::new();
    let mut add = |name: &str, value: Option<String>| {
        if let Some(value) = value.map(|v| v.trim().to_owned()).filter(|v| !v.is_empty()) {
            all.push((name.to_owned(), value));
        }
    };
    let cpufreq = "/sys/devices/system/cpu/cpu0/cpufreq";
    add("governor", fs::read_to_string(format!("{cpufreq}/scaling_governor")).ok());
    add("energy preference", fs::read_to_string(format!("{cpufreq}/energy_performance_preference")).ok());
    add("no turbo", fs::read_to_string("/sys/devices/system/cpu/intel_pstate/no_turbo").ok());
    let query = ["--query-gpu=power.limit,clocks.max.sm,mig.mode.current", "--format=csv,noheader"];
    add("GPU power limit, maximum clock, MIG", output("nvidia-smi", &query).map(|t| t.replace('\n', "; ")));
    if cfg!(target_os = "macos") {
        let [battery, settings] = [&["-g", "batt"][..], &["-g"]].map(|arguments| output("pmset", arguments));
        add(SOURCE, apple::power_source(&battery.unwrap_or_default()).map(str::to_owned));
        add(LOW_POWER_MODE, apple::low_power_mode(&settings.unwrap_or_default()).map(str::to_owned));
    }
    all
}

fn environment() -> Vec<(String, String)> {
    const READ: &[&str] = &[
        "OMP_",
        "KMP_",
        "GOMP_",
        "MKL_",
        "OPENBLAS_",
        "VECLIB_",
        "PYTORCH_",
        "TORCH_",
        "MLX_",
        "CUDA_",
        "CUBLAS_",
        "CUDNN_",
        "NCCL_",
        "GLOO_",
        "NVIDIA_TF32_OVERRIDE",
        "MALLOC_",
        "GLIBC_TUNABLES",
        "LD_PRELOAD",
        "DYLD_INSERT_LIBRARIES",
        "TRANSFORMER_BENCH_MALLOC",
        "DNNL_",
        "ONEDNN_",
        "ATEN_",
    ];
    // The record of a variable that is not UTF-8 has replacement characters.
    let mut all: Vec<(String, String)> = std::env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
        .filter(|(name, _)| READ.iter().any(|prefix| name.starts_with(prefix)))
        // This suite sets it itself, from the precision of the case.
        .filter(|(name, _)| name != "MLX_ENABLE_TF32")
        .collect();
    all.sort();
    all
}

/// Returns a rate in FLOP/s that the device cannot exceed, or `None` for an unknown GPU. A measured rate above
/// it means that the time is wrong.
///
/// NVIDIA: the dense data-sheet peak plus 10 %. CPU: every core at 6 GHz with the widest fused multiply-add
/// units sold. Apple's GPU: four times the peak of an M4 Max.
pub fn flops_ceiling(backend: BackendId, precision: Precision, machine: &Machine) -> Option<f64> {
    let half = precision.is_half() || precision.is_mixed_precision();
    match backend.device() {
        Device::NvidiaGpu => {
            let peak = dense_peak(machine.gpus.first()?, precision)?;
            Some(1.1 * peak)
        }
        Device::AppleGpu => Some(if half { 150e12 } else { 75e12 }),
        Device::Cpu => {
            // f32: two 16-wide multiply-adds per cycle. Half precision: 2,048 FLOP per cycle of a matrix unit.
            // The cores of an Apple cluster share a matrix unit of at most 2 TFLOP/s.
            let per_cycle = if half || cfg!(target_os = "macos") { 2048.0 } else { 64.0 };
            Some(machine.cores as f64 * 6e9 * per_cycle)
        }
    }
}

/// Estimates the rate of an f32 training step on the fastest device, and returns it with the device's memory.
///
/// CPU: 16 GFLOP/s per core, as MLX reached for indicator-b16 on a two-core server (PyTorch reached 50). Apple's
/// GPU: 1 TFLOP/s, about an M1. NVIDIA: a third of the data sheet.
pub fn capacity(machine: &Machine) -> MachineCapacity {
    let nvidia = machine.gpus.first().filter(|gpu| gpu.contains("NVIDIA"));
    if let Some(gpu) = nvidia {
        let peak = dense_peak(gpu, Precision::F32).unwrap_or(10e12);
        let query = ["--query-gpu=memory.total", "--format=csv,noheader,nounits"];
        let mib = output("nvidia-smi", &query).and_then(|text| text.lines().next()?.trim().parse().ok());
        return MachineCapacity { flops_per_s: peak / 3.0, memory: mib.unwrap_or(8192u64) << 20 };
    }
    let flops_per_s = if machine.gpus.is_empty() { 16e9 * machine.cores as f64 } else { 1e12 };
    MachineCapacity { flops_per_s, memory: machine.memory_bytes }
}

/// Checks that a median time does not imply a rate above `ceiling` (FLOP/s).
///
/// # Errors
/// Returns an error if it does: the clock or the synchronization is wrong.
pub fn check_rate(flops: u64, median_ns: f64, ceiling: Option<f64>) -> Result<()> {
    let rate = flops as f64 / (median_ns * 1e-9);
    if let Some(ceiling) = ceiling
        && rate > ceiling
    {
        bail!(
            "implies {:.2} TFLOP/s, and this hardware reaches at most {:.2}: the time is wrong",
            rate / 1e12,
            ceiling / 1e12
        );
    }
    Ok(())
}

/// Returns the dense peak of an NVIDIA GPU in FLOP/s from its data sheet, or `None` for an unknown GPU.
pub fn dense_peak(gpu: &str, precision: Precision) -> Option<f64> {
    // (name, f32, tf32, bf16 and f16), in TFLOP/s
    const SHEETS: &[(&str, f64, f64, f64)] = &[
        ("H200", 66.9, 494.7, 989.4),
        ("H100 NVL", 60.0, 417.5, 835.0),
        ("H100 PCIe", 51.2, 378.0, 756.0),
        ("H100", 66.9, 494.7, 989.4),
        ("A100", 19.5, 156.0, 312.0),
        ("L40S", 91.6, 183.0, 362.0),
        ("L4", 30.3, 60.0, 121.0),
        ("RTX 4090", 82.6, 82.6, 165.2),
    ];
    let (_, f32, tf32, half) = SHEETS.iter().find(|(name, ..)| gpu.contains(name))?;
    let peak = match precision {
        Precision::F32 => f32,
        Precision::Tf32 => tf32,
        Precision::Bf16 | Precision::F16 | Precision::Mixed | Precision::Amp => half,
    };
    Some(peak * 1e12)
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
