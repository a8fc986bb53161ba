//! `report.md`, which the terminal shows too.

use std::fmt::Write;

use super::table::Table;
use super::{notes, summary, tables};
use crate::results::Results;
use crate::text;

/// Formats a table of plain text, with columns that are aligned in plain text too.
pub fn table(table: &Table) -> String {
    let escaped = |row: &Vec<String>| row.iter().map(|cell| text::markdown(cell)).collect();
    format_table(
        std::iter::once(&table.header).chain(&table.rows).map(escaped).collect(),
        &table.numeric_columns(),
    )
}

/// Formats a table whose cells are Markdown: their authors have escaped all text from files.
pub fn table_of_markdown(table: &Table) -> String {
    format_table(
        std::iter::once(&table.header).chain(&table.rows).cloned().collect(),
        &table.numeric_columns(),
    )
}

fn format_table(rows: Vec<Vec<String>>, numeric: &[bool]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0).max(3);
    let widths: Vec<usize> = (0..numeric.len()).map(width).collect();
    let mut out = String::new();
    for (index, row) in rows.iter().enumerate() {
        for ((cell, &width), numeric) in row.iter().zip(&widths).zip(numeric) {
            let _ =
                if *numeric { write!(out, "| {cell:>width$} ") } else { write!(out, "| {cell:<width$} ") };
        }
        out.push_str("|\n");
        if index == 0 {
            for (&width, numeric) in widths.iter().zip(numeric) {
                let _ = if *numeric {
                    write!(out, "| {:->1$}: ", "", width - 1)
                } else {
                    write!(out, "| {:->width$} ", "")
                };
            }
            out.push_str("|\n");
        }
    }
    out
}

/// Renders the whole report. `command` repeats the run.
pub fn render(results: &Results, command: &str) -> String {
    let mut out = String::from("# transformer-bench");
    if let Some(custom) = &results.model {
        let _ = write!(out, ": {}", text::markdown(custom.configuration.name));
    }
    out.push_str("\n\n");
    if let Some(line) = notes::model_line(results) {
        let _ = writeln!(out, "{}\n", text::markdown(&line));
    }
    for sentence in summary::answer(results) {
        let _ = writeln!(out, "**{sentence}**\n");
    }
    let [hardware, versions] = notes::machine_lines(results);
    let _ = writeln!(out, "{} {}\n", notes::disturbance(results).1, summary::limits(results));
    let _ = writeln!(out, "{}  \n{}\n", text::markdown(&hardware), text::markdown(&versions));
    let show = |out: &mut String, shown: &Table| {
        let _ = writeln!(out, "## {}\n", shown.title);
        if !shown.note.is_empty() {
            let _ = writeln!(out, "{}\n", shown.note);
        }
        let _ = writeln!(out, "{}", table(shown));
    };
    let list = |out: &mut String, title: &str, lines: Vec<String>| {
        if !lines.is_empty() {
            let _ = writeln!(out, "{title}\n");
            lines.iter().for_each(|line| {
                let _ = writeln!(out, "- {line}");
            });
            out.push('\n');
        }
    };
    tables::first(results).iter().for_each(|first| show(&mut out, first));
    let missing = notes::not_measured(results).iter().map(|line| text::markdown(line)).collect();
    list(&mut out, "Not measured:", missing);
    list(&mut out, "## More findings", summary::findings(results));
    tables::all(results).iter().for_each(|other| show(&mut out, other));
    let _ = writeln!(out, "To repeat the run: {}", text::markdown_code(command));
    if let Some(text) = notes::invitation(results) {
        let _ = writeln!(out, "\n{text}");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::headline::headlines;
    use super::super::tests::{record, run};
    use super::*;
    use crate::results::machine::Machine;
    use crate::results::{Record, Status};
    use crate::suite::Case;

    #[test]
    fn hostile_text_stays_text() {
        let cpu = "# <b>|\n\u{1b}]0;x [l](http://x)".to_owned();
        let mut results = Results::new(Machine { cpu, ..Machine::default() }, Vec::new());
        results.cases.push(Record::unmeasured(
            &"forward/torch-cpu/f32/indicator-b16".parse().unwrap(),
            Status::Skipped,
            "<img src=x>|\u{7} ![i](http://x) `code`",
        ));
        let text = render(&results, "x");
        assert!(!text.contains("<b>") && !text.contains("<img"), "{text}");
        assert!(!text.contains(['\u{1b}', '\u{7}']), "{text}");
        assert!(text.contains("\n\\# &lt;b>\\| ") && text.contains(" \\[l](http://x)"), "{text}");
        assert!(text.contains("!\\[i](http://x) \\`code\\`"), "{text}");
    }

    #[test]
    fn columns_of_numbers_are_aligned_to_the_right() {
        let rows = [["PyTorch|", "9.5"], ["MLX", "1,085"]];
        let rows = rows.iter().map(|row| row.map(str::to_owned).into()).collect();
        let text = table(&Table::new("", "", "|samples/s", rows));
        let expected = "|           | samples/s |\n| --------- | --------: |\n| PyTorch\\| |       9.5 |\n\
                        | MLX       |     1,085 |\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_mac_is_asked_for_its_results() {
        let on = |os: &str| {
            render(&Results::new(Machine { os: os.to_owned(), ..Machine::default() }, Vec::new()), "x")
        };
        assert!(on("macOS 15.6 Sequoia").contains("baseline save first-mac"));
        assert!(!on("Linux (Debian GNU/Linux 12)").contains("first-mac"));
    }

    #[test]
    fn every_headline_row_has_a_result_or_a_reason() {
        let mps: Case = "train-step/torch-mps/f32/indicator-b16".parse().unwrap();
        let mut results = run(&[]);
        results.cases = vec![
            record("train-step/torch-cpu/f32/indicator-b16", 500e6),
            record("train-step/mlx-cpu/f32/indicator-b16", 1000e6),
            Record::unmeasured(&mps, Status::Skipped, "no Mac"),
        ];
        let text = render(&results, "./scripts/bench --quick");
        // A row is in the tables of speed and memory, or once with the reason.
        let lines = |label: &str| -> Vec<&str> {
            let first = |line: &&str| line.split('|').nth(1).is_some_and(|cell| cell.trim() == label);
            text.lines().filter(first).collect()
        };
        let (_, reasons) = text.split_once("Not measured:").unwrap();
        let (reasons, _) = reasons.split_once("\n#").unwrap();
        for row in headlines(&results) {
            let reported = reasons.matches(&row.label).count() > 0;
            assert!(lines(&row.label).len() == 2 || reported, "{}", row.label);
        }
        let line = |label: &str| lines(label)[0].to_owned();
        assert!(line("PyTorch CPU").contains("32.0") && line("PyTorch CPU").contains("1.00×"));
        assert!(line("MLX (CPU)").contains("16.0") && line("MLX (CPU)").contains("0.50×"));
        let mps = reasons.lines().find(|line| line.contains("PyTorch MPS,")).unwrap();
        assert!(mps.contains("torch-mps: no Mac"), "{mps}");
    }
}
