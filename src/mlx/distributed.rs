//! Data-parallel ranks, through functions of mlx-c that mlx-rs does not wrap (`mlx/c/distributed.h`).

use std::ffi::CString;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use mlx_rs::error::Exception;
use mlx_rs::ops::concatenate_flat;
use mlx_rs::{Array, random};
use transformer_bench::backend::{EnvVars, Rank, rank_environments};
use transformer_bench::files::cache_folder;
use transformer_bench::suite::{BackendId, Framework};

/// Minimum bytes of an all-reduce of several gradients, as in MLX's `nn.average_gradients`.
const ALL_REDUCE_SIZE: usize = 32 << 20;

/// Returns MLX's name of the distributed backend, from the variables that its launcher sets
/// (<https://ml-explore.github.io/mlx/build/html/usage/distributed.html>).
fn backend_name() -> &'static str {
    let set = |name: &str| std::env::var_os(name).is_some();
    if set("NCCL_HOST_IP") {
        "nccl"
    } else if set("MLX_IBV_DEVICES") {
        "jaccl"
    } else {
        "ring"
    }
}

/// Returns the name of the backend that all-reduces gradients.
pub fn comm_backend(id: BackendId) -> &'static str {
    match backend_name() {
        "jaccl" => "MLX's JACCL",
        _ if id == BackendId::MlxCuda => "MLX's NCCL",
        _ => "MLX's ring",
    }
}

/// Returns the rendezvous environment of each local rank.
///
/// # Errors
/// Returns an error if no port is free, or if the folder cannot be written.
pub fn rendezvous_env(id: BackendId, ranks: usize, folder: &Path) -> Result<Vec<EnvVars>> {
    // The listeners reserve the ports until the end of this function. If another program takes one afterwards, the
    // ranks fail and are started again.
    let listeners: Vec<TcpListener> =
        (0..ranks).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<std::io::Result<_>>()?;
    let ports: Vec<u16> =
        listeners.iter().map(|port| Ok(port.local_addr()?.port())).collect::<std::io::Result<_>>()?;
    let hosts: Vec<[String; 1]> = ports.iter().map(|port| [format!("127.0.0.1:{port}")]).collect();
    let file = folder.join("hosts.json");
    std::fs::write(&file, serde_json::to_string(&hosts)?)
        .with_context(|| format!("{} could not be written", file.display()))?;
    let cache = cache_folder()?;
    Ok(rank_environments(id, ranks, |rank| {
        let mut all = vec![("MLX_RANK", rank.to_string())];
        if id == BackendId::MlxCpu {
            // MLX compiles CPU kernels into this folder. If ranks shared it, one could load a kernel that another is
            // writing ("file too short"). It belongs to the user, because MLX loads whatever libraries it has.
            let kernels = cache.join(format!("mlx-kernels-rank-{rank}"));
            let _ = std::fs::create_dir_all(&kernels);
            all.push(("TMPDIR", kernels.to_string_lossy().into_owned()));
        }
        if id == BackendId::MlxCuda {
            all.extend([
                ("MLX_WORLD_SIZE", ranks.to_string()),
                ("NCCL_HOST_IP", Ipv4Addr::LOCALHOST.to_string()),
                ("NCCL_PORT", ports[0].to_string()),
            ]);
        } else {
            all.push(("MLX_HOSTFILE", file.to_string_lossy().into_owned()));
        }
        all
    }))
}

/// The group of ranks that this process belongs to, and the streams of its all-reduces.
struct Group {
    group: mlx_sys::mlx_distributed_group,
    size: usize,
    /// The default stream of the GPU for NCCL, and of the CPU for the other backends.
    stream: mlx_sys::mlx_stream,
    /// A second stream on the same device, for all-reduces that overlap with the backward pass.
    overlap_stream: mlx_sys::mlx_stream,
}

// SAFETY: it is created once and only read, and MLX's groups and streams are handles.
unsafe impl Send for Group {}
// SAFETY: as above.
unsafe impl Sync for Group {}

/// Returns the group, which the first call initializes.
fn group() -> Result<&'static Group, Exception> {
    static GROUP: OnceLock<Result<Group, String>> = OnceLock::new();
    let group = GROUP.get_or_init(|| init().map_err(|error| format!("{error:#}")));
    group.as_ref().map_err(|reason| Exception::custom(reason.clone()))
}

/// Connects this process with the other ranks.
fn init() -> Result<Group> {
    let rank = Rank::from_environment(Framework::Mlx)?.context("this process is not a rank")?;
    let backend = backend_name();
    let name = CString::new(backend)?;
    // The first call through mlx-rs installs its error handler.
    random::key(0)?;
    // SAFETY: new handles, and the string outlives the call.
    unsafe {
        let mut group = mlx_sys::mlx_distributed_group_new();
        // MLX caches the first group of a process, so `strict` must exclude a group without the other ranks.
        let strict = true;
        let status = mlx_sys::mlx_distributed_init(&mut group, strict, name.as_ptr());
        ensure!(status == 0, "MLX's {backend} did not connect rank {} with the others", rank.index);
        let size = mlx_sys::mlx_distributed_group_size(group) as usize;
        ensure!(size == rank.count, "MLX's {backend} has {size} ranks, but {} were started", rank.count);
        let (kind, stream) = if backend == "nccl" {
            (mlx_sys::mlx_device_type__MLX_GPU, mlx_sys::mlx_default_gpu_stream_new())
        } else {
            (mlx_sys::mlx_device_type__MLX_CPU, mlx_sys::mlx_default_cpu_stream_new())
        };
        let device = mlx_sys::mlx_device_new_type(kind, 0);
        let overlap_stream = mlx_sys::mlx_stream_new_device(device);
        mlx_sys::mlx_device_free(device);
        Ok(Group { group, size, stream, overlap_stream })
    }
}

/// Returns the sum of an array over all ranks, on the second stream if it overlaps with the backward pass.
fn all_sum(array: &Array, overlap: bool) -> Result<Array, Exception> {
    let group = group()?;
    let stream = if overlap { group.overlap_stream } else { group.stream };
    // SAFETY: live handles. The returned value owns the new array.
    unsafe {
        let mut sum = mlx_sys::mlx_array_new();
        let status = mlx_sys::mlx_distributed_all_sum(&mut sum, array.as_ptr(), group.group, stream);
        let sum = Array::from_ptr(sum);
        if status == 0 { Ok(sum) } else { Err(Exception::custom("MLX's all_sum failed")) }
    }
}

/// Returns the sum of an array over all ranks, as a part of the step.
pub fn all_reduce(array: &Array) -> Result<Array, Exception> {
    all_sum(array, false)
}

/// Sums `values` over all ranks.
pub fn all_reduce_sum(values: &[f32]) -> Result<Vec<f32>> {
    let sum = all_sum(&Array::from_slice(values, &[values.len() as i32]), false)?;
    sum.eval()?;
    Ok(sum.try_as_slice::<f32>()?.to_vec())
}

/// Returns the means of gradients over all ranks. With `overlap` they are all-reduced in groups on a second stream, and
/// otherwise one by one.
pub fn average_gradients(gradients: &[Array], overlap: bool) -> Result<Vec<Array>, Exception> {
    let mean = |array: &Array| {
        let sum = all_sum(array, overlap)?;
        sum.multiply(crate::network::scalar(1.0 / group()?.size as f64, sum.dtype()))
    };
    if !overlap {
        return gradients.iter().map(mean).collect();
    }
    let mut all = Vec::new();
    let mut rest = gradients;
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = rest.iter().take_while(|gradient| {
            let before = bytes;
            bytes += gradient.nbytes();
            before < ALL_REDUCE_SIZE
        });
        let (group, others) = rest.split_at(fits.count());
        rest = others;
        let ends = group.iter().scan(0, |end, gradient| {
            *end += gradient.size() as i32;
            Some(*end)
        });
        let ends: Vec<i32> = ends.take(group.len() - 1).collect();
        let means = mean(&concatenate_flat(group)?)?.split_at_indices(&ends, 0)?;
        for (mean, gradient) in means.iter().zip(group) {
            all.push(mean.reshape(gradient.shape())?);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_ranks_have_different_ports() {
        let folder =
            std::env::temp_dir().join(format!("transformer-bench-rendezvous-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let all = rendezvous_env(BackendId::MlxCpu, 3, &folder).unwrap();
        let hosts: Vec<[String; 1]> =
            serde_json::from_str(&std::fs::read_to_string(folder.join("hosts.json")).unwrap()).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(hosts.len() == 3 && hosts[0] != hosts[1] && hosts[1] != hosts[2], "{hosts:?}");
        assert_eq!(all[2][0], ("MLX_RANK".to_owned(), "2".to_owned()));
        let cuda = rendezvous_env(BackendId::MlxCuda, 2, &std::env::temp_dir()).unwrap();
        assert!(cuda[1].contains(&("CUDA_VISIBLE_DEVICES".to_owned(), "1".to_owned())), "{cuda:?}");
    }
}
