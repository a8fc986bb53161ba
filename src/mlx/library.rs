//! What this build of MLX is, through the parts of mlx-c that mlx-rs does not wrap.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::Path;

use anyhow::{Result, ensure};

/// MLX may round f32 products to TF32 on hardware that has it, and does by default. It
/// reads the switch once, so this must come before anything else of MLX.
pub fn pin_precision() {
    let on = if transformer_bench::backend::is_tf32_process() { "1" } else { "0" };
    // SAFETY: called at the start of a program, before it has other threads.
    unsafe { std::env::set_var("MLX_ENABLE_TF32", on) };
}

pub fn version() -> String {
    // SAFETY: fills a fresh string and frees it.
    unsafe {
        let mut text = mlx_sys::mlx_string_new();
        mlx_sys::mlx_version(&mut text);
        let version = CStr::from_ptr(mlx_sys::mlx_string_data(text)).to_string_lossy().into_owned();
        mlx_sys::mlx_string_free(text);
        version
    }
}

pub fn gpu_available() -> bool {
    let mut available = false;
    // SAFETY: writes one bool; the device is freed.
    unsafe {
        let device = mlx_sys::mlx_device_new_type(mlx_sys::mlx_device_type__MLX_GPU, 0);
        let status = mlx_sys::mlx_device_is_available(&mut available, device);
        mlx_sys::mlx_device_free(device);
        status == 0 && available
    }
}

/// The GPUs that MLX sees.
pub fn gpus() -> usize {
    let mut count = 0;
    // SAFETY: writes one number.
    let status = unsafe { mlx_sys::mlx_device_count(&mut count, mlx_sys::mlx_device_type__MLX_GPU) };
    if status == 0 { count.max(0) as usize } else { 0 }
}

pub fn built_with_cuda() -> bool {
    let mut available = false;
    // SAFETY: writes one bool.
    unsafe { mlx_sys::mlx_cuda_is_available(&mut available) == 0 && available }
}

/// Waits for the device's default stream.
pub fn synchronize(cpu: bool) -> Result<()> {
    let kind = if cpu { mlx_sys::mlx_device_type__MLX_CPU } else { mlx_sys::mlx_device_type__MLX_GPU };
    // SAFETY: fresh handles, freed here.
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
    ensure!(status == 0, "MLX could not wait for its device");
    Ok(())
}

/// Records what Metal does while `body` runs; see `mlx/backend/metal/metal.h`.
pub fn capture(path: &Path, body: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    let text = CString::new(path.as_os_str().as_encoded_bytes())?;
    // SAFETY: a string that outlives the call.
    let started = unsafe { mlx_sys::mlx_metal_start_capture(text.as_ptr()) } == 0;
    ensure!(
        started,
        "Metal records no capture here: set MTL_CAPTURE_ENABLED=1, or record it with Instruments"
    );
    let done = body();
    // SAFETY: no arguments.
    let stopped = unsafe { mlx_sys::mlx_metal_stop_capture() } == 0;
    done?;
    ensure!(stopped, "Metal could not write {}: is the disk full?", path.display());
    Ok(())
}

/// Bytes that the GPU can hold.
pub fn memory_total() -> Option<u64> {
    for key in ["max_recommended_working_set_size", "total_memory", "memory_size"] {
        let key = CString::new(key).expect("no NUL");
        // SAFETY: a fresh description of the device, asked for one number and freed.
        unsafe {
            let device = mlx_sys::mlx_device_new_type(mlx_sys::mlx_device_type__MLX_GPU, 0);
            let mut info = mlx_sys::mlx_device_info_new();
            let mut exists = false;
            let mut size = 0;
            let found = mlx_sys::mlx_device_info_get(&mut info, device) == 0
                && mlx_sys::mlx_device_info_has_key(&mut exists, info, key.as_ptr()) == 0
                && exists
                && mlx_sys::mlx_device_info_get_size(&mut size, info, key.as_ptr()) == 0;
            mlx_sys::mlx_device_info_free(info);
            mlx_sys::mlx_device_free(device);
            if found {
                return Some(size as u64);
            }
        }
    }
    None
}

/// Whether an architecture that Metal names, such as `applegpu_g17s`, has neural accelerators:
/// the seventeenth generation (M5), of phones the eighteenth, as MLX itself decides.
fn has_neural_accelerators(architecture: &str) -> bool {
    let Some((_, name)) = architecture.rsplit_once("_g") else { return false };
    let digits = name.trim_end_matches(|c: char| !c.is_ascii_digit());
    let least = if name.ends_with('p') { 18 } else { 17 };
    digits.parse::<u32>().is_ok_and(|generation| generation >= least)
}

/// Whether the GPU has them, which TF32 needs on Metal.
pub fn neural_accelerators() -> bool {
    let key = c"architecture";
    let mut text: *const c_char = std::ptr::null();
    // SAFETY: a fresh description of the device, asked for one string, read before it is freed.
    unsafe {
        let device = mlx_sys::mlx_device_new_type(mlx_sys::mlx_device_type__MLX_GPU, 0);
        let mut info = mlx_sys::mlx_device_info_new();
        let found = mlx_sys::mlx_device_info_get(&mut info, device) == 0
            && mlx_sys::mlx_device_info_get_string(&mut text, info, key.as_ptr()) == 0
            && !text.is_null()
            && has_neural_accelerators(&CStr::from_ptr(text).to_string_lossy());
        mlx_sys::mlx_device_info_free(info);
        mlx_sys::mlx_device_free(device);
        found
    }
}

/// A function that the process may or may not hold.
fn symbol(name: &str) -> Option<*mut libc::c_void> {
    let name = CString::new(name).expect("no NUL");
    // SAFETY: looks a name up among the loaded libraries.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

/// The BLAS behind matrix products on the CPU, as it names itself.
pub fn blas() -> Vec<(String, String)> {
    let named = |value: String| ("MLX BLAS".to_owned(), value);
    if cfg!(target_os = "macos") {
        return vec![named("Accelerate".to_owned())];
    }
    for prefix in ["scipy_", ""] {
        let (Some(config), Some(threads)) = (
            symbol(&format!("{prefix}openblas_get_config")),
            symbol(&format!("{prefix}openblas_get_num_threads")),
        ) else {
            continue;
        };
        // SAFETY: OpenBLAS's documented signatures; the string is static.
        let (config, threads) = unsafe {
            let config: extern "C" fn() -> *const c_char = std::mem::transmute(config);
            let threads: extern "C" fn() -> c_int = std::mem::transmute(threads);
            (CStr::from_ptr(config()).to_string_lossy().trim().to_owned(), threads())
        };
        // "OpenBLAS 0.3.34 NO_AFFINITY … SkylakeX MAX_THREADS=64": the flags say little.
        let words: Vec<_> = config.split_whitespace().collect();
        let core = words.iter().rev().find(|w| !w.contains('=') && !w.contains('_')).unwrap_or(&"");
        let version = words.iter().take(2).copied().collect::<Vec<_>>().join(" ");
        return vec![
            named(format!("{version} ({core} kernels)")),
            ("MLX BLAS threads".to_owned(), threads.to_string()),
        ];
    }
    vec![named("the reference BLAS (slow: no optimised one was found at set-up)".to_owned())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neural_accelerators_came_with_the_m5() {
        for (name, expected) in [
            ("applegpu_g13g", false),
            ("applegpu_g16s", false),
            ("applegpu_g17s", true),
            ("applegpu_g17p", false),
            ("applegpu_g18p", true),
            ("", false),
        ] {
            assert_eq!(has_neural_accelerators(name), expected, "{name}");
        }
    }
}
