//! The tables of a run, which every format shows.

use super::format::{count, digits, megabytes, or_dash, percent, range, significant, time};
use super::headline::{ALL_OPT, Headline, headlines};
use super::table::{Table, cells, throughput};
use super::{
    Measured, Ratio, Sweep, ablation, all_measured, batches, energy, explain, find_measured, find_record,
    first_step, lengths, measured_peak, rate, scaling,
};
use crate::memory;
use crate::results::{EnvEffect, LAUNCH_BOUND_SHARE, Record, Results, Status, machine};
use crate::suite::{Case, Device, Shape, Variant, Workload, cost};

/// Title of the table of all cases.
pub const ALL_CASES: &str = "All cases";

fn training_speed(results: &Results) -> Table {
    let shape = results.headline();
    let headlines = headlines(results);
    let base = headlines.iter().find_map(|row| Some((&row.label, find_measured(results, &row.case)?)));
    let relative = |ns: f64| base.as_ref().map(|(_, base)| format!("{:.2}×", base.median_ns / ns));
    let row = |row: &Headline| {
        let record = find_record(results, &row.case)?;
        let cells = match find_measured(results, &row.case) {
            Some(m) => {
                let Ratio { value, range: interval } = m.speed();
                [
                    digits(value),
                    range(interval),
                    or_dash(relative(m.median_ns)),
                    m.source.to_string(),
                    remarks(results, row, record),
                ]
            }
            None if record.status == Status::TooSlow => {
                let once = record.median_ns?;
                let timed = "one step".to_owned();
                let speed = digits(rate(shape, once).0);
                [speed, "–".to_owned(), or_dash(relative(once)), timed, record.reason.clone()]
            }
            None => return None,
        };
        Some(std::iter::once(row.label.clone()).chain(cells).collect())
    };
    let rows = headlines.iter().filter_map(row).collect();
    let versus = base.as_ref().map_or("", |(label, _)| label.as_str());
    Table::new(
        format!("Training speed, {shape}"),
        "All Opt is the fastest checked variant with parameters in f32. AMP is torch.autocast with bf16, and mixed is f32 \
         master weights with bf16 compute. The 95 % CI is between processes if a row was timed in rounds or processes, \
         and within one run otherwise.",
        &format!("|{}|95 % CI|vs {versus}|timed in|remarks", rate(shape, 1.0).1),
        rows,
    )
}

/// Returns true if a row shows the fastest variant, and this machine cannot compile steps.
fn lacks_compile(results: &Results, row: &Headline) -> bool {
    let cannot_compile = |record: &Record| {
        let case = record.id.parse::<Case>().ok().filter(|_| record.status == Status::Skipped);
        case.is_some_and(|case| (case.backend, case.method.variant) == (row.case.backend, Variant::Compile))
    };
    row.label.contains(ALL_OPT) && results.cases.iter().any(cannot_compile)
}

/// Returns the restrictions of a result.
fn remarks(results: &Results, row: &Headline, record: &Record) -> String {
    let few = record.too_few_samples().map(|n| format!("only {}: their range", count(n as usize, "sample")));
    let share = record.cpu_wait_share.filter(|_| record.disturbed());
    let disturbed = share.map(|share| format!("disturbed: {} CPU wait", percent(share)));
    let hot = record.throttled.then(|| "throttled: too hot".to_owned());
    let launches = record.gpu_busy_share.filter(|share| *share < LAUNCH_BOUND_SHARE);
    let launches = launches.map(|share| {
        format!("limited by kernel launches on the CPU: the GPU was busy for {} of the step", percent(share))
    });
    let uncompiled = lacks_compile(results, row).then(|| "without -compile, see \"Not measured\"".to_owned());
    few.into_iter()
        .chain(disturbed)
        .chain(hot)
        .chain(launches)
        .chain(uncompiled)
        .collect::<Vec<_>>()
        .join("; ")
}

fn memory_peaks(results: &Results) -> Table {
    let row = |row: &Headline| {
        let record = find_measured(results, &row.case)?.record;
        let framework = row.case.backend.framework().label();
        let remark = match record.peak_bytes {
            Some(_) => String::new(),
            None => format!("{framework} has no allocator peak on {}", row.case.backend.device()),
        };
        let [allocator, rss] =
            [record.peak_bytes, record.rss_peak_bytes].map(|bytes| or_dash(bytes.map(megabytes)));
        Some(vec![row.label.clone(), allocator, rss, remark])
    };
    Table::new(
        format!("Memory of a training step, {}", results.headline()),
        "The two peaks are different metrics and must not be compared: the peak of the framework's allocator, and the peak \
         RSS of the whole process with its libraries.",
        "|allocator peak|peak RSS|remarks",
        headlines(results).iter().filter_map(row).collect(),
    )
}

fn variants(all: &[Measured<'_>]) -> Table {
    let row = |(m, speedup): (Measured<'_>, f64)| {
        let Case { backend, shape, method, .. } = m.case;
        cells([&backend, &shape, &method, &time(m.median_ns), &format!("{speedup:.2}×")])
    };
    Table::new(
        "Variants of the training step",
        "",
        "backend|shape|method|median|vs eager f32",
        ablation(all).into_iter().map(row).collect(),
    )
}

fn env_effects(results: &Results) -> Table {
    let row = |effect: &EnvEffect| {
        let speedup = Ratio { value: effect.ratio, range: effect.ratio_ci }.inverse();
        let [low, high] = speedup.range;
        let times = [time(effect.without_ns), time(effect.with_ns)];
        let speedup = [format!("{:.2}×", speedup.value), format!("{low:.2} to {high:.2}")];
        cells([&effect.variables, &effect.id, &times[0], &times[1], &speedup[0], &speedup[1]])
    };
    Table::new(
        "Effects of environment variables",
        "Each case was measured with and without the variables, interleaved.",
        "variables|case|without|with|speedup|95 % CI",
        results.env_effects.iter().map(row).collect(),
    )
}

fn batch_sizes(all: &[Measured<'_>]) -> Table {
    let row = |sweep: &Sweep<'_>| {
        let speed = |m: &Measured<'_>| format!("{}: {}", m.case.shape.batch(), digits(m.speed().value));
        let fastest = sweep.fastest().case.shape;
        let speeds = sweep.steps.iter().map(speed).collect::<Vec<_>>().join(", ");
        let (unit, batch) = (rate(fastest, 1.0).1, fastest.batch());
        cells([&sweep.model, &sweep.backend, &sweep.method, &speeds, &unit, &batch])
    };
    Table::new(
        "Training speed by batch",
        "",
        "model|backend|method|batch: speed|unit|fastest batch",
        batches(all).iter().map(row).collect(),
    )
}

/// Formats the model FLOPs utilization. More than 100 % is an error in the time or in the peak.
fn mfu(flops_per_s: f64, peak: Option<f64>) -> String {
    match peak.map(|peak| flops_per_s / peak) {
        None => "–".to_owned(),
        Some(share) if share <= 1.0 => percent(share),
        Some(share) => format!("{} (invalid: exceeds 100 %)", percent(share)),
    }
}

fn language_models(results: &Results, all: &[Measured<'_>]) -> Table {
    let row = |m: &Measured<'_>| {
        let Shape::Model { model, ranks, .. } = m.case.shape else { return None };
        let whole_model =
            matches!(m.case.workload, Workload::TrainStep | Workload::Forward | Workload::ForwardBackward);
        if !model.is_language_model() || model.is_miniature() || !whole_model {
            return None;
        }
        // FLOP/s of one device, like its peaks.
        let flops_per_s = cost::flops(&m.case) as f64 / (m.median_ns * 1e-9) / ranks as f64;
        let (backend, precision) = (m.case.backend, m.case.method.precision);
        let gpu = results.machine.gpus.first().filter(|_| backend.device() == Device::NvidiaGpu);
        Some(vec![
            m.case.to_string(),
            time(m.median_ns),
            digits(m.speed().value),
            digits(flops_per_s / 1e12),
            mfu(flops_per_s, gpu.and_then(|gpu| machine::dense_peak(gpu, precision))),
            mfu(flops_per_s, measured_peak(all, backend, precision)),
        ])
    };
    Table::new(
        "Language models",
        "MFU is the model FLOPs utilization per device: TFLOP/s as a share of the dense peak in the GPU's datasheet, or of the \
         best `matmul-peak` of the same backend and precision in this run.",
        "case|median|tokens/s|TFLOP/s|MFU (datasheet)|MFU (measured peak)",
        all.iter().filter_map(row).collect(),
    )
}

fn all_cases(results: &Results) -> Table {
    let all = results.cases.iter().filter_map(Measured::new);
    Table::new(
        ALL_CASES,
        "The 95 % CI is within one run. Error / tolerance is the largest error in the parity check as a share of its tolerance, at the measured shape. CPU \
         wait is the share of time that runnable threads waited for a core.",
        "case|median|95 % CI|throughput|samples|page faults|error / tolerance|CPU wait",
        all.map(|m| case_row(&m)).collect(),
    )
}

fn case_row(m: &Measured<'_>) -> Vec<String> {
    let record = m.record;
    let cpu_wait = record.cpu_wait_share.map(|share| {
        let mark = if record.disturbed() { " (disturbed)" } else { "" };
        percent(share) + mark
    });
    vec![
        record.id.clone(),
        time(m.median_ns),
        format!("±{:.2} %", 100.0 * (m.ci_ns[1] - m.ci_ns[0]) / 2.0 / m.median_ns),
        throughput(m),
        or_dash(record.samples.map(|n| n.to_string())),
        or_dash(page_faults(record)),
        or_dash(record.parity.map(|share| format!("{share:.2}"))),
        or_dash(cpu_wait),
    ]
}

/// Formats the page faults per step, with their share of the time if it is large.
fn page_faults(record: &Record) -> Option<String> {
    let faults = record.page_faults?;
    let share = record.page_fault_share.filter(|share| *share > memory::PAGE_FAULT_SHARE_THRESHOLD);
    let share = share.map_or_else(String::new, |share| format!(" ({:.0} % of the step)", 100.0 * share));
    Some(significant(faults.round(), 1) + &share)
}

/// Returns the table of training speeds, or `None` if no row has a result.
pub fn first(results: &Results) -> Option<Table> {
    Some(training_speed(results)).filter(|table| !table.rows.is_empty())
}

/// Returns every other table that has rows, the most general first.
pub fn all(results: &Results) -> Vec<Table> {
    let measured = all_measured(results);
    let mut tables = vec![
        memory_peaks(results),
        variants(&measured),
        env_effects(results),
        batch_sizes(&measured),
        lengths::table(&measured),
        scaling::table(&measured),
        language_models(results, &measured),
    ];
    tables.extend(results.operations.iter().map(explain::table));
    tables.push(first_step::table(&results.first_steps));
    tables.extend(energy::tables(&results.energy));
    tables.push(all_cases(results));
    tables.retain(|table| !table.rows.is_empty());
    tables
}

#[cfg(test)]
mod tests {
    use super::super::tests::{record, run};
    use super::*;
    use crate::results::Throughput;

    const CPU_STEP: &str = "train-step/torch-cpu/f32/indicator-b16";

    #[test]
    fn a_fastest_variant_without_the_compiler_has_a_remark() {
        let tuned = "train-step/torch-cpu/f32-tuned/indicator-b16";
        let mut results = run(&[(CPU_STEP, 5e8), (tuned, 4e8)]);
        let remark = |results: &Results| {
            let rows = training_speed(results).rows;
            let [row] = &rows.iter().filter(|row| row[0].contains("All Opt")).collect::<Vec<_>>()[..] else {
                panic!("{rows:?}")
            };
            row.last().unwrap().clone()
        };
        assert!(!remark(&results).contains("compile"), "{}", remark(&results));
        let compiled = "train-step/torch-cpu/f32-compile/indicator-b16".parse().unwrap();
        let reason = "torch.compile needs Python 3.10 to 3.14, and scripts/setup ran in 3.9";
        results.cases.push(Record::unmeasured(&compiled, Status::Skipped, reason));
        assert!(remark(&results).contains("without -compile"), "{}", remark(&results));
        assert!(super::super::notes::not_measured(&results).iter().any(|line| line.contains(reason)));
    }

    #[test]
    fn the_fastest_method_is_always_in_the_table() {
        let rows = |methods: &[(&str, f64)]| {
            let ids = methods.iter().map(|(m, ns)| (format!("train-step/torch-cuda/{m}/indicator-b16"), *ns));
            let ids: Vec<(String, f64)> = ids.collect();
            first(&run(&ids.iter().map(|(id, ns)| (id.as_str(), *ns)).collect::<Vec<_>>())).unwrap()
        };
        let mut methods = vec![("f32", 20e6), ("mixed-compile", 2e6)];
        assert_eq!(rows(&methods).rows.len(), 2);
        methods.push(("bf16-compile", 1e6));
        let table = rows(&methods);
        assert_eq!(table.header, ["", "samples/s", "95 % CI", "vs PyTorch CUDA", "timed in"]);
        assert_eq!(table.rows[2][0], "PyTorch CUDA, bf16 parameters: bf16-compile");
        assert_eq!(table.rows[2][1..], ["16,000", "14,545 to 17,778", "20.00×", "one run"]);
        methods.push(("tf32-tuned", 0.5e6));
        assert_eq!(rows(&methods).rows[2][0], "PyTorch CUDA, TF32 matrix products: tf32-tuned");
    }

    #[test]
    fn language_models_have_tokens_per_second() {
        let with_rate = |id, median: f64| {
            let unit = "samples/s".to_owned();
            Record { throughput: Some(Throughput { value: 1.0, unit }), ..record(id, median) }
        };
        let cases = vec![
            with_rate("train-step/torch-cpu/f32/gpt2-b8-t1024", 8.192e9),
            with_rate("forward/torch-cpu/f32/indicator-b16", 1e9),
        ];
        let tables = all(&Results { cases, ..run(&[]) });
        let throughputs: Vec<&str> = tables.last().unwrap().rows.iter().map(|row| row[3].as_str()).collect();
        assert_eq!(throughputs, ["1,000 tokens/s", "16.0 samples/s"]);
    }

    #[test]
    fn effects_of_variables_have_a_speedup() {
        let mut results = run(&[(CPU_STEP, 5e8)]);
        assert!(env_effects(&results).rows.is_empty());
        results.env_effects.push(EnvEffect {
            variables: "OMP_NUM_THREADS=1".to_owned(),
            id: CPU_STEP.to_owned(),
            without_ns: 5e8,
            with_ns: 1e9,
            ratio: 2.0,
            ratio_ci: [1.6, 2.5],
            commit: String::new(),
        });
        let table = env_effects(&results);
        assert_eq!(table.rows.len(), 1);
        assert_eq!(table.rows[0][2..], ["500 ms", "1.00 s", "0.50×", "0.40 to 0.62"]);
    }

    #[test]
    fn a_step_with_many_page_faults_is_marked() {
        let mut step = record("attention/torch-cpu/f32/b16-h8-t111-d32", 1e7);
        let cell = |step: &Record| case_row(&Measured::new(step).unwrap())[5].clone();
        assert_eq!(cell(&step), "–");
        (step.page_faults, step.page_fault_share) = (Some(26.0), Some(0.001));
        assert_eq!(cell(&step), "26");
        (step.page_faults, step.page_fault_share) = (Some(4600.0), Some(0.41));
        assert_eq!(cell(&step), "4,600 (41 % of the step)");
    }

    #[test]
    fn a_utilization_above_100_percent_is_an_error() {
        assert_eq!(mfu(5e14, Some(1e15)), "50.0 %");
        assert_eq!(mfu(2e15, Some(1e15)), "200.0 % (invalid: exceeds 100 %)");
        assert_eq!(mfu(1.0, None), "–");
    }
}
