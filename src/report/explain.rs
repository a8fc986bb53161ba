//! The operations of a training step: one sentence and a table.

use super::format::{digits, or_dash, percent};
use super::table::Table;
use crate::results::operations::{Explanation, OperationTime};
use crate::suite::Case;

/// Share of the slower step by which both must differ before the sentence names a loser. Medians of one process differ by
/// some per cent in the next one.
const MIN_DIFFERENCE: f64 = 0.05;
/// Share of the difference that the named operations explain together, and their largest number.
const EXPLAINED: f64 = 0.8;
const MAX_NAMED: usize = 3;

/// Operations below this share of both steps have no row of their own.
const SMALL_SHARE: f64 = 0.002;

/// An operation with all its passes.
struct Group<'a> {
    name: &'a str,
    /// Time that the slower side loses in a step, in nanoseconds. It is negative if that side is faster.
    lost_ns: f64,
    has_gradient: bool,
}

/// Returns the name of a backend, such as `PyTorch CPU`, or the whole id.
fn label(id: &str) -> String {
    id.parse::<Case>().map_or_else(|_| id.to_owned(), |case| case.backend.label().to_owned())
}

/// Returns the name of an operation in a sentence.
fn spoken(explanation: &Explanation, operation: &str) -> String {
    match operation {
        "activation" => match &*explanation.activation {
            "gelu" => "GELU".to_owned(),
            "gelu-tanh" => "GELU (tanh)".to_owned(),
            "silu" => "SiLU".to_owned(),
            "relu" => "ReLU".to_owned(),
            other => other.replace('-', " "),
        },
        "q-k-v" => "the q-k-v projections".to_owned(),
        other => format!("the {}", other.replace('-', " ")),
    }
}

fn lost_ns(explanation: &Explanation, operation: &OperationTime) -> f64 {
    let slower = explanation.slower();
    operation.step_ns(slower) - operation.step_ns(1 - slower)
}

/// Returns the operations, those with the largest loss first.
fn groups(explanation: &Explanation) -> Vec<Group<'_>> {
    let mut all: Vec<Group<'_>> = Vec::new();
    for time in &explanation.operations {
        let has_gradient = !matches!(&*time.pass, "forward" | "update");
        let lost_ns = lost_ns(explanation, time);
        match all.iter_mut().find(|group| group.name == time.operation) {
            Some(group) => {
                group.lost_ns += lost_ns;
                group.has_gradient |= has_gradient;
            }
            None => all.push(Group { name: &time.operation, lost_ns, has_gradient }),
        }
    }
    all.sort_by(|a, b| b.lost_ns.total_cmp(&a.lost_ns));
    all
}

fn seconds(ns: f64) -> String {
    if ns.abs() >= 1e8 { format!("{:.2} s", ns / 1e9) } else { format!("{} ms", digits(ns / 1e6)) }
}

/// Returns the sentence that names the operations in which the slower side loses its time.
pub fn sentence(explanation: &Explanation) -> String {
    let slower = explanation.slower();
    let [slow, fast] = [slower, 1 - slower].map(|side| label(&explanation.ids[side]));
    let [slow_ns, fast_ns] = [slower, 1 - slower].map(|side| explanation.step_ns[side]);
    let difference = slow_ns - fast_ns;
    if difference < MIN_DIFFERENCE * slow_ns {
        return format!(
            "The steps of {slow} and {fast} differ by {}, which is too little to explain.",
            percent(difference / slow_ns)
        );
    }
    let mut named: Vec<String> = Vec::new();
    let mut explained = 0.0;
    for group in groups(explanation) {
        let is_enough = explained >= EXPLAINED * difference || named.len() == MAX_NAMED;
        if is_enough || group.lost_ns < MIN_DIFFERENCE * difference {
            break;
        }
        explained += group.lost_ns;
        let name = spoken(explanation, group.name);
        let gradient = match (group.has_gradient, name.ends_with('s') && name.starts_with("the ")) {
            (false, _) => "",
            (true, false) => " and its gradient",
            (true, true) => " and their gradients",
        };
        named.push(format!("{} in {name}{gradient}", seconds(group.lost_ns)));
    }
    let whole = format!("{slow} takes {} longer a step than {fast}", seconds(difference));
    match named.split_last() {
        None => format!("{whole}, and no operation explains it: see the last rows."),
        Some((only, [])) => format!("{whole}. It loses {only}."),
        Some((last, others)) => format!("{whole}. It loses {} and {last}.", others.join(", ")),
    }
}

/// Returns the table of the operations, with the largest losses first.
pub fn table(explanation: &Explanation) -> Table {
    let sides = explanation.ids.each_ref().map(|id| label(id));
    let slower = explanation.slower();
    let mut operations: Vec<&OperationTime> = explanation.operations.iter().collect();
    operations.sort_by(|a, b| lost_ns(explanation, b).total_cmp(&lost_ns(explanation, a)));
    let milliseconds = |ns: f64| digits(ns / 1e6);
    let row = |operation: &&OperationTime| {
        let mut cells =
            vec![operation.operation.clone(), operation.pass.clone(), operation.count.to_string()];
        for side in 0..2 {
            let is_known = operation.ns[side].is_some();
            let step = operation.step_ns(side);
            let roofline = explanation.roofline_ns(operation) * operation.count as f64 / step;
            cells.push(or_dash(is_known.then(|| milliseconds(step))));
            cells.push(or_dash(is_known.then(|| percent(step / explanation.step_ns[side]))));
            cells.push(or_dash((is_known && roofline > 0.0).then(|| format!("{:.0} %", 100.0 * roofline))));
        }
        cells.push(milliseconds(lost_ns(explanation, operation)));
        cells
    };
    let is_small = |operation: &&OperationTime| {
        (0..2).all(|side| operation.step_ns(side) < SMALL_SHARE * explanation.step_ns[side])
    };
    let (small, shown): (Vec<&OperationTime>, Vec<_>) = operations.into_iter().partition(is_small);
    let mut rows: Vec<Vec<String>> = shown.iter().map(row).collect();
    let sums = [0, 1].map(|side| explanation.sum_ns(side));
    let total = |name: &str, ns: [f64; 2]| {
        let mut cells = vec![name.to_owned(), String::new(), String::new()];
        for (ns, step_ns) in ns.iter().zip(explanation.step_ns) {
            cells.extend([milliseconds(*ns), percent(ns / step_ns), String::new()]);
        }
        cells.push(milliseconds(ns[slower] - ns[1 - slower]));
        cells
    };
    let of_small = [0, 1].map(|side| small.iter().map(|operation| operation.step_ns(side)).sum());
    if !small.is_empty() {
        rows.push(total(&format!("{} smaller ones", small.len()), of_small));
    }
    rows.push(total("whole step", explanation.step_ns));
    rows.push(total("sum of the parts", sums));
    let [first, second] = &sides;
    let header = format!(
        "operation|pass|calls|{first} ms|of the step|of the roofline|{second} ms|of the step|of the roofline|{} loses ms",
        sides[slower]
    );
    let note = format!(
        "{} Times of all calls in a step. The roofline is the time at {}FLOP/s or {}B/s, the measured rates of a matrix product \
         and of a copy, whichever is longer. Data in a cache can exceed it. The sum of the parts over the whole step shows \
         what fusion, launches and allocation change.",
        sentence(explanation),
        super::format::prefixed(explanation.peak_flops),
        super::format::prefixed(explanation.peak_bytes)
    );
    let title = format!("Operations of {} and {}", explanation.ids[0], explanation.ids[1]);
    Table::new(title, &note, &header, rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(operation: &str, pass: &str, count: u64, ns: [f64; 2]) -> OperationTime {
        let [operation, pass] = [operation, pass].map(str::to_owned);
        OperationTime { operation, pass, count, flops: 0, bytes: 1 << 20, ns: ns.map(Some) }
    }

    fn explanation(step_ns: [f64; 2]) -> Explanation {
        Explanation {
            ids: ["torch", "mlx"].map(|f| format!("train-step/{f}-cpu/f32/indicator-b16")),
            step_ns,
            activation: "gelu".to_owned(),
            peak_flops: 1e11,
            peak_bytes: 1e10,
            operations: vec![
                time("q-k-v", "forward", 18, [1e6, 1.5e6]),
                time("activation", "forward", 6, [2e6, 4e7]),
                time("activation", "backward", 6, [3e6, 8e7]),
                time("optimizer", "update", 1, [4e7, 2e7]),
            ],
            commit: "0".to_owned(),
        }
    }

    #[test]
    fn the_sentence_names_the_largest_loss() {
        let found = sentence(&explanation([4e8, 1.2e9]));
        // 6 · (38 + 77) ms.
        let expected = "MLX (CPU) takes 0.80 s longer a step than PyTorch CPU. It loses 0.69 s in GELU and its gradient.";
        assert_eq!(found, expected);
        assert!(sentence(&explanation([1.2e9, 1.21e9])).contains("too little"));
        // PyTorch is slower here, and its optimizer is the only operation in which it loses.
        let found = sentence(&explanation([1.2e9, 1.1e9]));
        assert!(
            found.contains("PyTorch CPU takes 0.10 s longer") && found.contains("20.0 ms in the optimizer"),
            "{found}"
        );
        let found = sentence(&explanation([1.2e10, 1e9]));
        assert!(found.contains("no operation explains it"), "{found}");
    }

    #[test]
    fn the_table_is_sorted_and_its_numbers_divide() {
        let explanation = explanation([4e8, 1.2e9]);
        let table = table(&explanation);
        let column = |name: &str| table.header.iter().position(|title| title == name).unwrap();
        let number = |row: &[String], column: usize| -> f64 {
            row[column].split(' ').next().unwrap().replace(',', "").parse().unwrap()
        };
        let (lost, torch, mlx) =
            (column("MLX (CPU) loses ms"), column("PyTorch CPU ms"), column("MLX (CPU) ms"));
        let losses: Vec<f64> = table.rows[..4].iter().map(|row| number(row, lost)).collect();
        assert!(losses.is_sorted_by(|a, b| a >= b), "{losses:?}");
        for row in &table.rows {
            assert!((number(row, mlx) - number(row, torch) - number(row, lost)).abs() <= 1.0, "{row:?}");
        }
        let [whole, sum] = &table.rows[4..] else { panic!("two rows of totals") };
        for side in [torch, mlx] {
            let parts: f64 = table.rows[..4].iter().map(|row| number(row, side)).sum();
            assert!((parts - number(sum, side)).abs() <= 1.0);
            let share = 100.0 * number(sum, side) / number(whole, side);
            assert!((share - number(sum, side + 1)).abs() < 0.2, "{sum:?}");
        }
        // A call moves 1 MiB, which takes 0.105 ms, and 18 calls of PyTorch take 18 ms.
        let row = table.rows.iter().find(|row| row[0] == "q-k-v").unwrap();
        assert_eq!(row[torch + 2], "10 %");
    }
}
