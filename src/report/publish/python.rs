//! Results of the Python counterparts: `<machine>/python.csv`, which `scripts/compare-python --save` writes.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::files;
use crate::report::format::{digits, or_dash, range};
use crate::report::table::cells;
use crate::results::validate;
use crate::suite::Case;
use crate::text::{markdown, printable};

/// A step of this suite or of a program in Python. The steps of a group were timed in the same rounds.
#[derive(Clone, Debug, Deserialize)]
pub struct PythonResult {
    pub date: String,
    pub group: String,
    pub case: String,
    /// `this suite`, or the variant of the Python step: `eager`, `torch.compile, reduce-overhead`, …
    pub program: String,
    /// Median step time in milliseconds.
    pub ms: f64,
    /// 95 % confidence interval of the median within one run. Older results lack it.
    low: Option<f64>,
    high: Option<f64>,
}

/// The program of a row that this suite runs.
const SUITE: &str = "this suite";

impl PythonResult {
    pub const HEADER: &str = "case|program|ms|95 % CI within one run|time / this suite|date";

    /// Returns the cells of a row below [`Self::HEADER`]. `all` has the other rows of its group.
    pub fn row(&self, all: &[Self]) -> Vec<String> {
        let is_suite = |other: &&Self| {
            (&other.group, &other.case, other.program.as_str()) == (&self.group, &self.case, SUITE)
        };
        let ratio = all.iter().find(is_suite).filter(|_| self.program != SUITE);
        let ratio = ratio.map(|suite| format!("{:.2}", self.ms / suite.ms));
        let interval = self.low.zip(self.high).map(|(low, high)| range([low, high]));
        let case = format!("`{}`", self.case);
        let program = markdown(&self.program);
        cells([&case, &program, &digits(self.ms), &or_dash(interval), &or_dash(ratio), &self.date])
    }
}

/// Reads a machine's `python.csv`. Returns no rows if the machine has none.
///
/// # Errors
/// Returns an error if the file is damaged.
pub fn read(folder: &Path) -> Result<Vec<PythonResult>> {
    let path = folder.join("python.csv");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let advice = || format!("{} is damaged: restore it from git, or remove it", path.display());
    parse(&files::read_text(&path)?).with_context(advice)
}

pub(crate) fn parse(text: &str) -> Result<Vec<PythonResult>> {
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let mut rows: Vec<PythonResult> = reader.deserialize().collect::<Result<_, _>>()?;
    ensure!(!rows.is_empty(), "it has no row");
    for row in &mut rows {
        row.case.parse::<Case>().map_err(anyhow::Error::msg)?;
        let low_to_high = [row.low.unwrap_or(row.ms), row.ms, row.high.unwrap_or(row.ms)];
        ensure!(
            low_to_high.iter().all(|v| v.is_finite() && *v > 0.0) && low_to_high.is_sorted(),
            "{} has no time with an interval",
            row.case
        );
        ensure!(validate::is_day(&row.date), "{} has no date such as 2026-11-25", row.case);
        row.program = printable(&row.program);
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "date,group,case,program,ms,low,high\n";
    const ROW: &str = "2026-11-25,g,train-step/mlx-cpu/f32/indicator-b16,this suite,1340,1300,1400\n";

    #[test]
    fn the_ratio_of_a_row_is_that_of_two_printed_times() {
        let python = ROW.replace("this suite,1340,1300,1400", "mx.compile,1273,,");
        let other = ROW.replace(",g,", ",h,").replace("1340", "1350");
        let rows = parse(&format!("{HEADER}{other}{ROW}{python}")).unwrap();
        let cells: Vec<Vec<String>> = rows.iter().map(|row| row.row(&rows)).collect();
        let id = "`train-step/mlx-cpu/f32/indicator-b16`";
        assert_eq!(cells[1], [id, "this suite", "1,340", "1,300 to 1,400", "–", "2026-11-25"]);
        assert_eq!(cells[2], [id, "mx.compile", "1,273", "–", "0.95", "2026-11-25"]);
    }

    #[test]
    fn damaged_files_and_those_of_others_are_errors() {
        assert!(parse(&format!("{HEADER}{ROW}")).is_ok());
        for (text, word) in [
            (String::new(), "no row"),
            (HEADER.to_owned(), "no row"),
            ("a,b\n1,2\n".to_owned(), "missing field"),
            ("\0\0".to_owned(), "no row"),
            (format!("{HEADER}{}", ROW.replace("f32", "f99")), "unknown precision"),
            (format!("{HEADER}{}", ROW.replace("1340", "-1")), "no time"),
            (format!("{HEADER}{}", ROW.replace("1300,1400", "1400,1300")), "no time"),
            (format!("{HEADER}{}", ROW.replace("2026-11-25", "![i](http://x)")), "no date"),
        ] {
            let error = format!("{:#}", parse(&text).unwrap_err());
            assert!(error.contains(word), "{text:?}: {error}");
        }
        let rows = parse(&format!("{HEADER}{}", ROW.replace("this suite", "[l](x)\u{1b}"))).unwrap();
        assert_eq!(rows[0].row(&rows)[1], "\\[l](x) ");
    }
}
