//! Several machines in one table.

use std::fmt::Write;

use super::markdown::escaped;
use super::tables::{digits, machine_lines};
use super::{find, headlines, measured};
use crate::results::Results;
use crate::suite::{BackendId, Case, Method, Precision, Workload};

/// Markdown: for each headline row the speed on each machine, in samples/s and against
/// the machine's own PyTorch on the CPU in f32. Only rows of the same case share a line,
/// and memory is left out, since its definition follows the device.
pub fn render(machines: &[(String, Results)]) -> String {
    let mut out = String::from("# Training speed side by side\n\n");
    for (name, results) in machines {
        let [hardware, versions] = machine_lines(results);
        let _ = writeln!(out, "- **{}**: {} {}", escaped(name), escaped(&hardware), escaped(&versions));
    }
    let names: Vec<&str> = machines.iter().map(|(name, _)| name.as_str()).collect();
    out.push_str("\nsamples/s (95 % interval, and times that machine's own PyTorch CPU in f32)\n\n");
    let _ = writeln!(out, "| case | {} |\n| --- |{}", names.join(" | "), " --- |".repeat(names.len()));
    let own = |shape| Case {
        workload: Workload::TrainStep,
        backend: BackendId::TorchCpu,
        method: Method::eager(Precision::F32),
        shape,
    };
    let mut cases: Vec<Case> = Vec::new();
    for (_, results) in machines {
        // All Opt may be a row that stands above it.
        for row in headlines(results) {
            if !cases.contains(&row.case) {
                cases.push(row.case);
            }
        }
    }
    for (_, results) in machines {
        for m in super::all_measured(results) {
            if m.case.workload == Workload::TrainStep
                && m.case.shape == results.headline()
                && !cases.contains(&m.case)
            {
                cases.push(m.case);
            }
        }
    }
    let cell = |results: &Results, case: &Case| {
        let (_, median, ci) = measured(find(results, case))?;
        let base = measured(find(results, &own(case.shape)))
            .map(|(_, base, _)| format!(", {}×", digits(base / median)));
        let speed = |ns: f64| digits(case.shape.batch() as f64 / ns * 1e9);
        Some(format!("{} ({} to {}{})", speed(median), speed(ci[1]), speed(ci[0]), base.unwrap_or_default()))
    };
    for case in cases {
        let cells: Vec<Option<String>> = machines.iter().map(|(_, results)| cell(results, &case)).collect();
        if cells.iter().all(Option::is_none) {
            continue;
        }
        let cells: Vec<String> = cells.into_iter().map(|c| c.unwrap_or_else(|| "–".to_owned())).collect();
        let _ = writeln!(out, "| `{case}` | {} |", cells.join(" | "));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;
    use crate::results::machine::Machine;

    #[test]
    fn machines_share_the_lines_of_their_common_cases() {
        let of = |cases: &[(&str, f64)]| {
            Results::new(Machine::default(), cases.iter().map(|(id, median)| record(id, *median)).collect())
        };
        let machines = [
            (
                "a".to_owned(),
                of(&[
                    ("train-step/torch-cpu/f32/indicator-b16", 500e6),
                    ("train-step/torch-cuda/f32/indicator-b16", 5e6),
                ]),
            ),
            ("b".to_owned(), of(&[("train-step/torch-cuda/f32/indicator-b16", 10e6)])),
        ];
        let text = render(&machines);
        let line = text.lines().find(|l| l.contains("torch-cuda/f32/")).unwrap();
        assert!(line.contains("3200 (2909 to 3556, 100×)"), "{line}");
        // No PyTorch CPU there to compare with.
        assert!(line.contains("1600 (1455 to 1778)"), "{line}");
        assert!(text.lines().any(|l| l.contains("torch-cpu/f32/") && l.contains("| – |")));
    }
}
