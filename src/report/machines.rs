//! The training speeds of several machines in one table.

use std::fmt::Write;

use super::format::{digits, or_dash, range};
use super::headline::headlines;
use super::markdown::table_of_markdown;
use super::notes::machine_lines;
use super::table::Table;
use super::{all_measured, find_measured};
use crate::results::Results;
use crate::suite::{BackendId, Case, Method, Precision, Workload};
use crate::text;

/// Renders a Markdown table with a row per training step and a column per machine.
///
/// Memory is left out because its metric depends on the device.
pub fn render(machines: &[(String, Results)]) -> String {
    let mut out = String::from("# Training speed of several machines\n\n");
    for (name, results) in machines {
        let [hardware, versions] = machine_lines(results);
        let [name, hardware, versions] = [name, &hardware, &versions].map(|t| text::markdown(t));
        let _ = writeln!(out, "- **{name}**: {hardware} {versions}");
    }
    out.push_str(
        "\nThe table shows samples/s with their 95 % CI. The factor is the speed relative to PyTorch CPU in eager f32 on \
         the same machine.\n\n",
    );
    let mut cases: Vec<Case> = Vec::new();
    let rows = machines.iter().flat_map(|(_, results)| headlines(results)).map(|row| row.case);
    let steps = machines.iter().flat_map(|(_, results)| {
        let headline = results.headline();
        let steps = all_measured(results).into_iter().map(|m| m.case);
        steps.filter(move |case| case.workload == Workload::TrainStep && case.shape == headline)
    });
    for case in rows.chain(steps) {
        if !cases.contains(&case) {
            cases.push(case);
        }
    }
    let cell = |results: &Results, case: &Case| {
        let m = find_measured(results, case)?;
        let base = Case { backend: BackendId::TorchCpu, method: Method::eager(Precision::F32), ..*case };
        let factor = find_measured(results, &base).map(|base| base.median_ns / m.median_ns);
        let samples = |ns: f64| case.shape.batch() as f64 / ns * 1e9;
        let ci = range([samples(m.ci_ns[1]), samples(m.ci_ns[0])]);
        let factor = factor.map_or_else(String::new, |factor| format!(", {}×", digits(factor)));
        Some(format!("{} ({ci}{factor})", digits(samples(m.median_ns))))
    };
    let row = |case: &Case| {
        let cells: Vec<Option<String>> = machines.iter().map(|(_, results)| cell(results, case)).collect();
        cells
            .iter()
            .any(Option::is_some)
            .then(|| std::iter::once(format!("`{case}`")).chain(cells.into_iter().map(or_dash)).collect())
    };
    let names = machines.iter().map(|(name, _)| text::markdown(name));
    let header = std::iter::once("case".to_owned()).chain(names).collect();
    out + &table_of_markdown(&Table::with_header("", "", header, cases.iter().filter_map(row).collect()))
}

#[cfg(test)]
mod tests {
    use super::super::tests::run;
    use super::*;

    #[test]
    fn machines_share_the_rows_of_their_common_cases() {
        let [cpu, cuda] =
            ["cpu", "cuda"].map(|device| format!("train-step/torch-{device}/f32/indicator-b16"));
        let machines =
            [("a".to_owned(), run(&[(&cpu, 500e6), (&cuda, 5e6)])), ("b".to_owned(), run(&[(&cuda, 10e6)]))];
        let text = render(&machines);
        let line = text.lines().find(|l| l.contains("torch-cuda/f32/")).unwrap();
        assert!(line.contains("3,200 (2,909 to 3,556, 100×)"), "{line}");
        // Machine b has no PyTorch CPU to compare with.
        assert!(line.contains("1,600 (1,455 to 1,778)"), "{line}");
        let line = text.lines().find(|l| l.contains("torch-cpu/f32/")).unwrap();
        assert!(line.trim_end_matches(" |").ends_with('–'), "{line}");
    }
}
