//! Interrupts the threads that compute, in proportion to the CPU time that they take, so
//! that the profiler's handler of SIGPROF samples their stacks.
//!
//! On Linux by a thread that looks at all others every millisecond. An interval timer of
//! the process (ITIMER_PROF) expires at the kernel's ticks alone, and these come to all CPUs
//! at once: of two threads that were busy alike, one got twice the samples of the other.
//! Elsewhere the timer has to do.

#[cfg(target_os = "linux")]
pub use linux::Ticker;

#[cfg(not(target_os = "linux"))]
pub use timer::Ticker;

/// Switches the interval timer of the process, which pprof starts.
fn interval_timer(microseconds: libc::suseconds_t) {
    let interval = libc::timeval { tv_sec: 0, tv_usec: microseconds };
    let value = libc::itimerval { it_interval: interval, it_value: interval };
    // SAFETY: plain data; the old value is not asked for.
    unsafe { libc::setitimer(libc::ITIMER_PROF, &raw const value, std::ptr::null_mut()) };
}

#[cfg(not(target_os = "linux"))]
mod timer {
    pub struct Ticker;

    impl Ticker {
        pub fn start() -> Self {
            super::interval_timer(0);
            Self
        }

        pub fn tick(&self, on: bool) {
            super::interval_timer(if on { 1003 } else { 0 });
        }
    }

    impl Drop for Ticker {
        fn drop(&mut self) {
            self.tick(false);
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

    /// One thread is interrupted at most this often.
    const PERIOD: Duration = Duration::from_millis(1);
    /// Periods after which new threads are looked for.
    const LOOK: u32 = 20;

    const OFF: u8 = 0;
    const ON: u8 = 1;
    const END: u8 = 2;

    /// The interrupting thread; it sleeps while it is off.
    pub struct Ticker {
        state: Arc<AtomicU8>,
        thread: Option<JoinHandle<()>>,
    }

    impl Ticker {
        pub fn start() -> Self {
            super::interval_timer(0);
            let state = Arc::new(AtomicU8::new(OFF));
            let own = Arc::clone(&state);
            let thread = std::thread::spawn(move || run(&own));
            Self { state, thread: Some(thread) }
        }

        pub fn tick(&self, on: bool) {
            self.switch(if on { ON } else { OFF });
        }

        fn switch(&self, state: u8) {
            self.state.store(state, Ordering::Relaxed);
            if let Some(thread) = &self.thread {
                thread.thread().unpark();
            }
        }
    }

    impl Drop for Ticker {
        fn drop(&mut self) {
            self.switch(END);
            if let Some(thread) = self.thread.take() {
                let _ = thread.join();
            }
        }
    }

    /// A thread of this process.
    struct Thread {
        clock: libc::clockid_t,
        /// CPU time when it was last looked at, and what it has taken since it was last
        /// interrupted, in nanoseconds.
        seen: i64,
        taken: i64,
        stat: File,
    }

    impl Thread {
        fn find(id: libc::pid_t) -> Option<Self> {
            // The kernel's clock of a thread's CPU time (MAKE_THREAD_CPUCLOCK, CPUCLOCK_SCHED).
            let clock = (!id << 3) | 6;
            let stat = File::open(format!("/proc/self/task/{id}/stat")).ok()?;
            Some(Self { clock, seen: cpu_time(clock)?, taken: 0, stat })
        }

        /// Whether it runs or waits for a CPU: one that sleeps must not be woken.
        fn runs(&self) -> bool {
            let mut text = [0; 64];
            let length = self.stat.read_at(&mut text, 0).unwrap_or(0);
            let name_ends = text[..length].iter().rposition(|&c| c == b')');
            name_ends.and_then(|end| text[..length].get(end + 2)) == Some(&b'R')
        }
    }

    fn cpu_time(clock: libc::clockid_t) -> Option<i64> {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the call fills plain data.
        let known = unsafe { libc::clock_gettime(clock, &raw mut time) } == 0;
        known.then(|| time.tv_sec * 1_000_000_000 + time.tv_nsec)
    }

    fn run(state: &AtomicU8) {
        // SAFETY: no arguments, no memory.
        let (process, own) = unsafe { (libc::getpid(), libc::gettid()) };
        // All CPUs together take this much between two interruptions.
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let share = PERIOD.as_nanos() as i64 * cpus as i64;
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
            if periods % LOOK == 0 {
                for entry in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
                    let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                        continue;
                    };
                    if id != own
                        && !threads.contains_key(&id)
                        && let Some(thread) = Thread::find(id)
                    {
                        threads.insert(id, thread);
                    }
                }
            }
            periods += 1;
            std::thread::sleep(PERIOD);
            threads.retain(|_, thread| {
                let Some(now) = cpu_time(thread.clock) else { return false };
                thread.taken = (thread.taken + now - thread.seen).min(2 * share);
                thread.seen = now;
                true
            });
            let due = threads.iter_mut().filter(|(_, t)| t.taken >= share).max_by_key(|(_, t)| t.taken);
            if let Some((&id, thread)) = due
                && thread.runs()
                && state.load(Ordering::Relaxed) == ON
            {
                thread.taken -= share;
                // SAFETY: a signal to a thread of this process, which has a handler for it;
                // one that has ended since is an error that changes nothing.
                unsafe { libc::syscall(libc::SYS_tgkill, process, id, libc::SIGPROF) };
            }
        }
    }
}
