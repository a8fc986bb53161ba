//! The tables, as every export shows them: cells are formatted here and nowhere else.

use super::{
    Headline, Measured, Sweep, Utilisation, ablation, all_measured, batches, find, headlines, measured,
    measured_peak, rate, scaling, utilisation,
};
use crate::model::parameters::parameter_count;
use crate::results::{EnvEffect, Record, Results, Status, Throughput, machine};
use crate::suite::{BackendId, Case, Device, Method, Precision, Shape, Workload, cost};
use crate::{interference, memory};

/// The title of the table that has them all.
pub const EVERY_CASE: &str = "Every case";

/// A table with its title.
#[derive(Clone, Debug)]
pub struct Table {
    pub title: String,
    pub note: &'static str,
    pub header: &'static [&'static str],
    pub rows: Vec<Vec<String>>,
}

/// Three significant digits, and all before the point: `0.0123`, `123`, `11,611`.
pub fn digits(value: f64) -> String {
    let places = if value == 0.0 { 0 } else { (2 - value.abs().log10().floor() as i32).clamp(0, 9) };
    let text = format!("{value:.*}", places as usize);
    if value.abs() < 9999.5 {
        return text;
    }
    let count = text.len();
    let grouped = |(i, c): (usize, char)| {
        let comma = i > 0 && (count - i).is_multiple_of(3) && text.as_bytes()[i - 1] != b'-';
        comma.then_some(',').into_iter().chain([c])
    };
    text.chars().enumerate().flat_map(grouped).collect()
}

/// What a second of such steps gets through, with its unit.
pub fn rate_text(shape: Shape, ns: f64) -> String {
    let (value, unit) = rate(shape, ns);
    format!("{} {unit}", digits(value))
}

/// 1 234 567 with a prefix: `1.23 M`.
pub fn prefixed(value: f64) -> String {
    let (scale, prefix) = match value {
        v if v >= 1e12 => (1e12, " T"),
        v if v >= 1e9 => (1e9, " G"),
        v if v >= 1e6 => (1e6, " M"),
        v if v >= 1e4 => (1e3, " k"),
        _ => (1.0, " "),
    };
    digits(value / scale) + prefix
}

pub fn time(ns: f64) -> String {
    match ns {
        n if n >= 1e9 => digits(n / 1e9) + " s",
        n if n >= 1e6 => digits(n / 1e6) + " ms",
        n if n >= 1e3 => digits(n / 1e3) + " µs",
        n => digits(n) + " ns",
    }
}

pub fn bytes(value: Option<u64>) -> Option<String> {
    value.map(|v| digits(v as f64 / 1e6) + " MB")
}

/// Half of the interval's width, in percent of the median.
fn spread(median: f64, ci: [f64; 2]) -> f64 {
    (ci[1] - ci[0]) / 2.0 / median * 100.0
}

fn speed(results: &Results) -> Table {
    let shape = results.headline();
    let headlines = headlines(results);
    let base = headlines.iter().find_map(|row| measured(find(results, &row.case)).map(|m| m.1));
    let speed = |ns| digits(rate(shape, ns).0);
    let row = |row: &Headline| {
        let record = find(results, &row.case)?;
        let cells = match (measured(Some(record)), record.status) {
            (Some((_, median, ci)), _) => {
                let interval = format!("{} to {}", speed(ci[1]), speed(ci[0]));
                [speed(median), interval, format!("{:.2}×", base? / median), remarks(record)]
            }
            // Of what is too slow there is one measurement.
            (None, Status::TooSlow) => {
                let once = record.median_ns?;
                let times = base.map_or_else(|| "–".to_owned(), |base| format!("{:.2}×", base / once));
                [speed(once), "–".to_owned(), times, format!("{}, measured once", record.reason)]
            }
            _ => return None,
        };
        Some(std::iter::once(row.label.clone()).chain(cells).collect())
    };
    Table {
        title: format!("Training speed, {shape}"),
        note: "Speed is against the first row.",
        header: match rate(shape, 1.0).1 {
            "tokens/s" => &["", "tokens/s", "95 % interval", "speed", "remarks"],
            _ => &["", "samples/s", "95 % interval", "speed", "remarks"],
        },
        rows: headlines.iter().filter_map(row).collect(),
    }
}

/// What a reader of a figure must know.
fn remarks(record: &Record) -> String {
    let few = record.too_few_samples().map(|n| format!("{n} steps, whose range is shown"));
    let waited = record.cpu_wait_share.filter(|_| record.disturbed());
    let waited = waited.map(|s| format!("disturbed: waited for a core for {:.0} % of its time", 100.0 * s));
    few.into_iter().chain(waited).collect::<Vec<_>>().join("; ")
}

fn memory(results: &Results) -> Table {
    let shape = results.headline();
    let row = |row: &Headline| {
        let (record, ..) = measured(find(results, &row.case))?;
        let none = || "–".to_owned();
        let note =
            if record.peak_bytes.is_none() { "this framework keeps no peak on this device" } else { "" };
        Some(vec![
            row.label.clone(),
            bytes(record.peak_bytes).unwrap_or_else(none),
            bytes(record.rss_peak_bytes).unwrap_or_else(none),
            note.to_owned(),
        ])
    };
    let rows = headlines(results).iter().filter_map(row).collect();
    Table {
        title: format!("Memory of a training step, {shape}"),
        note: "Two definitions, never to be compared with each other: the peak of the framework's own \
               allocator, and the peak resident size of the whole process, libraries included.",
        header: &["", "allocator peak", "resident peak", "note"],
        rows,
    }
}

fn recipes(all: &[Measured<'_>]) -> Table {
    let rows: Vec<_> = ablation(all)
        .into_iter()
        .map(|(m, speed)| {
            vec![
                m.case.backend.to_string(),
                m.case.shape.to_string(),
                m.case.method.to_string(),
                time(m.median_ns),
                format!("{speed:.2}×"),
            ]
        })
        .collect();
    Table {
        title: "What each optimisation brings to a training step".to_owned(),
        note: "",
        header: &["backend", "shape", "recipe", "median", "against f32"],
        rows,
    }
}

/// Tips that change no code, and the backend that each is given for.
const TIPS: [(BackendId, &str); 4] = [
    (BackendId::TorchCpu, "OMP_NUM_THREADS=1"),
    (BackendId::TorchCpu, "TRANSFORMER_BENCH_HEAP=system"),
    (BackendId::MlxCpu, "TRANSFORMER_BENCH_HEAP=system"),
    (BackendId::TorchMps, "PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0"),
];

fn settings(results: &Results) -> Table {
    let row = |s: &EnvEffect| {
        vec![
            s.variables.clone(),
            s.id.clone(),
            time(s.without_ns),
            time(s.with_ns),
            format!("{:.2}×", 1.0 / s.ratio),
            format!("{:.2} to {:.2}", 1.0 / s.ratio_ci[1], 1.0 / s.ratio_ci[0]),
        ]
    };
    Table {
        title: "What settings bring".to_owned(),
        note: "Environment variables, interleaved with and without.",
        header: &["setting", "case", "without", "with", "speed", "99 % interval"],
        rows: results.env_effects.iter().map(row).collect(),
    }
}

/// The tips that nobody tried here, with the commands that would.
fn untried(results: &Results) -> Vec<String> {
    let headlines = headlines(results);
    let line = |(backend, tip): (BackendId, &str)| {
        let eager = headlines.iter().map(|row| row.case).find(|case| case.backend == backend)?;
        let (record, ..) = measured(find(results, &eager))?;
        let tried = results.env_effects.iter().any(|s| s.variables == tip && s.id == record.id);
        (!tried)
            .then(|| format!("{tip} on {backend}: ./scripts/compare worktree --env {tip} '{}'", record.id))
    };
    TIPS.into_iter().filter_map(line).collect()
}

fn sweep(all: &[Measured<'_>]) -> Table {
    let rows: Vec<_> = batches(all)
        .into_iter()
        .map(|Sweep { model, backend, precision, speeds, unit }| {
            let best = speeds.iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("more than one");
            let list: Vec<_> =
                speeds.iter().map(|(batch, speed)| format!("{batch}: {}", digits(*speed))).collect();
            vec![
                model.to_string(),
                backend.to_string(),
                precision.to_string(),
                list.join(", "),
                unit.to_owned(),
                format!("{}", best.0),
            ]
        })
        .collect();
    Table {
        title: "Batch size: speed of a training step".to_owned(),
        note: "",
        header: &["model", "backend", "precision", "speed by batch", "unit", "best batch"],
        rows,
    }
}

fn percent(part: Utilisation) -> String {
    match part {
        Utilisation::Of(part) => format!("{:.1} %", part * 100.0),
        Utilisation::Unknown => "n/a".to_owned(),
        Utilisation::Impossible(part) => format!("error: {:.0} % can't be", part * 100.0),
    }
}

/// The user's own model in a line, where one was measured.
pub fn model_line(results: &Results) -> Option<String> {
    let own = results.model.as_ref()?;
    let (m, shape) = (own.configuration, own.custom_model().shape());
    let step = Case {
        workload: Workload::TrainStep,
        backend: BackendId::TorchCpu,
        method: Method::eager(Precision::F32),
        shape,
    };
    let tokens = own.batch * m.tokens;
    let shared = if m.key_value_heads == m.heads {
        String::new()
    } else {
        format!(" ({} of keys and values)", m.key_value_heads)
    };
    Some(format!(
        "{}: {:.1} M parameters, {} layers of width {}, {} heads{shared}; batch {} of {} tokens, {:.3} GFLOP a token \
         in training",
        m.name,
        parameter_count(shape) as f64 / 1e6,
        m.layers,
        m.width,
        m.heads,
        own.batch,
        m.tokens,
        cost::flops(&step) as f64 / tokens as f64 / 1e9
    ))
}

fn of_tokens(results: &Results, all: &[Measured<'_>]) -> Table {
    let rows: Vec<_> = all
        .iter()
        .filter_map(|m| {
            let Shape::Model { model, batch, ranks } = m.case.shape else { return None };
            if !model.is_language_model() || model.is_miniature() {
                return None;
            }
            if !matches!(m.case.workload, Workload::TrainStep | Workload::Forward | Workload::ForwardBackward)
            {
                return None;
            }
            let seconds = m.median_ns * 1e-9;
            let tokens = (batch * model.tokens) as f64 / seconds;
            // Of one device, as its peaks are.
            let rate = cost::flops(&m.case) as f64 / seconds / ranks as f64;
            let compute = m.case.method.precision;
            let gpu = m.case.backend.device() == Device::NvidiaGpu;
            let sheet = results.machine.gpus.first().filter(|_| gpu);
            let sheet = sheet.and_then(|gpu| machine::dense_peak(gpu, compute));
            let own = measured_peak(all, m.case.backend, compute);
            Some(vec![
                m.case.to_string(),
                time(m.median_ns),
                prefixed(tokens),
                digits(rate / 1e12),
                percent(utilisation(rate, sheet)),
                percent(utilisation(rate, own)),
            ])
        })
        .collect();
    Table {
        title: "Models of tokens".to_owned(),
        note: "Model FLOPs utilisation: against the data sheet's dense peak, and against the best \
               `matmul-peak` of the same backend and format in this run.",
        header: &["case", "median", "tokens/s", "TFLOP/s", "of the data sheet", "of matmul-peak"],
        rows,
    }
}

/// In the unit of its model, where it has one.
fn throughput_of(record: &Record, throughput: &Throughput) -> String {
    let case = record.id.parse::<Case>().ok().filter(|_| throughput.unit == "samples/s");
    match (case, record.median_ns) {
        (Some(case), Some(median)) => rate_text(case.shape, median),
        _ => prefixed(throughput.value) + &throughput.unit,
    }
}

/// A measured case in words.
fn case_row(record: &Record) -> Vec<String> {
    let median = record.median_ns.filter(|_| record.status == Status::Measured);
    let throughput = record.throughput.as_ref();
    vec![
        record.id.clone(),
        median.map_or_else(|| "–".to_owned(), time),
        match (median, record.ci_ns) {
            (Some(median), Some(ci)) => format!("±{} %", digits(spread(median, ci))),
            _ => "–".to_owned(),
        },
        throughput.map_or_else(|| "–".to_owned(), |t| throughput_of(record, t)),
        record.samples.filter(|_| median.is_some()).map_or_else(|| "–".to_owned(), |n| n.to_string()),
        faults(record),
        record.parity.map_or_else(|| "–".to_owned(), |share| format!("{share:.2}")),
        record.cpu_wait_share.map_or_else(
            || "–".to_owned(),
            |share| {
                let mark = if record.disturbed() { ": disturbed" } else { "" };
                format!("{} %{mark}", digits(100.0 * share))
            },
        ),
    ]
}

/// Page faults a step, marked where they take much of it.
fn faults(record: &Record) -> String {
    match (record.page_faults, record.page_fault_share) {
        (Some(count), Some(share)) if share > memory::FAULT_SHARE_THRESHOLD => {
            format!("{count:.0}: {:.0} % of the step", 100.0 * share)
        }
        (Some(count), _) => format!("{count:.0}"),
        _ => "–".to_owned(),
    }
}

/// The table of which framework trains how fast, where any did.
pub fn first(results: &Results) -> Option<Table> {
    Some(speed(results)).filter(|table| !table.rows.is_empty())
}

/// Every other table that has rows, in the order in which a reader wants them.
pub fn all(results: &Results) -> Vec<Table> {
    let measured = all_measured(results);
    let mut tables = vec![memory(results)];
    tables.extend([
        recipes(&measured),
        settings(results),
        sweep(&measured),
        scaling::table(&measured),
        of_tokens(results, &measured),
    ]);
    tables.push(Table {
        title: EVERY_CASE.to_owned(),
        note: "Parity: how much of the error that its precision allows the worst tensor of the case took, at this \
               shape. Waited: the part of its time that threads were ready and had no core.",
        header: &["case", "median", "95 % interval", "throughput", "timings", "page faults", "parity", "waited"],
        rows: results.cases.iter().filter(|r| r.status == Status::Measured).map(case_row).collect(),
    });
    tables.retain(|table| !table.rows.is_empty());
    tables
}

/// Why rows and cases have no figure, a line a reason: absent backends would fill pages.
pub fn missing(results: &Results) -> Vec<String> {
    struct Missing {
        why: String,
        rows: Vec<String>,
        ids: Vec<String>,
    }
    let mut all: Vec<Missing> = Vec::new();
    let mut add = |why: String, row: Option<String>, id: Option<&str>| {
        let known = all.iter().position(|missing| missing.why == why).unwrap_or_else(|| {
            all.push(Missing { why, rows: Vec::new(), ids: Vec::new() });
            all.len() - 1
        });
        all[known].rows.extend(row);
        all[known].ids.extend(id.map(str::to_owned));
    };
    let headlines = headlines(results);
    for record in results.cases.iter().filter(|r| r.status != Status::Measured) {
        let backend = record.id.parse::<Case>().map_or_else(|_| String::new(), |c| c.backend.to_string());
        let why = match record.status {
            Status::Skipped => format!("{backend}: {}", record.reason),
            _ => record.reason.clone(),
        };
        let row = headlines.iter().find(|row| row.case.to_string() == record.id);
        add(why, row.map(|row| row.label.clone()), Some(&record.id));
    }
    for row in headlines.iter().filter(|row| find(results, &row.case).is_none()) {
        add("not part of this run".to_owned(), Some(row.label.clone()), None);
    }
    let line = |missing: Missing| {
        let cases = match &missing.ids[..] {
            [] => None,
            [id] => Some(id.clone()),
            ids => Some(format!("{} cases", ids.len())),
        };
        let what: Vec<String> = missing.rows.into_iter().chain(cases).collect();
        format!("{} ({})", missing.why, what.join(", "))
    };
    all.into_iter().map(line).chain(untried(results)).collect()
}

/// Whether anything else had the machine: true where it was quiet, and a line.
pub fn quiet(results: &Results) -> (bool, String) {
    let m = &results.machine;
    let measured: Vec<&Record> = results.cases.iter().filter(|r| r.status == Status::Measured).collect();
    let disturbed = measured.iter().filter(|r| r.disturbed()).count();
    let busy = m.background_load.is_some_and(|others| others > interference::WAIT_THRESHOLD * m.cores as f64);
    let others = m.background_load.map_or_else(
        || "before the run nobody looked".to_owned(),
        |others| format!("others used {others:.1} of {} cores before the run", m.cores),
    );
    let waited = match disturbed {
        0 => format!("no case of {} waited for a core", measured.len()),
        count => format!("{count} of {} cases waited for a core", measured.len()),
    };
    let quiet = disturbed == 0 && !busy;
    (quiet, format!("{} machine: {others}, {waited}", if quiet { "Quiet" } else { "Disturbed" }))
}

/// What a reader on a kind of machine that nobody has sent figures of can do.
pub fn invitation(results: &Results) -> Option<&'static str> {
    results.machine.os.to_lowercase().contains("macos").then_some(
        "No figures of a Mac are published yet: `./scripts/baseline save first-mac` keeps these, and a pull \
         request with the new folder in criterion-baselines/ shares them.",
    )
}

/// The machine in a line, and what computed in another.
pub fn machine_lines(results: &Results) -> [String; 2] {
    let m = &results.machine;
    let date = if m.date.is_empty() { String::new() } else { format!("{}, ", m.date) };
    let gpus = if m.gpus.is_empty() { "no GPU".to_owned() } else { m.gpus.join(", ") };
    let dirty = if m.dirty { ", with uncommitted changes" } else { "" };
    let hardware = format!(
        "{} ({} cores), {:.0} GB, {gpus}{}{}, {}, {date}commit {}{dirty}.",
        m.cpu,
        m.cores,
        m.memory_bytes as f64 / 1e9,
        if m.driver.is_empty() { "" } else { ", " },
        m.driver,
        m.os,
        m.commit
    );
    let versions: Vec<_> = m.versions.iter().map(|(name, value)| format!("{name}: {value}")).collect();
    [hardware, format!("{}.", versions.join("; "))]
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;

    fn step(precision: &str, median: f64) -> Record {
        record(&format!("train-step/torch-cuda/{precision}/indicator-b16"), median)
    }

    #[test]
    fn the_fastest_recipe_is_always_in_the_table() {
        let mut cases = vec![step("f32", 20e6), step("mixed-compile", 2e6)];
        let rows = |cases: &[Record]| {
            first(&Results::new(machine::Machine::default(), cases.to_vec())).unwrap().rows
        };
        assert_eq!(rows(&cases).len(), 2);
        cases.push(step("bf16-compile", 1e6));
        let all = rows(&cases);
        assert_eq!(all[2][0], "PyTorch CUDA, parameters in bf16 (bf16-compile)");
        assert_eq!(all[2][1..4], ["16,000", "14,545 to 17,778", "20.00×"]);
        cases.push(step("tf32-tuned", 0.5e6));
        assert_eq!(rows(&cases)[2][0], "PyTorch CUDA, products in TF32 (tf32-tuned)");
    }

    #[test]
    fn a_run_is_quiet_or_disturbed() {
        let mut results =
            Results::new(machine::Machine { cores: 2, ..Default::default() }, vec![step("f32", 2e7)]);
        results.machine.background_load = Some(0.0);
        assert_eq!(
            quiet(&results),
            (
                true,
                "Quiet machine: others used 0.0 of 2 cores before the run, no case of 1 waited for a core"
                    .to_owned()
            )
        );
        results.machine.background_load = Some(1.0);
        assert!(quiet(&results).1.starts_with("Disturbed machine: others used 1.0 of 2 cores"));
        results.machine.background_load = None;
        results.cases[0].cpu_wait_share = Some(0.2);
        let (calm, said) = quiet(&results);
        assert!(!calm && said.contains("1 of 1 cases waited") && said.contains("nobody looked"), "{said}");
    }

    #[test]
    fn models_of_tokens_are_told_in_tokens() {
        let with_rate = |id, median: f64| {
            let unit = "samples/s".to_owned();
            Record { throughput: Some(Throughput { value: 1.0, unit }), ..record(id, median) }
        };
        let cases = vec![
            with_rate("train-step/torch-cpu/f32/gpt2-b8-t1024", 8.192e9),
            with_rate("forward/torch-cpu/f32/indicator-b16", 1e9),
        ];
        let results = Results::new(machine::Machine::default(), cases);
        let tables = all(&results);
        let every = tables.last().unwrap();
        let told: Vec<&str> = every.rows.iter().map(|row| row[3].as_str()).collect();
        assert_eq!(told, ["1000 tokens/s", "16.0 samples/s"]);
    }

    #[test]
    fn a_tip_has_a_figure_or_the_command_that_gives_it() {
        let id = "train-step/torch-cpu/f32/indicator-b16";
        let mut results = Results::new(machine::Machine::default(), vec![record(id, 5e8)]);
        let open = untried(&results);
        assert!(settings(&results).rows.is_empty() && open.len() == 2, "{open:?}");
        assert!(open[1].contains("--env TRANSFORMER_BENCH_HEAP=system"), "{open:?}");
        assert!(open[0].contains("--env OMP_NUM_THREADS=1 'train-step/torch-cpu/f32/"), "{open:?}");
        assert!(missing(&results).contains(&open[0]));
        results.env_effects.push(crate::results::EnvEffect {
            variables: "OMP_NUM_THREADS=1".to_owned(),
            id: id.to_owned(),
            without_ns: 5e8,
            with_ns: 1e9,
            ratio: 2.0,
            ratio_ci: [1.6, 2.5],
            commit: String::new(),
        });
        assert_eq!(settings(&results).rows[0][2..], ["500 ms", "1.00 s", "0.50×", "0.40 to 0.62"]);
        assert_eq!((settings(&results).rows.len(), untried(&results).len()), (1, 1));
    }

    #[test]
    fn a_step_that_faults_much_is_marked() {
        let mut kept = record("attention/torch-cpu/f32/b16-h8-t111-d32", 1e7);
        assert_eq!(case_row(&kept)[5], "–");
        (kept.page_faults, kept.page_fault_share) = (Some(26.0), Some(0.001));
        assert_eq!(case_row(&kept)[5], "26");
        (kept.page_faults, kept.page_fault_share) = (Some(4600.0), Some(0.41));
        assert_eq!(case_row(&kept)[5], "4600: 41 % of the step");
    }

    #[test]
    fn figures_are_rounded_to_three_digits() {
        assert_eq!(digits(1.23456), "1.23");
        assert_eq!(digits(123.456), "123");
        assert_eq!(digits(1234.56), "1235");
        assert_eq!(digits(11611.4), "11,611");
        assert_eq!(digits(9999.7), "10,000");
        assert_eq!(digits(1_234_567.0), "1,234,567");
        assert_eq!(digits(0.012345), "0.0123");
        assert_eq!(prefixed(2.5e9), "2.50 G");
        assert_eq!(time(1.5e6), "1.50 ms");
    }
}
