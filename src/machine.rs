//! What a run stands on: hardware, system, commit, and this process's memory.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::case::{BackendId, Compute, Framework};

/// The machine, as written into every result.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    pub cpu: String,
    /// Cores that this process may use.
    pub cores: usize,
    pub memory_bytes: u64,
    pub os: String,
    pub arch: String,
    /// NVIDIA GPUs with their driver, or Apple's chip; empty where there is none.
    pub gpus: Vec<String>,
    pub driver: String,
    pub commit: String,
    /// Whether the working tree differed from the commit.
    pub dirty: bool,
    /// Framework, BLAS and thread counts, by name, from the backends themselves.
    pub versions: Vec<(String, String)>,
}

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let done = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8_lossy(&done.stdout).trim().to_owned();
    (done.status.success() && !text.is_empty()).then_some(text)
}

impl Machine {
    /// Reads the machine; `versions` is left to the backends.
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
            gpus.push(format!("{cpu} GPU"));
        }
        // An executable may have been carried to another machine.
        let built = env!("CARGO_MANIFEST_DIR");
        let root = if Path::new(built).exists() { built } else { "." };
        let commit = output("git", &["-C", root, "rev-parse", "--short=12", "HEAD"]);
        let dirty = output("git", &["-C", root, "status", "--porcelain", "--untracked-files=no"]);
        Self {
            cpu,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: system.total_memory(),
            os: sysinfo::System::long_os_version().unwrap_or_else(|| std::env::consts::OS.to_owned()),
            arch: std::env::consts::ARCH.to_owned(),
            gpus,
            driver,
            dirty: commit.is_some() && dirty.is_some(),
            commit: commit.unwrap_or_else(|| "unknown".to_owned()),
            versions: Vec::new(),
        }
    }
}

/// Bytes that this process holds in memory now; 0 where the system does not tell.
pub fn resident_bytes() -> u64 {
    let mut system = sysinfo::System::new();
    let Ok(pid) = sysinfo::get_current_pid() else { return 0 };
    let what = sysinfo::ProcessRefreshKind::nothing().with_memory();
    system.refresh_processes_specifics(sysinfo::ProcessesToUpdate::Some(&[pid]), false, what);
    system.process(pid).map_or(0, sysinfo::Process::memory)
}

/// Gives freed memory back and starts a new resident peak. Linux alone can reset it:
/// elsewhere the peak is the process's since its start.
pub fn reset_resident_peak() {
    #[cfg(target_os = "linux")]
    {
        #[cfg(target_env = "gnu")]
        // SAFETY: takes no pointers.
        unsafe {
            libc::malloc_trim(0);
        }
        // man proc: 5 resets the peak resident set size. Failing leaves the older peak.
        let _ = fs::write("/proc/self/clear_refs", "5");
    }
}

/// The peak of this process's resident size in bytes since the reset.
pub fn resident_peak_bytes() -> Option<u64> {
    if let Ok(status) = fs::read_to_string("/proc/self/status") {
        let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
        let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
        return Some(kib << 10);
    }
    // SAFETY: rusage is plain data that the call fills.
    let peak = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        (libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) == 0).then_some(usage.ru_maxrss)
    }?;
    // macOS counts bytes, other systems KiB.
    let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
    Some(peak as u64 * unit)
}

/// The shared libraries that this process has loaded.
pub fn loaded_libraries() -> Vec<String> {
    #[cfg(target_os = "macos")]
    {
        unsafe extern "C" {
            fn _dyld_image_count() -> u32;
            fn _dyld_get_image_name(index: u32) -> *const std::ffi::c_char;
        }
        // SAFETY: dyld returns NUL-terminated names, or null past the end.
        return (0..unsafe { _dyld_image_count() })
            .filter_map(|i| unsafe {
                let name = _dyld_get_image_name(i);
                (!name.is_null()).then(|| std::ffi::CStr::from_ptr(name).to_string_lossy().into_owned())
            })
            .collect();
    }
    #[cfg(not(target_os = "macos"))]
    {
        let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let mut all: Vec<String> = maps
            .lines()
            .filter_map(|line| line.split_whitespace().nth(5))
            .filter(|path| path.contains(".so"))
            .map(str::to_owned)
            .collect();
        all.sort();
        all.dedup();
        all
    }
}

/// Fails where this process holds a framework that it does not measure: each brings a
/// BLAS whose symbols the other could bind to.
pub fn assert_isolated(framework: Framework) -> Result<()> {
    let foreign = match framework {
        Framework::Torch => "libmlx",
        Framework::Mlx => "libtorch",
    };
    let found = loaded_libraries()
        .into_iter()
        .find(|path| Path::new(path).file_name().is_some_and(|n| n.to_string_lossy().starts_with(foreign)));
    match found {
        Some(path) => bail!("this process measures {framework} and has also loaded {path}"),
        None => Ok(()),
    }
}

/// More FLOP/s than the device can reach, to tell a broken clock from a fast machine;
/// None where nothing is known of it.
///
/// NVIDIA: dense data-sheet peaks with a tenth on top. CPUs: every core at 6 GHz with
/// the widest fused multiply-add units sold. Apple's GPU: 4 times an M4 Max.
pub fn flops_ceiling(backend: BackendId, compute: Compute, machine: &Machine) -> Option<f64> {
    let half = compute.is_half() || compute == Compute::Amp;
    match backend {
        BackendId::TorchCuda | BackendId::MlxCuda => {
            let peak = dense_peak(machine.gpus.first()?, compute)?;
            Some(1.1 * peak)
        }
        BackendId::TorchMps | BackendId::MlxMetal => Some(if half { 150e12 } else { 75e12 }),
        BackendId::TorchCpu | BackendId::MlxCpu => {
            // f32: two 16-wide multiply-adds a cycle; halves: a matrix unit's 2 048.
            // Apple's CPUs share matrix units of at most 2 TFLOP/s a cluster.
            let per_cycle = if half || cfg!(target_os = "macos") { 2048.0 } else { 64.0 };
            Some(machine.cores as f64 * 6e9 * per_cycle)
        }
    }
}

/// Refuses a time that the hardware can't have reached: the clock or the wait is wrong.
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

/// The dense peak of an NVIDIA GPU in FLOP/s, from its data sheet.
pub fn dense_peak(gpu: &str, compute: Compute) -> Option<f64> {
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
    let peak = match compute {
        Compute::F32 => f32,
        Compute::Tf32 => tf32,
        Compute::Bf16 | Compute::F16 | Compute::Amp => half,
    };
    Some(peak * 1e12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_this_machine() {
        let machine = Machine::read();
        assert!(machine.cores >= 1 && machine.memory_bytes > 1 << 28, "{machine:?}");
        assert!(!machine.cpu.is_empty() && !machine.os.is_empty(), "{machine:?}");
        assert!(!loaded_libraries().is_empty());
        assert!(resident_bytes() > 1 << 16);
    }

    #[test]
    fn the_library_itself_links_no_framework() {
        assert_isolated(Framework::Torch).unwrap();
        assert_isolated(Framework::Mlx).unwrap();
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_resident_peak_follows_an_allocation_and_its_reset() {
        let large = vec![1u8; 200 << 20];
        assert!(large.iter().step_by(4096).all(|v| *v == 1));
        let with = resident_peak_bytes().unwrap();
        assert!(with > 200 << 20);
        drop(large);
        reset_resident_peak();
        assert!(resident_peak_bytes().unwrap() + (150 << 20) < with);
    }

    #[test]
    fn a_time_beyond_the_hardware_is_an_error() {
        let machine = Machine { cores: 2, ..Machine::default() };
        let ceiling = flops_ceiling(BackendId::TorchCpu, Compute::F32, &machine);
        // 2·1024³ FLOPs: 300 GFLOP/s is fast on two cores, 200 TFLOP/s is no CPU.
        assert!(check_rate(2 << 30, 7e6, ceiling).is_ok());
        let error = check_rate(2 << 30, 1e4, ceiling).unwrap_err().to_string();
        assert!(error.contains("TFLOP/s") && error.contains("wrong"), "{error}");
        assert!(check_rate(2 << 30, 1.0, None).is_ok());
    }

    #[test]
    fn gpus_are_known_by_their_longest_name() {
        assert_eq!(dense_peak("NVIDIA H100 80GB HBM3", Compute::Amp), Some(989.4e12));
        assert_eq!(dense_peak("NVIDIA H100 PCIe", Compute::Bf16), Some(756e12));
        assert_eq!(dense_peak("Voodoo 2", Compute::F32), None);
    }
}
