//! This process's memory: how its heap keeps what is freed, what is resident, and the page
//! faults that steps cost.
//!
//! glibc gives a large freed block back to the system, or keeps it, by what was allocated
//! and freed before (`man mallopt`: the thresholds are dynamic). A block that is given
//! back costs a page fault for every 4 KiB when it is allocated again, so one step can take
//! twice as long in one process as in another. [`keep_freed`] makes every process that
//! measures keep what it frees, as the allocators of PyTorch's tuning guide do
//! (<https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html>).

use std::fs;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// `system` leaves the heap as the system has it, so that what keeping brings can be
/// measured: `scripts/compare worktree --env TRANSFORMER_BENCH_HEAP=system`.
pub const MALLOC_VARIABLE: &str = "TRANSFORMER_BENCH_HEAP";

/// Makes the heap keep what is freed, from now on. Called before the first large allocation.
///
/// # Errors
/// Where [`HEAP`] holds another word than `kept` or `system`.
pub fn retain_freed_memory() -> anyhow::Result<()> {
    match std::env::var(MALLOC_VARIABLE).as_deref() {
        Err(_) | Ok("kept") => configure_malloc(),
        Ok("system") => {}
        Ok(other) => anyhow::bail!("{MALLOC_VARIABLE}={other}: kept (the default) or system"),
    }
    Ok(())
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn configure_malloc() {
    // Grown by at least this at a time: few calls, and untouched pages cost nothing.
    const TOP_PAD: libc::c_int = 64 << 20;
    // SAFETY: sets numbers of the allocator.
    unsafe {
        // No block is a mapping of its own, which would go back when freed.
        libc::mallopt(libc::M_MMAP_MAX, 0);
        // -1: the heap's end is never given back.
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
        libc::mallopt(libc::M_TOP_PAD, TOP_PAD);
        // The heaps of other threads hold 64 MiB at most, and go back when empty.
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn pin() {}

/// What holds this process's memory, for the machine's versions; None where nothing is
/// known of it, and nothing was set.
pub fn describe_allocator() -> Option<(String, String)> {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: a static string.
        let version = unsafe { std::ffi::CStr::from_ptr(libc::gnu_get_libc_version()) };
        let kept = std::env::var(MALLOC_VARIABLE).map_or(true, |word| word != "system");
        let how = if kept { "freed memory kept" } else { "freed memory given back at will" };
        Some(("heap".to_owned(), format!("glibc {}, {how}", version.to_string_lossy())))
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    None
}

/// Page faults of all threads of this process so far, that no disk took part in.
pub fn page_faults() -> u64 {
    usage().map_or(0, |usage| usage.ru_minflt as u64)
}

fn usage() -> Option<libc::rusage> {
    // SAFETY: plain data, filled by the call.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        (libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) == 0).then_some(usage)
    }
}

/// The share of a step's time above which its page faults are too many: what two runs of
/// one case may differ by on a quiet machine.
pub const FAULT_SHARE_THRESHOLD: f64 = 0.05;

/// Nanoseconds that a page fault takes here, the page's clearing included: measured once a
/// process, on fresh pages. 0 where there are none to be had.
pub fn fault_ns() -> f64 {
    static COST: OnceLock<f64> = OnceLock::new();
    *COST.get_or_init(|| {
        let mut each: Vec<f64> = (0..5).filter_map(|_| touch()).collect();
        each.sort_by(f64::total_cmp);
        each.get(each.len() / 2).copied().unwrap_or(0.0)
    })
}

/// Touches fresh pages; nanoseconds for each fault that this took.
fn touch() -> Option<f64> {
    const BYTES: usize = 16 << 20;
    // SAFETY: a private mapping of our own, written within its length and given back.
    unsafe {
        let place = libc::mmap(
            std::ptr::null_mut(),
            BYTES,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANON,
            -1,
            0,
        );
        if place == libc::MAP_FAILED {
            return None;
        }
        let (before, start) = (page_faults(), Instant::now());
        for offset in (0..BYTES).step_by(4096) {
            place.cast::<u8>().add(offset).write_volatile(1);
        }
        let (taken, count) = (start.elapsed(), page_faults() - before);
        libc::munmap(place, BYTES);
        (count > 0).then(|| taken.as_nanos() as f64 / count as f64)
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

/// How often a new peak was asked for.
static RESETS: AtomicUsize = AtomicUsize::new(0);

/// Gives freed memory back and starts a new resident peak. Linux alone can reset it:
/// elsewhere the peak is the process's since its start, and so told for its first case alone.
pub fn reset_resident_peak() {
    RESETS.fetch_add(1, Ordering::Relaxed);
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

/// The peak of this process's resident size in bytes since the reset; None where it would
/// hold what came before that.
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
    usage().map(|usage| usage.ru_maxrss as u64 * unit)
}

#[cfg(test)]
mod tests {
    use super::*;

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

    /// Faults of allocating and freeing blocks of this size over and over.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn faults_of(mib: usize) -> u64 {
        let turn = || drop(std::hint::black_box(vec![1u8; mib << 20]));
        turn();
        let before = page_faults();
        (0..10).for_each(|_| turn());
        page_faults() - before
    }

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[test]
    fn blocks_that_are_freed_cost_no_faults_when_they_come_again() {
        retain_freed_memory().unwrap();
        // A test has a thread of its own, whose heap was there before and ends at 64 MiB.
        for mib in [1, 8, 24] {
            let faults = faults_of(mib);
            assert!(faults < 100, "{mib} MiB: {faults} faults");
        }
        // SAFETY: sets numbers of the allocator: large blocks are mappings again.
        unsafe {
            libc::mallopt(libc::M_MMAP_MAX, 65536);
            libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
        }
        // Larger than what is kept by now.
        let faults = faults_of(60);
        assert!(faults > 1000, "{faults} faults where each block is mapped");
        retain_freed_memory().unwrap();
    }

    #[test]
    fn a_fault_takes_time() {
        let each = fault_ns();
        println!("a page fault takes {each:.0} ns");
        assert!((20.0..100_000.0).contains(&each), "{each} ns");
    }

    #[test]
    fn a_wrong_word_is_refused() {
        // SAFETY: tests of this crate run one after the other.
        unsafe { std::env::set_var(MALLOC_VARIABLE, "jemalloc") };
        let error = retain_freed_memory().unwrap_err().to_string();
        // SAFETY: as above.
        unsafe { std::env::remove_var(MALLOC_VARIABLE) };
        assert!(error.contains("kept") && error.contains("jemalloc"), "{error}");
    }
}
