//! Criterion's wall time, with throughputs in the unit of the case instead of "elements".

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use criterion::Throughput;
use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use transformer_bench::suite::Case;
use transformer_bench::suite::cost::{self, Work};

/// A unit of throughput, by its names with the prefixes for 10⁰, 10³, 10⁶, …
#[derive(Clone, Copy)]
struct Unit {
    names: &'static [&'static str],
    /// Number of units per element or byte of Criterion's [`Throughput`].
    per_element: u64,
}

impl Unit {
    fn for_case(case: &Case) -> Self {
        let (names, per_element): (&[&str], _) = match (cost::work(case), case.shape.model()) {
            (Work::Flops(_), _) => (&["FLOP/s", "kFLOP/s", "MFLOP/s", "GFLOP/s", "TFLOP/s", "PFLOP/s"], 1),
            (Work::Bytes(_), _) => (&["B/s", "kB/s", "MB/s", "GB/s", "TB/s"], 1),
            (Work::Samples(_), Some((model, _))) if model.is_language_model() => {
                (&["tokens/s"], model.tokens as u64)
            }
            (Work::Samples(_), _) => (&["samples/s"], 1),
        };
        Self { names, per_element }
    }
}

/// Returns the work of one step for Criterion. Its files contain this number without the unit.
pub fn throughput(case: &Case) -> Throughput {
    match cost::work(case) {
        Work::Bytes(bytes) => Throughput::Bytes(bytes),
        Work::Samples(count) | Work::Flops(count) => Throughput::Elements(count),
    }
}

/// Formats times like [`WallTime`] and throughputs in the unit of the current case.
#[derive(Clone, Default)]
pub struct CaseFormatter(Rc<Cell<Option<Unit>>>);

/// Wall time of steps. Clones share the current case.
#[derive(Clone, Default)]
pub struct StepTime {
    formatter: CaseFormatter,
}

impl StepTime {
    /// Sets the case whose unit is printed from now on.
    pub fn set_case(&self, case: &Case) {
        self.formatter.0.set(Some(Unit::for_case(case)));
    }
}

impl ValueFormatter for CaseFormatter {
    fn scale_values(&self, typical_ns: f64, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_values(typical_ns, values)
    }

    fn scale_throughputs(&self, typical_ns: f64, work: &Throughput, values: &mut [f64]) -> &'static str {
        let (Some(unit), Throughput::Bytes(count) | Throughput::Elements(count)) = (self.0.get(), work)
        else {
            return WallTime.formatter().scale_throughputs(typical_ns, work, values);
        };
        let per_second = |ns: f64| (count * unit.per_element) as f64 * 1e9 / ns;
        // The cast turns negative exponents into 0.
        let prefix = ((per_second(typical_ns).log10() / 3.0) as usize).min(unit.names.len() - 1);
        values.iter_mut().for_each(|value| *value = per_second(*value) / 1000f64.powi(prefix as i32));
        unit.names[prefix]
    }

    fn scale_for_machines(&self, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_for_machines(values)
    }
}

impl Measurement for StepTime {
    type Intermediate = Instant;
    type Value = Duration;

    fn start(&self) -> Instant {
        WallTime.start()
    }

    fn end(&self, start: Instant) -> Duration {
        WallTime.end(start)
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        WallTime.add(a, b)
    }

    fn zero(&self) -> Duration {
        WallTime.zero()
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        WallTime.to_f64(value)
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        &self.formatter
    }
}
