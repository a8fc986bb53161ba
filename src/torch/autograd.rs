//! Gradients, and the state of the random generators from which dropout draws.

use std::ffi::c_int;

use anyhow::Result;
use tch::{Device, Tensor};

use crate::extension::{RawTensor, as_raw, as_raw_list, check_status, device_code, returned};

unsafe extern "C" {
    fn tb_grad(
        output: RawTensor,
        upstream: RawTensor,
        inputs: *const RawTensor,
        count: usize,
        allow_unused: bool,
        gradients: *mut RawTensor,
    ) -> c_int;
    fn tb_random_state(device: c_int, state: *mut RawTensor) -> c_int;
    fn tb_set_random_state(device: c_int, state: RawTensor) -> c_int;
}

/// Returns the gradients of `output` with respect to `inputs`. `upstream` is the gradient of `output`, or `None` for 1.
pub fn grad(output: &Tensor, upstream: Option<&Tensor>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
    let upstream = upstream.map_or(std::ptr::null_mut(), as_raw);
    let raw = as_raw_list(inputs);
    // SAFETY: all tensors outlive the call, and `out` has a slot per input.
    returned(raw.len(), |out| unsafe {
        tb_grad(as_raw(output), upstream, raw.as_ptr(), raw.len(), false, out)
    })
}

/// Returns the gradients of `output` as [`grad`] does, or `None` for each input that it does not depend on.
pub fn grad_of_used(
    output: &Tensor,
    upstream: Option<&Tensor>,
    inputs: &[Tensor],
) -> Result<Vec<Option<Tensor>>> {
    let upstream = upstream.map_or(std::ptr::null_mut(), as_raw);
    let raw = as_raw_list(inputs);
    // SAFETY: all tensors outlive the call, and `out` has a slot per input.
    let all = returned(raw.len(), |out| unsafe {
        tb_grad(as_raw(output), upstream, raw.as_ptr(), raw.len(), true, out)
    })?;
    Ok(all.into_iter().map(|gradient| Some(gradient).filter(Tensor::defined)).collect())
}

/// Returns the state of a device's random generator.
pub fn random_state(device: Device) -> Result<Tensor> {
    // SAFETY: the call writes one tensor.
    Ok(returned(1, |out| unsafe { tb_random_state(device_code(device), out) })?.remove(0))
}

/// Sets the state of a device's random generator.
pub fn set_random_state(device: Device, state: &Tensor) -> Result<()> {
    // SAFETY: the tensor outlives the call.
    check_status(unsafe { tb_set_random_state(device_code(device), as_raw(state)) })
}
