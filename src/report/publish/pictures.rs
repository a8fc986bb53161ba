//! The pictures of README.md and src/compare/README.md.

use anyhow::{Context, Result};
use plotters::prelude::*;

use super::PublishedBaseline;
use crate::compare::decision::THRESHOLD;
use crate::report::plots::{Bar, INK, LARGE, SMALL, bars_into, drawn_on_paper, legend, speeds, text, wrong};
use crate::report::tables::digits;

/// The training step of every machine's baseline, both frameworks, and grey below a bar the same step in Python.
pub fn answer(all: &[&PublishedBaseline]) -> Result<String> {
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

fn section(kept: &PublishedBaseline, grey: RGBColor) -> (String, Vec<Bar>) {
    let mut rows = Vec::new();
    for (case, bar) in speeds(&kept.results) {
        let python = kept.python_result(&case).map(|twin| bar.segments[0].0 * twin.ratio);
        rows.push(bar);
        rows.extend(python.map(|speed| Bar {
            label: String::new(),
            segments: vec![(speed, grey)],
            interval: None,
            note: format!("{}, Python", digits(speed)),
        }));
    }
    (format!("{}, training {}", kept.title(), kept.results.headline()), rows)
}

/// How often comparisons called what was slower by a share, in per cent; with the interval of that.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trial {
    slowdown: f64,
    loaded: bool,
    comparisons: f64,
    called: [f64; 3],
}

/// Reads the tables that `calibrate --write` and `calibrate --curve --write` put into src/compare/README.md:
/// what was tried with the default threshold, of two rows of the same slowdown that of more comparisons.
pub fn trials(page: &str) -> Result<Vec<Trial>> {
    let numbers = |cell: &str| -> Vec<f64> {
        cell.split(|c: char| !c.is_ascii_digit() && c != '.').filter_map(|word| word.parse().ok()).collect()
    };
    let row = |line: &str| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let number = |column: usize| numbers(cells.get(column)?).first().copied();
        (number(2)? == 100.0 * THRESHOLD).then_some(())?;
        Some(Trial {
            slowdown: number(1)?,
            loaded: *cells.get(3)? == "loaded",
            comparisons: number(4)?,
            called: numbers(cells.get(5)?).try_into().ok()?,
        })
    };
    let mut all: Vec<Trial> = Vec::new();
    for name in ["calibrate", "power"] {
        let (_, rest) =
            page.split_once(&format!("<!-- {name} -->")).with_context(|| format!("no table of {name}"))?;
        let (table, _) =
            rest.split_once("<!-- end of").with_context(|| format!("no end of the table of {name}"))?;
        for trial in table.lines().filter_map(row) {
            match all
                .iter_mut()
                .find(|known| (known.slowdown, known.loaded) == (trial.slowdown, trial.loaded))
            {
                Some(known) if known.comparisons < trial.comparisons => *known = trial,
                Some(_) => {}
                None => all.push(trial),
            }
        }
    }
    all.sort_by(|a, b| a.slowdown.total_cmp(&b.slowdown));
    Ok(all)
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
    fn the_tables_of_trials_are_read() {
        let row = |slowdown, threshold, count, called| {
            format!("| {slowdown} % | {threshold} % | loaded | {count} | {called} % (4.2 to 26.8) | 0 |")
        };
        let page = format!(
            "<!-- calibrate -->\n| head is slower by | x |\n| --- | --- |\n{}\n{}\n<!-- end of calibrate -->\n\
             <!-- power -->\n{}\n{}\n<!-- end of power -->",
            row("2", "2", 60, "93.3"),
            row("1", "1", 60, "83.3"),
            row("1.5", "2", 20, "12.5"),
            row("2", "2", 20, "95.0")
        );
        let trial = |slowdown, comparisons, share| Trial {
            slowdown,
            loaded: true,
            comparisons,
            called: [share, 4.2, 26.8],
        };
        assert_eq!(trials(&page).unwrap(), [trial(1.5, 20.0, 12.5), trial(2.0, 60.0, 93.3)]);
        assert!(trials("").is_err());
    }
}
