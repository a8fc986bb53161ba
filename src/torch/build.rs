//! Compiles the C++ extension against the libtorch that tch is built with.

fn main() {
    println!("cargo::rerun-if-changed=native/extension.cpp");
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    let Some(libtorch) = std::env::var_os("LIBTORCH") else {
        println!("cargo::error=the frameworks are not set up: run ./scripts/setup once, then this again");
        return;
    };
    let include = std::path::Path::new(&libtorch).join("include");
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .opt_level(2)
        .warnings(false)
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .file("native/extension.cpp")
        .compile("transformer_bench_torch");
}
