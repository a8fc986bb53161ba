//! Tests of the harness. They are a target of their own, because bench targets have no test runner.
#![allow(dead_code)] // Only the bench targets use the rest of the modules.

mod ceiling;
mod criterion_files;
mod estimate;
#[path = "ranks/failure.rs"]
mod failure;
mod measurement;
mod options;
mod processes;
mod processes_tests;
mod profiler;
mod records;
mod sampling_timer;
mod symbols;
mod timing;

use anyhow::Result;
use transformer_bench::backend::LoadedCase;
use transformer_bench::fixture::{Fixture, Tensor};

/// A case whose step calls a function.
struct Step(fn());

impl LoadedCase for Step {
    fn step(&mut self) -> Result<()> {
        std::hint::black_box(&self);
        (self.0)();
        Ok(())
    }

    fn set_inputs(&mut self, _fixture: &Fixture) -> Result<()> {
        Ok(())
    }

    fn checkpoint(&mut self) -> Result<Vec<Tensor>> {
        Ok(Vec::new())
    }

    fn restore(&mut self, _checkpoint: &[Tensor], _seed: u64) -> Result<()> {
        Ok(())
    }

    fn outputs(&mut self) -> Result<Vec<Tensor>> {
        Ok(Vec::new())
    }
}

mod estimate_tests {
    use std::time::Duration;

    use transformer_bench::results::machine::Machine;
    use transformer_bench::suite::{Case, Set, cases};

    use super::estimate::timing;

    fn minutes(backends: &[&str], machine: &Machine) -> f64 {
        let mut quick = cases(Set::Quick);
        quick.retain(|case: &Case| backends.contains(&case.backend.id()));
        assert!(!quick.is_empty());
        timing(&quick, Set::Quick, machine).as_secs_f64() / 60.0
    }

    #[test]
    fn the_quick_set_takes_minutes() {
        let server = Machine { cores: 2, ..Machine::default() };
        // The whole run took 4 to 5 minutes on the two cores that the rates come from. One of these was interleaved rounds.
        let measured = minutes(&["torch-cpu", "mlx-cpu"], &server);
        assert!((2.0..4.5).contains(&measured), "{measured}");
        let mac = |cores: u32| Machine {
            cores: 8,
            gpus: vec![format!("Apple M3 GPU ({cores} cores)")],
            ..Machine::default()
        };
        let all = ["torch-cpu", "torch-mps", "mlx-cpu", "mlx-metal"];
        let [small, large] = [8, 40].map(|cores| minutes(&all, &mac(cores)));
        assert!(small < 25.0 && large < small - 2.0 && large > 4.0, "{small} and {large} min");
    }

    #[test]
    fn a_step_beyond_the_limit_is_one_step() {
        let case: Case = "train-step/torch-cpu/f32/gpt2-b8-t1024".parse().unwrap();
        let slow = Machine { cores: 1, ..Machine::default() };
        let time = timing(&[case], Set::Quick, &slow);
        assert!(time > Duration::from_secs(60) && time < Duration::from_secs(300), "{time:?}");
    }
}

mod records_tests {
    use anyhow::anyhow;
    use transformer_bench::results::Status;

    use super::records::failure_record;

    #[test]
    fn running_out_of_memory_skips_a_case() {
        let case = "train-step/mlx-metal/bf16/gpt2-b8-t1024".parse().unwrap();
        let record = |text: &str| failure_record(&case, &anyhow!("{text}"));
        for text in [
            "CUDA out of memory. Tried to allocate 2.00 GiB",
            "MPS backend out of memory (MPS allocated: 17.5 GiB)",
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory",
            "[metal::malloc] Unable to allocate 9663676416 bytes",
            "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
            "Command buffer execution failed: kIOGPUCommandBufferCallbackErrorOutOfMemory",
        ] {
            let record = record(text);
            assert_eq!(record.status, Status::Skipped, "{text}");
            assert!(record.reason.starts_with("out of memory: "), "{}", record.reason);
        }
        let timeout = "[METAL] Command buffer execution failed: Caused GPU Timeout Error \
                       (00000002:kIOGPUCommandBufferCallbackErrorTimeout)";
        assert_eq!(record(timeout).status, Status::Error);
    }
}

mod options_tests {
    use std::path::Path;

    use anyhow::Result;
    use transformer_bench::suite::{Case, Set};

    use super::options::*;

    fn read(line: &str) -> Result<Options> {
        Options::read(line.split_whitespace().map(str::to_owned), None)
    }

    #[test]
    fn the_filter_is_found_between_options_of_criterion() {
        let options =
            read("--bench --save-baseline main --noplot attention/.*/f32/ --sample-size=20").unwrap();
        assert_eq!(options.filter.as_str(), "attention/.*/f32/");
        assert!(options.own_samples && !options.own_times && !options.test);
        let case = "attention/torch-cpu/f32/b16-h8-t111-d32".parse().unwrap();
        assert!(options.selects(&case));
        assert!(!options.selects(&Case { workload: transformer_bench::suite::Workload::Forward, ..case }));
        let exact = read("--bench --exact train-step/torch-cpu/f32/indicator-b16").unwrap();
        let selects = |id: &str| exact.selects(&id.parse().unwrap());
        assert!(selects("train-step/torch-cpu/f32/indicator-b16"));
        assert!(!selects("train-step/torch-cpu/f32/indicator-b16-dp2"));
        assert_eq!(exact.filter.as_str(), "^train-step/torch-cpu/f32/indicator-b16$");
    }

    #[test]
    fn the_default_set_without_bench_is_smoke() {
        assert_eq!(read("").unwrap().set, Set::Smoke);
        assert!(read("--bench --test").unwrap().test);
        assert_eq!(read("--bench").unwrap().set, Set::Quick);
    }

    #[test]
    fn a_filter_without_a_match_is_an_error_with_a_hint() {
        let none = read("--bench train-stepp").unwrap_err().to_string();
        assert!(none.contains("no case") && none.contains("/list prints them"), "{none}");
        let larger = read("--bench indicator-b64").unwrap_err().to_string();
        assert!(larger.contains("--full"), "{larger}");
        assert!(read("--bench [").unwrap_err().to_string().contains("regular expression"));
        let set = Options::read(["--bench".to_owned()].into_iter(), Some("huge".to_owned()));
        assert!(format!("{:#}", set.unwrap_err()).contains("quick"));
    }

    #[test]
    fn the_profile_time_is_in_seconds() {
        let time = std::time::Duration::from_millis(2500);
        assert_eq!(read("--bench --profile-time 2.5").unwrap().profile, Some(time));
        for text in ["--profile-time", "--profile-time long", "--profile-time=-1"] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains("--profile-time") && error.contains("seconds"), "{error}");
        }
    }

    #[test]
    fn the_error_names_a_missing_baseline() {
        let options = read("--bench --baseline never").unwrap();
        let case = "forward/mlx-cpu/f32/indicator-b16".parse().unwrap();
        let error = options.check_baseline(Path::new("/nowhere"), &[case]).unwrap_err().to_string();
        assert!(error.contains("'never'") && error.contains("--save-baseline"), "{error}");
    }
}

mod timing_tests {
    use std::time::Duration;

    use transformer_bench::backend::LoadedCase;
    use transformer_bench::suite::{Set, Workload};

    use super::Step;
    use super::timing::*;

    #[test]
    fn the_timing_loop_costs_less_than_200_ns_per_step() {
        let mut empty: Box<dyn LoadedCase> = Box::new(Step(|| {}));
        let times: Vec<f64> = (0..21).map(|_| empty.time(100_000).unwrap().as_nanos() as f64 / 1e5).collect();
        let median = transformer_bench::statistics::median(&times);
        println!("an empty step costs {median:.2} ns");
        assert!(median < 200.0, "{median} ns");
    }

    #[test]
    fn the_plan_depends_on_the_step_time() {
        let plan = |seconds, set| Plan::new(Duration::from_secs_f64(seconds), set, Workload::Forward);
        assert_eq!(plan(22.9, Set::Quick), None);
        assert_eq!(plan(1.5, Set::Quick).unwrap().samples, 10);
        let fast = plan(1e-6, Set::Quick).unwrap();
        assert_eq!(fast.samples, 100);
        assert!(fast.measurement.as_secs_f64() < 3.0);
        // Each of the ten samples has one step, not two.
        let slow = plan(1.0, Set::Quick).unwrap();
        assert!(slow.measurement.as_secs_f64() / 10.0 < 1.0);
    }
}

mod symbols_tests {
    use super::symbols::*;

    #[test]
    fn an_address_resolves_to_the_range_that_contains_it() {
        let map = Ranges::from_perf_map("7f00 20 jit_gemm kernel\nnoise\n8000 10 jit_relu\n");
        assert_eq!(map.at(0x7f00), Some("jit_gemm kernel"));
        assert_eq!(map.at(0x7f1f), Some("jit_gemm kernel"));
        assert_eq!(map.at(0x7f20), None);
        assert_eq!(map.at(0x7eff), None);
        assert_eq!(map.at(0x800f), Some("jit_relu"));
    }

    #[test]
    fn functions_of_this_program_have_names() {
        let here = functions_of_this_program_have_names as fn() as usize;
        let names = Symbols::read().at(here).to_vec();
        assert!(names.last().unwrap().contains("functions_of_this_program"), "{names:?}");
    }
}

mod profiler_tests {
    use std::hint::black_box;
    use std::sync::Mutex;

    use criterion::profiler::Profiler;
    use pprof::protos::Message;
    use transformer_bench::files::Scratch;
    use transformer_bench::profile::Profile;

    use super::Step;
    use super::profiler::Sampler;

    /// A process has one profiler.
    static PROFILER: Mutex<()> = Mutex::new(());

    #[inline(never)]
    fn slow_function() {
        (0..900_000u64).for_each(|i| {
            black_box(i);
        });
    }

    #[inline(never)]
    fn fast_function() {
        (0..100_000u64).for_each(|i| {
            black_box(i);
        });
    }

    /// Profiles steps under a name. Returns the folder of the profiles.
    fn profile(name: &str, run: impl FnOnce(&Sampler)) -> Scratch {
        let _only = PROFILER.lock();
        let path = std::env::temp_dir().join(format!("transformer-bench-{name}-{}", std::process::id()));
        let scratch = Scratch(path);
        std::fs::create_dir_all(&scratch.0).unwrap();
        let sampler = Sampler::default();
        let mut profiler = sampler.clone();
        profiler.start_profiling(name, &scratch.0);
        run(&sampler);
        profiler.stop_profiling(name, &scratch.0);
        assert!(sampler.take_error().is_none());
        scratch
    }

    #[test]
    fn a_function_with_90_percent_of_the_time_is_the_heaviest_frame() {
        let scratch = profile("slow", |sampler| {
            let mut step = Step(|| {
                slow_function();
                fast_function();
            });
            let mut seconds = 0.0;
            while seconds < 4.0 {
                seconds += sampler.run(&mut step, 1000).unwrap().as_secs_f64();
            }
        });
        let Scratch(folder) = &scratch;
        let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
        let folded = String::from_utf8(read("flamegraph.folded")).unwrap();
        let profile = Profile::parse(&folded).unwrap();
        let slow = |stack: &str| stack.starts_with("step;") && stack.contains("slow_function");
        let weight: u64 = folded
            .lines()
            .filter(|line| slow(line))
            .map(|line| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap())
            .sum();
        let share = weight as f64 / profile.total() as f64;
        assert!((0.8..0.97).contains(&share), "{share} of {} samples: {folded}", profile.total());
        assert!(profile.named_share() > 0.95, "{folded}");
        assert!(String::from_utf8(read("flamegraph.svg")).unwrap().contains("slow_function"));
        let pb = pprof::protos::Profile::decode(&*read("profile.pb")).unwrap();
        assert!(pb.sample.len() > 1 && pb.string_table.iter().any(|s| s.contains("slow_function")));
    }

    #[test]
    fn a_single_long_step_is_profiled() {
        let scratch = profile("long", |sampler| {
            let mut step = Step(|| {
                let start = std::time::Instant::now();
                while start.elapsed().as_secs() < 2 {
                    slow_function();
                }
            });
            // Criterion asks for no more steps if the first one exceeds the profile time.
            sampler.run(&mut step, 1).unwrap();
            sampler.run(&mut step, 0).unwrap();
        });
        let Scratch(folder) = &scratch;
        let folded = std::fs::read_to_string(folder.join("flamegraph.folded")).unwrap();
        assert!(Profile::parse(&folded).unwrap().total() > 50, "{folded}");
        assert!(folder.join("flamegraph.svg").exists());
    }
}

mod criterion_tests {
    use std::time::Duration;

    use criterion::measurement::Measurement;
    use serde_json::{Value, json};
    use transformer_bench::files::Scratch;
    use transformer_bench::suite::Case;

    use super::criterion_files;
    use super::measurement::{StepTime, throughput};

    #[test]
    fn throughputs_have_the_unit_of_the_case() {
        let step_time = StepTime::default();
        for (id, ns, expected) in [
            // 2 · 1024³ FLOPs in 1 ms, 100 ns and 10 s.
            ("matmul-peak/torch-cpu/f32/n1024", 1e6, "2.1475 TFLOP/s"),
            ("matmul-peak/torch-cpu/f32/n1024", 1e2, "21.475 PFLOP/s"),
            ("matmul-peak/torch-cpu/f32/n1024", 1e10, "214.75 MFLOP/s"),
            ("copy-peak/torch-cpu/f32/1mib", 1e5, "20.972 GB/s"),
            ("optimizer-step/torch-cpu/f32/indicator-b16", 1e6, "135.43 GB/s"),
            ("train-step/torch-cpu/f32/indicator-b16", 2e8, "80.000 samples/s"),
            ("forward/mlx-cpu/f32/indicator-b64", 1e6, " 64000 samples/s"),
            ("train-step/torch-cpu/f32/gpt2-b8-t1024", 1e9, "8192.0 tokens/s"),
        ] {
            let case: Case = id.parse().unwrap();
            step_time.set_case(&case);
            assert_eq!(step_time.formatter().format_throughput(&throughput(&case), ns), expected, "{id}");
        }
        // One prefix for all values: that of the typical one.
        let case: Case = "copy-peak/torch-cpu/f32/1mib".parse().unwrap();
        step_time.set_case(&case);
        let mut values = [1e5, 1e7];
        let unit = step_time.formatter().scale_throughputs(1e5, &throughput(&case), &mut values);
        assert_eq!((unit, values), ("GB/s", [20.97152, 0.2097152]));
    }

    #[test]
    fn times_are_those_of_criterions_wall_time() {
        let step_time = StepTime::default();
        assert_eq!(step_time.to_f64(&Duration::from_micros(3)), 3000.0);
        assert_eq!(step_time.formatter().format_value(1.25e7), "12.500 ms");
        assert_eq!(step_time.formatter().scale_for_machines(&mut [1.0]), "ns");
    }

    #[test]
    fn files_of_slow_cases_have_criterions_estimates() {
        let path = std::env::temp_dir().join(format!("transformer-bench-files-{}", std::process::id()));
        let Scratch(folder) = &Scratch(path);
        let case = "train-step/torch-cpu/f32/indicator-b16".parse().unwrap();
        let steps = [1, 2, 3, 5, 9].map(Duration::from_nanos);
        criterion_files::write(folder, &case, &steps).unwrap();
        let read = |name: &str| -> Value {
            serde_json::from_slice(&std::fs::read(folder.join("new").join(name)).unwrap()).unwrap()
        };
        let estimates = read("estimates.json");
        let point = |name: &str| estimates[name]["point_estimate"].as_f64().unwrap();
        assert_eq!((point("mean"), point("median")), (4.0, 3.0));
        assert_eq!(estimates["median"]["confidence_interval"]["lower_bound"], 1.0);
        assert_eq!(estimates["median"]["confidence_interval"]["upper_bound"], 9.0);
        assert_eq!(point("std_dev"), 10f64.sqrt());
        // The deviations are 2, 1, 0, 2 and 6; Criterion scales their median (criterion 0.8,
        // src/stats/univariate/sample.rs).
        assert_eq!(point("median_abs_dev"), 2.0 * 1.4826);
        assert_eq!(read("sample.json")["times"], json!([1.0, 2.0, 3.0, 5.0, 9.0]));
        let benchmark = read("benchmark.json");
        assert_eq!(benchmark["throughput"], json!({"Elements": 16}));
        assert_eq!(benchmark["directory_name"], "train-step/torch-cpu_f32/indicator-b16");
    }
}

mod failure_tests {
    use std::time::Duration;

    use super::failure::FailureReport;

    /// Returns the blame of a request to two ranks: which have answered, which wait, which ended and which failed.
    fn blame(
        answered: [bool; 2],
        waiting: [bool; 2],
        ended: &[&str],
        failed: &[&str],
        request: &str,
    ) -> String {
        let owned = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
        let answers = answered.map(|answered| answered.then(|| "an answer".to_owned())).to_vec();
        let report =
            FailureReport { answers, waiting: waiting.to_vec(), ended: owned(ended), failed: owned(failed) };
        report.blame(request, Duration::from_secs(20)).unwrap_or_default()
    }

    #[test]
    fn the_rank_that_caused_a_failure_is_blamed() {
        let (timed_out, no_room) = (&["rank 0: Timed out"][..], &["rank 0: out of memory"][..]);
        assert_eq!(blame([true; 2], [true; 2], &[], &[], "steps 1"), "");
        assert_eq!(
            blame([true, false], [true; 2], &["rank 1: ended"], timed_out, "steps 1"),
            "rank 1: ended"
        );
        // Rank 1 hangs before the barrier, so rank 0 times out.
        let reason = blame([true, false], [true, false], &[], timed_out, "steps 1");
        assert_eq!(reason, "rank 1 did not answer 'steps 1' within 20 s");
        // Rank 0 fails and rank 1 waits for it, with and without announcing that.
        assert_eq!(blame([true, false], [false, true], &[], no_room, "steps 1"), no_room[0]);
        assert_eq!(blame([true, false], [false; 2], &[], no_room, "case ID"), no_room[0]);
        assert_eq!(blame([true; 2], [true; 2], &[], no_room, "steps 1"), no_room[0]);
        assert!(blame([false; 2], [true; 2], &[], &[], "steps 1").starts_with("ranks 0, 1 did not"));
    }
}
