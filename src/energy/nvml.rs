//! The energy counter of an NVIDIA GPU, from the driver's management library (NVML API reference, "Device Queries").

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_ulonglong, c_void};

use anyhow::{Context, Result, bail, ensure};

use super::{Counter, Scope};
use crate::backend::visible_gpu;

type Device = *mut c_void;

/// The functions of NVML that are called. The library is loaded when it is needed, because only machines with NVIDIA's
/// driver have it.
#[derive(Clone, Copy)]
struct Library {
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    total_energy: unsafe extern "C" fn(Device, *mut c_ulonglong) -> c_int,
    power_limit: unsafe extern "C" fn(Device, *mut c_uint) -> c_int,
    by_index: unsafe extern "C" fn(c_uint, *mut Device) -> c_int,
    by_uuid: unsafe extern "C" fn(*const c_char, *mut Device) -> c_int,
}

/// Returns a function of a library.
///
/// # Safety
/// `F` must be the type of the function.
unsafe fn function<F: Copy>(library: *mut c_void, name: &CStr) -> Result<F> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    // SAFETY: a handle of `dlopen` and a NUL-terminated name.
    let address = unsafe { libc::dlsym(library, name.as_ptr()) };
    ensure!(!address.is_null(), "this NVML has no {}: the driver is too old", name.to_string_lossy());
    // SAFETY: the address is a function of the caller's type, which has the size of a pointer.
    Ok(unsafe { std::mem::transmute_copy(&address) })
}

impl Library {
    fn load() -> Result<Self> {
        // SAFETY: loads a library whose initializers have no conditions.
        let library = unsafe { libc::dlopen(c"libnvidia-ml.so.1".as_ptr(), libc::RTLD_NOW) };
        ensure!(!library.is_null(), "libnvidia-ml.so.1 is missing: NVIDIA's driver provides it");
        // SAFETY: the types are those of nvml.h.
        let (library, init) = unsafe {
            let init: unsafe extern "C" fn() -> c_int = function(library, c"nvmlInit_v2")?;
            let all = Self {
                error_string: function(library, c"nvmlErrorString")?,
                total_energy: function(library, c"nvmlDeviceGetTotalEnergyConsumption")?,
                power_limit: function(library, c"nvmlDeviceGetEnforcedPowerLimit")?,
                by_index: function(library, c"nvmlDeviceGetHandleByIndex_v2")?,
                by_uuid: function(library, c"nvmlDeviceGetHandleByUUID")?,
            };
            (all, init)
        };
        // SAFETY: no arguments.
        library.check(unsafe { init() }).context("NVML does not start")?;
        Ok(library)
    }

    fn check(&self, status: c_int) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: NVML returns a static string for every status.
        bail!("{}", unsafe { CStr::from_ptr((self.error_string)(status)) }.to_string_lossy())
    }

    /// Returns the GPU that CUDA uses first. Numbers are in the order of the PCI bus, as CUDA's are on a host with equal
    /// GPUs.
    fn first_device(&self) -> Result<Device> {
        let name = visible_gpu(0);
        let mut device = std::ptr::null_mut();
        let status = match name.parse() {
            // SAFETY: writes a handle.
            Ok(index) => unsafe { (self.by_index)(index, &raw mut device) },
            Err(_) => {
                let uuid = CString::new(name.clone())?;
                // SAFETY: a NUL-terminated string, and a place for a handle.
                unsafe { (self.by_uuid)(uuid.as_ptr(), &raw mut device) }
            }
        };
        self.check(status).with_context(|| format!("NVML does not find GPU {name}"))?;
        Ok(device)
    }
}

/// Opens the counter of the first GPU that CUDA uses.
///
/// # Errors
/// Returns the reason if the driver has none. NVIDIA's GPUs have it since Volta.
pub fn open() -> Result<Counter> {
    let library = Library::load()?;
    let device = library.first_device()?;
    let read = move || {
        let mut millijoules = 0;
        // SAFETY: a live handle, and a place for the number.
        library.check(unsafe { (library.total_energy)(device, &raw mut millijoules) })?;
        Ok(millijoules as f64 * 1e-3)
    };
    read().context("this GPU has no energy counter")?;
    let mut milliwatts = 0;
    // SAFETY: a live handle, and a place for the number.
    let limit = library.check(unsafe { (library.power_limit)(device, &raw mut milliwatts) });
    let limit_watts = limit.is_ok().then(|| f64::from(milliwatts) * 1e-3);
    Ok(Counter { scope: Scope::Board, limit_watts, read: Box::new(read) })
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn the_counter_of_a_gpu_advances() {
        let mut counter = match open() {
            Ok(counter) => counter,
            Err(reason) => return println!("skipped: {reason:#}"),
        };
        let (before, start) = (counter.joules().unwrap(), Instant::now());
        std::thread::sleep(Duration::from_secs(2));
        let watts = (counter.joules().unwrap() - before) / start.elapsed().as_secs_f64();
        println!("idle GPU: {watts:.1} W, limit {:?} W", counter.limit_watts);
        counter.check(watts).unwrap();
        assert!(counter.limit_watts.is_some_and(|limit| watts < limit));
    }
}
