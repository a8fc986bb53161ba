//! Random edits of a finished comparison, which cause no panic.

use proptest::prelude::*;
use transformer_bench::text;

use super::output::Report;

const GOOD: &str = r#"{"base": "main", "head": "worktree", "threshold": 0.02, "seconds": 3.5, "notes": ["a"], "cases": [
    {"id": "forward/torch-cpu/f32/indicator-b1", "verdict": "slower", "ratio": 1.03, "ci": [1.02, 1.04], "base_ns": 1e6,
     "head_ns": 1.03e6, "rounds": 6, "bounds": null, "failed_side": null, "reason": "",
     "observations": [[0.03, 1e-4], [0.031, 1e-4], [0.029, 1e-4], [0.03, 1e-4], [0.031, 1e-4], [0.029, 1e-4]]},
    {"id": "forward/mlx-cpu/f32/indicator-b1", "verdict": "equivalent", "ratio": 1.0, "ci": [0.99, 1.01]},
    {"id": "attention/mlx-cpu/f32/b1-h8-t111-d32", "verdict": "failed", "failed_side": 1, "reason": "it crashed"}]}"#;

/// Reads and prints a comparison. Returns true if it is accepted.
fn read(json: &str, threshold: f64) -> bool {
    let Ok(value) = text::parse_json(json) else { return false };
    let Ok(report) = Report::reevaluate(value, threshold) else { return false };
    for (json, markdown) in [(false, false), (false, true), (true, false)] {
        let shown = report.text(json, markdown);
        assert!(!shown.contains("NaN") && !shown.contains("inf"), "{shown}");
    }
    report.exit_code(true);
    drop(report.mirrored());
    true
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn edited_comparisons_are_refused_or_printed(
        edits in prop::collection::vec((0..GOOD.len(), 0..12usize, "(-?[0-9]{1,3}(e[0-9]{1,3})?|null|[\\[\\]{},:\"]|.{0,3})"), 1..4),
        threshold in 0.01..100.0f64,
    ) {
        let mut bytes = GOOD.as_bytes().to_vec();
        for (at, length, inserted) in edits {
            let start = at.min(bytes.len());
            let end = (at + length).min(bytes.len());
            bytes.splice(start..end, inserted.bytes());
        }
        read(&String::from_utf8_lossy(&bytes), threshold);
    }
}

#[test]
fn the_comparison_before_the_edits_is_accepted() {
    assert!(read(GOOD, 2.0));
}
