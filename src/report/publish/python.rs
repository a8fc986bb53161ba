//! Results of the Python counterparts: `<machine>/python.csv`, which `scripts/compare-python --save` writes.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::files;
use crate::report::format::digits;
use crate::report::table::cells;
use crate::results::upgrade::upgrade_id;
use crate::results::validate;
use crate::suite::Case;
use crate::text::{markdown, printable};

/// A training step and its Python counterpart, measured interleaved.
#[derive(Clone, Debug, Deserialize)]
pub struct PythonResult {
    pub date: String,
    pub case: String,
    /// Variant of the Python step: `eager`, `torch.compile, reduce-overhead`, …
    pub python: String,
    #[serde(alias = "ours_ms")]
    pub suite_ms: f64,
    pub python_ms: f64,
    /// Suite time / Python time, the median over the rounds.
    pub ratio: f64,
    /// Quartiles of the rounds' ratios. Older files lack them.
    low: Option<f64>,
    high: Option<f64>,
}

impl PythonResult {
    pub const HEADER: &str = "case|Python counterpart|this suite, ms|Python, ms|ratio (quartiles)|date";

    /// Returns the cells of a row below [`Self::HEADER`].
    pub fn row(&self) -> Vec<String> {
        let quartiles = self.low.zip(self.high).map(|(low, high)| format!(" ({low:.2} to {high:.2})"));
        let ratio = format!("{:.2}{}", self.ratio, quartiles.unwrap_or_default());
        let case = format!("`{}`", self.case);
        let [suite, python] = [self.suite_ms, self.python_ms].map(digits);
        cells([&case, &markdown(&self.python), &suite, &python, &ratio, &self.date])
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
    // The column was renamed together with the ids.
    let old_ids = reader.headers()?.iter().any(|name| name == "ours_ms");
    let mut rows: Vec<PythonResult> = reader.deserialize().collect::<Result<_, _>>()?;
    ensure!(!rows.is_empty(), "it has no row");
    for row in &mut rows {
        if old_ids {
            row.case = upgrade_id(&row.case, 2);
        }
        row.case.parse::<Case>().map_err(anyhow::Error::msg)?;
        let times = [row.suite_ms, row.python_ms, row.ratio];
        let low_to_high = [row.low.unwrap_or(row.ratio), row.ratio, row.high.unwrap_or(row.ratio)];
        ensure!(
            times.iter().chain(&low_to_high).all(|v| v.is_finite() && *v > 0.0) && low_to_high.is_sorted(),
            "{} has no times with a ratio",
            row.case
        );
        ensure!(validate::is_day(&row.date), "{} has no date such as 2026-11-25", row.case);
        row.python = printable(&row.python);
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_with_old_ids_are_translated() {
        let rows = |column, method| {
            let text = format!(
                "date,case,python,{column},python_ms,ratio,low,high\n\
                 2026-11-25,train-step/torch-cpu/{method}/indicator-b16,eager,445.2,485.3,0.897,0.875,0.947\n\
                 2026-11-25,train-step/mlx-cpu/f32/indicator-b16,eager,1340,1388,0.967,,\n"
            );
            parse(&text).unwrap().iter().map(PythonResult::row).collect::<Vec<_>>()
        };
        let old = rows("ours_ms", "amp");
        assert_eq!(old, rows("suite_ms", "mixed"));
        let id = "`train-step/torch-cpu/mixed/indicator-b16`";
        assert_eq!(old[0], [id, "eager", "445", "485", "0.90 (0.88 to 0.95)", "2026-11-25"]);
        assert_eq!(old[1][2..5], ["1,340", "1,388", "0.97"]);
    }

    #[test]
    fn damaged_files_and_those_of_others_are_errors() {
        const HEADER: &str = "date,case,python,suite_ms,python_ms,ratio,low,high\n";
        const ROW: &str = "2026-11-25,train-step/mlx-cpu/f32/indicator-b16,eager,1340,1388,0.967,,\n";
        assert!(parse(&format!("{HEADER}{ROW}")).is_ok());
        for (text, word) in [
            (String::new(), "no row"),
            (HEADER.to_owned(), "no row"),
            ("a,b\n1,2\n".to_owned(), "missing field"),
            ("\0\0".to_owned(), "no row"),
            (format!("{HEADER}{}", ROW.replace("f32", "f99")), "unknown precision"),
            (format!("{HEADER}{}", ROW.replace("1340", "-1")), "no times"),
            (format!("{HEADER}{}", ROW.replace(",,", ",2,1")), "no times"),
            (format!("{HEADER}{}", ROW.replace("2026-11-25", "![i](http://x)")), "no date"),
        ] {
            let error = format!("{:#}", parse(&text).unwrap_err());
            assert!(error.contains(word), "{text:?}: {error}");
        }
        let row = parse(&format!("{HEADER}{}", ROW.replace("eager", "[l](x)\u{1b}"))).unwrap()[0].row();
        assert_eq!(row[1], "\\[l](x) ");
    }
}
