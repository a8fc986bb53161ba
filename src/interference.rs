//! Whether something else had the machine while we measured.

use std::fs;
use std::time::Duration;

/// Share of their time that threads may have waited for a core before a figure counts as
/// disturbed: as much as intervals of quiet runs here are wide.
pub const WAIT_THRESHOLD: f64 = 0.05;

/// What the system has told of this process and of the machine so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuUsage {
    /// Nanoseconds that threads of this process were ready and had no core.
    delayed: u64,
    /// Nanoseconds that they had one.
    ran: u64,
    /// Times that a core was slowed down because it was too hot.
    throttled: u64,
}

impl CpuUsage {
    pub fn now() -> Self {
        Self { delayed: scheduler_delay_ns(), ran: cpu_time().as_nanos() as u64, throttled: throttled() }
    }

    /// What happened since an earlier look.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            delayed: self.delayed.saturating_sub(earlier.delayed),
            ran: self.ran.saturating_sub(earlier.ran),
            throttled: self.throttled.saturating_sub(earlier.throttled),
        }
    }

    pub fn add(&mut self, other: Self) {
        self.delayed += other.delayed;
        self.ran += other.ran;
        self.throttled += other.throttled;
    }

    /// The part of the time in which threads could have run that they waited for a core; None where
    /// the system does not tell.
    pub fn cpu_wait_share(self) -> Option<f64> {
        let all = self.delayed + self.ran;
        (tells_delay() && all > 0).then(|| self.delayed as f64 / all as f64)
    }

    pub fn throttled(self) -> bool {
        self.throttled > 0
    }
}

/// CPU time of all threads of this process.
pub fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills plain data.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Nanoseconds that all threads of this process were ready and had no CPU so far; 0 where
/// the system does not tell (`man proc_pid_schedstat`).
pub fn scheduler_delay_ns() -> u64 {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let of = |task: fs::DirEntry| -> Option<u64> {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().nth(1)?.parse().ok()
    };
    tasks.filter_map(of).sum()
}

fn tells_delay() -> bool {
    cfg!(target_os = "linux")
}

/// Thermal events of all cores, where the kernel counts them (Documentation/admin-guide/thermal).
fn throttled() -> u64 {
    let cores = fs::read_dir("/sys/devices/system/cpu").into_iter().flatten().flatten();
    let of = |core: fs::DirEntry| -> Option<u64> {
        let text = fs::read_to_string(core.path().join("thermal_throttle/core_throttle_count")).ok()?;
        text.trim().parse().ok()
    };
    cores.filter_map(of).sum()
}

/// Cores' worth of work that others do: the machine's load over some time in which this
/// process sleeps.
pub fn background_load(over: Duration) -> f64 {
    let mut system = sysinfo::System::new();
    system.refresh_cpu_usage();
    std::thread::sleep(over.max(sysinfo::MINIMUM_CPU_UPDATE_INTERVAL));
    system.refresh_cpu_usage();
    system.cpus().iter().map(|core| f64::from(core.cpu_usage()) / 100.0).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn waiting_for_a_core_is_seen() {
        if !tells_delay() {
            println!("skipped: this system does not tell");
            return;
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let run = |threads: usize| -> f64 {
            let end = AtomicBool::new(false);
            let before = CpuUsage::now();
            std::thread::scope(|scope| {
                for _ in 0..threads {
                    scope.spawn(|| {
                        while !end.load(Ordering::Relaxed) {
                            std::hint::spin_loop()
                        }
                    });
                }
                std::thread::sleep(Duration::from_millis(300));
                let seen = CpuUsage::now().since(before);
                end.store(true, Ordering::Relaxed);
                seen.cpu_wait_share().unwrap()
            })
        };
        // Three threads a core wait for two thirds of the time.
        let share = run(3 * cores);
        assert!(share > 0.4 && share < 0.95, "{share}");
    }

    #[test]
    fn shares_are_of_the_time_in_which_threads_could_run() {
        let watch = CpuUsage { delayed: 25, ran: 75, throttled: 0 };
        assert_eq!(watch.cpu_wait_share(), tells_delay().then_some(0.25));
        assert_eq!(CpuUsage::default().cpu_wait_share(), None);
        assert!(!watch.throttled() && CpuUsage { throttled: 1, ..watch }.throttled());
    }
}
