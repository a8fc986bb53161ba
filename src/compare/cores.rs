//! Cores to which both sides of a comparison are pinned, with the thread that asks them: one
//! of the three always runs, so the core never sleeps. A core that has slept takes a step's
//! time to be itself again, and whoever shares the hardware has had its caches meanwhile;
//! asked from another core, the same steps take a fifth longer and scatter half as much again.

/// The cores that this process may use; empty where threads can't be kept on a core.
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

/// Keeps this thread, and every thread and process that it starts, on cores. Where the system refuses, the
/// work is done all the same.
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

/// Cores for [`on_cores`], one of each physical core, the last first: the first ones get more of the
/// system's own work. Empty where threads can't be kept on a core.
pub fn physical_cores() -> Vec<usize> {
    // At most: they share the memory's bandwidth.
    const MOST: usize = 8;
    let mut seen = std::collections::BTreeSet::new();
    allowed()
        .into_iter()
        .rev()
        .filter(|core| {
            let siblings = format!("/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list");
            std::fs::read_to_string(siblings).map_or(true, |text| seen.insert(text))
        })
        // A container may have more cores in sight than time on them.
        .take(std::thread::available_parallelism().map_or(1, usize::from).min(MOST))
        .collect()
}

/// Keeps this thread on a core, as [`keep_to`] does, where none of what it starts
/// interrupts another by waking up (`SCHED_BATCH`): a framework's threads then run one after
/// the other, which halves the time that comparing MLX takes.
fn pin_to_core(core: usize) {
    pin_threads(&[core]);
    #[cfg(target_os = "linux")]
    // SAFETY: plain data.
    unsafe {
        let parameters: libc::sched_param = std::mem::zeroed();
        libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameters);
    }
}

/// Does work pinned to each core at once, or once anywhere without any; returns what each returned.
pub fn on_cores<T: Send>(cores: &[usize], work: impl Fn(usize) -> T + Sync) -> Vec<T> {
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

/// Does work pinned to a core, as comparisons measure.
pub fn on_a_core<T: Send>(work: impl Fn() -> T + Sync) -> T {
    let cores = physical_cores();
    on_cores(&cores[..cores.len().min(1)], |_| work()).pop().expect("it is done once")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_stays_on_its_core() {
        let cores = physical_cores();
        let seen = on_cores(&cores, |index| (index, std::thread::available_parallelism().unwrap().get()));
        assert_eq!(seen.iter().map(|s| s.0).collect::<Vec<_>>(), (0..cores.len().max(1)).collect::<Vec<_>>());
        if !cores.is_empty() {
            assert!(seen.iter().all(|s| s.1 == 1), "{seen:?}");
        }
        assert!(!cfg!(target_os = "linux") || !cores.is_empty());
    }
}
