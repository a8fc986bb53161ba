//! Times until the first step, and the number of steps after which compiling pays.

use super::format::{digits, significant, time};
use super::table::Table;
use crate::results::first_step::{FirstSteps, StartTimes, break_even};
use crate::suite::{Case, Framework};

/// Formats the number of steps after which a step pays, with the duration of such a run.
fn pays(start: &[StartTimes; 2], step_ns: [f64; 2]) -> String {
    let Some(even) = break_even(start, step_ns) else { return "never: its steps are not faster".to_owned() };
    let steps = even.steps.ceil();
    if steps <= 1.0 {
        return "the first step".to_owned();
    }
    let run = if even.ns >= 60e9 { format!("{} min", digits(even.ns / 60e9)) } else { time(even.ns) };
    format!("{} steps ({run})", count(steps))
}

/// Formats a whole number with at most three significant digits.
fn count(number: f64) -> String {
    let unit = 10f64.powi((number.log10().floor() as i32 - 2).max(0));
    significant((number / unit).round() * unit, 1)
}

/// Returns the table of first steps.
pub fn table(all: &[FirstSteps]) -> Table {
    let mut rows = Vec::new();
    for steps in all {
        for (side, caches, starts) in
            [(0, "empty", &steps.cold), (1, "empty", &steps.cold), (1, "filled", &steps.warm)]
        {
            let start = &starts[side];
            let program = if steps.python { " in Python" } else { "" };
            rows.push(vec![
                format!("{}{program}", steps.ids[side]),
                caches.to_owned(),
                if start.made_ns >= 1e6 { time(start.made_ns) } else { String::new() },
                time(start.loaded_ns),
                time(start.first_ns),
                time(start.second_ns),
                time(steps.step_ns[side]),
                if side == 0 { String::new() } else { pays(starts, steps.step_ns) },
            ]);
        }
    }
    let python = if all.iter().any(|steps| steps.python) {
        " In Python, loading imports torch and builds the model, and the first step compiles."
    } else {
        ""
    };
    let is_mlx = |steps: &FirstSteps| {
        steps.ids[1].parse::<Case>().is_ok_and(|case| case.backend.framework() == Framework::Mlx)
    };
    let kernels = if all.iter().any(is_mlx) { " MLX compiles its kernels while it loads." } else { "" };
    let note = format!(
        "Each start is a new process. Compiling pays from the number of steps on at which the whole run, with its start, is as \
         long as an eager one.{kernels}{python}"
    );
    let header = "case|caches|make|load|first step|second step|later steps|compiling pays after";
    Table::new("First steps", &note, header, rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_shows_when_compiling_pays() {
        let start = |made_ns: f64| StartTimes { made_ns, loaded_ns: 2e9, first_ns: 4e8, second_ns: 4e8 };
        let steps = FirstSteps {
            ids: ["f32", "f32-compile"].map(|method| format!("train-step/torch-cpu/{method}/indicator-b16")),
            cold: [start(0.0), start(6e10)],
            warm: [start(0.0), start(0.0)],
            step_ns: [4e8, 3e8],
            python: false,
            commit: String::new(),
        };
        let table = table(std::slice::from_ref(&steps));
        let last = |row: usize| table.rows[row].last().unwrap().as_str();
        // 60 s over 0.1 s a step, after two steps: 602 steps. They take 62.8 s and 600 · 0.3 s.
        assert_eq!([last(0), last(1), last(2)], ["", "602 steps (4.05 min)", "2 steps (2.80 s)"]);
        assert!(!table.note.contains("MLX") && !table.note.contains("Python"));
        let python = super::table(&[FirstSteps { python: true, ..steps.clone() }]);
        assert!(python.rows[1][0].ends_with("f32-compile/indicator-b16 in Python"));
        assert!(python.note.contains("imports torch"));
        let slow = FirstSteps { step_ns: [3e8, 4e8], ..steps };
        assert!(super::table(&[slow]).rows[1].last().unwrap().starts_with("never"));
    }
}
