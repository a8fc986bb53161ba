//! Plots of horizontal bars.

use anyhow::Result;
use plotters::prelude::*;

use super::{
    BACKWARD, EXPOSED, FORWARD, INK, Key, LARGE, OPTIMIZER, OTHER, Plot, WIDTH, color, draw_for_page,
    draw_legend, draw_text, plot_error,
};
use crate::installation::command;
use crate::report::format::{percent, speed, time};
use crate::report::headline::{Headline, headlines};
use crate::report::{Measured, find_measured, scaling};
use crate::results::Results;
use crate::suite::{BackendId, Case, Method, Optimizer, Precision, Shape, Workload};

/// Height of a bar with its label.
const BAR_HEIGHT: i32 = 44;

/// A bar of one or more segments, with a label above and a note behind it.
struct Bar {
    label: String,
    /// Lengths and colors.
    segments: Vec<(f64, RGBColor)>,
    interval: Option<[f64; 2]>,
    note: String,
}

impl Bar {
    fn end(&self) -> f64 {
        let length = self.segments.iter().map(|segment| segment.0).sum::<f64>();
        self.interval.map_or(length, |[_, high]| high.max(length))
    }
}

/// Draws bars below each other, with a legend above them if there are keys. Returns `None` without bars.
fn plot_bars(title: String, note: String, bars: &[Bar], keys: &[Key]) -> Result<Option<Plot>> {
    if bars.is_empty() {
        return Ok(None);
    }
    let first = if keys.is_empty() { 4 } else { 28 };
    let longest = bars.iter().map(Bar::end).fold(0.0, f64::max);
    // Room for the notes is on the right.
    let (left, right) = (4, WIDTH as i32 - 150);
    let scale = |value: f64| left + (f64::from(right - left) * value / longest) as i32;
    let svg = draw_for_page((first + bars.len() as i32 * BAR_HEIGHT) as u32, |area| {
        draw_legend(area, keys, 4)?;
        for (index, bar) in bars.iter().enumerate() {
            let line = first + index as i32 * BAR_HEIGHT;
            let (upper, lower) = (line + 20, line + 37);
            draw_text(area, &bar.label, (left, line), LARGE, INK)?;
            let mut from = 0.0;
            for &(length, color) in &bar.segments {
                let corners = [(scale(from), upper), (scale(from + length), lower)];
                area.draw(&Rectangle::new(corners, color.filled())).map_err(plot_error)?;
                from += length;
            }
            if let Some(interval) = bar.interval {
                let line = interval.map(|end| (scale(end), (upper + lower) / 2)).to_vec();
                area.draw(&PathElement::new(line, BLACK.stroke_width(2))).map_err(plot_error)?;
            }
            draw_text(area, &bar.note, (scale(bar.end()) + 6, upper), LARGE, INK)?;
        }
        Ok(())
    })?;
    Ok(Some(Plot { title, note, svg }))
}

/// Draws the training speed of every measured headline row, the first plot of the page.
///
/// # Errors
/// Returns an error if the plot cannot be drawn.
pub fn training(results: &Results) -> Result<Option<Plot>> {
    let shape = results.headline();
    let bar = |row: Headline| {
        let m = find_measured(results, &row.case)?;
        Some(Bar {
            label: row.label,
            segments: vec![(m.speed().value, color(row.case.backend))],
            interval: Some(m.speed().range),
            note: speed(shape, m.median_ns),
        })
    };
    let bars: Vec<Bar> = headlines(results).into_iter().filter_map(bar).collect();
    let note = format!(
        "Higher is better. The lines are 95 % CIs. To repeat: {} 'train-step/.*/{shape}$'",
        command("bench")
    );
    plot_bars(format!("Training speed, {shape}"), note, &bars, &[])
}

/// Draws the step times of each workload and shape.
pub(super) fn step_times(all: &[Measured<'_>]) -> Result<Vec<Plot>> {
    let mut groups: Vec<(Workload, Shape)> = Vec::new();
    for m in all {
        let key = (m.case.workload, m.case.shape);
        let peak = matches!(key.0, Workload::MatmulPeak | Workload::CopyPeak | Workload::AllReduce);
        if !peak && !groups.contains(&key) {
            groups.push(key);
        }
    }
    groups.sort_by_key(|(workload, _)| *workload);
    let mut plots = Vec::new();
    for (workload, shape) in groups {
        let group = all.iter().filter(|m| (m.case.workload, m.case.shape) == (workload, shape));
        let bar = |m: &Measured<'_>| Bar {
            label: format!("{} {}", m.case.backend, m.case.method),
            segments: vec![(m.median_ns, color(m.case.backend))],
            interval: Some(m.ci_ns),
            note: time(m.median_ns),
        };
        let note = format!(
            "Step time: lower is better. The lines are 95 % CIs. To repeat: {} '{workload}/.*/{shape}'",
            command("bench")
        );
        plots.extend(plot_bars(
            format!("{workload}, {shape}"),
            note,
            &group.map(bar).collect::<Vec<_>>(),
            &[],
        )?);
    }
    Ok(plots)
}

/// Draws the phases of an f32 training step, from the workloads that run parts of it.
pub(super) fn phases(all: &[Measured<'_>], shape: Shape) -> Result<Option<Plot>> {
    let keys = [FORWARD, BACKWARD, OPTIMIZER, OTHER];
    let bar = |&backend: &BackendId| {
        let time_of = |workload: Workload| {
            let optimizer = if workload.optimizes() { shape.optimizer() } else { Optimizer::Adamw };
            let shape = shape.with_optimizer(optimizer);
            let case = Case { workload, backend, method: Method::eager(Precision::F32), shape };
            all.iter().find(|m| m.case == case).map(|m| m.median_ns)
        };
        let forward = time_of(Workload::Forward)?;
        let forward_backward = time_of(Workload::ForwardBackward)?;
        let optimizer = time_of(Workload::OptimizerStep)?;
        let step = time_of(Workload::TrainStep)?;
        let lengths = [
            forward,
            (forward_backward - forward).max(0.0),
            optimizer,
            (step - forward_backward - optimizer).max(0.0),
        ];
        Some(Bar {
            label: format!("{backend} f32"),
            segments: lengths.into_iter().zip(keys.map(|(_, color)| color)).collect(),
            interval: None,
            note: format!("step {}", time(step)),
        })
    };
    let bars: Vec<Bar> = BackendId::ALL.iter().filter_map(bar).collect();
    let note = format!(
        "Backward is the time of forward-backward minus forward, and forward runs without dropout. Each workload is \
         measured separately, so the parts need not add up. To repeat: {} '/f32/{shape}'",
        command("bench")
    );
    plot_bars(format!("Phases of a training step, {shape}"), note, &bars, &keys)
}

/// Draws the data-parallel training steps with their exposed communication.
pub(super) fn data_parallel(all: &[Measured<'_>]) -> Result<Option<Plot>> {
    let bar = |s: &scaling::Scaling<'_>| {
        let case = s.step.case;
        let exposed = s.stats.exposed_communication.map_or(0.0, |[share, ..]| share.clamp(0.0, 1.0));
        let efficiency = s.weak.or(s.strong).map(|share| format!(", {}", percent(share.value)));
        Bar {
            label: format!("{} {} {}", case.backend, case.method, case.shape),
            segments: vec![(1.0 - exposed, color(case.backend)), (exposed, EXPOSED.1)],
            interval: None,
            note: time(s.step.median_ns) + &efficiency.unwrap_or_default(),
        }
    };
    let scalings = scaling::scalings(all);
    let steps = scalings.iter().filter(|s| s.step.case.workload == Workload::TrainStep);
    let bars: Vec<Bar> = steps.map(bar).collect();
    let note = format!(
        "Each bar is one step, with its time and its scaling efficiency (weak, or else strong). To repeat: \
         {} --full 'train-step/.*/indicator-b'",
        command("bench")
    );
    plot_bars("Data-parallel training steps".to_owned(), note, &bars, &[EXPOSED])
}
