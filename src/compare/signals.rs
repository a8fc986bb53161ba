//! Interrupts: after SIGINT or SIGTERM the work ends at the next step and cleans up.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};

/// Set by the signal handler.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Installs the handler of SIGINT and SIGTERM.
pub fn catch_interrupts() {
    extern "C" fn stop(_: libc::c_int) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    let handler = stop as extern "C" fn(libc::c_int);
    // SAFETY: the handler only stores to an atomic.
    unsafe {
        libc::signal(libc::SIGINT, handler as libc::sighandler_t);
        libc::signal(libc::SIGTERM, handler as libc::sighandler_t);
    }
}

/// Returns true after SIGINT or SIGTERM.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Returns an error after SIGINT or SIGTERM.
pub fn check_interrupted() -> Result<()> {
    if interrupted() { bail!("interrupted") } else { Ok(()) }
}
