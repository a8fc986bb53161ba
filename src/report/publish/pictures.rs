//! The pictures of README.md and src/compare/README.md.

use anyhow::{Context, Result};
use plotters::prelude::*;

use super::blocks::{Answer, picture_text};
use crate::compare::decision::THRESHOLD;
use crate::report::format::digits;
use crate::report::headline::find_eager;
use crate::report::plots::{INK, LARGE, SMALL, draw_legend, draw_svg, draw_text, plot_error};
use crate::report::rate;
use crate::report::summary::Comparison;
use crate::suite::{Case, Framework, HEADLINE_SHAPE, Variant};
use crate::text::html;

/// The colors of a picture on a light or dark page.
pub struct Palette {
    ink: RGBColor,
    torch: RGBColor,
    mlx: RGBColor,
}

pub const LIGHT: Palette =
    Palette { ink: RGBColor(36, 41, 47), torch: RGBColor(0, 114, 178), mlx: RGBColor(213, 94, 0) };
pub const DARK: Palette =
    Palette { ink: RGBColor(230, 237, 243), torch: RGBColor(86, 180, 233), mlx: RGBColor(240, 140, 60) };

/// Draws both frameworks' eager and fastest steps, a panel per device. The title and the description are for screen
/// readers.
pub fn answer(answers: &[Answer<'_>], palette: &Palette) -> Result<String> {
    const WIDTH: i32 = 560;
    const HEADER: i32 = 24;
    const PITCH: i32 = 21;
    const BAR: i32 = 15;
    let panels: Vec<_> = answers.iter().map(|answer| (answer.device(), bars(answer))).collect();
    let height: i32 = panels.iter().map(|(_, bars)| 32 + bars.len() as i32 * PITCH).sum();
    let size = (WIDTH as u32, (HEADER + height) as u32);
    let title = format!("Training {HEADLINE_SHAPE}: samples/s, higher is better, one scale per machine");
    let svg = draw_svg(size, |area| {
        draw_text(area, &title, (4, 4), SMALL, palette.ink)?;
        let mut top = HEADER;
        for (device, bars) in &panels {
            draw_text(area, device, (4, top + 8), LARGE, palette.ink)?;
            top += 32;
            let longest = bars.iter().map(|bar| bar.1).fold(0.0, f64::max);
            for &(case, speed) in bars {
                let framework = case.backend.framework();
                let color = if framework == Framework::Torch { palette.torch } else { palette.mlx };
                let (left, length) = (200, (270.0 * speed / longest) as i32);
                let eager = if case.method.variant == Variant::Eager { "eager " } else { "" };
                let label = format!("{}, {eager}{}", framework.label(), case.method);
                draw_text(area, &label, (16, top), SMALL, palette.ink)?;
                let corners = [(left, top - 2), (left + length.max(1), top - 2 + BAR)];
                area.draw(&Rectangle::new(corners, color.filled())).map_err(plot_error)?;
                draw_text(area, &digits(speed), (left + length + 6, top), SMALL, palette.ink)?;
                top += PITCH;
            }
        }
        Ok(())
    })?;
    let (title, text) = (html(&title), html(&picture_text(answers)));
    Ok(svg.replacen('>', &format!(" role=\"img\">\n<title>{title}</title>\n<desc>{text}.</desc>"), 1))
}

/// Returns the eager and the fastest step of each framework, with their speeds.
fn bars(answer: &Answer<'_>) -> Vec<(Case, f64)> {
    let results = &answer.baseline.results;
    let eager = answer.comparison.steps.map(|step| find_eager(results, step.case.backend));
    let eager = match eager {
        [Some(torch), Some(mlx)] => Comparison::new(results, [torch.case, mlx.case]),
        _ => None,
    };
    let mut bars: Vec<(Case, f64)> = Vec::new();
    for side in 0..2 {
        for comparison in eager.iter().chain([&answer.comparison]) {
            let case = comparison.steps[side].case;
            if bars.iter().all(|(other, _)| *other != case) {
                bars.push((case, rate(case.shape, comparison.times_ns[side]).0));
            }
        }
    }
    bars
}

/// The share of comparisons that reported a slowdown of a known size. All numbers are in percent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trial {
    slowdown: f64,
    loaded: bool,
    comparisons: f64,
    /// Share with its 95 % CI.
    reported: [f64; 3],
}

/// Reads the tables that `scripts/calibrate --write` writes into src/compare/README.md. Only rows with the default
/// threshold count. Of two rows for the same slowdown, the one with more comparisons counts.
///
/// # Errors
/// Returns an error if a table is missing.
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
            reported: numbers(cells.get(5)?).try_into().ok()?,
        })
    };
    let mut all: Vec<Trial> = Vec::new();
    for name in ["calibrate", "power"] {
        let (_, rest) =
            page.split_once(&format!("<!-- {name}: ")).with_context(|| format!("no table of {name}"))?;
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

/// Draws the share of reported slowdowns over their size, on an unloaded and a loaded machine.
///
/// # Errors
/// Returns an error if the picture cannot be drawn.
pub fn power(trials: &[Trial]) -> Result<String> {
    const KINDS: [(&str, bool, RGBColor); 2] =
        [("unloaded machine", false, RGBColor(0, 114, 178)), ("loaded machine", true, RGBColor(213, 94, 0))];
    draw_svg((520, 360), |area| {
        // The page can be dark.
        area.fill(&WHITE).map_err(plot_error)?;
        draw_legend(area, &KINDS.map(|(name, _, colour)| (name, colour)), 6)?;
        let (upper, plot) = area.split_vertically(28);
        drop(upper);
        let mut chart = ChartBuilder::on(&plot)
            .margin(8)
            .margin_right(24)
            .x_label_area_size(50)
            .y_label_area_size(70)
            .build_cartesian_2d(-0.3..10.3, 0.0..102.0)
            .map_err(plot_error)?;
        chart
            .configure_mesh()
            .x_desc("slowdown of head, %")
            .y_desc("reported as slower, %")
            .x_labels(11)
            .y_labels(6)
            .x_label_formatter(&|v| format!("{v:.0}"))
            .y_label_formatter(&|v| format!("{v:.0}"))
            .max_light_lines(0)
            .label_style(("sans-serif", SMALL))
            .draw()
            .map_err(plot_error)?;
        let threshold = [(2.0, 0.0), (2.0, 100.0)];
        chart.draw_series(DashedLineSeries::new(threshold, 4, 4, INK.stroke_width(1))).map_err(plot_error)?;
        for (_, loaded, colour) in KINDS {
            // Points of the same slowdown are next to each other.
            let offset = if loaded { 0.06 } else { -0.06 };
            let points: Vec<(f64, [f64; 3])> = trials
                .iter()
                .filter(|t| t.loaded == loaded)
                .map(|t| (t.slowdown + offset, t.reported))
                .collect();
            let line = points.iter().map(|&(x, [share, ..])| (x, share));
            chart
                .draw_series(LineSeries::new(line, colour.stroke_width(2)).point_size(3))
                .map_err(plot_error)?;
            let whiskers = points.iter().map(|&(x, [_, low, high])| {
                PathElement::new(vec![(x, low), (x, high)], colour.stroke_width(1))
            });
            chart.draw_series(whiskers).map_err(plot_error)?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_of_calibrate_are_read() {
        let row = |slowdown, threshold, count, reported| {
            format!("| {slowdown} % | {threshold} % | loaded | {count} | {reported} % (4.2 to 26.8) | 0 |")
        };
        let page = format!(
            "<!-- calibrate: a -->\n| slowdown of head | x |\n| --- | --- |\n{}\n{}\n<!-- end of calibrate -->\n\
             <!-- power: b -->\n{}\n{}\n<!-- end of power -->",
            row("2", "2", 60, "93.3"),
            row("1", "1", 60, "83.3"),
            row("1.5", "2", 20, "12.5"),
            row("2", "2", 20, "95.0")
        );
        let trial = |slowdown, comparisons, share| Trial {
            slowdown,
            loaded: true,
            comparisons,
            reported: [share, 4.2, 26.8],
        };
        assert_eq!(trials(&page).unwrap(), [trial(1.5, 20.0, 12.5), trial(2.0, 60.0, 93.3)]);
        assert!(trials("").is_err());
    }
}
