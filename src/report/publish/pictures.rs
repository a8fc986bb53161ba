//! The pictures of README.md and src/compare/README.md.

use anyhow::{Context, Result};
use plotters::prelude::*;

use super::Kept;
use crate::report::plots::{Bar, INK, LARGE, SMALL, bars_into, colour, drawn_on_paper, legend, text, wrong};
use crate::report::tables::digits;
use crate::report::{find, headlines, measured, rate};

/// The training step of every machine's baseline, both frameworks, and grey below a bar the same step in Python.
pub fn answer(all: &[&Kept]) -> Result<String> {
    const PYTHON: (&str, RGBColor) =
        ("the same step written in Python, by the ratio of interleaved rounds", RGBColor(170, 170, 170));
    let sections: Vec<(String, Vec<Bar>)> = all.iter().map(|kept| section(kept, PYTHON.1)).collect();
    let height: i32 = sections.iter().map(|(_, rows)| 34 + bars_into(None, rows, 0).unwrap_or(0)).sum();
    drawn_on_paper((height + 30) as u32, |area| {
        legend(area, &[PYTHON], 6)?;
        let mut top = 30;
        for (title, rows) in &sections {
            text(area, title, (4, top + 6), LARGE + 3)?;
            top += 34;
            top += bars_into(Some(area), rows, top)?;
        }
        Ok(())
    })
}

fn section(kept: &Kept, grey: RGBColor) -> (String, Vec<Bar>) {
    let (results, shape) = (&kept.results, kept.results.headline());
    let mut rows = Vec::new();
    for row in headlines(results) {
        let Some((_, median, [low, high])) = measured(find(results, &row.case)) else { continue };
        let (speed, unit) = rate(shape, median);
        rows.push(Bar {
            label: row.label,
            segments: vec![(speed, colour(row.case.backend))],
            interval: Some([rate(shape, high).0, rate(shape, low).0]),
            note: format!("{} {unit}", digits(speed)),
        });
        if let Some(twin) = kept.twin(&row.case) {
            rows.push(Bar {
                label: String::new(),
                segments: vec![(speed * twin.ratio, grey)],
                interval: None,
                note: format!("{}, Python", digits(speed * twin.ratio)),
            });
        }
    }
    (format!("{}, training {shape}", kept.title()), rows)
}

/// How often a comparison called what was slower by a share, in per cent; with the interval of that.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trial {
    slowdown: f64,
    loaded: bool,
    called: [f64; 3],
}

/// Reads the table that `calibrate --curve --write` wrote into src/compare/README.md.
pub fn trials(page: &str) -> Result<Vec<Trial>> {
    let (_, rest) =
        page.split_once("<!-- power -->").context("src/compare/README.md has no table of power")?;
    let (table, _) =
        rest.split_once("<!-- end of power -->").context("src/compare/README.md has no end of it")?;
    let numbers = |cell: &str| -> Vec<f64> {
        cell.split(|c: char| !c.is_ascii_digit() && c != '.').filter_map(|word| word.parse().ok()).collect()
    };
    let row = |line: &str| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let slowdown = *numbers(cells.get(1)?).first()?;
        let called = numbers(cells.get(5)?).try_into().ok()?;
        Some(Trial { slowdown, loaded: *cells.get(3)? == "loaded", called })
    };
    Ok(table.lines().filter_map(row).collect())
}

/// The share of slowdowns that were called, over their size, idle and loaded.
pub fn power(trials: &[Trial]) -> Result<String> {
    const KINDS: [(&str, bool, RGBColor); 2] =
        [("machine as it was", false, RGBColor(0, 114, 178)), ("loaded", true, RGBColor(213, 94, 0))];
    drawn_on_paper(360, |area| {
        legend(area, &KINDS.map(|(name, _, colour)| (name, colour)), 6)?;
        let (upper, plot) = area.split_vertically(28);
        drop(upper);
        let mut chart = ChartBuilder::on(&plot)
            .margin(8)
            .margin_right(24)
            .x_label_area_size(50)
            .y_label_area_size(70)
            .build_cartesian_2d(-0.3..10.3, 0.0..102.0)
            .map_err(wrong)?;
        chart
            .configure_mesh()
            .x_desc("head is slower by, %")
            .y_desc("called slower, %")
            .x_labels(11)
            .y_labels(6)
            .x_label_formatter(&|v| format!("{v:.0}"))
            .y_label_formatter(&|v| format!("{v:.0}"))
            .max_light_lines(0)
            .label_style(("sans-serif", SMALL))
            .draw()
            .map_err(wrong)?;
        let threshold = [(2.0, 0.0), (2.0, 100.0)];
        chart.draw_series(DashedLineSeries::new(threshold, 4, 4, INK.stroke_width(1))).map_err(wrong)?;
        for (_, loaded, colour) in KINDS {
            // Beside each other, where both are.
            let aside = if loaded { 0.06 } else { -0.06 };
            let points: Vec<(f64, [f64; 3])> = trials
                .iter()
                .filter(|t| t.loaded == loaded)
                .map(|t| (t.slowdown + aside, t.called))
                .collect();
            let line = points.iter().map(|&(x, [share, ..])| (x, share));
            chart.draw_series(LineSeries::new(line, colour.stroke_width(2)).point_size(3)).map_err(wrong)?;
            let whiskers = points.iter().map(|&(x, [_, low, high])| {
                PathElement::new(vec![(x, low), (x, high)], colour.stroke_width(1))
            });
            chart.draw_series(whiskers).map_err(wrong)?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_trials_is_read() {
        let page = "<!-- power -->\n| head is slower by | threshold | machine | comparisons | called slower | rest |\n\
                    | --- | --- | --- | --- | --- | --- |\n| 1.5 % | 2 % | loaded | 40 | 12.5 % (4.2 to 26.8) | 0 |\n\
                    <!-- end of power -->";
        assert_eq!(trials(page).unwrap(), [Trial { slowdown: 1.5, loaded: true, called: [12.5, 4.2, 26.8] }]);
        assert!(trials("").is_err());
    }
}
