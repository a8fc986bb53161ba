//! This process: its libraries and cores.

use std::path::Path;

use anyhow::{Result, bail};

use crate::suite::Framework;

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
    fn the_library_itself_links_no_framework() {
        assert!(!loaded_libraries().is_empty());
        assert_isolated(Framework::Torch).unwrap();
        assert_isolated(Framework::Mlx).unwrap();
    }
}
