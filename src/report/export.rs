//! The run as data: JSON, CSV and Bencher Metric Format, from the same records.

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use crate::results::{EnvEffect, InterleavedResult, Record, Results, Status, upgrade};

/// `results.json` of this version; see the README for its fields.
pub fn json(results: &Results) -> Result<String> {
    Ok(serde_json::to_string_pretty(results)? + "\n")
}

/// Reads `results.json`; `place` names it in errors.
///
/// # Errors
/// An empty or damaged file, one of a newer version, or values that are no times.
pub fn read(text: &str, place: &str) -> Result<Results> {
    ensure!(!text.trim().is_empty(), "{place} is empty: run ./scripts/bench again");
    let mut value: Value = serde_json::from_str(text)
        .with_context(|| format!("{place} is damaged: run ./scripts/bench again"))?;
    let version = value["version"].as_u64().unwrap_or(1);
    ensure!(
        version <= crate::results::VERSION,
        "{place} has version {version}, and this program reads up to {}: update transformer-bench",
        crate::results::VERSION
    );
    upgrade::upgrade(&mut value, version);
    let results: Results =
        serde_json::from_value(value).with_context(|| format!("{place} lacks what a run has"))?;
    for record in &results.cases {
        check(record).with_context(|| format!("{place}: {}", record.id))?;
    }
    check_comparisons(&results.interleaved, &results.env_effects).with_context(|| place.to_owned())?;
    Ok(results)
}

/// Whether comparisons that are kept beside a run are such as rounds can give.
pub fn check_comparisons(turns: &[InterleavedResult], settings: &[EnvEffect]) -> Result<()> {
    settings.iter().try_for_each(check_setting)?;
    turns.iter().try_for_each(check_turn)
}

/// Whether a comparison in turns is one that rounds can give.
fn check_turn(turn: &InterleavedResult) -> Result<()> {
    let InterleavedResult { ratio, ratio_ci: [low, high], .. } = turn;
    let positive = [ratio, low, high].iter().all(|v| v.is_finite() && **v > 0.0);
    ensure!(positive && low <= ratio && ratio <= high, "{} in turns: no ratio and interval", turn.base);
    Ok(())
}

/// Whether a setting is one that a comparison can find.
fn check_setting(setting: &EnvEffect) -> Result<()> {
    let EnvEffect { without_ns, with_ns, ratio, ratio_ci: [low, high], .. } = setting;
    let positive = [without_ns, with_ns, ratio, low, high].iter().all(|v| v.is_finite() && **v > 0.0);
    ensure!(
        positive && low <= ratio && ratio <= high,
        "setting {}: no ratio and interval",
        setting.variables
    );
    Ok(())
}

/// Whether a record is one that a run can leave.
pub fn check(record: &Record) -> Result<()> {
    record.id.parse::<crate::suite::Case>().map_err(anyhow::Error::msg)?;
    if record.status == Status::Measured {
        let median = record.median_ns.context("measured, and without a median")?;
        let [low, high] = record.ci_ns.context("measured, and without an interval")?;
        ensure!(median.is_finite() && median > 0.0, "{median} ns is no time");
        ensure!(
            low.is_finite() && high.is_finite() && 0.0 < low && low <= median && median <= high,
            "{low} to {high} ns is no interval of {median} ns"
        );
    }
    if let Some(throughput) = &record.throughput {
        ensure!(throughput.value.is_finite() && throughput.value > 0.0, "{} is no rate", throughput.value);
    }
    for share in [record.page_faults, record.page_fault_share].into_iter().flatten() {
        ensure!(share.is_finite() && share >= 0.0, "{share} page faults can't be");
    }
    for share in [record.parity, record.cpu_wait_share].into_iter().flatten() {
        ensure!((0.0..=1.0).contains(&share), "{share} is no share");
    }
    if let Some(ranks) = &record.ranks {
        let shares = [ranks.skew, ranks.cpu_wait_share];
        ensure!(shares.iter().all(|share| (0.0..=1.0).contains(share)), "{shares:?} are no shares");
        // What should end may take longer by chance.
        let exposed = ranks.exposed_communication.unwrap_or_default();
        ensure!(exposed.iter().all(|share| share.is_finite() && *share <= 1.0), "{exposed:?} is no part");
    }
    Ok(())
}

/// A row a case, with the fields of `results.json`.
pub fn csv(results: &Results) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record([
        "id",
        "workload",
        "backend",
        "precision",
        "shape",
        "status",
        "reason",
        "median_ns",
        "ci_low_ns",
        "ci_high_ns",
        "samples",
        "throughput",
        "throughput_unit",
        "peak_bytes",
        "rss_peak_bytes",
        "page_faults",
        "page_fault_share",
        "parity",
        "waiting_share",
    ])?;
    for r in &results.cases {
        // As JSON writes numbers, so that both files hold the same digits.
        let number = |value: Option<Value>| value.map_or_else(String::new, |v| v.to_string());
        let float = |value: Option<f64>| number(value.map(Value::from));
        let count = |value: Option<u64>| number(value.map(Value::from));
        writer.write_record([
            r.id.clone(),
            r.workload.clone(),
            r.backend.clone(),
            r.precision.clone(),
            r.shape.clone(),
            serde_json::to_value(r.status)?.as_str().unwrap_or_default().to_owned(),
            r.reason.clone(),
            float(r.median_ns),
            float(r.ci_ns.map(|ci| ci[0])),
            float(r.ci_ns.map(|ci| ci[1])),
            count(r.samples),
            float(r.throughput.as_ref().map(|t| t.value)),
            r.throughput.as_ref().map_or_else(String::new, |t| t.unit.clone()),
            count(r.peak_bytes),
            count(r.rss_peak_bytes),
            float(r.page_faults),
            float(r.page_fault_share),
            float(r.parity),
            float(r.cpu_wait_share),
        ])?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

/// Bencher Metric Format, <https://bencher.dev/docs/reference/bencher-metric-format/>.
pub fn bmf(results: &Results) -> Result<String> {
    let mut all = Map::new();
    for r in results.cases.iter().filter(|r| r.status == Status::Measured) {
        let mut measures = Map::new();
        if let (Some(median), Some([low, high])) = (r.median_ns, r.ci_ns) {
            measures.insert(
                "latency".to_owned(),
                json!({"value": median, "lower_value": low, "upper_value": high}),
            );
        }
        if let Some(throughput) = &r.throughput {
            measures.insert("throughput".to_owned(), json!({"value": throughput.value}));
        }
        for (name, bytes) in [("allocator-peak", r.peak_bytes), ("resident-peak", r.rss_peak_bytes)] {
            if let Some(bytes) = bytes {
                measures.insert(name.to_owned(), json!({"value": bytes}));
            }
        }
        all.insert(r.id.clone(), Value::Object(measures));
    }
    Ok(serde_json::to_string_pretty(&all)? + "\n")
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;
    use crate::results::Throughput;
    use crate::results::machine::Machine;
    use crate::suite::{Set, cases};

    fn results() -> Results {
        let mut results = Results::new(Machine::default(), Vec::new());
        for (i, case) in cases(Set::Full).iter().enumerate() {
            let mut r = record(&case.to_string(), 1e6 / (i + 1) as f64 + 0.123_456_789);
            if i % 7 == 0 {
                r = Record::unmeasured(case, Status::Skipped, "no \"Mac\", <b>here</b>");
            } else {
                r.throughput = Some(Throughput { value: 1e9 / 3.0 + i as f64, unit: "samples/s".to_owned() });
                r.peak_bytes = Some(1 << 30);
                r.page_faults = Some(0.5);
            }
            results.cases.push(r);
        }
        results.interleaved.push(InterleavedResult {
            base: "train-step/torch-cpu/f32/indicator-b16".to_owned(),
            head: "train-step/mlx-cpu/f32/indicator-b16".to_owned(),
            ratio: 3.0,
            ratio_ci: [2.5, 3.5],
            rounds: 3,
            commit: String::new(),
        });
        results.env_effects.push(EnvEffect {
            variables: "A=1".to_owned(),
            id: results.cases[0].id.clone(),
            without_ns: 1e6,
            with_ns: 2e6,
            ratio: 2.0,
            ratio_ci: [1.9, 2.1],
            commit: String::new(),
        });
        results
    }

    #[test]
    fn every_export_holds_the_numbers_of_results_json() {
        let results = results();
        let again = read(&json(&results).unwrap(), "x").unwrap();
        assert!(again == results, "results.json does not come back as it was");
        let json: Value = serde_json::from_str(&json(&results).unwrap()).unwrap();
        let bmf: Value = serde_json::from_str(&bmf(&results).unwrap()).unwrap();
        let csv_text = csv(&results).unwrap();
        let mut reader = csv::Reader::from_reader(csv_text.as_bytes());
        let header = reader.headers().unwrap().clone();
        let mut rows = 0;
        for (row, case) in reader.records().zip(json["cases"].as_array().unwrap()) {
            let row = row.unwrap();
            let cell = |name: &str| row[header.iter().position(|h| h == name).unwrap()].to_owned();
            let id = case["id"].as_str().unwrap();
            assert_eq!(cell("id"), id);
            assert_eq!(cell("reason"), case["reason"].as_str().unwrap());
            for (column, value) in [
                ("median_ns", &case["median_ns"]),
                ("ci_low_ns", &case["ci_ns"][0]),
                ("throughput", &case["throughput"]["value"]),
                ("peak_bytes", &case["peak_bytes"]),
                ("page_faults", &case["page_faults"]),
            ] {
                let text = if value.is_null() { String::new() } else { value.to_string() };
                assert_eq!(cell(column), text, "{column} of {id}");
            }
            if case["status"] == "measured" {
                assert_eq!(bmf[id]["latency"]["value"], case["median_ns"]);
                assert_eq!(bmf[id]["latency"]["upper_value"], case["ci_ns"][1]);
                assert_eq!(bmf[id]["throughput"]["value"], case["throughput"]["value"]);
                assert_eq!(bmf[id]["allocator-peak"]["value"], case["peak_bytes"]);
            } else {
                assert!(bmf.get(id).is_none());
            }
            rows += 1;
        }
        assert_eq!(rows, results.cases.len());
    }

    #[test]
    fn the_schema_is_the_documented_one() {
        let json: Value = serde_json::from_str(&json(&results()).unwrap()).unwrap();
        let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
        assert_eq!(keys(&json), "cases env_effects interleaved machine version");
        assert_eq!(
            keys(&json["cases"][1]),
            "backend ci_ns id median_ns page_fault_share page_faults parity peak_bytes precision ranks reason rss_peak_bytes samples shape status throughput waiting_share workload"
        );
        assert_eq!(
            keys(&json["machine"]),
            "arch commit cores cpu date dirty driver environment gpus memory_bytes os others power profile vectors versions"
        );
        assert_eq!(keys(&json["settings"][0]), "commit id ratio ratio_ci setting with_ns without_ns");
        let readme = include_str!("../../criterion-baselines/README.md");
        assert_eq!(keys(&json["turns"][0]), "base commit head ratio ratio_ci rounds");
        let parts = [&json["cases"][1], &json["machine"], &json["settings"][0], &json["turns"][0]];
        let all = parts.map(keys).join(" ");
        for key in all.split(' ') {
            assert!(
                readme.contains(&format!("`{key}`")),
                "criterion-baselines/README.md does not explain {key}"
            );
        }
    }

    #[test]
    fn files_that_no_run_left_are_refused() {
        let good = json(&results()).unwrap();
        let hostile = good.replacen("attention/torch-cpu/f32/", "<script>/torch-cpu/f32/", 1);
        let infinite = good.replacen("\"median_ns\": 5", "\"median_ns\": -5", 1);
        for (text, word) in [
            ("", "empty"),
            ("{\"cases\":", "damaged"),
            ("{\"version\": 99}", "update transformer-bench"),
            ("{\"version\": 2}", "lacks"),
            (&hostile, "unknown workload"),
            (&infinite, "no time"),
            (&good.replacen("\"ratio\": 2.0", "\"ratio\": -2.0", 1), "no ratio"),
            (&good.replacen("\"value\": 3", "\"value\": -3", 1), "no rate"),
        ] {
            let error = format!("{:#}", read(text, "results.json").unwrap_err());
            assert!(error.contains(word) && error.starts_with("results.json"), "{word}: {error}");
        }
    }
}
