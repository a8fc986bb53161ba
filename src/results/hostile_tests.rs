//! Files of a run, changed field by field by someone careless or hostile: each is refused in one
//! line, or shown without harm. Nothing panics.

use serde_json::{Map, Value, json};

use super::baseline::{Baseline, SavedCase, Selection};
use super::machine::Machine;
use super::{
    EnvEffect, InterleavedResult, Record, Results, RunModel, Status, Throughput, checksum, printable,
};
use crate::compare::baseline_level;
use crate::model::{GPT2, Model};
use crate::report::{export, html, machines, markdown};

fn record(id: &str) -> Record {
    let mut record = Record::unmeasured(&id.parse().unwrap(), Status::Measured, "");
    record.median_ns = Some(2e6);
    record.ci_ns = Some([1.9e6, 2.1e6]);
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
    RunModel { batch: 2, configuration: Model { name, ..GPT2 } }
}

/// Every value in a document, by its path.
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

/// The document with each value in turn replaced by each of these, or gone.
fn mutations(good: &Value) -> Vec<(String, Value)> {
    let mut all = Vec::new();
    let mut places = Vec::new();
    paths(good, "", &mut places);
    let hostile = "\u{1b}[31m|<script>alert(1)</script>\n../../x";
    for place in places.iter().filter(|place| !place.is_empty()) {
        for new in [
            json!(null),
            json!(-1),
            json!(1e300),
            json!(u64::MAX),
            json!(hostile),
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

/// Shows results in every way; what comes out carries no code and no markup of theirs.
fn show(what: &str, results: &Results) {
    let texts = [
        markdown::render(results, "x"),
        machines::render(&[("x".to_owned(), results.clone())]),
        html::render(results, &|_| Vec::new(), "x").unwrap(),
    ];
    export::json(results).unwrap();
    export::csv(results).unwrap();
    export::bmf(results).unwrap();
    for text in texts {
        assert!(!text.contains("<script>alert"), "{what}: {text}");
    }
}

fn refused(what: &str, reason: &anyhow::Error) {
    // As every command prints it.
    let line = printable(&format!("{reason:#}"));
    assert!(!line.trim().is_empty() && !line.contains(['\u{1b}', '\n']), "{what}: {line:?}");
}

fn turn() -> InterleavedResult {
    InterleavedResult {
        base: IDS[0].to_owned(),
        head: IDS[1].to_owned(),
        ratio: 3.0,
        ratio_ci: [2.5, 3.5],
        rounds: 3,
        commit: String::new(),
    }
}

#[test]
fn results_changed_in_any_field_are_refused_or_shown_without_harm() {
    let mut good = Results::new(machine(), IDS.map(record).into());
    good.model = Some(model("hostile"));
    good.interleaved.push(turn());
    good.env_effects.push(EnvEffect {
        variables: "A=1".to_owned(),
        id: IDS[0].to_owned(),
        without_ns: 1e6,
        with_ns: 2e6,
        ratio: 2.0,
        ratio_ci: [1.9, 2.1],
        commit: "a".to_owned(),
    });
    let (mut kept, mut not) = (0, 0);
    for (what, value) in mutations(&serde_json::to_value(&good).unwrap()) {
        match export::read(&value.to_string(), "results.json") {
            Ok(results) => {
                show(&what, &results);
                kept += 1;
            }
            Err(reason) => {
                refused(&what, &reason);
                not += 1;
            }
        }
    }
    println!("results.json: {kept} mutations shown, {not} refused");
    assert!(not > kept && kept > 0);
}

#[test]
fn baselines_changed_in_any_field_are_refused_or_shown_without_harm() {
    let criterion = json!({"iters": [1.0, 2.0], "times": [2e6, 4e6]});
    let keep = |id| SavedCase {
        record: record(id),
        sample: criterion.clone(),
        estimates: json!({"median": {"point_estimate": 2e6}}),
        benchmark: json!({"group_id": "x"}),
    };
    let good = Baseline {
        command: "./scripts/bench".to_owned(),
        selections: vec![Selection {
            framework: "torch".to_owned(),
            set: "quick".to_owned(),
            filter: String::new(),
        }],
        machine: machine(),
        model: Some(model("hostile-too")),
        cases: IDS[..2].iter().map(|id| keep(id)).collect(),
        interleaved: vec![turn()],
        env_effects: Vec::new(),
    };
    let (mut kept, mut not) = (0, 0);
    for (what, value) in mutations(&serde_json::to_value(&good).unwrap()) {
        let fields: Map<String, Value> = value.as_object().unwrap().clone();
        let body = format!("{}\n", &serde_json::to_string(&fields).unwrap()[1..]);
        // As its author would, with a checksum that fits.
        let text = format!(
            "{{\"format\": \"transformer-bench baseline\",\n\"version\": 2,\n\"checksum\": \"{:016x}\",\n{body}",
            checksum(body.as_bytes())
        );
        match Baseline::parse(&text, "baseline.json") {
            Ok(baseline) => {
                show(&what, &baseline.results());
                let levels =
                    baseline.cases.iter().filter_map(|case| baseline_level::summarize(&case.samples()));
                assert!(levels.into_iter().all(|past| past.level.is_finite()), "{what}");
                baseline.machine.differences(&machine());
                kept += 1;
            }
            Err(reason) => {
                refused(&what, &reason);
                not += 1;
            }
        }
    }
    println!("baseline.json: {kept} mutations shown, {not} refused");
    assert!(not > kept && kept > 0);
}
