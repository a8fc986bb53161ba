use super::*;
use crate::files::tests::scratch;
use crate::results::first_step::StartTimes;

const START: StartTimes = StartTimes { made_ns: 1e9, loaded_ns: 2e9, first_ns: 3e8, second_ns: 2e8 };

fn baseline() -> Baseline {
    let case: Case = "forward/torch-cpu/f32/indicator-b16".parse().unwrap();
    let skipped: Case = "forward/mlx-metal/f32/indicator-b16".parse().unwrap();
    let kept = |record: Record, sample: Value| SavedCase {
        record,
        sample,
        estimates: serde_json::json!({"median": {"point_estimate": 2.0}}),
        benchmark: serde_json::json!({"group_id": "forward"}),
    };
    let mut measured = Record::unmeasured(&case, Status::Measured, "");
    measured.median_ns = Some(2.0);
    measured.ci_ns = Some([1.9, 2.1]);
    Baseline {
        command: "./scripts/bench --quick 'forward'".to_owned(),
        selections: vec![Selection {
            framework: "torch".to_owned(),
            set: "quick".to_owned(),
            filter: "forward".to_owned(),
        }],
        machine: Machine { cpu: "Xeon".to_owned(), cores: 2, ..Machine::default() },
        model: None,
        cases: vec![
            kept(measured, serde_json::json!({"iters": [2.0, 2.0], "times": [4.0, 5.0]})),
            kept(Record::unmeasured(&skipped, Status::Skipped, "no Mac"), Value::Null),
        ],
        interleaved: vec![InterleavedResult {
            base: case.to_string(),
            head: skipped.to_string(),
            base_ns: Some(1e6),
            head_ns: Some(2e6),
            ratio: 2.0,
            ratio_ci: [1.5, 2.5],
            rounds: 3,
            round_ns: vec![[1e6, 2e6]; 3],
            commit: "a".to_owned(),
        }],
        env_effects: Vec::new(),
        operations: Vec::new(),
        first_steps: vec![FirstSteps {
            ids: ["f32", "f32-compile"].map(|method| format!("train-step/torch-cpu/{method}/indicator-b16")),
            cold: [START; 2],
            warm: [START; 2],
            step_ns: [2e8, 1e8],
            python: true,
            commit: "a".to_owned(),
        }],
        energy: Vec::new(),
    }
}

#[test]
fn a_baseline_comes_back_as_it_was_with_a_line_a_case() {
    let text = baseline().render().unwrap();
    assert_eq!(Baseline::parse(&text, "x").unwrap(), baseline());
    assert_eq!(text.lines().filter(|l| l.contains("\"id\":")).count(), 2);
    assert_eq!(baseline().cases[0].samples(), [2e-9, 2.5e-9]);
}

#[test]
fn files_that_are_no_longer_what_was_saved_are_refused_with_the_way_out() {
    let good = baseline().render().unwrap();
    let newer = good.replace(&format!("\"version\": {VERSION}"), &format!("\"version\": {}", VERSION + 1));
    let edited = good.replace("5.0]", "4.1]");
    let unmeasured = {
        let mut b = baseline();
        b.cases.remove(0);
        b.render().unwrap()
    };
    let infinite = {
        let mut b = baseline();
        b.cases[0].sample = serde_json::json!({"iters": [0.0], "times": [4.0]});
        b.render().unwrap()
    };
    for (text, word) in [
        ("", "empty"),
        (&good[..good.len() / 2], "damaged"),
        ("{\"a\": 1}", "not a baseline"),
        (&newer, "update transformer-bench"),
        (&edited, "changed after it was saved"),
        (&unmeasured, "no measured case"),
        (&infinite, "no valid samples"),
    ] {
        let error = Baseline::parse(text, "x/baseline.json").unwrap_err().to_string();
        assert!(error.contains(word) && error.starts_with("x/baseline.json"), "{word}: {error}");
    }
}

#[test]
fn nothing_is_overwritten_unasked_and_a_failed_write_loses_nothing() {
    let root = scratch("baselines");
    let file = write(&root, "main", &baseline(), "report", false).unwrap();
    let before = fs::read_to_string(&file).unwrap();
    let again = write(&root, "main", &baseline(), "report", false).unwrap_err().to_string();
    assert!(again.contains("--force"), "{again}");
    // As on a full disk: the temporary file can't be written.
    fs::create_dir(file.with_extension("json.partial")).unwrap();
    assert!(write(&root, "main", &baseline(), "another report", true).is_err());
    assert_eq!(fs::read_to_string(&file).unwrap(), before);
    assert_eq!(fs::read_to_string(file.with_file_name("report.md")).unwrap(), "report");
    // A new one leaves nothing at all.
    let folder = file.parent().unwrap().with_file_name("fresh");
    fs::create_dir_all(folder.join("baseline.json.partial")).unwrap();
    assert!(write(&root, "fresh", &baseline(), "report", false).is_err());
    assert!(!folder.join("report.md").exists() && !folder.join("report.md.new").exists());
    for bad in ["", "../x", "a/b", ".hidden", "new", "a b"] {
        assert!(check_name(bad).is_err(), "{bad}");
    }
    fs::remove_dir_all(root).unwrap();
}

#[test]
fn names_are_found_on_this_machine_first() {
    let root = scratch("find");
    let other =
        Baseline { machine: Machine { gpus: vec!["H100".to_owned()], ..Machine::default() }, ..baseline() };
    write(&root, "main", &baseline(), "", false).unwrap();
    write(&root, "main", &other, "", false).unwrap();
    write(&root, "only", &other, "", false).unwrap();
    let find = |text: &str, slug: &str| find(&root, text, slug).map(|p| p.display().to_string());
    assert!(find("main", "h100").unwrap().contains("h100"));
    assert!(find("main", "elsewhere").unwrap_err().to_string().contains("several"));
    assert!(find("xeon-2-cores/main", "h100").unwrap().contains("xeon"));
    assert!(find("only", "elsewhere").is_ok());
    assert!(find("never", "h100").unwrap_err().to_string().contains("h100/only"));
    fs::remove_dir_all(root).unwrap();
}

#[test]
fn restored_files_are_where_criterion_looks() {
    let home = scratch("restore");
    assert_eq!(baseline().restore(&home, "main", false).unwrap(), 1);
    let folder = home.join("forward/torch-cpu_f32/indicator-b16/main");
    for name in ["sample.json", "estimates.json", "benchmark.json"] {
        assert!(folder.join(name).exists(), "{name}");
    }
    assert!(baseline().restore(&home, "main", false).unwrap_err().to_string().contains("--force"));
    assert!(baseline().restore(&home, "main", true).is_ok());
    fs::remove_dir_all(home).unwrap();
}
