//! What both bench targets share: which cases run, in what order, and what is kept.
//!
//! First parity of every selected case, at its own shape. Then for each case: the fixture; one
//! step alone, from which the plan is made; Criterion's samples; the record. Records
//! are written after every case, so a run that is killed keeps what it has.

mod criterion_files;
mod options;
mod parity;
mod profiler;
mod ranks;
mod sampling_timer;
mod symbols;
mod timing;
mod worker;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use transformer_bench::backend::{self, Backend, Backends, LoadedCase, Rank};
use transformer_bench::interference::{self, CpuUsage};
use transformer_bench::memory;
use transformer_bench::model::fixture::Fixture;
use transformer_bench::profile::gpu;
use transformer_bench::results::machine::{self, Machine};
use transformer_bench::results::run::{Selection, Writer};
use transformer_bench::results::{self, Record, Status, criterion_folder};
use transformer_bench::statistics;
use transformer_bench::suite::cost::{self, Work};
use transformer_bench::suite::{Case, Device, Framework, cases, custom_model};

use options::Options;
use parity::Proven;
use profiler::Sampler;
use timing::Plan;

/// How long the machine is looked at before a run.
const LOOK: Duration = Duration::from_millis(500);

/// Runs a framework's cases.
pub fn main(framework: Framework, find: fn() -> Backends) -> ExitCode {
    match run(framework, find) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(reason) => {
            eprintln!("error: {}", results::printable(&format!("{reason:#}")));
            ExitCode::from(2)
        }
    }
}

/// True unless a case failed.
fn run(framework: Framework, find: fn() -> Backends) -> Result<bool> {
    memory::retain_freed_memory()?;
    machine::prefer_fast_cores();
    ranks::stay();
    let notes = custom_model::from_environment(|| machine::capacity(&Machine::read()))?;
    if let Some(first) = worker::requested(std::env::args().skip(1)) {
        worker::start(framework, find, first)?;
    }
    notes.iter().for_each(|note| eprintln!("{framework}: {note}"));
    let set = std::env::var("TRANSFORMER_BENCH_SET").ok();
    let options = Options::read(std::env::args().skip(1), set)?;
    let home = criterion_home();
    let selected: Vec<Case> = cases(options.set)
        .into_iter()
        .filter(|c| c.backend.framework() == framework && options.selects(c))
        .collect();
    if options.list {
        selected.iter().for_each(|case| println!("{case}: benchmark"));
        return Ok(true);
    }
    if options.profile.is_some() {
        profiler::prepare()?;
    }
    let led = Rank::from_environment(framework)?;
    ranks::see_own_gpu(led);
    let found = find();
    machine::assert_isolated(framework)?;
    if let Some(rank) = led.filter(|rank| rank.index > 0) {
        return ranks::follow(found, rank).map(|()| true);
    }
    let found = ranks::shared(found, led);
    // What a launcher started is no rank in another process: there such cases are skipped like all others.
    let apart = |case: &Case| {
        led.is_none()
            && backend::needs_tf32_process(case)
            && !case.backend.is_cpu()
            && found.get(case.backend).is_some()
    };
    let (apart, selected): (Vec<Case>, Vec<Case>) = selected.into_iter().partition(apart);
    let (selected, child) =
        if backend::is_tf32_process() { (apart, false) } else { (selected, !apart.is_empty()) };
    let mut suite = Suite::new(options, home, found);
    let passed = suite.measure_all(framework, &selected, led)?;
    ranks::dismiss(&suite.here.found, led);
    Ok(if child { tf32_process()? && passed } else { passed })
}

/// Runs what needs TF32 switched on from the start; true unless a case failed.
fn tf32_process() -> Result<bool> {
    let status = std::process::Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(backend::TF32_PROCESS, "1")
        .status()
        .context("the process for the tf32 cases did not start")?;
    match status.code() {
        Some(0) => Ok(true),
        Some(1) => Ok(false),
        _ => bail!("the process for the tf32 cases ended with {status}"),
    }
}

/// The machine with the versions of what was found.
fn machine_of(found: &Backends) -> Machine {
    let mut machine = Machine::read();
    machine.add_versions(found.available.iter().flat_map(|backend| backend.versions()));
    machine.add_versions(memory::describe_allocator());
    machine
}

/// About how long the cases from this one on will take, at the pace so far: `, 2 min left`.
fn left(started: Instant, present: &[Case], case: &Case) -> String {
    match present.iter().position(|c| c == case) {
        Some(done) if done > 0 => {
            let each = started.elapsed().as_secs_f64() / done as f64;
            let left = each * (present.len() - done) as f64;
            if left < 90.0 { format!(", {left:.0} s left") } else { format!(", {:.0} min left", left / 60.0) }
        }
        _ => String::new(),
    }
}

/// Criterion's folder; set so that both know it.
fn criterion_home() -> PathBuf {
    let home = results::criterion_home();
    // SAFETY: no other thread runs yet.
    unsafe { std::env::set_var("CRITERION_HOME", &home) };
    home
}

/// What can run, and on what.
struct Here {
    found: Backends,
    machine: Machine,
}

impl Here {
    /// The backend of a case that can run here, else why not. Cases that can't fit are refused
    /// before anything is allocated.
    fn runs(&self, case: &Case) -> Result<&dyn Backend, String> {
        let Some(backend) = self.found.get(case.backend) else {
            let absent = self.found.unavailable.iter().find(|a| a.id == case.backend);
            return Err(absent.map_or_else(|| "not found".to_owned(), |a| a.reason.clone()));
        };
        backend.supports(case).map_err(|unsupported| unsupported.to_string())?;
        // Ranks of a CPU share its memory; a GPU is one rank's.
        let sharing = if case.backend.is_cpu() { case.shape.ranks() } else { 1 };
        let need = (sharing as u64 * cost::memory_estimate(case)) as f64 / 1e9;
        let have = backend.memory_total().unwrap_or(self.machine.memory_bytes) as f64 / 1e9;
        if need > 0.85 * have {
            return Err(format!("needs about {need:.0} GB of memory and {have:.0} GB is there"));
        }
        Ok(backend)
    }
}

struct Suite {
    criterion: Criterion,
    sampler: Sampler,
    home: PathBuf,
    options: Options,
    here: Here,
    proven: Proven,
}

impl Suite {
    fn new(options: Options, home: PathBuf, found: Backends) -> Self {
        let sampler = Sampler::default();
        let mut machine = machine_of(&found);
        if !options.test && !options.load_baseline {
            let others = interference::background_load(LOOK);
            machine.background_load = Some(others);
            if others > interference::WAIT_THRESHOLD * machine.cores as f64 {
                eprintln!(
                    "note: others use {others:.1} of this machine's {} cores: what they disturb is marked",
                    machine.cores
                );
            }
        }
        let criterion = Criterion::default().with_profiler(sampler.clone());
        Self {
            criterion: criterion.configure_from_args().without_plots(),
            sampler,
            home,
            options,
            here: Here { machine, found },
            proven: Proven::new(),
        }
    }

    /// True unless a case failed.
    fn measure_all(&mut self, framework: Framework, selected: &[Case], led: Option<Rank>) -> Result<bool> {
        let here = |c: &&Case| self.here.found.get(c.backend).is_some();
        let present: Vec<Case> = selected.iter().filter(here).copied().collect();
        self.options.check_baseline(&self.home, &present)?;
        // What is only looked at needs no proof.
        if self.options.profile.is_none() && !self.options.load_baseline {
            let runs = |case: &&Case| self.here.runs(case).is_ok();
            let runs: Vec<Case> = selected.iter().filter(runs).copied().collect();
            let unmade = self.made(&runs);
            let runs: Vec<Case> = runs.into_iter().filter(|case| !unmade.contains_key(case)).collect();
            self.proven = match led {
                // A process of its own would be no rank.
                Some(_) => parity::prove_here(&self.here.found, &runs),
                None => parity::prove(framework, &runs)?,
            };
            self.proven.extend(unmade);
        }
        let mut part = if self.writes() { Some(self.part(framework, selected)?) } else { None };
        let mut records = Vec::new();
        let started = Instant::now();
        for (index, case) in selected.iter().enumerate() {
            let place = format!("[{}/{}{}]", index + 1, selected.len(), left(started, &present, case));
            records.extend(self.measure(case, &place));
            if let Some(part) = &mut part {
                part.save(&records)?;
            }
        }
        symbols::drop_generated();
        self.criterion.final_summary();
        if self.options.test {
            let count = |status| records.iter().filter(|r| r.status == status).count();
            println!(
                "{framework}: {} cases ran, {} failed, {} skipped",
                count(Status::Measured),
                count(Status::Error) + count(Status::ParityFailed) + count(Status::TooSlow),
                count(Status::Skipped)
            );
        }
        Ok(!records.iter().any(|r| matches!(r.status, Status::Error | Status::ParityFailed)))
    }

    /// Makes the code of the cases that have none yet; returns those for which that failed, with the reason.
    fn made(&self, cases: &[Case]) -> Proven {
        let backend = |case: &Case| self.here.found.get(case.backend);
        let unmade = |case: &&Case| backend(case).is_some_and(|b| b.needs_compile(case));
        let unmade: Vec<&Case> = cases.iter().filter(unmade).collect();
        let mut failed = Proven::new();
        for (index, case) in unmade.iter().enumerate() {
            eprintln!("compiling {case}, about a minute or two; {} of {}", index + 1, unmade.len());
            let made = backend(case).map_or(Ok(()), |b| b.compile(case));
            if let Err(error) = made {
                let text = format!("no code could be made: {error:#}");
                eprintln!("{case}: {text}");
                failed.insert(**case, Err((Status::Error, text)));
            }
        }
        failed
    }

    /// Whether the run leaves records.
    fn writes(&self) -> bool {
        !self.options.test && self.options.profile.is_none() && !self.options.load_baseline
    }

    /// Where the records go.
    fn part(&self, framework: Framework, selected: &[Case]) -> Result<Writer> {
        let selection = Selection { set: self.options.set.to_string(), filter: self.options.filter_text() };
        let tf32 = backend::is_tf32_process();
        Writer::begin(&results::folder(), framework, tf32, selection, selected, self.here.machine.clone())
    }

    /// None where the case was only profiled.
    fn measure(&mut self, case: &Case, place: &str) -> Option<Record> {
        let backend = match self.here.runs(case) {
            Ok(backend) => backend,
            Err(reason) => return Some(self.told(place, Record::unmeasured(case, Status::Skipped, reason))),
        };
        let share = match self.proven.get(case) {
            Some(Err((status, reason))) => {
                return Some(self.told(place, Record::unmeasured(case, *status, reason.clone())));
            }
            proven => proven.and_then(|p| p.as_ref().ok()).copied(),
        };
        let record = sample(&mut self.criterion, &self.sampler, &self.options, backend, case, place)
            .unwrap_or_else(|error| Some(failure(case, &error)))?;
        let record = Record { parity: share, ..record };
        let record = if record.status == Status::Measured && !self.options.test {
            figures(&self.home, case, record, &self.here.machine)
                .unwrap_or_else(|error| Record::unmeasured(case, Status::Error, format!("{error:#}")))
        } else {
            record
        };
        if matches!(record.status, Status::Error) && !self.options.test {
            // Samples of a case that failed must not be compared with.
            let _ = std::fs::remove_dir_all(criterion_folder(&self.home, case).join("new"));
        }
        Some(self.told(place, record))
    }

    /// Prints what became of a case where Criterion does not.
    fn told(&self, place: &str, record: Record) -> Record {
        match record.status {
            Status::Measured => {}
            Status::Skipped if self.options.test => println!("{}: skipped, {}", record.id, record.reason),
            status => {
                let word = serde_json::to_value(status).ok();
                let word = word.as_ref().and_then(|w| w.as_str()).unwrap_or("error");
                eprintln!("{place} {}: {word}, {}", record.id, record.reason);
            }
        }
        record
    }
}

/// Runs a case under Criterion. None where only a profile or a loaded baseline was asked for.
fn sample(
    criterion: &mut Criterion,
    sampler: &Sampler,
    options: &Options,
    backend: &dyn Backend,
    case: &Case,
    place: &str,
) -> Result<Option<Record>> {
    if options.load_baseline {
        criterion.benchmark_group(case.workload.id()).bench_function(benchmark_id(case), |_| {});
        return Ok(None);
    }
    backend.reset_peak_memory()?;
    memory::reset_resident_peak();
    let fixture = Fixture::new(*case);
    // A recorded graph's kernels are named while it is recorded.
    let watched = options.profile.is_some() && case.backend.device() == Device::NvidiaGpu;
    let watch = if watched { Some(gpu::watch()) } else { None };
    let mut prepared = backend.load(&fixture)?;
    let watch = watch.transpose().map(drop);
    let folder = criterion_folder(&results::criterion_home(), case).join("profile");
    if let Some(time) = options.profile
        && let Some(said) = prepared.profile_first_rank(time, &folder)
    {
        println!("{}", said?);
        return Ok(None);
    }
    let (step, plan) = plan(prepared.as_mut(), options, case)?;
    let Some(plan) = plan else {
        return few(prepared.as_mut(), options, backend, case, place, step).map(Some);
    };
    if !options.test {
        let seconds = plan.duration(step).as_secs_f64().ceil();
        eprintln!("{place} {case}: {} timings, about {seconds:.0} s", plan.samples);
    }
    let seen = time_samples(criterion, sampler, options, prepared.as_mut(), case, &plan)?;
    if options.profile.is_some() {
        if let Some(error) = sampler.failure() {
            return Err(error);
        }
        if watched {
            watch.context("the GPU's side of the profile")?;
            let each = prepared.time(3)?.as_secs_f64() / 3.0;
            println!("{}", profiler::gpu(prepared.as_mut(), case, profiler::recorded(each), &folder)?);
        }
        if case.backend.device() == Device::AppleGpu {
            profiler::metal(prepared.as_mut(), backend, &folder);
        }
        return Ok(None);
    }
    let mut record = Record::unmeasured(case, Status::Measured, "");
    record.peak_bytes = backend.peak_memory();
    record.rss_peak_bytes = seen.peak_rss;
    record.page_faults = Some(statistics::median(&seen.faults));
    record.cpu_wait_share = seen.watch.cpu_wait_share();
    if !options.test {
        ask_ranks(prepared.as_mut(), &mut record);
    }
    if seen.watch.throttled() {
        eprintln!("{place} {case}: the CPU got too hot and was slowed down meanwhile");
    }
    Ok(Some(record))
}

/// Puts what was seen of the processes that did the work in the place of what was seen of this one.
fn ask_ranks(prepared: &mut dyn LoadedCase, record: &mut Record) {
    if let Some(ranks) = prepared.rank_stats() {
        (record.peak_bytes, record.rss_peak_bytes) = (ranks.peak_bytes, ranks.rss_peak_bytes);
        // A rank's engine has threads that wait for its cores too: that is no disturbance.
        (record.page_faults, record.cpu_wait_share) = (None, None);
        record.ranks = Some(ranks);
    }
}

/// A case whose steps are too slow for Criterion's ten samples: as many as fit.
fn few(
    prepared: &mut dyn LoadedCase,
    options: &Options,
    backend: &dyn Backend,
    case: &Case,
    place: &str,
    step: Duration,
) -> Result<Record> {
    let before = (CpuUsage::now(), memory::page_faults());
    let Some(steps) = timing::few(prepared, step, options.set, case.workload)? else {
        let reason = format!("too slow: {:.1} s a step", step.as_secs_f64());
        let mut record = Record::unmeasured(case, Status::TooSlow, reason);
        record.median_ns = Some(step.as_nanos() as f64);
        record.samples = Some(1);
        return Ok(record);
    };
    eprintln!("{place} {case}: {} steps of {:.1} s", steps.len(), step.as_secs_f64());
    let mut record = Record::unmeasured(case, Status::Measured, "");
    record.peak_bytes = backend.peak_memory();
    record.rss_peak_bytes = memory::resident_peak_bytes();
    record.page_faults = Some((memory::page_faults() - before.1) as f64 / steps.len() as f64);
    record.cpu_wait_share = CpuUsage::now().since(before.0).cpu_wait_share();
    if !options.test {
        ask_ranks(prepared, &mut record);
        criterion_files::write(&criterion_folder(&results::criterion_home(), case), case, &steps)?;
    }
    Ok(record)
}

/// Runs one step, or two, and makes the plan from the faster; None where it is too slow.
fn plan(prepared: &mut dyn LoadedCase, options: &Options, case: &Case) -> Result<(Duration, Option<Plan>)> {
    let mut step = prepared.time(1)?;
    // The first step also loads kernels, compiles and fills caches: a second one tells
    // more, unless the first was hopeless.
    if step < Plan::limit(options.set, case.workload) / 4 {
        step = prepared.time(1)?.min(step);
    }
    Ok((step, Plan::new(step, options.set, case.workload)))
}

/// What is seen of the process while it is timed.
#[derive(Default)]
struct Seen {
    peak_rss: Option<u64>,
    /// Page faults a step, of each sample.
    faults: Vec<f64>,
    watch: CpuUsage,
}

/// Takes Criterion's samples.
fn time_samples(
    criterion: &mut Criterion,
    sampler: &Sampler,
    options: &Options,
    prepared: &mut dyn LoadedCase,
    case: &Case,
    plan: &Plan,
) -> Result<Seen> {
    let mut group = criterion.benchmark_group(case.workload.id());
    group.sampling_mode(SamplingMode::Flat);
    if !options.own_samples {
        group.sample_size(plan.samples);
    }
    if !options.own_times {
        group.measurement_time(plan.measurement).warm_up_time(plan.warm_up);
    }
    group.throughput(match cost::work(case) {
        Work::Bytes(bytes) => Throughput::Bytes(bytes),
        Work::Samples(count) | Work::Flops(count) => Throughput::Elements(count),
    });
    let mut failed = None;
    let mut seen = Seen::default();
    group.bench_function(benchmark_id(case), |bencher| {
        bencher.iter_custom(|iterations| {
            if failed.is_some() {
                return Duration::from_secs(1);
            }
            let (before, watch) = (memory::page_faults(), CpuUsage::now());
            let elapsed = if options.profile.is_some() {
                sampler.run(prepared, iterations)
            } else {
                prepared.time(iterations)
            };
            seen.peak_rss = memory::resident_peak_bytes();
            seen.watch.add(CpuUsage::now().since(watch));
            seen.faults.push((memory::page_faults() - before) as f64 / iterations as f64);
            // Criterion can't be stopped; the figures are thrown away below.
            elapsed.unwrap_or_else(|error| {
                failed = Some(error);
                Duration::from_secs(1)
            })
        });
    });
    group.finish();
    match failed {
        Some(error) => Err(error),
        None => Ok(seen),
    }
}

/// A case that can't fit says so, and is no failure of the suite.
fn failure(case: &Case, error: &anyhow::Error) -> Record {
    let text = format!("{error:#}");
    let lower = text.to_lowercase();
    if ["out of memory", "can't allocate memory", "unable to allocate"].iter().any(|w| lower.contains(w)) {
        return Record::unmeasured(case, Status::Skipped, format!("out of memory: {text}"));
    }
    Record::unmeasured(case, Status::Error, text)
}

fn benchmark_id(case: &Case) -> BenchmarkId {
    BenchmarkId::new(format!("{}/{}", case.backend, case.method), case.shape)
}

/// Fills a record from the files that Criterion has written.
fn figures(home: &Path, case: &Case, mut record: Record, machine: &Machine) -> Result<Record> {
    let folder = criterion_folder(home, case).join("new");
    let read = |name: &str| -> Result<serde_json::Value> {
        let path = folder.join(name);
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("Criterion left no {}: is the disk full?", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))
    };
    let estimates = read("estimates.json")?;
    let median = &estimates["median"];
    let number = |value: &serde_json::Value| value.as_f64().context("Criterion's estimates have no median");
    let point = number(&median["point_estimate"])?;
    let ceiling = machine::flops_ceiling(case.backend, case.method.precision, machine);
    machine::check_rate(cost::flops(case) / case.shape.ranks() as u64, point, ceiling)?;
    let interval = &median["confidence_interval"];
    let work = cost::work(case);
    record.median_ns = Some(point);
    record.ci_ns = Some([number(&interval["lower_bound"])?, number(&interval["upper_bound"])?]);
    record.page_fault_share = record.page_faults.map(|faults| faults * memory::fault_ns() / point);
    record.samples = read("sample.json")?["times"].as_array().map(|times| times.len() as u64);
    record.throughput = Some(results::Throughput {
        value: work.amount() as f64 / (point * 1e-9),
        unit: work.unit().to_owned(),
    });
    Ok(record)
}
