//! Safe wrappers of the C++ functions in `native/`.

use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::Once;

use anyhow::{Context, Result, anyhow, bail};
use tch::{Device, Tensor};
use transformer_bench::installation;

/// Pointer to a C++ `at::Tensor`.
pub type RawTensor = *mut c_void;

unsafe extern "C" {
    fn tb_last_error() -> *const c_char;
    fn tb_version() -> *const c_char;
    fn tb_configuration() -> *const c_char;
    fn tb_synchronize(device: c_int) -> c_int;
    fn tb_allow_tf32(allow: bool) -> c_int;
    fn tb_autocast_begin(device: c_int) -> c_int;
    fn tb_autocast_end(device: c_int) -> c_int;
    fn tb_foreach_copy(to: *const RawTensor, from: *const RawTensor, count: usize) -> c_int;
    fn tb_foreach_add(sums: *const RawTensor, others: *const RawTensor, count: usize) -> c_int;
    fn tb_foreach_mul(tensors: *const RawTensor, factor: f64, count: usize) -> c_int;
    fn tb_graph_new(out: *mut *mut c_void) -> c_int;
    fn tb_graph_free(graph: *mut c_void);
    fn tb_graph_enter(graph: *mut c_void) -> c_int;
    fn tb_graph_begin(graph: *mut c_void) -> c_int;
    fn tb_graph_end(graph: *mut c_void) -> c_int;
    fn tb_graph_leave(graph: *mut c_void) -> c_int;
    fn tb_graph_replay(graph: *mut c_void) -> c_int;
    fn tb_package_load(
        library: *const c_char,
        device: *const c_char,
        folder: *const c_char,
        out: *mut *mut c_void,
    ) -> c_int;
    fn tb_package_free(package: *mut c_void);
    fn tb_package_run(
        package: *mut c_void,
        inputs: *const RawTensor,
        count: usize,
        results: *mut RawTensor,
        expected: usize,
    ) -> c_int;
    fn tb_clear_cublas_workspaces() -> c_int;
    fn tb_peak_memory(device: c_int, bytes: *mut u64) -> c_int;
    fn tb_reset_peak_memory(device: c_int) -> c_int;
    fn tb_memory_total(device: c_int, bytes: *mut u64) -> c_int;
}

/// Converts the status of a C++ function.
pub fn check_status(status: c_int) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: a NUL-terminated string that is valid until the next failing call of this thread.
    let reason = unsafe { CStr::from_ptr(tb_last_error()) }.to_string_lossy();
    Err(anyhow!("{}", first_line(&reason)))
}

/// Returns the first line of a message of libtorch. The others are a C++ stack trace.
fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or("libtorch gave no reason").to_owned()
}

/// Returns the number of a device in the C++ functions.
pub fn device_code(device: Device) -> c_int {
    match device {
        Device::Mps => 1,
        Device::Cuda(_) => 2,
        _ => 0,
    }
}

pub fn as_raw(tensor: &Tensor) -> RawTensor {
    tensor.as_ptr().cast_mut().cast()
}

pub fn as_raw_list(tensors: &[Tensor]) -> Vec<RawTensor> {
    tensors.iter().map(as_raw).collect()
}

/// Returns the tensors that `call` writes to `count` slots. It writes new tensors, and returns the status.
pub fn returned(count: usize, call: impl FnOnce(*mut RawTensor) -> c_int) -> Result<Vec<Tensor>> {
    let mut out: Vec<RawTensor> = vec![std::ptr::null_mut(); count];
    check_status(call(out.as_mut_ptr()))?;
    // SAFETY: the successful call has written a new tensor to each slot. Each is taken once.
    Ok(out.into_iter().map(|tensor| unsafe { Tensor::from_ptr(tensor.cast()) }).collect())
}

/// A pool that frees the Objective-C objects of MPS which libtorch autoreleases. A program without AppKit's event loop
/// has none, so its memory would grow.
#[cfg(target_os = "macos")]
struct AutoreleasePool(*mut c_void);

#[cfg(target_os = "macos")]
#[link(name = "objc")]
unsafe extern "C" {
    fn objc_autoreleasePoolPush() -> *mut c_void;
    fn objc_autoreleasePoolPop(pool: *mut c_void);
}

#[cfg(target_os = "macos")]
impl AutoreleasePool {
    fn new() -> Self {
        // SAFETY: takes no pointers.
        Self(unsafe { objc_autoreleasePoolPush() })
    }
}

#[cfg(target_os = "macos")]
impl Drop for AutoreleasePool {
    fn drop(&mut self) {
        // SAFETY: the innermost pool of this thread, freed once.
        unsafe { objc_autoreleasePoolPop(self.0) };
    }
}

/// Runs `body` and turns its panics into errors, without the message of the panic hook. The methods of tch panic on
/// errors of libtorch, such as running out of memory. On macOS, it also frees what MPS autoreleases.
///
/// # Errors
/// Returns the error of `body`, or the message of the panic.
pub fn catch_panics<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    thread_local! {
        static QUIET: Cell<bool> = const { Cell::new(false) };
    }
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let default_hook = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                default_hook(info);
            }
        }));
    });
    QUIET.set(true);
    #[cfg(target_os = "macos")]
    let _pool = AutoreleasePool::new();
    let result = panic::catch_unwind(AssertUnwindSafe(body));
    QUIET.set(false);
    result.unwrap_or_else(|payload| {
        let text = payload
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| payload.downcast_ref::<&str>().copied())
            .unwrap_or("libtorch gave no reason");
        // tch formats the message as `Torch("…")`, with escaped line ends.
        let text = text.split_once("Torch(\"").map_or(text, |(_, inner)| inner);
        Err(anyhow!("{}", first_line(text.split("\\n").next().unwrap_or(text))))
    })
}

/// Loads libtorch_cuda, which registers the device. The program links only the CPU library, so that it also runs on
/// machines without CUDA.
///
/// # Errors
/// Returns the reason if the library is missing or does not load.
pub fn load_cuda() -> Result<()> {
    // SAFETY: loads a library whose initializers only register kernels.
    let handle = unsafe { libc::dlopen(c"libtorch_cuda.so".as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if !handle.is_null() {
        return Ok(());
    }
    // SAFETY: dlerror returns a string or null after a failed dlopen.
    let reason = unsafe { libc::dlerror() };
    let reason = if reason.is_null() {
        String::new()
    } else {
        // SAFETY: the pointer is not null.
        unsafe { CStr::from_ptr(reason) }.to_string_lossy().into_owned()
    };
    if reason.starts_with("libtorch_cuda.so:") {
        bail!("{}", installation::cpu_build("libtorch"));
    }
    bail!("libtorch_cuda does not load: {}", first_line(&reason))
}

pub fn version() -> String {
    // SAFETY: a static string.
    unsafe { CStr::from_ptr(tb_version()) }.to_string_lossy().into_owned()
}

/// Libraries that libtorch was built with, and how their lines in its description begin.
const BUILT_WITH: &[(&str, &[&str])] = &[
    ("compiler", &["GCC ", "clang ", "Clang ", "Apple LLVM "]),
    ("oneDNN", &["Intel(R) MKL-DNN v"]),
    ("OpenMP", &["OpenMP "]),
    ("CUDA", &["CUDA Runtime "]),
    ("cuDNN", &["CuDNN "]),
];

/// Returns the BLAS, the instruction set and the other libraries of libtorch, for the report.
pub fn configuration() -> Vec<(String, String)> {
    // SAFETY: a string that is valid until the next call of this thread.
    let text = unsafe { CStr::from_ptr(tb_configuration()) }.to_string_lossy().into_owned();
    parse_configuration(&text)
}

/// Reads the text of `torch.__config__.show()`.
pub(crate) fn parse_configuration(text: &str) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for (name, beginnings) in BUILT_WITH {
        let values = text.lines().filter_map(|line| {
            let line = line.trim_start_matches([' ', '-']);
            beginnings.iter().find(|start| line.starts_with(**start)).map(|start| match *name {
                "compiler" => line,
                _ => line[start.len()..].split([' ', ',']).next().unwrap_or_default(),
            })
        });
        all.extend(values.map(|value| (format!("PyTorch {name}"), value.to_owned())).next());
    }
    if let Some((_, rest)) = text.split_once("CPU capability: ") {
        all.push(("PyTorch instruction set".to_owned(), first_line(rest)));
    }
    if let Some((_, rest)) = text.split_once("BLAS_INFO=") {
        let name = rest.split([',', ' ', '\n']).next().unwrap_or("").to_uppercase();
        let full = text
            .lines()
            .map(|l| l.trim_start_matches([' ', '-']))
            .find(|l| l.to_uppercase().contains("MATH KERNEL") && name == "MKL");
        all.push(("PyTorch BLAS".to_owned(), full.map_or(name, str::to_owned)));
    }
    all
}

pub fn synchronize(device: Device) -> Result<()> {
    // SAFETY: no pointers.
    check_status(unsafe { tb_synchronize(device_code(device)) })
}

/// Sets whether f32 matrix products may use TF32, instead of relying on a default.
pub fn allow_tf32(allow: bool) -> Result<()> {
    // SAFETY: no pointers.
    check_status(unsafe { tb_allow_tf32(allow) })
}

/// Runs `body`, under `torch.autocast` with bf16 if `enabled`.
pub fn autocast<T>(device: Device, enabled: bool, body: impl FnOnce() -> T) -> Result<T> {
    struct End(c_int);
    impl Drop for End {
        fn drop(&mut self) {
            // SAFETY: no pointers. It matches the begin below, also if `body` panics.
            unsafe { tb_autocast_end(self.0) };
        }
    }
    if !enabled {
        return Ok(body());
    }
    // SAFETY: no pointers.
    check_status(unsafe { tb_autocast_begin(device_code(device)) })?;
    let _end = End(device_code(device));
    Ok(body())
}

/// Copies tensors pairwise without autograd, and converts their types.
pub fn foreach_copy(to: &[Tensor], from: &[Tensor]) -> Result<()> {
    assert_eq!(to.len(), from.len());
    // SAFETY: two lists of `to.len()` live tensors.
    check_status(unsafe { tb_foreach_copy(as_raw_list(to).as_ptr(), as_raw_list(from).as_ptr(), to.len()) })
}

/// Adds tensors pairwise to `sums`, in place and without autograd. Each sum keeps its type.
pub fn foreach_add(sums: &[Tensor], others: &[Tensor]) -> Result<()> {
    assert_eq!(sums.len(), others.len());
    let (sums, others) = (as_raw_list(sums), as_raw_list(others));
    // SAFETY: two lists of `sums.len()` live tensors.
    check_status(unsafe { tb_foreach_add(sums.as_ptr(), others.as_ptr(), sums.len()) })
}

/// Multiplies tensors by a number, in place and without autograd.
pub fn foreach_mul(tensors: &[Tensor], factor: f64) -> Result<()> {
    let tensors = as_raw_list(tensors);
    // SAFETY: a list of `tensors.len()` live tensors.
    check_status(unsafe { tb_foreach_mul(tensors.as_ptr(), factor, tensors.len()) })
}

/// A loaded AOTInductor package.
pub struct PackageRunner(*mut c_void);

impl PackageRunner {
    /// Loads the library of a package. The files that it needs are in the same folder.
    pub fn load(library: &Path, device: Device) -> Result<Self> {
        let text = |path: &Path| CString::new(path.as_os_str().as_bytes()).context("a path contains NUL");
        let folder = library.parent().context("a library has a folder")?;
        let (library, folder) = (text(library)?, text(folder)?);
        let device = match device {
            Device::Mps => c"mps",
            Device::Cuda(_) => c"cuda",
            _ => c"cpu",
        };
        let mut handle = std::ptr::null_mut();
        // SAFETY: the strings outlive the call. It writes a pointer, which the value owns.
        check_status(unsafe {
            tb_package_load(library.as_ptr(), device.as_ptr(), folder.as_ptr(), &mut handle)
        })?;
        Ok(Self(handle))
    }

    /// Runs the package, which may change its inputs in place. Returns `expected` tensors.
    pub fn run(&self, inputs: &[Tensor], expected: usize) -> Result<Vec<Tensor>> {
        let raw = as_raw_list(inputs);
        // SAFETY: the handle is live, all tensors outlive the call, and `out` has `expected` slots.
        returned(expected, |out| unsafe { tb_package_run(self.0, raw.as_ptr(), raw.len(), out, expected) })
    }
}

impl Drop for PackageRunner {
    fn drop(&mut self) {
        // SAFETY: the value owns the pointer and frees it once.
        unsafe { tb_package_free(self.0) };
    }
}

/// A captured CUDA graph.
pub struct Graph(*mut c_void);

/// Steps before a capture, in which cuBLAS and the allocator initialize.
const WARM_UP_STEPS: usize = 3;

impl Graph {
    /// Runs `step` as a warm-up, restores the tensors of `state`, and captures `body`. The first replay is therefore
    /// the first step.
    pub fn capture_step(
        state: Vec<Tensor>,
        mut step: impl FnMut() -> Result<()>,
        body: impl FnOnce() -> Result<()>,
    ) -> Result<Self> {
        let initial: Vec<Tensor> = state.iter().map(Tensor::copy).collect();
        let warm_up = || {
            (0..WARM_UP_STEPS).try_for_each(|_| step())?;
            tch::no_grad(|| {
                state.into_iter().zip(&initial).for_each(|(mut now, initial)| now.copy_(initial))
            });
            Ok(())
        };
        Self::capture(warm_up, body)
    }

    /// Runs `warm_up` and captures `body` on a side stream.
    fn capture(warm_up: impl FnOnce() -> Result<()>, body: impl FnOnce() -> Result<()>) -> Result<Self> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the call writes a pointer, which the value owns.
        check_status(unsafe { tb_graph_new(&mut handle) })?;
        let graph = Self(handle);
        // SAFETY (here and below): the handle is live.
        check_status(unsafe { tb_graph_enter(graph.0) })?;
        let captured = warm_up().and_then(|()| {
            check_status(unsafe { tb_graph_begin(graph.0) })?;
            let done = catch_panics(body);
            // The capture ends even if `body` failed, because most CUDA calls fail during a capture.
            let ended = check_status(unsafe { tb_graph_end(graph.0) });
            done.and(ended)
        });
        let left = check_status(unsafe { tb_graph_leave(graph.0) });
        captured.and(left).map(|()| graph)
    }

    pub fn replay(&self) -> Result<()> {
        // SAFETY: the handle is live.
        check_status(unsafe { tb_graph_replay(self.0) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: the value owns the pointer and frees it once.
        unsafe { tb_graph_free(self.0) };
    }
}

/// Returns the bytes that `read` writes, or `None` for the CPU or if it fails.
fn read_bytes(device: Device, read: unsafe extern "C" fn(c_int, *mut u64) -> c_int) -> Option<u64> {
    let mut bytes = 0;
    // SAFETY: the call writes one integer.
    (device != Device::Cpu && unsafe { read(device_code(device), &mut bytes) } == 0).then_some(bytes)
}

/// Returns the peak of the caching allocator in bytes. Returns `None` if the device does not have one.
pub fn peak_memory(device: Device) -> Option<u64> {
    read_bytes(device, tb_peak_memory)
}

pub fn reset_peak_memory(device: Device) {
    if device != Device::Cpu {
        // SAFETY: no pointers. Devices without statistics need no reset, so the status is ignored.
        unsafe {
            tb_clear_cublas_workspaces();
            tb_reset_peak_memory(device_code(device));
        }
    }
}

pub fn memory_total(device: Device) -> Option<u64> {
    read_bytes(device, tb_memory_total)
}
