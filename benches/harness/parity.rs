//! Checks the parity of all cases before the first is timed. The check runs in a process of its own, so that its
//! allocations, compiled kernels and caches do not influence the timing.

use std::collections::{BTreeMap, HashMap};
use std::io::{IsTerminal, Write};
use std::time::Instant;

use anyhow::Result;
use transformer_bench::backend::Backends;
use transformer_bench::compare::worker::{CheckOutcome, Side, Threads, Worker};
use transformer_bench::parity::ParityChecker;
use transformer_bench::results::Status;
use transformer_bench::suite::{Case, Framework, Method, Precision};

/// The largest error of each case as a share of its tolerance, or the reason why the case must not be timed.
pub type ParityResults = HashMap<Case, Result<f64, (Status, String)>>;

/// Refuses each case in a lower precision if the same variant failed its check in f32. Rounding hides in the lower
/// precision what f32 shows.
pub fn refuse_after_failed_f32(results: &mut ParityResults) {
    let failed: Vec<Case> = results
        .iter()
        .filter(|(case, result)| {
            case.method.precision == Precision::F32 && matches!(result, Err((Status::ParityFailed, _)))
        })
        .map(|(case, _)| *case)
        .collect();
    for (case, result) in results.iter_mut().filter(|(_, result)| result.is_ok()) {
        let in_f32 = Case { method: Method { precision: Precision::F32, ..case.method }, ..*case };
        if failed.contains(&in_f32) {
            let reason = format!("{in_f32} failed its check and has the same variant");
            *result = Err((Status::ParityFailed, reason));
        }
    }
}

/// Checks the cases in this process, for a rank that a launcher started.
pub fn check_in_process(backends: &Backends, cases: &[Case]) -> ParityResults {
    let mut checker = ParityChecker::default();
    let check = |case: &Case| {
        let backend = backends.get(case.backend).expect("the case can run");
        let outcome = match checker.check_case(backend, *case) {
            Ok(Ok(share)) => Ok(share),
            Ok(Err(mismatch)) => Err((Status::ParityFailed, mismatch.to_string())),
            Err(error) => Err(not_checked(&error)),
        };
        (*case, outcome)
    };
    cases.iter().map(check).collect()
}

fn not_checked(error: &anyhow::Error) -> (Status, String) {
    (Status::Error, format!("parity could not be checked: {error:#}"))
}

/// Checks the cases in worker processes. Checks that the same executable passed earlier are
/// cached.
///
/// # Errors
/// Returns an error if no worker can be started.
pub fn check_in_subprocess(framework: Framework, cases: &[Case]) -> Result<ParityResults> {
    let side = Side {
        name: "this executable".to_owned(),
        executables: BTreeMap::from([(framework, std::env::current_exe()?)]),
        ..Side::default()
    };
    // The checker caches the reference of one shape, so cases of the same shape follow each other.
    let mut cases = cases.to_vec();
    cases.sort_by_key(|case| (case.shape.to_string(), case.workload.trains(), case.method));
    let mut results = ParityResults::new();
    let (mut passed, mut cached) = (0, 0);
    let mut worker: Option<Worker> = None;
    let is_terminal = std::io::stderr().is_terminal();
    for (index, case) in cases.iter().enumerate() {
        let label = format!("checking parity [{}/{}] {case}", index + 1, cases.len());
        if is_terminal {
            eprint!("\r\x1b[2K{label}");
            let _ = std::io::stderr().flush();
        }
        let start = Instant::now();
        let process = match &mut worker {
            Some(process) => process,
            none => none.insert(Worker::start(&side, framework, Threads::All)?),
        };
        let outcome = match process.check(case) {
            Ok(CheckOutcome::Now(share)) => {
                passed += 1;
                Ok(share)
            }
            Ok(CheckOutcome::Before(share)) => {
                cached += 1;
                Ok(share)
            }
            Ok(CheckOutcome::Wrong(text)) => Err((Status::ParityFailed, text)),
            Err(error) => {
                if !process.is_alive() {
                    worker = None;
                }
                Err(not_checked(&error))
            }
        };
        if !is_terminal {
            let failure =
                outcome.as_ref().err().map_or_else(String::new, |(_, reason)| format!(": {reason}"));
            eprintln!("{label} ({:.1} s){failure}", start.elapsed().as_secs_f64());
        }
        results.insert(*case, outcome);
    }
    if is_terminal {
        eprint!("\r\x1b[2K");
    }
    if !cases.is_empty() {
        let failed = cases.len() - passed - cached;
        eprintln!("{framework}: parity checks: {passed} passed, {cached} cached, {failed} failed");
    }
    Ok(results)
}
