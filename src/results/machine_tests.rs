use super::*;

#[test]
fn reads_this_machine() {
    let machine = Machine::read();
    assert!(machine.cores >= 1 && machine.memory_bytes > 1 << 28, "{machine:?}");
    assert!(!machine.cpu.is_empty() && !machine.os.is_empty(), "{machine:?}");
    assert!(crate::memory::resident_bytes() > 1 << 16);
}

#[test]
fn another_driver_changes_the_fingerprint() {
    let other = Machine { driver: "another".to_owned(), ..Machine::default() };
    assert_ne!(other.fingerprint(), Machine::default().fingerprint());
}

fn xeon() -> Machine {
    Machine {
        background_load: None,
        cpu: "Xeon".to_owned(),
        cores: 2,
        memory_bytes: 8 << 30,
        os: "Linux 1".to_owned(),
        arch: "x86_64".to_owned(),
        gpus: vec!["NVIDIA H100 80GB HBM3".to_owned()],
        driver: "NVIDIA 1".to_owned(),
        commit: "a".to_owned(),
        dirty: false,
        versions: [
            "PyTorch",
            "PyTorch threads",
            "PyTorch BLAS",
            "PyTorch instruction set",
            "MLX",
            "MLX BLAS",
            "MLX BLAS threads",
        ]
        .map(|name| (name.to_owned(), "1".to_owned()))
        .into(),
        profile: "release".to_owned(),
        power: ["governor", "no turbo", "GPU power limit, maximum clock, MIG"]
            .map(|name| (name.to_owned(), "1".to_owned()))
            .into(),
        environment: vec![("OMP_NUM_THREADS".to_owned(), "1".to_owned())],
        simd: "AVX2".to_owned(),
        date: "2026-11-25".to_owned(),
    }
}

#[test]
fn every_difference_that_matters_is_named() {
    let base = xeon();
    assert!(base.differences(&base).is_empty());
    assert!(base.differences(&Machine { commit: "b".to_owned(), ..base.clone() }).is_empty());
    let mut seeded: Vec<(String, Machine)> = Vec::new();
    let mut plant = |name: &str, edit: &dyn Fn(&mut Machine)| {
        let mut other = base.clone();
        edit(&mut other);
        seeded.push((name.to_owned(), other));
    };
    plant("CPU", &|m| m.cpu.push('2'));
    plant("cores", &|m| m.cores = 4);
    plant("memory", &|m| m.memory_bytes *= 2);
    plant("system", &|m| m.os.push('2'));
    plant("vector instructions", &|m| m.simd = "AVX512".to_owned());
    plant("architecture", &|m| m.arch = "aarch64".to_owned());
    plant("GPU", &|m| m.gpus[0] = "NVIDIA H200".to_owned());
    plant("GPU", &|m| m.gpus.push("NVIDIA H100 80GB HBM3".to_owned()));
    plant("GPU", &|m| m.gpus.clear());
    plant("driver", &|m| m.driver.push('2'));
    plant("build profile", &|m| m.profile = "debug".to_owned());
    for i in 0..base.versions.len() {
        plant(&base.versions[i].0, &|m| m.versions[i].1.push('2'));
    }
    plant("MLX", &|m| m.versions.retain(|(name, _)| name != "MLX"));
    for i in 0..base.power.len() {
        plant(&base.power[i].0, &|m| m.power[i].1.push('2'));
    }
    plant("OMP_NUM_THREADS", &|m| m.environment[0].1 = "2".to_owned());
    plant("OMP_NUM_THREADS", &|m| m.environment.clear());
    plant("MKL_NUM_THREADS", &|m| m.environment.push(("MKL_NUM_THREADS".to_owned(), "1".to_owned())));
    assert!(seeded.len() >= 20);
    for (name, other) in seeded {
        let found = base.differences(&other);
        assert_eq!(found.len(), 1, "{name}: {found:?}");
        assert!(found[0].contains(&name), "{name}: {found:?}");
    }
}

#[test]
fn slugs_are_readable() {
    let mut machine =
        Machine { cpu: "Intel(R) Xeon(R) Processor".to_owned(), cores: 2, ..Machine::default() };
    assert_eq!(machine.slug(), "intel-xeon-processor-2-cores");
    machine.simd = "AVX512".to_owned();
    assert_eq!(machine.slug(), "intel-xeon-processor-avx512-2-cores");
    machine.gpus.push("NVIDIA H100 80GB HBM3".to_owned());
    assert_eq!(machine.slug(), "h100-80gb-hbm3");
    machine.gpus.push("NVIDIA H100 80GB HBM3".to_owned());
    assert_eq!(machine.slug(), "h100-80gb-hbm3-x2");
    assert_eq!(Machine::default().slug(), "0-cores");
    let arm = Machine { arch: "aarch64".to_owned(), cores: 4, ..Machine::default() };
    assert_eq!(arm.slug(), "aarch64-4-cores");
    assert_eq!(Machine { cpu: "Neoverse-V1".to_owned(), ..arm }.slug(), "neoverse-v1-4-cores");
    let gpus = vec!["Apple M3 GPU (10 cores)".to_owned()];
    let mac = Machine { gpus, memory_bytes: 16 << 30, ..Machine::default() };
    assert_eq!(mac.slug(), "apple-m3-gpu-10-cores-16-gb");
}

#[test]
fn settings_that_slow_a_mac_down_are_warned_of() {
    let machine = |source: &str, mode: &str| Machine {
        power: [(SOURCE, source), (LOW_POWER_MODE, mode)].map(|(n, v)| (n.to_owned(), v.to_owned())).into(),
        ..Machine::default()
    };
    assert!(machine("AC Power", "off").power_warnings().is_empty());
    let both = machine("Battery Power", "on").power_warnings();
    assert_eq!(both, ["The machine ran on battery power.", "Low-power mode was on."]);
}

#[test]
fn a_time_beyond_the_hardware_is_an_error() {
    let machine = Machine { cores: 2, ..Machine::default() };
    let ceiling = flops_ceiling(BackendId::TorchCpu, Precision::F32, &machine);
    // 2·1024³ FLOPs: 300 GFLOP/s is fast on two cores, no CPU reaches 200 TFLOP/s.
    assert!(check_rate(2 << 30, 7e6, ceiling).is_ok());
    let error = check_rate(2 << 30, 1e4, ceiling).unwrap_err().to_string();
    assert!(error.contains("TFLOP/s") && error.contains("wrong"), "{error}");
    assert!(check_rate(2 << 30, 1.0, None).is_ok());
}

#[test]
fn gpus_are_known_by_their_longest_name() {
    assert_eq!(dense_peak("NVIDIA H100 80GB HBM3", Precision::Mixed), Some(989.4e12));
    assert_eq!(dense_peak("NVIDIA H100 PCIe", Precision::Bf16), Some(756e12));
    assert_eq!(dense_peak("Voodoo 2", Precision::F32), None);
}

#[test]
fn a_version_that_an_older_file_lacks_is_not_a_difference() {
    let old = xeon();
    let with = |value: &str| {
        let mut machine = xeon();
        machine.add_versions([("PyTorch compiler".to_owned(), value.to_owned())]);
        machine
    };
    assert!(old.differences(&with("GCC 13")).is_empty() && with("GCC 13").differences(&old).is_empty());
    assert_eq!(with("GCC 11").differences(&with("GCC 13")), ["PyTorch compiler: GCC 11 / GCC 13"]);
}
