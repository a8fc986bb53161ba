//! The harness's own tests, a target of their own: bench targets have no test runner.
#![allow(dead_code)] // The run itself, which uses the rest, is the bench targets'.

#[path = "ranks/failure.rs"]
mod failure;
mod options;
mod profiler;
mod sampling_timer;
mod symbols;
mod timing;

mod options_tests {
    use std::path::Path;

    use anyhow::Result;
    use transformer_bench::suite::{Case, Set};

    use super::options::*;

    fn read(line: &str) -> Result<Options> {
        Options::read(line.split_whitespace().map(str::to_owned), None)
    }

    #[test]
    fn a_filter_is_found_among_criterions_options() {
        let options =
            read("--bench --save-baseline main --noplot attention/.*/f32/ --sample-size=20").unwrap();
        assert_eq!(options.filter_text(), "attention/.*/f32/");
        assert!(options.own_samples && !options.own_times && !options.test);
        let case = "attention/torch-cpu/f32/b16-h8-t111-d32".parse().unwrap();
        assert!(options.selects(&case));
        assert!(!options.selects(&Case { workload: transformer_bench::suite::Workload::Forward, ..case }));
    }

    #[test]
    fn without_bench_every_case_runs_once_at_its_smallest_shape() {
        assert_eq!(read("").unwrap().set, Set::Smoke);
        assert!(read("--bench --test").unwrap().test);
        assert_eq!(read("--bench").unwrap().set, Set::Quick);
    }

    #[test]
    fn a_filter_that_matches_nothing_is_refused_with_a_hint() {
        let none = read("--bench train-stepp").unwrap_err().to_string();
        assert!(none.contains("no case") && none.contains("--list"), "{none}");
        let larger = read("--bench indicator-b64").unwrap_err().to_string();
        assert!(larger.contains("--full"), "{larger}");
        assert!(read("--bench [").unwrap_err().to_string().contains("regular expression"));
        let set = Options::read(["--bench".to_owned()].into_iter(), Some("huge".to_owned()));
        assert!(format!("{:#}", set.unwrap_err()).contains("quick"));
    }

    #[test]
    fn a_profile_takes_seconds() {
        let time = std::time::Duration::from_millis(2500);
        assert_eq!(read("--bench --profile-time 2.5").unwrap().profile, Some(time));
        for text in ["--profile-time", "--profile-time long", "--profile-time=-1"] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains("--profile-time") && error.contains("seconds"), "{error}");
        }
    }

    #[test]
    fn a_missing_baseline_is_named() {
        let options = read("--bench --baseline never").unwrap();
        let case = "forward/mlx-cpu/f32/indicator-b16".parse().unwrap();
        let error = options.check_baseline(Path::new("/nowhere"), &[case]).unwrap_err().to_string();
        assert!(error.contains("'never'") && error.contains("--save-baseline"), "{error}");
    }
}

mod timing_tests {
    use std::time::Duration;

    use anyhow::Result;
    use transformer_bench::backend::LoadedCase;
    use transformer_bench::suite::{Set, Workload};

    use super::timing::*;
    use transformer_bench::model::fixture::Tensor;

    struct Empty;

    impl LoadedCase for Empty {
        fn step(&mut self) -> Result<()> {
            std::hint::black_box(&self);
            Ok(())
        }

        fn outputs(&mut self) -> Result<Vec<Tensor>> {
            Ok(Vec::new())
        }
    }

    #[test]
    fn the_loop_costs_under_200_ns_an_iteration() {
        let mut empty: Box<dyn LoadedCase> = Box::new(Empty);
        let mut each: Vec<f64> =
            (0..21).map(|_| empty.time(100_000).unwrap().as_nanos() as f64 / 1e5).collect();
        each.sort_by(f64::total_cmp);
        println!("an empty step costs {:.2} ns", each[10]);
        assert!(each[10] < 200.0, "{} ns", each[10]);
    }

    #[test]
    fn plans_follow_the_first_step() {
        let plan = |seconds, set| Plan::new(Duration::from_secs_f64(seconds), set, Workload::Forward);
        assert_eq!(plan(22.9, Set::Quick), None);
        assert_eq!(plan(1.5, Set::Quick).unwrap().samples, 10);
        let fast = plan(1e-6, Set::Quick).unwrap();
        assert_eq!(fast.samples, 100);
        assert!(fast.measurement.as_secs_f64() < 3.0);
        // Ten steps, one a sample: not twenty.
        let slow = plan(1.0, Set::Quick).unwrap();
        assert!(slow.measurement.as_secs_f64() / 10.0 < 1.0);
    }
}

mod symbols_tests {
    use super::symbols::*;

    #[test]
    fn an_address_has_the_name_of_the_range_that_holds_it() {
        let map = Ranges::of_perf_map("7f00 20 jit_gemm kernel\nnoise\n8000 10 jit_relu\n");
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

    use anyhow::Result;
    use criterion::profiler::Profiler;
    use pprof::protos::Message;
    use transformer_bench::backend::LoadedCase;
    use transformer_bench::model::fixture::Tensor;
    use transformer_bench::profile::Profile;

    use super::profiler::Sampler;

    /// A step that spends nine tenths of its time in one function.
    struct Planted;

    #[inline(never)]
    fn planted_slow_function() {
        (0..900_000u64).for_each(|i| {
            black_box(i);
        });
    }

    #[inline(never)]
    fn the_rest() {
        (0..100_000u64).for_each(|i| {
            black_box(i);
        });
    }

    impl LoadedCase for Planted {
        fn step(&mut self) -> Result<()> {
            planted_slow_function();
            the_rest();
            Ok(())
        }

        fn outputs(&mut self) -> Result<Vec<Tensor>> {
            Ok(Vec::new())
        }
    }

    #[test]
    fn a_planted_slow_function_is_the_heaviest_frame() {
        let folder = std::env::temp_dir().join(format!("transformer-bench-planted-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let sampler = Sampler::default();
        let mut hook = sampler.clone();
        hook.start_profiling("planted", &folder);
        let mut seconds = 0.0;
        while seconds < 4.0 {
            seconds += sampler.run(&mut Planted, 1000).unwrap().as_secs_f64();
        }
        hook.stop_profiling("planted", &folder);
        assert!(sampler.failure().is_none());

        let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
        let folded = String::from_utf8(read("flamegraph.folded")).unwrap();
        let profile = Profile::parse(&folded).unwrap();
        let slow = |stack: &str| stack.starts_with("step;") && stack.contains("planted_slow_function");
        let under: u64 = folded
            .lines()
            .filter(|line| slow(line))
            .map(|line| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap())
            .sum();
        let share = under as f64 / profile.total() as f64;
        assert!((0.8..0.97).contains(&share), "{share} of {} samples: {folded}", profile.total());
        assert!(profile.resolved() > 0.95, "{folded}");
        assert!(String::from_utf8(read("flamegraph.svg")).unwrap().contains("planted_slow_function"));
        let pb = pprof::protos::Profile::decode(&*read("profile.pb")).unwrap();
        assert!(pb.sample.len() > 1 && pb.string_table.iter().any(|s| s.contains("planted_slow_function")));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}

mod failure_tests {
    use std::time::Duration;

    use super::failure::Heard;

    /// Of two ranks: their answers, whether they were about to wait, who has ended and who failed.
    fn cause(answers: [bool; 2], here: [bool; 2], ended: &[&str], failed: &[&str], request: &str) -> String {
        let owned = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
        let answers = answers.map(|there| there.then(|| "an answer".to_owned())).to_vec();
        let heard = Heard { answers, here: here.to_vec(), ended: owned(ended), failed: owned(failed) };
        heard.cause(request, Duration::from_secs(20)).unwrap_or_default()
    }

    #[test]
    fn the_rank_that_is_the_cause_is_named() {
        let (timed_out, no_room) = (&["rank 0: Timed out"][..], &["rank 0: out of memory"][..]);
        assert_eq!(cause([true; 2], [true; 2], &[], &[], "steps 1"), "");
        assert_eq!(
            cause([true, false], [true; 2], &["rank 1: ended"], timed_out, "steps 1"),
            "rank 1: ended"
        );
        // One that hangs keeps the other from beginning, whose engine gives up.
        let said = cause([true, false], [true, false], &[], timed_out, "steps 1");
        assert_eq!(said, "rank 1 did not answer 'steps 1' within 20 s");
        // One that fails leaves the other waiting for it, there and where nobody says so.
        assert_eq!(cause([true, false], [false, true], &[], no_room, "steps 1"), no_room[0]);
        assert_eq!(cause([true, false], [false; 2], &[], no_room, "case ID"), no_room[0]);
        assert_eq!(cause([true; 2], [true; 2], &[], no_room, "steps 1"), no_room[0]);
        assert!(cause([false; 2], [true; 2], &[], &[], "steps 1").starts_with("ranks 0, 1 did not"));
    }
}
