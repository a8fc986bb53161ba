//! Reports missing frameworks before their own build scripts fail with long messages. Compiles the profiler for NVIDIA
//! GPUs (CUPTI) if its headers are available.

fn main() {
    println!("cargo::rerun-if-changed=src/profile/native");
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    println!("cargo::rerun-if-env-changed=TRANSFORMER_BENCH_CUDA_INCLUDE");
    println!("cargo::rustc-check-cfg=cfg(cupti)");
    if std::env::var_os("LIBTORCH").is_none() {
        println!("cargo::error=the frameworks are not set up: run ./scripts/setup, then build again");
    }
    let headers = std::env::var_os("TRANSFORMER_BENCH_CUDA_INCLUDE").map(std::path::PathBuf::from);
    if let Some(headers) = headers.filter(|folder| folder.join("cupti.h").exists()) {
        cc::Build::new()
            .cpp(true)
            .std("c++20")
            .opt_level(2)
            .include(headers)
            .file("src/profile/native/cupti.cpp")
            .compile("transformer_bench_gpu");
        println!("cargo::rustc-cfg=cupti");
    }
}
