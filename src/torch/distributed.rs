//! This process as one of several: exchange by c10d's Gloo and by NCCL (`native/ranks.cpp`).

use std::ffi::{CString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Result};
use tch::{Device, Tensor};
use transformer_bench::backend::{COLLECTIVE_TIMEOUT, Environment, Rank, visible_gpu};
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
    fn tb_ranks_all_reduce(buffer: Raw, times: u64) -> c_int;
    fn tb_ranks_mean(tensors: *const Raw, count: usize) -> c_int;
    fn tb_buckets_new(
        parameters: *const Raw,
        bucket_of: *const usize,
        count: usize,
        copied: bool,
        silent: bool,
        out: *mut *mut c_void,
    ) -> c_int;
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
    Rank::from_environment(Framework::Torch)?.context("this process is no rank")
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
    let (index, of, seconds) =
        (rank.index as c_int, rank.count as c_int, COLLECTIVE_TIMEOUT.as_secs() as c_int);
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

/// Adds up a buffer over all ranks, in place, so many times in a row.
pub fn all_reduce(buffer: &Tensor, times: u64) -> Result<()> {
    // SAFETY: a live tensor.
    checked(unsafe { tb_ranks_all_reduce(buffer.as_ptr().cast_mut().cast(), times) })
}

/// How gradients are put together for an exchange. Sizes are the most bytes of a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    first: i64,
    /// Of each behind the first.
    others: i64,
    /// Of the last, whose exchange no backward pass hides.
    last: i64,
    /// Whether a bucket is copied into one piece. On GPUs NCCL takes many as well, which costs no
    /// copy and makes the exchange slower: better where that is hidden.
    copied: bool,
}

impl Sizes {
    /// DDP's (`torch/csrc/distributed/c10d/reducer.hpp`): the first is small, so that the exchange
    /// begins early.
    pub const DDP: Self = Self { first: 1 << 20, others: 25 << 20, last: 0, copied: true };
    /// Everything at once, where all gradients come together.
    pub const WHOLE: Self = Self { first: i64::MAX, others: i64::MAX, last: 0, copied: true };

    /// For a recorded step, in which a launch costs next to nothing. Of what was tried on two H100s
    /// with the indicator's 18 MiB (a half, a quarter and an eighth; the last an eighth, a sixteenth
    /// and a 32nd) this lost the least: 4.9 % of the step, copied 7.8 %, DDP's sizes 6.0 %.
    pub fn recorded(parameters: &[Tensor]) -> Self {
        let all: i64 = parameters.iter().map(bytes).sum();
        Self { first: (1 << 20).min(all / 4), others: all / 4, last: all / 16, copied: false }
    }

    /// The bucket of each parameter. A backward pass finds the last ones' gradients first.
    fn buckets(&self, bytes: &[i64]) -> Vec<usize> {
        let ends = bytes.iter().scan(0, |end, own| {
            *end += own;
            Some(*end)
        });
        let in_last = ends.take_while(|end| *end <= self.last).count();
        let mut all = vec![0; bytes.len()];
        let (mut bucket, mut held) = (0, 0);
        for (i, own) in bytes.iter().enumerate().rev() {
            let most = if bucket == 0 { self.first } else { self.others };
            let full = i >= in_last && held + own > most;
            if held > 0 && (full || i + 1 == in_last) {
                (bucket, held) = (bucket + 1, 0);
            }
            held += own;
            all[i] = bucket;
        }
        all
    }
}

fn bytes(tensor: &Tensor) -> i64 {
    tensor.numel() as i64 * tensor.kind().elt_size_in_bytes() as i64
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

impl Buckets {
    fn new(parameters: &[Tensor], sizes: Sizes, silent: bool) -> Result<Self> {
        let bytes: Vec<i64> = parameters.iter().map(bytes).collect();
        let (all, bucket_of) = (raw(parameters), sizes.buckets(&bytes));
        let mut handle = std::ptr::null_mut();
        // SAFETY: as many live tensors as numbers; writes one pointer, owned by the value made here.
        checked(unsafe {
            let count = bucket_of.len();
            tb_buckets_new(all.as_ptr(), bucket_of.as_ptr(), count, sizes.copied, silent, &mut handle)
        })?;
        Ok(Self(handle))
    }
}

impl Drop for Buckets {
    fn drop(&mut self) {
        // SAFETY: owned, freed once.
        unsafe { tb_buckets_free(self.0) };
    }
}

impl Exchange {
    /// Among ranks: in buckets, which hooks of `parameters` fill, or each gradient alone.
    pub fn new(device: Device, parameters: &[Tensor], sizes: Option<Sizes>, silent: bool) -> Result<Self> {
        join_on(device)?;
        Ok(match sizes {
            Some(sizes) => Self::Buckets(Buckets::new(parameters, sizes, silent)?),
            None if silent => Self::None,
            None => Self::Each,
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: i64 = 1 << 20;

    #[test]
    fn buckets_fill_from_the_last_parameter_on() {
        let bytes = [9, 30, 12, 12, 3, 0, 1].map(|mib| mib * MIB);
        // A tensor larger than a bucket has one of its own.
        assert_eq!(Sizes::DDP.buckets(&bytes), [4, 3, 2, 1, 1, 0, 0]);
        assert_eq!(Sizes::WHOLE.buckets(&bytes), [0; 7]);
        let sizes = Sizes { first: MIB, others: 40 * MIB, last: 10 * MIB, copied: false };
        // The first parameter is kept back, although the bucket before has room.
        assert_eq!(sizes.buckets(&bytes), [3, 2, 1, 1, 1, 0, 0]);
        let sizes = Sizes { last: 8 * MIB, ..sizes };
        assert_eq!(sizes.buckets(&bytes), [2, 2, 1, 1, 1, 0, 0]);
        assert!(sizes.buckets(&[]).is_empty());
    }

    #[test]
    fn a_recorded_step_has_some_buckets_and_a_small_last_one() {
        let parameters: Vec<Tensor> =
            (0..32).map(|_| Tensor::zeros([1 << 18], (tch::Kind::Float, Device::Cpu))).collect();
        let bytes = [MIB; 32];
        let buckets = Sizes::recorded(&parameters).buckets(&bytes);
        let of = |bucket: usize| buckets.iter().filter(|b| **b == bucket).count();
        assert_eq!((0..6).map(of).collect::<Vec<_>>(), [1, 8, 8, 8, 5, 2]);
    }

    #[test]
    fn what_is_not_exchanged_comes_back_as_it_was() {
        for sizes in [Sizes::DDP, Sizes::WHOLE] {
            let on = (tch::Kind::Float, Device::Cpu);
            let parameters: Vec<Tensor> =
                [3, 5, 7].map(|n| Tensor::ones([n, 2], on).set_requires_grad(true)).into();
            let exchange = Exchange::Buckets(Buckets::new(&parameters, sizes, true).unwrap());
            for step in 1..3 {
                let sum = |(i, p): (usize, &Tensor)| p.sum(tch::Kind::Float) * (i as i64 + step);
                let loss: Tensor = parameters.iter().enumerate().map(sum).sum();
                let own = extension::gradients(&loss, None, &parameters).unwrap();
                let means = exchange.finish(own).unwrap();
                for (i, (mean, parameter)) in means.iter().zip(&parameters).enumerate() {
                    assert_eq!(mean.size(), parameter.size());
                    assert_eq!(mean.min().double_value(&[]), (i as i64 + step) as f64);
                    assert_eq!(mean.max().double_value(&[]), (i as i64 + step) as f64);
                }
            }
        }
    }
}
