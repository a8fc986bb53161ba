//! Detects whether other programs used the machine during a measurement.

use std::fs::{self, DirEntry};
use std::time::Duration;

/// The CPU wait above which a result counts as disturbed. Confidence intervals of quiet runs are about as wide.
pub const WAIT_THRESHOLD: f64 = 0.05;

/// CPU time, CPU wait and throttling of this process and its machine so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuUsage {
    /// Nanoseconds for which threads of this process were runnable without a core.
    delayed: u64,
    /// Nanoseconds for which they ran.
    ran: u64,
    /// Number of times that a core was slowed down because it was too hot.
    throttled: u64,
    /// True if the system reported at a reading that it slows the processor down because of its temperature.
    hot: bool,
}

impl CpuUsage {
    pub fn now() -> Self {
        Self {
            delayed: scheduler_delay_ns(),
            ran: cpu_time().as_nanos() as u64,
            throttled: throttle_count(),
            hot: is_throttled_now(),
        }
    }

    /// Returns the usage since an earlier reading.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            delayed: self.delayed.saturating_sub(earlier.delayed),
            ran: self.ran.saturating_sub(earlier.ran),
            throttled: self.throttled.saturating_sub(earlier.throttled),
            hot: self.hot || earlier.hot,
        }
    }

    pub fn add(&mut self, other: Self) {
        self.delayed += other.delayed;
        self.ran += other.ran;
        self.throttled += other.throttled;
        self.hot |= other.hot;
    }

    /// Returns the share of the time of runnable threads for which they waited for a core. Returns `None` if
    /// the system does not report it.
    pub fn cpu_wait_share(self) -> Option<f64> {
        let runnable = self.delayed + self.ran;
        (REPORTS_DELAY && runnable > 0).then(|| self.delayed as f64 / runnable as f64)
    }

    /// Returns true if the processor was throttled.
    pub fn throttled(self) -> bool {
        self.throttled > 0 || self.hot
    }
}

/// Returns the CPU time of all threads of this process.
pub fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills plain data.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// True if the system reports how long threads wait for a core.
const REPORTS_DELAY: bool = cfg!(target_os = "linux");

/// Sums a number over the entries of a folder. Entries without the number count as zero.
fn sum_over(folder: &str, read: impl Fn(DirEntry) -> Option<u64>) -> u64 {
    fs::read_dir(folder).into_iter().flatten().flatten().filter_map(read).sum()
}

/// Returns the nanoseconds for which threads of this process were runnable without a core
/// (`man proc_pid_schedstat`). Returns 0 if the system does not report them.
pub fn scheduler_delay_ns() -> u64 {
    sum_over("/proc/self/task", |task| {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().nth(1)?.parse().ok()
    })
}

/// Returns the number of thermal events of all cores, if the kernel counts them
/// (Documentation/admin-guide/thermal).
fn throttle_count() -> u64 {
    sum_over("/sys/devices/system/cpu", |core| {
        let count = core.path().join("thermal_throttle/core_throttle_count");
        fs::read_to_string(count).ok()?.trim().parse().ok()
    })
}

/// Returns true if macOS reports that it slows the processor down because of its temperature.
#[cfg(target_os = "macos")]
fn is_throttled_now() -> bool {
    use std::ffi::{c_char, c_int};
    unsafe extern "C" {
        // <notify.h>, part of libSystem. Both return 0 if they succeed.
        fn notify_register_check(name: *const c_char, token: *mut c_int) -> u32;
        fn notify_get_state(token: c_int, state: *mut u64) -> u32;
    }
    // <libkern/OSThermalNotification.h>: 0 nominal, 1 moderate, 2 heavy, 3 trapping, 4 sleeping.
    const NAME: &std::ffi::CStr = c"com.apple.system.thermalpressurelevel";
    const HEAVY: u64 = 2;
    static TOKEN: std::sync::OnceLock<Option<c_int>> = std::sync::OnceLock::new();
    let token = TOKEN.get_or_init(|| {
        let mut token = 0;
        // SAFETY: a NUL-terminated name, and a number that the call writes.
        (unsafe { notify_register_check(NAME.as_ptr(), &raw mut token) } == 0).then_some(token)
    });
    let mut level = 0;
    // SAFETY: a token of this process, and a number that the call writes.
    token.is_some_and(|token| unsafe { notify_get_state(token, &raw mut level) } == 0 && level >= HEAVY)
}

/// Other systems count throttling, see [`throttle_count`].
#[cfg(not(target_os = "macos"))]
fn is_throttled_now() -> bool {
    false
}

/// Returns the CPU load of the machine in cores, while this process sleeps for `time`.
pub fn background_load(time: Duration) -> f64 {
    let mut system = sysinfo::System::new();
    system.refresh_cpu_usage();
    std::thread::sleep(time.max(sysinfo::MINIMUM_CPU_UPDATE_INTERVAL));
    system.refresh_cpu_usage();
    system.cpus().iter().map(|core| f64::from(core.cpu_usage()) / 100.0).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn threads_that_wait_for_a_core_are_detected() {
        if !REPORTS_DELAY {
            println!("skipped: this system does not report it");
            return;
        }
        // Three threads per core wait for two thirds of the time.
        let threads = 3 * std::thread::available_parallelism().map_or(1, usize::from);
        let end = AtomicBool::new(false);
        let before = CpuUsage::now();
        let share = std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    while !end.load(Ordering::Relaxed) {
                        std::hint::spin_loop()
                    }
                });
            }
            std::thread::sleep(Duration::from_millis(300));
            let usage = CpuUsage::now().since(before);
            end.store(true, Ordering::Relaxed);
            usage.cpu_wait_share().unwrap()
        });
        assert!(share > 0.4 && share < 0.95, "{share}");
    }

    #[test]
    fn cpu_wait_is_a_share_of_the_time_of_runnable_threads() {
        let usage = CpuUsage { delayed: 25, ran: 75, throttled: 0, hot: false };
        assert_eq!(usage.cpu_wait_share(), REPORTS_DELAY.then_some(0.25));
        assert_eq!(CpuUsage::default().cpu_wait_share(), None);
        assert!(!usage.throttled() && CpuUsage { throttled: 1, ..usage }.throttled());
    }

    #[test]
    fn heat_at_either_reading_counts() {
        let [cool, hot] = [false, true].map(|hot| CpuUsage { hot, ..CpuUsage::default() });
        assert!(!cool.since(cool).throttled());
        assert!(hot.since(cool).throttled() && cool.since(hot).throttled());
        let mut sum = cool;
        sum.add(hot);
        sum.add(cool);
        assert!(sum.throttled());
    }
}
