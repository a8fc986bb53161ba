//! The run as data: JSON, CSV and Bencher Metric Format, from the same records.

use anyhow::Result;
use serde_json::{Map, Value, json};

use crate::results::{Results, Status};
use crate::text::csv_cell;

/// Renders `results.json`. criterion-baselines/README.md describes its fields.
pub fn json(results: &Results) -> Result<String> {
    Ok(serde_json::to_string_pretty(results)? + "\n")
}

/// Columns of `results.csv`, with their place in a record of `results.json`.
const COLUMNS: [(&str, &str); 20] = [
    ("id", "/id"),
    ("workload", "/workload"),
    ("backend", "/backend"),
    ("precision", "/precision"),
    ("shape", "/shape"),
    ("status", "/status"),
    ("reason", "/reason"),
    ("median_ns", "/median_ns"),
    ("ci_low_ns", "/ci_ns/0"),
    ("ci_high_ns", "/ci_ns/1"),
    ("samples", "/samples"),
    ("throughput", "/throughput/value"),
    ("throughput_unit", "/throughput/unit"),
    ("peak_bytes", "/peak_bytes"),
    ("rss_peak_bytes", "/rss_peak_bytes"),
    ("page_faults", "/page_faults"),
    ("page_fault_share", "/page_fault_share"),
    ("parity", "/parity"),
    ("cpu_wait_share", "/cpu_wait_share"),
    ("throttled", "/throttled"),
];

/// Renders `results.csv`, with a row per case. Both files have the same digits.
pub fn csv(results: &Results) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(COLUMNS.map(|(name, _)| name))?;
    for record in &results.cases {
        let record = serde_json::to_value(record)?;
        writer.write_record(COLUMNS.map(|(_, place)| match record.pointer(place) {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => csv_cell(text),
            Some(number) => number.to_string(),
        }))?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

/// Renders Bencher Metric Format, <https://bencher.dev/docs/reference/bencher-metric-format/>.
pub fn bmf(results: &Results) -> Result<String> {
    let mut all = Map::new();
    for r in results.cases.iter().filter(|r| r.status == Status::Measured) {
        let latency = r
            .median_ns
            .zip(r.ci_ns)
            .map(|(median, [low, high])| json!({"value": median, "lower_value": low, "upper_value": high}));
        let measures = [
            ("latency", latency),
            ("throughput", r.throughput.as_ref().map(|throughput| json!({"value": throughput.value}))),
            ("allocator-peak", r.peak_bytes.map(|bytes| json!({"value": bytes}))),
            ("resident-peak", r.rss_peak_bytes.map(|bytes| json!({"value": bytes}))),
        ];
        let measures = measures.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
        all.insert(r.id.clone(), measures.collect::<Map<_, _>>().into());
    }
    Ok(serde_json::to_string_pretty(&all)? + "\n")
}

#[cfg(test)]
mod tests {
    use super::super::tests::{interleaved, record};
    use super::*;
    use crate::results::machine::Machine;
    use crate::results::validate::parse_results;
    use crate::results::{EnvEffect, Record, Throughput};
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
        let pair = ["train-step/torch-cpu/f32/indicator-b16", "train-step/mlx-cpu/f32/indicator-b16"];
        results.interleaved.push(interleaved(pair, 3.0, [2.5, 3.5]));
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
    fn every_export_has_the_numbers_of_results_json() {
        let results = results();
        let parsed = parse_results(&json(&results).unwrap(), "x").unwrap();
        assert!(parsed == results, "results.json changes when it is read");
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
            "backend ci_ns cpu_wait_share gpu_busy_share id median_ns page_fault_share page_faults parity peak_bytes precision ranks reason rss_peak_bytes samples shape status throttled throughput workload"
        );
        assert_eq!(
            keys(&json["machine"]),
            "arch background_load commit cores cpu date dirty driver environment gpus memory_bytes os power profile simd versions"
        );
        assert_eq!(keys(&json["env_effects"][0]), "commit id ratio ratio_ci variables with_ns without_ns");
        let readme = include_str!("../../criterion-baselines/README.md");
        assert_eq!(
            keys(&json["interleaved"][0]),
            "base base_ns commit head head_ns ratio ratio_ci round_ns rounds"
        );
        let parts = [&json["cases"][1], &json["machine"], &json["env_effects"][0], &json["interleaved"][0]];
        let all = parts.map(keys).join(" ");
        for key in all.split(' ') {
            assert!(
                readme.contains(&format!("`{key}`")),
                "criterion-baselines/README.md does not explain {key}"
            );
        }
    }

    #[test]
    fn files_that_no_run_can_produce_are_refused() {
        let good = json(&results()).unwrap();
        let hostile = good.replacen("attention/torch-cpu/f32/", "<script>/torch-cpu/f32/", 1);
        let negative = good.replacen("\"median_ns\": 5", "\"median_ns\": -5", 1);
        for (text, word) in [
            ("", "empty"),
            ("{\"cases\":", "damaged"),
            ("{\"version\": 99}", "update transformer-bench"),
            ("{\"version\": 2}", "lacks"),
            ("[1, 2]", "lacks"),
            ("{\"version\": 0}", "its version is 0"),
            ("{\"version\": \"x\"}", "its version is"),
            (&hostile, "unknown workload"),
            (&negative, "not a time"),
            (&good.replacen("\"ratio\": 2.0", "\"ratio\": -2.0", 1), "no ratio"),
            (&good.replacen("\"value\": 3", "\"value\": -3", 1), "not a rate"),
        ] {
            let error = format!("{:#}", parse_results(text, "results.json").unwrap_err());
            assert!(error.contains(word) && error.starts_with("results.json"), "{word}: {error}");
        }
    }
}
