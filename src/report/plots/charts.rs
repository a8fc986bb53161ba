//! Plots with axes: rooflines, speed and memory by batch, and samples.

use std::ops::Range;

use anyhow::Result;
use plotters::coord::combinators::LogCoord;
use plotters::coord::combinators::WithKeyPoints;
use plotters::prelude::*;

use super::{Area, FONT, INK, LARGE, Plot, SMALL, WIDTH, color, draw_for_page, draw_text, plot_error};
use crate::installation;
use crate::report::format::{digits, significant};
use crate::report::lengths::{LengthSweep, length_sweeps, tokens};
use crate::report::{Measured, Sweep, batches, measured_peak, rate};
use crate::suite::{BackendId, Precision, Shape, Workload, cost};

type Axis = WithKeyPoints<LogCoord<f64>>;
type Chart<'a, 'b> = ChartContext<'b, SVGBackend<'a>, Cartesian2d<Axis, Axis>>;

/// Returns a logarithmic axis. Its marks are at 1, 2 and 5 times the powers of ten, or only at the powers if the
/// range is large.
fn log_axis(range: Range<f64>) -> Axis {
    let [first, last] = [range.start, range.end].map(f64::log10);
    let steps: &[f64] = if last - first > 3.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let powers = first.floor() as i32..=last.ceil() as i32;
    let all = powers.flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)));
    let marks = all.filter(|mark| range.contains(mark)).collect();
    range.log_scale().with_key_points(marks)
}

/// Formats the number of a mark: `0.05`, `2`, `5,000`.
fn mark_text(value: f64) -> String {
    significant(value, 1)
}

/// Draws logarithmic axes. The labels of y are in units of `y_unit`.
fn draw_axes<'a, 'b>(
    area: &'b Area<'a>,
    x: Range<f64>,
    y: Range<f64>,
    names: [&str; 2],
    y_unit: f64,
) -> Result<Chart<'a, 'b>> {
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .x_label_area_size(50)
        .y_label_area_size(84)
        .build_cartesian_2d(log_axis(x), log_axis(y))
        .map_err(plot_error)?;
    chart
        .configure_mesh()
        .x_desc(names[0])
        .y_desc(names[1])
        .y_label_formatter(&|v| mark_text(*v / y_unit))
        .x_label_formatter(&|v| mark_text(*v))
        .max_light_lines(0)
        .label_style((FONT, SMALL))
        .light_line_style(RGBColor(235, 235, 235))
        .draw()
        .map_err(plot_error)?;
    Ok(chart)
}

/// Writes names next to points without overlap.
fn draw_labels(area: &Area<'_>, mut names: Vec<((i32, i32), String, RGBColor)>) -> Result<()> {
    const LINE: i32 = 16;
    names.sort_by_key(|name| name.0.1);
    let mut placed: Vec<[i32; 3]> = Vec::new();
    for ((x, y), name, color) in names {
        let width = 8 * name.chars().count() as i32;
        // At the right edge, the name is on the left of its point.
        let left = if x + 8 + width > WIDTH as i32 { x - 8 - width } else { x + 8 };
        let free = |top: i32| {
            placed.iter().all(|[l, t, r]| *r <= left || left + width <= *l || (top - t).abs() >= LINE)
        };
        let tries = (0..40).flat_map(|k| [y - 7 + 4 * k, y - 7 - 4 * k]);
        let top = tries.into_iter().find(|&top| top >= 0 && free(top)).unwrap_or(y - 7);
        placed.push([left, top, left + width]);
        draw_text(area, &name, (left, top), SMALL, color)?;
    }
    Ok(())
}

/// A case exceeds the roof if it is above this share of it. 95 % intervals reach 5 % on a shared machine.
const ABOVE_ROOF: f64 = 1.05;

/// The limits of a backend: FLOP/s of `matmul-peak` and bytes per second of `copy-peak`.
struct Roof {
    flops: f64,
    bandwidth: f64,
}

impl Roof {
    /// Returns the work intensity in FLOPs per byte above which arithmetic is the limit.
    fn ridge(&self) -> f64 {
        self.flops / self.bandwidth
    }

    /// Returns the limit in FLOP/s at a work intensity.
    fn at(&self, intensity: f64) -> f64 {
        (intensity * self.bandwidth).min(self.flops)
    }

    fn is_exceeded_by(&self, point: &RooflinePoint) -> bool {
        point.flops_per_s > ABOVE_ROOF * self.at(point.intensity)
    }

    /// Explains why a case can exceed the roof.
    fn explain(&self, point: &RooflinePoint) -> String {
        let reason = if point.intensity < self.ridge() {
            "its data fits into the caches, and copy-peak reads memory"
        } else {
            "its matrix products are faster than matmul-peak"
        };
        let percent = 100.0 * point.flops_per_s / self.at(point.intensity);
        format!("{} is above the roof ({percent:.0} %, drawn as a ring): {reason}. ", point.name)
    }
}

/// A case in a roofline.
struct RooflinePoint {
    name: String,
    /// FLOPs per byte that the case must move at least.
    intensity: f64,
    flops_per_s: f64,
}

/// Draws the f32 cases of a backend, and the limits that the same run measured.
pub(super) fn roofline(all: &[Measured<'_>], backend: BackendId, shape: Shape) -> Result<Option<Plot>> {
    let of_backend = || all.iter().filter(|m| m.case.backend == backend);
    let copies = of_backend().filter(|m| m.case.workload == Workload::CopyPeak);
    let bandwidth = copies.map(|m| cost::bytes(&m.case) as f64 / m.median_ns * 1e9).max_by(f64::total_cmp);
    let peak = measured_peak(all, backend, Precision::F32);
    let Some((flops, bandwidth)) = peak.zip(bandwidth) else { return Ok(None) };
    let roof = Roof { flops, bandwidth };
    let point = |m: &Measured<'_>| {
        let flops = cost::flops(&m.case) as f64;
        let same_model = m.case.shape.model().is_none_or(|model| Some(model) == shape.model());
        let single_f32 = m.case.method.precision == Precision::F32 && m.case.shape.ranks() == 1;
        (flops > 0.0 && same_model && single_f32).then(|| RooflinePoint {
            name: format!("{} {}", m.case.workload, m.case.method),
            intensity: flops / cost::min_bytes(&m.case) as f64,
            flops_per_s: flops / m.median_ns * 1e9,
        })
    };
    let points: Vec<RooflinePoint> = of_backend().filter_map(point).collect();
    let exceeding = points.iter().filter(|point| roof.is_exceeded_by(point));
    let explanations: String = exceeding.map(|point| roof.explain(point)).collect();
    Ok(Some(Plot {
        title: format!("Roofline of {backend} in f32, {shape}"),
        note: format!(
            "The roof is {} GFLOP/s (matmul-peak) and {} GB/s (copy-peak), both from this run. {explanations}To repeat: \
             {} '{backend}/f32'",
            digits(flops / 1e9),
            digits(bandwidth / 1e9),
            installation::command("bench")
        ),
        svg: draw_roofline(&roof, &points, color(backend))?,
    }))
}

fn draw_roofline(roof: &Roof, points: &[RooflinePoint], color: RGBColor) -> Result<String> {
    let intensities = || points.iter().map(|p| p.intensity);
    let low = intensities().fold(roof.ridge(), f64::min) / 4.0;
    let high = intensities().fold(roof.ridge(), f64::max) * 4.0;
    let floor = points.iter().map(|p| p.flops_per_s).fold(roof.at(low), f64::min) / 2.0;
    draw_for_page(420, |area| {
        let names = ["FLOPs per byte that the case must move at least", "GFLOP/s"];
        let mut chart = draw_axes(area, low..high, floor..2.0 * roof.flops, names, 1e9)?;
        let line = [low, roof.ridge(), high].map(|x| (x, roof.at(x)));
        chart.draw_series(LineSeries::new(line, BLACK.stroke_width(2))).map_err(plot_error)?;
        let place = |p: &RooflinePoint| (p.intensity, p.flops_per_s);
        let dot = |p: &RooflinePoint| {
            let ring = roof.is_exceeded_by(p);
            Circle::new(place(p), 5, if ring { color.stroke_width(2) } else { color.filled() })
        };
        chart.draw_series(points.iter().map(dot)).map_err(plot_error)?;
        let names = points.iter().map(|p| (chart.backend_coord(&place(p)), p.name.clone(), INK));
        draw_labels(area, names.collect())
    })
}

/// A series: its name, color, and points.
type Series = (String, RGBColor, Vec<(f64, f64)>);

/// Draws series over an axis. Returns `None` if there are none.
fn draw_over(x: &SweptSize, title: &str, unit: &str, series: &[Series]) -> Result<Option<Plot>> {
    let mut points = series.iter().flat_map(|s| s.2.iter());
    let Some(&first) = points.next() else { return Ok(None) };
    let (mut low, mut high) = (first, first);
    for point in points {
        (low.0, low.1) = (low.0.min(point.0), low.1.min(point.1));
        (high.0, high.1) = (high.0.max(point.0), high.1.max(point.1));
    }
    let svg = draw_for_page(380, |area| {
        // Room for the names is on the right of the last points.
        let range = low.0 * 0.8..3.0 * high.0 * high.0 / low.0;
        let mut chart = draw_axes(area, range, low.1 / 2.0..high.1 * 2.0, [x.name, unit], 1.0)?;
        let mut names = Vec::new();
        for (name, color, points) in series {
            let line = LineSeries::new(points.iter().copied(), color.stroke_width(2)).point_size(3);
            chart.draw_series(line).map_err(plot_error)?;
            names.extend(points.last().map(|end| (chart.backend_coord(end), name.clone(), *color)));
        }
        draw_labels(area, names)
    })?;
    Ok(Some(Plot { title: title.to_owned(), note: installation::words(x.note), svg }))
}

/// A size that plots have on their horizontal axis, with the text below them.
struct SweptSize {
    name: &'static str,
    note: &'static str,
}

const BATCH: SweptSize =
    SweptSize { name: "batch", note: "To repeat: ./scripts/bench --full 'train-step/.*/indicator-b'" };
const LENGTH: SweptSize = SweptSize {
    name: "tokens per sample",
    note: "Each point is the fastest checked method. To repeat: ./scripts/bench --model PATH --tokens 512,1024 'train-step/'",
};

/// Draws training speed and memory of the fastest training steps over the number of tokens.
pub(super) fn lengths(all: &[Measured<'_>]) -> Result<Vec<Plot>> {
    let sweeps = length_sweeps(all);
    let draw = |title: &str, unit: &str, value: &dyn Fn(&Measured<'_>) -> Option<f64>| {
        let series = |sweep: &LengthSweep<'_>| -> Series {
            let point = |m: &Measured<'_>| Some((tokens(m)? as f64, value(m)?));
            let label = format!("{} {}", sweep.name, sweep.backend);
            (label, color(sweep.backend), sweep.steps.iter().filter_map(point).collect())
        };
        let mut all: Vec<Series> = sweeps.iter().map(series).collect();
        all.retain(|series| !series.2.is_empty());
        draw_over(&LENGTH, title, unit, &all)
    };
    let megabytes = |bytes: Option<u64>| Some(bytes? as f64 / 1e6);
    let plots = [
        draw("Training speed by tokens per sample", "tokens/s", &|m| Some(m.speed().value))?,
        draw("Allocator peak by tokens per sample", "MB", &|m| megabytes(m.record.peak_bytes))?,
        draw("Peak RSS by tokens per sample", "MB", &|m| megabytes(m.record.rss_peak_bytes))?,
    ];
    Ok(plots.into_iter().flatten().collect())
}

/// Draws training speed and allocator peak over the batch size.
pub(super) fn batch_sizes(all: &[Measured<'_>]) -> Result<Vec<Plot>> {
    let sweeps = batches(all);
    let series = |sweep: &Sweep<'_>, value: &dyn Fn(&Measured<'_>) -> Option<f64>| -> Series {
        let point = |m: &Measured<'_>| Some((m.case.shape.batch() as f64, value(m)?));
        (sweep.label(), color(sweep.backend), sweep.steps.iter().filter_map(point).collect())
    };
    let mut plots = Vec::new();
    for (unit, title) in
        [("samples/s", "Training speed by batch"), ("tokens/s", "Training speed by batch, language models")]
    {
        let in_unit = sweeps.iter().filter(|sweep| rate(sweep.steps[0].case.shape, 1.0).1 == unit);
        let speeds: Vec<Series> = in_unit.map(|sweep| series(sweep, &|m| Some(m.speed().value))).collect();
        plots.extend(draw_over(&BATCH, title, unit, &speeds)?);
    }
    let megabytes = |m: &Measured<'_>| Some(m.record.peak_bytes? as f64 / 1e6);
    let mut memory: Vec<Series> = sweeps.iter().map(|sweep| series(sweep, &megabytes)).collect();
    memory.retain(|series| !series.2.is_empty());
    plots.extend(draw_over(&BATCH, "Allocator peak by batch", "MB", &memory)?);
    Ok(plots)
}

/// Draws every sample of the training steps relative to the median of its case. Outliers are rings.
pub(super) fn samples(all: &[Measured<'_>], of: &dyn Fn(&str) -> Vec<f64>) -> Result<Option<Plot>> {
    const ROW: i32 = 40;
    let steps = all.iter().filter(|m| m.case.workload == Workload::TrainStep);
    let rows: Vec<(&Measured<'_>, Vec<f64>)> =
        steps.map(|m| (m, of(&m.record.id))).filter(|(_, values)| values.len() > 3).collect();
    if rows.is_empty() {
        return Ok(None);
    }
    let (left, right) = (24, WIDTH as i32 - 24);
    // The range is 70 % to 150 %. Values beyond it are drawn at its ends.
    let scale = |ratio: f64| left + (f64::from(right - left) * (ratio.clamp(0.7, 1.5) - 0.7) / 0.8) as i32;
    let svg = draw_for_page((rows.len() as i32 * ROW + 30) as u32, |area| {
        for (index, (m, values)) in rows.iter().enumerate() {
            let top = 4 + index as i32 * ROW;
            let name = format!("{} {} {}", m.case.backend, m.case.method, m.case.shape);
            draw_text(area, &name, (4, top), LARGE, INK)?;
            let sorted = crate::statistics::sorted(values.iter().copied());
            let quartile = |part: usize| sorted[part * (sorted.len() - 1) / 4];
            let reach = 1.5 * (quartile(3) - quartile(1));
            for value in values {
                let outlier = *value < quartile(1) - reach || *value > quartile(3) + reach;
                let fill = color(m.case.backend).mix(0.35).filled();
                let style = if outlier { INK.stroke_width(1) } else { fill };
                let place = (scale(value / quartile(2)), top + 26);
                area.draw(&Circle::new(place, 4, style)).map_err(plot_error)?;
            }
        }
        let bottom = rows.len() as i32 * ROW + 8;
        for percent in (70..=150).step_by(10) {
            let place = (scale(f64::from(percent) / 100.0) - 18, bottom);
            draw_text(area, &format!("{percent} %"), place, SMALL, INK)?;
        }
        Ok(())
    })?;
    Ok(Some(Plot {
        title: "Samples of the training steps".to_owned(),
        note: format!(
            "Each sample is relative to the median of its case. Rings are outliers, more than 1.5 interquartile ranges \
             from the quartiles. To repeat: {} 'train-step'",
            installation::command("bench")
        ),
        svg,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::all_measured;
    use crate::report::tests::run;

    #[test]
    fn marks_are_round_numbers() {
        let marks = |range: Range<f64>| -> Vec<String> {
            log_axis(range).bold_points().iter().map(|mark| mark_text(*mark)).collect()
        };
        assert_eq!(marks(8.0..158.0), ["10", "20", "50", "100"]);
        assert_eq!(marks(0.04..1.25), ["0.05", "0.1", "0.2", "0.5", "1"]);
        assert_eq!(marks(3.2..16e3), ["10", "100", "1,000", "10,000"]);
    }

    #[test]
    fn a_case_above_the_roof_is_explained() {
        let note = |forward| {
            let results = run(&[
                ("matmul-peak/torch-cpu/f32/n1024", 10e6),
                ("copy-peak/torch-cpu/f32/256mib", 10e6),
                ("forward/torch-cpu/f32/indicator-b16", forward),
            ]);
            let measured = all_measured(&results);
            roofline(&measured, BackendId::TorchCpu, results.headline()).unwrap().unwrap().note
        };
        assert!(!note(100e6).contains("above the roof"), "{}", note(100e6));
        let text = note(0.1e6);
        assert!(
            text.contains("forward f32 is above the roof") && text.contains("products are faster"),
            "{text}"
        );
    }
}
