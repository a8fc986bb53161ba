//! Data-parallel ranks: all-reduce through Gloo and NCCL (`native/distributed.cpp`).

use std::ffi::{CString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Result};
use tch::{Device, Tensor};
use transformer_bench::backend::{COLLECTIVE_TIMEOUT, EnvVars, Rank, rank_environments};
use transformer_bench::rendezvous::{self, FILE_VARIABLE};
use transformer_bench::suite::{BackendId, Framework};

use crate::extension::{self, RawTensor, as_raw, as_raw_list, check_status};

unsafe extern "C" {
    fn tb_init_process_group(
        rank: c_int,
        size: c_int,
        address: *const c_char,
        port: c_int,
        agent_store: bool,
        seconds: c_int,
    ) -> c_int;
    fn tb_init_nccl(rank: c_int) -> c_int;
    fn tb_all_reduce_floats(values: *mut f32, count: i64) -> c_int;
    fn tb_all_reduce(tensor: RawTensor, times: u64) -> c_int;
    fn tb_all_reduce_mean(tensors: *const RawTensor, count: usize) -> c_int;
    fn tb_buckets_new(
        parameters: *const RawTensor,
        bucket_of: *const usize,
        count: usize,
        copied: bool,
        no_sync: bool,
        out: *mut *mut c_void,
    ) -> c_int;
    fn tb_buckets_free(buckets: *mut c_void);
    fn tb_buckets_start(buckets: *mut c_void, paused: bool, sums: *const RawTensor, count: usize) -> c_int;
    fn tb_buckets_fill(buckets: *mut c_void, gradients: *const RawTensor, count: usize) -> c_int;
    fn tb_buckets_wait(buckets: *mut c_void, means: *mut RawTensor) -> c_int;
}

/// Returns the name of the backend that all-reduces gradients.
pub fn comm_backend(id: BackendId) -> &'static str {
    match id {
        BackendId::TorchMps => "Gloo through the CPU",
        BackendId::TorchCuda => "NCCL",
        _ => "Gloo",
    }
}

/// Returns the environment of each local rank: the variables of `torchrun`, with a file instead of an address.
pub fn rendezvous_env(id: BackendId, ranks: usize, folder: &Path) -> Vec<EnvVars> {
    rank_environments(id, ranks, |rank| {
        vec![
            ("RANK", rank.to_string()),
            ("LOCAL_RANK", rank.to_string()),
            ("WORLD_SIZE", ranks.to_string()),
            (FILE_VARIABLE, folder.join("store").to_string_lossy().into_owned()),
        ]
    })
}

/// Outcome of an initialization that runs once per process.
type Initialized = OnceLock<Result<(), String>>;

fn init_once(state: &'static Initialized, init: impl FnOnce() -> Result<()>) -> Result<()> {
    let outcome = state.get_or_init(|| init().map_err(|error| format!("{error:#}")));
    outcome.clone().map_err(anyhow::Error::msg)
}

fn own_rank() -> Result<Rank> {
    Rank::from_environment(Framework::Torch)?.context("this process is not a rank")
}

/// Connects this process with the other ranks, unless it is connected.
///
/// # Errors
/// Returns an error if this process is not a rank, or if another rank does not answer.
fn init_process_group() -> Result<()> {
    static STATE: Initialized = OnceLock::new();
    init_once(&STATE, || {
        let rank = own_rank()?;
        let (address, port) = match std::env::var_os(FILE_VARIABLE) {
            Some(file) => (CString::new(file.as_bytes())?, 0),
            None => {
                let (host, port) = rendezvous::master()?;
                if rank.index > 0 {
                    rendezvous::wait_for_master(&host, port, COLLECTIVE_TIMEOUT)?;
                }
                (CString::new(host)?, c_int::from(port))
            }
        };
        let agent_store = std::env::var("TORCHELASTIC_USE_AGENT_STORE").is_ok_and(|v| v == "True");
        let (index, size) = (rank.index as c_int, rank.count as c_int);
        let seconds = COLLECTIVE_TIMEOUT.as_secs() as c_int;
        // SAFETY: the string outlives the call.
        check_status(unsafe {
            tb_init_process_group(index, size, address.as_ptr(), port, agent_store, seconds)
        })
    })
}

/// Connects the GPUs of the ranks too if `device` is a GPU of NVIDIA. All ranks must call it at the same time.
fn init_process_group_on(device: Device) -> Result<()> {
    static STATE: Initialized = OnceLock::new();
    init_process_group()?;
    if !matches!(device, Device::Cuda(_)) {
        return Ok(());
    }
    // SAFETY: no pointers.
    init_once(&STATE, || check_status(unsafe { tb_init_nccl(own_rank()?.index as c_int) }))
}

/// Sums `values` over all ranks.
pub fn all_reduce_sum(values: &[f32]) -> Result<Vec<f32>> {
    init_process_group()?;
    let mut all = values.to_vec();
    // SAFETY: the pointer and the length describe `all`, which outlives the call.
    check_status(unsafe { tb_all_reduce_floats(all.as_mut_ptr(), all.len() as i64) })?;
    Ok(all)
}

/// Sums a tensor over all ranks, in place, `times` times in a row.
pub fn all_reduce(tensor: &Tensor, times: u64) -> Result<()> {
    // SAFETY: the tensor outlives the call.
    check_status(unsafe { tb_all_reduce(as_raw(tensor), times) })
}

/// Maximum sizes of gradient buckets in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BucketSizes {
    first: i64,
    /// Maximum of the buckets after the first.
    others: i64,
    /// Maximum of the last bucket, whose all-reduce cannot overlap with the backward pass.
    last: i64,
    /// True if the gradients of a bucket are copied into one buffer. NCCL also takes separate tensors. This saves
    /// the copy, and makes the all-reduce slower, which costs no time if it overlaps with compute.
    copied: bool,
}

impl BucketSizes {
    /// The sizes of DDP (`torch/csrc/distributed/c10d/reducer.hpp`). The first bucket is small, so that the first
    /// all-reduce starts early.
    pub const DDP: Self = Self { first: 1 << 20, others: 25 << 20, last: 0, copied: true };
    /// One bucket, for gradients that are all ready at the same time.
    pub const SINGLE: Self = Self { first: i64::MAX, others: i64::MAX, last: 0, copied: true };

    /// Returns the sizes for a step in a CUDA graph, in which a launch costs almost no time.
    ///
    /// On two H100s with the 18 MiB of `indicator`, they had the least exposed communication: 4.9 % of the step,
    /// compared with 7.8 % with copies and 6.0 % with DDP's sizes. The other candidates were halves and eighths of
    /// the gradients, with a last bucket of an eighth or a 32nd.
    pub fn for_graph(parameters: &[Tensor]) -> Self {
        let all: i64 = parameters.iter().map(bytes).sum();
        Self { first: (1 << 20).min(all / 4), others: all / 4, last: all / 16, copied: false }
    }

    /// Returns the bucket of each parameter. A backward pass computes the gradients of the last parameters first.
    fn buckets(&self, bytes: &[i64]) -> Vec<usize> {
        let ends = bytes.iter().scan(0, |end, own| {
            *end += own;
            Some(*end)
        });
        let in_last = ends.take_while(|end| *end <= self.last).count();
        let mut all = vec![0; bytes.len()];
        let (mut bucket, mut size) = (0, 0);
        for (i, own) in bytes.iter().enumerate().rev() {
            let most = if bucket == 0 { self.first } else { self.others };
            let full = i >= in_last && size + own > most;
            if size > 0 && (full || i + 1 == in_last) {
                (bucket, size) = (bucket + 1, 0);
            }
            size += own;
            all[i] = bucket;
        }
        all
    }
}

fn bytes(tensor: &Tensor) -> i64 {
    tensor.numel() as i64 * tensor.kind().elt_size_in_bytes() as i64
}

/// The all-reduce of gradients, during or after the backward pass.
pub enum GradientSync {
    /// No all-reduce: for a single device, or for `no_sync` steps that measure exposed communication.
    Disabled,
    /// One all-reduce per gradient, after the backward pass.
    PerGradient,
    /// All-reduces of buckets, which overlap with the backward pass.
    Buckets(Buckets),
}

/// Buckets of gradients (`tb_buckets`). Autograd hooks of the parameters fill them.
pub struct Buckets(*mut c_void);

impl Buckets {
    fn new(parameters: &[Tensor], sizes: BucketSizes, no_sync: bool) -> Result<Self> {
        let bytes: Vec<i64> = parameters.iter().map(bytes).collect();
        let (tensors, bucket_of) = (as_raw_list(parameters), sizes.buckets(&bytes));
        let (count, copied, mut handle) = (bucket_of.len(), sizes.copied, std::ptr::null_mut());
        // SAFETY: two lists of `count` elements that outlive the call. It writes a pointer, which the value owns.
        check_status(unsafe {
            tb_buckets_new(tensors.as_ptr(), bucket_of.as_ptr(), count, copied, no_sync, &mut handle)
        })?;
        Ok(Self(handle))
    }
}

impl Drop for Buckets {
    fn drop(&mut self) {
        // SAFETY: the value owns the pointer and frees it once.
        unsafe { tb_buckets_free(self.0) };
    }
}

impl GradientSync {
    /// Connects the ranks. With `sizes`, autograd hooks of `parameters` fill buckets during the backward pass.
    pub fn new(
        device: Device,
        parameters: &[Tensor],
        sizes: Option<BucketSizes>,
        no_sync: bool,
    ) -> Result<Self> {
        init_process_group_on(device)?;
        Ok(match sizes {
            Some(sizes) => Self::Buckets(Buckets::new(parameters, sizes, no_sync)?),
            None if no_sync => Self::Disabled,
            None => Self::PerGradient,
        })
    }

    /// Prepares the hooks for the backward pass of a micro-batch. The last one all-reduces its gradients plus `sums`, those
    /// of the earlier ones. The others communicate nothing.
    pub fn start_backward(&self, sums: &[Tensor], is_last: bool) -> Result<()> {
        let Self::Buckets(buckets) = self else { return Ok(()) };
        let raw = as_raw_list(sums);
        // SAFETY: the handle is live, and the list has a live tensor per parameter or is empty.
        check_status(unsafe { tb_buckets_start(buckets.0, !is_last, raw.as_ptr(), raw.len()) })
    }

    /// Returns true if the hooks of the last micro-batch add the sums of the earlier ones.
    pub fn adds_sums(&self) -> bool {
        matches!(self, Self::Buckets(_))
    }

    /// Returns the means over all ranks of gradients that were computed without autograd hooks.
    pub fn all_reduce(&self, gradients: Vec<Tensor>) -> Result<Vec<Tensor>> {
        if let Self::Buckets(buckets) = self {
            let raw = as_raw_list(&gradients);
            // SAFETY: the handle is live, and the list has one live tensor per parameter.
            check_status(unsafe { tb_buckets_fill(buckets.0, raw.as_ptr(), raw.len()) })?;
        }
        self.finish_backward(gradients)
    }

    /// Returns the means over all ranks of the gradients of a backward pass, whose hooks have filled the buckets.
    pub fn finish_backward(&self, gradients: Vec<Tensor>) -> Result<Vec<Tensor>> {
        match self {
            Self::Disabled => Ok(gradients),
            Self::PerGradient => {
                let raw = as_raw_list(&gradients);
                // SAFETY: a list of live tensors.
                check_status(unsafe { tb_all_reduce_mean(raw.as_ptr(), raw.len()) })?;
                Ok(gradients)
            }
            Self::Buckets(buckets) => extension::returned(gradients.len(), |out| {
                // SAFETY: the handle is live, and `out` has a slot per parameter.
                unsafe { tb_buckets_wait(buckets.0, out) }
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: i64 = 1 << 20;

    #[test]
    fn buckets_are_filled_from_the_last_parameter_on() {
        let bytes = [9, 30, 12, 12, 3, 0, 1].map(|mib| mib * MIB);
        // A tensor larger than a bucket gets a bucket of its own.
        assert_eq!(BucketSizes::DDP.buckets(&bytes), [4, 3, 2, 1, 1, 0, 0]);
        assert_eq!(BucketSizes::SINGLE.buckets(&bytes), [0; 7]);
        let sizes = BucketSizes { first: MIB, others: 40 * MIB, last: 10 * MIB, copied: false };
        // The first parameter gets the last bucket, although the previous one has room.
        assert_eq!(sizes.buckets(&bytes), [3, 2, 1, 1, 1, 0, 0]);
        let sizes = BucketSizes { last: 8 * MIB, ..sizes };
        assert_eq!(sizes.buckets(&bytes), [2, 2, 1, 1, 1, 0, 0]);
        assert!(sizes.buckets(&[]).is_empty());
    }

    #[test]
    fn a_step_in_a_graph_has_several_buckets_and_a_small_last_one() {
        let parameters: Vec<Tensor> =
            (0..32).map(|_| Tensor::zeros([1 << 18], (tch::Kind::Float, Device::Cpu))).collect();
        let buckets = BucketSizes::for_graph(&parameters).buckets(&[MIB; 32]);
        let size = |bucket: usize| buckets.iter().filter(|b| **b == bucket).count();
        assert_eq!((0..6).map(size).collect::<Vec<_>>(), [1, 8, 8, 8, 5, 2]);
    }

    #[test]
    fn hooks_of_the_last_micro_batch_add_the_sums_of_the_others() {
        let parameters = [Tensor::ones([3], (tch::Kind::Float, Device::Cpu)).set_requires_grad(true)];
        let sync = GradientSync::Buckets(Buckets::new(&parameters, BucketSizes::DDP, true).unwrap());
        let gradients = |factor: f64| {
            let loss = (&parameters[0] * factor).sum(tch::Kind::Float);
            crate::autograd::grad(&loss, None, &parameters).unwrap()
        };
        for _ in 0..2 {
            sync.start_backward(&[], false).unwrap();
            let sums = gradients(2.0);
            sync.start_backward(&sums, true).unwrap();
            let means = sync.finish_backward(gradients(3.0)).unwrap();
            assert_eq!(means[0].double_value(&[1]), 5.0);
        }
    }

    #[test]
    fn gradients_without_all_reduce_are_unchanged() {
        for sizes in [BucketSizes::DDP, BucketSizes::SINGLE] {
            let parameters: Vec<Tensor> = [3, 5, 7]
                .map(|n| Tensor::ones([n, 2], (tch::Kind::Float, Device::Cpu)).set_requires_grad(true))
                .into();
            let sync = GradientSync::Buckets(Buckets::new(&parameters, sizes, true).unwrap());
            for step in 1..3 {
                let term = |(i, p): (usize, &Tensor)| p.sum(tch::Kind::Float) * (i as i64 + step);
                let loss: Tensor = parameters.iter().enumerate().map(term).sum();
                let gradients = crate::autograd::grad(&loss, None, &parameters).unwrap();
                let means = sync.finish_backward(gradients).unwrap();
                for (i, (mean, parameter)) in means.iter().zip(&parameters).enumerate() {
                    assert_eq!(mean.size(), parameter.size());
                    assert_eq!(mean.min().double_value(&[]), (i as i64 + step) as f64);
                    assert_eq!(mean.max().double_value(&[]), (i as i64 + step) as f64);
                }
            }
        }
    }
}
