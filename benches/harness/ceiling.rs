//! Limits of the hardware that no time can beat: its FLOP/s, and the rate at which it copies memory.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use transformer_bench::backend::Backend;
use transformer_bench::fixture::Fixture;
use transformer_bench::results::Record;
use transformer_bench::results::machine::{self, Machine};
use transformer_bench::suite::{BackendId, Case, Method, Precision, Shape, Workload, cost};

/// A step may move its bytes at most this many times as fast as a copy of the same size. A copy reads the lines of its
/// destination too, which is 1.5 times the counted traffic. The rest is the noise of a short measurement.
const MAX_SPEED_OVER_COPY: f64 = 2.0;
/// Copies are timed this often, and the fastest counts.
const COPIES: usize = 5;
/// A smaller copy would measure the start of threads or of a kernel.
const MIN_MIB: usize = 1;
const MAX_MIB: usize = 1024;

/// The copies that were timed. Cases of one size share a copy.
#[derive(Default)]
pub struct Ceiling {
    copy_times: HashMap<(BackendId, u64), Duration>,
}

impl Ceiling {
    /// Checks that the median time of a record is possible on this hardware.
    ///
    /// # Errors
    /// Returns an error if the time implies too many FLOP/s or bytes/s: the clock or the synchronization is wrong.
    pub fn check(
        &mut self,
        case: &Case,
        record: &Record,
        backend: &dyn Backend,
        machine: &Machine,
    ) -> Result<()> {
        let median_ns = record.median_ns.context("the record has no median")?;
        let ceiling = machine::flops_ceiling(case.backend, case.method.precision, machine);
        machine::check_rate(cost::flops(case) / case.shape.ranks() as u64, median_ns, ceiling)?;
        // The copy of a rank's device would need the device of a rank.
        let bytes = cost::min_bytes(case);
        if case.workload == Workload::CopyPeak && !case.backend.is_cpu()
            || case.shape.ranks() > 1
            || bytes == 0
        {
            return Ok(());
        }
        let copy = self.copy_time(case, bytes, backend)?.as_nanos() as f64;
        if median_ns * MAX_SPEED_OVER_COPY < copy {
            let rate = |ns: f64| bytes as f64 / ns;
            bail!(
                "implies {:.1} GB/s, and a copy of the same size reaches {:.1} GB/s: the time is wrong",
                rate(median_ns),
                rate(copy)
            );
        }
        Ok(())
    }

    fn copy_time(&mut self, case: &Case, bytes: u64, backend: &dyn Backend) -> Result<Duration> {
        match self.copy_times.entry((case.backend, bytes)) {
            Entry::Occupied(known) => Ok(*known.get()),
            Entry::Vacant(new) => Ok(*new.insert(time_copy(case, bytes, backend)?)),
        }
    }
}

/// Returns the shortest time in which the device reads and writes `bytes` in total by copying.
fn time_copy(case: &Case, bytes: u64, backend: &dyn Backend) -> Result<Duration> {
    if case.backend.is_cpu() {
        return Ok(copy_on_cpu(bytes as usize / 2));
    }
    let mib = (bytes as usize >> 21).clamp(MIN_MIB, MAX_MIB);
    let copy = Case {
        workload: Workload::CopyPeak,
        backend: case.backend,
        method: Method::eager(Precision::F32),
        shape: Shape::Buffer { mib, ranks: 1 },
    };
    let mut loaded = backend.load(&Fixture::new(copy))?;
    let mut fastest = Duration::MAX;
    for _ in 0..COPIES {
        fastest = fastest.min(loaded.time(1)?);
    }
    // A step that is smaller than the smallest copy, or larger than the largest one, is compared in proportion.
    Ok(fastest.mul_f64(bytes as f64 / cost::bytes(&copy) as f64))
}

/// Returns the shortest time in which all cores copy a buffer of `length` bytes. It does not depend on a framework.
fn copy_on_cpu(length: usize) -> Duration {
    let measured = length.clamp(MIN_MIB << 20, MAX_MIB << 20);
    let from = vec![1u8; measured];
    let mut to = vec![0u8; measured];
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let part = measured.div_ceil(cores);
    let mut fastest = Duration::MAX;
    for _ in 0..COPIES {
        let barrier = std::sync::Barrier::new(cores);
        let times: Vec<Duration> = std::thread::scope(|scope| {
            let copies = from.chunks(part).zip(to.chunks_mut(part)).map(|(from, to)| {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    let start = Instant::now();
                    to.copy_from_slice(std::hint::black_box(from));
                    std::hint::black_box(to);
                    start.elapsed()
                })
            });
            let threads: Vec<_> = copies.collect();
            threads.into_iter().map(|thread| thread.join().expect("a copy does not panic")).collect()
        });
        fastest = fastest.min(times.into_iter().max().unwrap_or(Duration::MAX));
    }
    fastest.mul_f64(length as f64 / measured as f64)
}
