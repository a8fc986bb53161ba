//! Runs one case: loads it, plans its samples from the first steps, and samples it with Criterion.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use criterion::{BenchmarkId, Criterion, SamplingMode};
use transformer_bench::backend::{Backend, LoadedCase};
use transformer_bench::fixture::Fixture;
use transformer_bench::interference::CpuUsage;
use transformer_bench::memory;
use transformer_bench::parity::timed_work;
use transformer_bench::profile::gpu;
use transformer_bench::results::{Record, Status, criterion_folder};
use transformer_bench::statistics::median;
use transformer_bench::suite::{Case, Device};

use super::criterion_files;
use super::measurement::{StepTime, throughput};
use super::options::Options;
use super::profiler::{self, Sampler};
use super::timing::{self, Plan};

/// Observations of the process while a case is timed.
#[derive(Default)]
struct SampleStats {
    peak_rss: Option<u64>,
    /// Page faults per step of each sample.
    page_faults: Vec<f64>,
    cpu: CpuUsage,
    /// Number of steps in the last sample.
    steps: u64,
}

/// Runs cases with Criterion.
pub struct CaseRunner<'a> {
    options: &'a Options,
    criterion_home: PathBuf,
    criterion: Criterion<StepTime>,
    step_time: StepTime,
    sampler: Sampler,
}

impl<'a> CaseRunner<'a> {
    pub fn new(options: &'a Options, criterion_home: PathBuf) -> Self {
        let (step_time, sampler) = (StepTime::default(), Sampler::default());
        let criterion =
            Criterion::default().with_measurement(step_time.clone()).with_profiler(sampler.clone());
        let criterion = criterion.configure_from_args().without_plots();
        Self { options, criterion_home, criterion, step_time, sampler }
    }

    pub fn final_summary(&self) {
        self.criterion.final_summary();
    }

    /// Measures a case. `label` begins its progress lines. Returns `None` if the options ask only for a profile or
    /// for a saved baseline.
    ///
    /// # Errors
    /// Returns an error if the backend fails.
    pub fn run(&mut self, backend: &dyn Backend, case: &Case, label: &str) -> Result<Option<Record>> {
        if self.options.load_baseline {
            self.criterion.benchmark_group(case.workload.id()).bench_function(benchmark_id(case), |_| {});
            return Ok(None);
        }
        if let Some(time) = self.options.profile {
            return self.profile(backend, case, time).map(|()| None);
        }
        backend.reset_peak_memory()?;
        memory::reset_resident_peak();
        let mut loaded = backend.load(&Fixture::new(*case))?;
        let (step, plan) = Plan::from_first_steps(loaded.as_mut(), self.options.set, case.workload)?;
        let (mut record, stats) = match plan {
            Some(plan) => {
                if !self.options.test {
                    let seconds = plan.duration(step).as_secs_f64().ceil();
                    eprintln!("{label} {case}: {} samples, about {seconds:.0} s", plan.samples);
                }
                let stats = self.sample(loaded.as_mut(), case, Some(&plan))?;
                (Record::unmeasured(case, Status::Measured, ""), stats)
            }
            None => self.measure_slow_case(loaded.as_mut(), case, step, label)?,
        };
        if record.status != Status::Measured {
            return Ok(Some(record));
        }
        record.peak_bytes = backend.peak_memory();
        record.rss_peak_bytes = stats.peak_rss;
        record.page_faults = Some(median(&stats.page_faults));
        record.cpu_wait_share = stats.cpu.cpu_wait_share();
        record.throttled = stats.cpu.throttled();
        if !self.options.test
            && let Some(ranks) = loaded.rank_stats()
        {
            (record.peak_bytes, record.rss_peak_bytes) = (ranks.peak_bytes, ranks.rss_peak_bytes);
            // Threads of the communication backend also wait for the cores of their rank, which disturbs nothing.
            (record.page_faults, record.cpu_wait_share) = (None, None);
            record.ranks = Some(ranks);
        }
        if stats.cpu.throttled() {
            eprintln!("{label} {case}: the CPU was throttled because of its temperature");
        }
        if !self.options.test {
            timed_work::verify(backend, *case, loaded, stats.steps)?;
        }
        Ok(Some(record))
    }

    /// Times the steps of a case that is too slow for the ten samples of Criterion.
    fn measure_slow_case(
        &self,
        loaded: &mut dyn LoadedCase,
        case: &Case,
        step: Duration,
        label: &str,
    ) -> Result<(Record, SampleStats)> {
        let (before, faults_before) = (CpuUsage::now(), memory::page_faults());
        let Some(steps) = timing::time_slow_steps(loaded, step, self.options.set, case.workload)? else {
            let reason = format!("too slow: {:.1} s per step", step.as_secs_f64());
            let mut record = Record::unmeasured(case, Status::TooSlow, reason);
            (record.median_ns, record.samples) = (Some(step.as_nanos() as f64), Some(1));
            return Ok((record, SampleStats::default()));
        };
        eprintln!("{label} {case}: {} samples of {:.1} s", steps.len(), step.as_secs_f64());
        let stats = SampleStats {
            peak_rss: memory::resident_peak_bytes(),
            page_faults: vec![(memory::page_faults() - faults_before) as f64 / steps.len() as f64],
            cpu: CpuUsage::now().since(before),
            steps: 1,
        };
        if !self.options.test {
            criterion_files::write(&criterion_folder(&self.criterion_home, case), case, &steps)?;
        }
        Ok((Record::unmeasured(case, Status::Measured, ""), stats))
    }

    /// Profiles a case and prints the paths of its profiles.
    fn profile(&mut self, backend: &dyn Backend, case: &Case, time: Duration) -> Result<()> {
        let folder = criterion_folder(&self.criterion_home, case).join("profile");
        let on_gpu = case.backend.device() == Device::NvidiaGpu;
        // The kernels of a CUDA graph are attributed while the graph is captured.
        let attribution = on_gpu.then(gpu::attribute_launches);
        let mut loaded = backend.load(&Fixture::new(*case))?;
        let attribution = attribution.transpose().map(drop);
        if let Some(summary) = loaded.profile_first_rank(time, &folder) {
            println!("{}", summary?);
            return Ok(());
        }
        Plan::from_first_steps(loaded.as_mut(), self.options.set, case.workload)?;
        self.sample(loaded.as_mut(), case, None)?;
        if let Some(error) = self.sampler.take_error() {
            return Err(error);
        }
        if on_gpu {
            attribution.context("the GPU could not be profiled")?;
            let steps = profiler::gpu_steps(loaded.time(3)?.as_secs_f64() / 3.0);
            println!("{}", profiler::profile_gpu(loaded.as_mut(), case, steps, &folder)?);
        }
        if case.backend.device() == Device::AppleGpu {
            profiler::capture_metal_trace(loaded.as_mut(), backend, &folder);
        }
        Ok(())
    }

    /// Runs a case under Criterion, which samples it by the plan, or profiles it if the options say so.
    fn sample(
        &mut self,
        loaded: &mut dyn LoadedCase,
        case: &Case,
        plan: Option<&Plan>,
    ) -> Result<SampleStats> {
        let Self { options, criterion, step_time, sampler, .. } = self;
        step_time.set_case(case);
        let mut group = criterion.benchmark_group(case.workload.id());
        group.sampling_mode(SamplingMode::Flat).throughput(throughput(case));
        if let Some(plan) = plan.filter(|_| !options.own_samples) {
            group.sample_size(plan.samples);
        }
        if let Some(plan) = plan.filter(|_| !options.own_times) {
            group.measurement_time(plan.measurement).warm_up_time(plan.warm_up);
        }
        let mut error = None;
        let mut stats = SampleStats::default();
        group.bench_function(benchmark_id(case), |bencher| {
            bencher.iter_custom(|iterations| {
                if error.is_some() {
                    return Duration::from_secs(1);
                }
                let (faults_before, before) = (memory::page_faults(), CpuUsage::now());
                let elapsed = if options.profile.is_some() {
                    sampler.run(loaded, iterations)
                } else {
                    loaded.time(iterations)
                };
                stats.steps = iterations;
                stats.peak_rss = memory::resident_peak_bytes();
                stats.cpu.add(CpuUsage::now().since(before));
                stats.page_faults.push((memory::page_faults() - faults_before) as f64 / iterations as f64);
                // Criterion can't be stopped, so it gets a time that is discarded below.
                elapsed.unwrap_or_else(|failure| {
                    error = Some(failure);
                    Duration::from_secs(1)
                })
            });
        });
        group.finish();
        error.map_or(Ok(stats), Err)
    }
}

fn benchmark_id(case: &Case) -> BenchmarkId {
    BenchmarkId::new(format!("{}/{}", case.backend, case.method), case.shape)
}
