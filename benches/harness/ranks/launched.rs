//! Ranks that `torchrun` or `mlx.launch` started, on one host or several. All run the same command. Rank 0 measures
//! and broadcasts its requests to the others through the communication backend.

use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use transformer_bench::backend::{Backend, Backends, Rank};

use super::controller::{Controller, LOAD_TIME, request_timeout};
use super::rank_worker::RankWorker;

/// Length of a broadcast request: one f32 per byte, padded with zeros.
const MAX_REQUEST: usize = 512;
/// The first request, which connects the ranks.
const CONNECT: &str = "connect";
/// The request that makes followers return.
const SHUTDOWN: &str = "shutdown";

/// Broadcasts the request of rank 0. The other ranks pass an empty `text`.
fn broadcast(backend: &dyn Backend, text: &str) -> Result<String> {
    ensure!(text.len() <= MAX_REQUEST, "request '{text}' exceeds {MAX_REQUEST} bytes");
    let mut values: Vec<f32> = text.bytes().map(f32::from).collect();
    values.resize(MAX_REQUEST, 0.0);
    let sum = backend.all_reduce_sum(&values)?;
    let bytes = sum.iter().take_while(|v| **v > 0.0).map(|v| *v as u8).collect();
    String::from_utf8(bytes)
        .context("more than one rank sent a request: start all ranks with the same command")
}

/// Time limit for a message to ranks that have nothing else to do.
fn message_timeout() -> Duration {
    request_timeout(Duration::ZERO)
}

/// A description of the present work, and the time by which it must be done.
type Deadline = Arc<Mutex<Option<(Instant, String)>>>;

/// Rank 0, which broadcasts requests and takes part in them.
pub struct Leader {
    worker: RankWorker,
    deadline: Deadline,
}

/// True once the other ranks have received a message of this process.
static CONNECTED: AtomicBool = AtomicBool::new(false);

const NOT_CONNECTED: &str = "no connection to the other ranks: the wait for them";

impl Leader {
    pub fn new(backend: Rc<dyn Backend>, rank: Rank) -> Self {
        let deadline = Arc::default();
        exit_after_deadline(Arc::clone(&deadline));
        Self { worker: RankWorker::new(backend, rank, || {}), deadline }
    }

    fn set_deadline(&self, deadline: Option<(Instant, String)>) {
        *self.deadline.lock().expect("no thread panics with the lock") = deadline;
    }
}

/// Ends this process, and thereby the launcher's other ranks, if a request misses its deadline. MLX's ring backend
/// has no timeout of its own.
fn exit_after_deadline(deadline: Deadline) {
    std::thread::spawn(move || {
        while Arc::strong_count(&deadline) > 1 {
            std::thread::sleep(Duration::from_secs(1));
            let current = deadline.lock().expect("no thread panics with the lock").clone();
            if let Some((_, request)) = current.filter(|(until, _)| Instant::now() > *until) {
                eprintln!("error: {request} timed out; rank 0 exits");
                // SAFETY: records are written after every case, and nothing else must run at exit.
                unsafe { libc::_exit(2) };
            }
        }
    });
}

impl Controller for Leader {
    fn ask(&mut self, request: &str, expected: Duration) -> Result<String> {
        let backend = self.worker.backend();
        // The other ranks are already waiting, so this needs no time for the request itself.
        if !CONNECTED.load(Ordering::Relaxed) {
            eprintln!("rank 0 waits for the other ranks, {} s at most", message_timeout().as_secs());
            self.set_deadline(Some((Instant::now() + message_timeout(), NOT_CONNECTED.to_owned())));
            broadcast(backend, CONNECT)?;
            CONNECTED.store(true, Ordering::Relaxed);
        }
        let what = format!("a rank ended or hangs: '{request}'");
        self.set_deadline(Some((Instant::now() + request_timeout(expected), what)));
        broadcast(backend, &format!("{} {request}", backend.id()))?;
        let answer = self.worker.answer(request);
        self.set_deadline(None);
        answer
    }
}

/// Runs the requests of rank 0 on this rank until rank 0 shuts it down.
///
/// # Errors
/// Returns an error if rank 0 ended or if a request fails.
pub fn run_follower(backends: Backends, rank: Rank) -> Result<()> {
    let backends: Vec<Rc<dyn Backend>> = backends.available.into_iter().map(Rc::from).collect();
    let first = backends.first().context("this machine has no backend")?;
    // Only one case is loaded at a time.
    let mut current: Option<(String, RankWorker)> = None;
    loop {
        let message = broadcast(first.as_ref(), "").context("rank 0 ended")?;
        match message.as_str() {
            CONNECT => continue,
            SHUTDOWN => return Ok(()),
            _ => {}
        }
        let (id, request) = message.split_once(' ').context("rank 0 sent an empty request")?;
        let backend = backends.iter().find(|b| b.id().id() == id);
        let backend = backend.with_context(|| format!("rank {} has no backend {id}", rank.index))?;
        current.take_if(|(other, _)| other != id);
        let start_worker = || (id.to_owned(), RankWorker::new(Rc::clone(backend), rank, || {}));
        let (_, worker) = current.get_or_insert_with(start_worker);
        worker.answer(request).with_context(|| format!("rank {}, '{request}'", rank.index))?;
    }
}

/// Makes the other ranks return if a launcher started this process. Ranks that miss the message fail by their own
/// timeout.
pub fn shutdown_followers(backends: &Backends, rank: Option<Rank>) {
    if let (Some(_), Some(backend)) = (rank, backends.available.first()) {
        let deadline: Deadline = Arc::default();
        exit_after_deadline(Arc::clone(&deadline));
        let connected = CONNECTED.load(Ordering::Relaxed);
        // A rank may still load the last case.
        let timeout = if connected { request_timeout(LOAD_TIME) } else { message_timeout() };
        let what = if connected { "a rank ended or hangs: the end of the run" } else { NOT_CONNECTED };
        *deadline.lock().expect("no thread panics with the lock") =
            Some((Instant::now() + timeout, what.to_owned()));
        let _ = broadcast(backend.as_ref(), SHUTDOWN);
    }
}
