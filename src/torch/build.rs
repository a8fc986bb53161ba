//! Compiles the C++ extension against the libtorch that tch is built with.

fn main() {
    println!("cargo::rerun-if-changed=native");
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    let Some(libtorch) = std::env::var_os("LIBTORCH") else {
        println!("cargo::error=the frameworks are not set up: run ./scripts/setup, then build again");
        return;
    };
    let libtorch = std::path::Path::new(&libtorch);
    let include = libtorch.join("include");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .opt_level(2)
        .warnings(false)
        .include("native")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .files(
            ["distributed", "extension", "graph", "muon", "package"].map(|name| format!("native/{name}.cpp")),
        );
    // The executable contains set-up's choice of Python, which runs TorchInductor.
    for name in ["PYTHON", "PYTHONPATH", "NO_INDUCTOR"] {
        let name = format!("TRANSFORMER_BENCH_{name}");
        println!("cargo::rerun-if-env-changed={name}");
        println!("cargo::rustc-env={name}={}", std::env::var(&name).unwrap_or_default());
    }
    println!("cargo::rerun-if-env-changed=TRANSFORMER_BENCH_CUDA_INCLUDE");
    if libtorch.join("lib/libtorch_cuda.so").exists() {
        match std::env::var_os("TRANSFORMER_BENCH_CUDA_INCLUDE") {
            Some(cuda) => {
                build.define("TB_CUDA", None).include(cuda);
                println!("cargo::rustc-link-lib=c10_cuda");
            }
            None => {
                println!(
                    "cargo::warning=built without CUDA graphs, because CUDA headers are missing: run ./scripts/setup"
                )
            }
        }
    }
    build.compile("transformer_bench_torch");
}
