//! This process as one of several, through the parts of mlx-c that mlx-rs does not wrap
//! (`mlx/c/distributed.h`).

use std::ffi::CString;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use mlx_rs::error::Exception;
use mlx_rs::ops::concatenate_flat;
use mlx_rs::{Array, random};
use transformer_bench::backend::{Environment, Rank, visible_gpu};
use transformer_bench::suite::{BackendId, Framework};

/// Gradients are exchanged in groups of this size at least, as `nn.average_gradients` of MLX's
/// Python does.
const GROUP: usize = 32 << 20;

/// MLX's engines, by what their launcher sets
/// (<https://ml-explore.github.io/mlx/build/html/usage/distributed.html>).
fn launched() -> &'static str {
    let set = |name: &str| std::env::var_os(name).is_some();
    if set("NCCL_HOST_IP") {
        "nccl"
    } else if set("MLX_IBV_DEVICES") {
        "jaccl"
    } else {
        "ring"
    }
}

/// What exchanges the gradients of a backend's ranks.
pub fn engine(id: BackendId) -> &'static str {
    match launched() {
        "jaccl" => "MLX's JACCL",
        _ if id == BackendId::MlxCuda => "MLX's NCCL",
        _ => "MLX's ring",
    }
}

/// What each rank of this machine finds in its environment.
///
/// # Errors
/// Where this machine has no free port, or the folder no room.
pub fn meeting(id: BackendId, ranks: usize, folder: &Path) -> Result<Vec<Environment>> {
    // Free until they are closed; whoever takes one then makes the ranks try others.
    let free: Vec<TcpListener> =
        (0..ranks).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<std::io::Result<_>>()?;
    let ports: Vec<u16> =
        free.iter().map(|port| Ok(port.local_addr()?.port())).collect::<std::io::Result<_>>()?;
    let hosts: Vec<[String; 1]> = ports.iter().map(|port| [format!("127.0.0.1:{port}")]).collect();
    let file = folder.join("hosts.json");
    std::fs::write(&file, serde_json::to_string(&hosts)?)
        .with_context(|| format!("{} could not be written", file.display()))?;
    let own = |rank: usize| {
        let mut all = vec![("MLX_RANK", rank.to_string())];
        if id == BackendId::MlxCpu {
            // Where MLX compiles CPU kernels: two processes that write the same one at a time find half
            // of it ("file too short").
            let own = std::env::temp_dir().join(format!("transformer-bench-mlx-rank-{rank}"));
            let _ = std::fs::create_dir(&own);
            all.push(("TMPDIR", own.to_string_lossy().into_owned()));
        }
        if id == BackendId::MlxCuda {
            all.extend([
                ("MLX_WORLD_SIZE", ranks.to_string()),
                ("NCCL_HOST_IP", Ipv4Addr::LOCALHOST.to_string()),
                ("NCCL_PORT", ports[0].to_string()),
                ("CUDA_VISIBLE_DEVICES", visible_gpu(rank)),
            ]);
        } else {
            all.push(("MLX_HOSTFILE", file.to_string_lossy().into_owned()));
        }
        all.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    };
    Ok((0..ranks).map(own).collect())
}

/// The group that this process is of, and the streams of its exchanges.
struct Group {
    group: mlx_sys::mlx_distributed_group,
    size: usize,
    /// The device's own stream where the engine runs on it, else the CPU's.
    usual: mlx_sys::mlx_stream,
    /// Another, for what goes on beside the backward pass.
    beside: mlx_sys::mlx_stream,
}

// SAFETY: made once and only read; MLX's groups and streams are handles.
unsafe impl Send for Group {}
// SAFETY: as above.
unsafe impl Sync for Group {}

/// Meets the others, where that has not been.
fn joined() -> Result<&'static Group, Exception> {
    static JOINED: OnceLock<Result<Group, String>> = OnceLock::new();
    let joined = JOINED.get_or_init(|| meet().map_err(|error| format!("{error:#}")));
    joined.as_ref().map_err(|reason| Exception::custom(reason.clone()))
}

fn meet() -> Result<Group> {
    let rank = Rank::from_environment(Framework::Mlx)?.context("this process is no rank")?;
    let engine = launched();
    let name = CString::new(engine)?;
    // What goes through mlx-rs first makes MLX's errors come back as such.
    random::key(0)?;
    // SAFETY: fresh handles; the string outlives the call.
    unsafe {
        let mut group = mlx_sys::mlx_distributed_group_new();
        // MLX keeps what a process gets first, so nothing less than a whole group is taken.
        let status = mlx_sys::mlx_distributed_init(&mut group, true, name.as_ptr());
        ensure!(status == 0, "MLX's {engine} did not bring rank {} to the others", rank.index);
        let size = mlx_sys::mlx_distributed_group_size(group) as usize;
        ensure!(size == rank.count, "MLX's {engine} has {size} ranks, and {} were started", rank.count);
        let (kind, usual) = if engine == "nccl" {
            (mlx_sys::mlx_device_type__MLX_GPU, mlx_sys::mlx_default_gpu_stream_new())
        } else {
            (mlx_sys::mlx_device_type__MLX_CPU, mlx_sys::mlx_default_cpu_stream_new())
        };
        let device = mlx_sys::mlx_device_new_type(kind, 0);
        let beside = mlx_sys::mlx_stream_new_device(device);
        mlx_sys::mlx_device_free(device);
        Ok(Group { group, size, usual, beside })
    }
}

/// The sum of an array over all ranks.
fn all_sum(array: &Array, beside: bool) -> Result<Array, Exception> {
    let group = joined()?;
    let stream = if beside { group.beside } else { group.usual };
    // SAFETY: live handles; on success the array made here is owned.
    unsafe {
        let mut sum = mlx_sys::mlx_array_new();
        let status = mlx_sys::mlx_distributed_all_sum(&mut sum, array.as_ptr(), group.group, stream);
        let sum = Array::from_ptr(sum);
        if status == 0 { Ok(sum) } else { Err(Exception::custom("MLX refused an all_sum")) }
    }
}

/// The sum of a buffer over all ranks, as a part of the step.
pub fn all_reduce(buffer: &Array) -> Result<Array, Exception> {
    all_sum(buffer, false)
}

/// Adds up numbers over all ranks.
pub fn sum(values: &[f32]) -> Result<Vec<f32>> {
    let sum = all_sum(&Array::from_slice(values, &[values.len() as i32]), false)?;
    sum.eval()?;
    Ok(sum.try_as_slice::<f32>()?.to_vec())
}

/// The means of gradients over all ranks: each alone, or in groups on a stream of their own.
pub fn mean(gradients: &[Array], groups: bool) -> Result<Vec<Array>, Exception> {
    let share = |sum: Array| sum.multiply(crate::network::scalar(1.0 / joined()?.size as f64, sum.dtype()));
    if !groups {
        return gradients.iter().map(|gradient| share(all_sum(gradient, false)?)).collect();
    }
    let mut all = Vec::new();
    let mut rest = gradients;
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = rest.iter().take_while(|gradient| {
            let before = bytes;
            bytes += gradient.nbytes();
            before < GROUP
        });
        let (own, others) = rest.split_at(fits.count());
        rest = others;
        let mean = share(all_sum(&concatenate_flat(own)?, true)?)?;
        let ends: Vec<i32> = own
            .iter()
            .scan(0, |end, gradient| {
                *end += gradient.size() as i32;
                Some(*end)
            })
            .collect();
        let parts = mean.split_at_indices(&ends[..ends.len() - 1], 0)?;
        for (part, gradient) in parts.iter().zip(own) {
            all.push(part.reshape(gradient.shape())?);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_a_machine_meet_at_ports_of_their_own() {
        let folder = std::env::temp_dir().join(format!("transformer-bench-meeting-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let all = meeting(BackendId::MlxCpu, 3, &folder).unwrap();
        let hosts: Vec<[String; 1]> =
            serde_json::from_str(&std::fs::read_to_string(folder.join("hosts.json")).unwrap()).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(hosts.len() == 3 && hosts[0] != hosts[1] && hosts[1] != hosts[2], "{hosts:?}");
        assert_eq!(all[2][0], ("MLX_RANK".to_owned(), "2".to_owned()));
        let cuda = meeting(BackendId::MlxCuda, 2, &std::env::temp_dir()).unwrap();
        assert!(cuda[1].contains(&("CUDA_VISIBLE_DEVICES".to_owned(), "1".to_owned())), "{cuda:?}");
    }
}
