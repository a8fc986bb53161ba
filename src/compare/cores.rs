//! Pinning: both sides of a comparison and the thread that requests blocks share one core.
//!
//! One of the three always runs, so the core never sleeps. A core that has slept is slower for about a step, and
//! its caches may be cold. Requested from another core, steps took 20 % longer and varied by 50 % more.

/// Returns true if the system can pin threads to cores.
pub fn can_pin() -> bool {
    cfg!(target_os = "linux")
}

/// Returns the cores that this process may use. Returns none if the system cannot pin threads.
pub fn allowed() -> Vec<usize> {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: plain data, filled by the call.
        let allowed = unsafe {
            let mut allowed: libc::cpu_set_t = std::mem::zeroed();
            if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut allowed) != 0 {
                return Vec::new();
            }
            allowed
        };
        // SAFETY: below the size of the set.
        (0..libc::CPU_SETSIZE as usize).filter(|&core| unsafe { libc::CPU_ISSET(core, &allowed) }).collect()
    }
    #[cfg(not(target_os = "linux"))]
    Vec::new()
}

/// Returns the number of cores whose threads run equally fast: the performance cores of a Mac, or all cores that this
/// process may use. Threads that wait for each other gain nothing from slower cores, so PyTorch uses as many.
pub fn equal_cores() -> usize {
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    performance_cores().filter(|cores| *cores > 0).map_or(all, |cores| cores.min(all))
}

#[cfg(target_os = "macos")]
fn performance_cores() -> Option<usize> {
    let (mut cores, mut size): (libc::c_int, _) = (0, size_of::<libc::c_int>());
    // SAFETY: a NUL-terminated name, and a number of the size that the call gets.
    let status = unsafe {
        let name = c"hw.perflevel0.physicalcpu".as_ptr();
        libc::sysctlbyname(name, (&raw mut cores).cast(), &raw mut size, std::ptr::null_mut(), 0)
    };
    usize::try_from(cores).ok().filter(|_| status == 0)
}

#[cfg(not(target_os = "macos"))]
fn performance_cores() -> Option<usize> {
    None
}

/// Pins this thread, and the threads and processes that it starts, to cores. A refusal of the system is ignored.
pub fn pin_threads(cores: &[usize]) {
    #[cfg(target_os = "linux")]
    // SAFETY: a set of cores below its size, and plain data.
    unsafe {
        let mut own: libc::cpu_set_t = std::mem::zeroed();
        for &core in cores.iter().filter(|core| **core < libc::CPU_SETSIZE as usize) {
            libc::CPU_SET(core, &mut own);
        }
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const own);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = cores;
}

/// Returns one logical core of each physical core, in descending order: the system itself mostly uses the first
/// ones. Returns none if the system cannot pin threads.
pub fn physical_cores() -> Vec<usize> {
    // All cores share the memory bandwidth.
    const MAX_CORES: usize = 8;
    let mut seen = std::collections::BTreeSet::new();
    allowed()
        .into_iter()
        .rev()
        .filter(|core| {
            let siblings = format!("/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list");
            std::fs::read_to_string(siblings).map_or(true, |text| seen.insert(text))
        })
        // A container may see more cores than it may use.
        .take(std::thread::available_parallelism().map_or(1, usize::from).min(MAX_CORES))
        .collect()
}

/// Pins this thread to a core under `SCHED_BATCH`, so that threads do not preempt each other when they wake up.
/// This halves the time that a comparison of MLX takes.
fn pin_to_core(core: usize) {
    pin_threads(&[core]);
    #[cfg(target_os = "linux")]
    // SAFETY: plain data.
    unsafe {
        let parameters: libc::sched_param = std::mem::zeroed();
        libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameters);
    }
}

/// Runs `work` pinned to each core concurrently, or once unpinned without cores. Returns the results.
pub fn run_on_cores<T: Send>(cores: &[usize], work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let work = &work;
    std::thread::scope(|scope| {
        let pinned = |index: usize| {
            let core = cores.get(index).copied();
            scope.spawn(move || {
                core.into_iter().for_each(pin_to_core);
                work(index)
            })
        };
        let all: Vec<_> = (0..cores.len().max(1)).map(pinned).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, T>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        all.into_iter().map(join).collect()
    })
}

/// Runs `work` pinned to one core, as comparisons do.
pub fn run_pinned<T: Send>(work: impl Fn() -> T + Sync) -> T {
    let cores = physical_cores();
    run_on_cores(&cores[..cores.len().min(1)], |_| work()).pop().expect("one result")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_cores_are_a_part_of_all_cores() {
        let all = std::thread::available_parallelism().unwrap().get();
        let equal = equal_cores();
        assert!(if cfg!(target_os = "macos") { (1..=all).contains(&equal) } else { equal == all });
    }

    #[test]
    fn work_runs_on_its_core() {
        let cores = physical_cores();
        let seen = run_on_cores(&cores, |index| (index, std::thread::available_parallelism().unwrap().get()));
        assert_eq!(seen.iter().map(|s| s.0).collect::<Vec<_>>(), (0..cores.len().max(1)).collect::<Vec<_>>());
        if !cores.is_empty() {
            assert!(seen.iter().all(|s| s.1 == 1), "{seen:?}");
        }
        assert!(!cfg!(target_os = "linux") || !cores.is_empty());
    }
}
