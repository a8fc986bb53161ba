//! Tests of cases that are timed in several processes.

use std::os::unix::fs::PermissionsExt;

use transformer_bench::compare::worker::{Side, WrongSteps};
use transformer_bench::report::summary;
use transformer_bench::results::machine::Machine;
use transformer_bench::results::{Record, Results, Status};
use transformer_bench::suite::{Case, Framework};

use super::processes::{PROCESSES, depends_on_process, time};
use super::records::use_process_times;
use transformer_bench::files::Scratch;

/// Returns a side whose processes report 40 ms per step, and every third process 2.5 times as much.
fn side(folder: &std::path::Path, verified: &str) -> Side {
    std::fs::create_dir_all(folder).unwrap();
    let script = format!(
        "#!/bin/sh\ncd {}\necho >> started\n\
         step=40000000; [ $(( $(wc -l < started) % 3 )) = 0 ] && step=100000000\n\
         while read word rest; do case $word in case) echo ready;; version) echo 4;; verify) echo {verified};; \
         *) echo $((word * step)) 0 0;; esac; done\n",
        folder.display()
    );
    let path = folder.join("worker");
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    Side { executables: [(Framework::Torch, path.clone()), (Framework::Mlx, path)].into(), ..Side::default() }
}

#[test]
fn slow_processes_widen_the_interval_and_name_no_winner() {
    let scratch =
        Scratch(std::env::temp_dir().join(format!("transformer-bench-slow-{}", std::process::id())));
    let side = side(&scratch.0, "verified");
    let ids = ["train-step/torch-mps/f32/indicator-b16", "train-step/mlx-metal/f32/indicator-b16"];
    let records = ids.map(|id| {
        let case: Case = id.parse().unwrap();
        let times = time(&side, &case).unwrap();
        assert_eq!(times.len(), PROCESSES);
        let mut record = Record::unmeasured(&case, Status::Measured, "");
        assert_eq!(depends_on_process(&case, &record), id.contains("mps"));
        use_process_times(&mut record, &case, times);
        record
    });
    let [low, high] = records[0].ci_ns.unwrap();
    assert!((low - 40e6).abs() < 1.0 && (high - 100e6).abs() < 1.0, "{low} to {high}");
    let mut records = records.to_vec();
    records[1].median_ns = Some(100e6);
    let results = Results::new(Machine::default(), records);
    let answer = summary::answer(&results);
    assert!(answer[0].contains("neither framework is clearly faster"), "{answer:?}");
}

#[test]
fn steps_that_stop_are_an_error() {
    let scratch =
        Scratch(std::env::temp_dir().join(format!("transformer-bench-idle-{}", std::process::id())));
    let error = time(
        &side(&scratch.0, "failed: no work"),
        &"train-step/torch-mps/f32/indicator-b16".parse().unwrap(),
    );
    let error = error.unwrap_err();
    assert!(error.is::<WrongSteps>() && error.to_string() == "no work", "{error:#}");
}
