//! The generated blocks of README.md and criterion-baselines/README.md.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::PublishedBaseline;
use super::python::{self, PythonResult};
use crate::report::format::{digits, percent, significant};
use crate::report::markdown::{table, table_of_markdown};
use crate::report::scaling::{self, ModelScaling, Speedup};
use crate::report::summary::Comparison;
use crate::report::table::{Table, cells};
use crate::report::tables;
use crate::report::{Ratio, all_measured, rate};
use crate::suite::{Case, HEADLINE_SHAPE};
use crate::text;

/// A comparison of both frameworks on a device of a published baseline.
pub struct Answer<'a> {
    pub baseline: &'a PublishedBaseline,
    pub comparison: Comparison<'a>,
}

impl Answer<'_> {
    pub fn device(&self) -> String {
        self.baseline.device(self.comparison.steps[0].case.backend)
    }

    /// States the result in one clause.
    pub fn sentence(&self) -> String {
        let names = self.comparison.steps.map(|step| step.case.backend.framework().label());
        let Some((first, speedup)) = self.comparison.winner() else {
            return format!("neither framework is clearly faster on {}", self.device());
        };
        let times = significant(speedup.value, 2);
        format!("{} trains {times} times as fast as {} on {}", names[first], names[1 - first], self.device())
    }

    fn row(&self) -> Vec<String> {
        let [torch, mlx] = self.comparison.steps.map(|step| step.case);
        let [torch_ns, mlx_ns] = self.comparison.times_ns;
        let speed = |case: Case, ns| format!("{} (`{}`)", digits(rate(case.shape, ns).0), case.method);
        let Ratio { value, range } = self.comparison.speedup;
        let [ratio, low, high] = [value, range[0], range[1]].map(|number| significant(number, 2));
        let mark = if self.comparison.winner().is_some() { "**" } else { "" };
        let separate = if self.comparison.rounds.is_none() { ", not interleaved" } else { "" };
        vec![
            link(&self.device(), &self.baseline.name, ""),
            speed(torch, torch_ns),
            speed(mlx, mlx_ns),
            format!("{mark}{ratio}×{mark} ({low} to {high}{separate})"),
        ]
    }
}

/// Returns the alternative text of the picture.
pub fn picture_text(answers: &[Answer<'_>]) -> String {
    let sentences: Vec<String> = answers.iter().map(Answer::sentence).collect();
    format!("Training speed: {}", sentences.join(", and "))
}

/// Returns a Markdown link to the report of a baseline.
fn link(text: &str, baseline: &str, anchor: &str) -> String {
    format!("[{}](criterion-baselines/{baseline}/report.md{anchor})", text::markdown(text))
}

/// Lists different values in their order: `3`, `3 or 5`.
fn list_different<T: Ord + ToString>(values: impl Iterator<Item = T>, conjunction: &str) -> String {
    let values: std::collections::BTreeSet<T> = values.collect();
    values.iter().map(T::to_string).collect::<Vec<_>>().join(conjunction)
}

/// Returns README.md's results: a table with a row per device, and the picture.
pub fn answer(answers: &[Answer<'_>]) -> Result<String> {
    let (model, batch) = HEADLINE_SHAPE.model().context("the headline has a model")?;
    let mut rows: Vec<Vec<String>> = answers.iter().map(Answer::row).collect();
    if !answers.iter().any(|answer| answer.baseline.results.machine.os.contains("macOS")) {
        let missing = "Apple silicon: no results yet ([send yours](CONTRIBUTING.md#send-results))";
        rows.push([missing, "–", "–", "–"].map(str::to_owned).into());
    }
    let header = "machine|PyTorch, samples/s|MLX, samples/s|PyTorch speed / MLX speed (95 % CI)";
    let text = text::html(&picture_text(answers));
    let rounds = list_different(answers.iter().filter_map(|answer| answer.comparison.rounds), " or ");
    let mut origin = String::new();
    if !rounds.is_empty() {
        origin += &format!("Speeds and ratios come from {rounds} interleaved rounds of fresh processes. ");
    }
    if answers.iter().any(|answer| answer.comparison.rounds.is_none()) {
        origin += "The ratio of a row that was not interleaved is that of two medians from one run. ";
    }
    Ok(format!(
        "The table shows the training speed of `{}`, a {:.1} M-parameter {}, at batch {batch} × {} tokens. It compares the \
         fastest variant of each framework that stores its parameters in f32.\n\n{}\n\
         {origin}The runs are from {}.\n\n\
         <picture><source media=\"(prefers-color-scheme: dark)\" srcset=\"criterion-baselines/answer-dark.svg\">\
         <img src=\"criterion-baselines/answer-light.svg\" alt=\"{text}\"></picture>\n",
        model.name,
        HEADLINE_SHAPE.parameter_count() as f64 / 1e6,
        if model.causal { "decoder" } else { "encoder" },
        model.tokens,
        table_of_markdown(&Table::new("", "", header, rows)),
        list_different(answers.iter().map(|answer| &answer.baseline.results.machine.date), " and "),
    ))
}

/// Returns README.md's table of the scaling over GPUs: for each kind of machine the newest run that has it.
pub fn scaling(all: &[PublishedBaseline]) -> String {
    let mut newest: Vec<(&PublishedBaseline, String)> = Vec::new();
    for baseline in all {
        let text = scaling_table(baseline);
        // On one day, the run that compares no frameworks measured the scaling more carefully.
        let age = |b: &PublishedBaseline| (b.results.machine.date.clone(), b.pairs().is_empty());
        match newest.iter_mut().find(|(other, _)| other.hardware() == baseline.hardware()) {
            _ if text.is_empty() => {}
            Some(other) if age(other.0) < age(baseline) => *other = (baseline, text),
            Some(_) => {}
            None => newest.push((baseline, text)),
        }
    }
    newest.into_iter().map(|(_, text)| text).collect::<Vec<_>>().join("\n")
}

fn scaling_table(baseline: &PublishedBaseline) -> String {
    let measured = all_measured(&baseline.results);
    let cell = |speedup: Option<Speedup>| {
        speedup.map_or_else(
            || "–".to_owned(),
            |s| format!("{:.2}× ({}) with {}, `{}`", s.value, percent(s.efficiency), s.batch, s.method),
        )
    };
    let row = |model: ModelScaling| {
        let name = format!("`{}`, {}", model.model, model.backend.framework().label());
        vec![name, cell(model.weak), cell(model.strong)]
    };
    let rows: Vec<Vec<String>> = scaling::by_model(&measured).into_iter().map(row).collect();
    if rows.is_empty() {
        return String::new();
    }
    let header = vec![
        link(&baseline.hardware(), &baseline.name, "#multiple-devices"),
        "weak scaling: speedup (efficiency)".to_owned(),
        "strong scaling: speedup (efficiency)".to_owned(),
    ];
    table_of_markdown(&Table::with_header("", "", header, rows))
}

/// Returns the training speeds of each machine.
pub fn training_speeds(all: &[PublishedBaseline]) -> Result<String> {
    let mut blocks = Vec::new();
    for baseline in all.iter().filter(|baseline| !baseline.pairs().is_empty()) {
        let speeds = tables::first(&baseline.results).context("a training step was measured")?;
        let m = &baseline.results.machine;
        let version = |name: &str| m.versions.iter().find(|v| v.0 == name).map_or("?", |v| v.1.as_str());
        let [hardware, torch, mlx, commit] =
            [&baseline.hardware(), version("PyTorch"), version("MLX"), &m.commit].map(text::markdown);
        blocks.push(format!(
            "{hardware}, {}, {}: PyTorch {torch}, MLX {mlx}, commit {commit} ({}):\n\n{}",
            baseline.results.headline(),
            m.date,
            text::markdown_code(&baseline.name),
            table(&speeds)
        ));
    }
    Ok(blocks.join("\n"))
}

/// Returns the list of baselines.
pub fn baselines(all: &[PublishedBaseline]) -> String {
    let row = |baseline: &PublishedBaseline| {
        let m = &baseline.results.machine;
        let name = text::markdown_code(&baseline.name);
        let date = if m.date.is_empty() { "–" } else { &m.date };
        let [hardware, commit] = [&baseline.hardware(), &m.commit].map(|t| text::markdown(t));
        let counts = [all_measured(&baseline.results).len(), baseline.results.interleaved.len()];
        cells([&name, &hardware, &date, &commit, &counts[0], &counts[1]])
    };
    let header = "baseline|machine|date|commit|cases|interleaved";
    table_of_markdown(&Table::new("", "", header, all.iter().map(row).collect()))
}

/// Returns the results of the Python counterparts, a table per machine.
///
/// # Errors
/// Returns an error if a `python.csv` is damaged.
pub fn python_results(root: &Path) -> Result<String> {
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root)?.flatten().map(|entry| entry.path()).collect();
    folders.sort();
    let mut blocks = Vec::new();
    for folder in folders {
        let results = python::read(&folder)?;
        let rows: Vec<Vec<String>> = results.iter().map(|result| result.row(&results)).collect();
        if !rows.is_empty() {
            let name = folder.file_name().unwrap_or_default().to_string_lossy();
            let table = table_of_markdown(&Table::new("", "", PythonResult::HEADER, rows));
            blocks.push(format!("{}:\n\n{table}", text::markdown_code(&name)));
        }
    }
    Ok(blocks.join("\n"))
}
