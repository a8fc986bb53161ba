//! Starts one process per rank on this machine, each with its own device and cores.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use transformer_bench::backend::{Backend, COLLECTIVE_TIMEOUT};
use transformer_bench::compare::cores;
use transformer_bench::compare::worker::{Side, Threads, Worker};
use transformer_bench::results::one_line;
use transformer_bench::suite::Case;

use super::controller::{Controller, request_timeout};
use super::failure::FailureReport;

/// Time for the other ranks to fail too after the first failure. The first rank that ends is to blame.
const FAILURE_GRACE: Duration = Duration::from_secs(1);

/// Makes a worker a rank of the backend with this id.
pub const RANK_BACKEND: &str = "TRANSFORMER_BENCH_RANK_BACKEND";
/// Cores of a rank, separated by commas.
const CORES: &str = "TRANSFORMER_BENCH_CORES";

/// Pins this process to the cores in [`CORES`]. Must run before other threads start.
pub fn pin_to_assigned_cores() {
    if let Ok(text) = std::env::var(CORES) {
        cores::pin_threads(&text.split(',').filter_map(|core| core.parse().ok()).collect::<Vec<_>>());
    }
}

/// The rank processes of one case.
pub struct LocalRanks {
    workers: Vec<Worker>,
}

impl LocalRanks {
    /// Starts the ranks of a case and waits until all have joined.
    ///
    /// # Errors
    /// Returns an error if a rank does not join.
    pub fn start(backend: &dyn Backend, case: Case, folder: &Path) -> Result<Self> {
        let start = Instant::now();
        let mut ranks = Self::spawn(backend, case, folder)?;
        let Err(error) = ranks.ask("join", Duration::ZERO) else { return Ok(ranks) };
        // An early failure is usually a port that another process took: new ports may work.
        if start.elapsed() > COLLECTIVE_TIMEOUT / 2 {
            return Err(error);
        }
        let mut ranks = Self::spawn(backend, case, folder)?;
        ranks.ask("join", Duration::ZERO)?;
        Ok(ranks)
    }

    fn spawn(backend: &dyn Backend, case: Case, folder: &Path) -> Result<Self> {
        let framework = case.backend.framework();
        let _ = std::fs::remove_file(folder.join("store"));
        let count = case.shape.ranks();
        let cores = cores::allowed();
        // Without pinning, the list is empty, but the cores still have to be divided.
        let total = if cores.is_empty() { cores::equal_cores() } else { cores.len() };
        let per_rank = (total / count).max(1);
        let start = |(rank, mut environment): (usize, Vec<(String, String)>)| {
            for name in
                ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"]
            {
                environment.push((name.to_owned(), per_rank.to_string()));
            }
            let own = cores.iter().skip(rank * per_rank).take(per_rank);
            let own: Vec<String> = own.map(usize::to_string).collect();
            environment.push((CORES.to_owned(), own.join(",")));
            environment.push((RANK_BACKEND.to_owned(), case.backend.to_string()));
            let side = Side {
                name: format!("rank {rank}"),
                executables: BTreeMap::from([(framework, std::env::current_exe()?)]),
                environment,
                ..Side::default()
            };
            Worker::start(&side, framework, Threads::All).with_context(|| format!("rank {rank}"))
        };
        let environments = backend.rendezvous_env(count, folder)?;
        Ok(Self { workers: environments.into_iter().enumerate().map(start).collect::<Result<_>>()? })
    }

    /// Sends a request to all ranks and collects their answers until `deadline`, or until a rank ends.
    fn collect(&mut self, request: &str, deadline: Instant) -> FailureReport {
        let count = self.workers.len();
        let mut report =
            FailureReport { answers: vec![None; count], waiting: vec![false; count], ..Default::default() };
        for (rank, worker) in self.workers.iter_mut().enumerate() {
            if worker.send(request).is_err() {
                report.ended.push(format!("rank {rank}: {}", worker.end()));
            }
        }
        let mut until = deadline;
        while report.ended.is_empty() && report.answers.contains(&None) && Instant::now() < until {
            for (rank, worker) in self.workers.iter_mut().enumerate() {
                if report.answers[rank].is_some() {
                    continue;
                }
                match worker.poll(Duration::from_millis(2)) {
                    Ok(None) => {}
                    Ok(Some(line)) if line == "waiting" => report.waiting[rank] = true,
                    Ok(Some(line)) => {
                        if let Some(reason) = line.strip_prefix("failed: ") {
                            report.failed.push(format!("rank {rank}: {}", one_line(reason)));
                            until = until.min(Instant::now() + FAILURE_GRACE);
                        }
                        report.answers[rank] = Some(line);
                    }
                    Err(_) => report.ended.push(format!("rank {rank}: {}", worker.end())),
                }
            }
        }
        report
    }
}

impl Controller for LocalRanks {
    fn ask(&mut self, request: &str, expected: Duration) -> Result<String> {
        if self.workers.is_empty() {
            bail!("the ranks of this case were stopped");
        }
        let start = Instant::now();
        let report = self.collect(request, start + request_timeout(expected));
        if let Some(reason) = report.blame(request, start.elapsed()) {
            self.workers.clear();
            bail!("{reason}; all ranks were stopped");
        }
        report.answers.into_iter().next().flatten().context("a case has at least one rank")
    }
}
