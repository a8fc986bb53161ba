//! Sends SIGPROF to threads in proportion to their CPU time, so that the profiler samples their stacks.
//!
//! On Linux, a thread checks the CPU time of all others every millisecond. The process timer (ITIMER_PROF) would
//! expire only at the kernel's ticks, which reach all CPUs at once. With it, one of two equally busy threads got twice
//! the samples of the other. Other systems use that timer.

#[cfg(target_os = "linux")]
pub use linux::SamplingTimer;

#[cfg(not(target_os = "linux"))]
pub use timer::SamplingTimer;

/// Sets the process timer, which pprof starts. 0 stops it.
fn interval_timer(microseconds: libc::suseconds_t) {
    let interval = libc::timeval { tv_sec: 0, tv_usec: microseconds };
    let value = libc::itimerval { it_interval: interval, it_value: interval };
    // SAFETY: plain data; the old value is not requested.
    unsafe { libc::setitimer(libc::ITIMER_PROF, &raw const value, std::ptr::null_mut()) };
}

#[cfg(not(target_os = "linux"))]
mod timer {
    pub struct SamplingTimer;

    impl SamplingTimer {
        pub fn start() -> Self {
            super::interval_timer(0);
            Self
        }

        pub fn enable(&self, on: bool) {
            super::interval_timer(if on { 1003 } else { 0 });
        }
    }

    impl Drop for SamplingTimer {
        fn drop(&mut self) {
            self.enable(false);
        }
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::collections::HashMap;
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU8, Ordering};
    use std::thread::JoinHandle;
    use std::time::Duration;

    /// Interval between interruptions of a thread.
    const PERIOD: Duration = Duration::from_millis(1);
    /// Number of periods after which new threads are searched.
    const SEARCH_PERIODS: u32 = 20;

    const OFF: u8 = 0;
    const ON: u8 = 1;
    const END: u8 = 2;

    /// The interrupting thread. It sleeps while it is disabled.
    pub struct SamplingTimer {
        state: Arc<AtomicU8>,
        thread: Option<JoinHandle<()>>,
    }

    impl SamplingTimer {
        pub fn start() -> Self {
            super::interval_timer(0);
            let state = Arc::new(AtomicU8::new(OFF));
            let shared = Arc::clone(&state);
            let thread = std::thread::spawn(move || run(&shared));
            Self { state, thread: Some(thread) }
        }

        pub fn enable(&self, on: bool) {
            self.set_state(if on { ON } else { OFF });
        }

        fn set_state(&self, state: u8) {
            self.state.store(state, Ordering::Relaxed);
            if let Some(thread) = &self.thread {
                thread.thread().unpark();
            }
        }
    }

    impl Drop for SamplingTimer {
        fn drop(&mut self) {
            self.set_state(END);
            if let Some(thread) = self.thread.take() {
                let _ = thread.join();
            }
        }
    }

    /// A thread of this process.
    struct Thread {
        clock: libc::clockid_t,
        /// CPU time at the last check, in nanoseconds.
        checked: i64,
        /// CPU time since the last interruption, in nanoseconds.
        pending: i64,
        stat: File,
    }

    impl Thread {
        fn find(id: libc::pid_t) -> Option<Self> {
            // The kernel's id for the CPU clock of a thread (MAKE_THREAD_CPUCLOCK, CPUCLOCK_SCHED).
            let clock = (!id << 3) | 6;
            let stat = File::open(format!("/proc/self/task/{id}/stat")).ok()?;
            Some(Self { clock, checked: cpu_time(clock)?, pending: 0, stat })
        }

        /// Returns true if the thread runs or waits for a CPU. A sleeping thread must not be woken.
        fn is_runnable(&self) -> bool {
            let mut text = [0; 64];
            let length = self.stat.read_at(&mut text, 0).unwrap_or(0);
            let name_ends = text[..length].iter().rposition(|&c| c == b')');
            name_ends.and_then(|end| text[..length].get(end + 2)) == Some(&b'R')
        }
    }

    fn cpu_time(clock: libc::clockid_t) -> Option<i64> {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the call fills plain data.
        let valid = unsafe { libc::clock_gettime(clock, &raw mut time) } == 0;
        valid.then(|| time.tv_sec * 1_000_000_000 + time.tv_nsec)
    }

    fn add_new_threads(threads: &mut HashMap<libc::pid_t, Thread>, own: libc::pid_t) {
        for entry in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
            if let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok())
                && id != own
                && !threads.contains_key(&id)
                && let Some(thread) = Thread::find(id)
            {
                threads.insert(id, thread);
            }
        }
    }

    fn run(state: &AtomicU8) {
        // SAFETY: the calls take no arguments.
        let (process, own) = unsafe { (libc::getpid(), libc::gettid()) };
        // CPU time of all CPUs between two interruptions.
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let interval = PERIOD.as_nanos() as i64 * cpus as i64;
        let mut threads: HashMap<libc::pid_t, Thread> = HashMap::new();
        let mut periods = 0;
        loop {
            match state.load(Ordering::Relaxed) {
                END => return,
                OFF => {
                    threads.clear();
                    periods = 0;
                    std::thread::park();
                    continue;
                }
                _ => {}
            }
            if periods % SEARCH_PERIODS == 0 {
                add_new_threads(&mut threads, own);
            }
            periods += 1;
            std::thread::sleep(PERIOD);
            threads.retain(|_, thread| {
                let Some(now) = cpu_time(thread.clock) else { return false };
                thread.pending = (thread.pending + now - thread.checked).min(2 * interval);
                thread.checked = now;
                true
            });
            let due =
                threads.iter_mut().filter(|(_, t)| t.pending >= interval).max_by_key(|(_, t)| t.pending);
            if let Some((&id, thread)) = due
                && thread.is_runnable()
                && state.load(Ordering::Relaxed) == ON
            {
                thread.pending -= interval;
                // SAFETY: this process handles the signal. If the thread has ended, the call fails without effect.
                unsafe { libc::syscall(libc::SYS_tgkill, process, id, libc::SIGPROF) };
            }
        }
    }
}
