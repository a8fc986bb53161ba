//! Writes Criterion's files for a case that is too slow for Criterion, which takes at least ten samples.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};
use transformer_bench::files::write_atomic;
use transformer_bench::statistics::{mean, median, std_dev};
use transformer_bench::suite::Case;

use super::measurement::throughput;

/// Writes the files that Criterion 0.8 writes to `folder/new`. The range of the steps serves as the confidence
/// interval of mean and median.
///
/// # Errors
/// Returns an error if a file can't be written.
pub fn write(folder: &Path, case: &Case, steps: &[Duration]) -> Result<()> {
    let times: Vec<f64> = steps.iter().map(|step| step.as_nanos() as f64).collect();
    let low = times.iter().copied().fold(f64::INFINITY, f64::min);
    let high = times.iter().copied().fold(0.0, f64::max);
    let estimate = |point: f64, low: f64, high: f64| {
        json!({
            "confidence_interval": {"confidence_level": 0.95, "lower_bound": low, "upper_bound": high},
            "point_estimate": point,
            "standard_error": 0.0,
        })
    };
    let (std_dev, median_abs_dev) = (std_dev(&times), median_abs_dev(&times));
    let estimates = json!({
        "mean": estimate(mean(&times), low, high),
        "median": estimate(median(&times), low, high),
        "median_abs_dev": estimate(median_abs_dev, median_abs_dev, median_abs_dev),
        "slope": Value::Null,
        "std_dev": estimate(std_dev, std_dev, std_dev),
    });
    let sample = json!({"sampling_mode": "Flat", "iters": vec![1.0; times.len()], "times": times});
    let benchmark = json!({
        "group_id": case.workload.id(),
        "function_id": format!("{}/{}", case.backend, case.method),
        "value_str": case.shape.to_string(),
        "throughput": throughput(case),
        "full_id": case.to_string(),
        "directory_name": format!("{}/{}_{}/{}", case.workload, case.backend, case.method, case.shape),
        "title": case.to_string(),
    });
    for (name, value) in [("sample", sample), ("estimates", estimates), ("benchmark", benchmark)] {
        write_atomic(&folder.join("new").join(format!("{name}.json")), &value.to_string())?;
    }
    Ok(())
}

/// Returns the median absolute deviation times 1.4826, as Criterion does. The factor makes it estimate the standard
/// deviation of normally distributed values.
fn median_abs_dev(values: &[f64]) -> f64 {
    let center = median(values);
    1.4826 * median(&values.iter().map(|value| (value - center).abs()).collect::<Vec<_>>())
}
