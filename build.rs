//! Says what to do where the frameworks were never set up, before their own build
//! scripts fail at length; compiles the view into NVIDIA GPUs where its headers are.

fn main() {
    println!("cargo::rerun-if-changed=src/profile/native");
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    println!("cargo::rerun-if-env-changed=TRANSFORMER_BENCH_CUDA_INCLUDE");
    println!("cargo::rustc-check-cfg=cfg(cupti)");
    if std::env::var_os("LIBTORCH").is_none() {
        println!("cargo::error=the frameworks are not set up: run ./scripts/setup once, then this again");
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
