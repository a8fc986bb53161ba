//! Random edits and extreme files for every reader, which must not panic or take over a second.
//!
//! `PROPTEST_CASES=100000 cargo test --release -p transformer-bench --lib -- reader_tests` tries more edits.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use crate::compare::decision::{Rule, SequentialTest, Verdict};
use crate::files::tests::scratch;
use crate::model::config;
use crate::profile::Profile;
use crate::report::hostile_tests::{self as hostile, baseline, results, use_baseline, with_checksum};
use crate::report::publish::python;
use crate::results::baseline::Baseline;
use crate::results::run::ProcessRecord;
use crate::results::{upgrade, validate};
use crate::suite::{Case, parse_filter};
use crate::{rendezvous, text};

const TIME_LIMIT: Duration = Duration::from_secs(1);
/// Size of an extreme file in bytes. All of them took under a second at 1,000,000 too, which takes the test 45 s.
const EXTREME_SIZE: usize = 200_000;

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 96, "rope_theta": 1e4, "rope_scaling": null,
    "rope_parameters": {"rope_type": "default"}, "architectures": ["LlamaForCausalLM"], "_name_or_path": "a/b"}"#;
const PYTHON: &str = "date,group,case,program,ms,low,high\n\
                      2026-11-25,g,train-step/mlx-cpu/f32/indicator-b16,eager,1340,1300,1400\n";
const HOSTS: &str = r#"[["127.0.0.1:5000", "10.0.0.1:80"], ["host:5001"]]"#;
const ID: &str = "train-step/torch-cuda/mixed-tuned/indicator-b16-dp2";

/// A reader with a file that it accepts.
struct Reader {
    name: &'static str,
    good: String,
    /// Reads the text and uses what it accepts. Returns true if it accepts the text.
    read: fn(&str) -> bool,
}

/// Reads a file that has the text, because the reader takes a path.
fn read_file<T>(name: &str, text: &str, read: impl FnOnce(&Path) -> anyhow::Result<T>) -> bool {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let folder = scratch(&format!("reader-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
    fs::create_dir_all(&folder).unwrap();
    let path = folder.join(name);
    fs::write(&path, text).unwrap();
    let accepted = read(&path).is_ok();
    fs::remove_dir_all(folder).unwrap();
    accepted
}

fn readers() -> Vec<Reader> {
    let reader = |name, good: &str, read| Reader { name, good: good.to_owned(), read };
    let saved = baseline().render().unwrap();
    let part = serde_json::json!({"framework": "torch", "executable": "1", "selections": [], "selected": 3});
    let mut part = part.as_object().unwrap().clone();
    part.extend(serde_json::to_value(results()).unwrap().as_object().unwrap().clone());
    vec![
        reader("config.json", CONFIG, |text| read_file("a.json", text, config::read)),
        reader("TOML model", include_str!("model/indicator.toml"), |text| {
            read_file("a.toml", text, config::read)
        }),
        reader("results.json", &serde_json::to_string(&results()).unwrap(), |text| {
            validate::parse_results(text, "x").map(|results| hostile::show(text, &results)).is_ok()
        }),
        reader("run record", &serde_json::to_string(&part).unwrap(), |text| {
            let Ok(value) = text::parse_json(text) else { return false };
            let part = serde_json::from_value::<ProcessRecord>(value);
            part.is_ok_and(|part| validate::check_results(&part.results).is_ok())
        }),
        reader("baseline", saved.splitn(4, '\n').nth(3).unwrap(), |text| {
            let parsed = Baseline::parse(&with_checksum(text), "x");
            parsed.map(|baseline| use_baseline(text, &baseline)).is_ok()
        }),
        reader("python.csv", PYTHON, |text| {
            python::parse(text).map(|rows| rows.iter().for_each(|row| drop(row.row(&rows)))).is_ok()
        }),
        reader("hosts file", HOSTS, |text| read_file("hosts", text, rendezvous::count_hosts)),
        reader("folded stacks", "step;a;b 3\nstep;c 1\n", |text| {
            let parsed = Profile::parse(text);
            parsed.map(|profile| drop((profile.heaviest(3), profile.named_share()))).is_ok()
        }),
        reader("case id", ID, |text| text.parse::<Case>().is_ok()),
        reader("older id", ID, |text| upgrade::upgrade_id(text, 1).parse::<Case>().is_ok()),
        reader("filter", "^train-step/.*-cpu/(f32|mixed)$", |text| parse_filter(text).is_ok()),
    ]
}

/// Texts that an edit inserts.
const TOKENS: [&str; 24] = [
    "null",
    "-1",
    "0",
    "1e308",
    "1e-320",
    "18446744073709551616",
    "99999999999999999999999999",
    "NaN",
    "true",
    "\"",
    "\\u009b",
    "\\ud800",
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    "\n",
    "-",
    "b65536",
    "/",
    "\u{202e}",
    ";",
];

/// An edit: the bytes from a position on, as a share of the file, are replaced.
fn edits() -> impl Strategy<Value = Vec<(f64, usize, String)>> {
    let inserted = prop_oneof![
        prop::sample::select(&TOKENS[..]).prop_map(str::to_owned),
        ".{0,4}",
        Just(String::new()),
    ];
    prop::collection::vec((0.0..1.0f64, 0..24usize, inserted), 1..5)
}

fn edited(text: &str, edits: &[(f64, usize, String)]) -> String {
    let mut bytes = text.as_bytes().to_vec();
    for (at, length, inserted) in edits {
        let at = (at * bytes.len() as f64) as usize;
        let end = (at + length).min(bytes.len());
        bytes.splice(at..end, inserted.bytes());
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Returns true if the reader accepts the text, or a message if it takes too long.
fn check(reader: &Reader, text: &str) -> Result<bool, String> {
    let start = Instant::now();
    let accepted = (reader.read)(text);
    let elapsed = start.elapsed();
    let middle: String = text.chars().skip(text.chars().count() / 2).take(60).collect();
    let slow =
        || format!("{}: {elapsed:?} for {} bytes, with {middle:?} in the middle", reader.name, text.len());
    if elapsed < TIME_LIMIT { Ok(accepted) } else { Err(slow()) }
}

fn configuration() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(100);
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

#[test]
fn random_edits_are_refused_or_used_without_a_panic() {
    let readers = readers();
    for reader in &readers {
        assert_eq!(check(reader, &reader.good), Ok(true), "{}", reader.name);
    }
    proptest!(configuration(), |(edits in edits(), any in any::<String>())| {
        for reader in &readers {
            check(reader, &edited(&reader.good, &edits)).unwrap();
            check(reader, &any).unwrap();
        }
    });
}

#[test]
fn an_extreme_file_is_read_in_time() {
    let repeated = |text: &str| text.repeat(EXTREME_SIZE / text.len());
    let mut texts: Vec<String> = [
        "[", "{\"a\":", "\"", "a", "1", " ", "\n", "-", "/", "b1-", ",", "1,", "a.", "[a]\n", "[[a]]\n", "(",
        "(a|", ".*", "é", "\u{9b}", "a;b 1\n", "\"a\":1,",
    ]
    .into_iter()
    .map(repeated)
    .collect();
    texts.push(format!("[{}1]", repeated("1,")));
    texts.push(format!("[{}[]]", repeated("[],")));
    texts.push(format!("{{{}\"a\": 1}}", repeated("\"a\": 1, ")));
    texts.push(format!("\"{}\"", repeated("\\u001b")));
    texts.push((0..EXTREME_SIZE / 12).map(|i| format!("a{i} = {i}\n")).collect());
    texts.push(format!("a = {}1{}", "[".repeat(EXTREME_SIZE / 2), "]".repeat(EXTREME_SIZE / 2)));
    texts.push(format!("{}a = 1", repeated("a.")));
    let mut slow = Vec::new();
    for reader in readers() {
        let middle =
            (0..reader.good.len()).rfind(|&i| 2 * i <= reader.good.len() && reader.good.is_char_boundary(i));
        let (before, after) = reader.good.split_at(middle.unwrap_or(0));
        for text in &texts {
            slow.extend(check(&reader, text).err());
            // In the middle of a file that is accepted otherwise.
            slow.extend(check(&reader, &format!("{before}{text}{after}")).err());
        }
    }
    assert!(slow.is_empty(), "{}", slow.join("\n"));
}

#[test]
fn any_observations_give_a_verdict() {
    let rule = Rule { threshold: 0.02, cases: 1, max_rounds: 60, precision: None };
    let rounds = prop::collection::vec((-30.0..30.0f64, 0.0..30.0f64), 0..100);
    proptest!(configuration(), |(rounds in rounds)| {
        let rounds: Vec<[f64; 2]> = rounds.into_iter().map(|(centre, error)| [centre, error]).collect();
        let test = SequentialTest::replay(rule, &rounds);
        prop_assert!(Verdict::BY_SEVERITY.contains(&test.verdict().unwrap()));
        if let Some(estimate) = test.estimate() {
            prop_assert!(estimate.ratio.is_finite() && estimate.ratio > 0.0);
        }
    });
}
