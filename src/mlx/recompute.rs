//! Functions that MLX computes again in the backward pass, as `mx.checkpoint` does in Python.

use std::cell::RefCell;
use std::ffi::{c_int, c_void};

use mlx_rs::Array;
use mlx_rs::error::{Exception, Result};

/// A function from arrays to arrays. The graph of its result owns it.
type Body = Box<dyn Fn(&[Array]) -> Result<Vec<Array>>>;

thread_local! {
    /// The error of the last body that failed. mlx-c passes on only that there was one.
    static LAST_ERROR: RefCell<Option<Exception>> = const { RefCell::new(None) };
}

/// Runs `body`, and computes it again in the backward pass instead of storing its intermediate results. Gradients are with
/// respect to `inputs` only: arrays that `body` captures are constants.
///
/// # Errors
/// Returns the error of `body`, or an error if MLX fails.
pub fn checkpoint(
    body: impl Fn(&[Array]) -> Result<Vec<Array>> + 'static,
    inputs: &[Array],
) -> Result<Vec<Array>> {
    let payload: *mut Body = Box::into_raw(Box::new(Box::new(body)));
    // SAFETY: the first closure owns the payload, and the second one shares it. All handles are freed once.
    unsafe {
        let function = mlx_sys::mlx_closure_new_func_payload(Some(call), payload.cast(), Some(free));
        let mut checkpointed = mlx_sys::mlx_closure_new();
        let arguments = vector(inputs);
        let mut results = mlx_sys::mlx_vector_array_new();
        let mut status = mlx_sys::mlx_checkpoint(&mut checkpointed, function);
        if status == 0 {
            status = mlx_sys::mlx_closure_apply(&mut results, checkpointed, arguments);
        }
        let out = if status == 0 { arrays(results) } else { Err(last_error()) };
        mlx_sys::mlx_vector_array_free(results);
        mlx_sys::mlx_vector_array_free(arguments);
        mlx_sys::mlx_closure_free(checkpointed);
        mlx_sys::mlx_closure_free(function);
        out
    }
}

fn last_error() -> Exception {
    let error = LAST_ERROR.with_borrow_mut(Option::take);
    error.unwrap_or_else(|| Exception::custom("MLX could not run a function that it computes twice"))
}

/// Returns a list of the same arrays in MLX's type.
fn vector(arrays: &[Array]) -> mlx_sys::mlx_vector_array {
    let handles: Vec<mlx_sys::mlx_array> = arrays.iter().map(Array::as_ptr).collect();
    // SAFETY: the handles are live, and the list has its own references.
    unsafe { mlx_sys::mlx_vector_array_new_data(handles.as_ptr(), handles.len()) }
}

fn arrays(vector: mlx_sys::mlx_vector_array) -> Result<Vec<Array>> {
    // SAFETY: a live list. Each value owns the new handle.
    let get = |index: usize| unsafe {
        let mut array = mlx_sys::mlx_array_new();
        let status = mlx_sys::mlx_vector_array_get(&mut array, vector, index);
        let array = Array::from_ptr(array);
        if status == 0 { Ok(array) } else { Err(Exception::custom("MLX returned a damaged list")) }
    };
    // SAFETY: a live list.
    (0..unsafe { mlx_sys::mlx_vector_array_size(vector) }).map(get).collect()
}

/// Calls the body of a payload, for MLX.
extern "C" fn call(
    results: *mut mlx_sys::mlx_vector_array,
    arguments: mlx_sys::mlx_vector_array,
    payload: *mut c_void,
) -> c_int {
    // SAFETY: MLX passes the payload of its closure.
    let body = unsafe { &*payload.cast::<Body>() };
    let run = || body(&arrays(arguments)?);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
    let error = match result {
        Ok(Ok(out)) => {
            let handles: Vec<mlx_sys::mlx_array> = out.iter().map(Array::as_ptr).collect();
            // SAFETY: MLX passes an empty list. It takes its own references.
            return unsafe { mlx_sys::mlx_vector_array_set_data(results, handles.as_ptr(), handles.len()) };
        }
        Ok(Err(error)) => error,
        Err(_) => Exception::custom("a function that MLX computes twice panicked"),
    };
    LAST_ERROR.set(Some(error));
    1
}

/// Frees a payload, for MLX.
extern "C" fn free(payload: *mut c_void) {
    // SAFETY: MLX frees the payload of a closure once.
    drop(unsafe { Box::from_raw(payload.cast::<Body>()) });
}

#[cfg(test)]
mod tests {
    use mlx_rs::transforms::value_and_grad_with_argnums;

    use super::*;

    #[test]
    fn a_recomputed_function_has_the_same_gradient_and_runs_twice() {
        mlx_rs::Device::set_default(&mlx_rs::Device::new(mlx_rs::DeviceType::Cpu, 0));
        let runs = std::rc::Rc::new(std::cell::Cell::new(0));
        let counter = runs.clone();
        let cube = move |inputs: &[Array]| {
            counter.set(counter.get() + 1);
            Ok(vec![inputs[0].square()?.multiply(&inputs[0])?])
        };
        let loss = |inputs: &[Array]| -> Result<Vec<Array>> {
            Ok(vec![checkpoint(cube.clone(), inputs)?[0].sum(false)?])
        };
        let (value, gradients) = value_and_grad_with_argnums(loss, &[0])(&[Array::from_f32(2.0)]).unwrap();
        assert_eq!((value[0].item_exact::<f32>(), gradients[0].item_exact::<f32>()), (8.0, 12.0));
        assert_eq!(runs.get(), 2);
    }

    #[test]
    fn the_error_of_a_recomputed_function_is_returned() {
        mlx_rs::Device::set_default(&mlx_rs::Device::new(mlx_rs::DeviceType::Cpu, 0));
        let fails = |_: &[Array]| Err(Exception::custom("no such thing"));
        let error = checkpoint(fails, &[Array::from_f32(1.0)]).unwrap_err();
        assert!(error.to_string().contains("no such thing"), "{error}");
    }
}
