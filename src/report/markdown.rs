//! `report.md`, which is also what the terminal shows.

use std::fmt::Write;

use super::{
    HEADLINE_SHAPE, Measured, Sweep, Utilisation, ablation, all_measured, batches, find, headlines, measured,
    measured_peak, reason, utilisation,
};
use crate::case::{BackendId, Case, Family, Shape, Workload};
use crate::results::{Part, Record, Results, Status};
use crate::{cost, machine};

/// A Markdown table whose columns line up as plain text too.
fn table(out: &mut String, header: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .chain([header[column].chars().count()])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<_> = (0..header.len()).map(width).collect();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        for (cell, width) in cells.zip(&widths) {
            let _ = write!(out, "| {cell:<width$} ");
        }
        out.push_str("|\n");
    };
    line(&mut header.iter().copied());
    let rule: Vec<String> = widths.iter().map(|&w| "-".repeat(w)).collect();
    line(&mut rule.iter().map(String::as_str));
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
    out.push('\n');
}

/// Three significant digits.
fn digits(value: f64) -> String {
    let places = if value == 0.0 { 0 } else { (2 - value.abs().log10().floor() as i32).clamp(0, 9) };
    format!("{value:.*}", places as usize)
}

/// 1 234 567 with a prefix: `1.23 M`.
fn prefixed(value: f64) -> String {
    let (scale, prefix) = match value {
        v if v >= 1e12 => (1e12, " T"),
        v if v >= 1e9 => (1e9, " G"),
        v if v >= 1e6 => (1e6, " M"),
        v if v >= 1e4 => (1e3, " k"),
        _ => (1.0, " "),
    };
    digits(value / scale) + prefix
}

fn time(ns: f64) -> String {
    match ns {
        n if n >= 1e9 => digits(n / 1e9) + " s",
        n if n >= 1e6 => digits(n / 1e6) + " ms",
        n if n >= 1e3 => digits(n / 1e3) + " µs",
        n => digits(n) + " ns",
    }
}

fn bytes(value: Option<u64>) -> Option<String> {
    value.map(|v| digits(v as f64 / 1e6) + " MB")
}

/// Half of the interval's width, in percent of the median.
fn spread(median: f64, ci: [f64; 2]) -> f64 {
    (ci[1] - ci[0]) / 2.0 / median * 100.0
}

fn speed_table(out: &mut String, results: &Results) {
    let Shape::Model { batch, .. } = HEADLINE_SHAPE else { unreachable!("a model") };
    let batch = batch as f64;
    let base = headlines().iter().find_map(|row| measured(find(results, &row.case)).map(|m| m.1));
    let rows: Vec<_> = headlines()
        .iter()
        .map(|row| {
            let record = find(results, &row.case);
            match (measured(record), base) {
                (Some((_, median, ci)), Some(base)) => vec![
                    row.label.to_owned(),
                    digits(batch / median * 1e9),
                    format!("{} to {}", digits(batch / ci[1] * 1e9), digits(batch / ci[0] * 1e9)),
                    format!("{:.2}×", base / median),
                    String::new(),
                ],
                _ => {
                    vec![row.label.to_owned(), "–".to_owned(), "–".to_owned(), "–".to_owned(), reason(record)]
                }
            }
        })
        .collect();
    let _ = writeln!(out, "## Training speed, {HEADLINE_SHAPE}\n");
    table(out, &["", "samples/s", "95 % interval", "speed", "why not"], &rows);
}

fn memory_table(out: &mut String, results: &Results) {
    let rows: Vec<_> = headlines()
        .iter()
        .map(|row| {
            let record = find(results, &row.case);
            let figures = measured(record).map(|m| m.0);
            let none = || "–".to_owned();
            vec![
                row.label.to_owned(),
                figures.and_then(|r| bytes(r.peak_bytes)).unwrap_or_else(none),
                figures.and_then(|r| bytes(r.rss_peak_bytes)).unwrap_or_else(none),
                match figures {
                    Some(r) if r.peak_bytes.is_none() => {
                        "this framework keeps no peak on this device".to_owned()
                    }
                    Some(_) => String::new(),
                    None => reason(record),
                },
            ]
        })
        .collect();
    let _ = writeln!(out, "## Memory of a training step, {HEADLINE_SHAPE}\n");
    out.push_str(
        "Two definitions, never to be compared with each other: the peak of the framework's own\n\
         allocator, and the peak resident size of the whole process, libraries included.\n\n",
    );
    table(out, &["", "allocator peak", "resident peak", "note"], &rows);
}

fn ablation_table(out: &mut String, all: &[Measured<'_>]) {
    let rows: Vec<_> = ablation(all)
        .into_iter()
        .map(|(m, speed)| {
            vec![
                m.case.backend.to_string(),
                m.case.shape.to_string(),
                m.case.precision.to_string(),
                time(m.median_ns),
                format!("{speed:.2}×"),
            ]
        })
        .collect();
    if !rows.is_empty() {
        out.push_str("## What each optimisation brings to a training step\n\n");
        table(out, &["backend", "shape", "recipe", "median", "against f32"], &rows);
    }
}

fn batch_table(out: &mut String, all: &[Measured<'_>]) {
    let rows: Vec<_> = batches(all)
        .into_iter()
        .map(|Sweep { backend, precision, speeds }| {
            let best = speeds.iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("more than one");
            let list: Vec<_> =
                speeds.iter().map(|(batch, speed)| format!("{batch}: {}", digits(*speed))).collect();
            vec![backend.to_string(), precision.to_string(), list.join(", "), format!("{}", best.0)]
        })
        .collect();
    if !rows.is_empty() {
        out.push_str("## Batch size: samples/s of a training step\n\n");
        table(out, &["backend", "precision", "samples/s by batch", "best batch"], &rows);
    }
}

fn percent(part: Utilisation) -> String {
    match part {
        Utilisation::Of(part) => format!("{:.1} %", part * 100.0),
        Utilisation::Unknown => "n/a".to_owned(),
        Utilisation::Impossible(part) => format!("error: {:.0} % can't be", part * 100.0),
    }
}

fn gpt2_table(out: &mut String, results: &Results, all: &[Measured<'_>]) {
    let rows: Vec<_> = all
        .iter()
        .filter_map(|m| {
            let Shape::Model { family: Family::Gpt2, tiny: false, batch } = m.case.shape else { return None };
            if !matches!(m.case.workload, Workload::TrainStep | Workload::Forward | Workload::ForwardBackward)
            {
                return None;
            }
            let seconds = m.median_ns * 1e-9;
            let tokens = (batch * Family::Gpt2.sizes(false).tokens) as f64 / seconds;
            let rate = cost::flops(&m.case) as f64 / seconds;
            let compute = m.case.precision.compute;
            let gpu = matches!(m.case.backend, BackendId::TorchCuda | BackendId::MlxCuda);
            let sheet = results.machine.gpus.first().filter(|_| gpu);
            let sheet = sheet.and_then(|gpu| machine::dense_peak(gpu, compute));
            let own = measured_peak(all, m.case.backend, compute);
            Some(vec![
                m.case.to_string(),
                time(m.median_ns),
                prefixed(tokens),
                digits(rate / 1e12),
                percent(utilisation(rate, sheet)),
                percent(utilisation(rate, own)),
            ])
        })
        .collect();
    if !rows.is_empty() {
        out.push_str("## GPT-2 small, 1024 tokens\n\n");
        out.push_str(
            "Model FLOPs utilisation: against the data sheet's dense peak, and against the best\n\
             `matmul-peak` of the same backend and format in this run.\n\n",
        );
        let header = ["case", "median", "tokens/s", "TFLOP/s", "of the data sheet", "of matmul-peak"];
        table(out, &header, &rows);
    }
}

/// Samples of a case as words: what was measured, or why not.
fn case_row(record: &Record) -> Vec<String> {
    let median = record.median_ns.filter(|_| record.status == Status::Measured);
    let throughput = record.throughput.as_ref();
    vec![
        record.id.clone(),
        median.map_or_else(|| "–".to_owned(), time),
        match (median, record.ci_ns) {
            (Some(median), Some(ci)) => format!("±{} %", digits(spread(median, ci))),
            _ => "–".to_owned(),
        },
        throughput.map_or_else(|| "–".to_owned(), |t| format!("{}{}", prefixed(t.value), t.unit)),
        record.samples.filter(|_| median.is_some()).map_or_else(|| "–".to_owned(), |n| n.to_string()),
    ]
}

/// The whole report.
pub fn render(results: &Results, parts: &[Part]) -> String {
    let mut out = String::from("# transformer-bench\n\n");
    let m = &results.machine;
    let gpus = if m.gpus.is_empty() { "no GPU".to_owned() } else { m.gpus.join(", ") };
    let dirty = if m.dirty { ", with uncommitted changes" } else { "" };
    let _ = writeln!(
        out,
        "{} ({} cores), {:.0} GB, {gpus}{}{}, {}, commit {}{dirty}.  ",
        m.cpu,
        m.cores,
        m.memory_bytes as f64 / 1e9,
        if m.driver.is_empty() { "" } else { ", " },
        m.driver,
        m.os,
        m.commit
    );
    let versions: Vec<_> = m.versions.iter().map(|(name, value)| format!("{name}: {value}")).collect();
    let _ = writeln!(out, "{}.\n", versions.join("; "));

    speed_table(&mut out, results);
    memory_table(&mut out, results);
    let all = all_measured(results);
    ablation_table(&mut out, &all);
    batch_table(&mut out, &all);
    gpt2_table(&mut out, results, &all);

    let (shown, missing): (Vec<&Record>, Vec<&Record>) =
        results.cases.iter().partition(|r| r.status == Status::Measured);
    if !shown.is_empty() {
        out.push_str("## Every case\n\n");
        let rows: Vec<_> = shown.into_iter().map(case_row).collect();
        table(&mut out, &["case", "median", "95 % interval", "throughput", "samples"], &rows);
    }
    if !missing.is_empty() {
        out.push_str("## Not measured\n\n");
        // One line a reason: absent backends would fill pages.
        let mut reasons: Vec<(String, Vec<&str>)> = Vec::new();
        for record in missing {
            let backend = record.id.parse::<Case>().map_or_else(|_| String::new(), |c| c.backend.to_string());
            let key = match record.status {
                Status::Skipped => format!("{backend}: {}", record.reason),
                _ => record.reason.clone(),
            };
            match reasons.iter_mut().find(|(reason, _)| *reason == key) {
                Some((_, ids)) => ids.push(&record.id),
                None => reasons.push((key, vec![&record.id])),
            }
        }
        for (reason, ids) in reasons {
            let what = if ids.len() == 1 { ids[0].to_owned() } else { format!("{} cases", ids.len()) };
            let _ = writeln!(out, "- {reason} ({what})");
        }
        out.push('\n');
    }
    let sets: Vec<_> = parts.iter().map(|p| p.set.as_str()).collect();
    let filter = parts.iter().map(|p| p.filter.as_str()).find(|f| !f.is_empty());
    let set = sets.first().copied().unwrap_or("quick");
    let filter = filter.map_or_else(String::new, |f| format!(" '{f}'"));
    let _ = writeln!(out, "Measured with `./scripts/bench --{set}{filter}`.");
    out
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;
    use crate::machine::Machine;

    #[test]
    fn figures_are_rounded_to_three_digits() {
        assert_eq!(digits(1.23456), "1.23");
        assert_eq!(digits(123.456), "123");
        assert_eq!(digits(1234.56), "1235");
        assert_eq!(digits(0.012345), "0.0123");
        assert_eq!(prefixed(2.5e9), "2.50 G");
        assert_eq!(time(1.5e6), "1.50 ms");
    }

    #[test]
    fn every_headline_row_is_there_with_a_figure_or_a_reason() {
        let mps: Case = "train-step/torch-mps/f32/indicator-b16".parse().unwrap();
        let results = Results {
            machine: Machine::default(),
            cases: vec![
                record("train-step/torch-cpu/f32/indicator-b16", 500e6),
                record("train-step/mlx-cpu/f32/indicator-b16", 1000e6),
                Record::without(&mps, Status::Skipped, "no Mac"),
            ],
        };
        let text = render(&results, &[]);
        let lines = |label: &str| -> Vec<&str> {
            let first = |line: &&str| line.split('|').nth(1).is_some_and(|cell| cell.trim() == label);
            text.lines().filter(first).collect()
        };
        for row in headlines() {
            assert_eq!(lines(row.label).len(), 2, "{}", row.label);
        }
        let line = |label: &str| lines(label)[0].to_owned();
        assert!(line("PyTorch CPU").contains("32.0") && line("PyTorch CPU").contains("1.00×"));
        assert!(line("MLX (CPU)").contains("16.0") && line("MLX (CPU)").contains("0.50×"));
        assert!(line("PyTorch MPS").contains("no Mac"));
    }
}
