//! Properties of this build of MLX, through functions of mlx-c that mlx-rs does not wrap.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::Path;

use anyhow::{Result, ensure};
use transformer_bench::installation::{self, Installation};

/// Sets MLX's TF32 switch, which is on by default. MLX reads it once, so this must precede all other calls of MLX.
pub fn set_tf32_switch() {
    let switch = if transformer_bench::backend::is_tf32_process() { "1" } else { "0" };
    // SAFETY: the program calls it at its start, before it has other threads.
    unsafe { std::env::set_var("MLX_ENABLE_TF32", switch) };
}

pub fn version() -> String {
    // SAFETY: fills a new string and frees it.
    unsafe {
        let mut text = mlx_sys::mlx_string_new();
        mlx_sys::mlx_version(&mut text);
        let version = CStr::from_ptr(mlx_sys::mlx_string_data(text)).to_string_lossy().into_owned();
        mlx_sys::mlx_string_free(text);
        version
    }
}

pub fn has_gpu() -> bool {
    let mut available = false;
    // SAFETY: writes one bool; the device is freed.
    unsafe {
        let device = mlx_sys::mlx_device_new_type(mlx_sys::mlx_device_type__MLX_GPU, 0);
        let status = mlx_sys::mlx_device_is_available(&mut available, device);
        mlx_sys::mlx_device_free(device);
        status == 0 && available
    }
}

/// Returns the number of GPUs that MLX finds.
pub fn gpu_count() -> usize {
    let mut count = 0;
    // SAFETY: writes one number.
    let status = unsafe { mlx_sys::mlx_device_count(&mut count, mlx_sys::mlx_device_type__MLX_GPU) };
    if status == 0 { count.max(0) as usize } else { 0 }
}

pub fn is_built_with_cuda() -> bool {
    let mut available = false;
    // SAFETY: writes one bool.
    unsafe { mlx_sys::mlx_cuda_is_available(&mut available) == 0 && available }
}

/// Waits for the default stream of the device.
pub fn synchronize(cpu: bool) -> Result<()> {
    let kind = if cpu { mlx_sys::mlx_device_type__MLX_CPU } else { mlx_sys::mlx_device_type__MLX_GPU };
    // SAFETY: new handles, freed here.
    let status = unsafe {
        let device = mlx_sys::mlx_device_new_type(kind, 0);
        let mut stream = mlx_sys::mlx_stream_new();
        let status = match mlx_sys::mlx_get_default_stream(&mut stream, device) {
            0 => mlx_sys::mlx_synchronize(stream),
            failed => failed,
        };
        mlx_sys::mlx_stream_free(stream);
        mlx_sys::mlx_device_free(device);
        status
    };
    ensure!(status == 0, "MLX could not synchronize its device");
    Ok(())
}

/// Captures the work of Metal while `body` runs (`mlx/backend/metal/metal.h`).
pub fn capture_gpu_trace(path: &Path, body: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    let text = CString::new(path.as_os_str().as_encoded_bytes())?;
    // SAFETY: the string outlives the call.
    let started = unsafe { mlx_sys::mlx_metal_start_capture(text.as_ptr()) } == 0;
    ensure!(started, "Metal cannot capture: set MTL_CAPTURE_ENABLED=1, or use Instruments instead");
    let done = body();
    // SAFETY: no arguments.
    let stopped = unsafe { mlx_sys::mlx_metal_stop_capture() } == 0;
    done?;
    ensure!(stopped, "Metal could not write {}: is the disk full?", path.display());
    Ok(())
}

/// Calls `read` with the description of the GPU. Returns `None` if there is no description.
fn with_gpu_info<T>(read: impl FnOnce(mlx_sys::mlx_device_info) -> Option<T>) -> Option<T> {
    // SAFETY: new handles, freed here.
    unsafe {
        let device = mlx_sys::mlx_device_new_type(mlx_sys::mlx_device_type__MLX_GPU, 0);
        let mut info = mlx_sys::mlx_device_info_new();
        let known = mlx_sys::mlx_device_info_get(&mut info, device) == 0;
        let value = if known { read(info) } else { None };
        mlx_sys::mlx_device_info_free(info);
        mlx_sys::mlx_device_free(device);
        value
    }
}

/// Returns the memory of the GPU in bytes. The key depends on the MLX backend.
pub fn memory_total() -> Option<u64> {
    [c"max_recommended_working_set_size", c"total_memory", c"memory_size"].into_iter().find_map(|key| {
        let (mut exists, mut size) = (false, 0);
        // SAFETY: the key outlives the calls, which write a bool and a number.
        with_gpu_info(|info| unsafe {
            let found = mlx_sys::mlx_device_info_has_key(&mut exists, info, key.as_ptr()) == 0
                && exists
                && mlx_sys::mlx_device_info_get_size(&mut size, info, key.as_ptr()) == 0;
            found.then_some(size as u64)
        })
    })
}

/// Returns true if MLX uses neural accelerators of the GPU, which TF32 needs on Metal.
pub fn uses_neural_accelerators() -> bool {
    let built_with = || env!("TRANSFORMER_BENCH_MLX_WHEEL").to_owned();
    if !wheel_uses_neural_accelerators(&installation::find().map_or_else(built_with, Installation::mlx_wheel))
    {
        return false;
    }
    let mut text: *const c_char = std::ptr::null();
    // SAFETY: the call writes a pointer to a string, which is valid as long as the description.
    let architecture = with_gpu_info(|info| unsafe {
        let found = mlx_sys::mlx_device_info_get_string(&mut text, info, c"architecture".as_ptr()) == 0;
        (found && !text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
    });
    architecture.is_some_and(|name| is_neural_architecture(&name))
}

/// Returns true if MLX's wheel with a platform tag has kernels for neural accelerators. MLX builds its wheels for older
/// systems with `MLX_METAL_NO_NAX`. Set-up takes the wheel for macOS 26 from 26.2 on, as the kernels require.
fn wheel_uses_neural_accelerators(tag: &str) -> bool {
    let major = tag.strip_prefix("macosx_").and_then(|rest| rest.split('_').next()?.parse().ok());
    major.is_some_and(|major: u32| major >= 26)
}

/// Returns true if a Metal architecture such as `applegpu_g17s` has neural accelerators. As in MLX, these are generation
/// 17 (M5) and later, and generation 18 for phones.
fn is_neural_architecture(architecture: &str) -> bool {
    let Some((_, name)) = architecture.rsplit_once("_g") else { return false };
    let digits = name.trim_end_matches(|c: char| !c.is_ascii_digit());
    let least = if name.ends_with('p') { 18 } else { 17 };
    digits.parse::<u32>().is_ok_and(|generation| generation >= least)
}

/// Returns the address of a C function if a loaded library has it.
fn find_symbol(name: &str) -> Option<*mut libc::c_void> {
    let name = CString::new(name).expect("no NUL");
    // SAFETY: the name outlives the call.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

/// Returns the name of the BLAS that computes matrix products on the CPU, and its thread count.
pub fn blas() -> Vec<(String, String)> {
    let named = |value: String| ("MLX BLAS".to_owned(), value);
    if cfg!(target_os = "macos") {
        return vec![named("Accelerate".to_owned())];
    }
    for prefix in ["scipy_", ""] {
        let (Some(config), Some(threads)) = (
            find_symbol(&format!("{prefix}openblas_get_config")),
            find_symbol(&format!("{prefix}openblas_get_num_threads")),
        ) else {
            continue;
        };
        // SAFETY: these are the signatures in OpenBLAS's documentation, and the string is static.
        let (config, threads) = unsafe {
            let config: extern "C" fn() -> *const c_char = std::mem::transmute(config);
            let threads: extern "C" fn() -> c_int = std::mem::transmute(threads);
            (CStr::from_ptr(config()).to_string_lossy().trim().to_owned(), threads())
        };
        // "OpenBLAS 0.3.34 NO_AFFINITY … SkylakeX MAX_THREADS=64": the flags are dropped.
        let words: Vec<_> = config.split_whitespace().collect();
        let core = words.iter().rev().find(|w| !w.contains('=') && !w.contains('_')).unwrap_or(&"");
        let version = words.iter().take(2).copied().collect::<Vec<_>>().join(" ");
        return vec![
            named(format!("{version} ({core} kernels)")),
            ("MLX BLAS threads".to_owned(), threads.to_string()),
        ];
    }
    vec![named("the reference BLAS (slow: set-up found no optimized BLAS)".to_owned())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neural_accelerators_exist_since_the_m5() {
        for (name, expected) in [
            ("applegpu_g13g", false),
            ("applegpu_g16s", false),
            ("applegpu_g17s", true),
            ("applegpu_g17p", false),
            ("applegpu_g18p", true),
            ("", false),
        ] {
            assert_eq!(is_neural_architecture(name), expected, "{name}");
        }
    }

    #[test]
    fn wheels_for_older_systems_have_no_kernels_for_neural_accelerators() {
        for (tag, expected) in [
            ("macosx_14_0_arm64", false),
            ("macosx_15_0_arm64", false),
            ("macosx_26_0_arm64", true),
            ("", false),
        ] {
            assert_eq!(wheel_uses_neural_accelerators(tag), expected, "{tag}");
        }
    }
}
