//! The plots of the HTML report, as SVG.

mod bars;
mod charts;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::results::Results;
use crate::suite::{BackendId, Framework};
pub use bars::training;

/// A plot with its title and an explanation.
pub struct Plot {
    pub title: String,
    pub note: String,
    pub svg: String,
}

/// A narrow width with large letters stays readable on a phone.
const WIDTH: u32 = 520;
const FONT: &str = "sans-serif";
/// Font sizes. Plotters writes four fifths of them as pixels.
pub(super) const LARGE: i32 = 19;
pub(super) const SMALL: i32 = 17;
pub(super) const INK: RGBColor = RGBColor(60, 60, 60);

/// A name in a legend with its color.
pub(super) type Key = (&'static str, RGBColor);

/// Colors have one meaning on the whole page. Readers with color blindness can distinguish them (Okabe and Ito,
/// <https://jfly.uni-koeln.de/color/>).
const FORWARD: Key = ("forward", RGBColor(0, 158, 115));
const BACKWARD: Key = ("backward", RGBColor(204, 121, 167));
const OPTIMIZER: Key = ("optimizer", RGBColor(110, 80, 160));
const OTHER: Key = ("other", RGBColor(170, 170, 170));
const EXPOSED: Key = ("exposed communication", RGBColor(160, 20, 60));

/// Returns the color of a backend's framework: blue for PyTorch, orange for MLX.
fn color(backend: BackendId) -> RGBColor {
    match backend.framework() {
        Framework::Torch => RGBColor(0, 114, 178),
        Framework::Mlx => RGBColor(213, 94, 0),
    }
}

pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws an SVG of a fixed size on a transparent background.
pub(super) fn draw_svg(size: (u32, u32), draw: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        draw(&area)?;
        area.present().map_err(plot_error)?;
    }
    Ok(svg)
}

/// Draws an SVG that scales with the page.
fn draw_for_page(height: u32, draw: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
    let size = format!("width=\"{WIDTH}\" height=\"{height}\"");
    Ok(draw_svg((WIDTH, height), draw)?.replacen(&size, "width=\"100%\"", 1))
}

pub(super) fn plot_error(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("a plot could not be drawn: {error}")
}

pub(super) fn draw_text(
    area: &Area<'_>,
    text: &str,
    at: (i32, i32),
    size: i32,
    color: RGBColor,
) -> Result<()> {
    area.draw_text(text, &(FONT, size).into_text_style(area).color(&color), at).map_err(plot_error)
}

/// Draws the keys of a legend in one line.
pub(super) fn draw_legend(area: &Area<'_>, keys: &[Key], top: i32) -> Result<()> {
    let mut left = 4;
    for &(name, color) in keys {
        let square = Rectangle::new([(left, top + 2), (left + 12, top + 14)], color.filled());
        area.draw(&square).map_err(plot_error)?;
        draw_text(area, name, (left + 18, top), SMALL, INK)?;
        left += 34 + 8 * name.chars().count() as i32;
    }
    Ok(())
}

/// Returns every plot except [`training`]. `samples` returns the samples of a case in seconds, or nothing if they
/// are unknown.
///
/// # Errors
/// Returns an error if a plot cannot be drawn.
pub fn all(results: &Results, samples: &dyn Fn(&str) -> Vec<f64>) -> Result<Vec<Plot>> {
    let measured = super::all_measured(results);
    let mut plots = Vec::new();
    plots.extend(bars::phases(&measured, results.headline())?);
    for &backend in BackendId::ALL {
        plots.extend(charts::roofline(&measured, backend, results.headline())?);
    }
    plots.extend(bars::data_parallel(&measured)?);
    plots.extend(charts::batch_sizes(&measured)?);
    plots.extend(charts::lengths(&measured)?);
    plots.extend(charts::samples(&measured, samples)?);
    plots.extend(bars::step_times(&measured)?);
    Ok(plots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frameworks_and_phases_have_different_colors() {
        let mut all = vec![color(BackendId::TorchCpu), color(BackendId::MlxCpu)];
        all.extend([FORWARD, BACKWARD, OPTIMIZER, OTHER, EXPOSED].map(|(_, color)| color));
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b), "{a:?} has two meanings");
        }
        for &backend in BackendId::ALL {
            let same = backend.framework() == Framework::Torch;
            assert_eq!(color(backend) == color(BackendId::TorchCpu), same, "{backend}");
        }
    }
}
