//! The pictures of the report, as SVG.

use std::ops::Range;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::tables::{digits, time};
use super::{Measured, batches, devices, measured_peak};
use crate::results::Results;
use crate::suite::{BackendId, Case, Compute, Precision, Shape, Workload, cost};

/// A picture and what it shows.
pub struct Plot {
    pub title: String,
    pub note: String,
    pub svg: String,
}

const WIDTH: u32 = 760;
const LABELS: i32 = 250;
const FONT: &str = "sans-serif";
/// Told apart by readers who see fewer colours (Okabe and Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(213, 94, 0),
    RGBColor(120, 120, 120),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws into an SVG that scales with the page.
fn drawn(height: u32, draw: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        draw(&area)?;
        area.present().map_err(wrong)?;
    }
    let sized = format!("width=\"{WIDTH}\" height=\"{height}\"");
    Ok(svg.replacen(&sized, "width=\"100%\"", 1))
}

fn wrong(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("a plot could not be drawn: {error}")
}

fn colour(backend: BackendId) -> RGBColor {
    let place = backend.index() % COLOURS.len();
    COLOURS[place]
}

fn text(area: &Area<'_>, words: &str, at: (i32, i32), size: i32) -> Result<()> {
    area.draw_text(words, &(FONT, size).into_text_style(area).color(&RGBColor(60, 60, 60)), at).map_err(wrong)
}

/// Horizontal bars: label, segments with colours, an interval around the end, a note.
struct Bar {
    label: String,
    segments: Vec<(f64, RGBColor)>,
    interval: Option<[f64; 2]>,
    note: String,
}

fn bars(rows: &[Bar]) -> Result<String> {
    let total = |bar: &Bar| bar.segments.iter().map(|s| s.0).sum::<f64>();
    let most = rows.iter().map(|b| b.interval.map_or(total(b), |i| i[1].max(total(b)))).fold(0.0, f64::max);
    let (line, end) = (26, WIDTH as i32 - 110);
    drawn(rows.len() as u32 * line as u32 + 12, |area| {
        let scale = |value: f64| LABELS + ((end - LABELS) as f64 * value / most) as i32;
        for (index, bar) in rows.iter().enumerate() {
            let top = 6 + index as i32 * line;
            text(area, &bar.label, (4, top + 4), 13)?;
            let mut from = 0.0;
            for &(length, colour) in &bar.segments {
                let corners = [(scale(from), top + 2), (scale(from + length), top + line - 6)];
                area.draw(&Rectangle::new(corners, colour.filled())).map_err(wrong)?;
                from += length;
            }
            if let Some([low, high]) = bar.interval {
                let middle = top + (line - 4) / 2;
                let whisker = vec![(scale(low), middle), (scale(high), middle)];
                area.draw(&PathElement::new(whisker, BLACK.stroke_width(2))).map_err(wrong)?;
            }
            let reached = bar.interval.map_or(from, |i| i[1].max(from));
            text(area, &bar.note, (scale(reached) + 6, top + 4), 12)?;
        }
        Ok(())
    })
}

/// Step times of a workload over everything that was measured, shapes apart.
fn times(all: &[Measured<'_>]) -> Result<Vec<Plot>> {
    let mut plots = Vec::new();
    for &workload in Workload::ALL {
        if matches!(workload, Workload::MatmulPeak | Workload::CopyPeak | Workload::AllReduce) {
            continue;
        }
        let mut shapes: Vec<Shape> = Vec::new();
        for m in all.iter().filter(|m| m.case.workload == workload) {
            if !shapes.contains(&m.case.shape) {
                shapes.push(m.case.shape);
            }
        }
        for shape in shapes {
            let rows: Vec<Bar> = all
                .iter()
                .filter(|m| m.case.workload == workload && m.case.shape == shape)
                .map(|m| Bar {
                    label: format!("{} {}", m.case.backend, m.case.precision),
                    segments: vec![(m.median_ns, colour(m.case.backend))],
                    interval: m.record.ci_ns,
                    note: time(m.median_ns),
                })
                .collect();
            plots.push(Plot {
                title: format!("{workload}, {shape}"),
                note: format!("Time of a step, shorter is better; the line is the 95 % interval. Again: ./scripts/bench '{workload}/.*/{shape}'"),
                svg: bars(&rows)?,
            });
        }
    }
    Ok(plots)
}

/// Where a training step's time goes, from the workloads that hold parts of it.
fn parts(all: &[Measured<'_>], shape: Shape) -> Result<Option<Plot>> {
    let names = ["forward", "backward", "optimizer", "the rest"];
    let mut rows = Vec::new();
    for &backend in BackendId::ALL {
        let of = |workload| {
            let precision = Precision::eager(Compute::F32);
            let case = Case { workload, backend, precision, shape };
            all.iter().find(|m| m.case == case).map(|m| m.median_ns)
        };
        let (Some(forward), Some(both), Some(optimizer), Some(step)) = (
            of(Workload::Forward),
            of(Workload::ForwardBackward),
            of(Workload::OptimizerStep),
            of(Workload::TrainStep),
        ) else {
            continue;
        };
        let lengths = [forward, (both - forward).max(0.0), optimizer, (step - both - optimizer).max(0.0)];
        rows.push(Bar {
            label: format!("{backend} f32"),
            segments: lengths.into_iter().zip(COLOURS).collect(),
            interval: None,
            note: format!("step {}", time(step)),
        });
    }
    if rows.is_empty() {
        return Ok(None);
    }
    let legend: Vec<String> =
        names.iter().zip(["blue", "orange", "green", "pink"]).map(|(n, c)| format!("{c}: {n}")).collect();
    Ok(Some(Plot {
        title: format!("Where a training step's time goes, {shape}"),
        note: format!(
            "{}. Backward is forward-backward less forward; forward is inference, without dropout. \
             Parts are measured apart, so that they need not add up. Again: ./scripts/bench '/f32/{shape}'",
            legend.join(", ")
        ),
        svg: bars(&rows)?,
    }))
}

type Chart<'a, 'b> = ChartContext<'b, SVGBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Axes over decimal logarithms, labelled with the numbers that they stand for; those of y
/// in multiples of `y_unit`.
fn axes<'a, 'b>(
    area: &'b Area<'a>,
    x: Range<f64>,
    y: Range<f64>,
    names: [&str; 2],
    y_unit: f64,
) -> Result<Chart<'a, 'b>> {
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .x_label_area_size(38)
        .y_label_area_size(70)
        .build_cartesian_2d(x, y)
        .map_err(wrong)?;
    chart
        .configure_mesh()
        .x_desc(names[0])
        .y_desc(names[1])
        .y_label_formatter(&|v| digits(10f64.powf(*v) / y_unit))
        .x_label_formatter(&|v| digits(10f64.powf(*v)))
        .max_light_lines(0)
        .label_style((FONT, 12))
        .light_line_style(RGBColor(235, 235, 235))
        .draw()
        .map_err(wrong)?;
    Ok(chart)
}

/// Every case against the ceilings that were measured in the same run, in f32.
fn roofline(all: &[Measured<'_>], backend: BackendId) -> Result<Option<Plot>> {
    let Some(peak) = measured_peak(all, backend, Compute::F32) else { return Ok(None) };
    let copy = all
        .iter()
        .filter(|m| m.case.workload == Workload::CopyPeak && m.case.backend == backend)
        .map(|m| cost::bytes(&m.case) as f64 / m.median_ns * 1e9)
        .max_by(f64::total_cmp);
    let Some(bandwidth) = copy else { return Ok(None) };
    let points: Vec<(f64, f64, String)> = all
        .iter()
        .filter(|m| m.case.backend == backend && m.case.precision.compute == Compute::F32)
        .filter(|m| m.case.shape.ranks() == 1 && cost::flops(&m.case) > 0)
        .map(|m| {
            let flops = cost::flops(&m.case) as f64;
            (
                flops / cost::least_bytes(&m.case) as f64,
                flops / m.median_ns * 1e9,
                format!("{} {}", m.case.workload, m.case.precision),
            )
        })
        .collect();
    let low = points.iter().map(|p| p.0).fold(peak / bandwidth, f64::min) / 4.0;
    let high = points.iter().map(|p| p.0).fold(peak / bandwidth, f64::max) * 4.0;
    let floor = points.iter().map(|p| p.1).fold(low * bandwidth, f64::min) / 2.0;
    let svg = drawn(400, |area| {
        let x = low.log10()..high.log10();
        let y = floor.log10()..(2.0 * peak).log10();
        let mut chart = axes(area, x, y, ["FLOP for each byte that must move at least", "GFLOP/s"], 1e9)?;
        let ridge = peak / bandwidth;
        let roof = [(low, low * bandwidth), (ridge, peak), (high, peak)].map(|(x, y)| (x.log10(), y.log10()));
        chart.draw_series(LineSeries::new(roof, BLACK.stroke_width(2))).map_err(wrong)?;
        let dot =
            |p: &(f64, f64, String)| Circle::new((p.0.log10(), p.1.log10()), 4, colour(backend).filled());
        chart.draw_series(points.iter().map(dot)).map_err(wrong)?;
        let style = (FONT, 11).into_text_style(area).color(&RGBColor(60, 60, 60));
        let label = |p: &(f64, f64, String)| {
            Text::new(p.2.clone(), ((1.06 * p.0).log10(), p.1.log10()), style.clone())
        };
        chart.draw_series(points.iter().map(label)).map_err(wrong)?;
        Ok(())
    })?;
    Ok(Some(Plot {
        title: format!("Roofline of {backend} in f32"),
        note: format!(
            "The roof: {} GFLOP/s of matmul-peak and {} GB/s of copy-peak, both of this run. \
             Again: ./scripts/bench '{backend}/f32'",
            digits(peak / 1e9),
            digits(bandwidth / 1e9)
        ),
        svg,
    }))
}

/// Name, colour, and (batch, value) by batch.
type Line = (String, RGBColor, Vec<(usize, f64)>);

/// A line for each backend and precision over the batch.
fn over_batch(title: &str, unit: &str, lines: &[Line]) -> Result<Option<Plot>> {
    let points = || lines.iter().flat_map(|l| l.2.iter());
    let (Some(low), Some(high)) = (points().map(|p| p.0).min(), points().map(|p| p.0).max()) else {
        return Ok(None);
    };
    let top = points().map(|p| p.1).fold(0.0, f64::max);
    let bottom = points().map(|p| p.1).fold(top, f64::min);
    let svg = drawn(380, |area| {
        let x = (low as f64 * 0.8).log10()..(high as f64 * 3.0).log10();
        let y = (bottom / 2.0).log10()..(top * 2.0).log10();
        let mut chart = axes(area, x, y, ["batch", unit], 1.0)?;
        for (name, colour, line) in lines {
            let line: Vec<(f64, f64)> = line.iter().map(|&(b, v)| ((b as f64).log10(), v.log10())).collect();
            chart
                .draw_series(LineSeries::new(line.clone(), colour.stroke_width(2)).point_size(3))
                .map_err(wrong)?;
            let style = (FONT, 11).into_text_style(area).color(colour);
            if let Some(&(x, y)) = line.last() {
                let label = Text::new(name.clone(), (x + 0.03, y), style);
                chart.draw_series(std::iter::once(label)).map_err(wrong)?;
            }
        }
        Ok(())
    })?;
    Ok(Some(Plot {
        title: title.to_owned(),
        note: "Again: ./scripts/bench --full 'train-step/.*/indicator-b'".to_owned(),
        svg,
    }))
}

/// The steps that several devices share: what computes, and what is exchange that nothing hides.
fn shared(all: &[Measured<'_>]) -> Result<Option<Plot>> {
    let bar = |s: &devices::Scaling<'_>| {
        let exposed = s.m.median_ns * s.ranks.exposed.map_or(0.0, |[middle, ..]| middle.max(0.0));
        let kept =
            s.weak.or(s.strong).map_or_else(String::new, |(part, _)| format!(", {:.0} %", 100.0 * part));
        Bar {
            label: format!("{} {} {}", s.m.case.backend, s.m.case.precision, s.m.case.shape),
            segments: vec![(s.m.median_ns - exposed, colour(s.m.case.backend)), (exposed, COLOURS[5])],
            interval: s.m.record.ci_ns,
            note: format!("{}{kept}", time(s.m.median_ns)),
        }
    };
    let rows: Vec<Bar> = devices::scalings(all).iter().map(bar).collect();
    if rows.is_empty() {
        return Ok(None);
    }
    Ok(Some(Plot {
        title: "Steps that several devices share".to_owned(),
        note: "Time of a step; red at its end: exchange of gradients that nothing hides. The percentage is what is \
               kept of one device's speed. Again: ./scripts/bench --full 'train-step/.*/indicator-b'"
            .to_owned(),
        svg: bars(&rows)?,
    }))
}

fn sweeps(all: &[Measured<'_>]) -> Result<Vec<Plot>> {
    let sweeps = batches(all);
    let line = |s: &super::Sweep, values: Vec<(usize, f64)>| {
        (format!("{} {} {}", s.model, s.backend, s.precision), colour(s.backend), values)
    };
    let speeds: Vec<_> = sweeps.iter().map(|s| line(s, s.speeds.clone())).collect();
    let memory: Vec<_> = sweeps
        .iter()
        .map(|s| {
            let peak = |&(batch, _): &(usize, f64)| {
                let m = all.iter().find(|m| {
                    m.case.workload == Workload::TrainStep
                        && (m.case.backend, m.case.precision) == (s.backend, s.precision)
                        && m.case.shape == Shape::of(s.model, batch)
                })?;
                Some((batch, m.record.peak_bytes? as f64 / 1e6))
            };
            line(s, s.speeds.iter().filter_map(peak).collect())
        })
        .filter(|l| !l.2.is_empty())
        .collect();
    let mut plots = Vec::new();
    plots.extend(over_batch("Training speed over the batch", "samples/s", &speeds)?);
    plots.extend(over_batch("Peak of the allocator over the batch", "MB", &memory)?);
    Ok(plots)
}

/// Each sample of the training steps against its case's median; far ones in orange.
fn samples(all: &[Measured<'_>], samples: &dyn Fn(&str) -> Vec<f64>) -> Result<Option<Plot>> {
    let rows: Vec<(&Measured<'_>, Vec<f64>)> = all
        .iter()
        .filter(|m| m.case.workload == Workload::TrainStep)
        .map(|m| (m, samples(&m.record.id)))
        .filter(|(_, values)| values.len() > 3)
        .collect();
    if rows.is_empty() {
        return Ok(None);
    }
    let line = 26;
    let svg = drawn(rows.len() as u32 * line as u32 + 34, |area| {
        let end = WIDTH as i32 - 20;
        // From 70 % to 150 % of the median; what lies beyond stands at the edge.
        let scale =
            |ratio: f64| LABELS + ((end - LABELS) as f64 * (ratio.clamp(0.7, 1.5) - 0.7) / 0.8) as i32;
        for (index, (m, values)) in rows.iter().enumerate() {
            let middle = 6 + index as i32 * line + line / 2;
            text(
                area,
                &format!("{} {} {}", m.case.backend, m.case.precision, m.case.shape),
                (4, middle - 8),
                12,
            )?;
            let mut sorted: Vec<f64> = values.clone();
            sorted.sort_by(f64::total_cmp);
            let quartile = |part: usize| sorted[part * (sorted.len() - 1) / 4];
            let reach = 1.5 * (quartile(3) - quartile(1));
            let centre = quartile(2);
            for value in values {
                let far = *value < quartile(1) - reach || *value > quartile(3) + reach;
                let shade = if far { COLOURS[1].mix(0.9) } else { colour(m.case.backend).mix(0.35) };
                area.draw(&Circle::new((scale(value / centre), middle), 4, shade.filled())).map_err(wrong)?;
            }
        }
        let bottom = rows.len() as i32 * line + 12;
        for ratio in [0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5] {
            text(area, &format!("{:.0} %", 100.0 * ratio), (scale(ratio) - 14, bottom), 11)?;
        }
        Ok(())
    })?;
    Ok(Some(Plot {
        title: "Samples of the training steps".to_owned(),
        note: "Each against the median of its case; orange: outliers, beyond 1.5 quartile ranges. \
               Again: ./scripts/bench 'train-step'"
            .to_owned(),
        svg,
    }))
}

/// Every picture that the run has figures for. `of` gives a case's samples in seconds, and
/// nothing where they are not known.
pub fn all(results: &Results, of: &dyn Fn(&str) -> Vec<f64>) -> Result<Vec<Plot>> {
    let measured = super::all_measured(results);
    let mut plots = Vec::new();
    plots.extend(parts(&measured, results.headline())?);
    for &backend in BackendId::ALL {
        plots.extend(roofline(&measured, backend)?);
    }
    plots.extend(shared(&measured)?);
    plots.extend(sweeps(&measured)?);
    plots.extend(samples(&measured, of)?);
    plots.extend(times(&measured)?);
    Ok(plots)
}
