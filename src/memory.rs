//! Memory of this process: the malloc policy, the resident size, and page faults.
//!
//! glibc returns a large freed block to the system or retains it, depending on earlier allocations
//! (`man mallopt`: the thresholds are dynamic). A returned block costs a page fault per 4 KiB when it is
//! allocated again, so the same step can take twice as long in one process as in another.
//! [`retain_freed_memory`] makes every measuring process retain freed memory, like the allocators that
//! PyTorch's tuning guide recommends (`https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html`).

use std::fs;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::statistics::median;
use crate::text::variable;

/// The environment variable of the malloc policy. `default` leaves malloc as it is. This command measures the
/// effect: `scripts/compare worktree --env TRANSFORMER_BENCH_MALLOC=default`.
pub const MALLOC_VARIABLE: &str = "TRANSFORMER_BENCH_MALLOC";

/// Makes malloc retain freed memory. Must be called before the first large allocation.
///
/// # Errors
/// Returns an error if [`MALLOC_VARIABLE`] is neither `retain` nor `default`.
pub fn retain_freed_memory() -> anyhow::Result<()> {
    match variable(MALLOC_VARIABLE)?.as_deref() {
        None | Some("retain") => configure_malloc(),
        Some("default") => {}
        Some(other) => anyhow::bail!("{MALLOC_VARIABLE}={other}: use retain (the default) or default"),
    }
    Ok(())
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn configure_malloc() {
    // The heap grows by at least this. Untouched pages cost nothing.
    const TOP_PAD: libc::c_int = 64 << 20;
    // SAFETY: sets numbers of the allocator.
    unsafe {
        // No block is a separate mapping, which would be returned when it is freed.
        libc::mallopt(libc::M_MMAP_MAX, 0);
        // -1: the end of the heap is never returned.
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
        libc::mallopt(libc::M_TOP_PAD, TOP_PAD);
        // Heaps of other threads are limited to 64 MiB and are returned when they are empty.
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn configure_malloc() {}

/// Returns the name, version and policy of malloc for the report, or `None` without glibc.
pub fn describe_allocator() -> Option<(String, String)> {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: a static string.
        let version = unsafe { std::ffi::CStr::from_ptr(libc::gnu_get_libc_version()) };
        let default = std::env::var(MALLOC_VARIABLE).is_ok_and(|word| word == "default");
        let policy = if default { "default policy" } else { "retains freed memory" };
        Some(("malloc".to_owned(), format!("glibc {}, {policy}", version.to_string_lossy())))
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    None
}

/// Returns the number of minor page faults of all threads of this process so far.
pub fn page_faults() -> u64 {
    resource_usage().map_or(0, |usage| usage.ru_minflt as u64)
}

fn resource_usage() -> Option<libc::rusage> {
    // SAFETY: plain data, filled by the call.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        (libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) == 0).then_some(usage)
    }
}

/// The share of a step's time above which the report warns of page faults. Two runs of a case on a quiet
/// machine differ by about as much.
pub const PAGE_FAULT_SHARE_THRESHOLD: f64 = 0.05;

/// Returns the nanoseconds of a page fault, including clearing the page. The process measures them once, on
/// fresh pages. Returns 0 if it cannot map any.
pub fn page_fault_ns() -> f64 {
    static COST: OnceLock<f64> = OnceLock::new();
    *COST.get_or_init(|| {
        let times: Vec<f64> = (0..5).filter_map(|_| measure_page_faults()).collect();
        if times.is_empty() { 0.0 } else { median(&times) }
    })
}

/// Touches fresh pages and returns the nanoseconds per page fault.
fn measure_page_faults() -> Option<f64> {
    const BYTES: usize = 16 << 20;
    // SAFETY: the mapping is private to this function, which writes within its length and unmaps it.
    unsafe {
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANON);
        let pages = libc::mmap(std::ptr::null_mut(), BYTES, access, kind, -1, 0);
        if pages == libc::MAP_FAILED {
            return None;
        }
        let (before, start) = (page_faults(), Instant::now());
        for offset in (0..BYTES).step_by(4096) {
            pages.cast::<u8>().add(offset).write_volatile(1);
        }
        let (elapsed, count) = (start.elapsed(), page_faults() - before);
        libc::munmap(pages, BYTES);
        (count > 0).then(|| elapsed.as_nanos() as f64 / count as f64)
    }
}

/// Returns the resident size of this process in bytes, or 0 if the system does not report it.
pub fn resident_bytes() -> u64 {
    let mut system = sysinfo::System::new();
    let Ok(pid) = sysinfo::get_current_pid() else { return 0 };
    let memory = sysinfo::ProcessRefreshKind::nothing().with_memory();
    system.refresh_processes_specifics(sysinfo::ProcessesToUpdate::Some(&[pid]), false, memory);
    system.process(pid).map_or(0, sysinfo::Process::memory)
}

/// The environment variable that limits the bytes that this process may allocate.
pub const MEMORY_LIMIT_VARIABLE: &str = "TRANSFORMER_BENCH_MEMORY_LIMIT";

/// Limits the memory that this process may allocate, if [`MEMORY_LIMIT_VARIABLE`] is set. Only Linux counts it: its
/// `RLIMIT_DATA` includes private mappings (`man setrlimit`), but not the code of libraries.
///
/// # Errors
/// Returns an error if the variable is not a number, or if the system refuses the limit.
pub fn limit_allocations() -> anyhow::Result<()> {
    let Some(text) = variable(MEMORY_LIMIT_VARIABLE)? else { return Ok(()) };
    let bytes: u64 =
        text.parse().map_err(|_| anyhow::anyhow!("{MEMORY_LIMIT_VARIABLE}={text}: use bytes"))?;
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    // SAFETY: plain data that outlives the call.
    let status = unsafe { libc::setrlimit(libc::RLIMIT_DATA, &raw const limit) };
    anyhow::ensure!(status == 0, "the system refused to limit the memory to {bytes} bytes");
    Ok(())
}

/// Returns true if [`limit_allocations`] has an effect on this system.
pub const CAN_LIMIT_ALLOCATIONS: bool = cfg!(target_os = "linux");

/// Returns the bytes of memory that programs can still allocate without swapping, or `None` if the system does not report
/// them.
pub fn available_bytes() -> Option<u64> {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    Some(system.available_memory()).filter(|bytes| *bytes > 0)
}

/// Bytes of swap that must be written before a system counts as swapping. Writing less is common on an idle Mac.
const SWAPPING_BYTES: u64 = 256 << 20;

/// Watches whether the system begins to swap.
pub struct SwapWatch {
    used: u64,
}

impl SwapWatch {
    pub fn start() -> Self {
        Self { used: Self::used_bytes() }
    }

    fn used_bytes() -> u64 {
        let mut system = sysinfo::System::new();
        system.refresh_memory_specifics(sysinfo::MemoryRefreshKind::nothing().with_swap());
        system.used_swap()
    }

    /// Returns the bytes that were swapped since the start, if they are too many for an undisturbed step.
    pub fn swapped(&self) -> Option<u64> {
        Some(Self::used_bytes().saturating_sub(self.used)).filter(|bytes| *bytes > SWAPPING_BYTES)
    }
}

/// Number of calls of [`reset_resident_peak`].
static RESETS: AtomicUsize = AtomicUsize::new(0);

/// Returns freed memory to the system and restarts the resident peak. Only Linux can restart it. On other
/// systems the peak counts from the start of the process, so it is only reported for the first case.
pub fn reset_resident_peak() {
    RESETS.fetch_add(1, Ordering::Relaxed);
    #[cfg(target_os = "linux")]
    {
        #[cfg(target_env = "gnu")]
        // SAFETY: takes no pointers.
        unsafe {
            libc::malloc_trim(0);
        }
        // man proc: 5 resets the peak resident set size. If it fails, the older peak remains.
        let _ = fs::write("/proc/self/clear_refs", "5");
    }
}

/// Returns the peak of the resident size in bytes since the reset, or `None` if it includes earlier cases.
pub fn resident_peak_bytes() -> Option<u64> {
    if let Ok(status) = fs::read_to_string("/proc/self/status") {
        let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
        let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
        return Some(kib << 10);
    }
    if RESETS.load(Ordering::Relaxed) > 1 {
        return None;
    }
    // macOS counts bytes, other systems KiB.
    let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
    resource_usage().map(|usage| usage.ru_maxrss as u64 * unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn the_resident_peak_follows_an_allocation_and_its_reset() {
        let large = vec![1u8; 200 << 20];
        assert!(large.iter().step_by(4096).all(|v| *v == 1));
        let peak = resident_peak_bytes().unwrap();
        assert!(peak > 200 << 20);
        drop(large);
        reset_resident_peak();
        assert!(resident_peak_bytes().unwrap() + (150 << 20) < peak);
    }

    /// Returns the page faults of ten allocations of a block, each freed before the next.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn faults_of_reallocation(mib: usize) -> u64 {
        let allocate = || drop(std::hint::black_box(vec![1u8; mib << 20]));
        allocate();
        let before = page_faults();
        (0..10).for_each(|_| allocate());
        page_faults() - before
    }

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[test]
    fn reallocating_freed_blocks_causes_no_page_faults() {
        retain_freed_memory().unwrap();
        // The thread of a test has its own heap, which existed before and is limited to 64 MiB.
        for mib in [1, 8, 24] {
            let faults = faults_of_reallocation(mib);
            assert!(faults < 100, "{mib} MiB: {faults} faults");
        }
        // SAFETY: sets numbers of the allocator: large blocks are separate mappings again.
        unsafe {
            libc::mallopt(libc::M_MMAP_MAX, 65536);
            libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
        }
        // The block is larger than the memory that is retained by now.
        let faults = faults_of_reallocation(60);
        assert!(faults > 1000, "{faults} faults, although each block is a mapping");
        retain_freed_memory().unwrap();
    }

    #[test]
    fn a_page_fault_takes_time() {
        let each = page_fault_ns();
        println!("a page fault takes {each:.0} ns");
        assert!((20.0..100_000.0).contains(&each), "{each} ns");
    }

    #[test]
    fn an_unknown_malloc_policy_is_refused() {
        // SAFETY: tests of this crate run one after the other.
        unsafe { std::env::set_var(MALLOC_VARIABLE, "jemalloc") };
        let error = retain_freed_memory().unwrap_err().to_string();
        // SAFETY: as above.
        unsafe { std::env::remove_var(MALLOC_VARIABLE) };
        assert!(error.contains("retain") && error.contains("jemalloc"), "{error}");
    }
}
