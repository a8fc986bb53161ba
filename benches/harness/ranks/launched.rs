//! Ranks that a launcher started, on one host or several: all run the same command, the first measures,
//! and the others do what it says. What it says goes through the engine's own sums.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use transformer_bench::backend::{Backend, Backends, Rank};

use super::rank_worker::Part;
use super::{Lead, limit};

/// A request is no longer than this; a byte a number, and 0 behind its end.
const LENGTH: usize = 512;
/// What ends the others.
const END: &str = "end";

/// Gives all ranks the first one's text.
fn tell(backend: &dyn Backend, text: &str) -> Result<String> {
    let mut numbers: Vec<f32> = text.bytes().map(f32::from).collect();
    if numbers.len() > LENGTH {
        bail!("'{text}' is too long to tell");
    }
    numbers.resize(LENGTH, 0.0);
    let told = backend.all_reduce_sum(&numbers)?;
    let bytes = told.iter().take_while(|v| **v > 0.0).map(|v| *v as u8).collect();
    String::from_utf8(bytes).context("more than one rank leads: were all started with the same command?")
}

/// The first rank: has the others do their parts, and does its own.
pub struct Leader {
    part: Part,
    /// When the work in hand should be done, and what it is.
    due: Arc<Mutex<Option<(Instant, String)>>>,
}

impl Leader {
    pub fn new(backend: Rc<dyn Backend>, rank: Rank) -> Self {
        let due = Arc::default();
        watch(Arc::clone(&due));
        Self { part: Part::new(backend, rank, || {}), due }
    }

    fn set(&self, due: Option<(Instant, String)>) {
        *self.due.lock().expect("no panic holds it") = due;
    }
}

/// Ends this process, and with it the launcher's others, when work is not done in time: MLX's ring waits
/// for a lost rank for ever.
fn watch(due: Arc<Mutex<Option<(Instant, String)>>>) {
    std::thread::spawn(move || {
        while Arc::strong_count(&due) > 1 {
            std::thread::sleep(Duration::from_secs(1));
            let late = due.lock().expect("no panic holds it").clone();
            if let Some((_, request)) = late.filter(|(until, _)| Instant::now() > *until) {
                eprintln!("error: a rank is gone or hangs: '{request}' is not done in time; this rank ends");
                // SAFETY: nothing that runs at exit is needed: records are written after every case.
                unsafe { libc::_exit(2) };
            }
        }
    });
}

impl Lead for Leader {
    fn ask(&mut self, request: &str, expected: Duration) -> Result<String> {
        let backend = self.part.backend();
        self.set(Some((Instant::now() + limit(expected), request.to_owned())));
        tell(backend, &format!("{} {request}", backend.id()))?;
        let answer = self.part.answer(request);
        self.set(None);
        answer
    }
}

/// Every other rank: does what the first says, until it ends.
///
/// # Errors
/// Where the first is gone, or what it asks for fails.
pub fn follow(found: Backends, rank: Rank) -> Result<()> {
    let backends: Vec<Rc<dyn Backend>> = found.available.into_iter().map(Rc::from).collect();
    let first = backends.first().context("no backend is here")?;
    let mut parts: HashMap<String, Part> = HashMap::new();
    loop {
        let told = tell(first.as_ref(), "").context("the first rank is gone")?;
        if told == END {
            return Ok(());
        }
        let (id, request) = told.split_once(' ').context("the first rank says nothing")?;
        let backend = backends.iter().find(|b| b.id().id() == id);
        let backend = backend.with_context(|| format!("rank {} has no {id}", rank.index))?;
        // One case at a time.
        parts.retain(|known, _| known == id);
        let part = parts.entry(id.to_owned()).or_insert_with(|| Part::new(Rc::clone(backend), rank, || {}));
        part.answer(request).with_context(|| format!("rank {}, '{request}'", rank.index))?;
    }
}

/// Ends the other ranks; they find out by themselves where this does not reach them.
pub fn dismiss(found: &Backends, rank: Option<Rank>) {
    if let (Some(_), Some(backend)) = (rank, found.available.first()) {
        let _ = tell(backend.as_ref(), END);
    }
}
