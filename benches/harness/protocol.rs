//! The line protocol of worker processes: requests on standard input, answers on standard output, and tensors in
//! files.

use std::convert::Infallible;
use std::fs;
use std::io::{BufRead, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use transformer_bench::fixture::Tensor;
use transformer_bench::results::one_line;

/// Answers each line of standard input, and ends the process at the end of the input.
///
/// # Errors
/// Returns an error if standard input or output fails.
pub fn serve_requests(mut answer: impl FnMut(&str) -> Result<String>) -> Result<Infallible> {
    for line in std::io::stdin().lock().lines() {
        match answer(line?.trim()) {
            Ok(text) => send_line(&text)?,
            Err(error) => send_line(&format!("failed: {}", one_line(&format!("{error:#}"))))?,
        }
    }
    // PyTorch's destructors take 0.1 s of a core that others may need, and those of a rank may wait for ranks
    // that have ended.
    // SAFETY: every answer was flushed, and nothing else must run at exit.
    unsafe { libc::_exit(0) }
}

/// Writes one line to standard output and flushes it.
pub fn send_line(line: &str) -> Result<()> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{line}")?;
    Ok(output.flush()?)
}

/// Writes a line of JSON with the names and dimensions, then all values as little-endian f32.
///
/// # Errors
/// Returns an error if the file can't be written.
pub fn write_tensors(file: &Path, tensors: &[Tensor]) -> Result<()> {
    let index: Vec<(&String, &Vec<usize>)> = tensors.iter().map(|t| (&t.name, &t.dims)).collect();
    let mut bytes = serde_json::to_vec(&index)?;
    bytes.push(b'\n');
    bytes.extend(tensors.iter().flat_map(|t| &t.data).flat_map(|v| v.to_le_bytes()));
    fs::write(file, bytes).with_context(|| format!("{} could not be written", file.display()))
}

/// Reads the format of [`write_tensors`].
///
/// # Errors
/// Returns an error if the file can't be read or is incomplete.
pub fn read_tensors(file: &Path) -> Result<Vec<Tensor>> {
    let bytes = fs::read(file).with_context(|| format!("{} could not be read", file.display()))?;
    let end = bytes.iter().position(|b| *b == b'\n').context("the tensor file has no line of JSON")?;
    let index: Vec<(String, Vec<usize>)> = serde_json::from_slice(&bytes[..end])?;
    let mut values = bytes[end + 1..].chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let tensor = |(name, dims): (String, Vec<usize>)| {
        let count: usize = dims.iter().product();
        let data: Vec<f32> = values.by_ref().take(count).collect();
        if data.len() < count {
            bail!("{} ends within {name}: is the disk full?", file.display());
        }
        Ok(Tensor { name, dims, data })
    };
    index.into_iter().map(tensor).collect()
}
