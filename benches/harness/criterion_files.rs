//! Criterion's files of a case that Criterion could not sample: it takes ten samples at least.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};
use transformer_bench::results::write_atomic;
use transformer_bench::statistics::{mean, median, std_dev};
use transformer_bench::suite::Case;

/// Writes what Criterion 0.8 leaves in `new`. The interval is the range of what was measured.
pub fn write(folder: &Path, case: &Case, steps: &[Duration]) -> Result<()> {
    let times: Vec<f64> = steps.iter().map(|step| step.as_nanos() as f64).collect();
    let (low, high) = times.iter().fold((f64::MAX, 0.0_f64), |(l, h), t| (l.min(*t), h.max(*t)));
    let estimate = |point: f64, low: f64, high: f64| {
        json!({
            "confidence_interval": {"confidence_level": 0.95, "lower_bound": low, "upper_bound": high},
            "point_estimate": point,
            "standard_error": 0.0,
        })
    };
    let deviation = std_dev(&times);
    let estimates = json!({
        "mean": estimate(mean(&times), low, high),
        "median": estimate(median(&times), low, high),
        "median_abs_dev": estimate(deviation, deviation, deviation),
        "slope": Value::Null,
        "std_dev": estimate(deviation, deviation, deviation),
    });
    let sample = json!({"sampling_mode": "Flat", "iters": vec![1.0; times.len()], "times": times});
    let function = format!("{}/{}", case.backend, case.method);
    let benchmark = json!({
        "group_id": case.workload.id(),
        "function_id": function,
        "value_str": case.shape.to_string(),
        "throughput": Value::Null,
        "full_id": case.to_string(),
        "directory_name": format!("{}/{}_{}/{}", case.workload, case.backend, case.method, case.shape),
        "title": case.to_string(),
    });
    for (name, value) in [("sample", sample), ("estimates", estimates), ("benchmark", benchmark)] {
        write_atomic(&folder.join("new").join(format!("{name}.json")), &value.to_string())?;
    }
    Ok(())
}
