//! The circumstances of a run as text: machine, custom model, disturbance, and what was not measured.

use super::format::count;
use super::headline::headlines;
use super::{all_measured, find_measured, find_record};
use crate::installation::command;
use crate::interference;
use crate::memory::MALLOC_VARIABLE;
use crate::results::{Results, Status};
use crate::suite::{BackendId, Case, Framework, Method, Precision, Workload, cost};

/// Returns the hardware, the system and the commit as pairs of name and value.
pub fn hardware(results: &Results) -> Vec<(String, String)> {
    let m = &results.machine;
    let dirty = if m.dirty { ", with uncommitted changes" } else { "" };
    let mut rows = vec![
        ("CPU", format!("{} ({})", m.cpu, count(m.cores, "core"))),
        ("memory", format!("{:.0} GB", m.memory_bytes as f64 / 1e9)),
        ("GPU", if m.gpus.is_empty() { "no GPU".to_owned() } else { m.gpus.join(", ") }),
        ("driver", m.driver.clone()),
        ("system", m.os.clone()),
        ("date", m.date.clone()),
        ("source", format!("commit {}{dirty}", m.commit)),
    ];
    rows.retain(|(_, value)| !value.is_empty());
    rows.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// Returns the hardware and the software versions in one line each.
pub fn machine_lines(results: &Results) -> [String; 2] {
    let hardware: Vec<String> = hardware(results).into_iter().map(|(_, value)| value).collect();
    let versions: Vec<String> =
        versions(results).iter().map(|(name, value)| format!("{name}: {value}")).collect();
    [format!("{}.", hardware.join(", ")), format!("{}.", versions.join("; "))]
}

/// Returns the versions that matter to the measured cases. A framework's BLAS computes only on the CPU.
pub fn versions(results: &Results) -> Vec<(String, String)> {
    let measured = all_measured(results);
    let irrelevant = |name: &str| {
        Framework::ALL.iter().any(|framework| {
            name.starts_with(&format!("{} BLAS", framework.label()))
                && !measured
                    .iter()
                    .any(|m| m.case.backend.is_cpu() && m.case.backend.framework() == *framework)
        })
    };
    results.machine.versions.iter().filter(|(name, _)| !irrelevant(name)).cloned().collect()
}

/// Describes the custom model. Returns `None` for a run of the built-in models.
pub fn model_line(results: &Results) -> Option<String> {
    let custom = results.model.as_ref()?;
    let (m, shape) = (custom.configuration, custom.custom_model().shape());
    let step = Case {
        workload: Workload::TrainStep,
        backend: BackendId::TorchCpu,
        method: Method::eager(Precision::F32),
        shape,
    };
    let kv_heads = if m.key_value_heads == m.heads {
        String::new()
    } else {
        format!(" ({} key-value heads)", m.key_value_heads)
    };
    Some(format!(
        "{}: {:.1} M parameters, {} layers of width {}, {} heads{kv_heads}; batch {} of {} tokens, {:.3} GFLOP per token \
         in training",
        m.name,
        shape.parameter_count() as f64 / 1e6,
        m.layers,
        m.width,
        m.heads,
        custom.batch,
        m.tokens,
        cost::flops(&step) as f64 / (custom.batch * m.tokens) as f64 / 1e9
    ))
}

/// Returns true if nothing disturbed the run, and a text about other programs, temperature and power.
pub fn disturbance(results: &Results) -> (bool, String) {
    let m = &results.machine;
    let mut observed = all_measured(results);
    // macOS does not report CPU wait, and cases with several ranks do not record it.
    observed.retain(|case| case.record.cpu_wait_share.is_some());
    let waiting = observed.iter().filter(|case| case.record.disturbed()).count();
    let busy = m.background_load.is_some_and(|load| load > interference::WAIT_THRESHOLD * m.cores as f64);
    let load = match m.background_load {
        Some(load) => format!("other programs used {load:.1} of {} before the run", count(m.cores, "core")),
        None => "the background load was not sampled".to_owned(),
    };
    let measured = all_measured(results);
    let hot = measured.iter().filter(|case| case.record.throttled).count();
    let mut warnings: Vec<String> = m.power_warnings().into_iter().map(str::to_owned).collect();
    if hot > 0 {
        let cases = count(measured.len(), "case");
        warnings.push(format!("The processor was throttled because of its temperature in {hot} of {cases}."));
    }
    let quiet = waiting == 0 && !busy;
    let state = if quiet { "quiet" } else { "disturbed" };
    let text = match observed.len() {
        0 => {
            format!("The machine was {state}: {load}. This run does not show if its cases waited for a core.")
        }
        all => {
            format!(
                "The machine was {state}: {load}, and {waiting} of {} waited for a core.",
                count(all, "case")
            )
        }
    };
    let undisturbed = quiet && warnings.is_empty();
    (undisturbed, std::iter::once(text).chain(warnings).collect::<Vec<_>>().join(" "))
}

/// Returns true if the run is from a Mac.
fn is_mac(results: &Results) -> bool {
    results.machine.os.to_lowercase().contains("macos")
}

/// Variables that change no code, and the backend on which each is worth a try. On a Mac, malloc has no such policy, and
/// Accelerate computes matrix products on its own threads.
const VARIABLES: [(BackendId, &str, &str); 4] = [
    (BackendId::TorchCpu, "OMP_NUM_THREADS", "1"),
    (BackendId::TorchCpu, MALLOC_VARIABLE, "default"),
    (BackendId::MlxCpu, MALLOC_VARIABLE, "default"),
    (BackendId::TorchMps, "PYTORCH_MPS_HIGH_WATERMARK_RATIO", "0.0"),
];

/// Returns the environment variables that were not tried, with the commands that measure their effect.
fn untried_variables(results: &Results) -> Vec<String> {
    let headlines = headlines(results);
    let line = |(backend, name, value): (BackendId, &str, &str)| {
        let variable = format!("{name}={value}");
        let eager = headlines.iter().map(|row| row.case).find(|case| case.backend == backend)?;
        let id = &find_measured(results, &eager)?.record.id;
        let tried = results.env_effects.iter().any(|e| e.variables == variable && e.id == *id);
        let command = format!("{} worktree --env {variable} '{id}'", command("compare"));
        (!tried).then(|| format!("effect of {variable} on {backend}: run {command}"))
    };
    let applies = |(backend, ..): &(BackendId, &str, &str)| !(is_mac(results) && backend.is_cpu());
    VARIABLES.into_iter().filter(applies).filter_map(line).collect()
}

/// Returns the headline rows and cases without a result, one line per reason.
pub fn not_measured(results: &Results) -> Vec<String> {
    // Reason, labels of headline rows, ids of cases.
    let mut all: Vec<(String, Vec<String>, Vec<&str>)> = Vec::new();
    let mut add = |reason: String, label: Option<&String>, id: Option<_>| {
        let known = all.iter().position(|(other, ..)| *other == reason).unwrap_or_else(|| {
            all.push((reason, Vec::new(), Vec::new()));
            all.len() - 1
        });
        all[known].1.extend(label.cloned());
        all[known].2.extend(id);
    };
    let headlines = headlines(results);
    for record in results.cases.iter().filter(|r| r.status != Status::Measured) {
        let reason = match record.id.parse::<Case>() {
            Ok(case) if record.status == Status::Skipped => format!("{}: {}", case.backend, record.reason),
            _ => record.reason.clone(),
        };
        let row = headlines.iter().find(|row| row.case.to_string() == record.id);
        add(reason, row.map(|row| &row.label), Some(record.id.as_str()));
    }
    for row in headlines.iter().filter(|row| find_record(results, &row.case).is_none()) {
        add("not part of this run".to_owned(), Some(&row.label), None);
    }
    let line = |(reason, mut labels, ids): (String, Vec<String>, Vec<&str>)| {
        match ids[..] {
            [] => {}
            [id] => labels.push(id.to_owned()),
            _ => labels.push(count(ids.len(), "case")),
        }
        format!("{reason} ({})", labels.join(", "))
    };
    all.into_iter().map(line).chain(untried_variables(results)).collect()
}

/// Asks for results of machines that have none yet.
pub fn invitation(results: &Results) -> Option<String> {
    let send = command("baseline");
    is_mac(results).then(|| {
        format!(
            "No results of a Mac are published yet. `{send} save first-mac --send` saves these results, and writes the \
             text of an issue with which you can send them."
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::run;
    use super::*;
    use crate::results::EnvEffect;

    const CPU_STEP: &str = "train-step/torch-cpu/f32/indicator-b16";

    #[test]
    fn a_run_is_quiet_or_disturbed() {
        let mut results = run(&[("train-step/torch-cuda/f32/indicator-b16", 2e7)]);
        (results.machine.cores, results.machine.background_load) = (2, Some(0.0));
        let text = disturbance(&results).1;
        assert!(
            text.ends_with("before the run. This run does not show if its cases waited for a core."),
            "{text}"
        );
        results.cases[0].cpu_wait_share = Some(0.01);
        let expected = "The machine was quiet: other programs used 0.0 of 2 cores before the run, and 0 of 1 case waited for \
                        a core.";
        assert_eq!(disturbance(&results), (true, expected.to_owned()));
        results.machine.power = vec![("source".to_owned(), "Battery Power".to_owned())];
        results.cases[0].throttled = true;
        let (quiet, text) = disturbance(&results);
        let warnings = "The machine ran on battery power. The processor was throttled because of its temperature in 1 of 1 case.";
        assert!(!quiet && text == format!("{expected} {warnings}"), "{text}");
        results.machine.power.clear();
        results.machine.background_load = Some(1.0);
        let text = disturbance(&results).1;
        assert!(text.starts_with("The machine was disturbed: other programs used 1.0 of 2 cores"), "{text}");
        results.machine.background_load = None;
        results.cases[0].cpu_wait_share = Some(0.2);
        let (quiet, text) = disturbance(&results);
        assert!(!quiet && text.contains("1 of 1 case waited") && text.contains("not sampled"), "{text}");
    }

    #[test]
    fn a_blas_is_listed_only_if_its_framework_ran_on_the_cpu() {
        let mut results = run(&[(CPU_STEP, 5e8), ("train-step/mlx-cuda/f32/indicator-b16", 5e6)]);
        let names = ["PyTorch", "PyTorch BLAS", "MLX", "MLX BLAS", "MLX BLAS threads"];
        results.machine.versions = names.map(|name| (name.to_owned(), "1".to_owned())).into();
        let listed: Vec<String> = versions(&results).into_iter().map(|(name, _)| name).collect();
        assert_eq!(listed, ["PyTorch", "PyTorch BLAS", "MLX"]);
    }

    #[test]
    fn an_untried_variable_has_the_command_that_measures_it() {
        let mut results = run(&[(CPU_STEP, 5e8)]);
        let untried = untried_variables(&results);
        assert_eq!(untried.len(), 2, "{untried:?}");
        assert!(untried[1].contains(&format!("--env {MALLOC_VARIABLE}=default")), "{untried:?}");
        assert!(untried[0].contains("--env OMP_NUM_THREADS=1 'train-step/torch-cpu/f32/"), "{untried:?}");
        let mut mac = run(&[(CPU_STEP, 5e8), ("train-step/torch-mps/f32/indicator-b16", 5e7)]);
        mac.machine.os = "macOS 26.2 Tahoe".to_owned();
        let [untried_on_mac] = &untried_variables(&mac)[..] else { panic!("only the variable of MPS works") };
        assert!(untried_on_mac.contains("PYTORCH_MPS_HIGH_WATERMARK_RATIO"), "{untried_on_mac}");
        assert!(not_measured(&results).contains(&untried[0]));
        results.env_effects.push(EnvEffect {
            variables: "OMP_NUM_THREADS=1".to_owned(),
            id: CPU_STEP.to_owned(),
            without_ns: 5e8,
            with_ns: 1e9,
            ratio: 2.0,
            ratio_ci: [1.6, 2.5],
            commit: String::new(),
        });
        assert_eq!(untried_variables(&results).len(), 1);
    }
}
