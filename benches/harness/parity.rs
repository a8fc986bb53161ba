//! Proves the cases of a run before the first is timed, in a process of its own: what a proof
//! allocates, compiles and caches is gone before anything is measured.

use std::collections::{BTreeMap, HashMap};
use std::io::{IsTerminal, Write};
use std::time::Instant;

use anyhow::Result;
use transformer_bench::backend::Backends;
use transformer_bench::compare::worker::{CheckOutcome, Side, Threads, Worker};
use transformer_bench::parity::ParityChecker;
use transformer_bench::results::Status;
use transformer_bench::suite::{Case, Framework};

/// What became of each case: how much of the allowed error it took, or why it can't be timed.
pub type Proven = HashMap<Case, Result<f64, (Status, String)>>;

/// Proves the cases in this process, which leads ranks that a launcher started.
pub fn prove_here(found: &Backends, cases: &[Case]) -> Proven {
    let mut prover = ParityChecker::default();
    let prove = |case: &Case| {
        let backend = found.get(case.backend).expect("a case that runs");
        let outcome = match prover.check_case(backend, *case) {
            Ok(Ok(share)) => Ok(share),
            Ok(Err(mismatch)) => Err((Status::ParityFailed, mismatch.to_string())),
            Err(error) => Err((Status::Error, format!("parity could not be checked: {error:#}"))),
        };
        (*case, outcome)
    };
    cases.iter().map(prove).collect()
}

/// Proves the cases, the shapes one after the other: the oracle remembers the last.
///
/// # Errors
/// Where no process can be started.
pub fn prove(framework: Framework, cases: &[Case]) -> Result<Proven> {
    let side = Side {
        name: "this executable".to_owned(),
        executables: BTreeMap::from([(framework, std::env::current_exe()?)]),
        ..Side::default()
    };
    let mut order: Vec<Case> = cases.to_vec();
    order.sort_by_key(|case| (case.shape.to_string(), case.workload.trains(), case.method));
    let mut proven = Proven::new();
    let (mut now, mut before) = (0, 0);
    let mut worker: Option<Worker> = None;
    let progress = std::io::stderr().is_terminal();
    for (index, case) in order.iter().enumerate() {
        let place = format!("parity [{}/{}] {case}", index + 1, order.len());
        if progress {
            eprint!("\r\x1b[2K{place}");
            let _ = std::io::stderr().flush();
        }
        let start = Instant::now();
        let process = match &mut worker {
            Some(process) => process,
            none => none.insert(Worker::start(&side, framework, Threads::All)?),
        };
        let outcome = match process.check(case) {
            Ok(CheckOutcome::Now(share)) => {
                now += 1;
                Ok(share)
            }
            Ok(CheckOutcome::Before(share)) => {
                before += 1;
                Ok(share)
            }
            Ok(CheckOutcome::Wrong(text)) => Err((Status::ParityFailed, text)),
            Err(error) => {
                if !process.alive() {
                    worker = None;
                }
                Err((Status::Error, format!("parity could not be checked: {error:#}")))
            }
        };
        if !progress {
            let said = outcome.as_ref().err().map_or_else(String::new, |(_, reason)| format!(": {reason}"));
            eprintln!("{place} ({:.1} s){said}", start.elapsed().as_secs_f64());
        }
        proven.insert(*case, outcome);
    }
    if progress {
        eprint!("\r\x1b[2K");
    }
    if !order.is_empty() {
        let not = order.len() - now - before;
        eprintln!(
            "{framework}: parity at the shapes that are timed: {now} cases proven now, {before} before, {not} not"
        );
    }
    Ok(proven)
}
