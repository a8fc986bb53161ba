//! A table, and the text of its cells.

use std::fmt::Display;

use super::Measured;
use super::format::{or_dash, prefixed, speed};

/// A table with its title and an explanation.
#[derive(Clone, Debug)]
pub struct Table {
    pub title: String,
    pub note: String,
    pub header: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// Creates a table without the columns that are empty in all rows. `header` is `first|second|…`.
    pub fn new(title: impl Into<String>, note: &str, header: &str, rows: Vec<Vec<String>>) -> Self {
        Self::with_header(title, note, header.split('|').map(str::to_owned).collect(), rows)
    }

    /// Creates a table whose column titles may contain any character.
    pub fn with_header(
        title: impl Into<String>,
        note: &str,
        mut header: Vec<String>,
        mut rows: Vec<Vec<String>>,
    ) -> Self {
        for column in (0..header.len()).rev() {
            if rows.iter().all(|row| row[column].is_empty()) {
                header.remove(column);
                rows.iter_mut().for_each(|row| drop(row.remove(column)));
            }
        }
        Self { title: title.into(), note: note.to_owned(), header, rows }
    }

    /// Returns the columns of numbers, which are aligned to the right.
    pub fn numeric_columns(&self) -> Vec<bool> {
        let cells = |column: usize| {
            self.rows.iter().map(move |row| row[column].as_str()).filter(|cell| !matches!(*cell, "" | "–"))
        };
        (0..self.header.len())
            .map(|column| cells(column).next().is_some() && cells(column).all(starts_with_number))
            .collect()
    }
}

/// Returns true for texts such as `11,611 samples/s`, `±0.36 %`, `1.68×` and `**6.3×** (3.4 to 12)`.
fn starts_with_number(cell: &str) -> bool {
    let word = cell.split_whitespace().next().unwrap_or_default().trim_matches('*');
    let number = word.trim_start_matches('±').trim_end_matches('×').replace(',', "");
    number.starts_with(|c: char| c.is_ascii_digit() || c == '-') && number.parse::<f64>().is_ok()
}

/// Formats the cells of a row.
pub(super) fn cells<const N: usize>(values: [&dyn Display; N]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

/// Formats the work per second, in the unit of the model if the case has one.
pub(super) fn throughput(m: &Measured<'_>) -> String {
    or_dash(m.record.throughput.as_ref().map(|throughput| match throughput.unit.as_str() {
        "samples/s" => speed(m.case.shape, m.median_ns),
        unit => prefixed(throughput.value) + unit,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_columns_are_dropped_and_numbers_are_found() {
        let rows = [["a", "1,545", "", "–", "2, NCCL"], ["b", "±0.36 %", "", "1.68×", "3"]];
        let rows = rows.iter().map(|row| row.map(str::to_owned).into()).collect();
        let table = Table::new("", "", "name|x|remarks|y|z", rows);
        assert_eq!(table.header, ["name", "x", "y", "z"]);
        assert_eq!(table.rows[1], ["b", "±0.36 %", "1.68×", "3"]);
        assert_eq!(table.numeric_columns(), [false, true, true, true]);
        for text in ["2026-11-25", "16: 792", "eager 6.1", "60bb46", "±", ""] {
            assert!(!starts_with_number(text), "{text}");
        }
    }
}
