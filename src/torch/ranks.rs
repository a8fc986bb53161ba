//! This process as one of several: exchange by c10d's Gloo and by NCCL (`native/ranks.cpp`).

use std::ffi::{CString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Result};
use tch::{Device, Tensor};
use transformer_bench::backend::{Environment, PATIENCE, Rank, visible_gpu};
use transformer_bench::suite::{BackendId, Framework};

use crate::extension::{self, Raw, checked, raw};

unsafe extern "C" {
    fn tb_ranks_join(
        rank: c_int,
        size: c_int,
        place: *const c_char,
        port: c_int,
        served: bool,
        seconds: c_int,
    ) -> c_int;
    fn tb_ranks_join_gpus(rank: c_int) -> c_int;
    fn tb_ranks_sum(values: *mut f32, count: i64) -> c_int;
    fn tb_ranks_all_reduce(buffer: Raw) -> c_int;
    fn tb_ranks_mean(tensors: *const Raw, count: usize) -> c_int;
    fn tb_buckets_new(parameters: *const Raw, count: usize, silent: bool, out: *mut *mut c_void) -> c_int;
    fn tb_buckets_free(buckets: *mut c_void);
    fn tb_buckets_fill(buckets: *mut c_void, gradients: *const Raw, count: usize) -> c_int;
    fn tb_buckets_finish(buckets: *mut c_void, gradients: *mut Raw) -> c_int;
}

/// A file through which the ranks of one machine meet, in the place of a host and a port.
const STORE: &str = "TRANSFORMER_BENCH_STORE";

/// The engine that exchanges a backend's gradients.
pub fn engine(id: BackendId) -> &'static str {
    match id {
        BackendId::TorchMps => "Gloo, by way of the CPU",
        BackendId::TorchCuda => "NCCL",
        _ => "Gloo",
    }
}

/// What each rank of this machine finds in its environment: `torchrun`'s variables, but for the place.
pub fn meeting(id: BackendId, ranks: usize, folder: &Path) -> Vec<Environment> {
    let own = |rank: usize| {
        let mut all = vec![
            ("RANK".to_owned(), rank.to_string()),
            ("LOCAL_RANK".to_owned(), rank.to_string()),
            ("WORLD_SIZE".to_owned(), ranks.to_string()),
            (STORE.to_owned(), folder.join("store").to_string_lossy().into_owned()),
        ];
        if id == BackendId::TorchCuda {
            all.push(("CUDA_VISIBLE_DEVICES".to_owned(), visible_gpu(rank)));
        }
        all
    };
    (0..ranks).map(own).collect()
}

/// What is done once, with how it went.
type Once = OnceLock<std::result::Result<(), String>>;

fn once(done: &'static Once, first: impl FnOnce() -> Result<()>) -> Result<()> {
    let outcome = done.get_or_init(|| first().map_err(|error| format!("{error:#}")));
    outcome.clone().map_err(anyhow::Error::msg)
}

fn own_rank() -> Result<Rank> {
    Rank::of_process(Framework::Torch)?.context("this process is no rank")
}

/// Meets the others, where that has not been.
///
/// # Errors
/// Where this process is no rank, or one of them does not come.
fn join() -> Result<()> {
    static JOINED: Once = Once::new();
    once(&JOINED, meet)
}

/// The same of their GPUs, where the device is one: all ranks at once.
fn join_on(device: Device) -> Result<()> {
    static JOINED: Once = Once::new();
    join()?;
    match device {
        // SAFETY: a number.
        Device::Cuda(_) => {
            once(&JOINED, || checked(unsafe { tb_ranks_join_gpus(own_rank()?.index as c_int) }))
        }
        _ => Ok(()),
    }
}

fn meet() -> Result<()> {
    let rank = own_rank()?;
    let variable = |name: &str| std::env::var(name).ok();
    let (place, port) = match std::env::var_os(STORE) {
        Some(file) => (CString::new(file.as_bytes())?, 0),
        None => {
            let host =
                variable("MASTER_ADDR").context("MASTER_ADDR is not set: start ranks with torchrun")?;
            let port =
                variable("MASTER_PORT").context("MASTER_PORT is not set: start ranks with torchrun")?;
            (CString::new(host)?, port.parse().with_context(|| format!("MASTER_PORT={port}"))?)
        }
    };
    let served = variable("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|v| v == "True");
    let (index, of, seconds) = (rank.index as c_int, rank.of as c_int, PATIENCE.as_secs() as c_int);
    // SAFETY: a string that outlives the call, and numbers.
    checked(unsafe { tb_ranks_join(index, of, place.as_ptr(), port, served, seconds) })
}

/// Adds up numbers over all ranks.
pub fn sum(values: &[f32]) -> Result<Vec<f32>> {
    join()?;
    let mut all = values.to_vec();
    // SAFETY: as many floats as told, which outlive the call.
    checked(unsafe { tb_ranks_sum(all.as_mut_ptr(), all.len() as i64) })?;
    Ok(all)
}

/// Adds up a buffer over all ranks, in place.
pub fn all_reduce(buffer: &Tensor) -> Result<()> {
    // SAFETY: a live tensor.
    checked(unsafe { tb_ranks_all_reduce(buffer.as_ptr().cast_mut().cast()) })
}

/// How ranks exchange gradients behind, or during, a backward pass.
pub enum Exchange {
    /// One device has nothing to exchange; and what an exchange costs shows where it is left out.
    None,
    /// One gradient after the other, once all are there.
    Each,
    Buckets(Buckets),
}

/// Gradients in buckets (`tb_buckets`), filled by hooks of the tensors that they are taken by.
pub struct Buckets(*mut c_void);

impl Drop for Buckets {
    fn drop(&mut self) {
        // SAFETY: owned, freed once.
        unsafe { tb_buckets_free(self.0) };
    }
}

impl Exchange {
    /// Among ranks: in `buckets`, which hooks of `parameters` fill, or each gradient alone.
    pub fn new(device: Device, parameters: &[Tensor], buckets: bool, silent: bool) -> Result<Self> {
        join_on(device)?;
        if !buckets {
            return Ok(if silent { Self::None } else { Self::Each });
        }
        let mut handle = std::ptr::null_mut();
        // SAFETY: live tensors; writes one pointer, owned by the value made here.
        checked(unsafe { tb_buckets_new(raw(parameters).as_ptr(), parameters.len(), silent, &mut handle) })?;
        Ok(Self::Buckets(Buckets(handle)))
    }

    /// The means of gradients that came without a backward pass whose hooks fill buckets.
    pub fn all_at_once(&self, gradients: Vec<Tensor>) -> Result<Vec<Tensor>> {
        if let Self::Buckets(buckets) = self {
            // SAFETY: a live handle and live tensors, as many as it has parameters.
            checked(unsafe { tb_buckets_fill(buckets.0, raw(&gradients).as_ptr(), gradients.len()) })?;
        }
        self.finish(gradients)
    }

    /// The means over all ranks of the gradients that a backward pass gave.
    pub fn finish(&self, gradients: Vec<Tensor>) -> Result<Vec<Tensor>> {
        match self {
            Self::None => Ok(gradients),
            Self::Each => {
                // SAFETY: live tensors.
                checked(unsafe { tb_ranks_mean(raw(&gradients).as_ptr(), gradients.len()) })?;
                Ok(gradients)
            }
            Self::Buckets(buckets) => {
                let mut out: Vec<Raw> = vec![std::ptr::null_mut(); gradients.len()];
                // SAFETY: a live handle; on success every slot holds an owned tensor.
                checked(unsafe { tb_buckets_finish(buckets.0, out.as_mut_ptr()) })?;
                Ok(extension::owned(out))
            }
        }
    }
}
