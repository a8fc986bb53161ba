//! Files of a run with one changed field, as a careless or hostile author would write them. Each is refused in one
//! line or reported without harm, and no command panics.

use serde_json::{Map, Value, json};

use super::{export, html, machines, markdown, tests};
use crate::compare::baseline_level;
use crate::files::checksum;
use crate::model::{GPT2, Model, ModelId};
use crate::results::baseline::{Baseline, SavedCase, Selection};
use crate::results::machine::Machine;
use crate::results::{
    EnvEffect, InterleavedResult, Record, Results, RunModel, Throughput, VERSION, validate,
};
use crate::suite::CustomModel;
use crate::text::error_line;

fn record(id: &str) -> Record {
    let mut record = tests::record(id, 2e6);
    record.samples = Some(10);
    record.throughput = Some(Throughput { value: 8e3, unit: "samples/s".to_owned() });
    record.peak_bytes = Some(1 << 20);
    record.rss_peak_bytes = Some(1 << 30);
    record.page_faults = Some(3.0);
    record.page_fault_share = Some(0.2);
    record.parity = Some(0.4);
    record.cpu_wait_share = Some(0.3);
    record
}

const IDS: [&str; 3] = [
    "train-step/torch-cpu/f32/indicator-b16",
    "train-step/mlx-cpu/f32/indicator-b16",
    "matmul-peak/torch-cpu/f32/n1024",
];

fn machine() -> Machine {
    Machine { cpu: "Xeon".to_owned(), cores: 2, gpus: vec!["NVIDIA H100".to_owned()], ..Machine::default() }
}

fn model(name: &'static str) -> RunModel {
    let model = ModelId::intern(Model { name, ..GPT2 });
    RunModel::of(CustomModel::plain(model, 2))
}

/// Collects the paths of all values in a document.
fn paths(value: &Value, here: &str, all: &mut Vec<String>) {
    all.push(here.to_owned());
    match value {
        Value::Object(map) => map.iter().for_each(|(key, v)| paths(v, &format!("{here}/{key}"), all)),
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(i, v)| paths(v, &format!("{here}/{i}"), all));
        }
        _ => {}
    }
}

/// Returns copies of the document, each with one value replaced or removed.
fn mutations(good: &Value) -> Vec<(String, Value)> {
    let mut all = Vec::new();
    let mut places = Vec::new();
    paths(good, "", &mut places);
    let hostile =
        "\u{1b}[31m|<script>alert(1)</script>\n\u{9b}\u{202e}[l](javascript:x) ![i](http://x) `c` ../../x";
    let formula = "=cmd()";
    for place in places.iter().filter(|place| !place.is_empty()) {
        for new in [
            json!(null),
            json!(-1),
            json!(1e300),
            json!(u64::MAX),
            json!(hostile),
            json!(formula),
            json!([]),
            json!({}),
            json!(true),
        ] {
            let mut changed = good.clone();
            *changed.pointer_mut(place).unwrap() = new.clone();
            all.push((format!("{place} = {new}"), changed));
        }
        let (parent, key) = place.rsplit_once('/').unwrap();
        let mut changed = good.clone();
        if let Some(Value::Object(map)) = changed.pointer_mut(parent) {
            map.remove(key);
            all.push((format!("without {place}"), changed));
        }
    }
    all
}

/// Checks that no report of the results contains markup of the file.
pub fn show(what: &str, results: &Results) {
    let texts = [
        markdown::render(results, "x"),
        machines::render(&[("x".to_owned(), results.clone())]),
        html::render(results, &|_| Vec::new(), "x").unwrap(),
    ];
    let exports = [export::json, export::csv, export::bmf].map(|export| export(results).unwrap());
    assert!(
        !exports[1].lines().any(|line| line.split(',').any(|cell| cell.starts_with('='))),
        "{what}: {}",
        exports[1]
    );
    for text in texts.iter().chain(&exports) {
        assert!(!text.contains(['\u{1b}', '\u{9b}', '\u{202e}']), "{what}: {text:?}");
    }
    for text in &texts {
        assert!(!text.contains("<script>alert"), "{what}: {text}");
    }
    for text in &texts[..2] {
        let code = "`./scripts/bench";
        let outside = text.lines().filter(|line| !line.contains(code));
        for line in outside {
            assert!(
                !line.replace("\\[", "").contains("[l](") && !line.replace("\\[", "").contains("[i]("),
                "{what}: {line}"
            );
        }
    }
}

fn refused(what: &str, reason: &anyhow::Error) {
    // Every command prints errors this way.
    let line = error_line(reason);
    assert!(!line.trim().is_empty() && !line.contains(['\u{1b}', '\n']), "{what}: {line:?}");
}

fn interleaved() -> InterleavedResult {
    tests::interleaved([IDS[0], IDS[1]], 3.0, [2.5, 3.5])
}

/// Returns results with every kind of entry.
pub fn results() -> Results {
    let mut good = Results::new(machine(), IDS.map(record).into());
    good.model = Some(model("hostile"));
    good.interleaved.push(interleaved());
    good.env_effects.push(EnvEffect {
        variables: "A=1".to_owned(),
        id: IDS[0].to_owned(),
        without_ns: 1e6,
        with_ns: 2e6,
        ratio: 2.0,
        ratio_ci: [1.9, 2.1],
        commit: "a".to_owned(),
    });
    good
}

#[test]
fn results_with_a_changed_field_are_refused_or_reported_without_harm() {
    let good = results();
    let (mut accepted, mut refused_count) = (0, 0);
    for (what, value) in mutations(&serde_json::to_value(&good).unwrap()) {
        match validate::parse_results(&value.to_string(), "results.json") {
            Ok(results) => {
                show(&what, &results);
                accepted += 1;
            }
            Err(reason) => {
                refused(&what, &reason);
                refused_count += 1;
            }
        }
    }
    println!("results.json: {accepted} mutations reported, {refused_count} refused");
    assert!(refused_count > accepted && accepted > 0);
}

/// Returns a baseline with every kind of entry.
pub fn baseline() -> Baseline {
    let criterion = json!({"iters": [1.0, 2.0], "times": [2e6, 4e6]});
    let saved = |id| SavedCase {
        record: record(id),
        sample: criterion.clone(),
        estimates: json!({"median": {"point_estimate": 2e6}}),
        benchmark: json!({"group_id": "x"}),
    };
    Baseline {
        command: "./scripts/bench".to_owned(),
        selections: vec![Selection {
            framework: "torch".to_owned(),
            set: "quick".to_owned(),
            filter: String::new(),
        }],
        machine: machine(),
        model: Some(model("hostile-too")),
        cases: IDS[..2].iter().map(|id| saved(id)).collect(),
        interleaved: vec![interleaved()],
        env_effects: Vec::new(),
        operations: Vec::new(),
        first_steps: Vec::new(),
        energy: Vec::new(),
    }
}

/// Returns the text of a file with these lines after the checksum. The author would also correct the checksum.
pub fn with_checksum(body: &str) -> String {
    let checksum = checksum(body.as_bytes());
    format!(
        "{{\"format\": \"transformer-bench baseline\",\n\"version\": {VERSION},\n\"checksum\": \"{checksum:016x}\",\n{body}"
    )
}

/// Checks that a baseline can be reported and compared.
pub fn use_baseline(what: &str, baseline: &Baseline) {
    show(what, &baseline.results());
    let levels = baseline.cases.iter().filter_map(|case| baseline_level::summarize(&case.samples()));
    assert!(levels.into_iter().all(|level| level.level.is_finite()), "{what}");
    baseline.machine.differences(&machine());
}

#[test]
fn baselines_with_a_changed_field_are_refused_or_reported_without_harm() {
    let good = baseline();
    let (mut accepted, mut refused_count) = (0, 0);
    for (what, value) in mutations(&serde_json::to_value(&good).unwrap()) {
        let fields: Map<String, Value> = value.as_object().unwrap().clone();
        let body = format!("{}\n", &serde_json::to_string(&fields).unwrap()[1..]);
        match Baseline::parse(&with_checksum(&body), "baseline.json") {
            Ok(baseline) => {
                use_baseline(&what, &baseline);
                accepted += 1;
            }
            Err(reason) => {
                refused(&what, &reason);
                refused_count += 1;
            }
        }
    }
    println!("baseline.json: {accepted} mutations reported, {refused_count} refused");
    assert!(refused_count > accepted && accepted > 0);
}
