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
type Raw = *mut c_void;

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
    fn tb_side_linear(x: Raw, weight: Raw, bias: Raw, ones: Raw, out: *mut Raw) -> c_int;
    fn tb_side_norm(x: Raw, weight: Raw, bias: Raw, ones: Raw, eps: f64, out: *mut Raw) -> c_int;
    fn tb_linear_cross_entropy(hidden: Raw, weight: Raw, target: Raw, out: *mut Raw) -> c_int;
    fn tb_copy(to: *const Raw, from: *const Raw, count: usize) -> c_int;
    fn tb_join(device: c_int) -> c_int;
    fn tb_gradients(
        root: Raw,
        upstream: Raw,
        inputs: *const Raw,
        count: usize,
        gradients: *mut Raw,
        here: bool,
    ) -> c_int;
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

fn checked(status: c_int) -> Result<()> {
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

fn raw(tensors: &[Tensor]) -> Vec<Raw> {
    tensors.iter().map(|t| t.as_ptr().cast_mut().cast()).collect()
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

/// One tensor as the result of a function of several.
fn made<const N: usize>(
    tensors: [&Tensor; N],
    call: impl FnOnce([Raw; N], *mut Raw) -> c_int,
) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    checked(call(tensors.map(|t| t.as_ptr().cast_mut().cast()), &mut out))?;
    // SAFETY: after success the slot holds an owned tensor, taken once.
    Ok(unsafe { Tensor::from_ptr(out.cast()) })
}

/// x·weightᵀ + bias, whose parameter gradients are computed on a second stream. What
/// follows [`join`] sees them. `ones` has at least as many elements as x has rows.
pub fn side_linear(x: &Tensor, weight: &Tensor, bias: &Tensor, ones: &Tensor) -> Result<Tensor> {
    // SAFETY: all tensors outlive the call.
    made([x, weight, bias, ones], |[x, w, b, ones], out| unsafe { tb_side_linear(x, w, b, ones, out) })
}

/// Layer norm over the last dimension, as [`side_linear`] computes gradients.
pub fn side_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, ones: &Tensor, eps: f64) -> Result<Tensor> {
    // SAFETY: all tensors outlive the call.
    made([x, weight, bias, ones], |[x, w, b, ones], out| unsafe { tb_side_norm(x, w, b, ones, eps, out) })
}

/// Mean cross-entropy in f32 of hidden [M, D] · weightᵀ [D, V] against target [M].
pub fn linear_cross_entropy(hidden: &Tensor, weight: &Tensor, target: &Tensor) -> Result<Tensor> {
    // SAFETY: all tensors outlive the call.
    made([hidden, weight, target], |[h, w, t], out| unsafe { tb_linear_cross_entropy(h, w, t, out) })
}

/// Copies values pairwise, converting where the types differ; records no gradient.
pub fn copy(to: &[Tensor], from: &[Tensor]) -> Result<()> {
    assert_eq!(to.len(), from.len());
    // SAFETY: two lists of equally many live tensors.
    checked(unsafe { tb_copy(raw(to).as_ptr(), raw(from).as_ptr(), to.len()) })
}

/// The device's current stream waits for the second one.
pub fn join(device: Device) -> Result<()> {
    // SAFETY: no pointers.
    checked(unsafe { tb_join(code(device)) })
}

/// d(root)/d(inputs); `upstream` arrives at the root, or 1 where it is a scalar. With `here`
/// on this thread, as work on the second stream needs; else as the engine does it.
pub fn gradients(
    root: &Tensor,
    upstream: Option<&Tensor>,
    inputs: &[Tensor],
    here: bool,
) -> Result<Vec<Tensor>> {
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
            here,
        )
    })?;
    // SAFETY: owned tensors, each taken once.
    Ok(out.into_iter().map(|t| unsafe { Tensor::from_ptr(t.cast()) }).collect())
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
        // SAFETY: owned tensors, each taken once.
        Ok(out.into_iter().map(|t| unsafe { Tensor::from_ptr(t.cast()) }).collect())
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

impl Graph {
    /// Runs `warm_up` and then records `body` on a stream of their own.
    pub fn record(warm_up: impl FnOnce() -> Result<()>, body: impl FnOnce() -> Result<()>) -> Result<Self> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn the_loss_of_a_certain_token_keeps_its_digits_in_bf16() {
        const OTHERS: f64 = 7.0;
        for certainty in [-3.0_f64, 0.0, 1.0, 4.0, 12.0, 20.0] {
            // Logits: the certainty at token 0, zero at the others.
            let hidden = Tensor::from_slice(&[certainty as f32, 0.0]).view([1, 2]).to_kind(Kind::BFloat16);
            let hidden = hidden.set_requires_grad(true);
            let weight = Tensor::zeros([1 + OTHERS as i64, 2], (Kind::Float, Device::Cpu));
            let _ = weight.narrow(0, 0, 1).narrow(1, 0, 1).fill_(1.0);
            let weight = weight.to_kind(Kind::BFloat16).set_requires_grad(true);
            let target = Tensor::from_slice(&[0i64]);
            let loss = linear_cross_entropy(&hidden, &weight, &target).unwrap();
            let slope = gradients(&loss, None, std::slice::from_ref(&hidden), true).unwrap();
            let others = OTHERS * (-certainty).exp();
            // One rounding to bf16 of every probability: at most 2⁻⁸ of each.
            let near = |found: f64, wanted: f64| ((found - wanted) / wanted).abs() < 1.0 / 128.0;
            let (found, wanted) = (loss.double_value(&[]), others.ln_1p());
            assert!(near(found, wanted), "loss at {certainty}: {found}, should be {wanted}");
            let (found, wanted) = (slope[0].double_value(&[0, 0]), -others / (1.0 + others));
            assert!(near(found, wanted), "slope at {certainty}: {found}, should be {wanted}");
        }
    }
}
