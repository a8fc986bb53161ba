//! This process: its libraries and cores.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::interference::cpu_time;
use crate::suite::Framework;

/// Time over which the CPU time of an idle process is measured.
const IDLE_PERIOD: Duration = Duration::from_millis(5);
/// Share of a core that an idle process uses at most. A spinning thread uses a whole one.
const IDLE_SHARE: f64 = 0.2;
/// Longest wait for an idle process. OpenBLAS's threads spin for up to 100 ms after a product.
const IDLE_TIMEOUT: Duration = Duration::from_millis(500);

/// Waits until the threads of this process sleep, so that they take no core from the next measured process.
///
/// The threads of a BLAS or of OpenMP spin for a while after their last job. After a step of MLX with OpenBLAS on
/// two cores, they delayed the next step of PyTorch by 40 %.
pub fn wait_until_idle() {
    let start = Instant::now();
    while start.elapsed() < IDLE_TIMEOUT {
        let (time, before) = (Instant::now(), cpu_time());
        std::thread::sleep(IDLE_PERIOD);
        if (cpu_time() - before).as_secs_f64() < IDLE_SHARE * time.elapsed().as_secs_f64() {
            break;
        }
    }
}

/// Returns true if a process of this user has the id.
pub fn is_running(process: i32) -> bool {
    // SAFETY: signal 0 only asks.
    unsafe { libc::kill(process, 0) == 0 }
}

/// Returns the paths of the shared libraries that this process has loaded.
pub fn loaded_libraries() -> Vec<String> {
    #[cfg(target_os = "macos")]
    {
        unsafe extern "C" {
            fn _dyld_image_count() -> u32;
            fn _dyld_get_image_name(index: u32) -> *const std::ffi::c_char;
        }
        // SAFETY: dyld returns NUL-terminated names, or null past the end.
        (0..unsafe { _dyld_image_count() })
            .filter_map(|i| unsafe {
                let name = _dyld_get_image_name(i);
                (!name.is_null()).then(|| std::ffi::CStr::from_ptr(name).to_string_lossy().into_owned())
            })
            .collect()
    }
    #[cfg(not(target_os = "macos"))]
    {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
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

/// Checks that this process has loaded no framework but the measured one. Each framework brings a BLAS, and
/// the other could bind to its symbols.
///
/// # Errors
/// Returns an error with the path of the foreign library.
pub fn assert_isolated(framework: Framework) -> Result<()> {
    let foreign = |name: &str| {
        Framework::ALL.iter().any(|other| *other != framework && name.starts_with(other.library_prefix()))
    };
    let found = loaded_libraries()
        .into_iter()
        .find(|path| Path::new(path).file_name().is_some_and(|name| foreign(&name.to_string_lossy())));
    match found {
        Some(path) => bail!("this process measures {framework} and has also loaded {path}"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spinning_thread_is_waited_for() {
        let end = Instant::now() + Duration::from_millis(100);
        let thread = std::thread::spawn(move || {
            while Instant::now() < end {
                std::hint::spin_loop()
            }
        });
        wait_until_idle();
        assert!(Instant::now() >= end);
        thread.join().unwrap();
    }

    #[test]
    fn the_library_itself_links_no_framework() {
        assert!(!loaded_libraries().is_empty());
        assert_isolated(Framework::Torch).unwrap();
        assert_isolated(Framework::Mlx).unwrap();
    }
}
