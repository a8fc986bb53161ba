//! The pictures of the report, as SVG.

use std::ops::Range;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::tables::{digits, rate_text, time};
use super::{Headline, Measured, batches, find, headlines, measured, measured_peak, rate, scaling};
use crate::results::Results;
use crate::suite::{BackendId, Case, Method, Precision, Shape, Workload, cost};

/// A picture and what it shows.
pub struct Plot {
    pub title: String,
    pub note: String,
    pub svg: String,
}

/// Narrow, with large letters: a phone shows it at two thirds.
const WIDTH: u32 = 520;
const FONT: &str = "sans-serif";
/// Plotters writes a size as four fifths as many pixels.
pub(super) const LARGE: i32 = 19;
pub(super) const SMALL: i32 = 17;
pub(super) const INK: RGBColor = RGBColor(60, 60, 60);

/// What a colour means, on the whole page: these are phases of a step, of which no backend has the colour.
/// Told apart by readers who see fewer colours (after Okabe and Ito).
const FORWARD: (&str, RGBColor) = ("forward", RGBColor(0, 158, 115));
const BACKWARD: (&str, RGBColor) = ("backward", RGBColor(204, 121, 167));
const OPTIMIZER: (&str, RGBColor) = ("optimizer", RGBColor(110, 80, 160));
const REST: (&str, RGBColor) = ("the rest", RGBColor(170, 170, 170));
const EXCHANGE: (&str, RGBColor) = ("exchange that nothing hides", RGBColor(160, 20, 60));

pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn painted(height: u32, draw: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        draw(&area)?;
        area.present().map_err(wrong)?;
    }
    Ok(svg)
}

/// Draws into an SVG that scales with the page.
fn drawn(height: u32, draw: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
    let sized = format!("width=\"{WIDTH}\" height=\"{height}\"");
    Ok(painted(height, draw)?.replacen(&sized, "width=\"100%\"", 1))
}

/// Draws into an SVG that stands alone: a page may be dark behind it.
pub(super) fn drawn_on_paper(height: u32, draw: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
    painted(height, |area| {
        area.fill(&WHITE).map_err(wrong)?;
        draw(area)
    })
}

pub(super) fn wrong(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("a plot could not be drawn: {error}")
}

/// PyTorch is blue and MLX is orange, the darker the faster its kind of device tends to be.
pub(super) fn colour(backend: BackendId) -> RGBColor {
    match backend {
        BackendId::TorchCpu => RGBColor(86, 180, 233),
        BackendId::TorchMps => RGBColor(0, 114, 178),
        BackendId::TorchCuda => RGBColor(0, 70, 125),
        BackendId::MlxCpu => RGBColor(230, 159, 0),
        BackendId::MlxMetal => RGBColor(213, 94, 0),
        BackendId::MlxCuda => RGBColor(150, 60, 0),
    }
}

pub(super) fn text(area: &Area<'_>, words: &str, at: (i32, i32), size: i32) -> Result<()> {
    area.draw_text(words, &(FONT, size).into_text_style(area).color(&INK), at).map_err(wrong)
}

/// Squares of colours with what they mean, in a line.
pub(super) fn legend(area: &Area<'_>, entries: &[(&str, RGBColor)], top: i32) -> Result<()> {
    let mut left = 4;
    for (name, colour) in entries {
        area.draw(&Rectangle::new([(left, top + 2), (left + 12, top + 14)], colour.filled()))
            .map_err(wrong)?;
        text(area, name, (left + 18, top), SMALL)?;
        left += 34 + 8 * name.chars().count() as i32;
    }
    Ok(())
}

/// Horizontal bars: label, segments with colours, an interval around the end, a note.
pub(super) struct Bar {
    /// Empty where it belongs to the one above.
    pub label: String,
    pub segments: Vec<(f64, RGBColor)>,
    pub interval: Option<[f64; 2]>,
    pub note: String,
}

/// Draws bars below each other, each under its label, from `top` on; returns how high they are.
pub(super) fn bars_into(area: Option<&Area<'_>>, rows: &[Bar], top: i32) -> Result<i32> {
    let total = |bar: &Bar| bar.segments.iter().map(|s| s.0).sum::<f64>();
    let most = rows.iter().map(|b| b.interval.map_or(total(b), |i| i[1].max(total(b)))).fold(0.0, f64::max);
    let (left, end) = (4, WIDTH as i32 - 150);
    let scale = |value: f64| left + ((end - left) as f64 * value / most) as i32;
    let mut at = top;
    for bar in rows {
        let labelled = !bar.label.is_empty();
        let upper = if labelled { at + 20 } else { at - 4 };
        let lower = upper + 17;
        let (line, middle) = (at, (upper + lower) / 2);
        at = lower + 7;
        let Some(area) = area else { continue };
        text(area, &bar.label, (left, line), LARGE)?;
        let mut from = 0.0;
        for &(length, colour) in &bar.segments {
            let corners = [(scale(from), upper), (scale(from + length), lower)];
            area.draw(&Rectangle::new(corners, colour.filled())).map_err(wrong)?;
            from += length;
        }
        if let Some([low, high]) = bar.interval {
            let whisker = vec![(scale(low), middle), (scale(high), middle)];
            area.draw(&PathElement::new(whisker, BLACK.stroke_width(2))).map_err(wrong)?;
        }
        let reached = bar.interval.map_or(from, |i| i[1].max(from));
        text(area, &bar.note, (scale(reached) + 6, upper), LARGE)?;
    }
    Ok(at - top)
}

/// A picture of bars; `meaning` of their colours stands above them.
fn bars(rows: &[Bar], meaning: &[(&str, RGBColor)]) -> Result<String> {
    let first = if meaning.is_empty() { 4 } else { 28 };
    let height = bars_into(None, rows, first)?;
    drawn((first + height) as u32, |area| {
        legend(area, meaning, 4)?;
        bars_into(Some(area), rows, first).map(drop)
    })
}

/// The bar of every headline row that was measured: what its training step gets through.
pub(super) fn speeds(results: &Results) -> Vec<(Case, Bar)> {
    let shape = results.headline();
    let bar = |row: Headline| {
        let (_, median, [low, high]) = measured(find(results, &row.case))?;
        let bar = Bar {
            label: row.label,
            segments: vec![(rate(shape, median).0, colour(row.case.backend))],
            interval: Some([rate(shape, high).0, rate(shape, low).0]),
            note: rate_text(shape, median),
        };
        Some((row.case, bar))
    };
    headlines(results).into_iter().filter_map(bar).collect()
}

/// The training step of every headline row that was measured: what the page opens with.
pub fn training(results: &Results) -> Result<Option<Plot>> {
    let shape = results.headline();
    let rows: Vec<Bar> = speeds(results).into_iter().map(|(_, bar)| bar).collect();
    if rows.is_empty() {
        return Ok(None);
    }
    Ok(Some(Plot {
        title: format!("Training {shape}"),
        note: format!(
            "Longer is better; the line is the 95 % interval. Again: ./scripts/bench 'train-step/.*/{shape}$'"
        ),
        svg: bars(&rows, &[])?,
    }))
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
                    label: format!("{} {}", m.case.backend, m.case.method),
                    segments: vec![(m.median_ns, colour(m.case.backend))],
                    interval: m.record.ci_ns,
                    note: time(m.median_ns),
                })
                .collect();
            plots.push(Plot {
                title: format!("{workload}, {shape}"),
                note: format!("Time of a step, shorter is better; the line is the 95 % interval. Again: ./scripts/bench '{workload}/.*/{shape}'"),
                svg: bars(&rows, &[])?,
            });
        }
    }
    Ok(plots)
}

/// Where a training step's time goes, from the workloads that hold parts of it.
fn parts(all: &[Measured<'_>], shape: Shape) -> Result<Option<Plot>> {
    let phases = [FORWARD, BACKWARD, OPTIMIZER, REST];
    let mut rows = Vec::new();
    for &backend in BackendId::ALL {
        let of = |workload| {
            let precision = Method::eager(Precision::F32);
            let case = Case { workload, backend, method: precision, shape };
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
            segments: lengths.into_iter().zip(phases.map(|phase| phase.1)).collect(),
            interval: None,
            note: format!("step {}", time(step)),
        });
    }
    if rows.is_empty() {
        return Ok(None);
    }
    Ok(Some(Plot {
        title: format!("Where a training step's time goes, {shape}"),
        note: format!(
            "Backward is forward-backward less forward; forward is inference, without dropout. \
             Parts are measured apart, so that they need not add up. Again: ./scripts/bench '/f32/{shape}'"
        ),
        svg: bars(&rows, &phases)?,
    }))
}

type Chart<'a, 'b> = ChartContext<'b, SVGBackend<'a>, Cartesian2d<Logarithms, Logarithms>>;

/// A range of decimal logarithms with marks at 1, 2 and 5 times powers of ten, or at the powers alone
/// where those are many.
struct Logarithms {
    inner: RangedCoordf64,
    marks: Vec<f64>,
}

impl From<Range<f64>> for Logarithms {
    fn from(range: Range<f64>) -> Self {
        let powers = range.start.floor() as i32..=range.end.ceil() as i32;
        let steps: &[f64] = if range.end - range.start > 3.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let all = powers.flat_map(|power| steps.iter().map(move |step| step.log10() + f64::from(power)));
        let marks = all.filter(|mark| range.contains(mark)).collect();
        Self { inner: range.into(), marks }
    }
}

impl Ranged for Logarithms {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        self.inner.map(value, limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() { Vec::new() } else { self.marks.clone() }
    }

    fn range(&self) -> Range<f64> {
        self.inner.range()
    }
}

/// A mark's number as short as it is: `0.05`, `2`, `500`.
fn round(value: f64) -> String {
    format!("{}", format!("{value:.0e}").parse::<f64>().unwrap_or(value))
}

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
        .x_label_area_size(50)
        .y_label_area_size(84)
        .build_cartesian_2d(Logarithms::from(x), Logarithms::from(y))
        .map_err(wrong)?;
    chart
        .configure_mesh()
        .x_desc(names[0])
        .y_desc(names[1])
        .y_label_formatter(&|v| round(10f64.powf(*v) / y_unit))
        .x_label_formatter(&|v| round(10f64.powf(*v)))
        .max_light_lines(0)
        .label_style((FONT, SMALL))
        .light_line_style(RGBColor(235, 235, 235))
        .draw()
        .map_err(wrong)?;
    Ok(chart)
}

/// What is over the roof by less is its and the case's own scatter: 95 % intervals reach 5 % on a shared machine.
const ABOVE: f64 = 1.05;

/// Writes names beside points, none over another.
fn labels(area: &Area<'_>, mut names: Vec<((i32, i32), &str, RGBColor)>) -> Result<()> {
    const LINE: i32 = 16;
    names.sort_by_key(|name| name.0.1);
    let mut placed: Vec<[i32; 3]> = Vec::new();
    for ((x, y), name, colour) in names {
        let width = 8 * name.chars().count() as i32;
        // To the left of a point that stands far right.
        let left = if x + 8 + width > WIDTH as i32 { x - 8 - width } else { x + 8 };
        let free = |top: i32| {
            placed.iter().all(|[l, t, r]| *r <= left || left + width <= *l || (top - t).abs() >= LINE)
        };
        let tries = (0..40).flat_map(|k| [y - 7 + 4 * k, y - 7 - 4 * k]);
        let top = tries.into_iter().find(|&top| top >= 0 && free(top)).unwrap_or(y - 7);
        placed.push([left, top, left + width]);
        let style = (FONT, SMALL).into_text_style(area).color(&colour);
        area.draw_text(name, &style, (left, top)).map_err(wrong)?;
    }
    Ok(())
}

/// A shape's cases against the ceilings that were measured in the same run, in f32.
fn roofline(all: &[Measured<'_>], backend: BackendId, shape: Shape) -> Result<Option<Plot>> {
    let Some(peak) = measured_peak(all, backend, Precision::F32) else { return Ok(None) };
    let copy = all
        .iter()
        .filter(|m| m.case.workload == Workload::CopyPeak && m.case.backend == backend)
        .map(|m| cost::bytes(&m.case) as f64 / m.median_ns * 1e9)
        .max_by(f64::total_cmp);
    let Some(bandwidth) = copy else { return Ok(None) };
    let points: Vec<(f64, f64, String)> = all
        .iter()
        .filter(|m| m.case.backend == backend && m.case.method.precision == Precision::F32)
        .filter(|m| m.case.shape.ranks() == 1 && cost::flops(&m.case) > 0)
        .filter(|m| m.case.shape.model().is_none() || m.case.shape.model() == shape.model())
        .map(|m| {
            let flops = cost::flops(&m.case) as f64;
            (
                flops / cost::min_bytes(&m.case) as f64,
                flops / m.median_ns * 1e9,
                format!("{} {}", m.case.workload, m.case.method),
            )
        })
        .collect();
    let low = points.iter().map(|p| p.0).fold(peak / bandwidth, f64::min) / 4.0;
    let high = points.iter().map(|p| p.0).fold(peak / bandwidth, f64::max) * 4.0;
    let floor = points.iter().map(|p| p.1).fold(low * bandwidth, f64::min) / 2.0;
    let roof_at = |x: f64| (x * bandwidth).min(peak);
    let over: Vec<String> = points
        .iter()
        .filter(|(x, y, _)| *y > ABOVE * roof_at(*x))
        .map(|(x, y, name)| {
            let why = if x * bandwidth < peak {
                "the caches hold its data, and copy-peak goes through memory"
            } else {
                "its products run faster than matmul-peak's"
            };
            format!("{name} stands above the roof ({:.0} %, a ring): {why}. ", 100.0 * y / roof_at(*x))
        })
        .collect();
    let svg = drawn(420, |area| {
        let x = low.log10()..high.log10();
        let y = floor.log10()..(2.0 * peak).log10();
        let mut chart = axes(area, x, y, ["FLOP for each byte that must move at least", "GFLOP/s"], 1e9)?;
        let ridge = peak / bandwidth;
        let roof = [(low, low * bandwidth), (ridge, peak), (high, peak)].map(|(x, y)| (x.log10(), y.log10()));
        chart.draw_series(LineSeries::new(roof, BLACK.stroke_width(2))).map_err(wrong)?;
        let dot = |p: &(f64, f64, String)| {
            let style = if p.1 > ABOVE * roof_at(p.0) {
                colour(backend).stroke_width(2)
            } else {
                colour(backend).filled()
            };
            Circle::new((p.0.log10(), p.1.log10()), 5, style)
        };
        chart.draw_series(points.iter().map(dot)).map_err(wrong)?;
        let names =
            points.iter().map(|p| (chart.backend_coord(&(p.0.log10(), p.1.log10())), p.2.as_str(), INK));
        labels(area, names.collect())
    })?;
    Ok(Some(Plot {
        title: format!("Roofline of {backend} in f32, {shape}"),
        note: format!(
            "The roof: {} GFLOP/s of matmul-peak and {} GB/s of copy-peak, both of this run. {}\
             Again: ./scripts/bench '{backend}/f32'",
            digits(peak / 1e9),
            digits(bandwidth / 1e9),
            over.concat()
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
        // Room for the names behind the last points.
        let x = (low as f64 * 0.8).log10()..(high as f64 / low as f64 * 3.0 * high as f64).log10();
        let y = (bottom / 2.0).log10()..(top * 2.0).log10();
        let mut chart = axes(area, x, y, ["batch", unit], 1.0)?;
        let mut ends = Vec::new();
        for (name, colour, line) in lines {
            let line: Vec<(f64, f64)> = line.iter().map(|&(b, v)| ((b as f64).log10(), v.log10())).collect();
            chart
                .draw_series(LineSeries::new(line.clone(), colour.stroke_width(2)).point_size(3))
                .map_err(wrong)?;
            ends.extend(line.last().map(|end| (chart.backend_coord(end), name.as_str(), *colour)));
        }
        labels(area, ends)
    })?;
    Ok(Some(Plot {
        title: title.to_owned(),
        note: "Again: ./scripts/bench --full 'train-step/.*/indicator-b'".to_owned(),
        svg,
    }))
}

/// The steps that several devices share: what computes, and what is exchange that nothing hides.
fn shared(all: &[Measured<'_>]) -> Result<Option<Plot>> {
    let bar = |s: &scaling::Scaling<'_>| {
        let exposed = s.ranks.exposed_communication.map_or(0.0, |[middle, ..]| middle.max(0.0));
        let kept =
            s.weak.or(s.strong).map_or_else(String::new, |(part, _)| format!(", {:.0} %", 100.0 * part));
        Bar {
            label: format!("{} {} {}", s.m.case.backend, s.m.case.method, s.m.case.shape),
            segments: vec![(1.0 - exposed, colour(s.m.case.backend)), (exposed, EXCHANGE.1)],
            interval: None,
            note: format!("{}{kept}", time(s.m.median_ns)),
        }
    };
    let rows: Vec<Bar> = scaling::scalings(all).iter().map(bar).collect();
    if rows.is_empty() {
        return Ok(None);
    }
    Ok(Some(Plot {
        title: "Steps that several devices share".to_owned(),
        note:
            "Time of a step, shorter is better. The percentage is what is kept of one device's speed. Again: \
               ./scripts/bench --full 'train-step/.*/indicator-b'"
                .to_owned(),
        svg: bars(&rows, &[EXCHANGE])?,
    }))
}

fn sweeps(all: &[Measured<'_>]) -> Result<Vec<Plot>> {
    let sweeps = batches(all);
    let line = |s: &super::Sweep, values: Vec<(usize, f64)>| {
        (format!("{} {} {}", s.model, s.backend, s.precision), colour(s.backend), values)
    };
    let memory: Vec<_> = sweeps
        .iter()
        .map(|s| {
            let peak = |&(batch, _): &(usize, f64)| {
                let m = all.iter().find(|m| {
                    m.case.workload == Workload::TrainStep
                        && (m.case.backend, m.case.method) == (s.backend, s.precision)
                        && m.case.shape == Shape::of_model(s.model, batch)
                })?;
                Some((batch, m.record.peak_bytes? as f64 / 1e6))
            };
            line(s, s.speeds.iter().filter_map(peak).collect())
        })
        .filter(|l| !l.2.is_empty())
        .collect();
    let mut plots = Vec::new();
    for (unit, title) in [
        ("samples/s", "Training speed over the batch"),
        ("tokens/s", "Training speed over the batch, in tokens"),
    ] {
        let speeds: Vec<_> =
            sweeps.iter().filter(|s| s.unit == unit).map(|s| line(s, s.speeds.clone())).collect();
        plots.extend(over_batch(title, unit, &speeds)?);
    }
    plots.extend(over_batch("Peak of the allocator over the batch", "MB", &memory)?);
    Ok(plots)
}

/// Each timing of the training steps against its case's median; far ones as rings.
fn timings(all: &[Measured<'_>], of: &dyn Fn(&str) -> Vec<f64>) -> Result<Option<Plot>> {
    let rows: Vec<(&Measured<'_>, Vec<f64>)> = all
        .iter()
        .filter(|m| m.case.workload == Workload::TrainStep)
        .map(|m| (m, of(&m.record.id)))
        .filter(|(_, values)| values.len() > 3)
        .collect();
    if rows.is_empty() {
        return Ok(None);
    }
    let line = 40;
    let svg = drawn(rows.len() as u32 * line as u32 + 30, |area| {
        let (left, end) = (24, WIDTH as i32 - 24);
        // From 70 % to 150 % of the median; what lies beyond stands at the edge.
        let scale = |ratio: f64| left + ((end - left) as f64 * (ratio.clamp(0.7, 1.5) - 0.7) / 0.8) as i32;
        for (index, (m, values)) in rows.iter().enumerate() {
            let top = 4 + index as i32 * line;
            let name = format!("{} {} {}", m.case.backend, m.case.method, m.case.shape);
            text(area, &name, (4, top), LARGE)?;
            let mut sorted: Vec<f64> = values.clone();
            sorted.sort_by(f64::total_cmp);
            let quartile = |part: usize| sorted[part * (sorted.len() - 1) / 4];
            let reach = 1.5 * (quartile(3) - quartile(1));
            for value in values {
                let far = *value < quartile(1) - reach || *value > quartile(3) + reach;
                let style = if far { INK.stroke_width(1) } else { colour(m.case.backend).mix(0.35).filled() };
                let at = (scale(value / quartile(2)), top + 26);
                area.draw(&Circle::new(at, 4, style)).map_err(wrong)?;
            }
        }
        let bottom = rows.len() as i32 * line + 8;
        for ratio in [0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5] {
            text(area, &format!("{:.0} %", 100.0 * ratio), (scale(ratio) - 18, bottom), SMALL)?;
        }
        Ok(())
    })?;
    Ok(Some(Plot {
        title: "Timings of the training steps".to_owned(),
        note: "Each against the median of its case; rings: outliers, beyond 1.5 quartile ranges. \
               Again: ./scripts/bench 'train-step'"
            .to_owned(),
        svg,
    }))
}

/// Every other picture that the run has figures for. `of` gives a case's timings in seconds, and
/// nothing where they are not known.
pub fn all(results: &Results, of: &dyn Fn(&str) -> Vec<f64>) -> Result<Vec<Plot>> {
    let measured = super::all_measured(results);
    let mut plots = Vec::new();
    plots.extend(parts(&measured, results.headline())?);
    for &backend in BackendId::ALL {
        plots.extend(roofline(&measured, backend, results.headline())?);
    }
    plots.extend(shared(&measured)?);
    plots.extend(sweeps(&measured)?);
    plots.extend(timings(&measured, of)?);
    plots.extend(times(&measured)?);
    Ok(plots)
}

#[cfg(test)]
mod tests {
    use super::super::all_measured;
    use super::super::tests::record;
    use super::*;
    use crate::results::machine::Machine;

    #[test]
    fn marks_are_round() {
        let marks = |range: Range<f64>| -> Vec<String> {
            Logarithms::from(range).marks.iter().map(|mark| round(10f64.powf(*mark))).collect()
        };
        assert_eq!(marks(0.9..2.2), ["10", "20", "50", "100"]);
        assert_eq!(marks(-1.4..0.1), ["0.05", "0.1", "0.2", "0.5", "1"]);
        assert_eq!(marks(0.5..4.2), ["10", "100", "1000", "10000"]);
    }

    #[test]
    fn what_stands_above_the_roof_says_why() {
        let cases = |forward| {
            [
                ("matmul-peak/torch-cpu/f32/n1024", 10e6),
                ("copy-peak/torch-cpu/f32/256mib", 10e6),
                ("forward/torch-cpu/f32/indicator-b16", forward),
            ]
            .map(|(id, median)| record(id, median))
            .to_vec()
        };
        let note = |forward| {
            let results = Results::new(Machine::default(), cases(forward));
            let measured = all_measured(&results);
            roofline(&measured, BackendId::TorchCpu, results.headline()).unwrap().unwrap().note
        };
        assert!(!note(100e6).contains("above the roof"), "{}", note(100e6));
        let said = note(0.1e6);
        assert!(
            said.contains("forward f32 stands above the roof") && said.contains("products run faster"),
            "{said}"
        );
    }

    #[test]
    fn a_backend_has_its_colour_and_no_phase_has_it() {
        let mut all: Vec<RGBColor> = BackendId::ALL.iter().map(|&backend| colour(backend)).collect();
        all.extend([FORWARD, BACKWARD, OPTIMIZER, REST, EXCHANGE].map(|phase| phase.1));
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b), "{a:?} means two things");
        }
    }
}
