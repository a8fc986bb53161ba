//! The harness's own tests, a target of their own: bench targets have no test runner.
#![allow(dead_code)] // The run itself, which uses the rest, is the bench targets'.

mod options;
mod timing;

mod options_tests {
    use std::path::Path;

    use anyhow::Result;
    use transformer_bench::case::{Case, Set};

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
        let case = "attention/torch-cpu/f32/b16-h8-n111-d32".parse().unwrap();
        assert!(options.selects(&case));
        assert!(!options.selects(&Case { workload: transformer_bench::case::Workload::Forward, ..case }));
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
    use transformer_bench::backend::Prepared;
    use transformer_bench::case::{Set, Workload};

    use super::timing::*;
    use transformer_bench::fixture::Tensor;

    struct Empty;

    impl Prepared for Empty {
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
        let mut empty: Box<dyn Prepared> = Box::new(Empty);
        let mut each: Vec<f64> =
            (0..21).map(|_| time(empty.as_mut(), 100_000).unwrap().as_nanos() as f64 / 1e5).collect();
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
