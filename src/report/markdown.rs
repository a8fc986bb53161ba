//! `report.md`, which is also what the terminal shows.

use std::fmt::Write;

use super::{summary, tables};
use crate::results::Results;

/// Text as a cell or a line of Markdown shows it: no HTML, no new column, no new line, and no
/// code that a terminal would follow.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '|' => out.push_str("\\|"),
            '<' => out.push_str("&lt;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// A Markdown table whose columns line up as plain text too.
pub fn table(out: &mut String, header: &[&str], rows: &[Vec<String>]) {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| escaped(cell)).collect()).collect();
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

/// The whole report; `command` measures it again.
pub fn render(results: &Results, command: &str) -> String {
    let mut out = String::from("# transformer-bench");
    if let Some(own) = &results.model {
        let _ = write!(out, ": {}", own.configuration.name);
    }
    out.push_str("\n\n");
    if let Some(line) = tables::model_line(results) {
        let _ = writeln!(out, "{}\n", escaped(&line));
    }
    for sentence in summary::answer(results) {
        let _ = writeln!(out, "**{}**\n", escaped(&sentence));
    }
    let [hardware, versions] = tables::machine_lines(results);
    let _ = writeln!(out, "{}. {}\n", tables::quiet(results).1, summary::limits(results));
    let _ = writeln!(out, "{}  \n{}\n", escaped(&hardware), escaped(&versions));
    let show = |out: &mut String, shown: &tables::Table| {
        let _ = writeln!(out, "## {}\n", shown.title);
        if !shown.note.is_empty() {
            let _ = writeln!(out, "{}\n", shown.note);
        }
        table(out, shown.header, &shown.rows);
    };
    let list = |out: &mut String, title: &str, lines: Vec<String>| {
        if !lines.is_empty() {
            let _ = writeln!(out, "{title}\n");
            lines.iter().for_each(|line| {
                let _ = writeln!(out, "- {}", escaped(line));
            });
            out.push('\n');
        }
    };
    tables::first(results).iter().for_each(|first| show(&mut out, first));
    list(&mut out, "Not measured here:", tables::missing(results));
    list(&mut out, "## What else it says", summary::verdict(results));
    tables::all(results).iter().for_each(|other| show(&mut out, other));
    let _ = writeln!(out, "Measured with `{}`.", escaped(command));
    if let Some(text) = tables::invitation(results) {
        let _ = writeln!(out, "\n{text}");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::headlines;
    use super::super::tests::record;
    use super::*;
    use crate::results::machine::Machine;
    use crate::results::{Record, Status};
    use crate::suite::Case;

    #[test]
    fn hostile_text_stays_text() {
        assert_eq!(escaped("a|b\n<script>\u{1b}[31m"), "a\\|b &lt;script> [31m");
        let mut results =
            Results::new(Machine { cpu: "<b>|\n\u{1b}]0;x".to_owned(), ..Machine::default() }, Vec::new());
        results.cases.push(Record::unmeasured(
            &"forward/torch-cpu/f32/indicator-b16".parse().unwrap(),
            Status::Skipped,
            "<img src=x>|\u{7}",
        ));
        let text = render(&results, "x");
        assert!(
            !text.contains("<b>")
                && !text.contains("<img")
                && !text.contains('\u{1b}')
                && !text.contains('\u{7}'),
            "{text}"
        );
    }

    #[test]
    fn a_mac_is_asked_for_its_figures() {
        let on = |os: &str| {
            render(&Results::new(Machine { os: os.to_owned(), ..Machine::default() }, Vec::new()), "x")
        };
        assert!(on("macOS 15.6 Sequoia").contains("baseline save first-mac"));
        assert!(!on("Linux (Debian GNU/Linux 12)").contains("first-mac"));
    }

    #[test]
    fn every_headline_row_is_there_with_a_figure_or_a_reason() {
        let mps: Case = "train-step/torch-mps/f32/indicator-b16".parse().unwrap();
        let results = Results::new(
            Machine::default(),
            vec![
                record("train-step/torch-cpu/f32/indicator-b16", 500e6),
                record("train-step/mlx-cpu/f32/indicator-b16", 1000e6),
                Record::unmeasured(&mps, Status::Skipped, "no Mac"),
            ],
        );
        let text = render(&results, "./scripts/bench --quick");
        // In the tables of speed and memory, or once with the reason.
        let lines = |label: &str| -> Vec<&str> {
            let first = |line: &&str| line.split('|').nth(1).is_some_and(|cell| cell.trim() == label);
            text.lines().filter(first).collect()
        };
        let (_, reasons) = text.split_once("Not measured here:").unwrap();
        let (reasons, _) = reasons.split_once("\n#").unwrap();
        for row in headlines(&results) {
            let told = reasons.matches(&row.label).count() > 0;
            assert!(lines(&row.label).len() == 2 || told, "{}", row.label);
        }
        let line = |label: &str| lines(label)[0].to_owned();
        assert!(line("PyTorch CPU").contains("32.0") && line("PyTorch CPU").contains("1.00×"));
        assert!(line("MLX (CPU)").contains("16.0") && line("MLX (CPU)").contains("0.50×"));
        let mps = reasons.lines().find(|line| line.contains("PyTorch MPS,")).unwrap();
        assert!(mps.contains("torch-mps: no Mac"), "{mps}");
    }
}
