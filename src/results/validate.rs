//! Checks of files from elsewhere: only values that a run can produce are accepted.

use std::collections::HashSet;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::energy::CaseEnergy;
use super::first_step::StartTimes;
use super::machine::Machine;
use super::{EnvEffect, InterleavedResult, Record, Results, Status, VERSION, run_again, upgrade};
use crate::suite::Case;
use crate::text;

/// Parses `results.json` of this version or an older one, and makes its strings printable. `place` names the file in
/// errors.
///
/// # Errors
/// Returns an error if the file is empty, damaged or of a newer version, or if a value is invalid.
pub fn parse_results(text: &str, place: &str) -> Result<Results> {
    let advice = run_again();
    ensure!(!text.trim().is_empty(), "{place} is empty: {advice}");
    let mut value = text::parse_json(text).with_context(|| format!("{place} is damaged: {advice}"))?;
    // The first version has no number.
    let version = value.get("version").map_or(Ok(1), |version| check_version(version, place))?;
    upgrade::upgrade(&mut value, version);
    let results: Results =
        serde_json::from_value(value).with_context(|| format!("{place} lacks a field of a run"))?;
    check_results(&results).with_context(|| place.to_owned())?;
    Ok(results)
}

/// Returns the version of a file that this program can read.
///
/// # Errors
/// Returns an error that begins with `place` if it is not a version or a newer one.
pub fn check_version(version: &Value, place: &str) -> Result<u64> {
    let number = version.as_u64().filter(|number| *number > 0);
    let number = number.with_context(|| format!("{place} is damaged: its version is {version}"))?;
    ensure!(
        number <= VERSION,
        "{place} has version {number}, and this program reads versions up to {VERSION}: update transformer-bench"
    );
    Ok(number)
}

/// Checks everything in the results of a run or baseline.
///
/// # Errors
/// Returns an error that names the case or field if a run cannot produce it.
pub fn check_results(results: &Results) -> Result<()> {
    check_machine(&results.machine)?;
    check_cases(&results.cases)?;
    check_parts(results)?;
    check_comparisons(&results.interleaved, &results.env_effects)
}

/// Checks the records of a run, and that each case occurs once.
///
/// # Errors
/// Returns an error that names the case.
pub fn check_cases(records: &[Record]) -> Result<()> {
    let mut seen = HashSet::new();
    for record in records {
        check_record(record).with_context(|| record.id.clone())?;
        ensure!(seen.insert(&record.id), "{} occurs twice", record.id);
    }
    Ok(())
}

/// Returns true for a day such as `2026-11-25`.
pub fn is_day(text: &str) -> bool {
    let fits = |(i, byte): (usize, u8)| if i == 4 || i == 7 { byte == b'-' } else { byte.is_ascii_digit() };
    text.len() == 10 && text.bytes().enumerate().all(fits)
}

fn check_machine(machine: &Machine) -> Result<()> {
    let date = &machine.date;
    ensure!(date.is_empty() || is_day(date), "date is '{date}': expected a day such as 2026-11-25");
    let load = machine.background_load.unwrap_or_default();
    ensure!(load.is_finite() && load >= 0.0, "background_load is {load}: expected a number of cores");
    Ok(())
}

fn is_positive(value: f64) -> bool {
    value.is_finite() && value > 0.0
}

fn is_ratio(ratio: f64, [low, high]: [f64; 2]) -> bool {
    [ratio, low, high].into_iter().all(is_positive) && low <= ratio && ratio <= high
}

/// Returns true if the step times divide to the ratio, up to rounding.
fn times_divide_to_ratio(result: &InterleavedResult) -> bool {
    let (Some(base), Some(head)) = (result.base_ns, result.head_ns) else { return true };
    let rounds = result.round_ns.iter().flatten().copied();
    rounds.chain([base, head]).all(is_positive) && (head / base / result.ratio - 1.0).abs() < 1e-9
}

/// Checks the times of operations and of first steps.
///
/// # Errors
/// Returns an error that names the case if a time or rate is impossible.
pub fn check_parts(results: &Results) -> Result<()> {
    let is_known = |ids: &[String; 2]| ids.iter().all(|id| id.parse::<Case>().is_ok());
    let is_time = |time: f64| time.is_finite() && time >= 0.0;
    for explanation in &results.operations {
        let mut times = explanation.operations.iter().flat_map(|operation| operation.ns).flatten();
        let [torch, mlx] = explanation.step_ns;
        let positive = [torch, mlx, explanation.peak_flops, explanation.peak_bytes];
        ensure!(
            is_known(&explanation.ids) && positive.into_iter().all(is_positive) && times.all(is_positive),
            "{}: its operations have a time that is not positive, or its id is unknown",
            explanation.ids[0]
        );
    }
    for CaseEnergy { id, batch, energy, .. } in &results.energy {
        let rates = [energy.joules, energy.seconds, energy.limit_watts.unwrap_or(1.0)];
        ensure!(
            id.parse::<Case>().is_ok()
                && rates.into_iter().all(is_positive)
                && is_time(energy.idle_watts)
                && energy.steps > 0
                && *batch > 0,
            "{id}: its energy is not positive, or its id is unknown"
        );
    }
    for steps in &results.first_steps {
        let starts = steps.cold.iter().chain(&steps.warm);
        let parts = |start: &StartTimes| [start.made_ns, start.loaded_ns, start.first_ns, start.second_ns];
        ensure!(
            is_known(&steps.ids)
                && steps.step_ns.into_iter().all(is_positive)
                && starts.flat_map(parts).all(is_time),
            "{}: its first steps have a time that is negative, or its id is unknown",
            steps.ids[0]
        );
    }
    Ok(())
}

/// Checks the comparisons that are saved with a run.
///
/// # Errors
/// Returns an error if a time or ratio is not positive, or if a ratio is outside of its interval.
pub fn check_comparisons(interleaved: &[InterleavedResult], env_effects: &[EnvEffect]) -> Result<()> {
    for effect in env_effects {
        let times = [effect.without_ns, effect.with_ns].into_iter().all(is_positive);
        ensure!(
            times && is_ratio(effect.ratio, effect.ratio_ci),
            "{}: no ratio with an interval",
            effect.variables
        );
    }
    for result in interleaved {
        ensure!(
            is_ratio(result.ratio, result.ratio_ci) && times_divide_to_ratio(result),
            "{}, interleaved: no ratio with an interval",
            result.base
        );
    }
    Ok(())
}

/// Checks that a run can produce a record.
///
/// # Errors
/// Returns an error if the id is unknown or a value is outside of its range.
pub fn check_record(record: &Record) -> Result<()> {
    record.id.parse::<Case>().map_err(anyhow::Error::msg)?;
    let parts = [&record.workload, &record.backend, &record.precision, &record.shape].map(String::as_str);
    ensure!(record.id.split('/').eq(parts), "its fields are those of {}", parts.join("/"));
    if record.status == Status::Measured {
        let median = record.median_ns.context("a measured case without a median")?;
        let ci @ [low, high] = record.ci_ns.context("a measured case without an interval")?;
        ensure!(is_positive(median), "{median} ns is not a time");
        ensure!(is_ratio(median, ci), "{low} to {high} ns is not an interval of {median} ns");
    }
    if let Some(throughput) = &record.throughput {
        ensure!(is_positive(throughput.value), "{} is not a rate", throughput.value);
        let unit = &throughput.unit;
        ensure!(["samples/s", "FLOP/s", "B/s"].contains(&unit.as_str()), "'{unit}' is not a unit of a rate");
    }
    for count in [record.page_faults, record.page_fault_share].into_iter().flatten() {
        ensure!(count.is_finite() && count >= 0.0, "{count} page faults are impossible");
    }
    ensure!(record.process_ns.iter().copied().all(is_positive), "a process has a time that is not positive");
    let ranks = record.ranks.as_ref();
    let of_ranks = ranks.into_iter().flat_map(|ranks| [ranks.skew, ranks.cpu_wait_share]);
    for share in
        [record.parity, record.cpu_wait_share, record.gpu_busy_share].into_iter().flatten().chain(of_ranks)
    {
        ensure!((0.0..=1.0).contains(&share), "{share} is not a share");
    }
    // Noise can make a step without communication take longer than one with it.
    for share in ranks.and_then(|ranks| ranks.exposed_communication).into_iter().flatten() {
        ensure!(share.is_finite() && share <= 1.0, "{share} is not a share of the step");
    }
    Ok(())
}
