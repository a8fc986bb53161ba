//! A process for each rank of this machine, each with its device and its own cores.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use transformer_bench::backend::{self, Backend, COLLECTIVE_TIMEOUT};
use transformer_bench::compare::cores;
use transformer_bench::compare::worker::{Side, Threads, Worker};
use transformer_bench::results::one_line;
use transformer_bench::suite::Case;

use super::failure::Heard;
use super::{Lead, limit};

/// What loading a part may take: MLX builds kernels for minutes.
pub const LOADING: Duration = Duration::from_secs(90);
/// What the others are given to end, or to fail too, when one does: the first to end says why.
const AFTER: Duration = Duration::from_secs(1);

/// Makes a worker a rank of a backend.
pub const RANK_OF: &str = "TRANSFORMER_BENCH_RANK_OF";
/// The cores that a rank keeps to.
const CORES: &str = "TRANSFORMER_BENCH_CORES";

/// Keeps this process on the cores that it was given, before it starts threads.
pub fn stay() {
    if let Ok(text) = std::env::var(CORES) {
        cores::pin_threads(&text.split(',').filter_map(|core| core.parse().ok()).collect::<Vec<_>>());
    }
}

pub struct Processes {
    ranks: Vec<Worker>,
}

impl Processes {
    /// Starts as many as the case has ranks, and waits until they have met.
    ///
    /// # Errors
    /// Where one does not come.
    pub fn start(backend: &dyn Backend, case: Case, folder: &Path) -> Result<Self> {
        let start = Instant::now();
        let mut ranks = Self::spawn(backend, case, folder)?;
        let Err(error) = ranks.ask("join", Duration::ZERO) else { return Ok(ranks) };
        // A port that was taken in between is found at once.
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
        // A system that keeps no thread on a core has them all the same.
        let all = if cores.is_empty() { backend::cpu_device_count().0 } else { cores.len() };
        let each = (all / count).max(1);
        let threads = each.to_string();
        let start = |(rank, own): (usize, Vec<(String, String)>)| {
            let mut environment = own;
            for name in
                ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"]
            {
                environment.push((name.to_owned(), threads.clone()));
            }
            let own: Vec<String> = cores.iter().skip(rank * each).take(each).map(usize::to_string).collect();
            environment.push((CORES.to_owned(), own.join(",")));
            environment.push((RANK_OF.to_owned(), case.backend.to_string()));
            let side = Side {
                name: format!("rank {rank}"),
                executables: BTreeMap::from([(framework, std::env::current_exe()?)]),
                environment,
                ..Side::default()
            };
            Worker::start(&side, framework, Threads::All).with_context(|| format!("rank {rank}"))
        };
        let environments = backend.rendezvous_env(count, folder)?;
        Ok(Self { ranks: environments.into_iter().enumerate().map(start).collect::<Result<_>>()? })
    }
}

impl Processes {
    /// Sends all ranks the same, and hears them until `last`, or until one is lost.
    fn hear(&mut self, request: &str, last: Instant) -> Heard {
        let count = self.ranks.len();
        let mut heard = Heard {
            answers: vec![None; count],
            ended: Vec::new(),
            failed: Vec::new(),
            here: vec![false; count],
        };
        for (rank, worker) in self.ranks.iter_mut().enumerate() {
            if worker.send(request).is_err() {
                heard.ended.push(format!("rank {rank}: {}", worker.end()));
            }
        }
        let mut until = last;
        while heard.ended.is_empty() && heard.answers.iter().any(Option::is_none) && Instant::now() < until {
            for (rank, worker) in self.ranks.iter_mut().enumerate() {
                if heard.answers[rank].is_some() {
                    continue;
                }
                match worker.poll(Duration::from_millis(2)) {
                    Ok(None) => {}
                    Ok(Some(line)) if line == "here" => heard.here[rank] = true,
                    Ok(Some(line)) => {
                        if let Some(reason) = line.strip_prefix("failed: ") {
                            heard.failed.push(format!("rank {rank}: {}", one_line(reason)));
                            until = until.min(Instant::now() + AFTER);
                        }
                        heard.answers[rank] = Some(line);
                    }
                    Err(_) => heard.ended.push(format!("rank {rank}: {}", worker.end())),
                }
            }
        }
        heard
    }
}

impl Lead for Processes {
    fn ask(&mut self, request: &str, expected: Duration) -> Result<String> {
        if self.ranks.is_empty() {
            bail!("its ranks were stopped");
        }
        let start = Instant::now();
        let heard = self.hear(request, start + limit(expected));
        if let Some(cause) = heard.cause(request, start.elapsed()) {
            self.ranks.clear();
            bail!("{cause}; all ranks were stopped");
        }
        heard.answers.into_iter().next().flatten().context("a rank")
    }
}
