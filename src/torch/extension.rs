//! The safe side of `native/`.

use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::Once;

use anyhow::{Context, Result, anyhow};
use tch::{Device, Tensor};
use transformer_bench::model::fixture::AdamW;

/// A tensor as libtorch's C++ side sees it.
pub type Raw = *mut c_void;

#[repr(C)]
struct Setting {
    lr: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
}

impl From<&AdamW> for Setting {
    fn from(s: &AdamW) -> Self {
        Self { lr: s.lr, beta1: s.beta1, beta2: s.beta2, eps: s.eps, weight_decay: s.weight_decay }
    }
}

unsafe extern "C" {
    fn tb_last_error() -> *const c_char;
    fn tb_version() -> *const c_char;
    fn tb_configuration() -> *const c_char;
    fn tb_synchronize(device: c_int) -> c_int;
    fn tb_allow_tf32(allow: bool) -> c_int;
    fn tb_autocast_begin(device: c_int) -> c_int;
    fn tb_autocast_end(device: c_int) -> c_int;
    fn tb_copy(to: *const Raw, from: *const Raw, count: usize) -> c_int;
    fn tb_gradients(root: Raw, upstream: Raw, inputs: *const Raw, count: usize, gradients: *mut Raw)
    -> c_int;
    fn tb_adamw(
        parameters: *const Raw,
        gradients: *const Raw,
        first: *const Raw,
        second: *const Raw,
        count: usize,
        step: i64,
        setting: Setting,
        foreach: bool,
    ) -> c_int;
    fn tb_fused_adamw(
        parameters: *const Raw,
        gradients: *const Raw,
        first: *const Raw,
        second: *const Raw,
        steps: *const Raw,
        count: usize,
        setting: Setting,
    ) -> c_int;
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
        inputs: *const Raw,
        count: usize,
        results: *mut Raw,
        expected: usize,
    ) -> c_int;
    fn tb_drop_workspaces() -> c_int;
    fn tb_peak_memory(device: c_int, bytes: *mut u64) -> c_int;
    fn tb_reset_peak_memory(device: c_int) -> c_int;
    fn tb_memory_total(device: c_int, bytes: *mut u64) -> c_int;
}

pub fn checked(status: c_int) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: a NUL-terminated string that lives until this thread's next failing call.
    let reason = unsafe { CStr::from_ptr(tb_last_error()) }.to_string_lossy();
    Err(anyhow!("{}", first_line(&reason)))
}

/// libtorch's messages go on with pages of C++ frames.
fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or("libtorch gave no reason").to_owned()
}

fn code(device: Device) -> c_int {
    match device {
        Device::Mps => 1,
        Device::Cuda(_) => 2,
        _ => 0,
    }
}

pub fn raw(tensors: &[Tensor]) -> Vec<Raw> {
    tensors.iter().map(|t| t.as_ptr().cast_mut().cast()).collect()
}

/// What libtorch gave: owned tensors, each taken once.
pub fn owned(tensors: Vec<Raw>) -> Vec<Tensor> {
    // SAFETY: the caller has them from a call that succeeded, which made each anew.
    tensors.into_iter().map(|t| unsafe { Tensor::from_ptr(t.cast()) }).collect()
}

/// tch's plain methods panic on libtorch's errors, such as running out of memory;
/// here those become errors, without the panic's own message.
pub fn caught<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    thread_local! {
        static QUIET: Cell<bool> = const { Cell::new(false) };
    }
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                usual(info);
            }
        }));
    });
    QUIET.set(true);
    let result = panic::catch_unwind(AssertUnwindSafe(body));
    QUIET.set(false);
    result.unwrap_or_else(|payload| {
        let text = payload
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| payload.downcast_ref::<&str>().copied())
            .unwrap_or("libtorch gave no reason");
        // tch wraps the message as `Torch("…")`, with escaped line ends.
        let text = text.split_once("Torch(\"").map_or(text, |(_, inner)| inner);
        Err(anyhow!("{}", first_line(text.split("\\n").next().unwrap_or(text))))
    })
}

/// Loads libtorch's CUDA part, which registers the device. A program links only the
/// CPU part, so that it runs where there is no CUDA.
pub fn load_cuda() -> Result<(), String> {
    let name = CString::new("libtorch_cuda.so").expect("no NUL");
    // SAFETY: loads a library whose initialisers only register kernels.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if !handle.is_null() {
        return Ok(());
    }
    // SAFETY: dlerror returns a string or null after a failed dlopen.
    let reason = unsafe { libc::dlerror() };
    let reason = if reason.is_null() {
        String::new()
    } else {
        // SAFETY: checked above.
        unsafe { CStr::from_ptr(reason) }.to_string_lossy().into_owned()
    };
    if reason.starts_with("libtorch_cuda.so:") {
        return Err("this libtorch is a CPU build (no NVIDIA driver when scripts/setup ran)".to_owned());
    }
    Err(format!("libtorch's CUDA part does not load: {}", first_line(&reason)))
}

pub fn version() -> String {
    // SAFETY: a static string.
    unsafe { CStr::from_ptr(tb_version()) }.to_string_lossy().into_owned()
}

/// What of libtorch's build a reader of the figures needs: BLAS and instruction set.
pub fn configuration() -> Vec<(String, String)> {
    // SAFETY: a string that lives until this thread's next call.
    let text = unsafe { CStr::from_ptr(tb_configuration()) }.to_string_lossy().into_owned();
    let mut all = Vec::new();
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
    checked(unsafe { tb_synchronize(code(device)) })
}

/// Pins whether f32 products may use TF32: never left to a default.
pub fn allow_tf32(allow: bool) -> Result<()> {
    // SAFETY: no pointers.
    checked(unsafe { tb_allow_tf32(allow) })
}

/// Runs `body` under the device's autocast to bf16.
pub fn autocast<T>(device: Device, on: bool, body: impl FnOnce() -> T) -> Result<T> {
    if !on {
        return Ok(body());
    }
    struct End(c_int);
    impl Drop for End {
        fn drop(&mut self) {
            // SAFETY: no pointers; pairs with the begin below, also when `body` panics.
            unsafe { tb_autocast_end(self.0) };
        }
    }
    // SAFETY: no pointers.
    checked(unsafe { tb_autocast_begin(code(device)) })?;
    let _end = End(code(device));
    Ok(body())
}

/// Copies values pairwise, converting where the types differ; records no gradient.
pub fn copy(to: &[Tensor], from: &[Tensor]) -> Result<()> {
    assert_eq!(to.len(), from.len());
    // SAFETY: two lists of equally many live tensors.
    checked(unsafe { tb_copy(raw(to).as_ptr(), raw(from).as_ptr(), to.len()) })
}

/// d(root)/d(inputs); `upstream` arrives at the root, or 1 where it is a scalar.
pub fn gradients(root: &Tensor, upstream: Option<&Tensor>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
    let mut out: Vec<Raw> = vec![std::ptr::null_mut(); inputs.len()];
    let from = upstream.map_or(std::ptr::null_mut(), |t| t.as_ptr().cast_mut().cast());
    // SAFETY: all tensors outlive the call; on success every slot holds an owned tensor.
    checked(unsafe {
        tb_gradients(
            root.as_ptr().cast_mut().cast(),
            from,
            raw(inputs).as_ptr(),
            inputs.len(),
            out.as_mut_ptr(),
        )
    })?;
    Ok(owned(out))
}

/// Moments of AdamW, in the parameters' own type, as torch.optim keeps them.
pub struct Moments {
    first: Vec<Tensor>,
    second: Vec<Tensor>,
    step: i64,
    /// The fused kernel counts on the device.
    device_steps: Option<Vec<Tensor>>,
}

impl Moments {
    pub fn new(parameters: &[Tensor], fused: bool) -> Self {
        let zeros = || parameters.iter().map(|p| p.detach().zeros_like()).collect();
        let device_steps = fused.then(|| {
            parameters.iter().map(|p| Tensor::zeros([1i64; 0], (tch::Kind::Float, p.device()))).collect()
        });
        Self { first: zeros(), second: zeros(), step: 0, device_steps }
    }

    /// Everything that a step changes beside the parameters.
    pub fn state(&self) -> Vec<Tensor> {
        let steps = self.device_steps.iter().flatten();
        self.first.iter().chain(&self.second).chain(steps).map(Tensor::shallow_clone).collect()
    }

    /// Counts from the first step again; the tensors are the caller's to put back.
    pub fn restart(&mut self) {
        self.step = 0;
    }

    /// One AdamW step in place.
    pub fn apply(&mut self, setting: &AdamW, parameters: &[Tensor], gradients: &[Tensor]) -> Result<()> {
        let count = parameters.len();
        assert_eq!(count, gradients.len());
        let (p, g) = (raw(parameters), raw(gradients));
        let (m, v) = (raw(&self.first), raw(&self.second));
        self.step += 1;
        // SAFETY: four lists of `count` live tensors, and a fifth for the fused kernel.
        checked(unsafe {
            match &self.device_steps {
                Some(steps) => tb_fused_adamw(
                    p.as_ptr(),
                    g.as_ptr(),
                    m.as_ptr(),
                    v.as_ptr(),
                    raw(steps).as_ptr(),
                    count,
                    setting.into(),
                ),
                None => {
                    let foreach = parameters.first().is_some_and(|p| p.device() != Device::Cpu);
                    tb_adamw(
                        p.as_ptr(),
                        g.as_ptr(),
                        m.as_ptr(),
                        v.as_ptr(),
                        count,
                        self.step,
                        setting.into(),
                        foreach,
                    )
                }
            }
        })
    }
}

/// Code that AOTInductor made, loaded.
pub struct Package(*mut c_void);

impl Package {
    /// Loads `library`, which finds what it needs beside itself.
    pub fn load(library: &Path, device: Device) -> Result<Self> {
        let text = |path: &Path| CString::new(path.as_os_str().as_bytes()).context("a path holds a NUL");
        let folder = library.parent().context("a library lies in a folder")?;
        let (library, folder) = (text(library)?, text(folder)?);
        let device = match device {
            Device::Mps => c"mps",
            Device::Cuda(_) => c"cuda",
            _ => c"cpu",
        };
        let mut handle = std::ptr::null_mut();
        // SAFETY: three strings that outlive the call; writes one pointer, owned by the value made here.
        checked(unsafe { tb_package_load(library.as_ptr(), device.as_ptr(), folder.as_ptr(), &mut handle) })?;
        Ok(Self(handle))
    }

    /// Runs it; what it changes in place are its inputs.
    pub fn run(&self, inputs: &[Tensor], expected: usize) -> Result<Vec<Tensor>> {
        let mut out: Vec<Raw> = vec![std::ptr::null_mut(); expected];
        // SAFETY: the handle is live, all tensors outlive the call; on success every slot holds an owned
        // tensor.
        checked(unsafe {
            tb_package_run(self.0, raw(inputs).as_ptr(), inputs.len(), out.as_mut_ptr(), expected)
        })?;
        Ok(owned(out))
    }
}

impl Drop for Package {
    fn drop(&mut self) {
        // SAFETY: owned, freed once.
        unsafe { tb_package_free(self.0) };
    }
}

/// A recorded CUDA graph.
pub struct Graph(*mut c_void);

/// Steps before a recording: cuBLAS and the allocator settle in the first.
const WARM_UP: usize = 3;

impl Graph {
    /// Runs a step a few times and records `body`. What the former changes in `state` is put back, so that
    /// the first replay is the first step.
    pub fn of_step(
        state: Vec<Tensor>,
        mut step: impl FnMut() -> Result<()>,
        body: impl FnOnce() -> Result<()>,
    ) -> Result<Self> {
        let before: Vec<Tensor> = state.iter().map(Tensor::copy).collect();
        let warm_up = || {
            (0..WARM_UP).try_for_each(|_| step())?;
            tch::no_grad(|| state.into_iter().zip(&before).for_each(|(mut now, before)| now.copy_(before)));
            Ok(())
        };
        Self::record(warm_up, body)
    }

    /// Runs `warm_up` and then records `body` on a stream of their own.
    fn record(warm_up: impl FnOnce() -> Result<()>, body: impl FnOnce() -> Result<()>) -> Result<Self> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes one pointer, owned by the value made here.
        checked(unsafe { tb_graph_new(&mut handle) })?;
        let graph = Self(handle);
        // SAFETY (here and below): the handle is live.
        checked(unsafe { tb_graph_enter(graph.0) })?;
        let recorded = warm_up().and_then(|()| {
            checked(unsafe { tb_graph_begin(graph.0) })?;
            let done = caught(body);
            // Ended also after a failure: nothing else runs during a recording.
            let ended = checked(unsafe { tb_graph_end(graph.0) });
            done.and(ended)
        });
        let left = checked(unsafe { tb_graph_leave(graph.0) });
        recorded.and(left).map(|()| graph)
    }

    pub fn replay(&self) -> Result<()> {
        // SAFETY: the handle is live.
        checked(unsafe { tb_graph_replay(self.0) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: owned, freed once.
        unsafe { tb_graph_free(self.0) };
    }
}

fn bytes(read: impl FnOnce(*mut u64) -> c_int) -> Option<u64> {
    let mut value = 0;
    (read(&mut value) == 0).then_some(value)
}

/// None on the CPU, and where the device's allocator keeps no statistics.
pub fn peak_memory(device: Device) -> Option<u64> {
    // SAFETY: writes one integer.
    (device != Device::Cpu).then(|| bytes(|to| unsafe { tb_peak_memory(code(device), to) })).flatten()
}

pub fn reset_peak_memory(device: Device) {
    if device != Device::Cpu {
        // SAFETY: no pointers. A device without statistics has nothing to reset.
        unsafe {
            tb_drop_workspaces();
            tb_reset_peak_memory(code(device));
        }
    }
}

pub fn memory_total(device: Device) -> Option<u64> {
    // SAFETY: writes one integer.
    (device != Device::Cpu).then(|| bytes(|to| unsafe { tb_memory_total(code(device), to) })).flatten()
}
