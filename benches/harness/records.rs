//! Records of cases: numbers from Criterion's files, and failures.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;
use transformer_bench::memory;
use transformer_bench::results::{Record, Status, Throughput, criterion_folder};
use transformer_bench::statistics::{self, sorted};
use transformer_bench::suite::{Case, cost};

/// Adds the median, its interval and the throughput from the files that Criterion has written.
///
/// # Errors
/// Returns an error if a file is missing or damaged.
pub fn fill_record(criterion_home: &Path, case: &Case, mut record: Record) -> Result<Record> {
    let folder = criterion_folder(criterion_home, case).join("new");
    let read = |name: &str| -> Result<Value> {
        let path = folder.join(name);
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("Criterion did not write {}: is the disk full?", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))
    };
    let median = read("estimates.json")?["median"].take();
    let number = |value: &Value| value.as_f64().context("Criterion's estimates have no median");
    let interval = &median["confidence_interval"];
    let ends = [number(&interval["lower_bound"])?, number(&interval["upper_bound"])?];
    set_time(&mut record, case, number(&median["point_estimate"])?, ends);
    record.samples = read("sample.json")?["times"].as_array().map(|times| times.len() as u64);
    Ok(record)
}

/// Replaces the times of Criterion's process by the median and the range of the step times of several processes.
pub fn use_process_times(record: &mut Record, case: &Case, times: Vec<f64>) {
    if let [first, .., last] = sorted(times.iter().copied())[..] {
        set_time(record, case, statistics::median(&times), [first, last]);
        record.process_ns = times;
    }
}

fn set_time(record: &mut Record, case: &Case, median_ns: f64, ci_ns: [f64; 2]) {
    let work = cost::work(case);
    record.median_ns = Some(median_ns);
    record.ci_ns = Some(ci_ns);
    record.page_fault_share = record.page_faults.map(|faults| faults * memory::page_fault_ns() / median_ns);
    record.throughput =
        Some(Throughput { value: work.amount() as f64 / (median_ns * 1e-9), unit: work.unit().to_owned() });
}

/// Parts of the messages of an allocation that failed, in lower case: of CUDA and PyTorch, of malloc, and of Metal
/// ("Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)").
const OUT_OF_MEMORY: [&str; 5] =
    ["out of memory", "can't allocate memory", "unable to allocate", "insufficient memory", "outofmemory"];

/// Returns the record of a case that failed. Running out of memory counts as skipped.
pub fn failure_record(case: &Case, error: &anyhow::Error) -> Record {
    let text = format!("{error:#}");
    let lower = text.to_lowercase();
    if OUT_OF_MEMORY.iter().any(|message| lower.contains(message)) {
        return Record::unmeasured(case, Status::Skipped, format!("out of memory: {text}"));
    }
    Record::unmeasured(case, Status::Error, text)
}
